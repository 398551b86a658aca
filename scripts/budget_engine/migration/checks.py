"""The checks: what is expected of each object, and what the database has."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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


@dataclass(frozen=True)
class Check:
    """One thing that a step creates: what is expected, and what the database has.

    step, fixed_by: labels of steps (fixed_by None: it passes, or is a conflict); table: the one that it belongs to, by
    its bare name; name: its own ("" of a table; the columns of a key); actual: None where there is nothing; required:
    whether it must pass; found: the table as SQL writes it, or None; on_request: the step that would fix it, but runs
    only where it is asked for.
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
    on_request: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the database has what is expected."""
        return self.actual == self.expected

    @property
    def conflict(self) -> bool:
        """Whether something is required that no step can create as things are."""
        return self.required and not self.passed and self.fixed_by is None

    @property
    def title(self) -> str:
        """What people call it: slots.must_keep, index idx_slots_type, key slots (type, name)."""
        match self.kind:
            case Kind.TABLE:
                return self.table
            case Kind.COLUMN:
                return f"{self.table}.{self.name}"
            case Kind.KEY | Kind.FOREIGN_KEY:
                return f"{self.kind.value} {self.table} ({self.name})"
            case Kind.DEFAULT | Kind.DEPENDANTS | Kind.COMMENT:
                return f"{self.kind.value} of {'.'.join(filter(None, [self.table, self.name]))}"
            case Kind.ROW_SECURITY:
                return f"{self.kind.value} of {self.table}"
            case Kind.FUNCTION:
                return f"function {self.name}()"
        return f"{self.kind.value} {self.name}"
