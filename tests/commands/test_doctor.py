"""The doctor: what is wrong is found, on real servers, and its exit code is the one that setup ends with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pooler as poolers
import psycopg
import pytest
import states
import supabase
from budget_engine import errors
from budget_engine.commands import doctor as doctors
from budget_engine.commands.doctor import NOTE, OK, PROBLEM, Finding, Limit
from budget_engine.migration import chain
from budget_engine.migration.survey import Server
from budget_engine.postgres import connection, embedded
from budget_engine.postgres.embedded import Cluster, Health
from budget_engine.settings import completed, parse_target
from conftest import Db, Run, clean_environment, database, private_server, run
from pooler import Pooler
from terminal import on_terminal

CHAIN = chain.load()
STEMS = [step.stem for step in CHAIN.steps if "fix" not in step.stem]
PASSWORD = "two words and S3cret%21"
SPOKEN = ("two words", "words and", "S3cret")
needs_pgbouncer = pytest.mark.skipif(
    poolers.PROGRAM is None or poolers.CONFIGURATION is None, reason="pgbouncer, or Debian's pgbouncer.ini, is not here"
)


def page(done: Run, code: int) -> dict[str, str]:
    """Return topic → its worst state; what must be so on each page is checked here."""
    lines = done.out.splitlines()
    assert done.code == code, done
    assert lines[-1].startswith(f"setup would end with exit {code}" if code else "setup could run"), done
    assert done.err == "", done
    assert not [word for word in (*SPOKEN, "Traceback") if word in done.out], done
    found: dict[str, list[str]] = {}
    for line in re.split(r"^(?=\w+ +\w+ )", done.out, flags=re.M):
        if match := re.match(rf"({OK}|{NOTE}|{PROBLEM}) +(\w+) ", line):
            found.setdefault(match[2], []).append(match[1])
            assert ("what to do: " in line) == (match[1] != OK), line
    assert found["python"] == [OK], done
    return {topic: max(given, key=[OK, NOTE, PROBLEM].index) for topic, given in found.items()}


def amiss(done: Run, code: int) -> dict[str, str]:
    """Return the topics that are not ok."""
    return {topic: state for topic, state in page(done, code).items() if state != OK}


# ── nothing wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_healthy_database_before_and_after_setup(db: Db) -> None:
    before = db.dump()
    first = db.invoke("doctor")
    assert set(page(first, 0).values()) == {OK}
    assert {"login", "tls", "server", "schema", "checks", "rights"} <= set(page(first, 0))
    assert db.dump() == before
    assert db.invoke("setup").code == 0
    assert set(page(db.invoke("doctor"), 0).values()) == {OK}


def test_target_and_source_come_first(db: Db) -> None:
    lines = db.invoke("doctor").out.splitlines()
    shown = completed(parse_target(db.url), ".env").display
    assert lines[0] == f"target   {shown} (environment variable DATABASE_URL)"


# ── what setup would end with ──────────────────────────────────────────────────────────────────────────────────────

# What stands, what is added to the URL; exit code, topic.
HINDRANCES = {
    "another feature's table": (states.ANOTHER_FEATURE, "", 6, "checks"),
    "older core": (states.CORE_WITH_UUID_TURNS, "", 6, "checks"),
    "no schema": ("", "&schema=nowhere", 1, "schema"),
    "read-only": ("ALTER DATABASE {0} SET default_transaction_read_only = on", "", 8, "writes"),
    "no such database": ("", "&dbname=no_such_database", 4, "login"),
}


@pytest.mark.parametrize(("sql", "query", "code", "topic"), HINDRANCES.values(), ids=HINDRANCES)
def test_hindrance(db: Db, sql: str, query: str, code: int, topic: str) -> None:
    if sql:
        db.execute(sql.replace("{0}", db.name))
    before = db.dump()
    url = {"DATABASE_URL": db.url + query}
    assert amiss(db.invoke("doctor", env=url), code) == {topic: PROBLEM}
    assert db.dump() == before
    assert db.invoke("setup", env=url).code == code


@pytest.mark.parametrize("path", ["information_schema, public", "pg_temp, public", "pg_catalog"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_path_that_leads_into_a_schema_of_the_servers(db: Db, role: str, path: str, by_hand: bool) -> None:
    """Half the steps would run, then one would be refused, or its table be gone with the session."""
    db.execute(states.by_hand() if by_hand else "")
    before = db.dump()
    db.execute(f"ALTER DATABASE {db.name} SET search_path = {path}")
    for user in ("postgres", role):
        for task in ("verify", "status --check", "plan", "plan --sql", "rehearse", "setup"):
            done = db.invoke(*task.split(), role=user)
            assert (done.code, "?schema=" in done.err) == (1, True), (task, done)
        page(db.invoke("doctor", role=user), 1)
    there = f"{db.url}&schema=public"
    assert db.invoke("doctor", env={"DATABASE_URL": there}).code == 0
    db.execute(f"ALTER DATABASE {db.name} RESET search_path")
    assert db.dump() == before
    assert db.invoke("setup").code == 0


@pytest.mark.parametrize("done_before", [False, True])
def test_path_that_names_pg_catalog_leads_to_the_schema_behind_it(db: Db, done_before: bool) -> None:
    """It is searched anyway, and nothing is ever made there."""
    if done_before:
        assert db.invoke("setup").code == 0
        db.execute("DROP INDEX idx_games_owner; ALTER TABLE prompt_snapshots DROP COLUMN budget_report")
    db.execute(f"ALTER DATABASE {db.name} SET search_path = pg_catalog, public")
    assert db.invoke("setup").code == 0
    assert db.invoke("verify").code == 0
    db.execute(f"ALTER DATABASE {db.name} RESET search_path")
    assert db.differing() == {}


@pytest.fixture(scope="module")
def role(cluster: Cluster) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    name = f"doctor_{os.getpid()}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN")
        yield name
        connection.execute(f"DROP ROLE {name}")


def test_role_without_rights(role: str, db: Db) -> None:
    db.execute(states.NOT_TO_ALL)
    assert amiss(db.invoke("doctor", role=role), 8) == {"rights": PROBLEM}
    assert db.invoke("setup", role=role).code == 8


OWNED = states.by_hand() + states.OWN

# What would stop setup half way: a state for role {role}; whether it is Supabase's; the right that is lacking.
RIGHTS = {
    "users": ("GRANT USAGE ON SCHEMA auth TO {role}", True, "REFERENCES on table auth.users"),
    "their schema": ("GRANT REFERENCES ON auth.users TO {role}", True, "USAGE on schema auth"),
    "whom policies ask": (
        "CREATE TABLE profiles (id uuid, role text);" + OWNED + "GRANT REFERENCES ON auth.users TO {role}",
        True,
        "USAGE on schema auth",
    ),
    "part of the core": (
        states.CORE[: states.CORE.index("CREATE TABLE IF NOT EXISTS rulesets")],
        False,
        "REFERENCES on table worlds",
    ),
}


@pytest.mark.parametrize(("state", "on_supabase", "lacking"), RIGHTS.values(), ids=RIGHTS)
def test_right_that_a_step_would_miss_half_way(db: Db, state: str, on_supabase: bool, lacking: str) -> None:
    if on_supabase:
        supabase.install(db)
    db.execute(f"CREATE ROLE {db.name} LOGIN; GRANT CREATE ON SCHEMA public TO {db.name}")
    try:
        db.execute(state.replace("{role}", db.name))
        before = db.dump(data=True)
        open_to_all = {"anon": NOTE, "profiles": NOTE} if "profiles" in state else {}
        assert amiss(db.invoke("doctor", role=db.name), 8) == {"rights": PROBLEM} | open_to_all
        for task in ("plan", "rehearse", "setup"):
            done = db.invoke(task, role=db.name)
            assert (done.code, lacking in done.err) == (8, True), done
        assert db.dump(data=True) == before
    finally:
        db.execute(f"DROP OWNED BY {db.name} CASCADE; DROP ROLE {db.name}")


def test_forced_row_security_is_nothing_to_a_role_that_may_pass_it(db: Db) -> None:
    db.execute(states.by_hand() + "ALTER TABLE slots ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    assert amiss(db.invoke("doctor"), 0) == {}
    assert db.invoke("setup").code == 0


def test_rows_that_refuse_are_foretold_as_far_as_is_known(db: Db) -> None:
    """Of a foreign key that exists they are counted, as verify does; of one to be made, nobody says that it can be."""
    db.execute(states.by_hand("bigint", states.ORPHANS))
    assert amiss(db.invoke("doctor"), 0) == {}
    assert "exit 5 where rows refuse foreign key prompt_snapshots (turn_id)" in db.invoke("plan").out
    assert "where no row refuses" in db.invoke("rehearse").out
    assert db.invoke("setup").code == 5
    assert amiss(db.invoke("doctor"), 5) == {"rows": PROBLEM}
    foretold = db.invoke("plan")
    assert (foretold.code, "prompt_snapshots: 1 rows point to nothing" in foretold.err) == (5, True)
    db.execute("UPDATE prompt_snapshots SET turn_id = NULL WHERE turn_id = 999999")
    assert amiss(db.invoke("doctor"), 0) == {}
    assert (db.invoke("plan").code, db.invoke("setup").code) == (0, 0)
    assert amiss(db.invoke("doctor"), 0) == {}


def test_rows_that_refuse_what_is_only_documented_are_nothing_to_doctor(db: Db) -> None:
    db.execute(states.altered("DROP INDEX idx_turns_game_idx; UPDATE turns SET idx = 1 WHERE idx = 2"))
    for task in ("doctor", "plan"):
        done = db.invoke(task)
        assert (done.code, "exit 5" in done.out) == (0, False), done
    done = db.invoke("setup")
    assert (done.code, "refused" in done.out) == (0, True), done
    assert amiss(db.invoke("doctor"), 0) == {}


def test_read_only_and_in_the_way_are_both_said(role: str, db: Db) -> None:
    db.execute(states.ANOTHER_FEATURE + f"ALTER DATABASE {db.name} SET default_transaction_read_only = on")
    assert amiss(db.invoke("doctor", role=role), 6) == {"checks": PROBLEM, "writes": PROBLEM, "rights": PROBLEM}
    assert db.invoke("setup", role=role).code == 6


def test_read_only_where_nothing_is_to_do(db: Db) -> None:
    assert db.invoke("setup").code == 0
    db.execute(f"ALTER DATABASE {db.name} SET default_transaction_read_only = on")
    assert amiss(db.invoke("doctor"), 0) == {"writes": NOTE}
    assert db.invoke("setup").code == 0


def test_table_that_somebody_keeps_locked(db: Db) -> None:
    db.migrate(*STEMS)
    patience = {"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "0"}
    with db.connect(autocommit=False) as other:
        other.execute("LOCK TABLE slots IN ACCESS EXCLUSIVE MODE")
        done = db.invoke("doctor", env=patience | {"LOCK_WAIT": "60s"})
        assert amiss(done, 7) == {"checks": PROBLEM}
        assert f"pid {other.info.backend_pid}" in done.out
        assert db.invoke("setup", env=patience).code == 7


# ── settings ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def shared_tree() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="be-"))
    made.chmod(0o755)
    for folder in ("scripts", "db"):
        shutil.copytree(chain.ROOT / folder, made / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("tasks.py", "pyproject.toml"):
        shutil.copy(chain.ROOT / file, made)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def tree(shared_tree: Path) -> Iterator[Path]:
    """A checkout of its own, to which a test may add files and an embedded server."""
    before = set(shared_tree.iterdir())
    yield shared_tree
    with suppress(errors.RecipeError):
        embedded.stop(embedded.locate(shared_tree))
    for path in set(shared_tree.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def doctor(tree: Path, **environment: str) -> Run:
    return run([sys.executable, "-m", "invoke", "doctor"], clean_environment() | environment, cwd=tree)


@pytest.mark.parametrize(
    "given",
    [{"DATABASE_URL": "mysql://u:p@h/db"}, {"DATABASE_URL": ""}, {"CI": "true"}, {"LOCK_TIMEOUT": "soon"}],
    ids=lambda given: "".join(given),
)
def test_unusable_settings(tree: Path, given: dict[str, str]) -> None:
    found = page(doctor(tree, **given), 3)
    assert found == {"python": OK, "settings": PROBLEM}
    assert not (tree / ".postgres").exists()


def test_unusable_settings_do_not_hide_the_embedded_server(tree: Path) -> None:
    embedded.start(embedded.locate(tree))
    assert page(doctor(tree, CI="true"), 3)["embedded"] == OK


def test_what_is_odd_in_the_url_and_in_the_env_file(tree: Path, db: Db) -> None:
    (tree / ".env").write_text(f"DATABASE_URL=x\nDATABASE_URL={db.url}&pgbouncer=true\nnot a line\n")
    done = doctor(tree)
    assert amiss(done, 0) == {"settings": NOTE}
    assert len(re.findall(rf"^{NOTE} +settings ", done.out, re.M)) == 3


# ── this machine ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["doctor", "setup", "db.url"])
def test_package_that_is_missing(tree: Path, task: str) -> None:
    (tree / "psycopg.py").write_text("raise ImportError('no pq wrapper available')\n")
    done = run([sys.executable, "-m", "invoke", task], clean_environment(), cwd=tree)
    assert done.code == 1, done
    assert done.err.startswith("error "), done
    assert "no pq wrapper" in done.err
    assert "\nhelp " in done.err
    assert "Traceback" not in done.err + done.out


# ── the embedded server ────────────────────────────────────────────────────────────────────────────────────────────


def test_embedded_server_is_not_started(tree: Path) -> None:
    found = page(doctor(tree), 0)
    assert found == {"python": OK, "embedded": OK}
    assert not embedded.locate(tree).data.parent.exists()


def test_embedded_server_that_runs_or_was_stopped(tree: Path) -> None:
    cluster = embedded.locate(tree)
    embedded.start(cluster)
    assert {"embedded": OK, "login": OK, "checks": OK}.items() <= page(doctor(tree), 0).items()
    embedded.stop(cluster)
    assert page(doctor(tree), 0) == {"python": OK, "embedded": OK}
    assert not embedded.running(cluster)


def test_embedded_server_that_was_killed(tree: Path) -> None:
    cluster = embedded.locate(tree)
    embedded.start(cluster)
    pid = embedded.health(cluster).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert embedded._until(lambda: not embedded._listening(cluster), 10)
    assert amiss(doctor(tree), 0) == {"embedded": NOTE}
    embedded.start(cluster)
    assert amiss(doctor(tree), 0) == {}


def test_embedded_server_whose_folder_others_can_enter(tree: Path) -> None:
    cluster = embedded.locate(tree)
    embedded.start(cluster)
    embedded.stop(cluster)
    cluster.data.parent.chmod(0o755)
    try:
        assert amiss(doctor(tree), 4) == {"embedded": PROBLEM}
    finally:
        cluster.data.parent.chmod(0o700)


def test_no_binaries(tree: Path, db: Db) -> None:
    (tree / embedded.PACKAGE).mkdir()
    (tree / embedded.PACKAGE / "__init__.py").touch()
    assert amiss(doctor(tree), 4) == {"embedded": PROBLEM}
    assert amiss(doctor(tree, DATABASE_URL=db.url), 0) == {}


def test_binaries_that_do_not_run(tree: Path) -> None:
    binaries = tree / embedded.PACKAGE / embedded.INSTALLATIONS[18] / "bin"
    binaries.mkdir(parents=True)
    (tree / embedded.PACKAGE / "__init__.py").touch()
    (binaries / "postgres").write_text("#!/bin/sh\nexit 127\n")
    (binaries / "postgres").chmod(0o755)
    assert amiss(doctor(tree), 4) == {"embedded": PROBLEM}
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    assert amiss(doctor(tree, DATABASE_URL=f"postgresql://127.0.0.1:{port}/db"), 4) == {"login": PROBLEM}


CLUSTER = Cluster(Path("/d/data"), Path("/d"), Path("/b"))
RUNS = Health(running=True, pid=7, made=True, complaint="", version="postgres (PostgreSQL) 18.4")


@pytest.mark.parametrize(
    ("health", "state"),
    [
        (RUNS, OK),
        (replace(RUNS, running=False), NOTE),
        (replace(RUNS, running=False, pid=None), OK),
        (replace(RUNS, running=False, pid=None, made=False), OK),
        (replace(RUNS, running=False, pid=None, complaint="LOG: a\nPANIC: b"), NOTE),
        (replace(RUNS, running=False, pid=None, version=""), PROBLEM),
    ],
)
def test_health_of_the_embedded_server(health: Health, state: str) -> None:
    finding = doctors.health_of(CLUSTER, health, in_use=True)
    assert finding.state == state
    assert "LOG" not in "\n".join(finding.what)
    assert doctors.health_of(CLUSTER, health, in_use=False).state == OK


# ── names, ports, sockets ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "where",
    ["127.0.0.1:1", "[::1]:1", "no-such-host.invalid", "127.0.0.1:1,no-such-host.invalid:2", "", "xn--.a..b"],
)
def test_nobody_there(db: Db, where: str) -> None:
    url = f"postgresql://somebody:{PASSWORD}@{where}/db" + ("" if where else "?host=/no/such/folder")
    done = db.invoke("doctor", env={"DATABASE_URL": url.replace(" ", "%20")})
    assert amiss(done, 4) == {"login": PROBLEM}


def test_socket_path_that_is_too_long(db: Db) -> None:
    done = db.invoke("doctor", env={"DATABASE_URL": f"postgresql:///db?host=/{'long' * 40}"})
    assert amiss(done, 4) == {"login": PROBLEM}


def test_port_that_swallows_everything(db: Db) -> None:
    """A full queue of connections: nothing comes back, as from behind a firewall."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, clients(8) as sockets:
        port = listener.getsockname()[1]
        for one in sockets:
            one.connect_ex(("127.0.0.1", port))
        time.sleep(0.1)
        url = f"postgresql://u@127.0.0.1:{port}/db"
        done = db.invoke("doctor", env={"DATABASE_URL": url, "CONNECT_TIMEOUT": "1s"})
    assert amiss(done, 4) == {"login": PROBLEM}
    assert "CONNECT_TIMEOUT" in done.out


@contextmanager
def clients(number: int) -> Iterator[list[socket.socket]]:
    made = [socket.socket() for _ in range(number)]
    for one in made:
        one.setblocking(False)
    yield made
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("said", "helps"),
    [
        ('connection to server at "h" (2001:db8::1), port 5432 failed: Network is unreachable', errors.NO_ROUTE),
        ('"h" (2001:db8::1), port 1 failed: Cannot assign requested address\n\tIs the server', errors.NO_ROUTE),
        ('"h" (2001:db8::1), port 1 failed: Network is unreachable\n"h" (203.0.113.7), port 1 failed: timeout expired',
         errors.SILENT_HOST),
        ('"h" (2001:db8::1), port 1 failed: Connection refused', errors.NOBODY_THERE),
        ('"h" (203.0.113.7), port 1 failed: Network is unreachable', errors.SILENT_HOST),
    ],
)  # fmt: skip
def test_way_that_leads_nowhere(said: str, helps: errors.Case) -> None:
    """A host with IPv6 addresses only, Supabase's direct ones say, where this machine cannot go there."""
    assert connection._cause(said) is helps


# ── the login ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def strict() -> Iterator[Db]:
    """A server that asks some for a password, and refuses others."""
    with private_server() as cluster, database(cluster) as db:
        db.execute(
            """CREATE ROLE careful LOGIN PASSWORD 'another';
            CREATE ROLE refused LOGIN;
            CREATE ROLE crowded LOGIN CONNECTION LIMIT 0;
            CREATE ROLE group_role NOLOGIN;"""
            + states.NOT_TO_ALL
        )
        rules = cluster.data / "pg_hba.conf"
        before = rules.read_text()
        rules.write_text("local all careful scram-sha-256\nlocal all refused reject\n" + before)
        db.execute("SELECT pg_reload_conf()")
        assert embedded._until(lambda: not _lets_in(db, "refused"), 10)
        yield db


def _lets_in(db: Db, role: str) -> bool:
    with suppress(psycopg.OperationalError):
        db.connect(role).close()
        return True
    return False


@pytest.mark.parametrize("role", ["careful", "refused", "crowded", "group_role", "nobody"])
def test_login_that_is_refused(strict: Db, role: str) -> None:
    url = strict.url_as(f"{role}:{PASSWORD.replace(' ', '%20')}")
    assert amiss(strict.invoke("doctor", env={"DATABASE_URL": url}), 4) == {"login": PROBLEM}
    assert strict.invoke("setup", env={"DATABASE_URL": url}).code == 4


def test_right_password_and_none(strict: Db) -> None:
    assert amiss(strict.invoke("doctor", env={"DATABASE_URL": strict.url_as("careful:another")}), 8) == {
        "rights": PROBLEM
    }
    assert amiss(strict.invoke("doctor", role="careful"), 4) == {"login": PROBLEM}


@contextmanager
def peer(*, answer: bytes) -> Iterator[str]:
    """Something that listens and is no good server: yields its host and port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                with client, suppress(OSError):
                    if over.is_set():
                        return
                    talk(client)

        def talk(client: socket.socket) -> None:
            said = b""
            while received := client.recv(4096):
                said = received
                if answer == b"N":  # no TLS; then a password in clear text is asked for, and repeated in the refusal
                    refused = b"SFATAL\0VFATAL\0C28P01\0Mno: " + said[5:-1] + b"\0\0"
                    if said[:1] == b"p":
                        client.sendall(b"E" + (len(refused) + 4).to_bytes(4, "big") + refused)
                        return
                    client.sendall(b"N" if len(said) == 8 else b"R\0\0\0\x08\0\0\0\x03")
                elif answer:
                    client.sendall(answer)
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        host, port = listener.getsockname()
        yield f"{host}:{port}"
        over.set()
        socket.create_connection((host, port)).close()
        thread.join()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"N"], ids=["silent", "http", "parrot"])
def test_peer_that_is_no_server(db: Db, answer: bytes) -> None:
    """No part of the password is shown, though it comes back."""
    with peer(answer=answer) as where:
        url = f"postgresql://somebody:{PASSWORD.replace(' ', '%20')}@{where}/db"
        done = db.invoke("doctor", env={"DATABASE_URL": url, "CONNECT_TIMEOUT": "2s"})
    assert amiss(done, 4) == {"login": PROBLEM}
    assert ("***" in done.out.partition("PROBLEM")[2]) == (answer == b"N")


def test_secret_is_masked_before_lines_are_wrapped(db: Db) -> None:
    """The schema has the password's name, with blanks in it."""
    word = PASSWORD.replace(" ", "%20")
    url = db.url.replace("postgres@", f"postgres:{word}@") + f"&schema={word}"
    for columns in range(60, 101, 20):
        seen = on_terminal(db, "doctor", columns=columns, url=url, env={"NO_COLOR": "1"})
        assert amiss(replace(seen, out=seen.out.replace("\r\n", "\n")), 1) == {"schema": PROBLEM}


# ── the session ────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def with_settings(db: Db, *settings: str) -> Iterator[str]:
    """A superuser who brings settings along."""
    db.execute(f"CREATE ROLE {db.name} LOGIN SUPERUSER")
    for setting in settings:
        db.execute(f"ALTER ROLE {db.name} SET {setting}")
    yield db.name
    db.execute(f"REASSIGN OWNED BY {db.name} TO postgres; DROP OWNED BY {db.name}; DROP ROLE {db.name}")


# What the role brings along, and the topic that is a note because of it.
BROUGHT = {
    "lifted": (["statement_timeout = '1s'", "lock_timeout = '1ms'"], {}),
    "idle in transaction": (["idle_in_transaction_session_timeout = '1ms'"], {}),
    "isolation": (["default_transaction_isolation = 'serializable'"], {}),
    "idle": (["idle_session_timeout = '3s'"], {"limits": NOTE}),
    "replica": (["session_replication_role = 'replica'"], {"limits": NOTE}),
    "no such schema": (["search_path = app, public"], {"schema": NOTE}),
}


@pytest.mark.parametrize(("settings", "expected"), BROUGHT.values(), ids=BROUGHT)
def test_settings_that_bite(db: Db, settings: list[str], expected: dict[str, str]) -> None:
    with with_settings(db, *settings) as role:
        assert amiss(db.invoke("doctor", role=role), 0) == expected
        assert db.invoke("setup", role=role).code == 0


def test_tables_behind_the_first_schema(db: Db) -> None:
    db.migrate(*STEMS)
    db.execute("CREATE SCHEMA app")
    done = db.invoke("doctor", env={"DATABASE_URL": f"{db.url}&search_path=app,public"})
    assert amiss(done, 0) == {"schema": NOTE}
    assert "this is about schema public; app, where new tables go, has none" in " ".join(done.out.split())


LOOK = "CREATE FUNCTION look() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';"
# How an event trigger is made, and whether it can fire on what is due: all, or a column alone.
EVENT_TRIGGERS = {
    "any command": ("CREATE EVENT TRIGGER t ON ddl_command_start EXECUTE FUNCTION look()", True, True),
    "tables": ("CREATE EVENT TRIGGER t ON ddl_command_end WHEN TAG IN ('CREATE TABLE', 'DROP TABLE')"
               " EXECUTE FUNCTION look()", True, True),
    "functions": ("CREATE EVENT TRIGGER t ON ddl_command_end WHEN TAG IN ('CREATE FUNCTION') EXECUTE FUNCTION look()",
                  True, True),
    "extensions": ("CREATE EVENT TRIGGER t ON ddl_command_end WHEN TAG IN ('CREATE EXTENSION') EXECUTE FUNCTION look()",
                   False, False),
    "dropped": ("CREATE EVENT TRIGGER t ON sql_drop EXECUTE FUNCTION look()", True, True),
    "rewritten": ("CREATE EVENT TRIGGER t ON table_rewrite EXECUTE FUNCTION look()", False, False),
    "disabled": ("CREATE EVENT TRIGGER t ON ddl_command_start EXECUTE FUNCTION look();"
                 " ALTER EVENT TRIGGER t DISABLE", False, False),
    "of a replica": ("CREATE EVENT TRIGGER t ON ddl_command_start EXECUTE FUNCTION look();"
                     " ALTER EVENT TRIGGER t ENABLE REPLICA", False, False),
    "always": ("CREATE EVENT TRIGGER t ON ddl_command_start EXECUTE FUNCTION look();"
               " ALTER EVENT TRIGGER t ENABLE ALWAYS", True, True),
}  # fmt: skip


@pytest.mark.parametrize(("made", "all_due", "column_due"), EVENT_TRIGGERS.values(), ids=EVENT_TRIGGERS)
def test_event_trigger_is_named_where_it_can_fire(db: Db, made: str, all_due: bool, column_due: bool) -> None:
    db.execute(LOOK + made)
    assert amiss(db.invoke("doctor"), 0) == ({"triggers": NOTE} if all_due else {})
    assert db.invoke("setup").code == 0
    assert amiss(db.invoke("doctor"), 0) == {}
    db.execute("ALTER TABLE prompt_snapshots DROP COLUMN budget_report; DROP SCHEMA budget_engine CASCADE")
    assert amiss(db.invoke("doctor"), 0) == ({"triggers": NOTE} if column_due else {})


def test_event_triggers_of_replicas_fire_in_one(db: Db) -> None:
    db.execute(LOOK + "CREATE EVENT TRIGGER t ON ddl_command_start EXECUTE FUNCTION look()")
    db.execute(f"ALTER DATABASE {db.name} SET session_replication_role = replica")
    assert amiss(db.invoke("doctor"), 0) == {"limits": NOTE}
    db.execute(f"ALTER EVENT TRIGGER t ENABLE REPLICA; ALTER DATABASE {db.name} SET session_replication_role = local")
    assert amiss(db.invoke("doctor"), 0) == {}


def test_every_command_that_setup_sends_is_known_to_the_doctor(db: Db) -> None:
    """By the server's own account of them."""
    db.execute(
        states.with_uuid()
        + """
        CREATE TABLE sent (tag text, event text);
        CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql
          AS 'BEGIN INSERT INTO public.sent VALUES (tg_tag, tg_event); END';
        CREATE EVENT TRIGGER started ON ddl_command_start EXECUTE FUNCTION note();
        CREATE EVENT TRIGGER dropped ON sql_drop EXECUTE FUNCTION note();
        CREATE EVENT TRIGGER rewritten ON table_rewrite EXECUTE FUNCTION note()"""
    )
    with database(db.cluster, db.name) as copy:
        assert db.invoke("setup").code == 0
        sent = db.rows("SELECT DISTINCT tag, event FROM sent")
        copy.execute("DROP EVENT TRIGGER started; DROP EVENT TRIGGER dropped; DROP EVENT TRIGGER rewritten")
        for number, (tag, event) in enumerate(sent):
            copy.execute(f"CREATE EVENT TRIGGER t_{number} ON {event} WHEN TAG IN ('{tag}') EXECUTE FUNCTION note()")
        done = copy.invoke("doctor")
    assert {("CREATE TABLE", "ddl_command_start"), ("ALTER TABLE", "ddl_command_start")} <= set(sent)
    named = re.findall(r"t_\d+", done.out)
    assert [kind for number, kind in enumerate(sent) if f"t_{number}" not in named] == []


# ── through a pooler ───────────────────────────────────────────────────────────────────────────────────────────────


@needs_pgbouncer
def test_pooler(db: Db) -> None:
    with with_settings(db, "statement_timeout = '5s'") as role, Pooler(db.cluster, roles=("postgres", role)) as pooler:
        done = db.invoke("doctor", env={"DATABASE_URL": pooler.url(db)})
        assert amiss(done, 0) == {}
        assert "through a pooler" in done.out
        assert amiss(db.invoke("doctor", env={"DATABASE_URL": pooler.url(db, role)}), 0) == {"limits": NOTE}


# ── what facts mean ────────────────────────────────────────────────────────────────────────────────────────────────

SERVER = Server("18.4", "ada", "game", ("public",), None, "public", pooled=False)
SPOKEN_TLS = "TLSv1.3, TLS_AES_256_GCM_SHA384"


@pytest.mark.parametrize(
    ("how", "sslmode", "is_near", "state"),
    [
        (SPOKEN_TLS, "verify-full", False, OK),
        (SPOKEN_TLS, "verify-ca", False, OK),
        (SPOKEN_TLS, "require", False, NOTE),
        (SPOKEN_TLS, "prefer", False, NOTE),
        ("", "prefer", False, NOTE),
        ("", "disable", False, NOTE),
        ("", "prefer", True, OK),
        (SPOKEN_TLS, "prefer", True, OK),
        ("TLS", "verify-full", False, OK),  # to the pooler; behind it there may be none
    ],
)
def test_tls(how: str, sslmode: str, is_near: bool, state: str) -> None:
    assert doctors.tls(how, sslmode=sslmode, is_near=is_near).state == state


@pytest.mark.parametrize(
    ("name", "ms", "pooled", "state"),
    [
        ("transaction_timeout", 2000, False, NOTE),
        ("transaction_timeout", 60_000, False, OK),
        ("transaction_timeout", 60_000, True, NOTE),
        ("statement_timeout", 100, False, OK),
        ("statement_timeout", 100, True, NOTE),
        ("lock_timeout", 100, True, NOTE),
        ("idle_session_timeout", 1000, False, NOTE),
        ("idle_session_timeout", 600_000, False, OK),
        ("idle_session_timeout", 1000, True, OK),
    ],
)
def test_limits(name: str, ms: int, pooled: bool, state: str) -> None:
    brought = [Limit(name, ms, f"{ms}ms", "user")]
    [finding] = doctors.limits(replace(SERVER, pooled=pooled), brought, "origin", lock_timeout_ms=2000)
    assert finding.state == state
    assert name in finding.what
    assert (f'ALTER ROLE "ada" SET {name} = 0;' in finding.remedy) == (state == NOTE)


def test_limit_of_ones_own_is_not_the_roles() -> None:
    brought = [Limit("idle_session_timeout", 1, "1ms", "client")]
    [finding] = doctors.limits(SERVER, brought, "origin", lock_timeout_ms=2000)
    assert "ALTER ROLE" not in finding.remedy


def test_verdict_is_that_of_the_first_problem() -> None:
    fine, note, first, second = (Finding("a", "x"), Finding("b", "x", "y"), Finding("c", "x", "y", 8),
                                 Finding("d", "x", "y", 4))  # fmt: skip
    assert doctors.verdict([fine, note, first, second]) == ("setup would end with exit 8: 2 problems, 1 note", 8)
    assert doctors.verdict([fine, note])[1] == 0


def test_lines_are_aligned() -> None:
    lines = doctors.lines(Finding("network", "words", "broken for\nwider lines:\nSELECT 1;"))
    assert {line[:23].strip() for line in lines[1:]} == {""}
    assert [line.strip() for line in lines[-2:]] == ["what to do: broken for wider lines:", "SELECT 1;"]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_terminal_breaks_no_word_and_no_command(db: Db, columns: int) -> None:
    role = f"hasty_{db.name}"
    db.execute(f"CREATE ROLE {role} LOGIN SUPERUSER; ALTER ROLE {role} SET idle_session_timeout = '2s'")
    try:
        seen = on_terminal(db, "doctor", columns=columns, url=db.url_as(role), env={"NO_COLOR": "1"}).out.replace(
            "\r\n", "\n"
        )
        plain = db.invoke("doctor", role=role).out
    finally:
        db.execute(f"DROP ROLE {role}")
    lines = seen.splitlines()
    assert not [line for line in lines if len(line) > columns and len(line.split()) > 3 and not line.endswith(";")]
    command = f'ALTER ROLE "{role}" SET idle_session_timeout = 0;'
    assert [said.count(command) for said in (seen, plain)] == [1, 1]
    assert seen.split() == plain.split()


# What the search_path is, and which of its names lead nowhere.
PATHS = {
    "as Supabase's roles have it": (r'"\$user", public, extensions', "extensions"),
    "as it is everywhere": ('"$user", public', ""),
    "quoted": ('public, "no, such ""one", "Public"', 'Public no, such "one'),
    "twice, in capitals": ("PUBLIC,  nowhere ,NOWHERE,public", "nowhere"),
    "temporary": ("public, pg_temp", ""),
}


@pytest.mark.parametrize(("path", "absent"), PATHS.values(), ids=PATHS)
def test_schemas_of_the_path_that_are_not_there(db: Db, path: str, absent: str) -> None:
    with db.connect() as connection:
        connection.execute("SELECT set_config('search_path', %s, false)", [path])
        connection.execute(f"ALTER DATABASE {db.name} SET search_path FROM CURRENT".encode())
        assert connection.execute("SELECT current_setting('search_path')").fetchall() == [(path,)]
    assert db.value("SELECT current_setting('search_path')") == path
    done = db.invoke("doctor")
    assert " ".join(re.findall(r": (.+) does not exist, or is closed", done.out)) == absent, done
