"""The fast fleet against the plain one: the same picks, the same decisions, the same energy."""

from __future__ import annotations

from collections import Counter
from math import inf

import numpy as np
import pytest

from controller.domain.classes import ALL_CLASSES, RequestClass, by_input
from controller.domain.decision import canonical_json
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level
from controller.fleet.port import (
    ApplyClocks,
    ClockTarget,
    DrainInstance,
    Effect,
    Event,
    InstanceState,
    NodeObservation,
    PublishRouting,
    ReleaseClocks,
    RoutedInstance,
    RoutedPool,
    RoutingTable,
    StartInstance,
    StopInstance,
    Tick,
)
from controller.gateway.classify import REMEMBERED_REQUESTS, Classifier
from controller.loop.core import Core, Step
from controller.loop.settings import Knobs, LoopSettings
from controller.loop.state import Instant
from simulator.fast.engines import FastEngines
from simulator.fast.fleet import FastFleet, FastResult
from simulator.fast.static import gap_quantile_s, static_engines
from simulator.fleet import FleetResult, FleetTimes, VirtualFleet
from simulator.incidents import Incident, IncidentKind, crashes
from simulator.physics import Physics
from simulator.steady import serve_steadily, weighted_quantile
from simulator.traces import Trace, generate
from tests.engine_reference import trace_of
from tests.synthetic_profile import MODEL, synthetic_profile

PHYSICS = Physics.load()
START_S = 8.0
NODES = 2
STATIC = Knobs(pools=False, instances=False, sharding=False, clocks=False)


def make_core(knobs: Knobs | None = None) -> Core:
    settings = LoopSettings(
        model=MODEL,
        cluster_s=20,
        pool_s=5,
        instance_s=1,
        lease_ttl_s=4,
        rpc_deadline_s=0.5,
        load_window_s=5,
        min_dwell_s=5,
        start_s=3,
        initial_rps={RequestClass.parse("MS"): 2.0, RequestClass.parse("LM"): 2.0},
        knobs=knobs or Knobs(),
    )
    return Core(settings, synthetic_profile(), term=1, expected_nodes=NODES)


def serve_slow(trace: Trace, knobs: Knobs | None = None) -> FleetResult:
    return VirtualFleet(make_core(knobs), PHYSICS, NODES, FleetTimes(start_s=3.5)).run(trace, start_s=START_S)


def serve_fast(trace: Trace, knobs: Knobs | None = None, **options: object) -> FastResult:
    settings: dict[str, object] = {"start_s": START_S, "keep_observations": True, **options}
    fleet = FastFleet(make_core(knobs), PHYSICS, NODES, trace, times=FleetTimes(start_s=3.5), **settings)
    return fleet.run()


def decided(result: FleetResult | FastResult) -> list[tuple[float, str]]:
    return [(decision.decided_at_s, decision.sentence) for decision in result.decisions]


def assert_same_observation(slow: NodeObservation, fast: NodeObservation) -> None:
    assert (slow.node_id, slow.observed_at_s) == (fast.node_id, pytest.approx(fast.observed_at_s, abs=1e-9))
    for one, other in zip(slow.gpus, fast.gpus, strict=True):
        assert (one.uuid, one.sm_mhz, one.locked_mhz) == (other.uuid, other.sm_mhz, other.locked_mhz)
        assert one.energy_j == pytest.approx(other.energy_j, rel=1e-9)
        assert one.power_w == pytest.approx(other.power_w, rel=1e-6)
    for mine, theirs in zip(slow.instances, fast.instances, strict=True):
        assert (mine.instance_id, mine.pool, mine.state) == (theirs.instance_id, theirs.pool, theirs.state)
        assert (mine.running, mine.waiting, mine.gpu_uuids) == (theirs.running, theirs.waiting, theirs.gpu_uuids)
        assert mine.kv_usage_ratio == pytest.approx(theirs.kv_usage_ratio, abs=1e-12)
        assert mine.step_seconds == pytest.approx(theirs.step_seconds)


def assert_same(slow: FleetResult, fast: FastResult) -> None:
    assert [effect for _, effect in slow.effects] == [effect for _, effect in fast.effects]
    pools = [fast.pools[pool] if pool >= 0 else "" for pool in fast.requests["pool"]]  # "": the gateway refused it
    assert [request.pool for request in slow.requests] == pools

    def assert_close(here: np.ndarray, there: list[float | None]) -> None:
        np.testing.assert_allclose(here, [np.nan if s is None else s for s in there], rtol=0, atol=1e-6)

    assert_close(fast.ttft_s(), [request.ttft_s for request in slow.requests])
    assert_close(fast.tbt_s(), [request.tbt_s for request in slow.requests])
    assert_close(fast.requests["finished_s"], [request.finished_s for request in slow.requests])
    np.testing.assert_allclose(
        fast.requests["queue_s"], [request.queue_s for request in slow.requests], rtol=1e-6, atol=1e-6
    )
    # The reference takes a last look when all is served, the fast fleet does not.
    assert len(slow.observations) - len(fast.observations) == NODES
    for one, other in zip(slow.observations, fast.observations, strict=False):
        assert_same_observation(one, other)
    assert gap_quantile_s(fast.gaps, 0.99) == pytest.approx(weighted_quantile(slow.gaps.items(), 0.99), abs=2e-4)


@pytest.mark.parametrize(
    ("kind", "rate_rps", "seconds", "knobs"),
    [("conv", 5.0, 40.0, None), ("conv", 13.0, 40.0, None), ("code", 9.0, 40.0, None), ("conv", 5.0, 20.0, STATIC)],
    ids=["light", "overload", "bursts", "static"],
)
def test_the_whole_loop_decides_and_serves_as_over_the_reference(kind, rate_rps, seconds, knobs):
    trace = generate(kind, seconds, rate_rps, seed=1)
    slow, fast = serve_slow(trace, knobs), serve_fast(trace, knobs)
    assert decided(slow) == decided(fast)
    assert_same(slow, fast)


class Scripted(Core):
    """Emits prepared effects with the ticks of the instance level, whatever it is told."""

    def __init__(self, script: dict[float, list[Effect]]) -> None:
        settings = LoopSettings(model=MODEL, instance_s=1.0, lease_ttl_s=4.0, rpc_deadline_s=0.5)
        super().__init__(settings, synthetic_profile(), term=1, expected_nodes=NODES)
        self.script = script

    def handle(self, now: Instant, event: Event) -> Step:
        due = isinstance(event, Tick) and event.level is Level.INSTANCE
        return Step((), tuple(self.script.get(now.monotonic_s, []) if due else ()))


def gpus(node: int, first: int, tp: int) -> tuple[str, ...]:
    return tuple(f"GPU-node-{node}-{index}" for index in range(first, first + tp))


def start(instance: str, node: int, first: int, tp: int) -> StartInstance:
    return StartInstance(f"start-{instance}", f"node-{node}", instance, MODEL, "any", gpus(node, first, tp), "")


def routing(
    version: int,
    **pools: dict[
        str, tuple[int, float, bool] | tuple[int, float, bool, float] | tuple[int, float, bool, float, float]
    ],
) -> PublishRouting:
    """Pools by name; their instances' limits, weights, whether they take new requests, their standby and rank loads."""
    groups = {"short": by_input("short", "SM"), "long": by_input("long", "L"), "all": by_input("all", "SML")}
    routed = tuple(
        RoutedPool(
            name,
            MODEL,
            groups[name].classes,
            tuple(
                RoutedInstance(
                    i, "", 1, limit, weight, takes, standby_load=sum(standby[:1]), rank_load=sum(standby[1:])
                )
                for i, (limit, weight, takes, *standby) in sorted(members.items())
            ),
        )
        for name, members in sorted(pools.items())
    )
    return PublishRouting(f"route-{version}", RoutingTable(1, version, routed))


SCRIPT: dict[float, list[Effect]] = {
    1.0: [start("a", 0, 0, 4), start("b", 0, 4, 4), start("c", 1, 0, 4), start("d", 1, 4, 2)],
    # Requests arrive from the 5th second on and find nobody yet.
    7.0: [
        routing(1, short={"a": (3, 4.0, True), "b": (4, 4.0, True), "d": (2, 1.0, True)}, long={"c": (20, 8.0, True)})
    ],
    # A lock that runs out at 12 s, by itself; and one of half the GPUs, which slows the whole instance.
    8.0: [
        ApplyClocks("c1", "node-0", (ClockTarget(gpus(0, 4, 4), 1200),), 4.0, ""),
        ApplyClocks("c2", "node-1", (ClockTarget(gpus(1, 0, 2), 800), ClockTarget(gpus(1, 2, 1), 1605)), 60.0, ""),
    ],
    11.0: [
        routing(2, short={"a": (3, 4.0, False), "b": (4, 4.0, True), "d": (2, 1.0, True)}, long={"c": (20, 8.0, True)}),
        DrainInstance("drain-a", "node-0", "a", ""),
        StopInstance("stop-a-too-early", "node-0", "a", ""),
    ],
    19.0: [routing(3, all={"b": (6, 4.0, True), "c": (12, 6.0, True, 8.0), "d": (3, 2.0, True, 0.0, 3.0)})],
    20.0: [ReleaseClocks("r", "node-1", gpus(1, 0, 2), "")],
    24.0: [StopInstance("stop-a", "node-0", "a", "")],
    28.0: [start("e", 0, 0, 2)],
    33.0: [
        routing(
            4, short={"b": (6, 4.0, True), "e": (6, 2.0, True)}, long={"c": (40, 6.0, True), "d": (40, 2.0, True, 4.0)}
        )
    ],
}


@pytest.mark.parametrize(("kind", "seed"), [("conv", 1), ("conv", 2), ("code", 3)])
def test_queues_spills_drains_leases_and_new_tables_do_what_they_do_in_the_reference(kind, seed):
    trace = generate(kind, 45.0, 9.0, seed)
    times = FleetTimes(start_s=2.5)
    virtual = VirtualFleet(Scripted(SCRIPT), PHYSICS, NODES, times)
    slow = virtual.run(trace, start_s=5.0)
    fast = FastFleet(Scripted(SCRIPT), PHYSICS, NODES, trace, start_s=5.0, times=times, keep_observations=True).run()
    assert_same(slow, fast)
    # Otherwise this would prove nothing about the dispatcher.
    assert fast.spilled == virtual._dispatcher.spilled > 0
    assert fast.requests["queue_s"].max() > 2.0
    assert {seen.instances[0].state for seen in fast.observations if seen.instances} >= {
        InstanceState.STARTING,
        InstanceState.DRAINING,
        InstanceState.STOPPING,
    }


# Who holds what, by SCRIPT: a and b on node 0 from GPU 0 and 4, c and d on node 1 from GPU 0 and 4.
CRASH, SLEEP, WAKE = IncidentKind.CRASH, IncidentKind.SLEEP, IncidentKind.WAKE
BEFALLEN = {
    # A crash with answers under way and prompts unread; one while it loads; one of an instance that nobody routes to.
    "crashes": [Incident(14.3, CRASH, 0, 5), Incident(29.1, CRASH, 0, 1), Incident(34.6, CRASH, 1, 4)],
    # d drains although it is routed to for a while, copies, sleeps while its table lists it again, and wakes up.
    "sleep": [
        Incident(10.2, SLEEP, 1, 5),
        Incident(13.4, SLEEP, 0, 6),
        Incident(30.5, WAKE, 1, 4),
        Incident(31.5, WAKE, 0, 4),
    ],
    "crash of a sleeper": [Incident(10.2, SLEEP, 1, 5), Incident(26.7, CRASH, 1, 5), Incident(26.8, WAKE, 1, 5)],
    "nobody there": [Incident(0.5, CRASH, 0, 0), Incident(20.5, SLEEP, 1, 7), Incident(21.0, WAKE, 0, 4)],
}
AFTER = {
    12.0: [routing(3, short={"b": (4, 4.0, True)}, long={"c": (20, 8.0, True)})],
    19.0: [routing(4, all={"b": (6, 4.0, True), "c": (12, 6.0, True)})],
    24.0: [
        StopInstance("stop-a", "node-0", "a", ""),
        routing(5, all={"b": (6, 4.0, True), "c": (12, 6.0, True), "d": (3, 2.0, True)}),
    ],
    38.0: [start("b", 0, 4, 4)],
    42.0: [routing(7, all={"b": (40, 6.0, True), "c": (40, 6.0, True), "d": (9, 2.0, True)})],
}


@pytest.mark.parametrize("befallen", BEFALLEN)
def test_crashes_and_sleep_do_what_they_do_in_the_reference(befallen):
    trace, times, incidents = generate("conv", 45.0, 9.0, 2), FleetTimes(start_s=2.5, sleep_s=1.7), BEFALLEN[befallen]
    script = {**SCRIPT, **AFTER}
    slow = VirtualFleet(Scripted(script), PHYSICS, NODES, times, incidents=incidents).run(trace, start_s=5.0)
    fleet = FastFleet(
        Scripted(script), PHYSICS, NODES, trace, start_s=5.0, times=times, keep_observations=True, incidents=incidents
    )
    fast = fleet.run()
    assert_same(slow, fast)
    ended = np.isfinite(fast.requests["finished_s"])
    lost = np.isfinite(fast.requests["first_s"]) & ~ended
    assert [request.failed for request in slow.requests] == lost.tolist()
    states = {i.state for seen in fast.observations for i in seen.instances}
    counters = fleet.engines.counters().values()
    assert sum(row.completed for row in counters) == ended.sum()
    assert sum(row.failed for row in counters) == lost.sum() + fast.refused
    assert fleet.engines.open == 0
    if befallen == "crashes":
        assert lost.any()
        assert InstanceState.FAILED in states
        # What had no first token yet was served all the same, by another.
        assert ended.sum() + lost.sum() == len(trace)
    elif "sleep" in befallen:
        assert not lost.any()
        assert fast.energy_j[GpuState.ASLEEP] > 0
        assert InstanceState.ASLEEP in states
        assert (InstanceState.WARMING in states) == (befallen == "sleep")
    else:
        assert lost.sum() == 0
        assert not states & {InstanceState.FAILED, InstanceState.ASLEEP}


@pytest.mark.parametrize("per_day", [8_000, 40_000])
def test_the_whole_loop_mends_what_crashes_as_over_the_reference(per_day):
    trace = generate("conv", 40.0, 9.0, seed=1)
    incidents = crashes(per_day, NODES, 8, START_S + 40.0, seed=3)
    sleep = Incident(START_S + 21.3, SLEEP, 0, 0)
    fleet = VirtualFleet(make_core(), PHYSICS, NODES, FleetTimes(start_s=3.5), incidents=[*incidents, sleep])
    slow = fleet.run(trace, start_s=START_S)
    fast = serve_fast(trace, incidents=[*incidents, sleep])
    assert decided(slow) == decided(fast)
    assert_same(slow, fast)
    again = [effect for _, effect in fast.effects if isinstance(effect, StartInstance)]
    assert len({effect.instance_id for effect in again}) < len(again), "what crashed was started again"
    assert np.isfinite(fast.requests["finished_s"]).mean() > 0.5


def test_crashes_are_as_many_as_asked_for_and_the_same_for_a_seed():
    found = crashes(50.0, 3, 8, 30 * 86_400.0, seed=4)
    assert found == crashes(50.0, 3, 8, 30 * 86_400.0, seed=4)
    assert found != crashes(50.0, 3, 8, 30 * 86_400.0, seed=5)
    assert 1300 < len(found) < 1700
    assert {(incident.node, incident.gpu) for incident in found} == {(n, g) for n in range(3) for g in range(8)}
    assert [incident.at_s for incident in found] == sorted(incident.at_s for incident in found)
    assert crashes(0.0, 3, 8, 1e6, seed=1) == ()


def test_same_seed_same_bytes():
    def bytes_of(seed: int, draw: int, choices: int | None) -> bytes:
        result = serve_fast(generate("conv", 15.0, 6.0, seed), choices=choices, seed=draw)
        text = canonical_json([[d.sentence, d.inputs, d.outcome, list(d.alternatives)] for d in result.decisions])
        joules = repr(sorted(result.energy_j.items()))
        return result.requests.tobytes() + result.gaps.tobytes() + text.encode() + joules.encode()

    for choices in (None, 1):
        assert bytes_of(1, 0, choices) == bytes_of(1, 0, choices)
        assert bytes_of(1, 0, choices) != bytes_of(2, 0, choices)
    assert bytes_of(1, 0, 1) != bytes_of(1, 5, 1), "the drawing has a seed of its own"


def test_energy_by_state_is_the_sum_of_all_gpu_counters():
    trace = generate("conv", 60.0, 6.0, seed=1)
    fleet = FastFleet(make_core(), PHYSICS, NODES, trace, start_s=START_S, times=FleetTimes(start_s=3.5))
    fleet.run()
    shown = fleet.engines.shown()
    counted = sum(gpu.energy_j or 0.0 for node in fleet._nodes.values() for gpu in node.observe(shown).gpus)
    totals = fleet._totals()
    assert sum(totals.energy_j.values()) == pytest.approx(counted, rel=1e-9)
    assert min(totals.energy_j[state] for state in (GpuState.SERVING, GpuState.LOADING, GpuState.PARKED)) > 0
    assert totals.energy_j[GpuState.PARKED] == pytest.approx(72.0 * totals.parked_gpu_s)
    assert 0 < totals.parked_gpu_s < NODES * 8 * totals.at_s


def test_the_window_opens_after_the_warm_up_and_closes_with_the_last_arrival():
    trace = generate("conv", 40.0, 5.0, seed=1)
    whole, window = serve_fast(trace), serve_fast(trace, warm_up_s=15.0)
    assert whole.window_s == pytest.approx(trace.arrival_s[-1])
    assert window.window_s == pytest.approx(trace.arrival_s[-1] - 15.0)
    assert sum(window.energy_j.values()) < sum(whole.energy_j.values())
    assert 0 < window.gaps.sum() < whole.gaps.sum()
    assert decided(window) == decided(whole)
    held = {uuid for seen in whole.observations for i in seen.instances for uuid in i.gpu_uuids}
    assert whole.parked_gpu_s >= (NODES * 8 - len(held)) * whole.window_s


def test_no_gpu_ever_has_two_owners():
    for seen in serve_fast(generate("conv", 30.0, 9.0, seed=1)).observations:
        held = [uuid for i in seen.instances if i.state is not InstanceState.STOPPED for uuid in i.gpu_uuids]
        assert len(held) == len(set(held)) <= 8


def test_seeing_the_fleet_once_per_tick_decides_as_seeing_it_all_the_time():
    trace = generate("conv", 25.0, 5.0, seed=1)
    often, seldom = serve_fast(trace), serve_fast(trace, sparse=True)
    # With the ticks of the test one second apart, both see the same.
    assert decided(often) == decided(seldom)


# -------------------------------------------------------------------------------------------- static fleets


@pytest.mark.parametrize(("instances", "rate_rps"), [(1, 4.0), (5, 5.0), (12, 4.5)])
def test_a_static_fleet_picks_the_shortest_queue_as_the_reference_does(instances, rate_rps):
    trace = generate("conv", 400.0 / instances, rate_rps * instances, seed=7)
    slow = serve_steadily(PHYSICS, 8, 1605, instances, list(trace), warm_up_share=0.0)
    fast = static_engines(PHYSICS, trace, instances, 8, 1605)
    fast.advance(float(trace.arrival_s[-1]))  # the reference counts gaps up to here
    gaps = fast.gaps.copy()
    fast.finish()
    first_s = fast.results["first_s"]
    np.testing.assert_allclose(1e3 * (first_s - trace.arrival_s), [o.ttft_ms for o in slow.outcomes], atol=1e-6)
    tbt_s = (fast.results["finished_s"] - first_s) / np.maximum(trace.output_tokens - 1, 1)
    np.testing.assert_allclose(1e3 * tbt_s, [o.tbt_ms for o in slow.outcomes], atol=1e-6)
    assert gaps.sum() == sum(slow.gaps.values())
    assert gap_quantile_s(gaps, 0.99) == pytest.approx(slow.gap_quantile_ms(0.99) / 1e3, abs=1e-4)


def test_drawing_two_instead_of_looking_at_all_costs_little_energy_and_some_latency():
    """The error of the router whose cost does not grow with the fleet: measured, and not too large to be of use."""
    trace = generate("conv", 120.0, 40 * 3.0, seed=4)
    found = []
    for choices in (None, 2):
        engines = static_engines(PHYSICS, trace, 40, choices=choices)
        engines.advance(trace.duration_s)
        energy_j = engines.energy_j().sum()
        engines.finish()
        ttft_s = engines.results["first_s"] - trace.arrival_s
        found.append((energy_j, np.quantile(ttft_s, 0.5), np.quantile(ttft_s, 0.99)))
    exact, drawn = found
    assert drawn[0] == pytest.approx(exact[0], rel=0.01)
    assert drawn[1] == pytest.approx(exact[1], rel=0.05)
    assert exact[2] < drawn[2] < 1.4 * exact[2]


def test_classes_are_dealt_as_the_gateways_classifier_deals_them():
    """Also once its experience is halved; one request is done before the next comes, so that the order is plain."""
    count = 3 * REMEMBERED_REQUESTS
    mix = generate("conv", 100.0, count / 100.0, seed=6)
    trace = Trace("spread", 1000.0 * count, 1000.0 * np.arange(count), mix.input_tokens, mix.output_tokens)
    classifier = Classifier()
    dealt: Counter[RequestClass] = Counter()
    for request in trace:
        dealt[classifier.classify(request.input_tokens).load] += 1
        classifier.observe(request.input_tokens, request.output_tokens)
    engines = static_engines(PHYSICS, trace, 1)
    engines.finish()
    counters = engines.counters()
    assert {name: row.arrived for name, row in counters.items() if row.arrived} == dealt
    scheme = classifier.scheme
    true = Counter(scheme.classify(*tokens) for _, *tokens in trace)
    assert {name: row.completed for name, row in counters.items() if row.completed} == true
    assert sum(row.input_tokens for row in counters.values()) == trace.input_tokens.sum()
    assert sum(row.output_tokens for row in counters.values()) == trace.output_tokens.sum()
    assert sum(row.in_slo for row in counters.values()) == count, "every request had the instance to itself"


def test_instances_take_load_by_their_weights():
    trace = generate("conv", 200.0, 12.0, seed=4)
    engines = FastEngines(PHYSICS, trace, choices=2, seed=3)
    weights = (1.0, 2.0, 3.0, 4.0)
    rows = {f"i{number}": engines.start(8, 1980) for number in range(4)}
    for row in rows.values():
        engines.ready(row)
    members = tuple(RoutedInstance(f"i{n}", "", 8, 10_000, weight, True) for n, weight in enumerate(weights))
    engines.route([RoutedPool("all", "m", frozenset(ALL_CLASSES), members)], rows)
    engines.finish()
    counts = np.bincount(engines.results["instance"])
    assert (np.diff(counts) > 0).all()
    assert counts[3] > 2.5 * counts[0]


def test_many_more_requests_and_instances_than_there_was_room_for():
    trace = trace_of([(0.0001 * number, 500, 20) for number in range(20_000)])
    engines = static_engines(PHYSICS, trace, 70)
    engines.advance(1.0)
    assert engines.open > 4096
    engines.finish()
    assert engines.open == 0
    assert np.isfinite(engines.results["finished_s"]).all()


def test_requests_that_nothing_can_hold_are_counted_and_end_there():
    trace = trace_of([(0.0, 500, 20), (1.0, 28_990, 100), (2.0, 500, 20)])
    engines = static_engines(PHYSICS, trace, 1, tp=2)
    engines.finish()
    assert engines.refused == 1
    assert np.isnan(engines.results["finished_s"]).tolist() == [False, True, False]
    assert engines.counters()[RequestClass.parse("LM")].failed == 1


def test_without_a_routing_table_requests_wait_and_are_served_in_order_of_their_deadlines():
    trace = trace_of([(0.0, 2000, 5), (0.1, 100, 5), (0.2, 500, 5)])
    engines = FastEngines(PHYSICS, trace)
    row = engines.start(8, 1980)
    engines.advance(5.0)
    assert (engines.open, engines.queues()) == (3, {})
    engines.ready(row)
    one = RoutedInstance("one", "", 8, 1, 1.0, True)
    pool = RoutedPool("all", "m", frozenset(ALL_CLASSES), (one,))
    engines.route([pool], {"one": row})
    queue = engines.queues()["all"]
    assert (queue.waiting, queue.in_flight, queue.oldest_wait_s) == (2, 1, pytest.approx(5.0))
    engines.finish()
    # Due at 2.0 s, 0.35 s and 0.6 s.
    assert np.argsort(engines.results["finished_s"]).tolist() == [1, 2, 0]


def test_draining_and_stopping_are_accounted_and_rows_are_free_again():
    trace = trace_of([(0.0, 500, 50)])
    engines = static_engines(PHYSICS, trace, 1)
    engines.advance(0.5)
    engines.drain(0)
    with pytest.raises(ValueError, match="still has work"):
        engines.stop(0)
    engines.finish()
    end_s = engines.now_s
    engines.stop(0)
    engines.advance(end_s + 2.0)
    before = engines.energy_j()
    assert (before > 0).tolist() == [True, False, False, True, False]
    drawn_j = engines.remove(0)
    assert engines.energy_j() == pytest.approx(before)
    assert 8 * drawn_j == pytest.approx(before.sum())
    assert engines.start(4, 1200) == 0


def test_time_does_not_run_backwards():
    engines = static_engines(PHYSICS, trace_of([(0.0, 10, 2)]), 1)
    engines.advance(3.0)
    with pytest.raises(ValueError, match="cannot go back"):
        engines.advance(2.0)
    engines.advance(inf)
