"""The rooms of scripts/: imports run in one direction, and the engine knows no table of the chain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import budget_engine
import pytest
import supabase
from budget_engine.migration.chain import ROOT
from conftest import Db

PACKAGE = ROOT / "scripts" / "budget_engine"
ROOMS = [
    "__main__",
    "__init__",
    "commands",
    "output",
    "migration",
    "postgres",
    "settings",
    "env_file",
    "libpq",
    "trust",
    "errors",
    "spelling",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Yield the rooms that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = (name.split(".")[1] for name in names if name.startswith("budget_engine."))
        yield from (part if part in ROOMS else "" for part in parts if not _is_of_the_package_itself(part))


def _is_of_the_package_itself(name: str) -> bool:
    return hasattr(budget_engine, name) and not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists()


def test_every_file_has_its_room() -> None:
    assert {room(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_in_one_direction(path: Path) -> None:
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert set(imported(path)) <= {room(path)}
        return
    within = ROOMS.index(room(path))
    assert [name for name in imported(path) if ROOMS.index(name) < within] == []


# Columns that any table may have.
GENERAL = {
    "id",
    "type",
    "name",
    "version",
    "status",
    "created_at",
    "updated_at",
    "role",
    "source",
    "content",
    "description",
}
# Words of English, or of other programs, that are tables of ours, too.
OTHERS = re.compile(r"takes? turns|connection slots are reserved|(jinja|string) templates")


def test_the_engine_names_no_table_and_no_column_of_the_chain(db: Db) -> None:
    """Nor an index, key, trigger, function, policy or step, nor a task that is named like one."""
    supabase.install(db)
    supabase.add_profiles(db)
    checks = db.checks()
    columns = {check.name for check in checks if check.kind.value == "column"} - GENERAL
    telling = {name for name in columns if "_" in name}  # body, title, doc, key: words of everybody
    others = {check.name for check in checks if check.kind.value in ("index", "trigger", "function", "policy")}
    tables, steps = {check.table for check in checks}, {check.step for check in checks}
    names = {name.replace("_", "[_-]") for name in {*tables, *telling, *others, *steps, "turn_id_uuid"}}
    assert {"slots", "must[_-]keep", "slots[_-]flags", "idx[_-]slots[_-]type"} <= names
    pattern = re.compile(rf"(?<![\w-])({'|'.join(sorted(names))})(?![\w-])")
    found = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*(ROOT / "scripts").rglob("*.py"), ROOT / "scripts" / "inv", *PACKAGE.rglob("*.json")]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(OTHERS.sub("", line))
    }
    assert found == set()
