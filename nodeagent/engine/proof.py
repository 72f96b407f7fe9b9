"""Proves that GPUs are free: no process on them, no memory held. What cannot be shown counts as occupied."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import psutil

from nodeagent.gpu.driver import GpuError, GpuUse
from nodeagent.gpu.inventory import Inventory

MIB = 1 << 20


async def occupied(inventory: Inventory, gpu_uuids: Sequence[str], free_memory_mib: int) -> str:
    """Empty when every GPU is proven free, else one sentence that names the first one that is not."""
    texts = await asyncio.gather(*(_one(inventory, uuid, free_memory_mib) for uuid in gpu_uuids))
    return next((text for text in texts if text), "")


async def _one(inventory: Inventory, uuid: str, free_memory_mib: int) -> str:
    worker = inventory.find(uuid)
    if worker is None:
        return f"{uuid} is not on this node, or has not answered yet"
    try:
        use: GpuUse = await worker.call(lambda device: device.use())
    except GpuError as error:
        return f"{uuid} does not say who is on it: {error}"
    used_mib = use.memory_used_bytes // MIB
    if use.pids:
        return f"{uuid} is in use by {', '.join(_named(pid) for pid in sorted(use.pids))} ({used_mib} MiB)"
    if used_mib >= free_memory_mib:
        return f"{uuid} has {used_mib} MiB in use although no process shows on it"
    return ""


def _named(pid: int) -> str:
    try:
        return f"pid {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"pid {pid}"
