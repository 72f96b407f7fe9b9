"""The GPUs of one emulated engine: which they are, what clock and limit they allow, what the engine makes of them.

Reads and writes the host's state file (simulator/host/nvml), through which every NVML client sees the same. Without a
host an engine runs as well, at full clock and unseen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from common.errors import UserError
from simulator.host.nvml.state import STATE_VARIABLE, GpuMemoryError, HostState
from simulator.iteration import Iteration
from simulator.physics import Physics

EXIT_START_FAILED = 1
CONTEXT_BYTES = 1536 << 20
"""What a sleeping engine keeps on each GPU: CUDA context, NCCL buffers, graphs (about 1 to 2 GiB by vLLM's reports)."""


class GpuGroup:
    """The `tp` GPUs that one engine computes on in lock-step."""

    def __init__(self, physics: Physics, tp: int, host: HostState | None, indices: tuple[int, ...]) -> None:
        self._physics = physics
        self._tp = tp
        self._host = host
        self.indices = indices
        self._working = False
        self._held_bytes = 0

    @classmethod
    def from_environment(cls, physics: Physics, tp: int, environment: Mapping[str, str]) -> Self:
        """The first `tp` of CUDA_VISIBLE_DEVICES (UUIDs or indices; all when unset) on the host that
        DYNAMOLLM_NVML_STATE names. Raises UserError.
        """
        if tp not in physics.tps:
            known = ", ".join(str(known) for known in physics.tps)
            raise UserError(
                f"--tensor-parallel-size {tp}: no physics of {physics.name} for it.",
                f"Use one of: {known}.",
                EXIT_START_FAILED,
            )
        path = environment.get(STATE_VARIABLE, "")
        visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        if not path:
            return cls(physics, tp, None, ())
        host = HostState.open(Path(path))
        indices = [_index(host, name) for name in visible] if visible else list(range(host.gpu_count))
        if len(indices) < tp:
            raise UserError(
                f"--tensor-parallel-size {tp} is larger than the number of available GPUs ({len(indices)}).",
                "Name more of them in CUDA_VISIBLE_DEVICES.",
                EXIT_START_FAILED,
            )
        return cls(physics, tp, host, tuple(indices[:tp]))

    def load(self, memory_share: float) -> None:
        """Takes the memory and draws the power of loading. Raises UserError when the memory is not free."""
        host = self._host
        if host is None:
            return
        self._held_bytes = int(memory_share * host.memory_bytes)
        for index in self.indices:
            try:
                host.attach_process(index, os.getpid(), self._held_bytes)
            except GpuMemoryError as error:
                raise UserError(
                    f"GPU {host.uuids[index]}: {error}.",
                    "Another process holds its memory; stop it or lower --gpu-memory-utilization.",
                    EXIT_START_FAILED,
                ) from None
            host.set_activity(index, self._physics.loading_w)
        self._working = True

    def clock_mhz(self) -> int:
        """The clock that work gets now: the slowest GPU holds up the others."""
        if self._host is None:
            return self._physics.clocks_mhz[-1]
        return min(map(self._host.effective_clock_mhz, self.indices))

    def power_limit_w(self) -> float | None:
        """The lowest limit of the group."""
        if self._host is None:
            return None
        return min(map(self._host.power_limit_w, self.indices))

    def work(self, iteration: Iteration) -> None:
        """Shows an iteration that begins."""
        if self._host is None:
            return
        p = self._physics.parameters
        moved = (p.weight_bytes + iteration.context_tokens * p.kv_bytes_per_token) / self._tp
        memory_share = min(1.0, moved / p.hbm_bytes_per_s / iteration.seconds)
        watts, memory_percent = iteration.watts_per_gpu, round(100 * memory_share)
        for index in self.indices:
            self._host.set_activity(index, watts, 100, memory_percent, clock_mhz=iteration.mhz)
        self._working = True

    def rest(self) -> None:
        """Shows that nothing runs."""
        if self._host is not None and self._working:
            for index in self.indices:
                self._host.set_activity(index, 0.0)
        self._working = False

    def offload(self) -> None:
        """Keeps nothing but the contexts: what vLLM's sleep mode leaves on a GPU."""
        self._hold(CONTEXT_BYTES)

    def take_back(self) -> None:
        """The memory as before `offload`. Raises GpuMemoryError when others hold it; nothing is taken then."""
        self._hold(self._held_bytes)

    def _hold(self, used_bytes: int) -> None:
        if self._host is None:
            return
        for index in self.indices:
            try:
                self._host.attach_process(index, os.getpid(), used_bytes)
            except GpuMemoryError:
                for taken in self.indices[: self.indices.index(index)]:
                    self._host.attach_process(taken, os.getpid(), CONTEXT_BYTES)
                raise

    def copy_power(self) -> None:
        """Shows the copy between host and GPU: what loading draws."""
        if self._host is not None:
            for index in self.indices:
                self._host.set_activity(index, self._physics.loading_w)
        self._working = True

    def release(self) -> None:
        """Gives memory and context back."""
        if self._host is not None:
            for index in self.indices:
                self._host.detach_process(index, os.getpid())
            self._host.close()
            self._host = None


def _index(host: HostState, name: str) -> int:
    """Of an index, a UUID or the beginning of one, as CUDA takes them."""
    if name.isdigit():
        if int(name) < host.gpu_count:
            return int(name)
    else:
        found = [index for index, uuid in enumerate(host.uuids) if uuid.startswith(name)]
        if len(found) == 1:
            return found[0]
    raise UserError(
        f"CUDA_VISIBLE_DEVICES names GPU {name}, which host {host.path} does not have.",
        f"Use UUIDs of that host, or indices below {host.gpu_count}.",
        EXIT_START_FAILED,
    )
