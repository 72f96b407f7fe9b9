"""The guard's two rules as values and pure functions: when an engine is in trouble, and which caps an emergency sets.

control/guard.py looks and acts; here is only what follows from what was seen. Both rules move in one direction: to
full clocks, and to lower power.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nodeagent.engine.vllm import EngineReading, Histogram

VERSION = 1
WINDOW_S = 10.0
"""Percentiles are taken over the requests of the last ten seconds."""
MIN_EVENTS = 10
"""Fewer values say nothing of a percentile; a stall with none shows in the queue."""


@dataclass(frozen=True, slots=True)
class SloBoost:
    """Releases the clocks of an engine in trouble. A bound that is None is not looked at."""

    enabled: bool = False
    max_waiting: float | None = None
    max_ttft_p99_ms: float | None = None
    max_token_gap_p99_ms: float | None = None
    hold_s: float = 30.0


@dataclass(frozen=True, slots=True)
class WattsFloor:
    """Emergency caps; once tripped they stay until they are lifted."""

    enabled: bool = False
    limit_w: float = 0.0
    limit_w_by_gpu: Mapping[str, float] = field(default_factory=dict)
    heartbeat_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GuardState:
    """What must survive the agent."""

    slo_boost: SloBoost = SloBoost()
    watts_floor: WattsFloor = WattsFloor()
    tripped: bool = False
    last_act: str = ""
    last_act_wall_s: float = 0.0


def check_rules(boost: SloBoost, floor: WattsFloor) -> str:
    """Empty when the rules make sense, else one sentence."""
    bounds = {
        "slo_boost.max_waiting": boost.max_waiting,
        "slo_boost.max_ttft_p99_ms": boost.max_ttft_p99_ms,
        "slo_boost.max_token_gap_p99_ms": boost.max_token_gap_p99_ms,
    }
    for name, bound in bounds.items():
        if bound is not None and (not math.isfinite(bound) or bound < 0):
            return f"{name} is {bound:g}; it must be a number of 0 or more"
    if boost.enabled and all(bound is None for bound in bounds.values()):
        return "slo_boost has no bound; set max_waiting, max_ttft_p99_ms or max_token_gap_p99_ms"
    if boost.enabled and not (math.isfinite(boost.hold_s) and 0 < boost.hold_s <= 3600):
        return f"slo_boost.hold_s is {boost.hold_s:g}; it must be above 0 and at most 3600"
    if not math.isfinite(floor.heartbeat_age_s) or floor.heartbeat_age_s < 0:
        return f"watts_floor.heartbeat_age_s is {floor.heartbeat_age_s:g}; it must be 0 (off) or more"
    limits = {"watts_floor.limit_w": floor.limit_w} if floor.enabled else {}
    limits |= {f"watts_floor.limit_w_by_gpu[{uuid}]": watts for uuid, watts in floor.limit_w_by_gpu.items()}
    for name, watts in limits.items():
        if not math.isfinite(watts) or watts <= 0:
            return f"{name} is {watts:g}; it must be a power in watts"
    return ""


def trouble(rule: SloBoost, earlier: EngineReading | None, now: EngineReading) -> str:
    """Which bound an engine is over, as one phrase; empty when it is within all. `earlier` opens the window."""
    if not rule.enabled:
        return ""
    if rule.max_waiting is not None and now.waiting > rule.max_waiting:
        return f"{now.waiting:g} requests wait, over {rule.max_waiting:g}"
    for name, bound_ms, newer, older in (
        ("TTFT", rule.max_ttft_p99_ms, now.ttft_seconds, earlier.ttft_seconds if earlier else None),
        ("token gap", rule.max_token_gap_p99_ms, now.token_gap_seconds, earlier.token_gap_seconds if earlier else None),
    ):
        if bound_ms is None or newer is None or older is None:
            continue
        p99_s = quantile_s(older, newer, 0.99)
        if p99_s is not None and p99_s * 1000 > bound_ms:
            shown = f"{p99_s * 1000:.0f} ms" if math.isfinite(p99_s) else "beyond the last bucket"
            return f"{name} P99 is {shown}, over {bound_ms:g} ms"
    return ""


def quantile_s(older: Histogram, newer: Histogram, share: float) -> float | None:
    """A quantile of what came between two readings of one histogram; None for too few values or a reset.

    Linear within a bucket; infinite in the last one, which has no bound.
    """
    if older.bounds != newer.bounds:
        return None
    counts = [after - before for before, after in zip(older.counts, newer.counts, strict=True)]
    if min(counts) < 0 or counts[-1] < MIN_EVENTS:
        return None
    rank = share * counts[-1]
    index = bisect.bisect_left(counts, rank)
    if index >= len(newer.bounds):
        return math.inf
    lower_s = newer.bounds[index - 1] if index else 0.0
    below = counts[index - 1] if index else 0
    within = counts[index] - below
    return lower_s + (newer.bounds[index] - lower_s) * ((rank - below) / within if within else 1.0)


def cap_w(rule: WattsFloor, uuid: str) -> float:
    """The emergency cap of one GPU."""
    return rule.limit_w_by_gpu.get(uuid, rule.limit_w)


def dump(state: GuardState) -> bytes:
    """The file's bytes."""
    return json.dumps({"version": VERSION, **asdict(state)}, indent=1).encode()


def load(path: Path) -> GuardState:
    """The state on file, the defaults where there is none. Raises ValueError for anything else."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return GuardState()
    try:
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r}")
        state = GuardState(
            SloBoost(**data["slo_boost"]),
            WattsFloor(**data["watts_floor"]),
            bool(data["tripped"]),
            str(data["last_act"]),
            float(data["last_act_wall_s"]),
        )
        problem = check_rules(state.slo_boost, state.watts_floor)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a guard file: {error!r}") from None
    if problem:
        raise ValueError(problem)
    return state
