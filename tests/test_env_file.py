"""Which .env counts, and that no URL in or around it is passed over in silence for the embedded server."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from budget_engine import env_file, errors
from budget_engine.errors import SettingsError
from budget_engine.migration.chain import ROOT
from budget_engine.output import text as words
from budget_engine.settings import Settings, load
from conftest import Db
from test_command_line import copied, recipe

APP, OTHER = "postgresql://app@db.example.com/app", "postgresql://app@db.example.com/other"


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """An application's repository, with our files in vendor/budget."""
    app = tmp_path / "app"
    (app / ".git").mkdir(parents=True)
    home_of(app).mkdir(parents=True)
    return app


def home_of(app: Path) -> Path:
    return app / "vendor" / "budget"


def put(folder: Path, *lines: str) -> Path:
    """Write a .env."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".env").write_text("".join(f"{line}\n" for line in lines))
    return folder / ".env"


def lead(folder: Path, gitdir: Path | str) -> None:
    """Make the folder a submodule or a worktree, as git does it: by a file .git."""
    (folder / ".git").write_text(f"gitdir: {gitdir}\n")


def refused(home: Path, **environ: str) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        load(home, environ)
    assert caught.value.exit_code == 3
    return caught.value


def loads(home: Path, **environ: str) -> str | None:
    """The database that is found; None: the embedded server."""
    return name_of(load(home, environ))


def name_of(settings: Settings) -> str | None:
    return settings.target.conninfo["dbname"] if settings.target else None


# ── where it is looked for ─────────────────────────────────────────────────────────────────────────────────────────


def test_nearest_wins_and_of_an_applications_file_only_the_url_is_read(app: Path) -> None:
    others = ["LOCK_TIMEOUT=10", "LOCK_WAIT=soon", "CONNECT_TIMEOUT=5000", "PGHOST=x", "no line"]
    file = put(app, f"DATABASE_URL={APP}", *others)
    found = load(home_of(app), {})
    assert (name_of(found), found.source, found.notes) == ("app", str(file), ())
    put(home_of(app), "CONNECT_TIMEOUT=3s")
    found = load(home_of(app), {})
    assert (found.lock_timeout_ms, found.lock_wait_s, found.connect_timeout_s, found.notes) == (2000, 60, 3, ())
    nearer = put(home_of(app).parent, f"DATABASE_URL={OTHER}")
    found = load(home_of(app), {})
    assert (name_of(found), found.source) == ("other", str(nearer))
    assert found.notes == (f"ignored in {file}: another DATABASE_URL",)
    put(app, f"DATABASE_URL={OTHER}")
    assert load(home_of(app), {}).notes == ()


def test_submodule_takes_that_of_its_superproject(app: Path) -> None:
    """A submodule of a submodule, too."""
    put(app, f"DATABASE_URL={APP}")
    for name in ("budget", "worktrees/budget", "vendor/budget"):
        for gitdir in (app / ".git/modules" / name, f"../../.git/modules/{name}"):
            lead(home_of(app), gitdir)
            assert loads(home_of(app)) == "app", gitdir
    inner = home_of(app) / "lib" / "budget"
    inner.mkdir(parents=True)
    lead(inner, "../../../../.git/modules/vendor/budget/modules/lib/budget")
    assert loads(inner) == "app"


def test_submodule_of_a_linked_worktree_of_the_application(app: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    home_of(tree).mkdir(parents=True)
    lead(tree, app / ".git/worktrees/tree")
    lead(home_of(tree), app / ".git/worktrees/tree/modules/vendor/budget")
    put(app, f"DATABASE_URL={APP}")
    assert refused(home_of(tree)).what == errors.BEYOND(file=app / ".env", quoted="").what
    put(tree, f"DATABASE_URL={OTHER}")
    assert loads(home_of(tree)) == "other"


def without_git(app: Path) -> None:
    shutil.rmtree(app / ".git")
    lead(home_of(app), "../../.git/modules/vendor/budget")


BEYOND: dict[str, Callable[[Path], object]] = {
    "a clone inside another repository": lambda app: (home_of(app) / ".git").mkdir(),
    "a clone whose .git lies elsewhere": lambda app: lead(home_of(app), app.parent / "modules/budget"),
    "a submodule of another one": lambda app: lead(home_of(app), app.parent / "other/.git/modules/vendor/budget"),
    "a worktree of ours inside it": lambda app: lead(home_of(app), app.parent / "budget/.git/worktrees/budget"),
    "a worktree of a submodule": lambda app: lead(home_of(app), app / ".git/modules/lib/worktrees/budget"),
    "a .git that cannot be read": lambda app: (home_of(app) / ".git").write_bytes(b"\xff"),
    "no .git at all": lambda app: shutil.rmtree(app / ".git"),
    "a submodule of what has no .git any more": without_git,
}


@pytest.mark.parametrize("make", BEYOND.values(), ids=BEYOND)
def test_what_lies_beyond_the_repository_is_not_guessed_about(app: Path, make: Callable[[Path], object]) -> None:
    make(app)
    file = put(app, f"DATABASE_URL={APP}")
    error = refused(home_of(app))
    assert error.case is errors.BEYOND
    assert str(file) in error.what
    assert f"ENV_FILE={file}" in error.remedy
    assert "DATABASE_URL=embedded" in error.remedy
    # Both ways out lead out.
    assert loads(home_of(app), ENV_FILE=str(file)) == "app"
    assert loads(home_of(app), DATABASE_URL="embedded") is None
    put(home_of(app), "DATABASE_URL=embedded")
    assert loads(home_of(app)) is None
    # And no way in: here is a URL.
    put(home_of(app), f"DATABASE_URL={OTHER}")
    found = load(home_of(app), {})
    assert (name_of(found), found.source, found.notes) == ("other", ".env", ())


def test_worktree_beside_its_main_checkout(tmp_path: Path) -> None:
    main, tree = tmp_path / "main", tmp_path / "tree"
    (main / ".git/worktrees/tree").mkdir(parents=True)
    tree.mkdir()
    lead(tree, main / ".git/worktrees/tree")
    assert loads(tree) is None
    file = put(main, f"DATABASE_URL={APP}")
    assert f"ENV_FILE={file}" in refused(tree).remedy
    (tree / "sub").mkdir()
    put(main / "sub", f"DATABASE_URL={OTHER}")
    assert f"ENV_FILE={main / 'sub/.env'}" in refused(tree / "sub").remedy
    put(tree, f"DATABASE_URL={OTHER}")
    assert loads(tree) == "other"


def test_files_beyond_that_name_no_database_are_no_obstacle(app: Path) -> None:
    (home_of(app) / ".git").mkdir()
    for line in ("DATABASE_URL=", "DATABASE_URL=embedded", "LOCK_WAIT=1s", "#DATABASE_URL=x"):
        put(app, line)
        assert loads(home_of(app)) is None


@pytest.mark.parametrize("below", [True, False], ids=["in the repository", "beyond it"])
def test_file_further_up_that_cannot_be_read_may_hold_the_url(app: Path, *, below: bool) -> None:
    """A loop of links, because root may read every file."""
    if not below:
        (home_of(app) / ".git").mkdir()
    (app / ".env").symlink_to(".env")
    error = refused(home_of(app))
    assert error.case is errors.ENV_FILE
    assert str(app / ".env") in error.where
    assert load(home_of(app), {"DATABASE_URL": APP}).target
    put(home_of(app), f"DATABASE_URL={APP}")
    assert load(home_of(app), {}).notes == ()
    (app / ".env").unlink()
    put(home_of(app))
    (app / ".env").write_bytes(f"DATABASE_URL={APP}".encode("utf-16"))  # what ">" of Windows PowerShell writes
    error = refused(home_of(app))
    assert (error.case, error.where) == (errors.ENV_ENCODING, str(app / ".env"))
    (app / ".env").write_text(f'DATABASE_URL="{APP}\n')
    assert str(app / ".env") in refused(home_of(app)).what


def test_environment_wins_and_nothing_further_up_is_read(app: Path) -> None:
    """A virtual environment of that name is none."""
    (app / ".env").mkdir()
    assert loads(home_of(app)) is None
    (app / ".env").rmdir()
    (app / ".env").symlink_to(".env")
    put(home_of(app), "LOCK_WAIT=7s")
    found = load(home_of(app), {"DATABASE_URL": OTHER})
    assert (name_of(found), found.lock_wait_s, found.notes) == ("other", 7, ())


# ── not in a user's home folder, nor above ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("of", ["HOME", "SUDO_USER", "owner"])
def test_never_in_a_users_home_folder_or_above(app: Path, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """The repository reaches up to it: somebody keeps his home folder's files in one."""
    vendor = home_of(app).parent
    for folder in (app, vendor):
        put(folder, f"DATABASE_URL={APP}")
    assert loads(home_of(app)) == "app"
    monkeypatch.setattr(Path, "expanduser", lambda path: vendor if path == Path(f"~{of}") else path)
    monkeypatch.setattr(Path, "owner", lambda path: "owner")
    environ = {"HOME": str(vendor)} if of == "HOME" else {"SUDO_USER": "SUDO_USER", "HOME": "/root"}
    assert loads(home_of(app), **environ) is None
    put(home_of(app), f"DATABASE_URL={OTHER}")
    assert loads(home_of(app), **environ) == "other"


def test_home_folder_that_lies_elsewhere_or_behind_a_link(app: Path) -> None:
    (app / "ada").mkdir()
    (app.parent / "link").symlink_to(app)
    put(app, f"DATABASE_URL={APP}")
    assert loads(home_of(app), HOME=str(app / "ada")) is None  # the file lies above it
    assert loads(home_of(app), HOME=str(app.parent / "link")) is None
    assert loads(home_of(app.parent / "link"), HOME="/nowhere") == "app"


def test_main_checkout_that_is_a_users_home_folder(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    lead(tmp_path / "tree", tmp_path / "ada/.git/worktrees/tree")
    put(tmp_path / "ada", f"DATABASE_URL={APP}")
    assert loads(tmp_path / "tree", HOME=str(tmp_path / "ada")) is None
    assert refused(tmp_path / "tree").case is errors.BEYOND


def test_home_that_says_nothing(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no folder; or the home of the run is a user's home folder, too."""
    monkeypatch.chdir(app)
    put(app, f"DATABASE_URL={APP}")
    for home in ("", "relative", "/nowhere"):
        assert loads(home_of(app), HOME=home) == "app"
    put(home_of(app), f"DATABASE_URL={OTHER}")
    assert loads(home_of(app), HOME=str(home_of(app))) == "other"


def test_not_in_a_folder_where_anybody_may_put_a_file(app: Path) -> None:
    """Nor above: /tmp/.git and /tmp/.env would be a way in for everybody else on this machine."""
    put(app, f"DATABASE_URL={APP}")
    app.chmod(0o1777)
    assert loads(home_of(app)) is None
    app.chmod(0o777)  # of some shares all is: that says nothing
    assert loads(home_of(app)) == "app"


def test_folder_that_a_link_leads_to(app: Path, tmp_path: Path) -> None:
    """A shell that went through the link is in the application; Python sees the folder behind it."""
    (tmp_path / "budget" / ".git").mkdir(parents=True)
    home_of(app).rmdir()
    home_of(app).symlink_to(tmp_path / "budget")
    put(app, f"DATABASE_URL={APP}")
    assert refused(tmp_path / "budget", PWD=str(home_of(app))).case is errors.BEYOND
    for elsewhere in ("", "relative", "/", str(home_of(app).parent), str(tmp_path / "budget")):
        assert loads(tmp_path / "budget", PWD=elsewhere) is None


# ── ENV_FILE ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chosen_file_and_no_other(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(app, f"DATABASE_URL={APP}", "LOCK_WAIT=1s")
    put(home_of(app), f"DATABASE_URL={OTHER}", "CONNECT_TIMEOUT=3s")
    monkeypatch.chdir(app)
    for path in (".env", str(app / ".env"), "vendor/../.env"):
        found = load(home_of(app), {"ENV_FILE": path})
        assert (name_of(found), found.source, found.lock_wait_s) == ("app", str(app / ".env"), 60)
        assert found.connect_timeout_s == Settings.connect_timeout_s
    staging = home_of(app) / ".env.staging"
    staging.write_text(f"DATABASE_URL={APP}\nLOCK_WAIT=1s\n")
    found = load(home_of(app), {"ENV_FILE": str(staging)})
    assert (name_of(found), found.source, found.lock_wait_s) == ("app", ".env.staging", 1)
    assert loads(home_of(app), ENV_FILE=str(staging), DATABASE_URL=OTHER) == "other"
    (app.parent / "link").symlink_to(app)
    assert load(home_of(app.parent / "link"), {"ENV_FILE": str(staging)}) == found
    assert load(home_of(app), {"ENV_FILE": str(home_of(app.parent / "link") / ".env.staging")}) == found


def test_choice_that_leads_to_no_database(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(app)
    (app / "empty").touch()
    put(home_of(app), f"DATABASE_URL={OTHER}")
    of_case = {errors.ENV_FILE_CHOICE: ("", " ", "empty"),
               errors.ENV_FILE: ("missing", "vendor", "vendor/budget/missing", "empty/x")}  # fmt: skip
    for case, choices in of_case.items():
        for chosen in choices:
            error = refused(home_of(app), ENV_FILE=chosen)
            assert (error.case, "ENV_FILE" in error.what + error.remedy) == (case, True), chosen


# ── as users run it ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def vendored(tmp_path: Path) -> Iterator[Path]:
    """An application with our checkout as a submodule, made by git itself."""
    if not shutil.which("git"):
        pytest.skip("there is no git")
    app = tmp_path / "app"

    def git(folder: Path, *words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x", "-c", "protocol.file.allow=always"]
        folder.mkdir(exist_ok=True)
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

    source = copied(tmp_path / "source")
    shutil.copy(ROOT / "requirements.txt", source)  # doctor compares it with what is installed
    for folder in (source, app):
        git(folder, "init", "-q")
    git(source, "add", ".")
    git(source, "commit", "-qm", "all")
    git(app, "submodule", "add", "-q", str(source), "vendor/budget")
    git(app, "commit", "-qm", "all")
    git(app, "worktree", "add", "-q", "../tree")
    git(tmp_path / "tree", "submodule", "update", "-q", "--init")
    yield app
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_submodule_made_by_git(vendored: Path, db: Db) -> None:
    file = put(vendored, f"DATABASE_URL={db.url}")
    done = recipe(home_of(vendored), "setup")
    assert done.code == 0, done
    assert f" ({file}), PostgreSQL " in done.out
    assert db.differing() == {}
    assert not (home_of(vendored) / ".postgres").exists()
    tree = home_of(vendored.parent / "tree")
    for task in ("setup", "doctor"):
        refused = recipe(tree, task)
        assert refused.code == 3, refused
        assert f"ENV_FILE={file}" in refused.out + refused.err, refused
    done = recipe(tree, "setup", "verify", "status", "plan", "doctor", "db.url", ENV_FILE=str(file))
    assert done.code == 0, done
    assert not (tree / ".postgres").exists()


# ── URLs under other names ─────────────────────────────────────────────────────────────────────────────────────────

SECRET = "postgresql://app:QXZJ@db/app"
OTHER_NAMES = [
    f"POSTGRES_URL={SECRET}",
    f"export PG_URI='{SECRET}'",
    f'TURSO="{SECRET}"',
    *(f"X={SECRET.replace('postgresql', word)}" for word in ("postgresql+asyncpg", "postgis", "pgsql", "PSQL")),
    f"X=prisma+{SECRET}",
    f"SPRING_DATASOURCE_URL=jdbc:{SECRET}",
    "PW=QXZJ\nX=postgres://app:${PW}@db/app",
    SECRET,
    f"{SECRET}?sslmode=require",
    *(f"{name}=QXZJ" for name in ("DATABASE_URI", "DATABSE_URL", "Database_url", "DATABASE-URL", "DATABASEURL")),
    *(f"{name}=QXZJ" for name in ("DATABASE_URLS", "DATABASE_ULR", "DATABASE_URL_2", "XDATABASE_URL")),
    "DTABASE_URL=",
]


@pytest.mark.parametrize("line", OTHER_NAMES)
def test_url_under_another_name_does_not_lead_to_the_embedded_server(app: Path, line: str) -> None:
    put(app, "A=1", "", *line.split("\n"))
    for folder, name in ((home_of(app), str(app / ".env")), (app, ".env")):
        error = refused(folder)
        assert error.case is errors.OTHER_NAME
        key = line.split("\n")[-1].removeprefix("export ").partition("=")[0]
        said = "without a name" if "://" in key else key
        assert error.where == f"{name}, line {3 + line.count(chr(10))}: {said}"
        assert "QXZJ" not in "\n".join(words.error(error))
    put(app, line, f"DATABASE_URL={APP}")
    assert loads(home_of(app)) == "app"
    put(app, line)
    assert load(app, {"DATABASE_URL": "embedded"}).notes == ()


def test_other_names_are_other_things(tmp_path: Path) -> None:
    put(tmp_path, "DATA_BASES_URLS=x", "DB_URL=x", "DATABASE=x", "REDIS_URL=redis://h", "URL=http://postgres://")
    assert load(tmp_path, {}) == load(tmp_path / "nowhere", {})


def test_parts_of_a_url_are_a_note(tmp_path: Path) -> None:
    put(tmp_path, "DB_HOST=h", "POSTGRES_SERVER=h", "PGHOST=h", "DB_PASSWORD=QXZJ", "DB_NAME=", "postgres_db_name=x")
    assert load(tmp_path, {}).notes == (
        "ignored in .env: PGHOST (libpq's: only in the environment)",
        "ignored in .env: DB_HOST, POSTGRES_SERVER, postgres_db_name (only DATABASE_URL says which database)",
    )
    put(tmp_path, "DB_HOST=h", f"DATABASE_URL={APP}")
    assert load(tmp_path, {}).notes == ()


def test_urls_of_other_tools_in_the_environment_are_a_note(tmp_path: Path) -> None:
    environ = {"POSTGRES_URL": SECRET, "DATABASE_URI": "x", "PGHOST": "h", "PGUSER": "QXZJ", "DB_NAME": "", "HOST": "x"}
    found = load(tmp_path, environ)
    assert found.target is None
    note = "ignored in the environment: POSTGRES_URL, DATABASE_URI, PGHOST (only DATABASE_URL says which database)"
    assert found.notes == (note,)
    assert refused(tmp_path, **environ, CI="true").where.endswith(f"\n{note}")
    assert load(tmp_path, environ | {"DATABASE_URL": APP}).notes == ()


# As frameworks' and services' documentation has them.
EXAMPLES = """
prisma #prisma DATABASE_URL="{}" DIRECT_URL="{}" SHADOW_DATABASE_URL="{}"
supabase NEXT_PUBLIC_SUPABASE_URL=https://x.supabase.co NEXT_PUBLIC_SUPABASE_ANON_KEY=x
 POSTGRES_HOST=db.x.supabase.co DATABASE_URL={} DIRECT_URL={} POSTGRES_PASSWORD=x
compose COMPOSE_PROJECT_NAME=x POSTGRES_USER=u POSTGRES_PASSWORD=x POSTGRES_DB=x
 DATABASE_URL=postgresql://${{POSTGRES_USER}}:${{POSTGRES_PASSWORD}}@db:5432/${{POSTGRES_DB}}
celery DATABASE_URL={} TEST_DATABASE_URL={} CELERY_RESULT_BACKEND=db+{} CELERY_BROKER_URL=amqp://h
phoenix export_DATABASE_URL={} export_POOL_SIZE=10 export_PHX_HOST=x export_SECRET_KEY_BASE=x
hasura HASURA_GRAPHQL_DATABASE_URL={} PG_DATABASE_URL={} DATABASE_URL={}
"""
WITHOUT = """
laravel APP_NAME=Laravel APP_URL=http://localhost DB_CONNECTION=mysql DB_HOST=127.0.0.1 DB_PORT=3306 DB_DATABASE=laravel
 DB_USERNAME=root DB_PASSWORD= REDIS_HOST=127.0.0.1 MAIL_HOST=mailpit
compose-without-a-URL POSTGRES_USER=u POSTGRES_PASSWORD=x POSTGRES_DB=x POSTGRES_PORT=5432
next NEXT_PUBLIC_API_URL=http://localhost:3000 AUTH_SECRET=x OPENAI_API_KEY=x NODE_ENV=development
vite VITE_APP_TITLE=x VITE_SUPABASE_URL=https://x.supabase.co
"""


def files(text: str) -> dict[str, str]:
    """Name → content: blanks are ends of lines."""
    named = (line.split(" ", 1) for line in text.strip().replace("\n ", " ").split("\n"))
    return {name: lines.replace(" ", "\n").replace("export_", "export ") for name, lines in named}


@pytest.mark.parametrize("text", files(EXAMPLES).values(), ids=files(EXAMPLES))
def test_no_false_alarm_beside_a_url(app: Path, text: str) -> None:
    for folder in (app, home_of(app)):
        put(folder, text.format(*[APP] * 4))
        found = load(home_of(app), {})
        assert (found.target is None, found.notes) == (False, ())


@pytest.mark.parametrize("text", files(WITHOUT).values(), ids=files(WITHOUT))
def test_no_false_alarm_where_there_is_none(tmp_path: Path, text: str) -> None:
    put(tmp_path, text)
    found = load(tmp_path, {})
    assert (found.target, len(found.notes)) == (None, "DB_HOST" in text)


def test_slip_of_the_pen_is_one_edit() -> None:
    """All that one edit makes, and nothing of two."""
    meant = "DATABASEURL"
    less = {meant[:at] + meant[at + 1 :] for at in range(len(meant))}
    other = {meant[:at] + "X" + meant[at + 1 :] for at in range(len(meant))}
    more = {meant[:at] + "X" + meant[at:] for at in range(len(meant) + 1)}
    swapped = {meant[:at] + meant[at : at + 2][::-1] + meant[at + 2 :] for at in range(len(meant) - 1)}
    typed = {meant} | less | other | more | swapped
    assert {word for word in typed if not env_file._is_slip_of_the_pen(word)} == set()
    twice = {word[:at] + "Y" + word[at:] for word in (other | more) for at in range(len(word) + 1)}
    assert {word for word in twice if env_file._is_slip_of_the_pen(word)} == set()
