"""The plan: the statements that create what is missing, in the files' order; computed without a connection.

What `invoke plan` shows, `plan --sql` prints, `rehearse` runs and setup sends is this one list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from budget_engine.migration.chain import Chain, Statement, Step
from budget_engine.migration.checks import STRENGTH, WAITS_FOR, WRITERS, Check, Kind, Lock


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
    checks: tuple[Check, ...] = ()
    locks: Mapping[str, Lock] = field(default_factory=dict)
    effect: Effect = Effect.CATALOG
    concurrent: bool = False

    @property
    def waits_for(self) -> dict[str, set[str]]:
        """The lock modes of others that hold it up, by the table: a build also waits for whoever writes it."""
        build = self.effect is Effect.BUILD
        return {table: {*WAITS_FOR[lock], *(WRITERS if build else ())} for table, lock in self.locks.items()}


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
    told: tuple[Check, ...] = ()

    @property
    def label(self) -> str:
        """The step's label."""
        return self.step.label


@dataclass(frozen=True)
class Plan:
    """What a task has to do, in the chain's order.

    checks: every check of the chain, what goes along with a replaced column counted as missing.
    """

    steps: tuple[StepPlan, ...]
    checks: tuple[Check, ...] = field(repr=False)

    @property
    def transactions(self) -> list[StepPlan]:
        """The steps that have a transaction to run."""
        return [step for step in self.steps if step.transaction]

    @property
    def concurrent(self) -> list[Action]:
        """What runs concurrently, after all transactions."""
        return [action for step in self.steps for action in step.concurrent]

    @property
    def is_complete(self) -> bool:
        """Whether its transactions bring all that does not pass."""
        inside = {step.label for step in self.steps}
        return not self.concurrent and all(check.passed or check.fixed_by in inside for check in self.checks)

    @property
    def actions(self) -> list[Action]:
        """All statements, in the order in which they run."""
        return [action for step in self.steps for action in step.transaction] + self.concurrent

    @property
    def found(self) -> dict[str, str]:
        """The tables that exist: as SQL writes each, by its bare name."""
        return {check.table: check.found for check in self.checks if check.found}

    @property
    def drops(self) -> bool:
        """Whether it drops anything: an unfinished index, to build it again."""
        return any(len(action.sql) > 1 for action in self.concurrent)

    @property
    def conflicts(self) -> tuple[Check, ...]:
        """What no step fixes."""
        return tuple(check for step in self.steps for check in step.conflicts)

    @property
    def lacking(self) -> tuple[str, ...]:
        """The rights that the role lacks for what is to be done, each once."""
        reasons = (check for step in self.steps for check in step.reasons)
        return tuple(dict.fromkeys(right for check in reasons for right in (check.lacking or "").split("\n") if right))

    @property
    def missing(self) -> tuple[Check, ...]:
        """Every required check of these steps that does not pass, each once."""
        every = [check for step in self.steps for check in (*step.conflicts, *step.reasons)]
        return tuple(dict.fromkeys(check for check in every if check.required and not check.passed))

    @property
    def fixed_elsewhere(self) -> tuple[Check, ...]:
        """Checks of these steps that only a step outside of them fixes."""
        inside = {step.label for step in self.steps}
        return tuple(check for check in self.checks if check.step in inside and check.fixed_by not in {None, *inside})

    @property
    def to_do(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.actions)

    @property
    def reshaped(self) -> list[str]:
        """The tables whose columns change: prepared SELECT * of them fail once (0A000)."""
        adding = (c for step in self.transactions for c in step.reasons if c.kind is Kind.COLUMN and c.found)
        return list(dict.fromkeys(check.table for check in adding))


def make(chain: Chain, wanted: Sequence[Step], checks: Sequence[Check]) -> Plan:
    """Plan these steps, in their order, given every check of the chain."""
    seen = _with_what_goes_along(checks)
    labels = {step.label for step in wanted}
    due_here = (check for check in seen if not check.passed and check.fixed_by in labels)
    to_fix = [check for check in due_here if check.required or not check.lacking]
    new_tables = {check.table for check in to_fix if check.kind is Kind.TABLE and check.actual is None}
    due = _due(chain, to_fix, seen, new_tables) if to_fix else {}
    blocked = {check.step for check in seen if check.conflict}
    return Plan(tuple(_plan_step(step, seen, due, new_tables, blocked) for step in wanted), tuple(seen))


def _with_what_goes_along(checks: Sequence[Check]) -> list[Check]:
    """Count as missing what is made of a column that its step replaces: it follows the old values to their new name."""
    replaced = [check for check in checks if check.replaces]

    def gone(check: Check) -> bool:
        follows = check.kind is Kind.DEFAULT or not check.conflict
        return follows and any(check.is_on(column) for column in replaced)

    return [replace(check, actual=None, fixed_by=check.step) if gone(check) else check for check in checks]


_Due = dict[Statement, list[Check]]


def _due(chain: Chain, to_fix: Sequence[Check], checks: Sequence[Check], new_tables: set[str]) -> _Due:
    """Find the statements that create what is to be fixed, each with the checks that it is due for.

    With none: those that create nothing by themselves (a guard), which run with their step.
    """
    every = [statement for step in chain.steps for statement in step.statements]
    creating = {st.new_table: st for st in every if st.new_table in new_tables}
    missing_columns = {(c.table, c.name) for c in checks if c.kind is Kind.COLUMN and (c.actual is None or c.replaces)}
    made = {statement for check in checks for statement in chain.creating(check)}
    due: _Due = {statement: [] for statement in every if statement not in made}
    for check in sorted(to_fix, key=lambda check: check.kind not in (Kind.TABLE, Kind.COLUMN)):
        table = creating.get(check.table)
        if table and table.declares(check):
            due.setdefault(table, []).append(check)
            continue
        found = _creating(chain, check, missing_columns, due)
        later = check.kind is Kind.FOREIGN_KEY and (check.table, check.name) not in missing_columns
        found = [*found, *(st for st in every if later and st.concurrent and check.is_validated_by(st.flat))]
        for statement in found:
            due.setdefault(statement, []).append(check)
    return due


def _creating(chain: Chain, check: Check, missing_columns: set[tuple[str, str]], due: _Due) -> list[Statement]:
    """Find the statements that create it, its own step's first, unless it exists and has only to be validated."""
    if check.kind is Kind.FOREIGN_KEY and check.actual is not None:
        return []
    with_column = (check.table, check.name) in missing_columns
    every = chain.creating(check, with_column=with_column)
    found = [st for st in every if st.step == check.fixed_by] or every
    if with_column and check.kind is not Kind.COLUMN:  # what comes with the column needs no statement of its own
        found = [st for st in found if due.get(st)] or found
    return found


def _plan_step(step: Step, checks: Sequence[Check], due: _Due, new_tables: set[str], blocked: set[str]) -> StepPlan:
    label = step.label
    own = [check for check in checks if check.step == label]
    open_ = [check for check in own if not check.passed]
    conflicts = tuple(check for check in open_ if check.conflict)
    told = tuple(check for check in open_ if not check.required and check.fixed_by is None)
    actions = [_action(st, due[st], new_tables, checks) for st in step.statements if due.get(st)]
    fixed = [check for check in open_ if check.fixed_by == label]
    reasons = tuple(dict.fromkeys([*(check for action in actions for check in action.checks), *fixed]))
    if label in blocked:
        actions = []
    inside = {action.statement: action for action in actions if not action.concurrent}
    if inside:
        guards = (st for st in step.statements if not st.concurrent and due.get(st) == [])
        inside |= {st: Action(label, (st.text,), st) for st in guards}
    transaction = tuple(inside[st] for st in step.statements if st in inside)
    concurrent = tuple(action for action in actions if action.concurrent)
    begun = any(check.passed and check.kind in (Kind.TABLE, Kind.COLUMN) for check in own)
    state = State.DONE
    if conflicts:
        state = State.CONFLICT
    elif actions or any(check.required for check in reasons):
        state = State.PARTIAL if begun else State.PENDING
    elif not begun and any(check.required and check.fixed_by for check in open_):  # by another step
        state = State.NOT_NEEDED
    return StepPlan(step, state, transaction, concurrent, conflicts, reasons, told)


def _action(statement: Statement, checks: Sequence[Check], new_tables: set[str], every: Sequence[Check]) -> Action:
    is_new = all(check.table in new_tables for check in checks)  # nobody uses it yet
    concurrent = statement.concurrent and not is_new
    scans = concurrent and any(check.kind is Kind.FOREIGN_KEY for check in checks)
    effect = Effect.SCAN if scans else Effect.BUILD if concurrent else Effect.NEW if is_new else Effect.CATALOG
    in_use = {check.table for check in every if check.found} - new_tables
    locks: dict[str, Lock] = {}
    for check in checks:
        here = Lock.SHARE_UPDATE_EXCLUSIVE if scans else check.lock
        there = Lock.ROW_SHARE if scans else Lock.SHARE_ROW_EXCLUSIVE
        for table, mode in ((check.table, here), (check.target or "", there)):
            if mode and (table in in_use or "." in table):
                locks[table] = max(mode, locks.get(table, mode), key=STRENGTH.index)
    sent = _sent(statement, checks, concurrent=concurrent)
    return Action(statement.step, sent, statement, tuple(checks), locks, effect, concurrent)


def _sent(statement: Statement, checks: Sequence[Check], *, concurrent: bool) -> tuple[str, ...]:
    """Write a statement as it is sent. Outside a transaction the search_path is not ours: tables are named in full."""
    index = re.search(r"IF NOT EXISTS (\w+) ON (\w+)", statement.flat)
    if not concurrent:
        return (re.sub(r"\bINDEX CONCURRENTLY\b", "INDEX", statement.text, count=1),)
    found = next((check.found for check in checks if check.found), None)
    if index is None or found is None:
        return (statement.text,)
    home = found.removesuffix(index[2])
    drop = [f"DROP INDEX CONCURRENTLY IF EXISTS {home}{index[1]}"] if any(check.unfinished for check in checks) else []
    return (*drop, re.sub(rf"\bON {index[2]}\b", lambda _: f"ON {found}", statement.text, count=1))


def left_to_the_rows(plan: Plan) -> list[str]:
    """Name what is required and rows may refuse, uncounted: those of a foreign key that is NOT VALID can be."""
    return [
        check.title
        for action in plan.concurrent
        for check in action.checks
        if check.required and ((check.kind is Kind.FOREIGN_KEY and not check.unfinished) or check.kind is Kind.KEY)
    ]
