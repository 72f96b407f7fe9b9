"""Carbon and cost: constants or a grid that changes, weighed by what is drawn when."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from simulator.assembly import _priced, _window_mean
from simulator.prices import Steps, read_steps
from simulator.study import Study


def test_a_number_holds_all_the_time():
    steps = read_steps("450", "--carbon-g-per-kwh")
    assert steps.at([0.0, 3.0, 1e6]).tolist() == [450.0, 450.0, 450.0]


@pytest.mark.parametrize("head", ["", "hours,value\n"])
def test_a_file_holds_each_value_from_its_hour_on(tmp_path: Path, head: str):
    file = tmp_path / "grid.csv"
    file.write_text(f"{head}0,500\n6.5,100\n\n20,300\n")
    steps = read_steps(str(file), "--carbon-g-per-kwh")
    assert steps.at([0.0, 6.4, 6.5, 19.9, 20.0, 400.0]).tolist() == [500.0, 500.0, 100.0, 100.0, 300.0, 300.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no rows"),
        ("0,500\n1,dear\n", "grid.csv:2: is not `hours,value`"),
        ("0,500\n1\n", "grid.csv:2: is not `hours,value`"),
        ("0,500\n0,400\n", "grid.csv:2: hours must rise"),
        ("0,500\n2,-1\n", "grid.csv:2: hours must rise and values not be negative"),
        ("0,nan\n", "grid.csv:1: hours must rise"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, content: str, said: str):
    file = tmp_path / "grid.csv"
    file.write_text(content)
    with pytest.raises(UserError) as refused:
        read_steps(str(file), "--price-per-kwh")
    assert said in str(refused.value)


@pytest.mark.parametrize("text", ["-1", "inf", "nan", "none.csv"])
def test_what_is_no_price_is_refused(text: str):
    with pytest.raises(UserError, match="--price-per-kwh"):
        read_steps(text, "--price-per-kwh")


def test_what_is_drawn_while_it_is_clean_counts_as_clean():
    """The window opens five minutes into the trace; one hour of it, the second half of which is clean and busy."""
    carbon, price = Steps((0.0, 5 / 60 + 0.5), (600.0, 200.0)), Steps((0.0,), (0.1,))
    study = Study("conv", carbon=carbon, price=price)
    kwh = {"energy_off_kwh": 3.0, "energy_parked_kwh": 4.0, "wall_kwh": 5.0}
    run = {"figures": kwh, "series": {"power_w": [1000.0] * 30 + [3000.0] * 30}}
    row = _priced(study, run, {"figures": {name: 2 * value for name, value in kwh.items()}}, 1)
    assert row["carbon_kg"] == pytest.approx(4.0 * (0.25 * 600 + 0.75 * 200) / 1e3)
    assert row["cost_usd"] == pytest.approx(0.4)
    assert (row["saved_off"], row["saved_parked"], row["saved_wall"]) == (0.5, 0.5, 0.5)
    assert _window_mean(carbon, 3600.0) == pytest.approx(400.0)
    assert _window_mean(price, 10.0) == pytest.approx(0.1)
