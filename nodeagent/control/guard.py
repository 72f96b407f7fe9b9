"""The node's own emergency rules at work: they hold without any controller, and over anybody's lease.

Looks at the engines, the controllers' heartbeat and the local trigger file, asks guard_rules.py what follows, and acts
through control/controls.py. Every act is logged, counted and audited. A tripped watts floor is on disk: it stays
through restarts, crashes and reboots of the agent until somebody lifts it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common.clock import Clock
from common.logs import get_logger
from nodeagent.audit import AuditLog
from nodeagent.control import tripwire
from nodeagent.control.controls import Controls
from nodeagent.control.fence import Fence
from nodeagent.control.guard_rules import (
    WINDOW_S,
    GuardState,
    SloBoost,
    WattsFloor,
    cap_w,
    check_rules,
    dump,
    load,
    trouble,
)
from nodeagent.control.leases import OwnerKind
from nodeagent.control.results import Code, Result
from nodeagent.engine.vllm import EngineReading
from nodeagent.errors import Invalid, Precondition, Unavailable
from nodeagent.files import write_durably
from nodeagent.gpu.inventory import Inventory
from nodeagent.telemetry.metrics import AgentMetrics

log = get_logger(__name__)

TICK_S = 0.1
"""How often heartbeat and trigger are looked at: a trip is in force well within a second."""
SCRAPE_S = 0.4
"""How often engines are looked at while the SLO boost is on: clocks are free within a second of the trouble."""
RETRY_S = 1.0

EngineLook = Callable[[], Awaitable[Mapping[str, tuple[Sequence[str], EngineReading | None]]]]
"""Instance id → its GPUs and its metrics (None: silent)."""


class Guard:
    """One per daemon. For the event loop's thread."""

    def __init__(
        self,
        path: Path,
        controls: Controls,
        fence: Fence,
        inventory: Inventory,
        engines: EngineLook,
        clock: Clock,
        metrics: AgentMetrics,
        audit: AuditLog,
        trigger_file: str = "",
    ) -> None:
        """Reads the state. A file that cannot be read arms nothing, and says so; caps that stand stay."""
        self._path = path
        self._controls = controls
        self._fence = fence
        self._inventory = inventory
        self._engines = engines
        self._clock = clock
        self._metrics = metrics
        self._audit = audit
        self._trigger = Path(trigger_file) if trigger_file else None
        self._dirty = False
        self._failures = ""
        try:
            self._state = load(path)
        except (OSError, ValueError) as error:
            self._state = GuardState()
            log.error("guard file is unreadable; rules are off, standing caps stay", path=str(path), why=str(error))
        if tripwire.tripped(path.parent) and not self._state.tripped:
            self._state, self._dirty = replace(self._state, tripped=True), True
        self._armed_s = clock.monotonic_s()
        self._boosting_until_s = 0.0
        self._history: dict[str, deque[tuple[float, EngineReading]]] = {}
        self._settle_at_s = 0.0
        self._tripping = asyncio.Lock()
        self.last_beat_s = clock.monotonic_s()
        """When the loop last ran; the watchdog looks at it."""
        self._gauges()

    # Requests

    @property
    def state(self) -> GuardState:
        return self._state

    @property
    def unsaved(self) -> bool:
        """Whether the state on disk is older than what is in force."""
        return self._dirty

    @property
    def boosting(self) -> bool:
        return self._clock.monotonic_s() < self._boosting_until_s

    async def set_rules(self, boost: SloBoost, floor: WattsFloor, who: str, reason: str) -> None:
        """Replaces both rules. A floor that is tripped stays so; its caps may go lower with the rule, not higher."""
        problem = check_rules(boost, floor)
        if problem:
            raise Invalid(problem)
        unknown = [uuid for uuid in floor.limit_w_by_gpu if self._inventory.find(uuid) is None]
        if unknown:
            raise Invalid(f"watts_floor.limit_w_by_gpu names {unknown[0]!r}, which is not on this node")
        async with self._tripping:
            before = self._state
            self._state = replace(before, slo_boost=boost, watts_floor=floor)
            try:
                await self._save()
            except OSError as error:
                self._state = before
                raise Unavailable(f"the rules cannot be written to {self._path}: {error.strerror or error}") from None
            self._arm()
            self._armed_s = self._clock.monotonic_s()
            self._history.clear()
            self._act("rules", f"rules set by {who}: {reason}")
        self._settle_at_s = 0.0

    async def trip(self, why: str) -> None:
        """Caps every GPU at once. Raises Precondition without a rule that says at what."""
        async with self._tripping:
            if not self._state.watts_floor.enabled:
                raise Precondition("watts_floor is not enabled; there is no cap to set")
            if self._state.tripped:
                return
            self._state = replace(self._state, tripped=True)
            self._act("trip", f"watts floor tripped: {why}")
            capping = asyncio.get_running_loop().create_task(self._cap())  # GPUs first; the disk may be slow, or full
            await self._mark_tripped()
            await self._save_or_later()
            await capping

    async def lift(self, why: str) -> None:
        """Takes the emergency caps away. The heartbeat counts anew from here."""
        async with self._tripping:
            if self._trigger is not None and self._trigger.exists():
                raise Precondition(f"{self._trigger} still exists; it would trip the floor again")
            if not self._state.tripped and not self._standing():
                return
            before = self._state
            self._state = replace(before, tripped=False)
            try:
                await asyncio.to_thread(tripwire.lift, self._path.parent)
                await self._save()
            except OSError as error:
                self._state = before
                await self._mark_tripped()
                raise Unavailable(f"the lift cannot be written to {self._path}: {error.strerror or error}") from None
            self._armed_s = self._clock.monotonic_s()
            results = await self._controls.lift_guard_caps()
            self._act("lift", f"watts floor lifted: {why}{_failures(results)}")
            await self._save_or_later()
            self._settle_at_s = self._clock.monotonic_s() + RETRY_S

    # The loop

    async def start(self) -> None:
        """Takes up what an earlier agent left, before anything is served. Caps that stand were never lifted: a crash
        may have hit a trip before the state was on disk, or a lift before it was answered."""
        if self._standing() and not self._state.tripped:
            self._state = replace(self._state, tripped=True)
            self._act("trip", "emergency caps were found standing; the watts floor counts as tripped")
            await self._save_or_later()
        if self._state.tripped:
            await self._mark_tripped()
        self._arm()
        await self._settle()

    async def _settle(self) -> None:
        """Brings the standing caps in line with the state, again and again: a GPU that did not answer is capped, or
        freed, when it does."""
        if self._state.tripped:
            await self._cap()
        elif self._standing():
            await self._controls.lift_guard_caps()

    async def run(self) -> None:
        """Looks and acts, for ever."""
        while True:
            self.last_beat_s = self._clock.monotonic_s()
            await self.tick()
            await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        """One look at everything that is due."""
        now_s = self._clock.monotonic_s()
        why = self._emergency(now_s)
        if why and not self._state.tripped:
            await self.trip(why)
        if now_s >= self._settle_at_s:
            self._settle_at_s = now_s + RETRY_S
            async with self._tripping:
                await self._settle()
            if self._dirty:
                await self._save_or_later()
        self._gauges()

    async def watch_engines(self) -> None:
        """Looks at the engines while the SLO boost is on, for ever. Apart from `run`: an engine that does not answer
        must not delay an emergency."""
        while True:
            if self._state.slo_boost.enabled:
                await self.look_at_engines()
            await asyncio.sleep(SCRAPE_S)

    def _emergency(self, now_s: float) -> str:
        rule = self._state.watts_floor
        if not rule.enabled:
            return ""
        if self._trigger is not None and self._trigger.exists():
            return f"{self._trigger} exists"
        heard_s = max(self._fence.heard_s, self._armed_s)
        if rule.heartbeat_age_s > 0 and now_s - heard_s > rule.heartbeat_age_s:
            return f"no controller has called for {rule.heartbeat_age_s:g} s"
        return ""

    async def look_at_engines(self) -> None:
        """One look; releases the clocks of every engine in trouble."""
        engines = await self._engines()
        now_s = self._clock.monotonic_s()
        for gone in self._history.keys() - engines.keys():
            del self._history[gone]
        for instance_id, (gpu_uuids, reading) in engines.items():
            if reading is None:
                continue
            history = self._history.setdefault(instance_id, deque())
            while len(history) > 1 and now_s - history[1][0] >= WINDOW_S:
                history.popleft()
            why = trouble(self._state.slo_boost, history[0][1] if history else None, reading)
            history.append((now_s, reading))
            if why:
                await self._boost(instance_id, gpu_uuids, why)

    async def _boost(self, instance_id: str, gpu_uuids: Sequence[str], why: str) -> None:
        hold_s = self._state.slo_boost.hold_s
        fresh = not self.boosting
        self._boosting_until_s = max(self._boosting_until_s, self._clock.monotonic_s() + hold_s)
        if fresh:
            self._act("boost", f"clocks of {instance_id!r} released for at least {hold_s:g} s: {why}")
        await self._controls.release_clocks(gpu_uuids, hold_s, f"SLO boost of {instance_id!r}: {why}")

    async def _cap(self) -> None:
        rule = self._state.watts_floor
        uuids = [worker.uuid for worker in self._inventory.workers if worker.uuid]
        due = {uuid: cap_w(rule, uuid) for uuid in uuids if self._higher(uuid, cap_w(rule, uuid))}
        if due and rule.limit_w > 0:
            results = await self._controls.cap_by_guard(due, self._state.last_act)
            failed = _failures(results)
            if failed and failed != self._failures:
                log.error("watts floor is not in force everywhere", why=failed.strip("; "))
            self._failures = failed

    def _higher(self, uuid: str, limit_w: float) -> bool:
        """Whether a GPU has no emergency cap yet, or one above the rule's."""
        return not any(
            cap.gpu_uuid == uuid and cap.owner.kind is OwnerKind.GUARD and cap.limit_w <= limit_w + 1e-9
            for cap in self._controls.standing_caps
        )

    def _standing(self) -> bool:
        return any(cap.owner.kind is OwnerKind.GUARD for cap in self._controls.standing_caps)

    # Telling and keeping

    def _act(self, act: str, sentence: str) -> None:
        self._state = replace(self._state, last_act=sentence, last_act_wall_s=self._clock.wall_s())
        self._metrics.guard_acts.labels(act).inc()
        self._audit.write("guard", act, sentence, "done")
        log.warning("guard", act=act, why=sentence)
        self._gauges()

    def _gauges(self) -> None:
        self._metrics.guard_tripped.set(self._state.tripped)
        self._metrics.guard_boosting.set(self.boosting)

    def _arm(self) -> None:
        if not self._state.watts_floor.enabled:
            return
        try:
            tripwire.arm(self._path.parent)
        except OSError as error:
            log.error("no file could be kept ready for a trip on a full disk", why=str(error))

    async def _mark_tripped(self) -> None:
        try:
            await asyncio.to_thread(tripwire.trip, self._path.parent)
        except OSError as error:
            log.error("the trip cannot be marked on disk", why=str(error))

    async def _save(self) -> None:
        await asyncio.to_thread(write_durably, self._path, dump(self._state))
        self._dirty = False

    async def _save_or_later(self) -> None:
        try:
            await self._save()
        except OSError as error:
            if not self._dirty:
                log.error("guard state cannot be written; trying on", path=str(self._path), why=str(error))
            self._dirty = True


def _failures(results: Sequence[Result]) -> str:
    bad = [f"{result.gpu_uuid}: {result.detail}" for result in results if result.code is not Code.APPLIED]
    return f"; {'; '.join(bad)}" if bad else ""
