"""The table that gateways route by, from the profile: each instance's weight, limit and marginal energy.

Made by the instance manager whenever who serves has changed; nothing in it depends on the load of the moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import ceil, inf

import numpy as np

from controller.domain.classes import ClassGroup
from controller.fleet.port import RoutedInstance, RoutedPool
from controller.policy.routing.load import PROMPT_TOKENS_PER_REQUEST, readable_tokens
from controller.profile.fit import ProfileFit


@dataclass(frozen=True, slots=True)
class RoutableInstance:
    """One instance that may be routed to. `accepts_new` is False while it drains or warms, or stands by unasked;
    `on_call`: it stands by for bursts."""

    instance_id: str
    pool: str
    endpoint: str
    tp: int
    accepts_new: bool
    on_call: bool = False


# In-flight requests that an instance takes beyond its largest batch in SLO: the gateway holds the rest, where it can
# still go elsewhere.
IN_FLIGHT_HEADROOM = 1.25
# Of an instance that no profile knows: room for one batch of a small kernel size per GPU.
UNPROFILED_IN_FLIGHT_PER_GPU = 8
# Share of the time to a first token for which those that serve may have prompts to read before one on standby is asked.
# The more, the fuller batches are, and the later first tokens.
ON_CALL_SHARE = 0.5
# Of that, the share for which the last of those that serve is left alone where they fill one after the other; those
# between the first and the last lie evenly between.
FILL_SHARE = 0.5
# Loads at which the marginal energy is taken from the profile, and intervals of an instance's limit it is told for.
_LOADS = 9
MARGINAL_STEPS = 16


def routed_pools(
    fit: ProfileFit | None,
    model: str,
    groups: Iterable[ClassGroup],
    instances: Iterable[RoutableInstance],
    filling: Collection[str] = (),
) -> tuple[RoutedPool, ...]:
    """The pools of a routing table, by name; instances by id. A group without instances is still listed. Without a
    profile instances weigh by their GPUs. In the pools named in `filling` those that serve fill one after the other."""
    members: dict[str, list[RoutableInstance]] = defaultdict(list)
    for instance in sorted(instances, key=lambda i: i.instance_id):
        members[instance.pool].append(instance)
    return tuple(
        RoutedPool(
            name=group.name,
            model=model,
            classes=group.classes,
            instances=_ranked(fit, members[group.name])
            if group.name in filling
            else tuple(_routed(fit, instance) for instance in members[group.name]),
        )
        for group in sorted(groups, key=lambda g: g.name)
    )


def _ranked(fit: ProfileFit | None, instances: Iterable[RoutableInstance]) -> tuple[RoutedInstance, ...]:
    """Requests that are few and come in bursts would each decode alone where the least is held. Filled one after the
    other, instances read the weights for several at a time; who has prompts to read is passed over."""
    members = tuple(instances)
    serving = [each.instance_id for each in members if each.accepts_new and not each.on_call]
    ranks = {instance_id: rank / len(serving) for rank, instance_id in enumerate(serving)}
    return tuple(
        replace(
            _routed(fit, each),
            rank_load=FILL_SHARE * ranks.get(each.instance_id, 0.0) * standby_load(fit, each.pool, each.tp),
        )
        for each in members
    )


def _routed(fit: ProfileFit | None, instance: RoutableInstance) -> RoutedInstance:
    return RoutedInstance(
        instance_id=instance.instance_id,
        endpoint=instance.endpoint,
        tp=instance.tp,
        max_in_flight=max_in_flight(fit, instance.pool, instance.tp),
        weight=weight(fit, instance.pool, instance.tp),
        accepts_new=instance.accepts_new,
        marginal_j=marginal_energy_j(fit, instance.pool, instance.tp),
        standby_load=standby_load(fit, instance.pool, instance.tp) if instance.on_call else 0.0,
    )


def weight(fit: ProfileFit | None, pool: str, tp: int) -> float:
    """Share of a pool's load that an instance takes: its largest load in SLO. What is not profiled weighs its GPUs,
    what is never in SLO next to nothing, since a pool may consist of it alone."""
    if fit is None or not fit.clocks(pool, tp):
        return float(tp)
    return max(fit.max_rate_rps(pool, tp), 1e-3)


def max_in_flight(fit: ProfileFit | None, pool: str, tp: int) -> int:
    """Requests that an instance may hold at once: what it still decodes in time, and no less than the P99 of its batch
    at its largest load in SLO. Late first tokens end a load too, but sooner in a pool of few instances than of many,
    and a limit taken from them would throttle the large one."""
    curves = fit.clocks(pool, tp) if fit is not None else ()
    if not curves:
        return UNPROFILED_IN_FLIGHT_PER_GPU * tp
    curve = curves[-1]
    running = curve.running_p99(curve.max_rate_rps) or 0.0
    return max(1, ceil(max(running, curve.largest_batch) * IN_FLIGHT_HEADROOM))


def standby_load(fit: ProfileFit | None, pool: str, tp: int) -> float:
    """The load at which those that serve are no better a place than one on standby, for `load_of`: prompts are what
    bursts are made of."""
    tokens = inf
    if fit is not None and fit.clocks(pool, tp):
        tokens = readable_tokens(fit.profile, fit.profile.group(pool), tp, ON_CALL_SHARE)
    return max(
        1.0, tokens / PROMPT_TOKENS_PER_REQUEST if tokens < inf else ON_CALL_SHARE * max_in_flight(fit, pool, tp)
    )


# By profile (the very object: it is made once and has no hash), pool and tp.
_marginal: dict[tuple[int, str, int], tuple[ProfileFit, tuple[float, ...]]] = {}
_MOST_REMEMBERED = 256


def marginal_energy_j(fit: ProfileFit | None, pool: str, tp: int) -> tuple[float, ...]:
    """Joules that one request more a second costs each second, for an instance that holds 0, 1/16 … 16/16 of its limit.

    Taken along the clocks of least power in SLO, since that is what the instance manager sets for a load; how many
    requests an instance then holds is the profile's mean batch. Empty where no profile tells.
    """
    if fit is None:
        return ()
    key = (id(fit), pool, tp)
    found = _marginal.get(key)
    if found is None:
        if len(_marginal) >= _MOST_REMEMBERED:
            _marginal.clear()
        found = _marginal[key] = (fit, _slopes_j(fit, pool, tp))
    return found[1]


def _slopes_j(fit: ProfileFit, pool: str, tp: int) -> tuple[float, ...]:
    top_rps = fit.max_rate_rps(pool, tp)
    if top_rps <= 0:
        return ()
    rates, powers, batches = [], [], []
    for rate_rps in np.linspace(0.0, top_rps, _LOADS):
        carrying = [curve for curve in fit.clocks(pool, tp) if curve.max_rate_rps >= rate_rps]
        known = [(power_w, curve) for curve in carrying if (power_w := curve.power_w(float(rate_rps))) is not None]
        if known:
            power_w, curve = min(known, key=lambda each: each[0])
            rates.append(float(rate_rps))
            powers.append(power_w)
            batches.append(curve.running(float(rate_rps)) or 0.0)
    if len(rates) < 2:
        return ()
    slopes = np.gradient(powers, rates)
    # Steps between two clocks make the batch go back a little: only what rises can be read backwards.
    held = np.maximum.accumulate(batches)
    limit = max_in_flight(fit, pool, tp)
    steps = np.linspace(0.0, limit, MARGINAL_STEPS + 1)
    return tuple(float(f"{slope:.4g}") for slope in np.interp(steps, held, slopes))
