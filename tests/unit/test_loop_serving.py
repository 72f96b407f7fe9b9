"""Who serves and who stands by, decided by the core every few seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.domain.reasons import Level, Mode
from controller.fleet.port import ApplyClocks, Effect, InstanceObservation, ReleaseClocks, Tick
from controller.loop.core import Core
from controller.loop.demand import expected_demand, pool_demand
from controller.loop.serving import with_bursts
from controller.loop.settings import Knobs
from controller.loop.state import Instant, Turn
from controller.profile.fit import fit
from controller.profile.table import IdlePoint
from tests.synthetic_profile import synthetic_profile
from tests.unit.test_loop_core import MS, Bench, load, ready, settings, starts

PLANNED_RPS = 8.0


class Fleet(Bench):
    """Two nodes, planned and started for `PLANNED_RPS`, all instances ready."""

    def __init__(self, **changes: object) -> None:
        changed = {"initial_rps": {MS: PLANNED_RPS}, "pool_s": 3600, "cluster_s": 3600, **changes}
        super().__init__(Core(settings(**changed), synthetic_profile(), term=3, expected_nodes=2))
        self.instances: dict[str, list[InstanceObservation]] = {"a": [], "b": []}
        self.arrived = 0.0
        self.see("a")
        self.see("b")
        for effect in starts(self.send(Tick(Level.INSTANCE))):
            self.instances[effect.node_id].append(ready(effect))

    def serve(self, rate_rps: float, seconds: int = 120) -> list[Effect]:
        """Under a steady load; the effects of the last tick."""
        effects: list[Effect] = []
        for second in range(1, seconds + 1):
            self.wait(1)
            self.arrived += rate_rps
            self.send(load(self.now_s, round(self.arrived)))
            if second % 5 == 0:
                for node, instances in self.instances.items():
                    self.see(node, *instances)
                effects = self.send(Tick(Level.INSTANCE))
        return effects

    def serving(self) -> int:
        assert self.core.state.routing is not None
        routing = self.core.state.routing
        return sum(i.accepts_new and not i.standby_load for pool in routing.pools for i in pool.instances)

    def on_call(self) -> set[str]:
        assert self.core.state.routing is not None
        routing = self.core.state.routing
        return {i.instance_id for pool in routing.pools for i in pool.instances if i.standby_load}

    def planned_for(self, trigger: str) -> int:
        """Pool plans asked for because of `trigger`."""
        return sum(
            decision.level is Level.POOL and decision.trigger == trigger
            for step in self.steps
            for decision in step.decisions
        )


def test_a_light_load_leaves_instances_on_standby_and_a_heavy_one_none() -> None:
    # At full clock: at this profile's lower ones it pays to let all serve.
    fleet = Fleet(knobs=Knobs(clocks=False))
    there = sum(len(instances) for instances in fleet.instances.values())
    assert there > 1
    effects = fleet.serve(0.5)
    assert fleet.serving() == 1
    assert effects == []  # nothing is drained or stopped
    assert len(fleet.core.state.standby) == there - 1
    fleet.serve(2 * PLANNED_RPS, seconds=30)
    assert fleet.serving() == there


def test_who_stands_by_is_locked_to_the_clock_of_least_power() -> None:
    fleet = Fleet()
    profile = fleet.core.state.profile
    lowest = replace(profile, idle=(*profile.idle, *(IdlePoint(tp, 210, 1.0) for tp in profile.tps)))
    fleet.core.state.fit = fit(lowest)
    fleet.serve(0.5)
    standing = fleet.core.state.standby
    assert standing
    assert {fleet.core.state.clocks[instance_id].mhz for instance_id in standing} == {210}


@pytest.mark.parametrize(
    ("knobs", "mode"), [(Knobs(clocks=False, standby=False), Mode.ACTIVE), (Knobs(clocks=False), Mode.ADVISORY)]
)
def test_all_serve_where_none_may_stand_by(knobs: Knobs, mode: Mode) -> None:
    fleet = Fleet(knobs=knobs)
    fleet.core.state.mode = mode
    fleet.serve(0.5)
    assert fleet.serving() == sum(len(instances) for instances in fleet.instances.values())


def test_a_load_beyond_all_that_is_planned_is_planned_for_at_once() -> None:
    fleet = Fleet()
    fleet.serve(PLANNED_RPS, seconds=60)
    assert fleet.planned_for("load") == 0
    fleet.serve(2.5 * PLANNED_RPS, seconds=20)
    assert fleet.planned_for("load") >= 1


def test_after_bursts_all_serve_also_in_the_quiet_between() -> None:
    even, bursty = Fleet(knobs=Knobs(clocks=False)), Fleet(knobs=Knobs(clocks=False))
    even.serve(0.5, seconds=240)
    for _ in range(8):
        bursty.serve(0.0, seconds=25)
        bursty.serve(3.0, seconds=5)
    bursty.serve(0.0, seconds=10)
    assert even.core.state.burst_rps["all"] == 0.0
    assert bursty.core.state.burst_rps["all"] > 1.0
    assert bursty.serving() > even.serving() == 1


def cheap_standby() -> Fleet:
    """Where standing by costs next to nothing."""
    fleet = Fleet()
    profile = fleet.core.state.profile
    fleet.core.state.fit = fit(replace(profile, idle=(*profile.idle, *(IdlePoint(tp, 210, 1.0) for tp in profile.tps))))
    return fleet


def after_bursts() -> Fleet:
    fleet = cheap_standby()
    for _ in range(8):
        fleet.serve(0.0, seconds=25)
        fleet.serve(2.0, seconds=5)
    fleet.serve(0.0, seconds=60)
    return fleet


def test_only_where_bursts_are_larger_than_the_load_those_on_standby_are_on_call() -> None:
    even, bursty = cheap_standby(), after_bursts()
    even.serve(0.5, seconds=240)
    assert even.core.state.standby
    assert even.on_call() == set()
    assert bursty.core.state.bursty == {"all"}
    assert bursty.on_call() == bursty.core.state.standby != set()
    # They answer before the next tick: at a clock that is in SLO, not at the one that draws least.
    tps = {i.instance_id: i.tp for instances in bursty.instances.values() for i in instances}
    for instance_id in bursty.on_call():
        lowest = bursty.core.state.fit.clocks("all", tps[instance_id])[0]
        assert bursty.core.state.clocks[instance_id].mhz == lowest.mhz > 210


def test_where_first_tokens_may_wait_only_as_many_are_on_call_as_a_burst_needs() -> None:
    fleet = after_bursts()
    state = fleet.core.state
    patient = replace(state.profile.slo, ttft_s_ms=1000.0, ttft_m_ms=1000.0)
    state.profile = replace(state.profile, slo=patient)
    tps = {i.instance_id: i.tp for instances in fleet.instances.values() for i in instances}
    for burst_rps, resting in ((0.1, True), (1e6, False)):
        state.burst_rps["all"], state.burst_seen_s = burst_rps, fleet.now_s
        fleet.serve(0.0, seconds=5)
        at_rest = state.standby - fleet.on_call()
        assert bool(at_rest) == resting
        assert fleet.on_call() == state.on_call
        assert {state.clocks[name].mhz for name in at_rest} <= {210}
        assert all(state.clocks[n].mhz == state.fit.clocks("all", tps[n])[0].mhz for n in fleet.on_call())


def test_bursts_are_remembered_through_a_silence_and_forgotten_by_half_in_an_hour() -> None:
    fleet = after_bursts()
    state = fleet.core.state
    burst_rps, needed_rps = state.burst_rps["all"], state.burst_needed_rps["all"]
    assert needed_rps > burst_rps > 0
    fleet.serve(0.0, seconds=3600)
    assert state.bursty == {"all"}, "whoever stands by is reached by the next one at once"
    # Bursts are looked for over a quarter of an hour: until then they are not remembered, but seen.
    for now_rps, then_rps in ((state.burst_rps["all"], burst_rps), (state.burst_needed_rps["all"], needed_rps)):
        assert now_rps == pytest.approx(then_rps * 0.5 ** (2700 / 3600), rel=0.2)
    demand = expected_demand(state, Instant(fleet.now_s, 0.0), 60.0)
    assert demand is not None
    kept, _ = pool_demand(state, Instant(fleet.now_s, 0.0), demand, "all")
    assert kept.rate_rps == pytest.approx(state.burst_needed_rps["all"] / state.settings.reserve_fill)
    # It keeps what is planned, and asks for no more.
    state.burst_needed_rps["all"] = 1e6
    kept, _ = pool_demand(state, Instant(fleet.now_s, 0.0), demand, "all")
    planned = sum(n * state.fit.max_rate_rps("all", tp) for tp, n in state.pools["all"].counts.items())
    assert kept.rate_rps == pytest.approx(planned)


def test_a_steady_load_leaves_nothing_to_remember() -> None:
    fleet = cheap_standby()
    fleet.serve(PLANNED_RPS, seconds=600)
    assert fleet.core.state.burst_needed_rps["all"] == 0.0
    assert fleet.core.state.bursty == frozenset()


def test_a_part_of_a_burst_is_left_to_those_on_call_where_first_tokens_may_wait() -> None:
    fleet = after_bursts()
    state = fleet.core.state
    assert fleet.on_call()
    burst_rps = state.burst_rps["all"]
    turn = Turn(Instant(fleet.now_s, 1e9), state)
    assert with_bursts(turn, {"all": 1.0}) == {"all": pytest.approx(1.0 + burst_rps)}
    patient = replace(state.profile.slo, ttft_s_ms=1000.0, ttft_m_ms=1000.0)
    state.profile = replace(state.profile, slo=patient)
    assert with_bursts(turn, {"all": 1.0}) == {"all": pytest.approx(1.0 + state.settings.serve_burst_share * burst_rps)}
    state.on_call = set()
    assert with_bursts(turn, {"all": 1.0}) == {"all": pytest.approx(1.0 + burst_rps)}


def arrive(fleet: Fleet, requests: float) -> list[Effect]:
    """A second with so many arrivals, and no tick of its own."""
    fleet.wait(1)
    fleet.arrived += requests
    return fleet.send(load(fleet.now_s, round(fleet.arrived)))


def early_ticks(fleet: Fleet) -> int:
    return sum(step.tick_early for step in fleet.steps)


def test_a_burst_is_served_with_the_first_report_that_shows_it() -> None:
    fleet = after_bursts()
    state = fleet.core.state
    before, quiet_rps, at_once = early_ticks(fleet), state.chosen_rps["all"], fleet.serving()
    told, looked_s = state.pace.ticks, state.looked_s
    effects = arrive(fleet, 20)
    assert early_ticks(fleet) == before + 1
    assert state.chosen_rps["all"] == state.onsets["all"].rps > quiet_rps
    assert any(isinstance(effect, ApplyClocks | ReleaseClocks) for effect in effects)
    assert fleet.serving() > at_once
    # Pace and the emergency ladder count ticks: this is none to them.
    assert (state.pace.ticks, state.looked_s) == (told, looked_s)
    arrive(fleet, 1)
    assert early_ticks(fleet) == before + 1, "what comes now was chosen for"
    fleet.serve(0.0, seconds=120)
    assert state.chosen_rps["all"] < 20 / 2


def test_where_no_bursts_are_known_it_takes_more_than_chance() -> None:
    fleet = cheap_standby()
    fleet.serve(0.5, seconds=240)
    assert fleet.core.state.bursty == frozenset()
    arrive(fleet, 4)
    assert early_ticks(fleet) == 0
    arrive(fleet, 20)
    assert early_ticks(fleet) == 1


def test_where_nobody_decides_no_tick_comes_early() -> None:
    paused = after_bursts()
    paused.core.state.mode = Mode.PAUSED
    before = early_ticks(paused)
    assert arrive(paused, 20) == []
    assert early_ticks(paused) == before


def test_a_load_on_its_way_beyond_the_plan_is_planned_for_before_it_is_there() -> None:
    fleet = Fleet()
    state = fleet.core.state
    (plan,) = state.pools.values()
    capacity_rps = sum(n * state.fit.max_rate_rps("all", tp) for tp, n in plan.counts.items())
    fleet.serve(PLANNED_RPS, seconds=120)
    assert fleet.planned_for("load") == 0
    rate_rps = PLANNED_RPS
    while not fleet.planned_for("load") and rate_rps < capacity_rps:
        rate_rps += 0.1
        fleet.serve(rate_rps, seconds=5)
    assert fleet.planned_for("load") == 1
    assert rate_rps < capacity_rps


def test_where_hosts_go_off_those_stand_by_that_could_free_one() -> None:
    fleet = Fleet(knobs=Knobs(clocks=False), hosts_off=True, host_w=2000.0)
    used = {node: sum(len(i.gpu_uuids) for i in instances) for node, instances in fleet.instances.items()}
    fullest = max(used, key=lambda node: used[node])
    assert used[fullest] == 8
    assert 0 < min(used.values()) < 8
    fleet.serve(0.5)
    served = {i.instance_id for instances in fleet.instances.values() for i in instances} - fleet.core.state.standby
    assert served
    assert served <= {i.instance_id for i in fleet.instances[fullest]}
