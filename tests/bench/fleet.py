"""Many databases: one fleet, against a shell loop over setup, and against xargs with as many processes as the fleet."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from budget_engine.migration.chain import ROOT
from budget_engine.postgres import embedded
from conftest import Db, clean_environment, database, private_server

from bench.figures import Report
from bench.startup import CASES

_JOBS = min(2 * (os.cpu_count() or 1), 8)  # what the fleet takes by itself
_INVOKE = shlex.join([sys.executable, "-m", "invoke"])
# Each reads URLs, a line each, from stdin.
WAYS = {
    "`invoke fleet`": f"{_INVOKE} fleet --targets -",
    f"`xargs -P {_JOBS}`, `invoke setup`": f"xargs -P {_JOBS} -I% env DATABASE_URL=% {_INVOKE} setup",
    "shell loop, `invoke setup`": f'while read -r url; do DATABASE_URL="$url" {_INVOKE} setup </dev/null || exit; done',
}


def run(count: int, report: Report) -> None:
    """Run each way over so many databases, from nothing and with nothing to do; print the table."""
    rows = []
    with private_server(durable=True) as cluster:
        report.begin(cluster)
        for name, command in WAYS.items():
            with databases(cluster, count) as made:
                took = [_timed(command, made) for _ in CASES]
            rows.append([name, *(cell for s in took for cell in (f"{s:.1f} s", f"{1000 * s / count:.0f} ms"))])
    report.table([f"{count} databases", *(head for case in CASES for head in (case, "each"))], rows)


@contextmanager
def databases(cluster: embedded.Cluster, count: int) -> Iterator[list[Db]]:
    """Make so many empty databases."""
    with ExitStack() as stack:
        yield [stack.enter_context(database(cluster)) for _ in range(count)]


def _timed(command: str, databases: list[Db]) -> float:
    """Run it on these; return seconds."""
    urls = "".join(f"{db.url}\n" for db in databases)
    began = time.monotonic()
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=ROOT, env=clean_environment(), input=urls, capture_output=True, text=True
    )
    taken = time.monotonic() - began
    if done.returncode or [db.name for db in databases if not db.value("SELECT to_regclass('turn_metrics')")]:
        sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")
    return taken
