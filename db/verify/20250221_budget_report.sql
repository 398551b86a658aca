-- 20250221_budget_report: what it promises, what stands, and who mends what differs (NULL: it is in the way).
--
--   psql "$DATABASE_URL" -f db/verify/20250221_budget_report.sql     or: invoke verify
--
-- Reads the catalogs only.
WITH promises (item, expected, actual, mended_by) AS (
  -- the column
  SELECT 'prompt_snapshots.budget_report', 'jsonb', standing.form AS actual,
         CASE WHEN standing.form IS NULL THEN '20250221_budget_report' END
  FROM (SELECT min(format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
                   || coalesce((SELECT ' NOT VALID' FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated), '')
                 || CASE WHEN attgenerated <> '' THEN ' GENERATED' ELSE '' END)
        FROM pg_attribute
        WHERE attrelid = to_regclass('prompt_snapshots') AND attname = 'budget_report' AND NOT attisdropped) AS standing (form)
  UNION ALL
  -- comments: any will do
  SELECT concat_ws('.', documented.relation, documented.name) || ' comment', 'present',
         CASE WHEN coalesce(col_description(to_regclass(documented.relation), a.attnum),
                            CASE WHEN documented.name IS NULL THEN obj_description(to_regclass(documented.relation), 'pg_class') END) <> ''
              THEN 'present' END,
         '20250221_budget_report'
  FROM (VALUES ('prompt_snapshots', 'budget_report')) AS documented (relation, name)
  LEFT JOIN pg_attribute AS a ON a.attrelid = to_regclass(documented.relation) AND a.attname = documented.name AND NOT a.attisdropped
)
SELECT item, expected, actual, CASE WHEN actual IS DISTINCT FROM expected THEN mended_by END AS mended_by
FROM promises;
