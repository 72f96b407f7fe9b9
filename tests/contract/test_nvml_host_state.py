"""The emulated host from Python: creation, contexts, bad input, the build and the command line."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from simulator.host.nvml import build
from simulator.host.nvml.state import Board, Calls, GpuMemoryError, HostState, gpu_uuid

MIB = 1 << 20


def _create(tmp_path: Path, gpus: int = 2) -> HostState:
    return HostState.create(tmp_path / "gpus", gpus=gpus)


def test_gpus_follow_from_the_nodes_name(tmp_path: Path) -> None:
    first = HostState.create(tmp_path / "a", node="node-a")
    again = HostState.create(tmp_path / "b", node="node-a")
    other = HostState.create(tmp_path / "c", node="node-b")
    assert first.uuids == again.uuids == tuple(gpu_uuid("node-a", index) for index in range(8))
    assert len({*first.uuids, *other.uuids}) == 16
    assert all(uuid.startswith("GPU-") and len(uuid) == 40 for uuid in first.uuids)


def test_a_new_host_replaces_the_old_one_and_its_settings(tmp_path: Path) -> None:
    old = _create(tmp_path)
    old.set_activity(0, 500.0)
    new = _create(tmp_path)
    assert new.observe(0).power_w == 72.0
    assert old.observe(0).power_w == 500.0  # whoever had it mapped goes on with what he had


def test_opened_twice_is_one_host(tmp_path: Path) -> None:
    one = _create(tmp_path)
    two = HostState.open(one.path)
    one.set_activity(1, 333.0)
    assert two.observe(1).power_w == 333.0
    two.close()
    with pytest.raises(ValueError, match="closed"):
        two.observe(1)


def test_contexts_must_fit(tmp_path: Path) -> None:
    host = _create(tmp_path)
    free = host.memory_bytes - 551 * MIB
    host.attach_process(0, os.getpid(), free)
    with pytest.raises(GpuMemoryError):
        host.attach_process(0, os.getppid(), 1)
    host.attach_process(0, os.getpid(), free - MIB)  # the same process again: its memory is changed
    host.attach_process(0, os.getppid(), MIB)
    assert host.observe(0).used_bytes == free
    assert host.observe(1).used_bytes == 0


def test_activity_belongs_to_its_process(tmp_path: Path) -> None:
    host = _create(tmp_path)
    with pytest.raises(ProcessLookupError):
        host.set_activity(0, 300.0, pid=os.getpid())
    host.attach_process(0, os.getpid(), MIB)
    host.set_activity(0, 300.0, 80, 20)
    assert host.observe(0).processes[0].power_w == 300.0
    host.detach_process(0, os.getpid())
    host.detach_process(0, os.getpid())  # no error: an engine that cleans up twice
    assert host.observe(0).power_w == 72.0


def test_no_context_for_a_process_that_is_not_there(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessLookupError):
        _create(tmp_path).attach_process(0, child.pid, MIB)


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    host = _create(tmp_path)
    for act in (host.observe, host.lock, host.effective_clock_mhz, host.lose, host.reset_energy):
        with pytest.raises(IndexError, match="no GPU 2"):
            act(2)
    with pytest.raises(IndexError):
        host.set_activity(-1, 100.0)


def test_faults_do_not_blind_the_test(tmp_path: Path) -> None:
    host = _create(tmp_path)
    host.hang(0)
    host.set_fault(1, Calls.ALL, error=999)
    assert host.observe(0).power_w == host.observe(1).power_w == 72.0


@pytest.mark.parametrize(
    ("gpus", "board"),
    [(0, Board()), (17, Board()), (8, Board(idle_power_w=())), (8, Board(idle_power_w=((210, 75.0), (210, 80.0))))],
)
def test_impossible_hosts_are_refused(tmp_path: Path, gpus: int, board: Board) -> None:
    with pytest.raises(UserError):
        HostState.create(tmp_path / "gpus", gpus=gpus, board=board)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_hosts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such GPU state file"):
        HostState.open(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="not a GPU state file"):
        HostState.open(tmp_path / "text")
    with pytest.raises(UserError, match="cannot create"):
        HostState.create(tmp_path / "no" / "such" / "folder")


def test_a_host_from_before_the_last_boot_is_refused(tmp_path: Path) -> None:
    path = _create(tmp_path).path
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    path.write_bytes(path.read_bytes().replace(boot_id, b"0" * 36))
    with pytest.raises(UserError, match="last boot"):
        HostState.open(path)


# --- the build -----------------------------------------------------------------------------------------------------


def test_builds_once_even_when_asked_from_all_sides(tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        directories = set(pool.map(lambda _: build.ensure_library(tmp_path), range(3)))
    (directory,) = directories
    library = directory / build.LIBRARY_NAME
    stamp = library.stat().st_mtime_ns
    assert build.ensure_library(tmp_path) == directory
    assert library.stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "nvml").iterdir()] == [directory.name]  # no leavings


def _run_build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulator.host.nvml.build", str(tmp_path)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_prints_the_directory(tmp_path: Path) -> None:
    run = _run_build(tmp_path)
    assert (Path(run.stdout.strip()) / "libnvidia-ml.so.1").exists()
    assert run.returncode == 0


@pytest.mark.parametrize("environment", [{"PATH": "/nowhere"}, {"CC": "no-such-compiler"}])
def test_a_missing_compiler_gets_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    run = _run_build(tmp_path, **environment)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "apt-get install gcc" in run.stderr


def test_a_compiler_that_fails_gets_one_line(tmp_path: Path) -> None:
    run = _run_build(tmp_path, CC="false")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1


def test_a_missing_header_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    with pytest.raises(UserError, match="pip install nvidia-nvml-dev"):
        build.find_header()


# --- the command line ----------------------------------------------------------------------------------------------


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulator.host.nvml", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(tmp_path: Path) -> None:
    path = str(tmp_path / "gpus")
    made = _run("create", path, "--gpus", "2")
    assert made.stdout.startswith(f"DYNAMOLLM_NVML_STATE={path} LD_LIBRARY_PATH=")
    assert _run("load", path, "1", "450").returncode == 0
    assert _run("fault", path, "0", "--error", "gpu_is_lost").returncode == 0
    lines = _run("show", path).stdout.splitlines()
    assert len(lines) == 2
    assert '"power_w": 450.0' in lines[1]


@pytest.mark.parametrize("words", [("show",), ("fault", "2"), ("fault", "0", "--error", "nonsense")])
def test_command_line_mistakes_get_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    path = tmp_path / "gpus"
    if words != ("show",):
        _create(tmp_path)
    run = _run(words[0], str(path), *words[1:])
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr
