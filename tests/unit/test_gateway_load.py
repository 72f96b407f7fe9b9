"""What the gateway reports: cumulative, complete, judged by the SLO of the true class; and whose tables it believes."""

from __future__ import annotations

import pytest

from common.clock import VirtualClock
from controller.api.wire import loads_from_wire
from controller.domain.classes import ALL_CLASSES, RequestClass, by_input
from controller.domain.slo import Slo
from controller.fleet.port import QueueObservation, RoutedInstance, RoutedPool, RoutingTable
from controller.gateway.client import ControllerClient, supersedes
from controller.gateway.load import Histogram, LoadMeter

SS, ML, LL = (RequestClass.parse(name) for name in ("SS", "ML", "LL"))


def test_histogram_counts_values_up_to_each_bound() -> None:
    histogram = Histogram((0.1, 0.2, 0.5))
    for value in (0.05, 0.1, 0.15, 0.5, 9.0):
        histogram.add(value)
    assert histogram.cumulative() == [2, 3, 4, 5]
    assert histogram.sum == pytest.approx(9.8)


@pytest.mark.parametrize(
    ("name", "ttft_s", "gaps_s", "in_slo"),
    [
        ("SS", 0.25, [0.1, 0.1], 1),
        ("SS", 0.26, [], 0),
        ("SS", 0.1, [], 1),  # one token has no gaps
        ("SS", 0.1, [0.19, 0.02], 0),
        ("SS", 0.1, [0.15, 0.02], 1),  # the mean counts, not the single gap
        ("ML", 0.4, [0.05], 1),
        ("LL", 1.99, [0.05], 1),
        ("LL", 2.01, [0.05], 0),
    ],
)
def test_a_streamed_answer_is_judged_by_its_own_class(
    name: str, ttft_s: float, gaps_s: list[float], in_slo: int
) -> None:
    meter = LoadMeter(Slo())
    meter.completed("m", RequestClass.parse(name), 1 + len(gaps_s), ttft_s, gaps_s)
    got = meter.meter("m", RequestClass.parse(name))
    assert (got.completed, got.in_slo, got.output_tokens) == (1, in_slo, 1 + len(gaps_s))
    assert got.ttft_s.cumulative()[-1] == 1
    assert got.gap_s.cumulative()[-1] == len(gaps_s)


def test_an_answer_that_speaks_for_others_counts_as_often() -> None:
    one, several = LoadMeter(), LoadMeter()
    for _ in range(3):
        one.completed("m", SS, 3, 0.1, [0.02, 0.04])
        one.completed_whole("m", SS, 10, 1.0)
    several.completed("m", SS, 3, 0.1, [0.02, 0.04], times=3)
    several.completed_whole("m", SS, 10, 1.0, times=3)
    assert several.meter("m", SS).counters() == one.meter("m", SS).counters()
    assert several.meter("m", SS).gap_s.cumulative() == one.meter("m", SS).gap_s.cumulative()
    assert several.meter("m", SS).ttft_s.sum == pytest.approx(one.meter("m", SS).ttft_s.sum)


@pytest.mark.parametrize(("total_s", "in_slo"), [(1.15, 1), (1.16, 0)])
def test_a_whole_answer_is_judged_by_the_sum_of_its_bounds(total_s: float, in_slo: int) -> None:
    meter = LoadMeter(Slo())
    meter.completed_whole("m", SS, 10, total_s)  # 0.25 s and nine gaps of 0.1 s
    assert meter.meter("m", SS).in_slo == in_slo
    assert meter.meter("m", SS).ttft_s.cumulative()[-1] == 0


def test_an_observation_names_every_class_so_that_none_means_zero() -> None:
    meter = LoadMeter()
    meter.arrived("m", ML, 500)
    meter.failed("m", LL)
    meter.arrived("other", ML, 5)
    queues = {"all": QueueObservation(1, 2, 0.5)}
    got = meter.observation("g", "e", 7.0, "m", queues)
    assert set(got.classes) == set(ALL_CLASSES)
    assert got.classes[ML].arrived == 1
    assert got.classes[ML].input_tokens == 500
    assert got.classes[LL].failed == 1
    assert got.classes[SS].arrived == 0
    assert (got.observed_at_s, got.epoch, got.queues) == (7.0, "e", queues)


async def test_the_report_on_the_wire_says_the_same() -> None:
    meter = LoadMeter()
    meter.arrived("m", ML, 500)
    meter.completed("m", ML, 3, 0.3, [0.02, 0.04])
    client = ControllerClient(
        "127.0.0.1:1",
        "g",
        "epoch",
        VirtualClock(5.0),
        1.0,
        meter,
        lambda table: None,
        lambda: ["m"],
        lambda now_s: {"all": QueueObservation(4, 2, now_s)},
        lambda instances, now_s: None,
    )
    report = client.report()
    (observation,) = loads_from_wire(report, observed_at_s=5.0)
    assert observation == meter.observation("g", "epoch", 5.0, "m", {"all": QueueObservation(4, 2, 5.0)})
    (load,) = [item for item in report.classes if item.request_class == "ML"]
    assert list(load.token_gap_seconds.counts)[-1] == 2
    assert load.ttft_seconds.sum == pytest.approx(0.3)
    assert len(load.ttft_seconds.counts) == len(load.ttft_seconds.bounds) + 1


def table(term: int, version: int, instances: int) -> RoutingTable:
    group = by_input("all", "SML")
    listed = tuple(RoutedInstance(f"i{n}", "http://x:1", 4, 8, 1.0, True) for n in range(instances))
    return RoutingTable(term, version, (RoutedPool("all", "m", group.classes, listed),))


@pytest.mark.parametrize(
    ("new", "old", "taken"),
    [
        ((1, 1, 0), None, True),
        ((1, 2, 3), (1, 1, 3), True),
        ((1, 2, 0), (1, 1, 3), True),  # within a term an empty table is an order
        ((1, 1, 3), (1, 2, 3), False),  # overtaken
        ((2, 1, 3), (1, 9, 3), True),
        ((2, 1, 0), (1, 9, 3), False),  # a new controller that has not seen its nodes yet
        ((2, 5, 1), (1, 9, 3), True),
        ((1, 9, 3), (2, 1, 3), False),  # a controller that has been replaced
    ],
)
def test_which_table_is_believed(new: tuple[int, int, int], old: tuple[int, int, int] | None, taken: bool) -> None:
    assert supersedes(table(*new), table(*old) if old else None) is taken
