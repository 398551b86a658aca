"""The tasks one by one: each does its own step, and together they are what setup makes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest
from budget_engine.postgres import embedded
from conftest import Db
from states import (
    ANOTHER_FEATURE,
    CORE,
    CORE_ROWS,
    by_hand,
    with_uuid,
)


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


STEP_OF = {
    "slots-flags": "slots_flags",
    "budget-report": "budget_report",
    "turn-metrics": "turn_metrics",
    "fix": "fix_prompt_snapshots_turn_id",
}


@pytest.mark.parametrize(("task", "step"), STEP_OF.items(), ids=STEP_OF)
def test_a_task_does_its_own_step_and_no_other(db: Db, task: str, step: str) -> None:
    db.execute(with_uuid())
    before = [check for check in db.checks() if check.step != step]
    done = db.invoke(task)
    assert done.code == 0, done
    assert db.failing(step) == []
    assert [check for check in db.checks() if check.step != step] == before


DRY = {
    # name: (state, exit code)
    "empty": ("", 0),
    "core": (CORE + CORE_ROWS, 0),
    "by hand": (by_hand(), 0),
    "uuid": (with_uuid(), 0),
    "conflict": (CORE + ANOTHER_FEATURE, 6),
}


@pytest.mark.parametrize(("state", "code"), DRY.values(), ids=DRY)
def test_dry_setup_changes_nothing(db: Db, state: str, code: int) -> None:
    db.execute(state)
    before = db.dump(data=True)
    done = db.invoke("--dry", "setup")
    assert done.code == code, done
    assert db.dump(data=True) == before
    assert db.rows("SELECT FROM pg_namespace WHERE nspname = 'budget_engine'") == []
