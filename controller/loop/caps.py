"""What the loop knows of the GPUs' power caps: what a budget covers, what each cap may be just now, and what plans and
clock choices may count on.

Between the state and the pure policy (policy/budget.py); loop/budget.py takes the orders and moves the caps. Without a
budget everything here is as if there were no caps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from controller.domain.reasons import Mode
from controller.fleet.port import HOLDS_GPUS, GpuObservation, InstanceObservation, NodeObservation
from controller.loop.orders import ROW_PREFIX
from controller.loop.state import State
from controller.policy.budget import GpuPower, NodesBudget, room_w
from controller.policy.frequency import ClockAsk, ClockChoice, ClockSettings, choose_clocks
from controller.policy.idle import power_at
from controller.policy.milp.problem import PlanProblem
from controller.policy.provision import NodePower
from controller.profile.fit import ProfileFit

# ------------------------------------------------------------------------------------------------- what there is


def nodes_of(state: State, scope: str) -> frozenset[str]:
    """The nodes of a scope, those too that were never seen."""
    if scope.startswith(ROW_PREFIX):
        return frozenset(state.settings.rows.get(scope.removeprefix(ROW_PREFIX), ()))
    return frozenset(state.nodes).union(state.settings.node_ids, state.powered)


def is_off(state: State, node_id: str) -> bool:
    """True for a node that draws nothing, and will not before room was made for it."""
    powered = state.powered.get(node_id)
    return powered is not None and powered.power is NodePower.OFF and node_id not in state.waking


def budgets_now(state: State) -> tuple[NodesBudget, ...]:
    """Budgets of GPUs: what hosts are taken to draw beside them is gone already."""
    return tuple(
        NodesBudget(scope, budget.watts - hosts_w(state, scope), nodes_of(state, scope))
        for scope, budget in sorted(state.budgets.items())
    )


def hosts_w(state: State, scope: str) -> float:
    return state.settings.host_w * sum(not is_off(state, node_id) for node_id in nodes_of(state, scope))


def gpus_now(state: State, now_s: float) -> tuple[GpuPower, ...]:
    """Every GPU that a budget may cover. One of a node that was never seen counts with all that it may draw."""
    settings, gpus = state.settings, list[GpuPower]()
    needs: dict[tuple[str, int], float] = {}
    for node in sorted(state.nodes.values(), key=lambda node: node.node_id):
        holders = {u: i for i in node.instances if i.state in HOLDS_GPUS for u in i.gpu_uuids}
        fresh = not state.is_stale(node.node_id, now_s)
        free: dict[str, bool] = {}  # by pool: whether it may be touched here
        for gpu in node.gpus:
            instance = holders.get(gpu.uuid)
            low_w, high_w = gpu.limits_w or settings.cap_range_w
            pool = state.pool_of(instance) if instance else ""
            if pool not in free:
                free[pool] = fresh and state.mode_of(pool, node.node_id) is Mode.ACTIVE
            # What an operator's instance needs is not known.
            need_w = high_w if gpu.uuid in node.held_gpus else state.profile.parked_w
            if instance is not None:
                kind = pool, instance.tp
                if kind not in needs:
                    needs[kind] = _need_w(state, *kind)
                need_w = needs[kind]
            held = state.caps.get(gpu.uuid)
            least_w, most_w = _bounds_w(state, node, gpu, (low_w, high_w))
            gpus.append(
                GpuPower(
                    gpu.uuid,
                    node.node_id,
                    need_w,
                    low_w,
                    high_w,
                    most_w,
                    held.held_w if held else None,
                    steerable=free[pool] and gpu.healthy,
                    floor_w=least_w,
                )
            )
    low_w, high_w = settings.cap_range_w
    unseen = {name for scope in state.budgets for name in nodes_of(state, scope)} - set(state.nodes)
    for name in sorted(name for name in unseen if not is_off(state, name)):
        gpus += [
            GpuPower(f"{name}#{i}", name, 0.0, low_w, high_w, high_w, None, steerable=False)
            for i in range(settings.gpus_per_node)
        ]
    return tuple(gpus)


def _bounds_w(
    state: State, node: NodeObservation, gpu: GpuObservation, span_w: tuple[float, float]
) -> tuple[float, float]:
    """The least and the most that its limit may be: by what its node confirmed, what it has shown since, and what it
    was asked for."""
    held, seen_w = state.caps.get(gpu.uuid), gpu.limit_w
    if held is None or held.held_w is None:
        least_w, most_w = span_w if seen_w is None else (seen_w, seen_w)
    else:
        since_w = seen_w if seen_w is not None and node.observed_at_s > held.held_at_s else held.held_w
        least_w, most_w = min(held.held_w, since_w), max(held.held_w, since_w)
    return (min(least_w, held.asked_least_w), max(most_w, held.asked_w)) if held else (least_w, most_w)


def _need_w(state: State, pool: str, tp: int) -> float:
    """Per GPU, of an instance that carries its share of what its pool was planned for."""
    plan = state.pools.get(pool)
    capacity = sum(n * state.fit.max_rate_rps(pool, kind) for kind, n in plan.counts.items()) if plan else 0.0
    ratio = min(1.0, plan.demand_rps / capacity) if plan and capacity > 0 and plan.demand_rps > 0 else 1.0
    return power_at(state.fit, pool, tp, ratio) / tp


# ------------------------------------------------------------------------------------------ what may be counted on


def cap_w(state: State, instance: InstanceObservation) -> float | None:
    """What each GPU of an instance may draw; None without a budget."""
    limits = [state.caps[u].limit_w for u in instance.gpu_uuids if u in state.caps]
    return min((limit for limit in limits if limit is not None), default=None)


def fit_within(state: State, watts: float | None) -> ProfileFit:
    """The profile of instances whose every GPU may draw so much."""
    if watts is None:
        return state.fit
    if watts not in state.capped_fits:
        state.capped_fits[watts] = state.fit.capped(watts)
    return state.capped_fits[watts]


def fit_of_pool(state: State, pool: str) -> ProfileFit:
    """By the lowest cap among its instances."""
    if not state.caps:
        return state.fit
    caps_w = [cap_w(state, seen) for _, seen in state.instances().values() if state.pool_of(seen) == pool]
    return fit_within(state, min((watts for watts in caps_w if watts is not None), default=None))


def fit_of(state: State, instance: InstanceObservation) -> ProfileFit:
    return fit_within(state, cap_w(state, instance)) if state.caps else state.fit


def choose_within(
    state: State, nodes: Iterable[NodeObservation], asks: Mapping[str, ClockAsk], settings: ClockSettings
) -> dict[str, ClockChoice]:
    """A clock for every instance asked about, each within the cap of its GPUs."""
    if not state.caps:
        return dict(zip(asks, choose_clocks(state.fit, tuple(asks.values()), settings), strict=True))
    by_cap: dict[float | None, dict[str, ClockAsk]] = {}
    for node in nodes:
        for instance in node.instances:
            if instance.instance_id in asks:
                mine = by_cap.setdefault(cap_w(state, instance), {})
                mine[instance.instance_id] = asks[instance.instance_id]
    chosen: dict[str, ClockChoice] = {}
    for watts, mine in by_cap.items():
        fit = fit_within(state, watts)
        chosen.update(zip(mine, choose_clocks(fit, tuple(mine.values()), settings), strict=True))
    return chosen


def planning_w(state: State, now_s: float) -> float | None:
    """What the caps of all GPUs that plans may use can add up to; None without a budget."""
    return room_w(gpus_now(state, now_s), budgets_now(state)) if state.budgets else None


def others_w(state: State, pool: str, gpus: int) -> float:
    """What the caps of the GPUs outside a pool's grant must add up to, of `gpus` in all."""
    floor_w = state.settings.cap_range_w[0]
    watts, counted = 0.0, state.pools[pool].granted_gpus
    for name, plan in sorted(state.pools.items()):
        if name != pool:
            for tp, n in plan.counts.items():
                watts += n * tp * max(floor_w, _need_w(state, name, tp))
                counted += n * tp
    return watts + max(0, gpus - counted) * floor_w


def shares_w(
    fit: ProfileFit, counts: Mapping[tuple[str, int], int], demand_rps: Mapping[str, float], problem: PlanProblem
) -> Sequence[tuple[float, float]]:
    """What the caps of a layout must add up to, by the share of the demand that it serves; infinite where it cannot."""
    capacity: dict[str, float] = {}
    for (pool, tp), n in counts.items():
        capacity[pool] = capacity.get(pool, 0.0) + n * fit.max_rate_rps(pool, tp)
    empty_w = problem.cap_floor_w * (problem.gpus - sum(tp * n for (_, tp), n in counts.items()))
    points = []
    for share in (step / _STEPS for step in range(_STEPS + 1)):
        ratios = {
            pool: (rate * share / capacity[pool] if capacity.get(pool) else (inf if rate * share > 0 else 0.0))
            for pool, rate in demand_rps.items()
        }
        if max(ratios.values(), default=0.0) > 1.0 + 1e-9:
            points.append((share, inf))
            continue
        watts = sum(
            n * max(power_at(fit, pool, tp, min(1.0, ratios.get(pool, 0.0))), tp * problem.cap_floor_w)
            for (pool, tp), n in counts.items()
        )
        points.append((share, watts + empty_w))
    return points


_STEPS = 20
