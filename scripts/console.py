"""The console: where a task's report goes, and how it ends. Light to import: it is there before anything can fail."""

from __future__ import annotations

import atexit
import io
import json
import os
import re
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from scripts import errors

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_NARROWEST_TABLE = 60  # columns: the names of the steps take half of them
PEOPLE = "table"  # the format that people read; the others are for machines


class Console:
    """Results to stdout, errors to stderr, neither ever with a secret in it."""

    def __init__(self) -> None:
        self.mask: Callable[[str], str] = str  # replaced once there are secrets to mask
        self.target = ""  # what is being worked on, once that is known
        self.quiet = False  # whether only documents, questions and errors are wanted
        self.format = PEOPLE
        self.lost: list[errors.RecipeError] = []  # what could not be written, until that is said
        self._progress = ""  # the line that the next one is to replace

    @property
    def _for_people(self) -> TextIO:
        """Where lines go: a document has stdout for itself."""
        return sys.stdout if self.format == PEOPLE else sys.stderr

    def progress(self, line: str) -> None:
        """Show on a terminal, and nowhere else, how far something is; the next line takes its place, "" none."""
        if line != self._progress and self._for_people.isatty() and not self.quiet:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be taken back
            self._print(self._for_people, f"\r\x1b[K{self.mask(line)[:width]}", end="")
            self._progress = line

    def say(self, *lines: str) -> None:
        """Print the lines at once: a pipe would otherwise keep them back until the end."""
        self.progress("")
        if not self.quiet:
            self._print(self._for_people, *(part for line in lines for part in self._fitted(line)))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], plain: Sequence[str]) -> None:
        """Draw a table on a terminal with room for it; elsewhere, where lines are compared, say the plain lines."""
        width = shutil.get_terminal_size().columns
        if not self._for_people.isatty() or width < _NARROWEST_TABLE:
            self.say(*plain)
        elif not self.quiet:
            from scripts import table  # it takes longer to load than most tasks take

            self.progress("")
            masked = [[self.mask(cell) for cell in row] for row in rows]  # before words are broken over lines
            self._print(self._for_people, "", *table.draw(header, masked, width), "")

    def _fitted(self, line: str) -> list[str]:
        """Mask a line; break it where a terminal would break it within words. Commands, to be copied, stay whole."""
        line = self.mask(line)  # before words are parted: a secret may hold blanks
        width = shutil.get_terminal_size().columns
        if not self._for_people.isatty() or len(line) <= width or line.endswith(";"):
            return [line]
        import textwrap

        parts = []
        for part in line.splitlines():
            labels, text = part[: _margin(part)], part[_margin(part) :]
            wrapper = textwrap.TextWrapper(width, labels, " " * len(labels))
            wrapper.break_long_words = wrapper.break_on_hyphens = False
            parts += wrapper.wrap(text)
        return parts

    def emit(self, document: str) -> None:
        """Print what was asked for, whole, on stdout."""
        self._print(sys.stdout, self.mask(document))

    def emit_json(self, document: Mapping[str, object]) -> None:
        """Print a JSON document, its texts masked one by one: null, which is no text, may be somebody's password."""
        self._print(sys.stdout, json.dumps(_masked(document, self.mask), indent=2, ensure_ascii=False))

    def append(self, file: str, document: str) -> None:
        """Add what was asked for to a file; where that fails, the end of the task says so."""
        try:
            with Path(file).open("a", encoding="utf-8") as opened:
                opened.write(self.mask(document))
        except OSError as error:
            self.lost.append(errors.LostOutputError(place=file, why=error.strerror))

    @staticmethod
    def _print(stream: TextIO, *lines: str, end: str = "\n") -> None:
        for line in lines:
            print(line, end=end, flush=True, file=stream)

    def confirms(self, question: str) -> bool | None:
        """Ask the person at the terminal, where no is the default; None: there is no terminal."""
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return None
        self._print(sys.stdout, f"{self.mask(question)} [y/N] ", end="")  # input() would write it to stderr
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def complain(self, error: errors.RecipeError) -> None:
        """Print what is wrong, what it concerns, and what helps."""
        self.progress("")
        self.aside(*error.lines("" if isinstance(error, errors.StoppedError) else self.target))

    def ended(self, code: int) -> int:
        """Say what could not be written, if anything; return the exit code, which that makes 1 if it was 0."""
        lost = self.lost[:1]
        for error in lost:
            self.complain(error)
        self.lost.clear()
        return code or (lost[0].exit_code if lost else 0)

    def aside(self, *lines: str) -> None:
        """Print to stderr."""
        self._print(sys.stderr, *map(self.mask, lines))


def _margin(line: str) -> int:
    """Return where the text begins, behind labels that two blanks or more set apart."""
    labels = re.match(r"(?:\S* {2,})*", line)
    return labels.end() if labels else 0


class _Output(io.FileIO):
    """stdout or stderr, which end no work: what cannot be written is lost, and said unless nobody reads any more."""

    def write(self, text: ReadableBuffer, /) -> int:
        """Write it, or what the system takes of it."""
        try:
            while (written := cast("int | None", super().write(text))) is None:  # somebody made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                CONSOLE.lost.append(errors.LostOutputError(place=_OUTPUTS[self.fileno()], why=error.strerror))
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(text).nbytes
        return written


_OUTPUTS = {1: "stdout", 2: "stderr"}


def _make_usable() -> None:
    """Let no stream end a task, nor Invoke's own listing: closed, unread, on a full disk, of a narrow locale."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for as long as we live
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            if stream in (sys.__stdout__, sys.__stderr__):  # and not a test's
                setattr(sys, name, _lasting(stream))


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
    at_once = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=at_once)


@atexit.register
def _end() -> None:
    """Say what was lost of Invoke's own words: it is too late for an exception."""
    sys.stdout.flush()
    if code := CONSOLE.ended(0):
        os._exit(code)


_make_usable()
CONSOLE = Console()


def _masked(value: object, mask: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {name: _masked(of, mask) for name, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(each, mask) for each in value]
    return value


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
        CONSOLE.complain(ending)
        code = ending.exit_code
    if code := CONSOLE.ended(code):
        raise SystemExit(code) from cause


def as_message(error: BaseException) -> errors.RecipeError:
    """Return the error that has a message for people; Python's own would be a traceback, unmasked."""
    match error:
        case errors.RecipeError():
            return error
        case errors.StatementError():  # of a statement that belongs to no step: the survey, say
            kind = errors.for_sqlstate(error.sqlstate)
            return kind(what=error.message, where=error.where, remedy=error.remedy)
        case KeyboardInterrupt():
            return errors.StoppedError()
        case ImportError():
            return errors.NoPackageError(why=error, where=f"Python's environment is {sys.prefix}")
        case OSError():
            return errors.SystemRefusesError(why=error.strerror or error, where=str(error.filename or ""))
    import traceback

    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = "\n".join(f"{frame.filename}, line {frame.lineno}, in {frame.name}" for frame in frames)
    return errors.UnforeseenError(why=f"{type(error).__name__}: {error}", where=where)
