"""The emergency ladder in virtual time: the compiled queue carries orders out as the reference does, a calm fleet is
not touched by it, and under an overload it serves more in time and hides nobody that it refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from controller.domain.reasons import Reason, Stage
from controller.fleet.port import Effect, PoolOrder, PublishRouting
from controller.loop.settings import Knobs
from simulator.fast.fleet import FastFleet, FastResult
from simulator.fleet import FleetResult, FleetTimes, VirtualFleet
from simulator.traces import Trace, generate
from tests.synthetic_profile import MODEL
from tests.unit.test_fast_fleet import (
    NODES,
    PHYSICS,
    SCRIPT,
    START_S,
    Scripted,
    decided,
    make_core,
    routing,
    serve_fast,
    serve_slow,
)


def joined(kind: str, seed: int, *parts: tuple[float, float]) -> Trace:
    """Seconds at a rate, one part after the other."""
    traces, begins, total_s = [], [], 0.0
    for number, (seconds, rate_rps) in enumerate(parts):
        traces.append(generate(kind, seconds, rate_rps, seed + number))
        begins.append(total_s)
        total_s += seconds
    return Trace(
        "spike",
        total_s,
        np.concatenate([trace.arrival_s + begin for trace, begin in zip(traces, begins, strict=True)]),
        np.concatenate([trace.input_tokens for trace in traces]),
        np.concatenate([trace.output_tokens for trace in traces]),
    )


def spike(seed: int = 1) -> Trace:
    return joined("conv", seed, (10.0, 5.0), (14.0, 60.0), (30.0, 4.0))


def assert_same_answers(slow: FleetResult, fast: FastResult) -> None:
    assert [effect for _, effect in slow.effects] == [effect for _, effect in fast.effects]
    ttft_s = [np.nan if request.ttft_s is None else request.ttft_s for request in slow.requests]
    np.testing.assert_allclose(fast.ttft_s(), ttft_s, rtol=0, atol=1e-6)
    finished_s = [np.nan if request.finished_s is None else request.finished_s for request in slow.requests]
    np.testing.assert_allclose(fast.requests["finished_s"], finished_s, rtol=0, atol=1e-6)
    assert [request.pool for request in slow.requests if not request.refused] == [
        fast.pools[pool] for pool in fast.requests["pool"] if pool >= 0
    ]
    assert fast.refused == sum(request.refused for request in slow.requests) > 0


def ladders(result: FastResult) -> dict[str, list[Stage]]:
    """By pool, each stage from the first on."""
    found: dict[str, list[Stage]] = {}
    for decision in result.decisions:
        if "stage" in decision.outcome:
            found.setdefault(decision.scope, [Stage.NONE]).append(Stage(decision.outcome["stage"]))
    return found


def test_the_whole_ladder_is_climbed_alike_in_both_worlds() -> None:
    one_pool = Knobs(pools=False)
    slow, fast = serve_slow(spike(), one_pool), serve_fast(spike(), one_pool)
    assert decided(slow) == decided(fast)
    assert_same_answers(slow, fast)
    (stages,) = ladders(fast).values()
    assert all(abs(after.rank - before.rank) == 1 for before, after in pairwise(stages))
    assert Stage.REFUSE in stages
    assert Reason.DEADLINES_SAFE in {decision.reason for decision in fast.decisions}


def ordered(effect: PublishRouting, **orders: PoolOrder) -> PublishRouting:
    pools = tuple(replace(pool, order=orders.get(pool.name)) for pool in effect.table.pools)
    return replace(effect, table=replace(effect.table, pools=pools))


def order(stage: Stage, first_token_s: float = 0.1, prompts: int = 100_000, **limits: int) -> PoolOrder:
    return PoolOrder(stage, 1e6, (first_token_s,) * 3, 15.0, limits, {"b": prompts, "c": 2 * prompts})


@pytest.mark.parametrize("seed", [1, 2])
def test_orders_of_every_stage_do_in_the_compiled_queue_what_they_do_in_the_reference(seed: int) -> None:
    short = {"a": (3, 4.0, True), "b": (4, 4.0, True), "d": (2, 1.0, True)}
    two = routing(2, short=short, long={"c": (6, 8.0, True)})
    script: dict[float, list[Effect]] = {
        1.0: SCRIPT[1.0],
        7.0: [ordered(two, short=order(Stage.REORDER))],
        10.0: [ordered(two, short=order(Stage.MOVE, b=1), long=order(Stage.FULL_CLOCK, prompts=1500))],
        14.0: [ordered(two, short=order(Stage.MOVE), long=order(Stage.MOVE, 0.5, c=2))],
        18.0: [ordered(two, short=order(Stage.REFUSE, prompts=300), long=order(Stage.REORDER, prompts=900))],
        24.0: [two],
        28.0: [ordered(two, long=order(Stage.REFUSE, 0.0))],
        32.0: [ordered(two, short=order(Stage.REFUSE, 0.2), long=order(Stage.MOVE))],
        38.0: [ordered(routing(3, all={"b": (9, 4.0, True), "c": (12, 6.0, True)}), all=order(Stage.REORDER))],
    }
    trace, times = generate("conv", 45.0, 12.0, seed), FleetTimes(start_s=2.5)
    virtual = VirtualFleet(Scripted(script), PHYSICS, NODES, times)
    slow = virtual.run(trace, start_s=5.0)
    fast = FastFleet(Scripted(script), PHYSICS, NODES, trace, start_s=5.0, times=times, keep_observations=True)
    result = fast.run()
    assert_same_answers(slow, result)
    assert result.spilled == virtual._dispatcher.spilled > 0
    assert virtual._dispatcher.moved > 0
    assert virtual._dispatcher._refused[(MODEL, "short"), "too_late"] > 0


def test_without_trouble_the_ladder_changes_nothing() -> None:
    """The same bytes with and without it: latencies, decisions, energy."""
    trace = generate("conv", 60.0, 5.0, seed=1)

    def bytes_of(result: FastResult) -> tuple[object, ...]:
        said = [(d.decided_at_s, d.sentence, repr(d.inputs), repr(d.outcome)) for d in result.decisions]
        return result.requests.tobytes(), result.gaps.tobytes(), said, repr(sorted(result.energy_j.items()))

    assert bytes_of(serve_fast(trace)) == bytes_of(serve_fast(trace, Knobs(emergency=False)))


def in_slo(result: FastResult) -> tuple[float, float]:
    """Share of all requests, and of those that were not refused, that were in SLO."""
    slo, scheme = make_core().state.profile.slo, make_core().state.profile.scheme
    met = [
        slo.met(scheme.input_bucket(int(tokens)), 1e3 * ttft_s, 1e3 * tbt_s)
        for tokens, ttft_s, tbt_s in zip(result.trace.input_tokens, result.ttft_s(), result.tbt_s(), strict=True)
    ]
    return sum(met) / len(met), sum(met) / (len(met) - result.refused)


def test_under_an_overload_it_serves_more_in_time_and_counts_whom_it_refused() -> None:
    trace = joined("conv", 5, (5.0, 5.0), (60.0, 45.0))
    core = {"start_s": START_S, "times": FleetTimes(start_s=3.5)}
    found = {}
    for emergency in (False, True):
        fleet = FastFleet(make_core(Knobs(emergency=emergency)), PHYSICS, NODES, trace, **core)
        result = fleet.run()
        found[emergency] = in_slo(result)
        counted = fleet.engines.counters()
        assert sum(row.failed for row in counted.values()) == result.refused
        assert sum(row.completed for row in counted.values()) + result.refused == len(trace)  # nobody is lost
        assert (result.refused > 0) is emergency
    assert found[True][0] > found[False][0] + 0.05
    assert found[True][1] > found[True][0]
