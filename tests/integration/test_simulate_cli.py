"""`dynamollm simulate` from end to end on a small load: any number of workers, a Ray cluster, bad input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

import simulator.calibration
import simulator.ledger
from controller.calibrate.sweep import (
    SweepPlan,
    SweepSettings,
)
from controller.cli.main import app
from simulator.study import ALL_SYSTEMS
from simulator.traces import generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> str:
    """Twelve minutes of chat: the window opens after five."""
    made = generate("conv", 720.0, 5.0, seed=3)
    start = datetime(2024, 5, 10, tzinfo=UTC)
    rows = [f"{start + timedelta(seconds=r.arrival_s)},{r.input_tokens},{r.output_tokens}" for r in made]
    file = tmp_path_factory.mktemp("trace") / "minutes.csv"
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return str(file)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """A coarser sweep than the default, so that the test takes seconds; the way through is the same."""
    settings = SweepSettings(gate_requests=300, least_requests=200, curve_requests=150, refinements=2)
    plan = SweepPlan(clocks_mhz=(1200, 1980), tps=(4, 8), settings=settings)
    whole = simulator.calibration.calibrate_twin
    monkeypatch.setattr(
        simulator.ledger, "calibrate_twin", lambda *args, **options: whole(*args, **{**options, "plan": replace(plan)})
    )


def simulate(cache: Path, *arguments: str) -> tuple[int, str]:
    command = ["simulate", "--nodes", "1", "--seeds", "2", "--start-s", "20", "--cache", str(cache), *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=True)
    return result.exit_code, result.stdout


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(cache, trace, tmp_path):
    arguments = ("--trace", trace, "--systems", "scalefreq,dynamollm,reactive", "--no-bound", "--json")
    folders = [tmp_path / workers for workers in ("2", "1")]
    printed = [simulate(cache, *arguments, "--workers", f.name, "--out", str(f)) for f in folders]
    assert printed[0] == printed[1]
    code, text = printed[0]
    assert code == 0, text
    assert list(json.loads(text)["systems"]) == ["singlepool", "scalefreq", "dynamollm", "reactive"]
    for name in ("result.json", "report.html"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_every_option_with_several_values_is_swept_alone(cache, trace, tmp_path):
    several = ("--start-s", "20,0", "--predictor-accuracy", "none,0.8", "--mismatch", "0,0.1", "--pools", "auto,1")
    several = (*several, "--crashes-per-day", "0,3000")
    arguments = ("--trace", trace, "--systems", "dynamollm", "--no-bound", "--seeds", "1", "--out", str(tmp_path))
    code, text = simulate(cache, *arguments, *several, "--json")
    assert code == 0, text
    result = json.loads(text)
    swept = result["sensitivity"]
    assert {option: [point["value"] for point in points] for option, points in swept.items()} == {
        "start_s": [0, 20],
        "predictor_accuracy": [None, 0.8],
        "mismatch": [0, 0.1],
        "pools": [None, 1],
        "crashes_per_day": [0, 3000],
    }
    for points in swept.values():
        (own,) = [point for point in points if point["headline"]]
        assert own["k"] == result["k"]
        assert own["systems"]["dynamollm"]["saved_parked"] == result["systems"]["dynamollm"]["saved_parked"]
    used = {
        option: {point["value"]: point["systems"]["singlepool"]["energy_parked_kwh"] for point in points}
        for option, points in swept.items()
    }
    # GPUs that are 10 % slower and hungrier carry 10 % less at u, and take more for it.
    assert used["mismatch"][0.1] > 1.03 * used["mismatch"][0]
    slow = next(point for point in swept["mismatch"] if not point["headline"])
    assert slow["k_max"] < result["k_max"]
    none, many = swept["crashes_per_day"]
    assert many["systems"]["dynamollm"]["attainment"] < none["systems"]["dynamollm"]["attainment"]
    # SinglePool has no starts in the window, no pools, and routes by nothing but load.
    for option in ("start_s", "predictor_accuracy", "pools"):
        first, other = used[option].values()
        assert first == pytest.approx(other, rel=1e-9), option
    assert (tmp_path / "report.html").read_text().count("<svg") == 7 + len(swept)


def test_a_local_ray_cluster_gives_the_same_bytes(cache, trace):
    pytest.importorskip("ray")
    arguments = ("--trace", trace, "--systems", "scalefreq", "--no-bound", "--json")
    here = simulate(cache, *arguments)
    assert here[0] == 0
    assert simulate(cache, *arguments, "--ray", "local") == here


def test_without_ray_its_option_says_what_to_install(cache, trace, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    result = CliRunner().invoke(app, ["simulate", "--trace", trace, "--cache", str(cache), "--ray", "local"])
    assert result.exit_code != 0
    assert "not installed" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--u", "a"], "--u a"),
        (["--u", "0.6,nan"], "is no number"),
        (["--pools", "7"], "into 7 pools"),
        (["--mismatch", "3"], "beyond reason"),
        (["--crashes-per-day", "-1"], "crashes a day are beyond reason"),
        (["--predictor-accuracy", "2"], "accuracy of a predictor"),
        (["--columns", "x"], "--columns x"),
        (["--physics", "none"], "no physics variant"),
        (["--physics", "base,none.csv"], "cannot read the grid"),
        (["--pools", "auto,7"], "into 7 pools"),
    ],
)
def test_bad_options_are_told_before_any_work(cache, trace, arguments, said):
    result = CliRunner().invoke(app, ["simulate", "--trace", trace, "--cache", str(cache / "unused"), *arguments])
    assert result.exit_code != 0
    assert said in str(result.exception)
    assert not (cache / "unused").exists()


def test_bad_input_is_explained():
    for arguments, said in ((["--trace", "nosuch.csv"], "nosuch.csv"), (["--trace", "conv", "--systems", "x"], "'x'")):
        result = CliRunner().invoke(app, ["simulate", *arguments])
        assert result.exit_code != 0
        assert said in str(result.exception)


def test_all_means_the_nine_systems():
    published = ("singlepool", "multipool", "scaleinst", "scaleshard", "scalefreq", "dynamollm")
    assert (*published, "best_clock", "reactive", "best_static") == ALL_SYSTEMS
