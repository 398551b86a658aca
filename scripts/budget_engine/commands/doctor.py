"""The doctor: what is wrong with this machine, this URL, this server and this role, and what to do; changes nothing.

Each thing is looked at by itself, so that what fails does not hide the rest. What setup would end with is found out as
setup does; what is missing, verify, status and plan say.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import psycopg
from psycopg import pq

from budget_engine import errors, spelling
from budget_engine.commands.session import Session, announce, hindrances, refused_by_rows, target_in_use
from budget_engine.migration import surroundings, survey
from budget_engine.migration.plan import Plan
from budget_engine.migration.survey import Server, Survey
from budget_engine.output import text
from budget_engine.output.console import CONSOLE, as_message
from budget_engine.postgres import embedded
from budget_engine.postgres.connection import BEGIN_READ_ONLY, PIN, understood
from budget_engine.postgres.embedded import Cluster, Health
from budget_engine.postgres.patience import LONGEST_PAUSE_S
from budget_engine.settings import Settings, Target, load

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"  # the bad one stands out on any terminal
_STATE, _TOPIC = 10, 13  # widths: as wide as the labels above the page, and as the longest topic


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; what: one line, or several.

    remedy: what helps, unless all is well; exit_code: what setup would end with.
    """

    topic: str
    what: str | Sequence[str]
    remedy: str = ""
    exit_code: int = 0

    @property
    def state(self) -> str:
        """What it means for setup."""
        return PROBLEM if self.exit_code else NOTE if self.remedy else OK


def run() -> None:
    """Print one page of findings; end with the exit code that setup would end with."""
    found = []
    for finding in _examine():
        found.append(finding)
        CONSOLE.say(*lines(finding))
    last, code = verdict(found)
    CONSOLE.say("", last)
    if code:
        raise SystemExit(code)


def lines(finding: Finding) -> list[str]:
    """Return the finding as it is printed."""
    prose = re.sub(r"(?<![.:;])\n", " ", finding.remedy)  # broken for wider lines; commands follow a : or a ;
    remedy = [f"what to do: {prose}"] if prose else []
    what = spelling.lines([finding.what] if isinstance(finding.what, str) else finding.what)
    said = "\n".join([what, *remedy]).replace("\n", "\n" + " " * (_STATE + _TOPIC))
    return f"{finding.state:<{_STATE}}{finding.topic:<{_TOPIC}}{said}".split("\n")


def verdict(findings: Sequence[Finding]) -> tuple[str, int]:
    """Return the last line, and the exit code: that of the first problem, which setup would meet first."""
    code = next((finding.exit_code for finding in findings if finding.exit_code), 0)
    counts = {state.lower(): sum(finding.state == state for finding in findings) for state in (PROBLEM, NOTE)}
    counted = ", ".join(f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count)
    end = f"would end with exit {code}" if code else "could run"
    return f"setup {end}" + (f": {counted}" if counted else ""), code


def _problem(topic: str, error: errors.RecipeError, *, known: str = "") -> Finding:
    """Say what setup would end with; known: what the page has said already, and no line need say again."""
    says = [error.what, *filter(None, error.where.split("\n"))]
    new = [line for line in says if not known or known not in line]
    return Finding(topic, new or says, error.remedy, error.exit_code)


def _examine() -> Iterator[Finding]:
    """Look at one thing after the other; which database this is about comes before all else."""
    given, where, broken = None, None, []
    try:
        given = load(CONSOLE.home, os.environ)
        with suppress(errors.UnreachableError):  # which is a finding of its own
            where = target_in_use(given)
    except errors.SettingsError as error:
        broken = [_problem("settings", error)]
    if given and where:
        announce(replace(where, notes=()), replace(given, notes=()))
        CONSOLE.say("")
    yield _machine()
    yield from broken
    if given and where:
        for note in (*given.notes, *where.notes):
            place = f" ({given.source})" if " in DATABASE_URL: " in note else ""
            yield Finding("settings", note, f"Correct it there{place}, if it matters.")
    in_use = given is not None and given.target is None
    runs = yield from _embedded_server(in_use=in_use)
    if given and where and (given.target or runs):
        yield from _session(where, given)


# ── this machine ───────────────────────────────────────────────────────────────────────────────────────────────────


def _machine() -> Finding:
    system = f"{platform.system()} {platform.machine()}"
    libpq = f"libpq {pq.version() // 10000}.{pq.version() % 10000} ({pq.__impl__})"
    driver = f"psycopg {psycopg.__version__} with {libpq}"
    return Finding("python", f"{platform.python_version()} in {sys.prefix} on {system}; {driver}")


def _embedded_server(*, in_use: bool) -> Generator[Finding, None, bool]:
    """Look at the embedded server, where it is what is meant, or where there is one; return whether it runs."""
    try:
        cluster = embedded.locate(CONSOLE.home)
        if in_use or cluster.data.parent.exists():  # what is inside, others may not even ask
            health = embedded.health(cluster)
            yield health_of(cluster, health, in_use=in_use)
            return health.running
    except errors.UnreachableError as error:
        if in_use:
            yield _problem("embedded", error)
    return False


def health_of(cluster: Cluster, health: Health, *, in_use: bool) -> Finding:
    """Say how the embedded server is; that it does not run is no failure: setup starts it."""
    place = f"data in {cluster.data}" if health.made else "no data yet"
    runs = f"running as process {health.pid}" if health.running else "not running"
    remedy, said = "", list[str]()
    if not in_use:
        what = f"not in use, {runs}"
    elif not health.version:
        does = "does not run: its binaries cannot be started here"
        return _problem("embedded", errors.EMBEDDED_SERVER(does=does, where=str(cluster.binaries / "postgres")))
    elif health.running:
        what = f"{health.version}, {runs}"
    elif health.pid is not None:
        what = f"process {health.pid} takes no connections: it starts, stops, or has lost its socket"
        remedy = "Wait a moment; invoke db.stop, then db.start, brings it back."
    elif health.complaint:
        what = "not running, and was not shut down"
        said = [line for line in health.complaint.splitlines() if "FATAL" in line or "PANIC" in line]
        remedy = f"setup starts it, and it recovers; its log: {cluster.log}"
    else:
        what = f"{health.version}, not running: setup starts it (alone: invoke db.start)"
    return Finding("embedded", [f"{what}; {place}", *said], remedy)


# ── the session ────────────────────────────────────────────────────────────────────────────────────────────────────

_LIMITS = """
SELECT name, setting, current_setting(name), source FROM pg_settings
WHERE name ~ '^(statement|lock|transaction|idle_session)_timeout$' AND setting <> '0'"""

_SESSION = """
SELECT current_user, current_database(), current_setting('session_replication_role'),
       (SELECT version || ', ' || cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl)"""

# Those that fire in such a session at a command like ours. Supabase's own do not refuse what a role of the user's does.
_EVENT_TRIGGERS = """
SELECT evtname FROM pg_event_trigger
WHERE evtenabled::text IN ('A', CASE current_setting('session_replication_role') WHEN 'replica' THEN 'R' ELSE 'O' END)
  AND current_setting('event_triggers', true) IS DISTINCT FROM 'off'  -- new in 17
  AND evtevent::text IN ('ddl_command_start', 'ddl_command_end', 'sql_drop')
  AND (evttags IS NULL OR array_to_string(evttags, ',')
       ~ '(CREATE|ALTER|DROP) (TABLE|INDEX|FUNCTION|TRIGGER|POLICY|SCHEMA)|COMMENT|GRANT|REVOKE')
  AND evtowner::regrole::text <> 'supabase_admin' ORDER BY 1"""


class Limit(NamedTuple):
    """A time limit that a session begins with: in ms, as people write it, and who set it (pg_settings.source)."""

    name: str
    ms: int
    written: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} = {self.written} ({self.source})"


def _session(where: Target, given: Settings) -> Iterator[Finding]:
    """Log in, and look around once: what is locked now, setup would wait for, and we do not."""
    try:
        with Session(replace(given, lock_wait_s=0), where) as session:
            yield from _look_around(session)
    except errors.RecipeError as error:
        yield _problem("login", error, known=where.display)
    except errors.StatementError as error:
        yield _problem("session", as_message(error))


def _look_around(session: Session) -> Iterator[Finding]:
    connection = session.connection
    with understood():
        _, _, _, limited, [(role, database, replication_role, cipher)], triggers, _ = connection.read(
            [*BEGIN_READ_ONLY, PIN, _LIMITS, _SESSION, _EVENT_TRIGGERS, "COMMIT"]
        )
    yield Finding("login", f"role {role}, database {database}")
    how = (cipher or "TLS") if connection.is_encrypted else ""
    yield tls(how, sslmode=connection.sslmode, is_near=connection.is_near)
    try:
        found = session.look()
    except errors.RecipeError as error:
        yield _problem("checks", error)
        return
    todo, server = session.todo(found), found.server
    yield Finding("server", f"PostgreSQL {server.version}, {'through a pooler' if server.pooled else 'direct'}")
    unclear = [*_absent(server), *text.behind(server, found.checks)] if server.schema else []
    if unclear:
        yield Finding("schema", unclear, "Say in DATABASE_URL which schema is meant: ?schema=NAME.")
    elif server.schema:  # else that is an error of its own
        yield Finding("schema", f"{server.schema} (search_path {server.search_path})")
    yield from _chain(found, todo)
    around = surroundings.read(connection, session.chain, found).unusual
    yield from (Finding(one.what, one.says, one.command) for one in around if one.what in surroundings.RISKS)
    brought = [Limit(str(name), int(ms or 0), str(written), str(source)) for name, ms, written, source in limited]
    yield from limits(server, brought, str(replication_role), session.given.lock_timeout_ms)
    if triggers and todo.to_do:
        says = f"run at DDL commands, and may refuse them: {', '.join(str(name) for (name,) in triggers)}"
        yield Finding("triggers", says, "Where one does: ALTER EVENT TRIGGER NAME DISABLE; and ENABLE; after setup.")
    orphans = [] if todo.conflicts else survey.orphans(connection, todo.missing, timeout=survey.BRIEFLY)
    if counted := [rows for rows in orphans if rows.count]:
        yield _problem("rows", refused_by_rows(counted))


def _absent(server: Server) -> Iterator[str]:
    r"""Say which schemas of the search_path are not there: the first one may be misspelt.

    Supabase's roles have \$user for $user, which need not exist. Names without quotes are folded.
    """
    names = re.findall(r'"((?:[^"]|"")*)"|([^\s,"]+)', server.search_path)
    for name in sorted({quoted.replace('""', '"') or bare.lower() for quoted, bare in names}):
        if name not in (*server.path, "$user", r"\$user", "pg_temp", "pg_catalog", ""):
            yield f"search_path {server.search_path}: {name} does not exist, or is closed to {server.role}"


def tls(how: str, *, sslmode: str, is_near: bool) -> Finding:
    """Say whether the connection is encrypted (how), and whether the server had to show whose it is."""
    if is_near:
        return Finding("tls", f"{how or 'no TLS'}; the server is on this machine")
    if how and sslmode.startswith("verify-"):
        return Finding("tls", f"{how}, certificate checked (sslmode={sslmode})")
    risk = f"{how}, but libpq need not check whose server it is" if how else "no TLS: others on the way can read it all"
    return Finding("tls", f"{risk} (sslmode={sslmode})", _VERIFY)


_VERIFY = """\
Add sslmode=verify-full&sslrootcert=FILE to DATABASE_URL (FILE: your host's CA; system: this machine's).
Where that cannot be, at least sslmode=require."""


_TOPICS = {
    errors.NO_SCHEMA: "schema",
    errors.SYSTEM_SCHEMA: "schema",
    errors.READ_ONLY: "writes",
    errors.RIGHT: "rights",
}


def _chain(found: Survey, todo: Plan) -> Iterator[Finding]:
    """Say what setup would do, and what keeps it from that, in the order in which it would find out."""
    server = found.server
    if not todo.conflicts:
        steps = [step.label for step in todo.steps if step.transaction or step.concurrent]
        does = f"setup would run {', '.join(steps)}" if steps else "setup has nothing to do"
        yield Finding("checks", f"{text.summary(found.checks)}; {does}")
    for hindrance in hindrances(todo, server, {}):
        if hindrance.case is errors.CONFLICT:
            tables = ", ".join(sorted({check.table for check in todo.conflicts}))
            hindrance.where = f"it concerns {tables}"
            hindrance.remedy = "invoke verify shows what, and the commands that clear it."
        yield _problem(_TOPICS.get(hindrance.case, "checks"), hindrance)
    if server.read_only and not todo.to_do:
        yield Finding("writes", server.read_only, "Name another server in DATABASE_URL once there is something to do.")
    if not todo.lacking:
        yield Finding("rights", f"role {server.role} lacks none for that")


def limits(server: Server, brought: Sequence[Limit], replication_role: str, lock_timeout_ms: int) -> Iterator[Finding]:
    """Say which time limits, and other settings, that the role or the database bring along will bite."""
    alter = 'ALTER ROLE "' + server.role.replace('"', '""') + '"'
    biting = {limit: why for limit in brought if (why := _bite(limit, server, lock_timeout_ms))}
    for limit, why in biting.items():
        direct = "Name the server itself in DATABASE_URL (the direct URL), or lift it:" if server.pooled else "Lift it:"
        lifted = spelling.respelled(f"{alter} SET {limit.name} = 0;")
        if limit.source == "client":
            lifted = f"unset {limit.name} in PGOPTIONS, or in DATABASE_URL"
        yield Finding("limits", f"{limit}: {why}", f"{direct}\n{lifted}")
    if replication_role == "replica":  # local is as origin
        says = f"session_replication_role = replica: no trigger runs for rows that {server.role} writes"
        yield Finding("limits", says, spelling.respelled(f"{alter} SET session_replication_role = origin;"))
    elif not biting:
        listed = ", ".join(map(str, brought))
        yield Finding("limits", f"{listed}: setup works with its own" if listed else "none that the role brings along")


def _bite(limit: Limit, server: Server, lock_timeout_ms: int) -> str:
    if server.pooled:
        endless = limit.name in ("statement_timeout", "lock_timeout", "transaction_timeout")
        return "ends concurrent work that takes longer, and cannot be lifted through a pooler" if endless else ""
    if limit.name == "transaction_timeout" and limit.ms <= lock_timeout_ms:
        return "ends a step that queues for a lock as long as LOCK_TIMEOUT allows"
    if limit.name == "idle_session_timeout" and limit.ms <= LONGEST_PAUSE_S * 1000:
        return "ends the session while setup pauses before it asks for a lock again"
    return ""
