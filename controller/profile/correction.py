"""Online correction: how far live power is from what the profile says, and when that asks for another calibration.

For each kind of instance the ratio of measured to predicted energy is taken per window (loop/measured.py). A bias that
stands out of the windows' own scatter is corrected, within bounds; one beyond the bounds, or one that stays large, is
drift. Pure. What is applied goes through the core as an order, so it is part of the recorded inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log, sqrt
from statistics import fmean, stdev


@dataclass(frozen=True, slots=True)
class CorrectionSettings:
    windows: int = 12  # that are looked back on
    least_windows: int = 6
    # A bias must be larger than this, and than so many standard errors of the windows' mean: noise is not followed.
    # A mix of requests other than the calibrated one alone makes some per cent.
    deadband: float = 0.05
    standard_errors: float = 4.0
    # Windows of a minute are not independent: a stretch of load lasts longer. The error is taken for at least this.
    least_error: float = 0.005
    bound: float = 0.15  # most that is corrected
    drift: float = 0.10  # a bias beyond this asks for another calibration
    step: float = 0.01  # a factor is changed only by more than this: each change makes plans anew


@dataclass(frozen=True, slots=True)
class Bias:
    """Of one kind of instance. `factor` is what its powers are multiplied with, 1 for none."""

    factor: float
    measured: float  # ratio of measured to predicted power, unbounded
    error: float  # its standard error, relative
    windows: int
    drifted: bool


_DEFAULTS = CorrectionSettings()


def bias_of(ratios: Sequence[float], applied: float = 1.0, settings: CorrectionSettings = _DEFAULTS) -> Bias:
    """`ratios` of measured to predicted energy, oldest first; predictions are the uncorrected profile's. `applied` is
    the factor in force. With too few windows that stays."""
    logs = [log(ratio) for ratio in ratios[-settings.windows :] if 0 < ratio < inf]
    if len(logs) < settings.least_windows:
        return Bias(applied, exp(fmean(logs)) if logs else 1.0, inf, len(logs), False)
    mean = fmean(logs)
    error = max(settings.least_error, stdev(logs) / sqrt(len(logs)))
    measured = exp(mean)
    if abs(mean) < max(settings.deadband, settings.standard_errors * error):
        # Within the noise. What was corrected before stays until it is clear that it is not needed.
        wanted = applied if abs(mean - log(applied)) < settings.standard_errors * error else 1.0
        return Bias(wanted, measured, error, len(logs), False)
    wanted = min(1.0 + settings.bound, max(1.0 - settings.bound, measured))
    factor = wanted if abs(wanted - applied) > settings.step else applied
    return Bias(round(factor, 4), measured, error, len(logs), abs(measured - 1.0) > settings.drift)
