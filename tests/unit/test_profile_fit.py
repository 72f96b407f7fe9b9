"""Curves over measured points: interpolation inside, refusal outside, noise taken out one way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.domain.classes import Bucket
from controller.profile.fit import OutOfRangeError, fit, knee_rps
from controller.profile.table import OperatingPoint, Profile
from tests.synthetic_profile import synthetic_profile


def points_of(profile: Profile, group: str, tp: int, mhz: int) -> list[OperatingPoint]:
    return sorted((p for p in profile.points if (p.group, p.tp, p.mhz) == (group, tp, mhz)), key=lambda p: p.rate_rps)


def test_measured_points_are_met_and_between_them_it_is_linear() -> None:
    profile = synthetic_profile()
    curve = fit(profile).curve("short", 4, 1400)
    assert curve is not None
    low, high = points_of(profile, "short", 4, 1400)[:2]
    assert curve.power_w(low.rate_rps) == pytest.approx(low.power_w)
    middle = (low.rate_rps + high.rate_rps) / 2
    assert curve.power_w(middle) == pytest.approx((low.power_w + high.power_w) / 2)
    assert curve.running(high.rate_rps) == pytest.approx(high.running_mean)
    assert curve.rate_for_running(high.running_mean) == pytest.approx(high.rate_rps)
    assert curve.ttft_p99(Bucket.S, low.rate_rps) == pytest.approx(150.0)
    assert curve.ttft_p99(Bucket.L, low.rate_rps) is None  # no such bucket in the group


def test_idle_is_the_point_of_no_load() -> None:
    profile = synthetic_profile()
    curve = fit(profile).curve("all", 8, 800)
    assert curve is not None
    assert curve.power_w(0.0) == pytest.approx(profile.idle_power_w(8, 800))
    assert curve.running(0.0) == 0.0


def test_extrapolation_is_refused() -> None:
    curve = fit(synthetic_profile()).curve("all", 2, 1980)
    assert curve is not None
    beyond = curve.rates_rps[-1] * 1.001
    for bad in (beyond, -0.001, float("nan"), float("inf")):
        assert curve.power_w(bad) is None
        assert curve.running(bad) is None
    with pytest.raises(OutOfRangeError, match="all TP2 1980 MHz"):
        curve.power_w_array(np.array([0.0, beyond]))
    rates = np.linspace(0, curve.rates_rps[-1], 7)
    assert curve.power_w_array(rates) == pytest.approx([curve.power_w(float(r)) for r in rates])
    assert curve.power_w_array(np.array([])).size == 0


def test_what_was_not_measured_has_no_curve() -> None:
    fitted = fit(synthetic_profile())
    assert fitted.curve("short", 4, 1000) is None
    assert fitted.clocks("medium", 4) == ()
    assert fitted.max_rate_rps("medium", 4) == 0.0


def test_the_knee_lies_between_the_last_good_and_the_first_bad_point() -> None:
    profile = synthetic_profile()
    fitted = fit(profile, safety_margin=0.0)
    curve = fitted.curve("all", 4, 1980)
    assert curve is not None
    assert 4.0 <= curve.max_rate_rps < 4.0 * 1.3
    with_margin = fit(profile, safety_margin=0.1).curve("all", 4, 1980)
    assert with_margin is not None
    assert with_margin.max_rate_rps == pytest.approx(0.9 * curve.max_rate_rps)


def test_the_knee_obeys_attainment_of_the_worst_bucket_and_the_gap() -> None:
    profile = synthetic_profile()
    points = points_of(profile, "all", 4, 1980)
    assert knee_rps(points, profile.slo) >= points[3].rate_rps
    worst = [replace(p, attainment_worst=0.9) if i == 2 else p for i, p in enumerate(points)]
    worst[3:] = [replace(p, attainment_worst=0.9) for p in worst[3:]]
    assert points[1].rate_rps <= knee_rps(worst, profile.slo) < points[2].rate_rps
    gap = [replace(p, gap_p99_ms=130.0 if i >= 3 else 80.0) for i, p in enumerate(points)]
    assert points[2].rate_rps <= knee_rps(gap, profile.slo) < points[3].rate_rps
    assert knee_rps([replace(p, gap_p99_ms=130.0) for p in points], profile.slo) == 0.0


def test_one_noisy_failure_among_passes_does_not_move_the_knee_to_it() -> None:
    profile = synthetic_profile()
    points = points_of(profile, "all", 4, 1980)
    noisy = [replace(p, attainment_worst=0.9895) if i == 1 else p for i, p in enumerate(points)]
    assert knee_rps(noisy, profile.slo) > points[2].rate_rps


@given(st.lists(st.floats(0.5, 1.5), min_size=15, max_size=15))
def test_noise_never_makes_power_or_batch_fall_with_load_or_a_lower_clock_carry_more(noise: list[float]) -> None:
    profile = synthetic_profile()
    mine = [p for p in profile.points if (p.group, p.tp) == ("long", 8)]
    shaken = [
        replace(
            p,
            power_w=p.power_w * k,
            running_mean=p.running_mean * k,
            attainment_worst=min(1.0, p.attainment_worst * (0.99 + 0.01 * k)),
        )
        for p, k in zip(mine, noise, strict=True)
    ]
    curves = fit(replace(profile, points=tuple(shaken))).clocks("long", 8)
    for curve in curves:
        assert list(curve.powers_w) == sorted(curve.powers_w)
        assert list(curve.runnings) == sorted(curve.runnings)
        assert 0 <= curve.max_rate_rps <= curve.rates_rps[-1]
    knees = [curve.max_rate_rps for curve in curves]
    assert knees == sorted(knees)
