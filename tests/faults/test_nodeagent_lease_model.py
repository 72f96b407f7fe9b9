"""A model of leases, terms, owners, faults and restarts: whatever happens, no control outlives its lease.

Hypothesis plays controllers, operators, failing drivers, full disks, passing time and dying agents against the real
controls over fake GPUs and a virtual clock. The GPUs outlive the agents, as real ones do.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from common.clock import VirtualClock
from nodeagent.config import ControlsConfig
from nodeagent.control.controls import Controls
from nodeagent.control.fence import Fence
from nodeagent.control.leases import Owner, OwnerKind
from nodeagent.control.recovery import recover_journal
from nodeagent.control.results import Code, Wish
from nodeagent.control.settings import ClockLock, PowerLimit, Setting
from nodeagent.errors import Precondition
from nodeagent.gpu.driver import GpuError, GpuPermission
from nodeagent.gpu.inventory import Inventory
from nodeagent.telemetry.metrics import AgentMetrics
from tests.fakegpu import FakeDriver

T = TypeVar("T")
RETRY_S = 1.0


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
        self.term = 0
        self.patch = pytest.MonkeyPatch()
        self.inventory: Inventory | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def first_agent(self) -> None:
        self.start_agent("boot-1")

    def start_agent(self, boot_id: str) -> None:
        self.boot_id = boot_id
        if self.inventory is not None:
            self.inventory.close()
        self.inventory = Inventory(self.driver, call_deadline_s=30.0)
        self.run(self.inventory.open())
        journal = recover_journal(self.path / "journal.json", boot_id, self.inventory, self.clock)
        config = ControlsConfig(restore_retry_s=RETRY_S, stop_deadline_s=0.02)
        metrics = AgentMetrics(CollectorRegistry())
        self.fence = Fence(self.path / "term.json", self.clock)
        self.controls = Controls(self.inventory, journal, self.fence, self.clock, config, metrics)
        self.run(self.controls.sweep())
        self.may_hold_until.clear()
        self.operator_until.clear()

    def healthy(self, index: int) -> bool:
        return self.driver.gpus[index].fault is None

    @rule(
        gpu=st.integers(0, 1),
        setting=st.one_of(
            st.integers(200, 2100).map(lambda mhz: ClockLock(mhz, mhz)), st.floats(150, 750).map(PowerLimit)
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
        if self.operator_until.get(key, 0.0) > self.clock.now_s:
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
        else:
            assert isinstance(applied, PowerLimit)
            assert target.limit_w == applied.limit_w

    @rule(gpu=st.integers(0, 1), mhz=st.integers(200, 2100), ttl_s=st.floats(0.5, 200.0))
    def operator_locks(self, gpu: int, mhz: int, ttl_s: float) -> None:
        wish = Wish(self.driver.gpus[gpu].uuid, ClockLock(mhz, mhz))
        (result,) = self.run(self.controls.apply(Owner(OwnerKind.OPERATOR, "ada"), "model", ttl_s, 0, [wish]))
        key = (gpu, ClockLock)
        if result.code is Code.APPLIED:
            self.in_force(gpu, result.applied)
            self.may_hold_until[key] = self.operator_until[key] = self.clock.now_s + ttl_s
        elif result.code is not Code.NO_PERMISSION:
            # Unknown effect: the agent ended the lease, whoever held it.
            self.may_hold_until.pop(key, None)
            self.operator_until.pop(key, None)

    @rule(kind=st.sampled_from([OwnerKind.CONTROLLER, OwnerKind.OPERATOR]))
    def somebody_releases(self, kind: OwnerKind) -> None:
        self.run(self.controls.release(Owner(kind, f"ctl-{self.term}"), self.term, [], "model"))
        for key in list(self.may_hold_until):
            operators = self.operator_until.get(key, 0.0) > self.clock.now_s
            if operators == (kind is OwnerKind.OPERATOR):
                self.may_hold_until.pop(key)
                self.operator_until.pop(key, None)

    @rule(seconds=st.floats(0.01, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.run(self.controls.sweep())

    @rule(gpu=st.integers(0, 1), unknown=st.booleans(), takes_effect=st.booleans())
    def driver_begins_to_fail(self, gpu: int, unknown: bool, takes_effect: bool) -> None:
        target = self.driver.gpus[gpu]
        target.fault = GpuError("unknown error") if unknown else GpuPermission("no permission")
        target.applies_before_fault = unknown and takes_effect

    @rule(gpu=st.integers(0, 1))
    def driver_works_again(self, gpu: int) -> None:
        self.driver.gpus[gpu].fault = None

    @rule()
    def disk_fills_up(self) -> None:
        def full(path: Path, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        self.patch.setattr("nodeagent.control.journal.write_durably", full)

    @rule()
    def disk_has_room(self) -> None:
        self.patch.undo()

    @rule()
    def agent_is_killed_and_a_new_one_starts(self) -> None:
        self.start_agent(self.boot_id)

    @rule()
    def agent_is_stopped_and_a_new_one_starts(self) -> None:
        self.run(self.controls.close())
        for index, gpu in enumerate(self.driver.gpus):
            if self.healthy(index):
                assert gpu.lock_mhz is None
                assert gpu.limit_w == self.found_w[index]
        self.start_agent(self.boot_id)

    @precondition(lambda self: all(self.healthy(index) for index in range(2)))
    @rule(part=st.floats(0, 0.99))
    def agent_dies_and_the_journal_is_cut(self, part: float) -> None:
        path = self.path / "journal.json"
        if not path.exists():
            return
        whole = path.read_bytes()
        path.write_bytes(whole[: int(part * len(whole))])
        # What was found before the first write is lost with the journal: from here on it is the driver's default.
        self.found_w = [700.0, 700.0]
        self.start_agent(self.boot_id)
        for gpu in self.driver.gpus:
            assert gpu.lock_mhz is None
            assert gpu.limit_w == 700.0

    @invariant()
    def nothing_outlives_its_lease(self) -> None:
        """A control off its safe state has a live lease, or a GPU that refuses to be written, or a due retry."""
        pending = {(key.gpu_uuid, key.kind.value) for key in self.controls.unrestored()}
        for index, gpu in enumerate(self.driver.gpus):
            for kind, name, moved in (
                (ClockLock, "clock_lock", gpu.lock_mhz is not None),
                (PowerLimit, "power_limit", gpu.limit_w != self.found_w[index]),
            ):
                live = self.may_hold_until.get((index, kind), 0.0) > self.clock.now_s
                if moved and not live:
                    assert (gpu.uuid, name) in pending, f"{name} of {gpu.uuid} is moved and nobody knows"

    def teardown(self) -> None:
        if self.inventory is None:
            return
        # Once everything works again, TTL plus one retry later nothing may be left.
        self.patch.undo()
        for gpu in self.driver.gpus:
            gpu.fault = None
        self.clock.advance(200.0 + RETRY_S)
        self.run(self.controls.sweep())
        for gpu, watts in zip(self.driver.gpus, self.found_w, strict=True):
            assert gpu.lock_mhz is None
            assert gpu.limit_w == watts
        assert self.controls.unrestored() == []
        assert Fence(self.path / "term.json", self.clock).term == self.term
        self.inventory.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.path)


TestLeaseModel = LeaseModel.TestCase
TestLeaseModel.settings = settings(
    max_examples=200, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
