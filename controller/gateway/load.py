"""What the gateway has served: cumulative counters and latency histograms per model and class, for load reports.

Engines cannot measure this: only here are queueing, fail-over and the whole way to the client seen. Counters never
go back, so a lost report costs nothing. TTFT counts from the request's arrival, its wait in the queue included.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from controller.domain.classes import ALL_CLASSES, RequestClass
from controller.domain.slo import Slo
from controller.fleet.port import ClassCounters, LoadObservation, QueueObservation

# Upper bounds in seconds; the bounds of the default SLO are among them, so that shares within it can be read off.
TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
GAP_BOUNDS_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 5.0)


@dataclass(slots=True)
class Histogram:
    """`counts[i]` holds values in (bounds[i-1], bounds[i]]; the last one those beyond all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[int]:
        total, out = 0, []
        for count in self.counts:
            total += count
            out.append(total)
        return out


@dataclass(slots=True)
class ClassMeter:
    arrived: int = 0
    completed: int = 0
    failed: int = 0
    in_slo: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    ttft_s: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    gap_s: Histogram = field(default_factory=lambda: Histogram(GAP_BOUNDS_S))

    def counters(self) -> ClassCounters:
        return ClassCounters(
            self.arrived, self.completed, self.failed, self.in_slo, self.input_tokens, self.output_tokens
        )


class LoadMeter:
    """All counters of one gateway since its start.

    Arrivals count under the class dealt to them (classify.py), outcomes under the true class once it is known.
    """

    def __init__(self, slo: Slo | None = None) -> None:
        self._slo = slo or Slo()
        self._meters: dict[tuple[str, RequestClass], ClassMeter] = {}

    def meter(self, model: str, request_class: RequestClass) -> ClassMeter:
        key = (model, request_class)
        meter = self._meters.get(key)
        if meter is None:
            meter = self._meters[key] = ClassMeter()
        return meter

    def arrived(self, model: str, request_class: RequestClass, input_tokens: int) -> None:
        meter = self.meter(model, request_class)
        meter.arrived += 1
        meter.input_tokens += input_tokens

    def failed(self, model: str, request_class: RequestClass) -> None:
        """Refused, timed out or broken: a miss of the SLO. A client that leaves by itself is not."""
        self.meter(model, request_class).failed += 1

    def completed(
        self,
        model: str,
        request_class: RequestClass,
        output_tokens: int,
        ttft_s: float,
        gaps_s: Sequence[float],
        times: int = 1,
    ) -> None:
        """A streamed answer: `ttft_s` counts from the request's arrival, gaps are those between its tokens. `times`:
        answers that this one speaks for."""
        meter = self._count(model, request_class, output_tokens, times)
        meter.ttft_s.add(ttft_s, times)
        for gap_s in gaps_s:
            meter.gap_s.add(gap_s, times)
        tbt_s = sum(gaps_s) / len(gaps_s) if gaps_s else 0.0
        meter.in_slo += times * self._slo.met(request_class.input, ttft_s * 1e3, tbt_s * 1e3)

    def completed_whole(
        self, model: str, request_class: RequestClass, output_tokens: int, total_s: float, times: int = 1
    ) -> None:
        """An answer in one piece hides its tokens' times: in SLO when all of it came within the bounds' sum."""
        meter = self._count(model, request_class, output_tokens, times)
        bound_ms = self._slo.ttft_ms(request_class.input) + self._slo.tbt_ms * max(0, output_tokens - 1)
        meter.in_slo += times * (total_s * 1e3 <= bound_ms)

    def _count(self, model: str, request_class: RequestClass, output_tokens: int, times: int) -> ClassMeter:
        meter = self.meter(model, request_class)
        meter.completed += times
        meter.output_tokens += times * output_tokens
        return meter

    def classes(self, models: Iterable[str]) -> Mapping[tuple[str, RequestClass], ClassMeter]:
        """Every class of the models and whatever else was counted: a class without requests is reported as zero,
        because a missing one would mean unknown."""
        for model in models:
            for request_class in ALL_CLASSES:
                self.meter(model, request_class)
        return self._meters

    def observation(
        self, gateway_id: str, epoch: str, now_s: float, model: str, queues: Mapping[str, QueueObservation]
    ) -> LoadObservation:
        """The report of one model as the controller's core sees it."""
        classes = {name: meter.counters() for (of, name), meter in self.classes([model]).items() if of == model}
        return LoadObservation(gateway_id, epoch, now_s, model, classes, queues)
