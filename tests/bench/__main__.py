"""python -m bench [--load|--fleet]: what `invoke bench` runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import fleet, load, startup
from bench.figures import Report

CHARTS = Path(__file__).with_name("charts")


def _words(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    """Run one of the three benchmarks."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    add = parser.add_argument
    add("--load", action="store_true", help="the steps on tables of millions of rows, with readers and writers beside")
    add("--fleet", type=int, metavar="N", help="N databases, one after the other and by the fleet")
    add("--rounds", type=int, default=9, help="how often each tool runs setup")
    add(
        "--only",
        type=_words,
        help="tools to compare setup with, by parts of their names: psql,dbmate,… (all there are)",
    )
    add("--sizes", type=_words, default="10_000,1_000_000,10_000_000", help="rows of prompt_snapshots and of turns")
    add("--slots", type=int, default=2_000_000, help="rows of slots, at most twice as many as of the others")
    add("--baseline", type=float, default=30, help="seconds of traffic without a step, to compare with")
    add("--out", type=Path, default=CHARTS, help="the folder for the charts")
    given = parser.parse_args()
    report = Report(given.out)
    if given.load:
        sizes = [load.Size(rows, min(given.slots, 2 * rows), given.baseline) for rows in map(int, given.sizes)]
        load.run(sizes, report)
    elif given.fleet:
        fleet.run(given.fleet, report)
    else:
        startup.run(given.rounds, given.only, report)


if __name__ == "__main__":
    main()
