"""Controls over fake GPUs, a virtual clock and a real state directory, for tests of leases, caps and the guard."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from common.clock import VirtualClock
from nodeagent.config import ControlsConfig
from nodeagent.control.controls import Controls
from nodeagent.control.fence import Fence
from nodeagent.control.journal import load
from nodeagent.control.leases import Owner, OwnerKind
from nodeagent.control.recovery import recover
from nodeagent.control.results import Result, Wish
from nodeagent.control.settings import ClockLock, ControlKey, Setting
from nodeagent.gpu.inventory import Inventory
from nodeagent.telemetry.metrics import AgentMetrics
from tests.fakegpu import FakeDriver

CONTROLLER = Owner(OwnerKind.CONTROLLER, "ctl-1")
OPERATOR = Owner(OwnerKind.OPERATOR, "ada")


class Rig:
    """Controls over fake GPUs, a virtual clock and a real state directory."""

    def __init__(self, path: Path, driver: FakeDriver, config: ControlsConfig | None = None) -> None:
        self.path, self.driver, self.clock = path, driver, VirtualClock()
        self.config = config or ControlsConfig(stop_deadline_s=1.0)
        self.inventory = Inventory(driver, call_deadline_s=5.0)

    async def open(self, boot_id: str = "boot-1") -> Rig:
        await self.inventory.open()
        self.caps, self.journal = await recover(
            self.path / "caps.json", self.path / "journal.json", boot_id, self.inventory, self.clock
        )
        self.fence = Fence(self.path / "term.json", self.clock)
        metrics = AgentMetrics(CollectorRegistry())
        self.metrics = metrics
        self.controls = Controls(self.inventory, self.journal, self.caps, self.fence, self.clock, self.config, metrics)
        return self

    async def apply(
        self, *settings: Setting, gpu: int = 0, owner: Owner = CONTROLLER, ttl_s: float = 15.0, term: int = 1
    ) -> list[Result]:
        wishes = [Wish(self.driver.gpus[gpu].uuid, setting) for setting in settings]
        return await self.controls.apply(owner, "test", ttl_s, term, wishes)

    async def lock(self, mhz: int = 990, gpu: int = 0, owner: Owner = CONTROLLER, ttl_s: float = 15.0) -> Result:
        return (await self.apply(ClockLock(mhz, mhz), gpu=gpu, owner=owner, ttl_s=ttl_s))[0]

    async def after(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.controls.sweep()

    def on_disk(self) -> list[ControlKey]:
        return [intent.key for intent in load(self.path / "journal.json")[1]]
