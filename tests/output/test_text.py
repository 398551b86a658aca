"""What a person reads, made of plain values."""

from __future__ import annotations

import re

from budget_engine.migration import chain, plan
from budget_engine.migration.checks import Check, Kind
from budget_engine.output import text

CHAIN = chain.load()


def check(title_kind: Kind = Kind.COLUMN, **how: object) -> Check:
    facts = {"step": "slots_flags", "table": "slots", "name": "must_keep", "expected": "boolean NOT NULL"}
    rest = {"actual": None, "fixed_by": "slots_flags", "required": True, "found": "public.slots"}
    return Check(kind=title_kind, **facts | rest | how)  # type: ignore[arg-type]


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
