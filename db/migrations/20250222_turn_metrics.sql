-- 20250222_turn_metrics: one row of telemetry per turn.
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f db/migrations/20250222_turn_metrics.sql     or: invoke turn-metrics
--
-- Atomic part  creates turn_metrics with its keys, indexes and comments: SHARE ROW EXCLUSIVE on turns for an
--              instant. Where the table stands, missing defaults, comments and the foreign key (NOT VALID) are
--              added: ACCESS EXCLUSIVE on it for an instant; another form of it is in the way.
-- Online part  CREATE INDEX CONCURRENTLY for documented indexes that a standing table lacks; VALIDATE of its foreign key.
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
  turns CONSTANT oid := to_regclass('turns');
  turns_id_type CONSTANT text := (SELECT format_type(atttypid, atttypmod) FROM pg_attribute
                                  WHERE attrelid = to_regclass('turns') AND attname = 'id' AND NOT attisdropped);
  metrics oid := to_regclass('turn_metrics');
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

  IF turns IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001',
      MESSAGE = 'turn_metrics needs the table turns, which does not exist',
      DETAIL = 'Each of its rows belongs to a turn: turn_id points to turns (id).',
      HINT = 'Run db/migrations/20250130000000_core_schema.sql first (invoke prereqs). This step changed nothing.';
  END IF;
  IF turns_id_type IS DISTINCT FROM 'bigint' THEN
    obstacles := format('turns.id is %s, promised: bigint', coalesce(turns_id_type, 'missing'));
  END IF;
  SELECT concat_ws(E'\n', obstacles, string_agg(
           format('turn_metrics.%s is %s, promised: %s', promised.name, coalesce(standing.form || standing.otherwise, 'missing'),
                  promised.form || coalesce(' DEFAULT ' || promised.otherwise, '')), E'\n'))
    INTO obstacles
    FROM (VALUES
      ('turn_id', 'bigint NOT NULL', NULL), ('story_id', 'uuid NOT NULL', NULL),
      ('created_at', 'timestamp with time zone NOT NULL', 'now()'),
      ('tokens_before', 'integer NOT NULL', NULL), ('tokens_after', 'integer NOT NULL', NULL),
      ('trims_count', 'integer NOT NULL', '0'), ('top_trim_keys', 'text[]', '''{}''::text[]'), ('model_ms', 'integer', NULL),
      ('rejects', 'jsonb', '''{}''::jsonb'), ('cost_estimate_cents', 'integer', NULL)
    ) AS promised (name, form, otherwise)
    LEFT JOIN LATERAL (
      SELECT format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END,
             coalesce(' DEFAULT ' || CASE WHEN attgenerated = '' THEN pg_get_expr(adbin, 0) ELSE 'generated' END, '')
      FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      WHERE attrelid = metrics AND attname = promised.name AND NOT attisdropped
    ) AS standing (form, otherwise) ON true
   WHERE metrics IS NOT NULL
     AND (standing.form IS DISTINCT FROM promised.form
          OR standing.otherwise NOT IN ('', coalesce(' DEFAULT ' || promised.otherwise, '')));
  obstacles := concat_ws(E'\n', nullif(obstacles, ''), (
    SELECT string_agg(format('turn_metrics.turn_id has %s: %s, promised: FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE CASCADE',
                             conname, pg_get_constraintdef(f.oid)), E'\n')
    FROM pg_constraint AS f JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
    WHERE f.conrelid = metrics AND a.attname = 'turn_id' AND f.contype = 'f' AND (f.confrelid <> turns OR f.confdeltype <> 'c')
  ), (
    SELECT 'turns has no primary or unique key on (id)'
    WHERE turns IS NOT NULL AND NOT EXISTS (
      SELECT FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
      WHERE i.indrelid = turns AND a.attname = 'id' AND i.indnkeyatts = 1 AND i.indisunique AND i.indisvalid AND i.indimmediate
        AND i.indpred IS NULL)
  ), (
    SELECT 'turn_metrics has no primary key on (turn_id)'
    WHERE metrics IS NOT NULL AND NOT EXISTS (
      SELECT FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
      WHERE i.indrelid = metrics AND i.indisprimary AND i.indnkeyatts = 1 AND a.attname = 'turn_id')
  ));
  IF obstacles <> '' THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002',
      MESSAGE = 'turn_metrics or turns stands in another form: it is in the way',
      DETAIL = obstacles,
      HINT = 'Move what stands there out of the way (CREATE SCHEMA attic; ALTER TABLE ... SET SCHEMA attic takes its indexes along), then run '
             'db/migrations/20250222_turn_metrics.sql (invoke turn-metrics) again. This step changed nothing.';
  END IF;

  needed := ARRAY(
    SELECT format('LOCK TABLE %s IN %s MODE', relation::regclass, mode)
    FROM (
      SELECT 1, metrics, 'ACCESS EXCLUSIVE'
      WHERE EXISTS (SELECT FROM pg_attribute WHERE attrelid = metrics AND NOT atthasdef
                      AND attname IN ('created_at', 'trims_count', 'top_trim_keys', 'rejects'))
      UNION ALL
      SELECT 2, unnest(ARRAY[metrics, turns]), 'SHARE ROW EXCLUSIVE'
      WHERE NOT EXISTS (SELECT FROM pg_constraint AS f JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
                        WHERE f.conrelid = metrics AND a.attname = 'turn_id' AND f.contype = 'f' AND f.confrelid = turns)
    ) AS changed (position, relation, mode)
    WHERE has_table_privilege(relation, 'UPDATE, DELETE, TRUNCATE')
    ORDER BY position);
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

  IF metrics IS NULL THEN
    CREATE TABLE turn_metrics (
      turn_id              bigint PRIMARY KEY
        CONSTRAINT turn_metrics_turn_id_fkey REFERENCES turns (id) ON DELETE CASCADE,
      story_id             uuid        NOT NULL,
      created_at           timestamptz NOT NULL DEFAULT now(),
      tokens_before        int         NOT NULL,
      tokens_after         int         NOT NULL,
      trims_count          int         NOT NULL DEFAULT 0,
      top_trim_keys        text[]      DEFAULT '{}',
      model_ms             int,
      rejects              jsonb       DEFAULT '{}',
      cost_estimate_cents  int
    );
    CREATE INDEX idx_turn_metrics_story_created ON turn_metrics (story_id, created_at DESC);
    CREATE INDEX idx_turn_metrics_created ON turn_metrics (created_at DESC);
    metrics := to_regclass('turn_metrics');
    RAISE NOTICE 'table turn_metrics created';
  ELSIF NOT EXISTS (SELECT FROM pg_constraint AS f JOIN pg_attribute AS a ON a.attrelid = f.conrelid AND f.conkey = ARRAY[a.attnum]
                    WHERE f.conrelid = metrics AND a.attname = 'turn_id' AND f.contype = 'f' AND f.confrelid = turns) THEN
    ALTER TABLE turn_metrics ADD CONSTRAINT turn_metrics_turn_id_fkey
      FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE CASCADE NOT VALID;
    RAISE NOTICE 'foreign key turn_metrics_turn_id_fkey added, to be validated online';
  END IF;

  FOR statement, progress IN
    SELECT format('ALTER TABLE turn_metrics ALTER COLUMN %I SET DEFAULT %s', attname, otherwise),
           format('column turn_metrics.%s given its default', attname)
    FROM (VALUES ('created_at', 'now()'), ('trims_count', '0'), ('top_trim_keys', '''{}'''), ('rejects', '''{}''')) AS promised (name, otherwise)
    JOIN pg_attribute ON attrelid = metrics AND attname = promised.name AND NOT atthasdef
  LOOP
    EXECUTE statement;
    RAISE NOTICE '%', progress;
  END LOOP;

  IF obj_description(metrics, 'pg_class') IS NULL THEN
    COMMENT ON TABLE turn_metrics IS 'Telemetry of the budget engine: one row per turn';
  END IF;
  FOR statement IN
    SELECT format('COMMENT ON COLUMN turn_metrics.%I IS %L', attname, meaning)
    FROM (VALUES
      ('turn_id', 'The turn that was measured'),
      ('story_id', 'The game (games.id) that the turn belongs to'),
      ('created_at', 'When the row was written'),
      ('tokens_before', 'Tokens of the assembled prompt before trimming'),
      ('tokens_after', 'Tokens that were sent'),
      ('trims_count', 'Slots that were trimmed'),
      ('top_trim_keys', 'Slots that lost most, first the one that lost most'),
      ('model_ms', 'Milliseconds that the model took; NULL = not measured'),
      ('rejects', 'Answers of the model that were rejected, by reason'),
      ('cost_estimate_cents', 'Estimated cost of the turn in cents; NULL = unknown')
    ) AS comments (name, meaning)
    JOIN pg_attribute ON attrelid = metrics AND attname = comments.name AND col_description(metrics, attnum) IS NULL
  LOOP
    EXECUTE statement;
  END LOOP;

  -- Supabase: row-level security, and the chain's policies where no other policy stands.
  IF supabase THEN
    FOR statement, progress IN
      SELECT format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', relname), format('row-level security of %s turned on', relname)
      FROM pg_class
      WHERE oid IN (to_regclass('turn_metrics')) AND NOT relrowsecurity
    LOOP
      EXECUTE statement;
      PERFORM set_config('lock_timeout', moment, true);
      RAISE NOTICE '%', progress;
    END LOOP;
    FOR statement, progress IN
      WITH policy (relation, name, command, role, condition) AS (VALUES
        ('turn_metrics', 'turn_metrics_service_role', 'ALL', 'service_role', 'true'),
        ('turn_metrics', 'turn_metrics_admin_select', 'SELECT', 'authenticated', is_admin)
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
    ('idx_turn_metrics_story_created', 'turn_metrics', 'btree (story_id, created_at DESC)'),
    ('idx_turn_metrics_created', 'turn_metrics', 'btree (created_at DESC)')
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
WHERE c.oid = to_regclass('turn_metrics') AND a.attname = 'turn_id' AND f.contype = 'f' AND f.confrelid = to_regclass('turns')
  AND NOT f.convalidated
\gexec
