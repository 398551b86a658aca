-- What is unusual around the tables of the chain, for `invoke status` to tell: what, in words, and what changes it.
--
--   psql "$DATABASE_URL" -f db/unusual.sql
--
-- Reads the catalogs only.
\set ON_ERROR_STOP on
BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;
SELECT pg_catalog.set_config('budget_engine.path', pg_catalog.array_to_json(pg_catalog.current_schemas(false))::pg_catalog.text, true),
       pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
SELECT set_config('budget_engine.tables', '["worlds", "rulesets", "entry_points", "prompt_segments", "games", "turns", "slots", "templates",
                                            "prompt_snapshots", "turn_metrics"]', true);

WITH tables (name, relation) AS (
  SELECT DISTINCT ON (name) name, pg_class.oid
  FROM json_array_elements_text(current_setting('budget_engine.tables')::json) AS name
  CROSS JOIN json_array_elements_text(current_setting('budget_engine.path')::json) WITH ORDINALITY AS path (schema, position)
  JOIN pg_namespace ON nspname = path.schema
  JOIN pg_class ON relname = name AND relnamespace = pg_namespace.oid
  ORDER BY name, position
), elsewhere AS (
  SELECT format('%I.%I', nspname, relname) AS name, row_number() OVER (ORDER BY nspname, relname) AS number, count(*) OVER () AS total
  FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
  WHERE relname IN (SELECT json_array_elements_text(current_setting('budget_engine.tables')::json)) AND relkind IN ('r', 'p', 'v', 'm', 'f')
    AND pg_class.oid NOT IN (SELECT relation FROM tables) AND nspname !~ '^pg_' AND nspname <> 'information_schema'
)
SELECT 'roles', format('%s may insert into turns, but not into turn_metrics', role),
       format('GRANT INSERT ON %s TO %s;', metrics.relation::regclass, role)
FROM tables AS turns JOIN tables AS metrics ON turns.name = 'turns' AND metrics.name = 'turn_metrics'
CROSS JOIN LATERAL (
  SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END
  FROM pg_class CROSS JOIN LATERAL (
    SELECT coalesce(relacl, acldefault('r', relowner))
    UNION ALL SELECT attacl FROM pg_attribute WHERE attrelid = turns.relation AND attacl IS NOT NULL
  ) AS granted (acl) CROSS JOIN LATERAL aclexplode(granted.acl)
  WHERE pg_class.oid = turns.relation AND privilege_type = 'INSERT'
    AND CASE grantee WHEN 0 THEN NOT EXISTS (
          SELECT FROM pg_class, aclexplode(relacl) WHERE oid = metrics.relation AND grantee = 0 AND privilege_type = 'INSERT')
        ELSE NOT has_table_privilege(grantee, metrics.relation, 'INSERT') END
) AS unwritable (role)
UNION ALL  -- Supabase: what everybody may do over HTTP
SELECT 'anon', format('anon may %s in %s: its row-level security is off', may.what, name), format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY;', relation::regclass)
FROM tables JOIN pg_class ON pg_class.oid = relation AND NOT relrowsecurity CROSS JOIN LATERAL (
  SELECT string_agg(privilege, ', ') FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS privilege
  WHERE has_table_privilege(to_regrole('anon'), relation, privilege)
) AS may (what)
WHERE may.what IS NOT NULL AND EXISTS (SELECT FROM pg_proc JOIN pg_namespace AS n ON n.oid = pronamespace
                                       WHERE nspname = 'auth' AND proname = 'uid' AND pronargs = 0)
UNION ALL
SELECT 'namesake', CASE WHEN number <= 5 THEN format('%s has the name of a table of ours; the search_path does not lead to it', name)
                         ELSE format('and %s more', total - 5) END, NULL
FROM elsewhere WHERE number <= 6
UNION ALL
SELECT 'invalid', format('index %s was left by a build that was stopped; setup builds ours again', indexrelid::regclass), NULL
FROM pg_index JOIN tables ON indrelid = relation WHERE NOT indisvalid;
COMMIT;
