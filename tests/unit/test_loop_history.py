"""What is kept of a fleet: outcomes of decisions, and latencies from cumulative histograms."""

from __future__ import annotations

import pytest

from controller.domain.classes import RequestClass
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level
from controller.loop.accounting import EnergyEntry
from controller.loop.history import ForecastLog, OutcomeBook, WindowBook
from controller.loop.latency import ClassLatency, Histogram, LatencyBook
from controller.loop.load import ClassWindow, LoadWindow
from controller.loop.state import Instant
from controller.loop.week import Foreseen, judged
from controller.store.records import DecisionOutcome, ForecastRow, SloRow
from tests.store_suite import decision

MS, LM = RequestClass.parse("MS"), RequestClass.parse("LM")
BOUNDS = (0.1, 0.2, 0.4)
POOLS = {"short": frozenset({MS}), "long": frozenset({LM})}


def latency(*counts: int) -> ClassLatency:
    seen = Histogram(BOUNDS, counts)
    return ClassLatency(seen, seen)


def spent(instance_id: str, pool: str, energy_j: float) -> EnergyEntry:
    return EnergyEntry("n", "g", pool, instance_id, 1, GpuState.SERVING, 0.0, 1.0, energy_j, 1000)


def at(seconds: float) -> Instant:
    return Instant(seconds, 1e9 + seconds)


def test_percentiles_lie_within_their_bucket() -> None:
    seen = Histogram.from_cumulative(BOUNDS, (50, 90, 100, 100))
    assert seen.quantile_ms(0.5) == pytest.approx(100.0)
    assert seen.quantile_ms(0.7) == pytest.approx(150.0)
    assert seen.quantile_ms(0.99) == pytest.approx(380.0)
    assert Histogram(BOUNDS, (0, 0, 0, 1)).quantile_ms(0.5) == pytest.approx(400.0), "not more than is known"
    assert Histogram(BOUNDS, (0, 0, 0, 0)).quantile_ms(0.5) is None
    for wrong in ((1, 2, 3), (3, 2, 2, 2)):
        with pytest.raises(ValueError, match="counts"):
            Histogram.from_cumulative(BOUNDS, wrong)


def test_only_what_is_new_is_counted_and_a_new_epoch_begins_anew() -> None:
    book = LatencyBook()
    assert book.add("g", "1", "MS", latency(5, 0, 0, 0)) is None
    assert book.add("g", "1", "MS", latency(7, 1, 0, 0)) == latency(2, 1, 0, 0)
    assert book.add("g", "2", "MS", latency(1, 0, 0, 0)) is None
    assert book.add("g", "2", "MS", latency(1, 0, 0, 4)) == latency(0, 0, 0, 4)


def test_outcomes_of_every_level_one_epoch_later() -> None:
    book = OutcomeBook(instance_epoch_s=60.0)
    for number, (level, scope) in enumerate(
        ((Level.CLUSTER, "cluster"), (Level.POOL, "short"), (Level.INSTANCE, "i1")), start=1
    ):
        assert book.decided(decision(number, level=level, scope=scope), at(0)) == []
    book.add(spent("i1", "short", 600.0))
    book.add(spent("i2", "long", 300.0))
    book.add_load(
        LoadWindow("g", 30, 30, {MS: ClassWindow(12, 10, 2, 9, 0, 0), LM: ClassWindow(6, 6, 0, 6, 0, 0)}), POOLS
    )
    book.add_latency(MS, latency(99, 0, 1, 0), POOLS)
    assert book.close_due(at(59)) == []
    (clock,) = book.close_due(at(60))
    (pool,) = book.decided(decision(9, level=Level.POOL, scope="short"), at(120))
    (cluster,) = book.decided(decision(10, level=Level.CLUSTER, scope="cluster"), at(300))
    assert isinstance(clock, DecisionOutcome)
    assert isinstance(pool, DecisionOutcome)
    assert isinstance(cluster, DecisionOutcome)
    assert (clock.number, clock.window_s, clock.power_w, clock.load_rps) == (3, 60.0, 10.0, None)
    assert (pool.number, pool.energy_j, pool.load_rps, pool.slo_attainment) == (2, 600.0, 0.1, 0.75)
    assert pool.ttft_p99_ms == pytest.approx(100.0)
    assert (cluster.number, cluster.energy_j, cluster.slo_attainment) == (1, 900.0, 15 / 18)


def test_what_was_overtaken_before_it_was_measured_is_unknown_not_zero() -> None:
    book = OutcomeBook()
    book.decided(decision(1, level=Level.CLUSTER, scope="cluster"), at(0))
    (at_once,) = book.decided(decision(2, level=Level.CLUSTER, scope="cluster"), at(0.1))
    book.add(spent("i1", "short", 600.0))  # of a second that had begun before
    (soon,) = book.decided(decision(3, level=Level.CLUSTER, scope="cluster"), at(0.4))
    for outcome in (at_once, soon):
        assert isinstance(outcome, DecisionOutcome)
        assert (outcome.power_w, outcome.energy_j, outcome.load_rps) == (None, None, None)


def test_the_window_rows_carry_the_latency() -> None:
    book = WindowBook(1, "m", 60.0)
    book.close_due(at(0))
    book.add_load(LoadWindow("g", 30, 30, {MS: ClassWindow(10, 10, 0, 9, 0, 0), LM: ClassWindow(1, 1, 0, 1, 0, 0)}))
    book.add_latency(MS, latency(50, 50, 0, 0))
    book.add_latency(MS, latency(0, 0, 0, 100))
    rows = {row.request_class: row for row in book.close_due(at(61)) if isinstance(row, SloRow)}
    assert rows[MS].ttft_p50_ms == pytest.approx(200.0)
    assert rows[MS].ttft_p99_ms == pytest.approx(400.0)
    assert rows[LM].ttft_p99_ms is None, "unknown is not zero"
    book.add_load(LoadWindow("g", 90, 30, {MS: ClassWindow(1, 1, 0, 1, 0, 0)}))
    later = [row for row in book.close_due(at(121)) if isinstance(row, SloRow)]
    assert later[0].ttft_p99_ms is None, "each window has its own"


def test_a_forecast_is_written_once_when_its_span_has_ended_at_the_time_it_was_of() -> None:
    book = ForecastLog(term=3, model="m")
    foreseen = Foreseen(2.5, 3.5, 2.0, 3.0, from_s=100.0, until_s=220.0)
    assert book.judged({}, at(240)) == []
    error = judged(None, foreseen, 4.0)
    row = ForecastRow(3, 1e9 + 100, 120.0, "m", "long", 2.5, 3.5, 2.0, 3.0, 4.0)
    assert book.judged({"long": error}, at(240)) == [row]
    assert book.judged({"long": error}, at(245)) == []
    # The same again is another forecast.
    assert book.judged({"long": judged(error, foreseen, 4.0)}, at(250)) == [row]
