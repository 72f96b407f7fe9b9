"""Restarts with another tensor parallelism, through the agent's API, with engines whose shards are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from nodeagent.engine.pids import pid_lives
from tests.nodehost import MODEL, NodeHost, refused, until

STARTING, WARMING = types.INSTANCE_STATE_STARTING, types.INSTANCE_STATE_WARMING
READY, DRAINING = types.INSTANCE_STATE_READY, types.INSTANCE_STATE_DRAINING
STOPPED, FAILED = types.INSTANCE_STATE_STOPPED, types.INSTANCE_STATE_FAILED
QUARANTINED = types.INSTANCE_STATE_QUARANTINED
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
SHARDED = (sys.executable, str(Path(__file__).parents[1] / "sharded_engine.py"))


def sharded(directory: Path, trouble: str = "", **engine: Any) -> NodeHost:
    env = {"SHARDED_TROUBLE": trouble, "SHARDED_RUNNING": str(directory / "running")}
    settings = {"env": env, "stop_timeout_s": 2.0, "gpu_free_timeout_s": 4.0, "start_timeout_s": 20.0} | engine
    host = NodeHost(directory, gpus=4, engine=SHARDED, config={"engine": settings})
    host.environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "proto"), os.environ.get("PYTHONPATH", "")]
    )
    return host


def on_gpu(host: NodeHost, index: int) -> set[int]:
    return {process.pid for process in host.gpus.observe(index).processes}


def gpus_of(instance: types.Instance, host: NodeHost) -> list[int]:
    return [host.uuids.index(gpu) for gpu in instance.spec.gpu_uuids]


def record(host: NodeHost, instance_id: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((host.state_dir / "instances" / f"{instance_id}.json").read_text())
    return found


@pytest.fixture
def stranger() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process.pid
        process.kill()


def test_no_request_is_lost_when_two_gpus_become_four(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=4) as host:
        host.start()
        host.launch("a", [0, 1])
        before = host.wait_state("a", READY)
        answers: list[int] = []

        def ask() -> None:
            body = {"model": MODEL, "prompt": "one two", "max_tokens": 120, "ignore_eos": True}
            response = httpx.post(f"{before.endpoint}/v1/completions", json=body, timeout=60, trust_env=False)
            answers.append(response.raise_for_status().json()["usage"]["completion_tokens"])

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()

        def running() -> bool:
            page = httpx.get(f"{before.endpoint}/metrics", trust_env=False).text
            return any(
                line.startswith("vllm:num_requests_running") and line.endswith(" 3.0") for line in page.split("\n")
            )

        until(running)
        begun = host.restart("a", [0, 1, 2, 3])
        assert begun.instance.state == DRAINING
        assert begun.transaction_id in begun.instance.detail
        assert host.restart("a", [0, 1, 2, 3]).transaction_id == begun.transaction_id
        with refused(PRECONDITION, begun.transaction_id):
            host.restart("a", [1, 2])
        with refused(PRECONDITION, "belongs to instance 'a'"):  # the new GPUs are taken from the first moment
            host.launch("b", [2, 3])
        until(lambda: host.instance("a").state == READY and len(host.instance("a").spec.gpu_uuids) == 4)
        for client in clients:
            client.join(30)
        after = host.instance("a")
        assert answers == [120] * 3
        assert after.pid != before.pid
        assert f"restart {begun.transaction_id} is done" in after.detail
        assert set(after.step_seconds) == {"start", "warm", "drain", "stop", "restart"}
        parts = sum(after.step_seconds[step] for step in ("drain", "stop", "start", "warm"))
        assert parts <= after.step_seconds["restart"] + 0.1
        assert [on_gpu(host, gpu) for gpu in range(4)] == [{after.pid}] * 4
        assert record(host)["restart"] is None
        host.restart("a", [2, 3])  # and smaller, on others
        until(lambda: host.instance("a").state == READY and gpus_of(host.instance("a"), host) == [2, 3])
        assert on_gpu(host, 0) == set()
        host.launch("b", [0, 1])
        host.wait_state("b", READY)


def test_work_left_at_the_deadline_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "running").write_text("1")
    with sharded(tmp_path) as host:
        host.start()
        host.launch("a", [0])
        host.wait_state("a", READY)
        host.restart("a", [1, 2], drain_deadline_s=0.5)
        until(lambda: gpus_of(host.instance("a"), host) == [1, 2])
        after = host.wait_state("a", READY)
        assert "drain" not in after.step_seconds  # it was never proven
        assert "drain of a restart did not end in time" in host.log()


def test_what_cannot_be_restarted_is_refused(tmp_path: Path) -> None:
    with sharded(tmp_path) as host:
        host.start()
        host.launch("a", [0])
        host.launch("b", [1])
        with refused(PRECONDITION, "starting"):
            host.restart("a", [2])
        host.wait_state("a", READY)
        host.wait_state("b", READY)
        with refused(PRECONDITION, "belongs to instance 'b'"):
            host.restart("a", [0, 1])
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "gpu_uuids"):
            host.restart("a", [])
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "twice"):
            host.restart("a", [2, 2])
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "drain_deadline_s"):
            host.restart("a", [2], drain_deadline_s=-1)
        with refused(grpc.StatusCode.NOT_FOUND, "no instance 'zzz'"):
            host.restart("zzz", [2])
        assert host.restart("a", [2], term=5).transaction_id
        with refused(PRECONDITION, "term"):
            host.restart("b", [3], term=4)
        host.stop("b", force=True, term=5)
        host.wait_state("b", STOPPED)
        with refused(PRECONDITION, "stopped"):
            host.restart("b", [3], term=5)


@pytest.mark.parametrize("trouble", ["dies", "no-health", "no-warm-up", "no-such-file"])
def test_a_layout_that_does_not_come_up_is_rolled_back(tmp_path: Path, trouble: str) -> None:
    with sharded(tmp_path, f"2:{trouble}", start_timeout_s=4.0) as host:
        host.start()
        host.launch("a", [0])
        first = host.wait_state("a", READY)
        if trouble == "no-such-file":  # the new engine does not even get a GPU to itself
            host.gpus.attach_process(1, os.getpid(), 1 << 20)
            with refused(PRECONDITION, f"pid {os.getpid()}"):
                host.restart("a", [0, 1])
            host.gpus.detach_process(1, os.getpid())
            (tmp_path / "running").write_text("1")
            begun = host.restart("a", [0, 1], drain_deadline_s=1)
            host.gpus.attach_process(1, os.getpid(), 1 << 20)
        else:
            begun = host.restart("a", [0, 1])
        until(lambda: "rolled back" in host.instance("a").detail, 40, lambda: str(host.instance("a")))
        back = host.wait_state("a", READY)
        assert begun.transaction_id in back.detail
        assert gpus_of(back, host) == [0]
        assert back.pid != first.pid
        if trouble == "dies":  # why is still there to be read
            assert "told to die" in (host.state_dir / "logs" / "a.log.1").read_text()
        assert len(on_gpu(host, 0)) == 1
        assert on_gpu(host, 1) <= {os.getpid()}


def test_when_both_layouts_fail_the_gpus_are_free_and_it_says_why(tmp_path: Path) -> None:
    with sharded(tmp_path, "2:dies") as host:
        host.start()
        host.launch("a", [0])
        host.wait_state("a", READY)
        script = tmp_path / "gone.py"
        config = host.config_path.read_text().replace(SHARDED[1], str(script))
        host.kill()  # the next agent starts another program, which never works
        host.config_path.write_text(config)
        script.write_text("raise SystemExit('no engine here')")
        host.start()
        host.restart("a", [0, 1])
        failed = host.wait_state("a", FAILED)
        assert "the old layout did not come back" in failed.detail
        assert [on_gpu(host, gpu) for gpu in range(2)] == [set(), set()]
        assert host.engine_pids() == []


def test_orphaned_workers_are_found_by_nvml_and_ended(tmp_path: Path) -> None:
    with sharded(tmp_path, "2:orphans") as host:
        host.start()
        host.launch("a", [0, 1])
        host.wait_state("a", READY)
        orphans = on_gpu(host, 0) | on_gpu(host, 1)
        assert len(orphans) == 2
        assert all(os.getsid(pid) == pid for pid in orphans)  # they have left the engine's session
        host.restart("a", [0])
        until(lambda: gpus_of(host.instance("a"), host) == [0])
        host.wait_state("a", READY)
        assert not any(pid_lives(pid) for pid in orphans)  # a zombie may stay until somebody reaps it
        assert host.log().count("orphaned worker killed") >= 2


def test_what_cannot_be_proven_free_ends_in_quarantine(tmp_path: Path, stranger: int) -> None:
    with sharded(tmp_path, gpu_free_timeout_s=0.5) as host:
        host.start()
        host.launch("a", [0])
        host.wait_state("a", READY)
        begun = host.restart("a", [1, 2])
        host.gpus.attach_process(0, stranger, 1 << 30)
        quarantined = host.wait_state("a", QUARANTINED)
        assert f"pid {stranger}" in quarantined.detail
        assert begun.transaction_id in quarantined.detail
        assert psutil.pid_exists(stranger)
        assert [on_gpu(host, gpu) for gpu in (1, 2)] == [set(), set()]
        host.launch("b", [1, 2])  # GPUs that were never touched are free again
        host.gpus.detach_process(0, stranger)
        host.wait_state("a", FAILED, timeout_s=15)


def test_a_dead_worker_is_a_dead_instance(tmp_path: Path) -> None:
    with sharded(tmp_path) as host:
        host.start()
        host.launch("a", [0, 1])
        leader = host.wait_state("a", READY).pid
        (worker,) = on_gpu(host, 1)
        assert worker != leader
        assert psutil.pid_exists(leader)
        os.kill(worker, signal.SIGKILL)
        failed = host.wait_state("a", FAILED, timeout_s=15)
        assert f"worker with pid {worker}" in failed.detail
        assert host.engine_pids() == []


def test_a_worker_that_died_while_no_agent_ran_is_noticed(tmp_path: Path) -> None:
    with sharded(tmp_path) as host:
        host.start()
        host.launch("a", [0, 1])
        host.wait_state("a", READY)
        host.kill()
        (worker,) = on_gpu(host, 1)
        os.kill(worker, signal.SIGKILL)
        host.start()
        assert f"worker with pid {worker}" in host.wait_state("a", FAILED, timeout_s=15).detail


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def at_step(host: NodeHost, step: str) -> Callable[[], bool]:
    def reached() -> bool:
        restart = record(host)["restart"]
        assert restart is not None, f"the restart was over before its step {step} was seen"
        return bool(restart["step"] == step)

    return reached


@pytest.mark.parametrize("step", ["drain", "stop", "start", "health", "warm"])
def test_a_restart_is_resumed_by_the_next_agent(tmp_path: Path, step: str) -> None:
    """SIGKILL at every step; nothing is started twice and no GPU has two owners."""
    running = tmp_path / "running"
    running.write_text("1" if step == "drain" else "0")
    trouble = {"stop": "1:deaf"}.get(step, "")
    with sharded(tmp_path, trouble) as host:
        host.start()
        host.launch("a", [0])
        old = host.wait_state("a", READY).pid
        begun = host.restart("a", [0, 1], drain_deadline_s=60)
        if step in ("start", "warm"):  # too short to be hit from outside: put there by hand below
            until(at_step(host, "health"))
        else:
            until(at_step(host, step))
        host.kill()
        found = record(host)
        if step == "start":  # between the intent and the launch
            for process in [psutil.Process(pid) for pid in host.engine_pids()]:
                process.kill()
            found |= {"process": None, "state": "starting", "restart": found["restart"] | {"step": "start"}}
        if step == "warm":
            until(lambda: healthy(found["port"]))
            found |= {"state": "warming", "restart": found["restart"] | {"step": "warm"}}
        (host.state_dir / "instances" / "a.json").write_text(json.dumps(found))
        launched = found["process"]
        host.start()
        running.write_text("0")
        until(lambda: gpus_of(host.instance("a"), host) == [0, 1])
        ready = host.wait_state("a", READY)
        assert f"restart {begun.transaction_id} is done" in ready.detail
        assert ready.pid != old
        if step in ("health", "warm"):
            assert ready.pid == launched["pid"]  # taken over, not started again
        assert [len(on_gpu(host, gpu)) for gpu in range(2)] == [1, 1]
        assert len(host.engine_pids()) == 3


def test_an_engine_that_died_with_the_agent_in_a_restart_is_rolled_back(tmp_path: Path) -> None:
    with sharded(tmp_path, "2:no-health") as host:
        host.start()
        host.launch("a", [0])
        host.wait_state("a", READY)
        host.restart("a", [1, 2])
        until(at_step(host, "health"))
        host.kill()
        for process in [psutil.Process(pid) for pid in host.engine_pids()]:
            process.kill()
        host.start()
        until(lambda: "rolled back" in host.instance("a").detail, 40)
        assert gpus_of(host.instance("a"), host) == [0]


def test_an_engine_that_dies_while_it_drains_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "running").write_text("1")
    with sharded(tmp_path) as host:
        host.start()
        host.launch("a", [0])
        pid = host.wait_state("a", READY).pid
        host.restart("a", [0, 1])
        os.kill(pid, signal.SIGKILL)
        until(lambda: gpus_of(host.instance("a"), host) == [0, 1])
        assert "is done" in host.wait_state("a", READY).detail


def test_a_stop_ends_a_restart(tmp_path: Path) -> None:
    with sharded(tmp_path, "2:no-health") as host:
        host.start()
        host.launch("a", [0])
        host.wait_state("a", READY)
        host.restart("a", [1, 2])
        until(at_step(host, "health"))
        host.stop("a", force=True)
        host.wait_state("a", STOPPED)
        assert host.engine_pids() == []
        host.launch("a", [0])
        host.wait_state("a", READY)


def test_progress_is_told_and_weights_are_read_ahead(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model-1.safetensors").write_bytes(b"\0" * (20 << 20))
    (model / "notes.txt").write_bytes(b"\0" * (20 << 20))
    with sharded(tmp_path, model_paths={MODEL: str(model)}) as host:
        host.start()
        host.launch("a", [0])
        host.wait_state("a", READY)
        steps: list[str] = []
        watch = host.stub.WatchInstances(pb.WatchInstancesRequest(), timeout=60)

        def follow() -> None:
            for message in watch:
                for instance in message.instances:
                    steps.append(instance.detail)
                    if "is done" in instance.detail:
                        return

        following = threading.Thread(target=follow)
        following.start()
        until(lambda: bool(steps))
        begun = host.restart("a", [0, 1])
        following.join(30)
        watch.cancel()
        assert any(begun.transaction_id in step for step in steps)
        until(lambda: "weight files read ahead" in host.log())
        assert "mib=20" in host.log()
