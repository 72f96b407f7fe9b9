"""The shape of a week: mean arrival rates of every half hour, and how much more than now they expect soon.

Half hours are of the week in UTC, numbered from that of the epoch. Newer weeks weigh more. What was never seen is
unknown, not zero. The forecast (policy/forecast.py) gives the height; this gives the shape, and only ever adds to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import floor, sqrt

from controller.domain.classes import RequestClass
from controller.policy.forecast import RateForecast

SLOT_S = 1800.0
SLOTS = 336  # a week of them
LEAST_COVERED = 0.5  # share of a span that must have been reported, for a rate to be known
NEWEST_WEIGHT = 0.3  # of a week, once as many were seen as make that less than an even mean
RATIO_BOUNDS = (0.5, 3.0)
_LOOKS = 5  # into the horizon


@dataclass(frozen=True, slots=True)
class SlotMean:
    """One half hour of the week: in how many weeks it was seen, and its mean rates; a class without one had none."""

    weeks: int
    rates_rps: Mapping[RequestClass, float]


def slot_of(wall_s: float) -> int:
    """Number of the half hour since the epoch; modulo `SLOTS` it is that of the week."""
    return floor(wall_s / SLOT_S)


def known_rates(
    counted: Iterable[tuple[float, Mapping[RequestClass, int]]], span_s: float
) -> dict[RequestClass, float] | None:
    """Rates over a span from each gateway's (seconds reported, arrivals): they add. None where any gateway, or all,
    reported too little of it."""
    rates: dict[RequestClass, float] = {}
    known = False
    for seconds, arrived in counted:
        if seconds < LEAST_COVERED * span_s:
            return None
        known = True
        for request_class, count in arrived.items():
            rates[request_class] = rates.get(request_class, 0.0) + count / seconds
    return rates if known else None


def learn(past: SlotMean | None, rates_rps: Mapping[RequestClass, float]) -> SlotMean:
    """A slot after one more week of it."""
    if past is None:
        return SlotMean(1, {c: round(rate, 6) for c, rate in sorted(rates_rps.items()) if rate > 0})
    share = max(NEWEST_WEIGHT, 1 / (past.weeks + 1))
    means = {
        c: round((1 - share) * past.rates_rps.get(c, 0.0) + share * rates_rps.get(c, 0.0), 6)
        for c in sorted(past.rates_rps.keys() | rates_rps.keys())
    }
    return SlotMean(past.weeks + 1, {c: rate for c, rate in means.items() if rate > 0})


def expected_ratio(
    slots: Mapping[int, SlotMean], request_class: RequestClass, wall_s: float, horizon_s: float
) -> float | None:
    """The template's mean rate over the horizon's second half, as the forecast's is, over its rate now; None where a
    slot of either is unknown or nothing arrives now. A rise counts beyond its own noise only."""
    now = _rate_at(slots, request_class, wall_s)
    looks = [
        _rate_at(slots, request_class, wall_s + horizon_s * (0.5 + 0.5 * look / (_LOOKS - 1))) for look in range(_LOOKS)
    ]
    known = [look for look in looks if look is not None]
    if now is None or len(known) < _LOOKS or now[0] <= 0:
        return None
    ratio = sum(rate for rate, _ in known) / _LOOKS / now[0]
    if ratio > 1:
        # The relative variance of a count is one over it; two places on one line share what its ends are off by.
        counts = (now[0] * now[1], ratio * now[0] * min(seen_s for _, seen_s in known))
        apart = min(1.0, 0.75 * horizon_s / SLOT_S)
        ratio = max(1.0, ratio * (1 - apart * sqrt(sum(1 / count for count in counts))))
    return min(max(ratio, RATIO_BOUNDS[0]), RATIO_BOUNDS[1])


def _rate_at(slots: Mapping[int, SlotMean], request_class: RequestClass, wall_s: float) -> tuple[float, float] | None:
    """Between the middles of two slots, on the line that joins them; and the seconds of load that it rests on."""
    place = wall_s / SLOT_S - 0.5
    before = floor(place)
    share = place - before
    first, second = slots.get(before % SLOTS), slots.get((before + 1) % SLOTS)
    if first is None or second is None:
        return None
    rate = (1 - share) * first.rates_rps.get(request_class, 0.0) + share * second.rates_rps.get(request_class, 0.0)
    return rate, SLOT_S * min(first.weeks, second.weeks, 1 / NEWEST_WEIGHT)


def raised(part: RateForecast, ratio: float | None) -> RateForecast:
    """The forecast with the shape of the week on its level, where that is more. Capacity comes early and leaves late: a
    fall is believed when it is seen."""
    mean_rps = part.level_rps * ratio if ratio is not None else 0.0
    if mean_rps <= part.mean_rps:
        return part
    # Counts vary with their mean; a mean of zero tells nothing of that.
    wider = sqrt(mean_rps / part.mean_rps) if part.mean_rps > 0 else 1.0
    return replace(part, mean_rps=mean_rps, std_rps=part.std_rps * wider)
