-- 20250222_fix_prompt_snapshots_turn_id: what it promises, what stands, and who mends what differs (NULL: it is in the way).
--
--   psql "$DATABASE_URL" -f db/verify/20250222_fix_prompt_snapshots_turn_id.sql     or: invoke verify
--
-- Reads the catalogs only.
WITH promises (item, expected, actual, mended_by) AS (
  -- the column: a uuid one is this step's affair, any other form is in the way
  SELECT 'prompt_snapshots.turn_id', 'bigint', standing.form AS actual,
         CASE WHEN to_regclass('prompt_snapshots') IS NULL THEN '20250213_prompt_snapshots' WHEN split_part(standing.form, ' ', 1) = 'uuid' THEN '20250222_fix_prompt_snapshots_turn_id' END
  FROM (SELECT min(format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
                   || coalesce((SELECT ' NOT VALID' FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated), ''))
        FROM pg_attribute
        WHERE attrelid = to_regclass('prompt_snapshots') AND attname = 'turn_id' AND NOT attisdropped) AS standing (form)
  UNION ALL
  -- what hangs on a uuid turn_id, besides its documented index, its default and its NOT NULL
  SELECT 'prompt_snapshots.turn_id dependants', 'none',
         CASE WHEN to_regclass('prompt_snapshots') IS NOT NULL THEN coalesce(string_agg(DISTINCT dependant, ', '), 'none') END,
         CASE WHEN to_regclass('prompt_snapshots') IS NULL THEN '20250213_prompt_snapshots' END
  FROM pg_attribute
  CROSS JOIN LATERAL (
    SELECT pg_describe_object(classid, objid, objsubid)
    FROM pg_depend
    WHERE refclassid = 'pg_class'::regclass AND refobjid = attrelid AND refobjsubid = attnum
      AND NOT (classid = 'pg_attrdef'::regclass AND deptype = 'a'
               AND objid IN (SELECT oid FROM pg_attrdef WHERE adrelid = attrelid AND adnum = attnum))
      AND NOT (classid = 'pg_constraint'::regclass AND objid IN (SELECT oid FROM pg_constraint WHERE contype = 'n'))
      AND NOT (classid = 'pg_class'::regclass AND objid IN (
                 SELECT indexrelid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
                 WHERE indrelid = attrelid AND relname = 'idx_prompt_snapshots_turn_id' AND indnatts = 1
                   AND indkey[0] = attnum AND NOT indisunique AND indpred IS NULL AND NOT indisreplident))
    UNION ALL
    SELECT 'the column itself is generated or an identity'
    WHERE attgenerated <> '' OR attidentity <> ''
    UNION ALL
    SELECT format('trigger %s, whose function mentions turn_id', tgname)
    FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
    WHERE tgrelid = attrelid AND NOT tgisinternal AND prosrc ~ '[^a-z_]turn_id[^a-z_]'
    UNION ALL
    SELECT format('publication %s: its subscribers lack the kept column', pubname)
    FROM pg_publication_rel AS r JOIN pg_publication ON pg_publication.oid = prpubid
    WHERE prrelid = attrelid AND to_jsonb(r) ->> 'prattrs' IS NULL  -- with a list of columns it depends on them; new in 15
    UNION ALL
    SELECT 'inherited from ' || inhparent::regclass FROM pg_inherits WHERE inhrelid = attrelid AND attinhcount > 0
  ) AS hanging (dependant)
  WHERE attrelid = to_regclass('prompt_snapshots') AND attname = 'turn_id' AND atttypid = 'uuid'::regtype
  UNION ALL
  -- foreign key, by its column: whichever differs (it acts beside the promised one), else the promised one
  SELECT 'prompt_snapshots foreign key (turn_id)', 'FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE SET NULL', standing.definition,
         CASE WHEN to_regclass('prompt_snapshots') IS NULL THEN '20250213_prompt_snapshots'
              WHEN standing.definition IS NULL THEN '20250222_fix_prompt_snapshots_turn_id'
              WHEN standing.definition = 'FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE SET NULL NOT VALID' THEN '20250222_fix_prompt_snapshots_turn_id online' END
  FROM (SELECT min(pg_get_constraintdef(f.oid)), min(pg_get_constraintdef(f.oid)) FILTER (WHERE pg_get_constraintdef(f.oid) NOT IN ('FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE SET NULL', 'FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE SET NULL NOT VALID'))
        FROM pg_constraint AS f JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
        WHERE f.contype = 'f' AND f.conrelid = to_regclass('prompt_snapshots') AND a.attname = 'turn_id') AS found (promised, other)
  CROSS JOIN LATERAL (SELECT coalesce(found.other, found.promised, (  -- none on the column, but its name is taken
                      SELECT conname || ' is ' || pg_get_constraintdef(oid) FROM pg_constraint
                      WHERE conrelid = to_regclass('prompt_snapshots') AND conname = 'prompt_snapshots_turn_id_fkey'))
  ) AS standing (definition)
  UNION ALL
  -- indexes
  SELECT format('%s index %s', documented.relation, documented.name), documented.definition, standing.definition,
         CASE WHEN standing.definition IS NULL AND to_regclass(documented.relation) IS NULL THEN '20250213_prompt_snapshots'
              WHEN standing.definition IS NULL OR standing.definition = documented.definition || ' INVALID' THEN '20250222_fix_prompt_snapshots_turn_id online' END
  FROM (VALUES
      ('idx_prompt_snapshots_turn_id', 'prompt_snapshots', 'btree (turn_id)')
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
)
SELECT item, expected, actual, CASE WHEN actual IS DISTINCT FROM expected THEN mended_by END AS mended_by
FROM promises;
