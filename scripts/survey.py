"""The survey: what stands, read from the catalogs by all the verifications in one query."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from psycopg import sql

from scripts.chain import RECREATE, Step, tables
from scripts.database import Database, Rows
from scripts.errors import LockTimeoutError, StatementError, UnreadableCatalogsError, for_sqlstate

ONLINE = " online"  # behind a stem in mended_by: its online part mends the item


@dataclass(frozen=True)
class Item:
    """One promise of one step, and what stands in its place.

    mended_by: a stem, a stem + ONLINE, or None (it stands, or is in the way); lacking: the right that this role lacks
    to mend it, or None; on_request: the stem of a step that would mend it, but is run only where it is asked for.
    """

    stem: str
    name: str
    expected: str
    actual: str | None
    mended_by: str | None = None
    lacking: str | None = None
    on_request: str | None = None

    @property
    def table(self) -> str:
        """The table that the item belongs to: its name leads the item's."""
        return self.name.partition(" ")[0].partition(".")[0]

    @property
    def is_place(self) -> bool:
        """Whether it is a table or a column, which others hang on, and no key, index, comment or the like."""
        return " " not in self.name

    @property
    def is_new_table(self) -> bool:
        """Whether it is a table that a step would create."""
        return self.name == self.table and self.actual is None and self.mended_by is not None

    @property
    def stands(self) -> bool:
        """Whether the promise is kept."""
        return self.actual == self.expected

    @property
    def gives_way(self) -> bool:
        """Whether it is a column of another type, whose values a step keeps under another name."""
        other = self.actual is not None and not self.expected.startswith(self.actual)
        return other and self.is_place and self.name != self.table and self.mended_by is not None

    @property
    def in_the_way(self) -> bool:
        """Whether something stands there that no step mends."""
        return not self.stands and self.mended_by is None

    @property
    def orphans(self) -> str | None:
        """Query for the rows that keep the item's foreign key from being validated; None: it is something else."""
        key = re.fullmatch(r"FOREIGN KEY \((\w+)\) REFERENCES (\w+)\((\w+)\).*", self.expected)
        if key is None or self.actual != f"{self.expected} NOT VALID":
            return None
        column, parent, parent_key = key.groups()
        return (
            f"SELECT * FROM {self.table} AS child WHERE {column} IS NOT NULL"
            f" AND NOT EXISTS (SELECT FROM {parent} AS parent WHERE parent.{parent_key} = child.{column})"
        )


def outermost(items: Iterable[Item]) -> list[Item]:
    """Leave out what is part of a table or column that is missing or of the wrong kind: one line says it all."""
    items = list(items)
    broken = {item.name for item in items if item.name == item.table or item.actual is None}
    return [item for item in items if broken.isdisjoint(_containers(item.name))]


def _containers(name: str) -> tuple[str, ...]:
    """Names of the table, and of the column, that an item is part of."""
    column = name.partition(" ")[0]
    table = column.partition(".")[0]
    return tuple(container for container in (table, column) if container != name)


def at_hand(item: Item, stems: Collection[str]) -> Item:
    """Return the item as it is for a chain of these stems: without its mender at hand, it is in the way."""
    if item.mended_by is None or item.mended_by.removesuffix(ONLINE) in stems:
        return item
    return replace(item, mended_by=None, lacking=None, on_request=item.mended_by)


@dataclass(frozen=True)
class Server:
    """What the server says of itself, this session and the place where new tables go."""

    version: str
    role: str
    database: str
    schema: str | None  # first schema of the search_path that exists; None: no such schema
    read_only: str | None  # why nothing can be written, or None
    search_path: str
    pooled: bool  # a pooler stands between: whoever answers is not whom we logged in to
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of the chain, by the schema the path leads to

    @property
    def homes(self) -> tuple[str, ...]:
        """Schemas in which tables of the chain stand, the one where new tables go first."""
        return tuple(sorted(self.tables, key=lambda home: (home != self.schema, home)))

    @property
    def behind(self) -> Mapping[str, Sequence[str]]:
        """Tables that stand in a later schema of the search_path than the one where new tables go."""
        return {home: self.tables[home] for home in self.homes if home != self.schema}


@dataclass(frozen=True)
class Survey:
    """What stands at one moment."""

    server: Server
    items: tuple[Item, ...]


_SERVER = """
SELECT current_setting('server_version'), current_user, current_database(), current_schema(),
       CASE WHEN pg_is_in_recovery() THEN 'the server is a standby'
            WHEN current_setting('default_transaction_read_only')::boolean THEN 'default_transaction_read_only is on'
       END,
       regexp_replace(current_setting('search_path'), ', pg_temp$', ''), pg_backend_pid(),
       (SELECT json_object_agg(nspname, found)
        FROM (SELECT nspname, json_agg(relname ORDER BY relname) AS found
              FROM unnest({tables}::text[]) AS ours (name)
              JOIN pg_class AS c ON c.oid = to_regclass(ours.name)
              JOIN pg_namespace AS n ON n.oid = c.relnamespace AND nspname !~ '^pg_'
              GROUP BY nspname) AS standing)"""

# An item is led by the name of its table: the right to mend it is CREATE where the table is missing, else ownership.
# A column that is to be added, or a table or key to be made, may be kept from it by what the catalogs show: then that
# is in the way.
_ITEMS = """
SELECT stem, item, expected,
       CASE WHEN expected = 'table' AND home.relpersistence = 't' THEN 'temporary table'
            ELSE coalesce(coalesce(actual, 'missing') || ', and ' || coalesce(unlogged, told[1]), actual) END,
       CASE WHEN coalesce(unlogged, told[1]) IS NULL THEN mended_by END,
       CASE WHEN actual IS NOT DISTINCT FROM expected OR mended_by IS NULL THEN NULL
            WHEN item LIKE '% place' AND NOT has_database_privilege(current_database(), 'CREATE')
              THEN 'CREATE on database ' || current_database()
            WHEN (home.oid IS NULL OR item LIKE '% index %' OR item LIKE '% function %' OR item LIKE '% place')
                 AND NOT has_schema_privilege(place.oid, 'CREATE') AND place.nspname !~ '^pg_'
              THEN 'CREATE on schema ' || place.nspname
            WHEN (item LIKE '% function %' OR item LIKE '% place')
                 AND NOT has_schema_privilege(home.relowner, place.oid, 'CREATE')
                 AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
              THEN format('CREATE on schema %s for %s, the owner of %s',
                          place.nspname, home.relowner::regrole, home.relname)
            WHEN NOT pg_has_role(home.relowner, 'USAGE')
              THEN format('ownership of table %s (it belongs to %s)', home.relname, home.relowner::regrole)
            WHEN told[2] IS NOT NULL
              THEN 'ownership of ' || told[2]
            WHEN NOT pg_has_role(routine.proowner, 'USAGE')
              THEN format('ownership of function %s (it belongs to %s)',
                          routine.oid::regprocedure, routine.proowner::regrole)
            WHEN item ~ '^slots[.][a-z_]+$' AND actual IS NULL AND row_security_active(home.oid)
              THEN 'BYPASSRLS (or ALTER TABLE slots NO FORCE ROW LEVEL SECURITY meanwhile: it may hide critical slots)'
            WHEN expected LIKE '%(admin)%' AND NOT has_schema_privilege(auth.oid, 'USAGE')
              THEN 'USAGE on schema auth'
            ELSE led_to.lacking END
FROM (
  SELECT *, count(*) FILTER (WHERE is_added) OVER (PARTITION BY split_part(item, '.', 1)) AS wanted
  FROM (
    SELECT *, item ~ '^[a-z_]+[.][a-z_]+$' AND to_regclass(split_part(item, '.', 1)) IS NOT NULL
              AND mended_by <> {recreate} AND NOT starts_with(expected, coalesce(actual, '?')) AS is_added
    FROM (
{items}
    ) AS listed
  ) AS sorted
) AS promise
LEFT JOIN pg_class AS home
       ON home.oid = to_regclass(coalesce(substring(item FROM '^(.*) (?:place|dependant)$'),
                                          substring(item FROM '^[a-z_]+')))
LEFT JOIN pg_namespace AS place
       ON place.oid = home.relnamespace OR home.oid IS NULL AND place.nspname = current_schema()
LEFT JOIN pg_namespace AS auth ON auth.nspname = 'auth'
LEFT JOIN pg_proc AS routine
       ON item LIKE '% function %' AND routine.proname = substring(item FROM '([a-z_]+)[(][)]$')
          AND routine.pronargs = 0 AND routine.pronamespace = place.oid
LEFT JOIN LATERAL (  -- by foreign keys: the item's own, or those of the table that it is
  SELECT string_agg(nullif(concat_ws(E'\\n',
           CASE WHEN NOT has_schema_privilege(target.relnamespace, 'USAGE')
                THEN format('USAGE on schema %s', target.relnamespace::regnamespace) END,
           CASE WHEN NOT has_table_privilege(target.oid, 'REFERENCES')
                THEN format('REFERENCES on table %s (it belongs to %s)', led.name, target.relowner::regrole) END), ''),
         E'\\n'),
         string_agg(format('%s is UNLOGGED', led.name), ', ') FILTER (
           WHERE target.relpersistence = 'u' AND home.relpersistence IS DISTINCT FROM 'u'
             AND actual IS NULL AND mended_by IS NOT NULL AND (home.oid IS NOT NULL OR relation IS NOT NULL))
  FROM (SELECT substring(expected FROM 'REFERENCES ([a-z_]+)[(]'), NULL
        UNION
        SELECT parent, relation FROM (VALUES {parents}) AS made (relation, parent)
        WHERE relation = item AND actual IS NULL) AS led (name, relation)
  JOIN pg_class AS target
    ON target.oid = CASE led.name WHEN 'auth.users' THEN (  -- to_regclass() would want USAGE on its schema
                           SELECT a.attrelid FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
                           WHERE c.relnamespace = auth.oid AND c.relname = 'users'
                             AND a.attname = 'id' AND a.atttypid = 'uuid'::regtype)
                         ELSE to_regclass(led.name) END
) AS led_to (lacking, unlogged) ON true
LEFT JOIN LATERAL (  -- what keeps a column from being added to its table and those that inherit, and those of others
  SELECT CASE WHEN is_added THEN (
    WITH RECURSIVE family (oid) AS (
      SELECT home.oid UNION SELECT inhrelid FROM family JOIN pg_inherits ON inhparent = family.oid)
    SELECT ARRAY[
      CASE WHEN home.reloftype <> 0 THEN format('%s is a table OF %s', home.relname, home.reloftype::regtype)
           WHEN max(relnatts) + wanted > 1600
             THEN format('a table has 1600 columns at most (dropped ones count: here %s)', max(relnatts))
           WHEN home.relname = 'slots' AND home.relreplident = 'n' AND EXISTS (
                  SELECT FROM pg_publication AS p LEFT JOIN pg_publication_rel ON prpubid = p.oid
                  WHERE pubupdate AND (puballtables OR prrelid = home.oid))
             THEN 'published without a replica identity no row of slots can be updated'
           ELSE string_agg(format('%s has it as %s', family.oid::regclass, format_type(atttypid, atttypmod)), ', ')
                  FILTER (WHERE atttypid <> to_regtype(split_part(expected, ' ', 1))) END,
      string_agg(format('table %s (it belongs to %s)', family.oid::regclass, relowner::regrole), ', ')
        FILTER (WHERE NOT pg_has_role(relowner, 'USAGE'))]
    FROM family JOIN pg_class USING (oid)
    LEFT JOIN pg_attribute
           ON attrelid = family.oid AND attname = split_part(item, '.', 2) AND NOT attisdropped AND actual IS NULL
  ) END OFFSET 0
) AS added (told) ON true
ORDER BY chain_position, item_position"""


def read(database: Database, steps: Sequence[Step]) -> Survey:
    """Ask once for everything that the steps promise: one message, one round trip, no lock but ACCESS SHARE."""
    try:
        return _read(database, steps)
    except StatementError as error:
        if not issubclass(for_sqlstate(error.sqlstate), LockTimeoutError):
            raise
        # Printing some definitions takes ACCESS SHARE on their tables: it waits behind ACCESS EXCLUSIVE.
        where = "\n".join(error.holders)
        raise UnreadableCatalogsError(why=error.message, where=where) from error


def _read(database: Database, steps: Sequence[Step]) -> Survey:
    server, rows = database.ask([_SERVER.format(tables=sql.Literal(tables(steps)).as_string()), items_query(steps)])
    return Survey(_server(server[0], database), items_of(rows, steps))


def items_query(steps: Sequence[Step]) -> str:
    """Write the query for all that the steps promise, to be sent in any transaction."""
    parents = [(table, parent) for step in steps for table in step.tables for parent in step.parents(table)]
    pairs = ", ".join(f"({_literal(table)}, {_literal(parent)})" for table, parent in dict.fromkeys(parents))
    return _ITEMS.format(items=_union(steps), parents=pairs, recreate=_literal(RECREATE))


def items_of(rows: Rows, steps: Sequence[Step]) -> tuple[Item, ...]:
    """Read the rows of that query."""
    stems = {step.stem for step in steps}
    return tuple(at_hand(_item(row), stems) for row in rows)


def _union(steps: Sequence[Step]) -> str:
    return "\nUNION ALL\n".join(
        f"SELECT {position} AS chain_position, row_number() OVER () AS item_position, {_literal(step.stem)} AS stem,\n"
        f"       v.* FROM (\n{step.verification}\n) AS v"
        for position, step in enumerate(steps)
    )


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()


def _item(row: tuple[str | None, ...]) -> Item:
    stem, name, expected, actual, mended_by, lacking = row
    return Item(str(stem), str(name), str(expected), actual, mended_by, lacking)  # the first three are never NULL


def _server(row: tuple[str | None, ...], database: Database) -> Server:
    version, role, name, schema, read_only, search_path, pid, found = row
    pooled, tables_by_schema = pid != str(database.backend_pid), json.loads(found or "{}")
    return Server(
        str(version).split()[0], str(role), str(name), schema, read_only, str(search_path), pooled, tables_by_schema
    )


BRIEFLY = "5s"  # for who only wants to foretell


@dataclass(frozen=True)
class Orphans:
    """Rows that keep a foreign key from being validated, and the query for them; count: None where why says so."""

    table: str
    query: str
    count: int | None
    why: str = ""

    def __str__(self) -> str:
        if self.count is None:
            return f"{self.table}: the rows that point to nothing could not be counted ({self.why}): {self.query}"
        return f"{self.table}: {self.count} rows point to nothing: {self.query}"


def orphans(database: Database, items: Sequence[Item], *, timeout: str = "0") -> list[Orphans]:
    """Count the rows that keep foreign keys among the items from being validated; leave out where there are none.

    It reads the tables, as long as it takes (timeout: or no longer than that), and stands in nobody's way.
    """
    found = [_count_orphans(database, item, item.orphans, timeout) for item in items if item.orphans]
    return [orphans for orphans in found if orphans.count != 0]


def _count_orphans(database: Database, item: Item, query: str, timeout: str) -> Orphans:
    limit = f"set_config('statement_timeout', '{timeout}', true)"
    try:
        [[(count,)]] = database.ask([f"SELECT count(*) FROM ({query}) AS orphan"], limit)
    except StatementError as error:
        return Orphans(item.table, query, None, str(error))
    return Orphans(item.table, query, int(count or 0))


def rows_of(database: Database, tables: Sequence[str]) -> dict[str, int | None]:
    """Look which tables hold rows, and about how many (0: nobody counted them yet); None: not a single one.

    tables: their names as SQL writes them. Estimates, because counting takes as long as the table is.
    """
    query = "\nUNION ALL\n".join(
        f"SELECT {position}, EXISTS (SELECT FROM {table}), greatest(reltuples, 0)::bigint\n"
        f"FROM pg_class WHERE oid = {_literal(table)}::regclass"
        for position, table in enumerate(tables)
    )
    # Where row-level security hides rows from us, an error is better than a table that looks empty.
    [rows] = database.ask([query], "set_config('row_security', 'off', true)")
    return {
        tables[int(position or 0)]: int(estimate or 0) if exists == "t" else None for position, exists, estimate in rows
    }
