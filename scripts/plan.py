"""The plan: what the survey's items say is to be done, computed without a connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from scripts.chain import Step
from scripts.survey import ONLINE, Item


class State(Enum):
    """How a step stands."""

    DONE = "done"
    PENDING = "pending"
    HALF_DONE = "half done"
    IN_THE_WAY = "in the way"
    NOT_NEEDED = "not needed"


@dataclass(frozen=True)
class StepPlan:
    """What one step has to do: its atomic part, its online part, and the items that are the reasons (of any step)."""

    stem: str
    state: State
    atomic: bool
    online: bool
    reasons: tuple[Item, ...]
    elsewhere: tuple[Item, ...]  # its items that another step mends


@dataclass(frozen=True)
class Plan:
    """What a task has to do, in the documented order."""

    steps: tuple[StepPlan, ...]

    @property
    def atomic(self) -> tuple[str, ...]:
        """Stems whose atomic part is to run."""
        return tuple(step.stem for step in self.steps if step.atomic)

    @property
    def online(self) -> tuple[str, ...]:
        """Stems whose online part is to run."""
        return tuple(step.stem for step in self.steps if step.online)

    @property
    def in_the_way(self) -> tuple[Item, ...]:
        """Items that no step mends."""
        return tuple(item for step in self.steps for item in step.reasons if item.in_the_way)

    @property
    def lacking(self) -> tuple[str, ...]:
        """Rights that the role lacks for what is to be done, each once."""
        rights = [item.lacking for step in self.steps for item in step.reasons if item.lacking]
        return tuple(dict.fromkeys("\n".join(rights).splitlines()))

    @property
    def mended_elsewhere(self) -> tuple[Item, ...]:
        """Items of this plan's steps that only a step outside of it mends."""
        inside = {step.stem for step in self.steps}
        return tuple(
            item
            for step in self.steps
            for item in step.elsewhere
            if (item.mended_by or "").removesuffix(ONLINE) not in inside
        )

    @property
    def missing(self) -> tuple[Item, ...]:
        """Every item that differs, each once."""
        return tuple(dict.fromkeys(item for step in self.steps for item in step.reasons))

    @property
    def to_do(self) -> bool:
        """Whether any step has anything to do."""
        return any(step.atomic or step.online for step in self.steps)


def of(steps: Sequence[Step], items: Sequence[Item]) -> Plan:
    """Plan these steps (in their order), given the items of the whole chain."""
    return make([step.stem for step in steps], items)


def items_of(steps: Sequence[Step], items: Sequence[Item]) -> list[Item]:
    """Return the items that these steps promise."""
    stems = {step.stem for step in steps}
    return [item for item in items if item.stem in stems]


def make(stems: Sequence[str], items: Sequence[Item]) -> Plan:
    """Plan the steps of these stems (in their order), given the items of the whole chain."""
    return Plan(tuple(_plan_step(stem, items) for stem in stems))


def _plan_step(stem: str, items: Sequence[Item]) -> StepPlan:
    differing = [item for item in items if not item.stands]
    atomic = [item for item in differing if item.mended_by == stem]
    online = [item for item in differing if item.mended_by == stem + ONLINE]
    obstacles = [item for item in differing if item.stem == stem and item.in_the_way]
    elsewhere = [item for item in differing if item.stem == stem and item not in [*obstacles, *atomic, *online]]
    if obstacles:
        state = State.IN_THE_WAY
    elif atomic or online:
        begun = any(item.stem == stem and item.stands and item.is_place for item in items)
        state = State.HALF_DONE if begun else State.PENDING
    else:
        state = State.NOT_NEEDED if elsewhere else State.DONE
    return StepPlan(stem, state, bool(atomic), bool(online), (*obstacles, *atomic, *online), tuple(elsewhere))
