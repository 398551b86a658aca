"""The embedded server, on real servers: every way in which it starts, dies and is found again."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from budget_engine.errors import UnreachableError
from budget_engine.postgres import embedded
from budget_engine.postgres.embedded import Cluster, running, start, stop
from conftest import postmaster
from versions import MAJOR, locate

PROJECT = Path(__file__).resolve().parent.parent
ROOT_CASE = os.geteuid() == 0
SOMEBODY = pwd.getpwnam("nobody").pw_uid  # any user that is not the one who runs the tests

# What a process of its own does in these tests: sys.argv is the checkout's folder, the binaries', their version.
STARTER = """
import sys
from pathlib import Path
from budget_engine.postgres import embedded
try:
    cluster = embedded.locate(Path(sys.argv[1]), int(sys.argv[3]), Path(sys.argv[2]))
    embedded.start(cluster)
    print(cluster.url)
except embedded.errors.UnreachableError as error:
    sys.exit(f"{error.what} | {error.where} | {error.remedy}")
"""


def _open_folder() -> Path:
    """Make a short folder that every user can pass, as checkouts usually are."""
    made = Path(tempfile.mkdtemp(prefix="be-")).resolve()
    made.chmod(0o755)
    return made


@pytest.fixture
def folder() -> Iterator[Path]:
    """Servers inside are stopped in the end, then it goes."""
    made = _open_folder()
    yield made
    for place in made.rglob(".postgres/*/data"):
        _kill(place.parent)
    shutil.rmtree(made)


def _kill(place: Path) -> None:
    """Stop whatever server of that place lives, whoever runs it."""
    pid = postmaster(place / "data")
    if pid and str(place / "data") in embedded._command_line(pid):
        os.kill(pid, signal.SIGQUIT)
        assert _gone(pid)


@pytest.fixture(scope="module")
def stopped() -> Iterator[Path]:
    """A folder with the data of a server that was started and stopped: initdb is half of what a test costs."""
    made = _open_folder()
    start(locate(made))
    stop(locate(made))
    yield made / ".postgres"
    shutil.rmtree(made)


@pytest.fixture
def cluster(folder: Path, stopped: Path) -> Cluster:
    """One that was started before."""
    subprocess.run(["cp", "-a", stopped, folder], check=True)
    return locate(folder)


def _query(cluster: Cluster, sql: str) -> Any:
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        found = connection.execute(sql.encode())
        row = found.fetchone() if found.description else None
    return row[0] if row else None


def _starts(cluster: Cluster) -> bool:
    """Whether a server can be started there, and answers."""
    start(cluster)
    return bool(_query(cluster, "SELECT 1") == 1)


def _gone(pid: int) -> bool:
    return embedded._until(lambda: not embedded._lives(pid), 10)


def _murder(cluster: Cluster) -> None:
    """Kill the server without a chance to tidy up, and wait until it is dead: its socket closes last."""
    pid = postmaster(cluster.data)
    os.kill(pid, signal.SIGKILL)
    assert _gone(pid)
    assert embedded._until(lambda: not embedded._listening(cluster), 10)


def _starter(root: Path, binaries: Path, **how: Any) -> subprocess.Popen[str]:
    modules = os.pathsep.join([str(PROJECT), *sys.path])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": modules, "PYTHONDONTWRITEBYTECODE": "1"}
    how = {"executable": sys.executable, "env": environment, **how}
    words: list[str | Path] = [how.pop("executable"), "-c", STARTER, root, binaries, str(MAJOR)]
    return subprocess.Popen(words, text=True, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def test_a_process_that_is_being_started_lives() -> None:
    """While its program is loaded it has no command line, for milliseconds on a busy machine: that is no end."""
    words = ["/bin/sh", "-c", '"$0" -c "import time; time.sleep(9)" >/dev/null 2>&1 & echo $!', sys.executable]
    for _ in range(30):  # in every fifth it is seen without words
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as shell:
            pid = int((shell.stdout or sys.stdin).readline())
            deadline = time.monotonic() + 0.01
            looks = [embedded._lives(pid)]
            while time.monotonic() < deadline:
                looks.append(embedded._lives(pid))
        os.kill(pid, signal.SIGKILL)
        assert all(looks)
        assert _gone(pid)


# ── the usual life ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_first_start_attach_stop_and_start_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To attach costs no process, and next to no time. What is meant for libpq does not reach the server."""
    monkeypatch.setenv("PGPORT", "5999")
    monkeypatch.setenv("PGOPTIONS", "")
    cluster = locate(folder)
    assert not running(cluster)
    assert start(cluster)
    first = postmaster(cluster.data)
    assert running(cluster)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
        began = time.perf_counter()
        assert not start(cluster)
        assert time.perf_counter() - began < 0.05
    assert postmaster(cluster.data) == first
    settings = {"listen_addresses": "", "fsync": "on", "server_encoding": "UTF8", "TimeZone": "UTC"}
    assert {name: _query(cluster, f"SHOW {name}") for name in settings} == settings
    assert stat.S_IMODE(cluster.sockets.stat().st_mode) == 0o700
    if MAJOR >= 17:  # a locale of PostgreSQL's own: letters are not ASCII alone
        assert _query(cluster, "SELECT upper('é')") == "É"
    environment = Path(f"/proc/{first}/environ")
    if environment.exists():  # Linux: who starts the server does not leave secrets in it
        assert b"PGPORT" not in environment.read_bytes()
    _query(cluster, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert stop(cluster)
    assert not stop(cluster)
    assert not running(cluster)
    assert _gone(first)
    start(cluster)
    assert _query(cluster, "SELECT answer FROM kept") == 42


def test_majors_lie_apart(folder: Path, cluster: Cluster) -> None:
    clusters = {MAJOR: cluster} | {major: locate(folder, major) for major in embedded.INSTALLATIONS if major != MAJOR}
    for major, one in clusters.items():
        start(one)
        assert _query(one, "SHOW server_version").startswith(f"{major}.")


def test_six_processes_at_once_all_get_the_one_server(folder: Path) -> None:
    cluster = locate(folder)
    starters = [_starter(folder, cluster.binaries) for _ in range(6)]
    results = [(*starter.communicate(timeout=60), starter.returncode) for starter in starters]
    assert results == [(f"{cluster.url}\n", "", 0)] * 6
    assert running(cluster)


def test_server_outlives_ctrl_c_and_hangup_of_its_starter(folder: Path, cluster: Cluster) -> None:
    starter = _starter(folder, cluster.binaries, start_new_session=True)
    starter.communicate(timeout=60)
    pid = postmaster(cluster.data)
    assert os.getsid(pid) != starter.pid
    for number in (signal.SIGINT, signal.SIGHUP):
        with pytest.raises(ProcessLookupError):  # nobody of the starter's group is left
            os.killpg(starter.pid, number)
    assert running(cluster)


def test_path_with_a_space_a_quote_and_a_dollar_and_data_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = folder / "it's $HOME `x`"
    checkout.mkdir()
    assert _starts(locate(checkout))
    monkeypatch.setenv(embedded.DATA_VARIABLE, str(folder / "else where" / ".postgres"))
    assert locate(checkout).data == folder / f"else where/.postgres/{MAJOR}/data"


# ── deaths ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_orphans_of_a_killed_postmaster_are_waited_for(cluster: Cluster) -> None:
    """A backend that computes does not notice that its postmaster is dead, and still writes to shared memory."""
    start(cluster)

    def compute() -> None:
        with pytest.raises(psycopg.OperationalError), psycopg.connect(cluster.url) as connection:
            connection.execute("SELECT count(*) FROM generate_series(1, 100000000)")

    client = threading.Thread(target=compute)
    client.start()
    busy = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT count%' AND state = 'active'"
    while not (backend := _query(cluster, busy) or 0):
        pass
    os.kill(backend, signal.SIGSTOP)  # it lives on for exactly as long as this test wants
    _murder(cluster)
    starter = threading.Thread(target=start, args=[cluster])
    starter.start()
    try:
        log = cluster.log
        assert embedded._until(lambda: log.exists() and "shared memory block" in log.read_text(errors="replace"), 10)
        assert not running(cluster)
    finally:
        os.kill(backend, signal.SIGKILL)
        starter.join()
        client.join()
    assert _starts(cluster)


# What may stand in postmaster.pid: the number has gone to this very test, or to nobody; a full disk cut it off.
STALE = ["{alive}\n{data}\n1\n5432\n{sockets}\n\n1 1\nready   \n", "99999999\n", ""]


def test_server_that_was_killed_or_lost_something_is_replaced_and_the_data_is_there(cluster: Cluster) -> None:
    """Its program lies in an environment, which another Python, or a new lock file, may have made anew."""
    start(cluster)
    _query(cluster, "CREATE TABLE kept AS SELECT 42 AS answer")
    values = {"alive": os.getpid(), "data": cluster.data, "sockets": cluster.sockets}
    options = cluster.data / "postmaster.opts"
    for lost in ("nothing but its life", *STALE, "its socket", "its program"):
        before = postmaster(cluster.data)
        if lost == "its socket":
            (cluster.sockets / ".s.PGSQL.5432").unlink()
        elif lost == "its program":
            options.write_text("/of/another/python" + options.read_text())
        else:
            _murder(cluster)
            if lost in STALE:
                (cluster.data / "postmaster.pid").write_text(lost.format(**values))
                (cluster.sockets / ".s.PGSQL.5432.lock").write_text(f"{os.getpid()}\n")
            assert not stop(cluster), lost
        assert not running(cluster), lost
        start(cluster)
        assert postmaster(cluster.data) != before, lost
        assert _query(cluster, "SELECT answer FROM kept") == 42, lost


def test_copied_folder_knows_no_server_and_a_moved_one_keeps_its_own(folder: Path, stopped: Path) -> None:
    (folder / "a").mkdir()
    subprocess.run(["cp", "-a", stopped, folder / "a"], check=True)
    original = locate(folder / "a")
    start(original)
    subprocess.run(["cp", "-a", folder / "a", folder / "b"], check=True)
    copy = locate(folder / "b")
    assert not running(copy)
    assert not stop(copy)
    assert running(original)
    (folder / "a").rename(folder / "c")
    moved = locate(folder / "c")
    assert running(moved)
    assert stop(moved)


def test_initdb_killed_half_way_is_done_again(folder: Path) -> None:
    cluster = locate(folder)
    unfinished = cluster.data.with_name("initdb")
    starter = _starter(folder, cluster.binaries, start_new_session=True)
    assert embedded._until(lambda: (unfinished / "base").exists(), 20)
    os.killpg(starter.pid, signal.SIGKILL)
    starter.communicate()
    assert unfinished.exists()
    assert not cluster.data.exists()
    assert _starts(cluster)
    assert not unfinished.exists()


@pytest.mark.skipif(not shutil.which("git"), reason="Git is not installed")
def test_git_sees_nothing_of_the_server_but_in_a_folder_that_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = folder / "theirs"
    theirs.mkdir()
    for given, seen in (("deep/in/it", ""), ("theirs", "*")):
        monkeypatch.setenv(embedded.DATA_VARIABLE, str(folder / given))
        start(locate(folder))
        stop(locate(folder))
        status = ["git", "-C", str(folder), "-c", "safe.directory=*", "status", "--porcelain", "-uall"]
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        found = subprocess.run(status, capture_output=True, text=True, check=True).stdout
        assert bool(found) == bool(seen), found
    assert not (theirs / ".gitignore").exists()


def test_why_the_server_does_not_start_is_said_and_a_folder_of_something_else_left_alone(cluster: Cluster) -> None:
    start(cluster)
    stop(cluster)
    with (cluster.data / "postgresql.conf").open("a") as settings:
        settings.write("shared_buffers = nonsense\n")
    with pytest.raises(UnreachableError) as caught:
        start(cluster)
    assert "shared_buffers" in caught.value.where
    assert caught.value.exit_code == 4
    (cluster.data / "PG_VERSION").rename(cluster.data / "was-PG_VERSION")
    with pytest.raises(UnreachableError, match="not empty"):
        start(cluster)
    assert (cluster.data / "base").exists()


# ── sockets ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def awkward(folder: Path) -> Iterator[Cluster]:
    """A cluster whose socket cannot lie beside its data, in a path that is too long."""
    checkout = folder / ("x" * 100)
    checkout.mkdir()
    cluster = locate(checkout)
    yield cluster
    _kill(cluster.data.parent)
    if cluster.sockets.is_symlink():
        cluster.sockets.unlink()
    shutil.rmtree(cluster.sockets, ignore_errors=True)


def test_awkward_path_has_its_socket_in_a_private_folder(awkward: Cluster, folder: Path) -> None:
    """In no link, no other user's (not as root: root's own folder / stands in for it), none that is open to others."""
    (folder / "a,b").mkdir()
    assert awkward.sockets.parent == locate(folder / "a,b").sockets.parent == Path("/tmp")

    def refused(action: Callable[[Cluster], object], cluster: Cluster = awkward) -> None:
        with pytest.raises(UnreachableError, match="not private"):
            action(cluster)

    (folder / "trap").mkdir(mode=0o700)
    awkward.sockets.symlink_to(folder / "trap")
    refused(start)
    awkward.sockets.unlink()
    if ROOT_CASE:
        awkward.sockets.mkdir(mode=0o700)
        os.chown(awkward.sockets, SOMEBODY, SOMEBODY)
        refused(start)
        awkward.sockets.rmdir()
    else:
        refused(start, Cluster(awkward.data, Path("/"), awkward.binaries))
    assert _starts(awkward)
    assert stat.S_IMODE(awkward.sockets.stat().st_mode) == 0o700
    awkward.sockets.chmod(0o777)
    refused(running)
    refused(start)
    awkward.sockets.chmod(0o700)
    assert stop(awkward)


# ── users ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _packages(target: Path) -> Path:
    """Copy what an embedded server needs to a folder that every user can read, and return its binaries."""
    binaries, psutil = locate(PROJECT).binaries, importlib.util.find_spec("psutil")
    assert psutil is not None
    assert psutil.origin is not None
    package = binaries.parents[1]
    sources = [binaries.parent, package.with_name(f"{package.name}.libs"), Path(psutil.origin).parent]
    for source, base in zip(sources, [package.parent, package.parent, sources[2].parent], strict=True):
        if source.exists():
            ignored = shutil.ignore_patterns("include", "*.a", "tests")
            shutil.copytree(source, target / source.relative_to(base), ignore=ignored)
    shutil.copytree(PROJECT / "scripts", target / "scripts")
    subprocess.run(["chmod", "-R", "a+rX", target], check=True)
    return target / binaries.relative_to(package.parent)


def _python_for(uid: int) -> str:
    """Find a Python that this user can run: root's own may lie below /root."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        check = [candidate, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]
        with contextlib.suppress(OSError):
            if subprocess.run(check, user=uid, group=uid, extra_groups=[], cwd="/", check=False).returncode == 0:
                return candidate
    raise AssertionError(f"no Python >= 3.10 that user {uid} can run; looked in /usr/bin and /usr/local/bin")


def test_ordinary_user_runs_it_as_himself(folder: Path) -> None:
    if not ROOT_CASE:
        assert _starts(locate(folder))
        assert locate(folder).user is None
        assert locate(folder).data.stat().st_uid == os.geteuid()
        return
    binaries = _packages(folder / "packages")
    checkout = folder / "checkout"
    checkout.mkdir(mode=0o700)
    os.chown(checkout, SOMEBODY, SOMEBODY)
    environment = {"PATH": os.defpath, "PYTHONPATH": f"{folder}/packages:{folder}/packages/scripts"}
    how = {"user": SOMEBODY, "group": SOMEBODY, "extra_groups": [], "env": environment}
    out, err = _starter(checkout, binaries, executable=_python_for(SOMEBODY), **how).communicate(timeout=60)
    assert err == ""
    with psycopg.connect(out.strip()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert (checkout / f".postgres/{MAJOR}/data").stat().st_uid == SOMEBODY


if ROOT_CASE:

    def test_root_runs_it_in_place_as_an_unprivileged_user_and_nobody_else_can_enter(folder: Path) -> None:
        cluster = locate(folder)
        before = folder.stat()
        start(cluster)
        assert cluster.data == folder / f".postgres/{MAJOR}/data"
        assert embedded._name(cluster.data.stat().st_uid) == embedded.ACCOUNT
        assert (folder.stat().st_mode, folder.stat().st_uid) == (before.st_mode, before.st_uid)
        assert not embedded._stranger_can('test -x "$1"', cluster.sockets)
        assert not embedded._stranger_can('test -w "$1"', cluster.sockets / ".s.PGSQL.5432")
        folder.chmod(0o700)  # the decision stands when the checkout is closed later
        assert locate(folder) == cluster

    def test_unreachable_checkout_has_its_data_elsewhere(folder: Path) -> None:
        """As below /root: neither the data folder nor the package can be reached, and no mode is changed for it."""
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        package = _packages(closed / "packages")
        cluster = locate(closed)
        cluster = Cluster(cluster.data, cluster.sockets, package, cluster.user)
        home = cluster.data.parents[1]
        try:
            assert home.parent == embedded.MACHINE
            assert _starts(cluster)
            assert locate(closed).data == cluster.data
            assert stat.S_IMODE(closed.stat().st_mode) == 0o700
            assert re.fullmatch("binaries-[0-9a-f]{12}", embedded._reachable_binaries(cluster).parents[2].name)
            assert stop(cluster)
        finally:
            _kill(cluster.data.parent)
            shutil.rmtree(home)

    def test_root_does_not_take_over_the_cluster_of_an_ordinary_user(folder: Path) -> None:
        cluster = locate(folder)
        cluster.data.mkdir(parents=True, mode=0o700)
        cluster.data.parent.chmod(0o700)
        os.chown(cluster.data.parent, SOMEBODY, SOMEBODY)
        with pytest.raises(UnreachableError, match="not private") as caught:
            start(cluster)
        assert "nobody" in caught.value.where


# ── machines on which it cannot be ─────────────────────────────────────────────────────────────────────────────────


def test_missing_package_asks_for_a_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "not_installed")
    with pytest.raises(UnreachableError) as caught:
        embedded.locate(folder)
    assert "DATABASE_URL" in caught.value.remedy


def test_folder_that_cannot_be_made_is_a_message(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(UnreachableError) as caught:
        start(Cluster(folder / "file/18/data", folder / "file/18", locate(folder).binaries))
    assert embedded.DATA_VARIABLE in caught.value.remedy


def test_data_is_not_kept_where_others_may_replace_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those of a server used that lies there."""
    shared, checkout = folder / "shared", folder / "checkout"
    checkout.mkdir()
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv(embedded.DATA_VARIABLE, str(shared / "data"))
    with pytest.raises(UnreachableError, match="replace") as caught:
        locate(checkout)
    assert str(shared) in caught.value.where
    shared.chmod(0o1777)
    locate(checkout)
