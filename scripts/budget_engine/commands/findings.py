"""The findings: what the facts of a machine, a URL, a server and a role mean for setup, and what helps. Values only."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from budget_engine import errors
from budget_engine.commands.inspect import refused_by_rows
from budget_engine.commands.session import hindrances
from budget_engine.migration.checks import Check
from budget_engine.migration.plan import Plan
from budget_engine.migration.survey import Orphans, Server
from budget_engine.output.text import summary
from budget_engine.postgres.embedded import Cluster, Health
from budget_engine.postgres.patience import LONGEST_PAUSE_S


class State(Enum):
    """What a finding means for setup; spelled such that the bad ones stand out on any terminal."""

    OK = "ok"
    NOTE = "note"  # setup runs, but somebody should know
    PROBLEM = "PROBLEM"  # setup would end with this


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; exit_code: the one that setup would end with because of it."""

    topic: str
    state: State
    what: str
    remedy: str = ""
    exit_code: int = 0


def ok(topic: str, what: str) -> Finding:
    """Say that all is well."""
    return Finding(topic, State.OK, what)


def note(topic: str, what: str, remedy: str) -> Finding:
    """Say what does not stop setup."""
    return Finding(topic, State.NOTE, what, remedy)


def problem(topic: str, error: errors.RecipeError, *, known: str = "") -> Finding:
    """Say what setup would end with; known: what the page has said already, and no line need say again."""
    says = [error.what, *error.where.splitlines()]
    new = [line for line in says if not known or known not in line]
    return Finding(topic, State.PROBLEM, "\n".join(new or says), error.remedy, error.exit_code)


def noted(finding: Finding) -> Finding:
    """Return the finding as a note: there was another way."""
    return replace(finding, state=State.NOTE, exit_code=0) if finding.exit_code else finding


# ── the page ───────────────────────────────────────────────────────────────────────────────────────────────────────

_STATE, _TOPIC = 10, 13  # widths: as wide as the labels above the page, and as the longest topic


def lines(finding: Finding) -> list[str]:
    """Return the finding as it is printed."""
    prose = re.sub(r"(?<![.:;])\n", " ", finding.remedy)  # broken for wider lines; commands follow a : or a ;
    remedy = prose and f"what to do: {prose}"
    text = [*finding.what.splitlines(), *remedy.splitlines()]
    margins = [f"{finding.state.value:<{_STATE}}{finding.topic:<{_TOPIC}}"] + [" " * (_STATE + _TOPIC)] * len(text)
    return [margin + part for margin, part in zip(margins, text, strict=False)]


def verdict(findings: Sequence[Finding]) -> tuple[str, int]:
    """Return the last line, and the exit code: that of the first problem, which setup would meet first."""
    code = next((finding.exit_code for finding in findings if finding.exit_code), 0)
    counts = {"problem": _number(findings, State.PROBLEM), "note": _number(findings, State.NOTE)}
    counted = ", ".join(f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count)
    end = f"would end with exit {code}" if code else "could run"
    return f"setup {end}" + (f": {counted}" if counted else ""), code


def _number(findings: Sequence[Finding], state: State) -> int:
    return sum(finding.state is state for finding in findings)


# ── this machine ───────────────────────────────────────────────────────────────────────────────────────────────────


def packages(locked: Mapping[str, Sequence[str]], installed: Mapping[str, str], libpq: str) -> Finding:
    """Compare the versions that are installed with those that requirements.txt names (several: by platform)."""
    other = [
        f"{name} {installed[name]} (locked: {' or '.join(versions)})"
        for name, versions in locked.items()
        if installed.get(name, versions[0]) not in versions
    ]
    if not other:
        return ok("packages", f"as locked; psycopg {installed.get('psycopg')} with {libpq}")
    remedy = "Run the task through python3 scripts/inv, or pip install --require-hashes -r requirements.txt."
    return note("packages", f"not as locked: {', '.join(other)}; {libpq}", remedy)


def notes(source: str, given: Sequence[str]) -> Iterator[Finding]:
    """Say what is unusual in the files and in the URL; where it is corrected or ignored, that is done."""
    for said in given:
        place = f" ({source})" if " in DATABASE_URL: " in said else ""
        yield note("settings", said, f"Correct it there{place}, if it matters.")


def embedded_server(cluster: Cluster, health: Health, *, in_use: bool) -> Finding:
    """Say how the embedded server is; that it does not run is no failure: setup starts it."""
    place = f"data in {cluster.data}" if health.made else "no data yet"
    runs = f"running as process {health.pid}" if health.running else "not running"
    if not in_use:
        return ok("embedded", f"not in use, {runs}; {place}")
    if not health.version:
        does = "does not run: its binaries cannot be started here"
        return problem("embedded", errors.EMBEDDED_SERVER(does=does, where=str(cluster.binaries / "postgres")))
    if health.running:
        return ok("embedded", f"{health.version}, {runs}; {place}")
    if health.pid is not None:
        says = f"process {health.pid} takes no connections: it starts, stops, or has lost its socket; {place}"
        return note("embedded", says, "Wait a moment; invoke db.stop, then db.start, brings it back.")
    if health.complaint:
        said = [line for line in health.complaint.splitlines() if "FATAL" in line or "PANIC" in line]
        says = "\n".join([f"not running, and was not shut down; {place}", *said])
        return note("embedded", says, f"setup starts it, and it recovers; its log: {cluster.log}")
    return ok("embedded", f"{health.version}, not running: setup starts it (alone: invoke db.start); {place}")


# ── the way to the server ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Way:
    """An address of a host, or a socket, that was tried; failure: an errno, or None: somebody answers."""

    address: str
    failure: int | None


@dataclass(frozen=True)
class Host:
    """A host of the URL, as it was looked up and tried; unresolved: why it has no address."""

    name: str
    port: str
    ways: tuple[Way, ...] = ()
    unresolved: str = ""

    @property
    def answers(self) -> bool:
        """Whether one of its addresses does."""
        return any(way.failure is None for way in self.ways)


_NOBODY = {errno.ECONNREFUSED, errno.ENOENT}
_TIMED_OUT = "nothing came back within CONNECT_TIMEOUT"


def network(hosts: Sequence[Host]) -> list[Finding]:
    """Say of each host whether its name resolves and somebody answers; one that answers is enough."""
    found = [_host(host) for host in hosts]
    return [noted(finding) for finding in found] if any(host.answers for host in hosts) else found


def _host(host: Host) -> Finding:
    place = host.name if host.name.startswith(("/", "@")) else f"{host.name} port {host.port}"
    if host.unresolved:
        return problem("network", errors.NO_SUCH_HOST(what=f"{host.name} has no address: {host.unresolved}"))
    for way in host.ways:
        if way.failure is None:
            return ok("network", f"{place} answers" + ("" if way.address == host.name else f" ({way.address})"))
    failures = {way.failure for way in host.ways}
    why = ", ".join(sorted({_said(failure) for failure in failures}))
    if failures & _NOBODY:
        return problem("network", errors.NOBODY_THERE(what=f"nobody listens at {place}: {why}"))
    if all(":" in way.address for way in host.ways):
        return problem("network", errors.NO_ROUTE(what=f"{host.name} has IPv6 addresses only, out of reach: {why}"))
    return problem("network", errors.SILENT_HOST(what=f"no answer from {place}: {why}"))


def _said(failure: int | None) -> str:
    return _TIMED_OUT if failure == errno.ETIMEDOUT else os.strerror(failure or 0)


# ── the session ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Limit:
    """A time limit that a session begins with: as people write it, and who set it (pg_settings.source)."""

    name: str
    ms: int
    written: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} = {self.written} ({self.source})"


@dataclass(frozen=True)
class Place:
    """A schema that has such a table; rank: the schema's in the search_path, from 1, or None: it is not in there."""

    table: str
    schema: str
    rank: int | None


@dataclass(frozen=True)
class EventTrigger:
    """An event trigger that fires in our session, at its event; tags: of these commands alone, where there are any."""

    name: str
    event: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What a session of this role in this database begins with, and where the chain's names lead.

    tls: version and cipher, where the server that we are connected to says so; places: of each relation that bears the
    name of one of the chain's tables.
    """

    role: str
    database: str
    is_near: bool
    is_encrypted: bool
    sslmode: str
    tls: str | None
    limits: tuple[Limit, ...]
    replication_role: str
    absent_schemas: tuple[str, ...]
    places: tuple[Place, ...]
    event_triggers: tuple[EventTrigger, ...]


def tls(facts: Facts) -> Finding:
    """Say whether the connection is encrypted, and whether the server had to show whose it is."""
    how = (facts.tls or "TLS") if facts.is_encrypted else "no TLS"
    if facts.is_near:
        return ok("tls", f"{how}; the server is on this machine")
    if not facts.is_encrypted:
        says = f"no TLS (sslmode={facts.sslmode}): passwords and rows can be read, and changed, on the way"
        return note("tls", says, _VERIFY)
    if facts.sslmode in ("verify-ca", "verify-full"):
        return ok("tls", f"{how}, certificate checked (sslmode={facts.sslmode})")
    return note("tls", f"{how}, but libpq need not check whose server it is (sslmode={facts.sslmode})", _VERIFY)


_VERIFY = """\
Add sslmode=verify-full&sslrootcert=FILE to DATABASE_URL (FILE: your host's CA; system: this machine's).
Where that cannot be, at least sslmode=require."""


def server(server: Server, ports: Sequence[str]) -> Finding:
    """Say who answers, and whether something stands between."""
    via = "direct"
    if server.pooled:
        via = f"through a pooler{' (port 6543: by transaction, at Supabase)' if '6543' in ports else ''}"
    return ok("server", f"PostgreSQL {server.version}, {via}")


_TOPICS: dict[errors.Case, str] = {
    errors.NO_SCHEMA: "schema",
    errors.SYSTEM_SCHEMA: "schema",
    errors.READ_ONLY: "writes",
    errors.RIGHT: "rights",
}


def chain(server: Server, checks: Sequence[Check], todo: Plan) -> Iterator[Finding]:
    """Say what setup would do, and what keeps it from that, in the order in which it would find out."""
    if not todo.conflicts:
        steps = [step.label for step in todo.steps if step.transaction or step.concurrent]
        does = f"setup would run {', '.join(steps)}" if steps else "setup has nothing to do"
        yield ok("checks", f"{summary(checks)}; {does}")
    for hindrance in hindrances(todo, server, {}):
        yield problem(_TOPICS.get(hindrance.case, "checks"), _in_short(hindrance, todo))
    if server.read_only and not todo.to_do:
        yield note("writes", server.read_only, "Name another server in DATABASE_URL once there is something to do.")
    if not todo.lacking:
        yield ok("rights", f"role {server.role} lacks none for that")


def _in_short(hindrance: errors.RecipeError, todo: Plan) -> errors.RecipeError:
    if hindrance.case is errors.CONFLICT:
        tables = sorted({check.table for check in todo.conflicts})
        remedy = "invoke verify shows what, and the commands that clear it."
        return errors.CONFLICT(what=hindrance.what, where=f"it concerns {', '.join(tables)}", remedy=remedy)
    return hindrance


def schemas(server: Server, facts: Facts) -> Iterator[Finding]:
    """Say where the chain's names lead, where that may not be what was meant."""
    path = f"search_path {server.search_path}"
    absent = facts.absent_schemas if server.schema else ()  # without any, that is an error of its own
    says = [f"{path}: {name} does not exist, or is closed to {server.role}" for name in absent]
    where: dict[str, list[str]] = {}
    for table in dict.fromkeys(place.table for place in facts.places):
        if says_of_it := _lead(table, server, facts):
            where.setdefault(says_of_it, []).append(table)
    says += [f"{', '.join(tables)}: {fact}" for fact, tables in where.items()]
    if says:
        yield note("schema", "\n".join(says), "Say in DATABASE_URL which schema is meant: ?schema=NAME.")
    elif server.schema:
        yield ok("schema", f"{server.schema} ({path})")


_NAMED = 3  # of the schemas that the search_path does not lead to: there may be hundreds of tenants


def _lead(table: str, server: Server, facts: Facts) -> str:
    """Say where a table's name leads, if that may not be what was meant."""
    places = sorted((place for place in facts.places if place.table == table), key=lambda place: place.rank or math.inf)
    visible = [place.schema for place in places if place.rank]
    if not visible:
        named, more = [place.schema for place in places[:_NAMED]], len(places) - _NAMED
        if more > 0:
            named.append(f"{more} others")
        return f"only in {' and '.join(named)}, which is not in the search_path"
    if len(visible) > 1:
        return f"in {' and '.join(visible)}; {visible[0]} is meant"
    return f"in {visible[0]}; new tables would go to {server.schema}" if visible[0] != server.schema else ""


def limits(server: Server, facts: Facts, lock_timeout_ms: int) -> Iterator[Finding]:
    """Say which time limits, and other settings, that the role or the database bring along will bite."""
    biting: dict[str, list[Limit]] = {}
    for limit in facts.limits:
        if why := _bite(limit, server, lock_timeout_ms):
            biting.setdefault(why, []).append(limit)
    for why, found in biting.items():
        yield note("limits", f"{', '.join(map(str, found))}: {why}", _lift(found, server))
    if facts.replication_role == "replica":  # local is as origin
        says = f"session_replication_role = replica: no trigger runs for rows that {server.role} writes"
        yield note("limits", says, f"{_alter(server)} SET session_replication_role = origin;")
    elif not biting:
        lifted = ", ".join(map(str, facts.limits))
        yield ok("limits", f"{lifted}: setup works with its own" if lifted else "none that the role brings along")


def _bite(limit: Limit, server: Server, lock_timeout_ms: int) -> str:
    if server.pooled:
        endless = limit.name in ("statement_timeout", "lock_timeout", "transaction_timeout")
        return "ends concurrent work that takes longer, and cannot be lifted through a pooler" if endless else ""
    if limit.name == "transaction_timeout" and limit.ms <= lock_timeout_ms:
        return "ends a step that queues for a lock as long as LOCK_TIMEOUT allows"
    if limit.name == "idle_session_timeout" and limit.ms <= LONGEST_PAUSE_S * 1000:
        return "ends the session while setup pauses before it asks for a lock again"
    return ""


def _lift(found: Sequence[Limit], server: Server) -> str:
    direct = "Name the server itself in DATABASE_URL (the direct URL), or lift it:" if server.pooled else "Lift it:"
    return "\n".join([direct, *(_one_lifted(limit, server) for limit in found)])


def _one_lifted(limit: Limit, server: Server) -> str:
    if limit.source == "client":
        return f"unset {limit.name} in PGOPTIONS, or in DATABASE_URL"
    return f"{_alter(server)} SET {limit.name} = 0;"


def _alter(server: Server) -> str:
    return "ALTER ROLE " + ('"' + server.role.replace('"', '""') + '"')


def event_triggers(facts: Facts, todo: Plan, commands: str) -> Iterator[Finding]:
    """Name what may refuse a step from outside; commands: the SQL that is due."""
    firing = [trigger.name for trigger in facts.event_triggers if _fires(trigger, todo, commands)]
    if firing and todo.to_do:
        says = f"run at DDL commands, and may refuse them: {', '.join(firing)}"
        yield note("triggers", says, "Where one does: ALTER EVENT TRIGGER NAME DISABLE; and ENABLE; after setup.")


def _fires(trigger: EventTrigger, todo: Plan, commands: str) -> bool:
    if trigger.event == "sql_drop" and not any(check.replaces or check.unfinished for check in todo.missing):
        return False  # we drop nothing else: unfinished indexes, a default and a NOT NULL of what gives way
    words = [tag.replace(" ", "(?: OR REPLACE| UNIQUE)? ") for tag in trigger.tags]
    return trigger.event in _EVENTS and (not words or re.search(rf"\b({'|'.join(words)})\b", commands) is not None)


_EVENTS = ("ddl_command_start", "ddl_command_end", "sql_drop")  # nothing of ours rewrites a table; logged in we are


def rows(orphans: Sequence[Orphans], unseen: Sequence[str]) -> Iterator[Finding]:
    """Say which rows refuse what setup would do; unseen: what it would ask of rows that nobody has looked at."""
    if counted := [found for found in orphans if found.count]:
        yield problem("rows", refused_by_rows(counted))
    unknown = [*(str(found) for found in orphans if not found.count), *unseen]
    if unknown:
        says = "\n".join(["setup ends with exit 5 where rows refuse this:", *unknown])
        yield note("rows", says, "Nothing yet: it does all else even then, and says which rows those are.")
