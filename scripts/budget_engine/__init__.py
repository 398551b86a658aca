"""Brings a PostgreSQL database to the Budget Engine & Telemetry schema, verifies it, and says what is missing."""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from invoke.collection import Collection

__version__ = "2.0.0"

PACKAGE = Path(__file__).parent


def collection(name: str, file: str) -> Collection:
    """Return the recipes as a collection for an application's tasks.py.

    name: what the application calls it (`invoke NAME.setup`); file: that tasks.py, in whose folder .env and the
    embedded server's data lie.
    """
    from budget_engine.output.console import CONSOLE

    CONSOLE.home, CONSOLE.prefix = Path(file).resolve().parent, f"{name}."
    made: Collection = menu().recipes(name)
    return made


def menu() -> ModuleType:
    """Return the module of the tasks: the wheel's, or tasks.py of the checkout that this package lies in."""
    if (PACKAGE / "tasks.py").exists():
        return import_module("budget_engine.tasks")
    loader = SourceFileLoader("budget_engine.tasks", str(PACKAGE.parents[1] / "tasks.py"))
    module = ModuleType(loader.name)
    module.__file__, module.__package__ = loader.path, __name__
    loader.exec_module(module)
    return module
