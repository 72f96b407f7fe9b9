"""Carries out leased controls and makes every control safe again when its lease ends.

One rule does all cleaning up: a control that stands in the journal without a live lease is restored. Expiry, release,
a failed write, the end of the agent and its next start only differ in how they come to that state. Standing caps have
the opposite rule: whatever is on record is brought into force again. Requests arrive from service.py and guard.py;
control/actuator.py writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from common.clock import Clock
from common.logs import get_logger
from nodeagent.config import ControlsConfig
from nodeagent.control.actuator import NOTHING_CHANGED, Actuator, look
from nodeagent.control.caps import Cap, Caps
from nodeagent.control.drift import DriftWatch
from nodeagent.control.fence import Fence
from nodeagent.control.journal import Journal
from nodeagent.control.leases import GUARD, Lease, LeaseTable, Owner, OwnerKind
from nodeagent.control.results import NOT_OBSERVED, Code, Observed, Result, Wish
from nodeagent.control.settings import (
    CONTROLS,
    ClockLock,
    ControlKey,
    ControlKind,
    OutOfRange,
    PowerLimit,
    Setting,
    kind_of,
)
from nodeagent.errors import Invalid, Unavailable
from nodeagent.gpu.driver import GpuError, GpuHealth, GpuReading
from nodeagent.gpu.inventory import Inventory
from nodeagent.gpu.worker import GpuWorker
from nodeagent.telemetry.metrics import AgentMetrics

log = get_logger(__name__)

UNLOCKED = ClockLock(0, 0)
"""How a pin on the clocks shows in a list: held unlocked."""
CLOCKS = (ControlKind.CLOCK_LOCK, ControlKind.MEMORY_CLOCK_LOCK)


class Controls:
    """All controls of this node. For the event loop's thread."""

    def __init__(
        self,
        inventory: Inventory,
        journal: Journal,
        caps: Caps,
        fence: Fence,
        clock: Clock,
        config: ControlsConfig,
        metrics: AgentMetrics,
    ) -> None:
        self._inventory = inventory
        self._journal = journal
        self._caps = caps
        self._fence = fence
        self._clock = clock
        self._config = config
        self._metrics = metrics
        self._actuator = Actuator(inventory, journal, caps, clock, config, metrics)
        self._leases = LeaseTable()
        self._cap_leases: dict[tuple[str, OwnerKind], Lease] = {}
        self._watch = DriftWatch()
        self._gpu_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._restoring: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._next_look_s = math.inf
        """When the expiry loop looks again if nobody wakes it."""
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
            worker = self._inventory.find(uuid)
            if worker is None:
                for index in indices:
                    setting = wishes[index].setting
                    results[index] = Result(uuid, Code.UNKNOWN_GPU, "no such GPU on this node", setting)
                return
            async with self._lock(uuid):
                for index in indices:
                    results[index] = await self._apply_one(wishes[index], lease_of[index], worker)

        await asyncio.gather(*(one_gpu(uuid, indices) for uuid, indices in by_gpu.items()))
        failed = any(result.code is not Code.APPLIED for result in results.values())
        if failed or self._clock.monotonic_s() + self._pause_s() < self._next_look_s:
            self._wake.set()  # else the loop looks in time by itself, and not before the answer has left
        written = Counter(str(result.applied) for result in results.values() if result.applied and not result.detail)
        if written:
            log.info("controls applied", by=str(owner), reason=reason, gpus=dict(written))
        outcomes = Counter((kind_of(wishes[index].setting), result.code) for index, result in results.items())
        for (kind, code), count in outcomes.items():
            self._metrics.control_results.labels(kind.value, code.value).inc(count)
        return [results[index] for index in range(len(wishes))]

    async def release(
        self,
        owner: Owner,
        term: int,
        gpu_uuids: Sequence[str],
        reason: str,
        kinds: Collection[ControlKind] = frozenset(ControlKind),
    ) -> list[Result]:
        """Restores what `owner`'s kind holds, of these kinds; on GPUs named one by one also what a weaker one holds."""
        self._admit(owner, term)
        named = set(gpu_uuids)
        live = self._leases.live(self._clock.monotonic_s())
        keys = [
            key
            for key, lease in live.items()
            if key.kind in kinds and (key.gpu_uuid in named if named else lease.owner.kind is owner.kind)
        ]
        caps = [
            cap.key
            for cap in (self._caps.all() if ControlKind.POWER_LIMIT in kinds else [])
            if (cap.gpu_uuid in named and cap.owner.kind <= owner.kind if named else cap.owner.kind is owner.kind)
        ]
        busy = {key.gpu_uuid for key in keys} | {uuid for uuid, _ in caps}
        results = [self._nothing_held(uuid) for uuid in dict.fromkeys(gpu_uuids) if uuid not in busy]
        log.info("controls released", by=str(owner), reason=reason, controls=len(keys) + len(caps))

        async def one(key: ControlKey) -> Result:
            async with self._lock(key.gpu_uuid):
                lease = self._leases.in_the_way(key, owner.kind, self._clock.monotonic_s())
                if lease is not None:
                    return Result(key.gpu_uuid, Code.HELD, f"held by {lease.owner}: {lease.reason}")
                self._leases.drop(key)
                return await self._actuator.restore(key)

        results += await asyncio.gather(*(self._drop_cap(*key) for key in caps), *(one(key) for key in keys))
        self._wake.set()
        return results

    def held(self) -> list[tuple[ControlKey, Setting, Lease, float]]:
        """Live leases, pins and standing caps: control, setting in force, lease, seconds left (0: until released)."""
        now_s = self._clock.monotonic_s()
        found = [
            (key, self._actuator.setting(key) or lease.setting, lease, lease.expires_at_s - now_s)
            for key, lease in self._leases.live(now_s).items()
        ]
        found += [(key, UNLOCKED, lease, lease.expires_at_s - now_s) for key, lease in self._leases.pins(now_s).items()]
        for cap in self._caps.all():
            setting = PowerLimit(cap.limit_w, protects=True)
            lease = self._cap_leases.get(cap.key) or Lease(cap.owner, cap.reason, 0.0, 0, setting, now_s)
            key = ControlKey(cap.gpu_uuid, ControlKind.POWER_LIMIT)
            found.append((key, setting, lease, max(lease.expires_at_s - now_s, 0.0)))
        return sorted(found, key=lambda item: (str(item[0]), -item[2].owner.kind))

    def locked(self, uuid: str) -> ClockLock | None:
        """The clock lock this agent last wrote, None when it left the clocks unlocked."""
        setting = self._actuator.setting(ControlKey(uuid, ControlKind.CLOCK_LOCK))
        return setting if isinstance(setting, ClockLock) else None

    def unrestored(self) -> list[ControlKey]:
        """Controls that should be safe by now and are not."""
        live = self._leases.live(self._clock.monotonic_s())
        return [key for key in self._journal.entries if key not in live]

    @property
    def standing_caps(self) -> list[Cap]:
        return self._caps.all()

    @property
    def caps_unrecorded(self) -> bool:
        """Whether emergency caps stand that the disk had no room for."""
        return self._caps.unrecorded

    # What the guard does

    async def release_clocks(self, gpu_uuids: Sequence[str], hold_s: float, reason: str) -> list[Result]:
        """Unlocks clocks, whoever holds them, and keeps everybody from locking them for `hold_s`."""
        until_s = self._clock.monotonic_s() + hold_s
        keys = [ControlKey(uuid, kind) for uuid in gpu_uuids for kind in CLOCKS]
        for key in keys:  # before any waiting, so that nobody slips in between
            self._leases.pin(key, Lease(GUARD, reason, hold_s, 0, UNLOCKED, until_s))

        async def one(key: ControlKey) -> Result:
            async with self._lock(key.gpu_uuid):
                self._leases.drop(key)
                return await self._actuator.restore(key)

        results = await asyncio.gather(*(one(key) for key in keys))
        self._wake.set()
        return results

    async def cap_by_guard(self, limits_w: Mapping[str, float], reason: str) -> list[Result]:
        """Caps GPUs at a limit or at what is set now, whichever is lower; the caps stand until they are lifted."""
        results = await asyncio.gather(
            *(self._cap_by_guard(uuid, limit_w, reason) for uuid, limit_w in limits_w.items())
        )
        self._wake.set()
        return results

    async def lift_guard_caps(self) -> list[Result]:
        """Takes the guard's caps away; those of others stay."""
        keys = [cap.key for cap in self._caps.all() if cap.owner.kind is OwnerKind.GUARD]
        return await asyncio.gather(*(self._drop_cap(*key) for key in keys))

    async def _cap_by_guard(self, uuid: str, limit_w: float, reason: str) -> Result:
        wish = PowerLimit(limit_w, protects=True)
        worker = self._inventory.find(uuid)
        if worker is None or worker.facts is None:
            return Result(uuid, Code.GPU_LOST, "the GPU has not answered yet", wish)
        if worker.facts.mig_enabled:
            return Result(uuid, Code.MIG_ENABLED, "MIG is on; the GPU is left alone", wish)
        async with self._lock(uuid):
            setting = CONTROLS[ControlKind.POWER_LIMIT].clamp(wish, worker.facts)
            assert isinstance(setting, PowerLimit)
            now_w: float | None = None
            with contextlib.suppress(GpuError):
                now_w = await worker.call(lambda device: device.power_limit_w())
            # Never up: a limit that is lower already stays the limit.
            cap_w = setting.limit_w if now_w is None else min(setting.limit_w, now_w)
            before = self._caps.find((uuid, OwnerKind.GUARD))
            if before is not None:
                cap_w = min(cap_w, before.limit_w)
                if cap_w == before.limit_w and self._actuator.expected_limit_w(worker) == cap_w == now_w:
                    return Result(uuid, Code.APPLIED, "already capped", wish, PowerLimit(cap_w, protects=True))
            captured_w = self._captured_w(uuid, now_w)
            return await self._actuator.put_cap(Cap(uuid, GUARD, cap_w, reason, captured_w), worker, wish)

    # What telemetry sees

    def observe(self, worker: GpuWorker, reading: GpuReading) -> tuple[str, ...]:
        """Compares a reading with what should be in force; returns the alarms it raises."""
        expected_w = self._actuator.expected_limit_w(worker)
        alarms = self._watch.look(worker, reading, self.locked(worker.uuid), expected_w)
        for kind in self._watch.new_foreign(worker.uuid):
            self._metrics.foreign_writes.labels(kind.value).inc()
            log.error(
                "another program changes this GPU",
                gpu=worker.uuid,
                control=kind.value,
                sm_mhz=reading.sm_mhz,
                limit_w=reading.power_limit_w,
            )
            if kind is ControlKind.POWER_LIMIT and self._caps.limit_w(worker.uuid) is not None:
                cap_w = self._caps.limit_w(worker.uuid)
                if cap_w is not None and (reading.power_limit_w or 0.0) > cap_w:
                    self._actuator.doubt(ControlKey(worker.uuid, kind))
                    self._wake.set()
        return alarms

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
            if self._caps.unrecorded:
                with contextlib.suppress(OSError):
                    await self._caps.record()
            pause_s = self._pause_s()
            self._next_look_s = self._clock.monotonic_s() + pause_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    async def close(self) -> list[ControlKey]:
        """Takes no more requests and restores everything, for at most `stop_deadline_s`; returns what it could not.

        Standing caps stay: that is their safe state.
        """
        self._actuator.closing = True
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
        due: dict[str, list[ControlKey]] = {uuid: [] for uuid in self._actuator.caps_due(now_s)}
        for key in self._journal.entries:
            if key not in live and self._actuator.restores_due(key, now_s):
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
                        await self._actuator.restore(key)
                if uuid in self._actuator.caps_due(self._clock.monotonic_s()):
                    await self._actuator.enforce(uuid)
        finally:
            del self._restoring[uuid]
            self._wake.set()

    def _pause_s(self) -> float:
        """Until the next lease ends or a failed restore is due; the beat keeps it below a second."""
        now_s = self._clock.monotonic_s()
        instants = [now_s + 1.0, *self._actuator.next_retry_s(set(self._restoring))]
        expiry_s = self._leases.next_expiry_s()
        if expiry_s is not None:
            instants.append(expiry_s)
        return max(min(instants) - now_s, 0.0)

    # One control of one GPU, its lock held

    async def _apply_one(self, wish: Wish, lease: Lease, worker: GpuWorker) -> Result:
        key, control = wish.key, CONTROLS[kind_of(wish.setting)]

        def answer(
            code: Code, detail: str = "", applied: Setting | None = None, seen: Observed = NOT_OBSERVED
        ) -> Result:
            return Result(wish.gpu_uuid, code, detail, wish.setting, applied, seen)

        if worker.facts is None:
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
        if self._actuator.closing:
            return answer(Code.DRIVER_ERROR, "the agent is stopping")
        if isinstance(setting, PowerLimit) and setting.protects:
            return await self._stand(wish, setting, lease, worker)
        setting = self._actuator.under_cap(setting, wish.gpu_uuid)
        if setting != wish.setting:
            self._metrics.controls_clamped.labels(key.kind.value).inc()
        foreign = ""
        if self._actuator.is_in_force(key, setting, worker):
            seen = await _observe(worker)
            foreign = self._watch.foreign(worker, key.kind, setting, seen)
            if not foreign:
                self._leases.grant(key, lease)
                return answer(Code.APPLIED, "already in force; lease renewed", setting, seen)
            self._actuator.doubt(key)
        result = await self._actuator.write(key, setting, worker, wish.setting)
        if result.code is Code.APPLIED:
            self._leases.grant(key, lease)
            self._watch.forget(wish.gpu_uuid, key.kind)
            if foreign:
                text = f"{foreign}; written again, but another program changes this GPU"
                return answer(Code.FOREIGN_WRITER, text, setting, result.observed)
        elif result.code not in NOTHING_CHANGED:
            self._leases.drop(key)  # nobody knows what is in force now: the safe state is restored
        return result

    async def _stand(self, wish: Wish, setting: PowerLimit, lease: Lease, worker: GpuWorker) -> Result:
        """A cap that protects: replaces a plain limit of the same owner or a weaker one."""
        uuid, owner = wish.gpu_uuid, lease.owner
        now_w: float | None = None
        if self._captured_w(uuid, None) is None:
            try:
                now_w = await worker.call(lambda device: device.power_limit_w())
            except GpuError as error:
                return Result(uuid, Code.DRIVER_ERROR, f"the limit set now cannot be read: {error}", wish.setting)
        before = self._caps.find((uuid, owner.kind))
        cap = Cap(uuid, owner, setting.limit_w, lease.reason, self._captured_w(uuid, now_w))
        same = before is not None and (before.owner, before.limit_w) == (cap.owner, cap.limit_w)
        if same and self._actuator.expected_limit_w(worker) is not None:
            self._cap_leases[cap.key] = lease
            return Result(uuid, Code.APPLIED, "stands already", wish.setting, setting, await _observe(worker))
        result = await self._actuator.put_cap(cap, worker, wish.setting)
        if self._caps.find(cap.key) == cap:
            self._cap_leases[cap.key] = lease
            if wish.key in self._journal.entries:
                self._leases.drop(wish.key)
                await self._actuator.restore(wish.key)
        return result

    async def _drop_cap(self, uuid: str, kind: OwnerKind) -> Result:
        async with self._lock(uuid):
            result = await self._actuator.drop_cap(uuid, kind)
            if result.code is Code.APPLIED:
                self._cap_leases.pop((uuid, kind), None)
            return result

    def _captured_w(self, uuid: str, now_w: float | None) -> float | None:
        """The limit found before this agent's first write."""
        known_w = self._caps.captured_w(uuid)
        if known_w is not None:
            return known_w
        intent = self._journal.entries.get(ControlKey(uuid, ControlKind.POWER_LIMIT))
        return intent.captured if intent is not None else now_w

    # Small questions

    def _nothing_held(self, uuid: str) -> Result:
        if self._inventory.find(uuid) is None:
            return Result(uuid, Code.UNKNOWN_GPU, "no such GPU on this node")
        return Result(uuid, Code.APPLIED, "nothing was held")

    def _check(self, owner: Owner, ttl_s: float) -> None:
        if self._actuator.closing:
            raise Unavailable("the agent is stopping")
        operator = owner.kind is OwnerKind.OPERATOR
        limit_s = self._config.max_ttl_operator_s if operator else self._config.max_ttl_controller_s
        if not math.isfinite(ttl_s) or not 0 < ttl_s <= limit_s:
            raise Invalid(f"ttl_s is {ttl_s:g}; it must be above 0 and at most {limit_s:g} for this owner")

    def _admit(self, owner: Owner, term: int) -> None:
        if owner.kind is OwnerKind.GUARD:
            raise Invalid("the guard is this node's own; nobody may speak for it")
        if owner.kind is OwnerKind.CONTROLLER:
            holder = Owner(OwnerKind.CONTROLLER, self._fence.holder)
            leases = self._leases.live(self._clock.monotonic_s()).values() if owner != holder else ()
            active = any(lease.owner == holder for lease in leases)
            self._fence.admit(term, owner.name, active)

    def _allowed(self, kind: ControlKind) -> bool:
        return {
            ControlKind.CLOCK_LOCK: self._config.clock_lock,
            ControlKind.MEMORY_CLOCK_LOCK: self._config.memory_clock_lock,
            ControlKind.POWER_LIMIT: self._config.power_limit,
        }[kind]

    def _lock(self, uuid: str) -> asyncio.Lock:
        return self._gpu_locks[uuid]


async def _observe(worker: GpuWorker) -> Observed:
    try:
        return await worker.call(look)
    except GpuError:
        return NOT_OBSERVED
