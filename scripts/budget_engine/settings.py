"""Where the recipes go and how patient they are: read from the environment, else from .env, else the default.

A URL is taken as people paste it, but never by a guess, and no part of a password gets out: not in a message, not in a
repr, not through libpq's own errors, which quote what they could not parse.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

import psycopg
from psycopg.conninfo import conninfo_to_dict

from budget_engine import env_file, errors, libpq
from budget_engine.env_file import BLANKS, QUOTES, is_embedded


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


_Given = Mapping[str, tuple[str, str]]  # setting → its value, where that was read
_Parameters = list[tuple[str, str]]  # of a URL, as typed
_UNIT_MS = {"us": 0.001, "ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}  # PostgreSQL's units
_LONGEST_MS = 2**31 - 1  # PostgreSQL's limit for lock_timeout
_SHORTEST_SECRET = 4  # masking "a" wherever it stands would destroy the message; `display` masks by position

# Where the tables go: Prisma's and JDBC's word name schemas as they are, search_path is written as in SQL.
_OURS = {"schema", "currentSchema", "search_path"}
_SSLMODE_OF_SSL = {"true": "require", "1": "require", "false": "prefer", "0": "prefer"}  # other drivers say ssl=…

_ESCAPED = {" ": ["+"], "'": ["\\'", "''"]}  # otherwise than by code: in queries, in libpq's keyword form and SQL
_WRAPPINGS = {
    "the quotes around it": re.compile(f"[{QUOTES}](.*)[{QUOTES}]", re.S),
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
_PARAMETER = re.compile(r"([\w.-]+)=(.*)")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SEARCH_PATH_OPTION = re.compile(r"(?<!\S)(?<!\\\s)(?:-c\s*|--)search[_-]path=((?:\\.|[^\s\\])*)\s*", re.I)

_URL_FORM = "postgresql://USER:PASSWORD@HOST:PORT/DBNAME"
_ENCODING_HELP = (
    f"Write {_URL_FORM}, user and password percent-encoded (@ is %40, : %3A, / %2F, ? %3F, # %23, % %25), as by\n"
    "python3 -c 'import getpass, urllib.parse as u; print(u.quote(getpass.getpass(), safe=\"\"))'"
)


def load(home: Path, environ: Mapping[str, str]) -> Settings:
    """Read every setting of a run at home in that folder; the environment wins over the files (see env_file)."""
    in_files, notes = env_file.read(home, environ)
    given = in_files | {name: (value, f"environment variable {name}") for name, value in environ.items()}
    text, where = given.get("DATABASE_URL", ("embedded", ""))
    if not where and environ.get("CI", "").strip().lower() not in {"", "0", "false", "no", "off"}:
        raise errors.NO_URL_IN_CI(where="\n".join(("environment and .env", *notes)))
    target, source = None, where
    if is_embedded(text):
        why = f"asked for by {where}" if where else "no DATABASE_URL in the environment or .env"
        source = f"embedded server ({why})"
    else:
        target = parse_target(text, where)
        if target.secrets and "DATABASE_URL" not in environ and env_file.is_open(home / where):
            notes = (*notes, f"{where} holds a password, and every user of this machine may read it")
    lock_timeout_ms = _duration_ms(given, "LOCK_TIMEOUT", Settings.lock_timeout_ms, least_ms=1)
    lock_wait_ms = _duration_ms(given, "LOCK_WAIT", Settings.lock_wait_s * 1000, least_ms=0)
    connect_ms = _duration_ms(given, "CONNECT_TIMEOUT", Settings.connect_timeout_s * 1000, plain="s", least_ms=1000)
    return Settings(target, source, notes, round(lock_timeout_ms), lock_wait_ms / 1000, math.ceil(connect_ms / 1000))


def _duration_ms(given: _Given, name: str, default_ms: float, *, least_ms: float, plain: str = "") -> float:
    """Read "2s" or "1.5 min"; empty is the default; plain: the unit of a number without one, if it needs none.

    Of LOCK_TIMEOUT=5 PostgreSQL would make milliseconds, most other tools seconds.
    """
    text, source = given.get(name, ("", ""))
    if not (text := text.strip(BLANKS + QUOTES)):
        return default_ms
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([a-z]*)", text)
    number, unit = (match[1], match[2] or plain) if match else ("nan", "s")
    if not unit and float(number):
        raise errors.UNIT(name=name, number=number, where=source)
    duration_ms = float(number) * _UNIT_MS.get(unit or "s", math.nan)
    if not least_ms <= duration_ms <= _LONGEST_MS:
        units = ", ".join(_UNIT_MS) + (f"; none means {plain}" if plain else "")
        raise errors.DURATION(name=name, where=source, units=units, least_ms=least_ms, most_ms=_LONGEST_MS)
    return duration_ms


def duration_ms(name: str, text: str) -> float:
    """Read the duration that an option gives, in ms; it is longer than none."""
    return _duration_ms({name: (text, f"option {name}")}, name, 0, least_ms=1)


def parse_target(text: str, source: str = "DATABASE_URL") -> Target:
    """Understand a pasted URL, or libpq's keyword form."""
    text, notes = _unwrap(text)
    if not text.strip(QUOTES):
        raise errors.EMPTY_URL(form=_URL_FORM, where=source)
    if not text.isprintable():
        raise errors.UNPRINTABLE_URL(where=source)
    if match := _POSTGRES.fullmatch(text):
        driver = [f"ignored in DATABASE_URL: {match[1]} in the scheme"] if match[1] else []
        return _target_of_url(match[2], source, [*notes, *driver])
    if re.match(r"\w+\s*=", text):
        return _target(_ask_libpq(text, source), source, notes)
    scheme = _OTHER_SCHEME.match(text)
    found = f"begins with {scheme[1]}:" if scheme else "is neither a URL nor libpq's keyword form (host=… dbname=…)"
    raise errors.OTHER_URL(found=found, form=_URL_FORM, where=source)


def _unwrap(text: str) -> tuple[str, list[str]]:
    """Take off what was pasted along with the URL."""
    bare = text.strip(BLANKS)
    notes = ["ignored in DATABASE_URL: blanks around it"] if bare != text else []
    for what, wrapping in _WRAPPINGS.items():
        if match := wrapping.fullmatch(bare):
            inner, inner_notes = _unwrap(match[1])
            return inner, list(dict.fromkeys([*notes, f"ignored in DATABASE_URL: {what}", *inner_notes]))
    return bare, notes


def _target_of_url(rest: str, source: str, notes: list[str]) -> Target:
    url = _split_url(rest)
    if url is None:
        raise errors.AMBIGUOUS_URL(where=source, remedy=_ENCODING_HELP)
    login, hosts, dbname, parameters = url
    typed_secrets = [login.partition(":")[2], *(value for name, value in parameters if name in libpq.SECRET)]
    paths = [(name, _as_search_path(name, unquote(value))) for name, value in parameters if name in _OURS]
    # As libpq wants it, without the parameters that it does not know.
    encoded = ":".join(map(_percent_encode, login.split(":", 1)))
    query = "&".join(f"{name}={_percent_encode(value)}" for name, value in parameters if name in libpq.KNOWN)
    conninfo = _ask_libpq(f"postgresql://{encoded}@{hosts}/{_percent_encode(dbname)}?{query}", source)
    return _target(conninfo, source, [*notes, *_notes_on_url(login, parameters)], typed_secrets, paths)


def _split_url(rest: str) -> tuple[str, str, str, _Parameters] | None:
    """Split what follows the scheme into login, hosts, database and parameters; None where that takes a guess.

    The login ends at the first @ (or none) that leaves something well-formed. So "u:p@ss/word@host/db" is understood as
    meant, where libpq would go to a host "ss". In "u:p@ss/word@host" the last part may be a host as well as a
    database's name; guessing wrong would send the password to a stranger.
    """
    for start in (0, *(at.end() for at in re.finditer("@", rest))):
        match = _AFTER_LOGIN.fullmatch(rest, start)
        parameters = _split_query(match["query"] or "") if match else None
        if match and parameters is not None:
            login, dbname = rest[: max(start - 1, 0)], match["dbname"] or ""
            is_a_guess = "@" in dbname or re.search(r"[@/?#\s]", login.partition(":")[0])  # that may stand for the :
            return None if is_a_guess else (login, match["hosts"], dbname, parameters)
    return None


def _split_query(query: str) -> _Parameters | None:
    """Split into names and values; None where this is no query but, say, the end of a password with a ? in it.

    ssl=… is translated, because to drop it as unknown would be to connect without TLS in silence.
    """
    pieces = [_PARAMETER.fullmatch(piece) for piece in query.split("&") if piece]
    pairs = [(piece[1], piece[2]) for piece in pieces if piece]
    if len(pairs) < len(pieces) or not all(_is_parameter(name, value) for name, value in pairs):
        return None
    return [
        ("sslmode", _SSLMODE_OF_SSL.get(value.lower(), value)) if name == "ssl" else (name, value)
        for name, value in pairs
    ]


def _is_parameter(name: str, value: str) -> bool:
    if name != "options" and name not in libpq.SECRET and re.search(r"\s\w+\s*=", value):
        return False  # libpq's other form begins here: "sslmode=require password=…"
    return "@" not in value or name in libpq.KNOWN | _OURS


def _as_search_path(name: str, value: str) -> str:
    """Take ?search_path= as it is; quote the names in the others where SQL would fold or split them."""
    if name == "search_path":
        return value
    names = re.compile(r'("(?:[^"]|"")+"|[a-z_][a-z0-9_$]*)(?=,|$)|[^,]+')  # of the first form they are as in SQL
    return names.sub(lambda found: found[1] or '"' + found[0].replace('"', '""') + '"', value)


def _percent_encode(part: str) -> str:
    """Encode what is not encoded yet; a % that begins no code stands for itself."""
    return quote(_BARE_PERCENT.sub("%25", part), safe="%")


def _notes_on_url(login: str, parameters: _Parameters) -> list[str]:
    notes = []
    if re.search(r"[@/?#\s]", login) or _BARE_PERCENT.search(login):
        notes.append("corrected in DATABASE_URL: user or password hold characters that must be percent-encoded")
    unknown = dict.fromkeys(name for name, _ in parameters if name not in libpq.KNOWN | _OURS)
    # In ?password=a&b=c the name "b" may be the rest of a password with a raw & in it.
    speakable = not any(name in libpq.SECRET for name, _ in parameters)
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
        raise errors.UNPARSABLE_URL(where=source, remedy=remedy) from None


def _target(
    conninfo: dict[str, str],
    source: str,
    notes: Iterable[str],
    typed_secrets: Iterable[str] = (),
    paths: Iterable[tuple[str, str]] = (),
) -> Target:
    """Take the search_path out of what libpq understood; refuse to choose between several; say what may be said."""
    # A login in the place of a host or a database would be printed, and asked of a name server.
    has_hosts = all(map(_HOST_NAME.fullmatch, conninfo.get("host", "").split(",")))
    if not has_hosts or _LOGIN.search(conninfo.get("dbname", "")):
        raise errors.MISPLACED_LOGIN(part="database" if has_hosts else "host", form=_URL_FORM, where=source)
    options = conninfo.get("options", "")
    in_options = [("options", re.sub(r"\\(.)", r"\1", path)) for path in _SEARCH_PATH_OPTION.findall(options)]
    named = {name: path for name, path in [*paths, *in_options] if path}
    different = {path for _, path in [*paths, *in_options] if path}
    if len(different) > 1:
        raise errors.SEARCH_PATH(names=", ".join(named), where=source)
    if options:  # left empty rather than out: libpq would go for PGOPTIONS
        conninfo["options"] = _SEARCH_PATH_OPTION.sub("", options).strip()
    # A whole login in the place of the user's name is a common slip; a name with a colon in it is rare.
    user, colon, behind_colon = conninfo.get("user", "").partition(":")
    if colon and "password" not in conninfo:
        notes = [*notes, f"unusual in DATABASE_URL: the name of the user goes on behind {user}: (is that a password?)"]
    secrets = [*typed_secrets, behind_colon, *(value for name, value in conninfo.items() if name in libpq.SECRET)]
    known = tuple(dict.fromkeys(filter(None, secrets)))
    return Target(conninfo, _display(conninfo), next(iter(different), None), tuple(dict.fromkeys(notes)), known)


def completed(target: Target, source: str) -> Target:
    """Return the target with what libpq adds to it by itself: where it really leads, every secret that may turn up."""
    whole, secrets, sources = libpq.resolve(target.conninfo)
    found = _target(whole, ", ".join([source, *sources]), target.notes, [*target.secrets, *secrets])
    notes, search_path = found.notes, target.search_path or found.search_path
    if found.search_path not in (None, search_path):
        place = next((source for source in sources if source.startswith("service ")), "PGOPTIONS")
        notes = (*notes, f"ignored in {place}: search_path (DATABASE_URL names another)")
    return replace(found, search_path=search_path, notes=notes, sources=sources)


def with_search_path(conninfo: Mapping[str, str], search_path: str | None) -> dict[str, str]:
    """Return it with the search_path, if any, among the options: for a session that is not one of our own."""
    if search_path is None:
        return dict(conninfo)
    escaped = re.sub(r"([\s\\])", r"\\\1", search_path)
    return {**conninfo, "options": f"{conninfo.get('options', '')} -c search_path={escaped}".strip()}


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
