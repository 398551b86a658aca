"""Under strong locks a step changes catalogs, and nothing else: no table is read or rewritten, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from budget_engine.migration import chain
from conftest import Db
from states import by_hand, with_uuid

STATES = {
    "uuid": with_uuid(),
    "uuid NOT NULL with a default": with_uuid("uuid NOT NULL DEFAULT gen_random_uuid()"),
    "no foreign keys, no indexes": by_hand("bigint") + "DROP INDEX idx_turns_game_idx, idx_games_owner, idx_slots_type;"
    " ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_parent_id_fkey",
    "nothing of slots and snapshots": by_hand() + "DROP TABLE slots, templates, prompt_snapshots",
}
# Of the tables that existed: how often a scan of the whole was begun, and rows written.
WORK = """
SELECT relname, seq_scan, n_tup_ins + n_tup_upd + n_tup_del FROM pg_stat_xact_user_tables
WHERE relid = ANY(%s) AND (seq_scan, n_tup_ins + n_tup_upd + n_tup_del) <> (0, 0) ORDER BY 1"""
FILES = "SELECT oid, relfilenode FROM pg_class WHERE oid = ANY(%s) ORDER BY 1"
TABLES = "SELECT array_agg(oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')"


def transaction_of(step: chain.Step) -> bytes:
    """Return what a step does in its transaction, whatever exists."""
    return ";\n".join(statement.text for statement in step.statements if not statement.concurrent).encode()


def of_tables(connection: psycopg.Connection[Any], query: str, tables: list[int]) -> list[tuple[Any, ...]]:
    return connection.execute(query.encode(), [tables]).fetchall()


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_no_table_is_read_or_rewritten_in_a_steps_transaction(db: Db, state: str) -> None:
    """But for the defaults of the critical slots: look-ups by key, and five rows at most."""
    db.execute(state)
    [[tables]] = db.rows(TABLES)
    with db.connect() as other:
        files = of_tables(other, FILES, tables)
        for step in chain.load().steps:
            with db.connect(autocommit=False) as connection:  # one for each: the counters outlive a transaction
                connection.execute(transaction_of(step))
                work = of_tables(connection, WORK, tables)
            assert work == [] or (step.label, work) == ("slots_flags", [("slots", 0, 5)])
        assert of_tables(other, FILES, tables) == files


@pytest.mark.parametrize(
    ("plain", "scanned", "rewritten"),
    [
        ("ALTER TABLE prompt_snapshots ALTER COLUMN turn_id TYPE bigint USING NULL", True, True),
        ("CREATE INDEX plain ON prompt_snapshots (created_by)", True, False),
        ("ALTER TABLE prompt_snapshots ADD CONSTRAINT plain CHECK (turn_id IS NOT NULL OR source <> '')", True, False),
    ],
)
def test_the_plain_way_would_be_seen(db: Db, plain: str, scanned: bool, rewritten: bool) -> None:
    db.execute(with_uuid())
    [[tables]] = db.rows(TABLES)
    with db.connect(autocommit=False) as connection:
        files = of_tables(connection, FILES, tables)
        connection.commit()
        connection.execute(plain.encode())
        assert bool(of_tables(connection, WORK, tables)) is scanned
        assert (of_tables(connection, FILES, tables) != files) is rewritten


@pytest.fixture
def without_full_pages(db: Db) -> Iterator[None]:
    """The first change of a page after a checkpoint logs the whole page: that is not the fix's affair."""
    with db.connect() as connection:
        for value in ("off", "on"):
            connection.execute(f"ALTER SYSTEM SET full_page_writes = {value}")
            connection.execute("SELECT pg_reload_conf()")
            connection.execute("CHECKPOINT")
            if value == "off":
                yield


@pytest.mark.usefixtures("without_full_pages")
def test_the_fix_writes_as_little_wal_for_many_rows_as_for_few(db: Db) -> None:
    """Of its transaction; its index is built concurrently."""
    db.execute(with_uuid())
    few = wal_of_the_fix(db)
    db.execute("""INSERT INTO prompt_snapshots (tp, linearized_prompt_text, turn_id)
                  SELECT '{}', 'Prompt', gen_random_uuid() FROM generate_series(1, 40000)""")
    many = wal_of_the_fix(db)
    print(f"WAL of the fix: {few} bytes with 4 rows, {many} bytes with 40,004")
    assert many < few + 8192


def wal_of_the_fix(db: Db) -> int:
    """Bytes, the fewest of three tries: other sessions of the server write, too."""
    fix = next(step for step in chain.load().steps if step.label.startswith("fix"))
    tries = []
    for _ in range(3):
        with db.connect() as connection, connection.transaction(force_rollback=True):
            before = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
            connection.execute(transaction_of(fix))
            [written] = connection.execute("SELECT pg_current_wal_insert_lsn() - %s", before).fetchone() or [0]
            tries.append(int(written))
    return min(tries)
