"""A real Postgres for tests: Debian's postgresql, one throw-away cluster, loopback only, gone with its owner.

    reason = missing()            # why there is none here, or ""
    with Postgres() as server:    # 1-2 s
        url = server.new_database()

Postgres refuses to run as root: as root it is run as Debian's `postgres` user.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path
from types import TracebackType

import psycopg

_USER = "postgres"


def missing() -> str:
    """Why no Postgres can be run on this machine, as one sentence; "" when it can."""
    if _binaries() is None:
        return "no PostgreSQL here (apt-get install postgresql-15)"
    if shutil.which("setpriv") is None:
        return "no setpriv here (apt-get install util-linux), with which PostgreSQL is started"
    if os.geteuid() == 0 and subprocess.run(["id", _USER], capture_output=True, check=False).returncode:
        return "no user 'postgres' here, and PostgreSQL does not run as root (apt-get install postgresql-15)"
    return ""


class Postgres:
    """One cluster on a port chosen by the kernel; `stop` and `start` keep port and data."""

    def __init__(self, enter: tuple[str, ...] = (), host: str = "127.0.0.1") -> None:
        """`enter` goes before the server's command (tests/netlab.py), where it then listens on `host`."""
        binaries = _binaries()
        if binaries is None:
            raise RuntimeError(missing())
        self._binaries = binaries
        self._enter, self._host = enter, host
        # Not under pytest's own folders: only their owner may enter those.
        self._folder = Path(tempfile.mkdtemp(prefix="dynamollm-pg-"))
        self._data = self._folder / "data"
        self._log = self._folder / "log"
        self._numbers = count(1)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if os.geteuid() == 0:
                shutil.chown(self._folder, _USER)
            self._run("initdb", "-D", str(self._data), "-U", _USER, "-A", "trust", "-E", "UTF8", "--no-sync")
            if host != "127.0.0.1":
                with (self._data / "pg_hba.conf").open("a", encoding="utf-8") as file:
                    file.write("host all all samenet trust\n")
            self._start_on_free_port()
        except BaseException:
            self.close()
            raise

    def new_database(self) -> str:
        """Makes an empty database and returns its URL."""
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._address(name)

    def start(self, *, patience_s: float = 30.0) -> None:
        """Starts the server and waits until it answers. Raises RuntimeError with the end of its log."""
        command = [str(self._binaries / "postgres"), "-D", str(self._data)]
        for setting in (
            f"port={self.port}",
            f"listen_addresses={self._host}",
            f"unix_socket_directories={self._folder}",
            "fsync=off",
            "max_connections=50",
        ):
            command += ["-c", setting]
        with self._log.open("ab") as log:
            # --pdeathsig: a test run that is killed leaves no server behind.
            self._process = subprocess.Popen(
                [*self._enter, *_as_user("--pdeathsig", "INT"), *command], stdout=log, stderr=log, cwd=self._folder
            )
        deadline_s = time.monotonic() + patience_s
        while time.monotonic() < deadline_s and self._process.poll() is None:
            try:
                psycopg.connect(self._address("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"PostgreSQL does not start: {self._log.read_text(errors='replace')[-800:]}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends all connections and shuts down; SIGQUIT leaves recovery to the next start, as a crash would."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    def close(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Postgres:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_on_free_port(self) -> None:
        for attempt in range(5):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = int(probe.getsockname()[1])
            try:
                self.start()
                return
            except RuntimeError as error:  # another process took the port in between
                if attempt == 4 or "Address already in use" not in str(error):
                    raise

    def _address(self, database: str) -> str:
        return f"postgresql://{_USER}@{self._host}:{self.port}/{database}"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*_as_user(), str(self._binaries / program), *arguments],
            capture_output=True,
            text=True,
            cwd=self._folder,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr.strip()[-800:]}")


def _as_user(*options: str) -> list[str]:
    user = ["--reuid", _USER, "--regid", _USER, "--init-groups"] if os.geteuid() == 0 else []
    return ["setpriv", *user, *options] if user or options else []


def _binaries() -> Path | None:
    """The newest installed server's folder."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    elsewhere = shutil.which("initdb")
    return Path(elsewhere).resolve().parent if elsewhere else None
