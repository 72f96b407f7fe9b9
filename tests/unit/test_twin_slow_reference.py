"""The fast twin's static fleets and the bound's MILP against a slow, independent reference; what must always hold."""

from __future__ import annotations

import random

import numpy as np
import pytest

from controller.domain.classes import ClassScheme
from controller.domain.slo import Slo
from simulator.bound import BoundColumn, BoundTable, clairvoyant
from simulator.fast.static import gap_quantile_s, static_engines
from simulator.fleet import FleetTimes
from simulator.outcome import SystemRun, figures
from simulator.physics import Physics
from simulator.systems import SYSTEMS, run_system
from simulator.traces import Trace, generate
from tests.slow_reference import CHUNK_TOKENS, Column, least_power_w, serve
from tests.synthetic_profile import synthetic_profile

PARKED_W = 72.0
PHYSICS = {name: Physics.from_text(name) for name in ("base", "base+legacy", "base+prefill-first")}

# instances, TP, MHz, requests/s of all, seconds, variant
CASES = [
    (3, 8, 1980, 12.0, 90.0, "base"),
    (2, 4, 1200, 4.0, 120.0, "base"),
    (2, 4, 1980, 3.0, 120.0, "base+legacy"),
    (2, 2, 1980, 6.0, 60.0, "base"),  # little room for context: preemptions and queues
    (3, 8, 1980, 12.0, 90.0, "base+prefill-first"),
    (2, 2, 1980, 6.0, 60.0, "base+prefill-first"),
]


@pytest.mark.parametrize(("instances", "tp", "mhz", "rate_rps", "seconds", "variant"), CASES)
def test_static_fleets_agree_with_the_slow_reference(instances, tp, mhz, rate_rps, seconds, variant):
    physics = PHYSICS[variant]
    trace = generate("conv", seconds, rate_rps, seed=5, swing=0.3)
    fits = trace.input_tokens + trace.output_tokens <= physics.kv_capacity_tokens(tp)
    trace = Trace(trace.name, seconds, trace.arrival_s[fits], trace.input_tokens[fits], trace.output_tokens[fits])
    slow = serve(physics, trace, instances, tp, mhz)

    engines = static_engines(physics, trace, instances, tp, mhz)
    engines.advance(float(trace.arrival_s[-1]))
    joules = float(engines.energy_j().sum())
    engines.finish()
    first_s, finished_s = engines.results["first_s"], engines.results["finished_s"]
    ttft_s, span_s = first_s - trace.arrival_s, finished_s - first_s
    slow_ttft_s = np.array([job.first_s - job.arrival_s for job in slow.jobs])
    slow_span_s = np.array([job.last_s - job.first_s for job in slow.jobs])
    slow_gaps_s = np.concatenate([server.gaps for server in slow.servers])

    assert joules == pytest.approx(slow.joules, rel=0.01)
    for quantile in (0.5, 0.99):
        assert np.quantile(ttft_s, quantile) == pytest.approx(np.quantile(slow_ttft_s, quantile), rel=0.02)
        assert np.quantile(span_s, quantile) == pytest.approx(np.quantile(slow_span_s, quantile), rel=0.02)
    slow_gap_s = np.quantile(slow_gaps_s, 0.99, method="inverted_cdf")
    assert gap_quantile_s(engines.gaps, 0.99) == pytest.approx(slow_gap_s, rel=0.02)
    assert engines.gaps.sum() == len(slow_gaps_s)
    assert all(server.most_kv <= physics.kv_capacity_tokens(tp) for server in slow.servers)
    if tp == 2:
        assert sum(server.preempted for server in slow.servers) > 0
        assert (engines.results["preempted"] > 0).any()


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_agrees_with_enumeration(seed):
    rng = random.Random(seed)
    columns: list[Column] = []
    for group, size in (("all", 1.0), ("short", 1.6), ("long", 0.7)):
        for tp in (4, 8):
            idle_w, top_rps = 90.0 * tp, size * tp * rng.uniform(0.8, 1.2)
            columns.append((group, tp, 0.0, idle_w))
            for share in (0.3, 0.6, 1.0):
                watts = idle_w + tp * 400 * share ** rng.uniform(0.6, 1.4)
                columns.append((group, tp, top_rps * share, watts))
    # The work of a request is its one token out.
    made = tuple(BoundColumn(group, tp, 1980, rate_rps, watts) for group, tp, rate_rps, watts in columns)
    table = BoundTable(made, 0.0, 1.0, {"all": 1.0, "short": 1.0, "long": 1.0})
    short, long = rng.randint(60, 900), rng.randint(60, 500)
    count = short + long
    arrival_s = 300.0 + 60.0 * np.append(np.sort([rng.random() for _ in range(count - 1)]), 1.0)
    inputs = np.array([100] * short + [2000] * long)
    trace = Trace("minute", 400.0, arrival_s, inputs, np.ones(count, np.int64))
    demand_rps = {"short": short / 60, "long": long / 60, "all": count / 60}
    for gpus in (8, 16, 24):
        found = clairvoyant(table, trace, gpus, PARKED_W)
        for freed_w, (found_w,) in ((0.0, found.power_off_w), (PARKED_W, found.power_parked_w)):
            expected_w = least_power_w(columns, (("all",), ("short", "long")), demand_rps, gpus, freed_w)
            assert (expected_w is None) == (found.overloaded_epochs == 1)
            if expected_w is not None:
                assert found_w == pytest.approx(expected_w, rel=0.01)
                assert found_w <= expected_w * (1 + 1e-6)  # a bound must not be too high


# ------------------------------------------------------------------------------------------- what always holds

DEMANDING = [("dynamollm", 30.0), ("scaleshard", 12.0), ("singlepool", 24.0)]


@pytest.fixture(scope="module", params=DEMANDING, ids=[name for name, _ in DEMANDING])
def run(request) -> SystemRun:
    """Twenty minutes under the whole loop on two nodes, with starts, drains and clocks that change."""
    name, rate_rps = request.param
    trace = generate("conv", 1200.0, rate_rps / 4, seed=2, swing=0.8)
    profile = synthetic_profile()
    times = FleetTimes(start_s=20.0)
    return run_system(SYSTEMS[name], profile, PHYSICS["base"], 2, trace, times=times, seed=2)


def test_every_request_ends_exactly_once(run):
    first_s, ends = run.ttft_s, run.finished
    assert len(ends) == len(run.trace)
    assert ends.all()
    assert (first_s > 0).all()
    assert figures(run, Slo(), ClassScheme())["lost"] == 0


def test_energy_is_the_sum_of_its_states_and_of_its_minutes(run):
    told = figures(run, Slo(), ClassScheme())
    assert told["energy_parked_kwh"] == pytest.approx(sum(told["energy_by_state_kwh"].values()), rel=1e-12)
    minutes_j = 60.0 * np.sum(run.series["power_w"][:-1]) + run.series["power_w"][-1] * (run.window_s % 60.0 or 60.0)
    assert minutes_j / 3.6e6 == pytest.approx(told["energy_parked_kwh"], rel=0.01)
    parked_w = PHYSICS["base"].idle_w(1980, context=False)
    assert run.energy_j["parked"] == pytest.approx(parked_w * run.parked_gpu_s)


def test_gpus_never_exceed_the_cap(run):
    held = np.sum(list(run.series["gpus"].values()), axis=0)
    assert held.max() <= run.gpus + 1e-6
    assert run.peak_gpus <= run.gpus
    assert 0 <= run.parked_gpu_s <= run.gpus * run.window_s


def test_nothing_is_served_faster_than_the_physics_allow(run):
    """Alone on the widest instance at full clock is the fastest there is."""
    physics, trace = PHYSICS["base"], run.trace
    for number in range(0, len(trace), 37):
        tokens, answer = int(trace.input_tokens[number]), int(trace.output_tokens[number])
        least_s, done = 0.0, 0
        while done < tokens:
            chunk = min(CHUNK_TOKENS, tokens - done)
            least_s += physics.iteration(8, 1980, 0, 0, [(chunk, done)])[0]
            done += chunk
        assert run.ttft_s[number] >= least_s * (1 - 1e-9)
        if answer > 1:
            step_s, _ = physics.iteration(8, 1980, 1, tokens + 1)
            assert run.tbt_s[number] >= step_s * (1 - 1e-9)


def test_power_stays_between_parked_and_the_limit(run):
    physics = PHYSICS["base"]
    watts = np.array(run.series["power_w"]) / run.gpus
    assert watts.min() >= physics.idle_w(1980, context=False) - 0.01
    assert watts.max() <= physics.parameters.power_limit_w


def test_the_kv_cache_is_never_overfull():
    physics = PHYSICS["base"]
    trace = generate("conv", 60.0, 6.0, seed=1)  # far more than two TP2 carry
    engines = static_engines(physics, trace, 2, 2, 1980)
    fullest = 0.0
    for second in range(1, 240):
        engines.advance(float(second))
        fullest = max(fullest, *engines.shown().kv_usage_ratio)
    assert 0.9 < fullest <= 1.0
    assert (engines.results["preempted"] > 0).any()
