"""python -m pictures: run `invoke plan` on a terminal, and draw what stands there then, as SVG."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from conftest import Db, private_server
from states import with_uuid
from terminal import on_terminal

FILE = Path(__file__).with_name("plan.svg")
ROLE, DATABASE = "story", "game"
# 100 columns are 830 pixels wide, as GitHub shows a README. textLength keeps the columns where
# the reader's font is a wider one. Colours are those of GitHub's own pages; the picture follows the reader's scheme.
COLUMNS, CHARACTER, LINE, MARGIN = 100, 8.1, 18, 10
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 830 {height}" role="img" aria-label="invoke plan">
<style>
rect {{ fill: #f6f8fa; stroke: #d1d9e0 }}
text {{ fill: #1f2328; font: 13.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }}
.c32 {{ fill: #1a7f37 }} .c33 {{ fill: #9a6700 }}
@media (prefers-color-scheme: dark) {{
rect {{ fill: #151b23; stroke: #3d444d }}
text {{ fill: #d1d7e0 }}
.c32 {{ fill: #3fb950 }} .c33 {{ fill: #d29922 }}
}}
</style>
<rect x="0.5" y="0.5" width="829" height="{bottom}" rx="6"/>
{lines}
</svg>
"""


def drawn() -> str:
    """Return the picture of a database that was migrated half by hand, while somebody works on it."""
    with private_server(listen_addresses="127.0.0.1") as cluster:  # over loopback its URL is a short one
        db = Db(cluster, DATABASE)
        Db(cluster, "postgres").execute(f"CREATE ROLE {ROLE} LOGIN; GRANT pg_read_all_stats TO {ROLE}")
        Db(cluster, "postgres").execute(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        with db.connect(ROLE) as connection:
            connection.execute(with_uuid())
        url = f"postgresql://{ROLE}:not-for-your-eyes@127.0.0.1/{DATABASE}"
        db.invoke("prereqs", env={"DATABASE_URL": url})
        with db.connect(ROLE, autocommit=False) as connection:
            connection.execute("SET application_name = 'web'")
            connection.execute("UPDATE slots SET description = 'Edited' WHERE name = 'tone'")
            seen = on_terminal(db, "plan", columns=COLUMNS, url=url)
        return picture(["$ invoke plan", *seen.out.splitlines(), *seen.err.splitlines()])


def picture(lines: list[str]) -> str:
    """Draw these lines of a terminal, with their colours."""
    height = LINE * len(lines) + 2 * MARGIN
    texts = [_text(line, MARGIN + LINE * (number + 0.75)) for number, line in enumerate(lines)]
    return SVG.format(height=height, bottom=height - 1, lines="\n".join(texts))


def _text(line: str, baseline: float) -> str:
    length = len(re.sub(r"\x1b\[.*?m", "", line)) * CHARACTER
    text = escape(line, quote=False).replace(" ", "\N{NO-BREAK SPACE}")  # several others are drawn as one
    text = re.sub(r"\x1b\[([1-9;]+)m", lambda colour: f'<tspan class="c{colour[1].replace(";", "_")}">', text)
    text = text.replace("\x1b[0m", "</tspan>")
    return f'<text x="{MARGIN}" y="{baseline}" textLength="{length:.1f}">{text}</text>'


if __name__ == "__main__":
    FILE.write_text(drawn(), encoding="utf-8")
