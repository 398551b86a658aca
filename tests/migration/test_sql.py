"""The lint of the SQL: each check of db/verify.sql has its statement, each statement its check; and how files look."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import supabase
from conftest import MIGRATIONS, Db
from pglast import parse_plpgsql, parse_sql, split
from pglast.parser import scan
from verification import VERIFY, Check, verified

FILES = sorted(MIGRATIONS.glob("*.sql"))
RECREATE = MIGRATIONS / "20250130000002_recreate_core_schema.sql"
LONGEST = {"core_schema": 180, "recreate_core_schema": 246, "fix_prompt_snapshots_turn_id": 150}
OF_PSQL = re.compile(
    r"\\set ON_ERROR_STOP (on|off)|\\if :\{\?recreating\} \\q \\endif"  # the second: where recreate includes the file
)


class Statement(NamedTuple):
    """A statement of a file, its white space folded and its comments left out; line: where it begins, from 1."""

    path: Path
    text: str
    line: int
    concurrent: bool

    @property
    def flat(self) -> str:
        return folded(self.text)


def folded(sql: str) -> str:
    kept = re.sub(r"--[^\n]*|('(?:[^']|'')*')", lambda found: found[1] or "", sql)
    return " ".join(kept.split())


def sql_of(path: Path) -> str:
    """Return the text without psql's own lines."""
    return re.sub(r"^\\.*$", "", path.read_text(), flags=re.M)


def statements(path: Path) -> Iterator[Statement]:
    text, concurrent = sql_of(path), False
    for part in split(text, only_slices=True):
        sql = text[part]
        start = part.start + len(sql) - len(re.sub(r"\A(?:\s+|--[^\n]*)+", "", sql))
        flat = folded(sql)
        concurrent = concurrent or flat == "COMMIT"
        if flat and not re.match(r"BEGIN|COMMIT|SET LOCAL ", flat):
            yield Statement(path, sql, text.count("\n", 0, start) + 1, concurrent)


STATEMENTS = [statement for path in FILES for statement in statements(path)]

ADDED = r"ALTER TABLE {table} (?:[^;]*? )?ADD COLUMN (?:IF NOT EXISTS )?{name} "
WORDS = {  # how the statement that creates a check of a kind is written, in DO blocks, too
    "table": r"CREATE TABLE IF NOT EXISTS {table} \(",
    "column": ADDED,
    "default": rf"ALTER TABLE {{table}} ALTER COLUMN {{name}} SET DEFAULT |{ADDED}",
    "key": r"CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS \w+ ON {table} \({name}\)",
    "foreign key": r"ALTER TABLE {table} ADD CONSTRAINT \w+ FOREIGN KEY \({name}\) REFERENCES"
    rf"|{ADDED}[^;,]*REFERENCES ",
    "index": r"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {table} ",
    "comment": r"COMMENT ON COLUMN {table}\.{name} IS",
    "trigger": r"CREATE (?:OR REPLACE )?TRIGGER {name} [^;]*ON {table} ",
    "function": r"CREATE (?:OR REPLACE )?FUNCTION {name}\(",
    "row-level security": "ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
    "policy": "CREATE POLICY {name} ON {table} ",
}


def creates(statement: Statement, check: Check) -> bool:
    """Whether a statement creates what the check is about, by its own words."""
    pattern = WORDS[check.kind] if check.name or check.kind != "comment" else "COMMENT ON TABLE {table} IS"
    words = pattern.format(table=check.table, name=re.escape(check.name))
    return re.search(words, statement.flat) is not None or declares(statement, check)


def declares(statement: Statement, check: Check) -> bool:
    """Whether it is the CREATE TABLE whose body holds it."""
    body = re.match(rf"CREATE TABLE IF NOT EXISTS {check.table} \((.*)\)$", statement.flat)
    if not body:
        return False
    own = re.search(rf"(?:^|, ) ?{check.name} (?:[^,(]|\([^)]*\))*", body[1])
    return {
        "column": own is not None,
        "default": own is not None,
        "foreign key": own is not None and " REFERENCES " in own[0],
        "key": f"{check.expected} ({check.name})" in body[1] or (own is not None and check.expected in own[0]),
    }.get(check.kind, False)


@pytest.fixture
def checks(db: Db) -> list[Check]:
    """Everything that can be expected."""
    supabase.install(db)
    supabase.add_profiles(db)
    found = verified(db)
    assert {check.actual for check in found} == {None}
    return found


def test_each_check_has_its_statement(checks: list[Check]) -> None:
    assert [c[1:4] for c in checks if not any(creates(s, c) for s in STATEMENTS if s.path != RECREATE)] == []


def test_each_check_has_its_statement_in_the_file_of_its_step(checks: list[Check]) -> None:
    """Or in that of the step that creates the table."""
    for check in checks:
        files = {statement.path.stem.partition("_")[2] for statement in STATEMENTS if creates(statement, check)}
        assert files & {check.step, check.fixed_by}, check


def test_each_statement_has_its_check(checks: list[Check]) -> None:
    """But what is a condition, and the right that goes with a function."""
    conditional = ("DO $$ ", "GRANT EXECUTE ON FUNCTION ")
    without = [s for s in STATEMENTS if s.path != RECREATE and not any(creates(s, c) for c in checks)]
    assert [s.flat for s in without if not s.flat.startswith(conditional)] == []


def test_a_foreign_key_that_is_not_valid_is_validated() -> None:
    for path in FILES:
        text = folded(path.read_text())
        added = set(re.findall(r"ALTER TABLE (\w+) ADD CONSTRAINT \w+ FOREIGN KEY \((\w+)\)[^;]* NOT VALID", text))
        for table, column in added:
            where = [s.flat for s in STATEMENTS if f"ALTER TABLE {table} VALIDATE CONSTRAINT" in s.flat]
            assert any(f"attname = '{column}'" in flat for flat in where), (table, column)


def test_the_functions_are_the_ones_that_are_expected(checks: list[Check]) -> None:
    for check in (check for check in checks if check.kind == "function"):
        [text] = [s.text for s in STATEMENTS if creates(s, check)]
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_work_begins_within_25_lines(path: Path) -> None:
    """What refuses apart, and what a DO block declares."""
    first = next(s for s in statements(path) if not s.flat.startswith("DO ") or "ALTER TABLE" in s.flat)
    refusing = [s.text.strip() for s in statements(path) if s.line < first.line and "RAISE EXCEPTION" in s.flat]
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
