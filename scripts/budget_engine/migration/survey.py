"""The survey: every check of db/verify.sql, and what this role may do about it, read from the catalogs in one query."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from budget_engine import errors
from budget_engine.errors import StatementError
from budget_engine.migration.chain import DB, Chain, query_of
from budget_engine.migration.checks import Check, Kind
from budget_engine.migration.turn import Turn, being_built
from budget_engine.postgres.connection import PIN, UNPIN, Connection, Row, Rows, understood
from budget_engine.spelling import literal, respelled


@dataclass(frozen=True)
class Server:
    """What the server says of itself, of this session, and of the place where new tables go.

    path: the schemas of the search_path that exist, in its order; homes: those in which tables of the chain exist, the
    one where new tables go first; read_only: why nothing can be written, or None;
    pooled: a pooler stands between, so that whoever answers is not whom we logged in to.
    """

    version: str
    role: str
    database: str
    path: tuple[str, ...]
    read_only: str | None
    search_path: str
    pooled: bool

    homes: tuple[str, ...] = ()

    @property
    def schema(self) -> str | None:
        """The schema where new tables go; None: no schema of the search_path exists."""
        return self.path[0] if self.path else None


@dataclass(frozen=True)
class Survey:
    """What exists at one moment."""

    server: Server
    checks: tuple[Check, ...]

    @property
    def turn(self) -> Turn:
        """The turn that a run needs."""
        return Turn(self.server.path, tuple(dict.fromkeys([*self.server.path[:1], *self.server.homes])))


_SERVER = """
SELECT current_setting('server_version'), current_user, current_database(), current_setting('budget_engine.path'),
       CASE WHEN pg_is_in_recovery() THEN 'the server is a standby'
            WHEN current_setting('default_transaction_read_only')::bool THEN 'default_transaction_read_only is on' END,
       current_setting('budget_engine.search_path'), pg_backend_pid()"""

# The checks, noted, so that what follows need not ask again; what it takes to fix some is asked where there are any.
_CHECKS = """SELECT pg_catalog.set_config('budget_engine.checks', json_agg(checks)::pg_catalog.text, true)
FROM (SELECT row_number() OVER () - 1 AS position, checks.* FROM ({verification}) AS checks) AS checks"""
_IF_NEEDED = """DO $rights$
#variable_conflict use_column
BEGIN
PERFORM set_config('budget_engine.rights', '', true), set_config('budget_engine.citus', '', true);  -- not another's
IF EXISTS (SELECT FROM json_to_recordset(current_setting('budget_engine.checks')::json) AS c (fixed_by text)
           WHERE fixed_by IS NOT NULL) THEN
PERFORM set_config('budget_engine.rights', (SELECT json_agg(rights) FROM ({rights}) AS rights)::text, true);
END IF;
-- Planned only where it runs: elsewhere there are no such catalogs.
IF to_regclass('pg_catalog.pg_dist_schema') IS NOT NULL THEN
PERFORM set_config('budget_engine.citus', (SELECT coalesce(json_agg(said), '[]') FROM ({citus}) AS said)::text, true);
END IF;
END $rights$"""
_NOTED = "SELECT current_setting('budget_engine.rights', true), current_setting('budget_engine.citus', true)"
# CREATE where a table is missing or the kind has a name of its own, else ownership.
_RIGHTS = """
SELECT c.position,
       CASE WHEN (c.found IS NULL OR c.kind IN ('index', 'function', 'key'))
                 AND NOT has_schema_privilege(home.oid, 'CREATE')
              THEN 'CREATE on schema ' || home.nspname
            WHEN NOT pg_has_role(relation.relowner, 'USAGE')
              THEN format('ownership of table %s (it belongs to %s)', relation.relname, relation.relowner::regrole)
            WHEN told[5] IS NOT NULL
              THEN told[5]
            WHEN c.kind = 'function' AND NOT has_schema_privilege(relation.relowner, home.oid, 'CREATE')
                 AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
              THEN format('CREATE on schema %s for %s, the owner of %s',
                          home.nspname, relation.relowner::regrole, relation.relname)
            WHEN NOT pg_has_role(routine.proowner, 'USAGE')
              THEN format('ownership of function %s (it belongs to %s)',
                          routine.oid::regprocedure, routine.proowner::regrole)
            WHEN c.kind = 'policy' AND c.expected LIKE '%(admin)%' AND NOT has_schema_privilege('auth', 'USAGE')
              THEN 'USAGE on schema auth'
            ELSE led_to.lacking END AS lacking,
       c.actual LIKE '% INVALID' AND {being_built} AS being_built, blocked.how, blocked.says
FROM (
SELECT *, count(*) FILTER (WHERE is_added) OVER (PARTITION BY "table") AS wanted
FROM json_to_recordset(current_setting('budget_engine.checks')::json) AS checks
  (position int, step text, kind text, "table" text, name text, expected text, actual text, fixed_by text, found text)
CROSS JOIN LATERAL (SELECT step = fixed_by AS is_own) AS its
CROSS JOIN LATERAL (SELECT kind = 'column' AND is_own AND found IS NOT NULL AS is_added) AS also
WHERE fixed_by IS NOT NULL
) AS c
LEFT JOIN pg_class AS relation ON relation.oid = c.found::regclass
LEFT JOIN pg_namespace AS home ON home.oid = coalesce(relation.relnamespace, (
  SELECT oid FROM pg_namespace WHERE nspname = current_setting('budget_engine.path')::json ->> 0))
LEFT JOIN pg_proc AS routine ON c.kind = 'function' AND proname = c.name AND pronargs = 0 AND pronamespace = home.oid
LEFT JOIN LATERAL (  -- a foreign key: the table that it leads to
  SELECT target.relpersistence = 'u' AND relation.relpersistence IS DISTINCT FROM 'u'
           AND c.actual IS NULL, array_to_string(led.name, '.'),
         nullif(concat_ws(E'\\n',
           CASE WHEN NOT has_schema_privilege(target.relnamespace, 'USAGE')
                THEN format('USAGE on schema %s', target.relnamespace::regnamespace) END,
           CASE WHEN NOT has_table_privilege(target.oid, 'REFERENCES')
                THEN format('REFERENCES on table %s (it belongs to %s)',
                            array_to_string(led.name, '.'), target.relowner::regrole) END), '')
  FROM (SELECT parse_ident(substring(c.expected FROM 'REFERENCES ([^(]+)[(]'))) AS led (name)
  CROSS JOIN LATERAL (  -- its schema, where it says one, else those of the path
    SELECT led.name[1], 0 WHERE led.name[2] IS NOT NULL
    UNION ALL
    SELECT path.* FROM json_array_elements_text(current_setting('budget_engine.path')::json) WITH ORDINALITY AS path
    WHERE led.name[2] IS NULL
  ) AS place (schema, position)
  JOIN pg_namespace ON nspname = place.schema
  JOIN pg_class AS target
    ON target.relnamespace = pg_namespace.oid AND target.relname = coalesce(led.name[2], led.name[1])
  WHERE c.kind = 'foreign key'
  ORDER BY place.position LIMIT 1
) AS led_to (unlogged, name, lacking) ON true
LEFT JOIN LATERAL (  -- a column that is added, or a default: to the tables that inherit, too
  SELECT CASE WHEN c.is_added OR c.kind = 'default' AND c.is_own AND c.found IS NOT NULL THEN (
    WITH RECURSIVE family (oid) AS (
      SELECT relation.oid UNION SELECT inhrelid FROM family JOIN pg_inherits ON inhparent = family.oid)
    SELECT ARRAY[
      CASE WHEN relation.reloftype <> 0 THEN format('%s is a table OF %s', c."table", relation.reloftype::regtype) END,
      CASE WHEN max(relnatts) + c.wanted > 1600
           THEN format('a table has 1600 columns at most (dropped ones count: here %s)', max(relnatts)) END,
      string_agg(format('%s has it as %s', family.oid::regclass, format_type(atttypid, atttypmod)), ', ')
        FILTER (WHERE format_type(atttypid, atttypmod) <> regexp_replace(c.expected, ' NOT NULL$', '')),
      CASE WHEN concat_ws(' ', c.fixed_by, c."table") = ANY ({updated}::text[]) AND bool_or(
                  relreplident <> 'f' AND NOT EXISTS (
                    SELECT FROM pg_index WHERE indrelid = family.oid
                    AND CASE relreplident WHEN 'd' THEN indisprimary ELSE indisreplident END)
                  AND EXISTS (
                    SELECT FROM pg_publication_tables JOIN pg_publication USING (pubname)
                    WHERE pubupdate AND format('%I.%I', schemaname, tablename) = family.oid::regclass::text))
           THEN format('published without a replica identity no row of %s can be updated', c."table") END,
      string_agg(format('ownership of table %s (it belongs to %s)', family.oid::regclass, relowner::regrole), E'\\n')
        FILTER (WHERE NOT pg_has_role(relowner, 'USAGE'))]
    FROM family JOIN pg_class USING (oid)
    LEFT JOIN pg_attribute ON c.actual IS NULL AND attrelid = family.oid AND attname = c.name AND NOT attisdropped
  ) END OFFSET 0
) AS added (told) ON true
LEFT JOIN pg_class AS hiding (oid, name, home)
       ON c.kind = 'table' AND c.found IS NULL AND hiding.name = c."table" AND hiding.home = pg_my_temp_schema()
LEFT JOIN LATERAL (  -- of a table that is full nothing else matters
  SELECT string_agg(how, ' '), string_agg(says, ', ')
  FROM (VALUES ('unlogged', CASE WHEN led_to.unlogged THEN led_to.name || ' is UNLOGGED' END),
               ('hidden', 'hidden by temporary table ' || hiding.name),
               ('typed', told[1]), ('full', told[2]), ('child', told[3]), ('identity', told[4])) AS around (how, says)
  WHERE says IS NOT NULL AND c.kind <> 'default' AND (how = 'full' OR told[2] IS NULL)
) AS blocked (how, says) ON true"""


def statements(chain: Chain) -> list[str]:
    """Return what asks for the checks, to be sent in any transaction: the last one's rows are theirs."""
    return [PIN, chain.verification]


@understood()
def read(connection: Connection, chain: Chain, *, with_recreate: bool = False) -> Survey:
    """Ask once for every check, and for what it takes to fix some: one message, no lock but ACCESS SHARE.

    with_recreate: that step is at hand.
    """
    updated = literal([f"{step.label} {table}" for step in chain.steps for table in step.updates])
    rights = _RIGHTS.replace("{being_built}", being_built("ARRAY[relation.oid]")).replace("{updated}", updated)
    needed = _IF_NEEDED.replace("{rights}", rights).replace("{citus}", query_of(DB / "citus.sql"))
    asked = [_CHECKS.replace("{verification}", chain.verification), needed, _NOTED]
    try:
        [server], [[noted]], _, [[able, spread]] = connection.ask([_SERVER, *asked])
    except StatementError as error:
        if errors.for_sqlstate(error.sqlstate).exit_code != 7:
            raise
        # Printing some definitions takes ACCESS SHARE on their tables: it waits behind ACCESS EXCLUSIVE.
        raise errors.UNREADABLE_CATALOGS(why=error.message, where=error.holders) from error
    rows = [tuple(row.values())[1:] for row in json.loads(noted or "[]")]
    checks = list(checks_of(rows, chain, with_recreate=with_recreate))
    for place, lacking, built, blocked, says in (row.values() for row in json.loads(able or "[]")):
        if checks[place].fixed_by is None:  # but by what runs on request
            continue
        if blocked:  # what is around its table makes it a conflict
            checks[place] = replace(checks[place], fixed_by=None, blocked=tuple(blocked.split()), around=says)
        elif lacking or built:
            checks[place] = replace(checks[place], lacking=lacking, being_built=built is True)
    connection.one_by_one = bool(spread)
    for place, says, commands in (row.values() for row in json.loads(spread or "[]")):
        checks[place] = replace(checks[place], fixed_by=None, around=says, remedies=tuple(commands))
    return Survey(_server(server, checks, connection), tuple(checks))


def all_passing(before: Survey, checks: Sequence[Check]) -> Survey:
    """Return the survey once these pass, all of them: new tables are in the schema where such go."""
    homes = {check.home for check in checks if check.found}
    if any(check.kind is Kind.TABLE and check.actual is None for check in checks):
        homes.add(before.server.schema)
    server = replace(before.server, homes=tuple(schema for schema in before.server.path if schema in homes))
    return Survey(server, tuple(replace(check, actual=check.expected, fixed_by=None) for check in checks))


def checks_of(rows: Rows, chain: Chain, *, with_recreate: bool = False) -> tuple[Check, ...]:
    """Read the rows of the checks; what only recreate would fix is a conflict, unless that is at hand."""
    on_request = "" if with_recreate or chain.recreate is None else chain.recreate.label

    def check(row: Row) -> Check:
        step, kind, table, name, expected, actual, fixed_by, required, found, _verdict = row
        known = str(step), Kind(kind), str(table), str(name), str(expected), actual
        fixed_by, asked = (None, fixed_by) if fixed_by == on_request else (fixed_by, None)
        is_required = required in ("t", True)  # as text, or as JSON has it
        return Check(*known, fixed_by, is_required, found, on_request=asked)

    return tuple(map(check, rows))


def _server(row: Sequence[str | None], checks: Sequence[Check], connection: Connection) -> Server:
    version, role, name, path, read_only, search_path, pid = row
    pooled = pid != str(connection.backend_pid)
    # The session's own temporary schema comes last (see transaction_settings); behind a pooler the next has another.
    listed = json.loads(str(path))
    schemas = tuple(schema for schema in listed if schema == listed[0] or not schema.startswith("pg_temp_"))
    existing = {check.home for check in checks if check.found}
    homes = tuple(schema for schema in schemas if schema in existing)
    return Server(str(version).split()[0], str(role), str(name), schemas, read_only, str(search_path), pooled, homes)


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


def orphans(connection: Connection, checks: Sequence[Check], *, timeout: str = "0") -> list[Orphans]:
    """Count the rows that keep foreign keys among the checks from being validated; leave out where there are none.

    It reads the tables, as long as it takes (timeout: or no longer than that), and blocks nobody.
    """
    found = [_orphans(connection, c, timeout) for c in checks if c.kind is Kind.FOREIGN_KEY and c.unfinished]
    return [orphans for orphans in found if orphans.count != 0]


def _orphans(connection: Connection, check: Check, timeout: str) -> Orphans:
    key = check.expected.partition("(")[2].partition(")")[0]
    query = (
        f"SELECT * FROM {check.table} AS child WHERE {check.name} IS NOT NULL"
        f" AND NOT EXISTS (SELECT FROM {check.target} AS parent WHERE parent.{key} = child.{check.name})"
    )
    # Where row-level security hides rows, an error is better than a count of some; and a policy is others' code.
    limits = {"statement_timeout": timeout, "row_security": "off"}
    settings = [f"set_config('{name}', '{value}', true)" for name, value in limits.items()]
    counted = [UNPIN, f"SELECT pg_catalog.count(*) FROM ({query}) AS orphan"]
    try:
        _, [(count,)] = connection.ask(counted, *settings, answer_s=math.inf if timeout == "0" else None)
    except StatementError as error:
        return Orphans(check.table, respelled(query), None, str(error))
    return Orphans(check.table, respelled(query), int(count or 0))
