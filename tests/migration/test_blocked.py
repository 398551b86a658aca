"""What around a table keeps a column or a foreign key from being added: the first survey sees it, commands clear it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import states
from conftest import Db, assert_done


def filled(table: str, columns: int = 1600) -> str:
    """Write what uses up the columns of a table; what is added is dropped, as DROP does it, in a third of the time."""
    return f"""
        DO $$ BEGIN
          EXECUTE (SELECT format('ALTER TABLE {table} %s', string_agg('ADD c' || i || ' int', ','))
                   FROM pg_class, generate_series(1, {columns} - relnatts) AS i WHERE oid = '{table}'::regclass);
          UPDATE pg_attribute SET attisdropped = true, atttypid = 0,
            attname = format('........pg.dropped.%s........', attnum)
          WHERE attrelid = '{table}'::regclass AND attname ~ '^c[0-9]+$';
        END $$;"""


TYPED = """
CREATE TYPE slot AS (id uuid, type text, name text, description text, max_len int, priority int,
                     created_at timestamptz, updated_at timestamptz);
CREATE TABLE slots OF slot (PRIMARY KEY (id), UNIQUE (type, name), type NOT NULL, name NOT NULL, description NOT NULL,
                            created_at NOT NULL, updated_at NOT NULL);
"""
WORLDS = """
CREATE UNLOGGED TABLE worlds (id text PRIMARY KEY, version text NOT NULL, status text NOT NULL, doc jsonb NOT NULL,
                              created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL);
"""
NO_IDENTITY = "ALTER TABLE slots REPLICA IDENTITY NOTHING;"
CHILD = "CREATE TABLE child ({}) INHERITS ({});"

SLOTS = {"slots.must_keep", "slots.min_chars"}
TURNS = {"foreign key prompt_snapshots (turn_id)", "foreign key turn_metrics (turn_id)"}
UNLOGGED_TURNS = """
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_turn_id_fkey; ALTER TABLE turns SET UNLOGGED;"""

# Some states that do not meet, and what the survey reports of them.
BLOCKED = {
    "unlogged worlds": (WORLDS, {"foreign key entry_points (world_id)", "foreign key games (world_id)"}),
    "unlogged core, typed slots": (
        states.CORE + "ALTER TABLE turns SET UNLOGGED; ALTER TABLE games SET UNLOGGED;"
        "ALTER TABLE entry_points SET UNLOGGED;" + TYPED,
        {"foreign key prompt_snapshots (game_id)"} | TURNS | SLOTS,
    ),
    "unlogged turns, a child published without identity": (
        states.by_hand() + UNLOGGED_TURNS + CHILD.format("", "slots") + "CREATE PUBLICATION p FOR TABLE child",
        TURNS | SLOTS,
    ),
    "uuid, unlogged turns; published, its identity's index is gone": (
        states.with_uuid() + "ALTER TABLE turns SET UNLOGGED;"
        "ALTER TABLE slots REPLICA IDENTITY USING INDEX uk_slots_type_name;"
        "ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name, ADD CONSTRAINT uk_slots_type_name UNIQUE (type, name);"
        "CREATE PUBLICATION p FOR TABLE slots",
        TURNS | SLOTS,
    ),
    "one column left, none for the fix": (
        states.with_uuid() + filled("slots", 1599) + filled("prompt_snapshots", 1599),
        {"prompt_snapshots.turn_id", "prompt_snapshots.budget_report"} | SLOTS,
    ),
    "children without room, one with another type": (
        states.by_hand()
        + CHILD.format("", "slots")
        + filled("child")
        + "CREATE TABLE typed (budget_report text) INHERITS (prompt_snapshots);"
        + filled("typed"),
        {"prompt_snapshots.budget_report"} | SLOTS,
    ),
    "children with other types": (
        states.by_hand()
        + """
CREATE TABLE child (must_keep text NOT NULL) INHERITS (slots);
CREATE TABLE keyed (must_keep text PRIMARY KEY) INHERITS (slots);
CREATE TABLE named (must_keep text, must_keep_old int) INHERITS (slots);
CREATE TABLE between () INHERITS (slots); CREATE TABLE its_child (min_chars bigint) INHERITS (between);
-- one that has it from another table, too: no command but to move the table
CREATE TABLE others (budget_report text); CREATE TABLE shared () INHERITS (prompt_snapshots, others);""",
        {"prompt_snapshots.budget_report"} | SLOTS,
    ),
    "more than one reason": (
        states.by_hand()
        + NO_IDENTITY
        + CHILD.format("must_keep text", "slots")
        + "CREATE PUBLICATION p FOR ALL TABLES;"
        + UNLOGGED_TURNS,
        TURNS | SLOTS,
    ),
}


# Where nothing else helps than to move a table, which ones.
MOVED = {
    "one column left, none for the fix": {"slots", "prompt_snapshots"},
    "children without room, one with another type": {"slots", "prompt_snapshots"},
    "children with other types": {"prompt_snapshots"},
}
LOOKS = ("doctor", "status --check", "plan", "plan --sql", "rehearse")  # they read one plan: each state has one


@pytest.mark.parametrize("name", BLOCKED)
def test_what_keeps_a_statement_from_working_is_seen_first_and_cleared_by_the_commands(
    db: Db, tmp_path: Path, name: str
) -> None:
    state, titles = BLOCKED[name]
    db.execute(state)
    before, rows = db.fingerprint(), states.contents(db)
    assert {check.title for check in db.checks() if check.conflict} == titles
    for task in (LOOKS[list(BLOCKED).index(name) % len(LOOKS)], "setup"):
        done = db.call(*task.split())
        assert done.code == 6, (task, done)
    assert db.fingerprint() == before
    commands = tmp_path / "commands.sql"
    commands.write_text(db.call("verify", "--remedies").out)
    assert set(re.findall(r"ALTER TABLE public.(\w+) SET SCHEMA", commands.read_text())) == MOVED.get(name, set())
    assert db.psql("-f", str(commands)).code == 0, commands.read_text()
    assert_done(db)
    values = [set(map(str, row.values())) for table in states.contents(db).values() for row in table]
    gone = [
        row for table in rows.values() for row in table if not any(set(map(str, row.values())) <= v for v in values)
    ]
    assert gone == []


def test_what_blocks_one_step_keeps_no_other_from_running(db: Db) -> None:
    """The survey says more of such a check than the transaction's own verification: that is no other run's work."""
    db.execute(states.by_hand() + CHILD.format("must_keep text", "slots"))
    assert db.call("turn-metrics").code == 0
    assert db.call("slots-flags").code == 6


HARMLESS = {
    "unlogged, inherited, two columns left": states.by_hand("bigint")
    + states.old_metrics("PRIMARY KEY")
    + """
ALTER TABLE slots SET UNLOGGED;
ALTER TABLE prompt_snapshots SET UNLOGGED; ALTER TABLE turn_metrics SET UNLOGGED; ALTER TABLE turns SET UNLOGGED;
"""
    + filled("slots", 1598)
    + CHILD.format("must_keep boolean NOT NULL DEFAULT true", "slots"),
    "published: inserts alone, by whole rows, and what nobody updates": states.by_hand()
    + NO_IDENTITY
    + CHILD.format("", "slots")
    + """
CREATE PUBLICATION inserts FOR TABLE ONLY slots WITH (publish = 'insert');
ALTER TABLE child REPLICA IDENTITY FULL; CREATE PUBLICATION rows FOR TABLE child;
ALTER TABLE prompt_snapshots REPLICA IDENTITY NOTHING; CREATE PUBLICATION p FOR TABLE prompt_snapshots;""",
}


@pytest.mark.parametrize("state", HARMLESS.values(), ids=HARMLESS)
def test_what_keeps_nothing_from_working_is_no_conflict(db: Db, state: str) -> None:
    db.execute(state)
    assert db.call("doctor").code == 0
    assert_done(db)


@pytest.mark.parametrize(
    ("look", "column"),
    [("doctor", ""), ("plan", "ALTER TABLE slots ADD must_keep boolean NOT NULL, ADD min_chars int;")],
)
def test_a_child_of_another_owner(db: Db, role: str, look: str, column: str) -> None:
    """A column, or a default alone, that is added to the child, too."""
    db.execute(states.by_hand() + "TRUNCATE slots;" + column + states.OWN.replace("{role}", role))
    db.execute("CREATE TABLE child () INHERITS (slots)")
    before = db.fingerprint()
    for task in (look, "setup"):
        done = db.call(task, role=role)
        assert (done.code, "ownership of table public.child" in done.out + done.err) == (8, True), done
    assert db.fingerprint() == before
