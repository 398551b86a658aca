-- 20250130000002_recreate_core_schema: the core schema new and empty, where it stands in an older form; that one is moved.
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f db/migrations/20250130000002_recreate_core_schema.sql
--                                                                            or: invoke prereqs --recreate
--
-- The alternative to 20250130000000_core_schema, for core tables that lack a documented column or key, have a column in
-- another form, or are no ordinary tables.
-- Atomic part  moves the core tables, and prompt_snapshots and turn_metrics where their foreign keys lead there, to a
--              new schema (core_attic): rows, keys, indexes, triggers, policies and grants go along. Creates all of
--              them anew and empty, with the old ones' owner, grants and row-level security; ids go on above the old
--              ones. ACCESS EXCLUSIVE on all that moves, for an instant, whatever the size. Tables of others whose
--              foreign keys lead there are in the way, unless they are to move along:
--                PGOPTIONS="-c budget_engine.with_dependants=on" psql ...      or: invoke prereqs --recreate --with-dependants
--              Where no table stands in a wrong form it is 20250130000000_core_schema without its online part.
-- Afterwards   run the other files again, in their order: they complete prompt_snapshots and turn_metrics.
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
  auth_users CONSTANT oid := (
    SELECT a.attrelid FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
    WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'auth')
      AND c.relname = 'users' AND a.attname = 'id' AND a.atttypid = 'uuid'::regtype);
  names CONSTANT text[] := '{worlds,rulesets,entry_points,prompt_segments,games,turns,prompt_snapshots,turn_metrics}';
  with_dependants CONSTANT boolean := coalesce(current_setting('budget_engine.with_dependants', true), '') = 'on';
  path CONSTANT text := current_setting('search_path');
  created text[] := '{}';
  relation text;
  obstacles text;
  reasons text;       -- why the core schema must be made anew; NULL: it need not
  named oid[];        -- what bears the names
  moving oid[];       -- what goes, by OID
  unasked oid[];      -- of these, what need not be asked for
  locked oid[];       -- what was to go when the locks came
  wanted oid;         -- the new table
  needed text[];      -- the locks, as statements
  moment text;
  give_up timestamptz;
  homes oid[];        -- schemas from which core tables go
  attic text;         -- schema to which they go, quoted
  place text;         -- schema in which the new ones are made, quoted
  was pg_class;
  ids oid;            -- sequence of the new table's ids
  old_ids oid;
  last bigint;
  highest bigint;
  statement text;
  progress text;
BEGIN
  IF current_setting('lock_timeout') = '0' THEN
    PERFORM set_config('lock_timeout', '2s', true);
  END IF;

  LOOP
    -- Each name is resolved once; from there on it is OIDs.
    named := ARRAY(SELECT to_regclass(name)::oid FROM unnest(names) WITH ORDINALITY AS n (name, position) ORDER BY position);
    SELECT string_agg(reason, E'\n')
      INTO reasons
      FROM (
        SELECT format('%s.%s is %s, promised: %s', documented.relation, split_part(spec, ' ', 1),
                      coalesce(standing.form, 'missing'), promised.form)
        FROM (VALUES
          ('worlds', 'id text!, version text!, status text!, doc jsonb!, created_at timestamptz!, updated_at timestamptz!'),
          ('rulesets', 'id text!, version text!, status text!, doc jsonb!, created_at timestamptz!, updated_at timestamptz!'),
          ('entry_points', 'id text!, slug text!, type text!, world_id text!, ruleset_id text!, title text!, subtitle text, description text!, synopsis text, status text!, visibility text!, content_rating text!, tags text[]!, content jsonb!, i18n jsonb!, search_text tsvector, sort_weight int!, popularity_score int!, created_at timestamptz!, updated_at timestamptz!'),
          ('prompt_segments', 'id bigint!, scope text!, ref_id text, version text!, active boolean!, content text!, metadata jsonb!, created_at timestamptz!, updated_at timestamptz!'),
          ('games', 'id uuid!, entry_point_id text!, entry_point_type text!, world_id text!, ruleset_id text!, owner_user_id uuid, state jsonb!, turn_count int!, status text!, created_at timestamptz!, updated_at timestamptz!'),
          ('turns', 'id bigint!, game_id uuid!, idx int!, role text!, prompt_meta jsonb!, content jsonb!, costs jsonb!, created_at timestamptz!')
        ) AS documented (relation, columns)
        CROSS JOIN LATERAL string_to_table(documented.columns, ', ') AS spec
        CROSS JOIN LATERAL (
          SELECT format_type(to_regtype(rtrim(split_part(spec, ' ', 2), '!')), -1)
                 || CASE WHEN spec LIKE '%!' THEN ' NOT NULL' ELSE '' END
        ) AS promised (form)
        LEFT JOIN LATERAL (
          SELECT format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
                 || coalesce((SELECT ' NOT VALID' FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated), '')
          FROM pg_attribute
          WHERE attrelid = to_regclass(documented.relation) AND attname = split_part(spec, ' ', 1) AND attnum > 0 AND NOT attisdropped
        ) AS standing (form) ON true
         WHERE to_regclass(documented.relation) IS NOT NULL AND standing.form IS DISTINCT FROM promised.form
        UNION ALL
        SELECT format('%s is no ordinary table', relname) FROM pg_class WHERE oid = ANY (named[1:6]) AND relkind <> 'r'
        UNION ALL
        SELECT format('%s has no %s (%s)', key.relation, key.kind, key.name)
          FROM (VALUES
            ('worlds', 'id', 'PRIMARY KEY'),
            ('rulesets', 'id', 'PRIMARY KEY'),
            ('entry_points', 'id', 'PRIMARY KEY'),
            ('entry_points', 'slug', 'UNIQUE'),
            ('prompt_segments', 'id', 'PRIMARY KEY'),
            ('games', 'id', 'PRIMARY KEY'),
            ('turns', 'id', 'PRIMARY KEY')
          ) AS key (relation, name, kind)
         WHERE to_regclass(key.relation) IS NOT NULL AND NOT EXISTS (
           SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
           WHERE indrelid = to_regclass(key.relation) AND attname = key.name AND indnkeyatts = 1 AND indisunique AND indisvalid
             AND indimmediate AND indpred IS NULL AND indexprs IS NULL AND (indisprimary OR key.kind = 'UNIQUE'))
      ) AS why (reason);
    IF reasons IS NULL THEN
      moving := NULL;
      EXIT;
    END IF;

    -- The core tables, whatever leads into them by foreign keys, and children of all these; of the tables that only foreign
    -- keys name, those of the chain need not be asked for.
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
    SELECT array_agg(DISTINCT led.oid ORDER BY led.oid), array_agg(DISTINCT led.oid) FILTER (WHERE led.unasked)
      INTO moving, unasked FROM led;
    EXIT WHEN moving = locked;

    SELECT string_agg(obstacle, E'\n')
      INTO obstacles
      FROM (
        SELECT format('%s: %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
          FROM pg_constraint
         WHERE contype = 'f' AND conparentid = 0 AND conrelid = ANY (moving) AND confrelid = ANY (moving)
           AND conrelid <> ALL (unasked) AND NOT with_dependants
        UNION ALL
        SELECT format('%s is no table or view', relname)
          FROM pg_class WHERE oid = ANY (moving) AND relkind NOT IN ('r', 'p', 'v', 'm', 'f')
      ) AS obstructing (obstacle);
    IF obstacles IS NOT NULL THEN
      RAISE EXCEPTION USING ERRCODE = 'TB002',
        MESSAGE = 'what leads into the old core tables is in the way',
        DETAIL = obstacles,
        HINT = 'Drop these foreign keys, or have their tables move along: PGOPTIONS="-c budget_engine.with_dependants=on" psql ... -f '
               'db/migrations/20250130000002_recreate_core_schema.sql (invoke prereqs --recreate --with-dependants). This step changed nothing.';
    END IF;

    needed := ARRAY(
      SELECT format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', oid::regclass)
      FROM pg_class WHERE oid = ANY (moving) AND relkind IN ('r', 'p') ORDER BY relname <> 'turns', oid);
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
    locked := moving;  -- and look again: somebody may have been faster
  END LOOP;

  IF reasons IS NOT NULL THEN
    homes := ARRAY(SELECT DISTINCT relnamespace FROM pg_class WHERE oid = ANY (named[1:6]));
    SELECT quote_ident(nspname) INTO place
      FROM unnest(current_schemas(false)) WITH ORDINALITY AS listed (name, position)
      JOIN pg_namespace ON nspname = listed.name
     WHERE oid = ANY (homes) ORDER BY position LIMIT 1;
    LOOP
      SELECT free.name INTO attic
        FROM generate_series(1, (SELECT count(*) + 1 FROM pg_namespace)) AS number
        CROSS JOIN LATERAL (SELECT 'core_attic' || CASE WHEN number > 1 THEN '_' || number ELSE '' END) AS free (name)
       WHERE to_regnamespace(free.name) IS NULL ORDER BY number LIMIT 1;
      BEGIN
        EXECUTE format('CREATE SCHEMA %s', attic);
        EXIT;
      EXCEPTION WHEN unique_violation OR duplicate_schema THEN  -- a run in another schema was faster: the next one
      END;
    END LOOP;

    FOR progress IN
      SELECT format('publication %s goes on with the old tables: %s', pubname, string_agg(relname, ', ' ORDER BY relname))
      FROM pg_publication_rel JOIN pg_publication ON pg_publication.oid = prpubid JOIN pg_class ON pg_class.oid = prrelid
      WHERE prrelid = ANY (moving) GROUP BY pubname
      UNION ALL
      SELECT DISTINCT format('%s goes on with the old tables', pg_describe_object(hanging.classid, hanging.objid, 0))
      FROM (
        SELECT 'pg_class'::regclass, ev_class FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid
        WHERE classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass AND refobjid = ANY (moving) AND ev_class <> ALL (moving)
        UNION ALL
        SELECT classid, objid FROM pg_depend
        WHERE classid = 'pg_proc'::regclass AND refclassid = 'pg_class'::regclass AND refobjid = ANY (moving)
        UNION ALL
        SELECT classid, objid FROM pg_depend JOIN pg_policy ON pg_policy.oid = objid
        WHERE classid = 'pg_policy'::regclass AND refclassid = 'pg_class'::regclass AND refobjid = ANY (moving) AND polrelid <> ALL (moving)
      ) AS hanging (classid, objid)
    LOOP
      RAISE NOTICE '%', progress;
    END LOOP;

    EXECUTE format('COMMENT ON SCHEMA %s IS %L', attic,
                   format(E'The core schema as it stood until %s, and what led into it, rows and all; moved here by '
                          '20250130000002_recreate_core_schema because:\n%s', now(), reasons));
    -- Whoever reached the tables where they were does so here; their foreign keys are checked with the rights of their owners.
    FOR statement IN
      SELECT format('GRANT USAGE ON SCHEMA %s TO %s', attic, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END)
      FROM (SELECT acl.grantee
            FROM pg_namespace CROSS JOIN LATERAL aclexplode(coalesce(nspacl, acldefault('n', nspowner))) AS acl
            WHERE acl.privilege_type = 'USAGE' AND oid IN (SELECT relnamespace FROM pg_class WHERE oid = ANY (moving))
            UNION
            SELECT relowner FROM pg_class WHERE oid = ANY (moving)) AS reaching (grantee)
    LOOP
      EXECUTE statement;
    END LOOP;
    FOR statement, progress IN
      SELECT format('ALTER TABLE %s SET SCHEMA %s', oid::regclass, attic), format('%s moved to %s', oid::regclass, attic)
      FROM pg_class WHERE oid = ANY (moving) ORDER BY array_position(named, oid), oid
    LOOP
      EXECUTE statement;
      RAISE NOTICE '%', progress;
    END LOOP;
    -- The trigger goes with its table and finds its function by OID; one that stays would be replaced.
    FOR statement IN
      SELECT format('ALTER FUNCTION %s SET SCHEMA %s', oid::regprocedure, attic)
      FROM pg_proc
      WHERE proname = 'update_entry_points_search_text' AND pronargs = 0 AND prokind = 'f' AND pronamespace = ANY (homes)
    LOOP
      EXECUTE statement;
    END LOOP;
    -- The new tables see each other, and no copy of the same name in a later schema.
    PERFORM set_config('search_path', place, true);
  END IF;

  needed := ARRAY(
    SELECT format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', to_regclass(target))
    FROM (VALUES ('entry_points', 'worlds'), ('entry_points', 'rulesets'), ('games', 'entry_points'), ('games', 'worlds'),
                 ('games', 'rulesets'), ('turns', 'games')) AS link (source, target)
    WHERE to_regclass(source) IS NULL AND has_table_privilege(to_regclass(target), 'UPDATE, DELETE, TRUNCATE')
    GROUP BY target);
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

  -- Primary keys are left to PostgreSQL to name (worlds_pkey): where a table that was renamed has that name, it takes another.
  IF to_regclass('worlds') IS NULL THEN
    CREATE TABLE worlds (
      id          text PRIMARY KEY,
      version     text        NOT NULL DEFAULT '1.0.0',
      status      text        NOT NULL DEFAULT 'active'
        CONSTRAINT worlds_status_check CHECK (status IN ('draft', 'active', 'archived')),
      doc         jsonb       NOT NULL DEFAULT '{}',
      created_at  timestamptz NOT NULL DEFAULT now(),
      updated_at  timestamptz NOT NULL DEFAULT now()
    );
    COMMENT ON TABLE worlds IS 'Worlds in which adventures take place';
    created := created || 'worlds'::text;
  END IF;

  IF to_regclass('rulesets') IS NULL THEN
    CREATE TABLE rulesets (
      id          text PRIMARY KEY,
      version     text        NOT NULL DEFAULT '1.0.0',
      status      text        NOT NULL DEFAULT 'active'
        CONSTRAINT rulesets_status_check CHECK (status IN ('draft', 'active', 'archived')),
      doc         jsonb       NOT NULL DEFAULT '{}',
      created_at  timestamptz NOT NULL DEFAULT now(),
      updated_at  timestamptz NOT NULL DEFAULT now()
    );
    COMMENT ON TABLE rulesets IS 'Rules that a game is played by';
    created := created || 'rulesets'::text;
  END IF;

  IF to_regclass('entry_points') IS NULL THEN
    CREATE TABLE entry_points (
      id                text PRIMARY KEY,
      slug              text        NOT NULL UNIQUE,
      type              text        NOT NULL
        CONSTRAINT entry_points_type_check CHECK (type IN ('adventure', 'scenario', 'sandbox', 'quest')),
      world_id          text        NOT NULL
        CONSTRAINT entry_points_world_id_fkey REFERENCES worlds (id) ON DELETE RESTRICT,
      ruleset_id        text        NOT NULL
        CONSTRAINT entry_points_ruleset_id_fkey REFERENCES rulesets (id) ON DELETE RESTRICT,
      title             text        NOT NULL,
      subtitle          text,
      description       text        NOT NULL,
      synopsis          text,
      status            text        NOT NULL DEFAULT 'draft'
        CONSTRAINT entry_points_status_check CHECK (status IN ('draft', 'active', 'archived')),
      visibility        text        NOT NULL DEFAULT 'public'
        CONSTRAINT entry_points_visibility_check CHECK (visibility IN ('public', 'unlisted', 'private')),
      content_rating    text        NOT NULL DEFAULT 'safe'
        CONSTRAINT entry_points_content_rating_check CHECK (content_rating IN ('safe', 'mature', 'explicit')),
      tags              text[]      NOT NULL DEFAULT '{}',
      content           jsonb       NOT NULL DEFAULT '{}',
      i18n              jsonb       NOT NULL DEFAULT '{}',
      search_text       tsvector,
      sort_weight       int         NOT NULL DEFAULT 0,
      popularity_score  int         NOT NULL DEFAULT 0,
      created_at        timestamptz NOT NULL DEFAULT now(),
      updated_at        timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX idx_entry_points_type ON entry_points (type);
    CREATE INDEX idx_entry_points_world ON entry_points (world_id);
    CREATE INDEX idx_entry_points_ruleset ON entry_points (ruleset_id);
    CREATE INDEX idx_entry_points_status_vis ON entry_points (status, visibility);
    CREATE INDEX idx_entry_points_tags ON entry_points USING gin (tags);
    CREATE INDEX idx_entry_points_search ON entry_points USING gin (search_text);
    IF EXISTS (SELECT FROM pg_proc
               WHERE proname = 'update_entry_points_search_text' AND pronargs = 0 AND pronamespace = quote_ident(current_schema())::regnamespace
                 AND (prorettype <> 'trigger'::regtype OR md5(replace(prosrc, E'\r', '')) <> 'df56eafa3c3dfc013e0c6b78fef6a771')) THEN
      RAISE EXCEPTION USING ERRCODE = 'TB002',
        MESSAGE = 'another function named update_entry_points_search_text() is in the way',
        DETAIL = 'The trigger of a new entry_points is to run a function of that name; other tables may use the one that stands.',
        HINT = 'Rename it (ALTER ROUTINE update_entry_points_search_text() RENAME TO ...): triggers that run it go on doing so. Then '
               'run the file again. This step changed nothing.';
    END IF;
    CREATE OR REPLACE FUNCTION update_entry_points_search_text() RETURNS trigger
      LANGUAGE plpgsql
      SET search_path = pg_catalog
    AS $function$
    BEGIN
      NEW.search_text :=
        setweight(to_tsvector('pg_catalog.english', coalesce(NEW.title, '')), 'A')
        || setweight(to_tsvector('pg_catalog.english', coalesce(NEW.synopsis, '')), 'B')
        || to_tsvector('pg_catalog.english', coalesce(NEW.description, ''))
        || to_tsvector('pg_catalog.english', array_to_string(coalesce(NEW.tags, '{}'), ' '));
      RETURN NEW;
    END
    $function$;
    CREATE TRIGGER trigger_update_entry_points_search_text
      BEFORE INSERT OR UPDATE OF title, synopsis, description, tags, search_text ON entry_points
      FOR EACH ROW EXECUTE FUNCTION update_entry_points_search_text();
    COMMENT ON TABLE entry_points IS 'Where players enter: adventures, scenarios, sandboxes and quests';
    COMMENT ON COLUMN entry_points.search_text IS
      'Kept up to date by a trigger: title (weight A), synopsis (weight B), description and tags';
    COMMENT ON FUNCTION update_entry_points_search_text() IS 'Fills entry_points.search_text';
    created := created || 'entry_points'::text;
  END IF;

  IF to_regclass('prompt_segments') IS NULL THEN
    CREATE TABLE prompt_segments (
      id          bigserial PRIMARY KEY,
      scope       text        NOT NULL
        CONSTRAINT prompt_segments_scope_check CHECK (scope IN (
          'core', 'ruleset', 'world', 'entry', 'entry_start', 'npc', 'game_state', 'player', 'rng', 'input')),
      ref_id      text,
      version     text        NOT NULL DEFAULT '1.0.0',
      active      boolean     NOT NULL DEFAULT true,
      content     text        NOT NULL,
      metadata    jsonb       NOT NULL DEFAULT '{}',
      created_at  timestamptz NOT NULL DEFAULT now(),
      updated_at  timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX idx_prompt_segments_scope ON prompt_segments (scope);
    CREATE INDEX idx_prompt_segments_ref ON prompt_segments (ref_id);
    COMMENT ON TABLE prompt_segments IS 'Pieces of text that prompts are assembled from';
    created := created || 'prompt_segments'::text;
  END IF;

  IF to_regclass('games') IS NULL THEN
    CREATE TABLE games (
      id                uuid        DEFAULT gen_random_uuid() PRIMARY KEY,
      entry_point_id    text        NOT NULL
        CONSTRAINT games_entry_point_id_fkey REFERENCES entry_points (id) ON DELETE RESTRICT,
      entry_point_type  text        NOT NULL,
      world_id          text        NOT NULL
        CONSTRAINT games_world_id_fkey REFERENCES worlds (id) ON DELETE RESTRICT,
      ruleset_id        text        NOT NULL
        CONSTRAINT games_ruleset_id_fkey REFERENCES rulesets (id) ON DELETE RESTRICT,
      owner_user_id     uuid,
      state             jsonb       NOT NULL DEFAULT '{"hot":{},"warm":{},"cold":{}}',
      turn_count        int         NOT NULL DEFAULT 0,
      status            text        NOT NULL DEFAULT 'active'
        CONSTRAINT games_status_check CHECK (status IN ('active', 'ended', 'abandoned')),
      created_at        timestamptz NOT NULL DEFAULT now(),
      updated_at        timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX idx_games_owner ON games (owner_user_id);
    CREATE INDEX idx_games_entry_point ON games (entry_point_id);
    CREATE INDEX idx_games_world ON games (world_id);
    COMMENT ON TABLE games IS 'Games being played; state holds what the story needs to go on';
    created := created || 'games'::text;
  END IF;

  IF to_regclass('turns') IS NULL THEN
    CREATE TABLE turns (
      id           bigserial PRIMARY KEY,
      game_id      uuid        NOT NULL CONSTRAINT turns_game_id_fkey REFERENCES games (id) ON DELETE CASCADE,
      idx          int         NOT NULL,
      role         text        NOT NULL CONSTRAINT turns_role_check CHECK (role IN ('system', 'narrator', 'player')),
      prompt_meta  jsonb       NOT NULL DEFAULT '{}',
      content      jsonb       NOT NULL,
      costs        jsonb       NOT NULL DEFAULT '{}',
      created_at   timestamptz NOT NULL DEFAULT now()
    );
    CREATE UNIQUE INDEX idx_turns_game_idx ON turns (game_id, idx);
    COMMENT ON TABLE turns IS 'Turns of a game, numbered by idx within it';
    created := created || 'turns'::text;
  END IF;

  FOREACH relation IN ARRAY created LOOP
    RAISE NOTICE 'table % created', relation;
    IF supabase THEN
      EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', relation);
      EXECUTE format('GRANT ALL ON TABLE %I TO service_role', relation);
      EXECUTE format('CREATE POLICY %I ON %I FOR ALL TO service_role USING (true) WITH CHECK (true)',
                     relation || '_service_role', relation);
      IF relation IN ('prompt_segments', 'turns') THEN
        EXECUTE format('GRANT USAGE, SELECT ON SEQUENCE %s TO service_role', pg_get_serial_sequence(relation, 'id'));
      END IF;
    END IF;
  END LOOP;

  -- Of the tables that stand, those that bear the chain's policy were created by it: their row-level security stays on.
  FOR relation IN
    SELECT relname FROM pg_class JOIN pg_policy ON polrelid = pg_class.oid AND polname = relname || '_service_role'
    WHERE pg_class.oid IN (to_regclass('worlds'), to_regclass('rulesets'), to_regclass('entry_points'),
                           to_regclass('prompt_segments'), to_regclass('games'), to_regclass('turns')) AND NOT relrowsecurity
  LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', relation);
    PERFORM set_config('lock_timeout', moment, true);
    RAISE NOTICE 'row-level security of % turned on', relation;
  END LOOP;
  IF named[7] = ANY (moving) THEN
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
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = named[7] AND attname = 'budget_report' AND NOT attisdropped) THEN
    ALTER TABLE prompt_snapshots ADD COLUMN budget_report jsonb;
    RAISE NOTICE 'column prompt_snapshots.budget_report added';
    COMMENT ON COLUMN prompt_snapshots.budget_report IS
      'What the budget engine did: {version, before, after, trims: [{key, removedChars, removedTokens}], warnings: []}; NULL = not recorded';
    END IF;
  END IF;

  IF named[8] = ANY (moving) THEN
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
    RAISE NOTICE 'table turn_metrics created';
  END IF;

  -- Each new table is to its users what the old one was: owner, grants (no others, whatever ALTER DEFAULT PRIVILEGES says),
  -- row-level security. Nobody but who could insert needs the sequence of the ids; an old uuid had none.
  FOR was IN SELECT * FROM pg_class WHERE oid = ANY (moving) AND oid = ANY (named) ORDER BY array_position(named, oid) LOOP
    wanted := to_regclass(was.relname);
    SELECT to_regclass(pg_get_serial_sequence(attrelid::regclass::text, attname)) INTO ids
      FROM pg_attribute WHERE attrelid = wanted AND attname = 'id' AND atttypid = 'bigint'::regtype;
    SELECT objid INTO old_ids
      FROM pg_depend JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid JOIN pg_class ON pg_class.oid = objid
     WHERE refclassid = 'pg_class'::regclass AND refobjid = was.oid AND attname = 'id' AND classid = refclassid
       AND deptype IN ('a', 'i') AND relkind = 'S';
    IF was.relowner <> (SELECT relowner FROM pg_class WHERE oid = wanted) THEN
      EXECUTE format('ALTER TABLE %s OWNER TO %s', wanted::regclass, was.relowner::regrole);
      IF was.relname = 'entry_points' THEN
        EXECUTE format('ALTER FUNCTION update_entry_points_search_text() OWNER TO %s', was.relowner::regrole);
      END IF;
    END IF;
    FOR statement IN
      WITH acl (age, kind, grantee, privilege, grantable) AS (
        SELECT object.age, object.kind, entry.grantee, entry.privilege_type, entry.is_grantable
        FROM (VALUES ('old', 'TABLE', was.oid), ('new', 'TABLE', wanted), ('old', 'SEQUENCE', old_ids), ('new', 'SEQUENCE', ids)) AS object (age, kind, oid)
        JOIN pg_class AS c ON c.oid = object.oid
        CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault(CASE object.kind WHEN 'TABLE' THEN 'r' ELSE 's' END::"char", c.relowner))) AS entry
        UNION ALL
        SELECT 'old', 'SEQUENCE', entry.grantee, 'USAGE', false
        FROM pg_attribute CROSS JOIN LATERAL aclexplode(attacl) AS entry WHERE attrelid = was.oid AND entry.privilege_type = 'INSERT'
        UNION ALL
        SELECT 'old', 'SEQUENCE', entry.grantee, 'USAGE', false
        FROM aclexplode(was.relacl) AS entry WHERE entry.privilege_type = 'INSERT' AND entry.grantee <> was.relowner
        UNION ALL
        SELECT 'old', 'SEQUENCE', entry.grantee, entry.privilege_type, entry.is_grantable
        FROM aclexplode(acldefault('s', was.relowner)) AS entry WHERE old_ids IS NULL
      ), has (age, kind, grantee, privilege, grantable) AS (
        SELECT acl.age, acl.kind, acl.grantee, acl.privilege, bool_or(acl.grantable) FROM acl GROUP BY 1, 2, 3, 4
      ), change (position, kind, grantee, privilege, grantable) AS (
        SELECT 1, kind, grantee, privilege, grantable FROM has AS stands
        WHERE age = 'new' AND NOT (supabase AND grantee = to_regrole('service_role'))  -- the chain's own
          AND NOT EXISTS (SELECT FROM has AS o WHERE o.age = 'old' AND (o.kind, o.grantee, o.privilege, o.grantable)
                                                   = (stands.kind, stands.grantee, stands.privilege, stands.grantable))
        UNION ALL
        SELECT 2, kind, grantee, privilege, grantable FROM has AS stood
        WHERE age = 'old'
          AND NOT EXISTS (SELECT FROM has AS n WHERE n.age = 'new' AND (n.kind, n.grantee, n.privilege, n.grantable)
                                                   = (stood.kind, stood.grantee, stood.privilege, stood.grantable))
      )
      SELECT sql FROM (
        SELECT position, format(CASE position WHEN 1 THEN 'REVOKE %s ON %s %s FROM %s' ELSE 'GRANT %s ON %s %s TO %s%s' END, privilege, kind,
                      CASE kind WHEN 'TABLE' THEN wanted ELSE ids END::regclass,
                      CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END,
                      CASE WHEN grantable THEN ' WITH GRANT OPTION' ELSE '' END)
        FROM change WHERE kind = 'TABLE' OR ids IS NOT NULL
        UNION ALL
        SELECT 3, format('GRANT %s (%I) ON TABLE %s TO %s%s', entry.privilege_type, attname, wanted::regclass,
                      CASE entry.grantee WHEN 0 THEN 'PUBLIC' ELSE entry.grantee::regrole::text END,
                      CASE WHEN entry.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
        FROM pg_attribute AS a CROSS JOIN LATERAL aclexplode(attacl) AS entry
        WHERE attrelid = was.oid AND EXISTS (SELECT FROM pg_attribute AS b WHERE b.attrelid = wanted AND b.attname = a.attname)
      ) AS statements (position, sql) ORDER BY position, sql
    LOOP
      EXECUTE statement;
    END LOOP;

    IF was.relrowsecurity OR supabase THEN
      EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', wanted::regclass);
    END IF;
    IF was.relforcerowsecurity THEN
      EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', wanted::regclass);
    END IF;
    SELECT string_agg(polname, ', ' ORDER BY polname) INTO progress
      FROM pg_policy WHERE polrelid = was.oid AND polname NOT IN (SELECT polname FROM pg_policy WHERE polrelid = wanted);
    IF progress IS NOT NULL THEN
      RAISE NOTICE 'policies of % went with the old table, to be made anew: %', was.relname, progress;
    END IF;

    -- Ids of turns are in snapshots and metrics, too: an old row must not come to belong to a new turn.
    IF ids IS NOT NULL THEN
      PERFORM set_config('row_security', 'off', true);  -- an error is better than a maximum of some of the rows
      last := pg_sequence_last_value(old_ids);
      FOR statement IN
        SELECT format('SELECT max(%I)::bigint FROM %s', attname, attrelid::regclass)
        FROM pg_attribute AS a
        WHERE (attrelid = was.oid AND attname = 'id' OR was.relname = 'turns' AND attrelid = ANY (named[7:8]) AND attname = 'turn_id')
          AND atttypid IN ('bigint'::regtype, 'int'::regtype, 'smallint'::regtype)
          AND EXISTS (SELECT FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_am ON pg_am.oid = relam
                      WHERE indrelid = attrelid AND indkey[0] = attnum AND indisvalid AND indpred IS NULL AND amname = 'btree')
      LOOP
        EXECUTE statement INTO highest;
        last := greatest(last, highest);
      END LOOP;
      IF last >= 1 THEN
        PERFORM setval(ids, last);
        RAISE NOTICE 'ids of % go on above %', was.relname, last;
      END IF;
    END IF;
  END LOOP;
  PERFORM set_config('search_path', path, true);
END
$migration$;
