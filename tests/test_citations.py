"""What code, SQL and README cite by name is there: files of this project, sections of the README."""

from __future__ import annotations

import re

from budget_engine.migration.chain import ROOT

PATTERNS = (
    "*.md",
    "*.py",
    "*.toml",
    ".env.example",
    ".ci/*",
    "scripts/inv",
    "scripts/**/*.py",
    "docs/*.md",
    "db/*.md",
    "db/**/*.sql",
    "tests/**/*.py",
)
FILES = [file for pattern in PATTERNS for file in ROOT.glob(pattern) if file.is_file()]
TEXTS = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}


def cited(pattern: str) -> set[tuple[str, str]]:
    """(file, what it cites), but for patterns such as STEM.sql, and db/README.md's example of a step."""
    found = {(name, word) for name, text in TEXTS.items() for word in re.findall(pattern, text)}
    return {(name, word) for name, word in found if "STEM" not in word and "slot_owners" not in word}


def test_files_are_there() -> None:
    paths = cited(r"(?<![\w/.-])((?:scripts|tests|db|docs|\.ci|\.github)/[\w/.-]*\.[a-z]{2,4})\b")
    assert len({name for name, _ in paths}) > 5
    assert sorted((name, path) for name, path in paths if not (ROOT / path).exists()) == []


def test_sections_of_the_readme_are_there() -> None:
    titles = set(re.findall(r"^#+ (.*)$", TEXTS["README.md"], re.M))
    sections = cited(r'README(?:\.md)?, "([^"]+)"')
    assert sections
    assert sorted((name, title) for name, title in sections if title not in titles) == []
