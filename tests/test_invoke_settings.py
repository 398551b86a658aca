"""Settings of Invoke that are meant for other projects, and others' collections that hold ours: our tasks run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from budget_engine import __version__
from conftest import Run, clean_environment, run
from test_command_line import copied

MENU = {"setup", "slots-flags", "slots_flags", "turn-metrics", "turn_metrics", "verify", "db.url", "lint"}
UNDERSCORES = "tasks: {auto_dash_names: false}\n"
# What a user, or a machine, may have for Invoke: file and content.
FILES: dict[str, tuple[str, bytes | None]] = {
    "a folder": (".invoke.yaml", None),
    "broken": (".invoke.yaml", b"tasks: [unclosed\n"),
    "no mapping": (".invoke.yaml", b"- tasks\n"),
    "another type": (".invoke.yaml", b"tasks: 3\n"),
    "not UTF-8": (".invoke.yaml", b"\xff\xfe"),
    "broken JSON": (".invoke.json", b"{"),
    "broken Python": (".invoke.py", b"import nowhere\n"),
    "underscores": (".invoke.yaml", UNDERSCORES.encode()),
    "another collection": (".invoke.yaml", b"tasks: {collection_name: fabfile, search_root: /nowhere}\n"),
    "another executor": (".invoke.yaml", b"tasks: {executor_class: nowhere.Executor}\n"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copied(tmp_path / "my checkout")


def invoke(program: list[str], *words: str, cwd: Path, **environment: str) -> Run:
    given = clean_environment() | {"DATABASE_URL": "postgresql://u@h:5432/db"} | environment
    return run([sys.executable, *program, *words], given, cwd=cwd)


def as_inv(tree: Path, *words: str, **environment: str) -> Run:
    """What scripts/inv becomes, from a folder of somebody else."""
    return invoke(["-I", str(tree / "scripts/as_invoke.py")], *words, cwd=tree.parent, **environment)


def plain(tree: Path, *words: str, **environment: str) -> Run:
    return invoke(["-m", "invoke"], *words, cwd=tree, **environment)


def assert_ours(done: Run, *missing: str) -> None:
    assert (done.code, done.err) == (0, ""), done
    assert set(done.out.split()) >= MENU - set(missing), done


def of_user(home: Path, name: str, content: bytes | None) -> dict[str, str]:
    """Give a user the file, or (None) a folder of its name; return the environment of his."""
    home.mkdir()
    (home / name).mkdir() if content is None else (home / name).write_bytes(content)
    return {"HOME": str(home)}


# ── scripts/inv ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_version_is_ours(tree: Path) -> None:
    done = as_inv(tree, "--version")
    assert done.code == 0, done
    assert re.fullmatch(rf"Budget Engine recipes {re.escape(__version__)} \(Invoke [\d.]+\)\n", done.out), done


def test_list_is_in_the_order_of_the_work(tree: Path) -> None:
    """Those for developers last."""
    names = re.findall(r"^  ([\w.-]+)", as_inv(tree, "--list").out, re.M)
    assert names[:6] == ["setup", "prereqs", "fix", "slots-flags", "budget-report", "turn-metrics"]
    assert set(names[6:11]) == {"verify", "status", "plan", "rehearse", "doctor"}
    assert set(names[-4:]) == {"test", "lint", "bench", "pictures"}
    assert set(re.findall(r"^  ([\w.-]+)", plain(tree, "--list").out, re.M)) == set(names)
    assert re.findall(r"^  \.(\w+)", as_inv(tree, "--list", "db").out, re.M) == ["start", "stop", "url", "psql"]
    assert "db [4 tasks]" in as_inv(tree, "--list", "--list-depth", "1").out


@pytest.mark.parametrize("spelling", ["invoke", "python3 scripts/inv", "python3.12 '/my place/scripts/inv'"])
def test_messages_spell_tasks_as_this_run_was_started(tree: Path, spelling: str) -> None:
    """Else who has no environment active is told to run what is not there."""
    program = ["-I", "-X", f"ran_as={spelling}", str(tree / "scripts/as_invoke.py")]
    place = {"DATABASE_URL": "embedded", "BUDGET_ENGINE_POSTGRES": str(tree / "postgres")}
    done = invoke(program, "--dry", "setup", cwd=tree, **place)
    assert done.code == 4, done
    assert f"help     Start it ({spelling} db.start)" in done.err
    assert done.err.count("invoke ") == (spelling == "invoke"), done


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_settings_of_the_user_do_not_matter(tree: Path, tmp_path: Path, file: tuple[str, bytes | None]) -> None:
    user = of_user(tmp_path / "home", *file)
    assert_ours(as_inv(tree, "--complete", **user))
    done = as_inv(tree, "db.url", **user)
    assert (done.code, done.out.strip()) == (0, "postgresql://u@h:5432/db"), done


@pytest.mark.parametrize("content", ["tasks: [unclosed\n", UNDERSCORES])
def test_settings_beside_the_tasks_do_not_matter(tree: Path, content: str) -> None:
    (tree / "invoke.yaml").write_text(content)
    assert_ours(as_inv(tree, "--complete"))


def test_variables_do_not_matter(tree: Path) -> None:
    variables = {"RUN_DRY": "1", "RUN_WATCHERS": "x", "TASKS_EXECUTOR_CLASS": "nowhere.Executor", "TASKS_DEDUPE": "0"}
    done = as_inv(tree, "db.url", **{f"INVOKE_{name}": value for name, value in variables.items()})
    assert done == plain(tree, "db.url")


OPTIONS = """
--list --list-format=json
--help
--help slots-flags
--complete -- invoke --
--complete -- invoke setup --
--print-completion-script=bash
--dry db.url
-e --no-dedupe db.url db.url
db.url slots_flags_
-c nowhere --list
"""


@pytest.mark.parametrize("words", OPTIONS.split("\n")[:-1])
def test_options_mean_what_they_mean_to_invoke(tree: Path, words: str) -> None:
    assert as_inv(tree, *words.split()) == plain(tree, *words.split())


@pytest.mark.parametrize(("name", "content"), [file for file in FILES.values() if file[1] and b"{" not in file[1][1:]])
def test_file_of_the_command_line_is_named(tree: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    done = as_inv(tree, "--config", str(tmp_path / name), "db.url")
    assert done.code == 1, done
    assert done.err.startswith("scripts/inv: Invoke cannot go on: "), done
    assert "Traceback" not in done.err, done


def test_file_of_the_command_line_counts(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {dry: true}\n")
    done = as_inv(tree, "-f", str(tmp_path / "mine.yaml"), "lint")
    assert done.code == 0, done
    assert "ruff check" in done.out  # shown, not run


# ── plain invoke, and applications that add our collection ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["user", "project"])
def test_invoke_that_leaves_names_alone(tree: Path, tmp_path: Path, place: str) -> None:
    user = of_user(tmp_path / "home", ".invoke.yaml", UNDERSCORES.encode() if place == "user" else b"")
    if place == "project":
        (tree / "invoke.yaml").write_text(UNDERSCORES)
    assert_ours(plain(tree, "--complete", **user), "slots-flags", "turn-metrics")
    listed = plain(tree, "--list", "--list-format=json", **user)
    assert {"slots_flags", "verify"} <= {task["name"] for task in json.loads(listed.out)["tasks"]}
    done = plain(tree, "slots_flags", "db.url", DATABASE_URL="", **user)
    assert (done.code, done.err.count("error  ")) == (3, 1), done


APPLICATION = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from invoke import Collection
sys.path.insert(0, {tree!r})
spec = spec_from_file_location("recipes", {tree!r} + "/tasks.py")
recipes = module_from_spec(spec)
spec.loader.exec_module(recipes)
ns = Collection()
ns.add_collection({collection}, "budget")
"""
WAYS = {
    "ours": "recipes.namespace",
    "the module's": "Collection.from_module(recipes)",
    "the module's, names left alone": "Collection.from_module(recipes, auto_dash_names=False)",
    "two deep": "Collection('tools', recipes.namespace)",
}


@pytest.mark.parametrize("settings", ["", UNDERSCORES], ids=["hyphens", "names left alone"])
@pytest.mark.parametrize("way", WAYS)
def test_application_that_adds_our_collection(tree: Path, tmp_path: Path, way: str, settings: str) -> None:
    application = tmp_path / "application"
    application.mkdir()
    collection = WAYS[way].replace("recipes.namespace)", "budget=recipes.namespace)")
    (application / "tasks.py").write_text(APPLICATION.format(tree=str(tree), collection=collection))
    (application / "invoke.yaml").write_text(settings)
    prefix = "budget.budget" if way == "two deep" else "budget"
    done = plain(application, "--complete")
    assert done.code == 0, done
    names = [name for name in done.out.split() if re.fullmatch(rf"{prefix}\.slots.flags", name)]
    assert names[0] == f"{prefix}.slots{'_' if settings else '-'}flags"
    assert (len(names) == 2) == (not settings and way in ("ours", "the module's"))
    for name in names:
        assert plain(application, name, DATABASE_URL="").code == 3
    assert plain(application, f"{prefix}.db.url").out.strip() == "postgresql://u@h:5432/db"
