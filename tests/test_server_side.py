"""What can happen to the server: no connection left, a restart, an administrator, a full disk.

Each time there is a clear end, the next run finishes, and nobody's row has changed.
"""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from budget_engine import errors
from budget_engine.migration import chain
from budget_engine.postgres import embedded
from conftest import Db, Run, database, ended, private_server, until
from proxy import COMMITTED, Proxy, containing, on_nth, socket_of
from psycopg.errors import DiskFull
from states import by_hand, contents, lost, with_uuid

STEMS = [step.stem for step in chain.load().steps]
MAX_CONNECTIONS = 8
OURS = "FROM pg_stat_activity WHERE application_name = 'budget-engine-recipes' AND datname = current_database()"
WAITS = f"SELECT count(*) {OURS} AND wait_event_type = 'Lock'"
BUILD_PENDING = "DROP INDEX idx_slots_type"
VALIDATION_PENDING = """
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey;
ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_turn_id_fkey
  FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE SET NULL NOT VALID"""


@pytest.fixture(scope="module")
def small_server() -> Iterator[embedded.Cluster]:
    """A server of this module's own: it has few connections, and may be stopped."""
    with private_server(max_connections=str(MAX_CONNECTIONS)) as server:
        yield server


@pytest.fixture
def small(small_server: embedded.Cluster) -> Iterator[Db]:
    """A database on it."""
    with database(small_server) as db:
        yield db


def assert_clear(done: Run, code: int, *words: str) -> None:
    assert done.code == code, done
    assert len(re.findall("^error    ", done.err, re.M)) == 1, done
    assert "Traceback" not in done.err, done
    for word in words:
        assert word in done.err, done


def assert_next_run_finishes(db: Db, before: dict[str, Any], renamed: dict[str, str] | None = None) -> None:
    again = db.invoke("setup")
    assert again.code == 0, again
    assert db.differing() == {}
    assert lost(before, contents(db), renamed or {}) == []


def finished_but_for(db: Db, pending: str) -> dict[str, Any]:
    """Bring a database with rows to the schema, then take this away; return its rows."""
    db.execute(by_hand())
    db.migrate(*STEMS)
    db.execute(pending)
    return contents(db)


@contextmanager
def holding(db: Db, sql: str) -> Iterator[psycopg.Connection[Any]]:
    with db.connect(autocommit=False) as holder:
        holder.execute(sql)
        yield holder
        with suppress(psycopg.OperationalError):  # the server may have ended its session
            holder.rollback()


# ── no connection left ─────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def room_for(db: Db, connections: int) -> Iterator[list[psycopg.Connection[Any]]]:
    """Others take all of the server's connections but so many."""
    with ExitStack() as stack:
        taken = [stack.enter_context(db.connect()) for _ in range(MAX_CONNECTIONS - connections)]
        yield taken


def test_all_connections_are_taken(small: Db) -> None:
    with room_for(small, 0):
        assert_clear(small.invoke("setup"), 4, "too many clients already")
    assert_next_run_finishes(small, {})


def test_one_connection_is_enough(small: Db) -> None:
    small.execute(by_hand())
    before = contents(small)
    with room_for(small, 1):
        done = small.invoke("setup")
    assert done.code == 0, done
    assert_next_run_finishes(small, before)


def test_room_for_the_second_connection_comes_in_time(small: Db) -> None:
    small.execute(by_hand())
    before = contents(small)
    with room_for(small, 1) as taken:
        process = small.start("setup")
        assert process.stdout is not None
        assert any("waiting  concurrent work" in line for line in process.stdout)
        for connection in taken[:2]:
            connection.close()
        done = ended(process)
    assert done.code == 0, done
    assert_next_run_finishes(small, before)


# ── the server restarts ────────────────────────────────────────────────────────────────────────────────────────────


def restart(server: embedded.Cluster, how: signal.Signals) -> None:
    """Stop it as pg_ctl does (SIGINT: fast, SIGQUIT: immediate), and start it again."""
    os.kill(int((server.data / "postmaster.pid").read_text().split()[0]), how)
    embedded.stop(server)
    embedded.start(server)


FAST, IMMEDIATE = signal.SIGINT, signal.SIGQUIT


@pytest.mark.parametrize("how", [FAST, IMMEDIATE])
@pytest.mark.parametrize("commit", [1, 3])
def test_restart_between_two_steps(small: Db, commit: int, how: signal.Signals) -> None:
    """The first COMMIT is the survey's."""
    small.execute(with_uuid())
    before = contents(small)
    watcher = on_nth(containing(COMMITTED), commit, lambda: restart(small.cluster, how))
    with Proxy(socket_of(small.cluster.sockets), server_says=watcher) as proxy:
        done = small.invoke("setup", env={"DATABASE_URL": proxy.url(small.name)})
    assert_clear(done, 4)
    assert_next_run_finishes(small, before, {"public.prompt_snapshots.turn_id": "turn_id_uuid"})


# What is pending, and what keeps it waiting.
CONCURRENT = {
    "CREATE INDEX": (BUILD_PENDING, "LOCK TABLE slots IN ROW EXCLUSIVE MODE"),
    "VALIDATE": (VALIDATION_PENDING, "LOCK TABLE prompt_snapshots IN SHARE UPDATE EXCLUSIVE MODE"),
}


@pytest.mark.parametrize("how", [FAST, IMMEDIATE])
@pytest.mark.parametrize(("pending", "lock"), CONCURRENT.values(), ids=CONCURRENT)
def test_restart_in_concurrent_work(small: Db, pending: str, lock: str, how: signal.Signals) -> None:
    before = finished_but_for(small, pending)
    with holding(small, lock):
        process = small.start("setup")
        until(lambda: small.value(WAITS), process)
        restart(small.cluster, how)
        done = ended(process)
    assert_clear(done, 4)
    assert small.differing() != {}
    assert_next_run_finishes(small, before)


def test_server_is_still_starting(small: Db) -> None:
    """It recovers from an archive that keeps it waiting."""
    go, server = small.cluster.data.with_name("go"), small.cluster
    with small.connect() as connection:
        command = f"while [ ! -e {go} ]; do sleep 0.01; done; false"
        connection.execute(f"ALTER SYSTEM SET restore_command = '{command}'")
    embedded.stop(server)
    (server.data / "recovery.signal").touch()
    starter = threading.Thread(target=embedded.start, args=[server])
    starter.start()
    try:
        while "starting up" not in refusal(small):
            assert starter.is_alive()
        assert_clear(small.invoke("setup"), 4, "the database system is starting up", errors.NOT_READY.remedy)
    finally:
        go.touch()
        starter.join()
    while small.value("SELECT pg_is_in_recovery()"):  # readers are let in before it ends
        time.sleep(0.01)
    with small.connect() as connection:
        connection.execute("ALTER SYSTEM RESET restore_command")
    assert_next_run_finishes(small, {})


def refusal(db: Db) -> str:
    try:
        db.execute("SELECT")
    except psycopg.OperationalError as error:
        return str(error)
    return ""


# ── an administrator ends a session ────────────────────────────────────────────────────────────────────────────────

# Which of a run's three sessions, and how the run ends.
SESSIONS = {
    "working": ("query LIKE 'CREATE INDEX CONC%'", 4),
    "turn": ("state = 'idle in transaction'", 0),
    "watch": ("query LIKE '%WITH ours AS%' AND state = 'idle'", 0),
}


@pytest.mark.parametrize(("session", "code"), SESSIONS.values(), ids=SESSIONS)
def test_session_is_terminated_in_concurrent_work(db: Db, session: str, code: int) -> None:
    before = finished_but_for(db, BUILD_PENDING)
    with holding(db, "LOCK TABLE slots IN ROW EXCLUSIVE MODE"):
        process = db.start("setup")
        until(lambda: db.value(WAITS), process)
        until(lambda: db.rows(f"SELECT pg_terminate_backend(pid, 10000) {OURS} AND {session}"), process)
        if code:
            assert_clear(ended(process), code, "terminating connection due to administrator command")
    if not code:
        done = ended(process)
        assert (done.code, done.err) == (0, ""), done
    assert_next_run_finishes(db, before)


# ── the disk is full ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(cluster: embedded.Cluster) -> Iterator[Path]:
    """A file system of a few megabytes that the server can reach."""
    folder = Path(tempfile.mkdtemp(prefix="budget-engine-disk-"))
    account = pwd.getpwnam(cluster.user) if cluster.user else None
    owner = f"uid={account.pw_uid},gid={account.pw_gid}" if account else "mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", f"size=16m,{owner}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("a small disk can be mounted only by root, and not in every container")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@pytest.fixture
def cramped(db: Db, small_disk: Path) -> Iterator[Db]:
    """A database that lies there."""
    place = f"{db.name}_place"
    with psycopg.connect(db.cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE {place} LOCATION '{small_disk}'")
        connection.execute(f"ALTER DATABASE {db.name} SET TABLESPACE {place}")
        yield db
        connection.execute(f"ALTER DATABASE {db.name} SET TABLESPACE pg_default")
        connection.execute(f"DROP TABLESPACE {place}")


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Until there is room again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    yield
    filler.unlink()


def test_disk_is_full_in_a_step(cramped: Db, small_disk: Path) -> None:
    cramped.execute(by_hand())
    cramped.migrate(*STEMS[:-1])
    before, rows = cramped.dump(data=True), contents(cramped)
    with full(small_disk):
        assert_clear(cramped.invoke("setup"), 1, "turn_metrics", "No space left", "changed nothing", "Make room")
    assert cramped.dump(data=True) == before
    assert_next_run_finishes(cramped, rows)


def test_disk_is_full_from_the_first_step_on(cramped: Db, small_disk: Path) -> None:
    before = cramped.dump()
    with full(small_disk):
        assert_clear(cramped.invoke("setup"), 1, "core_schema", "Make room")
    assert cramped.dump() == before
    assert_next_run_finishes(cramped, {})


def test_disk_is_full_in_concurrent_work(cramped: Db, small_disk: Path) -> None:
    before = finished_but_for(cramped, BUILD_PENDING)
    with full(small_disk):
        with cramped.connect() as connection, pytest.raises(DiskFull):
            connection.execute("CREATE TABLE t AS SELECT i FROM generate_series(1, 10000) AS i")
        assert_clear(cramped.invoke("setup"), 1, "idx_slots_type", "Make room")
    assert contents(cramped) == before
    assert_next_run_finishes(cramped, before)
