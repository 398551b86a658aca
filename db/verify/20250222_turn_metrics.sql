-- 20250222_turn_metrics: what it promises, what stands, and who mends what differs (NULL: it is in the way).
--
--   psql "$DATABASE_URL" -f db/verify/20250222_turn_metrics.sql     or: invoke verify
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
    ('turn_metrics', 'turn_metrics_service_role', 'ALL TO service_role USING (true) WITH CHECK (true)'),
    ('turn_metrics', 'turn_metrics_admin_select', 'SELECT TO authenticated USING (admin)')
), promises (item, expected, actual, mended_by) AS (
  -- tables
  SELECT relation, 'table',
         coalesce((SELECT CASE relkind WHEN 'r' THEN CASE WHEN relispartition THEN 'partition' ELSE 'table' END WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view'
                              WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'S' THEN 'sequence'
                              WHEN 'i' THEN 'index' WHEN 'c' THEN 'type' END
          FROM pg_class WHERE oid = to_regclass(documented.relation)), taken.by),
         CASE WHEN to_regclass(documented.relation) IS NULL AND taken.by IS NULL THEN '20250222_turn_metrics' END
  FROM (VALUES ('turn_metrics')) AS documented (relation)
  LEFT JOIN LATERAL (  -- a table wants a type of its name
    SELECT 'type' FROM pg_type
    WHERE to_regclass(relation) IS NULL AND typname = relation AND typnamespace = quote_ident(current_schema())::regnamespace
  ) AS taken (by) ON true
  UNION ALL
  -- columns, in full
  SELECT 'turn_metrics.' || promised.name, promised.form || promised.otherwise, standing.form || standing.otherwise,
         CASE WHEN to_regclass('turn_metrics') IS NULL OR standing.form = promised.form AND standing.otherwise = '' THEN '20250222_turn_metrics' END
  FROM (VALUES
      ('turn_id', 'bigint NOT NULL', ''),
      ('story_id', 'uuid NOT NULL', ''),
      ('created_at', 'timestamp with time zone NOT NULL', ' DEFAULT now()'),
      ('tokens_before', 'integer NOT NULL', ''),
      ('tokens_after', 'integer NOT NULL', ''),
      ('trims_count', 'integer NOT NULL', ' DEFAULT 0'),
      ('top_trim_keys', 'text[]', ' DEFAULT ''{}''::text[]'),
      ('model_ms', 'integer', ''),
      ('rejects', 'jsonb', ' DEFAULT ''{}''::jsonb'),
      ('cost_estimate_cents', 'integer', '')
    ) AS promised (name, form, otherwise)
  LEFT JOIN LATERAL (
    SELECT format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
           || coalesce((SELECT ' NOT VALID' FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated), ''),
           coalesce(' DEFAULT ' || CASE WHEN attgenerated = '' THEN pg_get_expr(adbin, 0) ELSE 'generated' END, '')
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = to_regclass('turn_metrics') AND attname = promised.name AND NOT attisdropped
  ) AS standing (form, otherwise) ON true
  UNION ALL
  -- primary and unique keys, by their columns, whatever their names
  SELECT format('%s (%s)', documented.relation, array_to_string(documented.columns, ', ')),
         documented.kind,
         (SELECT CASE WHEN documented.kind = 'PRIMARY KEY' AND bool_or(indisprimary) THEN 'PRIMARY KEY' WHEN count(*) > 0 THEN 'UNIQUE' END
          FROM pg_index
          WHERE indrelid = to_regclass(documented.relation) AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL AND indexprs IS NULL
            AND ARRAY(SELECT attname::text FROM pg_attribute
                      WHERE attrelid = indrelid AND attnum = ANY ((indkey::int2[])[0:indnkeyatts - 1]) ORDER BY 1)
                = ARRAY(SELECT name FROM unnest(documented.columns) AS name ORDER BY 1)),
         CASE WHEN to_regclass(documented.relation) IS NULL THEN '20250222_turn_metrics' END
  FROM (VALUES
      ('turn_metrics', 'turn_id', 'PRIMARY KEY')
    ) AS listed (relation, columns, kind)
  CROSS JOIN LATERAL (SELECT listed.relation, string_to_array(listed.columns, ' '), listed.kind) AS documented (relation, columns, kind)
  UNION ALL
  -- foreign key, by its column: whichever differs (it acts beside the promised one), else the promised one
  SELECT 'turn_metrics foreign key (turn_id)', 'FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE CASCADE', standing.definition,
         CASE WHEN standing.definition IS NULL THEN '20250222_turn_metrics'
              WHEN standing.definition = 'FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE CASCADE NOT VALID' THEN '20250222_turn_metrics online' END
  FROM (SELECT min(pg_get_constraintdef(f.oid)), min(pg_get_constraintdef(f.oid)) FILTER (WHERE pg_get_constraintdef(f.oid) NOT IN ('FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE CASCADE', 'FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE CASCADE NOT VALID'))
        FROM pg_constraint AS f JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
        WHERE f.contype = 'f' AND f.conrelid = to_regclass('turn_metrics') AND a.attname = 'turn_id') AS found (promised, other)
  CROSS JOIN LATERAL (SELECT coalesce(found.other, found.promised, (  -- none on the column, but its name is taken
                      SELECT conname || ' is ' || pg_get_constraintdef(oid) FROM pg_constraint
                      WHERE conrelid = to_regclass('turn_metrics') AND conname = 'turn_metrics_turn_id_fkey'))
  ) AS standing (definition)
  UNION ALL
  -- indexes
  SELECT format('%s index %s', documented.relation, documented.name), documented.definition, standing.definition,
         CASE WHEN standing.definition IS NULL AND to_regclass(documented.relation) IS NULL THEN '20250222_turn_metrics'
              WHEN standing.definition IS NULL OR standing.definition = documented.definition || ' INVALID' THEN '20250222_turn_metrics online' END
  FROM (VALUES
      ('idx_turn_metrics_story_created', 'turn_metrics', 'btree (story_id, created_at DESC)'),
      ('idx_turn_metrics_created', 'turn_metrics', 'btree (created_at DESC)')
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
  -- comments: any will do
  SELECT concat_ws('.', documented.relation, documented.name) || ' comment', 'present',
         CASE WHEN coalesce(col_description(to_regclass(documented.relation), a.attnum),
                            CASE WHEN documented.name IS NULL THEN obj_description(to_regclass(documented.relation), 'pg_class') END) <> ''
              THEN 'present' END,
         '20250222_turn_metrics'
  FROM (VALUES ('turn_metrics', NULL), ('turn_metrics', 'turn_id'), ('turn_metrics', 'story_id'), ('turn_metrics', 'created_at'), ('turn_metrics', 'tokens_before'), ('turn_metrics', 'tokens_after'), ('turn_metrics', 'trims_count'), ('turn_metrics', 'top_trim_keys'), ('turn_metrics', 'model_ms'), ('turn_metrics', 'rejects'), ('turn_metrics', 'cost_estimate_cents')) AS documented (relation, name)
  LEFT JOIN pg_attribute AS a ON a.attrelid = to_regclass(documented.relation) AND a.attname = documented.name AND NOT a.attisdropped
  UNION ALL
  -- Supabase: row-level security, and the chain's policies where no other policy stands (admin: the user's row in profiles says so)
  SELECT relation || ' row-level security', 'on', CASE WHEN relrowsecurity THEN 'on' WHEN c.oid IS NOT NULL THEN 'off' END, '20250222_turn_metrics'
  FROM (VALUES ('turn_metrics')) AS documented (relation)
  LEFT JOIN pg_class AS c ON c.oid = to_regclass(relation)
  WHERE (SELECT here FROM supabase)
  UNION ALL
  SELECT format('%s policy %s', relation, name), policies.definition, standing.definition,
         CASE WHEN standing.definition IS NULL THEN '20250222_turn_metrics' END
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
