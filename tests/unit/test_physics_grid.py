"""A measured grid in the place of the physics: the same results where it was made of it, and nothing beyond it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from simulator.calibration import SweepPlan, calibrate_twin
from simulator.fast.static import gap_quantile_s, static_engines
from simulator.fast.tables import CostTables
from simulator.grid_file import COLUMNS, grid_rows
from simulator.physics import Physics
from simulator.traces import generate
from tests.unit.test_fast_tables import from_tables

PHYSICS = Physics.load()
# TP8 alone, so that reading it takes little time.
ROWS = [row for row in grid_rows(PHYSICS) if row.split(",")[1] in ("tp", "", "8")]


def written(folder: Path, rows: list[str]) -> Path:
    file = folder / "grid.csv"
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Physics:
    return Physics.from_text(str(written(tmp_path_factory.mktemp("grid"), ROWS)))


def test_it_says_what_the_physics_says_at_its_points_and_nearly_so_between_them(grid):
    assert (grid.tps, grid.clocks_mhz) == ((8,), PHYSICS.clocks_mhz)
    assert grid.kv_capacity_tokens(8) == PHYSICS.kv_capacity_tokens(8)
    assert grid.loading_w == PHYSICS.loading_w
    assert grid.idle_w(1980, context=False) == PHYSICS.idle_w(1980, context=False)
    assert grid.idle_w(700, context=True) == pytest.approx(PHYSICS.idle_w(700, context=True), rel=0.01)
    assert grid.iteration(8, 1200, 64, 64_000) == pytest.approx(PHYSICS.iteration(8, 1200, 64, 64_000), rel=1e-6)
    rng = random.Random(1)
    for _ in range(2000):
        batch, mhz = rng.choice([0, 1, 7, 40, 130, 250]), rng.choice([600, 870, 1110, 1500, 1980])
        context = batch * rng.randint(50, 3000)
        chunks = [] if batch and rng.random() < 0.5 else [(rng.randint(1, 700), rng.choice([0, 900, 3000]))]
        seconds, watts = PHYSICS.iteration(8, mhz, batch, context, chunks)
        assert grid.iteration(8, mhz, batch, context, chunks) == pytest.approx((seconds, watts), rel=0.04)


@pytest.mark.parametrize("mhz", [1005, 1455, 1980])
def test_a_fleet_on_it_draws_and_takes_what_one_on_the_physics_does(grid, mhz):
    trace = generate("conv", 120.0, 14.0, seed=5)
    found = []
    for physics in (PHYSICS, grid):
        engines = static_engines(physics, trace, 3, 8, mhz)
        engines.finish()
        ttft_s = engines.results["first_s"] - trace.arrival_s
        found.append([engines.energy_j().sum(), *np.quantile(ttft_s, (0.5, 0.99)), gap_quantile_s(engines.gaps, 0.99)])
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_the_kernels_tables_hold_it_exactly(grid):
    tables, rng = CostTables(grid, 1024), random.Random(2)
    for _ in range(300):
        batch, mhz = rng.choice([0, 1, 5, 100, 256]), rng.choice([210, 810, 1980])
        chunks = [] if batch and rng.random() < 0.5 else [(rng.randint(1, 700), rng.choice([0, 900, 3000]))]
        point = (8, mhz, batch, batch * rng.randint(1, 3000), chunks)
        assert from_tables(tables, *point) == pytest.approx(grid.iteration(*point), rel=1e-9)


def test_profiles_are_kept_by_what_the_grid_says(grid, tmp_path):
    other = Physics.from_text(str(written(tmp_path, [*ROWS[:-1], _scaled(ROWS[-1], 1.001)])))
    assert other.identity() != grid.identity()
    assert grid.off_by(0.1).iteration(8, 1200, 64, 64_000) == pytest.approx(
        [1.1 * value for value in grid.iteration(8, 1200, 64, 64_000)]
    )
    assert grid.off_by(0.1).idle_w(1200, context=True) == pytest.approx(1.1 * grid.idle_w(1200, context=True))


def test_what_was_not_measured_is_refused_when_it_is_asked_for(grid, tmp_path):
    for point in ((8, 195, 1, 1), (8, 1995, 1, 1), (4, 1200, 1, 1), (8, 1200, 257, 257)):
        with pytest.raises(UserError):
            grid.iteration(*point)
    with pytest.raises(UserError, match="tokens in one iteration"):
        grid.iteration(8, 1200, 0, 0, [(8193, 0)])
    high = [row for row in ROWS if row.split(",")[2] not in ("210", "405")]
    narrow = Physics.from_text(str(written(tmp_path, high)))
    assert narrow.clocks_mhz[0] == 600
    with pytest.raises(UserError, match=r"idle power was measured from 600 to 1980 MHz, not at 210 MHz"):
        calibrate_twin(narrow, tmp_path, plan=SweepPlan(tps=(8,), clocks_mhz=(1980,)), workers=1)


def _with(row: str, column: int, value: str) -> str:
    parts = row.split(",")
    parts[column] = value
    return ",".join(parts)


def _scaled(row: str, factor: float, column: int = 5) -> str:
    return _with(row, column, repr(float(row.split(",")[column]) * factor))


def only(start: str, change: Callable[[str], list[str]]) -> list[str]:
    """All rows, with those changed that begin so."""
    assert any(row.startswith(start) for row in ROWS), start
    return [new for row in ROWS for new in (change(row) if row.startswith(start) else [row])]


BROKEN = {
    "no such column": ([ROWS[0].replace("watts", "power"), *ROWS[1:]], "first line must be kind,tp,mhz"),
    "unknown kind": (only("idle,,1980", lambda row: [row, "warm,,1980,,,,3"]), "unknown kind 'warm'"),
    "no number": (only("idle,,1980", lambda row: [_with(row, 6, "many")]), "watts 'many' of a idle row"),
    "negative": (only("decode,8,1200,1,100,", lambda row: [_with(row, 5, "-1")]), "seconds '-1'"),
    "half a token": (only("decode,8,1200,1,100,", lambda row: [_with(row, 3, "1.5")]), "tokens '1.5'"),
    "twice": (only("decode,8,1200,1,100,", lambda row: [row, row]), "stands above already"),
    "a hole": (only("decode,8,1200,64,64000,", lambda row: []), "no decode row of TP8 at 1200 MHz for 64 tokens"),
    "a clock too few": (only("prefill,8,1200,", lambda row: []), "no prefill row of TP8 at 1200 MHz"),
    "far clocks": (
        [row for row in ROWS if row.split(",")[2] in ("mhz", "", "210", "1980")],
        "clocks: nothing between 210 and 1980",
    ),
    "short prompts only": (
        [row for row in ROWS if not (row.startswith("prefill") and int(row.split(",")[3]) > 512)],
        "prefill rows of TP8 go from 1 to 512 tokens, engines from 1 to 1024",
    ),
    "small batches only": (
        [row for row in ROWS if not (row.startswith("decode") and int(row.split(",")[3]) > 128)],
        "decode rows of TP8 go from 1 to 128 tokens",
    ),
    "one context": (
        [row for row in ROWS if not (row.startswith("prefill") and row.split(",")[4] != "0")],
        "all prefill rows of TP8 have one context",
    ),
    "faster with more tokens": (
        only("prefill,8,1200,1024,0,", lambda row: [_scaled(row, 0.5)]),
        "prefill, TP8, 1200 MHz, context 0: seconds fall",
    ),
    "slower at a higher clock": (
        only("decode,8,1395,256,", lambda row: [_scaled(row, 1.5)]),
        "over the clock: speed fall",
    ),
    "less power at a higher clock": (
        only("decode,8,1980,256,", lambda row: [_scaled(row, 0.7, 6)]),
        "over the clock: watts fall",
    ),
    "bent": (
        [_scaled(row, 1.6) if row.startswith("decode") and row.split(",")[4] == "1024000" else row for row in ROWS],
        "must be linear in the context",
    ),
    "idle below": (only("idle,,210", lambda row: []), "TP8 runs at 210 to 1980 MHz, idle does not"),
    "nothing": ([",".join(COLUMNS)], "holds no prefill rows"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_grid_is_refused_with_what_is_wrong(tmp_path, name):
    rows, said = BROKEN[name]
    with pytest.raises(UserError) as refused:
        Physics.from_text(str(written(tmp_path, rows)))
    assert said in str(refused.value)
    assert "grid.csv" in str(refused.value)


def test_it_has_no_legacy_mode_but_may_take_prompts_first(grid, tmp_path):
    file = written(tmp_path, ROWS)
    with pytest.raises(UserError, match="measured as it is"):
        Physics.from_text(f"{file}+legacy")
    assert Physics.from_text(f"{file}+prefill-first").prefill_first
    with pytest.raises(UserError, match="cannot read the grid"):
        Physics.from_text(str(tmp_path / "none.csv"))
