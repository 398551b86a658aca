"""Whatever ends a run, and wherever: no half step, one clear message, and the next run finishes."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from budget_engine.migration import chain
from budget_engine.postgres.embedded import Cluster
from conftest import (
    BETWEEN_TRIES,
    MIGRATIONS,
    SEED,
    THE_TURN,
    TRAP,
    UNTRAP,
    Db,
    Run,
    assert_done,
    database,
    ended,
    holding,
    quiet,
    until,
)
from proxy import COMMITTED, Message, Proxy, containing, cut, on_nth, socket_of

STEMS = [step.stem for step in chain.load().steps if "fix" not in step.label]  # what a setup from nothing runs
LABELS = [chain.label(stem) for stem in STEMS]
RANDOM_POINTS = 4
COMMANDS = 78  # what event triggers see of a setup from nothing, a little less than all

# Our DDL commands are counted.
ON_COMMAND = "nextval('trap.commands') = {}"
DIE = "PERFORM pg_terminate_backend(pg_backend_pid())"
FAIL = "RAISE EXCEPTION 'sprung on %', TG_TAG USING ERRCODE = 'XX001', DETAIL = 'a detail', HINT = 'a hint'"
# The server sends a notice at once, all else when it has 8 kB, or the whole message is done; and waits to be heard.
CALL = "RAISE NOTICE 'sprung'; PERFORM pg_sleep(0.2)"


@pytest.fixture(scope="module")
def stages(cluster: Cluster) -> list[str]:
    """Dumps of a database after none, one, two, … of the steps, by psql: what there may be after a run was cut off."""
    with database(cluster) as reference:
        dumps = [reference.dump()]
        for stem in STEMS:
            reference.migrate(stem)
            dumps.append(reference.dump())
        assert reference.differing() == {}
    return dumps


def on_command(n: int, action: str) -> str:
    """Write the trap that acts when the n-th command is done (counted from 1)."""
    return TRAP.format(condition=ON_COMMAND.format(n), action=action)


def trapped(db: Db, trap: str, run: Callable[[], Run]) -> Run:
    """Run with the trap, and take it away once the server is done, too."""
    db.execute(trap)
    done = run()
    quiet(db)
    db.execute(UNTRAP)
    return done


def assert_whole_steps_then_finished(db: Db, stages: list[str], done: Run) -> int:
    """No step is there in part; its line in the history comes with it; one more run finishes. Return how many."""
    assert "Traceback" not in done.err, done
    assert done.err.count("error  ") == (done.code != 0), done
    quiet(db)
    reached = stages.index(db.dump())
    assert db.transactions() == LABELS[:reached]
    again = db.invoke("setup")
    assert again.code == 0, again
    assert db.dump() == stages[-1]
    assert db.transactions() == LABELS
    return reached


def of_the_work(wanted: Callable[[Message], bool]) -> Callable[[Message], bool]:
    """Whether such a message is not of the watch's connection, who looks around where the machine is busy."""
    return lambda message: message.connection == 1 and wanted(message)


def of_kind(kind: str) -> Callable[[Message], bool]:
    """Whether a message of the work is of this kind."""
    return of_the_work(lambda message: message.kind == kind)


REPORTED = of_the_work(containing(COMMITTED))


# ── the connection ends ────────────────────────────────────────────────────────────────────────────────────────────


# Before which message, and the how manieth of these; how many steps are done then, where that is certain: what follows
# in the same message, the server may do all the same. The first COMMIT is the survey's, each of the others a step's.
CUTS = {
    "at the login": (of_kind("Startup"), 1, 0),
    "at the report of the survey": (REPORTED, 1, 0),
    "at the steps": (of_kind("Q"), 2, 0),
    "at the report of a step": (REPORTED, 1 + 3, None),
    "at the report of the last step": (REPORTED, 1 + len(LABELS), None),
    "at the report of the last verification": (REPORTED, 2 + len(LABELS), len(LABELS)),
}


@pytest.mark.parametrize(("wanted", "n", "steps"), CUTS.values(), ids=CUTS)
def test_line_is_cut(db: Db, stages: list[str], wanted: Callable[[Message], bool], n: int, steps: int | None) -> None:
    """Where everything is done, but nobody could say so, it is not a success."""
    watch = on_nth(wanted, n, cut)
    with Proxy(socket_of(db.cluster.sockets), client_says=watch, server_says=watch) as proxy:
        done = db.invoke("setup", env={"DATABASE_URL": proxy.url(db.name)})
    assert (done.code, "checks pass" in done.out) == (4, False), done
    reached = assert_whole_steps_then_finished(db, stages, done)
    assert steps in (reached, None)


# ── the server's process ends ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", random.Random(SEED).sample(range(1, 1 + COMMANDS), RANDOM_POINTS))
def test_backend_is_terminated_in_a_command(db: Db, stages: list[str], command: int) -> None:
    print(f"FAULT_SEED={SEED}, command {command}")
    done = trapped(db, on_command(command, DIE), lambda: db.invoke("setup"))
    assert done.code == 4, done
    assert_whole_steps_then_finished(db, stages, done)


def test_backend_is_terminated_while_it_builds_concurrently(finished: Db) -> None:
    """An old transaction holds the build up; what is left is an INVALID index."""
    db, whole = finished, finished.dump()
    db.execute("DROP INDEX idx_games_owner, idx_slots_type")
    builder = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE query LIKE 'CREATE INDEX CONCUR%idx_slots_type%' AND wait_event_type = 'Lock'"""
    with holding(db, "LOCK TABLE slots IN ROW EXCLUSIVE MODE"):
        process = db.start("setup")
        until(lambda: db.rows(builder), process)
        done = ended(process)
    assert (done.code, done.err.count("error  ")) == (4, 1), done
    assert db.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_slots_type'::regclass") is False
    assert_done(db)
    assert sorted(db.dump().splitlines()) == sorted(whole.splitlines())


# ── the client ends (killed: test_kill) ────────────────────────────────────────────────────────────────────────────


def interrupted(db: Db, wanted: Callable[[Message], bool]) -> Run:
    """Run setup, and press Ctrl-C when the first such message of the server is on its way to it."""
    processes: list[subprocess.Popen[str]] = []

    def strike() -> None:
        while not processes:
            time.sleep(0.001)
        processes[0].send_signal(signal.SIGINT)

    with Proxy(socket_of(db.cluster.sockets), server_says=on_nth(wanted, 1, strike)) as proxy:
        processes.append(db.start("setup", DATABASE_URL=proxy.url(db.name)))
        return ended(processes[0])


def assert_interrupted(db: Db, stages: list[str], done: Run) -> None:
    assert (done.code, len(done.err.splitlines())) == (130, 1), done
    assert_whole_steps_then_finished(db, stages, done)


def test_ctrl_c_at_the_report_of_the_survey(db: Db, stages: list[str]) -> None:
    """Earlier than that: test_silence, test_messages."""
    assert_interrupted(db, stages, interrupted(db, REPORTED))


@pytest.mark.parametrize("command", [1, 40, 78])
def test_ctrl_c_in_a_command(db: Db, stages: list[str], command: int) -> None:
    done = trapped(db, on_command(command, CALL), lambda: interrupted(db, containing("^N.*sprung")))
    assert_interrupted(db, stages, done)


def test_ctrl_c_while_waiting_for_another_run(db: Db, stages: list[str]) -> None:
    with holding(db, THE_TURN):
        process = db.start("setup")
        until(lambda: db.rows(BETWEEN_TRIES), process)
        process.send_signal(signal.SIGINT)
        done = ended(process)
    assert_interrupted(db, stages, done)


# ── a step fails ───────────────────────────────────────────────────────────────────────────────────────────────────


# Where it fails: the DDL tag, the object that the command is about, the last words of the command, the step, the text
# on the line that the message must name.
FAILURES = {
    "a function's creation": ("CREATE FUNCTION", "%update_entry_points%", "update_entry_points",
                              "20250130000000_core_schema", "CREATE FUNCTION update_entry_points_search_text()"),
    "middle of turn_metrics": ("CREATE INDEX", "%.idx_turn_metrics_created", "idx_turn_metrics_created",
                               "20250222_turn_metrics",
                               "CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_turn_metrics_created ON"),
    "ALTER TABLE": ("ALTER TABLE", "%prompt_snapshots", "budget_report", "20250221_budget_report",
                    "ALTER TABLE prompt_snapshots ADD COLUMN"),
}  # fmt: skip


@pytest.mark.parametrize(("tag", "made", "word", "stem", "text"), FAILURES.values(), ids=FAILURES)
def test_failing_step(db: Db, stages: list[str], tag: str, made: str, word: str, stem: str, text: str) -> None:
    """The steps before it are done, it left no trace; the message says all that, where, and what the server said."""
    match = f"EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity LIKE '{made}')"
    condition = f"TG_TAG = '{tag}' AND current_query() LIKE '%budget_engine.history%' AND {match}"
    trap = TRAP.format(condition=condition, action=FAIL)
    done = trapped(db, trap, lambda: db.invoke("setup"))
    assert done.code == 1, done
    place = re.search(rf"db/migrations/{stem}\.sql, line (\d+): (.*)", done.err)
    assert place is not None, done
    assert text in (MIGRATIONS / f"{stem}.sql").read_text().splitlines()[int(place[1]) - 1]
    assert word in place[2]
    before = LABELS[: STEMS.index(stem)]
    for words in (f"sprung on {tag}", "a detail", "a hint", f"{chain.label(stem)} changed nothing", *before):
        assert words in done.err
    assert assert_whole_steps_then_finished(db, stages, done) == len(before)


def test_step_whose_checks_do_not_pass_is_rolled_back(db: Db, stages: list[str]) -> None:
    """Something undoes the step's work behind its back: the verification, in the same transaction, raises."""
    trap = TRAP.format(
        condition="TG_TAG = 'CREATE INDEX' AND to_regclass('idx_turn_metrics_created') IS NOT NULL",
        action="DROP INDEX idx_turn_metrics_created; ALTER TABLE turn_metrics DROP COLUMN model_ms",
    )
    done = trapped(db, trap, lambda: db.invoke("setup"))
    assert done.code == 1, done
    assert "column turn_metrics.model_ms is missing" in done.err
    assert assert_whole_steps_then_finished(db, stages, done) == LABELS.index("turn_metrics")
