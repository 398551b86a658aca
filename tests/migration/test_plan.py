"""The plan: the statements that create what is missing, one list for whoever shows, prints, rehearses and sends it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import supabase
from budget_engine import __version__
from budget_engine.migration import chain, plan, runner, survey, turn
from budget_engine.migration.checks import Check, Kind, as_if_missing, outermost
from budget_engine.migration.plan import Action, Plan, State, StepPlan
from budget_engine.postgres import embedded
from conftest import Db, database
from hypothesis import given, settings
from hypothesis import strategies as st
from pglast import split
from proxy import Proxy, socket_of
from states import by_hand, with_uuid

CHAIN = chain.load()
LABELS = [step.label for step in CHAIN.steps]
STATEMENTS = [statement for step in CHAIN.steps for statement in step.statements]


class Everything(tuple[Check, ...]):
    """Every check there is, on an empty database."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "everything"


@pytest.fixture(scope="module")
def everything(cluster: embedded.Cluster) -> Everything:
    with database(cluster) as db:
        supabase.install(db)
        supabase.add_profiles(db)
        return Everything(db.checks())


def _actions(step: StepPlan) -> tuple[Action, ...]:
    return (*step.transaction, *step.concurrent)


def _passing(check: Check) -> Check:
    return replace(check, actual=check.expected, fixed_by=None, found=f"public.{check.table}")


@cache
def _addable(check: Check) -> bool:
    """Whether a statement adds it to a table that exists; that a column has no default comes with the column."""
    return (check.kind, check.expected) != (Kind.DEFAULT, "none") and any(
        one.creates(check) and not one.declares(check) for one in STATEMENTS
    )


TABLES = [statement.new_table for statement in STATEMENTS if statement.new_table]
some = st.sets(st.integers(0, 200), max_size=8)
# What a database may have: of each table nothing, or all of it but what is missing, or has another form.
chosen = st.tuples(st.sets(st.sampled_from(TABLES)), some, some)
Chosen = tuple[set[str], set[int], set[int]]


def surveyed(everything: Sequence[Check], chosen: Chosen, *, conflicts: bool = True) -> list[Check]:
    """Return the checks as they are in such a database."""
    absent, missing_places, other_places = chosen
    there = [check for check in everything if check.table not in absent]
    missing = {check.key for place, check in enumerate(there) if place in missing_places and _addable(check)}
    others = {check.key for place, check in enumerate(there) if place in other_places and conflicts} - missing
    columns = [check for check in there if check.kind is Kind.COLUMN and check.key in missing]

    def seen(check: Check) -> Check:
        if check.table in absent:
            return check
        if check.key in missing or any(check.is_on(column) for column in columns):
            return replace(check, fixed_by=check.step, found=f"public.{check.table}")
        if check.key in others:
            return replace(_passing(check), actual="something else")
        return _passing(check)

    return [seen(check) for check in everything]


drawn = settings(deadline=None, max_examples=40)


# ── what is to be done ─────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_missing_means_nothing_to_do(everything: Everything) -> None:
    made = plan.make(CHAIN, CHAIN.steps, [_passing(check) for check in everything])
    assert not made.to_do
    assert (made.actions, made.conflicts, made.missing, made.lacking, made.fixed_elsewhere) == ([], (), (), (), ())
    assert {step.state for step in made.steps} == {State.DONE}


def test_from_nothing_each_check_is_created_by_one_statement(everything: Everything) -> None:
    made = plan.make(CHAIN, CHAIN.steps, everything)
    created = [check for action in made.actions for check in action.checks]
    assert {check.key for check in created} == {check.key for check in everything}
    assert made.concurrent == []  # nobody uses the new tables yet
    assert {table for action in made.actions for table in action.locks} == {"auth.users"}  # the only one there is
    assert not any("CONCURRENTLY" in sql for action in made.actions for sql in action.sql)
    declared = {check.key for action in made.actions if action.statement.new_table for check in action.checks}
    again = [a for a in made.actions if not a.statement.new_table and {c.key for c in a.checks} & declared]
    assert again == []


@pytest.mark.parametrize("title", ["slots.must_keep", "index idx_slots_type", "comment of slots.min_chars"])
def test_what_is_missing_alone_is_created_alone(everything: Everything, title: str) -> None:
    [missing] = [check for check in everything if check.title == title]
    checks = [
        replace(check, fixed_by=check.step, found="public.slots") if check is missing else _passing(check)
        for check in everything
    ]
    made = plan.make(CHAIN, CHAIN.steps, checks)
    [sent] = [action for action in made.actions if action.checks]
    assert [check.title for check in sent.checks] == [title]
    assert missing.name in " ".join(sent.sql)
    assert {action.step for action in made.actions} == {missing.step}


@drawn
@given(chosen)
def test_every_check_that_fails_has_its_place(everything: Everything, chosen: Chosen) -> None:
    """It is a reason of the step that fixes it, or a conflict of its own step; and of no other."""
    checks = surveyed(everything, chosen)
    made = plan.make(CHAIN, CHAIN.steps, checks)
    places: dict[object, set[str]] = {}
    for step in made.steps:
        for check in (*step.reasons, *step.conflicts):
            places.setdefault(check.key, set()).add(step.label)
    failing = [check for check in checks if not check.passed]
    assert places.keys() == {check.key for check in failing}
    for check in failing:
        # A statement of another step may be the first one that creates it; its own step says so, too.
        assert places[check.key] & {check.fixed_by or check.step}
        assert (check.key in {c.key for c in made.conflicts}) == (check.fixed_by is None)
    assert {check.key for check in made.missing} == {check.key for check in failing}


@drawn
@given(chosen)
def test_the_statements_are_those_of_the_files_in_their_order(everything: Everything, chosen: Chosen) -> None:
    checks = surveyed(everything, chosen, conflicts=False)
    made = plan.make(CHAIN, CHAIN.steps, checks)
    for step in made.steps:
        for part in (step.transaction, step.concurrent):
            places = [step.step.statements.index(action.statement) for action in part]
            assert places == sorted(set(places))
    created = {check.key for action in made.actions for check in action.checks}
    assert created == {check.key for check in checks if not check.passed}
    for action in made.actions:
        if action.checks:  # a new table has its indexes within; what exists is not locked for nothing
            assert action.concurrent <= action.statement.concurrent
            assert action.locks or all(c.lock is None or c.found is None for c in action.checks)
        else:  # a condition runs with its step, and for nothing of another
            assert not any(action.statement.creates(check) for check in checks)
            assert any(other.checks for other in made.actions if other.step == action.step)


@drawn
@given(chosen)
def test_state_of_a_step(everything: Everything, chosen: Chosen) -> None:
    checks = surveyed(everything, chosen)
    for step in plan.make(CHAIN, CHAIN.steps, checks).steps:
        own = [check for check in checks if check.step == step.label and not check.passed]
        if any(check.fixed_by is None for check in own):
            assert step.state is State.CONFLICT
            assert (step.transaction, step.concurrent) == ((), ())  # statements that would never run
        elif step.reasons:
            assert step.state in (State.PENDING, State.PARTIAL)
            assert step.transaction or step.concurrent or all(c.fixed_by != step.label for c in step.reasons)
        elif own:  # another step brings it along: a new prompt_snapshots needs no fix, and has its parent_id
            begun = any(c.passed and c.step == step.label and c.kind in (Kind.TABLE, Kind.COLUMN) for c in checks)
            assert step.state is (State.DONE if begun else State.NOT_NEEDED)
        else:
            assert step.state is State.DONE


@drawn
@given(chosen, st.integers(0))
def test_order_of_the_checks_decides_nothing(everything: Everything, chosen: Chosen, seed: int) -> None:
    checks = surveyed(everything, chosen)
    shuffled = random.Random(seed).sample(checks, len(checks))

    def outline(made: Plan) -> object:
        return [
            (step.state, [(a.sql, dict(a.locks), {c.key for c in a.checks}) for a in _actions(step)])
            for step in made.steps
        ]

    assert outline(plan.make(CHAIN, CHAIN.steps, checks)) == outline(plan.make(CHAIN, CHAIN.steps, shuffled))


@drawn
@given(chosen)
def test_a_task_does_its_share_of_what_setup_does(everything: Everything, chosen: Chosen) -> None:
    checks = surveyed(everything, chosen)
    whole = {step.label: step for step in plan.make(CHAIN, CHAIN.steps, checks).steps}
    for task in {step.task for step in CHAIN.steps}:
        share = plan.make(CHAIN, CHAIN.of(task), checks)
        for step in share.steps:
            assert step.state == whole[step.label].state
            # What is concurrent by itself may be within a transaction where another step creates the table.
            assert {a.statement for a in _actions(step)} == {a.statement for a in _actions(whole[step.label])}
        inside = {step.label for step in share.steps}
        assert {check.fixed_by for check in share.fixed_elsewhere}.isdisjoint(inside)


@drawn
@given(chosen)
def test_outermost_hides_only_what_a_shown_one_says(everything: Everything, chosen: Chosen) -> None:
    failing = [check for check in surveyed(everything, chosen) if not check.passed]
    shown = outermost(failing)
    assert bool(shown) == bool(failing)
    assert [check for check in failing if check in shown] == shown  # a part of them, in order
    for check in failing:
        if check not in shown:
            assert check.table in {other.table for other in shown}, check


def test_what_moves_is_created_again(everything: Everything) -> None:
    """Whatever form it had."""
    checks = [replace(_passing(check), actual="something else", required=True) for check in everything]
    made = plan.make(CHAIN, CHAIN.steps, as_if_missing(checks, ["turns", "turn_metrics"]))
    assert {check.table for check in made.conflicts} == {c.table for c in checks} - {"turns", "turn_metrics"}
    [metrics] = [step for step in made.steps if step.label == "turn_metrics"]
    assert [action.statement.new_table for action in metrics.transaction if action.statement.new_table] == [
        "turn_metrics"
    ]


# ── the messages ───────────────────────────────────────────────────────────────────────────────────────────────────


def script(made: Plan) -> runner.Script:
    server = survey.Server("18.4", "me", "db", ("app", "public"), None, "app, public", pooled=False)
    return runner.Script(CHAIN, made, survey.Survey(server, made.checks), "set_config('lock_timeout', '2s', true)")


def kinds(statements: Sequence[runner.Sent]) -> list[tuple[str, runner.Part]]:
    """Return the steps and the parts in their order, each once in a row."""
    rows = [(sent.step.label, sent.part) for sent in statements]
    return [row for place, row in enumerate(rows) if place == 0 or rows[place - 1] != row]


@drawn
@given(chosen)
def test_each_step_is_a_transaction_with_all_its_parts(everything: Everything, chosen: Chosen) -> None:
    made = plan.make(CHAIN, CHAIN.steps, surveyed(everything, chosen, conflicts=False))
    message = script(made).transactions()
    part = runner.Part
    expected = []
    for step in made.transactions:
        locks = [part.LOCKS] if any(action.locks for action in step.transaction) else []
        parts = [
            part.FRAME,
            part.GUARD,
            *locks,
            part.MIGRATION,
            part.VERIFICATION,
            part.HISTORY,
            part.CLOCK,
            part.COMMIT,
        ]
        expected += [(step.label, part) for part in parts]
    if expected:
        outcome = [part.OUTCOME] if made.is_complete else []
        expected += [(expected[-1][0], last) for last in (*outcome, part.FRAME)]  # then the verification is forgotten
    assert kinds(message) == expected
    assert sum(sent.sql.count("PREPARE budget_engine_verification") for sent in message) == bool(message)
    assert sum(sent.sql.count("supabase (here)") for sent in message) == bool(message)
    assert sum("seen <>" in sent.sql for sent in message) == bool(message)  # compared with the survey
    for sent in message:
        assert not sent.sql.rstrip().endswith(";")
        if sent.part is part.GUARD:
            first = sent.step == made.transactions[0].step
            keeps = len(made.transactions) > 1
            assert script(made).found.turn.taken(turn.RUN, session=first and keeps) in sent.sql
        if sent.part is part.HISTORY:
            words = (f"'{sent.step.label}'", "'transaction'", "'app'", sent.step.checksum, f"'{__version__}'")
            assert all(word in sent.sql for word in words)


def test_each_statement_of_a_message_is_one(everything: Everything) -> None:
    for sent in script(plan.make(CHAIN, CHAIN.steps, everything)).transactions():
        assert len(split(sent.sql)) == 1


@drawn
@given(chosen)
def test_the_messages_are_made_of_the_plan(everything: Everything, chosen: Chosen) -> None:
    made = plan.make(CHAIN, CHAIN.steps, surveyed(everything, chosen, conflicts=False))
    planned = [sql for step in made.transactions for action in step.transaction for sql in action.sql]
    message = script(made).transactions()
    assert [sent.sql for sent in message if sent.part is runner.Part.MIGRATION] == planned
    printed = script(made).as_sql()
    rest = "".join(f"{sql};\n" for sql in (sql for action in made.concurrent for sql in action.sql)).rstrip()
    assert printed.startswith("\n".join(f"{sent.sql};" for sent in message))
    assert printed.endswith(rest)


# ── one list ───────────────────────────────────────────────────────────────────────────────────────────────────────

OF_THE_ENGINE = re.compile(
    r"BEGIN|COMMIT|ROLLBACK|SET |EXECUTE |DEALLOCATE |SELECT |WITH |DO \$(guard|locks|rights|verification|history)\$"
)


def statements(sql: str) -> Iterator[str]:
    """Split SQL, and leave out what the engine adds to the files' statements."""
    return (part for part in split(sql) if not OF_THE_ENGINE.match(part.lstrip()))


def sent_by(db: Db, task: str) -> list[str]:
    """Run a task, and return what it sent on its first connection; another one may watch who is in the way."""
    with Proxy(socket_of(db.cluster.sockets)) as proxy:
        done = db.call(task, env={"DATABASE_URL": proxy.url(db.name), "LOCK_TIMEOUT": "60s"})
    assert done.code == 0, done
    messages = [message.raw[5:-1].decode() for message in proxy.conversations[0].from_client if message.kind == "Q"]
    return [statement for message in messages for statement in statements(message)]


STATES = {
    "empty": "",
    "by hand": by_hand(),
    "uuid": with_uuid(),
    "half": by_hand() + "ALTER TABLE slots ADD COLUMN min_chars int; DROP INDEX idx_slots_type;",
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_what_plan_says_and_prints_and_rehearse_and_setup_send_is_one_list(db: Db, state: str) -> None:
    db.execute(state)
    document = json.loads(db.call("plan", "--format", "json", "--quiet").out)
    planned = [(action["part"], sql.strip()) for action in document["actions"] for sql in action["sql"]]
    every, inside = [sql for _, sql in planned], [sql for part, sql in planned if part == "transaction"]
    assert inside
    assert list(statements(db.call("plan", "--sql").out)) == every
    assert sent_by(db, "rehearse") == inside
    assert sent_by(db, "setup") == every
    assert db.differing() == {}
