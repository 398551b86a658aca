"""Every way in which a recipe can end badly: its message, its exit code, and what helps. README, "Troubleshooting"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class RecipeError(Exception):
    """A failure that was foreseen: printed as a message, never as a traceback.

    says: what is wrong, one sentence, with places for the facts; where: what it concerns, in lines; remedy: the command
    or edit that helps (empty: the one that the class has for all its cases).
    """

    exit_code: ClassVar[int] = 1
    says: ClassVar[str] = "{what}"  # of a family: the server's own words, say
    usual_remedy: ClassVar[str] = ""

    def __init__(self, *, where: str = "", remedy: str = "", **facts: object) -> None:
        self.what = self.says.format(**facts)
        self.where, self.remedy = where, remedy or self.usual_remedy.format(**facts)
        super().__init__(self.what)

    def lines(self) -> list[str]:
        """Return the message, as it is printed."""
        remedy = self.remedy.replace("\n", "\n              ")
        return [
            f"error: {self.what}",
            *(f"  {line}" for line in self.where.splitlines()),
            *([f"  what to do: {remedy}"] if remedy else []),
        ]


# ── 1: a step ──────────────────────────────────────────────────────────────────────────────────────────────────────


class StepFailedError(RecipeError):
    """A step failed, or its prerequisites are missing; the database is as before that step."""


class NoRoomError(StepFailedError):
    """The server's disk is full."""

    usual_remedy = "Make room on the server's disk, then run the task again: what was committed stands."


class PrerequisiteError(StepFailedError):
    """A step run alone lacks what another one brings."""

    says = "{step} needs what stands nowhere yet"
    usual_remedy = "Run invoke setup, or first the task that brings it (invoke prereqs)."


class NoSchemaError(StepFailedError):
    """There is no place for tables."""

    says = "no schema of the search_path ({search_path}) exists, so that there is no place for tables"
    usual_remedy = "Create it (CREATE SCHEMA …), or name another one in DATABASE_URL (?schema=…)."


class OptionError(StepFailedError):
    """An option was given without the one that it belongs to."""

    says = "{options} are for {of}, which is not there"


class FormatError(StepFailedError):
    """A format was asked for that the task does not have."""

    says = "{task} has no format {form}"
    usual_remedy = "Choose one of these: {formats}."


# ── 3: settings ────────────────────────────────────────────────────────────────────────────────────────────────────


class SettingsError(RecipeError):
    """There is no usable DATABASE_URL, or another setting cannot be read."""

    exit_code = 3


class EnvFileError(SettingsError):
    """.env is a folder, or may not be read."""

    says = ".env cannot be read."
    usual_remedy = "Make it a file that you may read, or move it away and set DATABASE_URL in the environment."


class EnvEncodingError(SettingsError):
    """.env is of another encoding."""

    says = ".env is not UTF-8."
    usual_remedy = "Save it as UTF-8."


class EnvLineError(SettingsError):
    """The line of .env that holds the URL is broken."""

    says = "DATABASE_URL in .env cannot be read."
    usual_remedy = "Write DATABASE_URL=…; is a closing quote missing, or does something follow it?"


class NoUrlInCiError(SettingsError):
    """A pipeline forgot its secret."""

    says = "CI is set, and DATABASE_URL is not."
    usual_remedy = "Set DATABASE_URL, or DATABASE_URL=embedded if you want the embedded server here."


class DurationError(SettingsError):
    """A setting is no duration."""

    says = "{name} is not a duration, or out of range."
    usual_remedy = "Write a number with a unit ({units}), from {least_ms} ms to {most_ms} ms."


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

    says = "DATABASE_URL {found}."
    usual_remedy = "Only PostgreSQL will do: {form}"


class AmbiguousUrlError(SettingsError):
    """A guess could send the password to a stranger."""

    says = "DATABASE_URL cannot be taken apart without a guess."


class MisplacedLoginError(SettingsError):
    """A host or a database is named by what looks like user and password: it is not printed, and not looked up."""

    says = "What stands for the name of the {part} is none."


class UnparsableUrlError(SettingsError):
    """Libpq refuses DATABASE_URL."""

    says = "libpq cannot parse DATABASE_URL."


# ── 4: the server ──────────────────────────────────────────────────────────────────────────────────────────────────


class UnreachableError(RecipeError):
    """The server cannot be reached, refuses the login, is too old, or (embedded) cannot be started."""

    exit_code = 4
    usual_remedy = "Run the task again: what was committed stands, and it goes on from there."


class NoConnectionError(UnreachableError):
    """No session was to be had."""

    says = "cannot use {target}"
    usual_remedy = (
        "Check host, port, user, password and database in DATABASE_URL, and that the server runs and has room."
    )


class CrowdedError(UnreachableError):
    """The server, which took one connection, refuses the second one that online work needs."""

    says = "online work needs a second connection for a while"
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


# ── 5, 6: promises ─────────────────────────────────────────────────────────────────────────────────────────────────


class MissingError(RecipeError):
    """Something promised is still missing."""

    exit_code = 5
    says = "something promised is missing"


class InTheWayError(RecipeError):
    """Something stands in the way that a step must not touch by itself."""

    exit_code = 6


class ObstacleError(InTheWayError):
    """The survey found something in the way: nothing was changed."""

    says = "something stands in the way, and no step may touch it"


class NotConfirmedError(InTheWayError):
    """The question was answered with no, or could not be asked."""

    says = "not confirmed: the old core tables stay in the way, and nothing was changed"


# ── 7: locks ───────────────────────────────────────────────────────────────────────────────────────────────────────


class LockTimeoutError(RecipeError):
    """Gave up waiting for a lock."""

    exit_code = 7
    usual_remedy = "End what holds the lock, or set a longer LOCK_TIMEOUT, then run the task again."


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
    usual_remedy = "Log in as the owner of the tables, or have the right granted, then run the task again."


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
    says = "interrupted; the step that was running left no trace"


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
        """What helps: we say it where we know the case; else the hint does, our files' or the server's."""
        return for_sqlstate(self.sqlstate).usual_remedy or self.hint


_BY_SQLSTATE: dict[str | None, type[RecipeError]] = {
    "TB001": StepFailedError,  # ours: a prerequisite is missing
    "TB002": InTheWayError,  # ours
    "TB003": StepFailedError,  # ours: a promise is not kept
    "55P03": LockTimeoutError,  # lock_not_available
    "40P01": LockTimeoutError,  # deadlock_detected
    "42501": NotPermittedError,  # insufficient_privilege
    "25006": NotPermittedError,  # read_only_sql_transaction
    "57P01": UnreachableError,  # admin_shutdown
    "57P02": UnreachableError,  # crash_shutdown
    "57P03": UnreachableError,  # cannot_connect_now
    "57P05": UnreachableError,  # idle_session_timeout: the role's own, between two tries
    "53300": UnreachableError,  # too_many_connections
    "08": UnreachableError,  # the class of connection exceptions: all that PgBouncer ever says
    "53100": NoRoomError,  # disk_full
    None: UnreachableError,  # not the server's: the connection is gone
}


def for_sqlstate(sqlstate: str | None) -> type[RecipeError]:
    """Return the error that a SQLSTATE (PostgreSQL manual, appendix A) stands for; None: the server sent none."""
    return _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get((sqlstate or "")[:2], StepFailedError)


ENDINGS = (RecipeError, StatementError, KeyboardInterrupt)  # what may end a task in a way that was foreseen


def ending(error: BaseException) -> RecipeError:
    """Return how one of ENDINGS is printed."""
    if isinstance(error, StatementError):  # of a statement that belongs to no step: the survey, say
        return for_sqlstate(error.sqlstate)(what=error.message, where=error.detail, remedy=error.remedy)
    return error if isinstance(error, RecipeError) else StoppedError()
