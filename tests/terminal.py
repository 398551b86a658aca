"""A terminal of a test's own: what a person sees there, and types."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import tempfile
import termios
import time
from collections.abc import Mapping

import warm
from conftest import Db, Run, clean_environment


def on_terminal(
    db: Db, *words: str, answer: str = "", columns: int = 80, env: Mapping[str, str] | None = None, url: str = ""
) -> Run:
    """Run `invoke WORDS…` where stdout is a terminal, on which somebody types this answer, or Ctrl-C, when asked.

    url: another way to the database than its socket; lines of the terminal end as it ends them, with CR LF.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = clean_environment() | {"DATABASE_URL": url or db.url, "TERM": "xterm-256color"} | dict(env or {})
    for size in ("COLUMNS", "LINES"):  # they would win over the terminal's own
        environment.pop(size, None)
    with tempfile.TemporaryFile("w+") as errors:  # no pipe, which would be full at some time
        process = warm.start(words, environment, stdin=theirs, stdout=theirs, stderr=errors)
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
            if b"[y/N]" in seen and answer == "Ctrl-C":
                time.sleep(0.05)  # as a finger: Python, interrupted while it flushes the question, writes it twice
                process.send_signal(signal.SIGINT)
            elif b"[y/N]" in seen:
                os.write(ours, answer.encode())
        process.wait(timeout=60)
        os.close(ours)
        errors.seek(0)
        return Run(process.returncode, seen.decode(), errors.read())


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side is closed
        return b""
