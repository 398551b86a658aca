"""The views: tasks that look at what stands, and change nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

from scripts import chain, document, errors, locks, plan, remedies, report, runner, surroundings, survey, traffic
from scripts.chain import Step
from scripts.console import CONSOLE, PEOPLE, as_message
from scripts.database import Database, transaction_settings
from scripts.settings import Settings, Target
from scripts.verdict import judge, refuse_no_schema, refuse_what_cannot_be, refused_by_rows
from scripts.work import Work, announced

_MOMENT_MS = 100
FORMATS = {"verify": (PEOPLE, "json", "junit", "github"), "status": (PEOPLE, "json"), "plan": (PEOPLE, "json")}


def verify(*, form: str, quiet: bool, verbose: bool) -> None:
    """Compare every promise of the chain with what stands."""
    with _looking("verify", form, quiet=quiet) as look:
        if form == PEOPLE:
            _say_steps(look, verbose=verbose)
        _judge(look, listed=form == PEOPLE)
        view = look.view()
        if form == "json":
            CONSOLE.emit_json(document.as_json(view))
        elif form == "junit":
            CONSOLE.emit(document.as_junit(view))
        elif form == "github":
            CONSOLE.emit(document.as_github(view))
            _append_summary(document.as_summary(view))


def status(*, form: str, check: bool, quiet: bool, verbose: bool) -> None:
    """Say how each step stands, and what is worth knowing around it; check: end as what is missing demands."""
    with _looking("status", form, quiet=quiet) as look:
        tables = {item.table for item in look.found.items}
        around = surroundings.read(look.database, look.steps, tables)
        _say_steps(look, verbose=verbose)
        CONSOLE.say(*report.around(around, look.found.server))
        if check:
            _judge(look, listed=True)
        if form == "json":
            CONSOLE.emit_json(document.as_json(look.view({"surroundings": asdict(around)})))


def what_setup_would_do(*, form: str, sql: bool, quiet: bool, verbose: bool) -> None:
    """Say what setup would do now, and what that means for whoever uses the tables; sql: print its SQL instead."""
    with _looking("plan", form, quiet=quiet, sql=sql) as look:
        with _ending_of(look):
            refuse_what_cannot_be(look.found.server, look.plan, look.ways)
        if sql:
            _say_sql(look)
        else:
            _say_plan(look, form, verbose=verbose)


def _say_sql(look: _Look) -> None:
    """Print what setup would send: nothing where it would refuse to."""
    if look.error is None:
        settings = transaction_settings(look.where, look.given.lock_timeout_ms)
        CONSOLE.emit(runner.as_sql(look.plan, look.steps, settings, look.where.search_path))
        _foresee_refusal_by_rows(look)


def _foresee_refusal_by_rows(look: _Look) -> None:
    orphans = survey.orphans(look.database, look.plan.missing, timeout=survey.BRIEFLY)
    if orphans and look.error is None:
        look.error = refused_by_rows(orphans)


def _say_plan(look: _Look, form: str, *, verbose: bool) -> None:
    """Gather what is known of the tables that the plan touches, and say it."""
    possible = locks.foreseen(look.plan, look.steps)
    standing = traffic.standing(look.database, [change.table for change in possible if change.table])
    changes = locks.settled(possible, standing)
    building = any(change.effect is locks.Effect.BUILD for change in changes)
    bystanders = traffic.bystanders(look.database, locks.waits_for(changes), building=building)
    kept = [traffic.kept(look.database, item) for item in look.plan.missing if item.gives_way]
    unseen = locks.left_to_the_rows(changes, look.plan)
    reshaped = locks.reshaped(changes)
    _say_steps(look, verbose=verbose)
    if changes:
        CONSOLE.table(report.CHANGE_HEADER, report.change_cells(changes), report.changes(changes))
    CONSOLE.say(*report.sizes(standing.values()))
    CONSOLE.say(*report.consequences(look.given, reshaped, bystanders, kept, unseen))
    _foresee_refusal_by_rows(look)
    if look.error is None:
        said = "setup would do this; nothing was changed" if look.plan.to_do else "nothing to do"
        CONSOLE.say(f"{said}; {CONSOLE.target}")
    if form == "json":
        more = {
            "changes": document.changes(changes),
            "tables": {name: asdict(size) for name, size in standing.items()},
            "waiting_for": [asdict(bystander) for bystander in bystanders],
            "kept": [asdict(values) for values in kept],
            "prepared_statements_fail_once": reshaped,
            "left_to_the_rows": unseen,
        }
        CONSOLE.emit_json(document.as_json(look.view(more)))


# ── a look ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Look:
    """One look of one task: what it saw, and the error that the task ends with once all is said."""

    task: str
    given: Settings
    where: Target
    work: Work
    steps: Sequence[Step]
    found: survey.Survey
    plan: plan.Plan
    ways: Mapping[str, remedies.Commands]  # the commands that clear what is in the way, by its items
    error: errors.RecipeError | None = None

    @property
    def database(self) -> Database:
        """The connection."""
        return self.work.database

    def view(self, more: Mapping[str, object] | None = None) -> document.View:
        """Return what a document is made of."""
        return document.View(
            self.task,
            self.where,
            self.given,
            self.found.server,
            self.found.items,
            self.plan,
            self.ways,
            self.error,
            more or {},
        )


@contextmanager
def _looking(task: str, form: str, *, quiet: bool, sql: bool = False) -> Iterator[_Look]:
    """Look at what stands; once all is said, raise what the task ends with. A document has stdout for itself."""
    asked, formats = (f"{task} --sql", (PEOPLE,)) if sql else (task, FORMATS[task])
    if form not in formats:
        raise errors.FormatError(task=asked, form=form, formats=", ".join(formats))
    CONSOLE.format, CONSOLE.quiet = "sql" if sql else form, quiet
    look = None
    try:
        given, where = announced()
        steps = chain.load()
        # Reading a definition waits for whoever has the table locked against readers: for moments at a time only.
        brief = replace(given, lock_timeout_ms=min(_MOMENT_MS, given.lock_timeout_ms))
        with Work(partial(Database, where, brief), brief, steps, steps, early=False) as work:
            found = work.look(believes=lambda todo: not todo.missing)
            CONSOLE.say(*report.server(found.server, found.items))
            todo = plan.of(steps, found.items)
            ways = remedies.read(work.database, todo.in_the_way)
            todo = locks.with_online_parts(todo, steps, found.items)
            look = _Look(task, given, where, work, steps, found, todo, ways)
            yield look
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


def _judge(look: _Look, *, listed: bool) -> None:
    """Find out how a task ends to which anything missing matters; listed: the report has said already what is."""
    with _ending_of(look):
        refuse_no_schema(look.found.server, look.plan)
        judge(look.plan, look.ways, survey.orphans(look.database, look.plan.missing), listed=listed)


def _say_steps(look: _Look, *, verbose: bool) -> None:
    standing = look.found.items if verbose else ()
    lines = report.steps(report.step_rows(look.plan, standing))
    CONSOLE.table(report.STEP_HEADER, report.step_cells(look.plan, standing), lines)
    CONSOLE.say(f"{report.summary(look.found.items)}; {CONSOLE.target}")


def _write_failure(task: str, form: str, error: errors.RecipeError) -> None:
    """Write the document all the same: whoever reads it should find out there, too, what happened."""
    if form == "json":
        CONSOLE.emit_json(document.failure(task, error))
    elif form == "junit":
        CONSOLE.emit(document.failure_as_junit(task, error))
    elif form == "github":
        CONSOLE.emit(document.failure_as_github(task, error))
        _append_summary(document.failure_as_summary(error))


def _append_summary(markdown: str) -> None:
    """Add to the job's page, where GitHub Actions says which file that is."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        CONSOLE.append(path, markdown)
