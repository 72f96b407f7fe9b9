"""Sensors that may not be believed stop a calibration, each with a sentence that says what to look at."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.calibrate.node import draw, energy_j
from controller.calibrate.sensors import GpuFacts, GpuReading, before, during

GPU = GpuReading(0.0, "GPU-1", True, 300.0, 0.0, False, (), (), 0)


def readings(seconds: int = 20, watts: float = 300.0) -> list[GpuReading]:
    return [replace(GPU, at_s=float(t), energy_j=watts * t) for t in range(seconds)]


def test_a_quiet_healthy_gpu_is_believed() -> None:
    assert during(readings()) == ""
    capped = [replace(r, reasons=("sw_power_cap", "gpu_idle")) for r in readings()]
    assert during(capped) == ""
    assert before([GpuFacts("a", 0, True, False)], []) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reasons": ("sw_power_cap", "hw_thermal_slowdown")}, "throttled"),
        ({"reasons": ("hw_power_brake_slowdown",)}, "throttled"),
        ({"healthy": False}, "unhealthy"),
        ({"energy_j": None}, "did not answer"),
        ({"integrated": True}, "no energy counter"),
        ({"alarms": ("foreign_clock_lock",)}, "another program"),
        ({"drift_mhz": -300}, "not at the lock"),
    ],
)
def test_one_bad_reading_is_told(changes: dict[str, object], says: str) -> None:
    good = readings()
    bad = [replace(r, **changes) if 5 <= i < 12 else r for i, r in enumerate(good)]  # type: ignore[arg-type]
    assert says in during(bad)
    assert during([replace(r, uuid="GPU-0") for r in good] + bad).startswith("GPU-1: ")


def test_counters_that_stand_still_run_backwards_or_do_not_fit_are_stale() -> None:
    stuck = [replace(r, energy_j=min(r.energy_j or 0.0, 1500.0)) for r in readings()]
    assert "stood still" in during(stuck)
    back = [*readings(10), replace(GPU, at_s=10.0, energy_j=5.0)]
    assert "backwards" in during(back)
    assert "which no GPU" in during(readings(watts=3.0))
    assert "no sample of it came for 8.0 s" in during([r for r in readings() if not 5 <= r.at_s <= 11])
    assert during([]) == "no telemetry came from the node"
    assert "only one sample" in during(readings(1))


def test_a_counter_that_ticks_slowly_is_no_stale_one() -> None:
    """Hardware counters may be renewed only every second or so."""
    slow = [replace(r, energy_j=300.0 * (r.at_s // 3 * 3)) for r in readings()]
    assert during(slow) == ""


def test_mig_engines_and_ill_gpus_stop_it_before_it_begins() -> None:
    assert "MIG" in before([GpuFacts("a", 3, True, True)], [])
    assert "GPU 2 is not healthy: fell off" in before([GpuFacts("a", 2, False, False, "fell off")], [])
    assert "not idle: e1, e2" in before([], ["e2", "e1"])


def test_energy_is_that_between_the_samples_around_the_span() -> None:
    both = readings(20, 300.0) + [replace(r, uuid="GPU-2") for r in readings(20, 100.0)]
    watts, seconds = energy_j(both, 4.5, 10.5)
    assert watts == pytest.approx(400.0)
    assert seconds == 7.0


def test_equal_seeds_draw_equal_requests_at_every_rate() -> None:
    sizes = [(100, 10), (2000, 50)]
    slow, fast = draw(sizes, 1.0, 50, 3), draw(sizes, 5.0, 50, 3)
    assert [r[1:] for r in slow] == [r[1:] for r in fast]
    assert slow[-1][0] == pytest.approx(5 * fast[-1][0])
