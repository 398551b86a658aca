-- 20250221_budget_report: what the budget engine trimmed, with each snapshot.
--   task   budget-report
--   needs  prompt_snapshots (20250213_prompt_snapshots)
--   locks  ACCESS EXCLUSIVE for an instant on prompt_snapshots, whatever its size: a column without default is a catalog change
--   again  changes nothing
--   psql "$DATABASE_URL" -f db/migrations/20250221_budget_report.sql

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

DO $$ BEGIN
  IF to_regclass('prompt_snapshots') IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001', MESSAGE = 'budget_report needs the table prompt_snapshots, which does not exist',
      HINT = 'Run db/migrations/20250213_prompt_snapshots.sql first (invoke prereqs). This step changed nothing.';
  ELSIF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'prompt_snapshots'::regclass::oid AND attname = 'snapshot_id') THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002', MESSAGE = 'the table prompt_snapshots is another one: it has no column snapshot_id',
      HINT = 'Move it to another schema, then run db/migrations/20250213_prompt_snapshots.sql first (invoke prereqs). This step changed nothing.';
  END IF;
END $$;

ALTER TABLE prompt_snapshots ADD COLUMN IF NOT EXISTS budget_report jsonb;
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_description JOIN pg_attribute ON attrelid = objoid AND attnum::int = objsubid
                 WHERE classoid = 'pg_class'::regclass::oid AND objoid = 'prompt_snapshots'::regclass::oid AND attname = 'budget_report') THEN
    COMMENT ON COLUMN prompt_snapshots.budget_report IS
      'What the budget engine did: {version, before, after, trims: [{key, removedChars, removedTokens}], warnings: []}; NULL = not recorded';
  END IF;
END $$;
\if :{?recreating} \q \endif
COMMIT;
