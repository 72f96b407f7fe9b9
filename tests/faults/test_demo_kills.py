"""Parts of the running demonstration are killed. The contract: no request is lost, no clock stays locked past its
lease, engines serve on, and whoever was killed comes back and carries on."""

from __future__ import annotations

import signal
import sqlite3
import time
import tomllib
from contextlib import closing
from pathlib import Path

import grpc
import psutil
import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types
from simulator.demo.fleet import LEASE
from tests.demo_run import DemoRun, prepared, wait_for

# From the end of a lease, or from a death, until the state file shows it: the agent's own pace, the supervisor's
# notice, a Python start on a busy machine.
SLACK_S = 3.0


@pytest.fixture(scope="module", autouse=True)
def _profile() -> None:
    prepared()


def locked(demo: DemoRun, host: str) -> set[str]:
    return {gpu.uuid for gpu in demo.gpus(host) if gpu.lock_mhz is not None}


def engines(demo: DemoRun, host: str) -> set[int]:
    return {process.pid for gpu in demo.gpus(host) for process in gpu.processes}


def instances(demo: DemoRun, host: str) -> list[types.Instance]:
    config = tomllib.loads((demo.folder / "dynamollm" / host / "nodeagent.toml").read_text(encoding="utf-8"))
    with grpc.insecure_channel(config["listen"]["tcp"]) as channel:
        return list(rpc.NodeAgentStub(channel).ListInstances(pb.ListInstancesRequest(), timeout=5).instances)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_agent_leaves_no_lock_and_loses_no_request(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--quick", "--u", "0.4", "--seed", "3") as demo:
        demo.wait_for_load()
        hosts = ("host-1", "host-2")
        wait_for(lambda: any(locked(demo, host) for host in hosts), 10.0, "a clock is locked")
        host = next(host for host in hosts if locked(demo, host))
        part = f"agent-{host}"
        serving = engines(demo, host)
        assert serving

        killed = demo.kill(part)
        killed_s = time.monotonic()
        held = locked(demo, host)
        freed: set[str] = set()
        while not held <= freed:
            assert time.monotonic() - killed_s < LEASE.ttl_s + SLACK_S, f"still locked: {held - freed}"
            freed |= {gpu.uuid for gpu in demo.gpus(host) if gpu.lock_mhz is None}
            time.sleep(0.02)

        wait_for(lambda: demo.pid(part) not in (None, killed), 20.0, "the agent is started again")
        assert all(psutil.pid_exists(pid) for pid in serving)  # engines outlive their agent
        found: list[types.Instance] = []

        def answers() -> bool:
            try:
                found[:] = instances(demo, host)
            except grpc.RpcError:
                return False
            return True

        wait_for(answers, 20.0, "the new agent answers")
        adopted = {instance.pid for instance in found if instance.pid}
        assert adopted
        assert adopted <= serving  # the same engines, none of them started anew
        wait_for(lambda: bool(locked(demo, host)), 20.0, "the controller locks clocks there again")

        figures = demo.figures()
    assert figures["requests_lost"] == 0
    assert figures["requests_served"] == figures["requests_sent"] > 20
    assert figures["phases"]["dynamollm"]["restarts"][part] == 1
    assert figures["phases"]["dynamollm"]["energy"]["coverage"] == pytest.approx(1.0, abs=0.05)
    assert "SIGKILL" in demo.output


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_controller_is_not_missed_by_users_and_carries_on(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--quick", "--u", "0.4", "--seed", "3") as demo:
        demo.wait_for_load()
        hosts = ("host-1", "host-2")
        wait_for(lambda: any(locked(demo, host) for host in hosts), 10.0, "a clock is locked")

        killed = demo.kill("controller")
        killed_s = time.monotonic()
        wait_for(lambda: demo.pid("controller") not in (None, killed), 20.0, "the controller is started again")
        # Its successor is held back, so that the leases do run out: nobody renews them meanwhile.
        successor = psutil.Process(demo.pid("controller"))
        successor.suspend()
        while any(locked(demo, host) for host in hosts):
            assert time.monotonic() - killed_s < LEASE.ttl_s + SLACK_S, "clocks are locked past their lease"
            time.sleep(0.05)
        assert any(gpu.gpu_util > 0 for host in hosts for gpu in demo.gpus(host))  # still serving
        successor.resume()
        wait_for(lambda: any(locked(demo, host) for host in hosts), 20.0, "the successor locks clocks again")

        figures = demo.figures()
    assert figures["requests_lost"] == 0
    assert figures["requests_served"] == figures["requests_sent"] > 20
    assert figures["phases"]["dynamollm"]["restarts"]["controller"] == 1
    with closing(sqlite3.connect(f"file:{figures['database']}?mode=ro", uri=True)) as history:
        terms = [term for (term,) in history.execute("SELECT DISTINCT term FROM decisions ORDER BY term")]
        cold_starts = history.execute("SELECT COUNT(*) FROM decisions WHERE reason = 'cold_start'").fetchone()[0]
    assert terms == [1, 2]  # it leads under a new term …
    assert cold_starts == 1  # … with the plan that it found in its database
    assert demo.process.returncode == 0
    assert signal.SIGKILL.name in demo.output
