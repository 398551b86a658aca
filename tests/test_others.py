"""What belongs to others, under names that we use: none of their code runs with our rights, nothing becomes theirs."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MIGRATIONS, Db, assert_done
from states import ANOTHER_FEATURE, CORE, by_hand

SPIES = """
GRANT CREATE ON SCHEMA public TO {role};
SET ROLE {role};
CREATE FUNCTION public.spy() RETURNS text LANGUAGE plpgsql AS
  $$ BEGIN RAISE LOG 'spied on % in %', current_user, current_database(); RETURN 'spy'; END $$;
CREATE FUNCTION public.spied() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM public.spy(); RETURN NEW; END $$;
CREATE FUNCTION public.sure(anyelement) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT public.spy() IS NOT NULL';
CREATE TYPE public.word AS ENUM ('a');
CREATE FUNCTION public.as_text(public.word) RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN public.spy(); END';
CREATE CAST (public.word AS text) WITH FUNCTION public.as_text AS IMPLICIT;
"""
HISTORY = """
CREATE TABLE budget_engine.history (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, step text NOT NULL, part text NOT NULL, schema_name text NOT NULL,
  finished_at timestamptz NOT NULL DEFAULT clock_timestamp(), duration interval NOT NULL,
  role_name text NOT NULL DEFAULT session_user, checksum text NOT NULL, version text NOT NULL);
INSERT INTO budget_engine.history (step, part, schema_name, duration, checksum, version)
VALUES ('slots_flags', 'transaction', 'public', '1 s', 'c', 'v');
"""
HISTORIES = {
    "none": "",
    "with a trigger": HISTORY
    + "CREATE TRIGGER t BEFORE INSERT ON budget_engine.history FOR EACH ROW EXECUTE FUNCTION spied()",
    "with a rule": HISTORY + "CREATE RULE r AS ON INSERT TO budget_engine.history DO ALSO SELECT spy()",
    "with a default": HISTORY + "ALTER TABLE budget_engine.history ALTER role_name SET DEFAULT spy()",
    "with a check": HISTORY + "ALTER TABLE budget_engine.history ADD CHECK (sure(step)) NOT VALID",
    "with an index": HISTORY + "DELETE FROM budget_engine.history; CREATE INDEX ON budget_engine.history (sure(step))",
    "a view": HISTORY
    + "ALTER TABLE budget_engine.history RENAME TO h; CREATE VIEW budget_engine.history AS SELECT id, step,"
    " part, schema_name, finished_at, duration, spy() AS role_name, checksum, version FROM budget_engine.h",
    "of a type that a cast goes with": "CREATE TABLE budget_engine.history AS SELECT 1::bigint AS id,"
    " 'a'::text AS step, 'a'::text AS part, 'a'::word AS schema_name, now() AS finished_at, interval '1 s' AS duration,"
    " 'a'::text AS role_name, 'a'::text AS checksum, 'a'::text AS version",
}


@pytest.fixture
def role(db: Db) -> Iterator[str]:
    """A role with functions that note who runs them."""
    name = f"role_{uuid.uuid4().hex}"
    db.execute(f"CREATE ROLE {name} LOGIN; {SPIES.format(role=name)}")
    yield name
    db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def spied_on(db: Db) -> set[str]:
    """Say with whose rights spy() ran: the log tells it of READ ONLY transactions, too, and of those rolled back."""
    return set(re.findall(f"spied on (.*) in {db.name}\n", db.cluster.log.read_text(errors="replace")))


def test_a_history_of_anothers_is_not_written_and_runs_nothing(db: Db, role: str) -> None:
    """What is in a schema of hers, is hers to drop, and to make again: where there is no history, none is made."""
    lost = "DROP TABLE IF EXISTS turn_metrics; DROP INDEX IF EXISTS idx_slots_type"  # a concurrent part is noted, too
    schema = f"DROP SCHEMA IF EXISTS budget_engine CASCADE; CREATE SCHEMA budget_engine AUTHORIZATION {role}"
    for name, history in HISTORIES.items():
        db.execute(f"{lost}; {schema}; SET ROLE {role}; {history}")
        assert db.call("status").code == 0, name
        done = assert_done(db, db.call("setup"))
        assert "not written into the history: it belongs to another role" in done.out, name
        assert spied_on(db) <= {role}, name
        there = db.value("SELECT to_regclass('budget_engine.history') IS NOT NULL")
        assert there == bool(history), name


def test_no_row_of_a_view_is_counted(db: Db, role: str) -> None:
    """To count the values that a fix would keep is to run the view."""
    db.execute(by_hand("uuid", "NULL") + "ALTER TABLE prompt_snapshots RENAME TO kept;")
    db.execute(f"""
        GRANT SELECT ON kept TO {role}; SET ROLE {role};
        CREATE VIEW prompt_snapshots AS SELECT id, snapshot_id, templates_version, pack_versions, tp,
          linearized_prompt_text, awf_contract, source, created_at, created_by, game_id, parent_id,
          CASE spy() WHEN '' THEN turn_id END AS turn_id FROM kept""")
    for task in ("plan", "status", "verify", "doctor", "rehearse", "setup"):
        done = db.call(task)
        assert done.code == (0 if task == "status" else 6), done
    assert spied_on(db) <= {role}


def test_functions_of_hers_under_names_of_ours_are_conflicts(db: Db, role: str) -> None:
    """With the documented bodies: she could replace them later on. Renamed, they stay hers; ours are ours."""
    db.migrate("20250214_slots_templates")
    # The one that gives rows their defaults goes again at once.
    words = r"(CREATE (?:OR REPLACE )?FUNCTION ((?!give_)\w+)\(.*?AS (\$\w*\$).*?\3;)"
    made = {}
    for stem in ("20250130000000_core_schema", "20250220_slots_flags"):
        file = MIGRATIONS / f"{stem}.sql"
        for sql, name, _ in re.findall(words, file.read_text(), re.S):
            made[name] = f"SET ROLE {role}; {sql}"
            db.execute(made[name])
            assert db.psql("-f", str(file)).code == 3, name
            db.execute(f"DROP FUNCTION {name}")
    db.execute("".join(made.values()))
    before = db.dump()
    assert db.call("setup").code == 6
    assert db.dump() == before
    assert db.psql("-c", db.call("verify", "--remedies").out).code == 0
    assert_done(db)
    owners = db.rows("SELECT proname, proowner::regrole::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
    assert len(made) == 3
    assert set(owners) >= {owned for name in made for owned in ((name, "postgres"), (f"{name}_old", role))}


def test_a_schema_that_another_makes_between_print_and_paste_gets_nothing(db: Db, role: str, tmp_path: Path) -> None:
    """Who pastes goes on after an error: what follows must not move anything there."""
    db.execute(CORE + ANOTHER_FEATURE)
    printed = db.call("verify", "--remedies").out
    db.execute(f"CREATE SCHEMA archive AUTHORIZATION {role}")
    (tmp_path / "printed.sql").write_text(printed)
    done = db.psql("-v", "ON_ERROR_STOP=0", "-f", str(tmp_path / "printed.sql"))
    assert 'schema "archive" already exists' in done.err
    assert db.rows("SELECT schemaname FROM pg_tables WHERE tablename = 'prompt_snapshots'") == [("public",)]
    (tmp_path / "printed.sql").write_text(db.call("verify", "--remedies").out)
    assert db.psql("-f", str(tmp_path / "printed.sql")).code == 0
    assert_done(db)
    assert db.rows("SELECT nspname FROM pg_namespace WHERE nspowner = 'postgres'::regrole AND nspname ~ 'archive'") == [
        ("archive_2",)
    ]
