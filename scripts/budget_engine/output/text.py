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


def line(label: str, text: str) -> str:
    """Write a line that begins with a label; the lines of a longer text are aligned."""
    return f"{label:<{LABEL - 1}} " + text.replace("\n", "\n" + " " * LABEL)


def target(target: Target, settings: Settings, server: Server | None = None) -> str:
    """Which database this is about, where its URL came from, and who answers."""
    if server is None:
        return line("target", f"{target.display} ({sources(target, settings)})")
    via = " through a pooler" if server.pooled else ""
    return line(
        "target",
        f"{target.display}, {place(server)} ({sources(target, settings)}), "
        f"PostgreSQL {server.version}{via}, role {server.role}",
    )


def place(server: Server, host: str = "") -> str:
    """Name the database, its host, and the schemas in which our tables exist, or the one where they would."""
    where = f" on {host}" if host else ""
    return f"database {server.database}{where}, schema {', '.join(server.homes) or server.schema or 'none'}"


def opening(target_: Target, settings: Settings, found: Survey) -> str:
    """Write what is said before anything else: the target, and what is unusual about the way there."""
    behind_ = (line("note", note) for note in behind(found.server, found.checks))
    return "\n".join([target(target_, settings, found.server), *notes(target_, settings), *behind_])


def behind(server: Server, checks: Iterable[Check]) -> list[str]:
    """Say what is found in a later schema of the search_path than the one where new tables go."""
    later: dict[str, list[str]] = {}
    for check in checks:
        if check.kind is Kind.TABLE and check.found and check.home != server.schema:
            later.setdefault(str(check.home), []).append(check.table)
    return [
        f"{', '.join(tables)}: this is about schema {home}; {server.schema}, where new tables go, has none"
        for home, tables in later.items()
    ]


WITHOUT_PROFILES = "Supabase without profiles"
STARTED = line(
    "note", "the embedded server was started and keeps running; invoke db.psql opens it, invoke db.stop stops it"
)


def sources(target: Target, settings: Settings) -> str:
    """Where the URL came from, and what else says where it leads."""
    return ", ".join([settings.source, *target.sources])


def notes(target: Target, settings: Settings) -> list[str]:
    """Say what was ignored or corrected in the settings."""
    return [line("note", note) for note in (*settings.notes, *target.notes)]


def row_security(checks: Iterable[Check]) -> str:
    """Which kind of server this is: the verification asks for policies where there is something to protect."""
    policies = [check.name for check in checks if check.kind is Kind.POLICY]
    secured = any(check.kind is Kind.ROW_SECURITY for check in checks)
    if not secured and not policies:
        return "plain PostgreSQL"
    return "Supabase" if any("_admin" in name for name in policies) else WITHOUT_PROFILES


def without_admins(checks: Iterable[Check]) -> list[str]:
    """Say that nobody but the service role gets a row, where that is so: admins are missing, not failing."""
    if row_security(checks) != WITHOUT_PROFILES:
        return []
    return [line("note", f"{WITHOUT_PROFILES} (id uuid, role): no policies for admins; with it they are pending")]


def summary(checks: Iterable[Check]) -> str:
    """How many of the checks pass."""
    counted = that_count(checks)
    return f"{sum(check.passed for check in counted)} of {len(counted)} checks pass"


# ── steps ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def step(label: str, text: str, took_ms: float | None = None) -> str:
    """Write what happened to a step; the lines of a longer text are aligned."""
    took = "" if took_ms is None else f"  {took_ms:.0f} ms"
    width = 0 if took_ms is None else _CREATED
    return f"  {label:<{_STEP}}" + f"{text:<{width}}".replace("\n", "\n" + " " * (_STEP + 2)) + took


def created(checks: Sequence[Check]) -> str:
    """Say in one line what a transaction created (+) and changed (~); a column's indexes and key go along with it."""
    shown = outermost(checks)
    columns = [check for check in shown if check.kind is Kind.COLUMN]
    shown = [
        check
        for check in shown
        if check.kind not in (Kind.INDEX, Kind.FOREIGN_KEY) or not any(check.is_on(column) for column in columns)
    ]
    new = [_short(check) for check in shown if check.actual is None]
    changed = [_short(check) for check in shown if check.actual is not None]
    return "  ".join(f"{sign} {', '.join(names)}" for sign, names in (("+", new), ("~", changed)) if names)


def _short(check: Check) -> str:
    """Name a thing; what has a name of its own needs no kind."""
    return check.name if check.kind in (Kind.INDEX, Kind.TRIGGER, Kind.POLICY) else check.title


def difference(check: Check) -> str:
    """Say what the database has, and what is expected."""
    return f"{check.title} is {check.actual or 'missing'}, expected {check.expected}"


_Row = tuple[str, str, str]  # a sign, a thing, and what there is to say of it


def steps(plan: Plan, *, passed: Iterable[Check] = (), conflicts: bool = True) -> list[str]:
    """Say how each step is, and what it would create or change.

    passed: checks to be named although they pass; conflicts: whether to name those, which nothing else will.
    """
    named: dict[str, list[_Row]] = {planned.label: [] for planned in plan.steps}
    for check in passed:
        if check.passed and check.step in named:
            named[check.step].append((" ", check.title, str(check.actual)))
    return _listed(
        (planned, [*_things(planned, conflicts=conflicts), *_told(planned), *named[planned.label]])
        for planned in plan.steps
    )


def things(plan: Plan) -> list[str]:
    """Say what each step that has anything to do creates or changes, a line each."""
    rows = [(planned, _things(planned, conflicts=False)) for planned in plan.steps]
    return _listed((planned, things) for planned, things in rows if things or planned.conflicts)


def _listed(steps: Iterable[tuple[StepPlan, list[_Row]]]) -> list[str]:
    """Write a line for each step and, below it, one for each of its things; their details begin in one column."""
    steps = list(steps)
    names = [planned.label for planned, _ in steps] + [f"    {thing}" for _, rows in steps for _, thing, _ in rows]
    width = min(max(map(len, names), default=0) + 4, _DETAIL)
    lines = []
    for planned, rows in steps:
        lines.append(f"{f'  {planned.label}  ':<{width}}{planned.state.value}")
        lines += [f"{f'    {sign} {thing}  ':<{width}}{detail}".rstrip() for sign, thing, detail in rows]
    return lines


def _things(planned: StepPlan, *, conflicts: bool) -> list[_Row]:
    """Return what a step creates or changes; of one that has a conflict, which runs nothing: the conflicts."""
    if planned.conflicts:
        found = outermost(planned.conflicts) if conflicts else []
        return [("!", check.title, f"is {check.actual or 'missing'}, expected {check.expected}") for check in found]
    concurrent = {check.key for action in planned.concurrent for check in action.checks}
    defaults = {(c.table, c.name): f" DEFAULT {c.expected}" for c in planned.reasons if c.kind is Kind.DEFAULT}
    return [
        (
            "+" if check.actual is None else "~",
            _short(check),
            ", ".join(filter(None, [_detail(check, defaults), "concurrently" if check.key in concurrent else ""])),
        )
        for check in outermost(planned.reasons)
    ]


def _told(planned: StepPlan) -> list[_Row]:
    return [
        ("=", check.title, f"is {check.actual or 'missing'}, documented: {check.expected}; not required")
        for check in outermost(planned.told)
    ]


def _detail(check: Check, defaults: Mapping[tuple[str, str], str]) -> str:
    if check.kind is Kind.TABLE:
        return "new table"
    if check.kind in (Kind.COMMENT, Kind.FUNCTION, Kind.TRIGGER):
        return "" if check.actual is None else "brought to the expected form"
    if check.actual is not None:
        return f"{check.actual} → {check.expected}"
    default = defaults.get((check.table, check.name), "") if check.kind is Kind.COLUMN else ""
    return check.expected + default.removesuffix(" DEFAULT none")


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
    rows = [
        (table if place == 0 else "", f"{lock.value} {how}", _size(sizes.get(table)) if place == 0 else "")
        for table, of_table in strongest.items()
        for place, (how, lock) in enumerate(of_table.items())
    ]
    first, second = (max([len(row[column]) for row in rows], default=0) + 2 for column in (0, 1))
    return [
        line("" if place else "locks", f"{table:<{first}}{lock:<{second}}{size}".rstrip())
        for place, (table, lock, size) in enumerate(rows)
    ]


def _size(size: Size | None) -> str:
    if size is None:
        return ""
    rows = "rows not counted yet" if size.rows is None else f"about {size.rows:,} row{'' if size.rows == 1 else 's'}"
    return f"{rows}, {_bytes(size.size_bytes)}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "of unknown size (it is locked)"
    power = max(0, min((count.bit_length() - 1) // 10, len(_BYTES) - 1))
    return f"{count / 1024**power:.0f} {_BYTES[power]}"


def bystanders(seen: Sequence[Bystander], settings: Settings) -> list[str]:
    """Say whom setup would wait for at this moment."""
    lines = [line("now", f"{one.session} and {_hold(one)}") for one in seen]
    if seen:
        patience = f"{settings.lock_timeout_ms / 1000:g} s at a time, for up to {settings.lock_wait_s:g} s"
        lines.append(line("", f"setup would wait for them, {patience} (LOCK_TIMEOUT, LOCK_WAIT)"))
    return lines


def _hold(one: Bystander) -> str:
    held = f"{one.mode} on {one.table}" if one.table else one.mode
    return f"{'holds' if one.granted else 'waits for'} {held}"


def consequences(plan: Plan, kept: Sequence[str], unseen: Sequence[str]) -> list[str]:
    """Say what a plan keeps, what fails once, what rows may refuse."""
    lines = [line("keeps", values) for values in kept]
    if plan.reshaped:
        tables = " and ".join(plan.reshaped)
        lines.append(line("note", f"prepared SELECT * of {tables} that are open now fail once afterwards (0A000)"))
    return [
        *lines,
        *(line("note", f"setup ends with exit 5 where rows refuse {what}") for what in unseen),
    ]


def counted(plan: Plan) -> str:
    """Count the statements of a plan."""
    inside = sum(len(action.sql) for step in plan.transactions for action in step.transaction)
    parts = []
    if inside:
        parts.append(f"{_number(inside, 'statement')} in {_number(len(plan.transactions), 'transaction')}")
    if plan.concurrent:
        outside = sum(len(action.sql) for action in plan.concurrent)
        parts.append(f"{outside} concurrently" if inside else f"{_number(outside, 'statement')} concurrently")
    return ", then ".join(parts) or "nothing to do"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def rehearsal(done: Rehearsed, plan: Plan) -> list[str]:
    """How a rehearsal went: what each step created in how long, and how many checks passed at its end."""
    made = {step.label: [check for action in step.transaction for check in action.checks] for step in plan.steps}
    open_ = sum(not check.passed for check in that_count(done.checks))
    later = f"; the concurrent part would fix the other {open_}, where no row refuses" if open_ else ""
    took = sum(done.duration_ms.values())
    return [
        *(step(label, created(list(dict.fromkeys(made[label]))), ms) for label, ms in done.duration_ms.items()),
        line("done", f"rolled back after {took:.0f} ms: {summary(done.checks)} until then{later}"),
    ]


# ── waiting, conflicts, errors ─────────────────────────────────────────────────────────────────────────────────────


def retry(hindrance: RecipeError, pause_s: float, left_s: float) -> str:
    """Say what was not granted, and when the next try is."""
    return line("waiting", f"{hindrance.what}; next try in {pause_s:.1f} s, for up to {left_s:.0f} s")


def wait(hindrance: RecipeError, left_s: float) -> list[str]:
    """Say who is at work, and how long that is waited for."""
    return [
        line("waiting", f"{hindrance.what}; up to {left_s:.0f} s"),
        *(line("", who) for who in hindrance.where.splitlines()),
    ]


def conflicts(checks: Sequence[Check], commands: Mapping[Check, Sequence[str]]) -> list[str]:
    """Say each conflict and, below it, the commands that clear it: each once."""
    said: set[str] = set()
    lines = []
    for check in _to_be_said(checks, commands):
        lines.append(line("conflict", difference(check)))
        new = [command for command in commands.get(check, ()) if command not in said]
        lines += [line("", part) for command in new for part in command.splitlines()]
        said.update(new)
    return lines


def _to_be_said(checks: Sequence[Check], commands: Mapping[Check, Sequence[str]]) -> list[Check]:
    """Leave out what goes without saying, unless it has a command of its own."""
    shown = outermost(checks)
    helping = {command for check in shown for command in commands.get(check, ())}
    return [check for check in checks if check in shown or not helping.issuperset(commands.get(check, ()))]


def error(error: RecipeError, target: str = "") -> list[str]:
    """Say what is wrong, what it concerns, where it was (target), and what helps."""
    return [
        line("error", error.what),
        *(line("", part) for part in error.where.splitlines()),
        *([line("", target)] if target else []),
        *([line("help", error.remedy)] if error.remedy else []),
    ]


def moves(target: Target, server: Server, moving: Sequence[Move]) -> list[str]:
    """Say what would move, and about how many rows each table has."""
    from budget_engine.migration.recreate import ARCHIVE  # here: it needs psycopg, and this module must load without

    def held(move: Move) -> str:
        return "empty" if move.rows is None else f"about {move.rows} rows" if move.rows else "with rows"

    return [
        line(
            "moves",
            f"out of schema {server.schema} on {target.display} to a new one, {ARCHIVE} (or {ARCHIVE}_2, …); new and "
            "empty tables take the place of the chain's own:",
        ),
        *(line("", f"{move.found} ({held(move)})") for move in moving),
    ]


def around(seen: Surroundings, server: Server) -> list[str]:
    """Say what is unusual around the tables, and what the history says."""
    return [
        *(line(one.what, one.says + (f"\n{one.command}" if one.command else "")) for one in seen.unusual),
        *(
            line(
                "history",
                f"{entry.finished_at}  {entry.step}, {entry.part}, {entry.duration_ms} ms, by {entry.role}, "
                f"version {entry.version}",
            )
            for entry in seen.history
        ),
        *(
            []
            if seen.history
            else [
                line(
                    "history", f"none in schema {server.schema} (nothing was run here yet, or the role may not read it)"
                )
            ]
        ),
        *(line("note", f"the file of {step} is not the one that was applied here last") for step in seen.changed),
    ]
