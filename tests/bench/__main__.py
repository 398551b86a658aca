"""python -m bench [--load]: what `invoke bench` runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import load, startup
from bench.figures import Report

CHARTS = Path(__file__).with_name("charts")


def _words(text: str) -> list[str]:
    return text.split(",")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", type=_words, default=None)
    parser.add_argument("--sizes", type=_words, default="10_000,1_000_000,10_000_000")
    parser.add_argument("--slots", type=int, default=2_000_000)
    parser.add_argument("--baseline", type=float, default=30)
    parser.add_argument("--out", type=Path, default=CHARTS)
    return parser.parse_args()


def main() -> None:
    """Run one of the two benchmarks."""
    given = _arguments()
    report = Report(given.out)
    if given.load:
        load.run(
            [load.Size(rows, min(given.slots, 2 * rows), given.baseline) for rows in map(int, given.sizes)], report
        )
    else:
        startup.run(given.rounds, given.only, report)


if __name__ == "__main__":
    main()
