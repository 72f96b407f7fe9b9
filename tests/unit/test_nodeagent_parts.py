"""The agent's small parts, each by itself: leases, journal, fence, clamping, request log, energy, streams, files."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import sd_notify
from common.clock import VirtualClock
from common.errors import UserError
from nodeagent.control.fence import Fence
from nodeagent.control.journal import Intent, JournalUnreadable, dump, load
from nodeagent.control.leases import Lease, LeaseTable, Owner, OwnerKind
from nodeagent.control.recovery import nothing_left
from nodeagent.control.settings import (
    ClockLock,
    ControlKey,
    ControlKind,
    OutOfRange,
    PowerLimit,
    clamp_clock_lock,
    clamp_power_limit,
)
from nodeagent.errors import Invalid, Precondition, Unavailable
from nodeagent.files import StateLock, ensure_directory, write_durably
from nodeagent.gpu.driver import GpuFacts
from nodeagent.gpu.nvml import pci_numa_node
from nodeagent.host import NumaNode, numa_free_bytes, numa_nodes
from nodeagent.idempotency import RequestLog
from nodeagent.telemetry.energy import EnergyMeter
from nodeagent.telemetry.sample import HostSample, Sample
from nodeagent.telemetry.stream import SampleStream
from tests.fakegpu import GRID_MHZ

KEY = ControlKey("GPU-0", ControlKind.CLOCK_LOCK)
FACTS = GpuFacts("GPU-0", 0, "H100", 80 << 30, GRID_MHZ, (1593, 2619), 200.0, 700.0, 700.0, False, True, 0)


class TestClamping:
    @given(st.integers(1, 5000), st.integers(0, 5000))
    def test_clocks_land_on_the_grid_and_never_above_the_request(self, max_mhz: int, min_mhz: int) -> None:
        if min_mhz > max_mhz:
            with pytest.raises(OutOfRange):
                clamp_clock_lock(ClockLock(min_mhz, max_mhz), FACTS)
            return
        lock = clamp_clock_lock(ClockLock(min_mhz, max_mhz), FACTS)
        assert lock.min_mhz in GRID_MHZ
        assert lock.max_mhz in GRID_MHZ
        assert lock.min_mhz <= lock.max_mhz <= max(max_mhz, GRID_MHZ[0])
        assert max_mhz - lock.max_mhz < 15 or lock.max_mhz == GRID_MHZ[-1]

    @given(st.floats(0.001, 1e6))
    def test_power_limits_land_in_the_range(self, watts: float) -> None:
        limit = clamp_power_limit(PowerLimit(watts), FACTS).limit_w
        assert 200.0 <= limit <= 700.0
        assert limit == watts or not 200.0 <= watts <= 700.0


def lease(kind: OwnerKind, expires_at_s: float) -> Lease:
    return Lease(Owner(kind, "x"), "why", 1.0, 1, ClockLock(990, 990), expires_at_s)


@pytest.mark.parametrize("holder", OwnerKind)
@pytest.mark.parametrize("asker", OwnerKind)
def test_only_a_stronger_live_lease_is_in_the_way(holder: OwnerKind, asker: OwnerKind) -> None:
    table = LeaseTable()
    table.grant(KEY, lease(holder, 10.0))
    assert (table.in_the_way(KEY, asker, 9.0) is not None) == (holder > asker)
    assert table.in_the_way(KEY, asker, 10.0) is None
    assert table.ended(10.0) == [KEY]
    assert table.next_expiry_s() == 10.0


class TestJournalFile:
    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        intents = [Intent(KEY, None), Intent(ControlKey("GPU-1", ControlKind.POWER_LIMIT), 612.5)]
        (tmp_path / "j").write_bytes(dump("boot", intents))
        assert load(tmp_path / "j") == ("boot", intents)

    def test_no_file_means_nothing_was_ever_written(self, tmp_path: Path) -> None:
        assert load(tmp_path / "j") == ("", [])
        assert nothing_left(tmp_path / "j")

    @given(st.data())
    def test_a_cut_file_is_never_taken_for_an_empty_one(self, data: st.DataObject) -> None:
        whole = dump("boot", [Intent(KEY, None), Intent(ControlKey("GPU-1", ControlKind.POWER_LIMIT), 612.5)])
        cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "j"
            path.write_bytes(cut)
            with pytest.raises(JournalUnreadable):
                load(path)
            assert not nothing_left(path)

    @pytest.mark.parametrize(
        "entry",
        [
            {"gpu_uuid": "", "control": "clock_lock", "captured": None},
            {"gpu_uuid": "GPU-0", "control": "fan_speed", "captured": None},
            {"gpu_uuid": "GPU-0", "control": "power_limit", "captured": "much"},
            {"gpu_uuid": "GPU-0", "control": "power_limit"},
            "GPU-0",
        ],
    )
    def test_an_entry_of_another_kind_makes_it_unreadable(self, tmp_path: Path, entry: object) -> None:
        (tmp_path / "j").write_text(json.dumps({"version": 1, "boot_id": "b", "entries": [entry]}))
        with pytest.raises(JournalUnreadable):
            load(tmp_path / "j")

    def test_a_failed_write_leaves_the_old_content(self, tmp_path: Path) -> None:
        write_durably(tmp_path / "j", b"old")
        (tmp_path / ".j.tmp").mkdir()
        with pytest.raises(IsADirectoryError):
            write_durably(tmp_path / "j", b"new")
        assert (tmp_path / "j").read_bytes() == b"old"


class TestFence:
    def test_the_highest_term_survives_and_older_ones_are_refused(self, tmp_path: Path) -> None:
        fence = Fence(tmp_path / "term", VirtualClock())
        fence.admit(0)
        fence.admit(3, "a")
        fence.admit(5, "b")
        again = Fence(tmp_path / "term", VirtualClock())
        assert (again.term, again.holder) == (5, "b")
        with pytest.raises(Precondition, match="older than 5 of controller 'b'"):
            again.admit(4, "a")
        again.admit(5)

    def test_a_term_that_cannot_be_written_is_not_accepted(self, tmp_path: Path) -> None:
        fence = Fence(tmp_path / "none" / "term", VirtualClock())
        with pytest.raises(Unavailable):
            fence.admit(3, "a")
        assert fence.term == 0

    @pytest.mark.parametrize("content", ["", "7", '{"version": 1, "term": -1, "holder": ""}', '{"version": 2}'])
    def test_an_unreadable_file_is_kept_aside(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "term").write_text(content)
        assert Fence(tmp_path / "term", VirtualClock()).term == 0
        assert [path.read_text() for path in tmp_path.glob("term.unreadable-*")] == [content]


class TestStateLock:
    def test_a_second_holder_is_told_the_pid_of_the_first(self, tmp_path: Path) -> None:
        lock = StateLock(tmp_path)
        with pytest.raises(UserError, match=rf"pid {os.getpid()}") as refusal:
            StateLock(tmp_path)
        assert refusal.value.exit_code == 4
        lock.release()
        StateLock(tmp_path).release()

    def test_a_state_dir_that_is_a_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "f").touch()
        with pytest.raises(UserError, match="is a file"):
            ensure_directory(tmp_path / "f")


class TestRequestLog:
    async def test_an_id_is_worked_on_once(self) -> None:
        log, count = RequestLog(), 0

        async def work() -> int:
            nonlocal count
            count += 1
            await asyncio.sleep(0.01)
            return count

        assert list(await asyncio.gather(log.once("a", b"x", work), log.once("a", b"x", work))) == [1, 1]
        assert await log.once("a", b"x", work) == 1
        assert await log.once("b", b"x", work) == 2

    async def test_an_id_used_for_something_else_is_refused(self) -> None:
        log = RequestLog()

        async def work() -> int:
            return 1

        await log.once("a", b"x", work)
        with pytest.raises(Invalid, match="used before"):
            await log.once("a", b"y", work)
        for bad in ("", "x" * 129):
            with pytest.raises(Invalid):
                await log.once(bad, b"x", work)

    async def test_a_refused_request_can_be_tried_again(self) -> None:
        log, outcomes = RequestLog(), [Precondition("no"), None]

        async def work() -> str:
            if problem := outcomes.pop(0):
                raise problem
            return "done"

        with pytest.raises(Precondition):
            await log.once("a", b"x", work)
        assert await log.once("a", b"x", work) == "done"

    async def test_a_caller_who_hangs_up_does_not_stop_the_work(self) -> None:
        log, done = RequestLog(), asyncio.Event()

        async def work() -> None:
            await asyncio.sleep(0.02)
            done.set()

        caller = asyncio.create_task(log.once("a", b"x", work))
        await asyncio.sleep(0.005)
        caller.cancel()
        await asyncio.wait_for(done.wait(), 5)

    async def test_the_oldest_ids_are_forgotten(self) -> None:
        log, count = RequestLog(capacity=2), 0

        async def work() -> int:
            nonlocal count
            count += 1
            return count

        assert [await log.once(name, b"", work) for name in "abcc"] == [1, 2, 3, 3]
        assert await log.once("a", b"", work) == 4


class TestEnergy:
    def test_the_counter_is_passed_on(self) -> None:
        meter = EnergyMeter()
        assert meter.update(1000.0, 300.0, 0.0) == (1000.0, False)
        assert meter.update(1450.0, 300.0, 1.0) == (1450.0, False)

    def test_a_reset_is_bridged_by_power(self) -> None:
        meter = EnergyMeter()
        meter.update(1000.0, 300.0, 0.0)
        assert meter.update(50.0, 300.0, 2.0) == (1600.0, True)  # 600 J in 2 s, of which the counter saw 50
        assert meter.update(150.0, 300.0, 3.0) == (1700.0, False)

    def test_one_failed_read_is_unknown_and_made_good(self) -> None:
        meter = EnergyMeter()
        meter.update(1000.0, 300.0, 0.0)
        assert meter.update(None, None, 1.0) == (None, False)
        assert meter.update(1600.0, 300.0, 2.0) == (1600.0, False)

    def test_without_a_counter_power_is_integrated_and_marked(self) -> None:
        meter = EnergyMeter()
        assert meter.update(None, 100.0, 0.0) == (0.0, True)
        assert meter.update(None, 300.0, 2.0) == (400.0, True)
        assert meter.update(None, None, 3.0) == (400.0, True)

    @given(st.lists(st.tuples(st.none() | st.floats(0, 1e6), st.none() | st.floats(0, 700)), max_size=30))
    def test_the_total_never_falls(self, readings: list[tuple[float | None, float | None]]) -> None:
        meter, before = EnergyMeter(), 0.0
        for second, (counter_j, power_w) in enumerate(readings):
            total_j, _ = meter.update(counter_j, power_w, float(second))
            if total_j is not None:
                assert total_j >= before
                before = total_j


def sample(at_s: float) -> Sample:
    return Sample(at_s, at_s, (), (), HostSample(0.0, 0.0))


class TestStream:
    async def test_a_slow_reader_loses_the_oldest_and_can_tell(self) -> None:
        lost: list[None] = []
        stream = SampleStream(queue_samples=3, on_lost=lambda: lost.append(None))
        reader = stream.subscribe(1.0)
        for second in range(10):
            stream.publish(sample(float(second)))
        got = []
        async for sequence, one in reader:
            got.append((sequence, one.monotonic_s))
            if len(got) == 3:
                break
        assert got == [(7, 7.0), (8, 8.0), (9, 9.0)]
        assert len(lost) == 7

    async def test_each_reader_has_its_own_pace(self) -> None:
        stream = SampleStream(queue_samples=100)
        fast, slow = stream.subscribe(0.25), stream.subscribe(1.0)
        assert stream.fastest_s(5.0) == 0.25
        for tick in range(9):
            stream.publish(sample(tick * 0.25))

        async def take(reader: object, count: int) -> list[float]:
            times = []
            async for _, one in reader:  # type: ignore[attr-defined]
                times.append(one.monotonic_s)
                if len(times) == count:
                    break
            return times

        assert await take(fast, 9) == [tick * 0.25 for tick in range(9)]
        assert await take(slow, 3) == [0.0, 1.0, 2.0]
        stream.unsubscribe(fast)
        assert stream.fastest_s(5.0) == 1.0

    async def test_one_that_comes_late_gets_the_past_at_its_own_pace_and_then_goes_on(self) -> None:
        stream = SampleStream(queue_samples=2, history_samples=8)
        for tick in range(20):
            stream.publish(sample(tick * 0.5))
        late, none = stream.subscribe(1.0, history_samples=100), stream.subscribe(1.0)
        assert late.replayed == 4  # of the eight that are kept, every second one
        assert none.replayed == 0
        stream.publish(sample(10.0))  # half a second after the last: not due for this reader
        stream.publish(sample(10.5))
        got = []
        async for sequence, one in late:
            got.append((sequence, one.monotonic_s))
            if len(got) == 5:
                break
        assert got == [(0, 6.5), (1, 7.5), (2, 8.5), (3, 9.5), (4, 10.5)]
        assert stream.subscribe(0.5, history_samples=2).replayed == 2


class TestNuma:
    def test_nodes_and_what_they_have_free(self, tmp_path: Path) -> None:
        for number in (0, 1):
            (tmp_path / f"node{number}").mkdir()
            text = f"Node {number} MemTotal:  2048 kB\nNode {number} MemFree:  {512 * (number + 1)} kB\n"
            (tmp_path / f"node{number}" / "meminfo").write_text(text)
            (tmp_path / f"node{number}" / "cpulist").write_text(f"{number * 4}-{number * 4 + 3}\n")
        (tmp_path / "online").write_text("0-1\n")
        nodes = numa_nodes(tmp_path)
        assert nodes == (NumaNode(0, 2 << 20, "0-3"), NumaNode(1, 2 << 20, "4-7"))
        assert numa_free_bytes(nodes, tmp_path) == ((0, 512 << 10), (1, 1 << 20))
        (tmp_path / "node1" / "meminfo").unlink()
        assert numa_free_bytes(nodes, tmp_path) == ((0, 512 << 10),)  # unknown is not zero
        assert numa_nodes(tmp_path / "none") == ()

    def test_a_gpu_is_near_the_node_of_its_bus_address(self, tmp_path: Path) -> None:
        for address, node in (("0000:18:00.0", "1"), ("0000:3b:00.0", "-1")):
            (tmp_path / address).mkdir()
            (tmp_path / address / "numa_node").write_text(f"{node}\n")
        assert pci_numa_node("00000000:18:00.0", tmp_path) == 1
        assert pci_numa_node("00000000:3B:00.0", tmp_path) is None  # the kernel does not know
        assert pci_numa_node("00000000:99:00.0", tmp_path) is None


class TestSdNotify:
    def test_a_datagram_reaches_the_manager(self, tmp_path: Path) -> None:
        address = str(tmp_path / "n")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address)
            assert sd_notify.notify("READY=1", "STATUS=x", environment={"NOTIFY_SOCKET": address})
            assert manager.recv(100) == b"READY=1\nSTATUS=x"

    def test_without_a_manager_nothing_happens(self, tmp_path: Path) -> None:
        assert not sd_notify.notify("READY=1", environment={})
        assert not sd_notify.notify("READY=1", environment={"NOTIFY_SOCKET": str(tmp_path / "gone")})

    def test_the_watchdog_is_ours_only_if_it_names_this_process(self) -> None:
        mine = {"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}
        assert sd_notify.watchdog_interval_s(mine) == 5.0
        assert sd_notify.watchdog_interval_s(mine | {"WATCHDOG_PID": "1"}) is None
        assert sd_notify.watchdog_interval_s({}) is None
