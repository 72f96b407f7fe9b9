"""Latency from gateways' cumulative histograms: what was measured since the last report, and its percentiles.

For the history alone: no decision reads it. A gateway's histograms begin anew with its epoch, like its counters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` holds values in (bounds_s[i-1], bounds_s[i]]; the last one those beyond all bounds."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]

    @staticmethod
    def from_cumulative(bounds_s: Sequence[float], cumulative: Sequence[int]) -> Histogram:
        """Raises ValueError for counts that fall or do not fit the bounds."""
        if len(cumulative) != len(bounds_s) + 1:
            raise ValueError(f"{len(bounds_s)} bounds need {len(bounds_s) + 1} counts, {len(cumulative)} came")
        counts = [after - before for before, after in zip((0, *cumulative), cumulative, strict=False)]
        if min(counts) < 0:
            raise ValueError("cumulative counts fall")
        return Histogram(tuple(bounds_s), tuple(counts))

    def __add__(self, other: Histogram) -> Histogram:
        if other.bounds_s != self.bounds_s:
            return other  # a gateway with other bounds: the newer one counts
        return Histogram(self.bounds_s, tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def since(self, before: Histogram) -> Histogram:
        """What came after `before`; all of it where that was another beginning."""
        counts = [a - b for a, b in zip(self.counts, before.counts, strict=False)]
        if before.bounds_s != self.bounds_s or min(counts) < 0:
            return self
        return Histogram(self.bounds_s, tuple(counts))

    def quantile_ms(self, share: float) -> float | None:
        """Interpolated within its bucket; None without values, and beyond the last bound that bound."""
        totals = list(accumulate(self.counts))
        if not totals or totals[-1] == 0:
            return None
        wanted = share * totals[-1]
        index = bisect_left(totals, wanted)
        if index >= len(self.bounds_s):
            return 1000 * self.bounds_s[-1]
        low_s = self.bounds_s[index - 1] if index else 0.0
        below = totals[index - 1] if index else 0
        part = (wanted - below) / self.counts[index] if self.counts[index] else 1.0
        return 1000 * (low_s + part * (self.bounds_s[index] - low_s))


@dataclass(frozen=True, slots=True)
class ClassLatency:
    """First tokens and token gaps of one request class over some time."""

    ttft: Histogram
    gap: Histogram

    def __add__(self, other: ClassLatency) -> ClassLatency:
        return ClassLatency(self.ttft + other.ttft, self.gap + other.gap)

    def since(self, before: ClassLatency) -> ClassLatency:
        return ClassLatency(self.ttft.since(before.ttft), self.gap.since(before.gap))


@dataclass(slots=True)
class LatencyBook:
    """Remembers each gateway's last histograms, by request class."""

    _last: dict[tuple[str, str, str], ClassLatency] = field(default_factory=dict)
    _epochs: dict[str, str] = field(default_factory=dict)

    def add(self, gateway_id: str, epoch: str, request_class: str, latency: ClassLatency) -> ClassLatency | None:
        """What was measured since the last report; None for the first of an epoch."""
        if self._epochs.get(gateway_id) != epoch:
            self._epochs[gateway_id] = epoch
            self._last = {key: value for key, value in self._last.items() if key[0] != gateway_id}
        key = (gateway_id, epoch, request_class)
        before = self._last.get(key)
        self._last[key] = latency
        return None if before is None else latency.since(before)
