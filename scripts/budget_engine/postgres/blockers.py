"""The blockers: who holds, or will hold up, what we wait for; how large the tables are that this is about.

The watch is a second connection that looks, while a statement keeps the first one waiting, at what it waits for.

PostgreSQL itself says who holds a lock (manual, "System Information Functions", pg_blocking_pids) and how far an index
build has come (manual, "CREATE INDEX Progress Reporting"). Each look is a transaction of its own that ends at once: an
concurrent build would wait for one that stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from budget_engine import errors
from budget_engine.errors import StatementError
from budget_engine.postgres.connection import Connection, understood
from budget_engine.spelling import literal

_FIRST_LOOK_S = 1.0  # of silence: a statement is waiting, or has much to do; sooner where it gives up sooner
_LONGEST_PAUSE_S = 1.0  # between two looks; they begin close together


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
        return _who(self.session)


# Through a pooler nobody knows which server process is ours: then it is any that has our name.
_MINE = """
WITH ours AS (
  SELECT pid FROM pg_stat_activity
  WHERE application_name = current_setting('application_name') AND datname = current_database()
    AND pid <> pg_backend_pid()
), mine AS (
  SELECT pid FROM ours WHERE pid = {pid} OR NOT EXISTS (SELECT FROM ours AS o WHERE o.pid = {pid})
)"""

# a: a row of pg_stat_activity, or none; of other roles' sessions some columns are NULL for most of us. What they do is
# quoted up to its first value: what we say is read in the logs of a CI.
SESSION = """
       CASE WHEN a.pid IS NOT NULL THEN
       format('pid %s (role %s, application %s) is %s%s, its transaction open for %s s: %s',
              a.pid, a.usename, quote_literal(a.application_name), coalesce(a.state, a.backend_type, 'busy'),
              CASE WHEN a.wait_event_type = 'Lock' THEN ' and waits itself' ELSE '' END,
              coalesce(round(extract(epoch FROM clock_timestamp() - a.xact_start))::text, '?'),
              left(regexp_replace(regexp_replace(a.query, '(''|[$](?![0-9])).*', '...'), '[[:space:]]+', ' ', 'g'), 80))
       END"""

# l: a row of pg_locks without a process
_PREPARED = """
       (SELECT format('prepared transaction %s (role %s) has waited %s s for COMMIT PREPARED or ROLLBACK PREPARED',
                      quote_literal(p.gid), p.owner, round(extract(epoch FROM clock_timestamp() - p.prepared)))
        FROM pg_prepared_xacts AS p
        JOIN pg_locks AS own ON own.transactionid = p.transaction AND own.pid IS NULL
        WHERE l.pid IS NULL AND own.virtualtransaction = l.virtualtransaction)"""

_WAITS = (
    _MINE
    + f"""
SELECT coalesce(wanted.mode || ' on ' || wanted.relation::regclass, 'a transaction to end'),
       coalesce(
         {SESSION},
         (SELECT string_agg(DISTINCT {_PREPARED}, '; ')
          FROM pg_locks AS l
          WHERE blocker.pid = 0 AND l.pid IS NULL
            AND (l.relation = wanted.relation OR l.transactionid = wanted.transactionid)),  -- a build waits for its end
         format('pid %s', blocker.pid))
FROM mine
JOIN pg_locks AS wanted ON wanted.pid = mine.pid AND NOT wanted.granted
CROSS JOIN LATERAL (SELECT DISTINCT unnest(pg_blocking_pids(mine.pid))) AS blocker (pid)
LEFT JOIN pg_stat_activity AS a ON a.pid = blocker.pid
ORDER BY a.xact_start, blocker.pid"""
)

_PROGRESS = (
    _MINE
    + """
SELECT format('%s: %s%s', relid::regclass, phase, coalesce(format(', %s %%', floor(100 * coalesce(
         nullif(blocks_done, 0)::float8 / nullif(blocks_total, 0),
         nullif(tuples_done, 0)::float8 / nullif(tuples_total, 0)))), ''))
FROM pg_stat_progress_create_index JOIN mine USING (pid)"""
)

_AT_WORK = f"""
SELECT coalesce({SESSION}, {_PREPARED})
FROM (
  SELECT DISTINCT pid, virtualtransaction FROM pg_locks
  WHERE granted AND pid IS DISTINCT FROM pg_backend_pid()
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND ({{refused}}
         OR locktype = 'relation' AND mode = 'ShareUpdateExclusiveLock'
            AND relation IN (SELECT to_regclass(name)::oid FROM unnest({{tables}}) AS name))
) AS l
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
ORDER BY a.xact_start, l.pid"""


# Of a schema that is closed to us, to_regclass() raises.
_NAMED = """(CASE WHEN has_schema_privilege(to_regnamespace(quote_ident((parse_ident(found))[1])), 'USAGE')
                  THEN to_regclass(found) END)"""

_SIZES = f"""
SELECT name, format('%I.%I', n.nspname, c.relname),
       nullif(greatest(c.reltuples::bigint, s.n_live_tup, 0), CASE WHEN c.relpages = 0 THEN -1 ELSE 0 END),
       CASE WHEN NOT EXISTS (
         SELECT FROM pg_locks WHERE relation = c.oid AND mode = 'AccessExclusiveLock' AND pid <> pg_backend_pid()
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
       THEN pg_total_relation_size(c.oid) END
FROM (VALUES {{values}}) AS these (name, found)
JOIN pg_class AS c ON c.oid = {_NAMED}
JOIN pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_stat_all_tables AS s ON s.relid = c.oid
ORDER BY name"""

# wanted: tables, and the modes of others' locks on them that matter
_BYSTANDERS = f"""
SELECT wanted.name, l.mode, l.granted, coalesce({SESSION}, {_PREPARED}, 'a session that is gone')
FROM ({{wanted}}) AS wanted (name, relation, modes)
JOIN pg_locks AS l ON l.relation = wanted.relation AND l.mode = ANY (wanted.modes)
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
ORDER BY wanted.name, a.xact_start, l.pid, l.mode"""
_THESE = f"SELECT name, {_NAMED}, modes FROM (VALUES {{values}}) AS these (name, found, modes)"
_ALL = "SELECT oid::regclass::text, oid, ARRAY['AccessExclusiveLock'] FROM pg_class WHERE relkind IN ('r', 'p')"

_SNAPSHOTS = f"""
SELECT NULL, 'an old snapshot', 't', {SESSION}
FROM pg_stat_activity AS a
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_xmin IS NOT NULL
  AND a.xact_start < clock_timestamp() - interval '1 s' AND a.backend_type = 'client backend'
ORDER BY a.xact_start, a.pid"""


@understood()
def at_work(connection: Connection, refused: str, tables: Iterable[str]) -> list[str]:
    """Say which other sessions keep us from our turn, or build something on one of these tables.

    refused: the condition on a lock of pg_locks that does (see migration.turn).
    """
    [rows] = connection.ask([_AT_WORK.format(refused=refused, tables=_array(tables))])
    return [str(who) for (who,) in rows]


class Watch:
    """Looks for one Connection while a message of that one waits; tells each session that holds it up once.

    open_second: opens the second connection; it is opened at the first look that is due, if ever. tell: takes a line;
    lasting: it stays, the others are replaced by the next one ("": by none). early: whether the first look comes before
    a wait for a lock is given up, though a far server's silence may be no wait at all.
    """

    def __init__(
        self, connection: Connection, open_second: Callable[[], Connection], tell: Callable[..., None], *, early: bool
    ) -> None:
        self._tell, self._pid, self._open_second = tell, connection.backend_pid, open_second
        self.looks = False  # at this moment: then Ctrl-C ends that
        self._first_look_s = min(_FIRST_LOOK_S, connection.lock_timeout_ms / 4000) if early else _FIRST_LOOK_S
        self._second: Connection | None = None
        self._next_look = self._pause_s = 0.0
        self._holders: tuple[str, ...] = ()

    def __enter__(self) -> None:
        """Begin to look: a message goes out."""
        self._holders = ()
        self.answered()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Leave off: the message has been answered; say in an error who was seen to hold the lock."""
        if isinstance(error, StatementError):
            error.holders = self._holders
        self._tell("", lasting=False)

    def answered(self) -> None:
        """Begin to count the silence anew: something has come back."""
        self._pause_s = self._first_look_s
        self._next_look = time.monotonic() + self._pause_s

    def idle(self) -> None:
        """Take a look, if it is time to: nothing has come back yet."""
        if (began := time.monotonic()) < self._next_look:
            return
        try:
            self.looks = True
            self._look()
        except (errors.UnreachableError, StatementError) as error:
            self._holders = (f"(who holds the lock could not be asked: {error})",)
            self.close()
        except KeyboardInterrupt:
            self.close()
        finally:
            self.looks = False
        ended = time.monotonic()
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._next_look = ended + max(self._pause_s, ended - began)

    def close(self) -> None:
        """End the second session, if there is one; the next look would open another."""
        if self._second is not None:
            self._second.close()
            self._second = None

    def _look(self) -> None:
        if self._second is None:
            self._second = self._open_second()
        pid = str(self._pid)
        waits, progress = self._second.ask([_WAITS.format(pid=pid), _PROGRESS.format(pid=pid)])
        seen = {_who(holder) for holder in self._holders}
        self._holders = tuple(dict.fromkeys(str(holder) for _, holder in waits)) or self._holders
        for wanted, holder in waits:
            if _who(str(holder)) not in seen:
                self._tell(f"for {wanted}: {holder}", lasting=True)
        for (line,) in progress:
            self._tell(str(line), lasting=False)


def _who(session: str) -> str:
    """Return the session, without what it does at this moment."""
    return session.partition(")")[0]


@understood()
def sizes(connection: Connection, tables: Mapping[str, str]) -> dict[str, Size]:
    """Return how large those of the tables are that stand, by the given names; no lock is waited for.

    tables: as SQL writes each in full, by its name.
    """
    values = ", ".join(f"({literal(name)}, {literal(found)})" for name, found in tables.items())
    [rows] = connection.ask([_SIZES.format(values=values)]) if tables else [[]]
    return {
        str(name): Size(str(qualified), None if rows is None else int(rows), None if size is None else int(size))
        for name, qualified, rows, size in rows
    }


def bystanders(
    connection: Connection, wanted: Mapping[str, Collection[str]], found: Mapping[str, str], *, building: bool
) -> tuple[Bystander, ...]:
    """Return who holds, or waits for, such a lock on these tables; building: or has an old snapshot.

    found: as SQL writes the tables in full.
    """
    these = ((name, found.get(name, name), modes) for name, modes in wanted.items())
    values = ", ".join(f"({literal(name)}, {literal(full)}, {_array(modes)})" for name, full, modes in these)
    queries = [_BYSTANDERS.format(wanted=_THESE.format(values=values))] if wanted else []
    return _bystanders(connection, [*queries, *([_SNAPSHOTS] if building else [])])


def locking_readers_out(connection: Connection) -> tuple[Bystander, ...]:
    """Return who holds, or waits for, a lock that readers of a table wait for."""
    return _bystanders(connection, [_BYSTANDERS.format(wanted=_ALL)])


@understood()
def _bystanders(connection: Connection, queries: list[str]) -> tuple[Bystander, ...]:
    found = [row for rows in (connection.ask(queries) if queries else []) for row in rows]
    return tuple(Bystander(table, str(mode), granted == "t", str(who)) for table, mode, granted, who in found)


def _array(texts: Iterable[str]) -> str:
    return f"{literal(sorted(set(texts)))}::text[]"
