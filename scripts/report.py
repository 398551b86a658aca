"""The report: what a person reads, made of plain values. No connection, no terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from scripts.chain import RECREATE, label
from scripts.errors import RecipeError
from scripts.locks import Change
from scripts.plan import Plan, State, StepPlan
from scripts.recreation import Move
from scripts.remedies import Commands, statements
from scripts.settings import Settings, Target
from scripts.surroundings import Surroundings
from scripts.survey import ONLINE, Item, Server, outermost
from scripts.traffic import Bystander, Kept, Size

_WIDTH = 30  # the longest label, fix_prompt_snapshots_turn_id, and a little air


def target(target: Target, settings: Settings) -> list[str]:
    """Which database this is about, where its URL came from, and what of it was ignored."""
    notes = [f"note      {note}" for note in (*settings.notes, *target.notes)]
    shell = ["shell     python3 scripts/inv db.psql"] if settings.target is None else []
    path = f" (search_path {target.search_path})" if target.search_path else ""
    return [f"target    {target.display}{path} from {sources(target, settings)}", *shell, *notes]


STARTED = "started   this server, which keeps running; python3 scripts/inv db.stop stops it"


def sources(target: Target, settings: Settings) -> str:
    """Where the URL came from, and what else says where it leads."""
    return ", ".join([settings.source, *target.sources])


def place(server: Server, host: str) -> str:
    """Which tables an answer is about: those of this database, and of the schema in which they stand, or are to."""
    return f"database {server.database} on {host}, {schemas(server)}"


def schemas(server: Server) -> str:
    """Name the schema, or schemas, in which tables of ours stand; where none do, the one in which they would."""
    return f"schema {', '.join(server.homes) or server.schema or 'none'}"


def server(server: Server, items: Sequence[Item]) -> list[str]:
    """Who answers there, and where tables of ours stand, if new ones would not go there."""
    via = ", through a pooler" if server.pooled else ""
    return [
        f"server    PostgreSQL {server.version}{via}; role {server.role}, database {server.database}, "
        f"schema {server.schema or 'none'}; {row_security(items)}",
        *(f"note      {note}" for note in behind(server)),
    ]


def behind(server: Server) -> list[str]:
    """Say what is found in a later schema of the search_path than the one where new tables go."""
    return [
        f"{', '.join(tables)}: what stands is said of schema {schema}; {server.schema}, where new tables go, has none"
        for schema, tables in server.behind.items()
    ]


def row_security(items: Sequence[Item]) -> str:
    """Which of the three worlds this is."""
    # The verifications ask for row-level security on Supabase only, for admins' policies only where profiles exists.
    names = [item.name for item in items]
    if "slots row-level security" not in names:
        return "plain PostgreSQL"
    return "Supabase" if any("_admin" in name for name in names) else "Supabase without profiles"


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


STEP_HEADER = ("step", "state", "what differs")


def step_rows(plan: Plan, standing: Iterable[Item] = ()) -> list[tuple[str, str, list[str]]]:
    """How each step stands, with what differs; standing: items to be named although they stand."""
    return [
        (
            label(planned.stem),
            planned.state.value + _parts(planned),
            [
                *(_reason(item, planned) for item in outermost(planned.reasons)),
                *(f"{item.name}: {item.actual}" for item in standing if item.stem == planned.stem and item.stands),
            ],
        )
        for planned in plan.steps
    ]


def step_cells(plan: Plan, standing: Iterable[Item] = ()) -> list[tuple[str, str, str]]:
    """Say the same in short, for a table: what is missing by its names alone."""
    stands = [item for item in standing if item.stands]
    return [
        (
            label(planned.stem),
            planned.state.value,
            "\n".join([*_in_short(planned), *(f"{it.name}: {it.actual}" for it in stands if it.stem == planned.stem)]),
        )
        for planned in plan.steps
    ]


def _in_short(planned: StepPlan) -> list[str]:
    missing: dict[str, list[str]] = {}
    lines = []
    for item in outermost(planned.reasons):
        if item.actual is None and item.mended_by in (planned.stem, planned.stem + ONLINE):
            how = "missing, to be built online: " if _comes_online(item, planned) else "missing: "
            missing.setdefault(how, []).append(_NAMED.sub("", item.name))
        else:
            lines.append(_reason(item, planned))
    return [*lines, *(how + ", ".join(names) for how, names in missing.items())]


_NAMED = re.compile(r"^\w+ (index|trigger|function|policy) ")  # what bears a name of its own needs no table's


def _comes_online(item: Item, planned: StepPlan) -> bool:
    """Whether a step's online part mends it: what belongs to a new table comes with the table."""
    return planned.online and item.mended_by == planned.stem + ONLINE


def _reason(item: Item, planned: StepPlan) -> str:
    """Say why a step has anything to do; that it is the one who mends it goes without saying."""
    if item.mended_by not in (planned.stem, planned.stem + ONLINE):
        return difference(item)
    online = " (online)" if _comes_online(item, planned) else ""
    return f"{item.name}: {item.actual or 'missing'}, promised: {item.expected}{online}"


def _parts(planned: StepPlan) -> str:
    if planned.state not in (State.PENDING, State.HALF_DONE):
        return ""
    parts = [name for name, due in (("atomic part", planned.atomic), ("online part", planned.online)) if due]
    return f" ({' and '.join(parts)} due)"


def steps(rows: Iterable[tuple[str, str, list[str]]]) -> list[str]:
    """Write such rows as lines."""
    return [line for name, state, what in rows for line in (step(name, state), *(step("", text) for text in what))]


def rehearsal(items: Sequence[Item], duration_ms: Mapping[str, float]) -> list[str]:
    """How a rehearsal went: how long each step took, and what stood before it was rolled back."""
    online = [item for item in items if not item.stands]
    refusable = any(item.orphans or item.expected == "UNIQUE" for item in online)
    return [
        *(step(name, f"{took:.0f} ms") for name, took in duration_ms.items()),
        f"rolled back after {sum(duration_ms.values()):.0f} ms: {summary(items)} until then"
        + (f"; online parts would bring the other {len(online)}" if online else "")
        + (", where no row refuses" if refusable else ""),
    ]


CHANGE_HEADER = ("step", "statements", "effect, locks")
_BYTES = ("B", "kB", "MB", "GB", "TB")


def change_cells(changes: Sequence[Change]) -> list[tuple[str, str, str]]:
    """Say what each step would do, statements of the same locks and effect together; for a table."""
    together: dict[tuple[str, str], list[str]] = {}
    for (name, online, statement), lines in _locks_by_statement(changes).items():
        together.setdefault((name + ("\n(online)" if online else ""), "\n".join(lines)), []).append(statement)
    rows, last = [], ""
    for (name, takes), what in together.items():
        rows.append(("" if name == last else name, "\n".join(what), takes))
        last = name
    return rows


def changes(changes: Sequence[Change]) -> list[str]:
    """Say what each step would do, a line for each statement."""
    return [
        step(name, f"{'online: ' if online else ''}{statement}: {'; '.join(takes)}")
        for (name, online, statement), takes in _locks_by_statement(changes).items()
    ]


def _locks_by_statement(changes: Sequence[Change]) -> dict[tuple[str, bool, str], list[str]]:
    """Return what each statement does, and the locks that it takes."""
    found: dict[tuple[str, bool, str], list[str]] = {}
    for change in changes:
        lines = found.setdefault((change.step, change.online, change.statement), [change.effect.value])
        lines += [f"{change.lock.value} on {change.table}"] if change.lock else []
    return found


def sizes(standing: Iterable[Size]) -> list[str]:
    """Say how large the tables are that others use."""
    return [f"table     {size.name}: {_rows(size)}, {_bytes(size)}" for size in standing]


def _rows(size: Size) -> str:
    return "rows not counted yet" if size.rows is None else f"about {size.rows:,} rows"


def _bytes(size: Size) -> str:
    if size.size_bytes is None:
        return "of unknown size (it is locked)"
    power = max(0, min((size.size_bytes.bit_length() - 1) // 10, len(_BYTES) - 1))
    return f"{size.size_bytes / 1024**power:.0f} {_BYTES[power]} with its indexes"


def consequences(
    settings: Settings,
    reshaped: Sequence[str],
    bystanders: Sequence[Bystander],
    kept: Sequence[Kept],
    unseen: Sequence[str],
) -> list[str]:
    """Say what a plan means: whom it would wait for now, what it keeps, what fails once, what rows may refuse."""
    patience = f"{settings.lock_timeout_ms / 1000:g} s at a time, up to {settings.lock_wait_s:g} s in all"
    lines = [f"now       {one.session} {_hold(one)}" for one in bystanders]
    if bystanders:
        lines.append(f"          setup would wait for them, {patience} (LOCK_TIMEOUT, LOCK_WAIT)")
    lines += [f"keeps     {_count(values)} values of {values.column}, in the column {values.into}" for values in kept]
    if reshaped:
        tables = ", ".join(reshaped)
        lines.append(f"note      prepared SELECT * statements of {tables} fail once: 0A000, their result type changes")
    lines += [f"note      setup ends with exit 5 where rows refuse this: {statement}" for statement in unseen]
    return lines


def _hold(one: Bystander) -> str:
    held = f"{one.mode} on {one.table}" if one.table else one.mode
    return f"[{'holds' if one.granted else 'waits for'} {held}]"


def _count(values: Kept) -> str:
    if values.count is not None:
        return f"{values.count:,}"
    return "an unknown number of" if values.estimate is None else f"about {values.estimate:,}"


def around(seen: Surroundings, server: Server) -> list[str]:
    """Say what stands around the chain, and what helps where that is no good."""
    more = seen.elsewhere_count - len(seen.elsewhere)
    return [
        *(
            f"roles     {role} may write turns, but not turn_metrics: GRANT INSERT ON turn_metrics TO {role};"
            for role in seen.unwritable
        ),
        *(
            f"elsewhere {name} bears a name of ours; the search_path ({server.search_path}) does not lead to it"
            for name in seen.elsewhere
        ),
        *([f"elsewhere {more:,} more relations bear names of ours"] if more else []),
        *(f"invalid   index {name}: left by a build that was stopped; setup builds ours anew" for name in seen.invalid),
        *(
            f"diary     {entry.finished_at}  {label(entry.step)}, {entry.part} part, {entry.duration_ms} ms, "
            f"by {entry.role}, version {entry.version}"
            for entry in seen.diary
        ),
        *([] if seen.diary else ["diary     none (nothing was run here yet, or the role may not read it)"]),
        *(f"changed   db/migrations/{stem}.sql is not the file that was applied here last" for stem in seen.changed),
    ]


def difference(item: Item) -> str:
    """Say what stands, what is promised, and who mends it."""
    return f"{item.name}: {item.actual or 'missing'}, promised: {item.expected} ({_remedy(item)})"


def obstacles(items: Sequence[Item], remedies: Mapping[str, Commands]) -> list[str]:
    """Say what is in the way and, below it, the commands that clear it: each once, and tasks after all SQL."""
    groups: list[tuple[list[str], list[str]]] = []
    for line, concerned in _obstacles(_to_be_said(items, remedies)):
        commands = list(dict.fromkeys(command for item in concerned for command in remedies.get(item.name, ())))
        known = next((group for group in groups if statements(group[1]) >= statements(commands)), ([], commands))
        known[0].append(line)
        if len(known[0]) == 1:
            groups.append(known)
    groups.sort(key=lambda group: any(command.startswith("invoke ") for command in group[1]))
    said: set[str] = set()
    lines: list[str] = []
    for described, commands in groups:
        lines += [*described, *_indented([command for command in commands if command not in said])]
        said |= statements(commands)
    return lines


def _to_be_said(items: Sequence[Item], remedies: Mapping[str, Commands]) -> list[Item]:
    """Leave out what goes without saying, unless it has a remedy of its own."""
    shown = outermost(items)
    helping = {command for item in shown for command in remedies.get(item.name, ())}
    return [item for item in items if item in shown or not helping.issuperset(remedies.get(item.name, ()))]


def _obstacles(items: Sequence[Item]) -> list[tuple[str, list[Item]]]:
    """Say what is in the way, and which items each line is about; a table that lacks columns is said in one line."""
    lacking: dict[str, list[Item]] = {}
    for item in items:
        if re.fullmatch(r"\w+\.\w+", item.name) and item.actual is None:
            lacking.setdefault(item.table, []).append(item)
    return [
        *(
            (f"{table} stands without {', '.join(item.name.partition('.')[2] for item in columns)}", columns)
            for table, columns in lacking.items()
        ),
        *(
            (f"{item.name}: {item.actual or 'missing'}, promised: {item.expected}", [item])
            for item in items
            if item not in lacking.get(item.table, [])
        ),
    ]


def _indented(commands: Sequence[str]) -> list[str]:
    return [f"    {line}" for command in commands for line in command.splitlines()]


def way_out(items: Sequence[Item], remedies: Mapping[str, Commands]) -> str:
    """Say what helps against these obstacles."""
    ways = ["Run the commands above in their order (SQL: invoke db.psql), which lose no row; then the task again."]
    if not remedies:
        ways = ["Run invoke verify when the tables are not locked: it has the commands that help."]
    recreate = any("--recreate" in command for commands in remedies.values() for command in commands)
    if not recreate and any(item.on_request == RECREATE for item in items):
        ways += ["Or invoke prereqs --recreate: it moves the old core tables, rows and all, and creates new ones."]
    return "\n".join(ways)


def moves(target: Target, schema: str | None, moving: Sequence[Move], rows: Mapping[str, int | None]) -> list[str]:
    """Say what would move where; rows: about how many each table has (see survey.rows_of)."""

    def held(table: str) -> str:
        return "empty" if rows[table] is None else f"about {rows[table]} rows" if rows[table] else "with rows"

    return [
        f"to be moved from schema {schema} on {target.display}, new and empty tables to take their place:",
        *(f"  {move.table} ({held(move.table)}) to schema {move.where}" for move in moving),
    ]


def _remedy(item: Item) -> str:
    if item.mended_by is None:
        return "in the way"
    stem = item.mended_by.removesuffix(ONLINE)
    return f"{label(stem)} mends it" + (" online" if item.mended_by.endswith(ONLINE) else "")


def summary(items: Sequence[Item]) -> str:
    """How many promises stand."""
    return f"{sum(item.stands for item in items)} of {len(items)} promises stand"
