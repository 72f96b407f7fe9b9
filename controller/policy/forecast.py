"""Forecast of a class's arrival rate from counted windows, and the rate to provision for.

The managers call `forecast` per class on the windows they kept, then `combine` per pool: variances add over classes,
so a pool is provisioned for the quantile of its sum and not for the sum of quantiles. A gap between windows is
unknown load, not zero load; no usable window at all gives None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

from scipy.special import ndtri


@dataclass(frozen=True, slots=True)
class LoadWindow:
    """`count` arrivals in the `seconds` that ended at `end_s` (monotonic)."""

    end_s: float
    seconds: float
    count: int


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    half_life_s: float = 120.0  # of the level's memory
    quantile: float = 0.95  # of the sustained rate that is provisioned for
    sustained_s: float = 30.0  # a peak shorter than this is left to the head-room in the profile's knee
    max_trend_ratio: float = 0.5  # the trend may move the level by at most this share of it over the horizon
    max_age_s: float = 900.0  # older windows say nothing


@dataclass(frozen=True, slots=True)
class RateForecast:
    """Requests/s over the next horizon: mean, and standard deviation of the sustained rate."""

    mean_rps: float
    std_rps: float
    level_rps: float
    trend_rps_per_s: float
    dispersion: float  # variance over mean of counts; 1 for Poisson arrivals
    observed_s: float  # seconds of load that it rests on


def forecast(
    windows: Sequence[LoadWindow], now_s: float, horizon_s: float, settings: ForecastSettings | None = None
) -> RateForecast | None:
    """The rate over the next `horizon_s`; None when no usable window exists (unknown is not zero).

    Weighted least squares of a line through the windows' rates, weights halving with age: its value now is the
    level, its slope the trend. A horizon is provisioned by the mean of its worse half when the trend rises and by
    the level when it falls: capacity must be there early and leaves late.
    """
    settings = settings or ForecastSettings()
    usable = [w for w in windows if _usable(w, now_s, settings)]
    if not usable:
        return None
    weights = [w.seconds * 0.5 ** (_age_s(w, now_s) / settings.half_life_s) for w in usable]
    rates = [w.count / w.seconds for w in usable]
    total = sum(weights)
    mean_rate = sum(k * r for k, r in zip(weights, rates, strict=True)) / total
    mean_age = sum(k * _age_s(w, now_s) for k, w in zip(weights, usable, strict=True)) / total
    spread = sum(k * (_age_s(w, now_s) - mean_age) ** 2 for k, w in zip(weights, usable, strict=True))
    dispersion = _dispersion(usable, rates, weights, mean_rate)
    slope, slope_std = 0.0, 0.0
    if len(usable) >= 3 and spread > 0:
        slope = (
            -sum(
                k * (_age_s(w, now_s) - mean_age) * (r - mean_rate)
                for k, w, r in zip(weights, usable, rates, strict=True)
            )
            / spread
        )
        # Var(count / seconds) = dispersion * rate / seconds, and a weight is seconds times its fading.
        noise = sum(
            (k * (_age_s(w, now_s) - mean_age)) ** 2 * dispersion * mean_rate / w.seconds
            for k, w in zip(weights, usable, strict=True)
        )
        slope_std = sqrt(noise) / spread
    # A slope within its own noise is no trend: only the part beyond one standard deviation is believed.
    trend = max(0.0, abs(slope) - slope_std) * (1.0 if slope > 0 else -1.0)
    level = max(0.0, mean_rate + trend * mean_age)
    bound = settings.max_trend_ratio * level
    ahead = max(-bound, min(bound, trend * horizon_s))
    mean = max(0.0, level + (0.75 * ahead if ahead > 0 else 0.0))
    observed = sum(w.seconds for w in usable)
    effective = total * total / sum(k * k / w.seconds for k, w in zip(weights, usable, strict=True))
    # No arrival seen is not proof of none to come: a rate below one per observed span cannot be told from it.
    least = max(mean, 1.0 / observed)
    variance = dispersion * least * (1.0 / min(settings.sustained_s, horizon_s) + 1.0 / effective)
    return RateForecast(mean, sqrt(variance), level, trend, dispersion, observed)


def combine(parts: Iterable[tuple[float, RateForecast]], quantile: float) -> float:
    """The rate at `quantile` of a weighted sum of independent forecasts, e.g. equivalent requests/s of a pool.

    `parts` are (weight, forecast); weights are `Profile.request_weight`. Never below the mean.
    """
    mean = variance = 0.0
    for weight, part in parts:
        mean += weight * part.mean_rps
        variance += (weight * part.std_rps) ** 2
    z = float(ndtri(min(max(quantile, 0.5), 0.9999)))
    return mean + z * sqrt(variance)


def _usable(window: LoadWindow, now_s: float, settings: ForecastSettings) -> bool:
    numbers = (window.end_s, window.seconds, float(window.count))
    return (
        all(isfinite(number) for number in numbers)
        and window.seconds > 0
        and window.count >= 0
        and 0 <= now_s - window.end_s <= settings.max_age_s
    )


def _age_s(window: LoadWindow, now_s: float) -> float:
    """Age of the window's middle."""
    return now_s - window.end_s + window.seconds / 2


def _dispersion(
    windows: Sequence[LoadWindow], rates: Sequence[float], weights: Sequence[float], mean_rate: float
) -> float:
    """Variance over mean of counts around the mean rate; at least 1 (Poisson), since few windows show too little."""
    if len(windows) < 3 or mean_rate <= 0:
        return 1.0
    total = sum(weights)
    squares = sum(k * w.seconds * (r - mean_rate) ** 2 for k, w, r in zip(weights, windows, rates, strict=True))
    return max(1.0, squares / (total * mean_rate) * len(windows) / (len(windows) - 1))
