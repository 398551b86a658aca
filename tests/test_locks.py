"""Nobody is blocked: what the recipes take locks on, what they do while others hold them, and one another."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from conftest import MIGRATIONS, VERIFICATIONS, Db, Run, ended, until
from proxy import Proxy, containing, on_nth, socket_of
from states import with_uuid

from scripts import chain, runner

TASKS = ["setup", "prereqs", "fix", "slots-flags", "budget-report", "turn-metrics", "verify"]
STEMS = [step.stem for step in chain.load()]
ATOMIC_STEMS = [stem for stem in STEMS if "fix" not in stem]
TABLES = (
    "worlds, rulesets, entry_points, prompt_segments, games, turns, slots, templates, prompt_snapshots, turn_metrics"
)
# Whatever waits for a lock fails at once, however fast the machine is.
IMPATIENT = {"PGOPTIONS": "-c lock_timeout=1ms -c statement_timeout=20s", "LOCK_TIMEOUT": "1ms"}


@pytest.fixture
def quiet(db: Db) -> Iterator[None]:
    """Without autovacuum: its workers take transaction ids, too."""
    workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autovacuum worker'"
    with db.connect() as connection:
        connection.execute("ALTER SYSTEM SET autovacuum = off")
        connection.execute("SELECT pg_reload_conf()")
        while connection.execute("SHOW autovacuum").fetchone() == ("on",) or db.value(workers):
            time.sleep(0.01)
        yield
        connection.execute("ALTER SYSTEM RESET autovacuum")
        connection.execute("SELECT pg_reload_conf()")


@contextmanager
def holding(db: Db, sql: str) -> Iterator[psycopg.Connection[Any]]:
    """Another session with an open transaction which has run this."""
    with db.connect(autocommit=False) as holder:
        holder.execute("SET application_name = 'the other one'")
        holder.execute(sql)
        yield holder
        holder.rollback()


@contextmanager
def holding_everything(db: Db) -> Iterator[psycopg.Connection[Any]]:
    """EXCLUSIVE lets others read, and nothing else: no ROW EXCLUSIVE, no DDL."""
    with holding(db, f"LOCK TABLE {TABLES} IN EXCLUSIVE MODE") as holder:
        yield holder


def make_old(db: Db) -> None:
    """A database migrated by hand, of which some pieces went missing since."""
    db.migrate(*ATOMIC_STEMS)
    db.execute(
        """
        DROP INDEX idx_games_owner, idx_turns_game_idx, idx_slots_type, idx_prompt_snapshots_turn_id;
        DROP INDEX idx_turn_metrics_created;
        ALTER TABLE slots DROP COLUMN must_keep CASCADE;
        ALTER TABLE prompt_snapshots DROP COLUMN budget_report;
        ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey;
        DROP INDEX idx_prompt_snapshots_parent_id"""
    )


def diary(db: Db) -> list[tuple[Any, ...]]:
    return db.rows("SELECT step, part FROM budget_engine.diary ORDER BY id")


# A million as the issue has it: CROWD_ROWS=1000000. As many as that take a while to make.
CROWD_ROWS = int(os.environ.get("CROWD_ROWS", "50000"))
LONGEST_AFTERWARDS_S = 15.0  # the longest pause (patience.py), a last look, and a machine with much to do

# Our sessions that run, or wait for a lock in, a statement that begins so.
OURS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'budget-engine-recipes'"
WAITING = f"{OURS} AND wait_event_type = 'Lock'"
BUILD = "CREATE INDEX CONCURRENTLY"
BUILDING = f"{WAITING} AND query LIKE '{BUILD}%'"
# Who has the turn to build stands in the transaction that took it; who was refused it has ended his.
HAVE_THE_TURN = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND granted"


# ── nothing to do ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("quiet")
def test_finished_database_is_neither_locked_nor_written(db: Db) -> None:
    assert db.invoke("setup").code == 0
    before = db.dump(data=True)
    files = [*(MIGRATIONS / f"{stem}.sql" for stem in STEMS), *(VERIFICATIONS / f"{stem}.sql" for stem in STEMS)]
    with holding_everything(db):
        next_id = int(db.value("SELECT pg_current_xact_id()::text"))
        runs = {task: db.invoke(task, env=IMPATIENT) for task in TASKS}
        runs |= {file.stem: db.psql("-c", "SET lock_timeout = '1ms'", "-f", str(file)) for file in files}
        assert {name: str(done) for name, done in runs.items() if done.code} == {}
        # The probe takes one id itself; every transaction that writes anything would take one, too.
        assert int(db.value("SELECT pg_current_xact_id()::text")) == next_id + 1
    assert db.dump(data=True) == before
    assert [part for _, part in diary(db)] == ["atomic"] * 6


def test_every_strong_lock_of_a_run_that_finds_nothing(db: Db) -> None:
    """The advisory lock aside, a DO block whose promise holds has taken ACCESS SHARE at most."""
    assert db.invoke("setup").code == 0
    with db.connect(autocommit=False) as connection:
        for step in chain.load():
            connection.execute(step.atomic.encode())
            connection.execute(step.verification.encode())
        locks = (
            "SELECT relation::regclass::text, mode FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation'"
        )
        assert connection.execute(f"{locks} AND mode <> 'AccessShareLock'").fetchall() == []
        assert connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchall() == [(None,)]


# ── something to do, somebody in between ───────────────────────────────────────────────────────────────────────────

# What is missing, the lock of the other session that keeps it from being mended atomically, the step.
CONFLICTS = {
    "a reader against a new column": (
        "ALTER TABLE prompt_snapshots DROP COLUMN budget_report",
        "LOCK TABLE prompt_snapshots IN ACCESS SHARE MODE",
        "budget_report",
    ),
    "a writer against slots": (
        "ALTER TABLE slots DROP COLUMN min_chars CASCADE",
        "LOCK TABLE slots IN ROW EXCLUSIVE MODE",
        "slots_flags",
    ),
    "a writer of turns against the new table that points there": (
        "DROP TABLE turn_metrics",
        "LOCK TABLE turns IN ROW EXCLUSIVE MODE",
        "turn_metrics",
    ),
    "a writer against the fix": (
        "ALTER TABLE prompt_snapshots DROP COLUMN turn_id, ADD COLUMN turn_id uuid",
        "LOCK TABLE prompt_snapshots IN ROW EXCLUSIVE MODE",
        "fix_prompt_snapshots_turn_id",
    ),
}


@pytest.mark.parametrize(("missing", "lock", "label"), CONFLICTS.values(), ids=CONFLICTS)
def test_conflicting_lock_is_given_up_and_its_holder_named(db: Db, missing: str, lock: str, label: str) -> None:
    db.migrate(*ATOMIC_STEMS)
    db.execute(missing)
    db.execute("DO 'BEGIN CREATE ROLE the_holder LOGIN SUPERUSER; EXCEPTION WHEN duplicate_object THEN END'")
    before = db.dump(data=True)
    with db.connect("the_holder", autocommit=False) as holder:
        holder.execute("SET application_name = 'the other one'")
        holder.execute(lock)
        done = db.invoke("setup", env={"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "0"})
        assert done.code == 7, done
        for word in (str(holder.info.backend_pid), "the_holder", "the other one", label):
            assert word in done.err
        assert "Traceback" not in done.err
    assert db.dump(data=True) == before
    assert db.invoke("setup").code == 0
    assert db.differing() == {}


def test_online_build_waits_without_standing_in_the_way(db: Db) -> None:
    """An old transaction holds an online build up; readers and writers of the table go on meanwhile."""
    db.migrate(*ATOMIC_STEMS)
    db.execute("DROP INDEX idx_slots_type")
    with holding(db, "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
        process = db.start("setup", LOCK_TIMEOUT="1ms", LOCK_WAIT="60")
        until(lambda: db.value(BUILDING), process)
        db.execute("SET lock_timeout = '1ms'; INSERT INTO slots (type, name, description) VALUES ('npc', 'a', 'b')")
        holder.rollback()
        done = ended(process)
    assert done.code == 0, done
    assert db.differing() == {}


def test_online_build_gives_up_and_the_next_run_finishes(db: Db) -> None:
    db.migrate(*ATOMIC_STEMS)
    db.execute("DROP INDEX idx_slots_type")
    with holding(db, "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
        done = db.invoke("setup", env={"LOCK_TIMEOUT": "1ms", "LOCK_WAIT": "1"})
        assert done.code == 7, done
        assert str(holder.info.backend_pid) in done.err
    assert db.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_slots_type'::regclass") is False
    assert db.invoke("setup").code == 0
    assert db.differing() == {}


# ── two runs at once ───────────────────────────────────────────────────────────────────────────────────────────────


def make_big(db: Db) -> None:
    """An old database with many rows, and every kind of work still to do."""
    db.execute(with_uuid())
    db.execute(f"""
        INSERT INTO turns (game_id, idx, role, content)
        SELECT md5('game 1')::uuid, i + 10, 'player', '{{}}' FROM generate_series(1, {CROWD_ROWS}) AS i;
        DROP INDEX idx_turns_game_idx, idx_games_owner, idx_slots_type;
        ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_parent_id_fkey""")


def ends(processes: list[subprocess.Popen[str]]) -> list[float]:
    """Wait for all of them; return when each ended, as the server's clock has it."""
    times: dict[int, float] = {}
    while len(times) < len(processes):
        times |= {p.pid: time.time() for p in processes if p.pid not in times and p.poll() is not None}
        time.sleep(0.05)
    return list(times.values())


@pytest.mark.parametrize("prepare", [lambda db: None, make_old, make_big], ids=["empty", "old", "many rows"])
def test_twenty_runs_at_once_all_succeed_and_do_each_step_once(db: Db, prepare: Callable[[Db], None]) -> None:
    prepare(db)
    processes = [db.start("setup", LOCK_WAIT="5min") for _ in range(20)]
    times = ends(processes)
    runs = [ended(process) for process in processes]
    assert {done.code for done in runs} == {0}, "\n".join(map(str, runs))
    assert {"Traceback" in done.err for done in runs} == {False}
    assert db.differing() == {}
    lines = diary(db)
    assert len(lines) == len(set(lines)), lines
    assert db.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0
    last = float(db.value("SELECT max(extract(epoch FROM finished_at)) FROM budget_engine.diary"))
    assert max(times) - last < LONGEST_AFTERWARDS_S


def test_verify_during_a_run_sees_nothing_in_the_way(db: Db) -> None:
    """What the catalogs say while another run commits may be old or new, even torn; it must not become an obstacle."""
    process, codes = db.start("setup"), set()
    while process.poll() is None:
        codes |= {ended(verifier).code for verifier in [db.start("verify") for _ in range(2)]}
    assert ended(process).code == 0
    assert codes <= {0, 5}


def test_two_runs_that_queue_for_one_index_build_it_once(db: Db) -> None:
    db.migrate(*ATOMIC_STEMS)
    db.execute("DROP INDEX idx_slots_type")
    with holding(db, "LOCK TABLE slots IN SHARE UPDATE EXCLUSIVE MODE") as holder:
        processes = [db.start("setup") for _ in range(2)]
        until(lambda: (db.value(BUILDING), db.value(HAVE_THE_TURN)) == (1, 1), processes[0])
        holder.rollback()
        runs = [ended(process) for process in processes]
    assert {done.code for done in runs} == {0}, "\n".join(map(str, runs))
    assert db.differing() == {}


def test_online_work_that_another_run_did_is_not_claimed(db: Db) -> None:
    """Between the look and the build, somebody builds by hand: this run did nothing, and its diary says so."""
    db.migrate(*ATOMIC_STEMS)
    db.execute("DROP INDEX idx_slots_type")
    meanwhile: list[Run] = []
    file = str(MIGRATIONS / "20250214_slots_templates.sql")
    watcher = on_nth(containing(f"Q....{BUILD}"), 1, lambda: meanwhile.append(db.psql("-f", file)))
    with Proxy(socket_of(db.cluster.sockets), client_says=watcher) as proxy:
        done = db.invoke("setup", env={"DATABASE_URL": proxy.url(db.name)})
    assert [done.code for done in (*meanwhile, done)] == [0, 0], done
    assert db.differing() == {}
    assert db.rows("SELECT to_regclass('budget_engine.diary')") == [(None,)]


@contextmanager
def another_run(db: Db) -> Iterator[psycopg.Connection[Any]]:
    with holding(db, f"SELECT pg_advisory_xact_lock({runner.ADVISORY_LOCK})") as holder:
        yield holder


def test_run_beside_another_gives_up_after_lock_wait(db: Db) -> None:
    before = db.dump()
    with another_run(db):
        done = db.invoke("setup", env={"LOCK_WAIT": "1"})
    assert (done.code, db.dump()) == (7, before)
    assert "another run" in done.err
    assert "done" not in done.out


def test_run_beside_another_goes_on_when_that_one_is_done(db: Db) -> None:
    with another_run(db) as other:
        process = db.start("setup")
        until(lambda: db.value(f"{OURS} AND query LIKE 'ROLLBACK%'"), process)
        assert db.value(WAITING) == 0  # who waits has no snapshot that an online build would wait for
        other.rollback()
        done = ended(process)
    assert done.code == 0, done
    assert db.differing() == {}


def test_finished_database_does_not_care_about_another_run(db: Db) -> None:
    assert db.invoke("setup").code == 0
    with another_run(db):
        assert db.invoke("setup", env={"LOCK_WAIT": "0"}).code == 0


@pytest.mark.parametrize("table", ["slots", "turn_metrics", "prompt_snapshots"])
@pytest.mark.parametrize("task", ["setup", "verify"])
def test_who_holds_access_exclusive_is_named(db: Db, table: str, task: str) -> None:
    """Where the catalogs can be read all the same, nothing is wrong; else the message says who is in the way."""
    assert db.invoke("setup").code == 0
    with db.connect(autocommit=False) as holder:
        holder.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        done = db.invoke(task, env={"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "0"})
        assert done.code in (0, 7), done
        assert done.code == 0 or f"pid {holder.info.backend_pid} " in done.err, done


def test_who_holds_up_a_pending_step_with_access_exclusive_is_named(db: Db) -> None:
    assert db.invoke("prereqs").code == 0
    before = db.dump(data=True)
    with db.connect(autocommit=False) as holder:
        holder.execute("LOCK TABLE slots")
        done = db.invoke("slots-flags", env={"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "0"})
        assert done.code == 7, done
        assert f"pid {holder.info.backend_pid} " in done.err, done
    assert db.dump(data=True) == before
