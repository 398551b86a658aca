"""Patience: how long to go on trying while others hold what is needed, and how long to pause before the next try."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from budget_engine.errors import RecipeError

LONGEST_PAUSE_S = 5.0  # whoever holds it may be gone by then


@dataclass
class Patience:
    """What is left of LOCK_WAIT. It begins anew with all that gets done.

    limit_s: how long to go on trying, in seconds; clock and sleep: time.monotonic and time.sleep, or a test's own.
    """

    limit_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    tries: int = 0
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew: something got done."""
        self._since, self.tries = self.clock(), 0

    def pause(self, why: RecipeError, first_s: float, announce: Callable[[float, float], None]) -> None:
        """Tell announce how long the pause will be and what is left, and pause; raise `why` where nothing is left.

        The pauses double from first_s on, each shortened by chance, so that many who wait fall out of step.
        """
        spent_s = self.clock() - self._since
        left_s = self.limit_s - spent_s
        if left_s <= 0:
            if self.tries:
                why.where = f"{why.where}\ntried {self.tries + 1} times in {spent_s:.0f} s".strip()
            raise why
        longest_s = min(first_s * 2**self.tries, LONGEST_PAUSE_S)
        pause_s = min(random.uniform(longest_s / 2, longest_s), left_s)  # noqa: S311 - nothing secret
        self.tries += 1
        announce(pause_s, left_s)
        self.sleep(pause_s)
