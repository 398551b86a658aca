-- 20250130000002_recreate_core_schema: what it would move, and what is in its way (NULL); nothing where it is not needed.
--
--   psql "$DATABASE_URL" -f db/verify/20250130000002_recreate_core_schema.sql     or: invoke --dry prereqs --recreate
--
-- Reads the catalogs only. What it promises of the core schema is said by 20250130000000_core_schema.
WITH RECURSIVE core (relation, oid) AS (
  SELECT relation, to_regclass(relation)::oid FROM unnest('{worlds,rulesets,entry_points,prompt_segments,games,turns}'::text[]) AS relation
), needed AS (
  -- a column in another form
  SELECT FROM (VALUES
      ('worlds', 'id text!, version text!, status text!, doc jsonb!, created_at timestamptz!, updated_at timestamptz!'),
      ('rulesets', 'id text!, version text!, status text!, doc jsonb!, created_at timestamptz!, updated_at timestamptz!'),
      ('entry_points', 'id text!, slug text!, type text!, world_id text!, ruleset_id text!, title text!, subtitle text, description text!, synopsis text, status text!, visibility text!, content_rating text!, tags text[]!, content jsonb!, i18n jsonb!, search_text tsvector, sort_weight int!, popularity_score int!, created_at timestamptz!, updated_at timestamptz!'),
      ('prompt_segments', 'id bigint!, scope text!, ref_id text, version text!, active boolean!, content text!, metadata jsonb!, created_at timestamptz!, updated_at timestamptz!'),
      ('games', 'id uuid!, entry_point_id text!, entry_point_type text!, world_id text!, ruleset_id text!, owner_user_id uuid, state jsonb!, turn_count int!, status text!, created_at timestamptz!, updated_at timestamptz!'),
      ('turns', 'id bigint!, game_id uuid!, idx int!, role text!, prompt_meta jsonb!, content jsonb!, costs jsonb!, created_at timestamptz!')
    ) AS documented (relation, columns)
  CROSS JOIN LATERAL string_to_table(documented.columns, ', ') AS spec
  JOIN core ON core.relation = documented.relation AND core.oid IS NOT NULL
  WHERE NOT EXISTS (
    SELECT FROM pg_attribute
    WHERE attrelid = core.oid AND attname = split_part(spec, ' ', 1) AND attnum > 0 AND NOT attisdropped AND attnotnull = (spec LIKE '%!')
      AND NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = attrelid AND conkey = ARRAY[attnum] AND contype = 'n' AND NOT convalidated)
      AND format_type(atttypid, atttypmod) = format_type(to_regtype(rtrim(split_part(spec, ' ', 2), '!')), -1))
  UNION ALL
  SELECT FROM core JOIN pg_class USING (oid) WHERE relkind <> 'r'
  UNION ALL
  -- a key that is missing
  SELECT FROM (VALUES
      ('worlds', 'id', 'PRIMARY KEY'),
      ('rulesets', 'id', 'PRIMARY KEY'),
      ('entry_points', 'id', 'PRIMARY KEY'),
      ('entry_points', 'slug', 'UNIQUE'),
      ('prompt_segments', 'id', 'PRIMARY KEY'),
      ('games', 'id', 'PRIMARY KEY'),
      ('turns', 'id', 'PRIMARY KEY')
    ) AS key (relation, name, kind)
  JOIN core ON core.relation = key.relation AND core.oid IS NOT NULL
  WHERE NOT EXISTS (
    SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
    WHERE indrelid = core.oid AND attname = key.name AND indnkeyatts = 1 AND indisunique AND indisvalid
      AND indimmediate AND indpred IS NULL AND indexprs IS NULL AND (indisprimary OR key.kind = 'UNIQUE'))
), led (oid, unasked) AS (
  -- the core tables, whatever leads into them by foreign keys, and children of all these
  SELECT oid, true FROM core WHERE oid IS NOT NULL AND EXISTS (SELECT FROM needed)
  UNION
  SELECT next.oid, next.unasked
  FROM led CROSS JOIN LATERAL (
    SELECT conrelid, coalesce(conrelid IN (to_regclass('prompt_snapshots'), to_regclass('turn_metrics')) OR conrelid IN (SELECT oid FROM core), false)
    FROM pg_constraint WHERE contype = 'f' AND confrelid = led.oid
    UNION ALL
    SELECT inhrelid, led.unasked FROM pg_inherits WHERE inhparent = led.oid
  ) AS next (oid, unasked)
), moving (oid, unasked) AS (
  SELECT oid, bool_or(unasked) FROM led GROUP BY oid
), attic (name) AS (
  SELECT free.name
  FROM generate_series(1, (SELECT count(*) + 1 FROM pg_namespace)) AS number
  CROSS JOIN LATERAL (SELECT 'core_attic' || CASE WHEN number > 1 THEN '_' || number ELSE '' END) AS free (name)
  WHERE to_regnamespace(free.name) IS NULL ORDER BY number LIMIT 1
), promises (item, expected, actual, mended_by) AS (
  -- what goes: of the chain, and of others where they are to move along
  SELECT format('%s %s', pg_class.oid::regclass, CASE WHEN unasked THEN 'place' ELSE 'dependant' END),
         'schema ' || attic.name, 'schema ' || relnamespace::regnamespace, '20250130000002_recreate_core_schema'
  FROM (SELECT * FROM moving ORDER BY unasked DESC, oid) AS moving JOIN pg_class USING (oid) CROSS JOIN attic
  WHERE unasked OR current_setting('budget_engine.with_dependants', true) = 'on'
  UNION ALL
  -- foreign keys of others' tables
  SELECT format('%s foreign key %s', conrelid::regclass, conname), 'none into the old core', pg_get_constraintdef(pg_constraint.oid), NULL
  FROM moving JOIN pg_constraint ON conrelid = moving.oid AND contype = 'f' AND conparentid = 0 AND confrelid IN (SELECT oid FROM moving)
  WHERE NOT unasked AND current_setting('budget_engine.with_dependants', true) IS DISTINCT FROM 'on'
)
SELECT item, expected, actual, CASE WHEN actual IS DISTINCT FROM expected THEN mended_by END AS mended_by
FROM promises;
