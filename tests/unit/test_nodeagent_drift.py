"""Telling obedience from success: what counts as another writer, what as an alarm, and what is normal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.control.drift import LIMIT_SAMPLES, SAMPLES, clock_strays, drift_mhz
from nodeagent.control.results import Code
from nodeagent.control.settings import ClockLock, PowerLimit
from nodeagent.gpu.driver import GpuReading
from tests.controlrig import Rig
from tests.fakegpu import FakeDriver

LOCK = ClockLock(990, 1200)


@pytest.mark.parametrize(
    ("mhz", "busy", "reasons", "strays"),
    [
        (1110, 1.0, (), False),
        (1230, 1.0, (), False),  # two steps of the grid are nothing
        (1980, 1.0, (), True),
        (1980, 0.0, (), True),  # above its lock no clock has an excuse
        (1980, 1.0, ("sw_power_cap",), True),
        (600, 1.0, (), True),
        (600, 0.1, (), False),  # without load a GPU clocks as it likes
        (600, 1.0, ("sw_power_cap",), False),
        (600, 1.0, ("hw_thermal_slowdown",), False),
        (600, 1.0, ("applications_clocks_setting",), True),  # that is what another writer leaves
        (600, None, (), False),
    ],
)
def test_what_counts_as_another_writer(mhz: int, busy: float | None, reasons: tuple[str, ...], strays: bool) -> None:
    reading = GpuReading(sm_mhz=mhz, utilization_ratio=busy, event_reasons=reasons)
    assert clock_strays(reading, LOCK) is strays


def test_the_distance_from_a_lock() -> None:
    assert [drift_mhz(mhz, LOCK) for mhz in (900, 990, 1100, 1200, 1300)] == [-90, 0, 0, 0, 100]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = await Rig(tmp_path, FakeDriver()).open()
    yield made
    made.inventory.close()


def look(rig: Rig, reading: GpuReading, times: int = 1) -> tuple[str, ...]:
    worker = rig.inventory.find("GPU-0")
    assert worker is not None
    alarms: tuple[str, ...] = ()
    for _ in range(times):
        alarms = rig.controls.observe(worker, reading)
    return alarms


async def test_a_clock_that_keeps_off_its_lock_is_named_once_and_locked_again(rig: Rig) -> None:
    await rig.lock(990)
    free = GpuReading(sm_mhz=1980, utilization_ratio=1.0)
    assert look(rig, free, SAMPLES - 1) == ()
    assert look(rig, free, 10) == ("foreign_clock_lock",)
    count = rig.metrics.foreign_writes.labels("clock_lock")._value.get()
    assert count == 1
    rig.driver.gpus[0].lock_mhz = None
    result = await rig.lock(990)
    assert result.code is Code.FOREIGN_WRITER
    assert rig.driver.gpus[0].lock_mhz == (990, 990)
    assert (await rig.lock(990)).code is Code.APPLIED


async def test_one_odd_sample_is_nothing(rig: Rig) -> None:
    await rig.lock(990)
    odd, fine = GpuReading(sm_mhz=1980, utilization_ratio=1.0), GpuReading(sm_mhz=990, utilization_ratio=1.0)
    for _ in range(3 * SAMPLES):
        look(rig, odd)
        assert look(rig, fine) == ()


async def test_a_limit_changed_under_us_raises_an_alarm(rig: Rig) -> None:
    await rig.apply(PowerLimit(500.0))
    assert look(rig, GpuReading(power_limit_w=500.0), 5) == ()
    assert look(rig, GpuReading(power_limit_w=620.0), LIMIT_SAMPLES) == ("foreign_power_limit",)


async def test_a_cap_that_protects_is_written_again_at_once(rig: Rig) -> None:
    await rig.apply(PowerLimit(400.0, protects=True))
    rig.driver.gpus[0].limit_w = 700.0
    look(rig, GpuReading(power_limit_w=700.0), LIMIT_SAMPLES)
    await rig.controls.sweep()
    assert rig.driver.gpus[0].limit_w == 400.0


async def test_a_limit_nobody_asked_for_is_none_of_our_business(rig: Rig) -> None:
    assert look(rig, GpuReading(power_limit_w=123.0), 10) == ()


async def test_the_software_power_cap_is_normal_and_the_hardware_is_not(rig: Rig) -> None:
    assert look(rig, GpuReading(event_reasons=("sw_power_cap", "gpu_idle")), 10) == ()
    reasons = ("hw_power_brake_slowdown", "hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown")
    assert look(rig, GpuReading(event_reasons=reasons)) == reasons
