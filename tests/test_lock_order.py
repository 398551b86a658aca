"""A step that needs several tables holds up none while it waits for another, and gets them when both are busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
import supabase
from conftest import PACKAGED_TOO, Db, assert_fails, at_once, ended, holding, until
from states import CORE, CORE_ROWS, by_hand, with_uuid

# A writer who waits longer than this was held up: far less than the LOCK_TIMEOUT, far more than a moment (100 ms).
LONGEST_WAIT = "500ms"
LOCK_TIMEOUT = "2s"

# What stands, the table that another session keeps, a write to another table that the step needs.
SEVERAL_TABLES = {
    "core_schema": (
        CORE + CORE_ROWS + "DROP TABLE turns, games, entry_points CASCADE",
        "rulesets",
        "INSERT INTO worlds (id) VALUES (gen_random_uuid())",
    ),
    "prompt_snapshots": (CORE + CORE_ROWS, "games", "UPDATE turns SET idx = idx"),
    "fix, uuid": (with_uuid(), "turns", "UPDATE prompt_snapshots SET source = source"),
    "fix, bigint without foreign key": (by_hand("bigint"), "turns", "UPDATE prompt_snapshots SET source = source"),
    "turn_metrics without foreign key": (
        by_hand() + "CREATE TABLE turn_metrics (turn_id bigint PRIMARY KEY, story_id uuid NOT NULL,"
        " created_at timestamptz NOT NULL DEFAULT now(), tokens_before int NOT NULL, tokens_after int NOT NULL,"
        " trims_count int NOT NULL DEFAULT 0, top_trim_keys text[] DEFAULT '{}', model_ms int,"
        " rejects jsonb DEFAULT '{}', cost_estimate_cents int)",
        "turns",
        "INSERT INTO turn_metrics (turn_id, story_id, tokens_before, tokens_after)"
        " VALUES (1, gen_random_uuid(), 1, 1) ON CONFLICT (turn_id) DO UPDATE SET tokens_after = 2",
    ),
    "slots_templates and auth.users": (
        by_hand() + "DROP TABLE templates; ALTER TABLE prompt_snapshots DROP COLUMN parent_id",
        "prompt_snapshots",
        "INSERT INTO auth.users (id) VALUES (gen_random_uuid())",
    ),
    "row-level security of slots and templates": (by_hand(), "templates", "UPDATE slots SET description = description"),
}

ON_SUPABASE = {"prompt_snapshots", "templates"}


@PACKAGED_TOO
def test_a_step_that_waits_for_one_table_holds_up_nobody_on_another(db: Db) -> None:
    def holds_up_nobody(db: Db, state: str, kept: str, write: str) -> None:
        if kept in ON_SUPABASE:
            supabase.install(db)
        db.execute(state)
        waits = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{kept}'::regclass"
        with holding(db, f"LOCK TABLE {kept} IN ROW EXCLUSIVE MODE") as holder, db.connect() as writer:
            writer.execute(f"SET lock_timeout = '{LONGEST_WAIT}'")
            process = db.start("setup", LOCK_TIMEOUT=LOCK_TIMEOUT, LOCK_WAIT="0")
            until(lambda: db.value(waits), process)
            while process.poll() is None:
                writer.execute(write)  # 55P03 if it is held up
                time.sleep(0.005)
            assert_fails(ended(process), 7, f"pid {holder.info.backend_pid} ")
        assert db.invoke("setup").code == 0

    at_once(db, holds_up_nobody, SEVERAL_TABLES)


@contextmanager
def busy(db: Db, *statements: str) -> Iterator[list[BaseException]]:
    """Sessions that run these without a pause, two for each; what ended one of them before its time."""
    enough, failures = threading.Event(), list[BaseException]()

    def write(statement: str) -> None:
        with db.connect() as connection:
            try:
                while not enough.is_set():
                    connection.execute(statement)
            except psycopg.Error as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(statement,)) for statement in statements * 2]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        enough.set()
        for thread in threads:
            thread.join()


@PACKAGED_TOO
@pytest.mark.parametrize("task", ["fix", "setup"])
def test_two_busy_tables_are_got_all_the_same(db: Db, task: str) -> None:
    """Sessions write either table, or both in the other order, without a pause; no deadlock ends one of them."""
    db.execute(with_uuid())
    new_turn = """INSERT INTO turns (game_id, idx, role, content)
                  SELECT game_id, max(idx) + 1, 'player', '{}' FROM turns GROUP BY game_id ORDER BY random() LIMIT 1
                  ON CONFLICT (game_id, idx) DO NOTHING"""
    change = "UPDATE prompt_snapshots SET source = source WHERE id = md5('snapshot 1')::uuid"
    with busy(db, new_turn, change, f"BEGIN; {new_turn}; {change}; COMMIT") as failures:
        done = db.invoke(task, env={"LOCK_WAIT": "30s"})
    assert done.code == 0, done
    assert failures == []
