"""One connection, and messages of many statements over it: the only module that talks to PostgreSQL.

A message travels by the simple query protocol (PostgreSQL manual, "Protocol Flow", "Multiple Statements in a Simple
Query"): its statements run in order, after an error the rest is skipped. So the round trips are counted by messages.
With Citus it travels as a pipeline of the extended protocol, to the same effect.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, TypeVar

import psycopg
from psycopg import generators, pq, waiting
from psycopg.abc import PQGen
from psycopg.conninfo import make_conninfo
from psycopg.pq import DiagnosticField
from psycopg.waiting import Ready

from budget_engine import errors, libpq
from budget_engine.errors import StatementError
from budget_engine.settings import Settings, Target, mask
from budget_engine.spelling import literal, text_of, to_bytes

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from budget_engine.postgres.blockers import Watch

# What psycopg logs is for developers; users get our messages, and logging's last resort would print both.
logging.getLogger("psycopg").addHandler(logging.NullHandler())

_T = TypeVar("_T")
Row = tuple[str | None, ...]
Rows = list[Row]
OnDone = Callable[[int, Rows], None]  # which statement is done, and its rows
OnNotice = Callable[[str, str], None]  # SQLSTATE and message

_STATEMENT_TIMEOUT_S = 60  # for catalog work, instead of what the role brings along for its queries
_MOMENT_S = 0.1  # without an answer, after which a watcher may look around
_ANSWERS = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.FATAL_ERROR)
_OF_A_PIPELINE = (pq.ExecStatus.PIPELINE_SYNC, pq.ExecStatus.PIPELINE_ABORTED)  # its end; what an error leaves out
_MOST_MB = 256  # of memory; all that we ask for takes a few
_MOST_CHARACTERS = 10_000  # of each part of an error; those of a verification that finds much have that many
_PARTS = (  # of an error, as StatementError has them
    *(DiagnosticField.SQLSTATE, DiagnosticField.MESSAGE_PRIMARY, DiagnosticField.MESSAGE_DETAIL),
    *(DiagnosticField.MESSAGE_HINT, DiagnosticField.CONTEXT),
)
_IN_BYTES = ("SQL_ASCII", "EUC_JIS_2004")  # some characters of the latter are two of Unicode's, which no U&"" joins
_UNTRANSLATABLE = "22P05"  # a name holds what UTF8 has no character for
_CANCEL_S = 3.0  # how long a request to cancel may take to reach the server, and then its answer
# What each transaction of ours begins with: to compile queries as large as ours takes longer than to run them, and
# others wait for our locks meanwhile. (A SET is not planned, so that it is not compiled itself.)
BEGIN = ("BEGIN ISOLATION LEVEL READ COMMITTED", "SET LOCAL jit = off")
BEGIN_READ_ONLY = (f"{BEGIN[0]} READ ONLY", BEGIN[1])
# Of pg_settings: what a role or database tells the planner for its own queries, and makes ours slow (a hundred times,
# without index scans in large catalogs). Not a list, because each version has others; nor the category, which is
# translated. In full, as all that comes before the search_path is ours: it may have other schemas before pg_catalog.
MISGUIDING = """context OPERATOR(pg_catalog.=) 'user' AND setting OPERATOR(pg_catalog.<>) boot_val
AND name OPERATOR(pg_catalog.~) '^(enable_|geqo|min_parallel_)|_(cost|collapse_limit)$'"""
_AS_BUILT = f"""(SELECT pg_catalog.count(pg_catalog.set_config(name, boot_val, true))
  FROM pg_catalog.pg_settings WHERE {MISGUIDING})"""
# A pooler's other clients leave temporary tables in the session, which would be found first.
_OTHERS_LAST = """pg_catalog.set_config('search_path', pg_catalog.concat(pg_catalog.current_setting('search_path'),
  CASE WHEN pg_catalog.current_schema() IS NOT NULL THEN ', pg_temp' END), true)"""
# Where tables are looked for is noted; then no function, no operator of others is in reach.
PIN = """
SELECT pg_catalog.set_config('budget_engine.search_path', pg_catalog.current_setting('search_path'), true),
       pg_catalog.set_config('budget_engine.path',
                             pg_catalog.array_to_json(pg_catalog.array_remove(pg_catalog.current_schemas(false),
                               'pg_catalog'::pg_catalog.name))::pg_catalog.text, true),
       pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true)"""
# And back, for a query that names tables as users do.
UNPIN = "SELECT set_config('search_path', current_setting('budget_engine.search_path'), true)"
OLDEST_VERSION = 140000  # CREATE OR REPLACE TRIGGER and string_to_table came with PostgreSQL 14

# Of a login that fails, libpq keeps only words, no SQLSTATE. These are the server's, PgBouncer's, libpq's and psycopg's
# own; the first that fit decide, so that an answer counts for more than none. A server that speaks another language
# (lc_messages) is not understood: then the remedy is the one for all.
_REFUSALS: tuple[tuple[str, errors.Case], ...] = (
    (r'invalid "?\w+"? value: |invalid (port number|integer value)|bad value for \w+: ', errors.PARAMETER),
    (r'definition of service ".*" not found|service file ".*" not found|syntax error in service file', errors.SERVICE),
    ("password authentication failed|no password supplied|SASL authentication failed", errors.PASSWORD),
    (r'role ".*" (does not exist|is not permitted to log in)|no such user|user not found', errors.LOGIN),
    (r"pg_hba\.conf|authentication failed", errors.LOGIN),
    ('database ".*" does not exist|no such database', errors.NO_DATABASE),
    ("permission denied for database", errors.NOT_PERMITTED),
    ("too many (clients|connections)|connection slots are reserved|no more connections", errors.FULL_SERVER),
    ("the database system is", errors.NOT_READY),
    ("No space left on device", errors.NO_ROOM),
    ("out of (shared )?memory", errors.NO_MEMORY),
    ("unsupported startup parameter|(for|configuration) parameter", errors.STARTUP_OPTION),
    ("invalid response to SSL negotiation|expected authentication request", errors.NOT_POSTGRES),
    ("server closed the connection|SSL (SYSCALL|connection has)|reset by peer", errors.LOST_CONNECTION),
    ("SSL|sslmode|certificate", errors.TLS),
    ("resolve host (?!.*Servname)|translate host name|parse network address", errors.NO_SUCH_HOST),
    ("'idna' codec|label empty or too long", errors.NO_SUCH_HOST),  # Python's words, the latter 3.12's
    # No IPv4 address among those that were tried.
    (r"(?s)^(?!.*\(\d+(\.\d+){3}\)).*\([0-9a-f:]+\).*(unreachable|assign requested address|expired)", errors.NO_ROUTE),
    ("timeout expired|timed out|No route to host|unreachable", errors.SILENT_HOST),
    ("Connection refused|No such file or directory", errors.NOBODY_THERE),
)


class Connection:
    """A connection to the target. Raises UnreachableError where there is none to be had.

    answer_s: how long an answer may take (seconds); then the connection counts as gone. A pooler lets everybody in, and
    keeps waiting whom it has no server connection for: those that our own first one keeps, say. A tunnel may live on
    when what is behind it has gone.
    """

    def __init__(self, target: Target, settings: Settings, *, answer_s: float = _STATEMENT_TIMEOUT_S + 10) -> None:
        self._target, self.answer_s, self.lock_timeout_ms = target, answer_s, settings.lock_timeout_ms
        self._give_up = math.inf  # the moment at which nobody waits any longer: after Ctrl-C
        self._most_mb = _peak_mb() + _MOST_MB
        self.watch: Watch | None = None  # looks around while a message is on its way
        self.one_by_one = False  # each statement by itself: see _exchange
        defaults = {"application_name": "budget-engine-recipes", "connect_timeout": str(settings.connect_timeout_s)}
        self._conninfo = defaults | target.conninfo
        if self._conninfo.get("sslrootcert") == "system":
            libpq.find_certificates()
        try:
            self._connect(in_bytes=False)
        except (psycopg.Error, UnicodeError) as error:  # UnicodeError: of what can be no host's name
            words = str(error)
            where = mask(words.strip(), target.secrets).replace("\t", "")  # libpq's, before a question
            cause = _cause(words)
            case = cause if cause.exit_code == errors.PARAMETER.exit_code else errors.NO_CONNECTION
            refused = case(target=target.display, where=where, remedy=cause.remedy)
            refused.cause = cause
            raise refused from None
        if self._connection.info.server_version < OLDEST_VERSION:
            version = self._connection.info.parameter_status("server_version")
            self.close()
            raise errors.TOO_OLD(target=target.display, where=f"the server is PostgreSQL {version}")
        self.backend_pid = self._connection.info.backend_pid  # a pooler's, if there is one
        self.is_encrypted = bool(self._connection.pgconn.ssl_in_use)

    def _connect(self, *, in_bytes: bool) -> None:
        """Log in; in_bytes: as somebody for whom the server converts nothing, where it cannot, or not both ways."""
        conninfo = make_conninfo(**self._conninfo | {"client_encoding": "SQL_ASCII" if in_bytes else "UTF8"})
        self._in_bytes = in_bytes
        try:
            self._connection = psycopg.connect(conninfo, autocommit=True, prepare_threshold=None)
        except psycopg.OperationalError as error:
            if in_bytes or "UTF8" not in str(error):
                raise
            self._connect(in_bytes=True)
            return
        if not in_bytes and self._connection.info.parameter_status("server_encoding") in _IN_BYTES:
            self.close()
            self._connect(in_bytes=True)

    @property
    def host(self) -> str:
        """The host that answered, with its port where it is another than usual; of a socket the folder."""
        info = self._connection.info
        host = self._host
        host = f"[{host}]" if ":" in host else host
        return host if info.port == 5432 or host.startswith(("/", "@")) else f"{host}:{info.port}"

    @property
    def is_near(self) -> bool:
        """Whether the server is on this machine, for all that its name says: a tunnel leads elsewhere."""
        host, address = self._host, self._connection.info.hostaddr
        return host.startswith(("/", "@")) or all(_is_loopback(name) for name in (host, address))

    @property
    def _host(self) -> str:
        return self._connection.pgconn.host.decode(errors="replace")

    @property
    def is_exposed(self) -> bool:
        """Whether a password was asked for, and sent in whatever form where others may listen."""
        return bool(self._connection.pgconn.used_password and not self.is_encrypted and not self.is_near)

    @property
    def sslmode(self) -> str:
        """What libpq was told about TLS: in the URL, by PGSSLMODE, by a service."""
        options = {option.keyword: option.val for option in self._connection.pgconn.info}
        return (options[b"sslmode"] or b"").decode()

    @property
    def transaction_settings(self) -> str:
        """SELECT list that makes our settings hold for this transaction."""
        return transaction_settings(self._target, self.lock_timeout_ms)

    @contextmanager
    def notices(self, handler: OnNotice) -> Iterator[None]:
        """Call the handler with each notice as it arrives."""

        def said(result: pq.abc.PGresult) -> None:
            handler(*(self._said(result, one) for one in (DiagnosticField.SQLSTATE, DiagnosticField.MESSAGE_PRIMARY)))

        pgconn = self._connection.pgconn
        before, pgconn.notice_handler = pgconn.notice_handler, said
        try:
            yield
        finally:
            pgconn.notice_handler = before

    def run(
        self,
        statements: Sequence[str],
        on_done: OnDone = lambda index, rows: None,
        *,
        answer_s: float | None = None,
    ) -> list[Rows]:
        """Send the statements as one message; return the rows of each; tell on_done as each is done.

        answer_s: how long each answer may take, where not as long as any. Raises StatementError, after rolling back a
        transaction that the message left open; KeyboardInterrupt, after cancelling the statement that was running.
        """
        answer_s = self.answer_s if answer_s is None else answer_s
        rows: list[Rows] = []
        failure: StatementError | None = None
        with self._cancelled_by_ctrl_c(), self.watch or nullcontext():
            try:
                for result in self._answers(statements, answer_s):
                    if result.status == pq.ExecStatus.FATAL_ERROR:
                        failure = self._refused(len(rows), result)
                    else:
                        rows.append(self._rows(result))
                        on_done(len(rows) - 1, rows[-1])
            except psycopg.Error as error:  # the connection is gone
                failure = failure or StatementError(len(rows), error.sqlstate, short(str(error).strip()))
            if failure is not None:
                if self._connection.pgconn.transaction_status == pq.TransactionStatus.INERROR:
                    with suppress(psycopg.OperationalError):
                        list(self._exchange(["ROLLBACK"], self.answer_s))
                raise failure
        return rows

    def ask(self, queries: Sequence[str], *settings: str, answer_s: float | None = None) -> list[Rows]:
        """Send the queries as one message, a transaction that writes nothing; return the rows of each.

        They are for a search_path of pg_catalog (see PIN): tables are named in full.
        settings: what is to hold for it beside our own, as SELECT lists. Waits, and raises, as run() does.
        """
        begun = [*BEGIN_READ_ONLY, f"SELECT {self.transaction_settings}", PIN, *(f"SELECT {one}" for one in settings)]
        return self.read([*begun, *queries, "COMMIT"], answer_s=answer_s)[len(begun) : -1]

    def read(self, statements: Sequence[str], *, answer_s: float | None = None) -> list[Rows]:
        """As run(), of what writes nothing: in a new session where what was found has no characters in UTF8."""
        try:
            return self.run(statements, answer_s=answer_s)
        except StatementError as error:
            if error.sqlstate != _UNTRANSLATABLE or self._in_bytes:
                raise
        self.close()
        self._connect(in_bytes=True)
        return self.run(statements, answer_s=answer_s)

    @contextmanager
    def _cancelled_by_ctrl_c(self) -> Iterator[None]:
        """Cancel on the server, and raise KeyboardInterrupt when the message has ended, or been given up.

        Python's own handler raises wherever it finds us; in the callback of a notice the exception would be lost. It is
        given up where no answer comes, or when pressed once more: the server may go on.
        """
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else's, or ignored
            yield
            return
        pressed = False

        def cancel(*_: object) -> None:
            nonlocal pressed
            if pressed:
                self._give_up = 0
                return
            pressed = True
            with suppress(psycopg.Error):  # no way to the server
                self._connection.cancel_safe(timeout=_CANCEL_S)
            self._give_up = min(self._give_up, time.monotonic() + _CANCEL_S)
            if self.watch and self.watch.looks:
                raise KeyboardInterrupt  # it leaves off

        signal.signal(signal.SIGINT, cancel)
        try:
            yield
        except StatementError:
            if not pressed:
                raise
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            raise KeyboardInterrupt(*[errors.GIVEN_UP] if self._connection.closed else [])

    def close(self) -> None:
        """End the session."""
        self._connection.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _answers(self, statements: Sequence[str], answer_s: float) -> Iterator[pq.abc.PGresult]:
        """Yield an answer to each statement, the last one perhaps an error."""
        number, errors_seen = 0, 0
        for result in self._exchange(statements, answer_s):
            if result.status in _OF_A_PIPELINE:
                continue
            is_error = result.status == pq.ExecStatus.FATAL_ERROR
            number, errors_seen = number + (not is_error), errors_seen + is_error
            # Of two errors the second one says that the connection is gone.
            if result.status not in _ANSWERS or number > len(statements) or errors_seen > 2:
                raise self._otherwise(f"there is no such answer to a query ({pq.ExecStatus(result.status).name})")
            yield result
        if number < len(statements) and not errors_seen:
            raise self._otherwise(f"of {len(statements)} statements it answered {number}")

    def _otherwise(self, how: str) -> errors.RecipeError:
        self.close()  # it might go on
        return errors.OTHERWISE(how=how)

    def _exchange(self, statements: Sequence[str], answer_s: float) -> Iterator[pq.abc.PGresult]:
        """Send one message, and yield its answers.

        In a message of several statements none is at the top level for Citus, which then distributes no new table, and
        sends the whole message on as if it were one statement (citus, utility_hook.c; its issue 6608). As a pipeline of
        the extended protocol they travel, and fail, just so, and each is by itself.
        """
        pgconn = self._connection.pgconn
        if not self.one_by_one or len(statements) == 1:
            pgconn.send_query(to_bytes(";\n".join(statements)))
            self._wait(generators.send(pgconn), answer_s)
            while (result := self._wait(generators.fetch(pgconn), answer_s)) is not None:
                yield result
            return
        pgconn.enter_pipeline_mode()
        for statement in statements:
            pgconn.send_query_params(to_bytes(statement), None)
        pgconn.pipeline_sync()
        self._wait(generators.send(pgconn), answer_s)
        status = None
        while status != pq.ExecStatus.PIPELINE_SYNC:
            if (result := self._wait(generators.fetch(pgconn), answer_s)) is not None:
                status = result.status
                yield result
        pgconn.exit_pipeline_mode()

    def _rows(self, result: pq.abc.PGresult) -> Rows:
        def text(row: int, column: int) -> str | None:
            value = result.get_value(row, column)
            return None if value is None else text_of(value, in_bytes=self._in_bytes)

        return [tuple(text(row, column) for column in range(result.nfields)) for row in range(result.ntuples)]

    def _refused(self, index: int, result: pq.abc.PGresult) -> StatementError:
        sqlstate, message, detail, hint, context = (self._said(result, part) for part in _PARTS)
        message = message or short(result.get_error_message())  # libpq's own: the connection is gone
        return StatementError(index, sqlstate or None, message, detail, hint, context)

    def _said(self, result: pq.abc.PGresult, field: DiagnosticField) -> str:
        return short(text_of(result.error_field(field) or b"", in_bytes=self._in_bytes))

    def _wait(self, generator: PQGen[_T], answer_s: float) -> _T:
        """Wait as psycopg does, who would answer Ctrl-C by waiting on; what has not come by then does not count."""
        # A watcher has to see who holds it before the wait for the lock is over.
        moment_s = min(_MOMENT_S, self.lock_timeout_ms / 10_000)
        limited = self._limited(generator, time.monotonic() + answer_s)
        return waiting.wait(limited, self._connection.pgconn.socket, moment_s)

    def _limited(self, generator: PQGen[_T], deadline: float) -> PQGen[_T]:
        """Tell the watch of moments in which nothing came; raise at the deadline."""
        try:
            wanted = next(generator)
            while True:
                ready = yield wanted
                if self.watch is not None and self._give_up == math.inf:
                    self.watch.idle() if ready == Ready.NONE else self.watch.answered()
                if time.monotonic() > min(deadline, self._give_up):
                    self.close()
                    raise psycopg.OperationalError("no answer came in time")
                if _peak_mb() > self._most_mb:
                    raise self._otherwise(f"more than {_MOST_MB} MB for what takes a few kB")
                wanted = generator.send(ready)
        except StopIteration as done:
            result: _T = done.value
            return result


def transaction_settings(target: Target, lock_timeout_ms: int) -> str:
    """SELECT list that makes settings hold for one transaction: through a pooler the next may be elsewhere."""
    settings = {
        "lock_timeout": f"{lock_timeout_ms}ms",
        "statement_timeout": f"{_STATEMENT_TIMEOUT_S}s",
        "quote_all_identifiers": "off",  # definitions are compared as PostgreSQL prints them by itself
    }
    if target.search_path is not None:
        settings["search_path"] = target.search_path
    ours = [f"pg_catalog.set_config('{name}', {literal(value)}, true)" for name, value in settings.items()]
    return ", ".join([*ours, _OTHERS_LAST, _AS_BUILT])


def _is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _cause(words: str) -> errors.Case:
    """Return what a login that failed with these words stands for."""
    return next((case for phrases, case in _REFUSALS if re.search(phrases, words)), errors.NO_CONNECTION)


def short(words: str) -> str:
    """Return what the server says, or where it goes on and on the beginning."""
    return words if len(words) <= _MOST_CHARACTERS else words[:_MOST_CHARACTERS] + " …"


@contextmanager
def understood() -> Iterator[None]:
    """Around what reads rows: raise where they have another shape than was asked for."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise errors.OTHERWISE(how=f"{type(error).__name__}: {short(str(error))}") from error


def _peak_mb() -> float:
    """How much memory this process has had at most."""
    if sys.platform == "win32":
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
