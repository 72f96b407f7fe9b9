"""Figures of pools now, for status and metrics: read from the state, decided by nobody."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from controller.domain.classes import RequestClass
from controller.domain.reasons import Mode
from controller.fleet.port import HOLDS_GPUS, InstanceObservation, InstanceState
from controller.loop.state import State
from controller.policy.stabilise import price


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """None is unknown. Rates in equivalent requests/s but for `request_rate`, which counts requests."""

    name: str
    granted_gpus: int
    used_gpus: int
    ready_instances: int
    request_rate: float
    planned_rate: float
    capacity_rate: float
    slo_attainment: float | None
    queued: int
    power_w: float | None


def pool_figures(state: State, now_s: float) -> list[PoolFigures]:
    """By pool name. Reads copies: a scrape may run beside the loop."""
    rates = state.load.rates_rps(now_s, state.settings.load_window_s) or {}
    queues = state.load.queues(now_s, state.settings.stale_s)
    seen: dict[str, list[tuple[str, InstanceObservation]]] = {}
    for node_id, instance in state.instances().values():
        if instance.state in HOLDS_GPUS:
            seen.setdefault(state.pool_of(instance), []).append((node_id, instance))
    figures = []
    for name, plan in sorted(dict(state.pools).items()):
        mine = seen.get(name, [])
        ready = [i for _, i in mine if i.state is InstanceState.READY]
        figures.append(
            PoolFigures(
                name=name,
                granted_gpus=plan.granted_gpus,
                used_gpus=sum(i.tp for _, i in mine),
                ready_instances=len(ready),
                request_rate=sum(rates.get(c, 0.0) for c in plan.group.classes),
                planned_rate=plan.demand_rps,
                capacity_rate=sum(state.fit.max_rate_rps(name, i.tp) for i in ready),
                slo_attainment=slo_attainment(state, plan.group.classes, now_s),
                queued=queues[name].waiting if name in queues else 0,
                power_w=sum_known(power_w(state, node_id, i.gpu_uuids) for node_id, i in mine),
            )
        )
    return figures


def slo_attainment(state: State, classes: Container[RequestClass], now_s: float) -> float | None:
    """Share of the requests in SLO of those that ended within the last pool period; None when none did."""
    ended = in_slo = 0
    for windows in state.load.by_gateway(now_s, state.settings.pool_s).values():
        for window in windows:
            for request_class, counts in window.classes.items():
                if request_class in classes:
                    ended += counts.completed + counts.failed
                    in_slo += counts.in_slo
    return in_slo / ended if ended else None


def predicted_power_w(state: State, now_s: float) -> float | None:
    """What the wanted layout was planned to draw, with its empty GPUs; None before the first plan."""
    pools = dict(state.pools)
    if not pools:
        return None
    demand = {name: plan.demand_rps for name, plan in pools.items()}
    return price(state.fit, state.layout.counts(), demand, state.usable_gpus(now_s)).power_w


def drifts(state: State, now_s: float) -> list[str]:
    """Instances whose GPUs are not at the clock that was chosen for them, though there was time for it: somebody locked
    them by hand, which is respected, or the GPU did not take it."""
    found = []
    clocks = dict(state.clocks)
    for node in sorted(dict(state.nodes).values(), key=lambda node: node.node_id):
        if state.is_stale(node.node_id, now_s):
            continue
        locked = {gpu.uuid: gpu.locked_mhz for gpu in node.gpus}
        for instance in node.instances:
            chosen = clocks.get(instance.instance_id)
            if chosen is None or chosen.cap_w is not None or instance.state is not InstanceState.READY:
                continue
            if now_s - chosen.at_s < _SETTLES_PERIODS * state.settings.instance_s:
                continue
            if state.mode_of(state.pool_of(instance), node.node_id) is not Mode.ACTIVE:
                continue
            other = {mhz for uuid in instance.gpu_uuids if _differs(mhz := locked.get(uuid), chosen.mhz)}
            if other:
                is_at = " and ".join(_clock(mhz) for mhz in sorted(other, key=lambda mhz: mhz or 0))
                found.append(f"{instance.instance_id} on {node.node_id} is {is_at}, not {_clock(chosen.mhz)}")
    return found


def held_by_hand(state: State) -> list[str]:
    """Instances that an operator has started, moved or taken down: the loop leaves them and their GPUs alone."""
    return [
        f"{instance.instance_id} on {node.node_id} is {instance.held_by}'s ({instance.state})"
        for node in sorted(dict(state.nodes).values(), key=lambda node: node.node_id)
        for instance in node.held
        if instance.state in HOLDS_GPUS
    ]


def drift_line(state: State, now_s: float) -> str:
    """For people; "" where everything is as the loop has chosen."""
    said = {
        "an operator's lock, or one that was not taken": drifts(state, now_s),
        "left alone": held_by_hand(state),
    }
    return "; ".join(f"{_some(found)}: {why}" for why, found in said.items() if found)


def _some(found: list[str]) -> str:
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{'; '.join(found[:_NAMED])}{more}"


DRIFT_LINE = "drift"  # its key beside the levels' sentences
_NAMED = 3
# A clock that was chosen is locked by the next tick but one.
_SETTLES_PERIODS = 3
# GPUs know clocks in steps; the agent takes the nearest.
_STEP_MHZ = 15


def _differs(locked_mhz: int | None, chosen_mhz: int | None) -> bool:
    if locked_mhz is None or chosen_mhz is None:
        return locked_mhz != chosen_mhz
    return abs(locked_mhz - chosen_mhz) > _STEP_MHZ


def _clock(mhz: int | None) -> str:
    return "unlocked" if mhz is None else f"locked to {mhz} MHz"


def power_w(state: State, node_id: str, gpu_uuids: Iterable[str]) -> float | None:
    """Of some GPUs of a node, as last sampled; None while none of them is known."""
    wanted = set(gpu_uuids)
    return sum_known(gpu.power_w for gpu in state.nodes[node_id].gpus if gpu.uuid in wanted)


def sum_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
