-- 20250220_slots_flags: what it promises, what stands, and who mends what differs (NULL: it is in the way).
--
--   psql "$DATABASE_URL" -f db/verify/20250220_slots_flags.sql     or: invoke verify
--
-- Reads the catalogs only.
WITH promises (item, expected, actual, mended_by) AS (
  -- columns, in full
  SELECT 'slots.' || promised.name, promised.form, standing.form AS actual,
         CASE WHEN standing.form IS NULL OR promised.name = 'must_keep' AND standing.form = 'boolean NOT NULL' THEN '20250220_slots_flags' END
  FROM (VALUES ('must_keep', 'boolean NOT NULL DEFAULT false'), ('min_chars', 'integer')) AS promised (name, form)
  LEFT JOIN LATERAL (
    SELECT format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
           || coalesce((SELECT ' NOT VALID' FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated), '')
           || coalesce(' DEFAULT ' || CASE WHEN attgenerated = '' THEN pg_get_expr(adbin, 0) ELSE 'generated' END, '')
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = to_regclass('slots') AND attname = promised.name AND NOT attisdropped
  ) AS standing (form) ON true
  UNION ALL
  -- comments: any will do
  SELECT concat_ws('.', documented.relation, documented.name) || ' comment', 'present',
         CASE WHEN coalesce(col_description(to_regclass(documented.relation), a.attnum),
                            CASE WHEN documented.name IS NULL THEN obj_description(to_regclass(documented.relation), 'pg_class') END) <> ''
              THEN 'present' END,
         '20250220_slots_flags'
  FROM (VALUES ('slots', 'must_keep'), ('slots', 'min_chars')) AS documented (relation, name)
  LEFT JOIN pg_attribute AS a ON a.attrelid = to_regclass(documented.relation) AND a.attname = documented.name AND NOT a.attisdropped
  UNION ALL
  -- indexes
  SELECT format('%s index %s', documented.relation, documented.name), documented.definition, standing.definition,
         CASE WHEN standing.definition IS NULL AND to_regclass(documented.relation) IS NULL THEN '20250220_slots_flags online'
              WHEN standing.definition IS NULL OR standing.definition = documented.definition || ' INVALID' THEN '20250220_slots_flags online' END
  FROM (VALUES
      ('idx_slots_must_keep', 'slots', 'btree (must_keep) WHERE must_keep')
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
  -- the trigger that gives critical slots their defaults, by its function's identity: the search_path may hide one of that name
  SELECT 'slots trigger trigger_slots_critical_defaults',
         'AFTER INSERT ON slots FOR EACH ROW WHEN (NOT new.must_keep AND new.min_chars IS NULL) EXECUTE FUNCTION set_critical_slot_defaults()',
         standing.definition,
         CASE WHEN standing.is_constraint IS NOT TRUE THEN '20250220_slots_flags' END
  FROM (VALUES (to_regclass('slots'))) AS slots (oid)
  LEFT JOIN LATERAL (
    SELECT regexp_replace(split_part(pg_get_triggerdef(t.oid, true), ' EXECUTE ', 1), '^CREATE TRIGGER [^ ]+ ', '') || ' EXECUTE FUNCTION '
           || CASE WHEN f.pronamespace = c.relnamespace AND f.proname = 'set_critical_slot_defaults' THEN '' ELSE f.pronamespace::regnamespace || '.' END
           || f.proname || '()'
           || CASE WHEN t.tgenabled IN ('O', 'A') THEN '' ELSE ', disabled' END,
           t.tgconstraint <> 0
    FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid JOIN pg_proc AS f ON f.oid = t.tgfoid
    WHERE t.tgrelid = slots.oid AND t.tgname = 'trigger_slots_critical_defaults'
  ) AS standing (definition, is_constraint) ON true
  UNION ALL
  -- its function: it lends the rights of the owner of slots, so that all that keeps them safe is promised (md5: of its source)
  SELECT 'slots function set_critical_slot_defaults()',
         'trigger, SECURITY DEFINER, search_path=pg_catalog, pg_temp, owned like slots, not for others to call, source md5 41b32d3df07ff3e5fc59c55e872858f1',
         standing.definition,
         CASE WHEN standing.definition IS NULL OR standing.definition LIKE 'trigger, %' THEN '20250220_slots_flags' END
  FROM (VALUES (to_regclass('slots'))) AS slots (oid)
  LEFT JOIN LATERAL (
    SELECT CASE WHEN f.prokind = 'f' THEN f.prorettype::regtype::text ELSE 'not a function' END
           || CASE WHEN f.prosecdef THEN ', SECURITY DEFINER' ELSE ', SECURITY INVOKER' END
           || coalesce(', ' || array_to_string(f.proconfig, ', '), '')
           || CASE WHEN f.proowner = c.relowner THEN ', owned like slots' ELSE ', owned by ' || f.proowner::regrole END
           || CASE WHEN EXISTS (SELECT FROM aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) WHERE grantee <> f.proowner)
                   THEN ', for others to call' ELSE ', not for others to call' END
           || ', source md5 ' || md5(replace(f.prosrc, E'\r', ''))
    FROM pg_class AS c JOIN pg_proc AS f ON f.pronamespace = c.relnamespace
    WHERE c.oid = slots.oid AND f.proname = 'set_critical_slot_defaults' AND f.pronargs = 0
  ) AS standing (definition) ON true
)
SELECT item, expected, actual, CASE WHEN actual IS DISTINCT FROM expected THEN mended_by END AS mended_by
FROM promises;
