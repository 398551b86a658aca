"""The facts that remedies are made of: what stands around the items in the way, read from the catalogs in one message.

Names come as SQL writes them, qualified and quoted, and definitions as PostgreSQL prints them: the search_path resolves
each table once, and is then empty.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from psycopg import sql

from scripts import chain
from scripts.database import Database

_FACTS = chain.ROOT / "db" / "facts.sql"

_RESOLVE = """
SELECT set_config('budget_engine.names', {names}, true),
       set_config('budget_engine.standing', (
         SELECT json_object_agg(name, CASE WHEN name ~ '^[a-z_]+$' THEN to_regclass(name)::oid END)::text
         FROM json_array_elements_text({tables}) AS name), true),
       set_config('budget_engine.place', current_schema(), true),
       set_config('budget_engine.path', array_to_json(current_schemas(false))::text, true)"""


@dataclass(frozen=True)
class Facts:
    """What stands around the items in the way.

    rows: (subject, what) → (value, other)…; recreated: the tables that prereqs --recreate would move; led_to: whether
    foreign keys of others' tables keep it from doing so unasked.
    """

    rows: Mapping[tuple[str, str], Sequence[tuple[str, str]]] = field(default_factory=dict)
    recreated: frozenset[str] = frozenset()
    led_to: bool = False

    def all(self, subject: str, what: str) -> Sequence[tuple[str, str]]:
        """Return what is known of the subject."""
        return self.rows.get((subject, what), ())

    def free(self, name: str) -> str:
        """Return the name, or one like it, that nothing bears yet."""
        taken = {value for value, _ in self.all("", "taken")}
        return next(free for free in (name, *(f"{name}_{n}" for n in range(2, len(taken) + 3))) if free not in taken)


def read(database: Database, tables: Collection[str], names: Collection[str]) -> Facts:
    """Ask for the facts: one message, no lock but ACCESS SHARE, for what PostgreSQL prints of views.

    tables, names: those that the items are about.
    """
    recreate = chain.load_recreate().verification
    recreation, _, _, rows = database.ask(
        [
            recreate,
            _RESOLVE.format(names=_json(names), tables=_json(tables)),
            "SELECT set_config('search_path', 'pg_catalog', true)",
            _FACTS.read_text(encoding="utf-8").rstrip().removesuffix(";"),
        ]
    )
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for subject, what, value, other in rows:
        found.setdefault((str(subject), str(what)), []).append((value or "", other or ""))
    return Facts(
        found,
        recreated=frozenset(str(item).rpartition(" ")[0] for item, *_ in recreation if str(item).endswith(" place")),
        led_to=any(by is None and actual != expected for _, expected, actual, by in recreation),
    )


def _json(words: Collection[str]) -> str:
    return sql.Literal(json.dumps(sorted(words))).as_string()
