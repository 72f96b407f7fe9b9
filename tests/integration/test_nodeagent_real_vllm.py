"""A real vLLM on the CPU, as systemd units, through the agent's API: start, re-shard TP1 → TP2 under load, stop.

Takes minutes and 5 GB of memory, so it runs only where it is asked for: DYNAMOLLM_REAL_VLLM names the folder that
`scripts/record-vllm` has built (see docs/operations.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from tests.nodehost import until
from tests.realsystemd import missing
from tests.systemdnode import Node, installed

FOLDER = os.environ.get("DYNAMOLLM_REAL_VLLM", "")
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="set DYNAMOLLM_REAL_VLLM to the folder of scripts/record-vllm to run it"),
    pytest.mark.skipif(bool(missing()), reason=f"no machine with systemd: it {missing()}"),
    pytest.mark.timeout(900),
]
READY, STOPPED = (
    types.INSTANCE_STATE_READY,
    types.INSTANCE_STATE_STOPPED,
)
START_S = 240.0
REQUESTS, TOKENS = 6, 1900
CLIENT = """
import asyncio, sys, httpx
async def one(client, url, tokens):
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True}
    answer = await client.post(url + "/v1/completions", json=body, timeout=300)
    return answer.raise_for_status().json()["usage"]["completion_tokens"]
async def main(url, count, tokens):
    async with httpx.AsyncClient(trust_env=False) as client:
        print(sum(await asyncio.gather(*(one(client, url, tokens) for _ in range(count)))))
asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


class Load(threading.Thread):
    """Requests in flight, from inside the machine."""

    def __init__(self, node: Node, endpoint: str, count: int = REQUESTS, tokens: int = TOKENS) -> None:
        super().__init__()
        self._node, self._arguments = node, (endpoint, str(count), str(tokens))
        self.done: subprocess.CompletedProcess[str] | None = None
        self.start()

    def run(self) -> None:
        self.done = self._node.machine.run(sys.executable, "-c", CLIENT, *self._arguments, check=False, timeout_s=400)

    def tokens(self) -> int:
        self.join(400)
        assert self.done is not None
        assert self.done.returncode == 0, self.done.stderr
        return int(self.done.stdout)


def wait_running(node: Node, count: int) -> None:
    """Returns while so many requests run."""
    for sample in node.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=0.1), timeout=90):
        if any(instance.requests_running >= count for instance in sample.instances):
            return


def test_a_real_engine_is_started_resharded_and_stopped(tmp_path: Path) -> None:
    folder = Path(FOLDER)
    engine = {
        "command": [str(folder / "venv" / "bin" / "vllm")],
        "args": ["--load-format", "dummy", "--enforce-eager", "--max-model-len", "2048"],
        "env": {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it wants a NUMA node for each worker
            "VLLM_SERVER_DEV_MODE": "1",
        },
        "model_paths": {"tiny": str(folder / "tiny")},
        "start_timeout_s": START_S,
        "stop_timeout_s": 20.0,
    }
    with installed(tmp_path, engine, [folder], watchdog_s=15) as node:  # the engines take every core there is
        node.launch("real", [0], model="tiny")
        first = node.wait_state("real", READY, START_S)
        load = Load(node, first.endpoint)
        wait_running(node, REQUESTS)
        request = pb.RestartInstanceRequest(**node.request(), instance_id="real", gpu_uuids=node.gpus.uuids[:2])
        node.stub.RestartInstance(request, timeout=10)
        assert load.tokens() == REQUESTS * TOKENS  # drained, none lost
        until(lambda: len(node.instance("real").spec.gpu_uuids) == 2, 60, node.journal)
        second = node.wait_state("real", READY, START_S)
        assert second.pid != first.pid
        sys.stderr.write(f"{json.dumps(dict(second.step_seconds))}\n")
        workers = node.machine.run("ps", "-eo", "args").stdout.count("VLLM::Worker")
        assert workers == 2
        assert Load(node, second.endpoint, 2, 20).tokens() == 40

        load = Load(node, second.endpoint, tokens=80)  # two workers on two cores are slow
        wait_running(node, REQUESTS)
        node.stub.DrainInstance(pb.DrainInstanceRequest(**node.request(), instance_id="real"), timeout=10)
        assert load.tokens() == REQUESTS * 80
        until(lambda: node.instance("real").detail.startswith("drained"))
        node.stub.StopInstance(pb.StopInstanceRequest(**node.request(), instance_id="real"), timeout=10)
        stopped = node.wait_state("real", STOPPED, 60)
        sys.stderr.write(f"{json.dumps(dict(stopped.step_seconds))}\n")
        assert "VLLM::" not in node.machine.run("ps", "-eo", "args").stdout

        node.launch("again", [0, 1], model="tiny")  # one worker dies: the whole instance is dead
        node.wait_state("again", READY, START_S)
        line = next(
            row for row in node.machine.run("ps", "-eo", "pid,args").stdout.splitlines() if "VLLM::Worker" in row
        )
        node.machine.run("kill", "-9", line.split()[0])
        failed = node.wait_state("again", types.INSTANCE_STATE_FAILED, 60)
        sys.stderr.write(f"{failed.detail}\n")
        assert "VLLM::" not in node.machine.run("ps", "-eo", "args").stdout
