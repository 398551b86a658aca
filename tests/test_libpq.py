"""As libpq: by the same URL, environment and files the recipes come to where psql comes, and say so beforehand."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import Template
from unittest.mock import patch

import pooler as poolers
import psycopg
import pytest
from budget_engine.errors import RecipeError
from budget_engine.migration.chain import ROOT
from budget_engine.output import text as words
from budget_engine.postgres import embedded
from budget_engine.postgres.connection import UNPIN, Connection
from budget_engine.postgres.embedded import Cluster
from budget_engine.settings import completed, load
from conftest import Db, Run, clean_environment, private_server, run
from pooler import Pooler
from proxy import Proxy, socket_of
from versions import NEWEST

PASSWORD = "QX@ZJ/QX"
# The recipes look into pg_temp last: see transaction_settings.
QUERY = """SELECT current_user, current_database(), current_setting('cluster_name'),
regexp_replace(current_setting('search_path'), ', pg_temp$', ''), current_setting('extra_float_digits'),
current_setting('application_name')"""


@dataclass(frozen=True)
class Place:
    """Two servers: the first wants ada's password, the second takes no writes; both on sockets and on loopback.

    The second is of the embedded server's version, and so is the psql: what libpq understands grows with its version.
    """

    second: Cluster
    names: dict[str, str]  # what stands for $NAME in the cases

    @property
    def psql(self) -> Path:
        return self.second.binaries / "psql"


def ask(psql: object, url: str, variables: dict[str, str], names: dict[str, str], home: Path) -> tuple[Run, Run]:
    """Let psql, and then the connection that every task opens, say where they came to."""
    fill = {name: Template(value).substitute(names) for name, value in variables.items()}
    environment = clean_environment() | {"HOME": str(home), "PGAPPNAME": "mine"} | fill
    url = Template(url).substitute(names)
    by_psql = run([str(psql), url, "-XAtwc", QUERY], environment)
    with patch.dict(os.environ, environment, clear=True):  # libpq reads it, too
        try:
            given = load(ROOT, environment | {"DATABASE_URL": url})
            assert given.target
            with Connection(completed(given.target, given.source), given) as connection:
                return by_psql, Run(0, "|".join(map(str, connection.ask([UNPIN, QUERY])[1][0])) + "\n", "")
        except RecipeError as error:
            return by_psql, Run(error.exit_code, "", "\n".join(words.error(error)))


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def execute(cluster: Cluster, *statements: str) -> None:
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.fixture(scope="module")
def place(cluster: Cluster) -> Iterator[Place]:
    with ExitStack() as stack:
        first = stack.enter_context(private_server(cluster_name="first"))
        second = stack.enter_context(private_server(major=NEWEST, cluster_name="second"))
        for cluster in (first, second):
            execute(
                cluster, f"CREATE ROLE ada LOGIN PASSWORD '{PASSWORD}'", "CREATE DATABASE ada", "CREATE DATABASE game"
            )
        execute(second, "ALTER ROLE ada SET default_transaction_read_only = on")
        (first.data / "pg_hba.conf").write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        execute(first, "SELECT pg_reload_conf()")
        ports = {
            name: str(stack.enter_context(Proxy(socket_of(server.sockets))).port)
            for name, server in (("P1", first), ("P2", second))
        }
        sockets = {"S1": str(first.sockets), "S2": str(second.sockets)}
        sockets["S1_CODE"] = sockets["S1"].replace("/", "%2F")
        yield Place(second, {**ports, **sockets, "CLOSED": str(closed_port()), "PW": PASSWORD})


@pytest.fixture
def home(tmp_path: Path, place: Place) -> Path:
    """A home with the files that libpq looks for there."""
    files = {
        ".pgpass": f"127.0.0.1:{place.names['P1']}:*:ada:{PASSWORD}\n",
        "pass": f"*:*:*:ada:{PASSWORD}\n",
        ".pg_service.conf": "[mine]\nhost=$S1\nport=5432\ndbname=game\nuser=ada\npassword=$PW\n"
        "options=-c search_path=app\n",
        "services": "[mine]\nhost=127.0.0.1\nport=$P1\nuser=ada\ndbname=game\npassfile=$HOME/pass\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(Template(content).substitute(place.names, HOME=tmp_path))
        (tmp_path / name).chmod(0o600)
    place.names["HOME"] = str(tmp_path)
    return tmp_path


LOGIN = {"PGUSER": "ada", "PGPASSWORD": "$PW"}
GAME, TYPED = "postgresql://ada@127.0.0.1:$P1/game", "postgresql://ada:QX%40ZJ%2FQX@127.0.0.1:$P1/game"
CASES = {
    "all of it from variables": ("postgresql://", {**LOGIN, "PGHOST": "$S1", "PGDATABASE": "game"}),
    "a raw @ and / in the URL": (TYPED, {}),
    "the URL wins": (TYPED, {"PGPASSWORD": "x", "PGUSER": "x"}),
    "a database is named as the user": ("postgresql://ada@127.0.0.1:$P1", {"PGPASSWORD": "$PW"}),
    "the port from a variable": ("postgresql://127.0.0.1/game", {**LOGIN, "PGPORT": "$P1"}),
    "the host's address from a variable":
        ("postgresql://nowhere.invalid:$P1/game", {**LOGIN, "PGHOSTADDR": "127.0.0.1"}),
    "a socket, percent-encoded": ("postgresql://ada@${S1_CODE}/game", {"PGPASSWORD": "$PW"}),
    "a socket as a parameter": ("postgresql:///game?host=$S1", LOGIN),
    "libpq's keywords": ("host=$S1 dbname=game user=ada password='$PW'", {}),
    "the first host is down": ("postgresql://127.0.0.1:$CLOSED,127.0.0.1:$P1/game", LOGIN),
    "hosts from a variable, the first one down":
        ("postgresql:///game", {**LOGIN, "PGHOST": "127.0.0.1,127.0.0.1", "PGPORT": "$CLOSED,$P1"}),
    "the first host takes no writes":
        ("postgresql:///game", {**LOGIN, "PGHOST": "$S2,$S1", "PGTARGETSESSIONATTRS": "read-write"}),
    "a host that takes no writes": ("postgresql:///game?target_session_attrs=read-only&host=$S1,$S2", LOGIN),
    "~/.pgpass": (GAME, {}),
    "~/.pgpass, for the second host only": ("postgresql://ada@127.0.0.1:$P2,127.0.0.1:$P1/game?port=$CLOSED,$P1", {}),
    "PGPASSFILE": ("postgresql://ada@/game?host=$S1", {"PGPASSFILE": "$HOME/pass"}),
    "passfile": ("postgresql://ada@/game?host=$S1&passfile=$HOME/pass", {}),
    "a service": ("postgresql://?service=mine", {}),
    "a service, beside variables of another server":
        ("postgresql://?service=mine", {"PGHOST": "127.0.0.1", "PGPORT": "$P2", "PGUSER": "nobody", "PGPASSWORD": "x"}),
    "a service's host, beside another one in a variable":
        ("postgresql://?service=mine", {"PGSERVICEFILE": "$HOME/services", "PGHOST": "127.0.0.2"}),
    "PGSERVICE": ("postgresql://", {"PGSERVICE": "mine"}),
    "PGSERVICE, another database": ("postgresql:///ada", {"PGSERVICE": "mine"}),
    "PGSERVICEFILE": ("postgresql://?service=mine", {"PGSERVICEFILE": "$HOME/services"}),
    "PGOPTIONS": ("postgresql:///game?host=$S1", {**LOGIN, "PGOPTIONS": "-c extra_float_digits=0 -c search_path=app"}),
    "options win over PGOPTIONS": ("postgresql:///game?host=$S1&options=-c%20search_path%3Dapp",
                                   {**LOGIN, "PGOPTIONS": "-c extra_float_digits=0"}),
    "application_name": ("postgresql:///game?host=$S1&application_name=theirs", LOGIN),
}  # fmt: skip


@pytest.mark.parametrize(("url", "variables"), CASES.values(), ids=CASES)
def test_recipes_come_to_where_psql_comes(place: Place, home: Path, url: str, variables: dict[str, str]) -> None:
    by_psql, by_recipe = ask(place.psql, url, variables, place.names, home)
    assert by_psql.code == 0, by_psql
    assert (by_recipe.code, by_recipe.out) == (0, by_psql.out), by_recipe


REFUSED = {
    "the server has no TLS": (TYPED, {"PGSSLMODE": "require"}),
    "a service that is not there": ("postgresql://?service=other", {}),
    "no host takes writes": ("postgresql://ada@/game?host=$S2", {"PGTARGETSESSIONATTRS": "read-write"}),
    "a wrong password": (GAME, {"PGPASSWORD": "ZJQX@ZJQX"}),
    "another way to log in": ("postgresql://ada@/game?host=$S2", {"PGREQUIREAUTH": "scram-sha-256"}),
    "~ is the shell's": ("postgresql://ada@/game?host=$S1&passfile=~/pass", {}),
    "hosts and ports that do not pair": ("postgresql://", {"PGHOST": "a,b", "PGPORT": "1,2,3"}),
    "a name that the DNS could not hold": ("postgresql://ada@a..b/game", {}),
}


@pytest.mark.parametrize(("url", "variables"), REFUSED.values(), ids=REFUSED)
def test_recipes_are_refused_where_psql_is(place: Place, home: Path, url: str, variables: dict[str, str]) -> None:
    by_psql, by_recipe = ask(place.psql, url, variables, place.names, home)
    assert by_psql.code == 2, by_psql
    code, says = (3, "postgresql:///?service=other names") if "service" in url else (4, "cannot use postgresql://")
    assert by_recipe.code == code, by_recipe
    assert by_recipe.err.startswith(f"error    {says}"), by_recipe
    assert not re.search("Traceback|QX|ZJ", by_recipe.err), by_recipe


def test_how_long_to_wait_for_a_login_may_come_from_a_variable(db: Db) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://ada@127.0.0.1:{silent.getsockname()[1]}/game"
        began = time.monotonic()
        done = db.invoke("verify", env={"DATABASE_URL": url, "PGCONNECT_TIMEOUT": "2", "CONNECT_TIMEOUT": "1min"})
    assert done.code == 4, done
    assert time.monotonic() - began < 30


def test_variables_of_other_servers_do_not_touch_the_embedded_one(place: Place) -> None:
    elsewhere = {
        "PGHOSTADDR": "127.0.0.1", "PGPORT": place.names["P1"], "PGSERVICE": "nowhere", "PGUSER": "ada",
        "PGDATABASE": "game", "PGOPTIONS": "-c no.such=thing -c jit=maybe", "PGREQUIREPEER": "nobody",
        "PGTARGETSESSIONATTRS": "standby",
    }  # fmt: skip
    its_own = {"DATABASE_URL": "embedded", embedded.DATA_VARIABLE: str(place.second.data.parent.parent)}
    environment = clean_environment() | elsewhere | its_own
    done = run([sys.executable, "-m", "invoke", "verify"], environment)
    assert done.code == 5, done
    assert re.search(r"^target   database postgres, schema public on the embedded server", done.out, re.M), done
    assert "second" in "".join(in_psql(f"{QUERY};", environment))


def in_psql(commands: str, environment: dict[str, str]) -> list[str]:
    words = [sys.executable, "-m", "invoke", "db.psql"]
    done = subprocess.run(words, env=environment, input=commands, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_psql_gets_no_secret_as_an_argument(db: Db) -> None:
    db.execute("CREATE SCHEMA app")
    url = f"{db.url}&password=QXZJ&sslpassword=ZJQX&search_path=app, public&options=-c%20geqo%3Doff"
    asked = "\\! tr '\\0' ' ' </proc/$PPID/cmdline; echo; echo $PGPASSWORD\nSHOW search_path;\nSHOW geqo;\n"
    said = in_psql(asked, clean_environment() | {"DATABASE_URL": url})
    arguments = next(line for line in said if db.name in line and not line.startswith("target"))
    assert not re.search("QXZJ|ZJQX", arguments), said
    assert {"QXZJ", " app, public", " off"} <= set(said), said


# ── TLS ────────────────────────────────────────────────────────────────────────────────────────────────────────────

OPENSSL = shutil.which("openssl")
# The embedded binaries know no TLS, neither the server nor psql.
PSQL = shutil.which("psql")


@pytest.fixture(scope="module")
def certificates() -> Iterator[Path]:
    """A CA (ca.crt), another one (other.crt), and the first one's certificate for localhost."""
    with tempfile.TemporaryDirectory(prefix="budget-engine-certificates-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PgBouncer runs as another user

        def openssl(*words: str) -> None:
            subprocess.run([str(OPENSSL), *words], cwd=folder, check=True, capture_output=True)

        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        for ca in ("ca", "other"):
            openssl("req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.crt", "-subj", f"/CN={ca}")
        openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
        (folder / "names").write_text("subjectAltName = DNS:localhost\n")
        signer = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"]
        openssl("x509", "-req", "-in", "server.csr", *signer, "-extfile", "names", "-out", "server.crt")
        for file in folder.iterdir():
            file.chmod(0o644)
        yield folder


@pytest.fixture(scope="module")
def pooler(place: Place, certificates: Path) -> Iterator[Pooler]:
    """TLS on a loopback port, for whoever asks for it, in front of the second server."""
    settings = {
        "listen_addr": "127.0.0.1",
        "client_tls_sslmode": "allow",
        "client_tls_key_file": str(certificates / "server.key"),
        "client_tls_cert_file": str(certificates / "server.crt"),
        "ignore_startup_parameters": "extra_float_digits,options",
    }
    with Pooler(place.second, roles=("ada",), settings=settings, port=closed_port()) as pooler:
        yield pooler


def logins(pooler: Pooler) -> list[tuple[str, str, bool]]:
    """Return the database, the user and whether TLS was spoken of every login so far."""
    log = (pooler.folder / "log").read_text()
    seen = re.findall(r"login attempt: db=(\S+) user=(\S+) tls=(\S+)", log)
    return [(dbname, user, tls != "no") for dbname, user, tls in seen]


HERE = "postgresql://ada@localhost:$PORT/game"
CA = "sslrootcert=$CERTIFICATES/ca.crt"
SECURED: dict[str, tuple[str, dict[str, str], bool | None]] = {  # …, whether TLS is spoken; None: refused
    "by default": (HERE, {}, True),
    "sslmode=disable": (f"{HERE}?sslmode=disable", {}, False),
    "PGSSLMODE=disable": (HERE, {"PGSSLMODE": "disable"}, False),
    "the URL wins": (f"{HERE}?sslmode=require", {"PGSSLMODE": "disable"}, True),
    "require": (f"{HERE}?sslmode=require", {}, True),
    "verify-full": (f"{HERE}?sslmode=verify-full&{CA}", {}, True),
    "verify-full by variables":
        (HERE, {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": "$CERTIFICATES/ca.crt"}, True),
    "~/.postgresql/root.crt": (f"{HERE}?sslmode=verify-ca", {"HOME": "$CERTIFICATES/home"}, True),
    "by a service": ("postgresql://?service=tls", {"PGSERVICEFILE": "$CERTIFICATES/services"}, True),
    "another name": (f"postgresql://ada@127.0.0.1:$PORT/game?sslmode=verify-full&{CA}", {}, None),
    "another name, not asked for": (f"postgresql://ada@127.0.0.1:$PORT/game?sslmode=verify-ca&{CA}", {}, True),
    "another CA": (f"{HERE}?sslmode=verify-full&sslrootcert=$CERTIFICATES/other.crt", {}, None),
    "another CA, and require": (f"{HERE}?sslmode=require&sslrootcert=$CERTIFICATES/other.crt", {}, None),
    "no CA": (f"{HERE}?sslmode=verify-full", {}, None),
    "~ is the shell's": (f"{HERE}?sslmode=verify-full&sslrootcert=~/ca.crt", {"HOME": "$CERTIFICATES"}, None),
}  # fmt: skip


@pytest.mark.skipif(poolers.PROGRAM is None or poolers.CONFIGURATION is None, reason="pgbouncer is not on PATH")
@pytest.mark.skipif(OPENSSL is None, reason="openssl is not on PATH")
@pytest.mark.skipif(PSQL is None, reason="psql, with TLS, is not on PATH")
@pytest.mark.parametrize("case", SECURED)
def test_recipes_speak_tls_where_psql_does(pooler: Pooler, certificates: Path, tmp_path: Path, case: str) -> None:
    url, variables, expected = SECURED[case]
    names = {"PORT": str(pooler.port), "CERTIFICATES": str(certificates)}
    service = f"[tls]\nhost=localhost\nport={pooler.port}\nuser=ada\ndbname=game\nsslmode=verify-full\n"
    (certificates / "services").write_text(f"{service}sslrootcert={certificates}/ca.crt\n")
    (certificates / "home" / ".postgresql").mkdir(parents=True, exist_ok=True)
    shutil.copy(certificates / "ca.crt", certificates / "home" / ".postgresql" / "root.crt")
    before = len(logins(pooler))
    by_psql, by_recipe = ask(PSQL, url, variables, names, tmp_path)
    login = [] if expected is None else [("game", "ada", expected)]
    assert logins(pooler)[before:] == 2 * login, (by_psql, by_recipe)
    assert (by_psql.code, by_recipe.code) == ((0, 0) if login else (2, 4)), (by_psql, by_recipe)
