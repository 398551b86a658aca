"""Invoke, as scripts/inv becomes it: what the command line says counts, and no setting meant for other projects.

A user's or a machine's settings of Invoke (~/.invoke.yaml, /etc/invoke.json, INVOKE_TASKS_…: names without hyphens,
another collection, a file that cannot be parsed) would end every task before tasks.py is read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import budget_engine.output.console  # noqa: E402, F401 - Invoke prints its version and help before it has loaded tasks.py

del sys.path[0]


def distrust(lost: ImportError) -> None:
    """Have the next run of scripts/inv make the environment anew: somebody has deleted some of it."""
    try:
        (Path(sys.prefix) / ".inv-stamp").unlink(missing_ok=True)
    except OSError:
        sys.exit(f"scripts/inv: files are missing in {sys.prefix} ({lost}), and it cannot be written.")


try:
    from invoke.config import Config
    from invoke.exceptions import Exit
    from invoke.main import program
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


program.config_class = Settings
try:
    program.run(["invoke", "--search-root", str(ROOT), *sys.argv[1:]])
except SystemExit as end:
    lost = end.__cause__  # of a task that has said so
    if isinstance(lost, ImportError) and not (lost.name or "").startswith("budget_engine"):
        distrust(lost)
    raise
