"""Nobody is blocked: what the recipes take locks on, what they do while others hold them, and one another."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import warm
from budget_engine.migration import chain, survey, turn
from budget_engine.postgres.embedded import Cluster
from conftest import (
    BETWEEN_TRIES,
    BUILDING,
    FINISHED_PACKAGED_TOO,
    MIGRATIONS,
    OURS,
    THE_TURN,
    TRAP,
    WAITING,
    Db,
    Run,
    assert_done,
    assert_fails,
    clean_environment,
    ended,
    holding,
    private_server,
    role_with,
    until,
)
from proxy import Proxy, containing, on_nth, socket_of
from states import with_uuid
from versions import new_in

TASKS = ["setup", "prereqs", "fix", "slots-flags", "budget-report", "turn-metrics", "verify"]
BUT_FOR_THE_FIX = [step.stem for step in chain.load().steps if "fix" not in step.stem]
TABLES = ", ".join(st.new_table for step in chain.load().steps for st in step.statements if st.new_table)
# Whatever waits for a lock fails at once, however fast the machine is.
IMPATIENT = {"PGOPTIONS": "-c lock_timeout=1ms -c statement_timeout=20s", "LOCK_TIMEOUT": "1ms"}
SOON = {"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "0"}
# What is missing, and the lock of the other session that keeps it from being created.
INDEX_MISSING, WRITER = "DROP INDEX idx_slots_type", "LOCK TABLE slots IN ROW EXCLUSIVE MODE"
REPORT_MISSING, READER = (
    "ALTER TABLE prompt_snapshots DROP COLUMN budget_report",
    "LOCK TABLE prompt_snapshots IN ACCESS SHARE MODE",
)
VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_slots_type'::regclass"
# A million as the issue has it: CROWD_ROWS=1000000. As many as that take a while to make.
CROWD_ROWS = int(os.environ.get("CROWD_ROWS", "50000"))
LONGEST_AFTERWARDS_S = 15.0  # the longest pause (patience.py), a last look, and a machine with much to do
HAVE_THE_TURN = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = {turn.BUILD} AND granted"


@pytest.fixture
def quiet(finished: Db) -> Iterator[None]:
    """Without autovacuum: its workers take transaction ids, too."""
    workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autovacuum worker'"
    with finished.connect() as connection:
        connection.execute("ALTER SYSTEM SET autovacuum = off")
        connection.execute("SELECT pg_reload_conf()")
        while connection.execute("SHOW autovacuum").fetchone() == ("on",) or finished.value(workers):
            time.sleep(0.01)
        yield
        connection.execute("ALTER SYSTEM RESET autovacuum")
        connection.execute("SELECT pg_reload_conf()")


# ── nothing to do ──────────────────────────────────────────────────────────────────────────────────────────────────


@FINISHED_PACKAGED_TOO
def test_finished_database_is_neither_locked_nor_written(finished: Db, quiet: None) -> None:
    before = finished.dump(data=True)
    with holding(finished, f"LOCK TABLE {TABLES} IN EXCLUSIVE MODE"):  # lets others read, and nothing else
        next_id = int(finished.value("SELECT pg_current_xact_id()::text"))
        runs = {task: finished.invoke(task, env=IMPATIENT) for task in TASKS}
        runs["verify.sql"] = finished.psql("-c", "SET lock_timeout = '1ms'", "-f", str(chain.DB / "verify.sql"))
        assert {name: str(done) for name, done in runs.items() if done.code} == {}
        # The probe takes one id itself; every transaction that writes anything would take one, too.
        assert int(finished.value("SELECT pg_current_xact_id()::text")) == next_id + 1
    assert finished.dump(data=True) == before
    assert [part for _, part in finished.history()] == ["transaction"] * 6


@FINISHED_PACKAGED_TOO
def test_every_lock_of_a_survey(finished: Db) -> None:
    """ACCESS SHARE at most: of what exists, a plan holds no statement."""
    locks = "SELECT relation::regclass, mode FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation'"
    with finished.connect(autocommit=False) as connection:
        for statement in survey.statements(chain.load()):
            connection.execute(statement.encode())
        assert connection.execute(f"{locks} AND mode <> 'AccessShareLock'".encode()).fetchall() == []
        assert connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchall() == [(None,)]


# ── something to do, somebody in between ───────────────────────────────────────────────────────────────────────────

# What is missing, the lock of the other session that keeps it from being created in a transaction, the step.
CONFLICTS = {
    "a reader against a new column": (REPORT_MISSING, READER, "budget_report"),
    "a writer against slots": ("ALTER TABLE slots DROP COLUMN min_chars CASCADE", WRITER, "slots_flags"),
    "whoever keeps all others out": ("ALTER TABLE slots DROP COLUMN must_keep CASCADE", "LOCK TABLE slots", "slots"),
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


@FINISHED_PACKAGED_TOO
@pytest.mark.parametrize(("missing", "lock", "label"), CONFLICTS.values(), ids=CONFLICTS)
def test_conflicting_lock_is_given_up_and_its_holder_named(finished: Db, missing: str, lock: str, label: str) -> None:
    finished.execute(missing)
    finished.execute("DO 'BEGIN CREATE ROLE the_holder LOGIN SUPERUSER; EXCEPTION WHEN duplicate_object THEN END'")
    before = finished.dump(data=True)
    with holding(finished, lock, "the_holder") as holder:
        done = finished.invoke("setup", env=SOON)
        assert_fails(done, 7, str(holder.info.backend_pid), "the_holder", "the other one", label)
    assert finished.dump(data=True) == before
    assert_done(finished)


def test_who_holds_access_exclusive_is_named(finished: Db) -> None:
    """Where the catalogs can be read all the same, nothing is wrong; else the message says who holds the lock."""
    for table in ("slots", "turn_metrics", "prompt_snapshots"):
        with holding(finished, f"LOCK TABLE {table}") as holder:
            for done in (finished.invoke(task, env=SOON) for task in ("setup", "verify")):
                assert done.code in (0, 7), done
                assert done.code == 0 or f"pid {holder.info.backend_pid} " in done.err, done


def test_concurrent_build_waits_and_blocks_nobody(finished: Db) -> None:
    """An old transaction holds a concurrent build up; readers and writers of the table go on meanwhile."""
    finished.execute(INDEX_MISSING)
    with holding(finished, WRITER) as holder:
        process = finished.start("setup", LOCK_TIMEOUT="1ms", LOCK_WAIT="60s")
        until(lambda: finished.value(BUILDING), process)
        finished.execute(
            "SET lock_timeout = '1ms'; INSERT INTO slots (type, name, description) VALUES ('npc', 'a', 'b')"
        )
        holder.rollback()
        assert_done(finished, ended(process))


def test_concurrent_build_gives_up_and_the_next_run_finishes(finished: Db) -> None:
    finished.execute(INDEX_MISSING)
    with holding(finished, WRITER) as holder:
        done = finished.invoke("setup", env={"LOCK_TIMEOUT": "1ms", "LOCK_WAIT": "1s"})
        assert_fails(done, 7, str(holder.info.backend_pid))
    assert finished.value(VALID) is False
    assert_done(finished)


# ── two runs at once ───────────────────────────────────────────────────────────────────────────────────────────────


def make_old(db: Db) -> None:
    """A database migrated by hand, of which some pieces went missing since."""
    db.migrate(*BUT_FOR_THE_FIX)
    db.execute("""
        DROP INDEX idx_games_owner, idx_turns_game_idx, idx_slots_type, idx_prompt_snapshots_turn_id;
        DROP INDEX idx_turn_metrics_created;
        ALTER TABLE slots DROP COLUMN must_keep CASCADE;
        ALTER TABLE prompt_snapshots DROP COLUMN budget_report;
        ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey;
        DROP INDEX idx_prompt_snapshots_parent_id""")


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


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [lambda db: None, make_old, make_big], ids=["empty", "old", "many rows"])
def test_twenty_runs_at_once_all_succeed_and_do_each_step_once(db: Db, prepare: Callable[[Db], None]) -> None:
    prepare(db)
    processes = [db.start("setup", LOCK_WAIT="5min") for _ in range(20)]
    times = ends(processes)
    for done in map(ended, processes):
        assert (done.code, "Traceback" in done.err) == (0, False), done
    assert db.differing() == {}
    lines = db.history()
    assert len(lines) == len(set(lines)), lines
    assert db.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0
    last = float(db.value("SELECT max(extract(epoch FROM finished_at)) FROM budget_engine.history"))
    assert max(times) - last < LONGEST_AFTERWARDS_S


def test_verify_during_a_run_sees_no_conflict(db: Db) -> None:
    """What the catalogs say while another run commits may be old or new, even torn; it must not become a conflict."""
    process, codes = db.start("setup"), set()
    while process.poll() is None:
        codes |= {ended(verifier).code for verifier in [db.start("verify") for _ in range(2)]}
    assert ended(process).code == 0
    assert codes <= {0, 5}


def test_two_runs_that_queue_for_one_index_build_it_once(finished: Db) -> None:
    finished.execute(INDEX_MISSING)
    with holding(finished, "LOCK TABLE slots IN SHARE UPDATE EXCLUSIVE MODE") as holder:
        processes = [finished.start("setup") for _ in range(2)]
        until(lambda: (finished.value(BUILDING), finished.value(HAVE_THE_TURN)) == (1, 1), processes[0])
        holder.rollback()
        for process in processes:
            assert_done(finished, ended(process))


def test_a_build_that_ends_during_the_survey_is_not_taken_for_unfinished(finished: Db) -> None:
    """The survey sees the catalogs as they were when it began, and the locks as they are when it comes to them."""
    index = "SELECT oid FROM pg_class WHERE relname = 'idx_slots_type'"
    valid = "UPDATE pg_index SET indisvalid = {} WHERE indexrelid = 'idx_slots_type'::regclass"
    before = finished.rows(index)
    finished.execute(valid.format(False))
    with holding(finished, "LOCK TABLE slots IN SHARE UPDATE EXCLUSIVE MODE; LOCK TABLE templates") as builder:
        process = finished.start("setup", LOCK_TIMEOUT="30s")
        until(lambda: finished.value(WAITING), process)
        builder.execute(valid.format(True).encode())
        builder.commit()
        assert_done(finished, ended(process))
    assert finished.rows(index) == before


def test_concurrent_work_that_another_run_did_is_not_claimed(db: Db) -> None:
    """Between the look and the build, somebody builds by hand: this run did nothing, and its history says so."""
    db.migrate(*BUT_FOR_THE_FIX)
    db.execute(INDEX_MISSING)
    meanwhile: list[Run] = []
    file = str(MIGRATIONS / "20250214_slots_templates.sql")
    watcher = on_nth(containing("Q....CREATE INDEX CONCUR"), 1, lambda: meanwhile.append(db.psql("-f", file)))
    with Proxy(socket_of(db.cluster.sockets), client_says=watcher) as proxy:
        assert_done(db, db.invoke("setup", env={"DATABASE_URL": proxy.url(db.name)}))
    assert [done.code for done in meanwhile] == [0]
    assert db.history() == []


def test_run_beside_another_gives_up_after_lock_wait(db: Db) -> None:
    before = db.dump()
    with holding(db, THE_TURN) as other:
        done, pid = db.invoke("setup", env={"LOCK_WAIT": "1s"}), other.info.backend_pid
    assert (done.code, db.dump()) == (7, before)
    assert "another run" in done.err
    for said in (done.out, done.err):  # when it begins to wait, and when it gives up
        assert f"pid {pid} (role postgres, application 'the other one') is idle in transaction" in said
    assert "done" not in done.out


def test_run_beside_another_goes_on_when_that_one_is_done(db: Db) -> None:
    with holding(db, THE_TURN) as other:
        process = db.start("setup")
        until(lambda: db.rows(BETWEEN_TRIES), process)
        assert db.value(WAITING) == 0  # who waits has no snapshot that a concurrent build would wait for
        other.rollback()
        assert_done(db, ended(process))


def test_finished_database_does_not_care_about_another_run(finished: Db) -> None:
    with holding(finished, THE_TURN):
        assert finished.invoke("setup", env={"LOCK_WAIT": "0"}).code == 0


# ── the budget for locks ───────────────────────────────────────────────────────────────────────────────────────────

NAMED, AGAIN = re.compile(r"^waiting  for .*: pid \d+ ", re.M), re.compile(r"^waiting  .* next try in ", re.M)


def said(process: subprocess.Popen[str], pattern: re.Pattern[str]) -> str:
    """Read what the process prints until a line matches; return all of it."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if pattern.search(line):
            return text
    raise AssertionError((text, ended(process)))


def the_rest(process: subprocess.Popen[str], text: str) -> Run:
    done = ended(process)
    return Run(done.code, text + done.out, done.err)


def test_holder_lets_go_after_the_first_attempt(finished: Db) -> None:
    finished.execute(REPORT_MISSING)
    with holding(finished, READER) as holder:
        process = finished.start("setup", LOCK_TIMEOUT="500ms")
        pid, text = holder.info.backend_pid, said(process, AGAIN)
        holder.rollback()
        done = assert_done(finished, the_rest(process, text))
    assert (len(NAMED.findall(done.out)), len(AGAIN.findall(done.out))) == (1, 1), done
    for words in (f"pid {pid} ", "role postgres", "'the other one'", "idle in transaction", READER):
        assert words in done.out


@pytest.mark.slow
def test_holder_never_lets_go(finished: Db) -> None:
    """The queue behind a waiting step is never longer than one LOCK_TIMEOUT."""
    finished.execute(REPORT_MISSING)
    before, waits = finished.dump(data=True), [0.0]
    with holding(finished, READER), finished.connect() as third:
        began = time.monotonic()
        process = finished.start("setup", LOCK_TIMEOUT="500ms", LOCK_WAIT="4s")
        while process.poll() is None:
            asked = time.monotonic()
            third.execute("SELECT count(*) FROM prompt_snapshots")
            waits.append(time.monotonic() - asked)
            time.sleep(0.005)
        done, took_s = ended(process), time.monotonic() - began
    assert done.code == 7, done
    assert 4 < took_s < 10
    attempts = len(AGAIN.findall(done.out))
    assert attempts >= 3
    assert len(NAMED.findall(done.out)) in (attempts, attempts + 1), done
    assert 0.25 < max(waits) < 0.9  # it did queue, but not for two of them
    assert finished.dump(data=True) == before


@pytest.mark.slow
def test_deadlock_is_tried_again(finished: Db) -> None:
    """The step, which holds prompt_snapshots, wants worlds; the other one has that, and wants prompt_snapshots."""
    db = finished
    db.execute(REPORT_MISSING)
    late = "PERFORM pg_sleep(1); LOCK TABLE worlds IN SHARE MODE"
    db.execute(TRAP.format(condition="TG_TAG = 'ALTER TABLE'", action=late))
    db.execute(f"ALTER DATABASE {db.name} SET deadlock_timeout = '10ms'")  # it is found before our patience ends
    with holding(db, "SET LOCAL deadlock_timeout = '1min'; LOCK TABLE worlds IN ROW EXCLUSIVE MODE") as other:
        process = db.start("setup")
        until(lambda: db.rows(f"SELECT FROM pg_stat_activity WHERE {OURS} AND wait_event = 'PgSleep'"), process)
        other.execute("INSERT INTO prompt_snapshots (tp, linearized_prompt_text) VALUES ('{}', 'meanwhile')")
        other.commit()
        done = assert_done(db, ended(process))
    assert "deadlock" in done.out
    assert len(AGAIN.findall(done.out)) == 1
    assert db.value("SELECT count(*) FROM prompt_snapshots WHERE linearized_prompt_text = 'meanwhile'") == 1


@pytest.fixture(scope="module")
def preparing(cluster: Cluster) -> Iterator[Db]:
    """A server that takes prepared transactions."""
    with private_server(max_prepared_transactions="5") as server:
        yield Db(server, "postgres")


@pytest.mark.parametrize(("missing", "lock"), [(REPORT_MISSING, READER), (INDEX_MISSING, WRITER)])
def test_prepared_transaction_is_named(preparing: Db, missing: str, lock: str) -> None:
    db = preparing
    assert db.invoke("setup").code == 0
    db.execute(missing)
    with db.connect() as connection:
        for statement in ("BEGIN", lock, "PREPARE TRANSACTION 'forgotten one'"):
            connection.execute(statement.encode())
    named = r"now      prepared transaction 'forgotten one' \(role postgres\) has waited \d+ s for .* and holds"
    assert re.search(named, db.invoke("plan").out)
    done = db.invoke("setup", env={"LOCK_TIMEOUT": "500ms", "LOCK_WAIT": "1s"})
    assert done.code == 7, done
    for text in (done.out, done.err):
        assert "prepared transaction 'forgotten one' (role postgres)" in text, done
    db.execute("ROLLBACK PREPARED 'forgotten one'")
    assert_done(db)


def test_prepared_transaction_that_has_our_turn_is_named(preparing: Db) -> None:
    db = preparing
    assert db.invoke("setup").code == 0
    db.execute(REPORT_MISSING)
    with db.connect() as connection:
        for statement in ("BEGIN", THE_TURN, "PREPARE TRANSACTION 'in our turn'"):
            connection.execute(statement.encode())
    done = db.invoke("setup", env={"LOCK_WAIT": "500ms"})
    db.execute("ROLLBACK PREPARED 'in our turn'")
    assert_fails(done, 7, "prepared transaction 'in our turn' (role postgres)")
    assert_done(db)


@contextmanager
def old_snapshot(db: Db) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that touched nothing of ours, while a build is to be done that waits for it all the same."""
    db.execute(INDEX_MISSING)
    with holding(db, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ") as holder:
        holder.execute("SELECT 'something else'")
        yield holder


def test_old_snapshot_that_holds_up_a_build_is_named(finished: Db) -> None:
    """In a pipe, which is shown no progress."""
    with old_snapshot(finished) as holder:
        process = finished.start("setup")
        pid, text = holder.info.backend_pid, said(process, NAMED)
        holder.rollback()
        done = assert_done(finished, the_rest(process, text))
    [line] = [line for line in done.out.splitlines() if NAMED.match(line)]
    for words in (f"pid {pid} ", "'the other one'", "idle in transaction", "SELECT ..."):
        assert words in line
    assert not re.search("building |\x1b", done.out)


def test_progress_is_shown_on_a_terminal(finished: Db) -> None:
    ours, theirs = pty.openpty()
    text = ""
    with old_snapshot(finished) as holder:
        process = warm.start(("setup",), clean_environment() | {"DATABASE_URL": finished.url}, stdout=theirs)
        while "waiting for old snapshots" not in text and select.select([ours], [], [], 30)[0]:
            text += os.read(ours, 4096).decode()
        holder.rollback()
        assert process.wait(60) == 0
    os.close(theirs)
    os.close(ours)
    assert "\r\x1b[Kbuilding public.slots: waiting for old snapshots" in text


@pytest.mark.parametrize(
    "names",
    [
        ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"),
        pytest.param(("transaction_timeout",), marks=new_in(17, "transaction_timeout")),
    ],
    ids=["old", "new"],
)
def test_limits_of_the_role_do_not_end_a_concurrent_build(finished: Db, names: tuple[str, ...]) -> None:
    with role_with(finished, dict.fromkeys(names, "500ms")) as role, old_snapshot(finished) as holder:
        process = finished.start("setup", DATABASE_URL=finished.url_as(role))
        until(lambda: finished.value(BUILDING), process)
        time.sleep(1)
        assert process.poll() is None, ended(process)
        holder.rollback()
        assert "next try" not in assert_done(finished, ended(process)).out
