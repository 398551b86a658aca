"""The turn: who is the one to work on the tables of a schema, as SQL to be sent in a transaction, which keeps the turn.

Advisory locks are of one database, and have numbers for names: what is done (RUN, BUILD), and the OID of a schema. A
run has for itself the schema in which new tables go, and those in which tables of the chain stand; the others of its
search_path it shares, for what is made there meanwhile would change what its names lead to.
"""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import sql

from scripts.database import Rows

RUN = int.from_bytes(b"budg", "big")  # the transactions of the steps
# And one builder: of two CREATE INDEX CONCURRENTLY on one table the second waits for the first one's lock, the first
# for the second one's snapshot: a deadlock. It is another lock, so that a build of an hour holds up no atomic part.
BUILD = int.from_bytes(b"buil", "big")

_SCHEMAS = "pg_namespace AS n WHERE n.nspname = ANY (current_schemas(false))"


def homes(tables: Iterable[str]) -> str:
    """SELECT of the OIDs of the schemas in which these tables stand, as the search_path leads to them."""
    found = ", ".join(f"to_regclass({sql.Literal(table).as_string()})" for table in tables)
    return f"SELECT relnamespace FROM pg_class WHERE oid = ANY (ARRAY[{found}]::oid[])"


def taken(what: int, tables: Iterable[str]) -> str:
    """Expression that takes the turn, without waiting, if it is free, and tells whether it was."""
    return f"""coalesce((
    SELECT bool_and(CASE WHEN {own(tables)} THEN pg_try_advisory_xact_lock({what}, n.oid::int4)
                    ELSE pg_try_advisory_xact_lock_shared({what}, n.oid::int4) END)
    FROM {_SCHEMAS}), pg_try_advisory_xact_lock({what}, 0))"""


def numbers(tables: Iterable[str]) -> str:
    """SELECT of the numbers of these locks, and whether each is for one run alone."""
    return f"SELECT n.oid::int4, {own(tables)} FROM {_SCHEMAS}"


def taken_by_number(what: int, rows: Rows) -> str:
    """Expression that takes the turn as taken() does, without a look into the catalogs; rows: of numbers().

    For a transaction that stays: while it has looked into pg_class, VACUUM FULL of that waits, and everybody behind.
    """
    tries = [
        f"pg_try_advisory_xact_lock{'' if alone == 't' else '_shared'}({what}, '{number}'::int4)"
        for number, alone in rows
    ]
    return " AND ".join(tries) or f"pg_try_advisory_xact_lock({what}, 0)"


def refused(tables: Iterable[str]) -> str:
    """Condition on a lock of pg_locks: it keeps a run through this search_path from a turn."""
    return f"""locktype = 'advisory' AND objsubid = 2 AND classid = ANY ('{{{RUN},{BUILD}}}'::oid[]) AND objid IN (
    SELECT n.oid FROM {_SCHEMAS} AND (mode = 'ExclusiveLock' OR {own(tables)}))"""


def own(tables: Iterable[str]) -> str:
    """Condition on a schema n of pg_namespace: tables of ours stand in it, or new ones would."""
    return f"(n.nspname = current_schema() OR n.oid IN ({homes(tables)}))"
