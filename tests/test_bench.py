"""The benchmarks come out with figures: what they are is theirs to say, and no test's to ask."""

from __future__ import annotations

import re
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from bench import fleet, traffic
from bench.load import Busy, Window
from bench.ways import WAYS, WHAT
from conftest import Db, Run, clean_environment, run
from versions import MAJOR


def bench(options: str, *words: str, out: Path) -> Run:
    environment = clean_environment() | {"TEST_POSTGRES": str(MAJOR)}
    command = [sys.executable, "-m", "invoke", "bench", *words, f"--options={options} --out={out}"]
    done = run(command, environment, timeout=600)
    assert done.code == 0, done
    return done


def charts(folder: Path) -> dict[str, str]:
    """The charts by name, with all that is written on them."""
    return {file.stem: "".join(ET.parse(file).getroot().itertext()) for file in folder.iterdir()}


def rows(done: Run, name: str) -> list[list[str]]:
    """The rows of that name in all tables, without it."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines() if line[:1] == "|"]
    return [cells for first, *cells in lines if first == name]


@pytest.mark.slow
def test_startup_is_measured_and_drawn(tmp_path: Path) -> None:
    done = bench("--rounds=1 --only=none", out=tmp_path)
    drawn = charts(tmp_path)
    assert set(drawn) == {"startup-direct", "startup-far"}
    for tool, round_trips in {"bare psycopg": ["5", "5"], "invoke setup": ["6", "5"]}.items():
        from_nothing, nothing_to_do = (cells[-1] for cells in rows(done, tool))
        looked = str(int(round_trips[0]) + 5)  # a watch's connection: after a second of silence, on a busy machine
        assert from_nothing in (round_trips[0], looked)
        assert nothing_to_do == round_trips[1]
        assert all(tool in text for text in drawn.values())
    assert re.search(r"^Peak memory of invoke setup from nothing: \d+ MB", done.out, re.M)


@pytest.mark.slow
def test_load_is_measured_and_drawn(tmp_path: Path) -> None:
    done = bench("--sizes=300 --slots=500 --baseline=0.5", "--load", out=tmp_path)
    drawn = charts(tmp_path)
    assert set(drawn) == {"load-waits", "load-wal"}
    assert all("300 rows" in text for text in drawn.values())
    for way in WAYS:
        [(_, *waits, _)] = rows(done, f"{way}: no step")
        for step in WHAT.values():
            (_, *waits_in_step, _), (_, *bytes_written) = rows(done, f"{way}: {step}")
            assert all(re.fullmatch(r"[\d,]+ / [\d,]+", wait) for wait in (*waits, *waits_in_step))
            assert all(re.fullmatch(r"-?[\d,]+\.\d", count) for count in bytes_written)


@pytest.mark.slow
def test_a_fleet_is_measured_beside_a_loop(tmp_path: Path) -> None:
    done = bench("--fleet=2", out=tmp_path)
    for way in fleet.WAYS:
        [cells] = rows(done, way)
        assert [bool(re.fullmatch(r"[\d.]+ (s|ms)", cell)) for cell in cells] == [True] * 4


def test_a_wait_is_recorded_whole_and_with_its_reason(db: Db) -> None:
    db.execute("CREATE TABLE slots (id int); INSERT INTO slots VALUES (1)")
    statements = {"slots read": ["SELECT FROM slots WHERE id = %(row)s"], "slots write": ["SELECT %(n)s"]}
    with traffic.running(db.url, statements, rows=1, rate=200) as around:
        time.sleep(0.2)
        with db.connect(autocommit=False) as holder:
            holder.execute("LOCK TABLE slots")
            begin = time.monotonic()
            time.sleep(0.3)
            end = time.monotonic()
            holder.rollback()
        time.sleep(0.1)
    held, before = Window(begin, end), Window(begin - 0.1, begin - 0.05)
    busy = Busy(before, {}, around.log)
    assert busy.longest(held, "slots read") > 0.25
    assert busy.longest(held, "slots write") < busy.longest(held, "slots read")
    assert busy.longest(before, "slots read") < 0.25
    assert busy.waited_for(held).startswith("Lock relation")
