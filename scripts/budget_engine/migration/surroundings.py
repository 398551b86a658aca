"""The surroundings: what is around the chain's tables and no check is about, for status to tell."""

from __future__ import annotations

import json
from dataclasses import dataclass

from budget_engine.migration.chain import DB, Chain, query_of
from budget_engine.migration.survey import Survey
from budget_engine.postgres.connection import Connection, understood
from budget_engine.spelling import literal, respelled


@dataclass(frozen=True)
class Entry:
    """A line of the history, as text; duration_ms: how long the part took."""

    step: str
    part: str
    finished_at: str
    duration_ms: str
    role: str
    version: str


@dataclass(frozen=True)
class Unusual:
    """Something worth knowing: what it is about, one line that says it, and the command that changes it ("": none)."""

    what: str
    says: str
    command: str


RISKS = ("anon", "profiles")  # what Unusual.what is where strangers may do more than they should, or admins less


@dataclass(frozen=True)
class Surroundings:
    """What is worth knowing besides the checks.

    history: the last entries, the newest first; changed: steps whose file is another than the one applied last.
    """

    unusual: tuple[Unusual, ...]
    history: tuple[Entry, ...]
    changed: tuple[str, ...]


# To be read without running what others wrote: no view, no policy, no type that a cast of theirs goes with.
_HAS_HISTORY = """
SELECT FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace
WHERE nspname = 'budget_engine' AND relname = 'history' AND relkind = 'r' AND NOT row_security_active(pg_class.oid)
  AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(pg_class.oid, 'SELECT')
  AND 9 = (SELECT count(*) FROM pg_attribute WHERE attrelid = pg_class.oid
           AND concat_ws(' ', attname, atttypid::regtype) = ANY ('{id bigint,step text,part text,schema_name text,
             finished_at timestamp with time zone,duration interval,role_name text,checksum text,version text}'))"""

_HISTORY = """
SELECT step, part, to_char(finished_at, 'YYYY-MM-DD HH24:MI:SSOF'), round(1000 * extract(epoch FROM duration)),
       role_name, version
FROM ONLY budget_engine.history WHERE {ours}
ORDER BY id DESC LIMIT 5"""

_APPLIED = """
SELECT DISTINCT ON (step) step, checksum FROM ONLY budget_engine.history
WHERE {ours} ORDER BY step, id DESC"""


@understood()
def read(connection: Connection, chain: Chain, found: Survey) -> Surroundings:
    """Look around the chain's tables; two messages at most, no lock but ACCESS SHARE on the history."""
    tables = literal(json.dumps({check.table: check.found for check in found.checks}, ensure_ascii=False))
    rows, has_history = connection.ask([query_of(DB / "unusual.sql").replace(":'tables'", tables), _HAS_HISTORY])
    ours = f"schema_name = ANY ({literal(found.turn.own)})"
    about_us = [_HISTORY.format(ours=ours), _APPLIED.format(ours=ours)]
    history, applied = connection.ask(about_us, "set_config('row_security', 'off', true)") if has_history else ([], [])
    checksums = {step.label: step.checksum for step in chain.steps}
    return Surroundings(
        unusual=tuple(Unusual(str(what), str(says), respelled(command or "")) for what, says, command in rows),
        history=tuple(Entry(*map(str, row)) for row in history),
        changed=tuple(str(step) for step, checksum in applied if checksums.get(str(step), checksum) != checksum),
    )
