"""How a task ends: whatever ends it becomes a message and an exit code. Light to import, as the console is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from budget_engine import errors
from budget_engine.output.console import CONSOLE


@contextmanager
def reported() -> Iterator[None]:
    """Turn whatever ends a task, Ctrl-C too, into a message and an exit code."""
    code = 0
    cause: BaseException | None = None
    try:
        yield
    except SystemExit as end:  # the doctor's
        code = int(end.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed once more it would end the message
        ending, cause = as_message(error), error
        _complain(ending)
        code = ending.exit_code
    for lost in CONSOLE.lost[:1]:  # what could not be written
        _complain(lost)
        code = code or lost.exit_code
    CONSOLE.lost.clear()
    if code:
        raise SystemExit(code) from cause


def _complain(error: errors.RecipeError) -> None:
    """Print what is wrong, what it concerns, and what helps."""
    from budget_engine.output import text

    target = "" if error.exit_code == errors.STOPPED.exit_code else CONSOLE.target
    CONSOLE.aside(*error.before, *text.error(error, target))


def as_message(error: BaseException) -> errors.RecipeError:
    """Return the error that has a message for people; Python's own would be a traceback, unmasked."""
    match error:
        case errors.RecipeError():
            return error
        case errors.StatementError():  # of a statement that belongs to no step: the survey, say
            kind = errors.for_sqlstate(error.sqlstate)
            return kind(what=error.message, where=error.where, remedy=error.remedy)
        case KeyboardInterrupt():
            case: errors.Case = (*error.args, errors.STOPPED)[0]
            return case()
        case ImportError():
            return errors.NO_PACKAGE(why=" ".join(str(error).split()), where=f"Python's environment is {sys.prefix}")
        case OSError():
            return errors.SYSTEM_REFUSES(why=error.strerror or error, where=str(error.filename or ""))
    import traceback

    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = "\n".join(f"{frame.filename}, line {frame.lineno}, in {frame.name}" for frame in frames)
    return errors.UNFORESEEN(why=f"{type(error).__name__}: {error}", where=where)
