-- 20250213_prompt_snapshots: the prompts that were sent, each as a snapshot.
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f db/migrations/20250213_prompt_snapshots.sql     or: invoke prereqs
--
-- Atomic part  creates prompt_snapshots with its keys, indexes and comments; its foreign keys take
--              SHARE ROW EXCLUSIVE on games and turns for an instant. A table of that name that stands is used if it
--              has the documented columns (turn_id as uuid is the fix's affair); otherwise it is in the way.
-- Online part  CREATE INDEX CONCURRENTLY for documented indexes that a standing table lacks.
-- Run again    changes nothing, and where nothing is missing locks nothing.

DO $migration$
DECLARE
  supabase CONSTANT boolean :=
    EXISTS (SELECT FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
            WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'auth')
              AND c.relname = 'users' AND a.attname = 'id' AND a.atttypid = 'uuid'::regtype)
    AND EXISTS (SELECT FROM pg_proc WHERE proname = 'uid' AND pronargs = 0
                  AND pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'auth'))
    AND to_regrole('service_role') IS NOT NULL AND to_regrole('authenticated') IS NOT NULL;
  admins CONSTANT boolean := 2 = (
    SELECT count(*) FROM pg_attribute
    WHERE attrelid = to_regclass('profiles') AND (attname = 'role' OR attname = 'id' AND atttypid = 'uuid'::regtype));
  is_admin CONSTANT text :=
    'EXISTS (SELECT 1 FROM profiles AS p WHERE p.id = (SELECT auth.uid()) AND p.role::text = ''admin'')';
  auth_users CONSTANT oid := (
    SELECT a.attrelid FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
    WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'auth')
      AND c.relname = 'users' AND a.attname = 'id' AND a.atttypid = 'uuid'::regtype);
  statement text;
  progress text;
  needed text[] := '{}';  -- the locks, as statements
  moment text;
  give_up timestamptz;
  obstacles text;
BEGIN
  IF current_setting('lock_timeout') = '0' THEN
    PERFORM set_config('lock_timeout', '2s', true);
  END IF;

  -- A table that stands is used as it is: it must have the documented columns (! = NOT NULL).
  SELECT string_agg(format('%s.%s is %s, promised: %s', documented.relation, split_part(spec, ' ', 1),
                           coalesce(standing.form, 'missing'), promised.form), E'\n')
    INTO obstacles
    FROM (VALUES
      ('prompt_snapshots', 'id uuid!, snapshot_id uuid!, templates_version text, pack_versions jsonb, tp jsonb!, linearized_prompt_text text!, awf_contract text!, source text!, created_at timestamptz!, created_by uuid, game_id uuid')
    ) AS documented (relation, columns)
    CROSS JOIN LATERAL string_to_table(documented.columns, ', ') AS spec
    CROSS JOIN LATERAL (
      SELECT format_type(to_regtype(rtrim(split_part(spec, ' ', 2), '!')), -1)
             || CASE WHEN spec LIKE '%!' THEN ' NOT NULL' ELSE '' END
    ) AS promised (form)
    LEFT JOIN LATERAL (
      SELECT format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
      FROM pg_attribute
      WHERE attrelid = to_regclass(documented.relation) AND attname = split_part(spec, ' ', 1) AND attnum > 0 AND NOT attisdropped
    ) AS standing (form) ON true
   WHERE to_regclass(documented.relation) IS NOT NULL AND standing.form IS DISTINCT FROM promised.form;
  IF obstacles IS NOT NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002',
      MESSAGE = 'another table named prompt_snapshots is in the way',
      DETAIL = obstacles,
      HINT = 'Move what stands there out of the way (CREATE SCHEMA attic; ALTER TABLE ... SET SCHEMA attic takes its indexes along), then run '
             'db/migrations/20250213_prompt_snapshots.sql (invoke prereqs) again. This step changed nothing.';
  END IF;

  IF to_regclass('prompt_snapshots') IS NULL THEN
    IF to_regclass('games') IS NULL OR to_regclass('turns') IS NULL THEN
      RAISE EXCEPTION USING ERRCODE = 'TB001',
        MESSAGE = format('prompt_snapshots needs the table %s, which does not exist',
                         CASE WHEN to_regclass('games') IS NULL THEN 'games' ELSE 'turns' END),
        DETAIL = 'Its foreign keys point to games (id) and turns (id).',
        HINT = 'Run db/migrations/20250130000000_core_schema.sql first (invoke prereqs). This step changed nothing.';
    END IF;
    SELECT string_agg(format('%s.id is %s, promised: %s', needed.relation, format_type(a.atttypid, a.atttypmod), needed.type), E'\n')
      INTO obstacles
      FROM (VALUES ('games', 'uuid'), ('turns', 'bigint')) AS needed (relation, type)
      LEFT JOIN pg_attribute AS a ON a.attrelid = to_regclass(needed.relation) AND a.attname = 'id'
     WHERE a.atttypid IS DISTINCT FROM to_regtype(needed.type)::oid;
    IF obstacles IS NOT NULL THEN
      RAISE EXCEPTION USING ERRCODE = 'TB002',
        MESSAGE = 'the core schema stands in an older form: it is in the way',
        DETAIL = obstacles,
        HINT = 'Move the older tables out of the way (CREATE SCHEMA attic; ALTER TABLE ... SET SCHEMA attic), then run '
               'db/migrations/20250130000000_core_schema.sql (invoke prereqs). Or have it done, rows and keys: '
               'db/migrations/20250130000002_recreate_core_schema.sql (invoke prereqs --recreate). This step changed nothing.';
    END IF;
    needed := ARRAY(
      SELECT format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', target::regclass)
      FROM unnest(ARRAY[to_regclass('turns')::oid, to_regclass('games')::oid, auth_users]) AS target
      WHERE has_table_privilege(target, 'UPDATE, DELETE, TRUNCATE'));
  END IF;
  -- All of them or none: who waits for one table while holding another holds up everybody who wants that one. So the queue is for
  -- the first only, while nothing is held; what comes after it is waited for a moment at most, which is shorter than the
  -- deadlock_timeout: nobody dies in a deadlock with us.
  give_up := clock_timestamp() + current_setting('lock_timeout')::interval;
  moment := ceil(1000 * extract(epoch FROM least('100 ms', current_setting('lock_timeout')::interval)));
  LOOP
    BEGIN
      FOREACH statement IN ARRAY needed LOOP
        EXECUTE statement;
        PERFORM set_config('lock_timeout', moment, true);
      END LOOP;
      EXIT;
    EXCEPTION WHEN lock_not_available THEN  -- this lets go of those that were locked
      IF clock_timestamp() > give_up THEN
        RAISE;
      END IF;
    END;
    PERFORM pg_sleep(0.02);
  END LOOP;

  IF to_regclass('prompt_snapshots') IS NULL THEN
    -- turn_id belongs to the fix and parent_id to slots_templates; a new table has both from the start.
    CREATE TABLE prompt_snapshots (
      id                      uuid        DEFAULT gen_random_uuid() PRIMARY KEY,
      snapshot_id             uuid        NOT NULL DEFAULT gen_random_uuid()
        CONSTRAINT uk_prompt_snapshots_snapshot_id UNIQUE,
      templates_version       text,
      pack_versions           jsonb       DEFAULT '{}',
      tp                      jsonb       NOT NULL,
      linearized_prompt_text  text        NOT NULL,
      awf_contract            text        NOT NULL DEFAULT 'awf.v1',
      source                  text        NOT NULL DEFAULT 'auto'
        CONSTRAINT prompt_snapshots_source_check CHECK (source IN ('auto', 'manual')),
      created_at              timestamptz NOT NULL DEFAULT now(),
      created_by              uuid,
      game_id                 uuid
        CONSTRAINT prompt_snapshots_game_id_fkey REFERENCES games (id) ON DELETE SET NULL,
      turn_id                 bigint
        CONSTRAINT prompt_snapshots_turn_id_fkey REFERENCES turns (id) ON DELETE SET NULL,
      parent_id               uuid
        CONSTRAINT prompt_snapshots_parent_id_fkey REFERENCES prompt_snapshots (id) ON DELETE SET NULL
    );
    CREATE INDEX idx_prompt_snapshots_created_at ON prompt_snapshots (created_at DESC);
    CREATE INDEX idx_prompt_snapshots_game_id ON prompt_snapshots (game_id);
    CREATE INDEX idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id);
    CREATE INDEX idx_prompt_snapshots_source ON prompt_snapshots (source);
    CREATE INDEX idx_prompt_snapshots_created_by ON prompt_snapshots (created_by);
    CREATE INDEX idx_prompt_snapshots_parent_id ON prompt_snapshots (parent_id);
    IF auth_users IS NOT NULL THEN
      ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_created_by_fkey
        FOREIGN KEY (created_by) REFERENCES auth.users (id) ON DELETE SET NULL;
    END IF;
    COMMENT ON TABLE prompt_snapshots IS 'Prompts as they were sent, after assembly and trimming';
    COMMENT ON COLUMN prompt_snapshots.snapshot_id IS 'The name that the application gives the snapshot';
    COMMENT ON COLUMN prompt_snapshots.tp IS 'The turn packet that the prompt was made from';
    COMMENT ON COLUMN prompt_snapshots.parent_id IS 'The snapshot that this one was derived from';
    RAISE NOTICE 'table prompt_snapshots created';
  END IF;

  -- Supabase: row-level security, and the chain's policies where no other policy stands.
  IF supabase THEN
    FOR statement, progress IN
      SELECT format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', relname), format('row-level security of %s turned on', relname)
      FROM pg_class
      WHERE oid IN (to_regclass('prompt_snapshots')) AND NOT relrowsecurity
    LOOP
      EXECUTE statement;
      PERFORM set_config('lock_timeout', moment, true);
      RAISE NOTICE '%', progress;
    END LOOP;
    FOR statement, progress IN
      WITH policy (relation, name, command, role, condition) AS (VALUES
        ('prompt_snapshots', 'prompt_snapshots_service_role', 'ALL', 'service_role', 'true'),
        ('prompt_snapshots', 'prompt_snapshots_admin_select', 'SELECT', 'authenticated', is_admin),
        ('prompt_snapshots', 'prompt_snapshots_admin_insert', 'INSERT', 'authenticated', is_admin),
        ('prompt_snapshots', 'prompt_snapshots_admin_update', 'UPDATE', 'authenticated', is_admin)
      )
      SELECT format('CREATE POLICY %1$I ON %2$I FOR %3$s TO %4$I', name, relation, command, role)
             || CASE WHEN command <> 'INSERT' THEN format(' USING (%s)', condition) ELSE '' END
             || CASE WHEN command <> 'SELECT' THEN format(' WITH CHECK (%s)', condition) ELSE '' END
             || format('; GRANT %s ON TABLE %I TO %I',
                       replace(command, 'ALL', 'SELECT, INSERT, UPDATE, DELETE'), relation, role),
             format('policy %s created', name)
      FROM policy
      WHERE (role = 'service_role' OR admins)
        AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = to_regclass(relation) AND polname = name)
        AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = to_regclass(relation)
                          AND polname NOT IN (SELECT p.name FROM policy AS p))
    LOOP
      EXECUTE statement;
      PERFORM set_config('lock_timeout', moment, true);
      RAISE NOTICE '%', progress;
    END LOOP;
  END IF;
END
$migration$;

-- online: psql runs each statement that this SELECT returns alone, outside any transaction; so does the runner.
SELECT online.statement
FROM (VALUES
    ('idx_prompt_snapshots_created_at', 'prompt_snapshots', 'btree (created_at DESC)'),
    ('idx_prompt_snapshots_game_id', 'prompt_snapshots', 'btree (game_id)'),
    ('idx_prompt_snapshots_source', 'prompt_snapshots', 'btree (source)'),
    ('idx_prompt_snapshots_created_by', 'prompt_snapshots', 'btree (created_by)')
  ) AS wanted (name, relation, definition)
JOIN pg_class AS standing ON standing.oid = to_regclass(wanted.relation) AND standing.relkind = 'r'
LEFT JOIN pg_class AS named ON named.relnamespace = standing.relnamespace AND named.relname = wanted.name
LEFT JOIN pg_index AS built ON built.indexrelid = named.oid AND built.indrelid = standing.oid
CROSS JOIN LATERAL (VALUES
    (1, NOT built.indisvalid,
     format('DROP INDEX CONCURRENTLY IF EXISTS %s.%I', standing.relnamespace::regnamespace, wanted.name)),
    (2, named.oid IS NULL OR NOT built.indisvalid,
     format('CREATE INDEX CONCURRENTLY IF NOT EXISTS %I ON %s.%I USING %s',
            wanted.name, standing.relnamespace::regnamespace, standing.relname, wanted.definition))
  ) AS online (position, is_needed, statement)
WHERE online.is_needed
  -- Invalid perhaps because somebody is building it at this moment: two builds on one table would wait for each other.
  AND NOT (EXISTS (SELECT FROM pg_index WHERE indrelid = standing.oid AND NOT indisvalid) AND EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'relation' AND relation = standing.oid AND mode = 'ShareUpdateExclusiveLock' AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid <> pg_backend_pid()
      AND pid NOT IN (SELECT pid FROM pg_stat_progress_vacuum UNION ALL SELECT pid FROM pg_stat_progress_analyze)))
ORDER BY wanted.name, online.position
\gexec
