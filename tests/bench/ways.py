"""The two ways to take the steps that are compared: the plain one, and ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from conftest import Db, clean_environment
from conftest import run as run_command

_LONGEST_STEP_S = 3600

# What somebody would write who does not think of the others: the older application's files did.
PLAIN = {
    "fix": """
        ALTER TABLE prompt_snapshots ALTER COLUMN turn_id TYPE bigint USING NULL::bigint;
        ALTER TABLE prompt_snapshots ADD CONSTRAINT prompt_snapshots_turn_id_fkey
          FOREIGN KEY (turn_id) REFERENCES turns (id) ON DELETE SET NULL;
        CREATE INDEX IF NOT EXISTS idx_prompt_snapshots_turn_id ON prompt_snapshots (turn_id)""",
    "slots-flags": """
        ALTER TABLE slots ADD COLUMN must_keep boolean NOT NULL DEFAULT false;
        ALTER TABLE slots ADD COLUMN min_chars int;
        UPDATE slots SET must_keep = true, min_chars = 160 WHERE type = 'ruleset' AND name = 'principles';
        UPDATE slots SET must_keep = true, min_chars = 80 WHERE type = 'ruleset' AND name = 'choice_style';
        UPDATE slots SET must_keep = true, min_chars = 60 WHERE type = 'module' AND name = 'actions';
        UPDATE slots SET min_chars = 180 WHERE type = 'world' AND name = 'tone';
        UPDATE slots SET min_chars = 140 WHERE type = 'npc' AND name = 'persona';
        CREATE INDEX idx_slots_must_keep ON slots (must_keep) WHERE must_keep""",
    "budget-report": "ALTER TABLE prompt_snapshots ADD COLUMN budget_report jsonb",
    "turn-metrics": """
        CREATE TABLE turn_metrics (
          turn_id bigint PRIMARY KEY REFERENCES turns (id) ON DELETE CASCADE, story_id uuid NOT NULL,
          created_at timestamptz NOT NULL DEFAULT now(), tokens_before int NOT NULL, tokens_after int NOT NULL,
          trims_count int NOT NULL DEFAULT 0, top_trim_keys text[] DEFAULT '{}', model_ms int,
          rejects jsonb DEFAULT '{}', cost_estimate_cents int);
        CREATE INDEX idx_turn_metrics_story_created ON turn_metrics (story_id, created_at DESC);
        CREATE INDEX idx_turn_metrics_created ON turn_metrics (created_at DESC)""",
    "prereqs": """
        ALTER TABLE prompt_snapshots ADD COLUMN parent_id uuid REFERENCES prompt_snapshots (id) ON DELETE SET NULL;
        CREATE TABLE templates (
          id uuid PRIMARY KEY DEFAULT gen_random_uuid(), type text NOT NULL, slot text NOT NULL,
          version int NOT NULL DEFAULT 1, body text NOT NULL, status text NOT NULL DEFAULT 'draft',
          created_at timestamptz NOT NULL DEFAULT now(), created_by uuid, UNIQUE (type, slot, version));
        CREATE INDEX idx_prompt_snapshots_parent_id ON prompt_snapshots (parent_id);
        CREATE INDEX idx_prompt_snapshots_created_by ON prompt_snapshots (created_by);
        CREATE INDEX idx_slots_type ON slots (type)""",
}
WHAT = {step: step for step in PLAIN} | {"prereqs": "prereqs (templates, parent_id, indexes)"}


def plain(db: Db, step: str) -> None:
    """Run the step's statements one by one, each in its own transaction, with no lock_timeout."""
    with db.connect() as connection:
        for statement in PLAIN[step].split(";"):
            connection.execute(statement.encode())


def ours(db: Db, step: str) -> None:
    """Run the step as users do."""
    words = [sys.executable, "-m", "invoke", step]
    done = run_command(words, clean_environment() | {"DATABASE_URL": db.url}, timeout=_LONGEST_STEP_S)
    if done.code:
        raise SystemExit(f"invoke {step}: {done}")


WAYS: Mapping[str, Callable[[Db, str], None]] = {"plain": plain, "ours": ours}
