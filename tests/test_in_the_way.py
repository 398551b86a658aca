"""What stands in the way, and the way out: exit 6, nothing changed, and the commands that are printed lead to the end.

Each wrong form of each kind of item, with rows in the tables. The commands are run as they are printed: what the SQL of
one state leaves behind is looked at by setup, not by this module.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import psycopg
import pytest
import supabase
from conftest import MIGRATIONS, SEED, Db, Run
from states import (
    ANOTHER_FEATURE,
    BIGINT,
    COLUMNS,
    CORE,
    CORE_ROWS,
    CORE_WITH_UUID_TURNS,
    HANGING,
    SLOTS_TEMPLATES,
    Contents,
    altered,
    by_hand,
    contents,
    old_metrics,
    snapshot_rows,
    snapshots,
    with_uuid,
)
from terminal import on_terminal
from test_verifications import Breakage, batches, breakages, copy, promised, verifying
from versions import MAJOR

TURN_FOREIGN_KEY = "FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE SET NULL"

# (state, what stands, what is promised); where a column is missing: the table, the column
IN_THE_WAY = {
    "must_keep text": (altered("ALTER TABLE slots ADD must_keep text"), "slots.must_keep: text", "boolean NOT NULL"),
    "must_keep nullable": (
        altered("ALTER TABLE slots ADD must_keep boolean DEFAULT false"),
        "slots.must_keep: boolean DEFAULT false",
        "boolean NOT NULL DEFAULT false",
    ),
    "must_keep default true": (
        altered("ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT true"),
        "slots.must_keep: boolean NOT NULL DEFAULT true",
        "boolean NOT NULL DEFAULT false",
    ),
    "min_chars bigint": (altered("ALTER TABLE slots ADD min_chars bigint"), "slots.min_chars: bigint", "integer"),
    "min_chars NOT NULL": (
        altered("ALTER TABLE slots ADD min_chars int NOT NULL DEFAULT 0"),
        "slots.min_chars: integer NOT NULL DEFAULT 0",
        "integer",
    ),
    "budget_report json": (
        altered("ALTER TABLE prompt_snapshots ADD budget_report json"),
        "prompt_snapshots.budget_report: json,",
        "jsonb",
    ),
    "budget_report NOT NULL": (
        altered("ALTER TABLE prompt_snapshots ADD budget_report jsonb NOT NULL DEFAULT '{}'"),
        "prompt_snapshots.budget_report: jsonb NOT NULL",
        "jsonb",
    ),
    "story_id text": (
        altered(old_metrics() + "ALTER TABLE turn_metrics ALTER story_id TYPE text"),
        "turn_metrics.story_id: text NOT NULL",
        "uuid NOT NULL",
    ),
    "turn_metrics.turn_id uuid": (
        altered("CREATE TABLE turn_metrics (turn_id uuid PRIMARY KEY, tokens int)"),
        "turn_metrics.turn_id: uuid NOT NULL",
        "bigint NOT NULL",
    ),
    "turn_metrics with another default": (
        altered(old_metrics() + "ALTER TABLE turn_metrics ALTER trims_count SET DEFAULT 1"),
        "turn_metrics.trims_count: integer NOT NULL DEFAULT 1",
        "integer NOT NULL DEFAULT 0",
    ),
    "turn_metrics without primary key": (
        altered(old_metrics("NOT NULL REFERENCES turns (id) ON DELETE CASCADE")),
        "turn_metrics (turn_id): missing",
        "PRIMARY KEY",
    ),
    "turn_metrics without cascade": (
        altered(old_metrics("PRIMARY KEY REFERENCES turns (id)")),
        "turn_metrics foreign key (turn_id): FOREIGN KEY (turn_id) REFERENCES turns(id),",
        "ON DELETE CASCADE",
    ),
    "turn_metrics a view": (
        altered("CREATE VIEW turn_metrics AS SELECT id AS turn_id FROM turns"),
        "turn_metrics",
        "view",
    ),
    "turn_id text": (by_hand("text"), "prompt_snapshots.turn_id: text", "bigint"),
    "turn_id int": (by_hand(BIGINT.replace("bigint", "int")), "prompt_snapshots.turn_id: integer", "bigint"),
    "turn_id bigint NOT NULL": (
        by_hand("bigint NOT NULL REFERENCES turns (id) ON DELETE SET NULL", "i"),
        "prompt_snapshots.turn_id: bigint NOT NULL",
        "bigint",
    ),
    "turn_id gone": (
        altered("ALTER TABLE prompt_snapshots DROP turn_id"),
        "prompt_snapshots",
        "turn_id",
    ),
    "turn_id with cascade": (
        by_hand("bigint REFERENCES turns (id) ON DELETE CASCADE"),
        "REFERENCES turns(id) ON DELETE CASCADE",
        TURN_FOREIGN_KEY,
    ),
    "turn_id to another table": (
        "CREATE TABLE rounds (id bigint PRIMARY KEY); INSERT INTO rounds SELECT generate_series(1, 9);"
        + by_hand("bigint REFERENCES rounds (id)"),
        "REFERENCES rounds(id)",
        TURN_FOREIGN_KEY,
    ),
    "parent_id text": (
        altered("ALTER TABLE prompt_snapshots DROP parent_id, ADD parent_id text"),
        "prompt_snapshots.parent_id: text",
        "uuid",
    ),
    "parent_id with cascade": (
        altered(
            "ALTER TABLE prompt_snapshots DROP parent_id,"
            " ADD parent_id uuid REFERENCES prompt_snapshots (id) ON DELETE CASCADE"
        ),
        "REFERENCES prompt_snapshots(id) ON DELETE CASCADE",
        "REFERENCES prompt_snapshots(id) ON DELETE SET NULL",
    ),
    "slots without max_len": (altered("ALTER TABLE slots DROP max_len"), "slots", "max_len"),
    "slots.name varchar": (
        altered("ALTER TABLE slots ALTER name TYPE varchar(80)"),
        "slots.name: character varying(80) NOT NULL",
        "text NOT NULL",
    ),
    "slots without its key": (
        altered("ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name"),
        "slots (type, name): missing",
        "UNIQUE",
    ),
    "templates a view": (
        altered("ALTER TABLE templates RENAME TO texts; CREATE VIEW templates AS SELECT * FROM texts"),
        "templates",
        "view",
    ),
    "turns.id uuid": (CORE_WITH_UUID_TURNS + CORE_ROWS, "turns.id: uuid NOT NULL", "bigint NOT NULL"),
    "turns.id uuid, snapshots too": (
        CORE_WITH_UUID_TURNS + CORE_ROWS + snapshots(BIGINT.replace("bigint", "uuid")) + SLOTS_TEMPLATES,
        "turns.id: uuid NOT NULL",
        "bigint NOT NULL",
    ),
    "turns.id int": (
        CORE.replace("bigserial PRIMARY KEY, game_id", "serial PRIMARY KEY, game_id") + CORE_ROWS,
        "turns.id: integer NOT NULL",
        "bigint NOT NULL",
    ),
    "games without state": (
        CORE + CORE_ROWS + "ALTER TABLE games DROP state",
        "games",
        "state",
    ),
    "turns partitioned": (
        CORE[: CORE.index("CREATE TABLE IF NOT EXISTS turns")]
        + "CREATE TABLE turns (id bigint, PRIMARY KEY (id)) PARTITION BY RANGE (id)",
        "turns",
        "partitioned table",
    ),
    "another feature's prompt_snapshots": (
        CORE + CORE_ROWS + ANOTHER_FEATURE,
        "prompt_snapshots",
        "snapshot_id",
    ),
    "another feature's, nothing else": (ANOTHER_FEATURE, "prompt_snapshots", "snapshot_id"),
    "index on another column": (
        altered("DROP INDEX idx_slots_type; CREATE INDEX idx_slots_type ON slots (name)"),
        "slots index idx_slots_type: btree (name)",
        "btree (type)",
    ),
    "index not partial": (
        altered(
            "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false;"
            "CREATE INDEX idx_slots_must_keep ON slots (must_keep)"
        ),
        "slots index idx_slots_must_keep: btree (must_keep)",
        "btree (must_keep) WHERE must_keep",
    ),
    "index unique": (
        altered("CREATE UNIQUE INDEX idx_templates_type_slot_status ON templates (type, slot, status)"),
        "templates index idx_templates_type_slot_status: UNIQUE btree (type, slot, status)",
        "btree (type, slot, status)",
    ),
    "index of another table": (
        altered("CREATE INDEX idx_games_world ON turns (role)"),
        "games index idx_games_world: an index on turns",
        "btree (world_id)",
    ),
    "table of an index's name": (
        altered("CREATE TABLE idx_games_world ()"),
        "games index idx_games_world: not an index",
        "btree (world_id)",
    ),
    "turn_id's index on another column": (
        altered(
            "DROP INDEX idx_prompt_snapshots_turn_id;"
            "CREATE INDEX idx_prompt_snapshots_turn_id ON prompt_snapshots (game_id)"
        ),
        "prompt_snapshots index idx_prompt_snapshots_turn_id: btree (game_id)",
        "btree (turn_id)",
    ),
    "turn_id uuid, its index on another column": (
        with_uuid() + "DROP INDEX idx_prompt_snapshots_turn_id;"
        "CREATE INDEX idx_prompt_snapshots_turn_id ON prompt_snapshots (game_id)",
        "prompt_snapshots index idx_prompt_snapshots_turn_id: btree (game_id)",
        "btree (turn_id)",
    ),
    "turn_id's index on more columns": (
        altered(
            "DROP INDEX idx_prompt_snapshots_turn_id;"
            "CREATE INDEX idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id, game_id)"
        ),
        "prompt_snapshots index idx_prompt_snapshots_turn_id: btree (turn_id, game_id)",
        "btree (turn_id)",
    ),
    "turn_id generated": (
        by_hand(values="NULL")
        + "ALTER TABLE prompt_snapshots DROP turn_id, ADD turn_id uuid GENERATED ALWAYS AS (snapshot_id) STORED",
        "prompt_snapshots.turn_id",
        "none",
    ),
    "a sequence of the name of an index to be made": (
        altered("CREATE SEQUENCE idx_turn_metrics_created"),
        "idx_turn_metrics_created: not an index",
        "btree (created_at DESC)",
    ),
} | {f"on turn_id hangs {name}": (with_uuid() + change, name, "turn_id") for name, change in HANGING.items()}


STATUS_ENUM = """
CREATE TYPE published AS ENUM ('draft', 'published');
ALTER TABLE templates DROP CONSTRAINT templates_status_check, ALTER status DROP DEFAULT,
  ALTER status TYPE published USING status::published, ALTER status SET DEFAULT 'draft';
"""
SOURCE_ENUM = """
CREATE TYPE "By" AS ENUM ('auto', 'manual');
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_source_check, ALTER source DROP DEFAULT,
  ALTER source TYPE "By" USING source::"By", ALTER source SET DEFAULT 'auto';
"""
COMPARES_AN_ENUM = """
CREATE INDEX live ON templates (slot) WHERE status = 'published';
CREATE UNIQUE INDEX one_draft ON templates (slot, (CASE status WHEN 'draft' THEN 1 END));
ALTER TABLE templates ADD CONSTRAINT long_enough CHECK (status = 'draft' OR length(body) > 1),
  ADD is_live boolean GENERATED ALWAYS AS (status = 'published') STORED;
CREATE VIEW live_templates AS SELECT id, status FROM templates WHERE status = 'published';
CREATE FUNCTION live() RETURNS SETOF live_templates LANGUAGE sql AS 'SELECT * FROM live_templates';
CREATE POLICY live ON templates USING (status = ANY ('{published}'::published[]));
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER live BEFORE UPDATE ON templates FOR EACH ROW WHEN (NEW.status = 'published') EXECUTE FUNCTION nothing();
"""
NOTES = """
CREATE TABLE notes (turn_id uuid UNIQUE, note text);
INSERT INTO notes SELECT DISTINCT turn_id, 'turn_id' FROM prompt_snapshots;
CREATE VIEW noted AS SELECT p.id, n.note, p.turn_id, jsonb_build_object('turn_id', p.turn_id, 'note', n.turn_id) AS doc
  FROM prompt_snapshots AS p JOIN notes AS n ON n.turn_id = p.turn_id;
CREATE VIEW unaliased AS SELECT s.turn_id, s.id FROM (SELECT turn_id, id FROM prompt_snapshots) AS s
  WHERE EXISTS (SELECT FROM notes WHERE notes.turn_id = s.turn_id);
CREATE MATERIALIZED VIEW keys AS SELECT jsonb_build_object('turn_id', turn_id) AS doc, turn_id FROM prompt_snapshots;
CREATE INDEX keys_turn ON keys (turn_id);
CREATE POLICY seen ON notes USING (turn_id IN (SELECT prompt_snapshots.turn_id FROM prompt_snapshots));
CREATE POLICY noted ON prompt_snapshots USING (turn_id IN (SELECT n.turn_id FROM notes AS n) OR source = 'turn_id');
CREATE RULE forget AS ON DELETE TO prompt_snapshots DO ALSO
  INSERT INTO notes (turn_id, note) VALUES (old.turn_id, 'turn_id') ON CONFLICT DO NOTHING;
ALTER TABLE prompt_snapshots ADD CONSTRAINT one_note FOREIGN KEY (turn_id) REFERENCES notes (turn_id);
CREATE FUNCTION noted(uuid) RETURNS text BEGIN ATOMIC
  SELECT 'turn_id' || note FROM notes JOIN prompt_snapshots ON prompt_snapshots.turn_id = notes.turn_id;
END;
"""
PRIMARY_KEY_WITH_TURN_ID = """
UPDATE prompt_snapshots SET turn_id = gen_random_uuid() WHERE turn_id IS NULL;
ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_parent_id_fkey, DROP CONSTRAINT prompt_snapshots_pkey,
  ADD PRIMARY KEY (id, turn_id);
"""
KEYED_BY_NAME = "ALTER TABLE slots DROP CONSTRAINT slots_pkey, ADD PRIMARY KEY (type, name)"
CHILD = "CREATE TABLE parent (LIKE {0}); ALTER TABLE {0} INHERIT parent"
HANGING_ON_NAME = """
CREATE ROLE reader_of_names;
ALTER TABLE slots ALTER name TYPE varchar(80), ADD loud text GENERATED ALWAYS AS (upper(name)) STORED;
CREATE VIEW names (shown) WITH (security_barrier = true) AS SELECT name FROM slots;
CREATE VIEW short_names AS SELECT shown FROM names WHERE length(shown) < 5;
GRANT SELECT ON names TO reader_of_names;
CREATE MATERIALIZED VIEW counted AS SELECT name, count(*) AS n FROM slots GROUP BY name;
CREATE INDEX counted_n ON counted (n);
CREATE POLICY named ON slots USING (name <> '');
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER named BEFORE UPDATE OF name ON slots FOR EACH ROW EXECUTE FUNCTION nothing();
"""

# The same for what the issue lists and the states above have not.
IN_THE_WAY |= {
    # columns
    "must_keep nullable, with NULLs": (
        altered("ALTER TABLE slots ADD must_keep boolean; UPDATE slots SET must_keep = true WHERE type = 'ux'"),
        "slots.must_keep: boolean,",
        "boolean NOT NULL DEFAULT false",
    ),
    "must_keep generated": (
        altered("ALTER TABLE slots ADD must_keep boolean GENERATED ALWAYS AS (coalesce(max_len > 9, false)) STORED"),
        "slots.must_keep: boolean DEFAULT generated",
        "boolean NOT NULL DEFAULT false",
    ),
    "must_keep integer, with its index": (
        altered(
            "ALTER TABLE slots ADD must_keep int NOT NULL DEFAULT 1;"
            "CREATE INDEX idx_slots_must_keep ON slots (must_keep)"
        ),
        "slots.must_keep: integer NOT NULL DEFAULT 1",
        "boolean NOT NULL DEFAULT false",
    ),
    "min_chars with default": (
        altered("ALTER TABLE slots ADD min_chars int DEFAULT 3"),
        "slots.min_chars: integer DEFAULT 3",
        "integer",
    ),
    "budget_report generated": (
        altered("ALTER TABLE prompt_snapshots ADD budget_report jsonb GENERATED ALWAYS AS (tp) STORED"),
        "prompt_snapshots.budget_report: jsonb GENERATED",
        "jsonb",
    ),
    "parent_id text, to a text key, without NULLs": (
        altered(
            "CREATE TABLE parents (id text PRIMARY KEY); INSERT INTO parents VALUES ('p');"
            "ALTER TABLE prompt_snapshots DROP parent_id, ADD parent_id text NOT NULL DEFAULT 'p'"
            " CONSTRAINT prompt_snapshots_parent_id_fkey REFERENCES parents (id);"
            "ALTER TABLE prompt_snapshots ALTER parent_id DROP DEFAULT;"
            "CREATE INDEX idx_prompt_snapshots_parent_id ON prompt_snapshots (parent_id)"
        ),
        "prompt_snapshots.parent_id: text NOT NULL",
        "uuid",
    ),
    "turn_id text, another's uuids": (
        by_hand("text", "md5('turn ' || i)::uuid::text"),
        "prompt_snapshots.turn_id: text",
        "bigint",
    ),
    "tp json": (
        altered("ALTER TABLE prompt_snapshots ALTER tp TYPE json, ALTER tp SET DEFAULT '{}'"),
        "prompt_snapshots.tp: json NOT NULL",
        "jsonb NOT NULL",
    ),
    "tp nullable": (
        altered("ALTER TABLE prompt_snapshots ALTER tp DROP NOT NULL"),
        "prompt_snapshots.tp: jsonb,",
        "jsonb NOT NULL",
    ),
    "created_at without time zone": (
        altered("SET TimeZone = 'UTC'; ALTER TABLE prompt_snapshots ALTER created_at TYPE timestamp(3)"),
        "prompt_snapshots.created_at: timestamp(3) without time zone NOT NULL",
        "timestamp with time zone NOT NULL",
    ),
    "game_id text, linked to nothing": (
        altered("ALTER TABLE prompt_snapshots DROP CONSTRAINT prompt_snapshots_game_id_fkey, ALTER game_id TYPE text"),
        "prompt_snapshots.game_id: text",
        "uuid",
    ),
    "slots.name varchar, with what hangs on it": (
        altered(HANGING_ON_NAME).replace("reader_of_names", "pg_monitor").replace("CREATE ROLE pg_monitor;", ""),
        "slots.name: character varying(80) NOT NULL",
        "text NOT NULL",
    ),
    "slots.max_len smallint and generated": (
        altered("ALTER TABLE slots DROP max_len, ADD max_len smallint GENERATED ALWAYS AS (7) STORED"),
        "slots.max_len: smallint",
        "integer",
    ),
    "slots.max_len text": (
        altered("ALTER TABLE slots ALTER max_len TYPE text; UPDATE slots SET max_len = 'long'"),
        "slots.max_len: text",
        "integer",
    ),
    "slots.id text": (
        altered(
            "ALTER TABLE slots ALTER id DROP DEFAULT, ALTER id TYPE text, ALTER id SET DEFAULT gen_random_uuid()::text"
        ),
        "slots.id: text NOT NULL",
        "uuid NOT NULL",
    ),
    "slots.description uuid": (
        altered("ALTER TABLE slots ALTER description TYPE uuid USING md5(description)::uuid"),
        "slots.description: uuid NOT NULL",
        "text NOT NULL",
    ),
    "templates.version nullable and bigint": (
        altered("ALTER TABLE templates ALTER version DROP NOT NULL, ALTER version TYPE bigint"),
        "templates.version: bigint,",
        "integer NOT NULL",
    ),
    "templates.status an enum": (altered(STATUS_ENUM), "templates.status: published NOT NULL", "text NOT NULL"),
    "templates.status an enum, compared": (
        altered(STATUS_ENUM + COMPARES_AN_ENUM),
        "templates.status: published NOT NULL",
        "text NOT NULL",
    ),
    "prompt_snapshots.source an enum, compared": (
        altered(SOURCE_ENUM)
        + "ALTER TABLE prompt_snapshots ADD CHECK (source <> 'manual' OR created_by IS NULL);"
        + 'CREATE DOMAIN "By hand" AS "By" CHECK (VALUE = \'manual\')',
        'prompt_snapshots.source: "By" NOT NULL',
        "text NOT NULL",
    ),
    "trims_count bigint": (
        altered(old_metrics() + "ALTER TABLE turn_metrics ALTER trims_count TYPE bigint"),
        "turn_metrics.trims_count: bigint NOT NULL DEFAULT 0",
        "integer NOT NULL DEFAULT 0",
    ),
    "trims_count text, with another default": (
        altered(old_metrics()) + "ALTER TABLE turn_metrics ALTER trims_count DROP DEFAULT, ALTER trims_count TYPE text,"
        " ALTER trims_count SET DEFAULT '4'",
        "turn_metrics.trims_count: text NOT NULL DEFAULT '4'::text",
        "integer NOT NULL DEFAULT 0",
    ),
    "slots.priority counts": (
        altered(
            "UPDATE slots SET priority = 1; ALTER TABLE slots ALTER priority DROP DEFAULT,"
            " ALTER priority SET NOT NULL, ALTER priority ADD GENERATED ALWAYS AS IDENTITY (START 9)"
        ),
        "slots.priority: integer NOT NULL",
        "integer",
    ),
    "slots.max_len counts in bigint": (
        altered("ALTER TABLE slots DROP max_len, ADD max_len bigint GENERATED BY DEFAULT AS IDENTITY"),
        "slots.max_len: bigint NOT NULL",
        "integer",
    ),
    "slots.name varchar, with a function on a view's rows": (
        altered("ALTER TABLE slots ALTER name TYPE varchar(80); CREATE VIEW names AS SELECT name FROM slots;")
        + "CREATE FUNCTION all_names() RETURNS SETOF names LANGUAGE sql AS 'SELECT * FROM names';"
        "REVOKE ALL ON FUNCTION all_names() FROM PUBLIC; GRANT EXECUTE ON FUNCTION all_names() TO pg_monitor;"
        "CREATE VIEW longer AS SELECT * FROM all_names() WHERE length(name) > 4",
        "slots.name: character varying(80) NOT NULL",
        "text NOT NULL",
    ),
    "turn_metrics without defaults of ours": (
        altered(
            old_metrics() + "ALTER TABLE turn_metrics ALTER tokens_after SET DEFAULT 0, ALTER model_ms SET NOT NULL,"
            " ALTER model_ms SET DEFAULT 1, ALTER rejects SET DEFAULT '[]'"
        )
        .replace("'{world.tone}' FROM", "'{world.tone}' FROM")
        .replace("ALTER model_ms SET NOT NULL,", ""),
        "turn_metrics.tokens_after: integer NOT NULL DEFAULT 0",
        "integer NOT NULL",
    ),
    "turn_metrics.trims_count generated": (
        altered(
            old_metrics()
            + "ALTER TABLE turn_metrics DROP trims_count, ADD trims_count int GENERATED ALWAYS AS (1) STORED NOT NULL"
        ),
        "turn_metrics.trims_count: integer NOT NULL DEFAULT generated",
        "integer NOT NULL DEFAULT 0",
    ),
    "worlds.version nullable": (
        altered("ALTER TABLE worlds ALTER version DROP NOT NULL"),
        "worlds.version: text,",
        "text NOT NULL",
    ),
    "worlds.id varchar, two keys lead to it": (
        altered("ALTER TABLE worlds ALTER id TYPE varchar(40)"),
        "worlds.id: character varying(40) NOT NULL",
        "text NOT NULL",
    ),
    "turns.id int, snapshots too": (
        by_hand(BIGINT.replace("bigint", "int")).replace(
            "bigserial PRIMARY KEY, game_id", "serial PRIMARY KEY, game_id"
        ),
        "turns.id: integer NOT NULL",
        "bigint NOT NULL",
    ),
    "entry_points without subtitle": (
        altered("ALTER TABLE entry_points DROP subtitle"),
        "entry_points stands without subtitle",
        "subtitle",
    ),
    "entry_points.search_text text": (
        altered("DROP INDEX idx_entry_points_search; ALTER TABLE entry_points ALTER search_text TYPE text"),
        "entry_points.search_text: text",
        "tsvector",
    ),
    # tables
    "a column of a child": (
        altered(CHILD.format("slots") + "; ALTER TABLE parent ALTER name TYPE varchar(80)"),
        "slots.name: character varying(80) NOT NULL",
        "text NOT NULL",
    ),
    "a child whose turn_id is uuid": (
        with_uuid() + CHILD.format("prompt_snapshots"),
        "prompt_snapshots.turn_id dependants: inherited from parent",
        "none",
    ),
    "a partition": (
        altered(
            "CREATE TABLE all_slots (LIKE slots) PARTITION BY LIST (type);"
            "ALTER TABLE all_slots ATTACH PARTITION slots DEFAULT"
        ),
        "slots: partition",
        "table",
    ),
    "slots partitioned": (
        CORE + CORE_ROWS + "CREATE TABLE slots (id uuid, type text) PARTITION BY LIST (type);"
        "CREATE TABLE slots_of_worlds PARTITION OF slots FOR VALUES IN ('world');"
        "INSERT INTO slots VALUES (NULL, 'world')",
        "slots: partitioned table",
        "table",
    ),
    "templates a materialized view": (
        altered("ALTER TABLE templates RENAME TO texts; CREATE MATERIALIZED VIEW templates AS SELECT * FROM texts")
        + ";ALTER INDEX idx_templates_type_slot RENAME TO a; ALTER INDEX idx_templates_status RENAME TO b;"
        "ALTER INDEX uk_templates_type_slot_version RENAME TO c",
        "templates: materialized view",
        "table",
    ),
    "turn_metrics a foreign table": (
        altered(
            "CREATE FOREIGN DATA WRAPPER away; CREATE SERVER away FOREIGN DATA WRAPPER away;"
            "CREATE FOREIGN TABLE turn_metrics (turn_id bigint) SERVER away"
        ),
        "turn_metrics: foreign table",
        "table",
    ),
    "turns a view": (
        altered("ALTER TABLE turns RENAME TO rounds; CREATE VIEW turns AS SELECT * FROM rounds"),
        "turns: view",
        "table",
    ),
    "slots a sequence": (CORE + "CREATE SEQUENCE slots", "slots: sequence", "table"),
    "slots an owned sequence": (
        CORE + "CREATE TABLE numbered (n int); CREATE SEQUENCE slots OWNED BY numbered.n",
        "slots: sequence",
        "table",
    ),
    "slots a type": (CORE + "CREATE TYPE slots AS (a int)", "slots: type", "table"),
    "worlds an index": ("CREATE TABLE other (id int); CREATE INDEX worlds ON other (id)", "worlds: index", "table"),
    "slots of another feature, another table leads to it": (
        CORE + CORE_ROWS + "CREATE TABLE slots (id int PRIMARY KEY, hour int); INSERT INTO slots VALUES (1, 9);"
        'CREATE TABLE "Bookings" (slot int CONSTRAINT "of Slot" REFERENCES slots (id));'
        'INSERT INTO "Bookings" VALUES (1)',
        "slots stands without type, name, description",
        "created_at",
    ),
    "two tables of other features": (
        CORE + CORE_ROWS + ANOTHER_FEATURE + "CREATE TABLE turn_metrics (id int PRIMARY KEY);"
        "CREATE SCHEMA attic; CREATE SCHEMA attic_2",
        "turn_metrics (turn_id): missing, promised: PRIMARY KEY",
        "snapshot_id",
    ),
    "another feature's, of another owner": (
        CORE + CORE_ROWS + ANOTHER_FEATURE + "REVOKE USAGE ON SCHEMA public FROM PUBLIC;"
        "ALTER TABLE prompt_snapshots OWNER TO pg_monitor",
        "prompt_snapshots stands without",
        "snapshot_id",
    ),
    "turns.id uuid, another table leads to it": (
        CORE_WITH_UUID_TURNS
        + CORE_ROWS
        + "CREATE TABLE notes (turn uuid REFERENCES turns (id)); INSERT INTO notes SELECT id FROM turns",
        "turns.id: uuid NOT NULL",
        "bigint NOT NULL",
    ),
    "turns.id uuid, with much else": (
        CORE_WITH_UUID_TURNS
        + CORE_ROWS
        + snapshots("uuid REFERENCES turns (id)")
        + snapshot_rows("NULL")
        + SLOTS_TEMPLATES
        + HANGING["view turn_view"]
        + "; CREATE TABLE turn_metrics (turn_id uuid PRIMARY KEY); CREATE SEQUENCE idx_games_world;"
        "ALTER TABLE slots ADD must_keep text",
        "turns.id: uuid NOT NULL",
        "bigint NOT NULL",
    ),
    # indexes
    "index with another predicate": (
        altered(
            "ALTER TABLE slots ADD must_keep boolean NOT NULL DEFAULT false;"
            "CREATE INDEX idx_slots_must_keep ON slots (must_keep) WHERE NOT must_keep"
        ),
        "slots index idx_slots_must_keep: btree (must_keep) WHERE (NOT must_keep)",
        "btree (must_keep) WHERE must_keep",
    ),
    "index invalid and on another column": (
        altered(
            "DROP INDEX idx_slots_type; CREATE INDEX idx_slots_type ON slots (name);"
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_slots_type'::regclass"
        ),
        "slots index idx_slots_type: btree (name) INVALID",
        "btree (type)",
    ),
    "index whose new name is taken": (
        altered(
            "DROP INDEX idx_slots_type; CREATE INDEX idx_slots_type ON slots (name);"
            "CREATE INDEX idx_slots_type_old ON slots (name); CREATE INDEX idx_slots_type_old_2 ON slots (name)"
        ),
        "slots index idx_slots_type: btree (name)",
        "btree (type)",
    ),
    "a table of an index's name, in capitals' company": (
        altered('CREATE VIEW "Idx" AS SELECT 1 AS a; CREATE VIEW idx_turn_metrics_created AS SELECT * FROM "Idx"'),
        "turn_metrics index idx_turn_metrics_created: not an index",
        "btree (created_at DESC)",
    ),
    "its unique index on turn_id": (
        with_uuid() + "DROP INDEX idx_prompt_snapshots_turn_id;"
        "CREATE UNIQUE INDEX idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id)",
        "prompt_snapshots index idx_prompt_snapshots_turn_id: UNIQUE btree (turn_id)",
        "btree (turn_id)",
    ),
    # foreign keys
    "turn_id deferrable": (
        by_hand("bigint REFERENCES turns (id) ON DELETE SET NULL DEFERRABLE"),
        "ON DELETE SET NULL DEFERRABLE",
        TURN_FOREIGN_KEY,
    ),
    "turn_id with two other keys": (
        by_hand("bigint REFERENCES turns (id) ON DELETE CASCADE")
        + "ALTER TABLE prompt_snapshots ADD CONSTRAINT again FOREIGN KEY (turn_id) REFERENCES turns (id)",
        "prompt_snapshots foreign key (turn_id): ",
        TURN_FOREIGN_KEY,
    ),
    "turn_id with cascade beside the promised key": (
        by_hand(BIGINT) + "ALTER TABLE prompt_snapshots"
        " ADD CONSTRAINT other FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE CASCADE",
        "REFERENCES turns(id) ON DELETE CASCADE",
        TURN_FOREIGN_KEY,
    ),
    "turn_metrics to another table beside the promised key": (
        "CREATE TABLE rounds (id bigint PRIMARY KEY); INSERT INTO rounds SELECT generate_series(1, 9);"
        + altered(old_metrics())
        + "ALTER TABLE turn_metrics ADD CONSTRAINT a_round FOREIGN KEY (turn_id) REFERENCES rounds (id)",
        "REFERENCES rounds(id)",
        "ON DELETE CASCADE",
    ),
    "the name of turn_id's key is taken": (
        by_hand("bigint")
        + "ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_turn_id_fkey CHECK (turn_id > 0)",
        "prompt_snapshots_turn_id_fkey is CHECK ((turn_id > 0))",
        TURN_FOREIGN_KEY,
    ),
    "the name of turn_metrics' key is taken": (
        altered(old_metrics("PRIMARY KEY"))
        + "ALTER TABLE turn_metrics ADD CONSTRAINT turn_metrics_turn_id_fkey UNIQUE (turn_id)",
        "turn_metrics_turn_id_fkey is UNIQUE (turn_id)",
        "ON DELETE CASCADE",
    ),
    "parent_id to another table": (
        altered(
            "CREATE TABLE parents (id uuid PRIMARY KEY); ALTER TABLE prompt_snapshots DROP parent_id,"
            " ADD parent_id uuid REFERENCES parents (id)"
        ),
        "REFERENCES parents(id)",
        "REFERENCES prompt_snapshots(id) ON DELETE SET NULL",
    ),
    # keys
    "slots without its key, rows share it": (
        altered(
            "ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name;"
            "INSERT INTO slots (type, name, description) VALUES ('ux', 'hint', 'another')"
        ),
        "slots (type, name): missing",
        "UNIQUE",
    ),
    "the name of slots' key is taken": (
        altered(
            "ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name; CREATE INDEX uk_slots_type_name ON slots (name)"
        ),
        "slots (type, name): missing",
        "UNIQUE",
    ),
    "a key deferrable": (
        altered(
            "ALTER TABLE templates DROP CONSTRAINT uk_templates_type_slot_version,"
            " ADD CONSTRAINT uk_templates_type_slot_version UNIQUE (type, slot, version) DEFERRABLE"
        ),
        "templates (type, slot, version): missing",
        "UNIQUE",
    ),
    "turn_metrics with another primary key": (
        altered(old_metrics("NOT NULL REFERENCES turns (id) ON DELETE CASCADE"))
        + "ALTER TABLE turn_metrics ADD PRIMARY KEY (story_id, turn_id)",
        "turn_metrics (turn_id): missing",
        "PRIMARY KEY",
    ),
    "slots keyed by type and name": (
        altered(KEYED_BY_NAME + ", DROP CONSTRAINT uk_slots_type_name"),
        "slots (id): missing",
        "PRIMARY KEY",
    ),
    "slots keyed by type and name, twice": (altered(KEYED_BY_NAME), "slots (id): missing", "PRIMARY KEY"),
    "turn_metrics with a unique key": (
        altered(old_metrics("NOT NULL UNIQUE REFERENCES turns (id) ON DELETE CASCADE")),
        "turn_metrics (turn_id): UNIQUE",
        "PRIMARY KEY",
    ),
    "entry_points without its slug's key": (
        altered("ALTER TABLE entry_points DROP CONSTRAINT entry_points_slug_key"),
        "entry_points (slug): missing",
        "UNIQUE",
    ),
    "the name of a key to be made is taken": (
        CORE + "CREATE TABLE uk_slots_type_name (a int); CREATE INDEX uk_prompt_snapshots_snapshot_id ON turns (role)",
        "slots (type, name): none, and the name uk_slots_type_name is taken by something that is no index",
        "UNIQUE",
    ),
    "the name of turns' key is taken": (
        altered("DROP INDEX idx_turns_game_idx; CREATE INDEX idx_turns_game_idx ON turns (idx)"),
        "turns (game_id, idx): none, and the name idx_turns_game_idx is taken by an index on turns",
        "UNIQUE",
    ),
    # the trigger and its function
    "a constraint trigger": (
        altered(
            "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
            "CREATE CONSTRAINT TRIGGER trigger_slots_critical_defaults AFTER INSERT ON slots"
            " FOR EACH ROW EXECUTE FUNCTION nothing()"
        ),
        "slots trigger trigger_slots_critical_defaults: ",
        "AFTER INSERT ON slots",
    ),
    "a function that returns a number": (
        altered("CREATE FUNCTION set_critical_slot_defaults() RETURNS int LANGUAGE sql AS 'SELECT 1'"),
        "slots function set_critical_slot_defaults(): integer",
        "SECURITY DEFINER",
    ),
    "a procedure": (
        altered("CREATE PROCEDURE set_critical_slot_defaults() LANGUAGE sql AS 'SELECT 1'"),
        "slots function set_critical_slot_defaults(): ",
        "SECURITY DEFINER",
    ),
    # several at once, and in two schemas
    "much at once": (
        by_hand("text", "i::text")
        + old_metrics()
        + "; ALTER TABLE slots ADD must_keep text, ADD min_chars bigint, DROP CONSTRAINT uk_slots_type_name;"
        "ALTER TABLE prompt_snapshots DROP parent_id, ADD parent_id text, ADD budget_report json, ALTER tp TYPE json;"
        "ALTER TABLE turn_metrics ALTER trims_count DROP NOT NULL; CREATE SEQUENCE idx_games_world;"
        "ALTER TABLE turn_metrics ALTER tokens_before TYPE bigint",
        "slots.must_keep: text",
        "boolean NOT NULL",
    ),
    "publication without columns": (
        with_uuid() + "CREATE PUBLICATION everything FOR TABLE prompt_snapshots, turns",
        "publication everything: its subscribers lack the kept column",
        "none",
    ),
    "a trigger whose function mentions turn_id": (
        with_uuid()
        + """CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN RAISE LOG ''%'', NEW.turn_id; RETURN NEW; END';
        CREATE TRIGGER noted BEFORE UPDATE ON prompt_snapshots FOR EACH ROW EXECUTE FUNCTION noted()""",
        "trigger noted, whose function mentions turn_id",
        "none",
    ),
    "a function on the rows of a view on turn_id": (
        with_uuid() + HANGING["view turn_view"] + "; CREATE FUNCTION recent() RETURNS SETOF turn_view LANGUAGE sql"
        " AS 'SELECT * FROM turn_view'; CREATE VIEW above AS SELECT turn_id FROM recent();"
        "CREATE FUNCTION among(turn_view[]) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "rule _RETURN on view turn_view",
        "none",
    ),
    "an index of a promised name on turn_id": (
        with_uuid() + "DROP INDEX idx_prompt_snapshots_game_id;"
        "CREATE INDEX idx_prompt_snapshots_game_id ON prompt_snapshots (game_id, turn_id)",
        "prompt_snapshots index idx_prompt_snapshots_game_id: btree (game_id, turn_id)",
        "btree (game_id)",
    ),
    "a foreign key of the promised name on turn_id": (
        with_uuid() + HANGING["constraint turn_elsewhere"].replace("turn_elsewhere", "prompt_snapshots_turn_id_fkey"),
        "constraint prompt_snapshots_turn_id_fkey on table prompt_snapshots",
        "none",
    ),
    "the primary key holds turn_id": (
        with_uuid() + PRIMARY_KEY_WITH_TURN_ID + HANGING["view turn_view"],
        "constraint prompt_snapshots_pkey on table prompt_snapshots",
        "none",
    ),
    "the primary key holds turn_id, nothing else hangs on it": (
        with_uuid() + PRIMARY_KEY_WITH_TURN_ID,
        "constraint prompt_snapshots_pkey on table prompt_snapshots",
        "none",
    ),
    "much of another table's on turn_id": (with_uuid() + NOTES, "policy seen on table notes", "none"),
    "a view on a view on turn_id": (
        with_uuid() + HANGING["view turn_view"] + "; CREATE VIEW above AS SELECT turn_id FROM turn_view;"
        "CREATE MATERIALIZED VIEW high_above AS SELECT turn_id FROM above;"
        "CREATE INDEX on_high ON high_above (turn_id)",
        "rule _RETURN on view turn_view",
        "none",
    ),
}

THEIR_FUNCTION = """
CREATE TABLE books (t text);
CREATE FUNCTION update_entry_points_search_text() RETURNS trigger LANGUAGE plpgsql AS
  'BEGIN NEW.t := ''mine''; RETURN NEW; END';
CREATE TRIGGER x BEFORE INSERT ON books FOR EACH ROW EXECUTE FUNCTION update_entry_points_search_text();
"""

# names of ours that something else bears than a relation
IN_THE_WAY |= {
    "turn_metrics an enum": (altered("CREATE TYPE turn_metrics AS ENUM ('a')"), "turn_metrics: type", "table"),
    "slots a domain": (CORE + "CREATE DOMAIN slots AS text; CREATE TABLE machines (s slots)", "slots: type", "table"),
    "two tables' names types": (
        "CREATE TYPE worlds AS ENUM ('a'); CREATE TYPE prompt_snapshots AS RANGE (subtype = int)",
        "worlds: type",
        "table",
    ),
    "the function of entry_points is another table's": (
        THEIR_FUNCTION,
        "entry_points function update_entry_points_search_text(): trigger, source",
        "trigger, source",
    ),
    "the function of entry_points returns a number": (
        "CREATE FUNCTION update_entry_points_search_text() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "entry_points function update_entry_points_search_text(): integer",
        "trigger, source",
    ),
}

if COLUMNS:  # of a publication: new in PostgreSQL 15
    IN_THE_WAY |= {
        "publication with a condition": (
            with_uuid() + "CREATE PUBLICATION few FOR TABLE prompt_snapshots (id, turn_id) WHERE (turn_id IS NOT NULL)",
            "publication",
            "none",
        ),
    }

NOT_VALID = "ALTER TABLE {0} ADD CONSTRAINT nn NOT NULL {1} NOT VALID"

if MAJOR >= 18:  # a NOT NULL that is NOT VALID: the rows that stood before it may have none
    IN_THE_WAY |= {
        "must_keep not valid, with NULLs": (
            altered("ALTER TABLE slots ADD must_keep boolean DEFAULT false; UPDATE slots SET must_keep = NULL;")
            + NOT_VALID.format("slots", "must_keep"),
            "slots.must_keep: boolean NOT NULL NOT VALID DEFAULT false",
            "boolean NOT NULL DEFAULT false",
        ),
        "tp not valid": (
            altered("ALTER TABLE prompt_snapshots ALTER tp DROP NOT NULL;")
            + NOT_VALID.format("prompt_snapshots", "tp"),
            "prompt_snapshots.tp: jsonb NOT NULL NOT VALID",
            "jsonb NOT NULL",
        ),
        "slots.id not valid, and no primary key": (
            altered("ALTER TABLE slots DROP CONSTRAINT slots_pkey, ALTER id DROP NOT NULL;")
            + NOT_VALID.format("slots", "id"),
            "slots.id: uuid NOT NULL NOT VALID",
            "uuid NOT NULL",
        ),
        "turns.id not valid, and no primary key": (
            altered("ALTER TABLE turns DROP CONSTRAINT turns_pkey CASCADE, ALTER id DROP NOT NULL;")
            + NOT_VALID.format("turns", "id"),
            "turns.id: bigint NOT NULL NOT VALID",
            "bigint NOT NULL",
        ),
        "turn_id not valid": (
            by_hand(BIGINT) + NOT_VALID.format("prompt_snapshots", "turn_id"),
            "prompt_snapshots.turn_id: bigint NOT NULL NOT VALID",
            "bigint",
        ),
    }

# What the rows refuse, the printed SELECT lists: what its reader does then.
MENDED_ROWS = {
    "must_keep not valid, with NULLs": "UPDATE public.slots SET must_keep = false WHERE must_keep IS NULL",
    "must_keep nullable, with NULLs": "UPDATE public.slots SET must_keep = false WHERE must_keep IS NULL",
    "slots without its key, rows share it": "UPDATE public.slots SET name = 'other hint' WHERE description = 'another'",
}


def printed(done: Run) -> list[str]:
    """Return the commands that a run printed below what is in the way, as they stand there."""
    found = re.search(r"^error: .*?\n((?:  .*\n)+?)  what to do: ", done.err, re.M)
    assert found, done
    return [line.removeprefix("      ") for line in found[1].splitlines() if line.startswith("      ")]


def follow(db: Db, folder: Path, commands: list[str]) -> None:
    """Run the commands: SQL with psql, tasks on a terminal."""
    script = folder / "commands.sql"
    script.write_text("\n".join(line for line in commands if not line.startswith("invoke ")))
    done = db.psql("-f", str(script))
    assert done.code == 0, f"{done}\n{script.read_text()}"
    for line in commands:
        if line.startswith("invoke "):
            done = on_terminal(db, *line.split()[1:], answer="y\n")
            assert done.code == 0, done


def gone(before: Contents, after: Contents) -> list[tuple[str, object]]:
    """Return the rows whose values are no longer together in any row of any table."""

    def values(row: dict[str, object]) -> set[str]:
        texts = (value if isinstance(value, str) else json.dumps(value) for value in row.values())
        return {re.sub(r"\+00:00$", "", text) for text in texts} - {"null"}

    standing = [values(row) for rows in after.values() for row in rows]
    return [
        (table, row)
        for table, rows in before.items()
        for row in rows
        if not any(values(row) <= other for other in standing)
    ]


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_is_in_the_way_is_named_and_the_printed_commands_lead_on(db: Db, tmp_path: Path, name: str) -> None:
    state, stands, promised = IN_THE_WAY[name]
    db.execute(state)
    before = db.dump(data=True)
    done = db.invoke("setup")
    assert done.code == 6, done
    assert stands in done.err
    assert promised in done.err
    assert db.dump(data=True) == before
    assert db.rows("SELECT FROM pg_namespace WHERE nspname = 'budget_engine'") == []

    commands = printed(done)
    if name in MENDED_ROWS:
        (listing,) = (line for line in commands if line.startswith("SELECT "))
        assert db.rows(listing) != []
        db.execute(MENDED_ROWS[name])
        assert db.rows(listing) == []
    rows = contents(db)
    follow(db, tmp_path, commands)
    assert gone(rows, contents(db)) == []
    done = db.invoke("setup")
    assert done.code == 0, f"{done}\n{commands}"
    assert gone(rows, contents(db)) == []
    assert db.differing() == {}


RETYPED = {
    "templates.version": ("ALTER TABLE templates ALTER version TYPE bigint", "1"),
    "templates.status": (STATUS_ENUM, "draft"),
    "prompt_snapshots.source": (SOURCE_ENUM, "auto"),
    "games.turn_count": ("ALTER TABLE games ALTER turn_count TYPE bigint", "0"),
    "worlds.doc": ("ALTER TABLE worlds ALTER doc TYPE text", "{}"),
    "slots.id": (
        "ALTER TABLE slots ALTER id DROP DEFAULT, ALTER id TYPE text, ALTER id SET DEFAULT md5('a')::uuid::text",
        "0cc175b9-c0f1-b6a8-31c3-99e269772661",
    ),
}


@pytest.mark.parametrize("name", RETYPED)
def test_a_retyped_column_keeps_its_default(db: Db, tmp_path: Path, name: str) -> None:
    change, default = RETYPED[name]
    db.execute(altered(change))
    follow(db, tmp_path, printed(db.invoke("setup")))
    assert db.invoke("setup").code == 0
    table, _, column = name.partition(".")
    expression = db.value(
        "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum"
        f" WHERE adrelid = '{table}'::regclass AND attname = '{column}'"
    )
    assert db.value(f"SELECT ({expression})::text") == default


def test_what_compared_an_enum_compares_texts(db: Db, tmp_path: Path) -> None:
    db.execute(altered(STATUS_ENUM + COMPARES_AN_ENUM))
    follow(db, tmp_path, printed(db.invoke("setup")))
    db.execute("DROP TYPE published")  # nothing clings to it
    assert db.rows("SELECT status FROM live()") == [("published",)]
    with pytest.raises(psycopg.errors.CheckViolation):
        db.execute("INSERT INTO templates (type, slot, body, status) VALUES ('ux', 'hint', '', 'published')")


def test_what_a_primary_key_kept_unique_stays_so(db: Db, tmp_path: Path) -> None:
    db.execute(altered(KEYED_BY_NAME + ", DROP CONSTRAINT uk_slots_type_name"))
    again = (
        "INSERT INTO slots (type, name, description) VALUES ('ux', 'hint', 'again') ON CONFLICT (type, name) DO NOTHING"
    )
    commands = [command for command in printed(db.invoke("setup")) if not command.startswith("--")]
    for command in commands:
        follow(db, tmp_path, [command])
        db.execute(again)
    assert db.invoke("setup").code == 0
    assert db.value("SELECT count(*) FROM slots WHERE name = 'hint'") == 1


@pytest.mark.parametrize("name", ["its unique index on turn_id", "much of another table's on turn_id"])
def test_a_schema_whose_name_has_a_blank(db: Db, tmp_path: Path, name: str) -> None:
    db.execute('CREATE SCHEMA "My App"; SET search_path = "My App";' + IN_THE_WAY[name][0])
    db.execute(f'ALTER DATABASE {db.name} SET search_path = "My App"')
    commands = printed(db.invoke("setup"))
    follow(db, tmp_path, commands)
    assert db.invoke("setup").code == 0
    follow(db, tmp_path, uncommented(commands))
    assert db.invoke("verify").code == 0


def test_a_foreign_key_beside_the_promised_one_is_seen_wherever_it_leads(db: Db) -> None:
    """Before or behind the promised one in the alphabet."""
    assert db.invoke("setup").code == 0
    for table in ("ages", "zones"):
        db.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY)")
        db.execute(f"ALTER TABLE prompt_snapshots ADD CONSTRAINT beside FOREIGN KEY (turn_id) REFERENCES {table} (id)")
        assert db.invoke("verify").code == 6
        db.execute("ALTER TABLE prompt_snapshots DROP CONSTRAINT beside")


def test_of_two_foreign_keys_the_promised_one_stays(db: Db) -> None:
    """Where it stands, and where the other one leads to a table of the same name."""
    other = "ALTER TABLE prompt_snapshots ADD CONSTRAINT {} FOREIGN KEY (turn_id) REFERENCES {} (id)"
    db.execute(by_hand(BIGINT) + "CREATE SCHEMA copy; CREATE TABLE copy.turns (id bigint PRIMARY KEY);")
    db.execute("INSERT INTO copy.turns SELECT id FROM turns; " + other.format("elsewhere", "copy.turns"))
    db.execute(other.format("again", "turns") + " ON DELETE SET NULL NOT VALID")
    drop, undo = printed(db.invoke("setup"))
    assert drop == "ALTER TABLE public.prompt_snapshots DROP CONSTRAINT elsewhere;"
    assert undo.startswith("-- to undo it: ALTER TABLE public.prompt_snapshots ADD CONSTRAINT elsewhere FOREIGN KEY")


@pytest.mark.parametrize("stem", ["20250130000000_core_schema", "20250130000002_recreate_core_schema"])
def test_a_function_that_others_use_stays_as_it_is(db: Db, tmp_path: Path, stem: str) -> None:
    db.execute(THEIR_FUNCTION)
    done = db.psql("-v", "VERBOSITY=verbose", "-f", str(MIGRATIONS / f"{stem}.sql"))
    assert (done.code, "TB002" in done.err) == (3, True), done
    follow(db, tmp_path, printed(db.invoke("setup")))
    db.migrate(stem)
    db.execute("INSERT INTO books VALUES ('x')")
    assert db.rows("TABLE books") == [("mine",)]


def test_our_own_function_of_a_table_that_is_gone_is_used_again(db: Db) -> None:
    assert db.invoke("setup").code == 0
    db.execute("DROP TABLE entry_points CASCADE")
    done = db.invoke("setup")
    assert (done.code, db.value("SELECT count(*) FROM pg_proc WHERE proname LIKE 'update_entry%'")) == (0, 1), done


def uncommented(commands: list[str]) -> list[str]:
    """Return what the comments say is to be run after the fix."""
    _, *after = commands[next(n for n, line in enumerate(commands) if line.startswith("-- after invoke fix")) :]
    return [line.removeprefix("-- ") for line in after if line.startswith("-- ")]


@pytest.mark.parametrize("name", [name for name in IN_THE_WAY if "on turn_id" in name or "publication" in name])
def test_what_hung_on_a_uuid_turn_id_comes_back_on_the_kept_values(db: Db, tmp_path: Path, name: str) -> None:
    state, *_ = IN_THE_WAY[name]
    db.execute(state)
    commands = printed(db.invoke("setup"))
    follow(db, tmp_path, commands)
    assert db.invoke("setup").code == 0
    assert hanging(db) == []
    follow(db, tmp_path, uncommented(commands))
    assert hanging(db) != []
    assert db.invoke("verify").code == 0


def test_only_the_column_of_that_table_is_meant(db: Db, tmp_path: Path) -> None:
    """Not another table's of the same name, and no text."""
    db.execute(with_uuid() + NOTES)
    views = ("noted", "unaliased", "keys")
    before = [db.rows(f"SELECT to_jsonb(v) FROM {view} AS v ORDER BY 1") for view in views]
    commands = printed(db.invoke("setup"))
    follow(db, tmp_path, commands)
    assert db.invoke("setup").code == 0
    follow(db, tmp_path, uncommented(commands))
    assert [db.rows(f"SELECT to_jsonb(v) FROM {view} AS v ORDER BY 1") for view in views] == before
    rule = db.value("SELECT definition FROM pg_rules WHERE rulename = 'forget'")
    assert "INTO notes (turn_id, note)" in rule
    assert "(old.turn_id_uuid, 'turn_id'::text)" in rule


@pytest.mark.parametrize("of", ["ALL TABLES", *(["TABLES IN SCHEMA public"] if COLUMNS else [])])
def test_a_publication_of_more_than_the_table_is_told_of(db: Db, of: str) -> None:
    """It cannot leave the table out: nobody is asked to drop it."""
    db.execute(with_uuid() + f'CREATE SCHEMA other; CREATE PUBLICATION "All" FOR {of}')
    done = db.invoke("rehearse")
    assert "published by All: " in done.out, done
    done = db.invoke("setup")
    assert (done.code, "published by All: " in done.out) == (0, True), done
    assert db.value("SELECT count(*) FROM pg_publication") == 1


def hanging(db: Db) -> list[str]:
    """Return what depends on the kept column, besides its index."""
    found = db.rows("""
        SELECT pg_describe_object(classid, objid, objsubid) FROM pg_depend JOIN pg_attribute
          ON refclassid = 'pg_class'::regclass AND refobjid = attrelid AND refobjsubid = attnum
        WHERE attrelid = 'prompt_snapshots'::regclass AND attname = 'turn_id_uuid'
        UNION SELECT 'publication' FROM pg_publication_rel WHERE prrelid = 'prompt_snapshots'::regclass""")
    return [what for (what,) in found if what != "index idx_prompt_snapshots_turn_id_uuid"]


def policies(db: Db) -> list[tuple[object, ...]]:
    return db.rows("SELECT polname, polcmd, pg_get_expr(polqual, polrelid) FROM pg_policy ORDER BY 1, 2")


@pytest.mark.parametrize(
    "change",
    [
        "ALTER POLICY slots_admin ON slots USING (true) WITH CHECK (true)",
        "DROP POLICY slots_admin ON slots; CREATE POLICY slots_admin ON slots AS RESTRICTIVE FOR DELETE"
        " TO anon, authenticated USING (name = 'it''s')",
        "ALTER POLICY turn_metrics_service_role ON turn_metrics TO anon",
    ],
)
def test_a_policy_that_says_something_else(db: Db, tmp_path: Path, change: str) -> None:
    supabase.install(db)
    supabase.add_profiles(db)
    assert db.invoke("setup").code == 0
    ours = policies(db)
    db.execute(change)
    others = policies(db)
    done = db.invoke("setup")
    assert done.code == 6, done
    assert policies(db) == others
    commands = printed(done)
    follow(db, tmp_path, commands)
    assert db.invoke("setup").code == 0
    assert policies(db) == ours
    (drop, undo) = commands
    follow(db, tmp_path, [drop, undo.removeprefix("-- to undo it: ")])
    assert policies(db) == others


def spread(db: Db, stranger: str, ours: str) -> None:
    """Make the tables in one schema, another feature's prompt_snapshots in the other, and look in both."""
    db.execute(f"CREATE SCHEMA first; CREATE SCHEMA second; SET search_path = {ours};" + by_hand())
    db.execute(f"SET search_path = {stranger};" + ANOTHER_FEATURE)
    db.execute(f"ALTER DATABASE {db.name} SET search_path = first, second")


def test_a_name_in_two_schemas_means_the_first(db: Db, tmp_path: Path) -> None:
    spread(db, "first", "second")
    before, dumped = contents(db), db.dump(data=True)
    done = db.invoke("setup")
    assert done.code == 6, done
    assert db.dump(data=True) == dumped
    commands = printed(done)
    assert "-- prompt_snapshots means second.prompt_snapshots then" in "\n".join(commands)
    assert not [line for line in commands if "second" in line and not line.startswith("--")]
    follow(db, tmp_path, commands)
    after = contents(db)
    assert after.pop("attic.prompt_snapshots") == before.pop("first.prompt_snapshots")
    assert after == before
    assert db.invoke("setup").code == 0


def test_a_name_in_the_second_schema_is_nobodys_affair(db: Db) -> None:
    spread(db, "second", "first")
    before = contents(db)
    assert db.invoke("setup").code == 0
    assert contents(db)["second.prompt_snapshots"] == before["second.prompt_snapshots"]


@pytest.mark.parametrize("path", ["public", "public,copy"])
def test_a_backup_copy_keeps_what_the_commands_change_in_the_first(db: Db, tmp_path: Path, path: str) -> None:
    change = (
        "ALTER TABLE slots ADD must_keep text, DROP CONSTRAINT uk_slots_type_name; DROP INDEX idx_slots_type;"
        "CREATE INDEX idx_slots_type ON slots (name); ALTER TABLE prompt_snapshots ALTER tp TYPE json"
    )
    db.execute("CREATE SCHEMA copy; SET search_path = copy;" + altered(change))
    db.execute(altered(change))
    db.execute(f"ALTER DATABASE {db.name} SET search_path = {path}")
    copied = definitions(db)
    before = contents(db)
    follow(db, tmp_path, printed(db.invoke("setup")))
    assert db.invoke("setup").code == 0
    assert definitions(db) == copied
    after = contents(db)
    assert {table: after[table] for table in before if "copy." in table} == {
        table: rows for table, rows in before.items() if "copy." in table
    }


def definitions(db: Db) -> list[tuple[object, ...]]:
    """Return all columns and indexes of the copy."""
    return db.rows("""
        SELECT attrelid::regclass::text, attname, atttypid::regtype::text, attnum
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        WHERE relnamespace = 'copy'::regnamespace ORDER BY 1, 4""")


def test_whoever_reached_a_table_reaches_it_in_the_attic(db: Db, tmp_path: Path) -> None:
    """Its foreign keys, too: they are checked with the rights of its owner."""
    db.execute(
        CORE + CORE_ROWS + "CREATE TABLE turn_metrics (game uuid PRIMARY KEY REFERENCES games (id) ON DELETE CASCADE);"
        "INSERT INTO turn_metrics SELECT id FROM games; REVOKE USAGE ON SCHEMA public FROM PUBLIC;"
        "ALTER TABLE turn_metrics OWNER TO pg_monitor; GRANT DELETE ON games TO pg_monitor"
    )
    follow(db, tmp_path, printed(db.invoke("setup")))
    db.execute("DELETE FROM turns; DELETE FROM games")
    assert db.rows("TABLE attic.turn_metrics") == []


def test_verify_has_the_commands_too_and_a_task_alone_those_of_its_own(db: Db) -> None:
    db.execute(altered("ALTER TABLE slots ADD must_keep text; ALTER TABLE prompt_snapshots ADD budget_report json"))
    for words, expected in {"verify": 2, "setup": 2, "slots-flags": 1, "budget-report": 1}.items():
        done = db.invoke(words)
        assert done.code == 6, done
        assert len([line for line in printed(done) if " RENAME COLUMN " in line]) == expected


def test_what_the_recreation_meets_is_resolved_by_its_option(db: Db, tmp_path: Path) -> None:
    db.execute(CORE_WITH_UUID_TURNS + CORE_ROWS + "CREATE TABLE notes (turn uuid REFERENCES turns (id))")
    done = db.invoke("prereqs", "--recreate", "--yes")
    assert (done.code, printed(done)) == (6, ["invoke prereqs --recreate --with-dependants"]), done
    follow(db, tmp_path, printed(done))
    assert db.invoke("setup").code == 0


def test_while_a_definition_cannot_be_read_the_obstacles_are_named_all_the_same(db: Db) -> None:
    db.execute(altered(HANGING_ON_NAME).replace("reader_of_names", "pg_monitor").replace("CREATE ROLE pg_monitor;", ""))
    with db.connect(autocommit=False) as holder:
        holder.execute("ALTER VIEW names RESET (security_barrier)")  # LOCK TABLE would lock slots, too
        done = db.invoke("verify", env={"LOCK_TIMEOUT": "200ms"})
    assert done.code == 6, done
    assert "slots.name: character varying(80) NOT NULL" in done.err


def sample(all_of: list[list[Breakage]]) -> list[list[Breakage]]:
    """Draw a sample of these batches (FAULT_POINTS of them; FAULT_SEED repeats it)."""
    return random.Random(SEED).sample(all_of, min(int(os.environ.get("FAULT_POINTS", "2")), len(all_of)))


@pytest.mark.parametrize("kind", ["plain", "supabase"])
def test_whatever_no_step_mends_the_printed_commands_do(db: Db, tmp_path: Path, kind: str) -> None:
    """Every breakage of every item that a verification knows; what cannot stand beside the others is left out."""
    if kind == "supabase":
        supabase.install(db)
        supabase.add_profiles(db)
    assert db.invoke("setup").code == 0
    with verifying(db) as (_, look):
        blocking = [broken for broken in breakages(promised(look())) if broken.differs and not broken.mended]
    for batch in sample(batches(blocking)):
        with copy(db) as copied:
            stands = [broken.name for broken in batch if does(copied, broken.sql)]
            done = copied.invoke("setup")
            assert done.code == 6, f"{stands} {SEED=}\n{done}"
            follow(copied, tmp_path, printed(done))
            done = copied.invoke("setup")
            assert (done.code, copied.differing()) == (0, {}), f"{stands} {SEED=}\n{done}"


def does(db: Db, statement: str) -> bool:
    """Run it, if it can be."""
    try:
        db.execute(statement)
    except psycopg.Error:
        return False
    return True
