"""A real controller turns an empty host off by its hook, knows it after a restart, and turns it on again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynamollm.v1 import controller_pb2 as pb
from tests.controllerrig import Controller, ControllerRig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def freshness(controller: Controller) -> dict[str, int]:
    status = controller.status()
    return {} if status is None else {node.node_id: node.freshness for node in status.nodes}


def test_an_empty_host_goes_off_and_the_next_controller_knows(tmp_path: Path) -> None:
    told = tmp_path / "told"
    hook = [sys.executable, "-c", "import sys; print(*sys.argv[2:], file=open(sys.argv[1], 'a'))", str(told), "{node}"]
    settings = {
        "provisioner__on": json.dumps([*hook, "on"]),
        "provisioner__off": json.dumps([*hook, "off"]),
        "provisioner__spare_nodes": "0",
        "provisioner__min_on_s": "0",
        "provisioner__boot_s": "3",
        "provisioner__off_s": "1",
    }
    with ControllerRig(tmp_path) as rig:
        first = rig.start("a", spool="spool", **settings)
        rig.serve_load(0.3)
        rig.wait(lambda: rig.ready(first), 60, "an instance is ready")
        rig.wait(told.exists, 60, "a host is turned off")
        (node, what) = told.read_text().split()
        assert what == "off"
        agent = rig.agents[node]
        agent.kill()
        agent.wait()
        assert freshness(first)[node] == pb.FRESHNESS_OFF
        assert [seen for other, seen in freshness(first).items() if other != node] == [pb.FRESHNESS_FRESH]

        first.process.kill()
        first.process.wait()
        second = rig.start("a", spool="spool", **(settings | {"provisioner__spare_nodes": "1"}))
        rig.wait(lambda: freshness(second).get(node) == pb.FRESHNESS_OFF, 30, "the next one knows")
        rig.wait(lambda: told.read_text().split()[-2:] == [node, "on"], 40, "now a spare is wanted: it is turned on")
        rig.start_agent(node)
        rig.wait(lambda: freshness(second).get(node) == pb.FRESHNESS_FRESH, 40, "it is back")
        listed = subprocess.run(
            [str(Path(sys.executable).with_name("dynamollm")), "decision", "list", "--controller", second.address],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
        assert "is turned on" in listed
