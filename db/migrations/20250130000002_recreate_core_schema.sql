-- 20250130000002_recreate_core_schema: the core schema new and empty, where it exists in an older form; that one is moved to an archive.
--   task   prereqs     (--recreate)
--   instead of 20250130000000_core_schema     (where games, turns or what new ones need have another id, or are no ordinary tables)
--   locks  ACCESS EXCLUSIVE for an instant on all that moves, whatever its size
--   again  changes nothing
--   psql "$DATABASE_URL" -f db/migrations/20250130000002_recreate_core_schema.sql
--
-- All in one transaction: the core tables, and prompt_snapshots and turn_metrics where their foreign keys lead there, move to a new schema
-- (core_archive, core_archive_2, …) with rows, keys, indexes, triggers, policies and grants; the files included below make them anew; these
-- get the old ones' owner, grants and row-level security, and their ids go on above the old ones. Tables of others whose foreign keys lead
-- there are listed, and move along on request only: PGOPTIONS="-c budget_engine.with_dependants=on" psql … Then the other files are run again.

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

DO $$ DECLARE
  names CONSTANT text[] := '{worlds,rulesets,entry_points,prompt_segments,games,turns,prompt_snapshots,turn_metrics}';
  named oid[];    -- what has the names
  path CONSTANT text := current_setting('search_path');
  schemas CONSTANT name[] := pg_catalog.current_schemas(false);
  with_dependants CONSTANT boolean := coalesce(current_setting('budget_engine.with_dependants', true), '') = 'on';
  patience CONSTANT text := current_setting('lock_timeout');
  reasons text;
  moving oid[];
  unasked oid[];  -- of these, what need not be asked for
  locked oid[];
  others text;
  archive text;   -- quoted
  homes oid[];    -- schemas from which core tables go
  statement text;
BEGIN
  PERFORM pg_catalog.set_config('budget_engine.moved', '{}', true);
  LOOP
    -- Each name is resolved, and from there on it is OIDs: no function or operator of others is in reach. The path is set again below.
    named := ARRAY(SELECT to_regclass(name)::oid FROM pg_catalog.unnest(names) WITH ORDINALITY AS n (name, position) ORDER BY position);
    SET LOCAL search_path = pg_catalog, pg_temp;
    SELECT string_agg(format('%s is %s', relname || CASE WHEN relkind = 'r' AND NOT relispartition THEN '.id' ELSE '' END,
                        CASE WHEN relkind <> 'r' OR relispartition THEN 'no ordinary table'
                             ELSE coalesce(format_type(atttypid, atttypmod), 'missing') || ', expected ' || needed.type || ', a primary key' END), E'\n')
      INTO reasons
      FROM (VALUES (1, 'text'), (2, 'text'), (3, 'text'), (5, 'uuid'), (6, 'bigint')) AS needed (position, type)
      JOIN pg_class ON pg_class.oid = named[needed.position]
      LEFT JOIN pg_attribute ON attrelid = pg_class.oid AND attname = 'id'
     WHERE (needed.position >= 5 OR named[5] IS NULL OR needed.position < 3 AND named[3] IS NULL)  -- what exists, or is to be made, points there
       AND (relkind <> 'r' OR relispartition OR atttypid IS DISTINCT FROM to_regtype(needed.type) OR attgenerated <> ''
            OR NOT EXISTS (
              SELECT FROM pg_index WHERE indrelid = pg_class.oid AND indisprimary AND indnkeyatts = 1 AND indkey[0] = attnum));
    IF reasons IS NULL THEN
      PERFORM set_config('search_path', path, true);
      RETURN;
    END IF;
    -- The core tables, whatever leads into them by foreign keys, and children of all these.
    WITH RECURSIVE led (oid, unasked) AS (
      SELECT core.oid, true FROM unnest(named[1:6]) AS core (oid) WHERE core.oid IS NOT NULL
      UNION
      SELECT next.oid, next.unasked
      FROM led CROSS JOIN LATERAL (
        SELECT conrelid, coalesce(conrelid = ANY (named), false) FROM pg_constraint WHERE contype = 'f' AND confrelid = led.oid
        UNION ALL
        SELECT inhrelid, led.unasked FROM pg_inherits WHERE inhparent = led.oid
      ) AS next (oid, unasked)
    )
    SELECT array_agg(DISTINCT led.oid ORDER BY led.oid), array_agg(DISTINCT led.oid) FILTER (WHERE led.unasked) INTO moving, unasked FROM led;
    EXIT WHEN moving = locked;
    SELECT string_agg(other, E'\n') INTO others FROM (
      SELECT format('%s: %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid)) FROM pg_constraint
      WHERE contype = 'f' AND conparentid = 0 AND conrelid = ANY (moving) AND confrelid = ANY (moving) AND conrelid <> ALL (unasked) AND NOT with_dependants
      UNION ALL
      SELECT format('%s is no table or view', relname) FROM pg_class WHERE oid = ANY (moving) AND relkind NOT IN ('r', 'p', 'v', 'm', 'f')
    ) AS found (other);
    IF others IS NOT NULL THEN
      RAISE EXCEPTION USING ERRCODE = 'TB002', MESSAGE = 'tables of others lead into the old core tables', DETAIL = others,
        HINT = 'Drop these foreign keys, or have their tables move along: PGOPTIONS="-c budget_engine.with_dependants=on" psql ... -f '
               'db/migrations/20250130000002_recreate_core_schema.sql (invoke prereqs --recreate --with-dependants). This step changed nothing.';
    END IF;
    -- The first is waited for while nothing is held; the others for a moment only, because who waits for one holds up whoever wants the first.
    FOR statement IN SELECT format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', oid::regclass)
                     FROM pg_class WHERE oid = ANY (moving) AND relkind IN ('r', 'p') ORDER BY relname <> 'turns', oid LOOP
      EXECUTE statement;
      PERFORM set_config('lock_timeout', '100ms', true);
      EXIT WHEN locked IS NULL;
    END LOOP;
    PERFORM set_config('lock_timeout', patience, true), set_config('search_path', path, true);
    locked := CASE WHEN locked IS NULL THEN '{}' ELSE moving END;  -- and look again, after the first, too: somebody may have been faster
  END LOOP;

  FOR statement IN
    SELECT format('publication %s', pubname) FROM pg_publication_rel JOIN pg_publication ON pg_publication.oid = prpubid WHERE prrelid = ANY (moving)
    UNION
    SELECT pg_describe_object('pg_class'::regclass, ev_class, 0) FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid
    WHERE classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass AND refobjid = ANY (moving) AND ev_class <> ALL (moving)
    UNION
    SELECT pg_describe_object(classid, objid, 0) FROM pg_depend LEFT JOIN pg_policy ON classid = 'pg_policy'::regclass AND pg_policy.oid = objid
    WHERE refclassid = 'pg_class'::regclass AND refobjid = ANY (moving) AND (classid = 'pg_proc'::regclass OR polrelid <> ALL (moving))
  LOOP
    RAISE NOTICE '% goes on with the old tables', statement;
  END LOOP;

  LOOP
    SELECT name INTO archive
      FROM generate_series(1, (SELECT count(*) + 1 FROM pg_namespace)) AS n CROSS JOIN concat('core_archive', '_' || nullif(n, 1)) AS name
     WHERE to_regnamespace(name) IS NULL ORDER BY n LIMIT 1;
    BEGIN
      EXECUTE format('CREATE SCHEMA %s', archive);
      EXIT;
    EXCEPTION WHEN unique_violation OR duplicate_schema THEN  -- another session was faster: the next one
    END;
  END LOOP;
  EXECUTE format('COMMENT ON SCHEMA %s IS %L', archive,
                 format(E'The core schema as it was until %s, and what led into it, rows and all; moved here by '
                        '20250130000002_recreate_core_schema because:\n%s', now(), reasons));
  -- Whoever reached the tables where they were does so here; their foreign keys are checked with the rights of their owners.
  FOR statement IN
    SELECT format('GRANT USAGE ON SCHEMA %s TO %s', archive, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END)
    FROM (SELECT acl.grantee FROM pg_namespace CROSS JOIN LATERAL aclexplode(coalesce(nspacl, acldefault('n', nspowner))) AS acl
          WHERE acl.privilege_type = 'USAGE' AND oid IN (SELECT relnamespace FROM pg_class WHERE oid = ANY (moving))
          UNION SELECT relowner FROM pg_class WHERE oid = ANY (moving)) AS reaching (grantee)
  LOOP
    EXECUTE statement;
  END LOOP;
  homes := ARRAY(SELECT DISTINCT relnamespace FROM pg_class WHERE oid = ANY (named[1:6]));
  FOR statement IN
    SELECT format('ALTER TABLE %s SET SCHEMA %s', oid::regclass, archive) FROM pg_class WHERE oid = ANY (moving)
    UNION ALL  -- the trigger goes with its table and finds its function by OID
    SELECT format('ALTER FUNCTION %s SET SCHEMA %s', oid::regprocedure, archive) FROM pg_proc
    WHERE proname = 'update_entry_points_search_text' AND pronargs = 0 AND prokind = 'f' AND pronamespace = ANY (homes)
  LOOP
    EXECUTE statement;
    RAISE NOTICE '% moved to %', substring(statement FROM ' (?:TABLE|FUNCTION) (.*) SET SCHEMA '), archive;
  END LOOP;
  -- The new tables are made where the old ones were, and see no copy of the same name in a later schema.
  PERFORM set_config('budget_engine.moved', ARRAY(SELECT oid FROM unnest(named) AS n (oid) WHERE oid = ANY (moving))::text, true),
          set_config('budget_engine.named', named::text, true),
          set_config('search_path', (SELECT quote_ident(nspname) FROM unnest(schemas) WITH ORDINALITY AS s (name, position)
                                     JOIN pg_namespace ON nspname = s.name WHERE oid = ANY (homes) ORDER BY position LIMIT 1), true);
END $$;

-- What these files do between BEGIN and COMMIT is part of this transaction (that it has begun already is no matter).
SELECT coalesce(pg_catalog.bool_or(relname = 'prompt_snapshots'), false) AS moved_snapshots,
       coalesce(pg_catalog.bool_or(relname = 'turn_metrics'), false) AS moved_metrics
FROM pg_class WHERE oid = ANY (current_setting('budget_engine.moved')::oid[])
\gset
;
SET LOCAL client_min_messages = error;
\set recreating on
\ir 20250130000000_core_schema.sql
\if :moved_snapshots
\ir 20250213_prompt_snapshots.sql
\ir 20250221_budget_report.sql
\endif
\if :moved_metrics
\ir 20250222_turn_metrics.sql
\endif
\unset recreating
SET LOCAL client_min_messages = notice;

-- Each new table is to its users what the old one was: owner, grants (no others, whatever ALTER DEFAULT PRIVILEGES says, but what the
-- chain's own policies need), row-level security. Policies of others are made anew by hand: their conditions name old tables.
DO $$ DECLARE
  path CONSTANT text := current_setting('search_path');
  place CONSTANT name := pg_catalog.current_schema();
  moved CONSTANT oid[] := current_setting('budget_engine.moved');
  named CONSTANT oid[] := nullif(current_setting('budget_engine.named', true), '');
  was record;
  ids oid;      -- sequence of the new table's ids
  old_ids oid;
  last bigint;
  highest bigint;
  statement text;
BEGIN
  SET LOCAL search_path = pg_catalog, pg_temp;  -- no function or operator of others is in reach; put back below
  FOR was IN SELECT old.*, new.oid AS new, new.oid::regclass AS target
             FROM pg_class AS old JOIN pg_class AS new USING (relname) JOIN pg_namespace AS home ON home.oid = new.relnamespace
             WHERE old.oid = ANY (moved) AND nspname = place ORDER BY array_position(moved, old.oid) LOOP
    ids := to_regclass(pg_get_serial_sequence(was.target::text, (SELECT attname FROM pg_attribute WHERE attrelid = was.new AND attname = 'id')));
    old_ids := to_regclass(pg_get_serial_sequence(was.oid::regclass::text, (SELECT attname FROM pg_attribute WHERE attrelid = was.oid AND attname = 'id')));
    EXECUTE format('ALTER TABLE %s OWNER TO %s', was.target, was.relowner::regrole);
    IF was.relname = 'entry_points' THEN
      EXECUTE format('ALTER FUNCTION %I.update_entry_points_search_text() OWNER TO %s', place, was.relowner::regrole);
    END IF;
    FOR statement IN
      WITH acl (kind, target, is_old, grantee, privilege, option) AS (
        SELECT kind, new::regclass, is_old, entry.grantee, privilege_type, CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END
        FROM (VALUES ('TABLE', was.oid, was.new), ('SEQUENCE', old_ids, ids)) AS object (kind, old, new) CROSS JOIN LATERAL (
          SELECT oid <> new, relacl, relowner FROM pg_class WHERE oid IN (old, new)
          UNION ALL SELECT true, NULL, was.relowner WHERE old IS NULL  -- an old uuid had no sequence
        ) AS its (is_old, acl, owner)
        CROSS JOIN LATERAL aclexplode(coalesce(acl, acldefault(CASE kind WHEN 'TABLE' THEN 'r' ELSE 's' END::"char", owner))) AS entry
        WHERE new IS NOT NULL
        UNION ALL  -- who could insert needs the sequence of the ids
        SELECT 'SEQUENCE', ids, true, entry.grantee, 'USAGE', NULL
        FROM (SELECT was.relacl UNION ALL SELECT attacl FROM pg_attribute WHERE attrelid = was.oid) AS rights (acl) CROSS JOIN LATERAL aclexplode(acl) AS entry
        WHERE entry.privilege_type = 'INSERT' AND entry.grantee <> was.relowner AND ids IS NOT NULL
        UNION ALL
        SELECT 'TABLE', was.new, true, entry.grantee, format('%s (%I)', privilege_type, attname), CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END
        FROM pg_attribute AS a CROSS JOIN LATERAL aclexplode(attacl) AS entry
        WHERE attrelid = was.oid AND EXISTS (SELECT FROM pg_attribute AS b WHERE b.attrelid = was.new AND b.attname = a.attname)
      )
      SELECT format(CASE WHEN is_old THEN 'GRANT %s ON %s %s TO %s%s' ELSE 'REVOKE ALL ON %2$s %3$s FROM %4$s' END,
               string_agg(privilege, ', '), kind, target, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END, option)
      FROM acl WHERE (is_old OR NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = was.new AND grantee = ANY (polroles))) AND EXISTS (
        SELECT FROM pg_class WHERE oid IN (was.oid, was.new, old_ids, ids) AND relacl IS NOT NULL  -- else nothing was granted
        UNION ALL SELECT FROM pg_attribute WHERE attrelid = was.oid AND attacl IS NOT NULL)
      GROUP BY kind, target, is_old, grantee, option ORDER BY is_old, option NULLS FIRST  -- not after a role of ours may grant: it would be the grantor
    LOOP
      EXECUTE statement;
    END LOOP;
    IF was.relrowsecurity THEN EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', was.target); END IF;
    IF was.relforcerowsecurity THEN EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', was.target); END IF;
    SELECT string_agg(polname, ', ' ORDER BY polname) INTO statement
      FROM pg_policy WHERE polrelid = was.oid AND polname NOT IN (SELECT polname FROM pg_policy WHERE polrelid = was.new);
    IF statement IS NOT NULL THEN RAISE NOTICE 'policies of % went with the old table, to be made anew: %', was.relname, statement; END IF;

    -- Ids of turns are in snapshots and metrics, too, moved or not: an old row must not come to belong to a new turn.
    CONTINUE WHEN ids IS NULL;
    PERFORM set_config('row_security', 'off', true);  -- an error is better than a maximum of some of the rows
    last := pg_sequence_last_value(old_ids);
    FOR statement IN
      SELECT format('SELECT max(%I)::bigint FROM %s', attname, attrelid::regclass) FROM pg_attribute
      WHERE (attrelid = was.oid AND attname = 'id' OR was.relname = 'turns' AND attrelid = ANY (named) AND attname = 'turn_id')
        AND atttypid IN ('bigint'::regtype, 'int'::regtype, 'smallint'::regtype) AND EXISTS (
          SELECT FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_am ON pg_am.oid = relam
          WHERE indrelid = attrelid AND indkey[0] = attnum AND indisvalid AND indpred IS NULL AND amname = 'btree')
    LOOP
      EXECUTE statement INTO highest;
      last := greatest(last, highest);
    END LOOP;
    IF last >= 1 THEN
      PERFORM setval(ids, last);
      RAISE NOTICE 'ids of % go on above %', was.relname, last;
    END IF;
    PERFORM set_config('row_security', 'on', true);
  END LOOP;
  PERFORM set_config('search_path', path, true);
END $$;
COMMIT;

-- By psql the files again, now whole: the indexes that they build outside any transaction.
\include_relative 20250130000000_core_schema.sql
\if :moved_snapshots
\include_relative 20250213_prompt_snapshots.sql
\endif
\if :moved_metrics
\include_relative 20250222_turn_metrics.sql
\endif
