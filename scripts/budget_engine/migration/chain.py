"""The chain: the files of db/migrations in their order, each a list of statements.

A file says in its header what task runs it, and where it has to come before another one. What stands between BEGIN and
COMMIT runs in one transaction; what follows COMMIT runs concurrently: each statement alone, outside any transaction.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from budget_engine import PACKAGE, errors
from budget_engine.migration.checks import Check, Kind

DB = next(folder / "db" for folder in (PACKAGE, PACKAGE.parents[1]) if (folder / "db").exists() or folder != PACKAGE)
ROOT = DB.parent

_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|(?P<tag>\$\w*\$).*?(?P=tag)|^\\(?P<meta>[^\n]*)|[^-/'"$\\;]+|.""",
    re.S | re.M,
)
_COMMENT = re.compile(r"""--[^\n]*|/\*.*?\*/|(?P<quoted>'(?:[^']|'')*'|"(?:[^"]|"")*")""", re.S)
_FRAME = re.compile(r"BEGIN|COMMIT|SET LOCAL .*", re.S)


@dataclass(frozen=True)
class Statement:
    """One statement of a file; line: where it begins, from 1; concurrent: it runs outside any transaction."""

    step: str
    text: str
    line: int
    concurrent: bool

    @cached_property
    def flat(self) -> str:
        """Its text without comments, white space folded."""
        return " ".join(_without_comments(self.text).split())

    @cached_property
    def new_table(self) -> str | None:
        """The table that it creates, if it is a CREATE TABLE."""
        created = re.match(r"CREATE TABLE (?:IF NOT EXISTS )?(\w+) \(", self.flat)
        return created[1] if created else None

    def declares(self, check: Check) -> bool:
        """Whether it is the CREATE TABLE whose body holds what the check is about."""
        if self.new_table != check.table:
            return False
        parts = _parts(self.flat[self.flat.index("(") + 1 : self.flat.rindex(")")])
        own = next((part for part in parts if part.split(" ", 1)[0] == check.name), "")
        by_itself = any(part.endswith(f"{check.expected} ({check.name})") for part in parts)
        return {
            Kind.TABLE: True,
            Kind.COLUMN: own != "",
            Kind.DEFAULT: own != "",
            Kind.FOREIGN_KEY: " REFERENCES " in own,
            Kind.KEY: by_itself or f" {check.expected} " in f"{own} ",
        }.get(check.kind, False)

    def creates(self, check: Check, *, with_column: bool = True) -> bool:
        """Whether it creates what the check is about, by its own words."""
        return self.declares(check) or check.is_created_by(self.flat, with_column=with_column)


@cache
def _parts(body: str) -> tuple[str, ...]:
    """Split the body of a CREATE TABLE at its commas, those within parentheses and literals apart."""
    parts, depth, quoted, start = [], 0, False, 0
    for position, char in enumerate(body):
        quoted ^= char == "'"
        depth += 0 if quoted else {"(": 1, ")": -1}.get(char, 0)
        if char == "," and depth == 0 and not quoted:
            parts.append(body[start:position].strip())
            start = position + 1
    return (*parts, body[start:].strip())


@dataclass(frozen=True)
class Step:
    """One file: its stem, the task that runs it, its statements."""

    stem: str
    task: str
    statements: tuple[Statement, ...]
    checksum: str
    before: str = ""  # the label of the step that has to come after it, whatever the files' names
    instead_of: str = ""  # the label of the step that it is the alternative to: it runs only where it is asked for

    @property
    def label(self) -> str:
        """The stem without its date: what people call the step."""
        return label(self.stem)

    @cached_property
    def updates(self) -> set[str]:
        """The tables whose rows it updates."""
        return {table for statement in self.statements for table in re.findall(r"\bUPDATE (\w+) SET\b", statement.flat)}

    @property
    def file(self) -> str:
        """The file as people write its path."""
        return f"db/migrations/{self.stem}.sql"


def label(stem: str) -> str:
    """Return the stem without its date."""
    return stem.partition("_")[2]


@dataclass(frozen=True)
class Chain:
    """Every step in its order, the one that is run on request, and the verification of them all."""

    steps: tuple[Step, ...]
    recreate: Step | None
    verification: str  # one SELECT, without its semicolon

    def of(self, task: str | None) -> tuple[Step, ...]:
        """Return the steps that a task runs; None: all of them."""
        return tuple(step for step in self.steps if task in (None, step.task))

    def creating(self, check: Check, *, with_column: bool = True) -> list[Statement]:
        """Return the statements that create what the check is about; with_column: its column is missing, too."""
        asked = (check.key, check.expected, with_column)
        if asked not in self._creating:
            every = (statement for step in self.steps for statement in step.statements)
            self._creating[asked] = [one for one in every if one.creates(check, with_column=with_column)]
        return self._creating[asked]

    @cached_property
    def _creating(self) -> dict[tuple[object, ...], list[Statement]]:
        """What was found: a fleet asks the same of every database."""
        return {}


@cache
def load(db: Path = DB) -> Chain:
    """Read the chain, once. Raises CHECKOUT where a file cannot be read."""
    steps = {path.stem: _read(path) for path in sorted((db / "migrations").glob("*.sql"))}
    order: list[Step] = []
    for step in steps.values():
        if not step.instead_of:
            later = [place for place, other in enumerate(order) if other.label == step.before]
            order.insert(later[0] if later else len(order), step)
    recreate = next((step for step in steps.values() if step.instead_of), None)
    return Chain(tuple(order), recreate, _without_comments(query_of(db / "verify.sql")))


def _read(path: Path) -> Step:
    text = text_of(path)
    header = dict(re.findall(r"^--   (task|before|instead of) +(\S+)", text, re.M))
    step = label(path.stem)
    statements = tuple(_statements(step, text, path.parent))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    before, instead = header.get("before", ""), header.get("instead of", "")
    return Step(path.stem, header.get("task", ""), statements, checksum, label(before), label(instead))


def _statements(step: str, text: str, folder: Path) -> Iterator[Statement]:
    words: list[str] = []
    start, concurrent = 0, False
    for token in _TOKEN.finditer(text):
        if token["meta"] is not None:
            included = re.match(r"ir (\S+)", token["meta"])
            if included:  # what the other file does in its transaction
                others = _statements(label(Path(included[1]).stem), text_of(folder / included[1]), folder)
                yield from (other for other in others if not other.concurrent)
        elif token[0] == ";":
            statement = Statement(step, "".join(words).strip(), text.count("\n", 0, start) + 1, concurrent)
            concurrent = concurrent or statement.flat == "COMMIT"
            if statement.flat and not _FRAME.fullmatch(statement.flat):
                yield statement
            words = []
        elif words or not (token[0].isspace() or token[0].startswith(("--", "/*"))):
            start = start if words else token.start() + len(token[0]) - len(token[0].lstrip())
            words.append(token[0])


def _without_comments(sql: str) -> str:
    """Leave out comments, and the white space before and behind each line: what travels need not be read."""
    kept = _COMMENT.sub(lambda found: found["quoted"] or " ", sql)
    return "\n".join(line for line in (line.strip() for line in kept.splitlines()) if line)


def text_of(file: Path) -> str:
    """Read a file of this project, CRLF as LF, so that checksums and functions are the same on every machine."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise errors.CHECKOUT(file=os.path.relpath(file, ROOT), why=why, where=str(file)) from None


def query_of(file: Path) -> str:
    """Read the query of a file, without its semicolon and what frames it for psql."""
    text = text_of(file)
    return text[text.index("\nWITH ") : text.rindex(";", 0, text.rfind("\nCOMMIT"))]
