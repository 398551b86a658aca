"""The tasks one by one: each does its own step, and together they are what setup makes."""

from __future__ import annotations

import pytest
from budget_engine.migration import chain
from conftest import Db
from states import ANOTHER_FEATURE, CORE, by_hand, with_uuid

TASKS = ["prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"]
NO_TURNS = CORE[: CORE.index("CREATE TABLE IF NOT EXISTS turns")]


def do(db: Db, task: str) -> None:
    done = db.invoke(task)
    assert done.code == 0, done


@pytest.mark.parametrize("state", ["", NO_TURNS], ids=["empty", "no turns"])
def test_tasks_without_prerequisites(db: Db, state: str) -> None:
    db.execute(state)
    before = db.dump()
    for task in ("slots-flags", "budget-report", "turn-metrics"):
        refused = db.invoke(task)
        assert refused.code == 1, refused
        assert "does not exist" in refused.err
        assert "invoke prereqs" in refused.err
    assert db.dump() == before


def test_the_tasks_in_order_are_what_setup_makes(db: Db, finished: Db) -> None:
    for task in TASKS:
        do(db, task.replace("-", "_"))
    assert db.dump() == finished.dump()


@pytest.mark.parametrize("tasks", [TASKS, TASKS[::-1]], ids=["in order", "the last one first"])
def test_each_task_does_its_own_steps_and_no_other_on_an_old_database(db: Db, tasks: list[str]) -> None:
    db.execute(with_uuid())
    after = db.checks()
    for task in tasks:
        own, before = {step.label for step in chain.load().steps if step.task == task}, after
        do(db, task)
        after = db.checks()
        assert [check for check in after if check.step in own and check.required and not check.passed] == []
        assert [check for check in after if check.step not in own] == [c for c in before if c.step not in own], task
    assert db.differing() == {}


DRY = {
    # name: (state, exit code)
    "empty": ("", 0),
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
