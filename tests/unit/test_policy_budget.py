"""Power budgets as pure policy: shares, unreachable budgets, and that caps never add up to more while they move."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.policy.budget import (
    TOLERANCE_W,
    GpuPower,
    NodesBudget,
    allocate,
    largest_share,
    next_caps,
    room_w,
    share_out,
)
from controller.profile.fit import fit
from tests.synthetic_profile import synthetic_profile

LOW_W, HIGH_W = 200.0, 700.0


def gpu(number: int, need_w: float = 400.0, ceiling_w: float = HIGH_W, steerable: bool = True) -> GpuPower:
    node = f"n{number // 8}"
    return GpuPower(f"{node}-{number}", node, need_w, LOW_W, HIGH_W, ceiling_w, None, steerable)


def test_watts_go_by_need_within_the_range_of_each_gpu() -> None:
    shared = share_out(1100, [200] * 3, [700] * 3, [600, 300, 72])
    assert sum(shared) <= 1100
    assert shared[2] == 200
    assert shared[0] == pytest.approx(2 * shared[1], abs=2)


def test_a_budget_below_the_lowest_caps_has_every_cap_at_its_minimum() -> None:
    gpus = [gpu(i) for i in range(16)]
    wanted = allocate(gpus, [NodesBudget("row:a", 1000.0, frozenset({"n0"}))])
    assert wanted.unreachable == ("row:a",)
    assert set(wanted.caps_w.values()) == {LOW_W}
    assert len(wanted.caps_w) == 8, "the other row is left alone"


def test_what_a_silent_node_may_draw_is_taken_off_first() -> None:
    gpus = [gpu(i, ceiling_w=500.0, steerable=i >= 8) for i in range(16)]
    wanted = allocate(gpus, [NodesBudget("cluster", 8000.0, frozenset({"n0", "n1"}))])
    assert wanted.unreachable == ()
    assert sum(wanted.caps_w.values()) <= 8000 - 8 * 500
    assert room_w(gpus, [NodesBudget("cluster", 8000.0, frozenset({"n0", "n1"}))]) == 4000


def test_overlapping_budgets_are_all_kept() -> None:
    gpus = [gpu(i) for i in range(16)]
    budgets = [NodesBudget("cluster", 5000.0, frozenset({"n0", "n1"})), NodesBudget("row:a", 2000.0, frozenset({"n0"}))]
    caps_w = allocate(gpus, budgets).caps_w
    assert sum(caps_w[g.uuid] for g in gpus[:8]) <= 2000
    assert sum(caps_w.values()) <= 5000


def test_what_rises_waits_for_what_falls() -> None:
    rich, poor = replace(gpu(0), ceiling_w=600.0, held_w=600.0), replace(gpu(8), ceiling_w=300.0, held_w=300.0)
    budget = [NodesBudget("cluster", 900.0, frozenset({"n0", "n1"}))]
    wanted = {rich.uuid: 300.0, poor.uuid: 600.0}
    assert next_caps([rich, poor], budget, wanted) == {rich.uuid: 300.0}
    lowered = replace(rich, ceiling_w=300.0, held_w=300.0)
    assert next_caps([lowered, poor], budget, wanted) == {poor.uuid: 600.0}


gpus_strategy = st.lists(
    st.tuples(st.floats(0, 800), st.floats(100, 700), st.booleans(), st.booleans()),
    min_size=1,
    max_size=24,
)


@settings(max_examples=150, deadline=None)
@given(gpus_strategy, st.floats(0, 20_000), st.floats(0, 12_000), st.randoms(use_true_random=False))
def test_no_order_of_answers_breaks_a_budget_that_is_held(
    drawn: list[tuple[float, float, bool, bool]], cluster_w: float, row_w: float, chance: random.Random
) -> None:
    """From any state within the budgets: caps are asked for, some answers come and some are lost, needs change; the sum
    of what each cap may be never leaves a budget, and it ends at the wanted caps once all answer."""
    gpus = [
        replace(gpu(i, need_w=need, ceiling_w=LOW_W, steerable=steerable), held_w=LOW_W)
        for i, (need, _, steerable, _) in enumerate(drawn)
    ]
    nodes = frozenset(g.node_id for g in gpus)
    budgets = [NodesBudget("cluster", cluster_w, nodes), NodesBudget("row:a", row_w, frozenset({"n0"}))]
    kept = [b for b in budgets if sum(g.ceiling_w for g in gpus if g.node_id in b.nodes) <= b.watts]
    for turn in range(8):
        lossy = turn < 4
        if turn in (1, 2):  # the layout changed
            gpus = [
                replace(g, need_w=need)
                for g, (_, need, _, _) in zip(gpus, drawn[::-1] if turn == 2 else drawn, strict=True)
            ]
        wanted = allocate(gpus, budgets).caps_w
        asked = next_caps(gpus, budgets, wanted)
        # Asked for, not answered: each may stand at the higher of both.
        gpus = [replace(g, ceiling_w=max(g.ceiling_w, asked.get(g.uuid, 0.0))) for g in gpus]
        for budget in kept:
            assert sum(g.ceiling_w for g in gpus if g.node_id in budget.nodes) <= budget.watts + 2 * TOLERANCE_W
        gpus = [
            replace(g, ceiling_w=asked[g.uuid], held_w=asked[g.uuid])
            if g.uuid in asked and not (lossy and chance.random() < 0.3)
            else g
            for g in gpus
        ]
    wanted = allocate(gpus, budgets).caps_w
    assert {g.uuid: g.held_w for g in gpus if g.uuid in wanted} == pytest.approx(wanted, abs=TOLERANCE_W)
    for uuid, watts in wanted.items():
        assert LOW_W <= watts <= HIGH_W, uuid


def test_the_largest_share_lies_on_the_line_between_two_points() -> None:
    points = [(0.0, 1000.0), (0.5, 2000.0), (1.0, inf)]
    assert largest_share(points, 500) == 0.0
    assert largest_share(points, 1500) == pytest.approx(0.25)
    assert largest_share(points, 9000) == 0.5


def test_a_capped_profile_carries_what_its_watts_allow_and_no_more() -> None:
    whole = fit(synthetic_profile())
    tops = []
    for cap_w in (100.0, 150.0, 250.0, 400.0, 700.0):
        capped = whole.capped(cap_w)
        for tp in (2, 4, 8):
            for curve in capped.clocks("all", tp):
                assert curve.powers_w[-1] <= cap_w * tp * (1 + 1e-9) or curve.max_rate_rps == 0
                power_w = curve.power_w(curve.max_rate_rps)
                assert curve.max_rate_rps == 0 or (power_w is not None and power_w <= cap_w * tp * (1 + 1e-9))
        tops.append(capped.max_rate_rps("all", 8))
    assert tops == sorted(tops)
    assert tops[0] < tops[-1] == whole.max_rate_rps("all", 8)
    # The clock to go to in trouble is the one that carries most within the cap, not the highest.
    assert whole.capped(250.0).clocks("all", 8)[-1].mhz < 1980
