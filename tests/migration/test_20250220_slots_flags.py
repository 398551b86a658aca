"""20250220_slots_flags: defaults for critical slots when they come into being, and never over what somebody chose."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from conftest import MIGRATIONS, Db
from states import CRITICAL, PLAIN, SLOT_ROWS, SLOTS_TEMPLATES, Flags, by_hand
from verification import differing

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
    assert differing(db, "slots_flags") == []


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
    """The second waits for the first: it meets its row, or (rolled back) what was there; a new one has its defaults."""
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
    expected = (True, 160) if row == "new" else (False, None)
    assert flags(migrated)["ruleset", "principles"] == expected


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
    assert flags(migrated) == CRITICAL | PLAIN


def test_insert_returning_shows_the_defaults(migrated: Db) -> None:
    insertion = insert({("npc", "persona"): (False, 140)}) + " RETURNING must_keep, min_chars"
    assert migrated.rows(insertion) == [(False, 140)]


RIGHTS = {
    # name: (rights of the role, whether it can upsert)
    "insert": ("GRANT INSERT ON slots TO {}", False),
    "all": ("GRANT ALL ON slots TO {}", True),
    "columns": (
        "GRANT INSERT (type, name, description, must_keep, min_chars), UPDATE (description, must_keep, min_chars),"
        " SELECT (type, name, description, must_keep, min_chars) ON slots TO {}",
        True,
    ),
    "row-level security": (
        "GRANT ALL ON slots TO {0}; ALTER TABLE slots ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
        "CREATE POLICY p ON slots TO {0} USING (true)",
        True,
    ),
    "defaults that close functions": ("GRANT ALL ON slots TO {}", True),
}


@pytest.mark.parametrize("name", RIGHTS)
def test_upserts_of_roles_with_some_rights(db: Db, role: str, name: str) -> None:
    rights, can_upsert = RIGHTS[name]
    if "functions" in name:
        db.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
    db.execute(SLOTS_TEMPLATES)
    db.migrate(STEM)
    db.execute(rights.format(role))
    upsert = UPSERT.format(must_keep="false", min_chars="NULL")
    with db.connect(role) as connection:
        if not can_upsert:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(upsert)
            connection.execute(insert({("ruleset", "principles"): (True, 160)}))
        else:
            connection.execute(upsert)
        assert flags(db) == {("ruleset", "principles"): (True, 160)}
        if can_upsert:  # the second meets the row
            connection.execute(upsert)
            assert flags(db) == {("ruleset", "principles"): (False, None)}


SWALLOWED = {
    "a trigger": """
        CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
        CREATE TRIGGER keep BEFORE UPDATE ON slots FOR EACH ROW EXECUTE FUNCTION keep()""",
    "a trigger that refuses": """
        CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER keep BEFORE UPDATE ON slots FOR EACH ROW EXECUTE FUNCTION keep()""",
    "a rule": "CREATE RULE keep AS ON UPDATE TO slots DO INSTEAD NOTHING",
}


@pytest.mark.parametrize("change", SWALLOWED.values(), ids=SWALLOWED)
def test_what_swallows_the_defaults_is_an_error(db: Db, role: str, change: str) -> None:
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + change)
    db.execute(f"GRANT CREATE ON SCHEMA public TO {role}; ALTER TABLE slots OWNER TO {role}")
    before = db.dump(data=True)
    done = db.psql("-v", "VERBOSITY=verbose", "-f", str(MIGRATIONS / f"{STEM}.sql"))
    assert done.code == 3, done
    assert "ERROR:  TB003: " in done.err
    assert db.dump(data=True) == before


FORCED = "ALTER TABLE slots ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
HIDING = {  # policies by which anybody may insert, and not all rows are seen
    "by none": FORCED + "CREATE POLICY p ON slots FOR INSERT WITH CHECK (true)",
    "some": FORCED + "CREATE POLICY p ON slots USING (type = 'npc') WITH CHECK (true); GRANT SELECT ON slots TO PUBLIC",
    "to update": FORCED + "CREATE POLICY p ON slots FOR INSERT WITH CHECK (true); CREATE POLICY q ON slots FOR SELECT"
    " USING (true)",
    "restricted": FORCED + "CREATE POLICY p ON slots USING (true); CREATE POLICY q ON slots AS RESTRICTIVE FOR SELECT"
    " USING (current_user = 'nobody'); GRANT SELECT ON slots TO PUBLIC",
}


@pytest.mark.parametrize("hiding", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("migrates", ["the owner", "a superuser", "the owner, before"])
def test_who_does_not_see_a_row_gives_it_its_defaults(db: Db, role: str, migrates: str, hiding: str) -> None:
    """Where row-level security is forced upon the owner, before the step or after it; or upon who inserts."""
    before = "before" in migrates
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + ("" if before else hiding))
    db.execute(f"GRANT CREATE ON SCHEMA public TO {role}; ALTER TABLE slots OWNER TO {role}")
    done = db.invoke("slots-flags", role=role if "owner" in migrates else "postgres")
    assert (done.code, flags(db)) == (0, CRITICAL | PLAIN), done
    db.execute(hiding if before else "SELECT")
    assert db.value("SELECT relforcerowsecurity FROM pg_class WHERE oid = 'slots'::regclass")
    for inserts in (role, f"{role}_2"):
        db.execute("DELETE FROM slots")
        if inserts != role:
            db.execute(f"CREATE ROLE {inserts} LOGIN; GRANT INSERT ON slots TO {inserts}")
        with db.connect(inserts) as connection:
            connection.execute(insert(CRITICAL | PLAIN))
        assert flags(db) == CRITICAL | PLAIN
    db.execute(f"DROP OWNED BY {inserts}; DROP ROLE {inserts}")


def test_the_owners_triggers_run_as_the_owner(db: Db, role: str) -> None:
    """A superuser who migrates lends them no rights; what is created belongs to the owner, too."""
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + "CREATE TABLE seen (who text); GRANT INSERT ON seen TO PUBLIC")
    db.execute("""
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
          'BEGIN INSERT INTO seen VALUES (current_user); RETURN NEW; END';
        CREATE TRIGGER see BEFORE UPDATE ON slots FOR EACH ROW EXECUTE FUNCTION see()""")
    db.execute(f"GRANT CREATE ON SCHEMA public TO {role}; ALTER TABLE slots OWNER TO {role}")
    db.migrate(STEM, STEM)
    assert db.rows("SELECT DISTINCT who FROM seen") == [(role,)]
    owners = "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname ~ 'critical_slot'"
    assert db.rows(owners) == [(role,)]
    assert flags(db) == CRITICAL | PLAIN
    assert differing(db, "slots_flags") == []


SEE = "INSERT INTO seen VALUES (current_user);"
ON_UPDATE = """
CREATE FUNCTION grab() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN {does} RETURN NEW; END $f$;
CREATE {when} UPDATE ON slots {deferred} FOR EACH ROW EXECUTE FUNCTION grab();"""
AT_ONCE = {"when": "TRIGGER grab BEFORE", "deferred": ""}
AT_THE_END = {"when": "CONSTRAINT TRIGGER grab AFTER", "deferred": "DEFERRABLE INITIALLY DEFERRED"}
RESET = f"BEGIN PERFORM set_config('role', 'none', false); EXCEPTION WHEN OTHERS THEN NULL; END; {SEE}"
# What the owner of slots may have her trigger do, to be run with the rights of a superuser who migrates.
GRABS = {
    "reset the role": ON_UPDATE.format(does=RESET, **AT_ONCE),
    "wait for the commit": ON_UPDATE.format(does=RESET, **AT_THE_END),
    "wait again for the commit": f"""
        CREATE TABLE again (); GRANT INSERT ON again TO PUBLIC;
        CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN {RESET} RETURN NEW; END $f$;
        CREATE CONSTRAINT TRIGGER later AFTER INSERT ON again DEFERRABLE FOR EACH ROW EXECUTE FUNCTION later();"""
    + ON_UPDATE.format(does="SET CONSTRAINTS ALL DEFERRED; INSERT INTO again DEFAULT VALUES;", **AT_THE_END),
    "change the function that calls": ON_UPDATE.format(
        does=f"""EXECUTE (SELECT format('ALTER FUNCTION %s SECURITY INVOKER', oid::regprocedure) FROM pg_proc
                          WHERE proname ~ '^give_'); {RESET}""",
        **AT_ONCE,
    ),
    "lead to operators of hers": f"""
        CREATE SCHEMA hers;
        CREATE FUNCTION hers.same(text, text) RETURNS boolean LANGUAGE plpgsql AS
          $f$ BEGIN {SEE} RETURN $1 OPERATOR(pg_catalog.=) $2; END $f$;
        CREATE OPERATOR hers.= (FUNCTION = hers.same, LEFTARG = text, RIGHTARG = text);
        GRANT USAGE ON SCHEMA hers TO PUBLIC;"""
    + ON_UPDATE.format(does="PERFORM set_config('search_path', 'hers, public, pg_catalog', false);", **AT_ONCE),
    "replace a function of ours": ON_UPDATE.format(
        does=f"""EXECUTE $e$ CREATE OR REPLACE FUNCTION public.critical_slot_defaults()
                   RETURNS TABLE (type text, name text, must_keep boolean, min_chars int) LANGUAGE plpgsql AS
                   'BEGIN {SEE} END' $e$;""",
        **AT_ONCE,
    ),
    "put a view in the place of slots": f"""
        CREATE FUNCTION spy() RETURNS text LANGUAGE plpgsql AS $f$ BEGIN {SEE} RETURN 'ux'; END $f$;"""
    + ON_UPDATE.format(
        does="""IF to_regclass('public.moved') IS NULL THEN
                  ALTER TABLE public.slots RENAME TO moved;
                  CREATE VIEW public.slots AS SELECT spy() AS type, name, must_keep, min_chars FROM public.moved;
                END IF;""",
        **AT_THE_END,
    ),
}


@pytest.mark.parametrize("by", ["psql", "setup"])
@pytest.mark.parametrize("grab", GRABS.values(), ids=GRABS)
def test_the_owners_code_gets_no_rights_of_ours(db: Db, role: str, grab: str, by: str) -> None:
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + grab)
    db.execute(f"CREATE TABLE seen (who text); GRANT INSERT ON seen TO PUBLIC; GRANT CREATE ON SCHEMA public TO {role}")
    db.execute(f"ALTER TABLE slots OWNER TO {role}")
    done = db.psql("-f", str(MIGRATIONS / f"{STEM}.sql")) if by == "psql" else db.invoke("setup")
    assert set(db.rows("SELECT who FROM seen")) <= {(role,)}, done


def test_another_ones_function_is_not_replaced(db: Db, role: str) -> None:
    db.execute(
        SLOTS_TEMPLATES
        + "CREATE FUNCTION set_critical_slot_defaults() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
    )
    db.execute(f"GRANT CREATE ON SCHEMA public TO {role}; ALTER TABLE slots OWNER TO {role}")
    [check] = [c for c in differing(db, "slots_flags") if c.name == "set_critical_slot_defaults"]
    assert (check.verdict, check.fixed_by) == ("differs, conflict", None)
    before = db.dump()
    assert db.psql("-f", str(MIGRATIONS / f"{STEM}.sql")).code == 3
    assert db.dump() == before


@pytest.mark.parametrize("name", ["critical_slot_defaults", "set_critical_slot_defaults"])
def test_a_function_of_hers_does_not_become_ours(db: Db, role: str, name: str) -> None:
    """Replaced by a superuser, it would stay hers, to be replaced by her later on."""
    db.execute(SLOTS_TEMPLATES)
    db.migrate(STEM)
    db.execute("DROP TRIGGER trigger_slots_critical_defaults ON slots; ALTER TABLE slots DROP min_chars")
    db.execute(f"GRANT CREATE ON SCHEMA public TO {role}; ALTER FUNCTION {name}() OWNER TO {role}")
    before = db.dump()
    done = db.psql("-v", "VERBOSITY=verbose", "-f", str(MIGRATIONS / f"{STEM}.sql"))
    assert (done.code, "ERROR:  TB002: " in done.err) == (3, True), done
    assert db.invoke("slots-flags").code == 6
    assert db.dump() == before
    assert [c.name for c in differing(db, "slots_flags") if c.verdict == "differs, conflict"] == [name]


FIRST_VERSION = """
ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false, ADD min_chars int;
CREATE FUNCTION set_critical_slot_defaults() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN NULL; END';
REVOKE ALL ON FUNCTION set_critical_slot_defaults() FROM PUBLIC;
CREATE TRIGGER trigger_slots_critical_defaults AFTER INSERT ON slots
  FOR EACH ROW WHEN (NOT NEW.must_keep AND NEW.min_chars IS NULL) EXECUTE FUNCTION set_critical_slot_defaults();
ALTER TABLE slots DISABLE TRIGGER trigger_slots_critical_defaults;
"""


def test_the_trigger_of_version_1_is_replaced(db: Db, role: str) -> None:
    db.execute(SLOTS_TEMPLATES + FIRST_VERSION)
    fixed = {(c.kind, c.name): c.fixed_by for c in differing(db, "slots_flags")}
    assert fixed["trigger", "trigger_slots_critical_defaults"] == "slots_flags"
    assert fixed["function", "set_critical_slot_defaults"] == "slots_flags"
    db.migrate(STEM)
    assert differing(db, "slots_flags") == []
    db.execute(f"GRANT INSERT ON slots TO {role}")
    with db.connect(role) as connection:
        connection.execute(insert(CRITICAL))
    assert flags(db) == CRITICAL


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
    assert differing(db, "slots_flags") == []
    db.execute("DELETE FROM slots;" + insert(CRITICAL))
    assert flags(db) == CRITICAL


def test_the_index_is_the_promised_one_and_is_used(migrated: Db) -> None:
    migrated.execute(insert(CRITICAL))
    for condition in ("must_keep", "must_keep = true"):
        with migrated.connect() as connection:
            connection.execute("SET enable_seqscan = off")
            plan = connection.execute(f"EXPLAIN SELECT name FROM slots WHERE {condition}").fetchall()
        assert "idx_slots_must_keep" in str(plan)
