"""The console: where a task's report goes, and how it ends. Light to import: it is there before anything can fail."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from scripts import errors


class Console:
    """Results to stdout, errors to stderr, neither ever with a secret in it."""

    def __init__(self) -> None:
        self.mask: Callable[[str], str] = str  # replaced once there are secrets to mask
        self._progress = ""  # the line that the next one is to replace

    def progress(self, line: str) -> None:
        """Show on a terminal, and nowhere else, how far something is; the next line takes its place, "" none."""
        if line != self._progress and sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be taken back
            print(f"\r\x1b[K{self.mask(line)[:width]}", end="", flush=True)
            self._progress = line

    def say(self, *lines: str) -> None:
        """Print the lines at once: a pipe would otherwise keep them back until the end."""
        self.progress("")
        try:
            for line in lines:
                print(self.mask(line), flush=True)
        except BrokenPipeError:  # whoever read has seen enough; the work goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def confirms(self, question: str) -> bool | None:
        """Ask the person at the terminal, where no is the default; None: there is no terminal."""
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return None
        print(self.mask(question), "[y/N] ", end="", flush=True)  # input() would write it to stderr
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def complain(self, error: errors.RecipeError) -> None:
        """Print what is wrong, what it concerns, and what helps."""
        self.progress("")
        for line in error.lines():
            print(self.mask(line), file=sys.stderr, flush=True)


CONSOLE = Console()


@contextmanager
def reported() -> Iterator[None]:
    """Turn a foreseen failure, or Ctrl-C, into its message and its exit code."""
    try:
        yield
    except errors.RecipeError as error:
        ending = error
    except errors.StatementError as error:  # of a statement that belongs to no step: the survey, say
        ending = errors.for_sqlstate(error.sqlstate)(what=error.message, where=error.detail, remedy=error.remedy)
    except KeyboardInterrupt:
        ending = errors.StoppedError()
    else:
        return
    CONSOLE.complain(ending)
    raise SystemExit(ending.exit_code)
