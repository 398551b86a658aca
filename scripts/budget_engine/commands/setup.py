"""The tasks that bring a database to the schema: setup, its steps, prereqs --recreate, rehearse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from budget_engine import errors
from budget_engine.commands.session import Session, announced, refuse_what_cannot_be
from budget_engine.migration import chain, recreate, survey
from budget_engine.output import text
from budget_engine.output.console import CONSOLE
from budget_engine.postgres.connection import Connection


def run(task: str | None, *, dry: bool = False) -> None:
    """Bring the steps of a task (None: the whole chain) to where their checks pass, or (dry) say what that takes."""
    given, where = announced(dry=dry)
    everything = chain.load()
    with Session(partial(Connection, where, given), given, where, everything, everything.of(task)) as session:
        before = session.look()
        CONSOLE.first(text.opening(where, given, before))
        if _is_to_be_done(session, before, dry=dry):
            session.carry_out(before)


def rehearse() -> None:
    """Run every transaction that setup would run, verified, as one that is rolled back."""
    given, where = announced()
    everything = chain.load()
    with Session(partial(Connection, where, given), given, where, everything, everything.steps) as session:
        before = session.look()
        CONSOLE.first(text.opening(where, given, before))
        todo = session.todo(before)
        refuse_what_cannot_be(session, todo, before)
        if todo.transactions:
            CONSOLE.say(text.line("note", "all that follows is rolled back at the end"))
            CONSOLE.say(*text.rehearsal(session.rehearse(before), todo))
        else:
            CONSOLE.say(text.line("done", f"no transaction is due: {text.summary(before.checks)}"))


def prereqs(*, recreate: bool, with_dependants: bool, yes: bool, dry: bool) -> None:
    """Run the prerequisites; recreate: with the alternative to the core schema."""
    if recreate:
        _recreate(with_dependants=with_dependants, yes=yes, dry=dry)
    elif with_dependants or yes:
        options = ["--with-dependants"] * with_dependants + ["--yes"] * yes
        raise errors.OPTION(options=" and ".join(options), of="--recreate")
    else:
        run("prereqs", dry=dry)


def _recreate(*, with_dependants: bool, yes: bool, dry: bool) -> None:
    """Bring the prerequisites to where their checks pass; core tables in an older form move out of their way."""
    given, where = announced(dry=dry)
    everything = chain.load()
    connect = partial(_WithDependants if with_dependants else Connection, where, given)
    with Session(connect, given, where, everything, everything.of("prereqs"), with_recreate=True) as session:
        found = session.look()
        CONSOLE.first(text.opening(where, given, found))
        moves = recreate.read(session.connection, everything, found, with_dependants=with_dependants)
        if not moves:
            CONSOLE.say(text.line("note", "no core table has an older form: none is moved"))
        elif dry:
            CONSOLE.say(*text.moves(session.where, found.server, moves))
        session.recreating(moves, found)
        if not _is_to_be_done(session, found, dry=dry):
            return
        if moves and not yes:
            _ask(session, found, moves)
        session.carry_out(found)


def _is_to_be_done(session: Session, found: survey.Survey, *, dry: bool) -> bool:
    """Say what is to be done, where that is all that was wanted; raise where it cannot be."""
    todo = session.todo(found)
    if dry:
        CONSOLE.say(*text.things(todo), text.line("plan", f"{text.counted(todo)}; nothing was changed (--dry)"))
    refuse_what_cannot_be(session, todo, found)
    return not dry


class _WithDependants(Connection):
    """A connection in whose transactions tables of others are told to move along."""

    @property
    def transaction_settings(self) -> str:
        """Return the settings of any transaction, and this one: through a pooler it must come with each."""
        return f"{super().transaction_settings}, set_config('budget_engine.with_dependants', 'on', true)"


def _ask(session: Session, found: survey.Survey, moves: Sequence[recreate.Move]) -> None:
    """Ask once before tables with rows, or those of another machine, move."""
    if session.connection.is_near and not any(move.has_rows for move in moves):
        return
    CONSOLE.say(*text.moves(session.where, found.server, moves))
    if not CONSOLE.confirms("Move them?"):
        raise errors.NOT_CONFIRMED()
