"""The menu: what can be asked of this project. Each task is one call; the work is done in scripts/."""
# ruff: noqa: A002 - an option is named --format

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.main import program
from invoke.tasks import Task

STANDS_ALONE = __package__ != "budget_engine"  # else it is a package's
if STANDS_ALONE:
    sys.path.insert(0, str(Path(__file__).parent / "scripts"))

from budget_engine import commands  # noqa: E402 - whose modules are loaded by first use: --list needs no driver
from budget_engine.output.console import reported  # noqa: E402

if sys.platform != "win32":
    with reported():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # scripts/inv blocks it while Python starts

FOR_DEVELOPERS = Path(__file__).parent / "tests" / "develop.py"


class _Verbatim(str):
    """An alias that keeps its underscore: Invoke turns those of all names into hyphens, unless they are falsy."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False


class _Underscored(tuple[str, ...]):
    """Aliases with underscores, only where the tasks' names have hyphens: Invoke refuses one that equals the name.

    It would where it leaves names alone (tasks.auto_dash_names), and deep in others' collections.
    """

    __slots__ = ()

    def __iter__(self) -> Iterator[str]:
        menu = vars(program).get("collection")  # this file's or an application's, once Invoke has read its settings
        if menu is not None and menu.auto_dash_names:
            names = {name for near in (menu, *menu.collections.values()) for name in near.tasks}
            underscored = (alias for alias in super().__iter__() if "_" in alias)
            yield from (_Verbatim(alias) for alias in underscored if alias.replace("_", "-") in names)


def recipe(**options: str) -> Callable[[Callable[..., None]], Task[Any]]:
    """Make a function a task: whatever ends it becomes a message; options: what each of them means."""
    return lambda body: Task(reported()(body), aliases=_Underscored([body.__name__]), help=options)


@recipe(
    wait="how long to wait for a server that is still starting: 60s",
    create_database="create the database where it does not exist",
)
def setup(c: Context, wait: str = "", create_database: bool = False) -> None:
    """Bring the database to the schema: prereqs, fix where needed, slots-flags, budget-report, turn-metrics, verify.

    What is done already is not done again. `invoke plan` says beforehand what it would do.
    Exit codes: 0 all checks pass, 1 a step failed, 3 settings, 4 no connection, 5 rows refuse a key, 6 a
    conflict, 7 no lock to be had, 8 not permitted, 130 interrupted (README, "Exit codes").
    """
    commands.setup.run(None, dry=c.config.run.dry, wait=wait, create_database=create_database)


@recipe(
    recreate="where core tables stand in an older form: move them, rows and all, and create new, empty ones",
    with_dependants="with --recreate: other tables whose foreign keys lead there move along",
    yes="with --recreate: do not ask",
)
def prereqs(c: Context, recreate: bool = False, with_dependants: bool = False, yes: bool = False) -> None:
    """Create the core schema, slots and templates, prompt snapshots: each only where missing.

    --recreate is for core tables in an older form (turns.id is uuid, say); with --dry before the task's name it shows
    what would move.
    """
    commands.setup.prereqs(recreate=recreate, with_dependants=with_dependants, yes=yes, dry=c.config.run.dry)


@recipe()
def fix(c: Context) -> None:
    """Make prompt_snapshots.turn_id bigint, only where it is uuid; the uuid values are kept.

    They stay in the column turn_id_uuid, whose comment holds the SQL that undoes it.
    """
    commands.setup.run("fix", dry=c.config.run.dry)


@recipe()
def slots_flags(c: Context) -> None:
    """Add slots.must_keep and slots.min_chars, with the defaults of the critical slots."""
    commands.setup.run("slots-flags", dry=c.config.run.dry)


@recipe()
def budget_report(c: Context) -> None:
    """Add prompt_snapshots.budget_report."""
    commands.setup.run("budget-report", dry=c.config.run.dry)


@recipe()
def turn_metrics(c: Context) -> None:
    """Create the table turn_metrics."""
    commands.setup.run("turn-metrics", dry=c.config.run.dry)


_FORMAT = "table (a terminal's width and NO_COLOR count), or json (scripts/budget_engine/output/report.schema.json)"
_VIEW = {"quiet": "print only what was asked for in another format, and errors", "verbose": "name what passes, too"}


@recipe(format=_FORMAT + ", github", remedies="print only the SQL that clears conflicts, for psql", **_VIEW)
def verify(
    _: Context, format: str = "table", remedies: bool = False, quiet: bool = False, verbose: bool = False
) -> None:
    """Compare every check with what exists; changes nothing.

    Exit codes: 0 all pass, 5 something is missing, 6 a conflict.
    """
    commands.inspect.verify(form=format, quiet=quiet, verbose=verbose, remedies=remedies)


@recipe(format=_FORMAT, check="for CI: exit 5 where anything is missing, 6 where there is a conflict", **_VIEW)
def status(_: Context, format: str = "table", check: bool = False, quiet: bool = False, verbose: bool = False) -> None:
    """Say how each step is, what is unusual around it, and what the history says; changes nothing.

    Exit code 0 whatever it finds, unless --check is given.
    """
    commands.inspect.status(form=format, check=check, quiet=quiet, verbose=verbose)


@recipe(format=_FORMAT, sql="print the SQL instead, as it would be sent, for psql", **_VIEW)
def plan(_: Context, format: str = "table", sql: bool = False, quiet: bool = False, verbose: bool = False) -> None:
    """Say what setup would do now and why, with locks, sizes, and who holds them; changes nothing.

    Exit code 0 where setup could do it, else the one that setup would end with.
    """
    commands.inspect.what_setup_would_do(form=format, sql=sql, quiet=quiet, verbose=verbose)


@recipe()
def rehearse(_: Context) -> None:
    """Run every transaction that setup would run, verified, as one that is rolled back.

    It takes the real locks, for the time that it says, and asks for them as setup does. Exit codes are those of setup.
    """
    commands.setup.rehearse()


@recipe()
def doctor(_: Context) -> None:
    """Say what is wrong with this machine, this URL, this server, this role, and what to do; changes nothing.

    Exit code 0 where setup could run, else the one that setup would end with. It starts no server.
    """
    commands.doctor.run()


@recipe(
    targets="a file (-: stdin) with a target a line: URL or NAME=URL; # begins a comment",
    databases="instead: every database of DATABASE_URL's server whose name fits this pattern ('tenant_*'); repeatable",
    schemas="instead: every schema of DATABASE_URL's database whose name fits; repeatable",
    task="setup, verify, status (with --check) or plan",
    jobs="how many at a time (default: two for each processor, 8 at most)",
    canary="so many first; where one of them fails, no other is begun",
    stop_after="begin no other after so many failures",
    part="K/N: the K-th of N parts of the targets, by their names, for N machines",
    timeout="how long a target may take: 10min; then it is stopped (exit 7)",
    format="table, or json: a line for each target as it ends",
)
def fleet(
    _: Context,
    targets: str = "",
    databases: list[str] = [],  # noqa: B006 - how Invoke is told of repeatable options
    schemas: list[str] = [],  # noqa: B006
    task: str = "setup",
    jobs: int = 0,
    canary: int = 0,
    stop_after: int = 0,
    part: str = "",
    timeout: str = "",
    format: str = "table",
) -> None:
    """Run a task on many databases, or many schemas; one that fails stops none of the others.

    Ends with 0, with the exit code that all failures have in common, or with 1. Run again, it does what is left.
    """
    orders = commands.fleet.Orders(task, jobs, canary, stop_after, part, timeout)
    commands.fleet.run(orders, targets=targets, databases=databases, schemas=schemas, form=format)


@recipe()
def start(_: Context) -> None:
    """Start the embedded server (tasks that need it do so by themselves)."""
    commands.server.start()


@recipe()
def stop(_: Context) -> None:
    """Stop the embedded server; its data stays."""
    commands.server.stop()


@recipe()
def url(_: Context) -> None:
    """Print the URL in use, its password masked."""
    commands.server.url()


@recipe()
def psql(_: Context) -> None:
    """Open psql on the database in use."""
    commands.server.psql()


def recipes(name: str | None) -> Collection:
    """Return the tasks in the order of the work, for the menu of that name."""
    steps = (setup, prereqs, fix, slots_flags, budget_report, turn_metrics)
    made = Collection(*[name] * (name is not None), *steps, verify, status, plan, rehearse, doctor, fleet)
    made.add_collection(Collection("db", start, stop, url, psql))
    return made


if STANDS_ALONE:
    namespace = recipes(None)
    if FOR_DEVELOPERS.exists():
        for task in runpy.run_path(str(FOR_DEVELOPERS))["TASKS"]:
            namespace.add_task(task)
