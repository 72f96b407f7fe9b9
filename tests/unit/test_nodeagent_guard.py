"""The guard: its rules as functions, what it does to leases, and what it leaves on disk."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nodeagent.audit import AuditLog
from nodeagent.control.guard import Guard
from nodeagent.control.guard_rules import SloBoost, WattsFloor, check_rules, quantile_s, trouble
from nodeagent.control.results import Code
from nodeagent.control.settings import ClockLock, PowerLimit
from nodeagent.engine.vllm import EngineReading, Histogram
from nodeagent.errors import Invalid, Precondition, Unavailable
from nodeagent.gpu.driver import GpuLost
from tests.controlrig import OPERATOR, Rig
from tests.fakegpu import FakeDriver

NOTHING = SloBoost()
FLOOR = WattsFloor(enabled=True, limit_w=350.0, limit_w_by_gpu={"GPU-1": 300.0})
BOUNDS = (0.01, 0.1, 1.0)


class Node(Rig):
    """A rig with a guard and one engine on GPU-0."""

    def __init__(self, path: Path, driver: FakeDriver) -> None:
        super().__init__(path, driver)
        self.reading: EngineReading | None = EngineReading(0, 0)
        self.gpus: tuple[str, ...] = ("GPU-0",)

    async def watch(self) -> Node:
        async def engines() -> Mapping[str, tuple[Sequence[str], EngineReading | None]]:
            return {"a": (self.gpus, self.reading)}

        self.audit = AuditLog(self.path / "audit.log", self.clock, 1 << 20)
        self.guard = Guard(
            self.path / "guard.json",
            self.controls,
            self.fence,
            self.inventory,
            engines,
            self.clock,
            self.metrics,
            self.audit,
            str(self.path / "trigger"),
        )
        await self.guard.start()
        return self

    async def again(self, boot_id: str = "boot-1") -> Node:
        """A new agent after this one was killed."""
        heir = Node(self.path, self.driver)
        heir.clock = self.clock
        await heir.open(boot_id)
        await heir.controls.sweep()
        return await heir.watch()

    def limits_w(self) -> list[float]:
        return [gpu.limit_w for gpu in self.driver.gpus]

    def acts(self) -> list[str]:
        lines = (self.path / "audit.log").read_text().splitlines()
        return [json.loads(line)["what"] for line in lines]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path, FakeDriver())
    await made.open()
    yield await made.watch()
    made.inventory.close()


def full(path: Path, data: bytes, mode: int = 0) -> None:
    raise OSError(28, "No space left on device")


class TestRules:
    def test_a_queue_over_its_bound_is_trouble(self) -> None:
        rule = SloBoost(enabled=True, max_waiting=3)
        assert trouble(rule, None, EngineReading(9, 4)) == "4 requests wait, over 3"
        assert trouble(rule, None, EngineReading(9, 3)) == ""
        assert trouble(SloBoost(max_waiting=3), None, EngineReading(9, 4)) == ""

    def test_percentiles_are_of_the_window_not_of_the_engines_life(self) -> None:
        rule = SloBoost(enabled=True, max_ttft_p99_ms=500)
        long_ago = Histogram(BOUNDS, (0, 0, 5000, 5000), 1.0)
        fine = Histogram(BOUNDS, (0, 100, 5100, 5100), 1.0)
        slow = Histogram(BOUNDS, (0, 0, 5100, 5100), 1.0)
        assert trouble(rule, reading(long_ago), reading(fine)) == ""
        assert "TTFT P99 is 991 ms" in trouble(rule, reading(long_ago), reading(slow))

    def test_beyond_the_last_bucket_is_over_every_bound(self) -> None:
        rule = SloBoost(enabled=True, max_ttft_p99_ms=1e9)
        none = Histogram(BOUNDS, (0, 0, 0, 0), 0.0)
        assert "beyond" in trouble(rule, reading(none), reading(Histogram(BOUNDS, (0, 0, 0, 50), 1.0)))

    def test_a_restarted_engine_is_no_trouble(self) -> None:
        before = Histogram(BOUNDS, (10, 10, 90, 90), 1.0)
        assert quantile_s(before, Histogram(BOUNDS, (0, 0, 20, 20), 1.0), 0.99) is None

    @given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
    def test_a_quantile_lies_in_its_bucket(self, steps: list[int]) -> None:
        counts = tuple(sum(steps[: index + 1]) for index in range(4))
        found = quantile_s(Histogram(BOUNDS, (0, 0, 0, 0), 0.0), Histogram(BOUNDS, counts, 0.0), 0.99)
        if counts[-1] < 10:
            assert found is None
            return
        assert found is not None
        index = next(index for index in range(4) if counts[index] >= 0.99 * counts[-1])
        assert (0.0, *BOUNDS)[index] <= found <= (*BOUNDS, float("inf"))[index]

    @pytest.mark.parametrize(
        ("boost", "floor", "complaint"),
        [
            (SloBoost(enabled=True), WattsFloor(), "no bound"),
            (SloBoost(enabled=True, max_waiting=1, hold_s=0), WattsFloor(), "hold_s"),
            (SloBoost(max_waiting=float("nan")), WattsFloor(), "max_waiting"),
            (NOTHING, WattsFloor(enabled=True), "limit_w is 0"),
            (NOTHING, WattsFloor(enabled=True, limit_w=300, limit_w_by_gpu={"x": -1}), "limit_w_by_gpu[x]"),
            (NOTHING, WattsFloor(heartbeat_age_s=float("inf")), "heartbeat_age_s"),
        ],
    )
    def test_senseless_rules_are_named(self, boost: SloBoost, floor: WattsFloor, complaint: str) -> None:
        assert complaint in check_rules(boost, floor)


def reading(ttft: Histogram) -> EngineReading:
    return EngineReading(1, 0, ttft_seconds=ttft)


class TestSloBoost:
    RULE = SloBoost(enabled=True, max_waiting=3, hold_s=20.0)

    async def test_clocks_are_released_over_anybodys_lease_and_held_free(self, node: Node) -> None:
        await node.guard.set_rules(self.RULE, WattsFloor(), "test", "test")
        await node.lock(owner=OPERATOR, ttl_s=500.0)
        await node.lock(gpu=1)
        node.reading = EngineReading(9, 4)
        await node.guard.look_at_engines()
        assert node.driver.gpus[0].lock_mhz is None
        assert node.driver.gpus[1].lock_mhz == (990, 990)  # another engine's GPU
        assert node.guard.boosting
        refused = await node.lock(owner=OPERATOR)
        assert refused.code is Code.HELD
        assert "4 requests wait" in refused.detail
        node.reading = EngineReading(9, 0)
        node.clock.advance(19.9)
        await node.guard.look_at_engines()
        assert (await node.lock()).code is Code.HELD
        node.clock.advance(0.2)
        assert (await node.lock()).code is Code.APPLIED
        assert not node.guard.boosting

    async def test_trouble_that_lasts_extends_the_hold_and_is_one_act(self, node: Node) -> None:
        await node.guard.set_rules(self.RULE, WattsFloor(), "test", "test")
        node.reading = EngineReading(9, 4)
        for _ in range(5):
            await node.guard.look_at_engines()
            node.clock.advance(10.0)
        assert (await node.lock()).code is Code.HELD
        assert node.acts().count("boost") == 1

    async def test_a_silent_engine_is_no_trouble(self, node: Node) -> None:
        await node.guard.set_rules(self.RULE, WattsFloor(), "test", "test")
        await node.lock()
        node.reading = None
        await node.guard.look_at_engines()
        assert node.driver.gpus[0].lock_mhz == (990, 990)

    async def test_power_limits_are_left_alone(self, node: Node) -> None:
        await node.guard.set_rules(self.RULE, WattsFloor(), "test", "test")
        await node.apply(PowerLimit(400.0))
        node.reading = EngineReading(9, 4)
        await node.guard.look_at_engines()
        assert node.driver.gpus[0].limit_w == 400.0


class TestWattsFloor:
    async def test_a_trip_caps_every_gpu_and_a_lift_gives_back_what_was_found(self, node: Node) -> None:
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        await node.guard.trip("test")
        assert node.limits_w() == [350.0, 300.0]
        await node.after(10_000.0)
        await node.guard.tick()
        assert node.limits_w() == [350.0, 300.0]
        await node.guard.lift("test")
        assert node.limits_w() == [650.0, 650.0]
        assert node.acts() == ["rules", "trip", "lift"]

    async def test_it_never_raises_a_limit(self, node: Node) -> None:
        node.driver.gpus[0].limit_w = 250.0
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        await node.guard.trip("test")
        assert node.limits_w() == [250.0, 300.0]
        await node.guard.lift("test")
        assert node.limits_w() == [250.0, 650.0]

    async def test_leases_live_under_it_and_come_back_after_it(self, node: Node) -> None:
        await node.apply(PowerLimit(500.0), ttl_s=100.0)
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        await node.guard.trip("test")
        (result,) = await node.apply(PowerLimit(600.0), ttl_s=100.0)
        assert result.applied == PowerLimit(350.0)
        await node.guard.lift("test")
        (result,) = await node.apply(PowerLimit(600.0), ttl_s=100.0)
        assert node.limits_w()[0] == 600.0
        await node.after(101.0)
        assert node.limits_w() == [650.0, 650.0]

    async def test_it_stays_through_crash_and_reboot(self, node: Node) -> None:
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        await node.guard.trip("test")
        heir = await node.again()
        assert heir.guard.state.tripped
        assert heir.limits_w() == [350.0, 300.0]
        for gpu in heir.driver.gpus:
            gpu.limit_w = 700.0
        heir = await heir.again("boot-2")
        assert heir.limits_w() == [350.0, 300.0]
        await heir.guard.lift("test")
        assert heir.limits_w() == [700.0, 700.0]
        heir = await heir.again("boot-2")
        assert not heir.guard.state.tripped

    async def test_a_lost_heartbeat_trips_it_and_a_late_one_does_not_lift_it(self, node: Node) -> None:
        armed = WattsFloor(enabled=True, limit_w=350.0, heartbeat_age_s=30.0)
        await node.guard.set_rules(NOTHING, armed, "test", "test")
        for _ in range(4):
            node.clock.advance(20.0)
            await node.lock()
            await node.guard.tick()
        assert not node.guard.state.tripped
        node.clock.advance(30.1)
        await node.guard.tick()
        assert node.limits_w() == [350.0, 350.0]
        await node.lock()
        await node.guard.tick()
        assert node.guard.state.tripped
        await node.guard.lift("by hand")
        node.clock.advance(29.0)
        await node.guard.tick()
        assert not node.guard.state.tripped  # it counts anew from the lift

    async def test_operators_are_no_heartbeat(self, node: Node) -> None:
        armed = WattsFloor(enabled=True, limit_w=350.0, heartbeat_age_s=30.0)
        await node.guard.set_rules(NOTHING, armed, "test", "test")
        node.clock.advance(31.0)
        await node.lock(owner=OPERATOR)
        await node.guard.tick()
        assert node.guard.state.tripped

    async def test_the_trigger_file(self, node: Node) -> None:
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        (node.path / "trigger").touch()
        await node.guard.tick()
        assert node.limits_w() == [350.0, 300.0]
        with pytest.raises(Precondition, match="still exists"):
            await node.guard.lift("too early")
        (node.path / "trigger").unlink()
        await node.guard.lift("test")
        assert node.limits_w() == [650.0, 650.0]

    async def test_a_full_disk_does_not_stop_it(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        with monkeypatch.context() as patch:
            patch.setattr("nodeagent.control.journal.write_durably", full)
            patch.setattr("nodeagent.control.guard.write_durably", full)
            await node.guard.trip("test")
            assert node.limits_w() == [350.0, 300.0]
            with pytest.raises(Unavailable):
                await node.guard.lift("cannot be written")
        node.clock.advance(1.1)
        await node.guard.tick()  # room again: the state is written down
        assert json.loads((node.path / "guard.json").read_text())["tripped"] is True

    async def test_a_trip_on_a_full_disk_survives_a_kill(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        await node.apply(PowerLimit(600.0), gpu=1, ttl_s=10.0)  # the journal knows what this GPU had
        with monkeypatch.context() as patch:
            for module in ("journal", "guard", "caps", "recovery"):
                patch.setattr(f"nodeagent.control.{module}.write_durably", full)
            await node.guard.trip("test")
            heir = await node.again()
            await heir.controls.sweep()
            assert heir.limits_w() == [350.0, 300.0]
            assert heir.guard.state.tripped
        heir.clock.advance(1.1)
        await heir.controls.sweep()
        await heir.guard.lift("test")
        assert heir.limits_w() == [350.0, 650.0], "nobody knows what GPU 0 had, so its limit stays down"

    async def test_a_gpu_that_was_lost_is_capped_when_it_is_found(self, node: Node) -> None:
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        node.driver.gpus[0].fault = GpuLost("gone")
        await node.guard.trip("test")
        assert node.limits_w() == [650.0, 300.0]
        node.driver.gpus[0].fault = None
        await node.inventory.recover()
        worker = node.inventory.find("GPU-0")
        assert worker is not None
        assert worker._probe is not None
        await worker._probe
        node.clock.advance(1.1)
        await node.guard.tick()
        await node.controls.sweep()
        assert node.limits_w() == [350.0, 300.0]

    async def test_rules_that_are_lowered_while_tripped_lower_the_caps_and_never_raise_them(self, node: Node) -> None:
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        await node.guard.trip("test")
        await node.guard.set_rules(NOTHING, WattsFloor(enabled=True, limit_w=320.0), "test", "test")
        await node.guard.tick()
        assert node.limits_w() == [320.0, 300.0]

    async def test_no_trip_without_a_rule(self, node: Node) -> None:
        with pytest.raises(Precondition, match="not enabled"):
            await node.guard.trip("test")
        assert node.limits_w() == [650.0, 650.0]

    async def test_rules_for_gpus_of_another_node_are_refused(self, node: Node) -> None:
        floor = WattsFloor(enabled=True, limit_w=300.0, limit_w_by_gpu={"GPU-9": 200.0})
        with pytest.raises(Invalid, match="not on this node"):
            await node.guard.set_rules(NOTHING, floor, "test", "test")

    async def test_an_unreadable_guard_file_keeps_standing_caps(self, node: Node) -> None:
        await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
        await node.guard.trip("test")
        (node.path / "guard.json").write_bytes(b"{")
        heir = await node.again()
        assert heir.limits_w() == [350.0, 300.0]
        assert heir.guard.state.tripped
        await heir.guard.lift("test")
        assert heir.limits_w() == [650.0, 650.0]


async def test_clocks_and_the_floor_do_not_disturb_each_other(node: Node) -> None:
    await node.guard.set_rules(NOTHING, FLOOR, "test", "test")
    await node.apply(ClockLock(990, 990), ttl_s=10.0)
    await node.guard.trip("test")
    assert node.driver.gpus[0].lock_mhz == (990, 990)
    await node.after(11.0)
    assert node.driver.gpus[0].lock_mhz is None
    assert node.limits_w() == [350.0, 300.0]


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
async def test_a_step_of_the_wall_clock_moves_no_lease_and_trips_no_floor(node: Node, step_s: float) -> None:
    await node.guard.set_rules(NOTHING, WattsFloor(enabled=True, limit_w=350.0, heartbeat_age_s=30.0), "test", "test")
    await node.lock(ttl_s=20.0)
    node.clock.wall_at_zero_s += step_s
    await node.after(19.9)
    await node.guard.tick()
    assert node.driver.gpus[0].lock_mhz == (990, 990)
    assert not node.guard.state.tripped
    await node.after(0.2)
    assert node.driver.gpus[0].lock_mhz is None
