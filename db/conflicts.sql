-- conflicts: what the commands that clear them are made of (scripts/budget_engine/migration/conflicts.py).
--
-- Rows of kind, table, name (the check that it is about), what, command, restore (what brings back that which the command drops),
-- more (JSON). Reads the catalogs only, with the search_path pinned as in verify.sql, so that names come qualified and quoted.
-- :'checks' is a JSON list of the checks; "our_name": the name that it has, or is to have, unless something else has it.
WITH RECURSIVE checks AS MATERIALIZED (
  SELECT * FROM json_to_recordset(:'checks')
    AS checks (kind text, table_name text, name text, expected text, our_name text, taken boolean, found text, conflict boolean)
), tables (table_name, relid, relkind, alterable, home, owner, sort) AS (
  SELECT table_name, pg_class.oid, relkind, relkind = 'r' OR relkind = 'p' AND NOT conflict,
         coalesce(relnamespace, quote_ident(current_setting('budget_engine.path')::json ->> 0)::regnamespace), relowner,
         upper((pg_identify_object('pg_class'::regclass, pg_class.oid, 0)).type)
  FROM checks LEFT JOIN pg_class ON pg_class.oid = to_regclass(found)::oid WHERE kind = 'table'
), conflicts AS (
  SELECT * FROM checks JOIN tables USING (table_name) WHERE conflict
), family (table_name, root, oid) AS (  -- a table, and those that inherit from it
  SELECT table_name, relid, relid FROM tables UNION SELECT table_name, root, inhrelid FROM family JOIN pg_inherits ON inhparent = family.oid
), given (base, name) AS (  -- what something may be called: the name, or one like it that nothing has yet
  SELECT DISTINCT ON (base) base, quote_ident(candidate)
  FROM (SELECT our_name || ending FROM checks CROSS JOIN unnest('{"",_old}'::text[]) AS ending) AS names (base)
  CROSS JOIN generate_series(1, 20) AS n CROSS JOIN concat(base, '_' || nullif(n, 1)) AS candidate
  WHERE candidate NOT IN (
    SELECT relname FROM pg_class UNION ALL SELECT typname FROM pg_type UNION ALL SELECT conname FROM pg_constraint UNION ALL SELECT tgname FROM pg_trigger
    UNION ALL SELECT proname FROM pg_proc UNION ALL SELECT attname FROM pg_attribute WHERE attrelid IN (SELECT oid FROM family))
  ORDER BY base, n
), unlogged (kind, table_name, name, level, oid) AS (  -- what a foreign key leads to, and what that leads to: the last ones are logged first
  SELECT kind, table_name, name, 0, pg_class.oid
  FROM conflicts JOIN pg_class ON pg_class.oid = to_regclass(substring(expected FROM '^REFERENCES ([^(]+)[(]'))::oid AND relpersistence = 'u'
  WHERE kind = 'foreign key'
  UNION
  SELECT kind, table_name, name, level + 1, confrelid
  FROM unlogged JOIN pg_constraint ON conrelid = unlogged.oid AND contype = 'f' AND confrelid <> conrelid
  JOIN pg_class ON pg_class.oid = confrelid AND relpersistence = 'u' WHERE level < 32
), columns AS (
  SELECT kind, table_name, name, relid, a.*, pg_get_expr(adbin, adrelid) AS expression
  FROM conflicts JOIN pg_attribute AS a ON attrelid = relid AND attname = name AND attnum > 0 AND NOT attisdropped
  LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
  WHERE kind IN ('column', 'default', 'dependants') AND alterable
), depends (refclassid, refobjid, refobjsubid, classid, objid, objsubid) AS NOT MATERIALIZED (  -- an expression is that of its column
  SELECT refclassid, refobjid, refobjsubid, CASE WHEN adnum > 0 THEN 'pg_class'::regclass ELSE classid END, coalesce(adrelid, objid), coalesce(adnum, objsubid)
  FROM pg_depend LEFT JOIN pg_attrdef ON classid = 'pg_attrdef'::regclass AND pg_attrdef.oid = objid
  WHERE NOT (classid = 'pg_rewrite'::regclass AND objid IN (SELECT oid FROM pg_rewrite WHERE rulename = '_RETURN' AND ev_class = refobjid))  -- itself
  UNION ALL SELECT 'pg_rewrite'::regclass, oid, 0, 'pg_class'::regclass, ev_class, 0 FROM pg_rewrite WHERE rulename = '_RETURN'
), hanging (table_name, name, level, classid, objid, objsubid) AS (  -- on a column that is to be replaced, as in verify.sql
  SELECT table_name, name, 0, found.*
  FROM columns CROSS JOIN LATERAL (
    SELECT classid, objid, objsubid FROM depends
    WHERE refclassid = 'pg_class'::regclass AND refobjid = attrelid AND refobjsubid = attnum AND NOT (objid = attrelid AND objsubid = attnum)
      AND NOT (classid = 'pg_constraint'::regclass AND objid IN (SELECT oid FROM pg_constraint WHERE contype = 'n'))
      AND NOT (classid = 'pg_class'::regclass AND objid IN (
                 SELECT indexrelid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
                 WHERE indrelid = attrelid AND relname IN (SELECT listed.name FROM checks AS listed WHERE listed.kind = 'index')
                   AND indnatts = 1 AND indkey[0] = attnum AND NOT indisunique AND indpred IS NULL AND NOT indisreplident))
    UNION ALL SELECT 'pg_class'::regclass, attrelid, attnum WHERE attgenerated <> '' OR attidentity <> ''
    UNION ALL SELECT 'pg_trigger'::regclass, pg_trigger.oid, 0 FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
    WHERE tgrelid = attrelid AND NOT tgisinternal AND prosrc ~ ('[^a-z_]' || name || '[^a-z_]')
    UNION ALL SELECT 'pg_publication_rel'::regclass, oid, 0 FROM pg_publication_rel WHERE prrelid = attrelid
  ) AS found
  WHERE kind = 'dependants'
  UNION  -- and on what hangs there
  SELECT table_name, name, level + 1, found.* FROM hanging CROSS JOIN LATERAL (  -- of each by the index
    SELECT depends.classid, depends.objid, depends.objsubid FROM depends WHERE refclassid = hanging.classid AND refobjid = hanging.objid OFFSET 0
  ) AS found WHERE hanging.objsubid = 0 AND level < 32  -- functions and views can be replaced until they call each other
), keys AS (  -- "other": the primary key, where another one is expected
  SELECT kind, table_name, name, our_name, relid, other.oid AS other, other.conindid, other.conkey,
         (SELECT string_agg(quote_ident(part), ', ' ORDER BY n) FROM string_to_table(name, ', ') WITH ORDINALITY AS parts (part, n)) AS columns
  FROM conflicts LEFT JOIN pg_constraint AS other ON conrelid = relid AND contype = 'p' AND expected = 'PRIMARY KEY'
  WHERE kind = 'key' AND relkind = 'r'
), dropped (kind, table_name, name, what, position, classid, objid, objsubid) AS (
  SELECT 'dependants', table_name, name, 'drop', -max(level), classid, objid, objsubid FROM hanging  -- without what is only a part of another
  WHERE objsubid > 0 OR NOT EXISTS (SELECT FROM pg_depend AS part WHERE part.classid = hanging.classid AND part.objid = hanging.objid AND deptype = 'i')
  GROUP BY table_name, name, classid, objid, objsubid
  UNION ALL  -- foreign keys that lead to a table which may have to move, or to a primary key that another one replaces
  SELECT 'table', table_name, '', 'led to', 0, 'pg_constraint'::regclass, pg_constraint.oid, 0
  FROM tables JOIN pg_constraint ON confrelid = relid WHERE contype = 'f' AND conrelid <> confrelid AND conparentid = 0
  UNION ALL SELECT kind, table_name, name, 'drop', 1, 'pg_constraint'::regclass, pg_constraint.oid, 0
  FROM keys JOIN pg_constraint USING (conindid) WHERE contype = 'f' AND conparentid = 0
  UNION ALL SELECT kind, table_name, name, 'drop', 2, 'pg_constraint'::regclass, other, 0 FROM keys WHERE other IS NOT NULL
  UNION ALL  -- a foreign key that acts otherwise than the expected one, whether that exists beside it or not
  SELECT kind, table_name, name, 'drop', 0, 'pg_constraint'::regclass, pg_constraint.oid, 0
  FROM conflicts JOIN pg_attribute ON attrelid = relid AND attname = name
  JOIN pg_constraint ON conrelid = relid AND contype = 'f' AND conkey = ARRAY[attnum] AND conparentid = 0
  WHERE kind = 'foreign key' AND regexp_replace(pg_get_constraintdef(pg_constraint.oid), '^FOREIGN KEY [^)]*[)] | NOT VALID$', '', 'g') <> expected
  UNION ALL SELECT kind, table_name, name, 'drop', 0, 'pg_class'::regclass, attrelid, attnum FROM columns WHERE kind = 'column' AND attgenerated = 's'
  UNION ALL SELECT kind, table_name, name, 'drop', 0, 'pg_policy'::regclass, pg_policy.oid, 0
  FROM conflicts JOIN pg_policy ON polrelid = relid AND polname = name WHERE kind = 'policy'
), defined AS (  -- whole: "restore" says all that it was; what has a name of ours would come back beside that which a step creates
  SELECT dropped.*, coalesce(d.command, format('DROP %s %s;', upper(type), identity)) AS command, d.restore, d.whole
  FROM dropped CROSS JOIN LATERAL pg_identify_object(classid, objid, objsubid) LEFT JOIN LATERAL (
    SELECT NULL, concat('CREATE VIEW ', identity, ' WITH (' || array_to_string(reloptions, ', ') || ')', E' AS\n', pg_get_viewdef(oid),
             format(E'\nALTER VIEW %s OWNER TO %s;', identity, relowner::regrole)), true
    FROM pg_class WHERE classid = 'pg_class'::regclass AND oid = objid AND relkind = 'v' AND objsubid = 0
    UNION ALL
    SELECT NULL, pg_get_indexdef(oid) || ';', reltablespace = 0 AND NOT indisclustered AND NOT indisreplident AND relname NOT IN (SELECT our_name FROM checks)
    FROM pg_class JOIN pg_index ON indexrelid = oid WHERE classid = 'pg_class'::regclass AND oid = objid
    UNION ALL  -- what was the primary key comes back as a unique one
    SELECT format('ALTER TABLE %s DROP CONSTRAINT %I;', conrelid::regclass, conname), format('ALTER TABLE %s ADD %s;', conrelid::regclass,
             CASE WHEN kind = 'dependants' AND contype = 'p' THEN 'UNIQUE' || substr(definition, 12) ELSE format('CONSTRAINT %I %s', conname, definition) END),
           (kind <> 'dependants' OR contype = 'p' OR conname NOT IN (SELECT our_name FROM checks)) AND NOT EXISTS (
             SELECT FROM pg_class JOIN pg_index ON indexrelid = pg_class.oid WHERE contype <> 'f' AND indexrelid = conindid
             AND (reltablespace <> 0 OR indisclustered OR indisreplident OR reloptions IS NOT NULL OR obj_description(conindid, 'pg_class') <> ''))
    FROM pg_constraint CROSS JOIN pg_get_constraintdef(oid) AS definition WHERE classid = 'pg_constraint'::regclass AND oid = objid
    UNION ALL
    SELECT NULL, pg_get_triggerdef(oid) || ';', tgenabled = 'O' FROM pg_trigger WHERE classid = 'pg_trigger'::regclass AND oid = objid
    UNION ALL
    SELECT NULL, pg_get_ruledef(oid), ev_enabled = 'O' FROM pg_rewrite WHERE classid = 'pg_rewrite'::regclass AND oid = objid AND rulename <> '_RETURN'
    UNION ALL
    SELECT NULL, format('CREATE POLICY %I ON %s%s FOR %s TO %s%s%s;', polname, polrelid::regclass, CASE WHEN NOT polpermissive THEN ' AS RESTRICTIVE' END,
             CASE polcmd WHEN '*' THEN 'ALL' WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' ELSE 'DELETE' END,
             (SELECT string_agg(CASE role WHEN 0 THEN 'PUBLIC' ELSE role::regrole::text END, ', ') FROM unnest(polroles) AS role),
             ' USING (' || pg_get_expr(polqual, polrelid) || ')', ' WITH CHECK (' || pg_get_expr(polwithcheck, polrelid) || ')'), true
    FROM pg_policy WHERE classid = 'pg_policy'::regclass AND oid = objid
    UNION ALL  -- its list of columns and its condition are new in 15: asked for by name
    SELECT format('ALTER PUBLICATION %I DROP TABLE %s;', p.pubname, prrelid::regclass),
           concat('ALTER PUBLICATION ', quote_ident(p.pubname), ' ADD TABLE ', prrelid::regclass,
             (SELECT ' (' || string_agg(quote_ident(attname), ', ' ORDER BY attnum) || ')' FROM pg_attribute
              WHERE attrelid = prrelid AND to_jsonb(r) ->> 'prattrs' ~ ('\m' || attnum || '\M')),
             (SELECT ' WHERE ' || (to_jsonb(shown) ->> 'rowfilter') FROM pg_publication_tables AS shown
              WHERE shown.pubname = p.pubname AND format('%I.%I', schemaname, tablename)::regclass = prrelid), ';'), true
    FROM pg_publication_rel AS r JOIN pg_publication AS p ON p.oid = prpubid WHERE classid = 'pg_publication_rel'::regclass AND r.oid = objid
    UNION ALL  -- a generated column, which keeps its values, or a default of a view
    SELECT format('ALTER TABLE %s ALTER COLUMN %I DROP %s;', attrelid::regclass, attname, CASE attgenerated WHEN 's' THEN 'EXPRESSION' ELSE 'DEFAULT' END),
           format(CASE attgenerated WHEN 's' THEN 'ALTER TABLE %1$s ADD COLUMN %3$I %4$s GENERATED ALWAYS AS (%5$s) STORED;'
                                    ELSE 'ALTER TABLE %1$s ALTER COLUMN %2$I SET DEFAULT %5$s;' END, attrelid::regclass, attname, attname || '_generated',
                  format_type(atttypid, atttypmod), pg_get_expr(adbin, adrelid)), attgenerated <> 'v'
    FROM pg_attribute JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum WHERE classid = 'pg_class'::regclass AND attrelid = objid AND attnum = objsubid
  ) AS d (command, restore, whole) ON true
), granted (objid, all_by_owner, grants) AS (  -- on views that are dropped, where it is not what a new one has
  SELECT oid, bool_and(by_owner), format(E'\nREVOKE ALL ON %s FROM %s;', oid::regclass, (
           SELECT string_agg(DISTINCT coalesce(nullif(r::regrole::text, '-'), 'PUBLIC'), ', ')
           FROM (SELECT 0 UNION SELECT relowner UNION SELECT grantee FROM pg_default_acl, aclexplode(defaclacl) WHERE defaclobjtype = 'r') AS others (r)))
         || string_agg(format(E'\nGRANT %s ON %s TO %s%s;', privileges, oid::regclass, coalesce(nullif(grantee::regrole::text, '-'), 'PUBLIC'),
                              CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END), '' ORDER BY position)
  FROM pg_class CROSS JOIN LATERAL (
    SELECT string_agg(privilege_type || part, ', '), grantee, is_grantable, bool_and(grantor = relowner), min(position) FROM (
      SELECT a.*, '' FROM aclexplode(coalesce(relacl, acldefault('r', relowner))) WITH ORDINALITY AS a
      UNION ALL SELECT a.*, format(' (%I)', attname) FROM pg_attribute CROSS JOIN aclexplode(attacl) WITH ORDINALITY AS a WHERE attrelid = oid
    ) AS acl (grantor, grantee, privilege_type, is_grantable, position, part) GROUP BY grantee, is_grantable, part <> ''
  ) AS rights (privileges, grantee, is_grantable, by_owner, position)
  WHERE relkind = 'v' AND oid IN (SELECT objid FROM dropped) AND (relacl IS NOT NULL OR EXISTS (SELECT FROM pg_default_acl WHERE defaclobjtype = 'r')
    OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = oid AND attacl IS NOT NULL)) GROUP BY oid
), holders (kind, table_name, name, what, position, command, our_name) AS (  -- a column, and what has a name of ours on it
  SELECT kind, table_name, name, 'rename', 0, format('ALTER TABLE %s RENAME COLUMN %I', relid::regclass, name), name FROM columns WHERE kind <> 'default'
  UNION ALL
  SELECT kind, table_name, name, 'rename', 1, format('ALTER INDEX %s RENAME', oid::regclass), relname
  FROM columns JOIN pg_depend ON refobjid = relid AND refobjsubid = attnum AND classid = 'pg_class'::regclass JOIN pg_class ON oid = objid
  WHERE pg_class.relkind = 'i' AND kind <> 'default' AND relname IN (SELECT listed.our_name FROM checks AS listed)
  UNION ALL
  SELECT kind, table_name, name, 'rename', 1, format('ALTER TABLE %s RENAME CONSTRAINT %I', conrelid::regclass, conname), conname
  FROM columns JOIN pg_constraint ON conrelid = relid AND attnum = ANY (conkey)
  WHERE kind <> 'default' AND conname IN (SELECT listed.our_name FROM checks AS listed)
  UNION ALL  -- what has the name of a check; "elsewhere": it stays when the table moves
  SELECT kind, table_name, name, CASE WHEN indrelid = relid THEN 'rename' ELSE 'elsewhere' END, 0, format('ALTER %s %s RENAME',
           replace(upper((pg_identify_object('pg_class'::regclass, pg_class.oid, 0)).type), 'COMPOSITE ', ''), pg_class.oid::regclass), our_name
  FROM conflicts JOIN pg_class ON relname = our_name AND relnamespace = home LEFT JOIN pg_index ON indexrelid = pg_class.oid
  WHERE (kind = 'index' OR taken AND kind = 'key' OR kind = 'table' AND pg_class.relkind IN ('S', 'i', 'I', 'c'))
    AND NOT (conflicts.relkind = 'p' AND alterable AND indrelid = relid AND pg_get_indexdef(indexrelid) LIKE '%USING ' || expected)  -- lacks those of partitions
  UNION ALL
  SELECT kind, table_name, name, 'rename', 0, format('ALTER TABLE %s RENAME CONSTRAINT %I', relid::regclass, conname), our_name
  FROM conflicts JOIN pg_constraint ON conrelid = relid AND conname = our_name LEFT JOIN pg_attribute ON attrelid = relid AND attname = name
  WHERE kind = 'foreign key' AND (contype, conkey) IS DISTINCT FROM ('f'::"char", ARRAY[attnum])
  UNION ALL  -- a trigger; a function, and the trigger that calls it
  SELECT kind, table_name, name, 'rename', 0, format('ALTER TRIGGER %I ON %s RENAME', tgname, relid::regclass), tgname
  FROM conflicts JOIN pg_trigger ON tgrelid = relid AND NOT tgisinternal JOIN pg_proc ON pg_proc.oid = tgfoid
  WHERE kind = 'trigger' AND tgname = our_name OR kind = 'function' AND proname = our_name AND tgname IN (SELECT listed.our_name FROM checks AS listed)
  UNION ALL
  SELECT kind, table_name, name, 'elsewhere', 1, format('ALTER ROUTINE %s RENAME', pg_proc.oid::regprocedure), our_name
  FROM conflicts JOIN pg_proc ON pronamespace = home AND proname = our_name AND pronargs = 0 WHERE kind = 'function'
  UNION ALL
  SELECT kind, table_name, name, 'elsewhere', 0, format('ALTER TYPE %s RENAME', pg_type.oid::regtype), our_name
  FROM conflicts JOIN pg_type ON typname = our_name AND typnamespace = home WHERE kind = 'table' AND relid IS NULL
), pieces (kind, table_name, name, expected, piece, is_leaf, level, own, index, above) AS (  -- of a table that is partitioned as it may be
  SELECT kind, table_name, name, expected, part.relid, isleaf, level, its.own, format('%s.%I', relnamespace::regnamespace, its.own),
         format('%s.%I', (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = parentrelid),
                our_name || CASE WHEN level > 1 THEN '_' || parentrelid::oid ELSE '' END)
  FROM conflicts CROSS JOIN pg_partition_tree(conflicts.relid) AS part JOIN pg_class ON pg_class.oid = part.relid
  CROSS JOIN concat(our_name, CASE WHEN level > 0 AND kind <> 'foreign key' THEN '_' || part.relid::oid END) AS its (own)
  WHERE kind IN ('index', 'key', 'foreign key') AND conflicts.relkind = 'p' AND alterable
), facts (kind, table_name, name, what, position, command, restore, more) AS (
  SELECT kind, table_name, name, CASE WHEN is_whole THEN what ELSE 'cannot' END, position,
         CASE WHEN is_whole THEN command ELSE pg_describe_object(classid, d.objid, objsubid) END,
         concat(restore, grants, (
           SELECT string_agg(format(E'\nCOMMENT ON %s %s IS %L;', regexp_replace(upper(o.type), '.* (COLUMN|CONSTRAINT)$', '\1'), o.identity, description), '')
           FROM pg_description AS c CROSS JOIN pg_identify_object(classoid, objoid, c.objsubid) AS o
           WHERE classoid = d.classid AND objoid = d.objid AND d.objsubid = 0)), NULL::jsonb
  FROM defined AS d LEFT JOIN granted ON granted.objid = d.objid AND (classid, objsubid) = ('pg_class'::regclass, 0) CROSS JOIN LATERAL (
    SELECT whole AND all_by_owner IS NOT FALSE AND NOT (d.objsubid = 0 AND (
      EXISTS (SELECT FROM pg_depend AS part WHERE part.classid = d.classid AND part.objid = d.objid AND deptype IN ('e', 'x'))
      OR EXISTS (SELECT FROM pg_seclabel WHERE classoid = d.classid AND objoid = d.objid)))) AS it (is_whole)
  UNION ALL SELECT kind, table_name, holders.name, what, position, format('%s TO %s;', command, given.name), NULL, NULL
  FROM holders JOIN given ON base = our_name || '_old'
  UNION ALL  -- who reaches a table has to reach it in another schema, too: foreign keys are checked with the rights of the owner
  SELECT 'table', table_name, '', 'table', 0, format('ALTER %s %s', sort, relid::regclass),
         (SELECT CASE WHEN bool_or(r = 0) THEN 'PUBLIC' ELSE string_agg(r::regrole::text, ', ') END
          FROM (SELECT owner UNION SELECT grantee FROM aclexplode(nspacl) WHERE privilege_type = 'USAGE') AS reaching (r)),
         jsonb_build_object('alterable', alterable, 'namesakes', (
           SELECT string_agg(pg_class.oid::regclass::text, ', ') FROM pg_class WHERE relname = table_name AND pg_class.oid <> relid
             AND relnamespace::regnamespace::text IN (SELECT quote_ident(s) FROM json_array_elements_text(current_setting('budget_engine.path')::json) AS s)))
  FROM tables JOIN pg_namespace ON pg_namespace.oid = home WHERE relid IS NOT NULL
  UNION ALL  -- the parent of a partition, or of a child whose column has the parent's form
  SELECT kind, table_name, name, 'leave', -99, format(CASE WHEN relispartition THEN 'ALTER TABLE %1$s DETACH PARTITION %2$s;'
                                                                   ELSE 'ALTER TABLE %2$s NO INHERIT %1$s;' END, inhparent::regclass, relid::regclass),
         format(CASE WHEN relispartition THEN 'ALTER TABLE %1$s ATTACH PARTITION %2$s %3$s;' ELSE 'ALTER TABLE %2$s INHERIT %1$s;' END,
                inhparent::regclass, relid::regclass, pg_get_expr(relpartbound, relid)), NULL
  FROM conflicts JOIN pg_inherits ON inhrelid = relid JOIN pg_class ON pg_class.oid = relid
  LEFT JOIN pg_attribute ON attrelid = relid AND attname = name AND attinhcount > 0
  WHERE CASE WHEN relispartition THEN kind = 'table' ELSE kind IN ('column', 'dependants') AND attnum > 0 END
  UNION ALL
  SELECT kind, table_name, name, 'column', 0, format('ALTER TABLE %s ALTER COLUMN %I', relid::regclass, name), expression,
         jsonb_build_object('table', relid::regclass, 'name', quote_ident(name), 'type', format_type(atttypid, atttypmod), 'filled', attnotnull,
           'generated', attgenerated, 'identity', attidentity <> '', 'by_itself', expression IS NOT NULL OR attidentity <> '',
           'in_key', EXISTS (SELECT FROM pg_constraint WHERE conrelid = relid AND contype = 'p' AND attnum = ANY (conkey)),
           'valid', NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = relid AND contype = 'n' AND conkey = ARRAY[attnum] AND NOT convalidated),
           'check', quote_ident(check_name), 'checked', EXISTS (SELECT FROM pg_constraint WHERE conrelid = relid AND conname = check_name))
  FROM columns CROSS JOIN concat(table_name, '_', name, '_given') AS check_name
  UNION ALL
  SELECT kind, table_name, keys.name, 'key', 0, relid::regclass::text, columns,
         jsonb_build_object('name', given.name, 'kept_name', kept.name, 'left_over', left_over::regclass, 'kept', (
           SELECT string_agg(quote_ident(attname), ', ' ORDER BY position)
           FROM unnest(conkey) WITH ORDINALITY AS part (attnum, position) JOIN pg_attribute AS a ON attrelid = relid AND a.attnum = part.attnum
           HAVING NOT string_to_array(keys.name, ', ') <@ array_agg(attname::text)
             AND NOT EXISTS (SELECT FROM hanging WHERE classid = 'pg_constraint'::regclass AND objid = other) AND NOT EXISTS (
               SELECT FROM pg_index WHERE indrelid = relid AND indexrelid <> keys.conindid AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL
                 AND indexprs IS NULL AND indkey::int2[] <@ conkey)))
  FROM keys JOIN given ON base = our_name JOIN given AS kept ON kept.base = our_name || '_old' LEFT JOIN LATERAL (
    SELECT pg_class.oid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid = relid AND relname = our_name AND NOT indisvalid
      AND NOT EXISTS (SELECT FROM pg_constraint AS c WHERE c.conindid = indexrelid)) AS l (left_over) ON true
  UNION ALL  -- what keeps a column or a foreign key from being added
  SELECT kind, table_name, name, 'unlogged', -max(level), format('ALTER TABLE %s SET LOGGED;', oid::regclass), NULL, NULL
  FROM unlogged GROUP BY kind, table_name, name, oid
  UNION ALL
  SELECT kind, table_name, conflicts.name, blocking.* FROM conflicts JOIN family USING (table_name) JOIN pg_class USING (oid) CROSS JOIN LATERAL (
    SELECT 'typed', 0, format('ALTER TABLE %s NOT OF;', oid::regclass), NULL, NULL::jsonb WHERE reloftype <> 0
    UNION ALL SELECT 'identity', 0, format('ALTER TABLE %s REPLICA IDENTITY %s;', oid::regclass, CASE WHEN EXISTS (
                       SELECT FROM pg_index WHERE indrelid = oid AND indisprimary) THEN 'DEFAULT' ELSE 'FULL' END), NULL, NULL
    WHERE relreplident <> 'f' AND NOT EXISTS (
      SELECT FROM pg_index WHERE indrelid = oid AND CASE relreplident WHEN 'd' THEN indisprimary ELSE indisreplident END)
    UNION ALL SELECT 'child', step, format(command, oid::regclass, conflicts.name, given.name), NULL, NULL
    FROM pg_attribute JOIN given ON base = conflicts.name || '_old'
    CROSS JOIN (VALUES (1, 'ALTER TABLE %s ALTER COLUMN %I DROP NOT NULL;'), (2, 'ALTER TABLE %s RENAME COLUMN %I TO %s;')) AS steps (step, command)
    WHERE attrelid = oid AND attname = conflicts.name AND NOT attisdropped AND attinhcount = 0 AND oid <> root
      AND format_type(atttypid, atttypmod) <> regexp_replace(expected, ' NOT NULL$', '')
      AND (step = 2 OR attnotnull AND NOT atthasdef AND NOT EXISTS (
             SELECT FROM pg_constraint WHERE conrelid = attrelid AND contype = 'p' AND attnum = ANY (conkey)))
  ) AS blocking WHERE kind = 'column'
  UNION ALL  -- a partitioned table gets it partition by partition, each without keeping anybody waiting
  SELECT kind, table_name, name, 'leave', step, format(command, piece, quote_ident(own), index, above, name, expected), restore, NULL
  FROM pieces LEFT JOIN LATERAL (
    SELECT indisvalid, EXISTS (SELECT FROM pg_inherits WHERE inhrelid = indexrelid) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = piece AND relname = own AND (kind <> 'index' OR pg_get_indexdef(indexrelid) LIKE '%USING ' || expected)
  ) AS found (is_valid, is_attached) ON true CROSS JOIN LATERAL (
    SELECT level, concat(CASE WHEN NOT is_valid AND is_leaf THEN 'DROP INDEX CONCURRENTLY %3$s; ' END,
      CASE WHEN is_leaf THEN 'CREATE INDEX CONCURRENTLY %2$s ON %1$s USING %6$s;' ELSE 'CREATE INDEX %2$s ON ONLY %1$s USING %6$s;' END), NULL
    WHERE kind = 'index' AND (is_valid IS NULL OR NOT is_valid AND is_leaf)
    UNION ALL SELECT 99, 'ALTER INDEX %4$s ATTACH PARTITION %3$s;', NULL WHERE kind <> 'foreign key' AND level > 0 AND is_attached IS NOT TRUE
    UNION ALL SELECT 0, concat(CASE WHEN NOT is_valid THEN 'DROP INDEX CONCURRENTLY %3$s; ' END, 'CREATE UNIQUE INDEX CONCURRENTLY %2$s ON %1$s (%5$s);'), NULL
    WHERE kind = 'key' AND is_leaf AND is_valid IS NOT TRUE
    UNION ALL SELECT 1, concat('ALTER TABLE %1$s DROP CONSTRAINT ', replace(quote_ident(conname), '%', '%%'), ';'),
                     format('ALTER TABLE %s ADD %s;', piece, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE kind = 'key' AND level = 0 AND conrelid = piece AND contype = 'p'
      AND pg_get_constraintdef(oid) <> format('%s (%s)', expected, name)
    UNION ALL SELECT 2, CASE WHEN is_leaf THEN 'ALTER TABLE %1$s ADD %6$s USING INDEX %2$s;'
                             ELSE 'ALTER TABLE ONLY %1$s ADD CONSTRAINT %2$s %6$s (%5$s);' END, NULL
    WHERE kind = 'key' AND NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = piece AND conname = own
                                          AND pg_get_constraintdef(oid) = format('%s (%s)', expected, name))
    UNION ALL SELECT step, format('ALTER TABLE %%1$s %s;', command), NULL
    FROM (VALUES (1, 'ADD CONSTRAINT %2$s FOREIGN KEY (%5$s) %6$s NOT VALID'), (2, 'VALIDATE CONSTRAINT %2$s'),
                 (3, 'ADD CONSTRAINT %2$s FOREIGN KEY (%5$s) %6$s')) AS of (step, command)
    LEFT JOIN pg_constraint ON conrelid = piece AND conname = own AND conparentid = 0
     AND regexp_replace(pg_get_constraintdef(oid), '^FOREIGN KEY [^)]*[)] | NOT VALID$', '', 'g') = expected
    WHERE kind = 'foreign key' AND CASE step WHEN 1 THEN is_leaf AND oid IS NULL WHEN 2 THEN convalidated IS NOT TRUE AND (is_leaf OR oid IS NOT NULL)
                                             ELSE level = 0 AND oid IS NULL END
  ) AS way (step, command, restore)
  UNION ALL  -- partitioned otherwise: years of rows go to a new table day by day, while the old one is in use
  SELECT 'table', tables.table_name, '', 'elsewhere', way.*, NULL, NULL
  FROM tables JOIN given AS new ON new.base = tables.table_name JOIN given AS old ON old.base = tables.table_name || '_old'
  JOIN checks AS key ON key.kind = 'key' AND key.table_name = tables.table_name CROSS JOIN concat(home::regnamespace, '.', new.name) AS copy
  CROSS JOIN LATERAL (
    SELECT 0, format('CREATE TABLE %s (LIKE %s INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING COMMENTS, PRIMARY KEY (%s));',
                     copy, relid::regclass, key.name)
    UNION ALL SELECT 1, format('ALTER TABLE %s OWNER TO %s;', copy, owner::regrole)
    UNION ALL SELECT 1, format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY;', copy) FROM pg_class WHERE oid = relid AND relrowsecurity
    UNION ALL SELECT 2, format('GRANT %s ON %s TO %s;', string_agg(privilege_type, ', '), copy, coalesce(nullif(grantee::regrole::text, '-'), 'PUBLIC'))
    FROM pg_class CROSS JOIN aclexplode(relacl) WHERE oid = relid AND grantee <> owner GROUP BY grantee
    UNION ALL SELECT 3, '-- day by day, the newest first; to keep no more than some of them, name the first one in place of the query:'
    UNION ALL SELECT 4, format($command$DO $batches$ DECLARE
  first CONSTANT date := (SELECT min(created_at) FROM %2$s WHERE isfinite(created_at));
  day date := (SELECT max(created_at) FROM %2$s WHERE isfinite(created_at));
BEGIN
  WHILE day >= first LOOP
    INSERT INTO %1$s SELECT * FROM %2$s WHERE created_at >= day AND created_at < day + 1 ON CONFLICT DO NOTHING;
    COMMIT;
    day := day - 1;
  END LOOP;
END $batches$;$command$, copy, relid::regclass)
    UNION ALL SELECT 5, 'BEGIN;' UNION ALL SELECT 6, format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE;', relid::regclass)
    UNION ALL SELECT 7, format('INSERT INTO %1$s SELECT * FROM %2$s WHERE created_at >= (SELECT max(created_at)::date FROM %1$s) ON CONFLICT DO NOTHING;',
                               copy, relid::regclass)
    UNION ALL SELECT 8, format('ALTER INDEX %s RENAME TO %s;', pg_class.oid::regclass, free.name)
    FROM checks AS named JOIN pg_class ON relname = named.our_name JOIN pg_index ON indexrelid = pg_class.oid AND indrelid = relid
    JOIN given AS free ON free.base = named.our_name || '_old' WHERE named.table_name = tables.table_name AND named.kind = 'index'
    UNION ALL SELECT 9, format('ALTER TABLE %s RENAME TO %s;', relid::regclass, old.name)
    UNION ALL SELECT 10, format('ALTER TABLE %s RENAME TO %I;', copy, tables.table_name) UNION ALL SELECT 11, 'COMMIT;'
    UNION ALL SELECT 12, '-- triggers, policies and views stay with the old one, as do rows that share a key; its partitions can be dropped one by one'
  ) AS way
  WHERE tables.relkind = 'p' AND NOT alterable AND strpos(copy, '$') = 0 AND NOT EXISTS (  -- nothing else is unique in it, or leads to it
    SELECT FROM checks AS c WHERE c.table_name = tables.table_name AND c.kind = 'key' AND c.name <> key.name
       OR c.kind = 'foreign key' AND starts_with(c.expected, format('REFERENCES %s(', relid::regclass)))
    AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = relid AND attname = key.name AND NOT attisdropped) AND EXISTS (
      SELECT FROM pg_attribute WHERE attrelid = relid AND attname = 'created_at' AND atttypid = ANY ('{timestamptz,timestamp,date}'::regtype[]))
  UNION ALL SELECT '', '', '', 'archive', n, archive, NULL, NULL FROM generate_series(1, 99) AS n CROSS JOIN concat('archive', '_' || nullif(n, 1)) AS archive
  WHERE NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = archive)
)
SELECT kind, table_name, name, what, command, restore, more FROM facts ORDER BY position, command;
