"""The published systems: what each may move, and what stands still."""

from __future__ import annotations

import numpy as np
import pytest

from controller.domain.classes import DEFAULT_PARTITIONS
from controller.loop.core import Core
from simulator.fleet import FleetTimes
from simulator.outcome import figures
from simulator.physics import Physics
from simulator.references import LargestLoad, StaticPool, _fewest, run_reactive, run_static, single_pool
from simulator.systems import SYSTEMS, expected_rps, peak_shares, run_system, settings_of
from simulator.traces import Trace, generate
from tests.synthetic_profile import synthetic_profile

PHYSICS = Physics.load()
PROFILE = synthetic_profile(start_s=10.0)
TIMES = FleetTimes(start_s=10.0)
NODES = 2
TRACE = generate("conv", 900.0, 4.0, seed=3)


def run(name: str) -> dict:
    made = run_system(SYSTEMS[name], PROFILE, PHYSICS, NODES, TRACE, times=TIMES, seed=1)
    return {**figures(made, PROFILE.slo, PROFILE.scheme), "series": made.series}


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    return {name: run(name) for name in SYSTEMS}


@pytest.mark.parametrize("name", ["singlepool", "multipool", "scalefreq"])
def test_static_systems_hold_all_gpus_and_start_nothing(results, name):
    result = results[name]
    assert (result["mean_gpus"], result["peak_gpus"]) == (pytest.approx(16), 16)
    assert result["switches"] == 0
    assert result["energy_by_state_kwh"]["parked"] == 0
    assert result["energy_off_kwh"] == result["energy_parked_kwh"]


def test_only_systems_with_clocks_set_clocks(results):
    moved = {name for name, result in results.items() if result["clock_changes"]}
    assert moved == {"scalefreq", "dynamollm"}
    full = results["multipool"]["series"]["clock_mhz"]
    assert {mhz for row in full.values() for mhz in row} == {1980}


def test_pools_are_those_of_the_partition(results):
    def pools(name):
        return {key.split("/")[0] for key in results[name]["series"]["gpus"]}

    assert pools("singlepool") == {"all"}
    for name in ("multipool", "scaleinst", "scaleshard", "scalefreq"):
        assert pools(name) == {"short", "long"}


def test_scaling_instances_keeps_the_widest_tensor_parallelism(results):
    assert {key.split("/")[1] for key in results["scaleinst"]["series"]["gpus"]} == {"tp8"}


def test_every_request_ends_once_and_the_gpu_cap_holds(results):
    expected = int((TRACE.arrival_s >= 300).sum())
    for result in results.values():
        assert (result["requests"], result["lost"]) == (expected, 0)
        assert result["peak_gpus"] <= NODES * 8
        assert sum(result["series"]["requests"]) == expected


def test_energy_is_the_sum_of_its_states_and_the_series(results):
    for result in results.values():
        assert result["energy_parked_kwh"] == pytest.approx(sum(result["energy_by_state_kwh"].values()))
        watts, hours = result["series"]["power_w"], (TRACE.arrival_s[-1] - 300) / 3600
        assert np.mean(watts) * hours / 1e3 == pytest.approx(result["energy_parked_kwh"], rel=0.03)


def test_the_same_seed_gives_the_same_result():
    assert run("dynamollm") == run("dynamollm")


def test_single_pool_under_the_loop_draws_what_the_static_run_draws(results):
    static = run_static(PHYSICS, PROFILE, NODES, TRACE, single_pool(PROFILE, NODES, 1980), seed=1)
    alone = figures(static, PROFILE.slo, PROFILE.scheme)
    assert results["singlepool"]["energy_off_kwh"] == pytest.approx(alone["energy_off_kwh"], rel=0.01)
    assert results["singlepool"]["ttft_p99_ms"] == pytest.approx(alone["ttft_p99_ms"], rel=0.02)


def test_peak_shares_deal_out_every_gpu_by_the_busiest_minute():
    shares = peak_shares(TRACE, PROFILE, ("short", "long"), nodes=12)
    assert sum(shares.values()) == 12
    assert shares["long"] > shares["short"] >= 1
    only_short = Trace("short", 10.0, np.arange(5.0), np.full(5, 10), np.full(5, 10))
    assert peak_shares(only_short, PROFILE, ("short", "long"), nodes=3) == {"short": 2, "long": 1}


def test_the_first_layout_is_planned_for_the_first_five_minutes():
    rates = expected_rps(TRACE, PROFILE)
    assert sum(rates.values()) * 300 == pytest.approx((TRACE.arrival_s < 300).sum())


def test_without_clocks_layouts_are_planned_at_full_clock_alone():
    settings = settings_of(SYSTEMS["scaleinst"], PROFILE, NODES, TRACE, TIMES)
    columns = Core(settings, PROFILE, term=1, expected_nodes=NODES).state.columns
    assert {(column.tp, column.mhz) for column in columns} == {(8, 1980)}
    assert {column.pool for column in columns} == {"all", "short", "long"}
    assert DEFAULT_PARTITIONS[1] == ("short", "long")


def test_the_autoscaler_follows_the_load_and_stays_under_the_cap():
    arrival_s = np.concatenate([np.arange(0, 600, 0.5), np.arange(600, 1200, 0.05), np.arange(1200, 2100, 0.5)])
    trace = Trace("step", 2100.0, arrival_s, np.full(len(arrival_s), 300), np.full(len(arrival_s), 200))
    largest = LargestLoad(k=1, k_overall=1, rate_rps=20.0, in_flight=60.0)
    made = run_reactive(PROFILE, PHYSICS, 3, trace, largest, times=TIMES, seed=1)
    gpus = made.series["gpus"]["all/tp8"]
    assert gpus[0] == 8
    assert max(gpus) == made.peak_gpus == 24
    assert gpus[-1] == 8
    assert made.finished.all()


def test_static_pools_report_parked_gpus_and_nodes_that_are_off():
    group = PROFILE.group("all")
    made = run_static(PHYSICS, PROFILE, 3, TRACE, [StaticPool(group, 1, 4, 1980)], seed=1)
    result = figures(made, PROFILE.slo, PROFILE.scheme)
    hours = made.window_s / 3600
    assert result["gpu_hours"] == pytest.approx(4 * hours)
    assert result["energy_parked_kwh"] - result["energy_off_kwh"] == pytest.approx(20 * 72 * hours / 1e3)
    assert made.off_node_s == pytest.approx(2 * made.window_s)


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("least", [1, 3])
def test_the_fewest_instances_are_found(needed, least):
    assert _fewest(lambda n: n >= needed, least, 12) == max(needed, least)
    assert _fewest(lambda n: False, least, 12) is None
