"""What a task costs users who sit far from their database, in round trips: trust login, libpq's default sslmode."""

from __future__ import annotations

import time

from budget_engine.migration import chain
from conftest import Db, assert_done
from proxy import Conversation, Proxy, socket_of

LOGIN = ["SSLRequest", "Startup"]
SURVEY, TRANSACTIONS, TERMINATE = ["Q"], ["Q"], ["X"]
CALM = {"LOCK_TIMEOUT": "60s"}  # the watch, a second connection, then looks only after a whole second of silence
TASKS = ["prereqs", "fix", "slots-flags", "budget-report", "turn-metrics", "verify"]


def through_proxy(db: Db, task: str, parameters: str = "", code: int = 0) -> Conversation:
    with Proxy(socket_of(db.cluster.sockets)) as proxy:
        done = db.invoke(task, env={"DATABASE_URL": proxy.url(db.name) + parameters} | CALM)
        conversation, *_ = proxy.conversations  # on a loaded machine even that second passes: the watch is not counted
    print(f"{task}: {conversation.round_trips} round trips, messages {conversation.kinds}")
    assert done.code == code, done
    return conversation


def test_proxy_counts_as_documented(db: Db) -> None:
    """Handshake, startup, two queries, terminate."""
    with Proxy(socket_of(db.cluster.sockets)) as proxy:
        done = db.psql("-d", f"{proxy.url(db.name)}?sslmode=disable", "-c", "SELECT 1", "-c", "SELECT 2")
    assert (done.code, done.out) == (0, "1\n2\n")
    [conversation] = proxy.conversations
    assert conversation.kinds == ["Startup", "Q", "Q", *TERMINATE]
    assert conversation.round_trips == 5


def test_each_task_with_nothing_to_do_takes_5_round_trips(finished: Db) -> None:
    for task in ("setup", *TASKS):
        conversation = through_proxy(finished, task)
        assert conversation.kinds == [*LOGIN, *SURVEY, *TERMINATE]
        assert conversation.round_trips <= 5
        [asked] = [message for message in conversation.from_client if message.kind == "Q"]
        assert asked.raw[5:].decode().count(chain.load().verification) == 1


def test_everything_from_nothing_takes_6_round_trips_and_100_kb(db: Db) -> None:
    conversation = through_proxy(db, "setup")
    assert db.differing() == {}
    assert conversation.kinds == [*LOGIN, *SURVEY, *TRANSACTIONS, *TERMINATE]
    assert conversation.round_trips <= 6
    sizes = [len(message.raw) for message in conversation.from_client if message.kind == "Q"]
    print(f"the messages: {sizes} bytes")
    assert max(sizes) <= 100_000


def test_concurrent_work_costs_one_message_per_statement_and_one_per_step(finished: Db) -> None:
    """The settings and the turn once; per step each statement alone, then its line in the history."""
    finished.execute("DROP INDEX idx_games_owner, idx_games_world, idx_slots_type")
    conversation = through_proxy(finished, "setup")
    assert finished.differing() == {}
    steps, statements = 2, 3
    assert conversation.kinds == [*LOGIN, *SURVEY, *["Q"] * (2 + statements + steps), *SURVEY, *TERMINATE]


def test_failed_step_owes_a_rollback_and_the_turn(db: Db) -> None:
    db.execute("CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'")
    db.execute("CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()")
    conversation = through_proxy(db, "setup", code=1)
    assert conversation.kinds == [*LOGIN, *SURVEY, *TRANSACTIONS, "Q", "Q", *TERMINATE]
    assert conversation.from_client[-3].raw[5:-1] == b"ROLLBACK"
    assert b"pg_advisory_unlock" in conversation.from_client[-2].raw


def test_session_state_is_left_alone(db: Db) -> None:
    """A transaction pooler gives each transaction another session: no options, no SET, no prepared statement."""
    db.execute("CREATE SCHEMA app")
    conversation = through_proxy(db, "setup", "?schema=app&pgbouncer=true&connection_limit=1")
    assert db.value("SELECT to_regclass('app.turn_metrics') IS NOT NULL AND to_regclass('public.turns') IS NULL")
    assert set(conversation.startup) == {"user", "database", "application_name", "client_encoding"}
    assert {"P", "B", "E", "D", "F"}.isdisjoint(conversation.kinds)
    queries = [message.raw[5:-1] for message in conversation.from_client if message.kind == "Q"]
    assert not [query for query in queries if query.startswith(b"SET ")]
    assert all(query.startswith(b"BEGIN ISOLATION LEVEL READ COMMITTED") for query in queries)


def test_far_server_changes_nothing_but_the_time(db: Db) -> None:
    delay_s = 0.02
    with Proxy(socket_of(db.cluster.sockets), delay_s=delay_s) as proxy:
        began = time.monotonic()
        done = db.invoke("setup", env={"DATABASE_URL": proxy.url(db.name)})
        taken = time.monotonic() - began
    assert_done(db, done)
    round_trips = proxy.conversations[0].round_trips
    assert round_trips <= 6
    assert taken >= 2 * delay_s * (round_trips - 1)  # nobody waits for Terminate to arrive
