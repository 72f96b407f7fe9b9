"""Modes: advisory decides and touches nothing, paused does not decide, and every thing has the most cautious one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode
from controller.fleet.port import (
    ApplyClocks,
    ClassCounters,
    DrainInstance,
    Effect,
    EffectDone,
    Event,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadObservation,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    PublishRouting,
    ReleaseClocks,
    Solve,
    StartInstance,
    StopInstance,
    Tick,
)
from controller.loop.core import Core, Step
from controller.loop.journal import JournaledCore
from controller.loop.modes import may_touch
from controller.loop.orders import PlanNow, SetMode, most_cautious
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from simulator.fleet import FleetTimes, VirtualFleet
from simulator.physics import Physics
from simulator.traces import generate
from tests.synthetic_profile import MODEL, synthetic_profile
from tests.unit.test_loop_journal import PROFILE, SETTINGS, Ordered

MS = RequestClass.parse("MS")
TOUCHING = (ApplyClocks, ReleaseClocks, StartInstance, DrainInstance, StopInstance)


class Bench:
    """A core over nodes that show what they are told to; solves are answered at once."""

    def __init__(self, nodes: int) -> None:
        settings = LoopSettings(model=MODEL, cluster_s=60, pool_s=15, instance_s=5, lease_ttl_s=20)
        self.core = Core(settings, synthetic_profile(), term=1, expected_nodes=nodes)
        self.now_s = 0.0
        self.steps: list[Step] = []
        self.instances: dict[str, tuple[InstanceObservation, ...]] = {}

    def send(self, event: Event) -> list[Effect]:
        return self.took(self.core.handle(Instant(self.now_s, 1e9 + self.now_s), event))

    def took(self, step: Step) -> list[Effect]:
        self.steps.append(step)
        effects = [effect for effect in step.effects if not isinstance(effect, Solve)]
        for effect in step.effects:
            if isinstance(effect, Solve):
                effects += self.send(EffectDone(effect.effect_id, True, solution=plan_for(effect.problem)))
        return effects

    def see(self, node: str, *instances: InstanceObservation) -> list[Effect]:
        gpus = tuple(GpuObservation(f"{node}-{i}", i, True, 72.0, 0.0, 345, None) for i in range(8))
        return self.send(NodeSeen(NodeObservation(node, self.now_s, gpus, instances)))

    @property
    def decided(self) -> list[Decision]:
        return [decision for step in self.steps for decision in step.decisions]


def ready(effect: StartInstance) -> InstanceObservation:
    return InstanceObservation(
        effect.instance_id, effect.model, effect.pool, effect.gpu_uuids, InstanceState.READY, "http://x", 0.0, 0.0, 0.0
    )


def order(bench: Bench, given: SetMode | PlanNow) -> list[Effect]:
    return bench.took(bench.core.order(Instant(bench.now_s, 1e9 + bench.now_s), given))


def serving(nodes: int = 1) -> Bench:
    """A fleet whose instances are ready."""
    bench = Bench(nodes)
    names = "ab"[:nodes]
    for node in names:
        bench.see(node)
    started = [e for e in bench.send(Tick(Level.INSTANCE)) if isinstance(e, StartInstance)]
    for node in names:
        bench.instances[node] = tuple(ready(effect) for effect in started if effect.node_id == node)
        bench.see(node, *bench.instances[node])
    return bench


def tick(bench: Bench, seconds: float = 5.0) -> list[Effect]:
    bench.now_s += seconds
    effects: list[Effect] = []
    for node, seen in bench.instances.items():
        effects += bench.see(node, *seen)
    return effects + bench.send(Tick(Level.INSTANCE))


def test_the_most_cautious_mode_holds() -> None:
    assert most_cautious(Mode.ACTIVE, Mode.ADVISORY, Mode.ACTIVE) is Mode.ADVISORY
    assert most_cautious(Mode.PAUSED, Mode.ADVISORY) is Mode.PAUSED
    bench = serving()
    order(bench, SetMode("pool:all", Mode.PAUSED))
    assert not may_touch(bench.core.state, "all", "a")
    order(bench, SetMode("pool:all", Mode.ACTIVE))
    assert may_touch(bench.core.state, "all", "a")
    assert bench.core.state.modes == {}


@pytest.mark.parametrize("scope", ["cluster", "pool:all", "node:a"])
@pytest.mark.parametrize("mode", [Mode.ADVISORY, Mode.PAUSED])
def test_nothing_in_the_scope_is_touched(scope: str, mode: Mode) -> None:
    bench = serving()
    assert any(isinstance(effect, ApplyClocks) for effect in tick(bench))
    order(bench, SetMode(scope, mode))
    before = len(bench.decided)
    effects = tick(bench) + tick(bench) + bench.send(Tick(Level.POOL)) + bench.send(Tick(Level.CLUSTER))
    assert not [effect for effect in effects if isinstance(effect, TOUCHING)]
    decided = bench.decided[before:]
    if mode is Mode.ADVISORY:
        clocks = [d for d in decided if d.level is Level.INSTANCE]
        assert clocks, "it goes on deciding"
        assert {d.mode for d in clocks} == {Mode.ADVISORY}
    elif scope == "cluster":
        assert decided == []
    order(bench, SetMode(scope, Mode.ACTIVE))
    assert any(isinstance(effect, ApplyClocks) for effect in tick(bench)), "and takes it up again"


def test_a_paused_node_leaves_its_neighbour_alone() -> None:
    bench = serving(nodes=2)
    order(bench, SetMode("node:a", Mode.PAUSED))
    locked = [effect.node_id for effect in tick(bench) if isinstance(effect, ApplyClocks)]
    assert locked == ["b"]


def test_advice_never_drains_an_instance_out_of_the_routing() -> None:
    """Without its drain being carried out it would serve nobody and cost all the same."""
    bench = serving()
    order(bench, SetMode("cluster", Mode.ADVISORY))
    (only,) = bench.instances["a"]
    stranger = replace(only, instance_id="stranger", gpu_uuids=(), endpoint="http://stranger")
    effects = bench.see("a", only, stranger)
    assert not [effect for effect in effects if isinstance(effect, TOUCHING)]
    tables = [effect.table for effect in effects if isinstance(effect, PublishRouting)]
    assert all(i.accepts_new for table in tables for pool in table.pools for i in pool.instances)
    assert {i.instance_id for pool in tables[-1].pools for i in pool.instances} == {only.instance_id, "stranger"}


def test_advisory_predicts_again_and_again_against_what_really_runs() -> None:
    """A whole run in which nothing may be changed: plans are made, compared with what stands, and never carried out."""
    core = Ordered(SETTINGS, PROFILE, term=1, expected_nodes=2)
    core.give([(12.0, SetMode("cluster", Mode.ADVISORY))])
    core.keep_journal(lambda _: None)
    fleet = VirtualFleet(core, Physics.load(), 2, FleetTimes(start_s=3.5))
    result = fleet.run(generate("conv", 60.0, 2.0, 1), start_s=8.0)
    touched = [at_s for at_s, effect in result.effects if isinstance(effect, TOUCHING) and at_s > 12.0]
    assert touched == []
    assert all(request.finished_s is not None for request in result.requests)
    later = [d for d in result.decisions if d.level is Level.POOL and d.decided_at_s > 1_700_000_030]
    assert len(later) >= 6
    assert all(d.mode is Mode.ADVISORY for d in later)
    # What had begun to drain before stays as it is, and is wanted by nobody.
    up = {InstanceState.STARTING, InstanceState.WARMING, InstanceState.READY}
    standing = {i.instance_id for seen in result.observations[-2:] for i in seen.instances if i.state in up}
    assert {i.instance_id for i in core.state.layout.instances} == standing


def starting() -> tuple[Bench, StartInstance]:
    """A fleet whose only start is under way."""
    bench = Bench(nodes=1)
    bench.see("a")
    bench.instances["a"] = ()
    (start,) = [effect for effect in bench.send(Tick(Level.INSTANCE)) if isinstance(effect, StartInstance)]
    return bench, start


# Of something else, of the thing itself and back, and of all.
ORDERS = (
    (SetMode("node:b", Mode.PAUSED),),
    (SetMode("node:a", Mode.PAUSED), SetMode("node:a", Mode.ACTIVE)),
    (SetMode("cluster", Mode.ADVISORY), SetMode("cluster", Mode.ACTIVE)),
)


@pytest.mark.parametrize("orders", ORDERS)
def test_a_start_that_is_under_way_is_not_sent_again_whoever_orders_what(orders: tuple[SetMode, ...]) -> None:
    bench, _ = starting()
    for given in orders:
        assert not [effect for effect in order(bench, given) if isinstance(effect, TOUCHING)]
    assert not [effect for effect in tick(bench) if isinstance(effect, StartInstance)]


@pytest.mark.parametrize("orders", ORDERS)
def test_what_comes_of_it_is_seen(orders: tuple[SetMode, ...]) -> None:
    bench, start = starting()
    for given in orders:
        order(bench, given)
    bench.send(EffectDone(start.effect_id, ok=False, detail="g0 is held by process 77"))
    assert bench.core.state.failures == {start.instance_id: 1}
    assert bench.core.state.refusing["a"].failed == 1
    assert [effect.instance_id for effect in tick(bench) if isinstance(effect, StartInstance)] == [start.instance_id]


@pytest.mark.parametrize("orders", ORDERS)
def test_what_was_told_to_go_stays_gone_until_its_node_shows_it(orders: tuple[SetMode, ...]) -> None:
    """Else another would be let go as if this one carried its share."""
    bench = serving()
    for bench.now_s in (1.0, 2.0):  # little load, and known: what is not wanted may go
        counters = {MS: ClassCounters(1, 1, 0, 1, 500, 150)}
        bench.send(LoadSeen(LoadObservation("g", "1", bench.now_s, MODEL, counters, {})))
    (only,) = bench.instances["a"]
    stranger = replace(only, instance_id="stranger", gpu_uuids=(), endpoint="http://stranger")
    bench.instances["a"] = (only, stranger)
    drains = [effect for effect in bench.see("a", only, stranger) if isinstance(effect, DrainInstance)]
    assert [effect.instance_id for effect in drains] == ["stranger"]
    for given in orders:
        order(bench, given)
    # Its sample was taken before it heard of that.
    assert not [effect for effect in bench.send(Tick(Level.INSTANCE)) if isinstance(effect, DrainInstance)]
    bench.send(EffectDone(drains[0].effect_id, ok=False, detail="no"))
    assert "stranger" not in bench.core.state.draining
    again = [effect.instance_id for effect in tick(bench) if isinstance(effect, DrainInstance)]
    assert again == ["stranger"], "and it is told again"


def test_planning_at_once_asks_every_level() -> None:
    bench = serving()
    before = len(bench.decided)
    order(bench, PlanNow("operator"))
    found = bench.decided[before:]
    assert "operator" in {d.trigger for d in found if d.level is Level.CLUSTER}


def test_a_plan_is_not_asked_for_while_paused() -> None:
    bench = serving()
    order(bench, SetMode("cluster", Mode.PAUSED))
    before = len(bench.decided)
    order(bench, PlanNow("operator"))
    assert len(bench.decided) == before


def test_orders_reach_a_core_without_a_journal_alike() -> None:
    settings = LoopSettings(model=MODEL, initial_rps={RequestClass.parse("MS"): 1.0})
    core = JournaledCore(settings, synthetic_profile(), term=1, expected_nodes=1)
    core.keep_journal(lambda _: None)
    core.order(Instant(0.0, 1e9), SetMode("cluster", Mode.PAUSED))
    assert core.state.mode is Mode.PAUSED
