"""What of a core table that existed is only documented: told, whatever it is, and no reason to stop."""

from __future__ import annotations

import json

import pytest
from conftest import Db
from states import CORE, CORE_ROWS, HEAD, by_hand, contents, lost

TOLD = {"turns.idx": None, "entry_points.ruleset_id": None, "games.world_id": "uuid NOT NULL"}
TOLD_OF_THEIRS = {  # what hangs on these columns, by its title
    "key turns (game_id, idx)",
    "foreign key entry_points (ruleset_id)",
    "foreign key games (world_id)",
    "index idx_entry_points_ruleset",
}
# Nothing that is still to be created leads there.
WITHOUT_KEY = "ALTER TABLE worlds DROP CONSTRAINT worlds_pkey CASCADE"

COLUMNS = """
SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute
WHERE attrelid IN ('worlds'::regclass, 'rulesets'::regclass, 'entry_points'::regclass, 'prompt_segments'::regclass,
                   'games'::regclass, 'turns'::regclass) AND attnum > 0 AND NOT attisdropped ORDER BY 1, attnum"""


def assert_told(db: Db, code: int) -> None:
    """Verify and status tell it, and no conflict; how verify ends."""
    for words, ends in {"verify": code, "status": 0, "status --check": code}.items():
        done = db.call(*words.split())
        assert done.code == ends, done
        assert [title for title in TOLD if title not in done.out] == [], done
        assert "conflict" not in done.out + done.err, done


@pytest.mark.parametrize(
    ("state", "tasks"),
    [
        (CORE + HEAD + WITHOUT_KEY, ["setup"]),
        (by_hand() + HEAD, ["prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"]),
    ],
    ids=["core alone", "by hand, with rows"],
)
def test_tasks_do_their_work_beside_it_and_change_nothing_of_it(db: Db, state: str, tasks: list[str]) -> None:
    db.execute(state)
    rows, columns = contents(db), db.rows(COLUMNS)
    assert_told(db, 5)
    for task in ("plan", "rehearse", *tasks):
        done = db.call(task)
        assert done.code == 0, (task, done)
    assert db.differing() == {}
    assert db.rows(COLUMNS) == columns
    assert lost(rows, contents(db), {}) == []
    before = db.fingerprint()
    again = db.call("setup")
    assert (again.code, "nothing to do" in again.out, db.fingerprint()) == (0, True, before), again
    assert_told(db, 0)
    document = json.loads(db.call("verify", "--format", "json").out)
    told = [check for step in document["steps"] for check in step["checks"] if not check["passed"]]
    assert document["exit_code"] == 0
    assert not any(check["required"] or check["conflict"] for check in told)
    assert {check["title"]: check["actual"] for check in told if check["kind"] == "column"} == TOLD
    assert {check["title"] for check in told} >= TOLD_OF_THEIRS | (
        {"key worlds (id)"} if WITHOUT_KEY in state else set()
    )
    # Its documented indexes are added where their columns exist.
    assert [check["title"] for check in told if check["kind"] == "index"] == ["index idx_entry_points_ruleset"]


@pytest.mark.parametrize(
    ("change", "required"),
    [
        ("ALTER TABLE games DROP CONSTRAINT games_pkey CASCADE", "key games (id)"),
        ("ALTER TABLE turns ALTER id TYPE int", "turns.id"),
        (f"DROP TABLE games CASCADE; {WITHOUT_KEY}", "key worlds (id)"),
    ],
)
def test_what_the_chain_needs_is_required_all_the_same(db: Db, change: str, required: str) -> None:
    db.execute(CORE + CORE_ROWS + HEAD + change)
    before = db.fingerprint()
    done = db.call("setup")
    assert done.code == 6, done
    assert required in done.out + done.err
    assert [title for title in TOLD if title in done.err] == [], done
    assert db.fingerprint() == before
