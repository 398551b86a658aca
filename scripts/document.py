"""The documents: what verify, status and plan say, in formats for machines. Plain values in, text or JSON values out.

The JSON's shape is described by report.schema.json; VERSION counts the changes that a reader could stumble over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from xml.etree import ElementTree as ET

from scripts import report
from scripts.chain import label, version
from scripts.errors import RecipeError
from scripts.locks import Change
from scripts.plan import Plan
from scripts.remedies import Commands
from scripts.settings import Settings, Target
from scripts.survey import ONLINE, Item, Server, outermost

VERSION = 1


@dataclass(frozen=True)
class View:
    """What a task saw: the answer to be written down; error: what it ends with, or None; more: of one task alone."""

    task: str
    target: Target
    settings: Settings
    server: Server
    items: Sequence[Item]
    plan: Plan
    ways: Mapping[str, Commands]
    error: RecipeError | None
    more: Mapping[str, object] = field(default_factory=dict)


def as_json(view: View) -> dict[str, object]:
    """Return the JSON document."""
    return {
        "version": VERSION,
        "task": view.task,
        "recipes": version(),
        "target": view.target.display,
        "source": report.sources(view.target, view.settings),
        "notes": [*view.settings.notes, *view.target.notes, *report.behind(view.server)],
        "server": asdict(view.server) | {"row_security": report.row_security(view.items)},
        "promises": {"standing": sum(item.stands for item in view.items), "total": len(view.items)},
        "steps": [
            {
                "step": label(planned.stem),
                "file": f"db/migrations/{planned.stem}.sql",
                "state": planned.state.value,
                "atomic_part_due": planned.atomic,
                "online_part_due": planned.online,
                "items": [_item(item, view.ways) for item in view.items if item.stem == planned.stem],
            }
            for planned in view.plan.steps
        ],
        **view.more,
        **ending(view.error),
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


def failure_as_junit(task: str, error: RecipeError) -> str:
    """Return JUnit's XML of a task that saw nothing: one test case, which is an error."""
    suites = ET.Element("testsuites", name=f"budget-engine {task}")
    suite = ET.SubElement(suites, "testsuite", name=task, tests="1", failures="0", errors="1", skipped="0", time="0")
    case = ET.SubElement(suite, "testcase", classname=task, name="look at what stands", time="0")
    ET.SubElement(case, "error", type=f"exit {error.exit_code}", message=error.what).text = "\n".join(error.lines())
    return _as_text(suites)


def failure_as_github(task: str, error: RecipeError) -> str:
    """Return the annotation of a task that saw nothing."""
    return f"::error title={task}::{_escaped(chr(10).join(error.lines()))}"


def failure_as_summary(error: RecipeError) -> str:
    """Return the Markdown of a job's step summary, of a task that saw nothing."""
    return f"### Budget Engine & Telemetry: exit {error.exit_code}\n\n```\n{chr(10).join(error.lines())}\n```\n"


def _item(item: Item, ways: Mapping[str, Commands]) -> dict[str, object]:
    stem = item.mended_by and item.mended_by.removesuffix(ONLINE)
    return {
        "item": item.name,
        "expected": item.expected,
        "actual": item.actual,
        "stands": item.stands,
        "in_the_way": item.in_the_way,
        "mended_by": stem and label(stem),
        "mended_online": bool(item.mended_by and item.mended_by.endswith(ONLINE)),
        "lacking_right": item.lacking,
        "remedy": ways.get(item.name, ()),
    }


def changes(foreseen: Sequence[Change]) -> list[dict[str, Any]]:
    """Return what a plan would do, for its JSON document."""
    return [
        {
            "step": change.step,
            "part": "online" if change.online else "atomic",
            "statement": change.statement,
            "effect": change.effect.name.lower(),
            "lock": change.lock and change.lock.value,
            "table": change.table,
        }
        for change in foreseen
    ]


def as_junit(view: View) -> str:
    """Return JUnit's XML: a test suite per step, a test case per item; what does not stand is a failure."""
    suites = ET.Element("testsuites", name="budget-engine verify")
    for planned in view.plan.steps:
        items = [item for item in view.items if item.stem == planned.stem]
        suite = ET.SubElement(suites, "testsuite", name=label(planned.stem), errors="0", skipped="0", time="0")
        suite.set("tests", str(len(items)))
        suite.set("failures", str(sum(not item.stands for item in items)))
        for item in items:
            case = ET.SubElement(suite, "testcase", classname=label(item.stem), name=item.name, time="0")
            if not item.stands:
                difference = report.difference(item)
                kind = "in the way" if item.in_the_way else "missing"
                ET.SubElement(case, "failure", type=kind, message=difference).text = difference
    return _as_text(suites)


def _as_text(suites: ET.Element) -> str:
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True)


def as_github(view: View) -> str:
    """Return workflow commands of GitHub Actions: an annotation per difference, at the file that promises it."""
    lines = [
        f"::error file=db/verify/{planned.stem}.sql,title={_escaped(label(planned.stem), of_property=True)}::"
        f"{_escaped(report.difference(item))}"
        for planned in view.plan.steps
        for item in outermost(item for item in view.items if item.stem == planned.stem and not item.stands)
    ]
    return "\n".join(lines or [f"::notice title=verify::{_escaped(report.summary(view.items))}"])


def as_summary(view: View) -> str:
    """Return the Markdown of a job's step summary."""
    rows = report.step_rows(view.plan)
    table = "\n".join(f"| {name} | {state} | {'<br>'.join(map(_cell, what))} |" for name, state, what in rows)
    error = f"\n**exit {view.error.exit_code}**: {view.error.what}\n" if view.error else ""
    return (
        f"### Budget Engine & Telemetry: {report.summary(view.items)}\n\n`{view.target.display}`, "
        f"{_cell(report.schemas(view.server))}\n{error}\n"
        f"| step | state | what differs |\n| --- | --- | --- |\n{table}\n"
    )


def _escaped(text: str, *, of_property: bool = False) -> str:
    """Escape as GitHub's toolkit does (actions/toolkit, packages/core/src/command.ts)."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if of_property else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
