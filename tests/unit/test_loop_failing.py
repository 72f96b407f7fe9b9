"""Calls that fail again and again: said once when it begins, once when it is for another reason, once when it ends."""

from __future__ import annotations

from typing import Any, cast

import pytest

from common.clock import SystemClock
from controller.api.routing_hub import RoutingHub
from controller.fleet.grpc import AgentClient
from controller.fleet.port import ApplyCaps, ApplyClocks, CapTarget, ClockTarget, EffectDone, NodeEffect, StartInstance
from controller.loop import runtime as runtime_module
from controller.loop.failing import UNSENT, FailingCalls, News
from controller.loop.journal import JournaledCore
from controller.loop.runtime import Runtime
from controller.loop.settings import LoopSettings
from controller.store.records import ActionRecord, Record
from tests.synthetic_profile import MODEL, synthetic_profile

HELD = "g0: CONTROL_CODE_HELD held by operator ada: a test"
AWAY = "UNAVAILABLE: failed to connect to all addresses"
HANGS = "DEADLINE_EXCEEDED: Deadline Exceeded"


def heard(*ends: str) -> list[News]:
    """What was news of calls of one kind to one node that ended so; "" is success."""
    calls = FailingCalls()
    return [calls.ended("n", "apply_clocks", not detail, detail) for detail in ends]


def test_the_same_failure_is_news_once_and_its_end_is() -> None:
    assert heard("", HELD, HELD, HELD, "", "", HELD) == [
        News.NONE,
        News.FAILS,
        News.NONE,
        News.NONE,
        News.GOES_AGAIN,
        News.NONE,
        News.FAILS,
    ]


def test_another_reason_is_news() -> None:
    assert heard(HELD, "g0: CONTROL_CODE_FAILED", HELD) == [News.FAILS] * 3


def test_however_it_does_not_answer_it_is_the_same() -> None:
    assert heard(AWAY, HANGS, AWAY, "") == [News.FAILS, News.NONE, News.NONE, News.GOES_AGAIN]


def test_what_was_not_sent_tells_nothing_new_of_a_node_that_fails() -> None:
    unsent = f"{UNSENT} n left the last 3 calls unanswered"
    assert heard(HANGS, unsent, HANGS, unsent.replace("3", "4"), "") == [
        News.FAILS,
        News.NONE,
        News.NONE,
        News.NONE,
        News.GOES_AGAIN,
    ]
    assert heard(unsent, unsent, HELD) == [News.FAILS, News.NONE, News.FAILS], "as when another may lead"


def test_nodes_and_kinds_are_told_apart_and_every_failure_counts() -> None:
    calls = FailingCalls()
    assert calls.ended("a", "apply_clocks", False, HELD) is News.FAILS
    assert calls.ended("b", "apply_clocks", False, HELD) is News.FAILS
    assert calls.ended("a", "start_instance", False, HELD) is News.FAILS
    assert calls.ended("a", "stop_instance", True, "") is News.NONE
    assert calls.ended("a", "apply_clocks", False, HELD) is News.NONE
    assert calls.counts == {("a", "apply_clocks"): 2, ("b", "apply_clocks"): 1, ("a", "start_instance"): 1}


class Agent:
    """Answers every call alike."""

    detail = ""

    async def execute(self, effect: NodeEffect) -> EffectDone:
        return EffectDone(effect.effect_id, not self.detail, self.detail)


class Lines:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, str]] = []

    def warning(self, event: str, *, kind: str, node: str, detail: str) -> None:
        self.said.append((event, kind, detail))

    def info(self, event: str, *, kind: str, node: str) -> None:
        self.said.append((event, kind, ""))


async def test_an_operators_lock_is_one_line_and_one_row_and_so_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, agent, records = Lines(), Agent(), cast(list[Record], [])
    monkeypatch.setattr(runtime_module, "_log", lines)
    core = JournaledCore(LoopSettings(model=MODEL), synthetic_profile(), 1, 1)
    agents: Any = {"n": cast(AgentClient, agent)}
    runtime = Runtime(core, agents, RoutingHub(), records.append, SystemClock(), 60.0)
    numbers = iter(range(1000))

    async def tick(mhz: int = 1200) -> None:
        targets = (ClockTarget(("g0", "g1"), mhz),)
        await runtime._execute(ApplyClocks(f"e{next(numbers)}", "n", targets, 20.0, "a test"))

    def rows() -> list[tuple[str, bool]]:
        return [(r.kind.value, r.ok) for r in records if isinstance(r, ActionRecord)]

    for agent.detail in ("", "", HELD, HELD, HELD, ""):
        await tick()
        await tick()
    assert lines.said == [("effect_failed", "apply_clocks", HELD), ("effect_goes_again", "apply_clocks", "")]
    assert rows() == [("apply_clocks", True), ("apply_clocks", False), ("apply_clocks", True)]
    assert runtime.failed_actions == {("n", "apply_clocks"): 6}

    # Another clock that is refused is another row; what begins something, or holds a budget, always is.
    records.clear()
    agent.detail = HELD
    for mhz in (1200, 1200, 1400, 1400):
        await tick(mhz)
    for _ in range(2):
        await runtime._execute(ApplyCaps(f"e{next(numbers)}", "n", (CapTarget(("g0",), 400.0),), 20.0, "a test"))
        await runtime._execute(StartInstance(f"e{next(numbers)}", "n", "i", MODEL, "all", ("g0",), "a test"))
    assert rows() == [("apply_clocks", False)] * 2 + [("apply_caps", False), ("start_instance", False)] * 2
    assert [kind for event, kind, _ in lines.said[2:]] == ["apply_clocks", "apply_caps", "start_instance"]
