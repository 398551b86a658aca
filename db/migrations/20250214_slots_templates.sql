-- 20250214_slots_templates: slots and templates that prompts are assembled from, and the line of descent of snapshots.
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f db/migrations/20250214_slots_templates.sql     or: invoke prereqs
--
-- Atomic part  creates slots and templates where they are missing, with keys, indexes and comments. Adds
--              prompt_snapshots.parent_id where that table stands without it (it may come later, and then has it):
--              ACCESS EXCLUSIVE on prompt_snapshots for an instant, no row is read.
-- Online part  CREATE INDEX CONCURRENTLY for documented indexes that a standing table lacks; VALIDATE of a foreign key
--              on a parent_id that stood without one.
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
  needed text[];          -- the locks, as statements
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
      ('slots', 'id uuid!, type text!, name text!, description text!, max_len int, priority int, created_at timestamptz!, updated_at timestamptz!'),
      ('templates', 'id uuid!, type text!, slot text!, version int!, body text!, status text!, created_at timestamptz!, created_by uuid'),
      ('prompt_snapshots', 'id uuid!, snapshot_id uuid!')
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
  obstacles := concat_ws(E'\n', obstacles, (
    SELECT 'prompt_snapshots.parent_id is ' || format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
           || ', promised: uuid'
    FROM pg_attribute
    WHERE attrelid = to_regclass('prompt_snapshots') AND attname = 'parent_id' AND NOT attisdropped
      AND (atttypid <> 'uuid'::regtype OR attnotnull)
  ), (
    SELECT string_agg(format('prompt_snapshots.parent_id has %s (%s), promised: FOREIGN KEY (parent_id) REFERENCES prompt_snapshots(id) ON DELETE SET NULL',
                             f.conname, pg_get_constraintdef(f.oid)), E'\n')
    FROM pg_constraint AS f JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
    WHERE f.conrelid = to_regclass('prompt_snapshots') AND a.attname = 'parent_id' AND f.contype = 'f'
      AND (f.confrelid <> f.conrelid OR f.confdeltype <> 'n')
  ), (
    SELECT 'prompt_snapshots has another constraint named prompt_snapshots_parent_id_fkey: ' || pg_get_constraintdef(oid)
    FROM pg_constraint
    WHERE conrelid = to_regclass('prompt_snapshots') AND conname = 'prompt_snapshots_parent_id_fkey'
      AND conkey IS DISTINCT FROM (SELECT ARRAY[attnum] FROM pg_attribute WHERE attrelid = conrelid AND attname = 'parent_id')
  ), (
    SELECT 'prompt_snapshots has no primary or unique key on (id)'
    WHERE to_regclass('prompt_snapshots') IS NOT NULL AND NOT EXISTS (
      SELECT FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
      WHERE i.indrelid = to_regclass('prompt_snapshots') AND a.attname = 'id' AND i.indnkeyatts = 1 AND i.indisunique AND i.indisvalid AND i.indimmediate
        AND i.indpred IS NULL)
  ));
  IF obstacles <> '' THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002',
      MESSAGE = 'a table of the prerequisites stands in another form: it is in the way',
      DETAIL = obstacles,
      HINT = 'Move what stands there out of the way (CREATE SCHEMA attic; ALTER TABLE ... SET SCHEMA attic takes its indexes along), then run '
             'db/migrations/20250214_slots_templates.sql (invoke prereqs) again. This step changed nothing.';
  END IF;

  needed := ARRAY(
    SELECT format('LOCK TABLE %s IN %s MODE', relation::regclass, mode)
    FROM (
      SELECT to_regclass('prompt_snapshots')::oid, 'ACCESS EXCLUSIVE'
      WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('prompt_snapshots') AND attname = 'parent_id')
      UNION ALL
      SELECT to_regclass('prompt_snapshots')::oid, 'SHARE ROW EXCLUSIVE'
      FROM pg_attribute AS a
      WHERE attrelid = to_regclass('prompt_snapshots') AND attname = 'parent_id'
        AND NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'f')
      UNION ALL
      SELECT auth_users, 'SHARE ROW EXCLUSIVE' WHERE to_regclass('templates') IS NULL
      UNION ALL
      SELECT oid, 'ACCESS EXCLUSIVE' FROM pg_class
      WHERE oid IN (to_regclass('slots'), to_regclass('templates')) AND supabase AND NOT relrowsecurity
    ) AS changed (relation, mode)
    WHERE has_table_privilege(relation, 'UPDATE, DELETE, TRUNCATE'));
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

  IF to_regclass('slots') IS NULL THEN
    CREATE TABLE slots (
      id           uuid        DEFAULT gen_random_uuid() PRIMARY KEY,
      type         text        NOT NULL
        CONSTRAINT slots_type_check CHECK (type IN ('world', 'ruleset', 'npc', 'scenario', 'module', 'ux')),
      name         text        NOT NULL,
      description  text        NOT NULL,
      max_len      int,
      priority     int         DEFAULT 0,
      created_at   timestamptz NOT NULL DEFAULT now(),
      updated_at   timestamptz NOT NULL DEFAULT now(),
      CONSTRAINT uk_slots_type_name UNIQUE (type, name)
    );
    CREATE INDEX idx_slots_type ON slots (type);
    COMMENT ON TABLE slots IS 'Named places in a prompt, filled from templates';
    COMMENT ON COLUMN slots.max_len IS 'Most characters the slot may take; NULL = no limit';
    COMMENT ON COLUMN slots.priority IS 'Slots of lower priority are trimmed first';
    RAISE NOTICE 'table slots created';
  END IF;

  IF to_regclass('templates') IS NULL THEN
    CREATE TABLE templates (
      id          uuid        DEFAULT gen_random_uuid() PRIMARY KEY,
      type        text        NOT NULL
        CONSTRAINT templates_type_check CHECK (type IN ('world', 'ruleset', 'npc', 'scenario', 'module', 'ux')),
      slot        text        NOT NULL,
      version     int         NOT NULL DEFAULT 1,
      body        text        NOT NULL,
      status      text        NOT NULL DEFAULT 'draft'
        CONSTRAINT templates_status_check CHECK (status IN ('draft', 'published')),
      created_at  timestamptz NOT NULL DEFAULT now(),
      created_by  uuid,
      CONSTRAINT uk_templates_type_slot_version UNIQUE (type, slot, version)
    );
    CREATE INDEX idx_templates_type_slot ON templates (type, slot);
    CREATE INDEX idx_templates_status ON templates (status);
    CREATE INDEX idx_templates_type_slot_status ON templates (type, slot, status);
    IF auth_users IS NOT NULL THEN
      ALTER TABLE templates ADD CONSTRAINT templates_created_by_fkey
        FOREIGN KEY (created_by) REFERENCES auth.users (id) ON DELETE SET NULL;
    END IF;
    COMMENT ON TABLE templates IS 'Texts for slots, in versions';
    RAISE NOTICE 'table templates created';
  END IF;

  IF to_regclass('prompt_snapshots') IS NOT NULL THEN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('prompt_snapshots') AND attname = 'parent_id') THEN
      -- A foreign key added together with its column, which is NULL everywhere, is valid at once: no row is read.
      ALTER TABLE prompt_snapshots ADD COLUMN parent_id uuid
        CONSTRAINT prompt_snapshots_parent_id_fkey REFERENCES prompt_snapshots (id) ON DELETE SET NULL;
      COMMENT ON COLUMN prompt_snapshots.parent_id IS 'The snapshot that this one was derived from';
      RAISE NOTICE 'column prompt_snapshots.parent_id added';
    ELSIF NOT EXISTS (
      SELECT FROM pg_constraint AS f JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
      WHERE f.conrelid = to_regclass('prompt_snapshots') AND a.attname = 'parent_id' AND f.contype = 'f'
    ) THEN
      ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_parent_id_fkey
        FOREIGN KEY (parent_id) REFERENCES prompt_snapshots (id) ON DELETE SET NULL NOT VALID;
      RAISE NOTICE 'foreign key prompt_snapshots_parent_id_fkey added, to be validated online';
    END IF;
  END IF;

  -- Supabase: row-level security, and the chain's policies where no other policy stands.
  IF supabase THEN
    FOR statement, progress IN
      SELECT format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', relname), format('row-level security of %s turned on', relname)
      FROM pg_class
      WHERE oid IN (to_regclass('slots'), to_regclass('templates')) AND NOT relrowsecurity
    LOOP
      EXECUTE statement;
      PERFORM set_config('lock_timeout', moment, true);
      RAISE NOTICE '%', progress;
    END LOOP;
    FOR statement, progress IN
      WITH policy (relation, name, command, role, condition) AS (VALUES
        ('slots', 'slots_service_role', 'ALL', 'service_role', 'true'),
        ('slots', 'slots_admin', 'ALL', 'authenticated', is_admin),
        ('templates', 'templates_service_role', 'ALL', 'service_role', 'true'),
        ('templates', 'templates_admin', 'ALL', 'authenticated', is_admin)
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
    ('idx_slots_type', 'slots', 'btree (type)'),
    ('idx_templates_type_slot', 'templates', 'btree (type, slot)'),
    ('idx_templates_status', 'templates', 'btree (status)'),
    ('idx_templates_type_slot_status', 'templates', 'btree (type, slot, status)'),
    ('idx_prompt_snapshots_parent_id', 'prompt_snapshots', 'btree (parent_id)')
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

-- online: VALIDATE reads the rows under a lock that stops neither readers nor writers.
SELECT format('ALTER TABLE %s.%I VALIDATE CONSTRAINT %I', c.relnamespace::regnamespace, c.relname, f.conname)
FROM pg_constraint AS f
JOIN pg_class AS c ON c.oid = f.conrelid
JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
WHERE c.oid = to_regclass('prompt_snapshots') AND a.attname = 'parent_id' AND f.contype = 'f' AND f.confrelid = to_regclass('prompt_snapshots')
  AND NOT f.convalidated
\gexec
