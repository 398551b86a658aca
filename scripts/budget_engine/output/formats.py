"""The formats: what verify, status and plan say, for machines. Plain values in, text or JSON values out.

The JSON's shape is described by report.schema.json; VERSION counts the changes that a reader could stumble over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from budget_engine import __version__
from budget_engine.errors import RecipeError
from budget_engine.migration.checks import Check, outermost, that_count
from budget_engine.migration.plan import Action, Plan
from budget_engine.migration.survey import Survey
from budget_engine.output import text
from budget_engine.settings import Settings, Target
from budget_engine.spelling import shown

VERSION = 2


@dataclass
class View:
    """What a task saw; commands: what clears the conflicts; error: what it is to end with; more: of one task alone."""

    target: Target
    settings: Settings
    found: Survey
    plan: Plan
    commands: Mapping[Check, Sequence[str]]
    error: RecipeError | None = None
    more: dict[str, object] = field(default_factory=dict)


def as_json(task: str, error: RecipeError | None, view: View | None) -> dict[str, object]:
    """Return the JSON document; view: None of a task that saw nothing."""
    seen = _seen(view) | view.more if view else {}
    return {"version": VERSION, "task": task, "recipes": __version__, **seen, **ended(error)}


def ended(error: RecipeError | None) -> dict[str, object]:
    """Return how a task ended, as documents have it."""
    if error is None:
        return {"exit_code": 0, "error": None}
    where = [*filter(None, error.where.split("\n"))]
    return {
        "exit_code": error.exit_code,
        "error": {"what": error.what, "where": where, "remedy": error.remedy.splitlines()},
    }


def _seen(view: View) -> dict[str, object]:
    server, checks = view.found.server, view.found.checks
    counted = that_count(checks)
    return {
        "target": view.target.display,
        "source": text.sources(view.target, view.settings),
        "notes": [*view.settings.notes, *view.target.notes, *text.behind(server, checks)],
        "server": asdict(server) | {"schema": server.schema, "row_security": text.row_security(checks)},
        "checks": {"passed": sum(check.passed for check in counted), "total": len(counted)},
        "steps": [
            {
                "step": planned.label,
                "file": planned.step.file,
                "state": planned.state.value,
                "transaction_due": bool(planned.transaction),
                "concurrent_part_due": bool(planned.concurrent),
                "checks": [_check(check, view.commands) for check in checks if check.step == planned.label],
            }
            for planned in view.plan.steps
        ],
    }


def _check(check: Check, commands: Mapping[Check, Sequence[str]]) -> dict[str, object]:
    names = ("table", "name", "title", "found", "expected", "actual", "passed", "required", "conflict", "fixed_by")
    return {
        "kind": check.kind.value,
        **{name: getattr(check, name) for name in names},
        **({"actual": check.state} if check.around else {}),
        "lacking_right": check.lacking,
        "commands": list(commands.get(check, ())),
    }


def actions(planned: Sequence[Action]) -> list[dict[str, object]]:
    """Return what a plan would send, for its JSON document."""
    return [
        {
            "step": action.step,
            "part": "concurrent" if action.concurrent else "transaction",
            "sql": list(action.sql),
            "creates": [check.title for check in action.checks],
            "effect": action.effect.name.lower(),
            "locks": {table: lock.value for table, lock in action.locks.items()},
        }
        for action in planned
    ]


def as_github(task: str, error: RecipeError | None, view: View | None) -> str:
    """Return workflow commands of GitHub Actions: an annotation per failing check, at the step's file."""
    if view is None:
        words = text.error(error) if error else []
        return f"::error title={task}::{_escaped(chr(10).join(words))}"
    lines = [
        f"::error file={planned.step.file},title={planned.label}::{_escaped(shown(text.difference(check)))}"
        for planned in view.plan.steps
        for check in outermost(c for c in view.plan.missing if c.step == planned.label)
    ]
    return "\n".join(lines or [f"::notice title={task}::{_escaped(text.summary(view.found.checks))}"])


def as_summary(error: RecipeError | None, view: View | None) -> str:
    """Return the Markdown of a job's step summary: what a person would have read."""
    lines = [*text.steps(view.plan), text.summary(view.found.checks)] if view else []
    lines += text.error(error) if error else []
    return "\n".join(
        ["### Budget Engine & Telemetry", "", *(f"    {line}" for part in lines for line in part.split("\n")), ""]
    )


def _escaped(words: str) -> str:
    """Escape as GitHub's toolkit does (actions/toolkit, packages/core/src/command.ts)."""
    return words.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
