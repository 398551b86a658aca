"""The fleet: many databases, some of them bad in different ways, by a few workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from budget_engine.postgres.embedded import Cluster
from conftest import Db, Run, assert_fails, clean_environment, database, ended, holding, template, until
from test_command_line import peer, stay_silent

COUNT = 50


@pytest.fixture
def tenants(cluster: Cluster) -> Iterator[list[Db]]:
    """A few databases, finished but for turn_metrics, which is missing."""
    with ExitStack() as stack:
        made = [stack.enter_context(database(cluster, template(cluster))) for _ in range(6)]
        for db in made:
            db.execute("DROP TABLE turn_metrics")
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
    with ExitStack() as stack:
        good = [stack.enter_context(database(cluster)) for _ in range(COUNT - 3)]
        conflict, locked = (stack.enter_context(database(cluster, template(cluster))) for _ in range(2))
        conflict.execute("ALTER TABLE slots RENAME COLUMN must_keep TO kept; ALTER TABLE slots ADD must_keep text")
        locked.execute("DROP TABLE turn_metrics")
        secret = "postgresql://ada:open-sesame@127.0.0.1:1/nowhere"
        file = listed(tmp_path, f"far={secret}", *named(*good), f"wrong={conflict.url}", f"held={locked.url}")
        with holding(locked, "LOCK TABLE turns IN ROW EXCLUSIVE MODE"):
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
        assert [db.differing() for db in good] == [{}] * len(good)

        file = listed(tmp_path, *named(*good), f"wrong={conflict.url}", f"held={locked.url}")
        again = good[0].invoke("fleet", "--targets", file)
        assert_fails(again, 6, f"{COUNT - 2} of {COUNT - 1} did; exit 6: 1")
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
    assert_fails(done, 6, "0 of 6 did; exit 6: 1; 5 not begun")
    assert [has_metrics(db) for db in tenants[1:]] == [False] * 5
    done = bad.invoke("fleet", "--targets", file, "--stop-after", "1", "--jobs", "1")
    assert_fails(done, 6, "5 not begun")
    good = listed(tmp_path, *named(*tenants[1:]))
    assert bad.invoke("fleet", "--targets", good, "--canary", "1").code == 0
    assert [has_metrics(db) for db in tenants[1:]] == [True] * 5


def test_parts_are_the_whole(tenants: list[Db], tmp_path: Path) -> None:
    file = listed(tmp_path, *named(*tenants))
    parts = [set(asked(tenants[0], "--targets", file, "--task", "plan", "--part", f"{n}/3")[1]) for n in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == [f"tenant-{number}" for number in range(6)]
    one = listed(tmp_path, tenants[0].url)
    done = [tenants[0].invoke("fleet", "--targets", one, "--part", f"{number}/3") for number in (1, 2, 3)]
    assert sorted((run.code, run.out.splitlines()[-1][:15]) for run in done) == [(0, "done     0 of 0")] * 2 + [
        (0, "done     1 of 1")
    ]


def test_status_and_verify_say_what_is_missing(tenants: list[Db], tmp_path: Path) -> None:
    file = listed(tmp_path, tenants[0].url)
    for task in ("status", "verify"):
        done, lines = asked(tenants[0], "--targets", file, "--task", task)
        assert done.code == 5, done
        [(label, line)] = lines.items()
        assert label.endswith(f"/{tenants[0].name}")
        assert line["error"]["what"] == "something is still missing"


def test_one_that_takes_too_long_is_stopped(tenants: list[Db], tmp_path: Path) -> None:
    held, *others = tenants[:3]
    file = listed(tmp_path, *named(held, *others))
    with holding(held, "LOCK TABLE turns IN ROW EXCLUSIVE MODE"):
        done, lines = asked(held, "--targets", file, "--timeout", "4s", "--jobs", "1")
    assert done.code == 7, done
    assert {name: line["exit_code"] for name, line in lines.items()} == {"tenant-0": 7, "tenant-1": 0, "tenant-2": 0}
    assert lines["tenant-0"]["error"]["what"] == "no end within 4 s"
    assert [has_metrics(db) for db in (held, *others)] == [False, True, True]


def test_a_server_that_never_answers_is_given_up(tenants: list[Db], tmp_path: Path) -> None:
    with peer(stay_silent) as port:
        file = listed(tmp_path, f"silent=postgresql://postgres@127.0.0.1:{port}/x", *named(*tenants[:2]))
        done, lines = asked(tenants[0], "--targets", file, "--timeout", "4s", "--jobs", "1")
    assert done.code == 7, done
    assert {name: line["exit_code"] for name, line in lines.items()} == {"silent": 7, "tenant-0": 0, "tenant-1": 0}


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_nothing_is_left_half_way(tenants: list[Db], tmp_path: Path, end: signal.Signals) -> None:
    file = listed(tmp_path, *named(*tenants))
    with ExitStack() as stack:
        for db in tenants[:4]:
            stack.enter_context(holding(db, "LOCK TABLE turns IN ROW EXCLUSIVE MODE"))
        process = tenants[0].start("fleet", "--targets", file, "--jobs", "2")
        workers: list[psutil.Process] = []

        def are_at_work() -> bool:
            workers[:] = psutil.Process(process.pid).children()
            return len(workers) == 2 and all(waits(db) for db in tenants[:2])

        until(are_at_work, process)
        os.kill(process.pid, end)
        done = ended(process)
        assert done.code == (130 if end is signal.SIGINT else -signal.SIGKILL), done
        assert "Traceback" not in done.err
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert (len(gone), alive) == (2, [])
    assert tenants[0].invoke("fleet", "--targets", file).code == 0
    assert [has_metrics(db) for db in tenants] == [True] * len(tenants)


def waits(db: Db) -> bool:
    return bool(
        db.value(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'budget-engine-recipes'"
            " AND datname = current_database()"
        )
    )


REFUSED = {
    "no target": ("", "there is no target"),
    "twice": ("{url}\n{url}", "targets are named twice"),
    "twice under two names": ("a={url}\nb={url}", "targets are named twice"),
    "embedded": ("embedded", "line 1 of "),
    "no URL": ("{url}\nmysql://root@x/y", "DATABASE_URL is no URL of PostgreSQL"),
}


@pytest.mark.parametrize(("lines", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_lists_are_refused_before_anything_runs(db: Db, tmp_path: Path, lines: str, says: str) -> None:
    (tmp_path / "targets").write_text(lines.replace("{url}", db.url))
    assert_fails(db.invoke("fleet", "--targets", str(tmp_path / "targets")), 3, says)
    assert db.history() == []


@pytest.mark.parametrize(
    "words",
    [
        ("--databases", "x", "--part", "3/2"),
        ("--databases", "x", "--task", "recreate"),
        ("--databases", "x", "--timeout", "5"),
        ("--databases", "x", "--schemas", "y"),
        ("--targets", "/nowhere/at/all"),
        (),
    ],
    ids=" ".join,
)
def test_bad_options(db: Db, words: tuple[str, ...]) -> None:
    assert_fails(db.invoke("fleet", *words), 3)


def test_targets_from_stdin(finished: Db) -> None:
    done = subprocess.run(
        ["python3", "scripts/inv", "fleet", "--targets", "-", "--task", "verify"],
        input=f"one={finished.url}\n",
        env=clean_environment() | {"CI": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    assert "1 of 1 targets ended well" in done.stdout
