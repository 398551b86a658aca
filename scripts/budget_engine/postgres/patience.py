"""Patience: how long to go on trying while others hold what is needed, and how long to pause before the next try."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from budget_engine.errors import RecipeError

LONGEST_PAUSE_S = 5.0  # whoever holds it may be gone by then


class Patience:
    """What is left of LOCK_WAIT. It begins anew with all that gets done.

    limit_s: how long to go on trying, in seconds; clock, sleep: a test's own.
    """

    def __init__(
        self, limit_s: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._limit_s, self._clock, self._sleep = limit_s, clock, sleep
        self.restart()

    def restart(self) -> None:
        """Begin anew: something got done."""
        self._since, self.tries = self._clock(), 0

    def pause(self, why: RecipeError, first_s: float, announce: Callable[[float, float], None]) -> None:
        """Tell announce how long the pause will be and what is left, and pause; raise `why` where nothing is left.

        The pauses double from first_s on, each shortened by chance, so that many who wait fall out of step.
        """
        spent_s = self._clock() - self._since
        left_s = self._limit_s - spent_s
        if left_s <= 0:
            if self.tries:
                why.where = f"{why.where}\ntried {self.tries + 1} times in {spent_s:.0f} s".strip()
            raise why
        longest_s = min(first_s * 2**self.tries, LONGEST_PAUSE_S)
        pause_s = min(random.uniform(longest_s / 2, longest_s), left_s)  # noqa: S311 - nothing secret
        self.tries += 1
        announce(pause_s, left_s)
        self._sleep(pause_s)
