"""Every way in which a recipe can end badly: its message, its exit code, and what helps. README, "Troubleshooting"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class RecipeError(Exception):
    """A failure that was foreseen: printed as a message, never as a traceback.

    says: what is wrong, one sentence, with places for the facts; what: the server's own words instead; where: what it
    concerns, in lines; remedy: the command or edit that helps (empty: the one that the class has for all its cases).
    """

    exit_code: ClassVar[int] = 1
    says: ClassVar[str] = ""  # only the server does
    usual_remedy: ClassVar[str] = ""
    in_a_step: ClassVar[str] = "{step} failed in {part}: {words}"  # where the server does, while a step runs

    def __init__(self, *, what: str = "", where: str = "", remedy: str = "", **facts: object) -> None:
        self.what = what or self.says.format(**facts)
        self.where, self.remedy = where, remedy or self.usual_remedy.format(**facts)
        super().__init__(self.what)


# ── 1: a step ──────────────────────────────────────────────────────────────────────────────────────────────────────


class StepFailedError(RecipeError):
    """A step failed, or its prerequisites are missing; the database is as before that step."""

    usual_remedy = "Correct what the server names, then run the task again: it goes on from what exists."


class BrokenStepError(StepFailedError):
    """Something undid a step's work while it ran, or a migration and its verification disagree."""

    says = "the step ran, but its checks do not pass"
    usual_remedy = "It was rolled back. Look for event triggers that undo such work; else report it, with these lines."


class TableGoneError(StepFailedError):
    """A table that somebody's function or trigger names is not where they look for it."""

    usual_remedy = "Where is that table? If in another schema, name that one in DATABASE_URL (?schema=…)."


class EndedStatementError(StepFailedError):
    """A limit, or somebody, ended the statement."""

    usual_remedy = """\
A limit (statement_timeout, transaction_timeout) or an administrator ended it: run the task again when the server
is less busy; it finishes what is left."""


class ConcurrentChangeError(StepFailedError):
    """Another transaction's work, or a standby's replay, came in between."""

    usual_remedy = "What came in between is done: run the task again (on a standby, or on its primary)."


class UnsupportedError(StepFailedError):
    """The server lacks a feature, or a pooler's other clients left something in the session."""

    usual_remedy = """\
Through a pooler, what other clients prepared or set is still there: name the server itself in DATABASE_URL (the direct
URL), or run the task again. Without one: the server, or what it runs on a command, refuses such a statement."""


class NoRoomError(StepFailedError):
    """The server's disk is full."""

    usual_remedy = "Make room on the server's disk, then run the task again: what was committed stays."


class NoMemoryError(StepFailedError):
    """The server's memory, or its table of locks, is full."""

    usual_remedy = """\
Run the task again when the server has less to do; for "out of shared memory" have max_locks_per_transaction raised
(it needs a restart)."""


class PrerequisiteError(StepFailedError):
    """A step run alone lacks what another one brings."""

    says = "{step} needs what does not exist yet"
    usual_remedy = "Run invoke setup, or first the task that brings it (invoke prereqs)."


class NoSchemaError(StepFailedError):
    """There is no place for tables."""

    says = "no schema of the search_path ({search_path}) exists, so that there is no place for tables"
    usual_remedy = "Create it (CREATE SCHEMA …), or name another one in DATABASE_URL (?schema=…)."


class SystemSchemaError(NoSchemaError):
    """New tables would go to a schema of PostgreSQL's own, or would be gone with the session."""

    says = "new tables would go to {schema}, the first schema of the search_path ({search_path}), and may not be there"
    usual_remedy = "Name the schema that is meant in DATABASE_URL (?schema=public), or first in the role's search_path."


class HiddenTableError(UnsupportedError):
    """A pooler's other client left a temporary table of our name in the session: no name can lead past it."""

    says = "the session has temporary tables of these names: {tables}"
    usual_remedy = """\
Another client of the pooler made them, and no table of these names can be made beside them: name the server itself in
DATABASE_URL (the direct URL), or run the task again when that client has dropped them."""


class OptionError(StepFailedError):
    """An option was given without the one that it belongs to."""

    says = "{options} belongs to {of}, which is not there"
    usual_remedy = "Add {of}, or leave it out."


class NoPackageError(StepFailedError):
    """Invoke runs in an environment that is not the project's."""

    says = "a package cannot be loaded: {why}"
    usual_remedy = "Run the task (again) through python3 scripts/inv, which installs all that is needed."


class CheckoutError(StepFailedError):
    """A file of this project cannot be read."""

    says = "{file} of this project cannot be read: {why}"
    usual_remedy = "Bring the checkout back into order (git status, git checkout), then run the task again."


class SystemRefusesError(StepFailedError):
    """The operating system refuses something that nobody thought of."""

    says = "the operating system refuses: {why}"
    usual_remedy = "Correct that, then run the task again: what was committed stays."


class LostOutputError(StepFailedError):
    """What the task had to say could not be written."""

    says = "{place} could not be written: {why}"
    usual_remedy = "Make room, or write it elsewhere, then run the task again: what was committed stays."


class UnforeseenError(StepFailedError):
    """A mistake of this project's."""

    says = "this should not happen: {why}"
    usual_remedy = "Please report it, with these lines; what was committed stays, and invoke verify says what exists."


class FormatError(StepFailedError):
    """A format was asked for that the task does not have."""

    says = "{task} has no format '{form}'"
    usual_remedy = "Choose one of these: {formats}."


# ── 3: settings ────────────────────────────────────────────────────────────────────────────────────────────────────


class SettingsError(RecipeError):
    """There is no usable DATABASE_URL, or another setting cannot be read."""

    exit_code = 3


class EnvFileError(SettingsError):
    """.env is a folder, is not there, or may not be read."""

    says = "{file} cannot be read."
    usual_remedy = """\
Make it a file that you may read, or move it away and set DATABASE_URL in the environment (embedded: the embedded
server)."""


class EnvEncodingError(SettingsError):
    """.env is of another encoding."""

    says = "{file} is not UTF-8."
    usual_remedy = "Save it as UTF-8."


class EnvLineError(SettingsError):
    """The line of .env that holds the URL is broken."""

    says = "DATABASE_URL in {file} cannot be read."
    usual_remedy = "Write DATABASE_URL=…; is a closing quote missing, or does something follow it?"


class EnvFileChoiceError(SettingsError):
    """ENV_FILE does not say which database."""

    says = "ENV_FILE {why}."
    usual_remedy = "Correct it, or unset it; DATABASE_URL=embedded asks for the embedded server."


class BeyondError(SettingsError):
    """A file that does not count may hold the URL that is meant; the embedded server would be a guess."""

    says = "DATABASE_URL is not set here, but outside of this repository: in {file}."
    usual_remedy = """\
Say which database is meant: ENV_FILE={quoted} (in the environment) takes that file's,
DATABASE_URL=embedded (there, or in .env) the embedded server."""


class OtherNameError(SettingsError):
    """What seems to be meant for DATABASE_URL bears another name."""

    says = "There is no DATABASE_URL, but what looks like it has another name."
    usual_remedy = """\
Call it DATABASE_URL, or set DATABASE_URL=embedded if you want the embedded server."""


class NoUrlInCiError(SettingsError):
    """A pipeline forgot its secret."""

    says = "CI is set, and DATABASE_URL is not."
    usual_remedy = "Set DATABASE_URL, or DATABASE_URL=embedded if you want the embedded server here."


class DurationError(SettingsError):
    """A setting is no duration."""

    says = "{name} is not a duration, or out of range."
    usual_remedy = "Write a number with a unit ({units}), from {least_ms} ms to {most_ms} ms."


class SearchPathError(SettingsError):
    """Several parameters say where the tables go, and do not agree."""

    says = "More than one search_path is named ({names})."
    usual_remedy = "Leave one: ?schema=NAME, or ?search_path=A,B for several schemas."


class UnitError(SettingsError):
    """A duration is a number alone, which other tools read as seconds, and PostgreSQL as milliseconds."""

    says = "{name} needs a unit."
    usual_remedy = "Write {number}s or {number}ms."


class EmptyUrlError(SettingsError):
    """DATABASE_URL is set to nothing."""

    says = "DATABASE_URL is set, but empty."
    usual_remedy = "Set it to {form}, or unset it to use the embedded server."


class UnprintableUrlError(SettingsError):
    """DATABASE_URL goes over lines."""

    says = "DATABASE_URL holds a line break or an invisible character."
    usual_remedy = "It must stand on one line; write such a character percent-encoded."


class OtherUrlError(SettingsError):
    """DATABASE_URL is of another kind of database, or no URL."""

    says = "DATABASE_URL is no URL of PostgreSQL: it {found}."
    usual_remedy = "Only PostgreSQL will do: {form}"


class AmbiguousUrlError(SettingsError):
    """A guess could send the password to a stranger."""

    says = "DATABASE_URL cannot be taken apart without a guess."


class MisplacedLoginError(SettingsError):
    """A host or a database is named by what looks like user and password: it is not printed, and not looked up."""

    says = "What stands for the name of the {part} is none."
    usual_remedy = "Write {form}, user and password percent-encoded, each part in its place."


class UnparsableUrlError(SettingsError):
    """Libpq refuses DATABASE_URL."""

    says = "libpq cannot parse DATABASE_URL."


# ── 4: the server ──────────────────────────────────────────────────────────────────────────────────────────────────


class UnreachableError(RecipeError):
    """The server cannot be reached, refuses the login, is too old, or (embedded) cannot be started."""

    exit_code = 4


class NoConnectionError(UnreachableError):
    """No session was to be had."""

    says = "cannot use {target}"
    usual_remedy = (
        "Check host, port, user, password and database in DATABASE_URL, and that the server runs and has room."
    )


class TooOldError(NoConnectionError):
    """The server is older than what the migrations are written for."""

    usual_remedy = "PostgreSQL 14 or newer is needed."


class PasswordError(UnreachableError):
    """The password is wrong, or there is none."""

    usual_remedy = """\
Check user and password in DATABASE_URL (percent-encoded where they hold special characters), or PGPASSFILE. Servers say
the same of a user that does not exist."""


class LoginError(UnreachableError):
    """The server lets this user not in, or not from here, whatever the password."""

    usual_remedy = """\
Check the user in DATABASE_URL: does it exist, may it log in (ALTER ROLE … LOGIN), does pg_hba.conf let it in from here?
"no encryption": add ?sslmode=require. Poolers want USER.PROJECT (Supabase), or a user of their own list."""


class NoDatabaseError(UnreachableError):
    """There is no such database."""

    usual_remedy = """\
Check the name after the last / of DATABASE_URL (without one it is the user's); psql -l lists those that there are, and
createdb NAME makes one."""


class StartupOptionError(UnreachableError):
    """The server, or the pooler, does not take what the session was to begin with."""

    usual_remedy = """\
Correct or remove what the message names: in options of DATABASE_URL, or a PG… variable of the environment (PGOPTIONS,
PGTZ). Poolers take no options at all."""


class FullServerError(UnreachableError):
    """The server, the database or the role has as many connections as it may."""

    usual_remedy = """\
Run the task again when other sessions have ended (pg_stat_activity shows them), raise the limit that the message names,
or go through the pooler if there is one."""


class NotReadyError(UnreachableError):
    """The server is starting up, shutting down or recovering."""

    usual_remedy = "Run the task again in a moment; if it stays so, the server's log says what it does."


class EndedSessionError(UnreachableError):
    """An administrator ended the session, or the server goes down."""

    usual_remedy = "Run the task again once nobody ends it: what was committed stays, and it goes on from there."


class IdleSessionError(UnreachableError):
    """The session was idle for longer than the role may be, between two tries."""

    usual_remedy = """\
The role's idle_session_timeout is shorter than a wait for others: run the task again when they are done, or lift it
(ALTER ROLE … SET idle_session_timeout = 0)."""


class NobodyThereError(UnreachableError):
    """Nothing listens there."""

    usual_remedy = "Does the server run, and listen there? Check host and port in DATABASE_URL (PostgreSQL's is 5432)."


class NoSuchHostError(UnreachableError):
    """The host's name leads nowhere."""

    usual_remedy = """\
Check the host in DATABASE_URL for typing mistakes, and this machine's DNS (getent ahosts HOST). Supabase's direct hosts
have IPv6 addresses only: without IPv6 take the pooler's."""


class SilentHostError(UnreachableError):
    """Nothing answers in time."""

    usual_remedy = """\
A firewall, a wrong address, or a server that is asleep or busy: check host and port in DATABASE_URL, or set a longer
CONNECT_TIMEOUT."""


class NoRouteError(UnreachableError):
    """A host has only IPv6 addresses, as Supabase's direct hosts do, and this machine cannot go there."""

    usual_remedy = "Use a URL whose host has an IPv4 address: the pooler's (Supabase: Connect, Session pooler)."


class NotPostgresError(UnreachableError):
    """What answers there does not speak PostgreSQL's protocol."""

    usual_remedy = "Something else than PostgreSQL answers there: check host and port in DATABASE_URL."


class TlsError(UnreachableError):
    """Client and server do not agree on TLS."""

    usual_remedy = """\
Check sslmode and sslrootcert in DATABASE_URL: sslmode=require encrypts, verify-full also wants the certificate of the
server's authority (sslrootcert=FILE, or =system), sslmode=disable is for servers without TLS."""


class LostConnectionError(UnreachableError):
    """The connection broke, or a pooler gave up."""

    usual_remedy = """\
Run the task again: what was committed stays, and it goes on from there. Where it comes back: is it PostgreSQL that
answers at this host and port, is its server up, and has the pooler room?"""


class CrowdedError(UnreachableError):
    """The server, which took one connection, refuses the second one that concurrent work needs."""

    says = "concurrent work needs a second connection for a while"
    usual_remedy = """\
Run the task again when other sessions have ended (LOCK_WAIT sets how long to wait), or, where a pooler
stands between, name the server itself in DATABASE_URL (the direct URL)."""


_OTHERWISE = "Set DATABASE_URL to a PostgreSQL server of yours, or run as an ordinary user that has an account."


class NoSocketsError(UnreachableError):
    """Windows."""

    says = "The embedded server needs unix sockets."
    usual_remedy = "Set DATABASE_URL, or work inside WSL."


class NoBinariesError(UnreachableError):
    """The package with the embedded server's binaries is not installed."""

    says = "There are no binaries of PostgreSQL {major} for an embedded server."
    usual_remedy = "Run the task through python3 scripts/inv, or set DATABASE_URL."


class NotPrivateError(UnreachableError):
    """Others could reach the embedded server."""

    says = "The embedded server's folder is not private to its user."
    usual_remedy = "Run as the user whose folder it is, or set {variable} to a folder of yours, or DATABASE_URL."


class NoAccountError(UnreachableError):
    """As root the embedded server needs another user."""

    says = "PostgreSQL does not run as root, and the user {account} could not be created for it."
    usual_remedy = _OTHERWISE


class InitdbError(UnreachableError):
    """The embedded server's data could not be made."""

    says = "initdb could not make the embedded server's data folder."
    usual_remedy = _OTHERWISE


class EmbeddedFilesError(UnreachableError):
    """The operating system refuses the embedded server's files."""

    says = "The embedded server cannot be used: {why}."
    usual_remedy = "Set {variable} to a folder that can be written, or DATABASE_URL to a server of yours."


class EmbeddedServerError(UnreachableError):
    """The embedded server does not do as it is told; its log says why."""

    says = "The embedded server {does}."
    usual_remedy = f"See the log. {_OTHERWISE}"


class NotRunningError(UnreachableError):
    """A look was asked for that starts nothing."""

    says = "the embedded server is not running, and {looking} starts nothing"
    usual_remedy = "Start it (invoke db.start), or run the task without {looking}."


# ── 5, 6: checks ───────────────────────────────────────────────────────────────────────────────────────────────────


class MissingError(RecipeError):
    """Something promised is still missing."""

    exit_code = 5
    says = "something is still missing"
    usual_remedy = "Run invoke setup: it brings that, or says which rows refuse it."


class RefusedError(RecipeError):
    """A step must not go on by itself."""

    exit_code = 6
    usual_remedy = "invoke verify prints the commands that clear it; then run the task again."


class ConflictError(RefusedError):
    """Something exists in another form, or under our name: nothing was changed."""

    says = "{count}, nothing was changed"
    before: Sequence[str] = ()  # lines that say each, and what clears it


class DependantsError(RefusedError):
    """Foreign keys of others' tables lead into the core tables that are to move."""

    says = "tables of others lead into the old core tables"
    usual_remedy = "Drop these foreign keys, or have their tables move along: --with-dependants. Nothing was changed."


class NotConfirmedError(RefusedError):
    """The question was answered with no, or could not be asked."""

    says = "not confirmed: the old core tables stay where they are, and nothing was changed"
    usual_remedy = "Answer y, or, where there is no terminal to ask on, add --yes."


# ── 7: locks ───────────────────────────────────────────────────────────────────────────────────────────────────────


class LockTimeoutError(RecipeError):
    """Gave up waiting for a lock."""

    exit_code = 7
    in_a_step = "{step} got no lock in {part}: {words}"
    usual_remedy = "End what holds the lock, or set a longer LOCK_WAIT, then run the task again."


class DeadlockError(LockTimeoutError):
    """Another session and this one waited for each other."""

    usual_remedy = "Run the task again; if it comes back, end or stop what works on the same tables meanwhile."


class UnreadableCatalogsError(LockTimeoutError):
    """Printing a definition waits behind ACCESS EXCLUSIVE on its table."""

    says = "the catalogs could not be read: {why}"


class BusyError(LockTimeoutError):
    """Another run, or another session's index build, is at work on the same."""

    says = "another {who}"
    usual_remedy = "Run the task again when it is done; LOCK_WAIT sets how long to wait."


# ── 8: rights ──────────────────────────────────────────────────────────────────────────────────────────────────────


class NotPermittedError(RecipeError):
    """The role lacks a right, or the server takes no writes."""

    exit_code = 8
    usual_remedy = """\
Log in as the owner of what the message names (on Supabase: as postgres), or have the owner GRANT the right to this
role, then run the task again."""


class RightError(NotPermittedError):
    """The survey found that the role lacks a right."""

    says = "role {role} lacks a right"
    usual_remedy = "Have it granted to {role}, or log in as the owner. Nothing was changed."


class ReadOnlyError(NotPermittedError):
    """The server is a standby, or the database read-only."""

    says = "this database takes no writes: {why}"
    usual_remedy = "Name the primary server in DATABASE_URL, or have default_transaction_read_only lifted."


# ── 130 ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class StoppedError(RecipeError):
    """The user pressed Ctrl-C."""

    exit_code = 130
    says = "interrupted; what is done stays, and the next run goes on from there"


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
        return (self.hint if kind in _HINTED else "") or kind.usual_remedy

    @property
    def where(self) -> str:
        """The details, and the SQLSTATE, by which README's "Troubleshooting" knows it: the words may be translated."""
        ours = self.sqlstate is None or self.sqlstate.startswith("TB")
        return "\n".join(filter(None, [self.detail, "" if ours else f"SQLSTATE {self.sqlstate}"]))


# PostgreSQL's names: manual, appendix A.
_BY_SQLSTATE: dict[str | None, type[RecipeError]] = {
    "TB001": PrerequisiteError,  # ours, as the other TB…
    "TB002": RefusedError,
    "TB003": BrokenStepError,
    "TB004": BusyError,
    "08001": NobodyThereError,  # sqlclient_unable_to_establish_sqlconnection
    "08006": LostConnectionError,  # connection_failure
    "08": LostConnectionError,  # the class of connection exceptions: all that PgBouncer ever says
    "0A000": UnsupportedError,  # feature_not_supported
    "25006": ReadOnlyError,  # read_only_sql_transaction
    "25P04": EndedStatementError,  # transaction_timeout
    "28000": LoginError,  # invalid_authorization_specification
    "28P01": PasswordError,  # invalid_password
    "3D000": NoDatabaseError,  # invalid_catalog_name
    "3F000": NoSchemaError,  # invalid_schema_name
    "40001": ConcurrentChangeError,  # serialization_failure
    "40P01": DeadlockError,  # deadlock_detected
    "42501": NotPermittedError,  # insufficient_privilege
    "42P01": TableGoneError,  # undefined_table
    "53100": NoRoomError,  # disk_full
    "53200": NoMemoryError,  # out_of_memory
    "53300": FullServerError,  # too_many_connections
    "55P03": LockTimeoutError,  # lock_not_available
    "57014": EndedStatementError,  # query_canceled
    "57P01": EndedSessionError,  # admin_shutdown
    "57P02": EndedSessionError,  # crash_shutdown
    "57P03": NotReadyError,  # cannot_connect_now
    "57P05": IdleSessionError,  # idle_session_timeout
    None: LostConnectionError,  # not the server's: the connection is gone
}
_HINTED = (PrerequisiteError, RefusedError, StepFailedError)

# Remedies that the case decides: timeouts in a concurrent part, through a pooler; rows that refuse what is expected.
LIMITS_OF_THE_ROLE = """\
Concurrent work takes as long as it takes, but the role brings a statement_timeout, lock_timeout or transaction_timeout
along, which cannot be lifted through a transaction pooler: name the server itself in DATABASE_URL (the direct URL, not
the pooler's), and run the task again; it finishes what is left."""
CORRECT_THE_ROWS = "Correct those rows, then run invoke setup; no row was deleted or changed."


def for_sqlstate(sqlstate: str | None) -> type[RecipeError]:
    """Return the error that a SQLSTATE stands for; None: the server sent none."""
    return _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get((sqlstate or "")[:2], StepFailedError)
