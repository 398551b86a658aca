-- What is unusual around the tables of the chain, for `invoke status` to tell: what, in words, and what changes it.
--
-- :'tables' is a JSON object: each table by its name, as SQL writes it where it was found, or null. Reads the catalogs only, with the
-- search_path pinned as in verify.sql.
WITH listed (name, found) AS (
  SELECT * FROM json_each_text(:'tables')
), tables (name, relation) AS (
  SELECT name, pg_class.oid FROM listed JOIN pg_class ON pg_class.oid = to_regclass(found)::oid
), elsewhere AS (
  SELECT format('%I.%I', nspname, relname) AS name, row_number() OVER (ORDER BY nspname, relname) AS number, count(*) OVER () AS total
  FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
  WHERE relname IN (SELECT listed.name FROM listed) AND relkind IN ('r', 'p', 'v', 'm', 'f')
    AND pg_class.oid NOT IN (SELECT relation FROM tables) AND nspname !~ '^pg_' AND nspname <> 'information_schema'
), supabase (profiles) AS (  -- a row where auth.uid() exists: its profiles, or NULL where they make no admins
  SELECT (SELECT attrelid FROM pg_attribute WHERE attrelid = (
            SELECT pg_class.oid FROM json_array_elements_text(current_setting('budget_engine.path')::json) WITH ORDINALITY AS path (schema, position)
            JOIN pg_namespace ON nspname = path.schema JOIN pg_class ON relname = 'profiles' AND relnamespace = pg_namespace.oid AND relkind IN ('r', 'p')
            ORDER BY position LIMIT 1) AND (attname = 'role' OR attname = 'id' AND atttypid = 'uuid'::regtype)
          GROUP BY attrelid HAVING count(*) = 2 AND to_regrole('authenticated') IS NOT NULL)
  FROM pg_proc JOIN pg_namespace AS n ON n.oid = pronamespace WHERE nspname = 'auth' AND proname = 'uid' AND pronargs = 0
), applying AS (  -- the policies of profiles that let users of the API do something
  SELECT polname, polcmd, concat_ws(' ', pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)) AS condition
  FROM supabase JOIN pg_policy ON polrelid = profiles
  WHERE polpermissive AND polroles && ARRAY[0::oid, to_regrole('authenticated')::oid, to_regrole('anon')::oid]
), held (privilege, grantee, attname) AS (  -- what everybody, or authenticated, may do with which column of profiles
  SELECT privilege_type, grantee, attname FROM supabase JOIN pg_class ON pg_class.oid = profiles
  JOIN pg_attribute ON attrelid = profiles AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
  CROSS JOIN LATERAL (SELECT * FROM aclexplode(relacl) UNION ALL SELECT * FROM aclexplode(attacl)) AS granted
  WHERE grantee IN (0::oid, to_regrole('authenticated')::oid)
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
WHERE may.what IS NOT NULL AND EXISTS (SELECT FROM supabase)
UNION ALL  -- what the policies of ours ask, authenticated has to be able to read
SELECT 'profiles', 'authenticated may not read id and role of profiles, so that nobody counts as an admin',
       format('GRANT SELECT (id, role) ON %s TO authenticated;', profiles::regclass)
FROM supabase WHERE profiles IS NOT NULL AND 2 > (SELECT count(*) FROM pg_attribute WHERE attrelid = profiles AND attname IN ('id', 'role')
                         AND has_column_privilege(to_regrole('authenticated'), attrelid, attname, 'SELECT'))
UNION ALL
SELECT 'profiles', 'no policy of profiles shows a user his own row, so that nobody counts as an admin',
       format('CREATE POLICY profiles_own ON %s FOR SELECT TO authenticated USING (id = (SELECT auth.uid()));', profiles::regclass)
FROM supabase JOIN pg_class ON pg_class.oid = profiles AND relrowsecurity
WHERE NOT EXISTS (SELECT FROM applying WHERE polcmd IN ('r', '*'))
UNION ALL  -- unless a trigger may keep him from it
SELECT 'profiles', format('authenticated may %s profiles.role%s: any user can make himself an admin', lower(may.what),
                          ' (policy ' || string_agg(DISTINCT polname, ', ') || ')'),
       (SELECT string_agg(concat(format('REVOKE %s ON %s FROM %s;', may.what, profiles::regclass, holder),
                                 CASE WHEN others <> '' THEN format(' GRANT %s (%s) ON %s TO %s;', may.what, others, profiles::regclass, holder) END), ' ')
        FROM (SELECT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE 'authenticated' END,
                     string_agg(DISTINCT quote_ident(attname), ', ') FILTER (WHERE attname <> 'role')
              FROM held WHERE privilege = may.what GROUP BY grantee HAVING bool_or(attname = 'role')) AS of_each (holder, others))
FROM supabase JOIN pg_class ON pg_class.oid = profiles JOIN pg_attribute ON attrelid = profiles AND attname = 'role'
CROSS JOIN (VALUES ('INSERT', 'a', 4), ('UPDATE', 'w', 16)) AS may (what, command, event) LEFT JOIN applying
  ON relrowsecurity AND polcmd IN (may.command::"char", '*') AND condition !~ '\mrole\M'
WHERE has_column_privilege(to_regrole('authenticated'), profiles, 'role', may.what) AND (NOT relrowsecurity OR polname IS NOT NULL)
  AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = profiles AND NOT tgisinternal AND tgtype & (2 | may.event::int2) = 2 | may.event::int2)
GROUP BY profiles, may.what
UNION ALL  -- a table with such a one gets none of ours
SELECT 'policy', format('%s has policies of others (%s): the recipes add none there', name, string_agg(polname, ', ' ORDER BY polname)), NULL
FROM supabase CROSS JOIN tables JOIN pg_policy ON polrelid = relation
WHERE polname <> 'Service role can manage ' || name AND polname !~ ('^' || name || '_(service_role|admin(_select|_insert|_update)?)$') GROUP BY name
UNION ALL
SELECT 'namesake', CASE WHEN number <= 5 THEN format('%s has the name of a table of ours; the search_path does not lead to it', name)
                         ELSE format('and %s more', total - 5) END, NULL
FROM elsewhere WHERE number <= 6
UNION ALL
SELECT 'invalid', format('index %s was left by a build that was stopped; setup builds ours again', indexrelid::regclass), NULL
FROM pg_index JOIN tables ON indrelid = relation WHERE NOT indisvalid;
