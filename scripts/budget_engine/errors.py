"""Every way in which a recipe can end badly: its message, its exit code, and what helps (docs/troubleshooting.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from budget_engine.spelling import lines


class RecipeError(Exception):
    """A failure that was foreseen: printed as a message, never as a traceback.

    what: the message; where: what it concerns, in lines; remedy: the command or edit that helps; before: lines to print
    before it; cause: of a login that failed, what it stands for.
    """

    cause: Case | None = None

    def __init__(self, case: Case, what: str, where: str, remedy: str, before: Sequence[str]) -> None:
        self.case, self.exit_code = case, case.exit_code
        self.what, self.where, self.remedy, self.before = what, where, remedy, before
        super().__init__(what)


class SettingsError(RecipeError):
    """Exit code 3."""


class UnreachableError(RecipeError):
    """Exit code 4."""


class LockTimeoutError(RecipeError):
    """Exit code 7."""


@dataclass(frozen=True)
class Case:
    """A way to end; says: what is wrong, one sentence, with places for the facts (empty: the server says it).

    remedy: what helps in all its cases.
    """

    exit_code: int
    says: str = ""
    remedy: str = ""

    @property
    def in_a_step(self) -> str:
        """What is said where the server refuses a statement of a step."""
        return f"{{step}} {'got no lock' if self.exit_code == 7 else 'failed'} in {{part}}: {{words}}"

    def __call__(
        self,
        *,
        what: str = "",
        where: str | Sequence[str] = "",
        remedy: str = "",
        before: Sequence[str] = (),
        **facts: object,
    ) -> RecipeError:
        """Make the error; what, remedy: instead of the usual ones; facts: what the places stand for.

        where: its lines, or a text that breaks where we broke it.
        """
        kind = {3: SettingsError, 4: UnreachableError, 7: LockTimeoutError}.get(self.exit_code, RecipeError)
        where = where if isinstance(where, str) else lines(filter(None, where))
        helps = remedy or self.remedy.format(**{name: lines([str(fact)]) for name, fact in facts.items()})
        return kind(self, what or self.says.format(**facts), where, helps, before)


# fmt: off
# ── 1: a step ────────────────────────────────────────────────────────────────────────────────────────────────────────

STEP_FAILED = Case(1, "", "Correct what the server names, then run the task again: it goes on from what exists.")
BROKEN_STEP = Case(1, "the step ran, but its checks do not pass",
    "It was rolled back. Look for event triggers that undo such work; else report it, with these lines.")
# A table that somebody's function or trigger names is not where they look for it.
TABLE_GONE = Case(1, "", "Where is that table? If in another schema, name that one in DATABASE_URL (?schema=…).")
ENDED_STATEMENT = Case(1, "",
    "A limit (statement_timeout, transaction_timeout) or an administrator ended it: run the task again when the "
    "server is less busy; it finishes what is left.")
# Another transaction's work, or a standby's replay, came in between.
CONCURRENT_CHANGE = Case(1, "", "What came in between is done: run the task again (on a standby, or on its primary).")
# The server lacks a feature, or a pooler's other clients left something in the session.
UNSUPPORTED = Case(1, "",
    "Through a pooler, what other clients prepared or set is still there: name the server itself in DATABASE_URL "
    "(the direct URL), or run the task again. Without one: the server, or what it runs on a command, refuses such a "
    "statement.")
NO_ROOM = Case(1, "", "Make room on the server's disk, then run the task again: what was committed stays.")
NO_MEMORY = Case(1, "",
    'Run the task again when the server has less to do; for "out of shared memory" have max_locks_per_transaction '
    'raised (it needs a restart).')
PREREQUISITE = Case(1, "{step} needs what does not exist yet",
    "Run invoke setup, or first the task that brings it (invoke prereqs).")
NO_SCHEMA = Case(1, "no schema of the search_path ({search_path}) exists, so that there is no place for tables",
    "Create it (CREATE SCHEMA …), or name another one in DATABASE_URL (?schema=…).")
SYSTEM_SCHEMA = Case(1,
    "new tables would go to {schema}, the first schema of the search_path ({search_path}), and may not be there",
    "Name the schema that is meant in DATABASE_URL (?schema=public), or first in the role's search_path.")
HIDDEN_TABLE = Case(1, "the session has temporary tables of these names: {tables}",
    "Another client of the pooler made them, and no table of these names can be made beside them: name the server "
    "itself in DATABASE_URL (the direct URL), or run the task again when that client has dropped them.")
OPTION = Case(1, "{options} belongs to {of}, which is not there", "Add {of}, or leave it out.")
NO_PACKAGE = Case(1, "a package cannot be loaded: {why}",
    "Run the task (again) through python3 scripts/inv, which installs all that is needed; in an environment of your "
    "own, pip install -r requirements.txt of this project.")
CHECKOUT = Case(1, "{file} of this project cannot be read: {why}",
    "Bring the checkout back into order (git status, git checkout), then run the task again.")
SYSTEM_REFUSES = Case(1, "the operating system refuses: {why}",
    "Correct that, then run the task again: what was committed stays.")
LOST_OUTPUT = Case(1, "{place} could not be written: {why}",
    "Make room, or write it elsewhere, then run the task again: what was committed stays.")
UNFORESEEN = Case(1, "this should not happen: {why}",
    "Please report it, with these lines; what was committed stays, and invoke verify says what exists.")
FORMAT = Case(1, "{task} has no format '{form}'", "Choose one of these: {formats}.")

# ── 3: settings ──────────────────────────────────────────────────────────────────────────────────────────────────────

ENV_FILE = Case(3, "{file} cannot be read.",
    "Make it a file that you may read, or move it away and set DATABASE_URL in the environment (embedded: the "
    "embedded server).")
ENV_ENCODING = Case(3, "{file} is not UTF-8.", "Save it as UTF-8.")
ENV_LINE = Case(3, "DATABASE_URL in {file} cannot be read.",
    "Write DATABASE_URL=…; is a closing quote missing, or does something follow it?")
ENV_FILE_CHOICE = Case(3, "ENV_FILE {why}.",
    "Correct it, or unset it; DATABASE_URL=embedded asks for the embedded server.")
BEYOND = Case(3, "DATABASE_URL is not set here, but outside of this repository: in {file}.",
    "Say which database is meant: ENV_FILE={quoted} (in the environment) takes that file's, DATABASE_URL=embedded "
    "(there, or in .env) the embedded server.")
OTHER_NAME = Case(3, "There is no DATABASE_URL, but what looks like it has another name.",
    "Call it DATABASE_URL, or set DATABASE_URL=embedded if you want the embedded server.")
NO_URL_IN_CI = Case(3, "CI is set, and DATABASE_URL is not.",
    "Set DATABASE_URL, or DATABASE_URL=embedded if you want the embedded server here.")
DURATION = Case(3, "{name} is not a duration, or out of range.",
    "Write a number with a unit ({units}), from {least_ms} ms to {most_ms} ms.")
SEARCH_PATH = Case(3, "More than one search_path is named ({names}).",
    "Leave one: ?schema=NAME, or ?search_path=A,B for several schemas.")
UNIT = Case(3, "{name} needs a unit.", "Write {number}s or {number}ms.")
EMPTY_URL = Case(3, "DATABASE_URL is set, but empty.", "Set it to {form}, or unset it to use the embedded server.")
UNPRINTABLE_URL = Case(3, "DATABASE_URL holds a line break or an invisible character.",
    "It must stand on one line; write such a character percent-encoded.")
OTHER_URL = Case(3, "DATABASE_URL is no URL of PostgreSQL: it {found}.", "Only PostgreSQL will do: {form}")
AMBIGUOUS_URL = Case(3, "DATABASE_URL cannot be taken apart without a guess.")
MISPLACED_LOGIN = Case(3, "DATABASE_URL has something else where the name of the {part} belongs.",
    "Write {form}, user and password percent-encoded, each part in its place.")
PARAMETER = Case(3, "{target} has a parameter with an invalid value.",
    "Correct the one that libpq names, or leave it out: in DATABASE_URL, a PG… variable, or a service.")
SERVICE = Case(3, "{target} names a service that is not defined.",
    "Is its name right, and does pg_service.conf (or PGSERVICEFILE) define it? Or write the URL out.")
UNPARSABLE_URL = Case(3, "libpq cannot parse DATABASE_URL.")

NO_TARGET = Case(3, "there is no target", "Name some: a line each in --targets, or another pattern.")
TARGET_TWICE = Case(3, "targets are named twice", "Leave one of each, or give them names: NAME=URL.")
FLEET_TARGET = Case(3, "the list of targets cannot be used: {place} {why}",
    "Write a URL of PostgreSQL there, or NAME=URL.")
FLEET_FILE = Case(3, "the targets in {file} cannot be read: {why}",
    "Name a file of lines URL or NAME=URL, or - for stdin.")
FLEET_OPTION = Case(3, "{option}: expected {wants}",
    "Correct it; invoke --help fleet explains the options.")
FLEET_FAILED = Case(1, "not every target ended well: {said}",
    "Run it again when their reasons are gone: it does what is left.")

# ── 4: the server ────────────────────────────────────────────────────────────────────────────────────────────────────

NO_CONNECTION = Case(4, "cannot use {target}",
    "Check host, port, user, password and database in DATABASE_URL, and that the server runs and has room.")
TOO_OLD = Case(4, "cannot use {target}", "PostgreSQL 14 or newer is needed.")
PASSWORD = Case(4, "",
    "Check user and password in DATABASE_URL (percent-encoded where they hold special characters), or PGPASSFILE. "
    "Servers say the same of a user that does not exist.")
# The server lets this user not in, or not from here, whatever the password.
LOGIN = Case(4, "",
    'Check the user in DATABASE_URL: does it exist, may it log in (ALTER ROLE … LOGIN), does pg_hba.conf let it in '
    'from here? "no encryption": add ?sslmode=require. Poolers want USER.PROJECT (Supabase), or a user of their own '
    'list.')
NO_DATABASE = Case(4, "",
    "Check the name after the last / of DATABASE_URL (without one it is the user's); psql -l lists those that there "
    "are, and invoke setup --create-database makes it.")
# The server, or the pooler, does not take what the session was to begin with.
STARTUP_OPTION = Case(4, "",
    "Correct or remove what the message names: in options of DATABASE_URL, or a PG… variable of the environment "
    "(PGOPTIONS, PGTZ). Poolers take no options at all.")
FULL_SERVER = Case(4, "",
    "Run the task again when other sessions have ended (pg_stat_activity shows them), raise the limit that the "
    "message names, or go through the pooler if there is one.")
NOT_READY = Case(4, "", "Run the task again in a moment; if it stays so, the server's log says what it does.")
ENDED_SESSION = Case(4, "",
    "Run the task again once nobody ends it: what was committed stays, and it goes on from there.")
# The session was idle for longer than the role may be, between two tries.
IDLE_SESSION = Case(4, "",
    "The role's idle_session_timeout is shorter than a wait for others: run the task again when they are done, or "
    "lift it (ALTER ROLE … SET idle_session_timeout = 0).")
NOBODY_THERE = Case(4, "",
    "Does the server run, and listen there? Check host and port in DATABASE_URL (PostgreSQL's is 5432).")
NO_SUCH_HOST = Case(4, "",
    "Check the host in DATABASE_URL for typing mistakes, and this machine's DNS (getent ahosts HOST). Supabase's "
    "direct hosts have IPv6 addresses only: without IPv6 take the pooler's.")
SILENT_HOST = Case(4, "",
    "A firewall, a wrong address, or a server that is asleep or busy: check host and port in DATABASE_URL, or set a "
    "longer CONNECT_TIMEOUT.")
# A host has only IPv6 addresses, as Supabase's direct hosts do, and this machine cannot go there.
NO_ROUTE = Case(4, "", "Use a URL whose host has an IPv4 address: the pooler's (Supabase: Connect, Session pooler).")
NOT_POSTGRES = Case(4, "", "Something else than PostgreSQL answers there: check host and port in DATABASE_URL.")
TLS = Case(4, "",
    "Check sslmode and sslrootcert in DATABASE_URL: sslmode=require encrypts, verify-full also wants the "
    "certificate of the server's authority (sslrootcert=FILE, or =system), sslmode=disable is for servers without "
    "TLS.")
LOST_CONNECTION = Case(4, "",
    "Run the task again: what was committed stays, and it goes on from there. Where it comes back: is it PostgreSQL "
    "that answers at this host and port, is its server up, and has the pooler room?")
OTHERWISE = Case(4, "the server answers otherwise than PostgreSQL does: {how}",
    "Is it PostgreSQL, or a pooler for it, that answers at this host and port? If so, please report it.")
_ELSE = "Set DATABASE_URL to a PostgreSQL server of yours, or run as an ordinary user that has an account."
NO_SOCKETS = Case(4, "The embedded server needs unix sockets.", "Set DATABASE_URL, or work inside WSL.")
NO_BINARIES = Case(4, "There are no binaries of PostgreSQL {major} for an embedded server.",
    "Run the task through python3 scripts/inv, or set DATABASE_URL.")
NOT_PRIVATE = Case(4, "The embedded server's folder is not private to its user.",
    "Run as the user whose folder it is, or set {variable} to a folder of yours, or DATABASE_URL.")
NOT_TRUSTED = Case(4, "The embedded server's data would lie where another user may replace it.",
    "Set {variable} to a folder of yours, or take that right away (chmod go-w); or set DATABASE_URL.")
NO_ACCOUNT = Case(4, "PostgreSQL does not run as root, and the user {account} could not be created for it.", _ELSE)
INITDB = Case(4, "initdb could not make the embedded server's data folder.", _ELSE)
EMBEDDED_FILES = Case(4, "The embedded server cannot be used: {why}.",
    "Set {variable} to a folder that can be written, or DATABASE_URL to a server of yours.")
EMBEDDED_SERVER = Case(4, "The embedded server {does}.", f"See the log. {_ELSE}")
NOT_RUNNING = Case(4, "the embedded server is not running, and {looking} starts nothing",
    "Start it (invoke db.start), or run the task without {looking}.")

# ── 5, 6: checks ─────────────────────────────────────────────────────────────────────────────────────────────────────

MISSING = Case(5, "something is still missing", "Run invoke setup: it brings that, or says which rows refuse it.")
REFUSED = Case(6, "", "invoke verify prints the commands that clear it; then run the task again.")
CONFLICT = Case(6, "{count}, nothing was changed", REFUSED.remedy)
DEPENDANTS = Case(6, "tables of others lead into the old core tables",
    "Drop these foreign keys, or have their tables move along: --with-dependants. Nothing was changed.")
NOT_CONFIRMED = Case(6, "not confirmed: the old core tables stay where they are, and nothing was changed",
    "Answer y, or, where there is no terminal to ask on, add --yes.")

# ── 7: locks ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LOCK_TIMEOUT = Case(7, "", "End what holds the lock, or set a longer LOCK_WAIT, then run the task again.")
DEADLOCK = Case(7, "", "Run the task again; if it comes back, end or stop what works on the same tables meanwhile.")
UNREADABLE_CATALOGS = Case(7, "the catalogs could not be read: {why}", LOCK_TIMEOUT.remedy)
BUSY = Case(7, "another {who}", "Run the task again when it is done; LOCK_WAIT sets how long to wait.")

# ── 8: rights ────────────────────────────────────────────────────────────────────────────────────────────────────────

NOT_PERMITTED = Case(8, "",
    "Log in as the owner of what the message names (on Supabase: as postgres), or have the owner GRANT the right to "
    "this role, then run the task again.")
RIGHT = Case(8, "role {role} lacks a right",
    "Have it granted to {role}, or log in as the owner; a member of the owner that does not inherit its rights "
    "becomes it by ?options=-c role=OWNER in DATABASE_URL. Nothing was changed.")
READ_ONLY = Case(8, "this database takes no writes: {why}",
    "Name the primary server in DATABASE_URL, or have default_transaction_read_only lifted.")

# ── 130 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

STOPPED = Case(130, "interrupted; what is done stays, and the next run goes on from there")
GIVEN_UP = Case(130, "interrupted; the server gave no answer, and may go on with what it was sent",
    "Run the task again when it answers: it goes on from what exists.")
# fmt: on


@dataclass(eq=False)  # not frozen: contextlib sets the traceback of what passes through it
class StatementError(Exception):
    """The server refused a statement of a message; those before it were run, those after it were not.

    index: which one, from 0; sqlstate: None where the connection is gone; context: PL/pgSQL's call stack; holders: who
    was seen in its way.
    """

    index: int
    sqlstate: str | None
    message: str
    detail: str = ""
    hint: str = ""
    context: str = ""
    holders: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message

    @property
    def remedy(self) -> str:
        """What helps: what we know of the SQLSTATE; where that says little, the hint of our files or the server."""
        kind = for_sqlstate(self.sqlstate)
        if "statement pooling" in self.message:  # PgBouncer's words; its SQLSTATE is the same for all that it says
            return TRANSACTIONS_POOLED
        return (self.hint if kind in _HINTED else "") or kind.remedy

    @property
    def where(self) -> str:
        """The details, and the SQLSTATE, by which docs/troubleshooting.md knows it: the words may be translated."""
        ours = self.sqlstate is None or self.sqlstate.startswith("TB")
        return "\n".join(filter(None, [self.detail, "" if ours else f"SQLSTATE {self.sqlstate}"]))


# PostgreSQL's names: manual, appendix A.
_BY_SQLSTATE: dict[str | None, Case] = {
    "TB001": PREREQUISITE,  # ours, as the other TB…
    "TB002": REFUSED,
    "TB003": BROKEN_STEP,
    "TB004": BUSY,
    "08001": NOBODY_THERE,  # sqlclient_unable_to_establish_sqlconnection
    "08006": LOST_CONNECTION,  # connection_failure
    "08": LOST_CONNECTION,  # the class of connection exceptions: all that PgBouncer ever says
    "0A000": UNSUPPORTED,  # feature_not_supported
    "25006": READ_ONLY,  # read_only_sql_transaction
    "25P04": ENDED_STATEMENT,  # transaction_timeout
    "28000": LOGIN,  # invalid_authorization_specification
    "28P01": PASSWORD,  # invalid_password
    "3D000": NO_DATABASE,  # invalid_catalog_name
    "3F000": NO_SCHEMA,  # invalid_schema_name
    "40001": CONCURRENT_CHANGE,  # serialization_failure
    "40P01": DEADLOCK,  # deadlock_detected
    "42501": NOT_PERMITTED,  # insufficient_privilege
    "42P01": TABLE_GONE,  # undefined_table
    "53100": NO_ROOM,  # disk_full
    "53200": NO_MEMORY,  # out_of_memory
    "53300": FULL_SERVER,  # too_many_connections
    "55P03": LOCK_TIMEOUT,  # lock_not_available
    "57014": ENDED_STATEMENT,  # query_canceled
    "57P01": ENDED_SESSION,  # admin_shutdown
    "57P02": ENDED_SESSION,  # crash_shutdown
    "57P03": NOT_READY,  # cannot_connect_now
    "57P05": IDLE_SESSION,  # idle_session_timeout
    None: LOST_CONNECTION,  # not the server's: the connection is gone
}
_HINTED = (PREREQUISITE, REFUSED, STEP_FAILED, BROKEN_STEP)

# Remedies that the case decides: timeouts in a concurrent part, through a pooler; rows that refuse what is expected.
LIMITS_OF_THE_ROLE = """\
Concurrent work takes as long as it takes, but the role brings a statement_timeout, lock_timeout or transaction_timeout
along, which cannot be lifted through a transaction pooler: name the server itself in DATABASE_URL (the direct URL, not
the pooler's), and run the task again; it finishes what is left."""
TRANSACTIONS_POOLED = """\
The pooler pools statements, and every task needs transactions: name the server itself in DATABASE_URL (the direct URL),
or a pooler, or a pool of it, with pool_mode = transaction."""
CORRECT_THE_ROWS = "Correct those rows, then run invoke setup; no row was deleted or changed."


def for_sqlstate(sqlstate: str | None) -> Case:
    """Return the error that a SQLSTATE stands for; None: the server sent none."""
    return _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get((sqlstate or "")[:2], STEP_FAILED)
