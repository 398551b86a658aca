"""Every way in which a recipe can end badly, each with its exit code (README, "Exit codes")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class RecipeError(Exception):
    """A failure that was foreseen: printed as a message, never as a traceback.

    what: what is wrong, one sentence; where: what it concerns, in lines; remedy: the command or edit that helps (empty:
    the one that the class has for all its cases).
    """

    exit_code: ClassVar[int] = 1
    usual_remedy: ClassVar[str] = ""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.remedy = what, where, remedy or self.usual_remedy

    def lines(self) -> list[str]:
        """Return the message, as it is printed."""
        remedy = self.remedy.replace("\n", "\n              ")
        return [
            f"error: {self.what}",
            *(f"  {line}" for line in self.where.splitlines()),
            *([f"  what to do: {remedy}"] if remedy else []),
        ]


class StepFailedError(RecipeError):
    """A step failed, or its prerequisites are missing; the database is as before that step."""


class NoRoomError(StepFailedError):
    """The server's disk is full."""

    usual_remedy = "Make room on the server's disk, then run the task again: what was committed stands."


class SettingsError(RecipeError):
    """There is no usable DATABASE_URL, or another setting cannot be read."""

    exit_code = 3


class UnreachableError(RecipeError):
    """The server cannot be reached, refuses the login, is too old, or (embedded) cannot be started."""

    exit_code = 4
    usual_remedy = "Run the task again: what was committed stands, and it goes on from there."


class CrowdedError(UnreachableError):
    """The server, which took one connection, refuses the second one that online work needs."""

    usual_remedy = """\
Run the task again when other sessions have ended (LOCK_WAIT sets how long to wait), or, where a pooler
stands between, name the server itself in DATABASE_URL (the direct URL)."""


class MissingError(RecipeError):
    """Something promised is still missing."""

    exit_code = 5


class InTheWayError(RecipeError):
    """Something stands in the way that a step must not touch by itself."""

    exit_code = 6


class LockTimeoutError(RecipeError):
    """Gave up waiting for a lock."""

    exit_code = 7
    usual_remedy = "End what holds the lock, or set a longer LOCK_TIMEOUT, then run the task again."


class BusyError(LockTimeoutError):
    """Another run, or another session's index build, is at work on the same."""

    usual_remedy = "Run the task again when it is done; LOCK_WAIT sets how long to wait."


class NotPermittedError(RecipeError):
    """The role lacks a right, or the server takes no writes."""

    exit_code = 8
    usual_remedy = "Log in as the owner of the tables, or have the right granted, then run the task again."


class StoppedError(RecipeError):
    """The user pressed Ctrl-C."""

    exit_code = 130


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
