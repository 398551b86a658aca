"""scripts/inv, run as users run it: in a checkout (its path has a space) whose lock files name two tiny packages."""

from __future__ import annotations

import ast
import grp
import json
import os
import pwd
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import once, wheel

Process = subprocess.Popen[str]
PROJECT = Path(__file__).resolve().parent.parent
# In place of Invoke: what scripts/as_invoke.py imports.
STAND_IN = {
    "config.py": "class Config: pass",
    "exceptions.py": "class Exit(Exception): pass",
    "program.py": """
import json, os, sys
class Program:
    def run(self, words):
        if 'broken' in words:
            raise SystemExit(1) from ImportError('of a task')
        told = {'words': words[1:], 'cwd': os.getcwd(), 'prefix': sys.prefix, 'as': sys._xoptions['ran_as']}
        print(json.dumps(told))""",
    "main.py": "from invoke.program import Program; program = Program()",
}
# In place of `python -m venv`, which takes 3 s: an environment with pip alone, of the files of another one.
COPY = """
import os, shutil, sys
_, source, target = sys.argv
ignored = shutil.ignore_patterns(".*", "invoke*")
shutil.copytree(source, target, symlinks=True, copy_function=os.link, ignore=ignored, dirs_exist_ok=True)
"""


@dataclass(frozen=True)
class Checkout:
    """A folder with scripts/inv, its two lock files, and perhaps .venv."""

    folder: Path

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    @property
    def packages(self) -> Path:
        [found] = self.venv.glob("lib/python*/site-packages")
        return found

    def popen(self, *words: str, by: object = sys.executable, cwd: Path | None = None, **variables: str) -> Process:
        environment = {name: value for name, value in os.environ.items() if name != "BUDGET_ENGINE_VENV"} | variables
        command = [str(by), str(self.folder / "scripts/inv"), *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=cwd, env=environment, text=True, start_new_session=True, stdout=pipe, stderr=pipe
        )

    def inv(self, *words: str, **how: Any) -> tuple[int, str, str]:
        process = self.popen(*words, **how)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def done(self, *words: str, **how: Any) -> tuple[str, str]:
        code, out, err = self.inv(*words, **how)
        assert code == 0, err
        return out, err


def assert_refused(done: tuple[int, str, str], *words: str) -> None:
    code, out, err = done
    assert (code, out) == (1, "")
    assert [word for word in words if word not in err] == []
    assert "Traceback" not in err


def _fill(folder: Path) -> None:
    """Make a checkout, and do its first run: four at once, of somebody who lets everybody write to what he makes."""
    wheels = folder / "wheels"
    shutil.copytree(PROJECT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    wheels.mkdir()
    offline = f'--no-index\n--find-links "{wheels.as_uri()}"\n'.replace('"', "")
    (folder / "requirements.txt").write_text(offline + wheel(wheels, "invoke", STAND_IN))
    (folder / "requirements-dev.txt").write_text(offline + wheel(wheels, "devtool", {}))
    before = os.umask(0)
    try:
        processes = [Checkout(folder).popen("setup", "--flag", cwd=Path("/")) for _ in range(4)]
    finally:
        os.umask(before)
    runs = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    (folder / "runs.json").write_text(json.dumps(runs))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout after its first run; copied, never changed."""
    return Checkout(once(tmp_path_factory, "my checkout", _fill))


def _copied(source: Path, target: Path, *left_out: str) -> Path:
    """Copy a folder; the files of packages, which nobody writes to in place, by links."""

    def copy(file: str, other: str) -> None:
        (os.link if "site-packages" in file else shutil.copy2)(file, other)

    return Path(
        shutil.copytree(source, target, symlinks=True, copy_function=copy, ignore=shutil.ignore_patterns(*left_out))
    )


@pytest.fixture
def fresh(installed: Checkout, tmp_path: Path) -> Checkout:
    """A checkout in which nobody has run anything."""
    return Checkout(_copied(installed.folder, tmp_path / "my checkout", ".venv", "__pycache__"))


@pytest.fixture
def ready(installed: Checkout, tmp_path: Path) -> Checkout:
    """One after its first run: where its environment is made anew, that is quick (see COPY)."""
    checkout = Checkout(_copied(installed.folder, tmp_path / "my checkout"))
    _have_environments_copied(checkout, installed)
    return checkout


def _have_environments_copied(checkout: Checkout, source: Checkout) -> None:
    script = checkout.folder / "scripts/inv"
    text, made = script.read_text(), '"-m", "venv", str(VENV)'
    assert made in text
    script.write_text(text.replace(made, f'"-c", {COPY!r}, {str(source.venv)!r}, str(VENV)'))


# ── the usual life ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_first_runs_at_once_install_once_say_so_on_stderr_and_hand_over(installed: Checkout) -> None:
    words = ["--search-root", str(installed.folder), "setup", "--flag"]
    spelled = f"{Path(sys.executable).name} '{installed.folder}/scripts/inv'"  # as a shell takes it: there is a blank
    told = {"words": words, "cwd": "/", "prefix": str(installed.venv), "as": spelled}
    runs = json.loads((installed.folder / "runs.json").read_text())
    assert [(json.loads(out), code) for out, _, code in runs] == [(told, 0)] * 4
    said = sorted([line.split()[1] for line in err.splitlines()] for _, err, _ in runs)
    assert said == [[], [], [], ["installing", "installed"]]
    assert not (installed.packages / "devtool").exists()
    assert (installed.venv / ".gitignore").read_text() == "*\n"


def test_under_any_umask_nobody_else_may_write_to_the_environment(installed: Checkout) -> None:
    paths = [path for path in (installed.venv, *installed.venv.rglob("*")) if not path.is_symlink()]
    assert [path for path in paths if path.stat().st_mode & 0o022] == []


def test_second_run_is_silent_and_fast_and_other_pythons_paths_do_not_matter(ready: Checkout, tmp_path: Path) -> None:
    (tmp_path / "invoke").mkdir()
    (tmp_path / "invoke/main.py").write_text("print('the wrong one')")
    began = time.perf_counter()
    out, err = ready.done("setup", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert time.perf_counter() - began < 1
    assert err == ""
    assert (json.loads(out)["words"][2:], json.loads(out)["cwd"]) == (["setup"], str(tmp_path))


def test_changed_lock_file_is_installed_once(ready: Checkout) -> None:
    with (ready.folder / "requirements.txt").open("a") as lock:
        lock.write("# changed\n")
    assert "installing requirements.txt" in ready.inv("setup")[2]
    assert ready.inv("setup")[2] == ""


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
IN_A_FILE = "".join(f"{name} = {value}\n" for name, value in ELSEWHERE.items() if name not in ("root", "user"))


def test_dev_requirements_come_with_the_first_task_that_needs_them_wherever_settings_lead_pip(
    ready: Checkout, tmp_path: Path
) -> None:
    """Variables and files at once: each that counted would make it fail. A mirror does count.

    It stands in the home folder, as ~ and as what lies in it, in several lines; the section of pip install wins.
    """
    there = tmp_path / "elsewhere"
    there.mkdir()
    (there / "constraints.txt").write_text("devtool==2.0\n")
    (ready.venv / "pip.conf").write_text(f"[global]\n{IN_A_FILE}")
    lock = ready.folder / "requirements-dev.txt"
    lock.write_text(lock.read_text().splitlines()[-1] + "\n")
    (tmp_path / "mirror").symlink_to(ready.folder / "wheels")
    (tmp_path / ".config/pip").mkdir(parents=True)
    mirror = "no-index = true\nfind-links =\n    /nowhere\n    ~/mirror\n"
    (tmp_path / ".config/pip/pip.conf").write_text(f"[global]\nfind-links = /nowhere\n[install]\n{IN_A_FILE}{mirror}")
    variables = {f"PIP_{name.upper().replace('-', '_')}": value for name, value in ELSEWHERE.items()}
    variables |= {"PYTHONUSERBASE": str(there), "HOME": str(tmp_path), "PIP_FIND_LINKS": "", "XDG_CONFIG_HOME": ""}
    _, err = ready.done("setup", "lint", cwd=tmp_path, **variables)
    assert "requirements-dev.txt" in err
    assert (ready.packages / "devtool").exists()
    assert [entry.name for entry in there.iterdir()] == ["constraints.txt"]
    for word in ("test", "lint", "bench", "setup"):
        assert ready.inv(word)[2] == ""


def test_what_counts_for_pip_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "my.conf").write_text(
        f"[global]\n{IN_A_FILE}index-url = https://one.example/simple\nextra-index-url =\n"
        "  https://u:p%40@two.example\n  https://three.example\ntimeout = 1\ncert = ca.pem\nproxy = h:1\nretries = 7\n"
        "[install]\ntimeout = 2\nproxy = h:2\n[download]\nclient-cert = never.pem\n"
    )
    given = {"CONFIG_FILE": str(tmp_path / "my.conf"), "PROXY": "h:3", "RETRIES": "", "PREFIX": "elsewhere"}
    given |= {name.upper().replace("-", "_"): value for name, value in ELSEWHERE.items() if name != "user"}
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


def _replace_interpreters(venv: Path, text: str) -> None:
    """By a script; "": by links that lead nowhere."""
    for link in (venv / "bin").glob("python*"):
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
    "no pyvenv.cfg": lambda checkout: (checkout.venv / "pyvenv.cfg").unlink(),
    "no interpreter": lambda checkout: _replace_interpreters(checkout.venv, ""),
    "another Python's": _stamp_of_another_python,
}


@pytest.mark.parametrize("broken", BREAKAGES)
def test_broken_environment_is_known_as_such(ready: Checkout, broken: str) -> None:
    BREAKAGES[broken](ready)
    inv = runpy.run_path(str(ready.folder / "scripts/inv"))
    assert not inv["installed"](["requirements.txt"])
    finished = any(line.endswith(inv["TAG"]) for line in inv["stamped"]())
    assert not (finished and inv["usable"]())


@pytest.mark.parametrize("broken", ["no file of Invoke", "an interpreter that does not run"])
def test_broken_environment_is_made_anew(ready: Checkout, broken: str) -> None:
    """Also where its own Python runs us: `source .venv/bin/activate; python scripts/inv`."""
    left_over = ready.venv / "left-over"
    left_over.touch()
    if broken == "no file of Invoke":
        (ready.packages / "invoke/main.py").unlink()
        out, _ = ready.done("setup", cwd=Path("/"), by=ready.venv / "bin/python")
    else:
        _replace_interpreters(ready.venv, "#!/bin/sh\nexit 127\n")
        out, _ = ready.done("setup", cwd=Path("/"))
    told = json.loads(out)
    words = ["--search-root", str(ready.folder), "setup"]
    assert (told["words"], told["cwd"], told["prefix"]) == (words, "/", str(ready.venv))
    assert not left_over.exists()
    assert ready.inv("setup")[2] == ""


def test_environment_in_which_a_task_misses_a_package_is_looked_at_by_the_next_run(ready: Checkout) -> None:
    assert ready.inv("broken")[0] == 1
    assert not (ready.venv / ".inv-stamp").exists()


def test_users_own_environment_that_cannot_be_completed_is_left_alone(fresh: Checkout, installed: Checkout) -> None:
    """Its pip says yes, and does nothing."""
    _copied(installed.venv, fresh.venv, ".*", "invoke*")
    shutil.rmtree(fresh.packages / "pip")
    (fresh.packages / "pip").mkdir()
    for module in ("__init__", "__main__"):
        (fresh.packages / f"pip/{module}.py").touch()
    assert_refused(fresh.inv("setup"), "pip says that requirements.txt is installed, but", "BUDGET_ENGINE_VENV")
    assert not (fresh.venv / ".inv-stamp").exists()
    assert (fresh.venv / "bin/python").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_broken_environment_that_cannot_be_written_is_a_message(ready: Checkout) -> None:
    (ready.packages / "invoke/main.py").unlink()
    ready.venv.chmod(0o500)
    done = ready.inv("setup")
    ready.venv.chmod(0o700)
    assert_refused(done, str(ready.venv))


def _interrupt(checkout: Checkout, number: signal.Signals, venv: Path) -> tuple[int, str]:
    process = checkout.popen("setup", BUDGET_ENGINE_VENV=str(venv))
    while not (venv / "bin/python").exists():
        assert process.poll() is None
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def test_killed_installation_is_taken_up_again_also_elsewhere(
    fresh: Checkout, installed: Checkout, tmp_path: Path
) -> None:
    venv = tmp_path / "else where" / "venv"
    assert _interrupt(fresh, signal.SIGKILL, venv)[0] == -signal.SIGKILL
    _have_environments_copied(fresh, installed)
    out, err = fresh.done("setup", BUDGET_ENGINE_VENV=str(venv))
    assert "installing" in err
    assert json.loads(out)["prefix"] == str(venv)
    assert not fresh.venv.exists()


def test_ctrl_c_is_one_line(fresh: Checkout) -> None:
    code, err = _interrupt(fresh, signal.SIGINT, fresh.venv)
    assert code == 130
    assert [line.split()[1] for line in err.splitlines()] == ["installing", "interrupted;"]
    assert not (fresh.venv / ".inv-stamp").exists()


def test_users_own_environment_is_completed_not_replaced(ready: Checkout) -> None:
    (ready.venv / ".made-by-inv").unlink()
    (ready.venv / ".gitignore").write_text("lib\n")
    _stamp_of_another_python(ready)
    (ready.packages / "invoke/main.py").unlink()
    ready.done("setup")
    assert (ready.venv / ".gitignore").read_text() == "lib\n"


def test_folder_that_is_no_environment_is_left_alone(fresh: Checkout) -> None:
    fresh.venv.mkdir()
    (fresh.venv / "thesis.txt").touch()
    assert_refused(fresh.inv("setup"), "BUDGET_ENGINE_VENV")
    assert (fresh.venv / "thesis.txt").exists()


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


BY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
# What is done to which folder: its mode, owner and group.
OPEN = {
    "others may write to it": ("", 0o777, -1, -1),
    "others may write to its programs": ("bin", 0o777, -1, -1),
    "others may replace it": ("..", 0o777, -1, -1),
    "sticky, but itself": ("", 0o1777, -1, -1),
}
GIVEN_AWAY = {
    "its group may write to it": ("", 0o775, -1, STRANGER),
    "it is another's": ("", 0o755, STRANGER, STRANGER),
    "the folder above is another's": ("..", 0o755, STRANGER, STRANGER),
}


@pytest.mark.parametrize("opened", [OPEN, pytest.param(GIVEN_AWAY, marks=BY_ROOT)], ids=["by its mode", "given away"])
def test_environment_that_others_may_write_is_not_run(
    ready: Checkout, tmp_path: Path, opened: dict[str, tuple[str, int, int, int]]
) -> None:
    place = tmp_path / "above/environment"
    venv = str(_copied(ready.venv, place))
    ready.done("setup", BUDGET_ENGINE_VENV=venv)
    ran = place / "ran"
    _replace_interpreters(place, f"#!/bin/sh\ntouch '{ran}'\n")
    for how, (folder, mode, owner, group) in opened.items():
        path = place / folder
        before = path.stat()
        os.chown(path, owner, group)
        path.chmod(mode)
        done = ready.inv("setup", BUDGET_ENGINE_VENV=venv)
        assert f"what lies in {place} is not run" in done[2], how
        assert_refused(done)
        assert not ran.exists(), how
        os.chown(path, before.st_uid, before.st_gid)
        path.chmod(before.st_mode)


@BY_ROOT
def test_link_of_another_is_not_followed(ready: Checkout, tmp_path: Path) -> None:
    place, links = tmp_path / "environment", tmp_path / "links"
    _copied(ready.venv, place)
    links.mkdir()
    (links / "environment").symlink_to(place)
    os.chown(links, STRANGER, STRANGER)
    assert_refused(ready.inv("setup", BUDGET_ENGINE_VENV=str(links / "environment")), f"{links} belongs to another")


@BY_ROOT
def test_checkout_of_another_is_trusted_as_its_scripts_are(ready: Checkout, tmp_path: Path) -> None:
    """As in a container of a CI: the checkout is the runner's, and root works in it."""
    for folder in (ready.folder, *ready.folder.rglob("*/")):
        os.chown(folder, STRANGER, STRANGER, follow_symlinks=False)
    ready.done("setup", PYTHONSAFEPATH="1")
    os.chown(tmp_path, STRANGER, STRANGER)
    ready.done("setup")
    ready.folder.chmod(0o777)  # as on mounts that know no modes
    ready.venv.chmod(0o777)
    ready.done("setup")


def test_group_of_the_user_alone_may_write(ready: Checkout, tmp_path: Path) -> None:
    """As with umask 002 on systems that make a group for each user."""
    place = tmp_path / "above/environment"
    venv = str(_copied(ready.venv, place))
    for folder in (place, place.parent):
        folder.chmod(0o775)
    owner, group = pwd.getpwuid(place.stat().st_uid), grp.getgrgid(place.stat().st_gid)
    if owner.pw_name == group.gr_name:
        ready.done("setup", BUDGET_ENGINE_VENV=venv)
    else:
        assert_refused(ready.inv("setup", BUDGET_ENGINE_VENV=venv), "others may write")
