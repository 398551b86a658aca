"""The console: where a task's lines go, and how it ends. Light to import: it is there before anything can fail."""

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
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from budget_engine import errors
from budget_engine.spelling import readable, shown

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PEOPLE = "table"  # the format that people read; the others are for machines
LABEL = 9  # columns: the label that begins a line, and the air behind it
_WORDS = {"32": "done ok +", "33": "waiting note pending partial ~", "1;31": "conflict error PROBLEM !"}
_COLOURS = {word: colour for colour, words in _WORDS.items() for word in words.split()}
_COLOURED = re.compile(rf"( *|  \w+ +)({'|'.join(map(re.escape, _COLOURS))})(?= |$)")
_TASKS = re.compile(
    r"\binvoke (--dry )?(?=(?:setup|prereqs|fix|verify|status|plan|rehearse|doctor|fleet|db\.[a-z]+"
    r"|[a-z]+(?:-[a-z]+)+)\b)"  # the steps' tasks have names of several words
)
_COMMAND = re.compile(r"^( *)(:(?=:)|\\(?!u[0-9a-f]{4}))")  # so begin those of GitHub Actions in a log, and of psql
_write = partial(print, flush=True)


class Console:
    """Results to stdout, errors to stderr, neither ever with a secret in it.

    mask: replaced once there are secrets to mask; quiet: only documents, questions and errors are wanted; format: what
    the task prints; command, prefix: how this run was started, which is how messages name tasks.
    """

    def __init__(self) -> None:
        self.mask: Callable[[str], str] = str
        self.quiet = False
        self.format = PEOPLE
        self.target = ""  # what is being worked on, once that is known
        self.lost: list[errors.RecipeError] = []  # what could not be written, until that is said
        self.command = str(sys._xoptions.get("ran_as", "inv" if Path(sys.argv[0]).name == "inv" else "invoke"))
        self.prefix = ""  # of the tasks' names, in an application's own menu
        self.home = Path(__file__).parents[3]  # the folder of .env and of the embedded server's data
        self.first = ""  # a line that goes before all others; a fuller one may replace it until then
        self._progress = ""  # the line that the next one is to replace

    @property
    def _for_people(self) -> TextIO:
        """Where lines go: a document has stdout for itself."""
        return sys.stdout if self.format == PEOPLE else sys.stderr

    def progress(self, line: str) -> None:
        """Show on a terminal, and nowhere else, how far something is; the next line takes its place, "" none."""
        if line != self._progress and self._for_people.isatty() and not self.quiet:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be taken back
            _write(f"\r\x1b[K{shown(self._spelled(line))[:width]}", end="", file=self._for_people)
            self._progress = line

    def say(self, *lines: str) -> None:
        """Print the lines at once: a pipe would otherwise keep them back until the end."""
        self.progress("")
        first, self.first = self.first, ""
        if not self.quiet:
            self._print(self._for_people, *([first] if first else []), *lines)

    def emit(self, document: str) -> None:
        """Print what was asked for, whole, on stdout."""
        _write(shown(self.mask(document), kept="\n"))

    def emit_json(self, document: Mapping[str, object]) -> None:
        """Print a JSON document, its texts masked one by one: null, which is no text, may be somebody's password."""
        whole = json.dumps(masked(document, self._spelled), indent=2, ensure_ascii=False)
        _write(shown(whole, kept="\n"))

    def append(self, file: str, document: str) -> None:
        """Add what was asked for to a file; where that fails, the end of the task says so."""
        try:
            with Path(file).open("a", encoding="utf-8") as opened:
                opened.write(shown(self.mask(document), kept="\n"))
        except OSError as error:
            self.lost.append(errors.LOST_OUTPUT(place=file, why=error.strerror))

    def confirms(self, question: str) -> bool:
        """Ask the person at the terminal, if there is one; no is the default."""
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return False
        _write(f"{self.mask(question)} [y/N] ", end="")  # input() would write it to stderr
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def aside(self, *lines: str) -> None:
        """Print to stderr."""
        self.say()
        self._print(sys.stderr, *lines)

    def _spelled(self, text: str) -> str:
        """Mask the secrets, and name the tasks as this run was started."""
        return self.mask(_TASKS.sub(lambda found: f"{self.command} {found[1] or ''}{self.prefix}", readable(text)))

    def _print(self, stream: TextIO, *lines: str) -> None:
        for line in "\n".join(lines).split("\n") if lines else ():
            spelled = _COMMAND.sub(lambda sign: f"{sign[1]}\\u{ord(sign[2]):04x}", shown(self._spelled(line)))
            for part in _fitted(spelled) if stream.isatty() else [spelled]:
                _write(part, file=stream)


def _fitted(line: str) -> list[str]:
    """Break a line where a terminal would break it within words, and colour its label.

    Commands and their comments stay whole: what a break brings to a line's beginning would be read as another one.
    """
    width = shutil.get_terminal_size().columns
    parts = [line]
    if len(line) > width and not (line.endswith((";", r"\gexec")) or line.lstrip().startswith("-- ")):
        margin = _margin(line, width * 3 // 5)
        start, rest = line[:margin], line[margin:]
        wrapper = textwrap.TextWrapper(width, start, " " * margin, break_long_words=False, break_on_hyphens=False)
        glued = re.sub(r" +(?=\\)", lambda blanks: "\0" * len(blanks[0]), rest)  # what begins a line, psql may obey
        parts = [part.replace("\0", " ") for part in wrapper.wrap(glued)] or parts
    return [_coloured(parts[0]), *parts[1:]]


def _margin(line: str, most: int) -> int:
    """Return where the text begins, behind its label and what two blanks or more set apart, if that is not too far."""
    label = LABEL if re.match(r"\S{1,8} *$", line[:LABEL]) and line[LABEL - 1 : LABEL] == " " else 0
    return max([label, *(found.end() for found in re.finditer(" {2,}", line) if found.end() <= most)])


def _coloured(line: str) -> str:
    """Colour the label, the sign or the state that begins a line, unless NO_COLOR or TERM=dumb asks for none."""
    found = _COLOURED.match(line)
    if not found or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return line
    return f"{found[1]}\x1b[{_COLOURS[found[2]]}m{found[2]}\x1b[0m{line[found.end() :]}"


class _Output(io.FileIO):
    """stdout or stderr, which end no work: what cannot be written is lost, and said unless nobody reads any more."""

    def write(self, text: ReadableBuffer, /) -> int:
        """Write it, or what the system takes of it."""
        try:
            while (written := cast("int | None", super().write(text))) is None:  # somebody made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                CONSOLE.lost.append(errors.LOST_OUTPUT(place=_OUTPUTS[self.fileno()], why=error.strerror))
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
                buffer = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
                at_once = stream.line_buffering or stream.write_through
                lasting = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=at_once)
                setattr(sys, name, lasting)


@atexit.register
def _end() -> None:
    """Say what was lost of Invoke's own words: it is too late for an exception."""
    sys.stdout.flush()
    if CONSOLE.lost:
        print(f"error    {CONSOLE.lost[0].what}", file=sys.stderr, flush=True)
        os._exit(CONSOLE.lost[0].exit_code)


_make_usable()
CONSOLE = Console()


def masked(value: object, mask: Callable[[str], str]) -> object:
    """Return a JSON value, its texts masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {name: masked(of, mask) for name, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(each, mask) for each in value]
    return value


# ── how a task ends ────────────────────────────────────────────────────────────────────────────────────────────────


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
