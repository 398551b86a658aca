"""Databases of other encodings than UTF8, or of none: names are what they are, in what is sent and what is printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from budget_engine.postgres import embedded
from budget_engine.spelling import readable, respelled, shown, text_of, to_bytes
from conftest import TRAP, Db, assert_done, database
from states import CORE_ROWS, CORE_WITH_UUID_TURNS, by_hand, with_uuid
from terminal import on_terminal
from test_printed import WORDS, asked
from versions import MAJOR

# Of each encoding a name; of the first ones as psql on a terminal sends it, too.
NAMES = {
    "LATIN1": "Stück §".encode("latin1") + b"\x85",
    "EUC_JIS_2004": b"\xa4\xab\xa4\xf7",  # its last character is two of Unicode's
    "WIN1252": b"\x80\x81",  # has no character
    "SQL_ASCII": "Stück \x85\u2028".encode() + b"\xff \\ \xe4a'\n",
    "MULE_INTERNAL": b"\x81\xe4\x92\xc4\xa3",  # UTF8 cannot be converted to or from
}
IN_SCHEMA = b'CREATE SCHEMA "%(n)s"; SET search_path = "%(n)s"; %(state)s;'
HANGING = rb"""
CREATE ROLE "%(d)s%(n)s" LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA "%(n)s" TO "%(d)s%(n)s";
CREATE VIEW "v%(n)s" AS SELECT turn_id AS "%(n)s", E'%(e)s' AS l FROM prompt_snapshots;
ALTER VIEW "v%(n)s" OWNER TO "%(d)s%(n)s"; GRANT USAGE ON SCHEMA "%(n)s" TO PUBLIC;
COMMENT ON VIEW "v%(n)s" IS E'%(e)s'; COMMENT ON COLUMN prompt_snapshots.turn_id IS E'%(e)s';
CREATE POLICY "p%(n)s" ON prompt_snapshots TO "%(d)s%(n)s" USING (turn_id IS NULL);
ALTER TABLE prompt_snapshots ADD CONSTRAINT "k%(n)s" CHECK (turn_id IS NULL OR awf_contract <> E'%(e)s');
CREATE FUNCTION "f%(n)s"() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN /* turn_id */ RETURN NEW; END';
CREATE TRIGGER "t%(n)s" BEFORE INSERT ON prompt_snapshots FOR EACH ROW EXECUTE FUNCTION "f%(n)s"();
ALTER TABLE slots ADD must_keep text; ALTER TABLE slots DROP CONSTRAINT uk_slots_type_name"""
THERE = """
SELECT oid::regclass::text, pg_get_viewdef(oid), obj_description(oid), relowner::regrole::text
FROM pg_class WHERE relname ~ '^v'
UNION ALL SELECT conname, pg_get_constraintdef(oid), '', '' FROM pg_constraint WHERE conname ~ '^k'
UNION ALL SELECT polname, pg_get_expr(polqual, polrelid), polroles::regrole[]::text, '' FROM pg_policy
UNION ALL SELECT tgname, pg_get_triggerdef(oid), '', ''
FROM pg_trigger WHERE tgrelid::regclass::text ~ 'prompt_snapshots$' AND NOT tgisinternal"""
TURN_ID = """
SELECT atttypid::regtype::text, col_description(attrelid, attnum)
FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid WHERE attname = 'turn_id' AND relname = 'prompt_snapshots'"""
# Run this for each role of a test, whose names begin so.
ROLES = """DO $$ DECLARE r name; BEGIN
  FOR r IN SELECT rolname FROM pg_roles WHERE rolname ~ '^{}' LOOP EXECUTE format('{}', r); END LOOP;
END $$"""


@contextmanager
def of_encoding(cluster: embedded.Cluster, encoding: str, state: str, more: bytes = b"") -> Iterator[Db]:
    """A database with this state, and what bears names of its encoding around it."""
    provider = "LOCALE_PROVIDER libc" if MAJOR > 14 else ""
    with database(cluster, options=f"ENCODING '{encoding}' {provider} LC_COLLATE 'C' LC_CTYPE 'C'") as db:
        name = NAMES[encoding]
        escaped = name.replace(b"\\", rb"\\").replace(b"'", rb"\'")
        given = {b"n": name, b"d": db.name[-6:].encode(), b"e": escaped, b"state": state.encode()}
        run(db, (IN_SCHEMA + more) % given)
        run(db, b'ALTER DATABASE %s SET search_path = "%s"' % (db.name.encode(), name))
        try:
            yield db
        finally:
            run(db, ROLES.format(db.name[-6:], "DROP OWNED BY %1$I; DROP ROLE %1$I").encode())


def run(db: Db, sql: bytes) -> list[tuple[bytes, ...]]:
    """Run SQL as it is, byte by byte."""
    with psycopg.connect(db.url, client_encoding="SQL_ASCII", autocommit=True) as connection:
        cursor = connection.execute(sql)
        return sorted(cursor.fetchall()) if cursor.description else []


def piped(db: Db, folder: Path, text: str, *encoding: str) -> None:
    """Have psql run it, to which a pipe's bytes are of the database's encoding."""
    assert text.isascii()
    (folder / "piped.sql").write_text(text)
    done = db.psql(*encoding, "-f", str(folder / "piped.sql"))
    assert done.code == 0, f"{done}\n{text}"


@pytest.mark.parametrize("encoding", NAMES)
def test_names_are_what_they_are(cluster: embedded.Cluster, tmp_path: Path, encoding: str) -> None:
    """Whatever is printed says the same in psql, in a pipe and, where it can log in there, on a terminal."""
    on_terminals = ["-c", r"\encoding UTF8"] if encoding in ("LATIN1", "EUC_JIS_2004", "SQL_ASCII") else []
    with of_encoding(cluster, encoding, with_uuid(), HANGING) as db:
        before, was = run(db, THERE.encode()), run(db, TURN_ID.encode())
        for words in WORDS:
            if "--format" in words and encoding != "SQL_ASCII":  # what it prints is text by then, whatever it was
                continue
            done = asked(db, words, tmp_path)
            assert done.code in (0, 6), done
            assert "\ufffd" not in done.out + done.err
        assert on_terminal(db, "status").code == 0
        remedies = db.invoke("verify", "--remedies").out
        piped(db, tmp_path, remedies)
        assert asked(db, "rehearse", tmp_path).code == 0
        said = asked(db, "setup", tmp_path).out
        assert db.differing() == {}
        undo = re.findall("^ +((?:BEGIN|ALTER|DO|COMMENT|COMMIT).*;)$", said, re.M)
        piped(db, tmp_path, "\n".join(undo), *on_terminals)
        assert run(db, TURN_ID.encode()) == was
        piped(db, tmp_path, asked(db, "plan --sql", tmp_path).out, *on_terminals)
        assert db.differing() == {}
        restored = re.search("-- to restore it when .*\n((-- .*\n)+)", remedies)
        assert restored
        piped(db, tmp_path, restored[1].replace("-- ", ""))
        assert run(db, THERE.encode()) == before


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "WIN1252"])
def test_what_others_do_and_say_is_told(cluster: embedded.Cluster, tmp_path: Path, encoding: str) -> None:
    """Sessions that hold a lock, messages of the server, and tables that move: of these names, too."""
    name = NAMES[encoding]
    with of_encoding(cluster, encoding, by_hand("bigint")) as db:
        with psycopg.connect(db.url, client_encoding="SQL_ASCII") as other:
            other.execute(b"SET application_name = E'%s'" % name[:2])
            other.execute(b"LOCK TABLE slots /* %s */" % name)
            done = asked(db, "setup", tmp_path, {"LOCK_WAIT": "1s", "LOCK_TIMEOUT": "200ms"})
            assert (done.code, "LOCK TABLE slots /*" in done.err) == (7, True), done
        said = b"E'%s'" % name.replace(b"\\", rb"\\").replace(b"'", rb"\'")
        raised = b"RAISE NOTICE USING MESSAGE = %(s)s; RAISE EXCEPTION USING MESSAGE = %(s)s, DETAIL = %(s)s" % {
            b"s": said
        }
        run(db, TRAP.encode().replace(b"{condition}", b"true").replace(b"{action}", raised))
        done = asked(db, "setup", tmp_path)
        assert (done.code, shown_as(name) in done.out, shown_as(name) in done.err) == (1, True, True), done
        run(db, b"DROP EVENT TRIGGER trap")
    more = b'CREATE TABLE "%(n)s" (id uuid REFERENCES turns); CREATE TABLE "w%(n)s" () INHERITS (turns)'
    with of_encoding(cluster, encoding, CORE_WITH_UUID_TURNS + CORE_ROWS, more) as db:
        done = asked(db, "prereqs --recreate --yes", tmp_path)
        assert (done.code, shown_as(name) in done.err) == (6, True), done
        done = asked(db, "prereqs --recreate --with-dependants --yes", tmp_path)
        assert (done.code, shown_as(name) in done.out) == (0, True), done
        assert_done(db)


def shown_as(name: bytes) -> str:
    """Return its first characters as they are shown."""
    return shown(readable(text_of(name, in_bytes=True)))[:4]


def test_roles_of_other_encodings(cluster: embedded.Cluster, finished: Db, tmp_path: Path) -> None:
    """One whose name is UTF-8 in bytes comes in; one whose name is none no SQL of another database can say."""
    roles = rb'CREATE ROLE "%(d)s%(n)s" LOGIN; CREATE ROLE "%(d)s' + "ü\u2028".encode() + b'" LOGIN SUPERUSER'
    with of_encoding(cluster, "SQL_ASCII", "", roles) as db:
        theirs = partial(ROLES.format, db.name[-6:])
        run(db, theirs("ALTER ROLE %I SET session_replication_role = replica").encode())
        own = {"DATABASE_URL": db.url_as(quote(f"{db.name[-6:]}ü\u2028", safe=""))}
        assert asked(db, "setup", tmp_path, own).code == 0
        said = asked(db, "doctor", tmp_path, own).out
        piped(db, tmp_path, "\n".join(re.findall(" (DO .*ALTER ROLE.*;)$", said, re.M)))
        put_right = "SELECT count(*) FROM pg_db_role_setting WHERE setconfig = '{session_replication_role=origin}'"
        assert db.value(put_right) == 1
        finished.execute(theirs("GRANT INSERT ON turns TO %I"))
        said = asked(finished, "status", tmp_path).out
        assert ("-- left out: a name in it is of another encoding" in said, 'TO U&"' in said) == (True, True), said
        finished.execute(theirs("REVOKE INSERT ON turns FROM %I"))
        assert asked(finished, "verify", tmp_path, {"DATABASE_URL": finished.url_as("%e4")}).code == 3


def test_bytes_are_what_they_were() -> None:
    """In whichever way they are read; and the SQL of a statement that no PL/pgSQL can say."""
    every = bytes(range(1, 256)) + "ä\u2028".encode()
    assert [to_bytes(text_of(every, in_bytes=how)) for how in (True, False)] == [every, every]
    assert [readable(text_of(b"\xc3\xa4\xff", in_bytes=how)) for how in (True, False)] == ["ä\\xff"] * 2
    assert respelled(text_of(b'ALTER TABLE "$run$\xff" DROP "\n";', in_bytes=True)) == (
        'DO $run_$ BEGIN EXECUTE E\'ALTER TABLE "$run$\\xff" DROP U&"\\\\000a"\'; END $run_$;'
    )
