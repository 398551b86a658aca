-- 20250213_prompt_snapshots: every prompt as it was sent.
--   task   prereqs
--   needs  games, turns (20250130000000_core_schema)
--   locks  SHARE ROW EXCLUSIVE for an instant on games and turns; Supabase: ACCESS EXCLUSIVE on prompt_snapshots
--   again  changes nothing
--   psql "$DATABASE_URL" -f db/migrations/20250213_prompt_snapshots.sql

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

DO $$ DECLARE
  snapshots CONSTANT oid := to_regclass('prompt_snapshots');
BEGIN
  IF snapshots IS NULL AND (to_regclass('games') IS NULL OR to_regclass('turns') IS NULL) THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001', MESSAGE = 'prompt_snapshots needs the tables games and turns, and one of them does not exist',
      HINT = 'Run db/migrations/20250130000000_core_schema.sql first (invoke prereqs). This step changed nothing.';
  ELSIF snapshots IS NOT NULL AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = snapshots AND attname = 'snapshot_id') THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002', MESSAGE = 'the table prompt_snapshots is another one: it has no column snapshot_id',
      HINT = 'Move it to another schema, then run db/migrations/20250213_prompt_snapshots.sql (invoke prereqs) again. This step changed nothing.';
  END IF;
  -- Noted for this transaction: whether the table is new. What comes with it is no affair of one that exists.
  PERFORM pg_catalog.set_config('budget_engine.new', (snapshots IS NULL)::text, true);
  PERFORM pg_catalog.set_config('search_path', pg_catalog.format('%I, %s', nspname, current_setting('search_path')), true)
     FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace WHERE pg_class.oid = snapshots;
END $$;

CREATE TABLE IF NOT EXISTS prompt_snapshots (
  id                      uuid        DEFAULT gen_random_uuid() PRIMARY KEY,
  snapshot_id             uuid        NOT NULL DEFAULT gen_random_uuid() CONSTRAINT uk_prompt_snapshots_snapshot_id UNIQUE,
  templates_version       text,
  pack_versions           jsonb       DEFAULT '{}',
  tp                      jsonb       NOT NULL,
  linearized_prompt_text  text        NOT NULL,
  awf_contract            text        NOT NULL DEFAULT 'awf.v1',
  source                  text        NOT NULL DEFAULT 'auto' CONSTRAINT prompt_snapshots_source_check CHECK (source IN ('auto', 'manual')),
  created_at              timestamptz NOT NULL DEFAULT now(),
  created_by              uuid,
  game_id                 uuid        CONSTRAINT prompt_snapshots_game_id_fkey REFERENCES games (id) ON DELETE SET NULL,
  turn_id                 bigint      CONSTRAINT prompt_snapshots_turn_id_fkey REFERENCES turns (id) ON DELETE SET NULL,
  parent_id               uuid        CONSTRAINT prompt_snapshots_parent_id_fkey REFERENCES prompt_snapshots (id) ON DELETE SET NULL
);
DO $$ BEGIN
  IF NOT current_setting('budget_engine.new')::boolean THEN RETURN; END IF;
  COMMENT ON TABLE prompt_snapshots IS 'Prompts as they were sent, after assembly and trimming';
  COMMENT ON COLUMN prompt_snapshots.snapshot_id IS 'The name that the application gives the snapshot';
  COMMENT ON COLUMN prompt_snapshots.tp IS 'The turn packet that the prompt was made from';
  COMMENT ON COLUMN prompt_snapshots.parent_id IS 'The snapshot that this one was derived from';
  IF EXISTS (SELECT FROM pg_attribute JOIN pg_class AS users ON users.oid = attrelid JOIN pg_namespace AS n ON n.oid = relnamespace
             WHERE nspname = 'auth' AND relname = 'users' AND attname = 'id' AND atttypid = 'uuid'::regtype::oid) THEN
    ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_created_by_fkey
      FOREIGN KEY (created_by) REFERENCES auth.users (id) ON DELETE SET NULL;
  END IF;
END $$;
-- One that exists may be older than parent_id (see 20250214_slots_templates, which may have run before).
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'prompt_snapshots'::regclass::oid AND attname = 'parent_id') THEN
    ALTER TABLE prompt_snapshots ADD COLUMN parent_id uuid CONSTRAINT prompt_snapshots_parent_id_fkey REFERENCES prompt_snapshots ON DELETE SET NULL;
    COMMENT ON COLUMN prompt_snapshots.parent_id IS 'The snapshot that this one was derived from';
  END IF;
END $$;

-- Supabase (read from the catalogs: schema auth may be closed to us): service_role, and who is an admin in profiles.
-- A table that has a policy of others keeps its policies as they are.
DO $$ DECLARE
  has CONSTANT name[] := ARRAY(SELECT polname FROM pg_policy WHERE polrelid = 'prompt_snapshots'::regclass::oid);
BEGIN
  IF to_regrole('service_role') IS NULL OR to_regrole('authenticated') IS NULL
     OR NOT EXISTS (SELECT FROM pg_proc JOIN pg_namespace AS n ON n.oid = pronamespace
                    WHERE nspname = 'auth' AND proname = 'uid' AND pronargs = 0::int2)
     OR NOT EXISTS (SELECT FROM pg_attribute JOIN pg_class AS c ON c.oid = attrelid JOIN pg_namespace AS n ON n.oid = relnamespace
                    WHERE nspname = 'auth' AND relname = 'users' AND attname = 'id' AND atttypid = 'uuid'::regtype::oid) THEN RETURN; END IF;
  ALTER TABLE prompt_snapshots ENABLE ROW LEVEL SECURITY;
  IF NOT has OPERATOR(pg_catalog.<@) '{prompt_snapshots_service_role,prompt_snapshots_admin_select,prompt_snapshots_admin_insert,
    prompt_snapshots_admin_update,"Service role can manage prompt_snapshots"}'::name[] THEN RETURN; END IF;
  IF 'prompt_snapshots_service_role' <> ALL (has) THEN
    CREATE POLICY prompt_snapshots_service_role ON prompt_snapshots TO service_role USING (true) WITH CHECK (true);
    GRANT SELECT, INSERT, UPDATE, DELETE ON prompt_snapshots TO service_role;
  END IF;
  IF 2 <> (SELECT pg_catalog.count(*) FROM pg_attribute WHERE attrelid = to_regclass('profiles')::oid
             AND (attname = 'role' OR attname = 'id' AND atttypid = 'uuid'::regtype::oid)) THEN RETURN; END IF;
  IF 'prompt_snapshots_admin_select' <> ALL (has) THEN
    CREATE POLICY prompt_snapshots_admin_select ON prompt_snapshots FOR SELECT TO authenticated
      USING (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'));
    GRANT SELECT ON prompt_snapshots TO authenticated;
  END IF;
  IF 'prompt_snapshots_admin_insert' <> ALL (has) THEN
    CREATE POLICY prompt_snapshots_admin_insert ON prompt_snapshots FOR INSERT TO authenticated
      WITH CHECK (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'));
    GRANT INSERT ON prompt_snapshots TO authenticated;
  END IF;
  IF 'prompt_snapshots_admin_update' <> ALL (has) THEN
    CREATE POLICY prompt_snapshots_admin_update ON prompt_snapshots FOR UPDATE TO authenticated
      USING (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'))
      WITH CHECK (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'));
    GRANT UPDATE ON prompt_snapshots TO authenticated;
  END IF;
END $$;
\if :{?recreating} \q \endif
COMMIT;

-- Each alone, outside any transaction.
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_snapshots_created_at ON prompt_snapshots (created_at DESC);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_snapshots_game_id ON prompt_snapshots (game_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_snapshots_source ON prompt_snapshots (source);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_snapshots_created_by ON prompt_snapshots (created_by);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_snapshots_parent_id ON prompt_snapshots (parent_id);
DO $$ DECLARE
  key name;
BEGIN
  FOR key IN SELECT conname FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
             WHERE conrelid = 'prompt_snapshots'::regclass::oid AND contype = 'f' AND attname = 'parent_id' AND NOT convalidated LOOP
    EXECUTE pg_catalog.format('ALTER TABLE prompt_snapshots VALIDATE CONSTRAINT %I', key);
  END LOOP;
END $$;
