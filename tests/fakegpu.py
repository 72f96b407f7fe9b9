"""GPUs in memory for the node agent's tests: a hand-written driver that can be made to fail and tells what it did.

The GPUs outlive any agent made over them, as real ones do: what a "killed" agent locked stays locked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from nodeagent.gpu.driver import GpuFacts, GpuLost, GpuReading, GpuUse

GRID_MHZ = tuple(range(210, 1981, 15))
MEMORY_MHZ = (1593, 2619)


@dataclass
class FakeGpu:
    """One GPU, both the device the agent drives and the handle the test breaks it by."""

    uuid: str
    index: int
    lock_mhz: tuple[int, int] | None = None
    memory_lock_mhz: tuple[int, int] | None = None
    limit_w: float = 650.0
    mig: bool = False
    power_w: float | None = 300.0
    energy_j: float | None = 1000.0
    pids: frozenset[int] = frozenset()
    fault: Exception | None = None
    """Raised by every write."""
    lost: bool = False
    applies_before_fault: bool = False
    """The write takes effect although it then raises: the agent cannot know."""
    gate: threading.Event | None = None
    """While set up and not set, writes hang."""
    on_write: Callable[[str], None] = lambda what: None
    calls: list[str] = field(default_factory=list)

    def facts(self) -> GpuFacts:
        self._answer()
        return GpuFacts(
            self.uuid, self.index, "Fake H100", 80 << 30, GRID_MHZ, MEMORY_MHZ, 200.0, 700.0, 700.0, self.mig, True, 0
        )

    def read(self) -> GpuReading:
        self._answer()
        return GpuReading(power_w=self.power_w, energy_counter_j=self.energy_j, sm_mhz=self.sm_mhz())

    def use(self) -> GpuUse:
        self._answer()
        return GpuUse(self.pids, (1 << 30) * 40 if self.pids else 0)

    def sm_mhz(self) -> int:
        self._answer()
        return self.lock_mhz[1] if self.lock_mhz else 1980

    def lock_clocks_mhz(self, min_mhz: int, max_mhz: int) -> None:
        def effect() -> None:
            self.lock_mhz = (min_mhz, max_mhz)

        self._write(f"lock {min_mhz}-{max_mhz}", effect)

    def reset_clocks(self) -> None:
        def effect() -> None:
            self.lock_mhz = None

        self._write("unlock", effect)

    def lock_memory_clocks_mhz(self, min_mhz: int, max_mhz: int) -> None:
        def effect() -> None:
            self.memory_lock_mhz = (min_mhz, max_mhz)

        self._write(f"lock memory {min_mhz}-{max_mhz}", effect)

    def reset_memory_clocks(self) -> None:
        def effect() -> None:
            self.memory_lock_mhz = None

        self._write("unlock memory", effect)

    def power_limit_w(self) -> float:
        self._answer()
        return self.limit_w

    def set_power_limit_w(self, limit_w: float) -> None:
        def effect() -> None:
            self.limit_w = limit_w

        self._write(f"limit {limit_w:g}", effect)

    def _answer(self) -> None:
        if self.lost:
            raise GpuLost("the fake GPU is lost")

    def _write(self, what: str, effect: Callable[[], None]) -> None:
        self._answer()
        self.calls.append(what)
        if self.gate is not None:
            self.gate.wait(20)
        if self.fault is not None:
            if self.applies_before_fault:
                effect()
            raise self.fault
        self.on_write(what)
        effect()


class FakeDriver:
    """A host of fake GPUs."""

    def __init__(self, count: int = 2) -> None:
        self.reloads = 0
        self.gpus = [FakeGpu(f"GPU-{index}", index) for index in range(count)]

    def version(self) -> str:
        return "fake-1"

    def reload(self) -> None:
        self.reloads += 1

    def count(self) -> int:
        return len(self.gpus)

    def open_index(self, index: int) -> FakeGpu:
        gpu = self.gpus[index]
        gpu.facts()
        return gpu

    def open_uuid(self, uuid: str) -> FakeGpu:
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                gpu.facts()
                return gpu
        raise GpuLost(f"no {uuid}")
