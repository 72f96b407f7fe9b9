"""The tables that the kernels read hold the physics, not an approximation of it."""

from __future__ import annotations

import random

import pytest

from common.errors import UserError
from simulator.fast.layout import BASE_J, BASE_S, TENSOR_W
from simulator.fast.tables import CostTables
from simulator.physics import Physics

VARIANTS = ("base", "pessimistic", "optimistic", "base+legacy")


def from_tables(
    tables: CostTables, tp: int, mhz: int, batch: int, context: int, chunks: list[tuple[int, int]]
) -> tuple[float, float]:
    """Seconds and watts of an iteration by what stands in the tables."""
    row = tables.row(tp, mhz)
    base, rates = tables.cost[2 * row + (not chunks), batch + sum(n for n, _ in chunks)], tables.rates[row]
    attention_s = sum(tokens * (before + tokens / 2) for tokens, before in chunks) * rates["attention_s"]
    memory_s = context * rates["kv_s"] + (batch * rates["sequence_s"] if chunks else 0.0)
    seconds = base[BASE_S] + attention_s + memory_s
    joules = base[BASE_J] + attention_s * base[TENSOR_W] + memory_s * rates["kv_w"]
    if batch and seconds < rates["floor_s"]:
        joules += (rates["floor_s"] - seconds) * rates["idle_w"]
        seconds = rates["floor_s"]
    return float(seconds), float(joules / seconds)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_iteration_costs_what_the_physics_says(variant):
    physics = Physics.from_text(variant)
    tables = CostTables(physics, 1024)
    rng = random.Random(variant)
    clocks = rng.sample(physics.clocks_mhz, 4)
    for _ in range(800):
        tp, mhz = rng.choice(physics.tps), rng.choice(clocks)
        batch = rng.choice([0, 1, 2, rng.randint(3, 256)])
        context = batch * rng.randint(1, 3000)
        chunks = []
        left = 1024 - batch
        for _ in range(rng.choice([0, 1, 1, 2, 5]) if batch else 1):
            tokens = rng.randint(1, left)
            chunks.append((tokens, rng.choice([0, rng.randint(1, 20_000)])))
            left -= tokens
            if not left:
                break
        expected = physics.iteration(tp, mhz, batch, context, chunks)
        assert from_tables(tables, tp, mhz, batch, context, chunks) == pytest.approx(expected, rel=1e-9)


def test_rows_are_made_once_and_never_move():
    tables = CostTables(Physics.load(), 64)
    first = tables.row(8, 1980)
    before = tables.cost[2 * first : 2 * first + 2].copy()
    others = [tables.row(tp, mhz) for tp in (2, 4, 8) for mhz in (210, 1200, 1980)]
    assert len(set(others)) == len(tables.rates) == 9
    assert tables.row(8, 1980) == first
    assert (tables.cost[2 * first : 2 * first + 2] == before).all()
    assert tables.rates["idle_w"][first] == Physics.load().idle_w(1980, context=True)


def test_what_the_physics_refuses_makes_no_row():
    tables = CostTables(Physics.load(), 64)
    with pytest.raises(UserError, match="tensor parallelism 3"):
        tables.row(3, 1980)
    with pytest.raises(ValueError, match="0 MHz"):
        tables.row(8, 0)
    assert len(tables.rates) == 0
