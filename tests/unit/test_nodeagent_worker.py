"""One thread per GPU: deadlines, order, isolation and the way back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from nodeagent.gpu.driver import GpuError, GpuHealth, GpuLost, GpuUnresponsive
from nodeagent.gpu.inventory import Inventory
from tests.fakegpu import FakeDriver


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about within 5 s")


async def test_a_hung_gpu_is_isolated_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(2)
    inventory = Inventory(driver, call_deadline_s=0.2)
    await inventory.open()
    stuck, fine = inventory.workers
    gate = driver.gpus[0].gate = threading.Event()

    with pytest.raises(GpuUnresponsive, match=r"within 0.2 s"):
        await stuck.call(lambda gpu: gpu.reset_clocks())
    assert stuck.health is GpuHealth.UNRESPONSIVE
    with pytest.raises(GpuUnresponsive):
        await asyncio.wait_for(stuck.call(lambda gpu: gpu.read()), 0.1)  # at once, not after another deadline
    assert (await fine.call(lambda gpu: gpu.read())).sm_mhz == 1980

    generation = stuck.generation
    gate.set()
    await until(lambda: stuck.health is GpuHealth.OK)
    assert stuck.generation > generation  # what was written before may not be trusted
    assert (await stuck.call(lambda gpu: gpu.read())).sm_mhz == 1980
    inventory.close()


async def test_a_call_that_has_not_begun_in_time_never_does() -> None:
    driver = FakeDriver(1)
    inventory = Inventory(driver, call_deadline_s=0.2)
    await inventory.open()
    worker, gpu = inventory.workers[0], driver.gpus[0]
    gate = gpu.gate = threading.Event()
    hung = asyncio.create_task(worker.call(lambda device: device.reset_clocks()))
    behind = asyncio.create_task(worker.call(lambda device: device.lock_clocks_mhz(990, 990)))
    outcomes = await asyncio.gather(hung, behind, return_exceptions=True)
    assert all(isinstance(outcome, GpuUnresponsive) for outcome in outcomes)
    gate.set()
    await until(lambda: worker.health is GpuHealth.OK)
    assert gpu.calls == ["unlock"]
    assert gpu.lock_mhz is None
    inventory.close()


async def test_a_lost_gpu_is_found_again_under_its_uuid() -> None:
    driver = FakeDriver(2)
    inventory = Inventory(driver, call_deadline_s=2.0)
    await inventory.open()
    worker = inventory.workers[0]
    driver.gpus[0].lost = True
    with pytest.raises(GpuLost):
        await worker.call(lambda gpu: gpu.read())
    assert worker.health is GpuHealth.LOST

    driver.gpus.reverse()  # re-enumerated: the other one now has index 0
    for index, gpu in enumerate(driver.gpus):
        gpu.index = index
    driver.gpus[1].lost = False
    worker.recover()
    await until(lambda: worker.health is GpuHealth.OK)
    assert (worker.uuid, worker.index) == ("GPU-0", 1)
    inventory.close()


async def test_a_gpu_lost_at_the_start_hides_no_other_and_joins_later() -> None:
    driver = FakeDriver(3)
    driver.gpus[1].lost = True
    inventory = Inventory(driver, call_deadline_s=2.0)
    await inventory.open()
    assert [worker.health for worker in inventory.workers] == [GpuHealth.OK, GpuHealth.LOST, GpuHealth.OK]
    assert inventory.find("GPU-1") is None
    driver.gpus[1].lost = False
    looking = asyncio.create_task(inventory.recover_forever(0.01))
    await until(lambda: inventory.find("GPU-1") is not None)
    looking.cancel()
    inventory.close()


async def test_a_driver_that_throws_anything_harms_only_the_call() -> None:
    driver = FakeDriver(1)
    inventory = Inventory(driver, call_deadline_s=2.0)
    await inventory.open()

    def bad(gpu: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(GpuError, match="ZeroDivisionError"):
        await inventory.workers[0].call(bad)
    driver.gpus[0].fault = GpuError("busy")
    with pytest.raises(GpuError, match="busy"):
        await inventory.workers[0].call(lambda gpu: gpu.reset_clocks())
    assert inventory.workers[0].health is GpuHealth.OK
    inventory.close()


async def test_of_gpus_asked_together_one_that_hangs_holds_up_nobody() -> None:
    driver = FakeDriver(4)
    inventory = Inventory(driver, call_deadline_s=5)
    await inventory.open()
    gate = driver.gpus[0].gate = threading.Event()  # the first of the round, which would wake the others
    calls = [asyncio.create_task(worker.call(lambda gpu: gpu.reset_clocks())) for worker in inventory.workers]
    await asyncio.wait_for(asyncio.gather(*calls[1:]), 2)
    assert not calls[0].done()
    gate.set()
    await calls[0]
    inventory.close()


async def test_calls_of_one_gpu_keep_their_order_among_those_of_others() -> None:
    driver = FakeDriver(3)
    inventory = Inventory(driver, call_deadline_s=5)
    await inventory.open()

    async def lock(index: int, mhz: int) -> None:
        await inventory.workers[index].call(lambda gpu: gpu.lock_clocks_mhz(mhz, mhz))

    clocks = [990 + 15 * step for step in range(40)]
    calls = []
    for step, mhz in enumerate(clocks):
        calls += [asyncio.create_task(lock(index, mhz)) for index in range(3)]
        if step % 3 == 0:
            await asyncio.sleep(0)  # some are asked in the same turn of the loop, some in the next
    await asyncio.gather(*calls)
    for gpu in driver.gpus:
        assert gpu.calls == [f"lock {mhz}-{mhz}" for mhz in clocks]
    inventory.close()


async def test_a_caller_that_gives_up_in_the_middle_of_a_round_stops_only_its_own_call() -> None:
    driver = FakeDriver(3)
    inventory = Inventory(driver, call_deadline_s=5)
    await inventory.open()
    calls = [asyncio.create_task(worker.call(lambda gpu: gpu.reset_clocks())) for worker in inventory.workers]
    await asyncio.sleep(0)
    calls[0].cancel()
    calls[1].cancel()
    await asyncio.wait_for(calls[2], 2)
    await until(lambda: all(worker.idle for worker in inventory.workers))
    assert (await inventory.workers[0].call(lambda gpu: gpu.read())).sm_mhz == 1980
    inventory.close()
