"""Is a better layout worth switching to? The one place where plans are held back.

Takes the MILP's answer and the present layout, both priced on the same curves; a change is accepted when capacity
needs it, or when the lower bound of its saving over the horizon exceeds the upper bound of its switching cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controller.domain.reasons import Reason
from controller.profile.fit import ProfileFit

Counts = Mapping[tuple[str, int], int]


@dataclass(frozen=True, slots=True)
class LayoutPrice:
    """What a layout draws and carries under a demand, every instance at its best clock."""

    power_w: float  # with parked GPUs
    carries: bool
    load_ratio: float  # worst pool: demand over capacity; infinity when a pool with demand has no capacity


@dataclass(frozen=True, slots=True)
class StabiliseSettings:
    saving_confidence: float = 0.7  # share of the predicted saving that is counted on
    cost_factor: float = 1.3  # on the measured switching energy
    dwell_s: float = 60.0  # least time between two changes that only save energy


@dataclass(frozen=True, slots=True)
class Verdict:
    accept: bool
    reason: Reason
    sentence: str
    saving_low_j: float
    cost_high_j: float


def price(fit: ProfileFit, counts: Counts, demand_rps: Mapping[str, float], gpus: int) -> LayoutPrice:
    """Prices `counts` of instances by (pool, tp) under a demand in equivalent requests/s by pool.

    `demand_rps` is by the pools of this layout's own partition, so two partitions are priced each with its own.
    """
    raise NotImplementedError


def judge(
    present: LayoutPrice,
    candidate: LayoutPrice,
    started: Mapping[int, int],
    start_j: Mapping[int, float],
    horizon_s: float,
    since_change_s: float | None,
    pending: bool,
    settings: StabiliseSettings | None = None,
) -> Verdict:
    """Accepts or rejects a switch from `present` to `candidate`.

    `started` counts the instances by tp that would have to be started; `since_change_s` is None before any change;
    `pending` is True while a transition is under way.
    """
    raise NotImplementedError
