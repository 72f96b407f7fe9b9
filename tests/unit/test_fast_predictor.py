"""A predictor of output buckets in the fast twin: right as often as it says, and the same for every system."""

from __future__ import annotations

import numpy as np
import pytest

from controller.domain.classes import ALL_CLASSES, ClassScheme
from controller.fleet.port import RoutedInstance, RoutedPool
from simulator.fast.engines import FastEngines
from simulator.outcome import classes_of
from simulator.physics import Physics
from simulator.traces import generate

PHYSICS = Physics.load()
TRACE = generate("conv", 600.0, 40.0, seed=4)
TRUE = np.bincount(classes_of(TRACE, ClassScheme()), minlength=len(ALL_CLASSES))


def ran(accuracy: float | None, instances: int = 8, seed: int = 1) -> FastEngines:
    """The trace served by one pool."""
    engines = FastEngines(PHYSICS, TRACE, accuracy=accuracy, seed=seed)
    rows = {f"i{number}": engines.start(8, 1980) for number in range(instances)}
    for row in rows.values():
        engines.ready(row)
    members = tuple(RoutedInstance(name, "", 8, 1000, 1.0, accepts_new=True) for name in rows)
    engines.route([RoutedPool("all", "", frozenset(ALL_CLASSES), members)], rows)
    engines.finish()
    return engines


def arrivals(accuracy: float | None, instances: int = 8, seed: int = 1) -> list[int]:
    """Requests by the class that load reports count them under."""
    counters = ran(accuracy, instances, seed).counters()
    return [counters[c].arrived for c in ALL_CLASSES]


def test_a_perfect_predictor_reports_the_true_classes():
    assert arrivals(1.0) == TRUE.tolist()


@pytest.mark.parametrize("accuracy", [0.6, 0.8, 0.9])
def test_it_is_right_as_often_as_it_says(accuracy):
    told = np.array(arrivals(accuracy)).reshape(3, 3)
    for row, true in zip(told, TRUE.reshape(3, 3), strict=True):
        # Wrong guesses are spread evenly over the two other buckets.
        expected = accuracy * true + (1 - accuracy) / 2 * (true.sum() - true)
        assert row.sum() == true.sum()  # the input bucket is exact
        np.testing.assert_allclose(row, expected, atol=4 * true.sum() ** 0.5)


def test_it_says_the_same_whatever_the_fleet_is_and_something_else_for_another_seed():
    assert arrivals(0.7, instances=6) == arrivals(0.7, instances=12)
    assert arrivals(0.7, seed=1) != arrivals(0.7, seed=2)


def test_without_a_predictor_experience_is_reported():
    assert sum(arrivals(None)) == len(TRACE)
    assert arrivals(None) != TRUE.tolist()


def test_wrong_guesses_are_counted_and_those_among_them_that_were_too_short():
    perfect, often, never = (ran(accuracy) for accuracy in (1.0, 0.7, None))
    assert (perfect.mispredicted, perfect.outgrown) == (0, 0)
    assert often.mispredicted == pytest.approx(0.3 * len(TRACE), rel=0.1)
    # Wrong by one bucket or two alike: whose truth is S is never too short, M in one of two, L always.
    assert often.outgrown == pytest.approx(0.3 * (TRUE[1::3].sum() / 2 + TRUE[2::3].sum()), rel=0.15)
    # By experience the 80 % quantile of a bucket's outputs is taken: seldom too short.
    assert 0 < never.outgrown < 0.2 * len(TRACE) < never.mispredicted
