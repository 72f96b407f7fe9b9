"""Samples that come late: how old they are taken for, whatever the agent's clock says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.fleet.arrival import Arrivals

APART_S = 1.7e9  # the agent's wall clock less the controller's monotonic one


def ages(arrivals: Arrivals, samples: list[tuple[float, float]]) -> list[float]:
    """Of samples as (when it came, what the agent's clock said)."""
    return [round(came_s - arrivals.taken_s(came_s, said_s), 2) for came_s, said_s in samples]


def prompt(first: int, last: int) -> list[tuple[float, float]]:
    return [(float(n), n + APART_S) for n in range(first, last)]


def test_what_comes_in_time_is_as_old_as_its_way_differs_from_the_shortest() -> None:
    assert ages(Arrivals(30.0), [(0.2, APART_S), (1.0, 1 + APART_S), (2.1, 2 + APART_S)]) == [0.0, 0.0, 0.1]


def test_a_backlog_is_old_until_it_is_read() -> None:
    held = [(20.0, n + APART_S) for n in range(10, 20)]  # all at once, ten seconds' worth
    found = ages(arrivals := Arrivals(30.0), prompt(0, 10) + held)
    assert found[:10] == [0.0] * 10
    assert [round(age) for age in found[10:]] == list(range(10, 0, -1))
    assert ages(arrivals, prompt(20, 22)) == [0.0, 0.0]


def test_a_reader_that_is_behind_for_good_sees_how_far() -> None:
    found = ages(Arrivals(30.0), prompt(0, 10) + [(n + 8.0, n + APART_S) for n in range(10, 300)])
    assert [round(age) for age in found[10:]] == [8] * 290


def test_there_is_a_node_however_late_its_samples_come() -> None:
    assert ages(Arrivals(30.0), [*prompt(0, 10), (500.0, 10 + APART_S)])[-1] == 30.0


def test_a_clock_that_is_set_makes_nothing_old() -> None:
    for step_s in (-3600.0, -1.5, 3600.0):
        after = [(came_s, said_s + step_s) for came_s, said_s in prompt(10, 15)]
        back = prompt(15, 20)
        assert max(ages(Arrivals(30.0), prompt(0, 10) + after + back)) == 0.0
    assert max(ages(Arrivals(30.0), prompt(0, 10) + [(n + 0.0, n - 0.3 + APART_S) for n in range(10, 400)])) == 0.3


def test_clocks_that_drift_make_nothing_old() -> None:
    for drift in (-5e-4, 5e-4):
        assert max(ages(Arrivals(30.0), [(float(n), n * (1 + drift) + APART_S) for n in range(20_000)])) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e6, 1e6)), min_size=1))
def test_no_sample_is_from_the_future_or_older_than_the_most(samples: list[tuple[float, float]]) -> None:
    arrivals = Arrivals(30.0)
    for came_s, said_s in sorted(samples):
        assert came_s - 30.0 - 1e-6 <= arrivals.taken_s(came_s, said_s) <= came_s + 1e-6
