"""verify, status, plan and rehearse: they say what is so, in every format, and change nothing."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import jsonschema
import psycopg
import pytest
import supabase
from budget_engine import __version__
from budget_engine.migration import chain
from budget_engine.output import formats
from conftest import Db, Run, ended, holding, role_with, until
from states import BIGINT, CORE, EXTRAS, ORPHANS, by_hand, contents, snapshots, with_uuid
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

WRONG = by_hand() + "ALTER TABLE slots ADD must_keep text"
# A state, how some of its steps stand, what status --check ends with, what plan and rehearse end with, as setup would.
STATES = {
    "empty": ("", {"core_schema": "pending", "fix_prompt_snapshots_turn_id": "not needed"}, 5, 0),
    "bigint": (by_hand() + "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false",
               {"fix_prompt_snapshots_turn_id": "done", "slots_flags": "partial", "budget_report": "pending"}, 5, 0),
    "uuid": (UUID_READY["with rows"], {"fix_prompt_snapshots_turn_id": "pending"}, 5, 0),
    "wrong": (WRONG, {"slots_flags": "conflict"}, 6, 6),
    "one of two tables": (CORE + "CREATE TABLE slots (id int)", {"slots_templates": "conflict"}, 6, 6),
    "core without an index": (CORE + snapshots(BIGINT), {"core_schema": "partial"}, 5, 0),
}  # fmt: skip


@pytest.mark.parametrize(("state", "expected", "misses", "would_end"), STATES.values(), ids=STATES)
def test_what_looks_says_how_each_step_stands_and_changes_nothing(
    db: Db, state: str, expected: dict[str, str], misses: int, would_end: int
) -> None:
    db.execute(state)
    before, rows = db.fingerprint(), contents(db)
    seen = asked(db, "status")
    states = {step["step"]: step["state"] for step in seen["steps"]}
    assert ({step: states[step] for step in expected}, seen["exit_code"]) == (expected, 0)
    assert db.invoke("status", "--check").code == misses
    assert asked(db, "plan")["exit_code"] == would_end
    done = db.invoke("rehearse")
    assert done.code == would_end, done
    assert bool(re.search(r"rolled back after \d+ ms: \d+ of \d+ checks pass", done.out)) == (would_end == 0)
    assert (db.fingerprint(), contents(db)) == (before, rows)


def test_what_is_done(finished: Db) -> None:
    assert [finished.invoke(*words).code for words in (("status", "--check"), ("rehearse",))] == [0, 0]
    seen = asked(finished, "status")
    assert {step["state"] for step in seen["steps"]} == {"done"}
    assert seen["server"]["row_security"] == "plain PostgreSQL"
    around = seen["surroundings"]
    assert (around["unusual"], around["changed"]) == ([], [])
    assert len(around["history"]) == 5
    assert around["history"][0]["step"] == "turn_metrics"


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
    return {check.title: check.passed for check in db.checks()}


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


def test_status_names_roles_that_may_write_turns_but_not_turn_metrics(finished: Db) -> None:
    def unwritable() -> list[str]:
        return [says.partition(" ")[0] for says in unusual(finished, "roles")]

    role = f"app_{finished.name}"
    finished.execute(f"CREATE ROLE {role} LOGIN; GRANT SELECT, INSERT ON turns TO {role}")
    try:
        assert unwritable() == [role]
        [remedy] = re.findall(r"GRANT .*;", finished.invoke("status").out)
        finished.execute(remedy)
        assert unwritable() == []
        finished.execute(f"REVOKE ALL ON turn_metrics, turns FROM {role}")
        finished.execute(f"GRANT INSERT (game_id, idx, role, content) ON turns TO {role}")
        assert unwritable() == [role]
        finished.execute("GRANT INSERT ON turns TO PUBLIC")
        assert unwritable() == ["PUBLIC", role]
        finished.execute("GRANT INSERT ON turn_metrics TO PUBLIC")
        assert unwritable() == []
    finally:
        finished.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_history_of_others_and_how_definitions_are_printed_change_nothing(finished: Db) -> None:
    finished.execute("DROP TABLE budget_engine.history; CREATE TABLE budget_engine.history (id int, note text)")
    finished.execute(f"ALTER DATABASE {finished.name} SET quote_all_identifiers = on")
    done = finished.invoke("status", "--check")
    assert (done.code, "history  none" in done.out) == (0, True), done


def test_status_names_copies_elsewhere_and_invalid_indexes(finished: Db) -> None:
    """A few of many copies; the rest is counted."""
    finished.execute(
        "CREATE SCHEMA backup; CREATE TABLE backup.turns (LIKE public.turns); CREATE VIEW backup.games AS SELECT 1"
    )
    finished.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_games_owner'::regclass")
    assert [says.partition(" ")[0] for says in unusual(finished, "namesake")] == ["backup.games", "backup.turns"]
    assert ["idx_games_owner" in says for says in unusual(finished, "invalid")] == [True]
    copies = (f"CREATE SCHEMA a{n:02} CREATE TABLE turns () CREATE TABLE games ();" for n in range(50))
    finished.execute("".join(copies))
    *named, rest = unusual(finished, "namesake")
    assert [says.partition(" ")[0] for says in named] == [
        "a00.games",
        "a00.turns",
        "a01.games",
        "a01.turns",
        "a02.games",
    ]
    assert "97 more" in rest


def test_status_has_the_history_of_its_own_schema_and_names_files_that_are_others_now(finished: Db) -> None:
    """What another schema was given, and by which file, is its own affair."""
    finished.execute("CREATE SCHEMA app; CREATE SCHEMA empty")

    def seen(query: str) -> tuple[list[str], list[str]]:
        env = {"DATABASE_URL": f"{finished.url}&{query}"}
        around = document(finished.invoke("status", "--format", "json", env=env))["surroundings"]
        return [entry["version"] for entry in around["history"]], around["changed"]

    ours = [__version__] * 5
    assert (seen("schema=app"), seen("search_path=empty,public")) == (([], []), (ours, []))
    other = """INSERT INTO budget_engine.history (step, part, schema_name, duration, checksum, version)
               VALUES ('slots_flags', 'transaction', '{}', '1 s', 'of another file', '0.0.9')"""
    finished.execute(other.format("app"))
    assert (seen("schema=app"), seen("schema=public")) == ((["0.0.9"], ["slots_flags"]), (ours, []))
    finished.execute(other.format("public"))
    assert seen("schema=public") == (["0.0.9", *ours[1:]], ["slots_flags"])  # of the last five lines
    finished.execute("DROP SCHEMA budget_engine CASCADE")
    assert seen("schema=public") == ([], [])


def test_each_answer_says_which_tables_it_is_about(finished: Db) -> None:
    """Where they stand, which is not always where new ones would go."""
    finished.execute("CREATE SCHEMA app; CREATE SCHEMA empty")
    there = f"database {finished.name} on {finished.cluster.sockets}, schema"
    words = {"setup": "", "verify": "", "status": "checks pass; ", "plan": "nothing"}
    asked_for = [("setup", "public", "public"), *((task, "empty,public", "public") for task in words)]
    for task, path, meant in [*asked_for, *((task, "app", "app") for task in words)]:
        done = finished.invoke(task, env={"DATABASE_URL": f"{finished.url}&search_path={path}"})
        [*_, last] = [line for line in done.out.splitlines() if words[task] in line and " on " in line]
        assert done.code == 0, done
        assert last.endswith(f"; {there} {meant}"), done
        assert f", schema {meant} (" in done.out.splitlines()[0]
        assert ("this is about schema public; empty, where new tables go" in done.out) == ("," in path), done
    seen = document(
        finished.invoke("verify", "--format", "json", env={"DATABASE_URL": f"{finished.url}&search_path=empty,public"})
    )
    assert (seen["server"]["schema"], seen["server"]["homes"]) == ("empty", ["public"])


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
# Among all states of test_states each statement of the chain that takes locks of its own, each of a step's parts that
# can be due, and each set of tables that a transaction locks is in one of these.
LOCKED = {name: READY[name] for name in (
    "empty", "core only", "core without games and turns", "slots only", "no prompt_snapshots yet",
    "parent_id without foreign key", "turn_id without foreign key", "turn_id without index",
    "turn_metrics without foreign key", "turn_metrics by hand", "flags by hand", "budget_report by hand",
)} | {
    "without defaults": f"{READY['must_keep without default']};"
                        + READY["turn_metrics without defaults"].removeprefix(by_hand()),
    "before slots_templates": UUID_READY["before slots_templates"],
    "NOT NULL, default, comment, extras": UUID_READY["NOT NULL with default"] + EXTRAS
                                          + UUID_READY["with comment"].removeprefix(with_uuid()),
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
    """What it creates, and how; where the uuid values will be; which prepared statements fail once."""
    db.execute(with_uuid() + "ALTER TABLE prompt_snapshots ADD turn_id_uuid text")
    count = db.value("SELECT count(turn_id) FROM prompt_snapshots")
    plan, tables, failed = asked(db, "plan"), ["turns", "slots", "templates", "prompt_snapshots", "games"], []
    with db.connect() as connection:
        for table in tables:
            connection.execute(f"PREPARE of_{table} AS SELECT * FROM {table}".encode())
            connection.execute(f"EXECUTE of_{table}".encode())
        done = db.invoke("setup")
        for table in tables:
            try:
                connection.execute(f"EXECUTE of_{table}".encode())
            except psycopg.errors.FeatureNotSupported:
                failed.append(table)
    assert sorted(failed) == sorted(plan["prepared_statements_fail_once"])
    [kept] = plan["kept"]
    names = [str(count), "prompt_snapshots.turn_id", "turn_id_uuid_2"]
    assert re.findall(r"\w+\.turn_id|turn_id_\w+|\b\d+\b", kept) == names
    assert db.value("SELECT count(turn_id_uuid_2) FROM prompt_snapshots") == count
    assert asked(db, "plan")["kept"] == []
    concurrent = [title for action in plan["actions"] if action["part"] == "concurrent" for title in action["creates"]]
    built = re.findall(r"^  (\w+) +\+ (\w+), concurrently", done.out, re.M)
    assert sorted(f"index {name}" for _, name in built) == sorted(concurrent)
    created = [title for action in plan["actions"] if action["effect"] == "catalog" for title in action["creates"]]
    said = "\n".join(re.findall(r"^  \w+ +[+~] .*ms$", done.out, re.M))
    columns = {title for title in created if re.fullmatch(r"[a-z_]+\.[a-z_]+", title)}
    assert columns == set(re.findall(r"\b[a-z_]+\.[a-z_]+\b", said))


def test_plan_names_who_holds_and_who_waits_for_a_conflicting_lock(db: Db) -> None:
    db.execute(by_hand())
    with holding(db, "UPDATE slots SET description = 'tell nobody' WHERE name = 'tone'") as holder:
        pid = holder.info.backend_pid
        program = str(db.cluster.binaries / "psql")
        sql = "BEGIN; LOCK TABLE slots IN SHARE ROW EXCLUSIVE MODE; COMMIT"
        waiter = subprocess.Popen([program, db.url, "-Xc", sql], stdout=PIPE, stderr=PIPE, text=True)
        until(lambda: db.value("SELECT count(*) FROM pg_locks WHERE NOT granted") == 1, waiter)
        waiting = asked(db, "plan")["waiting_for"]
    assert ended(waiter).code == 0
    on_slots = [
        (one["mode"], one["granted"], f"pid {pid} " in one["session"]) for one in waiting if one["table"] == "slots"
    ]
    assert ("RowExclusiveLock", True, True) in on_slots
    assert ("ShareRowExclusiveLock", False, False) in on_slots
    assert "tell nobody" not in str(waiting), "a value of somebody else's statement"


def test_look_waits_moments_behind_who_locks_readers_out_and_names_him(finished: Db) -> None:
    """Its own wait is nothing that others would have to queue behind."""
    with holding(finished, "LOCK TABLE slots IN ACCESS EXCLUSIVE MODE") as holder:
        pid = holder.info.backend_pid
        looks = [finished.start(task, "--format", "json", LOCK_WAIT="1s") for task in ("verify", "status", "plan")]
        errors = [document(ended(look))["error"] for look in looks]
    assert [look.returncode for look in looks] == [7, 7, 7]
    assert [f"pid {pid} " in "".join(error["where"]) for error in errors] == [True] * 3, errors


def test_plan_names_an_old_snapshot_that_a_build_would_wait_for(db: Db) -> None:
    db.execute(by_hand())
    with db.connect(autocommit=False) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT 1")
        time.sleep(1.1)
        sessions = [one["session"] for one in asked(db, "plan")["waiting_for"] if one["table"] is None]
        assert [f"pid {connection.info.backend_pid} " in session for session in sessions] == [True]


def test_plan_as_sql_is_what_setup_does(db: Db, tmp_path: Path) -> None:
    """As patiently."""
    db.execute(with_uuid())
    done = db.invoke("plan", "--sql", env={"LOCK_TIMEOUT": "3s"})
    assert done.code == 0, done
    assert "target " in done.err
    assert "SELECT pg_catalog.set_config('lock_timeout', '3000ms', true)" in done.out
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


def test_plan_as_sql_stays_in_the_schema_of_the_url(db: Db, tmp_path: Path) -> None:
    db.execute(f"{by_hand()}; CREATE SCHEMA app; SET search_path = app; {by_hand()}")
    before = db.differing()
    there = {"DATABASE_URL": f"{db.url}&schema=app"}
    file = tmp_path / "plan.sql"
    file.write_text(db.invoke("plan", "--sql", env=there).out)
    assert db.psql("-f", str(file)).code == 0
    assert db.invoke("verify", env=there).code == 0
    assert db.differing() == before


# ── rehearse ───────────────────────────────────────────────────────────────────────────────────────────────────────


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
    before, rows = db.fingerprint(), contents(db)
    assert db.invoke("plan").code == 0
    rehearsed = db.invoke("rehearse")
    assert (rehearsed.code, failed in rehearsed.err) == (1, True), rehearsed
    assert (db.fingerprint(), contents(db)) == (before, rows)
    assert db.invoke("setup").code == 1


def test_rehearsal_never_waits_while_it_holds_up_others(db: Db) -> None:
    """It has slots when prompt_snapshots is not to be had: a reader of slots waits a moment, not LOCK_TIMEOUT."""
    db.execute(by_hand())
    with holding(db, "LOCK TABLE prompt_snapshots IN ROW EXCLUSIVE MODE") as holder, db.connect() as reader:
        pid = holder.info.backend_pid
        rehearsal = db.start("rehearse", LOCK_TIMEOUT="5s", LOCK_WAIT="1500ms")
        waits = []
        while rehearsal.poll() is None:
            began = time.monotonic()
            reader.execute("SELECT count(*) FROM slots")
            waits.append(time.monotonic() - began)
            time.sleep(0.005)
    done = ended(rehearsal)
    assert (done.code, f"pid {pid} " in done.out + done.err) == (7, True), done
    assert max(waits) < 1, "1.5 s would be LOCK_WAIT, five LOCK_TIMEOUT"
    assert db.invoke("rehearse").code == 0


# ── formats ────────────────────────────────────────────────────────────────────────────────────────────────────────


NOBODY_THERE = {"DATABASE_URL": "postgresql://u:tell-nobody@127.0.0.1:1/db"}


def test_failure_is_a_document_or_an_annotation_too(db: Db) -> None:
    for task in ("verify", "status", "plan"):
        done = db.invoke(task, "--format", "json", env=NOBODY_THERE)
        assert (document(done)["exit_code"], done.code) == (4, 4)
        assert "tell-nobody" not in done.out + done.err
        assert re.search("^error ", done.err, re.M)
    done = db.invoke("verify", "--format", "github", env=NOBODY_THERE)
    assert re.fullmatch("::error title=verify::error .+%0A .+\n", done.out), done


def test_schema_is_one_and_rejects_another_version() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    document = {"version": 1, "task": "verify", "recipes": "0", "exit_code": 0, "error": None}
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(document)
    VALIDATOR.validate(document | {"version": 2})


def test_verify_as_json_names_every_check(db: Db) -> None:
    """By kind, table and name, as db/verify.sql does; the password may be a word of JSON."""
    db.execute(by_hand())
    url = db.url.replace("postgres@", "postgres:null@")
    done = db.invoke("verify", "--format", "json", env={"DATABASE_URL": url})
    assert '"actual": null' in done.out
    seen = document(done)
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


def test_unknown_format_is_refused(db: Db) -> None:
    """SQL has no other one."""
    for words in ("status --format github", "verify --format junit", "plan --format=", "plan --sql --format json"):
        done = db.invoke(*words.split())
        assert (done.code, done.out, "Choose one of these: table" in done.err) == (1, "", True), done


def test_quiet_says_nothing_but_errors_and_verbose_names_what_passes(finished: Db) -> None:
    for task in ("verify", "status", "plan"):
        done = finished.invoke(task, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")
    assert "idx_slots_type" not in finished.invoke("verify").out
    said = finished.invoke("verify", "--verbose").out
    assert all(check.title in said for check in finished.checks())
    finished.execute("DROP INDEX idx_slots_type")
    done = finished.invoke("verify", "--quiet")
    assert (done.code, done.out, done.err.startswith("error ")) == (5, "", True)


# ── terminals ──────────────────────────────────────────────────────────────────────────────────────────────────────


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r\n", "\n")


def test_lines_fit_the_terminal(db: Db) -> None:
    """They break between words, below their own text; what is longer than a line, and a command, stays whole."""
    db.execute(with_uuid())
    with role_with(db, {"idle_session_timeout": "2s"}) as role:  # of which doctor has a command
        command = f'ALTER ROLE "{role}" SET idle_session_timeout = 0;'
        for task in ("verify", "status", "plan", "rehearse", "doctor"):
            plain = db.invoke(task, role=role).out
            for columns in (50, 80, 200):
                seen = bare(on_terminal(db, task, columns=columns, url=db.url_as(role)).out)
                lines = seen.splitlines()
                long = [line for line in lines if len(line) > columns]
                assert [line for line in long if len(line.split()) > 3 and not line.endswith(";")] == [], task
                assert [said.count(command) for said in (seen, plain)] == [task == "doctor"] * 2
                if task != "rehearse":  # which says how long it took
                    # how many rows: 14 learns it a moment later
                    words, plainly = (re.sub(r"\b\d+ rows", "some rows", said).split() for said in (seen, plain))
                    assert words == plainly
                assert all(line.startswith(" ") for line in lines if line and not re.match(r"\S+( |$)", line)), task


def test_what_is_said_of_things_is_aligned(db: Db) -> None:
    db.execute(by_hand())
    for task in ("verify", "status", "plan"):
        said = db.invoke(task).out
        found = (re.match(r" +[+~!] \S+ +(?=btree|new table)", line) for line in said.splitlines())
        assert len({match.end() for match in found if match}) == 1, said


def test_colour_only_where_it_is_wanted(db: Db) -> None:
    db.execute(by_hand())
    assert "\x1b[3" in on_terminal(db, "status").out
    assert "\x1b[3" not in on_terminal(db, "status", env={"NO_COLOR": "1"}).out
    assert "\x1b" not in on_terminal(db, "status", env={"TERM": "dumb"}).out
    assert "\x1b" not in db.invoke("status").out
    assert "\x1b" not in on_terminal(db, "status", "--format", "json").out
