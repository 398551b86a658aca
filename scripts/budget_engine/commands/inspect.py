"""The tasks that look at what exists, and change nothing: verify, status, plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from budget_engine import errors
from budget_engine.commands.session import (
    Session,
    announced,
    hindrances,
    no_place,
    refuse_what_is_missing,
    waits_for,
)
from budget_engine.migration import chain, conflicts, plan, runner, surroundings, survey
from budget_engine.migration.checks import Check
from budget_engine.output import formats, text
from budget_engine.output.console import CONSOLE, PEOPLE
from budget_engine.output.ending import as_message
from budget_engine.postgres import blockers
from budget_engine.postgres.connection import Connection, transaction_settings
from budget_engine.settings import Settings, Target

_MOMENT_MS = 100
FORMATS = {"verify": (PEOPLE, "json", "github"), "status": (PEOPLE, "json"), "plan": (PEOPLE, "json")}


def verify(*, form: str, quiet: bool, verbose: bool, remedies: bool) -> None:
    """Compare every check of the chain with what exists; remedies: print only what clears the conflicts."""
    with _looking("verify", form, quiet=quiet, sql=remedies) as look:
        rows = list(map(str, survey.orphans(look.connection, look.plan.missing)))
        if form == PEOPLE and not remedies:
            _say_steps(look, verbose=verbose, conflicts=False)
        _refuse(look, rows, listed=form == PEOPLE)
        if remedies:
            CONSOLE.emit("\n".join(conflicts.sql(look.plan.conflicts, look.commands)))
        elif form == "json":
            CONSOLE.emit_json(formats.as_json(look.view()))
        elif form == "github":
            CONSOLE.emit(formats.as_github(look.view()))
            _append_summary(formats.as_summary(look.view()))


def status(*, form: str, check: bool, quiet: bool, verbose: bool) -> None:
    """Say how each step is, and what is worth knowing around it; check: end as what is missing demands."""
    with _looking("status", form, quiet=quiet) as look:
        around = surroundings.read(look.connection, look.session.chain, look.found)
        _say_steps(look, verbose=verbose, conflicts=not check)
        CONSOLE.say(*text.around(around, look.found.server))
        if check:
            _refuse(look, list(map(str, survey.orphans(look.connection, look.plan.missing))), listed=True)
        if form == "json":
            CONSOLE.emit_json(formats.as_json(look.view({"surroundings": asdict(around)})))


def _refuse(look: _Look, rows: list[str], *, listed: bool) -> None:
    """End the task as what is missing demands; rows: those that refuse it; listed: what is missing has been said."""
    with _ending_of(look):
        for hindrance in no_place(look.plan, look.found.server):
            raise hindrance
        refuse_what_is_missing(look.session, look.plan, look.found, rows=rows, listed=listed)


def what_setup_would_do(*, form: str, sql: bool, quiet: bool, verbose: bool) -> None:
    """Say what setup would do now, and what that means for whoever uses the tables; sql: print its SQL instead."""
    with _looking("plan", form, quiet=quiet, sql=sql) as look:
        orphans = survey.orphans(look.connection, look.plan.missing, timeout=survey.BRIEFLY)
        if not sql:
            _say_plan(look, form, verbose=verbose)
        with _ending_of(look):
            for hindrance in hindrances(look.plan, look.found.server, look.commands):
                raise hindrance
            if orphans:
                raise refused_by_rows(orphans)
        if sql and (look.error is None or orphans):
            ours = transaction_settings(look.where, look.given.lock_timeout_ms)
            CONSOLE.emit(runner.Script(look.session.chain, look.plan, look.found, ours).as_sql())
        elif not sql:
            _sum_up_plan(look, form)


def _say_plan(look: _Look, form: str, *, verbose: bool) -> None:
    """Gather what is known of the tables that the plan touches, and say it."""
    actions = look.plan.actions
    look.sizes = blockers.sizes(look.connection, [table for action in actions for table in action.locks])
    building = any(action.effect is plan.Effect.BUILD for action in actions)
    look.bystanders = blockers.bystanders(look.connection, waits_for(look.plan), building=building)
    look.kept = [_kept(look, check) for check in look.plan.missing if check.replaces]
    CONSOLE.say(*(text.steps(look.plan, passed=look.found.checks) if verbose else text.things(look.plan)))
    if not look.plan.conflicts:  # else nothing would run
        CONSOLE.say(*text.locks(actions, look.sizes), *text.bystanders(look.bystanders, look.given))
        CONSOLE.say(*text.consequences(look.plan, look.kept, plan.left_to_the_rows(look.plan)))


def _sum_up_plan(look: _Look, form: str) -> None:
    passing = text.summary(look.found.checks)
    if look.error is None:
        CONSOLE.say(
            text.line("plan", f"{text.counted(look.plan)}; {passing} now; nothing was changed; {CONSOLE.target}")
        )
    if form == "json":
        more = {
            "actions": formats.actions(look.plan.actions),
            "tables": {name: asdict(size) for name, size in look.sizes.items()},
            "waiting_for": [asdict(bystander) for bystander in look.bystanders],
            "kept": look.kept,
            "prepared_statements_fail_once": look.plan.reshaped,
            "left_to_the_rows": plan.left_to_the_rows(look.plan),
        }
        CONSOLE.emit_json(formats.as_json(look.view(more)))


def refused_by_rows(orphans: list[survey.Orphans]) -> errors.RecipeError:
    """Return what setup would end with because of them, once all else is done."""
    return errors.MISSING(
        what="rows refuse what is expected: setup would do the rest, and end with exit 5",
        where="\n".join(map(str, orphans)),
        remedy=errors.CORRECT_THE_ROWS,
    )


def _kept(look: _Look, column: Check) -> str:
    """Say how many values of a column are kept, and where; they are counted in moments, or not at all."""
    limits = {"lock_timeout": "1ms", "statement_timeout": "5s", "row_security": "off"}
    settings = [f"set_config('{name}', '{value}', true)" for name, value in limits.items()]
    kind = str(column.actual).removesuffix(" NOT NULL")
    names = [f"{column.name}_{kind}{suffix}" for suffix in ("", *(f"_{number}" for number in range(2, 10)))]
    queries = [
        f"SELECT attname FROM pg_attribute WHERE attrelid = {survey.literal(column.found)}::regclass",
        f"SELECT count({column.name}) FROM {column.found}",
    ]
    try:
        taken, [(count,)] = look.connection.ask(queries, survey.NOTHING_OF_OTHERS, *settings)
    except errors.StatementError:
        return f"the {kind} values of {column.title}, which could not be counted, under another name"
    into = next((name for name in names if (name,) not in taken), "another column")
    return f"{int(count or 0):,} {kind} values of {column.title} in {into}"


# ── a look ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Look:
    """One look of one task: what it saw, and the error that the task ends with once all is said."""

    task: str
    given: Settings
    where: Target
    session: Session
    found: survey.Survey
    plan: plan.Plan
    commands: dict[Check, tuple[str, ...]]  # what clears the conflicts
    error: errors.RecipeError | None = None
    sizes: Mapping[str, blockers.Size] = field(default_factory=dict)
    bystanders: tuple[blockers.Bystander, ...] = ()
    kept: list[str] = field(default_factory=list)

    @property
    def connection(self) -> Connection:
        """The connection."""
        return self.session.connection

    def view(self, more: Mapping[str, object] | None = None) -> formats.View:
        """Return what a document is made of."""
        return formats.View(
            self.task,
            self.where,
            self.given,
            self.found.server,
            self.found.checks,
            self.plan,
            self.commands,
            self.error,
            more or {},
        )


@contextmanager
def _looking(task: str, form: str, *, quiet: bool, sql: bool = False) -> Iterator[_Look]:
    """Look at what exists; once all is said, raise what the task ends with. A document has stdout for itself."""
    formats_ = (PEOPLE,) if sql else FORMATS[task]
    if form not in formats_:
        raise errors.FORMAT(task=f"{task} that prints SQL" if sql else task, form=form, formats=", ".join(formats_))
    CONSOLE.format, CONSOLE.quiet = "sql" if sql else form, quiet
    look = None
    try:
        given, where = announced()
        everything = chain.load()
        # Reading a definition waits for whoever has the table locked against readers: for moments at a time only.
        brief = replace(given, lock_timeout_ms=min(_MOMENT_MS, given.lock_timeout_ms))
        connect = partial(Connection, where, brief)
        with Session(connect, brief, where, everything, everything.steps, early=False) as session:
            found = session.look(believes=lambda todo: not todo.missing)
            CONSOLE.first(text.opening(where, given, found))
            todo = session.todo(found)
            look = _Look(task, given, where, session, found, todo, session.commands(todo))
            yield look
            CONSOLE.say()
    except (Exception, KeyboardInterrupt) as error:
        _write_failure(task, form, as_message(error))
        raise
    if look.error:
        raise look.error


@contextmanager
def _ending_of(look: _Look) -> Iterator[None]:
    """Keep how the task is to end until all is said."""
    try:
        yield
    except errors.RecipeError as error:
        look.error = error


def _say_steps(look: _Look, *, verbose: bool, conflicts: bool) -> None:
    CONSOLE.say(*text.steps(look.plan, passed=look.found.checks if verbose else (), conflicts=conflicts))
    CONSOLE.say(*text.without_admins(look.found.checks))
    CONSOLE.say(text.line("checks", f"{text.summary(look.found.checks)}; {CONSOLE.target}"))


def _write_failure(task: str, form: str, error: errors.RecipeError) -> None:
    """Write the document all the same: whoever reads it should find out there, too, what happened."""
    if form == "json":
        CONSOLE.emit_json(formats.failure(task, error))
    elif form == "github":
        CONSOLE.emit(formats.failure_as_github(task, error))
        _append_summary(formats.failure_as_summary(error))


def _append_summary(markdown: str) -> None:
    """Add to the job's page, where GitHub Actions says which file that is."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        CONSOLE.append(path, markdown)
