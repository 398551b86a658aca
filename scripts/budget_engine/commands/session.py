"""A session: one task against one database, from finding it to where the checks of the task's steps pass."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial

from budget_engine import errors, libpq
from budget_engine.migration import chain, conflicts, plan, recreate, runner, survey
from budget_engine.migration.chain import Step
from budget_engine.migration.checks import Check, Kind, outermost
from budget_engine.output import text
from budget_engine.output.console import CONSOLE
from budget_engine.postgres import blockers, embedded
from budget_engine.postgres.connection import Connection, Rows, understood
from budget_engine.postgres.patience import Patience
from budget_engine.settings import Settings, Target, completed, load, mask, parse_target
from budget_engine.spelling import lines, respelled

_POLL_S = 0.1  # first pause between two looks while another run is at work
_MOMENT_MS = 100


def announced(*, dry: bool = False) -> tuple[Settings, Target]:
    """Find the database in use, start it where it is the embedded one, and say first of all which it is."""
    given = load(CONSOLE.home, os.environ)
    if given.target is None:
        cluster = embedded.locate(CONSOLE.home)
        if dry and not embedded.running(cluster):
            raise errors.NOT_RUNNING(looking="--dry", where=f"its data: {cluster.data}")
        if embedded.start(cluster):
            given = replace(given, notes=(*given.notes, text.STARTED))
    where = target_in_use(given)
    announce(where, given)
    return given, where


def announce(where: Target, given: Settings) -> None:
    """Say, before anything else is said, which database this is about; have its secrets masked from now on."""
    # What stands in the URL for all to see (user and password the same, say) is no secret, and masking it would garble
    # every line that names the user.
    plain = {where.conninfo.get("user"), where.conninfo.get("dbname"), "postgres", "postgresql", "public"}
    CONSOLE.mask = partial(mask, secrets=[secret for secret in where.secrets if secret not in plain])
    CONSOLE.first = text.opening(where, given)


def target_in_use(given: Settings) -> Target:
    """Return what the settings name, or the embedded server, whether it runs or not."""
    return completed(given.target, given.source) if given.target else target_of(embedded.locate(CONSOLE.home))


def target_of(cluster: embedded.Cluster) -> Target:
    """Return the embedded server as a target, and forget what leads libpq to the user's own servers (PGHOSTADDR)."""
    for variable in libpq.VARIABLES:  # also for the programs that we start
        os.environ.pop(variable, None)
    return parse_target(cluster.url)


@contextmanager
def opened(
    begin: Callable[[Settings, Target], Session], *, dry: bool = False
) -> Iterator[tuple[Session, survey.Survey]]:
    """Begin a session on the database in use, and look at it."""
    given, where = announced(dry=dry)
    with begin(given, where) as session:
        found = session.look()
        exposed = session.connection.host if session.connection.is_exposed else ""
        CONSOLE.first = text.opening(where, given, found, exposed=exposed)
        yield session, found


class Session:
    """One task (None: the whole chain) against one database: looking, and carrying out plans until the checks pass.

    looks: it changes nothing; kind: what opens its connections.
    """

    connection: Connection

    def __init__(
        self,
        given: Settings,
        where: Target,
        task: str | None = None,
        *,
        looks: bool = False,
        with_recreate: bool = False,
        kind: Callable[..., Connection] = Connection,
    ) -> None:
        self.given, self.where, self.looks, self.with_recreate = given, where, looks, with_recreate
        self.chain = chain.load()
        self.wanted: Sequence[Step] = self.chain.of(task)
        self.moves: Sequence[recreate.Move] = ()  # the tables that are to move first
        self.patience = Patience(given.lock_wait_s)
        # Reading a definition waits for whoever has the table locked against readers: for moments where we only look.
        moment_ms = min(_MOMENT_MS, given.lock_timeout_ms)
        self._connect = partial(kind, where, replace(given, lock_timeout_ms=moment_ms) if looks else given)
        self._stack = ExitStack()
        self._builder: runner.Builder | None = None
        self._planned: tuple[tuple[object, ...], plan.Plan] | None = None  # of what the last plan was made
        self._at_work = ""

    def __enter__(self) -> Session:
        self.connection = self._stack.enter_context(self._connect())
        second = partial(self._connect, answer_s=self.given.connect_timeout_s)  # all that it is asked takes moments
        watch = blockers.Watch(self.connection, second, _tell, early=not self.looks)
        self.connection.watch = self._stack.enter_context(closing(watch))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def todo(self, found: survey.Survey) -> plan.Plan:
        """Plan what this task has to do, once for what is asked again; where tables are to move, their move first."""
        asked = (found, self.wanted, self.moves)
        if self._planned is None or not all(map(operator.is_, self._planned[0], asked)):
            if self.moves and self.chain.recreate:
                todo = recreate.make(self.chain, self.chain.recreate, self.wanted, found.checks, self.moves)
            else:
                todo = plan.make(self.chain, self.wanted, found.checks)
            self._planned = asked, todo
        return self._planned[1]

    def look(self) -> survey.Survey:
        """Survey; look again, until two looks agree, before believing that something is wrong.

        While another run commits, a survey may be torn: some functions see the newest catalogs, the joins beside them
        see those of the moment at which the query began. So an index may seem left unfinished when its build has just
        ended.
        """
        found = self._survey()
        while self._is_doubtful(self.todo(found)):
            again = self._survey()
            if again.checks == found.checks:
                break
            found = again
        return found

    def _is_doubtful(self, todo: plan.Plan) -> bool:
        return bool(todo.missing if self.looks else todo.conflicts or todo.lacking or todo.drops)

    @understood()
    def commands(self, todo: plan.Plan) -> Mapping[Check, Sequence[str]]:
        """Return the commands that clear the conflicts, where the plan has any: those of its other steps, too."""
        if not todo.conflicts:
            return {}
        try:
            [rows] = self.connection.ask([conflicts.query(todo.checks)], conflicts.PLAIN)
        except errors.StatementError as error:  # a view behind ACCESS EXCLUSIVE: the conflict can be told without it
            if errors.for_sqlstate(error.sqlstate).exit_code != 7:
                raise
            return {}
        return conflicts.commands(todo.checks, rows)

    def refuse_what_cannot_be(self, todo: plan.Plan, found: survey.Survey) -> None:
        """Raise, before anything is changed, where the plan cannot be carried out as a whole."""
        for hindrance in hindrances(todo, found.server, self.commands(todo)):
            raise hindrance

    def carry_out(self, before: survey.Survey) -> None:
        """Do what is to be done, and say what passes then; raise where that is not all that is required."""
        todo = self.todo(before).to_do
        after = self._go_on(before)
        refused = self._builder.refused if self._builder else {}
        CONSOLE.say(*(text.line("refused", f"by the rows: {sql}", *why.split("\n")) for sql, why in refused.items()))
        left = self.todo(after)
        labels = {step.label for step in self.wanted}
        own = [check for check in after.checks if check.step in labels]
        label, did = ("left", "") if left.missing else ("done", "" if todo else "nothing to do: ")
        CONSOLE.say(text.line(label, f"{did}{text.summary(own)}; {CONSOLE.target}"))
        orphans = survey.orphans(self.connection, left.missing)
        for error in what_is_missing(left, after.server, self.commands(left), orphans, tried=True):
            raise error

    def rehearse(self, found: survey.Survey) -> runner.Rehearsed:
        """Run all transactions that are due, and roll them back; ask again as often as LOCK_WAIT allows."""
        self.patience.restart()
        while True:
            todo = self.todo(found)
            try:
                return runner.rehearse(self.connection, self._script(todo, found), _Progress(), _notice)
            except errors.LockTimeoutError as hindrance:
                _name(hindrance, blockers.bystanders(self.connection, waits_for(todo), todo.found, building=False))
                self._pause(hindrance, found)
            if self.todo(again := self._survey()).transactions:
                found = again

    def _script(self, todo: plan.Plan, found: survey.Survey) -> runner.Script:
        return runner.Script(self.chain, todo, found, self.connection.transaction_settings)

    def _go_on(self, found: survey.Survey) -> survey.Survey:
        """Run all transactions, then the concurrent part, as often as it takes and LOCK_WAIT allows."""
        self.patience.restart()
        while (todo := self.todo(found)).to_do and not todo.conflicts:
            after, waited = None, False
            try:
                if todo.transactions:
                    after = runner.run_transactions(self.connection, self._script(todo, found), _Progress(), _notice)
                    after, self.moves = None if self.moves else after, ()  # where those went, only a survey says
                else:
                    if self._builder is None:
                        patience_s = None if found.server.pooled else self.given.lock_wait_s
                        self._builder = runner.Builder(self.connection, found, patience_s, _Progress())
                    self._builder.run(todo)
            except errors.LockTimeoutError as hindrance:
                self._pause(hindrance, found)
                waited = True
            after = self._seen(after) if after else self.look()
            if after.checks != found.checks:
                self.patience.restart()
            elif not waited:
                return after  # what is left, the rows refuse
            found = after
        return found

    def _survey(self) -> survey.Survey:
        while True:
            try:
                found = survey.read(self.connection, self.chain, with_recreate=self.with_recreate)
            except errors.LockTimeoutError as error:
                _name(error, blockers.locking_readers_out(self.connection))
                self._pause(error)
            else:
                return self._seen(found)

    def _seen(self, found: survey.Survey) -> survey.Survey:
        CONSOLE.target = text.place(found.server, self.connection.host if self.given.target else "the embedded server")
        return found

    def _pause(self, hindrance: errors.RecipeError, found: survey.Survey | None = None) -> None:
        """Wait a while, and say so: each time where we stood in a queue, once where others are simply at work."""
        queued = hindrance.case in (errors.LOCK_TIMEOUT, errors.DEADLOCK)
        if hindrance.case is errors.BUSY and found:
            if self.patience.tries == 0:  # asked once, at the first of many short pauses
                tables = sorted({check.found for check in found.checks if check.found})
                self._at_work = lines(blockers.at_work(self.connection, found.turn.refused(), tables))
            hindrance.where = self._at_work

        def announce(pause_s: float, left_s: float) -> None:
            if queued:
                next_try = f"next try in {pause_s:.1f} s, for up to {left_s:.0f} s"
                CONSOLE.say(text.line("waiting", f"{hindrance.what}; {next_try}"))
            elif self.patience.tries == 1:
                who = filter(None, hindrance.where.split("\n"))
                CONSOLE.say(text.line("waiting", f"{hindrance.what}; up to {left_s:.0f} s", *who))

        self.patience.pause(hindrance, self.given.lock_timeout_ms / 1000 if queued else _POLL_S, announce)


class _Progress:
    """Says what was done, as it is done: a line for each transaction, and for each statement of the concurrent part."""

    def __init__(self) -> None:
        self._took_ms = 0.0
        self._checks: list[Check] = []

    def __call__(self, sent: runner.Sent, rows: Rows) -> None:
        match sent.part:
            case runner.Part.GUARD:
                self._checks = []
            case runner.Part.MIGRATION if sent.action:
                self._checks += sent.action.checks
            case runner.Part.CLOCK:
                self._took_ms = float(rows[0][-1] or 0)
            case runner.Part.COMMIT:
                created = text.created(list(dict.fromkeys(self._checks)))
                CONSOLE.say(text.step(sent.step.label, text.timed(created, self._took_ms)))
            case runner.Part.CONCURRENT if sent.action and sent.sql == sent.action.sql[-1]:
                CONSOLE.say(text.step(sent.step.label, f"{text.created(sent.action.checks)}, concurrently"))


def _notice(step: Step, words: str) -> None:
    CONSOLE.say(text.step(step.label, *respelled(words).split("\n")))


def _tell(line: str, *, lasting: bool) -> None:
    """Say who holds what we wait for; show how far a build has come."""
    if lasting:
        CONSOLE.say(text.line("waiting", line))
    else:
        CONSOLE.progress(text.line("building", line) if line else "")


def _name(hindrance: errors.RecipeError, seen: Sequence[blockers.Bystander]) -> None:
    """Say who holds the lock: a wait of moments is over before the watch has looked."""
    new = lines(f"{one.session} [{one.mode} on {one.table}]" for one in seen if lines([one.who]) not in hindrance.where)
    hindrance.where = f"{hindrance.where}\n{new}".strip()


def waits_for(todo: plan.Plan) -> dict[str, set[str]]:
    """Return for each table the lock modes of others that a plan would wait for."""
    wanted: dict[str, set[str]] = {}
    for action in todo.actions:
        for table, modes in action.waits_for.items():
            wanted.setdefault(table, set()).update(modes)
    return wanted


# ── the verdict: why a task does not end well, the reason that it ends with first ──────────────────────────────────


def hindrances(
    todo: plan.Plan, server: survey.Server, commands: Mapping[Check, Sequence[str]]
) -> Iterator[errors.RecipeError]:
    """Yield each reason for which a plan cannot be carried out as a whole."""
    yield from _no_place(todo, server)
    if todo.conflicts:
        yield _conflict(todo, commands)
    if required := [check for check in todo.fixed_elsewhere if check.required]:
        where = [text.difference(check) for check in outermost(required)]
        yield errors.PREREQUISITE(step=required[0].step, where=where)
    if todo.to_do and server.read_only:
        pending = ", ".join(step.label for step in todo.steps if step.transaction or step.concurrent)
        yield errors.READ_ONLY(why=server.read_only, where=f"pending: {pending}")
    if todo.lacking:
        yield errors.RIGHT(role=server.role, where=todo.lacking)


def _no_place(todo: plan.Plan, server: survey.Server) -> Iterator[errors.RecipeError]:
    hidden = [
        check.table
        for check in todo.checks
        if check.actual == "temporary table" or (check in todo.conflicts and "hidden" in check.blocked)
    ]
    if server.schema is None:
        yield errors.NO_SCHEMA(search_path=server.search_path)
    elif hidden:
        yield errors.HIDDEN_TABLE(tables=", ".join(hidden))
    elif re.match("pg_|information_schema$", server.schema) and any(
        check.kind is Kind.TABLE and check.actual is None for check in todo.missing
    ):
        yield errors.SYSTEM_SCHEMA(schema=server.schema, search_path=server.search_path)


def what_is_missing(
    left: plan.Plan,
    server: survey.Server,
    commands: Mapping[Check, Sequence[str]],
    orphans: Sequence[survey.Orphans],
    *,
    listed: bool = False,
    tried: bool = False,
) -> Iterator[errors.RecipeError]:
    """Yield why a required check of the plan's steps does not pass, if one does not.

    orphans: the rows that refuse it; listed: what is missing has been said; tried: setup did what it could.
    """
    yield from _no_place(left, server)
    if left.conflicts:
        yield _conflict(left, commands)
    elif left.missing:
        differences = [] if listed else [text.difference(check) for check in outermost(left.missing)]
        remedy = errors.CORRECT_THE_ROWS if orphans or tried else ""
        yield errors.MISSING(where=[*differences, *map(str, orphans)], remedy=remedy)


def refused_by_rows(orphans: Sequence[survey.Orphans]) -> errors.RecipeError:
    """Return what setup would end with because of them, once all else is done."""
    return errors.MISSING(
        what="rows refuse what is expected: setup would do the rest, and end with exit 5",
        where=[*map(str, orphans)],
        remedy=errors.CORRECT_THE_ROWS,
    )


def _conflict(todo: plan.Plan, commands: Mapping[Check, Sequence[str]]) -> errors.RecipeError:
    """Return the error that says the conflicts of a plan, and what clears them."""
    checks = todo.conflicts
    told = text.conflicts(checks, commands)
    ways = []
    if not commands:
        ways.append("Run invoke verify when the tables are not locked: it has the commands that help.")
    elif conflicts.sql(checks, commands):
        ways += ["Run the commands above, or all of them:", "invoke verify --remedies | invoke db.psql"]
    if any(check.on_request for check in checks):
        ways.append("invoke prereqs --recreate moves the old core tables, rows and all, and creates new ones.")
    ways.append("Then run the task again.")
    count = f"{len(told)} conflict{'s' * (len(told) != 1)}"
    return errors.CONFLICT(count=count, remedy="\n".join(ways), before=told)
