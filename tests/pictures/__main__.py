"""python -m pictures: run each scene on a terminal, and draw what stands there then, as SVG."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from budget_engine.postgres import embedded
from conftest import Db, private_server
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from states import by_hand, with_uuid
from terminal import on_terminal

HERE = Path(__file__).parent
COLUMNS = 100
ROLE, DATABASE = "story", "game"
# Rich's template asks a server on the internet for a font: whoever looks at the README should not.
TEMPLATE = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)


@dataclass(frozen=True)
class Scene:
    """What stands in the database, and what is typed then; before: tasks that are run, unseen, first."""

    name: str
    state: str
    task: str
    before: str = ""
    busy: bool = False  # whether another session has a row of slots locked


SCENES = (
    Scene("setup", "", "setup"),
    Scene("plan", with_uuid(), "plan", before="prereqs", busy=True),
    Scene("status", by_hand("bigint") + "ALTER TABLE slots ADD min_chars int", "status", before="fix"),
    Scene("error", by_hand() + "ALTER TABLE slots ADD must_keep text", "setup"),
)  # fmt: skip


def draw(scene: Scene, cluster: embedded.Cluster) -> None:
    """Make the database, run the scene, write <name>.svg."""
    db = Db(cluster, DATABASE)
    administer = Db(cluster, "postgres")
    administer.execute(f"CREATE DATABASE {DATABASE} TEMPLATE template0 OWNER {ROLE}")
    try:
        with db.connect(ROLE) as connection:
            connection.execute(f"SET ROLE {ROLE};" + scene.state)
        url = f"postgresql://{ROLE}:not-for-your-eyes@127.0.0.1/{DATABASE}"
        if scene.before:
            db.invoke(*scene.before.split(), env={"DATABASE_URL": url})
        with _somebody_at_work(db) if scene.busy else _nobody():
            seen = on_terminal(db, *scene.task.split(), columns=COLUMNS, url=url)
        _write(scene, seen.out.replace("\r\n", "\n") + seen.err)
    finally:
        administer.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")


@contextmanager
def _somebody_at_work(db: Db) -> Iterator[None]:
    with db.connect(ROLE, autocommit=False) as connection:
        connection.execute("SET application_name = 'web'")
        connection.execute("UPDATE slots SET description = 'Edited' WHERE name = 'tone'")
        yield


@contextmanager
def _nobody() -> Iterator[None]:
    yield


def _write(scene: Scene, seen: str) -> None:
    console = Console(record=True, width=COLUMNS, file=Path("/dev/null").open("w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ ", style="bold") + Text(f"invoke {scene.task}"))
    console.print(Text.from_ansi(seen))
    svg = console.export_svg(title="", code_format=TEMPLATE, unique_id=scene.name)
    (HERE / f"{scene.name}.svg").write_text(svg + "\n", encoding="utf-8")
    print(f"{scene.name}.svg: invoke {scene.task}")


def main() -> None:
    """Draw every scene, each on a database of its own, reached over loopback so that its URL is a short one."""
    with private_server(listen_addresses="127.0.0.1") as cluster:
        Db(cluster, "postgres").execute(f"CREATE ROLE {ROLE} LOGIN; GRANT pg_read_all_stats TO {ROLE}")
        for scene in SCENES:
            draw(scene, cluster)


if __name__ == "__main__":
    main()
