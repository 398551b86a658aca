"""The flow: the tasks that bring a database to the schema."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from scripts import chain, errors, locks, plan, recreation, remedies, report, survey
from scripts.console import CONSOLE
from scripts.database import Database
from scripts.verdict import refuse_what_cannot_be
from scripts.work import Work, announced


def run(task: str | None, *, dry: bool = False) -> None:
    """Bring the steps of a task (None: the whole chain) to where their promises stand, or (dry) say what that takes."""
    given, where = announced(dry=dry)
    everything = chain.load()
    wanted = [step for step in everything if task in (None, step.task)]
    with Work(partial(Database, where, given), given, everything, wanted) as work:
        before = work.look()
        CONSOLE.say(*report.server(before.server, before.items))
        if _is_to_be_done(work, before, plan.of(wanted, before.items), dry=dry):
            work.carry_out(before)


def rehearse() -> None:
    """Run every atomic part that setup would run, verified, in one transaction that is rolled back."""
    given, where = announced()
    everything = chain.load()
    with Work(partial(Database, where, given), given, everything, everything) as work:
        before = work.look()
        CONSOLE.say(*report.server(before.server, before.items))
        todo = plan.of(everything, before.items)
        refuse_what_cannot_be(before.server, todo, remedies.read(work.database, todo.in_the_way))
        if todo.atomic:
            CONSOLE.say("rehearsing: all that follows is rolled back at the end")
            CONSOLE.say(*report.rehearsal(*work.rehearse(before)))
        else:
            CONSOLE.say("nothing to rehearse: no atomic part is due", report.summary(before.items))


def prereqs(*, recreate: bool, with_dependants: bool, yes: bool, dry: bool) -> None:
    """Run the prerequisites; recreate: with the alternative to the core schema."""
    if recreate:
        _recreate(with_dependants=with_dependants, yes=yes, dry=dry)
    elif with_dependants or yes:
        options = ["--with-dependants"] * with_dependants + ["--yes"] * yes
        raise errors.OptionError(options=" and ".join(options), of="--recreate")
    else:
        run("prereqs", dry=dry)


def _recreate(*, with_dependants: bool, yes: bool, dry: bool) -> None:
    """Bring the prerequisites to where their promises stand; core tables in an older form move out of their way."""
    given, where = announced(dry=dry)
    everything = (chain.load_recreate(), *chain.load())
    prerequisites = [step for step in everything if step.task == "prereqs"]
    connect = partial(_WithDependants if with_dependants else Database, where, given)
    with Work(connect, given, everything, prerequisites) as work:
        found = work.look()
        CONSOLE.say(*report.server(found.server, found.items))
        work.wanted, before = recreation.wanted(everything, found), recreation.foreseen(found)
        moving = recreation.moves(found.items)
        CONSOLE.say(*([] if moving else ["no core table stands in an older form: none is moved"]))
        if not _is_to_be_done(work, before, plan.of(work.wanted, before.items), dry=dry):
            return
        if moving and not yes:
            _ask(work.database, found.server.schema, moving)
        work.carry_out(before)


def _is_to_be_done(work: Work, before: survey.Survey, todo: plan.Plan, *, dry: bool) -> bool:
    """Say what is to be done, where that is all that was wanted; raise where it cannot be."""
    if dry:
        said = locks.with_online_parts(todo, work.everything, before.items)
        CONSOLE.say(*report.steps(report.step_rows(said)), "nothing was changed (--dry)")
    refuse_what_cannot_be(before.server, todo, remedies.read(work.database, todo.in_the_way))
    return not dry


class _WithDependants(Database):
    """A connection in whose transactions tables of others are told to move along."""

    @property
    def transaction_settings(self) -> str:
        """Return the settings of any transaction, and this one: through a pooler it must come with each."""
        return f"{super().transaction_settings}, set_config('budget_engine.with_dependants', 'on', true)"


def _ask(database: Database, schema: str | None, moving: Sequence[recreation.Move]) -> None:
    """Ask once before tables with rows, or those of another machine, move."""
    rows = survey.rows_of(database, [move.table for move in moving])
    if database.is_near and all(held is None for held in rows.values()):
        return
    CONSOLE.say(*report.moves(database.target, schema, moving, rows))
    if not CONSOLE.confirms("Move them?"):
        raise errors.NotConfirmedError
