"""A server that falls silent, or says what PostgreSQL never does: a message and an exit code; Ctrl-C ends any wait."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from budget_engine.errors import StatementError, for_sqlstate
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, parse_target
from conftest import Db, Run, assert_fails, ended, until
from proxy import Message, Proxy, Watcher, socket_of

SECONDS = 12  # in which Ctrl-C ends a run, the start of Python and a busy machine included


def swallowing(*kinds: str, connection: int | None = None) -> Watcher:
    """Let nothing of these kinds arrive; connection: on this one only."""

    def watch(message: Message) -> Message:
        swallowed = message.kind in kinds and connection in (None, message.connection)
        return replace(message, raw=b"") if swallowed else message

    return watch


def pressed(db: Db, proxy: Proxy, presses: int, when: Callable[[Proxy], bool]) -> tuple[Run, float]:
    """Run setup through it, and press Ctrl-C once that is so; return how it ended, and how long that took."""
    process = db.start("setup", DATABASE_URL=proxy.url(db.name))
    until(lambda: when(proxy), process)
    time.sleep(0.3)
    began = time.monotonic()
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    return ended(process), time.monotonic() - began


def asked(proxy: Proxy) -> bool:
    return any("Q" in conversation.kinds for conversation in proxy.conversations)


def watched(proxy: Proxy) -> bool:
    """Whether the second connection has asked, too."""
    return len(proxy.conversations) > 1 and "Q" in proxy.conversations[1].kinds


def connected(proxy: Proxy) -> bool:
    return bool(proxy.conversations and proxy.conversations[0].kinds)


MOMENTS = {"at once": asked, "while the watch waits, too": watched}


@pytest.mark.parametrize("presses", [1, 2, 3])
@pytest.mark.parametrize("when", MOMENTS.values(), ids=MOMENTS)
def test_ctrl_c_ends_a_run_whose_server_is_silent(db: Db, presses: int, when: Callable[[Proxy], bool]) -> None:
    """Nothing arrives after the login, on any connection, and no request to cancel."""
    with Proxy(socket_of(db.cluster.sockets), client_says=swallowing("Q", "CancelRequest")) as proxy:
        done, took_s = pressed(db, proxy, presses, when)
        proxy.cut()
    assert_fails(done, 130, "may go on with what it was sent")
    assert took_s < (SECONDS if presses == 1 else SECONDS / 2)


def test_ctrl_c_while_the_watch_logs_in(db: Db) -> None:
    """The second connection, too, is given up."""

    def watch(message: Message) -> Message:
        silent = message.kind in ("Q", "CancelRequest") or message.connection > 1
        return replace(message, raw=b"") if silent else message

    with Proxy(socket_of(db.cluster.sockets), client_says=watch) as proxy:
        done, took_s = pressed(db, proxy, 1, lambda proxy: len(proxy.conversations) > 1)
        proxy.cut()
    assert_fails(done, 130, "may go on with what it was sent")
    assert took_s < SECONDS


def test_ctrl_c_while_logging_in(db: Db) -> None:
    with Proxy(socket_of(db.cluster.sockets), client_says=swallowing("SSLRequest", "Startup")) as proxy:
        done, took_s = pressed(db, proxy, 1, connected)
        proxy.cut()
    assert_fails(done, 130)
    assert took_s < SECONDS / 2


def test_silence_is_a_connection_lost(db: Db) -> None:
    """After as long as an answer may take; what has no such limit is waited for."""
    with Proxy(socket_of(db.cluster.sockets), server_says=swallowing("C", "Z", "T", "D", connection=1)) as proxy:
        target, settings = parse_target(proxy.url(db.name)), Settings(None, "")
        swallowed, proxy.server_says = proxy.server_says, lambda message: message
        with Connection(target, settings, answer_s=1) as connection:
            assert connection.run(["SELECT pg_sleep(2)"], answer_s=math.inf) == [[("",)]]
            proxy.server_says = swallowed
            began = time.monotonic()
            with pytest.raises(StatementError) as failed:
                connection.ask(["SELECT 1"])
            assert 1 < time.monotonic() - began < 5
        proxy.cut()
    assert for_sqlstate(failed.value.sqlstate).exit_code == 4
