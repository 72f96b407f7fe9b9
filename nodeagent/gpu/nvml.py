"""NVIDIA's management library behind gpu/driver.py: the only file that imports pynvml.

Thin on purpose: units are turned into ours (W, J, MHz), error codes into typed errors, nothing is decided. The
library is found the normal way (`libnvidia-ml.so.1` through the loader).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pynvml

from nodeagent.gpu.driver import (
    DriverUnavailable,
    GpuError,
    GpuFacts,
    GpuInvalid,
    GpuLost,
    GpuPermission,
    GpuReading,
    GpuUnresponsive,
    GpuUnsupported,
    GpuUse,
)

T = TypeVar("T")

_KINDS: dict[int, type[GpuError]] = {
    pynvml.NVML_ERROR_GPU_IS_LOST: GpuLost,
    pynvml.NVML_ERROR_RESET_REQUIRED: GpuLost,
    pynvml.NVML_ERROR_NOT_FOUND: GpuLost,
    pynvml.NVML_ERROR_UNINITIALIZED: GpuLost,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: GpuLost,
    pynvml.NVML_ERROR_TIMEOUT: GpuUnresponsive,
    pynvml.NVML_ERROR_NO_PERMISSION: GpuPermission,
    pynvml.NVML_ERROR_NOT_SUPPORTED: GpuUnsupported,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: GpuUnsupported,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: GpuInvalid,
}

# nvml.h, nvmlClocksEventReasons. Software power capping is normal; the hardware ones are not.
_EVENT_REASONS: dict[int, str] = {
    pynvml.nvmlClocksEventReasonGpuIdle: "gpu_idle",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "applications_clocks_setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake_slowdown",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display_clock_setting",
}


class _Typed:
    """Turns NVML's errors into ours. A class: made of a generator it costs more than the calls it stands around."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if isinstance(error, pynvml.NVMLError):
            raise _KINDS.get(error.value, GpuError)(f"NVML: {error}") from None


_typed = _Typed()


def _optional(call: Callable[[], T]) -> T | None:
    """The value, or None where this GPU or driver has none; a GPU that is gone still raises."""
    try:
        with _typed:
            return call()
    except (GpuLost, GpuUnresponsive):
        raise
    except GpuError:
        return None


def decode_event_reasons(mask: int) -> tuple[str, ...]:
    """Names of the set bits, lowest first; a bit this version does not know shows as "unknown_0x…"."""
    names = [
        _EVENT_REASONS.get(1 << bit, f"unknown_{1 << bit:#x}") for bit in range(mask.bit_length()) if mask >> bit & 1
    ]
    return tuple(names)


def pci_numa_node(bus_id: str, root: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The NUMA node of a device by NVML's bus id ("00000000:18:00.0"); None where the kernel does not know."""
    domain, _, rest = bus_id.lower().partition(":")
    try:
        node = int((root / f"{domain[-4:]}:{rest}" / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


class NvmlDriver:
    """The library, initialised once for the life of the process."""

    def __init__(self) -> None:
        """Loads and initialises the library; raises DriverUnavailable with one sentence."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                raise DriverUnavailable("no NVIDIA driver library found: libnvidia-ml.so.1 cannot be loaded") from None
            raise DriverUnavailable(f"the NVIDIA driver does not answer: {error}") from None

    def reload(self) -> None:
        # NVML counts its users; this process is one, once. An error only says that nothing was initialised any more.
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DriverUnavailable(f"the NVIDIA driver does not answer: {error}") from None

    def version(self) -> str:
        with _typed:
            return str(pynvml.nvmlSystemGetDriverVersion())

    def count(self) -> int:
        with _typed:
            return int(pynvml.nvmlDeviceGetCount())

    def open_index(self, index: int) -> NvmlDevice:
        with _typed:
            return NvmlDevice(pynvml.nvmlDeviceGetHandleByIndex(index))

    def open_uuid(self, uuid: str) -> NvmlDevice:
        with _typed:
            device = NvmlDevice(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        if device.uuid != uuid:
            raise GpuLost(f"NVML: asked for {uuid}, got {device.uuid}")
        return device


class NvmlDevice:
    """One GPU by its NVML handle."""

    def __init__(self, handle: object) -> None:
        self._handle = handle
        with _typed:
            self._uuid = str(pynvml.nvmlDeviceGetUUID(handle))

    @property
    def uuid(self) -> str:
        return self._uuid

    def facts(self) -> GpuFacts:
        handle = self._handle
        with _typed:
            index = int(pynvml.nvmlDeviceGetIndex(handle))
            name = str(pynvml.nvmlDeviceGetName(handle))
        memory = _optional(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
        limits_mw = _optional(lambda: pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)) or (0, 0)
        default_mw = _optional(lambda: pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)) or 0
        mig = _optional(lambda: pynvml.nvmlDeviceGetMigMode(handle))
        persistence = _optional(lambda: pynvml.nvmlDeviceGetPersistenceMode(handle))
        return GpuFacts(
            uuid=self._uuid,
            index=index,
            name=name,
            memory_bytes=int(memory.total) if memory is not None else 0,
            sm_clocks_mhz=_optional(self._sm_clocks_mhz) or (),
            memory_clocks_mhz=_optional(self._memory_clocks_mhz) or (),
            min_power_limit_w=limits_mw[0] / 1000,
            max_power_limit_w=limits_mw[1] / 1000,
            default_power_limit_w=default_mw / 1000,
            mig_enabled=mig is not None and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
            persistence_enabled=persistence == pynvml.NVML_FEATURE_ENABLED,
            numa_node=self._numa_node(),
        )

    def _numa_node(self) -> int:
        """From the kernel, by bus address: NVML itself answers on machines with coherent memory only. 0: unknown."""
        pci = _optional(lambda: pynvml.nvmlDeviceGetPciInfo(self._handle))
        if pci is not None:
            bus_id = pci.busId.decode() if isinstance(pci.busId, bytes) else str(pci.busId)
            node = pci_numa_node(bus_id)
            if node is not None:
                return node
        return int(_optional(lambda: pynvml.nvmlDeviceGetNumaNodeId(self._handle)) or 0)

    def _sm_clocks_mhz(self) -> tuple[int, ...]:
        memory_mhz = max(pynvml.nvmlDeviceGetSupportedMemoryClocks(self._handle))
        return tuple(sorted(pynvml.nvmlDeviceGetSupportedGraphicsClocks(self._handle, memory_mhz)))

    def _memory_clocks_mhz(self) -> tuple[int, ...]:
        return tuple(sorted(pynvml.nvmlDeviceGetSupportedMemoryClocks(self._handle)))

    def read(self) -> GpuReading:
        handle = self._handle
        # On Hopper this field is the mean of the last second; the energy counter is what accounting rests on.
        power_mw = _optional(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
        energy_mj = _optional(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        utilization = _optional(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
        limit_mw = _optional(lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle))
        temperature = _optional(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
        reasons = _optional(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        return GpuReading(
            power_w=None if power_mw is None else power_mw / 1000,
            energy_counter_j=None if energy_mj is None else energy_mj / 1000,
            sm_mhz=_optional(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            memory_mhz=_optional(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
            temperature_c=None if temperature is None else float(temperature),
            utilization_ratio=None if utilization is None else utilization.gpu / 100,
            power_limit_w=None if limit_mw is None else limit_mw / 1000,
            event_reasons=() if reasons is None else decode_event_reasons(int(reasons)),
            memory_temperature_c=_optional(self._memory_temperature_c),
        )

    def _memory_temperature_c(self) -> float:
        (field,) = pynvml.nvmlDeviceGetFieldValues(self._handle, [pynvml.NVML_FI_DEV_MEMORY_TEMP])
        if field.nvmlReturn != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(field.nvmlReturn)
        return float(field.value.uiVal)

    def use(self) -> GpuUse:
        handle = self._handle
        with _typed:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        # Version 2 tells memory in use apart from what the driver itself reserves.
        memory = _optional(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
        if memory is None:
            with _typed:
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return GpuUse(frozenset(int(process.pid) for process in processes), int(memory.used))

    def sm_mhz(self) -> int:
        with _typed:
            return int(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM))

    def lock_clocks_mhz(self, min_mhz: int, max_mhz: int) -> None:
        with _typed:
            pynvml.nvmlDeviceSetGpuLockedClocks(self._handle, min_mhz, max_mhz)

    def reset_clocks(self) -> None:
        with _typed:
            pynvml.nvmlDeviceResetGpuLockedClocks(self._handle)

    def lock_memory_clocks_mhz(self, min_mhz: int, max_mhz: int) -> None:
        with _typed:
            pynvml.nvmlDeviceSetMemoryLockedClocks(self._handle, min_mhz, max_mhz)

    def reset_memory_clocks(self) -> None:
        with _typed:
            pynvml.nvmlDeviceResetMemoryLockedClocks(self._handle)

    def power_limit_w(self) -> float:
        with _typed:
            return float(pynvml.nvmlDeviceGetPowerManagementLimit(self._handle)) / 1000

    def set_power_limit_w(self, limit_w: float) -> None:
        with _typed:
            pynvml.nvmlDeviceSetPowerManagementLimit(self._handle, round(limit_w * 1000))
