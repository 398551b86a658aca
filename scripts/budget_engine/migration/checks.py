"""The checks: what is expected of each object, what the database has, and, kind by kind, how it comes to be.

What each kind's statement locks: PostgreSQL manual, "Explicit Locking" and the reference page of each command.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum


class Lock(Enum):
    """A lock mode on a table; ordered from weak to strong."""

    ROW_SHARE = "ROW SHARE"
    SHARE_UPDATE_EXCLUSIVE = "SHARE UPDATE EXCLUSIVE"
    SHARE_ROW_EXCLUSIVE = "SHARE ROW EXCLUSIVE"
    ACCESS_EXCLUSIVE = "ACCESS EXCLUSIVE"


_STRONG = ("ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock")
WRITERS = ("RowExclusiveLock", "ShareUpdateExclusiveLock", *_STRONG)  # who a build waits for, too
# The modes of others that each waits for, as pg_locks names them (manual, table 13.2).
WAITS_FOR = {
    Lock.ROW_SHARE: _STRONG[2:],
    Lock.SHARE_UPDATE_EXCLUSIVE: WRITERS[1:],
    Lock.SHARE_ROW_EXCLUSIVE: WRITERS,
    Lock.ACCESS_EXCLUSIVE: ("AccessShareLock", "RowShareLock", *WRITERS),
}
STRENGTH = list(Lock)


class Kind(Enum):
    """What is expected, as db/verify.sql calls it."""

    TABLE = "table"
    COLUMN = "column"
    DEFAULT = "default"
    DEPENDANTS = "dependants"  # on a column that is to be replaced: there must be none
    KEY = "key"
    FOREIGN_KEY = "foreign key"
    INDEX = "index"
    COMMENT = "comment"
    TRIGGER = "trigger"
    FUNCTION = "function"
    ROW_SECURITY = "row-level security"
    POLICY = "policy"


_ADDS = "ALTER TABLE {table} (?:[^;]*? )?ADD COLUMN (?:IF NOT EXISTS )?{name} "

# How the statement that creates it is written (white space folded; also inside a DO block), and what it locks.
_CREATED_BY: dict[Kind, tuple[str, Lock | None]] = {
    Kind.TABLE: (r"CREATE TABLE (?:IF NOT EXISTS )?{table} \(", None),
    Kind.COLUMN: (_ADDS, Lock.ACCESS_EXCLUSIVE),
    Kind.DEFAULT: ("ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT", Lock.ACCESS_EXCLUSIVE),
    Kind.DEPENDANTS: ("(?!)", None),  # nothing creates it
    Kind.KEY: (
        r"CREATE UNIQUE INDEX (?:CONCURRENTLY )?IF NOT EXISTS \w+ ON {table} \({name}\)",
        Lock.SHARE_UPDATE_EXCLUSIVE,
    ),
    Kind.FOREIGN_KEY: (r"ALTER TABLE {table} ADD CONSTRAINT \w+ FOREIGN KEY \({name}\)", Lock.SHARE_ROW_EXCLUSIVE),
    Kind.INDEX: (r"CREATE INDEX (?:CONCURRENTLY )?IF NOT EXISTS {name} ON {table}\b", Lock.SHARE_UPDATE_EXCLUSIVE),
    Kind.COMMENT: ("COMMENT ON (?:COLUMN|TABLE) {whole} IS", Lock.SHARE_UPDATE_EXCLUSIVE),
    Kind.TRIGGER: (
        r"CREATE (?:OR REPLACE )?TRIGGER {name} [^;]*?ON {table}\b|ALTER TABLE {table} ENABLE TRIGGER {name}\b",
        Lock.SHARE_ROW_EXCLUSIVE,
    ),
    Kind.FUNCTION: (r"(?:CREATE (?:OR REPLACE )?|ALTER |REVOKE [^;]* ON )FUNCTION {name}\(", None),
    Kind.ROW_SECURITY: ("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY", Lock.ACCESS_EXCLUSIVE),
    Kind.POLICY: (r"CREATE POLICY {name} ON {table}\b", Lock.ACCESS_EXCLUSIVE),
}
_WITH_ITS_COLUMN = {Kind.DEFAULT: "", Kind.FOREIGN_KEY: "[^;,]*REFERENCES "}  # what follows ADD COLUMN name


@dataclass(frozen=True)
class Check:
    """One thing that a step creates: what is expected, and what the database has.

    step, fixed_by: labels of steps (fixed_by None: it passes, or is a conflict); table: the one that it belongs to,
    by its bare name; name: its own ("" of a table; the columns of a key); actual: None where there is nothing;
    required: whether it must pass; found: the table as SQL writes it, or None; lacking: the right that this role
    lacks to fix it; being_built: whether another session builds on the table; on_request: the step that would fix it,
    but runs only where it is asked for; blocked: what around the table keeps it from being created, as the commands
    that clear that are called in db/conflicts.sql ("full": no column is left, no command helps but to move the table);
    around: the same for people; remedies: commands, and comments, that clear it, where the catalogs of an extension
    say what does.
    """

    step: str
    kind: Kind
    table: str
    name: str
    expected: str
    actual: str | None
    fixed_by: str | None
    required: bool
    found: str | None
    lacking: str | None = None
    being_built: bool = False
    on_request: str | None = None
    blocked: tuple[str, ...] = ()
    around: str = ""
    remedies: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Kind, str, str]:
        """What tells it from every other check."""
        return self.kind, self.table, self.name

    @property
    def home(self) -> str | None:
        """The schema in which its table was found."""
        schema = re.match(r'"((?:[^"]|"")+)"\.|(\w+)\.', self.found or "")
        return (schema[1] or "").replace('""', '"') or schema[2] if schema else None

    @property
    def passed(self) -> bool:
        """Whether the database has what is expected, and nothing around it keeps it from working."""
        return self.is_there and not self.remedies

    @property
    def is_there(self) -> bool:
        """Whether the catalogs have what is expected."""
        return self.actual == self.expected

    @property
    def state(self) -> str:
        """What the database has, and what around it keeps it from being fixed."""
        return ", and ".join(filter(None, [self.actual or "missing", self.around]))

    @property
    def conflict(self) -> bool:
        """Whether something is required that no step can create as things are."""
        return self.required and not self.passed and self.fixed_by is None

    @property
    def replaces(self) -> bool:
        """Whether it is a column of another type, whose values its step keeps under another name."""
        return self.kind is Kind.COLUMN and self.actual is not None and self.fixed_by is not None

    @property
    def unfinished(self) -> bool:
        """Whether it exists, and only its concurrent part is missing: an INVALID index, a key that is NOT VALID."""
        return self.fixed_by is not None and self.actual in (f"{self.expected} INVALID", f"{self.expected} NOT VALID")

    @property
    def target(self) -> str | None:
        """The table that a foreign key leads to."""
        return self.expected.removeprefix("REFERENCES ").partition("(")[0] if self.kind is Kind.FOREIGN_KEY else None

    @property
    def lock(self) -> Lock | None:
        """What adding it to an existing table locks there."""
        return _CREATED_BY[self.kind][1]

    @property
    def title(self) -> str:
        """What people call it: table.column, index idx_of_it, key table (one, two)."""
        match self.kind:
            case Kind.TABLE | Kind.COLUMN:
                return _whole(self.table, self.name)
            case Kind.KEY | Kind.FOREIGN_KEY:
                return f"{self.kind.value} {self.table} ({self.name})"
            case Kind.DEFAULT | Kind.DEPENDANTS | Kind.COMMENT | Kind.ROW_SECURITY:
                return f"{self.kind.value} of {_whole(self.table, self.name)}"
            case Kind.FUNCTION:
                return f"function {self.name}()"
        return f"{self.kind.value} {self.name}"

    def is_created_by(self, flat: str, *, with_column: bool) -> bool:
        """Whether a statement, its white space folded, creates it; with_column: its column is missing, too."""
        if (self.name or self.table) not in flat:  # this spares compiling most of the patterns
            return False
        pattern = _CREATED_BY[self.kind][0]
        if with_column and self.kind in _WITH_ITS_COLUMN:
            pattern = f"{pattern}|{_ADDS}{_WITH_ITS_COLUMN[self.kind]}"
        table, name, whole = map(re.escape, (self.table, self.name, _whole(self.table, self.name)))
        return re.search(pattern.format(table=table, name=name, whole=whole), flat) is not None

    def is_validated_by(self, flat: str) -> bool:
        """Whether a statement validates it, a foreign key."""
        words = set(re.findall(r"\w+", flat))
        return "VALIDATE CONSTRAINT" in flat and {self.table, self.name} <= words

    def is_on(self, column: Check) -> bool:
        """Whether it is part of a column, or made of one."""
        if self.table != column.table or self.kind in (Kind.COLUMN, Kind.DEPENDANTS):
            return False
        words = self.expected if self.kind in (Kind.INDEX, Kind.TRIGGER) else self.name
        return column.name in re.findall(r"\w+", words)


def _whole(table: str, name: str) -> str:
    return f"{table}.{name}" if name else table


def outermost(checks: Iterable[Check]) -> list[Check]:
    """Leave out what goes without saying: parts of a column or table that is missing, a missing trigger's function.

    Of a table or column of another kind or type nothing else is worth saying.
    """
    checks = list(checks)
    tables = {check.table for check in checks if check.kind is Kind.TABLE}
    columns = [c for c in checks if c.kind is Kind.COLUMN and _type(c.actual or "") != _type(c.expected)]
    triggered = {check.table for check in checks if check.kind is Kind.TRIGGER and check.actual is None}

    def is_part(check: Check) -> bool:
        if check.kind is Kind.FUNCTION and check.actual is None:
            return check.table in triggered
        on = [column for column in columns if check.is_on(column)]
        return any(column.conflict or check.kind in (Kind.DEFAULT, Kind.COMMENT) for column in on)

    return [c for c in checks if c.kind is Kind.TABLE or (c.table not in tables and not is_part(c))]


def _type(form: str) -> str:
    return form.partition(" NOT NULL")[0]


def that_count(checks: Iterable[Check]) -> list[Check]:
    """Return those that are counted: what is not required, and nothing fixes, counts where it passes."""
    return [check for check in checks if check.required or check.passed or check.fixed_by]


def as_if_missing(checks: Sequence[Check], tables: Iterable[str]) -> tuple[Check, ...]:
    """Return the checks as they are once these tables are gone: each is to be created again."""
    gone = set(tables)
    return tuple(
        replace(check, actual=None, found=None, fixed_by=check.step, required=True, on_request=None)
        if check.table in gone
        else check
        for check in checks
        if check.table not in gone or check.kind is not Kind.DEPENDANTS
    )
