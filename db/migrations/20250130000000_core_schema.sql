-- 20250130000000_core_schema: worlds, rulesets, entry_points, prompt_segments, games and turns, each only where it is missing.
--   task   prereqs
--   locks  SHARE ROW EXCLUSIVE for an instant on a table that a new one points to; a table that exists stays as it is
--   again  changes nothing
--   psql "$DATABASE_URL" -f db/migrations/20250130000000_core_schema.sql

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

-- Noted for this transaction: which tables are new, in the schema of those that exist. They get comments, policies and grants.
DO $$ DECLARE
  names CONSTANT text[] := '{worlds,rulesets,entry_points,prompt_segments,games,turns}';
BEGIN
  PERFORM pg_catalog.set_config('budget_engine.new', ARRAY(SELECT name FROM pg_catalog.unnest(names) AS name WHERE to_regclass(name) IS NULL)::text, true);
  PERFORM pg_catalog.set_config('search_path', pg_catalog.format('%I, %s', nspname, current_setting('search_path')), true)
     FROM pg_catalog.unnest(names) AS name JOIN pg_class ON pg_class.oid = to_regclass(name)::oid JOIN pg_namespace AS n ON n.oid = relnamespace LIMIT 1;
END $$;

CREATE TABLE IF NOT EXISTS worlds (
  id          text        PRIMARY KEY,
  version     text        NOT NULL DEFAULT '1.0.0',
  status      text        NOT NULL DEFAULT 'active' CONSTRAINT worlds_status_check CHECK (status IN ('draft', 'active', 'archived')),
  doc         jsonb       NOT NULL DEFAULT '{}',
  created_at  timestamptz NOT NULL DEFAULT now(),
  updated_at  timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS rulesets (
  id          text        PRIMARY KEY,
  version     text        NOT NULL DEFAULT '1.0.0',
  status      text        NOT NULL DEFAULT 'active' CONSTRAINT rulesets_status_check CHECK (status IN ('draft', 'active', 'archived')),
  doc         jsonb       NOT NULL DEFAULT '{}',
  created_at  timestamptz NOT NULL DEFAULT now(),
  updated_at  timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS entry_points (
  id                text        PRIMARY KEY,
  slug              text        NOT NULL UNIQUE,
  type              text        NOT NULL CONSTRAINT entry_points_type_check CHECK (type IN ('adventure', 'scenario', 'sandbox', 'quest')),
  world_id          text        NOT NULL CONSTRAINT entry_points_world_id_fkey REFERENCES worlds (id) ON DELETE RESTRICT,
  ruleset_id        text        NOT NULL CONSTRAINT entry_points_ruleset_id_fkey REFERENCES rulesets (id) ON DELETE RESTRICT,
  title             text        NOT NULL,
  subtitle          text,
  description       text        NOT NULL,
  synopsis          text,
  status            text        NOT NULL DEFAULT 'draft'
                                CONSTRAINT entry_points_status_check CHECK (status IN ('draft', 'active', 'archived')),
  visibility        text        NOT NULL DEFAULT 'public'
                                CONSTRAINT entry_points_visibility_check CHECK (visibility IN ('public', 'unlisted', 'private')),
  content_rating    text        NOT NULL DEFAULT 'safe'
                                CONSTRAINT entry_points_content_rating_check CHECK (content_rating IN ('safe', 'mature', 'explicit')),
  tags              text[]      NOT NULL DEFAULT '{}',
  content           jsonb       NOT NULL DEFAULT '{}',
  i18n              jsonb       NOT NULL DEFAULT '{}',
  search_text       tsvector,
  sort_weight       int         NOT NULL DEFAULT 0,
  popularity_score  int         NOT NULL DEFAULT 0,
  created_at        timestamptz NOT NULL DEFAULT now(),
  updated_at        timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS prompt_segments (
  id          bigserial   PRIMARY KEY,
  scope       text        NOT NULL CONSTRAINT prompt_segments_scope_check CHECK (scope IN (
                            'core', 'ruleset', 'world', 'entry', 'entry_start', 'npc', 'game_state', 'player', 'rng', 'input')),
  ref_id      text,
  version     text        NOT NULL DEFAULT '1.0.0',
  active      boolean     NOT NULL DEFAULT true,
  content     text        NOT NULL,
  metadata    jsonb       NOT NULL DEFAULT '{}',
  created_at  timestamptz NOT NULL DEFAULT now(),
  updated_at  timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS games (
  id                uuid        DEFAULT gen_random_uuid() PRIMARY KEY,
  entry_point_id    text        NOT NULL CONSTRAINT games_entry_point_id_fkey REFERENCES entry_points (id) ON DELETE RESTRICT,
  entry_point_type  text        NOT NULL,
  world_id          text        NOT NULL CONSTRAINT games_world_id_fkey REFERENCES worlds (id) ON DELETE RESTRICT,
  ruleset_id        text        NOT NULL CONSTRAINT games_ruleset_id_fkey REFERENCES rulesets (id) ON DELETE RESTRICT,
  owner_user_id     uuid,
  state             jsonb       NOT NULL DEFAULT '{"hot":{},"warm":{},"cold":{}}',
  turn_count        int         NOT NULL DEFAULT 0,
  status            text        NOT NULL DEFAULT 'active' CONSTRAINT games_status_check CHECK (status IN ('active', 'ended', 'abandoned')),
  created_at        timestamptz NOT NULL DEFAULT now(),
  updated_at        timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS turns (
  id           bigserial   PRIMARY KEY,
  game_id      uuid        NOT NULL CONSTRAINT turns_game_id_fkey REFERENCES games (id) ON DELETE CASCADE,
  idx          int         NOT NULL,
  role         text        NOT NULL CONSTRAINT turns_role_check CHECK (role IN ('system', 'narrator', 'player')),
  prompt_meta  jsonb       NOT NULL DEFAULT '{}',
  content      jsonb       NOT NULL,
  costs        jsonb       NOT NULL DEFAULT '{}',
  created_at   timestamptz NOT NULL DEFAULT now()
);

DO $$ DECLARE
  new CONSTANT text[] := current_setting('budget_engine.new');
BEGIN
  IF 'worlds' = ANY (new) THEN COMMENT ON TABLE worlds IS 'Worlds in which adventures take place'; END IF;
  IF 'rulesets' = ANY (new) THEN COMMENT ON TABLE rulesets IS 'Rules that a game is played by'; END IF;
  IF 'prompt_segments' = ANY (new) THEN COMMENT ON TABLE prompt_segments IS 'Pieces of text that prompts are assembled from'; END IF;
  IF 'games' = ANY (new) THEN COMMENT ON TABLE games IS 'Games being played; state holds what the story needs to go on'; END IF;
  IF 'turns' = ANY (new) THEN COMMENT ON TABLE turns IS 'Turns of a game, numbered by idx within it'; END IF;
END $$;
DO $$ BEGIN
  IF 'entry_points' <> ALL (current_setting('budget_engine.new')::text[]) THEN RETURN; END IF;  -- another's function is not replaced:
  IF NOT EXISTS (SELECT FROM pg_proc JOIN pg_class ON relnamespace = pronamespace AND relowner = proowner
                 WHERE pg_class.oid = 'entry_points'::regclass::oid AND proname = 'update_entry_points_search_text' AND pronargs = 0::int2) THEN
    CREATE FUNCTION update_entry_points_search_text() RETURNS trigger
      LANGUAGE plpgsql
      SET search_path = pg_catalog
    AS $function$
    BEGIN
      NEW.search_text :=
        setweight(to_tsvector('pg_catalog.english', coalesce(NEW.title, '')), 'A')
        || setweight(to_tsvector('pg_catalog.english', coalesce(NEW.synopsis, '')), 'B')
        || to_tsvector('pg_catalog.english', coalesce(NEW.description, ''))
        || to_tsvector('pg_catalog.english', array_to_string(coalesce(NEW.tags, '{}'), ' '));
      RETURN NEW;
    END
    $function$;
  END IF;
  CREATE TRIGGER trigger_update_entry_points_search_text
    BEFORE INSERT OR UPDATE OF title, synopsis, description, tags, search_text ON entry_points
    FOR EACH ROW EXECUTE FUNCTION update_entry_points_search_text();
  COMMENT ON TABLE entry_points IS 'Where players enter: adventures, scenarios, sandboxes and quests';
  COMMENT ON COLUMN entry_points.search_text IS 'Kept up to date by a trigger: title (weight A), synopsis (weight B), description and tags';
  COMMENT ON FUNCTION update_entry_points_search_text() IS 'Fills entry_points.search_text';
END $$;

-- Supabase (read from the catalogs: schema auth may be closed to us): what is new is for service_role alone.
DO $$ DECLARE
  new CONSTANT text[] := current_setting('budget_engine.new');
  created text;
BEGIN
  IF to_regrole('service_role') IS NULL OR to_regrole('authenticated') IS NULL
     OR NOT EXISTS (SELECT FROM pg_proc JOIN pg_namespace AS n ON n.oid = pronamespace WHERE nspname = 'auth' AND proname = 'uid' AND pronargs = 0::int2)
     OR NOT EXISTS (SELECT FROM pg_attribute JOIN pg_class AS c ON c.oid = attrelid JOIN pg_namespace AS n ON n.oid = relnamespace
                    WHERE nspname = 'auth' AND relname = 'users' AND attname = 'id' AND atttypid = 'uuid'::regtype::oid) THEN RETURN; END IF;
  FOREACH created IN ARRAY new LOOP
    EXECUTE pg_catalog.format('GRANT ALL ON %I TO service_role', created);
    IF created IN ('prompt_segments', 'turns') THEN
      EXECUTE pg_catalog.format('GRANT USAGE, SELECT ON SEQUENCE %s TO service_role', pg_catalog.pg_get_serial_sequence(created, 'id'));
    END IF;
  END LOOP;
  IF 'worlds' = ANY (new) THEN CREATE POLICY worlds_service_role ON worlds TO service_role USING (true) WITH CHECK (true); END IF;
  IF 'rulesets' = ANY (new) THEN CREATE POLICY rulesets_service_role ON rulesets TO service_role USING (true) WITH CHECK (true); END IF;
  IF 'entry_points' = ANY (new) THEN CREATE POLICY entry_points_service_role ON entry_points TO service_role USING (true) WITH CHECK (true); END IF;
  IF 'prompt_segments' = ANY (new) THEN CREATE POLICY prompt_segments_service_role ON prompt_segments TO service_role USING (true) WITH CHECK (true); END IF;
  IF 'games' = ANY (new) THEN CREATE POLICY games_service_role ON games TO service_role USING (true) WITH CHECK (true); END IF;
  IF 'turns' = ANY (new) THEN CREATE POLICY turns_service_role ON turns TO service_role USING (true) WITH CHECK (true); END IF;
END $$;
DO $$ DECLARE  -- and row-level security is on where the policy is
  ours CONSTANT oid[] := ARRAY(SELECT polrelid FROM pg_policy JOIN pg_class AS c ON c.oid = polrelid WHERE NOT relrowsecurity AND polname IN (
    'worlds_service_role', 'rulesets_service_role', 'entry_points_service_role', 'prompt_segments_service_role', 'games_service_role', 'turns_service_role'));
BEGIN
  IF 'worlds'::regclass::oid = ANY (ours) THEN ALTER TABLE worlds ENABLE ROW LEVEL SECURITY; END IF;
  IF 'rulesets'::regclass::oid = ANY (ours) THEN ALTER TABLE rulesets ENABLE ROW LEVEL SECURITY; END IF;
  IF 'entry_points'::regclass::oid = ANY (ours) THEN ALTER TABLE entry_points ENABLE ROW LEVEL SECURITY; END IF;
  IF 'prompt_segments'::regclass::oid = ANY (ours) THEN ALTER TABLE prompt_segments ENABLE ROW LEVEL SECURITY; END IF;
  IF 'games'::regclass::oid = ANY (ours) THEN ALTER TABLE games ENABLE ROW LEVEL SECURITY; END IF;
  IF 'turns'::regclass::oid = ANY (ours) THEN ALTER TABLE turns ENABLE ROW LEVEL SECURITY; END IF;
END $$;
\if :{?recreating} \q \endif
COMMIT;
-- Each alone, outside any transaction. A table that existed may lack the column: that index is left out, and the next one follows.
\set ON_ERROR_STOP off
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_entry_points_type ON entry_points (type);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_entry_points_world ON entry_points (world_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_entry_points_ruleset ON entry_points (ruleset_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_entry_points_status_vis ON entry_points (status, visibility);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_entry_points_tags ON entry_points USING gin (tags);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_entry_points_search ON entry_points USING gin (search_text);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_segments_scope ON prompt_segments (scope);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_segments_ref ON prompt_segments (ref_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_games_owner ON games (owner_user_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_games_entry_point ON games (entry_point_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_games_world ON games (world_id);
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_turns_game_idx ON turns (game_id, idx);
