"""The command budget-engine: the tasks, where they are installed as a package; its home is the current folder."""

from __future__ import annotations

import sys
from inspect import unwrap
from pathlib import Path

from invoke.config import Config
from invoke.program import Program

from budget_engine import __version__, menu
from budget_engine.output.console import CONSOLE


class Settings(Config):
    """Invoke's settings, from files and variables that have this project's name instead of Invoke's, and --config."""

    prefix = "budget_engine_recipes"


class Menu(Program):
    """Invoke with a menu in the order of tasks.py, which is that of the work."""

    def list_flat(self) -> None:
        """Print the tasks, or, with a depth, as Invoke does."""
        pairs = self._make_pairs(self.scoped_collection)
        self.display_with_columns(pairs if self.list_depth else sorted(pairs, key=self._line))

    def _line(self, pair: tuple[str, str | None]) -> tuple[bool, int]:
        """Return the line on which a task of the menu begins; those of tasks.py come first."""
        code = unwrap(self.scoped_collection[pair[0].split()[0].strip(".")].body).__code__
        return not code.co_filename.endswith("tasks.py"), code.co_firstlineno


def main() -> None:
    """Run the task that the command line names."""
    CONSOLE.home, CONSOLE.command = Path.cwd(), "budget-engine"
    name, tasks = "Budget Engine recipes", menu().recipes(None)
    try:
        Menu(__version__, namespace=tasks, name=name, binary=CONSOLE.command, config_class=Settings).run()
    except Exception as error:  # of Invoke itself: tasks end by themselves
        sys.exit(f"budget-engine: Invoke cannot go on: {error}")


if __name__ == "__main__":
    main()
