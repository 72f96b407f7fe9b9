"""Physics whose iterations were measured: lines through the points of a grid take the place of the formulas.

`simulator/grid_file.py` reads and proves the grid; everything that asks a `Physics` cannot tell the difference.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from simulator.physics import DecodeLine, Physics, Prefill
from simulator.physics_parameters import Parameters

Cell = tuple[int, int]  # TP, MHz
EXTEND = "Measure there too: a grid is not extrapolated."


@dataclass(frozen=True, slots=True)
class Lines:
    """One TP at one clock. Seconds and joules per GPU by tokens, from 0 on: of prefills without attention, and of
    decodes without context; and what attention, context and a sequence beside prefill add."""

    prefill_s: NDArray[np.float64]
    prefill_j: NDArray[np.float64]
    decode_s: NDArray[np.float64]
    decode_j: NDArray[np.float64]
    attention_s: float  # per unit: tokens of a chunk x (tokens before it + half of its own)
    attention_w: float
    context_s: float
    context_w: float
    sequence_s: float

    def cost(self, batch: int, context_tokens: int, prefill: Prefill) -> tuple[float, float]:
        context_s = context_tokens * self.context_s
        if not prefill:
            return (
                float(self.decode_s[batch]) + context_s,
                float(self.decode_j[batch]) + context_s * self.context_w,
            )
        tokens = batch + sum(chunk for chunk, _ in prefill)
        units = sum(chunk * (before + chunk / 2) for chunk, before in prefill)
        attention_s = units * self.attention_s
        memory_s = context_s + batch * self.sequence_s
        return (
            float(self.prefill_s[tokens]) + attention_s + memory_s,
            float(self.prefill_j[tokens]) + attention_s * self.attention_w + memory_s * self.context_w,
        )


class GridPhysics(Physics):
    """Physics whose iterations and powers were measured."""

    def __init__(
        self,
        name: str,
        digest: str,
        parameters: Parameters,
        lines: Mapping[Cell, Lines],
        idle_w: Mapping[int, float],
        prefill_first: bool = False,
    ) -> None:
        super().__init__(name, parameters, "measured", prefill_first=prefill_first)
        self._digest = digest
        self._measured = lines
        self._idle_w = idle_w
        self._between: dict[Cell, Lines] = {}
        self._grid_mhz = {tp: sorted(mhz for of, mhz in lines if of == tp) for tp in parameters.kv_capacity_tokens}
        low = max(clocks[0] for clocks in self._grid_mhz.values())
        high = min(clocks[-1] for clocks in self._grid_mhz.values())
        self.clocks_mhz = tuple(mhz for mhz in self.clocks_mhz if low <= mhz <= high)

    def identity(self) -> list[Any]:
        return [*super().identity(), self._digest]

    def off_by(self, share: float) -> Physics:
        if not share:
            return self
        more = 1 + share
        lines = {cell: _scaled(one, more) for cell, one in self._measured.items()}
        idle_w = {mhz: watts * more for mhz, watts in self._idle_w.items()}
        kept = self.parameters
        parameters = kept.model_copy(update={"static_w": kept.static_w * more, "loading_w": kept.loading_w * more})
        name = f"{self.name} off by {share:+g}"
        return GridPhysics(name, self._digest, parameters, lines, idle_w, self.prefill_first)

    def sequence_s(self, tp: int, mhz: int) -> float:
        return self._lines(tp, mhz).sequence_s

    def idle_w(self, mhz: int, context: bool) -> float:
        if not context:
            return self.parameters.static_w
        clocks = sorted(self._idle_w)
        self._within(mhz, clocks, "idle power")
        return float(np.interp(mhz, clocks, [self._idle_w[one] for one in clocks]))

    def _cost(self, tp: int, mhz: int, batch: int, context_tokens: int, prefill: Prefill) -> tuple[float, float]:
        lines = self._lines(tp, mhz)
        tokens = batch + sum(chunk for chunk, _ in prefill)
        if tokens <= 0:
            raise ValueError("an iteration needs at least one token")
        most = len(lines.prefill_s if prefill else lines.decode_s) - 1
        if tokens > most:
            what = "tokens" if prefill else "sequences"
            raise UserError(f"{self.name}: {tokens} {what} in one iteration; measured up to {most}.", EXTEND)
        return lines.cost(batch, context_tokens, prefill)

    def _make_decode_lines(self, tp: int, mhz: int, batch: int) -> tuple[DecodeLine, ...]:
        lines = self._lines(tp, mhz)
        seconds, joules = self._cost(tp, mhz, batch, 0, ())
        return (DecodeLine(seconds, lines.context_s, joules, lines.context_s * lines.context_w, inf),)

    def _lines(self, tp: int, mhz: int) -> Lines:
        lines = self._measured.get((tp, mhz)) or self._between.get((tp, mhz))
        if lines is None:
            self._check_tp(tp)
            clocks = self._grid_mhz[tp]
            self._within(mhz, clocks, f"TP{tp}")
            above = bisect_left(clocks, mhz)
            low, high = clocks[above - 1], clocks[above]
            # Times are nearly linear in 1/f.
            share = (1 / low - 1 / mhz) / (1 / low - 1 / high)
            lines = self._between[tp, mhz] = _mixed(self._measured[tp, low], self._measured[tp, high], share)
        return lines

    def _within(self, mhz: int, clocks: Sequence[int], what: str) -> None:
        if not clocks[0] <= mhz <= clocks[-1]:
            raise UserError(
                f"{self.name}: {what} was measured from {clocks[0]} to {clocks[-1]} MHz, not at {mhz} MHz.", EXTEND
            )


_TIMES = ("prefill_s", "decode_s", "attention_s", "context_s", "sequence_s")
_JOULES = ("prefill_j", "decode_j")
_WATTS = ("attention_w", "context_w")


def _scaled(lines: Lines, more: float) -> Lines:
    longer = {name: getattr(lines, name) * more for name in (*_TIMES, *_WATTS)}
    return replace(lines, **longer, **{name: getattr(lines, name) * more**2 for name in _JOULES})


def _mixed(low: Lines, high: Lines, share: float) -> Lines:
    """Between two clocks: times and powers, and energies from both."""

    def between(a: Any, b: Any) -> Any:
        return a + share * (b - a)

    mixed = {name: between(getattr(low, name), getattr(high, name)) for name in (*_TIMES, *_WATTS)}
    for seconds, joules in (("prefill_s", "prefill_j"), ("decode_s", "decode_j")):
        with np.errstate(invalid="ignore"):
            watts = between(
                getattr(low, joules) / getattr(low, seconds), getattr(high, joules) / getattr(high, seconds)
            )
        mixed[joules] = np.nan_to_num(watts) * mixed[seconds]
    return Lines(**mixed)
