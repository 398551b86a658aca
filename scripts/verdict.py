"""The verdict: whether a plan can be carried out, and whether what stands is what was promised. No connection."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from scripts import errors, report
from scripts.chain import label
from scripts.plan import Plan
from scripts.remedies import Commands
from scripts.survey import Orphans, Server, outermost


def refuse_what_cannot_be(server: Server, todo: Plan, remedies: Mapping[str, Commands]) -> None:
    """Raise, before anything is changed, where the plan cannot be carried out as a whole.

    remedies: the commands that clear what is in the way.
    """
    for hindrance in hindrances(server, todo, remedies):
        raise hindrance


def hindrances(server: Server, todo: Plan, remedies: Mapping[str, Commands]) -> Iterator[errors.RecipeError]:
    """Tell each reason for which the plan cannot be carried out as a whole; the first one is what a task ends with."""
    yield from _no_schema(server, todo)
    if todo.in_the_way:
        yield _obstacle(todo, remedies)
    if absent := todo.mended_elsewhere:
        lines = [report.difference(item) for item in absent]
        yield errors.PrerequisiteError(step=label(absent[0].stem), where="\n".join(lines))
    if todo.to_do and server.read_only:
        pending = ", ".join(label(step.stem) for step in todo.steps if step.atomic or step.online)
        yield errors.ReadOnlyError(why=server.read_only, where=f"pending: {pending}")
    if todo.lacking:
        yield errors.RightError(role=server.role, where="\n".join(todo.lacking))


def refuse_no_schema(server: Server, todo: Plan) -> None:
    """Raise where there is no place for tables."""
    for hindrance in _no_schema(server, todo):
        raise hindrance


def _no_schema(server: Server, todo: Plan) -> Iterator[errors.RecipeError]:
    if server.schema is None:
        yield errors.NoSchemaError(search_path=server.search_path)
    elif re.match("pg_|information_schema$", server.schema) and any(item.is_new_table for item in todo.missing):
        yield errors.SystemSchemaError(schema=server.schema, search_path=server.search_path)
    if hidden := [item.table for item in todo.in_the_way if item.actual == "temporary table"]:
        yield errors.HiddenTableError(tables=", ".join(hidden))


def judge(
    found: Plan,
    remedies: Mapping[str, Commands],
    orphans: Sequence[Orphans],
    *,
    tried: bool = False,
    listed: bool = False,
) -> None:
    """Raise where something that the plan's steps promise does not stand.

    remedies: the commands that clear what is in the way; orphans: the rows that refuse what is missing; tried: setup
    did what it could; listed: the report has said already what is missing.
    """
    if found.in_the_way:
        raise _obstacle(found, remedies)
    if found.missing:
        lines = [] if listed else map(report.difference, outermost(found.missing))
        helps = errors.MEND_THE_ROWS if tried or orphans else ""
        raise errors.MissingError(where="\n".join([*lines, *map(str, orphans)]), remedy=helps)


def refused_by_rows(orphans: Sequence[Orphans]) -> errors.MissingError:
    """Return what setup would end with because of them, once all else is done."""
    return errors.MissingError(
        what="rows refuse what is promised: setup would do the rest, and end with exit 5",
        where="\n".join(map(str, orphans)),
        remedy=errors.MEND_THE_ROWS,
    )


def _obstacle(found: Plan, remedies: Mapping[str, Commands]) -> errors.ObstacleError:
    return errors.ObstacleError(
        where="\n".join(report.obstacles(found.in_the_way, remedies)),
        remedy=report.way_out(found.in_the_way, remedies),
    )
