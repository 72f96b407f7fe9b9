"""What it takes to run engine processes: start one, find it again, end it.

engine/process.py does it with plain processes, engine/systemd.py with units. An engine outlives the agent under either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class LaunchFailed(Exception):
    """The process could not be started; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of an engine."""

    instance_id: str
    token: str
    """Unique for this start; the process carries it, so that it can be found when its pid was never written down."""
    argv: tuple[str, ...]
    env: dict[str, str]
    log_path: Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that no other can be mistaken for: pids are used again, pid and start time together are not."""

    pid: int
    started_s: float
    """Seconds from boot to the process's start; unlike a wall time it does not move when the clock is set."""
    unit: str = ""
    """The unit it leads, under a launcher that has units."""


class Launcher(Protocol):
    """Starts and ends engines. No call waits for an engine."""

    async def start(self, launch: Launch) -> ProcessId:
        """Raises LaunchFailed."""
        ...

    async def find(self, instance_id: str, token: str) -> ProcessId | None:
        """The leading process of a launch, by its token."""
        ...

    def alive(self, process: ProcessId) -> bool:
        """Whether the leading process lives."""
        ...

    def members(self, process: ProcessId) -> frozenset[int]:
        """Pids of everything that lives of the instance, workers included."""
        ...

    async def terminate(self, process: ProcessId) -> None:
        """Asks the leading process to end."""
        ...

    async def kill(self, process: ProcessId) -> None:
        """Ends everything that lives of the instance, at once."""
        ...

    async def exit_text(self, process: ProcessId) -> str:
        """How the leading process ended, for people; empty when unknown."""
        ...

    async def close(self) -> None:
        """Lets go of the engines; they run on."""
        ...
