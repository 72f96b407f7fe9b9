"""Results as messages: what went in can be read back, zeros and unknown values included."""

from __future__ import annotations

import pytest

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types
from nodeagent import wire
from nodeagent.control.results import NOT_OBSERVED, Code, Observed, Result, Wish
from nodeagent.control.settings import ClockLock, MemoryClockLock, PowerLimit, Setting

SETTINGS = [
    ClockLock(210, 990),
    ClockLock(0, 0),
    MemoryClockLock(1593, 2619),
    MemoryClockLock(0, 0),
    PowerLimit(300.0),
    PowerLimit(300.0, protects=True),
    PowerLimit(0.0),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_in_a_result_is_the_one_that_was_asked_for(setting: Setting) -> None:
    response = pb.ApplyControlsResponse()
    results = [Result("GPU-0", Code.HELD, "held", setting), Result("GPU-1", Code.APPLIED, "", None, setting)]
    wire.put_results(response.results, results)
    held, applied = response.results
    assert not held.HasField("applied")
    assert not applied.HasField("requested")
    request = pb.ApplyControlsRequest(lease=types.Lease(reason="test"), controls=[held.requested, applied.applied])
    assert wire.wishes_from(request) == [Wish("GPU-0", setting), Wish("GPU-1", setting)]


def test_what_was_not_observed_is_not_zero() -> None:
    response = pb.ApplyControlsResponse()
    wire.put_results(
        response.results,
        [
            Result("GPU-0", Code.APPLIED, observed=NOT_OBSERVED),
            Result("GPU-1", Code.APPLIED, observed=Observed(0, 0.0)),
        ],
    )
    unknown, zero = response.results
    fields = ("observed_sm_mhz", "observed_power_limit_w")
    assert [unknown.HasField(name) for name in fields] == [False, False]
    assert [zero.HasField(name) for name in fields] == [True, True]
    assert [result.code for result in response.results] == [pb.CONTROL_CODE_APPLIED] * 2
