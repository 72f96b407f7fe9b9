"""The core as a state machine: events in, decisions and effects out, without any fleet behind it."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from controller.api.figures import drift_line
from controller.domain.classes import RequestClass
from controller.domain.reasons import Level, Mode, Reason
from controller.fleet.port import (
    ApplyCaps,
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
    ReleaseCaps,
    ReleaseClocks,
    Solve,
    StartInstance,
    StopInstance,
    Tick,
)
from controller.loop.core import Core, Step
from controller.loop.instance import stands
from controller.loop.serving import pool_rates
from controller.loop.settings import Knobs, LoopSettings
from controller.loop.state import Instant, Turn
from controller.policy.milp.plan import plan_for
from controller.policy.transition import ActualInstance, CapacityModel, next_steps
from controller.profile.table import SERVING, Actuator, ActuatorRow, StartCost
from controller.store.records import PlanRecord
from tests.synthetic_profile import MODEL, synthetic_profile

MS = RequestClass.parse("MS")


def settings(**changes: object) -> LoopSettings:
    base = LoopSettings(
        model=MODEL, cluster_s=60, pool_s=15, instance_s=5, lease_ttl_s=20, rpc_deadline_s=4, lost_s=60, stale_s=15
    )
    return replace(base, **changes)  # type: ignore[arg-type]  # the tests name real fields


class Bench:
    """A core with a clock; solves are answered at once, everything else is collected."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.now_s = 0.0
        self.steps: list[Step] = []

    def send(self, event: Event) -> list[Effect]:
        step = self.core.handle(Instant(self.now_s, 1e9 + self.now_s), event)
        self.steps.append(step)
        effects = [effect for effect in step.effects if not isinstance(effect, Solve)]
        if step.tick_early:
            effects += self.send(Tick(Level.INSTANCE, early=True))
        for effect in step.effects:
            if isinstance(effect, Solve):
                effects += self.send(EffectDone(effect.effect_id, True, solution=plan_for(effect.problem)))
        return effects

    def see(
        self,
        node: str,
        *instances: InstanceObservation,
        gpus: int = 8,
        held: tuple[InstanceObservation, ...] = (),
    ) -> list[Effect]:
        seen = tuple(GpuObservation(f"{node}-{i}", i, True, 72.0, 0.0, 345, None) for i in range(gpus))
        return self.send(NodeSeen(NodeObservation(node, self.now_s, seen, instances, held)))

    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @property
    def decisions(self) -> list[tuple[Level, Reason]]:
        return [(decision.level, decision.reason) for step in self.steps for decision in step.decisions]


def make(nodes: int = 2, mode: Mode = Mode.ACTIVE, plan: PlanRecord | None = None, **changes: object) -> Bench:
    return Bench(Core(settings(**changes), synthetic_profile(), term=3, expected_nodes=nodes, mode=mode, plan=plan))


def ready(effect: StartInstance, *, running: float = 0.0, waiting: float = 0.0) -> InstanceObservation:
    return InstanceObservation(
        effect.instance_id,
        effect.model,
        effect.pool,
        effect.gpu_uuids,
        InstanceState.READY,
        f"http://{effect.instance_id}",
        running,
        waiting,
        0.0,
    )


def starts(effects: list[Effect]) -> list[StartInstance]:
    return [effect for effect in effects if isinstance(effect, StartInstance)]


def test_waits_for_every_expected_node_before_the_first_plan() -> None:
    bench = make(nodes=2)
    bench.see("a")
    assert bench.send(Tick(Level.INSTANCE)) == []
    bench.see("b")
    started = starts(bench.send(Tick(Level.INSTANCE)))
    assert {effect.node_id for effect in started} == {"a", "b"}


def test_plans_without_a_node_that_never_came() -> None:
    bench = make(nodes=2)
    bench.see("a")
    bench.wait(61)
    bench.see("a")
    assert {effect.node_id for effect in starts(bench.send(Tick(Level.INSTANCE)))} == {"a"}


def test_without_any_expectation_it_starts_as_single_pool() -> None:
    bench = make(nodes=1)
    bench.see("a")
    started = starts(bench.send(Tick(Level.INSTANCE)))
    assert [(len(effect.gpu_uuids), effect.pool) for effect in started] == [(8, "all")]
    assert (Level.CLUSTER, Reason.COLD_START) in bench.decisions


def test_a_configured_initial_load_gives_a_smaller_fleet() -> None:
    bench = make(nodes=2, initial_rps={MS: 1.0})
    bench.see("a")
    bench.see("b")
    started = starts(bench.send(Tick(Level.INSTANCE)))
    assert 0 < sum(len(effect.gpu_uuids) for effect in started) < 16


def starting_in(start_s: float, **changes: object) -> Bench:
    profile = synthetic_profile()
    starts_of = {tp: StartCost(start_s, 1000.0 * tp) for tp in profile.tps}
    return Bench(Core(settings(**changes), replace(profile, starts=starts_of), term=3, expected_nodes=4))


def test_a_load_that_nobody_has_seen_gets_the_more_the_longer_a_start_takes() -> None:
    gpus = []
    for start_s in (0.0, 180.0, 420.0):
        bench = starting_in(start_s, initial_rps={MS: 2.0})
        for node in "abcd":
            bench.see(node)
        gpus.append(sum(len(effect.gpu_uuids) for effect in starts(bench.send(Tick(Level.INSTANCE)))))
    assert gpus == sorted(set(gpus))


@pytest.mark.parametrize(("watched_s", "gives_away"), [(100, False), (170, False), (400, True)])
def test_nothing_is_given_away_before_the_load_was_watched_for_as_long_as_a_start_takes(
    watched_s: int, gives_away: bool
) -> None:
    bench = starting_in(180.0, initial_rps={MS: 8.0}, pool_s=900, cluster_s=1800, max_starts_at_once=16)
    for node in "abcd":
        bench.see(node)
    started = starts(bench.send(Tick(Level.INSTANCE)))
    for second in range(1, watched_s):
        bench.wait(1)
        bench.send(load(bench.now_s, second))  # a sixth of what was expected
        if second % 5 == 0:
            for node in "abcd":
                bench.see(node, *(ready(effect) for effect in started if effect.node_id == node))
    bench.send(Tick(Level.POOL))
    bench.send(Tick(Level.INSTANCE))
    drained = [e for step in bench.steps for e in step.effects if isinstance(e, DrainInstance)]
    assert bool(drained) is gives_away


def test_a_start_is_not_repeated_while_it_is_under_way() -> None:
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    bench.wait(5)
    assert starts(bench.send(Tick(Level.INSTANCE))) == []
    bench.send(EffectDone(start.effect_id, ok=True))
    assert starts(bench.send(Tick(Level.INSTANCE))) == [], "the node has not shown it yet"
    bench.see("a", replace(ready(start), state=InstanceState.STARTING))
    assert starts(bench.send(Tick(Level.INSTANCE))) == []


def test_idle_instance_gets_the_lowest_clock_under_a_lease_and_it_is_renewed() -> None:
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    bench.see("a", ready(start))
    bench.send(Tick(Level.INSTANCE))
    bench.wait(5)
    bench.see("a", ready(start))
    (lock,) = [effect for effect in bench.send(Tick(Level.INSTANCE)) if isinstance(effect, ApplyClocks)]
    assert lock.targets[0].mhz == 800
    assert lock.ttl_s >= 3 * bench.core.state.settings.instance_s
    idle = [reason for level, reason in bench.decisions if level is Level.INSTANCE]
    assert idle == [Reason.IDLE], "an unchanged clock is renewed without a new decision"


def test_a_stale_node_is_not_renewed() -> None:
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    bench.see("a", ready(start))
    bench.wait(16)
    assert not [effect for effect in bench.send(Tick(Level.INSTANCE)) if isinstance(effect, ApplyClocks)]


def test_routing_lists_ready_instances_and_changes_once() -> None:
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    published = [e for e in bench.see("a", ready(start)) if isinstance(e, PublishRouting)]
    (table,) = [effect.table for effect in published]
    assert [i.endpoint for pool in table.pools for i in pool.instances] == [f"http://{start.instance_id}"]
    bench.wait(1)
    assert not [e for e in bench.see("a", ready(start)) if isinstance(e, PublishRouting)]


def test_what_failed_in_an_earlier_partition_keeps_no_pool() -> None:
    """Requests would be counted to that empty pool, and the one that serves them get no clock for them."""
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    serves = ready(start)
    assert serves.pool == "all"
    left = replace(serves, instance_id="old", pool="short", state=InstanceState.FAILED, gpu_uuids=("a-7",))
    bench.see("a", serves, left)
    table = bench.core.state.routing
    assert table is not None
    assert [pool.name for pool in table.pools] == ["all"]


def test_a_class_counts_to_the_pool_that_serves_it_while_its_own_is_not_there_yet() -> None:
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    coming = replace(ready(start), instance_id="new", pool="short", state=InstanceState.STARTING, gpu_uuids=("a-7",))
    bench.see("a", ready(start), coming)
    for at_s in (1.0, 11.0):
        counts = ClassCounters(arrived=int(20 * at_s), input_tokens=int(10_000 * at_s))
        bench.core.handle(Instant(at_s, 1e9 + at_s), LoadSeen(LoadObservation("g", "1", at_s, MODEL, {MS: counts}, {})))
    table = bench.core.state.routing
    assert table is not None
    assert [pool.name for pool in table.pools if not pool.instances] == ["short"]
    rates = pool_rates(Turn(Instant(11.0, 1e9 + 11), bench.core.state), 15.0)
    assert rates is not None
    assert rates["all"] > 0
    assert rates["short"] == 0


def test_a_silent_agent_stays_in_the_routing() -> None:
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    bench.see("a", ready(start))
    bench.wait(30)
    bench.send(Tick(Level.INSTANCE))
    table = bench.core.state.routing
    assert table is not None
    assert [i.instance_id for pool in table.pools for i in pool.instances] == [start.instance_id]


def test_where_all_stands_as_wanted_there_is_no_step_to_be_found() -> None:
    """Every state of a wanted instance, and of one that is not: steps are looked for wherever there are any."""
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    bench.see("a", ready(start))
    state, found = bench.core.state, Counter[bool]()
    others = [None, *(replace(ready(start), instance_id="other", gpu_uuids=(), state=each) for each in InstanceState)]
    for mine, pool, other in itertools.product([None, *InstanceState], ("all", "short"), others):
        seen = [] if mine is None else [replace(ready(start), state=mine, pool=pool)]
        seen += [] if other is None else [other]
        state.nodes["a"] = replace(state.nodes["a"], instances=tuple(seen))
        standing = stands(Turn(Instant(bench.now_s, 1e9), state))
        actual = tuple(
            ActualInstance(i.instance_id, state.pool_of(i), "a", i.gpu_uuids, i.state, i.running, i.waiting)
            for i in seen
        )
        usable = frozenset(gpu.uuid for gpu in state.nodes["a"].gpus)
        steps = next_steps(state.layout, actual, usable, CapacityModel({}, {}, {}))
        assert not standing or (steps.done and not steps.given_up), (mine, pool, other)
        found[standing] += 1
    assert found[True] >= 3, "as wanted; beside what has stopped; beside what has failed"
    state.nodes["a"] = replace(state.nodes["a"], instances=(ready(start),))
    bench.wait(61)
    assert not stands(Turn(Instant(bench.now_s, 1e9), state)), "its node is lost"


def test_silence_takes_nothing_away_and_a_drain_comes_after_the_routing() -> None:
    bench = make(nodes=1)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    bench.see("a", ready(start))
    stranger = InstanceObservation("stranger", MODEL, "all", (), InstanceState.READY, "http://stranger", 0.0, 0.0, 0.0)
    effects = bench.see("a", ready(start), stranger)
    assert not [e for e in effects if isinstance(e, DrainInstance)], "the load is unknown: silence takes nothing away"
    bench.send(load(0.0, 0))
    bench.wait(1)
    bench.send(load(1.0, 1))
    effects = bench.send(Tick(Level.INSTANCE))
    kinds = [type(effect) for effect in effects if isinstance(effect, PublishRouting | DrainInstance)]
    assert kinds == [PublishRouting, DrainInstance]
    table = next(effect.table for effect in effects if isinstance(effect, PublishRouting))
    accepts = {i.instance_id: i.accepts_new for pool in table.pools for i in pool.instances}
    assert accepts == {start.instance_id: True, "stranger": False}


def test_a_lost_node_is_planned_around() -> None:
    bench = make(nodes=2, initial_rps={MS: 1.0})
    bench.see("a")
    bench.see("b")
    started = starts(bench.send(Tick(Level.INSTANCE)))
    lost = started[0].node_id
    other = "b" if lost == "a" else "a"
    alive = [ready(effect) for effect in started if effect.node_id == other]
    for _ in range(7):
        bench.wait(10)
        bench.see(other, *alive)
    again = starts(bench.send(Tick(Level.INSTANCE)))
    assert again
    assert {effect.node_id for effect in again} == {other}


def by_hand(uuids: tuple[str, ...], state: InstanceState, instance_id: str = "mine") -> InstanceObservation:
    return InstanceObservation(instance_id, MODEL, "", uuids, state, "http://mine", 3.0, held_by="ada")


def uses(effects: list[Effect]) -> set[str]:
    """GPUs that effects touch, and the instances."""
    found: set[str] = set()
    for effect in effects:
        match effect:
            case ApplyClocks():
                found |= {uuid for target in effect.targets for uuid in target.gpu_uuids}
            case ReleaseClocks():
                found |= set(effect.gpu_uuids)
            case StartInstance():
                found |= {effect.instance_id, *effect.gpu_uuids}
            case DrainInstance() | StopInstance():
                found.add(effect.instance_id)
            case PublishRouting():
                found |= {i.instance_id for pool in effect.table.pools for i in pool.instances}
    return found


def test_what_an_operator_started_is_left_alone_and_its_gpus_with_it() -> None:
    bench = make(nodes=1, initial_rps={MS: 1.0})
    mine = by_hand(("a-0", "a-1", "a-2", "a-3"), InstanceState.READY)
    bench.see("a", held=(mine,))
    effects = bench.send(Tick(Level.INSTANCE))
    started = starts(effects)
    assert started
    assert {"a-0", "a-1", "a-2", "a-3", "mine"}.isdisjoint(uses(effects))
    up = [ready(effect) for effect in started]
    for _ in range(3):
        bench.wait(5)
        effects = bench.see("a", *up, held=(mine,)) + bench.send(Tick(Level.INSTANCE))
        assert {"a-0", "a-1", "a-2", "a-3", "mine"}.isdisjoint(uses(effects))
    assert "mine on a is ada's (ready): left alone" in drift_line(bench.core.state, bench.now_s)
    # What has stopped holds nothing.
    bench.wait(5)
    bench.see("a", *up, held=(replace(mine, state=InstanceState.STOPPED),))
    assert "mine" not in drift_line(bench.core.state, bench.now_s)
    assert bench.core.state.usable_gpus(bench.now_s) == 8


@pytest.mark.parametrize("state", [InstanceState.DRAINING, InstanceState.STOPPED])
def test_what_an_operator_takes_down_is_planned_elsewhere(state: InstanceState) -> None:
    bench = make(nodes=2, initial_rps={MS: 1.0})
    bench.see("a")
    bench.see("b")
    up = {effect.instance_id: (effect.node_id, ready(effect)) for effect in starts(bench.send(Tick(Level.INSTANCE)))}
    taken, (node, one) = next(iter(up.items()))
    others = [instance for where, instance in up.values() if where == node and instance is not one]
    bench.wait(5)
    bench.see("b" if node == "a" else "a", *(instance for where, instance in up.values() if where != node))
    bench.see(node, one, *others)
    bench.send(Tick(Level.INSTANCE))
    bench.wait(5)
    effects = bench.see(node, *others, held=(replace(one, state=state, held_by="ada"),))
    effects += bench.send(Tick(Level.INSTANCE))
    assert taken not in uses(effects)
    again = starts(effects)
    assert [effect.pool for effect in again] == [one.pool]
    if state is InstanceState.DRAINING:
        assert set(one.gpu_uuids).isdisjoint(again[0].gpu_uuids)


@pytest.mark.parametrize("mode", [Mode.ADVISORY, Mode.PAUSED])
def test_only_active_mode_touches_the_fleet(mode: Mode) -> None:
    bench = make(nodes=1, mode=mode)
    bench.see("a")
    effects = bench.send(Tick(Level.INSTANCE)) + bench.send(Tick(Level.CLUSTER))
    assert effects == []
    assert bool(bench.decisions) is (mode is Mode.ADVISORY)


def test_a_static_fleet_neither_plans_nor_locks() -> None:
    bench = make(nodes=1, knobs=Knobs(pools=False, instances=False, sharding=False, clocks=False))
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    assert len(start.gpu_uuids) == 8
    bench.see("a", ready(start))
    effects = []
    for level in (Level.INSTANCE, Level.POOL, Level.CLUSTER):
        bench.wait(5)
        bench.see("a", ready(start))
        effects += bench.send(Tick(level))
    assert effects == []


def test_a_restarted_controller_keeps_what_runs() -> None:
    before = make(nodes=1, initial_rps={MS: 1.0})
    before.see("a")
    started = starts(before.send(Tick(Level.INSTANCE)))
    decision = next(d for step in before.steps for d in step.decisions if "plan" in d.outcome)
    plan = PlanRecord(3, decision.number, 1e9, before.core.state.layout, decision.outcome["plan"]["pools"])

    after = make(nodes=1, initial_rps={MS: 1.0}, plan=plan)
    after.wait(100)
    effects = after.see("a", *(ready(effect) for effect in started))
    effects += after.send(Tick(Level.INSTANCE))
    assert not [effect for effect in effects if isinstance(effect, StartInstance | DrainInstance)]
    table = after.core.state.routing
    assert table is not None
    assert {i.instance_id for pool in table.pools for i in pool.instances} == {e.instance_id for e in started}


def test_a_restarted_controller_waits_for_slow_nodes() -> None:
    before = make(nodes=2, initial_rps={MS: 5.0})
    before.see("a")
    before.see("b")
    before.send(Tick(Level.INSTANCE))
    decision = next(d for step in before.steps for d in step.decisions if "plan" in d.outcome)
    plan = PlanRecord(3, decision.number, 1e9, before.core.state.layout, decision.outcome["plan"]["pools"])
    after = make(nodes=2, plan=plan)
    assert starts(after.see("a")) == []
    assert starts(after.send(Tick(Level.INSTANCE))) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lease_ttl_s": 14.0}, "lease ttl"),
        ({"rpc_deadline_s": 5.0}, "rpc deadline"),
        ({"pool_s": 1.0}, "periods"),
        ({"fill": 0.0}, "fill"),
    ],
)
def test_broken_inequalities_are_refused(changes: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        settings(**changes)


def load(at_s: float, arrived: int) -> LoadSeen:
    counters = {MS: ClassCounters(arrived, arrived, 0, arrived, 500 * arrived, 150 * arrived)}
    return LoadSeen(LoadObservation("g", "1", at_s, MODEL, counters, {}))


def test_without_load_reports_the_plan_is_held_and_then_clocks_are_freed() -> None:
    bench = make(nodes=1, hold_s=40.0)
    bench.see("a")
    (start,) = starts(bench.send(Tick(Level.INSTANCE)))
    bench.send(load(bench.now_s, 0))
    bench.see("a", ready(start))
    bench.send(Tick(Level.INSTANCE))
    assert bench.core.state.clocks[start.instance_id].mhz == 800
    for _ in range(3):
        bench.wait(15)
        bench.see("a", ready(start))
        effects = bench.send(Tick(Level.INSTANCE))
    assert [type(effect) for effect in effects] == [ReleaseClocks]
    assert bench.decisions[-1] == (Level.INSTANCE, Reason.STALE_TELEMETRY)
    assert len(bench.core.state.layout.instances) == 1, "capacity is never shrunk on silence"


def test_a_rising_load_grows_the_pool_at_its_next_tick() -> None:
    bench = make(nodes=2, initial_rps={MS: 0.5})
    bench.see("a")
    bench.see("b")
    started = starts(bench.send(Tick(Level.INSTANCE)))
    by_node = {node: [ready(e) for e in started if e.node_id == node] for node in ("a", "b")}
    before = sum(len(e.gpu_uuids) for e in started)
    for second in range(1, 40):
        bench.wait(1)
        bench.send(load(bench.now_s, 8 * second))
        if second % 5 == 0:
            for node, instances in by_node.items():
                bench.see(node, *instances)
    grown = starts(bench.send(Tick(Level.POOL)))
    assert before + sum(len(effect.gpu_uuids) for effect in grown) >= 8
    assert not [e for step in bench.steps for e in step.effects if isinstance(e, DrainInstance)]


def test_silence_before_the_first_request_is_not_zero_load() -> None:
    bench = make(nodes=1, initial_rps={MS: 4.0})
    bench.see("a")
    started = starts(bench.send(Tick(Level.INSTANCE)))
    for _ in range(60):
        bench.wait(1)
        bench.send(load(bench.now_s, 0))
        bench.see("a", *(ready(effect) for effect in started))
    effects = bench.send(Tick(Level.POOL)) + bench.send(Tick(Level.CLUSTER))
    assert not [effect for effect in effects if isinstance(effect, DrainInstance)]


def test_a_cap_that_draws_less_is_applied_under_a_lease_and_let_go_where_the_lock_is_better() -> None:
    row = ActuatorRow(SERVING, "short", 2, 1.0, 800, 500.0, 350.0, 300.0, 0.0, Actuator.CAP)
    kinds = tuple(replace(row, group=g, tp=tp) for g in ("all", "short", "long") for tp in (2, 4, 8))
    profile = replace(synthetic_profile(), actuators=kinds)
    bench = Bench(Core(settings(knobs=Knobs(standby=False)), profile, term=1, expected_nodes=1))
    bench.see("a")
    seen = [ready(effect, running=3.0) for effect in starts(bench.send(Tick(Level.INSTANCE)))]
    bench.see("a", *seen)
    effects = bench.send(Tick(Level.INSTANCE))
    applied = [effect for effect in effects if isinstance(effect, ApplyCaps)]
    assert [(cap.protects, {target.watts for target in cap.targets}) for cap in applied] == [(False, {350.0})]
    assert not [effect for effect in effects if isinstance(effect, ApplyClocks)]
    said = [d for step in bench.steps for d in step.decisions if d.outcome.get("cap_w")]
    assert said
    assert "power cap of 350 W" in said[-1].sentence
    bench.see("a", *seen)
    assert [e for e in bench.send(Tick(Level.INSTANCE)) if isinstance(e, ApplyCaps)]  # renewed
    bench.wait(5)
    busy = [replace(instance, waiting=9.0) for instance in seen]  # trouble: nothing may hold them back
    bench.see("a", *busy)
    effects = bench.send(Tick(Level.INSTANCE))
    assert [set(effect.gpu_uuids) for effect in effects if isinstance(effect, ReleaseCaps)] == [
        {uuid for instance in seen for uuid in instance.gpu_uuids}
    ]
    assert not [effect for effect in effects if isinstance(effect, ApplyCaps)]
