-- 20250220_slots_flags: which slots the budget engine must keep, and how many characters trimming must leave.
--   task   slots-flags
--   needs  slots (20250214_slots_templates)
--   locks  ACCESS EXCLUSIVE for an instant on slots, whatever its size: the defaults are catalog changes
--   again  changes nothing: what somebody chose in the meantime stays
--   psql "$DATABASE_URL" -f db/migrations/20250220_slots_flags.sql

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

DO $$ BEGIN
  IF to_regclass('slots') IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001', MESSAGE = 'slots_flags needs the table slots, which does not exist',
      HINT = 'Run db/migrations/20250214_slots_templates.sql first (invoke prereqs). This step changed nothing.';
  ELSIF EXISTS (SELECT FROM pg_class JOIN pg_proc ON pronamespace = relnamespace AND proowner <> relowner AND pronargs = 0::int2
                WHERE pg_class.oid = 'slots'::regclass::oid AND proname IN ('critical_slot_defaults', 'set_critical_slot_defaults')) THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002', MESSAGE = 'a function with the name of one of ours belongs to another role than slots does',
      HINT = 'Rename it, then run db/migrations/20250220_slots_flags.sql (invoke slots-flags) again. This step changed nothing.';
  END IF;
  -- From here on in the schema of slots, and as its owner: what is created belongs to it, and its triggers run with its rights.
  PERFORM pg_catalog.set_config('budget_engine.role', current_setting('role'), true),
          pg_catalog.set_config('budget_engine.new', ARRAY(
            SELECT name FROM pg_catalog.unnest('{must_keep,min_chars}'::name[]) AS name
            WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = name))::text, true),
          pg_catalog.set_config('search_path', pg_catalog.format('%I, %s', nspname, current_setting('search_path')), true),
          pg_catalog.set_config('role', rolname::text, true)
     FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace JOIN pg_roles AS r ON r.oid = relowner WHERE pg_class.oid = 'slots'::regclass::oid;
END $$;

ALTER TABLE slots ADD COLUMN IF NOT EXISTS must_keep boolean NOT NULL DEFAULT false;
ALTER TABLE slots ADD COLUMN IF NOT EXISTS min_chars int;
DO $$ BEGIN  -- one that was added by hand may lack it
  IF NOT (SELECT atthasdef FROM pg_attribute WHERE attrelid = 'slots'::regclass::oid AND attname = 'must_keep') THEN
    ALTER TABLE slots ALTER COLUMN must_keep SET DEFAULT false;
  END IF;
END $$;
DO $$ DECLARE
  commented CONSTANT name[] := ARRAY(SELECT attname FROM pg_attribute JOIN pg_description ON objoid = attrelid AND objsubid = attnum::int
                                     WHERE attrelid = 'slots'::regclass::oid AND classoid = 'pg_class'::regclass::oid);
BEGIN
  IF 'must_keep' <> ALL (commented) THEN COMMENT ON COLUMN slots.must_keep IS 'The budget engine must not trim this slot'; END IF;
  IF 'min_chars' <> ALL (commented) THEN COMMENT ON COLUMN slots.min_chars IS 'Characters of this slot that trimming must leave; NULL = none'; END IF;
END $$;

-- Critical slots: said once, for the rows that exist and for those that come later.
CREATE OR REPLACE FUNCTION critical_slot_defaults() RETURNS TABLE (type text, name text, must_keep boolean, min_chars int)
  LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$ VALUES
  ('ruleset', 'principles',   true,  160),
  ('ruleset', 'choice_style', true,  80),
  ('module',  'actions',      true,  60),
  ('world',   'tone',         false, 180),
  ('npc',     'persona',      false, 140)
$$;
GRANT EXECUTE ON FUNCTION critical_slot_defaults() TO PUBLIC;  -- whoever inserts a slot needs it

-- An upsert that meets an existing row keeps what it says: first it is looked whether there is one. Who may not read that cannot upsert.
CREATE OR REPLACE FUNCTION set_critical_slot_defaults() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
  exists_already boolean := false;
BEGIN
  IF has_column_privilege(TG_RELID, 'type', 'SELECT') AND has_column_privilege(TG_RELID, 'name', 'SELECT') THEN
    EXECUTE format('SELECT EXISTS (SELECT FROM %s WHERE type = $1 AND name = $2)', TG_RELID::regclass)
      INTO exists_already USING NEW.type, NEW.name;
  END IF;
  IF NOT exists_already THEN
    EXECUTE format('SELECT coalesce(bool_or(must_keep), false), max(min_chars) FROM %I.critical_slot_defaults() WHERE type = $1 AND name = $2',
                   TG_TABLE_SCHEMA)
      INTO NEW.must_keep, NEW.min_chars USING NEW.type, NEW.name;
  END IF;
  RETURN NEW;
END
$$;
CREATE OR REPLACE TRIGGER trigger_slots_critical_defaults BEFORE INSERT ON slots
  FOR EACH ROW WHEN (NOT NEW.must_keep AND NEW.min_chars IS NULL) EXECUTE FUNCTION set_critical_slot_defaults();

-- Rows that exist get the defaults of a column that is new (later, unset cannot be told from chosen), looked up by key. Triggers and rules run
-- then as the owner, and as SECURITY DEFINER, which they cannot leave: a role that was only SET they could RESET.
DO $$ DECLARE
  keep CONSTANT boolean := 'must_keep' = ANY (current_setting('budget_engine.new')::name[]);
  chars CONSTANT boolean := 'min_chars' = ANY (current_setting('budget_engine.new')::name[]);
  path CONSTANT text := current_setting('search_path');
  owner CONSTANT text := current_setting('role'); ours CONSTANT text := current_setting('budget_engine.role');
  wanted CONSTANT jsonb := (SELECT pg_catalog.jsonb_agg(d) FROM critical_slot_defaults() AS d);  -- before theirs can replace it
  d record; forced CONSTANT boolean := (SELECT relforcerowsecurity FROM pg_class WHERE oid = 'slots'::regclass::oid);
BEGIN
  IF keep OR chars THEN
    CREATE FUNCTION give_critical_slot_defaults(boolean, boolean) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $function$ DECLARE
    d record; BEGIN
      FOR d IN SELECT * FROM critical_slot_defaults() LOOP
        UPDATE slots SET must_keep = CASE WHEN $1 THEN d.must_keep ELSE must_keep END, min_chars = CASE WHEN $2 THEN d.min_chars ELSE min_chars END
         WHERE type = d.type AND name = d.name AND NOT must_keep AND min_chars IS NULL;
      END LOOP;
    END $function$;
    IF forced THEN ALTER TABLE slots NO FORCE ROW LEVEL SECURITY; END IF;  -- else policies hide rows from the owner, too
    PERFORM pg_catalog.set_config('enable_seqscan', 'off', true), give_critical_slot_defaults(keep, chars);
    -- Whatever they did to our settings, our functions and slots: from here on nothing of theirs is in reach.
    PERFORM pg_catalog.set_config('search_path', path, true), pg_catalog.set_config('role', ours, true), pg_catalog.set_config('row_security', 'off', true);
    FOR d IN SELECT * FROM pg_catalog.jsonb_to_recordset(wanted) AS d (type text, name text, must_keep boolean, min_chars int) LOOP
      IF 4 <> (SELECT pg_catalog.count(*) FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
               WHERE pg_class.oid = 'slots'::regclass::oid AND relkind = 'r'
                 AND (attname IN ('type', 'name') AND atttypid = 'text'::regtype::oid OR attname = 'must_keep' AND atttypid = 'boolean'::regtype::oid
                      OR attname = 'min_chars' AND atttypid = 'int'::regtype::oid)) THEN
        RAISE EXCEPTION USING ERRCODE = 'TB002', MESSAGE = 'slots is no table with type and name text, must_keep boolean and min_chars int',
          HINT = 'Have it so, then run db/migrations/20250220_slots_flags.sql (invoke slots-flags) again. This step changed nothing.';
      ELSIF owner <> current_user::text AND current_setting('server_version_num')::int < 180000 AND EXISTS (
          SELECT FROM pg_trigger JOIN pg_stat_xact_all_tables ON relid = tgrelid WHERE tgdeferrable AND tgenabled <> 'D' AND tgfoid > 16383::oid
            AND n_tup_ins + n_tup_upd + n_tup_del > 0::bigint) THEN
        RAISE EXCEPTION USING ERRCODE = 'TB003', MESSAGE = 'a deferrable trigger of another role would run at COMMIT with the rights of who commits',
          HINT = 'Disable those of slots, or run db/migrations/20250220_slots_flags.sql (invoke slots-flags) as its owner. This step changed nothing.';
      ELSIF EXISTS (SELECT FROM slots WHERE type = d.type AND name = d.name AND (keep OR NOT must_keep) AND (chars OR min_chars IS NULL)
                      AND (keep AND must_keep <> d.must_keep OR chars AND min_chars IS DISTINCT FROM d.min_chars)) THEN
        RAISE EXCEPTION USING ERRCODE = 'TB003', MESSAGE = 'a trigger or rule of slots keeps a critical slot from its defaults',
          DETAIL = pg_catalog.format('The slot (%s, %s) should have must_keep %s and min_chars %s.', d.type, d.name, d.must_keep, d.min_chars),
          HINT = 'Disable it while this step runs: db/migrations/20250220_slots_flags.sql (invoke slots-flags). This step changed nothing.';
      END IF;
    END LOOP;
    PERFORM pg_catalog.set_config('role', owner, true), pg_catalog.set_config('row_security', 'on', true);
    IF forced THEN ALTER TABLE slots FORCE ROW LEVEL SECURITY; END IF; DROP FUNCTION give_critical_slot_defaults(boolean, boolean);
    PERFORM pg_catalog.set_config('enable_seqscan', 'on', true);
  END IF;
  PERFORM pg_catalog.set_config('role', ours, true);
END $$;
COMMIT;

-- Each alone, outside any transaction.
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_slots_must_keep ON slots (must_keep) WHERE must_keep;
