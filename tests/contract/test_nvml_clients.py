"""What NVML clients see of an emulated host, through the real pynvml in processes of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulator.host.nvml import build
from simulator.host.nvml.state import Board, HostState, gpu_uuid
from tests.nvml_client import NvmlClient, NvmlFailure, client_environment

NOT_SUPPORTED, UNINITIALIZED, DRIVER_NOT_LOADED, VERSION_MISMATCH = 3, 1, 9, 18
FIELD_POWER_INSTANT, FIELD_POWER_AVERAGE, FIELD_ENERGY, FIELD_RETIRED_PAGES = 186, 185, 83, 29
MIB = 1 << 20


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostState]:
    state = HostState.create(tmp_path / "gpus", node="test")
    yield state
    state.close()


@pytest.fixture
def client(host: HostState) -> Iterator[NvmlClient]:
    with NvmlClient(host.path) as process:
        yield process


def test_two_processes_see_one_host(host: HostState, client: NvmlClient) -> None:
    host.attach_process(3, os.getpid(), MIB)
    with NvmlClient(host.path) as other:
        client.call("nvmlDeviceSetGpuLockedClocks", 900, 900, gpu=3)
        other.call("nvmlDeviceSetPowerManagementLimit", 450_000, gpu=3)
        assert other.call("nvmlDeviceGetClockInfo", 1, gpu=3) == 900
        assert client.call("nvmlDeviceGetEnforcedPowerLimit", gpu=3) == 450_000
    # What a client set stays when it has gone.
    assert host.lock(3) == (900, 900)
    assert host.lock(2) is None


def test_two_hosts_are_apart(host: HostState, client: NvmlClient, tmp_path: Path) -> None:
    other = HostState.create(tmp_path / "other", gpus=2, node="other")
    with NvmlClient(other.path) as elsewhere:
        elsewhere.call("nvmlDeviceSetGpuLockedClocks", 600, 600, gpu=0)
        assert elsewhere.call("nvmlDeviceGetCount") == 2
        assert elsewhere.call("nvmlDeviceGetUUID", gpu=0) != client.call("nvmlDeviceGetUUID", gpu=0)
    assert other.lock(0) == (600, 600)
    assert host.lock(0) is None


def test_every_key_leads_to_the_same_gpu(host: HostState, client: NvmlClient) -> None:
    assert client.call("nvmlDeviceGetCount") == 8
    seen = set()
    for index in range(8):
        uuid = client.call("nvmlDeviceGetUUID", gpu=index)
        serial = client.call("nvmlDeviceGetSerial", gpu=index)
        bus_id = client.call("nvmlDeviceGetPciInfo", gpu=index)["busId"]
        assert uuid == gpu_uuid("test", index) == host.uuids[index]
        assert (
            client.call("nvmlDeviceGetIndex", gpu=index) == client.call("nvmlDeviceGetMinorNumber", gpu=index) == index
        )
        seen |= {uuid, serial, bus_id}
        for key in (("UUID", uuid), ("Serial", serial), ("PciBusId", bus_id)):
            assert client.call("nvmlDeviceGetIndex", gpu=key) == index, key
    assert len(seen) == 24
    for key in (("UUID", gpu_uuid("elsewhere", 0)), ("PciBusId", "00000000:77:00.0"), ("Serial", "0")):
        with pytest.raises(NvmlFailure, match="Not Found"):
            client.call("nvmlDeviceGetIndex", gpu=key)
    with pytest.raises(NvmlFailure, match="Invalid Argument"):
        client.call("nvmlDeviceGetHandleByIndex", 8)


def test_shows_an_h100(client: NvmlClient) -> None:
    assert client.call("nvmlDeviceGetName", gpu=0) == "NVIDIA H100 80GB HBM3"
    assert client.call("nvmlDeviceGetCudaComputeCapability", gpu=0) == [9, 0]
    assert client.call("nvmlDeviceGetArchitecture", gpu=0) == 9
    assert client.call("nvmlDeviceGetPowerManagementLimitConstraints", gpu=0) == [200_000, 700_000]
    assert client.call("nvmlDeviceGetPowerManagementDefaultLimit", gpu=0) == 700_000
    assert client.call("nvmlDeviceGetMaxClockInfo", 1, gpu=0) == 1980
    assert client.call("nvmlDeviceGetSupportedMemoryClocks", gpu=0) == [2619, 1593]
    grid = client.call("nvmlDeviceGetSupportedGraphicsClocks", 2619, gpu=0)
    assert grid == list(range(1980, 209, -15))
    assert client.call("nvmlDeviceGetMigMode", gpu=0) == [0, 0]
    assert client.call("nvmlDeviceGetPersistenceMode", gpu=0) == 1
    assert client.call("nvmlDeviceGetNvLinkState", 17, gpu=0) == 1
    assert client.call("nvmlSystemGetDriverVersion") == "580.95.05"
    with pytest.raises(NvmlFailure, match="Not Supported"):
        client.call("nvmlDeviceGetFanSpeed", gpu=0)


def test_idle_without_context(client: NvmlClient) -> None:
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 72_000
    assert client.call("nvmlDeviceGetClockInfo", 1, gpu=0) == 345
    assert client.call("nvmlDeviceGetUtilizationRates", gpu=0) == {"gpu": 0, "memory": 0}
    assert client.call("nvmlDeviceGetComputeRunningProcesses", gpu=0) == []
    # Idle, under both names of that call.
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=0) == 1
    assert client.call("nvmlDeviceGetCurrentClocksThrottleReasons", gpu=0) == 1


def test_shows_work_and_its_owner(host: HostState, client: NvmlClient) -> None:
    host.attach_process(5, client.pid, 60_000 * MIB)
    host.set_activity(5, 550.0, gpu_util=97, mem_util=45, pid=client.pid)
    assert client.call("nvmlDeviceGetPowerUsage", gpu=5) == 550_000
    assert client.call("nvmlDeviceGetUtilizationRates", gpu=5) == {"gpu": 97, "memory": 45}
    assert client.call("nvmlDeviceGetClockInfo", 1, gpu=5) == 1980
    assert client.call("nvmlDeviceGetCurrentClocksEventReasons", gpu=5) == 0
    assert client.call("nvmlDeviceGetTemperature", 0, gpu=5) > client.call("nvmlDeviceGetTemperature", 0, gpu=4)
    assert client.call("nvmlDeviceGetTemperatureV", 0, gpu=5) == client.call("nvmlDeviceGetTemperature", 0, gpu=5)
    (process,) = client.call("nvmlDeviceGetComputeRunningProcesses", gpu=5)
    assert (process["pid"], process["usedGpuMemory"]) == (client.pid, 60_000 * MIB)
    (sample,) = client.call("nvmlDeviceGetProcessUtilization", 0, gpu=5)
    assert (sample["pid"], sample["smUtil"]) == (client.pid, 97)
    assert "python" in client.call("nvmlSystemGetProcessName", client.pid)
    whole, detailed = (client.call("nvmlDeviceGetMemoryInfo", *version, gpu=5) for version in ([], [0x02000028]))
    assert detailed["used"] == 60_000 * MIB
    assert whole["used"] == detailed["used"] + detailed["reserved"]
    assert whole["free"] == detailed["free"] == whole["total"] - whole["used"]
    assert client.call("nvmlDeviceGetMemoryInfo", gpu=4)["used"] == detailed["reserved"]


def test_field_values_answer_one_by_one(host: HostState, client: NvmlClient) -> None:
    host.set_activity(0, 300.0)
    wanted = [FIELD_POWER_INSTANT, FIELD_POWER_AVERAGE, FIELD_ENERGY, FIELD_RETIRED_PAGES]
    values = client.call("nvmlDeviceGetFieldValues", wanted, gpu=0)
    assert [value["nvmlReturn"] for value in values] == [0, 0, 0, NOT_SUPPORTED]
    assert [value["value"]["uiVal"] for value in values[:2]] == [300_000, 300_000]
    energy_mj = client.call("nvmlDeviceGetTotalEnergyConsumption", gpu=0)
    assert values[2]["value"]["ullVal"] <= energy_mj == pytest.approx(values[2]["value"]["ullVal"], abs=300_000)


def test_mig_mode_shows_and_hides_utilisation(host: HostState, client: NvmlClient) -> None:
    host.set_mig(2, True)
    assert client.call("nvmlDeviceGetMigMode", gpu=2) == [1, 1]
    with pytest.raises(NvmlFailure, match="Not Supported"):
        client.call("nvmlDeviceGetUtilizationRates", gpu=2)
    assert client.call("nvmlDeviceGetMigMode", gpu=1) == [0, 0]


def test_another_board(tmp_path: Path) -> None:
    board = Board(name="NVIDIA H100 PCIe", clock_max_mhz=1755, power_limit_max_w=350.0, power_limit_default_w=350.0)
    host = HostState.create(tmp_path / "gpus", gpus=1, board=board)
    host.attach_process(0, os.getpid(), MIB)
    with NvmlClient(host.path) as client:
        assert client.call("nvmlDeviceGetName", gpu=0) == "NVIDIA H100 PCIe"
        assert client.call("nvmlDeviceGetPowerManagementLimitConstraints", gpu=0) == [200_000, 350_000]
        assert client.call("nvmlDeviceGetClockInfo", 1, gpu=0) == 1755


def test_every_pynvml_getter_answers_or_fails_cleanly(host: HostState) -> None:
    """Whatever a client looks up is there: an answer or an NVML error, never a crash or a missing symbol."""
    host.attach_process(0, os.getpid(), MIB)
    script = """
import inspect, pynvml as n
n.nvmlInit()
handle = n.nvmlDeviceGetHandleByIndex(0)
answered = 0
for name, function in sorted(vars(n).items()):
    if not name.startswith(("nvmlDeviceGet", "nvmlSystemGet", "nvmlUnitGet", "nvmlGetExcluded")):
        continue
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    arguments = [handle] if name.startswith("nvmlDevice") and needed else []
    arguments += [0] * (len(needed) - len(arguments))
    try:
        function(*arguments)
        answered += 1
    except n.NVMLError as error:
        assert error.value != n.NVML_ERROR_FUNCTION_NOT_FOUND, name
    except (TypeError, AttributeError, ValueError, __import__("ctypes").ArgumentError):
        pass  # wants a structure where we gave a number
print(answered)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], env=client_environment(host.path), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 90


def test_exports_what_the_header_declares_and_no_getter_for_locked_clocks() -> None:
    library = ctypes.CDLL(str(build.ensure_library() / build.LIBRARY_NAME))
    declared = build.declared_functions(build.find_header())
    assert len(declared) > 400
    assert [name for name in declared if not hasattr(library, name)] == []
    # A lock cannot be read back through NVML; control code must not come to rely on it here.
    assert [name for name in declared if "Locked" in name and "Get" in name] == []
    for name in ("nvmlDeviceGetGpuLockedClocks", "nvmlDeviceGetMemoryLockedClocks"):
        assert not hasattr(library, name)


@pytest.mark.parametrize(
    "definition",
    [
        pytest.param("nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t d, unsigned long *p)", id="wrong signature"),
        pytest.param("nvmlReturn_t nvmlDeviceGetGpuLockedClocks(nvmlDevice_t d, unsigned *p)", id="invented"),
    ],
)
def test_a_function_off_the_header_does_not_compile(definition: str, tmp_path: Path) -> None:
    source = tmp_path / "off.c"
    source.write_text(f'#include "nvml_surface.h"\n{definition} {{ *p = d != NULL; return NVML_SUCCESS; }}\n')
    flags = [flag for flag in build.FLAGS if flag != "-Wl,-z,defs"]
    include = ["-I", str(build.SOURCES), "-isystem", str(build.find_header().parent)]
    command = [build.find_compiler(), *build.WARNINGS, *flags, *include, "-o", str(tmp_path / "off.so"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "nvmlDeviceGet" in run.stderr
    # The same file with a right definition does compile, so it is the definition that was refused.
    source.write_text('#include "nvml_surface.h"\nnvmlReturn_t nvmlShutdown(void) { return NVML_SUCCESS; }\n')
    assert subprocess.run(command, check=False).returncode == 0


def test_before_init_and_after_shutdown(client: NvmlClient) -> None:
    client.call("nvmlInit")  # counted: two starts need two ends
    client.call("nvmlShutdown")
    assert client.call("nvmlDeviceGetCount") == 8
    client.call("nvmlShutdown")
    for name in ("nvmlDeviceGetCount", "nvmlShutdown", "nvmlSystemGetDriverVersion", "nvmlSystemGetHicVersion"):
        with pytest.raises(NvmlFailure) as failure:
            client.call(name)
        assert failure.value.code == UNINITIALIZED
    client.call("nvmlInit")
    assert client.call("nvmlDeviceGetPowerUsage", gpu=0) == 72_000


def test_a_host_without_gpus_has_no_driver(tmp_path: Path) -> None:
    with pytest.raises(NvmlFailure) as failure:
        NvmlClient(tmp_path / "nothing")
    assert failure.value.code == DRIVER_NOT_LOADED


def test_a_foreign_state_file_is_refused(tmp_path: Path, host: HostState) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"x" * host.path.stat().st_size)
    with pytest.raises(NvmlFailure) as failure:
        NvmlClient(foreign)
    assert failure.value.code == VERSION_MISMATCH
