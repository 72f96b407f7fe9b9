"""The emergency ladder at work (every 5 seconds, after which who serves and the clocks are chosen): one look at each
pool's queue, one stage up or down at most, each step a decision.

Orders for gateways leave with the routing table and are given anew at every tick, so they end by themselves when the
controller does. What is only to be advised on gets no order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from controller.domain.reasons import Level, Reason, Stage
from controller.fleet.port import PoolOrder, RoutedPool
from controller.loop import modes
from controller.loop.state import State, Turn
from controller.policy.emergency import (
    Ladder,
    LadderSettings,
    QueueSeen,
    expected_first_token_s,
    most_prompt_tokens,
    rejected,
    step,
)
from controller.policy.frequency import ClockSettings

_SETTINGS = LadderSettings()
_ENGINE_QUEUES = ClockSettings().waiting_high


def look(turn: Turn) -> None:
    """Moves by one stage at most the ladder of every pool that is planned, or still serves."""
    state, now_s = turn.state, turn.now.monotonic_s
    if not state.settings.knobs.emergency:
        return
    seen = _queues(state, now_s)
    routed = state.routing.pools if state.routing is not None else ()
    pools = set(state.pools) | {pool.name for pool in routed if pool.instances}
    for pool in sorted(pools):
        before = state.ladders.get(pool, Ladder())
        after = step(before, seen.get(pool), now_s, _SETTINGS)
        state.ladders[pool] = after
        if after.stage is not before.stage:
            _record(turn, pool, before, after, seen.get(pool))
    for pool in set(state.ladders) - pools:
        del state.ladders[pool]
    state.looked_s = now_s


def stage_of(state: State, pool: str) -> Stage:
    ladder = state.ladders.get(pool)
    return Stage.NONE if ladder is None else ladder.stage


def with_orders(state: State, pools: tuple[RoutedPool, ...], now_s: float) -> tuple[RoutedPool, ...]:
    """The pools of a routing table with what gateways are to do with the requests that wait for them."""
    if all(stage_of(state, pool.name) is Stage.NONE for pool in pools):
        return pools
    return tuple(_with_order(state, pool, now_s) for pool in pools)


def _with_order(state: State, pool: RoutedPool, now_s: float) -> RoutedPool:
    stage = stage_of(state, pool.name)
    if stage is Stage.NONE or not modes.may_touch(state, pool.name, ""):
        return pool
    group = state.profile.group(pool.name)
    prompt_tokens = {each.instance_id: most_prompt_tokens(state.fit, group, each.tp) for each in pool.instances}
    limits: dict[str, int] = {}
    if stage.rank >= Stage.MOVE.rank:
        # An engine that queues gets no more than it runs: what waits in the gateway can still go anywhere.
        seen = state.instances()
        for each in pool.instances:
            node_id, instance = seen[each.instance_id]
            running = instance.running
            queues = instance.waiting is not None and instance.waiting >= _ENGINE_QUEUES
            if queues and running is not None and not state.is_stale(node_id, now_s):
                limits[each.instance_id] = min(each.max_in_flight, max(1, int(running)))
    order = PoolOrder(
        stage,
        state.settings.lease_ttl_s,
        expected_first_token_s(state.fit, pool.name),
        _SETTINGS.calm_s,
        limits,
        prompt_tokens,
    )
    return replace(pool, order=order)


def _queues(state: State, now_s: float) -> Mapping[str, QueueSeen]:
    """By pool, over the gateways that have reported lately."""
    age_s = state.load.age_s(now_s)
    if age_s is None or age_s > state.settings.stale_s:
        return {}
    refused = state.load.refused(state.looked_s)
    return {
        pool: QueueSeen(queue.waiting, queue.at_risk, refused.get(pool, 0), queue.oldest_wait_s, age_s, queue.in_flight)
        for pool, queue in state.load.queues(now_s, state.settings.stale_s).items()
    }


def _record(turn: Turn, pool: str, before: Ladder, after: Ladder, seen: QueueSeen | None) -> None:
    state = turn.state
    plan = state.pools.get(pool)
    up = after.stage.rank > before.stage.rank
    if seen is None:
        why, reason = "no gateway has reported lately", Reason.NO_LOAD_DATA
    elif up:
        why = f"{seen.at_risk} requests are about to miss their deadline, {seen.waiting} wait"
        why += f", {seen.refused} were refused" if seen.refused else ""
        reason = Reason.DEADLINES_AT_RISK
    else:
        why, reason = f"no deadline has been at risk for {_SETTINGS.calm_s:g} s", Reason.DEADLINES_SAFE
    turn.decide(
        Level.INSTANCE,
        pool,
        "tick",
        reason,
        f"{pool}: emergency stage {before.stage} to {after.stage} ({_DOES[after.stage]}): {why}.",
        inputs={
            "pool": pool,
            "stage": str(before.stage),
            "stage_for_s": round(turn.now.monotonic_s - before.since_s, 3) if before.stage is not Stage.NONE else None,
            "queued": None if seen is None else seen.waiting,
            "at_risk": None if seen is None else seen.at_risk,
            "refused": None if seen is None else seen.refused,
            "in_flight": None if seen is None else seen.in_flight,
            "oldest_wait_s": None if seen is None else round(seen.oldest_wait_s, 3),
            "engines_waiting": _engines_waiting(state, pool),
            "calm_s": _SETTINGS.calm_s,
            "profile": state.profile_checksum,
        },
        outcome={"stage": str(after.stage), "does": _DOES[after.stage], "order_ttl_s": state.settings.lease_ttl_s},
        alternatives=tuple(
            {"stage": str(stage), "rejected": why} for stage, why in rejected(before.stage, after.stage).items()
        ),
        parent=plan.decided_by if plan is not None else None,
    )


def _engines_waiting(state: State, pool: str) -> float:
    return sum(seen.waiting or 0.0 for _, seen in state.instances().values() if state.pool_of(seen) == pool)


_DOES: Mapping[Stage, str] = {
    Stage.NONE: "nothing out of the ordinary",
    Stage.REORDER: "what can still meet its deadline is served first",
    Stage.FULL_CLOCK: "its instances go to full clock",
    Stage.MOVE: "its requests compete for room in larger pools, engines that queue get nothing more",
    Stage.REFUSE: "what waits past its deadline is refused",
}
