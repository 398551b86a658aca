"""The command budget-engine: the tasks, where they are installed as a package; its home is the current folder."""

from __future__ import annotations

from pathlib import Path

from invoke.program import Program

from budget_engine import __version__, menu
from budget_engine.output.console import CONSOLE


def main() -> None:
    """Run the task that the command line names."""
    CONSOLE.home, CONSOLE.command = Path.cwd(), "budget-engine"
    Program(
        version=__version__, namespace=menu().recipes(None), name="Budget Engine recipes", binary="budget-engine"
    ).run()


if __name__ == "__main__":
    main()
