"""scripts/inv, run as users run it: in a checkout (its path has a space) whose lock files name two tiny packages."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
STAND_IN = "import json, os, sys; print(json.dumps({'words': sys.argv[1:], 'cwd': os.getcwd(), 'prefix': sys.prefix}))"


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

    def has(self, module: str) -> bool:
        command = [str(self.python), "-I", "-c", f"import {module}"]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _wheel(folder: Path, name: str, source: str) -> str:
    """Build a package of one module that can be run, and return its line in a lock file."""
    file, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{name}/__main__.py", source)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A fresh checkout; copied, never run in."""
    folder = tmp_path_factory.mktemp("inv") / "my checkout"
    wheels = folder / "wheels"
    (folder / "scripts").mkdir(parents=True)
    wheels.mkdir()
    for name in ("inv", "__init__.py", "console.py", "errors.py"):  # what it needs before tasks.py is loaded
        shutil.copy(PROJECT / "scripts" / name, folder / "scripts")
    offline = f'--no-index\n--find-links "{wheels.as_uri()}"\n'.replace('"', "")
    (folder / "requirements.txt").write_text(offline + _wheel(wheels, "invoke", STAND_IN))
    (folder / "requirements-dev.txt").write_text(offline + _wheel(wheels, "devtool", ""))
    return Checkout(folder)


@pytest.fixture(scope="module")
def installed(empty: Checkout, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, str, str]:
    """A checkout after its first run, and what that run wrote; copied, never changed."""
    checkout = _copy(empty, tmp_path_factory.mktemp("installed"))
    code, out, err = checkout.inv("setup", "--flag", cwd=Path("/"))
    assert code == 0, err
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
    assert json.loads(out) == {"words": words, "cwd": "/", "prefix": str(checkout.venv)}
    assert not checkout.has("devtool")


def test_second_run_is_silent_and_fast(ready: Checkout) -> None:
    began = time.perf_counter()
    code, out, err = ready.inv("setup")
    assert time.perf_counter() - began < 1
    assert (code, err) == (0, "")
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
    (tmp_path / "invoke/__main__.py").write_text("print('the wrong one')")
    code, out, err = ready.inv("setup", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (code, err) == (0, "")
    assert json.loads(out)["cwd"] == str(tmp_path)


def test_four_first_runs_at_once_all_succeed_also_elsewhere(fresh: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where" / "venv"
    processes = [fresh.popen("setup", BUDGET_ENGINE_VENV=str(elsewhere)) for _ in range(4)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("installing" in err for _, err in outputs) == 1
    assert {json.loads(out)["prefix"] for out, _ in outputs} == {str(elsewhere)}
    assert not fresh.venv.exists()


# ── broken environments ────────────────────────────────────────────────────────────────────────────────────────────


def test_environment_whose_interpreter_is_gone_is_made_anew(ready: Checkout) -> None:
    for link in (ready.venv / "bin").glob("python*"):
        link.unlink()
    (ready.venv / "bin/python").symlink_to("/nowhere/python3")
    assert ready.inv("setup")[0] == 0
    assert ready.has("invoke")


def test_environment_of_another_python_is_made_anew(ready: Checkout) -> None:
    stamp, left_over = ready.venv / ".inv-stamp", ready.venv / "left-over"
    stamp.write_text(stamp.read_text().replace("cpython-3", "cpython-2"))
    left_over.touch()
    assert ready.inv("setup")[0] == 0
    assert not left_over.exists()


def _interrupt(checkout: Checkout, number: signal.Signals) -> tuple[int, str]:
    process = checkout.popen("setup")
    while not checkout.python.exists():
        assert process.poll() is None
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def test_killed_installation_is_taken_up_again(fresh: Checkout) -> None:
    assert _interrupt(fresh, signal.SIGKILL)[0] == -signal.SIGKILL
    assert fresh.inv("setup")[0] == 0


def test_ctrl_c_is_one_line(fresh: Checkout) -> None:
    code, err = _interrupt(fresh, signal.SIGINT)
    assert code == 130
    assert [line.split()[1] for line in err.splitlines()] == ["installing", "interrupted;"]
    assert not (fresh.venv / ".inv-stamp").exists()


def test_users_own_environment_is_completed_not_replaced(fresh: Checkout) -> None:
    subprocess.run([sys.executable, "-m", "venv", fresh.venv], check=True)
    theirs = fresh.venv / "theirs"
    theirs.touch()
    assert fresh.inv("setup")[0] == 0
    stamp = fresh.venv / ".inv-stamp"
    stamp.write_text(stamp.read_text().replace("cpython-3", "cpython-2"))
    assert fresh.inv("setup")[0] == 0
    assert theirs.exists()


def test_folder_that_is_no_environment_is_left_alone(fresh: Checkout) -> None:
    fresh.venv.mkdir()
    (fresh.venv / "thesis.txt").touch()
    code, out, err = fresh.inv("setup")
    assert (code, out) == (1, "")
    assert "BUDGET_ENGINE_VENV" in err
    assert (fresh.venv / "thesis.txt").exists()


# ── messages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_that_cannot_be_written_names_the_variable(fresh: Checkout) -> None:
    code, out, err = fresh.inv("setup", BUDGET_ENGINE_VENV=str(fresh.folder / "requirements.txt" / "venv"))
    assert (code, out) == (1, "")
    assert "BUDGET_ENGINE_VENV" in err
    assert "Traceback" not in err


def test_failure_of_pip_shows_why(ready: Checkout) -> None:
    lock = ready.folder / "requirements-dev.txt"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:0")[:-2] + "\n")
    code, out, err = ready.inv("lint")
    assert (code, out) == (1, "")
    assert "DO NOT MATCH" in err
    assert "proxy" in err
    assert "Traceback" not in err


def test_python_without_ensurepip_names_the_package(fresh: Checkout, tmp_path: Path) -> None:
    """Debian's python3 without python3-venv: a standard library that lacks one package."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library = Path(os.__file__).parent
    (tmp_path / "home/lib" / version).mkdir(parents=True)
    for entry in library.iterdir():
        if entry.name not in {"ensurepip", "__pycache__"}:
            (tmp_path / "home/lib" / version / entry.name).symlink_to(entry)
    code, out, err = fresh.inv("setup", PYTHONHOME=str(tmp_path / "home"))
    assert (code, out) == (1, "")
    assert f"apt install {version}-venv" in err
    assert "Traceback" not in err


def test_every_python_3_since_3_6_can_parse_it() -> None:
    ast.parse((PROJECT / "scripts/inv").read_text(), feature_version=(3, 6))


def test_too_old_pythons_of_this_machine_get_a_sentence() -> None:
    """Where there is none, the test above must do."""
    names = [f"python3.{minor}" for minor in range(6, 10)]
    found = [path for name in names if (path := shutil.which(name))]
    found += [str(path) for path in Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python")]
    for python in found:
        done = subprocess.run([python, PROJECT / "scripts/inv", "setup"], capture_output=True, text=True, check=False)
        if "pyenv:" not in done.stderr:  # a shim of a version that is not selected
            assert done.returncode == 1
            assert "needs Python 3.10" in done.stderr
            assert "Traceback" not in done.stderr
