"""What is printed acts on nothing: no terminal, no psql, no log of a CI, whatever the names of others hold."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from budget_engine.output import console
from budget_engine.spelling import lines, respelled, shown
from conftest import SEED, TRAP, Db, Run, holding
from psycopg import sql
from states import altered, random_name, strange_names, with_uuid
from terminal import on_terminal, pasted

# What a line must not begin with, or hold: commands of GitHub's runner, of psql, what a name says in a line of its own.
ACTS = re.compile(r"\s*(::|\\!|FORGED)|.*##\[")
OURS = re.compile(r"^::(error|notice) (file=db/migrations/\w+\.sql,)?title=\w+::", re.M)
COLOURS = re.compile("\x1b\\[[0-9;]*m|\r(?=\n)|\r\x1b\\[K")  # what we send to a terminal
STRANGE = "s\r\n::error::x\n FORGED\\! touch made_by_a_name;\u202e##[error]\x1b[2K"
WORDS = (
    "verify --verbose",
    "verify --format json",
    "verify --format github",
    "verify --remedies",
    "status",
    "status --format json",
    "plan",
    "plan --format json",
    "plan --sql",
    "doctor",
    "rehearse",
    "setup",
)


def quoted(name: str) -> str:
    return sql.Identifier(name).as_string()


def acting(text: str) -> list[str]:
    """Return the lines that act on something; a CR was read as a line's end."""
    return [line for line in text.split("\n") if not line.isprintable() or ACTS.match(line)]


def asked(db: Db, words: str, folder: Path, env: dict[str, str] | None = None) -> Run:
    """Run a task, and look at each line of it."""
    page = folder / "summary.md"
    done = db.invoke(*words.split(), env={"GITHUB_STEP_SUMMARY": str(page)} | (env or {}))
    assert "Traceback" not in done.err, done
    assert acting(OURS.sub("", done.out) if "github" in words else done.out) == [], words
    assert acting(done.err) == [], words
    if "json" in words:
        json.loads(done.out)
    if page.exists():
        assert acting(page.read_text()) == []
        assert all(re.match("    |###|$", line) for line in page.read_text().split("\n"))
        page.unlink()
    return done


def test_ten_thousand_names_are_what_they_were(db: Db) -> None:
    """As the server reads them: names as columns, literals as values, within a body of dollar quotes, too."""
    chance = random.Random(12)
    names = [random_name(chance) for _ in range(10_000)]
    assert [name for name in names if acting(f"x{shown(name)}") or "\n" in lines([name])] == []
    assert [name for name in names if json.loads(shown(json.dumps(name, ensure_ascii=False))) != name] == []
    with db.connect() as connection:
        for first in range(0, len(names), 1600):
            some = names[first : first + 1600]
            written = respelled("SELECT " + ", ".join(f"0 AS {quoted(name)}" for name in some))
            assert acting(written) == []
            columns = connection.execute(written.encode()).description or ()
            assert [column.name for column in columns] == some
        for written in (
            respelled("VALUES " + ", ".join(f"({sql.Literal(name).as_string()})" for name in names)),
            respelled("VALUES " + ", ".join("('{}')".format(name.replace("'", "''")) for name in names)),
        ):
            assert acting(written) == []
            assert [name for (name,) in connection.execute(written.encode())] == names
        tag = "$of these names$".replace(" ", "_")
        body = "".join(f"PERFORM {sql.Literal(name).as_string()} AS {quoted(name)};\n" for name in names[:500])
        connection.execute(respelled(f"DO {tag} BEGIN {body} END {tag}", kept="\n").encode())


@contextmanager
def strange_role(db: Db) -> Iterator[str]:
    """A role of a strange name that may write turns and owns slots, and brings a limit along."""
    name = f"{db.name[-6:]}\r\\! touch made_by_a_name;\n FORGED##[x"
    role = quoted(name)
    db.execute(f"CREATE ROLE {role} LOGIN; GRANT INSERT ON turns TO {role}; ALTER TABLE slots OWNER TO {role}")
    db.execute(f"ALTER ROLE {role} SET session_replication_role = replica")
    try:
        yield name
    finally:
        db.execute(f"REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}; DROP ROLE {role}")


def test_names_of_others_act_on_nothing(db: Db, tmp_path: Path) -> None:
    """Of schemas, tables, views, policies, indexes, constraints and roles, as every task and format prints them."""
    print(f"FAULT_SEED={SEED}")
    names = list(dict.fromkeys(strange_names(random.Random(SEED), 182)))
    db.execute(f"CREATE SCHEMA {quoted(STRANGE)}; ALTER DATABASE {db.name} SET search_path = {quoted(STRANGE)}")
    state = with_uuid() + "ALTER TABLE slots ADD must_keep text; ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name;"
    kinds = (
        "CREATE VIEW {0} AS SELECT turn_id AS {0} FROM prompt_snapshots",
        "CREATE POLICY {0} ON prompt_snapshots USING (turn_id IS NULL)",
        "ALTER TABLE prompt_snapshots ADD CONSTRAINT {0} CHECK (turn_id <> id)",
        "CREATE MATERIALIZED VIEW {0} AS SELECT turn_id FROM prompt_snapshots LIMIT 0",
        "CREATE SCHEMA {0}; CREATE TABLE {0}.turns ()",
        "COMMENT ON COLUMN prompt_snapshots.turn_id IS {1}; CREATE INDEX {0} ON prompt_snapshots (turn_id)",
    )
    made: list[str] = []
    for number, name in enumerate(names):
        for kind in range(6) if number < 18 else [number % 6]:
            made.append(f"{kind}{name}".encode()[:63].decode(errors="ignore"))
            state += kinds[kind].format(quoted(made[-1]), sql.Literal(name).as_string()) + ";"
    db.execute(state)
    with strange_role(db) as role:
        theirs = {"DATABASE_URL": db.url_as(quote(role, safe=""))}
        for words in WORDS:
            asked(db, words, tmp_path)
        for words in ("verify", "doctor"):
            asked(db, words, tmp_path, theirs)
        for words in ("verify", "status", "plan"):
            seen = COLOURS.sub("", on_terminal(db, words, columns=60).out).split("\n")
            assert [line for line in seen if not line.isprintable() or re.match(r"\s*\\!", line)] == []
        steps = json.loads(db.invoke("verify", "--format", "json").out)["steps"]
        told = " ".join(str(check["actual"]) for step in steps for check in step["checks"])
        forms = ((name, name.replace('"', '""')) for name in made if name[0] in "0123")  # those that hang on turn_id
        assert [both[0] for both in forms if not any(form in told for form in both)] == []


def test_what_the_server_says_acts_on_nothing(db: Db, tmp_path: Path) -> None:
    """Messages, details and notices of an event trigger; the role and the query of a session that holds a lock."""
    db.execute(altered(""))
    said = sql.Literal(STRANGE.replace("FORGED", "")).as_string()  # a message may have lines of its own
    query = f"LOCK TABLE slots IN SHARE MODE /* {STRANGE} */"
    with strange_role(db) as role, holding(db, query, quote(role, safe="")):
        assert "is idle in transaction" in asked(db, "plan", tmp_path).out
        done = asked(db, "setup", tmp_path, {"LOCK_WAIT": "1s", "LOCK_TIMEOUT": "200ms"})
        assert (done.code, "LOCK TABLE" in done.err) == (7, True), done
    raised = (
        f"RAISE NOTICE USING MESSAGE = {said}; RAISE EXCEPTION USING MESSAGE = {said}, DETAIL = {said}, HINT = {said}"
    )
    db.execute(TRAP.format(condition="true", action=raised))
    done = asked(db, "setup", tmp_path)
    assert (done.code, "touch made_by_a_name" in done.out, "touch made_by_a_name" in done.err) == (1, True, True), done


def test_what_a_break_brings_to_a_lines_beginning_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    comment = " " * 9 + f"-- view {'v ' * 30}; CREATE TABLE x (): left to its owner"
    assert console._fitted(comment) == [comment]
    parts = console._fitted("error    " + r"very long words    \! touch x   " * 9)
    assert len(parts) > 1
    assert [part for part in parts if part.lstrip().startswith("\\")] == []


TURN_ID = """
SELECT format_type(atttypid, -1), col_description(attrelid, attnum) FROM pg_attribute
WHERE attname = 'turn_id' AND attrelid = 'prompt_snapshots'::regclass"""


def test_an_undo_is_pasted_as_it_was_printed(db: Db, tmp_path: Path) -> None:
    """In a schema of a strange name; the comment that comes back is as strange."""
    comment = sql.Literal(STRANGE).as_string()
    db.execute(f"CREATE SCHEMA {quoted(STRANGE)}; ALTER DATABASE {db.name} SET search_path = {quoted(STRANGE)}")
    db.execute(with_uuid() + f"COMMENT ON COLUMN prompt_snapshots.turn_id IS {comment}")
    said = asked(db, "setup", tmp_path).out
    assert (db.differing(), db.value(TURN_ID)) == ({}, "bigint")
    pasted(db, tmp_path, "\n".join(re.findall("^ +((?:BEGIN|ALTER|COMMENT|COMMIT).*;)$", said, re.M)))
    assert db.rows(TURN_ID) == [("uuid", STRANGE)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("home", [STRANGE, "a$locks$b$guard$c$history$d$verification$ '"])
def test_a_plan_is_piped_as_it_was_printed(db: Db, tmp_path: Path, home: str) -> None:
    db.execute(f"CREATE SCHEMA {quoted(home)}; ALTER DATABASE {db.name} SET search_path = {quoted(home)}")
    db.execute(with_uuid())
    (tmp_path / "plan.sql").write_text(asked(db, "plan --sql", tmp_path).out)
    assert asked(db, "rehearse", tmp_path).code == 0
    done = db.psql("-f", str(tmp_path / "plan.sql"))
    assert (done.code, db.differing()) == (0, {}), done
    assert db.transactions() != []


def test_remedies_are_pasted_as_they_were_printed(db: Db, tmp_path: Path) -> None:
    """Those of conflicts, as a terminal shows them and as verify --remedies does, of status and of the doctor."""
    names = strange_names(random.Random(12))
    (tmp_path / "control").mkdir()
    pasted(db, tmp_path / "control", f"-- view {names[0]}: left to its owner\n")
    assert (tmp_path / "control" / "made_by_a_name").exists(), "nothing else would be shown by this test"
    db.execute(with_uuid() + "ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name")
    for name in names:
        db.execute(f"CREATE MATERIALIZED VIEW {quoted(name)} AS SELECT turn_id FROM prompt_snapshots LIMIT 0")
        db.execute(f"CREATE VIEW {quoted('v' + name[:40])} AS SELECT turn_id AS {quoted(name)} FROM prompt_snapshots")
    conflicts = [on_terminal(db, words) for words in ("verify", "plan")]
    assert all("no command restores it" in done.err for done in conflicts)
    pasted(db, tmp_path, "".join(COLOURS.sub("", done.out) + done.err for done in conflicts))
    pasted(db, tmp_path, db.invoke("verify", "--remedies").out)
    assert [check.title for check in db.checks() if check.conflict] == []
    assert db.invoke("setup").code == 0
    with strange_role(db) as role:
        theirs = {"DATABASE_URL": db.url_as(quote(role, safe=""))}
        text = db.invoke("status").out + db.invoke("doctor", env=theirs).out
        pasted(db, tmp_path, "\n".join(re.findall(" ((?:GRANT|ALTER) .*;)$", text, re.M)))
        oid = f"(SELECT oid FROM pg_roles WHERE rolname = {sql.Literal(role).as_string()})"
        assert db.value(f"SELECT has_table_privilege({oid}, 'turn_metrics', 'INSERT')")
        put_right = f"SELECT setconfig FROM pg_db_role_setting WHERE setrole = {oid}"
        assert db.value(put_right) == ["session_replication_role=origin"]
    assert [path.name for path in tmp_path.iterdir()] == ["control"]
    assert db.value("SELECT to_regclass('made_by_a_name')") is None
