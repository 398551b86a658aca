"""In an application's own repository: as an installed package, as a submodule, as a copied folder."""

from __future__ import annotations

import shutil
import sys
import venv
from pathlib import Path

import pytest
from budget_engine import __version__
from budget_engine.migration.chain import ROOT
from conftest import Db, Run, assert_done, assert_fails, clean_environment, run

# An application's menu, which has a task setup, and whose module is called tasks as ours is.
MENU = """
import sys
from invoke import Collection, task

{path}
from budget_engine import collection

@task
def setup(c):
    print("the application's own")

namespace = Collection.from_module(sys.modules[__name__])
namespace.add_collection(collection("budget", __file__))
"""
LEFT_OUT = shutil.ignore_patterns(".*", "tests", "__pycache__", "docs", "pyproject.toml", "requirements*")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an empty environment into which the wheel was installed, with what it depends on."""
    folder = tmp_path_factory.mktemp("package")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    assert run(build, clean_environment(), cwd=folder).code == 0
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", str(wheel)]
    done = run(install, clean_environment(), cwd=folder)
    assert done.code == 0, done
    return python.parent


@pytest.fixture
def application(tmp_path: Path, db: Db) -> Path:
    """The folder of an application, with its .env, a package scripts of its own, and no repository around it."""
    folder = tmp_path / "an application"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "__init__.py").write_text("")
    (folder / ".env").write_text(f"DATABASE_URL={db.url}\n")
    return folder


def has_menu(application: Path, path: str = "") -> None:
    (application / "tasks.py").write_text(MENU.replace("{path}", path))


def ran(*words: object, cwd: Path) -> Run:
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
    return run([str(word) for word in words], environment, cwd=cwd)


@pytest.mark.slow
def test_installed_package_brings_a_command(installed: Path, application: Path, db: Db) -> None:
    command = installed / "budget-engine"
    assert ran(command, "--version", cwd=application).out.strip() == f"Budget Engine recipes {__version__}"
    listed = ran(command, "--list", cwd=application)
    assert "turn-metrics" in listed.out
    assert "pictures" not in listed.out
    done = ran(command, "setup", cwd=application)
    assert "(.env)" in done.out
    assert_done(db, done)
    db.execute("DROP TABLE turn_metrics")
    assert_fails(ran(command, "verify", cwd=application), 5, "Run budget-engine setup")
    fleet = ran(command, "fleet", "--databases", db.name, cwd=application)
    assert_done(db, fleet)
    found = ran(
        installed / "python",
        "-c",
        "import budget_engine, importlib.util as u; print(u.find_spec('tasks'))",
        cwd=application,
    )
    assert found.out.strip() == "None"


def test_installed_package_in_the_menu_of_an_application(installed: Path, application: Path, db: Db) -> None:
    has_menu(application)
    assert "the application's own" in ran(installed / "invoke", "setup", cwd=application).out
    missing = ran(installed / "invoke", "budget.verify", cwd=application)
    assert_fails(missing, 5, "Run invoke budget.setup")
    assert_done(db, ran(installed / "inv", "budget.setup", cwd=application))
    assert "budget.db.psql" in ran(installed / "invoke", "--list", cwd=application).out


def test_submodule_in_the_menu_of_an_application(application: Path, db: Db) -> None:
    shutil.copytree(ROOT, application / "vendor" / "budget", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    has_menu(application, 'sys.path.append("vendor/budget/scripts")')
    invoke = Path(sys.executable).with_name("invoke")
    assert "the application's own" in ran(invoke, "setup", cwd=application).out
    assert "budget.pictures" not in ran(invoke, "--list", cwd=application).out
    assert_done(db, ran(invoke, "budget.setup", cwd=application))


def test_copied_folder_needs_neither_our_pyproject_nor_our_tests(application: Path, db: Db) -> None:
    shutil.copytree(ROOT, application, ignore=LEFT_OUT, dirs_exist_ok=True)
    invoke = Path(sys.executable).with_name("invoke")
    assert "pictures" not in ran(invoke, "--list", cwd=application).out
    assert_done(db, ran(invoke, "setup", cwd=application))
