"""The menu: what can be asked of this project. Each task is one call; the work is done in scripts/."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from invoke.collection import Collection
from invoke.context import Context
from invoke.tasks import task

from scripts.console import reported

# Imported inside the tasks: `invoke --list` needs no database driver, and `invoke lint` no server.

ROOT = Path(__file__).parent  # scripts/inv runs from any current folder
# The checkout may be read-only: what the tools remember lies with them.
CACHE = Path(sys.prefix) / "cache"
CACHES = {
    "RUFF_CACHE_DIR": str(CACHE / "ruff"),
    "MYPY_CACHE_DIR": str(CACHE / "mypy"),
    "HYPOTHESIS_STORAGE_DIRECTORY": str(CACHE / "hypothesis"),
}


class Verbatim(str):
    """An alias that keeps its underscore: Invoke turns those of all names into hyphens, unless they are falsy."""

    __slots__ = ()

    def __bool__(self) -> bool:
        """Say no, so that Invoke does not transform it."""
        return False


@task
@reported()
def setup(c: Context) -> None:
    """Bring the database to the schema: prereqs, fix where needed, slots-flags, budget-report, turn-metrics, verify."""
    from scripts import flow

    flow.run(None, dry=c.config.run.dry)


@task(
    help={
        "recreate": "where core tables stand in an older form: move them, rows and all, and create new, empty ones",
        "with-dependants": "with --recreate: other tables whose foreign keys lead there move along",
        "yes": "with --recreate: do not ask",
    }
)
@reported()
def prereqs(c: Context, recreate: bool = False, with_dependants: bool = False, yes: bool = False) -> None:
    """Create the core schema, slots and templates, prompt snapshots: each only where missing."""
    from scripts import flow

    flow.prereqs(recreate=recreate, with_dependants=with_dependants, yes=yes, dry=c.config.run.dry)


@task
@reported()
def fix(c: Context) -> None:
    """Make prompt_snapshots.turn_id bigint, only where it is uuid; the uuid values are kept."""
    from scripts import flow

    flow.run("fix", dry=c.config.run.dry)


@task(aliases=[Verbatim("slots_flags")])
@reported()
def slots_flags(c: Context) -> None:
    """Add slots.must_keep and slots.min_chars, with the defaults of the critical slots."""
    from scripts import flow

    flow.run("slots-flags", dry=c.config.run.dry)


@task(aliases=[Verbatim("budget_report")])
@reported()
def budget_report(c: Context) -> None:
    """Add prompt_snapshots.budget_report."""
    from scripts import flow

    flow.run("budget-report", dry=c.config.run.dry)


@task(aliases=[Verbatim("turn_metrics")])
@reported()
def turn_metrics(c: Context) -> None:
    """Create the table turn_metrics."""
    from scripts import flow

    flow.run("turn-metrics", dry=c.config.run.dry)


@task
@reported()
def verify(_: Context) -> None:
    """Compare every promise with what stands; changes nothing."""
    from scripts import flow

    flow.verify()


@task
@reported()
def start(_: Context) -> None:
    """Start the embedded server (tasks that need it do so by themselves)."""
    from scripts import flow

    flow.start()


@task
@reported()
def stop(_: Context) -> None:
    """Stop the embedded server; its data stays."""
    from scripts import flow

    flow.stop()


@task
@reported()
def url(_: Context) -> None:
    """Print the URL in use, its password masked."""
    from scripts import flow

    flow.url()


@task
@reported()
def psql(_: Context) -> None:
    """Open psql on the database in use."""
    from scripts import flow

    flow.psql()


@task(
    help={
        "only": "what to pass to pytest instead of the whole suite: a file, -k NAME, …",
        "postgres": "the major version of PostgreSQL to run them on: 14, 15, 16, 17 or 18",
    }
)
def test(c: Context, only: str = "", postgres: int = 18) -> None:  # noqa: PT028
    """Run the tests, on embedded servers of their own."""
    os.chdir(ROOT)
    command = f'"{sys.executable}" -m pytest -n auto -o "cache_dir={CACHE}/pytest" {only}'
    c.run(command, pty=sys.stdout.isatty(), env={**CACHES, "TEST_POSTGRES": str(postgres)})


@task(
    help={
        "load": "instead: the steps on tables of millions of rows, with readers and writers beside them",
        "rounds": "how often each tool runs setup (9)",
        "only": "tools to compare setup with, by parts of their names: psql,dbmate,… (all that are installed)",
        "sizes": "--load: rows of prompt_snapshots and of turns (10_000,1_000_000,10_000_000)",
        "slots": "--load: rows of slots, at most twice as many (2_000_000)",
        "baseline": "--load: seconds of traffic without a step, to compare with (30)",
        "out": "the folder for the charts (tests/bench/charts)",
    }
)
def bench(
    c: Context,
    load: bool = False,
    rounds: str = "",
    only: str = "",
    sizes: str = "",
    slots: str = "",
    baseline: str = "",
    out: str = "",
) -> None:
    """Measure setup against other tools, or (--load) the steps under load; prints tables, draws charts."""
    given = {"rounds": rounds, "only": only, "sizes": sizes, "slots": slots, "baseline": baseline, "out": out}
    words = ["--load"] * load + [f"--{name}={value}" for name, value in given.items() if value]
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    c.run(shlex.join([sys.executable, "-m", "bench", *words]), env={"PYTHONPATH": path})


@task
def lint(c: Context) -> None:
    """Check style, types and SQL: ruff, mypy --strict, and the SQL's own rules."""
    os.chdir(ROOT)
    for command in ("ruff check", "ruff format --check", "mypy", "pytest -p no:cacheprovider tests/test_sql_style.py"):
        c.run(f'"{sys.executable}" -m {command}', env=CACHES)


namespace = Collection(setup, prereqs, fix, slots_flags, budget_report, turn_metrics, verify, test, lint, bench)
namespace.add_collection(Collection("db", start, stop, url, psql))
