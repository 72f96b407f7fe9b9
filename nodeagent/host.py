"""The host itself: facts that do not change while it runs, and how much memory its NUMA nodes have free."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

_NODES = Path("/sys/devices/system/node")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class NumaNode:
    """Memory and processors that lie together."""

    id: int
    memory_bytes: int
    cpus: str
    """As the kernel lists them: "0-31,64-95"."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Name, boot and size of this machine."""

    hostname: str
    boot_id: str
    """Changes with every boot."""
    cpu_count: int
    memory_bytes: int
    numa: tuple[NumaNode, ...] = ()
    """Empty where the kernel tells nothing of them."""


def host_facts() -> HostFacts:
    """Reads them."""
    try:
        boot_id = _BOOT_ID.read_text().strip()
    except OSError:  # psutil knows the boot's time only; it serves where /proc is masked
        boot_id = f"boot-{psutil.boot_time():.0f}"
    return HostFacts(platform.node(), boot_id, psutil.cpu_count() or 1, psutil.virtual_memory().total, numa_nodes())


def numa_nodes(root: Path = _NODES) -> tuple[NumaNode, ...]:
    """The NUMA nodes with memory. psutil knows nothing of them, so the kernel is asked."""
    found = []
    for number in _numbers(root):
        memory = _memory_bytes(root, number, "MemTotal")
        try:
            cpus = (root / f"node{number}" / "cpulist").read_text().strip()
        except OSError:
            cpus = ""
        if memory:
            found.append(NumaNode(number, memory, cpus))
    return tuple(found)


def numa_free_bytes(nodes: tuple[NumaNode, ...], root: Path = _NODES) -> tuple[tuple[int, int], ...]:
    """Id and free memory of each node that answers."""
    free = ((node.id, _memory_bytes(root, node.id, "MemFree")) for node in nodes)
    return tuple((number, size) for number, size in free if size is not None)


def _numbers(root: Path) -> list[int]:
    try:
        return sorted(int(path.name[4:]) for path in root.iterdir() if re.fullmatch(r"node\d+", path.name))
    except OSError:
        return []


def _memory_bytes(root: Path, number: int, name: str) -> int | None:
    try:
        text = (root / f"node{number}" / "meminfo").read_text()
    except OSError:
        return None
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None
