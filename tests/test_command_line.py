"""The command line: the menu, bad settings, servers that are not there or are no servers, rights, the history."""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from budget_engine import __version__
from budget_engine.migration import chain
from budget_engine.postgres import embedded
from budget_engine.postgres.embedded import Cluster
from conftest import MIGRATIONS, Db, Run, assert_done, clean_environment, run
from proxy import Message, Proxy, socket_of

PASSWORD = "pa%24%24 w0rd-S3cret!"  # as typed; %24 is $
SPOKEN = (PASSWORD, "pa$$ w0rd-S3cret!", "pa%24%24%20w0rd-S3cret!", "S3cret")
SUCCESS = ("checks pass", "nothing to do", "done")
STEPS = [step for step in chain.load().steps if step.task != "fix"]


def assert_refused(done: Run, code: int, *words: str) -> None:
    """One clear message on stderr with a remedy, no traceback, no password, no claim of success."""
    assert done.code == code, done
    assert done.err.count("error  ") == 1, done
    assert done.err.startswith("error    "), done
    assert "\nhelp     " in done.err, done
    for word in words:
        assert word in done.err, done
    for word in ("Traceback", *SPOKEN):
        assert word not in done.err + done.out, done
    for word in SUCCESS:
        assert word not in done.out, done


def copied(folder: Path) -> Path:
    """A checkout of its own, without .env."""
    for name in ("scripts", "db"):
        shutil.copytree(chain.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for name in ("tasks.py", "pyproject.toml", "tests/develop.py"):
        shutil.copy(chain.ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("tree") / "checkout")


def recipe(tree: Path, *words: str, **environment: str) -> Run:
    return run([sys.executable, "-m", "invoke", *words], clean_environment() | environment, cwd=tree)


def invoked(*words: str, **environment: str) -> Run:
    """Run `invoke WORDS…` in this checkout, with these variables: ten times as fast (see warm)."""
    return run([sys.executable, "-m", "invoke", *words], clean_environment() | environment)


@pytest.fixture
def role(cluster: Cluster) -> Iterator[str]:
    """A role that may log in, and nothing else; ask for it before db, so that it is dropped after it."""
    name = f"role_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN")
        yield name
        connection.execute(f"DROP ROLE {name}")


# ── the menu ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_list_loads_nothing_that_a_database_needs(tree: Path) -> None:
    program = "import sys; from invoke import Program; Program().run('invoke --list', exit=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {
        "psycopg",
        "dotenv",
        *(f"budget_engine.{room}" for room in ("settings", "migration", "postgres")),
    }
    assert not [name for name in loaded if name.startswith("budget_engine.commands.")]


def test_list_shows_every_documented_task_with_its_help() -> None:
    done = invoked("--list")
    assert done.code == 0
    listed = dict(re.findall(r"^  ([a-z][\w.-]*)(?: \(.*?\))? *(.*)$", done.out, re.M))
    documented = {"setup", "prereqs", "fix", "slots-flags", "budget-report", "turn-metrics", "verify"}
    assert documented | {"db.start", "db.stop", "db.url", "db.psql", "test", "lint", "bench"} <= set(listed)
    assert [name for name, meaning in listed.items() if not meaning] == []


# ── settings: exit 3 ───────────────────────────────────────────────────────────────────────────────────────────────


# What each slip is taken for: test_settings.
@pytest.mark.parametrize(
    ("task", "url", "says"),
    [("setup", f"mysql://u:{PASSWORD}@h/db", "mysql"), ("db.url", f"postgresql://u:{PASSWORD}@b/c@d", "guess")],
)
def test_unusable_url(task: str, url: str, says: str) -> None:
    assert_refused(invoked(task, DATABASE_URL=url), 3, "DATABASE_URL", says)


def test_ci_without_url(tree: Path) -> None:
    assert_refused(recipe(tree, "setup", CI="true"), 3, "CI is set", "DATABASE_URL=embedded")
    assert not (tree / ".postgres").exists()


def test_env_file_is_read(tree: Path, db: Db) -> None:
    """One that cannot be read is refused: a folder, because root may read every file."""
    file = tree / ".env"
    file.mkdir()
    assert_refused(recipe(tree, "setup"), 3, str(file))
    file.rmdir()
    file.write_text(f'DATABASE_URL="{db.url}"\n')
    done = recipe(tree, "setup")
    file.unlink()
    assert_done(db, done)
    assert " (.env), PostgreSQL " in done.out


# ── no such server, no such login: exit 4 ──────────────────────────────────────────────────────────────────────────


@contextmanager
def peer(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something that listens and is no PostgreSQL server; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                with client:
                    if over.is_set():
                        return
                    with suppress(OSError):
                        talk(client)

        thread = threading.Thread(target=serve)
        thread.start()
        port: int = listener.getsockname()[1]
        try:
            yield port
        finally:
            over.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def speak_http(client: socket.socket) -> None:
    client.recv(4096)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def stay_silent(client: socket.socket) -> None:
    while client.recv(4096):
        pass


def hang_up(client: socket.socket) -> None:
    client.recv(4096)


def refuse_password(client: socket.socket) -> None:
    """No TLS; ask for the password in clear text; repeat it in the refusal, as no good server would."""
    client.recv(4096)
    client.sendall(b"N")
    client.recv(4096)
    client.sendall(b"R\x00\x00\x00\x08\x00\x00\x00\x03")
    password = client.recv(4096)[5:-1]
    fields = b"SFATAL\x00VFATAL\x00C28P01\x00Mpassword authentication failed: " + password + b"\x00\x00"
    client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)


def test_server_that_is_too_old(db: Db) -> None:
    def pretend(message: Message) -> Message:
        if b"server_version\x00" not in message.raw or message.kind != "S":
            return message
        body = b"server_version\x0013.22\x00"
        return Message("S", b"S" + (len(body) + 4).to_bytes(4, "big") + body)

    with Proxy(socket_of(db.cluster.sockets), server_says=pretend) as proxy:
        url = proxy.url(db.name).replace("@", f":{PASSWORD.replace(' ', '%20')}@")
        done = db.invoke("setup", env={"DATABASE_URL": url})
    assert_refused(done, 4, "13.22", "PostgreSQL 14")
    assert set(proxy.conversations[0].kinds) <= {"SSLRequest", "Startup", "X"}


# ── what URLs may carry ────────────────────────────────────────────────────────────────────────────────────────────


def test_schema_of_the_url_is_honoured_and_the_rest_said(db: Db) -> None:
    db.execute("CREATE SCHEMA app")
    url = db.url.replace("postgresql://", "postgresql+psycopg2://")
    done = db.invoke("setup", env={"DATABASE_URL": f"{url}&schema=app&pgbouncer=true&connection_limit=1"})
    assert done.code == 0, done
    for word in ("ignored in DATABASE_URL", "+psycopg2", "pgbouncer", "connection_limit", "schema app"):
        assert word in done.out
    schemas = {name for (name,) in db.rows("SELECT schemaname FROM pg_tables")}
    assert schemas - {"pg_catalog", "information_schema"} == {"app", "budget_engine"}
    assert db.value("SELECT bool_and(schema_name = 'app') FROM budget_engine.history") is True
    again = db.invoke("verify", env={"DATABASE_URL": f"{db.url}&schema=app"})
    assert again.code == 0, again


def test_application_name_is_ours_unless_the_url_names_another(db: Db) -> None:
    db.execute(
        """
        CREATE SCHEMA spy;
        CREATE TABLE spy.seen (name text);
        CREATE FUNCTION spy.look() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
          INSERT INTO spy.seen SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid();
        END $$;
        CREATE EVENT TRIGGER spy ON ddl_command_end EXECUTE FUNCTION spy.look()"""
    )
    assert db.invoke("prereqs").code == 0
    assert db.invoke("setup", env={"DATABASE_URL": f"{db.url}&application_name=mine"}).code == 0
    assert db.rows("SELECT DISTINCT name FROM spy.seen ORDER BY name") == [("budget-engine-recipes",), ("mine",)]


# ── rights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_role_without_rights_may_run_setup_where_nothing_is_to_do(role: str, finished: Db) -> None:
    for task in ("setup", "verify"):
        done = finished.invoke(task, role=role)
        assert done.code == 0, done


# ── the history ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_history_says_who_ran_what(db: Db) -> None:
    began = time.monotonic()
    assert db.invoke("setup").code == 0
    took = timedelta(seconds=time.monotonic() - began)
    rows = db.rows(
        "SELECT step, part, role_name, schema_name, checksum, version FROM budget_engine.history ORDER BY id"
    )
    sums = {step.label: hashlib.sha256((MIGRATIONS / f"{step.stem}.sql").read_bytes()).hexdigest() for step in STEPS}
    assert rows == [(label, "transaction", "postgres", "public", sums[label], __version__) for label in sums]
    durations = [duration for (duration,) in db.rows("SELECT duration FROM budget_engine.history ORDER BY id")]
    assert min(durations) > timedelta(0)
    assert sum(durations, timedelta(0)) < took
    assert durations != sorted(durations)  # each step's own time: they do not add up from line to line
    assert db.value("SELECT bool_and(finished_at BETWEEN now() - interval '1 h' AND now()) FROM budget_engine.history")
    assert db.invoke("setup").code == 0
    assert db.value("SELECT count(*) FROM budget_engine.history") == len(STEPS)


def test_history_of_concurrent_work(finished: Db) -> None:
    finished.execute("DROP INDEX idx_games_owner, idx_slots_type; TRUNCATE budget_engine.history")
    assert finished.invoke("setup").code == 0
    rows = finished.rows("SELECT step, part, duration > interval '0' FROM budget_engine.history ORDER BY id")
    assert rows == [(STEPS[0].label, "concurrent", True), (STEPS[1].label, "concurrent", True)]


def test_role_that_may_not_write_the_history_succeeds(role: str, finished: Db) -> None:
    """It may create tables, and another role's history is closed to it."""
    finished.execute(f"DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT ALL ON SCHEMA public TO {role}")
    done = assert_done(finished, finished.invoke("setup", role=role))
    assert "not written into the history" in done.out
    assert (
        finished.value("SELECT bool_and(tableowner = current_user) FROM pg_tables WHERE schemaname = 'public'") is False
    )


# ── a standby ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def standby(cluster: Cluster, db: Db, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Db]:
    """A hot standby of the test's server, with the same databases."""
    place = cluster.data.parent.with_name("standby")
    place.mkdir(mode=0o755)
    copy = Cluster(place / "data", place, cluster.binaries, cluster.user)
    words = ["-D", str(copy.data), "-h", str(cluster.sockets), "-U", "postgres", "-X", "stream", "-c", "fast", "-N"]
    subprocess.run([cluster.binaries / "pg_basebackup", *words], check=True, capture_output=True)
    # It reads the other one's files: to stream, a server needs a libpq of its own age, which not every package brings.
    (copy.data / "standby.signal").touch()
    with (copy.data / "postgresql.auto.conf").open("a") as settings:
        print(
            f"restore_command = 'cp {cluster.data}/pg_wal/%f %p'\nwal_retrieve_retry_interval = '100ms'", file=settings
        )
    if copy.user:
        for path in (place, copy.data, *copy.data.rglob("*")):
            shutil.chown(path, copy.user, copy.user)
    place.chmod(0o700)
    embedded.start(copy)
    yield Db(copy, db.name)
    embedded.stop(copy)
    shutil.rmtree(place)


def test_standby(db: Db, standby: Db) -> None:
    done = standby.invoke("setup")
    assert_refused(done, 8, "standby", "core_schema")
    assert db.invoke("setup").code == 0
    deadline = time.monotonic() + 120
    written = db.value("SELECT pg_switch_wal()::text")
    while not standby.value(f"SELECT pg_last_wal_replay_lsn() >= '{written}'"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert standby.differing() == {}
    for task in ("setup", "verify"):
        done = standby.invoke(task)
        assert done.code == 0, done
