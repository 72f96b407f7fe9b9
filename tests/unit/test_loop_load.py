"""The load book: cumulative counters become windows; gaps, restarts and late reports never invent or lose load."""

from __future__ import annotations

import pytest

from controller.domain.classes import RequestClass
from controller.fleet.port import ClassCounters, LoadObservation, QueueObservation
from controller.loop.load import LoadBook

SM = RequestClass.parse("SM")
LL = RequestClass.parse("LL")


def report(at_s: float, arrived: int, *, gateway: str = "g", epoch: str = "1", waiting: int = 0) -> LoadObservation:
    counters = ClassCounters(arrived=arrived, completed=arrived, input_tokens=100 * arrived, output_tokens=10 * arrived)
    queues = {"all": QueueObservation(waiting, 0, 0.0)}
    return LoadObservation(gateway, epoch, at_s, "m", {SM: counters}, queues)


def test_rate_is_the_difference_of_cumulative_counters() -> None:
    book = LoadBook(keep_s=100)
    book.add(report(10, 1000))
    book.add(report(12, 1006))
    assert book.rates_rps(12, 10) == {SM: pytest.approx(3.0)}
    assert book.mean_tokens(12, 10) == {SM: (100.0, 10.0)}


def test_a_lost_report_loses_no_load() -> None:
    book = LoadBook(keep_s=100)
    book.add(report(0, 0))
    book.add(report(5, 50))  # those of seconds 1 to 4 never came
    assert book.rates_rps(5, 10) == {SM: pytest.approx(10.0)}


def test_nothing_reported_is_unknown_and_zero_reported_is_zero() -> None:
    book = LoadBook(keep_s=100)
    assert book.rates_rps(5, 10) is None
    book.add(report(0, 7))
    assert book.rates_rps(1, 10) is None, "one report is a base, not a window"
    book.add(report(1, 7))
    assert book.rates_rps(1, 10) == {}
    assert book.rates_rps(60, 10) is None, "an old window says nothing about now"


def test_a_restarted_gateway_starts_a_new_base() -> None:
    book = LoadBook(keep_s=100)
    book.add(report(0, 500))
    book.add(report(1, 3, epoch="2"))
    assert book.rates_rps(1, 10) is None
    book.add(report(2, 5, epoch="2"))
    assert book.rates_rps(2, 10) == {SM: pytest.approx(2.0)}


def test_an_overtaken_report_is_ignored() -> None:
    book = LoadBook(keep_s=100)
    book.add(report(0, 0))
    book.add(report(3, 30))
    assert book.add(report(2, 20)) is None
    assert book.rates_rps(3, 10) == {SM: pytest.approx(10.0)}


def test_gateways_add_up() -> None:
    book = LoadBook(keep_s=100)
    for gateway, rate in (("a", 2), ("b", 3)):
        book.add(report(0, 0, gateway=gateway, waiting=1))
        book.add(report(2, 2 * rate, gateway=gateway, waiting=rate))
    assert book.rates_rps(2, 10) == {SM: pytest.approx(5.0)}
    assert book.queues()["all"].waiting == 5


def test_windows_are_bounded() -> None:
    book = LoadBook(keep_s=10)
    for second in range(200):
        book.add(report(second, second))
    assert len(book.windows) <= 11
