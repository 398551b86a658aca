"""The text a person reads, made of plain values.

No connection and no terminal, and no package is imported for it: that one is missing must be said, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from budget_engine.errors import RecipeError
from budget_engine.migration.checks import STRENGTH, Check, Kind, Lock, outermost, that_count
from budget_engine.migration.plan import Action, Effect, Plan, StepPlan
from budget_engine.output.console import LABEL
from budget_engine.spelling import lines

if TYPE_CHECKING:
    from budget_engine.migration.recreate import Move
    from budget_engine.migration.runner import Rehearsed
    from budget_engine.migration.surroundings import Surroundings
    from budget_engine.migration.survey import Server, Survey
    from budget_engine.postgres.blockers import Bystander, Size
    from budget_engine.settings import Settings, Target

_STEP = 30  # columns: a long label and a little air
_DETAIL = 46  # where the details of things begin at the latest
_CREATED = 72  # what a transaction created, before how long that took
_BYTES = ("B", "kB", "MB", "GB", "TB")


def line(label: str, *texts: str) -> str:
    """Write a line that begins with a label; further texts are lines below it, aligned."""
    return f"{label:<{LABEL - 1}} " + lines(texts).replace("\n", "\n" + " " * LABEL)


def opening(target: Target, settings: Settings, found: Survey | None = None, *, exposed: str = "") -> str:
    """Write what is said before anything else: which database this is about, where its URL came from, who answers.

    And what was ignored or corrected in the settings, and what is unusual about the place.
    exposed: the host to which a password went out in the open (doctor's finding says more).
    """
    whence, notes = f"({sources(target, settings)})", [*settings.notes, *target.notes]
    says = f"{target.display} {whence}" if settings.target else f"the {settings.source}"  # which names it
    if found:
        server, answers = found.server, f"PostgreSQL {found.server.version}"
        via = " through a pooler" if server.pooled else ""
        whole = f"{target.display}, {place(server)} {whence}, {answers}{via}, role {server.role}"
        says = whole if settings.target else f"{place(server)} on {says}, {answers}"
        notes += behind(server, found.checks)
    if exposed:
        notes.append(f"no TLS on the way to {exposed}: others can read password and data there (sslmode=require)")
    return "\n".join([line("target", says), *(line("note", note) for note in notes)])


def place(server: Server, host: str = "") -> str:
    """Name the database, its host, and the schemas in which our tables exist, or the one where they would."""
    where = f" on {host}" if host else ""
    return f"database {server.database}{where}, schema {', '.join(server.homes) or server.schema or 'none'}"


def behind(server: Server, checks: Iterable[Check]) -> list[str]:
    """Say what is found in a later schema of the search_path than the one where new tables go."""
    later: dict[str | None, list[str]] = {}
    for check in checks:
        if check.kind is Kind.TABLE and check.found and check.home != server.schema:
            later.setdefault(check.home, []).append(check.table)
    return [
        f"{', '.join(tables)}: this is about schema {home}; {server.schema}, where new tables go, has none"
        for home, tables in later.items()
    ]


_WITHOUT_PROFILES = "Supabase without profiles"
STARTED = "the embedded server was started and keeps running; invoke db.psql opens it, invoke db.stop stops it"


def sources(target: Target, settings: Settings) -> str:
    """Where the URL came from, and what else says where it leads."""
    return ", ".join([settings.source, *target.sources])


def row_security(checks: Iterable[Check]) -> str:
    """Which kind of server this is: the verification asks for policies where there is something to protect."""
    policies = [check.name for check in checks if check.kind is Kind.POLICY]
    secured = any(check.kind is Kind.ROW_SECURITY for check in checks)
    if not secured and not policies:
        return "plain PostgreSQL"
    return "Supabase" if any("_admin" in name for name in policies) else _WITHOUT_PROFILES


def without_admins(checks: Iterable[Check]) -> list[str]:
    """Say that nobody but the service role gets a row, where that is so: admins are missing, not failing."""
    says = f"{_WITHOUT_PROFILES} (id uuid, role): no policies for admins; with it they are pending"
    return [line("note", says)] if row_security(checks) == _WITHOUT_PROFILES else []


def summary(checks: Iterable[Check]) -> str:
    """How many of the checks pass."""
    counted = that_count(checks)
    return f"{sum(check.passed for check in counted)} of {len(counted)} checks pass"


# ── steps ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def step(label: str, *texts: str) -> str:
    """Write what happened to a step; further texts are lines below it, aligned."""
    return f"  {label:<{_STEP}}" + lines(texts).replace("\n", "\n" + " " * (_STEP + 2))


def timed(created: str, took_ms: float) -> str:
    """Say what was created, and how long that took."""
    return f"{created:<{_CREATED}}  {took_ms:.0f} ms"


def created(checks: Sequence[Check]) -> str:
    """Say in one line what a transaction created (+) and changed (~); a column's indexes and key go along with it."""
    named: dict[str, list[str]] = {"+": [], "~": []}
    shown = outermost(checks)
    columns = [check for check in shown if check.kind is Kind.COLUMN]
    for check in shown:
        if check.kind not in (Kind.INDEX, Kind.FOREIGN_KEY) or not any(check.is_on(column) for column in columns):
            named[_sign(check)].append(_short(check))
    return "  ".join(f"{sign} {', '.join(names)}" for sign, names in named.items() if names)


def _sign(check: Check) -> str:
    return "+" if check.actual is None else "~"


def _short(check: Check) -> str:
    """Name a thing; what has a name of its own needs no kind."""
    return check.name if check.kind in (Kind.INDEX, Kind.TRIGGER, Kind.POLICY) else check.title


def difference(check: Check) -> str:
    """Say what the database has, and what is expected."""
    return f"{check.title} {_differs(check)}"


def _differs(check: Check, expected: str = "expected") -> str:
    return f"is {check.state}, {expected} {check.expected}"


def steps(plan: Plan, *, passed: Sequence[Check] = (), conflicts: bool = True, only_due: bool = False) -> list[str]:
    """Write a line for each step and, below it, one for each thing that it would create or change.

    passed: checks to be named although they pass; conflicts: whether to name those, which nothing else will; only_due:
    leave out all else, and steps that have nothing to do. The details begin in one column.
    """
    rows = []
    for step in plan.steps:
        due = _due(step)
        if only_due and not (due or step.conflicts):
            continue
        things = [("!", c.title, _differs(c)) for c in outermost(step.conflicts) if conflicts and not only_due]
        things += due
        if not only_due:
            told = outermost(step.told)
            things += [("=", c.title, f"{_differs(c, 'documented:')}; not required") for c in told]
        things += [(" ", c.title, str(c.actual)) for c in passed if c.passed and c.step == step.label]
        rows.append((f"  {step.label}  ", step.state.value))
        rows += [(f"    {sign} {thing}  ", detail) for sign, thing, detail in things]
    width = min(max((len(name) for name, _ in rows), default=0), _DETAIL)
    return [lines([f"{name:<{width}}{detail}".rstrip()]) for name, detail in rows]


def _due(step: StepPlan) -> list[tuple[str, str, str]]:
    """Return what a step creates or changes, each with its sign and details: one that has a conflict runs nothing."""
    concurrent = {check.key for action in step.concurrent for check in action.checks}
    defaults = {(c.table, c.name): f" DEFAULT {c.expected}" for c in step.reasons if c.kind is Kind.DEFAULT}

    def detail(check: Check) -> str:
        if check.kind is Kind.TABLE:
            return "new table"
        if check.kind in (Kind.COMMENT, Kind.FUNCTION, Kind.TRIGGER):
            return "" if check.actual is None else "brought to the expected form"
        if check.actual is not None:
            return f"{check.actual} → {check.expected}"
        default = defaults.get((check.table, check.name), "") if check.kind is Kind.COLUMN else ""
        return check.expected + default.removesuffix(" DEFAULT none")

    def told(check: Check) -> str:
        return ", ".join(filter(None, [detail(check), "concurrently" if check.key in concurrent else ""]))

    due = [] if step.conflicts else outermost(step.reasons)
    return [(_sign(check), _short(check), told(check)) for check in due]


# ── what a plan means ──────────────────────────────────────────────────────────────────────────────────────────────


_HOW = {Effect.BUILD: "while an index is built", Effect.SCAN: "while rows are checked"}


def locks(actions: Iterable[Action], sizes: Mapping[str, Size]) -> list[str]:
    """Say what is locked of the tables that exist, how, and how large they are: table by table, as they come."""
    strongest: dict[str, dict[str, Lock]] = {}
    for action in actions:
        how = _HOW.get(action.effect, "for an instant")
        for table, lock in action.locks.items():
            of_table = strongest.setdefault(table, {})
            of_table[how] = max(lock, of_table.get(how, lock), key=STRENGTH.index)
    rows = []
    for table, of_table in strongest.items():
        for number, (how, lock) in enumerate(of_table.items()):
            name, size = ("", "") if number else (table, _size(sizes.get(table)))
            rows.append((name, f"{lock.value} {how}", size))
    first, second = (max([len(row[column]) for row in rows], default=0) + 2 for column in (0, 1))
    aligned = [f"{name:<{first}}{lock:<{second}}{size}".rstrip() for name, lock, size in rows]
    return [line("locks", *aligned)] if rows else []


def _size(size: Size | None) -> str:
    if size is None:
        return ""
    rows = "rows not counted yet" if size.rows is None else f"about {_number(size.rows, 'row')}"
    return f"{rows}, {_bytes(size.size_bytes)}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "of unknown size (it is locked)"
    power = max(0, min((count.bit_length() - 1) // 10, len(_BYTES) - 1))
    return f"{count / 1024**power:.0f} {_BYTES[power]}"


def bystanders(seen: Sequence[Bystander], settings: Settings) -> list[str]:
    """Say whom setup would wait for at this moment."""
    told = []
    for one in seen:
        held = f"{one.mode} on {one.table}" if one.table else one.mode
        told.append(line("now", f"{one.session} and {'holds' if one.granted else 'waits for'} {held}"))
    patience = f"{settings.lock_timeout_ms / 1000:g} s at a time, for up to {settings.lock_wait_s:g} s"
    return [*told, *[line("", f"setup would wait for them, {patience} (LOCK_TIMEOUT, LOCK_WAIT)")] * bool(told)]


def consequences(plan: Plan, kept: Sequence[str], unseen: Sequence[str]) -> list[str]:
    """Say what a plan keeps, what fails once, what rows may refuse."""
    told = [line("keeps", values) for values in kept]
    if tables := " and ".join(plan.reshaped):
        told.append(line("note", f"prepared SELECT * of {tables} that are open now fail once afterwards (0A000)"))
    return told + [line("note", f"setup ends with exit 5 where rows refuse {what}") for what in unseen]


def counted(plan: Plan) -> str:
    """Count the statements of a plan."""
    inside = sum(len(action.sql) for step in plan.transactions for action in step.transaction)
    outside = sum(len(action.sql) for action in plan.concurrent)
    parts = []
    if inside:
        parts.append(f"{_number(inside, 'statement')} in {_number(len(plan.transactions), 'transaction')}")
    if outside:
        parts.append(f"{outside if inside else _number(outside, 'statement')} concurrently")
    return ", then ".join(parts) or "nothing to do"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def rehearsal(done: Rehearsed, plan: Plan) -> list[str]:
    """How a rehearsal went: what each step created in how long, and how many checks passed at its end."""
    made = {step.label: [check for action in step.transaction for check in action.checks] for step in plan.steps}
    open_ = sum(not check.passed for check in that_count(done.checks))
    later = f"; the concurrent part would fix the other {open_}, where no row refuses" if open_ else ""
    took = sum(done.duration_ms.values())
    return [
        *(step(label, timed(created(list(dict.fromkeys(made[label]))), ms)) for label, ms in done.duration_ms.items()),
        line("done", f"rolled back after {took:.0f} ms: {summary(done.checks)} until then{later}"),
    ]


# ── conflicts, errors, surroundings ────────────────────────────────────────────────────────────────────────────────


def conflicts(checks: Sequence[Check], commands: Mapping[Check, Sequence[str]]) -> list[str]:
    """Say each conflict and, below it, the commands that clear it: each once."""
    shown = outermost(checks)
    helping = {command for check in shown for command in commands.get(check, ())}
    said: set[str] = set()
    told = []
    for check in checks:
        own = commands.get(check, ())
        if check in shown or not helping.issuperset(own):  # else it goes without saying
            new = [part for command in own if command not in said for part in command.split("\n")]
            told.append(line("conflict", difference(check), *new))
            said.update(own)
    return told


def error(error: RecipeError, target: str = "") -> list[str]:
    """Say what is wrong, what it concerns, where it was (target), and what helps."""
    says = line("error", error.what, *filter(None, [*error.where.split("\n"), target]))
    return [says, line("help", *error.remedy.split("\n"))] if error.remedy else [says]


def moves(target: Target, server: Server, moving: Sequence[Move]) -> str:
    """Say what would move, and about how many rows each table has."""
    from budget_engine.migration.recreate import ARCHIVE  # here: it needs psycopg, and this module must load without

    def held(move: Move) -> str:
        return "empty" if move.rows is None else f"about {move.rows} rows" if move.rows else "with rows"

    says = (
        f"out of schema {server.schema} on {target.display} to a new one, {ARCHIVE} (or {ARCHIVE}_2, …); new and "
        "empty tables take the place of the chain's own:"
    )
    return line("moves", says, *(f"{move.found} ({held(move)})" for move in moving))


def around(seen: Surroundings, server: Server) -> list[str]:
    """Say what is unusual around the tables, and what the history says."""
    history = [
        f"{entry.finished_at}  {entry.step}, {entry.part}, {entry.duration_ms} ms, by {entry.role}, "
        f"version {entry.version}"
        for entry in seen.history
    ] or [f"none in schema {server.schema} (nothing was run here yet, or the role may not read it)"]
    return [
        *(line(one.what, one.says, *filter(None, [one.command])) for one in seen.unusual),
        *(line("history", entry) for entry in history),
        *(line("note", f"the file of {step} is not the one that was applied here last") for step in seen.changed),
    ]
