"""The fleet: one task on many databases, or many schemas, by a few workers; one that fails stops none of the others.

There is no state to keep: what a run did not reach, or could not do, the next one does.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from psycopg.conninfo import make_conninfo

from budget_engine import PACKAGE, errors
from budget_engine.commands.session import announced
from budget_engine.commands.worker import TASKS
from budget_engine.output import text
from budget_engine.output.console import CONSOLE, PEOPLE
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Target, duration_ms, parse_target, with_search_path

_JOBS = min(2 * (os.cpu_count() or 1), 8)
_GRACE_S = 5.0  # between the request to stop and the end of a worker
_NAMED = re.compile(r"([^\s=:/?#@]+)=(postgres(?:ql)?(?:\+\w+)?://.*)", re.I)
_DATABASES = "SELECT datname FROM pg_catalog.pg_database WHERE NOT datistemplate AND datallowconn ORDER BY 1"
_SCHEMAS = "SELECT nspname FROM pg_catalog.pg_namespace WHERE nspname !~ '^pg_' ORDER BY 1"


@dataclass(frozen=True)
class Member:
    """One target of the fleet: what it is called, where it is, and its URL or libpq's keyword form."""

    label: str
    place: str
    url: str = field(repr=False)


@dataclass(frozen=True)
class Orders:
    """What is to be done, and when to stop; jobs: workers (0: as many as fit this machine); canary: how many first.

    part: "2/8" is the second of eight machines' parts; timeout: for one target, "" for none.
    """

    task: str
    jobs: int
    canary: int
    stop_after: int
    part: str
    timeout: str


Ended = dict[str, Any]  # how a target ended: its line of --format json


def run(orders: Orders, *, targets: str, databases: Sequence[str], schemas: Sequence[str], form: str) -> None:
    """Run the task on every target; end with 0, with the code that all failures have in common, or with 1."""
    if form not in (PEOPLE, "json"):
        raise errors.FORMAT(task="fleet", form=form, formats=f"{PEOPLE}, json")
    CONSOLE.format = form
    if orders.task not in TASKS:
        raise errors.FLEET_OPTION(option=f"--task {orders.task}", wants=", ".join(TASKS))
    timeout_s = duration_ms("--timeout", orders.timeout) / 1000 if orders.timeout else None
    named = list(_members(targets, databases, schemas))
    if not named:
        raise errors.NO_TARGET()
    counted = Counter(name for member in named for name in {member.label, member.place})
    if twice := [name for name, count in counted.items() if count > 1]:
        raise errors.TARGET_TWICE(where=twice)
    members = list(_part(named, orders.part))  # none, perhaps: a machine too many is no failure
    jobs = orders.jobs if orders.jobs > 0 else _JOBS
    workers = [_Worker(orders.task, timeout_s) for _ in range(min(jobs, len(members)))]
    many = f"{len(members)} target{'s' * (len(members) != 1)}"
    CONSOLE.say(text.line("fleet", f"{orders.task} on {many}, {len(workers)} at a time"))
    with ThreadPoolExecutor(len(workers) or 1) as pool, _let_go(workers):
        codes = _told(_results(orders, members, workers, pool), len(members))
    _sum_up(codes, len(members))


# ── which targets ──────────────────────────────────────────────────────────────────────────────────────────────────


def _members(targets: str, databases: Sequence[str], schemas: Sequence[str]) -> Iterator[Member]:
    if sum(map(bool, (targets, databases, schemas))) != 1:
        raise errors.FLEET_OPTION(option="fleet", wants="one of --targets, --databases, --schemas")
    if targets:
        yield from _listed(targets)
        return
    given, where = announced()
    with Connection(where, given) as server:
        [rows] = server.ask([_DATABASES if databases else _SCHEMAS])
    names = [str(name) for (name,) in rows]
    for name in (n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in databases or schemas)):
        conninfo, path = where.conninfo | {"dbname": name}, where.search_path
        if schemas:
            conninfo, path = where.conninfo, '"' + name.replace('"', '""') + '"'
        yield Member(name, name, make_conninfo(**with_search_path(conninfo, path)))


def _listed(file: str) -> Iterator[Member]:
    """Read a file (-: stdin) of lines URL or NAME=URL; blank lines and those that begin with # say nothing."""
    try:
        raw = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.FLEET_FILE(file=file, why=getattr(error, "strerror", None) or error) from None
    for number, line in enumerate(raw.splitlines(), 1):
        if not (stripped := line.strip()) or stripped.startswith("#"):
            continue
        named = _NAMED.fullmatch(stripped)
        name, url = (named[1], named[2]) if named else ("", stripped)
        place = f"line {number} of {'stdin' if file == '-' else file}"
        if url == "embedded":
            raise errors.FLEET_TARGET(place=place, why="is the embedded server")
        target = parse_target(url, place)
        yield Member(name or _place(target), _place(target), url)


def _place(target: Target) -> str:
    """Say host, database and schema: what tells a target from others, and is no secret."""
    conninfo = target.conninfo
    place = conninfo.get("host") or conninfo.get("hostaddr") or conninfo.get("service", "")
    port = f":{conninfo['port']}" if conninfo.get("port", "5432") != "5432" else ""
    parts = (f"{place}{port}", conninfo.get("dbname") or conninfo.get("user", ""), target.search_path or "")
    return "/".join(filter(None, parts))


def _part(members: Iterable[Member], part: str) -> Iterator[Member]:
    """Yield those of one machine of several: part "2/8" is the second of eight."""
    numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part or "1/1")
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise errors.FLEET_OPTION(option=f"--part {part}", wants="K/N, from 1/N to N/N")
    mine, parts = int(numbers[1]) - 1, int(numbers[2])
    return (member for member in members if zlib.crc32(member.label.encode()) % parts == mine)


# ── the work ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Worker:
    """A process that works on one target after the other; started anew where it had to be killed."""

    def __init__(self, task: str, timeout_s: float | None) -> None:
        self._task, self._timeout_s = task, timeout_s
        self._process: subprocess.Popen[str] | None = _started()
        self._is_stopped = False

    def work(self, member: Member) -> Ended:
        """Have the task run on this target; stop it where it takes longer than it may."""
        process = self._process = self._process or _started()
        began, late = time.monotonic(), False
        answer: dict[str, Any] = {}
        if process.stdin and process.stdout and not self._is_stopped:
            with suppress(OSError, ValueError):  # it is gone
                process.stdin.write(json.dumps({"url": member.url, "task": self._task}) + "\n")
                process.stdin.flush()
                late = self._timeout_s is not None and not connection.wait([process.stdout.fileno()], self._timeout_s)
                if late:
                    _stop(process)
                answer = json.loads(process.stdout.readline() or "{}")
        if late or not answer:  # a next target might meet the Ctrl-C that was meant for this one
            self._process = None
            process.kill()
            process.wait()
            code, what = (7, f"no end within {self._timeout_s:g} s") if late else (1, "its worker has died")
            answer = {"summary": "", "exit_code": code, "error": {"what": what, "where": [], "remedy": []}}
        took_s = round(time.monotonic() - began, 3)
        return {"target": member.label, "exit_code": answer["exit_code"], "seconds": took_s, **answer}

    def stop(self) -> None:
        """Stop what it works on; noted first, for the process that takes another's place at this moment."""
        self._is_stopped = True
        if (process := self._process) is not None:
            _stop(process)

    def close(self) -> None:
        """Let it end: it has no target any more."""
        if (process := self._process) is not None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
            process.wait()


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask for the end as Ctrl-C does: what runs on the server is cancelled; then end it."""
    with suppress(OSError):
        process.send_signal(signal.SIGINT)
    killer = threading.Timer(_GRACE_S, process.kill)
    killer.daemon = True
    killer.start()


def _started() -> subprocess.Popen[str]:
    """Start a worker in a session of its own: Ctrl-C reaches it through us, once, and not while Python starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "budget_engine.commands.worker", str(CONSOLE.home), CONSOLE.command, CONSOLE.prefix],
            env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _let_go(workers: Sequence[_Worker]) -> Iterator[None]:
    """Let the workers end; before they are done, where something has ended us."""
    try:
        yield
    except BaseException:
        for worker in workers:
            worker.stop()
        raise
    finally:
        for worker in workers:
            worker.close()


def _results(
    orders: Orders, members: Sequence[Member], workers: Iterable[_Worker], pool: ThreadPoolExecutor
) -> Iterator[Ended]:
    """Yield how each target ended: the canaries first, and the others only where those ended well."""
    idle, at_work = list(workers), dict[Future[Ended], _Worker]()
    failed = 0
    for batch, limit in ((members[: orders.canary], 1), (members[orders.canary :], orders.stop_after)):
        left = iter(batch)
        while True:
            while idle and not 0 < limit <= failed and (member := next(left, None)):
                worker = idle.pop()
                at_work[pool.submit(worker.work, member)] = worker
            if not at_work:
                break
            for done in wait(at_work, return_when=FIRST_COMPLETED).done:
                idle.append(at_work.pop(done))
                ended = done.result()
                failed += ended["exit_code"] != 0
                yield ended
        if failed:
            return


# ── what is said ───────────────────────────────────────────────────────────────────────────────────────────────────


def _told(results: Iterable[Ended], total: int) -> Counter[int]:
    """Say how each target ended, those that failed to people, every one to machines; count the exit codes."""
    codes = Counter[int]()
    for ended in results:
        codes[ended["exit_code"]] += 1
        if CONSOLE.format == "json":
            CONSOLE.emit(json.dumps(ended))
        if error := ended["error"]:
            says = f"{ended['target']}: exit {ended['exit_code']}: {error['what']}"
            CONSOLE.say(text.line("failed", says, *error["where"]))
        CONSOLE.progress(f"{codes.total()} of {total} targets, {codes.total() - codes[0]} failed")
    return codes


def _sum_up(codes: Counter[int], total: int) -> None:
    """Say how many ended well; raise where not all did."""
    left, well = total - codes.total(), codes.pop(0, 0)
    if not codes:
        CONSOLE.say(text.line("done", f"{total} of {total} targets ended well"))
        return
    by_code = [f"exit {code}: {count}" for code, count in sorted(codes.items())]
    said = "; ".join([f"{well} of {total} did", *by_code, *([f"{left} not begun"] if left else [])])
    common = replace(errors.FLEET_FAILED, exit_code=next(iter(codes)) if len(codes) == 1 else 1)
    raise common(said=said)
