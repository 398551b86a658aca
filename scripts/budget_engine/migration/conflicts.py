"""The commands that clear conflicts: one short rule for each kind, none of which changes a value.

What has a name of ours is renamed. What can be restored is dropped, and its definition printed. A column of another
type is renamed where a step adds it again; where it came with its table, the table moves to a new schema. All this is
computed from the checks and from facts that one query reads (db/conflicts.sql).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from budget_engine.migration.chain import DB, query_of
from budget_engine.migration.checks import Check, Kind
from budget_engine.spelling import literal, respelled, shown

_TARGET = re.compile(r"(?<=^REFERENCES )[^(]+")  # of a foreign key
_NAMED = (Kind.TABLE, Kind.KEY, Kind.FOREIGN_KEY, Kind.INDEX, Kind.TRIGGER)  # things on a column may have their names
_PRIMARY = "PRIMARY KEY"
PLAIN = "set_config('standard_conforming_strings', 'on', true)"  # what is to hold for the query: definitions come so


RECREATE = "invoke prereqs --recreate"  # the task to run where no SQL clears a conflict


@dataclass(frozen=True)
class Fact:
    """Something around a check: a command, what restores that which it drops, and more, as the query calls it.

    what: "table", "column" and "key" say how it is; "leave", "drop", "rename", "elsewhere" (of what stays when the
    table moves) and the words of Check.blocked are commands; "led to" drops foreign keys of others; "cannot" is what no
    command restores.
    """

    what: str
    command: str
    restore: str
    more: Mapping[str, Any]


def query(checks: Sequence[Check]) -> str:
    """Write the query for the facts around the conflicts; checks: all of the survey."""
    found = {check.table: check.found for check in checks if check.kind is Kind.TABLE}
    words = ("kind", "table_name", "name", "expected", "our_name", "taken", "found", "conflict")
    listed = []
    for check in (check for check in checks if check.conflict or check.kind in _NAMED):
        expected = _TARGET.sub(lambda target: found.get(target[0]) or target[0], check.expected)
        taken = "".join(re.findall(r"its name (\S+) is taken", check.actual or ""))
        rest = (expected, taken or _our_name(check), taken != "", check.found, check.conflict)
        listed.append(dict(zip(words, (check.kind.value, check.table, check.name, *rest), strict=True)))
    written = literal(json.dumps(listed, ensure_ascii=False))
    return query_of(DB / "conflicts.sql").replace(":'checks'", written)


def _our_name(check: Check) -> str:
    """Return the name that a step, or a command, gives to what the check is about."""
    if check.kind is Kind.FOREIGN_KEY:
        return f"{check.table}_{check.name}_fkey"
    if check.kind is Kind.KEY:
        return (
            f"{check.table}_pkey" if check.expected == _PRIMARY else f"uk_{check.table}_{check.name.replace(', ', '_')}"
        )
    return check.name or check.table


def commands(checks: Sequence[Check], rows: Iterable[Sequence[str | None]]) -> dict[Check, tuple[str, ...]]:
    """Return, for each conflict, what clears it: SQL, comments, or RECREATE.

    checks: all of the survey; rows: what the query found. Several conflicts may have the same commands: each is to be
    run once, in the order of the checks.
    """
    facts: dict[tuple[str, ...], list[Fact]] = {}
    for kind, table, name, what, command, restore, more in rows:
        fact = Fact(str(what), command or "", restore or "", json.loads(more or "{}"))
        facts.setdefault((str(kind), str(table), str(name)), []).append(fact)
    return _Clearing(checks, facts).all()


def sql(checks: Iterable[Check], cleared: Mapping[Check, Sequence[str]]) -> list[str]:
    """Return what psql is to run for these conflicts, each command once."""
    every = dict.fromkeys(command for check in checks for command in cleared.get(check, ()))
    return [command for command in every if command != RECREATE]


@dataclass
class _Clearing:
    """The rules; moves: the commands for each table that has to move; recreated: what moves with the task."""

    checks: Sequence[Check]
    facts: Mapping[tuple[str, ...], Sequence[Fact]]
    moves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    recreated: set[str] = field(default_factory=set)

    def all(self) -> dict[Check, tuple[str, ...]]:
        ways = {check: _told(check) or self.in_place(check) for check in self.checks if check.conflict}
        gone = [check for check, way in ways.items() if way is None]
        if steps := {check.step for check in gone if check.on_request}:
            core = {check.table for check in self.checks if check.kind is Kind.TABLE and check.step in steps}
            leading = {check.table for check in self.checks if core.intersection(_TARGET.findall(check.actual or ""))}
            self.recreated = core | leading
        leaving = self.recreated.union(check.table for check in gone)
        return {check: tuple(self.away(check) if check.table in leaving else way or ()) for check, way in ways.items()}

    def of(self, check: Check, *whats: str) -> list[Fact]:
        """Return facts in the order in which their commands are to be run."""
        return [fact for fact in self.facts.get((check.kind.value, check.table, check.name), ()) if fact.what in whats]

    def of_table(self, check: Check, what: str) -> list[Fact]:
        """Return facts about the check's table."""
        return [fact for fact in self.facts.get((Kind.TABLE.value, check.table, ""), ()) if fact.what == what]

    def named(self, other: Check, *kinds: Kind) -> list[Check]:
        """Return the checks of these kinds that are about the same column."""
        return [c for c in self.checks if c.kind in kinds and (c.table, c.name) == (other.table, other.name)]

    def in_place(self, check: Check) -> list[str] | None:
        """Return the commands that leave the check's table where it is; None: it has to go."""
        if any(not table.more["alterable"] for table in self.of_table(check, "table")):
            return None
        if check.blocked:
            return [*_run(self.of(check, *check.blocked))] or None
        match check.kind:
            case Kind.COLUMN:
                return self.column(check)
            case Kind.DEPENDANTS:
                return self.dependants(check)
            case Kind.DEFAULT | Kind.FOREIGN_KEY:  # what is on a column goes with it
                for column in self.named(check, Kind.COLUMN, Kind.DEPENDANTS):
                    if column.conflict and (column.kind is Kind.DEPENDANTS or not self.fits(column)):
                        way = self.in_place(column)  # what has its name need not be on the column
                        return None if way is None else [*way, *_run(self.of(check, "rename"))]
        if check.kind is Kind.DEFAULT:
            return [line for given in self.of(check, "column") for line in _default(check, given)]
        if keys := self.of(check, "key"):
            return [line for given in keys for line in self.key(check, given)]
        return [*self.run(check, "leave", "drop", "rename", "elsewhere")]

    def run(self, check: Check, *whats: str) -> Iterator[str]:
        """Yield commands, and what restores that which they drop; none, where something cannot be restored."""
        if cannot := self.of(check, "cannot"):
            yield from (_comment(f"{fact.command}: left to its owner, as no command restores it") for fact in cannot)
        else:
            yield from _run(self.of(check, *whats))

    # ── tables ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def away(self, check: Check) -> Iterable[str]:
        """Return the commands for a check whose table has to go."""
        if own := self.of(check, "elsewhere") or self.of_table(check, "elsewhere"):
            return _run(own)
        if check.table in self.recreated:
            return [RECREATE]
        if check.table not in self.moves:
            self.moves[check.table] = tuple(self.move(check, self.facts["", "", ""][len(self.moves)].command))
        return self.moves[check.table]

    def move(self, check: Check, archive: str) -> Iterator[str]:
        """Yield the commands that move a table, with its rows, indexes, keys and sequences, to a new schema."""
        yield from _run(self.of_table(check, "led to"), "to restore it when the new table has the rows")
        for table in self.of_table(check, "table"):
            if others := table.more["namesakes"]:
                yield _comment(
                    f"{check.table} means {others} then: take its schema off the search_path if it is a copy"
                )
            reached = f"GRANT USAGE ON SCHEMA {archive} TO {table.restore};"
            moved = f"{table.command} SET SCHEMA {archive};"
            yield "\n".join(map(_safe, ["BEGIN;", f"CREATE SCHEMA {archive};", reached, moved, "COMMIT;"]))

    # ── columns and keys ───────────────────────────────────────────────────────────────────────────────────────────

    def fits(self, check: Check) -> bool:
        """Whether the column can get the expected form where it is, its values untouched."""
        wanted, filled = check.expected.removesuffix(" NOT NULL"), check.expected.endswith(" NOT NULL")
        return all(
            (c["type"], c["generated"] == "v") == (wanted, False) and (filled or not (c["identity"] or c["in_key"]))
            for c in (fact.more for fact in self.of(check, "column"))
        )

    def column(self, check: Check) -> list[str] | None:
        filled = check.expected.endswith(" NOT NULL")
        if not (found := self.of(check, "column")):
            new = f'ALTER TABLE {check.found} ADD COLUMN "{check.name}" {check.expected};'
            return None if filled else [_safe(new)]
        if not self.fits(check):
            return self.renamed(check)
        [given] = found
        lines = [*self.run(check, "leave", "drop")]
        if given.more["generated"]:  # its values stay; it has no default then
            defaults = [default for default in self.named(check, Kind.DEFAULT) if default.expected != "none"]
            lines += [line for default in defaults for line in _default(default, given)]
        if given.more["filled"] and not filled:
            lines.append(_safe(f"{given.command} DROP NOT NULL;"))
        return [*lines, *_filled(given)] if filled else lines

    def renamed(self, check: Check) -> list[str] | None:
        """Rename a column, with what has names of ours on it; None where its table has to go instead."""
        [given] = self.of(check, "column")
        if given.more["in_key"] or any(
            c.step == check.step for c in self.checks if (c.kind, c.table) == (Kind.TABLE, check.table)
        ):
            return None
        free = [] if given.more["by_itself"] or not given.more["filled"] else [_safe(f"{given.command} DROP NOT NULL;")]
        return [*_run(self.of(check, "leave")), *free, *_run(self.of(check, "rename"))]

    def dependants(self, check: Check) -> list[str] | None:
        """Drop what hangs on a column; where something cannot be restored, all follows the column to another name."""
        if cannot := self.of(check, "cannot"):
            told = [_comment(f"{fact.command}: no command restores it; it follows the column") for fact in cannot]
            renamed = self.renamed(check)
            return None if renamed is None else [*told, *renamed]
        things = self.of(check, "leave", "drop")
        back = [fact.restore for fact in reversed(things)]
        return [*(_safe(thing.command) for thing in things), *_restoring("to restore it when the step has run", back)]

    def key(self, check: Check, given: Fact) -> Iterator[str]:
        table, columns, name, kept = given.command, given.restore, given.more["name"], given.more["kept"]
        shared = f"SELECT {columns}, count(*) FROM {table} GROUP BY {columns} HAVING count(*) > 1;"
        yield _comment(f"rows that share a key are to be told apart first: {_safe(shared)}")
        if given.more["left_over"]:
            yield _safe(f"DROP INDEX CONCURRENTLY {given.more['left_over']};")
        yield _safe(f"CREATE UNIQUE INDEX CONCURRENTLY {name} ON {table} ({columns});")
        if kept:  # what the other primary key keeps unique stays so
            yield _safe(f"CREATE UNIQUE INDEX CONCURRENTLY {given.more['kept_name']} ON {table} ({kept});")
        if check.expected == _PRIMARY:
            yield from self.run(check, "drop")
            yield _safe(f"ALTER TABLE {table} ADD PRIMARY KEY USING INDEX {name};")


def _default(check: Check, given: Fact) -> Iterator[str]:
    yield _safe(f"{given.command} {'DROP DEFAULT' if check.expected == 'none' else f'SET DEFAULT {check.expected}'};")
    if given.restore and not given.more["generated"]:
        yield from _restoring("to restore it", [f"{given.command} SET DEFAULT {given.restore};"])


def _filled(given: Fact) -> Iterator[str]:
    """Have NULL refused: rows are read under a lock that blocks nobody, and the validated CHECK spares another look."""
    table, name, check = given.more["table"], given.more["name"], given.more["check"]
    if given.more["filled"] and given.more["valid"]:
        return
    empty = f"SELECT * FROM {table} WHERE {name} IS NULL;"
    yield _comment(f"rows that have no value are to be given one first: {_safe(empty)}")
    if not given.more["checked"]:  # by an earlier try that rows refused
        yield _safe(f"ALTER TABLE {table} ADD CONSTRAINT {check} CHECK ({name} IS NOT NULL) NOT VALID;")
    yield _safe(f"ALTER TABLE {table} VALIDATE CONSTRAINT {check};")
    yield _safe(f"{given.command} SET NOT NULL;")
    yield _safe(f"ALTER TABLE {table} DROP CONSTRAINT {check};")


# ── what is printed ────────────────────────────────────────────────────────────────────────────────────────────────


def _told(check: Check) -> list[str]:
    """Write the commands that came with the check."""
    return [_comment(one[3:]) if one.startswith("-- ") else _safe(one) for one in check.remedies]


def _run(things: Iterable[Fact], why: str = "to restore it") -> Iterator[str]:
    for fact in things:
        yield _safe(fact.command)
        yield from _restoring(why, [fact.restore] if fact.restore else [])


def _restoring(why: str, definitions: Sequence[str]) -> Iterator[str]:
    """Write definitions as comments: they say the same only where names are looked up as they were printed."""
    if definitions:
        lines = ["BEGIN; SET LOCAL search_path = pg_catalog, pg_temp;", *definitions, "COMMIT;"]
        yield _comment("\n".join([f"{why}:", *map(_safe, lines)]))


def _comment(text: str) -> str:
    """Write a comment of as many lines as the text has, in which nothing acts on a terminal or on psql."""
    return "\n".join(f"-- {shown(line)}" for line in text.split("\n"))


def _safe(command: str) -> str:
    """Write a command so that psql and terminals take it for nothing else, whatever names in it hold."""
    spelled = respelled(command)
    if spelled == shown(spelled, kept="\n"):
        return spelled
    return _comment(f"left out, for what it holds between its names: {spelled}")
