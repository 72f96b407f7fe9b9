"""Warm layouts through the agent's API: sleep only without work, memory checked before, wake-up in seconds."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from tests.nodehost import MODEL, NodeHost, refused, until

READY, DRAINING, ASLEEP = (
    types.INSTANCE_STATE_READY,
    types.INSTANCE_STATE_DRAINING,
    types.INSTANCE_STATE_ASLEEP,
)
WARMING, STOPPED, FAILED = (
    types.INSTANCE_STATE_WARMING,
    types.INSTANCE_STATE_STOPPED,
    types.INSTANCE_STATE_FAILED,
)
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
GIB = 1 << 30


def sleepy(directory: Path, sleep_s: float = 0.2, wake_s: float = 0.2, **engine: Any) -> NodeHost:
    settings = {"sleep_mode": True, "sleep_host_memory_gib": 600.0} | engine
    host = NodeHost(directory, gpus=4, config={"engine": settings})
    host.environment |= {
        "DYNAMOLLM_EMULATED_SLEEP_S": str(sleep_s),
        "DYNAMOLLM_EMULATED_WAKE_S": str(wake_s),
    }
    return host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[NodeHost]:
    with sleepy(tmp_path) as made:
        made.start()
        yield made


def asleep(host: NodeHost, instance_id: str, gpus: list[int]) -> types.Instance:
    host.launch(instance_id, gpus)
    host.wait_state(instance_id, READY)
    host.drained(instance_id)
    host.sleep(instance_id)
    return host.wait_state(instance_id, ASLEEP)


def held_gib(host: NodeHost, gpu: int) -> float:
    return sum(process.used_bytes for process in host.gpus.observe(gpu).processes) / GIB


def complete(endpoint: str, tokens: int = 5) -> int:
    body = {"model": MODEL, "prompt": "one two three", "max_tokens": tokens, "ignore_eos": True}
    response = httpx.post(f"{endpoint}/v1/completions", json=body, timeout=30, trust_env=False)
    count: int = response.raise_for_status().json()["usage"]["completion_tokens"]
    return count


def test_it_sleeps_and_wakes_up_with_measured_steps(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    ready = host.wait_state("a", READY)
    full_gib = held_gib(host, 0)
    host.drained("a")
    assert host.sleep("a").state in (DRAINING, ASLEEP)  # returns at once
    sleeping = host.wait_state("a", ASLEEP)
    assert sleeping.pid == ready.pid
    assert sleeping.endpoint == ""  # nobody is to send it anything
    assert held_gib(host, 0) == pytest.approx(1.5)
    assert "GiB of GPU memory freed" in sleeping.detail
    view = host.gpus.observe(0)
    assert view.power_w == pytest.approx(122, abs=1)  # an idle context's
    assert "drew 24" in sleeping.detail  # two of them
    assert host.sleep("a").state == ASLEEP
    host.wake("a")
    awake = host.wait_state("a", READY)
    assert awake.pid == ready.pid
    assert held_gib(host, 0) == pytest.approx(full_gib)
    assert awake.step_seconds["sleep"] >= 0.2
    assert awake.step_seconds["wake"] >= 0.2
    assert complete(awake.endpoint) == 5
    assert host.wake("a").state == READY
    host.drained("a")  # and a second time
    host.sleep("a")
    host.wait_state("a", ASLEEP)
    host.stop("a")
    host.wait_state("a", STOPPED)
    assert host.engine_pids() == []


def test_no_engine_with_work_is_put_to_sleep(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    endpoint = host.wait_state("a", READY).endpoint
    with refused(PRECONDITION, "not drained"):
        host.sleep("a")
    host.drained("a")
    answers: list[int] = []
    client = threading.Thread(target=lambda: answers.append(complete(endpoint, 600)))
    client.start()  # one who did not hear of the drain
    until(lambda: "num_requests_running" in (page := httpx.get(f"{endpoint}/metrics").text) and "} 1.0" in page)
    with refused(PRECONDITION, "got new work after its drain"):
        host.sleep("a")
    client.join(30)
    assert answers == [600]
    assert host.instance("a").state == DRAINING


def test_a_request_that_slips_in_is_finished_before_the_sleep(tmp_path: Path) -> None:
    with sleepy(tmp_path, sleep_s=2.0) as host:
        host.start()
        host.launch("a", [0, 1])
        endpoint = host.wait_state("a", READY).endpoint
        host.drained("a")
        host.sleep("a")
        answers: list[int] = []
        client = threading.Thread(target=lambda: answers.append(complete(endpoint)))
        client.start()
        host.wait_state("a", ASLEEP)
        host.wake("a")
        client.join(30)
        assert answers == [5]  # late, not lost


def test_the_watts_and_the_memory_of_a_sleeper_are_told(host: NodeHost) -> None:
    sleeper = asleep(host, "a", [0, 1])
    idle_w = sum(host.gpus.observe(gpu).power_w for gpu in (0, 1))
    assert sleeper.asleep_power_w == pytest.approx(idle_w, rel=0.05)
    assert sleeper.asleep_gpu_bytes == pytest.approx(2 * 1.5 * GIB, rel=0.05)
    assert sleeper.asleep_host_bytes > sleeper.asleep_gpu_bytes
    sample = next(iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.1), timeout=20)))
    assert sample.instances[0].power_w == pytest.approx(idle_w, rel=0.05)
    host.wake("a")
    awake = host.wait_state("a", READY)
    assert not awake.HasField("asleep_power_w")
    assert awake.asleep_gpu_bytes == 0


def test_layouts_share_gpus_while_one_sleeps(host: NodeHost) -> None:
    asleep(host, "tp2", [0, 1])
    host.launch("tp4", [0, 1, 2, 3])
    four = host.wait_state("tp4", READY)
    assert complete(four.endpoint) == 5
    for sample in host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.1), timeout=20):
        power_w = {one.instance_id: one.HasField("power_w") for one in sample.instances}
        if "tp4" in power_w:
            break
    assert power_w == {"tp2": False, "tp4": False}  # on shared GPUs nobody can tell whose watts they are
    with refused(PRECONDITION, "belongs to 'tp4', which is ready; put that one to sleep"):
        host.wake("tp2")
    with refused(PRECONDITION, "belongs to instance 'tp4'"):
        host.launch("other", [0, 1])
    began = time.monotonic()
    host.drained("tp4")
    host.sleep("tp4")
    host.wait_state("tp4", ASLEEP)
    host.wake("tp2")
    two = host.wait_state("tp2", READY)
    assert time.monotonic() - began < 20  # a re-shard without a start
    assert complete(two.endpoint) == 5
    assert {round(held_gib(host, gpu), 1) for gpu in (2, 3)} == {1.5}
    host.stop("tp4")  # the sleeper goes, the other one serves on
    host.wait_state("tp4", STOPPED)
    assert complete(two.endpoint) == 5
    host.drained("tp2")
    host.stop("tp2")
    host.wait_state("tp2", STOPPED)
    assert [held_gib(host, gpu) for gpu in range(4)] == [0.0] * 4


def test_the_awake_one_can_go_while_the_other_sleeps_on(host: NodeHost) -> None:
    asleep(host, "tp2", [0, 1])
    host.launch("tp4", [0, 1, 2, 3])
    host.wait_state("tp4", READY)
    host.stop("tp4", force=True)
    host.wait_state("tp4", STOPPED)  # proven free but for what sleeps there
    host.wake("tp2")
    host.wait_state("tp2", READY)


def test_gpu_memory_is_checked_before(tmp_path: Path) -> None:
    with sleepy(tmp_path, args=("--gpu-memory-utilization", "0.985")) as host:
        host.start()
        asleep(host, "a", [0, 1])
        with refused(PRECONDITION, "rarely fits beside a sleeping one"):
            host.launch("b", [0, 1])
        host.launch("c", [2, 3])
        host.gpus.attach_process(1, host.wait_state("c", READY).pid, 30 * GIB)  # somebody else's memory
        with refused(PRECONDITION, "MiB are needed"):
            host.wake("a")
        assert host.instance("a").state == ASLEEP


def test_host_memory_is_accounted_for(tmp_path: Path) -> None:
    with sleepy(tmp_path, sleep_host_memory_gib=200.0) as host:
        host.start()
        asleep(host, "a", [0, 1])  # up to 2 x 73 GiB
        host.launch("b", [2, 3])
        host.wait_state("b", READY)
        host.drained("b")
        with refused(PRECONDITION, "of the 200 GiB for sleeping engines"):
            host.sleep("b")
        host.stop("a")
        host.wait_state("a", STOPPED)
        host.sleep("b")
        host.wait_state("b", ASLEEP)


def test_an_engine_that_refuses_to_sleep_stays_drained(tmp_path: Path) -> None:
    with sleepy(tmp_path) as host:
        host.environment["DYNAMOLLM_EMULATED_HOST_MEMORY_GIB"] = "10"
        host.start()
        host.launch("a", [0, 1])
        host.wait_state("a", READY)
        host.drained("a")
        host.sleep("a")
        until(lambda: "not put to sleep" in host.instance("a").detail)
        assert host.instance("a").state == DRAINING
        assert "cannot allocate" in host.instance("a").detail


def test_engines_without_sleep_mode_are_not_put_to_sleep(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=2) as host:
        host.start()
        host.launch("a", [0, 1])
        host.wait_state("a", READY)
        host.drained("a")
        with refused(PRECONDITION, "engine.sleep_mode"):
            host.sleep("a")
        with refused(PRECONDITION, "only one that sleeps"):
            host.wake("a")


def test_a_sleeper_outlives_the_agent(host: NodeHost) -> None:
    pid = asleep(host, "a", [0, 1]).pid
    host.kill()
    host.start()
    assert (host.instance("a").state, host.instance("a").pid) == (ASLEEP, pid)
    host.wake("a")
    assert host.wait_state("a", READY).pid == pid


@pytest.mark.parametrize("phase", ["falling", "waking"])
def test_a_killed_agent_leaves_no_half_sleeper(tmp_path: Path, phase: str) -> None:
    with sleepy(tmp_path, sleep_s=2.0 if phase == "falling" else 0.2, wake_s=2.0) as host:
        host.start()
        host.launch("a", [0, 1])
        host.wait_state("a", READY)
        host.drained("a")
        host.sleep("a")
        if phase == "waking":
            host.wait_state("a", ASLEEP)
            host.wake("a")
        path = host.state_dir / "instances" / "a.json"
        until(lambda: (json.loads(path.read_text())["nap"] or {}).get("phase") == phase)
        time.sleep(0.5)
        host.kill()
        host.start()
        if phase == "waking":
            host.wait_state("a", READY)
        else:
            host.wait_state("a", ASLEEP, DRAINING)
            until(lambda: not host.instance("a").detail.startswith("falling"))


def test_a_sleeper_that_dies_frees_its_gpus(host: NodeHost) -> None:
    os.kill(asleep(host, "a", [0, 1]).pid, signal.SIGKILL)
    host.wait_state("a", FAILED)
    host.launch("a", [0, 1])
    host.wait_state("a", READY)
