"""Every way to end: docs/troubleshooting.md lists it, what helps is what helps, and nothing ends in a traceback."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import signal
import socket
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pooler as poolers
import psycopg
import pytest
import warm
from budget_engine import errors
from budget_engine.migration import chain
from budget_engine.output.console import LABEL, reported
from budget_engine.postgres.embedded import Cluster
from conftest import (
    MIGRATIONS,
    THE_TURN,
    TRAP,
    UNTRAP,
    WAITING,
    Db,
    Run,
    clean_environment,
    database,
    ended,
    holding,
    private_server,
    run,
    until,
)
from pooler import Pooler
from proxy import COMMITTED, Proxy, containing, cut, on_nth, socket_of
from psycopg.errors import lookup
from states import CORE_ROWS, CORE_WITH_UUID_TURNS
from test_command_line import (
    PASSWORD,
    assert_refused,
    copied,
    hang_up,
    invoked,
    peer,
    recipe,
    refuse_password,
    speak_http,
    stay_silent,
)

README, TROUBLESHOOTING = ((chain.ROOT / name).read_text("utf-8") for name in ("README.md", "docs/troubleshooting.md"))
SCRIPTS = sorted((chain.ROOT / "scripts").rglob("*.py"))
STEMS = [step.stem for step in chain.load().steps if step.task != "fix"]
SAID = "\nhelp     "


# ── docs/troubleshooting.md ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """A row of the table: an exit code ("" where nothing ends), and the messages that have it."""

    code: str
    messages: tuple[str, ...]

    def names(self, code: str, template: str) -> bool:
        """Whether it is about this message, whose places are …"""
        patterns = (".*".join(map(re.escape, message.split("…"))) for message in self.messages)
        return code == self.code and any(re.fullmatch(pattern, template, re.S) for pattern in patterns)


def rows() -> list[Row]:
    cells = re.findall(r"^\| *(\d*) *\| (`.*?) \|", TROUBLESHOOTING, re.M)
    return [Row(code, tuple(re.findall("`(.*?)`", messages))) for code, messages in cells]


CASES = {name: case for name, case in vars(errors).items() if isinstance(case, errors.Case)}


def raised_by_python() -> set[tuple[str, str]]:
    """(exit code, message) of every case; of every SQLSTATE that has one of its own."""
    says = {(str(kind.exit_code), with_places(text)) for kind in CASES.values() for text in (kind.says, kind.in_a_step)}
    families = (errors.STEP_FAILED, errors.LOCK_TIMEOUT)  # the others stand by their SQLSTATEs
    in_steps = {(str(kind.exit_code), with_places(kind.in_a_step)) for kind in families}
    states = {(str(kind.exit_code), f"SQLSTATE {state}") for state, kind in sqlstates().items()}
    return {(code, text) for code, text in says if text and " in …: " not in text} | in_steps | states


def sqlstates() -> dict[str, errors.Case]:
    """Those of PostgreSQL, a class of them aside."""
    table = errors._BY_SQLSTATE.items()
    return {state: kind for state, kind in table if state and len(state) == 5 and not state.startswith("TB")}


def with_places(template: str) -> str:
    return re.sub(r"\{.*?\}", "…", template)


def raised_by_sql() -> set[tuple[str, str]]:
    raising = re.compile(r"RAISE EXCEPTION USING ERRCODE = '(TB\d+)',\s+MESSAGE = (?:format\()?'(.*?)'")
    found = [match for file in MIGRATIONS.glob("*.sql") for match in raising.findall(file.read_text())]
    assert len(found) == "".join(file.read_text() for file in MIGRATIONS.glob("*.sql")).count("ERRCODE = 'TB")
    return {(str(errors.for_sqlstate(state).exit_code), text.replace("%s", "…")) for state, text in found}


def said_by_inv() -> set[tuple[str, str]]:
    """The first lines of its failures, and of its last words; not of its progress."""
    files = [ast.parse((chain.ROOT / "scripts" / name).read_text()) for name in ("inv", "as_invoke.py")]
    calls = [node for file in files for node in ast.walk(file) if isinstance(node, ast.Call) and node.args]
    said = [text_of(call.args[0]) for call in calls if called(call) in {"Failure", "say", "exit", "Exit"}]
    texts = {text.partition("\n")[0].removeprefix("scripts/inv: ") for text in said} - {""}
    return {
        ("130" if text.startswith("interrupted") else "1", f"scripts/inv: {text}")
        for text in texts
        if not text.startswith(("installing", "installed"))
    }


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def said_without_an_end() -> set[tuple[str, str]]:
    """Notes, notices and warnings."""
    nodes = [node for file in SCRIPTS for node in ast.walk(ast.parse(file.read_text()))]
    texts = [text_of(node) for node in nodes if isinstance(node, ast.expr)]
    migrations = [file.read_text() for file in MIGRATIONS.glob("*.sql")]
    raised = [found for text in [*texts, *migrations] for found in re.findall("RAISE (?:NOTICE|WARNING) '(.*?)'", text)]
    formatted = [text_of(node) for node in nodes if isinstance(node, ast.JoinedStr)]
    lines = [node.args for node in nodes if isinstance(node, ast.Call) and called(node) == "line"]
    labelled = [f"{text_of(args[0]):<{LABEL}}{text_of(args[1]) or '…'}" for args in lines if len(args) >= 2]
    return {("", text.replace("%", "…")) for text in (*formatted, *raised, *labelled)}


ENDINGS = sorted(raised_by_python() | raised_by_sql() | said_by_inv())


def test_every_ending_has_a_row() -> None:
    assert [ending for ending in ENDINGS if not any(row.names(*ending) for row in rows())] == []


def test_every_row_is_about_something() -> None:
    everything = {*ENDINGS, *said_without_an_end()}
    of_nothing = [
        (row.code, message)
        for row in rows()
        for message in row.messages
        if not any(Row(row.code, (message,)).names(*ending) for ending in everything)
    ]
    assert of_nothing == []
    assert min(len(message.replace("…", "").strip()) for row in rows() for message in row.messages) >= 7
    assert [row.code for row in rows()] == sorted((row.code for row in rows()), key=lambda code: int(code or 999))


def test_exit_codes_are_the_documented_ones() -> None:
    documented = re.findall(r"^\| (\d+) \|", README.partition("\n### Exit codes\n")[2].partition("\n#")[0], re.M)
    assert sorted(map(int, documented)) == sorted({0, *(case.exit_code for case in CASES.values())})


def test_every_sqlstate_bears_the_manuals_name_and_helps_in_its_own_way() -> None:
    commented = dict(re.findall(r'"(\w{5})": \w+,  # (\w+)', inspect.getsource(errors)))
    for state, kind in sqlstates().items():
        assert commented[state].replace("_", "") == lookup(state).__name__.lower()
        assert kind.remedy
        assert "{" not in kind.remedy
        assert len(kind.remedy.splitlines()) <= 3
    remedies = Counter(kind.remedy for kind in set(sqlstates().values()))
    assert set(remedies.values()) == {1}


def test_everything_raised_is_of_one_module() -> None:
    """Facts are filled in where it is raised; the words stand in the case."""
    internal = {"Exit", "SystemExit", "KeyboardInterrupt", "OperationalError", "TimeoutError", "PermissionError"}
    internal |= {"AttributeError"}  # of a package's __getattr__
    for file in SCRIPTS:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and called(node.exc)[0].isupper():
                name = called(node.exc)
                assert name in {*CASES, *internal}, f"{file.name}, line {node.lineno}: {name}"
                assert name in internal or places(CASES[name]) == given(node.exc), f"{file.name}, line {node.lineno}"


def places(kind: errors.Case) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", kind.says + kind.remedy))


def given(call: ast.Call) -> set[str]:
    return {str(word.arg) for word in call.keywords} - {"where", "remedy", "what", "before"}


def test_every_message_has_a_remedy() -> None:
    """Of its case, or of the places that raise it; Ctrl-C says it in one line."""
    without = {name for name, case in CASES.items() if case.says and not case.remedy}
    assert without == {"AMBIGUOUS_URL", "UNPARSABLE_URL", "STOPPED"}


# ── the server refuses, while a step runs ──────────────────────────────────────────────────────────────────────────


def remedy_of(done: Run) -> str:
    return " ".join(done.err.partition(SAID)[2].split())


def assert_ends(done: Run, kind: errors.Case, code: int, remedy: str = "") -> None:
    """One message, with what helps in this very case; no traceback."""
    assert done.code == code, done
    assert done.err.startswith("error    "), done
    assert f"\n{done.err}".count("\nerror    ") == done.err.count(SAID) == 1, done
    assert "Traceback" not in done.err + done.out, done
    assert remedy_of(done) == " ".join((remedy or kind.remedy).split()), done


def assert_says(done: Run, sqlstate: str) -> None:
    assert_ends(done, errors.for_sqlstate(sqlstate), errors.for_sqlstate(sqlstate).exit_code)
    assert f"\n         SQLSTATE {sqlstate}\n" in done.err, done


# What somebody's trigger does when a step of ours has begun.
BEGUN = "TG_TAG IN ('CREATE TABLE', 'ALTER TABLE')"
ACTIONS = {
    "25006": "PERFORM set_config('transaction_read_only', 'on', true)",
    "3F000": "CREATE TABLE nowhere.log ()",
    "42501": "PERFORM set_config('role', 'pg_monitor', true)",
    "42P01": "INSERT INTO log_of_commands VALUES (1)",
    "57014": "PERFORM pg_cancel_backend(pg_backend_pid()), pg_sleep(10)",
    "57P01": "PERFORM pg_terminate_backend(pg_backend_pid()), pg_sleep(10)",
}


@contextmanager
def last_step_pending(db: Db) -> Iterator[None]:
    """Whatever keeps it from being done, the database is as before."""
    db.execute("DROP TABLE turn_metrics")
    before = db.dump(data=True)
    yield
    assert db.dump(data=True) == before


def test_refusals_in_a_step(finished: Db) -> None:
    with last_step_pending(finished):
        for sqlstate, action in ACTIONS.items():
            finished.execute(TRAP.format(condition=BEGUN, action=action))
            assert_says(finished.invoke("setup"), sqlstate)
            finished.execute(UNTRAP)


def test_lock_that_is_not_to_be_had(finished: Db) -> None:
    with last_step_pending(finished), holding(finished, "LOCK TABLE turns IN ROW EXCLUSIVE MODE"):
        done = finished.invoke("setup", env={"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "0"})
    assert_says(done, "55P03")


def test_deadlock_for_which_there_is_no_patience(finished: Db) -> None:
    """The step, which holds prompt_snapshots, wants worlds; the other one has that, and wants prompt_snapshots.

    Only somebody's trigger, which has more patience than the step itself, gets it that far.
    """
    db = finished
    db.execute("ALTER TABLE prompt_snapshots DROP COLUMN budget_report")
    before = db.dump(data=True)
    patient = "PERFORM set_config('lock_timeout', '30s', true); LOCK TABLE worlds IN SHARE MODE"
    db.execute(TRAP.format(condition=BEGUN, action=patient))
    with holding(db, "SET LOCAL deadlock_timeout = '1min'; LOCK TABLE worlds IN ROW EXCLUSIVE MODE") as other:
        process = db.start("setup", LOCK_TIMEOUT="30s", LOCK_WAIT="0")
        until(lambda: db.value(WAITING), process)
        other.execute("LOCK TABLE prompt_snapshots IN ROW EXCLUSIVE MODE")
        done = ended(process)
    db.execute(UNTRAP)
    assert_says(done, "40P01")
    assert db.dump(data=True) == before


def test_session_that_may_not_be_idle(finished: Db) -> None:
    """Between two tries: another run is at work."""
    finished.execute(f"ALTER DATABASE {finished.name} SET idle_session_timeout = '50ms'")
    with last_step_pending(finished), psycopg.connect(f"{finished.url}&options=-c%20idle_session_timeout%3D0") as other:
        other.execute(THE_TURN)
        done = finished.invoke("setup")
        finished.execute(
            f"ALTER DATABASE {finished.name} RESET idle_session_timeout"
        )  # the dumps that are compared take longer
    assert_ends(done, errors.IDLE_SESSION, 4)


def test_line_that_is_cut(finished: Db) -> None:
    with (
        last_step_pending(finished),
        Proxy(socket_of(finished.cluster.sockets), server_says=on_nth(containing(COMMITTED), 1, cut)) as proxy,
    ):
        done = finished.invoke("setup", env={"DATABASE_URL": proxy.url(finished.name)})
    assert_ends(done, errors.for_sqlstate("08006"), 4)


def test_servers_table_of_locks_is_full(cluster: Cluster) -> None:
    """Another session's transaction has taken all but a few, which are enough for a login."""
    with private_server(max_locks_per_transaction="10", max_connections="10") as server, database(server) as db:
        db.migrate(*STEMS)
        with last_step_pending(db), holding(db, "SELECT") as hog:
            with suppress(psycopg.errors.OutOfMemory):
                for number in itertools.count():
                    hog.execute(f"SAVEPOINT before_{number}".encode())
                    hog.execute("SELECT pg_advisory_xact_lock(%s)", [number])
            hog.execute(f"ROLLBACK TO before_{number - 10}".encode())
            done = db.invoke("setup", env={"LOCK_WAIT": "0"})
        assert_says(done, "53200")


@pytest.mark.skipif(poolers.PROGRAM is None or poolers.CONFIGURATION is None, reason="pgbouncer is not installed")
def test_prepared_statement_of_another_client_of_the_pool(db: Db) -> None:
    """A trigger runs it in a session that is ours now; a step has changed its table meanwhile."""
    db.migrate(*STEMS[:2])
    before = db.dump(data=True)
    with Pooler(db.cluster, settings={"default_pool_size": "1"}) as pooler:
        with pooler.connect(db) as other:
            other.execute("PREPARE everything AS SELECT * FROM slots")
            other.execute("EXECUTE everything")
        db.execute(TRAP.format(condition="TG_TAG = 'ALTER TABLE'", action="EXECUTE 'EXECUTE everything'"))
        done = db.invoke("slots-flags", env={"DATABASE_URL": pooler.url(db)})
    db.execute(UNTRAP)
    assert "cached plan must not change result type" in done.err, done
    assert_says(done, "0A000")
    assert db.dump(data=True) == before


# ── no login: exit 4 ───────────────────────────────────────────────────────────────────────────────────────────────

ROLES = """
CREATE ROLE secretive LOGIN PASSWORD 'right-and-secret';
CREATE ROLE nologin;
CREATE ROLE limited LOGIN CONNECTION LIMIT 0;
CREATE ROLE guest LOGIN"""
HBA = """
local all secretive         scram-sha-256
local all rejected          reject
local all peer              peer
local all postgres,nologin,limited,guest,ghost trust
"""


@pytest.fixture(scope="module")
def guarded(cluster: Cluster) -> Iterator[Db]:
    """A database on a server that lets not everybody in, and not many."""
    with private_server(max_connections="6") as server, database(server) as db:
        db.execute(ROLES)
        db.execute(f"REVOKE CONNECT ON DATABASE {db.name} FROM public")
        db.execute(f"GRANT CONNECT ON DATABASE {db.name} TO limited, secretive")
        (server.data / "pg_hba.conf").write_text(HBA)
        db.execute("SELECT pg_reload_conf()")
        with suppress(psycopg.OperationalError):  # once the server has read the file
            while True:
                db.connect("secretive").close()
        yield db


def test_password_that_goes_out_without_tls_is_noted(guarded: Db) -> None:
    """Where the server is not on this machine, for all that its name says; of doctor it is a finding."""
    with Proxy(socket_of(guarded.cluster.sockets)) as proxy:
        url = f"postgresql://secretive:right-and-secret@HOST:{proxy.port}/{guarded.name}"
        for host, noted in (("db.example", True), ("localhost", False)):
            env = {"DATABASE_URL": f"{url.replace('HOST', host)}?hostaddr=127.0.0.1&sslmode=prefer"}
            for task in ("verify", "doctor"):
                done = guarded.invoke(task, env=env)
                assert "role secretive" in done.out, done
                assert ("note     no TLS on the way to" in done.out) is (noted and task == "verify"), done


# The URL's parts that are other, what helps, the SQLSTATE that it is known by.
REFUSALS: dict[str, tuple[dict[str, str], str]] = {
    "wrong password": ({"postgres@": "secretive:wrong-but-secret@"}, "28P01"),
    "no password": ({"postgres@": "secretive@"}, "28P01"),
    "no such role": ({"postgres@": "ghost@"}, "28000"),
    "NOLOGIN": ({"postgres@": "nologin@"}, "28000"),
    "pg_hba.conf rejects": ({"postgres@": "rejected@"}, "28000"),
    "pg_hba.conf has no line": ({"postgres@": "stranger@"}, "28000"),
    "peer": ({"postgres@": "peer@"}, "28000"),
    "no such database": ({"/test_": "/no_such_"}, "3D000"),
    "no CONNECT": ({"postgres@": "guest@"}, "42501"),
    "role's connections": ({"postgres@": "limited@"}, "53300"),
}


@pytest.mark.parametrize(("other", "sqlstate"), REFUSALS.values(), ids=REFUSALS)
def test_login_that_is_refused(guarded: Db, other: dict[str, str], sqlstate: str) -> None:
    [(part, instead)] = other.items()
    assert part in guarded.url
    done = guarded.invoke("setup", env={"DATABASE_URL": guarded.url.replace(part, instead)})
    assert_ends(done, errors.for_sqlstate(sqlstate), 4)
    assert "secret@" not in done.err + done.out


def test_server_that_has_no_room(guarded: Db) -> None:
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(guarded.connect())
        done = guarded.invoke("verify")
    assert_ends(done, errors.for_sqlstate("53300"), 4)


def test_tls_that_the_server_does_not_speak(db: Db) -> None:
    with Proxy(socket_of(db.cluster.sockets)) as proxy:
        done = db.invoke("setup", env={"DATABASE_URL": f"{proxy.url(db.name)}?sslmode=require"})
    assert_ends(done, errors.TLS, 4)


def test_session_that_cannot_begin_as_asked_for(db: Db) -> None:
    for asked in ({"PGTZ": "Nowhere"}, {"PGOPTIONS": "-c nonsense=1"}):
        assert_ends(db.invoke("setup", env=asked), errors.STARTUP_OPTION, 4)


def speak_german(client: socket.socket) -> None:
    """As a server does whose lc_messages is another language: what it says is not understood, and not guessed at."""
    client.recv(4096)
    client.sendall(b"N")
    client.recv(4096)
    fields = "SFATAL\0VFATAL\0C28P01\0MPasswort-Authentifizierung für Benutzer »u« fehlgeschlagen\0\0".encode()
    client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)


PEERS: list[tuple[Callable[[socket.socket], None], errors.Case]] = [
    (speak_http, errors.NOT_POSTGRES),
    (stay_silent, errors.SILENT_HOST),
    (hang_up, errors.LOST_CONNECTION),
    (speak_german, errors.NO_CONNECTION),
    (refuse_password, errors.for_sqlstate("28P01")),
]


def assert_leads_nowhere(place: str, kind: errors.Case) -> None:
    url = f"postgresql://somebody:{PASSWORD}@{place}/db"
    done = invoked("setup", DATABASE_URL=url, CONNECT_TIMEOUT="2")
    assert_ends(done, kind, 4)
    assert_refused(done, 4, f"postgresql://somebody:***@{place}/db")
    assert r"\u" not in done.err  # libpq begins a question with a tab


@pytest.mark.parametrize(("talk", "kind"), PEERS)
def test_peer_that_does_not_let_us_in(talk: Callable[[socket.socket], None], kind: errors.Case) -> None:
    with peer(talk) as port:
        assert_leads_nowhere(f"127.0.0.1:{port}", kind)


HOSTS = {
    **dict.fromkeys(("127.0.0.1:1", "[::1]:1", "127.0.0.1:1,no-such-host.invalid:2"), errors.NOBODY_THERE),
    **dict.fromkeys(("no-such-host.invalid:1", "two..dots:1", f"{'long' * 16}.example:1"), errors.NO_SUCH_HOST),
}


@pytest.mark.parametrize(("host", "kind"), HOSTS.items(), ids=HOSTS)
def test_host_where_nobody_is(host: str, kind: errors.Case) -> None:
    assert_leads_nowhere(host, kind)


NO_VALUES = {
    **dict.fromkeys(("target_session_attrs=x", "require_auth=x", "connect_timeout=x", "port=99999"), errors.PARAMETER),
    **dict.fromkeys(("sslmode=x", "channel_binding=x", "ssl_min_protocol_version=x"), errors.PARAMETER),
    "service=nowhere": errors.SERVICE,
}


@pytest.mark.parametrize(("query", "kind"), NO_VALUES.items(), ids=NO_VALUES)
def test_parameter_that_libpq_cannot_take(db: Db, query: str, kind: errors.Case) -> None:
    """Settings, exit 3, and the parameter is named; in a variable, too."""
    name, value = query.split("=")
    word = value if name == "service" else name.partition("_timeout")[0]
    for variables in ({"DATABASE_URL": f"{db.url}&{query}"}, {f"PG{name.upper().replace('_', '')}": value}):
        if variables.keys() & {"DATABASE_URL", "PGREQUIREAUTH", "PGSERVICE", "PGSSLMODE"}:
            done = db.invoke("setup", env=variables)
            assert_ends(done, kind, 3)
            assert word in done.err.partition("error")[2]


def test_member_of_the_owner_that_does_not_inherit(db: Db) -> None:
    """What the message says helps."""
    owner, member = f"{db.name}_owner", f"{db.name}_member"
    db.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # who had it before 15
    roles = f"CREATE ROLE {owner}; CREATE ROLE {member} LOGIN NOINHERIT IN ROLE {owner}"
    db.execute(f"{roles}; GRANT ALL ON SCHEMA public TO {owner}; GRANT CREATE ON DATABASE {db.name} TO {owner}")
    try:
        refused = db.invoke("setup", role=member)
        assert refused.code == 8, refused
        assert "?options=-c role=OWNER" in refused.err
        url = f"{db.url_as(member)}&options=-c role={owner}"
        done = db.invoke("setup", env={"DATABASE_URL": url})
        assert done.code == 0, done
    finally:
        db.execute(f"DROP OWNED BY {owner}, {member} CASCADE; DROP ROLE {owner}, {member}")


@pytest.mark.skipif(poolers.PROGRAM is None or poolers.CONFIGURATION is None, reason="pgbouncer is not installed")
def test_pooler_of_statements(finished: Db) -> None:
    """A transaction that travels in one message may pass; it ends the session where a statement of it fails."""
    finished.execute("ALTER TABLE slots DROP COLUMN min_chars CASCADE")
    with Pooler(finished.cluster, settings={"pool_mode": "statement"}) as pooler:
        env = {"DATABASE_URL": pooler.url(finished), "LOCK_TIMEOUT": "100ms", "LOCK_WAIT": "0"}
        with holding(finished, "LOCK TABLE slots"):
            done = [finished.invoke(task, env=env) for task in ("setup", "verify", "doctor")]
    assert ["pool_mode = transaction" in run.out + run.err for run in done] == [True] * 3, done


@pytest.mark.skipif(poolers.PROGRAM is None or poolers.CONFIGURATION is None, reason="pgbouncer is not installed")
def test_login_that_a_pooler_refuses(db: Db) -> None:
    def refused(url: str) -> Run:
        return db.invoke("setup", env={"DATABASE_URL": url})

    with Pooler(db.cluster, roles=("postgres", "ghost"), settings={"max_client_conn": "2"}) as pooler:
        assert_ends(refused(pooler.url(db, "stranger")), errors.LOGIN, 4)
        assert_ends(refused(pooler.url(db, "ghost")), errors.LOGIN, 4)
        assert_ends(refused(pooler.url(db).replace("/test_", "/no_such_")), errors.NO_DATABASE, 4)
        assert_ends(refused(f"{pooler.url(db)}&options=-c%20work_mem%3D1MB"), errors.STARTUP_OPTION, 4)
        with pooler.connect(db), pooler.connect(db):
            assert_ends(refused(pooler.url(db)), errors.FULL_SERVER, 4)


# ── no traceback, whatever is broken ───────────────────────────────────────────────────────────────────────────────


def shell(command: str, **environment: str) -> Run:
    """Run a command with `invoke` in it."""
    variables = clean_environment() | {"python": sys.executable} | environment
    return run(["/bin/sh", "-c", f'invoke() {{ "$python" -m invoke "$@"; }}; {command}'], variables)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A checkout to break."""
    return copied(tmp_path / "checkout")


@pytest.mark.parametrize(
    ("file", "content"), [("db/verify.sql", None), ("db/migrations/20250222_turn_metrics.sql", b"\xff\xfe")]
)
def test_checkout_that_is_not_whole(broken: Path, db: Db, file: str, content: bytes | None) -> None:
    """A file is missing, or garbled."""
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_bytes(content)
    before = db.dump()
    done = recipe(broken, "setup", DATABASE_URL=db.url)
    assert_ends(done, errors.CHECKOUT, 1)
    assert str(broken / file) in done.err
    assert db.dump() == before


HIDE = """
import os, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["HIDDEN"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())"""


@pytest.mark.parametrize(("task", "package"), [("setup", "psycopg"), ("doctor", "psycopg"), ("db.url", "dotenv")])
def test_package_that_is_not_installed(tmp_path: Path, task: str, package: str) -> None:
    """Invoke is somebody's own."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    hidden = {"PYTHONPATH": str(tmp_path), "HIDDEN": package, "DATABASE_URL": "embedded"}
    done = invoked(task, BUDGET_ENGINE_POSTGRES=str(tmp_path / "postgres"), **hidden)
    assert_ends(done, errors.NO_PACKAGE, 1)
    assert f"No module named '{package}'" in done.err


def test_end_names_its_cause_to_who_started_the_task() -> None:
    """scripts/as_invoke.py, which has the environment made anew."""
    answer = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end, reported():
            raise ModuleNotFoundError(name="psycopg")
    finally:
        signal.signal(signal.SIGINT, answer)
    assert isinstance(end.value.__cause__, ModuleNotFoundError)


def test_mistake_of_our_own_is_no_traceback_and_gives_no_secret_away(broken: Path) -> None:
    work = broken / "scripts/budget_engine/commands/session.py"
    work.write_text(work.read_text().replace("    return given, where\n", "    raise ValueError(where.conninfo)\n"))
    done = recipe(broken, "setup", DATABASE_URL="postgresql://u:very-s3cret@localhost:1/db")
    assert_ends(done, errors.UNFORESEEN, 1)
    assert "commands/session.py, line " in done.err
    assert "very-s3cret" not in done.err + done.out


CLOSED = [">&-", "2>&-", "<&-", ">&- 2>&- <&-"]
FULL = [["stdout"], ["stderr"], ["stdout", "stderr"]]
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.mark.parametrize("streams", CLOSED)
def test_streams_that_are_closed_change_no_exit_code(db: Db, streams: str) -> None:
    for tasks, code in {"verify": 5, "setup prereqs --recreate db.url": 0}.items():
        done = shell(f"invoke {tasks} {streams}", DATABASE_URL=db.url)
        assert (done.code, "Traceback" in done.err + done.out) == (code, False), done
    assert db.differing() == {}


# Each way to say something on stdout (lines, documents, Invoke's own), with the exit code where that can be read.
SAYING = {
    **dict.fromkeys(("verify", "verify --format json"), 5),
    **dict.fromkeys(("plan --sql", "setup", "doctor", "db.url", "--list"), 0),
}


@needs_full
@pytest.mark.parametrize("full", FULL, ids=" ".join)
def test_what_cannot_be_written_is_no_success(db: Db, full: list[str]) -> None:
    """The work is done all the same; a task that ends badly keeps its own exit code."""
    for task, code in SAYING.items():
        with Path("/dev/full").open("w") as device:
            streams: dict[str, Any] = {name: device if name in full else PIPE for name in ("stdout", "stderr")}
            environment = clean_environment() | {"DATABASE_URL": db.url}
            if task.startswith("--"):  # what Invoke prints meets the end of Python itself
                command = [sys.executable, "-m", "invoke", *task.split()]
                process = Popen(command, cwd=chain.ROOT, env=environment, text=True, **streams)
            else:
                process = warm.start(tuple(task.split()), environment, **streams)
        done = ended(process)
        silent = full == ["stderr"] and task != "db.url" and "--format" not in task and "--sql" not in task
        assert done.code == (code or int(not silent)), (task, done)
        assert full != ["stdout"] or "error    stdout could not be written: " in done.err, (task, done)
        assert not re.search("Traceback|Exception ignored", f"{done.out} {done.err}"), done
    assert db.differing() == {}


# The environment that the tests run in, where scripts/inv has made it; else its own, which it may have to make.
INSTALLED = {"BUDGET_ENGINE_VENV": sys.prefix} if Path(sys.prefix, ".inv-stamp").exists() else {}
# What Invoke prints before it loads tasks.py, and after.
LISTINGS = {"invoke": ("--list",), '"$python" scripts/inv': ("--version", "--list")}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", LISTINGS)
def test_listing_that_nobody_reads_to_its_end_is_silent(command: str, unbuffered: str) -> None:
    """Whether each line is written at once, or all of them at the end."""
    if not INSTALLED:
        shell(f"{command} --version")
    for word in LISTINGS[command]:
        done = shell(f"({command} {word}; echo $? >&2) | true", PYTHONUNBUFFERED=unbuffered, **INSTALLED)
        assert done.err == "0\n", (word, done)


def test_a_pipe_that_does_not_block_gets_everything() -> None:
    program = textwrap.dedent("""
        import os, subprocess, sys, time
        read, write = os.pipe()
        os.set_blocking(write, False)
        os.environ["PYTHONPATH"] = "scripts"
        emit = "from budget_engine.output.console import CONSOLE; CONSOLE.emit('x' * 300_000)"
        child = subprocess.Popen([sys.executable, "-c", emit], stdout=write)
        os.close(write)
        time.sleep(0.5)
        print(sum(map(len, iter(lambda: os.read(read, 4096), b""))), child.wait())""")
    done = run([sys.executable, "-c", program], clean_environment())
    assert (done.out, done.err) == ("300001 0\n", "")


def test_question_that_nobody_can_be_asked(db: Db) -> None:
    db.execute(CORE_WITH_UUID_TURNS + CORE_ROWS)
    before = db.dump(data=True)
    for streams in ("<&-", "</dev/null"):
        done = shell(f"invoke prereqs --recreate {streams}", DATABASE_URL=db.url)
        assert_ends(done, errors.NOT_CONFIRMED, 6)
    assert db.dump(data=True) == before


LOCALES = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"},
]


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES, ids=["ascii", "C", "latin-1"])
def test_locale_that_lacks_our_characters(db: Db, locale: dict[str, str]) -> None:
    for words in ("--help test", "setup verify"):  # the help has a … of its own
        done = db.invoke(*words.split(), env=locale)
        assert (done.code, done.err) == (0, ""), done
    missing = db.invoke("setup", env={**locale, "DATABASE_URL": db.url.replace("/test_", "/%E2%86%92")})
    assert_ends(missing, errors.NO_DATABASE, 4)


@pytest.mark.parametrize("place", ["~nobody-of-this-name/x", "/proc/x", "{loop}"])
def test_place_where_nothing_can_lie(tmp_path: Path, place: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    done = invoked("db.start", BUDGET_ENGINE_POSTGRES=place.format(loop=tmp_path / "loop"))
    assert done.code == 4, done
    assert done.err.startswith("error    The embedded server cannot be used: "), done
    assert "Traceback" not in done.err


def test_place_of_the_environment_that_nobody_has() -> None:
    nowhere = {"BUDGET_ENGINE_VENV": "~nobody-of-this-name/x"}
    done = run([sys.executable, "scripts/inv", "--list"], clean_environment() | nowhere)
    assert done.code == 1, done
    assert done.err.startswith("scripts/inv: BUDGET_ENGINE_VENV "), done


def test_psql_that_cannot_be_run(tmp_path: Path, db: Db) -> None:
    (tmp_path / "psql").write_bytes(b"\x7fELF, but not really")
    (tmp_path / "psql").chmod(0o755)
    done = db.invoke("db.psql", env={"PATH": str(tmp_path)})
    target, error = done.err.split("\n", 1)
    assert target.startswith("target "), done
    assert_ends(replace(done, err=error), errors.SYSTEM_REFUSES, 1)


# Python imports a module of this name at its start; the second signal comes while the message is printed.
STRIKE_TWICE = """
import os, signal, sys

def strike():
    os.kill(os.getpid(), signal.SIGINT)

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "psycopg":
            sys.meta_path.remove(self)
            strike()

class Stderr:
    def isatty(self):
        return False

    def write(self, text):
        strike()
        return sys.__stderr__.write(text)

    def flush(self):
        sys.__stderr__.flush()

sys.meta_path.insert(0, Hook())
sys.stderr = Stderr()"""


def test_ctrl_c_once_more(db: Db, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STRIKE_TWICE)
    done = db.invoke("setup", env={"PYTHONPATH": str(tmp_path)})
    assert (done.code, len(done.err.splitlines())) == (130, 1), done


def test_ctrl_c_while_python_starts(tmp_path: Path) -> None:
    """What scripts/inv blocks, tasks.py answers."""
    program = textwrap.dedent("""
        import os, signal, sys
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.kill(os.getpid(), signal.SIGINT)
        os.execv(sys.executable, [sys.executable, "scripts/as_invoke.py", "verify"])""")
    done = run([sys.executable, "-c", program], clean_environment() | {"DATABASE_URL": ""})
    assert (done.code, len(done.err.splitlines())) == (130, 1), done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
