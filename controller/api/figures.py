"""Figures of pools now, for status and metrics: read from the state, decided by nobody."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from controller.domain.classes import RequestClass
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


def power_w(state: State, node_id: str, gpu_uuids: Iterable[str]) -> float | None:
    """Of some GPUs of a node, as last sampled; None while none of them is known."""
    wanted = set(gpu_uuids)
    return sum_known(gpu.power_w for gpu in state.nodes[node_id].gpus if gpu.uuid in wanted)


def sum_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
