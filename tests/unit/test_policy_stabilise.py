"""When a better layout is worth switching to."""

from __future__ import annotations

from dataclasses import replace
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


def test_a_least_share_of_the_power_may_be_asked_for() -> None:
    """What no repeat of a measurement shows: how far the curves of different classes are off against each other."""
    args = (priced(6000), priced(5900), {}, {}, 1800.0, None, False)
    assert judge(*args).accept
    kept = judge(*args, settings=StabiliseSettings(least_saving_ratio=0.03))
    assert (kept.accept, kept.reason) == (False, Reason.SAVING_TOO_SMALL)


def test_only_growth_of_a_tp_is_started() -> None:
    assert starts_needed({("all", 8): 2}, {("short", 8): 1, ("long", 8): 1}) == {}
    assert starts_needed({("all", 8): 2}, {("short", 4): 2, ("long", 8): 3}) == {4: 2, 8: 1}
    assert retirements_needed({("all", 8): 2, ("all", 4): 1}, {("short", 4): 2, ("long", 8): 1}) == {8: 1}


def test_a_saving_smaller_than_the_error_of_the_profile_is_not_switched_for() -> None:
    profile = synthetic_profile()
    noisy = replace(profile, points=tuple(replace(p, repeats=3, power_sd_w=0.2 * p.power_w) for p in profile.points))
    counts, fewer = {("all", 8): 4}, {("all", 8): 3}
    sure, unsure = (
        [price(fit(measured), layout, {"all": 10.0}, 32) for layout in (counts, fewer)] for measured in (profile, noisy)
    )
    assert [p.power_w for p in sure] == [p.power_w for p in unsure]
    assert sure[0].error_w == 0 < unsure[0].error_w
    taken, kept = (
        judge(present, candidate, {}, {}, 1800.0, None, pending=False) for present, candidate in (sure, unsure)
    )
    assert taken.accept
    assert (kept.accept, kept.reason) == (False, Reason.SAVING_TOO_SMALL)
    assert kept.saving_low_j < taken.saving_low_j


def test_hosts_that_could_be_switched_off_count_as_a_saving() -> None:
    gpus_alone = price(FITTED, {("all", 4): 4}, {"all": 1.0}, 16)
    with_hosts = price(FITTED, {("all", 4): 4}, {"all": 1.0}, 16, host_share_w=250.0)
    assert with_hosts.power_w == gpus_alone.power_w
    assert with_hosts.host_w == pytest.approx(16 * 250.0)
    held, freed = priced(5000), priced(5000)
    assert not verdict(held, freed).accept
    assert verdict(replace(held, host_w=4000.0), replace(freed, host_w=2000.0)).accept


def test_a_retirement_costs_too() -> None:
    def judged(retire_j: float) -> Verdict:
        return judge(priced(6000), priced(5900), {}, {}, 300.0, None, False, retired={8: 1}, retire_j={8: retire_j})

    assert judged(1_000.0).accept
    assert judged(30_000.0).reason is Reason.SAVING_TOO_SMALL
