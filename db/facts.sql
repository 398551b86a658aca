-- facts: what stands around the items that are in the way, for the commands that clear it (scripts/facts.py).
--
-- Rows of subject, what, value, other. A subject is a table, its column, an item, or a table and a name beside it. What hangs
-- on a column comes in the order in which it is to be removed, with what brings it back; "above" is what hangs on a view that does.
-- Reads the catalogs only, with an empty search_path, so that all names come qualified; which tables and names it is about,
-- and what the search_path was, stands in settings of ours.
WITH RECURSIVE standing (name, oid, home) AS (
  SELECT key, value::oid, coalesce(relnamespace, quote_ident(current_setting('budget_engine.place'))::regnamespace)
  FROM json_each_text(current_setting('budget_engine.standing')::json) LEFT JOIN pg_class ON pg_class.oid = value::oid
), names (name) AS (
  SELECT json_array_elements_text(current_setting('budget_engine.names')::json)
), kinds (relkind, kind) AS (
  VALUES ('r'::"char", 'TABLE'), ('p', 'TABLE'), ('v', 'VIEW'), ('m', 'MATERIALIZED VIEW'), ('f', 'FOREIGN TABLE'),
         ('S', 'SEQUENCE'), ('i', 'INDEX'), ('I', 'INDEX'), ('c', 'TYPE')
), heirs (name, root, oid) AS (  -- tables that inherit
  SELECT name, oid, oid FROM standing UNION SELECT name, root, inhrelid FROM heirs JOIN pg_inherits ON inhparent = heirs.oid
), unlogged (name, level, oid) AS (  -- and what they lead to: the first ones cannot be logged before
  SELECT name, 0, oid FROM standing JOIN pg_class USING (oid) WHERE relpersistence = 'u'
  UNION
  SELECT name, level + 1, confrelid
  FROM unlogged JOIN pg_constraint ON conrelid = unlogged.oid AND contype = 'f' AND confrelid <> conrelid
  JOIN pg_class ON pg_class.oid = confrelid AND relpersistence = 'u'
  WHERE level < 32
), columns (name, relid, attnum) AS (
  SELECT standing.name || '.' || attname, attrelid, attnum
  FROM standing JOIN pg_attribute ON attrelid = oid
  WHERE attnum > 0 AND NOT attisdropped AND attname IN (SELECT name FROM names)
), constraints (oid, name, kind, relid, target, key, target_key, index, remove, restore) AS (
  SELECT oid, conname, contype, conrelid, confrelid, conkey, confkey, conindid,
         format('ALTER TABLE %s DROP CONSTRAINT %I;', conrelid::regclass, conname),
         format('ALTER TABLE %s ADD CONSTRAINT %I %s;', conrelid::regclass, conname, pg_get_constraintdef(oid))
  FROM pg_constraint
  WHERE conparentid = 0 AND (conrelid IN (SELECT oid FROM standing) OR confrelid IN (SELECT oid FROM standing))
), policies (oid, name, relid, remove, restore) AS (
  SELECT oid, polname, polrelid, format('DROP POLICY %I ON %s;', polname, polrelid::regclass),
         format('CREATE POLICY %I ON %s%s FOR %s TO %s%s%s;', polname, polrelid::regclass,
                CASE WHEN polpermissive THEN '' ELSE ' AS RESTRICTIVE' END,
                CASE polcmd WHEN '*' THEN 'ALL' WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' ELSE 'DELETE' END,
                (SELECT string_agg(CASE role WHEN 0 THEN 'PUBLIC' ELSE role::regrole::text END, ', ') FROM unnest(polroles) AS role),
                ' USING (' || pg_get_expr(polqual, polrelid) || ')', ' WITH CHECK (' || pg_get_expr(polwithcheck, polrelid) || ')')
  FROM pg_policy
), hanging (subject, level, classid, objid) AS (
  ( -- on a column, besides its own default and NOT NULL, and on turn_id its documented index
    SELECT columns.name, 0, classid, objid
    FROM columns JOIN pg_depend ON refclassid = 'pg_class'::regclass AND refobjid = relid AND refobjsubid = attnum
    WHERE NOT (classid = 'pg_attrdef'::regclass AND deptype = 'a'
               AND objid IN (SELECT oid FROM pg_attrdef WHERE adrelid = relid AND adnum = attnum))
      AND NOT (classid = 'pg_constraint'::regclass AND objid IN (SELECT oid FROM pg_constraint WHERE contype = 'n'))
      AND NOT (classid = 'pg_class'::regclass AND objid IN (
                 SELECT indexrelid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
                 WHERE indrelid = relid AND relname = 'idx_prompt_snapshots_turn_id' AND indnatts = 1
                   AND indkey[0] = attnum AND NOT indisunique AND indpred IS NULL AND NOT indisreplident))
    UNION -- a generated column: in PostgreSQL 14 it depends as a column; and the column itself, if it is one
    SELECT columns.name, 0, 'pg_attrdef'::regclass, pg_attrdef.oid
    FROM columns JOIN pg_attribute AS a ON a.attrelid = relid AND attgenerated <> ''
    JOIN pg_attrdef ON adrelid = relid AND adnum = a.attnum
    WHERE a.attnum = columns.attnum
       OR EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = relid AND objsubid = a.attnum
                    AND refclassid = classid AND refobjid = relid AND refobjsubid = columns.attnum)
    UNION
    SELECT columns.name, 0, 'pg_trigger'::regclass, pg_trigger.oid
    FROM columns JOIN pg_trigger ON tgrelid = relid JOIN pg_proc ON pg_proc.oid = tgfoid
    WHERE columns.name = 'prompt_snapshots.turn_id' AND NOT tgisinternal AND prosrc ~ '[^a-z_]turn_id[^a-z_]'
    UNION
    SELECT columns.name, 0, 'pg_publication_rel'::regclass, pg_publication_rel.oid
    FROM columns JOIN pg_publication_rel ON prrelid = relid WHERE columns.name = 'prompt_snapshots.turn_id'
  )
  UNION -- and on a view that hangs, on its row type, or on a function that does
  SELECT hanging.subject, hanging.level + 1, pg_depend.classid, pg_depend.objid
  FROM hanging
  LEFT JOIN pg_rewrite ON hanging.classid = 'pg_rewrite'::regclass AND pg_rewrite.oid = hanging.objid AND rulename = '_RETURN'
  LEFT JOIN pg_type ON typrelid = ev_class
  CROSS JOIN LATERAL (VALUES ('pg_class'::regclass, ev_class), ('pg_type', pg_type.oid), ('pg_type', typarray),
                             ('pg_proc', CASE WHEN hanging.classid = 'pg_proc'::regclass THEN hanging.objid END)) AS below (classid, objid)
  JOIN pg_depend ON refclassid = below.classid AND refobjid = below.objid AND pg_depend.objid <> hanging.objid
                AND pg_depend.classid IN ('pg_rewrite'::regclass, 'pg_proc'::regclass)
  WHERE hanging.level < 32  -- functions and views can be replaced until they call each other
), hung (subject, level, classid, objid) AS (
  SELECT subject, max(level), classid, objid FROM hanging GROUP BY subject, classid, objid
), facts (position, subject, what, value, other) AS (
  SELECT 0, name, 'stands', kind, oid::regclass::text FROM standing JOIN pg_class USING (oid) JOIN kinds USING (relkind)
  UNION ALL -- a type that is no table's, where a table is to be
  SELECT 0, type.*
  FROM standing JOIN pg_type ON standing.oid IS NULL AND typname = name AND typnamespace = home
  CROSS JOIN LATERAL (VALUES
    (name, 'stands', 'TYPE', pg_type.oid::regtype::text),
    (name || ' ' || name, 'bears', format('ALTER TYPE %s RENAME', pg_type.oid::regtype), NULL)) AS type
  UNION ALL
  SELECT 0, standing.name, 'reached by',
         CASE WHEN bool_or(grantee = 0) THEN 'PUBLIC' ELSE string_agg(DISTINCT grantee::regrole::text, ', ') END, NULL
  FROM standing JOIN pg_class USING (oid) JOIN pg_namespace ON pg_namespace.oid = home
  CROSS JOIN LATERAL (
    SELECT grantee FROM aclexplode(coalesce(nspacl, acldefault('n', nspowner))) WHERE privilege_type = 'USAGE'
    UNION SELECT relowner) AS reaching
  GROUP BY standing.name
  UNION ALL -- of that name, further down the search_path: what the name leads to when the first one is gone
  SELECT 0, standing.name, 'next', pg_class.oid::regclass::text, NULL
  FROM standing
  CROSS JOIN LATERAL (
    SELECT pg_class.oid
    FROM json_array_elements_text(current_setting('budget_engine.path')::json) WITH ORDINALITY AS path (schema, position)
    JOIN pg_namespace ON nspname = schema JOIN pg_class ON relnamespace = pg_namespace.oid AND relname = standing.name
    WHERE pg_class.oid <> standing.oid ORDER BY path.position LIMIT 1) AS second
  JOIN pg_class ON pg_class.oid = second.oid
  UNION ALL
  SELECT 0, name, 'child',
         format(CASE WHEN relispartition THEN 'ALTER TABLE %1$s DETACH PARTITION %2$s;' ELSE 'ALTER TABLE %2$s NO INHERIT %1$s;' END,
                inhparent::regclass, inhrelid::regclass),
         format(CASE WHEN relispartition THEN 'ALTER TABLE %1$s ATTACH PARTITION %2$s %3$s;' ELSE 'ALTER TABLE %2$s INHERIT %1$s;' END,
                inhparent::regclass, inhrelid::regclass, pg_get_expr(relpartbound, pg_class.oid))
  FROM standing JOIN pg_class USING (oid) JOIN pg_inherits ON inhrelid = pg_class.oid
  UNION ALL
  SELECT -max(level), name, 'unlogged', format('ALTER TABLE %s SET LOGGED;', oid::regclass), NULL FROM unlogged GROUP BY name, oid
  UNION ALL
  SELECT 0, name, 'of type', format('ALTER TABLE %s NOT OF;', oid::regclass), reloftype::regtype::text
  FROM standing JOIN pg_class USING (oid) WHERE reloftype <> 0
  UNION ALL
  SELECT 0, name, 'without identity', format('ALTER TABLE %s REPLICA IDENTITY DEFAULT;', oid::regclass), NULL
  FROM standing JOIN pg_class USING (oid) WHERE relreplident = 'n'
  UNION ALL -- columns of tables that inherit: how each is renamed, and is no longer to be filled
  SELECT 0, format('%s.%s', heirs.name, attname), 'heir', remove, restore
  FROM heirs JOIN pg_attribute ON attrelid = heirs.oid AND heirs.oid <> root AND NOT attisdropped AND attname IN (SELECT name FROM names)
  CROSS JOIN LATERAL (
    SELECT format('ALTER TABLE %s RENAME COLUMN %I', heirs.oid::regclass, attname),
           CASE WHEN attnotnull AND NOT atthasdef THEN format('ALTER TABLE %s ALTER COLUMN', heirs.oid::regclass) END
    WHERE attinhcount = 0) AS renamed (remove, restore)
  UNION ALL
  SELECT 0, standing.name, 'led to', remove, restore
  FROM standing JOIN constraints ON target = standing.oid WHERE kind = 'f' AND relid <> target
  UNION ALL
  SELECT 0, standing.name, 'primary key', constraints.name, restore
  FROM standing JOIN constraints ON relid = standing.oid WHERE kind = 'p'
  UNION ALL -- its columns, where nothing else keeps them unique
  SELECT 0, standing.name, 'unique by primary key',
         (SELECT string_agg(quote_ident(attname), ', ' ORDER BY position)
          FROM unnest(key) WITH ORDINALITY AS part (attnum, position) JOIN pg_attribute AS a ON attrelid = relid AND a.attnum = part.attnum), NULL
  FROM standing JOIN constraints ON relid = standing.oid AND kind = 'p'
  WHERE NOT EXISTS (
    SELECT FROM pg_index
    WHERE indrelid = relid AND indexrelid <> constraints.index AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL
      AND indexprs IS NULL AND indkey::int2[] <@ key AND key <@ indkey::int2[])
  UNION ALL -- foreign keys that lead to a primary key
  SELECT 0, standing.name, 'primary key led to', foreign_key.remove, foreign_key.restore
  FROM standing JOIN constraints AS own ON own.relid = standing.oid AND own.kind = 'p'
  JOIN constraints AS foreign_key ON foreign_key.kind = 'f' AND foreign_key.index = own.index
  UNION ALL
  SELECT 0, format('%s foreign key (%s)', standing.name, attname), 'foreign key', remove, restore
  FROM standing JOIN constraints ON relid = standing.oid JOIN pg_attribute ON attrelid = relid AND key = ARRAY[attnum] WHERE kind = 'f'
  UNION ALL
  SELECT 0, format('%s policy %s', standing.name, policies.name), 'policy', remove, restore
  FROM standing JOIN policies ON relid = standing.oid
  UNION ALL -- what bears a name beside a table, or where it will be: how it is renamed, and whether it is the rest of a failed build
  SELECT 0, standing.name || ' ' || relname, 'bears', format('ALTER %s %s RENAME', kind, pg_class.oid::regclass),
         CASE WHEN NOT indisvalid AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid) THEN indexrelid::regclass::text END
  FROM standing JOIN pg_class ON relnamespace = home JOIN kinds USING (relkind) LEFT JOIN pg_index ON indexrelid = pg_class.oid
  WHERE relname IN (SELECT name FROM names)
  UNION ALL
  SELECT 0, standing.name || ' ' || constraints.name, 'bears', format('ALTER TABLE %s RENAME CONSTRAINT %I', relid::regclass, constraints.name), NULL
  FROM standing JOIN constraints ON relid = standing.oid WHERE constraints.name IN (SELECT name FROM names) AND kind IN ('c', 'f')
  UNION ALL
  SELECT 0, standing.name || ' ' || tgname, 'bears', format('ALTER TRIGGER %I ON %s RENAME', tgname, tgrelid::regclass), NULL
  FROM standing JOIN pg_trigger ON tgrelid = standing.oid WHERE tgname IN (SELECT name FROM names)
  UNION ALL
  SELECT 0, standing.name || ' ' || proname, 'bears', format('ALTER ROUTINE %s RENAME', pg_proc.oid::regprocedure), NULL
  FROM standing JOIN pg_proc ON pronamespace = home WHERE proname IN (SELECT name FROM names) AND pronargs = 0
  UNION ALL -- what a column is, besides what the survey says
  SELECT 0, columns.name, 'inherited', NULL, NULL FROM columns JOIN pg_attribute USING (attnum) WHERE attrelid = relid AND attinhcount > 0
  UNION ALL
  SELECT 0, columns.name, 'virtual', NULL, NULL FROM columns JOIN pg_attribute USING (attnum) WHERE attrelid = relid AND attgenerated = 'v'
  UNION ALL
  SELECT 0, columns.name, 'counted by', format('ALTER SEQUENCE %s AS bigint;', seqrelid::regclass), NULL
  FROM columns JOIN pg_depend ON refclassid = 'pg_class'::regclass AND refobjid = relid AND refobjsubid = attnum AND classid = refclassid
  JOIN pg_sequence ON seqrelid = objid WHERE seqtypid <> 'bigint'::regtype
  UNION ALL
  SELECT 0, columns.name, 'default', pg_get_expr(adbin, adrelid), NULL
  FROM columns JOIN pg_attrdef ON adrelid = relid AND adnum = attnum JOIN pg_attribute AS a ON a.attrelid = relid AND a.attnum = adnum
  WHERE attgenerated = ''
  UNION ALL
  SELECT 0, columns.name, 'enum', format_type(typ.oid, -1), NULL
  FROM columns JOIN pg_attribute AS a ON a.attrelid = relid AND a.attnum = columns.attnum JOIN pg_type AS typ ON typ.oid = atttypid AND typtype = 'e'
  UNION ALL
  SELECT 0, columns.name, 'identity', CASE attidentity WHEN 'a' THEN 'ALWAYS' ELSE 'BY DEFAULT' END, NULL
  FROM columns JOIN pg_attribute AS a ON a.attrelid = relid AND a.attnum = columns.attnum WHERE attidentity <> ''
  UNION ALL -- either end of a foreign key
  SELECT 0, columns.name, 'linked', NULL, NULL
  FROM columns JOIN constraints ON kind = 'f'
   AND (constraints.relid = columns.relid AND attnum = ANY (key) OR target = columns.relid AND attnum = ANY (target_key))
  UNION ALL -- indexes and a foreign key on the column that bear names of ours
  SELECT 0, columns.name, 'ours', format('ALTER INDEX %s RENAME', indexrelid::regclass), relname
  FROM columns JOIN hung ON subject = columns.name AND classid = 'pg_class'::regclass
  JOIN pg_index ON indexrelid = objid AND indrelid = relid JOIN pg_class ON pg_class.oid = indexrelid
  WHERE starts_with(relname, 'idx_' || split_part(columns.name, '.', 1) || '_')
  UNION ALL
  SELECT 0, columns.name, 'ours', format('ALTER INDEX %s RENAME', indexrelid::regclass), relname  -- left out of what hangs
  FROM columns JOIN pg_index ON indrelid = relid AND indkey[0] = attnum JOIN pg_class ON pg_class.oid = indexrelid
  WHERE relname = 'idx_prompt_snapshots_turn_id' AND columns.name = 'prompt_snapshots.turn_id'
    AND indexrelid NOT IN (SELECT objid FROM hung)
  UNION ALL
  SELECT 0, columns.name, 'ours', format('ALTER TABLE %s RENAME CONSTRAINT %I', columns.relid::regclass, constraints.name), constraints.name
  FROM columns JOIN constraints ON constraints.relid = columns.relid AND kind = 'f' AND attnum = ANY (key)
   AND constraints.name = replace(columns.name, '.', '_') || '_fkey'
  UNION ALL -- what hangs on a column; whatever stands in the way of another type, too: "binds"
  SELECT -hung.level, subject, CASE hung.level WHEN 0 THEN 'binds' ELSE 'above' END,
         CASE WHEN rulename = '_RETURN' THEN format('DROP %s %s;', kind, view.oid::regclass) ELSE format('DROP RULE %I ON %s;', rulename, view.oid::regclass) END,
         CASE WHEN rulename <> '_RETURN' THEN pg_get_ruledef(pg_rewrite.oid)
              ELSE format(E'CREATE %s %s (%s)%s AS\n%s', kind, view.oid::regclass,
                     (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute WHERE attrelid = view.oid AND attnum > 0),
                     ' WITH (' || array_to_string(reloptions, ', ') || ')',
                     pg_get_viewdef(view.oid))
                   || coalesce((SELECT string_agg(E'\n' || pg_get_indexdef(indexrelid) || ';', '') FROM pg_index WHERE indrelid = view.oid), '')
                   || CASE WHEN relowner = current_user::regrole THEN '' ELSE format(E'\nALTER %s %s OWNER TO %s;', kind, view.oid::regclass, relowner::regrole) END
                   || coalesce((SELECT string_agg(format(E'\nGRANT %s ON %s TO %s;', privilege_type, view.oid::regclass,
                                                         CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END), '')
                                FROM aclexplode(relacl) WHERE grantee <> relowner), '') END
  FROM hung JOIN pg_rewrite ON classid = 'pg_rewrite'::regclass AND pg_rewrite.oid = objid
  JOIN pg_class AS view ON view.oid = ev_class JOIN kinds USING (relkind)
  UNION ALL
  SELECT 2, subject, 'binds', remove, restore FROM hung JOIN policies ON classid = 'pg_policy'::regclass AND policies.oid = objid
  UNION ALL
  SELECT 2, subject, 'binds', format('DROP TRIGGER %I ON %s;', tgname, tgrelid::regclass), pg_get_triggerdef(pg_trigger.oid) || ';'
  FROM hung JOIN pg_trigger ON classid = 'pg_trigger'::regclass AND pg_trigger.oid = objid
  UNION ALL
  SELECT -hung.level, subject, CASE hung.level WHEN 0 THEN 'binds' ELSE 'above' END, format('DROP ROUTINE %s;', pg_proc.oid::regprocedure),
         rtrim(pg_get_functiondef(pg_proc.oid), E'\n') || ';'
         || CASE WHEN proowner = current_user::regrole THEN '' ELSE format(E'\nALTER ROUTINE %s OWNER TO %s;', pg_proc.oid::regprocedure, proowner::regrole) END
         || CASE WHEN proacl IS NULL THEN ''
                 ELSE format(E'\nREVOKE ALL ON ROUTINE %s FROM PUBLIC;', pg_proc.oid::regprocedure)
                      || coalesce((SELECT string_agg(format(E'\nGRANT EXECUTE ON ROUTINE %s TO %s;', pg_proc.oid::regprocedure,
                                                            CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END), '')
                                   FROM aclexplode(proacl) WHERE grantee <> proowner), '') END
  FROM hung JOIN pg_proc ON classid = 'pg_proc'::regclass AND pg_proc.oid = objid
  UNION ALL -- a generated column: its values stay where they are stored
  SELECT 2, subject, CASE WHEN subject LIKE '%.' || attname THEN 'hangs' ELSE 'binds' END,
         format(CASE WHEN attgenerated = 's' THEN 'ALTER TABLE %1$s ALTER COLUMN %2$I DROP EXPRESSION;'
                     WHEN subject LIKE '%.' || attname THEN 'ALTER TABLE %1$s DROP COLUMN %2$I, ADD COLUMN %2$I %3$s;'
                     ELSE 'ALTER TABLE %1$s DROP COLUMN %2$I;' END, attrelid::regclass, attname, format_type(atttypid, atttypmod)),
         format(CASE WHEN attgenerated = 's' OR subject LIKE '%.' || attname
                     THEN 'ALTER TABLE %1$s DROP COLUMN %2$I, ADD COLUMN %2$I %3$s GENERATED ALWAYS AS (%4$s) %5$s;'
                     ELSE 'ALTER TABLE %1$s ADD COLUMN %2$I %3$s GENERATED ALWAYS AS (%4$s) %5$s;' END, attrelid::regclass, attname,
                format_type(atttypid, atttypmod), pg_get_expr(adbin, adrelid), CASE attgenerated WHEN 's' THEN 'STORED' ELSE 'VIRTUAL' END)
  FROM hung JOIN pg_attrdef ON classid = 'pg_attrdef'::regclass AND pg_attrdef.oid = objid
  JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
  UNION ALL
  SELECT CASE kind WHEN 'f' THEN 1 WHEN 'c' THEN 2 ELSE 3 END, subject, 'hangs', remove, restore
  FROM hung JOIN constraints ON classid = 'pg_constraint'::regclass AND constraints.oid = objid
  UNION ALL
  SELECT 2, subject, 'hangs', format('DROP INDEX %s;', objid::regclass), pg_get_indexdef(objid) || ';'
  FROM hung JOIN pg_class ON classid = 'pg_class'::regclass AND pg_class.oid = objid AND relkind IN ('i', 'I')
  UNION ALL
  SELECT 2, subject, 'hangs', format('DROP STATISTICS %s.%I;', stxnamespace::regnamespace, stxname), pg_get_statisticsobjdef(pg_statistic_ext.oid) || ';'
  FROM hung JOIN pg_statistic_ext ON classid = 'pg_statistic_ext'::regclass AND pg_statistic_ext.oid = objid
  UNION ALL -- its list of columns and its condition are new in 15: asked for by name
  SELECT 2, subject, CASE WHEN to_jsonb(pg_publication_rel) ->> 'prqual' IS NULL THEN 'hangs' ELSE 'binds' END,
         format('ALTER PUBLICATION %I DROP TABLE %s;', pg_publication.pubname, prrelid::regclass),
         format('ALTER PUBLICATION %I ADD TABLE %s%s%s;', pg_publication.pubname, prrelid::regclass,
                (SELECT ' (' || string_agg(quote_ident(attname), ', ' ORDER BY attnum) || ')' FROM pg_attribute
                 WHERE attrelid = prrelid AND to_jsonb(pg_publication_rel) -> 'prattrs' @> to_jsonb(attnum)),
                (SELECT ' WHERE ' || (to_jsonb(shown) ->> 'rowfilter') FROM pg_publication_tables AS shown
                 WHERE shown.pubname = pg_publication.pubname AND format('%I.%I', schemaname, tablename)::regclass = prrelid))
  FROM hung JOIN pg_publication_rel ON classid = 'pg_publication_rel'::regclass AND pg_publication_rel.oid = objid
  JOIN pg_publication ON pg_publication.oid = prpubid
  UNION ALL
  SELECT 2, 'prompt_snapshots.turn_id', 'hangs', child.value, child.other
  FROM columns CROSS JOIN LATERAL (
    SELECT format('ALTER TABLE %s NO INHERIT %s;', inhrelid::regclass, inhparent::regclass), NULL
    FROM pg_inherits JOIN pg_attribute ON attrelid = inhrelid WHERE inhrelid = relid AND pg_attribute.attnum = columns.attnum AND attinhcount > 0
  ) AS child (value, other) WHERE columns.name = 'prompt_snapshots.turn_id'
  UNION ALL -- names that a new one must not have
  SELECT 0, '', 'taken', name, NULL
  FROM (SELECT relname FROM pg_class UNION SELECT typname FROM pg_type UNION SELECT conname FROM pg_constraint UNION SELECT proname FROM pg_proc
        UNION SELECT tgname FROM pg_trigger UNION SELECT nspname FROM pg_namespace
        UNION SELECT attname FROM pg_attribute WHERE attrelid IN (SELECT oid FROM heirs)) AS taken (name)
  WHERE name ~ '^attic|^uk_|_old|_pkey|turn_id_uuid'
)
SELECT subject, what, value, other FROM facts ORDER BY position, value;
