"""Caps that protect a breaker: they outlive leases, agents and reboots, and only the right owner takes them away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.control.caps import load
from nodeagent.control.leases import Owner, OwnerKind
from nodeagent.control.results import Code, Result
from nodeagent.control.settings import ClockLock, ControlKind, MemoryClockLock, PowerLimit
from nodeagent.gpu.driver import GpuError
from tests.controlrig import CONTROLLER, OPERATOR, Rig
from tests.fakegpu import FakeDriver

WRITE = "nodeagent.control.journal.write_durably"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = await Rig(tmp_path, FakeDriver()).open()
    yield made
    made.inventory.close()


async def cap(rig: Rig, watts: float, owner: Owner = CONTROLLER, ttl_s: float = 10.0) -> Result:
    return (await rig.apply(PowerLimit(watts, protects=True), owner=owner, ttl_s=ttl_s))[0]


def limit_w(rig: Rig) -> float:
    return rig.driver.gpus[0].limit_w


def full(path: Path, data: bytes, mode: int = 0) -> None:
    raise OSError(28, "No space left on device")


async def test_a_cap_stays_when_its_lease_ends_and_goes_when_released(rig: Rig) -> None:
    assert (await cap(rig, 400.0)).code is Code.APPLIED
    await rig.after(1000.0)
    assert limit_w(rig) == 400.0
    ((_, setting, lease, left_s),) = rig.controls.held()
    assert (setting, lease.owner, left_s) == (PowerLimit(400.0, protects=True), CONTROLLER, 0.0)
    (released,) = await rig.controls.release(CONTROLLER, 1, [], "done")
    assert released.code is Code.APPLIED
    assert limit_w(rig) == 650.0  # as found, not as the factory set it
    assert rig.controls.held() == []


async def test_a_cap_is_on_disk_before_the_write(rig: Rig) -> None:
    seen: list[float] = []
    rig.driver.gpus[0].on_write = lambda what: seen.extend(c.limit_w for c in load(rig.path / "caps.json", "boot-1"))
    await cap(rig, 400.0)
    assert seen == [400.0]


async def test_a_cap_survives_stop_and_crash_and_the_found_limit_is_still_known(rig: Rig) -> None:
    await cap(rig, 400.0)
    assert await rig.controls.close() == []
    assert limit_w(rig) == 400.0
    heir = await Rig(rig.path, rig.driver).open()
    await heir.controls.sweep()
    assert limit_w(heir) == 400.0
    await heir.controls.release(CONTROLLER, 1, [], "done")
    assert limit_w(heir) == 650.0
    heir.inventory.close()


async def test_after_a_reboot_the_cap_is_written_before_anything_is_served(rig: Rig) -> None:
    await cap(rig, 400.0)
    rig.driver.gpus[0].limit_w = 690.0  # what the boot scripts set
    heir = await Rig(rig.path, rig.driver).open("boot-2")
    await heir.controls.sweep()
    assert limit_w(heir) == 400.0
    await heir.controls.release(CONTROLLER, 1, [], "done")
    assert limit_w(heir) == 690.0
    heir.inventory.close()


async def test_plain_limits_live_under_the_cap(rig: Rig) -> None:
    await cap(rig, 400.0)
    (above,) = await rig.apply(PowerLimit(600.0), ttl_s=5.0)
    assert above.code is Code.APPLIED
    assert above.applied == PowerLimit(400.0)
    (below,) = await rig.apply(PowerLimit(300.0), ttl_s=5.0)
    assert below.applied == PowerLimit(300.0)
    assert limit_w(rig) == 300.0
    await rig.after(6.0)
    assert limit_w(rig) == 400.0  # the plain limit's safe state is the cap now
    await rig.controls.release(CONTROLLER, 1, [], "done")
    assert limit_w(rig) == 650.0


async def test_the_lowest_of_several_caps_counts_and_a_weaker_owner_cannot_lift_a_stronger_ones(rig: Rig) -> None:
    await cap(rig, 500.0, OPERATOR)
    weaker = await cap(rig, 600.0)
    assert weaker.code is Code.APPLIED
    assert weaker.applied == PowerLimit(500.0, protects=True)
    await rig.controls.release(CONTROLLER, 1, ["GPU-0"], "done")
    assert limit_w(rig) == 500.0
    await cap(rig, 450.0)
    await rig.controls.release(OPERATOR, 0, ["GPU-0"], "all of it")  # named: the weaker one's goes as well
    assert limit_w(rig) == 650.0


async def test_a_clock_is_let_go_without_its_cap_and_the_other_way_round(rig: Rig) -> None:
    await cap(rig, 500.0)
    await rig.apply(ClockLock(990, 990))
    await rig.controls.release(CONTROLLER, 1, ["GPU-0"], "full clock", {ControlKind.CLOCK_LOCK})
    assert rig.driver.gpus[0].lock_mhz is None
    assert limit_w(rig) == 500.0
    await rig.apply(ClockLock(990, 990))
    await rig.controls.release(CONTROLLER, 1, ["GPU-0"], "no budget", {ControlKind.POWER_LIMIT})
    assert rig.driver.gpus[0].lock_mhz is not None
    assert limit_w(rig) == 650.0


async def test_a_plain_lease_becomes_a_cap(rig: Rig) -> None:
    await rig.apply(PowerLimit(500.0))
    await cap(rig, 450.0)
    assert rig.on_disk() == []  # nothing is left that would be restored
    await rig.after(100.0)
    assert limit_w(rig) == 450.0
    await rig.controls.release(CONTROLLER, 1, [], "done")
    assert limit_w(rig) == 650.0


async def test_an_owner_may_raise_its_own_cap(rig: Rig) -> None:
    await cap(rig, 400.0)
    await cap(rig, 550.0)
    assert limit_w(rig) == 550.0


async def test_a_cap_that_cannot_be_recorded_is_not_written(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WRITE, full)
    assert (await cap(rig, 400.0)).code is Code.JOURNAL_FAILED
    assert limit_w(rig) == 650.0
    assert rig.controls.held() == []


async def test_a_cap_that_could_not_be_written_is_tried_on(rig: Rig) -> None:
    rig.driver.gpus[0].fault = GpuError("unknown error")
    assert (await cap(rig, 400.0)).code is Code.DRIVER_ERROR
    rig.driver.gpus[0].fault = None
    await rig.after(1.1)
    assert limit_w(rig) == 400.0


async def test_a_driver_reload_does_not_lose_the_cap(rig: Rig) -> None:
    await cap(rig, 400.0)
    rig.driver.gpus[0].limit_w = 700.0
    worker = rig.inventory.find("GPU-0")
    assert worker is not None
    worker.generation += 1  # as after the GPU was lost and found
    await rig.after(0.0)
    assert limit_w(rig) == 400.0


async def test_an_unreadable_file_of_caps_means_that_limits_stay(rig: Rig) -> None:
    await cap(rig, 400.0)
    (rig.path / "caps.json").write_bytes(b"{")
    heir = await Rig(rig.path, rig.driver).open()
    await heir.controls.sweep()
    assert limit_w(heir) == 400.0
    assert list(rig.path.glob("caps.json.unreadable-*"))
    await heir.controls.release(CONTROLLER, 1, [], "not mine to lift any more")
    assert limit_w(heir) == 400.0
    await heir.controls.release(OPERATOR, 0, ["GPU-0"], "looked at")
    assert limit_w(heir) == 700.0
    heir.inventory.close()


async def test_memory_clocks_are_locked_and_unlocked(rig: Rig) -> None:
    (result,) = await rig.apply(MemoryClockLock(1600, 2000), ttl_s=5.0)
    assert result.applied == MemoryClockLock(1593, 1593)
    assert rig.driver.gpus[0].memory_lock_mhz == (1593, 1593)
    assert rig.driver.gpus[0].lock_mhz is None
    await rig.after(6.0)
    assert rig.driver.gpus[0].memory_lock_mhz is None


async def test_another_writer_of_the_limit_is_named_on_renewal(rig: Rig) -> None:
    await rig.apply(PowerLimit(500.0))
    rig.driver.gpus[0].limit_w = 620.0
    (result,) = await rig.apply(PowerLimit(500.0))
    assert result.code is Code.FOREIGN_WRITER
    assert "620 W instead of 500 W" in result.detail
    assert limit_w(rig) == 500.0
    assert len(rig.controls.held()) == 1


async def test_the_guard_may_not_be_spoken_for(rig: Rig) -> None:
    with pytest.raises(Exception, match="nobody may speak for it"):
        await cap(rig, 400.0, Owner(OwnerKind.GUARD, "me"))
