"""The fleet: one task on many databases, or many schemas, by a few workers; one that fails stops none of the others.

There is no state to keep: what a run did not reach, or could not do, the next one does.
"""

from __future__ import annotations

import fnmatch
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from psycopg.conninfo import make_conninfo

from budget_engine import PACKAGE, errors
from budget_engine.commands.session import announced
from budget_engine.commands.worker import TASKS
from budget_engine.output import text
from budget_engine.output.console import CONSOLE, PEOPLE
from budget_engine.postgres.connection import Connection
from budget_engine.settings import Target, duration_ms, parse_target

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
    """What is to be done, and when to stop; jobs: workers; canary: how many first; timeout_s: for one target."""

    task: str
    jobs: int
    canary: int
    stop_after: int
    timeout_s: float | None


@dataclass(frozen=True)
class Ended:
    """How a target ended, and after how many seconds."""

    member: Member
    exit_code: int
    what: str
    where: str
    remedy: str
    summary: str
    took_s: float

    def as_json(self) -> str:
        """Return its line of --format json."""
        said = {"what": self.what, "where": self.where.splitlines(), "remedy": self.remedy.splitlines()}
        words = {"target": self.member.label, "exit_code": self.exit_code, "seconds": round(self.took_s, 3)}
        return json.dumps(words | {"summary": self.summary, "error": said if self.exit_code else None})


def run(
    *,
    targets: str,
    databases: Sequence[str],
    schemas: Sequence[str],
    task: str,
    jobs: int,
    canary: int,
    stop_after: int,
    part: str,
    timeout: str,
    form: str,
) -> None:
    """Run the task on every target; end with 0, with the code that all failures have in common, or with 1."""
    if form not in (PEOPLE, "json"):
        raise errors.FORMAT(task="fleet", form=form, formats=f"{PEOPLE}, json")
    CONSOLE.format = form
    if task not in TASKS:
        raise errors.FLEET_OPTION(option=f"--task {task}", wants=", ".join(TASKS))
    timeout_s = duration_ms("--timeout", timeout) / 1000 if timeout else None
    orders = Orders(task, jobs or _JOBS, canary, stop_after, timeout_s)
    named = list(_members(targets, databases, schemas))
    _refuse_what_is_none(named)
    members = list(_part(named, part))  # none, perhaps: a machine too many is no failure
    CONSOLE.say(
        text.line(
            "fleet",
            f"{task} on {len(members)} target{'s' * (len(members) != 1)}, {min(orders.jobs, len(members))} at a time",
        )
    )
    with _Fleet(orders, members) as fleet:
        ended = list(_told(fleet.results(), len(members)))
    _sum_up(ended, len(members))


# ── which targets ──────────────────────────────────────────────────────────────────────────────────────────────────


def _members(targets: str, databases: Sequence[str], schemas: Sequence[str]) -> Iterator[Member]:
    if sum(map(bool, (targets, databases, schemas))) != 1:
        raise errors.FLEET_OPTION(option="fleet", wants="one of --targets, --databases, --schemas")
    if targets:
        yield from _listed(targets)
        return
    given, where = announced()
    query = _DATABASES if databases else _SCHEMAS
    with Connection(where, given) as connection:
        [rows] = connection.ask([query])
    names = [str(name) for (name,) in rows]
    for name in (n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in databases or schemas)):
        yield _of_database(where, name) if databases else _of_schema(where, name)


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


def _of_database(where: Target, name: str) -> Member:
    conninfo = where.conninfo | {"dbname": name}
    return Member(name, name, make_conninfo(**_with_path(conninfo, where.search_path)))


def _of_schema(where: Target, name: str) -> Member:
    return Member(name, name, make_conninfo(**_with_path(where.conninfo, '"' + name.replace('"', '""') + '"')))


def _with_path(conninfo: dict[str, str], search_path: str | None) -> dict[str, str]:
    if search_path is None:
        return conninfo
    escaped = re.sub(r"([\s\\])", r"\\\1", search_path)
    return conninfo | {"options": f"{conninfo.get('options', '')} -csearch_path={escaped}".strip()}


def _part(members: Iterable[Member], part: str) -> Iterator[Member]:
    """Yield those of one machine of several: part "2/8" is the second of eight."""
    numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part or "1/1")
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise errors.FLEET_OPTION(option=f"--part {part}", wants="K/N, from 1/N to N/N")
    mine, parts = int(numbers[1]) - 1, int(numbers[2])
    return (member for member in members if zlib.crc32(member.label.encode()) % parts == mine)


def _refuse_what_is_none(members: Sequence[Member]) -> None:
    if not members:
        raise errors.NO_TARGET()
    counted = Counter(name for member in members for name in {member.label, member.place})
    if twice := [name for name, count in counted.items() if count > 1]:
        raise errors.TARGET_TWICE(where=twice)


# ── the work ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Worker:
    """A process that works on one target after the other; started anew where it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def work(self, member: Member, orders: Orders) -> Ended:
        """Have the task run on this target; stop it where it takes longer than it may."""
        process = self._process = self._process or _started()
        began, late = time.monotonic(), False

        def stop() -> None:
            nonlocal late
            late = True
            self.stop()

        timer = threading.Timer(orders.timeout_s or 0, stop)
        if orders.timeout_s:
            timer.start()
        answer = _asked(process, json.dumps({"url": member.url, "task": orders.task}))
        timer.cancel()
        if late or not answer:  # a next target might meet the Ctrl-C that was meant for this one
            self._process = None
            process.kill()
            process.wait()
        if late:
            gone = f"no end within {orders.timeout_s:g} s"
            answer = {"exit_code": 7, "what": gone, "where": "", "remedy": "", "summary": ""}
        lost = {"exit_code": 1, "what": "its worker has died", "where": "", "remedy": "", "summary": ""}
        return Ended(member, took_s=time.monotonic() - began, **(answer or lost))

    def stop(self) -> None:
        """Ask for the end as Ctrl-C does: what runs on the server is cancelled; then end it."""
        if (process := self._process) is None:
            return
        with suppress(OSError):
            process.send_signal(signal.SIGINT)
        killer = threading.Timer(_GRACE_S, process.kill)
        killer.daemon = True
        killer.start()

    def close(self) -> None:
        """Let it end: it has no target any more."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
            self._process.wait()


def _started() -> subprocess.Popen[str]:
    """Start a worker in a session of its own: Ctrl-C reaches it through us, once."""
    return subprocess.Popen(
        [sys.executable, "-m", "budget_engine.commands.worker", str(CONSOLE.home), CONSOLE.command, CONSOLE.prefix],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )


def _asked(process: subprocess.Popen[str], line: str) -> dict[str, Any]:
    """Write the line, and read the answer; {} where the process is gone."""
    if process.stdin is None or process.stdout is None:
        return {}
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline() or "{}")
    except (OSError, ValueError):
        return {}
    return answer


class _Fleet:
    """Hands the targets to the workers, and the results on as they come."""

    def __init__(self, orders: Orders, members: Sequence[Member]) -> None:
        self._orders, self._members = orders, members
        self._left: queue.SimpleQueue[Member] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._workers = [_Worker() for _ in range(min(orders.jobs, len(members)))]
        self._stopped = False
        self._failed = self._limit = 0
        self._counting = threading.Lock()

    def results(self) -> Iterator[Ended]:
        """Yield how each target ended: the canaries first, and the others only where those ended well."""
        canaries, others = self._members[: self._orders.canary], self._members[self._orders.canary :]
        for members, limit in ((canaries, 1), (others, self._orders.stop_after)):
            self._limit = limit
            if not self._stopped:
                yield from self._run(members)

    def __enter__(self) -> _Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the workers end; before they are done, where something has ended us."""
        self._stopped = True
        if kind is not None:
            for worker in self._workers:
                worker.stop()
        for worker in self._workers:
            worker.close()

    def _run(self, members: Sequence[Member]) -> Iterator[Ended]:
        for member in members:
            self._left.put(member)
        threads = [threading.Thread(target=self._serve, args=[worker], daemon=True) for worker in self._workers]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not self._ended.empty():
            with suppress(queue.Empty):
                yield self._ended.get(timeout=0.1)

    def _serve(self, worker: _Worker) -> None:
        with suppress(queue.Empty):
            while not self._stopped:
                ended = worker.work(self._left.get_nowait(), self._orders)
                with self._counting:
                    self._failed += ended.exit_code != 0
                    self._stopped = self._stopped or 0 < self._limit <= self._failed
                self._ended.put(ended)


# ── what is said ───────────────────────────────────────────────────────────────────────────────────────────────────


def _told(results: Iterator[Ended], total: int) -> Iterator[Ended]:
    """Say how each target ended: those that failed to people, every one to machines."""
    failed = 0
    for number, ended in enumerate(results, 1):
        failed += ended.exit_code != 0
        if CONSOLE.format == "json":
            CONSOLE.emit(ended.as_json())
        if ended.exit_code:
            says = f"{ended.member.label}: exit {ended.exit_code}: {ended.what}"
            CONSOLE.say(text.line("failed", says, *ended.where.splitlines()))
        CONSOLE.progress(f"{number} of {total} targets, {failed} failed")
        yield ended


def _sum_up(ended: Sequence[Ended], total: int) -> None:
    """Say how many ended well; raise where not all did."""
    codes = Counter(one.exit_code for one in ended)
    well, left = codes.pop(0, 0), total - len(ended)
    by_code = [f"exit {code}: {count}" for code, count in sorted(codes.items())]
    if not codes:
        CONSOLE.say(text.line("done", f"{total} of {total} targets ended well"))
        return
    said = "; ".join([f"{well} of {total} did", *by_code, *([f"{left} not begun"] if left else [])])
    common = replace(errors.FLEET_FAILED, exit_code=next(iter(codes)) if len(codes) == 1 else 1)
    raise common(said=said)
