"""Whatever the loop is told, it answers with a decision that has a reason, and with a plan that stands on real GPUs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import isfinite
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision, canonical_json
from controller.domain.reasons import Level, Reason
from controller.fleet.port import (
    ClassCounters,
    InstanceObservation,
    InstanceState,
    LoadObservation,
    LoadSeen,
    QueueObservation,
    Tick,
)
from controller.loop.core import Core
from controller.loop.load import LoadBook, LoadWindow
from controller.loop.orders import SetPowerBudget
from controller.loop.state import Instant
from controller.profile.table import Profile
from tests.synthetic_profile import MODEL, synthetic_profile
from tests.unit.test_loop_core import Bench
from tests.unit.test_loop_core import settings as loop_settings

LL, MS = RequestClass.parse("LL"), RequestClass.parse("MS")


def bench_of(profile: Profile, nodes: int = 2, **changes: object) -> Bench:
    return Bench(Core(loop_settings(**changes), profile, term=1, expected_nodes=nodes))


def all_decisions(bench: Bench) -> list[Decision]:
    return [decision for step in bench.steps for decision in step.decisions]


def assert_safe(bench: Bench) -> None:
    """Nothing silent, nothing that is no JSON, no GPU given twice, none that is not there."""
    state = bench.core.state
    taken = Counter(uuid for wanted in state.layout.instances for uuid in wanted.gpu_uuids)
    assert not taken or max(taken.values()) == 1
    assert set(taken) <= {gpu.uuid for node in state.nodes.values() for gpu in node.gpus}
    for decision in all_decisions(bench):
        assert decision.sentence
        assert decision.reason in Reason
        canonical_json([decision.inputs, decision.outcome, list(decision.alternatives)])
        assert decision.predicted_power_w is None or isfinite(decision.predicted_power_w)


def load(bench: Bench, rates: dict[RequestClass, float], seconds: int = 60) -> None:
    """Reports of a gateway, and instance ticks, with two nodes in sight."""
    for at in range(0, seconds + 1, 5):
        for node in ("a", "b"):
            bench.see(node)
        counters = {
            c: ClassCounters(arrived=int(rate * at), input_tokens=int(rate * at * 500)) for c, rate in rates.items()
        }
        bench.send(LoadSeen(LoadObservation("g", "e", bench.now_s, MODEL, counters, {})))
        bench.send(Tick(Level.INSTANCE))
        bench.wait(5)


def by_reason(bench: Bench, reason: Reason) -> list[Decision]:
    return [decision for decision in all_decisions(bench) if decision.reason is reason]


def test_an_infeasible_slo_is_said_and_everything_runs_at_full_clock() -> None:
    profile = synthetic_profile()
    hopeless = replace(profile, points=tuple(replace(p, attainment=0.5, attainment_worst=0.5) for p in profile.points))
    bench = bench_of(hopeless)
    load(bench, {MS: 2.0})
    bench.send(Tick(Level.POOL))
    said = by_reason(bench, Reason.NO_PROFILE)
    assert said
    assert "meet the SLO" in said[-1].sentence
    # The widest instances on every GPU: what can be done.
    assert sum(len(wanted.gpu_uuids) for wanted in bench.core.state.layout.instances) == 16
    assert_safe(bench)


def test_a_model_without_any_measurement_gets_the_widest_instances() -> None:
    bench = bench_of(replace(synthetic_profile(), points=(), idle=()))
    load(bench, {MS: 2.0})
    bench.send(Tick(Level.POOL))
    assert by_reason(bench, Reason.NO_PROFILE)
    assert {len(wanted.gpu_uuids) for wanted in bench.core.state.layout.instances} == {8}
    assert_safe(bench)


def test_fewer_gpus_than_one_instance_needs() -> None:
    bench = bench_of(replace(synthetic_profile(), tps=(8,)), nodes=1)
    few = bench.core.state
    for _ in range(14):
        bench.see("a", gpus=4)
        bench.send(
            LoadSeen(LoadObservation("g", "e", bench.now_s, MODEL, {MS: ClassCounters(int(bench.now_s * 2))}, {}))
        )
        bench.send(Tick(Level.INSTANCE))
        bench.wait(5)
    bench.send(Tick(Level.CLUSTER))
    assert not few.layout.instances
    assert [d.reason for d in all_decisions(bench) if d.level is Level.CLUSTER][-1] is Reason.NO_CAPACITY
    assert_safe(bench)


def test_an_empty_forecast_is_no_load_and_silence_is_unknown() -> None:
    bench = bench_of(synthetic_profile())
    load(bench, {})
    bench.send(Tick(Level.CLUSTER))
    assert bench.core.state.layout.instances  # the minimum of every pool stays
    planned = bench.core.state.layout
    bench.wait(2000)
    for node in ("a", "b"):
        bench.see(node)
    bench.send(Tick(Level.CLUSTER))
    assert by_reason(bench, Reason.NO_LOAD_DATA)
    assert bench.core.state.layout == planned
    assert_safe(bench)


def test_a_budget_below_what_idle_gpus_draw_is_said() -> None:
    bench = bench_of(synthetic_profile())
    load(bench, {MS: 2.0})
    step = bench.core.order(Instant(bench.now_s, 1e9 + bench.now_s), SetPowerBudget("cluster", 100.0, None))
    bench.steps.append(step)
    assert Reason.BUDGET_UNREACHABLE in {d.reason for d in all_decisions(bench)}
    assert_safe(bench)


def test_counters_that_fall_begin_anew_and_are_no_negative_load() -> None:
    book = LoadBook(keep_s=600.0)

    def report(at_s: float, arrived: int) -> LoadWindow | None:
        return book.add(LoadObservation("g", "e", at_s, MODEL, {MS: ClassCounters(arrived)}, {}))

    assert report(0.0, 10) is None
    assert report(5.0, 30) is not None
    assert report(10.0, 4) is None  # the gateway's memory was lost: this is the new base
    after = report(15.0, 9)
    assert after is not None
    assert after.classes[MS].arrived == 5
    assert report(20.0, -7) is None
    rates = book.rates_rps(21.0, 60.0)
    assert rates is not None
    assert min(rates.values()) >= 0


RATES = st.sampled_from([0, -5, 1, 7, 10**6, 10**12, -(10**9)])
HOSTILE = st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, 5.0, 1e300])


@st.composite
def hostile_reports(draw: st.DrawFn) -> LoadObservation:
    """Counters that fall, that are negative, that leap; queues that cannot be; times out of order."""
    classes = draw(
        st.dictionaries(
            st.sampled_from([MS, LL]), st.builds(ClassCounters, RATES, RATES, RATES, RATES, RATES, RATES), max_size=2
        )
    )
    queues = draw(
        st.dictionaries(
            st.sampled_from(["all", "short", "nowhere"]), st.builds(QueueObservation, RATES, RATES, HOSTILE)
        )
    )
    return LoadObservation("g", draw(st.sampled_from(["e", "f"])), draw(st.floats(0, 200)), MODEL, classes, queues)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(hostile_reports(), st.tuples(HOSTILE, HOSTILE, HOSTILE)), min_size=1, max_size=8))
def test_no_report_makes_a_silent_or_a_violating_plan(told: list[Any]) -> None:
    bench = bench_of(synthetic_profile())
    load(bench, {MS: 2.0}, 30)
    for item in told:
        if isinstance(item, LoadObservation):
            bench.send(LoadSeen(item))
        else:
            wanted = bench.core.state.layout.instances
            seen = [
                InstanceObservation(w.instance_id, MODEL, w.pool, w.gpu_uuids, InstanceState.READY, "http://x", *item)
                for w in wanted
                if w.node_id == "a"
            ]
            bench.see("a", *seen)
        for level in Level:
            bench.send(Tick(level))
        bench.wait(5)
        assert_safe(bench)
    for effect in (effect for step in bench.steps for effect in step.effects):
        for target in getattr(effect, "targets", ()):
            assert 0 < target.mhz < bench.core.state.profile.full_mhz
    assert all_decisions(bench)


def test_a_plan_records_how_it_was_found_and_what_more_would_be_worth() -> None:
    bench = bench_of(synthetic_profile())
    load(bench, {MS: 2.0, LL: 3.0}, 120)
    bench.send(Tick(Level.CLUSTER))
    bench.send(Tick(Level.POOL))
    plans = [d for d in all_decisions(bench) if d.solver is not None]
    assert plans
    for decision in plans:
        foresight = decision.outcome["foresight"]
        assert foresight["way"] in ("milp", "tables", "lp+neighbourhood")
        assert 0.99 <= foresight["attainment"] <= 1.0
        assert all(each["w_per_rps"] >= 0 for each in foresight["pools"].values())
        assert json.loads(canonical_json(foresight)) == foresight
    assert any(each["rps_per_100w"] for d in plans for each in d.outcome["foresight"]["pools"].values())
