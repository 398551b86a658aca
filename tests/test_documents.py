"""The documents: every command that they show is run, and prints what they show; their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from budget_engine.migration.chain import ROOT
from budget_engine.postgres import embedded
from conftest import Db, Run, clean_environment, run
from invoke.vendor import yaml
from pictures import __main__ as pictures
from versions import MAJOR

DOCUMENTS = {
    str(file.relative_to(ROOT)): file.read_text("utf-8") for file in (*ROOT.glob("*.md"), *ROOT.glob("d*/*.md"))
}
# A section's console: what the database has before its first command.
CONSOLES = {
    ("README.md", "Two commands"): None,  # the embedded server, made anew
    ("README.md", "Exit codes"): "ALTER TABLE slots DROP must_keep CASCADE; ALTER TABLE slots ADD must_keep text",
    ("README.md", "Looking first"): "DROP TABLE turn_metrics; ALTER TABLE prompt_snapshots DROP budget_report;"
    "ALTER TABLE slots DROP must_keep CASCADE, DROP min_chars CASCADE",
    ("docs/troubleshooting.md", "Troubleshooting"): "",  # an empty one, which the role ada may not create anything in
}
# Spelled as the documents spell them; each is a process of its own.
SHELL = """
invoke() { {python} -m invoke "$@"; }
budget-engine() { PYTHONPATH=scripts {python} -m budget_engine "$@"; }
python3() { shift; {python} -X ran_as="python3 scripts/inv" -m invoke "$@"; }
set -o pipefail
"""


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each section."""
    yield from re.findall(r"^#+ (.*)\n((?:(?!#+ )(?:```(?:.|\n)*?```\n|.*\n))*)", text, re.M)


def consoles() -> dict[tuple[str, str], str]:
    found = {}
    for file, text in DOCUMENTS.items():
        for title, body in sections(text):
            if block := "".join(re.findall(r"```console\n(.*?)```", body, re.S)):
                found[file, title] = block
    return found


def commands(block: str) -> list[tuple[str, str]]:
    """Return each command of a console, with what it prints."""
    parts = re.split(r"^\$ ((?:.*\\\n)*(?:for .*\n(?:  .*\n)*|.*\n))", block, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def as_shown(text: str) -> list[str]:
    """Leave out what is another one's on each machine and in each run: places, versions, durations, who took part."""
    text = re.sub(r"^scripts/inv: .*\n", "", text, flags=re.M)
    text = re.sub(r"\b(target|ok +python|ok +login|ok +server|ok +schema) .*", r"\1", text)
    text = re.sub(r"database \S+ on (?!the embedded)(.*?), schema", "database on server, schema", text)
    return re.sub(r" +\d+(\.\d+)? ms", " N ms", text).rstrip().splitlines()


def sh(db: Db, command: str, **env: str) -> Run:
    nowhere = str(db.cluster.data / "nowhere")  # this checkout may have an embedded server: setup may have been run
    environment = clean_environment() | {"DATABASE_URL": db.url, embedded.DATA_VARIABLE: nowhere} | env
    environment["PATH"] = f"{db.cluster.binaries}:{environment['PATH']}"
    shell = SHELL.replace("{python}", shlex.quote(sys.executable))
    return run(["bash", "-c", shell + command], environment, cwd=ROOT)


def test_readme_is_read_in_ten_minutes() -> None:
    assert len(DOCUMENTS["README.md"].splitlines()) <= 200


def test_every_console_is_run() -> None:
    assert sorted(consoles()) == sorted(CONSOLES)


@pytest.mark.parametrize("place", CONSOLES, ids="-".join)
def test_what_a_console_shows_is_printed(place: tuple[str, str], db: Db, finished: Db) -> None:
    with prepared(CONSOLES[place], db, finished) as (on, env):
        for command, shown in commands(consoles()[place]):
            done = sh(on, command, **env)
            order = sorted if " | " in command else list  # two write to the terminal at once
            assert order(as_shown(done.out + done.err)) == order(as_shown(shown)), command


@contextmanager
def prepared(state: str | None, db: Db, finished: Db) -> Iterator[tuple[Db, dict[str, str]]]:
    """Bring about the state; yield the database, and what leads the commands there."""
    if state:
        finished.execute(state)
        yield finished, {}
    elif state is None:
        home = Path(tempfile.mkdtemp(prefix="be-"))  # short, and open to the user that the server runs as
        home.chmod(0o755)
        env = {"DATABASE_URL": "embedded", embedded.DATA_VARIABLE: str(home)}
        yield db, env
        assert sh(db, "invoke db.stop", **env).code == 0
        shutil.rmtree(home)
    else:
        db.execute("CREATE ROLE ada LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        yield db, {"DATABASE_URL": f"{db.url_as('ada')}&pgbouncer=true"}
        db.execute("DROP ROLE ada")


@pytest.mark.skipif(MAJOR != 18, reason="the picture names PostgreSQL 18")
def test_picture_shows_what_is_printed() -> None:
    def words(svg: str) -> list[str]:  # without numbers, and wherever lines break
        return re.sub(r"\d[\d,.]*", "N", re.sub("<.*?>", " ", svg.partition("<rect")[2])).split()

    assert words(pictures.drawn()) == words(pictures.FILE.read_text("utf-8"))


def test_commands_without_output_run(db: Db) -> None:
    db.execute("CREATE SCHEMA app_1")
    db.execute("CREATE DATABASE tenant_1")
    blocks = [block for text in DOCUMENTS.values() for block in re.findall(r"```sh\n(.*?)```", text, re.S)]
    assert blocks
    for block in blocks:
        listed = block.replace("<tenants", f"<<<'one={db.url}'")
        done = sh(db, "set -e\n" + listed)
        assert done.code == 0, done
    db.execute("DROP DATABASE tenant_1 WITH (FORCE)")


def test_workflows_and_jobs_run(db: Db) -> None:
    """Of each the commands, as their machine would run them; CONTRIBUTING says how the rest of them is validated."""
    for block in [block for text in DOCUMENTS.values() for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]:
        document = yaml.safe_load(block)  # type: ignore[no-untyped-call]
        if document.get("kind") == "Job":
            ran = [container["command"][-1] for container in document["spec"]["template"]["spec"]["containers"]]
        else:
            ran = [step["run"] for job in document["jobs"].values() for step in job["steps"] if "run" in step]
        assert ran
        for command in ran:
            here = command.replace("${{ matrix.part }}", "1/4").replace("/secrets/targets", '<(echo "$TARGETS")')
            done = sh(db, here, CI="true", TARGETS=f"one={db.url}", JOB_COMPLETION_INDEX="0")
            assert done.code == 0, done


def test_links_lead_somewhere() -> None:
    broken = []
    for file, text in DOCUMENTS.items():
        for link in re.findall(r"\]\((?!https?:)([^)]*)\)", text):
            path, _, anchor = link.partition("#")
            target = (ROOT / file).parent / path if path else ROOT / file
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M) if target.suffix == ".md" else []
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            if not target.exists() or (anchor and anchor not in anchors):
                broken.append((file, link))
    assert broken == []
