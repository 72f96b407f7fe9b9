"""All curves of a profile as padded arrays, for choices that are made for a whole fleet at once.

Made once per fit, on first use. Values and order of the arithmetic are those of the scalar readers in profile/fit.py,
so both give the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from controller.profile.fit import Curve

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CurveArrays:
    """`rows[group, tp]` is a kind of instance; second axis its clocks, ascending; third the points of each curve.

    What a kind does not have is NaN (clocks: -1, points: 0): it compares false with everything.
    """

    rows: Mapping[tuple[str, int], int]
    clocks: Ints  # [kind]: at how many it was measured
    mhz: Ints  # [kind, clock]
    points: Ints  # [kind, clock]
    max_rate_rps: Floats  # [kind, clock]
    last_rps: Floats  # [kind, clock]: end of the measured range
    last_running: Floats  # [kind, clock]
    rates_rps: Floats  # [kind, clock, point]
    powers_w: Floats
    runnings: Floats


def curve_arrays(by_instance: Mapping[tuple[str, int], Sequence[Curve]]) -> CurveArrays:
    """Kinds without any curve are left out: nothing is known of them."""
    kinds = [(key, curves) for key, curves in sorted(by_instance.items()) if curves]
    most_clocks = max((len(curves) for _, curves in kinds), default=0)
    most_points = max((len(curve.rates_rps) for _, curves in kinds for curve in curves), default=0)
    flat, deep = (len(kinds), most_clocks), (len(kinds), most_clocks, most_points)
    arrays = CurveArrays(
        rows={key: k for k, (key, _) in enumerate(kinds)},
        clocks=np.array([len(curves) for _, curves in kinds], dtype=np.int64),
        mhz=np.full(flat, -1, dtype=np.int64),
        points=np.zeros(flat, dtype=np.int64),
        max_rate_rps=np.full(flat, np.nan),
        last_rps=np.full(flat, np.nan),
        last_running=np.full(flat, np.nan),
        rates_rps=np.full(deep, np.nan),
        powers_w=np.full(deep, np.nan),
        runnings=np.full(deep, np.nan),
    )
    for k, (_, curves) in enumerate(kinds):
        for c, curve in enumerate(curves):
            n = len(curve.rates_rps)
            arrays.mhz[k, c], arrays.points[k, c], arrays.max_rate_rps[k, c] = curve.mhz, n, curve.max_rate_rps
            arrays.last_rps[k, c], arrays.last_running[k, c] = curve.rates_rps[-1], curve.runnings[-1]
            arrays.rates_rps[k, c, :n] = curve.rates_rps
            arrays.powers_w[k, c, :n] = curve.powers_w
            arrays.runnings[k, c, :n] = curve.runnings
    return arrays


def interpolate(xs: Floats, ys: Floats, points: Ints, x: Floats) -> Floats:
    """Along the last axis of `xs` and `ys`, of which the first `points` hold values; one `x` for each of the others.
    NaN outside the measured range. On a flat stretch of `xs` the last point holds."""
    after = (xs <= x[..., None]).sum(axis=-1)  # as bisect_right does; padding never counts
    high = np.minimum(after, points - 1)
    low = np.maximum(after - 1, 0)
    x0, y0, x1, y1 = (
        np.take_along_axis(values, i[..., None], axis=-1)[..., 0]
        for values, i in ((xs, low), (ys, low), (xs, high), (ys, high))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        found = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    found = np.where(after == points, np.where(x == x1, y1, np.nan), found)
    return np.where(after == 0, np.nan, found)
