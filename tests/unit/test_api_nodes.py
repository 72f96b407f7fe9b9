"""How nodes are told of: fresh, stale, lost or off, and whether their agents answer calls."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from controller.api.routing_hub import RoutingHub
from controller.api.service import ControllerService
from controller.cli import main
from controller.cli.shared import data_of, in_trouble
from controller.cli.top import screen
from controller.fleet.port import GpuObservation, NodeObservation, NodeSeen
from controller.loop.core import Core
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant
from controller.store.recorder import RecorderCounts
from dynamollm.v1 import controller_pb2 as pb
from tests.synthetic_profile import MODEL, synthetic_profile

NOW_S = 100.0
SEEN_S = {"a": 99.0, "b": 80.0, "c": 99.0}


def answers(circuits_open: Mapping[str, bool]) -> tuple[pb.ListNodesResponse, pb.GetStatusResponse]:
    """Of a controller that has heard of three of its five nodes, one of them some time ago."""
    core = Core(LoopSettings(model=MODEL, stale_s=15, lost_s=40), synthetic_profile(), term=1, expected_nodes=5)
    gpus = (GpuObservation("g", 0, True, 100.0, 0.0, 800, None),)
    for node_id, at_s in SEEN_S.items():
        core.handle(Instant(at_s, 1e9 + at_s), NodeSeen(NodeObservation(node_id, at_s, gpus, ())))
    nobody: Any = None  # the calls asked here need no database and no loop
    addresses = {node_id: f"{node_id}:1" for node_id in "abcde"}
    service = ControllerService(
        core.state,
        RoutingHub(),
        lambda _: None,
        lambda: NOW_S,
        nobody,
        addresses,
        lambda: RecorderCounts(database_ok=True),
        nobody,
        "holder",
        lambda _: None,
        lambda: "",
        lambda: circuits_open,
    )

    async def ask() -> tuple[pb.ListNodesResponse, pb.GetStatusResponse]:
        listed = await service.ListNodes(pb.ListNodesRequest(), nobody)
        return listed, await service.GetStatus(pb.GetStatusRequest(), nobody)

    return asyncio.run(ask())


def test_an_agent_that_reports_and_does_not_answer_is_told_of() -> None:
    listed, status = answers({"a": False, "b": True, "c": True, "d": False, "e": False})
    assert [data_of(node) for node in listed.nodes] == [
        "fresh",
        "stale, not answering calls",
        "fresh, not answering calls",
        "lost",
        "lost",
    ]
    assert list(listed.nodes) == list(status.nodes)
    assert in_trouble(status) == "b stale, not answering calls; c fresh, not answering calls; d lost; e lost"


def test_what_is_off_is_meant_to_be_silent() -> None:
    nodes = [
        pb.NodeStatus(node_id="a", freshness=pb.FRESHNESS_FRESH),
        pb.NodeStatus(node_id="e", freshness=pb.FRESHNESS_OFF, circuit_open=True),
    ]
    assert [data_of(node) for node in nodes] == ["fresh", "off"]
    assert in_trouble(pb.GetStatusResponse(nodes=nodes)) == ""
    assert in_trouble(pb.GetStatusResponse()) == ""


def test_people_see_it_where_they_look(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, status = answers({"c": True})
    told = {"ListNodes": listed, "GetStatus": status}
    paper = io.StringIO()
    console = Console(file=paper, width=200)
    monkeypatch.setattr(main, "call", lambda _address, method, _request: told[method])
    monkeypatch.setattr(main, "console", console)
    main.node_list()
    assert "fresh, not answering calls" in paper.getvalue()
    main.status()
    assert "nodes: b stale; c fresh, not answering calls; d lost; e lost" in paper.getvalue()
    console.print(screen(status, ""))
    assert "5 nodes: b stale; c fresh, not answering calls; d lost; e lost" in paper.getvalue()
