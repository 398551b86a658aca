"""The turn: who is the one to work on the tables of a schema, as SQL to be sent in a transaction, which keeps the turn.

Advisory locks are of one database, and have numbers for names: what is done (RUN, BUILD), and the OID of a schema. A
run has for itself the schema in which new tables go, and those in which tables of the chain exist; the others of its
search_path it shares, for what is made there meanwhile would change what its names lead to. The SQL is for a
search_path of pg_catalog.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from budget_engine.postgres.connection import Rows

RUN = int.from_bytes(b"budg", "big")  # the transactions of the steps
# And one builder: of two CREATE INDEX CONCURRENTLY on one table the second waits for the first one's lock, the first
# for the second one's snapshot: a deadlock. It is another lock, so that a build of an hour holds up no transaction.
BUILD = int.from_bytes(b"buil", "big")


@dataclass(frozen=True)
class Turn:
    """The turn of a run; path: the schemas of its search_path; own: those that it has for itself."""

    path: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def _schemas(self) -> str:
        return f"pg_namespace WHERE nspname = ANY ({_names(self.path)})"

    @property
    def _is_own(self) -> str:
        return f"nspname = ANY ({_names(self.own)})"

    def taken(self, what: int) -> str:
        """Expression that takes the turn, without waiting, if it is free, and tells whether it was."""
        return f"""coalesce((
    SELECT bool_and(CASE WHEN {self._is_own} THEN pg_try_advisory_xact_lock({what}, oid::int4)
                    ELSE pg_try_advisory_xact_lock_shared({what}, oid::int4) END)
    FROM {self._schemas}), pg_try_advisory_xact_lock({what}, 0))"""

    def numbers(self) -> str:
        """SELECT of the numbers of these locks, and whether each is for one run alone."""
        return f"SELECT oid::int4, {self._is_own} FROM {self._schemas}"

    def refused(self) -> str:
        """Condition on a lock of pg_locks: it keeps a run through this search_path from a turn."""
        return f"""locktype = 'advisory' AND objsubid = 2 AND classid = ANY ('{{{RUN},{BUILD}}}'::oid[]) AND objid IN (
    SELECT oid FROM {self._schemas} AND (mode = 'ExclusiveLock' OR {self._is_own}))"""


def taken_by_number(what: int, rows: Rows) -> str:
    """Expression that takes the turn as taken() does, without a look into the catalogs; rows: of numbers().

    For a transaction that stays: while it has looked into pg_class, VACUUM FULL of that waits, and everybody behind.
    """
    tries = [
        f"pg_try_advisory_xact_lock{'' if alone == 't' else '_shared'}({what}, '{number}'::int4)"
        for number, alone in rows
    ]
    return " AND ".join(tries) or f"pg_try_advisory_xact_lock({what}, 0)"


def _names(names: tuple[str, ...]) -> str:
    return f"{sql.Literal(list(names)).as_string()}::name[]"
