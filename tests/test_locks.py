"""Nobody is blocked: what the recipes take locks on, what they do while others hold them, and one another."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from conftest import (
    MIGRATIONS,
    PACKAGED_TOO,
    THE_TURN,
    Db,
    Run,
    clean_environment,
    ended,
    private_server,
    until,
)
from proxy import Proxy, containing, on_nth, socket_of
from states import with_uuid

from budget_engine.migration import chain, survey, turn
from budget_engine.migration.chain import ROOT

TASKS = ["setup", "prereqs", "fix", "slots-flags", "budget-report", "turn-metrics", "verify"]
STEMS = [step.stem for step in chain.load().steps]
BUT_FOR_THE_FIX = [stem for stem in STEMS if "fix" not in stem]
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
    db.migrate(*BUT_FOR_THE_FIX)
    db.execute(
        """
        DROP INDEX idx_games_owner, idx_turns_game_idx, idx_slots_type, idx_prompt_snapshots_turn_id;
        DROP INDEX idx_turn_metrics_created;
        ALTER TABLE slots DROP COLUMN must_keep CASCADE;
        ALTER TABLE prompt_snapshots DROP COLUMN budget_report;
        ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey;
        DROP INDEX idx_prompt_snapshots_parent_id"""
    )


def history(db: Db) -> list[tuple[Any, ...]]:
    return db.rows("SELECT step, part FROM budget_engine.history ORDER BY id")


# A million as the issue has it: CROWD_ROWS=1000000. As many as that take a while to make.
CROWD_ROWS = int(os.environ.get("CROWD_ROWS", "50000"))
LONGEST_AFTERWARDS_S = 15.0  # the longest pause (patience.py), a last look, and a machine with much to do

# Our sessions that run, or wait for a lock in, a statement that begins so.
OURS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'budget-engine-recipes'"
WAITING = f"{OURS} AND wait_event_type = 'Lock'"
BUILD = "CREATE INDEX CONCURRENTLY"
BUILDING = f"{WAITING} AND query LIKE '{BUILD}%'"
# Who has the turn to build stands in the transaction that took it; who was refused it has ended his.
HAVE_THE_TURN = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = {turn.BUILD} AND granted"


# ── nothing to do ──────────────────────────────────────────────────────────────────────────────────────────────────


@PACKAGED_TOO
@pytest.mark.usefixtures("quiet")
def test_finished_database_is_neither_locked_nor_written(db: Db) -> None:
    assert db.invoke("setup").code == 0
    before = db.dump(data=True)
    with holding_everything(db):
        next_id = int(db.value("SELECT pg_current_xact_id()::text"))
        runs = {task: db.invoke(task, env=IMPATIENT) for task in TASKS}
        runs["verify.sql"] = db.psql("-c", "SET lock_timeout = '1ms'", "-f", str(chain.DB / "verify.sql"))
        assert {name: str(done) for name, done in runs.items() if done.code} == {}
        # The probe takes one id itself; every transaction that writes anything would take one, too.
        assert int(db.value("SELECT pg_current_xact_id()::text")) == next_id + 1
    assert db.dump(data=True) == before
    assert [part for _, part in history(db)] == ["transaction"] * 6


@PACKAGED_TOO
def test_every_lock_of_a_survey(db: Db) -> None:
    """ACCESS SHARE at most: of what exists, a plan holds no statement."""
    assert db.invoke("setup").code == 0
    with db.connect(autocommit=False) as connection:
        for statement in survey.statements(chain.load()):
            connection.execute(statement.encode())
        locks = (
            "SELECT relation::regclass::text, mode FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation'"
        )
        assert connection.execute(f"{locks} AND mode <> 'AccessShareLock'").fetchall() == []
        assert connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchall() == [(None,)]


# ── something to do, somebody in between ───────────────────────────────────────────────────────────────────────────

# What is missing, the lock of the other session that keeps it from being created in a transaction, the step.
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


@PACKAGED_TOO
@pytest.mark.parametrize(("missing", "lock", "label"), CONFLICTS.values(), ids=CONFLICTS)
def test_conflicting_lock_is_given_up_and_its_holder_named(db: Db, missing: str, lock: str, label: str) -> None:
    db.migrate(*BUT_FOR_THE_FIX)
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


def test_concurrent_build_waits_and_blocks_nobody(db: Db) -> None:
    """An old transaction holds a concurrent build up; readers and writers of the table go on meanwhile."""
    db.migrate(*BUT_FOR_THE_FIX)
    db.execute("DROP INDEX idx_slots_type")
    with holding(db, "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
        process = db.start("setup", LOCK_TIMEOUT="1ms", LOCK_WAIT="60s")
        until(lambda: db.value(BUILDING), process)
        db.execute("SET lock_timeout = '1ms'; INSERT INTO slots (type, name, description) VALUES ('npc', 'a', 'b')")
        holder.rollback()
        done = ended(process)
    assert done.code == 0, done
    assert db.differing() == {}


def test_concurrent_build_gives_up_and_the_next_run_finishes(db: Db) -> None:
    db.migrate(*BUT_FOR_THE_FIX)
    db.execute("DROP INDEX idx_slots_type")
    with holding(db, "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
        done = db.invoke("setup", env={"LOCK_TIMEOUT": "1ms", "LOCK_WAIT": "1s"})
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


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [lambda db: None, make_old, make_big], ids=["empty", "old", "many rows"])
def test_twenty_runs_at_once_all_succeed_and_do_each_step_once(db: Db, prepare: Callable[[Db], None]) -> None:
    prepare(db)
    processes = [db.start("setup", LOCK_WAIT="5min") for _ in range(20)]
    times = ends(processes)
    runs = [ended(process) for process in processes]
    assert {done.code for done in runs} == {0}, "\n".join(map(str, runs))
    assert {"Traceback" in done.err for done in runs} == {False}
    assert db.differing() == {}
    lines = history(db)
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


def test_two_runs_that_queue_for_one_index_build_it_once(db: Db) -> None:
    db.migrate(*BUT_FOR_THE_FIX)
    db.execute("DROP INDEX idx_slots_type")
    with holding(db, "LOCK TABLE slots IN SHARE UPDATE EXCLUSIVE MODE") as holder:
        processes = [db.start("setup") for _ in range(2)]
        until(lambda: (db.value(BUILDING), db.value(HAVE_THE_TURN)) == (1, 1), processes[0])
        holder.rollback()
        runs = [ended(process) for process in processes]
    assert {done.code for done in runs} == {0}, "\n".join(map(str, runs))
    assert db.differing() == {}


def test_concurrent_work_that_another_run_did_is_not_claimed(db: Db) -> None:
    """Between the look and the build, somebody builds by hand: this run did nothing, and its history says so."""
    db.migrate(*BUT_FOR_THE_FIX)
    db.execute("DROP INDEX idx_slots_type")
    meanwhile: list[Run] = []
    file = str(MIGRATIONS / "20250214_slots_templates.sql")
    watcher = on_nth(containing(f"Q....{BUILD}"), 1, lambda: meanwhile.append(db.psql("-f", file)))
    with Proxy(socket_of(db.cluster.sockets), client_says=watcher) as proxy:
        done = db.invoke("setup", env={"DATABASE_URL": proxy.url(db.name)})
    assert [done.code for done in (*meanwhile, done)] == [0, 0], done
    assert db.differing() == {}
    assert db.rows("SELECT to_regclass('budget_engine.history')") == [(None,)]


@contextmanager
def another_run(db: Db) -> Iterator[psycopg.Connection[Any]]:
    with holding(db, THE_TURN) as holder:
        yield holder


def test_run_beside_another_gives_up_after_lock_wait(db: Db) -> None:
    before = db.dump()
    with another_run(db) as other:
        done, pid = db.invoke("setup", env={"LOCK_WAIT": "1s"}), other.info.backend_pid
    assert (done.code, db.dump()) == (7, before)
    assert "another run" in done.err
    for said in (done.out, done.err):  # when it begins to wait, and when it gives up
        assert f"pid {pid} (role postgres, application 'the other one') is idle in transaction" in said
    assert "done" not in done.out


def test_run_beside_another_goes_on_when_that_one_is_done(db: Db) -> None:
    with another_run(db) as other:
        process = db.start("setup")
        until(lambda: db.value(f"{OURS} AND query LIKE 'ROLLBACK%'"), process)
        assert db.value(WAITING) == 0  # who waits has no snapshot that a concurrent build would wait for
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
    """Where the catalogs can be read all the same, nothing is wrong; else the message says who holds the lock."""
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


# ── the budget for locks ───────────────────────────────────────────────────────────────────────────────────────────

REPORT_MISSING = "ALTER TABLE prompt_snapshots DROP COLUMN budget_report"
READER = "LOCK TABLE prompt_snapshots IN ACCESS SHARE MODE"
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


def test_holder_lets_go_after_the_first_attempt(db: Db) -> None:
    assert db.invoke("setup").code == 0
    db.execute(REPORT_MISSING)
    with holding(db, READER) as holder:
        process = db.start("setup", LOCK_TIMEOUT="500ms")
        pid, text = holder.info.backend_pid, said(process, AGAIN)
        holder.rollback()
        done = the_rest(process, text)
    assert done.code == 0, done
    assert db.differing() == {}
    assert (len(NAMED.findall(done.out)), len(AGAIN.findall(done.out))) == (1, 1), done
    for words in (f"pid {pid} ", "role postgres", "'the other one'", "idle in transaction", READER):
        assert words in done.out


@pytest.mark.slow
def test_holder_never_lets_go(db: Db) -> None:
    """The queue behind a waiting step is never longer than one LOCK_TIMEOUT."""
    assert db.invoke("setup").code == 0
    db.execute(REPORT_MISSING)
    before, waits = db.dump(data=True), [0.0]
    with holding(db, READER), db.connect() as third:
        began = time.monotonic()
        process = db.start("setup", LOCK_TIMEOUT="500ms", LOCK_WAIT="4s")
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
    assert db.dump(data=True) == before


@pytest.mark.slow
def test_deadlock_is_tried_again(db: Db) -> None:
    """The step, which holds prompt_snapshots, wants worlds; the other one has that, and wants prompt_snapshots."""
    assert db.invoke("setup").code == 0
    db.execute(REPORT_MISSING)
    db.execute("""
        CREATE FUNCTION want_worlds() RETURNS event_trigger LANGUAGE plpgsql AS $$
        BEGIN
          IF current_setting('application_name') = 'budget-engine-recipes' THEN
            LOCK TABLE worlds IN SHARE MODE;
          END IF;
        END $$;
        CREATE EVENT TRIGGER want_worlds ON ddl_command_end WHEN TAG IN ('ALTER TABLE')
          EXECUTE FUNCTION want_worlds()""")
    with holding(db, "SET LOCAL deadlock_timeout = '1min'; LOCK TABLE worlds IN ROW EXCLUSIVE MODE") as other:
        process = db.start("setup", LOCK_TIMEOUT="30s")
        until(lambda: db.value(WAITING), process)
        other.execute("INSERT INTO prompt_snapshots (tp, linearized_prompt_text) VALUES ('{}', 'meanwhile')")
        other.commit()
        done = ended(process)
    assert done.code == 0, done
    assert "deadlock" in done.out
    assert len(AGAIN.findall(done.out)) == 1
    assert db.value("SELECT count(*) FROM prompt_snapshots WHERE linearized_prompt_text = 'meanwhile'") == 1
    assert db.differing() == {}


# What is missing, and the transaction that holds it up.
PREPARED = {
    "transaction": (REPORT_MISSING, READER),
    "concurrent": ("DROP INDEX idx_slots_type", "LOCK TABLE slots IN ROW EXCLUSIVE MODE"),
}


@pytest.fixture(scope="module")
def preparing() -> Iterator[Db]:
    """A server that takes prepared transactions."""
    with private_server(max_prepared_transactions="5") as cluster:
        yield Db(cluster, "postgres")


@pytest.mark.parametrize(("missing", "lock"), PREPARED.values(), ids=PREPARED)
def test_prepared_transaction_is_named(preparing: Db, missing: str, lock: str) -> None:
    db = preparing
    assert db.invoke("setup").code == 0
    db.execute(missing)
    with db.connect() as connection:
        for statement in ("BEGIN", lock, "PREPARE TRANSACTION 'forgotten one'"):
            connection.execute(statement.encode())
    assert "now      a prepared transaction (see pg_prepared_xacts) and holds" in db.invoke("plan").out
    done = db.invoke("setup", env={"LOCK_TIMEOUT": "500ms", "LOCK_WAIT": "1s"})
    assert done.code == 7, done
    for text in (done.out, done.err):
        assert "prepared transaction 'forgotten one' (role postgres)" in text, done
    db.execute("ROLLBACK PREPARED 'forgotten one'")
    assert db.invoke("setup").code == 0
    assert db.differing() == {}


@contextmanager
def old_snapshot(db: Db) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that touched nothing of ours; a concurrent build waits for it all the same."""
    with db.connect(autocommit=False) as holder:
        holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holder.execute("SET application_name = 'a report'")
        holder.execute("SELECT 'something else'")
        yield holder
        holder.rollback()


def test_old_snapshot_that_holds_up_a_build_is_named(db: Db) -> None:
    assert db.invoke("setup").code == 0
    db.execute("DROP INDEX idx_slots_type")
    with old_snapshot(db) as holder:
        process = db.start("setup")
        pid, text = holder.info.backend_pid, said(process, NAMED)
        holder.rollback()
        done = the_rest(process, text)
    assert done.code == 0, done
    assert db.differing() == {}
    [line] = [line for line in done.out.splitlines() if NAMED.match(line)]
    for words in (f"pid {pid} ", "'a report'", "idle in transaction", "SELECT ..."):
        assert words in line


def test_limits_of_the_role_do_not_end_a_concurrent_build(db: Db) -> None:
    assert db.invoke("setup").code == 0
    db.execute("DROP INDEX idx_slots_type")
    role = db.name
    db.execute(f"""
        CREATE ROLE {role} LOGIN SUPERUSER;
        ALTER ROLE {role} SET statement_timeout = '1s';
        ALTER ROLE {role} SET lock_timeout = '1ms'""")
    with old_snapshot(db) as holder:
        process = db.start("setup", DATABASE_URL=db.url_as(role))
        until(lambda: db.value(BUILDING), process)
        time.sleep(3)
        holder.rollback()
        done = ended(process)
    db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert done.code == 0, done
    assert "next try" not in done.out
    assert db.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_slots_type'::regclass")


def build_held_up(db: Db, stdout: int, shown: Callable[[subprocess.Popen[str]], str]) -> str:
    """Run setup while an old snapshot holds a build up, until what it shows is read; return that."""
    assert db.invoke("setup").code == 0
    db.execute("DROP INDEX idx_slots_type")
    environment = clean_environment() | {"DATABASE_URL": db.url}
    command = [sys.executable, "-m", "invoke", "setup"]
    with old_snapshot(db) as holder:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, text=True)
        text = shown(process)
        holder.rollback()
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return text + (rest or "")


def test_progress_is_shown_on_a_terminal(db: Db) -> None:
    master, slave = pty.openpty()

    def shown(_: subprocess.Popen[str]) -> str:
        text = ""
        while "waiting for old snapshots" not in text and select.select([master], [], [], 30)[0]:
            text += os.read(master, 4096).decode()
        return text

    text = build_held_up(db, slave, shown)
    os.close(slave)
    os.close(master)
    assert "\r\x1b[Kbuilding slots: waiting for old snapshots" in text


def test_progress_is_not_shown_in_a_pipe(db: Db) -> None:
    def shown(process: subprocess.Popen[str]) -> str:
        return said(process, NAMED)  # the watch has looked

    text = build_held_up(db, subprocess.PIPE, shown)
    assert "building " not in text
    assert "\x1b" not in text
