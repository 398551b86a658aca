"""What clears a conflict: the commands as psql runs them, on real databases with rows in every table.

Afterwards the check passes or a step fixes it, no row was written, and what was dropped comes back as it was.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
import supabase
from budget_engine.migration import conflicts
from budget_engine.migration.checks import Check, Kind
from conftest import MIGRATIONS, Db
from states import (
    ANOTHER_FEATURE,
    BIGINT,
    COLUMNS,
    CORE,
    CORE_ROWS,
    CORE_WITH_UUID_TURNS,
    HANGING,
    SLOTS_TEMPLATES,
    altered,
    by_hand,
    old_metrics,
    snapshots,
    with_uuid,
)
from versions import MAJOR

VERIFY = (MIGRATIONS.parent / "verify.sql").read_text()
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"
PIN = VERIFY[VERIFY.index("SELECT pg_catalog.set_config") : VERIFY.index("WITH path")]
CHECKS = VERIFY[VERIFY.index("WITH path") : VERIFY.rindex("COMMIT;")]
ON_REQUEST = "recreate_core_schema"


def survey(db: Db) -> list[Check]:
    """Return every check."""
    with db.connect() as connection:
        for statement in (BEGIN, *filter(None, map(str.strip, PIN.split(";\n")))):
            connection.execute(statement.encode())
        cursor = connection.execute(CHECKS.encode())
        names = [column.name for column in cursor.description or ()]
        return [check(dict(zip(names, row, strict=True))) for row in cursor.fetchall()]


def check(row: dict[str, Any]) -> Check:
    by = row["fixed_by"]
    return Check(
        row["step"],
        Kind(row["kind"]),
        row["table"],
        row["name"],
        row["expected"],
        row["actual"],
        None if by == ON_REQUEST else by,
        row["required"],
        row["found"],
        on_request=by if by == ON_REQUEST else None,
    )


def commands(db: Db) -> dict[Check, tuple[str, ...]]:
    """Return what clears each conflict."""
    checks = survey(db)
    with db.connect() as connection:
        for statement in (BEGIN, *filter(None, map(str.strip, PIN.split(";\n")))):
            connection.execute(statement.encode())
        cursor = connection.execute("SELECT set_config('TimeZone', 'UTC', true)")
        cursor = connection.execute(conflicts.query(checks).encode())
        rows = [[as_text(value) for value in row] for row in cursor.fetchall()]
    return conflicts.commands(checks, conflicts.facts(rows))


def as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
