"""The whole demonstration, end to end: real processes, real interfaces, honest figures, nothing left behind."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path

import pytest

from tests.demo_run import DemoRun, prepared, wait_for

PROMISED = {
    *("requests_sent", "requests_served", "requests_lost", "energy_j", "baseline_energy_j", "slo_attainment"),
    *("baseline_slo_attainment", "decisions", "clock_locks_applied", "switches", "u", "database"),
}


@pytest.fixture(scope="module", autouse=True)
def _profile() -> None:
    prepared()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_quick_demonstration_measures_both_fleets_under_one_load(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--quick", "--u", "0.4", "--seed", "3") as demo:
        figures = demo.figures()
        assert demo.left_over() == []
    assert figures.keys() >= PROMISED
    control, baseline = figures["phases"]["dynamollm"], figures["phases"]["baseline"]
    assert figures["requests_sent"] == baseline["requests"]["sent"] > 20
    assert figures["requests_served"] + figures["requests_lost"] == figures["requests_sent"]
    assert figures["requests_lost"] == 0
    assert baseline["requests"]["lost"] == 0

    # Physically possible: 16 GPUs between parked (72 W) and their limit (700 W), all of their time accounted for.
    for phase in (control, baseline):
        energy = phase["energy"]
        assert 16 * 72 <= energy["mean_power_w"] <= 16 * 700
        assert sum(energy["by_state_j"].values()) == pytest.approx(energy["total_j"])
        assert energy["coverage"] == pytest.approx(1.0, abs=0.05)
        assert phase["client_overhead_ms"]["p50"] > 0
    assert figures["energy_j"] == control["energy"]["total_j"]

    # The static fleet is what it claims to be, and the other one was steered.
    assert baseline["energy"]["mean_sm_mhz"] == pytest.approx(1980, abs=1)
    assert baseline["control"]["clock_locks_applied"] == 0
    assert set().union(*baseline["ready_by_tp"]) == {"8"}
    assert {counts["8"] for counts in baseline["ready_by_tp"]} == {2}
    assert control["energy"]["mean_sm_mhz"] < 1980
    assert figures["clock_locks_applied"] > 0
    assert all(figures["decisions"][level] > 0 for level in ("cluster", "pool", "instance"))
    assert figures["energy_j"] < figures["baseline_energy_j"]
    assert 0 < figures["slo_attainment"] <= 1

    # What the table says is what the database holds.
    with sqlite3.connect(f"file:{figures['database']}?mode=ro", uri=True) as history:
        counted = dict(history.execute("SELECT level, COUNT(*) FROM decisions GROUP BY level"))
    assert counted == figures["decisions"]
    output = demo.output
    for text in ("requests sent / served / lost", "Shortened by configuration", "SELECT", figures["database"]):
        assert text in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_interrupted_it_ends_every_process_that_it_started(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--quick", "--u", "0.4") as demo:
        demo.wait_for_load()
        assert len(demo.left_over()) > 8  # itself, eight parts, engines
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(40) == 130
        wait_for(lambda: demo.left_over() == [], 5.0, "every process is gone")
        assert "Traceback" not in demo.output
        assert json.loads((demo.folder / "processes.json").read_text()) == {}
