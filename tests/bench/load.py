"""What the steps cost a busy database: the plain way and ours, under traffic, on tables of many sizes.

Each way gets two copies of one filled database: on one it runs beside readers and writers, whose waits are recorded; on
the other it is alone, and WAL and disk are its own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg

from bench import tables, traffic
from bench.figures import Report, line_chart
from conftest import Db, clean_environment, database, private_server, run as run_command

from scripts import embedded

SIZES = (10_000, 1_000_000, 10_000_000)
SLOTS = 2_000_000
RATE = 50  # statements a second, of each reader and each writer
_LONGEST_STEP_S = 3600
_SETTLE_S = 2.0

# What somebody would write who does not think of the others: the older application's files did.
PLAIN = {
    "fix": """
        ALTER TABLE prompt_snapshots ALTER COLUMN turn_id TYPE bigint USING NULL::bigint;
        ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_turn_id_fkey
          FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE SET NULL;
        CREATE INDEX IF NOT EXISTS idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id)""",
    "slots-flags": """
        ALTER TABLE slots ADD COLUMN must_keep boolean NOT NULL DEFAULT false;
        ALTER TABLE slots ADD COLUMN min_chars int;
        UPDATE slots SET must_keep = true, min_chars = 160 WHERE type = 'ruleset' AND name = 'principles';
        UPDATE slots SET must_keep = true, min_chars = 80 WHERE type = 'ruleset' AND name = 'choice_style';
        UPDATE slots SET must_keep = true, min_chars = 60 WHERE type = 'module' AND name = 'actions';
        UPDATE slots SET min_chars = 180 WHERE type = 'world' AND name = 'tone';
        UPDATE slots SET min_chars = 140 WHERE type = 'npc' AND name = 'persona';
        CREATE INDEX idx_slots_must_keep ON slots (must_keep) WHERE must_keep""",
    "budget-report": "ALTER TABLE prompt_snapshots ADD COLUMN budget_report jsonb",
    "turn-metrics": """
        CREATE TABLE turn_metrics (
          turn_id bigint PRIMARY KEY REFERENCES turns (id) ON DELETE CASCADE, story_id uuid NOT NULL,
          created_at timestamptz NOT NULL DEFAULT now(), tokens_before int NOT NULL, tokens_after int NOT NULL,
          trims_count int NOT NULL DEFAULT 0, top_trim_keys text[] DEFAULT '{}', model_ms int,
          rejects jsonb DEFAULT '{}', cost_estimate_cents int);
        CREATE INDEX idx_turn_metrics_story_created ON turn_metrics (story_id, created_at DESC);
        CREATE INDEX idx_turn_metrics_created ON turn_metrics (created_at DESC)""",
    "prereqs": """
        CREATE INDEX idx_prompt_snapshots_created_by ON prompt_snapshots (created_by);
        CREATE INDEX idx_slots_type ON slots (type)""",
}
WHAT = {step: step for step in PLAIN} | {"prereqs": "prereqs (missing indexes)"}


def plain(db: Db, step: str) -> None:
    """Run the step's statements one by one, each in its own transaction, with no lock_timeout."""
    with db.connect() as connection:
        for statement in PLAIN[step].split(";"):
            connection.execute(statement.encode())


def ours(db: Db, step: str) -> None:
    """Run the step as users do."""
    words = [sys.executable, "-m", "invoke", step]
    done = run_command(words, clean_environment() | {"DATABASE_URL": db.url}, timeout=_LONGEST_STEP_S)
    if done.code:
        raise SystemExit(f"invoke {step}: {done}")


WAYS: Mapping[str, Callable[[Db, str], None]] = {"plain": plain, "ours": ours}


@dataclass(frozen=True)
class Window:
    """A time in which something was under way (time.monotonic())."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end - self.begin


@dataclass(frozen=True)
class Busy:
    """One way beside traffic: when each step ran, when none did, and what the traffic wrote down."""

    baseline: Window
    steps: Mapping[str, Window]
    log: traffic.Log

    def longest(self, window: Window, name: str) -> float:
        """The longest wait of a reader or writer ("turns read") in that time, in seconds."""
        return max((call.seconds for call in self.log.calls[name] if call.within(window.begin, window.end)), default=0)

    def waited_for(self, window: Window) -> str:
        """What statements that took long were waiting for, most often seen first."""
        seen = Counter(look.waits_for for look in self.log.looks if window.begin < look.at < window.end)
        return ", ".join(f"{what} {count}×" for what, count in seen.most_common(3))


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


NAMES = [f"{table} {kind}" for table in tables.TABLES for kind in ("read", "write")]


def run(sizes: Sequence[int], most_slots: int, baseline_s: float, report: Report) -> None:
    """Measure every size, print its table as soon as it is there, and draw the charts."""
    outcomes: dict[int, dict[str, Outcome]] = {}
    with private_server() as cluster:
        report.begin(cluster)
        for rows in sizes:
            slots = min(most_slots, 2 * rows)
            with database(cluster) as template:
                began = time.monotonic()
                tables.build(template, rows, slots)
                report.say(f"\n{rows:,} prompt_snapshots, {rows:,} turns, {slots:,} slots: {_megabytes(_size(template))} MB"
                           f", made in {time.monotonic() - began:.0f} s")
                outcomes[rows] = {
                    way: Outcome(_busy(template, way, rows, slots, baseline_s), *_quiet(template, way)) for way in WAYS
                }
            _print(outcomes[rows], report)
    _draw(outcomes, report)


# ── measuring ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _copy(template: Db) -> Iterator[Db]:
    """Copy the filled database, and let the disk come to rest."""
    with database(template.cluster, f"{template.name} STRATEGY file_copy") as db:
        db.execute("CHECKPOINT")
        os.sync()
        time.sleep(_SETTLE_S)
        yield db


def _busy(template: Db, way: str, rows: int, slots: int, baseline_s: float) -> Busy:
    statements: dict[str, Sequence[str]] = {f"{table} read": (text,) for table, text in tables.reads(slots).items()}
    statements |= {f"{table} write": texts for table, texts in tables.writes(slots).items()}
    with _copy(template) as db:
        with traffic.running(db.url, statements, rows, RATE) as around:
            time.sleep(_SETTLE_S)
            baseline = _window(lambda: time.sleep(baseline_s))
            steps = {}
            for step in PLAIN:
                steps[step] = _window(lambda step=step: WAYS[way](db, step))
                time.sleep(_SETTLE_S)
        return Busy(baseline, steps, around.log)


def _window(act: Callable[[], None]) -> Window:
    begin = time.monotonic()
    act()
    return Window(begin, time.monotonic())


def _quiet(template: Db, way: str) -> tuple[dict[str, Cost], int]:
    with _copy(template) as db:
        costs = {step: _cost(db, lambda step=step: WAYS[way](db, step)) for step in PLAIN}
        return costs, db.value("SELECT pg_relation_size('idx_prompt_snapshots_turn_id')")


def _cost(db: Db, act: Callable[[], None]) -> Cost:
    wal, size = _wal(db), _size(db)
    with _watched_size(db) as sizes:
        seconds = _window(act).seconds
    return Cost(seconds, _wal(db) - wal, _size(db) - size, max([*sizes, _size(db)]) - size)


def _wal(db: Db) -> int:
    return int(db.value("SELECT pg_current_wal_insert_lsn() - '0/0'"))


def _size(db: Db) -> int:
    return int(db.value("SELECT pg_database_size(current_database())"))


@contextmanager
def _watched_size(db: Db) -> Iterator[list[int]]:
    """Look at the database's size all the time: what is written and dropped again has to fit, too."""
    sizes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            sizes.append(_size(db))

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
    report.say("Longest wait of a read / a write under way during the step, in ms; the first line of each way is without a step.")
    rows = []
    for way, outcome in outcomes.items():
        busy = outcome.busy
        rows.append([f"{way}: no step", f"{busy.baseline.seconds:.1f} s", *_waits(busy, busy.baseline)])
        rows += [[f"{way}: {WHAT[step]}", f"{w.seconds:.2f} s", *_waits(busy, w)] for step, w in busy.steps.items()]
    report.table(["", "time", *tables.TABLES, "seen waiting for"], rows)
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
    waits = {
        f"{way}, longest {kind}": [_longest(of[way].busy, list(of[way].busy.steps.values()), kind) for of in outcomes.values()]
        for way in WAYS
        for kind in ("read", "write")
    }
    waits["no step, longest of both"] = [
        max(_longest(outcome.busy, [outcome.busy.baseline], kind) for outcome in of.values() for kind in ("read", "write"))
        for of in outcomes.values()
    ]
    wal = {way: [of[way].quiet["fix"].wal / 1e6 for of in outcomes.values()] for way in WAYS}
    report.chart("load-waits", line_chart("Longest wait during any step: milliseconds", sizes, waits, "ms"))
    report.chart("load-wal", line_chart("WAL of the fix: MB", sizes, wal, "MB"))


def _longest(busy: Busy, windows: Sequence[Window], kind: str) -> float:
    names = [name for name in NAMES if name.endswith(kind)]
    return max(busy.longest(window, name) for window in windows for name in names) * 1000
