"""Who serves and who stands by, and for how long that pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.policy.idle import (
    FEW_SHARE,
    LONE_SHARE,
    MANY,
    MANY_SHARE,
    carried_share,
    choose_serving,
    keep_s,
    power_at,
    standby_w,
)
from controller.profile.fit import fit
from controller.profile.table import IdlePoint
from tests.synthetic_profile import synthetic_profile

FITTED = fit(synthetic_profile())
TOP = FITTED.max_rate_rps("short", 4)
FULL = FITTED.at_clock(1980)  # no lower clock that more instances could run at


def test_a_light_load_is_served_by_few() -> None:
    chosen = choose_serving(FULL, "short", {4: 6}, 0.5 * TOP)
    assert chosen.carries
    assert chosen.counts == {4: 1}
    busy_w = power_at(FULL, "short", 4, 0.5 / LONE_SHARE)
    assert chosen.power_w == pytest.approx(busy_w + 5 * standby_w(FULL, "short", 4))


def test_all_serve_where_the_load_needs_them_or_more() -> None:
    assert choose_serving(FITTED, "short", {4: 3}, 2.5 * TOP).counts == {4: 3}
    over = choose_serving(FITTED, "short", {4: 3}, 9.0 * TOP)
    assert (over.counts, over.carries) == ({4: 3}, False)
    assert choose_serving(FITTED, "short", {}, 1.0).carries is False


def test_the_fill_leaves_room() -> None:
    assert choose_serving(FULL, "short", {4: 4}, 1.95 * FEW_SHARE * TOP, fill=0.9).counts[4] == 3
    assert choose_serving(FULL, "short", {4: 4}, 1.95 * FEW_SHARE * TOP, fill=1.0).counts[4] == 2


def test_one_alone_carries_less_than_beside_others() -> None:
    assert choose_serving(FULL, "short", {4: 3}, 0.95 * LONE_SHARE * TOP).counts[4] == 1
    assert choose_serving(FULL, "short", {4: 3}, 0.95 * TOP).counts[4] == 2
    assert choose_serving(FULL, "short", {4: 1}, 0.95 * TOP).carries is False


def test_one_more_serves_where_a_lower_clock_saves_more() -> None:
    assert choose_serving(FULL, "short", {4: 4}, 1.95 * FEW_SHARE * TOP).counts[4] == 2
    assert choose_serving(FITTED, "short", {4: 4}, 1.95 * FEW_SHARE * TOP).counts[4] > 2


def test_without_load_the_least_number_serves() -> None:
    assert sum(choose_serving(FITTED, "short", {2: 1, 8: 2}, 0.0, least=2).counts.values()) == 2


def test_the_present_choice_stays_unless_another_saves_clearly() -> None:
    present = {4: 3}
    assert choose_serving(FULL, "short", {4: 4}, 1.99 * FEW_SHARE * TOP, current=present).counts == {4: 2}
    same_power = replace(
        FITTED.profile, points=tuple(replace(p, power_w=1000.0) for p in FITTED.profile.points), idle=()
    )
    assert choose_serving(fit(same_power), "short", {4: 4}, 1.99 * FEW_SHARE * TOP, current=present).counts == present
    # It no longer carries the load.
    assert choose_serving(FITTED, "short", {4: 4}, 3.5 * TOP, current=present).counts == {4: 4}


@given(
    st.dictionaries(st.sampled_from((2, 4, 8)), st.integers(0, 5), max_size=3),
    st.floats(0, 100),
    st.floats(0.5, 1.0),
    st.integers(1, 3),
)
def test_it_carries_what_all_together_carry(counts: dict[int, int], rate: float, fill: float, least: int) -> None:
    chosen = choose_serving(FITTED, "short", counts, rate, fill, least)
    all_rps = fill * sum(n * FITTED.max_rate_rps("short", tp) for tp, n in counts.items())
    assert all(0 <= n <= counts[tp] for tp, n in chosen.counts.items())
    all_rps *= carried_share(sum(counts.values()))
    if rate <= all_rps * (1 - 1e-6) and sum(counts.values()):
        assert chosen.carries
        assert sum(chosen.counts.values()) >= min(least, sum(counts.values()))
    elif rate > all_rps * (1 + 1e-6):
        assert not chosen.carries


def test_standby_is_kept_for_as_long_as_a_start_costs() -> None:
    extra_w = standby_w(FITTED, "short", 4) - 4 * FITTED.parked_w
    assert keep_s(FITTED, "short", 4, 1000.0) == pytest.approx(1000.0 / extra_w)


def test_where_hosts_are_switched_off_it_is_kept_for_as_long_as_a_start_and_a_hosts_way_down_and_up_cost() -> None:
    extra_w = standby_w(FITTED, "short", 4) - 4 * FITTED.parked_w + 4 * 250.0
    kept_s = keep_s(FITTED, "short", 4, 1000.0, host_share_w=250.0, host_cycle_s=600.0)
    assert kept_s == pytest.approx((1000.0 + 600.0 * 4 * 250.0) / extra_w)
    assert kept_s < keep_s(FITTED, "short", 4, 1_000_000.0)


def test_it_stands_by_at_the_clock_of_least_power() -> None:
    low = replace(FITTED.profile, idle=(*FITTED.profile.idle, IdlePoint(4, 210, 290.0)))
    assert standby_w(fit(low), "short", 4) == 290.0
    point = fit(low).standby(4)
    assert point is not None
    assert point.mhz == 210


def test_many_need_no_margin_few_do() -> None:
    assert choose_serving(FITTED, "short", {4: MANY}, 1.04 * MANY * TOP).carries
    assert not choose_serving(FITTED, "short", {4: MANY}, 1.01 * MANY_SHARE * MANY * TOP).carries
    assert not choose_serving(FITTED, "short", {4: MANY - 1}, 1.01 * (MANY - 1) * TOP).carries
