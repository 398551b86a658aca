-- 20250221_budget_report: what the budget engine trimmed from a prompt, beside the snapshot of that prompt.
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f db/migrations/20250221_budget_report.sql     or: invoke budget-report
--
-- Atomic part  adds prompt_snapshots.budget_report with its comment: ACCESS EXCLUSIVE for an instant, whatever the
--              table's size (a column without default is a catalog change).
-- Run again    changes nothing, and where nothing is missing locks nothing.

DO $migration$
DECLARE
  snapshots CONSTANT oid := to_regclass('prompt_snapshots');
  obstacles text;
BEGIN
  IF current_setting('lock_timeout') = '0' THEN
    PERFORM set_config('lock_timeout', '2s', true);
  END IF;

  IF snapshots IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001',
      MESSAGE = 'budget_report needs the table prompt_snapshots, which does not exist',
      DETAIL = 'It adds the column budget_report to it.',
      HINT = 'Run db/migrations/20250213_prompt_snapshots.sql first (invoke prereqs). This step changed nothing.';
  END IF;
  SELECT string_agg(format('prompt_snapshots.%s is %s, promised: %s', promised.name, coalesce(standing.form, 'missing'), promised.form), E'\n')
    INTO obstacles
    FROM (VALUES ('snapshot_id', 'uuid NOT NULL'), ('budget_report', 'jsonb')) AS promised (name, form)
    LEFT JOIN LATERAL (
      SELECT format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END || CASE WHEN attgenerated <> '' THEN ' GENERATED' ELSE '' END
      FROM pg_attribute
      WHERE attrelid = snapshots AND attname = promised.name AND NOT attisdropped
    ) AS standing (form) ON true
   WHERE standing.form IS DISTINCT FROM promised.form AND NOT (promised.name = 'budget_report' AND standing.form IS NULL);
  obstacles := concat_ws(E'\n', obstacles, (
    SELECT 'prompt_snapshots is not an ordinary table' FROM pg_class WHERE oid = snapshots AND relkind <> 'r'));
  IF obstacles <> '' THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002',
      MESSAGE = 'prompt_snapshots, or its column budget_report, stands in another form: it is in the way',
      DETAIL = obstacles,
      HINT = 'Move the table out of the way (CREATE SCHEMA attic; ALTER TABLE ... SET SCHEMA attic), or rename the column, then run '
             'db/migrations/20250221_budget_report.sql (invoke budget-report) again. This step changed nothing.';
  END IF;

  IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = snapshots AND attname = 'budget_report') THEN
    ALTER TABLE prompt_snapshots ADD COLUMN budget_report jsonb;
    RAISE NOTICE 'column prompt_snapshots.budget_report added';
  END IF;
  IF col_description(snapshots, (SELECT attnum FROM pg_attribute WHERE attrelid = snapshots AND attname = 'budget_report')) IS NULL THEN
    COMMENT ON COLUMN prompt_snapshots.budget_report IS
      'What the budget engine did: {version, before, after, trims: [{key, removedChars, removedTokens}], warnings: []}; NULL = not recorded';
  END IF;
END
$migration$;
