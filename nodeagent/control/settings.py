"""The controls this agent knows, as a table: how each is clamped, captured, written and made safe again.

Pure but for the driver calls it describes. control/controls.py drives it; a new control is a new row here.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

from nodeagent.gpu.driver import GpuDevice, GpuFacts


class ControlKind(enum.Enum):
    """What can be controlled on a GPU. The values stand in the journal: never rename one."""

    CLOCK_LOCK = "clock_lock"
    MEMORY_CLOCK_LOCK = "memory_clock_lock"
    POWER_LIMIT = "power_limit"

    __hash__ = object.__hash__  # members are single objects; the inherited hash is a Python function on the hot path


@dataclass(frozen=True, slots=True)
class ClockLock:
    """Keeps the SM clock between two bounds."""

    min_mhz: int
    max_mhz: int

    def __str__(self) -> str:
        return f"{self.min_mhz}-{self.max_mhz} MHz"


@dataclass(frozen=True, slots=True)
class MemoryClockLock:
    """Keeps the memory clock between two bounds."""

    min_mhz: int
    max_mhz: int

    def __str__(self) -> str:
        return f"memory {self.min_mhz}-{self.max_mhz} MHz"


@dataclass(frozen=True, slots=True)
class PowerLimit:
    """Caps the GPU's power."""

    limit_w: float
    protects: bool = False
    """A cap that protects a breaker: it outlives its lease, the agent and a reboot (control/caps.py)."""

    def __str__(self) -> str:
        return f"{self.limit_w:g} W"


Setting = ClockLock | MemoryClockLock | PowerLimit


class OutOfRange(Exception):
    """No allowed value lies near what was asked for; the message says why."""


@dataclass(frozen=True, slots=True, order=True)
class ControlKey:
    """One control of one GPU."""

    gpu_uuid: str
    kind: ControlKind

    def __str__(self) -> str:
        return f"{self.kind.value} of {self.gpu_uuid}"


@dataclass(frozen=True, slots=True)
class Control:
    """One row of the table."""

    safe_state: str
    """What restoring means, in words for people."""
    restore_after_reboot: bool
    """Whether the safe state must also be restored when the machine has rebooted since the write."""
    clamp: Callable[[Setting, GpuFacts], Setting]
    """The nearest allowed setting; raises OutOfRange."""
    capture: Callable[[GpuDevice], float | None]
    """What must be known, before the first write, to restore later."""
    fallback: Callable[[GpuFacts], float | None]
    """Stands in for the captured value when that was lost with an unreadable journal."""
    write: Callable[[GpuDevice, Setting], None]
    restore: Callable[[GpuDevice, float | None], None]


def kind_of(setting: Setting) -> ControlKind:
    """Which control a setting is for."""
    return _KINDS[type(setting)]


def clamp_clock_lock(lock: Setting, facts: GpuFacts) -> ClockLock:
    """Rounds both bounds down to the GPU's grid, never above what was asked for unless below the lowest clock."""
    assert isinstance(lock, ClockLock)
    return ClockLock(*_bounds_on_grid(lock, facts.sm_clocks_mhz))


def clamp_memory_clock_lock(lock: Setting, facts: GpuFacts) -> MemoryClockLock:
    """The same for the memory clock, whose grid has a few steps only."""
    assert isinstance(lock, MemoryClockLock)
    return MemoryClockLock(*_bounds_on_grid(lock, facts.memory_clocks_mhz))


def clamp_power_limit(limit: Setting, facts: GpuFacts) -> PowerLimit:
    """Moves the limit into what the GPU allows."""
    assert isinstance(limit, PowerLimit)
    if not math.isfinite(limit.limit_w) or limit.limit_w <= 0:
        raise OutOfRange(f"{limit.limit_w} W is not a power limit")
    if facts.max_power_limit_w <= 0:
        raise OutOfRange("the GPU reports no range of power limits")
    return PowerLimit(min(max(limit.limit_w, facts.min_power_limit_w), facts.max_power_limit_w), limit.protects)


def _bounds_on_grid(lock: ClockLock | MemoryClockLock, grid: tuple[int, ...]) -> tuple[int, int]:
    if not grid:
        raise OutOfRange("the GPU reports no clocks it could be locked to")
    if lock.max_mhz <= 0 or lock.min_mhz > lock.max_mhz:
        raise OutOfRange(f"{lock.min_mhz}-{lock.max_mhz} MHz is not a range of clocks")
    return _on_grid(lock.min_mhz, grid), _on_grid(lock.max_mhz, grid)


def _on_grid(mhz: int, grid: tuple[int, ...]) -> int:
    return grid[max(bisect.bisect_right(grid, mhz) - 1, 0)]


def _write_clock_lock(device: GpuDevice, lock: Setting) -> None:
    assert isinstance(lock, ClockLock)
    device.lock_clocks_mhz(lock.min_mhz, lock.max_mhz)


def _write_memory_clock_lock(device: GpuDevice, lock: Setting) -> None:
    assert isinstance(lock, MemoryClockLock)
    device.lock_memory_clocks_mhz(lock.min_mhz, lock.max_mhz)


def _write_power_limit(device: GpuDevice, limit: Setting) -> None:
    assert isinstance(limit, PowerLimit)
    device.set_power_limit_w(limit.limit_w)


def _restore_power_limit(device: GpuDevice, captured_w: float | None) -> None:
    if captured_w is not None:
        device.set_power_limit_w(captured_w)


_KINDS: dict[type[Setting], ControlKind] = {
    ClockLock: ControlKind.CLOCK_LOCK,
    MemoryClockLock: ControlKind.MEMORY_CLOCK_LOCK,
    PowerLimit: ControlKind.POWER_LIMIT,
}

CONTROLS: dict[ControlKind, Control] = {
    # A lock has no getter, so "unlocked" is the only baseline there is. Unlocking twice does no harm.
    ControlKind.CLOCK_LOCK: Control(
        safe_state="clocks unlocked",
        restore_after_reboot=True,
        clamp=clamp_clock_lock,
        capture=lambda device: None,
        fallback=lambda facts: None,
        write=_write_clock_lock,
        restore=lambda device, captured: device.reset_clocks(),
    ),
    ControlKind.MEMORY_CLOCK_LOCK: Control(
        safe_state="memory clock unlocked",
        restore_after_reboot=True,
        clamp=clamp_memory_clock_lock,
        capture=lambda device: None,
        fallback=lambda facts: None,
        write=_write_memory_clock_lock,
        restore=lambda device, captured: device.reset_memory_clocks(),
    ),
    # Back to what we found, not to the factory's value: an operator may have set it on purpose. A reboot undoes our
    # write by itself, and whoever sets limits at boot has set them again; writing the old one would undo that.
    ControlKind.POWER_LIMIT: Control(
        safe_state="power limit as found before the first write",
        restore_after_reboot=False,
        clamp=clamp_power_limit,
        capture=lambda device: device.power_limit_w(),
        fallback=lambda facts: facts.default_power_limit_w or None,
        write=_write_power_limit,
        restore=_restore_power_limit,
    ),
}
