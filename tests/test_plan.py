"""The pure core: what the chain's files are made of, and what is made of the survey's items. No database."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from budget_engine import errors
from budget_engine.migration import chain, plan, runner, survey, turn
from budget_engine.migration.plan import State
from budget_engine.migration.survey import ONLINE, Item
from budget_engine.output import text
from budget_engine.settings import Settings, parse_target
from conftest import MIGRATIONS, VERIFICATIONS
from hypothesis import assume, given
from hypothesis import strategies as st

CHAIN = chain.load()
STEMS = [step.stem for step in CHAIN]
ALL = (chain.load_recreate(), *CHAIN)  # with the alternative, which is run only where it is asked for
TABLES = ["slots", "turns", "prompt_snapshots"]

names = st.one_of(
    st.sampled_from(TABLES),
    st.builds("{}.{}".format, st.sampled_from(TABLES), st.sampled_from(["id", "must_keep"])),
    st.builds("{}.{} comment".format, st.sampled_from(TABLES), st.sampled_from(["id", "must_keep"])),
    st.builds("{} {}".format, st.sampled_from(TABLES), st.sampled_from(["(id)", "comment", "index idx_a", "policy p"])),
)
forms = st.sampled_from(["table", "bigint", "present"])
menders = st.one_of(st.none(), st.sampled_from([*STEMS, *(stem + ONLINE for stem in STEMS)]))
rights = st.one_of(st.none(), st.sampled_from(["CREATE on schema public", "ownership of table slots"]))


def _honest(item: Item) -> Item:
    """As the verifications say it: what stands has no mender, and what nobody mends lacks no right."""
    if item.stands:
        return dataclasses.replace(item, mended_by=None, lacking=None)
    return dataclasses.replace(item, lacking=None) if item.mended_by is None else item


any_items = st.builds(Item, st.sampled_from(STEMS), names, forms, st.one_of(st.none(), forms), menders, rights).map(
    _honest
)
# An item is named once in the whole chain.
surveys = st.lists(any_items, max_size=12, unique_by=lambda item: item.name)
choices = st.lists(st.sampled_from(STEMS), unique=True).map(lambda some: sorted(some, key=STEMS.index))


# ── the plan ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(choices, surveys)
def test_nothing_differing_means_nothing_to_do(stems: list[str], items: list[Item]) -> None:
    made = plan.make(stems, [item for item in items if item.stands])
    assert not made.to_do
    assert (made.in_the_way, made.missing, made.lacking, made.atomic, made.online) == ((),) * 5
    assert {step.state for step in made.steps} <= {State.DONE}


@given(surveys)
def test_every_differing_item_has_exactly_one_place(items: list[Item]) -> None:
    """It is a reason of the step that mends it, or in the way of its own step; and of no other."""
    made = plan.make(STEMS, items)
    for item in items:
        places = [step.stem for step in made.steps for reason in step.reasons if reason is item]
        if item.stands:
            assert places == []
        else:
            assert places == [item.stem if item.mended_by is None else item.mended_by.removesuffix(ONLINE)]
    assert set(made.missing) == {item for item in items if not item.stands}
    assert set(made.in_the_way) == {item for item in items if not item.stands and item.mended_by is None}
    assert set(made.lacking) == {item.lacking for item in items if item.lacking}


@given(choices, surveys)
def test_parts_to_run_are_those_that_mend_something(stems: list[str], items: list[Item]) -> None:
    made = plan.make(stems, items)
    menders = {item.mended_by for item in items if not item.stands}
    assert list(made.atomic) == [stem for stem in stems if stem in menders]
    assert list(made.online) == [stem for stem in stems if stem + ONLINE in menders]
    assert made.to_do == bool(made.atomic or made.online)
    assert [step.stem for step in made.steps] == stems


@given(choices, surveys)
def test_state_of_a_step(stems: list[str], items: list[Item]) -> None:
    for step in plan.make(stems, items).steps:
        own = [item for item in items if item.stem == step.stem and not item.stands]
        mended = [item for item in items if (item.mended_by or "").removesuffix(ONLINE) == step.stem]
        if any(item.mended_by is None for item in own):
            assert step.state is State.IN_THE_WAY
        elif mended:
            assert step.state in (State.PENDING, State.HALF_DONE)
        elif own:  # another step brings it along: a new prompt_snapshots needs no fix
            assert step.state is State.NOT_NEEDED
        else:
            assert step.state is State.DONE
        assert (step.atomic or step.online) == bool(mended)


@given(st.data(), surveys)
def test_order_of_the_items_decides_nothing(data: st.DataObject, items: list[Item]) -> None:
    shuffled = data.draw(st.permutations(items))
    made, again = plan.make(STEMS, items), plan.make(STEMS, shuffled)
    assert [(step.state, step.atomic, step.online, set(step.reasons)) for step in made.steps] == [
        (step.state, step.atomic, step.online, set(step.reasons)) for step in again.steps
    ]


@given(surveys)
def test_a_task_does_its_share_of_what_setup_does(items: list[Item]) -> None:
    whole = {step.stem: step for step in plan.make(STEMS, items).steps}
    for task in {step.task for step in CHAIN}:
        stems = [step.stem for step in chain.load(task)]
        assert plan.make(stems, items).steps == tuple(whole[stem] for stem in stems)


@given(surveys, choices)
def test_without_its_mender_at_hand_an_item_is_in_the_way(items: list[Item], stems: list[str]) -> None:
    for item in items:
        seen = survey.at_hand(item, stems)
        mender = (item.mended_by or "").removesuffix(ONLINE)
        if not mender or mender in stems:
            assert seen == item
        else:
            assert (seen.in_the_way, seen.on_request, seen.lacking) == (True, item.mended_by, None)


# ── the core schema made anew ──────────────────────────────────────────────────────────────────────────────────────


def _place(table: str) -> Item:
    return Item(chain.RECREATE, f"{table} place", "schema core_attic", "schema public", chain.RECREATE)


def _found(*items: Item) -> survey.Survey:
    return survey.Survey(survey.Server("18.4", "me", "db", "app", None, "app", False), items)


@given(surveys, st.sets(st.sampled_from(TABLES)))
def test_of_what_moves_nothing_is_in_the_way(items: list[Item], tables: set[str]) -> None:
    found = _found(*items, *map(_place, sorted(tables)))
    made = plan.make([step.stem for step in ALL], recreation.foreseen(found).items)
    assert {item.table for item in made.in_the_way} == {item.table for item in items if item.in_the_way} - tables
    assert (chain.RECREATE in made.atomic) == bool(tables)
    assert [move.table for move in recreation.moves(found.items)] == sorted(tables)


def test_only_what_moves_is_made_anew_and_completed() -> None:
    def wanted(*tables: str) -> list[str]:
        return [step.label for step in recreation.wanted(ALL, _found(*map(_place, tables)))]

    prereqs = ["recreate_core_schema", "core_schema", "slots_templates", "prompt_snapshots"]
    assert wanted() == wanted("turns", "prompt_snapshots") == prereqs
    assert wanted("turns", "turn_metrics") == [*prereqs, "turn_metrics"]


# ── the report ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(surveys)
def test_outermost_hides_only_what_a_shown_one_says(items: list[Item]) -> None:
    differing = [item for item in items if not item.stands]
    shown = survey.outermost(differing)
    assert bool(shown) == bool(differing)
    assert [item for item in differing if item in shown] == shown  # a part of them, in order
    for item in differing:
        if item not in shown:
            table, column = re.split(r"[ .]", item.name)[0], item.name.split(" ")[0]
            assert {table, column} & {other.name for other in shown}, item


@given(surveys)
def test_obstacles_name_every_table_that_is_in_the_way(items: list[Item]) -> None:
    obstacles = plan.make(STEMS, items).in_the_way
    said = "\n".join(text.obstacles(obstacles, {}))
    assert {table for table in TABLES if table in said} == {re.split(r"[ .]", item.name)[0] for item in obstacles}


@given(surveys)
def test_steps_say_every_step_its_state_and_why(items: list[Item]) -> None:
    made = plan.make(STEMS, items)
    lines = text.steps(text.step_rows(made))
    heads = [line for line in lines if not line.startswith(" ")]
    assert [head.split()[0] for head in heads] == [chain.label(stem) for stem in STEMS]
    assert all(step.state.value in head for step, head in zip(made.steps, heads, strict=True))
    for step, head in zip(made.steps, heads, strict=True):
        if step.state in (State.PENDING, State.HALF_DONE):
            assert ("atomic part" in head, "online part" in head) == (step.atomic, step.online)


@given(surveys)
def test_summary_counts(items: list[Item]) -> None:
    standing, total = (int(number) for number in re.findall(r"\d+", text.summary(items)))
    assert (standing, total) == (sum(item.stands for item in items), len(items))


@given(any_items)
def test_difference_says_what_stands_what_was_promised_and_who_mends_it(item: Item) -> None:
    assume(not item.stands)
    said = text.difference(item)
    words = [item.name, item.actual or "missing", item.expected]
    words += ["in the way" if item.mended_by is None else chain.label(item.mended_by.removesuffix(ONLINE))]
    assert all(word in said for word in words)
    assert said.endswith("online)") == bool(item.mended_by and item.mended_by.endswith(ONLINE))


lines_of_text = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


@given(lines_of_text, st.lists(lines_of_text), st.lists(lines_of_text))
def test_error_says_what_where_and_what_to_do(what: str, where: list[str], remedy: list[str]) -> None:
    lines = errors.RecipeError(what=what, where="\n".join(where), remedy="\n".join(remedy)).lines()
    assert lines[0] == f"error: {what}"
    assert [line.strip() for line in lines[1 : 1 + len(where)]] == where
    assert ("what to do: " in "".join(lines[1 + len(where) :])) == bool(remedy)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "plain PostgreSQL"),
        (["slots row-level security"], "Supabase without profiles"),
        (["slots row-level security", "slots policy slots_admin"], "Supabase"),
    ],
)
def test_server_line(names: list[str], words: str) -> None:
    server = survey.Server("18.4", "me", "db", "app", None, "app, public", False)
    [line] = text.server(server, [Item(STEMS[0], name, "on", "on") for name in names])
    assert line.endswith(f"; {words}")
    assert all(word in line for word in ("PostgreSQL 18.4", "role me", "database db", "schema app"))
    assert "pooler" in text.server(dataclasses.replace(server, pooled=True), [])[0]


def test_target_lines_mask_and_note() -> None:
    target = parse_target("postgresql+psycopg2://u:secret-word@h/db?connection_limit=1")
    lines = text.target(target, Settings(target, ".env", notes=("ignored in .env: line 3",)))
    assert lines[0] == "target    postgresql://u:***@h/db from .env"
    assert [line.split()[0] for line in lines[1:]] == ["note"] * 3
    assert "secret-word" not in "\n".join(lines)


# ── the chain ──────────────────────────────────────────────────────────────────────────────────────────────────────

each_step = pytest.mark.parametrize("step", ALL, ids=lambda step: step.stem)


def test_every_file_belongs_to_one_step() -> None:
    stems = sorted(step.stem for step in ALL)
    assert stems == sorted(path.stem for path in MIGRATIONS.glob("*.sql"))
    assert stems == sorted(path.stem for path in VERIFICATIONS.glob("*.sql"))


def test_tasks_share_the_chain_in_its_order() -> None:
    tasks = list(dict.fromkeys(step.task for step in CHAIN))
    assert tasks == ["prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"]
    assert tuple(step for task in tasks for step in chain.load(task)) == CHAIN


def statements(sql: str) -> list[str]:
    """Split at each semicolon that stands outside dollar quotes, strings and comments."""
    parts = [""]
    for token in re.finditer(r"--[^\n]*|(?s:\$(\w*)\$.*?\$\1\$)|'(?:[^']|'')*'|;|[^-$';]+|.", sql):
        if token[0] == ";":
            parts.append("")
        elif not token[0].startswith("--"):
            parts[-1] += token[0]
    return [part.strip() for part in parts if part.strip()]


@each_step
def test_migration_is_one_do_block_and_online_selects(step: chain.Step) -> None:
    text = (MIGRATIONS / f"{step.stem}.sql").read_text()
    atomic, marker, online = text.partition("\n-- online:")
    assert [part.split()[0] for part in statements(atomic)] == ["DO"]
    assert statements(step.atomic) == statements(atomic)
    assert len(step.online) == text.count("\\gexec") == online.count("\\gexec") == (marker + online).count("-- online:")
    for query in step.online:
        [select] = statements(query)
        assert select.startswith("SELECT")
        assert "\\" not in select


@each_step
def test_nothing_of_a_file_is_lost_or_invented(step: chain.Step) -> None:
    text = (MIGRATIONS / f"{step.stem}.sql").read_text()
    parts = [step.atomic + ";", *(f"{query}\n\\gexec" for query in step.online)]
    assert "".join("".join(parts).split()) == "".join(text.split())


@each_step
def test_line_of_the_do_block(step: chain.Step) -> None:
    lines = (MIGRATIONS / f"{step.stem}.sql").read_text().splitlines()
    assert lines[step.atomic_line - 1].startswith("DO $")


@each_step
def test_verification_is_one_select_of_its_own(step: chain.Step) -> None:
    [select] = statements(step.verification)
    assert select.startswith(("WITH", "SELECT"))
    assert re.search(rf"{step.stem}\b", step.verification)
    mentioned = set(re.findall(r"\b\d{8,14}_[a-z_]+", step.verification))
    assert mentioned <= {step.stem for step in ALL}


@each_step
def test_label_and_file(step: chain.Step) -> None:
    assert re.fullmatch(r"[a-z_]+", step.label)
    assert (chain.ROOT / step.file).samefile(MIGRATIONS / f"{step.stem}.sql")
    assert len(step.label) < len(text.step(step.label, "")), "the label and what follows it must not touch"


def test_checkout_with_crlf_is_the_same_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(chain.ROOT / "db", tmp_path / "db")
    for path in tmp_path.rglob("*.sql"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setattr(chain, "_DB", tmp_path / "db")
    assert chain.load() == CHAIN
    sums = [hashlib.sha256((MIGRATIONS / f"{stem}.sql").read_bytes()).hexdigest() for stem in STEMS]
    assert [step.checksum for step in CHAIN] == sums


def test_version_is_that_of_the_project() -> None:
    assert f'version = "{chain.version()}"' in (chain.ROOT / "pyproject.toml").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", chain.version())


# ── the runner's message, the survey's query ───────────────────────────────────────────────────────────────────────

subsets = st.lists(st.sampled_from(CHAIN), unique=True).map(lambda some: sorted(some, key=CHAIN.index))


@given(subsets)
def test_script_has_eight_statements_per_step_in_order(steps: Sequence[chain.Step]) -> None:
    message = runner.script(steps, CHAIN, "set_config('lock_timeout', '2s', true)")
    part = runner.Part
    parts = [*[part.FRAME] * 3, part.GUARD, part.MIGRATION, part.VERIFICATION, part.DIARY, part.COMMIT]
    assert [(said.step, said.part) for said in message] == [(step, part) for step in steps for part in parts]
    for said in message:
        assert len(statements(said.sql)) == 1
        assert not said.sql.rstrip().endswith(";")


@each_step
def test_parts_of_a_step_s_transaction(step: chain.Step) -> None:
    message = runner.script([step], ALL, "set_config('lock_timeout', '2s', true)")
    assert [said.sql.split()[0] for said in message] == ["BEGIN", "SET", "SELECT", "DO", "--", "DO", "DO", "COMMIT"]
    assert "set_config('lock_timeout', '2s', true)" in message[2].sql
    *_, guard, migration, verification, diary, _ = (said.sql for said in message)
    assert turn.taken(turn.RUN, chain.tables(ALL)) in guard
    assert migration == step.atomic
    assert all(words in verification for words in (step.verification, f"'{step.stem}'", "TB002", "TB003"))
    assert all(words in diary for words in (f"'{step.stem}'", "'atomic'", step.checksum, f"'{chain.version()}'"))


@each_step
def test_verification_in_the_transaction_asks_what_this_step_mends(step: chain.Step) -> None:
    """Its own file, and each other one that names it as the mender of something."""
    [text] = [said.sql for said in runner.script([step], ALL, "1") if said.part is runner.Part.VERIFICATION]
    for other in ALL:
        assert (other.verification in text) == (other is step or step.stem in other.verification)


def test_advisory_locks_are_two_positive_integers() -> None:
    assert 0 < turn.RUN < turn.BUILD < 2**31
