"""Leased controls over fake GPUs: what is written, in which order, who wins, and what is left behind."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.config import ControlsConfig
from nodeagent.control.leases import Owner, OwnerKind
from nodeagent.control.results import Code, Wish
from nodeagent.control.settings import ClockLock, ControlKey, ControlKind, PowerLimit, Setting
from nodeagent.errors import Invalid, Precondition, Unavailable
from nodeagent.files import write_durably
from nodeagent.gpu.driver import GpuError, GpuPermission
from tests.controlrig import CONTROLLER, OPERATOR, Rig
from tests.fakegpu import FakeDriver, FakeGpu

WRITE = "nodeagent.control.journal.write_durably"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = await Rig(tmp_path, FakeDriver()).open()
    yield made
    made.inventory.close()


def gpu(rig: Rig, index: int = 0) -> FakeGpu:
    return rig.driver.gpus[index]


async def test_a_lock_is_clamped_written_and_reported(rig: Rig) -> None:
    result = (await rig.apply(ClockLock(1000, 5000)))[0]
    assert result.code is Code.APPLIED
    assert result.requested == ClockLock(1000, 5000)
    assert result.applied == ClockLock(990, 1980)
    assert result.observed.sm_mhz == 1980
    assert gpu(rig).lock_mhz == (990, 1980)
    assert rig.controls.locked("GPU-0") == ClockLock(990, 1980)
    assert rig.controls.locked("GPU-1") is None


async def test_the_journal_is_on_disk_before_the_write(rig: Rig) -> None:
    seen: list[list[ControlKey]] = []
    gpu(rig).on_write = lambda what: seen.append(rig.on_disk())
    await rig.lock()
    assert seen == [[ControlKey("GPU-0", ControlKind.CLOCK_LOCK)]]


async def test_the_journal_is_cleared_after_the_restore(rig: Rig) -> None:
    await rig.lock()
    seen: list[list[ControlKey]] = []
    gpu(rig).on_write = lambda what: seen.append(rig.on_disk())
    await rig.after(15.0)
    assert gpu(rig).lock_mhz is None
    assert seen == [[ControlKey("GPU-0", ControlKind.CLOCK_LOCK)]]  # still there while it was being restored
    assert rig.on_disk() == []


async def test_a_lease_holds_until_its_end_and_no_longer(rig: Rig) -> None:
    await rig.lock(ttl_s=10.0)
    await rig.after(9.999)
    assert gpu(rig).lock_mhz == (990, 990)
    await rig.after(0.001)
    assert gpu(rig).lock_mhz is None
    assert rig.controls.held() == []


async def test_repeating_a_lock_renews_it_without_a_write(rig: Rig) -> None:
    await rig.lock(ttl_s=10.0)
    await rig.after(8.0)
    again = await rig.lock(995, ttl_s=10.0)  # another request, the same clock after clamping
    await rig.after(8.0)
    assert again.code is Code.APPLIED
    assert gpu(rig).calls == ["lock 990-990"]
    assert gpu(rig).lock_mhz == (990, 990)


async def test_after_a_restore_the_same_lock_is_written_again(rig: Rig) -> None:
    await rig.lock(ttl_s=10.0)
    await rig.after(10.0)
    assert rig.controls.locked("GPU-0") is None
    await rig.lock(ttl_s=10.0)
    assert gpu(rig).lock_mhz == (990, 990)


async def test_a_changed_lock_needs_no_second_journal_entry(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.lock(990)

    def refuse(path: Path, data: bytes) -> None:
        raise AssertionError("the journal was written again")

    monkeypatch.setattr(WRITE, refuse)
    assert (await rig.lock(1200)).code is Code.APPLIED
    assert gpu(rig).lock_mhz == (1200, 1200)


async def test_a_power_limit_goes_back_to_what_was_found_not_to_the_factory_value(rig: Rig) -> None:
    gpu(rig).limit_w = 612.0
    for watts in (500.0, 100.0):
        result = (await rig.apply(PowerLimit(watts)))[0]
        assert result.code is Code.APPLIED
    assert result.applied == PowerLimit(200.0)
    assert result.observed.power_limit_w == 200.0
    await rig.after(15.0)
    assert gpu(rig).limit_w == 612.0


@pytest.mark.parametrize(
    "setting", [ClockLock(0, 0), ClockLock(1500, 1200), PowerLimit(0.0), PowerLimit(-5.0), PowerLimit(math.nan)]
)
async def test_senseless_values_are_out_of_range(rig: Rig, setting: Setting) -> None:
    assert (await rig.apply(setting))[0].code is Code.OUT_OF_RANGE
    assert gpu(rig).calls == []


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, math.nan, math.inf, 121.0])
async def test_a_lease_needs_a_sane_ttl(rig: Rig, ttl_s: float) -> None:
    with pytest.raises(Invalid, match="ttl_s"):
        await rig.lock(ttl_s=ttl_s)
    assert gpu(rig).calls == []


async def test_one_bad_gpu_does_not_hide_the_others(rig: Rig) -> None:
    wishes = [Wish("GPU-9", ClockLock(990, 990)), Wish("GPU-0", ClockLock(990, 990)), Wish("GPU-1", ClockLock(9, 1))]
    results = await rig.controls.apply(CONTROLLER, "test", 15.0, 1, wishes)
    assert [result.code for result in results] == [Code.UNKNOWN_GPU, Code.APPLIED, Code.OUT_OF_RANGE]


async def test_a_mig_gpu_is_left_alone(tmp_path: Path) -> None:
    driver = FakeDriver()
    driver.gpus[0].mig = True
    rig = await Rig(tmp_path, driver).open()
    assert (await rig.lock()).code is Code.MIG_ENABLED
    assert driver.gpus[0].calls == []


async def test_a_control_switched_off_is_unsupported(tmp_path: Path) -> None:
    rig = await Rig(tmp_path, FakeDriver(), ControlsConfig(clock_lock=False)).open()
    assert (await rig.lock()).code is Code.UNSUPPORTED
    assert gpu(rig).calls == []


async def test_an_operator_overrides_and_shields_from_the_controller(rig: Rig) -> None:
    await rig.lock(990)
    assert (await rig.lock(1500, owner=OPERATOR, ttl_s=100.0)).code is Code.APPLIED
    refused = await rig.lock(990)
    assert refused.code is Code.HELD
    assert "operator 'ada'" in refused.detail
    assert gpu(rig).lock_mhz == (1500, 1500)
    await rig.after(100.0)
    assert gpu(rig).lock_mhz is None
    assert (await rig.lock(990)).code is Code.APPLIED


async def test_nobody_speaks_for_the_guard(rig: Rig) -> None:
    with pytest.raises(Invalid, match="guard"):
        await rig.lock(owner=Owner(OwnerKind.GUARD, "me"))


async def test_release_restores_at_once_and_only_ones_own(rig: Rig) -> None:
    await rig.lock(990, gpu=0)
    await rig.lock(1500, gpu=1, owner=OPERATOR)
    results = await rig.controls.release(CONTROLLER, 1, [], "done")
    assert [(r.gpu_uuid, r.code) for r in results] == [("GPU-0", Code.APPLIED)]
    assert gpu(rig, 0).lock_mhz is None
    assert gpu(rig, 1).lock_mhz == (1500, 1500)
    held = await rig.controls.release(CONTROLLER, 1, ["GPU-1", "GPU-0", "GPU-7"], "done")
    assert {r.gpu_uuid: r.code for r in held} == {
        "GPU-0": Code.APPLIED,
        "GPU-1": Code.HELD,
        "GPU-7": Code.UNKNOWN_GPU,
    }
    await rig.lock(990, gpu=0)
    await rig.controls.release(OPERATOR, 0, ["GPU-0", "GPU-1"], "reset")
    assert gpu(rig, 0).lock_mhz is None
    assert gpu(rig, 1).lock_mhz is None


async def test_an_older_term_has_no_effect(rig: Rig) -> None:
    await rig.apply(ClockLock(990, 990), term=7)
    with pytest.raises(Precondition, match="term 6 is older than 7"):
        await rig.apply(ClockLock(1200, 1200), term=6)
    with pytest.raises(Precondition):
        await rig.controls.release(CONTROLLER, 6, [], "late")
    assert gpu(rig).lock_mhz == (990, 990)


async def test_a_second_controller_of_the_same_term_is_refused_while_the_first_holds(rig: Rig) -> None:
    await rig.lock()
    with pytest.raises(Precondition, match="'ctl-1' holds this node"):
        await rig.lock(1200, owner=Owner(OwnerKind.CONTROLLER, "ctl-2"))
    await rig.after(15.0)
    assert (await rig.lock(1200, owner=Owner(OwnerKind.CONTROLLER, "ctl-2"))).code is Code.APPLIED


async def test_no_permission_changes_nothing_and_leaves_no_entry(rig: Rig) -> None:
    gpu(rig).fault = GpuPermission("not root")
    assert (await rig.lock()).code is Code.NO_PERMISSION
    assert rig.on_disk() == []
    assert rig.controls.unrestored() == []


async def test_a_refused_change_keeps_the_lock_in_force_under_its_old_lease(rig: Rig) -> None:
    await rig.lock(990, ttl_s=10.0)
    gpu(rig).fault = GpuPermission("not root any more")
    assert (await rig.lock(1200, ttl_s=100.0)).code is Code.NO_PERMISSION
    gpu(rig).fault = None
    await rig.after(9.0)
    assert gpu(rig).lock_mhz == (990, 990)
    await rig.after(1.0)
    assert gpu(rig).lock_mhz is None


@pytest.mark.parametrize("takes_effect", [True, False])
async def test_a_write_of_unknown_effect_is_undone(rig: Rig, takes_effect: bool) -> None:
    gpu(rig).fault, gpu(rig).applies_before_fault = GpuError("unknown error"), takes_effect
    assert (await rig.lock()).code is Code.DRIVER_ERROR
    assert rig.controls.unrestored() == [ControlKey("GPU-0", ControlKind.CLOCK_LOCK)]
    gpu(rig).fault = None
    await rig.after(0.0)
    assert gpu(rig).lock_mhz is None
    assert rig.on_disk() == []


async def test_a_change_of_unknown_effect_ends_the_lease_before_it(rig: Rig) -> None:
    await rig.lock(990, ttl_s=100.0)
    gpu(rig).fault = GpuError("unknown error")
    assert (await rig.lock(1200, ttl_s=100.0)).code is Code.DRIVER_ERROR
    assert rig.controls.held() == []
    gpu(rig).fault = None
    await rig.after(1.0)
    assert gpu(rig).lock_mhz is None


async def test_a_failed_restore_is_tried_again_and_stays_in_the_journal(rig: Rig) -> None:
    await rig.lock()
    gpu(rig).fault = GpuError("busy")
    await rig.after(15.0)
    assert gpu(rig).lock_mhz == (990, 990)
    assert rig.on_disk() == [ControlKey("GPU-0", ControlKind.CLOCK_LOCK)]
    gpu(rig).fault = None
    await rig.after(0.5)
    assert gpu(rig).lock_mhz == (990, 990)  # not before the pause is over
    await rig.after(0.5)
    assert gpu(rig).lock_mhz is None
    assert rig.on_disk() == []


async def test_a_failed_restore_leaves_no_false_belief(rig: Rig) -> None:
    """The restore raised, yet it took effect: asking for the same lock again must write it."""
    await rig.lock()
    gpu(rig).fault, gpu(rig).applies_before_fault = GpuError("unknown error"), True
    await rig.after(15.0)
    assert gpu(rig).lock_mhz is None
    gpu(rig).fault = None
    await rig.lock()
    assert gpu(rig).lock_mhz == (990, 990)


async def test_nothing_is_written_when_the_journal_cannot_be(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WRITE, full)
    result = await rig.lock()
    assert result.code is Code.JOURNAL_FAILED
    assert "No space left" in result.detail
    assert gpu(rig).calls == []
    assert rig.controls.unrestored() == []


async def test_after_a_restore_only_the_journal_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.lock()

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(WRITE, full)
        await rig.after(15.0)
        await rig.after(1.0)
        assert gpu(rig).calls == ["lock 990-990", "unlock"]
        assert len(rig.on_disk()) == 1
    await rig.after(1.0)
    assert gpu(rig).calls == ["lock 990-990", "unlock"]
    assert rig.on_disk() == []


async def test_eight_gpus_share_journal_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await Rig(tmp_path, FakeDriver(8)).open()
    writes: list[bytes] = []

    def count(path: Path, data: bytes) -> None:
        writes.append(data)
        write_durably(path, data)

    monkeypatch.setattr(WRITE, count)
    wishes = [Wish(fake.uuid, ClockLock(990, 990)) for fake in rig.driver.gpus]
    results = await rig.controls.apply(CONTROLLER, "test", 15.0, 1, wishes)
    assert [result.code for result in results] == [Code.APPLIED] * 8
    assert len(writes) <= 4
    assert len(rig.on_disk()) == 8


async def test_close_restores_everything_and_takes_nothing_more(rig: Rig) -> None:
    await rig.lock(gpu=0)
    await rig.lock(gpu=1, owner=OPERATOR, ttl_s=1000.0)
    assert await rig.controls.close() == []
    assert gpu(rig, 0).lock_mhz is None
    assert gpu(rig, 1).lock_mhz is None
    with pytest.raises(Unavailable):
        await rig.lock()


async def test_the_loop_restores_by_itself_at_expiry(rig: Rig) -> None:
    loop = asyncio.create_task(rig.controls.run())
    await rig.lock(ttl_s=10.0)
    rig.clock.advance(10.0)
    await rig.controls.release(OPERATOR, 0, ["GPU-1"], "wakes the loop, as time would")
    for _ in range(200):
        if gpu(rig).lock_mhz is None:
            break
        await asyncio.sleep(0.01)
    loop.cancel()
    assert gpu(rig).lock_mhz is None


@pytest.mark.parametrize("case", ["ends before the loop looks again", "fails"])
async def test_the_loop_is_woken_for_what_would_have_to_wait_for_it(rig: Rig, case: str) -> None:
    loop = asyncio.create_task(rig.controls.run())
    assert (await rig.lock()).code is Code.APPLIED
    await asyncio.sleep(0)
    rig.clock.advance(0.1)
    if case == "fails":
        gpu(rig).fault = GpuError("busy")
    await rig.lock(1005, ttl_s=15.0 if case == "fails" else 0.3)
    for _ in range(50):  # turns of the loop, not seconds: it is asleep for one
        await asyncio.sleep(0)
    loop.cancel()
    assert rig.controls.last_beat_s == rig.clock.monotonic_s()


class TestNextStart:
    """A new agent over the GPUs and files of one that died."""

    async def test_what_was_locked_is_restored(self, rig: Rig) -> None:
        gpu(rig, 1).limit_w = 612.0
        await rig.lock(gpu=0)
        await rig.apply(PowerLimit(400.0), gpu=1)
        heir = await Rig(rig.path, rig.driver).open()
        await heir.controls.sweep()
        assert gpu(rig, 0).lock_mhz is None
        assert gpu(rig, 1).limit_w == 612.0
        assert heir.on_disk() == []

    async def test_the_highest_term_is_remembered(self, rig: Rig) -> None:
        await rig.apply(ClockLock(990, 990), term=7)
        heir = await Rig(rig.path, rig.driver).open()
        with pytest.raises(Precondition):
            await heir.apply(ClockLock(990, 990), term=6)

    @pytest.mark.parametrize("content", [b"", b"{", b'{"version": 1}', b'{"version": 9, "boot_id": "", "entries": []}'])
    async def test_an_unreadable_journal_means_restore_everything(self, rig: Rig, content: bytes) -> None:
        await rig.lock()
        gpu(rig, 1).lock_mhz = (600, 600)
        gpu(rig, 1).limit_w = 300.0
        (rig.path / "journal.json").write_bytes(content)
        heir = await Rig(rig.path, rig.driver).open()
        assert len(heir.on_disk()) == 6  # a crash right here must not look like "nothing to restore"
        await heir.controls.sweep()
        assert [fake.lock_mhz for fake in rig.driver.gpus] == [None, None]
        assert [fake.limit_w for fake in rig.driver.gpus] == [700.0, 700.0]
        assert [path.read_bytes() for path in rig.path.glob("journal.json.unreadable-*")] == [content]

    async def test_after_a_reboot_clocks_are_unlocked_and_limits_left_alone(self, rig: Rig) -> None:
        await rig.lock(gpu=0)
        await rig.apply(PowerLimit(400.0), gpu=1)
        gpu(rig, 1).limit_w = 555.0  # what the machine's own boot scripts set
        heir = await Rig(rig.path, rig.driver).open(boot_id="boot-2")
        await heir.controls.sweep()
        assert gpu(rig, 0).lock_mhz is None
        assert gpu(rig, 1).limit_w == 555.0

    async def test_a_lost_gpu_is_restored_when_it_is_found_again(self, rig: Rig) -> None:
        await rig.lock()
        gpu(rig).lost = True
        heir = await Rig(rig.path, rig.driver).open()
        await heir.controls.sweep()
        assert heir.controls.unrestored() == [ControlKey("GPU-0", ControlKind.CLOCK_LOCK)]
        gpu(rig).lost = False
        heir.inventory.workers[0].recover()
        await asyncio.sleep(0.1)
        await heir.after(1.0)
        assert gpu(rig).lock_mhz is None
        assert heir.controls.unrestored() == []


async def test_a_gpu_that_came_back_is_written_again(rig: Rig) -> None:
    """It may have lost the lock while it was away, so "already in force" does not count any more."""
    await rig.lock()
    gpu(rig).lost = True
    assert (await rig.lock()).code is Code.APPLIED  # nothing had to be written, so nothing noticed
    with pytest.raises(GpuError):
        await rig.inventory.workers[0].call(lambda device: device.read())
    assert (await rig.lock()).code is Code.GPU_LOST
    gpu(rig).lost, gpu(rig).lock_mhz = False, None
    rig.inventory.workers[0].recover()
    await asyncio.sleep(0.1)
    assert (await rig.lock()).code is Code.APPLIED
    assert gpu(rig).lock_mhz == (990, 990)
