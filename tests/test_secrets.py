"""Secrets: ten thousand URLs with every slip that people make, through all that prints, and no part of a secret in it.

A part is any four characters in a row: as they are, percent-encoded, or percent-encoded in lower case. The secrets are
made of characters of which at least one in four stands nowhere else: not in the URLs, not in the messages.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from unittest.mock import patch
from urllib.parse import quote, quote_plus, unquote

import pytest
from budget_engine import env_file, libpq
from budget_engine.errors import RecipeError
from budget_engine.output import text as words
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, Target, completed, mask, parse_target
from conftest import SEED, clean_environment, run
from test_command_line import peer, refuse_password

URLS, AT_ONCE = 10_000, 2_500
PROCESSES = 36
RARE, ODD = "QXZJЖ", "@:/?#%&=+'\"\\$!;, é~^|<>{}[]()*-._"

# {raw}: the secret as it is; {code}: percent-encoded; {half}: some of it is; {lower}: with codes in lower case;
# {quoted}: as libpq's keyword form wants it. Left out is only what nobody can tell: whether in u:p@ss "ss" is a host.
# What may stand before the password of a URL, and behind it, between bars; and where else one may stand.
HEADS = r"""
postgresql://app|postgresql://app@server|postgresql://ap p|postgresql://|postgresql:///app|postgresql:/app|postgresql//app
//app|app|mysql://app|https://app| postgresql://app|DATABASE_URL=postgresql://app
"""
TAILS = r"""
@{host}|@/game?host=/nowhere|@{host},{host}/game?target_session_attrs=primary|@[::1]:1/game|@{host}:port/game|@[::1/game
@ {host}/game|@{host}/ga@me|%00@{host}/game|%ff@{host}/game|\n@{host}/game|@{host}/game\n|@{host}/game?sslmode
@{host}/game?sslmode=nonsense|@{host}/game?connect_timeout=soon|@{host}/game?port=1,2,3|@{host}/game?service=no-such-service
@{host}/game?options=-c%20search_path%3Dapp
"""
OTHERS = r"""
postgresql://app:{code}@{host}/game
postgresql://app:{half}@{host}/game
postgresql://app:{lower}@{host}/game
postgres://app:{raw}@{host}/game?sslmode=disable
postgresql://app%40server:{raw}@{host}/game?schema=app&connection_limit=1
postgresql+psycopg2://app:{code}@{host}/game?sslmode=prefer&pgbouncer=true
postgresql://app:{code}@{host}/game?password={code}
postgresql://app:{code}@{host}/game?password={code}&sslmode
postgresql://app@{host}/game?password={code}
postgresql://app@{host}/game?password={half}&sslpassword={code}
postgresql://app@{host}/game?sslpassword={code}&sslmode=disable
postgresql://{host}/game?user=app&password={lower}
postgresql://{host}/game?user=app:{code}
postgresql://app%3A{code}@{host}/game
postgresql://app%3A{code}%40{host}/game
postgresql://app/{raw}@{host}/game
postgresql://app {raw}@{host}/game
postgresql://app@{raw}@{host}/game
postgresql://app#{raw}@{host}/game
postgresql://app:{code}
postgresql://app:{code}%40{host}/game
postgresql://app:{code}@
jdbc:postgresql://{host}/game?user=app&password={raw}
"postgresql://app:{raw}@{host}/game"
'postgresql://app:{raw}@{host}/game
“postgresql://app:{raw}@{host}/game”
psql "postgresql://app:{raw}@{host}/game"
psql postgresql://app:{raw}@{host}/game -c "SELECT 1"
postgresql://app@{host}/game password={raw}
postgresql://app@{host}/game?sslmode=disable password={raw}
psql -h {host} -U app -W {raw}
export DATABASE_URL='postgresql://app:{raw}@{host}/game'
host={name} port=1 user=app dbname=game password={raw}
host={name} port=1 user=app dbname=game password='{quoted}'
host={name} port=1 user=app password={raw} dbname=game
host={name} port=1 user=app password='{raw}
host={name} port=1 user=app:{code} dbname=game
host={name} user=app sslpassword='{quoted}' password='{quoted}' port=1
host=postgresql://app:{code}@{host}/game
dbname=postgresql://app:{code}@{host}/game
{code}
{raw}
"""


def listed(shapes: str) -> list[str]:
    return [shape.replace("\\n", "\n") for shape in re.split(r"[|\n]", shapes.strip("\n"))]


SHAPES = listed(OTHERS)
for secret in ("{raw}", "{code}"):
    SHAPES += [f"{head}:{secret}@{{host}}/game" for head in listed(HEADS)]
    SHAPES += [f"postgresql://app:{secret}{tail}" for tail in listed(TAILS)]


@dataclass(frozen=True)
class Slip:
    """Something that stands in DATABASE_URL, and the secret in it."""

    text: str
    secret: str

    def shown_in(self, said: str) -> str | None:
        """Return the first part of the secret that can be read there."""
        read = f"{said}\n{unquote(said)}"
        parts = (self.secret[i : i + 4] for i in range(len(self.secret) - 3))
        return next((part for part in parts if part in read), None)


def make_secret(chance: random.Random) -> str:
    secret = ""
    for _ in range(chance.randint(4, 16)):
        told = any(character in RARE for character in secret[-3:])
        secret += chance.choice(ODD if told and chance.random() < 0.5 else RARE)
    # In double quotes of an .env a backslash escapes: what is left must be long enough to be masked, too.
    return secret if len(re.sub(r"\\(.)", r"\1", secret)) >= 4 else make_secret(chance)


def in_lower_case(code: str) -> str:
    return re.sub("%..", lambda match: match[0].lower(), code)


def make_slip(shape: str, chance: random.Random, port: int) -> Slip:
    secret = make_secret(chance)
    code = quote(secret, safe="")
    spellings = {
        "raw": secret,
        "code": code,
        "lower": in_lower_case(code),
        "half": "".join(quote(character, safe="") if chance.random() < 0.5 else character for character in secret),
        "quoted": re.sub(r"(['\\\\])", r"\\\1", secret),
    }
    return Slip(shape.format(host=f"127.0.0.1:{port}", name="127.0.0.1", **spellings), secret)


def slips(numbers: range, port: int) -> Iterator[Slip]:
    for number in numbers:
        yield make_slip(SHAPES[number % len(SHAPES)], random.Random(f"{SEED} {number}"), port)


def all_said(text: str, *, in_file: bool) -> Iterator[str]:
    """Do what a task does with a URL, up to the refused connection; yield all that it could print meanwhile."""
    source = "environment variable DATABASE_URL"
    try:
        if in_file:
            file = env_file.parse(f"DATABASE_URL={text}\n", {})
            yield from env_file.notes(file)
            text, source = file.values["DATABASE_URL"], ".env"
        settings = Settings(parse_target(text, source), source)
        yield repr(settings)
        assert settings.target is not None
        target = completed(settings.target, source)
        yield from [repr(target), words.opening(target, settings), *echoes(target)]
        Connection(target, settings).close()
    except RecipeError as error:
        yield from [*words.error(error), repr(error), *traceback.format_exception(error)]


def echoes(target: Target) -> Iterator[str]:
    """Write out what libpq knows of secrets, as a server, or libpq, or one of our formats could; and mask it."""
    for secret in (target.conninfo[name] for name in libpq.SECRET & target.conninfo.keys()):
        code = quote(secret, safe="")
        spellings = (secret, code, in_lower_case(code), quote(secret), quote_plus(secret), json.dumps(secret))
        yield mask("FATAL: no " + ", no ".join(spellings), target.secrets)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port on which nobody listens; and no server where a URL names no host."""
    for name in libpq.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGHOST", "/nowhere")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("first", range(0, URLS, AT_ONCE))
def test_nothing_that_is_said_of_a_url_tells_of_its_secret(first: int, nobody: int) -> None:
    told = {
        (slip.text, said): part
        for slip in slips(range(first, first + AT_ONCE), nobody)
        for said in all_said(slip.text, in_file=len(slip.text) % 2 == 0)
        if (part := slip.shown_in(said))
    }
    assert told == {}, f"FAULT_SEED={SEED}"


@pytest.mark.parametrize("task", ["verify", "setup", "db.url", "db.psql"])
def test_no_command_line_tells_of_a_secret(task: str, nobody: int, tmp_path: Path) -> None:
    environment = clean_environment() | {"PGHOST": "/nowhere", "HOME": str(tmp_path)}
    ends = {"verify": {3, 4}, "setup": {3, 4}, "db.url": {0, 3}, "db.psql": {2, 3}}[task]
    for number in random.Random(f"{SEED} {task}").sample(range(URLS), PROCESSES // 4):
        (slip,) = slips(range(number, number + 1), nobody)
        done = run([sys.executable, "-m", "invoke", task], environment | {"DATABASE_URL": slip.text})
        assert slip.shown_in(done.out + done.err) is None, (slip, done)
        assert "Traceback" not in done.err, (slip, done)
        assert done.code in ends, (slip, done)


# Where a password may stand: a URL, and variables.
PLACES = {
    "in the URL": ("postgresql://app:$CODE@127.0.0.1:$PORT/game", {}),
    "as a parameter": ("postgresql://app@127.0.0.1:$PORT/game?password=$CODE", {}),
    "in libpq's keyword form": ("host=127.0.0.1 port=$PORT user=app password='$PW'", {}),
    "PGPASSWORD": ("postgresql://app@127.0.0.1:$PORT/game", {"PGPASSWORD": "$PW"}),
    "PGPASSFILE": ("postgresql://app@127.0.0.1:$PORT/game", {"PGPASSFILE": "$HOME/pass"}),
    "passfile": ("postgresql://app@127.0.0.1:$PORT/game?passfile=$HOME/pass", {}),
    "~/.pgpass": ("postgresql://app@127.0.0.1:$PORT/game", {}),
    "~/.pgpass, of the second host": ("postgresql://app@127.0.0.1,127.0.0.1/game?port=1,$PORT", {}),
    "a service": ("postgresql://127.0.0.1:$PORT/game?service=mine", {}),
    "PGSERVICE": ("postgresql://127.0.0.1:$PORT/game", {"PGSERVICE": "mine"}),
}


@pytest.mark.parametrize(("url", "variables"), PLACES.values(), ids=PLACES)
def test_server_that_repeats_the_password_is_masked(url: str, variables: dict[str, str], tmp_path: Path) -> None:
    """In the error itself: the console would mask it once more."""
    secret = "QX@ZJ/QX 100%"
    with peer(refuse_password) as port:
        files = {
            "pass": f"*:*:*:app:{secret}\n",
            ".pgpass": f"127.0.0.1:{port}:game:app:{secret}\n",
            ".pg_service.conf": f"[mine]\nuser=app\npassword={secret}\n",
        }
        for name, content in files.items():
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(0o600)
        names = {"PORT": str(port), "PW": secret, "CODE": quote(secret, safe=""), "HOME": str(tmp_path)}
        filled = {name: Template(value).substitute(names) for name, value in variables.items()}
        environment = clean_environment() | {"HOME": str(tmp_path)} | filled
        with patch.dict(os.environ, environment, clear=True):
            target = completed(parse_target(Template(url).substitute(names)), "")
            with pytest.raises(RecipeError) as caught:
                Connection(target, Settings(target, ""))
    said = "".join([*words.error(caught.value), *traceback.format_exception(caught.value)])
    assert "password authentication failed: ***" in said
    assert (caught.value.exit_code, Slip(url, secret).shown_in(said)) == (4, None), said
