"""How long to go on trying: properties of postgres/patience.py, with a clock that only its own sleep moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from budget_engine.errors import LOCK_TIMEOUT, LockTimeoutError
from budget_engine.postgres.patience import Patience
from hypothesis import given
from hypothesis import strategies as st

LIMITS = st.floats(0.01, 600)
FIRSTS = st.floats(0.01, 5)
TRIES_S = st.lists(st.floats(0, 10), min_size=1, max_size=50)  # what each try itself takes
WHY = LOCK_TIMEOUT(what="somebody holds the lock")


@dataclass
class Time:
    """A clock; what was slept, and what was announced."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)
    announced: list[tuple[float, float]] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)

    def patience(self, limit_s: float) -> Patience:
        return Patience(limit_s, clock=lambda: self.now, sleep=self.sleep)

    def pause(self, patience: Patience, first_s: float) -> None:
        patience.pause(WHY, first_s, lambda pause_s, left_s: self.announced.append((pause_s, left_s)))

    def try_until_given_up(self, patience: Patience, first_s: float, tries_s: list[float]) -> bool:
        """Tell whether it was given up before these tries were over."""
        for try_s in tries_s:
            self.now += try_s
            try:
                self.pause(patience, first_s)
            except LockTimeoutError:
                return True
        return False


@given(LIMITS, FIRSTS, TRIES_S)
def test_no_pause_goes_past_the_limit(limit_s: float, first_s: float, tries_s: list[float]) -> None:
    time = Time()
    began, patience = time.now, time.patience(limit_s)
    for try_s in tries_s:
        time.now += try_s
        spent_s = time.now - began
        if time.try_until_given_up(patience, first_s, [0]):
            assert spent_s >= limit_s - 1e-6
            return
        assert spent_s < limit_s
        assert time.now - began <= limit_s + 1e-6
    assert time.slept == [pause_s for pause_s, _ in time.announced]


@given(FIRSTS, st.integers(1, 30))
def test_pauses_double_up_to_the_longest_and_are_jittered(first_s: float, tries: int) -> None:
    time = Time()
    assert not time.try_until_given_up(time.patience(10**6), first_s, [0] * tries)
    for number, pause_s in enumerate(time.slept):
        longest_s = min(first_s * 2**number, 5)
        assert longest_s / 2 <= pause_s <= longest_s


def test_two_who_wait_fall_out_of_step() -> None:
    one, other = Time(), Time()
    for time in (one, other):
        time.try_until_given_up(time.patience(10**6), 1, [0] * 10)
    assert one.slept != other.slept


@given(LIMITS, FIRSTS, TRIES_S)
def test_it_begins_anew_when_something_got_done(limit_s: float, first_s: float, tries_s: list[float]) -> None:
    time = Time()
    patience = time.patience(limit_s)
    time.try_until_given_up(patience, first_s, tries_s)
    patience.restart()
    assert patience.tries == 0
    time.pause(patience, first_s)
    assert time.announced[-1][1] == pytest.approx(limit_s)
    assert time.slept[-1] <= first_s


def test_no_patience_at_all() -> None:
    time = Time()
    assert time.try_until_given_up(time.patience(0), 1, [0])
    assert (time.slept, time.announced) == ([], [])
