"""The database at hand: the tasks db.start, db.stop, db.url and db.psql."""

from __future__ import annotations

import os
import shutil

from psycopg.conninfo import make_conninfo

from scripts import embedded
from scripts.chain import ROOT
from scripts.console import CONSOLE
from scripts.settings import load
from scripts.work import announced


def start() -> None:
    """Start the embedded server, whatever DATABASE_URL says."""
    cluster = embedded.locate(ROOT)
    CONSOLE.say(f"running   {embedded.start(cluster)}", f"data      {cluster.data}")


def stop() -> None:
    """Stop the embedded server."""
    cluster = embedded.locate(ROOT)
    CONSOLE.say(f"stopped; its data stays in {cluster.data}" if embedded.stop(cluster) else "was not running")


def url() -> None:
    """Print the URL in use (its password masked) on stdout, all else on stderr."""
    given = load(ROOT, os.environ)
    if given.target is None:
        CONSOLE.say(embedded.locate(ROOT).url)
    else:
        CONSOLE.say(given.target.display)
    CONSOLE.aside(f"from {given.source}")


def psql() -> None:
    """Become a psql on the database in use."""
    _, where = announced()
    password = where.conninfo.get("password")
    conninfo = {name: value for name, value in where.conninfo.items() if name != "password"}
    environment = dict(os.environ)
    if password is not None:
        environment["PGPASSWORD"] = password  # not as an argument: everybody may read those
    if where.search_path is not None:
        environment["PGOPTIONS"] = (
            f"{environment.get('PGOPTIONS', '')} -c search_path={where.search_path.replace(' ', chr(92) + ' ')}"
        )
    program = shutil.which("psql") or str(embedded.locate(ROOT).binaries / "psql")
    os.execve(program, [program, make_conninfo(**conninfo)], environment)  # noqa: S606
