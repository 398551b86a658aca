"""Citus, as far as its catalogs tell: a stand-in for them, and for what its hooks do with the statements that come.

The stand-in does as Citus' sources have it (utility_hook.c, trigger.c, schema_based_sharding.c): a table that is
created at the top level in a distributed schema is distributed, one made inside a DO block or in a message of several
statements is not; such a message cannot change a distributed table either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from budget_engine.postgres.embedded import Cluster
from conftest import Db, assert_done, database

CITUS = r"""
SET allow_system_table_mods = on;
CREATE TABLE pg_catalog.pg_dist_partition (
  logicalrelid regclass PRIMARY KEY, partmethod "char", partkey text, colocationid int, repmodel "char");
CREATE TABLE pg_catalog.pg_dist_schema (schemaid oid PRIMARY KEY, colocationid int);
CREATE TABLE pg_catalog.pg_dist_shard (logicalrelid regclass, shardid bigint);
GRANT SELECT ON pg_catalog.pg_dist_partition, pg_catalog.pg_dist_schema, pg_catalog.pg_dist_shard TO public;
INSERT INTO pg_extension SELECT 1, 'citus', 10, 11, false, '13.0-1';
CREATE FUNCTION pg_catalog.has_it(regnamespace) RETURNS SETOF regclass LANGUAGE sql AS
  $$ SELECT oid::regclass FROM pg_class WHERE relnamespace = $1 AND relkind IN ('r', 'p') AND NOT relispartition $$;
CREATE FUNCTION pg_catalog.citus_schema_distribute(regnamespace) RETURNS void LANGUAGE sql AS $$
  INSERT INTO pg_dist_schema VALUES ($1, 7);
  INSERT INTO pg_dist_partition SELECT it, 'n', NULL, 7, 's' FROM has_it($1) AS it $$;
CREATE FUNCTION pg_catalog.citus_schema_undistribute(regnamespace) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
  IF EXISTS (SELECT has_it($1) EXCEPT SELECT logicalrelid FROM pg_dist_partition) THEN
    RAISE 'cannot undistribute table because the table is not distributed';
  END IF;
  DELETE FROM pg_dist_partition WHERE colocationid = 7;
  DELETE FROM pg_dist_schema;
END $$;
CREATE FUNCTION pg_catalog.undistribute_table(regclass, cascade_via_foreign_keys bool) RETURNS void LANGUAGE sql AS
  'DELETE FROM pg_dist_partition';
CREATE FUNCTION pg_catalog.create_distributed_table(regclass, text, colocate_with regclass) RETURNS void
LANGUAGE sql AS $$
  INSERT INTO pg_dist_partition SELECT $1, partmethod, partkey, colocationid, repmodel
  FROM pg_dist_partition WHERE logicalrelid = $3 $$;
CREATE FUNCTION pg_catalog.hook() RETURNS event_trigger LANGUAGE plpgsql AS $$
DECLARE
  done record;
BEGIN
  FOR done IN
    SELECT command_tag, schema_name::regnamespace AS home, coalesce(tgrelid, objid) AS id
    FROM pg_event_trigger_ddl_commands()
    LEFT JOIN pg_trigger ON classid = 'pg_trigger'::regclass AND pg_trigger.oid = objid
    WHERE object_type IN ('table', 'trigger')
  LOOP
    IF current_query() ~ '^\s*(CREATE TABLE|ALTER TABLE .* SET SCHEMA)' THEN
      INSERT INTO pg_dist_partition SELECT done.id, 'n', NULL, colocationid, 's'
      FROM pg_dist_schema WHERE schemaid = done.home ON CONFLICT DO NOTHING;
    ELSIF done.id IN (SELECT logicalrelid FROM pg_dist_partition) AND current_query() ~ '^BEGIN' THEN
      RAISE 'cannot execute multiple utility events';
    ELSIF done.id IN (SELECT logicalrelid FROM pg_dist_partition) AND done.command_tag = 'CREATE TRIGGER'
          AND current_setting('citus.enable_unsafe_triggers', true) IS DISTINCT FROM 'on'
          AND EXISTS (SELECT FROM pg_extension WHERE extname = 'citus' AND extversion < '15') THEN
      RAISE 'triggers are not supported on distributed tables when "citus.enable_unsafe_triggers" is set to "false"';
    END IF;
  END LOOP;
END $$;
CREATE EVENT TRIGGER hook ON ddl_command_end EXECUTE FUNCTION hook();
CREATE SCHEMA app;
"""
DISTRIBUTED = "SELECT citus_schema_distribute('app');"
ALLOWED = "ALTER ROLE postgres IN DATABASE {name} SET citus.enable_unsafe_triggers = on;"
ASTRAY = (
    "DO $$ BEGIN CREATE TABLE app.games (id uuid PRIMARY KEY); CREATE TABLE app.turns (id bigint PRIMARY KEY); END $$;"
)
TURNS = "INSERT INTO pg_dist_partition VALUES ('app.turns', {how});"
BY_ID, REFERENCE, ONE_SHARD = (
    TURNS.format(how=how) for how in ("'h', ':varattno 1', 3, 's'", "'n', '', 2, 't'", "'n', '', 3, 's'")
)
ELSEWHERE = """CREATE SCHEMA regular; ALTER TABLE app.turn_metrics SET SCHEMA regular;
ALTER DATABASE {name} SET search_path = app, regular;"""
LOCAL_METRICS = "Citus does not enforce it: turns is distributed (colocation {n}), turn_metrics on the coordinator"
METRICS, SNAPSHOTS = "foreign key turn_metrics (turn_id)", "foreign key prompt_snapshots (turn_id)"
LEADING = {METRICS: LOCAL_METRICS.format(n=3), SNAPSHOTS: "prompt_snapshots on the coordinator"}
BACK = "SELECT undistribute_table('app.{table}', cascade_via_foreign_keys => true);"

# What the database has before a first run, what befalls it after that (one of the two); which conflicts setup finds
# then, with what word of each, and the commands.
CASES: dict[str, tuple[str, str, dict[str, str], list[str]]] = {
    "a distributed schema": (DISTRIBUTED + ALLOWED, "", {}, []),
    "triggers want no leave": (DISTRIBUTED + "UPDATE pg_extension SET extversion = '15.0-1';", "", {}, []),
    "triggers want leave": (
        DISTRIBUTED,
        "",
        dict.fromkeys(
            ["trigger trigger_update_entry_points_search_text", "trigger trigger_slots_critical_defaults"],
            "citus.enable_unsafe_triggers is off",
        ),
        [ALLOWED],
    ),
    "made inside a DO block": (
        DISTRIBUTED + ALLOWED + ASTRAY,
        "",
        dict.fromkeys(["games", "turns"], "on the coordinator alone, in a schema that Citus distributes"),
        [
            "BEGIN;",
            "SET LOCAL citus.enable_schema_based_sharding = off;",
            "CREATE SCHEMA archive;",
            "ALTER TABLE app.games SET SCHEMA archive;",
            "ALTER TABLE app.turns SET SCHEMA archive;",
            "SELECT citus_schema_undistribute('app');",
            "ALTER TABLE archive.games SET SCHEMA app;",
            "ALTER TABLE archive.turns SET SCHEMA app;",
            "DROP SCHEMA archive;",
            "SELECT citus_schema_distribute('app');",
            "COMMIT;",
        ],
    ),
    "turns a reference table": ("", REFERENCE, {}, []),
    "turns distributed by its key": ("", BY_ID, LEADING, [BACK.format(table="turns")]),
    "turns in one shard": (
        "",
        ONE_SHARD,
        LEADING,
        [
            f"SELECT create_distributed_table('app.{table}', NULL, colocate_with => 'app.turns');"
            for table in ("prompt_snapshots", "turn_metrics")
        ],
    ),
    "turns before there are metrics": (
        ALLOWED + "CREATE TABLE app.turns (id bigint PRIMARY KEY);" + BY_ID,
        "",
        LEADING,
        [BACK.format(table="turns")],
    ),
    "metrics distributed, turns not": (
        "",
        BY_ID.replace("app.turns", "app.turn_metrics"),
        {METRICS: "turns is on the coordinator, turn_metrics distributed (colocation 3)"},
        [BACK.format(table="turn_metrics")],
    ),
    "metrics beside the distributed schema": (
        "",
        ALLOWED + ELSEWHERE + DISTRIBUTED,
        {METRICS: LOCAL_METRICS.format(n=7)},
        ["ALTER TABLE regular.turn_metrics SET SCHEMA app;"],
    ),
}


TASKS = ("plan", "setup", "verify", "doctor")  # they read one survey: each case has one
ON_PATH = "ALTER DATABASE {name} SET search_path = app;"


@pytest.fixture(scope="module")
def regular(cluster: Cluster) -> Iterator[Db]:
    """A database with Citus, of whose tables, which setup has made, none is distributed."""
    with database(cluster) as db:
        db.execute(CITUS + ON_PATH.format(name=db.name))
        assert_done(db)
        yield db


@pytest.mark.parametrize("case", CASES)
def test_what_citus_would_not_enforce_is_a_conflict_with_commands_that_work(
    cluster: Cluster, regular: Db, case: str, tmp_path: Path
) -> None:
    before, after, conflicts, commands = CASES[case]
    with database(cluster, regular.name if after else "template0") as db:
        db.execute(((CITUS if before else "") + ON_PATH + before + after).replace("{name}", db.name))
        found = {check.title: check.state for check in db.checks() if check.conflict}
        assert {title: conflicts[title] for title in conflicts if conflicts[title] in found[title]} == conflicts, found
        assert found.keys() == conflicts.keys()
        task = TASKS[list(CASES).index(case) % len(TASKS)]
        done = db.call(task)
        assert done.code == 6 if conflicts else done.code in (0, 5), done
        told = re.findall("^conflict (.*?) is ", done.out + done.err, re.M)
        assert set(told) == set(conflicts) or task == "doctor", done
        printed = db.call("verify", "--remedies").out
        ran = [line for line in printed.splitlines() if line and not line.startswith("--")]
        assert ran == [command.replace("{name}", db.name) for command in commands]
        script = tmp_path / "commands.sql"
        script.write_text(printed)
        assert db.psql("-f", str(script)).code == 0
        assert_done(db)
        shared = db.rows(
            "SELECT count(*) FROM pg_dist_schema JOIN pg_class ON relnamespace = schemaid AND relkind = 'r' "
            "LEFT JOIN pg_dist_partition AS p ON logicalrelid = oid WHERE p.colocationid IS DISTINCT FROM 7"
        )
        assert shared == [(0,)]


def test_the_commands_are_nobody_elses(db: Db) -> None:
    """A setting of the database, by which its owner would have a superuser run what he likes."""
    planted = '[{"position": 0, "says": "x", "commands": ["DROP TABLE turns;"]}]'
    db.execute(f"ALTER DATABASE {db.name} SET budget_engine.citus = '{planted}'")
    assert db.call("setup").code == 0
    assert "DROP" not in db.call("verify", "--remedies").out
