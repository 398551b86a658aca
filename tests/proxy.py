"""A TCP proxy in front of a PostgreSQL server: it counts the round trips, keeps the client's messages, delays, cuts.

A round trip is what makes the client wait for the length of the line: TCP's handshake, each burst of client bytes that
the server answers (the bytes of one direction that follow each other without a byte of the other), and Terminate, which
nobody answers. On a unix socket the server refuses TLS with the byte N: libpq's default sslmode works through here.

A delay is the length of the line, not its width: what is sent in one go arrives in one go, so much later, and TCP's
handshake takes it twice. (Its slow start is not imitated.)
"""

from __future__ import annotations

import collections
import contextlib
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

STARTUP_CODES = {80877103: "SSLRequest", 80877104: "GSSENCRequest", 80877102: "CancelRequest"}
NEGOTIATIONS = {"SSLRequest", "GSSENCRequest"}  # answered by a single byte, not by a message
COMMITTED = r"^C....COMMIT"  # CommandComplete


@dataclass(frozen=True)
class Message:
    """A message as it travelled: kind is its type byte (Q, X, C, N, …), or the name of a message that has none.

    connection: on which one, counted from 1.
    """

    kind: str
    raw: bytes
    connection: int = 1


@dataclass
class Conversation:
    """One client connection: what was said on it, and how often the client had to wait."""

    number: int  # counted from 1
    from_client: list[Message] = field(default_factory=list)
    from_server: list[Message] = field(default_factory=list)
    bursts: int = 0

    @property
    def round_trips(self) -> int:
        """Round trips as defined above."""
        return 1 + self.bursts

    @property
    def kinds(self) -> list[str]:
        """The client's messages, by kind."""
        return [message.kind for message in self.from_client]

    @property
    def backend_pid(self) -> int | None:
        """Process id of the server process (BackendKeyData); None: not logged in yet."""
        keys = [message.raw for message in self.from_server if message.kind == "K"]
        return int.from_bytes(keys[0][5:9], "big") if keys else None

    @property
    def startup(self) -> dict[str, str]:
        """The parameters that the client sent when it logged in."""
        raw = next(message.raw for message in self.from_client if message.kind == "Startup")
        words = raw[8:].rstrip(b"\x00").decode().split("\x00")
        return dict(zip(words[0::2], words[1::2], strict=True))


class CutError(Exception):
    """Raised by a watcher: both sides see the connection end before this message arrives."""


Watcher = Callable[[Message], Message]


def unchanged(message: Message) -> Message:
    """Let a message pass."""
    return message


def on_nth(wanted: Callable[[Message], bool], n: int, act: Callable[[], None]) -> Watcher:
    """Act when the n-th wanted message passes (counted from 1, over all connections)."""
    seen = 0

    def watch(message: Message) -> Message:
        nonlocal seen
        seen += wanted(message)
        if wanted(message) and seen == n:
            act()
        return message

    return watch


def cut() -> None:
    """End the connection that the message belongs to."""
    raise CutError


def containing(pattern: str) -> Callable[[Message], bool]:
    """Whether a message contains what this regular expression describes."""
    return lambda message: re.search(pattern.encode(), message.raw, re.S) is not None


class Proxy:
    """Listens on loopback while it is entered; upstream is a socket's path or (host, port); delay_s is one way."""

    def __init__(
        self,
        upstream: str | tuple[str, int],
        *,
        delay_s: float = 0,
        client_says: Watcher = unchanged,
        server_says: Watcher = unchanged,
    ) -> None:
        self.upstream, self.delay_s = upstream, delay_s
        self.client_says, self.server_says = client_says, server_says
        self.conversations: list[Conversation] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]

    def url(self, database: str, role: str = "postgres") -> str:
        """The way to a database through here."""
        return f"postgresql://{role}@127.0.0.1:{self.port}/{database}"

    def cut(self) -> None:
        """End every connection, at once and without a word."""
        for end in list(self._sockets):
            with contextlib.suppress(OSError):  # it ended already
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Proxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # wakes accept()
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.conversations.append(Conversation(len(self.conversations) + 1))
            thread = threading.Thread(target=self._converse, args=(client, self.conversations[-1]))
            self._threads.append(thread)
            thread.start()

    def _converse(self, client: socket.socket, conversation: Conversation) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # we pass on message by message; none is to wait
        time.sleep(2 * self.delay_s)  # the handshake; this end of it was near
        with contextlib.suppress(OSError, CutError), client, self._dial() as server:
            self._sockets += [client, server]
            _Relay(self, client, server, conversation).run()

    def _dial(self) -> socket.socket:
        if isinstance(self.upstream, tuple):
            return socket.create_connection(self.upstream)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self.upstream)
        except OSError:  # it is down
            server.close()
            raise
        return server


class _Relay:
    """One connection, passed on message by message."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket, conversation: Conversation) -> None:
        self.proxy, self.client, self.server, self.conversation = proxy, client, server, conversation
        self.unparsed = {client: b"", server: b""}
        self.started = False  # the startup message has passed: from now on every message has a type
        self.client_spoke_last = False
        self.travelling: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()

    def run(self) -> None:
        open_ends = [self.client, self.server]
        while True:
            until_next = max(0, self.travelling[0][0] - time.monotonic()) if self.travelling else None
            for source in select.select(open_ends, [], [], until_next)[0]:
                data = source.recv(65536)
                self.travelling.append((time.monotonic() + self.proxy.delay_s, source, data))
                if data:
                    self._count(source)
                else:
                    open_ends.remove(source)
            while self.travelling and self.travelling[0][0] <= time.monotonic():
                _, source, data = self.travelling.popleft()
                if not data:
                    return
                self.unparsed[source] += data
                self._pass_on(source)

    def _count(self, source: socket.socket) -> None:
        if source is self.client and not self.client_spoke_last:
            self.conversation.bursts += 1
        self.client_spoke_last = source is self.client

    def _pass_on(self, source: socket.socket) -> None:
        here = source is self.client
        said = self.conversation.from_client if here else self.conversation.from_server
        watch = self.proxy.client_says if here else self.proxy.server_says
        for message in self._complete(source):
            said.append(message)
            (self.server if here else self.client).sendall(watch(message).raw)

    def _complete(self, source: socket.socket) -> Iterator[Message]:
        while (size := self._size(source)) and len(self.unparsed[source]) >= size:
            raw, self.unparsed[source] = self.unparsed[source][:size], self.unparsed[source][size:]
            yield Message(self._kind(source, raw), raw, self.conversation.number)

    def _size(self, source: socket.socket) -> int:
        """Length of the message that begins here; 0 where too little of it has come to know."""
        data = self.unparsed[source]
        if source is self.server and not self.started:
            return min(len(data), 1)
        typed = int(self.started)
        return int.from_bytes(data[typed : typed + 4], "big") + typed if len(data) >= 4 + typed else 0

    def _kind(self, source: socket.socket, raw: bytes) -> str:
        if self.started:
            return chr(raw[0])
        if source is self.server:
            return "answer"
        kind = STARTUP_CODES.get(int.from_bytes(raw[4:8], "big"), "Startup")
        self.started = kind == "Startup"
        return kind


def socket_of(folder: Path) -> str:
    """Path of the socket of a server whose sockets lie in this folder."""
    return str(folder / ".s.PGSQL.5432")
