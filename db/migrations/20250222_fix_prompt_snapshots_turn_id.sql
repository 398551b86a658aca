-- 20250222_fix_prompt_snapshots_turn_id: turn_id as bigint with its foreign key, where it is uuid or lacks the key.
--   task   fix
--   needs  prompt_snapshots (20250213_prompt_snapshots), turns (20250130000000_core_schema)
--   before 20250220_slots_flags
--   locks  ACCESS EXCLUSIVE on prompt_snapshots and SHARE ROW EXCLUSIVE on turns for an instant: no row is read or written
--   again  changes nothing
--   psql "$DATABASE_URL" -f db/migrations/20250222_fix_prompt_snapshots_turn_id.sql

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

DO $$ BEGIN
  IF to_regclass('turns') IS NULL OR to_regclass('prompt_snapshots') IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001', MESSAGE = 'the fix needs the tables turns and prompt_snapshots, and one of them does not exist',
      HINT = CASE WHEN to_regclass('turns') IS NULL
                  THEN 'Run db/migrations/20250130000000_core_schema.sql first (invoke prereqs). This step changed nothing.'
                  ELSE 'Run db/migrations/20250213_prompt_snapshots.sql instead (invoke prereqs): a new table needs no fix. This step changed nothing.' END;
  END IF;
END $$;

-- The uuid values stay, in turn_id_uuid, whose comment says how to go back. What hangs on the column would silently follow it to its
-- new name: its default, NOT NULL and documented index are known, everything else is its owner's to decide about.
DO $$ DECLARE
  snapshots CONSTANT oid := 'prompt_snapshots'::regclass;  -- named once, used by its OID: a copy in another schema may have the name
  path CONSTANT text := current_setting('search_path');
  target text;   -- the table, qualified and quoted
  home text;     -- its schema, quoted
  old record;
  hanging text;
  later text;    -- free behind turn_id_uuid, and behind turn_id_bigint, which an undo makes
  undo text;
  statement text;
  granted text[] := '{}';
BEGIN
  IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = snapshots AND attname = 'turn_id' AND atttypid = 'uuid'::regtype::oid) THEN
    LOCK TABLE prompt_snapshots IN ACCESS EXCLUSIVE MODE;  -- and look again: somebody may have been faster
  END IF;
  SET LOCAL search_path = pg_catalog, pg_temp;  -- no function or operator of others is in reach; put back below
  SELECT attnum, attnotnull, attgenerated, attidentity, attinhcount, attacl, pg_get_expr(adbin, adrelid) AS otherwise,
         col_description(attrelid, attnum) AS comment, (
           SELECT indexrelid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
           WHERE indrelid = attrelid AND relname = 'idx_prompt_snapshots_turn_id' AND indnatts = 1 AND indkey[0] = attnum
             AND NOT indisunique AND indpred IS NULL AND NOT indisreplident) AS index
    INTO old FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
   WHERE attrelid = snapshots AND attname = 'turn_id' AND atttypid = 'uuid'::regtype;
  IF FOUND THEN
    SELECT string_agg(DISTINCT what, E'\n') INTO hanging FROM (
      SELECT pg_describe_object(classid, objid, objsubid) FROM pg_depend
      WHERE refclassid = 'pg_class'::regclass AND refobjid = snapshots AND refobjsubid = old.attnum
        AND NOT (classid = 'pg_class'::regclass AND objid IS NOT DISTINCT FROM old.index)
        AND NOT (classid = 'pg_attrdef'::regclass AND deptype = 'a' AND objid IN (SELECT oid FROM pg_attrdef WHERE adrelid = snapshots AND adnum = old.attnum))
        AND NOT (classid = 'pg_constraint'::regclass AND objid IN (SELECT oid FROM pg_constraint WHERE contype = 'n'))
      UNION ALL
      SELECT format('trigger %s, whose function mentions turn_id', tgname) FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
      WHERE tgrelid = snapshots AND NOT tgisinternal AND prosrc ~ '[^a-z_]turn_id[^a-z_]'
      UNION ALL  -- with a list of columns (new in 15) it depends on the column
      SELECT format('publication %s: its subscribers lack the kept column', pubname)
      FROM pg_publication_rel AS r JOIN pg_publication ON pg_publication.oid = prpubid WHERE prrelid = snapshots AND to_jsonb(r) ->> 'prattrs' IS NULL
      UNION ALL
      SELECT 'the table itself, which is not an ordinary table' FROM pg_class WHERE oid = snapshots AND relkind <> 'r'
      UNION ALL
      SELECT 'the column itself is generated, an identity or inherited' WHERE old.attgenerated <> '' OR old.attidentity <> '' OR old.attinhcount > 0
    ) AS found (what);
    IF hanging IS NOT NULL THEN
      RAISE EXCEPTION USING ERRCODE = 'TB002', MESSAGE = 'objects hang on the uuid column prompt_snapshots.turn_id, which is to be renamed', DETAIL = hanging,
        HINT = 'Drop them (and create them again afterwards, on turn_id or on the kept column), then run '
               'db/migrations/20250222_fix_prompt_snapshots_turn_id.sql (invoke fix) again. This step changed nothing.';
    END IF;

    SELECT quote_ident(nspname), quote_ident(nspname) || '.prompt_snapshots' INTO home, target
      FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = snapshots;
    SELECT min(suffix COLLATE "C") INTO STRICT later FROM unnest('{"",_2,_3,_4,_5,_6,_7,_8,_9}'::text[]) AS suffix
     WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = snapshots AND attname IN ('turn_id_uuid' || suffix, 'turn_id_bigint' || suffix))
       AND to_regclass(home || '.idx_prompt_snapshots_turn_id_uuid' || suffix) IS NULL;
    undo := concat_ws(E'\n', 'BEGIN;',
      format('ALTER TABLE %s RENAME COLUMN turn_id TO turn_id_bigint%s;', target, later),
      format('ALTER TABLE %s RENAME CONSTRAINT prompt_snapshots_turn_id_fkey TO prompt_snapshots_turn_id_bigint%s_fkey;', target, later),
      format('ALTER INDEX IF EXISTS %s.idx_prompt_snapshots_turn_id RENAME TO idx_prompt_snapshots_turn_id_bigint%s;', home, later),
      format('ALTER TABLE %s RENAME COLUMN turn_id_uuid%s TO turn_id;', target, later),
      CASE WHEN old.index IS NOT NULL
           THEN format('ALTER INDEX %s.idx_prompt_snapshots_turn_id_uuid%s RENAME TO idx_prompt_snapshots_turn_id;', home, later) END,
      'ALTER TABLE ' || target || ' ALTER COLUMN turn_id SET DEFAULT ' || old.otherwise || ';',
      CASE WHEN old.attnotnull THEN format('ALTER TABLE %s ALTER COLUMN turn_id SET NOT NULL;  -- rows written since have none', target) END,
      format('COMMENT ON COLUMN %s.turn_id IS %s;', target, coalesce(quote_literal(old.comment), 'NULL')), 'COMMIT;');
    granted := ARRAY(SELECT format('GRANT %s (turn_id) ON %s TO %s', privilege_type, target, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END)
                            || CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END FROM aclexplode(old.attacl));
    EXECUTE format('ALTER TABLE %s RENAME COLUMN turn_id TO turn_id_uuid%s', target, later);
    -- The application does not fill the old column any more: NOT NULL would refuse its rows, a default would invent values.
    EXECUTE format('ALTER TABLE %1$s ALTER COLUMN turn_id_uuid%2$s DROP NOT NULL, ALTER COLUMN turn_id_uuid%2$s DROP DEFAULT', target, later);
    EXECUTE format('COMMENT ON COLUMN %s.turn_id_uuid%s IS %L', target, later,
                   E'Former turn_id, kept by 20250222_fix_prompt_snapshots_turn_id. To undo it:\n' || undo);
    IF old.index IS NOT NULL THEN
      EXECUTE format('ALTER INDEX %s RENAME TO idx_prompt_snapshots_turn_id_uuid%s', old.index::regclass, later);
    END IF;
    RAISE NOTICE E'the uuid values of turn_id are kept in turn_id_uuid%; to undo it:\n%', later, undo;
    -- Those of all tables, or of the schema's, cannot leave this one out, and to drop them would stop all that they publish.
    FOR statement IN SELECT pubname FROM pg_publication_tables WHERE format('%I.%I', schemaname, tablename) = target LOOP
      RAISE NOTICE 'published by %: subscribers stop at the next row until their tables have turn_id_uuid% and a bigint turn_id', statement, later;
    END LOOP;
  END IF;
  PERFORM set_config('search_path', path, true);

  IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = snapshots AND attname = 'turn_id') THEN
    -- A foreign key that comes with its column is valid at once.
    ALTER TABLE prompt_snapshots ADD COLUMN turn_id bigint
      CONSTRAINT prompt_snapshots_turn_id_fkey REFERENCES turns (id) ON DELETE SET NULL;
    FOREACH statement IN ARRAY granted LOOP
      EXECUTE statement;  -- who could read or write turn_id still can
    END LOOP;
  ELSIF NOT EXISTS (SELECT FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
                    WHERE conrelid = snapshots AND contype = 'f' AND attname = 'turn_id' AND conkey[2] IS NULL) THEN
    ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_turn_id_fkey
      FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE SET NULL NOT VALID;
  END IF;
END $$;
COMMIT;

-- Each alone, outside any transaction.
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id);
DO $$ DECLARE
  key name;
BEGIN
  FOR key IN SELECT conname FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
             WHERE conrelid = 'prompt_snapshots'::regclass::oid AND contype = 'f' AND attname = 'turn_id' AND NOT convalidated LOOP
    EXECUTE pg_catalog.format('ALTER TABLE prompt_snapshots VALIDATE CONSTRAINT %I', key);
  END LOOP;
END $$;
