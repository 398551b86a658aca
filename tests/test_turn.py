"""One turn per schema: runs in other schemas do not wait for one another; runs on the same tables do, by any path."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from budget_engine.migration import chain, runner, survey, turn
from budget_engine.postgres.connection import Connection
from budget_engine.settings import load
from conftest import BETWEEN_TRIES, BUILDING, WAITING, Db, Run, ended, holding, until
from states import BIGINT, CORE, CORE_WITH_UUID_TURNS, snapshots

SCHEMAS = [f"tenant_{number:02}" for number in range(24)]
EVERYTHING = re.compile(r"^done .*\b(\d+) of \1 checks pass;", re.M)
NEEDED = 6  # steps, from nothing
CHAIN = chain.load()
TABLES = [st.new_table for step in CHAIN.steps for st in step.statements if st.new_table]
SCHEMAS_IN_HISTORY = "SELECT schema_name, count(*) FROM budget_engine.history GROUP BY 1 ORDER BY 1"


def at(db: Db, path: str) -> dict[str, str]:
    """The environment of a run through this search_path."""
    return {"DATABASE_URL": f"{db.url}&search_path={path}"}


def existing(db: Db) -> dict[str, int]:
    """How many tables of ours each schema has."""
    names = ", ".join(f"'{table}'" for table in TABLES)
    return dict(db.rows(f"SELECT schemaname, count(*) FROM pg_tables WHERE tablename IN ({names}) GROUP BY 1"))


def assert_all(runs: list[Run]) -> None:
    assert {(done.code, bool(EVERYTHING.search(done.out))) for done in runs} == {(0, True)}, "\n".join(map(str, runs))


# ── other schemas ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_twenty_four_schemas_eight_at_once_do_not_wait_for_one_another(db: Db) -> None:
    db.execute("".join(f"CREATE SCHEMA {name};" for name in SCHEMAS))
    with ThreadPoolExecutor(8) as crowd:
        runs = list(crowd.map(lambda name: db.invoke("setup", env=at(db, name) | {"LOCK_WAIT": "3s"}), SCHEMAS))
    assert_all(runs)
    assert [str(done) for done in runs if "waiting" in done.out or "not written" in done.out] == []
    assert db.rows(SCHEMAS_IN_HISTORY) == [(name, NEEDED) for name in SCHEMAS]
    assert existing(db) == dict.fromkeys(SCHEMAS, len(TABLES))


def test_builds_in_another_schema_are_not_waited_for(finished: Db) -> None:
    finished.execute("CREATE SCHEMA app")
    assert_all([finished.invoke("setup", env=at(finished, "app"))])
    finished.execute("DROP INDEX app.idx_slots_type, public.idx_slots_type")
    with having(finished, "public", turn.BUILD):
        assert_all([finished.invoke("setup", env=at(finished, "app") | {"LOCK_WAIT": "0"})])


def test_the_turn_to_build_keeps_no_catalog_locked(finished: Db) -> None:
    """A build may take hours; VACUUM FULL of pg_class would wait as long, and everybody behind it."""
    finished.execute("DROP INDEX idx_slots_type")
    turns = f"locktype = 'advisory' AND classid = {turn.BUILD} AND granted"
    held = f"""
        SELECT relation::regclass::text FROM pg_locks
        WHERE locktype = 'relation' AND pid IN (SELECT pid FROM pg_locks WHERE {turns})"""
    with holding(finished, "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
        process = finished.start("setup")
        until(lambda: finished.value(BUILDING), process)
        assert finished.value(f"SELECT count(*) FROM pg_locks WHERE {turns}") == 1
        assert {"pg_class", "pg_namespace"}.isdisjoint(name for (name,) in finished.rows(held))
        holder.rollback()
        assert_all([ended(process)])


def test_the_turn_of_the_steps_ends_with_the_last_of_them(finished: Db) -> None:
    """A build may take hours; the steps of others wait for none of it."""
    finished.execute("DROP TABLE turn_metrics; DROP INDEX idx_slots_type")
    finished.execute("ALTER TABLE prompt_snapshots DROP budget_report")
    with holding(finished, "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
        process = finished.start("setup")
        until(lambda: finished.value(BUILDING), process)
        assert finished.transactions()[-2:] == ["budget_report", "turn_metrics"]
        turns = finished.rows("SELECT DISTINCT classid::int FROM pg_locks WHERE locktype = 'advisory'")
        assert turns == [(turn.BUILD,)]
        holder.rollback()
        assert_all([ended(process)])


@contextmanager
def making_the_history(db: Db) -> Iterator[psycopg.Connection[Any]]:
    """A run in another schema, which has written its line, and comes to its commit."""
    with holding(db, "SELECT pg_current_xact_id(), set_config('budget_engine.started_at', '0', true)") as other:
        other.execute(runner.history(CHAIN.steps[0], "concurrent", "public", "1 s").encode())
        yield other


def test_who_makes_the_history_first_keeps_nobody_from_writing(db: Db) -> None:
    db.execute("CREATE SCHEMA app")
    with making_the_history(db) as other:
        process = db.start("setup", **at(db, "app"))
        until(lambda: db.value(WAITING), process)
        other.commit()
        done = ended(process)
    assert "not written" not in done.out
    assert_all([done])
    assert db.rows(SCHEMAS_IN_HISTORY) == [("app", NEEDED), ("public", 1)]


def test_who_makes_the_history_and_stays_is_waited_for_a_moment_only(db: Db) -> None:
    db.execute("CREATE SCHEMA app")
    with making_the_history(db):
        began = time.monotonic()
        done = db.invoke("prereqs", env=at(db, "app") | {"LOCK_TIMEOUT": "30s"})
    assert done.code == 0, done
    assert "not written into the history" in done.out
    assert time.monotonic() - began < 15


def test_two_schemas_whose_old_cores_are_archived_at_once(db: Db) -> None:
    """Each to a schema of its own."""
    old = CORE_WITH_UUID_TURNS + snapshots("uuid REFERENCES turns")
    paths = ["app", "other"]
    db.execute("".join(f"CREATE SCHEMA {path}; SET LOCAL search_path = {path}; {old};" for path in paths))
    with holding(db, "CREATE SCHEMA core_archive") as connection:  # a third one has just taken the name
        processes = [db.start("prereqs", "--recreate", "--yes", **at(db, path)) for path in paths]
        until(lambda: db.value(WAITING), processes[0])
        connection.commit()
        runs = [ended(process) for process in processes]
    assert {done.code for done in runs} == {0}, "\n".join(map(str, runs))
    moved = "SELECT count(*) FROM pg_tables WHERE schemaname ~ '^core_archive_[23]$' AND tablename = 'turns'"
    assert db.value(moved) == 2


# ── the same tables ────────────────────────────────────────────────────────────────────────────────────────────────


def turn_of(db: Db, path: str) -> turn.Turn:
    """The turn of a run through this search_path."""
    given = load(chain.ROOT, at(db, path))
    assert given.target
    with Connection(given.target, given) as connection:
        return survey.read(connection, CHAIN).turn


@contextmanager
def having(db: Db, path: str, what: int) -> Iterator[psycopg.Connection[Any]]:
    """Another run, through this search_path, whose turn it is."""
    with holding(db, "") as other:
        assert other.execute(f"SELECT {turn_of(db, path).taken(what)}".encode()).fetchall() == [(True,)]
        yield other


IN_PUBLIC = CORE + snapshots(BIGINT)
# What stands, whose turn it is, by which path this run comes, whether it has to wait.
MEETINGS: dict[str, tuple[str, str, str, bool]] = {
    "the same": ("", "app", "app", True),
    "another": ("", "app", "other", False),
    "one beside what stands behind both": (IN_PUBLIC, "app, public", "public", True),
    "what stands behind both": (IN_PUBLIC, "app, public", "other, public", True),
    "nothing stands behind both": ("", "app, public", "other, public", False),
    "it may make what this one would see": ("", "public", "app, public", True),
    "this one may make what it would see": ("", "app, public", "public", True),
    "in another place of the path": (IN_PUBLIC, "app", "public", False),
}


@pytest.mark.parametrize(("state", "theirs", "ours", "waits"), MEETINGS.values(), ids=MEETINGS)
def test_who_waits_for_whom(db: Db, state: str, theirs: str, ours: str, waits: bool) -> None:
    db.execute(f"CREATE SCHEMA app; CREATE SCHEMA other; {state}")
    with having(db, theirs, turn.RUN) as other:
        done = db.invoke("setup", env=at(db, ours) | {"LOCK_WAIT": "0"})
        assert done.code == (7 if waits else 0), done
        assert (f"pid {other.info.backend_pid} " in done.err) == waits, done
        assert (f"database {db.name} on {db.cluster.sockets}, schema " in done.err) == waits, done
    assert db.invoke("setup", env=at(db, ours)).code == 0


def test_who_waits_between_two_tries_leaves_the_turn_to_others(db: Db) -> None:
    """That of the schema which it could have, too, whatever it is called; what it could not have is not given back."""
    db.execute("CREATE SCHEMA app$guard$")
    without = "bool_and(pid NOT IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory'))"
    with having(db, "public", turn.RUN) as other:
        process = db.start("setup", **at(db, "app$guard$, public"))
        until(lambda: db.value(f"SELECT {without} FROM ({BETWEEN_TRIES}) AS ours"), process)
        other.rollback()
        assert_all([ended(process)])
    assert "you don't own a lock" not in db.cluster.log.read_text()


def prepared(db: Db) -> None:
    """All stands in public, but for what steps and builds are to do."""
    assert db.invoke("setup").code == 0
    db.execute("""
        CREATE SCHEMA app; CREATE SCHEMA other;
        ALTER TABLE slots DROP COLUMN must_keep CASCADE;
        ALTER TABLE prompt_snapshots DROP COLUMN budget_report;
        DROP TABLE turn_metrics;
        DROP INDEX idx_slots_type, idx_games_owner, idx_turns_game_idx""")


@pytest.mark.parametrize("prepare", [lambda db: db.execute("CREATE SCHEMA app; CREATE SCHEMA other"), prepared])
def test_runs_by_different_paths_to_the_same_tables(db: Db, prepare: Callable[[Db], None]) -> None:
    prepare(db)
    paths = ["public", "app, public", "other, public"] * 3
    processes = [db.start("setup", **at(db, path)) for path in paths]
    assert_all([ended(process) for process in processes])
    assert db.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0
