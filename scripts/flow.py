"""The flow: from a task to its report. Here settings, database, survey, plan, runner and report meet."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial

from psycopg.conninfo import make_conninfo

from scripts import chain, embedded, errors, libpq, plan, recreation, report, runner, survey, watch
from scripts.chain import ROOT, Step
from scripts.console import CONSOLE
from scripts.database import Database
from scripts.patience import Patience
from scripts.settings import Settings, Target, completed, load, mask, parse_target

POLL_S = 0.1  # first pause between two looks while another run is at work


def run(task: str | None, *, dry: bool = False) -> None:
    """Bring the steps of a task (None: the whole chain) to where their promises stand, or (dry) say what that takes."""
    given, where = _announced(dry=dry)
    everything = chain.load()
    wanted = [step for step in everything if task in (None, step.task)]
    with _Work(partial(Database, where, given), given, everything, wanted) as work:
        before = work.look()
        CONSOLE.say(report.server(before.server, before.items))
        if _is_to_be_done(before, _plan(wanted, before), dry=dry):
            work.carry_out(before)


def prereqs(*, recreate: bool, with_dependants: bool, yes: bool, dry: bool) -> None:
    """Run the prerequisites; recreate: with the alternative to the core schema."""
    if recreate:
        _recreate(with_dependants=with_dependants, yes=yes, dry=dry)
    elif with_dependants or yes:
        raise errors.StepFailedError("--with-dependants and --yes are for --recreate, which is not there")
    else:
        run("prereqs", dry=dry)


def _recreate(*, with_dependants: bool, yes: bool, dry: bool) -> None:
    """Bring the prerequisites to where their promises stand; core tables in an older form move out of their way."""
    given, where = _announced(dry=dry)
    everything = (chain.load_recreate(), *chain.load())
    prerequisites = [step for step in everything if step.task == "prereqs"]
    connect = partial(_WithDependants if with_dependants else Database, where, given)
    with _Work(connect, given, everything, prerequisites) as work:
        found = work.look()
        CONSOLE.say(report.server(found.server, found.items))
        work.wanted, before = recreation.wanted(everything, found), recreation.foreseen(found)
        moving = recreation.moves(found.items)
        CONSOLE.say(*([] if moving else ["no core table stands in an older form: none is moved"]))
        if not _is_to_be_done(before, _plan(work.wanted, before), dry=dry):
            return
        if moving and not yes:
            _ask(work.database, moving)
        work.carry_out(before)


def _is_to_be_done(before: survey.Survey, todo: plan.Plan, *, dry: bool) -> bool:
    """Say what is to be done, where that is all that was wanted; raise where it cannot be."""
    if dry:
        CONSOLE.say(*report.steps(todo), "nothing was changed (--dry)")
    _refuse_what_cannot_be(before.server, todo)
    return not dry


class _WithDependants(Database):
    """A connection in whose transactions tables of others are told to move along."""

    @property
    def transaction_settings(self) -> str:
        """Return the settings of any transaction, and this one: through a pooler it must come with each."""
        return f"{super().transaction_settings}, set_config('budget_engine.with_dependants', 'on', true)"


def _ask(database: Database, moving: Sequence[recreation.Move]) -> None:
    """Ask once before tables with rows, or those of another machine, move."""
    rows = survey.rows_of(database, [move.table for move in moving])
    if database.is_near and all(held is None for held in rows.values()):
        return
    CONSOLE.say(*report.moves(database.target, moving, rows))
    confirmed = CONSOLE.confirms("Move them?")
    if not confirmed:
        raise errors.InTheWayError(
            "not confirmed: the old core tables stay in the way, and nothing was changed",
            remedy="Where there is no terminal to ask on, add --yes." if confirmed is None else "",
        )


def verify() -> None:
    """Compare every promise of the chain with what stands."""
    given, where = _announced()
    everything = chain.load()
    with _Work(partial(Database, where, given), given, everything, everything) as work:
        found = work.look(believes=lambda todo: not todo.missing)
        CONSOLE.say(report.server(found.server, found.items))
        todo = _plan(everything, found)
        CONSOLE.say(*report.steps(todo), report.summary(found.items))
        rows = survey.orphans(work.database, todo.missing)
    _refuse_no_schema(found.server)
    _judge(todo, rows=rows, remedy="Run invoke setup.", listed=True)


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
        print(embedded.locate(ROOT).url)
        print(f"from {given.source}", file=sys.stderr)
    else:
        where = completed(given.target, given.source)
        print(where.display)
        print(f"from {report.sources(where, given)}", file=sys.stderr)


def psql() -> None:
    """Become a psql on the database in use."""
    given, where = _announced()
    # What its libpq, an older one perhaps, adds by itself, is left to it.
    typed = (given.target or where).conninfo
    address = {name: value for name, value in where.conninfo.items() if name in libpq.ADDRESS}
    # Everybody may read a program's arguments. It asks for the secrets that are not in its environment.
    conninfo = {name: value for name, value in (typed | address).items() if name not in libpq.SECRET}
    if where.search_path is not None:
        search_path = where.search_path.replace(" ", r"\ ")
        conninfo["options"] = f"{where.conninfo.get('options', '')} -c search_path={search_path}".strip()
    password = {"PGPASSWORD": typed["password"]} if "password" in typed else {}
    program = shutil.which("psql") or str(embedded.locate(ROOT).binaries / "psql")
    os.execve(program, [program, make_conninfo(**conninfo)], {**os.environ, **password})  # noqa: S606


def _say_step(label: str, what: str) -> None:
    CONSOLE.say(report.step(label, what))


def _announced(*, dry: bool = False) -> tuple[Settings, Target]:
    """Find the database in use, start it where it is the embedded one, and say first of all which it is."""
    given = load(ROOT, os.environ)
    where = completed(given.target, given.source) if given.target else _embedded_target(dry=dry)
    # What stands in the URL for all to see (user and password the same, say) is no secret, and masking it would garble
    # every line that names the user.
    plain = {where.conninfo.get("user"), where.conninfo.get("dbname"), "postgres", "postgresql", "public"}
    CONSOLE.mask = partial(mask, secrets=[secret for secret in where.secrets if secret not in plain])
    CONSOLE.say(*report.target(where, given))
    return given, where


def _embedded_target(*, dry: bool) -> Target:
    cluster = embedded.locate(ROOT)
    if dry and not embedded.running(cluster):
        raise errors.UnreachableError(
            "the embedded server is not running, and --dry starts nothing",
            where=f"its data: {cluster.data}",
            remedy="Start it (invoke db.start), or run the task without --dry.",
        )
    libpq.forget_environment()  # it is meant for the user's own servers; PGHOSTADDR would lead to one of them
    return parse_target(embedded.start(cluster))


def _plan(wanted: Sequence[Step], found: survey.Survey) -> plan.Plan:
    return plan.make([step.stem for step in wanted], found.items)


def _items(wanted: Sequence[Step], found: survey.Survey) -> list[survey.Item]:
    stems = {step.stem for step in wanted}
    return [item for item in found.items if item.stem in stems]


def _refuse_what_cannot_be(server: survey.Server, todo: plan.Plan) -> None:
    """Raise, before anything is changed, where the plan cannot be carried out as a whole."""
    _refuse_no_schema(server)
    if todo.in_the_way:
        _judge(todo)
    if absent := todo.mended_elsewhere:
        raise errors.StepFailedError(
            f"{chain.label(absent[0].stem)} needs what stands nowhere yet",
            where="\n".join(report.difference(item) for item in absent),
            remedy="Run invoke setup, or first the task that brings it (invoke prereqs).",
        )
    if todo.to_do and server.read_only:
        raise errors.NotPermittedError(
            f"this database takes no writes: {server.read_only}",
            where="pending: " + ", ".join(chain.label(step.stem) for step in todo.steps if step.atomic or step.online),
            remedy="Name the primary server in DATABASE_URL, or have default_transaction_read_only lifted.",
        )
    if todo.lacking:
        raise errors.NotPermittedError(
            f"role {server.role} lacks a right",
            where="\n".join(todo.lacking),
            remedy=f"Have it granted to {server.role}, or log in as the owner. Nothing was changed.",
        )


def _refuse_no_schema(server: survey.Server) -> None:
    if server.schema is None:
        raise errors.StepFailedError(
            f"no schema of the search_path ({server.search_path}) exists, so that there is no place for tables",
            remedy="Create it (CREATE SCHEMA …), or name another one in DATABASE_URL (?schema=…).",
        )


def _judge(found: plan.Plan, *, rows: Sequence[str] = (), remedy: str = "", listed: bool = False) -> None:
    """Raise where something that the plan's steps promise does not stand.

    rows: those that refuse it, in words; listed: the report has said already what does not stand.
    """
    if found.in_the_way:
        raise errors.InTheWayError(
            "something stands in the way, and no step may touch it",
            where="" if listed else "\n".join(report.obstacles(found.in_the_way)),
            remedy=report.way_out(found.in_the_way),
        )
    if found.missing:
        raise errors.MissingError(
            "something promised is missing",
            where="\n".join([*([] if listed else map(report.difference, report.outermost(found.missing))), *rows]),
            remedy=remedy,
        )


class _Work:
    """One task against one database: looking, and carrying out the plan until its promises stand."""

    def __init__(
        self, connect: Callable[..., Database], given: Settings, everything: Sequence[Step], wanted: Sequence[Step]
    ) -> None:
        self.given, self.everything, self.wanted = given, everything, wanted
        self.patience = Patience(given.lock_wait_s)
        self._open = connect
        self._open_second = partial(connect, answer_s=given.connect_timeout_s)  # all that it is asked takes moments
        self._open_connections = ExitStack()
        self._online: runner.Online | None = None
        self._tables: Sequence[str] = ()
        self._at_work = ""

    def __enter__(self) -> _Work:
        self.database = self._open_connections.enter_context(self._open())
        watcher = watch.Watch(self.database, self._open_second)
        self.database.watch = self._open_connections.enter_context(closing(watcher))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open_connections.close()

    def look(
        self, believes: Callable[[plan.Plan], bool] = lambda todo: not (todo.in_the_way or todo.lacking)
    ) -> survey.Survey:
        """Survey what stands; look again, until two looks agree, before believing that it cannot be mended.

        While another run commits, a survey may be torn: functions like to_regclass() see the newest catalogs, the joins
        beside them see those of the moment at which the query began.
        """
        found = self._survey()
        while not believes(_plan(self.wanted, found)):
            again = self._survey()
            if again.items == found.items:
                break
            found = again
        return found

    def carry_out(self, before: survey.Survey) -> None:
        """Do what is to be done, and say what stands then; raise where that is not all that is promised."""
        started_with = _plan(self.wanted, before)
        after = self._go_on(before)
        left = _plan(self.wanted, after)
        did = "done" if started_with.to_do else "nothing to do"
        CONSOLE.say(f"{did}: {report.summary(_items(self.wanted, after))}")
        rows = survey.orphans(self.database, left.missing)
        _judge(left, rows=rows, remedy="Mend those rows, then run the task again; no row was deleted or changed.")

    def _go_on(self, found: survey.Survey) -> survey.Survey:
        """Run all atomic parts, then all online parts, as often as it takes and LOCK_WAIT allows."""
        self.patience.restart()
        while (todo := _plan(self.wanted, found)).to_do:
            hindrance = self._one_round(todo, found.server.pooled)
            if hindrance is not None:
                self._pause(hindrance)
            after = self.look()
            if after.items != found.items:
                self.patience.restart()
            elif hindrance is None:
                return after  # what is left, the rows refuse
            found = after
        return found

    def _survey(self) -> survey.Survey:
        while True:
            try:
                found = survey.read(self.database, self.everything)
            except errors.LockTimeoutError as error:
                self._pause(error)
            else:
                self._tables = sorted({item.table for item in found.items})
                return found

    def _who_is_at_work(self) -> str:
        if self.patience.tries == 0:  # asked once, at the first of many short pauses
            locks = (runner.ADVISORY_LOCK, runner.ONLINE_LOCK)
            self._at_work = "\n".join(watch.at_work(self.database, locks, self._tables))
        return self._at_work

    def _one_round(self, todo: plan.Plan, pooled: bool) -> errors.RecipeError | None:
        """Do what can be done now; return what was in the way of the rest, if waiting may help."""
        steps = [step for step in self.wanted if step.stem in (todo.atomic or todo.online)]
        try:
            if todo.atomic:
                runner.run_atomic(self.database, steps, self.everything, _say_step)
            else:
                self._builder(pooled).run(steps)
        except (errors.LockTimeoutError, errors.CrowdedError) as hindrance:
            return hindrance
        return None

    def _builder(self, pooled: bool) -> runner.Online:
        if self._online is None:
            patience_s = None if pooled else self.given.lock_wait_s
            online = runner.Online(self.database, self.everything, patience_s, _say_step, self._open_second)
            self._online = self._open_connections.enter_context(online)
        return self._online

    def _pause(self, hindrance: errors.RecipeError) -> None:
        """Wait a while, and say so: each time where we stood in a queue, once where others are simply at work."""
        queued = type(hindrance) is errors.LockTimeoutError
        if isinstance(hindrance, errors.BusyError):
            hindrance.where = self._who_is_at_work()

        def announce(pause_s: float, left_s: float) -> None:
            if queued:
                CONSOLE.say(report.retry(hindrance, pause_s, left_s))
            elif self.patience.tries == 1:
                CONSOLE.say(*report.wait(hindrance, left_s))

        self.patience.pause(hindrance, self.given.lock_timeout_ms / 1000 if queued else POLL_S, announce)
