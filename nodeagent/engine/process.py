"""Engines as plain processes in sessions of their own, so that they outlive the agent.

Each engine leads a session; its workers are found by that session's id. The kernel does not give a pid away again
while a session of that number lives, so the members of a session are never strangers.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from nodeagent.engine.launcher import Launch, LaunchFailed, ProcessId
from nodeagent.engine.pids import TOKEN_VARIABLE, carries_token, identify, is_same, lives, pid_lives, send

_OURS_ONLY = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "INVOCATION_ID", "JOURNAL_STREAM", "MAINPID")
"""What systemd tells the agent and an engine must not take for its own."""


class ProcessLauncher:
    """Starts engines with the agent's own environment plus what the launch adds."""

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    async def start(self, launch: Launch) -> ProcessId:
        return self._spawn(launch)

    def _spawn(self, launch: Launch) -> ProcessId:
        environment = {name: value for name, value in os.environ.items() if name not in _OURS_ONLY}
        environment |= launch.env | {TOKEN_VARIABLE: launch.token}
        try:
            launch.log_path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            with launch.log_path.open("wb") as log:
                child = subprocess.Popen(
                    launch.argv,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise LaunchFailed(f"{error.filename}: no such program; set engine.command") from None
        except OSError as error:
            raise LaunchFailed(f"{error.filename or launch.argv[0]}: {error.strerror}") from None
        self._children[child.pid] = child
        return identify(child.pid)

    async def find(self, instance_id: str, token: str) -> ProcessId | None:
        for pid in psutil.pids():
            with suppress(psutil.Error, OSError):
                if os.getsid(pid) == pid and carries_token(pid, token):
                    return identify(pid)
        return None

    def alive(self, process: ProcessId) -> bool:
        child = self._children.get(process.pid)
        if child is not None and child.poll() is not None:  # also takes the ended child off the process table
            return False
        return lives(process)

    def members(self, process: ProcessId) -> frozenset[int]:
        self.alive(process)
        if psutil.pid_exists(process.pid) and not is_same(process):
            return frozenset()  # the number was given away again: that session is not ours
        return frozenset(pid for pid in _session(process.pid) if pid_lives(pid))

    async def terminate(self, process: ProcessId) -> None:
        if self.alive(process):
            send(process.pid, signal.SIGTERM)

    async def kill(self, process: ProcessId) -> None:
        for pid in self.members(process):
            send(pid, signal.SIGKILL)

    async def exit_text(self, process: ProcessId) -> str:
        child = self._children.get(process.pid)
        code = child.poll() if child is not None else None
        if code is None:
            return ""
        if code >= 0:
            return f"exit code {code}"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"

    async def close(self) -> None:
        """Nothing holds them."""


def last_line(log_path: str) -> str:
    """Where to look, and the last thing the engine said."""
    try:
        with Path(log_path).open("rb") as file:
            file.seek(max(Path(log_path).stat().st_size - 4096, 0))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return f"see {log_path}" + (f" ({lines[-1][:200]})" if lines else "")


def _session(session_id: int) -> Iterator[int]:
    for pid in psutil.pids():
        with suppress(OSError):
            if os.getsid(pid) == session_id:
                yield pid
