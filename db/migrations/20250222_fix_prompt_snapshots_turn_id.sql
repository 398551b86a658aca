-- 20250222_fix_prompt_snapshots_turn_id: turn_id as bigint with its foreign key, where it stands as uuid or without one.
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f db/migrations/20250222_fix_prompt_snapshots_turn_id.sql     or: invoke fix
--
-- Atomic part  a uuid turn_id is kept under another name, values and all, with a comment that holds the SQL to undo
--              it; a bigint turn_id with its foreign key takes its place. A bigint turn_id without the foreign key
--              gets it NOT VALID. ACCESS EXCLUSIVE on prompt_snapshots and SHARE ROW EXCLUSIVE on turns for an
--              instant, whatever their size: no row is read or written. Refuses, naming them, where objects that
--              it does not know hang on the uuid column.
-- Online part  CREATE INDEX CONCURRENTLY idx_prompt_snapshots_turn_id; VALIDATE of a foreign key that is not.
-- Run again    changes nothing, and where nothing is missing locks nothing.

DO $migration$
DECLARE
  -- One table, the one that the search_path resolves: named once, used by its OID.
  snapshots CONSTANT oid := to_regclass('prompt_snapshots');
  turns CONSTANT oid := to_regclass('turns');
  target text;        -- the same table, qualified and quoted
  home text;          -- its schema, quoted
  turn_id pg_attribute;
  kept text;          -- where the uuid values go
  undo_kept text;     -- where the bigint values go if that is undone
  old_index text;
  old_default text;
  old_comment text;
  undo text;
  grants text;
  publications text;      -- of all tables, or of the table's schema
  statement text;
  needed text[];          -- the locks, as statements
  moment text;
  give_up timestamptz;
  obstacles text;
BEGIN
  IF current_setting('lock_timeout') = '0' THEN
    PERFORM set_config('lock_timeout', '2s', true);
  END IF;

  IF snapshots IS NULL OR turns IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001',
      MESSAGE = format('the fix needs the table %s, which does not exist', CASE WHEN snapshots IS NULL THEN 'prompt_snapshots' ELSE 'turns' END),
      DETAIL = 'It makes prompt_snapshots.turn_id a bigint that points to turns (id).',
      HINT = CASE WHEN turns IS NULL THEN 'Run db/migrations/20250130000000_core_schema.sql first (invoke prereqs). This step changed nothing.'
                  ELSE 'Run db/migrations/20250213_prompt_snapshots.sql instead (invoke prereqs): a new table needs no fix. This step changed nothing.' END;
  END IF;
  SELECT quote_ident(nspname), quote_ident(nspname) || '.prompt_snapshots' INTO home, target
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = snapshots;
  SELECT * INTO turn_id FROM pg_attribute WHERE attrelid = snapshots AND attname = 'turn_id' AND NOT attisdropped;

  SELECT string_agg(format('%s is %s, promised: %s', needed.relation || '.' || needed.name,
                           coalesce(format_type(a.atttypid, a.atttypmod), 'missing'), needed.type), E'\n')
    INTO obstacles
    FROM (VALUES ('turns', 'id', 'bigint'), ('prompt_snapshots', 'snapshot_id', 'uuid')) AS needed (relation, name, type)
    LEFT JOIN pg_attribute AS a ON a.attrelid = to_regclass(needed.relation) AND a.attname = needed.name AND NOT a.attisdropped
   WHERE a.atttypid IS DISTINCT FROM to_regtype(needed.type)::oid;
  IF turn_id.atttypid IS NULL OR turn_id.atttypid NOT IN ('uuid'::regtype, 'bigint'::regtype)
     OR turn_id.atttypid = 'bigint'::regtype AND turn_id.attnotnull THEN
    obstacles := concat_ws(E'\n', obstacles, format('prompt_snapshots.turn_id is %s, promised: bigint',
      coalesce(format_type(turn_id.atttypid, turn_id.atttypmod) || CASE WHEN turn_id.attnotnull THEN ' NOT NULL' ELSE '' END, 'missing')));
  END IF;
  obstacles := concat_ws(E'\n', obstacles, (
    SELECT string_agg(relname || ' is not an ordinary table', E'\n') FROM pg_class WHERE oid IN (snapshots, turns) AND relkind <> 'r'
  ), (
    SELECT 'turns has no primary or unique key on (id)'
    WHERE turns IS NOT NULL AND NOT EXISTS (
      SELECT FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
      WHERE i.indrelid = turns AND a.attname = 'id' AND i.indnkeyatts = 1 AND i.indisunique AND i.indisvalid AND i.indimmediate
        AND i.indpred IS NULL)
  ));
  IF obstacles <> '' THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002',
      MESSAGE = 'prompt_snapshots or turns stands in a form that the fix does not know: it is in the way',
      DETAIL = obstacles,
      HINT = 'Move what stands there out of the way (CREATE SCHEMA attic; ALTER TABLE ... SET SCHEMA attic takes its indexes along), then run db/migrations/20250222_fix_prompt_snapshots_turn_id.sql (invoke fix) again. This step changed nothing.';
  END IF;

  IF turn_id.atttypid = 'uuid'::regtype THEN
    -- Whatever hangs on the column would silently follow the old values to their new name. The documented index (on this
    -- column alone) and the column's own default and NOT NULL are known; everything else is its owner's to decide about.
    SELECT string_agg(DISTINCT pg_describe_object(classid, objid, objsubid), E'\n')
      INTO obstacles
      FROM pg_depend
     WHERE refclassid = 'pg_class'::regclass AND refobjid = snapshots AND refobjsubid = turn_id.attnum
       AND NOT (classid = 'pg_attrdef'::regclass AND deptype = 'a'
                AND objid IN (SELECT oid FROM pg_attrdef WHERE adrelid = snapshots AND adnum = turn_id.attnum))
       AND NOT (classid = 'pg_constraint'::regclass AND objid IN (SELECT oid FROM pg_constraint WHERE contype = 'n'))
       AND NOT (classid = 'pg_class'::regclass AND objid IN (
                  SELECT indexrelid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
                  WHERE indrelid = snapshots AND relname = 'idx_prompt_snapshots_turn_id' AND indnatts = 1
                    AND indkey[0] = turn_id.attnum AND NOT indisunique AND indpred IS NULL AND NOT indisreplident));
    obstacles := concat_ws(E'\n', obstacles, (
      SELECT string_agg(format('trigger %s, whose function mentions turn_id', tgname), E'\n')
      FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
      WHERE tgrelid = snapshots AND NOT tgisinternal AND prosrc ~ '[^a-z_]turn_id[^a-z_]'
    ), (
      SELECT string_agg(format('publication %s: its subscribers lack the kept column', pubname), E'\n')
      FROM pg_publication_rel AS r JOIN pg_publication ON pg_publication.oid = prpubid
      WHERE prrelid = snapshots AND to_jsonb(r) ->> 'prattrs' IS NULL  -- with a list of columns it depends on them; new in 15
    ));
    IF turn_id.attgenerated <> '' OR turn_id.attidentity <> '' OR turn_id.attinhcount > 0 THEN
      obstacles := concat_ws(E'\n', obstacles, 'the column itself is generated, an identity or inherited');
    END IF;
    IF obstacles <> '' THEN
      RAISE EXCEPTION USING ERRCODE = 'TB002',
        MESSAGE = 'objects hang on the uuid column prompt_snapshots.turn_id: they are in the way of the fix',
        DETAIL = obstacles,
        HINT = 'Drop them (and create them again afterwards, on turn_id or on the kept column), then run '
               'db/migrations/20250222_fix_prompt_snapshots_turn_id.sql (invoke fix) again. This step changed nothing.';
    END IF;
  ELSE
    SELECT string_agg(format('prompt_snapshots.turn_id has %s: %s', conname, pg_get_constraintdef(oid)), E'\n')
      INTO obstacles
      FROM pg_constraint
     WHERE conrelid = snapshots AND contype = 'f' AND conkey = ARRAY[turn_id.attnum]
       AND (confrelid <> turns OR confdeltype <> 'n');
    IF obstacles IS NOT NULL THEN
      RAISE EXCEPTION USING ERRCODE = 'TB002',
        MESSAGE = 'another foreign key stands on prompt_snapshots.turn_id: it is in the way',
        DETAIL = obstacles || E'\npromised: FOREIGN KEY (turn_id) REFERENCES turns(id) ON DELETE SET NULL',
        HINT = 'Drop it (ALTER TABLE prompt_snapshots DROP CONSTRAINT ...), then run '
               'db/migrations/20250222_fix_prompt_snapshots_turn_id.sql (invoke fix) again. This step changed nothing.';
    END IF;
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = snapshots AND contype = 'f' AND conkey = ARRAY[turn_id.attnum]) THEN
      RETURN;  -- nothing is missing
    END IF;
  END IF;

  needed := ARRAY[format('LOCK TABLE %s IN %s MODE', target,
                         CASE WHEN turn_id.atttypid = 'uuid'::regtype THEN 'ACCESS EXCLUSIVE' ELSE 'SHARE ROW EXCLUSIVE' END)];
  IF has_table_privilege(turns, 'UPDATE, DELETE, TRUNCATE') THEN  -- else LOCK is not for us, and ALTER TABLE has to wait
    needed := needed || format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', turns::regclass);
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
  IF turn_id.attnum IS DISTINCT FROM (SELECT attnum FROM pg_attribute WHERE attrelid = snapshots AND attname = 'turn_id')
     OR EXISTS (SELECT FROM pg_constraint WHERE conrelid = snapshots AND contype = 'f' AND conkey = ARRAY[turn_id.attnum]) THEN
    RETURN;  -- somebody was faster
  END IF;

  IF turn_id.atttypid = 'uuid'::regtype THEN
    SELECT min(name COLLATE "C") INTO kept
      FROM (SELECT 'turn_id_uuid' || suffix FROM unnest(ARRAY['', '_2', '_3', '_4', '_5', '_6', '_7', '_8', '_9']) AS suffix) AS free (name)
     WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = snapshots AND attname = name)
       AND to_regclass(home || '.idx_prompt_snapshots_' || name) IS NULL;
    SELECT min(name COLLATE "C") INTO undo_kept
      FROM (SELECT 'turn_id_bigint' || suffix FROM unnest(ARRAY['', '_2', '_3', '_4', '_5', '_6', '_7', '_8', '_9']) AS suffix) AS free (name)
     WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = snapshots AND attname = name);
    SELECT relname INTO old_index FROM pg_class JOIN pg_index ON indexrelid = pg_class.oid
     WHERE indrelid = snapshots AND relname = 'idx_prompt_snapshots_turn_id';
    SELECT pg_get_expr(adbin, adrelid) INTO old_default FROM pg_attrdef WHERE adrelid = snapshots AND adnum = turn_id.attnum;
    old_comment := col_description(snapshots, turn_id.attnum);

    undo := concat_ws(E'\n',
      'BEGIN;',
      format('ALTER TABLE %s RENAME COLUMN turn_id TO %I;', target, undo_kept),
      format('ALTER TABLE %s RENAME CONSTRAINT prompt_snapshots_turn_id_fkey TO %I;', target, 'prompt_snapshots_' || undo_kept || '_fkey'),
      format('ALTER INDEX IF EXISTS %s.idx_prompt_snapshots_turn_id RENAME TO %I;', home, 'idx_prompt_snapshots_' || undo_kept),
      format('ALTER TABLE %s RENAME COLUMN %I TO turn_id;', target, kept),
      CASE WHEN old_index IS NOT NULL THEN format('ALTER INDEX %s.%I RENAME TO %I;', home, 'idx_prompt_snapshots_' || kept, old_index) END,
      'ALTER TABLE ' || target || ' ALTER COLUMN turn_id SET DEFAULT ' || old_default || ';',
      CASE WHEN turn_id.attnotnull THEN format('ALTER TABLE %s ALTER COLUMN turn_id SET NOT NULL;  -- rows written since have none', target) END,
      format('COMMENT ON COLUMN %s.turn_id IS %s;', target, coalesce(quote_literal(old_comment), 'NULL')),
      'COMMIT;');

    EXECUTE format('ALTER TABLE %s RENAME COLUMN turn_id TO %I', target, kept);
    IF old_index IS NOT NULL THEN
      EXECUTE format('ALTER INDEX %s.%I RENAME TO %I', home, old_index, 'idx_prompt_snapshots_' || kept);
    END IF;
    -- The application no longer writes the old column: a NOT NULL there would refuse its rows, a default invent values.
    IF turn_id.attnotnull THEN
      EXECUTE format('ALTER TABLE %s ALTER COLUMN %I DROP NOT NULL', target, kept);
      RAISE NOTICE 'NOT NULL of the uuid column lifted: new rows do not fill it';
    END IF;
    IF old_default IS NOT NULL THEN
      EXECUTE format('ALTER TABLE %s ALTER COLUMN %I DROP DEFAULT', target, kept);
      RAISE NOTICE 'default % of the uuid column lifted: new rows do not fill it', old_default;
    END IF;
    EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', target, kept,
                   concat_ws(E'\n', 'Former turn_id, kept by 20250222_fix_prompt_snapshots_turn_id. To undo it:', undo));
    -- A foreign key added together with its column, which is NULL everywhere, is valid at once: no row is read.
    EXECUTE format('ALTER TABLE %s ADD COLUMN turn_id bigint
                      CONSTRAINT prompt_snapshots_turn_id_fkey REFERENCES %s (id) ON DELETE SET NULL', target, turns::regclass);
    -- Rights on the column went along with its old name; whoever could read or write turn_id still can.
    FOR grants IN
      SELECT format('GRANT %s (turn_id) ON %s TO %s%s', acl.privilege_type, target,
                    CASE acl.grantee WHEN 0 THEN 'PUBLIC' ELSE acl.grantee::regrole::text END,
                    CASE WHEN acl.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
      FROM aclexplode(turn_id.attacl) AS acl
    LOOP
      EXECUTE grants;
    END LOOP;
    RAISE NOTICE 'prompt_snapshots.turn_id is bigint now; the uuid values are kept in %', kept;
    -- One of the table alone was in the way. These cannot leave it out, and to drop them would stop all that they publish.
    EXECUTE 'SELECT string_agg(pubname, '', '' ORDER BY pubname) FROM pg_publication WHERE puballtables'
            || CASE WHEN to_regclass('pg_catalog.pg_publication_namespace') IS NOT NULL  -- new in 15
                    THEN format(' OR oid IN (SELECT pnpubid FROM pg_publication_namespace WHERE pnnspid = %L::regnamespace)', home) ELSE '' END
       INTO publications;
    IF publications IS NOT NULL THEN
      RAISE NOTICE 'published by %: subscribers stop at the next row until their tables have % and turn_id as bigint, too', publications, kept;
    END IF;
    RAISE NOTICE E'to undo it:\n%', undo;
  ELSE
    EXECUTE format('ALTER TABLE %s ADD CONSTRAINT prompt_snapshots_turn_id_fkey
                      FOREIGN KEY (turn_id) REFERENCES %s (id) ON DELETE SET NULL NOT VALID', target, turns::regclass);
    RAISE NOTICE 'foreign key prompt_snapshots_turn_id_fkey added, to be validated online';
  END IF;
END
$migration$;

-- online: psql runs each statement that this SELECT returns alone, outside any transaction; so does the runner.
SELECT online.statement
FROM (VALUES
    ('idx_prompt_snapshots_turn_id', 'prompt_snapshots', 'btree (turn_id)')
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
WHERE c.oid = to_regclass('prompt_snapshots') AND a.attname = 'turn_id' AND f.contype = 'f' AND f.confrelid = to_regclass('turns')
  AND NOT f.convalidated
\gexec
