"""The doctor: gathers what can be known of this machine, the URL, the server and the role, and changes nothing.

Each thing is asked for by itself, so that what fails does not hide the rest; what the facts mean is said in findings.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import zip_longest
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from psycopg import pq, sql

from budget_engine import errors
from budget_engine.commands import findings
from budget_engine.commands.findings import EventTrigger, Facts, Finding, Host, Limit, Place, Way
from budget_engine.commands.session import Session, announce, target_of
from budget_engine.migration import chain, plan, survey
from budget_engine.migration.chain import ROOT
from budget_engine.migration.runner import HISTORY
from budget_engine.migration.survey import Survey
from budget_engine.output.console import CONSOLE
from budget_engine.output.ending import as_message
from budget_engine.postgres import embedded
from budget_engine.postgres.connection import BEGIN_READ_ONLY, Connection
from budget_engine.settings import Settings, Target, completed, load

_T = TypeVar("_T")


def run() -> None:
    """Print one page of findings; end with the exit code that setup would end with."""
    found = []
    for finding in _examine():
        found.append(finding)
        CONSOLE.say(*findings.lines(finding))
    verdict, code = findings.verdict(found)
    CONSOLE.say("", verdict)
    if code:
        raise SystemExit(code)


def _examine() -> Iterator[Finding]:
    """Look at one thing after the other; which database this is about comes before all else."""
    given, where, broken = _settings()
    if given and where:
        announce(replace(where, notes=()), replace(given, notes=()))
        CONSOLE.say("")
    yield from _machine()
    yield from broken
    if given and where:
        yield from findings.notes(given.source, [*given.notes, *where.notes])
    yield from _embedded_server(in_use=given is not None and given.target is None)
    if given and where and (given.target or _is_running()):
        yield from _far_end(where, given)


# ── this machine ───────────────────────────────────────────────────────────────────────────────────────────────────


def _settings() -> tuple[Settings | None, Target | None, list[Finding]]:
    try:
        given = load(ROOT, os.environ)
        return given, _target(given), []
    except errors.SettingsError as error:
        return None, None, [findings.problem("settings", error)]


def _target(given: Settings) -> Target | None:
    with suppress(errors.UnreachableError):  # which is a finding of its own
        return completed(given.target, given.source) if given.target else target_of(embedded.locate(ROOT))
    return None


def _machine() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    yield findings.ok("python", f"{platform.python_version()} in {sys.prefix} on {system}")
    locked: dict[str, list[str]] = {}
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", requirements, re.M):
        locked.setdefault(name, []).append(version)
    installed = {}
    for name in locked:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    libpq = f"libpq {pq.version() // 10000}.{pq.version() % 10000} ({pq.__impl__})"
    yield findings.packages(locked, installed, libpq)


def _embedded_server(*, in_use: bool) -> Iterator[Finding]:
    """Look at the embedded server, where it is what is meant, or where there is one."""
    try:
        cluster = embedded.locate(ROOT)
        if in_use or cluster.data.parent.exists():  # what is inside, others may not even ask
            yield findings.embedded_server(cluster, embedded.health(cluster), in_use=in_use)
    except errors.UnreachableError as error:
        if in_use:
            yield findings.problem("embedded", error)


def _is_running() -> bool:
    with suppress(errors.UnreachableError):
        return embedded.running(embedded.locate(ROOT))
    return False


# ── the way to the server ──────────────────────────────────────────────────────────────────────────────────────────


def _far_end(where: Target, given: Settings) -> Iterator[Finding]:
    """Look up and try the hosts; where anybody answers, log in and look around."""
    typed = where.conninfo.get("connect_timeout", "")
    timeout_s = float(typed) if typed.isdecimal() and int(typed) else float(given.connect_timeout_s)
    hosts = list(_hosts(where.conninfo, timeout_s))
    yield from findings.network(hosts)
    if not hosts or any(host.answers for host in hosts):
        yield from _session(where, given, [host.port for host in hosts])


def _hosts(parameters: Mapping[str, str], timeout_s: float) -> Iterator[Host]:
    """Try each host as libpq would: hostaddr before host, and for each its port."""
    names, addresses, ports = (parameters.get(name, "").split(",") for name in ("host", "hostaddr", "port"))
    for name, address, port in zip_longest(names, addresses, ports if len(ports) > 1 else ports * len(names)):
        if host := address or name:
            yield _host(host, port or "5432", timeout_s)


def _host(name: str, port: str, timeout_s: float) -> Host:
    if name.startswith(("/", "@")):
        file = f"{name}/.s.PGSQL.{port}"
        path = file.replace("@", "\0", 1) if name[0] == "@" else file  # an abstract socket
        return Host(file, port, (Way(file, _failure(socket.AF_UNIX, path, timeout_s)),))
    try:
        look_up = partial(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
        found = dict.fromkeys((family, address) for family, *_, address in _within(timeout_s, look_up))
    except (OSError, UnicodeError) as error:
        return Host(name, port, unresolved=getattr(error, "strerror", None) or str(error))
    return Host(name, port, tuple(Way(str(at[0]), _failure(family, at, timeout_s)) for family, at in found))


def _within(timeout_s: float, ask: Callable[[], _T]) -> _T:
    """Wait no longer than that for what has no timeout of its own: the resolver."""
    answers: SimpleQueue[_T | Exception] = SimpleQueue()

    def work() -> None:
        try:
            answers.put(ask())
        except Exception as error:  # raised below
            answers.put(error)

    Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, "the name server does not answer") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _failure(family: socket.AddressFamily, address: object, timeout_s: float) -> int | None:
    """Try whether somebody answers there; return what the operating system says otherwise."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(timeout_s)
        try:
            probe.connect(address)  # type: ignore[arg-type]
        except OSError as error:
            # Neither Python's own timeout nor a socket's path that is too long bears a number.
            return error.errno or (errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.ENAMETOOLONG)
    return None


# ── the session ────────────────────────────────────────────────────────────────────────────────────────────────────


def _session(where: Target, given: Settings, ports: list[str]) -> Iterator[Finding]:
    """Log in, and look around once: what is locked now, setup would wait for, and we do not."""
    everything = chain.load()
    impatient = replace(given, lock_wait_s=0)
    connect = partial(Connection, where, impatient)
    try:
        with Session(connect, impatient, where, everything, everything.steps) as session:
            found, unreadable = _look(session)
            facts = _ask(session.connection, {check.table for check in found.checks} if found else set())
            yield findings.ok("login", f"role {facts.role}, database {facts.database}")
            yield findings.tls(facts)
            yield from unreadable
            if found:
                todo, server = session.todo(found), found.server
                yield findings.server(server, ports)
                yield from findings.schemas(server, facts)
                yield from findings.chain(server, found.checks, todo)
                yield from findings.limits(server, facts, given.lock_timeout_ms)
                yield from findings.event_triggers(facts, todo, _commands(todo))
                yield from () if todo.conflicts else _rows(session, todo)
    except errors.RecipeError as error:
        yield findings.problem("login", error, known=where.display)
    except errors.StatementError as error:
        yield findings.problem("session", as_message(error))


def _commands(todo: plan.Plan) -> str:
    """Return the SQL of what is due: a command that is not in there is not sent."""
    return "\n".join([*(sql for action in todo.actions for sql in action.sql), HISTORY])


def _rows(session: Session, todo: plan.Plan) -> Iterator[Finding]:
    """Count the rows that would refuse what is done concurrently, as far as that can be known before."""
    orphans = survey.orphans(session.connection, todo.missing, timeout=survey.BRIEFLY)
    return findings.rows(orphans, plan.left_to_the_rows(todo))


def _look(session: Session) -> tuple[Survey | None, list[Finding]]:
    try:
        return session.look(), []
    except errors.RecipeError as error:
        return None, [findings.problem("checks", error)]


_LIMITS = """
SELECT name, setting, current_setting(name), source FROM pg_settings
WHERE name ~ '^(statement|lock|transaction|idle_session)_timeout$' AND setting <> '0'"""

_SESSION = """
SELECT current_user, current_database(), current_setting('session_replication_role'),
       (SELECT version || ', ' || cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl)"""

# Supabase's roles have it as "\$user": meant is $user, which need not exist. Names without quotes are folded.
_ABSENT = r"""
SELECT DISTINCT name
FROM regexp_matches(current_setting('search_path'), '"((?:[^"]|"")*)"|([^[:space:],"]+)', 'g') AS part,
     LATERAL (SELECT coalesce(replace(part[1], '""', '"'), lower(part[2]))) AS plain (name)
WHERE name::name <> ALL (current_schemas(false)) AND name NOT IN ('$user', '\$user', 'pg_temp', '')
ORDER BY 1"""

_PLACES = """
SELECT relname, nspname, array_position(current_schemas(false), nspname)
FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace
WHERE relname = ANY ({tables}) AND relkind IN ('r', 'p', 'v', 'm', 'f') AND nspname !~ '^pg_'
ORDER BY relname, nspname"""

# Those that fire in such a session. Supabase's own do not refuse what a role of the user's does.
_EVENT_TRIGGERS = """
SELECT evtname, evtevent, array_to_json(evttags) FROM pg_event_trigger
WHERE evtenabled::text IN ('A', CASE current_setting('session_replication_role') WHEN 'replica' THEN 'R' ELSE 'O' END)
  AND current_setting('event_triggers', true) IS DISTINCT FROM 'off'  -- new in 17
  AND evtowner::regrole::text <> 'supabase_admin' ORDER BY 1"""


def _ask(connection: Connection, tables: Collection[str]) -> Facts:
    """Ask in one message, its first queries before our own settings hold."""
    names = sql.Literal(sorted(tables)).as_string()
    _, _, limits, [(role, name, replication_role, tls)], _, absent, places, event_triggers, _ = connection.run(
        [
            *BEGIN_READ_ONLY,
            _LIMITS,
            _SESSION,
            f"SELECT {connection.transaction_settings}",
            _ABSENT,
            _PLACES.format(tables=f"{names}::name[]"),
            _EVENT_TRIGGERS,
            "COMMIT",
        ]
    )
    return Facts(
        role=str(role),
        database=str(name),
        is_near=connection.is_near,
        is_encrypted=connection.is_encrypted,
        sslmode=connection.sslmode,
        tls=tls,
        limits=tuple(Limit(str(limit), int(ms or 0), str(text), str(by)) for limit, ms, text, by in limits),
        replication_role=str(replication_role),
        absent_schemas=tuple(str(schema) for (schema,) in absent),
        places=tuple(Place(str(table), str(schema), int(rank) if rank else None) for table, schema, rank in places),
        event_triggers=tuple(
            EventTrigger(str(trigger), str(event), tuple(json.loads(tags or "[]")))
            for trigger, event, tags in event_triggers
        ),
    )
