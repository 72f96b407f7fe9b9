"""When a better layout is worth switching to."""

from __future__ import annotations

from math import inf

import pytest

from controller.domain.reasons import Reason
from controller.policy.stabilise import (
    LayoutPrice,
    StabiliseSettings,
    Verdict,
    judge,
    price,
    retirements_needed,
    starts_needed,
)
from controller.profile.fit import fit
from tests.synthetic_profile import synthetic_profile

FITTED = fit(synthetic_profile())


def priced(power_w: float, load_ratio: float = 0.6) -> LayoutPrice:
    return LayoutPrice(power_w, load_ratio <= 1, load_ratio)


def verdict(
    present: LayoutPrice,
    candidate: LayoutPrice,
    started: dict[int, int] | None = None,
    since_change_s: float | None = None,
    pending: bool = False,
) -> Verdict:
    return judge(present, candidate, started or {}, {4: 20_000.0, 8: 40_000.0}, 300.0, since_change_s, pending)


def test_a_saving_that_pays_is_taken() -> None:
    taken = verdict(priced(6000), priced(5000), {8: 1})
    assert taken.accept
    assert taken.reason is Reason.FORECAST_CHANGED
    assert taken.saving_low_j > taken.cost_high_j == pytest.approx(52_000)


def test_one_that_does_not_pay_is_not() -> None:
    kept = verdict(priced(6000), priced(5900), {8: 1})
    assert not kept.accept
    assert kept.reason is Reason.SAVING_TOO_SMALL


def test_no_saving_keeps_the_plan() -> None:
    assert verdict(priced(5000), priced(5000)).reason is Reason.PLAN_KEPT
    assert verdict(priced(5000), priced(5200)).reason is Reason.PLAN_KEPT


def test_dwell_and_a_pending_transition_hold_savings_back() -> None:
    soon = verdict(priced(9000), priced(5000), since_change_s=5.0)
    assert (soon.accept, soon.reason) == (False, Reason.SAVING_TOO_SMALL)
    assert verdict(priced(9000), priced(5000), since_change_s=500.0).accept
    pending = verdict(priced(9000), priced(5000), pending=True)
    assert (pending.accept, pending.reason) == (False, Reason.TRANSITION_PENDING)


def test_capacity_overrides_everything() -> None:
    needed = verdict(priced(5000, 1.2), priced(8000, 0.8), {8: 9}, since_change_s=1.0, pending=True)
    assert (needed.accept, needed.reason) == (True, Reason.CAPACITY_NEEDED)


def test_never_to_a_layout_that_carries_less() -> None:
    assert not verdict(priced(9000, 0.9), priced(100, 1.1)).accept
    worse = verdict(priced(9000, 1.5), priced(100, 1.6))
    assert (worse.accept, worse.reason) == (False, Reason.NO_CAPACITY)
    better = verdict(priced(9000, inf), priced(9000, 1.6))
    assert (better.accept, better.reason) == (True, Reason.NO_CAPACITY)
    assert "none" in better.sentence


def test_price_shares_load_by_capacity_and_counts_parked_gpus() -> None:
    rate = 5.0
    got = price(FITTED, {("all", 8): 1, ("all", 4): 1}, {"all": rate}, 16)
    caps = {tp: FITTED.max_rate_rps("all", tp) for tp in (4, 8)}
    expected = 4 * FITTED.parked_w
    for tp in (4, 8):
        mine = rate * caps[tp] / sum(caps.values())
        expected += min(c.power_w(mine) or inf for c in FITTED.clocks("all", tp) if c.max_rate_rps >= mine)
    assert got.power_w == pytest.approx(expected)
    assert got.load_ratio == pytest.approx(rate / sum(caps.values()))
    assert got.carries


def test_price_of_what_is_short_or_missing() -> None:
    over = price(FITTED, {("all", 8): 1}, {"all": 20.0}, 8)
    assert not over.carries
    assert over.load_ratio > 2
    missing = price(FITTED, {("short", 8): 1}, {"short": 1.0, "long": 1.0}, 16)
    assert (missing.carries, missing.load_ratio) == (False, inf)
    empty = price(FITTED, {}, {}, 16)
    assert (empty.carries, empty.power_w) == (True, 16 * FITTED.parked_w)


def test_a_slight_shortage_waits_for_the_transition_that_is_under_way() -> None:
    waits = verdict(priced(5000, 1.05), priced(8000, 0.8), pending=True)
    assert (waits.accept, waits.reason) == (False, Reason.TRANSITION_PENDING)
    assert verdict(priced(5000, 1.05), priced(8000, 0.8)).accept


def test_what_retires_counts_as_cost() -> None:
    args = (priced(6000), priced(5700), {}, {}, 300.0, None, False)
    assert judge(*args).accept
    kept = judge(*args, retired={8: 2}, retire_j={8: 40_000.0})
    assert not kept.accept
    assert kept.cost_high_j == pytest.approx(1.3 * 80_000)


def test_settings_move_the_bounds() -> None:
    sure = StabiliseSettings(saving_confidence=1.0, cost_factor=1.0)
    args = (priced(6000), priced(5860), {8: 1}, {8: 40_000.0}, 300.0, None, False)
    assert judge(*args, settings=sure).accept
    assert not judge(*args).accept


def test_only_growth_of_a_tp_is_started() -> None:
    assert starts_needed({("all", 8): 2}, {("short", 8): 1, ("long", 8): 1}) == {}
    assert starts_needed({("all", 8): 2}, {("short", 4): 2, ("long", 8): 3}) == {4: 2, 8: 1}
    assert retirements_needed({("all", 8): 2, ("all", 4): 1}, {("short", 4): 2, ("long", 8): 1}) == {8: 1}
