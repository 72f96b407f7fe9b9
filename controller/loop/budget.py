"""Power budgets at work: takes the order, moves the caps, records what it costs, and ends the budget in time.

Called by the core with every order, at every instance tick and when an agent has answered. The caps guard a breaker:
they stay when this controller is gone, and only a controller that knows that a budget has ended takes them away. So an
end that nobody was there to see is made up for at the next start; until then the caps stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import inf

from controller.domain.decision import Json
from controller.domain.reasons import Level, Mode, Reason
from controller.fleet.port import ApplyCaps, CapTarget, EffectDone, ReleaseCaps
from controller.loop import caps
from controller.loop.demand import expected_demand
from controller.loop.orders import CLUSTER_SCOPE, SetPowerBudget
from controller.loop.planning import wanted_counts
from controller.loop.state import Budget, CapCall, HeldCap, Instant, PendingSolve, State, Turn
from controller.policy.budget import TOLERANCE_W, Allocation, GpuPower, NodesBudget, allocate, largest_share, next_caps
from controller.policy.milp.problem import PlanProblem, PlanSolution
from controller.policy.stabilise import Verdict, price

# A layout must serve so much more of the load within a budget to be switched to for that alone.
_WORTH_SWITCHING = 0.02
# An agent that has not answered in so many instance periods never will: the core forgets the call.
_FORGET_PERIODS = 4


def set_budget(turn: Turn, order: SetPowerBudget) -> bool:
    """Takes an order, also one from before a restart. True when plans must follow."""
    state = turn.state
    over = order.until_s is not None and order.until_s <= turn.now.wall_s
    if order.watts is None or over:
        return _end(turn, order.scope, "its time is over" if over and order.watts is not None else "lifted")
    budget = Budget(order.watts, order.until_s)
    if state.budgets.get(order.scope) == budget:
        return False
    state.budgets[order.scope] = budget
    state.budgets_held.discard(order.scope)
    state.budget_version += 1
    if state.mode is Mode.PAUSED or not state.may_act(turn.now.monotonic_s):
        return False  # the first tick with all nodes in sight does the rest
    _record_set(turn, order.scope, "order")
    move(turn)
    return True


def tick(turn: Turn) -> bool:
    """Ends what is over and asks for the caps that are due. True when plans must follow."""
    state, now = turn.state, turn.now
    ended = [s for s, b in sorted(state.budgets.items()) if b.until_s is not None and b.until_s <= now.wall_s]
    for scope in ended:
        _end(turn, scope, "its time is over")
    new = sorted(set(state.budgets) - state.budgets_known)
    for scope in new:
        _record_set(turn, scope, "start")
    move(turn)
    return bool(ended or new)


def done(turn: Turn, answer: EffectDone) -> None:
    """An agent has answered a call about caps."""
    state = turn.state
    call = state.capping.pop(answer.effect_id, None)
    if call is None:
        return
    if call.release and answer.ok:
        state.uncapping.discard(call.node_id)
        for uuid, found_w in call.limits_w.items():
            # Whatever was found before: what that is the node's next sample shows.
            state.caps[uuid] = HeldCap(None, found_w, turn.now.monotonic_s)
    elif answer.ok:
        for uuid, watts in call.limits_w.items():
            held = state.caps.get(uuid)
            if held is not None:
                state.caps[uuid] = HeldCap(held.limit_w, watts, turn.now.monotonic_s)
    else:
        for uuid in call.limits_w:
            if uuid in state.caps:
                state.caps[uuid].failed_at_s = turn.now.monotonic_s
    if state.budgets and answer.ok and not state.capping:
        move(turn)  # what waited for room may have it now


def move(turn: Turn) -> None:
    """Asks for every cap that may move now, and takes away those that no budget needs any more."""
    state, now_s = turn.state, turn.now.monotonic_s
    if not state.budgets and not state.caps and not state.uncapping:
        return
    for effect_id, call in list(state.capping.items()):
        if now_s - call.at_s > _FORGET_PERIODS * state.settings.instance_s:
            del state.capping[effect_id]
    _settle(state)
    busy = {call.node_id for call in state.capping.values()}
    budgets = caps.budgets_now(state)
    covered = frozenset[str]().union(*(budget.nodes for budget in budgets))
    gpus = caps.gpus_now(state, now_s)
    wanted = allocate(gpus, budgets)
    limits = dict(wanted.caps_w)
    _lower_sick(state, gpus, covered, limits)
    nodes_of = {gpu.uuid: gpu.node_id for gpu in gpus}
    for gpu in gpus:
        if gpu.uuid in limits:
            held = state.caps.setdefault(gpu.uuid, HeldCap())
            held.limit_w = min(limits[gpu.uuid], max(gpu.ceiling_w, gpu.min_w))
    state.uncapping |= {nodes_of[u] for u, cap in state.caps.items() if cap.limit_w and u in nodes_of} - covered
    by_node: dict[str, dict[str, float]] = {}
    for uuid, watts in next_caps(_all_steerable(gpus, limits), budgets, limits).items():
        if nodes_of[uuid] not in busy:
            by_node.setdefault(nodes_of[uuid], {})[uuid] = watts
    well = {gpu.uuid for gpu in gpus if gpu.steerable}
    for node_id, asked in sorted(by_node.items()):
        # A GPU that does not answer must not leave its neighbours unconfirmed.
        for group in ({u: w for u, w in asked.items() if u in well}, {u: w for u, w in asked.items() if u not in well}):
            if group:
                _ask(turn, node_id, group)
    for node_id in sorted(state.uncapping - covered - busy):
        _release(turn, node_id)
    state.uncapping -= covered
    _note_held(turn, gpus, budgets, wanted)


def _settle(state: State) -> None:
    """A call that failed was carried out or not: what the node shows some time later is the truth of it. And a GPU that
    was released is forgotten once its node has shown what came of that."""
    for node in state.nodes.values():
        for gpu in node.gpus:
            held = state.caps.get(gpu.uuid)
            if held is None:
                continue
            if held.limit_w is None and not held.asked_w and node.observed_at_s > held.held_at_s:
                del state.caps[gpu.uuid]
            elif gpu.limit_w is not None and node.observed_at_s > held.failed_at_s + state.settings.rpc_deadline_s:
                state.caps[gpu.uuid] = HeldCap(held.limit_w)


def _lower_sick(state: State, gpus: tuple[GpuPower, ...], covered: frozenset[str], limits: dict[str, float]) -> None:
    """GPUs of a node that is out of service, or that do not answer well: to the lowest cap, if they take it."""
    sick = {gpu.uuid for node_id in covered & set(state.nodes) for gpu in state.nodes[node_id].gpus if not gpu.healthy}
    for gpu in gpus:
        if gpu.uuid in sick and gpu.uuid not in limits and state.mode_of("", gpu.node_id) is Mode.ACTIVE:
            limits[gpu.uuid] = gpu.min_w


def _all_steerable(gpus: tuple[GpuPower, ...], limits: Mapping[str, float]) -> list[GpuPower]:
    return [
        gpu if gpu.steerable == (gpu.uuid in limits) else replace(gpu, steerable=gpu.uuid in limits) for gpu in gpus
    ]


def _ask(turn: Turn, node_id: str, asked: Mapping[str, float]) -> None:
    state = turn.state
    by_watts: dict[float, list[str]] = {}
    for uuid, watts in sorted(asked.items()):
        by_watts.setdefault(watts, []).append(uuid)
        held = state.caps.setdefault(uuid, HeldCap())
        held.asked_w, held.asked_least_w = max(held.asked_w, watts), min(held.asked_least_w, watts)
        held.failed_at_s = inf
    effect_id = turn.effect_id()
    state.capping[effect_id] = CapCall(node_id, dict(asked), turn.now.monotonic_s)
    targets = tuple(CapTarget(tuple(uuids), watts) for watts, uuids in sorted(by_watts.items()))
    scopes = ", ".join(sorted(state.budgets))
    turn.effects.append(ApplyCaps(effect_id, node_id, targets, state.settings.lease_ttl_s, f"power budget of {scopes}"))


def _release(turn: Turn, node_id: str) -> None:
    state, now_s = turn.state, turn.now.monotonic_s
    node = state.nodes.get(node_id)
    if node is None or state.is_stale(node_id, now_s) or state.mode_of("", node_id) is not Mode.ACTIVE:
        return  # its caps stand until it can be told
    effect_id = turn.effect_id()
    most_w = {gpu.uuid: (gpu.limits_w or state.settings.cap_range_w)[1] for gpu in node.gpus}
    for uuid, watts in most_w.items():
        held = state.caps.setdefault(uuid, HeldCap())
        held.asked_w, held.failed_at_s = max(held.asked_w, watts), inf
    state.capping[effect_id] = CapCall(node_id, most_w, now_s, release=True)
    turn.effects.append(ReleaseCaps(effect_id, node_id, tuple(most_w), "no power budget any more"))


def _end(turn: Turn, scope: str, why: str) -> bool:
    state = turn.state
    budget = state.budgets.pop(scope, None)
    state.budgets_held.discard(scope)
    state.budgets_known.discard(scope)
    state.budgets_unreachable.discard(scope)
    state.uncapping |= caps.nodes_of(state, scope)
    if budget is None:
        return False  # it ended before this controller began: caps that still stand are taken away, no plan knows of it
    state.budget_version += 1
    turn.decide(
        Level.CLUSTER,
        CLUSTER_SCOPE,
        "budget",
        Reason.BUDGET_ENDED,
        f"The budget of {budget.watts:.0f} W for {scope} has ended: {why}. The limits found before it come back.",
        inputs={"budget": _budget_json(scope, budget)},
        outcome={"released_nodes": sorted(state.uncapping)},
    )
    return True


# ------------------------------------------------------------------------------------------------- what it costs


def served_shares(state: State, now: Instant) -> dict[str, Json]:
    """Of each pool's expected load, what its instances carry in SLO within their caps."""
    demand = expected_demand(state, now, state.settings.pool_s) if state.pools else None
    found: dict[str, Json] = {}
    wanted = state.layout.by_id()
    for pool, plan in sorted(state.pools.items()):
        rate = demand.pool_rps(state, pool, state.settings.quantile) if demand is not None else plan.demand_rps
        carried = sum(
            caps.fit_of(state, seen).max_rate_rps(pool, seen.tp)
            for _, seen in state.instances().values()
            if state.pool_of(seen) == pool and seen.instance_id in wanted
        )
        share = min(1.0, carried / rate) if rate > 0 else 1.0
        found[pool] = {
            "expected_rps": round(rate, 6),
            "carried_rps": round(carried, 6),
            "served_share": round(share, 6),
        }
    return found


def _record_set(turn: Turn, scope: str, trigger: str) -> None:
    """The decision on a budget: how its watts are shared out, and what that costs in SLO with the layout there is."""
    state, now = turn.state, turn.now
    budget = state.budgets[scope]
    state.budgets_known.add(scope)
    gpus, budgets = caps.gpus_now(state, now.monotonic_s), caps.budgets_now(state)
    wanted = allocate(gpus, budgets)
    for gpu in gpus:
        if gpu.uuid in wanted.caps_w:
            state.caps.setdefault(gpu.uuid, HeldCap()).limit_w = wanted.caps_w[gpu.uuid]
    mine = next(b for b in budgets if b.scope == scope)
    members = [gpu for gpu in gpus if gpu.node_id in mine.nodes]
    reachable = scope not in wanted.unreachable
    served = served_shares(state, now)
    worst = min((item["served_share"] for item in served.values()), default=1.0)
    kept_w = sum(gpu.ceiling_w for gpu in members if not gpu.steerable)
    lowest_w = sum(gpu.min_w for gpu in members if gpu.steerable) + kept_w
    caps_total_w = sum(wanted.caps_w.get(gpu.uuid, gpu.ceiling_w) for gpu in members)
    if reachable:
        state.budgets_unreachable.discard(scope)
        text = f"caps add up to {caps_total_w:.0f} W, {worst:.0%} of the expected load can be served in SLO"
    else:
        state.budgets_unreachable.add(scope)
        text = f"the lowest caps of its GPUs add up to {lowest_w:.0f} W: every cap goes to its minimum"
    silent = sorted({gpu.node_id for gpu in members if not gpu.steerable})
    if silent:
        text += f"; {kept_w:.0f} W are kept for {', '.join(silent[:4])}, which cannot be told"
    power_w = _predicted_w(state, now)
    turn.decide(
        Level.CLUSTER,
        CLUSTER_SCOPE,
        "budget" if trigger == "order" else trigger,
        Reason.POWER_BUDGET if reachable else Reason.BUDGET_UNREACHABLE,
        f"Budget of {budget.watts:.0f} W for {scope}: {text}.",
        inputs={
            "budget": _budget_json(scope, budget),
            "gpus": len(members),
            "hosts_w": round(caps.hosts_w(state, scope), 3),
            "lowest_w": round(lowest_w, 3),
            "kept_w": round(kept_w, 3),
            "silent_nodes": silent,
            "profile": state.profile_checksum,
        },
        outcome={
            "reachable": reachable,
            "caps_w": _caps_json(wanted, members),
            "caps_total_w": round(caps_total_w, 3),
            "slo": served,
        },
        predicted_power_w=None if power_w is None else min(power_w, caps_total_w),
        predicted_slo_margin=_margin(served),
    )


def _margin(served: Mapping[str, Json]) -> float | None:
    ratios = [
        item["expected_rps"] / item["carried_rps"]
        for item in served.values()
        if item["carried_rps"] > 0 and item["expected_rps"] > 0
    ]
    return 1.0 - max(ratios) if ratios else None


def _predicted_w(state: State, now: Instant) -> float | None:
    """Of the layout as it stands, under what it was planned for and within the caps."""
    if not state.pools:
        return None
    counts, gpus = wanted_counts(state), state.usable_gpus(now.monotonic_s)
    used = sum(tp * n for (_, tp), n in counts.items())
    watts = max(0, gpus - used) * state.profile.parked_w
    for pool, plan in sorted(state.pools.items()):
        mine = {key: n for key, n in counts.items() if key[0] == pool}
        size = sum(tp * n for (_, tp), n in mine.items())
        watts += price(caps.fit_of_pool(state, pool), mine, {pool: plan.demand_rps}, size).power_w
    return watts


def _budget_json(scope: str, budget: Budget) -> Json:
    return {"scope": scope, "watts": budget.watts, "until_s": budget.until_s}


def _caps_json(wanted: Allocation, members: list[GpuPower]) -> Json:
    """How many GPUs of each node at how many watts."""
    by_node: dict[str, Counter[float]] = {}
    for gpu in members:
        if gpu.uuid in wanted.caps_w:
            by_node.setdefault(gpu.node_id, Counter())[wanted.caps_w[gpu.uuid]] += 1
    return {node: {f"{watts:g}": n for watts, n in sorted(counts.items())} for node, counts in sorted(by_node.items())}


def _note_held(turn: Turn, gpus: tuple[GpuPower, ...], budgets: tuple[NodesBudget, ...], wanted: Allocation) -> None:
    """Says once when every cap of a budget is confirmed, and when one that could be kept no longer can."""
    state = turn.state
    for budget in budgets:
        scope = budget.scope
        ceiling_w = sum(gpu.ceiling_w for gpu in gpus if gpu.node_id in budget.nodes)
        lost = scope in wanted.unreachable
        if lost != (scope in state.budgets_unreachable) and scope in state.budgets_known:
            _record_set(turn, scope, "capacity")
        if ceiling_w <= budget.watts + TOLERANCE_W and scope not in state.budgets_held:
            state.budgets_held.add(scope)
            turn.decide(
                Level.CLUSTER,
                CLUSTER_SCOPE,
                "caps",
                Reason.BUDGET_HELD,
                f"The budget of {state.budgets[scope].watts:.0f} W for {scope} is held: "
                f"caps add up to {ceiling_w:.0f} W.",
                inputs={"budget": _budget_json(scope, state.budgets[scope])},
                outcome={"caps_total_w": round(ceiling_w, 3)},
            )
        elif ceiling_w > budget.watts + TOLERANCE_W:
            state.budgets_held.discard(scope)


# ------------------------------------------------------------------------------------------------------- plans


def is_outdated(state: State, pending: PendingSolve) -> bool:
    """True for a plan that was asked for under other budgets."""
    return pending.budget_version != state.budget_version


def served_json(problem: PlanProblem, solution: PlanSolution) -> Json:
    """What a plan serves of the expected load, for the record; nothing to say where it serves all without a budget."""
    if problem.budget_w is None:
        if not solution.is_short:
            return {}
        return {"served_share": round(solution.served_share, 6), "reserve_share": round(solution.reserve_share, 6)}
    share = solution.served_share if solution.chosen is not None else 0.0
    return {"served_share": round(share, 6), "budget_w": round(problem.budget_w, 3)}


def judge(
    state: State,
    problem: PlanProblem,
    solution: PlanSolution,
    present: Mapping[tuple[str, int], int],
    demand_rps: Mapping[str, float],
) -> Verdict | None:
    """What a budget has to say on a plan: None where it does not bind, and saving energy is all there is to judge."""
    if problem.budget_w is None:
        return None
    here = largest_share(caps.shares_w(state.fit, present, demand_rps, problem), problem.budget_w)
    there = solution.served_share if solution.chosen is not None else 0.0
    if here >= 1.0 - 1e-9:
        return None
    watts = f"Within {problem.budget_w:.0f} W"
    if there > here + _WORTH_SWITCHING:
        text = f"{watts} it serves {there:.0%} of the expected load in SLO, the present layout {here:.0%}."
        return Verdict(True, Reason.POWER_BUDGET, text, 0.0, 0.0)
    return Verdict(
        False, Reason.POWER_BUDGET, f"{watts} {here:.0%} of the expected load are served, and no plan more.", 0.0, 0.0
    )
