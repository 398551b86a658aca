"""Through PgBouncer, transactions pooled, in Debian's configuration: all works, or says what keeps it from working."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pooler as poolers
import psycopg
import pytest
from budget_engine.migration import chain, plan
from conftest import Db, Run, ended, until
from pooler import Pooler
from states import BIGINT, ORPHANS, by_hand, contents, lost, with_uuid
from versions import new_in

pytestmark = [
    pytest.mark.skipif(poolers.PROGRAM is None, reason="pgbouncer is not on PATH"),
    pytest.mark.skipif(poolers.CONFIGURATION is None, reason="Debian's pgbouncer.ini is not there, or not readable"),
]

STEPS = chain.load().steps
STEMS = [step.stem for step in STEPS]
NEEDED_FROM_NOTHING = [step for step in STEPS if "fix" not in step.label]
FINISHED = [step.stem for step in NEEDED_FROM_NOTHING]
ONCE_EACH = [(step.label, "transaction") for step in NEEDED_FROM_NOTHING]
TASKS = ["prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"]
RENAMED = {"public.prompt_snapshots.turn_id": "turn_id_uuid"}

# What the concurrent part has to build, and to validate, on a table of some size.
MANY_ROWS = """
INSERT INTO turns (game_id, idx, role, content)
SELECT md5('game 1')::uuid, i, 'player', '{}' FROM generate_series(10, 100000) AS i;
INSERT INTO prompt_snapshots (tp, linearized_prompt_text, turn_id)
SELECT '{}', 'Prompt ' || id, id FROM turns WHERE id % 4 = 0;
DROP INDEX idx_turns_game_idx, idx_prompt_snapshots_turn_id, idx_prompt_snapshots_source;
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey;
"""
BUILDING = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'budget-engine-recipes' AND wait_event_type = 'Lock' AND query LIKE 'CREATE INDEX CONCUR%'"""


@pytest.fixture
def pooler(db: Db) -> Iterator[Pooler]:
    with Pooler(db.cluster) as running:
        yield running


def through(pooler: Pooler, db: Db, *words: str, role: str = "postgres", query: str = "", **env: str) -> Run:
    done = db.invoke(*words, env={"DATABASE_URL": pooler.url(db, role) + query, **env})
    assert "Traceback" not in done.err, done
    assert done.err.count("error  ") == (done.code != 0), done
    return done


def to_do(db: Db) -> plan.Plan:
    return plan.make(chain.load(), STEPS, db.checks())


def history(db: Db) -> list[tuple[Any, ...]]:
    return db.rows("SELECT step, part FROM budget_engine.history ORDER BY id")


@contextmanager
def holding(connection: psycopg.Connection[Any], sql: str) -> Iterator[psycopg.Connection[Any]]:
    """An open transaction which has run this; through a pooler it keeps a server connection to itself."""
    with connection:
        connection.execute("BEGIN")
        connection.execute(sql)
        yield connection
        connection.execute("ROLLBACK")


# ── everything works ───────────────────────────────────────────────────────────────────────────────────────────────


def test_setup_from_nothing_and_again(db: Db, pooler: Pooler) -> None:
    done = through(pooler, db, "setup")
    assert done.code == 0, done
    assert "through a pooler" in done.out
    assert db.differing() == {}
    again = through(pooler, db, "setup")
    assert (again.code, "nothing to do" in again.out) == (0, True), again
    assert history(db) == ONCE_EACH


def test_each_task_alone(db: Db, pooler: Pooler) -> None:
    assert through(pooler, db, "verify").code == 5
    assert through(pooler, db, "turn-metrics").code == 1
    done = {task: through(pooler, db, task) for task in [*TASKS, "verify"]}
    assert {task: run.code for task, run in done.items()} == dict.fromkeys(done, 0), done


STATES: dict[str, tuple[str, dict[str, str]]] = {"by hand": (by_hand(), {}), "uuid": (with_uuid(), RENAMED)}


@pytest.mark.parametrize(("state", "renamed"), STATES.values(), ids=STATES)
def test_old_database_with_concurrent_work(db: Db, pooler: Pooler, state: str, renamed: dict[str, str]) -> None:
    db.execute(state)
    before = contents(db)
    done = through(pooler, db, "setup")
    assert done.code == 0, done
    assert "concurrently" in done.out
    assert db.differing() == {}
    assert lost(before, contents(db), renamed) == []


def test_rows_that_point_to_nothing(db: Db, pooler: Pooler) -> None:
    db.execute(by_hand(BIGINT.partition(" ")[0], ORPHANS))
    done = through(pooler, db, "setup")
    assert done.code == 5, done
    assert "1 rows point to nothing" in done.err


def test_schema_of_the_url(db: Db, pooler: Pooler) -> None:
    """Set in each transaction anew: the server's session is another one each time, and is left as it was."""
    db.execute(f"CREATE SCHEMA app; SET search_path = app; {by_hand()}")
    done = through(pooler, db, "setup", query="&schema=app")
    assert done.code == 0, done
    assert db.rows("SELECT nspname FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace "
                   "WHERE relname = 'turn_metrics'") == [("app",)]  # fmt: skip
    with pooler.connect(db) as other:
        assert other.execute("SHOW search_path").fetchone() == ('"$user", public',)
        assert other.execute("SHOW statement_timeout").fetchone() == ("0",)


def test_what_others_left_in_the_session_does_not_matter(db: Db) -> None:
    with Pooler(db.cluster, settings={"default_pool_size": "1"}) as pooler:
        with pooler.connect(db) as other:
            for setting in ("statement_timeout = '100ms'", "lock_timeout = '1ms'", "enable_nestloop = off"):
                other.execute(f"SET {setting}")
        assert through(pooler, db, "setup").code == 0
        with pooler.connect(db) as other:
            assert other.execute("SHOW lock_timeout").fetchone() == ("1ms",)


# ── many at once ───────────────────────────────────────────────────────────────────────────────────────────────────


def twenty_at_once(pooler: Pooler, db: Db) -> None:
    runs = [ended(process) for process in [db.start("setup", DATABASE_URL=pooler.url(db)) for _ in range(20)]]
    assert {(done.code, done.err) for done in runs} == {(0, "")}, "\n".join(map(str, runs))
    assert db.differing() == {}


TEMPORARY = "CREATE TEMPORARY TABLE slots (id text); CREATE TEMPORARY TABLE turns (id uuid)"


def test_temporary_tables_of_others_in_the_session_are_not_taken_for_ours(db: Db) -> None:
    with Pooler(db.cluster, settings={"default_pool_size": "1"}) as pooler:
        there = {"DATABASE_URL": pooler.url(db)}
        for task in ("verify", "plan --sql", "rehearse", "setup", "doctor"):
            with pooler.connect(db) as other:
                other.execute("DROP TABLE IF EXISTS pg_temp.slots, pg_temp.turns")
                other.execute(TEMPORARY)
            done = db.invoke(*task.split(), env=there)
            assert (done.code, "temporary tables of these names" in done.out + done.err) == (1, True), done
    assert db.rows("SELECT FROM pg_tables WHERE schemaname = 'public'") == []


def test_temporary_tables_do_not_hide_ours(db: Db) -> None:
    assert db.invoke("setup").code == 0
    db.execute("ALTER TABLE prompt_snapshots DROP COLUMN budget_report; DROP TABLE turn_metrics")
    with Pooler(db.cluster, settings={"default_pool_size": "1"}) as pooler:
        with pooler.connect(db) as other:
            other.execute(TEMPORARY)
        for task in ("setup", "verify"):
            done = through(pooler, db, task)
            assert done.code == 0, done
    assert db.differing() == {}


def test_twenty_at_once_from_nothing(db: Db, pooler: Pooler) -> None:
    twenty_at_once(pooler, db)
    assert history(db) == ONCE_EACH


@pytest.mark.slow
def test_twenty_at_once_with_indexes_to_build(db: Db, pooler: Pooler) -> None:
    db.execute(by_hand() + MANY_ROWS)
    before = many_rows(db)
    twenty_at_once(pooler, db)
    assert many_rows(db) == before
    lines = list(dict.fromkeys(history(db)))  # where two collide, a step may be built twice
    concurrent = ["core_schema", "slots_templates", "prompt_snapshots", "fix_prompt_snapshots_turn_id", "slots_flags"]
    assert [step for step, part in lines if part == "concurrent"] == concurrent


def many_rows(db: Db) -> list[tuple[Any, ...]]:
    """A digest: every value of every row, without carrying them here."""
    digest = "SELECT count(*), sum(hashtextextended((to_jsonb(t) - 'budget_report')::text, 0)) FROM {} AS t"
    return [row for table in ("turns", "prompt_snapshots") for row in db.rows(digest.format(table))]


# ── locks, and limits that the role brings along ───────────────────────────────────────────────────────────────────


def test_who_holds_a_lock_is_named(db: Db, pooler: Pooler) -> None:
    db.migrate(*FINISHED)
    db.execute("ALTER TABLE slots DROP COLUMN min_chars CASCADE")
    before = db.dump(data=True)
    with holding(db.connect(), "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
        done = through(pooler, db, "setup", LOCK_TIMEOUT="300ms", LOCK_WAIT="0")
        assert done.code == 7, done
        assert f"pid {holder.info.backend_pid} " in done.err
    assert db.dump(data=True) == before
    assert through(pooler, db, "setup").code == 0


@contextmanager
def limited(db: Db, *settings: str) -> Iterator[str]:
    """A role that brings half a second of patience along."""
    db.execute(f"CREATE ROLE {db.name} LOGIN SUPERUSER")
    for setting in settings:
        db.execute(f"ALTER ROLE {db.name} SET {setting} = '500ms'")
    yield db.name
    db.execute(f"REASSIGN OWNED BY {db.name} TO postgres; DROP ROLE {db.name}")


# What ends the concurrent part, the exit code, how the next run comes.
LIMITS = [("statement_timeout", 1, "direct"), ("lock_timeout", 7, "lifted")]


@pytest.mark.parametrize(("setting", "code", "finish"), LIMITS)
def test_limit_of_the_role_through_the_pooler(db: Db, setting: str, code: int, finish: str) -> None:
    db.migrate(*FINISHED)
    db.execute("DROP INDEX idx_slots_type")
    with limited(db, setting) as role, Pooler(db.cluster, roles=(role,)) as pooler:
        with holding(db.connect(), "LOCK TABLE slots IN ROW EXCLUSIVE MODE"):
            done = through(pooler, db, "setup", role=role, LOCK_WAIT="0")
        assert done.code == code, done
        assert "the direct URL" in done.err
        assert "idx_slots_type" in done.err
        assert db.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_slots_type'::regclass") is False
        if finish == "lifted":
            db.execute(f"ALTER ROLE {role} RESET {setting}")
            pooler.stop()  # sessions that are open keep what they were born with
            pooler.start()
        again = db.invoke("setup", role=role) if finish == "direct" else through(pooler, db, "setup", role=role)
        assert again.code == 0, again
    assert db.differing() == {}


@pytest.mark.parametrize(
    "names",
    [
        ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"),
        pytest.param(("transaction_timeout",), marks=new_in(17, "transaction_timeout")),
    ],
    ids=["old", "new"],
)
def test_limits_of_the_role_are_lifted_on_the_server_itself(db: Db, names: tuple[str, ...]) -> None:
    db.migrate(*FINISHED)
    db.execute("DROP INDEX idx_slots_type")
    with limited(db, *names) as role:
        with holding(db.connect(), "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
            process = db.start("setup", DATABASE_URL=db.url_as(role))
            until(lambda: db.value(BUILDING), process)
            time.sleep(1)
            assert process.poll() is None, ended(process)
            holder.execute("COMMIT; BEGIN")
            done = ended(process)
        assert done.code == 0, done
    assert db.differing() == {}


# ── the pooler goes, or has no room ────────────────────────────────────────────────────────────────────────────────


def test_pooler_restarts_between_two_runs(db: Db, pooler: Pooler) -> None:
    assert through(pooler, db, "prereqs").code == 0
    pooler.stop()
    gone = through(pooler, db, "setup", CONNECT_TIMEOUT="1s")
    assert gone.code == 4, gone
    pooler.start()
    assert through(pooler, db, "setup").code == 0
    assert db.differing() == {}


RESTARTS = {
    "in a step": "ALTER TABLE slots DROP COLUMN min_chars CASCADE",
    "in a build": "DROP INDEX idx_slots_type",
}
OURS_WAITS = """
SELECT count(*) FROM pg_stat_activity WHERE application_name = 'budget-engine-recipes' AND wait_event_type = 'Lock'"""


@pytest.mark.parametrize("missing", RESTARTS.values(), ids=RESTARTS)
def test_pooler_restarts_in_the_middle(db: Db, pooler: Pooler, missing: str) -> None:
    db.execute(by_hand())
    db.migrate(*STEMS)
    db.execute(missing)
    before = contents(db)
    with holding(db.connect(), "LOCK TABLE slots IN ROW EXCLUSIVE MODE"):
        process = db.start("setup", DATABASE_URL=pooler.url(db), LOCK_TIMEOUT="30s")
        until(lambda: db.value(OURS_WAITS), process)
        pooler.stop()
        done = ended(process)
    assert done.code == 4, done
    assert done.err.count("error  ") == 1, done
    pooler.start()
    again = through(pooler, db, "setup")
    assert again.code == 0, again
    assert db.differing() == {}
    assert lost(before, contents(db), {}) == []


def test_server_ends_the_session_behind_the_pooler(db: Db, pooler: Pooler) -> None:
    db.execute(by_hand())
    db.migrate(*STEMS)
    db.execute("DROP INDEX idx_slots_type")
    with holding(db.connect(), "LOCK TABLE slots IN ROW EXCLUSIVE MODE"):
        process = db.start("setup", DATABASE_URL=pooler.url(db))
        until(lambda: db.value(BUILDING), process)
        db.rows(BUILDING.replace("count(*)", "pg_terminate_backend(pid, 10000)"))
        done = ended(process)
    assert done.code == 4, done
    assert done.err.count("error  ") == 1, done
    again = through(pooler, db, "setup")
    assert again.code == 0, again
    assert db.differing() == {}


@pytest.mark.parametrize("state", ["", by_hand()], ids=["nothing", "concurrent work"])
def test_two_server_connections_are_enough(db: Db, state: str) -> None:
    db.execute(state)
    with Pooler(db.cluster, settings={"default_pool_size": "2"}) as pooler:
        done = through(pooler, db, "setup")
    assert done.code == 0, done
    assert db.differing() == {}


NO_ROOM = {
    "one server connection": {"default_pool_size": "1"},
    "one client": {"max_client_conn": "1"},
}


@pytest.mark.parametrize("settings", NO_ROOM.values(), ids=NO_ROOM)
def test_one_connection_is_enough(db: Db, settings: dict[str, str]) -> None:
    db.execute(by_hand())
    before = contents(db)
    with Pooler(db.cluster, settings=settings) as pooler:
        done = through(pooler, db, "setup", CONNECT_TIMEOUT="1s")
    assert done.code == 0, done
    assert db.differing() == {}
    assert lost(before, contents(db), {}) == []


def test_who_holds_the_lock_also_takes_the_last_server_connection(db: Db) -> None:
    """The watch gets none: it must not keep the step waiting, which has long given up."""
    db.migrate(*FINISHED)
    db.execute("ALTER TABLE slots DROP COLUMN min_chars CASCADE")
    with Pooler(db.cluster, settings={"default_pool_size": "2"}) as pooler:
        with holding(pooler.connect(db), "LOCK TABLE slots IN ROW EXCLUSIVE MODE"):
            began = time.monotonic()
            done = through(pooler, db, "setup", CONNECT_TIMEOUT="1s", LOCK_TIMEOUT="300ms", LOCK_WAIT="0")
            assert time.monotonic() - began < 60  # not PgBouncer's 120
            assert done.code == 7, done
            assert "could not be asked" in done.err
        assert through(pooler, db, "setup").code == 0


def test_no_server_connection_at_all(db: Db) -> None:
    """PgBouncer itself ends the wait (query_wait_timeout, two minutes unless said otherwise)."""
    with Pooler(db.cluster, settings={"default_pool_size": "1", "query_wait_timeout": "1"}) as pooler:
        with holding(pooler.connect(db), "SELECT"):
            done = through(pooler, db, "setup", CONNECT_TIMEOUT="1s")
            assert done.code == 4, done
            assert "query_wait_timeout" in done.err
        assert through(pooler, db, "setup").code == 0
