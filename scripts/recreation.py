"""The core schema made anew (prereqs --recreate): what would move, and what the plan is made of then. No connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scripts.chain import RECREATE, Step
from scripts.survey import Item, Survey

_PLACES = (" place", " dependant")  # items that say where a table is, and where it would go


@dataclass(frozen=True)
class Move:
    """A table that would move, by its name, and the schema to which it would."""

    table: str
    where: str


def moves(items: Sequence[Item]) -> tuple[Move, ...]:
    """Return what would move; nothing where the core schema need not be made anew."""
    return tuple(
        Move(item.name.rpartition(" ")[0], item.expected.removeprefix("schema "))
        for item in items
        if item.mended_by == RECREATE and item.name.endswith(_PLACES)
    )


def foreseen(found: Survey) -> Survey:
    """Return what the plan is made of: what moves is made anew, so that nothing else about it matters."""
    gone = {move.table for move in moves(found.items)}
    return replace(
        found, items=tuple(item for item in found.items if item.mended_by == RECREATE or item.table not in gone)
    )


def wanted(steps: Sequence[Step], found: Survey) -> list[Step]:
    """Return the prerequisites, and the steps that complete what moves and is made anew."""
    gone = {move.table for move in moves(found.items)}
    return [step for step in steps if step.task == "prereqs" or step.label in gone]
