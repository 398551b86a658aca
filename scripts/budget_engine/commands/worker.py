"""A worker of the fleet: reads targets from stdin, a JSON document a line, runs a task on each, writes how it ended.

Its arguments are the home of the run, and how messages name tasks. It reads {"url": DATABASE_URL, "task": "setup",
"verify", "status" or "plan"} and writes {"summary", "exit_code", "error"}; it ends where stdin does.
One process works for many databases, one after the other, so that Python and libpq are loaded once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from budget_engine import commands
from budget_engine.errors import RecipeError
from budget_engine.output import formats
from budget_engine.output.console import CONSOLE, PEOPLE, as_message, masked

TASKS: dict[str, Callable[[], None]] = {
    "setup": lambda: commands.setup.run(None),
    "verify": lambda: commands.inspect.verify(form=PEOPLE, quiet=False, verbose=False, remedies=False),
    "status": lambda: commands.inspect.status(form=PEOPLE, check=True, quiet=False, verbose=False),
    "plan": lambda: commands.inspect.what_setup_would_do(form=PEOPLE, sql=False, quiet=False, verbose=False),
}


def main() -> None:
    """Serve until stdin ends; what the tasks print is summed up, not passed on."""
    answers = sys.stdout
    if signal.SIGINT in signal.sigpending():  # it is blocked while Python starts: nobody waits for us any more
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the task that runs
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=[lines], daemon=True).start()
    while line := lines.get():
        asked = json.loads(line)
        os.environ["DATABASE_URL"] = asked["url"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            error = _run(TASKS[asked["task"]])
        ended = {"summary": _last(said.getvalue()), **formats.ended(error)}
        print(json.dumps(masked(ended, CONSOLE.mask)), file=answers, flush=True)


def _read(lines: queue.SimpleQueue[str]) -> None:
    """Hand on each line, and "" at the end; a task that still runs then has nobody to answer to, and is stopped."""
    for line in sys.stdin:
        lines.put(line)
    lines.put("")
    os.kill(os.getpid(), signal.SIGINT)


def _run(task: Callable[[], None]) -> RecipeError | None:
    """Run it as if nothing had run before; return what ended it."""
    CONSOLE.__init__()  # type: ignore[misc]  # no mask, no line, no target of the one before
    home, CONSOLE.command, CONSOLE.prefix = sys.argv[1:4]
    CONSOLE.home = Path(home)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        task()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return as_message(error)
    return None


def _last(said: str) -> str:
    """Return the last thing that the task said, without its label."""
    lines = [line for line in said.splitlines() if line and not line.startswith(" ")]
    return lines[-1].partition(" ")[2].strip() if lines else ""


if __name__ == "__main__":
    main()
