-- 20250222_turn_metrics: one row of telemetry per turn.
--   task   turn-metrics
--   needs  turns (20250130000000_core_schema)
--   locks  SHARE ROW EXCLUSIVE for an instant on turns; ACCESS EXCLUSIVE on a turn_metrics that lacks a default
--   again  changes nothing
--   psql "$DATABASE_URL" -f db/migrations/20250222_turn_metrics.sql

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

DO $$ BEGIN
  IF to_regclass('turns') IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001', MESSAGE = 'turn_metrics needs the table turns, which does not exist',
      HINT = 'Run db/migrations/20250130000000_core_schema.sql first (invoke prereqs). This step changed nothing.';
  ELSIF EXISTS (SELECT FROM pg_class WHERE pg_class.oid = to_regclass('turn_metrics')::oid
                  AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = 'tokens_before')) THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002', MESSAGE = 'the table turn_metrics is another one: it has no column tokens_before',
      HINT = 'Move it to another schema, then run db/migrations/20250222_turn_metrics.sql (invoke turn-metrics) again. This step changed nothing.';
  END IF;
  PERFORM pg_catalog.set_config('search_path', pg_catalog.format('%I, %s', nspname, current_setting('search_path')), true)
     FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace WHERE pg_class.oid = to_regclass('turn_metrics')::oid;
END $$;

CREATE TABLE IF NOT EXISTS turn_metrics (
  turn_id              bigint      PRIMARY KEY CONSTRAINT turn_metrics_turn_id_fkey REFERENCES turns (id) ON DELETE CASCADE,
  story_id             uuid        NOT NULL,
  created_at           timestamptz NOT NULL DEFAULT now(),
  tokens_before        int         NOT NULL,
  tokens_after         int         NOT NULL,
  trims_count          int         NOT NULL DEFAULT 0,
  top_trim_keys        text[]      DEFAULT '{}',
  model_ms             int,
  rejects              jsonb       DEFAULT '{}',
  cost_estimate_cents  int
);
DO $$ DECLARE  -- one that was made by hand may lack defaults
  bare CONSTANT name[] := ARRAY(SELECT attname FROM pg_attribute WHERE attrelid = 'turn_metrics'::regclass::oid AND NOT atthasdef);
BEGIN
  IF 'created_at' = ANY (bare) THEN ALTER TABLE turn_metrics ALTER COLUMN created_at SET DEFAULT now(); END IF;
  IF 'trims_count' = ANY (bare) THEN ALTER TABLE turn_metrics ALTER COLUMN trims_count SET DEFAULT 0; END IF;
  IF 'top_trim_keys' = ANY (bare) THEN ALTER TABLE turn_metrics ALTER COLUMN top_trim_keys SET DEFAULT '{}'; END IF;
  IF 'rejects' = ANY (bare) THEN ALTER TABLE turn_metrics ALTER COLUMN rejects SET DEFAULT '{}'; END IF;
END $$;
DO $$ BEGIN  -- or the foreign key
  IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'turn_metrics'::regclass::oid AND attname = 'turn_id' AND atttypid = 'bigint'::regtype::oid
               AND NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = attrelid AND contype = 'f' AND conkey[1] = attnum AND conkey[2] IS NULL)) THEN
    ALTER TABLE turn_metrics ADD CONSTRAINT turn_metrics_turn_id_fkey
      FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE CASCADE NOT VALID;
  END IF;
END $$;

DO $$ DECLARE
  metrics CONSTANT oid := 'turn_metrics'::regclass;
  bare CONSTANT name[] := ARRAY(SELECT attname FROM pg_attribute WHERE attrelid = metrics AND pg_catalog.col_description(metrics, attnum::int) IS NULL);
BEGIN
  IF pg_catalog.obj_description(metrics, 'pg_class') IS NULL THEN COMMENT ON TABLE turn_metrics IS 'Telemetry of the budget engine: one row per turn'; END IF;
  IF 'turn_id' = ANY (bare) THEN COMMENT ON COLUMN turn_metrics.turn_id IS 'The turn that was measured'; END IF;
  IF 'story_id' = ANY (bare) THEN COMMENT ON COLUMN turn_metrics.story_id IS 'The game (games.id) that the turn belongs to'; END IF;
  IF 'created_at' = ANY (bare) THEN COMMENT ON COLUMN turn_metrics.created_at IS 'When the row was written'; END IF;
  IF 'tokens_before' = ANY (bare) THEN COMMENT ON COLUMN turn_metrics.tokens_before IS 'Tokens of the assembled prompt before trimming'; END IF;
  IF 'tokens_after' = ANY (bare) THEN COMMENT ON COLUMN turn_metrics.tokens_after IS 'Tokens that were sent'; END IF;
  IF 'trims_count' = ANY (bare) THEN COMMENT ON COLUMN turn_metrics.trims_count IS 'Slots that were trimmed'; END IF;
  IF 'top_trim_keys' = ANY (bare) THEN
    COMMENT ON COLUMN turn_metrics.top_trim_keys IS 'Slots that lost most, first the one that lost most';
  END IF;
  IF 'model_ms' = ANY (bare) THEN COMMENT ON COLUMN turn_metrics.model_ms IS 'Milliseconds that the model took; NULL = not measured'; END IF;
  IF 'rejects' = ANY (bare) THEN COMMENT ON COLUMN turn_metrics.rejects IS 'Answers of the model that were rejected, by reason'; END IF;
  IF 'cost_estimate_cents' = ANY (bare) THEN
    COMMENT ON COLUMN turn_metrics.cost_estimate_cents IS 'Estimated cost of the turn in cents; NULL = unknown';
  END IF;
END $$;

-- Supabase (read from the catalogs: schema auth may be closed to us): service_role, and who is an admin in profiles.
-- A table that has a policy of others keeps its policies as they are.
DO $$ DECLARE
  has CONSTANT name[] := ARRAY(SELECT polname FROM pg_policy WHERE polrelid = 'turn_metrics'::regclass::oid);
BEGIN
  IF to_regrole('service_role') IS NULL OR to_regrole('authenticated') IS NULL
     OR NOT EXISTS (SELECT FROM pg_proc JOIN pg_namespace AS n ON n.oid = pronamespace WHERE nspname = 'auth' AND proname = 'uid' AND pronargs = 0::int2)
     OR NOT EXISTS (SELECT FROM pg_attribute JOIN pg_class AS c ON c.oid = attrelid JOIN pg_namespace AS n ON n.oid = relnamespace
                    WHERE nspname = 'auth' AND relname = 'users' AND attname = 'id' AND atttypid = 'uuid'::regtype::oid) THEN RETURN; END IF;
  ALTER TABLE turn_metrics ENABLE ROW LEVEL SECURITY;
  IF NOT has OPERATOR(pg_catalog.<@) '{turn_metrics_service_role,turn_metrics_admin_select,"Service role can manage turn_metrics"}'::name[] THEN RETURN; END IF;
  IF 'turn_metrics_service_role' <> ALL (has) THEN
    CREATE POLICY turn_metrics_service_role ON turn_metrics TO service_role USING (true) WITH CHECK (true);
    GRANT SELECT, INSERT, UPDATE, DELETE ON turn_metrics TO service_role;
  END IF;
  IF 'turn_metrics_admin_select' <> ALL (has) AND 2 = (SELECT pg_catalog.count(*) FROM pg_attribute WHERE attrelid = to_regclass('profiles')::oid
                                                         AND (attname = 'role' OR attname = 'id' AND atttypid = 'uuid'::regtype::oid)) THEN
    CREATE POLICY turn_metrics_admin_select ON turn_metrics FOR SELECT TO authenticated
      USING (EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = 'admin'));
    GRANT SELECT ON turn_metrics TO authenticated;
  END IF;
END $$;
\if :{?recreating} \q \endif
COMMIT;

-- Each alone, outside any transaction.
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_turn_metrics_story_created ON turn_metrics (story_id, created_at DESC);
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_turn_metrics_created ON turn_metrics (created_at DESC);
DO $$ DECLARE
  key name;
BEGIN
  FOR key IN SELECT conname FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
             WHERE conrelid = 'turn_metrics'::regclass::oid AND contype = 'f' AND attname = 'turn_id' AND NOT convalidated LOOP
    EXECUTE pg_catalog.format('ALTER TABLE turn_metrics VALIDATE CONSTRAINT %I', key);
  END LOOP;
END $$;
