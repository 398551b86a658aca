"""The files by hand: each with psql, the chain in both orders, any number of times, on any kind of database."""

from __future__ import annotations

import re
from itertools import cycle

import pytest
import supabase
from budget_engine.postgres import embedded
from conftest import Db, database, succeeded
from states import ANOTHER_FEATURE, CORE, CORE_WITH_UUID_TURNS, HANGING, HEAD, by_hand, snapshots, with_uuid
from verification import VERIFY, differing, verified

CORE_SCHEMA = "20250130000000_core_schema"
SLOTS = "20250214_slots_templates"
SNAPSHOTS = "20250213_prompt_snapshots"
FIX = "20250222_fix_prompt_snapshots_turn_id"
FLAGS = "20250220_slots_flags"
REPORT = "20250221_budget_report"
METRICS = "20250222_turn_metrics"

DOCUMENTED = (CORE_SCHEMA, SLOTS, SNAPSHOTS, FIX, FLAGS, REPORT, METRICS)
SNAPSHOTS_FIRST = (CORE_SCHEMA, SNAPSHOTS, SLOTS, FIX, FLAGS, REPORT, METRICS)
METRICS_FIRST = (CORE_SCHEMA, METRICS, SLOTS, FLAGS, SNAPSHOTS, REPORT)


def furnish(db: Db, server: str) -> str:
    """Make the database one of that kind, and say who migrates there."""
    if server == "plain":
        return "postgres"
    supabase.install(db)
    if "profiles" in server:
        supabase.add_profiles(db)
    return str(supabase.MIGRATOR)


def run_files(db: Db, *stems: str, role: str = "postgres") -> None:
    """Run them; all that they say is that something exists."""
    done = db.by_psql(*stems, role=role)
    said = re.sub(r".*NOTICE:  .*already exists, skipping\nLOCATION: .*\n", "", done.err)
    assert (done.code, done.out, said) == (0, "", "")


def verdicts(db: Db, role: str) -> set[str]:
    """Return what db/verify.sql prints at the ends of its lines."""
    done = succeeded(db.psql("-f", str(VERIFY), role=role))
    return {line.rpartition("|")[2].partition(",")[0] for line in done.out.splitlines()}


@pytest.mark.parametrize("server", ["plain", "supabase", "supabase with profiles"])
def test_each_order_ends_in_the_same_schema(cluster: embedded.Cluster, server: str) -> None:
    """Which the verification prints."""
    dumps = []
    for order in (DOCUMENTED, SNAPSHOTS_FIRST, METRICS_FIRST):
        with database(cluster) as db:
            role = furnish(db, server)
            assert verdicts(db, role) == {"missing"}
            for stems in (order, [stem for stem in order for _ in range(2)]):
                run_files(db, *stems, role=role)
                dumps.append(db.dump())
            assert verdicts(db, role) == {"ok"}
    assert dumps == dumps[:1] * 6


@pytest.mark.parametrize("stem", DOCUMENTED)
@pytest.mark.parametrize("state", [by_hand(), with_uuid()], ids=["bigint", "uuid"])
def test_a_file_does_its_own_step_and_can_be_run_again(db: Db, state: str, stem: str) -> None:
    """Whichever comes first, the documented order ends well."""
    db.execute(state)
    assert db.by_psql(stem).code == 0
    assert differing(db, stem.partition("_")[2]) == []
    after = db.dump(data=True)
    again = db.by_psql(stem)
    assert (again.code, again.out) == (0, "")
    assert db.dump(data=True) == after
    db.migrate(*DOCUMENTED)
    assert differing(db) == []


def test_a_core_table_that_existed_is_its_applications(db: Db) -> None:
    """What differs is told; the indexes whose columns exist are added."""
    db.execute(CORE + HEAD)
    tables = (
        "SELECT * FROM information_schema.columns WHERE table_name IN ('turns', 'entry_points', 'games') ORDER BY 3, 4"
    )
    before = db.rows(tables)
    db.migrate(*DOCUMENTED)
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
    before = db.fingerprint()
    done = db.by_psql(stem)
    assert done.code == 3, done
    assert re.search(rf"ERROR:  TB001: .*\b{table}\b.*does not exist", done.err), done
    assert re.search(rf"HINT:  .*db/migrations/{first}\.sql.*\(invoke prereqs\)", done.err), done
    assert db.fingerprint() == before


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
    before = db.fingerprint()
    done = db.by_psql(stem)
    assert done.code == 3, done
    assert f"ERROR:  {sqlstate}: " in done.err
    if sqlstate == "TB002":
        assert re.search(r"HINT:  .*db/migrations/\w+\.sql.* \(invoke [a-z-]+\)", done.err), done
    if name.removeprefix("fix, ") in HANGING:  # what hangs there is named, and is a conflict
        [check] = [c for c in verified(db) if c.kind == "dependants"]
        assert check.verdict == "differs, conflict"
        for said in (done.err.partition("DETAIL:  ")[2], str(check.actual)):
            assert name.rpartition(" ")[2] in said
    assert db.fingerprint() == before


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
    db.migrate(*DOCUMENTED[:-1], FLAGS)
    assert db.rows("SELECT relname FROM pg_class WHERE relnamespace = 'app'::regnamespace") == []
    assert db.rows("SELECT proname FROM pg_proc WHERE pronamespace = 'app'::regnamespace") == []
    assert differing(db, "slots_flags") == []
    db.execute("DELETE FROM slots; INSERT INTO slots (type, name, description) VALUES ('npc', 'persona', '')")
    assert db.rows("SELECT must_keep, min_chars FROM slots") == [(False, 140)]
