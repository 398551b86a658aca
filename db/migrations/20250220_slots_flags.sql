-- 20250220_slots_flags: which slots the budget engine must keep, and how many characters trimming must leave.
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f db/migrations/20250220_slots_flags.sql     or: invoke slots-flags
--
-- Atomic part  adds must_keep and min_chars to slots with their comments, gives the critical slots their defaults
--              (five look-ups by key) and keeps a trigger that does so for critical slots that come later. ACCESS
--              EXCLUSIVE on slots for an instant, whatever its size: the defaults are catalog changes.
-- Online part  CREATE INDEX CONCURRENTLY idx_slots_must_keep, unless the table is empty.
-- Run again    changes nothing (what operators chose stays as it is), and where nothing is missing locks nothing.

DO $migration$
DECLARE
  -- Said once: the trigger and the rows that stand when the columns are added take their defaults from here.
  critical CONSTANT text := $values$(VALUES
      ('ruleset', 'principles', true, 160),
      ('ruleset', 'choice_style', true, 80),
      ('module', 'actions', true, 60),
      ('world', 'tone', false, 180),
      ('npc', 'persona', false, 140)
    ) AS critical (type, name, must_keep, min_chars)$values$;
  body CONSTANT text := replace(replace($body$
DECLARE
  defaults record;
BEGIN
  SELECT must_keep, min_chars INTO defaults
    FROM {critical}
   WHERE critical.type = NEW.type AND critical.name = NEW.name;
  IF FOUND THEN
    -- Whoever has the TRIGGER privilege on the table could let a function of his own run with our rights.
    IF EXISTS (SELECT FROM pg_trigger AS t JOIN pg_proc AS f ON f.oid = t.tgfoid JOIN pg_roles AS r ON r.oid = f.proowner
               WHERE t.tgrelid = TG_RELID AND NOT t.tgisinternal AND r.rolname <> current_user AND NOT r.rolsuper) THEN
      RAISE WARNING 'critical slot left without its defaults: a trigger of the table runs the function of another role';
      RETURN NULL;
    END IF;
    EXECUTE format('UPDATE %s SET must_keep = $1, min_chars = $2 WHERE id = $3', TG_RELID::regclass)
      USING defaults.must_keep, defaults.min_chars, NEW.id;
  END IF;
  RETURN NULL;
END
$body$, '{critical}', critical), E'\r', '');
  slots CONSTANT oid := to_regclass('slots');
  home CONSTANT regnamespace := (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('slots'));
  owner CONSTANT regrole := (SELECT relowner FROM pg_class WHERE oid = to_regclass('slots'));
  new_must_keep boolean;
  new_min_chars boolean;
  rows_changed bigint;
  other text;
  obstacles text;
BEGIN
  IF current_setting('lock_timeout') = '0' THEN
    PERFORM set_config('lock_timeout', '2s', true);
  END IF;

  IF slots IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001',
      MESSAGE = 'slots_flags needs the table slots, which does not exist',
      DETAIL = 'It adds the columns must_keep and min_chars to it.',
      HINT = 'Run db/migrations/20250214_slots_templates.sql first (invoke prereqs). This step changed nothing.';
  END IF;
  SELECT string_agg(format('slots.%s is %s, promised: %s', promised.name, coalesce(standing.form, 'missing'), promised.form), E'\n')
    INTO obstacles
    FROM (VALUES ('id', 'uuid NOT NULL'), ('type', 'text NOT NULL'), ('name', 'text NOT NULL'),
                 ('must_keep', 'boolean NOT NULL DEFAULT false'), ('min_chars', 'integer')) AS promised (name, form)
    LEFT JOIN LATERAL (
      SELECT a.attname, format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
             || CASE WHEN attname IN ('must_keep', 'min_chars') THEN coalesce(' DEFAULT ' || CASE WHEN attgenerated = '' THEN pg_get_expr(adbin, 0) ELSE 'generated' END, '') ELSE '' END
      FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      WHERE attrelid = slots AND attname = promised.name AND NOT attisdropped
    ) AS standing (name, form) ON true
   WHERE standing.form IS DISTINCT FROM promised.form
     AND NOT (promised.name IN ('must_keep', 'min_chars') AND standing.name IS NULL)      -- to be added
     AND NOT (promised.name = 'must_keep' AND standing.form = 'boolean NOT NULL');       -- wants only its default
  obstacles := concat_ws(E'\n', obstacles, (
    SELECT 'slots is not an ordinary table' FROM pg_class WHERE oid = slots AND relkind <> 'r'
  ), (
    SELECT 'trigger_slots_critical_defaults is a constraint trigger'
    FROM pg_trigger WHERE tgrelid = slots AND tgname = 'trigger_slots_critical_defaults' AND tgconstraint <> 0
  ), (
    SELECT 'set_critical_slot_defaults() is not a trigger function'
    FROM pg_proc
    WHERE proname = 'set_critical_slot_defaults' AND pronamespace = home AND pronargs = 0
      AND (prorettype <> 'trigger'::regtype OR prokind <> 'f')
  ));
  IF obstacles <> '' THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002',
      MESSAGE = 'a column, the trigger or the function of slots stands in another form: it is in the way',
      DETAIL = obstacles,
      HINT = 'Rename the column (ALTER TABLE slots RENAME COLUMN ...), or bring it to the promised form, then run '
             'db/migrations/20250220_slots_flags.sql (invoke slots-flags) again. This step changed nothing.';
  END IF;

  new_must_keep := NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = slots AND attname = 'must_keep');
  new_min_chars := NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = slots AND attname = 'min_chars');
  IF new_must_keep THEN
    ALTER TABLE slots ADD COLUMN must_keep boolean NOT NULL DEFAULT false;
    RAISE NOTICE 'column slots.must_keep added';
  ELSIF NOT (SELECT atthasdef FROM pg_attribute WHERE attrelid = slots AND attname = 'must_keep') THEN
    ALTER TABLE slots ALTER COLUMN must_keep SET DEFAULT false;
    RAISE NOTICE 'column slots.must_keep given its default';
  END IF;
  IF new_min_chars THEN
    ALTER TABLE slots ADD COLUMN min_chars int;
    RAISE NOTICE 'column slots.min_chars added';
  END IF;
  IF col_description(slots, (SELECT attnum FROM pg_attribute WHERE attrelid = slots AND attname = 'must_keep')) IS NULL THEN
    COMMENT ON COLUMN slots.must_keep IS 'The budget engine must not trim this slot';
  END IF;
  IF col_description(slots, (SELECT attnum FROM pg_attribute WHERE attrelid = slots AND attname = 'min_chars')) IS NULL THEN
    COMMENT ON COLUMN slots.min_chars IS 'Characters of this slot that trimming must leave; NULL = none';
  END IF;

  -- A table without a page has nothing to scan, and (with a column just added) nobody else is in it: no online part is needed.
  IF (new_must_keep OR new_min_chars) AND pg_relation_size(slots) = 0
     AND to_regclass(format('%s.idx_slots_must_keep', home)) IS NULL THEN
    CREATE INDEX idx_slots_must_keep ON slots (must_keep) WHERE must_keep;
  END IF;

  -- The trigger runs as the owner of slots, so that whoever may insert a slot need not be allowed to update it. Hence a
  -- fixed search_path (pg_temp last: it would be searched first), the table's owner, and nobody else who may call it.
  IF NOT EXISTS (
    SELECT FROM pg_proc
    WHERE proname = 'set_critical_slot_defaults' AND pronamespace = home AND pronargs = 0 AND replace(prosrc, E'\r', '') = body
      AND prosecdef AND proconfig = ARRAY['search_path=pg_catalog, pg_temp'] AND proowner = owner
      AND NOT EXISTS (SELECT FROM aclexplode(coalesce(proacl, acldefault('f', proowner))) WHERE grantee <> proowner)
  ) THEN
    EXECUTE format('CREATE OR REPLACE FUNCTION %s.set_critical_slot_defaults() RETURNS trigger
                      LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS %L', home, body);
    IF owner <> (SELECT proowner FROM pg_proc WHERE oid = to_regprocedure(format('%s.set_critical_slot_defaults()', home))) THEN
      EXECUTE format('ALTER FUNCTION %s.set_critical_slot_defaults() OWNER TO %s', home, owner);
    END IF;
    FOR other IN
      SELECT DISTINCT CASE acl.grantee WHEN 0 THEN 'PUBLIC' ELSE acl.grantee::regrole::text END
      FROM pg_proc CROSS JOIN aclexplode(coalesce(proacl, acldefault('f', proowner))) AS acl
      WHERE pg_proc.oid = to_regprocedure(format('%s.set_critical_slot_defaults()', home)) AND acl.grantee <> proowner
    LOOP
      EXECUTE format('REVOKE ALL ON FUNCTION %s.set_critical_slot_defaults() FROM %s', home, other);
    END LOOP;
    EXECUTE format('COMMENT ON FUNCTION %s.set_critical_slot_defaults() IS %L', home,
                   'Gives a new critical slot the must_keep and min_chars that it was inserted without');
    RAISE NOTICE 'function set_critical_slot_defaults created';
  END IF;
  -- AFTER INSERT sees only rows that are really new. A BEFORE trigger would also run for an upsert that then meets an
  -- existing row, and reach DO UPDATE through EXCLUDED: the operator's choice would be lost.
  IF NOT EXISTS (
    SELECT FROM pg_trigger
    WHERE tgrelid = slots AND tgname = 'trigger_slots_critical_defaults' AND tgenabled IN ('O', 'A')
      AND tgfoid = to_regprocedure(format('%s.set_critical_slot_defaults()', home))
      AND pg_get_triggerdef(oid, true) LIKE '% AFTER INSERT ON % FOR EACH ROW WHEN (NOT new.must_keep AND new.min_chars IS NULL) EXECUTE %'
  ) THEN
    EXECUTE format('CREATE OR REPLACE TRIGGER trigger_slots_critical_defaults AFTER INSERT ON slots
                      FOR EACH ROW WHEN (NOT NEW.must_keep AND NEW.min_chars IS NULL)
                      EXECUTE FUNCTION %s.set_critical_slot_defaults()', home);
    ALTER TABLE slots ENABLE TRIGGER trigger_slots_critical_defaults;
    COMMENT ON TRIGGER trigger_slots_critical_defaults ON slots IS 'Defaults for critical slots that are inserted later';
    RAISE NOTICE 'trigger trigger_slots_critical_defaults created';
  END IF;

  -- Only in the transaction that adds a column is it certain that nobody chose its value; a column that stood is left alone.
  -- Last of all, because what deferred triggers have pending forbids further ALTERs.
  IF new_must_keep OR new_min_chars THEN
    -- Look-ups by key: the rest of the table is not to be read now. And no row may be hidden from us in silence.
    PERFORM set_config(name, 'off', true) FROM unnest(ARRAY['enable_seqscan', 'enable_hashjoin', 'enable_mergejoin', 'row_security']) AS name;
    PERFORM set_config(name, 'on', true) FROM unnest(ARRAY['enable_nestloop', 'enable_indexscan']) AS name;
    EXECUTE format('UPDATE slots AS s
                       SET must_keep = CASE WHEN $1 THEN critical.must_keep ELSE s.must_keep END,
                           min_chars = CASE WHEN $2 THEN critical.min_chars ELSE s.min_chars END
                      FROM %s
                     WHERE s.type = critical.type AND s.name = critical.name AND NOT s.must_keep AND s.min_chars IS NULL',
                   critical)
      USING new_must_keep, new_min_chars;
    GET DIAGNOSTICS rows_changed = ROW_COUNT;
    RAISE NOTICE '% critical slots given their defaults', rows_changed;
    PERFORM set_config(name, 'on', true) FROM unnest(ARRAY['enable_seqscan', 'enable_hashjoin', 'enable_mergejoin', 'row_security']) AS name;
  END IF;
END
$migration$;

-- online: psql runs each statement that this SELECT returns alone, outside any transaction; so does the runner.
SELECT online.statement
FROM (VALUES
    ('idx_slots_must_keep', 'slots', 'btree (must_keep) WHERE must_keep')
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
