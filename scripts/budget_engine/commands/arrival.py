"""The arrival: connecting to a server that may still be starting, and to a database that may have to be created."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from psycopg import sql

from budget_engine import errors
from budget_engine.output import text
from budget_engine.output.console import CONSOLE
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, Target

_PAUSE_S = 0.5
_MAINTENANCE = (
    "postgres"  # the database that a server has from its beginning (PostgreSQL manual, "Creating a Database")
)
_DUPLICATE_DATABASE = "42P04"
# What a server says, or does not say, that is about to come: a container's, say, whose name comes with it.
_MAY_COME = (
    errors.NOBODY_THERE,
    errors.NOT_READY,
    errors.NO_SUCH_HOST,
    errors.SILENT_HOST,
    errors.LOST_CONNECTION,
)


def patient(wait_s: float, *, create_database: bool) -> Callable[..., Connection]:
    """Return what opens a connection as Connection does: for wait_s seconds, creating the database if asked."""

    def connect(target: Target, settings: Settings, **how: Any) -> Connection:
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
                    CONSOLE.say(
                        text.line("waiting", f"for the server, {wait_s:g} s at most: {error.where.splitlines()[0]}")
                    )
                told = True
            time.sleep(_PAUSE_S)

    return connect


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
