"""Latency summaries: nearest-rank quantiles, buckets by input length, and misses that count."""

from __future__ import annotations

import json

import pytest

from common.latency import BucketBound, Latency, quantile, summarise
from common.loadgen import prompt_bytes

BUCKETS = [BucketBound("S", 0, 250.0), BucketBound("M", 256, 400.0), BucketBound("L", 1024, 2000.0)]


@pytest.mark.parametrize(("q", "value"), [(0.0, 1), (0.5, 5), (0.51, 6), (0.99, 10), (1.0, 10)])
def test_quantile_is_the_nearest_rank(q: float, value: float) -> None:
    assert quantile(list(range(1, 11)), q) == value
    assert quantile([], q) is None


def test_requests_are_judged_by_the_bound_of_their_input_bucket() -> None:
    requests = [
        Latency(255, True, 0.25, 0.1, [0.1, 0.1]),
        Latency(255, True, 0.251, 0.1, [0.1]),
        Latency(256, True, 0.4, 0.101, [0.101]),
        Latency(256, True, 0.4, None),  # one token
        Latency(1024, True, 2.0, 0.05, [0.01, 0.09]),
        Latency(5000, False),
    ]
    got = {summary.name: summary for summary in summarise(requests, BUCKETS, tbt_ms=100.0)}
    assert [(s.requests, s.served, s.in_slo) for s in got.values()] == [
        (2, 2, 0.5),
        (2, 2, 0.5),
        (2, 1, 0.5),
        (6, 5, 0.5),
    ]
    assert got["S"].ttft_p99_ms == pytest.approx(251)
    assert got["M"].tbt_p50_ms == pytest.approx(101)
    assert got["L"].gap_p99_ms == pytest.approx(90)
    assert list(got) == ["S", "M", "L", "all"]


def test_an_empty_bucket_says_nothing() -> None:
    first = summarise([], BUCKETS, 100.0)[0]
    assert (first.requests, first.in_slo, first.ttft_p50_ms) == (0, None, None)


def test_buckets_must_cover_every_length() -> None:
    with pytest.raises(ValueError, match="begin at"):
        summarise([], BUCKETS[1:], 100.0)


@pytest.mark.parametrize("tokens", [1, 2, 4097, 32_768, 70_000])
@pytest.mark.parametrize("offset", [0, 7919, 32_767])
def test_prompts_have_exactly_as_many_tokens_as_asked(tokens: int, offset: int) -> None:
    ids = json.loads(prompt_bytes(tokens, offset))
    assert len(ids) == tokens
    assert all(100 <= token < 500 for token in ids)


def test_prompts_differ_so_that_no_prefix_cache_helps() -> None:
    prompts = {prompt_bytes(64, number * 7919) for number in range(1000)}
    assert len(prompts) == 1000
