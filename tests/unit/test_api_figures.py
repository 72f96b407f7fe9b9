"""What status and metrics say of clocks that somebody else has set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.api.figures import drift_line, drifts
from controller.domain.reasons import Mode, Reason
from controller.fleet.port import GpuObservation, InstanceObservation, InstanceState, NodeObservation
from controller.loop.core import Core
from controller.loop.state import ChosenClock, State
from tests.synthetic_profile import MODEL
from tests.unit.test_loop_journal import PROFILE, SETTINGS

GPUS = tuple(GpuObservation(f"g{i}", i, True, 100.0, 0.0, 800, 800) for i in range(4))
RUNS = InstanceObservation("i1", MODEL, "all", ("g0", "g1"), InstanceState.READY, "http://x")
LONG_AGO_S = -60.0


@pytest.fixture
def state() -> State:
    """One instance that was told 800 MHz long ago, and has it."""
    found = Core(SETTINGS, PROFILE, 1, 1).state
    found.nodes["n"] = NodeObservation("n", 0.0, GPUS, (RUNS,))
    found.clocks["i1"] = ChosenClock(800, Reason.LEAST_POWER, LONG_AGO_S)
    return found


def lock(state: State, *mhz: int | None) -> None:
    gpus = tuple(replace(gpu, locked_mhz=each) for gpu, each in zip(GPUS, mhz, strict=True))
    state.nodes["n"] = NodeObservation("n", 0.0, gpus, (RUNS,))


def test_what_is_at_its_clock_or_nearly_is_no_drift(state: State) -> None:
    assert drift_line(state, 0.0) == ""
    lock(state, 810, 795, None, 1980)  # the others are not its own
    assert drifts(state, 0.0) == []


def test_a_lock_by_hand_is_named(state: State) -> None:
    lock(state, 1200, 800, 800, 800)
    assert drifts(state, 0.0) == ["i1 on n is locked to 1200 MHz, not locked to 800 MHz"]
    lock(state, None, None, 800, 800)
    assert drift_line(state, 0.0).startswith("i1 on n is unlocked, not locked to 800 MHz: an operator's lock")
    state.clocks["i1"] = ChosenClock(None, Reason.QUEUE_BUILDING, LONG_AGO_S)
    assert drifts(state, 0.0) == []
    lock(state, 600, 600, 800, 800)
    assert drifts(state, 0.0) == ["i1 on n is locked to 600 MHz, not unlocked"]


def test_nothing_is_said_of_what_is_not_known_not_touched_or_just_chosen(state: State) -> None:
    lock(state, 1200, 1200, 800, 800)
    assert drifts(state, 10_000.0) == [], "the node is silent"
    state.modes["node:n"] = Mode.ADVISORY
    assert drifts(state, 0.0) == []
    state.modes.clear()
    state.clocks["i1"] = ChosenClock(800, Reason.LEAST_POWER, 0.0)
    assert drifts(state, 0.1) == []
