"""Settings: what is read from where, what a pasted URL is taken for, and that no password gets out."""

from __future__ import annotations

import os
import re
import tempfile
import traceback
from pathlib import Path
from urllib.parse import quote

import pytest
from budget_engine import libpq
from budget_engine.errors import SettingsError
from budget_engine.settings import Settings, Target, completed, load, mask, parse_target
from hypothesis import assume, example, given
from hypothesis import strategies as st

URL = "postgresql://app:s3cret@db.example.com:5432/game"
SECRET = re.compile("QX|ZJ|XQ")
PERCENT_NOTE = "corrected in DATABASE_URL: user or password hold characters that must be percent-encoded"
VARIABLE, FILE = "environment variable DATABASE_URL", ".env"


def everything_printable(error: SettingsError) -> str:
    return "\n".join([*traceback.format_exception(error), repr(error), error.where, error.remedy])


def write_env(root: Path, content: str | bytes) -> Path:
    (root / ".env").write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def target_of(settings: Settings) -> Target:
    assert settings.target is not None
    return settings.target


# Which source wins


def test_environment_wins_over_env_file(tmp_path: Path) -> None:
    write_env(tmp_path, "DATABASE_URL=postgresql://file/x\nLOCK_TIMEOUT=1s\nLOCK_WAIT=5s\n")
    settings = load(tmp_path, {"DATABASE_URL": URL, "LOCK_WAIT": "7s"})
    assert settings.source == VARIABLE
    assert target_of(settings).conninfo["host"] == "db.example.com"
    assert (settings.lock_timeout_ms, settings.lock_wait_s) == (1000, 7)


def test_nothing_set_means_embedded_and_defaults(tmp_path: Path) -> None:
    for environ in ({}, *({"CI": ci} for ci in ("", " ", "false", "0", "No", "off"))):
        settings = load(tmp_path, environ)
        assert settings == Settings(None, "embedded server (no DATABASE_URL in the environment or .env)")
        assert (settings.lock_timeout_ms, settings.lock_wait_s, settings.connect_timeout_s) == (2000, 60, 10)


def test_embedded_by_name_beats_ci_and_env_file(tmp_path: Path) -> None:
    write_env(tmp_path, f"DATABASE_URL={URL}\n")
    for name in ("embedded", " Embedded\n", '"embedded"'):
        settings = load(tmp_path, {"DATABASE_URL": name, "CI": "true"})
        assert settings == Settings(None, f"embedded server (asked for by {VARIABLE})")


# What .env holds, what the environment does, where the error is, its message or remedy.
REFUSED: list[tuple[str, dict[str, str], str, str]] = [
    *(("", {"CI": ci}, "environment and .env", "DATABASE_URL=embedded") for ci in ("true", "1", "yes", "woodpecker")),
    *(
        (f"DATABASE_URL={URL}", {"DATABASE_URL": empty}, VARIABLE, "empty")
        for empty in ("", "  ", "''", '""', ' "  " ', "“”", "'", "DATABASE_URL=")
    ),
    *((f"DATABASE_URL{rest}", {}, FILE, "empty") for rest in ("=", "", "=''", "=${UNSET}")),
    # Lines that are none, but may have been meant so, do not lead to the embedded server.
    ('\nexport DATABASE_URL="postgresql://app:QXZJ@h/db\n', {}, "line 2", ""),
    *(
        (line.format("postgresql://app:QXZJ@h/db"), {}, "line 1", "")
        for line in ("set DATABASE_URL={}", "DATABASE_URL: {}", "setenv DATABASE_URL '{}'", "DATABASE_URL {}")
    ),
    # The URL goes on elsewhere; its beginning is a good one, which leads to the host ZJ.
    ("DATABASE_URL=postgresql://app:QX@ZJ #XQ@h/db\n", {}, "line 1", ""),
    ("DATABASE_URL=postgresql://app:QX@ZJ\nXQ@h/db\n", {}, "line 1", ""),
    ("DATABASE_URL=postgresql://app:QX@ZJ\rXQ@h/db?sslmode=require\n", {}, "line 1", ""),
    *(
        ("", {name: text}, f"environment variable {name}", f"^{name} ")
        for name, texts in {
            "LOCK_TIMEOUT": ("soon", "2 sec", "-1", "0", "1us", "nan", "1e3", "9" * 400, "25d"),
            "LOCK_WAIT": ("-1s",),
            "CONNECT_TIMEOUT": ("0", "500ms"),
        }.items()
        for text in texts
    ),
    # A number without a unit: PostgreSQL reads milliseconds, most tools seconds.
    *(
        (f"{name}={number}\n", environ, where, rf"(?s)^{name} .* {re.escape(number)}s .* {re.escape(number)}ms\.")
        for name in ("LOCK_TIMEOUT", "LOCK_WAIT")
        for number in ("5", "0.5", "10")
        for environ, where in (({}, FILE), ({name: f" {number} "}, f"environment variable {name}"))
    ),
]


@pytest.mark.parametrize(("content", "environ", "where", "says"), REFUSED)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, content: str, environ: dict[str, str], where: str, says: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(write_env(tmp_path, content), environ)
    error = caught.value
    assert (error.exit_code, error.where, bool(error.remedy)) == (3, where, True)
    assert re.search(says, f"{error}\n{error.remedy}")
    assert not SECRET.search(everything_printable(error))


# The file .env

READ: dict[str, tuple[str, tuple[str, ...]]] = {
    "BOM": (f"\ufeffDATABASE_URL={URL}\n", ()),
    "CRLF": (f"# a comment\r\n\r\nDATABASE_URL={URL}\r\n", ()),
    "export": (f"export DATABASE_URL={URL}", ()),
    "single quotes": (f"DATABASE_URL = '{URL}'  # mine\n", ()),
    "double quotes": (f'DATABASE_URL="{URL}"\n', ()),
    "variable": ("PW=s3cret\nDATABASE_URL=postgresql://app:${PW}@db.example.com:5432/game", ()),
    "a comment behind it": (f"DATABASE_URL={URL} # ask Ada\n# a comment\n", ()),
    "an address in the comment": (f"DATABASE_URL='{URL}' # ask ada@example.com\n\nLOCK_WAIT=\n", ()),
    "another setting": (f"DATABASE_URL={URL}\nexport LOCK_WAIT=1s\n", ()),
    "the last of two": (
        f"DATABASE_URL=postgresql://old/x\n\n\nDATABASE_URL={URL}\n",
        ("every DATABASE_URL but the last one (lines 1, 4)",),
    ),
    "no line": (f"DATABASE_URL={URL}\nnot a line\n", ("line 2, which is not of the form NAME=VALUE",)),
    "a quote": (f"A=1\n\n\n'QXZJ hidden\nDATABASE_URL={URL}\n", ("line 4, which is not of the form NAME=VALUE",)),
    "libpq's": (
        f"PGHOST=elsewhere\nDATABASE_URL={URL}\nPGPASSWORD=QXZJ\n",
        ("PGHOST, PGPASSWORD (libpq's: only in the environment)",),
    ),
}


@pytest.mark.parametrize(("content", "ignored"), READ.values(), ids=READ)
def test_env_file_as_editors_write_it(tmp_path: Path, content: str, ignored: tuple[str, ...]) -> None:
    settings = load(write_env(tmp_path, content), {})
    assert (settings.target, settings.source) == (parse_target(URL), FILE)
    assert settings.notes == tuple(f"ignored in .env: {what}" for what in ignored)


def test_environment_wins_in_variables_of_env_file_and_over_its_broken_lines(tmp_path: Path) -> None:
    write_env(tmp_path, "HOST=file\nDATABASE_URL=postgresql://${HOST}/${NAME:-game}")
    assert target_of(load(tmp_path, {"HOST": "outer"})).display == "postgresql://outer/game"
    write_env(tmp_path, '\nexport DATABASE_URL="postgresql://app:QXZJ@h/db\n')
    assert target_of(load(tmp_path, {"DATABASE_URL": URL})).conninfo["user"] == "app"


@pytest.mark.parametrize(
    ("written", "password"),
    [("'a\\nb'", "a\\nb"), ('"a\\\\b"', "a\\b"), ("a\\nb", "a\\nb"),
     ("a#b", "a#b"), ("'a #b'", "a #b"), ("'${A}$A'", "1$A")],
)  # fmt: skip
def test_what_quotes_do_to_a_password(tmp_path: Path, written: str, password: str) -> None:
    quote_mark = written[0] if written[0] in "'\"" else ""
    line = f"A=1\nDATABASE_URL={quote_mark}postgresql://app:{written.strip(quote_mark)}@h/db{quote_mark}\n"
    assert target_of(load(write_env(tmp_path, line), {})).conninfo["password"] == password


# Durations

DURATIONS: dict[str, dict[str, float]] = {
    "lock_timeout_ms": {"2s": 2000, "500ms": 500, "0.75s": 750, " 1.5 s ": 1500, "1min": 60000, "'3s'": 3000, "": 2000},
    "lock_wait_s": {"60s": 60, "2min": 120, "0": 0, "0.0": 0, "250ms": 0.25},
    "connect_timeout_s": {"5": 5, "1500ms": 2, "1min": 60},
}  # fmt: skip


@pytest.mark.parametrize("setting", DURATIONS)
def test_durations_read_as_in_postgresql(tmp_path: Path, setting: str) -> None:
    name = setting.rpartition("_")[0].upper()
    read = {text: getattr(load(tmp_path, {name: text}), setting) for text in DURATIONS[setting]}
    assert read == DURATIONS[setting]


def test_env_example_states_the_defaults(tmp_path: Path) -> None:
    text = Path(__file__).parents[1].joinpath(".env.example").read_text(encoding="utf-8")
    assert load(write_env(tmp_path, text), {}) == load(tmp_path / "nowhere", {})
    uncommented = re.sub(r"^# (?=[A-Z_]+=)", "", text, flags=re.M)
    settings = load(write_env(tmp_path, uncommented), {})
    assert settings == Settings(settings.target, ".env")
    names = ["DATABASE_URL", "LOCK_TIMEOUT", "LOCK_WAIT", "CONNECT_TIMEOUT"]
    assert re.findall(r"^[A-Z_]+(?==)", uncommented, re.M) == names


# URLs as people paste them

PASTED: list[tuple[str, list[str]]] = [
    (URL, []),
    (URL.replace("postgresql:", "postgres:"), []),
    (f"  {URL}\n", ["blanks around it"]),
    (f"\ufeff{URL}\u200b", ["blanks around it"]),
    *((f"{opening}{URL}{closing}", ["the quotes around it"]) for opening, closing in ("''", '""', "“”")),
    (f"DATABASE_URL={URL}", ['"DATABASE_URL=" in front of it']),
    (f"export DATABASE_URL='{URL}'", ['"DATABASE_URL=" in front of it', "the quotes around it"]),
    (f"psql '{URL}'", ['"psql" in front of it', "the quotes around it"]),
    (URL.replace("postgresql:", "postgresql+psycopg2:"), ["+psycopg2 in the scheme"]),
    (URL.replace("postgresql:", "postgres+asyncpg:"), ["+asyncpg in the scheme"]),
    (
        f"{URL}?pgbouncer=true&connection_limit=1&pool_timeout=s3cret",
        ["parameters that libpq does not know (pgbouncer, connection_limit, pool_timeout)"],
    ),
]


@pytest.mark.parametrize(("pasted", "noted"), PASTED)
def test_pasted_url_is_understood_with_notes(pasted: str, noted: list[str]) -> None:
    target = parse_target(pasted)
    parts = {"user": "app", "password": "s3cret", "host": "db.example.com", "port": "5432", "dbname": "game"}
    assert target.conninfo == parts
    assert target.display == "postgresql://app:***@db.example.com:5432/game"
    assert list(target.notes) == [f"ignored in DATABASE_URL: {what}" for what in noted]


@pytest.mark.parametrize(
    "password",
    ["p@ss", "a/b", "p@ss/word", "12/34", "wh?t", "wh@t?x=1", "a#b", "a:b", "100%", "50%zz", "a b", "[x]", "@"],
)
def test_raw_password_is_taken_as_meant(password: str) -> None:
    target = parse_target(f"postgresql://app:{password}@db.example.com:5432/game?sslmode=require")
    assert target.conninfo["password"] == password
    assert target.display == "postgresql://app:***@db.example.com:5432/game?sslmode=require"
    assert target.notes == (() if password in {"a:b", "[x]"} else (PERCENT_NOTE,))


GUESSES = [
    "postgresql://app:QX@ZJ/XQ@db",  # the database XQ@db on the host ZJ, or the host db?
    "postgresql://app:QX%abZJ@db/game",  # not UTF-8
    "postgresql://app:QXZJ", "postgresql://app:QX%00ZJ@db/game", "postgresql://app:QXZJ@[::1/game",
    "postgresql://app:QXZJ@db:port/game", "postgresql://app:QXZJ@db/game?QXZJ", "postgresql://app:QX\nZJ@db/game",
    "postgresql://app:QXZJ\udcff@db/game", "postgresql:/app:QXZJ@db/game", "app:QXZJ@db/game", "QXZJ",
    "host=db password='QXZJ", "host=db password=QX QXZJ=1", "host=db password=QX QXZJ", "psql -h db -W QXZJ",
    # A whole login, or its end, in the wrong place, or with another character for a colon.
    "postgresql://app%3AQXZJ%40db/game", "postgresql://app%3AQX%2CZJ%40db/game", "postgresql:///app:QXZJ@db/game",
    "postgresql://app/QXZJ@db/game", "postgresql://app QXZJ@db/game", "postgresql://app@QXZJ@db/game",
    "postgresql://app@QX:ZJ@db/game", "postgresql://db/game password=QXZJ", "postgresql://db/app%3AQXZJ%40db",
    "postgresql://app@server:QXZJ@server.postgres.database.azure.com/game", "host=app:QXZJ@db",
    "postgresql://db/game?sslmode=require password=QXZJ", "host=db,app:QXZJ@db dbname=game",
    "dbname=postgresql://app:QXZJ@db/game",
]  # fmt: skip
OTHER_SCHEMES = [
    ("mysql://app:QXZJ@db/game", "begins with mysql:"),
    ("https://example.com/QXZJ", "begins with https:"),
    ("sqlite:game.db", "begins with sqlite:"),
    ("jdbc:postgresql://db/game?password=QXZJ", "begins with jdbc:"),
]


@pytest.mark.parametrize(("url", "says"), [*((guess, ".") for guess in GUESSES), *OTHER_SCHEMES])
def test_what_would_be_a_guess_is_refused_without_quoting(url: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        parse_target(url, ".env")
    assert (caught.value.where, bool(caught.value.remedy)) == (".env", True)
    assert says == "." or "postgresql://" in caught.value.remedy
    assert not SECRET.search(everything_printable(caught.value))


UNDERSTOOD: list[tuple[str, dict[str, str], str]] = [
    ("postgresql://", {}, "postgresql:///"),
    ("postgresql://app@db", {"user": "app", "host": "db"}, "postgresql://app@db/"),
    ("postgresql://app:@db/x", {"user": "app", "host": "db", "dbname": "x"}, "postgresql://app@db/x"),
    ("postgresql://[::1]:1/x", {"host": "::1", "port": "1", "dbname": "x"}, "postgresql://[::1]:1/x"),
    ("postgresql://a:1,b:2/x", {"host": "a,b", "port": "1,2", "dbname": "x"}, "postgresql://a:1,b:2/x"),
    ("postgresql://a,b/x?port=9", {"host": "a,b", "port": "9", "dbname": "x"}, "postgresql://a:9,b:9/x"),
    ("postgresql:///x?host=a,b,c&port=1,2", {"host": "a,b,c", "port": "1,2", "dbname": "x"},
     "postgresql:///x?host=a,b,c&port=1,2"),
    ("postgresql://app@%2Frun%2Fpg/x?port=5433", {"user": "app", "host": "/run/pg", "port": "5433", "dbname": "x"},
     "postgresql://app@/x?host=/run/pg&port=5433"),
    ("postgresql:///x?host=/run/pg", {"host": "/run/pg", "dbname": "x"}, "postgresql:///x?host=/run/pg"),
    ("postgresql://db/x?user=a@b", {"user": "a@b", "host": "db", "dbname": "x"}, "postgresql://a%40b@db/x"),
    ("postgresql://db/x?application_name=mine&connect_timeout=3",
     {"host": "db", "dbname": "x", "application_name": "mine", "connect_timeout": "3"},
     "postgresql://db/x?connect_timeout=3&application_name=mine"),
    ("postgresql://db/?service=mine", {"host": "db", "service": "mine"}, "postgresql://db/?service=mine"),
    ("host=db user=app password='a b' sslpassword=tls",
     {"host": "db", "user": "app", "password": "a b", "sslpassword": "tls"},
     "postgresql://app:***@db/?sslpassword=***"),
]  # fmt: skip


@pytest.mark.parametrize(("url", "conninfo", "display"), UNDERSTOOD)
def test_what_libpq_knows_passes(url: str, conninfo: dict[str, str], display: str) -> None:
    target = parse_target(url)
    assert (target.conninfo, target.display, target.notes) == (conninfo, display, ())


def test_ssl_of_other_drivers_becomes_sslmode() -> None:
    for ssl, sslmode in {"true": "require", "1": "require", "verify-full": "verify-full", "false": "prefer"}.items():
        assert parse_target(f"{URL}?ssl={ssl}").conninfo["sslmode"] == sslmode


@pytest.mark.parametrize(
    ("query", "search_path", "options"),
    [
        ("schema=app", "app", None),
        ("schema=My%22App", '"My""App"', None),
        ("search_path=app,public", "app,public", None),
        ("options=-c%20search_path%3Dapp", "app", None),
        ("options=-csearch_path=app", "app", None),
        ("options=--search-path=app,%5C%20public", "app, public", None),
        ("options=-c geqo=off -c search_path=app -c jit=off", "app", "-c geqo=off -c jit=off"),
        ("options=endpoint%3Dep-cool-1", None, "endpoint=ep-cool-1"),
        ("options=-c my.search_path=x", None, "-c my.search_path=x"),
        ("schema=", None, None),
        ("currentSchema=app", "app", None),
        ("currentSchema=app,MyApp", 'app,"MyApp"', None),
        ("currentSchema=%22MyApp%22,public", '"MyApp",public', None),
        ("schema=app&currentSchema=app&search_path=app&options=-c%20search_path%3Dapp", "app", None),
    ],
)
def test_search_path_is_taken_out(query: str, search_path: str | None, options: str | None) -> None:
    target = parse_target(f"{URL}?{query}")
    assert (target.search_path, target.conninfo.get("options") or None) == (search_path, options)
    assert target.conninfo.keys() - {"options"} == parse_target(URL).conninfo.keys()
    assert target.notes == ()


# Secrets


def test_secrets_as_typed_and_as_meant() -> None:
    target = parse_target("postgresql://app:p%40ss@db/x?sslpassword=t%2fls&passfile=/x")
    assert set(target.secrets) == {"p%40ss", "p@ss", "t%2fls", "t/ls"}
    assert target.display == "postgresql://app:***@db/x?passfile=/x&sslpassword=***"
    assert parse_target("postgresql://app:@db/x?sslpassword=").secrets == ()


def test_rest_of_a_password_is_not_taken_for_a_parameter_name() -> None:
    target = parse_target("postgresql://app@db/x?password=QX&ZJQX=1")
    assert target.notes == ("ignored in DATABASE_URL: parameters that libpq does not know (1 in number)",)


def test_mask_knows_every_spelling() -> None:
    for secret, spellings in {
        "Ü p@s/s": ["%C3%9C%20p%40s%2Fs", "%c3%9c%20p%40s%2fs", "%C3%9C%20p%40s/s", "%C3%9C+p%40s%2Fs"],
        "é\"<&'\\": ["\\u00e9\\\"<&'\\\\", "é&quot;&lt;&amp;&#x27;\\", "é\"<&''\\", '%C3%A9"%3C&%27%5c'],
    }.items():
        assert [mask(f"<{spelling}>", [secret]) for spelling in (secret, *spellings)] == ["<***>"] * 5


def test_mask_takes_the_longest_first_and_leaves_short_ones_to_the_display() -> None:
    assert mask("nothing to hide", ()) == "nothing to hide"
    assert mask("swordfish sword", ["sword", "swordfish"]) == "*** ***"
    assert mask("a table of abc", ["a", "abc"]) == "a table of abc"
    assert parse_target("postgresql://app:a@data/a").display == "postgresql://app:***@data/a"


@pytest.mark.parametrize(
    "url", ["postgresql://app%3AQXZJ@db/x", "postgresql://db/x?user=app:QXZJ", "user=app:QXZJ host=db dbname=x"]
)
def test_login_in_the_place_of_the_user_is_not_shown(url: str) -> None:
    target = parse_target(url)
    assert (target.conninfo["user"], target.display) == ("app:QXZJ", "postgresql://app:***@db/x")
    assert mask('role "app:QXZJ" does not exist', target.secrets) == 'role "app:***" does not exist'
    assert len(target.notes) == 1
    assert "QXZJ" not in f"{target!r} {target.notes}"


# What libpq adds


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without any variable of libpq's, and an empty home."""
    for name in libpq.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


# The URL, variables, what is shown, where the rest came from.
COMPLETED: dict[str, tuple[str, dict[str, str], str, tuple[str, ...]]] = {
    "nothing": (URL, {}, "postgresql://app:***@db.example.com:5432/game", ()),
    "the port, and the user's name for the database": ("postgresql://app@db", {}, "postgresql://app@db:5432/app", ()),
    "variables": (
        "postgresql://", {"PGHOST": "db", "PGPORT": "1", "PGUSER": "app", "PGPASSWORD": "QXZJ", "PGDATABASE": "game"},
        "postgresql://app:***@db:1/game", ("PGUSER", "PGPASSWORD", "PGDATABASE", "PGHOST", "PGPORT")),
    "variables that the URL overrides": (
        URL, {"PGHOST": "other", "PGPASSWORD": "QXZJ", "PGSSLMODE": "require"},
        "postgresql://app:***@db.example.com:5432/game?sslmode=require", ("PGSSLMODE",)),
    "another address for the host": (
        URL, {"PGHOSTADDR": "10.0.0.1"},
        "postgresql://app:***@db.example.com:5432/game?hostaddr=10.0.0.1", ("PGHOSTADDR",)),
    "a service": (
        "postgresql:///other?service=mine", {"PGUSER": "app", "PGHOST": "other"},
        "postgresql://app:***@db:5432/other?service=mine", ("PGUSER", "service mine")),
    "the password file": ("postgresql://ada@db/game", {}, "postgresql://ada@db:5432/game", ("the password file",)),
    "bytes that are not UTF-8": (URL, {"PGAPPNAME": "\udcff"}, "postgresql://app:***@db.example.com:5432/game", ()),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPLETED)
def test_display_says_where_it_really_leads(variables: pytest.MonkeyPatch, tmp_path: Path, case: str) -> None:
    url, environ, display, sources = COMPLETED[case]
    (tmp_path / ".pg_service.conf").write_text("[mine]\nhost=db\npassword=QXZJ\ndbname=game\n")
    (tmp_path / ".pgpass").write_text("db:*:*:ada:QXZJ\n")
    (tmp_path / ".pgpass").chmod(0o600)
    for name, value in environ.items():
        variables.setenv(name, value)
    target = completed(parse_target(url), ".env")
    assert (target.display, target.sources) == (display, sources)
    assert "QXZJ" not in repr(target)
    assert ("QXZJ" in target.secrets) == bool({"PGPASSWORD", "service mine", "the password file"} & set(sources))


def test_search_path_is_taken_out_of_variables(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("PGOPTIONS", "-c geqo=off -c search_path=app")
    for url, search_path, options in (
        (URL, "app", "-c geqo=off"),
        (f"{URL}?schema=mine", "mine", "-c geqo=off"),
        (f"{URL}?options=-c%20search_path%3Dmine", "mine", ""),
    ):
        target = completed(parse_target(url), ".env")
        assert (target.search_path, target.conninfo["options"]) == (search_path, options)


def test_url_in_another_variable_is_refused(variables: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGDATABASE"):
        variables.setenv(name, "postgresql://app:QXZJ@db/game")
        with pytest.raises(SettingsError) as caught:
            completed(parse_target("postgresql://"), ".env")
        assert caught.value.where == f".env, {name}"
        assert "QXZJ" not in everything_printable(caught.value)
        variables.delenv(name)


def test_certificates_of_the_system_are_found(variables: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        variables.delenv(name, raising=False)
    libpq.find_certificates()
    places = [os.environ[name] for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ]
    assert places
    assert all(Path(place).exists() for place in places)


# Properties

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
hosts = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True) | st.ip_addresses(v=6).map(str)
ports = st.integers(1, 65535).map(str)

odd_passwords = st.text(st.sampled_from([*"QXZJ@:/?#%&=+'\" é"]), min_size=4).map(lambda text: f"QX{text}ZJ")


@given(user=texts, password=texts, host=hosts, port=ports, dbname=texts)
@example(user="a:b", password="p@ss/w?rd#%41&=", host="::1", port="1", dbname="a/b?c")
def test_encoded_url_parses_back(user: str, password: str, host: str, port: str, dbname: str) -> None:
    address = f"[{host}]" if ":" in host else host
    assume(not re.search("://|.:.+@.", dbname, re.S))
    user_code, password_code, dbname_code = (quote(part, safe="") for part in (user, password, dbname))
    target = parse_target(f"postgresql://{user_code}:{password_code}@{address}:{port}/{dbname_code}")
    expected = {"user": user, "password": password, "host": host, "port": port, "dbname": dbname}
    assert (target.conninfo, target.notes, target.search_path) == (expected, (), None)
    shown = quote(user.partition(":")[0], safe="")
    assert target.display == f"postgresql://{shown}:***@{address}:{port}/{quote(dbname, safe='/,:')}"


@given(user=texts, host=hosts, dbname=texts, query=st.sampled_from(["", "?sslmode=require&x=1", "?port=9"]))
def test_display_without_password_leads_to_the_same_target(user: str, host: str, dbname: str, query: str) -> None:
    assume(":" not in user and not re.search("://|.:.+@.", dbname, re.S))
    address = f"[{host}]" if ":" in host else host
    target = parse_target(f"postgresql://{quote(user, safe='')}@{address}/{quote(dbname, safe='')}{query}")
    assert parse_target(target.display).conninfo == target.conninfo


# That nothing printable holds a part of it: test_secrets.
@given(password=odd_passwords, encode=st.booleans())
def test_odd_password_is_taken_as_typed_and_masked(password: str, encode: bool) -> None:
    typed = quote(password, safe="") if encode else password
    target = parse_target(f"postgresql://app:{typed}@db.example.com:5432/game?sslmode=require&pgbouncer=true")
    assert target.conninfo["password"] == password
    assert mask(f"{password} {typed}", target.secrets) == "*** ***"
    quoted = re.sub(r"(['\\])", r"\\\1", password)
    assert parse_target(f"host=db user=app password='{quoted}'").conninfo["password"] == password


# ── who else may read it ───────────────────────────────────────────────────────────────────────────────────────────


def test_password_in_a_file_that_everybody_may_read_is_noted() -> None:
    """Not where a folder on the way is closed, nor of a file without a password, nor one that does not count."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        write_env(place, f"DATABASE_URL={URL}")
        noted = (".env holds a password, and every user of this machine may read it",)
        for folder_mode, mode, expected in ((0o755, 0o644, noted), (0o700, 0o644, ()), (0o755, 0o640, ())):
            place.chmod(folder_mode)
            (place / ".env").chmod(mode)
            assert load(place, {}).notes == expected
        place.chmod(0o755)
        (place / ".env").chmod(0o644)
        assert load(place, {"DATABASE_URL": URL}).notes == ()
        assert load(place, {"ENV_FILE": str(place / ".env")}).notes == noted
        write_env(place, f"DATABASE_URL={URL.replace(':s3cret', '')}")
        assert load(place, {}).notes == ()
