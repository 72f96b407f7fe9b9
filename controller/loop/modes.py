"""Modes of the cluster, of pools and of nodes: what the loop may touch, and what it only thinks about.

`active` acts; `advisory` decides and records as if it acted, and what is there stays what is wanted; `paused` does not
even decide. Of the modes that apply to a thing (its cluster's, its pool's, its node's) the most cautious holds.
"""

from __future__ import annotations

from dataclasses import replace

from controller.domain.layout import Layout, PlannedInstance
from controller.domain.reasons import Mode
from controller.fleet.port import (
    UP,
    ApplyCaps,
    ApplyClocks,
    ClockTarget,
    DrainInstance,
    Effect,
    InstanceState,
    PowerNode,
    PublishRouting,
    ReleaseCaps,
    ReleaseClocks,
    Solve,
)
from controller.loop.orders import CLUSTER_SCOPE, SetMode
from controller.loop.state import State, Turn


def set_mode(turn: Turn, order: SetMode) -> None:
    """From the next event on. Locks of what is no longer touched are left to their leases."""
    state = turn.state
    if order.scope == CLUSTER_SCOPE:
        state.mode = order.mode
    elif order.mode is Mode.ACTIVE:
        state.modes.pop(order.scope, None)
    else:
        state.modes[order.scope] = order.mode
    # Every clock is chosen, and recorded, anew: what was chosen may never have been applied, or has expired. Steps that
    # are under way stay known: their nodes carry them out whatever the mode, and what comes of them is to be seen.
    state.clocks.clear()


def may_touch(state: State, pool: str, node_id: str) -> bool:
    return state.mode_of(pool, node_id) is Mode.ACTIVE


def hold_untouched(state: State) -> None:
    """Makes what is there the wanted layout wherever nothing may be touched: a plan that nobody carries out would
    otherwise be under way for ever, and no later one could be compared with what really runs."""
    if state.mode is Mode.ACTIVE and not state.modes:
        return
    planned = [i for i in state.layout.instances if may_touch(state, i.pool, i.node_id)]
    names = {i.instance_id for i in planned}
    standing = [
        PlannedInstance(seen.instance_id, state.pool_of(seen), seen.model, node_id, seen.gpu_uuids)
        for node_id, seen in state.instances().values()
        if seen.state in UP and seen.instance_id not in names and not may_touch(state, state.pool_of(seen), node_id)
    ]
    layout = Layout(tuple(sorted((*planned, *standing), key=lambda i: i.instance_id)))
    if layout == state.layout:
        return
    state.layout = layout
    counts = layout.counts()
    for name, plan in list(state.pools.items()):
        state.pools[name] = replace(plan, counts={tp: n for (pool, tp), n in counts.items() if pool == name})


def allowed(state: State, effects: list[Effect]) -> list[Effect]:
    """The effects that may be begun: the last gate before the fleet. Gateways still hear what is there."""
    if state.mode is Mode.ACTIVE and not state.modes:
        return effects
    pool_of_gpu = {
        uuid: state.pool_of(seen)
        for _, seen in state.instances().values()
        if seen.state in _HOLDING
        for uuid in seen.gpu_uuids
    }
    kept: list[Effect] = []
    for effect in effects:
        match effect:
            # Caps and nodes: loop/budget.py and loop/provision.py mind the modes.
            case Solve() | PublishRouting() | ApplyCaps() | ReleaseCaps() | PowerNode():
                kept.append(effect)
            case ApplyClocks():
                targets = tuple(t for t in effect.targets if _may_lock(state, t, pool_of_gpu, effect.node_id))
                if targets:
                    kept.append(replace(effect, targets=targets))
            case ReleaseClocks():
                uuids = tuple(u for u in effect.gpu_uuids if may_touch(state, pool_of_gpu.get(u, ""), effect.node_id))
                if uuids:
                    kept.append(replace(effect, gpu_uuids=uuids))
            case _ if may_touch(state, _pool(state, effect.instance_id), effect.node_id):
                kept.append(effect)
            case _:
                state.acting.pop(effect.effect_id, None)
                if isinstance(effect, DrainInstance):
                    state.draining.discard(effect.instance_id)
    return kept


_HOLDING = UP | {InstanceState.DRAINING}


def _may_lock(state: State, target: ClockTarget, pool_of_gpu: dict[str, str], node_id: str) -> bool:
    return all(may_touch(state, pool_of_gpu.get(uuid, ""), node_id) for uuid in target.gpu_uuids)


def _pool(state: State, instance_id: str) -> str:
    seen = state.instances().get(instance_id)
    if seen is not None:
        return state.pool_of(seen[1])
    planned = state.layout.by_id().get(instance_id)
    return planned.pool if planned else ""
