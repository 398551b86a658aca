"""The work: one task against one database, from finding it to where the promises of the task's steps stand."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial

from scripts import chain, embedded, errors, libpq, locks, plan, remedies, report, runner, survey, traffic, watch
from scripts.chain import ROOT, Step
from scripts.console import CONSOLE
from scripts.database import Database
from scripts.patience import Patience
from scripts.settings import Settings, Target, completed, load, mask, parse_target
from scripts.verdict import judge

POLL_S = 0.1  # first pause between two looks while another run is at work


def announced(*, dry: bool = False) -> tuple[Settings, Target]:
    """Find the database in use, start it where it is the embedded one, and say first of all which it is."""
    given = load(ROOT, os.environ)
    if given.target:
        where, started = completed(given.target, given.source), False
    else:
        where, started = _embedded_target(dry=dry)
    announce(where, given)
    CONSOLE.say(*[report.STARTED] * started)
    return given, where


def announce(where: Target, given: Settings) -> None:
    """Say which database this is about, and have its secrets masked from now on."""
    # What stands in the URL for all to see (user and password the same, say) is no secret, and masking it would garble
    # every line that names the user.
    plain = {where.conninfo.get("user"), where.conninfo.get("dbname"), "postgres", "postgresql", "public"}
    CONSOLE.mask = partial(mask, secrets=[secret for secret in where.secrets if secret not in plain])
    CONSOLE.say(*report.target(where, given))


def _embedded_target(*, dry: bool) -> tuple[Target, bool]:
    """Have the embedded server run; return it, and whether it had to be started."""
    cluster = embedded.locate(ROOT)
    if dry and not embedded.running(cluster):
        raise errors.NotRunningError(looking="--dry", where=f"its data: {cluster.data}")
    started = embedded.start(cluster)
    return target_of(cluster), started


def target_of(cluster: embedded.Cluster) -> Target:
    """Return the embedded server as a target, and forget what leads libpq to the user's own servers (PGHOSTADDR)."""
    libpq.forget_environment()
    return parse_target(cluster.url)


class Work:
    """One task against one database: looking, and carrying out the plan until its promises stand."""

    def __init__(
        self,
        connect: Callable[..., Database],
        given: Settings,
        everything: Sequence[Step],
        wanted: Sequence[Step],
        *,
        early: bool = True,  # see Watch
    ) -> None:
        self.given, self.everything, self.wanted, self._early = given, everything, wanted, early
        self.patience = Patience(given.lock_wait_s)
        self._open = connect
        self._open_second = partial(connect, answer_s=given.connect_timeout_s)  # all that it is asked takes moments
        self._open_connections = ExitStack()
        self._online: runner.Online | None = None
        self._at_work = ""

    def __enter__(self) -> Work:
        self.database = self._open_connections.enter_context(self._open())
        watcher = watch.Watch(self.database, self._open_second, early=self._early)
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
        while not believes(plan.of(self.wanted, found.items)):
            again = self._survey()
            if again.items == found.items:
                break
            found = again
        return found

    def carry_out(self, before: survey.Survey) -> None:
        """Do what is to be done, and say what stands then; raise where that is not all that is promised."""
        started_with = plan.of(self.wanted, before.items)
        after = self._go_on(before)
        left = plan.of(self.wanted, after.items)
        did = "unfinished" if left.missing else "done" if started_with.to_do else "nothing to do"
        CONSOLE.say(f"{did}: {report.summary(plan.items_of(self.wanted, after.items))}; {CONSOLE.target}")
        orphans = survey.orphans(self.database, left.missing)
        judge(left, remedies.read(self.database, left.in_the_way), orphans, tried=True)

    def rehearse(self, found: survey.Survey) -> runner.Rehearsed:
        """Carry out all atomic parts that are due, and roll them back; ask again as often as LOCK_WAIT allows."""
        due = plan.of(self.wanted, found.items).atomic
        steps = [step for step in self.wanted if step.stem in due]
        self.patience.restart()
        while True:
            try:
                return runner.rehearse(self.database, steps, self.everything, _say_step)
            except errors.LockTimeoutError as hindrance:
                wanted = locks.waits_for(locks.foreseen(plan.of(self.wanted, found.items), self.everything))
                _name(hindrance, traffic.bystanders(self.database, wanted, building=False))
                self._pause(hindrance)

    def _go_on(self, found: survey.Survey) -> survey.Survey:
        """Run all atomic parts, then all online parts, as often as it takes and LOCK_WAIT allows."""
        self.patience.restart()
        while (todo := plan.of(self.wanted, found.items)).to_do:
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
                _name(error, traffic.locking_readers_out(self.database))
                self._pause(error)
            else:
                host = self.database.host if self.given.target else "the embedded server"
                CONSOLE.target = report.place(found.server, host)
                return found

    def _who_is_at_work(self) -> str:
        if self.patience.tries == 0:  # asked once, at the first of many short pauses
            self._at_work = "\n".join(watch.at_work(self.database, chain.tables(self.everything)))
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
        queued = type(hindrance) in (errors.LockTimeoutError, errors.DeadlockError)
        if isinstance(hindrance, errors.BusyError):
            hindrance.where = self._who_is_at_work()

        def announce(pause_s: float, left_s: float) -> None:
            if queued:
                CONSOLE.say(report.retry(hindrance, pause_s, left_s))
            elif self.patience.tries == 1:
                CONSOLE.say(*report.wait(hindrance, left_s))

        self.patience.pause(hindrance, self.given.lock_timeout_ms / 1000 if queued else POLL_S, announce)


def _say_step(label: str, what: str) -> None:
    CONSOLE.say(report.step(label, what))


def _name(hindrance: errors.RecipeError, seen: Sequence[traffic.Bystander]) -> None:
    """Say who is in the way: a wait of moments is over before the watch has looked."""
    new = [f"{one.session} [{one.mode} on {one.table}]" for one in seen if one.who not in hindrance.where]
    hindrance.where = "\n".join([hindrance.where, *new]).strip()
