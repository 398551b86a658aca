"""The tasks of those who change this project; the menu has them where tests/ is there."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from invoke.context import Context
from invoke.tasks import task

ROOT = Path(__file__).parents[1]
CACHE = Path(sys.prefix) / "cache"  # the checkout may be read-only: what the tools remember lies with them
CACHES = {name: str(CACHE / name) for name in ("RUFF_CACHE_DIR", "MYPY_CACHE_DIR", "HYPOTHESIS_STORAGE_DIRECTORY")}


@task(
    help={
        "only": "what to pass to pytest instead of the whole suite: a file, -k NAME, …",
        "postgres": "the major version of PostgreSQL to run them on: 14, 15, 16, 17 or 18",
    }
)
def test(c: Context, only: str = "", postgres: int = 18) -> None:  # noqa: PT028
    """Run the tests, on embedded servers of their own."""
    os.chdir(ROOT)
    options = ["-n", "auto", "--dist", "worksteal", "-o", f"cache_dir={CACHE}/pytest"]
    command = shlex.join([sys.executable, "-m", "pytest", *options])
    c.run(f"{command} {only}", pty=sys.stdout.isatty(), env={**CACHES, "TEST_POSTGRES": str(postgres)})


@task
def lint(c: Context) -> None:
    """Check style, types and SQL: ruff, mypy --strict, and the SQL's own rules."""
    os.chdir(ROOT)
    sql = "pytest -p no:cacheprovider tests/migration/test_sql.py"
    for command in ("ruff check", "ruff format --check", "mypy", sql):
        c.run(f"{shlex.quote(sys.executable)} -m {command}", env=CACHES)


@task(help={"load": "instead: the steps under load", "options": "what else to pass to it; --options=--help names them"})
def bench(c: Context, load: bool = False, options: str = "") -> None:
    """Measure setup against other tools, or (--load) the steps under load; prints tables, draws charts."""
    _run_beside_the_tests(c, "bench " + "--load " * load + options)


@task
def pictures(c: Context) -> None:
    """Draw the README's picture of a terminal anew, from a real run."""
    _run_beside_the_tests(c, "pictures")


def _run_beside_the_tests(c: Context, module: str) -> None:
    """Run a module that uses what the tests use."""
    path = f"{ROOT / 'tests'}{os.pathsep}{ROOT / 'scripts'}"
    c.run(f"{shlex.quote(sys.executable)} -m {module}", env={"PYTHONPATH": path})


TASKS = (test, lint, bench, pictures)
