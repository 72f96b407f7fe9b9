"""The provisioner in the loop: a day and its night in virtual time, hooks that fail, restarts, modes."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode, Reason
from controller.fleet.port import (
    ApplyCaps,
    ClassCounters,
    Effect,
    EffectDone,
    Event,
    GpuObservation,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    PowerNode,
    Solve,
    StartInstance,
    Tick,
)
from controller.fleet.provisioner import PowerHook
from controller.loop.core import Core
from controller.loop.orders import NotePower, Order, SetMode, SetPowerBudget
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from controller.policy.provision import NodePower, ProvisionSettings
from simulator.fast.fleet import FastFleet, FastResult
from simulator.fleet import FleetResult, FleetTimes, VirtualFleet
from simulator.physics import Physics
from simulator.traces import Request, generate
from tests.synthetic_profile import MODEL, synthetic_profile

MS = RequestClass.parse("MS")
BOOT_S, OFF_S = 20.0, 4.0
PROVISION = ProvisionSettings(spare_nodes=1, min_on_s=20.0, boot_s=BOOT_S, off_s=OFF_S, give_up_s=60.0, retry_s=15.0)


LOOP = LoopSettings(
    model=MODEL,
    cluster_s=20,
    pool_s=5,
    instance_s=1,
    lease_ttl_s=4,
    rpc_deadline_s=0.5,
    load_window_s=5,
    min_dwell_s=5,
    start_s=3,
    initial_rps={MS: 1.0},
    provision=PROVISION,
    stale_s=4,
    lost_s=8,
)

# ------------------------------------------------------------------------------------------------- in virtual time


@pytest.fixture(scope="module")
def served() -> FleetResult:
    """Four nodes: a quiet time, in which two are not needed, then a rise."""
    quiet = generate("conv", 90.0, 1.0, seed=1)
    rise = [r._replace(arrival_s=r.arrival_s + 90.0) for r in generate("conv", 30.0, 5.0, seed=2)]
    fleet = VirtualFleet(
        Core(LOOP, synthetic_profile(), term=1, expected_nodes=4),
        Physics.load(),
        4,
        FleetTimes(start_s=3.5, off_s=OFF_S, boot_s=BOOT_S),
    )
    more = [r._replace(arrival_s=r.arrival_s + 120.0) for r in generate("conv", 45.0, 14.0, seed=3)]
    requests: list[Request] = [*quiet, *rise, *more]
    return fleet.run(requests, start_s=4.0)


def test_the_fast_fleet_has_the_same_nodes_off() -> None:
    trace = generate("conv", 80.0, 1.0, seed=4)
    times = FleetTimes(start_s=3.5, off_s=OFF_S, boot_s=BOOT_S)

    def core() -> Core:
        return Core(LOOP, synthetic_profile(), term=1, expected_nodes=4)

    slow = VirtualFleet(core(), Physics.load(), 4, times).run(trace, start_s=4.0)
    fast = FastFleet(core(), Physics.load(), 4, trace, start_s=4.0, times=times, keep_observations=True).run()
    assert powered(slow)
    assert powered(slow) == powered(fast)
    assert 0 < fast.off_node_s <= slow.off_node_s
    # What is off draws nothing: parked GPU-seconds and what is held make up the rest.
    held_s = fast.window_s * 32 - fast.parked_gpu_s - 8 * fast.off_node_s
    assert 0 < held_s < fast.window_s * 16


def powered(result: FleetResult | FastResult) -> list[tuple[float, str, bool]]:
    return [(at_s, e.node_id, e.on) for at_s, e in result.effects if isinstance(e, PowerNode)]


def test_what_the_night_does_not_need_goes_off_and_comes_back_for_the_day(served: FleetResult) -> None:
    sent = powered(served)
    off = [(at_s, node) for at_s, node, on in sent if not on]
    back = [(at_s, node) for at_s, node, on in sent if on]
    assert off
    assert min(at_s for at_s, _ in off) >= OFF_S + BOOT_S, "only once it pays"
    assert back
    assert min(at_s for at_s, _ in back) >= 94, "not before the rise can be seen"
    assert {node for _, node in back} <= {node for _, node in off}
    assert served.off_node_s > 30
    assert all(request.ended and not request.failed for request in served.requests), "nobody is lost to it"


def test_nothing_is_started_on_a_node_that_is_not_there(served: FleetResult) -> None:
    gone: dict[str, float] = {}
    for at_s, effect in served.effects:
        if isinstance(effect, PowerNode):
            gone[effect.node_id] = float("inf") if not effect.on else at_s + BOOT_S
        elif isinstance(effect, StartInstance):
            assert at_s >= gone.get(effect.node_id, 0.0)


def test_a_node_that_is_off_is_not_lost(served: FleetResult) -> None:
    assert not [d for d in served.decisions if d.trigger == "node_lost"]
    assert Reason.NODE_HOOK_FAILED not in {d.reason for d in served.decisions}
    backs = [d for d in served.decisions if d.trigger == "node_back"]
    assert backs, "it is planned with at once"


def test_each_change_says_why(served: FleetResult) -> None:
    told = [d for d in served.decisions if d.reason in (Reason.NODE_OFF, Reason.NODE_ON)]
    assert len(told) == len(powered(served))
    assert all("GPUs" in d.sentence or "load is not served" in d.sentence for d in told)
    on = [d for d in told if d.reason is Reason.NODE_ON][-1]
    assert on.inputs["boot_s"] >= BOOT_S


# --------------------------------------------------------------------------------------------------- event by event


class Bench:
    """A core over nodes that do as they are told; the load is reported with every tick."""

    def __init__(self, nodes: int = 3, **changes: object) -> None:
        base = LoopSettings(
            model=MODEL, cluster_s=60, pool_s=15, instance_s=5, lease_ttl_s=20, rpc_deadline_s=4, lost_s=60,
            stale_s=15, initial_rps={MS: 1.0}, provision=PROVISION,
        )  # fmt: skip
        self.core = Core(
            replace(base, **changes),  # type: ignore[arg-type]  # the tests name real fields
            synthetic_profile(),
            term=3,
            expected_nodes=nodes,
        )
        self.names = [f"n{i}" for i in range(nodes)]
        self.up = set(self.names)
        self.hook_fails = False
        self.obeys = True
        self.now_s, self.arrived = 0.0, 0
        self.sent: list[tuple[float, PowerNode]] = []
        self.caps: list[ApplyCaps] = []
        self.decided: list[Decision] = []

    def send(self, event: Event | Order) -> None:
        at = Instant(self.now_s, 1e9 + self.now_s)
        is_event = isinstance(event, Tick | NodeSeen | LoadSeen | EffectDone)
        step = self.core.handle(at, event) if is_event else self.core.order(at, event)  # type: ignore[arg-type]
        self.decided += step.decisions
        for effect in step.effects:
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Solve():
                self.send(EffectDone(effect.effect_id, True, solution=plan_for(effect.problem)))
            case PowerNode():
                self.sent.append((self.now_s, effect))
                if not self.hook_fails and self.obeys:
                    (self.up.add if effect.on else self.up.discard)(effect.node_id)
                self.send(EffectDone(effect.effect_id, not self.hook_fails, "no such host" if self.hook_fails else ""))
            case ApplyCaps():
                self.caps.append(effect)
                self.send(EffectDone(effect.effect_id, True))
            case _:
                self.send(EffectDone(effect.effect_id, True))

    def tick(self, times: int = 1, rate_rps: float = 0.5) -> None:
        for _ in range(times):
            self.now_s += 5.0
            for name in sorted(self.up):
                gpus = tuple(GpuObservation(f"{name}-{i}", i, True, 72.0, 0.0, 345, None) for i in range(8))
                self.send(NodeSeen(NodeObservation(name, self.now_s, gpus, ())))
            self.arrived += int(5 * rate_rps)
            counts = ClassCounters(self.arrived, self.arrived, 0, self.arrived, 500 * self.arrived, 150 * self.arrived)
            self.send(LoadSeen(LoadObservation("g", "1", self.now_s, MODEL, {MS: counts}, {})))
            self.send(Tick(Level.INSTANCE))

    @property
    def power(self) -> dict[str, NodePower]:
        return {node: item.power for node, item in self.core.state.powered.items()}


def quiet() -> Bench:
    """Two of four nodes have gone off."""
    bench = Bench(4)
    bench.tick(30)
    assert list(bench.power.values()).count(NodePower.OFF) == 2, bench.power
    return bench


def test_a_hook_that_fails_is_reported_and_tried_less_and_less_often() -> None:
    bench = Bench(4)
    bench.hook_fails = True
    bench.tick(60)
    times = {node: [at for at, e in bench.sent if e.node_id == node] for node in {e.node_id for _, e in bench.sent}}
    for at in times.values():
        gaps = [b - a for a, b in pairwise(at)]
        assert gaps == sorted(gaps)
        assert len(at) <= 5
    failed = [d for d in bench.decided if d.reason is Reason.NODE_HOOK_FAILED]
    assert len(failed) == len(bench.sent)
    assert "no such host" in failed[0].sentence
    assert set(bench.power.values()) == {NodePower.ON}
    assert bench.core.state.usable_gpus(bench.now_s) == 32, "they are used like any other"


def test_a_node_that_does_not_come_is_given_up_and_tried_again_later() -> None:
    bench = quiet()
    bench.obeys = False
    bench.core.state.settings = replace(bench.core.state.settings, provision=replace(PROVISION, spare_nodes=2))
    bench.tick(4)
    assert NodePower.BOOTING in bench.power.values()
    bench.tick(14)
    assert NodePower.BOOTING not in bench.power.values() or len([e for _, e in bench.sent if e.on]) > 1
    assert [d for d in bench.decided if d.reason is Reason.NODE_HOOK_FAILED]
    bench.obeys = True
    bench.tick(20)
    assert list(bench.power.values()).count(NodePower.OFF) <= 1


def test_a_node_that_somebody_else_turns_on_is_on() -> None:
    bench = quiet()
    back = next(node for node, power in bench.power.items() if power is NodePower.OFF)
    bench.up.add(back)
    bench.tick(4)
    assert bench.power[back] is NodePower.ON
    assert not [e for _, e in bench.sent if e.on]


def test_the_next_controller_knows_what_is_off_and_does_not_wait_for_it() -> None:
    before = quiet()
    off = sorted(node for node, power in before.power.items() if power is NodePower.OFF)
    heir = Bench(4)
    heir.up = set(before.up)
    for node in off:
        heir.send(NotePower(node))
    heir.tick(2)
    assert heir.core.state.pools, "it plans at once, with the nodes that are on"
    assert heir.core.state.usable_gpus(heir.now_s) == 16
    heir.tick(20)
    assert not [d for d in heir.decided if d.trigger == "node_lost"]
    assert not heir.sent


def test_silence_turns_nothing_off() -> None:
    bench = Bench(4)
    for _ in range(40):
        bench.now_s += 5.0
        for name in bench.names:
            gpus = tuple(GpuObservation(f"{name}-{i}", i, True, 72.0, 0.0, 345, None) for i in range(8))
            bench.send(NodeSeen(NodeObservation(name, bench.now_s, gpus, ())))
        bench.send(Tick(Level.INSTANCE))
    assert not bench.sent


def test_advice_is_recorded_once_and_nothing_is_touched() -> None:
    bench = Bench(4)
    bench.send(SetMode("cluster", Mode.ADVISORY))
    bench.tick(60)
    assert not bench.sent
    advised = [d for d in bench.decided if d.reason is Reason.NODE_OFF]
    assert advised
    assert len(advised) <= 2
    assert all(d.mode is Mode.ADVISORY for d in advised)


def test_a_node_that_is_to_be_left_alone_stays_on() -> None:
    bench = Bench(4)
    for name in ("n2", "n3"):
        bench.send(SetMode(f"node:{name}", Mode.PAUSED))
    bench.tick(40)
    assert not {"n2", "n3"} & {e.node_id for _, e in bench.sent}


def test_under_a_budget_room_is_made_before_a_node_boots() -> None:
    bench = quiet()
    bench.send(SetPowerBudget("cluster", 16 * 400.0))
    assert "cluster" in bench.core.state.budgets_held, "what is off draws nothing"
    bench.core.state.settings = replace(bench.core.state.settings, provision=replace(PROVISION, spare_nodes=2))
    bench.tick(4)
    assert not [e for _, e in bench.sent if e.on], "8 GPUs at 700 W beside two nodes at their lowest caps: no room"
    bench.send(SetPowerBudget("cluster", 16 * 200.0 + 8 * 700.0))
    bench.caps.clear()
    bench.tick(6)
    assert [e for _, e in bench.sent if e.on]
    assert bench.caps, "the others were lowered first"


# ------------------------------------------------------------------------------------------------------- the hook


def run(hook: PowerHook, node: str, on: bool = True) -> str:
    return asyncio.run(hook.run(node, on))


def test_the_hook_runs_without_a_shell_and_names_the_node(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"import sys; open({str(out)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')"
    hook = PowerHook(
        (sys.executable, "-c", script, "{node}", "on"), (sys.executable, "-c", script, "{node}", "off"), 20
    )
    assert run(hook, "gpu-1") == ""
    assert run(hook, "gpu-1; rm -rf $HOME", on=False) == ""
    assert out.read_text() == "gpu-1 on\ngpu-1; rm -rf $HOME off\n"


def test_a_hook_that_fails_says_what_it_said() -> None:
    failing = (sys.executable, "-c", "print('BMC does not answer'); raise SystemExit(3)", "{node}")
    said = run(PowerHook(failing, failing, 20), "gpu-1")
    assert "ended with 3" in said
    assert "BMC does not answer" in said
    missing = PowerHook(("/nowhere/bmc", "{node}"), ("/nowhere/bmc", "{node}"), 20)
    assert "/nowhere/bmc" in run(missing, "gpu-1")


def test_a_hook_that_hangs_is_killed_with_its_children() -> None:
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    began_s = time.monotonic()
    assert "did not end within" in run(PowerHook((sys.executable, "-c", script), ("x",), 0.5), "gpu-1")
    assert time.monotonic() - began_s < 30
