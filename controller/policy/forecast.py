"""Forecast of a class's arrival rate from counted windows, and the rate to provision for.

The managers call `forecast` per class on the windows they kept, then `combine` per pool: variances add over classes,
so a pool is provisioned for the quantile of its sum and not for the sum of quantiles. A gap between windows is
unknown load, not zero load; no usable window at all gives None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import copysign, inf, sqrt
from operator import mul, truediv
from typing import NamedTuple

from scipy.special import ndtri

LEAST_WINDOW_S = 1e-3  # a shorter one is a clock's artefact


class LoadWindow(NamedTuple):
    """`arrived` requests in the `seconds` that ended at `end_s` (monotonic)."""

    end_s: float
    seconds: float
    arrived: int


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    half_life_s: float = 300.0  # of the long memory
    short_memory: float = 0.1  # of the long one's half-life
    quantile: float = 0.95  # of the sustained rate that is provisioned for
    sustained_s: float = 30.0  # a peak shorter than this is left to the head-room in the profile's knee
    # The trend may move the level by at most this share of it for each minute ahead, and at most by the second in all.
    trend_ratio_per_min: float = 0.0625
    max_trend_ratio: float = 0.5
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

    A line is fitted through the windows' rates, newer ones weighing more: its value now is the level, its slope the
    trend. The mean is that of the horizon's second half when the trend rises, and the level when it falls. This is
    done with a long memory, which is steady, and with a short one, which sees a turn soon; the higher mean holds:
    capacity comes early and leaves late. The deviation holds the arrivals' own noise and that of the estimate.
    """
    settings = settings or ForecastSettings()
    usable = [
        (end_s, seconds, arrived)
        for end_s, seconds, arrived in windows
        # What is not finite fails one of these.
        if LEAST_WINDOW_S <= seconds < inf and 0 <= arrived < inf and 0 <= now_s - end_s <= settings.max_age_s
    ]
    if not usable:
        return None
    ends, lengths, counts = zip(*usable, strict=True)
    rates = list(map(truediv, counts, lengths))
    observed = sum(lengths)
    memories = (settings.half_life_s, settings.half_life_s * settings.short_memory)
    lines = [_fit_line(_weighed(ends, lengths, now_s, half_life_s), rates) for half_life_s in memories]
    seen = [_ahead(line, horizon_s, observed, settings) for line in lines]
    return max(seen, key=lambda ahead: (round(ahead.mean_rps, 9), -ahead.std_rps))  # of equal ones the steadier


def _ahead(line: _Line, horizon_s: float, observed_s: float, settings: ForecastSettings) -> RateForecast:
    level = max(0.0, line.rate_now)
    # Far ahead a line is a guess: the trend moves the level by a bounded share of it.
    bound = level * min(settings.max_trend_ratio, settings.trend_ratio_per_min * horizon_s / 60)
    ahead = max(-bound, min(bound, line.trend * horizon_s))
    mean = level + max(0.0, 0.75 * ahead)
    # No arrival seen is no proof of none to come: a rate below one per observed span cannot be told from zero.
    noise = line.dispersion * max(mean, 1.0 / observed_s)
    sustained_s = max(1.0, min(settings.sustained_s, horizon_s))
    variance = noise / sustained_s + noise / line.effective_s
    return RateForecast(mean, sqrt(variance), level, line.trend, line.dispersion, observed_s)


class _Line(NamedTuple):
    rate_now: float
    trend: float  # per second, the part beyond its own noise
    dispersion: float
    effective_s: float  # seconds of even observation that would know the mean as well


class _Weighed(NamedTuple):
    """All of a fit that hangs on when the windows were and not on what they counted, one item per window in lists."""

    seconds: tuple[float, ...]
    weights: list[float]
    total: float  # of the weights
    mean_age: float
    effective_s: float
    spread: float
    lags: list[float]  # age beyond the mean age
    pulls: list[float]  # weight x lag
    pulls_squared: list[float]
    stretched: list[float]  # weight x seconds


@lru_cache(maxsize=8)
def _weighed(ends_s: tuple[float, ...], seconds: tuple[float, ...], now_s: float, half_life_s: float) -> _Weighed:
    """A window weighs its seconds, halved every `half_life_s` of age. Remembered, since all classes of a gateway are
    counted in the same windows and asked for one after the other."""
    ages = [now_s - end_s + length_s / 2 for end_s, length_s in zip(ends_s, seconds, strict=True)]
    weights = [length_s * 0.5 ** (age / half_life_s) for length_s, age in zip(seconds, ages, strict=True)]
    total = sum(weights)
    mean_age = sum(map(mul, weights, ages)) / total
    lags = [age - mean_age for age in ages]
    pulls = list(map(mul, weights, lags))
    return _Weighed(
        seconds,
        weights,
        total,
        mean_age,
        effective_s=total * total / sum(k * k / length_s for k, length_s in zip(weights, seconds, strict=True)),
        spread=sum(k * lag**2 for k, lag in zip(weights, lags, strict=True)),
        lags=lags,
        pulls=pulls,
        pulls_squared=[pull**2 for pull in pulls],
        stretched=list(map(mul, weights, seconds)),
    )


def _fit_line(weighed: _Weighed, rates: Sequence[float]) -> _Line:
    """Least squares through the windows' rates."""
    total, spread, count = weighed.total, weighed.spread, len(rates)
    mean_rate = sum(map(mul, weighed.weights, rates)) / total
    if count < 3 or spread <= 0 or mean_rate <= 0:
        return _Line(mean_rate, 0.0, 1.0, weighed.effective_s)
    above = [rate - mean_rate for rate in rates]
    slope = -sum(map(mul, weighed.pulls, above)) / spread
    # Variance over mean of counts around the line; at least 1 (Poisson), since few windows show too little of it.
    off_line = [(beyond + slope * lag) ** 2 for beyond, lag in zip(above, weighed.lags, strict=True)]
    squares = sum(map(mul, weighed.stretched, off_line))
    dispersion = max(1.0, squares / (total * mean_rate) * count / (count - 2))
    # Var(rate of a window) = dispersion * rate / seconds, carried through the sum that makes the slope.
    noise = [pull * dispersion * mean_rate for pull in weighed.pulls_squared]
    slope_variance = sum(map(truediv, noise, weighed.seconds))
    trend = copysign(max(0.0, abs(slope) - sqrt(slope_variance) / spread), slope)
    return _Line(mean_rate + trend * weighed.mean_age, trend, dispersion, weighed.effective_s)


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
