"""Nodes whose agents report but start nothing: no plan counts on them for a while.

A start that fails is tried again, on the same node too. After a few in a row without one that succeeded the fault is
likely the node's: a hung agent, a full disk, a configuration that no engine starts with. `answered` is called for
each answer to a start, `due` at each instance tick; between them `State.placeable_nodes` leaves the node's free GPUs
out, and what it serves it serves on.
"""

from __future__ import annotations

from controller.domain.reasons import Level, Reason
from controller.loop.state import Refusing, Turn

FAILED_STARTS = 3
"""In a row, before a node is left alone."""
MOST_S = 600.0
NEVER_S = Refusing().until_s


def answered(turn: Turn, node_id: str, ok: bool, detail: str) -> bool:
    """Notes how a start ended. True when plans must be made anew without the node."""
    state, now_s = turn.state, turn.now.monotonic_s
    if ok:
        state.refusing.pop(node_id, None)
        return False
    before = state.refusing.get(node_id, Refusing())
    failed = before.failed + 1
    if failed < FAILED_STARTS or now_s < before.until_s:
        state.refusing[node_id] = Refusing(failed, before.until_s)
        return False
    # Each time it is tried again one failure is enough, and it is left alone for longer.
    for_s = min(MOST_S, state.settings.lost_s * 2.0 ** min(10, failed - FAILED_STARTS))
    state.refusing[node_id] = Refusing(failed, now_s + for_s)
    turn.decide(
        Level.CLUSTER,
        "cluster",
        "node_refuses",
        Reason.NODE_REFUSES,
        f"{node_id} starts nothing ({failed} starts failed in a row, the last: {detail or 'no answer'}): "
        f"nothing new is placed there for {for_s:.0f} s.",
        inputs={"node": node_id, "failed": failed, "for_s": for_s},
        outcome={"accepted": True},
    )
    return True


def due(turn: Turn) -> bool:
    """Whether a node may be tried again from now on: plans are made anew with it."""
    state, now_s = turn.state, turn.now.monotonic_s
    over = [node_id for node_id, node in state.refusing.items() if NEVER_S < node.until_s <= now_s]
    for node_id in over:
        state.refusing[node_id] = Refusing(state.refusing[node_id].failed)
    return bool(over)
