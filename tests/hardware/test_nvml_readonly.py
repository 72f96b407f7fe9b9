"""The driver on a real GPU, where there is one: reads only, never changes a card's settings.

Unless DYNAMOLLM_OWN_GPUS=1 says that the machine is ours alone: then a clock is locked and freed again, and the power
limit set to what it is.
"""

from __future__ import annotations

import os
import time

import pytest

from nodeagent.gpu.driver import DriverUnavailable
from nodeagent.gpu.nvml import NvmlDriver


@pytest.fixture(scope="module")
def driver() -> NvmlDriver:
    if "DYNAMOLLM_NVML_STATE" in os.environ:
        pytest.skip("the NVML of this environment is the emulated one, not a GPU's")
    try:
        found = NvmlDriver()
    except DriverUnavailable as error:
        pytest.skip(f"no NVIDIA GPU on this machine: {error}")
    if found.count() == 0:
        pytest.skip("no NVIDIA GPU on this machine: the driver shows none")
    return found


def test_every_gpu_has_sane_facts(driver: NvmlDriver) -> None:
    assert driver.version()
    for index in range(driver.count()):
        facts = driver.open_index(index).facts()
        assert facts.uuid.startswith("GPU-")
        assert facts.index == index
        assert facts.name
        assert facts.memory_bytes > 1 << 30
        assert list(facts.sm_clocks_mhz) == sorted(set(facts.sm_clocks_mhz))
        if facts.max_power_limit_w > 0:
            assert facts.min_power_limit_w <= facts.default_power_limit_w <= facts.max_power_limit_w < 3000


def test_every_gpu_can_be_read(driver: NvmlDriver) -> None:
    for index in range(driver.count()):
        device = driver.open_index(index)
        first, second = device.read(), device.read()
        assert first.power_w is None or 1 < first.power_w < 3000
        assert first.temperature_c is None or 0 < first.temperature_c < 120
        assert first.memory_temperature_c is None or 0 < first.memory_temperature_c < 130
        assert first.utilization_ratio is None or 0 <= first.utilization_ratio <= 1
        if first.energy_counter_j is not None and second.energy_counter_j is not None:
            assert second.energy_counter_j >= first.energy_counter_j
        assert not [reason for reason in first.event_reasons if reason.startswith("unknown")]
        use = device.use()
        assert use.memory_used_bytes <= device.facts().memory_bytes


def test_a_gpu_is_found_again_by_its_uuid(driver: NvmlDriver) -> None:
    for index in range(driver.count()):
        uuid = driver.open_index(index).uuid
        assert driver.open_uuid(uuid).facts().index == index


@pytest.mark.skipif(
    os.environ.get("DYNAMOLLM_OWN_GPUS") != "1", reason="changes settings; DYNAMOLLM_OWN_GPUS=1 allows it"
)
def test_settings_can_be_changed_and_put_back(driver: NvmlDriver) -> None:
    if os.geteuid() != 0:
        pytest.skip("the driver lets only root change settings")
    device = driver.open_index(0)
    facts = device.facts()
    if not facts.sm_clocks_mhz:
        pytest.skip("this GPU has no clocks to lock")
    middle_mhz = facts.sm_clocks_mhz[len(facts.sm_clocks_mhz) // 2]
    try:
        device.lock_clocks_mhz(facts.sm_clocks_mhz[0], middle_mhz)
        time.sleep(0.5)
        assert device.sm_mhz() <= middle_mhz + 30
    finally:
        device.reset_clocks()
    limit_w = device.power_limit_w()
    device.set_power_limit_w(limit_w)
    assert device.power_limit_w() == pytest.approx(limit_w, abs=0.5)
