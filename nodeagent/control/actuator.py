"""Writes one control of one GPU, or makes it safe: journal first, GPU second, and what is known of the outcome.

Knows no leases: control/controls.py decides who may, holds the GPU's lock around every call here, and draws the
conclusions. Standing caps (control/caps.py) are the ceiling under which every power limit is written and restored.
"""

from __future__ import annotations

from common.clock import Clock
from common.logs import get_logger
from nodeagent.config import ControlsConfig
from nodeagent.control.caps import Cap, Caps
from nodeagent.control.journal import Intent, Journal
from nodeagent.control.leases import OwnerKind
from nodeagent.control.results import NOT_OBSERVED, Code, Observed, Result, code_of
from nodeagent.control.settings import CONTROLS, ControlKey, ControlKind, PowerLimit, Setting
from nodeagent.gpu.driver import GpuDevice, GpuError, GpuHealth, GpuInvalid, GpuLost, GpuPermission, GpuUnsupported
from nodeagent.gpu.inventory import Inventory
from nodeagent.gpu.worker import GpuWorker
from nodeagent.telemetry.metrics import AgentMetrics

log = get_logger(__name__)

UNSURE = -1
"""A generation no worker has: the setting may be in force or not."""

NOTHING_CHANGED = frozenset({Code.NO_PERMISSION, Code.UNSUPPORTED, Code.OUT_OF_RANGE, Code.JOURNAL_FAILED})
"""After these, what was in force before still is; after any other failure nobody knows."""


class Actuator:
    """For the event loop's thread, one call at a time per GPU."""

    def __init__(
        self,
        inventory: Inventory,
        journal: Journal,
        caps: Caps,
        clock: Clock,
        config: ControlsConfig,
        metrics: AgentMetrics,
    ) -> None:
        self.journal = journal
        self.caps = caps
        self.closing = False
        """No new control is taken up any more."""
        self._inventory = inventory
        self._clock = clock
        self._config = config
        self._metrics = metrics
        # What the last successful write left on the GPU, with the worker's generation at that time (or UNSURE).
        self._in_force: dict[ControlKey, tuple[Setting, int]] = {}
        # Power limits that must hold (caps, or leases below them), as last written.
        self._limits: dict[str, tuple[float, int]] = {}
        # Restored on the GPU, but the journal could not be rewritten: only the journal is tried again.
        self._restored: set[ControlKey] = set()
        self._retry_at_s: dict[ControlKey, float] = {}
        self._cap_retry_at_s: dict[str, float] = {}

    # What is in force

    def setting(self, key: ControlKey) -> Setting | None:
        """What this agent last wrote and has not restored."""
        return self._in_force.get(key, (None, 0))[0]

    def is_in_force(self, key: ControlKey, setting: Setting, worker: GpuWorker) -> bool:
        """Whether a write would change nothing, as far as this agent knows."""
        return self._in_force.get(key) == (setting, worker.generation)

    def doubt(self, key: ControlKey) -> None:
        """Something else has moved this control: the next write is no repetition."""
        if key in self._in_force:
            self._in_force[key] = (self._in_force[key][0], UNSURE)
        if key.kind is ControlKind.POWER_LIMIT:
            self._limits.pop(key.gpu_uuid, None)

    def expected_limit_w(self, worker: GpuWorker) -> float | None:
        """The power limit that the GPU should show, None where this agent has no part in it."""
        limit_w, generation = self._limits.get(worker.uuid, (None, UNSURE))
        return limit_w if generation == worker.generation else None

    def under_cap(self, setting: Setting, uuid: str) -> Setting:
        """A power limit lowered to the standing caps."""
        if not isinstance(setting, PowerLimit):
            return setting
        cap_w = self.caps.limit_w(uuid)
        return setting if cap_w is None or setting.limit_w <= cap_w else PowerLimit(cap_w)

    # What is due

    def restores_due(self, key: ControlKey, now_s: float) -> bool:
        return self.closing or self._retry_at_s.get(key, now_s) <= now_s

    def caps_due(self, now_s: float) -> list[str]:
        """GPUs whose power limit is not known to be under its caps, and that answer."""
        due = []
        for uuid in {cap.gpu_uuid for cap in self.caps.all()}:
            worker = self._inventory.find(uuid)
            if worker is None or worker.health is not GpuHealth.OK or self._cap_retry_at_s.get(uuid, now_s) > now_s:
                continue
            if worker.facts is not None and worker.facts.mig_enabled:
                continue
            if self._limits.get(uuid) != (self._wanted_w(uuid), worker.generation):
                due.append(uuid)
        return due

    def next_retry_s(self, busy: set[str]) -> list[float]:
        """Instants at which something is to be tried again, but for GPUs that are being worked on."""
        return [at for key, at in self._retry_at_s.items() if key.gpu_uuid not in busy] + [
            at for uuid, at in self._cap_retry_at_s.items() if uuid not in busy
        ]

    # Writing

    async def write(self, key: ControlKey, setting: Setting, worker: GpuWorker, requested: Setting) -> Result:
        """Journal, then GPU. The result's code says how much is known (see NOTHING_CHANGED)."""
        control = CONTROLS[key.kind]
        new = key not in self.journal.entries
        safe = new or key in self._restored
        try:
            if new:
                captured = await worker.call(control.capture)
                if key.kind is ControlKind.POWER_LIMIT and self.caps.captured_w(key.gpu_uuid) is not None:
                    captured = self.caps.captured_w(key.gpu_uuid)  # what is there now is a cap, not what was found
                if self.closing:
                    return Result(key.gpu_uuid, Code.DRIVER_ERROR, "the agent is stopping", requested)
                try:
                    await self.journal.add(Intent(key, captured))
                except OSError as error:
                    log.error("journal cannot be written; control not applied", control=str(key), why=str(error))
                    return Result(key.gpu_uuid, Code.JOURNAL_FAILED, _unwritten(error), requested)
            generation = worker.generation
            self._restored.discard(key)

            def write(device: GpuDevice) -> Observed:
                control.write(device, setting)
                return look(device)

            observed = await worker.call(write)
        except (GpuPermission, GpuUnsupported, GpuInvalid) as error:
            if safe and key in self.journal.entries:
                await self._forget(key)
            return Result(key.gpu_uuid, code_of(error), str(error), requested)
        except GpuError as error:
            self._in_force.pop(key, None)
            self._note_limit(key, None, UNSURE)
            log.error("control failed", control=str(key), why=str(error))
            return Result(key.gpu_uuid, code_of(error), str(error), requested)
        self._in_force[key] = (setting, generation)
        self._note_limit(key, setting, generation)
        self._retry_at_s.pop(key, None)
        return Result(key.gpu_uuid, Code.APPLIED, "", requested, setting, observed)

    async def restore(self, key: ControlKey) -> Result:
        """Makes one control safe that has no lease: first the GPU, then the journal."""
        intent = self.journal.entries.get(key)
        control, observed = CONTROLS[key.kind], NOT_OBSERVED
        if intent is None:
            return Result(key.gpu_uuid, Code.APPLIED, f"already safe: {control.safe_state}")
        cap_w = self.caps.limit_w(key.gpu_uuid) if key.kind is ControlKind.POWER_LIMIT else None
        target = intent.captured if cap_w is None else cap_w
        text = control.safe_state if cap_w is None else f"stays under the standing cap of {cap_w:g} W"
        if key not in self._restored:
            worker = self._inventory.find(key.gpu_uuid)

            def restore(device: GpuDevice) -> Observed:
                control.restore(device, target)
                return look(device)

            try:
                if worker is None:
                    raise GpuLost("the GPU is not on this node any more, or has not answered yet")
                generation = worker.generation
                observed = await worker.call(restore)
            except GpuUnsupported:
                pass  # what the GPU cannot do was never done; an unreadable journal makes us ask
            except GpuError as error:
                self.doubt(key)  # still reported, as it most likely is, but no reason to skip a write
                if key not in self._retry_at_s:
                    log.error("control not restored; trying on", control=str(key), why=str(error))
                self._retry_at_s[key] = self._clock.monotonic_s() + self._config.restore_retry_s
                self._metrics.restores.labels(key.kind.value, "failed").inc()
                return Result(key.gpu_uuid, code_of(error), str(error))
            self._in_force.pop(key, None)
            self._note_limit(key, None if cap_w is None else PowerLimit(cap_w), generation)
            self._restored.add(key)
            self._metrics.restores.labels(key.kind.value, "done").inc()
            log.info("control restored", control=str(key), state=text)
        await self._forget(key)
        return Result(key.gpu_uuid, Code.APPLIED, text, observed=observed)

    # Standing caps

    async def put_cap(self, cap: Cap, worker: GpuWorker, requested: Setting) -> Result:
        """Records a cap, then writes it. The guard's is written even if it cannot be recorded."""
        uuid, key = cap.gpu_uuid, ControlKey(cap.gpu_uuid, ControlKind.POWER_LIMIT)
        try:
            await self.caps.put(cap)
        except OSError as error:
            log.error("cap cannot be recorded", gpu=uuid, why=str(error))
            if cap.owner.kind is not OwnerKind.GUARD:
                return Result(uuid, Code.JOURNAL_FAILED, _unwritten(error), requested)
            self.caps.put_unrecorded(cap)
        log.info("cap stands", gpu=uuid, limit_w=cap.limit_w, by=str(cap.owner), reason=cap.reason)
        result = await self.enforce(uuid)
        if result.code is not Code.APPLIED:  # on record all the same: written as soon as the GPU can be
            return Result(uuid, result.code, result.detail, requested)
        applied = PowerLimit(self._wanted_w(uuid) or cap.limit_w, protects=True)
        if key in self._in_force and self._in_force[key][0] != PowerLimit(applied.limit_w):
            self.doubt(key)
        return Result(uuid, Code.APPLIED, "", requested, applied, result.observed)

    async def drop_cap(self, uuid: str, kind: OwnerKind) -> Result:
        """Takes one cap away: the GPU goes to what is left of caps and leases, then the record goes."""
        cap = self.caps.find((uuid, kind))
        worker = self._inventory.find(uuid)
        if cap is None:
            return Result(uuid, Code.APPLIED, "no such cap")
        if worker is None or worker.facts is None:
            return Result(uuid, Code.GPU_LOST, "the GPU has not answered yet; its cap stays")
        others = [other.limit_w for other in self.caps.of(uuid) if other.owner.kind is not kind]
        leased = self._leased_w(uuid)
        found_w = cap.captured_w if cap.captured_w is not None else worker.facts.default_power_limit_w
        target_w = min([*others, *([leased] if leased is not None else [])], default=found_w)
        try:
            observed = await self._set_limit(worker, target_w)
        except GpuError as error:
            self._limits.pop(uuid, None)  # the write may have taken effect: the cap is brought into force again
            return Result(uuid, code_of(error), f"{error}; its cap stays")
        try:
            await self.caps.remove((uuid, kind))
        except OSError as error:
            self._limits.pop(uuid, None)
            await self.enforce(uuid)  # still on record: then it is in force as well
            return Result(uuid, Code.JOURNAL_FAILED, f"{_unwritten(error)}; its cap stays")
        if others or leased is not None:
            self._limits[uuid] = (target_w, worker.generation)
        else:
            self._limits.pop(uuid, None)
        log.info("cap released", gpu=uuid, by=str(cap.owner), limit_w=target_w)
        return Result(uuid, Code.APPLIED, f"cap released; limit is {target_w:g} W", observed=observed)

    async def enforce(self, uuid: str) -> Result:
        """Brings a GPU's limit under its standing caps."""
        worker, wanted_w = self._inventory.find(uuid), self._wanted_w(uuid)
        if wanted_w is None:
            return Result(uuid, Code.APPLIED)
        try:
            if worker is None or worker.facts is None:
                raise GpuLost("the GPU has not answered yet")
            if self.caps.captured_w(uuid) is None:
                try:
                    await self.caps.set_captured(uuid, await worker.call(lambda device: device.power_limit_w()))
                except OSError as error:
                    log.error("cap cannot be recorded anew", gpu=uuid, why=str(error))
            generation = worker.generation
            observed = await self._set_limit(worker, wanted_w)
        except GpuError as error:
            if uuid not in self._cap_retry_at_s:
                log.error("cap is not in force; trying on", gpu=uuid, why=str(error))
            self._cap_retry_at_s[uuid] = self._clock.monotonic_s() + self._config.restore_retry_s
            self._limits.pop(uuid, None)
            return Result(uuid, code_of(error), str(error))
        self._cap_retry_at_s.pop(uuid, None)
        self._limits[uuid] = (wanted_w, generation)
        return Result(uuid, Code.APPLIED, observed=observed)

    def _wanted_w(self, uuid: str) -> float | None:
        """The limit that caps and leases together ask for."""
        values = [value for value in (self.caps.limit_w(uuid), self._leased_w(uuid)) if value is not None]
        return min(values, default=None)

    def _leased_w(self, uuid: str) -> float | None:
        setting = self.setting(ControlKey(uuid, ControlKind.POWER_LIMIT))
        return setting.limit_w if isinstance(setting, PowerLimit) else None

    async def _set_limit(self, worker: GpuWorker, limit_w: float) -> Observed:
        def write(device: GpuDevice) -> Observed:
            device.set_power_limit_w(limit_w)
            return look(device)

        return await worker.call(write)

    # Bookkeeping

    def _note_limit(self, key: ControlKey, setting: Setting | None, generation: int) -> None:
        if key.kind is not ControlKind.POWER_LIMIT:
            return
        if isinstance(setting, PowerLimit):
            self._limits[key.gpu_uuid] = (setting.limit_w, generation)
        else:
            self._limits.pop(key.gpu_uuid, None)

    async def _forget(self, key: ControlKey) -> None:
        """Takes a safe control out of the journal; if that fails only this is tried again."""
        self._restored.add(key)
        try:
            await self.journal.remove(key)
        except OSError as error:
            self._retry_at_s[key] = self._clock.monotonic_s() + self._config.restore_retry_s
            log.error("journal cannot be rewritten; trying again", control=str(key), why=str(error))
            return
        self._restored.discard(key)
        self._retry_at_s.pop(key, None)


def look(device: GpuDevice) -> Observed:
    """Reads back what can be read; a failure here says nothing about the write before it."""
    try:
        return Observed(device.sm_mhz(), device.power_limit_w())
    except GpuError:
        return NOT_OBSERVED


def _unwritten(error: OSError) -> str:
    return f"the journal cannot be written: {error.strerror or error}"
