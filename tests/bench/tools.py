"""The tools that setup is measured against: each runs the SQL of db/migrations on a URL, as a process of its own.

dbmate, alembic and yoyo know none of psql's commands, and run a file as one transaction of theirs or one message: they,
and the bare script, get what stands between BEGIN and COMMIT, and then the indexes without CONCURRENTLY. Their tables
are new and empty, so that all of them do the same work.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from budget_engine.migration import chain
from conftest import MIGRATIONS

FLOOR = "bare psycopg"
OURS = "invoke setup"


@dataclass(frozen=True)
class Tool:
    """A way to run the chain: its words, given a URL; None where it is not installed."""

    name: str
    command: Callable[[str], list[str]] | None


# Connects, sends all the SQL in one message, leaves.
_BARE = "import sys, psycopg; psycopg.connect(sys.argv[1], autocommit=True).execute(open(sys.argv[2]).read())"

_ALEMBIC_ENV = """
from alembic import context
from sqlalchemy import create_engine
with create_engine(context.get_x_argument(as_dictionary=True)["url"]).connect() as connection:
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()
"""
# Past SQLAlchemy's placeholders: the SQL is full of colons and percent signs.
_ALEMBIC_VERSION = """
from pathlib import Path
from alembic import op
revision, down_revision = {revision!r}, {previous!r}
def upgrade():
    op.get_bind().connection.driver_connection.execute(Path({file!r}).read_text())
"""
_YOYO_STEP = """
from pathlib import Path
from yoyo import step
def apply(connection):
    connection.cursor().execute(Path({file!r}).read_text())
steps = [step(apply)]
"""


def all_tools(psql: Path, workshop: Path) -> list[Tool]:
    """Return every tool, the floor first and ours next; what they need is written into the workshop."""
    files = [MIGRATIONS / f"{step.stem}.sql" for step in chain.load().steps]
    plain = list(_without_psql(files, workshop))
    everything = workshop / "all.sql"
    everything.write_text("\n".join(file.read_text() for file in plain))
    return [
        Tool(FLOOR, lambda url: [sys.executable, "-c", _BARE, url, str(everything)]),
        Tool(OURS, lambda url: [sys.executable, "-m", "invoke", "setup"]),
        *_psql("psql", str(psql), files),
        *_debian_psql(psql, files),
        _dbmate(plain, workshop / "dbmate"),
        _alembic(plain, workshop / "alembic"),
        _yoyo(plain, workshop / "yoyo"),
    ]


def _without_psql(files: Sequence[Path], workshop: Path) -> Iterator[Path]:
    for position, file in enumerate(files, start=1):
        plain = workshop / f"{position}_{file.stem}.sql"
        text = re.sub(r"^\\.*\n", "", file.read_text(), flags=re.M).replace(" CONCURRENTLY", "")
        plain.write_text(re.sub(r"^(BEGIN|COMMIT);\n", "", text, flags=re.M))
        yield plain


def _psql(name: str, program: str, files: Sequence[Path]) -> Iterator[Tool]:
    """Return psql once per file, and once with all of them."""
    options = ["-XqAt", "-v", "ON_ERROR_STOP=1"]
    each = " && ".join(f'{shlex.quote(program)} "$0" {shlex.join([*options, "-f", str(file)])}' for file in files)
    together = [word for file in files for word in ("-f", str(file))]
    yield Tool(f"{name}, once per file", lambda url: ["sh", "-c", each, url])
    yield Tool(f"{name}, all files at once", lambda url: [program, url, *options, *together])


def _debian_psql(psql: Path, files: Sequence[Path]) -> Iterator[Tool]:
    """Return the psql on the PATH where it is Debian's wrapper, which finds a version to run first."""
    found = shutil.which("psql")
    if found and Path(found).resolve() != psql.resolve() and Path(found).read_bytes()[:2] == b"#!":
        yield from _psql("Debian's psql", found, files)


def _installed(program: str) -> str | None:
    """Find a program beside our Python, or on the PATH."""
    return shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def _dbmate(files: Sequence[Path], folder: Path) -> Tool:
    folder.mkdir()
    for file in files:
        (folder / file.name).write_text(f"-- migrate:up\n{file.read_text()}\n-- migrate:down\n")
    program = _installed("dbmate")
    words = [str(program), "--migrations-dir", str(folder), "--no-dump-schema"]
    return Tool("dbmate", (lambda url: [*words, "--url", _dbmate_url(url), "migrate"]) if program else None)


def _dbmate_url(url: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}sslmode=disable".replace("?host=", "?socket=")


def _alembic(files: Sequence[Path], folder: Path) -> Tool:
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(_ALEMBIC_ENV)
    (folder / "alembic.ini").write_text(f"[alembic]\nscript_location = {folder}\n")
    for number, file in enumerate(files, start=1):
        version = _ALEMBIC_VERSION.format(
            revision=f"{number}", previous=f"{number - 1}" if number > 1 else None, file=str(file)
        )
        (folder / "versions" / f"v{number}.py").write_text(version)
    program = _installed("alembic")
    words = [str(program), "-c", str(folder / "alembic.ini")]
    return Tool("alembic", (lambda url: [*words, "-x", f"url={_driver(url)}", "upgrade", "head"]) if program else None)


def _yoyo(files: Sequence[Path], folder: Path) -> Tool:
    folder.mkdir()
    for file in files:
        (folder / f"{file.stem}.py").write_text(_YOYO_STEP.format(file=str(file)))
    program = _installed("yoyo")
    words = [str(program), "apply", "--batch", "--no-config-file"]
    return Tool("yoyo", (lambda url: [*words, "--database", _driver(url), str(folder)]) if program else None)


def _driver(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")
