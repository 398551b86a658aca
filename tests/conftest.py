"""One embedded server per test process; one database per test; the recipes run as users run them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import os
import platform
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
import warm
from budget_engine.errors import RecipeError
from budget_engine.migration import chain, survey, turn
from budget_engine.migration.chain import ROOT
from budget_engine.migration.checks import Check
from budget_engine.output.console import CONSOLE, Console
from budget_engine.postgres import embedded
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, parse_target
from invoke.collection import Collection
from invoke.program import Program
from versions import MAJOR, PACKAGED, concern, locate, packaged

# A suite that a script runs in the background is started with Ctrl-C ignored; all that it starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Where the user's own data lies: no server of ours may go there.
os.environ.pop(embedded.DATA_VARIABLE, None)

MIGRATIONS = ROOT / "db" / "migrations"
# What a run in the schema public has for itself, and others wait for.
THE_TURN = f"SELECT pg_advisory_xact_lock({turn.RUN}, 'public'::regnamespace::oid::int4)"
# Our sessions; how many there are, how many of them wait for a lock, and how many do so in a build.
OURS = "application_name = 'budget-engine-recipes' AND datname = current_database()"
RUNNING = f"SELECT count(*) FROM pg_stat_activity WHERE {OURS}"
WAITING = f"SELECT count(*) FROM pg_stat_activity WHERE {OURS} AND wait_event_type = 'Lock'"
BUILDING = f"{WAITING} AND query LIKE 'CREATE INDEX CONCURRENTLY%'"
# Those that gave back the turn of others' which they could not have, and ask again later.
BETWEEN_TRIES = f"SELECT pid FROM pg_stat_activity WHERE {OURS} AND query LIKE '%pg_advisory_unlock%'"
# Somebody's event trigger, which acts in our sessions when a DDL command is done; and what takes it away.
TRAP = """
CREATE SCHEMA trap;
CREATE SEQUENCE trap.commands;
CREATE FUNCTION trap.spring() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
  IF current_setting('application_name') = 'budget-engine-recipes' AND {condition} THEN {action}; END IF;
END $$;
CREATE EVENT TRIGGER trap ON ddl_command_end EXECUTE FUNCTION trap.spring()"""
UNTRAP = "DROP EVENT TRIGGER trap; DROP SCHEMA trap CASCADE"
# Making a database takes a tenth of the time in memory, if there is room: a container's /dev/shm often has 64 MB.
MEMORY, NEEDED = Path("/dev/shm"), 2 << 30
# FAULT_SEED repeats a sample of faults; the processes of one pytest -n have to draw the same one.
SEED = os.environ.get("FAULT_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(random.randrange(10**6))


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


@dataclass(frozen=True)
class Db:
    """A database of a test's own, and the ways into it."""

    cluster: embedded.Cluster
    name: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Its URL, as superuser."""
        return self.url_as("postgres")

    def url_as(self, role: str) -> str:
        """Its URL for another role (trust authentication: any role may come in)."""
        return f"postgresql://{role}@/{self.name}?host={quote(str(self.cluster.sockets), safe='')}"

    def connect(self, role: str = "postgres", *, autocommit: bool = True) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a connection of its own, to see what others see or to hold what they want; it compiles nothing."""
        return psycopg.connect(self.url_as(role), autocommit=autocommit, options="-c jit=off")

    def execute(self, sql: str) -> None:
        """Run SQL, several statements in one transaction."""
        with self.connect() as connection:
            connection.execute(sql)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with self.connect() as connection:
            return connection.execute(sql).fetchall()

    def value(self, sql: str) -> Any:
        """Return the first column of the first row."""
        return self.rows(sql)[0][0]

    def invoke(self, *words: str, role: str = "postgres", env: Mapping[str, str] | None = None) -> Run:
        """Run `invoke WORDS…` on this database, as users do: a process of its own (see warm)."""
        return Run(*warm.run(words, self._environment(role, env), timeout=120))

    def call(self, *words: str, role: str = "postgres", env: Mapping[str, str] | None = None) -> Run:
        """Run it in this process, in two thirds of the time, where a test is about nothing that a process has alone."""
        return call(menu(), words, self._environment(role, env))

    def _environment(self, role: str, env: Mapping[str, str] | None) -> dict[str, str]:
        return clean_environment() | {"DATABASE_URL": self.url_as(role)} | self.environment | dict(env or {})

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Start `invoke WORDS…` on this database, to be watched, signalled and waited for (see until, ended)."""
        environment = clean_environment() | {"DATABASE_URL": self.url} | env
        return warm.start(words, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def psql(self, *arguments: str, role: str = "postgres") -> Run:
        """Run psql with ON_ERROR_STOP; its exit code is 3 where a statement failed."""
        program = str(self.cluster.binaries / "psql")
        return run([program, self.url_as(role), "-XqAt", "-v", "ON_ERROR_STOP=1", *arguments], clean_environment())

    def by_psql(self, *stems: str, before: str = "", role: str = "postgres") -> Run:
        """Run migrations by hand, one after the other, errors with their SQLSTATE; before: SQL for that session."""
        files = [word for stem in stems for word in ("-f", str(MIGRATIONS / f"{stem}.sql"))]
        return self.psql("-v", "VERBOSITY=verbose", "-c", before, *files, role=role)

    def migrate(self, *stems: str, role: str = "postgres") -> None:
        """Run migrations by hand; a failure fails the test."""
        succeeded(self.by_psql(*stems, role=role))

    def checks(self) -> list[Check]:
        """Return every check of db/verify.sql, as the survey reads them."""
        with Connection(parse_target(self.url), Settings(None, "")) as connection:
            return list(survey.read(connection, chain.load(), with_recreate=True).checks)

    def differing(self) -> dict[str, tuple[str, str | None, str | None]]:
        """Return title → (expected, actual, fixed_by) of every required check that does not pass."""
        return {c.title: (c.expected, c.actual, c.fixed_by) for c in self.checks() if c.required and not c.passed}

    def failing(self, step: str) -> list[str]:
        """Return the titles of the required checks of a step (its label) that do not pass."""
        return [c.title for c in self.checks() if c.step == step and c.required and not c.passed]

    def history(self) -> list[tuple[str, str]]:
        """Return (step, part) of every line of the history, in order."""
        there = self.value("SELECT to_regclass('budget_engine.history') IS NOT NULL")
        return (
            [(s, p) for s, p in self.rows("SELECT step, part FROM budget_engine.history ORDER BY id")] if there else []
        )

    def transactions(self) -> list[str]:
        """Return the steps whose transaction stands in the history, in order."""
        return [step for step, part in self.history() if part == "transaction"]

    def dump(self, *, data: bool = False) -> str:
        """Return the schema (and rows) as pg_dump writes it, the history left out: equal dumps, equal databases."""
        program = str(self.cluster.binaries / "pg_dump")
        words = [program, self.url, "--restrict-key=test", "--exclude-schema=budget_engine"]
        done = run(words if data else [*words, "--schema-only"], clean_environment() | {"PGOPTIONS": "-c jit=off"})
        assert done.code == 0, done
        return re.sub(r"^-- (Dumped|Started|Completed).*\n", "", done.out, flags=re.M)

    def fingerprint(self) -> str:
        """Say which version of which row is where, in the catalogs and in the tables: equal where nothing was changed.

        In a third of the time that pg_dump takes; what was done and undone again differs.
        """
        catalogs = (
            "class attribute attrdef constraint index proc trigger policy description namespace type rewrite depend"
            " default_acl event_trigger publication publication_rel statistic_ext enum"
        )
        rows = " UNION ALL ".join(f"SELECT '{name}', (ctid, xmin)::text FROM pg_{name}" for name in catalogs.split())
        of_tables = """
            SELECT coalesce(string_agg(format(' UNION ALL SELECT %L, %s::text FROM ONLY %s', oid,
              CASE relkind WHEN 'S' THEN '(last_value, is_called)' ELSE '(ctid, xmin)' END, oid::regclass), ''), '')
            FROM pg_class WHERE relkind IN ('r', 'S') AND oid >= 16384"""
        every = f"{rows}{self.value(of_tables)}"
        return str(self.value(f"SELECT md5(string_agg(rows::text, '' ORDER BY rows::text)) FROM ({every}) AS rows"))


def as_text(row: tuple[Any, ...]) -> tuple[str | None, ...]:
    """Write a row as the simple query protocol does."""
    return tuple(None if v is None else "ft"[v] if isinstance(v, bool) else str(v) for v in row)


def clean_environment() -> dict[str, str]:
    """Our environment without what would lead a recipe, or libpq, elsewhere."""
    ours = {"DATABASE_URL", "CI", "LOCK_TIMEOUT", "LOCK_WAIT", "CONNECT_TIMEOUT", "ENV_FILE"}
    return {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("PG")}


def run(command: list[str], environment: Mapping[str, str], timeout: float = 120, cwd: Path = ROOT) -> Run:
    """Run a command, in the project's folder unless told otherwise; Invoke there as Db.invoke does."""
    if command[:3] == [sys.executable, "-m", "invoke"] and cwd == ROOT:
        return Run(*warm.run(tuple(command[3:]), environment, timeout))
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, errors="replace", timeout=timeout, check=False
    )
    return Run(done.returncode, done.stdout, done.stderr)


@functools.cache
def menu(folder: Path = ROOT) -> Collection:
    """Load the tasks of a project."""
    return runpy.run_path(str(folder / "tasks.py"))["namespace"]  # type: ignore[no-any-return]


def call(tasks: Collection, words: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run tasks as Invoke does, in this process, whose console is as in a new one."""
    vars(CONSOLE).update(vars(Console()))
    code = 0
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ, environment, clear=True):
        try:
            Program(namespace=tasks).run(["invoke", *words])
        except SystemExit as end:
            code = int(end.code or 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # an error's message is protected from Ctrl-C
    return Run(code, out.getvalue(), err.getvalue())


def ended(process: subprocess.Popen[str]) -> Run:
    """Wait for a process, and say how it ended."""
    out, err = process.communicate(timeout=60)
    return Run(process.returncode, out, err)


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Poll for the condition while the process runs."""
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def at_once(db: Db, test: Callable[..., None], cases: Mapping[str, tuple[Any, ...]]) -> None:
    """Run a test's cases side by side, each on a clone of the database: the time that one waits is the others'.

    What reads the survey in this process (Db.checks) is not for them: it answers Ctrl-C, as only the main thread may.
    """

    def on_clone(*values: object) -> None:
        with database(db.cluster, db.name) as clone:
            test(clone, *values)

    with ThreadPoolExecutor(len(cases)) as crowd:
        running = {name: crowd.submit(on_clone, *values) for name, values in cases.items()}
    failed = {name: error for name, case in running.items() if (error := case.exception())}
    if failed:
        first, *_ = failed.values()
        raise AssertionError(f"{len(failed)} of {len(cases)} failed: {'; '.join(failed)}") from first


def quiet(db: Db) -> None:
    """Wait for our sessions to end: a server process goes on with what it was sent when its client is gone."""
    deadline = time.monotonic() + 30
    while db.value(RUNNING):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_done(db: Db, done: Run | None = None) -> Run:
    """A run ended well (one more setup, where none is given), and every required check passes."""
    done = done or db.call("setup")
    assert done.code == 0, done
    assert db.differing() == {}
    return done


def succeeded(done: Run) -> Run:
    """A run ended well."""
    assert done.code == 0, done
    return done


def assert_fails(done: Run, code: int, *words: str) -> None:
    """A run ended so, with one message that has these words, and no traceback."""
    assert done.code == code, done
    assert len(re.findall("^error    ", done.err, re.M)) == 1, done
    assert "Traceback" not in done.err, done
    assert [word for word in words if word not in done.err] == [], done


@contextmanager
def holding(db: Db, sql: str, role: str = "postgres") -> Iterator[psycopg.Connection[Any]]:
    """Another session with an open transaction which has run this."""
    with db.connect(role, autocommit=False) as holder:
        holder.execute("SET application_name = 'the other one'")
        holder.execute(sql.encode())
        yield holder
        with suppress(psycopg.OperationalError):  # the server may have ended its session
            holder.rollback()


@contextmanager
def role_with(db: Db, settings: Mapping[str, str]) -> Iterator[str]:
    """A superuser of the database's name who brings these settings along."""
    db.execute(f"CREATE ROLE {db.name} LOGIN SUPERUSER")
    db.execute(";".join(f"ALTER ROLE {db.name} SET {name} = '{value}'" for name, value in settings.items()))
    try:
        yield db.name
    finally:
        db.execute(f"REASSIGN OWNED BY {db.name} TO postgres; DROP OWNED BY {db.name}; DROP ROLE {db.name}")


def postmaster(data: Path) -> int:
    """Return the process id of the server of this data, as its file has it; 0: there is no such file."""
    with suppress(FileNotFoundError):
        return int((data / "postmaster.pid").read_text().split()[0])
    return 0


def place_of_data() -> str:
    """Choose the folder for the servers' data; whoever sets TMPDIR has chosen."""
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK | os.X_OK):
        return tempfile.gettempdir()
    room = min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available)
    return str(MEMORY) if room >= NEEDED else tempfile.gettempdir()


# The first process chooses for all; the name is theirs, not the user's.
DATA = os.environ.setdefault("TEST_DATA", place_of_data())


@contextmanager
def private_server(
    *, major: int = MAJOR, binaries: Path | None = None, durable: bool = False, **settings: str
) -> Iterator[embedded.Cluster]:
    """Run a server of our own, which is gone with its data afterwards.

    major: its version; binaries: a packaged server's, instead; durable: whether it is to survive a power cut; settings:
    of the embedded server's own, which come with each of its starts. While it runs, others are started so, too: a
    fixture that asks for some has cluster started before.
    """
    home = Path(tempfile.mkdtemp(prefix="budget-engine-tests-", dir=None if durable else DATA))
    home.chmod(0o755)  # as root the server runs as another user, who must be able to reach its data
    cluster = embedded.locate(home, int(binaries.parent.name), binaries) if binaries else locate(home, major)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setitem(embedded.SETTINGS, name, value)
        try:
            _start(cluster)
            if not durable:
                _administer(cluster, "ALTER SYSTEM SET fsync = off")
                _administer(cluster, "SELECT pg_reload_conf()")
            yield cluster
        finally:
            embedded.stop(cluster)
            shutil.rmtree(home, ignore_errors=True)


def _start(cluster: embedded.Cluster) -> None:
    """Start it; where it does not, show the server's own words, which an error's one sentence leaves out."""
    try:
        embedded.start(cluster)
    except RecipeError as error:
        raise AssertionError(f"{error}\n{error.where}") from error


@contextmanager
def database(cluster: embedded.Cluster, template: str = "template0", options: str = "") -> Iterator[Db]:
    """Make a database, which is dropped afterwards, whatever became of the server meanwhile."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        # 14 knows no other; in memory it takes half the time, and of a large one it does not fill the WAL.
        strategy = "STRATEGY file_copy" if connection.info.server_version >= 150000 else ""
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} {strategy} {options}".encode())
    try:
        yield Db(cluster, name)
    finally:
        embedded.start(cluster)
        _administer(cluster, f"DROP DATABASE {name} WITH (FORCE)")


def _administer(cluster: embedded.Cluster, command: str) -> None:
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(command.encode())


@pytest.fixture(scope="session")
def cluster() -> Iterator[embedded.Cluster]:
    """The server of this test process."""
    with private_server() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def role(cluster: embedded.Cluster) -> str:
    """A role that may log in, and nothing else; what a test gives it goes with the test's database."""
    _administer(cluster, "CREATE ROLE somebody LOGIN")
    return "somebody"


@pytest.fixture(scope="session")
def packaged_cluster() -> Iterator[embedded.Cluster]:
    """A packaged server of this test process: it can compile queries (JIT), and counts which it did compile."""
    binaries = packaged()
    if binaries is None:
        pytest.skip(f"no packaged PostgreSQL in {PACKAGED}")
    with private_server(binaries=binaries) as cluster:
        with psycopg.connect(cluster.url, autocommit=True) as connection:
            if connection.execute("SELECT pg_jit_available()").fetchone() == (False,):
                pytest.skip(f"the PostgreSQL in {binaries.parent} has no JIT")
            connection.execute("ALTER SYSTEM SET shared_preload_libraries = pg_stat_statements")
        embedded.stop(cluster)
        _start(cluster)
        _administer(cluster, "CREATE EXTENSION pg_stat_statements")
        yield cluster


# For tests of locks: a server as most users have it holds them no longer, or otherwise, than our own.
PACKAGED_TOO, FINISHED_PACKAGED_TOO = (
    pytest.mark.parametrize(fixture, ["cluster", "packaged_cluster"], indirect=True, ids=["", "packaged"])
    for fixture in ("db", "finished")
)


@functools.cache
def template(cluster: embedded.Cluster) -> str:
    """Make a database that setup has finished, to be cloned: a tenth of the time that setup takes."""
    name = f"template_{uuid.uuid4().hex}"
    _administer(cluster, f"CREATE DATABASE {name} TEMPLATE template0")
    assert_done(Db(cluster, name))
    return name


@pytest.fixture
def finished(request: pytest.FixtureRequest) -> Iterator[Db]:
    """As db, but setup has been there."""
    cluster = request.getfixturevalue(getattr(request, "param", "cluster"))
    with database(cluster, template(cluster)) as db:
        yield db


@pytest.fixture
def db(request: pytest.FixtureRequest) -> Iterator[Db]:
    """An empty database, dropped after the test; parametrized: on the server that a fixture of that name gives."""
    with database(request.getfixturevalue(getattr(request, "param", "cluster"))) as db:
        yield db


def once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """Return a folder that the first test process that wants it fills for all of them; nobody changes it."""
    own = factory.getbasetemp()
    folder = (own.parent if own.name.startswith("popen-") else own) / name
    made = folder.with_name(f"{name}.made")
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process whose attempt failed
            folder.mkdir()
            fill(folder)
            made.touch()
    return folder


def wheel(folder: Path, name: str, files: Mapping[str, str | bytes], about: str = "") -> str:
    """Build a package of these files, and return its line in a lock file; about: more lines of its metadata."""
    file, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    written = {f"{name}/{path}": content for path, content in {"__init__.py": "", **files}.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{about}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(file, "w") as packed:
        for path, content in written.items():
            packed.writestr(path, content)
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--of-the-version", action="store_true", help="of what meets a server of TEST_POSTGRES, a third")


def pytest_configure() -> None:
    """Have the chosen version's binaries before the test processes start, which would all install them."""
    locate(ROOT)


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes keep the processors busy: a third of the tests' time is waiting."""
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return processors * 3 // 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slow ones, for which nobody shall wait at the end; leave out what another version's run had."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption("--of-the-version"):
        cases: dict[str, list[pytest.Item]] = {}
        for item in items:
            if concern(item):
                cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
            else:
                item.add_marker(pytest.mark.skip("they meet no PostgreSQL of the chosen version: --of-the-version"))
        drawn = random.Random(SEED)
        for of_one_test in cases.values():
            for item in drawn.sample(of_one_test, len(of_one_test) * 2 // 3):
                item.add_marker(pytest.mark.skip(f"of each test's cases a third is drawn, by FAULT_SEED={SEED}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and why: pytest -q would hide it behind a letter. And what the tests ran on."""
    left_out: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        left_out.setdefault(report.longrepr[2].removeprefix("Skipped: "), []).append(report.location[0])
    for reason, tests in left_out.items():
        files = set(tests)
        where = f"{len(files)} files" if len(files) > 1 else files.pop()
        terminalreporter.write_line(f"left out: {len(tests)} tests of {where} ({reason})")
    version = run([str(locate(ROOT).binaries / "postgres"), "--version"], clean_environment())
    where = "in memory" if str(MEMORY) == DATA else "on disk"
    terminalreporter.write_line(f"{version.out.strip()}, its data {where} ({DATA}); Python {platform.python_version()}")
