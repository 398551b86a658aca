"""A server that falls silent, or says what PostgreSQL never does: a message and an exit code; Ctrl-C ends any wait."""

from __future__ import annotations

import math
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import warm
from budget_engine.errors import StatementError, for_sqlstate
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Settings, parse_target
from conftest import TRAP, Db, assert_fails, at_once, clean_environment, ended, until
from proxy import Message, Proxy, Watcher, socket_of
from test_command_line import peer

SECONDS = 12  # in which Ctrl-C ends a run, a busy machine included


def swallowing(*kinds: str, connection: int | None = None) -> Watcher:
    """Let nothing of these kinds arrive; connection: on this one only."""

    def watch(message: Message) -> Message:
        swallowed = message.kind in kinds and connection in (None, message.connection)
        return replace(message, raw=b"") if swallowed else message

    return watch


def silent_watch(message: Message) -> Message:
    """Let nothing arrive after the first connection's login."""
    silent = message.kind in ("Q", "CancelRequest") or message.connection > 1
    return replace(message, raw=b"") if silent else message


def asked(proxy: Proxy) -> bool:
    return any("Q" in conversation.kinds for conversation in proxy.conversations)


def watched(proxy: Proxy) -> bool:
    """Whether the second connection has asked, too."""
    return len(proxy.conversations) > 1 and "Q" in proxy.conversations[1].kinds


def connected(proxy: Proxy) -> bool:
    return bool(proxy.conversations and proxy.conversations[0].kinds)


SENT = "may go on with what it was sent"
NO_ANSWER, NO_LOGIN = swallowing("Q", "CancelRequest"), swallowing("SSLRequest", "Startup")
# What does not arrive; when Ctrl-C is pressed, and how often; in how many seconds that ends the run, and what it says.
CTRL_C: dict[str, tuple[Watcher, Callable[[Proxy], bool], int, float, str]] = {
    "once": (NO_ANSWER, asked, 1, SECONDS, SENT),
    "twice": (NO_ANSWER, asked, 2, SECONDS / 2, SENT),
    "three times": (NO_ANSWER, asked, 3, SECONDS / 2, SENT),
    "while the watch waits, too": (NO_ANSWER, watched, 1, SECONDS, SENT),
    "while the watch waits, too, twice": (NO_ANSWER, watched, 2, SECONDS / 2, SENT),
    "while the watch waits, too, three times": (NO_ANSWER, watched, 3, SECONDS / 2, SENT),
    "while the watch logs in": (silent_watch, lambda proxy: len(proxy.conversations) > 1, 1, SECONDS, SENT),
    "while logging in": (NO_LOGIN, connected, 1, SECONDS / 2, ""),
}


def test_ctrl_c_ends_a_run_whose_server_is_silent(db: Db) -> None:
    """Nothing arrives after the login, on any connection, and no request to cancel."""

    def ends(
        db: Db, client_says: Watcher, when: Callable[[Proxy], bool], presses: int, within_s: float, says: str
    ) -> None:
        with Proxy(socket_of(db.cluster.sockets), client_says=client_says) as proxy:
            process = db.start("setup", DATABASE_URL=proxy.url(db.name))
            until(lambda: when(proxy), process)
            time.sleep(0.3)
            began = time.monotonic()
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            done, took_s = ended(process), time.monotonic() - began
            proxy.cut()
        assert_fails(done, 130, says)
        assert took_s < within_s

    at_once(db, ends, CTRL_C)


def test_silence_is_a_connection_lost(db: Db) -> None:
    """After as long as an answer may take; what has no such limit is waited for."""
    with Proxy(socket_of(db.cluster.sockets), server_says=swallowing("C", "Z", "T", "D", connection=1)) as proxy:
        target, settings = parse_target(proxy.url(db.name)), Settings(None, "")
        swallowed, proxy.server_says = proxy.server_says, lambda message: message
        with Connection(target, settings, answer_s=0.5) as connection:
            assert connection.run(["SELECT pg_sleep(0.7)"], answer_s=math.inf) == [[("",)]]
            proxy.server_says = swallowed
            began = time.monotonic()
            with pytest.raises(StatementError) as failed:
                connection.ask(["SELECT 1"])
            assert 0.5 < time.monotonic() - began < 5
        proxy.cut()
    assert for_sqlstate(failed.value.sqlstate).exit_code == 4


# ── what PostgreSQL never says ─────────────────────────────────────────────────────────────────────────────────────


def said(kind: bytes, content: bytes = b"") -> bytes:
    return kind + (len(content) + 4).to_bytes(4, "big") + content


def row(*values: bytes | None) -> bytes:
    parts = [b"\xff\xff\xff\xff" if value is None else len(value).to_bytes(4, "big") + value for value in values]
    return said(b"D", len(values).to_bytes(2, "big") + b"".join(parts))


def described(columns: int) -> bytes:
    column = b"c\0" + b"\0" * 9 + b"\x19\xff\xff" + b"\xff" * 4 + b"\0\0"  # of type text
    return said(b"T", columns.to_bytes(2, "big") + column * columns)


READY = said(b"Z", b"I")
DONE = said(b"C", b"SELECT 1\0")
PARAMETERS = {b"server_version": b"18.4", b"client_encoding": b"UTF8", b"integer_datetimes": b"on"}
LOGGED_IN = (
    said(b"R", b"\0\0\0\0")
    + b"".join(said(b"S", name + b"\0" + value + b"\0") for name, value in PARAMETERS.items())
    + said(b"K", b"\0\0\0\1\0\0\0\1")
    + READY
)
ANSWERS = 9  # to the survey: BEGIN, SET, our settings, five queries, COMMIT
NOTICE = said(b"N", b"SNOTICE\0C01000\0Mover and over again\0\0")
NEVER_SAID: dict[str, list[bytes]] = {  # the last one for ever
    "no answer": [READY, b""],
    "too few answers": [DONE, READY, b""],
    "too many answers": [DONE * 100, READY, b""],
    "no rows": [DONE * ANSWERS, READY, b""],
    "rows of no column": [(described(0) + row() + DONE) * ANSWERS, READY, b""],
    "rows of other columns": [(described(2) + row(b"a", None) + DONE) * ANSWERS, READY, b""],
    "NULLs": [(described(7) + row(*[None] * 7) + DONE) * ANSWERS, READY, b""],
    "other JSON": [(described(7) + row(*[b'[{"a": 1}]'] * 7) + DONE) * ANSWERS, READY, b""],
    "deep JSON": [(described(1) + row(b"[" * 100_000) + DONE) * ANSWERS, READY, b""],
    "COPY to us": [said(b"H", b"\0\0\0"), said(b"d", b"x" * 1000)],
    "COPY from us": [said(b"G", b"\0\0\0"), b""],
    "endless errors": [said(b"E", b"SERROR\0CXX000\0Mno\0\0")],
    "another encoding": [said(b"S", b"client_encoding\0MULE_INTERNAL\0") + said(b"E", b"M\xe4\0\0"), READY, b""],
    "no message": [b"!" * 100],
    "rows for ever": [described(1), row(b"x" * 10_000)],
    "a row of a GB": [described(1), b"D\x40\0\0\0\0\1\x3f\xff\xff\xf0", b"x" * 65536],
    "a notice of a GB": [b"N\x40\0\0\0SNOTICE\0M", b"x" * 65536],
    "an error of a GB": [b"E\x40\0\0\0SERROR\0M", b"x" * 65536],
}


def speaking(answer: list[bytes]) -> Callable[[socket.socket], None]:
    """Log in whoever comes, then answer each query so."""

    def talk(client: socket.socket) -> None:
        while client.recv(4096)[4:8] != b"\0\3\0\0":  # no TLS, no GSSAPI
            client.sendall(b"N")
        client.sendall(LOGGED_IN)
        client.recv(65536)
        for part in answer:
            client.sendall(part)
        while answer[-1]:
            client.sendall(answer[-1])

    return talk


@pytest.mark.parametrize("answer", NEVER_SAID.values(), ids=NEVER_SAID)
def test_what_postgresql_never_says(answer: list[bytes]) -> None:
    """A message, exit 4, in bounded memory."""
    with peer(speaking(answer)) as port:
        environment = clean_environment() | {"DATABASE_URL": f"postgresql://a@127.0.0.1:{port}/a?sslmode=disable"}
        process = warm.start(("verify",), environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        peak_mb, watched = 0.0, psutil.Process(process.pid)
        with suppress(psutil.Error):
            while process.poll() is None:
                peak_mb = max(peak_mb, watched.memory_info().rss / 1024**2)
                time.sleep(0.01)
        done = ended(process)
    assert_fails(done, 4)
    assert peak_mb < 1300  # it lies there twice while it grows; libpq reads one message for as long as more comes
    assert len(done.err) < 30_000


ENDLESS = "LOOP RAISE NOTICE 'over and over again'; END LOOP"


def test_trigger_that_raises_notices_for_ever(db: Db, tmp_path: Path) -> None:
    """Its notices are not all shown; Ctrl-C ends it."""
    db.execute(TRAP.format(condition="TG_TAG = 'CREATE INDEX'", action=ENDLESS))
    environment, shown = clean_environment() | {"DATABASE_URL": db.url}, tmp_path / "shown"
    with shown.open("w") as stdout:
        process = warm.start(("setup",), environment, stdout=stdout, stderr=subprocess.PIPE)
    until(lambda: "(more such notices)" in shown.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert_fails(ended(process), 130)
    assert 0 < shown.read_text().count("over and over again") < 50


def test_error_of_great_size(db: Db) -> None:
    """Its beginning is shown, and the step's place."""
    db.execute(TRAP.format(condition="TG_TAG = 'CREATE INDEX'", action="RAISE EXCEPTION '%', repeat('x', 20000000)"))
    done = db.invoke("setup")
    assert_fails(done, 1, "xxxxx", "core_schema changed nothing")
    assert len(done.err) < 30_000
