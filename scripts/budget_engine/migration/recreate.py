"""Recreate: which tables move out of the way where the core schema has an older form, and the plan that moves them.

The tables that move are those of the step that recreate is the alternative to, and whatever leads into them by foreign
keys: the chain's own, and, where they are to move along, those of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from budget_engine.migration import plan
from budget_engine.migration.chain import Chain, Step
from budget_engine.migration.checks import Check, Kind, Lock, as_if_missing
from budget_engine.migration.survey import PIN, Survey, literal
from budget_engine.postgres.connection import Connection


@dataclass(frozen=True)
class Move:
    """A table that would move: its bare name, as SQL writes it, whether the chain knows it, about how many rows it has.

    rows: an estimate (0: nobody counted yet), None: not a single one; keys: of another's table, its foreign keys that
    lead to what moves.
    """

    table: str
    found: str
    ours: bool
    rows: int | None
    keys: str

    @property
    def has_rows(self) -> bool:
        """Whether it holds any row."""
        return self.rows is not None


_LED = """
WITH RECURSIVE led (oid) AS (
  SELECT name::regclass::oid FROM unnest({core}::text[]) AS name
  UNION
  SELECT next.oid FROM led CROSS JOIN LATERAL (
    SELECT conrelid FROM pg_constraint WHERE contype = 'f' AND confrelid = led.oid
    UNION ALL SELECT inhrelid FROM pg_inherits WHERE inhparent = led.oid) AS next (oid)
)
SELECT relname, led.oid::regclass, led.oid::regclass::text = ANY ({ours}::text[]), greatest(reltuples, 0)::bigint,
       (SELECT string_agg(format('%s: %s', conname, pg_get_constraintdef(pg_constraint.oid)), E'\\n')
        FROM pg_constraint
        WHERE conrelid = led.oid AND contype = 'f' AND conparentid = 0 AND confrelid IN (SELECT oid FROM led))
FROM led JOIN pg_class ON pg_class.oid = led.oid
WHERE relkind <> 'i'
ORDER BY 3 DESC, led.oid"""


def read(connection: Connection, chain: Chain, found: Survey) -> tuple[Move, ...]:
    """Return what would move; nothing where the core schema need not be made anew."""
    recreate = chain.recreate
    if recreate is None or not any(check.fixed_by == recreate.label for check in found.checks):
        return ()
    tables = {check.table: check for check in found.checks if check.kind is Kind.TABLE and check.found}
    core = [str(check.found) for check in tables.values() if check.step == recreate.instead_of]
    ours = [str(check.found) for check in tables.values()]
    _, rows = connection.ask([PIN, _LED.format(core=literal(core), ours=literal(ours))])
    # Where row-level security hides rows from us, an error is better than a table that looks empty.
    looks = [f"SELECT EXISTS (SELECT FROM {name})" for _, name, *_ in rows]
    filled = connection.ask(looks, "set_config('row_security', 'off', true)")
    return tuple(
        Move(str(table), str(name), is_ours == "t", int(estimate or 0) if holds == "t" else None, keys or "")
        for (table, name, is_ours, estimate, keys), [(holds,)] in zip(rows, filled, strict=True)
    )


def make(chain: Chain, recreate: Step, checks: Sequence[Check], moves: Sequence[Move]) -> plan.Plan:
    """Plan the move, and then what completes the prerequisites and what moves."""
    gone = {move.table for move in moves if move.ours}
    foreseen = as_if_missing(checks, gone)
    wanted = [step for step in chain.steps if step.task == recreate.task or step.label in gone]
    rest = plan.make(chain, wanted, foreseen)
    core = next(step for step in rest.steps if step.label == recreate.instead_of)
    # What it includes of other files is for the tables that move.
    made_anew = {recreate.label, *(check.step for check in checks if check.table in gone)}
    locks = {move.table: Lock.ACCESS_EXCLUSIVE for move in moves}
    actions = [
        plan.Action(
            recreate.label,
            (statement.text,),
            statement,
            tuple(check for check in core.reasons if statement.creates(check)),
            locks if place == 0 else {},
            plan.Effect.CATALOG,
            concurrent=False,
        )
        for place, statement in enumerate(recreate.statements)
        if not statement.concurrent and statement.step in made_anew
    ]
    moving = replace(core, step=recreate, transaction=tuple(actions), concurrent=())
    steps = tuple(moving if step is core else replace(step, transaction=(), concurrent=()) for step in rest.steps)
    return plan.Plan(steps, tuple(checks), sum(check.passed for check in checks))
