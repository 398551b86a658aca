-- 20250213_prompt_snapshots: what it promises, what stands, and who mends what differs (NULL: it is in the way).
--
--   psql "$DATABASE_URL" -f db/verify/20250213_prompt_snapshots.sql     or: invoke verify
--
-- Reads the catalogs only.
WITH supabase (here) AS (
  SELECT EXISTS (SELECT FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
                 WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'auth')
                   AND c.relname = 'users' AND a.attname = 'id' AND a.atttypid = 'uuid'::regtype)
         AND EXISTS (SELECT FROM pg_proc WHERE proname = 'uid' AND pronargs = 0
                       AND pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'auth'))
         AND to_regrole('service_role') IS NOT NULL AND to_regrole('authenticated') IS NOT NULL
), admins (here) AS (
  SELECT count(*) = 2 FROM pg_attribute
  WHERE attrelid = to_regclass('profiles') AND (attname = 'role' OR attname = 'id' AND atttypid = 'uuid'::regtype)
), policies (relation, name, definition) AS (VALUES
    ('prompt_snapshots', 'prompt_snapshots_service_role', 'ALL TO service_role USING (true) WITH CHECK (true)'),
    ('prompt_snapshots', 'prompt_snapshots_admin_select', 'SELECT TO authenticated USING (admin)'),
    ('prompt_snapshots', 'prompt_snapshots_admin_insert', 'INSERT TO authenticated WITH CHECK (admin)'),
    ('prompt_snapshots', 'prompt_snapshots_admin_update', 'UPDATE TO authenticated USING (admin) WITH CHECK (admin)')
), promises (item, expected, actual, mended_by) AS (
  -- tables
  SELECT relation, 'table',
         coalesce((SELECT CASE relkind WHEN 'r' THEN CASE WHEN relispartition THEN 'partition' ELSE 'table' END WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view'
                              WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'S' THEN 'sequence'
                              WHEN 'i' THEN 'index' WHEN 'c' THEN 'type' END
          FROM pg_class WHERE oid = to_regclass(documented.relation)), taken.by),
         CASE WHEN to_regclass(documented.relation) IS NULL AND taken.by IS NULL THEN '20250213_prompt_snapshots' END
  FROM (VALUES ('prompt_snapshots')) AS documented (relation)
  LEFT JOIN LATERAL (  -- a table wants a type of its name
    SELECT 'type' FROM pg_type
    WHERE to_regclass(relation) IS NULL AND typname = relation AND typnamespace = quote_ident(current_schema())::regnamespace
  ) AS taken (by) ON true
  UNION ALL
  -- columns: type and NOT NULL (!)
  SELECT documented.relation || '.' || split_part(spec, ' ', 1),
         format_type(to_regtype(rtrim(split_part(spec, ' ', 2), '!')), -1) || CASE WHEN spec LIKE '%!' THEN ' NOT NULL' ELSE '' END,
         (SELECT format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
                 || coalesce((SELECT ' NOT VALID' FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated), '')
          FROM pg_attribute
          WHERE attrelid = to_regclass(documented.relation) AND attname = split_part(spec, ' ', 1) AND attnum > 0 AND NOT attisdropped),
         CASE WHEN to_regclass(documented.relation) IS NULL THEN '20250213_prompt_snapshots' END
  FROM (VALUES
      ('prompt_snapshots', 'id uuid!, snapshot_id uuid!, templates_version text, pack_versions jsonb, tp jsonb!, linearized_prompt_text text!, awf_contract text!, source text!, created_at timestamptz!, created_by uuid, game_id uuid')
    ) AS documented (relation, columns)
  CROSS JOIN LATERAL string_to_table(documented.columns, ', ') AS spec
  UNION ALL
  -- primary and unique keys, by their columns, whatever their names
  SELECT format('%s (%s)', documented.relation, array_to_string(documented.columns, ', ')),
         documented.kind,
         coalesce((SELECT CASE WHEN documented.kind = 'PRIMARY KEY' AND bool_or(indisprimary) THEN 'PRIMARY KEY' WHEN count(*) > 0 THEN 'UNIQUE' END
          FROM pg_index
          WHERE indrelid = to_regclass(documented.relation) AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL AND indexprs IS NULL
            AND ARRAY(SELECT attname::text FROM pg_attribute
                      WHERE attrelid = indrelid AND attnum = ANY ((indkey::int2[])[0:indnkeyatts - 1]) ORDER BY 1)
                = ARRAY(SELECT name FROM unnest(documented.columns) AS name ORDER BY 1)),
                  'none, and the name ' || documented.name || ' is taken by ' || taken.by),
         CASE WHEN to_regclass(documented.relation) IS NULL AND taken.by IS NULL THEN '20250213_prompt_snapshots' END
  FROM (VALUES
      ('prompt_snapshots', 'id', 'PRIMARY KEY', NULL),
      ('prompt_snapshots', 'snapshot_id', 'UNIQUE', 'uk_prompt_snapshots_snapshot_id')
    ) AS listed (relation, columns, kind, name)
  CROSS JOIN LATERAL (SELECT listed.relation, string_to_array(listed.columns, ' '), listed.kind, listed.name) AS documented (relation, columns, kind, name)
  LEFT JOIN LATERAL (  -- the name that it would get must be free
    SELECT coalesce('an index on ' || indrelid::regclass, 'something that is no index')
    FROM pg_class LEFT JOIN pg_index ON indexrelid = oid
    WHERE relname = documented.name AND (indrelid IS NULL OR indrelid IS DISTINCT FROM to_regclass(documented.relation))
      AND relnamespace = coalesce((SELECT relnamespace FROM pg_class WHERE oid = to_regclass(documented.relation)),
                                  quote_ident(current_schema())::regnamespace)
  ) AS taken (by) ON true
  UNION ALL
  -- indexes
  SELECT format('%s index %s', documented.relation, documented.name), documented.definition, standing.definition,
         CASE WHEN standing.definition IS NULL AND to_regclass(documented.relation) IS NULL THEN '20250213_prompt_snapshots'
              WHEN standing.definition IS NULL OR standing.definition = documented.definition || ' INVALID' THEN '20250213_prompt_snapshots online' END
  FROM (VALUES
      ('idx_prompt_snapshots_created_at', 'prompt_snapshots', 'btree (created_at DESC)'),
      ('idx_prompt_snapshots_game_id', 'prompt_snapshots', 'btree (game_id)'),
      ('idx_prompt_snapshots_source', 'prompt_snapshots', 'btree (source)'),
      ('idx_prompt_snapshots_created_by', 'prompt_snapshots', 'btree (created_by)')
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
  -- Supabase: row-level security, and the chain's policies where no other policy stands (admin: the user's row in profiles says so)
  SELECT relation || ' row-level security', 'on', CASE WHEN relrowsecurity THEN 'on' WHEN c.oid IS NOT NULL THEN 'off' END, '20250213_prompt_snapshots'
  FROM (VALUES ('prompt_snapshots')) AS documented (relation)
  LEFT JOIN pg_class AS c ON c.oid = to_regclass(relation)
  WHERE (SELECT here FROM supabase)
  UNION ALL
  SELECT format('%s policy %s', relation, name), policies.definition, standing.definition,
         CASE WHEN standing.definition IS NULL THEN '20250213_prompt_snapshots' END
  FROM policies
  LEFT JOIN LATERAL (
    SELECT CASE polcmd WHEN '*' THEN 'ALL' WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' ELSE 'DELETE' END
           || ' TO ' || (SELECT string_agg(coalesce(rolname, 'PUBLIC'), ', ') FROM unnest(polroles) AS role LEFT JOIN pg_roles ON oid = role)
           || CASE WHEN polpermissive THEN '' ELSE ' AS RESTRICTIVE' END
           || (SELECT coalesce(string_agg(format(' %s (%s)', clause,
                 CASE regexp_replace(expression, '[[:space:]]|[()]|::[[:alnum:]_]+', '', 'g')  -- as every version prints it, its white space apart
                   WHEN 'EXISTSSELECT1FROMprofilespWHEREp.id=SELECTauth.uidASuidANDp.role=''admin''' THEN 'admin' ELSE expression END), ''), '')
               FROM (VALUES ('USING', pg_get_expr(polqual, polrelid)), ('WITH CHECK', pg_get_expr(polwithcheck, polrelid))) AS c (clause, expression)
               WHERE expression IS NOT NULL)
    FROM pg_policy WHERE polrelid = to_regclass(relation) AND polname = name
  ) AS standing (definition) ON true
  WHERE (SELECT here FROM supabase) AND (policies.definition LIKE '% TO service_role %' OR (SELECT here FROM admins))
    AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = to_regclass(relation) AND polname NOT IN (SELECT p.name FROM policies AS p))
)
SELECT item, expected, actual, CASE WHEN actual IS DISTINCT FROM expected THEN mended_by END AS mended_by
FROM promises;
