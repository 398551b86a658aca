"""The locks: what each thing that a plan does takes, on which table, and what it reads. Computed without a connection.

Lock modes and what they conflict with: PostgreSQL manual, "Explicit Locking", table 13.2. Which statement takes which:
the reference page of each. tests/test_views.py compares with the locks that the steps' transactions really hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from scripts.chain import Step, label
from scripts.plan import Plan
from scripts.survey import Item, outermost


class Lock(Enum):
    """A mode of lock on a table that the chain takes."""

    ROW_SHARE = "ROW SHARE"
    ROW_EXCLUSIVE = "ROW EXCLUSIVE"
    SHARE_UPDATE_EXCLUSIVE = "SHARE UPDATE EXCLUSIVE"
    SHARE_ROW_EXCLUSIVE = "SHARE ROW EXCLUSIVE"
    ACCESS_EXCLUSIVE = "ACCESS EXCLUSIVE"


_STRONG = ("ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock")
_WRITING = ("RowExclusiveLock", "ShareUpdateExclusiveLock", *_STRONG)
# The modes of others, as pg_locks names them, that it waits for.
_CONFLICTS = {
    Lock.ROW_SHARE: _STRONG[2:],
    Lock.ROW_EXCLUSIVE: _STRONG,
    Lock.SHARE_UPDATE_EXCLUSIVE: _WRITING[1:],
    Lock.SHARE_ROW_EXCLUSIVE: _WRITING,
    Lock.ACCESS_EXCLUSIVE: ("AccessShareLock", "RowShareLock", *_WRITING),
}


class Effect(Enum):
    """What a statement does, to the rows above all."""

    NEW = "new table"
    CATALOG = "catalog change"
    LOOK_UP = "look-ups by key, five rows at most"
    SCAN = "scan: reads the rows once"
    BUILD = "build: reads the rows twice"


@dataclass(frozen=True)
class Change:
    """One thing that a step does.

    statement: in short (`invoke plan --sql` has the SQL as it is sent); lock, table: None where it concerns no table
    that stands.
    """

    step: str
    online: bool
    statement: str
    effect: Effect
    lock: Lock | None
    table: str | None

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Return the lock modes of others that hold it up: a build also waits for whoever writes the table."""
        if self.lock is None:
            return ()
        return _WRITING if self.effect is Effect.BUILD else _CONFLICTS[self.lock]


def foreseen(plan: Plan, steps: Sequence[Step]) -> tuple[Change, ...]:
    """Return what the plan's steps would do if every table stood: first what is transactional, then what is online."""
    changes = []
    for planned in plan.steps:
        step = next(step for step in steps if step.stem == planned.stem)
        mended = outermost(item for item in planned.reasons if not item.in_the_way)
        mended.sort(key=lambda item: step.atomic.find(f"CREATE TABLE {item.name} "))  # tables as they are created
        changes += [change for item in mended for change in _changes(step, item, mended)]
    return tuple(sorted(dict.fromkeys(changes), key=lambda change: change.online))


def settled(changes: Iterable[Change], standing: Collection[str]) -> tuple[Change, ...]:
    """Return what is left of them where only these tables stand; the others are new, and nobody uses them yet."""
    return tuple(
        change if change.table in (None, *standing) else replace(change, effect=Effect.NEW, lock=None, table=None)
        for change in changes
        if change.table in (None, *standing) or " ADD COLUMN " in change.statement
    )


def with_online_parts(plan: Plan, steps: Sequence[Step], items: Sequence[Item]) -> Plan:
    """Return the plan with the online parts that will be due: none for new tables, a scan for keys that are added."""
    absent = {item.name for item in items if item.name == item.table and item.actual is None}
    changes = settled(foreseen(plan, steps), {item.table for item in items} - absent)
    online = {change.step for change in changes if change.online}
    return Plan(tuple(replace(step, online=label(step.stem) in online) for step in plan.steps))


def waits_for(changes: Iterable[Change]) -> dict[str, set[str]]:
    """Return for each table the lock modes of others that would be waited for."""
    wanted: dict[str, set[str]] = {}
    for change in changes:
        if change.table:
            wanted.setdefault(change.table, set()).update(change.waits_for)
    return wanted


def reshaped(changes: Iterable[Change]) -> list[str]:
    """Return the tables whose columns change: SELECT * statements of them that are prepared fail once.

    "cached plan must not change result type", SQLSTATE 0A000; most drivers then prepare them anew.
    """
    shapes = re.compile(r" (ADD|RENAME) COLUMN ")
    return list(dict.fromkeys(c.table for c in changes if c.table and shapes.search(c.statement)))


def left_to_the_rows(changes: Iterable[Change], plan: Plan) -> list[str]:
    """Return what rows may refuse, which nobody has looked at: those of a foreign key that stands can be counted."""
    counted = tuple(item.expected for item in plan.missing if item.orphans)
    refusable = (c for c in changes if c.effect is Effect.SCAN or c.statement.startswith("CREATE UNIQUE INDEX"))
    return list(dict.fromkeys(c.statement for c in refusable if not c.statement.endswith(counted)))


# ── what mends an item, by its kind ────────────────────────────────────────────────────────────────────────────────


def _changes(step: Step, item: Item, mended: Sequence[Item]) -> Iterator[Change]:
    for pattern, write in _KINDS.items():
        if found := re.fullmatch(pattern, item.name):
            for statement, effect, lock, table in write(step, item, found, {other.name for other in mended}):
                online = effect in (Effect.BUILD, Effect.SCAN) or lock is Lock.ROW_SHARE
                yield Change(step.label, online, statement, effect, lock, table)


_Spec = tuple[str, Effect, "Lock | None", "str | None"]


def _table(step: Step, item: Item, _: re.Match[str], __: set[str]) -> Iterator[_Spec]:
    """Create it, in a transaction in which nobody sees it; tables that its foreign keys lead to stand, perhaps."""
    yield f"CREATE TABLE {item.table}", Effect.NEW, None, None
    for parent in step.parents(item.table):
        yield f"{item.table}: REFERENCES {parent}", Effect.CATALOG, Lock.SHARE_ROW_EXCLUSIVE, parent


def _column(_: Step, item: Item, found: re.Match[str], __: set[str]) -> Iterator[_Spec]:
    column, alter = found["column"], f"ALTER TABLE {item.table}"
    if item.actual is None:
        yield f"{alter} ADD COLUMN {column} {item.expected}", Effect.CATALOG, Lock.ACCESS_EXCLUSIVE, item.table
    elif not item.gives_way:  # only its default is missing
        default = item.expected.removeprefix(item.actual).strip()
        yield f"{alter} ALTER COLUMN {column} SET {default}", Effect.CATALOG, Lock.ACCESS_EXCLUSIVE, item.table
    else:
        yield f"{alter} RENAME COLUMN {column} TO {column}_uuid", Effect.CATALOG, Lock.ACCESS_EXCLUSIVE, item.table
        yield f"{alter} ADD COLUMN {column} {item.expected}", Effect.CATALOG, Lock.ACCESS_EXCLUSIVE, item.table
        yield (
            f"CREATE INDEX CONCURRENTLY on the new {item.table}.{column}",
            Effect.BUILD,
            Lock.SHARE_UPDATE_EXCLUSIVE,
            item.table,
        )
    if item.table == "slots":
        yield "UPDATE slots: defaults of critical slots", Effect.LOOK_UP, Lock.ROW_EXCLUSIVE, "slots"


def _foreign_key(_: Step, item: Item, found: re.Match[str], mended: set[str]) -> Iterator[_Spec]:
    parent = item.expected.partition("REFERENCES ")[2].partition("(")[0]
    if item.actual is None:
        with_column = f"{item.table}.{found['column']}" in mended  # which is NULL everywhere: the key is valid at once
        statement = f"ALTER TABLE {item.table} ADD {item.expected}{'' if with_column else ' NOT VALID'}"
        for table in (item.table, parent):
            yield statement, Effect.CATALOG, Lock.SHARE_ROW_EXCLUSIVE, table
        if with_column:
            return
    statement = f"ALTER TABLE {item.table} VALIDATE CONSTRAINT: {item.expected}"
    yield statement, Effect.SCAN, Lock.SHARE_UPDATE_EXCLUSIVE, item.table
    if parent != item.table:
        yield statement, Effect.SCAN, Lock.ROW_SHARE, parent


def _index(_: Step, item: Item, found: re.Match[str], __: set[str]) -> Iterator[_Spec]:
    if item.actual is not None:  # INVALID
        statement = f"DROP INDEX CONCURRENTLY {found['name']}"
        yield statement, Effect.CATALOG, Lock.SHARE_UPDATE_EXCLUSIVE, item.table
    statement = f"CREATE INDEX CONCURRENTLY {found['name']} ON {item.table}"
    yield statement, Effect.BUILD, Lock.SHARE_UPDATE_EXCLUSIVE, item.table


def _key(_: Step, item: Item, found: re.Match[str], __: set[str]) -> Iterator[_Spec]:
    statement = f"CREATE UNIQUE INDEX CONCURRENTLY ON {item.table} ({found['columns']})"
    yield statement, Effect.BUILD, Lock.SHARE_UPDATE_EXCLUSIVE, item.table


def _simple(statement: str, lock: Lock | None) -> Callable[..., Iterator[_Spec]]:
    def write(_: Step, item: Item, found: re.Match[str], __: set[str]) -> Iterator[_Spec]:
        what = statement.format(**{"table": item.table, "name": "", **found.groupdict()})
        yield what, Effect.CATALOG, lock, item.table if lock else None

    return write


_KINDS: dict[str, Callable[[Step, Item, re.Match[str], set[str]], Iterator[_Spec]]] = {
    r"\w+": _table,
    r"\w+\.(?P<column>\w+)": _column,
    r"\w+ foreign key \((?P<column>\w+)\)": _foreign_key,
    r"\w+ index (?P<name>\w+)": _index,
    r"\w+ \((?P<columns>.+)\)": _key,
    r"(?P<name>[\w.]+) comment": _simple("COMMENT ON {name}", Lock.SHARE_UPDATE_EXCLUSIVE),
    r"\w+ row-level security": _simple("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY", Lock.ACCESS_EXCLUSIVE),
    r"\w+ policy (?P<name>\w+)": _simple("CREATE POLICY {name} ON {table}", Lock.ACCESS_EXCLUSIVE),
    r"\w+ trigger (?P<name>\w+)": _simple("CREATE TRIGGER {name} ON {table}", Lock.SHARE_ROW_EXCLUSIVE),
    r"\w+ function (?P<name>\w+\(\))": _simple("CREATE FUNCTION {name}", None),
}
