"""What the owner of a busy, hardened, replicated database would curse: found by experiments, kept as tests."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from budget_engine.migration import chain
from conftest import MIGRATIONS, PACKAGED_TOO, Db, assert_done, clean_environment, ended, until
from psycopg.errors import RaiseException
from states import by_hand, with_uuid

# Between two attempts to get both locks.
WAITING = """
SELECT count(*) FROM pg_stat_activity WHERE application_name = 'budget-engine-recipes' AND wait_event = 'PgSleep'"""


@PACKAGED_TOO
@pytest.mark.parametrize("turn_id", ["uuid", "bigint"])
def test_the_fix_holds_one_table_only_together_with_the_other(db: Db, turn_id: str) -> None:
    """Holding prompt_snapshots while waiting for turns would hold up all its readers, or end them in a deadlock."""
    db.execute(with_uuid() if turn_id == "uuid" else by_hand("bigint"))
    with db.connect(autocommit=False) as writer, db.connect() as reader:
        writer.execute("LOCK TABLE turns IN ROW EXCLUSIVE MODE")
        process = db.start("fix", LOCK_TIMEOUT="30s")
        until(lambda: db.value(WAITING), process)
        reader.execute("SET lock_timeout = '1s'")
        for _ in range(20):
            reader.execute("SELECT count(*) FROM prompt_snapshots")
        writer.execute("INSERT INTO prompt_snapshots (tp, linearized_prompt_text) VALUES ('{}', 'meanwhile')")
        writer.commit()
        done = ended(process)
    assert done.code == 0, done
    assert db.value("SELECT count(*) FROM prompt_snapshots WHERE linearized_prompt_text = 'meanwhile'") == 1


def test_the_fix_gives_up_after_one_lock_timeout(db: Db) -> None:
    db.execute(with_uuid())
    before = db.dump(data=True)
    with db.connect(autocommit=False) as writer:
        writer.execute("LOCK TABLE turns IN ROW EXCLUSIVE MODE")
        done = db.invoke("fix", env={"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "0"})
        assert done.code == 7, done
    assert db.dump(data=True) == before
    assert db.value("SELECT to_regnamespace('budget_engine') IS NULL")  # what was not done is no history


def test_the_trigger_lends_its_rights_to_no_other_trigger(db: Db) -> None:
    assert db.invoke("setup").code == 0
    db.execute(
        f"CREATE ROLE {db.name} LOGIN; GRANT ALL ON slots TO {db.name}; GRANT TEMPORARY ON DATABASE {db.name} TO PUBLIC"
    )
    with db.connect(db.name) as other:
        other.execute(
            "CREATE FUNCTION pg_temp.evil() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN RAISE EXCEPTION 'ran as %', current_user; END$$"
        )
        other.execute("CREATE TRIGGER evil BEFORE UPDATE ON slots FOR EACH ROW EXECUTE FUNCTION pg_temp.evil()")
        other.execute("INSERT INTO slots (type, name, description) VALUES ('world', 'tone', '')")
        with pytest.raises(RaiseException, match=f"ran as {db.name}"):  # only with his own rights
            other.execute("UPDATE slots SET priority = 1")
        other.execute("DROP FUNCTION pg_temp.evil CASCADE")  # the session's end would drop it in its own time
    db.execute(f"DROP OWNED BY {db.name}; DROP ROLE {db.name}")


def test_rows_that_row_security_hides_are_not_passed_over(db: Db) -> None:
    """Their defaults would be lost for good: later nobody can tell unset from chosen."""
    role = db.name
    db.execute(f"CREATE ROLE {role} LOGIN; GRANT CREATE ON SCHEMA public TO {role}")
    assert db.invoke("prereqs", role=role).code == 0
    db.execute(
        "INSERT INTO slots (type, name, description) VALUES ('world', 'tone', '');"
        "ALTER TABLE slots ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
    )
    done = db.invoke("slots-flags", role=role)
    assert done.code == 0, done
    assert db.rows("SELECT must_keep, min_chars FROM slots") == [(False, 180)]
    assert db.value("SELECT relforcerowsecurity FROM pg_class WHERE oid = 'slots'::regclass")
    db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_what_needs_turn_id_without_depending_on_it_is_a_conflict(db: Db) -> None:
    """A publication of the table; a trigger that sets the column."""
    db.execute(
        with_uuid()
        + """
        CREATE PUBLICATION p FOR TABLE prompt_snapshots;
        CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS
          'BEGIN NEW.turn_id := coalesce(NEW.turn_id, gen_random_uuid()); RETURN NEW; END';
        CREATE TRIGGER stamp BEFORE INSERT ON prompt_snapshots FOR EACH ROW EXECUTE FUNCTION stamp()"""
    )
    before = db.dump(data=True)
    done = db.invoke("setup")
    assert (done.code, "publication p" in done.err, "trigger stamp" in done.err) == (6, True, True), done
    assert db.dump(data=True) == before


def test_a_partitioned_table_is_refused(db: Db) -> None:
    """By psql where its form is to change: a column for the budget report harms none."""
    db.migrate("20250130000000_core_schema")
    db.execute(
        "CREATE TABLE prompt_snapshots (id uuid, snapshot_id uuid NOT NULL, turn_id uuid) PARTITION BY HASH (id)"
    )
    before = db.dump()
    assert db.invoke("setup").code == 6
    done = db.psql("-v", "VERBOSITY=verbose", "-f", str(MIGRATIONS / "20250222_fix_prompt_snapshots_turn_id.sql"))
    assert (done.code, db.dump()) == (3, before)
    assert "TB002" in done.err
    assert "not an ordinary table" in done.err


def test_deferred_triggers_on_slots_are_no_obstacle(db: Db) -> None:
    db.execute(by_hand())
    db.execute(
        "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER audit AFTER INSERT OR UPDATE ON slots DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION audit()"
    )
    done = db.invoke("setup")
    assert done.code == 0, done
    assert db.value("SELECT count(*) FROM slots WHERE min_chars IS NOT NULL") == 5


def test_settings_of_the_database_do_not_matter(db: Db) -> None:
    db.execute('CREATE SCHEMA "Über"')
    for setting in (
        "standard_conforming_strings = off",
        "client_encoding = latin1",
        "DateStyle = 'SQL, DMY'",
        "TimeZone = 'Asia/Makassar'",
        "default_transaction_isolation = serializable",
        "enable_nestloop = off",
        'search_path = "Über"',
    ):
        db.execute(f"ALTER DATABASE {db.name} SET {setting}")
    done = db.invoke("setup")
    assert done.code == 0, done
    assert db.value("SELECT count(*) FROM budget_engine.history WHERE duration < '0' OR schema_name <> 'Über'") == 0
    assert db.invoke("verify").code == 0


def test_look_ups_by_key_whatever_the_planner_is_told(db: Db) -> None:
    db.execute(by_hand())
    db.execute(
        "INSERT INTO slots (type, name, description) SELECT 'ux', i::text, '' FROM generate_series(1, 5000) AS i"
    )
    db.execute(f"ALTER DATABASE {db.name} SET enable_nestloop = off")
    db.execute("SELECT pg_stat_reset()")
    db.migrate("20250220_slots_flags")
    counted = "SELECT idx_scan, idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'slots'"
    deadline = time.monotonic() + 30
    while not (found := db.rows(counted)[0])[0]:  # PostgreSQL 14 counts a moment later
        assert time.monotonic() < deadline
    assert found[1] < 100


def test_all_tables_publication_gets_no_history(db: Db) -> None:
    """Its subscribers would stop at the first row of a table that they do not have."""
    db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    assert db.invoke("setup").code == 0
    assert db.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'budget_engine'") == 0


def test_an_invalid_index_under_vacuum_is_not_taken_for_a_build(db: Db) -> None:
    """VACUUM holds the same lock on the table as CREATE INDEX CONCURRENTLY."""
    assert db.invoke("setup").code == 0
    db.execute("INSERT INTO templates (type, slot, body) SELECT 'ux', i::text, '' FROM generate_series(1, 20000) AS i")
    db.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_templates_status'::regclass")
    script = "SET vacuum_cost_delay = 100; SET vacuum_cost_limit = 1; VACUUM templates"
    vacuum = subprocess.Popen(
        [db.cluster.binaries / "psql", db.url, *(w for c in script.split("; ") for w in ("-c", c))]
    )
    try:
        with db.connect() as connection:
            while not connection.execute("SELECT FROM pg_stat_progress_vacuum").rowcount:
                assert vacuum.poll() is None
            process = db.start("setup", LOCK_WAIT="60s")
            dropping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DROP INDEX CONC%'"
            until(lambda: db.value(dropping), process)  # queued behind the vacuum, not waiting for a build
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_progress_vacuum")
        assert ended(process).code == 0
    finally:
        vacuum.kill()
        vacuum.wait()
    assert db.differing() == {}


def test_a_reader_that_goes_away_does_not_stop_the_work(db: Db) -> None:
    command = f'"{sys.executable}" -m invoke setup | head -2'
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=chain.ROOT,
        env=clean_environment() | {"DATABASE_URL": db.url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr
    assert db.differing() == {}


def test_a_password_like_the_user_does_not_garble_the_report(db: Db) -> None:
    url = db.url.replace("postgres@", "postgres:postgres@")
    done = assert_done(db, db.invoke("setup", env={"DATABASE_URL": url}))
    assert done.out.startswith("target   postgresql://postgres:***@")
    assert "role postgres" in done.out
