"""Where the recipes go and how patient they are: read from the environment, else from .env, else the default.

A URL is taken as people paste it, but never by a guess, and no part of a password gets out: not in a message, not in a
repr, not through libpq's own errors, which quote what they could not parse.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import psycopg
from dotenv.parser import Binding, parse_stream
from dotenv.variables import parse_variables
from psycopg.conninfo import conninfo_to_dict

from budget_engine import errors, libpq


@dataclass(frozen=True)
class Target:
    """A database to connect to, with what may be said about it aloud."""

    conninfo: dict[str, str] = field(repr=False)  # for psycopg.connect(**conninfo)
    display: str  # the URL with *** for the password
    search_path: str | None  # to be set in each transaction: transaction poolers refuse it as a startup option
    notes: tuple[str, ...]  # what was ignored or corrected in the URL
    secrets: tuple[str, ...] = field(repr=False)  # for mask()
    sources: tuple[str, ...] = ()  # what libpq added came from: variables, a service, the password file


@dataclass(frozen=True)
class Settings:
    """Every setting, with its default."""

    target: Target | None  # None: the embedded server
    source: str  # where the target came from, to be printed
    notes: tuple[str, ...] = ()  # what was ignored in .env; what was ignored in the URL is the target's
    lock_timeout_ms: int = 2_000  # LOCK_TIMEOUT; others use 0.5 s (pgroll) to 10 s (strong_migrations)
    lock_wait_s: float = 60  # LOCK_WAIT; as long as dbmate waits for a database
    connect_timeout_s: int = 10  # CONNECT_TIMEOUT; a guess: far servers need about 1 s, libpq's own default is for ever


class _Url(NamedTuple):
    """The parts of a URL, as typed."""

    login: str
    hosts: str
    dbname: str
    parameters: list[tuple[str, str]]


_Given = Mapping[str, tuple[str, str]]  # setting → its value, where that was read

_UNIT_MS = {"us": 0.001, "ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}  # PostgreSQL's units
_LONGEST_MS = 2**31 - 1  # PostgreSQL's limit for lock_timeout
_SHORTEST_SECRET = 4  # masking "a" wherever it stands would destroy the message; `display` masks by position

_OURS = {"schema", "search_path"}
_SSLMODE_OF_SSL = {"true": "require", "1": "require", "false": "prefer", "0": "prefer"}  # other drivers say ssl=…

_ESCAPED = {" ": ["+"], "'": ["\\'", "''"]}  # otherwise than by code: in queries, in libpq's keyword form and SQL
_BLANKS = " \t\r\n\f\v\u00a0\u200b\ufeff"
_QUOTES = "\"'`\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"  # straight and typographic
_WRAPPINGS = {
    "the quotes around it": re.compile(f"[{_QUOTES}](.*)[{_QUOTES}]", re.S),
    '"DATABASE_URL=" in front of it': re.compile(r"(?:export\s+)?DATABASE_URL\s*=(.*)", re.S),
    '"psql" in front of it': re.compile(r"psql\s(.*)", re.S),
}
_POSTGRES = re.compile(r"postgres(?:ql)?(\+\w+)?://(.*)", re.I)
# A list, because what else stands before :// may be a password.
_OTHER_SCHEME = re.compile(
    r"(sqlite|jdbc|(?:\w*sql|mariadb|oracle|mongodb|redis|cockroachdb|https?|file|prisma)[\w+.-]*(?=://)):", re.I
)
_HOST = r"(?:\[[\w:.%]+\]|[\w.~%-]*)(?::\d{1,5})?"
_HOST_NAME = re.compile(r"/[^@]*|[\w.~-]*|[0-9A-Fa-f:.]+(?:%[\w.-]+)?")  # a folder of sockets, a name, an address
_LOGIN = re.compile(r"://|.:.+@.", re.S)
_AFTER_LOGIN = re.compile(rf"(?P<hosts>{_HOST}(?:,{_HOST})*)(?:/(?P<dbname>[^@?\s]*|[^/?\s]*))?(?:\?(?P<query>.*))?")
_NAME = re.compile(r"[\w.-]+")
_PARAMETER = re.compile(r"([\w.-]+)=(.*)")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SEARCH_PATH_OPTION = re.compile(r"(?<!\S)(?<!\\\s)(?:-c\s*|--)search[_-]path=((?:\\.|[^\s\\])*)\s*", re.I)

_URL_FORM = "postgresql://USER:PASSWORD@HOST:PORT/DBNAME"
_ENCODING_HELP = (
    f"Write {_URL_FORM}, user and password percent-encoded (@ is %40, : %3A, / %2F, ? %3F, # %23, % %25), as by\n"
    "python3 -c 'import getpass, urllib.parse as u; print(u.quote(getpass.getpass(), safe=\"\"))'"
)


def load(root: Path, environ: Mapping[str, str]) -> Settings:
    """Read every setting; the environment wins over <root>/.env."""
    values, notes = parse_env_file(_read_env_file(root / ".env"), environ)
    given = {name: (value, ".env") for name, value in values.items()}
    given |= {name: (value, f"environment variable {name}") for name, value in environ.items()}
    target, source = _choose_target(given, in_ci=_is_true(environ.get("CI", "")))
    lock_timeout_ms = _duration_ms(given, "LOCK_TIMEOUT", Settings.lock_timeout_ms, plain="ms", least_ms=1)
    lock_wait_ms = _duration_ms(given, "LOCK_WAIT", Settings.lock_wait_s * 1000, plain="s", least_ms=0)
    connect_ms = _duration_ms(given, "CONNECT_TIMEOUT", Settings.connect_timeout_s * 1000, plain="s", least_ms=1000)
    return Settings(target, source, notes, round(lock_timeout_ms), lock_wait_ms / 1000, math.ceil(connect_ms / 1000))


def _is_true(text: str) -> bool:
    return text.strip().lower() not in {"", "0", "false", "no", "off"}


def _read_env_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise errors.EnvFileError(where=f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise errors.EnvEncodingError(where=str(path)) from None


def parse_env_file(text: str, environ: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Read .env as python-dotenv does; the notes say what python-dotenv would pass over in silence."""
    bindings = list(parse_stream(StringIO(text)))
    broken = [binding for binding in bindings if binding.error]
    if "DATABASE_URL" not in environ:
        _refuse_broken_url(broken)
        _refuse_shortened_url(bindings)
    notes = [f"ignored in .env: line {_line(binding)}, which is not of the form NAME=VALUE" for binding in broken]
    url_lines = [str(_line(binding)) for binding in bindings if binding.key == "DATABASE_URL"]
    if len(url_lines) > 1:
        notes.append(f"ignored in .env: every DATABASE_URL but the last one (lines {', '.join(url_lines)})")
    if ineffective := [binding.key for binding in bindings if binding.key in libpq.VARIABLES]:
        notes.append(f"ignored in .env: {', '.join(dict.fromkeys(ineffective))} (libpq's: only in the environment)")
    values: dict[str, str] = {}
    for binding in bindings:
        if binding.key:
            atoms = parse_variables(binding.value or "")
            values[binding.key] = "".join(atom.resolve({**values, **environ}) for atom in atoms)
    return values, tuple(notes)


def _refuse_broken_url(broken: Iterable[Binding]) -> None:
    """Ignoring such a line would send the recipes to the embedded server."""
    for binding in broken:
        if re.search(r"^[^#\n]*\bDATABASE_URL\b", binding.original.string, re.M):
            raise errors.EnvLineError(where=f"line {_line(binding)}")


def _refuse_shortened_url(bindings: Sequence[Binding]) -> None:
    """Refuse a URL that goes on behind a raw " #", or on the next line: the beginning may pass for another URL."""
    for binding, next_one in zip(bindings, [*bindings[1:], None], strict=False):
        if binding.key != "DATABASE_URL":
            continue
        _, _, rest = binding.original.string.partition(binding.value or "\n")
        if re.match(r"\s+#.*@", rest) or (next_one and _may_go_on(next_one)):
            remedy = "Write the URL on one line, in single quotes: without them a comment begins at a # behind a blank."
            raise errors.EnvLineError(where=f"line {_line(binding)}", remedy=remedy)


def _may_go_on(binding: Binding) -> bool:
    """Tell whether this may be the rest of the URL above: no NAME=VALUE, no comment, but one word, or with an @."""
    is_pair = binding.value is not None and _NAME.fullmatch(binding.key or "")
    is_comment = binding.key is None and not binding.error
    return not is_pair and not is_comment and re.fullmatch(r"\S+|.*@.*", binding.original.string.strip()) is not None


def _line(binding: Binding) -> int:
    text = binding.original.string  # begins with the blank lines above the binding
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _choose_target(given: _Given, *, in_ci: bool) -> tuple[Target | None, str]:
    if "DATABASE_URL" not in given and in_ci:
        raise errors.NoUrlInCiError(where="environment and .env")
    if "DATABASE_URL" not in given:
        return None, "embedded server (no DATABASE_URL in the environment or .env)"
    text, source = given["DATABASE_URL"]
    if text.strip(_BLANKS + _QUOTES).lower() == "embedded":
        return None, f"embedded server (asked for by {source})"
    return parse_target(text, source), source


def _duration_ms(given: _Given, name: str, default_ms: float, *, plain: str, least_ms: float) -> float:
    """Read "2s", "1.5 min", or a number without a unit, which is of the unit `plain`; empty is the default."""
    text, source = given.get(name, ("", ""))
    if not (text := text.strip(_BLANKS + _QUOTES)):
        return default_ms
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text)
    duration_ms = float(match[1]) * _UNIT_MS.get(match[2] or plain, math.nan) if match else math.nan
    if not least_ms <= duration_ms <= _LONGEST_MS:
        units = f"{', '.join(_UNIT_MS)}; none means {plain}"
        raise errors.DurationError(name=name, where=source, units=units, least_ms=least_ms, most_ms=_LONGEST_MS)
    return duration_ms


def parse_target(text: str, source: str = "DATABASE_URL") -> Target:
    """Understand a pasted URL, or libpq's keyword form."""
    text, notes = _unwrap(text)
    if not text.strip(_QUOTES):
        raise errors.EmptyUrlError(form=_URL_FORM, where=source)
    if not text.isprintable():
        raise errors.UnprintableUrlError(where=source)
    if match := _POSTGRES.fullmatch(text):
        driver = [f"ignored in DATABASE_URL: {match[1]} in the scheme"] if match[1] else []
        return _target_of_url(match[2], source, [*notes, *driver])
    if re.match(r"\w+\s*=", text):
        conninfo = _ask_libpq(text, source)
        _refuse_misplaced_login(conninfo, source)
        return _target_of_conninfo(conninfo, notes)
    scheme = _OTHER_SCHEME.match(text)
    found = f"begins with {scheme[1]}:" if scheme else "is neither a URL nor libpq's keyword form (host=… dbname=…)"
    raise errors.OtherUrlError(found=found, form=_URL_FORM, where=source)


def _unwrap(text: str) -> tuple[str, list[str]]:
    """Take off what was pasted along with the URL."""
    bare = text.strip(_BLANKS)
    notes = ["ignored in DATABASE_URL: blanks around it"] if bare != text else []
    for what, wrapping in _WRAPPINGS.items():
        if match := wrapping.fullmatch(bare):
            inner, inner_notes = _unwrap(match[1])
            return inner, list(dict.fromkeys([*notes, f"ignored in DATABASE_URL: {what}", *inner_notes]))
    return bare, notes


def _target_of_url(rest: str, source: str, notes: list[str]) -> Target:
    url = _split_url(rest)
    if url is None:
        raise errors.AmbiguousUrlError(where=source, remedy=_ENCODING_HELP)
    typed_secrets = [url.login.partition(":")[2], *(value for name, value in url.parameters if name in libpq.SECRET)]
    search_paths = [_as_search_path(name, unquote(value)) for name, value in url.parameters if name in _OURS]
    conninfo = _ask_libpq(_normalize(url), source)
    _refuse_misplaced_login(conninfo, source)
    return _target_of_conninfo(conninfo, [*notes, *_notes_on_url(url)], typed_secrets, search_paths)


def _split_url(rest: str) -> _Url | None:
    """Split what follows the scheme: the login ends at the first @ (or none) that leaves something well-formed.

    So "u:p@ss/word@host/db" is understood as meant, where libpq would go to a host "ss". In "u:p@ss/word@host" the last
    part may be a host as well as a database's name; guessing wrong would send the password to a stranger: None.
    """
    for start in (0, *(at.end() for at in re.finditer("@", rest))):
        match = _AFTER_LOGIN.fullmatch(rest, start)
        parameters = _split_query(match["query"] or "") if match else None
        if match and parameters is not None:
            login, dbname = rest[: max(start - 1, 0)], match["dbname"] or ""
            is_a_guess = "@" in dbname or _is_no_login(login, match["hosts"])
            return None if is_a_guess else _Url(login, match["hosts"], dbname, parameters)
    return None


def _is_no_login(login: str, hosts: str) -> bool:
    """Tell whether a raw character in the user's name may stand for the : between user and password.

    Azure's "ada@server" is a user's name, where the host is the server's.
    """
    user, colon, _ = login.partition(":")
    _, at, server = user.partition("@")
    is_azures = colon and hosts.startswith(f"{server}.")
    return re.search(r"[/?#\s]", user) is not None or bool(at and not is_azures)


def _split_query(query: str) -> list[tuple[str, str]] | None:
    """Split into names and values; None where this is no query but, say, the end of a password with a ? in it."""
    pieces = [_PARAMETER.fullmatch(piece) for piece in query.split("&") if piece]
    if not all(piece and _is_parameter(piece[1], piece[2]) for piece in pieces):
        return None
    return [_as_sslmode(piece[1], piece[2]) for piece in pieces if piece]


def _is_parameter(name: str, value: str) -> bool:
    if name != "options" and name not in libpq.SECRET and re.search(r"\s\w+\s*=", value):
        return False  # libpq's other form begins here: "sslmode=require password=…"
    return "@" not in value or name in libpq.KNOWN | _OURS


def _as_sslmode(name: str, value: str) -> tuple[str, str]:
    """Translate ssl=…, because to drop it as unknown would be to connect without TLS in silence."""
    return ("sslmode", _SSLMODE_OF_SSL.get(value.lower(), value)) if name == "ssl" else (name, value)


def _as_search_path(name: str, value: str) -> str:
    """Take ?search_path= as it is; ?schema= is one name, to be quoted where SQL would fold or split it."""
    plain = name == "search_path" or re.fullmatch(r"[a-z_][a-z0-9_$]*|", value)
    return value if plain else '"' + value.replace('"', '""') + '"'


def _normalize(url: _Url) -> str:
    """Write the URL as libpq wants it, without the parameters that libpq does not know."""
    login = ":".join(_percent_encode(part) for part in url.login.split(":", 1))
    query = "&".join(f"{name}={_percent_encode(value)}" for name, value in url.parameters if name in libpq.KNOWN)
    return f"postgresql://{login}@{url.hosts}/{_percent_encode(url.dbname)}?{query}"


def _percent_encode(part: str) -> str:
    """Encode what is not encoded yet; a % that begins no code stands for itself."""
    return quote(_BARE_PERCENT.sub("%25", part), safe="%")


def _notes_on_url(url: _Url) -> list[str]:
    notes = []
    if re.search(r"[@/?#\s]", url.login) or _BARE_PERCENT.search(url.login):
        notes.append("corrected in DATABASE_URL: user or password hold characters that must be percent-encoded")
    unknown = dict.fromkeys(name for name, _ in url.parameters if name not in libpq.KNOWN | _OURS)
    # In ?password=a&b=c the name "b" may be the rest of a password with a raw & in it.
    speakable = not any(name in libpq.SECRET for name, _ in url.parameters)
    if unknown:
        names = ", ".join(unknown) if speakable else f"{len(unknown)} in number"
        notes.append(f"ignored in DATABASE_URL: parameters that libpq does not know ({names})")
    return notes


def _ask_libpq(conninfo: str, source: str) -> dict[str, str]:
    try:
        return {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    except (psycopg.Error, UnicodeDecodeError):  # the messages of both quote what they are about
        by_hand = "Write host=… port=… dbname=… user=… password=…, values with blanks in single quotes."
        remedy = _ENCODING_HELP if "://" in conninfo else by_hand
        raise errors.UnparsableUrlError(where=source, remedy=remedy) from None


def _target_of_conninfo(
    conninfo: dict[str, str], notes: Iterable[str], typed_secrets: Iterable[str] = (), search_paths: Iterable[str] = ()
) -> Target:
    options = conninfo.get("options", "")
    option_paths = [re.sub(r"\\(.)", r"\1", path) for path in _SEARCH_PATH_OPTION.findall(options)]
    search_path = next(filter(None, reversed([*option_paths, *search_paths])), None)  # the last one wins, as in libpq
    if options:  # left empty rather than out: libpq would go for PGOPTIONS
        conninfo["options"] = _SEARCH_PATH_OPTION.sub("", options).strip()
    # A whole login in the place of the user's name is a common slip; a name with a colon in it is rare.
    user, colon, behind_colon = conninfo.get("user", "").partition(":")
    if colon and "password" not in conninfo:
        notes = [*notes, f"odd in DATABASE_URL: the name of the user goes on behind {user}: (is that a password?)"]
    secrets = [*typed_secrets, behind_colon, *(value for name, value in conninfo.items() if name in libpq.SECRET)]
    known = tuple(dict.fromkeys(filter(None, secrets)))
    return Target(conninfo, _display(conninfo), search_path, tuple(dict.fromkeys(notes)), known)


def completed(target: Target, source: str) -> Target:
    """Return the target with what libpq adds to it by itself: where it really leads, every secret that may turn up."""
    whole, secrets, sources = libpq.resolve(target.conninfo)
    _refuse_misplaced_login(whole, ", ".join([source, *sources]))
    paths = [target.search_path or ""]
    return replace(_target_of_conninfo(whole, target.notes, [*target.secrets, *secrets], paths), sources=sources)


def _refuse_misplaced_login(conninfo: Mapping[str, str], source: str) -> None:
    """Refuse a login in the place of a host or a database: it would be printed, and asked of a name server."""
    misplaced = {
        "host": not all(map(_HOST_NAME.fullmatch, conninfo.get("host", "").split(","))),
        "database": _LOGIN.search(conninfo.get("dbname", "")),
    }
    for part, is_odd in misplaced.items():
        if is_odd:
            raise errors.MisplacedLoginError(part=part, form=_URL_FORM, where=source)


def _display(conninfo: Mapping[str, str]) -> str:
    given = {name: value for name, value in conninfo.items() if value}
    shown = {name: "***" if name in libpq.SECRET else quote(value, safe="/,:") for name, value in given.items()}
    user, colon, _ = conninfo.get("user", "").partition(":")
    login = quote(user, safe="") + (":***" if colon or "password" in given else "")
    address = _address(conninfo)
    placed = {"user", "password", "dbname"} | ({"host", "port"} if address is not None else set())
    url = f"postgresql://{login}{'@' if login else ''}{address or ''}/{shown.get('dbname', '')}"
    query = "&".join(f"{name}={value}" for name, value in shown.items() if name not in placed)
    return f"{url}?{query}" if query else url


def _address(conninfo: Mapping[str, str]) -> str | None:
    """Return HOST:PORT,… or None where only ?host=…&port=… can say it: sockets; ports that do not pair with hosts."""
    hosts, ports = conninfo.get("host", "").split(","), conninfo.get("port", "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    if len(hosts) != len(ports) or any(host.startswith(("/", "@")) for host in hosts):
        return None
    named = [f"[{host}]" if ":" in host else quote(host) for host in hosts]
    return ",".join(f"{host}:{port}" if port else host for host, port in zip(named, ports, strict=True))


def mask(text: str, secrets: Iterable[str]) -> str:
    """Replace every secret by ***, in each way in which it may be written."""
    long = {secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}
    # One pass, longest first: a secret within another must not leave the other's rest behind.
    pattern = "|".join("".join(map(_spellings, secret)) for secret in sorted(long, key=len, reverse=True))
    return re.sub(pattern, "***", text) if pattern else text


@cache
def _spellings(character: str) -> str:
    """Return a pattern for the character as it is, or as it stands in a URL, in JSON or in XML."""
    code = "".join(f"%{byte:02X}" for byte in character.encode(errors="replace"))
    written = {character, html.escape(character), json.dumps(character)[1:-1], *_ESCAPED.get(character, [])}
    return f"(?:{'|'.join(map(re.escape, sorted(written, key=len, reverse=True)))}|(?i:{code}))"
