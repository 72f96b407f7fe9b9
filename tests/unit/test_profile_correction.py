"""Online correction: follows a bias, not noise; bounded; asks for another calibration; recorded and replayable."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from common.typed_json import decode, encode
from controller.domain.gpu_state import GpuState
from controller.domain.reasons import Level, Reason
from controller.fleet.engines import EngineWatch
from controller.fleet.port import (
    GpuObservation,
    InstanceObservation,
    InstanceState,
    NodeObservation,
    ReleaseClocks,
    Tick,
)
from controller.loop.accounting import EnergyEntry
from controller.loop.core import Core
from controller.loop.measured import PowerBook
from controller.loop.orders import ORDERS, CorrectProfile, NoteEngines
from controller.loop.profile_in_use import curves_of, status_line
from controller.loop.snapshot import restore, take
from controller.loop.state import Instant
from controller.profile.correction import CorrectionSettings, bias_of
from controller.profile.fit import fit
from tests.synthetic_profile import synthetic_profile
from tests.unit.test_loop_core import Bench, make, ready, starts
from tests.unit.test_loop_serving import Fleet

FITTED = fit(synthetic_profile())
KIND = ("all", 8)


# ------------------------------------------------------------------------------------------------------ estimation


@pytest.mark.parametrize("scatter", [0.0, 0.01, 0.03, 0.1])
def test_noise_alone_is_hardly_ever_corrected(scatter: float) -> None:
    """Of days of windows that only scatter, at most one in fifty is acted on, and none of few per cent."""
    draw = random.Random(7)
    changed = 0
    for _ in range(200):
        ratios = [1.0 + draw.gauss(0.0, scatter) for _ in range(12)]
        changed += bias_of(ratios).factor != 1.0
    assert changed <= (4 if scatter > 0.03 else 0)


@pytest.mark.parametrize("bias", [-0.08, 0.07, 0.10])
@pytest.mark.parametrize("seed", range(5))
def test_a_bias_is_corrected_within_six_windows(bias: float, seed: int) -> None:
    draw = random.Random(seed)
    ratios: list[float] = []
    applied, after = 1.0, 0
    for window in range(1, 30):
        ratios.append((1.0 + bias) * (1.0 + draw.gauss(0.0, 0.01)))
        found = bias_of(ratios, applied)
        if found.factor != applied and not after:
            after = window
        applied = found.factor
    assert after == CorrectionSettings().least_windows
    assert applied == pytest.approx(1.0 + bias, abs=0.015)


def test_it_is_bounded_and_what_is_beyond_asks_for_another_calibration() -> None:
    far = bias_of([1.4] * 12)
    assert (far.factor, far.drifted) == (1.15, True)
    assert far.measured == pytest.approx(1.4)
    assert bias_of([0.5] * 12).factor == 0.85
    assert not bias_of([1.08] * 12).drifted
    assert bias_of([1.12] * 12).drifted


def test_too_few_windows_change_nothing_and_what_is_gone_is_taken_back() -> None:
    assert bias_of([1.1] * 5).factor == 1.0
    assert bias_of([1.1] * 5, applied=1.05).factor == 1.05
    assert bias_of([1.0] * 12, applied=1.1).factor == 1.0
    assert bias_of([1.1] * 12, applied=1.095).factor == 1.095  # too little to plan anew for
    assert bias_of([]).factor == 1.0
    assert bias_of([0.0, -1.0, float("nan"), float("inf")] * 3).factor == 1.0


# -------------------------------------------------------------------------------------------------------- windows


class Node:
    """One instance of eight GPUs that holds a batch and draws a multiple of what the profile says."""

    def __init__(self, book: PowerBook, mhz: int | None = 800, running: float | None = 40.0) -> None:
        self.book, self.mhz, self.running = book, mhz, running
        self.now_s, self.applied = 0.0, {}
        self.state = InstanceState.READY

    def window(self, ratio: float) -> CorrectProfile | None:
        curve = FITTED.curve("all", 8, self.mhz or 1980)
        assert curve is not None
        rate = curve.rate_for_running(self.running or 0.0)
        watts = ratio * ((curve.power_w(rate) if rate is not None else None) or 1000.0)
        found = None
        for _ in range(12):
            self.now_s += 5.0
            uuids = tuple(f"g{i}" for i in range(8))
            gpus = tuple(GpuObservation(u, i, True, None, None, None, self.mhz) for i, u in enumerate(uuids))
            seen = InstanceObservation("i", "m", "short", uuids, self.state, "http://x", self.running)
            self.book.observe(NodeObservation("n", self.now_s, gpus, (seen,)), {"i": "all"})
            for uuid in uuids:
                entry = EnergyEntry(
                    "n", uuid, "all", "i", 8, GpuState.SERVING, self.now_s - 5, 5.0, watts / 8 * 5, None
                )
                self.book.spent(entry)
            found = self.book.close_due(self.now_s, self.applied, frozenset()) or found
        if found is not None:
            self.applied = dict(found.factors)
        return found


def test_ten_per_cent_more_than_predicted_become_an_order_and_noise_does_not() -> None:
    node = Node(PowerBook(FITTED))
    told = [order for _ in range(9) if (order := node.window(1.10)) is not None]
    assert [order.factors[KIND] for order in told] == [pytest.approx(1.10, abs=0.01)]
    draw = random.Random(1)
    calm = Node(PowerBook(FITTED))
    assert not any(calm.window(1.0 + draw.gauss(0.0, 0.015)) for _ in range(40))


@pytest.mark.parametrize("what", ["clock not measured", "beyond the curve", "draining", "nothing known"])
def test_what_the_profile_does_not_know_is_not_compared(what: str) -> None:
    node = Node(PowerBook(FITTED))
    if what == "clock not measured":
        node.mhz = 1000
    elif what == "beyond the curve":
        node.running = 1e6
    elif what == "draining":
        node.state = InstanceState.DRAINING
    else:
        node.running = None
    for _ in range(10):
        assert node.window(1.3) is None if what != "clock not measured" else True
    assert not node.book.biases


# ------------------------------------------------------------------------------------------------------- in the core


def order(bench: Bench, what: CorrectProfile | NoteEngines) -> None:
    bench.steps.append(bench.core.order(Instant(bench.now_s, 1e9 + bench.now_s), what))


def test_a_correction_scales_predictions_is_decided_on_and_stands_in_the_snapshot() -> None:
    bench = make(nodes=1)
    bench.see("a")
    bench.send(Tick(Level.INSTANCE))
    state = bench.core.state
    before_w = next(c.power_w for c in state.columns if c.pool == "all" and c.tp == 8)
    order(bench, CorrectProfile({KIND: 1.1}, ()))
    assert next(c.power_w for c in state.columns if c.pool == "all" and c.tp == 8) == pytest.approx(1.1 * before_w)
    assert bench.decisions[-1] == (Level.CLUSTER, Reason.PROFILE_CORRECTED)
    assert "all TP8 +10.0%" in status_line(state)
    again = Core(state.settings, state.profile, 3, 1)
    restore(again.state, json.loads(take(state, 1)()))
    assert again.state.columns == state.columns
    assert again.state.corrections == {KIND: 1.1}
    order(bench, CorrectProfile({}, ()))
    assert state.fit.curves == curves_of(state.settings, state.profile).curves
    assert status_line(state) == ""


def test_drift_asks_for_a_calibration() -> None:
    bench = make(nodes=1)
    order(bench, CorrectProfile({KIND: 1.15}, (KIND,)))
    assert bench.decisions[-1][1] is Reason.PROFILE_DRIFTED
    assert "dynamollm calibrate" in bench.core.state.sentences[Level.CLUSTER]
    assert "drifted for all TP8" in status_line(bench.core.state)


def test_a_kind_that_drifts_is_planned_without_delay_and_one_that_only_moves_is_not() -> None:
    fleet = Fleet()
    fleet.serve(2.0, seconds=60)
    state = fleet.core.state
    kind = ("all", next(iter(state.layout.instances)).tp)
    order(fleet, CorrectProfile({kind: 1.05}, ()))
    assert not state.solving
    order(fleet, CorrectProfile({kind: 1.2}, (kind,)))
    assert {pending.trigger for pending in state.solving.values()} == {"drift"}
    state.solving.clear()
    order(fleet, CorrectProfile({kind: 1.25}, (kind,)))
    assert not state.solving


def test_another_engine_means_full_clocks_and_the_layout_held() -> None:
    bench = make(nodes=1)
    bench.see("a")
    started = starts(bench.send(Tick(Level.INSTANCE)))
    seen = [ready(effect) for effect in started]
    bench.see("a", *seen)
    bench.send(Tick(Level.INSTANCE))
    assert any(chosen.mhz for chosen in bench.core.state.clocks.values())
    order(bench, NoteEngines(("vllm 9.9",)))
    layout = bench.core.state.layout
    bench.wait(5)
    bench.see("a", *seen)
    effects = bench.send(Tick(Level.INSTANCE))
    assert any(isinstance(effect, ReleaseClocks) for effect in effects)
    assert not any(chosen.mhz for chosen in bench.core.state.clocks.values())
    assert not bench.core.state.standby
    assert Reason.ENGINE_CHANGED in {reason for _, reason in bench.decisions}
    before = len(bench.steps)
    for level in (Level.POOL, Level.CLUSTER):
        bench.wait(60)
        bench.see("a", *seen)
        bench.send(Tick(level))
    assert not [d for step in bench.steps[before:] for d in step.decisions]
    assert bench.core.state.layout == layout
    assert "vllm 9.9" in status_line(bench.core.state)
    order(bench, NoteEngines(()))
    bench.see("a", *seen)
    bench.send(Tick(Level.INSTANCE))
    assert any(chosen.mhz for chosen in bench.core.state.clocks.values())


def test_engines_are_asked_once_and_compared_with_the_profile() -> None:
    asked: list[str] = []
    says: dict[str, str | None] = {"http://a": "0.9.1", "http://b": "0.9.2", "http://c": None}

    async def ask(endpoint: str) -> str | None:
        asked.append(endpoint)
        return says[endpoint]

    watch = EngineWatch("vllm 0.9.1, bf16", ask)
    look = {"i1": "http://a", "i2": "http://b", "i3": "http://c"}
    assert asyncio.run(watch.look(look)) == ("vllm 0.9.2",)
    assert asyncio.run(watch.look(look)) == ("vllm 0.9.2",)
    assert sorted(asked) == ["http://a", "http://b", "http://c", "http://c"]
    assert asyncio.run(watch.look({"i1": "http://a"})) == ()
    assert asyncio.run(EngineWatch("twin engine, bf16", ask).look(look)) == ()


def test_the_orders_are_read_back_as_they_were_written() -> None:
    for told in (CorrectProfile({KIND: 1.1, ("short", 2): 0.93}, (KIND,)), NoteEngines(("vllm 9.9",))):
        kind = ORDERS[type(told).__name__]
        assert decode(kind, json.loads(json.dumps(encode(kind, told)))) == told
