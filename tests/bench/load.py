"""What the steps cost a busy database: the plain way and ours, under traffic, on tables of many sizes.

Each way gets two copies of one filled database: on one it runs beside readers and writers, whose waits are recorded; on
the other it is alone, and WAL and disk are its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from conftest import Db, database, private_server
from versions import packaged

from bench import tables, traffic
from bench.figures import Report, line_chart
from bench.ways import PLAIN, WAYS, WHAT

RATE = 50  # statements a second, of each reader and each writer
NAMES = [f"{table} {kind}" for table in tables.TABLES for kind in ("read", "write")]

_DISK = "SELECT pg_database_size(current_database())"
_LOOK_S = 0.1
_REASONS = 3


@dataclass(frozen=True)
class Size:
    """How many rows the tables have (turns as many as prompt_snapshots), and how long the baseline is to be."""

    rows: int
    slots: int
    baseline_s: float

    @property
    def pause_s(self) -> float:
        """How long what was begun has to come to rest."""
        return self.baseline_s / 15


@dataclass(frozen=True)
class Window:
    """A time in which something was under way (time.monotonic())."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end - self.begin

    def meets(self, began: float, seconds: float) -> bool:
        """Whether what began then and took so long was under way in it."""
        return began < self.end and began + seconds > self.begin


@dataclass(frozen=True)
class Busy:
    """One way beside traffic: when each step ran, when none did, and what the traffic wrote down."""

    baseline: Window
    steps: Mapping[str, Window]
    log: traffic.Log

    def longest(self, window: Window, name: str) -> float:
        """The longest wait of a reader or writer ("turns read") in that time, in seconds."""
        return max((call.seconds for call in self.log.calls[name] if window.meets(call.began, call.seconds)), default=0)

    def waited_for(self, window: Window) -> str:
        """What statements that took long were waiting for: how often that was seen, and the oldest of them, in ms."""
        seen: dict[str, list[float]] = defaultdict(list)
        for look in self.log.looks:
            if window.begin < look.at < window.end:
                seen[look.waits_for].append(look.age)
        most = sorted(seen.items(), key=lambda item: max(item[1]), reverse=True)
        return ", ".join(f"{what} {len(ages)} ({max(ages) * 1000:,.0f})" for what, ages in most[:_REASONS])


@dataclass(frozen=True)
class Cost:
    """What a step took from an otherwise idle server."""

    seconds: float
    wal: int
    disk: int
    most_disk: int  # at any time during the step


@dataclass(frozen=True)
class Outcome:
    """Everything about one way at one size."""

    busy: Busy
    quiet: Mapping[str, Cost]
    index: int  # bytes of the fix's index


def run(sizes: Sequence[Size], report: Report) -> None:
    """Measure every size, print its tables as soon as they are there, and draw the charts."""
    outcomes: dict[int, dict[str, Outcome]] = {}
    with private_server(binaries=packaged(), durable=True) as cluster:
        report.begin(cluster)
        for size in sizes:
            with database(cluster) as template:
                filling = _window(partial(tables.build, template, size.rows, size.slots))
                report.say(
                    f"\n{size.rows:,} prompt_snapshots, {size.rows:,} turns, {size.slots:,} slots:"
                    f" {_megabytes(_disk(template))} MB, filled in {filling.seconds:.0f} s"
                )
                outcomes[size.rows] = {way: _outcome(template, way, size) for way in WAYS}
            _print(outcomes[size.rows], report)
    _draw(outcomes, report)


# ── measuring ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _outcome(template: Db, way: str, size: Size) -> Outcome:
    with _copy(template, size) as db:
        busy = _busy(db, way, size)
    with _copy(template, size) as db:
        quiet = {step: _cost(db, partial(WAYS[way], db, step)) for step in PLAIN}
        return Outcome(busy, quiet, db.value("SELECT pg_relation_size('idx_prompt_snapshots_turn_id')"))


@contextmanager
def _copy(template: Db, size: Size) -> Iterator[Db]:
    """Copy the filled database, and let the disk come to rest."""
    with database(template.cluster, template.name) as db:
        db.execute("CHECKPOINT")
        os.sync()
        time.sleep(5 * size.pause_s)  # the file system is still busy with what was dropped before
        yield db


def _busy(db: Db, way: str, size: Size) -> Busy:
    steps = {}
    with traffic.running(db.url, tables.statements(size.slots), size.rows, RATE) as around:
        time.sleep(size.pause_s)
        baseline = _window(partial(time.sleep, size.baseline_s))
        for step in PLAIN:
            steps[step] = _window(partial(WAYS[way], db, step))
            time.sleep(size.pause_s)
    return Busy(baseline, steps, around.log)


def _window(act: Callable[[], None]) -> Window:
    begin = time.monotonic()
    act()
    return Window(begin, time.monotonic())


def _cost(db: Db, act: Callable[[], None]) -> Cost:
    wal, disk = _wal(db), _disk(db)
    with _watched_disk(db) as sizes:
        seconds = _window(act).seconds
    return Cost(seconds, _wal(db) - wal, _disk(db) - disk, max([*sizes, _disk(db)]) - disk)


def _wal(db: Db) -> int:
    return int(db.value("SELECT pg_current_wal_insert_lsn() - '0/0'"))


def _disk(db: Db) -> int:
    return int(db.value(_DISK))


@contextmanager
def _watched_disk(db: Db) -> Iterator[list[int]]:
    """Look at the database's size all the time: what is written and dropped again has to fit, too."""
    sizes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        with db.connect() as connection:
            while not done.wait(_LOOK_S):
                sizes.extend(int(size) for (size,) in connection.execute(_DISK))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


# ── telling ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _print(outcomes: Mapping[str, Outcome], report: Report) -> None:
    report.say(
        "Longest read / write that was under way during the step, in ms; each way's first line is without a step."
    )
    rows = []
    for way, outcome in outcomes.items():
        busy = outcome.busy
        rows.append([f"{way}: no step", f"{busy.baseline.seconds:.1f} s", *_waits(busy, busy.baseline)])
        rows += [[f"{way}: {WHAT[step]}", f"{w.seconds:.2f} s", *_waits(busy, w)] for step, w in busy.steps.items()]
    report.table(["", "time", *tables.TABLES, "seen waiting for, times (ms)"], rows)
    report.say("The same steps on a copy without traffic, MB of 10⁶ bytes:")
    rows = [
        [f"{way}: {WHAT[step]}", f"{cost.seconds:.2f} s", *map(_megabytes, (cost.wal, cost.disk, cost.most_disk))]
        for way, outcome in outcomes.items()
        for step, cost in outcome.quiet.items()
    ]
    report.table(["", "time", "WAL", "disk, after", "disk, at most"], rows)
    wal, index = outcomes["ours"].quiet["fix"].wal, outcomes["ours"].index
    report.say(f"Our fix wrote {wal:,} bytes of WAL for an index of {index:,}: {wal - index:,} more.")


def _waits(busy: Busy, window: Window) -> list[str]:
    milliseconds = {name: f"{busy.longest(window, name) * 1000:,.0f}" for name in NAMES}
    waits = [f"{milliseconds[f'{table} read']} / {milliseconds[f'{table} write']}" for table in tables.TABLES]
    return [*waits, busy.waited_for(window)]


def _draw(outcomes: Mapping[int, Mapping[str, Outcome]], report: Report) -> None:
    sizes = [f"{size:,} rows" for size in outcomes]
    waits = {way: [_longest(of[way].busy, of[way].busy.steps.values()) for of in outcomes.values()] for way in WAYS}
    waits["no step"] = [
        max(_longest(outcome.busy, [outcome.busy.baseline]) for outcome in of.values()) for of in outcomes.values()
    ]
    wal = {way: [of[way].quiet["fix"].wal / 1e6 for of in outcomes.values()] for way in WAYS}
    report.chart("load-waits", line_chart("Longest wait of any reader or writer, any step", sizes, waits, "ms"))
    report.chart("load-wal", line_chart("WAL of the fix", sizes, wal, "MB"))


def _longest(busy: Busy, windows: Iterable[Window]) -> float:
    return max(busy.longest(window, name) for window in windows for name in NAMES) * 1000
