"""The turn: who is the one to work on the tables of a schema, as SQL; the transaction, or the session, keeps it.

Advisory locks are of one database, and have numbers for names: what is done (RUN, BUILD), and the OID of a schema. A
run has for itself the schema in which new tables go, and those in which tables of the chain exist; the others of its
search_path it shares, for what is made there meanwhile would change what its names lead to. The SQL is for a
search_path of pg_catalog.
"""

from __future__ import annotations

from dataclasses import dataclass

from budget_engine.spelling import literal

RUN = int.from_bytes(b"budg", "big")  # the transactions of the steps
# And one builder: of two CREATE INDEX CONCURRENTLY on one table the second waits for the first one's lock, the first
# for the second one's snapshot: a deadlock. It is another lock, so that a build of an hour holds up no transaction.
BUILD = int.from_bytes(b"buil", "big")


@dataclass(frozen=True)
class Turn:
    """The turn of a run; path: the schemas of its search_path; own: those that it has for itself."""

    path: tuple[str, ...]
    own: tuple[str, ...]

    def taken(self, what: int, *, session: bool = False) -> str:
        """Expression that takes the turn, without waiting, if it is free, and tells whether it was.

        session: it lasts as long as the session, else as the transaction.
        """
        lock = f"pg_try_advisory_{'' if session else 'xact_'}lock"
        return f"""coalesce((
    SELECT bool_and(CASE WHEN {_among(self.own)} THEN {lock}({what}, oid::int4)
                         ELSE {lock}_shared({what}, oid::int4) END)
    FROM pg_namespace WHERE {_among(self.path)}), {lock}({what}, 0))"""

    def refused(self) -> str:
        """Condition on a lock of pg_locks: it keeps a run through this search_path from a turn."""
        return f"""locktype = 'advisory' AND objsubid = 2 AND classid = ANY ('{{{RUN},{BUILD}}}'::oid[]) AND objid IN (
    SELECT oid FROM pg_namespace WHERE {_among(self.path)} AND (mode = 'ExclusiveLock' OR {_among(self.own)}))"""


def released(what: int) -> str:
    """Expression that gives back what the session has of a turn: of a lock that it has not, the server's log warns."""
    return f"""(
    SELECT count(CASE mode WHEN 'ExclusiveLock' THEN pg_advisory_unlock({what}, objid::int4)
                           ELSE pg_advisory_unlock_shared({what}, objid::int4) END)
    FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory' AND objsubid = 2 AND classid = {what})"""


def being_built(tables: str) -> str:
    """Condition: a session of others builds an index, or validates a key, on one of these tables, an array in SQL."""
    return f"""EXISTS (
    SELECT FROM pg_locks WHERE locktype = 'relation' AND pg_locks.relation = ANY ({tables}) AND pid <> pg_backend_pid()
      AND mode = 'ShareUpdateExclusiveLock' AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND pid NOT IN (SELECT pid FROM pg_stat_progress_vacuum UNION ALL SELECT pid FROM pg_stat_progress_analyze))"""


def _among(names: tuple[str, ...]) -> str:
    return f"nspname = ANY ({literal(names)}::name[])"
