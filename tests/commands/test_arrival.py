"""Arriving: a server that is still starting is waited for, and a database created, where that is asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from budget_engine.postgres import embedded
from conftest import Db, assert_done, assert_fails, private_server

NAME = 'new "one" / ä'


@pytest.fixture
def absent(db: Db) -> Iterator[Db]:
    """A database that does not exist."""
    yield Db(db.cluster, NAME)
    db.execute(f'DROP DATABASE IF EXISTS "{NAME.replace(chr(34), chr(34) * 2)}"')


def url(db: Db, role: str = "postgres") -> dict[str, str]:
    return {"DATABASE_URL": db.url_as(role).replace(db.name, quote(db.name, safe=""))}


def test_a_server_that_comes_is_waited_for() -> None:
    """As long as that is asked for."""
    with private_server() as own:
        embedded.stop(own)
        stopped, began = Db(own, "postgres"), time.monotonic()
        assert_fails(stopped.invoke("setup", "--wait", "700ms"), 4, "cannot use")
        assert time.monotonic() - began >= 0.7
        assert_fails(stopped.invoke("setup", "--wait", "5"), 3, "--wait")
        starting = threading.Timer(0.7, embedded.start, [own])
        starting.start()
        done = stopped.invoke("setup", "--wait", "60s")
        starting.join()
        assert len([line for line in done.out.splitlines() if line.startswith("waiting  for the server")]) == 1
        assert_done(stopped, done)


def test_what_waiting_does_not_help_is_said_at_once(db: Db) -> None:
    began = time.monotonic()
    assert_fails(db.invoke("setup", "--wait", "10min", role="no_such_role"), 4, "no_such_role")
    assert time.monotonic() - began < 60


def test_the_database_is_created_where_that_is_asked_for(absent: Db, db: Db) -> None:
    assert_fails(db.invoke("setup", env=url(absent)), 4, "does not exist")
    assert_fails(db.invoke("--dry", "setup", "--create-database", env=url(absent)), 4, "does not exist")
    assert exists(db) == 0
    done = db.invoke("setup", "--create-database", env=url(absent))
    assert done.code == 0, done
    assert f"note     database {NAME} was created" in done.out
    assert exists(db) == 1
    again = db.invoke("setup", "--create-database", env=url(absent))
    assert (again.code, "was created" in again.out) == (0, False), again


def test_who_may_not_create_it_is_told(absent: Db, db: Db) -> None:
    db.execute(f"CREATE ROLE {db.name} LOGIN")
    try:
        done = db.invoke("setup", "--create-database", env=url(absent, db.name))
        assert_fails(done, 8, "SQLSTATE 42501")
    finally:
        db.execute(f"DROP ROLE {db.name}")
    assert exists(db) == 0


def exists(db: Db) -> int:
    name = NAME.replace("'", "''")
    return int(db.value(f"SELECT count(*) FROM pg_database WHERE datname = '{name}'"))
