"""Calibration of the twin: what is measured is physical, the published pattern shows, results are kept by content."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import simulator.calibration as calibration
from common.errors import UserError
from controller.calibrate.assembly import ProfileIdentity, build_profile, samples_by_group
from controller.calibrate.sweep import (
    MemoryCache,
    Phase,
    Progress,
    SweepPlan,
    SweepSettings,
    sweep,
)
from controller.domain.classes import DEFAULT_GROUPS, by_input
from controller.profile.fit import ProfileFit, fit
from simulator.calibration import TwinBackend, arrivals, calibrate_twin, single_pool_max_rps
from simulator.calibration_check import best_clocks, check_table
from simulator.fast.steady import serve_fast
from simulator.physics import Physics
from simulator.steady import serve_steadily
from simulator.traces import Request, generate, token_mix

PHYSICS = Physics.load()
QUICK = SweepSettings(gate_requests=150, least_requests=500, curve_requests=150, precision=0.1)
MIX = token_mix("conv", 4000, 5)


# --------------------------------------------------------------------------------------------- steady state


def test_a_sparse_load_draws_little_more_than_idle() -> None:
    requests = arrivals([(500, 1)], 0.01, 60, seed=1)
    steady = serve_steadily(PHYSICS, 4, 1400, 2, requests)
    idle_w = 4 * PHYSICS.idle_w(1400, context=True)
    assert idle_w < steady.power_w < idle_w * 1.01
    assert all(o.served for o in steady.outcomes)


def test_little_s_law_holds() -> None:
    """Mean batch = arrival rate x mean time in the batch (no queue at this load)."""
    rate, instances = 3.0, 2
    steady = serve_steadily(PHYSICS, 8, 1980, instances, arrivals(MIX, rate * instances, 4000, seed=2))
    outputs = [o for _, o in MIX]
    mean_s = sum(o.ttft_ms + o.tbt_ms * (sum(outputs) / len(outputs) - 1) for o in steady.outcomes) / len(
        steady.outcomes
    )
    assert steady.running_mean == pytest.approx(rate * mean_s / 1e3, rel=0.15)


def test_what_no_instance_can_hold_is_a_miss() -> None:
    requests = [Request(float(i), 200, 10) for i in range(50)] + [Request(60.0, 40_000, 10)]
    steady = serve_steadily(PHYSICS, 2, 1980, 1, [*requests, Request(61.0, 200, 10)])
    assert Counter(o.served for o in steady.outcomes)[False] == 1


def test_an_overload_is_given_up_and_counts_as_out_of_slo() -> None:
    backend = TwinBackend(PHYSICS, SweepPlan(), samples_by_group(MIX, DEFAULT_GROUPS, SweepPlan().scheme))
    steady = serve_steadily(PHYSICS, 2, 800, 2, arrivals(MIX, 20.0, 3000, seed=1))
    assert steady.gave_up
    point = backend.measure(calibration.PointRequest("all", 2, 800, 10.0, 1500, 1))
    assert point.attainment == point.attainment_worst == 0.0
    assert point.power_w > 0


@pytest.mark.parametrize(
    ("tp", "mhz", "rate_rps"), [(8, 1980, 1.0), (8, 1605, 14.0), (4, 1200, 5.0), (2, 1980, 3.0), (8, 800, 0.1)]
)
@pytest.mark.parametrize("physics", [PHYSICS, Physics.from_text("base+prefill-first")], ids=["chunked", "first"])
def test_what_is_measured_at_speed_is_what_the_plain_engine_says(
    physics: Physics, tp: int, mhz: int, rate_rps: float
) -> None:
    requests = [*arrivals(MIX, rate_rps, 1500, seed=3), Request(1500 / rate_rps + 60, 3_000_000, 10)]
    slow = serve_steadily(physics, tp, mhz, 2, requests)
    fast = serve_fast(physics, tp, mhz, 2, requests)
    assert fast.power_w == pytest.approx(slow.power_w, rel=1e-3)
    assert fast.running_mean == pytest.approx(slow.running_mean, rel=1e-3)
    assert fast.running_quantile(0.99) == pytest.approx(slow.running_quantile(0.99), abs=1)
    assert fast.gap_quantile_ms(0.99) == pytest.approx(slow.gap_quantile_ms(0.99), abs=0.11)
    assert sum(fast.gaps.values()) == sum(slow.gaps.values())
    assert [o.served for o in fast.outcomes] == [o.served for o in slow.outcomes]
    for ours, theirs in zip(fast.outcomes, slow.outcomes, strict=True):
        assert (ours.input_tokens, ours.served) == (theirs.input_tokens, theirs.served)
        assert (ours.ttft_ms, ours.tbt_ms) == pytest.approx((theirs.ttft_ms, theirs.tbt_ms), abs=1e-5)
    assert not fast.outcomes[-1].served, "no engine holds the last one"


def test_both_give_up_on_an_overload() -> None:
    requests = arrivals(MIX, 60.0, 4000, seed=3)
    slow, fast = (serve(PHYSICS, 4, 1200, 2, requests) for serve in (serve_steadily, serve_fast))
    assert slow.gave_up
    assert fast.gave_up
    assert fast.power_w == pytest.approx(slow.power_w, rel=0.05)
    assert not all(outcome.served for outcome in fast.outcomes)


def test_equal_seeds_give_equal_requests_only_closer_together() -> None:
    slow, fast = arrivals(MIX, 1.0, 100, seed=3), arrivals(MIX, 4.0, 100, seed=3)
    assert [r[1:] for r in slow] == [r[1:] for r in fast]
    assert [r.arrival_s for r in slow] == pytest.approx([4 * r.arrival_s for r in fast])


def test_a_lower_clock_draws_less_and_is_slower() -> None:
    requests = arrivals(MIX, 4.0, 1500, seed=1)
    fast, slow = (serve_steadily(PHYSICS, 8, mhz, 1, requests) for mhz in (1980, 800))
    assert slow.power_w < 0.8 * fast.power_w
    assert slow.running_mean > fast.running_mean
    assert slow.gap_quantile_ms(0.99) > fast.gap_quantile_ms(0.99)


def test_saturated_phases_cost_what_the_physics_says() -> None:
    backend = TwinBackend(PHYSICS, SweepPlan(), {})
    prefill, _ = backend.saturated(Phase.PREFILL, 8, 1980, (1024.0, 100.0))
    seconds, _ = PHYSICS.iteration(8, 1980, 0, 0, [(1024, 0)])
    assert prefill == pytest.approx(seconds / 1024, rel=0.05)
    for tp in (4, 8):
        decode, _ = backend.saturated(Phase.DECODE, tp, 1980, (1024.0, 100.0))
        seconds, _ = PHYSICS.iteration(tp, 1980, 256, 256 * 1400)
        assert decode == pytest.approx(seconds / 256, rel=0.1)


# ---------------------------------------------------------------------------------------- published pattern


@pytest.fixture(scope="module")
def fitted() -> ProfileFit:
    plan = SweepPlan(
        groups=(by_input("short", "SM"), by_input("long", "L")),
        tps=(2, 8),
        clocks_mhz=(800, 1200, 1980),
        settings=QUICK,
    )
    samples = samples_by_group(MIX, plan.groups, plan.scheme)
    backend = TwinBackend(PHYSICS, plan, samples)
    points = sweep(backend, plan, MemoryCache())
    return fit(build_profile(backend, plan, ProfileIdentity("m", "g", "e", "test"), points, samples, {}))


def joules_per_request(fitted: ProfileFit, mhz: int, rate_rps: float) -> float:
    curve = fitted.curve("short", 8, mhz)
    assert curve is not None
    power_w = curve.power_w(rate_rps)
    assert power_w is not None
    return power_w / rate_rps


def test_the_batch_matters_more_than_the_clock(fitted: ProfileFit) -> None:
    top = fitted.clocks("short", 8)[0].max_rate_rps  # in SLO at every clock
    by_batch = joules_per_request(fitted, 1980, 0.05 * top) / joules_per_request(fitted, 1980, top)
    by_clock = max(
        joules_per_request(fitted, 1980, s * top) / joules_per_request(fitted, 800, s * top) for s in (0.3, 1)
    )
    assert by_batch > 5
    assert 1.1 < by_clock < 2


def test_the_best_clock_rises_with_the_load(fitted: ProfileFit) -> None:
    for group in ("short", "long"):
        best = []
        for share in (0.05, 0.5, 0.99):
            rate = share * fitted.max_rate_rps(group, 8)
            powers = {c.mhz: c.power_w(rate) or 0.0 for c in fitted.clocks(group, 8) if c.max_rate_rps >= rate}
            best.append(min(powers, key=lambda mhz: powers[mhz]))
        assert best == sorted(best)
        assert best[0] < best[-1]


def test_tp2_has_little_room_for_context(fitted: ProfileFit) -> None:
    for group in ("short", "long"):
        assert fitted.max_rate_rps(group, 2) / 2 < 0.5 * fitted.max_rate_rps(group, 8) / 8


def test_long_prompts_cost_more_than_short_ones(fitted: ProfileFit) -> None:
    assert fitted.max_rate_rps("long", 8) < 0.5 * fitted.max_rate_rps("short", 8)
    profile = fitted.profile
    for group in ("short", "long"):
        weights = [profile.request_weight(group, c) for c in profile.mixes[group]]
        assert min(weights) < 1 < max(weights)


def test_the_check_table_says_what_this_profile_says(fitted: ProfileFit) -> None:
    lines = check_table(fitted, 90.0).splitlines()
    assert "| 7.6 | 7.50 |" in lines[2]
    assert best_clocks(fitted, "long") in lines[6]
    assert f"| {fitted.max_rate_rps('long', 2) / 2 / (fitted.max_rate_rps('long', 8) / 8):.2f} |" in lines[7]
    assert "| 122, 84 |" in lines[8]


# -------------------------------------------------------------------------------------------------- on disk


def test_a_second_run_reads_the_first_and_other_physics_are_measured_anew(tmp_path: Path) -> None:
    plan = SweepPlan(groups=(by_input("long", "L"),), tps=(8,), clocks_mhz=(1200, 1980), settings=QUICK)
    seen: list[Progress] = []
    first = calibrate_twin(PHYSICS, tmp_path, seen.append, plan=plan, start_s=3.0, workers=1)
    assert [p.sentence for p in seen] == ["long TP8"]
    assert first.starts[8].start_j == pytest.approx(3.0 * 8 * PHYSICS.loading_w)
    again = calibrate_twin(PHYSICS, tmp_path, seen.append, plan=plan, start_s=3.0, workers=1)
    assert again == first
    assert again.checksum() == first.checksum()
    slower = calibrate_twin(PHYSICS, tmp_path, seen.append, plan=plan, start_s=30.0, workers=1)
    assert len(seen) == 1  # how long a start takes is no part of what is measured
    assert replace(slower, starts=first.starts) == first

    other = calibrate_twin(Physics.load(variant="pessimistic"), tmp_path, seen.append, plan=plan, workers=1)
    assert len(seen) == 2
    assert other.points != first.points


def test_a_mix_without_a_group_is_refused(tmp_path: Path) -> None:
    only_short = generate("conv", 30.0, 5.0, seed=1)
    short = replace(only_short, input_tokens=only_short.input_tokens % 200 + 1)
    with pytest.raises(UserError, match="no request of group long"):
        calibrate_twin(PHYSICS, tmp_path, source=short)


def test_single_pool_serves_more_with_more_instances_and_less_on_a_slow_engine(tmp_path: Path) -> None:
    def most(instances: int, physics: Physics = PHYSICS) -> float:
        return single_pool_max_rps(physics, instances, "conv", tmp_path, requests=1500, precision=0.05)

    one, three = most(1), most(3)
    assert three > 3 * one  # more instances even out what one would queue
    assert most(3) == three
    assert most(1, Physics.load(legacy=True)) < one


def test_single_pool_on_a_trace_is_searched_on_that_trace(tmp_path: Path) -> None:
    calm = generate("conv", 120.0, 4.0, seed=1, swing=0.0)
    swinging = generate("conv", 120.0, 4.0, seed=1, swing=0.9)
    rates = [single_pool_max_rps(PHYSICS, 2, trace, tmp_path, precision=0.05) for trace in (calm, swinging)]
    assert rates[0] > rates[1] > 0
