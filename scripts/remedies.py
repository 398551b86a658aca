"""The remedies: the commands that clear what is in the way, made of the items and of what stands around them.

One for each kind of item, none of which loses a row: what can be brought to the promised form is, where it stands; what
cannot is renamed, or moved with its table. README, "In the way".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scripts import facts
from scripts.database import Database
from scripts.errors import LockTimeoutError, StatementError, for_sqlstate
from scripts.facts import Facts
from scripts.survey import Item

Commands = tuple[str, ...]  # SQL for psql, or the words of a task; a comment begins with --

_KINDS = {
    "table": r"(?P<table>\w+)",
    "column": r"(?P<table>\w+)\.(?P<column>\w+)",
    "dependants": r"(?P<column>\w+\.\w+) dependants",
    "key": r"(?P<table>\w+) \((?P<columns>[\w, ]+)\)",
    "foreign key": r"(?P<table>\w+) foreign key \((?P<column>\w+)\)",
    "policy": r"(?P<table>\w+) policy \w+",
    "name": r"(?P<table>\w+) (?:index|trigger|function) (?P<name>\w+)(?:\(\))?",
    "leading into the core": r".+ foreign key .+",
}

# What the chain adds to a table: where it cannot be used as it is, it gives way, and the step adds its own.
_ADDED = {"prompt_snapshots.parent_id", "prompt_snapshots.budget_report", "slots.must_keep", "slots.min_chars"}

# Of these types every value is one of the promised type, too; of those below, each that can be read as one.
_WITHIN = {
    "text": {"character varying", "character"},
    "text[]": {"character varying[]", "character[]"},
    "integer": {"smallint"},
    "bigint": {"smallint", "integer"},
    "timestamp with time zone": {"timestamp with time zone", "timestamp without time zone", "date"},
}
_TEXTS = {"text", "character varying", "character"}
_READABLE = {
    "uuid": _TEXTS,
    "bigint": _TEXTS,
    "integer": {*_TEXTS, "bigint"},
    "boolean": {*_TEXTS, "integer"},
    "timestamp with time zone": _TEXTS,
    "jsonb": {*_TEXTS, "json"},
}


def read(database: Database, items: Sequence[Item]) -> Mapping[str, Commands]:
    """Return the commands that clear each of these items, which are in the way; none, where none of them is.

    Several items may have the same ones: each is to be run once, in the order of the items, tasks after all SQL.
    """
    if not items:
        return {}
    tables = {table for item in items for table in (item.table, _target(item), *_unlogged(item)) if table}
    words = {word for item in items for word in re.findall(r"\w+", f"{item.name} {_taken(item)}")}
    names = words.union(*(_names_to_be(item) for item in items))
    try:
        return of(items, facts.read(database, tables, names))
    except StatementError as error:  # a view behind ACCESS EXCLUSIVE: what is in the way can be said without it
        if not issubclass(for_sqlstate(error.sqlstate), LockTimeoutError):
            raise
        return {}


def of(items: Sequence[Item], found: Facts) -> dict[str, Commands]:
    """Return the commands that clear each item."""
    in_place = {item.name: _in_place(item, found) for item in items}
    recreated = found.recreated if any(item.on_request and in_place[item.name] is None for item in items) else set()
    leaving = recreated | {item.table for item in items if in_place[item.name] is None}

    def commands(item: Item) -> Commands:
        if item.table not in leaving or _is_of_another(item) or _is_no_table(item.table, found):
            return _together(item, in_place)
        if _taken(item):
            return _rename(item.table, _taken(item), found)
        return _recreate(found) if item.table in recreated else _move(item.table, found)

    return {item.name: commands(item) for item in items}


def statements(commands: Sequence[str]) -> set[str]:
    """Return what of the commands is to be run."""
    return {command for command in commands if not command.startswith("--")}


def _is_of_another(item: Item) -> bool:
    """Whether something that is no part of the item's table bears the item's name: it stays when the table goes."""
    return re.fullmatch("an index on .*|not an index", item.actual or "") is not None


def _is_no_table(name: str, found: Facts) -> bool:
    """Whether what bears a table's name is no kind of table or view."""
    return any(kind in ("SEQUENCE", "INDEX", "TYPE") for kind, _ in found.all(name, "stands"))


def _taken(item: Item) -> str:
    found = re.search(r"the name (\w+) is taken", item.actual or "")
    return found[1] if found else ""


def _parts(item: Item) -> tuple[str, re.Match[str]]:
    """Return the item's kind, and what its name says."""
    return next((kind, name) for kind, pattern in _KINDS.items() if (name := re.fullmatch(pattern, item.name)))


def _together(item: Item, in_place: Mapping[str, Commands | None]) -> Commands:
    """Return the item's commands where those of others run, too: what these rename or drop needs no other."""
    kind, name = _parts(item)
    ways = in_place[item.name] or ()
    if kind == "foreign key":
        column = in_place.get(f"{name['table']}.{name['column']}") or ()
        return column if any(" RENAME COLUMN " in command for command in column) else ways
    if kind == "name":
        dropped = in_place.get("prompt_snapshots.turn_id dependants") or ()
        rest = tuple(way for way in ways if _as_dropped(way) not in dropped)
        return ways if rest == ways else (*dropped, *rest)
    if kind == "dependants":  # a primary key that holds turn_id gives way to the promised one
        key = [command for command in in_place.get("prompt_snapshots (id)") or () if not command.startswith("--")]
        given = {way for way in ways if any(command.startswith(f"{way.removesuffix(';')}, ") for command in key)}
        if given:
            return (*key, *(way for way in ways if way not in given and " PRIMARY KEY (" not in way))
    return ways


def _as_dropped(rename: str) -> str:
    return re.sub(r"ALTER INDEX (.+) RENAME .*", r"DROP INDEX \1;", rename)


def _in_place(item: Item, found: Facts) -> Commands | None:
    """Return the commands that leave the item's table where it is; None: the table has to go."""
    return _set_free(item, found) if _kept_by(item) else _mended(item, found)


def _mended(item: Item, found: Facts) -> Commands | None:
    kind, name = _parts(item)
    stands = found.all(item.table, "stands")
    if kind in ("table", "column", "key") and stands:
        if _is_no_table(item.table, found):
            return _rename(item.table, item.table, found)
        if stands[0][0] != "TABLE":
            return None
    if kind == "table":
        return tuple(_removed(found.all(item.table, "child"))) if item.actual == "partition" else None
    if kind == "column":
        return _column(item, stands[0][1], name["column"], found)
    if kind == "dependants":
        return tuple(_dependants(name["column"], found))
    if kind == "key":
        return _key(item, stands[0][1], found) if stands else _rename(item.table, _taken(item), found)
    if kind == "foreign key":
        others = [key for key in found.all(item.name, "foreign key") if not _is_promised(key[1], item, found)]
        return tuple(_removed(others)) or _rename(item.table, _names_to_be(item)[0], found)
    if kind == "policy":
        return tuple(_removed(found.all(item.name, "policy")))
    return _rename(item.table, name["name"], found) if kind == "name" else _recreate(found)


def _kept_by(item: Item) -> str:
    """Return what keeps a table, a column or a key from being made (see survey)."""
    kept = re.fullmatch(r"(?:missing|uuid(?: NOT NULL)?), and (.*)", item.actual or "")
    return kept[1] if kept else ""


def _unlogged(item: Item) -> list[str]:
    return re.findall(r"(\w+) is UNLOGGED", _kept_by(item))


def _set_free(item: Item, found: Facts) -> Commands | None:
    """Return the commands after which the item can be made; None: its table has to go."""
    kept_by = _kept_by(item)
    if unlogged := _unlogged(item):
        return tuple(_logged(unlogged, found))
    if " OF " in kept_by:
        return tuple(line for free, of in found.all(item.table, "of type") for line in (free, f"-- it was OF {of}"))
    if "replica identity" in kept_by:
        return tuple(free for free, _ in found.all(item.table, "without identity"))
    return tuple(_heirs_renamed(item.name, found)) or None


def _logged(tables: Sequence[str], found: Facts) -> Iterator[str]:
    yield "-- the table is rewritten, and nobody can use it meanwhile"
    yield from dict.fromkeys(command for table in tables for command, _ in found.all(table, "unlogged"))


def _heirs_renamed(name: str, found: Facts) -> Iterator[str]:
    """Rename the columns that a column of this name cannot be one with."""
    old = found.free(f"{name.partition('.')[2]}_old")
    for rename, unfilled in found.all(name, "heir"):
        yield f"{rename} TO {old};"
        if unfilled:
            yield f"{unfilled} {old} DROP NOT NULL;"


def _target(item: Item) -> str:
    """Name the table that a promised foreign key leads to."""
    found = re.search(r" REFERENCES (\w+)\(", item.expected)
    return found[1] if found else ""


def _is_promised(restore: str, item: Item, found: Facts) -> bool:
    """Whether what would bring a foreign key back is what is promised."""
    target = _target(item)
    qualified = [item.expected.replace(f" {target}(", f" {name}(") for _, name in found.all(target, "stands")]
    return restore.removesuffix(";").removesuffix(" NOT VALID").endswith(tuple(qualified))


def _names_to_be(item: Item) -> tuple[str, ...]:
    """Return the names that a remedy gives to something, or a step."""
    kind, name = _parts(item)
    if kind == "key":
        return f"uk_{name['table']}_{name['columns'].replace(', ', '_')}", f"{name['table']}_pkey"
    if kind == "column":
        return (_given(item.name),)
    return (f"{name['table']}_{name['column']}_fkey",) if kind == "foreign key" else ()


def _given(column: str) -> str:
    """Name the CHECK that a column holds no NULL, while it has no NOT NULL yet."""
    return f"{column.replace('.', '_')}_given"


def _removed(things: Sequence[tuple[str, str]], why: str = "to undo it") -> Iterator[str]:
    for remove, restore in things:
        yield remove
        if restore:
            yield _comment(f"{why}: {restore}")


def _comment(text: str) -> str:
    return "-- " + text.replace("\n", "\n-- ")


def _rename(table: str, name: str, found: Facts) -> Commands:
    """Rename whatever bears the name beside the table."""
    return tuple(f"{rename} TO {found.free(f'{name}_old')};" for rename, _ in found.all(f"{table} {name}", "bears"))


# ── tables ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _recreate(found: Facts) -> Commands:
    return ("invoke prereqs --recreate" + (" --with-dependants" if found.led_to else ""),)


def _move(table: str, found: Facts) -> Commands:
    """Move what stands there to a schema of its own: rows, indexes, keys and sequences go along."""
    attic = found.free("attic")
    ((kind, name),) = found.all(table, "stands")
    ((reached_by, _),) = found.all(table, "reached by")
    warnings = (
        f"-- {table} means {other} then: if that is a copy, take its schema off the search_path first"
        for other, _ in found.all(table, "next")
    )
    return (
        *warnings,
        *_removed(found.all(table, "led to"), "to bring it back, when the new table has the rows"),
        f"CREATE SCHEMA IF NOT EXISTS {attic};",
        f"GRANT USAGE ON SCHEMA {attic} TO {reached_by};",
        f"ALTER {kind} {name} SET SCHEMA {attic};",
    )


# ── columns ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Form:
    """A column's form, as the verifications write it."""

    type: str
    not_null: bool
    not_valid: bool  # its NOT NULL: rows that stood before may have none; new in PostgreSQL 18
    default: str
    generated: bool

    @property
    def bare(self) -> str:
        """The type without its length or precision."""
        return re.sub(r"\([\d,]+\)", "", self.type)

    def is_within(self, other: _Form) -> bool:
        """Whether every value is one of the other form's type, too."""
        return self.type == other.type or self.bare in _WITHIN.get(other.type, ())

    def is_readable_as(self, other: _Form) -> bool:
        """Whether a value may be read as one of the other form's type."""
        return self.bare in _READABLE.get(other.type, ())


def _form(text: str) -> _Form:
    text, _, default = text.partition(" DEFAULT ")
    generated = " GENERATED" in text or default == "generated"
    return _Form(
        type=re.sub(" NOT NULL| NOT VALID| GENERATED", "", text),
        not_null=" NOT NULL" in text,
        not_valid=" NOT VALID" in text,
        default="" if generated else default,
        generated=generated,
    )


def _column(item: Item, table: str, column: str, found: Facts) -> Commands | None:
    promised = _form(item.expected)
    if item.actual is None:
        return None if promised.not_null else (f"ALTER TABLE {table} ADD COLUMN {column} {promised.type};",)
    stands = _form(item.actual)
    if _is_kept(item, stands, promised, found):
        change = _altered(item.name, table, stands, promised, found)
    elif item.name in _ADDED or not promised.not_null:
        change = _gives_way(item.name, table, stands, promised, found)
    else:
        return None
    leave = _removed(found.all(item.table, "child")) if found.all(item.name, "inherited") else ()
    return (*leave, *change)


def _is_kept(item: Item, stands: _Form, promised: _Form, found: Facts) -> bool:
    """Whether the column can take the promised form with its values."""
    if stands.generated and found.all(item.name, "virtual"):
        return False
    if stands.is_within(promised):
        return True
    if found.all(item.name, "linked"):  # the other end of the foreign key has this type, too
        return False
    # A row may refuse to be read as another type: only where there is no other way.
    needed = promised.not_null and item.name not in _ADDED
    return promised.type == "text" or (stands.is_readable_as(promised) and needed)


def _altered(name: str, table: str, stands: _Form, promised: _Form, found: Facts) -> Iterator[str]:
    column = name.partition(".")[2]
    alter = f"ALTER TABLE {table} ALTER COLUMN {column}"
    if stands.generated:
        yield f"{alter} DROP EXPRESSION;"
    if stands.type != promised.type:
        yield from _retyped(name, alter, stands, promised, found)
    if stands.default and (stands.default, stands.type) != (promised.default, promised.type):
        yield f"{alter} SET DEFAULT {promised.default};" if promised.default else f"{alter} DROP DEFAULT;"
    if stands.not_null and not promised.not_null:
        for generated, _ in found.all(name, "identity"):  # which holds no NULL either
            yield f"{alter} DROP IDENTITY;"
            yield _comment(f"it was GENERATED {generated} AS IDENTITY")
        yield f"{alter} DROP NOT NULL;"
    if promised.not_null and (stands.not_valid or not stands.not_null):
        yield from _filled(name, table, found)


def _retyped(name: str, alter: str, stands: _Form, promised: _Form, found: Facts) -> Iterator[str]:
    column = name.partition(".")[2]
    actions = [f"TYPE {promised.type}"]
    if stands.bare == "timestamp without time zone":
        yield "-- the values are taken for UTC: put the time zone here that they were written in"
        actions = [f"TYPE {promised.type} USING {column} AT TIME ZONE 'UTC'"]
    elif not stands.is_within(promised):
        yield f"-- where a value is no {promised.type}, it is refused, shown, and nothing is changed"
        actions = [f"TYPE {promised.type} USING {column}::{promised.type}"]
        for default, _ in found.all(name, "default"):  # it would be no default of the new type
            default = _recast(default, name, promised.type, found)
            actions = ["DROP DEFAULT", *actions, f"SET DEFAULT ({default})::{promised.type}"]
    if (stands.bare, promised.type) != ("character varying", "text"):
        yield "-- the table is rewritten, and nobody can use it meanwhile"
    change = alter + f", ALTER COLUMN {column}".join(f" {action}" for action in actions) + ";"
    yield _around(list(_binding(name, promised.type, found)), change)
    yield from (sequence for sequence, _ in found.all(name, "counted by"))


def _binding(name: str, type_: str, found: Facts) -> Iterator[tuple[str, str]]:
    """Yield what keeps a column from having another type, and what brings it back when it has."""
    bound = [*found.all(name, "above"), *found.all(name, "binds")]
    for remove, restore in (*bound, *found.all(name, "hangs")):
        recast = _recast(restore, name, type_, found)
        if (remove, restore) in bound or recast != restore:  # what else hangs there stays, where it compares no enum
            yield remove, recast


def _recast(text: str, name: str, type_: str, found: Facts) -> str:
    """Write the values of an enum as those of the type that its column will have."""
    for enum, _ in found.all(name, "enum"):
        text = re.sub(rf"::{re.escape(enum)}(?!\w)", f"::{type_}", text)
    return text


def _around(binding: Sequence[tuple[str, str]], command: str) -> str:
    """Remove what keeps the command from being run, and bring it back, all in one transaction."""
    if not binding:
        return command
    restored = [restore for _, restore in reversed(binding)]
    return "\n".join(["BEGIN;", *(remove for remove, _ in binding), command, *restored, "COMMIT;"])


def _filled(name: str, table: str, found: Facts) -> Iterator[str]:
    column, check = name.partition(".")[2], _given(name)
    yield "-- rows without a value, to be given one first:"
    yield f"SELECT * FROM {table} WHERE {column} IS NULL;"
    if not found.all(f"{name.partition('.')[0]} {check}", "bears"):  # rows refused it when it was tried before
        yield f"ALTER TABLE {table} ADD CONSTRAINT {check} CHECK ({column} IS NOT NULL) NOT VALID;"
    yield f"ALTER TABLE {table} VALIDATE CONSTRAINT {check};"
    yield f"ALTER TABLE {table} ALTER COLUMN {column} SET NOT NULL;"
    yield f"ALTER TABLE {table} DROP CONSTRAINT {check};"


def _gives_way(name: str, table: str, stands: _Form, promised: _Form, found: Facts) -> Iterator[str]:
    """Keep the column, with what bears our names for it, under another one."""
    column = name.partition(".")[2]
    old = found.free(f"{column}_old")
    yield f"ALTER TABLE {table} RENAME COLUMN {column} TO {old};"
    yield from (f"{rename} TO {found.free(f'{ours}_old')};" for rename, ours in found.all(name, "ours"))
    filled = stands.default or stands.generated or found.all(name, "identity")
    if stands.not_null and not filled:  # nobody does any more
        yield f"ALTER TABLE {table} ALTER COLUMN {old} DROP NOT NULL;"
    if name not in _ADDED:
        yield f"ALTER TABLE {table} ADD COLUMN {column} {promised.type};"
    if stands.is_within(promised) or stands.is_readable_as(promised):
        yield f"-- afterwards, where the old values fit: UPDATE {table} SET {column} = {old}::{promised.type};"


def _dependants(column: str, found: Facts) -> Iterator[str]:
    """Drop what hangs on the uuid column, and say what brings it back, on the column that the fix keeps."""
    kept = next(name for n in range(1, 10) if (name := f"turn_id_uuid{f'_{n}' if n > 1 else ''}") == found.free(name))
    ((_, table),) = found.all("prompt_snapshots", "stands")
    above, things = found.all(column, "above"), [*found.all(column, "binds"), *found.all(column, "hangs")]
    yield from (remove for remove, _ in (*above, *things))
    yield _comment(f"after invoke fix, on the kept values ({kept}) or on turn_id:")
    for _, restore in reversed(things):
        for _, ours in found.all(column, "ours"):  # by then the steps' own have these names
            restore = restore.replace(f" {ours} ", f" {found.free(f'{ours}_old')} ", 1)
        if restore:
            yield _comment(_on_the_kept(restore, kept, table))
    yield from (_comment(restore) for _, restore in reversed(above))


_NAME = r'(?:"[^"]+"|\w+)'


def _on_the_kept(definition: str, kept: str, table: str) -> str:
    """Write the kept column's name where a definition names the table's turn_id, as PostgreSQL prints it."""
    other = rf"(?!{re.escape(table)}\b)"
    of_others = {
        qualifier
        for qualifier in re.findall(rf"({_NAME})\.turn_id\b", definition)
        if re.search(rf"[ (]{other}{_NAME}\.({_NAME} )?{re.escape(qualifier)}[ ),;\n]", definition)
    }
    if definition.startswith("CREATE POLICY ") and f" ON {table} " not in definition:
        of_others.add("")  # its own table's columns are not qualified
    lists = rf"(?:INSERT INTO|REFERENCES|ALTER TABLE|VIEW) {other}[^(]*\([^)]*\)|INDEX \S+ ON {other}[^;]*;"
    words = rf"'[^']*'|{lists}|(?:(?P<qualifier>{_NAME})\.)?\bturn_id\b"

    def named(word: re.Match[str]) -> str:
        is_ours = word[0].endswith("turn_id") and (word["qualifier"] or "") not in of_others
        return word[0].removesuffix("turn_id") + kept if is_ours else word[0]

    return re.sub(words, named, definition)


# ── keys ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _key(item: Item, table: str, found: Facts) -> Commands | None:
    columns = _parts(item)[1]["columns"]
    unique, primary = _names_to_be(item)
    is_primary = item.expected == "PRIMARY KEY"
    if is_primary and found.all(item.table, "primary key led to"):
        return None
    wanted = primary if is_primary else unique
    left_over = [index for _, index in found.all(f"{item.table} {wanted}", "bears") if index]
    name = wanted if left_over else found.free(wanted)
    return (
        "-- rows that share a key, to be told apart first:",
        f"SELECT {columns}, count(*) FROM {table} GROUP BY {columns} HAVING count(*) > 1;",
        *(f"DROP INDEX CONCURRENTLY {index};" for index in left_over),
        f"CREATE UNIQUE INDEX CONCURRENTLY {name} ON {table} ({columns});",
        *(_promoted(item, table, columns, name, found) if is_primary else ()),
    )


def _promoted(item: Item, table: str, columns: str, index: str, found: Facts) -> Iterator[str]:
    """Make the primary key of the index; another one gives way in the same moment, and what it kept unique stays so."""
    for unique, _ in found.all(item.table, "unique by primary key"):
        if not set(columns.split(", ")) <= set(unique.split(", ")):
            kept = found.free(re.sub(r"\W+", "_", f"uk_{item.table}_{unique}"))
            yield f"CREATE UNIQUE INDEX CONCURRENTLY {kept} ON {table} ({unique});"
    others = found.all(item.table, "primary key")
    drop = "".join(f"DROP CONSTRAINT {other}, " for other, _ in others)
    yield f"ALTER TABLE {table} {drop}ADD PRIMARY KEY USING INDEX {index};"
    yield from (_comment(f"it was: {definition}") for _, definition in others)
