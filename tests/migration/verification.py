"""What db/verify.sql says of a test's database."""

from __future__ import annotations

from typing import NamedTuple

from conftest import MIGRATIONS, Db

VERIFY = MIGRATIONS.parent / "verify.sql"


class Check(NamedTuple):
    """A row of db/verify.sql."""

    step: str
    kind: str
    table: str
    name: str
    expected: str
    actual: str | None
    fixed_by: str | None
    required: bool
    found: str | None
    verdict: str

    @property
    def passed(self) -> bool:
        return self.actual == self.expected


def verified(db: Db, role: str = "postgres", path: str = "") -> list[Check]:
    """Run db/verify.sql as it is, but for psql's own words; path: the search_path to look with."""
    text = VERIFY.read_text()
    script = "\n".join(line for line in text.splitlines() if not line.startswith("\\"))
    with db.connect(role) as connection:
        if path:
            connection.execute(f"SET search_path = {path}".encode())
        cursor = connection.execute(script.encode())
        while cursor.description is None and cursor.nextset():
            pass
        assert cursor.description is not None
        columns = [column.name for column in cursor.description]
        assert columns == list(Check._fields)
        return [Check(*row) for row in cursor.fetchall()]


def differing(db: Db, step: str = "", **how: str) -> list[Check]:
    """Return the required checks that do not pass, perhaps those of one step."""
    return [c for c in verified(db, **how) if c.required and not c.passed and step in ("", c.step)]
