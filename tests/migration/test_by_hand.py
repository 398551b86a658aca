"""The files by hand: each with psql, the chain in both orders, any number of times, on any kind of database."""

from __future__ import annotations

import re
from itertools import cycle

import pytest
import supabase
from budget_engine.postgres import embedded
from conftest import MIGRATIONS, Db, Run, database
from states import ANOTHER_FEATURE, CORE, CORE_ROWS, CORE_WITH_UUID_TURNS, HANGING, by_hand, snapshots, with_uuid
from verification import VERIFY, differing, verified

CORE_SCHEMA = "20250130000000_core_schema"
RECREATE = "20250130000002_recreate_core_schema"
SLOTS = "20250214_slots_templates"
SNAPSHOTS = "20250213_prompt_snapshots"
FIX = "20250222_fix_prompt_snapshots_turn_id"
FLAGS = "20250220_slots_flags"
REPORT = "20250221_budget_report"
METRICS = "20250222_turn_metrics"

DOCUMENTED = (CORE_SCHEMA, SLOTS, SNAPSHOTS, FIX, FLAGS, REPORT, METRICS)
SNAPSHOTS_FIRST = (CORE_SCHEMA, SNAPSHOTS, SLOTS, FIX, FLAGS, REPORT, METRICS)
METRICS_FIRST = (CORE_SCHEMA, METRICS, SLOTS, FLAGS, SNAPSHOTS, REPORT)
SERVERS = ("plain", "supabase", "supabase with profiles")


def furnish(db: Db, server: str) -> str:
    """Make the database one of that kind, and say who migrates there."""
    if server == "plain":
        return "postgres"
    supabase.install(db)
    if "profiles" in server:
        supabase.add_profiles(db)
    return str(supabase.MIGRATOR)


def psql_file(db: Db, stem: str, role: str = "postgres", *options: str) -> Run:
    """Run a migration with psql, its errors with their SQLSTATE."""
    return db.psql("-v", "VERBOSITY=verbose", *options, "-f", str(MIGRATIONS / f"{stem}.sql"), role=role)


def run_files(db: Db, *stems: str, role: str = "postgres") -> None:
    for stem in stems:
        done = psql_file(db, stem, role)
        assert (done.code, done.out) == (0, ""), f"{stem}: {done}"
        assert re.sub(r".*NOTICE:  .*already exists, skipping\nLOCATION: .*\n", "", done.err) == "", f"{stem}: {done}"


@pytest.fixture(scope="module")
def once(cluster: embedded.Cluster) -> dict[str, str]:
    """The schemas that the documented order makes of empty databases."""
    dumps = {}
    for server in SERVERS:
        with database(cluster) as db:
            run_files(db, *DOCUMENTED, role=furnish(db, server))
            dumps[server] = db.dump()
    return dumps


@pytest.mark.parametrize(
    "order", [DOCUMENTED, SNAPSHOTS_FIRST, METRICS_FIRST], ids=["documented", "snapshots first", "metrics first"]
)
@pytest.mark.parametrize("server", SERVERS)
def test_each_order_ends_in_the_same_schema(db: Db, once: dict[str, str], server: str, order: tuple[str, ...]) -> None:
    role = furnish(db, server)
    run_files(db, *order, role=role)
    assert differing(db, role=role) == []
    assert db.dump() == once[server]
    run_files(db, *(stem for stem in order for _ in range(2)), role=role)
    assert db.dump() == once[server]


@pytest.mark.parametrize("stem", DOCUMENTED)
@pytest.mark.parametrize("state", [by_hand(), with_uuid()], ids=["bigint", "uuid"])
def test_a_file_does_its_own_step_and_can_be_run_again(db: Db, state: str, stem: str) -> None:
    db.execute(state)
    assert psql_file(db, stem).code == 0
    assert differing(db, stem.partition("_")[2]) == []
    after = db.dump(data=True)
    again = psql_file(db, stem)
    assert (again.code, again.out) == (0, "")
    assert db.dump(data=True) == after


@pytest.mark.parametrize("stem", DOCUMENTED)
def test_an_old_database_whichever_file_comes_first(db: Db, stem: str) -> None:
    db.execute(with_uuid())
    for file in (stem, *DOCUMENTED):
        assert psql_file(db, file).code == 0
    assert differing(db) == []


HEAD = (
    CORE
    + """
ALTER TABLE turns RENAME idx TO turn_number;
ALTER TABLE entry_points DROP ruleset_id;
ALTER TABLE games DROP CONSTRAINT games_world_id_fkey, ALTER world_id TYPE uuid USING NULL;
"""
)


def test_a_core_table_that_existed_is_its_applications(db: Db) -> None:
    """What differs is told; the indexes whose columns exist are added."""
    db.execute(HEAD)
    tables = (
        "SELECT * FROM information_schema.columns WHERE table_name IN ('turns', 'entry_points', 'games') ORDER BY 3, 4"
    )
    before = db.rows(tables)
    for stem in DOCUMENTED:
        assert psql_file(db, stem).code == 0
    assert db.rows(tables) == before
    assert differing(db) == []
    told = {(c.kind, c.table, c.name, c.fixed_by) for c in verified(db) if not c.passed}
    assert ("column", "turns", "idx", None) in told
    assert ("column", "games", "world_id", None) in told
    assert ("index", "entry_points", "idx_entry_points_ruleset", None) in told
    assert "idx_entry_points_world" not in {name for _, _, name, _ in told}


SNAPSHOTS_ALONE = snapshots("uuid").replace("REFERENCES games (id) ON DELETE SET NULL", "")

WITHOUT_PREREQUISITES = {
    # name: (state, stem, table that is missing, stem to run first)
    "prompt_snapshots": ("", SNAPSHOTS, "games", CORE_SCHEMA),
    "prompt_snapshots without turns": (CORE + "DROP TABLE turns", SNAPSHOTS, "turns", CORE_SCHEMA),
    "fix": ("", FIX, "prompt_snapshots", CORE_SCHEMA),
    "fix without prompt_snapshots": (CORE, FIX, "prompt_snapshots", SNAPSHOTS),
    "fix without turns": (SNAPSHOTS_ALONE, FIX, "turns", CORE_SCHEMA),
    "slots_flags": ("", FLAGS, "slots", SLOTS),
    "budget_report": ("", REPORT, "prompt_snapshots", SNAPSHOTS),
    "turn_metrics": ("", METRICS, "turns", CORE_SCHEMA),
}


@pytest.mark.parametrize(("state", "stem", "table", "first"), WITHOUT_PREREQUISITES.values(), ids=WITHOUT_PREREQUISITES)
def test_a_missing_prerequisite_is_named_with_its_file(db: Db, state: str, stem: str, table: str, first: str) -> None:
    db.execute(state)
    before = db.dump()
    done = psql_file(db, stem)
    assert done.code == 3, done
    assert re.search(rf"ERROR:  TB001: .*\b{table}\b.*does not exist", done.err), done
    assert re.search(rf"HINT:  .*db/migrations/{first}\.sql.*\(invoke prereqs\)", done.err), done
    assert db.dump() == before


REFUSED = {
    # name: (state, stem, SQLSTATE)
    "another feature's prompt_snapshots": (CORE + ANOTHER_FEATURE, SNAPSHOTS, "TB002"),
    "another feature's prompt_snapshots, its budget_report": (CORE + ANOTHER_FEATURE, REPORT, "TB002"),
    "another feature's slots": (CORE + "CREATE TABLE slots (a int)", SLOTS, "TB002"),
    "another feature's turn_metrics": (CORE + "CREATE TABLE turn_metrics (a int)", METRICS, "TB002"),
    "turns.id uuid, snapshots": (CORE_WITH_UUID_TURNS, SNAPSHOTS, "42804"),
    "turns.id uuid, metrics": (CORE_WITH_UUID_TURNS, METRICS, "42804"),
    "turns.id uuid, fix": (CORE_WITH_UUID_TURNS + snapshots("uuid"), FIX, "42804"),
    "turn_id text": (by_hand("text"), FIX, "42804"),
    "must_keep text": (by_hand() + "ALTER TABLE slots ADD must_keep text", FLAGS, "42804"),
    **{f"fix, {what}": (with_uuid() + made, FIX, "TB002") for what, made in HANGING.items()},
}


@pytest.mark.parametrize(("name", "server"), [*zip(REFUSED, cycle(["plain", "supabase"]), strict=False)])
def test_what_cannot_be_changes_nothing(db: Db, name: str, server: str) -> None:
    state, stem, sqlstate = REFUSED[name]
    furnish(db, server)
    db.execute(state)
    before = db.dump(data=True)
    done = psql_file(db, stem)
    assert done.code == 3, done
    assert f"ERROR:  {sqlstate}: " in done.err
    if sqlstate == "TB002":
        assert re.search(r"HINT:  .*db/migrations/\w+\.sql.* \(invoke [a-z-]+\)", done.err), done
    if name.removeprefix("fix, ") in HANGING:  # what hangs there is named, and is a conflict
        assert name.rpartition(" ")[2] in done.err.partition("DETAIL:  ")[2]
        assert [c for c in verified(db) if c.kind == "dependants" and c.verdict == "differs, conflict"] != []
    assert db.dump(data=True) == before


def test_what_an_owner_has_chosen_stays(db: Db) -> None:
    run_files(db, *DOCUMENTED)
    columns = ("slots.must_keep", "slots.min_chars", "prompt_snapshots.budget_report", "turn_metrics.rejects")
    for column in columns:
        db.execute(f"COMMENT ON COLUMN {column} IS 'ours'")
    db.execute(
        "COMMENT ON TABLE turn_metrics IS 'ours'; COMMENT ON TABLE worlds IS 'ours'; COMMENT ON TABLE slots IS NULL"
    )
    db.execute("ALTER TABLE turn_metrics ALTER trims_count SET DEFAULT 7")
    before = db.dump()
    run_files(db, *DOCUMENTED)
    assert db.dump() == before


@pytest.mark.parametrize("state", ["", by_hand()], ids=["empty", "by hand"])
def test_tables_in_a_later_schema_of_the_path_are_used(db: Db, state: str) -> None:
    """And what is new comes where the others of its file are."""
    db.execute(f"CREATE SCHEMA app; {state}")
    if not state:
        run_files(db, CORE_SCHEMA, SLOTS, SNAPSHOTS)
    db.execute(f"ALTER DATABASE {db.name} SET search_path = app, public")
    for stem in (*DOCUMENTED[:-1], FLAGS):
        assert psql_file(db, stem).code == 0
    assert db.rows("SELECT relname FROM pg_class WHERE relnamespace = 'app'::regnamespace") == []
    assert db.rows("SELECT proname FROM pg_proc WHERE pronamespace = 'app'::regnamespace") == []
    assert differing(db, "slots_flags") == []
    db.execute("DELETE FROM slots; INSERT INTO slots (type, name, description) VALUES ('npc', 'persona', '')")
    assert db.rows("SELECT must_keep, min_chars FROM slots") == [(False, 140)]


@pytest.mark.parametrize("server", SERVERS)
def test_the_verification_prints_a_table(db: Db, server: str) -> None:
    role = furnish(db, server)
    done = db.psql("-f", str(VERIFY), role=role)
    assert done.code == 0, done
    assert {line.rpartition("|")[2].partition(",")[0] for line in done.out.splitlines()} == {"missing"}
    run_files(db, *DOCUMENTED, role=role)
    done = db.psql("-f", str(VERIFY), role=role)
    assert {line.rpartition("|")[2] for line in done.out.splitlines()} == {"ok"}


METRICS_OF_UUID_TURNS = """
CREATE TABLE turn_metrics (turn_id uuid PRIMARY KEY REFERENCES turns (id), tokens_before int);
INSERT INTO turn_metrics SELECT id, 1 FROM turns;
"""


def test_recreate_is_one_transaction(db: Db) -> None:
    """An error in the last of the files that it includes, and nothing has moved."""
    db.execute(CORE_WITH_UUID_TURNS + CORE_ROWS + snapshots("uuid REFERENCES turns (id)") + METRICS_OF_UUID_TURNS)
    db.execute(REFUSING_METRICS)
    before = db.dump(data=True)
    done = psql_file(db, RECREATE)
    assert (done.code, "no metrics today" in done.err) == (3, True), done
    assert db.dump(data=True) == before
    db.execute("DROP EVENT TRIGGER refuse")
    turns = db.value("SELECT count(*) FROM turns")
    done = psql_file(db, RECREATE)
    assert done.code == 0, done
    assert db.value("SELECT count(*) FROM core_archive.turns") == turns
    assert db.value("SELECT count(*) FROM core_archive.turn_metrics") == turns
    assert differing(db, "turn_metrics") == differing(db, "core_schema") == differing(db, "prompt_snapshots") == []
    run_files(db, *DOCUMENTED)
    assert differing(db) == []
    again = db.dump()
    run_files(db, RECREATE)
    assert db.dump() == again


REFUSING_METRICS = """
CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
  IF to_regclass('turn_metrics_pkey') IS NOT NULL AND EXISTS (SELECT FROM pg_event_trigger_ddl_commands()
       WHERE command_tag = 'CREATE TABLE' AND object_identity = 'public.turn_metrics') THEN
    RAISE EXCEPTION 'no metrics today';
  END IF;
END $$;
CREATE EVENT TRIGGER refuse ON ddl_command_end EXECUTE FUNCTION refuse();
"""


def test_recreate_leaves_alone_what_it_need_not_move(db: Db) -> None:
    db.execute(CORE_WITH_UUID_TURNS + CORE_ROWS + SNAPSHOTS_ALONE)
    before = db.rows("SELECT attname, atttypid FROM pg_attribute WHERE attrelid = 'prompt_snapshots'::regclass")
    assert psql_file(db, RECREATE).code == 0
    assert db.rows("SELECT attname, atttypid FROM pg_attribute WHERE attrelid = 'prompt_snapshots'::regclass") == before
    assert db.value("SELECT to_regclass('turn_metrics')") is None
    assert differing(db, "core_schema") == []
