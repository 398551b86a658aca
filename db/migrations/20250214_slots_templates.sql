-- 20250214_slots_templates: slots, templates, and prompt_snapshots.parent_id where that table exists already.
--   task   prereqs
--   before 20250213_prompt_snapshots             (by psql before or after it)
--   locks  ACCESS EXCLUSIVE for an instant on prompt_snapshots where parent_id is missing; Supabase: on slots and templates
--   again  changes nothing
--   psql "$DATABASE_URL" -f db/migrations/20250214_slots_templates.sql

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

DO $$ DECLARE
  new CONSTANT text[] := ARRAY(SELECT name FROM pg_catalog.unnest('{slots,templates}'::text[]) AS name WHERE to_regclass(name) IS NULL);
BEGIN
  IF EXISTS (SELECT FROM pg_class WHERE pg_class.oid IN (to_regclass('slots')::oid, to_regclass('templates')::oid)
               AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = 'type')) THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002', MESSAGE = 'the table slots or templates is another one: it has no column type',
      HINT = 'Move it to another schema, then run db/migrations/20250214_slots_templates.sql (invoke prereqs) again. This step changed nothing.';
  END IF;
  -- Noted for this transaction: which tables are new (in the schema of one that exists).
  PERFORM pg_catalog.set_config('budget_engine.new', new::text, true);
  PERFORM pg_catalog.set_config('search_path', pg_catalog.format('%I, %s', nspname, current_setting('search_path')), true)
     FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace WHERE pg_class.oid IN (to_regclass('slots')::oid, to_regclass('templates')::oid) LIMIT 1;
END $$;

CREATE TABLE IF NOT EXISTS slots (
  id           uuid        DEFAULT gen_random_uuid() PRIMARY KEY,
  type         text        NOT NULL CONSTRAINT slots_type_check CHECK (type IN ('world', 'ruleset', 'npc', 'scenario', 'module', 'ux')),
  name         text        NOT NULL,
  description  text        NOT NULL,
  max_len      int,
  priority     int         DEFAULT 0,
  created_at   timestamptz NOT NULL DEFAULT now(),
  updated_at   timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT uk_slots_type_name UNIQUE (type, name)
);
CREATE TABLE IF NOT EXISTS templates (
  id           uuid        DEFAULT gen_random_uuid() PRIMARY KEY,
  type         text        NOT NULL CONSTRAINT templates_type_check CHECK (type IN ('world', 'ruleset', 'npc', 'scenario', 'module', 'ux')),
  slot         text        NOT NULL,
  version      int         NOT NULL DEFAULT 1,
  body         text        NOT NULL,
  status       text        NOT NULL DEFAULT 'draft' CONSTRAINT templates_status_check CHECK (status IN ('draft', 'published')),
  created_at   timestamptz NOT NULL DEFAULT now(),
  created_by   uuid,
  CONSTRAINT uk_templates_type_slot_version UNIQUE (type, slot, version)
);
DO $$ BEGIN
  IF 'slots' = ANY (current_setting('budget_engine.new')::text[]) THEN
    COMMENT ON TABLE slots IS 'Named places in a prompt, filled from templates';
    COMMENT ON COLUMN slots.max_len IS 'Most characters the slot may take; NULL = no limit';
    COMMENT ON COLUMN slots.priority IS 'Slots of lower priority are trimmed first';
  END IF;
  IF 'templates' = ANY (current_setting('budget_engine.new')::text[]) THEN
    COMMENT ON TABLE templates IS 'Texts for slots, in versions';
    IF EXISTS (SELECT FROM pg_class AS users JOIN pg_namespace AS n ON n.oid = relnamespace JOIN pg_attribute ON attrelid = users.oid
               WHERE nspname = 'auth' AND relname = 'users' AND attname = 'id' AND atttypid = 'uuid'::regtype::oid) THEN
      ALTER TABLE templates ADD CONSTRAINT templates_created_by_fkey
        FOREIGN KEY (created_by) REFERENCES auth.users (id) ON DELETE SET NULL;
    END IF;
  END IF;
END $$;

-- A foreign key that comes with its column is valid at once: no row is read.
DO $$ DECLARE
  parent_id CONSTANT int2 := (SELECT attnum FROM pg_attribute WHERE attrelid = to_regclass('prompt_snapshots')::oid AND attname = 'parent_id');
BEGIN
  IF to_regclass('prompt_snapshots') IS NOT NULL AND parent_id IS NULL THEN
    ALTER TABLE prompt_snapshots ADD COLUMN parent_id uuid
      CONSTRAINT prompt_snapshots_parent_id_fkey REFERENCES prompt_snapshots (id) ON DELETE SET NULL;
    COMMENT ON COLUMN prompt_snapshots.parent_id IS 'The snapshot that this one was derived from';
  ELSIF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass('prompt_snapshots')::oid AND contype = 'f'
                      AND conkey[1] = parent_id AND conkey[2] IS NULL) AND parent_id IS NOT NULL THEN
    ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_parent_id_fkey
      FOREIGN KEY (parent_id) REFERENCES prompt_snapshots (id) ON DELETE SET NULL NOT VALID;
  END IF;
END $$;

-- Supabase (read from the catalogs: schema auth may be closed to us): service_role, and who is an admin in profiles.
-- A table that has a policy of others keeps its policies as they are.
DO $$ DECLARE
  admins CONSTANT boolean := 2 = (SELECT pg_catalog.count(*) FROM pg_attribute WHERE attrelid = to_regclass('profiles')::oid
                                    AND (attname = 'role' OR attname = 'id' AND atttypid = 'uuid'::regtype::oid));
  slots_has CONSTANT name[] := ARRAY(SELECT polname FROM pg_policy WHERE polrelid = 'slots'::regclass::oid);
  templates_has CONSTANT name[] := ARRAY(SELECT polname FROM pg_policy WHERE polrelid = 'templates'::regclass::oid);
BEGIN
  IF to_regrole('service_role') IS NULL OR to_regrole('authenticated') IS NULL
     OR NOT EXISTS (SELECT FROM pg_attribute JOIN pg_class AS c ON c.oid = attrelid JOIN pg_namespace AS n ON n.oid = relnamespace
                    WHERE nspname = 'auth' AND relname = 'users' AND attname = 'id' AND atttypid = 'uuid'::regtype::oid)
     OR NOT EXISTS (SELECT FROM pg_proc JOIN pg_namespace AS n ON n.oid = pronamespace
                    WHERE nspname = 'auth' AND proname = 'uid' AND pronargs = 0::int2) THEN RETURN; END IF;
  ALTER TABLE slots ENABLE ROW LEVEL SECURITY;
  ALTER TABLE templates ENABLE ROW LEVEL SECURITY;
  IF slots_has OPERATOR(pg_catalog.<@) '{slots_service_role,slots_admin,"Service role can manage slots"}'::name[] THEN
    IF 'slots_service_role' <> ALL (slots_has) THEN
      CREATE POLICY slots_service_role ON slots TO service_role USING (true) WITH CHECK (true);
      GRANT SELECT, INSERT, UPDATE, DELETE ON slots TO service_role;
    END IF;
    IF admins AND 'slots_admin' <> ALL (slots_has) THEN
      CREATE POLICY slots_admin ON slots TO authenticated
        USING (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'))
        WITH CHECK (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'));
      GRANT SELECT, INSERT, UPDATE, DELETE ON slots TO authenticated;
    END IF;
  END IF;
  IF templates_has OPERATOR(pg_catalog.<@) '{templates_service_role,templates_admin,"Service role can manage templates"}'::name[] THEN
    IF 'templates_service_role' <> ALL (templates_has) THEN
      CREATE POLICY templates_service_role ON templates TO service_role USING (true) WITH CHECK (true);
      GRANT SELECT, INSERT, UPDATE, DELETE ON templates TO service_role;
    END IF;
    IF admins AND 'templates_admin' <> ALL (templates_has) THEN
      CREATE POLICY templates_admin ON templates TO authenticated
        USING (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'))
        WITH CHECK (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'));
      GRANT SELECT, INSERT, UPDATE, DELETE ON templates TO authenticated;
    END IF;
  END IF;
END $$;
COMMIT;

-- Each alone, outside any transaction. (The index of parent_id is prompt_snapshots' own.)
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_slots_type ON slots (type);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_templates_type_slot ON templates (type, slot);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_templates_status ON templates (status);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_templates_type_slot_status ON templates (type, slot, status);
