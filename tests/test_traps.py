"""A database full of traps: whatever we run with the rights of who migrates, no function or operator of others is run.

In a schema of the search_path anybody may make a function that fits a call of ours better than PostgreSQL's own
(CVE-2018-1058). Here that schema has one for every function and operator that our SQL mentions, of all signatures that
could win, and relations and types with the names of catalogs and of our CTEs. Nobody may execute them: the server says
so as soon as a plan has one, whether a row is met or not.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import supabase
from budget_engine.migration.chain import DB, ROOT, load
from budget_engine.postgres import embedded
from conftest import MIGRATIONS, Db, database, holding
from states import CORE_ROWS, CORE_WITH_UUID_TURNS, HANGING, by_hand, old_metrics, with_uuid
from supabase import MIGRATOR

SQL = "\n".join(file.read_text() for file in [*DB.rglob("*.sql"), *ROOT.glob("scripts/**/*.py")])
WORDS = sorted(set(re.findall(r"\w+", SQL)))
CALLED = sorted(set(re.findall(r"(\w+) ?\(", SQL)))
OPERATORS = sorted({*re.findall(r"[-+*/<>=~!@#%^&|?]+", SQL), "~~", "!~~"})  # LIKE
CTES = sorted(set(re.findall(r"(\w+) (?:\([\w, ]+\) )?AS (?:NOT MATERIALIZED |MATERIALIZED )?\(", SQL)))
OURS = ["profiles", *(st.new_table for step in load().steps for st in step.statements if st.new_table)]

# What stands for each pseudo-type in a trap.
ANY = ["text", "name", "oid", "regclass", "integer", "bigint", '"char"', "boolean", "json", "anyelement"]
ARRAYS = ["text[]", "name[]", "oid[]", "smallint[]", "regtype[]", "regclass[]", "int2vector", "oidvector"]
STAND_INS = {
    **dict.fromkeys(['"any"', "anyelement", "anynonarray", "anycompatible", "anycompatiblenonarray"], ANY),
    **dict.fromkeys(["anyarray", "anycompatiblearray"], ARRAYS),
}
# What may be given where a type is wanted, of the types that our SQL mentions.
CASTS = """
SELECT format_type(casttarget, NULL), array_agg(format_type(castsource, NULL))
FROM pg_cast JOIN pg_type ON pg_type.oid = castsource WHERE castcontext = 'i' AND typname = ANY (%s) GROUP BY 1"""
# Name, types of the arguments, how many have defaults, type of those that may be many, SETOF, type of the result.
FUNCTIONS = """
SELECT proname, ARRAY(SELECT format_type(a, NULL) FROM unnest(proargtypes) WITH ORDINALITY AS arg (a, n) ORDER BY n),
       pronargdefaults, format_type(nullif(provariadic, 0), NULL), proretset, format_type(prorettype, NULL)
FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = ANY (%s)
  AND 'internal'::regtype <> ALL (proargtypes) AND 'cstring'::regtype <> ALL (proargtypes) ORDER BY oid"""
BINARY = """
SELECT oprname, ARRAY[format_type(oprleft, NULL), format_type(oprright, NULL)], 0, NULL, false,
       format_type(oprresult, NULL) FROM pg_operator WHERE oprname = ANY (%s) AND oprleft <> 0 ORDER BY oid"""
RELATIONS = """
SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relname = ANY (%s) AND relkind <> 'i'
UNION SELECT unnest(%s::text[]) EXCEPT SELECT unnest(%s::text[])"""
TYPES = """
SELECT typname FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype = 'b' AND typcategory <> 'A'
AND typname = ANY (%s) AND typname <> ALL (%s)"""
FIRST = """
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC; SET check_function_bodies = off;
CREATE SCHEMA spring; CREATE FUNCTION spring.trap() RETURNS int LANGUAGE sql AS 'SELECT 1'"""
LAST = "CREATE FUNCTION spring.last() RETURNS int LANGUAGE sql AS 'SELECT 1'"
# What is stored, and would run another's code later.
CAUGHT = """
SELECT pg_describe_object(classid, objid, objsubid), pg_describe_object(refclassid, refobjid, 0)
FROM pg_depend CROSS JOIN (VALUES ('spring'::regnamespace::oid, 'spring.last'::regproc::oid)) AS traps (first, last)
WHERE objid NOT BETWEEN first AND last AND refobjid BETWEEN first AND last"""
TO_PUBLIC = """
SET search_path = pg_catalog;
DO $$ DECLARE t regclass; BEGIN
  FOR t IN SELECT oid FROM pg_class WHERE relnamespace = 'app'::regnamespace AND relkind IN ('r', 'v') LOOP
    EXECUTE format('ALTER TABLE %s SET SCHEMA public', t);
  END LOOP;
END $$"""


def met_by(arguments: Sequence[str], casts: dict[str, list[str]]) -> Iterator[tuple[str, ...]]:
    """Yield the argument types of calls that mean this one; of many arguments, few differ from its own.

    A literal without a type counts as text.
    """
    options = [list(dict.fromkeys([*STAND_INS.get(a, [a, *casts.get(a, [])]), "text"])) for a in arguments]
    for fits in itertools.product(*options):
        if sum(a != b[0] for a, b in zip(fits, options, strict=True)) <= (2 if len(fits) < 4 else 1):
            yield fits


def traps(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """Yield what makes them in the first schema of the search_path."""
    casts = dict(connection.execute(CASTS, [WORDS]).fetchall())
    for query, names in ((FUNCTIONS, CALLED), (BINARY, OPERATORS)):
        made: dict[tuple[str, ...], str] = {}
        for name, arguments, defaults, variadic, is_set, result in connection.execute(query.encode(), [names]):
            calls = [arguments[: len(arguments) - n] for n in range(defaults + 1)]
            calls += [[*arguments[:-1], *[variadic] * n] for n in range(1, 5)] if variadic else []
            for fits in itertools.chain.from_iterable(met_by(call, casts) for call in calls):
                made.setdefault((name, *fits), "SETOF " * is_set + re.sub(r"any\w+|\w+_handler", "text", result))
        for (name, *types), result in made.items():
            called = f'{"spring." if query == BINARY else ""}"{name}"'
            yield f"CREATE FUNCTION {called}({','.join(types)}) RETURNS {result} LANGUAGE plpgsql AS 'BEGIN END'"
            if query == BINARY:
                yield f"CREATE OPERATOR {name} (FUNCTION = {called}, LEFTARG = {types[0]}, RIGHTARG = {types[1]})"
    for (name,) in connection.execute(RELATIONS, [WORDS, CTES, OURS]).fetchall():
        yield f'CREATE VIEW "{name}" AS SELECT spring.trap()'
    for (name,) in connection.execute(TYPES, [WORDS, CTES]).fetchall():
        yield f'CREATE DOMAIN "{name}" AS pg_catalog."{name}" CHECK (spring.trap() > 0)'


@pytest.fixture(scope="module")
def template(cluster: embedded.Cluster) -> Iterator[str]:
    """A database of Supabase's whose schema public is full of traps."""
    with database(cluster) as db:
        supabase.install(db, default_privileges=False)
        supabase.add_profiles(db)
        with db.connect(autocommit=False) as connection:
            connection.execute(";".join([FIRST, *traps(connection), LAST]).encode())
        yield db.name


@contextmanager
def trapped(cluster: embedded.Cluster, template: str, path: str, state: str = "") -> Iterator[Db]:
    """A database with this state in the first schema of the path; at its end nothing may have met a trap."""
    begin = cluster.log.stat().st_size
    with database(cluster, template) as db:
        db.execute(f"ALTER DATABASE {db.name} OWNER TO {MIGRATOR}; ALTER DATABASE {db.name} SET search_path = {path}")
        with db.connect(MIGRATOR) as connection:
            connection.execute(f"CREATE SCHEMA app; SET search_path = app; {state}".encode())
        if path.startswith("public"):
            db.execute(TO_PUBLIC)
        yield db
        assert re.findall(".*permission denied.*", cluster.log.read_bytes()[begin:].decode(errors="replace")) == []
        with db.connect() as connection:
            connection.execute("SET search_path = pg_catalog")
            assert connection.execute(CAUGHT).fetchall() == []


def test_the_traps_work(cluster: embedded.Cluster, template: str) -> None:
    """What nobody pins runs into them."""
    with database(cluster, template) as db:
        for wrong in ("SELECT oid = 'pg_class'::regclass FROM pg_class WHERE false", "SELECT format('%s', 'a'::text)"):
            assert "permission denied for function" in db.psql("-c", wrong, role=MIGRATOR).err


CORE, SLOTS, SNAPSHOTS, *REST = (
    *("20250130000000_core_schema", "20250214_slots_templates", "20250213_prompt_snapshots"),
    *("20250222_fix_prompt_snapshots_turn_id", "20250220_slots_flags", "20250221_budget_report"),
    "20250222_turn_metrics",
)
# Then an application does its work: what is stored runs, defaults, checks, keys and triggers.
USE = """
INSERT INTO worlds (id) VALUES ('w'); INSERT INTO rulesets (id) VALUES ('r');
INSERT INTO entry_points (id, slug, type, world_id, ruleset_id, title, description, tags)
VALUES ('e', 's', 'quest', 'w', 'r', 'Salt', 'Sea', '{new}');
INSERT INTO games (entry_point_id, entry_point_type, world_id, ruleset_id) VALUES ('e', 'quest', 'w', 'r');
INSERT INTO turns (game_id, idx, role, content) SELECT id, 1, 'player', '{}' FROM games;
INSERT INTO slots (type, name, description) VALUES ('npc', 'persona', 'Who');
INSERT INTO templates (type, slot, body) VALUES ('npc', 'persona', 'You');
INSERT INTO prompt_snapshots (tp, linearized_prompt_text, turn_id) SELECT '{}', 'Prompt', id FROM turns;
INSERT INTO turn_metrics (turn_id, story_id, tokens_before, tokens_after) SELECT id, game_id, 2, 1 FROM turns;
DELETE FROM games;"""
CONFLICTS = ";".join(
    [
        *(HANGING[name] for name in ("view turn_view", "trigger turn_trigger", "policy turn_policy")),
        "ALTER TABLE slots ADD must_keep text, ADD min_chars bigint, DROP CONSTRAINT uk_slots_type_name",
        "ALTER TABLE templates ALTER version DROP NOT NULL; ALTER TABLE turn_metrics ALTER tokens_before TYPE bigint",
    ]
)
UUID_TURNS = CORE_WITH_UUID_TURNS + CORE_ROWS
NOT_VALID = by_hand("bigint") + "ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_parent_id_fkey"
SETUP = "plan, doctor, rehearse, setup, status --check"  # all that is ever sent
# name: (what exists, tasks with the exit code unless it is 0; "|": what it prints is run by psql; names of files)
RUNS = {
    "nothing": ("", f"verify 5, {SETUP}, USE"),
    "uuid": (with_uuid(), f"fix, {SETUP}"),
    "foreign keys to be validated": (NOT_VALID, "plan, setup"),
    "older core": (UUID_TURNS, "verify 6, prereqs --recreate --yes, setup"),
    "conflicts": (with_uuid() + old_metrics() + CONFLICTS, "verify --remedies 6 |, plan --sql |, verify"),
    "locked": (by_hand("bigint"), "plan 7, setup 7"),
    "nothing, by psql": ("", ", ".join([CORE, SLOTS, SNAPSHOTS, *REST, "verify.sql", "USE"])),
    "uuid, by psql": (with_uuid(), ", ".join(["verify.sql", CORE, SNAPSHOTS, SLOTS, *REST])),
    "foreign keys to be validated, by psql": (NOT_VALID, ", ".join([SNAPSHOTS, SLOTS, *REST])),
    "older core, by psql": (UUID_TURNS, ", ".join(["20250130000002_recreate_core_schema", SLOTS, SNAPSHOTS, *REST])),
}
# Ours among theirs, so that each schema that we ever look into has traps; ours before theirs; and theirs come first,
# which those that fit better than PostgreSQL's own would do anyway.
PATHS = [(run, "public") for run in RUNS if run != "locked"]
PATHS += [("nothing", "app, public"), *((run, "app, public, pg_catalog") for run in ("uuid", "locked"))]


@pytest.mark.parametrize(("run", "path"), PATHS)
def test_nothing_springs_one(cluster: embedded.Cluster, template: str, tmp_path: Path, run: str, path: str) -> None:
    """By psql pg_catalog comes first: who says otherwise means what he says."""
    state, tasks = RUNS[run]
    with trapped(cluster, template, path, state) as db, ExitStack() as stack:
        if run == "locked":
            stack.enter_context(holding(db, "LOCK TABLE prompt_snapshots"))
        for task in tasks.split(", "):
            perform(db, task, tmp_path / "printed.sql")


def perform(db: Db, task: str, printed: Path) -> None:
    if task == "USE" or task.startswith("2025") or task.endswith(".sql"):
        printed.write_text(USE)
        psql(db, printed if task == "USE" else MIGRATIONS / f"{task}.sql" if task[0] == "2" else DB / task)
        return
    words, code = re.fullmatch(r"(.*?)(?: (\d))?(?: \|)?", task).groups()  # type: ignore[union-attr]
    done = db.invoke(*words.split(), role=MIGRATOR, env={"LOCK_WAIT": "500ms", "LOCK_TIMEOUT": "300ms"})
    assert (done.code, "permission denied" in str(done)) == (int(code or 0), False), f"{task}: {done}"
    if task.endswith("|"):
        printed.write_text(done.out)
        psql(db, printed)


def psql(db: Db, file: Path) -> None:
    done = db.psql("-f", str(file), role=MIGRATOR)
    assert (done.code, "permission denied" in str(done)) == (0, False), f"{file.stem}: {done}"
