"""Recreate: which tables move out of the way where the core schema has an older form, and the plan that moves them.

The tables that move are those of the step that recreate is the alternative to, and whatever leads into them by foreign
keys: those that it makes anew, and, where they are to move along, those of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from budget_engine import errors
from budget_engine.migration import plan
from budget_engine.migration.chain import Chain, Step
from budget_engine.migration.checks import Check, Kind, Lock, as_if_missing
from budget_engine.migration.survey import Survey
from budget_engine.postgres.connection import Connection, understood
from budget_engine.spelling import literal

ARCHIVE = "core_archive"  # the schema that the file moves them to, or this with a number
_TABLES = ("r", "p")  # of pg_class.relkind: what can be locked, and read without running what others wrote
_VIEW = "v"


@dataclass(frozen=True)
class Move:
    """A table that would move: its bare name, as SQL writes it, its relkind, about how many rows it has.

    anew: whether recreate makes it anew; rows: an estimate (0: nobody counted yet), None: not a single one.
    """

    table: str
    found: str
    kind: str
    anew: bool
    rows: int | None


# Who need not be asked for: the core, what is made anew, and children of these. As the file itself does it.
_LED = """
WITH RECURSIVE led (oid, unasked) AS (
  SELECT name::regclass::oid, true FROM unnest({core}::text[]) AS name
  UNION
  SELECT next.oid, next.unasked FROM led CROSS JOIN LATERAL (
    SELECT conrelid, conrelid::regclass::text = ANY ({anew}::text[]) FROM pg_constraint
    WHERE contype = 'f' AND confrelid = led.oid
    UNION ALL
    SELECT inhrelid, led.unasked FROM pg_inherits WHERE inhparent = led.oid) AS next (oid, unasked)
), moving AS (
  SELECT oid, bool_or(unasked) AS unasked FROM led GROUP BY oid
)
SELECT relname, moving.oid::regclass, relkind, moving.oid::regclass::text = ANY ({anew}::text[]) AS anew,
       greatest(reltuples, 0)::bigint,
       (SELECT string_agg(format('%s: %s %s', conrelid::regclass, conname, pg_get_constraintdef(pg_constraint.oid)),
                          E'\\n' ORDER BY conname)
        FROM pg_constraint
        WHERE NOT unasked AND conrelid = moving.oid AND contype = 'f' AND conparentid = 0
          AND confrelid IN (SELECT oid FROM moving)),
       concat_ws(E'\\n',
         CASE WHEN NOT pg_has_role(relowner, 'USAGE')
              THEN format('ownership of table %s (it belongs to %s)', relname, relowner::regrole) END,
         CASE WHEN NOT has_database_privilege(current_database(), 'CREATE')
              THEN format('CREATE on database %s', current_database()) END)
FROM moving JOIN pg_class ON pg_class.oid = moving.oid
WHERE relkind NOT IN ('i', 'I')
ORDER BY anew DESC, moving.oid"""


@understood()
def read(connection: Connection, chain: Chain, found: Survey, *, with_dependants: bool) -> tuple[Move, ...]:
    """Return what would move; nothing where the core schema need not be made anew.

    Raises DEPENDANTS where tables of others would have to, and are not to (with_dependants), RIGHT where the role may
    not move them.
    """
    recreate = chain.recreate
    if recreate is None or not any(check.fixed_by == recreate.label for check in found.checks):
        return ()
    made = {statement.new_table for statement in recreate.statements}
    tables = [c for c in found.checks if c.kind is Kind.TABLE and c.found and c.table in made]
    core = [str(check.found) for check in tables if check.step == recreate.instead_of]
    anew = [str(check.found) for check in tables]
    [rows] = connection.ask([_LED.format(core=literal(core), anew=literal(anew))])
    if (keys := _lines(row[5] for row in rows)) and not with_dependants:
        raise errors.DEPENDANTS(where=keys)
    if lacking := _lines(row[6] for row in rows):
        raise errors.RIGHT(role=found.server.role, where=lacking)
    # Which of them hold rows: where row-level security hides some from us, an error is better than an empty table.
    readable = [name for _, name, kind, *_ in rows if kind in _TABLES]
    looks = [f"SELECT FROM ONLY {name} LIMIT 1" for name in readable]
    looked = connection.ask(looks, "set_config('row_security', 'off', true)") if looks else []
    empty = {name for name, row in zip(readable, looked, strict=True) if not row}
    empty |= {name for _, name, kind, *_ in rows if kind == _VIEW}
    return tuple(
        Move(str(table), str(name), str(kind), anew == "t", None if name in empty else int(estimate or 0))
        for table, name, kind, anew, estimate, *_ in rows
    )


def _lines(texts: Iterable[str | None]) -> list[str]:
    """Return the lines of these texts, each once."""
    return list(dict.fromkeys(line for text in texts for line in (text or "").split("\n") if line))


def wanted(steps: Sequence[Step], chain: Chain, checks: Sequence[Check], moves: Sequence[Move]) -> list[Step]:
    """Return these steps, and those that create something of what moves, in the chain's order."""
    gone = _gone(moves)
    creating = {check.step for check in checks if check.table in gone}
    return [step for step in chain.steps if step in steps or step.label in creating]


def _gone(moves: Sequence[Move]) -> set[str]:
    return {move.table for move in moves if move.anew}


def make(
    chain: Chain, recreate: Step, wanted: Sequence[Step], checks: Sequence[Check], moves: Sequence[Move]
) -> plan.Plan:
    """Plan the move and all that makes the moved tables anew as one transaction; what else is wanted comes later."""
    gone = _gone(moves)
    rest = plan.make(chain, wanted, as_if_missing(checks, gone))
    reasons = tuple(dict.fromkeys(check for step in rest.steps for check in step.reasons))
    now = tuple(check for check in reasons if check.step == recreate.instead_of or check.table in gone)
    # Of what the file includes of other files, those statements that are for the tables that move.
    labels = {recreate.label, recreate.instead_of, *(check.step for check in now)}
    first, *others = [
        plan.Action(recreate.label, (st.text,), st, tuple(check for check in reasons if st.creates(check)))
        for st in recreate.statements
        if st.step in labels
    ]
    new_tables = {check.table for check in now if check.kind is Kind.TABLE}
    indexes = [
        action
        for step in rest.steps
        for action in step.transaction
        if action.statement.concurrent and new_tables.issuperset(check.table for check in action.checks)
    ]
    locks = {move.table if move.anew else move.found: Lock.ACCESS_EXCLUSIVE for move in moves if move.kind in _TABLES}
    transaction = (replace(first, locks=locks), *others, *indexes)
    steps = tuple(
        replace(step, step=recreate, transaction=transaction, concurrent=(), reasons=now)
        if step.label == recreate.instead_of
        else replace(step, transaction=(), concurrent=(), reasons=tuple(c for c in step.reasons if c not in now))
        for step in rest.steps
    )
    return plan.Plan(steps, tuple(checks))
