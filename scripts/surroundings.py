"""The surroundings: what stands around the chain and is no promise of it, for status to tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from psycopg import sql

from scripts import turn
from scripts.chain import Step
from scripts.database import Database

_ENTRIES = 5  # of the diary: enough to see the last run
_NAMED = 5  # of the relations elsewhere: there may be hundreds of tenants


@dataclass(frozen=True)
class Entry:
    """A line of the diary, as text; duration_ms: how long the part took."""

    step: str
    part: str
    finished_at: str
    duration_ms: str
    role: str
    version: str


@dataclass(frozen=True)
class Surroundings:
    """What is worth knowing besides the promises.

    unwritable: roles that may write turns but not turn_metrics; elsewhere: relations of the chain's names that the
    search_path does not lead to, some of them, and how many there are (elsewhere_count); invalid: indexes that a build
    left unfinished; diary: the last entries of the schemas that this is about, the newest first; changed: stems
    whose file is another than the one that was applied there last.
    """

    unwritable: tuple[str, ...]
    elsewhere: tuple[str, ...]
    elsewhere_count: int
    invalid: tuple[str, ...]
    diary: tuple[Entry, ...]
    changed: tuple[str, ...]


_UNWRITABLE = """
SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END
FROM pg_class AS turns
CROSS JOIN LATERAL (
  SELECT coalesce(relacl, acldefault('r', relowner))
  UNION ALL SELECT attacl FROM pg_attribute WHERE attrelid = turns.oid AND attacl IS NOT NULL
) AS granted (acl)
CROSS JOIN LATERAL aclexplode(granted.acl)
WHERE turns.oid = to_regclass('turns') AND privilege_type = 'INSERT'
  AND CASE grantee WHEN 0 THEN NOT EXISTS (
        SELECT FROM pg_class, aclexplode(relacl)
        WHERE oid = to_regclass('turn_metrics') AND grantee = 0 AND privilege_type = 'INSERT')
      ELSE NOT has_table_privilege(grantee, to_regclass('turn_metrics'), 'INSERT') END
ORDER BY 1"""

_ELSEWHERE = """
SELECT format('%I.%I', nspname, relname), count(*) OVER ()
FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace
WHERE relname = ANY ({tables}) AND relkind IN ('r', 'p', 'v', 'm', 'f')
  AND pg_class.oid IS DISTINCT FROM to_regclass(quote_ident(relname))
  AND nspname !~ '^pg_' AND nspname <> 'information_schema'
ORDER BY 1 LIMIT {limit}"""

_INVALID = """
SELECT indexrelid::regclass::text FROM pg_index
WHERE NOT indisvalid AND indrelid IN (SELECT to_regclass(name) FROM unnest({tables}) AS name)
ORDER BY 1"""

_HAS_DIARY = """
SELECT FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace
WHERE nspname = 'budget_engine' AND relname = 'diary' AND has_schema_privilege(n.oid, 'USAGE')
  AND has_table_privilege(pg_class.oid, 'SELECT')
  AND 9 = (SELECT count(*) FROM pg_attribute WHERE attrelid = pg_class.oid AND NOT attisdropped
           AND attname IN ('id', 'step', 'part', 'schema_name', 'finished_at', 'duration', 'role_name', 'checksum',
                           'version'))"""

_DIARY = f"""
SELECT step, part, to_char(finished_at, 'YYYY-MM-DD HH24:MI:SSOF'), round(1000 * extract(epoch FROM duration)),
       role_name, version
FROM budget_engine.diary WHERE {{ours}} ORDER BY id DESC LIMIT {_ENTRIES}"""

_APPLIED = "SELECT DISTINCT ON (step) step, checksum FROM budget_engine.diary WHERE {ours} ORDER BY step, id DESC"


def read(database: Database, steps: Sequence[Step], tables: Iterable[str]) -> Surroundings:
    """Look around the chain's tables; two messages at most, no lock but ACCESS SHARE on the diary."""
    tables = sorted(set(tables))
    names = f"{sql.Literal(tables).as_string()}::text[]"
    looks = [_UNWRITABLE, _ELSEWHERE.format(tables=names, limit=_NAMED), _INVALID.format(tables=names), _HAS_DIARY]
    unwritable, elsewhere, invalid, has_diary = database.ask(looks)
    ours = f"schema_name IN (SELECT n.nspname::text FROM pg_namespace AS n WHERE {turn.own(tables)})"
    about_us = [_DIARY.format(ours=ours), _APPLIED.format(ours=ours)]
    diary, applied = database.ask(about_us) if has_diary else ([], [])
    checksums = {step.stem: step.checksum for step in steps}
    return Surroundings(
        unwritable=_names(unwritable),
        elsewhere=tuple(str(name) for name, _ in elsewhere),
        elsewhere_count=int(elsewhere[0][1] or 0) if elsewhere else 0,
        invalid=_names(invalid),
        diary=tuple(Entry(*map(str, row)) for row in diary),
        changed=tuple(str(stem) for stem, checksum in applied if checksums.get(str(stem), checksum) != checksum),
    )


def _names(rows: Sequence[tuple[str | None, ...]]) -> tuple[str, ...]:
    return tuple(str(name) for (name,) in rows)
