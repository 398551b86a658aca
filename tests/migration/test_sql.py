"""The lint of the SQL: each check of db/verify.sql has its statement, each statement its check; and how files look."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import supabase
from budget_engine.migration import chain
from budget_engine.migration.checks import Check, Kind
from budget_engine.postgres.embedded import Cluster
from conftest import MIGRATIONS, database
from pglast import parse_plpgsql, parse_sql
from pglast.parser import scan
from verification import VERIFY

CHAIN = chain.load()
assert CHAIN.recreate
STATEMENTS = [statement for step in CHAIN.steps for statement in step.statements]
FILES = sorted(MIGRATIONS.glob("*.sql"))
RECREATE = MIGRATIONS / "20250130000002_recreate_core_schema.sql"
LONGEST = {"core_schema": 180, "recreate_core_schema": 246, "fix_prompt_snapshots_turn_id": 150}
OF_PSQL = re.compile(
    r"\\set ON_ERROR_STOP (on|off)|\\if :\{\?recreating\} \\q \\endif"  # the second: where recreate includes the file
)


def sql_of(path: Path) -> str:
    """Return the text without psql's own lines."""
    return re.sub(r"^\\.*$", "", path.read_text(), flags=re.M)


@pytest.fixture(scope="module")
def checks(cluster: Cluster) -> list[Check]:
    """Everything that can be expected."""
    with database(cluster) as db:
        supabase.install(db)
        supabase.add_profiles(db)
        found = db.checks()
    assert {check.actual for check in found} == {None}
    return found


def test_each_check_has_its_statement_in_the_file_of_its_step(checks: list[Check]) -> None:
    """Or in that of the step that creates the table."""
    for check in checks:
        assert {s.step for s in STATEMENTS if s.creates(check)} & {check.step, check.fixed_by}, check


def test_each_statement_has_its_check(checks: list[Check]) -> None:
    """But what is a condition, and the right that goes with a function."""
    conditional = ("DO $$ ", "GRANT EXECUTE ON FUNCTION ")
    without = [s.flat for s in STATEMENTS if not any(s.creates(check) for check in checks)]
    assert [flat for flat in without if not flat.startswith(conditional)] == []


def test_a_foreign_key_that_is_not_valid_is_validated() -> None:
    added = r"ALTER TABLE (\w+) ADD CONSTRAINT \w+ FOREIGN KEY \((\w+)\)[^;]* NOT VALID"
    for table, column in {key for s in STATEMENTS for key in re.findall(added, s.flat)}:
        where = [s.flat for s in STATEMENTS if f"ALTER TABLE {table} VALIDATE CONSTRAINT" in s.flat]
        assert any(f"attname = '{column}'" in flat for flat in where), (table, column)


def test_the_functions_are_the_ones_that_are_expected(checks: list[Check]) -> None:
    for check in (check for check in checks if check.kind is Kind.FUNCTION):
        [text] = [s.text for s in STATEMENTS if s.creates(check)]
        body = re.search(rf"FUNCTION {check.name}\(.*?AS (\$\w*\$)(.*?)\1", text, re.S)
        assert body
        assert check.expected.endswith(f"source md5 {hashlib.md5(body[2].encode()).hexdigest()}"), check.name


@pytest.mark.parametrize("path", [*FILES, VERIFY], ids=lambda path: path.stem)
def test_the_text_is_clean(path: Path) -> None:
    text = path.read_bytes().decode()
    lines = text.split("\n")
    assert "\r" not in text
    assert "\t" not in text
    assert text.endswith("\n")
    assert [line for line in lines if line != line.rstrip() or len(line) > 160] == []
    assert text.startswith(f"-- {path.stem}: " if path != VERIFY else "-- Every object")
    assert len(lines) - 1 <= (257 if path == VERIFY else LONGEST.get(path.stem.partition("_")[2], 130))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_framed_as_db_readme_says(path: Path) -> None:
    text = path.read_text()
    header = re.findall(r"^--   (task|needs|before|instead of|locks|again) +\S+", text[: text.index("\\set")], re.M)
    assert {"task", "locks", "again"} <= set(header)
    assert f'--   psql "$DATABASE_URL" -f db/migrations/{path.name}\n' in text
    assert "\n\\set ON_ERROR_STOP on\nBEGIN;\nSET LOCAL lock_timeout = '2s';\n" in text
    assert text.count("\nCOMMIT;\n") == 1
    included = ""
    if path == RECREATE:
        included = r"|\\(un)?set recreating( on)?|\\gset|\\if :\w+|\\endif|\\(ir|include_relative) \w+\.sql"
    assert [w for w in re.findall(r"^\\.*", text, re.M) if not re.fullmatch(f"{OF_PSQL.pattern}{included}", w)] == []


@pytest.mark.parametrize("step", [CHAIN.recreate, *CHAIN.steps], ids=lambda step: step.stem)
def test_the_work_begins_within_25_lines(step: chain.Step) -> None:
    """What refuses apart, and what a DO block declares."""
    own = [s for s in step.statements if s.step == step.label]
    first = next(s for s in own if not s.flat.startswith("DO ") or "ALTER TABLE" in s.flat)
    refusing = [s.text for s in own if s.line < first.line and "RAISE EXCEPTION" in s.flat]
    assert first.line - sum(text.count("\n") + 1 for text in refusing) <= 25


def test_no_passage_of_six_lines_stands_in_two_files() -> None:
    seen: dict[tuple[str, ...], Path] = {}
    for path in FILES:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        for start in range(len(lines) - 5):
            passage = tuple(lines[start : start + 6])
            assert seen.setdefault(passage, path) == path, passage


@pytest.mark.parametrize("path", [*FILES, VERIFY], ids=lambda path: path.stem)
def test_postgres_can_parse_it(path: Path) -> None:
    for tree in parse_sql(sql_of(path)):
        assert tree.stmt is not None
    for block in re.findall(r"^DO \$\$.*?^END \$\$;", sql_of(path), re.S | re.M):
        parse_plpgsql(block)


@pytest.mark.parametrize("path", [*FILES, VERIFY], ids=lambda path: path.stem)
def test_keywords_are_upper_case(path: Path) -> None:
    text = sql_of(path)
    bodies = [body for _, body in re.findall(r"(\$(?:function)?\$)(.*?)\1", text, re.S)]
    assert [word for part in (text, *bodies) for word in _lower_keywords(part)] == []


def _lower_keywords(text: str) -> list[str]:
    words = [text[t.start : t.end + 1] for t in scan(text) if t.kind == "RESERVED_KEYWORD"]
    return [word for word in words if word != word.upper() and word not in ("true", "false", "current_user", "user")]


def test_db_readme_names_every_file() -> None:
    text = (MIGRATIONS.parent / "README.md").read_text()
    assert [path.name for path in FILES if path.stem not in text] == []
