"""The doctor: what is wrong is found, on real servers, and its exit code is the one that setup ends with."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pooler as poolers
import psycopg
import pytest
import states
import supabase
from budget_engine import errors
from budget_engine.commands import doctor as doctors
from budget_engine.commands.doctor import NOTE, OK, PROBLEM, Finding, Limit
from budget_engine.migration.survey import Server
from budget_engine.postgres import connection, embedded
from budget_engine.postgres.embedded import Cluster, Health
from budget_engine.settings import completed, parse_target
from conftest import Db, Run, clean_environment, database, holding, role_with, run
from pooler import Pooler
from terminal import on_terminal
from test_command_line import copied, peer, recipe, refuse_password, speak_http

PASSWORD = "two words and S3cret%21"
SPOKEN = ("two words", "words and", "S3cret")
needs_pgbouncer = pytest.mark.skipif(
    poolers.PROGRAM is None or poolers.CONFIGURATION is None, reason="pgbouncer, or Debian's pgbouncer.ini, is not here"
)


def page(done: Run, code: int) -> dict[str, str]:
    """Return topic → its worst state; what must be so on each page is checked here."""
    lines = done.out.splitlines()
    assert done.code == code, done
    assert lines[-1].startswith(f"setup would end with exit {code}" if code else "setup could run"), done
    assert done.err == "", done
    assert not [word for word in (*SPOKEN, "Traceback") if word in done.out], done
    found: dict[str, list[str]] = {}
    for line in re.split(r"^(?=\w+ +\w+ )", done.out, flags=re.M):
        if match := re.match(rf"({OK}|{NOTE}|{PROBLEM}) +(\w+) ", line):
            found.setdefault(match[2], []).append(match[1])
            assert ("what to do: " in line) == (match[1] != OK), line
    assert found["python"] == [OK], done
    return {topic: max(given, key=[OK, NOTE, PROBLEM].index) for topic, given in found.items()}


def amiss(done: Run, code: int) -> dict[str, str]:
    """Return the topics that are not ok."""
    return {topic: state for topic, state in page(done, code).items() if state != OK}


# ── nothing wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_healthy_database_before_and_after_setup(db: Db) -> None:
    before = db.dump()
    first = db.invoke("doctor")
    shown = completed(parse_target(db.url), ".env").display
    assert first.out.splitlines()[0] == f"target   {shown} (environment variable DATABASE_URL)"
    assert set(page(first, 0).values()) == {OK}
    assert {"login", "tls", "server", "schema", "checks", "rights"} <= set(page(first, 0))
    assert db.dump() == before
    assert db.invoke("setup").code == 0
    assert set(page(db.invoke("doctor"), 0).values()) == {OK}


# ── what setup would end with ──────────────────────────────────────────────────────────────────────────────────────

# What stands, what is added to the URL; exit code, topic.
HINDRANCES = {
    "another feature's table": (states.ANOTHER_FEATURE, "", 6, "checks"),
    "no schema": ("", "&schema=nowhere", 1, "schema"),
    "read-only": ("ALTER DATABASE {0} SET default_transaction_read_only = on", "", 8, "writes"),
    "no such database": ("", "&dbname=no_such_database", 4, "login"),
}


@pytest.mark.parametrize(("sql", "query", "code", "topic"), HINDRANCES.values(), ids=HINDRANCES)
def test_hindrance(db: Db, sql: str, query: str, code: int, topic: str) -> None:
    db.execute(sql.replace("{0}", db.name))
    url = {"DATABASE_URL": db.url + query}
    assert amiss(db.invoke("doctor", env=url), code) == {topic: PROBLEM}
    assert db.invoke("setup", env=url).code == code


def test_path_that_leads_into_a_schema_of_the_servers(db: Db, role: str) -> None:
    """Half the steps would run, then one would be refused, or its table be gone with the session."""
    db.execute(states.by_hand())
    before = db.dump()
    tasks = ("verify", "status --check", "plan", "plan --sql", "rehearse", "setup")
    for path in ("information_schema, public", "pg_temp, public", "pg_catalog"):
        db.execute(f"ALTER DATABASE {db.name} SET search_path = {path}")
        for user, task in [*(("postgres", task) for task in tasks), (role, "setup")]:
            done = db.invoke(*task.split(), role=user)
            assert (done.code, "?schema=" in done.err) == (1, True), (task, done)
        page(db.invoke("doctor", role=role), 1)
    assert db.invoke("doctor", env={"DATABASE_URL": f"{db.url}&schema=public"}).code == 0
    db.execute(f"ALTER DATABASE {db.name} RESET search_path")
    assert db.dump() == before


def test_path_that_names_pg_catalog_leads_to_the_schema_behind_it(db: Db) -> None:
    """It is searched anyway, and nothing is ever made there."""
    db.execute(f"ALTER DATABASE {db.name} SET search_path = pg_catalog, public")
    for lost in ("", "DROP INDEX idx_games_owner; ALTER TABLE prompt_snapshots DROP COLUMN budget_report"):
        db.execute(lost)
        assert db.invoke("setup").code == 0
        assert db.invoke("verify").code == 0
    db.execute(f"ALTER DATABASE {db.name} RESET search_path")
    assert db.differing() == {}


@pytest.fixture(scope="module")
def role(cluster: Cluster) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    name = f"doctor_{os.getpid()}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN")
        yield name
        connection.execute(f"DROP ROLE {name}")


OWNED = states.by_hand() + states.OWN

# What would stop setup half way: a state for role {role}; whether it is Supabase's; the right that is lacking.
RIGHTS = {
    "users": ("GRANT USAGE ON SCHEMA auth TO {role}", True, "REFERENCES on table auth.users"),
    "their schema": ("GRANT REFERENCES ON auth.users TO {role}", True, "USAGE on schema auth"),
    "whom policies ask": (
        "CREATE TABLE profiles (id uuid, role text);" + OWNED + "GRANT REFERENCES ON auth.users TO {role}",
        True,
        "USAGE on schema auth",
    ),
    "part of the core": (
        states.CORE[: states.CORE.index("CREATE TABLE IF NOT EXISTS rulesets")],
        False,
        "REFERENCES on table worlds",
    ),
}


@pytest.mark.parametrize(("state", "on_supabase", "lacking"), RIGHTS.values(), ids=RIGHTS)
def test_right_that_a_step_would_miss_half_way(db: Db, state: str, on_supabase: bool, lacking: str) -> None:
    if on_supabase:
        supabase.install(db)
    db.execute(f"CREATE ROLE {db.name} LOGIN; GRANT CREATE ON SCHEMA public TO {db.name}")
    try:
        db.execute(state.replace("{role}", db.name))
        before = db.dump(data=True)
        open_to_all = {"anon": NOTE, "profiles": NOTE} if "profiles" in state else {}
        assert amiss(db.invoke("doctor", role=db.name), 8) == {"rights": PROBLEM} | open_to_all
        for task in ("setup",) if on_supabase else ("plan", "rehearse", "setup"):
            done = db.invoke(task, role=db.name)
            assert (done.code, lacking in done.err) == (8, True), done
        assert db.dump(data=True) == before
    finally:
        db.execute(f"DROP OWNED BY {db.name} CASCADE; DROP ROLE {db.name}")


def test_forced_row_security_is_nothing_to_a_role_that_may_pass_it(db: Db) -> None:
    db.execute(states.by_hand() + "ALTER TABLE slots ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    assert amiss(db.invoke("doctor"), 0) == {}
    assert db.invoke("setup").code == 0


def test_rows_that_refuse_are_foretold_as_far_as_is_known(db: Db) -> None:
    """Of a foreign key that exists they are counted, as verify does; of one to be made, nobody says that it can be."""
    db.execute(states.by_hand("bigint", states.ORPHANS))
    assert amiss(db.invoke("doctor"), 0) == {}
    assert "exit 5 where rows refuse foreign key prompt_snapshots (turn_id)" in db.invoke("plan").out
    assert "where no row refuses" in db.invoke("rehearse").out
    assert db.invoke("setup").code == 5
    assert amiss(db.invoke("doctor"), 5) == {"rows": PROBLEM}
    foretold = db.invoke("plan")
    assert (foretold.code, "prompt_snapshots: 1 rows point to nothing" in foretold.err) == (5, True)
    db.execute("UPDATE prompt_snapshots SET turn_id = NULL WHERE turn_id = 999999")
    assert amiss(db.invoke("doctor"), 0) == {}
    assert db.invoke("setup").code == 0


def test_read_only_and_in_the_way_are_both_said(role: str, db: Db) -> None:
    db.execute(states.ANOTHER_FEATURE + f"ALTER DATABASE {db.name} SET default_transaction_read_only = on")
    assert amiss(db.invoke("doctor", role=role), 6) == {"checks": PROBLEM, "writes": PROBLEM, "rights": PROBLEM}
    assert db.invoke("setup", role=role).code == 6


def test_read_only_where_nothing_is_to_do(finished: Db) -> None:
    finished.execute(f"ALTER DATABASE {finished.name} SET default_transaction_read_only = on")
    assert amiss(finished.invoke("doctor"), 0) == {"writes": NOTE}


def test_table_that_somebody_keeps_locked(finished: Db) -> None:
    with holding(finished, "LOCK TABLE slots IN ACCESS EXCLUSIVE MODE") as other:
        done = finished.invoke("doctor", env={"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "60s"})
        assert amiss(done, 7) == {"checks": PROBLEM}
        assert f"pid {other.info.backend_pid}" in done.out
        assert finished.invoke("setup", env={"LOCK_TIMEOUT": "300ms", "LOCK_WAIT": "0"}).code == 7


# ── settings ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of its own, to which a test may add files."""
    return copied(tmp_path / "checkout")


def doctor(**environment: str) -> Run:
    return run([sys.executable, "-m", "invoke", "doctor"], clean_environment() | environment)


@pytest.mark.parametrize(
    "given", [{"DATABASE_URL": "mysql://u:p@h/db"}, {"DATABASE_URL": ""}, {"LOCK_TIMEOUT": "soon"}]
)
def test_unusable_settings(tmp_path: Path, given: dict[str, str]) -> None:
    found = page(doctor(**given, BUDGET_ENGINE_POSTGRES=str(tmp_path / "postgres")), 3)
    assert found == {"python": OK, "settings": PROBLEM}
    assert list(tmp_path.iterdir()) == []


def test_what_is_odd_in_the_url_and_in_the_env_file(tree: Path, db: Db) -> None:
    (tree / ".env").write_text(f"DATABASE_URL=x\nDATABASE_URL={db.url}&pgbouncer=true\nnot a line\n")
    done = recipe(tree, "doctor")
    assert amiss(done, 0) == {"settings": NOTE}
    assert len(re.findall(rf"^{NOTE} +settings ", done.out, re.M)) == 3


# ── the embedded server ────────────────────────────────────────────────────────────────────────────────────────────


def test_embedded_server_in_each_of_its_states() -> None:
    with tempfile.TemporaryDirectory(prefix="be-") as name:  # whose path is short enough for a socket
        place = Path(name)
        place.chmod(0o755)
        cluster = embedded.locate(place)

        def found(code: int = 0, url: str = "embedded") -> dict[str, str]:
            return page(doctor(DATABASE_URL=url, BUDGET_ENGINE_POSTGRES=f"{place}/.postgres"), code)

        assert found() == {"python": OK, "embedded": OK}  # it is not started
        assert not cluster.data.parent.exists()
        try:
            embedded.start(cluster)
            assert {"embedded": OK, "login": OK, "checks": OK}.items() <= found().items()
            assert found(3, "") == {"python": OK, "settings": PROBLEM, "embedded": OK}
            os.kill(embedded.health(cluster).pid or 0, signal.SIGKILL)
            assert embedded._until(lambda: not embedded._listening(cluster), 10)
            assert found() == {"python": OK, "embedded": NOTE}
            embedded.start(cluster)
        finally:
            embedded.stop(cluster)
        assert found() == {"python": OK, "embedded": OK}
        assert not embedded.running(cluster)
        cluster.data.parent.chmod(0o755)  # others can enter
        assert found(4) == {"python": OK, "embedded": PROBLEM}


def test_binaries_that_are_not_there_or_do_not_run(tree: Path, db: Db) -> None:
    package = tree / embedded.PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    assert amiss(recipe(tree, "doctor"), 4) == {"embedded": PROBLEM}
    program = package / embedded.INSTALLATIONS[18] / "bin" / "postgres"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\nexit 127\n")
    program.chmod(0o755)
    assert amiss(recipe(tree, "doctor"), 4) == {"embedded": PROBLEM}
    assert amiss(recipe(tree, "doctor", DATABASE_URL=db.url), 0) == {}


def test_embedded_server_that_takes_no_connections() -> None:
    health = Health(running=False, pid=7, made=True, complaint="", version="postgres (PostgreSQL) 18.4")
    cluster = Cluster(Path("/d/data"), Path("/d"), Path("/b"))
    assert doctors.health_of(cluster, health, in_use=True).state == NOTE
    killed = doctors.health_of(cluster, replace(health, pid=None, complaint="LOG: a\nPANIC: b"), in_use=True)
    assert (killed.state, "PANIC: b" in killed.what, "LOG: a" in killed.what) == (NOTE, True, False)


# ── names, ports, sockets ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["127.0.0.1:1,no-such-host.invalid:2/db", "xn--.a..b/db", f"/db?host=/{'x' * 160}"])
def test_nobody_there(where: str) -> None:
    url = f"postgresql://somebody:{PASSWORD}@{where}".replace(" ", "%20")
    assert amiss(doctor(DATABASE_URL=url), 4) == {"login": PROBLEM}


@pytest.mark.parametrize(
    ("said", "helps"),
    [
        ('connection to server at "h" (2001:db8::1), port 5432 failed: Network is unreachable', errors.NO_ROUTE),
        ('"h" (2001:db8::1), port 1 failed: Cannot assign requested address\n\tIs the server', errors.NO_ROUTE),
        ('"h" (2001:db8::1), port 1 failed: Network is unreachable\n"h" (203.0.113.7), port 1 failed: timeout expired',
         errors.SILENT_HOST),
        ('"h" (2001:db8::1), port 1 failed: Connection refused', errors.NOBODY_THERE),
        ('"h" (203.0.113.7), port 1 failed: Network is unreachable', errors.SILENT_HOST),
    ],
)  # fmt: skip
def test_way_that_leads_nowhere(said: str, helps: errors.Case) -> None:
    """A host with IPv6 addresses only, Supabase's direct ones say, where this machine cannot go there."""
    assert connection._cause(said) is helps


# ── the login ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("talk", [speak_http, refuse_password])
def test_peer_that_is_no_server(talk: Callable[[socket.socket], None]) -> None:
    """No part of the password is shown, though it comes back."""
    with peer(talk) as port:
        done = doctor(DATABASE_URL=f"postgresql://somebody:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}/db")
    assert amiss(done, 4) == {"login": PROBLEM}
    assert ("***" in done.out.partition("PROBLEM")[2]) == (talk is refuse_password)


def test_secret_is_masked_before_lines_are_wrapped(db: Db) -> None:
    """The schema has the password's name, with blanks in it."""
    word = PASSWORD.replace(" ", "%20")
    url = db.url.replace("postgres@", f"postgres:{word}@") + f"&schema={word}"
    for columns in range(60, 101, 20):
        seen = on_terminal(db, "doctor", columns=columns, url=url, env={"NO_COLOR": "1"})
        assert amiss(replace(seen, out=seen.out.replace("\r\n", "\n")), 1) == {"schema": PROBLEM}


# ── the session ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_that_bite(db: Db) -> None:
    """Setup lifts the others."""
    lifted = {"statement_timeout": "1s", "lock_timeout": "1ms", "idle_in_transaction_session_timeout": "1ms"}
    biting = {"idle_session_timeout": "3s", "session_replication_role": "replica"}
    with role_with(db, lifted | biting | {"default_transaction_isolation": "serializable"}) as role:
        done = db.invoke("doctor", role=role)
        assert amiss(done, 0) == {"limits": NOTE}
        assert re.findall(rf"^{NOTE} +limits +(\w+) = ", done.out, re.M) == list(biting)
        assert db.invoke("setup", role=role).code == 0


def test_tables_behind_the_first_schema(finished: Db) -> None:
    finished.execute("CREATE SCHEMA app")
    done = finished.invoke("doctor", env={"DATABASE_URL": f"{finished.url}&search_path=app,public"})
    assert amiss(done, 0) == {"schema": NOTE}
    assert "this is about schema public; app, where new tables go, has none" in " ".join(done.out.split())


# Event triggers: when they fire, at which commands, whether they are enabled; whether one can fire in a step.
EVENT_TRIGGERS = {
    "any_command": ("ddl_command_start", "", "ENABLE", True),
    "of_tables": ("ddl_command_end", "'CREATE TABLE', 'DROP TABLE'", "ENABLE", True),
    "of_functions": ("ddl_command_end", "'CREATE FUNCTION'", "ENABLE", True),
    "of_extensions": ("ddl_command_end", "'CREATE EXTENSION'", "ENABLE", False),
    "dropped": ("sql_drop", "", "ENABLE", True),
    "rewritten": ("table_rewrite", "", "ENABLE", False),
    "disabled": ("ddl_command_start", "", "DISABLE", False),
    "of_a_replica": ("ddl_command_start", "", "ENABLE REPLICA", False),
    "always": ("ddl_command_start", "", "ENABLE ALWAYS", True),
}


def test_event_triggers_are_named_where_they_can_fire(db: Db) -> None:
    def named(also: dict[str, str]) -> set[str]:
        done = db.invoke("doctor")
        assert amiss(done, 0) == {"triggers": NOTE} | also
        said = re.search("may refuse them: (.+)", done.out)
        return set(said[1].split(", ")) if said else set()

    db.execute("CREATE FUNCTION look() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'")
    for name, (event, tags, enabled, _) in EVENT_TRIGGERS.items():
        at = f"WHEN TAG IN ({tags})" if tags else ""
        db.execute(f"CREATE EVENT TRIGGER {name} ON {event} {at} EXECUTE FUNCTION look();"
                   f"ALTER EVENT TRIGGER {name} {enabled}")  # fmt: skip
    firing = {name for name, (*_, fires) in EVENT_TRIGGERS.items() if fires}
    assert named({}) == firing
    assert db.invoke("setup").code == 0
    assert amiss(db.invoke("doctor"), 0) == {}
    db.execute("ALTER TABLE prompt_snapshots DROP COLUMN budget_report; DROP SCHEMA budget_engine CASCADE")
    assert named({}) == firing
    db.execute(f"ALTER DATABASE {db.name} SET session_replication_role = replica")
    assert named({"limits": NOTE}) == {"of_a_replica", "always"}
    db.execute(f"ALTER DATABASE {db.name} SET session_replication_role = local")
    assert named({}) == firing


def test_every_command_that_setup_sends_is_known_to_the_doctor(db: Db) -> None:
    """By the server's own account of them."""
    db.execute(
        states.with_uuid()
        + """
        CREATE TABLE sent (tag text, event text);
        CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql
          AS 'BEGIN INSERT INTO public.sent VALUES (tg_tag, tg_event); END';
        CREATE EVENT TRIGGER started ON ddl_command_start EXECUTE FUNCTION note();
        CREATE EVENT TRIGGER dropped ON sql_drop EXECUTE FUNCTION note();
        CREATE EVENT TRIGGER rewritten ON table_rewrite EXECUTE FUNCTION note()"""
    )
    with database(db.cluster, db.name) as copy:
        assert db.invoke("setup").code == 0
        sent = db.rows("SELECT DISTINCT tag, event FROM sent")
        copy.execute("DROP EVENT TRIGGER started; DROP EVENT TRIGGER dropped; DROP EVENT TRIGGER rewritten")
        for number, (tag, event) in enumerate(sent):
            copy.execute(f"CREATE EVENT TRIGGER t_{number} ON {event} WHEN TAG IN ('{tag}') EXECUTE FUNCTION note()")
        done = copy.invoke("doctor")
    assert {("CREATE TABLE", "ddl_command_start"), ("ALTER TABLE", "ddl_command_start")} <= set(sent)
    named = re.findall(r"t_\d+", done.out)
    assert [kind for number, kind in enumerate(sent) if f"t_{number}" not in named] == []


# ── through a pooler ───────────────────────────────────────────────────────────────────────────────────────────────


@needs_pgbouncer
def test_pooler(db: Db) -> None:
    with role_with(db, {"statement_timeout": "5s"}) as role, Pooler(db.cluster, roles=("postgres", role)) as pooler:
        done = db.invoke("doctor", env={"DATABASE_URL": pooler.url(db)})
        assert amiss(done, 0) == {}
        assert "through a pooler" in done.out
        assert amiss(db.invoke("doctor", env={"DATABASE_URL": pooler.url(db, role)}), 0) == {"limits": NOTE}


# ── what facts mean ────────────────────────────────────────────────────────────────────────────────────────────────

SERVER = Server("18.4", "ada", "game", ("public",), None, "public", pooled=False)
SPOKEN_TLS = "TLSv1.3, TLS_AES_256_GCM_SHA384"


@pytest.mark.parametrize(
    ("how", "sslmode", "is_near", "state"),
    [
        (SPOKEN_TLS, "verify-ca", False, OK),
        ("TLS", "verify-full", False, OK),  # to the pooler; behind it there may be none
        (SPOKEN_TLS, "prefer", False, NOTE),
        ("", "prefer", False, NOTE),
        ("", "prefer", True, OK),
    ],
)
def test_tls(how: str, sslmode: str, is_near: bool, state: str) -> None:
    assert doctors.tls(how, sslmode=sslmode, is_near=is_near).state == state


@pytest.mark.parametrize(
    ("name", "ms", "pooled", "state"),
    [
        ("transaction_timeout", 2000, False, NOTE),
        ("transaction_timeout", 60_000, False, OK),
        ("transaction_timeout", 60_000, True, NOTE),
        ("statement_timeout", 100, False, OK),
        ("statement_timeout", 100, True, NOTE),
        ("lock_timeout", 100, True, NOTE),
        ("idle_session_timeout", 1000, False, NOTE),
        ("idle_session_timeout", 600_000, False, OK),
        ("idle_session_timeout", 1000, True, OK),
    ],
)
def test_limits(name: str, ms: int, pooled: bool, state: str) -> None:
    brought = [Limit(name, ms, f"{ms}ms", "user")]
    [finding] = doctors.limits(replace(SERVER, pooled=pooled), brought, "origin", lock_timeout_ms=2000)
    assert finding.state == state
    assert name in finding.what
    assert (f'ALTER ROLE "ada" SET {name} = 0;' in finding.remedy) == (state == NOTE)


def test_limit_of_ones_own_is_not_the_roles() -> None:
    brought = [Limit("idle_session_timeout", 1, "1ms", "client")]
    [finding] = doctors.limits(SERVER, brought, "origin", lock_timeout_ms=2000)
    assert "ALTER ROLE" not in finding.remedy


def test_verdict_is_that_of_the_first_problem() -> None:
    fine, note, first, second = (Finding("a", "x"), Finding("b", "x", "y"), Finding("c", "x", "y", 8),
                                 Finding("d", "x", "y", 4))  # fmt: skip
    assert doctors.verdict([fine, note, first, second]) == ("setup would end with exit 8: 2 problems, 1 note", 8)
    assert doctors.verdict([fine, note])[1] == 0


def test_lines_are_aligned() -> None:
    lines = doctors.lines(Finding("network", "words", "broken for\nwider lines:\nSELECT 1;"))
    assert {line[:23].strip() for line in lines[1:]} == {""}
    assert [line.strip() for line in lines[-2:]] == ["what to do: broken for wider lines:", "SELECT 1;"]


def test_schemas_of_the_path_that_are_not_there(db: Db) -> None:
    r"""Supabase's roles have \$user for $user."""
    for path, absent in {
        r'"\$user", public, pg_temp': "",
        r'"$user", PUBLIC, "no, such ""one", NOWHERE,nowhere,  public, "Public"': 'Public no, such "one nowhere',
    }.items():
        with db.connect() as connection:
            connection.execute("SELECT set_config('search_path', %s, false)", [path])
            connection.execute(f"ALTER DATABASE {db.name} SET search_path FROM CURRENT".encode())
        assert db.value("SELECT current_setting('search_path')") == path
        done = db.invoke("doctor")
        assert amiss(done, 0) == ({"schema": NOTE} if absent else {})
        assert " ".join(re.findall(r": (.+) does not exist, or is closed", done.out)) == absent, done
