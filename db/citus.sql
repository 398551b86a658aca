-- What Citus (12 and newer) keeps from being as db/verify.sql expects it, for scripts/budget_engine/migration/survey.py.
--
-- Rows of position (of the check), what is so, and the commands that change it. Asked only where Citus is: elsewhere its catalogs are not there.
-- Sources: Citus' schema_based_sharding.c, foreign_constraint.c, trigger.c. Reads the catalogs only, with the search_path pinned as in verify.sql.
WITH tables (name, relation, home) AS (
  SELECT "table", pg_class.oid, coalesce(relnamespace, quote_ident(current_setting('budget_engine.path')::json ->> 0)::regnamespace::oid)
  FROM json_to_recordset(current_setting('budget_engine.checks')::json) AS c (kind text, "table" text, found text)
  LEFT JOIN pg_class ON pg_class.oid = to_regclass(found)::oid WHERE kind = 'table'
), placed AS (  -- colocation: tables of one number are where the other's rows are; 0: on the coordinator
  SELECT tables.*, coalesce(partmethod = 'n' AND repmodel = 't', false) AS is_reference, coalesce(of_schema.colocationid, 0) AS of_schema,
         coalesce(p.colocationid, CASE WHEN relation IS NULL THEN of_schema.colocationid END, 0) AS colocation, partmethod,
         coalesce(relation::regclass::text, format('%I.%I', home::regnamespace, name)) AS found
  FROM tables LEFT JOIN pg_dist_partition AS p ON logicalrelid = relation LEFT JOIN pg_dist_schema AS of_schema ON schemaid = home
), astray AS (  -- of a distributed schema, the tables that were made inside a DO block, or in a message of several statements
  SELECT relnamespace, json_agg(pg_class.oid::regclass ORDER BY pg_class.oid) AS tables
  FROM pg_class JOIN pg_dist_schema ON schemaid = relnamespace LEFT JOIN pg_dist_partition AS p ON logicalrelid = pg_class.oid
  WHERE relkind IN ('r', 'p') AND NOT relispartition AND coalesce(p.colocationid, 0) = 0 AND relnamespace IN (SELECT home FROM tables)
    AND NOT EXISTS (SELECT FROM pg_dist_shard WHERE relname LIKE '%\_' || shardid)  -- Citus hides them from most sessions
  GROUP BY relnamespace
), free (name) AS (SELECT name FROM generate_series(1, 99) AS n CROSS JOIN concat('archive', '_' || nullif(n, 1)) AS name
                   WHERE to_regnamespace(name) IS NULL ORDER BY n LIMIT 1)
SELECT position, says, to_json(commands)
FROM json_to_recordset(current_setting('budget_engine.checks')::json)
  AS c (position int, kind text, "table" text, name text, expected text, actual text, required boolean)
JOIN placed ON placed.name = c."table"
LEFT JOIN placed AS target ON kind = 'foreign key' AND target.name = substring(expected FROM '^REFERENCES ([^(]+)[(]')
CROSS JOIN LATERAL (SELECT placed.colocation = 0 AND placed.of_schema > 0, target.colocation = 0 AND target.of_schema > 0) AS it (is_astray, target_is)
CROSS JOIN LATERAL (
  SELECT 'on the coordinator alone, in a schema that Citus distributes', ARRAY[
           '-- this brings the rows of the schema to the coordinator and back, under locks', 'BEGIN;',
           'SET LOCAL citus.enable_schema_based_sharding = off;', format('CREATE SCHEMA %s;', free.name)]
         || ARRAY(SELECT format('ALTER TABLE %s SET SCHEMA %s;', one, free.name) FROM json_array_elements_text(astray.tables) AS one)
         || format('SELECT citus_schema_undistribute(%L);', placed.home::regnamespace)
         || ARRAY(SELECT format('ALTER TABLE %s.%I SET SCHEMA %s;', free.name, (parse_ident(one))[2], placed.home::regnamespace)
                  FROM json_array_elements_text(astray.tables) AS one)
         || format('DROP SCHEMA %s;', free.name) || format('SELECT citus_schema_distribute(%L);', placed.home::regnamespace) || 'COMMIT;'::text
  FROM astray CROSS JOIN free WHERE kind = 'table' AND is_astray AND relnamespace = placed.home
  UNION ALL
  SELECT format('Citus does not enforce it: %s is %s, %s %s', target.name, at.target, placed.name, at.own),
         CASE WHEN target.of_schema > 0 AND placed.relation IS NULL THEN ARRAY[
                format('-- only tables of the distributed schema %s can lead there: begin the search_path with it (?schema=...)', target.home::regnamespace)]
              WHEN target.of_schema > 0 AND placed.colocation = 0 THEN ARRAY[
                format('ALTER TABLE %s SET SCHEMA %s;', placed.found, target.home::regnamespace)]
              WHEN placed.relation IS NOT NULL AND placed.colocation = 0 AND target.partmethod = 'n' THEN ARRAY[
                format('SELECT create_distributed_table(%L, NULL, colocate_with => %L);', placed.found, target.found)]
              ELSE ARRAY['-- this brings its rows to the coordinator, under locks; reference tables, and those of a distributed schema, can be led to:',
                         format('-- when setup has run, create_reference_table(%L), or citus_schema_distribute() of their schema', target.found),
                         format('SELECT undistribute_table(%L, cascade_via_foreign_keys => true);',
                                CASE WHEN target.colocation > 0 THEN target.found ELSE placed.found END)] END
  FROM (SELECT max(word) FILTER (WHERE of_target), max(word) FILTER (WHERE NOT of_target) FROM (
          SELECT n = target.colocation, CASE WHEN n > 0 THEN format('distributed (colocation %s)', n) ELSE 'on the coordinator' END
          FROM unnest(ARRAY[target.colocation, placed.colocation]) AS n) AS words (of_target, word)) AS at (target, own)
  WHERE kind = 'foreign key' AND NOT target.is_reference AND target.colocation <> placed.colocation AND NOT is_astray AND NOT target_is
  UNION ALL  -- since 15 those of a distributed schema need no leave
  SELECT 'Citus refuses triggers there: citus.enable_unsafe_triggers is off', ARRAY[
           format('ALTER ROLE %I IN DATABASE %I SET citus.enable_unsafe_triggers = on;', current_user, current_database())]
  WHERE kind = 'trigger' AND actual IS DISTINCT FROM expected AND (placed.is_reference OR placed.colocation > 0) AND NOT is_astray
    AND NOT coalesce(current_setting('citus.enable_unsafe_triggers', true)::bool, false)
    AND NOT (placed.of_schema > 0 AND (SELECT split_part(extversion, '.', 1)::int >= 15 FROM pg_extension WHERE extname = 'citus'))
) AS said (says, commands)
WHERE required
ORDER BY position;
