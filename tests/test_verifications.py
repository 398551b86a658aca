"""A verification is trusted once it was seen to fail: each item is broken alone, seen to differ, and mended.

What each breakage makes differ, and who mends it, is worked out here from the item's name, not read from the
verification: `Item.cure` and `Item.cure_without_table` say it.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pprint import pformat
from typing import Any

import psycopg
import pytest
import supabase
from budget_engine import errors
from budget_engine.commands import setup
from budget_engine.migration import chain, plan, survey
from conftest import VERIFICATIONS, Db
from psycopg import sql
from states import COLUMNS
from versions import MAJOR

STEMS = tuple(step.stem for step in chain.load())
CORE, SLOTS_TEMPLATES, SNAPSHOTS, FIX, FLAGS, REPORT, METRICS = STEMS
RECREATE = chain.RECREATE  # mends the core tables, but only where it is asked for
ONLINE = " online"

Connection = psycopg.Connection[tuple[Any, ...]]
Differences = dict[str, tuple[str | None, str | None]]  # item → actual, mended_by


class Something(str):
    """Equal to every text: what stands there, in whatever words."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str)


SOMETHING = Something()

KINDS = {
    "table": r"(?P<table>\w+)",
    "column": r"(?P<table>\w+)\.(?P<column>\w+)",
    "key": r"(?P<table>\w+) \((?P<columns>[\w, ]+)\)",
    "index": r"(?P<table>\w+) index (?P<name>\w+)",
    "foreign key": r"(?P<table>\w+) foreign key \((?P<column>\w+)\)",
    "comment": r"(?P<table>\w+)(\.(?P<column>\w+))? comment",
    "row-level security": r"(?P<table>\w+) row-level security",
    "policy": r"(?P<table>\w+) policy (?P<name>\w+)",
    "trigger": r"(?P<table>\w+) trigger (?P<name>\w+)",
    "function": r"(?P<table>\w+) function (?P<name>\w+)\(\)",
    "dependants": r"(?P<table>prompt_snapshots)\.(?P<column>turn_id) dependants",
}


@dataclass(frozen=True)
class Item:
    """One promise, and what its name says about it."""

    stem: str
    name: str
    expected: str

    @property
    def kind(self) -> str:
        found = [kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, self.name)]
        assert len(found) == 1, f"no breakage is known for {self.name!r} ({self.stem})"
        return found[0]

    def part(self, name: str) -> str:
        found = re.fullmatch(KINDS[self.kind], self.name)
        assert found
        return found.groupdict().get(name) or ""

    @property
    def table(self) -> str:
        return self.part("table")

    @property
    def column(self) -> str:
        return self.part("column")

    @property
    def cure(self) -> str | None:
        """Who mends it where it is missing from a table that stands."""
        if self.kind == "index" or self.name == "turns (game_id, idx)":
            return self.stem + ONLINE
        if self.kind == "key" or (self.kind == "column" and self.name not in ADDED_LATER):
            return RECREATE if self.stem == CORE else None
        return self.stem

    @property
    def cure_without_table(self) -> str | None:
        """Who mends it where its table is missing: whoever creates the table, as far as it creates this."""
        if self.kind in ("column", "key", "index", "foreign key") and self.stem not in (FLAGS, REPORT):
            return CREATOR[self.table]
        return self.cure

    def uses(self, table: str, column: str) -> bool:
        """Whether it goes when the column goes with CASCADE."""
        inside = self.kind in ("key", "index", "foreign key", "comment", "trigger") and self.table == table
        named = column in re.findall(r"\w+", self.expected if self.kind in ("index", "trigger") else self.name)
        return (inside and named) or f"REFERENCES {table}({column})" in self.expected


CREATOR = {
    **dict.fromkeys(("worlds", "rulesets", "entry_points", "prompt_segments", "games", "turns"), CORE),
    **dict.fromkeys(("slots", "templates"), SLOTS_TEMPLATES),
    "prompt_snapshots": SNAPSHOTS,
    "turn_metrics": METRICS,
}
ADDED_LATER = ("prompt_snapshots.parent_id", "prompt_snapshots.budget_report", "slots.must_keep", "slots.min_chars")

# Kept by any table that stands.
WITH_THE_TABLE: dict[str, Differences] = {
    "prompt_snapshots": {"prompt_snapshots.turn_id dependants": (None, SNAPSHOTS)}
}

Items = dict[str, Item]


@dataclass(frozen=True)
class Breakage:
    """SQL that breaks an item, and all that differs then; nothing, where the item must bear it."""

    item: Item
    what: str
    sql: str
    differs: Differences

    @property
    def name(self) -> str:
        return f"{self.item.name}: {self.what}"

    @property
    def mended(self) -> bool:
        return all(by not in (None, RECREATE) for _, by in self.differs.values())


def breakages(items: Items) -> list[Breakage]:
    """Every breakage of every item."""
    return [broken for item in items.values() for broken in _BREAKERS[item.kind](item, items)]


def _lost(items: Iterable[Item]) -> Differences:
    return {item.name: (None, item.cure) for item in items}


def _pointing_to(table: str, items: Items) -> list[Item]:
    return [item for item in items.values() if f"REFERENCES {table}(" in item.expected and item.table != table]


# --- tables ---

_INSTEAD = {
    "view": "CREATE VIEW {table} AS SELECT 1 AS other",
    "materialized view": "CREATE MATERIALIZED VIEW {table} AS SELECT 1 AS other",
    "partitioned table": "CREATE TABLE {table} (other int) PARTITION BY LIST (other)",
    "sequence": "CREATE SEQUENCE {table}",
    "type": "CREATE TYPE {table} AS (other int)",
    "index": "CREATE TABLE other (other int); CREATE INDEX {table} ON other (other)",
}


def _break_table(item: Item, items: Items) -> Iterator[Breakage]:
    # What else is promised of the table: of the core tables row-level security only while they bear our policy.
    within = [
        other
        for other in items.values()
        if other.table == item.table
        and other.kind != "dependants"
        and not (other.kind == "row-level security" and other.stem == CORE)
    ]
    pointing = _pointing_to(item.table, items)
    missing: Differences = {other.name: (None, other.cure_without_table) for other in within}
    missing |= WITH_THE_TABLE.get(item.table, {})
    if item.stem == CORE:
        missing |= {name: (None, CORE) for name in items if name == f"{item.table} row-level security"}
    yield Breakage(item, "dropped", f"DROP TABLE {item.table} CASCADE", missing | _lost(pointing))

    def leads_to(place: str) -> Differences:
        return {
            other.name: (other.expected.replace(f"REFERENCES {item.table}(", f"REFERENCES {place}("), None)
            for other in pointing
        }

    yield Breakage(
        item,
        "moved",
        f"CREATE SCHEMA IF NOT EXISTS older; ALTER TABLE {item.table} SET SCHEMA older",
        missing | leads_to(f"older.{item.table}"),
    )
    # RENAME leaves the names of the indexes where they are: those that the migration gives are in the way.
    older = f"older_{item.table}"
    rename = f"ALTER TABLE {item.table} RENAME TO {older}"
    indexes = [other for other in within if other.kind == "index"]
    keys: Differences = {other.name: _name_taken(other.name, older) for other in within if other.name in _NAMED_KEYS}
    taken: Differences = {index.name: (f"an index on {older}", None) for index in indexes}
    yield Breakage(item, "renamed", rename, missing | leads_to(older) | taken | keys)
    also = [f"ALTER INDEX {index.part('name')} RENAME TO older_{index.part('name')}" for index in indexes]
    if indexes:
        yield Breakage(item, "renamed, indexes too", "; ".join([rename, *also]), missing | leads_to(older) | keys)
    stripped = _lost(other for other in within if other.kind != "function") | _lost(pointing)
    stripped |= {name: ("off", by) for name, (_, by) in stripped.items() if items[name].kind == "row-level security"}
    for kind, statement in _INSTEAD.items():
        sql = f"DROP TABLE {item.table} CASCADE; {statement.format(table=item.table)}"
        differs = stripped | {item.name: (kind, RECREATE if item.stem == CORE else None)}
        if not kind.endswith(("table", "view")):  # what is no table or view stays
            differs = {name: (actual, None if by == RECREATE else by) for name, (actual, by) in differs.items()}
        yield Breakage(item, kind, sql, differs)


# --- columns ---

_NEAR = {
    "text": "character varying(80)",
    "text[]": "jsonb",
    "integer": "bigint",
    "bigint": "integer",
    "boolean": "integer",
    "uuid": "text",
    "jsonb": "json",
    "tsvector": "text",
    "timestamp with time zone": "timestamp without time zone",
}


def _break_column(item: Item, items: Items) -> Iterator[Breakage]:
    table, column = item.table, item.column
    type_, _, default = item.expected.partition(" DEFAULT ")
    type_, not_null = type_.removesuffix(" NOT NULL"), type_.endswith(" NOT NULL")
    hanging = _lost(other for other in items.values() if other.uses(table, column))
    drop = f"ALTER TABLE {table} DROP COLUMN {column} CASCADE"
    yield Breakage(item, "dropped", drop, hanging | _lost([item]))

    def as_another(what: str, form: str, by: str | None) -> Breakage:
        return Breakage(item, what, f"{drop}, ADD COLUMN {column} {form}", hanging | {item.name: (form, by)})

    yield as_another("another type", _NEAR[type_], RECREATE if item.stem == CORE else None)
    if item.name == "prompt_snapshots.turn_id":
        yield as_another("uuid", "uuid", FIX)
        yield as_another("uuid NOT NULL", "uuid NOT NULL", FIX)
    other_nullability = _with_the_other_nullability(item, items, not_null)
    yield other_nullability
    if not_null and MAJOR >= 18:
        yield _not_valid(other_nullability)
    if item.stem in (FLAGS, METRICS):
        yield from _with_another_default(item, default)
    else:
        yield Breakage(item, "no default", f"ALTER TABLE {table} ALTER COLUMN {column} DROP DEFAULT", {})


def _with_the_other_nullability(item: Item, items: Items, not_null: bool) -> Breakage:
    action = "DROP" if not_null else "SET"
    sql = f"ALTER TABLE {item.table} ALTER COLUMN {item.column} {action} NOT NULL"
    form = item.expected.replace(" NOT NULL", "") if not_null else f"{item.expected} NOT NULL"
    if " DEFAULT " in form and not not_null:
        form = item.expected.replace(" DEFAULT ", " NOT NULL DEFAULT ")
    differs: Differences = {item.name: (form, RECREATE if item.stem == CORE else None)}
    primary = items.get(f"{item.table} ({item.column})")
    if primary and primary.expected == "PRIMARY KEY":
        sql = f"{_drop_key(primary)}; {sql}"
        differs |= _lost([primary, *_pointing_to_key(primary, items)])
    return Breakage(item, f"{action} NOT NULL", sql, differs)


def _not_valid(nullable: Breakage) -> Breakage:
    """Bring a NOT NULL back that says nothing of the rows that stand."""
    item = nullable.item
    constraint = f"CONSTRAINT {item.column}_not_valid NOT NULL {item.column} NOT VALID"
    form = item.expected.replace(" NOT NULL", " NOT NULL NOT VALID"), nullable.differs[item.name][1]
    sql = f"{nullable.sql}; ALTER TABLE {item.table} ADD {constraint}"
    return Breakage(item, "NOT NULL not valid", sql, nullable.differs | {item.name: form})


def _with_another_default(item: Item, default: str) -> Iterator[Breakage]:
    alter = f"ALTER TABLE {item.table} ALTER COLUMN {item.column}"
    plain = item.expected.partition(" DEFAULT ")[0]
    if default:
        yield Breakage(item, "no default", f"{alter} DROP DEFAULT", {item.name: (plain, item.stem)})
    other = {
        "boolean": "true",
        "integer": "7",
        "bigint": "7",
        "uuid": "gen_random_uuid()",
        "jsonb": "'[]'::jsonb",
        "text[]": "'{x}'::text[]",
        "timestamp with time zone": "clock_timestamp()",
    }[plain.removesuffix(" NOT NULL")]
    yield Breakage(
        item, "another default", f"{alter} SET DEFAULT {other}", {item.name: (f"{plain} DEFAULT {other}", None)}
    )


# --- keys ---

_UNIQUE_KEYS = {
    "entry_points (slug)": "entry_points_slug_key",
    "turns (game_id, idx)": "idx_turns_game_idx",
    "prompt_snapshots (snapshot_id)": "uk_prompt_snapshots_snapshot_id",
    "slots (type, name)": "uk_slots_type_name",
    "templates (type, slot, version)": "uk_templates_type_slot_version",
}


# Those whose names the migrations give: where such a name is taken, the key cannot be made.
_NAMED_KEYS = {item for item, name in _UNIQUE_KEYS.items() if name.startswith(("uk_", "idx_"))}


def _name_taken(key: str, table: str) -> tuple[str | None, None]:
    """Return what stands in a key's place, and who mends it, where an index on that table bears the key's name."""
    own = _UNIQUE_KEYS[key].startswith("uk_") and key.startswith(f"{table} ")  # the table's own: it is missing, no more
    return None if own else f"none, and the name {_UNIQUE_KEYS[key]} is taken by an index on {table}", None


def _key_name(item: Item) -> str:
    return f"{item.table}_pkey" if item.expected == "PRIMARY KEY" else _UNIQUE_KEYS[item.name]


def _drop_key(item: Item) -> str:
    name = _key_name(item)
    return (
        f"DROP INDEX {name}" if name.startswith("idx_") else f"ALTER TABLE {item.table} DROP CONSTRAINT {name} CASCADE"
    )


def _pointing_to_key(item: Item, items: Items) -> list[Item]:
    target = f"REFERENCES {item.table}({item.part('columns')})"
    return [other for other in items.values() if target in other.expected]


def _break_key(item: Item, items: Items) -> Iterator[Breakage]:
    table, columns, name = item.table, item.part("columns"), _key_name(item)
    drop = _drop_key(item)
    lost = _lost([item, *_pointing_to_key(item, items)])
    yield Breakage(item, "dropped", drop, lost)
    invalid = f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{name}'::regclass"
    yield Breakage(item, "invalid", invalid, _lost([item]))
    yield Breakage(
        item,
        "partial",
        f"{drop}; CREATE UNIQUE INDEX other ON {table} ({columns}) WHERE created_at > '2000-01-01'",
        lost,
    )
    yield Breakage(item, "wider", f"{drop}; CREATE UNIQUE INDEX other_wider ON {table} ({columns}, created_at)", lost)
    yield Breakage(
        item, "expression", f"{drop}; CREATE UNIQUE INDEX other_expression ON {table} ({columns}, (1))", lost
    )
    deferrable = f"ALTER TABLE {table} ADD CONSTRAINT other_deferrable {item.expected} ({columns}) DEFERRABLE"
    yield Breakage(item, "deferrable", f"{drop}; {deferrable}", lost)
    # Where the name of the key is taken, nobody can build it.
    taken = f"{drop}; CREATE INDEX {name} ON {table} ({columns})"
    in_the_way = _name_taken(item.name, table) if item.name in _NAMED_KEYS else (None, item.cure)
    yield Breakage(item, "not unique", taken, lost | {item.name: in_the_way})
    if item.expected == "PRIMARY KEY":
        unique = f"{drop}; ALTER TABLE {table} ADD CONSTRAINT other UNIQUE ({columns})"
        yield Breakage(item, "unique only", unique, lost | {item.name: ("UNIQUE", item.cure)})
    yield Breakage(item, "renamed", f"ALTER INDEX {name} RENAME TO other", {})
    if item.expected == "UNIQUE":
        covering = f"{drop}; CREATE UNIQUE INDEX other ON {table} ({columns}) INCLUDE (created_at)"
        yield Breakage(item, "covering", covering, {})


# --- indexes ---


def _break_index(item: Item, _: Items) -> Iterator[Breakage]:
    table, name, definition = item.table, item.part("name"), item.expected
    drop = f"DROP INDEX {name}"
    where, always = " WHERE must_keep", " WHERE (created_at IS NOT NULL)"
    yield Breakage(item, "dropped", drop, _lost([item]))
    invalid = f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{name}'::regclass"
    yield Breakage(item, "invalid", invalid, {item.name: (f"{definition} INVALID", item.cure)})
    forms = {
        "other column": "btree (created_at)",
        "one column more": definition.replace(")", ", created_at)" if "btree" in definition else ", tags)", 1),
        "other predicate": definition.removesuffix(where) if where in definition else definition + always,
    }
    for what, form in forms.items():
        if form != definition.replace("gin (tags)", "gin (tags, tags)"):
            yield _as_another(item, what, f"{drop}; CREATE INDEX {name} ON {table} USING {form}", form)
    if definition.startswith("btree"):
        yield _as_another(
            item, "unique", f"{drop}; CREATE UNIQUE INDEX {name} ON {table} USING {definition}", f"UNIQUE {definition}"
        )
    yield _as_another(item, "elsewhere", f"{drop}; CREATE INDEX {name} ON worlds (id)", "an index on worlds")
    yield _as_another(item, "not an index", f"{drop}; CREATE SEQUENCE {name}", "not an index")
    option = "fillfactor = 70" if definition.startswith("btree") else "fastupdate = off"
    yield Breakage(item, "with an option", f"ALTER INDEX {name} SET ({option})", {})
    if where in definition:
        yield Breakage(item, "= true", f"{drop}; CREATE INDEX {name} ON {table} USING {definition} = true", {})


def _as_another(item: Item, what: str, sql: str, actual: str) -> Breakage:
    return Breakage(item, what, sql, {item.name: (actual, None)})


# --- foreign keys, comments ---


def _break_foreign_key(item: Item, _: Items) -> Iterator[Breakage]:
    alter, name = f"ALTER TABLE {item.table}", f"{item.table}_{item.column}_fkey"
    drop = f"{alter} DROP CONSTRAINT {name}"

    def with_key(definition: str) -> str:
        return f"{drop}; {alter} ADD CONSTRAINT {name} {definition}"

    yield Breakage(item, "dropped", drop, _lost([item]))
    not_valid, deferrable = f"{item.expected} NOT VALID", f"{item.expected} DEFERRABLE"
    yield Breakage(item, "not valid", with_key(not_valid), {item.name: (not_valid, item.stem + ONLINE)})
    no_action = item.expected.partition(" ON DELETE")[0]
    yield _as_another(item, "no action", with_key(no_action), no_action)
    action = (
        item.expected.replace("SET NULL", "CASCADE")
        if "SET NULL" in item.expected
        else f"{no_action} ON DELETE RESTRICT"
    )
    yield _as_another(item, "other action", with_key(action), action)
    elsewhere = re.sub(r"REFERENCES \w+", "REFERENCES other", item.expected)
    type_ = "uuid" if item.column == "parent_id" else "bigint"
    yield _as_another(
        item, "elsewhere", f"CREATE TABLE other (id {type_} PRIMARY KEY); {with_key(elsewhere)}", elsewhere
    )
    yield Breakage(item, "renamed", f"{alter} RENAME CONSTRAINT {name} TO other", {})
    second = f"{alter} ADD CONSTRAINT a_second_one {{}}"
    yield Breakage(item, "the same again", second.format(item.expected), {})
    yield Breakage(item, "the same again, not valid", second.format(not_valid), {})
    yield _as_another(item, "a second one", second.format(no_action), no_action)
    yield _as_another(item, "a second one, deferrable", second.format(deferrable), deferrable)


def _break_comment(item: Item, _: Items) -> Iterator[Breakage]:
    whose = f"COLUMN {item.table}.{item.column}" if item.column else f"TABLE {item.table}"
    yield Breakage(item, "removed", f"COMMENT ON {whose} IS NULL", _lost([item]))
    yield Breakage(item, "another", f"COMMENT ON {whose} IS 'what our team says'", {})


# --- row-level security ---


def _break_row_security(item: Item, _: Items) -> Iterator[Breakage]:
    sql = f"ALTER TABLE {item.table} DISABLE ROW LEVEL SECURITY"
    yield Breakage(item, "disabled", sql, {item.name: ("off", item.stem)})


def _break_policy(item: Item, _: Items) -> Iterator[Breakage]:
    name, table = item.part("name"), item.table
    role = item.expected.split()[2]
    drop = f"DROP POLICY {name} ON {table}"
    yield Breakage(item, "dropped", drop, _lost([item]))
    for other in ("PUBLIC", "anon", f"anon, {role}"):
        sql = f"ALTER POLICY {name} ON {table} TO {other}"
        yield _as_another(item, f"to {other}", sql, item.expected.replace(f" TO {role}", f" TO {other}"))
    another = f"{drop}; CREATE POLICY {name} ON {table} FOR DELETE TO {role} USING (false)"
    yield _as_another(item, "for another command", another, SOMETHING)


# --- the trigger and its function ---


def _break_trigger(item: Item, _: Items) -> Iterator[Breakage]:
    name, table = item.part("name"), item.table
    yield Breakage(item, "dropped", f"DROP TRIGGER {name} ON {table}", _lost([item]))
    disable = f"ALTER TABLE {table} DISABLE TRIGGER {name}"
    yield Breakage(item, "disabled", disable, {item.name: (f"{item.expected}, disabled", item.stem)})
    forms = {
        "before": item.expected.replace("AFTER", "BEFORE"),
        "also on update": item.expected.replace("INSERT", "INSERT OR UPDATE"),
        "always": re.sub(r" WHEN \(.*\) EXECUTE", " EXECUTE", item.expected),
    }
    for what, form in forms.items():
        sql = f"CREATE OR REPLACE TRIGGER {name} {form}"
        yield Breakage(item, what, sql, {item.name: (form, item.stem)})
    # PostgreSQL does not replace a constraint trigger: it is its owner's to drop.
    constraint = item.expected.replace(" FOR", " NOT DEFERRABLE INITIALLY IMMEDIATE FOR")
    sql = f"DROP TRIGGER {name} ON {table}; CREATE CONSTRAINT TRIGGER {name} {constraint}"
    yield _as_another(item, "constraint", sql, SOMETHING)


def _break_function(item: Item, items: Items) -> Iterator[Breakage]:
    name = f"{item.part('name')}()"
    hanging = [other for other in items.values() if other.kind == "trigger" and name in other.expected]
    yield Breakage(item, "dropped", f"DROP FUNCTION {name} CASCADE", _lost([item, *hanging]))
    invoker = item.expected.replace("DEFINER", "INVOKER")
    yield Breakage(item, "invoker", f"ALTER FUNCTION {name} SECURITY INVOKER", {item.name: (invoker, item.stem)})
    body = "BEGIN RETURN NULL; END"
    replaced = f"UPDATE pg_proc SET prosrc = '{body}' WHERE oid = '{name}'::regprocedure"
    source = re.sub("[0-9a-f]{32}", _md5(body), item.expected)
    yield Breakage(item, "another body", replaced, {item.name: (source, item.stem)})
    # Nor a function by one that returns something else.
    number = f"DROP FUNCTION {name} CASCADE; CREATE FUNCTION {name} RETURNS int LANGUAGE sql AS 'SELECT 1'"
    yield Breakage(item, "another kind", number, _lost(hanging) | {item.name: (SOMETHING, None)})
    elsewhere = f"CREATE SCHEMA IF NOT EXISTS older; ALTER FUNCTION {name} SET SCHEMA older"
    moved: Differences = {other.name: (other.expected.replace(name, f"older.{name}"), other.stem) for other in hanging}
    yield Breakage(item, "moved", elsewhere, moved | _lost([item]))


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


# --- what hangs on a uuid turn_id ---

_HANGING = {
    "CREATE VIEW v AS SELECT turn_id FROM prompt_snapshots": "rule _RETURN on view v",
    "CREATE INDEX other ON prompt_snapshots (turn_id)": "index other",
    "CREATE INDEX other ON prompt_snapshots (created_at) WHERE turn_id IS NULL": "index other",
    "CREATE UNIQUE INDEX idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id)": (
        "index idx_prompt_snapshots_turn_id"
    ),
    "CREATE POLICY p ON prompt_snapshots USING (turn_id IS NULL)": "policy p on table prompt_snapshots",
    "ALTER TABLE prompt_snapshots ADD COLUMN g text GENERATED ALWAYS AS (turn_id::text) STORED": (
        f"{'default value for ' if MAJOR >= 15 else ''}column g of table prompt_snapshots"
    ),
    "ALTER TABLE prompt_snapshots ADD CONSTRAINT c CHECK (turn_id IS NOT NULL)": (
        "constraint c on table prompt_snapshots"
    ),
    "CREATE STATISTICS s ON turn_id, game_id FROM prompt_snapshots": "statistics object s",
    f"CREATE PUBLICATION p FOR TABLE prompt_snapshots{COLUMNS}": (
        "publication of table prompt_snapshots in publication p"
        if COLUMNS
        else "publication p: its subscribers lack the kept column"
    ),
    "CREATE TABLE other (id uuid PRIMARY KEY);"
    "ALTER TABLE prompt_snapshots ADD CONSTRAINT c FOREIGN KEY (turn_id) REFERENCES other": (
        "constraint c on table prompt_snapshots"
    ),
    "CREATE TRIGGER t AFTER UPDATE OF turn_id ON prompt_snapshots FOR EACH ROW"
    " EXECUTE FUNCTION suppress_redundant_updates_trigger()": "trigger t on table prompt_snapshots",
}


def _break_dependants(item: Item, items: Items) -> Iterator[Breakage]:
    uuid_instead = next(b for b in _break_column(items["prompt_snapshots.turn_id"], items) if b.what == "uuid")
    for statement, hanging in _HANGING.items():
        differs = uuid_instead.differs | {item.name: (hanging, None)}
        if "idx_prompt_snapshots_turn_id" in hanging:
            differs["prompt_snapshots index idx_prompt_snapshots_turn_id"] = ("UNIQUE btree (turn_id)", None)
        if "FOREIGN KEY" in statement:
            differs["prompt_snapshots foreign key (turn_id)"] = ("FOREIGN KEY (turn_id) REFERENCES other(id)", None)
        if "POLICY" in statement:  # somebody else's policy: ours are not asked for any more
            differs = {name: how for name, how in differs.items() if items[name].kind != "policy"}
        yield Breakage(item, statement, f"{uuid_instead.sql}; {statement}", differs)


_BREAKERS: dict[str, Callable[[Item, Items], Iterator[Breakage]]] = {
    "table": _break_table,
    "column": _break_column,
    "key": _break_key,
    "index": _break_index,
    "foreign key": _break_foreign_key,
    "comment": _break_comment,
    "row-level security": _break_row_security,
    "policy": _break_policy,
    "trigger": _break_trigger,
    "function": _break_function,
    "dependants": _break_dependants,
}


# --- the tests ---


@pytest.fixture(params=["plain", "supabase"])
def ready(request: pytest.FixtureRequest, db: Db) -> Db:
    """Return a database that setup has brought to the schema."""
    if request.param == "supabase":
        supabase.install(db)
        supabase.add_profiles(db)
    assert db.invoke("setup").code == 0
    return db


@contextmanager
def verifying(db: Db) -> Iterator[tuple[Connection, Callable[[], list[survey.Item]]]]:
    """Open a session, and a look at all the items from inside it; the verifications are planned once."""
    texts = {stem: (VERIFICATIONS / f"{stem}.sql").read_text().rstrip().removesuffix(";") for stem in STEMS}
    promises = "\nUNION ALL\n".join(f"SELECT '{stem}', v.* FROM (\n{text}\n) AS v" for stem, text in texts.items())
    with db.connect() as connection:
        connection.prepare_threshold = None  # what psycopg prepares by itself, it forgets with DEALLOCATE ALL
        connection.execute("SET jit = off; SET client_min_messages = error")
        connection.execute(f"PREPARE promises AS {promises}".encode())
        yield connection, lambda: [survey.Item(*row) for row in connection.execute("EXECUTE promises").fetchall()]


def promised(found: Iterable[survey.Item]) -> Items:
    return {item.name: Item(item.stem, item.name, item.expected) for item in found}


def differing(found: Iterable[survey.Item]) -> Differences:
    return {item.name: (item.actual, item.mended_by) for item in found if not item.stands}


def test_every_item_is_known_and_has_its_breakages(ready: Db) -> None:
    with verifying(ready) as (_, look):
        found = look()
    assert differing(found) == {}
    assert len({item.name for item in found}) == len(found)
    items = promised(found)
    assert {broken.item.name for broken in breakages(items) if broken.differs} == set(items)
    assert all(item.table in CREATOR for item in items.values())


@pytest.mark.slow
def test_each_item_differs_when_it_is_broken_and_nothing_else_does(ready: Db) -> None:
    wrong: dict[str, tuple[object, object]] = {}
    with verifying(ready) as (connection, look):
        for broken in breakages(promised(look())):
            with connection.transaction(force_rollback=True):
                connection.execute(broken.sql.encode())
                found = look()
            if differing(found) != broken.differs:
                wrong[broken.name] = (
                    _without_equals(differing(found), broken.differs),
                    _without_equals(broken.differs, differing(found)),
                )
            refused = bool(plan.make(STEMS, [survey.at_hand(item, STEMS) for item in found]).in_the_way)
            if refused == broken.mended:
                wrong[broken.name + " (plan)"] = (refused, not broken.mended)
    assert not wrong, pformat(wrong, width=200)


def _without_equals(these: Differences, others: Differences) -> Differences:
    return {name: how for name, how in these.items() if others.get(name, ()) != how}


@pytest.mark.slow
def test_setup_mends_what_mended_by_says_is_mended(ready: Db) -> None:
    with verifying(ready) as (connection, look):
        mendable = [broken for broken in breakages(promised(look())) if broken.differs and broken.mended]
        for batch in batches(mendable):
            with connection.transaction():
                for broken in batch:
                    connection.execute(broken.sql.encode())
            assert differing(look()) == {name: how for broken in batch for name, how in broken.differs.items()}
            done = ready.invoke("setup")
            assert (done.code, differing(look())) == (0, {}), f"{[broken.name for broken in batch]}\n{done}"
            clear_away(connection)


def clear_away(connection: Connection) -> None:
    """Drop what a batch of breakages moved or renamed, so that the next may do so again."""
    connection.execute("DROP SCHEMA IF EXISTS older CASCADE")
    for (relation,) in connection.execute("SELECT tablename FROM pg_tables WHERE tablename LIKE 'older%'").fetchall():
        connection.execute(sql.SQL("DROP TABLE {} CASCADE").format(sql.Identifier(relation)))


def batches(mendable: list[Breakage]) -> list[list[Breakage]]:
    """Put together what does not meet: no item differs twice, and a table that goes takes all its own along."""
    done: list[list[Breakage]] = []
    for broken in mendable:
        for batch in done:
            if not any(_meet(broken, other) for other in batch):
                batch.append(broken)
                break
        else:
            done.append([broken])
    return done


def _meet(one: Breakage, other: Breakage) -> bool:
    def touched(broken: Breakage) -> set[str]:
        return {broken.item.name, *broken.differs}

    whole = "table" in (one.item.kind, other.item.kind)
    same_table = bool(
        {name.split()[0].split(".")[0] for name in touched(one)}
        & {name.split()[0].split(".")[0] for name in touched(other)}
    )
    return bool(touched(one) & touched(other)) or (whole and same_table)


@pytest.mark.slow
@pytest.mark.parametrize("ready", ["supabase"], indirect=True)
def test_setup_refuses_what_is_in_the_way(ready: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    """One breakage of each kind, and all that may hang on turn_id; that the plan refuses the others was seen above."""
    with verifying(ready) as (_, look):
        blocking = {
            (broken.item.kind, broken.what if broken.item.kind == "dependants" else ""): broken
            for broken in breakages(promised(look()))
            if not broken.mended
        }
    outcomes = {}
    for broken in blocking.values():
        with copy(ready) as copied:
            copied.execute(broken.sql)
            before = fingerprint(copied)
            monkeypatch.setenv("DATABASE_URL", copied.url)

            with pytest.raises(errors.RecipeError) as ended:
                setup.run(None)
            outcomes[broken.name] = ended.value.exit_code, fingerprint(copied) == before
    wrong = {name: outcome for name, outcome in outcomes.items() if outcome != (6, True)}
    assert not wrong, pformat(wrong, width=200)


_LOOSENED = {
    "policy opened to everybody": (
        "slots policy slots_admin",
        "ALTER POLICY slots_admin ON slots USING (true) WITH CHECK (true)",
    ),
    "policy for reading opened": (
        "turn_metrics policy turn_metrics_admin_select",
        "ALTER POLICY turn_metrics_admin_select ON turn_metrics USING (true)",
    ),
    "policy for writing opened": (
        "prompt_snapshots policy prompt_snapshots_admin_insert",
        "ALTER POLICY prompt_snapshots_admin_insert ON prompt_snapshots WITH CHECK (true)",
    ),
    "policy closed to the service": (
        "templates policy templates_service_role",
        "ALTER POLICY templates_service_role ON templates USING (false)",
    ),
    "policy made restrictive": (
        "slots policy slots_admin",
        "DROP POLICY slots_admin ON slots; CREATE POLICY slots_admin ON slots AS RESTRICTIVE FOR ALL TO authenticated"
        " USING (EXISTS (SELECT FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role = 'admin'))",
    ),
    "trigger for replicas only": (
        "slots trigger trigger_slots_critical_defaults",
        "ALTER TABLE slots ENABLE REPLICA TRIGGER trigger_slots_critical_defaults",
    ),
    "function without search_path": (
        "slots function set_critical_slot_defaults()",
        "ALTER FUNCTION set_critical_slot_defaults() RESET search_path",
    ),
    "function of a role that may not update slots": (
        "slots function set_critical_slot_defaults()",
        "GRANT CREATE ON SCHEMA public TO anon; ALTER FUNCTION set_critical_slot_defaults() OWNER TO anon",
    ),
    "function for everybody": (
        "slots function set_critical_slot_defaults()",
        "GRANT EXECUTE ON FUNCTION set_critical_slot_defaults() TO PUBLIC",
    ),
}


@pytest.mark.parametrize("what", _LOOSENED)
def test_nothing_is_loosened_in_silence(db: Db, what: str) -> None:
    """What keeps the name and the outline of what was promised, but not its effect."""
    supabase.install(db)
    supabase.add_profiles(db)
    assert db.invoke("setup").code == 0
    item, loosen = _LOOSENED[what]
    db.execute(loosen)
    found = db.differing()
    assert set(found) == {item}
    _, _, mended_by = found[item]
    done = db.invoke("setup")
    assert (done.code, set(db.differing())) == ((6, {item}) if mended_by is None else (0, set())), done


def test_the_same_foreign_key_again_is_no_obstacle(db: Db) -> None:
    assert db.invoke("setup").code == 0
    db.execute(
        "ALTER TABLE turn_metrics ADD CONSTRAINT again FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE CASCADE;"
        "COMMENT ON TABLE turn_metrics IS NULL"
    )
    assert set(db.differing()) == {"turn_metrics comment"}
    done = db.invoke("setup")
    assert done.code == 0, done
    assert db.differing() == {}


@pytest.mark.parametrize("stem", STEMS)
def test_a_verification_is_one_select_that_says_who_mends_what(db: Db, stem: str) -> None:
    verification = (VERIFICATIONS / f"{stem}.sql").read_text()
    assert db.psql("-f", str(VERIFICATIONS / f"{stem}.sql")).code == 0
    with db.connect() as connection:
        connection.execute("SET default_transaction_read_only = on")
        connection.execute(f"PREPARE one_statement AS {verification}".encode())  # refuses a second one
        found = connection.execute("EXECUTE one_statement")
        assert found.description
        assert [column.name for column in found.description] == ["item", "expected", "actual", "mended_by"]
        rows = found.fetchall()
    # On an empty database everything is missing, and for everything there is somebody who mends it.
    assert [item for item, expected, actual, by in rows if (actual == expected) != (by is None)] == []
    assert {by for *_, by in rows} <= {None, *STEMS, *(step + ONLINE for step in STEMS)}


def test_verifications_wait_for_nobody_but_access_exclusive(ready: Db) -> None:
    tables = ready.rows(
        "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname IN ('public', 'auth')"
    )
    with ready.connect(autocommit=False) as holder, ready.connect(autocommit=False) as reader:
        holder.execute(f"LOCK TABLE {', '.join(table for (table,) in tables)} IN EXCLUSIVE MODE".encode())
        reader.execute("SET lock_timeout = '1s'")
        for stem in STEMS:
            reader.execute((VERIFICATIONS / f"{stem}.sql").read_bytes())
        modes = reader.execute(
            "SELECT DISTINCT mode FROM pg_locks WHERE pid = pg_backend_pid() AND relation > 0"
        ).fetchall()
    assert modes == [("AccessShareLock",)]


@contextmanager
def copy(db: Db) -> Iterator[Db]:
    """Copy a database to which nobody is connected, for one breakage."""
    copied = replace(db, name=f"test_{uuid.uuid4().hex}")
    with psycopg.connect(db.cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {copied.name} TEMPLATE {db.name}".encode())
        yield copied
        connection.execute(f"DROP DATABASE {copied.name} WITH (FORCE)".encode())


def fingerprint(db: Db) -> str:
    """Say which version of which row stands where in the catalogs: every change of the schema changes it."""
    catalogs = [
        "pg_class",
        "pg_attribute",
        "pg_attrdef",
        "pg_constraint",
        "pg_index",
        "pg_proc",
        "pg_trigger",
        "pg_policy",
        "pg_description",
        "pg_namespace",
        "pg_type",
        "pg_rewrite",
        "pg_depend",
    ]
    rows = " UNION ALL ".join(f"SELECT '{catalog}', ctid, xmin::text FROM {catalog}" for catalog in catalogs)
    return str(db.value(f"SELECT md5(string_agg(rows::text, '' ORDER BY rows::text)) FROM ({rows}) AS rows"))
