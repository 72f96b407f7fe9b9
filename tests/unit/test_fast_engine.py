"""The compiled engine against the plain one: the same instants, the same energy, whatever the load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.domain.classes import ALL_CLASSES
from controller.fleet.port import RoutedInstance, RoutedPool
from simulator.fast.engine import gap_bin
from simulator.fast.engines import FastEngines
from simulator.fast.layout import FINE_GAPS, IDLE, SERVING, gap_centres_s
from simulator.physics import Physics
from simulator.traces import Trace, generate
from tests.engine_reference import Served, serve_one, trace_of

PHYSICS = {
    name: Physics.from_text(name)
    for name in (
        "base",
        "pessimistic",
        "optimistic",
        "base+legacy",
        "optimistic+legacy",
        "base+prefill-first",
        "pessimistic+legacy+prefill-first",
    )
}


def serve_fast(
    physics: Physics, tp: int, trace: Trace, clocks: Sequence[tuple[float, int]] = (), parts: int = 1
) -> FastEngines:
    """The same on one compiled instance; `parts` cuts the way between two clock changes into so many advances."""
    engines = FastEngines(physics, trace)
    row = engines.start(tp, physics.clocks_mhz[-1])
    engines.ready(row)
    only = RoutedInstance("only", "", tp, max_in_flight=1_000_000, weight=1.0, accepts_new=True)
    engines.route([RoutedPool("all", "m", frozenset(ALL_CLASSES), (only,))], {"only": row})
    for at_s, mhz in sorted(clocks):
        for part in range(1, parts + 1):
            engines.advance(engines.now_s + (at_s - engines.now_s) * part / parts)
        engines.lock([row], [mhz])
    engines.finish()
    return engines


def compare(slow: Served, fast: FastEngines) -> None:
    np.testing.assert_allclose(fast.results["first_s"], slow.first_s, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fast.results["finished_s"], slow.finished_s, rtol=1e-9, atol=1e-9)
    instance = fast._instances[0]
    assert instance["energy_j"][SERVING] == pytest.approx(slow.serving_j, rel=1e-9)
    # The last stretch of the reference ends with the last happening or run, whichever is later.
    assert instance["energy_j"][IDLE] == pytest.approx(slow.idle_j, rel=1e-9, abs=1e-6)
    assert instance["preemptions"] == slow.preemptions
    assert fast.results["preempted"].sum() == slow.preemptions
    mine = fast.gaps.sum(axis=1)
    fine = {bin_: count for bin_, count in slow.gaps.items() if bin_ < FINE_GAPS and count}
    found = {int(bin_): int(mine[bin_]) for bin_ in np.flatnonzero(mine[:FINE_GAPS])}
    # Rounding may put a whole run on the other side of a bin's edge.
    assert sum(found.values()) == sum(fine.values())
    assert sum(k * v for k, v in found.items()) == pytest.approx(sum(k * v for k, v in fine.items()), rel=1e-3)
    assert mine.sum() == sum(slow.gaps.values())


LOADS = st.lists(
    st.tuples(st.floats(0, 20), st.integers(1, 12_000), st.integers(1, 400)),
    min_size=1,
    max_size=14,
)
CLOCKS = st.lists(
    st.tuples(st.floats(0, 25), st.sampled_from([800, 1200, 1605, 1980])), max_size=5, unique_by=lambda c: c[0]
)


@settings(max_examples=80, deadline=None)
@given(LOADS, CLOCKS, st.sampled_from([2, 4, 8]), st.sampled_from(sorted(PHYSICS)), st.integers(1, 3))
def test_any_load_gives_what_the_reference_gives(load, clocks, tp, physics, parts):
    trace = trace_of(load)
    compare(serve_one(PHYSICS[physics], tp, trace, clocks), serve_fast(PHYSICS[physics], tp, trace, clocks, parts))


@pytest.mark.parametrize("physics", ["base", "base+prefill-first"])
def test_a_full_kv_cache_preempts_in_the_same_order(physics):
    """TP2 holds 29,000 tokens: so many growing answers do not fit together."""
    load = [(0.1 * number, 300 + 10 * number, 300 + 40 * number) for number in range(80)]
    slow = serve_one(PHYSICS[physics], 2, trace_of(load), [(5.0, 1200), (9.0, 1980)])
    assert slow.preemptions > 5
    compare(slow, serve_fast(PHYSICS[physics], 2, trace_of(load), [(5.0, 1200), (9.0, 1980)]))


@pytest.mark.parametrize("physics", ["base", "base+prefill-first"])
def test_a_batch_beyond_the_largest_waits_alike(physics):
    load = [(0.001 * number, 40, 60 + number % 50) for number in range(700)]
    slow = serve_one(PHYSICS[physics], 4, trace_of(load))
    assert slow.most_running == 256
    compare(slow, serve_fast(PHYSICS[physics], 4, trace_of(load)))


def test_prefills_that_go_first_show_as_long_token_gaps():
    """Nine long prompts come while one answer is written: whole prompts make it wait, chunks ride along with it."""
    load = [(0.0, 100, 300), *((0.5 + 0.3 * number, 6_000, 2) for number in range(9))]
    longest_s = {}
    for name in ("base", "base+prefill-first"):
        fast = serve_fast(PHYSICS[name], 8, trace_of(load))
        assert fast.gaps.sum() == sum(answer - 1 for _, _, answer in load)
        longest_s[name] = gap_centres_s()[np.flatnonzero(fast.gaps.sum(axis=1))[-1]]
    whole_s, _ = PHYSICS["base"].iteration(8, 1980, 0, 0, [(6_000, 0)])
    assert longest_s["base"] < 0.06
    assert whole_s < longest_s["base+prefill-first"] < whole_s + 0.03


def test_a_legacy_engine_leaves_its_floor_in_the_middle_of_a_run():
    """Eighty sequences on TP4 take 28 ms per step with about 1,800 tokens of context each; less before, more after."""
    load = [(0.0, 1_750 + number % 7, 600) for number in range(80)]
    compare(serve_one(PHYSICS["base+legacy"], 4, trace_of(load)), serve_fast(PHYSICS["base+legacy"], 4, trace_of(load)))


@pytest.mark.parametrize(("kind", "physics"), [("conv", "base"), ("code", "base"), ("conv", "base+prefill-first")])
def test_half_an_hour_of_traffic_under_changing_clocks_is_the_same(kind, physics):
    trace = generate(kind, 600.0, 3.0, seed=5)
    clocks = [(7.0 * number, [800, 1200, 1980, 1605][number % 4]) for number in range(80)]
    compare(serve_one(PHYSICS[physics], 8, trace, clocks), serve_fast(PHYSICS[physics], 8, trace, clocks))


def test_every_request_ends_once_and_every_token_but_the_first_has_a_gap():
    trace = generate("conv", 300.0, 6.0, seed=2)
    fast = serve_fast(PHYSICS["base"], 2, trace)  # far too much for TP2: it preempts
    assert fast._instances[0]["preemptions"] > 0
    assert fast.open == 0
    assert np.isfinite(fast.results["finished_s"]).all()
    assert (fast.results["first_s"] >= trace.arrival_s).all()
    assert (fast.results["finished_s"] >= fast.results["first_s"]).all()
    assert fast.gaps.sum() == (trace.output_tokens - 1).sum()
    assert fast.shown().kv_usage_ratio[0] == 0.0


def test_kv_never_exceeds_its_capacity():
    trace = generate("conv", 60.0, 6.0, seed=2)
    engines = FastEngines(PHYSICS["base"], trace)
    row = engines.start(2, 1980)
    engines.ready(row)
    only = RoutedInstance("only", "", 2, 1_000_000, 1.0, True)
    engines.route([RoutedPool("all", "m", frozenset(ALL_CLASSES), (only,))], {"only": row})
    highest = 0.0
    while engines.open or engines.arrived < len(trace):
        engines.advance(engines.now_s + 0.05)
        usage = engines.shown().kv_usage_ratio[row]
        assert usage <= 1.0
        highest = max(highest, usage)
    assert highest > 0.9


def test_work_is_never_served_faster_than_the_physics_allows():
    trace = generate("conv", 200.0, 4.0, seed=3)
    fast = serve_fast(PHYSICS["base"], 8, trace)
    tokens = np.sort(trace.input_tokens)[[0, len(trace) // 2, -1]]
    for input_tokens in tokens.tolist():
        chunks = [(min(1024, input_tokens - done), done) for done in range(0, input_tokens, 1024)]
        least_s = sum(PHYSICS["base"].iteration(8, 1980, 0, 0, [chunk])[0] for chunk in chunks)
        mine = trace.input_tokens == input_tokens
        assert (fast.results["first_s"][mine] - trace.arrival_s[mine]).min() >= least_s - 1e-9
    token_s = PHYSICS["base"].iteration(8, 1980, 1, 1)[0]
    longer = trace.output_tokens > 1
    spans_s = fast.results["finished_s"] - fast.results["first_s"]
    assert (spans_s[longer] >= token_s * (trace.output_tokens[longer] - 1)).all()


def test_the_bins_of_gaps_are_where_their_centres_say():
    centres_s = gap_centres_s()
    for gap_s in (0.0, 0.00004, 0.00006, 0.0333, 0.1, 0.99994, 1.0, 1.004, 1.5, 59.0, 1e6):
        found_s = centres_s[gap_bin(gap_s)]
        if gap_s < 1.0:
            assert found_s == pytest.approx(gap_s, abs=0.0000501)
        elif gap_s < 60:
            assert found_s == pytest.approx(gap_s, abs=0.00501)
        else:
            assert found_s == centres_s[-1]
