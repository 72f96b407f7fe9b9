"""Power budgets in the loop: in virtual time under load, and event by event where something goes wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode, Reason
from controller.fleet.port import (
    ApplyCaps,
    ApplyClocks,
    Effect,
    EffectDone,
    Event,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    NodeObservation,
    NodeSeen,
    ReleaseCaps,
    Solve,
    Tick,
)
from controller.loop.core import Core
from controller.loop.orders import Order, SetMode, SetPowerBudget
from controller.loop.settings import LoopSettings
from controller.loop.snapshot import restore, take
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from simulator.fleet import WALL_AT_ZERO_S, FleetResult, FleetTimes, VirtualFleet
from simulator.physics import Physics
from simulator.traces import generate
from tests.synthetic_profile import MODEL, synthetic_profile

BUDGET_W, SET_S, LIFTED_S = 5000.0, 24.0, 54.0
TICK_S = 1.0


def settings(**changes: object) -> LoopSettings:
    base = LoopSettings(
        model=MODEL, cluster_s=60, pool_s=15, instance_s=5, lease_ttl_s=20, rpc_deadline_s=4, lost_s=60, stale_s=15
    )
    return replace(base, **changes)  # type: ignore[arg-type]  # the tests name real fields


# ------------------------------------------------------------------------------------------------- in virtual time


@pytest.fixture(scope="module")
def served() -> FleetResult:
    """Two nodes under load, a budget of 5 kW (16 GPUs at 312 W) for half a minute."""
    loop = LoopSettings(
        model=MODEL,
        cluster_s=20,
        pool_s=5,
        instance_s=TICK_S,
        lease_ttl_s=4,
        rpc_deadline_s=0.5,
        load_window_s=5,
        min_dwell_s=5,
        start_s=3,
        initial_rps={RequestClass.parse("MS"): 6.0, RequestClass.parse("LM"): 4.0},
        rows={"a": ("node-0",)},
    )
    core = Core(loop, synthetic_profile(), term=1, expected_nodes=2)
    orders: list[tuple[float, Order]] = [
        (SET_S, SetPowerBudget("row:a", 2200.0)),
        (SET_S, SetPowerBudget("cluster", BUDGET_W, WALL_AT_ZERO_S + LIFTED_S)),
        (SET_S + 12, SetPowerBudget("row:a", None)),
    ]
    fleet = VirtualFleet(core, Physics.load(), 2, FleetTimes(start_s=3.5), orders=orders)
    return fleet.run(generate("conv", 62.0, 14.0, seed=2), start_s=8.0)


def powers(result: FleetResult, nodes: tuple[str, ...] = ("node-0", "node-1")) -> list[tuple[float, float]]:
    """Watts at each instant at which all nodes were observed."""
    at: dict[float, dict[str, float]] = {}
    for seen in result.observations:
        at.setdefault(seen.observed_at_s, {})[seen.node_id] = sum(gpu.power_w or 0.0 for gpu in seen.gpus)
    return [(t, sum(found[n] for n in nodes)) for t, found in sorted(at.items()) if set(nodes) <= set(found)]


def test_the_fleet_draws_no_more_than_the_budget_two_ticks_after_it_was_set(served: FleetResult) -> None:
    before = [w for t, w in powers(served) if SET_S - 12 < t < SET_S]
    during = [w for t, w in powers(served) if SET_S + 2 * TICK_S <= t < LIFTED_S]
    after = [w for t, w in powers(served) if t > LIFTED_S + 5]
    assert max(before) > BUDGET_W, "it would have drawn more"
    assert len(during) > 20
    assert max(during) <= BUDGET_W
    assert max(after) > BUDGET_W, "and does again"
    row = [w for t, w in powers(served, ("node-0",)) if SET_S + 2 * TICK_S <= t < SET_S + 12]
    assert max(row) <= 2200


def test_the_caps_never_add_up_to_more_than_the_budget(served: FleetResult) -> None:
    """Between the second tick and the end, whatever the layout does meanwhile."""
    caps: dict[str, dict[str, float]] = {}
    moved = 0
    for at_s, effect in served.effects:
        if not SET_S <= at_s < LIFTED_S:
            continue
        if isinstance(effect, ApplyCaps):
            moved += 1
            for target in effect.targets:
                caps.setdefault(effect.node_id, {}).update(dict.fromkeys(target.gpu_uuids, target.watts))
            total = sum(watts for node in caps.values() for watts in node.values())
            assert total <= BUDGET_W
            assert sum(caps.get("node-0", {}).values()) <= (2200 if at_s < SET_S + 12 else BUDGET_W)
    assert moved > 2
    assert sum(len(node) for node in caps.values()) == 16, "every GPU has one"


def test_what_it_costs_is_predicted_and_recorded(served: FleetResult) -> None:
    (set_for_row, set_for_cluster) = [
        d for d in served.decisions if d.reason is Reason.POWER_BUDGET and "slo" in d.outcome
    ]
    assert set_for_cluster.decided_at_s == WALL_AT_ZERO_S + SET_S
    assert set_for_cluster.inputs["budget"] == {
        "scope": "cluster", "watts": BUDGET_W, "until_s": WALL_AT_ZERO_S + LIFTED_S,
    }  # fmt: skip
    assert set_for_cluster.outcome["caps_total_w"] <= BUDGET_W
    assert set_for_cluster.predicted_power_w is not None
    assert set_for_cluster.predicted_power_w <= BUDGET_W
    assert set_for_row.inputs["budget"]["scope"] == "row:a"
    for share in set_for_cluster.outcome["slo"].values():
        assert 0 < share["served_share"] <= 1
        assert share["carried_rps"] > 0
    plans = [
        d for d in served.decisions if d.trigger == "budget" and "budget_w" in d.outcome and d.level is Level.CLUSTER
    ]
    assert plans, "it was planned anew within the budget"
    assert plans[0].decided_at_s == WALL_AT_ZERO_S + SET_S
    assert all(d.inputs["problem"]["budget_w"] <= BUDGET_W for d in plans)
    held = [d for d in served.decisions if d.reason is Reason.BUDGET_HELD]
    assert held
    assert min(d.decided_at_s for d in held) <= WALL_AT_ZERO_S + SET_S + 2 * TICK_S
    assert [d.decided_at_s - WALL_AT_ZERO_S for d in served.decisions if d.reason is Reason.BUDGET_ENDED] == [
        SET_S + 12,
        LIFTED_S,
    ]


def test_at_its_end_every_cap_goes_and_the_plan_is_made_without_it(served: FleetResult) -> None:
    released = {
        effect.node_id for at_s, effect in served.effects if isinstance(effect, ReleaseCaps) and at_s >= LIFTED_S
    }
    assert released == {"node-0", "node-1"}
    assert not [effect for at_s, effect in served.effects if isinstance(effect, ApplyCaps) and at_s > LIFTED_S]
    last = [d for d in served.decisions if d.level is Level.CLUSTER and "problem" in d.inputs][-1]
    assert "budget_w" not in last.inputs["problem"]
    assert all(gpu.limit_w is None for seen in served.observations[-2:] for gpu in seen.gpus)


# --------------------------------------------------------------------------------------------------- event by event


class Bench:
    """A core with agents that keep their caps; `deaf` ones answer nothing."""

    def __init__(self, core: Core, nodes: tuple[str, ...] = ("a", "b")) -> None:
        self.core = core
        self.now_s = 0.0
        self.limits_w = {f"{node}-{i}": 700.0 for node in nodes for i in range(8)}
        self.nodes = nodes
        self.deaf: set[str] = set()
        self.silent: set[str] = set()
        self.highest_w = 0.0  # that all limits ever added up to since they were watched
        self.sent: list[Effect] = []
        self.decided: list[Decision] = []

    @property
    def reasons(self) -> list[Reason]:
        return [decision.reason for decision in self.decided]

    def at(self) -> Instant:
        return Instant(self.now_s, 1e9 + self.now_s)

    def send(self, event: Event | SetMode | SetPowerBudget) -> list[Effect]:
        if isinstance(event, SetMode | SetPowerBudget):
            step = self.core.order(self.at(), event)
        else:
            step = self.core.handle(self.at(), event)
        self.decided += step.decisions
        for effect in step.effects:
            self.sent.append(effect)
            if isinstance(effect, Solve):
                self.send(EffectDone(effect.effect_id, True, solution=plan_for(effect.problem)))
            elif isinstance(effect, ApplyCaps | ReleaseCaps) and effect.node_id not in self.deaf:
                self._obey(effect)
                self.send(EffectDone(effect.effect_id, True))
            elif isinstance(effect, ApplyCaps | ReleaseCaps):
                self.send(EffectDone(effect.effect_id, False, "UNAVAILABLE"))
        return list(step.effects)

    def _obey(self, effect: ApplyCaps | ReleaseCaps) -> None:
        if isinstance(effect, ReleaseCaps):
            self.limits_w.update(dict.fromkeys(effect.gpu_uuids, 700.0))
            return
        for target in effect.targets:
            for uuid in target.gpu_uuids:
                self.limits_w[uuid] = target.watts
                self.highest_w = max(self.highest_w, self.total_w())

    def total_w(self, node: str = "") -> float:
        return sum(watts for uuid, watts in self.limits_w.items() if uuid.startswith(node))

    def see(self, instances: Mapping[str, tuple[InstanceObservation, ...]] | None = None) -> None:
        for node in self.nodes:
            if node not in self.silent:
                gpus = tuple(
                    GpuObservation(
                        f"{node}-{i}", i, True, 72.0, 0.0, 345, None, self.limits_w[f"{node}-{i}"], (200.0, 700.0)
                    )
                    for i in range(8)
                )
                self.send(NodeSeen(NodeObservation(node, self.now_s, gpus, (instances or {}).get(node, ()))))

    def tick(
        self, seconds: float = 5.0, instances: Mapping[str, tuple[InstanceObservation, ...]] | None = None
    ) -> list[Effect]:
        self.now_s += seconds
        self.see(instances)
        before = len(self.sent)
        self.send(Tick(Level.INSTANCE))
        return self.sent[before:]


def bench(**changes: object) -> Bench:
    made = Bench(Core(settings(**changes), synthetic_profile(), term=3, expected_nodes=2))
    made.see()
    made.tick()
    return made


def loaded(node: str, tp: int = 8) -> InstanceObservation:
    uuids = tuple(f"{node}-{i}" for i in range(tp))
    return InstanceObservation(f"i-{node}", MODEL, "all", uuids, InstanceState.READY, f"http://{node}", 1.0, 0.0, 0.0)


def test_caps_are_asked_for_with_the_order_itself() -> None:
    made = bench()
    made.send(SetPowerBudget("cluster", 6000.0))
    assert made.total_w() <= 6000
    assert made.core.state.budgets_held == {"cluster"}


def test_a_budget_below_the_lowest_caps_is_said_to_be_out_of_reach() -> None:
    made = bench()
    effects = made.send(SetPowerBudget("cluster", 2000.0))
    assert Reason.BUDGET_UNREACHABLE in made.reasons
    assert {t.watts for e in effects if isinstance(e, ApplyCaps) for t in e.targets} == {200.0}
    assert "cluster" in made.core.state.budgets_unreachable
    assert "cluster" not in made.core.state.budgets_held
    # The plan goes on: nothing is stopped for it.
    assert made.core.state.pools


def test_a_node_that_cannot_be_told_leaves_less_to_the_others() -> None:
    made = bench()
    made.deaf = {"b"}
    made.send(SetPowerBudget("cluster", 8000.0))
    assert made.total_w("a") <= 8000 / 2 + 8
    assert "cluster" not in made.core.state.budgets_held, "b has not confirmed"
    made.silent = {"b"}
    for _ in range(5):
        made.tick()
    assert made.total_w("a") <= 8000 - 8 * 700
    made.deaf, made.silent = set(), set()
    for _ in range(3):
        made.tick()
    assert made.total_w() <= 8000
    assert made.core.state.budgets_held == {"cluster"}
    assert made.total_w("a") > 8000 - 8 * 700


def test_caps_move_between_nodes_without_ever_being_too_many() -> None:
    made = bench()
    made.send(SetPowerBudget("cluster", 6000.0))
    made.highest_w = made.total_w()
    for first, second in (("a", "b"), ("b", "a"), ("a", "b")):
        for _ in range(3):
            made.tick(instances={first: (loaded(first),)})
        assert made.total_w(first) > made.total_w(second)
        assert made.total_w() > 5500, "what is there is used"
    assert made.highest_w <= 6000


def test_a_clock_stays_within_the_cap_even_in_trouble() -> None:
    made = bench()
    made.send(SetPowerBudget("cluster", 4000.0))
    busy = replace(loaded("a"), waiting=50.0, running=500.0)
    clocks = [
        target.mhz
        for _ in range(3)
        for effect in made.tick(instances={"a": (busy,)})
        if isinstance(effect, ApplyClocks)
        for target in effect.targets
    ]
    assert clocks
    assert max(clocks) < 1980
    chosen = [d for d in made.decided if d.level is Level.INSTANCE and d.scope == "i-a"]
    assert all(d.inputs["cap_w"] <= 300 for d in chosen)


def test_it_ends_by_itself_and_gives_the_limits_back_also_late() -> None:
    made = bench()
    made.send(SetPowerBudget("cluster", 6000.0, until_s=1e9 + made.now_s + 8))
    made.deaf = {"b"}
    made.tick()
    assert made.total_w() <= 6000
    made.tick()
    assert not made.core.state.budgets
    assert made.total_w("a") == 8 * 700
    assert made.total_w("b") <= 6000
    made.deaf = set()
    made.tick()
    assert made.total_w() == 16 * 700
    made.tick()
    assert not made.core.state.caps
    assert not [e for e in made.tick() if isinstance(e, ApplyCaps | ReleaseCaps)], "and that is that"


def test_a_new_controller_takes_over_what_stands() -> None:
    made = bench()
    made.send(SetPowerBudget("cluster", 6000.0))
    for _ in range(2):
        made.tick(instances={"a": (loaded("a"),)})
    limits = dict(made.limits_w)
    heir = Bench(Core(settings(), synthetic_profile(), term=4, expected_nodes=2))
    heir.limits_w, heir.highest_w = limits, sum(limits.values())
    heir.send(SetPowerBudget("cluster", 6000.0))
    heir.see({"a": (loaded("a"),)})
    for _ in range(3):
        heir.tick(instances={"b": (loaded("b"),)})
    assert heir.highest_w <= 6000
    assert heir.core.state.budgets_held == {"cluster"}


def test_one_that_ended_while_nobody_led_is_made_up_for() -> None:
    """The order is still the last of its scope in the history; the caps still stand."""
    heir = Bench(Core(settings(node_ids=("a", "b")), synthetic_profile(), term=4, expected_nodes=2))
    heir.limits_w = dict.fromkeys(heir.limits_w, 300.0)
    heir.send(SetPowerBudget("cluster", 4800.0, until_s=1e9 - 60))
    heir.silent = {"b"}
    heir.see()
    for _ in range(14):
        heir.tick()
    assert heir.total_w("a") == 8 * 700
    assert heir.total_w("b") == 8 * 300
    heir.silent = set()
    heir.tick()
    assert heir.total_w() == 16 * 700


def test_a_takeover_without_any_budget_touches_no_caps() -> None:
    heir = bench()
    heir.limits_w = dict.fromkeys(heir.limits_w, 300.0)
    for _ in range(3):
        heir.tick()
    assert not [e for e in heir.sent if isinstance(e, ApplyCaps | ReleaseCaps)]


@pytest.mark.parametrize("mode", [Mode.ADVISORY, Mode.PAUSED])
def test_what_may_not_be_touched_is_not_capped(mode: Mode) -> None:
    made = bench()
    made.send(SetMode("cluster", mode))
    made.send(SetPowerBudget("cluster", 6000.0))
    made.tick()
    assert made.total_w() == 16 * 700
    made.send(SetMode("cluster", Mode.ACTIVE))
    made.tick()
    made.tick()
    assert made.total_w() <= 6000


def test_hosts_count_and_so_do_nodes_that_were_never_seen() -> None:
    made = bench(host_w=500.0, rows={"r": ("b", "c")}, node_ids=("a", "b", "c"))
    made.send(SetPowerBudget("row:r", 9000.0))
    assert made.total_w("a") == 8 * 700
    assert made.total_w("b") <= 9000 - 2 * 500 - 8 * 700


def test_state_with_a_budget_survives_a_snapshot() -> None:
    made = bench()
    made.deaf = {"b"}
    made.send(SetPowerBudget("cluster", 6000.0, until_s=2e9))
    data = json.loads(take(made.core.state, 2)())
    other = Core(settings(), synthetic_profile(), term=3, expected_nodes=2)
    restore(other.state, data)
    assert other.state.budgets == made.core.state.budgets
    assert other.state.caps == made.core.state.caps
    assert json.loads(take(other.state, 2)()) == data
