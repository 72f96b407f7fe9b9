"""Agents that are killed, stopped, doubled and started in bad places: no clock stays locked, no traceback is shown."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from nodeagent.control.journal import load
from simulator.host.nvml.state import Calls
from tests.nodehost import NodeHost, until

CONFIG = {
    "gpu": {"call_deadline_s": 0.5, "recovery_interval_s": 0.2},
    "controls": {"restore_retry_s": 0.2, "stop_deadline_s": 1.0},
}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[NodeHost]:
    with NodeHost(tmp_path, gpus=4, config=CONFIG) as made:
        yield made


def journalled(host: NodeHost) -> int:
    return len(load(host.state_dir / "journal.json")[1])


def run_agent(host: NodeHost, **environment: str) -> subprocess.CompletedProcess[str]:
    """An agent that is expected to end by itself."""
    return subprocess.run(
        host.command("run"),
        env=host.environment | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def one_line(outcome: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """Exit code, and one clear sentence as the last line, without a traceback."""
    assert outcome.returncode == code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    said = [line for line in outcome.stderr.splitlines() if line.startswith("dynamollm-nodeagent: ")]
    assert len(said) == 1, outcome.stderr
    for part in parts:
        assert part in said[0]


class TestKilled:
    def test_restore_unlocks_what_a_killed_agent_left(self, host: NodeHost) -> None:
        host.start()
        host.lock(range(4), 990)
        host.kill()
        assert host.locks() == [(990, 990)] * 4  # the hardware does not know that the agent is gone
        restored = host.restore()
        assert restored.returncode == 0, restored.stderr
        assert restored.stdout.count(": restored") == 4
        assert host.locks() == [None] * 4
        assert "nothing to restore" in host.restore().stdout

    def test_restore_of_a_folder_that_is_not_there_is_an_error(self, host: NodeHost) -> None:
        """A slip of the finger must not read as "all is well"."""
        command = [sys.executable, "-m", "nodeagent.cli", "restore", "--state-dir", str(host.state_dir / "slip")]
        done = subprocess.run(command, env=host.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "slip is no folder" in done.stderr

    def test_the_next_start_unlocks_before_it_serves(self, host: NodeHost) -> None:
        host.start()
        host.lock(range(4), 990)
        host.kill()
        host.start(wait=False)
        until(lambda: host.locks() == [None] * 4)
        host.wait_serving()
        until(lambda: host.log().count("event=serving ") == 2)
        log = host.log()
        assert 0 < log.rindex("control restored") < log.rindex("serving")

    def test_killed_between_journal_and_write(self, host: NodeHost) -> None:
        """The write hangs in the driver while the journal already has it: the worst moment to die."""
        host.start()
        host.gpus.hang(0, Calls.CLOCK_WRITE)

        def ask() -> None:
            with pytest.raises(grpc.RpcError):
                host.lock([0], 990)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: journalled(host) == 1)
        host.kill()
        asking.join()
        host.gpus.clear_fault(0)
        assert host.restore().returncode == 0
        assert host.locks() == [None] * 4
        assert journalled(host) == 0

    def test_killed_at_any_moment(self, host: NodeHost) -> None:
        """A controller that never pauses, an agent that dies at random: after every restore nothing is locked."""
        seed = random.SystemRandom().randrange(1 << 32)
        chance = random.Random(seed)
        for index in range(4):
            host.gpus.set_fault(index, Calls.CLOCK_WRITE, delay_s=0.002)
        host.start()
        for round_number in range(6):
            term = round_number + 1
            stop, pace = threading.Event(), random.Random(seed + term)

            def steer(stop: threading.Event = stop, term: int = term, pace: random.Random = pace) -> None:
                while not stop.is_set():
                    try:
                        host.lock(range(4), pace.choice([600, 990, 1395]), ttl_s=pace.choice([0.01, 5.0]), term=term)
                    except grpc.RpcError:
                        return

            steering = threading.Thread(target=steer)
            steering.start()
            time.sleep(chance.uniform(0.0, 0.25))
            host.kill()
            stop.set()
            steering.join()
            if chance.random() < 0.5:
                assert host.restore().returncode == 0
                assert host.locks() == [None] * 4, f"seed {seed}"
            host.start()
            assert host.locks() == [None] * 4, f"seed {seed}"

    def test_a_lost_journal_byte_means_restore_everything(self, host: NodeHost) -> None:
        host.start()
        host.lock([1, 2], 990)
        host.kill()
        journal = host.state_dir / "journal.json"
        journal.write_bytes(journal.read_bytes()[:-3])
        restored = host.restore()
        assert restored.returncode == 0
        assert "journal is unreadable" in restored.stderr
        assert host.locks() == [None] * 4
        assert len(list(host.state_dir.glob("journal.json.unreadable-*"))) == 1


class TestStopped:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_it_unlocks_before_it_ends(self, host: NodeHost, number: signal.Signals) -> None:
        host.start()
        host.lock(range(4), 990)
        assert host.process is not None
        host.process.send_signal(number)
        assert host.process.wait(timeout=20) == 0
        assert host.locks() == [None] * 4
        assert journalled(host) == 0

    def test_with_a_hung_gpu_it_ends_in_time_and_says_what_is_left(self, host: NodeHost) -> None:
        host.start()
        host.lock(range(4), 990)
        host.gpus.hang(2, Calls.CLOCK_WRITE)
        began = time.monotonic()
        assert host.terminate() == 1
        assert time.monotonic() - began < 10
        assert [lock is None for lock in host.locks()] == [True, True, False, True]
        assert journalled(host) == 1
        assert "control not restored" in host.log()
        failed = host.restore()
        assert failed.returncode == 1
        assert "NOT restored" in failed.stdout
        host.gpus.clear_fault(2)
        assert host.restore().returncode == 0
        assert host.locks() == [None] * 4


class TestUnderAServiceManager:
    def test_ready_comes_after_the_restore_and_the_watchdog_is_fed(self, host: NodeHost, tmp_path: Path) -> None:
        host.start()
        host.lock(range(4), 990)
        host.kill()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(20)
            host.environment |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
            host.start(wait=False)
            said = manager.recv(1000)
            while b"READY=1" not in said:  # a first ping may come before
                assert said == b"WATCHDOG=1"
                said = manager.recv(1000)
            assert host.locks() == [None] * 4
            assert host.lock([0], 990)[0].code == 1
            assert [manager.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            assert host.terminate() == 0
            while not said.startswith(b"STOPPING=1"):
                said = manager.recv(1000)

    def test_a_hung_gpu_does_not_starve_the_watchdog(self, host: NodeHost, tmp_path: Path) -> None:
        host.gpus.hang(1, Calls.ALL)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(20)
            host.environment |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
            host.start()
            pings = [manager.recv(1000) for _ in range(30)]  # 6 s, longer than any loop may be stuck
            assert pings.count(b"WATCHDOG=1") >= 28
            assert [result.code for result in host.lock([0, 2, 3], 990)] == [1, 1, 1]
        host.gpus.clear_fault(1)


class TestOnlyOne:
    def test_a_second_agent_is_told_who_holds_the_node(self, host: NodeHost) -> None:
        host.start()
        assert host.process is not None
        host.lock([0], 990)
        one_line(run_agent(host), 4, f"pid {host.process.pid}")
        assert host.locks()[0] == (990, 990)
        assert host.lock([0], 1200)[0].applied.clock_lock.max_mhz == 1200  # the first one has not noticed

    def test_restore_leaves_a_living_agent_alone(self, host: NodeHost) -> None:
        host.start()
        assert host.process is not None
        host.lock([0], 990)
        one_line(host.restore(), 4, f"pid {host.process.pid}")
        assert host.locks()[0] == (990, 990)

    def test_a_socket_somebody_else_serves_is_not_taken_over(self, host: NodeHost) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(host.socket))
            other.listen()
            one_line(run_agent(host), 4, str(host.socket), "another program listens there")

    def test_a_socket_a_dead_agent_left_is_no_hindrance(self, host: NodeHost) -> None:
        host.start()
        host.kill()
        assert host.socket.exists()
        host.start()
        assert host.lock([0], 990)[0].code == 1


class TestBadPlaces:
    def test_no_driver_library(self, host: NodeHost) -> None:
        one_line(run_agent(host, LD_LIBRARY_PATH="/nonexistent"), 3, "no NVIDIA driver library found")

    def test_no_gpus_behind_the_library(self, host: NodeHost) -> None:
        one_line(run_agent(host, DYNAMOLLM_NVML_STATE="/nonexistent"), 3, "the NVIDIA driver does not answer")

    def test_port_in_use(self, host: NodeHost) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            one_line(run_agent(host, DYNAMOLLM_NODEAGENT__LISTEN__TCP=address), 3, address, "in use")
            one_line(run_agent(host, DYNAMOLLM_NODEAGENT__METRICS__LISTEN=address), 3, address, "metrics")

    def test_not_loopback(self, host: NodeHost) -> None:
        outcome = run_agent(host, DYNAMOLLM_NODEAGENT__LISTEN__TCP="0.0.0.0:0")
        one_line(outcome, 2, "listen.tcp", "not a loopback address")

    def test_unknown_group(self, host: NodeHost) -> None:
        one_line(run_agent(host, DYNAMOLLM_NODEAGENT__LISTEN__UNIX_GROUP="no-such-group"), 2, "no-such-group")

    def test_unknown_key_and_missing_file(self, host: NodeHost) -> None:
        one_line(run_agent(host, DYNAMOLLM_NODEAGENT__COLOUR="red"), 2, "colour: unknown key")
        host.config_path.unlink()
        one_line(run_agent(host), 2, str(host.config_path), "no such configuration file")

    def test_a_state_directory_that_is_none(self, host: NodeHost) -> None:
        host.state_dir.touch()
        one_line(run_agent(host), 2, str(host.state_dir), "is a file")

    def test_nothing_is_left_behind_by_a_failed_start(self, host: NodeHost) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            run_agent(host, DYNAMOLLM_NODEAGENT__LISTEN__TCP=f"127.0.0.1:{taken.getsockname()[1]}")
        assert sorted(path.name for path in host.state_dir.iterdir()) == ["agent.lock", "instances", "logs"]
        host.start()
