"""The C side of a host's state, mirrored for ctypes: structures and functions of host_state.h.

Loading the library compares sizes and version with what it was built from, so the two cannot drift apart unseen.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import ClassVar

from common.errors import UserError
from simulator.host.nvml.build import LIBRARY_NAME, ensure_library

LAYOUT_VERSION = 2
MAX_GPUS, MAX_PROCESSES, MAX_IDLE_POINTS = 16, 16, 128


@cache
def load_library(root: Path | None = None) -> ctypes.CDLL:
    """The emulator's library, built under the cache `root` if need be; raises UserError when it cannot be had."""
    path = ensure_library(root) / LIBRARY_NAME
    library = ctypes.CDLL(str(path))
    host, index, pid, number = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int32, ctypes.c_uint32
    prototypes = {
        "emu_check_layout": (ctypes.c_int, [number, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]),
        "emu_create": (ctypes.c_int, [ctypes.c_char_p, ctypes.POINTER(CConfig)]),
        "emu_open": (ctypes.c_int, [ctypes.c_char_p, ctypes.POINTER(host)]),
        "emu_close": (ctypes.c_int, [host]),
        "emu_describe": (None, [host, ctypes.POINTER(CConfig)]),
        "emu_observe": (ctypes.c_int, [host, index, ctypes.c_int, ctypes.POINTER(CView)]),
        "emu_lock": (ctypes.c_uint64, [host, index]),
        "emu_clock_ceiling": (number, [host, index]),
        "emu_power_limit": (number, [host, index]),
        "emu_attach": (ctypes.c_int, [host, index, pid, ctypes.c_uint64]),
        "emu_detach": (ctypes.c_int, [host, index, pid]),
        "emu_set_activity": (ctypes.c_int, [host, index, pid, number, number, number, number]),
        "emu_set_fault": (ctypes.c_int, [host, index, number, ctypes.POINTER(CFault)]),
        "emu_reset_energy": (ctypes.c_int, [host, index]),
        "emu_unload_driver": (ctypes.c_int, [host]),
        "emu_load_driver": (ctypes.c_int, [host, ctypes.POINTER(number)]),
        "emu_set_mig": (ctypes.c_int, [host, index, number]),
        "emu_now_ns": (ctypes.c_int64, []),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    sizes = [ctypes.sizeof(structure) for structure in (CConfig, CView, CFault)]
    if library.emu_check_layout(LAYOUT_VERSION, *sizes):
        raise UserError(f"{path} was built from another host_state.h than layout.py mirrors.", "Reinstall the package.")
    return library


class CBoard(ctypes.Structure):
    _fields_: ClassVar = [
        ("name", ctypes.c_char * 96),
        ("memory_bytes", ctypes.c_uint64),
        ("memory_reserved_bytes", ctypes.c_uint64),
        ("clock_min_mhz", ctypes.c_uint32),
        ("clock_max_mhz", ctypes.c_uint32),
        ("clock_step_mhz", ctypes.c_uint32),
        ("clock_bare_mhz", ctypes.c_uint32),
        ("memory_clock_mhz", ctypes.c_uint32),
        ("memory_clock_low_mhz", ctypes.c_uint32),
        ("power_limit_min_mw", ctypes.c_uint32),
        ("power_limit_max_mw", ctypes.c_uint32),
        ("power_limit_default_mw", ctypes.c_uint32),
        ("power_bare_mw", ctypes.c_uint32),
        ("idle_points", ctypes.c_uint32),
        ("idle_mhz", ctypes.c_uint32 * MAX_IDLE_POINTS),
        ("idle_mw", ctypes.c_uint32 * MAX_IDLE_POINTS),
        ("padding", ctypes.c_uint32),
    ]


class CIdentity(ctypes.Structure):
    _fields_: ClassVar = [
        ("uuid", ctypes.c_char * 48),
        ("serial", ctypes.c_char * 32),
        ("pci_domain", ctypes.c_uint32),
        ("pci_bus", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    ]


class CConfig(ctypes.Structure):
    _fields_: ClassVar = [
        ("gpu_count", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("driver_version", ctypes.c_char * 80),
        ("board", CBoard),
        ("gpus", CIdentity * MAX_GPUS),
    ]


class CProcess(ctypes.Structure):
    _fields_: ClassVar = [
        ("pid", ctypes.c_int32),
        ("power_mw", ctypes.c_uint32),
        ("gpu_util", ctypes.c_uint32),
        ("mem_util", ctypes.c_uint32),
        ("clock_mhz", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("started_ticks", ctypes.c_uint64),
        ("namespace_id", ctypes.c_uint64),
        ("used_bytes", ctypes.c_uint64),
    ]


class CFault(ctypes.Structure):
    _fields_: ClassVar = [
        ("code", ctypes.c_int32),
        ("padding", ctypes.c_uint32),
        ("hang_until_ns", ctypes.c_int64),
        ("delay_ns", ctypes.c_int64),
    ]


class CView(ctypes.Structure):
    _fields_: ClassVar = [
        ("at_ns", ctypes.c_int64),
        ("energy_nj", ctypes.c_uint64),
        ("used_bytes", ctypes.c_uint64),
        ("power_mw", ctypes.c_uint32),
        ("clock_mhz", ctypes.c_uint32),
        ("memory_clock_mhz", ctypes.c_uint32),
        ("lock_min_mhz", ctypes.c_uint32),
        ("lock_max_mhz", ctypes.c_uint32),
        ("power_limit_mw", ctypes.c_uint32),
        ("gpu_util", ctypes.c_uint32),
        ("mem_util", ctypes.c_uint32),
        ("temperature_c", ctypes.c_uint32),
        ("memory_temperature_c", ctypes.c_uint32),
        ("idle", ctypes.c_uint32),
        ("power_capped", ctypes.c_uint32),
        ("persistence", ctypes.c_uint32),
        ("mig", ctypes.c_uint32),
        ("compute_mode", ctypes.c_uint32),
        ("process_count", ctypes.c_uint32),
        ("processes", CProcess * MAX_PROCESSES),
    ]
