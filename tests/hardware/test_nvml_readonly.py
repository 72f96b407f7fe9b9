"""The driver on a real GPU, where there is one: reads only, never changes a card's settings."""

from __future__ import annotations

import os

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
