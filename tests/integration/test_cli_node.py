"""`dynamollm node show|lock|reset` against a real agent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodehost import NodeHost

MAIN = "from controller.cli.main import main; main()"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeHost]:
    with NodeHost(tmp_path_factory.mktemp("host"), gpus=3) as made:
        made.start()
        yield made


def node(host: NodeHost, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MAIN, "node", verb, f"unix:{host.socket}", *options]
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
