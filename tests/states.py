"""What real databases look like before the first run, as the older, hand-migrated application made them.

Its files said IF NOT EXISTS everywhere, left the names of most constraints to PostgreSQL, and commented nothing.
"""

from __future__ import annotations

import random
from typing import Any

from conftest import Db
from versions import MAJOR

Contents = dict[str, list[dict[str, Any]]]
Flags = dict[tuple[str, str], tuple[bool, int | None]]  # (type, name): (must_keep, min_chars)

BIGINT = "bigint REFERENCES turns (id) ON DELETE SET NULL"

CORE = """
CREATE TABLE IF NOT EXISTS worlds (
  id text PRIMARY KEY, version text NOT NULL DEFAULT '1.0.0',
  status text NOT NULL DEFAULT 'active' CHECK (status IN ('draft', 'active', 'archived', 'hidden')),
  doc jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS rulesets (LIKE worlds INCLUDING ALL);
CREATE TABLE IF NOT EXISTS entry_points (
  id text PRIMARY KEY, slug text NOT NULL UNIQUE,
  type text NOT NULL CHECK (type IN ('adventure', 'scenario', 'sandbox', 'quest', 'tutorial')),
  world_id text NOT NULL REFERENCES worlds (id) ON DELETE RESTRICT,
  ruleset_id text NOT NULL REFERENCES rulesets (id) ON DELETE RESTRICT,
  title text NOT NULL, subtitle text, description text NOT NULL, synopsis text,
  status text NOT NULL DEFAULT 'draft' CHECK (status IN ('draft', 'active', 'archived')),
  visibility text NOT NULL DEFAULT 'public' CHECK (visibility IN ('public', 'unlisted', 'private')),
  content_rating text NOT NULL DEFAULT 'safe' CHECK (content_rating IN ('safe', 'mature', 'explicit')),
  tags text[] NOT NULL DEFAULT '{}', content jsonb NOT NULL DEFAULT '{}', i18n jsonb NOT NULL DEFAULT '{}',
  search_text tsvector, sort_weight int NOT NULL DEFAULT 0, popularity_score int NOT NULL DEFAULT 0,
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX IF NOT EXISTS idx_entry_points_type ON entry_points (type);
CREATE INDEX IF NOT EXISTS idx_entry_points_search ON entry_points USING gin (search_text);
CREATE TABLE IF NOT EXISTS prompt_segments (
  id bigserial PRIMARY KEY,
  scope text NOT NULL CHECK (scope IN ('core', 'ruleset', 'world', 'entry', 'npc', 'player', 'input')),
  ref_id text, version text NOT NULL DEFAULT '1.0.0', active boolean NOT NULL DEFAULT true, content text NOT NULL,
  metadata jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS games (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  entry_point_id text NOT NULL REFERENCES entry_points (id) ON DELETE RESTRICT, entry_point_type text NOT NULL,
  world_id text NOT NULL REFERENCES worlds (id) ON DELETE RESTRICT,
  ruleset_id text NOT NULL REFERENCES rulesets (id) ON DELETE RESTRICT,
  owner_user_id uuid, state jsonb NOT NULL DEFAULT '{"hot":{},"warm":{},"cold":{}}',
  turn_count int NOT NULL DEFAULT 0,
  status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'ended', 'abandoned')),
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX IF NOT EXISTS idx_games_owner ON games (owner_user_id);
CREATE TABLE IF NOT EXISTS turns (
  id bigserial PRIMARY KEY, game_id uuid NOT NULL REFERENCES games (id) ON DELETE CASCADE, idx int NOT NULL,
  role text NOT NULL CHECK (role IN ('system', 'narrator', 'player', 'gm')),
  prompt_meta jsonb NOT NULL DEFAULT '{}', content jsonb NOT NULL, costs jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now());
CREATE UNIQUE INDEX IF NOT EXISTS idx_turns_game_idx ON turns (game_id, idx);
"""

CORE_ROWS = """
INSERT INTO worlds (id, status, doc) VALUES ('mystika', 'hidden', '{"moons": 2}'), ('verya', 'active', '{}');
INSERT INTO rulesets (id) VALUES ('core'), ('hard');
INSERT INTO entry_points (id, slug, type, world_id, ruleset_id, title, description, synopsis, tags)
VALUES ('e1', 'first', 'tutorial', 'mystika', 'core', 'The Gate', 'A gate opens', NULL, '{new,short}'),
       ('e2', 'second', 'quest', 'verya', 'hard', 'Salt', 'A sea without water', 'Old ships', '{}');
INSERT INTO prompt_segments (scope, content) VALUES ('core', 'You are the narrator.'), ('npc', 'Grumpy.');
INSERT INTO games (id, entry_point_id, entry_point_type, world_id, ruleset_id, turn_count)
SELECT md5('game ' || i)::uuid, 'e1', 'tutorial', 'mystika', 'core', 3 FROM generate_series(1, 3) AS i;
INSERT INTO turns (game_id, idx, role, content)
SELECT md5('game ' || i)::uuid, j, CASE j WHEN 1 THEN 'gm' ELSE 'player' END, jsonb_build_object('text', i * j)
FROM generate_series(1, 3) AS i, generate_series(1, 3) AS j;
"""

SLOTS_TEMPLATES = """
CREATE TABLE IF NOT EXISTS slots (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  type text NOT NULL CHECK (type IN ('world', 'ruleset', 'npc', 'scenario', 'module', 'ux')),
  name text NOT NULL, description text NOT NULL, max_len int, priority int DEFAULT 0,
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT uk_slots_type_name UNIQUE (type, name));
CREATE INDEX IF NOT EXISTS idx_slots_type ON slots (type);
CREATE TABLE IF NOT EXISTS templates (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  type text NOT NULL CHECK (type IN ('world', 'ruleset', 'npc', 'scenario', 'module', 'ux')),
  slot text NOT NULL, version int NOT NULL DEFAULT 1, body text NOT NULL,
  status text NOT NULL DEFAULT 'draft' CHECK (status IN ('draft', 'published')),
  created_at timestamptz NOT NULL DEFAULT now(), created_by uuid,
  CONSTRAINT uk_templates_type_slot_version UNIQUE (type, slot, version));
CREATE INDEX IF NOT EXISTS idx_templates_type_slot ON templates (type, slot);
CREATE INDEX IF NOT EXISTS idx_templates_status ON templates (status);
DO $$
BEGIN
  IF to_regclass('prompt_snapshots') IS NOT NULL THEN
    ALTER TABLE prompt_snapshots
      ADD COLUMN IF NOT EXISTS parent_id uuid REFERENCES prompt_snapshots (id) ON DELETE SET NULL;
    CREATE INDEX IF NOT EXISTS idx_prompt_snapshots_parent_id ON prompt_snapshots (parent_id);
  END IF;
END $$;
"""

CRITICAL: Flags = {
    ("ruleset", "principles"): (True, 160),
    ("ruleset", "choice_style"): (True, 80),
    ("module", "actions"): (True, 60),
    ("world", "tone"): (False, 180),
    ("npc", "persona"): (False, 140),
}
PLAIN: Flags = {
    ("ux", "hint"): (False, None),
    ("world", "actions"): (False, None),
    ("npc", "principles"): (False, None),
}

SLOT_ROWS = (
    "INSERT INTO slots (type, name, description, priority) VALUES "
    + ", ".join(f"('{kind}', '{name}', 'The {name}', 5)" for kind, name in (*CRITICAL, *PLAIN))
    + ";\nINSERT INTO templates (type, slot, body, status) VALUES"
    " ('world', 'tone', 'Dark.', 'published'), ('npc', 'persona', 'Dry.', 'draft');\n"
)


def snapshots(turn_id: str) -> str:
    """Write the older 20250213_prompt_snapshots, with this declaration of turn_id."""
    return f"""
CREATE TABLE IF NOT EXISTS prompt_snapshots (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  snapshot_id uuid NOT NULL DEFAULT gen_random_uuid(),
  templates_version text, pack_versions jsonb DEFAULT '{{}}', tp jsonb NOT NULL, linearized_prompt_text text NOT NULL,
  awf_contract text NOT NULL DEFAULT 'awf.v1',
  source text NOT NULL DEFAULT 'auto' CHECK (source IN ('auto', 'manual')),
  created_at timestamptz NOT NULL DEFAULT now(), created_by uuid,
  game_id uuid REFERENCES games (id) ON DELETE SET NULL, turn_id {turn_id},
  CONSTRAINT uk_prompt_snapshots_snapshot_id UNIQUE (snapshot_id));
CREATE INDEX IF NOT EXISTS idx_prompt_snapshots_created_at ON prompt_snapshots (created_at DESC);
CREATE INDEX IF NOT EXISTS idx_prompt_snapshots_game_id ON prompt_snapshots (game_id);
CREATE INDEX IF NOT EXISTS idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id);
CREATE INDEX IF NOT EXISTS idx_prompt_snapshots_source ON prompt_snapshots (source);
"""


def snapshot_rows(turn_id: str) -> str:
    """Write four snapshots; turn_id: an expression of i, which counts them (and of the first turns)."""
    return f"""
INSERT INTO prompt_snapshots (id, snapshot_id, tp, linearized_prompt_text, source, game_id, turn_id)
SELECT md5('snapshot ' || i)::uuid, md5('name ' || i)::uuid, jsonb_build_object('n', i), 'Prompt ' || i,
       CASE WHEN i % 2 = 0 THEN 'manual' ELSE 'auto' END, md5('game ' || i % 3 + 1)::uuid, {turn_id}
FROM generate_series(1, 4) AS i;
"""


UUIDS = "CASE WHEN i < 4 THEN md5('turn ' || i)::uuid END"
BIGINTS = "CASE WHEN i < 4 THEN i END"
ORPHANS = "CASE i WHEN 3 THEN 999999 WHEN 4 THEN NULL ELSE i END"


def by_hand(turn_id: str = BIGINT, values: str = BIGINTS) -> str:
    """Write a database with everything up to 20250214, and rows in every table."""
    return CORE + CORE_ROWS + snapshots(turn_id) + snapshot_rows(values) + SLOTS_TEMPLATES + SLOT_ROWS


def with_uuid(turn_id: str = "uuid") -> str:
    """Write a database whose turn_id is uuid, with rows."""
    return by_hand(turn_id, "md5('turn ' || i)::uuid" if "NOT NULL" in turn_id else UUIDS)


# The same with turns.id as uuid, as the oldest form had it.
CORE_WITH_UUID_TURNS = CORE.replace(
    "id bigserial PRIMARY KEY, game_id", "id uuid PRIMARY KEY DEFAULT gen_random_uuid(), game_id"
)

# What the application's own head has made of its tables; the rows' world_id is known to nobody else.
HEAD = """
ALTER TABLE turns RENAME idx TO turn_number;
ALTER TABLE entry_points DROP ruleset_id;
ALTER TABLE games DROP CONSTRAINT games_world_id_fkey, ALTER world_id TYPE uuid USING gen_random_uuid();
"""

ANOTHER_FEATURE = """
CREATE TABLE prompt_snapshots (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(), entity_type text NOT NULL, entity_id text NOT NULL,
  version int NOT NULL, data jsonb NOT NULL, UNIQUE (entity_type, entity_id, version));
INSERT INTO prompt_snapshots (entity_type, entity_id, version, data) VALUES ('npc', 'n1', 1, '{"a": 1}');
"""

NOT_TO_ALL = "REVOKE CREATE ON SCHEMA public FROM PUBLIC"  # as it is from PostgreSQL 15 on

# Makes every table that of {role}.
OWN = """
DO $$ DECLARE t regclass; BEGIN
  FOR t IN SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' LOOP
    EXECUTE format('ALTER TABLE %s OWNER TO {role}', t);
  END LOOP;
END $$; GRANT CREATE ON SCHEMA public TO {role};
"""

# A publication's list of columns is new in PostgreSQL 15; without one it publishes them all, and is a conflict as well.
COLUMNS = " (id, turn_id)" if MAJOR >= 15 else ""

# What can hang on a uuid turn_id, by the name that the message must give it.
HANGING = {
    "view turn_view": "CREATE VIEW turn_view AS SELECT id, turn_id FROM prompt_snapshots",
    "materialized view turn_matview": "CREATE MATERIALIZED VIEW turn_matview AS SELECT turn_id FROM prompt_snapshots",
    "policy turn_policy": "CREATE POLICY turn_policy ON prompt_snapshots USING (turn_id IS NOT NULL)",
    "trigger turn_trigger": """
        CREATE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER turn_trigger BEFORE UPDATE OF turn_id ON prompt_snapshots
          FOR EACH ROW EXECUTE FUNCTION touched()""",
    "column turn_text": "ALTER TABLE prompt_snapshots ADD turn_text uuid GENERATED ALWAYS AS (turn_id) STORED",
    "publication turn_publication": f"CREATE PUBLICATION turn_publication FOR TABLE prompt_snapshots{COLUMNS}",
    "constraint turn_elsewhere": """
        CREATE TABLE old_turns (id uuid PRIMARY KEY);
        INSERT INTO old_turns SELECT turn_id FROM prompt_snapshots WHERE turn_id IS NOT NULL;
        ALTER TABLE prompt_snapshots ADD CONSTRAINT turn_elsewhere FOREIGN KEY (turn_id) REFERENCES old_turns (id)""",
    "constraint pointing_here": """
        ALTER TABLE prompt_snapshots ADD CONSTRAINT one_per_turn UNIQUE (turn_id);
        CREATE TABLE notes (turn uuid CONSTRAINT pointing_here REFERENCES prompt_snapshots (turn_id))""",
    "index turn_two": "CREATE INDEX turn_two ON prompt_snapshots (game_id, turn_id)",
    "index turn_partial": "CREATE INDEX turn_partial ON prompt_snapshots (id) WHERE turn_id IS NULL",
    "index turn_other_name": "CREATE INDEX turn_other_name ON prompt_snapshots (turn_id)",
    "constraint turn_check": "ALTER TABLE prompt_snapshots ADD CONSTRAINT turn_check CHECK (turn_id <> id)",
    "statistics object turn_statistics": "CREATE STATISTICS turn_statistics ON turn_id, game_id FROM prompt_snapshots",
    "function turn_function": """
        CREATE FUNCTION turn_function() RETURNS uuid
          BEGIN ATOMIC SELECT turn_id FROM prompt_snapshots LIMIT 1; END""",
}

EXTRAS = """
ALTER TABLE slots ADD COLUMN notes text, ADD COLUMN weight int NOT NULL DEFAULT 1;
ALTER TABLE turns ADD COLUMN language text, ADD COLUMN model text DEFAULT 'small';
ALTER TABLE prompt_snapshots ADD COLUMN trace uuid;
CREATE INDEX turns_by_role ON turns (role);
CREATE INDEX slots_by_priority ON slots (priority DESC);
CREATE TABLE achievements (id serial PRIMARY KEY, game_id uuid REFERENCES games (id));
CREATE VIEW busy_games AS SELECT id FROM games WHERE turn_count > 1;
INSERT INTO achievements (game_id) SELECT id FROM games;
"""


OLD_METRICS = """
CREATE TABLE turn_metrics (
  turn_id {turn_id} {key}, story_id uuid NOT NULL, created_at timestamptz NOT NULL DEFAULT now(),
  tokens_before int NOT NULL, tokens_after int NOT NULL, trims_count int NOT NULL DEFAULT 0,
  top_trim_keys text[] DEFAULT '{{}}', model_ms int, rejects jsonb DEFAULT '{{}}', cost_estimate_cents int);
INSERT INTO turn_metrics (turn_id, story_id, tokens_before, tokens_after, top_trim_keys)
SELECT id, game_id, 900, 700, '{{world.tone}}' FROM turns ORDER BY id LIMIT 3;
"""


def old_metrics(key: str = "PRIMARY KEY REFERENCES turns (id) ON DELETE CASCADE", *, turn_id: str = "bigint") -> str:
    """Write turn_metrics as made by hand, with the first three turns' rows."""
    return OLD_METRICS.format(turn_id=turn_id, key=key)


def altered(change: str) -> str:
    """Write a database made by hand, then this change."""
    return by_hand() + change


def contents(db: Db) -> Contents:
    """Return the rows of every table of the users' (and not of the history), in an order of their own."""
    tables = """
        SELECT format('%I.%I', nspname, relname) FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace
        WHERE relkind IN ('r', 'p') AND nspname !~ '^pg_|^information_schema$|^budget_engine$' ORDER BY 1"""
    query = """
        SELECT coalesce(json_agg(line ORDER BY line ->> 'id', line::text), '[]')
        FROM (SELECT to_jsonb(t) AS line FROM {} AS t OFFSET 0) AS lines"""
    with db.connect() as connection:
        return {
            table: connection.execute(query.format(table).encode()).fetchall()[0][0]
            for (table,) in connection.execute(tables).fetchall()
        }


def lost(before: Contents, after: Contents, renamed: dict[str, str]) -> list[tuple[str, Any, Any]]:
    """Return what is no longer as it was, of rows and of columns; renamed: schema.table.column → its name now."""
    differences: list[tuple[str, Any, Any]] = []
    for table, rows in before.items():
        names = {column: renamed.get(f"{table}.{column}", column) for row in rows for column in row}
        now = [{old: row.get(new, "gone") for old, new in names.items()} for row in after.get(table, [])]
        if now != rows:
            differences.append((table, rows, now))
    return differences


def random_name(chance: random.Random) -> str:
    """Return a name of any of Unicode's characters but NUL and surrogates, most of them of some use to an attacker."""
    signs = [
        *"\r\n\t\v\f\x1b\x7f\x85\xa0\x1c\x1e\u2028\u2029\u202e\u2066\u200e\ufeff'\"\\$;:#[ ",
        "$$",
        "--",
        "/*",
        "::",
        "##[",
        "E'",
    ]
    points = [chance.randrange(1, chance.choice([0x3000, 0x110000 - 0x800])) for _ in signs]
    signs += [chr(point if point < 0xD800 else point + 0x800) for point in points]
    name = "".join(chance.choices(signs, k=chance.randrange(1, 30))).encode()[:63]
    return name.decode(errors="ignore") or "v"


def strange_names(chance: random.Random, more: int = 20) -> list[str]:
    """Return names that end a line, begin a command of psql or GitHub, or steer a terminal, and random ones."""
    ends = ["\r", "\n", "\v", "\f", "\t", "\x1b[2K", "\x7f", "\x85", "\u2028", "\u2029", "\u202e", "\x1c", "\x1e"]
    names = [f"v{sign}\\! touch made_by_a_name;#" for sign in [*ends, " " * 30]]
    names += [
        "v" + " " * 25 + "; CREATE TABLE made_by_a_name ();",
        "v\n::error::x\n FORGED\n##[error]x",
        "::error::x",
        "v##[error]x",
        "%s $$ $locks$ :x",
    ]
    return [*names, *(random_name(chance) for _ in range(more))]
