"""The lint of the SQL: PostgreSQL's own parser reads every file (rules: README, "Changing the SQL")."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from budget_engine.migration import chain
from conftest import MIGRATIONS
from pglast import ast, parse_sql
from pglast.parser import scan

STEPS = (*chain.load(), chain.load_recreate())
FILES = sorted(MIGRATIONS.parent.rglob("*.sql"))
BODY = re.compile(r"(\$(?:migration|body|function)\$)(.*?)\1", re.S)


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_text_is_clean(path: Path) -> None:
    text = path.read_bytes().decode()
    assert "\r" not in text
    assert "\t" not in text
    assert text.endswith((";\n", "\\gexec\n"))
    assert [line for line in text.split("\n") if line != line.rstrip()] == []
    assert text.startswith(f"-- {path.stem}: ")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_keywords_are_upper_case(path: Path) -> None:
    text = path.read_text().replace("\\gexec", ";")
    assert [word for part in (text, *(body for _, body in BODY.findall(text))) for word in _lower_keywords(part)] == []


def _lower_keywords(text: str) -> list[str]:
    words = [text[t.start : t.end + 1] for t in scan(text) if t.kind == "RESERVED_KEYWORD"]
    return [word for word in words if word != word.upper() and word not in ("true", "false", "current_user", "user")]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.stem)
def test_migration_is_one_do_block_and_online_selects(step: chain.Step) -> None:
    (block,) = parse_sql(step.atomic)
    assert isinstance(block.stmt, ast.DoStmt)
    for query in step.online:
        (select,) = parse_sql(query)
        assert isinstance(select.stmt, ast.SelectStmt)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.stem)
def test_verification_is_one_select_of_the_four_columns(step: chain.Step) -> None:
    (select,) = parse_sql(step.verification)
    assert isinstance(select.stmt, ast.SelectStmt)
    columns = [target.name or target.val.fields[-1].sval for target in select.stmt.targetList or ()]
    assert columns == ["item", "expected", "actual", "mended_by"]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.stem)
def test_migration_and_verification_list_the_same(step: chain.Step) -> None:
    """What an online part builds, and the columns that a standing table must have, are in both files, word for word."""
    index = re.compile(r"\('(idx_\w+)', '\w+', '((?!UNIQUE)[^']+)'\)")
    online = "".join(step.online)
    assert set(index.findall(online)) == set(index.findall(step.verification))
    columns = re.compile(r"\('(\w+)', '(id [^']+)'\)")
    standing = {found for found in columns.findall(step.atomic) if found[0] in step.stem or "core" in step.stem}
    assert standing <= set(columns.findall(step.verification))


def test_only_gexec() -> None:
    for path in MIGRATIONS.glob("*.sql"):
        assert set(re.findall(r"^\\\w+", path.read_text(), re.M)) <= {"\\gexec"}


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("  supabase CONSTANT boolean :=", ";"),
        ("  admins CONSTANT boolean", "''admin'')';"),
        ("  IF current_setting('lock_timeout')", "END IF;"),
        ("      SELECT format('CREATE POLICY", "END LOOP;"),
        ("JOIN pg_class AS standing ON", "CROSS JOIN"),
        ("  -- All of them or none:", "PERFORM pg_sleep"),
        ("  AND NOT (built.indexrelid IS NOT NULL", "\\gexec"),
        ("  -- Primary keys are left to PostgreSQL to name", "  FOREACH relation"),
        ("  FOREACH relation IN ARRAY created LOOP", "turned on', relation;"),
        ("    -- turn_id belongs to the fix", "RAISE NOTICE"),
        ("    CREATE TABLE turn_metrics", "ON turn_metrics (created_at DESC);"),
        ("    ALTER TABLE prompt_snapshots ADD COLUMN budget_report", ";"),
        ("    COMMENT ON COLUMN prompt_snapshots.budget_report", "recorded"),
    ],
)
def test_what_each_file_has_to_say_is_said_alike(begin: str, end: str) -> None:
    """Each file runs alone, so that some passages stand in several: word for word the same, however deep."""
    texts = [" ".join(path.read_text().split()) for path in MIGRATIONS.glob("*.sql")]
    begin, end = " ".join(begin.split()), " ".join(end.split())
    passages = {passage.partition(end)[0] for text in texts for passage in text.split(begin)[1:]}
    assert len(passages) <= 1
