"""Settings of Invoke that are meant for other projects, and others' collections that hold ours: our tasks run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from budget_engine import __version__
from budget_engine.migration.chain import ROOT
from conftest import Run, clean_environment, run
from test_command_line import copied

MENU = {"setup", "slots-flags", "slots_flags", "turn-metrics", "turn_metrics", "verify", "db.url", "lint"}
UNDERSCORES = "tasks: {auto_dash_names: false}\n"
# What a user, or a project, may have for Invoke: file and content (None: a folder of that name).
FILES: dict[str, tuple[str, bytes | None]] = {
    "a folder": (".invoke.yaml", None),
    "broken": (".invoke.yaml", b"tasks: [unclosed\n"),
    "no mapping": (".invoke.yaml", b"- tasks\n"),
    "not UTF-8": (".invoke.yaml", b"\xff\xfe"),
    "broken JSON": (".invoke.json", b"{"),
    "broken Python": (".invoke.py", b"import nowhere\n"),
    "underscores": (".invoke.yaml", UNDERSCORES.encode()),
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


def laid(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)


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
    assert set(re.findall(r"^  ([\w.-]+)", plain(ROOT, "--list").out, re.M)) == set(names)
    assert re.findall(r"^  \.(\w+)", as_inv(tree, "--list", "db").out, re.M) == ["start", "stop", "url", "psql"]
    assert "db [4 tasks]" in as_inv(tree, "--list", "--list-depth", "1").out


@pytest.mark.parametrize("spelling", ["invoke", "python3.12 '/my place/scripts/inv'"])
def test_messages_spell_tasks_as_this_run_was_started(tree: Path, spelling: str) -> None:
    """Else who has no environment active is told to run what is not there."""
    program = ["-I", "-X", f"ran_as={spelling}", str(tree / "scripts/as_invoke.py")]
    place = {"DATABASE_URL": "embedded", "BUDGET_ENGINE_POSTGRES": str(tree / "postgres")}
    done = invoke(program, "--dry", "setup", cwd=tree, **place)
    assert done.code == 4, done
    assert f"help     Start it ({spelling} db.start)" in done.err
    assert done.err.count("invoke ") == (spelling == "invoke"), done


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
def test_settings_of_the_user_or_beside_the_tasks_do_not_matter(tree: Path, name: str, content: bytes | None) -> None:
    laid(tree.parent, name, content)
    laid(tree, name.lstrip("."), content)
    done = as_inv(tree, "db.url", HOME=str(tree.parent))
    assert (done.code, done.out.strip()) == (0, "postgresql://u@h:5432/db"), done
    if content == UNDERSCORES.encode():
        assert_ours(as_inv(tree, "--complete", HOME=str(tree.parent)))


def test_variables_do_not_matter(tree: Path) -> None:
    variables = {"RUN_DRY": "1", "RUN_WATCHERS": "x", "TASKS_EXECUTOR_CLASS": "nowhere.Executor", "TASKS_DEDUPE": "0"}
    done = as_inv(tree, "db.url", **{f"INVOKE_{name}": value for name, value in variables.items()})
    assert done == plain(ROOT, "db.url")


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
    assert as_inv(tree, *words.split()) == plain(ROOT, *words.split())


@pytest.mark.parametrize("kind", ["broken", "no mapping", "not UTF-8", "broken Python"])
def test_file_of_the_command_line_is_named(tree: Path, tmp_path: Path, kind: str) -> None:
    laid(tmp_path, *FILES[kind])
    done = as_inv(tree, "--config", str(tmp_path / FILES[kind][0]), "db.url")
    assert done.code == 1, done
    assert done.err.startswith("scripts/inv: Invoke cannot go on: "), done
    assert "Traceback" not in done.err, done


def test_file_of_the_command_line_counts(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {dry: true}\n")
    done = as_inv(tree, "-f", str(tmp_path / "mine.yaml"), "lint")
    assert done.code == 0, done
    assert "ruff check" in done.out  # shown, not run


# ── plain invoke, and applications that add our collection ─────────────────────────────────────────────────────────


def test_invoke_that_leaves_names_alone(tmp_path: Path) -> None:
    laid(tmp_path, *FILES["underscores"])
    user = {"HOME": str(tmp_path)}
    assert_ours(plain(ROOT, "--complete", **user), "slots-flags", "turn-metrics")
    listed = plain(ROOT, "--list", "--list-format=json", **user)
    assert {"slots_flags", "verify"} <= {task["name"] for task in json.loads(listed.out)["tasks"]}
    done = plain(ROOT, "slots_flags", "db.url", DATABASE_URL="", **user)
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
TWO_DEEP = "Collection('tools', budget=recipes.namespace)"
# How an application adds our collection, and the names that our task has there.
WAYS = {
    "ours": ("recipes.namespace", "", ["budget.slots-flags", "budget.slots_flags"]),
    "ours, names left alone": ("recipes.namespace", UNDERSCORES, ["budget.slots_flags"]),
    "the module's": ("Collection.from_module(recipes)", "", ["budget.slots-flags", "budget.slots_flags"]),
    "its names left alone": ("Collection.from_module(recipes, auto_dash_names=False)", "", ["budget.slots-flags"]),
    "two deep": (TWO_DEEP, "", ["budget.budget.slots-flags"]),
    "two deep, names left alone": (TWO_DEEP, UNDERSCORES, ["budget.budget.slots_flags"]),
}


@pytest.mark.parametrize(("collection", "settings", "names"), WAYS.values(), ids=WAYS)
def test_application_that_adds_our_collection(
    tree: Path, tmp_path: Path, collection: str, settings: str, names: list[str]
) -> None:
    application = tmp_path / "application"
    application.mkdir()
    (application / "tasks.py").write_text(APPLICATION.format(tree=str(tree), collection=collection))
    (application / "invoke.yaml").write_text(settings)
    listed = plain(application, "--complete")
    assert [name for name in listed.out.split() if re.fullmatch(r"budget\..*slots.flags", name)] == names, listed
    nobody = "postgresql://u@127.0.0.1:1/db"
    for name in names:
        done = plain(application, f"{name.rpartition('.')[0]}.db.url", name, DATABASE_URL=nobody)
        assert (done.out.splitlines()[0], done.code) == (nobody, 4), done
