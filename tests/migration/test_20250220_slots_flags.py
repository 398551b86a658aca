"""20250220_slots_flags: defaults for critical slots when they come into being, and never over what somebody chose."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from conftest import Db
from states import CRITICAL, PLAIN, SLOT_ROWS, SLOTS_TEMPLATES, Flags, by_hand

STEM = "20250220_slots_flags"

UPSERT = """
INSERT INTO slots (type, name, description, must_keep, min_chars)
VALUES ('ruleset', 'principles', 'upserted', {must_keep}, {min_chars})
ON CONFLICT (type, name) DO UPDATE
SET description = EXCLUDED.description, must_keep = EXCLUDED.must_keep, min_chars = EXCLUDED.min_chars"""


def flags(db: Db) -> Flags:
    """Return (type, name) → (must_keep, min_chars) of every slot."""
    rows = db.rows("SELECT type, name, must_keep, min_chars FROM slots")
    return {(kind, name): (must_keep, min_chars) for kind, name, must_keep, min_chars in rows}


def insert(names: Flags, columns: str = "", values: str = "") -> str:
    """Write one INSERT of several slots, perhaps with more columns."""
    rows = ", ".join(f"('{kind}', '{name}', 'text'{values})" for kind, name in names)
    return f"INSERT INTO slots (type, name, description{columns}) VALUES {rows}"


@pytest.fixture
def migrated(db: Db) -> Db:
    """A database whose slots have the flags, and no rows."""
    db.execute(SLOTS_TEMPLATES)
    db.migrate(STEM)
    return db


def test_slots_that_stand_get_their_defaults(db: Db) -> None:
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS)
    db.migrate(STEM)
    assert flags(db) == CRITICAL | PLAIN


CHOICES = """
UPDATE slots SET must_keep = {}, min_chars = {}
WHERE (type, name) IN (('ruleset', 'principles'), ('ux', 'hint'))"""


@pytest.mark.parametrize(("must_keep", "min_chars"), [(False, None), (False, 1), (True, None), (True, 0)])
def test_what_operators_chose_survives_every_later_run(db: Db, must_keep: bool, min_chars: int | None) -> None:
    db.execute(by_hand())
    assert db.invoke("setup").code == 0
    db.execute(CHOICES.format(must_keep, "NULL" if min_chars is None else min_chars))
    chosen = (must_keep, min_chars)
    expected = CRITICAL | PLAIN | {("ruleset", "principles"): chosen, ("ux", "hint"): chosen}
    db.migrate(STEM, STEM)
    assert flags(db) == expected
    assert [db.invoke("setup").code, db.invoke("slots-flags").code] == [0, 0]
    assert flags(db) == expected


def test_a_run_that_mends_the_trigger_keeps_what_operators_chose(db: Db) -> None:
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS)
    db.migrate(STEM)
    db.execute(CHOICES.format(False, "NULL") + "; DROP FUNCTION set_critical_slot_defaults CASCADE")
    chosen = flags(db)
    db.migrate(STEM)
    assert flags(db) == chosen
    assert [item for item in db.verification(STEM) if item[1] != item[2]] == []


def test_a_run_enables_a_disabled_trigger(migrated: Db) -> None:
    migrated.execute("ALTER TABLE slots DISABLE TRIGGER trigger_slots_critical_defaults")
    migrated.migrate(STEM)
    migrated.execute(insert(CRITICAL))
    assert flags(migrated) == CRITICAL


@pytest.mark.parametrize(
    ("columns", "values"),
    [("", ""), (", must_keep, min_chars", ", false, NULL"), (", must_keep", ", DEFAULT"), (", min_chars", ", NULL")],
    ids=["unsaid", "said to be unset", "default", "null"],
)
def test_critical_slots_that_come_later_get_their_defaults(migrated: Db, columns: str, values: str) -> None:
    migrated.execute(insert(CRITICAL | PLAIN, columns, values))
    assert flags(migrated) == CRITICAL | PLAIN


@pytest.mark.parametrize(
    ("values", "expected"), [("true, NULL", (True, None)), ("false, 7", (False, 7)), ("true, 0", (True, 0))]
)
def test_values_said_for_a_new_row_are_kept(migrated: Db, values: str, expected: tuple[bool, int | None]) -> None:
    migrated.execute(insert(CRITICAL, ", must_keep, min_chars", f", {values}"))
    assert flags(migrated) == dict.fromkeys(CRITICAL, expected)


def test_copy(migrated: Db) -> None:
    copy = "COPY slots (type, name, description) FROM STDIN"
    with migrated.connect() as connection, connection.cursor() as cursor, cursor.copy(copy) as rows:
        for kind, name in CRITICAL | PLAIN:
            rows.write_row((kind, name, "copied"))
    assert flags(migrated) == CRITICAL | PLAIN


def test_a_row_deleted_and_inserted_again_is_new(migrated: Db) -> None:
    migrated.execute(insert(CRITICAL))
    migrated.execute("DELETE FROM slots")
    migrated.execute(insert(CRITICAL))
    assert flags(migrated) == CRITICAL


@pytest.mark.parametrize(
    ("must_keep", "min_chars", "expected"),
    [("false", "NULL", (False, None)), ("true", "3", (True, 3)), ("false", "3", (False, 3))],
)
def test_an_upsert_that_meets_a_row_keeps_what_it_says(
    migrated: Db, must_keep: str, min_chars: str, expected: tuple[bool, int | None]
) -> None:
    migrated.execute(insert(CRITICAL))
    migrated.execute(UPSERT.format(must_keep=must_keep, min_chars=min_chars))
    assert flags(migrated) == CRITICAL | {("ruleset", "principles"): expected}


def test_an_upsert_that_meets_no_row_gives_the_defaults(migrated: Db) -> None:
    migrated.execute(UPSERT.format(must_keep="false", min_chars="NULL"))
    assert flags(migrated) == {("ruleset", "principles"): (True, 160)}


def test_an_insert_that_does_nothing_changes_nothing(migrated: Db) -> None:
    migrated.execute(insert(CRITICAL, ", must_keep, min_chars", ", true, 1"))
    migrated.execute(insert(CRITICAL) + " ON CONFLICT DO NOTHING")
    assert flags(migrated) == dict.fromkeys(CRITICAL, (True, 1))


def wait_for_waiter(db: Db) -> None:
    """Poll until a session waits for a lock: no other test uses this server at the time."""
    deadline = time.monotonic() + 10
    while not db.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
@pytest.mark.parametrize("row", ["new", "there"])
def test_two_upserts_at_once(migrated: Db, row: str, outcome: str) -> None:
    """The second waits for the first: it meets its row, or (rolled back) what was there before."""
    if row == "there":
        migrated.execute(insert(CRITICAL, ", must_keep, min_chars", ", true, 1"))
    upsert = UPSERT.format(must_keep="false", min_chars="NULL")
    with migrated.connect(autocommit=False) as first:
        first.execute(upsert)
        second = threading.Thread(target=migrated.execute, args=(upsert,))
        second.start()
        wait_for_waiter(migrated)
        first.commit() if outcome == "commit" else first.rollback()
        second.join()
    is_new = row == "new" and outcome == "rollback"
    assert flags(migrated)["ruleset", "principles"] == ((True, 160) if is_new else (False, None))


@pytest.fixture
def role(db: Db) -> Iterator[str]:
    """A role that may log in and nothing else, dropped after the test."""
    name = f"role_{uuid.uuid4().hex}"
    db.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_whoever_may_insert_needs_no_other_right(migrated: Db, role: str) -> None:
    migrated.execute(f"GRANT INSERT ON slots TO {role}")
    with migrated.connect(role) as connection:
        connection.execute(insert(CRITICAL | PLAIN))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("UPDATE slots SET must_keep = false")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT set_critical_slot_defaults()")
    assert flags(migrated) == CRITICAL | PLAIN


@pytest.mark.parametrize("name", ["regclass", "bool", "int4", "text"])
def test_the_trigger_lends_its_owners_rights_to_nobody(migrated: Db, role: str, name: str) -> None:
    """PostgreSQL's manual, "Writing SECURITY DEFINER Functions Safely": pg_temp must not come first."""
    migrated.execute(f"GRANT INSERT ON slots TO {role}; CREATE TABLE loot (who text); GRANT INSERT ON loot TO PUBLIC")
    with migrated.connect(role) as connection:
        connection.execute(f"""
            CREATE FUNCTION pg_temp.evil() RETURNS boolean LANGUAGE plpgsql AS
              'BEGIN INSERT INTO public.loot VALUES (current_user); RETURN true; END';
            CREATE DOMAIN pg_temp.{name} AS pg_catalog.{name} CHECK (pg_temp.evil())""")
        connection.execute(insert(CRITICAL))
    assert migrated.rows("SELECT who FROM loot") == []
    assert flags(migrated) == CRITICAL


HALF_DONE = {
    # name: (what was done by hand, what stands afterwards)
    "must_keep": (
        "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false",
        {key: (False, least) for key, (_, least) in (CRITICAL | PLAIN).items()},
    ),
    "min_chars": (
        "ALTER TABLE slots ADD min_chars int",
        {key: (keep, None) for key, (keep, _) in (CRITICAL | PLAIN).items()},
    ),
    "both": (
        "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false, ADD min_chars int",
        dict.fromkeys(CRITICAL | PLAIN, (False, None)),
    ),
    "both, chosen": (
        "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT true, ADD min_chars int DEFAULT 5;"
        "ALTER TABLE slots ALTER must_keep SET DEFAULT false, ALTER min_chars DROP DEFAULT",
        dict.fromkeys(CRITICAL | PLAIN, (True, 5)),
    ),
}


@pytest.mark.parametrize(("change", "expected"), HALF_DONE.values(), ids=HALF_DONE)
def test_a_column_that_stood_is_left_alone_and_a_new_one_filled(db: Db, change: str, expected: Flags) -> None:
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + change)
    db.migrate(STEM, STEM)
    assert flags(db) == expected
    db.execute("DELETE FROM slots;" + insert(CRITICAL))
    assert flags(db) == CRITICAL


def test_a_schema_renamed_afterwards(db: Db) -> None:
    db.execute("CREATE SCHEMA app; SET search_path = app;" + by_hand())
    assert db.invoke("setup", env={"DATABASE_URL": f"{db.url}&schema=app"}).code == 0
    db.execute("ALTER SCHEMA app RENAME TO game; SET search_path = game; DELETE FROM slots;" + insert(CRITICAL))
    done = db.invoke("setup", env={"DATABASE_URL": f"{db.url}&schema=game"})
    assert (done.code, "nothing to do" in done.out) == (0, True), done
    db.execute(f"ALTER DATABASE {db.name} SET search_path = game")
    assert flags(db) == CRITICAL


def test_a_schema_whose_name_wants_quotes(db: Db) -> None:
    db.execute("""CREATE SCHEMA "My ""App%s"; SET search_path = "My ""App%s";""" + SLOTS_TEMPLATES + SLOT_ROWS)
    db.execute(f"""ALTER DATABASE {db.name} SET search_path = "My ""App%s" """)
    db.migrate(STEM, STEM)
    assert flags(db) == CRITICAL | PLAIN
    assert [item for item in db.verification(STEM) if item[1] != item[2]] == []
    db.execute("DELETE FROM slots;" + insert(CRITICAL))
    assert flags(db) == CRITICAL


def test_the_index_is_the_promised_one_and_is_used(migrated: Db) -> None:
    migrated.execute(insert(CRITICAL))
    for condition in ("must_keep", "must_keep = true"):
        with migrated.connect() as connection:
            connection.execute("SET enable_seqscan = off")
            plan = connection.execute(f"EXPLAIN SELECT name FROM slots WHERE {condition}").fetchall()
        assert "idx_slots_must_keep" in str(plan)
