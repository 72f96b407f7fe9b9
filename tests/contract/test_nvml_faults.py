"""What goes wrong on a GPU host: refused writes, lost and hung GPUs, processes that are killed anywhere."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulator.host.nvml.build import SOURCES, find_compiler
from simulator.host.nvml.state import Calls, HostState, NvmlError
from tests.nvml_client import NvmlClient, NvmlFailure, client_environment

MIB = 1 << 20


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostState]:
    state = HostState.create(tmp_path / "gpus")
    yield state
    state.close()


@pytest.fixture
def client(host: HostState) -> Iterator[NvmlClient]:
    with NvmlClient(host.path) as process:
        yield process


def test_no_permission_to_write(host: HostState, client: NvmlClient) -> None:
    host.deny_writes(0)
    for name, *arguments in (
        ("nvmlDeviceSetGpuLockedClocks", 900, 900),
        ("nvmlDeviceResetGpuLockedClocks",),
        ("nvmlDeviceSetPowerManagementLimit", 400_000),
        ("nvmlDeviceSetPersistenceMode", 0),
    ):
        with pytest.raises(NvmlFailure) as failure:
            client.call(name, *arguments, gpu=0)
        assert failure.value.code == NvmlError.NO_PERMISSION
    assert host.lock(0) is None
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 72_000
    client.call("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=1)
    host.clear_fault(0)
    client.call("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=0)
    assert host.lock(0) == (900, 900)


def test_a_lost_gpu_is_lost_alone(host: HostState, client: NvmlClient) -> None:
    assert client.call("nvmlDeviceGetPowerUsage", gpu=3) == 72_000  # from here on the client holds a handle
    host.lose(3)
    for name in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetName", "nvmlDeviceResetGpuLockedClocks"):
        with pytest.raises(NvmlFailure) as failure:
            client.call(name, gpu=3)
        assert failure.value.code == NvmlError.GPU_IS_LOST
    with pytest.raises(NvmlFailure, match="lost"):
        client.call("nvmlDeviceGetHandleByIndex", 3)
    assert client.call("nvmlDeviceGetCount") == 8
    for index in (0, 1, 2, 4, 5, 6, 7):
        assert client.call("nvmlDeviceGetPowerUsage", gpu=index) == 72_000
    host.clear_fault(3)
    assert client.call("nvmlDeviceGetPowerUsage", gpu=3) == 72_000


def test_one_group_of_calls_can_fail(host: HostState, client: NvmlClient) -> None:
    host.set_fault(0, Calls.ENERGY, error=NvmlError.NOT_SUPPORTED)
    with pytest.raises(NvmlFailure, match="Not Supported"):
        client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=0)
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 72_000
    host.set_fault(0, Calls.TELEMETRY | Calls.CLOCK_WRITE, error=NvmlError.UNKNOWN)
    with pytest.raises(NvmlFailure, match="Unknown"):
        client.call("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=0)
    client.call("nvmlDeviceSetPowerManagementLimit", 400_000, gpu=0)


def test_a_hang_holds_only_that_gpus_callers(host: HostState, client: NvmlClient) -> None:
    host.hang(1, Calls.CLOCK_WRITE | Calls.TELEMETRY)
    client.send("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=1)
    with NvmlClient(host.path) as other:
        for index in (0, 2, 3, 4, 5, 6, 7):
            other.call("nvmlDeviceSetGpuLockedClocks", 600, 600, gpu=index)
            assert other.call("nvmlDeviceGetClockInfo", 1, gpu=index) == 600
        # Calls of other groups go on even on the hung GPU, and so does looking at it from here.
        assert other.call("nvmlDeviceGetTotalEnergyConsumption", gpu=1) >= 0
        assert host.lock(1) is None
        host.clear_fault(1)
        client.reply()
        assert host.lock(1) == (900, 900)


def test_a_hang_ends_by_itself(host: HostState, client: NvmlClient) -> None:
    host.hang(0, seconds=0.2)
    start_s = time.monotonic()
    client.call("nvmlDeviceGetPowerUsage", gpu=0)
    assert time.monotonic() - start_s >= 0.15


def test_a_hung_caller_can_be_killed(host: HostState) -> None:
    host.hang(0)
    client = NvmlClient(host.path)
    client.send("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=0)
    client.kill()
    host.clear_fault(0)
    with NvmlClient(host.path) as other:
        other.call("nvmlDeviceSetGpuLockedClocks", 600, 600, gpu=0)
    assert host.lock(0) == (600, 600)


def test_delayed_clock_writes_wait_for_each_other(host: HostState, client: NvmlClient) -> None:
    """A real driver serialises them over all GPUs; reads are not held up."""
    for index in range(8):
        host.set_fault(index, Calls.CLOCK_WRITE, delay_s=0.1)
    with NvmlClient(host.path) as other:
        start_s = time.monotonic()
        client.send("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=0)
        other.send("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=1)
        client.reply()
        other.reply()
        assert time.monotonic() - start_s >= 0.2
        start_s = time.monotonic()
        client.send("nvmlDeviceSetGpuLockedClocks", 600, 600, gpu=0)
        assert other.call("nvmlDeviceGetPowerUsage", gpu=0) == 72_000
        client.reply()


def test_killed_inside_a_delayed_write_leaves_the_others_free(host: HostState) -> None:
    host.set_fault(0, Calls.CLOCK_WRITE, delay_s=30.0)
    host.set_fault(1, Calls.CLOCK_WRITE, delay_s=0.001)
    client = NvmlClient(host.path)
    client.send("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=0)
    time.sleep(0.1)  # time to take the driver's lock; the assertion below holds either way
    client.kill()
    with NvmlClient(host.path) as other:
        other.call("nvmlDeviceSetGpuLockedClocks", 600, 600, gpu=1)
    assert host.lock(0) is None
    assert host.lock(1) == (600, 600)


# --- processes -----------------------------------------------------------------------------------------------------


def test_dead_processes_vanish_with_memory_and_load(host: HostState, client: NvmlClient) -> None:
    engine = subprocess.Popen(["sleep", "60"])
    try:
        for index in (0, 1):
            host.attach_process(index, engine.pid, 70_000 * MIB)
            host.set_activity(index, 600.0, 95, pid=engine.pid)
        assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 600_000
    finally:
        engine.kill()
    os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie: its contexts are closed
    assert client.call("nvmlDeviceGetComputeRunningProcesses", gpu=0) == []
    assert client.call("nvmlDeviceGetMemoryInfo", gpu=0)["used"] == 551 * MIB
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 72_000
    assert host.observe(1).processes == ()
    engine.wait()


def test_an_unwatched_death_is_not_charged_for_ever(host: HostState) -> None:
    engine = subprocess.Popen(["sleep", "60"])
    host.attach_process(0, engine.pid, MIB)
    host.set_activity(0, 700.0, 100, pid=engine.pid)
    last = host.observe(0)
    engine.kill()
    engine.wait()
    time.sleep(0.3)
    seen = host.observe(0)
    idle_j = 72.0 * (seen.at_s - last.at_s)
    # The work counts for the 20 ms in which nobody would have looked for its death, not for the time nobody did.
    assert seen.energy_j - last.energy_j == pytest.approx(idle_j + (700.0 - 72.0) * 0.02, rel=1e-3)


def test_the_counter_stays_monotonic_when_an_engine_dies(host: HostState) -> None:
    engine = subprocess.Popen(["sleep", "60"])
    host.attach_process(0, engine.pid, MIB)
    host.set_activity(0, 700.0, 100, pid=engine.pid)
    last_j = 0.0
    for dies in (False, True):
        if dies:
            engine.kill()
            engine.wait()
        until_s = time.monotonic() + 0.1
        while time.monotonic() < until_s:
            view = host.observe(0)
            assert view.energy_j >= last_j
            last_j = view.energy_j
    assert host.observe(0).power_w == 72.0


def test_two_engines_share_a_gpu(host: HostState, client: NvmlClient) -> None:
    """One sleeps on the GPU while the other serves: what the sleeper says does not end the other's work."""
    host.attach_process(0, os.getpid(), 10 * MIB)
    host.attach_process(0, client.pid, 20 * MIB)
    host.set_activity(0, 500.0, 90, pid=client.pid)
    host.set_activity(0, 0.0)
    assert host.observe(0).power_w == 500.0
    assert len(client.call("nvmlDeviceGetComputeRunningProcesses", gpu=0)) == 2
    host.detach_process(0, client.pid)
    assert host.observe(0).power_w == pytest.approx(122.0)
    host.detach_process(0, os.getpid())
    assert host.observe(0).power_w == 72.0


# --- SIGKILL -------------------------------------------------------------------------------------------------------


def test_killed_anywhere_the_host_stays_usable(host: HostState, client: NvmlClient) -> None:
    script = f"""
import os, pynvml as n
from pathlib import Path
from simulator.host.nvml.state import HostState
n.nvmlInit()
gpu = n.nvmlDeviceGetHandleByIndex(0)
host = HostState.open(Path({str(host.path)!r}))
print("ready", flush=True)
for line in iter(input, ""):
    child = os.fork()
    if child == 0:
        host.attach_process(0, os.getpid(), 1 << 20)
        while True:
            host.set_activity(0, 400.0, 50)
            n.nvmlDeviceSetGpuLockedClocks(gpu, 900, 900)
            n.nvmlDeviceGetTotalEnergyConsumption(gpu)
            n.nvmlDeviceResetGpuLockedClocks(gpu)
    print(child, flush=True)
"""
    breeder = subprocess.Popen(
        [sys.executable, "-c", script],
        env=client_environment(host.path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert breeder.stdin is not None
    assert breeder.stdout is not None
    try:
        assert breeder.stdout.readline() == "ready\n"
        chance, last_j = random.Random(1), 0.0
        for _ in range(40):
            breeder.stdin.write("next\n")
            breeder.stdin.flush()
            child = int(breeder.stdout.readline())
            time.sleep(0.005 + 0.01 * chance.random())
            os.kill(child, signal.SIGKILL)
            while (view := host.observe(0)).processes:  # until the kernel has ended it
                time.sleep(0.001)
            client.call("nvmlDeviceSetGpuLockedClocks", 1200, 1200, gpu=0)
            assert host.lock(0) == (1200, 1200)
            assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 72_000
            assert view.energy_j >= last_j
            last_j = view.energy_j
    finally:
        breeder.kill()
        breeder.wait()
        breeder.stdin.close()
        breeder.stdout.close()
    client.call("nvmlDeviceResetGpuLockedClocks", gpu=0)
    assert host.lock(0) is None
    assert host.observe(0).processes == ()


def test_killed_half_way_through_a_write_changes_nothing(host: HostState, client: NvmlClient, tmp_path: Path) -> None:
    """Dies between preparing a record and publishing it, holding the GPU's lock: the worst instant there is."""
    client.call("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=0)
    source, program = tmp_path / "dies.c", tmp_path / "dies"
    source.write_text(
        """
#include "host_state.h"
#include <signal.h>
#include <string.h>
int main(int count, char **words) {
    struct emu_host *host;
    if (count != 2 || emu_open(words[1], &host) != 0)
        return 1;
    memset(emu_begin(host, 0, 0), 0x5a, sizeof(struct emu_record));
    return raise(SIGKILL);
}
"""
    )
    sources = [str(SOURCES / name) for name in ("host_state.c", "host_file.c")]
    subprocess.run(
        [find_compiler(), "-std=gnu11", "-I", str(SOURCES), "-o", str(program), str(source), *sources, "-lpthread"],
        check=True,
    )
    before = host.observe(0)
    assert subprocess.run([str(program), str(host.path)], check=False).returncode == -signal.SIGKILL
    after = host.observe(0)
    assert after.lock_mhz == (900, 900)
    assert after.energy_j - before.energy_j == pytest.approx(72.0 * (after.at_s - before.at_s))
    client.call("nvmlDeviceSetGpuLockedClocks", 600, 600, gpu=0)
    assert host.lock(0) == (600, 600)
