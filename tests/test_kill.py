"""Killed anywhere, finished by the next run: a seeded random walk, and the two places that take long.

FAULT_POINTS: how many points the walk has (the ordinary run takes a sample); FAULT_SEED repeats what a walk draws. When
a delay ends, the machine's load decides how far the run has come: the same seed draws the same faults, near the same
places.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from budget_engine.migration import chain, plan
from budget_engine.postgres import embedded
from conftest import (
    BUILDING,
    RUNNING,
    SEED,
    WAITING,
    Db,
    Run,
    assert_done,
    database,
    ended,
    holding,
    postmaster,
    private_server,
    quiet,
    until,
)
from proxy import Message, Proxy, on_nth, socket_of
from states import Contents, by_hand, contents, lost, with_uuid

LABELS = [step.label for step in chain.load().steps]
POINTS_OF_ONE_WALK = 3
POINTS = int(os.environ.get("FAULT_POINTS", 4 * POINTS_OF_ONE_WALK))
LONGEST_S = 1.5  # for which a message is waited for

# Rows enough for a build to take its moment; indexes missing and INVALID; parent_id to be validated. What the
# transactions have to do is all there, too.
ROWS = 3_000
WEAR = f"""
INSERT INTO turns (game_id, idx, role, content)
SELECT md5('game 1')::uuid, i + 10, 'player', '{{}}' FROM generate_series(1, {ROWS}) AS i;
INSERT INTO prompt_snapshots (id, snapshot_id, tp, linearized_prompt_text)
SELECT md5('more ' || i)::uuid, md5('name of more ' || i)::uuid, '{{}}', 'Prompt ' || i
FROM generate_series(1, {ROWS}) AS i;
ALTER TABLE prompt_snapshots ADD COLUMN IF NOT EXISTS parent_id uuid;
UPDATE prompt_snapshots SET parent_id = md5('snapshot 1')::uuid WHERE linearized_prompt_text LIKE '%7';
ALTER TABLE prompt_snapshots DROP CONSTRAINT IF EXISTS prompt_snapshots_parent_id_fkey;
DROP INDEX IF EXISTS idx_turns_game_idx, idx_prompt_snapshots_created_at;
UPDATE pg_index SET indisvalid = false
WHERE indexrelid IN ('idx_slots_type'::regclass, 'idx_prompt_snapshots_source'::regclass, 'idx_games_owner'::regclass);
"""
OLD = {"uuid": with_uuid() + WEAR, "bigint": by_hand("bigint") + WEAR}
KEPT = {"public.prompt_snapshots.turn_id": "turn_id_uuid"}

# Whatever is there keeps its OID, under whatever name; an INVALID index may go.
THINGS = """
SELECT 'relation', c.oid::int, 0 FROM pg_class AS c LEFT JOIN pg_index AS i ON i.indexrelid = c.oid
WHERE c.relnamespace = 'public'::regnamespace AND i.indisvalid IS NOT FALSE
UNION ALL
SELECT 'column', attrelid::int, attnum FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = attrelid
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND attnum > 0 AND NOT attisdropped
UNION ALL
SELECT 'constraint', oid::int, 0 FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'trigger', oid::int, 0 FROM pg_trigger"""
INVALID = """
SELECT indexrelid::regclass::text FROM pg_index
WHERE NOT indisvalid AND indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)"""


def pending(db: Db) -> dict[str, set[str]]:
    """Return label → the checks that its transaction is for; without those that have nothing to do."""
    everything = chain.load()
    todo = plan.make(everything, everything.steps, db.checks())
    assert todo.conflicts == ()
    return {
        step.label: {check.title for action in step.transaction for check in action.checks}
        for step in todo.transactions
    }


@dataclass(frozen=True)
class Before:
    """How an old database was before anything happened to it; for how long an undisturbed run on it is connected."""

    template: Db
    contents: Contents
    things: set[tuple[Any, ...]]
    pending: dict[str, set[str]]
    seconds: float
    messages: int  # exchanged in that time

    @property
    def labels(self) -> list[str]:
        """The steps that have a transaction to run, in order."""
        return [label for label in LABELS if label in self.pending]

    def compare(self, db: Db) -> list[str]:
        """No value, no object is gone, and no step is done in part; return the steps that are done."""
        uuid_kept = db.rows("SELECT FROM pg_attribute WHERE attname = 'turn_id_uuid'")
        assert lost(self.contents, contents(db), KEPT if uuid_kept else {}) == []
        assert self.things - set(db.rows(THINGS)) == set()
        left = pending(db)
        assert left == {label: titles for label, titles in self.pending.items() if label in left}
        done = [label for label in self.labels if label not in left]
        assert done == self.labels[: len(done)]
        assert db.transactions() == done
        return done


@pytest.fixture(scope="module")
def mortal() -> Iterator[dict[str, Before]]:
    """The old databases, to be cloned, on a server that may be stopped."""
    with private_server() as cluster, ExitStack() as stack:
        made = {}
        for name, state in OLD.items():
            old = stack.enter_context(database(cluster))
            old.execute(state)
            was = contents(old), set(old.rows(THINGS)), pending(old)
            with database(cluster, old.name) as db:
                made[name] = Before(old, *was, *undisturbed(db))
        yield made


def counts(message: Message) -> bool:
    """Rows of the survey are many, and all the same to us."""
    return message.kind != "D"


def undisturbed(db: Db) -> tuple[float, int]:
    """Run setup; return for how long it was connected, and how many messages were exchanged."""
    times: list[float] = []

    def watch(message: Message) -> Message:
        times.extend([time.monotonic()] * counts(message))
        return message

    with Proxy(socket_of(db.cluster.sockets), client_says=watch, server_says=watch) as proxy:
        assert_done(db, db.invoke("setup", env={"DATABASE_URL": proxy.url(db.name)}))
    return times[-1] - times[0], len(times)


# ── the walk ───────────────────────────────────────────────────────────────────────────────────────────────────────


# An old snapshot, which every build waits for; a reader and a writer, who hold up transactions, too.
HOLDS_UP = [
    "SELECT 1",
    "LOCK TABLE prompt_snapshots IN ACCESS SHARE MODE",
    "LOCK TABLE slots IN ROW EXCLUSIVE MODE",
]


@dataclass(frozen=True)
class Point:
    """One fault: what happens when, and what else goes on."""

    fault: str
    after_s: float | None  # since the login; None: at a message
    message: int | None  # which one
    meanwhile: str | None  # what another session has done, in a transaction that stays open until the fault
    beside: bool  # a second setup runs
    at_once: bool  # nobody waits for what the server does yet before the next point


def draw_point(draw: random.Random, before: Before) -> Point:
    timed = draw.random() < 0.6
    share = draw.random() ** 1.5  # of an undisturbed run; the early ones more often, for later runs find less to do
    return Point(
        fault=draw.choice(list(FAULTS)),
        after_s=1.2 * before.seconds * share if timed else None,
        message=None if timed else 1 + int(before.messages * share),
        meanwhile=draw.choice([*HOLDS_UP, *[None] * len(HOLDS_UP)]),
        beside=draw.random() < 0.3,
        at_once=draw.random() < 0.3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("walk", range(-(-POINTS // POINTS_OF_ONE_WALK)))
def test_random_walk(mortal: dict[str, Before], walk: int) -> None:
    draw = random.Random(f"{SEED} {walk}")
    state = draw.choice(list(OLD))
    before = mortal[state]
    print(f"FAULT_SEED={SEED} FAULT_POINTS={POINTS}, walk {walk}, turn_id {state}")
    with database(before.template.cluster, before.template.name) as db:
        for _ in range(POINTS_OF_ONE_WALK):
            point = draw_point(draw, before)
            print(point)
            strike(db, point)
            if not point.at_once:
                quiet(db)
                print(f"  done: {before.compare(db)}")
        assert_done(db)
        assert set(db.rows(INVALID)) <= {("idx_prompt_snapshots_turn_id_uuid",)}
        assert before.compare(db) == before.labels


def strike(db: Db, point: Point) -> None:
    """Start setup, let the fault happen, wait for its end; bring the server up again."""
    once = threading.Lock()
    processes: list[subprocess.Popen[str]] = []

    def act() -> None:
        if once.acquire(blocking=False):
            FAULTS[point.fault].strike(db, processes[0], proxy)

    watch = on_nth(counts, point.message or 0, act)
    with Proxy(socket_of(db.cluster.sockets), client_says=watch, server_says=watch) as proxy:
        with transaction(db, point.meanwhile) if point.meanwhile else nullcontext():
            processes.append(db.start("setup", DATABASE_URL=proxy.url(db.name)))
            beside = [db.start("setup")] if point.beside else []
            if point.after_s is not None:
                until(lambda: proxy.conversations and proxy.conversations[0].from_client, processes[0])
                time.sleep(point.after_s)
                act()
            else:
                with suppress(subprocess.TimeoutExpired):
                    processes[0].wait(LONGEST_S)
                if processes[0].returncode is None:
                    act()  # it is held up, and does not come to that message
            fate = FAULTS[point.fault]
        embedded.start(db.cluster)
        judge(ended(processes[0]), fate.codes)
    for process in beside:
        judge(ended(process), fate.codes_beside)


def judge(done: Run, codes: Sequence[int]) -> None:
    print(f"  exit {done.code}: {done.err.splitlines()[:1]}")
    assert done.code in codes, done
    assert "Traceback" not in done.err, done


def transaction(db: Db, sql: str) -> AbstractContextManager[Any]:
    """Another session's transaction, which did this, keeps its snapshot, and stays open."""
    return holding(db, f"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; {sql}; SELECT 1")


@dataclass(frozen=True)
class Fault:
    """What happens, how the run that it strikes may end, and how another one beside it."""

    strike: Callable[[Db, subprocess.Popen[str], Proxy], None]
    codes: tuple[int, ...]
    codes_beside: tuple[int, ...] = (0,)


def kill(_db: Db, process: subprocess.Popen[str], _proxy: Proxy) -> None:
    process.kill()


def cut(_db: Db, _process: subprocess.Popen[str], proxy: Proxy) -> None:
    proxy.cut()


def terminate(db: Db, _process: subprocess.Popen[str], proxy: Proxy, *, last: int = 0) -> None:
    for pid in [talk.backend_pid for talk in proxy.conversations if talk.backend_pid][-last:]:
        db.execute(f"SELECT pg_terminate_backend({pid})")


def stop_the_server(db: Db, _process: subprocess.Popen[str], _proxy: Proxy) -> None:
    """What pg_ctl stop -m immediate does."""
    os.kill(postmaster(db.cluster.data), signal.SIGQUIT)
    deadline = time.monotonic() + 30
    while postmaster(db.cluster.data):
        assert time.monotonic() < deadline
        time.sleep(0.005)


FAULTS = {
    "the client is killed": Fault(kill, (-signal.SIGKILL, 0)),
    "the connections are cut": Fault(cut, (0, 4)),
    "the server's processes are terminated": Fault(terminate, (0, 4)),
    # The one that looks who holds a lock, if there is one.
    "the youngest server process is terminated": Fault(partial(terminate, last=1), (0, 4)),
    "the server is stopped, immediate": Fault(stop_the_server, (0, 4), (0, 4)),
}


# ── inside what takes long ─────────────────────────────────────────────────────────────────────────────────────────

BUILDERS = BUILDING.replace("count(*)", "pid")
VALIDATING = f"""
{WAITING.replace("count(*)", "pid")} AND query LIKE 'BEGIN%'
AND pid IN (SELECT pid FROM pg_locks WHERE relation = to_regclass('turns'))"""
UNUSABLE = "SELECT indexrelid::int FROM pg_index WHERE NOT indisvalid"


HELD = {
    "SELECT 1": ["idx_slots_type"],
    "LOCK TABLE games IN ROW EXCLUSIVE MODE": ["idx_games_owner", "idx_games_world"],
}


@pytest.mark.parametrize(("held", "missing"), HELD.items(), ids=["old snapshot", "writer"])
def test_orphan_that_builds_is_waited_for(finished: Db, held: str, missing: list[str]) -> None:
    """The client is killed, its server process builds on: nobody drops what it builds, or builds beside it."""
    db = finished
    db.execute("DROP INDEX " + ", ".join(missing))
    with transaction(db, held):
        process = db.start("setup")
        until(lambda: db.rows(BUILDERS), process)
        [(orphan,)] = db.rows(BUILDERS)
        process.kill()
        ended(process)
        [(unfinished,)] = db.rows(UNUSABLE)
        after = db.start("setup")
        until(lambda: db.value(RUNNING) == 2, after)
        time.sleep(1)  # it looks a few times
        assert db.rows(BUILDERS) == [(orphan,)]
        assert db.rows(UNUSABLE) == [(unfinished,)]
    done = assert_done(db, ended(after))
    assert db.value(f"SELECT to_regclass('{missing[0]}')::oid::int") == unfinished
    assert not [line for line in done.out.splitlines() if missing[0] in line and "done" in line]
    assert f"pid {orphan} " in done.out
    assert db.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0


@pytest.mark.parametrize("killed", ["client", "server process"])
def test_killed_while_it_validates(db: Db, killed: str) -> None:
    """It waits for turns, where it looks each row up; the client's orphan does so still when the next run comes."""
    db.execute(OLD["bigint"])
    assert db.invoke("setup").code == 0
    db.execute("ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey")
    db.execute("".join(f"{st.text};" for st in chain.load().of("fix")[0].statements if not st.concurrent))
    before, things = contents(db), set(db.rows(THINGS))
    with transaction(db, "LOCK TABLE turns IN EXCLUSIVE MODE"):
        process = db.start("setup")
        until(lambda: db.rows(VALIDATING), process)
        if killed == "client":
            process.kill()
        else:
            db.rows(f"SELECT pg_terminate_backend(pid) FROM ({VALIDATING}) AS v")
        judge(ended(process), [-signal.SIGKILL, 4])
        unchecked = db.rows("SELECT conname FROM pg_constraint WHERE NOT convalidated")
        assert unchecked == [("prompt_snapshots_turn_id_fkey",)]
        after = db.start("setup")
        until(lambda: db.rows(VALIDATING), after)
    assert_done(db, ended(after))
    assert (contents(db), set(db.rows(THINGS))) == (before, things)
