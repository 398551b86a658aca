"""The files by hand: each alone with psql, the chain in both orders, and the tasks one by one."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from budget_engine.postgres import embedded
from conftest import MIGRATIONS, Db, Run
from states import (
    ANOTHER_FEATURE,
    BIGINT,
    CORE,
    CORE_ROWS,
    CORE_WITH_UUID_TURNS,
    HANGING,
    by_hand,
    snapshots,
    with_uuid,
)

CORE_SCHEMA = "20250130000000_core_schema"
SLOTS = "20250214_slots_templates"
SNAPSHOTS = "20250213_prompt_snapshots"
FIX = "20250222_fix_prompt_snapshots_turn_id"
FLAGS = "20250220_slots_flags"
REPORT = "20250221_budget_report"
METRICS = "20250222_turn_metrics"

DOCUMENTED = (CORE_SCHEMA, SLOTS, SNAPSHOTS, FIX, FLAGS, REPORT, METRICS)
SNAPSHOTS_FIRST = (CORE_SCHEMA, SNAPSHOTS, SLOTS, FIX, FLAGS, REPORT, METRICS)
METRICS_FIRST = (CORE_SCHEMA, METRICS, SLOTS, FLAGS, SNAPSHOTS, REPORT, FIX)


@pytest.fixture(scope="module")
def by_setup(cluster: embedded.Cluster) -> Iterator[str]:
    """The schema that `invoke setup` makes of an empty database."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        db = Db(cluster, name)
        done = db.invoke("setup")
        assert done.code == 0, done
        yield db.dump()
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def psql_file(db: Db, stem: str) -> Run:
    """Run a migration with psql, its errors with their SQLSTATE."""
    return db.psql("-v", "VERBOSITY=verbose", "-f", str(MIGRATIONS / f"{stem}.sql"))


@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize(
    "order", [DOCUMENTED, SNAPSHOTS_FIRST, METRICS_FIRST], ids=["documented", "snapshots first", "metrics first"]
)
def test_the_chain_with_psql_is_what_setup_makes(db: Db, by_setup: str, order: tuple[str, ...], times: int) -> None:
    for _ in range(times):
        db.migrate(*order)
    assert db.differing() == {}
    assert db.dump() == by_setup


def test_each_file_five_times_in_a_row(db: Db, by_setup: str) -> None:
    for stem in DOCUMENTED:
        db.migrate(*[stem] * 5)
    assert db.dump() == by_setup


@pytest.mark.parametrize("stem", DOCUMENTED)
@pytest.mark.parametrize("state", [by_hand(), with_uuid()], ids=["bigint", "uuid"])
def test_a_file_alone_keeps_its_promises(db: Db, state: str, stem: str) -> None:
    db.execute(state)
    done = psql_file(db, stem)
    assert done.code == 0, done
    assert [item for item in db.verification(stem) if item[1] != item[2]] == []
    after = db.dump(data=True)
    again = psql_file(db, stem)
    assert (again.code, again.out) == (0, "")
    assert db.dump(data=True) == after


@pytest.mark.parametrize("stem", DOCUMENTED)
def test_the_chain_with_psql_on_an_old_database(db: Db, stem: str) -> None:
    """Whichever file is run first."""
    db.execute(with_uuid())
    db.migrate(stem, *DOCUMENTED)
    assert db.differing() == {}


SNAPSHOTS_ALONE = snapshots("uuid").replace("REFERENCES games (id) ON DELETE SET NULL", "")

WITHOUT_PREREQUISITES = {
    # name: (state, stem, table that is missing, stem to run first)
    "prompt_snapshots": ("", SNAPSHOTS, "games", CORE_SCHEMA),
    "prompt_snapshots without turns": (CORE + "DROP TABLE turns", SNAPSHOTS, "turns", CORE_SCHEMA),
    "fix": ("", FIX, "prompt_snapshots", CORE_SCHEMA),
    "fix without prompt_snapshots": (CORE, FIX, "prompt_snapshots", SNAPSHOTS),
    "fix without turns": (SNAPSHOTS_ALONE, FIX, "turns", CORE_SCHEMA),
    "slots_flags": ("", FLAGS, "slots", SLOTS),
    "budget_report": ("", REPORT, "prompt_snapshots", SNAPSHOTS),
    "turn_metrics": ("", METRICS, "turns", CORE_SCHEMA),
}


@pytest.mark.parametrize(("state", "stem", "table", "first"), WITHOUT_PREREQUISITES.values(), ids=WITHOUT_PREREQUISITES)
def test_psql_without_prerequisites(db: Db, state: str, stem: str, table: str, first: str) -> None:
    db.execute(state)
    before = db.dump()
    done = psql_file(db, stem)
    assert done.code == 3, done
    assert re.search(rf"ERROR:  TB001: .*\b{table}\b.*does not exist", done.err), done
    assert re.search(rf"HINT:  .*db/migrations/{first}\.sql.*\(invoke prereqs\)", done.err), done
    assert db.dump() == before


OBSTRUCTED = {
    # name: (state, stem, task, what stands)
    "core_schema": (CORE_WITH_UUID_TURNS, CORE_SCHEMA, "prereqs", "turns.id is uuid NOT NULL"),
    "slots_templates": (CORE + "CREATE TABLE slots (a int)", SLOTS, "prereqs", "slots.type is missing"),
    "slots_templates, parent_id": (
        CORE + snapshots(BIGINT) + "ALTER TABLE prompt_snapshots ADD parent_id int",
        SLOTS,
        "prereqs",
        "prompt_snapshots.parent_id is integer",
    ),
    "prompt_snapshots": (CORE + ANOTHER_FEATURE, SNAPSHOTS, "prereqs", "prompt_snapshots.snapshot_id is missing"),
    "prompt_snapshots, turns.id": (CORE_WITH_UUID_TURNS, SNAPSHOTS, "prereqs", "turns.id is uuid"),
    "fix, text": (by_hand("text"), FIX, "fix", "prompt_snapshots.turn_id is text"),
    "fix, a view": (with_uuid() + HANGING["view turn_view"], FIX, "fix", "view turn_view"),
    "fix, another foreign key": (by_hand("bigint REFERENCES turns (id)"), FIX, "fix", "REFERENCES turns(id)"),
    "fix, turns.id": (
        CORE_WITH_UUID_TURNS + snapshots("uuid"),
        FIX,
        "fix",
        "turns.id is uuid",
    ),
    "slots_flags": (
        by_hand() + "ALTER TABLE slots ADD must_keep text",
        FLAGS,
        "slots-flags",
        "slots.must_keep is text",
    ),
    "slots_flags, min_chars": (
        by_hand() + "ALTER TABLE slots ADD min_chars bigint",
        FLAGS,
        "slots-flags",
        "slots.min_chars is bigint",
    ),
    "budget_report": (
        by_hand() + "ALTER TABLE prompt_snapshots ADD budget_report json",
        REPORT,
        "budget-report",
        "prompt_snapshots.budget_report is json",
    ),
    "turn_metrics": (
        by_hand() + "CREATE TABLE turn_metrics (turn_id bigint PRIMARY KEY, story_id text NOT NULL)",
        METRICS,
        "turn-metrics",
        "turn_metrics.story_id is text NOT NULL",
    ),
    "turn_metrics, turns.id": (CORE_WITH_UUID_TURNS, METRICS, "turn-metrics", "turns.id is uuid"),
}


@pytest.mark.parametrize(("state", "stem", "task", "stands"), OBSTRUCTED.values(), ids=OBSTRUCTED)
def test_psql_with_something_in_the_way(db: Db, state: str, stem: str, task: str, stands: str) -> None:
    db.execute(state)
    before = db.dump(data=True)
    done = psql_file(db, stem)
    assert done.code == 3, done
    assert "ERROR:  TB002: " in done.err
    assert stands in done.err
    assert re.search(rf"HINT:  .*db/migrations/(20250130000000_core_schema|{stem})\.sql \(invoke {task}\)", done.err), (
        done
    )
    assert db.dump(data=True) == before


WITHOUT_TURNS = CORE[: CORE.index("CREATE TABLE IF NOT EXISTS turns")]


@pytest.mark.parametrize("task", ["slots-flags", "slots_flags", "budget-report", "turn-metrics"])
@pytest.mark.parametrize(
    "state", ["", CORE[: CORE.index("CREATE TABLE IF NOT EXISTS turns")]], ids=["empty", "no turns"]
)
def test_a_task_without_prerequisites(db: Db, state: str, task: str) -> None:
    db.execute(state)
    before = db.dump()
    done = db.invoke(task)
    assert done.code == 1, done
    assert "does not exist" in done.err
    assert "invoke prereqs" in done.err
    assert db.dump() == before


@pytest.mark.parametrize("flags", ["slots-flags", "slots_flags"])
def test_the_tasks_in_order_are_what_setup_makes(db: Db, by_setup: str, flags: str) -> None:
    for task in ("prereqs", "fix", flags, "budget-report", "turn-metrics"):
        done = db.invoke(task)
        assert done.code == 0, done
    assert db.dump() == by_setup


def test_the_tasks_in_order_on_an_old_database(db: Db) -> None:
    db.execute(with_uuid())
    for task in ("prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"):
        done = db.invoke(task)
        assert done.code == 0, done
    assert db.differing() == {}


TASKS_OF = {"slots-flags": FLAGS, "budget-report": REPORT, "turn-metrics": METRICS, "fix": FIX}


@pytest.mark.parametrize(("task", "stem"), TASKS_OF.items(), ids=TASKS_OF)
def test_a_task_does_its_own_step_and_no_other(db: Db, task: str, stem: str) -> None:
    db.execute(with_uuid())
    others = {other: db.verification(other) for other in DOCUMENTED if other != stem}
    done = db.invoke(task)
    assert done.code == 0, done
    assert [item for item in db.verification(stem) if item[1] != item[2]] == []
    assert {other: db.verification(other) for other in others} == others


DRY = {
    # name: (state, exit code)
    "empty": ("", 0),
    "core": (CORE + CORE_ROWS, 0),
    "by hand": (by_hand(), 0),
    "uuid": (with_uuid(), 0),
    "in the way": (CORE + ANOTHER_FEATURE, 6),
}


@pytest.mark.parametrize(("state", "code"), DRY.values(), ids=DRY)
def test_dry_setup_changes_nothing(db: Db, state: str, code: int) -> None:
    db.execute(state)
    before = db.dump(data=True)
    done = db.invoke("--dry", "setup")
    assert done.code == code, done
    assert db.dump(data=True) == before
    assert db.rows("SELECT FROM pg_namespace WHERE nspname = 'budget_engine'") == []
