"""The report: what a person reads, made of plain values. No connection, no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from scripts.chain import RECREATE, label
from scripts.errors import RecipeError
from scripts.plan import Plan, State
from scripts.recreation import Move
from scripts.settings import Settings, Target
from scripts.survey import ONLINE, Item, Server

_WIDTH = 30  # the longest label, fix_prompt_snapshots_turn_id, and a little air


def target(target: Target, settings: Settings) -> list[str]:
    """Which database this is about, where its URL came from, and what of it was ignored."""
    notes = [f"note      {note}" for note in (*settings.notes, *target.notes)]
    shell = ["shell     python3 scripts/inv db.psql"] if settings.target is None else []
    return [f"target    {target.display}", f"from      {sources(target, settings)}", *shell, *notes]


def sources(target: Target, settings: Settings) -> str:
    """Where the URL came from, and what else says where it leads."""
    return ", ".join([settings.source, *target.sources])


def server(server: Server, items: Sequence[Item]) -> str:
    """Who answers there."""
    via = ", through a pooler" if server.pooled else ""
    return (
        f"server    PostgreSQL {server.version}{via}; role {server.role}, database {server.database}, "
        f"schema {server.schema}; {_row_security(items)}"
    )


def _row_security(items: Sequence[Item]) -> str:
    # The verifications ask for row-level security on Supabase only, for admins' policies only where profiles exists.
    names = [item.name for item in items]
    if "slots row-level security" not in names:
        return "plain PostgreSQL"
    return "Supabase" if any("_admin" in name for name in names) else "Supabase, without admin policies"


def step(label: str, what: str) -> str:
    """One thing that happened to a step; the lines of a longer one stay together."""
    return f"{label:<{_WIDTH}}" + what.replace("\n", "\n" + " " * _WIDTH)


def retry(hindrance: RecipeError, pause_s: float, left_s: float) -> str:
    """Say what was not granted, and when it is asked for again."""
    return f"waiting   {hindrance.what}; again in {pause_s:.1f} s, for up to {left_s:.0f} s"


def wait(hindrance: RecipeError, left_s: float) -> list[str]:
    """Say who is at work, and how long that is waited for."""
    return [
        f"waiting   {hindrance.what}; up to {left_s:.0f} s",
        *(f"          {who}" for who in hindrance.where.splitlines()),
    ]


def steps(plan: Plan) -> list[str]:
    """How each step stands, with what differs."""
    lines = []
    for planned in plan.steps:
        parts = [name for name, due in (("atomic part", planned.atomic), ("online part", planned.online)) if due]
        what = planned.state.value
        if planned.state is State.PENDING:
            what += f" ({' and '.join(parts)})"
        lines.append(step(label(planned.stem), what))
        lines += [step("", difference(item)) for item in outermost(planned.reasons)]
    return lines


def difference(item: Item) -> str:
    """Say what stands, what is promised, and who mends it."""
    return f"{item.name}: {item.actual or 'missing'}, promised: {item.expected} ({_remedy(item)})"


def obstacles(items: Sequence[Item]) -> list[str]:
    """Say what is in the way; a table that lacks columns is said in one line, with their names."""
    shown = outermost(items)
    lacking: dict[str, list[str]] = {}
    for item in shown:
        table, is_column, column = item.name.partition(".")
        if is_column and item.actual is None:
            lacking.setdefault(table, []).append(column)
    return [
        *(f"{table} stands without {', '.join(columns)}" for table, columns in lacking.items()),
        *(
            f"{item.name}: {item.actual or 'missing'}, promised: {item.expected}"
            for item in shown
            if item.actual is not None or item.table not in lacking
        ),
    ]


def way_out(items: Sequence[Item]) -> str:
    """Say what helps against these obstacles."""
    ways = ['README.md, "In the way", has the command for each case; then run the task again.']
    if any(item.on_request == RECREATE for item in items):
        ways += ["Or invoke prereqs --recreate: it moves the old core tables, rows and all, and creates new ones."]
    if any(item.stem == RECREATE for item in items):
        ways += ["Or add --with-dependants: tables whose foreign keys lead into the old core tables move along."]
    return "\n".join(ways)


def moves(target: Target, moving: Sequence[Move], rows: Mapping[str, int | None]) -> list[str]:
    """Say what would move where; rows: about how many each table has (see survey.rows_of)."""

    def held(table: str) -> str:
        return "empty" if rows[table] is None else f"about {rows[table]} rows" if rows[table] else "with rows"

    return [
        f"to be moved on {target.display}, new and empty tables to take their place:",
        *(f"  {move.table} ({held(move.table)}) to schema {move.where}" for move in moving),
    ]


def _remedy(item: Item) -> str:
    if item.mended_by is None:
        return "in the way"
    stem = item.mended_by.removesuffix(ONLINE)
    return f"{label(stem)} mends it" + (" online" if item.mended_by.endswith(ONLINE) else "")


def outermost(items: Iterable[Item]) -> list[Item]:
    """Leave out what is part of a table or column that is missing or of the wrong kind: one line says it all."""
    items = list(items)
    broken = {item.name for item in items if item.name.isidentifier() or item.actual is None}
    return [item for item in items if broken.isdisjoint(_containers(item.name))]


def _containers(name: str) -> tuple[str, ...]:
    """Names of the table, and of the column, that an item is part of."""
    column = name.partition(" ")[0]
    table = column.partition(".")[0]
    return tuple(container for container in (table, column) if container != name)


def summary(items: Sequence[Item]) -> str:
    """How many promises stand."""
    return f"{sum(item.stands for item in items)} of {len(items)} promises stand"
