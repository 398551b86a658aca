"""The tables under load: as the older application made them, with rows of realistic width, and their traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conftest import Db
from states import CORE, SLOT_ROWS, SLOTS_TEMPLATES, snapshots

TABLES = ("prompt_snapshots", "turns", "slots")

_TURNS_PER_GAME = 100
_LOST_INDEX = "idx_slots_type"  # and idx_prompt_snapshots_created_by, which the older application never made
_PLAIN_INDEXES = """
    SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid)
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE relnamespace = 'public'::regnamespace
      AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)"""


def build(db: Db, rows: int, slots: int) -> None:
    """Make the tables, as they were before templates, and fill them; then the indexes, which leaves them compact."""
    db.execute(CORE + snapshots("uuid") + SLOTS_TEMPLATES + SLOT_ROWS)
    db.execute("DROP TABLE templates; ALTER TABLE prompt_snapshots DROP COLUMN parent_id")
    indexes = dict(db.rows(_PLAIN_INDEXES))
    db.execute(f"DROP INDEX {', '.join(indexes)}")
    db.execute(f"SET session_replication_role = replica; {_rows(rows, slots)}")
    db.execute("; ".join(definition for name, definition in indexes.items() if name != _LOST_INDEX))
    db.execute("VACUUM (FREEZE, ANALYZE)")


def _key(number: str) -> str:
    """Write an expression for the key of the row with this number."""
    return f"('00000000-0000-4000-8000-' || lpad(to_hex(({number})::int), 12, '0'))::uuid"


def _text(length: int) -> str:
    """Write an expression for a text of so many characters (a multiple of 32), another one for every i."""
    return " || ".join(f"md5('{part} ' || i)" for part in range(length // 32))


def _rows(rows: int, slots: int) -> str:
    game, created_at = _key(f"(i - 1) / {_TURNS_PER_GAME} + 1"), "timestamptz '2025-01-01' + i * interval '1 s'"
    return f"""
INSERT INTO worlds (id) VALUES ('w');
INSERT INTO rulesets (id) VALUES ('r');
INSERT INTO entry_points (id, slug, type, world_id, ruleset_id, title, description)
VALUES ('e', 'e', 'quest', 'w', 'r', 'Salt', 'A sea without water');
INSERT INTO games (id, entry_point_id, entry_point_type, world_id, ruleset_id)
SELECT {_key("i")}, 'e', 'quest', 'w', 'r' FROM generate_series(1, {rows} / {_TURNS_PER_GAME} + 1) AS i;

INSERT INTO turns (game_id, idx, role, content, created_at)
SELECT {game}, i % {_TURNS_PER_GAME}, CASE i % 2 WHEN 0 THEN 'player' ELSE 'narrator' END,
       jsonb_build_object('text', {_text(96)}), {created_at}
FROM generate_series(1, {rows}) AS i;

INSERT INTO prompt_snapshots (id, snapshot_id, templates_version, tp, linearized_prompt_text, source, created_at,
                              game_id, turn_id)
SELECT {_key("i")}, {_key("i")}, '1.0.0',
       jsonb_build_object('turn', i, 'slots', jsonb_build_object('tone', {_text(96)}, 'persona', {_text(96)}),
                          'budget', jsonb_build_object('limit', 8000, 'used', i % 8000)),
       {_text(384)}, CASE WHEN i % 10 = 0 THEN 'manual' ELSE 'auto' END, {created_at}, {game}, md5('turn ' || i)::uuid
FROM generate_series(1, {rows}) AS i;

INSERT INTO slots (id, type, name, description, priority)
SELECT {_key("i")}, 'ux', 'slot ' || i, {_text(64)}, i % 10 FROM generate_series(1, {slots}) AS i;
"""


def statements(slots: int) -> Mapping[str, Sequence[str]]:
    """Write the statements of each reader and each writer, which runs them in turn."""
    this_snapshot = f"id = {_key('%(row)s')}"
    slot = f"'slot ' || (%(row)s %% {slots} + 1)::text"
    this_slot = f"type = 'ux' AND name = {slot}"
    return {
        "prompt_snapshots read": [f"SELECT tp, linearized_prompt_text FROM prompt_snapshots WHERE {this_snapshot}"],
        "prompt_snapshots write": [
            "INSERT INTO prompt_snapshots (tp, linearized_prompt_text, game_id)"
            f" VALUES ('{{\"slots\": {{}}}}', repeat('prompt ', 50), {_key('1')})",
            f"UPDATE prompt_snapshots SET templates_version = '1.0.1' WHERE {this_snapshot}",
        ],
        "turns read": ["SELECT role, content FROM turns WHERE id = %(row)s"],
        "turns write": [
            "INSERT INTO turns (game_id, idx, role, content)"
            f" VALUES ({_key('1')}, 1000 + %(n)s, 'player', '{{\"text\": \"north\"}}')",
            "UPDATE turns SET costs = '{\"cents\": 1}' WHERE id = %(row)s",
        ],
        "slots read": [f"SELECT description, max_len FROM slots WHERE {this_slot}"],
        "slots write": [
            f"INSERT INTO slots (type, name, description) VALUES ('ux', {slot}, 'another text')"
            " ON CONFLICT (type, name) DO UPDATE SET description = EXCLUDED.description",
            f"UPDATE slots SET priority = priority + 1 WHERE {this_slot}",
        ],
    }
