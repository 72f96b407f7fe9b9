"""Engines through the agent's API, as real processes on emulated GPUs: start, serve, drain, stop, die, adoption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from nodeagent.control.journal import load
from tests.nodehost import MODEL, NodeHost, refused, until

STARTING, WARMING = types.INSTANCE_STATE_STARTING, types.INSTANCE_STATE_WARMING
READY, DRAINING = types.INSTANCE_STATE_READY, types.INSTANCE_STATE_DRAINING
STOPPED, FAILED = types.INSTANCE_STATE_STOPPED, types.INSTANCE_STATE_FAILED
QUARANTINED = types.INSTANCE_STATE_QUARANTINED
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
SLEEP = "import time; time.sleep(600)"
# Never answers, never ends when asked to, and has a worker that does not either.
STUBBORN = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"])
print("stubborn engine up", flush=True)
{SLEEP}
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[NodeHost]:
    with NodeHost(tmp_path, gpus=4) as made:
        made.start()
        yield made


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process that is none of the agent's."""
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as process:
        yield process.pid
        process.kill()


def complete(endpoint: str, tokens: int) -> httpx.Response:
    body = {"model": MODEL, "prompt": "one two three", "max_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{endpoint}/v1/completions", json=body, timeout=60, trust_env=False)


class Client(threading.Thread):
    """One request in flight."""

    def __init__(self, endpoint: str, tokens: int) -> None:
        super().__init__()
        self.endpoint, self.tokens = endpoint, tokens
        self.answered_tokens = 0
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            response = complete(self.endpoint, self.tokens)
            self.answered_tokens = response.raise_for_status().json()["usage"]["completion_tokens"]
        except httpx.HTTPError as error:
            self.error = repr(error)


def sample(host: NodeHost, instance_id: str) -> pb.InstanceSample:
    telemetry = next(iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.1), timeout=10)))
    return next(instance for instance in telemetry.instances if instance.instance_id == instance_id)


def test_token_rates_are_told(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    client = Client(host.wait_state("a", READY).endpoint, 200)
    rates = []
    for telemetry in host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.1), timeout=30):
        rates += [one.generation_tokens_per_s for one in telemetry.instances if one.generation_tokens_total > 0]
        if not client.is_alive():
            break
    client.join(30)
    assert client.answered_tokens == 200
    assert 5 < max(rates) < 500
    host.stop("a", force=True)
    host.wait_state("a", STOPPED)


def test_a_whole_life(host: NodeHost) -> None:
    states: list[int] = []
    watch = host.stub.WatchInstances(pb.WatchInstancesRequest(), timeout=60)

    def follow() -> None:
        for message in watch:
            for instance in message.instances:
                if not states or states[-1] != instance.state:
                    states.append(instance.state)
                if instance.state == STOPPED:
                    return

    launched = host.launch("a", [0, 1])
    following = threading.Thread(target=follow)
    following.start()
    assert (launched.state, launched.endpoint) == (STARTING, "")
    ready = host.wait_state("a", READY)
    assert sorted(host.engine_pids()) == [ready.pid]
    assert {process.pid for process in host.gpus.observe(1).processes} == {ready.pid}
    assert host.gpus.observe(2).processes == ()

    response = complete(ready.endpoint, 20)
    assert response.json()["usage"]["completion_tokens"] == 20
    seen = sample(host, "a")
    assert seen.state == READY
    assert (seen.requests_running, seen.requests_waiting) == (0, 0)
    assert seen.generation_tokens_total >= 20
    assert seen.prompt_tokens_total > 0
    assert seen.tbt_seconds.counts[-1] >= 1  # of whole requests
    assert seen.tbt_seconds.counts[-1] < seen.token_gap_seconds.counts[-1]
    assert 0 < seen.power_w < 1400
    assert 0 <= seen.kv_cache_usage_ratio <= 1
    for histogram in (seen.ttft_seconds, seen.token_gap_seconds):
        assert len(histogram.counts) == len(histogram.bounds) + 1
        assert histogram.counts[-1] >= 1
        assert histogram.sum > 0

    assert host.drain("a").state == DRAINING
    until(lambda: "drain" in host.instance("a").step_seconds)
    host.stop("a")
    stopped = host.wait_state("a", STOPPED)
    assert set(stopped.step_seconds) == {"start", "warm", "drain", "stop"}
    assert all(0 <= seconds < 60 for seconds in stopped.step_seconds.values())
    assert stopped.endpoint == ""
    assert host.engine_pids() == []
    assert host.gpus.observe(0).processes == ()
    following.join(20)
    watch.cancel()
    # A watcher gets the latest state of each instance, so short ones may be passed over; order is kept.
    order = [STARTING, WARMING, READY, DRAINING, types.INSTANCE_STATE_STOPPING, STOPPED]
    assert states == [state for state in order if state in states]
    assert {STARTING, READY, STOPPED} <= set(states)


def test_starting_is_idempotent_and_gpus_have_one_owner(host: NodeHost) -> None:
    first = host.launch("a", [0, 1])
    assert host.launch("a", [0, 1]).pid == first.pid
    with refused(grpc.StatusCode.ALREADY_EXISTS, "another specification"):
        host.launch("a", [2, 3])
    with refused(PRECONDITION, "belongs to instance 'a'"):
        host.launch("b", [1, 2])
    spec = types.InstanceSpec(instance_id="b", model=MODEL, gpu_uuids=["GPU-nowhere"])
    with refused(grpc.StatusCode.NOT_FOUND, "GPU-nowhere"):
        host.stub.StartInstance(pb.StartInstanceRequest(request_id="n", spec=spec, term=1), timeout=10)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "instance_id"):
        host.launch("A b", [2, 3])
    for call in (host.drain, host.stop):
        with refused(grpc.StatusCode.NOT_FOUND, "no instance 'zzz'"):
            call("zzz")
    with refused(PRECONDITION, "stop it instead"):
        host.drain("a")
    host.stop("a")  # not serving yet: nothing to drain
    host.wait_state("a", STOPPED)
    assert host.launch("a", [2, 3]).state == STARTING  # an ended instance's id is free again


def test_whose_order_an_instance_obeyed_last_is_told_and_kept(host: NodeHost) -> None:
    ada = types.Owner(kind=types.OWNER_KIND_OPERATOR, name="ada")
    assert host.launch("a", [0, 1]).held_by == ""
    spec = types.InstanceSpec(instance_id="b", model=MODEL, gpu_uuids=host.uuids[2:4])
    start = pb.StartInstanceRequest(request_id=host.request_id(), spec=spec, owner=ada, reason="a trial")
    assert host.stub.StartInstance(start, timeout=10).instance.held_by == "ada"
    host.wait_state("a", READY)
    drain = pb.DrainInstanceRequest(request_id=host.request_id(), instance_id="a", owner=ada, reason="a trial")
    assert host.stub.DrainInstance(drain, timeout=10).instance.held_by == "ada"
    host.kill()
    host.start()
    assert {name: host.instance(name).held_by for name in ("a", "b")} == {"a": "ada", "b": "ada"}
    # A controller's next order makes it the controller's again.
    host.stop("b", force=True)
    assert host.instance("b").held_by == ""


def test_no_request_is_lost_to_a_drain(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    endpoint = host.wait_state("a", READY).endpoint
    with refused(PRECONDITION, "drain it first"):
        host.stop("a")
    clients = [Client(endpoint, 150) for _ in range(3)]
    until(lambda: sample(host, "a").requests_running == 3)
    host.drain("a")
    until(lambda: "3 running" in host.instance("a").detail)
    with refused(PRECONDITION, "not drained"):
        host.stop("a")
    until(lambda: "drain" in host.instance("a").step_seconds)
    for client in clients:
        client.join(30)
    assert [client.answered_tokens for client in clients] == [150] * 3
    # Somebody who did not hear of the drain sends one more: the proof is void.
    late = Client(endpoint, 150)
    until(lambda: sample(host, "a").requests_running == 1)
    with refused(PRECONDITION, "got new work after its drain"):
        host.stop("a")
    until(lambda: "drain" in host.instance("a").step_seconds)
    late.join(30)
    assert late.answered_tokens == 150
    host.stop("a")
    host.wait_state("a", STOPPED)


def test_force_stops_an_engine_at_work(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    client = Client(host.wait_state("a", READY).endpoint, 5000)
    until(lambda: sample(host, "a").requests_running == 1)
    host.stop("a", force=True)
    host.wait_state("a", STOPPED)
    client.join(30)
    assert client.error
    assert host.engine_pids() == []


def test_engines_outlive_a_killed_agent_and_are_taken_over(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    host.launch("b", [2, 3])
    a, b = host.wait_state("a", READY), host.wait_state("b", READY)
    host.lock([0, 1], 990)
    client = Client(a.endpoint, 200)
    until(lambda: sample(host, "a").requests_running == 1)
    host.drain("b")
    until(lambda: "drain" in host.instance("b").step_seconds)
    host.kill()
    assert complete(a.endpoint, 5).status_code == 200  # served with no agent at all
    host.start()
    again = host.instance("a")
    assert (again.state, again.pid, again.endpoint) == (READY, a.pid, a.endpoint)
    assert (host.instance("b").state, host.instance("b").pid) == (DRAINING, b.pid)
    assert "drain" in host.instance("b").step_seconds
    assert host.locks() == [None] * 4
    client.join(30)
    assert client.answered_tokens == 200
    host.stop("b")
    host.wait_state("b", STOPPED)
    assert host.engine_pids() == [a.pid]


def test_engines_outlive_a_stopped_agent(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    pid = host.wait_state("a", READY).pid
    assert host.terminate() == 0
    assert psutil.pid_exists(pid)
    host.start()
    assert host.instance("a").state == READY
    assert host.instance("a").pid == pid


def test_an_interrupted_start_goes_on(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=2, engine_start_s=2.0) as host:
        host.start()
        pid = host.launch("a", [0, 1]).pid
        host.kill()
        host.start()
        assert host.instance("a").state == STARTING
        assert host.wait_state("a", READY).pid == pid


def test_a_launch_whose_pid_was_never_written_down_is_found(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    pid = host.wait_state("a", READY).pid
    host.kill()
    path = host.state_dir / "instances" / "a.json"
    record = json.loads(path.read_text()) | {"process": None, "state": "starting"}
    path.write_text(json.dumps(record))
    host.start()
    assert host.wait_state("a", READY).pid == pid


def test_a_launch_that_never_happened_is_not_made_up(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    pid = host.wait_state("a", READY).pid
    host.kill()
    os.kill(pid, signal.SIGKILL)
    path = host.state_dir / "instances" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"process": None, "state": "starting"}))
    host.start()
    assert "interrupted" in host.wait_state("a", FAILED).detail


def test_a_killed_engine_fails_at_once_and_frees_its_gpus(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    pid = host.wait_state("a", READY).pid
    os.kill(pid, signal.SIGKILL)
    failed = host.wait_state("a", FAILED, timeout_s=5)
    assert "killed by SIGKILL" in failed.detail
    assert host.gpus.observe(0).processes == ()
    host.launch("a", [0, 1])
    assert host.wait_state("a", READY).pid != pid


def test_an_engine_that_died_while_no_agent_ran_is_failed(host: NodeHost) -> None:
    host.launch("a", [0, 1])
    pid = host.wait_state("a", READY).pid
    host.kill()
    os.kill(pid, signal.SIGKILL)
    host.start()
    assert "while no agent ran" in host.wait_state("a", FAILED).detail


def test_an_engine_after_a_reboot_is_failed(host: NodeHost, stranger: int) -> None:
    """Its pid may belong to somebody else by now."""
    host.launch("a", [0, 1])
    pid = host.wait_state("a", READY).pid
    host.kill()
    os.kill(pid, signal.SIGKILL)
    path = host.state_dir / "instances" / "a.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"boot_id": "an earlier one", "process": {"pid": stranger, "started_s": 5.0}}))
    host.start()
    assert "rebooted" in host.wait_state("a", FAILED).detail
    assert psutil.Process(stranger).status() != psutil.STATUS_ZOMBIE


def test_gpus_that_are_not_proven_free_are_quarantined(tmp_path: Path, stranger: int) -> None:
    with NodeHost(tmp_path, gpus=4, config={"engine": {"gpu_free_timeout_s": 0.5}}) as host:
        host.start()
        host.launch("a", [0, 1])
        host.wait_state("a", READY)
        host.gpus.attach_process(1, stranger, 1 << 30)
        host.drain("a")
        until(lambda: "drain" in host.instance("a").step_seconds)
        host.stop("a")
        quarantined = host.wait_state("a", QUARANTINED)
        assert f"pid {stranger}" in quarantined.detail
        with refused(PRECONDITION, "quarantined"):
            host.launch("b", [0, 1])
        host.kill()  # quarantine outlives the agent
        host.start()
        assert host.instance("a").state == QUARANTINED
        host.gpus.detach_process(1, stranger)
        host.wait_state("a", STOPPED, timeout_s=15)
        host.launch("b", [0, 1])
        host.wait_state("b", READY)


def test_nothing_is_started_beside_a_stranger(host: NodeHost, stranger: int) -> None:
    host.gpus.attach_process(3, stranger, 20 << 30)
    with refused(PRECONDITION, f"pid {stranger}"):
        host.launch("a", [2, 3])
    host.gpus.detach_process(3, stranger)
    assert host.launch("a", [2, 3]).state == STARTING


def test_an_engine_that_will_not_go_is_killed_with_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    config = {"engine": {"stop_timeout_s": 0.5, "start_timeout_s": 3.0}}
    with NodeHost(tmp_path / "host", gpus=2, engine=(sys.executable, str(script)), config=config) as host:
        host.start()
        host.launch("a", [0])
        until(lambda: len(host.engine_pids()) == 2 and "stubborn" in (host.state_dir / "logs" / "a.log").read_text())
        host.stop("a")
        host.wait_state("a", STOPPED, timeout_s=15)
        assert host.engine_pids() == []
        host.launch("b", [1])  # and left alone, it is given up after its start time
        assert "not healthy within 3 s" in host.wait_state("b", FAILED, timeout_s=20).detail
        assert host.engine_pids() == []


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    with NodeHost(tmp_path / "one", gpus=2, engine=("no-such-engine",)) as host:
        host.start()
        host.launch("a", [0])
        assert "no-such-engine" in host.wait_state("a", FAILED).detail
    with NodeHost(tmp_path / "two", gpus=2, engine_args=("--no-such-option",)) as host:
        host.start()
        host.launch("a", [0, 1])
        detail = host.wait_state("a", FAILED).detail
        assert "exit code" in detail
        assert "no-such-option" in detail


def test_ended_instances_are_listed_within_bounds(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=1, engine=("no-such-engine",), config={"engine": {"keep_finished": 2}}) as host:
        host.start()
        for name in ("a", "b", "c"):
            host.launch(name, [0])
            host.wait_state(name, FAILED)
        until(lambda: len(host.stub.ListInstances(pb.ListInstancesRequest(), timeout=10).instances) == 2)
        assert sorted(path.name for path in (host.state_dir / "instances").glob("*.json")) == ["b.json", "c.json"]
        assert load(host.state_dir / "journal.json") == ("", [])
