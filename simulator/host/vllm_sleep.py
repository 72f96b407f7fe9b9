"""The emulated engine's sleep mode: weights to host memory and back, as vLLM's development endpoints do it.

Asleep it keeps its GPU contexts and draws what idle contexts draw; its weights count against the emulated host's
memory, which all engines of one host share through a folder beside the state file.

Environment: DYNAMOLLM_EMULATED_SLEEP_S and DYNAMOLLM_EMULATED_WAKE_S (seconds, default 5 and 3),
DYNAMOLLM_EMULATED_HOST_MEMORY_GIB (default 2048).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from simulator.host.nvml.state import STATE_VARIABLE, GpuMemoryError
from simulator.host.vllm_gpus import GpuGroup
from simulator.host.vllm_loop import RealTimeEngine

DEFAULT_SLEEP_S = 5.0
DEFAULT_WAKE_S = 3.0
DEFAULT_HOST_GIB = 2048.0
GIB = 1 << 30


class SleepError(Exception):
    """What vLLM would have answered with 500."""


class SleepMode:
    """One engine's; `weight_bytes` is what all its GPUs hold of the model together."""

    def __init__(
        self, engine: RealTimeEngine, gpus: GpuGroup, weight_bytes: int, environment: Mapping[str, str]
    ) -> None:
        self._engine = engine
        self._gpus = gpus
        self._weight_bytes = weight_bytes
        self._sleep_s = _number(environment, "DYNAMOLLM_EMULATED_SLEEP_S", DEFAULT_SLEEP_S)
        self._wake_s = _number(environment, "DYNAMOLLM_EMULATED_WAKE_S", DEFAULT_WAKE_S)
        host_gib = _number(environment, "DYNAMOLLM_EMULATED_HOST_MEMORY_GIB", DEFAULT_HOST_GIB)
        state = environment.get(STATE_VARIABLE, "")
        self._memory = _HostMemory(Path(f"{state}.host-memory"), int(host_gib * GIB)) if state else None
        self._lock = asyncio.Lock()
        self.asleep = False

    async def sleep(self) -> None:
        """Waits for the work there is (mode=wait), then moves the weights. Raises SleepError."""
        async with self._lock:
            if self.asleep:
                return
            if self._memory is not None:
                self._memory.take(self._weight_bytes)
            await self._engine.pause()
            self._gpus.copy_power()
            await asyncio.sleep(self._sleep_s)
            self._gpus.offload()
            self._gpus.rest()
            self.asleep = True

    async def wake_up(self) -> None:
        """Takes the GPUs' memory and moves the weights back. Raises SleepError, still asleep."""
        async with self._lock:
            if not self.asleep:
                return
            try:
                self._gpus.take_back()
            except GpuMemoryError as error:
                raise SleepError(f"CUDA out of memory: {error}") from None
            self._gpus.copy_power()
            await asyncio.sleep(self._wake_s)
            self._gpus.rest()
            if self._memory is not None:
                self._memory.give_back()
            self.asleep = False
            self._engine.resume()


class _HostMemory:
    """One file per sleeping process with the bytes it holds; those of dead processes do not count."""

    def __init__(self, folder: Path, total_bytes: int) -> None:
        self._folder = folder
        self._total_bytes = total_bytes

    def take(self, count: int) -> None:
        self._folder.mkdir(exist_ok=True)
        held = 0
        for path in self._folder.iterdir():
            if not Path(f"/proc/{path.name}").exists():
                path.unlink(missing_ok=True)
                continue
            with suppress(OSError, ValueError):
                held += int(path.read_text())
        if held + count > self._total_bytes:
            raise SleepError(
                f"cannot allocate {count / GIB:.1f} GiB of host memory: {held / GIB:.1f} of "
                f"{self._total_bytes / GIB:g} GiB hold other sleeping engines"
            )
        (self._folder / str(os.getpid())).write_text(str(count))

    def give_back(self) -> None:
        (self._folder / str(os.getpid())).unlink(missing_ok=True)


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise UserError(f"{name}={text}: not a number of that size.", f"Say for example {default:g}.")
    return value
