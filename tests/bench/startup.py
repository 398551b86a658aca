"""What a run costs: setup from nothing and with nothing to do, near and far, against other ways to run the same SQL."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from budget_engine.migration.chain import ROOT
from budget_engine.postgres import embedded
from conftest import Db, clean_environment, database, private_server
from proxy import Proxy, socket_of
from versions import packaged

from bench.figures import Report, bar_chart
from bench.tools import FLOOR, OURS, Tool, all_tools

FAR_S = 0.05  # there and back
CASES = ("from nothing", "nothing to do")  # one after the other
PLACES = {"direct": 0.0, f"{FAR_S * 1000:.0f} ms away": FAR_S}

# A process of its own: a child is charged with what its parent occupied when it was made, and this one is small.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Figures:
    """What came out: seconds of each round, and round trips."""

    seconds: dict[tuple[str, str, str], list[float]]  # by tool, case and place
    round_trips: dict[tuple[str, str], int]  # by tool and case
    peak_bytes: int

    def median(self, tool: str, case: str, place: str) -> float:
        """The median of the rounds, in seconds."""
        return statistics.median(self.seconds[tool, case, place])


def run(rounds: int, only: Sequence[str] | None, report: Report) -> None:
    """Measure the tools (only: of the others, those whose names contain one of these), print tables, draw charts."""
    with private_server(binaries=packaged(), durable=True) as cluster, tempfile.TemporaryDirectory() as workshop:
        report.begin(cluster)
        wanted = ("",) if only is None else (FLOOR, OURS, *only)
        everything = all_tools(cluster.binaries / "psql", Path(workshop))
        tools = [tool for tool in everything if any(word in tool.name for word in wanted)]
        figures = _measure(cluster, [tool for tool in tools if tool.command], rounds)
    _print(figures, tools, rounds, report)
    _draw(figures, [tool.name for tool in tools if tool.command], report)


# ── measuring ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _measure(cluster: embedded.Cluster, tools: Sequence[Tool], rounds: int) -> Figures:
    seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    round_trips: dict[tuple[str, str], int] = {}
    for _ in range(rounds):  # interleaved, so that noise hits all alike
        for tool in tools:
            for place, delay_s in PLACES.items():
                with database(cluster) as db:
                    for case in CASES:
                        taken, trips = _timed(tool, db, delay_s)
                        seconds[tool.name, case, place].append(taken)
                        round_trips[tool.name, case] = trips or round_trips.get((tool.name, case), 0)
    with database(cluster) as empty:
        return Figures(seconds, round_trips, _peak(next(tool for tool in tools if tool.name == OURS), empty))


def _timed(tool: Tool, db: Db, delay_s: float) -> tuple[float, int | None]:
    """Run the tool; return seconds and, where it is far away, round trips."""
    if not delay_s:
        return _run(tool, db.url), None
    with Proxy(socket_of(db.cluster.sockets), delay_s=delay_s / 2) as proxy:
        taken = _run(tool, proxy.url(db.name))
    return taken, sum(conversation.round_trips for conversation in proxy.conversations)


def _run(tool: Tool, url: str) -> float:
    began = time.monotonic()
    done = _process(tool, url)
    taken = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{tool.name} failed:\n{done}")
    return taken


def _process(tool: Tool, url: str, *within: str) -> subprocess.CompletedProcess[str]:
    """Run a whole process, within a command; the tests' own commands fork from one that has imported Invoke."""
    assert tool.command is not None
    words, environment = [*within, *tool.command(url)], clean_environment() | {"DATABASE_URL": url}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def _peak(tool: Tool, db: Db) -> int:
    """Peak memory of a run, in bytes."""
    return int(_process(tool, db.url, sys.executable, "-ISc", _PEAK).stdout) * _MAXRSS_UNIT


# ── telling ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _print(figures: Figures, tools: Sequence[Tool], rounds: int, report: Report) -> None:
    report.say(f"Medians of {rounds} interleaved rounds, whole processes; ratio: to {FLOOR} in the same column.")
    for case in CASES:
        columns = [head for place in PLACES for head in (place, "ratio")]
        report.table([case, *columns, "round trips"], [[tool.name, *_cells(figures, tool, case)] for tool in tools])
    report.say(f"Peak memory of {OURS} from nothing: {figures.peak_bytes / 1e6:.0f} MB.")


def _cells(figures: Figures, tool: Tool, case: str) -> list[str]:
    if tool.command is None:
        return ["not installed", *[""] * (2 * len(PLACES))]
    cells = []
    for place in PLACES:
        median, floor = (figures.median(name, case, place) for name in (tool.name, FLOOR))
        cells += [f"{median:.2f} s", f"{median / floor:.1f}"]
    return [*cells, str(figures.round_trips[tool.name, case])]


def _draw(figures: Figures, names: Sequence[str], report: Report) -> None:
    for file, place in zip(("startup-direct", "startup-far"), PLACES, strict=True):
        series = {case: [figures.median(name, case, place) for name in names] for case in CASES}
        report.chart(file, bar_chart(f"The whole chain, server {place}", names, series, "s"))
