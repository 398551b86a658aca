"""A server as most users have it, packaged and with LLVM, and roles whose settings are made for other queries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from budget_engine.postgres import embedded
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, parse_target
from conftest import Db, assert_done, holding, role_with
from states import ORPHANS, by_hand, with_uuid

COMPILING = {"jit": "on", "jit_above_cost": "0"}
LOOKING = ("doctor", "plan", "status", "verify")

ON_PACKAGED = pytest.mark.parametrize("db", ["packaged_cluster"], indirect=True, ids=["packaged"])

# What makes our queries slow, each with a value that does.
MISGUIDING = {
    **dict.fromkeys(("enable_indexscan", "enable_indexonlyscan", "enable_bitmapscan", "enable_nestloop"), "off"),
    **dict.fromkeys(("random_page_cost", "cpu_index_tuple_cost"), "1000"),
    **dict.fromkeys(("parallel_setup_cost", "min_parallel_table_scan_size"), "0"),
    "geqo_threshold": "2",
    "join_collapse_limit": "100",
}
MISLED_BY = f"""
SELECT name FROM pg_settings WHERE name = ANY ('{{{",".join(MISGUIDING)}}}') AND setting <> boot_val"""


# ── JIT ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def compiled(cluster: embedded.Cluster, role: str) -> list[str]:
    """Return what the role ran and PostgreSQL compiled first, the statements within DO blocks, too."""
    with psycopg.connect(cluster.url) as connection:
        counted = "SELECT left(query, 300) FROM pg_stat_statements WHERE userid = %s::regrole AND jit_functions > 0"
        return [str(query) for (query,) in connection.execute(counted, [role])]


@pytest.fixture
def eager(db: Db) -> Iterator[str]:
    """A role for whom PostgreSQL compiles whatever it plans."""
    if db.value("SELECT current_setting('server_version_num')::int < 150000"):
        pytest.skip("pg_stat_statements does not count what is compiled: new in PostgreSQL 15")
    with role_with(db, COMPILING | {"pg_stat_statements.track": "all"}) as role:
        with psycopg.connect(db.url_as(role)) as connection:
            connection.execute("SELECT 'so that it is seen'")
        assert len(compiled(db.cluster, role)) == 1
        with psycopg.connect(db.cluster.url) as connection:
            connection.execute("SELECT pg_stat_statements_reset(%s::regrole)", [role])
        yield role


STATES = {
    "empty": "",
    "old, with values to keep and indexes to build": with_uuid(),
    "a column of another type": by_hand() + "ALTER TABLE slots ADD COLUMN must_keep text",
    "rows that point to nothing": by_hand("bigint", ORPHANS),
}


@ON_PACKAGED
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_no_statement_of_ours_is_compiled(db: Db, eager: str, state: str) -> None:
    """Compiling takes longer than running, and others wait for our locks meanwhile."""
    db.execute(state)
    for task in (*LOOKING, "rehearse", "setup", *LOOKING, "setup"):
        done = db.invoke(task, role=eager)
        assert done.code in (0, 5, 6), done
    assert compiled(db.cluster, eager) == []


@ON_PACKAGED
def test_no_statement_of_a_script_is_compiled(db: Db, eager: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.sql"
    file.write_text(db.invoke("plan", "--sql", role=eager).out)
    assert_done(db, db.psql("-f", str(file), role=eager))
    assert compiled(db.cluster, eager) == []


@ON_PACKAGED
@pytest.mark.parametrize("task", ["plan", "setup", "rehearse"])
def test_no_look_at_who_holds_a_lock_is_compiled(db: Db, eager: str, task: str) -> None:
    db.execute(with_uuid())
    with holding(db, "LOCK TABLE slots IN ROW EXCLUSIVE MODE") as holder:
        done = db.invoke(task, role=eager, env={"LOCK_TIMEOUT": "200ms", "LOCK_WAIT": "0"})
        assert done.code == (0 if task == "plan" else 7), done
        assert f"pid {holder.info.backend_pid} " in done.out + done.err
    assert compiled(db.cluster, eager) == []


# ── the planner ────────────────────────────────────────────────────────────────────────────────────────────────────

# What PostgreSQL calls for DDL, in the transactions of the steps and for each statement of a concurrent part.
REFUSE_TO_BE_MISLED = f"""
CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
  IF session_user <> 'postgres'
     AND (EXISTS ({MISLED_BY}) OR current_setting('jit') <> 'off') THEN
    RAISE EXCEPTION 'misled';
  END IF;
END $$;
CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()"""


@pytest.mark.parametrize("state", ["", with_uuid()], ids=["empty", "old"])
def test_nobody_misleads_the_planner_in_a_step_or_a_concurrent_part(db: Db, state: str) -> None:
    db.execute(state)
    db.execute(REFUSE_TO_BE_MISLED)
    with role_with(db, MISGUIDING | {"jit": "on"}) as role:
        assert db.invoke("rehearse", role=role).code == 0
        assert_done(db, db.invoke("setup", role=role))
        assert "misled" in db.psql("-c", "CREATE TABLE by_hand ()", role=role).err


def test_nobody_misleads_the_planner_where_we_look(db: Db) -> None:
    """Each view asks by way of this; afterwards the session is as before."""
    with role_with(db, MISGUIDING) as role, Connection(parse_target(db.url_as(role)), Settings(None, "")) as database:
        [during] = database.ask([MISLED_BY])
        [afterwards] = database.run([MISLED_BY])
    assert during == []
    assert {name for (name,) in afterwards} == set(MISGUIDING)
