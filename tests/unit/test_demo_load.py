"""The demonstration's load: scaled to u, warm-up set apart, different for another trace, seed or scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from simulator.demo.load import make_load, nearest_kind, read_trace
from simulator.traces import Trace, generate

MAX_RPS = 10.0


def load_of(trace: Trace | None = None, u: float = 0.5, seed: int = 1, duration_s: float = 60.0) -> list[float]:
    return [arrival for arrival, _, _ in make_load(trace, u, MAX_RPS, duration_s, 10.0, seed).arrivals]


@pytest.mark.parametrize("u", [0.2, 0.5, 0.8])
def test_the_mean_load_is_u_times_what_the_static_fleet_serves(u: float) -> None:
    assert len(load_of(u=u)) / 60.0 == pytest.approx(u * MAX_RPS, rel=0.02)
    trace = generate("code", 600.0, 3.0, seed=9)
    assert len(load_of(trace, u=u)) / 60.0 == pytest.approx(u * MAX_RPS, rel=0.02)


def test_u_is_told_of_the_measured_window() -> None:
    load = make_load(None, 0.5, MAX_RPS, 60.0, 10.0, seed=1)
    inside = [arrival for arrival, _, _ in load.arrivals if arrival >= 10.0]
    assert load.u == pytest.approx(len(inside) / 50.0 / MAX_RPS)
    assert load.u != 0.5  # the warm-up takes the peak of the generated load


def test_initial_rates_are_those_of_the_warm_up_only() -> None:
    load = make_load(None, 0.5, MAX_RPS, 60.0, 10.0, seed=1)
    early = [arrival for arrival, _, _ in load.arrivals if arrival < 10.0]
    assert sum(load.initial_rps.values()) == pytest.approx(len(early) / 10.0)


def test_another_seed_scale_or_trace_is_another_load() -> None:
    trace = generate("conv", 600.0, 5.0, seed=4)
    loads = [load_of(), load_of(seed=2), load_of(u=0.6), load_of(trace), load_of(trace, seed=2)]
    assert len({tuple(load) for load in loads}) == len(loads)
    assert load_of() == load_of()


def test_the_nearest_mix_is_found() -> None:
    assert nearest_kind(generate("code", 600.0, 5.0, seed=3)) == "code"
    assert nearest_kind(generate("conv", 600.0, 5.0, seed=3)) == "conv"


def test_a_load_too_light_to_measure_is_refused() -> None:
    with pytest.raises(UserError, match="too few"):
        make_load(None, 0.05, 1.0, 15.0, 3.0, seed=1)


def test_a_trace_of_a_handful_of_requests_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "few.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n", encoding="utf-8")
    with pytest.raises(UserError, match="too few"):
        read_trace(file)
