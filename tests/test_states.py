"""Every state that real databases are in before the first run, and its outcome."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from budget_engine.migration import chain, plan, survey
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, parse_target
from conftest import Db, clean_environment, run
from states import (
    BIGINT,
    BIGINTS,
    CORE,
    CORE_ROWS,
    EXTRAS,
    NOT_TO_ALL,
    ORPHANS,
    OWN,
    SLOT_ROWS,
    SLOTS_TEMPLATES,
    UUIDS,
    altered,
    by_hand,
    contents,
    lost,
    old_metrics,
    snapshot_rows,
    snapshots,
    with_uuid,
)

CHAIN = chain.load()
KEPT = {"public.prompt_snapshots.turn_id": "turn_id_uuid"}
APP_KEPT = {"app.prompt_snapshots.turn_id": "turn_id_uuid"}
TURN_FOREIGN_KEY = "REFERENCES turns(id) ON DELETE SET NULL"

SLOTS_FIRST = CORE + CORE_ROWS + SLOTS_TEMPLATES + SLOT_ROWS + snapshots(BIGINT) + snapshot_rows(BIGINTS)

READY = {
    "empty": "",
    "core only": CORE + CORE_ROWS,
    "core without games and turns": CORE[: CORE.index("CREATE TABLE IF NOT EXISTS games")],
    "snapshots first": by_hand(),
    "slots first": SLOTS_FIRST,
    "slots first, twice": SLOTS_FIRST + CORE + SLOTS_TEMPLATES + snapshots(BIGINT),
    "without rows": CORE + snapshots(BIGINT) + SLOTS_TEMPLATES,
    "slots only": SLOTS_TEMPLATES + SLOT_ROWS,
    "no prompt_snapshots yet": CORE + CORE_ROWS + SLOTS_TEMPLATES + SLOT_ROWS,
    "parent_id without foreign key": altered(
        "ALTER TABLE prompt_snapshots DROP parent_id, ADD parent_id uuid; UPDATE prompt_snapshots SET parent_id = id"
    ),
    "turn_id without foreign key": by_hand("bigint"),
    "turn_id without index": altered("DROP INDEX idx_prompt_snapshots_turn_id"),
    "turn_id with foreign key of another name": by_hand(
        "bigint CONSTRAINT of_turn REFERENCES turns (id) ON DELETE SET NULL"
    ),
    "turn_id with foreign key not valid": by_hand("bigint")
    + "ALTER TABLE prompt_snapshots ADD FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE SET NULL NOT VALID",
    "must_keep alone": altered("ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false"),
    "must_keep without default": altered(
        "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT true; ALTER TABLE slots ALTER must_keep DROP DEFAULT"
    ),
    "min_chars alone": altered("ALTER TABLE slots ADD min_chars int; UPDATE slots SET min_chars = 7"),
    "flags by hand": altered(
        "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false, ADD min_chars int;"
        "UPDATE slots SET must_keep = true WHERE type = 'ux'; UPDATE slots SET min_chars = 9 WHERE type = 'npc';"
        "CREATE INDEX idx_slots_must_keep ON slots (must_keep) WHERE must_keep = true"
    ),
    "budget_report by hand": altered(
        "ALTER TABLE prompt_snapshots ADD budget_report jsonb; UPDATE prompt_snapshots SET budget_report = '{\"v\": 1}'"
    ),
    "turn_metrics by hand": altered(old_metrics()),
    "turn_metrics without foreign key": altered(old_metrics("PRIMARY KEY")),
    "turn_metrics without defaults": altered(
        old_metrics() + "ALTER TABLE turn_metrics ALTER created_at DROP DEFAULT, ALTER rejects DROP DEFAULT"
    ),
    "extras": by_hand() + EXTRAS,
}

UUID_READY = {
    "with rows": with_uuid(),
    "without rows": CORE + snapshots("uuid") + SLOTS_TEMPLATES,
    "without index": with_uuid() + "DROP INDEX idx_prompt_snapshots_turn_id",
    "NOT NULL": with_uuid("uuid NOT NULL"),
    "with default": with_uuid("uuid DEFAULT gen_random_uuid()"),
    "NOT NULL with default": with_uuid("uuid NOT NULL DEFAULT 'e1000000-0000-4000-8000-000000000000'"),
    "with comment": with_uuid() + "COMMENT ON COLUMN prompt_snapshots.turn_id IS 'the player''s 100 % turn'",
    "before slots_templates": CORE + CORE_ROWS + snapshots("uuid") + snapshot_rows(UUIDS),
    "with extras": with_uuid() + EXTRAS,
    "with other views": with_uuid() + "CREATE VIEW prompts AS SELECT id, tp FROM prompt_snapshots",
}


def left(db: Db, url: str = "") -> tuple[list[str], list[str]]:
    """Return the required checks that do not pass, and the statements that another setup would run."""
    with Connection(parse_target(url or db.url), Settings(None, "")) as connection:
        checks = survey.read(connection, CHAIN).checks
    actions = plan.make(CHAIN, CHAIN.steps, checks).actions
    return [c.title for c in checks if c.required and not c.passed], [sql for action in actions for sql in action.sql]


def assert_ready(db: Db, renamed: dict[str, str] | None = None) -> None:
    """Set up; every check passes, nothing is lost, and a second run would have nothing to do."""
    before = contents(db)
    done = db.call("setup")
    assert done.code == 0, done
    assert left(db) == ([], [])
    assert lost(before, contents(db), renamed or {}) == []


@pytest.mark.parametrize("state", READY.values(), ids=READY)
def test_setup_completes_what_is_missing_and_loses_nothing(db: Db, state: str) -> None:
    db.execute(state)
    assert_ready(db)


@pytest.mark.parametrize("state", UUID_READY.values(), ids=UUID_READY)
def test_setup_replaces_a_uuid_turn_id_and_keeps_its_values(db: Db, state: str) -> None:
    db.execute(state)
    assert_ready(db, KEPT)


def test_a_real_run_of_the_chain_twice_by_hand_before(db: Db) -> None:
    db.migrate("20250130000000_core_schema", "20250213_prompt_snapshots", "20250214_slots_templates")
    db.migrate("20250130000000_core_schema", "20250213_prompt_snapshots", "20250214_slots_templates")
    db.execute(CORE_ROWS.replace("'tutorial'", "'quest'").replace("'hidden'", "'draft'").replace("'gm'", "'system'"))
    db.execute(snapshot_rows(BIGINTS) + SLOT_ROWS)
    assert_ready(db)
    before = db.dump(data=True)
    again = db.call("setup")
    assert (again.code, "nothing to do" in again.out) == (0, True), again
    assert db.dump(data=True) == before


@pytest.mark.parametrize("turn_id", ["bigint", "uuid"])
def test_invalid_indexes_are_built_again(db: Db, turn_id: str) -> None:
    db.execute(with_uuid() if turn_id == "uuid" else by_hand())
    if turn_id == "bigint":
        assert db.call("setup").code == 0
    before = contents(db)
    db.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid::regclass::text LIKE 'idx%'")
    invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid AND indexrelid::regclass::text !~ 'turn_id_uuid$'"
    assert db.value(invalid) > 5
    done = db.call("setup")
    assert done.code == 0, done
    assert db.differing() == {}
    assert db.value(invalid) == 0
    assert lost(before, contents(db), KEPT if turn_id == "uuid" else {}) == []


def test_an_index_of_a_core_table_that_the_rows_refuse_is_told_and_keeps_nobody(db: Db) -> None:
    """It is documented: the table is the application's."""
    db.execute(altered("DROP INDEX idx_turns_game_idx; UPDATE turns SET idx = 1 WHERE idx = 2"))
    with pytest.raises(psycopg.errors.UniqueViolation):
        db.execute("CREATE UNIQUE INDEX CONCURRENTLY idx_turns_game_idx ON turns (game_id, idx)")
    before = contents(db)
    for _ in range(2):
        done = db.call("setup")
        assert done.code == 0, done
        refused = done.out.partition("\nrefused ")[2].splitlines()[:3]
        assert "ON public.turns (game_id, idx)" in refused[0], done
        assert "duplicated" in refused[2], done
        assert db.differing() == {}
        assert lost(before, contents(db), {}) == []
    assert "exit 5" not in db.call("plan").out
    for task in ("verify", "status"):
        told = db.call(task)
        assert (told.code, "turns (game_id, idx)" in told.out) == (0, True), told
    db.execute("UPDATE turns SET idx = id + 100")
    assert_ready(db)
    assert db.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_turns_game_idx'::regclass")


def test_orphans_are_said_and_kept_and_all_else_is_done(db: Db) -> None:
    db.execute(by_hand("bigint", ORPHANS))
    before = contents(db)
    for _ in range(2):
        done = db.call("setup")
        assert done.code == 5, done
        assert "foreign key prompt_snapshots (turn_id)" in done.err
        assert "999999" in done.out + done.err
        assert db.differing() == {
            "foreign key prompt_snapshots (turn_id)": (
                TURN_FOREIGN_KEY,
                f"{TURN_FOREIGN_KEY} NOT VALID",
                "fix_prompt_snapshots_turn_id",
            )
        }
        assert lost(before, contents(db), {}) == []
        assert done.out.splitlines()[-1].startswith("left "), done
        helps = done.err.partition("\nhelp ")[2]
        assert helps.strip().startswith("Correct those rows"), done
    for said in (done, db.call("verify"), db.call("status", "--check")):
        assert (said.code, said.err.partition("\nhelp ")[2]) == (5, helps), said
        found = re.search(r"prompt_snapshots: (\d+) rows point to nothing: (SELECT .*)", said.err)
        assert found is not None, said
        assert int(found[1]) == len(db.rows(found[2])) == 1
    db.execute("UPDATE prompt_snapshots SET turn_id = NULL WHERE turn_id = 999999")
    assert_ready(db)


TABLES = [
    *("entry_points", "games", "prompt_segments", "prompt_snapshots", "rulesets"),
    *("slots", "templates", "turn_metrics", "turns", "worlds"),
]


def tables(db: Db) -> dict[str, list[str]]:
    """Return schema → its tables."""
    return dict(
        db.rows("""
            SELECT schemaname::text, array_agg(tablename::text ORDER BY tablename) FROM pg_tables
            WHERE schemaname !~ '^pg_|^information_schema$|^budget_engine$' GROUP BY 1""")
    )


def lead(db: Db, by: str, search_path: str) -> dict[str, str]:
    """Make a search_path hold, by the URL (then it is returned), the role or the database."""
    if by == "url":
        return {"DATABASE_URL": f"{db.url}&search_path={search_path}"}
    if by == "schema":
        return {"DATABASE_URL": f"{db.url}&schema={search_path}"}
    whose = f"ROLE postgres IN DATABASE {db.name}" if by == "role" else f"DATABASE {db.name}"
    db.execute(f"ALTER {whose} SET search_path = {search_path}")
    return {}


@pytest.mark.parametrize(
    ("state", "by"),
    [("", "schema"), (by_hand(), "schema"), (with_uuid(), "schema"), (with_uuid(), "role"), (CORE, "database")],
    ids=["empty, schema=", "by hand, schema=", "uuid, schema=", "uuid, role", "core, database"],
)
def test_tables_in_another_schema(db: Db, state: str, by: str) -> None:
    db.execute("CREATE SCHEMA app; SET search_path = app;" + state)
    env = lead(db, by, "app")
    before = contents(db)
    done = db.call("setup", env=env)
    assert done.code == 0, done
    assert lost(before, contents(db), APP_KEPT if "turn_id uuid" in state else {}) == []
    assert tables(db) == {"app": TABLES}
    assert db.rows("SELECT pronamespace::regnamespace::text FROM pg_proc WHERE proname ~ '^set_critical'") == [("app",)]
    assert left(db, env.get("DATABASE_URL", "")) == ([], [])
    lead(db, "database", "app")
    assert left(db) == ([], [])


@pytest.mark.parametrize("by", ["url", "role", "database"])
def test_tables_spread_over_the_schemas_of_the_search_path(db: Db, by: str) -> None:
    db.execute(CORE + CORE_ROWS + snapshots("uuid") + snapshot_rows(UUIDS))
    db.execute("CREATE SCHEMA app; SET search_path = app;" + SLOTS_TEMPLATES + SLOT_ROWS)
    env = lead(db, by, "app,public")
    before = contents(db)
    done = db.call("setup", env=env)
    assert done.code == 0, done
    assert tables(db) == {
        "app": ["slots", "templates", "turn_metrics"],
        "public": [name for name in TABLES if name not in {"slots", "templates", "turn_metrics"}],
    }
    assert lost(before, contents(db), KEPT) == []
    lead(db, "database", "app,public")
    assert db.differing() == {}


def dump_of(db: Db, schema: str) -> str:
    """Return one schema, with rows, as pg_dump writes it."""
    words = ["--restrict-key=test", f"--schema={schema}"]
    done = run([str(db.cluster.binaries / "pg_dump"), db.url, *words], clean_environment())
    assert done.code == 0, done
    return done.out


# What is set up, and what lies in a second schema, which is on the search_path behind it, or not at all.
OTHERS = with_uuid() + old_metrics()
BACKUPS = {
    "uuid": (with_uuid(), by_hand() + old_metrics(), "public"),
    "bigint": (by_hand(), OTHERS, "public"),
    "empty": ("", OTHERS, "public"),
    "uuid, further down the search_path": (OTHERS, OTHERS, "public,aa_backup"),
}


@pytest.mark.parametrize(("state", "backup", "path"), BACKUPS.values(), ids=BACKUPS)
def test_a_backup_copy_in_a_second_schema_is_not_touched(db: Db, state: str, backup: str, path: str) -> None:
    db.execute(state)
    db.execute("CREATE SCHEMA aa_backup; SET search_path = aa_backup;" + backup)  # sorts before public
    lead(db, "database", path)
    before = dump_of(db, "aa_backup")
    done = db.call("setup")
    assert done.code == 0, done
    assert dump_of(db, "aa_backup") == before
    assert db.differing() == {}


@pytest.fixture
def role(db: Db) -> Iterator[str]:
    """A role that may log in and nothing else, dropped after the test."""
    name = f"role_{uuid.uuid4().hex}"
    db.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


GAMES_INDEXES = """
CREATE INDEX idx_games_entry_point ON games (entry_point_id); CREATE INDEX idx_games_world ON games (world_id);
"""

# (state, the right that the message must name); {role} is the role's name
NOT_PERMITTED = {
    "empty, may not create": (NOT_TO_ALL, "CREATE on schema public"),
    "core of others": (CORE + CORE_ROWS + "GRANT CREATE ON SCHEMA public TO {role}", "REFERENCES on table turns"),
    "may not create": (
        by_hand() + OWN + "REVOKE CREATE ON SCHEMA public FROM {role}, PUBLIC",  # PostgreSQL 14 lets all create there
        "CREATE on schema public",
    ),
    "may not reference turns": (
        by_hand() + OWN + "ALTER TABLE turns OWNER TO postgres",
        "REFERENCES on table turns (it belongs to postgres)",
    ),
    "may not reference games": (
        CORE + CORE_ROWS + GAMES_INDEXES + OWN + "ALTER TABLE games OWNER TO postgres",
        "REFERENCES on table games (it belongs to postgres)",
    ),
    "does not own slots": (
        by_hand() + OWN + "ALTER TABLE slots OWNER TO postgres",
        "ownership of table slots (it belongs to postgres)",
    ),
    "does not own prompt_snapshots": (
        with_uuid() + OWN + "ALTER TABLE prompt_snapshots OWNER TO postgres",
        "ownership of table prompt_snapshots (it belongs to postgres)",
    ),
    "does not own a table that lacks an index": (
        by_hand() + OWN + "ALTER TABLE entry_points OWNER TO postgres",
        "ownership of table entry_points (it belongs to postgres)",
    ),
}


@pytest.mark.parametrize(("state", "right"), NOT_PERMITTED.values(), ids=NOT_PERMITTED)
def test_a_missing_right_is_named_before_anything_is_changed(db: Db, role: str, state: str, right: str) -> None:
    db.execute(state.replace("{role}", role))
    before, rows = db.fingerprint(), contents(db)
    done = db.call("setup", role=role)
    assert done.code == 8, done
    assert right in done.err
    assert (db.fingerprint(), contents(db)) == (before, rows)


@pytest.mark.parametrize("state", [with_uuid(), ""], ids=["uuid", "empty"])
def test_an_ordinary_owner_suffices_and_the_history_is_done_without(db: Db, role: str, state: str) -> None:
    db.execute((state + OWN).replace("{role}", role))
    done = db.call("setup", role=role)
    assert done.code == 0, done
    assert db.differing() == {}
    assert db.rows("SELECT FROM pg_namespace WHERE nspname = 'budget_engine'") == []
    assert left(db, db.url_as(role)) == ([], [])


def test_a_database_that_takes_no_writes(db: Db) -> None:
    db.execute(by_hand() + f"; ALTER DATABASE {db.name} SET default_transaction_read_only = on")
    before = db.dump(data=True)
    done = db.call("setup")
    assert (done.code, "default_transaction_read_only" in done.err) == (8, True), done
    assert db.dump(data=True) == before


def test_a_finished_database_that_takes_no_writes_needs_none(finished: Db) -> None:
    finished.execute(f"ALTER DATABASE {finished.name} SET default_transaction_read_only = on")
    done = finished.call("setup")
    assert (done.code, "nothing to do" in done.out) == (0, True), done
