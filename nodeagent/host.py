"""Facts of the host that do not change while it runs."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Name, boot and size of this machine."""

    hostname: str
    boot_id: str
    """Changes with every boot."""
    cpu_count: int
    memory_bytes: int


def host_facts() -> HostFacts:
    """Reads them."""
    try:
        boot_id = _BOOT_ID.read_text().strip()
    except OSError:  # psutil knows the boot's time only; it serves where /proc is masked
        boot_id = f"boot-{psutil.boot_time():.0f}"
    return HostFacts(platform.node(), boot_id, psutil.cpu_count() or 1, psutil.virtual_memory().total)
