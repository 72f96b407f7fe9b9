"""Latency figures of served requests: quantiles, time between tokens, shares within bounds. Pure functions.

Bounds and bucket limits are passed in, so that demo, calibration and benchmarks judge by the operator's own SLO.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The nearest-rank quantile of sorted values: the smallest that at least a share q does not exceed."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class BucketBound:
    """Requests of an input bucket (from `from_tokens` up to the next bucket's) and their TTFT bound."""

    name: str
    from_tokens: int
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Latency:
    """One request as measured. A request that was not served has no times."""

    input_tokens: int
    served: bool
    ttft_s: float | None = None
    tbt_s: float | None = None
    gaps_s: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Of one input bucket, or of all. Milliseconds; None where nothing was measured. `in_slo` is a share of all
    requests: one that was not served is a miss."""

    name: str
    requests: int
    served: int
    in_slo: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tbt_p50_ms: float | None
    tbt_p99_ms: float | None
    gap_p99_ms: float | None


def summarise(requests: Iterable[Latency], buckets: Sequence[BucketBound], tbt_ms: float) -> list[LatencySummary]:
    """One summary per bucket, in the order given, then one named "all"."""
    ascending = sorted(buckets, key=lambda bucket: bucket.from_tokens)
    if not ascending or ascending[0].from_tokens > 1:
        raise ValueError("the buckets must begin at 0 or 1 token")
    members: dict[str, list[tuple[Latency, float]]] = {bucket.name: [] for bucket in buckets}
    for request in requests:
        bucket = max((b for b in ascending if b.from_tokens <= max(request.input_tokens, 1)), key=_from_tokens)
        members[bucket.name].append((request, bucket.ttft_ms))
    everything = [pair for bucket in buckets for pair in members[bucket.name]]
    return [_summary(name, pairs, tbt_ms) for name, pairs in [*members.items(), ("all", everything)]]


def _from_tokens(bucket: BucketBound) -> int:
    return bucket.from_tokens


def _summary(name: str, pairs: list[tuple[Latency, float]], tbt_ms: float) -> LatencySummary:
    served = [request for request, _ in pairs if request.served]
    ttfts = sorted(request.ttft_s for request in served if request.ttft_s is not None)
    tbts = sorted(request.tbt_s for request in served if request.tbt_s is not None)
    gaps = sorted(gap for request in served for gap in request.gaps_s)
    good = sum(_in_slo(request, ttft_ms, tbt_ms) for request, ttft_ms in pairs)
    return LatencySummary(
        name=name,
        requests=len(pairs),
        served=len(served),
        in_slo=good / len(pairs) if pairs else None,
        ttft_p50_ms=_ms(quantile(ttfts, 0.5)),
        ttft_p99_ms=_ms(quantile(ttfts, 0.99)),
        tbt_p50_ms=_ms(quantile(tbts, 0.5)),
        tbt_p99_ms=_ms(quantile(tbts, 0.99)),
        gap_p99_ms=_ms(quantile(gaps, 0.99)),
    )


def _in_slo(request: Latency, ttft_ms: float, tbt_ms: float) -> bool:
    """A request of one token has no gaps and so meets any TBT."""
    if not request.served or request.ttft_s is None:
        return False
    return request.ttft_s * 1e3 <= ttft_ms and (request.tbt_s or 0.0) * 1e3 <= tbt_ms


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
