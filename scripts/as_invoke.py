"""Invoke, as scripts/inv becomes it: what the command line says counts, and no setting meant for other projects.

A user's or a machine's settings of Invoke (~/.invoke.yaml, /etc/invoke.json, INVOKE_TASKS_…: names without hyphens,
another collection, a file that cannot be parsed) would end every task before tasks.py is read.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from budget_engine.output.console import reported  # noqa: E402 - and the console, before Invoke prints anything


def _distrust(lost: ImportError) -> None:
    """Have the next run of scripts/inv make the environment anew: somebody has deleted some of it."""
    try:
        (Path(sys.prefix) / ".inv-stamp").unlink(missing_ok=True)
    except OSError:
        sys.exit(f"scripts/inv: files are missing in {sys.prefix} ({lost}), and it cannot be written.")


try:
    from budget_engine.__main__ import Menu, Settings
    from invoke.main import program
except ImportError as error:
    _distrust(error)
    sys.exit(subprocess.call([sys.executable, str(ROOT / "scripts/inv"), *sys.argv[1:]]))


class _Menu(Menu):
    """With this project's version, and Invoke's."""

    def print_version(self) -> None:
        with reported():
            from budget_engine import __version__

            print(f"Budget Engine recipes {__version__} (Invoke {self.version})")


program.__class__ = _Menu  # tasks.py asks this very program for its menu
program.config_class = Settings
try:
    program.run(["invoke", "--search-root", str(ROOT), *sys.argv[1:]])
except SystemExit as end:
    lost = end.__cause__  # of a task that has said so
    if isinstance(lost, ImportError) and not (lost.name or "").startswith("budget_engine"):
        _distrust(lost)
    raise
except Exception as error:  # of Invoke itself: tasks end by themselves
    sys.exit(f"scripts/inv: Invoke cannot go on: {error}")
