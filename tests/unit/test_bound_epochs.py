"""The clairvoyant bound: its MILP against enumeration, its limits, and its columns against the physics."""

from __future__ import annotations

import numpy as np
import pytest

from controller.domain.slo import Slo
from simulator.bound import GROUPS, BoundColumn, BoundTable, clairvoyant, measure_kind
from simulator.physics import Physics
from simulator.traces import Trace

COLUMNS = (
    BoundColumn("all", 8, 800, 0.0, 700.0),
    BoundColumn("all", 8, 800, 2.0, 1500.0),
    BoundColumn("all", 8, 1980, 5.0, 4000.0),
    BoundColumn("all", 4, 1200, 0.0, 400.0),
    BoundColumn("all", 4, 1200, 1.0, 1000.0),
)
# One request is one token in: its work is 1.
TABLE = BoundTable(COLUMNS, 1.0, 0.0, {"all": 1.0})


def steady(rate_rps: float, epochs: int = 2) -> Trace:
    count = round(rate_rps * 60 * epochs)
    arrival_s = 300.0 + np.append(np.arange(count - 1) / rate_rps, 60.0 * epochs)
    return Trace("steady", 1000.0, arrival_s, np.ones(count, np.int64), np.ones(count, np.int64))


@pytest.mark.parametrize(
    ("rate_rps", "off_w", "parked_w"),
    [
        (1.0, 1000.0, 1100.0 + 8 * 72),  # one TP4; a TP8 that is idle half of the time leaves fewer GPUs parked
        (2.0, 1500.0, 1500.0 + 8 * 72),  # one TP8 at the low clock
        (4.0, 3000.0, 3000.0),  # two of them; one at a mix of clocks would draw 3167 W and free 8 GPUs: 3743 W
    ],
)
def test_the_cheapest_whole_instances_are_found(rate_rps, off_w, parked_w):
    found = clairvoyant(TABLE, steady(rate_rps), 16, 72.0)
    assert found.power_off_w[0] == pytest.approx(off_w, rel=2e-3)
    assert found.power_parked_w[0] == pytest.approx(parked_w, rel=2e-3)
    assert found.energy_off_kwh == pytest.approx(sum(found.power_off_w) * 60 / 3.6e6)


def test_more_gpus_never_raise_it_and_the_cap_holds():
    few, many = (clairvoyant(TABLE, steady(4.5), gpus, 0.0) for gpus in (8, 64))
    assert many.energy_off_kwh <= few.energy_off_kwh
    assert few.power_off_w[0] >= 1500 + (4.5 - 2) / 3 * 2500 - 50


def test_an_overloaded_epoch_counts_all_that_the_gpus_carry():
    found = clairvoyant(TABLE, steady(50.0), 16, 72.0)
    assert found.overloaded_epochs == 2
    assert found.power_off_w[0] == pytest.approx(8000.0, rel=0.01)


def test_a_silent_epoch_costs_nothing_but_parked_gpus():
    arrival_s = np.array([300.0, 301.0, 500.0])
    trace = Trace("gap", 600.0, arrival_s, np.ones(3, np.int64), np.ones(3, np.int64))
    found = clairvoyant(TABLE, trace, 16, 72.0)
    assert found.power_off_w[1] == 0
    assert found.power_parked_w[1] == pytest.approx(16 * 72)


def test_columns_are_measured_on_the_physics(monkeypatch):
    monkeypatch.setattr("simulator.bound.CLOCKS_MHZ", (1200, 1980))
    monkeypatch.setattr("simulator.bound.REQUESTS", 1500)
    (short,) = (group for group in GROUPS if group.name == "short")
    physics = Physics.load()
    columns = measure_kind(physics, "conv", short, 8, Slo())
    assert columns[0].power_w == pytest.approx(8 * physics.idle_w(1200, context=True))
    rates, watts = [c.rate_rps for c in columns], [c.power_w for c in columns]
    assert rates == sorted(rates)
    assert watts == sorted(watts)
    assert 5 < rates[-1] < 60
    assert watts[-1] < 8 * 700
