"""The fleet: many databases, some of them bad in different ways, by a few workers."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import warm
from budget_engine.commands import fleet
from budget_engine.postgres.embedded import Cluster
from conftest import WAITING, Db, Run, assert_fails, clean_environment, database, ended, holding, template, until
from test_command_line import peer, stay_silent

COUNT = 50
TURNS_USED = "LOCK TABLE turns IN ROW EXCLUSIVE MODE"


@contextmanager
def pending(cluster: Cluster, count: int) -> Iterator[list[Db]]:
    """Databases that are finished but for turn_metrics, which is missing."""
    with ExitStack() as stack:
        made = [stack.enter_context(database(cluster, template(cluster))) for _ in range(count)]
        for db in made:
            db.execute("DROP TABLE turn_metrics")
        yield made


@pytest.fixture
def tenants(cluster: Cluster) -> Iterator[list[Db]]:
    with pending(cluster, 4) as made:
        yield made


def listed(folder: Path, *targets: str) -> str:
    file = folder / "targets"
    file.write_text("# the tenants\r\n\r\n" + "".join(f"{target}\r\n" for target in targets))
    return str(file)


def named(*tenants: Db) -> list[str]:
    return [f"tenant-{number}={db.url}" for number, db in enumerate(tenants)]


def asked(db: Db, *words: str, **env: str) -> tuple[Run, dict[str, dict[str, Any]]]:
    """Run a fleet with --format json; return the line of each target, by its label."""
    done = db.invoke("fleet", *words, "--format", "json", env=env)
    return done, {line["target"]: line for line in map(json.loads, done.out.splitlines())}


def has_metrics(db: Db) -> bool:
    return bool(db.value("SELECT to_regclass('turn_metrics') IS NOT NULL"))


def test_bad_ones_stop_none_of_the_others_and_the_next_run_does_what_is_left(cluster: Cluster, tmp_path: Path) -> None:
    with pending(cluster, COUNT - 2) as most, database(cluster) as empty:
        *good, conflict, locked = [empty, *most]
        conflict.execute("ALTER TABLE slots RENAME COLUMN must_keep TO kept; ALTER TABLE slots ADD must_keep text")
        secret = "postgresql://ada:open-sesame@127.0.0.1:1/nowhere"
        file = listed(tmp_path, f"far={secret}", *named(*good), f"wrong={conflict.url}", f"held={locked.url}")
        with holding(locked, TURNS_USED):
            done, lines = asked(good[0], "--targets", file, LOCK_WAIT="0", LOCK_TIMEOUT="50ms")
        assert done.code == 1, done
        assert {name: line["exit_code"] for name, line in lines.items() if line["exit_code"]} == {
            "far": 4,
            "wrong": 6,
            "held": 7,
        }
        assert len(lines) == COUNT
        assert re.findall("(?m)^error    (.*)", done.err) == [
            f"not every target ended well: {COUNT - 3} of {COUNT} did; exit 4: 1; exit 6: 1; exit 7: 1"
        ]
        assert "open-sesame" not in done.out + done.err
        assert [has_metrics(db) for db in (*good, locked)] == [True] * len(good) + [False]
        assert empty.differing() == {}

        file = listed(tmp_path, *named(*good[:3]), f"wrong={conflict.url}", f"held={locked.url}")
        again = good[0].invoke("fleet", "--targets", file, "--jobs", "2")
        assert_fails(again, 6, "4 of 5 did; exit 6: 1")
        assert has_metrics(locked)


def test_databases_and_schemas_by_pattern(cluster: Cluster) -> None:
    with database(cluster, template(cluster)) as db:
        db.execute('CREATE SCHEMA app_1; CREATE SCHEMA "App 2"; CREATE SCHEMA appx1')
        done, lines = asked(db, "--schemas", "app_*", "--schemas", "App ?")
        assert done.code == 0, done
        assert set(lines) == {"app_1", "App 2"}
        assert db.rows("SELECT schemaname FROM pg_tables WHERE tablename = 'turn_metrics' ORDER BY 1") == [
            ("App 2",),
            ("app_1",),
            ("public",),
        ]
        _, lines = asked(db, "--databases", f"{db.name[:-1]}?", "--task", "verify")
        assert [(name, line["exit_code"]) for name, line in lines.items()] == [(db.name, 0)]
        assert lines[db.name]["summary"].startswith("195 of 195 checks pass")


def test_canary_and_stop_after(tenants: list[Db], tmp_path: Path) -> None:
    bad = tenants[0]
    bad.execute("CREATE VIEW turn_metrics AS SELECT 1 AS turn_id")
    file = listed(tmp_path, *named(*tenants))
    done = bad.invoke("fleet", "--targets", file, "--canary", "1")
    assert_fails(done, 6, "0 of 4 did; exit 6: 1; 3 not begun")
    assert [has_metrics(db) for db in tenants[1:]] == [False] * 3
    done = bad.invoke("fleet", "--targets", file, "--stop-after", "1", "--jobs", "1")
    assert_fails(done, 6, "3 not begun")
    good = listed(tmp_path, *named(*tenants[1:]))
    assert bad.invoke("fleet", "--targets", good, "--canary", "1", "--jobs", "2").code == 0
    assert [has_metrics(db) for db in tenants[1:]] == [True] * 3


def test_parts_are_the_whole(finished: Db, tmp_path: Path) -> None:
    """Nobody is at home."""
    targets = {f"tenant-{number}": f"postgresql://postgres@127.0.0.1:1/{number}" for number in range(6)}
    file = listed(tmp_path, *map("=".join, targets.items()))
    parts = [asked(finished, "--targets", file, "--jobs", "1", "--part", f"{number}/3")[1] for number in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(targets)
    one = listed(tmp_path, finished.url)
    done = [finished.invoke("fleet", "--targets", one, "--part", f"{number}/3") for number in (1, 2, 3)]
    ends = sorted((run.code, run.out.splitlines()[-1][:15]) for run in done)
    assert ends == [(0, "done     0 of 0"), (0, "done     0 of 0"), (0, "done     1 of 1")]


def test_status_and_verify_say_what_is_missing(finished: Db, tmp_path: Path) -> None:
    finished.execute("DROP TABLE turn_metrics")
    file = listed(tmp_path, finished.url)
    for task in ("status", "verify"):
        done, lines = asked(finished, "--targets", file, "--task", task)
        assert done.code == 5, done
        [(label, line)] = lines.items()
        assert label.endswith(f"/{finished.name}")
        assert line["error"]["what"] == "something is still missing"


def test_those_that_take_too_long_are_stopped(tenants: list[Db], tmp_path: Path) -> None:
    """One that waits for a lock, and a server that never answers; their workers are replaced."""
    held, *others = tenants[:3]
    with peer(stay_silent) as port, holding(held, TURNS_USED):
        silent = f"silent=postgresql://postgres@127.0.0.1:{port}/x"
        file = listed(tmp_path, silent, *named(held, *others))
        done, lines = asked(held, "--targets", file, "--timeout", "4s", "--jobs", "2")
    assert done.code == 7, done
    codes = {name: line["exit_code"] for name, line in lines.items()}
    assert codes == {"silent": 7, "tenant-0": 7, "tenant-1": 0, "tenant-2": 0}
    assert [lines[late]["error"]["what"] for late in ("silent", "tenant-0")] == ["no end within 4 s"] * 2
    assert [has_metrics(db) for db in (held, *others)] == [False, True, True]


def test_nothing_is_left_half_way(tenants: list[Db], tmp_path: Path) -> None:
    file = listed(tmp_path, *named(*tenants))
    for end, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        with ExitStack() as stack:
            for db in tenants[:3]:
                stack.enter_context(holding(db, TURNS_USED))
            process = tenants[0].start("fleet", "--targets", file, "--jobs", "2")
            workers: list[psutil.Process] = []

            def are_at_work(process: Popen[str] = process, workers: list[psutil.Process] = workers) -> bool:
                workers[:] = psutil.Process(process.pid).children()
                return len(workers) == 2 and all(db.value(WAITING) for db in tenants[:2])

            until(are_at_work, process)
            os.kill(process.pid, end)
            done = ended(process)
            assert done.code == code, done
            assert "Traceback" not in done.err
            gone, alive = psutil.wait_procs(workers, timeout=30)
            assert (len(gone), alive) == (2, [])
        assert [has_metrics(db) for db in tenants] == [False] * len(tenants)
    assert tenants[0].invoke("fleet", "--targets", file, "--jobs", "2").code == 0
    assert [has_metrics(db) for db in tenants] == [True] * len(tenants)


def test_ctrl_c_while_the_workers_start(tenants: list[Db], tmp_path: Path) -> None:
    process = tenants[0].start("fleet", "--targets", listed(tmp_path, *named(*tenants)), "--jobs", "2")
    assert process.stdout
    assert process.stdout.readline().startswith("fleet ")
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert_fails(ended(process), 130)


def test_ctrl_c_finds_a_worker_that_is_being_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process does not exist yet; when it does, it is given no target, and nobody waits for it."""
    begun, interrupted = threading.Event(), threading.Event()
    made: list[Popen[str]] = []

    def slowly() -> Popen[str]:
        made.append(Popen([sys.executable, "-c", "input(); input()"], stdin=PIPE, stdout=PIPE, text=True))
        if len(made) > 1:
            begun.set()
            interrupted.wait()
        return made[-1]

    monkeypatch.setattr(fleet, "_started", slowly)
    worker = fleet._Worker("setup", None)
    made[0].kill()
    try:
        with ThreadPoolExecutor() as pool:
            member = fleet.Member("tenant", "", "")
            assert pool.submit(worker.work, member).result()["error"]["what"] == "its worker has died"
            working = pool.submit(worker.work, member)
            begun.wait()
            with pytest.raises(KeyboardInterrupt), fleet._let_go([worker]):
                raise KeyboardInterrupt
            interrupted.set()
            not_done = wait([working], timeout=5).not_done
            made[-1].kill()
            assert not_done == set()
    finally:
        for process in made:
            process.communicate()


REFUSED = {
    "": "there is no target",
    "{url}\n{url}": "targets are named twice",
    "a={url}\nb={url}": "targets are named twice",
    "embedded": "line 1 of ",
    "{url}\nmysql://root@x/y": "DATABASE_URL is no URL of PostgreSQL",
}
OPTIONS = ("--part 3/2", "--task recreate", "--timeout 5", "--schemas y", "--targets x")


def test_bad_lists_and_options_are_refused_before_anything_runs(db: Db, tmp_path: Path) -> None:
    file = tmp_path / "targets"
    for lines, says in REFUSED.items():
        file.write_text(lines.replace("{url}", db.url))
        assert_fails(db.invoke("fleet", "--targets", str(file)), 3, says)
    for words in ("", "--targets /nowhere/at/all", *(f"--databases x {words}" for words in OPTIONS)):
        assert_fails(db.invoke("fleet", *words.split()), 3)
    assert db.history() == []


def test_targets_from_stdin(finished: Db, tmp_path: Path) -> None:
    file = Path(listed(tmp_path, f"one={finished.url}"))
    with file.open() as stdin:
        process = warm.start(
            ("fleet", "--targets", "-", "--task", "verify"), clean_environment(), stdin=stdin, stdout=PIPE, stderr=PIPE
        )
    done = ended(process)
    assert (done.code, "1 of 1 targets ended well" in done.out) == (0, True), done
