"""The tasks one by one: each does its own step, and together they are what setup makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from budget_engine.migration import chain
from budget_engine.postgres import embedded
from conftest import Db, database
from states import ANOTHER_FEATURE, CORE, CORE_ROWS, by_hand, with_uuid

NO_TURNS = CORE[: CORE.index("CREATE TABLE IF NOT EXISTS turns")]


def do(db: Db, *tasks: str) -> None:
    for task in tasks:
        done = db.invoke(task)
        assert done.code == 0, done


@pytest.fixture(scope="module")
def by_setup(cluster: embedded.Cluster) -> Iterator[str]:
    """The schema that `invoke setup` makes of an empty database."""
    with database(cluster) as db:
        do(db, "setup")
        yield db.dump()


@pytest.mark.parametrize("task", ["slots-flags", "slots_flags", "budget-report", "turn-metrics"])
@pytest.mark.parametrize("state", ["", NO_TURNS], ids=["empty", "no turns"])
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
    do(db, "prereqs", "fix", flags, "budget-report", "turn-metrics")
    assert db.dump() == by_setup


def test_the_tasks_in_order_on_an_old_database(db: Db) -> None:
    db.execute(with_uuid())
    do(db, "prereqs", "fix", "slots-flags", "budget-report", "turn-metrics")
    assert db.differing() == {}


@pytest.mark.parametrize("task", ["slots-flags", "budget-report", "turn-metrics", "fix"])
def test_a_task_does_its_own_step_and_no_other(db: Db, task: str) -> None:
    [step] = [step.label for step in chain.load().steps if step.task == task]
    db.execute(with_uuid())
    before = [check for check in db.checks() if check.step != step]
    do(db, task)
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
    if not state:
        assert all(step.label in done.out for step in chain.load().steps if step.task != "fix")
