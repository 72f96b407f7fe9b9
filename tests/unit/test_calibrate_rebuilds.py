"""Calibration closes the loop: what a profile says at loads that it did not measure is what the physics give there."""

from __future__ import annotations

import numpy as np
import pytest

from controller.calibrate.assembly import ProfileIdentity, build_profile, samples_by_group
from controller.calibrate.sweep import (
    MemoryCache,
    SweepPlan,
    SweepSettings,
    sweep,
)
from controller.domain.classes import by_input
from controller.profile.fit import ProfileFit, fit
from simulator.calibration import MEASURED_INSTANCES, TwinBackend, arrivals
from simulator.fast.static import static_engines
from simulator.physics import Physics
from simulator.traces import Trace, token_mix

PHYSICS = Physics.load()
MIX = token_mix("conv", 20_000, 5)
GROUP = by_input("long", "L")
PLAN = SweepPlan(
    groups=(GROUP,),
    tps=(8,),
    clocks_mhz=(1200, 1980),
    settings=SweepSettings(gate_requests=500, least_requests=1000, curve_requests=1500, precision=0.1, refinements=3),
)
REQUESTS = 12_000
WITHIN = 0.03


@pytest.fixture(scope="module")
def fitted() -> ProfileFit:
    samples = samples_by_group(MIX, PLAN.groups, PLAN.scheme)
    backend = TwinBackend(PHYSICS, PLAN, samples)
    points = sweep(backend, PLAN, MemoryCache())
    return fit(build_profile(backend, PLAN, ProfileIdentity("m", "g", "e", "test"), points, samples, {}))


def physics_says(mhz: int, rate_rps: float) -> tuple[float, float]:
    """Mean power of an instance in W and its mean requests in flight, on the fast twin, under another seed and load."""
    mine = [(i, o) for i, o in MIX if PLAN.scheme.input_bucket(i).value == "L"]
    requests = arrivals(mine, rate_rps * MEASURED_INSTANCES, REQUESTS, seed=77)
    at_s, inputs, outputs = (np.array(column) for column in zip(*requests, strict=True))
    engines = static_engines(
        PHYSICS, Trace("check", float(at_s[-1]), at_s, inputs, outputs), MEASURED_INSTANCES, 8, mhz
    )
    first = len(at_s) // 10
    engines.advance(float(at_s[first]))
    before_j = engines.energy_j().sum()
    engines.advance(float(at_s[-1]))
    joules = engines.energy_j().sum() - before_j
    engines.finish()
    seconds = float(at_s[-1] - at_s[first])
    stay_s = (engines.results["finished_s"] - at_s)[first:].sum()
    return joules / seconds / MEASURED_INSTANCES, stay_s / seconds / MEASURED_INSTANCES


@pytest.mark.parametrize("mhz", PLAN.clocks_mhz)
@pytest.mark.parametrize("share", [0.01, 0.03, 0.05, 0.08, 0.12, 0.22, 0.4, 0.62, 0.85])
def test_power_between_points_is_that_of_the_physics(fitted, mhz, share):
    curve = fitted.curve("long", 8, mhz)
    rate_rps = share * curve.max_rate_rps
    assert rate_rps not in curve.rates_rps  # between what was measured
    power_w, _ = physics_says(mhz, rate_rps)
    assert curve.power_w(rate_rps) == pytest.approx(power_w, rel=WITHIN)


@pytest.mark.parametrize("mhz", PLAN.clocks_mhz)
def test_every_measured_point_is_within_three_percent(fitted, mhz):
    points = [p for p in fitted.profile.points if p.mhz == mhz and p.in_slo(PLAN.slo)]
    assert len(points) > 5
    for point in points:
        power_w, in_flight = physics_says(mhz, point.rate_rps)
        assert point.power_w == pytest.approx(power_w, rel=WITHIN)
        if point.rate_rps > 1:  # few requests at once have a noisy mean
            assert point.running_mean == pytest.approx(in_flight, rel=0.1)


def test_idle_and_parked_power_are_exact(fitted):
    for mhz in PLAN.clocks_mhz:
        assert fitted.idle_power_w(8, mhz) == pytest.approx(8 * PHYSICS.idle_w(mhz, context=True))
    assert fitted.parked_w == PHYSICS.idle_w(1980, context=False)
