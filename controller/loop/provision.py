"""The provisioner at work: whole nodes off when they are empty and not needed, on again ahead of need.

Called by the core at every instance tick and with every observation of a node that is not simply on. A node that was
turned off is off, not lost: nothing is planned on it, nothing alarms, and a budget counts it with nothing. What takes
it off and on is a hook outside (fleet/provisioner.py); how long that takes is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from controller.domain.reasons import Level, Mode, Reason, Stage
from controller.fleet.port import HOLDS_GPUS, EffectDone, NodeObservation, PowerNode
from controller.loop import emergency
from controller.loop.demand import Demand, expected_demand, needed_gpus
from controller.loop.orders import CLUSTER_SCOPE, NODE_PREFIX, NotePower
from controller.loop.state import PoweredNode, State, Turn
from controller.policy.provision import (
    Change,
    NodePower,
    NodeSeen,
    ProvisionSettings,
    changes,
    pay_back_s,
    retry_after_s,
)

# As many of the last durations are kept; the longest of them is reckoned with.
_MEASURED = 5


def note_power(turn: Turn, order: NotePower) -> None:
    """What an earlier controller left off; also where this one has no hook any more."""
    turn.state.powered[order.node_id] = PoweredNode(NodePower.OFF, turn.now.monotonic_s)


def tick(turn: Turn) -> None:
    """Gives up what takes too long, then turns on or off what is due."""
    state, settings = turn.state, turn.state.settings.provision
    if settings is None:
        return
    _give_up(turn, settings)
    _note_empty(state, turn.now.monotonic_s)
    wanted = _wanted(turn, settings)
    if wanted is None:
        return
    state.waking &= {change.node_id for change in wanted if change.on}
    if state.mode is not Mode.ACTIVE:
        advice = tuple((change.node_id, change.on) for change in wanted)
        if advice != state.power_advice:
            state.power_advice = advice
            for change in wanted:
                _record(turn, change, settings)
        return
    for change in wanted:
        if change.on and not _budget_has_room(state, change.node_id):
            continue
        _record(turn, change, settings)
        _send(turn, change)


def seen(turn: Turn, node: NodeObservation) -> bool | None:
    """Takes note of a node's sample: True when it has come back, and plans may count on it; None for one that is on its
    way down, of which nothing counts any more."""
    state, now_s = turn.state, turn.now.monotonic_s
    powered = state.powered.get(node.node_id)
    if powered is None or powered.power is NodePower.ON:
        return False
    if powered.power is NodePower.BOOTING:
        _measure(state.boot_s, now_s - powered.since_s)
    elif powered.power is NodePower.STOPPING or now_s - powered.since_s < state.settings.stale_s:
        return None
    # Where nobody here turned it on, somebody else did: that is respected.
    state.powered[node.node_id] = PoweredNode(NodePower.ON, now_s)
    for gpu in node.gpus:
        state.caps.pop(gpu.uuid, None)  # a boot has undone them, or the agent has written them again
    return True


def done(turn: Turn, answer: EffectDone) -> None:
    """The hook has ended."""
    state, now_s = turn.state, turn.now.monotonic_s
    for node_id, powered in state.powered.items():
        if powered.effect_id != answer.effect_id:
            continue
        powered.effect_id = ""
        if not answer.ok:
            _failed(turn, node_id, powered, f"the hook failed: {answer.detail}")
        elif powered.power is NodePower.STOPPING:
            _measure(state.off_s, now_s - powered.since_s)
            powered.power, powered.since_s, powered.failures = NodePower.OFF, now_s, 0
            state.nodes.pop(node_id, None)
            state.empty_since_s.pop(node_id, None)
        return


# ------------------------------------------------------------------------------------------------------ what is due


def _wanted(turn: Turn, settings: ProvisionSettings) -> tuple[Change, ...] | None:
    """None where it is not looked at now."""
    state, now = turn.state, turn.now
    if not state.pools:
        return None
    unserved = _unserved(state)
    due = now.monotonic_s - state.provisioned_s >= state.settings.pool_s or bool(state.waking)
    if not due and not unserved:
        return None
    boot_s = max(state.boot_s, default=settings.boot_s)
    demand = expected_demand(state, now, state.settings.pool_s + boot_s)
    if demand is None:
        return None  # nothing is turned off on silence, and what is on may hold
    state.provisioned_s = now.monotonic_s
    return changes(
        nodes_seen(state, now.monotonic_s),
        _needed(turn, demand),
        unserved,
        _pay_back_s(state, settings),
        settings,
    )


def nodes_seen(state: State, now_s: float) -> tuple[NodeSeen, ...]:
    found = []
    for node_id in sorted(set(state.nodes) | set(state.powered)):
        powered = state.powered.get(node_id, PoweredNode(NodePower.ON, state.first_event_s or 0.0))
        node = state.nodes.get(node_id)
        if powered.power is NodePower.ON and (node is None or state.is_stale(node_id, now_s)):
            continue  # nobody knows what it does
        empty_s = state.empty_since_s.get(node_id)
        found.append(
            NodeSeen(
                node_id,
                powered.power,
                len(node.gpus) if node else state.settings.gpus_per_node,
                now_s - powered.since_s,
                None if empty_s is None else now_s - empty_s,
                free=now_s >= powered.retry_at_s and f"{NODE_PREFIX}{node_id}" not in state.modes,
            )
        )
    return tuple(found)


def _note_empty(state: State, now_s: float) -> None:
    """Since when each node holds nothing, is planned for nothing, and has nothing under way."""
    busy = {planned.node_id for planned in state.layout.instances} | {step.node_id for step in state.acting.values()}
    for node in state.nodes.values():
        held = any(instance.state in HOLDS_GPUS for instance in node.instances)
        if held or node.held_gpus or node.node_id in busy:
            state.empty_since_s.pop(node.node_id, None)
        else:
            state.empty_since_s.setdefault(node.node_id, now_s)


def _needed(turn: Turn, demand: Demand) -> int:
    """GPUs that run or are planned, or that the forecast asks for, whichever is more; and those in use by hand."""
    state = turn.state
    held = sum(instance.tp for _, instance in state.instances().values() if instance.state in HOLDS_GPUS)
    planned = sum(planned.tp for planned in state.layout.instances)
    by_hand = sum(len(node.held_gpus) for node in state.nodes.values())
    return by_hand + max(held, planned, ceil(needed_gpus(state, turn.now, demand, sorted(state.pools))))


def _unserved(state: State) -> bool:
    return any(
        not plan.carries or emergency.stage_of(state, pool).rank >= Stage.MOVE.rank
        for pool, plan in state.pools.items()
    )


def _pay_back_s(state: State, settings: ProvisionSettings) -> float:
    empty_w = state.settings.host_w + state.settings.gpus_per_node * state.profile.parked_w
    boot_s, off_s = max(state.boot_s, default=settings.boot_s), max(state.off_s, default=settings.off_s)
    return pay_back_s(empty_w, settings.boot_w, boot_s, off_s)


def _budget_has_room(state: State, node_id: str) -> bool:
    """A node that boots counts in its budgets with all that it may draw: room is made for it first."""
    covered = [scope for scope in state.budgets if _covers(state, scope, node_id)]
    if not covered:
        return True
    if node_id not in state.waking:
        state.waking.add(node_id)  # from now on it counts (loop/caps.py), so the caps of others go down
        return False
    return all(scope in state.budgets_held for scope in covered)


def _covers(state: State, scope: str, node_id: str) -> bool:
    return scope == CLUSTER_SCOPE or node_id in state.settings.rows.get(scope.partition(":")[2], ())


# ------------------------------------------------------------------------------------------------------- what is done


def _send(turn: Turn, change: Change) -> None:
    state = turn.state
    effect_id = turn.effect_id()
    before = state.powered.get(change.node_id)
    state.powered[change.node_id] = PoweredNode(
        NodePower.BOOTING if change.on else NodePower.STOPPING,
        turn.now.monotonic_s,
        failures=before.failures if before else 0,
        effect_id=effect_id,
    )
    state.waking.discard(change.node_id)
    turn.effects.append(PowerNode(effect_id, change.node_id, change.on, change.why))


def _give_up(turn: Turn, settings: ProvisionSettings) -> None:
    """A boot that never ends, a hook that never answers, and a node that was turned off and still reports."""
    state, now_s = turn.state, turn.now.monotonic_s
    for node_id, powered in sorted(state.powered.items()):
        for_s = now_s - powered.since_s
        if powered.power in (NodePower.BOOTING, NodePower.STOPPING) and for_s > settings.give_up_s:
            powered.effect_id = ""
            _failed(turn, node_id, powered, f"nothing came of it in {for_s:.0f} s")


def _failed(turn: Turn, node_id: str, powered: PoweredNode, why: str) -> None:
    """Reported, and tried again later; a node that did not go off is on, one that did not come is off."""
    state, now_s = turn.state, turn.now.monotonic_s
    settings = state.settings.provision or ProvisionSettings()
    wanted_on = powered.power is NodePower.BOOTING
    powered.power = NodePower.OFF if wanted_on else NodePower.ON
    powered.since_s = now_s
    powered.failures += 1
    powered.retry_at_s = now_s + retry_after_s(powered.failures, settings)
    turn.decide(
        Level.CLUSTER,
        CLUSTER_SCOPE,
        "node_power",
        Reason.NODE_HOOK_FAILED,
        f"{node_id} could not be turned {'on' if wanted_on else 'off'}: {why}. "
        f"It is left alone for {powered.retry_at_s - now_s:.0f} s.",
        inputs={"node": node_id, "on": wanted_on, "failures": powered.failures},
        outcome={"retry_s": round(powered.retry_at_s - now_s, 3)},
    )


def _record(turn: Turn, change: Change, settings: ProvisionSettings) -> None:
    state, now = turn.state, turn.now
    counts: Mapping[str, int] = {
        power.value: sum(1 for node in nodes_seen(state, now.monotonic_s) if node.power is power) for power in NodePower
    }
    turn.decide(
        Level.CLUSTER,
        CLUSTER_SCOPE,
        "node_power",
        Reason.NODE_ON if change.on else Reason.NODE_OFF,
        f"{change.node_id} is turned {'on' if change.on else 'off'}: {change.why}.",
        inputs={
            "node": change.node_id,
            "nodes": dict(counts),
            "boot_s": round(max(state.boot_s, default=settings.boot_s), 3),
            "off_s": round(max(state.off_s, default=settings.off_s), 3),
            "pay_back_s": round(_pay_back_s(state, settings), 3),
            "spare_nodes": settings.spare_nodes,
        },
        outcome={"node": change.node_id, "on": change.on},
    )


def _measure(kept: list[float], seconds: float) -> None:
    kept.append(round(seconds, 3))
    del kept[:-_MEASURED]
