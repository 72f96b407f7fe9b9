"""Joules per request: shares add up to what the instance drew, and unknown power is not zero."""

from __future__ import annotations

import pytest

from controller.gateway.energy import FRESH_S, EnergyShares


def test_power_is_shared_by_what_runs_at_each_moment() -> None:
    shares = EnergyShares()
    shares.powers({"i": 100.0}, 0.0)
    first = shares.begin("i", 0.0)
    second = shares.begin("i", 10.0)
    assert shares.end("i", first, 0.0, 20.0) == pytest.approx(10 * 100 + 10 * 50)
    shares.powers({"i": 300.0}, 25.0)
    assert shares.end("i", second, 10.0, 30.0) == pytest.approx(10 * 50 + 5 * 100 + 5 * 300)
    # Together: 20 s at 100 W, 5 s at 100 W, 5 s at 300 W. What it draws idle is nobody's.
    third = shares.begin("i", 40.0)
    assert shares.end("i", third, 40.0, 41.0) == pytest.approx(300)


def test_unknown_power_is_unknown_energy() -> None:
    shares = EnergyShares()
    mark = shares.begin("i", 0.0)
    shares.powers({"i": 100.0}, 5.0)
    assert shares.end("i", mark, 0.0, 10.0) is None  # nobody knows of the first five seconds
    mark = shares.begin("i", 10.0)
    assert shares.end("i", mark, 10.0, 12.0) == pytest.approx(200)
    mark = shares.begin("i", 12.0)
    assert shares.end("i", mark, 12.0, 12.0 + FRESH_S + 1) is None  # told too long ago


def test_instances_that_are_gone_are_forgotten() -> None:
    shares = EnergyShares()
    for number in range(100):
        shares.powers({f"i{number}": 100.0}, float(number))
    assert len(shares._instances) <= 2
