"""The GPUs of one emulated host, from Python: create them, load them, break them, look at them.

Engine emulators and tests write here; `libnvidia-ml.so.1` shows the same file (DYNAMOLLM_NVML_STATE) to every NVML
client. The file is only ever touched by the C code of that library (host_*.c), called through ctypes: one law for power
and energy, one lock.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from simulator.host.nvml.layout import MAX_GPUS, MAX_IDLE_POINTS, CConfig, CFault, CView, load_library

STATE_VARIABLE = "DYNAMOLLM_NVML_STATE"
MIB = 1 << 20

# Power with a context and no work: 72 W + 50 W · f/1980 · (V/Vmax)², V/Vmax = 0.757 below 1000 MHz, then linear to 1.
# H100 reference data (docs/physics.md). Callers with physics of their own pass a table made from it.
IDLE_POWER_W = ((210, 75.0), (1005, 86.6), (1305, 94.8), (1605, 105.3), (1800, 113.5), (1980, 122.0))


class Calls(enum.Flag):
    """Groups of NVML calls on one GPU that a fault can name; the order is that of `enum emu_calls`."""

    HANDLE = enum.auto()
    IDENTITY = enum.auto()
    TELEMETRY = enum.auto()
    ENERGY = enum.auto()
    MEMORY = enum.auto()
    PROCESSES = enum.auto()
    CLOCK_WRITE = enum.auto()
    POWER_WRITE = enum.auto()
    MODE_WRITE = enum.auto()
    WRITES = CLOCK_WRITE | POWER_WRITE | MODE_WRITE
    ALL = HANDLE | IDENTITY | TELEMETRY | ENERGY | MEMORY | PROCESSES | WRITES


class NvmlError(enum.IntEnum):
    """Codes of nvmlReturn_t that faults are made of (any other code works as well)."""

    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    INSUFFICIENT_POWER = 8
    TIMEOUT = 10
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    IN_USE = 19
    UNKNOWN = 999


class GpuMemoryError(Exception):
    """A context does not fit into the GPU's free memory."""


@dataclass(frozen=True)
class Board:
    """What a GPU model is. Defaults: H100-SXM5-80GB (NVIDIA datasheet; H100 reference data, docs/physics.md)."""

    name: str = "NVIDIA H100 80GB HBM3"
    memory_bytes: int = 81559 * MIB
    memory_reserved_bytes: int = 551 * MIB
    clock_min_mhz: int = 210
    clock_max_mhz: int = 1980
    clock_step_mhz: int = 15
    clock_bare_mhz: int = 345
    memory_clock_mhz: int = 2619
    memory_clock_low_mhz: int = 1593
    power_limit_min_w: float = 200.0
    power_limit_max_w: float = 700.0
    power_limit_default_w: float = 700.0
    power_bare_w: float = 72.0
    idle_power_w: Sequence[tuple[int, float]] = IDLE_POWER_W
    """(SM clock in MHz, W) with a context and no work; rising clocks, linear between, flat beyond"""


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds a context on a GPU, and the work it does."""

    pid: int
    used_bytes: int
    power_w: float
    gpu_util: int
    mem_util: int


@dataclass(frozen=True)
class GpuView:
    """One GPU at one instant, as every NVML client sees it."""

    index: int
    uuid: str
    at_s: float
    """CLOCK_MONOTONIC, the clock of time.monotonic()"""
    energy_j: float
    power_w: float
    clock_mhz: int
    memory_clock_mhz: int
    lock_mhz: tuple[int, int] | None
    power_limit_w: float
    gpu_util: int
    mem_util: int
    temperature_c: int
    idle: bool
    power_capped: bool
    persistence: bool
    mig: bool
    used_bytes: int
    processes: tuple[GpuProcess, ...]


class HostState:
    """Handle on one host's state file; cheap to keep open, usable from several threads.

    Activity stays as written until it is written again: an engine rewrites it every iteration, so after a new clock
    lock its GPUs show the old power for at most one iteration. Idle power follows a lock at once.
    """

    def __init__(self, path: Path, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._library = library
        self._handle: ctypes.c_void_p | None = handle
        self._config = CConfig()
        library.emu_describe(handle, ctypes.byref(self._config))
        self.gpu_count: int = self._config.gpu_count
        self.clock_max_mhz: int = self._config.board.clock_max_mhz
        self.clock_min_mhz: int = self._config.board.clock_min_mhz
        self.clock_step_mhz: int = self._config.board.clock_step_mhz
        self.memory_bytes: int = self._config.board.memory_bytes
        self.uuids: tuple[str, ...] = tuple(gpu.uuid.decode() for gpu in self._config.gpus[: self.gpu_count])

    @classmethod
    def create(
        cls,
        path: Path,
        gpus: int = 8,
        *,
        node: str = "node-0",
        board: Board | None = None,
        driver_version: str = "580.95.05",
        numa_nodes: int = 2,
        root: Path | None = None,
    ) -> HostState:
        """Makes a new host at `path` (replacing one that stood there) and opens it.

        UUIDs and serials follow from `node` alone, so a host keeps its GPUs over restarts. `root` is the build cache.
        Raises UserError for values that no board can have and for a path that cannot be written.
        """
        config = _configure(gpus, node, board or Board(), driver_version, numa_nodes)
        library = load_library(root)
        error = library.emu_create(os.fsencode(path), ctypes.byref(config))
        if error:
            raise UserError(f"{path}: cannot create the GPU state file: {os.strerror(-error)}.", "Name another path.")
        return cls.open(path, root=root)

    @classmethod
    def open(cls, path: Path, *, root: Path | None = None) -> HostState:
        """Opens an existing host; raises UserError when there is none or it is not usable."""
        library = load_library(root)
        handle = ctypes.c_void_p()
        error = -library.emu_open(os.fsencode(path), ctypes.byref(handle))
        if error:
            reasons = {
                errno.ENOENT: "no such GPU state file",
                errno.EPROTO: "is not a GPU state file of this version",
                errno.ESTALE: "was made before the machine's last boot",
            }
            what = reasons.get(error, f"cannot be opened: {os.strerror(error)}")
            raise UserError(f"{path}: {what}.", "Make one: python -m simulator.host.nvml create PATH")
        return cls(path, library, handle)

    def close(self) -> None:
        """Unmaps the file. The host itself lives on in it."""
        if self._handle is not None:
            self._library.emu_close(self._handle)
            self._handle = None

    # What an engine asks and tells, every iteration.

    def lock(self, index: int) -> tuple[int, int] | None:
        """Locked clock range in MHz, or None."""
        packed: int = self._library.emu_lock(self._open_handle(), self._check(index))
        return (packed >> 32, packed & 0xFFFFFFFF) if packed else None

    def power_limit_w(self, index: int) -> float:
        """The power limit in force."""
        limit_mw: int = self._library.emu_power_limit(self._open_handle(), self._check(index))
        return limit_mw / 1000.0

    def effective_clock_mhz(self, index: int, power_w: Callable[[int], float] | None = None) -> int:
        """The SM clock at which work runs now: what the lock leaves, lowered until it meets the power limit.

        `power_w` gives the power of that work at a clock (rising with it); without it only the lock counts. The
        clock so found belongs into `set_activity`, or NVML would show the locked one.
        """
        ceiling_mhz: int = self._library.emu_clock_ceiling(self._open_handle(), self._check(index))
        if power_w is None:
            return ceiling_mhz
        limit_w = self.power_limit_w(index)
        if power_w(ceiling_mhz) <= limit_w:
            return ceiling_mhz
        low, high = 0, (ceiling_mhz - self.clock_min_mhz) // self.clock_step_mhz
        while low < high:
            middle = (low + high + 1) // 2
            if power_w(self.clock_min_mhz + middle * self.clock_step_mhz) <= limit_w:
                low = middle
            else:
                high = middle - 1
        return self.clock_min_mhz + low * self.clock_step_mhz

    def set_activity(
        self,
        index: int,
        power_w: float,
        gpu_util: float = 0,
        mem_util: float = 0,
        *,
        clock_mhz: int | None = None,
        pid: int | None = None,
    ) -> None:
        """Says what a process makes of the GPU from now on: power, utilisation in percent. 0 W ends its work.

        `clock_mhz`: the clock that the power limit left to it, where that is below the lock. `pid`: default this
        process if it has a context there, else load that belongs to nobody and stays until it is written again.
        Raises ProcessLookupError for a `pid` without a context on this GPU. Power over the limit is clipped to it.
        """
        values = (max(0, round(power_w * 1000)), round(gpu_util), round(mem_util), clock_mhz or 0)
        library, handle = self._library, self._open_handle()
        error = library.emu_set_activity(handle, self._check(index), os.getpid() if pid is None else pid, *values)
        if error == -errno.ESRCH and pid is None:
            error = library.emu_set_activity(handle, index, 0, *values)
        _raise_for(error, f"process {pid} has no context on GPU {index} of {self.path}")

    def attach_process(self, index: int, pid: int, used_bytes: int) -> None:
        """Gives a process a context, or changes the memory it holds. It vanishes by itself when the process dies.

        Raises GpuMemoryError when it does not fit, ProcessLookupError when there is no such process.
        """
        error = self._library.emu_attach(self._open_handle(), self._check(index), pid, used_bytes)
        if error == -errno.ENOMEM:
            raise GpuMemoryError(f"{used_bytes / MIB:.0f} MiB do not fit into the free memory of GPU {index}")
        _raise_for(error, f"cannot attach process {pid} to GPU {index} of {self.path}")

    def detach_process(self, index: int, pid: int) -> None:
        """Ends a process's context and its work; one that has none is no error."""
        error = self._library.emu_detach(self._open_handle(), self._check(index), pid)
        if error != -errno.ESRCH:
            _raise_for(error, f"cannot detach process {pid} from GPU {index} of {self.path}")

    # What tests and demonstrations do to a host.

    def observe(self, index: int) -> GpuView:
        """The GPU now, dead processes already gone. Faults do not show here."""
        view = CView()
        _raise_for(self._library.emu_observe(self._open_handle(), self._check(index), 1, ctypes.byref(view)), "observe")
        processes = view.processes[: view.process_count]
        return GpuView(
            index=index,
            uuid=self.uuids[index],
            at_s=view.at_ns / 1e9,
            energy_j=view.energy_nj / 1e9,
            power_w=view.power_mw / 1000.0,
            clock_mhz=view.clock_mhz,
            memory_clock_mhz=view.memory_clock_mhz,
            lock_mhz=(view.lock_min_mhz, view.lock_max_mhz) if view.lock_max_mhz else None,
            power_limit_w=view.power_limit_mw / 1000.0,
            gpu_util=view.gpu_util,
            mem_util=view.mem_util,
            temperature_c=view.temperature_c,
            idle=bool(view.idle),
            power_capped=bool(view.power_capped),
            persistence=bool(view.persistence),
            mig=bool(view.mig),
            used_bytes=view.used_bytes,
            processes=tuple(
                GpuProcess(p.pid, p.used_bytes, p.power_mw / 1000.0, p.gpu_util, p.mem_util) for p in processes
            ),
        )

    def set_fault(
        self,
        index: int,
        calls: Calls = Calls.ALL,
        *,
        error: int = 0,
        delay_s: float = 0.0,
        hang_s: float | None = 0.0,
    ) -> None:
        """Replaces the fault of the named calls: they take `delay_s`, hang for `hang_s` from now (None: until cleared)
        and then return `error` (0: succeed). Delays of clock and power writes are served one at a time per host."""
        fault = CFault(code=int(error), delay_ns=round(delay_s * 1e9))
        if hang_s is None:
            fault.hang_until_ns = (1 << 63) - 1
        elif hang_s > 0:
            fault.hang_until_ns = self._library.emu_now_ns() + round(hang_s * 1e9)
        arguments = (self._open_handle(), self._check(index), calls.value, ctypes.byref(fault))
        _raise_for(self._library.emu_set_fault(*arguments), "set a fault")

    def clear_fault(self, index: int, calls: Calls = Calls.ALL) -> None:
        """Ends faults; hung callers go on."""
        self.set_fault(index, calls)

    def lose(self, index: int) -> None:
        """The GPU falls off the bus: every call on it fails with GPU_IS_LOST."""
        self.set_fault(index, error=NvmlError.GPU_IS_LOST)

    def hang(self, index: int, calls: Calls = Calls.ALL, seconds: float | None = None) -> None:
        """Calls on the GPU do not return for a time, or until `clear_fault`."""
        self.set_fault(index, calls, hang_s=seconds)

    def deny_writes(self, index: int, calls: Calls = Calls.WRITES) -> None:
        """Writes fail as they do for a user who is not root."""
        self.set_fault(index, calls, error=NvmlError.NO_PERMISSION)

    def reset_energy(self, index: int) -> None:
        """The energy counter starts again at zero, as after a driver reload."""
        _raise_for(self._library.emu_reset_energy(self._open_handle(), self._check(index)), "reset the energy counter")

    def unload_driver(self) -> None:
        """The kernel's driver is gone: every client loses its GPUs, and nobody can start NVML."""
        _raise_for(self._library.emu_unload_driver(self._open_handle()), "unload the driver")

    def load_driver(self, order: Sequence[int] | None = None) -> None:
        """It is back: locks gone, limits and energy counters as at power-on. Clients must start NVML again.

        `order`: which GPU of this host stands at each NVML index from now on; by default each at its own.
        """
        wanted = list(order) if order is not None else list(range(self.gpu_count))
        if sorted(wanted) != list(range(self.gpu_count)):
            raise ValueError(f"{wanted} is not an order of {self.gpu_count} GPUs")
        array = (ctypes.c_uint32 * len(wanted))(*wanted)
        _raise_for(self._library.emu_load_driver(self._open_handle(), array), "load the driver")

    def set_mig(self, index: int, enabled: bool) -> None:
        """MIG mode, as an administrator would have set it before."""
        _raise_for(self._library.emu_set_mig(self._open_handle(), self._check(index), int(enabled)), "set MIG mode")

    def _open_handle(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise ValueError(f"{self.path}: host state is closed")
        return self._handle

    def _check(self, index: int) -> int:
        if not 0 <= index < self.gpu_count:
            raise IndexError(f"{self.path} has no GPU {index}, only 0 to {self.gpu_count - 1}")
        return index


def gpu_uuid(node: str, index: int) -> str:
    """The UUID that GPU `index` of host `node` has."""
    return f"GPU-{uuid.UUID(bytes=hashlib.sha256(f'{node}/{index}'.encode()).digest()[:16], version=4)}"


def _raise_for(error: int, what: str) -> None:
    if error == -errno.ESRCH:
        raise ProcessLookupError(errno.ESRCH, what)
    if error:
        raise OSError(-error, f"{what}: {os.strerror(-error)}")


# Where eight modules sit on the PCI buses of an HGX H100 baseboard: four to a CPU socket.
_PCI_BUSES = (0x1B, 0x43, 0x52, 0x61, 0x9D, 0xC3, 0xD1, 0xDF)


def _configure(gpus: int, node: str, board: Board, driver_version: str, numa_nodes: int) -> CConfig:
    table = sorted(board.idle_power_w)
    if not 1 <= gpus <= MAX_GPUS:
        raise UserError(f"A host cannot have {gpus} GPUs.", f"Choose 1 to {MAX_GPUS}.")
    if not 1 <= len(table) <= MAX_IDLE_POINTS or len({mhz for mhz, _ in table}) != len(table):
        raise UserError(f"The idle power table has {len(table)} points.", f"Give 1 to {MAX_IDLE_POINTS}, one a clock.")
    config = CConfig(gpu_count=gpus, driver_version=driver_version.encode())
    target = config.board
    target.name = board.name.encode()
    for name in (
        "memory_bytes",
        "memory_reserved_bytes",
        "clock_min_mhz",
        "clock_max_mhz",
        "clock_step_mhz",
        "clock_bare_mhz",
        "memory_clock_mhz",
        "memory_clock_low_mhz",
    ):
        setattr(target, name, getattr(board, name))
    for name in ("power_limit_min", "power_limit_max", "power_limit_default", "power_bare"):
        setattr(target, f"{name}_mw", round(getattr(board, f"{name}_w") * 1000))
    target.idle_points = len(table)
    for point, (mhz, watts) in enumerate(table):
        target.idle_mhz[point], target.idle_mw[point] = int(mhz), round(watts * 1000)
    for index in range(gpus):
        gpu = config.gpus[index]
        gpu.uuid = gpu_uuid(node, index).encode()
        serial = int.from_bytes(hashlib.sha256(f"{node}/{index}/serial".encode()).digest()[:6], "big")
        gpu.serial = f"165{serial % 10**10:010d}".encode()
        gpu.pci_domain, gpu.pci_bus = index // len(_PCI_BUSES), _PCI_BUSES[index % len(_PCI_BUSES)]
        gpu.numa_node = index * numa_nodes // gpus
    return config
