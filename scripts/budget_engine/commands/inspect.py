"""The tasks that look at what exists, and change nothing: verify, status, plan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

from budget_engine import errors
from budget_engine.commands.session import Session, hindrances, opened, refused_by_rows, waits_for, what_is_missing
from budget_engine.migration import conflicts, plan, runner, surroundings, survey
from budget_engine.migration.checks import Check
from budget_engine.output import formats, text
from budget_engine.output.console import CONSOLE, PEOPLE, as_message
from budget_engine.output.formats import View
from budget_engine.postgres import blockers
from budget_engine.postgres.connection import Connection, transaction_settings, understood
from budget_engine.spelling import literal

_FORMATS = {"verify": (PEOPLE, "json", "github"), "status": (PEOPLE, "json"), "plan": (PEOPLE, "json")}


def verify(*, form: str, quiet: bool, verbose: bool, remedies: bool) -> None:
    """Compare every check of the chain with what exists; remedies: print only what clears the conflicts."""
    with _looking("verify", form, quiet=quiet, sql=remedies) as (session, view):
        if remedies:
            CONSOLE.emit("\n".join(conflicts.sql(view.plan.conflicts, view.commands)))
        elif form == PEOPLE:
            _say_steps(view, verbose=verbose, conflicts=False)
        view.error = _missing(session, view, listed=form == PEOPLE)
        cleared = all(conflicts.sql([check], view.commands) for check in view.plan.conflicts)
        if remedies and view.error and view.plan.conflicts and cleared:  # what it would say is on stdout
            view.error.before = ()
            view.error.remedy = "Pipe these commands to invoke db.psql, then run the task again."


def status(*, form: str, check: bool, quiet: bool, verbose: bool) -> None:
    """Say how each step is, and what is worth knowing around it; check: end as what is missing demands."""
    with _looking("status", form, quiet=quiet) as (session, view):
        around = surroundings.read(session.connection, session.chain, view.found)
        _say_steps(view, verbose=verbose, conflicts=not check)
        CONSOLE.say(*text.around(around, view.found.server))
        view.more["surroundings"] = asdict(around)
        if check:
            view.error = _missing(session, view, listed=True)


def what_setup_would_do(*, form: str, sql: bool, quiet: bool, verbose: bool) -> None:
    """Say what setup would do now, and what that means for whoever uses the tables; sql: print its SQL instead."""
    with _looking("plan", form, quiet=quiet, sql=sql) as (session, view):
        orphans = survey.orphans(session.connection, view.plan.missing, timeout=survey.BRIEFLY)
        view.error = next(hindrances(view.plan, view.found.server, view.commands), None)
        if not sql:
            _say_plan(session, view, verbose=verbose)
        elif view.error is None:
            ours = transaction_settings(session.where, session.given.lock_timeout_ms)
            CONSOLE.emit(runner.Script(session.chain, view.plan, view.found, ours).as_sql())
        if orphans and view.error is None:
            view.error = refused_by_rows(orphans)
        if not sql and view.error is None:
            passing = f"{text.summary(view.found.checks)} now; nothing was changed; {CONSOLE.target}"
            CONSOLE.say(text.line("plan", f"{text.counted(view.plan)}; {passing}"))


def _missing(session: Session, view: View, *, listed: bool) -> errors.RecipeError | None:
    """Return what the task ends with; listed: what is missing has been said."""
    orphans = survey.orphans(session.connection, view.plan.missing)
    return next(what_is_missing(view.plan, view.found.server, view.commands, orphans, listed=listed), None)


def _say_steps(view: View, *, verbose: bool, conflicts: bool) -> None:
    checks = view.found.checks
    CONSOLE.say(*text.steps(view.plan, passed=checks if verbose else (), conflicts=conflicts))
    CONSOLE.say(*text.without_admins(checks), text.line("checks", f"{text.summary(checks)}; {CONSOLE.target}"))


def _say_plan(session: Session, view: View, *, verbose: bool) -> None:
    """Gather what is known of the tables that the plan touches, and say it."""
    todo, connection = view.plan, session.connection
    sizes = blockers.sizes(connection, {table: todo.found.get(table, table) for a in todo.actions for table in a.locks})
    building = any(action.effect is plan.Effect.BUILD for action in todo.actions)
    bystanders = blockers.bystanders(connection, waits_for(todo), todo.found, building=building)
    # Where there are conflicts it may be a view: to read it is to run what others wrote.
    kept = [] if todo.conflicts else [_kept(connection, check) for check in todo.missing if check.replaces]
    unseen = plan.left_to_the_rows(todo)
    CONSOLE.say(*(text.steps(todo, passed=view.found.checks) if verbose else text.steps(todo, only_due=True)))
    if not todo.conflicts:  # else nothing would run
        CONSOLE.say(*text.locks(todo.actions, sizes), *text.bystanders(bystanders, session.given))
        CONSOLE.say(*text.consequences(todo, kept, unseen))
    view.more |= {
        "actions": formats.actions(todo.actions),
        "tables": {name: asdict(size) for name, size in sizes.items()},
        "waiting_for": [asdict(bystander) for bystander in bystanders],
        "kept": kept,
        "prepared_statements_fail_once": todo.reshaped,
        "left_to_the_rows": unseen,
    }


@understood()
def _kept(connection: Connection, column: Check) -> str:
    """Say how many values of a column are kept, and where; they are counted in moments, or not at all."""
    limits = {"lock_timeout": "1ms", "statement_timeout": "5s", "row_security": "off"}
    settings = [f"set_config('{name}', '{value}', true)" for name, value in limits.items()]
    kind = str(column.actual).removesuffix(" NOT NULL")
    names = [f"{column.name}_{kind}{suffix}" for suffix in ("", *(f"_{number}" for number in range(2, 10)))]
    queries = [
        f"SELECT attname FROM pg_attribute WHERE attrelid = {literal(column.found)}::regclass",
        f"SELECT count({column.name}) FROM {column.found}",
    ]
    try:
        taken, [(count,)] = connection.ask(queries, *settings)
    except errors.StatementError:
        return f"the {kind} values of {column.title}, which could not be counted, under another name"
    into = next((name for name in names if (name,) not in taken), "another column")
    return f"{int(count or 0):,} {kind} values of {column.title} in {into}"


@contextmanager
def _looking(task: str, form: str, *, quiet: bool, sql: bool = False) -> Iterator[tuple[Session, View]]:
    """Look at what exists; once all is said, end as the view does. A document has stdout for itself."""
    choice = (PEOPLE,) if sql else _FORMATS[task]
    if form not in choice:
        raise errors.FORMAT(task=f"{task} that prints SQL" if sql else task, form=form, formats=", ".join(choice))
    CONSOLE.format, CONSOLE.quiet = "sql" if sql else form, quiet
    try:
        with opened(partial(Session, looks=True)) as (session, found):
            todo = session.todo(found)
            view = View(session.where, session.given, found, todo, session.commands(todo))
            yield session, view
            CONSOLE.say()
    except (Exception, KeyboardInterrupt) as error:
        _write(task, form, as_message(error), None)  # whoever reads the document should find out there, too
        raise
    _write(task, form, view.error, view)
    if view.error:
        raise view.error


def _write(task: str, form: str, error: errors.RecipeError | None, view: View | None) -> None:
    if form == "json":
        CONSOLE.emit_json(formats.as_json(task, error, view))
    elif form == "github":
        CONSOLE.emit(formats.as_github(task, error, view))
        if path := os.environ.get("GITHUB_STEP_SUMMARY"):  # where GitHub Actions has a page for the job
            CONSOLE.append(path, formats.as_summary(error, view))
