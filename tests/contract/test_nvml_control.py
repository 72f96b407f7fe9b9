"""Locks, limits and energy of emulated GPUs: what a client sets and what then shows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulator.host.nvml.state import Board, HostState
from tests.nvml_client import NvmlClient, NvmlFailure

INVALID_ARGUMENT = 2
GPU_IDLE, SW_POWER_CAP = 0x1, 0x4
TDP, UNLIMITED = 0xFFFFFF01, 0xFFFFFF02
IDLE_POWER_W = ((210, 75.0), (1000, 86.0), (1980, 122.0))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostState]:
    state = HostState.create(tmp_path / "gpus", board=Board(idle_power_w=IDLE_POWER_W))
    yield state
    state.close()


@pytest.fixture
def client(host: HostState) -> Iterator[NvmlClient]:
    with NvmlClient(host.path) as process:
        yield process


# --- SM clock ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "locked"),
    [
        ((1410, 1410), (1410, 1410)),
        ((1400, 1400), (1395, 1395)),  # between two steps: the lower one, never more than asked for
        ((209, 211), (210, 210)),
        ((0, 1200), (210, 1200)),
        ((1200, 5000), (1200, 1980)),
        ((210, 1980), (210, 1980)),
        ((TDP, TDP), (1980, 1980)),
        ((UNLIMITED, TDP), (210, 1980)),
        ((UNLIMITED, UNLIMITED), None),
    ],
)
def test_locks_snap_to_the_grid(
    host: HostState, client: NvmlClient, asked: tuple[int, int], locked: tuple[int, int] | None
) -> None:
    client.call("nvmlDeviceSetGpuLockedClocks", *asked, gpu=0)
    assert host.lock(0) == locked
    assert host.effective_clock_mhz(0) == (locked[1] if locked else 1980)


@pytest.mark.parametrize("asked", [(1410, 900), (0, 100), (1995, 2100), (TDP, 1980), (900, UNLIMITED)])
def test_impossible_locks_are_refused_and_change_nothing(
    host: HostState, client: NvmlClient, asked: tuple[int, int]
) -> None:
    client.call("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=0)
    with pytest.raises(NvmlFailure) as failure:
        client.call("nvmlDeviceSetGpuLockedClocks", *asked, gpu=0)
    assert failure.value.code == INVALID_ARGUMENT
    assert host.lock(0) == (900, 900)


def test_a_lock_lowers_clock_and_idle_power_at_once(host: HostState, client: NvmlClient) -> None:
    host.attach_process(0, os.getpid(), 1 << 30)
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 122_000
    client.call("nvmlDeviceSetGpuLockedClocks", 600, 600, gpu=0)
    assert client.call("nvmlDeviceGetClockInfo", 1, gpu=0) == 600
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == pytest.approx(75_000 + 11_000 * 390 / 790, abs=1)
    client.call("nvmlDeviceResetGpuLockedClocks", gpu=0)
    assert client.call("nvmlDeviceGetClockInfo", 1, gpu=0) == 1980
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 122_000


def test_a_lock_bounds_the_clock_of_work(host: HostState, client: NvmlClient) -> None:
    host.set_activity(0, 500.0, 100)
    client.call("nvmlDeviceSetGpuLockedClocks", 210, 1200, gpu=0)
    assert client.call("nvmlDeviceGetClockInfo", 1, gpu=0) == 1200
    # A lock is a wish, not a reason to run below it: no bit.
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=0) == 0


def test_memory_clock_locks(host: HostState, client: NvmlClient) -> None:
    client.call("nvmlDeviceSetMemoryLockedClocks", 1593, 1593, gpu=0)
    assert client.call("nvmlDeviceGetClockInfo", 2, gpu=0) == 1593
    client.call("nvmlDeviceResetMemoryLockedClocks", gpu=0)
    assert client.call("nvmlDeviceGetClockInfo", 2, gpu=0) == 2619
    with pytest.raises(NvmlFailure, match="Invalid Argument"):
        client.call("nvmlDeviceSetMemoryLockedClocks", 100, 200, gpu=0)


# --- power limit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit_mw", [199_999, 700_001, 0])
def test_power_limits_out_of_range_are_refused(host: HostState, client: NvmlClient, limit_mw: int) -> None:
    with pytest.raises(NvmlFailure) as failure:
        client.call("nvmlDeviceSetPowerManagementLimit", limit_mw, gpu=0)
    assert failure.value.code == INVALID_ARGUMENT
    assert host.power_limit_w(0) == 700.0


def test_power_over_the_limit_is_clipped_and_says_why(host: HostState, client: NvmlClient) -> None:
    host.set_activity(0, 620.0, 100)
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=0) == 0
    client.call("nvmlDeviceSetPowerManagementLimit", 400_000, gpu=0)
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 400_000
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=0) == SW_POWER_CAP
    host.set_activity(0, 0.0)
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=0) == GPU_IDLE


def test_a_clock_held_down_by_the_limit_shows(host: HostState, client: NvmlClient) -> None:
    client.call("nvmlDeviceSetPowerManagementLimit", 400_000, gpu=0)
    clock_mhz = host.effective_clock_mhz(0, lambda mhz: 100 + 0.25 * mhz)
    assert clock_mhz == 1200  # 100 W + 0.25 W/MHz · 1200 MHz = 400 W
    host.set_activity(0, 400.0, 100, clock_mhz=clock_mhz)
    assert client.call("nvmlDeviceGetClockInfo", 1, gpu=0) == 1200
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=0) == SW_POWER_CAP
    # A lock below it is what holds the clock then, not the limit.
    client.call("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=0)
    assert host.effective_clock_mhz(0, lambda mhz: 100 + 0.25 * mhz) == 900
    assert client.call("nvmlDeviceGetClockInfo", 1, gpu=0) == 900
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=0) == 0


def test_no_clock_meets_a_limit_below_all_of_them(host: HostState) -> None:
    assert host.effective_clock_mhz(0, lambda mhz: 1000.0 + mhz) == 210


# --- energy --------------------------------------------------------------------------------------------------------


def test_energy_is_the_integral_of_power(host: HostState, client: NvmlClient) -> None:
    expected_j, before = 0.0, host.observe(0)
    for power_w in (250.0, 640.0, 400.0):
        host.set_activity(0, power_w)
        start = host.observe(0)
        time.sleep(0.05)
        expected_j += power_w * (host.observe(0).at_s - start.at_s)
    after = host.observe(0)
    # What lies between the bracketing looks is at most 640 W for as long as they took.
    slack_j = 640.0 * (after.at_s - before.at_s) - expected_j
    assert expected_j <= after.energy_j - before.energy_j <= expected_j + slack_j
    # NVML shows the same counter, in whole millijoules.
    shown_mj = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=0)
    assert after.energy_j * 1000 - 1 <= shown_mj <= host.observe(0).energy_j * 1000


def test_energy_follows_the_clock_of_an_idle_engine(host: HostState, client: NvmlClient) -> None:
    host.attach_process(0, os.getpid(), 1 << 30)
    client.call("nvmlDeviceSetGpuLockedClocks", 1000, 1000, gpu=0)  # snaps to 990
    start = host.observe(0)
    time.sleep(0.1)
    end = host.observe(0)
    mean_w = (end.energy_j - start.energy_j) / (end.at_s - start.at_s)
    assert mean_w == pytest.approx(start.power_w, rel=1e-3)
    assert 75.0 < mean_w < 86.0


def test_the_counter_never_steps_back(host: HostState, client: NvmlClient) -> None:
    last_mj, last_j = 0, 0.0
    for turn in range(300):
        host.set_activity(0, 700.0 if turn % 2 else 80.0)
        now_j = host.observe(0).energy_j
        now_mj = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=0)
        assert now_mj >= last_mj
        assert now_j >= last_j
        last_mj, last_j = now_mj, now_j


def test_counter_reset(host: HostState, client: NvmlClient) -> None:
    host.set_activity(0, 700.0)
    time.sleep(0.05)
    before_mj = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=0)
    others_mj = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=1)
    host.reset_energy(0)
    reset = host.observe(0)
    assert before_mj > 35_000
    # Only what accrued since: less than 700 W from the reset on.
    assert reset.energy_j < before_mj / 1000
    assert client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=1) >= others_mj
    time.sleep(0.02)
    assert host.observe(0).energy_j > reset.energy_j + 700 * 0.02 * 0.99


# --- persistence ---------------------------------------------------------------------------------------------------


def test_persistence_mode(host: HostState, client: NvmlClient) -> None:
    client.call("nvmlDeviceSetPersistenceMode", 0, gpu=0)
    assert client.call("nvmlDeviceGetPersistenceMode", gpu=0) == 0
    assert not host.observe(0).persistence
    assert host.observe(1).persistence
