"""In an application's own repository: as an installed package, as a submodule, as a copied folder."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from budget_engine import __version__
from budget_engine.migration.chain import ROOT
from conftest import Db, Run, assert_done, assert_fails, clean_environment, once, run

# An application's menu, which has a task setup, and whose module is called tasks as ours is; README's lines at its end.
MENU = """
import sys
from pathlib import Path
from invoke import Collection, task

@task
def setup(c):
    print("the application's own")

"""
FOR_FOLDER, _, FOR_ALL = (
    (ROOT / "README.md").read_text("utf-8").partition("```python\n")[2].partition("```")[0].partition("\n")
)
COPIED = shutil.ignore_patterns(".[!g]*", ".git", "__pycache__")
LEFT_OUT = shutil.ignore_patterns(".*", "tests", "__pycache__", "docs", "pyproject.toml", "requirements*")


PIP = [sys.executable, "-m", "pip", "--python"]  # of an environment that has none


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an empty environment into which this was installed, with what it depends on."""

    def fill(folder: Path) -> None:
        done = ran(*PIP, environment(folder / "venv"), "install", "-q", ROOT, cwd=folder)
        assert done.code == 0, done

    return once(tmp_path_factory, "package", fill) / "venv" / "bin"


@pytest.fixture
def application(tmp_path: Path, db: Db) -> Path:
    """The folder of an application, with its .env, a package scripts of its own, and no repository around it."""
    folder = tmp_path / "an application"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "__init__.py").write_text("")
    (folder / ".env").write_text(f"DATABASE_URL={db.url}\n")
    return folder


def has_menu(application: Path, path: str = "") -> None:
    (application / "tasks.py").write_text(MENU + path + "\n" + FOR_ALL)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository of this project, its sdist, and an environment with the build backend.

    What is built and run there has our own environment's packages: only the backend is asked of a registry.
    """

    def fill(folder: Path) -> None:
        shutil.copytree(ROOT, folder / "repository", ignore=COPIED)
        committed = "git init -q && git add . && git -c user.name=a -c user.email=a commit -qm all"
        python = environment(folder / "backend")
        for command in (
            ["sh", "-c", committed],
            [*PIP, python, "install", "-q", "hatchling", "editables"],
            [python, "-m", "hatchling", "build", "-t", "sdist", "-d", folder],
        ):
            done = ran(*command, cwd=folder / "repository")
            assert done.code == 0, done

    return once(tmp_path_factory, "sources", fill)


def environment(folder: Path, *others: Path) -> Path:
    """Make an empty environment, which has the packages of others, too; return its Python."""
    venv.create(folder, with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "others.pth").write_text("".join(f"{path}\n" for path in others))
    return folder / "bin" / "python"


def ran(*words: object, cwd: Path) -> Run:
    environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
    return run([str(word) for word in words], environment, cwd=cwd)


@pytest.mark.slow
def test_installed_package_brings_a_command(installed: Path, application: Path, db: Db) -> None:
    command = installed / "budget-engine"
    assert ran(command, "--version", cwd=application).out.strip() == f"Budget Engine recipes {__version__}"
    (application / ".invoke.yaml").write_text("run: {dry: [")  # of somebody's home
    listed = ran("env", f"HOME={application}", command, "--list", cwd=application)
    assert re.findall("^  ([a-z.-]+)  ", listed.out, re.M)[::15] == ["setup", "db.psql"]  # in the order of the work
    broken = ran(command, "--config", ".invoke.yaml", "verify", cwd=application)
    assert (broken.code, broken.err[:29]) == (1, "budget-engine: Invoke cannot ")
    done = ran(command, "setup", cwd=application)
    assert "(.env)" in done.out
    assert_done(db, done)
    db.execute("DROP TABLE turn_metrics")
    assert_fails(ran(command, "verify", cwd=application), 5, "Run budget-engine setup")
    fleet = ran(command, "fleet", "--databases", db.name, cwd=application)
    assert_done(db, fleet)
    finds = "import budget_engine, importlib.util as u; print(u.find_spec('tasks'))"
    assert ran(installed / "python", "-c", finds, cwd=application).out.strip() == "None"


def test_installed_package_in_the_menu_of_an_application(installed: Path, application: Path, db: Db) -> None:
    has_menu(application)
    assert "the application's own" in ran(installed / "invoke", "setup", cwd=application).out
    missing = ran(installed / "invoke", "budget.verify", cwd=application)
    assert_fails(missing, 5, "Run invoke budget.setup")
    assert_done(db, ran(installed / "inv", "budget.setup", cwd=application))
    assert "budget.db.psql" in ran(installed / "invoke", "--list", cwd=application).out


@pytest.mark.slow
@pytest.mark.parametrize("way", [["-e", "repository"], ["{}"]], ids=["editable", "sdist"])
def test_other_ways_to_install_bring_the_same(
    sources: Path, tmp_path: Path, application: Path, db: Db, way: list[str]
) -> None:
    [sdist] = sources.glob("*.tar.gz")
    site = [Path(sysconfig.get_path("purelib", vars={"base": base})) for base in (sys.prefix, str(sources / "backend"))]
    python = environment(tmp_path / "venv", *site)
    words = [word.format(sdist) for word in way]
    done = ran(*PIP, python, "install", "-q", "--no-deps", "--no-build-isolation", *words, cwd=sources)
    assert done.code == 0, done
    command = python.with_name("budget-engine")
    assert ran(command, "--version", cwd=application).out.strip() == f"Budget Engine recipes {__version__}"
    assert_done(db, ran(command, "setup", cwd=application))


def test_submodule_in_the_menu_of_an_application(sources: Path, application: Path, db: Db) -> None:
    git = ["git", "-c", "protocol.file.allow=always"]
    assert ran("git", "init", "-q", cwd=application).code == 0
    done = ran(*git, "submodule", "add", sources / "repository", "vendor/budget", cwd=application)
    assert done.code == 0, done
    has_menu(application, FOR_FOLDER)
    invoke = Path(sys.executable).with_name("invoke")
    assert "the application's own" in ran(invoke, "setup", cwd=application).out
    assert "budget.pictures" not in ran(invoke, "--list", cwd=application).out
    assert_done(db, ran(invoke, "budget.setup", cwd=application / "scripts"))  # Invoke looks for tasks.py upwards


def test_copied_folder_needs_neither_our_pyproject_nor_our_tests(application: Path, db: Db) -> None:
    shutil.copytree(ROOT, application, ignore=LEFT_OUT, dirs_exist_ok=True)
    invoke = Path(sys.executable).with_name("invoke")
    assert "pictures" not in ran(invoke, "--list", cwd=application).out
    assert_done(db, ran(invoke, "setup", cwd=application))
