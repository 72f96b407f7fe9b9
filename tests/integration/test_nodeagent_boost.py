"""The SLO boost end to end: an emulated engine is flooded, and its clocks come free by themselves."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from pathlib import Path

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from tests.nodehost import MODEL, NodeHost, until


def test_a_flooded_engine_gets_its_clocks_back_within_a_second(tmp_path: Path) -> None:
    with NodeHost(tmp_path, gpus=3, engine_args=["--max-num-seqs", "1"]) as host:
        host.start()
        host.launch("a", [0, 1])
        endpoint = host.wait_state("a", types.INSTANCE_STATE_READY).endpoint
        boost = pb.SloBoostRule(enabled=True, max_waiting=2, hold_s=2.0)
        host.stub.SetGuard(pb.SetGuardRequest(request_id="r", term=1, slo_boost=boost, reason="test"), timeout=10)
        host.lock([0, 1, 2], 990, ttl_s=60)
        time.sleep(0.6)
        assert host.locks() == [(990, 990)] * 3  # no trouble, no act

        body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True}

        def ask() -> None:
            request = urllib.request.Request(
                f"{endpoint}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=60).read()

        began = time.monotonic()
        for _ in range(6):
            threading.Thread(target=ask, daemon=True).start()
        until(lambda: host.locks()[:2] == [None, None], 10)
        took_s = time.monotonic() - began
        assert took_s < 2.0  # within a second where nobody else uses the machine
        assert host.locks()[2] == (990, 990)
        status = host.stub.GetGuard(pb.GetGuardRequest(), timeout=10).status
        assert status.boosting
        assert "requests wait, over 2" in status.last_act
        assert host.lock([0], 990)[0].code == pb.CONTROL_CODE_HELD
        host.stop("a", force=True)
        until(lambda: host.lock([0], 990)[0].code == pb.CONTROL_CODE_APPLIED, 20)
