"""`dynamollm simulate` from end to end on a small load: its JSON, its file, bad input, and the number of workers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import simulator.calibration
import simulator.ledger
from controller.calibrate.sweep import SweepPlan, SweepSettings
from controller.cli.main import app
from simulator.ledger import ALL_SYSTEMS

KEYS = [
    "energy_off_kwh",
    "energy_parked_kwh",
    "wall_kwh",
    "saved_off",
    "saved_parked",
    "attainment",
    "attainment_by_class",
    "meets_slo",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tbt_p99_ms",
    "gap_p99_ms",
    "gpu_hours",
    "peak_gpus",
    "switches",
    "carbon_kg",
    "cost_usd",
    "requests",
    "lost",
]
TOP = ["u", "k", "k_max", "seed", "profile", "bound_saved_off", "bound_saved_parked"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """A coarser sweep than the default, so that the test takes seconds; the way through is the same."""
    settings = SweepSettings(gate_requests=300, least_requests=200, curve_requests=150, refinements=2)
    plan = SweepPlan(clocks_mhz=(1200, 1980), settings=settings)
    whole = simulator.calibration.calibrate_twin
    monkeypatch.setattr(
        simulator.ledger, "calibrate_twin", lambda *args, **options: whole(*args, **{**options, "plan": replace(plan)})
    )


def simulate(cache: Path, *arguments: str) -> tuple[int, str]:
    command = ["simulate", "--nodes", "1", "--seeds", "2", "--start-s", "20", "--cache", str(cache), *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=True)
    return result.exit_code, result.stdout


def test_the_object_has_every_key_and_does_not_depend_on_the_workers(cache, tmp_path):
    arguments = ("--trace", "conv", "--systems", "scalefreq,dynamollm,reactive", "--no-bound", "--json")
    code, text = simulate(cache, *arguments, "--workers", "2", "--out", str(tmp_path))
    assert code == 0, text
    printed = json.loads(text)
    assert set(TOP) <= printed.keys()
    assert printed["k"] == pytest.approx(0.6 * printed["k_max"])
    assert list(printed["systems"]) == ["singlepool", "scalefreq", "dynamollm", "reactive"]
    for system in printed["systems"].values():
        assert set(KEYS) <= system.keys()
        assert "series" not in system
        assert len(system["per_seed"]) == 2
    assert printed["systems"]["singlepool"]["saved_off"] == 0
    assert printed["systems"]["scalefreq"]["saved_off"] > 0

    written = json.loads((tmp_path / "result.json").read_text())
    series = written["systems"]["dynamollm"]["series"]
    columns = [series["minute"], series["requests"], series["power_w"], *series["gpus"].values()]
    assert {len(column) for column in [*columns, *series["clock_mhz"].values()]} == {len(series["minute"])}

    assert simulate(cache, *arguments, "--workers", "1") == (0, text)


def test_bad_input_is_explained():
    for arguments, said in ((["--trace", "nosuch.csv"], "nosuch.csv"), (["--trace", "conv", "--systems", "x"], "'x'")):
        result = CliRunner().invoke(app, ["simulate", *arguments])
        assert result.exit_code != 0
        assert said in str(result.exception)


def test_all_means_the_nine_systems():
    published = ("singlepool", "multipool", "scaleinst", "scaleshard", "scalefreq", "dynamollm")
    assert (*published, "best_clock", "reactive", "best_static") == ALL_SYSTEMS
