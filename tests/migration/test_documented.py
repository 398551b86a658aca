"""What of a core table that existed is only documented: told, whatever it is, and no reason to stop."""

from __future__ import annotations

import json

import pytest
from conftest import Db
from states import CORE, CORE_ROWS, by_hand, contents, lost

# What the application's own head has made of its tables.
HEAD = """
ALTER TABLE turns RENAME idx TO turn_number;
ALTER TABLE entry_points DROP ruleset_id;
ALTER TABLE games DROP CONSTRAINT games_world_id_fkey, ALTER world_id TYPE uuid USING NULL;
"""
TOLD = {"turns.idx": None, "entry_points.ruleset_id": None, "games.world_id": "uuid NOT NULL"}
TOLD_OF_THEIRS = {  # what hangs on these columns, by its title
    "key turns (game_id, idx)",
    "foreign key entry_points (ruleset_id)",
    "foreign key games (world_id)",
    "index idx_entry_points_ruleset",
}
HEAD_WITHOUT_ROWS = CORE + HEAD
# With rows, whose world_id is known to nobody else.
HEAD_WITH_ROWS = by_hand() + HEAD.replace("USING NULL", "USING gen_random_uuid()")
STATES = pytest.mark.parametrize("state", [HEAD_WITHOUT_ROWS, HEAD_WITH_ROWS], ids=["core alone", "by hand, with rows"])

COLUMNS = """
SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute
WHERE attrelid IN ('worlds'::regclass, 'rulesets'::regclass, 'entry_points'::regclass, 'prompt_segments'::regclass,
                   'games'::regclass, 'turns'::regclass) AND attnum > 0 AND NOT attisdropped ORDER BY 1, attnum"""


@STATES
def test_setup_does_its_work_beside_it_and_changes_nothing_of_it(db: Db, state: str) -> None:
    db.execute(state)
    rows, columns = contents(db), db.rows(COLUMNS)
    done = db.invoke("setup")
    assert done.code == 0, done
    assert db.differing() == {}
    assert db.rows(COLUMNS) == columns
    assert lost(rows, contents(db), {}) == []
    told = {check.title: check.actual for check in db.checks() if not check.passed and not check.required}
    assert TOLD.items() <= told.items()
    assert set(told) >= TOLD_OF_THEIRS
    before = db.dump(data=True)
    again = db.invoke("setup")
    assert again.code == 0, again
    assert "nothing to do" in again.out
    assert db.dump(data=True) == before


@STATES
@pytest.mark.parametrize("migrated", [False, True])
def test_verify_and_status_tell_it(db: Db, state: str, migrated: bool) -> None:
    db.execute(state)
    if migrated:
        assert db.invoke("setup").code == 0
    for task in ("verify", "status"):
        done = db.invoke(task)
        assert done.code == (0 if migrated or task == "status" else 5), done
        for title in TOLD:
            assert title in done.out, done
        assert "conflict" not in done.out + done.err, done
    assert db.invoke("status", "--check").code == (0 if migrated else 5)


def test_json_tells_it_too(db: Db) -> None:
    db.execute(HEAD_WITHOUT_ROWS)
    assert db.invoke("setup").code == 0
    document = json.loads(db.invoke("verify", "--format", "json").out)
    checks = [check for step in document["steps"] for check in step["checks"] if not check["passed"]]
    assert document["exit_code"] == 0
    assert {check["title"]: check["actual"] for check in checks if check["kind"] == "column"} == TOLD
    assert not any(check["required"] or check["conflict"] for check in checks)


@pytest.mark.parametrize("task", ["plan", "rehearse", "prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"])
def test_no_task_minds(db: Db, task: str) -> None:
    db.execute(HEAD_WITH_ROWS)
    done = db.invoke(task)
    assert done.code == 0, done


def test_recreate_moves_nothing_for_its_sake(db: Db) -> None:
    db.execute(HEAD_WITH_ROWS)
    columns = db.rows(COLUMNS)
    done = db.invoke("prereqs", "--recreate")
    assert done.code == 0, done
    assert db.rows(COLUMNS) == columns
    assert db.rows("SELECT FROM pg_namespace WHERE nspname ~ 'archive'") == []


def test_its_documented_indexes_are_added_where_their_columns_exist(db: Db) -> None:
    db.execute(HEAD_WITHOUT_ROWS)
    assert db.invoke("setup").code == 0
    missing = {check.name for check in db.checks() if check.kind.value == "index" and not check.passed}
    assert missing == {"idx_entry_points_ruleset"}


@pytest.mark.parametrize(
    ("change", "required"),
    [
        ("ALTER TABLE games DROP CONSTRAINT games_pkey CASCADE", "key games (id)"),
        ("ALTER TABLE turns ALTER id TYPE int", "turns.id"),
        ("DROP TABLE games CASCADE; ALTER TABLE worlds DROP CONSTRAINT worlds_pkey CASCADE", "key worlds (id)"),
    ],
)
def test_what_the_chain_needs_is_required_all_the_same(db: Db, change: str, required: str) -> None:
    db.execute(CORE + CORE_ROWS + HEAD.replace("USING NULL", "USING gen_random_uuid()") + change)
    before = db.dump(data=True)
    done = db.invoke("setup")
    assert done.code == 6, done
    assert required in done.out + done.err
    for title in TOLD:
        assert title not in done.err
    assert db.dump(data=True) == before


def test_what_led_nowhere_new_is_not_required(db: Db) -> None:
    """worlds without a key: nothing that is still to be created leads there."""
    db.execute(CORE + "ALTER TABLE worlds DROP CONSTRAINT worlds_pkey CASCADE")
    done = db.invoke("setup")
    assert done.code == 0, done
    assert "key worlds (id)" in db.invoke("verify").out
