"""The tasks: what a word on the command line does. Each module is loaded by its first use, as commands.NAME."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budget_engine.commands import doctor, fleet, inspect, server, setup

__all__ = ["doctor", "fleet", "inspect", "server", "setup"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(name)
