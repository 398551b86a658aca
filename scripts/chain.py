"""The chain: the documented steps in the documented order, each with the files that bear its stem."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scripts import errors

ROOT = Path(__file__).parent.parent
_DB = ROOT / "db"
_ONLINE_MARKER = "-- online:"

# (stem, task that runs it). The fix comes before what it must not hold up; prompt_snapshots and slots_templates also
# work the other way round.
_DOCUMENTED_ORDER = (
    ("20250130000000_core_schema", "prereqs"),
    ("20250214_slots_templates", "prereqs"),
    ("20250213_prompt_snapshots", "prereqs"),
    ("20250222_fix_prompt_snapshots_turn_id", "fix"),
    ("20250220_slots_flags", "slots-flags"),
    ("20250221_budget_report", "budget-report"),
    ("20250222_turn_metrics", "turn-metrics"),
)


# The alternative to the first one, run only where it is asked for.
RECREATE = "20250130000002_recreate_core_schema"


@dataclass(frozen=True)
class Step:
    """One migration with its verification.

    atomic: its DO block, without the final semicolon; online: SELECTs that return statements to be run alone, outside
    any transaction; verification: a SELECT of (item, expected, actual, mended_by).
    """

    stem: str
    task: str
    atomic: str
    online: tuple[str, ...]
    verification: str
    checksum: str

    @property
    def label(self) -> str:
        """The stem without its date: slots_flags."""
        return label(self.stem)

    @property
    def file(self) -> str:
        """The migration as people write its path."""
        return f"db/migrations/{self.stem}.sql"

    @property
    def atomic_line(self) -> int:
        """Line of the file on which the DO block begins, from 1: PL/pgSQL counts from there."""
        return self.atomic[: self.atomic.index("\nDO $")].count("\n") + 2

    @property
    def tables(self) -> list[str]:
        """The tables that it creates where they are missing."""
        return re.findall(r"^    CREATE TABLE (\w+) \(", self.atomic, re.M)

    def parents(self, table: str) -> list[str]:
        """Return the tables that the foreign keys of a table lead to when the step creates it."""
        body = re.search(rf"CREATE TABLE {table} \((.*?)\n    \);", self.atomic, re.S)
        later = rf"ALTER TABLE {table} ADD CONSTRAINT \w+\s+FOREIGN KEY \(\w+\) REFERENCES ([\w.]+)"
        return [*re.findall(r"REFERENCES ([\w.]+)", body[1] if body else ""), *re.findall(later, self.atomic)]


def label(stem: str) -> str:
    """Return the stem without its date."""
    return stem.partition("_")[2]


def load(task: str | None = None) -> tuple[Step, ...]:
    """Read the steps that a task runs (None: all of them), in the documented order."""
    return tuple(_read(stem, of) for stem, of in _DOCUMENTED_ORDER if task in (None, of))


def load_recreate() -> Step:
    """Read the step that makes the core schema anew."""
    return _read(RECREATE, "prereqs")


def tables(steps: Iterable[Step]) -> list[str]:
    """Return the tables that the steps create where they are missing, in the order of their names."""
    return sorted({table for step in steps for table in step.tables})


def _read(stem: str, task: str) -> Step:
    # read_text() turns CRLF into LF: the checksum and the functions that a file creates are the same on every machine.
    migration = _text(_DB / "migrations" / f"{stem}.sql")
    verification = _text(_DB / "verify" / f"{stem}.sql")
    atomic, _, online = migration.partition(_ONLINE_MARKER)
    return Step(
        stem,
        task,
        atomic=atomic.rstrip().removesuffix(";"),
        online=tuple(_queries(_ONLINE_MARKER + online)) if online else (),
        verification=verification.rstrip().removesuffix(";"),
        checksum=hashlib.sha256(migration.encode()).hexdigest(),
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise errors.CheckoutError(file=file.relative_to(ROOT), why=why, where=str(file)) from None


def version() -> str:
    """Version of the recipes: pyproject.toml says it, and nothing else (Python 3.10 has no TOML parser)."""
    found = re.search(r'^version = "(.+)"$', _text(ROOT / "pyproject.toml"), re.M)
    return found[1] if found else "unknown"


def _queries(online: str) -> list[str]:
    return [query.strip() for query in online.split("\n\\gexec") if query.strip()]
