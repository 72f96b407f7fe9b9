"""A decision: what one manager chose, from which inputs, against which alternatives, and what it predicts.

`inputs`, `alternatives` and `outcome` are plain JSON values; `canonical_json` makes their one byte form, which is
what the store keeps and a replay compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controller.domain.reasons import Level, Mode, Reason

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SolverReport:
    """How a MILP ended. Objective and bound in watts; `gap` relative."""

    solver: str
    status: str
    objective_w: float
    bound_w: float
    gap: float
    solve_ms: float
    columns: int


@dataclass(frozen=True, slots=True)
class Decision:
    # (term, number) is unique: numbers rise by one within a term.
    term: int
    number: int
    decided_at_s: float  # UTC epoch seconds
    level: Level
    scope: str  # "cluster", a pool's name, or an instance's id
    trigger: str  # "tick", "start", "node_lost", ...
    mode: Mode
    reason: Reason
    sentence: str
    inputs: Json
    outcome: Json
    alternatives: tuple[Json, ...] = ()
    predicted_power_w: float | None = None
    predicted_slo_margin: float | None = None
    solver: SolverReport | None = None
    parent: int | None = None  # number of the decision of the level above that set the bounds
    effects: tuple[str, ...] = field(default_factory=tuple)  # ids of the effects it caused


def canonical_json(value: Any) -> str:
    """The one byte form: sorted keys, no spaces, shortest floats; NaN is refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
