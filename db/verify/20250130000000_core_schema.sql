-- 20250130000000_core_schema: what it promises, what stands, and who mends what differs (NULL: it is in the way).
--
--   psql "$DATABASE_URL" -f db/verify/20250130000000_core_schema.sql     or: invoke verify
--
-- Reads the catalogs only.
WITH supabase (here) AS (
  SELECT EXISTS (SELECT FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
                 WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'auth')
                   AND c.relname = 'users' AND a.attname = 'id' AND a.atttypid = 'uuid'::regtype)
         AND EXISTS (SELECT FROM pg_proc WHERE proname = 'uid' AND pronargs = 0
                       AND pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'auth'))
         AND to_regrole('service_role') IS NOT NULL AND to_regrole('authenticated') IS NOT NULL
), menders (relation, taken_by, stem) AS (  -- of a table that is missing, or in the wrong form; what is no table or view is nobody's
  SELECT relation, taken.by,
         CASE WHEN oid IS NULL AND taken.by IS NULL THEN '20250130000000_core_schema'
              WHEN relkind IN ('r', 'p', 'v', 'm', 'f') THEN '20250130000002_recreate_core_schema' END
  FROM unnest('{worlds,rulesets,entry_points,prompt_segments,games,turns}'::text[]) AS relation
  LEFT JOIN pg_class ON oid = to_regclass(relation)
  LEFT JOIN LATERAL (  -- a table wants a type of its name
    SELECT 'type' FROM pg_type
    WHERE to_regclass(relation) IS NULL AND typname = relation AND typnamespace = quote_ident(current_schema())::regnamespace
  ) AS taken (by) ON true
), promises (item, expected, actual, mended_by) AS (
  -- tables
  SELECT relation, 'table',
         coalesce((SELECT CASE relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view'
                              WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'S' THEN 'sequence'
                              WHEN 'i' THEN 'index' WHEN 'c' THEN 'type' END
          FROM pg_class WHERE oid = to_regclass(documented.relation)), documented.taken_by),
         documented.stem
  FROM menders AS documented
  UNION ALL
  -- columns: type and NOT NULL (!)
  SELECT documented.relation || '.' || split_part(spec, ' ', 1),
         format_type(to_regtype(rtrim(split_part(spec, ' ', 2), '!')), -1) || CASE WHEN spec LIKE '%!' THEN ' NOT NULL' ELSE '' END,
         (SELECT format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
                 || coalesce((SELECT ' NOT VALID' FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated), '')
          FROM pg_attribute
          WHERE attrelid = to_regclass(documented.relation) AND attname = split_part(spec, ' ', 1) AND attnum > 0 AND NOT attisdropped),
         (SELECT stem FROM menders WHERE menders.relation = documented.relation)
  FROM (VALUES
      ('worlds', 'id text!, version text!, status text!, doc jsonb!, created_at timestamptz!, updated_at timestamptz!'),
      ('rulesets', 'id text!, version text!, status text!, doc jsonb!, created_at timestamptz!, updated_at timestamptz!'),
      ('entry_points', 'id text!, slug text!, type text!, world_id text!, ruleset_id text!, title text!, subtitle text, description text!, synopsis text, status text!, visibility text!, content_rating text!, tags text[]!, content jsonb!, i18n jsonb!, search_text tsvector, sort_weight int!, popularity_score int!, created_at timestamptz!, updated_at timestamptz!'),
      ('prompt_segments', 'id bigint!, scope text!, ref_id text, version text!, active boolean!, content text!, metadata jsonb!, created_at timestamptz!, updated_at timestamptz!'),
      ('games', 'id uuid!, entry_point_id text!, entry_point_type text!, world_id text!, ruleset_id text!, owner_user_id uuid, state jsonb!, turn_count int!, status text!, created_at timestamptz!, updated_at timestamptz!'),
      ('turns', 'id bigint!, game_id uuid!, idx int!, role text!, prompt_meta jsonb!, content jsonb!, costs jsonb!, created_at timestamptz!')
    ) AS documented (relation, columns)
  CROSS JOIN LATERAL string_to_table(documented.columns, ', ') AS spec
  UNION ALL
  -- primary and unique keys, by their columns, whatever their names
  SELECT format('%s (%s)', documented.relation, array_to_string(documented.columns, ', ')),
         documented.kind,
         coalesce((
          SELECT CASE WHEN documented.kind = 'PRIMARY KEY' AND bool_or(indisprimary) THEN 'PRIMARY KEY' WHEN count(*) > 0 THEN 'UNIQUE' END
          FROM pg_index
          WHERE indrelid = to_regclass(documented.relation) AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL AND indexprs IS NULL
            AND ARRAY(SELECT attname::text FROM pg_attribute
                      WHERE attrelid = indrelid AND attnum = ANY ((indkey::int2[])[0:indnkeyatts - 1]) ORDER BY 1)
                = ARRAY(SELECT name FROM unnest(documented.columns) AS name ORDER BY 1)
         ), 'none, and the name idx_turns_game_idx is taken by ' || taken.by),
         CASE WHEN taken.by IS NOT NULL THEN NULL
              WHEN to_regclass(documented.relation) IS NOT NULL AND documented.relation = 'turns' AND documented.kind = 'UNIQUE'
                THEN '20250130000000_core_schema online'
              ELSE (SELECT stem FROM menders WHERE menders.relation = documented.relation) END
  FROM (VALUES
      ('worlds', 'id', 'PRIMARY KEY'),
      ('rulesets', 'id', 'PRIMARY KEY'),
      ('entry_points', 'id', 'PRIMARY KEY'),
      ('entry_points', 'slug', 'UNIQUE'),
      ('prompt_segments', 'id', 'PRIMARY KEY'),
      ('games', 'id', 'PRIMARY KEY'),
      ('turns', 'id', 'PRIMARY KEY'),
      ('turns', 'game_id idx', 'UNIQUE')
    ) AS listed (relation, columns, kind)
  CROSS JOIN LATERAL (SELECT listed.relation, string_to_array(listed.columns, ' '), listed.kind) AS documented (relation, columns, kind)
  LEFT JOIN LATERAL (
    SELECT coalesce('an index on ' || indrelid::regclass, 'something that is no index')
    FROM pg_class LEFT JOIN pg_index ON indexrelid = oid
    WHERE documented.relation = 'turns' AND documented.kind = 'UNIQUE' AND relname = 'idx_turns_game_idx'
      AND (indrelid IS DISTINCT FROM to_regclass('turns') OR indisvalid)
      AND relnamespace = coalesce((SELECT relnamespace FROM pg_class WHERE oid = to_regclass('turns')),
                                  quote_ident(current_schema())::regnamespace)
  ) AS taken (by) ON true
  UNION ALL
  -- indexes
  SELECT format('%s index %s', documented.relation, documented.name), documented.definition, standing.definition,
         CASE WHEN standing.definition IS NULL AND to_regclass(documented.relation) IS NULL THEN '20250130000000_core_schema'
              WHEN standing.definition IS NULL OR standing.definition = documented.definition || ' INVALID' THEN '20250130000000_core_schema online' END
  FROM (VALUES
      ('idx_entry_points_type', 'entry_points', 'btree (type)'),
      ('idx_entry_points_world', 'entry_points', 'btree (world_id)'),
      ('idx_entry_points_ruleset', 'entry_points', 'btree (ruleset_id)'),
      ('idx_entry_points_status_vis', 'entry_points', 'btree (status, visibility)'),
      ('idx_entry_points_tags', 'entry_points', 'gin (tags)'),
      ('idx_entry_points_search', 'entry_points', 'gin (search_text)'),
      ('idx_prompt_segments_scope', 'prompt_segments', 'btree (scope)'),
      ('idx_prompt_segments_ref', 'prompt_segments', 'btree (ref_id)'),
      ('idx_games_owner', 'games', 'btree (owner_user_id)'),
      ('idx_games_entry_point', 'games', 'btree (entry_point_id)'),
      ('idx_games_world', 'games', 'btree (world_id)')
    ) AS documented (name, relation, definition)
  LEFT JOIN LATERAL (
    SELECT CASE WHEN i.indrelid = to_regclass(documented.relation)
                THEN CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END
                     || replace(regexp_replace(substring(pg_get_indexdef(i.indexrelid) FROM ' USING (.*)$'), ' WITH [(][^)]*[)]', ''),
                                ' WHERE (must_keep = true)', ' WHERE must_keep')
                     || CASE WHEN i.indisvalid THEN '' ELSE ' INVALID' END
                ELSE coalesce('an index on ' || i.indrelid::regclass, 'not an index') END
    FROM pg_class AS n
    LEFT JOIN pg_index AS i ON i.indexrelid = n.oid
    WHERE n.relname = documented.name  -- beside the table, or where it will be
      AND n.relnamespace = coalesce((SELECT relnamespace FROM pg_class WHERE oid = to_regclass(documented.relation)),
                                    quote_ident(current_schema())::regnamespace)
  ) AS standing (definition) ON true
  UNION ALL
  -- a function of the name that the trigger of a new entry_points is to run: others may use it, unless it is ours (md5: of its source)
  SELECT 'entry_points function update_entry_points_search_text()', promised.definition, standing.definition, NULL
  FROM (VALUES ('trigger, source md5 df56eafa3c3dfc013e0c6b78fef6a771')) AS promised (definition)
  CROSS JOIN LATERAL (
    SELECT CASE WHEN prokind = 'f' THEN prorettype::regtype::text ELSE 'not a function' END || ', source md5 ' || md5(replace(prosrc, E'\r', ''))
    FROM pg_proc
    WHERE proname = 'update_entry_points_search_text' AND pronargs = 0 AND pronamespace = quote_ident(current_schema())::regnamespace
  ) AS standing (definition)
  WHERE to_regclass('entry_points') IS NULL AND standing.definition <> promised.definition
  UNION ALL
  -- Supabase: of the core tables, those that the chain creates (they bear its policy) have, and keep, row-level security
  SELECT relation || ' row-level security', 'on', CASE WHEN relrowsecurity THEN 'on' WHEN pg_class.oid IS NOT NULL THEN 'off' END, '20250130000000_core_schema'
  FROM menders LEFT JOIN pg_class ON pg_class.oid = to_regclass(relation)
  WHERE EXISTS (SELECT FROM pg_policy WHERE polrelid = pg_class.oid AND polname = relation || '_service_role')
     OR menders.stem = '20250130000000_core_schema' AND (SELECT here FROM supabase)
)
SELECT item, expected, actual, CASE WHEN actual IS DISTINCT FROM expected THEN mended_by END AS mended_by
FROM promises;
