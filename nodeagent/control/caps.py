"""Power caps that protect a breaker: their safe state is to stay, so they live apart from everything that is restored.

Each owner kind may have one cap on a GPU; the lowest counts. A cap outlives its lease, the agent and a reboot, and
goes only when its own kind (or a stronger one that names the GPU) releases it. They have a file of their own, because
the journal's rule, "unknown means restore", is the wrong one here: an unreadable file means that every limit stays as
it is found. control/actuator.py writes the GPUs.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.clock import Clock
from common.logs import get_logger
from nodeagent.control import tripwire
from nodeagent.control.journal import DurableTable, JournalUnreadable
from nodeagent.control.leases import GUARD, Owner, OwnerKind
from nodeagent.files import keep_aside, write_durably
from nodeagent.gpu.driver import GpuError
from nodeagent.gpu.inventory import Inventory

log = get_logger(__name__)

VERSION = 1
CapKey = tuple[str, OwnerKind]


@dataclass(frozen=True, slots=True)
class Cap:
    """One standing cap."""

    gpu_uuid: str
    owner: Owner
    limit_w: float
    reason: str
    captured_w: float | None
    """What was found before the first write, to go back to when the last cap is released. None: look before the next
    write, as after a reboot."""

    @property
    def key(self) -> CapKey:
        return self.gpu_uuid, self.owner.kind


class Caps:
    """All standing caps of this node."""

    def __init__(self, path: Path, boot_id: str, caps: Iterable[Cap] = ()) -> None:
        self._table: DurableTable[CapKey, Cap] = DurableTable(
            path, lambda entries: dump(boot_id, entries), {cap.key: cap for cap in caps}
        )
        self._unrecorded: dict[CapKey, Cap] = {}

    def all(self) -> list[Cap]:
        """By GPU, the strongest owner first."""
        merged = self._table.entries | self._unrecorded
        return sorted(merged.values(), key=lambda cap: (cap.gpu_uuid, -cap.owner.kind))

    def of(self, uuid: str) -> list[Cap]:
        return [cap for cap in self.all() if cap.gpu_uuid == uuid]

    def find(self, key: CapKey) -> Cap | None:
        return self._unrecorded.get(key) or self._table.entries.get(key)

    def limit_w(self, uuid: str) -> float | None:
        """The lowest cap on a GPU."""
        return min((cap.limit_w for cap in self.of(uuid)), default=None)

    def captured_w(self, uuid: str) -> float | None:
        """The limit found before the first cap."""
        return next((cap.captured_w for cap in self.of(uuid) if cap.captured_w is not None), None)

    def found_w(self) -> dict[str, float]:
        """By GPU, the limit found before the first cap, where it is known."""
        return {cap.gpu_uuid: cap.captured_w for cap in self.all() if cap.captured_w is not None}

    async def put(self, cap: Cap) -> None:
        """Returns once it is on disk. Raises OSError, and then nothing has changed."""
        await self._table.put(cap.key, cap)
        self._unrecorded.pop(cap.key, None)

    def put_unrecorded(self, cap: Cap) -> None:
        """Keeps a cap that the disk has no room for: a cap without a record still is in its safe state."""
        self._unrecorded[cap.key] = cap

    async def record(self) -> None:
        """Tries once more to write down what could not be. Raises OSError."""
        for cap in list(self._unrecorded.values()):
            await self.put(cap)

    @property
    def unrecorded(self) -> bool:
        return bool(self._unrecorded)

    async def remove(self, key: CapKey) -> None:
        """Returns once it is gone from disk. Raises OSError, and then the cap stays."""
        if key in self._table.entries:
            await self._table.remove(key)
        self._unrecorded.pop(key, None)

    async def set_captured(self, uuid: str, watts: float) -> None:
        """Notes what was found, in every cap of the GPU. Raises OSError."""
        for cap in self.of(uuid):
            if cap.captured_w is None:
                await self.put(replace(cap, captured_w=watts))


def dump(boot_id: str, caps: Iterable[Cap]) -> bytes:
    """The file's bytes."""
    entries = [
        {
            "gpu_uuid": cap.gpu_uuid,
            "owner_kind": cap.owner.kind.name.lower(),
            "owner": cap.owner.name,
            "limit_w": cap.limit_w,
            "reason": cap.reason,
            "captured_w": cap.captured_w,
        }
        for cap in caps
    ]
    return json.dumps({"version": VERSION, "boot_id": boot_id, "caps": entries}, indent=1).encode()


def load(path: Path, boot_id: str) -> list[Cap]:
    """The caps on file; none where there is no file. Raises JournalUnreadable."""
    try:
        data = json.loads(path.read_bytes())
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r}")
        caps = [_cap(item) for item in data["caps"]]
        # A reboot undoes our write; whoever sets limits at boot has set them again, so the old finding is void.
        return caps if data["boot_id"] == boot_id else [replace(cap, captured_w=None) for cap in caps]
    except FileNotFoundError:
        return []
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise JournalUnreadable(f"{path}: not a file of caps: {error!r}") from None


def _cap(item: dict[str, object]) -> Cap:
    uuid, kind, owner, reason = item["gpu_uuid"], item["owner_kind"], item["owner"], item["reason"]
    limit_w, captured_w = item["limit_w"], item["captured_w"]
    if not isinstance(uuid, str) or not uuid or not isinstance(owner, str) or not isinstance(reason, str):
        raise ValueError(f"bad cap {item!r}")
    if not isinstance(limit_w, int | float) or not math.isfinite(limit_w) or limit_w <= 0:
        raise ValueError(f"bad limit in {item!r}")
    if not (captured_w is None or isinstance(captured_w, int | float)):
        raise ValueError(f"bad captured limit in {item!r}")
    found_w = None if captured_w is None else float(captured_w)
    return Cap(uuid, Owner(OwnerKind[str(kind).upper()], owner), float(limit_w), reason, found_w)


async def recover_caps(
    path: Path, boot_id: str, inventory: Inventory, clock: Clock, found_w: Mapping[str, float]
) -> Caps:
    """The caps as left behind. If they cannot be read, every limit below the default stays as it is found.

    `found_w`: power limits before any write, by GPU, where the journal knows them.
    """
    try:
        caps = Caps(path, boot_id, load(path, boot_id))
    except JournalUnreadable as error:
        caps = await _unknown(path, boot_id, inventory, clock, str(error))
    if tripwire.tripped(path.parent):
        await _keep_emergency(caps, inventory, found_w)
    return caps


async def _keep_emergency(caps: Caps, inventory: Inventory, found_w: Mapping[str, float]) -> None:
    """The floor has tripped: a GPU whose emergency cap found no room on disk keeps the limit that it has."""
    for worker in inventory.workers:
        if worker.facts is None or worker.facts.mig_enabled or caps.find((worker.uuid, OwnerKind.GUARD)) is not None:
            continue
        with contextlib.suppress(GpuError):
            limit_w = await worker.call(lambda device: device.power_limit_w())
            before_w = caps.captured_w(worker.uuid)
            captured_w = found_w.get(worker.uuid, limit_w) if before_w is None else before_w
            reason = "in force when the agent started, the watts floor tripped"
            caps.put_unrecorded(Cap(worker.uuid, GUARD, limit_w, reason, captured_w))


async def _unknown(path: Path, boot_id: str, inventory: Inventory, clock: Clock, why: str) -> Caps:
    caps = []
    for worker in inventory.workers:
        if worker.facts is None or worker.facts.mig_enabled:
            continue
        try:
            limit_w = await worker.call(lambda device: device.power_limit_w())
        except GpuError:
            continue
        default_w = worker.facts.default_power_limit_w
        if limit_w < default_w - 0.5:
            owner = Owner(OwnerKind.OPERATOR, "unknown")
            caps.append(Cap(worker.uuid, owner, limit_w, "found when the file of caps was unreadable", default_w))
    aside = ""
    try:
        aside = str(keep_aside(path, int(clock.wall_s())))
        write_durably(path, dump(boot_id, caps))
    except OSError as problem:
        log.error("unreadable file of caps stays in place", why=str(problem))
    log.error(
        "file of caps is unreadable: power limits stay as they are until an operator releases them",
        why=why,
        kept_as=aside,
        gpus=[cap.gpu_uuid for cap in caps],
    )
    return Caps(path, boot_id, caps)
