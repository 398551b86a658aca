"""What a person reads, made of plain values."""

from __future__ import annotations

import re

import pytest
from budget_engine import errors
from budget_engine.migration import chain, plan
from budget_engine.migration.checks import Check, Kind
from budget_engine.output import text
from budget_engine.output.console import LABEL
from budget_engine.settings import Settings, parse_target
from hypothesis import given
from hypothesis import strategies as st

CHAIN = chain.load()
words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


def check(title_kind: Kind = Kind.COLUMN, **how: object) -> Check:
    facts = {"step": "slots_flags", "table": "slots", "name": "must_keep", "expected": "boolean NOT NULL"}
    rest = {"actual": None, "fixed_by": "slots_flags", "required": True, "found": "public.slots"}
    return Check(kind=title_kind, **facts | rest | how)  # type: ignore[arg-type]


@given(words, st.lists(words), st.lists(words, min_size=1))
def test_an_error_says_what_where_and_what_to_do(what: str, where: list[str], remedy: list[str]) -> None:
    lines = text.error(errors.STEP_FAILED(what=what, where="\n".join(where), remedy="\n".join(remedy)), "the target")
    said = "\n".join(lines).splitlines()
    assert said[0] == f"{'error':<{LABEL}}{what}"
    assert [line[LABEL:] for line in said[1 : 1 + len(where)]] == where
    assert said[1 + len(where)] == " " * LABEL + "the target"
    assert said[2 + len(where)].startswith("help")
    assert [line[LABEL:] for line in said[2 + len(where) :]] == remedy


@pytest.mark.parametrize("actual", [None, "text"])
def test_a_difference_says_what_is_there_and_what_is_expected(actual: str | None) -> None:
    assert text.difference(check(actual=actual)) == (
        f"slots.must_keep is {actual or 'missing'}, expected boolean NOT NULL"
    )


def test_what_is_documented_and_differs_is_not_counted() -> None:
    documented = check(step="core_schema", table="turns", name="idx", fixed_by=None, required=False)
    found = [check(), check(name="min_chars", actual="boolean NOT NULL", fixed_by=None), documented]
    assert re.match(r"1 of 2 checks pass\b", text.summary(found))


def test_each_step_its_state_and_what_it_creates() -> None:
    everything = [
        check(),
        check(Kind.COMMENT, expected="present"),
        check(name="min_chars", actual="text", fixed_by=None),
    ]
    made = plan.make(CHAIN, CHAIN.steps, everything)
    lines = text.steps(made)
    heads = [line for line in lines if re.match(r"  \w", line)]
    assert [line.split()[0] for line in heads] == [step.label for step in CHAIN.steps]
    for step, head in zip(made.steps, heads, strict=True):
        assert head.split(maxsplit=1)[1] == step.state.value  # the label and what follows it do not touch
    said = "\n".join(lines)
    assert re.search(r"! slots\.min_chars +is text, expected boolean NOT NULL", said)
    assert "must_keep" not in said  # the step runs nothing while there is a conflict
    said = "\n".join(text.steps(plan.make(CHAIN, CHAIN.steps, everything[:2])))
    assert re.search(r"\+ slots\.must_keep +boolean NOT NULL", said)
    assert "comment" not in said  # it goes along with its column


def test_what_a_transaction_created_and_changed() -> None:
    done = [check(), check(name="min_chars", actual="text"), check(Kind.INDEX, name="idx", expected="btree (id)")]
    assert text.created(done) == "+ slots.must_keep, idx  ~ slots.min_chars"


def test_target_lines_mask_and_note() -> None:
    target = parse_target("postgresql+psycopg2://u:secret-word@h/db?connection_limit=1")
    lines = [
        text.target(target, Settings(target, ".env")),
        *text.notes(target, Settings(target, ".env", notes=("one",))),
    ]
    assert lines[0] == f"{'target':<{LABEL}}postgresql://u:***@h/db (.env)"
    assert [line.split()[0] for line in lines[1:]] == ["note"] * 3
    assert "secret-word" not in "\n".join(lines)
