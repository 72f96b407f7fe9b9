"""What a GPU driver must do for the agent, and the errors it may answer with.

Everything here is blocking and knows no thread: gpu/worker.py calls it, one thread per GPU. gpu/nvml.py is the
NVIDIA one; tests bring their own.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol


class GpuError(Exception):
    """A driver call failed for a reason with no class of its own; nothing is known of its effect."""


class GpuLost(GpuError):
    """The GPU fell off the bus or needs a reset; it is gone until it is opened again."""


class GpuUnresponsive(GpuError):
    """The call did not return in time; whether it takes effect is unknown."""


class GpuPermission(GpuError):
    """The driver refuses this user; nothing was changed."""


class GpuUnsupported(GpuError):
    """The GPU cannot do this; nothing was changed."""


class GpuInvalid(GpuError):
    """The driver refuses these values; nothing was changed."""


class DriverUnavailable(Exception):
    """There is no driver to talk to: library missing, kernel module not loaded."""


class GpuHealth(enum.Enum):
    """Whether a GPU answers."""

    OK = "ok"
    UNRESPONSIVE = "unresponsive"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What does not change while the driver is loaded."""

    uuid: str
    index: int
    name: str
    memory_bytes: int
    sm_clocks_mhz: tuple[int, ...]
    """Clocks a lock can snap to, ascending; empty when the GPU cannot be locked."""
    memory_clocks_mhz: tuple[int, ...]
    """The same for the memory clock."""
    min_power_limit_w: float
    max_power_limit_w: float
    default_power_limit_w: float
    mig_enabled: bool
    persistence_enabled: bool
    numa_node: int


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One look at a GPU. None where the driver has no answer: unknown is not zero."""

    power_w: float | None = None
    """NVML's nvmlDeviceGetPowerUsage: on Hopper the mean of the last second."""
    energy_counter_j: float | None = None
    """The hardware counter as it stands; it starts again at zero when the driver is reloaded."""
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: float | None = None
    utilization_ratio: float | None = None
    power_limit_w: float | None = None
    event_reasons: tuple[str, ...] = ()
    memory_temperature_c: float | None = None


@dataclass(frozen=True, slots=True)
class GpuUse:
    """Who is on a GPU."""

    pids: frozenset[int] = field(default_factory=frozenset)
    memory_used_bytes: int = 0


class GpuDevice(Protocol):
    """One opened GPU. Every method may raise GpuError or one of its kinds."""

    @property
    def uuid(self) -> str: ...

    def facts(self) -> GpuFacts: ...

    def read(self) -> GpuReading: ...

    def use(self) -> GpuUse: ...

    def sm_mhz(self) -> int:
        """The SM clock right now."""
        ...

    def lock_clocks_mhz(self, min_mhz: int, max_mhz: int) -> None: ...

    def reset_clocks(self) -> None:
        """Unlocks the clocks. Harmless when they are not locked."""
        ...

    def lock_memory_clocks_mhz(self, min_mhz: int, max_mhz: int) -> None: ...

    def reset_memory_clocks(self) -> None:
        """Unlocks the memory clock. Harmless when it is not locked."""
        ...

    def power_limit_w(self) -> float:
        """The limit set, which is not always the one enforced."""
        ...

    def set_power_limit_w(self, limit_w: float) -> None: ...


class GpuDriver(Protocol):
    """The library that opens GPUs."""

    def reload(self) -> None:
        """Starts the library anew, after the kernel's driver was loaded again: every device opened before is void.

        Only while no call is under way. Raises DriverUnavailable as long as there is no driver.
        """
        ...

    def version(self) -> str: ...

    def count(self) -> int:
        """How many GPUs there are; indices run from 0."""
        ...

    def open_index(self, index: int) -> GpuDevice: ...

    def open_uuid(self, uuid: str) -> GpuDevice:
        """Finds a GPU again, under whatever index it has now."""
        ...
