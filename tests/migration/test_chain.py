"""What the chain's files are made of: steps, their order, their statements. No database."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from budget_engine import errors
from budget_engine.migration import chain, turn
from budget_engine.migration.checks import Check, Kind
from conftest import MIGRATIONS
from pglast import split

CHAIN = chain.load()
assert CHAIN.recreate
ALL = (CHAIN.recreate, *CHAIN.steps)  # with the alternative, which is run only where it is asked for
each_step = pytest.mark.parametrize("step", ALL, ids=lambda step: step.stem)


def folded(sql: str) -> str:
    return " ".join(re.sub(r"--[^\n]*|('(?:[^']|'')*')", lambda found: found[1] or "", sql).split())


def test_every_file_is_one_step() -> None:
    assert sorted(step.stem for step in ALL) == sorted(path.stem for path in MIGRATIONS.glob("*.sql"))


def test_the_order_is_that_of_the_names_but_for_what_comes_before_another() -> None:
    labels = [step.label for step in CHAIN.steps]
    assert labels == [
        "core_schema",
        "slots_templates",
        "prompt_snapshots",
        "fix_prompt_snapshots_turn_id",
        "slots_flags",
        "budget_report",
        "turn_metrics",
    ]
    assert {step.label: step.before for step in ALL if step.before} == {
        "slots_templates": "prompt_snapshots",
        "fix_prompt_snapshots_turn_id": "slots_flags",
    }
    assert {step.label: step.instead_of for step in ALL if step.instead_of} == {"recreate_core_schema": "core_schema"}


def test_tasks_share_the_chain_in_its_order() -> None:
    tasks = list(dict.fromkeys(step.task for step in CHAIN.steps))
    assert tasks == ["prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"]
    assert tuple(step for task in tasks for step in CHAIN.of(task)) == CHAIN.steps == CHAIN.of(None)


@each_step
def test_the_statements_are_those_that_postgres_sees(step: chain.Step) -> None:
    """All of them in their order, but BEGIN, SET LOCAL and COMMIT; where they begin; in which part they are."""
    text = re.sub(r"^\\.*$", "", (MIGRATIONS / f"{step.stem}.sql").read_text(), flags=re.M)
    every = [text[part] for part in split(text, only_slices=True)]
    own = [statement for statement in step.statements if statement.step == step.label]
    seen = [folded(sql) for sql in every]
    seen = [sql for sql in seen if sql and not re.match("BEGIN|COMMIT|SET LOCAL ", sql)]
    assert [folded(statement.text) for statement in own] == seen == [statement.flat for statement in own]
    lines = text.splitlines()
    assert [s.text.splitlines()[0] in lines[s.line - 1] for s in own] == [True] * len(own)
    commit = next(number for number, line in enumerate(lines, 1) if line == "COMMIT;")
    assert [s.concurrent for s in own] == [s.line > commit for s in own]


def test_recreate_holds_what_it_includes_but_not_their_concurrent_parts() -> None:
    assert CHAIN.recreate
    included = [s for s in CHAIN.recreate.statements if s.step != CHAIN.recreate.label]
    assert {s.step for s in included} == {"core_schema", "prompt_snapshots", "budget_report", "turn_metrics"}
    for step in (step for step in CHAIN.steps if step.label in {s.step for s in included}):
        inside = [s.text for s in step.statements if not s.concurrent]
        assert [s.text for s in included if s.step == step.label] == inside


@each_step
def test_label_file_and_checksum(step: chain.Step) -> None:
    assert re.fullmatch(r"[a-z_]+", step.label)
    assert step.stem.endswith(f"_{step.label}")
    file = MIGRATIONS / f"{step.stem}.sql"
    assert (chain.ROOT / step.file).samefile(file)
    assert step.checksum == hashlib.sha256(file.read_bytes()).hexdigest()


def test_checkout_with_crlf_is_the_same_chain(tmp_path: Path) -> None:
    shutil.copytree(chain.DB, tmp_path / "db")
    for path in tmp_path.rglob("*.sql"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert chain.load(tmp_path / "db") == CHAIN


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    shutil.copytree(chain.DB, tmp_path / "db")
    (tmp_path / "db" / "verify.sql").write_bytes(b"\xff")
    with pytest.raises(errors.RecipeError) as ended:
        chain.load(tmp_path / "db")
    assert ended.value.case is errors.CHECKOUT
    assert "verify.sql" in f"{ended.value.what}\n{ended.value.where}"


def test_the_verification_is_sent_without_comments() -> None:
    """But is otherwise what psql runs."""
    text = (chain.DB / "verify.sql").read_text()
    assert CHAIN.verification.startswith("WITH ")
    assert ";" not in re.sub(r"'(?:[^']|'')*'", "", CHAIN.verification)
    assert folded(CHAIN.verification) in folded(text)
    assert len(CHAIN.verification) < len(text)


@pytest.mark.parametrize(
    ("body", "kind", "name", "expected", "declared"),
    [
        ("id int PRIMARY KEY, n numeric(9, 2) DEFAULT 1", Kind.COLUMN, "n", "numeric(9,2)", True),
        ("id int PRIMARY KEY, n numeric(9, 2) DEFAULT 1", Kind.COLUMN, "2", "", False),
        ("id int PRIMARY KEY, n text DEFAULT 'a, m text'", Kind.COLUMN, "m", "text", False),
        ("id int PRIMARY KEY, n text DEFAULT '(', m text", Kind.COLUMN, "m", "text", True),
        ("id int PRIMARY KEY, n int", Kind.KEY, "id", "PRIMARY KEY", True),
        ("id int PRIMARY KEY, n int", Kind.KEY, "n", "UNIQUE", False),
        ("id int, n int UNIQUE", Kind.KEY, "n", "UNIQUE", True),
        ("id int, n int, CONSTRAINT uk UNIQUE (id, n)", Kind.KEY, "id, n", "UNIQUE", True),
        ("id int REFERENCES u (id), n int", Kind.FOREIGN_KEY, "id", "REFERENCES u(id)", True),
        ("id int REFERENCES u (id), n int", Kind.FOREIGN_KEY, "n", "REFERENCES u(id)", False),
        ("id int, n int", Kind.INDEX, "n", "btree (n)", False),
        ("id int, n int", Kind.TABLE, "", "table", True),
    ],
)
def test_what_the_body_of_a_table_declares(body: str, kind: Kind, name: str, expected: str, declared: bool) -> None:
    text = f"CREATE TABLE IF NOT EXISTS t ({body})"
    statement = chain.Statement("a_step", text, 1, concurrent=False)
    check = Check("a_step", kind, "t", name, expected, None, "a_step", required=True, found=None)
    assert statement.new_table == "t"
    assert statement.declares(check) == declared
    assert not statement.declares(replace(check, table="u"))


def test_advisory_locks_are_two_positive_integers() -> None:
    assert 0 < turn.RUN < turn.BUILD < 2**31
