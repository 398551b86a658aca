"""The file .env: which one counts, what it says, and what in it, or around it, may lead to the wrong database.

It is looked for in the home of the run (the folder of the tasks.py in use) and upwards, to the top of the repository
that holds it. What lies further up belongs to somebody else: nothing is taken from there, and nothing is guessed.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from io import StringIO
from itertools import pairwise, takewhile
from pathlib import Path

from dotenv.parser import Binding, parse_stream
from dotenv.variables import parse_variables

from budget_engine import errors, libpq

URL = "DATABASE_URL"
CHOICE = "ENV_FILE"  # in the environment: the one file to be read
BLANKS = " \t\r\n\f\v\u00a0\u200b\ufeff"
QUOTES = "\"'`\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"  # straight and typographic

_NAME = re.compile(r"[\w.-]+")
_POSTGRES_URL = re.compile(r"(?:jdbc:|prisma\+)?(?:postgres|postgresql|psql|pgsql|postgis)(?:\+\w+)?://", re.I)
_LETTERS = "DATABASEURL"
_PART_OF_A_URL = re.compile(r"(?:PG|POSTGRES|DB).*(?:HOST|SERVER|NAME)", re.I)


@dataclass(frozen=True)
class EnvFile:
    """One file, as python-dotenv reads it. name: as messages call it; is_ours: in the home of the run."""

    name: str
    is_ours: bool
    bindings: tuple[Binding, ...]
    values: Mapping[str, str]


def read(home: Path, environ: Mapping[str, str]) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """Read the file in the home of the run and, where the environment has no DATABASE_URL, the one that has it.

    Return what they say (setting → its value, the file it is from; of an application's file the URL alone), and what in
    them was ignored.
    """
    home = home.resolve()
    paths, beyond = _places(home, environ)
    files: list[EnvFile] = []
    for path in paths:
        files.append(_read(path, home, environ))
        if URL in environ or URL in files[-1].values:
            break
    given = {
        name: (value, file.name) for file in files for name, value in file.values.items() if file.is_ours or name == URL
    }
    said = [note for file in files for note in notes(file)]
    if URL not in environ and URL not in given:
        _refuse_other_names(files)
        if CHOICE in environ:
            raise errors.ENV_FILE_CHOICE(why=f"names a file without {URL}", where=str(paths[0]))
        _refuse_what_lies_beyond(beyond, home, environ)
        said += _notes_on_other_names(files, environ)
    elif URL not in environ:
        for path in paths[len(files) :]:
            with suppress(errors.SettingsError):  # whatever is wrong with it: it does not count
                file = _read(path, home, environ)
                if file.values.get(URL, given[URL][0]) != given[URL][0]:
                    said.append(f"ignored in {file.name}: another DATABASE_URL")
    return given, tuple(said)


def is_embedded(text: str) -> bool:
    """Whether this asks for the embedded server by name."""
    return text.strip(BLANKS + QUOTES).lower() == "embedded"


def is_open(path: Path) -> bool:
    """Whether every user of this machine may read it: the file, and the way there."""
    return bool(
        os.name == "posix"
        and path.stat().st_mode & stat.S_IROTH
        and all(folder.stat().st_mode & stat.S_IXOTH for folder in path.resolve().parents)
    )


# ── where it is looked for ─────────────────────────────────────────────────────────────────────────────────────────


def _places(home: Path, environ: Mapping[str, str]) -> tuple[list[Path], list[Path]]:
    """Return the files that count, the nearest first, and those beyond, of which one may be meant."""
    if CHOICE in environ:
        if not environ[CHOICE].strip():
            raise errors.ENV_FILE_CHOICE(why="is set, but empty", where=f"environment variable {CHOICE}")
        path = Path(environ[CHOICE]).expanduser().absolute()  # of the current folder, as shells complete it
        return [path.parent.resolve() / path.name], []
    top, homes = _top(home), _homes_of_users(home, environ)
    upwards = partial(takewhile, lambda folder: not _is_barred(folder.resolve(), homes))  # as far as one may
    allowed = [home, *upwards(home.parents)]
    inside = [folder for folder in allowed if folder.is_relative_to(top)]
    kept = _git_folder(top)
    is_linked = kept.parent.name == "worktrees" and kept.parents[1].name == ".git"
    main = [kept.parents[2] / folder.relative_to(top) for folder in inside] if is_linked else []  # the main checkout's
    typed = Path(environ.get("PWD", ""))  # where a shell is that came here through a link
    around = typed.parents if typed.is_absolute() and typed.resolve() == home else []
    others = [*upwards(main), *upwards(around), *allowed]
    beyond = dict.fromkeys(folder for folder in others if folder not in inside)
    return [folder / ".env" for folder in inside], [folder / ".env" for folder in beyond]


def _top(home: Path) -> Path:
    """Return the top of the repository that holds it: of the outermost superproject, where that is a submodule."""
    tops = [folder for folder in (home, *home.parents) if (folder / ".git").exists()]
    for below, above in pairwise(tops):
        modules, kept = _git_folder(above) / "modules", _git_folder(below)
        is_worktree = kept.parent.name == "worktrees" and kept.parents[1] != modules  # of a module
        if is_worktree or not kept.is_relative_to(modules):
            return below
    return tops[-1] if tops else home


def _git_folder(top: Path) -> Path:
    """Return where git keeps what belongs to this checkout: .git, or where the file of that name leads."""
    git = top / ".git"
    with suppress(OSError, UnicodeDecodeError, ValueError):
        if git.is_file() and (leads_to := re.match(r"gitdir:\s*(.+)", git.read_text(encoding="utf-8"))):
            return (top / leads_to[1].strip()).resolve()
    return git.resolve()


def _homes_of_users(home: Path, environ: Mapping[str, str]) -> set[Path]:
    """Return the home folders of who runs this, of who did so by sudo, and of whose folder it is."""
    names, folders = ["~", f"~{environ.get('SUDO_USER', '')}"], [Path(environ.get("HOME", ""))]
    with suppress(KeyError, OSError, NotImplementedError):  # a user without a name; Windows
        names.append(f"~{home.owner()}")
    for name in names:
        with suppress(RuntimeError):  # there is no such user
            folders.append(Path(name).expanduser())
    return {folder.resolve() for folder in folders if folder.is_absolute()}


def _is_barred(folder: Path, homes: Iterable[Path]) -> bool:
    """Whether it is a user's home folder, or above one, or (/tmp) a folder in which anybody may put a file."""
    anybodys = stat.S_ISVTX | stat.S_IWOTH
    with suppress(OSError):  # it is not there: a folder of the main checkout
        if folder.stat().st_mode & anybodys == anybodys:
            return True
    return any(home.is_relative_to(folder) for home in homes)


# ── what it says ───────────────────────────────────────────────────────────────────────────────────────────────────


def _read(path: Path, home: Path, environ: Mapping[str, str]) -> EnvFile:
    is_ours, is_chosen = path.is_relative_to(home), CHOICE in environ
    name = str(path.relative_to(home) if is_ours else path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise errors.ENV_ENCODING(file=name, where=str(path)) from None
    except OSError as error:
        is_none = isinstance(error, FileNotFoundError | NotADirectoryError)
        is_none |= isinstance(error, IsADirectoryError) and not is_ours  # an application's virtual environment, perhaps
        if is_chosen or not is_none:
            remedy = f"Correct {CHOICE}, or unset it." if is_chosen else ""
            raise errors.ENV_FILE(file=name, where=f"{path}: {error.strerror}", remedy=remedy) from None
        text = ""
    return parse(text, environ, name, is_ours=is_ours)


def parse(text: str, environ: Mapping[str, str], name: str = ".env", *, is_ours: bool = True) -> EnvFile:
    """Read it as python-dotenv does; refuse a URL that cannot be read whole, where it would count."""
    bindings = tuple(parse_stream(StringIO(text)))
    if URL not in environ:
        _refuse_part_of_url(bindings, name)
    values: dict[str, str] = {}
    for binding in bindings:
        if binding.key:
            atoms = parse_variables(binding.value or "")
            values[binding.key] = "".join(atom.resolve({**values, **environ}) for atom in atoms)
    return EnvFile(name, is_ours, bindings, values)


def _refuse_part_of_url(bindings: Sequence[Binding], name: str) -> None:
    """Refuse a URL that goes on behind a raw " #", or on the next line: the beginning may pass for another URL.

    And one on a line that cannot be read: to ignore it would lead to the embedded server.
    """
    for binding, next_one in zip(bindings, [*bindings[1:], None], strict=False):
        text = binding.original.string
        _, _, rest = text.partition(binding.value or "\n")
        goes_on = binding.key == URL and (re.match(r"\s+#.*@", rest) or (next_one and _may_go_on(next_one)))
        if goes_on or (binding.error and re.search(rf"^[^#\n]*\b{URL}\b", text, re.M)):
            way = "Write the URL on one line, in single quotes: without them a comment begins at a # behind a blank."
            raise errors.ENV_LINE(file=name, where=f"line {_line(binding)}", remedy=way if goes_on else "")


def _may_go_on(binding: Binding) -> bool:
    """Tell whether this may be the rest of the URL above: no NAME=VALUE, no comment, but one word, or with an @."""
    is_pair = binding.value is not None and _NAME.fullmatch(binding.key or "")
    is_comment = binding.key is None and not binding.error
    return not is_pair and not is_comment and re.fullmatch(r"\S+|.*@.*", binding.original.string.strip()) is not None


def _line(binding: Binding) -> int:
    text = binding.original.string  # begins with the blank lines above the binding
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


# ── what it, or the environment, says and does not count ───────────────────────────────────────────────────────────


def notes(file: EnvFile) -> Iterator[str]:
    """Say what python-dotenv would pass over in silence; of an application's file only what concerns the URL."""
    if file.is_ours:
        broken = [_line(binding) for binding in file.bindings if binding.error]
        yield from (f"ignored in {file.name}: line {line}, which is not of the form NAME=VALUE" for line in broken)
    lines = [str(_line(binding)) for binding in file.bindings if binding.key == URL]
    if len(lines) > 1:
        yield f"ignored in {file.name}: every {URL} but the last one (lines {', '.join(lines)})"
    if file.is_ours and (ineffective := [name for name in file.values if name in libpq.VARIABLES]):
        yield f"ignored in {file.name}: {', '.join(ineffective)} (libpq's: only in the environment)"


def _refuse_what_lies_beyond(paths: Iterable[Path], home: Path, environ: Mapping[str, str]) -> None:
    """Refuse to fall back on the embedded server where a file that does not count may hold the URL that is meant."""
    for path in paths:
        try:
            value = _read(path, home, environ).values.get(URL, "").strip(BLANKS + QUOTES)
        except errors.SettingsError as error:
            if error.case is not errors.ENV_LINE:
                raise
            value = "one that cannot be read"
        if value and not is_embedded(value):
            raise errors.BEYOND(file=path, quoted=shlex.quote(str(path)))


def _refuse_other_names(files: Iterable[EnvFile]) -> None:
    """Refuse to fall back on the embedded server where a URL stands under another name."""
    where = [
        f"{file.name}, line {_line(binding)}: {binding.key if _NAME.fullmatch(binding.key) else 'without a name'}"
        for file in files
        for binding in file.bindings
        if binding.key and _is_url(binding.key, file.values[binding.key])
    ]
    if where:
        raise errors.OTHER_NAME(where="\n".join(where))


def _is_url(name: str, value: str) -> bool:
    """Whether it is meant for DATABASE_URL, or could be: by its value, as a URL without a name, by its name."""
    return any(_POSTGRES_URL.match(text.strip(BLANKS + QUOTES)) for text in (value, name)) or _is_slip_of_the_pen(name)


def _is_slip_of_the_pen(name: str) -> bool:
    """Whether one edit, or two letters that change places, make it DATABASE_URL."""
    plain = re.sub("[^A-Z]", "", name.upper())
    return abs(len(plain) - len(_LETTERS)) <= 1 and SequenceMatcher(None, plain, _LETTERS).ratio() > 0.9


def _notes_on_other_names(files: Iterable[EnvFile], environ: Mapping[str, str]) -> Iterator[str]:
    """Say what may be meant for a URL, and is not read: parts of one; in the environment, other tools' URLs."""
    for file in files:
        names = [name for name, value in file.values.items() if value and _NAME.fullmatch(name)]
        if parts := [name for name in names if _PART_OF_A_URL.match(name) and name not in libpq.VARIABLES]:
            yield f"ignored in {file.name}: {', '.join(parts)} (only {URL} says which database)"
    names = [name for name, value in environ.items() if value and _NAME.fullmatch(name)]
    if others := [name for name in names if _PART_OF_A_URL.match(name) or _is_url(name, environ[name])]:
        yield f"ignored in the environment: {', '.join(others)} (only {URL} says which database)"
