"""Whatever ends a run, and wherever: no half step, one clear message, and the next run finishes."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from budget_engine.migration import chain
from budget_engine.postgres.embedded import Cluster
from conftest import MIGRATIONS, SEED, THE_TURN, Db, Run, ended, until
from proxy import COMMITTED, Message, Proxy, Watcher, containing, cut, on_nth, socket_of, unchanged

STEMS = [step.stem for step in chain.load()]
NEEDED_FROM_NOTHING = [stem for stem in STEMS if "fix" not in stem]
RANDOM_POINTS = 6

# Counts the DDL commands of a session that has our name, and acts on the one that is asked for.
TRAP = """
CREATE SCHEMA trap;
CREATE SEQUENCE trap.commands;
CREATE FUNCTION trap.spring() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
  IF current_setting('application_name') = 'budget-engine-recipes' AND {condition} THEN
    {action};
  END IF;
END $$;
CREATE EVENT TRIGGER trap ON {event} EXECUTE FUNCTION trap.spring()"""
ON_COMMAND = "nextval('trap.commands') = {}"
DIE = "PERFORM pg_terminate_backend(pg_backend_pid())"
FAIL = "RAISE EXCEPTION 'sprung on %', TG_TAG USING ERRCODE = 'XX001', DETAIL = 'a detail', HINT = 'a hint'"
UNTRAP = "DROP EVENT TRIGGER trap; DROP SCHEMA trap CASCADE"


@pytest.fixture(scope="module")
def stages(cluster: Cluster) -> list[str]:
    """Dumps of a database after none, one, two, … of the steps, by psql: what may stand after a run was cut off."""
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE stages TEMPLATE template0")
        reference = Db(cluster, "stages")
        dumps = [reference.dump()]
        for stem in NEEDED_FROM_NOTHING:
            reference.migrate(stem)
            dumps.append(reference.dump())
        connection.execute("DROP DATABASE stages WITH (FORCE)")
    return dumps


def assert_whole_steps_then_finished(db: Db, stages: list[str], done: Run) -> None:
    """No step stands in part; its line in the diary stands with it; one more run finishes."""
    assert "Traceback" not in done.err, done
    assert_one_message(done)
    deadline = time.monotonic() + 30
    while db.value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'budget-engine-recipes'"):
        assert time.monotonic() < deadline  # the server may go on for a while with what it was sent
        time.sleep(0.01)
    standing = stages.index(db.dump())
    in_diary = (
        [] if standing == 0 else [step for (step,) in db.rows("SELECT step FROM budget_engine.diary ORDER BY id")]
    )
    assert in_diary == NEEDED_FROM_NOTHING[:standing]
    again = db.invoke("setup")
    assert again.code == 0, again
    assert db.differing() == {}
    assert db.dump() == stages[-1]
    assert db.rows("SELECT step FROM budget_engine.diary ORDER BY id") == [(stem,) for stem in NEEDED_FROM_NOTHING]


def assert_one_message(done: Run) -> None:
    assert done.err.count("error: ") == (done.code != 0), done


def setup_through(db: Db, client_says: Watcher = unchanged, server_says: Watcher = unchanged) -> Run:
    with Proxy(socket_of(db.cluster.sockets), client_says=client_says, server_says=server_says) as proxy:
        return db.invoke("setup", env={"DATABASE_URL": proxy.url(db.name)})


# ── the connection ends ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("commit", range(1, 1 + 1 + len(NEEDED_FROM_NOTHING)))
def test_line_is_cut_when_a_commit_is_reported(db: Db, stages: list[str], commit: int) -> None:
    """The first COMMIT is the survey's, each of the others a step's."""
    done = setup_through(db, server_says=on_nth(containing(COMMITTED), commit, cut))
    assert done.code == 4, done
    assert_whole_steps_then_finished(db, stages, done)


def of_the_work(kind: str) -> Callable[[Message], bool]:
    """Whether a message is of this kind, and not one of the watch's, who looks around where the machine is busy."""
    return lambda message: message.kind == kind and b"WITH ours" not in message.raw


CLIENT_KINDS = {"before the login": ("Startup", 1), "before the survey": ("Q", 1), "before the steps": ("Q", 2)}


@pytest.mark.parametrize(("kind", "n"), CLIENT_KINDS.values(), ids=CLIENT_KINDS)
def test_line_is_cut_before_the_server_hears(db: Db, stages: list[str], kind: str, n: int) -> None:
    done = setup_through(db, client_says=on_nth(of_the_work(kind), n, cut))
    assert done.code == 4, done
    assert db.dump() == stages[0]
    assert_whole_steps_then_finished(db, stages, done)


def test_line_is_cut_in_the_last_look(db: Db, stages: list[str]) -> None:
    """Everything is done, but nobody could say so: not a success."""
    done = setup_through(db, client_says=on_nth(of_the_work("Q"), 3, cut))
    assert done.code == 4, done
    assert "promises stand" not in done.out
    assert db.dump() == stages[-1]
    assert_whole_steps_then_finished(db, stages, done)


# ── the server's process ends ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", random.Random(SEED).sample(range(1, 61), RANDOM_POINTS))
def test_backend_is_terminated_in_a_command(db: Db, stages: list[str], command: int) -> None:
    print(f"FAULT_SEED={SEED}, command {command}")
    trap = TRAP.format(condition=ON_COMMAND.format(command), action=DIE, event="ddl_command_end")
    db.execute(trap)
    done = db.invoke("setup")
    db.execute(UNTRAP)
    assert done.code == 4, done
    assert_whole_steps_then_finished(db, stages, done)


def test_backend_is_terminated_while_it_builds_online(db: Db) -> None:
    """An old transaction holds the build up; what is left is an INVALID index."""
    db.migrate(*NEEDED_FROM_NOTHING)
    whole = db.dump()
    db.execute("DROP INDEX idx_games_owner, idx_slots_type")
    builder = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE query LIKE 'CREATE INDEX CONCUR%idx_slots_type%' AND wait_event_type = 'Lock'"""
    with db.connect(autocommit=False) as holder:
        holder.execute("LOCK TABLE slots IN ROW EXCLUSIVE MODE")
        process = db.start("setup")
        until(lambda: db.rows(builder), process)
        done = ended(process)
        holder.rollback()
    assert done.code == 4, done
    assert_one_message(done)
    assert db.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_slots_type'::regclass") is False
    assert db.invoke("setup").code == 0
    assert db.differing() == {}
    assert sorted(db.dump().splitlines()) == sorted(whole.splitlines())


# ── the client ends ────────────────────────────────────────────────────────────────────────────────────────────────


def signalled(db: Db, number: signal.Signals, wanted: Callable[[Message], bool], n: int) -> Run:
    """Run setup, and signal it when the n-th such message of the server is on its way to it."""
    processes: list[subprocess.Popen[str]] = []

    def strike() -> None:
        while not processes:
            time.sleep(0.001)
        processes[0].send_signal(number)

    with Proxy(socket_of(db.cluster.sockets), server_says=on_nth(wanted, n, strike)) as proxy:
        processes.append(db.start("setup", DATABASE_URL=proxy.url(db.name)))
        return ended(processes[0])


POINTS: dict[str, tuple[Callable[[Message], bool], int]] = {
    "login": (lambda message: message.kind == "R", 1),
    "survey": (containing(COMMITTED), 1),
    **{f"notice {n}": (lambda message: message.kind == "N", n) for n in (1, 5, 9, 11, 16)},
    "commit 3": (containing(COMMITTED), 1 + 3),
}


@pytest.mark.parametrize(("wanted", "n"), POINTS.values(), ids=POINTS)
def test_ctrl_c(db: Db, stages: list[str], wanted: Callable[[Message], bool], n: int) -> None:
    done = signalled(db, signal.SIGINT, wanted, n)
    assert done.code == 130, done
    assert len(done.err.splitlines()) == 1, done
    assert_whole_steps_then_finished(db, stages, done)


def test_ctrl_c_while_waiting_for_another_run(db: Db, stages: list[str]) -> None:
    with db.connect(autocommit=False) as other:
        other.execute(THE_TURN)
        process = db.start("setup")
        polled = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'budget%' AND query LIKE 'ROLLBACK%'"
        )
        until(lambda: db.value(polled), process)
        process.send_signal(signal.SIGINT)
        done = ended(process)
    assert done.code == 130, done
    assert len(done.err.splitlines()) == 1, done
    assert_whole_steps_then_finished(db, stages, done)


# Python imports a module of this name at its start: it strikes when the driver is about to be loaded.
SITECUSTOMIZE = """
import os, signal, sys

class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == "psycopg":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Strike())
"""


def test_ctrl_c_while_the_modules_load(db: Db, stages: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    done = db.invoke("setup", env={"PYTHONPATH": str(tmp_path)})
    assert done.code == 130, done
    assert len(done.err.splitlines()) == 1, done
    assert_whole_steps_then_finished(db, stages, done)


@pytest.mark.parametrize("notice", random.Random(SEED[::-1]).sample(range(1, 17), 3))
def test_client_is_killed(db: Db, stages: list[str], notice: int) -> None:
    print(f"FAULT_SEED={SEED}, notice {notice}")
    done = signalled(db, signal.SIGKILL, lambda message: message.kind == "N", notice)
    assert done.code == -signal.SIGKILL
    assert_whole_steps_then_finished(db, stages, Run(0, done.out, done.err))


# ── a step fails ───────────────────────────────────────────────────────────────────────────────────────────────────


def lines_with(stem: str, text: str) -> list[int]:
    lines = (MIGRATIONS / f"{stem}.sql").read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if text in line]


# Where it fails: the DDL tag, a word of the command, the step, the text on the line that the message must name.
FAILURES = {
    "first statement": ("CREATE TABLE", "CREATE TABLE worlds", STEMS[0], "CREATE TABLE worlds ("),
    "within a function's creation": (
        "CREATE FUNCTION",
        "update_entry_points",
        STEMS[0],
        "CREATE OR REPLACE FUNCTION update_entry_points_search_text()",
    ),
    "middle of turn_metrics": (
        "CREATE INDEX",
        "idx_turn_metrics_created",
        STEMS[-1],
        "CREATE INDEX idx_turn_metrics_created ON",
    ),
    "EXECUTE in a loop": ("COMMENT", "turn_metrics.model_ms", STEMS[-1], "EXECUTE statement;"),
    "ALTER TABLE": ("ALTER TABLE", "ADD COLUMN budget_report", STEMS[5], "ALTER TABLE prompt_snapshots ADD COLUMN"),
}


@pytest.mark.parametrize(("tag", "command", "stem", "text"), FAILURES.values(), ids=FAILURES)
def test_failing_step(db: Db, stages: list[str], tag: str, command: str, stem: str, text: str) -> None:
    """The steps before it stand, it left no trace; the message says where, what the server said, and what stands."""
    condition = f"TG_TAG = '{tag}' AND current_query() LIKE '%budget_engine.diary%'"
    match = f"EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE {OBJECT[tag].format(command.split()[-1])})"
    db.execute(TRAP.format(condition=f"{condition} AND {match}", action=FAIL, event="ddl_command_end"))
    done = db.invoke("setup")
    db.execute(UNTRAP)
    assert done.code == 1, done
    place = re.search(rf"db/migrations/{stem}\.sql, line (\d+): (.*)", done.err)
    assert place is not None, done
    assert int(place[1]) in lines_with(stem, text)
    assert command.split()[-1].split(".")[-1] in place[2]
    before = NEEDED_FROM_NOTHING[: NEEDED_FROM_NOTHING.index(stem)]
    for words in (
        chain.label(stem),
        f"sprung on {tag}",
        "a detail",
        "a hint",
        "left no trace",
        *map(chain.label, before),
    ):
        assert words in done.err
    assert db.dump() == stages[len(before)]
    assert_whole_steps_then_finished(db, stages, done)


OBJECT = {
    "CREATE TABLE": "object_identity LIKE '%.{}'",
    "CREATE FUNCTION": "object_identity LIKE '%{}%'",
    "CREATE INDEX": "object_identity LIKE '%.{}'",
    "COMMENT": "object_identity LIKE '%.{}'",
    "ALTER TABLE": "object_identity LIKE '%prompt_snapshots'",
}


def test_promise_that_does_not_stand_is_rolled_back(db: Db, stages: list[str]) -> None:
    """Something undoes the step's work behind its back: the verification, in the same transaction, raises."""
    db.execute(
        TRAP.format(
            condition="TG_TAG = 'CREATE INDEX' AND to_regclass('idx_turn_metrics_created') IS NOT NULL",
            action="DROP INDEX idx_turn_metrics_created; ALTER TABLE turn_metrics DROP COLUMN model_ms",
            event="ddl_command_end",
        )
    )
    done = db.invoke("setup")
    db.execute(UNTRAP)
    assert done.code == 6, done  # no step adds a column to a turn_metrics that stands: it is in the way
    assert "turn_metrics.model_ms" in done.err
    assert db.dump() == stages[5]
    assert_whole_steps_then_finished(db, stages, done)
