"""The load book: turns gateways' cumulative counters into windows of arrivals per request class.

Cumulative counters make a lost report harmless. A new gateway epoch starts a new base; a span without any report
is a gap, which is unknown, not zero. Bounded: windows older than `keep_s` are dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf

from controller.domain.classes import ALL_CLASSES, RequestClass
from controller.fleet.port import ClassCounters, LoadObservation, QueueObservation

ZERO = ClassCounters()
SPAN_S = 5.0


@dataclass(frozen=True, slots=True)
class ClassWindow:
    arrived: int
    completed: int
    failed: int
    in_slo: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class LoadWindow:
    """Arrivals between two reports of one gateway, `seconds` long, ending at `end_s` (monotonic)."""

    gateway_id: str
    end_s: float
    seconds: float
    classes: Mapping[RequestClass, ClassWindow]
    refused: Mapping[str, int] = field(default_factory=dict)  # by pool, for whatever reason


@dataclass(slots=True)
class Span:
    """What one gateway's windows that ended within the same `SPAN_S` of a fixed grid hold together."""

    end_s: float
    seconds: float
    arrived: dict[RequestClass, int]


@dataclass
class LoadBook:
    """Its fields are all that is remembered of it; the running sums and spans beside them follow from the windows."""

    keep_s: float
    windows: deque[LoadWindow] = field(default_factory=deque)
    _last: dict[str, LoadObservation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sums = _RunningSums()
        self._spans = _Spans()

    def add(self, report: LoadObservation) -> LoadWindow | None:
        """Takes a report; returns the window it closes, None for a gateway's first report of an epoch."""
        before = self._last.get(report.gateway_id)
        if before is not None and report.observed_at_s < before.observed_at_s:
            return None  # overtaken by a later one: the counters already hold it
        self._last[report.gateway_id] = report
        if before is None or before.epoch != report.epoch or _fell(before, report):
            return None
        seconds = report.observed_at_s - before.observed_at_s
        if seconds <= 0:
            return None
        classes = {}
        for request_class, counters in report.classes.items():
            past = before.classes.get(request_class, ZERO)
            counts = _difference(counters, past)
            if any((counts.arrived, counts.completed, counts.failed)):
                classes[request_class] = counts
        refused = {
            pool: count
            for pool, queue in report.queues.items()
            if (count := _refused(queue) - (_refused(before.queues[pool]) if pool in before.queues else 0)) > 0
        }
        window = LoadWindow(report.gateway_id, report.observed_at_s, seconds, classes, refused)
        self.windows.append(window)
        # Only whole spans are dropped, so that what is left of the windows makes the same spans again.
        oldest_s = (report.observed_at_s - self.keep_s) // SPAN_S * SPAN_S
        while self.windows and self.windows[0].end_s < oldest_s:
            self.windows.popleft()
        return window

    @property
    def last_reports(self) -> Mapping[str, LoadObservation]:
        """The newest report of each gateway."""
        return self._last

    def age_s(self, now_s: float) -> float | None:
        """Seconds since the newest report of any gateway; None when there never was one."""
        return min((now_s - report.observed_at_s for report in self._last.values()), default=None)

    @property
    def any_arrived(self) -> bool:
        """True once any gateway has reported a request."""
        return any(counters.arrived for report in self._last.values() for counters in report.classes.values())

    def rates_rps(self, now_s: float, window_s: float) -> dict[RequestClass, float] | None:
        """Mean arrival rate per class over the last `window_s`; None when nothing was reported in it.

        Several gateways each report their own share, so their rates add.
        """
        rates: dict[RequestClass, float] = {}
        known = False
        for windows in self.by_gateway(now_s, window_s).values():
            known = True
            seconds = sum(window.seconds for window in windows)
            for window in windows:
                for request_class, counts in window.classes.items():
                    rates[request_class] = rates.get(request_class, 0.0) + counts.arrived / seconds
        return rates if known else None

    def by_gateway(self, now_s: float, window_s: float) -> dict[str, list[LoadWindow]]:
        """Windows that ended within the last `window_s`, oldest first, by gateway."""
        found: dict[str, list[LoadWindow]] = {}
        for window in reversed(self.windows):
            if window.end_s <= now_s - window_s:
                break
            found.setdefault(window.gateway_id, []).append(window)
        return {gateway_id: windows[::-1] for gateway_id, windows in found.items()}

    def spans(self, now_s: float, past_s: float) -> dict[str, list[Span]]:
        """Arrivals of the last `past_s` in spans of `SPAN_S`, oldest first, by gateway. Over a gap there are none."""
        return self._spans.of_last(now_s - past_s, self.windows)

    def mean_tokens(self, now_s: float, window_s: float) -> dict[RequestClass, tuple[float, float]]:
        """Mean (input, output) tokens per class over the last `window_s`, where both were seen."""
        since_s, found = now_s - window_s, 0
        for window in reversed(self.windows):
            if window.end_s <= since_s:
                break
            found += 1
        return {
            request_class: (tokens_in / arrived, tokens_out / completed)
            for request_class, (arrived, tokens_in, completed, tokens_out) in self._sums.of_last(found, self.windows)
            if arrived and completed
        }

    def refused(self, since_s: float) -> dict[str, int]:
        """Requests refused per pool in the windows that ended later than `since_s`."""
        counts: dict[str, int] = {}
        for window in reversed(self.windows):
            if window.end_s <= since_s:
                break
            for pool, count in window.refused.items():
                counts[pool] = counts.get(pool, 0) + count
        return counts

    def queues(self, now_s: float = 0.0, max_age_s: float = inf) -> dict[str, QueueObservation]:
        """Waiting requests per pool, summed over the gateways whose last report is no older than `max_age_s`."""
        summed: dict[str, QueueObservation] = {}
        for report in self._last.values():
            if now_s - report.observed_at_s > max_age_s:
                continue
            for pool, queue in report.queues.items():
                have = summed.get(pool)
                summed[pool] = queue if have is None else _add(have, queue)
        return summed


class _Spans:
    """Reports come every second; what looks back for minutes need not look at each of them every time."""

    def __init__(self) -> None:
        self._newest: LoadWindow | None = None
        self._by_gateway: dict[str, deque[Span]] = {}

    def of_last(self, since_s: float, windows: deque[LoadWindow]) -> dict[str, list[Span]]:
        for window in reversed(list(takewhile(lambda window: window is not self._newest, reversed(windows)))):
            self._add(window)
        self._newest = windows[-1] if windows else None
        oldest = windows[0].end_s // SPAN_S if windows else 0.0
        found: dict[str, list[Span]] = {}
        for gateway_id, spans in self._by_gateway.items():
            while spans and spans[0].end_s // SPAN_S < oldest:
                spans.popleft()
            late = list(takewhile(lambda span: span.end_s > since_s, reversed(spans)))
            if late:
                found[gateway_id] = late[::-1]
        return found

    def _add(self, window: LoadWindow) -> None:
        spans = self._by_gateway.setdefault(window.gateway_id, deque())
        if not spans or spans[-1].end_s // SPAN_S != window.end_s // SPAN_S:
            spans.append(Span(window.end_s, 0.0, {}))
        span = spans[-1]
        span.end_s = window.end_s
        span.seconds += window.seconds
        for request_class, counts in window.classes.items():
            if counts.arrived:
                span.arrived[request_class] = span.arrived.get(request_class, 0) + counts.arrived


class _RunningSums:
    """What the windows up to each one hold, by class, so that the sum over the last ones is one difference. Counts are
    whole numbers: it is exact."""

    def __init__(self) -> None:
        self._newest: LoadWindow | None = None
        # Before the first window, and after each: arrived, input tokens, completed and output tokens of every class.
        self._upto: deque[tuple[int, ...]] = deque([(0,) * (4 * len(ALL_CLASSES))])

    def of_last(
        self, found: int, windows: deque[LoadWindow]
    ) -> Iterator[tuple[RequestClass, tuple[int, int, int, int]]]:
        """The sums over the last `found` of the windows, by class; empty without any."""
        if not found:
            return
        self._catch_up(windows)
        before, after = self._upto[-1 - found], self._upto[-1]
        for request_class, at in _POSITIONS.items():
            yield (
                request_class,
                (
                    after[at] - before[at],
                    after[at + 1] - before[at + 1],
                    after[at + 2] - before[at + 2],
                    after[at + 3] - before[at + 3],
                ),
            )

    def _catch_up(self, windows: deque[LoadWindow]) -> None:
        added = list(takewhile(lambda window: window is not self._newest, reversed(windows)))
        for window in reversed(added):
            sums = list(self._upto[-1])
            for request_class, counts in window.classes.items():
                at = _POSITIONS[request_class]
                sums[at] += counts.arrived
                sums[at + 1] += counts.input_tokens
                sums[at + 2] += counts.completed
                sums[at + 3] += counts.output_tokens
            self._upto.append(tuple(sums))
        self._newest = windows[-1]
        while len(self._upto) > len(windows) + 1:
            self._upto.popleft()


_POSITIONS = {request_class: 4 * number for number, request_class in enumerate(ALL_CLASSES)}


def _fell(before: LoadObservation, report: LoadObservation) -> bool:
    """A counter that is lower than it was is another counter, whatever the epoch says: there is no negative load."""
    return any(
        min(_values(counters)) < 0 or any(a < b for a, b in zip(_values(counters), _values(past), strict=True))
        for request_class, counters in report.classes.items()
        for past in (before.classes.get(request_class, ZERO),)
    )


def _values(counters: ClassCounters) -> tuple[int, ...]:
    return (
        counters.arrived,
        counters.completed,
        counters.failed,
        counters.in_slo,
        counters.input_tokens,
        counters.output_tokens,
    )


def _difference(now: ClassCounters, past: ClassCounters) -> ClassWindow:
    return ClassWindow(
        now.arrived - past.arrived,
        now.completed - past.completed,
        now.failed - past.failed,
        now.in_slo - past.in_slo,
        now.input_tokens - past.input_tokens,
        now.output_tokens - past.output_tokens,
    )


def _refused(queue: QueueObservation) -> int:
    return sum(queue.refused.values())


def _add(a: QueueObservation, b: QueueObservation) -> QueueObservation:
    return QueueObservation(
        a.waiting + b.waiting,
        a.in_flight + b.in_flight,
        max(a.oldest_wait_s, b.oldest_wait_s),
        a.at_risk + b.at_risk,
        {
            reason: a.refused.get(reason, 0) + b.refused.get(reason, 0)
            for reason in sorted(a.refused.keys() | b.refused.keys())
        },
    )
