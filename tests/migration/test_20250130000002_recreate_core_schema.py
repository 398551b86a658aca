"""20250130000002_recreate_core_schema: what gives way moves whole, what comes is new, and nobody is surprised."""

from __future__ import annotations

import re
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import psycopg
import pytest
import supabase
from budget_engine.migration import chain
from budget_engine.postgres import embedded
from conftest import MIGRATIONS, Db, Run, database, ended, until
from proxy import Proxy, socket_of
from states import (
    BIGINTS,
    CORE,
    CORE_ROWS,
    CORE_WITH_UUID_TURNS,
    SLOT_ROWS,
    SLOTS_TEMPLATES,
    snapshot_rows,
    snapshots,
)
from terminal import on_terminal

STEM = "20250130000002_recreate_core_schema"
CORE_SCHEMA = "20250130000000_core_schema"
AFTERWARDS = ("20250214_slots_templates", "20250213_prompt_snapshots", "20250222_turn_metrics")
CORE_TABLES = ("worlds", "rulesets", "entry_points", "prompt_segments", "games", "turns")
DEPENDANTS = ("prompt_snapshots", "turn_metrics")
ASKING = ("prereqs", "--recreate")
TASK = (*ASKING, "--yes")
WITH_DEPENDANTS = {"PGOPTIONS": "-c budget_engine.with_dependants=on"}


def metrics(turn_id: str) -> str:
    return f"""
CREATE TABLE turn_metrics (
  turn_id {turn_id}, story_id uuid NOT NULL, created_at timestamptz NOT NULL DEFAULT now(),
  tokens_before int NOT NULL, tokens_after int NOT NULL, trims_count int NOT NULL DEFAULT 0,
  top_trim_keys text[] DEFAULT '{{}}', model_ms int, rejects jsonb DEFAULT '{{}}', cost_estimate_cents int);
INSERT INTO turn_metrics (turn_id, story_id, tokens_before, tokens_after) SELECT id, game_id, 9, 8 FROM turns;
"""


ENTRY = """
INSERT INTO worlds (id) VALUES ('w');
INSERT INTO rulesets (id) VALUES ('r');
INSERT INTO entry_points (id, slug, type, world_id, ruleset_id, title, description)
VALUES ('e', 's', 'quest', 'w', 'r', 'Salt', 'Sea');
"""
GAME = f"""
INSERT INTO games (id, entry_point_id, entry_point_type, world_id, ruleset_id)
VALUES ('{uuid.UUID(int=1)}', 'e', 'quest', 'w', 'r');
"""
UUID_CORE = CORE_WITH_UUID_TURNS + CORE_ROWS
UUID_TURNS = (
    UUID_CORE
    + snapshots("uuid REFERENCES turns (id) ON DELETE SET NULL")
    + snapshot_rows("(SELECT id FROM turns ORDER BY id OFFSET i LIMIT 1)")
    + SLOTS_TEMPLATES
    + SLOT_ROWS
    + metrics("uuid PRIMARY KEY REFERENCES turns (id) ON DELETE CASCADE")
    + "ALTER TABLE prompt_snapshots ADD budget_report jsonb"
)
INT_TURNS = CORE.replace("bigserial PRIMARY KEY, game_id", "serial PRIMARY KEY, game_id") + CORE_ROWS
BY_HAND = CORE + CORE_ROWS + snapshots("bigint REFERENCES turns") + snapshot_rows(BIGINTS)
PARTITIONED = """
CREATE TABLE turns (id bigint, game_id uuid REFERENCES games (id), idx int, PRIMARY KEY (id, idx))
  PARTITION BY LIST (idx);
CREATE TABLE turns_1 PARTITION OF turns FOR VALUES IN (1);
CREATE TABLE turns_rest PARTITION OF turns DEFAULT;
INSERT INTO turns
SELECT 10 * j + i, md5('game ' || i)::uuid, j FROM generate_series(1, 3) AS i, generate_series(1, 3) AS j;
"""

WITHOUT_TURNS = CORE + "DROP TABLE turns;" + CORE_ROWS[: CORE_ROWS.index("INSERT INTO turns")]

OLD = {
    # name: (state, tables that move besides those of the core)
    "turns.id uuid": (UUID_TURNS, DEPENDANTS),
    "turns.id int": (INT_TURNS + metrics("int PRIMARY KEY REFERENCES turns (id)"), ("turn_metrics",)),
    "turns without idx, nothing else": ("CREATE TABLE turns (id uuid PRIMARY KEY)", ()),
    "turns without primary key": (
        BY_HAND + "ALTER TABLE turns DROP CONSTRAINT turns_pkey CASCADE",
        DEPENDANTS[:1],
    ),
    "games.id text": (
        WITHOUT_TURNS
        + "ALTER TABLE games ALTER id DROP DEFAULT, ALTER id TYPE text;"
        + "CREATE TABLE turns (game_id text REFERENCES games)",
        (),
    ),
    "rulesets.id int, which entry_points is to lead to": ("CREATE TABLE rulesets (id int PRIMARY KEY)", ()),
    "entry_points without id, which games is to lead to": ("CREATE TABLE entry_points (slug text)", ()),
    "a view": (WITHOUT_TURNS + "CREATE TABLE t (id bigint); CREATE VIEW turns AS TABLE t", ()),
    "a materialized view": (
        WITHOUT_TURNS + "CREATE TABLE t (id bigint); CREATE MATERIALIZED VIEW turns AS TABLE t",
        (),
    ),
    "turns partitioned": (
        CORE[: CORE.index("CREATE TABLE IF NOT EXISTS turns")]
        + CORE_ROWS[: CORE_ROWS.index("INSERT INTO turns")]
        + PARTITIONED,
        ("turns_1", "turns_rest"),
    ),
    "turns a partition": (
        WITHOUT_TURNS
        + "CREATE TABLE all_turns (id bigint PRIMARY KEY) PARTITION BY RANGE (id);"
        + "CREATE TABLE turns PARTITION OF all_turns DEFAULT; INSERT INTO turns VALUES (7)",
        (),
    ),
    "turns with a child": (UUID_CORE + "CREATE TABLE old_turns (note text) INHERITS (turns)", ("old_turns",)),
    "snapshots without foreign keys": (
        UUID_CORE
        + snapshots("bigint").replace("game_id uuid REFERENCES games (id) ON DELETE SET NULL", "game_id uuid"),
        (),
    ),
}
# What differs here is documented, and the application's affair.
DOCUMENTED = (
    BY_HAND
    + """
ALTER TABLE games DROP state;
ALTER TABLE entry_points DROP CONSTRAINT entry_points_slug_key, DROP CONSTRAINT entry_points_world_id_fkey;
ALTER TABLE games DROP CONSTRAINT games_world_id_fkey; ALTER TABLE worlds ALTER id TYPE varchar;
"""
)
NOT_NEEDED = {
    "empty": "",
    "core": CORE + CORE_ROWS,
    "no index": BY_HAND + "DROP INDEX idx_turns_game_idx",
    "documented": DOCUMENTED
    + "ALTER TABLE prompt_segments ALTER content DROP NOT NULL, DROP CONSTRAINT prompt_segments_pkey",
    "documented, a view": DOCUMENTED
    + "ALTER TABLE prompt_segments RENAME TO s; CREATE VIEW prompt_segments AS TABLE s",
}


def by_psql(db: Db, *before: str, options: str = "") -> Run:
    """Run the file by hand."""
    statements = [word for statement in (options, *before) if statement for word in ("-c", statement)]
    return db.psql(*statements, "-v", "VERBOSITY=verbose", "-f", str(MIGRATIONS / f"{STEM}.sql"))


SKIPPED = r".*NOTICE:  .*already exists, skipping\nLOCATION: .*\n"


@contextmanager
def in_transaction(db: Db) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """Run what the file and the core schema's do in their transaction, look, and roll back."""
    recreate = chain.load().recreate
    assert recreate is not None
    with db.connect(autocommit=False) as connection:
        connection.execute("SET lock_timeout = '100ms'")
        for statement in recreate.statements:
            if statement.step in ("recreate_core_schema", "core_schema"):
                connection.execute(statement.text.encode())
        yield connection
        connection.rollback()


ALONG = "SET budget_engine.with_dependants = on"


def place(db: Db, oid: int) -> str:
    return str(db.value(f"SELECT relnamespace::regnamespace FROM pg_class WHERE oid = {oid}"))


def standing(db: Db, names: Sequence[str]) -> dict[str, int]:
    """Return name → OID of what stands under these names."""
    listed = ", ".join(f"('{name}')" for name in names)
    query = f"SELECT name, to_regclass(name)::oid::bigint FROM (VALUES {listed}) AS n (name)"
    return {name: oid for name, oid in db.rows(query) if oid is not None}


# Where it is, and what vacuum and ANALYZE write there: all else must stay.
_CHANGES = (
    "{relnamespace,connamespace,relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,relminmxid,relhasindex}"
)
_ANATOMY = """
WITH whole (oid) AS (
  SELECT unnest(ARRAY[{oids}]::oid[])
  UNION SELECT indexrelid FROM pg_index WHERE indrelid IN ({oids})
  UNION SELECT objid FROM pg_depend
        WHERE classid = 'pg_class'::regclass AND refclassid = classid AND refobjid IN ({oids}) AND deptype IN ('a', 'i')
)
SELECT 'class', to_jsonb(c) - '{changes}'::text[] FROM pg_class AS c WHERE oid IN (TABLE whole)
UNION ALL SELECT 'column', to_jsonb(a) FROM pg_attribute AS a WHERE attrelid IN (TABLE whole)
UNION ALL SELECT 'default', to_jsonb(d) FROM pg_attrdef AS d WHERE adrelid IN (TABLE whole)
UNION ALL SELECT 'constraint', to_jsonb(k) - '{changes}'::text[] FROM pg_constraint AS k
          WHERE conrelid IN (TABLE whole) OR confrelid IN (TABLE whole)
UNION ALL SELECT 'index', to_jsonb(i) FROM pg_index AS i WHERE indrelid IN (TABLE whole)
UNION ALL SELECT 'policy', to_jsonb(p) FROM pg_policy AS p WHERE polrelid IN (TABLE whole)
UNION ALL SELECT 'trigger', to_jsonb(t) FROM pg_trigger AS t WHERE tgrelid IN (TABLE whole)
UNION ALL SELECT 'comment', to_jsonb(m) FROM pg_description AS m
          WHERE objoid IN (TABLE whole) AND classoid = 'pg_class'::regclass
UNION ALL SELECT 'published', to_jsonb(r) FROM pg_publication_rel AS r WHERE prrelid IN (TABLE whole)
ORDER BY 1, 2"""


def anatomy(db: Db, oids: Sequence[int]) -> list[tuple[Any, ...]]:
    """Return all that the catalogs say of these relations, their indexes and sequences, by OID."""
    return db.rows(_ANATOMY.format(oids=", ".join(map(str, oids)), changes=_CHANGES))


def rows(db: Db, oids: Sequence[int]) -> dict[int, Any]:
    """Return the rows of these relations, by OID."""
    names = dict(
        db.rows(f"SELECT oid::bigint, oid::regclass::text FROM pg_class WHERE oid IN ({', '.join(map(str, oids))})")
    )
    query = "SELECT coalesce(jsonb_agg(to_jsonb(t) ORDER BY to_jsonb(t)::text), '[]') FROM {} AS t"
    return {oid: db.value(query.format(name)) for oid, name in names.items()}


def dated(dump: str) -> str:
    """Return the dump with the moment in the archive's comment taken out."""
    return re.sub(r"as it was until [^,]*,", "as it was,", dump)


def nothing_of_the_core_differs(db: Db) -> bool:
    return [check.title for check in db.checks() if check.step == "core_schema" and not check.passed] == []


# ── what moves, and what comes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "by"), [*zip(OLD, cycle(["task", "psql"]), strict=False)])
def test_what_gives_way_moves_whole_and_what_comes_is_empty(db: Db, name: str, by: str) -> None:
    """By psql and by the task in turns: they run the same file, and end alike (see below)."""
    state, others = OLD[name]
    db.execute(state)
    old = standing(db, [*CORE_TABLES, *others])
    assert set(others) <= set(old)
    bystanders = list(set(standing(db, [*DEPENDANTS, "slots", "templates"]).values()) - set(old.values()))
    whole, held = anatomy(db, list(old.values())), rows(db, list(old.values()))
    aside = (anatomy(db, bystanders), rows(db, bystanders)) if bystanders else None
    done = by_psql(db) if by == "psql" else db.invoke(*TASK)
    assert done.code == 0, done
    assert re.search(r"\bmoved to core_archive\b", done.out + done.err), done
    assert anatomy(db, list(old.values())) == whole
    assert rows(db, list(old.values())) == held
    assert {place(db, oid) for oid in old.values()} == {"core_archive"}
    assert bystanders == [] or by == "task" or (anatomy(db, bystanders), rows(db, bystanders)) == aside
    assert nothing_of_the_core_differs(db)
    new = standing(db, [*CORE_TABLES, *(name for name in others if name in DEPENDANTS)])
    assert not set(new.values()) & set(old.values())
    assert {str(value) for value in rows(db, list(new.values())).values()} == {"[]"}
    assert db.invoke("setup").code == 0
    assert db.differing() == {}


@pytest.mark.parametrize("name", ["turns.id uuid", "turns partitioned", "a view"])
def test_by_psql_alone_it_is_what_the_task_makes(db: Db, name: str) -> None:
    db.execute(OLD[name][0])
    with database(db.cluster, db.name) as other:
        assert other.invoke(*TASK).code == 0
        assert by_psql(db).code == 0
        db.migrate(*AFTERWARDS[: 3 if "turn_metrics" in OLD[name][1] else 2])
        assert dated(db.dump(data=True)) == dated(other.dump(data=True))


@pytest.mark.parametrize("name", ["turns.id uuid", "turns partitioned"])
def test_run_again_it_does_nothing_and_locks_nothing(db: Db, name: str) -> None:
    db.execute(OLD[name][0])
    assert db.invoke(*TASK).code == 0
    before = db.dump(data=True)
    tables = f"{', '.join(CORE_TABLES)}, prompt_snapshots"
    with db.connect(autocommit=False) as holder:
        holder.execute(f"LOCK TABLE {tables} IN ROW EXCLUSIVE MODE")  # IF NOT EXISTS asks for its lock first
        done = by_psql(db, "SET lock_timeout = '1ms'")
        assert (done.code, re.sub(SKIPPED, "", done.err)) == (0, "")
        holder.execute(f"LOCK TABLE {tables} IN EXCLUSIVE MODE")
        done = db.invoke("prereqs", "--recreate", env={"LOCK_TIMEOUT": "1ms"})
        assert done.code == 0, done
        with in_transaction(db) as connection:
            assert connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchall() == [(None,)]
    assert db.dump(data=True) == before


def test_on_an_empty_database_it_is_the_core_schema(db: Db) -> None:
    with database(db.cluster, db.name) as other:
        other.migrate(CORE_SCHEMA)
        db.migrate(STEM)
        assert db.dump() == other.dump()


@pytest.mark.parametrize("state", NOT_NEEDED.values(), ids=NOT_NEEDED)
def test_where_it_is_not_needed_the_task_is_prereqs(db: Db, state: str) -> None:
    if state:
        db.execute(state)
    with database(db.cluster, db.name) as other:
        assert other.invoke("prereqs").code == 0
        done = db.invoke("prereqs", "--recreate")
        assert done.code == 0, done
        assert db.dump(data=True) == other.dump(data=True)
    assert db.rows("SELECT FROM pg_namespace WHERE nspname ~ 'archive'") == []
    before = db.dump(data=True)
    assert by_psql(db).code == 0
    assert db.dump(data=True) == before


def test_a_name_that_is_taken_is_left_alone(db: Db) -> None:
    db.execute(
        UUID_TURNS
        + "; CREATE SCHEMA core_archive; CREATE TABLE core_archive.turns (mine int); CREATE SCHEMA core_archive_2"
    )
    before = rows(db, [mine := db.value("SELECT 'core_archive.turns'::regclass::oid::bigint")])
    done = db.invoke(*TASK)
    assert done.code == 0, done
    assert "core_archive_3" in done.out
    assert rows(db, [mine]) == before
    assert db.value("SELECT to_regclass('core_archive_3.turns') IS NOT NULL") is True


def test_the_comment_of_the_schema_says_what_it_is(db: Db) -> None:
    db.execute(UUID_TURNS)
    assert by_psql(db).code == 0
    comment = db.value("SELECT obj_description('core_archive'::regnamespace, 'pg_namespace')")
    assert "turns.id is uuid, expected bigint" in comment
    assert STEM in comment


def test_the_old_trigger_keeps_its_function(db: Db) -> None:
    db.execute(
        UUID_TURNS
        + """;
        CREATE FUNCTION update_entry_points_search_text() RETURNS trigger LANGUAGE plpgsql AS
          $$ BEGIN NEW.search_text := to_tsvector('simple', 'theirs'); RETURN NEW; END $$;
        CREATE TRIGGER theirs BEFORE INSERT OR UPDATE ON entry_points
          FOR EACH ROW EXECUTE FUNCTION update_entry_points_search_text()"""
    )
    assert by_psql(db).code == 0
    db.execute("UPDATE core_archive.entry_points SET title = 'again'")
    assert (
        db.value("SELECT bool_and(search_text = to_tsvector('simple', 'theirs')) FROM core_archive.entry_points")
        is True
    )
    db.execute(ENTRY)
    assert db.value("SELECT search_text::text FROM entry_points") == "'salt':1A 'sea':2"


def test_the_old_tables_go_on_working(db: Db) -> None:
    db.execute(UUID_TURNS)
    assert by_psql(db).code == 0
    db.execute("DELETE FROM core_archive.games")
    assert rows(db, [db.value("SELECT 'core_archive.turns'::regclass::oid::bigint")]).popitem()[1] == []
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        db.execute("UPDATE core_archive.prompt_snapshots SET turn_id = gen_random_uuid()")


def test_what_reads_the_old_tables_is_named(db: Db) -> None:
    db.execute(
        UUID_TURNS
        + """;
        CREATE VIEW busy_games AS SELECT id FROM games WHERE turn_count > 1;
        CREATE MATERIALIZED VIEW all_turns AS SELECT id FROM turns;
        CREATE FUNCTION last_turn() RETURNS uuid BEGIN ATOMIC SELECT id FROM turns LIMIT 1; END;
        CREATE TABLE secrets (game uuid); CREATE POLICY players ON secrets USING (game IN (SELECT id FROM games));
        CREATE PUBLICATION everything FOR TABLE turns, games"""
    )
    done = db.invoke(*TASK)
    assert done.code == 0, done
    for word in (
        "view public.busy_games",
        "materialized view public.all_turns",
        "function public.last_turn()",
        "policy players",
        "publication everything",
    ):
        assert word in done.out, done
    assert db.value("SELECT count(*) FROM busy_games") == 3
    assert db.rows("SELECT DISTINCT schemaname FROM pg_publication_tables") == [("core_archive",)]


# ── ids ────────────────────────────────────────────────────────────────────────────────────────────────────────────

METRIC = "VALUES (5000, gen_random_uuid(), 1, 1)"

IDS = {
    # name: (state, the next id of turns)
    "the greatest id": (INT_TURNS, 10),
    "the sequence, where rows went": (INT_TURNS + "DELETE FROM turns", 10),
    "an id above the sequence": (INT_TURNS + "UPDATE turns SET id = 777 WHERE id = 9", 778),
    "no index": (INT_TURNS + "ALTER TABLE turns DROP CONSTRAINT turns_pkey", 10),
    "metrics of turns that are gone": (
        UUID_CORE + metrics("bigint PRIMARY KEY").replace("SELECT id, game_id, 9, 8 FROM turns", METRIC),
        5001,
    ),
    "snapshots of turns that are gone": (UUID_CORE + snapshots("bigint") + snapshot_rows("i * 100"), 401),
    "partitions": (OLD["turns partitioned"][0], 34),
    "identity": (
        CORE.replace("id bigserial PRIMARY KEY, game_id", "id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, game_id")
        + CORE_ROWS,
        10,
    ),
    "uuid, no row": (CORE_WITH_UUID_TURNS, 1),
}


@pytest.mark.parametrize(("state", "next_id"), IDS.values(), ids=IDS)
def test_ids_go_on_above_the_old_ones(db: Db, state: str, next_id: int) -> None:
    db.execute(state)
    done = by_psql(db)
    assert done.code == 0, done
    assert db.value("SELECT nextval(pg_get_serial_sequence('turns', 'id'))") == next_id
    if "INSERT INTO prompt_segments" in state:
        assert db.value("SELECT nextval(pg_get_serial_sequence('prompt_segments', 'id'))") == 3


# ── owner, grants, row-level security ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def roles(cluster: embedded.Cluster) -> Iterator[tuple[str, str, str]]:
    """Owner, application, reader; ask for them before db, so that they are dropped after it."""
    number = uuid.uuid4().hex[:8]
    names = (f"owner {number}", f"app_{number}", f"reader_{number}")
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        for name in names:
            connection.execute(f'CREATE ROLE "{name}" LOGIN'.encode())
        yield names
        for name in names:
            connection.execute(f'DROP ROLE "{name}"'.encode())


ACL = """
SELECT c.relname, coalesce(g.rolname, 'PUBLIC'), privilege_type, is_grantable,
       c.relowner::regrole::text, c.relrowsecurity, c.relforcerowsecurity
FROM pg_class AS c CROSS JOIN aclexplode(coalesce(relacl, acldefault('r', relowner)))
LEFT JOIN pg_roles AS g ON g.oid = grantee
WHERE relnamespace = '{schema}'::regnamespace AND relname IN ({names})
UNION ALL
SELECT relname || '.' || attname, coalesce(g.rolname, 'PUBLIC'), privilege_type, is_grantable, NULL, NULL, NULL
FROM pg_class AS c JOIN pg_attribute ON attrelid = c.oid CROSS JOIN aclexplode(attacl)
LEFT JOIN pg_roles AS g ON g.oid = grantee
WHERE relnamespace = '{schema}'::regnamespace AND relname IN ({names})
ORDER BY 1, 2, 3, 4"""

GRANTS = """
GRANT CREATE ON SCHEMA public TO "{0}";
ALTER TABLE turns OWNER TO "{0}"; ALTER TABLE games OWNER TO "{0}"; ALTER TABLE prompt_snapshots OWNER TO "{0}";
ALTER TABLE entry_points OWNER TO "{0}";
GRANT INSERT ON turns TO {1};
GRANT SELECT (id), INSERT (id, content), UPDATE (nothing_like_it) ON prompt_segments TO {1};
GRANT SELECT, INSERT ON prompt_snapshots TO {1} WITH GRANT OPTION;
GRANT SELECT (budget_report) ON prompt_snapshots TO {2};
GRANT SELECT ON ALL TABLES IN SCHEMA public TO {2}; GRANT ALL ON worlds TO PUBLIC; REVOKE DELETE ON games FROM "{0}";
GRANT INSERT ON turn_metrics TO {1};
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {2}; ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO {2};
"""


def acl(db: Db, schema: str) -> list[tuple[Any, ...]]:
    """Return owner, grants and row-level security of the tables of a schema; without the column that does not come."""
    names = ", ".join(f"'{name}'" for name in (*CORE_TABLES, *DEPENDANTS))
    return [row for row in db.rows(ACL.format(schema=schema, names=names)) if "nothing" not in row[0]]


@pytest.mark.parametrize("by", ["psql", "task"])
def test_new_tables_have_the_old_owner_and_exactly_the_old_grants(roles: tuple[str, str, str], db: Db, by: str) -> None:
    db.execute(UUID_TURNS + "; ALTER TABLE prompt_segments ADD nothing_like_it int;" + GRANTS.format(*roles))
    before = acl(db, "public")
    done = by_psql(db) if by == "psql" else db.invoke(*TASK)
    assert done.code == 0, done
    assert acl(db, "core_archive") == before
    assert acl(db, "public") == before
    owner, app, reader = roles
    assert db.rows(
        "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname = 'update_entry_points_search_text'"
    ) == [(f'"{owner}"',)]
    assert db.value(f"SELECT has_sequence_privilege('{reader}', 'turns_id_seq', 'USAGE, SELECT, UPDATE')") is False
    db.execute(ENTRY + GAME)
    with db.connect(app) as connection:
        connection.execute(
            "INSERT INTO turns (game_id, idx, role, content) VALUES (%s, 1, 'player', '{}')", [uuid.UUID(int=1)]
        )
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("TABLE turns")
    with db.connect(reader) as connection:  # what could be reached still can
        assert connection.execute("SELECT count(*) FROM core_archive.turns").fetchone() == (9,)


def test_a_schema_that_was_closed_leads_to_a_closed_one(roles: tuple[str, str, str], db: Db) -> None:
    _, app, reader = roles
    db.execute(f"CREATE SCHEMA app; GRANT USAGE ON SCHEMA app TO {app}; SET search_path = app; {UUID_TURNS};"
               f"GRANT SELECT ON ALL TABLES IN SCHEMA app TO {app}, {reader}")  # fmt: skip
    done = by_psql(db, "SET search_path = app")
    assert done.code == 0, done
    usage = "SELECT has_schema_privilege('{}', 'core_archive', 'USAGE')"
    assert (db.value(usage.format(app)), db.value(usage.format(reader))) == (True, False)


def test_row_level_security_stays_on_and_its_policies_are_said_to_be_gone(db: Db) -> None:
    db.execute(
        UUID_TURNS
        + """;
        ALTER TABLE turns ENABLE ROW LEVEL SECURITY;
        ALTER TABLE games ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY own_turns ON turns USING (role = 'player');
        CREATE POLICY own_games ON games USING (true)"""
    )
    before = acl(db, "public")
    done = db.invoke(*TASK)
    assert done.code == 0, done
    assert acl(db, "public") == acl(db, "core_archive") == before
    assert db.rows("SELECT polrelid::regclass::text FROM pg_policy ORDER BY 1") == [
        ("core_archive.games",),
        ("core_archive.turns",),
    ]
    for policy in ("own_turns", "own_games"):
        assert policy in done.out


def test_on_supabase_the_new_tables_are_as_closed_as_the_chain_makes_them(db: Db) -> None:
    supabase.install(db)
    supabase.add_profiles(db)
    assert db.invoke("setup", role=supabase.MIGRATOR).code == 0
    db.execute(
        "ALTER TABLE turns DROP COLUMN costs; ALTER TABLE worlds DISABLE ROW LEVEL SECURITY;"
        "REVOKE ALL ON turns FROM anon"
    )
    done = db.invoke(*TASK, role=supabase.MIGRATOR)
    assert done.code == 0, done
    assert db.invoke("setup", role=supabase.MIGRATOR).code == 0
    assert db.differing() == {}
    assert db.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND NOT rowsecurity") == []
    assert db.value("SELECT has_table_privilege('anon', 'turns', 'SELECT')") is False
    with supabase.session(db, "service_role") as connection:
        connection.execute("INSERT INTO prompt_segments (scope, content) VALUES ('core', 'x')")
    with supabase.session(db, "authenticated", supabase.PLAYER) as connection:
        assert connection.execute("TABLE prompt_segments").fetchall() == []


# ── tables of others ───────────────────────────────────────────────────────────────────────────────────────────────

OTHERS = """;
CREATE SCHEMA "My App";
CREATE TABLE "My App"."My Notes" (id serial PRIMARY KEY, turn uuid CONSTRAINT "of a turn" REFERENCES turns (id));
CREATE TABLE note_tags (note int CONSTRAINT of_note REFERENCES "My App"."My Notes" (id));
CREATE TABLE players (game uuid CONSTRAINT of_game REFERENCES games (id));
CREATE TABLE rated (snapshot uuid CONSTRAINT of_snapshot REFERENCES prompt_snapshots (id)) PARTITION BY HASH (snapshot);
CREATE TABLE rated_0 PARTITION OF rated FOR VALUES WITH (MODULUS 1, REMAINDER 0);
CREATE TABLE unrelated (id int PRIMARY KEY);
INSERT INTO "My App"."My Notes" (turn) SELECT id FROM turns; INSERT INTO note_tags SELECT id FROM "My App"."My Notes";
INSERT INTO rated SELECT id FROM prompt_snapshots;
"""
MOVING_OTHERS = ('"My App"."My Notes"', "note_tags", "players", "rated", "rated_0")
NAMED = ("of a turn", "of_note", "of_game", "of_snapshot")


def test_tables_of_others_are_listed_and_refused(db: Db) -> None:
    """Also one of the chain's own that nothing makes anew."""
    db.execute(UUID_TURNS + OTHERS + "ALTER TABLE slots ADD game uuid CONSTRAINT slot_of_game REFERENCES games (id)")
    before = db.dump(data=True)
    task, dry, file = db.invoke(*TASK), db.invoke("--dry", *ASKING), by_psql(db)
    assert (task.code, dry.code, file.code) == (6, 6, 3), task
    assert "TB002" in file.err
    for done in (task, dry, file):
        for word in (*NAMED, "slot_of_game", "My Notes", "note_tags", "rated"):
            assert word in done.err, done
        assert "unrelated" not in done.err
    assert "--with-dependants" in task.err
    assert "budget_engine.with_dependants=on" in file.err
    assert db.dump(data=True) == before


@pytest.mark.parametrize("by", ["psql", "task"])
def test_tables_of_others_move_along_where_they_are_told_to(db: Db, by: str) -> None:
    db.execute(UUID_TURNS + OTHERS)
    old = standing(db, [*CORE_TABLES, *DEPENDANTS, *MOVING_OTHERS])
    assert len(old) == len([*CORE_TABLES, *DEPENDANTS, *MOVING_OTHERS])
    whole, held = anatomy(db, list(old.values())), rows(db, list(old.values()))
    done = by_psql(db, options=ALONG) if by == "psql" else db.invoke(*TASK, "--with-dependants")
    assert done.code == 0, done
    assert anatomy(db, list(old.values())) == whole
    assert rows(db, list(old.values())) == held
    assert {place(db, oid) for oid in old.values()} == {"core_archive"}
    assert '"My App"."My Notes" moved to core_archive' in done.out + done.err
    assert place(db, standing(db, ["unrelated"])["unrelated"]) == "public"
    assert standing(db, MOVING_OTHERS) == {}  # those are not ours to make anew
    assert nothing_of_the_core_differs(db)


def test_a_table_without_a_foreign_key_stays(db: Db) -> None:
    db.execute(UUID_TURNS + "; CREATE TABLE achievements (game_id uuid); INSERT INTO achievements SELECT id FROM games")
    assert db.invoke(*TASK).code == 0
    assert db.value("SELECT count(*) FROM public.achievements") == 3


# ── schemas of the search_path ─────────────────────────────────────────────────────────────────────────────────────


def test_tables_in_two_schemas_come_together_in_the_first(db: Db) -> None:
    db.execute("CREATE SCHEMA empty; CREATE SCHEMA first; CREATE SCHEMA second; SET search_path = second;" + UUID_TURNS)
    db.execute("ALTER TABLE second.games SET SCHEMA first; ALTER TABLE second.turn_metrics SET SCHEMA first")
    db.execute(f"ALTER DATABASE {db.name} SET search_path = empty, first, second")
    old = standing(db, [*CORE_TABLES, *DEPENDANTS])
    whole, held = anatomy(db, list(old.values())), rows(db, list(old.values()))
    done = db.invoke(*TASK)
    assert done.code == 0, done
    assert (anatomy(db, list(old.values())), rows(db, list(old.values()))) == (whole, held)
    assert {place(db, oid) for oid in old.values()} == {"core_archive"}
    assert {place(db, oid) for oid in standing(db, [*CORE_TABLES, *DEPENDANTS]).values()} == {"first"}
    assert nothing_of_the_core_differs(db)


@pytest.mark.parametrize("backup", [CORE + CORE_ROWS, UUID_TURNS], ids=["in the new form", "in the old form"])
def test_a_backup_in_a_later_schema_is_neither_used_nor_touched(db: Db, backup: str) -> None:
    db.execute("CREATE SCHEMA backup; SET search_path = backup;" + backup)
    db.execute(UUID_TURNS)
    db.execute(f"ALTER DATABASE {db.name} SET search_path = public, backup")
    copies = [
        oid
        for (oid,) in db.rows(
            "SELECT oid::bigint FROM pg_class WHERE relnamespace = 'backup'::regnamespace AND relkind = 'r'"
        )
    ]
    before = (anatomy(db, copies), rows(db, copies))
    done = db.invoke(*TASK)
    assert done.code == 0, done
    assert (anatomy(db, copies), rows(db, copies)) == before
    assert {place(db, oid) for oid in standing(db, [*CORE_TABLES, *DEPENDANTS]).values()} == {"public"}
    assert db.rows(
        "SELECT confrelid::regclass::text FROM pg_constraint WHERE conrelid = 'turns'::regclass AND contype = 'f'"
    ) == [("games",)]


# ── failing in the middle ──────────────────────────────────────────────────────────────────────────────────────────

TRAP = """
CREATE SCHEMA trap; CREATE SEQUENCE trap.commands;
CREATE FUNCTION trap.spring() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
  IF nextval('trap.commands') = {} THEN {}; END IF; END $$;
CREATE EVENT TRIGGER trap ON ddl_command_start EXECUTE FUNCTION trap.spring()"""
UNTRAP = "DROP EVENT TRIGGER trap; DROP SCHEMA trap CASCADE"


ENDINGS = pytest.mark.parametrize(
    "action", ["RAISE EXCEPTION 'sprung'", "PERFORM pg_terminate_backend(pg_backend_pid())"], ids=["fails", "killed"]
)


@ENDINGS
def test_ended_anywhere_it_leaves_everything_as_it_was(db: Db, action: str) -> None:
    db.execute(UUID_TURNS)
    before, codes = db.dump(data=True), []
    for command in (1, 2, 5, 9, 12, 16, 25, 40, 46):
        db.execute(TRAP.format(command, action))
        codes.append(by_psql(db).code)
        db.execute(UNTRAP)
        assert db.dump(data=True) == before
    assert 0 not in codes
    assert db.invoke(*TASK).code == 0
    assert nothing_of_the_core_differs(db)


@ENDINGS
def test_ended_among_the_indexes_it_is_finished_by_any_run(db: Db, action: str) -> None:
    db.execute(UUID_TURNS)
    db.execute(TRAP.format(60, action))
    by_psql(db)
    db.execute(UNTRAP)
    assert place(db, db.value("SELECT 'core_archive.turns'::regclass::oid::bigint")) == "core_archive"
    assert not nothing_of_the_core_differs(db)
    assert db.invoke("setup").code == 0
    assert nothing_of_the_core_differs(db)
    assert db.differing() == {}


@pytest.mark.parametrize("taken", ["CREATE TABLE idx_games_world ()", "CREATE INDEX idx_games_world ON slots (name)"])
def test_what_it_cannot_cure_leaves_everything_as_it_was(db: Db, taken: str) -> None:
    db.execute(f"{UUID_TURNS}; {taken}")
    before = db.dump(data=True)
    done = db.invoke(*TASK)
    assert done.code in (1, 6), done
    assert "idx_games_world" in done.err
    assert db.dump(data=True) == before


def test_a_plan_that_cannot_be_carried_out_is_refused_before_anything(db: Db) -> None:
    db.execute(UUID_TURNS + "; ALTER TABLE slots DROP max_len")
    before = db.dump(data=True)
    done = db.invoke(*TASK)
    assert done.code == 6, done
    assert "slots.max_len is missing" in done.err
    assert db.dump(data=True) == before


def test_a_view_is_not_read(db: Db) -> None:
    """It runs what others wrote, and with our rights."""
    db.execute(
        WITHOUT_TURNS
        + """
        CREATE FUNCTION theirs() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RAISE 'run'; END $$;
        CREATE VIEW turns AS SELECT 1 AS id WHERE theirs() > 0"""
    )
    for words in (("--dry", *ASKING), TASK):
        done = db.invoke(*words)
        assert done.code == 0, done


def test_what_is_no_table_is_refused(db: Db) -> None:
    db.execute(CORE_WITH_UUID_TURNS + "DROP TABLE turns; CREATE TABLE other (id int); CREATE INDEX turns ON other (id)")
    assert (db.invoke(*TASK).code, by_psql(db).code) == (6, 3)


# ── the question ───────────────────────────────────────────────────────────────────────────────────────────────────


NO = {"\n": 6, "n\n": 6, "what?\n": 6, "\x04": 6, "Ctrl-C": 130}


@pytest.mark.parametrize("answers", [{"y\n": 0}, NO | {"yes\n": 0}], ids=["y", "no, and yes"])
def test_on_a_terminal_it_asks_once(db: Db, answers: dict[str, int]) -> None:
    db.execute(UUID_TURNS)
    db.execute("ANALYZE turns")
    before = db.dump(data=True)
    for answer, code in answers.items():
        done = on_terminal(db, *ASKING, answer=answer)
        assert done.code == code, (answer, done)
        assert done.out.count("[y/N]") == 1
        for word in (db.name, "core_archive", "turns (about 9 rows)", "prompt_snapshots", "turn_metrics"):
            assert word in done.out, (answer, done)
        assert nothing_of_the_core_differs(db) if code == 0 else db.dump(data=True) == before


def test_without_a_terminal_it_wants_yes(db: Db) -> None:
    db.execute(UUID_TURNS)
    before = db.dump(data=True)
    done = db.invoke("prereqs", "--recreate")
    assert done.code == 6, done
    assert "--yes" in done.err
    assert db.dump(data=True) == before


def test_tables_without_rows_on_this_machine_move_without_a_question(db: Db) -> None:
    db.execute(CORE_WITH_UUID_TURNS)
    done = on_terminal(db, *ASKING)
    assert done.code == 0, done
    assert "[y/N]" not in done.out


def test_a_target_elsewhere_is_asked_about_even_without_rows(db: Db) -> None:
    """A tunnel ends on loopback, and the name of the host says whose database is at its other end."""
    db.execute(CORE_WITH_UUID_TURNS)
    before = db.dump()
    with Proxy(socket_of(db.cluster.sockets)) as proxy:
        url = f"postgresql://postgres@db.example.org:{proxy.port}/{db.name}?hostaddr=127.0.0.1"
        done = db.invoke("prereqs", "--recreate", env={"DATABASE_URL": url})
        assert (done.code, db.dump()) == (6, before), done
        assert "db.example.org" in done.out
        near = db.invoke("--dry", "prereqs", "--recreate", env={"DATABASE_URL": url})
        assert near.code == 0, near
        done = db.invoke("prereqs", "--recreate", "--yes", env={"DATABASE_URL": url})
        assert done.code == 0, done


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_loopback_is_near(db: Db, host: str) -> None:
    db.execute(CORE_WITH_UUID_TURNS)
    with Proxy(socket_of(db.cluster.sockets)) as proxy:
        url = f"postgresql://postgres@{host}:{proxy.port}/{db.name}?hostaddr=127.0.0.1"
        done = db.invoke("prereqs", "--recreate", env={"DATABASE_URL": url})
    assert done.code == 0, done


def test_dry_says_what_would_move_and_changes_nothing(db: Db) -> None:
    db.execute(UUID_TURNS + OTHERS)
    before = db.dump(data=True)
    done = db.invoke("--dry", "prereqs", "--recreate", "--with-dependants")
    assert done.code == 0, done
    for name in (*CORE_TABLES, *DEPENDANTS, *MOVING_OTHERS):
        assert name in done.out
    assert "core_archive" in done.out
    assert db.dump(data=True) == before


def test_others_tasks_say_that_there_is_this_way(db: Db) -> None:
    db.execute(UUID_TURNS)
    before = db.dump(data=True)
    for task in ("setup", "prereqs", "verify"):
        done = db.invoke(task)
        assert done.code == 6, done
        assert "invoke prereqs --recreate" in done.err
    assert db.dump(data=True) == before


UNDOING = """
CREATE FUNCTION undo() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
  IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands()
             WHERE command_tag = 'CREATE TABLE' AND object_identity = 'public.turns') THEN
    ALTER TABLE turns DROP {};
  END IF;
END $$;
CREATE EVENT TRIGGER undo ON ddl_command_end EXECUTE FUNCTION undo()"""


@pytest.mark.parametrize(
    ("undone", "said"),
    [
        ("CONSTRAINT turns_pkey", "key turns.id is missing, expected PRIMARY KEY"),
        ("costs", "column turns.costs is missing, expected jsonb NOT NULL"),
    ],
)
@pytest.mark.parametrize(("state", "task"), [(UUID_CORE, TASK), ("", ("prereqs",))], ids=["recreate", "prereqs"])
def test_what_is_undone_meanwhile_is_no_success(
    db: Db, state: str, task: Sequence[str], undone: str, said: str
) -> None:
    """What the step itself created has to be there, also where it is only documented of tables that existed."""
    db.execute(state + UNDOING.format(undone))
    before = db.dump(data=True)
    done = db.invoke(*task)
    assert done.code == 1, done
    assert said in done.err
    assert db.dump(data=True) == before


# ── rights, locks, others at work ──────────────────────────────────────────────────────────────────────────────────


def owned_by(role: str) -> str:
    tables = (*CORE_TABLES, *DEPENDANTS, "slots", "templates")
    return "; " + " ".join(f'ALTER TABLE {table} OWNER TO "{role}";' for table in tables)


@pytest.mark.parametrize(
    ("grant", "lacking"),
    [
        ("", "ownership of table turns"),
        ("GRANT {0} TO {1}", "CREATE on database"),
        (
            # PostgreSQL 14 lets all create in public.
            "GRANT {0} TO {1}; GRANT CREATE ON DATABASE {2} TO {1}; REVOKE CREATE ON SCHEMA public FROM PUBLIC",
            "CREATE on schema public",
        ),
    ],
)  # fmt: skip
def test_rights_that_are_lacking_are_said_before_anything(
    roles: tuple[str, str, str], db: Db, grant: str, lacking: str
) -> None:
    owner, app, _ = roles
    db.execute(UUID_TURNS + owned_by(owner) + grant.format(f'"{owner}"', app, db.name))
    before = db.dump(data=True)
    done = db.invoke("prereqs", "--recreate", role=app)
    assert done.code == 8, done
    assert lacking in done.err
    assert db.dump(data=True) == before


def test_a_member_of_the_owner_may(roles: tuple[str, str, str], db: Db) -> None:
    owner, app, _ = roles
    db.execute(
        f'{UUID_TURNS} {owned_by(owner)} GRANT "{owner}" TO {app}; GRANT CREATE ON DATABASE {db.name} TO {app};'
        f'GRANT CREATE ON SCHEMA public TO {app}, "{owner}"'
    )
    before = acl(db, "public")
    done = db.invoke(*TASK, role=app)
    assert done.code == 0, done
    assert acl(db, "public") == acl(db, "core_archive") == before


@pytest.mark.parametrize("table", ["turns", "worlds", "prompt_snapshots"])
def test_a_reader_is_given_way_to(db: Db, table: str) -> None:
    """Whoever comes later waits no longer than lock_timeout, and other tables are free all the while."""
    db.execute(UUID_TURNS)
    before = db.dump(data=True)
    with db.connect(autocommit=False) as reader, db.connect() as another:
        reader.execute("SET application_name = 'the reader'")
        reader.execute(f"LOCK TABLE {table} IN ACCESS SHARE MODE")
        process = db.start(*TASK, LOCK_TIMEOUT="2s", LOCK_WAIT="0")
        while process.poll() is None:
            for name in (*CORE_TABLES, *DEPENDANTS):
                another.execute(f"SET lock_timeout = '{2900 if name == table else 200}ms'")
                another.execute(f"SELECT FROM {name} LIMIT 1")
            time.sleep(0.01)
        done = ended(process)
        assert done.code == 7, done
        assert f"pid {reader.info.backend_pid} " in done.err
    assert db.dump(data=True) == before


def test_of_two_at_once_one_does_it(db: Db) -> None:
    db.execute(UUID_TURNS)
    runs = [ended(process) for process in [db.start(*TASK) for _ in range(2)]]
    assert {done.code for done in runs} == {0}, "\n".join(map(str, runs))
    assert db.rows("SELECT nspname FROM pg_namespace WHERE nspname ~ 'archive'") == [("core_archive",)]
    assert sum("moved to" in done.out for done in runs) == 1
    assert nothing_of_the_core_differs(db)


def started_by_psql(db: Db) -> subprocess.Popen[str]:
    command = [str(db.cluster.binaries / "psql"), db.url, "-XqAt", "-v", "ON_ERROR_STOP=1"]
    return subprocess.Popen([*command, "-f", str(MIGRATIONS / f"{STEM}.sql")], stderr=subprocess.PIPE, text=True)


def test_of_two_by_psql_at_once_one_does_it(db: Db) -> None:
    db.execute(UUID_TURNS)
    with db.connect(autocommit=False) as holder:
        holder.execute("LOCK TABLE turns IN ACCESS SHARE MODE")
        processes = [started_by_psql(db) for _ in range(2)]
        time.sleep(0.3)
        holder.rollback()
        said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert db.rows("SELECT nspname FROM pg_namespace WHERE nspname ~ 'archive'") == [("core_archive",)]


def test_who_waited_for_another_run_wants_no_lock_on_its_new_tables(db: Db) -> None:
    """They are in use already."""
    db.execute(UUID_TURNS)
    with in_transaction(db) as other:
        process = started_by_psql(db)
        until(lambda: db.value("SELECT count(*) FROM pg_locks WHERE NOT granted") == 1, process)
        other.execute("COMMIT; BEGIN; LOCK TABLE worlds, games IN ROW EXCLUSIVE MODE")
        time.sleep(0.5)
    assert (process.communicate(timeout=60)[1].count("ERROR"), process.returncode) == (0, 0)
    assert db.rows("SELECT nspname FROM pg_namespace WHERE nspname ~ 'archive'") == [("core_archive",)]


def test_no_row_is_read_or_written_whatever_the_size(db: Db) -> None:
    """One look into the index for the greatest id aside; nine rows of a page are not worth an index to the planner."""
    db.execute(INT_TURNS)
    db.execute("""
        INSERT INTO turns (game_id, idx, role, content)
        SELECT md5('game 1')::uuid, 100 + i, 'player', '{}' FROM generate_series(1, 20000) AS i""")
    db.execute("ANALYZE")
    files = "SELECT relname, relfilenode FROM pg_class WHERE oid IN ({}) ORDER BY 1".format(
        ", ".join(map(str, standing(db, CORE_TABLES).values()))
    )
    before = db.rows(files)
    with in_transaction(db) as connection:
        assert connection.execute(files.encode()).fetchall() == before
        read = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_all_tables WHERE relid = {}"
        old = "'core_archive.turns'::regclass"
        assert connection.execute(read.format(old).encode()).fetchone() == (0, 1)


@pytest.mark.parametrize("flag", ["--yes", "--with-dependants"])
def test_a_flag_of_recreate_alone_is_refused(db: Db, flag: str) -> None:
    done = db.invoke("prereqs", flag)
    assert done.code == 1, done
    assert "--recreate" in done.err
    assert db.value("SELECT to_regclass('turns') IS NULL")
