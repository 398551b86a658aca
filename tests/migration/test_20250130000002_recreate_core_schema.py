"""20250130000002_recreate_core_schema: what gives way moves whole, what comes is new, and nobody is surprised."""

from __future__ import annotations

import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import supabase
from budget_engine.migration import chain
from budget_engine.postgres import embedded
from conftest import MIGRATIONS, Db, assert_done, database, ended, succeeded, until
from proxy import Proxy, socket_of
from states import (
    BIGINTS,
    CORE,
    CORE_ROWS,
    CORE_WITH_UUID_TURNS,
    HEAD,
    NOT_TO_ALL,
    OWN,
    SLOT_ROWS,
    SLOTS_TEMPLATES,
    old_metrics,
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
    + old_metrics(turn_id="uuid")
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
    "turns.id int": (INT_TURNS + old_metrics(turn_id="int"), ("turn_metrics",)),
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
    "views": (
        CORE[: CORE.index("CREATE TABLE IF NOT EXISTS games")]
        + "CREATE TABLE t (id bigint); CREATE VIEW turns AS TABLE t; CREATE MATERIALIZED VIEW games AS TABLE t",
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
ALSO_BY_PSQL = ("turns.id uuid", "turns partitioned", "views", "snapshots without foreign keys")
# What differs here is documented, and the application's affair.
DOCUMENTED = f"""{BY_HAND} {HEAD}
DROP INDEX idx_turns_game_idx; ALTER TABLE games DROP state; ALTER TABLE worlds ALTER id TYPE varchar;
ALTER TABLE entry_points ALTER title DROP NOT NULL, DROP CONSTRAINT entry_points_slug_key,
  DROP CONSTRAINT entry_points_world_id_fkey;
ALTER TABLE prompt_segments RENAME TO s; CREATE VIEW prompt_segments AS TABLE s"""


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


def seen(db: Db, tables: Mapping[str, int]) -> tuple[list[Any], dict[int, Any]]:
    """Return all that the catalogs say of these relations, their indexes and sequences; and their rows. By OID."""
    oids = ", ".join(map(str, ["NULL", *tables.values()]))
    named = f"SELECT oid::bigint, format('TABLE %s', oid::regclass) FROM pg_class WHERE oid IN ({oids})"
    with db.connect() as connection:
        anatomy = connection.execute(_ANATOMY.format(oids=oids, changes=_CHANGES).encode()).fetchall()
        names = connection.execute(named.encode()).fetchall()
        return anatomy, {oid: sorted(map(str, connection.execute(name.encode()))) for oid, name in names}


def places(db: Db, tables: Mapping[str, int]) -> set[str]:
    oids = ", ".join(map(str, tables.values()))
    return {s for (s,) in db.rows(f"SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid IN ({oids})")}


def archives(db: Db) -> dict[str, str]:
    """Return the archives and their comments."""
    archives = "SELECT nspname::text, obj_description(oid) FROM pg_namespace WHERE nspname ~ '^core_archive'"
    return dict(db.rows(archives))


def dated(dump: str) -> str:
    """Return the dump with the moment in the archive's comment taken out."""
    return re.sub(r"as it was until [^,]*,", "as it was,", dump)


def differing(db: Db) -> list[str]:
    """Return what does not pass of the core, or could not be completed by setup."""
    return [
        check.title for check in db.checks() if not check.passed and (check.step == "core_schema" or check.conflict)
    ]


# ── what moves, and what comes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", OLD)
def test_what_gives_way_moves_whole_and_what_comes_is_empty(db: Db, name: str) -> None:
    state, others = OLD[name]
    db.execute(state)
    old = standing(db, [*CORE_TABLES, *others])
    assert set(others) <= set(old)
    before = seen(db, old)
    with database(db.cluster, db.name) as other:
        done = db.call(*TASK)
        assert (done.code, "moved to core_archive" in done.out) == (0, True), done
        assert seen(db, old) == before
        assert places(db, old) == {"core_archive"}
        new = standing(db, [*CORE_TABLES, *(name for name in others if name in DEPENDANTS)])
        assert not set(new.values()) & set(old.values())
        assert [*seen(db, new)[1].values()] == [[]] * len(new)
        assert differing(db) == []
        if name in ALSO_BY_PSQL:  # it is what the task makes, and what need not move is as it was
            bystanders = standing(other, list({*DEPENDANTS, "slots", "templates"} - {*others}))
            before = seen(other, bystanders)
            assert other.by_psql(STEM).code == 0
            assert seen(other, bystanders) == before
            other.migrate(*AFTERWARDS[: 3 if "turn_metrics" in others else 2])
            assert dated(other.dump(data=True)) == dated(db.dump(data=True))
            assert_done(other)


def test_run_again_it_does_nothing_and_locks_nothing(db: Db) -> None:
    db.execute(UUID_TURNS)
    succeeded(db.call(*TASK))
    before = db.fingerprint()
    tables = f"{', '.join(CORE_TABLES)}, prompt_snapshots"
    with db.connect(autocommit=False) as holder:
        holder.execute(f"LOCK TABLE {tables} IN ROW EXCLUSIVE MODE")  # IF NOT EXISTS asks for its lock first
        done = db.by_psql(STEM, before="SET lock_timeout = '1ms'")
        assert (done.code, re.sub(SKIPPED, "", done.err)) == (0, "")
        holder.execute(f"LOCK TABLE {tables} IN EXCLUSIVE MODE")
        succeeded(db.call(*ASKING, env={"LOCK_TIMEOUT": "1ms"}))
        with in_transaction(db) as connection:
            assert connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchall() == [(None,)]
    assert db.fingerprint() == before


def test_on_an_empty_database_it_is_the_core_schema(db: Db) -> None:
    with database(db.cluster, db.name) as other:
        other.migrate(CORE_SCHEMA)
        db.migrate(STEM)
        assert db.dump() == other.dump()


@pytest.mark.parametrize("state", ["", DOCUMENTED], ids=["empty", "by hand"])
def test_where_it_is_not_needed_the_task_is_prereqs(db: Db, state: str) -> None:
    db.execute(state)
    with database(db.cluster, db.name) as other:
        succeeded(other.call("prereqs"))
        succeeded(db.call(*ASKING))
        assert db.dump(data=True) == other.dump(data=True)
    assert archives(db) == {}
    before = db.dump(data=True)
    assert db.by_psql(STEM).code == 0
    assert db.dump(data=True) == before


AROUND = """
CREATE SCHEMA core_archive; CREATE TABLE core_archive.turns (mine int); INSERT INTO core_archive.turns VALUES (7);
CREATE SCHEMA core_archive_2;
CREATE FUNCTION update_entry_points_search_text() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN NEW.search_text := to_tsvector('simple', 'theirs'); RETURN NEW; END $$;
CREATE TRIGGER theirs BEFORE INSERT OR UPDATE ON entry_points
  FOR EACH ROW EXECUTE FUNCTION update_entry_points_search_text();
CREATE VIEW busy_games AS SELECT id FROM games WHERE turn_count > 1;
CREATE MATERIALIZED VIEW all_turns AS SELECT id FROM turns;
CREATE FUNCTION last_turn() RETURNS uuid BEGIN ATOMIC SELECT id FROM turns LIMIT 1; END;
CREATE TABLE secrets (game uuid); CREATE POLICY players ON secrets USING (game IN (SELECT id FROM games));
CREATE PUBLICATION everything FOR TABLE turns, games;
CREATE TABLE achievements (game_id uuid); INSERT INTO achievements SELECT id FROM games;
"""
READING = (
    *("view public.busy_games", "materialized view public.all_turns", "function public.last_turn()"),
    *("policy players on table public.secrets", "publication everything"),
)


def test_what_is_around_stays_and_the_old_tables_go_on_working(db: Db) -> None:
    db.execute(UUID_TURNS + ";" + AROUND)
    others = standing(db, ["core_archive.turns", "achievements"])
    before = seen(db, others)
    done = succeeded(db.call(*TASK))
    assert [word for word in READING if f"{word} goes on" not in done.out] == [], done
    assert seen(db, others) == before
    assert standing(db, [*others]) == others
    comment = archives(db)["core_archive_3"]
    assert "turns.id is uuid, expected bigint" in comment
    assert STEM in comment
    assert db.value("SELECT count(*) FROM busy_games") == 3
    assert db.rows("SELECT DISTINCT schemaname FROM pg_publication_tables") == [("core_archive_3",)]
    # The old trigger keeps its function, the new one has its own.
    db.execute("UPDATE core_archive_3.entry_points SET title = 'again'" + ";" + ENTRY)
    assert db.rows("SELECT DISTINCT search_text::text FROM core_archive_3.entry_points") == [("'theirs':1",)]
    assert db.value("SELECT search_text::text FROM entry_points") == "'salt':1A 'sea':2"
    # So do the old foreign keys.
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        db.execute("UPDATE core_archive_3.prompt_snapshots SET turn_id = gen_random_uuid()")
    db.execute("DELETE FROM core_archive_3.games")
    assert db.value("SELECT count(*) FROM core_archive_3.turns") == 0


# ── ids ────────────────────────────────────────────────────────────────────────────────────────────────────────────

IDS = {
    # name: (state, the next id of turns)
    "the sequence, where rows went": (INT_TURNS + "DELETE FROM turns", 10),
    "an id above the sequence": (INT_TURNS + "UPDATE turns SET id = 777 WHERE id = 9", 778),
    "no index": (INT_TURNS + "ALTER TABLE turns DROP CONSTRAINT turns_pkey", 10),
    "metrics of turns that are gone": (
        INT_TURNS + old_metrics("PRIMARY KEY") + "UPDATE turn_metrics SET turn_id = 5000 WHERE turn_id = 1",
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
    with in_transaction(db) as connection:
        ids = "SELECT nextval(pg_get_serial_sequence('turns', 'id')), nextval('prompt_segments_id_seq')"
        assert connection.execute(ids.encode()).fetchone() == (
            next_id,
            3 if "INSERT INTO prompt_segments" in state else 1,
        )


# ── owner, grants, row-level security ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def _roles(cluster: embedded.Cluster) -> None:
    """Owner, application, reader."""
    Db(cluster, "postgres").execute('CREATE ROLE "Owner" LOGIN; CREATE ROLE app LOGIN; CREATE ROLE reader LOGIN')


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
GRANT CREATE ON SCHEMA public TO "Owner";
ALTER TABLE turns OWNER TO "Owner"; ALTER TABLE games OWNER TO "Owner"; ALTER TABLE prompt_snapshots OWNER TO "Owner";
ALTER TABLE entry_points OWNER TO "Owner";
GRANT INSERT ON turns TO app;
GRANT SELECT (id), INSERT (id, content), UPDATE (nothing_like_it) ON prompt_segments TO app;
GRANT SELECT, INSERT ON prompt_snapshots TO app WITH GRANT OPTION;
GRANT SELECT (budget_report) ON prompt_snapshots TO reader;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader; GRANT ALL ON worlds TO PUBLIC;
REVOKE DELETE ON games FROM "Owner";
GRANT INSERT ON turn_metrics TO app;
ALTER TABLE worlds ENABLE ROW LEVEL SECURITY; CREATE POLICY own_worlds ON worlds USING (status = 'active');
ALTER TABLE prompt_snapshots ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY closed ON prompt_snapshots USING (true);
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO reader; ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO reader;
"""


def acl(db: Db, schema: str) -> list[tuple[Any, ...]]:
    """Return owner, grants and row-level security of the tables of a schema; without the column that does not come."""
    names = ", ".join(f"'{name}'" for name in (*CORE_TABLES, *DEPENDANTS))
    return [row for row in db.rows(ACL.format(schema=schema, names=names)) if "nothing" not in row[0]]


@pytest.mark.usefixtures("_roles")
def test_new_tables_have_the_old_owner_and_exactly_the_old_grants(db: Db) -> None:
    """And row-level security stays on; its policies are said to be gone."""
    db.execute(UUID_TURNS + "; ALTER TABLE prompt_segments ADD nothing_like_it int;" + GRANTS)
    before = acl(db, "public")
    done = succeeded(db.call(*TASK))
    assert acl(db, "core_archive") == before
    assert acl(db, "public") == before
    assert ("policies of worlds" in done.out, "made anew: own_worlds" in done.out, "closed" in done.out) == (True,) * 3
    policies = "SELECT polrelid::regclass::text FROM pg_policy ORDER BY 1"
    assert db.rows(policies) == [("core_archive.prompt_snapshots",), ("core_archive.worlds",)]
    assert db.rows(
        "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname = 'update_entry_points_search_text'"
    ) == [('"Owner"',)]
    privileges = "has_sequence_privilege(role, 'turns_id_seq', 'USAGE, SELECT, UPDATE')"
    usable = dict(db.rows(f"SELECT role, {privileges} FROM unnest(ARRAY['Owner', 'app', 'reader']) AS role"))
    assert usable == {"Owner": True, "app": True, "reader": False}
    db.execute(ENTRY + GAME)
    with db.connect("app") as connection:
        connection.execute(
            "INSERT INTO turns (game_id, idx, role, content) VALUES (%s, 1, 'player', '{}')", [uuid.UUID(int=1)]
        )
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("TABLE turns")
    with db.connect("reader") as connection:  # what could be reached still can
        assert connection.execute("SELECT count(*) FROM core_archive.turns").fetchone() == (9,)


@pytest.mark.usefixtures("_roles")
def test_a_schema_that_was_closed_leads_to_a_closed_one(db: Db) -> None:
    db.execute(f"CREATE SCHEMA app; GRANT USAGE ON SCHEMA app TO app; SET search_path = app; {UUID_TURNS};"
               "GRANT SELECT ON ALL TABLES IN SCHEMA app TO app, reader")  # fmt: skip
    succeeded(db.by_psql(STEM, before="SET search_path = app"))
    usage = "SELECT has_schema_privilege('{}', 'core_archive', 'USAGE')"
    assert (db.value(usage.format("app")), db.value(usage.format("reader"))) == (True, False)


def test_on_supabase_the_new_tables_are_as_closed_as_the_chain_makes_them(db: Db) -> None:
    supabase.install(db)
    supabase.add_profiles(db)
    succeeded(db.call("setup", role=supabase.MIGRATOR))
    db.execute(
        "ALTER TABLE turns DROP CONSTRAINT turns_pkey CASCADE; ALTER TABLE worlds DISABLE ROW LEVEL SECURITY;"
        "REVOKE ALL ON turns FROM anon; REVOKE ALL ON prompt_segments FROM service_role"  # which the new policy needs
    )
    done = db.call(*TASK, role=supabase.MIGRATOR)
    assert (done.code, set(archives(db))) == (0, {"core_archive"}), done
    succeeded(db.call("setup", role=supabase.MIGRATOR))
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
    """Also one of the chain's own that nothing makes anew; --dry says what would move."""
    db.execute(UUID_TURNS + OTHERS + "ALTER TABLE slots ADD game uuid CONSTRAINT slot_of_game REFERENCES games (id)")
    before = db.fingerprint()
    task, dry, file = db.call(*TASK), db.call("--dry", *ASKING), db.by_psql(STEM)
    assert (task.code, dry.code, file.code) == (6, 6, 3), task
    assert "TB002" in file.err
    for done in (task, dry, file):
        for word in (*NAMED, "slot_of_game", "My Notes", "note_tags", "rated"):
            assert word in done.err, done
        assert "unrelated" not in done.err
    assert "--with-dependants" in task.err
    assert "budget_engine.with_dependants=on" in file.err
    told = db.call("--dry", *ASKING, "--with-dependants")
    assert told.code == 0, told
    moving = (*CORE_TABLES, *DEPENDANTS, *MOVING_OTHERS, "slots", "core_archive")
    assert [name for name in moving if name not in told.out] == [], told
    assert db.fingerprint() == before


@pytest.mark.parametrize("by", ["psql", "task"])
def test_tables_of_others_move_along_where_they_are_told_to(db: Db, by: str) -> None:
    db.execute(UUID_TURNS + OTHERS)
    old = standing(db, [*CORE_TABLES, *DEPENDANTS, *MOVING_OTHERS])
    assert len(old) == len([*CORE_TABLES, *DEPENDANTS, *MOVING_OTHERS])
    before = seen(db, old)
    if by == "psql":
        done = succeeded(db.by_psql(STEM, before="SET budget_engine.with_dependants = on"))
    else:
        done = succeeded(db.call(*TASK, "--with-dependants"))
    assert seen(db, old) == before
    assert places(db, old) == {"core_archive"}
    assert '"My App"."My Notes" moved to core_archive' in done.out + done.err
    assert places(db, standing(db, ["unrelated"])) == {"public"}
    assert standing(db, MOVING_OTHERS) == {}  # those are not ours to make anew
    assert differing(db) == []


# ── schemas of the search_path ─────────────────────────────────────────────────────────────────────────────────────


def test_tables_in_two_schemas_come_together_in_the_first(db: Db) -> None:
    db.execute("CREATE SCHEMA empty; CREATE SCHEMA first; CREATE SCHEMA second; SET search_path = second;" + UUID_TURNS)
    db.execute("ALTER TABLE second.games SET SCHEMA first; ALTER TABLE second.turn_metrics SET SCHEMA first")
    db.execute(f"ALTER DATABASE {db.name} SET search_path = empty, first, second")
    old = standing(db, [*CORE_TABLES, *DEPENDANTS])
    before = seen(db, old)
    succeeded(db.call(*TASK))
    assert seen(db, old) == before
    assert places(db, old) == {"core_archive"}
    assert places(db, standing(db, [*CORE_TABLES, *DEPENDANTS])) == {"first"}
    assert differing(db) == []


def test_backups_in_later_schemas_are_neither_used_nor_touched(db: Db) -> None:
    """One in the new form, one in the old."""
    db.execute(UUID_TURNS)
    for schema, state in {"backup": CORE + CORE_ROWS, "another": UUID_TURNS}.items():
        db.execute(f"CREATE SCHEMA {schema}; SET search_path = {schema};" + state)
    db.execute(f"ALTER DATABASE {db.name} SET search_path = public, backup, another")
    tables = "SELECT oid::regclass::text, oid::bigint FROM pg_class WHERE relkind = 'r' AND relnamespace IN "
    copies = dict(db.rows(tables + "('backup'::regnamespace, 'another'::regnamespace)"))
    before = seen(db, copies)
    succeeded(db.call(*TASK))
    assert seen(db, copies) == before
    new = standing(db, [*CORE_TABLES, *DEPENDANTS])
    assert places(db, new) == {"public"}
    led = f"SELECT confrelid::bigint FROM pg_constraint WHERE conrelid = {new['turns']} AND contype = 'f'"
    assert db.rows(led) == [(new["games"],)]


# ── failing in the middle ──────────────────────────────────────────────────────────────────────────────────────────

TRAP = """
CREATE SCHEMA trap; CREATE SEQUENCE trap.commands;
CREATE FUNCTION trap.spring() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
  IF nextval('trap.commands') = {} THEN {}; END IF; END $$;
CREATE EVENT TRIGGER trap ON ddl_command_start EXECUTE FUNCTION trap.spring()"""
UNTRAP = "DROP EVENT TRIGGER trap; DROP SCHEMA trap CASCADE"


def test_ended_anywhere_it_leaves_everything_as_it_was(db: Db) -> None:
    """By an error or by the end of the session; among the indexes, after that, any run finishes it."""
    db.execute(UUID_TURNS)
    before = db.fingerprint()
    endings = ("RAISE EXCEPTION 'sprung'", "PERFORM pg_terminate_backend(pg_backend_pid())")
    for number, command in enumerate((1, 2, 5, 9, 12, 16, 25, 40, 46, 60)):
        db.execute(TRAP.format(command, endings[number % 2]))
        assert db.by_psql(STEM).code != 0
        db.execute(UNTRAP)
        assert (db.fingerprint() == before) == (command < 60), command
    assert places(db, standing(db, ["core_archive.turns"])) == {"core_archive"}
    assert differing(db) != []
    assert_done(db)
    assert differing(db) == []


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (
            "CREATE TABLE idx_games_world (); CREATE INDEX idx_games_entry_point ON slots (name)",
            1,
            ["idx_games_world is taken", "idx_games_entry_point is taken"],
        ),
        ("ALTER TABLE slots DROP max_len", 6, ["slots.max_len is missing"]),
    ],
    ids=["names taken", "another conflict"],
)
def test_what_it_cannot_cure_leaves_everything_as_it_was(db: Db, change: str, code: int, said: list[str]) -> None:
    db.execute(f"{UUID_TURNS}; {change}")
    before = db.fingerprint()
    done = db.call(*TASK)
    assert (done.code, [word for word in said if word not in done.err]) == (code, []), done
    assert db.fingerprint() == before


def test_a_view_is_not_read(db: Db) -> None:
    """It runs what others wrote, and with our rights."""
    db.execute(
        WITHOUT_TURNS
        + """
        CREATE FUNCTION theirs() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RAISE 'run'; END $$;
        CREATE VIEW turns AS SELECT 1 AS id WHERE theirs() > 0"""
    )
    for words in (("--dry", *ASKING), TASK):
        succeeded(db.call(*words))


def test_what_is_no_table_is_refused(db: Db) -> None:
    db.execute(CORE_WITH_UUID_TURNS + "DROP TABLE turns; CREATE TABLE other (id int); CREATE INDEX turns ON other (id)")
    assert (db.call(*TASK).code, db.by_psql(STEM).code) == (6, 3)


# ── the question ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("yes", ["y\n", "yes\n"])
def test_on_a_terminal_it_asks_once(db: Db, yes: str) -> None:
    no = {"\n": 6, "n\n": 6, "\x04": 6, "what?\n": 6, "Ctrl-C": 130}
    db.execute(UUID_TURNS)
    db.execute("ANALYZE turns")
    before = db.fingerprint()
    for answer, code in {**(no if yes == "y\n" else {}), yes: 0}.items():
        done = on_terminal(db, *ASKING, answer=answer)
        assert done.code == code, done
        assert done.out.count("[y/N]") == 1
        for word in (db.name, "core_archive", "turns (about 9 rows)", "prompt_snapshots", "turn_metrics"):
            assert word in done.out, done
        assert differing(db) == [] if code == 0 else db.fingerprint() == before


def test_what_is_asked_otherwise_changes_nothing(db: Db) -> None:
    """Without a terminal it wants --yes; the other tasks say that there is this way."""
    db.execute(UUID_TURNS)
    before = db.fingerprint()
    told = dict.fromkeys(("setup", "prereqs", "verify"), (6, "invoke prereqs --recreate"))
    told |= {"prereqs --recreate": (6, "--yes")}
    told |= dict.fromkeys(("prereqs --yes", "prereqs --with-dependants"), (1, "--recreate"))
    for words, (code, said) in told.items():
        done = db.call(*words.split())
        assert (done.code, said in done.err) == (code, True), done
    assert db.fingerprint() == before


@pytest.mark.parametrize(
    ("host", "code"), [("db.example.org", 6), ("localhost", 0), ("127.0.0.1", 0), ("", 0)], ids=str
)
def test_a_target_elsewhere_is_asked_about_even_without_rows(db: Db, host: str, code: int) -> None:
    """A tunnel ends on loopback, and the name of the host says whose database is at its other end."""
    db.execute(CORE_WITH_UUID_TURNS)
    before = db.fingerprint()
    with Proxy(socket_of(db.cluster.sockets)) as proxy:
        url = f"postgresql://postgres@{host}:{proxy.port}/{db.name}?hostaddr=127.0.0.1" if host else db.url
        succeeded(db.call("--dry", *ASKING, env={"DATABASE_URL": url}))
        done = db.call(*ASKING, env={"DATABASE_URL": url})
        assert (done.code, db.fingerprint() == before) == (code, code == 6), done
        assert (host in done.out, db.call(*TASK, env={"DATABASE_URL": url}).code) == (True, 0), done


UNDOING = """
CREATE FUNCTION undo() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
  IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands()
             WHERE command_tag = 'CREATE TABLE' AND object_identity = 'public.turns') THEN
    ALTER TABLE turns DROP CONSTRAINT turns_pkey, DROP costs;
  END IF;
END $$;
CREATE EVENT TRIGGER undo ON ddl_command_end EXECUTE FUNCTION undo()"""


@pytest.mark.parametrize(("state", "task"), [(UUID_CORE, TASK), ("", ("prereqs",))], ids=["recreate", "prereqs"])
def test_what_is_undone_meanwhile_is_no_success(db: Db, state: str, task: Sequence[str]) -> None:
    """What the step itself created has to be there, also where it is only documented of tables that existed."""
    db.execute(state + UNDOING)
    before = db.fingerprint()
    done = db.call(*task)
    assert done.code == 1, done
    assert "key turns.id is missing, expected PRIMARY KEY" in done.err
    assert "column turns.costs is missing, expected jsonb NOT NULL" in done.err
    assert db.fingerprint() == before


# ── rights, locks, others at work ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("_roles")
def test_rights_that_are_lacking_are_said_before_anything(db: Db) -> None:
    """Until a member of the owner may."""
    # PostgreSQL 14 lets all create in public.
    db.execute(f"""{UUID_TURNS}; {OWN.format(role='"Owner"')} {NOT_TO_ALL}, "Owner" """)
    before = db.fingerprint()
    for lacking, grant in {
        "ownership of table turns": 'GRANT "Owner" TO app',
        "CREATE on database": f"GRANT CREATE ON DATABASE {db.name} TO app",
        "CREATE on schema public": 'GRANT CREATE ON SCHEMA public TO app, "Owner"',
    }.items():
        done = db.call(*ASKING, role="app")
        assert (done.code, lacking in done.err) == (8, True), done
        assert db.fingerprint() == before
        db.execute(grant)
        before = db.fingerprint()
    granted = acl(db, "public")
    succeeded(db.call(*TASK, role="app"))
    assert acl(db, "public") == acl(db, "core_archive") == granted


@pytest.mark.usefixtures("_roles")
def test_all_grants_are_the_owners(db: Db) -> None:
    """Of the roles that whoever runs it is a member of, another may grant them, too: they would end with that right."""
    db.execute(f"""
        {INT_TURNS}; {OWN.format(role="reader")} {NOT_TO_ALL}, reader;
        GRANT CREATE ON DATABASE {db.name} TO app; GRANT CREATE ON SCHEMA public TO app, reader;
        GRANT ALL ON turns TO "Owner" WITH GRANT OPTION; GRANT ALL ON turns TO app, pg_monitor;
        GRANT ALL ON SEQUENCE turns_id_seq TO "Owner" WITH GRANT OPTION;
        GRANT ALL ON SEQUENCE turns_id_seq TO app, pg_monitor;
        GRANT "Owner" TO app; GRANT reader TO app""")
    succeeded(db.call(*TASK, role="app"))
    grantors = """
        SELECT DISTINCT relname, grantor::regrole::text FROM pg_class CROSS JOIN aclexplode(relacl)
        WHERE oid IN ('turns'::regclass, 'turns_id_seq'::regclass) ORDER BY 1, 2"""
    assert db.rows(grantors) == [("turns", "reader"), ("turns_id_seq", "reader")]
    db.execute('REVOKE reader, "Owner" FROM app')


@pytest.mark.parametrize("table", ["turns", "prompt_snapshots"])
def test_a_reader_is_given_way_to(db: Db, table: str) -> None:
    """Whoever comes later waits no longer than lock_timeout, and other tables are free all the while."""
    db.execute(UUID_TURNS)
    before = db.fingerprint()
    with db.connect(autocommit=False) as reader, db.connect() as another:
        reader.execute("SET application_name = 'the reader'")
        reader.execute(f"LOCK TABLE {table} IN ACCESS SHARE MODE")
        process = db.start(*TASK, LOCK_TIMEOUT="1s", LOCK_WAIT="0")
        while process.poll() is None:
            for name in (*CORE_TABLES, *DEPENDANTS):
                another.execute(f"SET lock_timeout = '{1900 if name == table else 200}ms'")
                another.execute(f"SELECT FROM {name} LIMIT 1")
            time.sleep(0.01)
        done = ended(process)
        assert done.code == 7, done
        assert f"pid {reader.info.backend_pid} " in done.err
    assert db.fingerprint() == before


def started_by_psql(db: Db) -> subprocess.Popen[str]:
    command = [str(db.cluster.binaries / "psql"), db.url, "-XqAt", "-v", "ON_ERROR_STOP=1"]
    command += ["-f", str(MIGRATIONS / f"{STEM}.sql")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("start", [lambda db: db.start(*TASK), started_by_psql], ids=["task", "psql"])
def test_of_two_at_once_one_does_it(db: Db, start: Callable[[Db], subprocess.Popen[str]]) -> None:
    db.execute(UUID_TURNS)
    with db.connect(autocommit=False) as holder:
        holder.execute("LOCK TABLE turns IN ACCESS SHARE MODE")
        processes = [start(db) for _ in range(2)]
        until(lambda: db.value("SELECT count(*) FROM pg_locks WHERE NOT granted"), processes[0])
        time.sleep(0.3)
    runs = [ended(process) for process in processes]
    assert {done.code for done in runs} == {0}, "\n".join(map(str, runs))
    assert archives(db).keys() == {"core_archive"}
    assert sum("turns moved to" in done.out + done.err for done in runs) == 1
    assert differing(db) == []


def test_who_waited_for_another_run_wants_no_lock_on_its_new_tables(db: Db) -> None:
    """They are in use already."""
    db.execute(UUID_TURNS)
    with in_transaction(db) as other:
        process = started_by_psql(db)
        until(lambda: db.value("SELECT count(*) FROM pg_locks WHERE NOT granted") == 1, process)
        other.execute("COMMIT; BEGIN; LOCK TABLE worlds, games IN ROW EXCLUSIVE MODE")
        time.sleep(0.5)
    assert (process.communicate(timeout=60)[1].count("ERROR"), process.returncode) == (0, 0)
    assert archives(db).keys() == {"core_archive"}


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
