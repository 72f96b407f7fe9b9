"""Carries out leased controls and makes every control safe again when its lease ends.

One rule does all cleaning up: a control that stands in the journal without a live lease is restored. Expiry, release,
a failed write, the end of the agent and its next start only differ in how they come to that state. Requests arrive
from service.py; calls go to the GPU workers; the journal is written in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence

from common.clock import Clock
from common.logs import get_logger
from nodeagent.config import ControlsConfig
from nodeagent.control.fence import Fence
from nodeagent.control.journal import Intent, Journal
from nodeagent.control.leases import Lease, LeaseTable, Owner, OwnerKind
from nodeagent.control.results import NOT_OBSERVED, Code, Observed, Result, Wish, code_of
from nodeagent.control.settings import CONTROLS, ControlKey, ControlKind, OutOfRange, Setting, kind_of
from nodeagent.errors import Invalid, Unavailable
from nodeagent.gpu.driver import (
    GpuDevice,
    GpuError,
    GpuHealth,
    GpuInvalid,
    GpuLost,
    GpuPermission,
    GpuUnsupported,
)
from nodeagent.gpu.inventory import Inventory
from nodeagent.gpu.worker import GpuWorker
from nodeagent.telemetry.metrics import AgentMetrics

log = get_logger(__name__)

UNSURE = -1
"""A generation no worker has: the setting may be in force or not."""


class Controls:
    """All controls of this node. For the event loop's thread."""

    def __init__(
        self,
        inventory: Inventory,
        journal: Journal,
        fence: Fence,
        clock: Clock,
        config: ControlsConfig,
        metrics: AgentMetrics,
    ) -> None:
        self._inventory = inventory
        self._journal = journal
        self._fence = fence
        self._clock = clock
        self._config = config
        self._metrics = metrics
        self._leases = LeaseTable()
        # What the last successful write left on the GPU, with the worker's generation at that time (or UNSURE).
        self._in_force: dict[ControlKey, tuple[Setting, int]] = {}
        # Restored on the GPU, but the journal could not be rewritten: only the journal is tried again.
        self._restored: set[ControlKey] = set()
        self._retry_at_s: dict[ControlKey, float] = {}
        self._gpu_locks: dict[str, asyncio.Lock] = {}
        self._restoring: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._closing = False
        self.last_beat_s = clock.monotonic_s()
        """When the expiry loop last ran; the watchdog looks at it."""

    # Requests

    async def apply(self, owner: Owner, reason: str, ttl_s: float, term: int, wishes: Sequence[Wish]) -> list[Result]:
        """Applies or renews a batch; one result per wish, in order. Raises Refused if the batch as a whole is."""
        arrived_s = self._clock.monotonic_s()
        self._check(owner, ttl_s)
        self._admit(owner, term)
        lease_of = {
            index: Lease(owner, reason, ttl_s, term, wish.setting, arrived_s + ttl_s)
            for index, wish in enumerate(wishes)
        }
        by_gpu: dict[str, list[int]] = {}
        for index, wish in enumerate(wishes):
            by_gpu.setdefault(wish.gpu_uuid, []).append(index)
        results: dict[int, Result] = {}

        async def one_gpu(uuid: str, indices: list[int]) -> None:
            if self._inventory.find(uuid) is None:
                for index in indices:
                    setting = wishes[index].setting
                    results[index] = Result(uuid, Code.UNKNOWN_GPU, "no such GPU on this node", setting)
                return
            async with self._lock(uuid):
                for index in indices:
                    results[index] = await self._apply_one(wishes[index], lease_of[index])

        await asyncio.gather(*(one_gpu(uuid, indices) for uuid, indices in by_gpu.items()))
        self._wake.set()
        for index in range(len(wishes)):
            self._metrics.control_results.labels(wishes[index].key.kind.value, results[index].code.value).inc()
        return [results[index] for index in range(len(wishes))]

    async def release(self, owner: Owner, term: int, gpu_uuids: Sequence[str], reason: str) -> list[Result]:
        """Restores what `owner`'s kind holds; on GPUs named one by one also what a weaker owner holds."""
        self._admit(owner, term)
        now_s = self._clock.monotonic_s()
        live = self._leases.live(now_s)
        if not gpu_uuids:
            keys = [key for key, lease in live.items() if lease.owner.kind is owner.kind]
            results: list[Result] = []
        else:
            keys = [key for key in live if key.gpu_uuid in set(gpu_uuids)]
            busy = {key.gpu_uuid for key in keys}
            results = [self._nothing_held(uuid) for uuid in gpu_uuids if uuid not in busy]
        log.info("controls released", by=str(owner), reason=reason, controls=len(keys))

        async def one(key: ControlKey) -> Result:
            async with self._lock(key.gpu_uuid):
                lease = self._leases.in_the_way(key, owner.kind, self._clock.monotonic_s())
                if lease is not None:
                    return Result(key.gpu_uuid, Code.HELD, f"held by {lease.owner}: {lease.reason}")
                self._leases.drop(key)
                return await self._restore(key)

        results += await asyncio.gather(*(one(key) for key in keys))
        self._wake.set()
        return results

    def held(self) -> list[tuple[ControlKey, Setting, Lease, float]]:
        """Live leases: control, setting in force, lease, seconds left."""
        now_s = self._clock.monotonic_s()
        return [
            (key, self._in_force[key][0] if key in self._in_force else lease.setting, lease, lease.expires_at_s - now_s)
            for key, lease in sorted(self._leases.live(now_s).items(), key=lambda item: str(item[0]))
        ]

    def locked_mhz(self, uuid: str) -> int | None:
        """Upper bound of the clock lock this agent last wrote, None when it left the clocks unlocked."""
        setting, _ = self._in_force.get(ControlKey(uuid, ControlKind.CLOCK_LOCK), (None, 0))
        return getattr(setting, "max_mhz", None)

    def unrestored(self) -> list[ControlKey]:
        """Controls that should be safe by now and are not."""
        live = self._leases.live(self._clock.monotonic_s())
        return [key for key in self._journal.entries if key not in live]

    # Cleaning up

    async def sweep(self) -> None:
        """Restores everything that has no live lease, once; failures stay and are tried again later."""
        self._start_restores()
        if self._restoring:
            await asyncio.gather(*self._restoring.values())

    async def run(self) -> None:
        """Restores at lease expiry, for ever. A GPU that hangs delays no other: each is restored in its own task."""
        while True:
            self._wake.clear()
            self.last_beat_s = self._clock.monotonic_s()
            self._start_restores()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._wake.wait()

    async def close(self) -> list[ControlKey]:
        """Takes no more requests and restores everything, for at most `stop_deadline_s`; returns what it could not."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.stop_deadline_s):
                while self._journal.entries:
                    self._leases.drop_all()  # again each time: a write that was under way may just have been granted
                    await self.sweep()
                    if self._journal.entries:
                        await asyncio.sleep(min(0.1, self._config.restore_retry_s))
        return list(self._journal.entries)

    def _start_restores(self) -> None:
        now_s = self._clock.monotonic_s()
        for key in self._leases.ended(now_s):
            self._leases.drop(key)
            self._metrics.leases_expired.labels(key.kind.value).inc()
            log.warning("lease expired", control=str(key))
        live = self._leases.live(now_s)
        due: dict[str, list[ControlKey]] = {}
        for key in self._journal.entries:
            if key not in live and (self._closing or self._retry_at_s.get(key, now_s) <= now_s):
                due.setdefault(key.gpu_uuid, []).append(key)
        for uuid, keys in due.items():
            if uuid not in self._restoring:
                task = asyncio.get_running_loop().create_task(self._restore_gpu(uuid, keys))
                self._restoring[uuid] = task

    async def _restore_gpu(self, uuid: str, keys: list[ControlKey]) -> None:
        try:
            async with self._lock(uuid):
                for key in keys:
                    leased = self._leases.holder(key, self._clock.monotonic_s()) is not None
                    if key in self._journal.entries and not leased:
                        await self._restore(key)
        finally:
            del self._restoring[uuid]
            self._wake.set()

    def _pause_s(self) -> float:
        """Until the next lease ends or a failed restore is due; the beat keeps it below a second."""
        now_s = self._clock.monotonic_s()
        instants = [now_s + 1.0, *(at for key, at in self._retry_at_s.items() if key.gpu_uuid not in self._restoring)]
        expiry_s = self._leases.next_expiry_s()
        if expiry_s is not None:
            instants.append(expiry_s)
        return max(min(instants) - now_s, 0.0)

    # One control of one GPU, its lock held

    async def _apply_one(self, wish: Wish, lease: Lease) -> Result:
        key, control = wish.key, CONTROLS[kind_of(wish.setting)]

        def answer(
            code: Code, detail: str = "", applied: Setting | None = None, seen: Observed = NOT_OBSERVED
        ) -> Result:
            return Result(wish.gpu_uuid, code, detail, wish.setting, applied, seen)

        worker = self._inventory.find(wish.gpu_uuid)
        if worker is None or worker.facts is None:
            return answer(Code.GPU_LOST, "the GPU has not answered yet")
        if not self._allowed(key.kind):
            return answer(Code.UNSUPPORTED, f"{key.kind.value} is switched off in this agent's configuration")
        if worker.facts.mig_enabled:
            return answer(Code.MIG_ENABLED, "MIG is on; clocks and power belong to the whole GPU and are left alone")
        if worker.health is not GpuHealth.OK:
            lost = worker.health is GpuHealth.LOST
            return answer(Code.GPU_LOST if lost else Code.GPU_UNRESPONSIVE, worker.detail)
        try:
            setting = control.clamp(wish.setting, worker.facts)
        except OutOfRange as error:
            return answer(Code.OUT_OF_RANGE, str(error))
        stronger = self._leases.in_the_way(key, lease.owner.kind, self._clock.monotonic_s())
        if stronger is not None:
            return answer(Code.HELD, f"held by {stronger.owner}: {stronger.reason}")
        if self._closing:
            return answer(Code.DRIVER_ERROR, "the agent is stopping")
        if setting != wish.setting:
            self._metrics.controls_clamped.labels(key.kind.value).inc()
        if self._in_force.get(key) == (setting, worker.generation):
            self._leases.grant(key, lease)
            return answer(Code.APPLIED, "already in force; lease renewed", setting, await _observe(worker))
        return await self._write(key, setting, lease, worker, answer_to=wish)

    async def _write(
        self, key: ControlKey, setting: Setting, lease: Lease, worker: GpuWorker, answer_to: Wish
    ) -> Result:
        control, requested = CONTROLS[key.kind], answer_to.setting
        new = key not in self._journal.entries
        safe = new or key in self._restored
        try:
            if new:
                captured = await worker.call(control.capture)
                if self._closing:
                    return Result(key.gpu_uuid, Code.DRIVER_ERROR, "the agent is stopping", requested)
                try:
                    await self._journal.add(Intent(key, captured))
                except OSError as error:
                    log.error("journal cannot be written; control not applied", control=str(key), why=str(error))
                    text = f"the journal cannot be written: {error.strerror or error}"
                    return Result(key.gpu_uuid, Code.JOURNAL_FAILED, text, requested)
            generation = worker.generation
            self._restored.discard(key)

            def write(device: GpuDevice) -> Observed:
                control.write(device, setting)
                return _look(device)

            observed = await worker.call(write)
        except (GpuPermission, GpuUnsupported, GpuInvalid) as error:
            # Nothing was changed; what was in force before still is, under its own lease.
            if safe and key in self._journal.entries:
                await self._forget(key)
            return Result(key.gpu_uuid, code_of(error), str(error), requested)
        except GpuError as error:
            # Nobody knows what is in force now: end the lease, so that the safe state is restored.
            self._in_force.pop(key, None)
            self._leases.drop(key)
            log.error("control failed", control=str(key), why=str(error))
            return Result(key.gpu_uuid, code_of(error), str(error), requested)
        self._in_force[key] = (setting, generation)
        self._retry_at_s.pop(key, None)
        self._leases.grant(key, lease)
        log.info("control applied", control=str(key), setting=str(setting), by=str(lease.owner), reason=lease.reason)
        return Result(key.gpu_uuid, Code.APPLIED, "", requested, setting, observed)

    async def _restore(self, key: ControlKey) -> Result:
        """Restores one control that has no lease: first the GPU, then the journal."""
        intent = self._journal.entries.get(key)
        if intent is None:
            return Result(key.gpu_uuid, Code.APPLIED, f"already safe: {CONTROLS[key.kind].safe_state}")
        control, observed = CONTROLS[key.kind], NOT_OBSERVED
        if key not in self._restored:
            worker = self._inventory.find(key.gpu_uuid)

            def restore(device: GpuDevice) -> Observed:
                control.restore(device, intent.captured)
                return _look(device)

            try:
                if worker is None:
                    raise GpuLost("the GPU is not on this node any more, or has not answered yet")
                observed = await worker.call(restore)
            except GpuError as error:
                if key in self._in_force:  # still reported, as it most likely is, but no reason to skip a write
                    self._in_force[key] = (self._in_force[key][0], UNSURE)
                if key not in self._retry_at_s:
                    log.error("control not restored; trying on", control=str(key), why=str(error))
                self._retry_at_s[key] = self._clock.monotonic_s() + self._config.restore_retry_s
                self._metrics.restores.labels(key.kind.value, "failed").inc()
                return Result(key.gpu_uuid, code_of(error), str(error))
            self._in_force.pop(key, None)
            self._restored.add(key)
            self._metrics.restores.labels(key.kind.value, "done").inc()
            log.info("control restored", control=str(key), state=control.safe_state)
        await self._forget(key)
        return Result(key.gpu_uuid, Code.APPLIED, control.safe_state, observed=observed)

    async def _forget(self, key: ControlKey) -> None:
        """Takes a safe control out of the journal; if that fails only this is tried again."""
        self._restored.add(key)
        try:
            await self._journal.remove(key)
        except OSError as error:
            self._retry_at_s[key] = self._clock.monotonic_s() + self._config.restore_retry_s
            log.error("journal cannot be rewritten; trying again", control=str(key), why=str(error))
            return
        self._restored.discard(key)
        self._retry_at_s.pop(key, None)

    # Small questions

    def _nothing_held(self, uuid: str) -> Result:
        if self._inventory.find(uuid) is None:
            return Result(uuid, Code.UNKNOWN_GPU, "no such GPU on this node")
        return Result(uuid, Code.APPLIED, "nothing was held")

    def _check(self, owner: Owner, ttl_s: float) -> None:
        if self._closing:
            raise Unavailable("the agent is stopping")
        operator = owner.kind is OwnerKind.OPERATOR
        limit_s = self._config.max_ttl_operator_s if operator else self._config.max_ttl_controller_s
        if not math.isfinite(ttl_s) or not 0 < ttl_s <= limit_s:
            raise Invalid(f"ttl_s is {ttl_s:g}; it must be above 0 and at most {limit_s:g} for this owner")

    def _admit(self, owner: Owner, term: int) -> None:
        if owner.kind is OwnerKind.GUARD:
            raise Invalid("the guard is this node's own; nobody may speak for it")
        if owner.kind is OwnerKind.CONTROLLER:
            leases = self._leases.live(self._clock.monotonic_s()).values()
            active = any(lease.owner == Owner(OwnerKind.CONTROLLER, self._fence.holder) for lease in leases)
            self._fence.admit(term, owner.name, active)

    def _allowed(self, kind: ControlKind) -> bool:
        return self._config.clock_lock if kind is ControlKind.CLOCK_LOCK else self._config.power_limit

    def _lock(self, uuid: str) -> asyncio.Lock:
        return self._gpu_locks.setdefault(uuid, asyncio.Lock())


async def _observe(worker: GpuWorker) -> Observed:
    try:
        return await worker.call(_look)
    except GpuError:
        return NOT_OBSERVED


def _look(device: GpuDevice) -> Observed:
    """Reads back what can be read; a failure here says nothing about the write before it."""
    try:
        return Observed(device.sm_mhz(), device.power_limit_w())
    except GpuError:
        return NOT_OBSERVED
