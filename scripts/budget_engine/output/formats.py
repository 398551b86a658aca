"""The formats: what verify, status and plan say, for machines. Plain values in, text or JSON values out.

The JSON's shape is described by report.schema.json; VERSION counts the changes that a reader could stumble over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from budget_engine.errors import RecipeError
from budget_engine.migration.chain import version
from budget_engine.migration.checks import Check, outermost, that_count
from budget_engine.migration.plan import Action, Plan
from budget_engine.migration.survey import Server
from budget_engine.output import text
from budget_engine.settings import Settings, Target

VERSION = 2


@dataclass(frozen=True)
class View:
    """What a task saw: the answer to be written down; error: what it ends with, or None; more: of one task alone."""

    task: str
    target: Target
    settings: Settings
    server: Server
    checks: Sequence[Check]
    plan: Plan
    commands: Mapping[Check, Sequence[str]]
    error: RecipeError | None
    more: Mapping[str, object] = field(default_factory=dict)


def as_json(view: View) -> dict[str, object]:
    """Return the JSON document."""
    counted = that_count(view.checks)
    return {
        "version": VERSION,
        "task": view.task,
        "recipes": version(),
        "target": view.target.display,
        "source": text.sources(view.target, view.settings),
        "notes": [*view.settings.notes, *view.target.notes, *text.behind(view.server, view.checks)],
        "server": asdict(view.server) | {"schema": view.server.schema, "row_security": text.row_security(view.checks)},
        "checks": {"passed": sum(check.passed for check in counted), "total": len(counted)},
        "steps": [
            {
                "step": planned.label,
                "file": planned.step.file,
                "state": planned.state.value,
                "transaction_due": bool(planned.transaction),
                "concurrent_part_due": bool(planned.concurrent),
                "checks": [_check(check, view.commands) for check in view.checks if check.step == planned.label],
            }
            for planned in view.plan.steps
        ],
        **view.more,
        **ending(view.error),
    }


def _check(check: Check, commands: Mapping[Check, Sequence[str]]) -> dict[str, object]:
    return {
        "kind": check.kind.value,
        "table": check.table,
        "name": check.name,
        "title": check.title,
        "found": check.found,
        "expected": check.expected,
        "actual": check.actual,
        "passed": check.passed,
        "required": check.required,
        "conflict": check.conflict,
        "fixed_by": check.fixed_by,
        "lacking_right": check.lacking,
        "commands": list(commands.get(check, ())),
    }


def ending(error: RecipeError | None) -> dict[str, object]:
    """Return how a task ends: its exit code, and the error as it is printed."""
    if error is None:
        return {"exit_code": 0, "error": None}
    said = {"what": error.what, "where": error.where.splitlines(), "remedy": error.remedy.splitlines()}
    return {"exit_code": error.exit_code, "error": said}


def failure(task: str, error: RecipeError) -> dict[str, object]:
    """Return the JSON document of a task that saw nothing."""
    return {"version": VERSION, "task": task, "recipes": version(), **ending(error)}


def failure_as_github(task: str, error: RecipeError) -> str:
    """Return the annotation of a task that saw nothing."""
    return f"::error title={task}::{_escaped(chr(10).join(text.error(error)))}"


def failure_as_summary(error: RecipeError) -> str:
    """Return the Markdown of a job's step summary, of a task that saw nothing."""
    return f"### Budget Engine & Telemetry: exit {error.exit_code}\n\n```\n{chr(10).join(text.error(error))}\n```\n"


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


def as_github(view: View) -> str:
    """Return workflow commands of GitHub Actions: an annotation per failing check, at the step's file."""
    lines = [
        f"::error file={planned.step.file},title={_escaped(planned.label, of_property=True)}::"
        f"{_escaped(text.difference(check))}"
        for planned in view.plan.steps
        for check in outermost(c for c in view.plan.missing if c.step == planned.label)
    ]
    return "\n".join(lines or [f"::notice title=verify::{_escaped(text.summary(view.checks))}"])


def as_summary(view: View) -> str:
    """Return the Markdown of a job's step summary."""
    rows = "\n".join(
        f"| {step.label} | {step.state.value} | {_differing(view, step.label)} |" for step in view.plan.steps
    )
    error = f"\n**exit {view.error.exit_code}**: {view.error.what}\n" if view.error else ""
    return (
        f"### Budget Engine & Telemetry: {text.summary(view.checks)}\n\n`{view.target.display}`\n{error}\n"
        f"| step | state | what differs |\n| --- | --- | --- |\n{rows}\n"
    )


def _differing(view: View, label: str) -> str:
    missing = outermost(check for check in view.plan.missing if check.step == label)
    return "<br>".join(text.difference(check).replace("|", "\\|").replace("<", "&lt;") for check in missing)


def _escaped(words: str, *, of_property: bool = False) -> str:
    """Escape as GitHub's toolkit does (actions/toolkit, packages/core/src/command.ts)."""
    words = words.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return words.replace(":", "%3A").replace(",", "%2C") if of_property else words
