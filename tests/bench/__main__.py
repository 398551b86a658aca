"""python -m bench [--load]: what `invoke bench` runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import load, startup
from bench.figures import Report

CHARTS = Path(__file__).with_name("charts")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--slots", type=int, default=load.SLOTS)
    parser.add_argument("--baseline", type=float, default=30)
    parser.add_argument("--out", type=Path, default=CHARTS)
    return parser.parse_args()


def main() -> None:
    """Run one of the two benchmarks."""
    given = _arguments()
    report = Report(given.out)
    if given.load:
        load.run(given.sizes or load.SIZES, given.slots, given.baseline, report)
    else:
        startup.run(given.rounds, report)


main()
