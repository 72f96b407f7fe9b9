"""The load book: cumulative counters become windows; gaps, restarts and late reports never invent or lose load."""

from __future__ import annotations

import random

import pytest

from controller.domain.classes import RequestClass
from controller.fleet.port import ClassCounters, LoadObservation, QueueObservation
from controller.loop.load import SPAN_S, ClassWindow, LoadBook, LoadWindow

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


@pytest.mark.parametrize("seed", range(5))
def test_mean_tokens_are_those_of_the_windows_whatever_was_asked_before(seed: int) -> None:
    """The book keeps running sums; here everything is added up anew. Reports are lost, gateways restart, and windows
    come from elsewhere, as in a replay."""
    draw = random.Random(seed)
    book = LoadBook(keep_s=60.0)
    total = {"a": 0, "b": 0}
    epoch = "1"
    for second in range(200):
        if draw.random() < 0.05:
            epoch, total = f"{second}", {"a": 0, "b": 0}
        for gateway in total:
            total[gateway] += draw.randrange(3)
            if draw.random() < 0.7:
                book.add(report(float(second), total[gateway], gateway=gateway, epoch=epoch))
        if draw.random() < 0.05:
            counts = ClassWindow(2, 1, 0, 1, draw.randrange(900), 7)
            book.windows.append(LoadWindow("c", float(second), 1.0, {LL: counts, SM: counts}))
        if draw.random() < 0.3:
            span_s = draw.choice([1.0, 7.0, 30.0, 500.0])
            assert book.mean_tokens(float(second), span_s) == _mean_tokens(book, second - span_s)


@pytest.mark.parametrize("seed", range(5))
def test_spans_are_those_of_the_windows_whatever_was_asked_before(seed: int) -> None:
    """A restored book has the windows alone: its spans must be the same, or a replay would decide otherwise."""
    draw = random.Random(seed)
    book = LoadBook(keep_s=60.0)
    total = {"a": 0, "b": 0}
    for second in range(400):
        for gateway in total:
            total[gateway] += draw.randrange(3)
            if draw.random() < 0.7 and not 150 <= second < 250:
                book.add(report(second + draw.random(), total[gateway], gateway=gateway))
        if draw.random() < 0.3:
            past_s = draw.choice([1.0, 7.0, 30.0, 500.0])
            spans = book.spans(float(second), past_s)
            assert spans == LoadBook(60.0, book.windows).spans(float(second), past_s)
            if past_s == 500.0:
                held = [span for each in spans.values() for span in each]
                oldest = book.windows[0].end_s // SPAN_S if book.windows else 0.0
                whole = [w for w in book.windows if w.end_s // SPAN_S >= oldest]
                assert sum(span.seconds for span in held) == pytest.approx(sum(w.seconds for w in whole))
                counted = sum(counts.arrived for w in whole for counts in w.classes.values())
                assert sum(sum(span.arrived.values()) for span in held) == counted


def test_a_span_holds_what_ended_within_it_and_a_gap_has_none() -> None:
    book = LoadBook(keep_s=100)
    for second in (10, 11, 12, 13, 14, 15, 30, 31):
        book.add(report(second, 2 * second))
    (spans,) = book.spans(31, 100).values()
    assert [(s.end_s, s.seconds, s.arrived[SM]) for s in spans] == [(14, 4, 8), (15, 1, 2), (31, 16, 32)]
    assert book.spans(31, 10) == {"g": spans[-1:]}


def _mean_tokens(book: LoadBook, since_s: float) -> dict[RequestClass, tuple[float, float]]:
    counted = [(c, counts) for w in book.windows if w.end_s > since_s for c, counts in w.classes.items()]
    found = {}
    for request_class in {c for c, _ in counted}:
        mine = [counts for c, counts in counted if c == request_class]
        arrived, completed = sum(w.arrived for w in mine), sum(w.completed for w in mine)
        if arrived and completed:
            tokens = sum(w.input_tokens for w in mine), sum(w.output_tokens for w in mine)
            found[request_class] = (tokens[0] / arrived, tokens[1] / completed)
    return found


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
    assert len(book.windows) <= 10 + SPAN_S
