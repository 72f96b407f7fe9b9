"""`dynamollm node …` against a real agent."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from tests.nodehost import MODEL, NodeHost, refused

READY = types.INSTANCE_STATE_READY
MAIN = "from controller.cli.main import main; main()"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeHost]:
    with NodeHost(tmp_path_factory.mktemp("host"), gpus=3) as made:
        made.start()
        yield made


def node(host: NodeHost, *words: str) -> subprocess.CompletedProcess[str]:
    """The words up to the first option are the command."""
    verbs = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    options = words[len(verbs) :]
    command = [sys.executable, "-c", MAIN, "node", *verbs, f"unix:{host.socket}", *options]
    environment = host.environment | {"COLUMNS": "250"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def test_an_operator_overrides_and_resets(host: NodeHost) -> None:
    host.lock([0, 1], 1200)
    locked = node(host, "lock", "--mhz", "990", "--ttl", "60", "--gpu", "0", "--reason", "quiet hours")
    assert locked.returncode == 0, locked.stderr
    assert "clocks 990-990 MHz" in locked.stdout
    assert host.locks() == [(990, 990), (1200, 1200), None]
    shown = node(host, "show").stdout
    assert "(override)" in shown
    assert "quiet hours" in shown
    assert "controller ctl" in shown
    whole = json.loads(node(host, "show", "--json").stdout)
    assert len(whole["node"]["gpus"]) == 3
    assert {item["lease"]["owner"]["kind"] for item in whole["controls"]} == {
        "OWNER_KIND_OPERATOR",
        "OWNER_KIND_CONTROLLER",
    }
    assert host.lock([0], 1200)[0].code == 4  # held
    reset = node(host, "reset", "--json")
    assert reset.returncode == 0, reset.stderr
    assert host.locks() == [None] * 3


def test_the_guard_is_set_tripped_and_lifted_by_hand(host: NodeHost) -> None:
    host.lock([0], 1200, term=7)  # a controller is at work: an operator needs not know its term
    done = node(host, "guard", "set", "--floor-w", "350", "--floor-gpu", "1=300", "--boost-waiting", "20")
    assert done.returncode == 0, done.stderr
    assert "watts floor armed at 350 W" in done.stdout
    assert "SLO boost armed: over 20 waiting, held 30 s" in done.stdout
    assert "--reason" in node(host, "guard", "trip").stderr
    assert "TRIPPED" in node(host, "guard", "trip", "--reason", "generator test").stdout
    assert [host.gpus.observe(index).power_limit_w for index in range(3)] == [350, 300, 350]
    again = node(host, "guard", "set", "--no-boost", "--heartbeat-age", "30", "--json")
    rules = json.loads(again.stdout)
    assert rules["watts_floor"]["limit_w"] == 350  # what is not named stays
    assert "enabled" not in rules.get("slo_boost", {})
    assert node(host, "guard", "lift", "--reason", "over").returncode == 0
    assert [host.gpus.observe(index).power_limit_w for index in range(3)] == [700] * 3
    off = node(host, "guard", "set", "--no-floor", "--floor-w", "-5")
    assert off.returncode == 0, off.stderr  # off is off
    wrong = node(host, "guard", "set", "--floor-gpu", "1")
    assert wrong.returncode == 2
    assert "not GPU=W" in wrong.stderr
    refused = node(host, "guard", "set", "--floor-w", "-5")
    assert refused.returncode == 2
    assert "watts_floor.limit_w is -5" in refused.stderr
    assert "watts floor off" in node(host, "guard", "show").stdout
    node(host, "reset")


def test_a_node_is_drained_and_resumed_by_hand(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=4, engine_start_s=1.0) as host:
        host.start()
        host.launch("early", [0, 1])
        host.wait_state("early", READY)
        host.launch("late", [2, 3])  # still starting when the drain begins
        done = node(host, "drain", "--reason", "new fans", "--timeout", "30")
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        assert all(host.instance(name).drained for name in ("early", "late"))
        assert "OUT OF SERVICE" in node(host, "show").stdout
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "out of service"):
            host.launch("more", [0, 1])
        host.kill()
        host.start()  # it holds over a crash
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "new fans"):
            host.launch("more", [0, 1])
        sample = next(iter(host.stub.WatchTelemetry(pb.WatchTelemetryRequest(interval_s=1), timeout=10)))
        assert sample.draining
        stopped = node(host, "drain", "--stop", "--timeout", "30", "--json")
        assert stopped.returncode == 0, stopped.stderr
        states = {item["state"] for item in json.loads(stopped.stdout)["instances"]}
        assert states == {"INSTANCE_STATE_STOPPED"}
        by_hand = types.InstanceSpec(instance_id="trial", model=MODEL, gpu_uuids=host.uuids[2:])
        me = types.Owner(kind=types.OWNER_KIND_OPERATOR, name="ada")
        request = pb.StartInstanceRequest(request_id=host.request_id(), owner=me, spec=by_hand, reason="a try")
        host.stub.StartInstance(request, timeout=10)
        host.wait_state("trial", READY)
        time.sleep(1.2)
        assert host.instance("trial").state == READY  # an operator's own engine is left alone
        assert node(host, "resume").returncode == 0
        host.launch("more", [0, 1])
        host.wait_state("more", READY)


def test_mistakes_are_one_sentence(host: NodeHost) -> None:
    unknown = node(host, "lock", "--mhz", "990", "--gpu", "7")
    assert unknown.returncode == 2
    assert "there is no GPU '7'" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    half = node(host, "show", "--tls-ca", "/nonexistent")
    assert half.returncode == 2
    assert "belong together" in half.stderr


def test_nobody_there(host: NodeHost, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAIN, "node", "show", f"unix:{tmp_path}/none.sock"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 3
    assert "no node agent answers" in answer.stderr


def test_a_gpu_that_refuses_shows_in_the_exit_code(host: NodeHost) -> None:
    host.gpus.set_mig(2, True)
    answer = node(host, "lock", "--mhz", "990", "--ttl", "5")
    assert answer.returncode == 1
    assert "mig_enabled" in answer.stdout
    host.gpus.set_mig(2, False)
    node(host, "reset")
