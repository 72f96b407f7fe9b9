"""Rate forecasts from counted windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.policy.forecast import ForecastSettings, LoadWindow, RateForecast, combine, forecast


def windows(rates: list[float], seconds: float = 10.0, end_s: float = 1000.0) -> list[LoadWindow]:
    """Windows of exact rates, the last one ending at `end_s`."""
    first = end_s - seconds * (len(rates) - 1)
    return [LoadWindow(first + i * seconds, seconds, round(rate * seconds)) for i, rate in enumerate(rates)]


def test_no_data_is_unknown_not_zero() -> None:
    assert forecast([], 1000.0, 300.0) is None
    stale = windows([5.0] * 5, end_s=10.0)
    assert forecast(stale, 10.0 + 5000.0, 300.0) is None
    assert forecast([LoadWindow(1000.0, 0.0, 3), LoadWindow(float("nan"), 1.0, 3)], 1000.0, 60.0) is None


def test_a_steady_rate_is_seen_as_it_is() -> None:
    seen = forecast(windows([6.0] * 20), 1000.0, 300.0)
    assert seen is not None
    assert seen.mean_rps == pytest.approx(6.0)
    assert seen.trend_rps_per_s == 0.0
    assert seen.dispersion == 1.0
    assert seen.observed_s == pytest.approx(200.0)


def test_gaps_are_unknown_load_and_change_nothing() -> None:
    full = windows([6.0] * 20)
    with_gap = [w for i, w in enumerate(full) if not 5 <= i < 12]
    one, two = forecast(full, 1000.0, 300.0), forecast(with_gap, 1000.0, 300.0)
    assert one is not None
    assert two is not None
    assert two.mean_rps == pytest.approx(one.mean_rps)
    assert two.std_rps > one.std_rps


def test_a_silent_class_is_provisioned_for_a_little() -> None:
    seen = forecast(windows([0.0] * 20), 1000.0, 300.0)
    assert seen is not None
    assert seen.mean_rps == 0.0
    assert 0 < seen.std_rps < 0.1


def test_a_rise_is_provisioned_for_ahead_and_a_fall_is_not_trusted() -> None:
    rising = forecast(windows([2.0 + 0.5 * i for i in range(20)]), 1000.0, 120.0)
    falling = forecast(windows([12.0 - 0.5 * i for i in range(20)]), 1000.0, 120.0)
    assert rising is not None
    assert falling is not None
    assert rising.trend_rps_per_s == pytest.approx(0.05, rel=0.3)
    assert rising.level_rps == pytest.approx(11.5, rel=0.1)
    assert rising.mean_rps > rising.level_rps + 1.0
    assert falling.trend_rps_per_s < 0
    assert falling.mean_rps == pytest.approx(falling.level_rps)


def test_a_turn_is_seen_soon_when_it_goes_up() -> None:
    """Ten minutes of fall, then two of rise: one line through all of it would still be falling."""
    fall = [12.0 - 0.15 * i for i in range(60)]
    rise = [3.0 + 0.4 * i for i in range(12)]
    seen = forecast(windows([*fall, *rise]), 1000.0, 60.0)
    assert seen is not None
    assert seen.level_rps == pytest.approx(rise[-1], rel=0.15)
    assert seen.trend_rps_per_s > 0
    down = forecast(windows([*rise, *reversed(rise)]), 1000.0, 60.0)
    assert down is not None
    assert down.mean_rps > rise[0]


def test_the_trend_is_bounded_far_ahead() -> None:
    series = windows([2.0 + 0.5 * i for i in range(20)])
    far = forecast(series, 1000.0, 1e6, ForecastSettings(max_trend_ratio=0.5))
    assert far is not None
    assert far.mean_rps <= far.level_rps * 1.5


def test_bursts_raise_the_dispersion_and_the_provisioned_rate() -> None:
    calm = forecast(windows([5.0] * 20), 1000.0, 300.0)
    bursty = forecast(windows([0.0, 10.0] * 10), 1000.0, 300.0)
    assert calm is not None
    assert bursty is not None
    assert bursty.dispersion > 10
    assert combine([(1.0, bursty)], 0.95) > combine([(1.0, calm)], 0.95) * 1.3


def test_the_quantile_covers_poisson_load() -> None:
    """Counts of the next sustained span stay under the provisioned rate about as often as asked for."""
    rng = np.random.default_rng(7)
    settings = ForecastSettings(quantile=0.95, sustained_s=30.0)
    covered = 0
    for _ in range(400):
        history = [LoadWindow(1000.0 - 10.0 * i, 10.0, int(rng.poisson(40.0))) for i in range(30)]
        seen = forecast(history, 1000.0, 60.0, settings)
        assert seen is not None
        covered += rng.poisson(4.0 * 30.0) / 30.0 <= combine([(1.0, seen)], 0.95)
    assert 0.91 <= covered / 400 <= 0.995


def test_variances_add_over_classes() -> None:
    part = RateForecast(4.0, 3.0, 4.0, 0.0, 1.0, 100.0)
    alone, sixteen = combine([(1.0, part)], 0.95), combine([(1.0, part)] * 16, 0.95)
    assert sixteen - 64.0 == pytest.approx(4 * (alone - 4.0))
    assert combine([(2.0, part)], 0.95) == pytest.approx(2 * alone)
    assert combine([], 0.95) == 0.0
    assert combine([(1.0, part)], 0.1) == pytest.approx(4.0)  # never below the mean


def test_classes_of_the_same_windows_do_not_change_each_other() -> None:
    """What hangs on the windows' times alone is remembered between classes: asked in any order each gives the same, to
    the last bit, and windows of other times are others."""
    rng = np.random.default_rng(3)
    series = [
        [LoadWindow(1000.0 - step_s * i, step_s, int(rng.poisson(20.0 + number))) for i in range(40)]
        for number, step_s in enumerate((5.0, 5.0, 5.1, 5.0))
    ]
    first = [forecast(windows, 1000.0, 300.0) for windows in series]
    for number in (3, 0, 2, 1, 0):
        forecast(series[number], 1003.0, 300.0)
        assert forecast(series[number], 1000.0, 300.0) == first[number]
    assert len({repr(seen) for seen in first}) == len(series)


@given(
    st.lists(st.tuples(st.floats(-10, 1100), st.floats(-1, 60), st.integers(-5, 5000)), max_size=20),
    st.floats(0, 1e4),
)
def test_any_history_gives_none_or_a_finite_rate(rows: list[tuple[float, float, int]], horizon_s: float) -> None:
    seen = forecast([LoadWindow(*row) for row in rows], 1000.0, horizon_s)
    if seen is not None:
        rate = combine([(1.0, seen)], 0.99)
        assert 0 <= seen.mean_rps <= rate < float("inf")
        assert seen.std_rps >= 0
