"""Service level objectives: when a request, and when a class, is in SLO.

A request is in SLO when its TTFT is within the bound of its true input bucket and its TBT (mean time between
its tokens) is within `tbt_ms`. A class is when `attainment` of its requests are and the P99 of its single token
gaps is within `token_gap_p99_ms`. Defaults are DynamoLLM's (five times the latency on an idle system).
"""

from __future__ import annotations

from dataclasses import dataclass

from controller.domain.classes import Bucket


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s_ms: float = 250.0
    ttft_m_ms: float = 400.0
    ttft_l_ms: float = 2000.0
    tbt_ms: float = 100.0
    token_gap_p99_ms: float = 100.0
    attainment: float = 0.99

    def ttft_ms(self, bucket: Bucket) -> float:
        return {Bucket.S: self.ttft_s_ms, Bucket.M: self.ttft_m_ms, Bucket.L: self.ttft_l_ms}[bucket]

    def met(self, bucket: Bucket, ttft_ms: float, tbt_ms: float) -> bool:
        """Is one finished request in SLO? A request of one token has no gaps: pass a TBT of 0."""
        return ttft_ms <= self.ttft_ms(bucket) and tbt_ms <= self.tbt_ms
