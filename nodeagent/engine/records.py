"""What the agent knows of each engine instance, one file each, so that a new agent can take over where one died.

A record is written before the launch and after every step. It names the process by pid and start time; should the
agent die between launch and that, the launch token still finds the process.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

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
    """Measured seconds of finished steps: start, warm, drain, stop."""

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
        data = asdict(record) | {"version": VERSION, "state": record.state.value}
        write_durably(self._path(record.spec.instance_id), json.dumps(data, indent=1).encode())

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


def _parse(data: dict[str, object]) -> Record:
    if data.pop("version") != VERSION:
        raise ValueError("not a record of version 1")
    spec, process = data.pop("spec"), data.pop("process")
    if not isinstance(spec, dict) or not (process is None or isinstance(process, dict)):
        raise ValueError("spec or process is not an object")
    return Record(
        spec=Spec(**{**spec, "gpu_uuids": tuple(spec["gpu_uuids"])}),
        state=State(data.pop("state")),
        process=None if process is None else ProcessId(**process),
        **data,  # type: ignore[arg-type] # unknown or missing keys raise TypeError
    )
