"""Warm layouts: engines asleep with their weights in host memory, beside the one that serves on the same GPUs.

The checks before a sleep, a wake-up and a start beside sleepers, and the two acts themselves. An engine is only put to
sleep on proof that it has no work; memory is checked before, on the host and on every GPU, because an engine that
wakes up without enough of it dies.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil

from common.logs import get_logger
from nodeagent.engine.book import Book, owners, sleepers
from nodeagent.engine.command import memory_share
from nodeagent.engine.launcher import Launcher
from nodeagent.engine.lifecycle import Event, State
from nodeagent.engine.proof import MIB, gpu_use
from nodeagent.engine.readahead import weight_bytes
from nodeagent.engine.records import Nap, NapPhase, Record
from nodeagent.engine.vllm import EngineSilent, VllmClient
from nodeagent.errors import Precondition
from nodeagent.gpu.driver import GpuError
from nodeagent.gpu.inventory import Inventory

log = get_logger(__name__)

GIB = 1 << 30
ANSWER_TIMEOUT_S = 2.0


class Naps:
    """Sleep and wake-up of one node's instances."""

    def __init__(self, book: Book, inventory: Inventory, client: VllmClient, launcher: Launcher) -> None:
        self._book = book
        self._inventory = inventory
        self._client = client
        self._launcher = launcher

    # Checks

    async def prepare_sleep(self, record: Record) -> Nap:
        """What the sleep will take; raises Precondition when the host has no room for the weights."""
        config = self._book.config
        name = record.spec.instance_id
        if not config.sleep_mode:
            raise Precondition(f"{name!r} was started without sleep mode; set engine.sleep_mode and restart it")
        try:
            await self._client.sleeping(self._book.url(record), ANSWER_TIMEOUT_S)
        except EngineSilent as error:
            raise Precondition(f"{name!r} was started without sleep mode; restart it ({error})") from None
        awake_bytes = await self._own_bytes(record)
        path = config.model_paths.get(record.spec.model)
        # Without the files the weights' size is unknown; they are not larger than what the engine holds.
        host_bytes = (weight_bytes(Path(path)) if path else 0) or sum(awake_bytes.values())
        naps = [other.nap for other in self._book.alive() if other.nap is not None]
        taken = sum(nap.host_bytes for nap in naps)
        if config.sleep_host_memory_gib:
            room = int(config.sleep_host_memory_gib * GIB) - taken
            where = f"of the {config.sleep_host_memory_gib:g} GiB for sleeping engines {taken / GIB:.1f} GiB are taken"
        else:
            coming = sum(nap.host_bytes for nap in naps if nap.phase is NapPhase.FALLING)
            room = psutil.virtual_memory().available - coming - int(config.sleep_host_reserve_gib * GIB)
            where = f"{room / GIB:.1f} GiB of host memory are free beyond the reserve"
        if host_bytes > room:
            raise Precondition(f"{name!r} cannot sleep: its weights need up to {host_bytes / GIB:.1f} GiB; {where}")
        return Nap(NapPhase.FALLING, host_bytes, awake_bytes)

    async def check_wake(self, record: Record) -> None:
        """Raises Precondition when a GPU belongs to an engine at work or has too little free memory."""
        nap = record.nap
        assert nap is not None, "an instance asleep has a nap"
        name = record.spec.instance_id
        awake = owners(self._book)
        for gpu in record.spec.gpu_uuids:
            if gpu in awake:
                other = awake[gpu]
                raise Precondition(
                    f"{name!r} cannot wake up: {gpu} belongs to {other.spec.instance_id!r}, which is "
                    f"{other.state.value}; put that one to sleep or stop it first"
                )
            need = nap.awake_bytes.get(gpu, 0) - nap.asleep_bytes.get(gpu, 0)
            await self._require_memory(gpu, need, f"{name!r} cannot wake up")

    async def check_start_beside(self, gpu: str) -> None:
        """Raises Precondition when engines asleep leave too little of a GPU for another one."""
        asleep = sleepers(self._book, gpu)
        worker = self._inventory.find(gpu)
        if not asleep or worker is None or worker.facts is None:
            return
        share = memory_share(self._book.config)
        names = ", ".join(repr(record.spec.instance_id) for record in asleep)
        await self._require_memory(
            gpu,
            int(share * worker.facts.memory_bytes),
            f"no room for an engine with --gpu-memory-utilization {share:g} beside {names} asleep",
            "; a layout whose weights fill its GPUs (a 70B model on two) rarely fits beside a sleeping one: stop that "
            "one, or lower the utilisation",
        )

    async def _require_memory(self, gpu: str, need: int, trouble: str, advice: str = "") -> None:
        worker = self._inventory.find(gpu)
        use = await gpu_use(self._inventory, gpu)
        if isinstance(use, str) or worker is None or worker.facts is None:
            raise Precondition(f"{trouble}: {use if isinstance(use, str) else f'{gpu} does not answer'}")
        free = worker.facts.memory_bytes - use.memory_used_bytes
        if need > free:
            raise Precondition(f"{trouble}: {gpu} has {free // MIB} MiB free, {need // MIB} MiB are needed{advice}")

    # Acts

    async def fall_asleep(self, instance_id: str) -> None:
        """Ends asleep; still draining, with a reason, when it refuses; raises EngineSilent when nobody knows."""
        record = self._book[instance_id]
        nap, url = record.nap, self._book.url(record)
        assert nap is not None, "called for an instance that goes to sleep"
        timeout_s = self._book.config.sleep_timeout_s
        began_s = self._book.now_s()
        if not await self._client.sleeping(url, ANSWER_TIMEOUT_S):
            if not (await self._client.scrape(url, ANSWER_TIMEOUT_S)).idle:
                text = "got new work after its drain and was not put to sleep; draining again"
                self._book.put(record.but(nap=None, drained=False, detail=text))
                return
            try:
                await self._client.sleep(url, timeout_s)
            except EngineSilent as error:
                if await self._client.sleeping(url, ANSWER_TIMEOUT_S):
                    raise EngineSilent(f"{error}, and it is neither awake nor well asleep") from None
                self._book.put(record.but(nap=None, detail=f"drained; not put to sleep: {error}"))
                return
        if not await self._client.sleeping(url, ANSWER_TIMEOUT_S):
            raise EngineSilent("the engine said that it sleeps, and does not")
        asleep_bytes = await self._own_bytes(record)
        power_w = await self._power_w(record)
        nap = nap.but(phase=NapPhase.ASLEEP, asleep_bytes=asleep_bytes, power_w=power_w)
        self._book.move(
            instance_id,
            Event.SLEPT,
            _said(nap),
            nap=nap,
            step_s=self._book.timed(self._book[instance_id], "sleep", began_s),
        )

    async def wake_up(self, instance_id: str) -> None:
        """Ends with the weights back; raises EngineSilent."""
        record = self._book[instance_id]
        url, began_s = self._book.url(record), self._book.now_s()
        if await self._client.sleeping(url, ANSWER_TIMEOUT_S):
            await self._client.wake_up(url, self._book.config.sleep_timeout_s)
            if await self._client.sleeping(url, ANSWER_TIMEOUT_S):
                raise EngineSilent("the engine said that it woke up, and still sleeps")
        record = self._book[instance_id]
        steps = self._book.timed(record, "wake", began_s)
        self._book.put(record.but(nap=None, since_s=self._book.now_s(), step_s=steps, detail="awake; warming up"))

    # Measuring

    async def _own_bytes(self, record: Record) -> dict[str, int]:
        """GPU memory in use by UUID, less what others asleep there hold."""
        found: dict[str, int] = {}
        for gpu in record.spec.gpu_uuids:
            use = await gpu_use(self._inventory, gpu)
            if isinstance(use, str):
                raise Precondition(use)
            others = (other.nap for other in sleepers(self._book, gpu) if other is not record)
            found[gpu] = max(use.memory_used_bytes - sum(nap.asleep_bytes.get(gpu, 0) for nap in others if nap), 0)
        return found

    async def _power_w(self, record: Record) -> float | None:
        """What its GPUs draw together; None when a reading is missing."""
        await asyncio.sleep(0.2)  # power follows the end of the copy after a moment
        total = 0.0
        for gpu in record.spec.gpu_uuids:
            worker = self._inventory.find(gpu)
            if worker is None:
                return None
            try:
                power_w = (await worker.call(lambda device: device.read())).power_w
            except GpuError:
                return None
            if power_w is None:
                return None
            total += power_w
        return round(total, 1)


def _said(nap: Nap) -> str:
    held = sum(nap.asleep_bytes.values()) / GIB
    freed = sum(nap.awake_bytes.values()) / GIB - held
    power = "" if nap.power_w is None else f"; its GPUs drew {nap.power_w:g} W when it fell asleep"
    return f"asleep: {freed:.1f} GiB of GPU memory freed, {held:.1f} GiB kept{power}"


def is_falling(record: Record) -> bool:
    """On its way to sleep."""
    return record.state is State.DRAINING and record.nap is not None
