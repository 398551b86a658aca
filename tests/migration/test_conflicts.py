"""What clears a conflict: the commands as psql runs them, on real databases with rows in every table.

Afterwards the check passes or a step fixes it, no row was written, and what was dropped comes back as it was.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest
import supabase
from budget_engine.migration import chain, conflicts, survey
from budget_engine.migration.checks import Check, Kind
from budget_engine.postgres.connection import Connection
from budget_engine.postgres.embedded import Cluster
from budget_engine.settings import Settings, parse_target
from conftest import MIGRATIONS, SEED, Db, database
from psycopg import sql
from states import (
    ANOTHER_FEATURE,
    BIGINT,
    CORE,
    CORE_ROWS,
    CORE_WITH_UUID_TURNS,
    HANGING,
    SLOTS_TEMPLATES,
    by_hand,
    old_metrics,
    random_name,
    snapshots,
    strange_names,
    with_uuid,
)
from versions import MAJOR

ROOT = MIGRATIONS.parents[1]
CHAIN = chain.load()
RECREATE = "recreate_core_schema"


def commands(db: Db) -> dict[Check, tuple[str, ...]]:
    """Return what clears each conflict."""
    with Connection(parse_target(db.url), Settings(None, "")) as connection:
        checks = survey.read(connection, CHAIN).checks
        [facts] = connection.ask([conflicts.query(checks)], conflicts.PLAIN)
    return conflicts.commands(checks, facts)


def left(db: Db) -> list[tuple[str, str | None]]:
    """Return the conflicts that there are, and how each is."""
    return [(c.title, c.actual) for c in db.checks() if c.required and not c.passed and c.fixed_by in (None, RECREATE)]


def script(db: Db) -> tuple[str, list[str]]:
    """Return what `verify --remedies` prints: each command once, in order; and the tasks."""
    every = dict.fromkeys(command for way in commands(db).values() for command in way)
    tasks = [command for command in every if command == conflicts.RECREATE]
    return "\n".join(command for command in every if command not in tasks) + "\n", tasks


def run(db: Db, folder: Path, text: str) -> None:
    """Run a script as psql reads a pipe."""
    (folder / "commands.sql").write_text(text, encoding="utf-8", newline="")
    done = db.psql("-f", str(folder / "commands.sql"))
    assert done.code == 0, f"{done}\n{text}"


def rows(db: Db) -> dict[int, Any]:
    """Return every row of every table, by its place, its writer and its values; sequences by where they are.

    Equal: no table was rewritten, no row written, no column that was there dropped.
    """
    found: dict[int, Any] = {}
    with db.connect() as connection:
        tables = connection.execute("""
            SELECT c.oid::bigint, relfilenode::bigint, relkind::text, c.oid::regclass::text,
              array_agg(attnum ORDER BY attnum),
              coalesce(string_agg(', ' || quote_ident(attname) || '::text', '' ORDER BY attnum), '')
            FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
            LEFT JOIN pg_attribute ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped
            WHERE relkind IN ('r', 'S') AND nspname !~ '^pg_|^information_schema$' GROUP BY c.oid""").fetchall()
        for oid, file, kind, name, numbers, columns in tables:
            if kind == "S":
                found[oid] = connection.execute(f"SELECT last_value, is_called FROM {name}".encode()).fetchall()
                continue
            values = connection.execute(f"SELECT ctid::text, xmin::text{columns} FROM ONLY {name}".encode()).fetchall()
            found[oid] = file, {n: [row[i] for row in values] for i, n in enumerate(["ctid", "xmin", *numbers])}
    return found


def untouched(before: dict[int, Any], after: dict[int, Any]) -> bool:
    """Whether all rows are as they were; columns may have come."""
    for oid, was in before.items():
        now = after.get(oid)
        if isinstance(was, tuple) and now:
            now = now[0], {number: now[1].get(number) for number in was[1]}
        if now != was:
            return False
    return True


def restored(text: str) -> str:
    """Return the definitions that the comments print, as somebody takes the marks away; what is first dropped, last."""
    blocks = re.findall(r"^-- to restore it[^\n]*:\n((?:-- .*\n)+?-- COMMIT;\n)", text, re.M)
    return "".join(re.sub("^-- ", "", block, flags=re.M) for block in reversed(list(dict.fromkeys(blocks))))


ORDER = (  # the fix first: where turn_id has given way, prompt_snapshots' index wants it back
    *("core_schema", "fix_prompt_snapshots_turn_id", "slots_templates", "prompt_snapshots"),
    *("slots_flags", "budget_report", "turn_metrics"),
)
STEM = {path.stem.partition("_")[2]: path.stem for path in MIGRATIONS.glob("*.sql")}


def finish(db: Db) -> list[tuple[str, str | None, str]]:
    """Run by hand the files that fix something, where nothing is a conflict; return what does not pass then."""
    for _ in ORDER:
        missing = [c for c in db.checks() if c.required and not c.passed]
        if not missing or not {c.fixed_by for c in missing} <= set(ORDER):
            break
        db.migrate(*(STEM[label] for label in ORDER if label in {c.fixed_by for c in missing}))
    return [(c.title, c.actual, c.expected) for c in missing]


NOTHING = "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
A_PARTITION = """
CREATE TABLE every_slot (LIKE slots) PARTITION BY LIST (type);
ALTER TABLE every_slot ATTACH PARTITION slots DEFAULT;"""
ANOTHER_KEY = """
ALTER TABLE slots DROP CONSTRAINT slots_pkey, ADD PRIMARY KEY (type, name), DROP CONSTRAINT uk_slots_type_name;"""
LED_TO = (
    ANOTHER_KEY
    + """
CREATE TABLE lines (type text, name text, FOREIGN KEY (type, name) REFERENCES slots);
INSERT INTO lines VALUES ('ux', 'hint');"""
)
OTHER_SLOTS = """
CREATE TABLE slots (id int PRIMARY KEY, hour int);
INSERT INTO slots VALUES (1, 9);
CREATE TABLE "Bookings" (slot int CONSTRAINT "of Slot" REFERENCES slots (id));
INSERT INTO "Bookings" VALUES (1);
COMMENT ON CONSTRAINT "of Slot" ON "Bookings" IS 'a slot';"""

UNRESTORABLE = ("materialized view turn_matview", "function turn_function", "statistics object turn_statistics")
# Each conflict of a group has commands of its own; what keeps a table from staying is alone with it.
WRONG = {
    "names in a new database": """
CREATE TABLE other (id int);
CREATE INDEX worlds ON other (id);
CREATE INDEX uk_prompt_snapshots_snapshot_id ON other (id);
-- a function that others use
CREATE FUNCTION update_entry_points_search_text() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER x BEFORE INSERT ON other FOR EACH ROW EXECUTE FUNCTION update_entry_points_search_text();""",
    "what is no table": CORE
    + """
CREATE TABLE numbered (n int); CREATE SEQUENCE slots OWNED BY numbered.n; SELECT nextval('slots');
CREATE TYPE templates AS (a int);
CREATE DOMAIN prompt_snapshots AS text; CREATE TABLE machines (s prompt_snapshots);
CREATE TYPE turn_metrics AS ENUM ('a');""",
    "tables of other kinds": by_hand()
    + A_PARTITION
    + """
ALTER TABLE templates RENAME TO texts; CREATE VIEW templates AS SELECT * FROM texts;
CREATE MATERIALIZED VIEW turn_metrics AS SELECT id AS turn_id FROM turns;""",
    "tables that have to go": CORE
    + CORE_ROWS
    + ANOTHER_FEATURE
    + """
CREATE TABLE slots (id uuid, type text) PARTITION BY LIST (type);
CREATE TABLE parts PARTITION OF slots FOR VALUES IN ('a'); INSERT INTO slots VALUES (NULL, 'a');
CREATE FOREIGN DATA WRAPPER away; CREATE SERVER away FOREIGN DATA WRAPPER away;
CREATE FOREIGN TABLE turn_metrics (turn_id bigint) SERVER away;""",
    "other features', archives taken": CORE
    + CORE_ROWS
    + ANOTHER_FEATURE
    + OTHER_SLOTS
    + "CREATE TABLE turn_metrics (id int PRIMARY KEY); CREATE SCHEMA archive; CREATE SCHEMA archive_2",
    "columns of another type, names taken": by_hand("text", "'turn ' || i")
    + old_metrics()
    + NOTHING
    + """
-- its own; a name of ours is taken by what has no table
ALTER TABLE turn_metrics ALTER tokens_before TYPE bigint; CREATE SEQUENCE idx_games_world;
-- added ones: with a default, its new name taken
ALTER TABLE slots ADD must_keep text DEFAULT 'x', ADD min_chars bigint, ADD min_chars_old int;
ALTER TABLE prompt_snapshots ADD budget_report json;
-- one that leads elsewhere
CREATE TABLE parents (id text PRIMARY KEY); INSERT INTO parents VALUES ('p');
ALTER TABLE prompt_snapshots DROP parent_id, ADD parent_id text NOT NULL DEFAULT 'p'
  CONSTRAINT prompt_snapshots_parent_id_fkey REFERENCES parents (id);
CREATE INDEX idx_prompt_snapshots_parent_id ON prompt_snapshots (parent_id);
-- a key, its name taken
ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name; CREATE INDEX uk_slots_type_name ON slots (name);
-- indexes on other columns, the one's new name taken
DROP INDEX idx_slots_type; CREATE INDEX idx_slots_type ON slots (name); CREATE INDEX idx_slots_type_old ON slots (name);
DROP INDEX idx_templates_status; CREATE INDEX idx_templates_status ON templates (slot);
CREATE CONSTRAINT TRIGGER trigger_slots_critical_defaults AFTER INSERT ON slots FOR EACH ROW EXECUTE FUNCTION nothing();
ALTER TABLE templates ALTER version DROP NOT NULL, DROP CONSTRAINT uk_templates_type_slot_version,
  ADD CONSTRAINT uk_templates_type_slot_version UNIQUE (type, slot, version) DEFERRABLE;""",
    "columns filled": by_hand(BIGINT.replace("bigint", "int"))
    + old_metrics("NOT NULL REFERENCES turns (id) ON DELETE CASCADE")
    + """
ALTER TABLE slots DROP max_len, DROP CONSTRAINT uk_slots_type_name;
-- an added column of another type, filled; one in which NULL is refused
ALTER TABLE slots ADD must_keep int NOT NULL DEFAULT 2, ADD min_chars int NOT NULL DEFAULT 0;
ALTER TABLE slots ALTER must_keep DROP DEFAULT;
CREATE INDEX idx_slots_must_keep ON slots (must_keep); CREATE VIEW kept AS SELECT must_keep FROM slots;
-- a column of another type, its key's name taken
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_parent_id_fkey;
ALTER TABLE prompt_snapshots ALTER parent_id TYPE text, ADD CONSTRAINT prompt_snapshots_parent_id_fkey CHECK (true);
ALTER TABLE turn_metrics ALTER tokens_after SET DEFAULT 0, ALTER rejects SET DEFAULT '[]',
  ALTER trims_count DROP DEFAULT;
CREATE FUNCTION set_critical_slot_defaults() RETURNS int LANGUAGE sql AS 'SELECT 1';""",
    "columns that may be NULL, after an earlier try": by_hand("bigint")
    + old_metrics("NOT NULL UNIQUE REFERENCES turns (id) ON DELETE CASCADE")
    + """
ALTER TABLE slots ADD must_keep boolean, ADD min_chars int GENERATED ALWAYS AS IDENTITY (START 7);
ALTER TABLE slots ADD CONSTRAINT slots_must_keep_given CHECK (must_keep IS NOT NULL) NOT VALID;
UPDATE slots SET must_keep = true;
-- the rest of a failed build
ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name; CREATE UNIQUE INDEX uk_slots_type_name ON slots (type, name);
UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'uk_slots_type_name'::regclass;
-- a key's name on a CHECK; the key that another one needs
ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_turn_id_fkey CHECK (turn_id > 0);
ALTER TABLE turns DROP CONSTRAINT turns_pkey CASCADE;
CREATE PROCEDURE set_critical_slot_defaults() LANGUAGE sql AS 'SELECT 1';""",
    "generated; another primary key and foreign key": """
CREATE TABLE rounds (id bigint PRIMARY KEY); INSERT INTO rounds SELECT generate_series(1, 9);"""
    + by_hand("bigint REFERENCES rounds (id)")
    + ANOTHER_KEY
    + "ALTER TABLE slots ADD must_keep boolean GENERATED ALWAYS AS (type = 'ux') STORED NOT NULL;"
    + "ALTER TABLE slots ADD min_chars int GENERATED ALWAYS AS (7) VIRTUAL;" * (MAJOR >= 18),
    "another primary key, a table leads to it": by_hand("bigint REFERENCES turns (id) ON DELETE CASCADE")
    + LED_TO
    + "ALTER TABLE slots ADD must_keep boolean; UPDATE slots SET must_keep = true;"
    + "ALTER TABLE templates ALTER body DROP NOT NULL, ADD CONSTRAINT nn NOT NULL body NOT VALID;" * (MAJOR >= 18),
    "inherited; a second foreign key": by_hand()
    + """
ALTER TABLE slots ADD min_chars int NOT NULL DEFAULT 1, ADD must_keep text;
CREATE TABLE parent (LIKE slots); ALTER TABLE slots INHERIT parent;
ALTER TABLE prompt_snapshots ADD CONSTRAINT other FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE CASCADE;""",
    "tables that move": by_hand("text", "'turn ' || i")
    + """
ALTER TABLE slots ALTER name TYPE varchar(80);
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_parent_id_fkey, DROP CONSTRAINT prompt_snapshots_pkey,
  ADD PRIMARY KEY (id, turn_id);""",
    "what hangs on turn_id": with_uuid()
    + ";".join(made for what, made in HANGING.items() if what not in UNRESTORABLE)
    + """;
DROP INDEX idx_prompt_snapshots_turn_id; CREATE INDEX idx_prompt_snapshots_turn_id ON prompt_snapshots (game_id);""",
    "what hangs on turn_id, not all of it restorable": with_uuid() + ";".join(HANGING.values()),
}


# A column that refuses NULL, though nobody writes it any more; the rest of a failed build.
LEFT_BEHIND = r"""
SELECT attrelid::regclass::text, attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid AND relkind = 'r'
WHERE attname ~ '_old$' AND attnotnull AND NOT atthasdef AND attidentity = ''
UNION ALL SELECT indrelid::regclass::text, indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"""


@pytest.mark.parametrize("name", WRONG)
def test_the_commands_clear_every_conflict_and_touch_no_row(db: Db, tmp_path: Path, name: str) -> None:
    db.execute(WRONG[name])
    text, tasks = script(db)
    assert tasks == []
    before = rows(db)
    run(db, tmp_path, text)
    assert untouched(before, rows(db))
    assert finish(db) == []
    assert db.rows(LEFT_BEHIND) == []


RENAMED = "ALTER TABLE public.slots RENAME COLUMN must_keep TO must_keep_old;\n"
WRONG_TOO = by_hand("text", "i::text") + "ALTER TABLE slots ADD must_keep text;"


@pytest.mark.parametrize(
    ("state", "commands"),
    [
        (WRONG_TOO + "ALTER TABLE turns DROP CONSTRAINT turns_pkey CASCADE, ALTER id TYPE int", RENAMED),
        (WRONG_TOO + "ALTER TABLE turns RENAME TO rounds; CREATE VIEW turns AS SELECT * FROM rounds", RENAMED),
        (CORE_WITH_UUID_TURNS + CORE_ROWS + snapshots(BIGINT.replace("bigint", "uuid")) + SLOTS_TEMPLATES, "\n"),
    ],
    ids=["int", "a view", "uuid"],
)
def test_where_the_core_has_an_older_form_the_task_is_named_that_moves_it(db: Db, state: str, commands: str) -> None:
    """And nothing about what moves with it."""
    db.execute(state)
    assert script(db) == (commands, ["invoke prereqs --recreate"])


# What hangs on turn_id, with all that a definition may be without; the literal is one that psql must not read.
HUNG = r"""
CREATE VIEW "Turn's view" WITH (security_barrier = true, check_option = local) AS
  SELECT id, turn_id AS "The turn", source FROM prompt_snapshots WHERE source <> E'a\n-- \\! touch {marker}\n';
ALTER VIEW "Turn's view" ALTER source SET DEFAULT 'manual';
ALTER VIEW "Turn's view" OWNER TO pg_monitor;
GRANT SELECT (id), UPDATE ("The turn") ON "Turn's view" TO pg_signal_backend WITH GRANT OPTION;
GRANT SELECT ON "Turn's view" TO PUBLIC;
GRANT INSERT, DELETE ON "Turn's view" TO pg_signal_backend WITH GRANT OPTION;
GRANT UPDATE ON "Turn's view" TO pg_signal_backend;
REVOKE TRUNCATE ON "Turn's view" FROM pg_monitor;
COMMENT ON VIEW "Turn's view" IS E'it''s\n\\! touch {marker}\r\\! touch {marker}';
COMMENT ON COLUMN "Turn's view"."The turn" IS 'a turn';
CREATE FUNCTION instead() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER instead INSTEAD OF UPDATE ON "Turn's view" FOR EACH ROW EXECUTE FUNCTION instead();
COMMENT ON TRIGGER instead ON "Turn's view" IS 'instead';
CREATE RULE nothing AS ON DELETE TO "Turn's view" DO INSTEAD NOTHING;
COMMENT ON RULE nothing ON "Turn's view" IS 'nothing';
CREATE VIEW above AS SELECT "The turn" FROM "Turn's view";
CREATE POLICY p ON prompt_snapshots AS RESTRICTIVE FOR UPDATE TO pg_monitor, pg_signal_backend
  USING (turn_id IS NOT NULL) WITH CHECK (turn_id <> id);
CREATE POLICY q ON slots FOR INSERT WITH CHECK (id IN (SELECT turn_id FROM prompt_snapshots));
COMMENT ON POLICY p ON prompt_snapshots IS 'p';
CREATE INDEX i ON prompt_snapshots (lower(source)) WHERE turn_id IS NULL;
COMMENT ON INDEX i IS 'i';
ALTER TABLE prompt_snapshots ADD CONSTRAINT c CHECK (turn_id <> id) NOT VALID,
  ADD CONSTRAINT u UNIQUE (turn_id) DEFERRABLE;
COMMENT ON CONSTRAINT c ON prompt_snapshots IS 'c';
CREATE TRIGGER t BEFORE UPDATE OF turn_id ON prompt_snapshots FOR EACH ROW
  WHEN (NEW.turn_id IS NULL) EXECUTE FUNCTION instead();
CREATE PUBLICATION everything FOR TABLE prompt_snapshots, turns;
"""
INVOKED = "CREATE VIEW invoked WITH (security_invoker = true) AS SELECT turn_id FROM prompt_snapshots;"  # new in 15
UUID_AND_HUNG = with_uuid() + HUNG + INVOKED * (MAJOR >= 15)
RESTORED = {
    "what hangs on turn_id; defaults; a partition": UUID_AND_HUNG
    + old_metrics()
    + r"ALTER TABLE turn_metrics ALTER rejects SET DEFAULT jsonb_build_object(E'\r\\! touch {marker}', 1),"
    " ALTER tokens_after SET DEFAULT 0, ALTER trims_count DROP DEFAULT;" + A_PARTITION,
    "with default privileges; a child": UUID_AND_HUNG
    + "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO pg_signal_backend, pg_read_all_stats;"
    "CREATE TABLE parent (LIKE prompt_snapshots); ALTER TABLE prompt_snapshots INHERIT parent",
    "foreign keys": by_hand("bigint REFERENCES turns (id) ON DELETE CASCADE DEFERRABLE")
    + "ALTER TABLE prompt_snapshots ADD CONSTRAINT o FOREIGN KEY (turn_id) REFERENCES turns (id) NOT VALID;"
    "COMMENT ON CONSTRAINT o ON prompt_snapshots IS E'it''s\\r\\n\\\\! touch {marker}'",
    # Others have made a function since, in a schema that this path searches first.
    "a function that means what it meant": with_uuid()
    + "CREATE VIEW lowered AS SELECT turn_id, lower(source) FROM prompt_snapshots;"
    "CREATE FUNCTION public.lower(text) RETURNS text LANGUAGE sql AS 'SELECT ''theirs''';"
    "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog', current_database()); END $$",
}


@pytest.mark.parametrize("name", RESTORED)
def test_what_was_dropped_comes_back_byte_for_byte(db: Db, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "touched"
    db.execute(RESTORED[name].replace("{marker}", str(marker)))
    before = db.dump()
    text, _ = script(db)
    run(db, tmp_path, text)
    assert db.dump() != before
    run(db, tmp_path, restored(text))
    assert db.dump() == before
    assert not marker.exists()


def test_whatever_a_name_holds_nothing_else_runs(db: Db, tmp_path: Path) -> None:
    """Names of views, columns, policies, indexes, constraints, and comments: printed, and run as they are."""
    names = strange_names(random.Random(SEED))
    db.execute(with_uuid())
    for name in names:
        q = sql.Identifier(name).as_string()
        db.execute(
            f"CREATE VIEW {q} AS SELECT turn_id AS {q} FROM prompt_snapshots; CREATE POLICY {q} ON"
            f" prompt_snapshots USING (turn_id IS NULL);"
            f"CREATE INDEX {sql.Identifier('i' + name[:40]).as_string()} ON prompt_snapshots (turn_id);"
            f"ALTER TABLE prompt_snapshots ADD CONSTRAINT {q} CHECK (turn_id <> id);"
            f"COMMENT ON VIEW {q} IS {sql.Literal(name).as_string()}"
        )
    before = db.dump()
    text, _ = script(db)
    assert [line for line in text.split("\n") if not line.isprintable()] == []
    piped = subprocess.run(
        [str(db.cluster.binaries / "psql"), db.url, "-XqAt", "-v", "ON_ERROR_STOP=1"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (piped.returncode, piped.stdout) == (0, ""), piped.stderr
    assert left(db) == []
    run(db, tmp_path, restored(text))
    assert db.dump() == before
    assert not any((place / "made_by_a_name").exists() for place in (tmp_path, ROOT))


def test_a_schema_of_a_strange_name(db: Db, tmp_path: Path) -> None:
    """Its commands clear all conflicts, those that run CONCURRENTLY, too."""
    name = f"s\r\\! touch {tmp_path}/m"
    q = sql.Identifier(name).as_string()
    change = (
        "ALTER TABLE slots ADD must_keep text, DROP CONSTRAINT uk_slots_type_name; ALTER TABLE slots DROP max_len;"
        + old_metrics()
    )
    db.execute(
        f"CREATE SCHEMA {q}; SET search_path = {q};"
        + by_hand()
        + change
        + "ALTER TABLE turn_metrics ALTER tokens_before TYPE text"
    )
    db.execute(f"ALTER DATABASE {db.name} SET search_path = {q}")
    text, _ = script(db)
    assert [line for line in text.split("\n") if not line.isprintable()] == []
    run(db, tmp_path, text)
    assert left(db) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "commands.sql"]


# Values that a conversion, or another session's settings, would change.
VALUES = {
    "text": ["today", "01/02/2024", "2", "", " x "],
    "int": ["2", "-1", "2147483647"],
    "bigint": ["2", "9007199254740993"],
    "uuid": ["00000000-0000-0000-0000-00000000000A"],
    "jsonb": ["1.10", "[2, 1]", "null"],
    "json": ['{"a": 1, "a": 2}', "[1.0,  1e2]", '"\\u0041"'],
    "boolean": ["true", "false"],
    "varchar(9)": ["now", "infinity", "1e3"],
    "char(5)": ["2", ""],
    "text[]": ["{b,a,NULL}", "[0:1]={b,a}", "{}"],
    "timestamp": ["2024-01-02 03:04:05.123456", "infinity"],
    "timestamptz": ["2024-10-27 02:30:00.000001+01", "0001-01-01 BC"],
    "date": ["2024-02-01", "-infinity"],
    "interval": ["1 month 30 days", "24:00:00.000001"],
    "numeric": ["1.10", "1e-20", "NaN"],
    "float8": ["-0", "0.1", "1e300"],
    "smallint": ["2", "1"],
    "bytea": [r"\x0020", ""],
}


def any_of(type_: str, chance: random.Random) -> str:
    """Write an expression that is another value of the type in each row, NULL at times."""
    values = chance.sample(VALUES[type_], chance.randint(1, len(VALUES[type_])))
    cases = "".join(f" WHEN {n} THEN '{value}'::{type_}" for n, value in enumerate(values))
    return f"(CASE floor(random() * {len(values) + chance.randint(0, 1)}){cases} END)"


ALTER = "ALTER TABLE {table} ALTER {column}"
ANEW = "ALTER TABLE {table} DROP {column} CASCADE; ALTER TABLE {table} ADD {column}"
PRIMARY = "ALTER TABLE {table} DROP CONSTRAINT {bare}_pkey CASCADE"
KEY = "{bare}_{column}_fkey"
# How each kind of a thing gets another form, some of which no table will take.
FORMS = {
    Kind.COLUMN: [
        f"{ALTER} DROP DEFAULT; {ALTER} TYPE {{type}} USING {{value}}",
        f"{ALTER} DROP DEFAULT; {ALTER} TYPE text; {ALTER} SET DEFAULT 'x'",
        f"{ALTER} DROP NOT NULL",
        f"{ALTER} SET NOT NULL",
        f"{ANEW} {{type}}; UPDATE {{table}} SET {{column}} = {{value}}",
        f"{ANEW} int GENERATED ALWAYS AS (7) STORED",
        "ALTER TABLE {table} DROP {column} CASCADE",
    ],
    Kind.DEFAULT: [f"{ALTER} SET DEFAULT NULL::int", f"{ALTER} DROP DEFAULT", f"{ALTER} SET DEFAULT 3"],
    Kind.KEY: [
        PRIMARY,
        "ALTER TABLE {table} DROP CONSTRAINT uk_{bare}_{columns}",
        f"{PRIMARY}, ADD PRIMARY KEY (id, created_at)",
    ],
    Kind.FOREIGN_KEY: [
        f"ALTER TABLE {{table}} DROP CONSTRAINT {KEY}, ADD CONSTRAINT {KEY} CHECK (true)",
        "ALTER TABLE {table} ADD CONSTRAINT another FOREIGN KEY ({column}) {target} NOT VALID",
    ],
    Kind.INDEX: [
        "DROP INDEX {column}; CREATE INDEX {column} ON {table} (created_at, id)",
        "DROP INDEX {column}; CREATE VIEW {column} AS SELECT 1",
    ],
    Kind.TRIGGER: [
        f"DROP TRIGGER {{column}} ON {{table}}; {NOTHING} CREATE CONSTRAINT TRIGGER {{column}}"
        " AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION nothing()"
    ],
    Kind.TABLE: [
        "CREATE TABLE p{bare} (LIKE {table}); ALTER TABLE {table} INHERIT p{bare}",
        "CREATE TABLE l{bare} (x int); CREATE VIEW v{bare} AS SELECT * FROM {table}",
        "ALTER TABLE {table} ADD {extra} {type}; UPDATE {table} SET {extra} = {value}",
    ],
}


def wrong_forms(checks: list[Check], chance: random.Random) -> list[str]:
    """Return statements that give some of what the checks are about another form."""
    forms = []
    for c in chance.sample(checks, chance.choice([1, 2, 4, 8, 25])):
        type_ = chance.choice(list(VALUES))
        names = {"table": c.found, "bare": c.table, "column": c.name, "columns": c.name.replace(", ", "_")}
        names |= {"type": type_, "value": any_of(type_, chance), "target": c.expected.partition(" ON ")[0]}
        names["extra"] = sql.Identifier(random_name(chance)).as_string()
        if c.kind in FORMS:
            forms.append(chance.choice(FORMS[c.kind]).format(**names))
    return forms


@pytest.mark.parametrize("number", range(int(os.environ.get("FAULT_POINTS", "4"))))
def test_no_value_changes_whatever_the_form(db: Db, tmp_path: Path, number: int) -> None:
    """Random wrong forms of everything that is required, several at once, with rows in all tables."""
    chance = random.Random(f"{SEED} {number}")
    db.execute(chance.choice([by_hand() + old_metrics(), with_uuid() + old_metrics()]))
    assert finish(db) == []
    done = []
    for form in wrong_forms([c for c in db.checks() if c.required], chance):
        try:
            db.execute(f"SELECT setseed({chance.random()}); {form}")
            done.append(form)
        except psycopg.Error:
            continue
    text, tasks = script(db)
    for table, column in re.findall(r"SELECT \* FROM (\S+) WHERE (\S+) IS NULL;", text):  # as its reader does
        assert db.rows(f"SELECT * FROM {table} WHERE {column} IS NULL") is not None
        db.execute(f"DELETE FROM {table} WHERE {column} IS NULL")
    for columns, table in re.findall(r"SELECT ([^()*]+), count\(\*\) FROM (\S+) GROUP", text):
        db.execute(f"DELETE FROM {table} AS t WHERE ctid NOT IN (SELECT min(ctid) FROM {table} GROUP BY {columns})")
    before = rows(db)
    run(db, tmp_path, text)
    assert untouched(before, rows(db)), (done, text)
    if not tasks:
        assert left(db) == [], (done, text)


def test_policies_that_say_something_else(cluster: Cluster, tmp_path: Path) -> None:
    with database(cluster, supabase.template(cluster).name) as db:
        db.execute(
            "ALTER POLICY slots_admin ON slots USING (true); DROP POLICY templates_admin ON templates;"
            "CREATE POLICY templates_admin ON templates AS RESTRICTIVE FOR DELETE TO anon, authenticated"
            " USING (body = E'it''s\\r\\n')"
        )
        before = db.dump()
        text, _ = script(db)
        run(db, tmp_path, text)
        assert left(db) == []
        run(db, tmp_path, restored(text))
        assert db.dump() == before


def test_a_backslash_comes_back(db: Db, tmp_path: Path) -> None:
    """Whatever standard_conforming_strings is where the definition is printed, and where it is run."""
    db.execute(with_uuid() + r"CREATE VIEW v AS SELECT turn_id, 'a\' AS a, E'b\r\\' AS b FROM prompt_snapshots")
    before = db.dump()
    for printed, pasted in (("off", "on"), ("on", "off")):
        db.execute(f"ALTER DATABASE {db.name} SET standard_conforming_strings = {printed}")
        text = db.call("verify", "--remedies").out
        db.execute(f"ALTER DATABASE {db.name} SET standard_conforming_strings = {pasted}")
        run(db, tmp_path, text + restored(text))
        db.execute(f"ALTER DATABASE {db.name} RESET standard_conforming_strings")
        assert "DROP VIEW" in text
        assert db.dump() == before, (printed, pasted)


@pytest.mark.parametrize("state", [CORE + CORE_ROWS + OTHER_SLOTS, by_hand() + LED_TO], ids=["moved", "stayed"])
def test_foreign_keys_of_others_come_back_to_what_moved_or_stayed(db: Db, tmp_path: Path, state: str) -> None:
    db.execute(state)
    before = db.dump()
    text, _ = script(db)
    run(db, tmp_path, text)
    leading = "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND confrelid::regclass::text LIKE '%slots'"
    assert db.value(leading) == 0
    if "archive" in text:
        db.execute("ALTER TABLE archive.slots SET SCHEMA public; DROP SCHEMA archive")
        run(db, tmp_path, restored(text))
        assert db.dump() == before
    else:
        kept = [line for line in restored(text).splitlines(keepends=True) if " PRIMARY KEY " not in line]
        run(db, tmp_path, "".join(kept))
        assert db.value(leading) == 1


def test_what_no_command_restores_is_not_dropped(db: Db, tmp_path: Path) -> None:
    db.execute(
        with_uuid()
        + ";".join(HANGING[what] for what in (*UNRESTORABLE, "trigger turn_trigger", "index turn_other_name"))
        + """;
ALTER TABLE prompt_snapshots DISABLE TRIGGER turn_trigger, CLUSTER ON turn_other_name;
CREATE SEQUENCE turn_sequence OWNED BY prompt_snapshots.turn_id; SELECT nextval('turn_sequence');
-- rights that another than its owner gave
CREATE VIEW turn_view AS SELECT turn_id FROM prompt_snapshots;
GRANT SELECT ON turn_view TO pg_monitor WITH GRANT OPTION;
SET ROLE pg_monitor; GRANT SELECT ON turn_view TO pg_read_all_stats; RESET ROLE"""
    )
    before = db.dump(data=True)
    text, _ = script(db)
    told = " ".join(re.findall("^-- (.*): no command restores it", text, re.M))
    all_of_them = "function matview other_name sequence statistics trigger view"
    assert sorted(re.findall(r"\bturn_(\w+)", told)) == all_of_them.split()
    run(db, tmp_path, text)
    renamed = "ALTER TABLE prompt_snapshots RENAME turn_id_old TO turn_id;"
    db.execute(renamed + "ALTER INDEX idx_prompt_snapshots_turn_id_old RENAME TO idx_prompt_snapshots_turn_id")
    assert db.dump(data=True) == before
