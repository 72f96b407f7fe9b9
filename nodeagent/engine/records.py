"""What the agent knows of each engine instance, one file each, so that a new agent can take over where one died.

A record is written before the launch and after every step. It names the process by pid and start time; should the
agent die between launch and that, the launch token still finds the process.
"""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.clock import Clock
from common.logs import get_logger
from nodeagent.engine.launcher import ProcessId
from nodeagent.engine.lifecycle import State
from nodeagent.files import set_aside, write_durably

log = get_logger(__name__)

VERSION = 1


@dataclass(frozen=True, slots=True)
class Spec:
    """What was asked for."""

    instance_id: str
    model: str
    gpu_uuids: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)


class Step(enum.Enum):
    """Where a restart stands. Written down before the step is taken; the values are on disk: never rename one."""

    DRAIN = "drain"
    STOP = "stop"
    START = "start"
    HEALTH = "health"
    WARM = "warm"


@dataclass(frozen=True, slots=True)
class Restart:
    """A restart that is under way: one transaction, named by its id in logs and details."""

    transaction_id: str
    step: Step
    old_gpus: tuple[str, ...]
    new_gpus: tuple[str, ...]
    began_s: float
    drain_until_s: float
    """On the monotonic clock of this boot; work that is left then is lost."""
    back: bool = False
    """The new layout did not come up; the old one is put back."""
    why_back: str = ""

    def but(self, **changes: object) -> Restart:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type] # checked by the dataclass itself


class NapPhase(enum.Enum):
    """Where a sleep stands; the values are on disk: never rename one."""

    FALLING = "falling"
    ASLEEP = "asleep"
    WAKING = "waking"


@dataclass(frozen=True, slots=True)
class Nap:
    """What a sleep takes, from its beginning until the engine is awake again."""

    phase: NapPhase
    host_bytes: int
    """Host memory that the weights take, at most."""
    awake_bytes: dict[str, int]
    """GPU memory by UUID before the sleep: what waking up needs again."""
    asleep_bytes: dict[str, int] = field(default_factory=dict)
    """GPU memory by UUID that stays in use during it, as measured."""
    power_w: float | None = None
    """What its GPUs draw together, measured when it fell asleep; None when other engines use them."""

    def but(self, **changes: object) -> Nap:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type] # checked by the dataclass itself


@dataclass(frozen=True, slots=True)
class Record:
    """One instance as it stands on disk."""

    spec: Spec
    state: State
    detail: str
    boot_id: str
    token: str
    port: int
    log_path: str
    since_s: float
    """When it came into this state, on the monotonic clock of this boot."""
    process: ProcessId | None = None
    """None until the launch returned."""
    failed: bool = False
    """On the way down because of a failure, not because it was asked to."""
    drained: bool = False
    """The drain is proven."""
    step_s: dict[str, float] = field(default_factory=dict)
    """Measured seconds of finished steps: start, warm, drain, stop, restart, sleep, wake."""
    workers: tuple[ProcessId, ...] = ()
    """Who computes for it since it is ready. The death of one is the death of the instance."""
    restart: Restart | None = None
    nap: Nap | None = None
    held_by: str = ""
    """The operator whose order it obeyed last; empty for a controller's."""

    @property
    def gpus(self) -> frozenset[str]:
        """Every GPU that is its own: during a restart the old ones and the new ones."""
        restart = self.restart
        return frozenset((*self.spec.gpu_uuids, *((*restart.old_gpus, *restart.new_gpus) if restart else ())))

    def but(self, **changes: object) -> Record:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type] # checked by the dataclass itself


class Records:
    """The directory of records."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock

    def save(self, record: Record) -> None:
        """Raises OSError."""
        data = asdict(record) | {"version": VERSION}
        text = json.dumps(data, indent=1, default=lambda value: value.value)  # the only odd values are enum members
        write_durably(self._path(record.spec.instance_id), text.encode())

    def remove(self, instance_id: str) -> None:
        """Forgets an ended instance."""
        self._path(instance_id).unlink(missing_ok=True)

    def load_all(self) -> list[Record]:
        """All readable records. An unreadable one is kept aside; its process, if any, still shows on its GPUs."""
        records = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                records.append(_parse(json.loads(path.read_bytes())))
            except (OSError, ValueError, KeyError, TypeError) as error:
                aside = set_aside(path, int(self._clock.wall_s()))
                log.error("instance record is unreadable", why=str(error), kept_as=str(aside))
        return records

    def _path(self, instance_id: str) -> Path:
        return self._directory / f"{instance_id}.json"


def _parse(data: dict[str, Any]) -> Record:
    if data.pop("version") != VERSION:
        raise ValueError("not a record of version 1")
    spec, process = data.pop("spec"), data.pop("process")
    workers, restart, nap = data.pop("workers", ()), data.pop("restart", None), data.pop("nap", None)
    return Record(
        spec=Spec(**{**spec, "gpu_uuids": tuple(spec["gpu_uuids"])}),
        state=State(data.pop("state")),
        process=None if process is None else ProcessId(**process),
        workers=tuple(ProcessId(**worker) for worker in workers),
        restart=None if restart is None else _restart(restart),
        nap=None if nap is None else Nap(**{**nap, "phase": NapPhase(nap["phase"])}),
        **data,  # unknown or missing keys raise TypeError
    )


def _restart(data: dict[str, Any]) -> Restart:
    gpus = {name: tuple(data[name]) for name in ("old_gpus", "new_gpus")}
    return Restart(**{**data, **gpus, "step": Step(data["step"])})
