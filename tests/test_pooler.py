"""Through PgBouncer, transactions pooled, in Debian's configuration: all works, or says what keeps it from working."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pooler as poolers
import pytest
from budget_engine.migration import chain
from budget_engine.postgres.embedded import Cluster
from conftest import BUILDING, WAITING, Db, Run, assert_done, assert_fails, at_once, ended, holding, role_with, until
from pooler import Pooler
from states import BIGINT, ORPHANS, SLOT_ROWS, by_hand, contents, lost, with_uuid

pytestmark = [
    pytest.mark.skipif(poolers.PROGRAM is None, reason="pgbouncer is not on PATH"),
    pytest.mark.skipif(poolers.CONFIGURATION is None, reason="Debian's pgbouncer.ini is not there, or not readable"),
]

TASKS = ["prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"]

# What the concurrent part has to build, and to validate, on a table of some size.
MANY_ROWS = """
INSERT INTO turns (game_id, idx, role, content)
SELECT md5('game 1')::uuid, i, 'player', '{}' FROM generate_series(10, 30000) AS i;
INSERT INTO prompt_snapshots (tp, linearized_prompt_text, turn_id)
SELECT '{}', 'Prompt ' || id, id FROM turns WHERE id % 4 = 0;
DROP INDEX idx_turns_game_idx, idx_prompt_snapshots_turn_id, idx_prompt_snapshots_source;
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey;
"""
WRITER = "LOCK TABLE slots IN ROW EXCLUSIVE MODE"
STEP_PENDING, BUILD_PENDING = "ALTER TABLE slots DROP COLUMN min_chars CASCADE", "DROP INDEX idx_slots_type"


@pytest.fixture
def pooler(cluster: Cluster) -> Iterator[Pooler]:
    with Pooler(cluster) as running:
        yield running


def through(pooler: Pooler, db: Db, *words: str, role: str = "postgres", query: str = "", **env: str) -> Run:
    done = db.invoke(*words, env={"DATABASE_URL": pooler.url(db, role) + query, **env})
    if done.code:
        assert_fails(done, done.code)
    return done


# ── everything works ───────────────────────────────────────────────────────────────────────────────────────────────


def test_each_task_alone_and_setup_with_nothing_to_do(db: Db, pooler: Pooler) -> None:
    assert through(pooler, db, "verify").code == 5
    assert through(pooler, db, "turn-metrics").code == 1
    done = {task: through(pooler, db, task) for task in [*TASKS, "verify", "setup"]}
    assert {task: run.code for task, run in done.items()} == dict.fromkeys(done, 0), done
    assert "through a pooler" in done["prereqs"].out
    assert "nothing to do" in assert_done(db, done["setup"]).out
    assert db.transactions() == [step.label for step in chain.load().steps if "fix" not in step.label]


def test_old_database_with_concurrent_work(db: Db, pooler: Pooler) -> None:
    db.execute(with_uuid())
    before = contents(db)
    assert "concurrently" in assert_done(db, through(pooler, db, "setup")).out
    assert lost(before, contents(db), {"public.prompt_snapshots.turn_id": "turn_id_uuid"}) == []


def test_schema_of_the_url_and_rows_that_point_to_nothing(db: Db, pooler: Pooler) -> None:
    """Set in each transaction anew: the server's session is another one each time, and is left as it was."""
    db.execute(f"CREATE SCHEMA app; SET search_path = app; {by_hand(BIGINT.partition(' ')[0], ORPHANS)}")
    assert_fails(through(pooler, db, "setup", query="&schema=app"), 5, "1 rows point to nothing")
    assert db.rows("SELECT schemaname FROM pg_tables WHERE tablename = 'turn_metrics'") == [("app",)]
    with pooler.connect(db) as other:
        assert other.execute("SHOW search_path").fetchone() == ('"$user", public',)
        assert other.execute("SHOW statement_timeout").fetchone() == ("0",)


def test_what_others_left_in_the_only_session_does_not_matter(db: Db) -> None:
    db.execute(by_hand())
    before = contents(db)
    with Pooler(db.cluster, settings={"default_pool_size": "1"}) as pooler:
        with pooler.connect(db) as other:
            for setting in ("statement_timeout = '100ms'", "lock_timeout = '1ms'", "enable_nestloop = off"):
                other.execute(f"SET {setting}".encode())
        assert_done(db, through(pooler, db, "setup", CONNECT_TIMEOUT="1s"))
        with pooler.connect(db) as other:
            assert other.execute("SHOW lock_timeout").fetchone() == ("1ms",)
    assert lost(before, contents(db), {}) == []


TEMPORARY = "CREATE TEMPORARY TABLE slots (id text); CREATE TEMPORARY TABLE turns (id uuid)"


def test_temporary_tables_of_others_in_the_session_are_not_taken_for_ours(db: Db) -> None:
    with Pooler(db.cluster, settings={"default_pool_size": "1"}) as pooler:
        for task in ("verify", "setup", "doctor"):
            with pooler.connect(db) as other:
                other.execute("DROP TABLE IF EXISTS pg_temp.slots, pg_temp.turns")
                other.execute(TEMPORARY)
            done = db.invoke(task, env={"DATABASE_URL": pooler.url(db)})
            assert (done.code, "temporary tables of these names" in done.out + done.err) == (1, True), done
    assert db.rows("SELECT FROM pg_tables WHERE schemaname = 'public'") == []


def test_temporary_tables_do_not_hide_ours(finished: Db) -> None:
    finished.execute("ALTER TABLE prompt_snapshots DROP COLUMN budget_report; DROP TABLE turn_metrics")
    with Pooler(finished.cluster, settings={"default_pool_size": "1"}) as pooler:
        with pooler.connect(finished) as other:
            other.execute(TEMPORARY)
        for task in ("setup", "verify"):
            assert_done(finished, through(pooler, finished, task))


# ── many at once ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_twenty_at_once_with_indexes_to_build(db: Db, pooler: Pooler) -> None:
    db.execute(by_hand() + MANY_ROWS)
    before = many_rows(db)
    runs = [ended(process) for process in [db.start("setup", DATABASE_URL=pooler.url(db)) for _ in range(20)]]
    assert {(done.code, done.err) for done in runs} == {(0, "")}, "\n".join(map(str, runs))
    assert db.differing() == {}
    assert many_rows(db) == before
    lines = dict.fromkeys(db.history())  # where two collide, a step may be built twice
    concurrent = ["core_schema", "slots_templates", "prompt_snapshots", "fix_prompt_snapshots_turn_id", "slots_flags"]
    assert [step for step, part in lines if part == "concurrent"] == concurrent


def many_rows(db: Db) -> list[tuple[Any, ...]]:
    """A digest: every value of every row, without carrying them here."""
    digest = "SELECT count(*), sum(hashtextextended((to_jsonb(t) - 'budget_report')::text, 0)) FROM {} AS t"
    return [row for table in ("turns", "prompt_snapshots") for row in db.rows(digest.format(table))]


# ── locks, and limits that the role brings along ───────────────────────────────────────────────────────────────────


def test_who_holds_a_lock_is_named(finished: Db, pooler: Pooler) -> None:
    finished.execute(STEP_PENDING)
    with holding(finished, WRITER) as holder:
        done = through(pooler, finished, "setup", LOCK_TIMEOUT="300ms", LOCK_WAIT="0")
        assert_fails(done, 7, f"pid {holder.info.backend_pid} ")
    assert through(pooler, finished, "setup").code == 0


# What ends the concurrent part, the exit code, whether the next run comes through the pooler again.
LIMITS = {"statement_timeout": ("statement_timeout", 1, False), "lock_timeout": ("lock_timeout", 7, True)}


def test_limit_of_the_role_through_the_pooler(finished: Db) -> None:
    """On the server itself it is lifted: see test_locks.py."""
    finished.execute(BUILD_PENDING)

    def ends_the_build(db: Db, setting: str, code: int, pooled: bool) -> None:
        with role_with(db, {setting: "500ms"}) as role, Pooler(db.cluster, roles=(role,)) as pooler:
            with holding(db, WRITER):
                done = through(pooler, db, "setup", role=role, LOCK_WAIT="0")
            assert_fails(done, code, "the direct URL", "idx_slots_type")
            assert db.rows("SELECT FROM pg_index WHERE indexrelid = 'idx_slots_type'::regclass AND NOT indisvalid")
            if pooled:
                db.execute(f"ALTER ROLE {role} RESET {setting}")
                pooler.stop()  # sessions that are open keep what they were born with
                pooler.start()
            again = through(pooler, db, "setup", role=role) if pooled else db.invoke("setup", role=role)
            assert again.code == 0, again

    at_once(finished, ends_the_build, LIMITS)


# ── the pooler goes, or has no room ────────────────────────────────────────────────────────────────────────────────


# What is pending, who ends the session meanwhile.
ENDS = {
    "the pooler, in a step": (STEP_PENDING, "pooler"),
    "the pooler, in a build": (BUILD_PENDING, "pooler"),
    "the server, in a build": (BUILD_PENDING, "server"),
}


@pytest.mark.parametrize(("missing", "who"), ENDS.values(), ids=ENDS)
def test_session_ends_in_the_middle(finished: Db, pooler: Pooler, missing: str, who: str) -> None:
    db = finished
    db.execute(SLOT_ROWS + missing)
    before = contents(db)
    with holding(db, WRITER):
        process = db.start("setup", DATABASE_URL=pooler.url(db), LOCK_TIMEOUT="30s")
        until(lambda: db.value(BUILDING if missing == BUILD_PENDING else WAITING), process)
        if who == "pooler":
            pooler.stop()
        else:
            db.rows(BUILDING.replace("count(*)", "pg_terminate_backend(pid, 10000)"))
        assert_fails(ended(process), 4)
    if who == "pooler":
        pooler.start()
    assert_done(db, through(pooler, db, "setup"))
    assert lost(before, contents(db), {}) == []


def test_one_connection_is_enough(db: Db) -> None:
    db.execute(by_hand())

    def is_enough(db: Db, setting: str, value: str) -> None:
        with Pooler(db.cluster, settings={setting: value}) as pooler:
            done = through(pooler, db, "setup", CONNECT_TIMEOUT="1s")
            assert done.code == 0, done

    at_once(db, is_enough, {"to the server": ("default_pool_size", "2"), "to the pooler": ("max_client_conn", "1")})


def test_who_holds_the_lock_also_takes_the_last_server_connection(finished: Db) -> None:
    """The watch gets none: it must not keep the step waiting, which has long given up."""
    finished.execute(STEP_PENDING)
    with Pooler(finished.cluster, settings={"default_pool_size": "2"}) as pooler:
        with pooler.connect(finished) as other:
            other.execute(f"BEGIN; {WRITER}".encode())
            began = time.monotonic()
            done = through(pooler, finished, "setup", CONNECT_TIMEOUT="1s", LOCK_TIMEOUT="300ms", LOCK_WAIT="0")
            assert time.monotonic() - began < 60  # not PgBouncer's 120
            assert_fails(done, 7, "could not be asked")
        assert through(pooler, finished, "setup").code == 0


def test_no_server_connection_at_all(db: Db) -> None:
    """PgBouncer itself ends the wait (query_wait_timeout, two minutes unless said otherwise)."""
    with Pooler(db.cluster, settings={"default_pool_size": "1", "query_wait_timeout": "1"}) as pooler:
        with pooler.connect(db) as other:
            other.execute("BEGIN; SELECT")
            assert_fails(through(pooler, db, "setup", CONNECT_TIMEOUT="1s"), 4, "query_wait_timeout")
        assert through(pooler, db, "setup").code == 0
