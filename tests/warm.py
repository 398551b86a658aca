"""`python -m invoke` without its imports: most of a short command's time, and some of that of this suite.

A process that has imported what the recipes import forks for each command. The command is a process of its own, with an
environment, streams and an end of its own; only what Python reads before our first line cannot be given to it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NUMBER = 20  # the characters in which processes and exit codes are told


def run(words: tuple[str, ...], environment: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    """Run `python -m invoke WORDS…` in the project's folder; return its exit code (-N: signal N), stdout and stderr."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with start(words, environment, stdout=out, stderr=err) as process:
            try:
                code = process.wait(timeout)
            except BaseException:
                process.kill()
                raise
        for stream in (out, err):
            stream.seek(0)
        return code, out.read(), err.read()


def start(words: tuple[str, ...], environment: Mapping[str, str], **streams: Any) -> subprocess.Popen[str]:
    """Start `python -m invoke WORDS…` there, in a session of its own; streams: as Popen takes them."""
    kind = _Forked if _of_python(environment) == _of_python(os.environ) else subprocess.Popen
    command = [sys.executable, "-m", "invoke", *words]
    return kind(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **streams)


class _Forked(subprocess.Popen[str]):
    """A command that the server forks: no child of ours, so that its end comes through a socket."""

    def _execute_child(self, args: list[str], *how: Any) -> None:
        """Have it forked; how: as Popen passes it on, of which the ends of the pipes matter here."""
        _executable, _preexec, _close, _pass, _cwd, environment, _info, _flags, _shell, *pipes = how[:15]
        self._end, asked = socket.socketpair()
        with asked:
            handles = [number if pipe == -1 else pipe for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
            socket.send_fds(_server(), [b"+"], [asked.fileno(), *handles])
        self._end.sendall(json.dumps([args[3:], dict(environment)]).encode() + b"\n")
        self.pid = int(self._end.recv(NUMBER))
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            self._end.settimeout(timeout)
            try:
                self.returncode = int(self._end.recv(NUMBER))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._end.close()
        return self.returncode

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode


def _of_python(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what Python and its C library read once, as they start."""
    return {name: value for name, value in environment.items() if name.startswith(("PYTHON", "LC_", "LANG"))}


@functools.cache
def _server() -> socket.socket:
    """Start the process that forks; it ends when this one closes its end of the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        # Its streams are as those of a command that subprocess.run() captures: none is a terminal.
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, **streams)  # type: ignore[call-overload]

    @atexit.register
    def stop() -> None:
        ours.close()
        process.wait()

    return ours


def _serve(control: socket.socket) -> None:
    """Fork for each command that is asked for; return in the command's process, ready to be it, or at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the commands
    while handles := socket.recv_fds(control, 1, 4)[1]:
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _become(*handles)
        for handle in handles:
            os.close(handle)
    os._exit(0)


def _become(asker: int, *streams: int) -> None:
    """Fork once more: tell the asker how the command ends; return as the command."""
    with socket.socket(fileno=asker) as connection, connection.makefile() as asked:
        words, environment = json.loads(asked.readline())
        if process := os.fork():
            connection.sendall(f"{process:{NUMBER}}".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            connection.sendall(f"{code:{NUMBER}}".encode())
            os._exit(0)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["invoke", *words]
    sys.path[0] = str(ROOT)


def _leave(code: object) -> None:
    """End at once a command that ended well, all being written: to take its modules apart is two thirds of its cost."""
    if isinstance(code, int):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.path.insert(1, str(ROOT / "scripts"))
    from budget_engine.migration import chain

    for module in (
        "invoke.main",
        "budget_engine.commands.doctor",
        "budget_engine.commands.setup",
        "budget_engine.commands.inspect",
    ):
        importlib.import_module(module)
    chain.load()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        runpy.run_module("invoke", run_name="__main__", alter_sys=True)
        atexit.register(_leave, 0)
    except SystemExit as end:
        atexit.register(_leave, end.code)
        raise
