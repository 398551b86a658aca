"""Readers and writers of the tables, each a process of its own with one connection and one transaction per statement.

    python tests/bench/traffic.py URL NAME ROWS RATE STATEMENT…

runs the statements in turn, so many in a second, until stdin ends (with its parent, however that ends), and prints when
each began and how long it took. A statement finds the number of its row in %(row)s and its own number in %(n)s.
"""

from __future__ import annotations

import gc
import json
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

APPLICATION = "bench"


@dataclass(frozen=True)
class Call:
    """One statement: when it began (time.monotonic(), the same clock in all processes), how long it took."""

    began: float
    seconds: float


@dataclass(frozen=True)
class Look:
    """A statement of the traffic was seen to take long: when, what it was waiting for, since when it had run."""

    at: float
    waits_for: str
    age: float


@dataclass(frozen=True)
class Log:
    """What the traffic wrote down."""

    calls: Mapping[str, Sequence[Call]]
    looks: Sequence[Look]


class Traffic:
    """Traffic under way; its log is there once it has ended."""

    log: Log


@contextmanager
def running(url: str, statements: Mapping[str, Sequence[str]], rows: int, rate: float) -> Iterator[Traffic]:
    """Run the statements of every name, and a watcher, while entered."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, url, name, str(rows), str(rate), *texts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, texts in {**statements, _WATCHER: ()}.items()
    }
    traffic = Traffic()
    try:
        for process in processes.values():
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("the traffic did not start; its error is above")
        yield traffic
    finally:
        said = {name: process.communicate()[0] for name, process in processes.items()}  # closes stdin
    if broken := [name for name, process in processes.items() if process.returncode]:
        raise SystemExit(f"the traffic broke off ({', '.join(broken)}); its error is above")
    looks = [Look(*row) for row in json.loads(said.pop(_WATCHER))]
    traffic.log = Log({name: [Call(*row) for row in json.loads(text)] for name, text in said.items()}, looks)


# ── in the processes ───────────────────────────────────────────────────────────────────────────────────────────────

_WATCHER = "watcher"
_LONG_S = 0.01
_LOOK = f"""
SELECT coalesce(wait_event_type || ' ' || wait_event, 'CPU'),
       extract(epoch FROM clock_timestamp() - query_start)::float8
FROM pg_stat_activity
WHERE application_name LIKE '{APPLICATION} %' AND state = 'active' AND pid <> pg_backend_pid()
  AND query_start < clock_timestamp() - interval '{_LONG_S} s'"""

Rows = list[tuple[object, ...]]


def _paced(rate: float, act: Callable[[int], object]) -> None:
    """Act so many times in a second until stdin ends; what a slow act delayed is not made up for."""
    n, due = 0, time.monotonic()
    while not select.select([sys.stdin], [], [], max(0, due - time.monotonic()))[0]:
        act(n)
        n, due = n + 1, max(due + 1 / rate, time.monotonic())


def _work(connection: psycopg.Connection, rows: int, rate: float, statements: Sequence[str]) -> Rows:
    calls: Rows = []

    def call(n: int) -> None:
        parameters = {"row": random.randint(1, rows), "n": n}
        began = time.monotonic()
        connection.execute(statements[n % len(statements)].encode(), parameters)
        calls.append((began, time.monotonic() - began))

    _paced(rate, call)
    return calls


def _watch(connection: psycopg.Connection, rate: float) -> Rows:
    looks: Rows = []
    _paced(rate, lambda n: looks.extend((time.monotonic(), *row) for row in connection.execute(_LOOK)))
    return looks


def _main(url: str, name: str, rows: int, rate: float, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True, application_name=f"{APPLICATION} {name}") as connection:
        gc.freeze()
        gc.disable()
        print("ready", flush=True)
        done = _watch(connection, rate) if name == _WATCHER else _work(connection, rows, rate, statements)
    json.dump(done, sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:])
