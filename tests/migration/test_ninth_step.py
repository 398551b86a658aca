"""A ninth step, as db/README.md says how: a file, lines of db/verify.sql, a task; nothing under scripts/ is changed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from budget_engine.migration import chain, survey
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, parse_target
from conftest import Db, Run, call, clean_environment, database, menu, run, succeeded
from proxy import Proxy, containing, cut, on_nth, socket_of

STEP = "20260101_slot_owners"
MIGRATION = r"""-- 20260101_slot_owners: who looks after a slot, and how far its review has come.
--   task   slot-owners
--   needs  slots (20250214_slots_templates)
--   locks  ACCESS EXCLUSIVE for an instant on slots
--   again  changes nothing
--   psql "$DATABASE_URL" -f db/migrations/20260101_slot_owners.sql

\set ON_ERROR_STOP on
BEGIN;
SET LOCAL lock_timeout = '2s';

DO $$ BEGIN
  IF to_regclass('slots') IS NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB001', MESSAGE = 'slot_owners needs the table slots, which does not exist',
      HINT = 'Run db/migrations/20250214_slots_templates.sql first (invoke prereqs). This step changed nothing.';
  END IF;
END $$;
CREATE TABLE IF NOT EXISTS slot_owners (
  id    bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name  text    NOT NULL CONSTRAINT uk_slot_owners_name UNIQUE
);
ALTER TABLE slots ADD COLUMN IF NOT EXISTS owner_id bigint REFERENCES slot_owners (id) ON DELETE SET NULL;
ALTER TABLE slots ADD COLUMN IF NOT EXISTS review text NOT NULL DEFAULT 'open';
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_description JOIN pg_attribute ON attrelid = objoid AND attnum::int = objsubid
                 WHERE objoid = 'slots'::regclass::oid AND attname = 'review') THEN
    COMMENT ON COLUMN slots.review IS 'How far the review of the slot has come';
  END IF;
END $$;
CREATE OR REPLACE FUNCTION reopen_review() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  NEW.review := 'open';
  RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER trigger_slots_reopen_review BEFORE UPDATE OF description ON slots
  FOR EACH ROW EXECUTE FUNCTION reopen_review();
COMMIT;

-- Each alone, outside any transaction.
CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_slots_owner ON slots (owner_id);
"""
BODY = re.search(r"pg_temp AS \$\$(.*?)\$\$", MIGRATION, re.S)
assert BODY
MD5 = hashlib.md5(BODY[1].encode(), usedforsecurity=False).hexdigest()
# What comes before which line of db/verify.sql.
LINES = {
    "), added (step, table_name, columns": "  , ('slot_owners', 'slot_owners', 'id bigint!, name text!')",
    "), specs AS (": (
        "  , ('slot_owners', 'slots', 'owner_id bigint -> slot_owners ON DELETE SET NULL =,"
        " review text! = ''open''::text', false, NULL)"
    ),
    "), indexes (step, table_name": (
        "  UNION ALL VALUES ('slot_owners', 'slot_owners', 'name', 'UNIQUE', 'uk_slot_owners_name', false)"
    ),
    "  ) AS of_table (step": "    , ('slot_owners', 'slots', 'idx_slots_owner btree (owner_id)')",
    "    -- Supabase: of core tables": f"""\
    UNION ALL (VALUES
      ('slot_owners', 'comment', 'slots', 'review', 'present', true, NULL, NULL),
      ('slot_owners', 'function', 'slots', 'reopen_review',
       'trigger, search_path=pg_catalog, pg_temp, owned like the table, source md5 {MD5}', true, NULL, NULL),
      ('slot_owners', 'trigger', 'slots', 'trigger_slots_reopen_review',
       'BEFORE UPDATE OF description ON slots FOR EACH ROW EXECUTE FUNCTION reopen_review()', true, NULL, NULL))""",
}
TASK = '''
@recipe()
def slot_owners(c: Context) -> None:
    """Add who looks after a slot."""
    commands.setup.run("slot-owners", dry=c.config.run.dry)


namespace.add_task(slot_owners)
'''
TITLES = [
    "slot_owners",
    "slot_owners.id",
    "slot_owners.name",
    "slots.owner_id",
    "slots.review",
    "default of slots.owner_id",
    "default of slots.review",
    "key slot_owners (id)",
    "key slot_owners (name)",
    "foreign key slots (owner_id)",
    "index idx_slots_owner",
    "comment of slots.review",
    "function reopen_review()",
    "trigger trigger_slots_reopen_review",
]


@dataclass(frozen=True)
class Project:
    """A copy of this project with the ninth step, used on a database."""

    folder: Path
    db: Db

    def invoke(self, *words: str, url: str = "") -> Run:
        """Run a task in this process, whose chain is that of nine for so long."""
        nine = chain.load(self.folder / "db")
        with patch.object(chain, "load", lambda: nine):
            return call(menu(self.folder), words, self.environment(url))

    def environment(self, url: str = "") -> dict[str, str]:
        return clean_environment() | {"DATABASE_URL": url or self.db.url, "LOCK_TIMEOUT": "60s"}

    def psql(self, file: str) -> Run:
        return self.db.psql("-f", str(self.folder / "db" / file))

    def left(self) -> list[str]:
        """What does not pass of its db/verify.sql."""
        with Connection(parse_target(self.db.url), Settings(None, "")) as connection:
            read = survey.read(connection, chain.load(self.folder / "db"), with_recreate=False)
            return [check.title for check in read.checks if not check.passed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("scripts", "db"):
        shutil.copytree(chain.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(chain.ROOT / name, folder)
    (folder / "db" / "migrations" / f"{STEP}.sql").write_text(MIGRATION)
    verify = (chain.ROOT / "db" / "verify.sql").read_text()
    for place, lines in LINES.items():
        assert verify.count(place) == 1, place
        verify = verify.replace(place, f"{lines}\n{place}")
    (folder / "db" / "verify.sql").write_text(verify)
    (folder / "tasks.py").write_text((chain.ROOT / "tasks.py").read_text() + TASK)
    return folder


@pytest.fixture
def project(folder: Path, db: Db) -> Project:
    return Project(folder, db)


@pytest.fixture
def of_eight(folder: Path, finished: Db) -> Project:
    """Where the chain of eight has been applied."""
    return Project(folder, finished)


def test_it_takes_at_most_40_lines(folder: Path) -> None:
    assert len(MIGRATION.splitlines()) <= 40
    everything = chain.load(folder / "db")
    assert [step.label for step in everything.steps][-1] == "slot_owners"
    assert [step.label for step in everything.of("slot-owners")] == ["slot_owners"]
    assert everything.steps[:-1] == chain.load().steps


def test_from_nothing_by_setup_and_by_hand_with_psql_it_is_the_same_schema(project: Project) -> None:
    with database(project.db.cluster) as other:
        invoke = [sys.executable, "-m", "invoke", "setup", "slot_owners"]
        done = run(invoke, Project(project.folder, other).environment(), cwd=project.folder)
        assert (done.code, "nothing to do" in done.out) == (0, True), done
        assert re.search(r"^  slot_owners +\+ slot_owners, slots\.owner_id, slots\.review.* ms$", done.out, re.M), done
        set_up = other.dump()
    nothing = project.db.fingerprint()
    refused, by_psql = project.invoke("slot-owners"), project.psql(f"migrations/{STEP}.sql")
    assert (refused.code, "invoke prereqs" in refused.err) == (1, True), refused
    assert (by_psql.code, "slot_owners needs the table slots" in by_psql.err) == (3, True)
    assert project.db.fingerprint() == nothing
    for step in [*chain.load().steps, *chain.load(project.folder / "db").steps[-1:] * 2]:
        done = succeeded(project.psql(f"migrations/{step.stem}.sql"))
    assert project.db.dump() == set_up
    verified = project.psql("verify.sql")
    assert {line.rpartition("|")[2] for line in verified.out.splitlines()} == {"ok"}
    assert sum(line.startswith("slot_owners|") for line in verified.out.splitlines()) == len(TITLES)
    project.db.execute("INSERT INTO slots (type, name, description) VALUES ('npc', 'a', '')")
    project.db.execute("UPDATE slots SET review = 'done'; UPDATE slots SET description = 'b'")
    assert project.db.rows("SELECT owner_id, review FROM slots") == [(None, "open")]


def test_where_the_chain_of_eight_has_been_applied(of_eight: Project) -> None:
    """Each task says the same of it, and does the same."""
    project, db = of_eight, of_eight.db
    before = db.fingerprint()
    assert project.left() == TITLES
    assert project.invoke("verify").code == 5
    status = project.invoke("status")
    assert (status.code, bool(re.search(r"^  slot_owners +pending$", status.out, re.M))) == (0, True), status
    doctor = project.invoke("doctor")
    assert (doctor.code, "PROBLEM" in doctor.out) == (0, False), doctor
    planned = json.loads(project.invoke("plan", "--format", "json", "--quiet").out)
    actions = planned["actions"]
    assert planned["exit_code"] == 0
    assert {title for action in actions for title in action["creates"]} == set(TITLES)
    assert {action["step"] for action in actions} == {"slot_owners"}
    [build] = [action for action in actions if action["part"] == "concurrent"]
    assert build["creates"] == ["index idx_slots_owner"]
    assert build["locks"] == {"slots": "SHARE UPDATE EXCLUSIVE"}
    locks = {lock for action in actions for lock in action["locks"].items()}
    assert locks == {("slots", lock) for lock in ("SHARE UPDATE EXCLUSIVE", "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE")}
    rehearsed = project.invoke("rehearse")
    assert (rehearsed.code, "slot_owners" in rehearsed.out) == (0, True), rehearsed
    assert db.fingerprint() == before
    done = project.invoke("slot-owners")
    assert (done.code, project.left()) == (0, []), done
    assert db.history()[-2:] == [("slot_owners", "transaction"), ("slot_owners", "concurrent")]


def test_a_conflict_has_its_command(of_eight: Project) -> None:
    project, db = of_eight, of_eight.db
    db.execute("ALTER TABLE slots ADD review int; CREATE VIEW slot_owners AS SELECT 1 AS a")
    before = db.fingerprint()
    refused = project.invoke("setup")
    assert refused.code == 6, refused
    assert re.findall("^conflict (.*?) is ", refused.err, re.M) == ["slot_owners", "slots.review"], refused
    assert db.fingerprint() == before
    commands = project.invoke("verify", "--remedies")
    assert db.psql("-c", commands.out).code == 0, commands
    done = project.invoke("setup")
    assert (done.code, project.left()) == (0, []), done


COMPLETED = "^C....{}\0"  # the server's CommandComplete


@pytest.mark.parametrize("after", ["ALTER TABLE", "COMMIT", "CREATE INDEX"])
def test_a_run_that_was_cut_off_is_finished_by_the_next(of_eight: Project, after: str) -> None:
    project = of_eight
    watch = on_nth(containing(COMPLETED.format(after)), 3 if after == "COMMIT" else 1, cut)
    with Proxy(socket_of(project.db.cluster.sockets), server_says=watch) as proxy:
        ended = project.invoke("setup", url=proxy.url(project.db.name))
    assert ended.code != 0, ended
    done = project.invoke("setup")
    assert (done.code, project.left()) == (0, []), done


def test_each_half_of_it_is_completed(of_eight: Project) -> None:
    """Also where somebody has done some of it by hand."""
    project = of_eight
    succeeded(project.psql(f"migrations/{STEP}.sql"))
    for broken in (
        "ALTER TABLE slots DROP owner_id, DROP review CASCADE; DROP TRIGGER trigger_slots_reopen_review ON slots",
        "DROP TABLE slot_owners CASCADE; ALTER TABLE slots DROP owner_id; DROP FUNCTION reopen_review() CASCADE;"
        "COMMENT ON COLUMN slots.review IS NULL",
    ):
        project.db.execute(broken)
        assert project.left() != []
        done = project.invoke("slot-owners")
        assert (done.code, project.left()) == (0, []), f"{broken}\n{done}"
