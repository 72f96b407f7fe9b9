"""A model of leases, terms, owners, faults and restarts: whatever happens, no control outlives its lease.

Hypothesis plays controllers, operators, failing drivers, full disks, passing time and dying agents against the real
controls over fake GPUs and a virtual clock. The GPUs outlive the agents, as real ones do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from common.clock import VirtualClock
from nodeagent.audit import AuditLog
from nodeagent.config import ControlsConfig
from nodeagent.control.caps import Cap
from nodeagent.control.caps import load as load_caps
from nodeagent.control.controls import Controls
from nodeagent.control.fence import Fence
from nodeagent.control.guard import Guard
from nodeagent.control.guard_rules import SloBoost, WattsFloor
from nodeagent.control.journal import JournalUnreadable
from nodeagent.control.journal import load as load_journal
from nodeagent.control.leases import Owner, OwnerKind
from nodeagent.control.recovery import found_before, recover
from nodeagent.control.results import Code, Wish
from nodeagent.control.settings import ClockLock, MemoryClockLock, PowerLimit, Setting
from nodeagent.engine.vllm import EngineReading
from nodeagent.errors import Precondition, Unavailable
from nodeagent.gpu.driver import GpuError, GpuPermission
from nodeagent.gpu.inventory import Inventory
from nodeagent.telemetry.metrics import AgentMetrics
from tests.fakegpu import FakeDriver

T = TypeVar("T")
RETRY_S = 1.0
STOP_DEADLINE_S = 10.0
"""Real time, because drivers answer in real time: far more than a stop needs when everything works."""
FLOOR_W = 310.0
EXAMPLES = int(os.environ.get("DYNAMOLLM_MODEL_EXAMPLES", "1000"))


class LeaseModel(RuleBasedStateMachine):
    """The model keeps, for each control, the instant after which it must be safe, and the highest term accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        # fsync costs nothing in memory; what is tested here is order and content, not the disk.
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.path = Path(tempfile.mkdtemp(prefix="dynamollm-", dir=base))
        self.clock = VirtualClock()
        self.driver = FakeDriver(2)
        self.found_w = [612.0, 650.0]
        for gpu, watts in zip(self.driver.gpus, self.found_w, strict=True):
            gpu.limit_w = watts
        self.may_hold_until: dict[tuple[int, type], float] = {}
        self.operator_until: dict[tuple[int, type], float] = {}
        self.caps_w: dict[tuple[int, OwnerKind], float] = {}
        self.tripped = False
        self.was_faulty: set[int] = set()
        self.waiting = 0
        self.pinned_until = 0.0
        self.term = 0
        self.patch = pytest.MonkeyPatch()
        self.disk_full = False
        self.inventory: Inventory | None = None
        self.controls: Controls

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def first_agent(self) -> None:
        self.start_agent("boot-1")

    def start_agent(self, boot_id: str) -> None:
        journal_path = self.path / "journal.json"
        try:
            load_journal(journal_path)
        except JournalUnreadable:
            # What was found before the first write is lost with the journal: from here on it is the driver's default,
            # but for a GPU with a cap, whose own record knows it still.
            by_caps = {cap.gpu_uuid: cap.captured_w for cap in self.caps_on_file(boot_id)}
            self.found_w = [by_caps.get(gpu.uuid) or 700.0 for gpu in self.driver.gpus]
        if self.inventory is not None and self.controls.caps_unrecorded:
            # The one thing a full disk costs: with no record at all, the next agent takes the emergency cap for the
            # limit that was always there. It stays all the same, until it is lifted.
            known = {cap.gpu_uuid for cap in self.caps_on_file(boot_id)} | set(found_before(journal_path, boot_id))
            for index, gpu in enumerate(self.driver.gpus):
                if self.capped(index) and gpu.uuid not in known:
                    self.found_w[index] = gpu.limit_w
        self.boot_id = boot_id
        if self.inventory is not None:
            self.inventory.close()
        self.inventory = Inventory(self.driver, call_deadline_s=30.0)
        self.run(self.inventory.open())
        caps, journal = self.run(recover(self.path / "caps.json", journal_path, boot_id, self.inventory, self.clock))
        config = ControlsConfig(restore_retry_s=RETRY_S, stop_deadline_s=STOP_DEADLINE_S)
        metrics = AgentMetrics(CollectorRegistry())
        self.fence = Fence(self.path / "term.json", self.clock)
        self.controls = Controls(self.inventory, journal, caps, self.fence, self.clock, config, metrics)
        self.run(self.controls.sweep())
        self.may_hold_until.clear()
        self.operator_until.clear()
        self.pinned_until = 0.0

        async def engines() -> dict[str, tuple[tuple[str, ...], EngineReading | None]]:
            return {"a": ((self.driver.gpus[0].uuid,), EngineReading(1, self.waiting))}

        audit = AuditLog(self.path / "audit.log", self.clock, 1 << 16)
        self.guard = Guard(
            self.path / "guard.json", self.controls, self.fence, self.inventory, engines, self.clock, metrics, audit
        )
        self.run(self.guard.start())
        self.tripped = self.tripped or self.guard.state.tripped
        assert self.guard.state.tripped == self.tripped, "the watts floor was forgotten"
        if not self.guard.state.watts_floor.enabled:
            rules = (SloBoost(enabled=True, max_waiting=3, hold_s=20.0), WattsFloor(enabled=True, limit_w=FLOOR_W))
            with contextlib.suppress(Unavailable):
                self.run(self.guard.set_rules(*rules, "model", "model"))

    def caps_on_file(self, boot_id: str) -> list[Cap]:
        return load_caps(self.path / "caps.json", boot_id)

    def healthy(self, index: int) -> bool:
        return self.driver.gpus[index].fault is None

    @rule(
        gpu=st.integers(0, 1),
        setting=st.one_of(
            st.integers(200, 2100).map(lambda mhz: ClockLock(mhz, mhz)),
            st.integers(1500, 3000).map(lambda mhz: MemoryClockLock(mhz, mhz)),
            st.floats(150, 750).map(PowerLimit),
        ),
        ttl_s=st.floats(0.5, 60.0),
        term=st.integers(0, 6),
    )
    def controller_applies(self, gpu: int, setting: Setting, ttl_s: float, term: int) -> None:
        before = (self.driver.gpus[gpu].lock_mhz, self.driver.gpus[gpu].limit_w, len(self.driver.gpus[gpu].calls))
        wish = Wish(self.driver.gpus[gpu].uuid, setting)
        owner = Owner(OwnerKind.CONTROLLER, f"ctl-{term}")
        key = (gpu, type(setting))
        try:
            (result,) = self.run(self.controls.apply(owner, "model", ttl_s, term, [wish]))
        except Precondition:
            assert term < self.term
            after = (self.driver.gpus[gpu].lock_mhz, self.driver.gpus[gpu].limit_w, len(self.driver.gpus[gpu].calls))
            assert after == before, "a call from an old term took effect"
            return
        assert term >= self.term
        self.term = term
        pinned = gpu == 0 and not isinstance(setting, PowerLimit) and self.pinned_until > self.clock.now_s
        if pinned or self.operator_until.get(key, 0.0) > self.clock.now_s:
            assert result.code in (Code.HELD, Code.DRIVER_ERROR)
            return
        if result.code is Code.APPLIED:
            self.may_hold_until[key] = self.clock.now_s + ttl_s
            self.in_force(gpu, result.applied)

    def in_force(self, gpu: int, applied: Setting | None) -> None:
        """What was reported as applied is what the GPU has."""
        target = self.driver.gpus[gpu]
        if isinstance(applied, ClockLock):
            assert target.lock_mhz == (applied.min_mhz, applied.max_mhz)
        elif isinstance(applied, MemoryClockLock):
            assert target.memory_lock_mhz == (applied.min_mhz, applied.max_mhz)
        else:
            assert isinstance(applied, PowerLimit)
            assert target.limit_w == applied.limit_w

    @rule(gpu=st.integers(0, 1), mhz=st.integers(200, 2100), ttl_s=st.floats(0.5, 200.0))
    def operator_locks(self, gpu: int, mhz: int, ttl_s: float) -> None:
        wish = Wish(self.driver.gpus[gpu].uuid, ClockLock(mhz, mhz))
        (result,) = self.run(self.controls.apply(Owner(OwnerKind.OPERATOR, "ada"), "model", ttl_s, 0, [wish]))
        key = (gpu, ClockLock)
        if gpu == 0 and self.pinned_until > self.clock.now_s:
            assert result.code is Code.HELD
            return
        if result.code is Code.APPLIED:
            self.in_force(gpu, result.applied)
            self.may_hold_until[key] = self.operator_until[key] = self.clock.now_s + ttl_s
        elif result.code is not Code.NO_PERMISSION:
            # Unknown effect: the agent ended the lease, whoever held it.
            self.may_hold_until.pop(key, None)
            self.operator_until.pop(key, None)

    @rule(gpu=st.integers(0, 1), watts=st.floats(200, 700), ttl_s=st.floats(0.5, 60.0), operator=st.booleans())
    def somebody_protects_a_breaker(self, gpu: int, watts: float, ttl_s: float, operator: bool) -> None:
        kind = OwnerKind.OPERATOR if operator else OwnerKind.CONTROLLER
        owner = Owner(kind, f"ctl-{self.term}")
        wish = Wish(self.driver.gpus[gpu].uuid, PowerLimit(watts, protects=True))
        (result,) = self.run(self.controls.apply(owner, "model", ttl_s, self.term, [wish]))
        if result.code is Code.APPLIED:
            self.may_hold_until.pop((gpu, PowerLimit), None)
            assert self.driver.gpus[gpu].limit_w <= watts + 1e-9
        # What could not be written stands all the same, once it is on record.
        on_record = any(
            (cap.gpu_uuid, cap.owner.kind) == (wish.gpu_uuid, kind) and cap.limit_w == watts
            for cap in self.controls.standing_caps
        )
        assert on_record or result.code is not Code.APPLIED
        if on_record:
            self.caps_w[gpu, kind] = watts

    @rule()
    def the_floor_trips(self) -> None:
        if self.guard.state.watts_floor.enabled:
            self.run(self.guard.trip("model"))
            self.tripped = True

    @rule()
    def the_floor_is_lifted(self) -> None:
        try:
            self.run(self.guard.lift("model"))
            self.tripped = False
        except Unavailable:
            assert self.guard.state.tripped == self.tripped

    @rule(waiting=st.integers(0, 6))
    def an_engine_is_looked_at(self, waiting: int) -> None:
        self.waiting = waiting
        before = self.driver.gpus[0].limit_w
        self.run(self.guard.look_at_engines())
        if waiting > 3 and self.guard.state.slo_boost.enabled:
            self.pinned_until = self.clock.now_s + 20.0
            for kind in (ClockLock, MemoryClockLock):
                self.may_hold_until.pop((0, kind), None)
                self.operator_until.pop((0, kind), None)
            if self.healthy(0):
                assert self.driver.gpus[0].lock_mhz is None
                assert self.driver.gpus[0].memory_lock_mhz is None
        assert self.driver.gpus[0].limit_w == before, "the boost touched a power limit"

    @rule(kind=st.sampled_from([OwnerKind.CONTROLLER, OwnerKind.OPERATOR]))
    def somebody_releases(self, kind: OwnerKind) -> None:
        self.run(self.controls.release(Owner(kind, f"ctl-{self.term}"), self.term, [], "model"))
        standing = {(cap.gpu_uuid, cap.owner.kind) for cap in self.controls.standing_caps}
        for gpu, holder in list(self.caps_w):
            if holder is kind and (self.driver.gpus[gpu].uuid, holder) not in standing:
                del self.caps_w[gpu, holder]
        for key in list(self.may_hold_until):
            operators = self.operator_until.get(key, 0.0) > self.clock.now_s
            if operators == (kind is OwnerKind.OPERATOR):
                self.may_hold_until.pop(key)
                self.operator_until.pop(key, None)

    @rule(seconds=st.floats(0.01, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.run(self.guard.tick())
        self.run(self.controls.sweep())

    @rule(gpu=st.integers(0, 1), unknown=st.booleans(), takes_effect=st.booleans())
    def driver_begins_to_fail(self, gpu: int, unknown: bool, takes_effect: bool) -> None:
        target = self.driver.gpus[gpu]
        self.was_faulty.add(gpu)
        target.fault = GpuError("unknown error") if unknown else GpuPermission("no permission")
        target.applies_before_fault = unknown and takes_effect

    @rule(gpu=st.integers(0, 1))
    def driver_works_again(self, gpu: int) -> None:
        self.driver.gpus[gpu].fault = None
        self.clock.advance(RETRY_S)
        self.run(self.guard.tick())
        self.run(self.controls.sweep())
        self.was_faulty.discard(gpu)

    @rule()
    def disk_fills_up(self) -> None:
        def full(path: Path, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        self.disk_full = True
        self.patch.setattr("nodeagent.control.journal.write_durably", full)
        self.patch.setattr("nodeagent.control.guard.write_durably", full)

    @rule()
    def disk_has_room(self) -> None:
        self.disk_full = False
        self.patch.undo()

    @rule()
    def agent_is_killed_and_a_new_one_starts(self) -> None:
        self.start_agent(self.boot_id)

    @rule()
    def agent_is_stopped_and_a_new_one_starts(self) -> None:
        self.run(self.stop_agent())
        assert self.healthy_are_safe(), "a stopped agent left a GPU that could be written off its safe state"
        self.start_agent(self.boot_id)

    async def stop_agent(self) -> None:
        """What is faulty is tried until the deadline; that is cut short here, once the others are safe."""
        closing = asyncio.ensure_future(self.controls.close())
        give_up_s = time.monotonic() + STOP_DEADLINE_S
        while not closing.done() and not self.healthy_are_safe() and time.monotonic() < give_up_s:
            await asyncio.wait({closing}, timeout=0.001)
        if self.disk_full or not all(self.healthy(index) for index in range(2)):
            await asyncio.wait({closing}, timeout=0.02)
            closing.cancel()
        await asyncio.wait({closing})

    def healthy_are_safe(self) -> bool:
        return all(
            gpu.lock_mhz is None
            and gpu.memory_lock_mhz is None
            and (self.capped(index) or gpu.limit_w == self.found_w[index])
            for index, gpu in enumerate(self.driver.gpus)
            if self.healthy(index)
        )

    def capped(self, index: int) -> bool:
        """Whether anything keeps this GPU's limit down for good."""
        uuid = self.driver.gpus[index].uuid
        return any(cap.gpu_uuid == uuid for cap in self.controls.standing_caps)

    @precondition(lambda self: all(self.healthy(index) for index in range(2)))
    @rule(part=st.floats(0, 0.99))
    def agent_dies_and_the_journal_is_cut(self, part: float) -> None:
        path = self.path / "journal.json"
        if not path.exists():
            return
        whole = path.read_bytes()
        path.write_bytes(whole[: int(part * len(whole))])
        self.start_agent(self.boot_id)
        for index, gpu in enumerate(self.driver.gpus):
            assert gpu.lock_mhz is None
            assert gpu.memory_lock_mhz is None
            assert gpu.limit_w == 700.0 or self.capped(index)

    @invariant()
    def nothing_outlives_its_lease(self) -> None:
        """A control off its safe state has a live lease, or a GPU that refuses to be written, or a due retry."""
        pending = {(key.gpu_uuid, key.kind.value) for key in self.controls.unrestored()}
        for index, gpu in enumerate(self.driver.gpus):
            for kind, name, moved in (
                (ClockLock, "clock_lock", gpu.lock_mhz is not None),
                (MemoryClockLock, "memory_clock_lock", gpu.memory_lock_mhz is not None),
                (PowerLimit, "power_limit", gpu.limit_w != self.found_w[index] and not self.capped(index)),
            ):
                live = self.may_hold_until.get((index, kind), 0.0) > self.clock.now_s
                if moved and not live:
                    assert (gpu.uuid, name) in pending, f"{name} of {gpu.uuid} is moved and nobody knows"

    @invariant()
    def a_cap_that_protects_stays(self) -> None:
        """Every cap that was taken on is on record until it is released, and in force on every GPU that can be
        written: now, or at the next sweep after a fault."""
        for (index, kind), watts in self.caps_w.items():
            found = [cap.limit_w for cap in self.controls.standing_caps if cap.key == (f"GPU-{index}", kind)]
            assert found == [watts], "a cap was forgotten"
        for index, gpu in enumerate(self.driver.gpus):
            least = min((cap.limit_w for cap in self.controls.standing_caps if cap.gpu_uuid == gpu.uuid), default=None)
            if least is not None and self.healthy(index) and index not in self.was_faulty:
                assert gpu.limit_w <= least + 1e-9, f"GPU {index} is above its cap"

    def teardown(self) -> None:
        if self.inventory is None:
            return
        # Once everything works again, TTL plus one retry later nothing may be left.
        self.patch.undo()
        for gpu in self.driver.gpus:
            gpu.fault = None
        self.clock.advance(200.0 + RETRY_S)
        self.waiting = 0
        self.run(self.guard.tick())
        self.run(self.controls.sweep())
        self.was_faulty.clear()
        self.a_cap_that_protects_stays()
        for index, gpu in enumerate(self.driver.gpus):
            assert gpu.lock_mhz is None
            assert gpu.memory_lock_mhz is None
            assert gpu.limit_w <= FLOOR_W or not self.tripped
            assert gpu.limit_w == self.found_w[index] or self.capped(index)
        # And when everybody has let go, every limit is as it was found.
        self.run(self.guard.lift("the end"))
        self.run(self.controls.release(Owner(OwnerKind.OPERATOR, "ada"), 0, [gpu.uuid for gpu in self.driver.gpus], ""))
        for index, gpu in enumerate(self.driver.gpus):
            assert gpu.limit_w == self.found_w[index]
        assert self.controls.unrestored() == []
        assert Fence(self.path / "term.json", self.clock).term == self.term
        self.inventory.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.path)


# Each example is a life of 25 steps; 1,000 of them take about half a minute.
TestLeaseModel = pytest.mark.timeout(900)(LeaseModel.TestCase)
TestLeaseModel.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
