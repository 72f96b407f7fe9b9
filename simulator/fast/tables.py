"""The physics as tables for the kernels: one row for every tensor parallelism and clock in use.

Rows are sampled from `Physics.iteration` itself, so there is no second copy of its formulas. Between the samples
nothing is interpolated: beside the tokens, an iteration is exactly linear in the context, with prefill also in the
decoding sequences and in the attention, and the samples fix those slopes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulator.fast.layout import BASE_J, BASE_S, COST_COLUMNS, MOST_RUNNING, RATES, TENSOR_W
from simulator.physics import Physics

# Context of a chunk in the second sample: far enough for the slope to be exact to the last digits.
_FAR_TOKENS = 1_000_000


class CostTables:
    """Grows by a row whenever another clock is asked for; rows never move.

    `cost[2 * row, tokens]` holds seconds, joules and tensor watts per GPU of an iteration with prefill of that many
    tokens in all, without context, sequences and attention; `cost[2 * row + 1, batch]` those of one that only decodes,
    without context; `rates[row]` what the rest adds.
    """

    def __init__(self, physics: Physics, chunk_tokens: int) -> None:
        self.physics = physics
        self.cost: NDArray[np.float64] = np.zeros((0, chunk_tokens + 1, COST_COLUMNS))
        self.rates: NDArray[np.void] = np.zeros(0, RATES)
        self._rows: dict[tuple[int, int], int] = {}

    def row(self, tp: int, mhz: int) -> int:
        """The row of one clock; made now where it is new. Raises what `Physics.iteration` raises."""
        row = self._rows.get((tp, mhz))
        if row is None:
            cost, rates = _sample(self.physics, tp, mhz, self.cost.shape[1] - 1)
            row = self._rows[tp, mhz] = len(self.rates)
            self.cost = np.concatenate((self.cost, cost))
            self.rates = np.concatenate((self.rates, rates))
        return row


# Fleets are made anew for every run of a search, thousands of times for the same few clocks.
@lru_cache(maxsize=256)
def _sample(physics: Physics, tp: int, mhz: int, most: int) -> tuple[NDArray[np.float64], NDArray[np.void]]:
    """One row of rates and its two of costs, for up to `most` tokens; whoever gets them must not write to them."""
    floor_s = physics.parameters.legacy_decode_floor_ms / 1e3 if physics.legacy else 0.0
    # The floor of a legacy engine is the kernels' business: the tables hold what lies under it.
    physics = physics.without_floor()
    cost = np.zeros((2, most + 1, COST_COLUMNS))
    near = np.array([physics.iteration(tp, mhz, 0, 0, [(n, 0)]) for n in range(1, most + 1)])
    far = np.array([physics.iteration(tp, mhz, 0, 0, [(n, _FAR_TOKENS)]) for n in range(1, most + 1)])
    near[:, 1] *= near[:, 0]  # watts to joules
    far[:, 1] *= far[:, 0]
    tokens = np.arange(1, most + 1)
    attention_s = float(far[-1, 0] - near[-1, 0]) / (most * _FAR_TOKENS)
    tensor_w = (far[:, 1] - near[:, 1]) / (far[:, 0] - near[:, 0])
    own_attention_s = tokens * (tokens / 2) * attention_s
    cost[0, 1:, BASE_S] = near[:, 0] - own_attention_s
    cost[0, 1:, BASE_J] = near[:, 1] - own_attention_s * tensor_w
    cost[0, 1:, TENSOR_W] = tensor_w
    line = physics.decode_line(tp, mhz, 1, 1)
    for batch in range(1, min(most, MOST_RUNNING) + 1):
        alone = physics.decode_line(tp, mhz, batch, batch)
        cost[1, batch, BASE_S], cost[1, batch, BASE_J] = alone.seconds, alone.joules
    rates = np.zeros(1, RATES)
    rates["kv_s"] = line.seconds_per_context_token
    rates["kv_w"] = line.joules_per_context_token / line.seconds_per_context_token
    rates["sequence_s"] = physics.sequence_s(tp, mhz)
    rates["attention_s"] = attention_s
    rates["idle_w"] = physics.idle_w(mhz, context=True)
    rates["floor_s"] = floor_s
    return cost, rates
