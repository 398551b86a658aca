"""Which schema: all ways to name it mean the same, two that disagree are refused, each answer says which it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from budget_engine.migration import chain
from conftest import Db

TABLES = sorted(s.new_table for step in chain.load().steps for s in step.statements if s.new_table)
WAYS = {
    "schema": {"&schema": "=app"},
    "JDBC's": {"&currentSchema": "=app,public"},
    "search_path": {"&search_path": "=app,%20public"},
    "options": {"&options": "=-c%20search_path%3Dapp"},
    "PGOPTIONS": {"PGOPTIONS": "-c search_path=app"},
    "all": {"&schema": "=app", "&currentSchema": "=app", "&options": "=-csearch_path=app", "PGOPTIONS": "-c jit=off"},
}


def environment(db: Db, given: dict[str, str]) -> dict[str, str]:
    parameters = "".join(name + value for name, value in given.items() if name.startswith("&"))
    return {"DATABASE_URL": db.url + parameters, **{name: v for name, v in given.items() if not name.startswith("&")}}


def tables_by_schema(db: Db) -> dict[str, list[str]]:
    rows = db.rows("SELECT schemaname, tablename FROM pg_tables ORDER BY 1, 2")
    return by_schema((schema, table) for schema, table in rows if table in TABLES)


def by_schema(names: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    homes: dict[str, list[str]] = {}
    for home, table in names:
        homes.setdefault(home, []).append(table)
    return homes


def found(document: dict[str, Any]) -> dict[str, list[str]]:
    """What a JSON document says of the places of our tables."""
    names = [c["found"] for step in document["steps"] for c in step["checks"] if c["kind"] == "table" and c["found"]]
    return by_schema((home, table) for home, table in sorted(name.split(".") for name in names))


@pytest.mark.parametrize("given", WAYS.values(), ids=WAYS)
def test_every_way_to_name_a_schema_leads_there(db: Db, given: dict[str, str]) -> None:
    db.execute("CREATE SCHEMA app")
    done = db.call("setup", env=environment(db, given))
    assert done.code == 0, done
    assert tables_by_schema(db) == {"app": TABLES}
    assert done.out.splitlines()[-1].endswith(", schema app")
    assert "note " not in done.out


@pytest.mark.parametrize(
    "given",
    [
        {"&schema": "=app", "&currentSchema": "=public"},
        {"&schema": "=app", "&search_path": "=app,public"},
        {"&currentSchema": "=app", "&options": "=-c%20search_path%3Dpublic"},
        {"&options": "=-c%20search_path%3Dapp%20-c%20search_path%3Dpublic"},
        {"PGOPTIONS": "-c search_path=app -c search_path=public"},
    ],
    ids=lambda given: " ".join(given),
)
def test_two_that_disagree_are_refused(db: Db, given: dict[str, str]) -> None:
    db.execute("CREATE SCHEMA app")
    done = db.call("setup", env=environment(db, given))
    assert done.code == 3, done
    assert "search_path" in done.err
    assert all(name.strip("&") in done.err for name in given)
    assert tables_by_schema(db) == {}


def test_url_wins_over_the_environment_with_a_note(db: Db) -> None:
    db.execute("CREATE SCHEMA app; CREATE SCHEMA other")
    done = db.call("setup", env=environment(db, {"&schema": "=app", "PGOPTIONS": "-c search_path=other"}))
    assert tables_by_schema(db) == {"app": TABLES}
    assert "note     ignored in PGOPTIONS: search_path (DATABASE_URL names another)" in done.out


def test_tables_of_a_later_schema_are_named_as_such(finished: Db) -> None:
    """Else "nothing to do" would be read as said of the first one, which is empty."""
    db = finished
    db.execute('CREATE SCHEMA "App 2"; CREATE TABLE public.other ()')
    behind = {"DATABASE_URL": f"{db.url}&search_path=nowhere,%22App 2%22,public"}
    for task in ("setup", "plan", "verify", "status", "rehearse", "doctor"):
        done = db.call(task, env=behind)
        assert done.code == 0, done
        [note] = [line for line in done.out.replace("\n  ", " ").splitlines() if line.startswith("note ")]
        assert all(name in note for name in (*TABLES, "public", "App 2"))
    for task in ("plan", "verify", "status"):
        document = json.loads(db.call(task, "--format", "json", env=behind).out)
        assert found(document) == {"public": TABLES}
        [note] = [note for note in document["notes"] if "App 2" in note]
    assert tables_by_schema(db) == {"public": TABLES}


def test_table_of_a_later_schema_among_those_of_the_first(finished: Db) -> None:
    db = finished
    db.execute("CREATE SCHEMA app; ALTER TABLE turn_metrics SET SCHEMA app; CREATE TABLE app.slots AS TABLE slots")
    others = [table for table in TABLES if table not in ("turn_metrics", "slots")]
    for path, behind in {
        "app,public": {"public": others},
        "public,app": {"app": ["turn_metrics"]},
        "public": {},
    }.items():
        env = {"DATABASE_URL": f"{db.url}&search_path={path}"}
        document = json.loads(db.call("verify", "--format", "json", env=env).out)
        homes = found(document)
        homes.pop(document["server"]["schema"], None)
        assert homes == behind
