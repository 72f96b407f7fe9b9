"""One core, two worlds: the demonstration's minutes in real time, with processes, and again in virtual time.

The static fleet pins the physics: nothing is decided there, so energy and latency must agree closely. The controlled
fleet pins the loop: same first layout, like energy, clocks and number of decisions. What may differ is timing noise:
real ticks and telemetry fall at other instants of the same load.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.demo_run import DemoRun, prepared
from tests.worlds import World, real, virtual

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# A token that the engine had ready so much earlier than the client read it was kept by this machine, not by the fleet:
# real time is measured again then, a few times.
BUSY_MS = 40.0
RUNS = 3


@dataclass(frozen=True)
class Finished:
    folder: Path
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    prepared()
    for run in range(RUNS):
        with DemoRun(tmp_path_factory.mktemp("worlds"), "--quick", "--seed", "2") as demo:
            found = Finished(demo.folder, demo.figures())
        kept_ms = max(phase["client_overhead_ms"]["p99"] for phase in found.figures["phases"].values())
        if kept_ms <= BUSY_MS:
            break
        warnings.warn(f"run {run + 1}: the machine kept tokens for {kept_ms:.0f} ms (P99)", stacklevel=1)
    return found


@pytest.fixture(scope="module")
def static(finished: Finished) -> tuple[World, World]:
    return both(finished, "baseline")


@pytest.fixture(scope="module")
def controlled(finished: Finished) -> tuple[World, World]:
    return both(finished, "dynamollm")


def both(finished: Finished, fleet: str) -> tuple[World, World]:
    warm_up_s = finished.figures["facts"]["warm_up_s"]
    folder = finished.folder / fleet
    return real(folder, finished.figures["phases"][fleet], warm_up_s), virtual(folder, warm_up_s)


def test_static_fleet_spends_the_same_energy(static: tuple[World, World]) -> None:
    measured, computed = static
    assert computed.energy_j == pytest.approx(measured.energy_j, rel=0.03)
    assert computed.mean_sm_mhz == pytest.approx(measured.mean_sm_mhz, rel=0.001)


def test_static_fleet_is_as_fast(static: tuple[World, World]) -> None:
    measured, computed = static
    assert computed.tbt_p50_ms == pytest.approx(measured.tbt_p50_ms, rel=0.05)
    assert computed.ttft_p50_ms.keys() == measured.ttft_p50_ms.keys() != set()
    for bucket, ttft_ms in computed.ttft_p50_ms.items():
        # The real way through client and gateway adds some milliseconds, on a busy machine more.
        assert 0.7 * ttft_ms - 5 <= measured.ttft_p50_ms[bucket] <= 1.3 * ttft_ms + 25


def test_the_same_first_decision(controlled: tuple[World, World], static: tuple[World, World]) -> None:
    for measured, computed in (controlled, static):
        assert computed.first_layout == measured.first_layout


def test_controlled_fleet_spends_like_energy_at_like_clocks(controlled: tuple[World, World]) -> None:
    measured, computed = controlled
    # Within a dozen seconds one instance standing by a moment longer is several percent: real runs differ by 5 % among
    # themselves, and the virtual ones spend 4 to 12 % more.
    assert computed.energy_j == pytest.approx(measured.energy_j, rel=0.2)
    # For the same reason: real runs had 988 to 1,127 MHz where the virtual one has 1,189: one at 210 MHz more or less.
    assert computed.mean_sm_mhz == pytest.approx(measured.mean_sm_mhz, rel=0.25)


def test_controlled_fleet_decides_as_often(controlled: tuple[World, World]) -> None:
    measured, computed = controlled
    for level in ("cluster", "pool", "instance"):
        assert 0.4 * measured.decisions[level] <= computed.decisions[level] <= 2.5 * measured.decisions[level] + 2


def test_both_worlds_find_control_cheaper_and_fast_enough(
    controlled: tuple[World, World], static: tuple[World, World]
) -> None:
    for steered, fixed in zip(controlled, static, strict=True):
        assert steered.energy_j < fixed.energy_j
        assert steered.in_slo > 0.9
