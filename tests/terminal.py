"""A terminal of a test's own: what a person sees there, and types."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Mapping
from pathlib import Path

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


def pasted(db: Db, folder: Path, text: str) -> str:
    """Type a text on the terminal of a psql that runs in this folder, as a paste does; return what shows."""
    ours, theirs = pty.openpty()
    psql = [str(db.cluster.binaries / "psql"), db.url, "-X"]
    environment = clean_environment() | {"TERM": "xterm", "PAGER": "cat"}
    process = subprocess.Popen(psql, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    keys, seen = f"{text}\n\\q\n".encode(), b""
    timer = threading.Timer(60, process.kill)
    timer.start()
    while b"=#" not in seen:  # else the terminal would take the keys line by line
        seen += os.read(ours, 4096)
    while process.poll() is None:
        readable, writable, _ = select.select([ours], [ours] if keys else [], [], 0.1)
        if readable:
            seen += _read(ours)
        if writable:
            keys = keys[os.write(ours, keys[:256]) :]
    timer.cancel()
    os.close(ours)
    assert process.returncode == 0, seen
    return seen.decode(errors="replace")
