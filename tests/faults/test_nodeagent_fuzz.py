"""Hostile and malformed requests against every method: the agent lives, answers, and no GPU notices."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import grpc

from dynamollm.v1 import node_agent_pb2 as pb
from tests.hostile import PREFIX, requests, send
from tests.nodehost import NodeHost

COUNT = 2000


def test_no_crash_and_no_effect_on_a_gpu(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=2) as host:
        host.start()
        before = [host.gpus.observe(index) for index in range(2)]
        seen: Counter[grpc.StatusCode] = Counter()
        for request in requests(COUNT, host.uuids, seed=1):
            code = send(host.channel, request)
            assert code is not grpc.StatusCode.UNAVAILABLE, f"the agent went away at {request}"
            assert code is not grpc.StatusCode.UNKNOWN, request
            seen[code] += 1
            assert code is not grpc.StatusCode.INTERNAL, (request, host.log()[-3000:])
        assert seen[grpc.StatusCode.INVALID_ARGUMENT] > COUNT / 10
        after = [host.gpus.observe(index) for index in range(2)]
        for was, now in zip(before, after, strict=True):
            assert (now.lock_mhz, now.power_limit_w) == (was.lock_mhz, was.power_limit_w)
        assert not host.stub.ListControls(pb.ListControlsRequest(), timeout=5).controls
        assert not host.engine_pids()
        assert host.process is not None
        assert host.process.poll() is None
        assert host.lock([0], 990)[0].code == pb.CONTROL_CODE_APPLIED  # and it still does its work
        assert host.terminate() == 0
        assert host.locks() == [None, None]


def test_every_method_is_among_them(tmp_path: Path) -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["NodeAgent"].methods}
    assert {path.removeprefix(PREFIX) for path, _ in requests(100, ["GPU-x"], seed=1)} == methods
