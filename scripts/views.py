"""The views: tasks that look at what stands, and change nothing."""

from __future__ import annotations

from functools import partial

from scripts import chain, plan, report, survey
from scripts.console import CONSOLE
from scripts.database import Database
from scripts.verdict import judge, refuse_no_schema
from scripts.work import Work, announced


def verify() -> None:
    """Compare every promise of the chain with what stands."""
    given, where = announced()
    everything = chain.load()
    with Work(partial(Database, where, given), given, everything, everything) as work:
        found = work.look(believes=lambda todo: not todo.missing)
        CONSOLE.say(report.server(found.server, found.items))
        todo = plan.of(everything, found.items)
        CONSOLE.say(*report.steps(todo), report.summary(found.items))
        rows = survey.orphans(work.database, todo.missing)
    refuse_no_schema(found.server)
    judge(todo, rows=rows, remedy="Run invoke setup.", listed=True)
