"""The table: rows drawn for a terminal, whatever its width, by rich. Nobody else needs rich to be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {"done": "green", "half done": "yellow", "pending": "yellow", "in the way": "bold red", "not needed": "dim"}


def draw(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the lines of a table; width: of the terminal, in columns. NO_COLOR and TERM=dumb are respected."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, title in enumerate(header):
        table.add_column(title, no_wrap=position == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console = Console(file=StringIO(), force_terminal=True, width=width)
    with console.capture() as drawn:
        console.print(table)
    return [line.rstrip() for line in drawn.get().splitlines()]
