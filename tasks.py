"""The menu: what can be asked of this project. Each task is one call; the work is done in scripts/."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from invoke.collection import Collection
from invoke.context import Context
from invoke.main import program
from invoke.tasks import task

sys.path.insert(0, str(Path(__file__).parent / "scripts"))  # the package is not installed: it lies here

from budget_engine.output.ending import reported

if sys.platform != "win32":
    with reported():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # scripts/inv blocks it while Python starts

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


class Underscored(tuple[str, ...]):
    """Aliases with underscores, only where Invoke writes hyphens: it refuses one that equals the name.

    It would where it leaves names alone (tasks.auto_dash_names), and deep in others' collections, where it turns those
    of aliases, too.
    """

    __slots__ = ()

    def __iter__(self) -> Iterator[str]:
        """Yield them once Invoke has read its settings, and made its menu of this file's, or of an application's."""
        menu = vars(program).get("collection", Collection(auto_dash_names=False))
        near = (menu, *menu.collections.values()) if menu.auto_dash_names else ()
        tasks = {name for collection in near for name in collection.tasks}
        return (Verbatim(name) for name in super().__iter__() if name.replace("_", "-") in tasks)


@task
@reported()
def setup(c: Context) -> None:
    """Bring the database to the schema: prereqs, fix where needed, slots-flags, budget-report, turn-metrics, verify.

    What is done already is not done again. `invoke plan` says beforehand what it would do.
    Exit codes: 0 all checks pass, 1 a step failed, 3 settings, 4 no connection, 5 rows refuse a key, 6 a
    conflict, 7 no lock to be had, 8 not permitted, 130 interrupted (README, "Exit codes").
    """
    from budget_engine.commands import setup as commands

    commands.run(None, dry=c.config.run.dry)


@task(
    help={
        "recreate": "where core tables stand in an older form: move them, rows and all, and create new, empty ones",
        "with-dependants": "with --recreate: other tables whose foreign keys lead there move along",
        "yes": "with --recreate: do not ask",
    }
)
@reported()
def prereqs(c: Context, recreate: bool = False, with_dependants: bool = False, yes: bool = False) -> None:
    """Create the core schema, slots and templates, prompt snapshots: each only where missing.

    --recreate is for core tables in an older form (turns.id is uuid, say); with --dry before the task's name it shows
    what would move.
    """
    from budget_engine.commands import setup as commands

    commands.prereqs(recreate=recreate, with_dependants=with_dependants, yes=yes, dry=c.config.run.dry)


@task
@reported()
def fix(c: Context) -> None:
    """Make prompt_snapshots.turn_id bigint, only where it is uuid; the uuid values are kept.

    They stay in the column turn_id_uuid, whose comment holds the SQL that undoes it.
    """
    from budget_engine.commands import setup as commands

    commands.run("fix", dry=c.config.run.dry)


@task(aliases=Underscored(["slots_flags"]))
@reported()
def slots_flags(c: Context) -> None:
    """Add slots.must_keep and slots.min_chars, with the defaults of the critical slots."""
    from budget_engine.commands import setup as commands

    commands.run("slots-flags", dry=c.config.run.dry)


@task(aliases=Underscored(["budget_report"]))
@reported()
def budget_report(c: Context) -> None:
    """Add prompt_snapshots.budget_report."""
    from budget_engine.commands import setup as commands

    commands.run("budget-report", dry=c.config.run.dry)


@task(aliases=Underscored(["turn_metrics"]))
@reported()
def turn_metrics(c: Context) -> None:
    """Create the table turn_metrics."""
    from budget_engine.commands import setup as commands

    commands.run("turn-metrics", dry=c.config.run.dry)


_FORMAT = (
    "table (a terminal's width is respected, and NO_COLOR), or json (scripts/budget_engine/output/report.schema.json)"
)
_VIEW = {"quiet": "print only what was asked for in another format, and errors", "verbose": "name what passes, too"}


@task(help={"format": _FORMAT + ", github", "remedies": "print only the SQL that clears conflicts, for psql", **_VIEW})
@reported()
def verify(
    _: Context,
    format: str = "table",  # noqa: A002
    remedies: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Compare every check with what exists; changes nothing.

    Exit codes: 0 all pass, 5 something is missing, 6 a conflict.
    """
    from budget_engine.commands import inspect

    inspect.verify(form=format, quiet=quiet, verbose=verbose, remedies=remedies)


@task(
    help={"format": _FORMAT, "check": "for CI: exit 5 where anything is missing, 6 where there is a conflict", **_VIEW}
)
@reported()
def status(
    _: Context,
    format: str = "table",  # noqa: A002
    check: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Say how each step is, what is unusual around it, and what the history says; changes nothing.

    Exit code 0 whatever it finds, unless --check is given.
    """
    from budget_engine.commands import inspect

    inspect.status(form=format, check=check, quiet=quiet, verbose=verbose)


@task(help={"format": _FORMAT, "sql": "print the SQL instead, as it would be sent, for psql", **_VIEW})
@reported()
def plan(_: Context, format: str = "table", sql: bool = False, quiet: bool = False, verbose: bool = False) -> None:  # noqa: A002
    """Say what setup would do now and why, with locks, sizes, and who holds them; changes nothing.

    Exit code 0 where setup could do it, else the one that setup would end with.
    """
    from budget_engine.commands import inspect

    inspect.what_setup_would_do(form=format, sql=sql, quiet=quiet, verbose=verbose)


@task
@reported()
def rehearse(_: Context) -> None:
    """Run every transaction that setup would run, verified, as one that is rolled back.

    It takes the real locks, for the time that it says, and asks for them as setup does. Exit codes are those of setup.
    """
    from budget_engine.commands import setup as commands

    commands.rehearse()


@task
@reported()
def doctor(_: Context) -> None:
    """Say what is wrong with this machine, this URL, this server, this role, and what to do; changes nothing.

    Exit code 0 where setup could run, else the one that setup would end with. It starts no server.
    """
    from budget_engine.commands import doctor

    doctor.run()


@task
@reported()
def start(_: Context) -> None:
    """Start the embedded server (tasks that need it do so by themselves)."""
    from budget_engine.commands import server

    server.start()


@task
@reported()
def stop(_: Context) -> None:
    """Stop the embedded server; its data stays."""
    from budget_engine.commands import server

    server.stop()


@task
@reported()
def url(_: Context) -> None:
    """Print the URL in use, its password masked."""
    from budget_engine.commands import server

    server.url()


@task
@reported()
def psql(_: Context) -> None:
    """Open psql on the database in use."""
    from budget_engine.commands import server

    server.psql()


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
    _run_of_tests(c, "bench", *["--load"] * load, *(f"--{name}={value}" for name, value in given.items() if value))


@task
def pictures(c: Context) -> None:
    """Draw the README's pictures of a terminal anew, from real runs."""
    _run_of_tests(c, "pictures")


def _run_of_tests(c: Context, module: str, *words: str) -> None:
    """Run a module that lies beside the tests, and uses what they use."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "scripts")])
    c.run(shlex.join([sys.executable, "-m", module, *words]), env={"PYTHONPATH": path})


@task
def lint(c: Context) -> None:
    """Check style, types and SQL: ruff, mypy --strict, and the SQL's own rules."""
    os.chdir(ROOT)
    for command in (
        "ruff check",
        "ruff format --check",
        "mypy",
        "pytest -p no:cacheprovider tests/migration/test_sql.py",
    ):
        c.run(f"{shlex.quote(sys.executable)} -m {command}", env=CACHES)


_CHAIN = (setup, prereqs, fix, slots_flags, budget_report, turn_metrics)
_VIEWS = (verify, status, plan, rehearse, doctor)
namespace = Collection(*_CHAIN, *_VIEWS, test, lint, bench, pictures)
namespace.add_collection(Collection("db", start, stop, url, psql))
