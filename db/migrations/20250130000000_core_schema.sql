-- 20250130000000_core_schema: worlds, rulesets, entry_points, prompt_segments, games and turns, each only where missing.
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f db/migrations/20250130000000_core_schema.sql     or: invoke prereqs
--
-- Atomic part  creates the missing tables with their keys, indexes, trigger and comments; a new table that points to one
--              that stands takes SHARE ROW EXCLUSIVE on that one for an instant. Tables that stand keep what their owner
--              gave them and are not locked; one that lacks a documented column, or has it in another form, is in the way
--              (20250130000002_recreate_core_schema is the alternative for that case).
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
  created text[] := '{}';
  relation text;
  statement text;
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
      FROM pg_attribute
      WHERE attrelid = to_regclass(documented.relation) AND attname = split_part(spec, ' ', 1) AND attnum > 0 AND NOT attisdropped
    ) AS standing (form) ON true
   WHERE to_regclass(documented.relation) IS NOT NULL AND standing.form IS DISTINCT FROM promised.form;
  IF obstacles IS NOT NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB002',
      MESSAGE = 'a table of the core schema stands in another form: it is in the way',
      DETAIL = obstacles,
      HINT = 'Move what stands there out of the way (CREATE SCHEMA attic; ALTER TABLE ... SET SCHEMA attic takes its indexes along), then run '
             'db/migrations/20250130000000_core_schema.sql (invoke prereqs) again. Or have it all moved, rows and keys: '
             'db/migrations/20250130000002_recreate_core_schema.sql (invoke prereqs --recreate). This step changed nothing.';
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
END
$migration$;

-- online: psql runs each statement that this SELECT returns alone, outside any transaction; so does the runner.
SELECT online.statement
FROM (VALUES
    ('idx_entry_points_type', 'entry_points', 'btree (type)'),
    ('idx_entry_points_world', 'entry_points', 'btree (world_id)'),
    ('idx_entry_points_ruleset', 'entry_points', 'btree (ruleset_id)'),
    ('idx_entry_points_status_vis', 'entry_points', 'btree (status, visibility)'),
    ('idx_entry_points_tags', 'entry_points', 'gin (tags)'),
    ('idx_entry_points_search', 'entry_points', 'gin (search_text)'),
    ('idx_prompt_segments_scope', 'prompt_segments', 'btree (scope)'),
    ('idx_prompt_segments_ref', 'prompt_segments', 'btree (ref_id)'),
    ('idx_games_owner', 'games', 'btree (owner_user_id)'),
    ('idx_games_entry_point', 'games', 'btree (entry_point_id)'),
    ('idx_games_world', 'games', 'btree (world_id)'),
    ('idx_turns_game_idx', 'turns', 'UNIQUE btree (game_id, idx)')
  ) AS wanted (name, relation, definition)
JOIN pg_class AS standing ON standing.oid = to_regclass(wanted.relation) AND standing.relkind = 'r'
LEFT JOIN pg_class AS named ON named.relnamespace = standing.relnamespace AND named.relname = wanted.name
LEFT JOIN pg_index AS built ON built.indexrelid = named.oid AND built.indrelid = standing.oid
CROSS JOIN LATERAL (VALUES
    (1, NOT built.indisvalid,
     format('DROP INDEX CONCURRENTLY IF EXISTS %s.%I', standing.relnamespace::regnamespace, wanted.name)),
    (2, named.oid IS NULL OR NOT built.indisvalid,
     format('CREATE%s INDEX CONCURRENTLY IF NOT EXISTS %I ON %s.%I USING %s',
            CASE WHEN wanted.definition LIKE 'UNIQUE %' THEN ' UNIQUE' ELSE '' END, wanted.name,
            standing.relnamespace::regnamespace, standing.relname, replace(wanted.definition, 'UNIQUE ', '')))
  ) AS online (position, is_needed, statement)
WHERE online.is_needed
  AND NOT (wanted.name = 'idx_turns_game_idx' AND EXISTS (  -- any unique key on these columns will do, whatever its name
    SELECT FROM pg_index
    WHERE indrelid = standing.oid AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL AND indexprs IS NULL
      AND ARRAY(SELECT attname::text FROM pg_attribute
                WHERE attrelid = indrelid AND attnum = ANY ((indkey::int2[])[0:indnkeyatts - 1]) ORDER BY 1) = '{game_id,idx}'))
  -- Invalid perhaps because somebody is building it at this moment: two builds on one table would wait for each other.
  AND NOT (EXISTS (SELECT FROM pg_index WHERE indrelid = standing.oid AND NOT indisvalid) AND EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'relation' AND relation = standing.oid AND mode = 'ShareUpdateExclusiveLock' AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid <> pg_backend_pid()
      AND pid NOT IN (SELECT pid FROM pg_stat_progress_vacuum UNION ALL SELECT pid FROM pg_stat_progress_analyze)))
ORDER BY wanted.name, online.position
\gexec
