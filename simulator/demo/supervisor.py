"""Plays systemd for the demonstration's processes: starts them, restarts what dies, ends all of them.

A part that dies is started again after a pause; what its unit would run as ExecStopPost runs first. This process is
made the reaper of its orphans, as PID 1 is on a host: engines outlive the agents that started them, on purpose, and
at the end none of them may stay behind.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from common.errors import UserError

RESTART_PAUSE_S = 1.0
RESTART_LIMIT = 5  # deaths within the window below, and the part counts as broken
RESTART_WINDOW_S = 30.0
STOP_TIMEOUT_S = 10.0
ORPHAN_INTERVAL_S = 0.2
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Part:
    """One process to keep alive. Output goes to `log`, appended over restarts."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of our own
    after_death: Sequence[str] = ()  # a command to run to its end before a restart, and after a stop


class Supervisor:
    """All parts of one run. `said` gets a sentence for each event that a person wants to see."""

    def __init__(self, processes_file: Path, said: Callable[[str], None]) -> None:
        self.restarts: dict[str, int] = {}
        self._file = processes_file
        self._said = said
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._pids: dict[str, int] = {}
        self._orphans: asyncio.Task[None] | None = None

    async def start(self, part: Part) -> None:
        """Starts a part and keeps it alive until `stop`. Raises UserError when it cannot be launched at all."""
        if self._orphans is None:
            become_reaper()
            self._orphans = asyncio.create_task(self._reap_orphans())
        self.restarts.setdefault(part.name, 0)
        process = await self._launch(part)
        self._keepers[part.name] = asyncio.create_task(self._keep(part, process), name=part.name)

    def check(self) -> None:
        """Raises UserError when a part has died for good; its sentence names the log."""
        for task in self._keepers.values():
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def stop(self, name: str) -> None:
        """Ends one part: SIGTERM, after a while SIGKILL. Does nothing for a part that does not run."""
        task = self._keepers.pop(name, None)
        if task is None:
            return
        task.cancel()
        with suppress(asyncio.CancelledError, UserError):
            await task

    async def stop_all(self) -> None:
        """Ends every part, all at once, then whatever they left running."""
        await asyncio.gather(*(self.stop(name) for name in list(self._keepers)))
        if self._orphans is not None:
            self._orphans.cancel()
            with suppress(asyncio.CancelledError):
                await self._orphans
            self._orphans = None
        await asyncio.to_thread(end_descendants)

    async def _launch(self, part: Part) -> asyncio.subprocess.Process:
        with part.log.open("ab") as log:
            try:
                # A session of its own: a Ctrl-C at the terminal reaches only us, and we end the parts in order.
                process = await asyncio.create_subprocess_exec(
                    *part.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **part.environment},
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"{part.name}: {part.command[0]}: {error.strerror}.", "Run scripts/setup.") from None
        self._pids[part.name] = process.pid
        self._write()
        return process

    async def _keep(self, part: Part, process: asyncio.subprocess.Process) -> None:
        deaths: list[float] = []
        try:
            while True:
                code = await process.wait()
                self._forget(part)
                now = time.monotonic()
                deaths = [then for then in deaths if then > now - RESTART_WINDOW_S] + [now]
                if len(deaths) >= RESTART_LIMIT:
                    raise UserError(f"{part.name} keeps dying: {last_line(part.log)}", f"Its log: {part.log}")
                cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                self._said(f"{part.name} (pid {process.pid}) {cause}; starting it again")
                await self._after_death(part)
                await asyncio.sleep(RESTART_PAUSE_S)
                process = await self._launch(part)
                self.restarts[part.name] += 1
        finally:
            if process.returncode is None:
                await _end(process)
                self._forget(part)
                await self._after_death(part)

    async def _after_death(self, part: Part) -> None:
        if not part.after_death:
            return
        with part.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *part.after_death,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **part.environment},
                start_new_session=True,
            )
            try:
                code = await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                code = await process.wait()
        if code:
            self._said(f"{part.name}: {' '.join(part.after_death[-2:])} ended with status {code}, see {part.log}")

    def _forget(self, part: Part) -> None:
        self._pids.pop(part.name, None)
        self._write()

    def _write(self) -> None:
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._pids, indent=1, sort_keys=True), encoding="utf-8")
        temporary.replace(self._file)

    async def _reap_orphans(self) -> None:
        seen = 0
        while True:
            seen = _collect_orphan(seen)
            await asyncio.sleep(ORPHAN_INTERVAL_S)


def _collect_orphan(seen: int) -> int:
    """Collects one dead orphan, so that nobody takes an engine that is gone for one that is still ending.

    `seen` is what the last call returned: asyncio collects the processes we started at once, so a dead child that
    is met twice is an orphan.
    """
    try:
        dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if dead is None or dead.si_pid != seen:
        return dead.si_pid if dead is not None else 0
    with suppress(ChildProcessError):
        os.waitpid(seen, os.WNOHANG)
    return 0


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def become_reaper() -> None:
    """Orphans among our descendants become our children instead of those of PID 1. Linux only, as all of this is."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants(environment: Mapping[str, str] | None = None, timeout_s: float = 3.0) -> None:
    """Ends the processes that stem from this one, or those of them with these variables: asked first, then killed."""
    for send in (psutil.Process.terminate, psutil.Process.kill):
        family = [child for child in psutil.Process().children(recursive=True) if _carries(child, environment or {})]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                send(process)
        psutil.wait_procs(family, timeout=timeout_s)


def _carries(process: psutil.Process, environment: Mapping[str, str]) -> bool:
    if not environment:
        return True
    try:
        return environment.items() <= process.environ().items()
    except psutil.Error:  # it ended meanwhile
        return False


def last_line(log: Path) -> str:
    """The last line that a part wrote, for a message that says why it does not run."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "it wrote nothing"
    return lines[-1] if lines else "it wrote nothing"
