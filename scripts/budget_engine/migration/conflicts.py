"""Stand-in until the branch arrives."""

from __future__ import annotations

from collections.abc import Sequence

from budget_engine.migration.checks import Check

Facts = Sequence[object]


def query(checks: Sequence[Check]) -> str:
    return "SELECT"


def facts(rows: Sequence[object]) -> Facts:
    return rows


def commands(checks: Sequence[Check], found: Facts) -> dict[Check, tuple[str, ...]]:
    return dict.fromkeys(checks, ())
