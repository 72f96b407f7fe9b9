"""Generated traces have the published statistics; scaling keeps them and reaches its rate; seeds decide all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from controller.domain.classes import ClassScheme
from simulator import traces

# Published: class shares in %, token quantiles p10 / p50 / p90 / p99 (Azure LLM inference trace 2023).
SHARES = {
    "conv": dict(SS=3.6, SM=9.8, SL=0.05, MS=19.0, MM=10.4, ML=7.7, LS=15.1, LM=8.8, LL=25.6),
    "code": dict(SS=15.4, SM=0.5, SL=0.1, MS=20.7, MM=1.0, ML=0.06, LS=59.4, LM=2.4, LL=0.4),
}
QUANTILES = {
    "conv": ((207, 1020, 2735, 4142), (54, 129, 424, 601)),
    "code": ((147, 1469, 5188, 7436), (7, 13, 55, 251)),
}


@pytest.mark.parametrize("kind", traces.KINDS)
def test_token_mix_has_the_published_shares_and_quantiles(kind: traces.Kind) -> None:
    mix = np.array(traces.token_mix(kind, 60_000, seed=5))
    scheme = ClassScheme()
    names = [str(scheme.classify(i, o)) for i, o in mix.tolist()]
    for name, share in SHARES[kind].items():
        assert 100 * names.count(name) / len(names) == pytest.approx(share, abs=0.6), name
    for column, wanted in zip(mix.T, QUANTILES[kind], strict=True):
        np.testing.assert_allclose(np.percentile(column, [10, 50, 90, 99]), wanted, rtol=0.08, atol=2)


def test_a_quarter_of_the_chat_inputs_stand_just_above_the_cut() -> None:
    inputs = np.array(traces.token_mix("conv", 60_000, seed=5))[:, 0]
    assert ((inputs >= 1024) & (inputs < 1200)).mean() == pytest.approx(0.249, abs=0.01)


@pytest.mark.parametrize("swing", [0.0, 0.5, 0.8])
def test_chat_arrivals_vary_as_published_whatever_the_swing(swing: float) -> None:
    gaps = np.diff(traces.generate("conv", 3500, 5.53, seed=3, swing=swing).arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(1.1, abs=0.06)


def test_code_arrivals_come_in_bursts_with_silent_minutes() -> None:
    figures = []
    for seed in range(15):
        arrival_s = traces.generate("code", 3436, 2.567, seed).arrival_s
        gaps = np.diff(arrival_s)
        minutes, _ = np.histogram(arrival_s, bins=np.arange(0, 3436, 60))
        five_s, _ = np.histogram(arrival_s, bins=np.arange(0, 3436, 5))
        figures.append((gaps.std() / gaps.mean(), (minutes == 0).sum(), five_s.max() / five_s.mean()))
    cv, silent, peak = np.median(figures, axis=0)
    assert 10 < cv < 17  # 13.2 in the recorded hour
    assert 8 < silent < 16  # 12
    assert 13 < peak < 26  # 21


@pytest.mark.parametrize("kind", traces.KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_generated_traces_are_reproducible_ordered_and_of_the_asked_rate(kind: traces.Kind, seed: int) -> None:
    one, two = (traces.generate(kind, 90, 7.3, seed) for _ in range(2))
    assert list(one) == list(two)
    assert list(one) != list(traces.generate(kind, 90, 7.3, seed + 10))
    assert one.mean_rate_rps == pytest.approx(7.3, rel=0.01)
    assert (np.diff(one.arrival_s) >= 0).all()
    assert one.arrival_s[0] >= 0
    assert one.arrival_s[-1] < one.duration_s
    assert one.input_tokens.min() >= 1
    assert one.output_tokens.min() >= 1


def test_the_load_falls_and_rises_by_the_swing() -> None:
    counts, _ = np.histogram(traces.generate("conv", 600, 50, seed=1, swing=0.5).arrival_s, bins=10)
    share = counts / counts.mean()
    assert share[[0, -1]].mean() == pytest.approx(1.48, abs=0.12)
    assert share[4:6].mean() == pytest.approx(0.52, abs=0.08)


@given(rate=st.floats(0.3, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_scaling_reaches_the_rate_within_the_window_and_keeps_requests_whole(rate: float, seed: int) -> None:
    source = traces.generate("conv", 120, 4, seed=1)
    scaled = traces.scale_to_rate(source, rate, seed)
    assert len(scaled) == pytest.approx(rate * 120, abs=1)
    assert (np.diff(scaled.arrival_s) >= 0).all()
    assert scaled.arrival_s[0] >= 0
    assert scaled.arrival_s[-1] < source.duration_s
    known = set(zip(source.input_tokens.tolist(), source.output_tokens.tolist(), strict=True))
    assert {(r.input_tokens, r.output_tokens) for r in scaled} <= known


def test_one_copy_is_the_trace_and_copies_move_within_the_jitter() -> None:
    source = traces.generate("conv", 300, 2, seed=1)
    assert list(traces.scale(source, 1, seed=4)) == list(source)
    assert list(traces.scale(source, 2.5, seed=4)) == list(traces.scale(source, 2.5, seed=4))
    assert list(traces.scale(source, 2.5, seed=4)) != list(traces.scale(source, 2.5, seed=5))
    lone = traces.window(source, 100, 100)
    middle = lone.arrival_s[(lone.arrival_s > 45) & (lone.arrival_s < 55)]
    spread = traces.scale(
        traces.Trace("lone", 100.0, middle, lone.input_tokens[: len(middle)], lone.output_tokens[: len(middle)]), 5, 9
    )
    assert len(spread) == 5 * len(middle)
    assert spread.arrival_s.min() >= 45 - traces.JITTER_S
    assert spread.arrival_s.max() <= 55 + traces.JITTER_S


def test_thinning_is_even_over_the_window() -> None:
    source = traces.generate("conv", 200, 50, seed=1, swing=0)
    counts, _ = np.histogram(traces.scale(source, 0.3, seed=2).arrival_s, bins=4)
    assert counts.sum() == 3000
    assert counts.min() > 600


def test_a_window_begins_at_zero_and_an_empty_one_is_refused() -> None:
    source = traces.generate("conv", 300, 5, seed=1)
    part = traces.window(source, 60, 120)
    inside = source.arrival_s[(source.arrival_s >= 60) & (source.arrival_s < 180)]
    np.testing.assert_allclose(part.arrival_s, inside - 60)
    assert part.duration_s == 120
    assert traces.window(source, 250, 120).duration_s == 50
    with pytest.raises(UserError, match="holds no requests"):
        traces.window(source, 400, 60)


def test_token_mix_of_a_trace_draws_its_requests() -> None:
    source = traces.generate("code", 100, 5, seed=1)
    mix = traces.token_mix(source, 300, seed=2)
    assert set(mix) <= set(zip(source.input_tokens.tolist(), source.output_tokens.tolist(), strict=True))
    assert mix == traces.token_mix(source, 300, seed=2)
    assert mix != traces.token_mix(source, 300, seed=3)


@pytest.mark.parametrize(("duration", "rate", "swing"), [(0, 1, 0), (1, 0, 0), (1, 1, 1), (1, 1, -0.1)])
def test_impossible_shapes_are_refused(duration: float, rate: float, swing: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        traces.generate("conv", duration, rate, 1, swing)
