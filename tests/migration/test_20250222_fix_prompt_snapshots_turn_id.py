"""20250222_fix_prompt_snapshots_turn_id: bigint with its foreign key, every uuid kept, and a way back."""

from __future__ import annotations

import re
import textwrap
import uuid
from pathlib import Path

import psycopg
import pytest
from conftest import Db, assert_done, succeeded
from states import UUIDS, by_hand, snapshot_rows, with_uuid

STEM = "20250222_fix_prompt_snapshots_turn_id"
LABEL = "fix_prompt_snapshots_turn_id"
FOREIGN_KEY = "FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE SET NULL"

STATES = {
    "with index": with_uuid(),
    "without index": with_uuid() + "DROP INDEX idx_prompt_snapshots_turn_id",
    "NOT NULL": with_uuid("uuid NOT NULL"),
    "default": with_uuid("uuid DEFAULT gen_random_uuid()"),
    "NOT NULL, default, comment": with_uuid("uuid NOT NULL DEFAULT md5('100 % ''x''')::uuid")
    + "COMMENT ON COLUMN prompt_snapshots.turn_id IS E'50 %s of it''s\\n$1 \\\\ turn'",
    "in a schema whose name wants quotes": 'CREATE SCHEMA "My App"; SET search_path = "My App";' + with_uuid(),
}


def held(db: Db, column: str) -> list[tuple[uuid.UUID, uuid.UUID | None]]:
    """Return (id, what the column holds) of every snapshot."""
    return db.rows(f"SELECT id, {column} FROM prompt_snapshots ORDER BY id")


def undoing(db: Db, column: str = "turn_id_uuid") -> str:
    """Return what the comment of the kept column says to run."""
    comment: str = db.value(f"""
        SELECT col_description(attrelid, attnum) FROM pg_attribute
        WHERE attrelid = to_regclass('prompt_snapshots') AND attname = '{column}'""")
    return comment[comment.index("BEGIN;") :]


def undo(db: Db, folder: Path, text: str) -> None:
    """Run it with psql."""
    (folder / "undo.sql").write_text(text)
    done = db.psql("-f", str(folder / "undo.sql"))
    assert (done.code, done.err) == (0, "")


@pytest.fixture(params=STATES)
def old(request: pytest.FixtureRequest, db: Db) -> Db:
    """A database whose turn_id is uuid, in each form."""
    state = STATES[request.param]
    db.execute(state)
    if "My App" in state:
        db.execute(f'ALTER DATABASE {db.name} SET search_path = "My App"')
    return db


def test_every_value_is_kept_and_the_undo_of_the_comment_gives_back_what_was(old: Db, tmp_path: Path) -> None:
    """New rows need not fill the kept column."""
    before, values = old.dump(data=True), held(old, "turn_id")
    assert {type(value) for _, value in values} <= {uuid.UUID, type(None)}
    for _ in range(2):
        old.migrate(STEM)
        assert held(old, "turn_id_uuid") == values
        assert {value for _, value in held(old, "turn_id")} == {None}
        assert old.failing(LABEL) == []
        undo(old, tmp_path, undoing(old))
        old.execute("ALTER TABLE prompt_snapshots DROP turn_id_bigint")
        assert old.dump(data=True) == before
    old.migrate(STEM)
    old.execute("DELETE FROM prompt_snapshots;" + snapshot_rows("i"))
    assert old.rows("SELECT turn_id, turn_id_uuid FROM prompt_snapshots ORDER BY 1") == [(i, None) for i in range(1, 5)]


def test_after_an_undo_setup_fixes_again_and_keeps_both(old: Db, tmp_path: Path) -> None:
    """The undo is printed, too."""
    before = held(old, "turn_id")
    done = old.call("fix")
    printed = re.search(r"to undo it:\n(.*?COMMIT;)$", done.out, re.S | re.M)
    assert printed is not None, done
    old.execute("UPDATE prompt_snapshots SET turn_id = 2")
    undo(old, tmp_path, textwrap.dedent(printed[1]))
    assert held(old, "turn_id") == before
    assert "prompt_snapshots.turn_id" in old.differing()
    assert_done(old, old.call("setup"))
    assert held(old, "turn_id_uuid_2") == before  # one ending for both: what the undo kept is turn_id_bigint
    assert {value for _, value in held(old, "turn_id_bigint")} == {2}
    undo(old, tmp_path, undoing(old, "turn_id_uuid_2"))
    assert held(old, "turn_id") == before


def test_a_name_that_is_taken_is_left_alone(db: Db, tmp_path: Path) -> None:
    taken = "ALTER TABLE prompt_snapshots ADD turn_id_uuid text DEFAULT 'mine', ADD turn_id_bigint int"
    db.execute(with_uuid() + taken)
    before, values = db.dump(data=True), held(db, "turn_id")
    db.migrate(STEM)
    assert held(db, "turn_id_uuid_2") == values
    assert {value for _, value in held(db, "turn_id_uuid")} == {"mine"}
    undo(db, tmp_path, undoing(db, "turn_id_uuid_2"))
    db.execute("ALTER TABLE prompt_snapshots DROP turn_id_bigint_2")
    assert db.dump(data=True) == before


@pytest.mark.parametrize("state", [with_uuid(), by_hand("bigint")], ids=["uuid", "bigint"])
def test_the_foreign_key_and_the_index_work(db: Db, state: str) -> None:
    db.execute(state)
    db.migrate(STEM)
    assert db.rows("""
        SELECT conname, pg_get_constraintdef(oid), convalidated FROM pg_constraint
        WHERE conrelid = 'prompt_snapshots'::regclass AND confrelid = 'turns'::regclass""") == [
        ("prompt_snapshots_turn_id_fkey", FOREIGN_KEY, True)
    ]
    db.execute("UPDATE prompt_snapshots SET turn_id = 5 WHERE source = 'auto'")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        db.execute("UPDATE prompt_snapshots SET turn_id = 999999")
    with db.connect() as connection:
        connection.execute("SET enable_seqscan = off")
        plan = connection.execute("EXPLAIN SELECT FROM prompt_snapshots WHERE turn_id = 5").fetchall()
    assert "idx_prompt_snapshots_turn_id " in str(plan)
    db.execute("DELETE FROM turns WHERE id = 5")
    assert db.value("SELECT count(*) FROM prompt_snapshots") == 4
    assert db.rows("SELECT DISTINCT turn_id FROM prompt_snapshots WHERE source = 'auto'") == [(None,)]


@pytest.mark.parametrize("path", ["public", "public, backup"])
def test_the_table_that_the_search_path_names_and_no_other(db: Db, path: str) -> None:
    db.execute("CREATE SCHEMA backup; SET search_path = backup;" + with_uuid())
    db.execute(with_uuid())
    query = """
        SELECT attrelid::regclass::text, attname, atttypid::regtype::text FROM pg_attribute
        WHERE attrelid IN ('public.prompt_snapshots'::regclass, 'backup.prompt_snapshots'::regclass)
          AND attname ~ '^turn_id' ORDER BY 1, 2"""
    succeeded(db.by_psql(STEM, before=f"SET search_path = {path}"))
    assert db.rows(query) == [
        ("backup.prompt_snapshots", "turn_id", "uuid"),
        ("prompt_snapshots", "turn_id", "bigint"),
        ("prompt_snapshots", "turn_id_uuid", "uuid"),
    ]
    succeeded(db.by_psql(STEM, before="SET search_path = backup, public"))
    assert ("backup.prompt_snapshots", "turn_id", "bigint") in db.rows(query)
    assert db.rows("""
        SELECT conrelid::regclass::text, confrelid::regclass::text FROM pg_constraint
        WHERE conname = 'prompt_snapshots_turn_id_fkey' ORDER BY 1""") == [
        ("backup.prompt_snapshots", "backup.turns"),
        ("prompt_snapshots", "turns"),
    ]


def test_grants_on_the_column_are_not_lost(db: Db) -> None:
    """Either the new column has them, or they are in the way."""
    db.execute(with_uuid() + "GRANT SELECT (id, turn_id), UPDATE (turn_id) ON prompt_snapshots TO pg_monitor")
    done = db.call("fix")
    granted = db.value("""
        SELECT has_column_privilege('pg_monitor', 'prompt_snapshots', 'turn_id', 'SELECT')
           AND has_column_privilege('pg_monitor', 'prompt_snapshots', 'turn_id', 'UPDATE')""")
    assert (done.code, granted) in {(0, True), (6, True)}, done


def test_a_bigint_turn_id_is_not_touched(db: Db) -> None:
    db.execute(by_hand())
    before = db.fingerprint()
    db.migrate(STEM, STEM)
    assert db.fingerprint() == before


def test_rows_written_meanwhile_are_kept_too(db: Db) -> None:
    """An empty table that fills between two runs, half of it through the old column's name."""
    db.execute(with_uuid() + "DELETE FROM prompt_snapshots;" + snapshot_rows(UUIDS))
    before = held(db, "turn_id")
    db.migrate(STEM)
    db.execute("INSERT INTO prompt_snapshots (tp, linearized_prompt_text, turn_id) VALUES ('{}', 'new', 1)")
    db.migrate(STEM)
    assert [row for row in held(db, "turn_id_uuid") if row in before] == before
    assert db.value("SELECT count(*) FROM prompt_snapshots WHERE turn_id = 1") == 1
