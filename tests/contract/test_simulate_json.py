"""What `dynamollm simulate --json` promises to programs: every key, with these names, for all nine systems."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import simulator.bound
import simulator.calibration
import simulator.energy_table
import simulator.ledger
import simulator.sensitivity
from controller.calibrate.sweep import (
    SweepPlan,
    SweepSettings,
)
from controller.cli.main import app
from controller.profile.table import Profile
from simulator.traces import generate

SYSTEMS = [
    "singlepool",
    "multipool",
    "scaleinst",
    "scaleshard",
    "scalefreq",
    "dynamollm",
    "best_clock",
    "reactive",
    "best_static",
]
KEYS = {
    "energy_off_kwh",
    "energy_parked_kwh",
    "wall_kwh",
    "saved_off",
    "saved_parked",
    "attainment",
    "attainment_by_class",
    "attainment_worst_hour",
    "hours_judged",
    "hours_missed",
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
    "spilled",
    "mispredicted",
    "outgrown",
}
TOP = {"u", "k", "k_max", "seed", "profile", "bound_saved_off", "bound_saved_parked"}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Here:
    """Runs every job at once in this process, so that what is coarser here is coarser there."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


@contextmanager
def here(processes: int, ray: str | None = None) -> Iterator[Here]:
    yield Here()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> tuple[str, Path]:
    """What one command printed, and its folder: all nine systems with the bound, and a second load."""
    folder = tmp_path_factory.mktemp("simulate")
    settings = SweepSettings(gate_requests=300, least_requests=200, curve_requests=150, refinements=2)
    plan = SweepPlan(clocks_mhz=(1200, 1980), tps=(4, 8), settings=settings)
    trace = generate("conv", 720.0, 5.0, seed=3)
    start = datetime(2024, 5, 10, tzinfo=UTC)
    rows = [f"{start + timedelta(seconds=r.arrival_s)},{r.input_tokens},{r.output_tokens}" for r in trace]
    file = folder / "trace.csv"
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, "never,1,1"]) + "\n")
    whole = simulator.calibration.calibrate_twin

    def coarsely(*arguments: Any, **options: Any) -> Profile:
        return whole(*arguments, **{**options, "plan": plan})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator.ledger, "calibrate_twin", coarsely)
        patch.setattr(simulator.sensitivity, "open_workers", here)
        patch.setattr(simulator.bound, "CLOCKS_MHZ", (1200, 1980))
        patch.setattr(simulator.bound, "SHARES", (0.5, 1.0))
        patch.setattr(simulator.bound, "REQUESTS", 600)
        patch.setattr(simulator.bound, "PARTITIONS", (("all",), ("short", "long")))
        patch.setattr(simulator.energy_table, "REQUESTS", 100)
        arguments = ["--trace", str(file), "--nodes", "2", "--u", "0.5,0.3", "--seeds", "1", "--start-s", "20"]
        command = ["simulate", *arguments, "--cache", str(folder / "cache"), "--out", str(folder / "out"), "--json"]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    return result.stdout, folder / "out"


def test_the_object_has_every_key(out):
    printed = json.loads(out[0])
    assert printed.keys() >= TOP
    assert list(printed["systems"]) == SYSTEMS
    for name, system in printed["systems"].items():
        assert system.keys() >= KEYS, name
        # No whole hour of a short trace is judged.
        for key in KEYS - {"attainment_by_class", "attainment_worst_hour"}:
            assert isfinite(system[key]), (name, key)
        assert isinstance(system["meets_slo"], bool)
        assert system["attainment_by_class"]
        assert system["attainment"] == min(system["attainment_by_class"].values())
        assert "series" not in system
    assert printed["u"] == 0.5
    assert printed["k"] == pytest.approx(0.5 * printed["k_max"])
    assert 0 < printed["bound_saved_parked"] < printed["bound_saved_off"] < 1


def test_a_row_that_was_left_out_is_told(out):
    printed, html = json.loads(out[0]), (out[1] / "report.html").read_text(encoding="utf-8")
    assert printed["trace"]["skipped"]["rows"] == 1
    (named,) = printed["trace"]["skipped"]["examples"]
    assert "TIMESTAMP 'never'" in named
    assert any("1 rows of the trace were no request" in note for note in printed["notes"])
    assert "Rows left out (1)" in html


def test_figures_of_one_system_agree_with_each_other(out):
    printed = json.loads(out[0])
    base = printed["systems"]["singlepool"]
    for system in printed["systems"].values():
        states = system["energy_by_state_kwh"]
        assert system["energy_parked_kwh"] == pytest.approx(sum(states.values()), rel=1e-9)
        assert system["energy_off_kwh"] == pytest.approx(system["energy_parked_kwh"] - states["parked"], rel=1e-9)
        assert system["wall_kwh"] > system["energy_off_kwh"]
        assert system["saved_parked"] == pytest.approx(1 - system["energy_parked_kwh"] / base["energy_parked_kwh"])
        assert system["peak_gpus"] <= printed["gpus"]
        hours = printed["trace"]["window_s"] / 3600
        assert system["gpu_hours"] + system["gpu_hours_freed"] == pytest.approx(printed["gpus"] * hours, rel=1e-6)
        assert system["carbon_kg"] == pytest.approx(0.45 * system["energy_parked_kwh"])
        assert system["requests"] == base["requests"]


def test_the_other_load_stands_beside_the_headline(out):
    low, high = json.loads(out[0])["sensitivity"]["u"]
    assert (low["value"], low["headline"], high["value"], high["headline"]) == (0.3, False, 0.5, True)
    assert low["k_max"] == high["k_max"]
    assert list(low["systems"]) == SYSTEMS
    assert low["systems"]["singlepool"]["energy_parked_kwh"] < high["systems"]["singlepool"]["energy_parked_kwh"]


def test_the_folder_holds_the_courses_and_a_report_that_stands_alone(out):
    printed, folder = json.loads(out[0]), out[1]
    written = json.loads((folder / "result.json").read_text())
    for name, system in written["systems"].items():
        series = system.pop("series")
        assert printed["systems"][name] == system
        lengths = {len(series["minute"]), len(series["power_w"]), *(len(row) for row in series["gpus"].values())}
        assert len(lengths) == 1
        mean_w = sum(series["power_w"]) / len(series["power_w"])
        window_h = printed["trace"]["window_s"] / 3600
        assert mean_w * window_h / 1e3 == pytest.approx(system["energy_parked_kwh"], rel=0.02)

    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 8
    # Namespaces are names; nothing is fetched.
    for tag in ("<script", "<link", "<img", "src=", 'href="http', "@import", "url(http"):
        assert tag not in html, tag
    for system in printed["systems"].values():
        assert system["title"] in html
        if not system["meets_slo"]:
            assert f"{system['title']} misses the SLO" in html
    assert f"{printed['systems']['singlepool']['requests']:,} requests" in html
    assert 'class="best"' in html
    assert 'class="never"' in html
