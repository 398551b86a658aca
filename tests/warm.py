"""`python -m invoke` without its imports: most of a short command's time, and some of that of this suite.

A process that has imported what the recipes import forks for each command. The command is a process of its own, with an
environment, streams and an end of its own; only what Python reads before our first line cannot be given to it.
"""

from __future__ import annotations

import atexit
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

ROOT = Path(__file__).parent.parent


def run(words: tuple[str, ...], environment: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    """Run `python -m invoke WORDS…` in the project's folder; return its exit code (-N: signal N), stdout and stderr."""
    command = [sys.executable, "-m", "invoke", *words]
    if _of_python(environment) != _of_python(os.environ):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
        return done.returncode, done.stdout, done.stderr
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, ours.makefile("rw") as talk:
        with theirs:
            socket.send_fds(_server(), [b"+"], [theirs.fileno(), 0, out.fileno(), err.fileno()])
        print(json.dumps([words, dict(environment)]), file=talk, flush=True)
        process = int(talk.readline())
        ours.settimeout(timeout)
        try:
            code = int(talk.readline())
        except BaseException as why:
            os.kill(process, signal.SIGKILL)
            if isinstance(why, TimeoutError):
                raise subprocess.TimeoutExpired(command, timeout) from None
            raise
        for stream in (out, err):
            stream.seek(0)
        return code, out.read(), err.read()


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
    with socket.socket(fileno=asker) as connection, connection.makefile("rw") as talk:
        words, environment = json.loads(talk.readline())
        if process := os.fork():
            print(process, file=talk, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=talk, flush=True)
            os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["invoke", *words]
    sys.path[0] = str(ROOT)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.path.insert(1, str(ROOT / "scripts"))
    for module in (
        "invoke.main",
        "budget_engine.commands.doctor",
        "budget_engine.commands.setup",
        "budget_engine.commands.inspect",
    ):
        importlib.import_module(module)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("invoke", run_name="__main__", alter_sys=True)
