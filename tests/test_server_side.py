"""What can happen to the server: no connection left, a restart, an administrator, a full disk.

Each time there is a clear end, the next run finishes, and nobody's row has changed.
"""

from __future__ import annotations

import os
import pwd
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
from conftest import (
    OURS,
    WAITING,
    Db,
    assert_done,
    assert_fails,
    database,
    ended,
    holding,
    postmaster,
    private_server,
    until,
)
from proxy import COMMITTED, Proxy, containing, on_nth, socket_of
from psycopg.errors import DiskFull
from states import by_hand, contents, lost, with_uuid

STEMS = [step.stem for step in chain.load().steps]
MAX_CONNECTIONS = 8
WRITER = "LOCK TABLE slots IN ROW EXCLUSIVE MODE"
BUILD_PENDING = "DROP INDEX idx_slots_type"
VALIDATION_PENDING = """
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey;
ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_turn_id_fkey
  FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE SET NULL NOT VALID"""


@pytest.fixture(scope="module")
def small_server(cluster: embedded.Cluster) -> Iterator[embedded.Cluster]:
    """A server of this module's own: it has few connections, and may be stopped."""
    with private_server(max_connections=str(MAX_CONNECTIONS)) as server:
        yield server


@pytest.fixture
def small(small_server: embedded.Cluster) -> Iterator[Db]:
    """A database on it."""
    with database(small_server) as db:
        yield db


def assert_next_run_finishes(db: Db, before: dict[str, Any], renamed: dict[str, str] | None = None) -> None:
    assert_done(db)
    assert lost(before, contents(db), renamed or {}) == []


def finished_but_for(db: Db, pending: str) -> dict[str, Any]:
    """Bring a database with rows to the schema, then take this away; return its rows."""
    db.execute(by_hand())
    db.migrate(*STEMS)
    db.execute(pending)
    return contents(db)


# ── no connection left ─────────────────────────────────────────────────────────────────────────────────────────────


def test_one_connection_is_enough(small: Db) -> None:
    small.execute(by_hand())
    before = contents(small)
    with ExitStack() as others:
        taken = [others.enter_context(small.connect()) for _ in range(MAX_CONNECTIONS)]
        assert_fails(small.invoke("setup"), 4, "too many clients already")
        taken[0].close()
        done = small.invoke("setup")
    assert_done(small, done)
    assert lost(before, contents(small), {}) == []


# ── the server restarts ────────────────────────────────────────────────────────────────────────────────────────────


def restart(server: embedded.Cluster, how: signal.Signals) -> None:
    """Stop it as pg_ctl does (SIGINT: fast, SIGQUIT: immediate), and start it again."""
    os.kill(postmaster(server.data), how)
    embedded.stop(server)
    embedded.start(server)


FAST, IMMEDIATE = signal.SIGINT, signal.SIGQUIT


@pytest.mark.parametrize(("commit", "how"), [(1, IMMEDIATE), (3, FAST)])
def test_restart_between_two_steps(small: Db, commit: int, how: signal.Signals) -> None:
    """The first COMMIT is the survey's."""
    small.execute(with_uuid())
    before = contents(small)
    watcher = on_nth(containing(COMMITTED), commit, lambda: restart(small.cluster, how))
    with Proxy(socket_of(small.cluster.sockets), server_says=watcher) as proxy:
        done = small.invoke("setup", env={"DATABASE_URL": proxy.url(small.name)})
    assert_fails(done, 4)
    assert_next_run_finishes(small, before, {"public.prompt_snapshots.turn_id": "turn_id_uuid"})


# What is pending, and what keeps it waiting.
CONCURRENT = {
    "CREATE INDEX": (BUILD_PENDING, WRITER, IMMEDIATE),
    "VALIDATE": (VALIDATION_PENDING, "LOCK TABLE prompt_snapshots IN SHARE UPDATE EXCLUSIVE MODE", FAST),
}


@pytest.mark.parametrize(("pending", "lock", "how"), CONCURRENT.values(), ids=CONCURRENT)
def test_restart_in_concurrent_work(small: Db, pending: str, lock: str, how: signal.Signals) -> None:
    before = finished_but_for(small, pending)
    with holding(small, lock):
        process = small.start("setup")
        until(lambda: small.value(WAITING), process)
        restart(small.cluster, how)
        done = ended(process)
    assert_fails(done, 4)
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
        assert_fails(small.invoke("setup"), 4, "the database system is starting up", errors.NOT_READY.remedy)
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

# Which of a run's two sessions, and how the run ends.
SESSIONS = {
    "working": ("query LIKE 'CREATE INDEX CONC%'", 4),
    "watch": ("state = 'idle'", 0),  # the other one waits for a lock
}


@pytest.mark.parametrize(("session", "code"), SESSIONS.values(), ids=SESSIONS)
def test_session_is_terminated_in_concurrent_work(db: Db, session: str, code: int) -> None:
    before = finished_but_for(db, BUILD_PENDING)
    ends = f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {OURS} AND {session}"
    with holding(db, WRITER):
        process = db.start("setup")
        until(lambda: db.value(WAITING), process)
        until(lambda: db.rows(ends), process)
        early = ended(process) if code else None
    if early:
        assert_fails(early, code, "terminating connection due to administrator command")
    else:
        assert assert_done(db, ended(process)).err == ""
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
        assert_fails(cramped.invoke("setup"), 1, "turn_metrics", "No space left", "changed nothing", "Make room")
    assert cramped.dump(data=True) == before
    assert_next_run_finishes(cramped, rows)


def test_disk_is_full_in_concurrent_work(cramped: Db, small_disk: Path) -> None:
    before = finished_but_for(cramped, BUILD_PENDING)
    with full(small_disk):
        with cramped.connect() as connection, pytest.raises(DiskFull):
            connection.execute("CREATE TABLE t AS SELECT generate_series(1, 10000)")
        assert_fails(cramped.invoke("setup"), 1, "idx_slots_type", "Make room")
    assert contents(cramped) == before
    assert_next_run_finishes(cramped, before)
