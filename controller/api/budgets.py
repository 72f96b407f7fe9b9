"""Power budgets on the wire: what is asked for, and how each budget stands."""

from __future__ import annotations

from math import isfinite

from controller.api.figures import sum_known
from controller.api.wire import timestamp
from controller.loop import budget, caps
from controller.loop.orders import CLUSTER_SCOPE, ROW_PREFIX, SetPowerBudget
from controller.loop.state import Instant, State
from dynamollm.v1 import controller_pb2 as pb


def budget_from_wire(request: pb.SetPowerBudgetRequest, state: State, wall_s: float) -> SetPowerBudget:
    """Raises ValueError with what is wrong, for people."""
    scope, rows = request.scope, state.settings.rows
    if scope != CLUSTER_SCOPE and not (scope.startswith(ROW_PREFIX) and scope.removeprefix(ROW_PREFIX) in rows):
        known = ", ".join([CLUSTER_SCOPE, *(f"{ROW_PREFIX}{name}" for name in sorted(rows))])
        raise ValueError(f"{scope!r} is no scope of budgets: there are {known}")
    if not request.who:
        raise ValueError("who asks is needed: it is kept in the history")
    if not request.HasField("watts"):
        if request.HasField("until"):
            raise ValueError("until belongs to a budget; without watts it is lifted at once")
        return SetPowerBudget(scope, None)
    if not (isfinite(request.watts) and request.watts > 0):
        raise ValueError(f"watts is {request.watts:g}: a number above 0 is needed; leave it out to lift the budget")
    until_s = round(request.until.ToNanoseconds() / 1e9, 3) if request.HasField("until") else None
    if until_s is not None and until_s <= wall_s:
        raise ValueError("until is over already")
    return SetPowerBudget(scope, round(request.watts, 3), until_s)


def budgets_to_wire(state: State, now: Instant) -> list[pb.PowerBudget]:
    gpus = caps.gpus_now(state, now.monotonic_s) if state.budgets else ()
    served = budget.served_shares(state, now) if state.budgets else {}
    messages = []
    for scope, item in sorted(state.budgets.items()):
        nodes = caps.nodes_of(state, scope)
        message = pb.PowerBudget(
            scope=scope,
            watts=item.watts,
            caps_w=sum(gpu.ceiling_w for gpu in gpus if gpu.node_id in nodes),
            hosts_w=caps.hosts_w(state, scope),
            power_w=sum_known(gpu.power_w for n in nodes & set(state.nodes) for gpu in state.nodes[n].gpus),
            reachable=scope not in state.budgets_unreachable,
            held=scope in state.budgets_held,
            served_share={pool: share["served_share"] for pool, share in served.items()},
        )
        if item.until_s is not None:
            message.until.CopyFrom(timestamp(item.until_s))
        messages.append(message)
    return messages
