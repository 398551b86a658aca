"""verify, status, plan and rehearse: they say what is so, in every format, and change nothing."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import psycopg
import pytest
import supabase
from budget_engine.migration import chain
from budget_engine.output import formats
from conftest import Db, Run, ended, until
from states import BIGINT, CORE, ORPHANS, by_hand, snapshots, with_uuid
from terminal import on_terminal
from test_states import READY, UUID_READY

SCHEMA = json.loads((Path(formats.__file__).parent / "report.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def document(done: Run) -> dict[str, Any]:
    """Read the JSON document, all of stdout, and hold it against its schema."""
    seen = json.loads(done.out)
    VALIDATOR.validate(seen)
    assert seen["exit_code"] == done.code, done
    assert isinstance(seen, dict)
    return seen


def asked(db: Db, *words: str, role: str = "postgres") -> dict[str, Any]:
    return document(db.invoke(*words, "--format", "json", role=role))


# ── status ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STATES = {
    "empty": ("", {"core_schema": "pending", "turn_metrics": "pending", "fix_prompt_snapshots_turn_id": "not needed"}),
    "bigint": (by_hand() + "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false",
               {"fix_prompt_snapshots_turn_id": "done", "slots_flags": "partial", "budget_report": "pending"}),
    "uuid": (with_uuid(), {"fix_prompt_snapshots_turn_id": "pending"}),
    "wrong": (by_hand() + "ALTER TABLE slots ADD must_keep text", {"slots_flags": "conflict"}),
    "one of two tables": (CORE + "CREATE TABLE slots (id int)", {"slots_templates": "conflict"}),
    "core without an index": (CORE + snapshots(BIGINT), {"core_schema": "partial"}),
}  # fmt: skip


@pytest.mark.parametrize(("state", "expected"), STATES.values(), ids=STATES)
def test_status_says_how_each_step_stands(db: Db, state: str, expected: dict[str, str]) -> None:
    db.execute(state)
    before = db.dump(data=True)
    states = {step["step"]: step["state"] for step in asked(db, "status")["steps"]}
    assert {step: states[step] for step in expected} == expected
    assert db.dump(data=True) == before


def test_status_of_what_is_done(ready: Db) -> None:
    seen = asked(ready, "status")
    assert {step["state"] for step in seen["steps"]} == {"done"}
    assert seen["server"]["row_security"] == "plain PostgreSQL"
    around = seen["surroundings"]
    assert (around["unusual"], around["changed"]) == ([], [])
    assert len(around["history"]) == 5
    assert around["history"][0]["step"] == "turn_metrics"


@pytest.mark.parametrize(
    ("state", "code"),
    [("", 5), (with_uuid(), 5), (by_hand() + "ALTER TABLE slots ADD must_keep text", 6), (None, 0)],
)
def test_status_check_is_for_ci(db: Db, state: str | None, code: int) -> None:
    if state is None:
        assert db.invoke("setup").code == 0
    else:
        db.execute(state)
    assert db.invoke("status", "--check").code == code
    assert db.invoke("status").code == 0


def test_status_knows_supabase_with_and_without_profiles(db: Db) -> None:
    supabase.install(db)
    assert db.invoke("setup").code == 0
    assert asked(db, "status")["server"]["row_security"] == "Supabase without profiles"
    supabase.add_profiles(db)
    seen = asked(db, "status")
    assert seen["server"]["row_security"] == "Supabase"
    assert {step["state"] for step in seen["steps"]} == {"done", "partial"}, "the admins' policies are pending"


# Their policies are their application's once they exist: no check is about them then.
CORE_TABLES = ("worlds", "rulesets", "entry_points", "prompt_segments", "games", "turns")


def passing(db: Db) -> dict[str, bool]:
    """Return of each check whether it passes."""
    return {check["title"]: check["passed"] for step in asked(db, "verify")["steps"] for check in step["checks"]}


@pytest.mark.parametrize("world", ["plain", "Supabase", "Supabase with profiles"])
def test_checks_are_the_same_before_and_after_and_none_passes_on_an_empty_database(db: Db, world: str) -> None:
    if world != "plain":
        supabase.install(db)
    if world == "Supabase with profiles":
        supabase.add_profiles(db)
    before = passing(db)
    assert not any(before.values())
    assert db.invoke("setup").code == 0
    after = passing(db)
    assert all(after.values())
    assert before.keys() - after.keys() <= {f"policy {table}_service_role" for table in CORE_TABLES}
    assert after.keys() <= before.keys()


def unusual(db: Db, what: str) -> list[str]:
    """Return what status tells under this word."""
    return [one["says"] for one in asked(db, "status")["surroundings"]["unusual"] if one["what"] == what]


def unwritable(db: Db) -> list[str]:
    """Return the roles that may insert into turns, but not into turn_metrics."""
    return [says.partition(" ")[0] for says in unusual(db, "roles")]


def test_status_names_roles_that_may_write_turns_but_not_turn_metrics(ready: Db) -> None:
    role = f"app_{ready.name}"
    ready.execute(f"CREATE ROLE {role} LOGIN; GRANT SELECT, INSERT ON turns TO {role}")
    try:
        assert unwritable(ready) == [role]
        [remedy] = re.findall(r"GRANT .*;", ready.invoke("status").out)
        ready.execute(remedy)
        assert unwritable(ready) == []
    finally:
        ready.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_status_names_rights_on_columns_and_those_of_all(ready: Db) -> None:
    role = f"app_{ready.name}"
    ready.execute(f"CREATE ROLE {role}; GRANT INSERT (game_id, idx, role, content) ON turns TO {role}")
    try:
        assert unwritable(ready) == [role]
        ready.execute("GRANT INSERT ON turns TO PUBLIC")
        assert unwritable(ready) == ["PUBLIC", role]
        ready.execute("GRANT INSERT ON turn_metrics TO PUBLIC")
        assert unwritable(ready) == []
    finally:
        ready.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_status_passes_over_a_history_of_others(ready: Db) -> None:
    ready.execute("DROP TABLE budget_engine.history; CREATE TABLE budget_engine.history (id int, note text)")
    done = ready.invoke("status")
    assert done.code == 0, done
    assert "history  none" in done.out


def test_settings_that_change_how_definitions_are_printed_change_nothing(ready: Db) -> None:
    ready.execute(f"ALTER DATABASE {ready.name} SET quote_all_identifiers = on")
    assert ready.invoke("verify").code == 0


def test_status_names_copies_elsewhere_and_invalid_indexes(ready: Db) -> None:
    ready.execute(
        "CREATE SCHEMA backup; CREATE TABLE backup.turns (LIKE public.turns); CREATE VIEW backup.games AS SELECT 1"
    )
    ready.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_games_owner'::regclass")
    assert [says.partition(" ")[0] for says in unusual(ready, "namesake")] == ["backup.games", "backup.turns"]
    assert ["idx_games_owner" in says for says in unusual(ready, "invalid")] == [True]


def test_status_names_a_few_of_many_copies_and_counts_the_rest(ready: Db) -> None:
    copies = "".join(
        f"CREATE SCHEMA t{n:02}; CREATE TABLE t{n:02}.turns (); CREATE TABLE t{n:02}.games ();" for n in range(50)
    )
    ready.execute(copies)
    *named, rest = unusual(ready, "namesake")
    names = ["t00.games", "t00.turns", "t01.games", "t01.turns", "t02.games"]
    assert [says.partition(" ")[0] for says in named] == names
    assert "95 more" in rest


def test_status_has_the_history_of_its_own_schema(ready: Db) -> None:
    """What another schema was given, and by which file, is its own affair."""
    ready.execute("CREATE SCHEMA app")
    app = {"DATABASE_URL": f"{ready.url}&schema=app"}
    around = document(ready.invoke("status", "--format", "json", env=app))["surroundings"]
    assert (around["history"], around["changed"]) == ([], [])
    ready.execute("INSERT INTO budget_engine.history (step, part, schema_name, duration, checksum, version) "
                  "VALUES ('slots_flags', 'transaction', 'app', '1 s', 'of another file', '0.0.9')")  # fmt: skip
    here, there = asked(ready, "status"), document(ready.invoke("status", "--format", "json", env=app))
    assert (len(here["surroundings"]["history"]), here["surroundings"]["changed"]) == (5, [])
    assert [entry["version"] for entry in there["surroundings"]["history"]] == ["0.0.9"]
    assert there["surroundings"]["changed"] == ["slots_flags"]
    behind = {"DATABASE_URL": f"{ready.url}&search_path=empty,public"}
    ready.execute("CREATE SCHEMA empty")
    assert len(document(ready.invoke("status", "--format", "json", env=behind))["surroundings"]["history"]) == 5


def test_each_answer_says_which_tables_it_is_about(ready: Db) -> None:
    """Where they stand, which is not always where new ones would go."""
    ready.execute("CREATE SCHEMA app; CREATE SCHEMA empty")
    there = f"database {ready.name} on {ready.cluster.sockets}, schema"
    paths = {"public": "public", "app": "app", "empty,public": "public"}
    for task, words in (("setup", ""), ("verify", ""), ("status", "checks pass; "), ("plan", "nothing")):
        for path, meant in paths.items():
            done = ready.invoke(task, env={"DATABASE_URL": f"{ready.url}&search_path={path}"})
            [*_, last] = [line for line in done.out.splitlines() if words in line and " on " in line]
            assert done.code == 0, done
            assert last.endswith(f"; {there} {meant}"), done
            assert f", schema {meant} (" in done.out.splitlines()[0]
            assert ("this is about schema public; empty, where new tables go" in done.out) == ("," in path), done
    seen = document(
        ready.invoke("verify", "--format", "json", env={"DATABASE_URL": f"{ready.url}&search_path=empty,public"})
    )
    assert (seen["server"]["schema"], seen["server"]["homes"]) == ("empty", ["public"])


def test_status_names_files_that_are_not_those_that_were_applied(ready: Db) -> None:
    ready.execute("INSERT INTO budget_engine.history (step, part, schema_name, duration, checksum, version) "
                  "VALUES ('slots_flags', 'transaction', 'public', '1 s', 'of another file', '0.0.9')")  # fmt: skip
    around = asked(ready, "status")["surroundings"]
    assert around["changed"] == ["slots_flags"]
    assert around["history"][0]["version"] == "0.0.9"
    ready.execute("DROP SCHEMA budget_engine CASCADE")
    around = asked(ready, "status")["surroundings"]
    assert (around["changed"], around["history"]) == ([], [])


# ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# As tables of locks conflict, the weakest first.
MODES = [
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
]
HELD = """
SELECT c.oid::regclass::text, l.mode FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
WHERE l.pid = pg_backend_pid() AND c.oid = ANY (%s) AND l.mode = ANY (%s)"""
USERS_TABLES = """SELECT array_agg(c.oid) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
WHERE relkind = 'r' AND nspname <> 'information_schema' AND nspname !~ '^pg_'"""
SUPABASE = "-- on Supabase\n"
PARTS = ("transaction", "concurrent")
LOCKED = READY | UUID_READY | {
    "comment missing": by_hand() + "ALTER TABLE prompt_snapshots ADD budget_report jsonb",
    "Supabase": SUPABASE,
    "Supabase, core only": SUPABASE + CORE,
    "Supabase, by hand": SUPABASE + by_hand(),
}  # fmt: skip


def strongest(locks: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the strongest mode on each table."""
    found: dict[str, str] = {}
    for table, mode in sorted(locks, key=lambda lock: MODES.index(lock[1])):
        found[table] = mode
    return found


def in_state(db: Db, state: str) -> None:
    if state.startswith(SUPABASE):
        supabase.install(db)
        supabase.add_profiles(db)
    db.execute(state)


def mode(lock: str) -> str:
    """Name a lock as pg_locks does."""
    return lock.title().replace(" ", "") + "Lock"


@pytest.mark.parametrize("state", LOCKED.values(), ids=LOCKED)
def test_plan_foretells_the_locks_of_the_transactions_and_what_setup_runs(db: Db, state: str) -> None:
    """Locks: those of its statements, run as they are said, and those that setup's message takes before them."""
    in_state(db, state)
    seen = asked(db, "plan")
    actions = [action for action in seen["actions"] if action["part"] == "transaction"]
    foretold = [(table, mode(lock)) for action in actions for table, lock in action["locks"].items()]
    with db.connect(autocommit=False) as connection:
        [[tables]] = connection.execute(USERS_TABLES).fetchall()
        for action in actions:
            for sql in action["sql"]:
                connection.execute(sql.encode())
        held = connection.execute(HELD, [tables, MODES]).fetchall()
        connection.rollback()
    assert strongest(foretold) == strongest(held)
    done = db.invoke("plan", "--sql")
    taken = re.findall(r"LOCK TABLE (?:public\.)?(\S+) IN ([A-Z ]+) MODE", done.out)
    assert strongest((table, mode(lock)) for table, lock in taken) == strongest(foretold)
    due = {(step["step"], part) for step in seen["steps"] for part, is_due in zip(PARTS, (
        step["transaction_due"], step["concurrent_part_due"]), strict=True) if is_due}  # fmt: skip
    assert due == {(action["step"], action["part"]) for action in seen["actions"]}
    done = db.invoke("setup")
    assert done.code == 0, done
    assert set(db.rows("SELECT step, part FROM budget_engine.history")) == due


def test_plan_is_what_setup_says_it_did(db: Db) -> None:
    """Each statement that runs concurrently is one line, and what the transactions created was announced."""
    db.execute(with_uuid())
    actions = asked(db, "plan")["actions"]
    done = db.invoke("setup")
    announced = [action["creates"] for action in actions if action["part"] == "concurrent"]
    built = re.findall(r"^  (\w+) +\+ (\w+), concurrently", done.out, re.M)
    assert sorted(f"index {name}" for _, name in built) == sorted(title for [title] in announced)
    columns = {
        title
        for action in actions
        if action["effect"] == "catalog"
        for title in action["creates"]
        if re.fullmatch(r"[a-z_]+\.[a-z_]+", title)
    }
    assert columns == set(
        re.findall(r"\b[a-z_]+\.[a-z_]+\b", "\n".join(re.findall(r"^  \w+ +[+~] .*ms$", done.out, re.M)))
    )


@contextmanager
def holding(db: Db, statement: str) -> Iterator[int]:
    """Hold a lock in a session of another application; yield its process id."""
    with db.connect(autocommit=False) as connection:
        connection.execute("SET application_name = 'web'")
        connection.execute(statement.encode())
        yield connection.info.backend_pid


def test_plan_names_who_holds_and_who_waits_for_a_conflicting_lock(db: Db) -> None:
    db.execute(by_hand())
    with holding(db, "UPDATE slots SET description = 'tell nobody' WHERE name = 'tone'") as holder:
        waiter = in_psql(db, "BEGIN; LOCK TABLE slots IN SHARE ROW EXCLUSIVE MODE; COMMIT")
        until(lambda: db.value("SELECT count(*) FROM pg_locks WHERE NOT granted") == 1, waiter)
        waiting = asked(db, "plan")["waiting_for"]
    assert ended(waiter).code == 0
    on_slots = [
        (one["mode"], one["granted"], f"pid {holder} " in one["session"]) for one in waiting if one["table"] == "slots"
    ]
    assert ("RowExclusiveLock", True, True) in on_slots
    assert ("ShareRowExclusiveLock", False, False) in on_slots
    assert "tell nobody" not in str(waiting), "a value of somebody else's statement"


@pytest.mark.parametrize("task", ["verify", "status", "plan"])
def test_look_waits_moments_behind_who_locks_readers_out_and_names_him(db: Db, task: str) -> None:
    """Its own wait is nothing that others would have to queue behind."""
    db.execute(by_hand())
    with holding(db, "LOCK TABLE slots IN ACCESS EXCLUSIVE MODE") as holder:
        done = db.invoke(task, "--format", "json", env={"LOCK_WAIT": "1s"})
    error = document(done)["error"]
    assert done.code == 7
    assert f"pid {holder} " in "".join(error["where"])


def in_psql(db: Db, sql: str) -> subprocess.Popen[str]:
    """Start psql on this database."""
    program = str(db.cluster.binaries / "psql")
    return subprocess.Popen([program, db.url, "-Xc", sql], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_plan_names_an_old_snapshot_that_a_build_would_wait_for(db: Db) -> None:
    db.execute(by_hand())
    with db.connect(autocommit=False) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT 1")
        time.sleep(1.1)
        sessions = [one["session"] for one in asked(db, "plan")["waiting_for"] if one["table"] is None]
        assert [f"pid {connection.info.backend_pid} " in session for session in sessions] == [True]


def test_plan_says_where_uuid_values_will_be_and_how_many(db: Db) -> None:
    db.execute(with_uuid() + "ALTER TABLE prompt_snapshots ADD turn_id_uuid text")
    count = db.value("SELECT count(turn_id) FROM prompt_snapshots")
    [kept] = asked(db, "plan")["kept"]
    assert re.findall(r"\w+\.turn_id|turn_id_\w+|\b\d+\b", kept) == [
        str(count),
        "prompt_snapshots.turn_id",
        "turn_id_uuid_2",
    ]
    assert db.invoke("setup").code == 0
    assert db.value("SELECT count(turn_id_uuid_2) FROM prompt_snapshots") == count
    assert asked(db, "plan")["kept"] == []


def test_plan_knows_which_prepared_statements_fail_once(db: Db) -> None:
    db.execute(with_uuid())
    foretold = asked(db, "plan")["prepared_statements_fail_once"]
    tables = ["turns", "slots", "templates", "prompt_snapshots", "games"]
    failed = []
    with db.connect() as connection:
        for table in tables:
            connection.execute(f"PREPARE of_{table} AS SELECT * FROM {table}".encode())
            connection.execute(f"EXECUTE of_{table}".encode())
        assert db.invoke("setup").code == 0
        for table in tables:
            try:
                connection.execute(f"EXECUTE of_{table}".encode())
            except psycopg.errors.FeatureNotSupported:
                failed.append(table)
    assert sorted(failed) == sorted(foretold)


@pytest.mark.parametrize(
    ("state", "code"), [("", 0), (with_uuid(), 0), (by_hand() + "ALTER TABLE slots ADD must_keep text", 6)]
)
def test_plan_changes_nothing_and_ends_as_setup_would(db: Db, state: str, code: int) -> None:
    db.execute(state)
    before = db.dump(data=True)
    seen = asked(db, "plan")
    assert seen["exit_code"] == code
    assert db.dump(data=True) == before
    assert db.rows("SELECT 1 FROM pg_class WHERE relname = 'history'") == []
    assert db.invoke("setup").code == code


def test_plan_as_sql_is_what_setup_does(db: Db, tmp_path: Any) -> None:
    db.execute(with_uuid())
    done = db.invoke("plan", "--sql")
    assert done.code == 0, done
    assert "target " in done.err
    file = tmp_path / "plan.sql"
    file.write_text(done.out)
    assert db.psql("-f", str(file)).code == 0
    assert db.differing() == {}
    assert db.invoke("plan", "--sql").out == "-- nothing to do\n"


# A state, what is added to the URL, the exit code of plan.
BLOCKED = {
    "in the way": (by_hand() + "ALTER TABLE slots ADD must_keep text", "", 6),
    "no rights": (by_hand(), "&user=reader", 8),
    "read-only": ("", "&options=-c%20default_transaction_read_only%3Don", 8),
    "no schema": ("", "&schema=nowhere", 1),
}


@pytest.mark.parametrize(("state", "query", "code"), BLOCKED.values(), ids=BLOCKED)
def test_plan_as_sql_ends_as_plan_does_and_prints_nothing_that_would_not_run(
    db: Db, state: str, query: str, code: int
) -> None:
    role = f"reader_{db.name}"
    db.execute(f"CREATE ROLE {role} LOGIN; " + state)
    try:
        there = {"DATABASE_URL": db.url + query.replace("reader", role)}
        done, plan = db.invoke("plan", "--sql", env=there), db.invoke("plan", env=there)
        assert (done.code, done.out, plan.code) == (code, "", code), done
        assert plan.err in done.err, done
    finally:
        db.execute(f"DROP ROLE {role}")


def test_plan_as_sql_does_what_the_rows_allow(db: Db) -> None:
    db.execute(by_hand("bigint", ORPHANS))
    assert db.invoke("setup").code == 5
    db.execute("ALTER TABLE prompt_snapshots DROP COLUMN budget_report")
    done = db.invoke("plan", "--sql")
    assert (done.code, "point to nothing" in done.err) == (5, True), done
    assert "ALTER TABLE prompt_snapshots ADD COLUMN IF NOT EXISTS budget_report" in done.out


def test_plan_as_sql_stays_in_the_schema_of_the_url(db: Db, tmp_path: Any) -> None:
    db.execute(f"{by_hand()}; CREATE SCHEMA app; SET search_path = app; {by_hand()}")
    before = db.differing()
    there = {"DATABASE_URL": f"{db.url}&schema=app"}
    file = tmp_path / "plan.sql"
    file.write_text(db.invoke("plan", "--sql", env=there).out)
    assert db.psql("-f", str(file)).code == 0
    assert db.invoke("verify", env=there).code == 0
    assert db.differing() == before


def test_plan_as_sql_is_as_patient_as_setup(db: Db) -> None:
    patience = "SELECT pg_catalog.set_config('lock_timeout', '3000ms', true)"
    assert patience in db.invoke("plan", "--sql", env={"LOCK_TIMEOUT": "3s"}).out


def test_plan_without_rights_says_so(db: Db) -> None:
    db.execute(by_hand())
    role = f"reader_{db.name}"
    db.execute(f"CREATE ROLE {role} LOGIN")
    try:
        assert asked(db, "plan", role=role)["exit_code"] == 8
    finally:
        db.execute(f"DROP ROLE {role}")


# ── rehearse ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", [READY["empty"], READY["core only"], READY["flags by hand"], UUID_READY["with rows"]])
def test_rehearsal_leaves_no_trace(db: Db, state: str) -> None:
    db.execute(state)
    before = db.dump(data=True)
    done = db.invoke("rehearse")
    assert done.code == 0, done
    assert re.search(r"rolled back after \d+ ms: \d+ of \d+ checks pass", done.out)
    assert db.dump(data=True) == before
    assert db.rows("SELECT 1 FROM pg_class WHERE relname = 'history'") == []
    assert db.invoke("setup").code == 0


@pytest.mark.parametrize(
    ("refusal", "failed"),
    [
        (
            "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF to_regclass('turn_metrics') IS NOT NULL THEN RAISE EXCEPTION 'no'; END IF; END $$;"
            "CREATE EVENT TRIGGER refuse ON ddl_command_end EXECUTE FUNCTION refuse()",
            "turn_metrics failed in its migration",
        ),
        (
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';"
            "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON slots DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION refuse()",
            "slots_flags failed in its deferred triggers",
        ),
    ],
    ids=["at once", "at the commit"],
)
def test_rehearsal_finds_what_only_the_server_can_refuse(db: Db, refusal: str, failed: str) -> None:
    db.execute(by_hand() + refusal)
    before = db.dump(data=True)
    assert db.invoke("plan").code == 0
    rehearsed = db.invoke("rehearse")
    assert (rehearsed.code, failed in rehearsed.err) == (1, True), rehearsed
    assert db.dump(data=True) == before
    assert db.invoke("setup").code == 1


@pytest.mark.parametrize(("state", "code"), [(by_hand() + "ALTER TABLE slots ADD must_keep text", 6), (None, 0)])
def test_rehearsal_of_what_cannot_be_and_of_what_is_done(db: Db, state: str | None, code: int) -> None:
    if state is None:
        assert db.invoke("setup").code == 0
    else:
        db.execute(state)
    assert db.invoke("rehearse").code == code


@pytest.mark.slow
def test_rehearsal_never_waits_while_it_holds_up_others(db: Db) -> None:
    """It has slots when prompt_snapshots is not to be had: a reader of slots waits a moment, not LOCK_TIMEOUT."""
    db.execute(by_hand())
    with holding(db, "LOCK TABLE prompt_snapshots IN ROW EXCLUSIVE MODE") as holder, db.connect() as reader:
        rehearsal = db.start("rehearse", LOCK_TIMEOUT="5s", LOCK_WAIT="6s")
        waits = []
        while rehearsal.poll() is None:
            began = time.monotonic()
            reader.execute("SELECT count(*) FROM slots")
            waits.append(time.monotonic() - began)
            time.sleep(0.005)
    done = ended(rehearsal)
    assert (done.code, f"pid {holder} " in done.out + done.err) == (7, True), done
    assert max(waits) < 2, "five seconds would be LOCK_TIMEOUT"
    assert db.invoke("rehearse").code == 0


# ── formats ────────────────────────────────────────────────────────────────────────────────────────────────────────


NOBODY_THERE = {"DATABASE_URL": "postgresql://u:tell-nobody@127.0.0.1:1/db"}


@pytest.mark.parametrize("task", ["verify", "status", "plan"])
def test_failure_is_a_document_too(db: Db, task: str) -> None:
    done = db.invoke(task, "--format", "json", env=NOBODY_THERE)
    assert (document(done)["exit_code"], done.code) == (4, 4)
    assert "tell-nobody" not in done.out + done.err
    assert re.search("^error ", done.err, re.M)


def test_password_may_be_a_word_of_json(db: Db) -> None:
    url = db.url.replace("postgres@", "postgres:null@")
    done = db.invoke("verify", "--format", "json", env={"DATABASE_URL": url})
    assert document(done)["exit_code"] == 5
    assert '"actual": null' in done.out


def test_failure_is_an_annotation_too(db: Db) -> None:
    done = db.invoke("verify", "--format", "github", env=NOBODY_THERE)
    assert re.fullmatch("::error title=verify::error .+%0A .+\n", done.out), done


def test_sql_has_no_other_format(db: Db) -> None:
    done = db.invoke("plan", "--sql", "--format", "json")
    assert (done.code, done.out) == (1, "")


def test_schema_is_one_and_rejects_another_version() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    document = {"version": 1, "task": "verify", "recipes": "0", "exit_code": 0, "error": None}
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(document)
    VALIDATOR.validate(document | {"version": 2})


def test_verify_as_json_names_every_check(db: Db) -> None:
    """By kind, table and name, as db/verify.sql does."""
    db.execute(by_hand())
    seen = asked(db, "verify")
    checks = [check for step in seen["steps"] for check in step["checks"]]
    named = [(step["step"], check["kind"], check["table"], check["name"], check["expected"], check["actual"])
             for step in seen["steps"] for check in step["checks"]]  # fmt: skip
    expected = [(c.step, c.kind.value, c.table, c.name, c.expected, c.actual) for c in db.checks()]
    assert sorted(map(str, named)) == sorted(map(str, expected))
    assert seen["exit_code"] == 5
    counted = [check for check in checks if check["required"] or check["passed"] or check["fixed_by"]]
    assert seen["checks"] == {"total": len(counted), "passed": sum(check["passed"] for check in counted)}


def test_verify_for_github_annotates_and_writes_a_summary(db: Db, tmp_path: Path) -> None:
    db.execute(by_hand() + "ALTER TABLE slots ADD must_keep text")
    summary = tmp_path / "summary.md"
    done = db.invoke("verify", "--format", "github", env={"GITHUB_STEP_SUMMARY": str(summary)})
    assert re.search(r"^      slots_flags +conflict$", summary.read_text(), re.M)
    assert done.code == 6
    annotations = re.findall(r"^::error file=(db/migrations/\S+?\.sql),title=(\w+)::(.+)$", done.out, re.M)
    assert ("db/migrations/20250220_slots_flags.sql", "slots_flags") in [note[:2] for note in annotations]
    assert len(annotations) == len(done.out.splitlines())
    assert all((chain.ROOT / file).exists() for file, _, _ in annotations)


@pytest.mark.parametrize(
    ("words", "code"),
    [(("status", "--format", "github"), 1), (("verify", "--format", "junit"), 1), (("plan", "--format="), 1)],
)
def test_unknown_format_is_refused(db: Db, words: tuple[str, ...], code: int) -> None:
    done = db.invoke(*words)
    assert (done.code, done.out) == (code, "")
    assert "json" in done.err


def test_quiet_says_nothing_but_errors(ready: Db) -> None:
    for task in ("verify", "status", "plan"):
        done = ready.invoke(task, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")
    ready.execute("DROP INDEX idx_slots_type")
    done = ready.invoke("verify", "--quiet")
    assert (done.code, done.out) == (5, "")
    assert done.err.startswith("error ")


def test_verbose_names_what_passes(ready: Db) -> None:
    said = ready.invoke("verify", "--verbose").out
    assert all(check.title in said for check in ready.checks())
    assert "idx_slots_type" not in ready.invoke("verify").out


# ── terminals ──────────────────────────────────────────────────────────────────────────────────────────────────────


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [50, 80, 200])
@pytest.mark.parametrize("task", ["verify", "status", "plan", "rehearse", "doctor"])
def test_lines_fit_the_terminal(db: Db, task: str, columns: int) -> None:
    """They break between words, below their own text; what is longer than a line, and a command, stays whole."""
    db.execute(with_uuid())
    seen, plain = bare(on_terminal(db, task, columns=columns).out), db.invoke(task).out
    long = [line for line in seen.splitlines() if len(line) > columns]
    assert [line for line in long if len(line.split()) > 3 and not line.endswith(";")] == []
    if task != "rehearse":  # which says how long it took
        seen_words, plain_words = (re.sub(r"\b\d+ rows", "some rows", said).split() for said in (seen, plain))
        assert seen_words == plain_words  # how many rows: 14 learns it a moment later
    assert all(line.startswith(" ") for line in seen.splitlines() if line and not re.match(r"\S+( |$)", line))


@pytest.mark.parametrize("task", ["verify", "status", "plan"])
def test_what_is_said_of_things_is_aligned(db: Db, task: str) -> None:
    db.execute(by_hand())
    said = db.invoke(task).out
    starts = {
        found.end() for line in said.splitlines() if (found := re.match(r" +[+~!] \S+ +(?=btree|new table)", line))
    }
    assert len(starts) == 1, said


def test_colour_only_where_it_is_wanted(db: Db) -> None:
    db.execute(by_hand())
    assert "\x1b[3" in on_terminal(db, "status").out
    assert "\x1b[3" not in on_terminal(db, "status", env={"NO_COLOR": "1"}).out
    assert "\x1b" not in on_terminal(db, "status", env={"TERM": "dumb"}).out
    assert "\x1b" not in db.invoke("status").out
    assert "\x1b" not in on_terminal(db, "status", "--format", "json").out


@pytest.fixture
def ready(db: Db) -> Db:
    """A database that was set up."""
    done = db.invoke("setup")
    assert done.code == 0, done
    return db
