"""How figures are told: as tables on stdout, which the README can take as they are, and as charts."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
import pygal
from budget_engine.postgres import embedded
from pygal.style import CleanStyle

_STYLE = CleanStyle(
    background="white",
    font_family="sans-serif",
    title_font_size=14,
    label_font_size=12,
    major_label_font_size=12,
    legend_font_size=12,
    value_font_size=11,
    value_colors=("#444444",) * 3,
    colors=("#d1495b", "#1b7f79", "#8a8a8a"),
)
_WIDTH, _ROW_HEIGHT, _FRAME_HEIGHT, _LINES_HEIGHT, _LAST_LABEL_WIDTH = 860, 42, 130, 400, 80

_ROUND = 10  # from here on figures are written without decimals

Series = Mapping[str, Sequence[float]]


def machine(server: str) -> str:
    """Where and when: figures say nothing without it."""
    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.machine()}"
    now = datetime.now(timezone.utc)
    return (
        f"{os.cpu_count()} cores ({_processor()}), {memory:.0f} GiB, {system}, "
        f"{server}, Python {platform.python_version()}, {now:%Y-%m-%d}"
    )


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", described.read_text()) if described.exists() else None
    return found[1] if found else platform.processor()


class Report:
    """Prints, and writes charts into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = "?"

    def begin(self, cluster: embedded.Cluster) -> None:
        """Say where and when; the charts repeat it."""
        with psycopg.connect(cluster.url) as connection:
            asked = "SELECT current_setting('server_version'), pg_jit_available() AND current_setting('jit')::boolean"
            version, jit = connection.execute(asked).fetchone() or ("?", False)
            self.machine = machine(f"PostgreSQL {version}, {'with' if jit else 'without'} JIT")
        self.say(self.machine)

    def say(self, line: str) -> None:
        """Print a line at once."""
        print(line, flush=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a Markdown table whose columns are aligned; all but the first to the right."""
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
        self.say("")
        for first, *others in (head, rule, *rows):
            cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
            self.say(f"| {' | '.join(cells)} |")
        self.say("")

    def chart(self, name: str, drawn: pygal.Graph) -> None:
        """Write a chart with the machine below its title."""
        self.folder.mkdir(parents=True, exist_ok=True)
        drawn.config.title += f"\n{self.machine}"
        file = self.folder / f"{name}.svg"
        picture = re.sub(rb"<script.*?</script>", b"", drawn.render(), flags=re.DOTALL)  # nothing is to move in it
        file.write_bytes(picture + b"\n")
        self.say(f"chart {file}")


def bar_chart(title: str, names: Sequence[str], series: Series, unit: str) -> pygal.Graph:
    """Horizontal bars, the first name on top."""
    height = _FRAME_HEIGHT + _ROW_HEIGHT * len(names)
    chart = pygal.HorizontalBar(**_look(title, unit), height=height, x_labels=names[::-1])
    return _filled(chart, {name: values[::-1] for name, values in series.items()})


def line_chart(title: str, names: Sequence[str], series: Series, unit: str) -> pygal.Graph:
    """Lines over names, on a logarithmic axis with a mark at each power of ten."""
    values = [value for line in series.values() for value in line]
    lowest, highest = (math.floor(math.log10(min(values) / 2)), math.ceil(math.log10(max(values))))
    marks = [10.0**power for power in range(lowest, highest + 1)]
    space = {"height": _LINES_HEIGHT, "margin_right": _LAST_LABEL_WIDTH}
    chart = pygal.Line(**_look(title, unit), **space, x_labels=names, logarithmic=True, y_labels=marks, dots_size=4)
    return _filled(chart, series)


def _look(title: str, unit: str) -> dict[str, object]:
    return {
        "title": title,
        "width": _WIDTH,
        "style": _STYLE,
        "js": (),
        "legend_at_bottom": True,
        "print_values": True,
        "print_values_position": "top",
        "value_formatter": lambda value: f"{value:.2g} {unit}" if value < _ROUND else f"{value:,.0f} {unit}",
    }


def _filled(chart: pygal.Graph, series: Series) -> pygal.Graph:
    for name, values in series.items():
        chart.add(name, list(values))
    return chart
