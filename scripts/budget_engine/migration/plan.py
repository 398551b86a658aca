"""The plan: the statements that create what is missing, in the files' order; computed without a connection.

What `invoke plan` shows, `plan --sql` prints, `rehearse` runs and setup sends is this one list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from budget_engine.migration.chain import Chain, Statement, Step
from budget_engine.migration.checks import STRENGTH, WRITERS, Check, Kind, Lock


class State(Enum):
    """How a step is."""

    DONE = "done"
    PENDING = "pending"
    PARTIAL = "partial"
    CONFLICT = "conflict"
    NOT_NEEDED = "not needed"


class Effect(Enum):
    """What a statement does to the rows of tables that exist."""

    NEW = "new table"
    CATALOG = "catalog change"
    SCAN = "scan: reads the rows once"
    BUILD = "build: reads the rows twice"


@dataclass(frozen=True)
class Action:
    """One statement of a file: what it creates, and what it locks of the tables that exist.

    sql: as it is sent, an unfinished index dropped first; locks: the mode by the table; concurrent: it runs alone,
    outside any transaction.
    """

    step: str
    sql: tuple[str, ...]
    statement: Statement
    checks: tuple[Check, ...]
    locks: Mapping[str, Lock]
    effect: Effect
    concurrent: bool

    @property
    def waits_for(self) -> dict[str, set[str]]:
        """The lock modes of others that hold it up, by the table: a build also waits for whoever writes it."""
        build = self.effect is Effect.BUILD
        return {table: {*lock.conflicts_with, *(WRITERS if build else ())} for table, lock in self.locks.items()}


@dataclass(frozen=True)
class StepPlan:
    """What one step has to do.

    conflicts: the checks that nothing fixes; reasons: those that its actions are for; told: those that differ, are not
    required, and stay as they are.
    """

    step: Step
    state: State
    transaction: tuple[Action, ...]
    concurrent: tuple[Action, ...]
    conflicts: tuple[Check, ...]
    reasons: tuple[Check, ...]
    elsewhere: tuple[Check, ...]  # its own, which another step fixes
    told: tuple[Check, ...] = ()

    @property
    def label(self) -> str:
        """The step's label."""
        return self.step.label


@dataclass(frozen=True)
class Plan:
    """What a task has to do, in the chain's order.

    checks: every check of the chain, what goes along with a replaced column counted as missing; passed: how many passed
    when this was planned.
    """

    steps: tuple[StepPlan, ...]
    checks: tuple[Check, ...] = field(repr=False)
    passed: int

    @property
    def transactions(self) -> list[StepPlan]:
        """The steps that have a transaction to run."""
        return [step for step in self.steps if step.transaction]

    @property
    def concurrent(self) -> list[Action]:
        """What runs concurrently, after all transactions."""
        return [action for step in self.steps for action in step.concurrent]

    @property
    def actions(self) -> list[Action]:
        """All statements, in the order in which they run."""
        return [action for step in self.steps for action in step.transaction] + self.concurrent

    @property
    def conflicts(self) -> tuple[Check, ...]:
        """What no step fixes."""
        return tuple(check for step in self.steps for check in step.conflicts)

    @property
    def lacking(self) -> tuple[str, ...]:
        """The rights that the role lacks for what is to be done, each once."""
        rights = [
            right for step in self.steps for check in step.reasons for right in (check.lacking or "").splitlines()
        ]
        hidden = [_hidden(action) for action in self.actions]
        return tuple(dict.fromkeys(right for right in (*rights, *hidden) if right))

    @property
    def missing(self) -> tuple[Check, ...]:
        """Every required check of these steps that does not pass, each once."""
        every = [check for step in self.steps for check in (*step.conflicts, *step.reasons)]
        return tuple(dict.fromkeys(check for check in every if check.required and not check.passed))

    @property
    def fixed_elsewhere(self) -> tuple[Check, ...]:
        """Checks of these steps that only a step outside of them fixes."""
        inside = {step.label for step in self.steps}
        return tuple(check for step in self.steps for check in step.elsewhere if check.fixed_by not in inside)

    @property
    def to_do(self) -> bool:
        """Whether there is anything to send."""
        return any(step.transaction or step.concurrent for step in self.steps)

    @property
    def reshaped(self) -> list[str]:
        """The tables whose columns change: prepared SELECT * of them fail once (0A000)."""
        adding = (check for step in self.steps for check in step.reasons if check.kind is Kind.COLUMN and check.found)
        return list(dict.fromkeys(check.table for check in adding))


def _hidden(action: Action) -> str | None:
    """Say what it lacks to see the rows that it updates."""
    for check in action.checks:
        if check.rows_hidden and re.search(rf"\bUPDATE {check.table}\b", action.statement.flat):
            return f"BYPASSRLS (or ALTER TABLE {check.table} NO FORCE ROW LEVEL SECURITY meanwhile: it may hide rows)"
    return None


def make(chain: Chain, wanted: Sequence[Step], checks: Sequence[Check]) -> Plan:
    """Plan these steps, in their order, given every check of the chain."""
    seen = _with_what_goes_along(checks)
    labels = {step.label for step in wanted}
    to_fix = [
        check
        for check in seen
        if not check.passed and check.fixed_by in labels and (check.required or not check.lacking)
    ]
    new_tables = {check.table for check in to_fix if check.kind is Kind.TABLE and check.actual is None}
    due = _due(chain, to_fix, seen, new_tables)
    blocked = {check.step for check in seen if check.conflict}
    return Plan(
        tuple(_plan_step(step, seen, due, new_tables, blocked) for step in wanted),
        tuple(seen),
        passed=sum(check.passed for check in checks),
    )


def _with_what_goes_along(checks: Sequence[Check]) -> list[Check]:
    """Count as missing what is made of a column that its step replaces: it follows the old values to their new name."""
    replaced = [check for check in checks if check.replaces]

    def gone(check: Check) -> bool:
        follows = check.kind is Kind.DEFAULT or not check.conflict
        return follows and any(check.is_on(column) for column in replaced)

    return [replace(check, actual=None, fixed_by=check.step) if gone(check) else check for check in checks]


_Due = dict[Statement, list[Check]]


def _due(chain: Chain, to_fix: Sequence[Check], checks: Sequence[Check], new_tables: set[str]) -> _Due:
    """Find the statements that create what is to be fixed, each with the checks that it is due for."""
    every = [statement for step in chain.steps for statement in step.statements]
    creating = {st.new_table: st for st in every if st.new_table in new_tables}
    missing_columns = {(c.table, c.name) for c in checks if c.kind is Kind.COLUMN and (c.actual is None or c.replaces)}
    due: _Due = {}
    for check in sorted(to_fix, key=lambda check: check.kind not in (Kind.TABLE, Kind.COLUMN)):
        table = creating.get(check.table)
        if table and table.declares(check):
            due.setdefault(table, []).append(check)
            continue
        own = [st for st in every if st.step == check.fixed_by]
        found = _creating(check, own, missing_columns, due) or _creating(check, every, missing_columns, due)
        later = check.kind is Kind.FOREIGN_KEY and (check.table, check.name) not in missing_columns
        found = [*found, *(st for st in every if later and st.concurrent and check.is_validated_by(st.flat))]
        for statement in found:
            due.setdefault(statement, []).append(check)
    return due


def _creating(
    check: Check, among: Sequence[Statement], missing_columns: set[tuple[str, str]], due: _Due
) -> list[Statement]:
    """Find the statements that create it, unless it exists and has only to be validated."""
    if check.kind is Kind.FOREIGN_KEY and check.actual is not None:
        return []
    with_column = (check.table, check.name) in missing_columns
    found = [st for st in among if st.creates(check, with_column=with_column)]
    if with_column and check.kind is not Kind.COLUMN:  # what comes with the column needs no statement of its own
        found = [st for st in found if st in due] or found
    return found


def _plan_step(step: Step, checks: Sequence[Check], due: _Due, new_tables: set[str], blocked: set[str]) -> StepPlan:
    own = [check for check in checks if check.step == step.label and not check.passed]
    conflicts = tuple(check for check in own if check.conflict)
    actions = [_action(st, due.get(st, []), new_tables, checks) for st in step.statements if st in due]
    transaction = [action for action in actions if not action.concurrent]
    if transaction:  # what creates nothing by itself, a guard, runs with its step
        others = {st for st in step.statements if not st.concurrent and not any(st.creates(c) for c in checks)}
        placed = {action.statement: action for action in transaction}
        inside = [st for st in step.statements if st in placed or st in others]
        transaction = [
            placed.get(st) or Action(step.label, (st.text,), st, (), {}, Effect.CATALOG, False) for st in inside
        ]
    by_itself = [
        check for check in checks if not check.passed and check.fixed_by == step.label and check.step == step.label
    ]
    reasons = [*(check for action in actions for check in action.checks), *by_itself]
    fixed_here = tuple(dict.fromkeys(reasons))
    elsewhere = tuple(check for check in own if check not in conflicts and check not in fixed_here and check.fixed_by)
    concurrent = tuple(action for action in actions if action.concurrent)
    if step.label in blocked:
        transaction, concurrent = [], ()
    begun = any(
        check.step == step.label and check.passed and check.kind in (Kind.TABLE, Kind.COLUMN) for check in checks
    )
    state = (
        State.CONFLICT
        if conflicts
        else (State.PARTIAL if begun else State.PENDING)
        if any(check.required for check in fixed_here)
        else State.NOT_NEEDED
        if any(check.required for check in elsewhere)
        else State.DONE
    )
    told = tuple(check for check in own if not check.required and check.fixed_by is None)
    return StepPlan(step, state, tuple(transaction), concurrent, conflicts, fixed_here, elsewhere, told)


def _action(statement: Statement, checks: Sequence[Check], new_tables: set[str], every: Sequence[Check]) -> Action:
    within = all(check.table in new_tables for check in checks)  # nobody uses it yet
    existing = {check.table for check in every if check.found} - new_tables
    locks: dict[str, Lock] = {}

    def lock(table: str | None, mode: Lock | None) -> None:
        if table is not None and mode is not None and (table in existing or "." in table):
            locks[table] = max(mode, locks.get(table, mode), key=STRENGTH.index)

    concurrent = statement.concurrent and not within
    for check in checks:
        scans = concurrent and check.kind is Kind.FOREIGN_KEY
        lock(check.table, Lock.SHARE_UPDATE_EXCLUSIVE if scans else check.lock)
        if check.target != check.table:
            lock(check.target, Lock.ROW_SHARE if scans else Lock.SHARE_ROW_EXCLUSIVE)
    kinds = {check.kind for check in checks}
    effect = Effect.NEW if within else Effect.CATALOG
    if concurrent:
        effect = Effect.SCAN if Kind.FOREIGN_KEY in kinds else Effect.BUILD
    return Action(
        statement.step,
        _sent(statement, checks, concurrent=concurrent),
        statement,
        tuple(checks),
        locks,
        effect,
        concurrent,
    )


def _sent(statement: Statement, checks: Sequence[Check], *, concurrent: bool) -> tuple[str, ...]:
    """Write a statement as it is sent. Outside a transaction the search_path is not ours: tables are named in full."""
    index = re.search(r"IF NOT EXISTS (\w+) ON (\w+)", statement.flat)
    if not concurrent:
        return (re.sub(r"\bINDEX CONCURRENTLY\b", "INDEX", statement.text, count=1),)
    found = next((check.found for check in checks if check.found), None)
    if index is None or found is None:
        return (statement.text,)
    home = found.removesuffix(index[2]) if found.endswith(f".{index[2]}") else ""
    drop = [f"DROP INDEX CONCURRENTLY IF EXISTS {home}{index[1]}"] if any(check.unfinished for check in checks) else []
    return (*drop, re.sub(rf"\bON {index[2]}\b", lambda _: f"ON {found}", statement.text, count=1))


def left_to_the_rows(plan: Plan) -> list[str]:
    """Return what rows may refuse, which nobody has counted: those of a key that is NOT VALID can be."""
    return [
        action.statement.flat
        for action in plan.concurrent
        for check in action.checks
        if (check.kind is Kind.FOREIGN_KEY and not check.unfinished) or check.kind is Kind.KEY
    ]


def checks_of(steps: Iterable[Step], checks: Iterable[Check]) -> list[Check]:
    """Return the checks of these steps."""
    labels = {step.label for step in steps}
    return [check for check in checks if check.step in labels]
