"""The tasks one by one: each does its own step, and together they are what setup makes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest
from conftest import Db
from states import (
    ANOTHER_FEATURE,
    CORE,
    CORE_ROWS,
    by_hand,
    with_uuid,
)

from budget_engine.postgres import embedded

CORE_SCHEMA = "20250130000000_core_schema"
SLOTS = "20250214_slots_templates"
SNAPSHOTS = "20250213_prompt_snapshots"
FIX = "20250222_fix_prompt_snapshots_turn_id"
FLAGS = "20250220_slots_flags"
REPORT = "20250221_budget_report"
METRICS = "20250222_turn_metrics"

DOCUMENTED = (CORE_SCHEMA, SLOTS, SNAPSHOTS, FIX, FLAGS, REPORT, METRICS)


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
