"""scripts/inv, run as users run it: in a checkout (its path has a space) whose lock files name two tiny packages."""

from __future__ import annotations

import ast
import grp
import hashlib
import json
import os
import pwd
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
# In place of Invoke: what scripts/as_invoke.py imports.
STAND_IN = {
    "config": "class Config: pass",
    "exceptions": "class Exit(Exception): pass",
    "program": """
import json, os, sys
class Program:
    def run(self, words):
        if 'broken' in words:
            raise SystemExit(1) from ImportError('of a task')
        told = {'words': words[1:], 'cwd': os.getcwd(), 'prefix': sys.prefix, 'as': sys._xoptions['ran_as']}
        print(json.dumps(told))""",
    "main": "from invoke.program import Program; program = Program()",
}


@dataclass(frozen=True)
class Checkout:
    """A folder with scripts/inv, its two lock files, and perhaps .venv."""

    folder: Path

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin/python"

    def popen(self, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "BUDGET_ENGINE_VENV"}
        command = [sys.executable, str(self.folder / "scripts/inv"), *words]
        return subprocess.Popen(
            command,
            env={**environment, **variables},
            cwd=cwd,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def inv(self, *words: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
        process = self.popen(*words, cwd=cwd, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def done(self, *words: str, cwd: Path | None = None, **variables: str) -> tuple[str, str]:
        code, out, err = self.inv(*words, cwd=cwd, **variables)
        assert code == 0, err
        return out, err

    def has(self, module: str) -> bool:
        command = [str(self.python), "-I", "-c", f"import {module}"]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


def assert_refused(done: tuple[int, str, str], *words: str) -> None:
    code, out, err = done
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    for word in words:
        assert word in err


def _wheel(folder: Path, name: str, **modules: str) -> str:
    """Build a package, and return its line in a lock file."""
    file, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        for module, source in modules.items():
            wheel.writestr(f"{name}/{module}.py", source)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A fresh checkout; copied, never run in."""
    folder = tmp_path_factory.mktemp("inv") / "my checkout"
    wheels = folder / "wheels"
    shutil.copytree(PROJECT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    wheels.mkdir()
    offline = f'--no-index\n--find-links "{wheels.as_uri()}"\n'.replace('"', "")
    (folder / "requirements.txt").write_text(offline + _wheel(wheels, "invoke", **STAND_IN))
    (folder / "requirements-dev.txt").write_text(offline + _wheel(wheels, "devtool"))
    return Checkout(folder)


@pytest.fixture(scope="module")
def installed(empty: Checkout, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, str, str]:
    """A checkout after its first run, and what that run wrote; copied, never changed."""
    checkout = _copy(empty, tmp_path_factory.mktemp("installed"))
    out, err = checkout.done("setup", "--flag", cwd=Path("/"))
    return checkout, out, err


def _copy(checkout: Checkout, target: Path) -> Checkout:
    return Checkout(Path(shutil.copytree(checkout.folder, target / checkout.folder.name, symlinks=True)))


@pytest.fixture
def fresh(empty: Checkout, tmp_path: Path) -> Checkout:
    return _copy(empty, tmp_path)


@pytest.fixture
def ready(installed: tuple[Checkout, str, str], tmp_path: Path) -> Checkout:
    return _copy(installed[0], tmp_path)


# ── the usual life ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_first_run_installs_says_so_on_stderr_and_hands_over(installed: tuple[Checkout, str, str]) -> None:
    checkout, out, err = installed
    assert [line.split()[1] for line in err.splitlines()] == ["installing", "installed"]
    words = ["--search-root", str(checkout.folder), "setup", "--flag"]
    spelled = f"{Path(sys.executable).name} '{checkout.folder}/scripts/inv'"  # as a shell takes it: there is a blank
    assert json.loads(out) == {"words": words, "cwd": "/", "prefix": str(checkout.venv), "as": spelled}
    assert not checkout.has("devtool")


def test_second_run_is_silent_and_fast(ready: Checkout) -> None:
    began = time.perf_counter()
    out, err = ready.done("setup")
    assert time.perf_counter() - began < 1
    assert err == ""
    assert json.loads(out)["words"][2:] == ["setup"]


def test_dev_requirements_come_with_the_first_task_that_needs_them(ready: Checkout) -> None:
    assert "requirements-dev.txt" in ready.inv("setup", "lint")[2]
    assert ready.has("devtool")
    for word in ("test", "lint", "bench", "setup"):
        assert ready.inv(word)[2] == ""


def test_changed_lock_file_is_installed_once(ready: Checkout) -> None:
    with (ready.folder / "requirements.txt").open("a") as lock:
        lock.write("# changed\n")
    assert "installing requirements.txt" in ready.inv("setup")[2]
    assert ready.inv("setup")[2] == ""


def test_other_pythons_paths_do_not_matter(ready: Checkout, tmp_path: Path) -> None:
    (tmp_path / "invoke").mkdir()
    (tmp_path / "invoke/main.py").write_text("print('the wrong one')")
    out, err = ready.done("setup", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert err == ""
    assert json.loads(out)["cwd"] == str(tmp_path)


def test_four_first_runs_at_once_all_succeed_also_elsewhere(fresh: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where" / "venv"
    processes = [fresh.popen("setup", BUDGET_ENGINE_VENV=str(elsewhere)) for _ in range(4)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("installing" in err for _, err in outputs) == 1
    assert {json.loads(out)["prefix"] for out, _ in outputs} == {str(elsewhere)}
    assert not fresh.venv.exists()


# ── the user's settings of pip ──────────────────────────────────────────────────────────────────────────────────────

ELSEWHERE = {
    "target": "elsewhere",
    "root": "elsewhere",
    "user": "yes",
    "python": "/nowhere/python",
    "dry-run": "1",
    "quiet": "3",
    "no-binary": ":all:",
    "constraint": "elsewhere/constraints.txt",
}


PLACES = {
    "PIP_CONFIG_FILE": ("my.conf", "global"),
    "XDG_CONFIG_HOME": ("pip/pip.conf", "install"),
    "site": ("my checkout/.venv/pip.conf", "global"),
}


@pytest.mark.parametrize("where", [*ELSEWHERE, *PLACES])
def test_setting_that_leads_pip_elsewhere_does_not_matter(ready: Checkout, tmp_path: Path, where: str) -> None:
    """A variable, or a file with several."""
    there = tmp_path / "elsewhere"
    there.mkdir()
    (there / "constraints.txt").write_text("devtool==2.0\n")
    variables = {"PYTHONUSERBASE": str(there)}
    if where in ELSEWHERE:
        variables[f"PIP_{where.upper().replace('-', '_')}"] = ELSEWHERE[where]
    else:
        name, section = PLACES[where]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        options = [f"{name} = {value}\n" for name, value in ELSEWHERE.items() if name not in ("root", "user")]
        (tmp_path / name).write_text(f"[{section}]\n" + "".join(options))
        variables[where] = str(tmp_path if where == "XDG_CONFIG_HOME" else tmp_path / name)
    ready.done("lint", cwd=tmp_path, **variables)
    assert ready.has("devtool")
    assert [entry.name for entry in there.iterdir()] == ["constraints.txt"]


def test_file_that_leads_pip_to_a_mirror_counts(ready: Checkout, tmp_path: Path) -> None:
    """From the home folder, as ~ and as what lies in it; several lines; the section of pip install wins."""
    lock = ready.folder / "requirements-dev.txt"
    lock.write_text(lock.read_text().splitlines()[-1] + "\n")
    (tmp_path / "mirror").symlink_to(ready.folder / "wheels")
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / ".config/pip/pip.conf").write_text(
        "[global]\nfind-links = /nowhere\n[install]\nno-index = true\nfind-links =\n    /nowhere\n    ~/mirror\n"
    )
    ready.done("lint", cwd=tmp_path, HOME=str(tmp_path), PIP_FIND_LINKS="", XDG_CONFIG_HOME="")
    assert ready.has("devtool")


def test_what_counts_for_pip_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "my.conf").write_text(
        "[global]\nindex-url = https://one.example/simple\nextra-index-url =\n  https://u:p%40@two.example\n"
        "  https://three.example\ntimeout = 1\ncert = ca.pem\ntarget = elsewhere\nproxy = h:1\nretries = 7\n"
        "[install]\ntimeout = 2\nproxy = h:2\n[download]\nclient-cert = never.pem\n"
    )
    given = {"CONFIG_FILE": str(tmp_path / "my.conf"), "PROXY": "h:3", "RETRIES": "", "PREFIX": "elsewhere"}
    for name, value in given.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    environment = runpy.run_path(str(PROJECT / "scripts/inv"))["pip_environment"](sys.executable)
    assert environment["PIP_EXTRA_INDEX_URL"].split() == ["https://u:p%40@two.example", "https://three.example"]
    assert {name[4:]: value for name, value in environment.items() if name.startswith("PIP_")} == {
        "CONFIG_FILE": os.devnull,
        "ROOT_USER_ACTION": "ignore",
        "DISABLE_PIP_VERSION_CHECK": "1",
        "INDEX_URL": "https://one.example/simple",
        "EXTRA_INDEX_URL": environment["PIP_EXTRA_INDEX_URL"],
        "CERT": "ca.pem",
        "TIMEOUT": "2",
        "PROXY": "h:3",
        "RETRIES": "7",
    }


def test_settings_that_pip_cannot_read_are_named(ready: Checkout, tmp_path: Path) -> None:
    (tmp_path / "my.conf").write_text("nonsense\n")
    assert_refused(ready.inv("lint", PIP_CONFIG_FILE=str(tmp_path / "my.conf")), str(tmp_path / "my.conf"))


# ── broken environments ────────────────────────────────────────────────────────────────────────────────────────────


def _packages(checkout: Checkout) -> Path:
    [found] = checkout.venv.glob("lib/python*/site-packages")
    return found


def _replace_interpreters(checkout: Checkout, text: str) -> None:
    """By a script; "": by links that lead nowhere."""
    for link in (checkout.venv / "bin").glob("python*"):
        link.unlink()
        if text:
            link.write_text(text)
            link.chmod(0o755)
        else:
            link.symlink_to("/nowhere/python3")


def _stamp_of_another_python(checkout: Checkout) -> None:
    stamp = checkout.venv / ".inv-stamp"
    stamp.write_text(stamp.read_text().replace("cpython-3", "cpython-2"))


BREAKAGES: dict[str, Callable[[Checkout], object]] = {
    "no library": lambda checkout: shutil.rmtree(checkout.venv / "lib"),
    "no file of Invoke": lambda checkout: (_packages(checkout) / "invoke/main.py").unlink(),
    "an interpreter that does not run": lambda checkout: _replace_interpreters(checkout, "#!/bin/sh\nexit 127\n"),
}
OTHERS: dict[str, Callable[[Checkout], object]] = {
    "no pyvenv.cfg": lambda checkout: (checkout.venv / "pyvenv.cfg").unlink(),
    "no interpreter": lambda checkout: _replace_interpreters(checkout, ""),
    "another Python's": _stamp_of_another_python,
}


@pytest.mark.parametrize("broken", OTHERS)
def test_broken_environment_is_known_as_such(ready: Checkout, broken: str) -> None:
    OTHERS[broken](ready)
    inv = runpy.run_path(str(ready.folder / "scripts/inv"))
    assert not inv["installed"](["requirements.txt"])
    finished = any(line.endswith(inv["TAG"]) for line in inv["stamped"]())
    assert not (finished and inv["usable"]())


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKAGES)
def test_broken_environment_is_made_anew(ready: Checkout, broken: str) -> None:
    left_over = ready.venv / "left-over"
    left_over.touch()
    BREAKAGES[broken](ready)
    out, _ = ready.done("setup", cwd=Path("/"))
    told = json.loads(out)
    words = ["--search-root", str(ready.folder), "setup"]
    assert (told["words"], told["cwd"], told["prefix"]) == (words, "/", str(ready.venv))
    assert not left_over.exists()
    assert ready.inv("setup")[2] == ""


def test_environment_in_which_a_task_misses_a_package_is_looked_at_by_the_next_run(ready: Checkout) -> None:
    assert ready.inv("broken")[0] == 1
    assert "installing" in ready.inv("setup")[2]
    assert ready.inv("setup")[2] == ""


def test_environment_that_is_run_by_its_own_python_is_made_anew(ready: Checkout) -> None:
    """`source .venv/bin/activate; python scripts/inv`."""
    shutil.rmtree(_packages(ready) / "invoke")
    command = [str(ready.python), str(ready.folder / "scripts/inv"), "setup"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ready.inv("setup")[2] == ""


def test_users_own_environment_that_cannot_be_completed_is_left_alone(fresh: Checkout) -> None:
    """Its pip says yes, and does nothing."""
    subprocess.run([sys.executable, "-m", "venv", fresh.venv], check=True)
    shutil.rmtree(_packages(fresh) / "pip")
    (_packages(fresh) / "pip").mkdir()
    for module in ("__init__", "__main__"):
        (_packages(fresh) / f"pip/{module}.py").touch()
    assert_refused(fresh.inv("setup"), "pip says that requirements.txt is installed, but", "BUDGET_ENGINE_VENV")
    assert not (fresh.venv / ".inv-stamp").exists()
    assert fresh.python.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_broken_environment_that_cannot_be_written_is_a_message(ready: Checkout) -> None:
    (_packages(ready) / "invoke/main.py").unlink()
    ready.venv.chmod(0o500)
    done = ready.inv("setup")
    ready.venv.chmod(0o700)
    assert_refused(done, str(ready.venv))


@pytest.mark.skipif(not shutil.which("git"), reason="Git is not installed")
def test_git_sees_nothing_of_the_environment(ready: Checkout) -> None:
    subprocess.run(["git", "init", "-q", ready.folder], check=True)
    command = ["git", "-C", str(ready.folder), "status", "--porcelain", "-uall"]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "requirements.txt" in seen
    assert ".venv" not in seen


def _interrupt(checkout: Checkout, number: signal.Signals) -> tuple[int, str]:
    process = checkout.popen("setup")
    while not checkout.python.exists():
        assert process.poll() is None
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def test_killed_installation_is_taken_up_again(fresh: Checkout) -> None:
    assert _interrupt(fresh, signal.SIGKILL)[0] == -signal.SIGKILL
    fresh.done("setup")


def test_ctrl_c_is_one_line(fresh: Checkout) -> None:
    code, err = _interrupt(fresh, signal.SIGINT)
    assert code == 130
    assert [line.split()[1] for line in err.splitlines()] == ["installing", "interrupted;"]
    assert not (fresh.venv / ".inv-stamp").exists()


@pytest.mark.slow
def test_users_own_environment_is_completed_not_replaced(fresh: Checkout) -> None:
    subprocess.run([sys.executable, "-m", "venv", fresh.venv], check=True)
    (fresh.venv / ".gitignore").write_text("lib\n")
    fresh.done("setup")
    _stamp_of_another_python(fresh)
    (_packages(fresh) / "invoke/main.py").unlink()
    fresh.done("setup")
    assert (fresh.venv / ".gitignore").read_text() == "lib\n"


def test_folder_that_is_no_environment_is_left_alone(fresh: Checkout) -> None:
    fresh.venv.mkdir()
    (fresh.venv / "thesis.txt").touch()
    assert_refused(fresh.inv("setup"), "BUDGET_ENGINE_VENV")
    assert (fresh.venv / "thesis.txt").exists()


# ── messages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_that_cannot_be_written_names_the_variable(fresh: Checkout) -> None:
    nowhere = fresh.folder / "requirements.txt" / "venv"
    assert_refused(fresh.inv("setup", BUDGET_ENGINE_VENV=str(nowhere)), str(nowhere), "set BUDGET_ENGINE_VENV")


def test_failure_of_pip_shows_why(ready: Checkout) -> None:
    lock = ready.folder / "requirements-dev.txt"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:0")[:-2] + "\n")
    assert_refused(ready.inv("lint"), "DO NOT MATCH", "proxy")


def test_python_without_ensurepip_names_the_package(fresh: Checkout, tmp_path: Path) -> None:
    """Debian's python3 without python3-venv: a standard library that lacks one package."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library = Path(os.__file__).parent
    (tmp_path / "home/lib" / version).mkdir(parents=True)
    for entry in library.iterdir():
        if entry.name not in {"ensurepip", "__pycache__"}:
            (tmp_path / "home/lib" / version / entry.name).symlink_to(entry)
    assert_refused(fresh.inv("setup", PYTHONHOME=str(tmp_path / "home")), f"apt install {version}-venv")


def test_too_old_pythons_get_a_sentence() -> None:
    """Where this machine has none, that each could parse it must do."""
    ast.parse((PROJECT / "scripts/inv").read_text(), feature_version=(3, 6))
    found = [path for minor in range(6, 10) if (path := shutil.which(f"python3.{minor}"))]
    found += [str(path) for path in Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python")]
    for python in found:
        done = subprocess.run([python, PROJECT / "scripts/inv", "setup"], capture_output=True, text=True, check=False)
        if "pyenv:" not in done.stderr:  # a shim of a version that is not selected
            assert_refused((done.returncode, done.stdout, done.stderr), "needs Python 3.10")


# ── whose environment it is ────────────────────────────────────────────────────────────────────────────────────────

STRANGER = 54321


def elsewhere(checkout: Checkout, place: Path) -> str:
    """Move the environment there, as if it had been made there: its stamp says that all is installed."""
    shutil.copytree(checkout.venv, place, symlinks=True)
    return str(place)


def forged(place: Path) -> Path:
    """Have its Python leave a mark, should it be run."""
    ran = place / "ran"
    python = place / "bin/python"
    python.unlink()
    python.write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    python.chmod(0o755)
    return ran


def shared(place: Path) -> None:
    os.chown(place, -1, STRANGER)
    place.chmod(0o775)


OPEN: dict[str, Callable[[Path], None]] = {
    "others may write to it": lambda place: place.chmod(0o777),
    "others may write to its programs": lambda place: (place / "bin").chmod(0o777),
    "others may replace it": lambda place: place.parent.chmod(0o777),
    "sticky, but itself": lambda place: place.chmod(0o1777),
}
GIVEN_AWAY: dict[str, Callable[[Path], None]] = {
    "its group may write to it": shared,
    "it is another's": lambda place: os.chown(place, STRANGER, STRANGER),
    "the folder above is another's": lambda place: os.chown(place.parent, STRANGER, STRANGER),
}
BY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")


@pytest.mark.parametrize(
    "opened",
    [
        *(pytest.param(opened, id=how) for how, opened in OPEN.items()),
        *(pytest.param(opened, id=how, marks=BY_ROOT) for how, opened in GIVEN_AWAY.items()),
    ],
)
def test_environment_that_others_may_write_is_not_run(
    ready: Checkout, tmp_path: Path, opened: Callable[[Path], None]
) -> None:
    place = tmp_path / "above/environment"
    venv = elsewhere(ready, place)
    ready.done("setup", BUDGET_ENGINE_VENV=venv)
    ran = forged(place)
    opened(place)
    assert_refused(ready.inv("setup", BUDGET_ENGINE_VENV=venv), f"what lies in {place} is not run")
    assert not ran.exists()


@BY_ROOT
def test_link_of_another_is_not_followed(ready: Checkout, tmp_path: Path) -> None:
    place, links = tmp_path / "environment", tmp_path / "links"
    elsewhere(ready, place)
    links.mkdir()
    (links / "environment").symlink_to(place)
    os.chown(links, STRANGER, STRANGER)
    assert_refused(ready.inv("setup", BUDGET_ENGINE_VENV=str(links / "environment")), f"{links} belongs to another")


@BY_ROOT
def test_checkout_of_another_is_trusted_as_its_scripts_are(ready: Checkout, tmp_path: Path) -> None:
    """As in a container of a CI: the checkout is the runner's, and root works in it."""
    for path in (ready.folder, *ready.folder.rglob("*")):
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    ready.done("setup", PYTHONSAFEPATH="1")
    os.chown(tmp_path, STRANGER, STRANGER)
    ready.done("setup")
    ready.folder.chmod(0o777)  # as on mounts that know no modes
    ready.venv.chmod(0o777)
    ready.done("setup")


def test_under_any_umask_nobody_else_may_write_to_the_environment(fresh: Checkout) -> None:
    before = os.umask(0)
    try:
        fresh.done("setup")
        fresh.done("setup")
    finally:
        os.umask(before)
    paths = [path for path in (fresh.venv, *fresh.venv.rglob("*")) if not path.is_symlink()]
    assert [path for path in paths if path.stat().st_mode & 0o022] == []


def test_group_of_the_user_alone_may_write(ready: Checkout, tmp_path: Path) -> None:
    """As with umask 002 on systems that make a group for each user."""
    place = tmp_path / "above/environment"
    venv = elsewhere(ready, place)
    for folder in (place, place.parent):
        folder.chmod(0o775)
    owner, group = pwd.getpwuid(place.stat().st_uid), grp.getgrgid(place.stat().st_gid)
    if owner.pw_name == group.gr_name:
        ready.done("setup", BUDGET_ENGINE_VENV=venv)
    else:
        assert_refused(ready.inv("setup", BUDGET_ENGINE_VENV=venv), "others may write")
