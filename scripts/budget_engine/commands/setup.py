"""The tasks that bring a database to the schema: setup, its steps, prereqs --recreate, rehearse."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from psycopg import sql

from budget_engine import errors
from budget_engine.commands.session import Session, opened
from budget_engine.migration import recreate as recreating
from budget_engine.migration.survey import Survey
from budget_engine.output import text
from budget_engine.output.console import CONSOLE
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, Target, duration_ms

_PAUSE_S = 0.5
_MAINTENANCE = "postgres"  # a server has this database from its beginning (PostgreSQL manual, "Creating a Database")
_DUPLICATE_DATABASE = "42P04"
# What a server says, or does not say, that is about to come: a container's, say, whose name comes with it.
_MAY_COME = errors.NOBODY_THERE, errors.NOT_READY, errors.NO_SUCH_HOST, errors.SILENT_HOST, errors.LOST_CONNECTION


def run(task: str | None, *, dry: bool = False, wait: str = "", create_database: bool = False) -> None:
    """Bring the steps of a task (None: the whole chain) to where their checks pass, or (dry) say what that takes.

    wait: how long to wait for a server that is still starting; create_database: where it does not exist.
    """
    wait_s = duration_ms("--wait", wait) / 1000 if wait else 0
    connect = partial(_arrive, wait_s=wait_s, create_database=create_database and not dry)
    with opened(partial(Session, task=task, kind=connect), dry=dry) as (session, before):
        if _is_to_be_done(session, before, dry=dry):
            session.carry_out(before)


def rehearse() -> None:
    """Run every transaction that setup would run, verified, as one that is rolled back."""
    with opened(Session) as (session, before):
        todo = session.todo(before)
        session.refuse_what_cannot_be(todo, before)
        if todo.transactions:
            CONSOLE.say(text.line("note", "all that follows is rolled back at the end"))
            CONSOLE.say(*text.rehearsal(session.rehearse(before), todo))
        else:
            CONSOLE.say(text.line("done", f"no transaction is due: {text.summary(before.checks)}"))


def prereqs(*, recreate: bool, with_dependants: bool, yes: bool, dry: bool) -> None:
    """Run the prerequisites; recreate: core tables in an older form move out of their way."""
    if not recreate:
        if with_dependants or yes:
            options = ["--with-dependants"] * with_dependants + ["--yes"] * yes
            raise errors.OPTION(options=" and ".join(options), of="--recreate")
        run("prereqs", dry=dry)
        return
    kind = _WithDependants if with_dependants else Connection
    begin = partial(Session, task="prereqs", with_recreate=True, kind=kind)
    with opened(begin, dry=dry) as (session, found):
        moves = recreating.read(session.connection, session.chain, found, with_dependants=with_dependants)
        said = text.moves(session.where, found.server, moves)
        if not moves:
            CONSOLE.say(text.line("note", "no core table has an older form: none is moved"))
        elif dry:
            CONSOLE.say(said)
        session.moves = moves
        session.wanted = recreating.wanted(session.wanted, session.chain, found.checks, moves)
        if not _is_to_be_done(session, found, dry=dry):
            return
        # Tables without a row, of this machine, move without a question.
        if not yes and any(move.rows is not None or not session.connection.is_near for move in moves):
            CONSOLE.say(said)
            if not CONSOLE.confirms("Move them?"):
                raise errors.NOT_CONFIRMED()
        session.carry_out(found)


def _is_to_be_done(session: Session, found: Survey, *, dry: bool) -> bool:
    """Say what is to be done, where that is all that was wanted; raise where it cannot be."""
    todo = session.todo(found)
    if dry:
        CONSOLE.say(
            *text.steps(todo, only_due=True), text.line("plan", f"{text.counted(todo)}; nothing was changed (--dry)")
        )
    session.refuse_what_cannot_be(todo, found)
    return not dry


class _WithDependants(Connection):
    """A connection in whose transactions tables of others are told to move along."""

    @property
    def transaction_settings(self) -> str:
        """Return the settings of any transaction, and this one: through a pooler it must come with each."""
        return f"{super().transaction_settings}, pg_catalog.set_config('budget_engine.with_dependants', 'on', true)"


# ── the arrival: at a server that may still be starting, at a database that may have to be created ─────────────────


def _arrive(target: Target, settings: Settings, *, wait_s: float, create_database: bool, **how: Any) -> Connection:
    """Open a connection as Connection does: for wait_s seconds, creating the database if asked."""
    deadline, told, created = time.monotonic() + wait_s, False, not create_database
    while True:
        try:
            return Connection(target, settings, **how)
        except errors.UnreachableError as error:
            if error.cause is errors.NO_DATABASE and not created:
                created = True
                _create(target, settings)
                continue
            if error.cause not in _MAY_COME or time.monotonic() > deadline:
                raise
            if not told:
                who = error.where.splitlines()[0]
                CONSOLE.say(text.line("waiting", f"for the server, {wait_s:g} s at most: {who}"))
            told = True
        time.sleep(_PAUSE_S)


def _create(target: Target, settings: Settings) -> None:
    """Create the database that the target names; that somebody else was faster is no failure."""
    name = target.conninfo.get("dbname") or target.conninfo["user"]
    with Connection(replace(target, conninfo=target.conninfo | {"dbname": _MAINTENANCE}), settings) as connection:
        try:
            connection.run([sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)).as_string()])
        except errors.StatementError as error:
            if error.sqlstate != _DUPLICATE_DATABASE:
                raise
        else:
            CONSOLE.say(text.line("note", f"database {name} was created"))
