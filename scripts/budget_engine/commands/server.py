"""The database in use: the tasks db.start, db.stop, db.url and db.psql."""

from __future__ import annotations

import os
import shutil
import sys

from psycopg.conninfo import make_conninfo

from budget_engine import libpq
from budget_engine.commands.session import announced, target_in_use, target_of
from budget_engine.output import text
from budget_engine.output.console import CONSOLE
from budget_engine.postgres import embedded
from budget_engine.settings import load, with_search_path


def start() -> None:
    """Start the embedded server, whatever DATABASE_URL says."""
    cluster = embedded.locate(CONSOLE.home)
    embedded.start(cluster)
    CONSOLE.say(f"running   {target_of(cluster).display}", f"data      {cluster.data}")


def stop() -> None:
    """Stop the embedded server."""
    cluster = embedded.locate(CONSOLE.home)
    CONSOLE.say(f"stopped; its data stays in {cluster.data}" if embedded.stop(cluster) else "was not running")


def url() -> None:
    """Print the URL in use (its password masked) on stdout, all else on stderr."""
    given = load(CONSOLE.home, os.environ)
    where = target_in_use(given)
    CONSOLE.say(where.display)
    CONSOLE.aside(f"from {text.sources(where, given)}")


def psql() -> None:
    """Become a psql on the database in use; SQL that is piped to it ends with its first error."""
    CONSOLE.format = "psql"  # what it prints has stdout for itself
    given, where = announced()
    CONSOLE.say()
    # What its libpq, an older one perhaps, adds by itself, is left to it.
    typed = (given.target or where).conninfo
    address = {name: value for name, value in where.conninfo.items() if name in libpq.ADDRESS}
    # Everybody may read a program's arguments. It asks for the secrets that are not in its environment.
    conninfo = {name: value for name, value in (typed | address).items() if name not in libpq.SECRET}
    if where.search_path is not None:
        conninfo["options"] = with_search_path(where.conninfo, where.search_path)["options"]
    password = {"PGPASSWORD": typed["password"]} if "password" in typed else {}
    program = shutil.which("psql") or str(embedded.locate(CONSOLE.home).binaries / "psql")
    piped = () if sys.stdin.isatty() else ("-v", "ON_ERROR_STOP=1")
    os.execve(program, [program, *piped, make_conninfo(**conninfo)], {**os.environ, **password})  # noqa: S606
