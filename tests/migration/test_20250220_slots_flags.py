"""20250220_slots_flags: defaults for critical slots when they come into being, and never over what somebody chose."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import psycopg
import pytest
from budget_engine.postgres.embedded import Cluster
from conftest import Db, database
from states import CRITICAL, PLAIN, SLOT_ROWS, SLOTS_TEMPLATES, Flags, by_hand
from verification import differing

STEM = "20250220_slots_flags"
ANY = CRITICAL | PLAIN
ONE = ("ruleset", "principles")
BOTH = ", must_keep, min_chars"


def flags(db: Db | psycopg.Connection[tuple[Any, ...]]) -> Flags:
    """Return (type, name) → (must_keep, min_chars) of every slot."""
    query = "SELECT type, name, must_keep, min_chars FROM slots"
    rows = db.rows(query) if isinstance(db, Db) else db.execute(query).fetchall()
    return {(kind, name): (must_keep, min_chars) for kind, name, must_keep, min_chars in rows}


def insert(names: Flags, columns: str = "", values: str = "") -> str:
    """Write one INSERT of several slots, perhaps with more columns."""
    rows = ", ".join(f"('{kind}', '{name}', 'text'{values})" for kind, name in names)
    return f"INSERT INTO slots (type, name, description{columns}) VALUES {rows}"


def upsert(values: str = "false, NULL") -> str:
    """Write what the application sends for a critical slot, with these flags."""
    return (
        f"{insert({ONE: (True, 160)}, BOTH, f', {values}')} ON CONFLICT (type, name) DO UPDATE"
        " SET description = EXCLUDED.description, must_keep = EXCLUDED.must_keep, min_chars = EXCLUDED.min_chars"
    )


def owned_by(role: str) -> str:
    return f"GRANT CREATE ON SCHEMA public TO {role}; ALTER TABLE slots OWNER TO {role};"


@pytest.fixture(scope="module")
def migrated(cluster: Cluster) -> Iterator[Db]:
    """A database whose slots have the flags, and no rows; to be left so. Nobody may call a function by default."""
    with database(cluster) as db:
        db.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;" + SLOTS_TEMPLATES)
        db.migrate(STEM)
        yield db


@pytest.fixture
def writing(migrated: Db) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A session there, whose work is rolled back."""
    with migrated.connect() as connection, connection.transaction(force_rollback=True):
        yield connection


def test_what_operators_chose_survives_every_later_run(db: Db) -> None:
    """Also one that brings the trigger back, or enables it."""
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS)
    db.migrate(STEM)
    assert flags(db) == ANY
    chosen: Flags = {
        ONE: (False, None),
        ("ruleset", "choice_style"): (False, 1),
        ("module", "actions"): (True, None),
        ("ux", "hint"): (True, 0),
    }
    for (kind, name), (must_keep, min_chars) in chosen.items():
        db.execute(
            f"UPDATE slots SET must_keep = {must_keep}, min_chars = {'NULL' if min_chars is None else min_chars}"
            f" WHERE (type, name) = ('{kind}', '{name}')"
        )
    assert db.call("setup").code == 0
    db.execute("DROP FUNCTION set_critical_slot_defaults CASCADE")
    assert db.call("slots-flags").code == 0
    db.execute("ALTER TABLE slots DISABLE TRIGGER trigger_slots_critical_defaults")
    db.migrate(STEM, STEM)
    assert differing(db, "slots_flags") == []
    assert flags(db) == ANY | chosen
    db.execute("DELETE FROM slots;" + insert(ANY))
    assert flags(db) == ANY


WRITTEN: dict[str, tuple[str, Flags]] = {
    # name: (what is written, what there is then)
    "unsaid": (insert(ANY), ANY),
    "said to be unset": (insert(ANY, BOTH, ", false, NULL"), ANY),
    "default": (insert(ANY, ", must_keep", ", DEFAULT"), ANY),
    "null": (insert(ANY, ", min_chars", ", NULL"), ANY),
    "must_keep said": (insert(CRITICAL, BOTH, ", true, NULL"), dict.fromkeys(CRITICAL, (True, None))),
    "min_chars said": (insert(CRITICAL, BOTH, ", false, 7"), dict.fromkeys(CRITICAL, (False, 7))),
    "both said": (insert(CRITICAL, BOTH, ", true, 0"), dict.fromkeys(CRITICAL, (True, 0))),
    "deleted and inserted again": (f"{insert(CRITICAL)}; DELETE FROM slots; {insert(CRITICAL)}", CRITICAL),
    "upsert, no row": (upsert(), {ONE: (True, 160)}),
    "upsert, a row": (f"{insert(CRITICAL)}; {upsert()}", CRITICAL | {ONE: (False, None)}),
    "upsert, a row, both said": (f"{insert(CRITICAL)}; {upsert('true, 3')}", CRITICAL | {ONE: (True, 3)}),
    "upsert, a row, min_chars said": (f"{insert(CRITICAL)}; {upsert('false, 3')}", CRITICAL | {ONE: (False, 3)}),
    "insert that does nothing": (
        f"{insert(CRITICAL, BOTH, ', true, 1')}; {insert(CRITICAL)} ON CONFLICT DO NOTHING",
        dict.fromkeys(CRITICAL, (True, 1)),
    ),
}


@pytest.mark.parametrize(("sql", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_a_new_critical_slot_gets_what_is_unset(
    writing: psycopg.Connection[tuple[Any, ...]], sql: str, expected: Flags
) -> None:
    writing.execute(sql.encode())
    assert flags(writing) == expected


def test_copy_gives_the_defaults_and_returning_shows_them(writing: psycopg.Connection[tuple[Any, ...]]) -> None:
    with writing.cursor() as cursor, cursor.copy("COPY slots (type, name, description) FROM STDIN") as rows:
        for kind, name in ANY:
            rows.write_row((kind, name, "copied"))
    assert flags(writing) == ANY
    returning = f"DELETE FROM slots; {insert(CRITICAL)} RETURNING must_keep, min_chars"
    results = list(writing.execute(returning.encode()).results())
    assert results[1].fetchall() == list(CRITICAL.values())


def test_two_upserts_at_once(migrated: Db) -> None:
    """The second waits for the first: it meets its row, or (rolled back) what was there; a new one has its defaults."""
    with database(migrated.cluster, migrated.name) as db, db.connect(autocommit=False) as first:
        for row, outcome in product(("new", "there"), ("COMMIT", "ROLLBACK")):
            db.execute("DELETE FROM slots;" + (insert(CRITICAL, BOTH, ", true, 1") if row == "there" else ""))
            first.execute(upsert().encode())
            second = threading.Thread(target=db.execute, args=(upsert(),))
            second.start()
            while not db.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                assert second.is_alive()
                time.sleep(0.01)
            first.execute(outcome)
            second.join()
            assert flags(db)[ONE] == ((True, 160) if row == "new" else (False, None)), (row, outcome)


FORCED = "ALTER TABLE slots ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
RIGHTS = {
    # what pg_monitor may do: whether it can upsert
    "GRANT INSERT ON slots TO pg_monitor": False,
    "GRANT ALL ON slots TO pg_monitor": True,
    "GRANT INSERT (type, name, description, must_keep, min_chars), UPDATE (description, must_keep, min_chars),"
    " SELECT (type, name, description, must_keep, min_chars) ON slots TO pg_monitor": True,
    f"GRANT ALL ON slots TO pg_monitor; {FORCED} CREATE POLICY p ON slots TO pg_monitor USING (true)": True,
}


@pytest.mark.parametrize(("rights", "can_upsert"), RIGHTS.items(), ids=["insert", "all", "columns", "policy"])
def test_upserts_of_roles_with_some_rights(
    writing: psycopg.Connection[tuple[Any, ...]], rights: str, can_upsert: bool
) -> None:
    writing.execute(rights.encode())

    def write(sql: str) -> Flags:
        writing.execute(f"SET ROLE pg_monitor; {sql}; RESET ROLE".encode())
        return flags(writing)

    if can_upsert:
        assert write(upsert()) == {ONE: (True, 160)}
        assert write(upsert()) == {ONE: (False, None)}  # it meets the row
    else:
        with pytest.raises(psycopg.errors.InsufficientPrivilege), writing.transaction():
            write(upsert())
        assert write(insert(ANY)) == ANY


SWALLOWING = """
CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN {}; END';
CREATE TRIGGER keep BEFORE UPDATE ON slots FOR EACH ROW EXECUTE FUNCTION keep()"""
SWALLOWED = {
    "a trigger": SWALLOWING.format("OLD"),
    "a trigger that refuses": SWALLOWING.format("NULL"),
    "a rule": "CREATE RULE keep AS ON UPDATE TO slots DO INSTEAD NOTHING",
}


@pytest.mark.parametrize("change", SWALLOWED.values(), ids=SWALLOWED)
def test_what_swallows_the_defaults_is_an_error(db: Db, role: str, change: str) -> None:
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + owned_by(role) + change)
    before = db.dump(data=True)
    done = db.by_psql(STEM)
    assert (done.code, "ERROR:  TB003: " in done.err) == (3, True), done
    assert db.dump(data=True) == before


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
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + owned_by(role) + ("" if before else hiding))
    db.migrate(STEM, role=role if "owner" in migrates else "postgres")
    assert flags(db) == ANY
    db.execute("GRANT INSERT ON slots TO pg_monitor;" + (hiding if before else ""))
    assert db.value("SELECT relforcerowsecurity FROM pg_class WHERE oid = 'slots'::regclass")
    for inserts in (role, "pg_monitor"):
        db.execute(f"DELETE FROM slots; SET ROLE {inserts}; {insert(ANY)}")
        assert flags(db) == ANY


SEEN = "CREATE TABLE seen (who text); GRANT INSERT ON seen TO PUBLIC;"
SEE = "INSERT INTO seen VALUES (current_user);"
ON_UPDATE = """
CREATE FUNCTION grab() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN {does} RETURN NEW; END $f$;
CREATE {when} UPDATE ON slots {deferred} FOR EACH ROW EXECUTE FUNCTION grab();"""
AT_ONCE = {"when": "TRIGGER grab BEFORE", "deferred": ""}
AT_THE_END = {"when": "CONSTRAINT TRIGGER grab AFTER", "deferred": "DEFERRABLE INITIALLY DEFERRED"}


def test_the_owners_triggers_run_as_the_owner(db: Db, role: str) -> None:
    """A superuser who migrates lends them no rights; what is created belongs to the owner, too."""
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + SEEN + ON_UPDATE.format(does=SEE, **AT_ONCE) + owned_by(role))
    db.migrate(STEM, STEM)
    assert db.rows("SELECT DISTINCT who FROM seen") == [(role,)]
    owners = "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname ~ 'critical_slot'"
    assert db.rows(owners) == [(role,)]
    assert flags(db) == ANY
    assert differing(db, "slots_flags") == []


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
    db.execute(SLOTS_TEMPLATES + SLOT_ROWS + SEEN + grab + owned_by(role))
    done = db.by_psql(STEM) if by == "psql" else db.call("setup")
    assert set(db.rows("SELECT who FROM seen")) <= {(role,)}, done


@pytest.mark.parametrize(
    "hers", ["FUNCTION critical_slot_defaults", "FUNCTION set_critical_slot_defaults", "TABLE slots"]
)
def test_a_function_of_another_owner_does_not_become_ours(db: Db, role: str, hers: str) -> None:
    """Replaced by a superuser, it would stay hers, to be replaced by her later on."""
    db.execute(SLOTS_TEMPLATES)
    db.migrate(STEM)
    db.execute("DROP TRIGGER trigger_slots_critical_defaults ON slots; ALTER TABLE slots DROP min_chars")
    db.execute(f"GRANT CREATE ON SCHEMA public TO {role}; ALTER {hers} OWNER TO {role}")
    conflicts = [c.name for c in differing(db, "slots_flags") if c.verdict == "differs, conflict"]
    functions = ["critical_slot_defaults", "set_critical_slot_defaults"]
    assert conflicts == [name for name in functions if hers in (f"FUNCTION {name}", "TABLE slots")]
    before = db.dump()
    done = db.by_psql(STEM)
    assert (done.code, "ERROR:  TB002: " in done.err) == (3, True), done
    assert db.call("slots-flags").code == 6
    assert db.dump() == before


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
        {key: (False, least) for key, (_, least) in (ANY).items()},
    ),
    "min_chars": (
        "ALTER TABLE slots ADD min_chars int",
        {key: (keep, None) for key, (keep, _) in (ANY).items()},
    ),
    "both": (
        "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false, ADD min_chars int",
        dict.fromkeys(ANY, (False, None)),
    ),
    "both, chosen": (
        "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT true, ADD min_chars int DEFAULT 5;"
        "ALTER TABLE slots ALTER must_keep SET DEFAULT false, ALTER min_chars DROP DEFAULT",
        dict.fromkeys(ANY, (True, 5)),
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
    assert db.call("setup", env={"DATABASE_URL": f"{db.url}&schema=app"}).code == 0
    db.execute("ALTER SCHEMA app RENAME TO game; SET search_path = game; DELETE FROM slots;" + insert(CRITICAL))
    done = db.call("setup", env={"DATABASE_URL": f"{db.url}&schema=game"})
    assert (done.code, "nothing to do" in done.out) == (0, True), done
    db.execute(f"ALTER DATABASE {db.name} SET search_path = game")
    assert flags(db) == CRITICAL


def test_a_schema_whose_name_wants_quotes(db: Db) -> None:
    db.execute("""CREATE SCHEMA "My ""App%s"; SET search_path = "My ""App%s";""" + SLOTS_TEMPLATES + SLOT_ROWS)
    db.execute(f"""ALTER DATABASE {db.name} SET search_path = "My ""App%s" """)
    db.migrate(STEM, STEM)
    assert flags(db) == ANY
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
