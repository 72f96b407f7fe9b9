"""Out of service: an operator's word that this node drains, and that controllers start nothing on it.

Kept on disk, so that it holds through restarts and reboots until somebody resumes the node. The engines that were
there are drained as soon as they can be; what an operator starts meanwhile, to try the machine, is left alone.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common.clock import Clock
from common.logs import get_logger
from nodeagent.engine.instances import Instances
from nodeagent.engine.lifecycle import ENDED, State
from nodeagent.errors import Precondition, Refused, Unavailable
from nodeagent.files import sync_directory, write_durably

log = get_logger(__name__)

LOOK_S = 0.5
"""An engine that was starting when the drain began is drained so soon after it became ready."""


@dataclass(frozen=True, slots=True)
class Drained:
    """Who took the node out of service, when and why."""

    by: str
    reason: str
    since_wall_s: float
    engines: tuple[str, ...] = ()
    """The instances that were there."""


class NodeDrain:
    """One per daemon. For the event loop's thread."""

    def __init__(self, path: Path, instances: Instances, clock: Clock) -> None:
        """Reads the state. A file that cannot be read says that the node was drained, if not by whom."""
        self._path = path
        self._instances = instances
        self._clock = clock
        self.state: Drained | None = None
        try:
            data = json.loads(path.read_bytes())
            engines = tuple(str(name) for name in data["engines"])
            self.state = Drained(str(data["by"]), str(data["reason"]), float(data["since_wall_s"]), engines)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.state = Drained("unknown", f"{path} is unreadable: {error}", clock.wall_s())
            log.error("drain file is unreadable; the node stays out of service", path=str(path), why=str(error))

    def require_in_service(self) -> None:
        """Raises Precondition while the node is out of service."""
        if self.state is not None:
            raise Precondition(
                f"the node is out of service ({self.state.by}: {self.state.reason}); `dynamollm node resume` ends that"
            )

    async def begin(self, by: str, reason: str) -> None:
        """Takes the node out of service and drains what is on it. Raises Unavailable if that cannot be put on disk."""
        there = [view.record for view in self._instances.views() if view.record.state not in ENDED]
        drained = Drained(by, reason, self._clock.wall_s(), tuple(record.spec.instance_id for record in there))
        try:
            await asyncio.to_thread(write_durably, self._path, json.dumps(asdict(drained)).encode())
        except OSError as error:
            raise Unavailable(f"the drain cannot be written to {self._path}: {error.strerror or error}") from None
        self.state = drained
        log.warning("node out of service", by=by, reason=reason)
        self.look()

    async def end(self, by: str, reason: str) -> None:
        """Puts the node back into service; engines that drained stay drained. Raises Unavailable."""
        try:
            self._path.unlink(missing_ok=True)
            await asyncio.to_thread(sync_directory, self._path.parent)
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be removed: {error.strerror or error}") from None
        self.state = None
        log.warning("node in service again", by=by, reason=reason)

    async def run(self) -> None:
        """Drains engines as they become ready, for ever."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Drains those that can be drained now."""
        if self.state is None:
            return
        for view in self._instances.views():
            name = view.record.spec.instance_id
            if name in self.state.engines and view.record.state is State.READY and view.record.restart is None:
                try:
                    self._instances.drain(name, f"the node is out of service: {self.state.reason}")
                except Refused as refusal:
                    log.warning("cannot drain yet", instance=name, why=str(refusal))
