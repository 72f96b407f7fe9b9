"""What planning now would decide: the next plan made on a copy of the state, so that nothing is touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from controller.domain.decision import Decision
from controller.domain.reasons import Mode
from controller.fleet.port import EffectDone, Solve
from controller.loop.core import Core, Step
from controller.loop.demand import expected_demand
from controller.loop.orders import PlanNow
from controller.loop.planning import counts_json, wanted_counts
from controller.loop.snapshot import restore, settings_of
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from controller.policy.stabilise import price
from controller.profile.table import Profile

# A cluster plan asks for a plan of each pool at most.
_MOST_SOLVES = 32


@dataclass(frozen=True, slots=True)
class Preview:
    decisions: tuple[Decision, ...]
    now: Mapping[str, int]  # instances by "pool/tpN"
    then: Mapping[str, int]
    power_now_w: float | None  # for the expected load, all GPUs counted
    power_then_w: float | None


def preview(snapshot: Callable[[], str], profile: Profile, term: int, now: Instant) -> Preview:
    """Takes some seconds: run it in a thread."""
    data = json.loads(snapshot())
    core = Core(settings_of(data), profile, term, data["expected_nodes"])
    restore(core.state, data)
    state = core.state
    # As if it might act: its effects go nowhere.
    state.mode, state.modes = Mode.ACTIVE, {}
    state.solving.clear()
    before = wanted_counts(state)
    decisions: list[Decision] = []
    solves = 0
    waiting: list[Step] = [core.order(now, PlanNow("preview"))]
    while waiting:
        step = waiting.pop(0)
        decisions += step.decisions
        for effect in step.effects:
            if isinstance(effect, Solve) and solves < _MOST_SOLVES:
                solves += 1
                solution = plan_for(effect.problem)
                done = EffectDone(effect.effect_id, solution.chosen is not None, solution=solution)
                waiting.append(core.handle(now, done))
    after = wanted_counts(state)
    return Preview(
        tuple(decisions),
        counts_json(before),
        counts_json(after),
        _power_w(core, now, before),
        _power_w(core, now, after),
    )


def _power_w(core: Core, now: Instant, counts: Mapping[tuple[str, int], int]) -> float | None:
    state = core.state
    demand = expected_demand(state, now, state.settings.cluster_s)
    if demand is None:
        return None
    pools = {pool for pool, _ in counts}
    rates = {pool: demand.pool_rps(state, pool, state.settings.quantile) / state.settings.fill for pool in pools}
    return price(state.fit, counts, rates, state.usable_gpus(now.monotonic_s)).power_w
