"""A real PgBouncer in front of the tests' server: Debian's package in Debian's configuration, pooling transactions.

Of the shipped pgbouncer.ini only the places are changed (sockets, log, list of users, the server behind it), how one
logs in, and pool_mode; whatever a test asks for beyond that is appended.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psycopg
from budget_engine.postgres.embedded import Cluster
from conftest import Db

PROGRAM = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
# Debian lets only its own user read the one in use; the copy beside the documentation is the same.
SHIPPED = (Path("/etc/pgbouncer/pgbouncer.ini"), Path("/usr/share/doc/pgbouncer/examples/pgbouncer.ini"))
CONFIGURATION = next((file for file in SHIPPED if os.access(file, os.R_OK)), None)
PORT = 6432


@dataclass
class Pooler:
    """Runs while it is entered. roles: who may come in; settings: lines for its section [pgbouncer]."""

    cluster: Cluster
    roles: tuple[str, ...] = ("postgres",)
    settings: dict[str, str] = field(default_factory=dict)
    port: int = PORT  # of its socket, and of TCP where settings ask for that
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Pooler:
        self.folder = Path(tempfile.mkdtemp(prefix="budget-engine-pooler-"))
        if self.cluster.user is not None:  # PgBouncer refuses to run as root, too
            shutil.chown(self.folder, self.cluster.user, self.cluster.user)
        (self.folder / "users").write_text("".join(f'"{role}" ""\n' for role in self.roles))
        (self.folder / "pgbouncer.ini").write_text(self._configuration())
        for file in ("users", "pgbouncer.ini"):
            (self.folder / file).chmod(0o644)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start it, and wait until it listens."""
        (self.folder / f".s.PGSQL.{self.port}").unlink(missing_ok=True)
        account = pwd.getpwnam(self.cluster.user) if self.cluster.user else None
        self.process = subprocess.Popen(
            [str(PROGRAM), "-q", str(self.folder / "pgbouncer.ini")],
            user=account and account.pw_uid,
            group=account and account.pw_gid,
            extra_groups=[] if account else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while not self._listens():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        """End it at once, and with it all connections."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()

    def url(self, db: Db, role: str = "postgres") -> str:
        """The way to a database through here."""
        return f"postgresql://{role}@/{db.name}?host={quote(str(self.folder), safe='')}&port={self.port}"

    def connect(self, db: Db) -> psycopg.Connection[tuple[object, ...]]:
        """Open a connection through here, as another application that shares the pool."""
        return psycopg.connect(self.url(db), autocommit=True, prepare_threshold=None)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.folder / f".s.PGSQL.{self.port}")) == 0

    def _configuration(self) -> str:
        assert CONFIGURATION is not None
        lines = CONFIGURATION.read_text().replace("[databases]\n", f"[databases]\n* = host={self.cluster.sockets}\n")
        ours = {
            "logfile": str(self.folder / "log"),
            "pidfile": str(self.folder / "pid"),
            "listen_addr": "",
            "listen_port": str(self.port),
            "unix_socket_dir": str(self.folder),
            "auth_type": "trust",
            "auth_file": str(self.folder / "users"),
            "pool_mode": "transaction",
            **self.settings,
        }
        kept = re.sub(rf"^({'|'.join(ours)}) *=.*\n", "", lines, flags=re.M)
        return kept + "".join(f"{name} = {value}\n" for name, value in ours.items())
