"""Every way in which a recipe can end badly, each with its exit code (README, "Exit codes")."""

from __future__ import annotations

from typing import ClassVar


class RecipeError(Exception):
    """A failure that was foreseen: printed as a message, never as a traceback.

    what: what is wrong, one sentence; where: what it concerns, in lines; remedy: the command or edit that helps.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.remedy = what, where, remedy


class StepFailedError(RecipeError):
    """A step failed, or its prerequisites are missing; the database is as before that step."""


class SettingsError(RecipeError):
    """There is no usable DATABASE_URL, or another setting cannot be read."""

    exit_code = 3


class UnreachableError(RecipeError):
    """The server cannot be reached, refuses the login, is too old, or (embedded) cannot be started."""

    exit_code = 4


class MissingError(RecipeError):
    """Something promised is still missing."""

    exit_code = 5


class InTheWayError(RecipeError):
    """Something stands in the way that a step must not touch by itself."""

    exit_code = 6


class LockTimeoutError(RecipeError):
    """Gave up waiting for a lock."""

    exit_code = 7


class NotPermittedError(RecipeError):
    """The role lacks a right, or the server takes no writes."""

    exit_code = 8


class StoppedError(RecipeError):
    """The user pressed Ctrl-C."""

    exit_code = 130
