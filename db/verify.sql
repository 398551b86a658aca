-- Every object that the steps create, one line each: what is expected, what the database has, who fixes the difference.
--   psql "$DATABASE_URL" -f db/verify.sql     or: invoke verify
--
-- A check that does not pass is fixed by a step; required and fixed by none, it is a conflict. Of older core tables only what others need is required.
\set ON_ERROR_STOP on
BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;
SET LOCAL jit = off;
-- Where tables are looked for is noted; then no function or operator of others is in reach.
DO $$ BEGIN
  PERFORM pg_catalog.set_config('budget_engine.path', pg_catalog.array_to_json(pg_catalog.current_schemas(false))::pg_catalog.text, true),
          pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
END $$;

WITH path (schema, position) AS (
  SELECT oid, position FROM json_array_elements_text(current_setting('budget_engine.path')::json) WITH ORDINALITY AS listed (name, position)
  JOIN pg_namespace ON nspname = listed.name WHERE position = 1 OR oid <> pg_my_temp_schema()  -- a pooler's other clients leave temporary tables
), supabase (here) AS (  -- a row where auth.users (id uuid) exists
  SELECT EXISTS (SELECT FROM pg_proc WHERE pronamespace = auth.oid AND proname = 'uid' AND pronargs = 0)
         AND to_regrole('service_role') IS NOT NULL AND to_regrole('authenticated') IS NOT NULL
  FROM pg_namespace AS auth JOIN pg_class ON relnamespace = auth.oid AND relname = 'users'
  JOIN pg_attribute ON attrelid = pg_class.oid AND attname = 'id' AND atttypid = 'uuid'::regtype WHERE nspname = 'auth'
), profiles (profiles_oid, complete) AS (
  SELECT attrelid, count(*) = 2 FROM pg_attribute
  WHERE attrelid = (SELECT pg_class.oid FROM path JOIN pg_class ON relnamespace = schema AND relname = 'profiles' ORDER BY position LIMIT 1)
    AND (attname = 'role' OR attname = 'id' AND atttypid = 'uuid'::regtype) GROUP BY attrelid
), created (step, table_name, columns) AS (VALUES
  -- The first column is the primary key. ! NOT NULL; -> what it references; = its default, where that is a check, too ("=" alone: none)
  ('core_schema', 'worlds', 'id text!, version text!, status text!, doc jsonb!, created_at timestamptz!, updated_at timestamptz!'),
  ('core_schema', 'rulesets', 'id text!, version text!, status text!, doc jsonb!, created_at timestamptz!, updated_at timestamptz!'),
  ('core_schema', 'entry_points', 'id text!, slug text!, type text!, world_id text! -> worlds ON DELETE RESTRICT, '
    'ruleset_id text! -> rulesets ON DELETE RESTRICT, title text!, subtitle text, description text!, synopsis text, status text!, visibility text!, '
    'content_rating text!, tags text[]!, content jsonb!, i18n jsonb!, search_text tsvector, sort_weight int!, popularity_score int!, '
    'created_at timestamptz!, updated_at timestamptz!'),
  ('core_schema', 'prompt_segments', 'id bigint!, scope text!, ref_id text, version text!, active boolean!, content text!, metadata jsonb!, '
    'created_at timestamptz!, updated_at timestamptz!'),
  ('core_schema', 'games', 'id uuid!, entry_point_id text! -> entry_points ON DELETE RESTRICT, entry_point_type text!, '
    'world_id text! -> worlds ON DELETE RESTRICT, ruleset_id text! -> rulesets ON DELETE RESTRICT, owner_user_id uuid, state jsonb!, turn_count int!, '
    'status text!, created_at timestamptz!, updated_at timestamptz!'),
  ('core_schema', 'turns', 'id bigint!, game_id uuid! -> games ON DELETE CASCADE, idx int!, role text!, prompt_meta jsonb!, content jsonb!, costs jsonb!, '
    'created_at timestamptz!'),
  ('slots_templates', 'slots', 'id uuid!, type text!, name text!, description text!, max_len int, priority int, created_at timestamptz!, '
    'updated_at timestamptz!'),
  ('slots_templates', 'templates', 'id uuid!, type text!, slot text!, version int!, body text!, status text!, created_at timestamptz!, created_by uuid'),
  ('prompt_snapshots', 'prompt_snapshots', 'id uuid!, snapshot_id uuid!, templates_version text, pack_versions jsonb, tp jsonb!, '
    'linearized_prompt_text text!, awf_contract text!, source text!, created_at timestamptz!, created_by uuid, game_id uuid -> games ON DELETE SET NULL'),
  ('turn_metrics', 'turn_metrics', 'turn_id bigint! -> turns ON DELETE CASCADE =, story_id uuid! =, created_at timestamptz! = now(), tokens_before int! =, '
    'tokens_after int! =, trims_count int! = 0, top_trim_keys text[] = ''{}''::text[], model_ms int =, rejects jsonb = ''{}''::jsonb, '
    'cost_estimate_cents int =')
), added (step, table_name, columns, new_table_has_them, replaces) AS (VALUES  -- replaces: the type that the step itself makes the expected one of
  ('slots_templates', 'prompt_snapshots', 'parent_id uuid -> prompt_snapshots ON DELETE SET NULL =', true, NULL),
  ('fix_prompt_snapshots_turn_id', 'prompt_snapshots', 'turn_id bigint -> turns ON DELETE SET NULL =', true, 'uuid'),
  ('slots_flags', 'slots', 'must_keep boolean! = false, min_chars int =', false, NULL),
  ('budget_report', 'prompt_snapshots', 'budget_report jsonb =', false, NULL)
), specs AS (
  SELECT *, split_part(spec, ' ', 1) AS name, split_part(spec, ' ', 2) AS type, split_part(split_part(spec, ' -> ', 2), ' =', 1) AS link
  FROM (SELECT *, false AS addable, NULL AS replaces FROM created UNION ALL SELECT step, table_name, columns, true, replaces FROM added) AS c
  CROSS JOIN string_to_table(columns, ', ') AS spec
), columns (step, table_name, name, form, default_value, target, reference, addable, replaces) AS (
  SELECT step, table_name, name, type_names ->> rtrim(type, '!') || CASE WHEN type LIKE '%!' THEN ' NOT NULL' ELSE '' END,
         CASE WHEN spec LIKE '% =%' THEN coalesce(nullif(split_part(spec, ' = ', 2), ''), 'none') END,
         nullif(split_part(link, ' ', 1), ''), 'REFERENCES ' || replace(link, ' ON', '(id) ON'), addable, replaces
  FROM (SELECT jsonb_object_agg(type, format_type(to_regtype(type), -1)) FROM (SELECT DISTINCT rtrim(type, '!') AS type FROM specs) AS t) AS t (type_names)
  CROSS JOIN specs
), keys (step, table_name, columns, form, our_name, addable) AS (  -- our_name: where the step gives its index a name
  SELECT step, table_name, split_part(columns, ' ', 1), 'PRIMARY KEY', NULL, false FROM created
  UNION ALL (VALUES
    ('core_schema', 'entry_points', 'slug', 'UNIQUE', NULL, false),
    ('core_schema', 'turns', 'game_id, idx', 'UNIQUE', 'idx_turns_game_idx', true),
    ('slots_templates', 'slots', 'type, name', 'UNIQUE', 'uk_slots_type_name', false),
    ('slots_templates', 'templates', 'type, slot, version', 'UNIQUE', 'uk_templates_type_slot_version', false),
    ('prompt_snapshots', 'prompt_snapshots', 'snapshot_id', 'UNIQUE', 'uk_prompt_snapshots_snapshot_id', false))
), indexes (step, table_name, name, form) AS (
  SELECT step, table_name, split_part(listed, ' ', 1), substr(listed, strpos(listed, ' ') + 1) FROM (VALUES
    ('core_schema', 'entry_points', 'idx_entry_points_type btree (type); idx_entry_points_world btree (world_id); '
      'idx_entry_points_ruleset btree (ruleset_id); idx_entry_points_status_vis btree (status, visibility); '
      'idx_entry_points_tags gin (tags); idx_entry_points_search gin (search_text)'),
    ('core_schema', 'prompt_segments', 'idx_prompt_segments_scope btree (scope); idx_prompt_segments_ref btree (ref_id)'),
    ('core_schema', 'games', 'idx_games_owner btree (owner_user_id); idx_games_entry_point btree (entry_point_id); idx_games_world btree (world_id)'),
    ('slots_templates', 'slots', 'idx_slots_type btree (type)'),
    ('slots_templates', 'templates', 'idx_templates_type_slot btree (type, slot); idx_templates_status btree (status); '
      'idx_templates_type_slot_status btree (type, slot, status)'),
    ('prompt_snapshots', 'prompt_snapshots', 'idx_prompt_snapshots_created_at btree (created_at DESC); idx_prompt_snapshots_game_id btree (game_id); '
      'idx_prompt_snapshots_source btree (source); idx_prompt_snapshots_created_by btree (created_by); idx_prompt_snapshots_parent_id btree (parent_id)'),
    ('fix_prompt_snapshots_turn_id', 'prompt_snapshots', 'idx_prompt_snapshots_turn_id btree (turn_id)'),
    ('slots_flags', 'slots', 'idx_slots_must_keep btree (must_keep) WHERE must_keep'),
    ('turn_metrics', 'turn_metrics', 'idx_turn_metrics_story_created btree (story_id, created_at DESC); idx_turn_metrics_created btree (created_at DESC)')
  ) AS of_table (step, table_name, forms) CROSS JOIN string_to_table(forms, '; ') AS listed
), policies (suffix, form, tables) AS (VALUES  -- admin: the user's row in profiles says so
  ('_service_role', 'ALL TO service_role USING (true) WITH CHECK (true)', (SELECT array_agg(table_name) FROM created)),
  ('_admin', 'ALL TO authenticated USING (admin) WITH CHECK (admin)', '{slots,templates}'),
  ('_admin_select', 'SELECT TO authenticated USING (admin)', '{prompt_snapshots,turn_metrics}'),
  ('_admin_insert', 'INSERT TO authenticated WITH CHECK (admin)', '{prompt_snapshots}'),
  ('_admin_update', 'UPDATE TO authenticated USING (admin) WITH CHECK (admin)', '{prompt_snapshots}')
), tables AS (  -- home: the schema where it is, or will be: beside others of its step
  SELECT c.*, found.*, coalesce(schema, max(schema) OVER (PARTITION BY creator), (SELECT schema FROM path WHERE position = 1)) AS home
  FROM created AS c (creator, table_name) LEFT JOIN LATERAL (
    SELECT pg_class.oid AS relation, schema, relkind, relpersistence, relispartition, relrowsecurity, relowner
    FROM path JOIN pg_class ON relname = c.table_name AND relnamespace = schema ORDER BY position LIMIT 1) AS found ON true
), attributes AS MATERIALIZED (
  SELECT table_name, attrelid, attnum, attname, atttypid, atttypmod, format_type(atttypid, NULL) AS type, attnotnull, attgenerated, attidentity, attinhcount
  FROM tables JOIN pg_attribute ON attrelid = relation AND attnum > 0 AND NOT attisdropped
), expected (position, step, kind, table_name, name, form, addable, our_name, replaces) AS (  -- addable: to a table that exists, too
  SELECT row_number() OVER (), listed.* FROM (
    SELECT step, 'table', table_name, '', 'table', false, NULL, NULL FROM created
    UNION ALL SELECT step, 'column', table_name, name, form, addable, NULL, replaces FROM columns
    UNION ALL SELECT step, 'default', table_name, name, default_value, true, NULL, NULL FROM columns WHERE default_value IS NOT NULL
    UNION ALL SELECT step, 'dependants', table_name, name, 'none', false, NULL, NULL FROM columns WHERE replaces IS NOT NULL
    UNION ALL SELECT step, 'key', table_name, columns, form, addable, our_name, NULL FROM keys
    UNION ALL SELECT step, 'foreign key', table_name, name, reference, addable OR step = 'turn_metrics', concat(table_name, '_', name, '_fkey'), NULL
    FROM columns WHERE target IS NOT NULL
    UNION ALL SELECT step, 'foreign key', table_name, name, 'REFERENCES auth.users(id) ON DELETE SET NULL', false, table_name || '_created_by_fkey', NULL
    FROM columns CROSS JOIN supabase WHERE name = 'created_by'
    UNION ALL SELECT step, 'index', table_name, name, form, true, name, NULL FROM indexes
    UNION ALL SELECT step, 'comment', table_name, name, 'present', true, NULL, NULL FROM columns WHERE step IN ('slots_flags', 'budget_report', 'turn_metrics')
    UNION ALL (VALUES
      ('turn_metrics', 'comment', 'turn_metrics', '', 'present', true, NULL, NULL),
      ('core_schema', 'function', 'entry_points', 'update_entry_points_search_text',
       'trigger, search_path=pg_catalog, owned like the table, source md5 df56eafa3c3dfc013e0c6b78fef6a771', false, NULL, NULL),
      ('core_schema', 'trigger', 'entry_points', 'trigger_update_entry_points_search_text',
       'BEFORE INSERT OR UPDATE OF title, synopsis, description, tags, search_text ON entry_points FOR EACH ROW EXECUTE FUNCTION '
       'update_entry_points_search_text()', false, NULL, NULL),
      ('slots_flags', 'function', 'slots', 'critical_slot_defaults',
       'record, search_path=pg_catalog, pg_temp, owned like the table, source md5 c8c129144acce677f8e957514c6767cf', true, NULL, NULL),
      ('slots_flags', 'function', 'slots', 'set_critical_slot_defaults',
       'trigger, search_path=pg_catalog, pg_temp, owned like the table, source md5 7563a34e97275356579518fa5e5d8975', true, NULL, NULL),
      ('slots_flags', 'trigger', 'slots', 'trigger_slots_critical_defaults',
       'BEFORE INSERT ON slots FOR EACH ROW WHEN (NOT new.must_keep AND new.min_chars IS NULL) EXECUTE FUNCTION set_critical_slot_defaults()',
       true, NULL, NULL))
    -- Supabase: of core tables, those that the step creates (they have its policy); policies where none of others is
    UNION ALL SELECT step, 'row-level security', table_name, '', 'on', true, NULL, NULL
    FROM created JOIN tables USING (table_name) CROSS JOIN supabase WHERE here AND (step <> 'core_schema' OR tables.relation IS NULL
      OR EXISTS (SELECT FROM pg_policy WHERE polrelid = tables.relation AND polname = table_name || '_service_role'))
    UNION ALL SELECT step, 'policy', table_name, table_name || suffix, form, step <> 'core_schema', NULL, NULL
    FROM created JOIN tables USING (table_name) JOIN policies ON table_name = ANY (policies.tables) CROSS JOIN supabase LEFT JOIN profiles ON true
    WHERE here AND (suffix = '_service_role' OR profiles.complete) AND (step <> 'core_schema' OR tables.relation IS NULL)
      AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = tables.relation AND polname <> 'Service role can manage ' || table_name  -- older files' own
                        AND polname <> ALL (SELECT table_name || p.suffix FROM policies AS p WHERE table_name = ANY (p.tables)))
  ) AS listed
), actual (kind, table_name, name, form) AS (
  SELECT 'table', table_name, '', CASE WHEN relpersistence = 't' THEN 'temporary table' WHEN relispartition THEN 'partition'
    WHEN (SELECT bool_and(columns ~ ('\m' || substring(pg_get_partkeydef(relation) FROM '[(](\w+)[)]$') || '\M')) FROM keys AS k  -- its keys hold it
          WHERE k.table_name = tables.table_name AND NOT addable) THEN 'table' ELSE json '{"r": "table", "p": "partitioned table", "v": "view",
    "m": "materialized view", "f": "foreign table", "S": "sequence", "c": "type", "i": "index", "I": "index"}' ->> relkind::text END
  FROM tables WHERE relation IS NOT NULL
  UNION ALL SELECT 'table', table_name, '', 'type' FROM tables JOIN pg_type ON typname = table_name AND typnamespace = home WHERE relation IS NULL
  UNION ALL SELECT 'column', table_name, attname, concat_ws(' ', format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN 'NOT NULL' END,
           CASE WHEN conname IS NOT NULL THEN 'NOT VALID' END, CASE WHEN attgenerated <> '' THEN 'GENERATED' END)
  FROM attributes LEFT JOIN pg_constraint ON conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated
  UNION ALL SELECT 'default', table_name, attname, coalesce(pg_get_expr(adbin, adrelid), 'none')
  FROM attributes LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
  WHERE attgenerated = '' AND (attname, type) NOT IN (SELECT name, replaces FROM columns WHERE replaces IS NOT NULL)  -- that goes along
  -- what hangs on a column that is to be replaced, besides its documented index, its default and its NOT NULL
  UNION ALL SELECT 'dependants', table_name, attname, string_agg(DISTINCT hanging.what, ', ')
  FROM columns JOIN attributes USING (table_name) CROSS JOIN LATERAL (
    SELECT pg_describe_object(classid, objid, objsubid) FROM pg_depend
    WHERE refclassid = 'pg_class'::regclass AND refobjid = attrelid AND refobjsubid = attnum
      AND NOT (classid = 'pg_attrdef'::regclass AND deptype = 'a' AND objid IN (SELECT oid FROM pg_attrdef WHERE adrelid = attrelid AND adnum = attnum))
      AND NOT (classid = 'pg_constraint'::regclass AND objid IN (SELECT oid FROM pg_constraint WHERE contype = 'n'))
      AND NOT (classid = 'pg_class'::regclass AND objid IN (
                 SELECT indexrelid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN indexes ON relname = indexes.name
                 WHERE indrelid = attrelid AND indnatts = 1 AND indkey[0] = attnum AND NOT indisunique AND indpred IS NULL AND NOT indisreplident))
    UNION ALL SELECT 'the column itself is generated or an identity' WHERE attgenerated <> '' OR attidentity <> ''
    UNION ALL SELECT 'inherited from ' || inhparent::regclass FROM pg_inherits WHERE inhrelid = attrelid AND attinhcount > 0
    UNION ALL SELECT format('trigger %s, whose function mentions %s', tgname, attname) FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
    WHERE tgrelid = attrelid AND NOT tgisinternal AND prosrc ~ ('[^a-z_]' || attname || '[^a-z_]')
    UNION ALL  -- with a list of columns (new in 15) it depends on the column
    SELECT format('publication %s: its subscribers lack the kept column', pubname)
    FROM pg_publication_rel JOIN pg_publication ON pg_publication.oid = prpubid WHERE prrelid = attrelid AND to_jsonb(pg_publication_rel) ->> 'prattrs' IS NULL
  ) AS hanging (what) WHERE attname = columns.name AND type = replaces GROUP BY table_name, attname
  UNION ALL SELECT 'key', table_name, key.columns, CASE WHEN bool_or(indisprimary) THEN 'PRIMARY KEY' ELSE 'UNIQUE' END  -- columns in alphabetical order
  FROM tables JOIN pg_index ON indrelid = relation AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL AND indexprs IS NULL
  CROSS JOIN LATERAL (SELECT string_agg(attname, ', ' ORDER BY attname) FROM attributes
                      WHERE attrelid = indrelid AND attnum = ANY ((indkey::int2[])[0:indnkeyatts - 1])) AS key (columns)
  GROUP BY table_name, key.columns
  UNION ALL SELECT 'foreign key', attributes.table_name, attname,
         regexp_replace(replace(pg_get_constraintdef(pg_constraint.oid), format(' REFERENCES %s(', confrelid::regclass),
                                format(' REFERENCES %s(', coalesce(target.table_name, confrelid::regclass::text))), '^FOREIGN KEY [(].*?[)] ', '')
  FROM attributes JOIN pg_constraint ON conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'f'
   AND conparentid = 0 LEFT JOIN tables AS target ON relation = confrelid  -- one more leads to each partition
  UNION ALL SELECT 'index', table_name, relname, concat_ws(' ', CASE WHEN indisunique THEN 'UNIQUE' END,
           replace(regexp_replace(substring(pg_get_indexdef(indexrelid) FROM ' USING (.*)$'), ' WITH [(][^)]*[)]', ''),
                   ' WHERE (must_keep = true)', ' WHERE must_keep'), CASE WHEN NOT indisvalid THEN 'INVALID' END)
  FROM tables JOIN pg_index ON indrelid = tables.relation JOIN pg_class ON pg_class.oid = indexrelid
  UNION ALL SELECT 'comment', tables.table_name, coalesce(attname, ''), 'present'  -- any will do
  FROM tables JOIN pg_description ON objoid = tables.relation AND classoid = 'pg_class'::regclass
  LEFT JOIN attributes ON attrelid = objoid AND attnum = objsubid
  UNION ALL SELECT 'row-level security', table_name, '', CASE WHEN relrowsecurity THEN 'on' ELSE 'off' END FROM tables WHERE relation IS NOT NULL
  UNION ALL SELECT 'policy', table_name, polname, concat(
           CASE polcmd WHEN '*' THEN 'ALL' WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' ELSE 'DELETE' END,
           ' TO ', (SELECT string_agg(coalesce(rolname, 'PUBLIC'), ', ') FROM unnest(polroles) AS role LEFT JOIN pg_roles ON pg_roles.oid = role),
           CASE WHEN NOT polpermissive THEN ' AS RESTRICTIVE' END,
           (SELECT string_agg(format(' %s (%s)', clause,
                     CASE regexp_replace(replace(expression, profiles_oid::regclass::text, 'profiles'), '[[:space:]]|[()]|::[[:alnum:]_]+', '', 'g')
                       WHEN 'EXISTSSELECT1FROMprofilespWHEREp.id=SELECTauth.uidASuidANDp.role=''admin''' THEN 'admin' ELSE expression END), '')
            FROM (VALUES ('USING', pg_get_expr(polqual, polrelid)), ('WITH CHECK', pg_get_expr(polwithcheck, polrelid))) AS c (clause, expression)
            WHERE expression IS NOT NULL))
  FROM tables JOIN pg_policy ON polrelid = tables.relation LEFT JOIN profiles ON true
  UNION ALL SELECT 'trigger', table_name, tgname, concat(
           replace(regexp_replace(split_part(pg_get_triggerdef(pg_trigger.oid, true), ' EXECUTE ', 1), '^CREATE TRIGGER [^ ]+ ', ''),
                   format(' ON %s ', tgrelid::regclass), format(' ON %s ', table_name)),
           ' EXECUTE FUNCTION ', CASE WHEN pronamespace <> home THEN pronamespace::regnamespace || '.' END, proname, '()',
           CASE WHEN tgenabled NOT IN ('O', 'A') THEN ', disabled' END)
  FROM tables JOIN pg_trigger ON tgrelid = tables.relation AND NOT tgisinternal JOIN pg_proc ON pg_proc.oid = tgfoid
  -- beside the table, or where it will be; what a trigger's function calls must be for everybody to call
  UNION ALL SELECT 'function', expected.table_name, proname, concat_ws(', ',
           CASE WHEN prokind = 'f' THEN prorettype::regtype::text ELSE 'not a function' END, array_to_string(proconfig, ', '),
           CASE WHEN proowner = coalesce(relowner, current_user::regrole) THEN 'owned like the table' ELSE 'owned by ' || proowner::regrole END,
           CASE WHEN prosecdef THEN 'SECURITY DEFINER' END, CASE WHEN prorettype <> 'trigger'::regtype AND NOT EXISTS (
                  SELECT FROM aclexplode(coalesce(proacl, acldefault('f', proowner))) WHERE grantee = 0) THEN 'not for everybody to call' END,
           'source md5 ' || md5(replace(prosrc, E'\r', '')))
  FROM expected JOIN tables USING (table_name) JOIN pg_proc ON pronamespace = home AND proname = expected.name AND pronargs = 0 AND kind = 'function'
), compared AS (
  SELECT DISTINCT ON (expected.position) expected.*, tables.creator, tables.relation, tables.relkind,
         -- of a table that exists, not what came with it; a core table is its application's but for what foreign keys lead to
         expected.step <> 'core_schema' AND (expected.addable OR expected.kind <> 'foreign key') OR tables.relation IS NULL
         OR expected.kind IN ('row-level security', 'policy')
         OR (expected.kind, expected.name) IN (('table', ''), ('column', 'id'), ('key', 'id')) AND (expected.table_name IN ('games', 'turns')
            OR EXISTS (SELECT FROM columns JOIN tables AS child USING (table_name) WHERE target = expected.table_name AND child.relation IS NULL)) AS required,
         coalesce(CASE WHEN expected.kind = 'key' AND expected.form = 'UNIQUE' THEN left(actual.form, 0) || 'UNIQUE' ELSE actual.form END,
                  (SELECT CASE WHEN indrelid = tables.relation AND NOT indisvalid THEN expected.form || ' INVALID'
                          ELSE format('missing, and its name %s is taken by %s', relname, coalesce('an index on ' || indrelid::regclass, 'no index')) END
                   FROM pg_class LEFT JOIN pg_index ON indexrelid = pg_class.oid
                   WHERE expected.kind <> 'foreign key' AND relname = expected.our_name AND relnamespace = tables.home
                     AND (indrelid = tables.relation IS NOT TRUE OR expected.addable)),
                  (SELECT format('missing, and its name %s is taken by %s', conname, pg_get_constraintdef(oid)) FROM pg_constraint
                   WHERE expected.kind = 'foreign key' AND conname = expected.our_name AND conrelid = tables.relation AND conparentid = 0)) AS actual
  FROM expected JOIN tables USING (table_name) LEFT JOIN actual ON actual.kind = expected.kind AND actual.table_name = expected.table_name
   AND actual.name = CASE expected.kind WHEN 'key'
       THEN (SELECT string_agg(part, ', ' ORDER BY part COLLATE "C") FROM string_to_table(expected.name, ', ') AS part) ELSE expected.name END
  ORDER BY expected.position,  -- of several foreign keys on one column, the one that differs acts beside the expected one
           actual.form NOT IN (expected.form, expected.form || ' NOT VALID') DESC, actual.form
), checks AS MATERIALIZED (
  SELECT compared.*, CASE
           WHEN actual = form OR kind = 'dependants' THEN NULL
           WHEN NOT required AND (NOT addable OR kind NOT IN ('index', 'key') OR relkind <> 'r' OR EXISTS (  -- its indexes, where it has what they need
                  SELECT FROM string_to_table(coalesce(substring(form FROM '[(](.*)[)]'), name), ', ') AS part
                  WHERE NOT EXISTS (SELECT FROM attributes WHERE attrelid = relation AND attname = part
                    AND (form NOT LIKE 'gin %' OR type IN ('text[]', 'jsonb', 'tsvector'))))) THEN NULL
           WHEN kind IN ('index', 'foreign key') AND relkind = 'p' THEN NULL
           WHEN actual = form || CASE WHEN kind = 'foreign key' THEN ' NOT VALID' WHEN addable THEN ' INVALID' END THEN step
           WHEN kind = 'row-level security' OR kind = 'default' AND actual = 'none' OR kind = 'column' AND replaces = split_part(actual, ' ', 1) THEN step
           WHEN addable AND (kind = 'trigger' AND actual NOT LIKE 'CREATE CONSTRAINT %' OR kind = 'function'
                  AND actual LIKE split_part(form, ',', 1) || ', %' AND actual NOT LIKE '%, owned by %') THEN step
           WHEN step = 'core_schema' AND kind IN ('table', 'column', 'key') AND NOT addable AND relkind IN ('r', 'p', 'v', 'm', 'f') THEN 'recreate_core_schema'
           WHEN actual IS NOT NULL OR relation IS NOT NULL AND NOT addable THEN NULL
           WHEN relation IS NULL AND kind IN ('column', 'default', 'key', 'foreign key', 'index')
                AND step NOT IN (SELECT step FROM added WHERE NOT new_table_has_them) THEN creator
           ELSE step END AS fixed_by FROM compared
)
SELECT step, kind, table_name AS "table", name, form AS expected, actual, fixed_by, required, relation::regclass AS found,
       CASE WHEN actual = form THEN 'ok'
            ELSE concat_ws(', ', CASE WHEN actual IS NULL THEN 'missing' ELSE 'differs' END,
                           CASE WHEN fixed_by IS NOT NULL THEN 'fixed by ' || fixed_by WHEN required THEN 'conflict' ELSE 'not required' END) END AS verdict
FROM checks
WHERE kind <> 'dependants' OR actual IS NOT NULL
ORDER BY position;
COMMIT;
