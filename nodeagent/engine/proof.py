"""Proves that GPUs are free: no process on them, no memory held. What cannot be shown counts as occupied.

Instances asleep on the same GPUs are no obstacle as long as they hold what they were measured to hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from nodeagent.gpu.driver import GpuError, GpuUse
from nodeagent.gpu.inventory import Inventory

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Who else may be on a GPU, and rightly so."""

    pids: frozenset[int] = frozenset()
    asleep_bytes: int = 0
    awake: bool = False
    """One of them is at work; how much of the memory is its own nobody can tell."""


@dataclass(frozen=True, slots=True)
class Occupied:
    """Why a GPU is not free."""

    text: str
    """One sentence."""
    pids: frozenset[int] = frozenset()
    """Processes on it that are not among the neighbours."""


async def gpu_use(inventory: Inventory, uuid: str) -> GpuUse | str:
    """Who is on a GPU and how much memory is used, or one sentence that says why nobody knows."""
    worker = inventory.find(uuid)
    if worker is None:
        return f"{uuid} is not on this node, or has not answered yet"
    try:
        return await worker.call(lambda device: device.use())
    except GpuError as error:
        return f"{uuid} does not say who is on it: {error}"


async def occupied(
    inventory: Inventory, gpus: Iterable[tuple[str, Neighbours]], free_memory_mib: int
) -> Occupied | None:
    """None when every GPU is proven free but for its neighbours, else what is known of those that are not."""
    found = await asyncio.gather(*(_one(inventory, uuid, others, free_memory_mib) for uuid, others in gpus))
    held = [one for one in found if one is not None]
    if not held:
        return None
    return Occupied(held[0].text, frozenset().union(*(one.pids for one in held)))


async def _one(inventory: Inventory, uuid: str, others: Neighbours, free_memory_mib: int) -> Occupied | None:
    use = await gpu_use(inventory, uuid)
    if isinstance(use, str):
        return Occupied(use)
    used_mib = use.memory_used_bytes // MIB
    if pids := use.pids - others.pids:
        names = ", ".join(_named(pid) for pid in sorted(pids))
        return Occupied(f"{uuid} is in use by {names} ({used_mib} MiB)", pids)
    if not others.awake and used_mib - others.asleep_bytes // MIB >= free_memory_mib:
        beside = f" beside {others.asleep_bytes // MIB} MiB of engines asleep" if others.asleep_bytes else ""
        return Occupied(f"{uuid} has {used_mib} MiB in use although no process shows on it{beside}")
    return None


def _named(pid: int) -> str:
    try:
        return f"pid {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"pid {pid}"
