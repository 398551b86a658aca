"""Invoke, as scripts/inv becomes it: what the command line says counts, and no setting meant for other projects.

A user's or a machine's settings of Invoke (~/.invoke.yaml, /etc/invoke.json, INVOKE_TASKS_…: names without hyphens,
another collection, a file that cannot be parsed) would end every task before tasks.py is read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import unwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import budget_engine.output.console  # noqa: E402, F401 - Invoke prints its version and help before it has loaded tasks.py


def distrust(lost: ImportError) -> None:
    """Have the next run of scripts/inv make the environment anew: somebody has deleted some of it."""
    try:
        (Path(sys.prefix) / ".inv-stamp").unlink(missing_ok=True)
    except OSError:
        sys.exit(f"scripts/inv: files are missing in {sys.prefix} ({lost}), and it cannot be written.")


try:
    import invoke.main
    from invoke.config import Config
    from invoke.exceptions import Exit
    from invoke.program import Program
except ImportError as error:
    distrust(error)
    command = [sys.executable, str(ROOT / "scripts/inv"), *sys.argv[1:]]
    if os.name == "nt":
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)  # noqa: S606 - there is no shell to want


class Settings(Config):
    """Invoke's settings, from files and variables that bear this project's name instead of Invoke's, and --config."""

    prefix = "budget_engine_recipes"

    def load_runtime(self, merge: bool = True) -> None:
        """Load the file that --config names; merged at once, so that whatever is wrong with it ends here."""
        try:
            super().load_runtime(merge=merge)
            self.merge()
        except Exception as error:
            raise Exit(f"scripts/inv: the file of --config cannot be used: {error}", code=1) from None


class Menu(Program):
    """Invoke with a menu in the order of tasks.py, which is that of the work, and with this project's version."""

    def list_flat(self) -> None:
        """Print the tasks, those for developers last."""
        pairs = self._make_pairs(self.scoped_collection)
        self.display_with_columns(pairs if self.list_depth else sorted(pairs, key=self._line))

    def _line(self, pair: tuple[str, str | None]) -> int:
        """Return the line of tasks.py on which a task of the menu begins."""
        name = pair[0].split()[0].strip(".")
        return int(unwrap(self.scoped_collection[name].body).__code__.co_firstlineno)

    def print_version(self) -> None:
        """Print ours, and Invoke's."""
        from budget_engine.migration.chain import version
        from budget_engine.output.ending import reported

        with reported():
            print(f"Budget Engine recipes {version()} (Invoke {self.version})")


ours = invoke.main.program  # tasks.py asks it for the menu
ours.__class__ = Menu
ours.config_class = Settings
try:
    ours.run(["invoke", "--search-root", str(ROOT), *sys.argv[1:]])
except SystemExit as end:
    lost = end.__cause__  # of a task that has said so
    if isinstance(lost, ImportError) and not (lost.name or "").startswith("budget_engine"):
        distrust(lost)
    raise
