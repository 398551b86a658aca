"""The watch: a second connection that looks, while a statement keeps the first one waiting, at what it waits for.

PostgreSQL itself says who is in the way (manual, "System Information Functions", pg_blocking_pids) and how far an index
build has come (manual, "CREATE INDEX Progress Reporting"). Each look is a transaction of its own that ends at once: an
online build would wait for one that stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from psycopg import sql

from scripts import errors, turn
from scripts.console import CONSOLE
from scripts.database import Database

_FIRST_LOOK_S = 1.0  # of silence: a statement is waiting, or has much to do; sooner where it gives up sooner
_LONGEST_PAUSE_S = 1.0  # between two looks; they begin close together

# Through a pooler nobody knows which server process is ours: then it is any that bears our name.
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

_WAITS = (
    _MINE
    + f"""
SELECT coalesce(wanted.mode || ' on ' || wanted.relation::regclass, 'a transaction to end'),
       coalesce(
         {SESSION},
         (SELECT string_agg(format('prepared transaction %s (role %s), prepared %s s ago: COMMIT PREPARED or ROLLBACK '
                                   'PREPARED ends it', quote_literal(p.gid), p.owner,
                                   round(extract(epoch FROM clock_timestamp() - p.prepared))), E'\\n')
          FROM pg_prepared_xacts AS p
          JOIN pg_locks AS own ON own.transactionid = p.transaction AND own.pid IS NULL
          JOIN pg_locks AS l ON l.virtualtransaction = own.virtualtransaction AND l.pid IS NULL
          WHERE blocker.pid = 0
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
SELECT {SESSION}
FROM pg_stat_activity AS a
WHERE a.pid <> pg_backend_pid() AND a.pid IN (
  SELECT pid FROM pg_locks
  WHERE granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (locktype = 'relation' AND mode = 'ShareUpdateExclusiveLock' AND relation IN ({{tables}}) OR {{turn}}))
ORDER BY a.xact_start, a.pid"""


def at_work(database: Database, tables: Sequence[str]) -> list[str]:
    """Say which other sessions have a turn that keeps us from ours, or build something on one of these tables."""
    of_tables = ", ".join(f"to_regclass({sql.Literal(table).as_string()})" for table in tables)
    [rows] = database.ask([_AT_WORK.format(tables=of_tables, turn=turn.refused(tables))])
    return [str(who) for (who,) in rows]


class Watch:
    """Looks for one Database while that one waits; tells each thing that is in the way once.

    open_second: opens the second connection; it is opened at the first look that is due, if ever. early: whether the
    first look comes before a wait for a lock is given up, though a far server's silence may be no wait at all.
    """

    def __init__(self, database: Database, open_second: Callable[[], Database], *, early: bool = True) -> None:
        self.early = early
        self._pid, self._open_second = database.backend_pid, open_second
        self._first_look_s = min(_FIRST_LOOK_S, database.lock_timeout_ms / 4000)
        self._second: Database | None = None
        self._next_look = self._pause_s = 0.0
        self.holders: tuple[str, ...] = ()

    def begin(self) -> None:
        """Begin to look: a message goes out."""
        self.holders = ()
        self.answered()

    def answered(self) -> None:
        """Begin to count the silence anew: something has come back."""
        self._pause_s = self._first_look_s if self.early else _FIRST_LOOK_S
        self._next_look = time.monotonic() + self._pause_s

    def idle(self) -> None:
        """Take a look, if it is time to: nothing has come back yet."""
        if time.monotonic() < self._next_look:
            return
        began = time.monotonic()
        try:
            self._look()
        except (errors.UnreachableError, errors.StatementError) as error:
            self.holders = (f"(who is in the way could not be asked: {error})",)
            self.close()
        ended = time.monotonic()
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._next_look = ended + max(self._pause_s, ended - began)

    def end(self) -> None:
        """Leave off: the message has been answered."""
        CONSOLE.progress("")

    def close(self) -> None:
        """End the second session, if there is one; the next look would open another."""
        if self._second is not None:
            self._second.close()
            self._second = None

    def _look(self) -> None:
        if self._second is None:
            self._second = self._open_second()
        pid = sql.Literal(self._pid).as_string()
        waits, progress = self._second.ask([_WAITS.format(pid=pid), _PROGRESS.format(pid=pid)])
        self._tell([(str(wanted), str(holder)) for wanted, holder in waits])
        for (line,) in progress:
            CONSOLE.progress(f"building  {line}")

    def _tell(self, waits: list[tuple[str, str]]) -> None:
        seen = {_who(holder) for holder in self.holders}
        self.holders = tuple(dict.fromkeys([holder for _, holder in waits])) or self.holders
        for wanted, holder in waits:
            if _who(holder) not in seen:
                CONSOLE.say(f"waiting   for {wanted}: {holder}")


def _who(holder: str) -> str:
    return holder.partition(")")[0]
