"""The traffic: how large the tables are that a plan touches, who is at them now, and what of theirs has to be kept.

It reads catalogs and statistics; of a table that somebody has locked against readers it asks nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from psycopg import sql

from scripts.database import Database, Rows
from scripts.errors import StatementError
from scripts.survey import Item
from scripts.watch import SESSION


@dataclass(frozen=True)
class Size:
    """Of a table that stands: rows as statistics estimate them (None: nobody counted yet), bytes with its indexes."""

    name: str
    rows: int | None
    size_bytes: int | None  # None: somebody has it locked


@dataclass(frozen=True)
class Bystander:
    """Another session that a plan's statement would wait for now; table: None where the session's age is the reason."""

    table: str | None
    mode: str
    granted: bool
    session: str

    @property
    def who(self) -> str:
        """The session, without what it does at this moment."""
        return self.session.partition(")")[0]


@dataclass(frozen=True)
class Kept:
    """Values that move out of the way; count: None where they could not be counted, then estimate is all there is."""

    column: str
    into: str
    count: int | None
    estimate: int | None


_LOCKED = """
EXISTS (SELECT FROM pg_locks WHERE relation = c.oid AND mode = 'AccessExclusiveLock' AND pid <> pg_backend_pid()
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""

_STANDING = f"""
SELECT name, format('%I.%I', n.nspname, c.relname),
       nullif(greatest(c.reltuples::bigint, s.n_live_tup, 0), CASE WHEN c.relpages = 0 THEN -1 ELSE 0 END),
       CASE WHEN NOT {_LOCKED} THEN pg_total_relation_size(c.oid) END
FROM unnest({{names}}) AS name
JOIN pg_class AS c  -- of a schema that is closed to us, to_regclass() raises
  ON c.oid = CASE WHEN name NOT LIKE '%.%' OR has_schema_privilege(to_regnamespace(split_part(name, '.', 1)), 'USAGE')
                  THEN to_regclass(name) END
JOIN pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_stat_all_tables AS s ON s.relid = c.oid
ORDER BY name"""

_BYSTANDERS = f"""
SELECT wanted.name, l.mode, l.granted, coalesce({SESSION}, 'a prepared transaction (see pg_prepared_xacts)')
FROM (VALUES {{wanted}}) AS wanted (name, modes)
JOIN pg_locks AS l ON l.relation = to_regclass(wanted.name) AND l.mode = ANY (wanted.modes)
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
ORDER BY wanted.name, a.xact_start, l.pid, l.mode"""

_READERS_OUT = f"""
SELECT l.relation::regclass, l.mode, l.granted, coalesce({SESSION}, 'a prepared transaction (see pg_prepared_xacts)')
FROM pg_locks AS l
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.relation IN (SELECT oid FROM pg_class WHERE relkind IN ('r', 'p'))
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
ORDER BY a.xact_start, l.pid, l.relation"""

_SNAPSHOTS = f"""
SELECT NULL, 'an old snapshot', 't', {SESSION}
FROM pg_stat_activity AS a
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_xmin IS NOT NULL
  AND a.xact_start < clock_timestamp() - interval '1 s' AND a.backend_type = 'client backend'
ORDER BY a.xact_start, a.pid"""

_KEPT = """
SELECT (SELECT min(name COLLATE "C")
        FROM (SELECT {column} || '_uuid' || suffix
              FROM unnest(ARRAY['', '_2', '_3', '_4', '_5', '_6', '_7', '_8', '_9']) AS suffix) AS free (name)
        WHERE to_regclass(format('%I.%I', n.nspname, format('idx_%s_%s', c.relname, name))) IS NULL
          AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = name)),
       round(greatest(c.reltuples, 0) * (1 - s.null_frac))
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_stats AS s ON s.schemaname = n.nspname AND s.tablename = c.relname AND s.attname = {column}
WHERE c.oid = to_regclass({table})"""


def standing(database: Database, names: Iterable[str]) -> dict[str, Size]:
    """Return those of the tables that stand, by the given names, and how large they are; no lock is waited for."""
    array = _array(names)
    return {
        str(name): Size(str(qualified), None if rows is None else int(rows), None if size is None else int(size))
        for name, qualified, rows, size in _ask(database, _STANDING.format(names=array))
    }


def bystanders(database: Database, wanted: Mapping[str, Collection[str]], *, building: bool) -> tuple[Bystander, ...]:
    """Return who holds, or waits for, such a lock on these tables; building: or has an old snapshot."""
    values = ", ".join(f"({_literal(name)}, {_array(modes)})" for name, modes in wanted.items())
    rows = _ask(database, _BYSTANDERS.format(wanted=values)) if wanted else []
    rows += _ask(database, _SNAPSHOTS) if building else []
    return tuple(Bystander(name, str(mode), granted == "t", str(who)) for name, mode, granted, who in rows)


def locking_readers_out(database: Database) -> tuple[Bystander, ...]:
    """Return who holds, or waits for, a lock that readers of a table wait for."""
    rows = _ask(database, _READERS_OUT)
    return tuple(Bystander(table, str(mode), granted == "t", str(who)) for table, mode, granted, who in rows)


def kept(database: Database, column: Item) -> Kept:
    """Say where the values of a column that gives way will be, and count them, in moments or not at all."""
    table, _, name = column.name.partition(".")
    [(into, estimate)] = _ask(database, _KEPT.format(table=_literal(table), column=_literal(name)))
    try:
        # A table that is locked against readers is not waited for; one that takes long to count is not counted.
        limits = [f"set_config('{limit}', '{value}', true)" for limit, value in _COUNTING.items()]
        [(count,)] = _ask(database, f"SELECT count({name}) FROM {table}", *limits)
    except StatementError:
        count = None
    return Kept(
        column.name, str(into), None if count is None else int(count), None if estimate is None else int(estimate)
    )


_COUNTING = {"lock_timeout": "1ms", "statement_timeout": "5s", "row_security": "off"}


def _ask(database: Database, query: str, *settings: str) -> Rows:
    [rows] = database.ask([query], *settings)
    return rows


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()


def _array(texts: Iterable[str]) -> str:
    return f"{sql.Literal(sorted(set(texts))).as_string()}::text[]"
