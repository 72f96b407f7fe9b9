"""Idle policy: how many of a pool's instances serve, which stand by, and how long one that stands by is kept.

An instance on standby keeps its model loaded at the lowest clock and gets no requests: a few watts more than a parked
GPU, and it serves again at the next routing table instead of after a start. Called by the instance manager every few
seconds, and by the planners to price a layout the way it will be run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from math import ceil, inf

from controller.profile.fit import ProfileFit

# An instance more (or less) must save this share of the pool's power: the estimate of the load moves all the time.
LEAST_SAVING_RATIO = 0.06


# What an instance carries that serves a pool alone, as one of few, or as one of many, as a share of its load in the
# profile: that is measured where two share the load, less a margin of 5 %. A request goes to the one that has no prompt
# to read just now: of one there is none, of many there nearly always is, so these need no margin. Few need a little
# more of it: an hour at the very knee is as often out of SLO as in it.
LONE_SHARE = 0.7
FEW_SHARE = 0.97
MANY, MANY_SHARE = 4, 1.05


def carried_share(serving: int) -> float:
    """What each of so many instances of a pool carries, as a share of its largest load in the profile."""
    return LONE_SHARE if serving <= 1 else MANY_SHARE if serving >= MANY else FEW_SHARE


@dataclass(frozen=True, slots=True)
class Serving:
    """Instances that serve, by tp; the pool's power with all others on standby; whether they carry the load."""

    counts: Mapping[int, int]
    power_w: float
    carries: bool


def choose_serving(
    fit: ProfileFit,
    pool: str,
    counts: Mapping[int, int],
    rate_rps: float,
    fill: float = 1.0,
    least: int = 1,
    current: Mapping[int, int] | None = None,
) -> Serving:
    """The instances of a pool that serve `rate_rps` with least power, out of `counts` by tp.

    Each is filled up to the share `fill` of what it carries among so many (`carried_share`), at least
    `least` of them serve. For every order of the kinds it takes as few as carry the load, then more while that saves
    power (a lower clock may). `current` stays unless another choice saves clearly more. Too small a pool serves with
    all it has.
    """
    there = {tp: n for tp, n in sorted(counts.items()) if n > 0}
    tops = {tp: fit.max_rate_rps(pool, tp) for tp in there}
    best: Serving | None = None
    for order in permutations(there):
        chosen = _fewest(there, tops, order, rate_rps, fill, least)
        option = _priced(fit, pool, there, tops, chosen, rate_rps, fill)
        while (more := _one_more(there, option.counts, order)) is not None:
            wider = _priced(fit, pool, there, tops, more, rate_rps, fill)
            if option.carries and wider.power_w >= option.power_w:
                break
            option = wider
        if best is None or (not option.carries, option.power_w) < (not best.carries, best.power_w):
            best = option
    if best is None:
        return Serving({}, 0.0, rate_rps <= 0)
    if current is not None and _possible(current, there, least):
        kept = _priced(fit, pool, there, tops, {tp: current.get(tp, 0) for tp in there}, rate_rps, fill)
        if kept.carries and kept.power_w * (1 - LEAST_SAVING_RATIO) <= best.power_w:
            return kept
    return best


def _fewest(
    there: Mapping[int, int],
    tops: Mapping[int, float],
    order: tuple[int, ...],
    rate_rps: float,
    fill: float,
    least: int,
) -> dict[int, int]:
    """As few as carry the rate, kinds taken in that order."""
    chosen = dict.fromkeys(there, 0)
    left_rps, left = rate_rps, least
    for tp in order:
        top = tops[tp] * fill * MANY_SHARE  # where these are not as many, one more is added
        needed = ceil(left_rps / top - 1e-9) if top > 0 and left_rps > 0 else 0
        chosen[tp] = max(0, min(there[tp], max(needed, left)))
        left_rps -= chosen[tp] * top
        left -= chosen[tp]
    return chosen


def _one_more(there: Mapping[int, int], chosen: Mapping[int, int], order: tuple[int, ...]) -> dict[int, int] | None:
    for tp in order:
        if chosen[tp] < there[tp]:
            return {**chosen, tp: chosen[tp] + 1}
    return None


def _possible(current: Mapping[int, int], there: Mapping[int, int], least: int) -> bool:
    return sum(current.values()) >= least and all(n <= there.get(tp, 0) for tp, n in current.items())


def _priced(
    fit: ProfileFit,
    pool: str,
    there: Mapping[int, int],
    tops: Mapping[int, float],
    chosen: Mapping[int, int],
    rate_rps: float,
    fill: float,
) -> Serving:
    """Those that serve share the load by capacity, as routing does; the others idle."""
    capacity_rps = sum(n * tops[tp] for tp, n in chosen.items()) * carried_share(sum(chosen.values()))
    ratio = rate_rps / capacity_rps if capacity_rps > 0 else (inf if rate_rps > 0 else 0.0)
    power_w = 0.0
    for tp, n in there.items():
        if chosen[tp]:
            power_w += chosen[tp] * power_at(fit, pool, tp, min(1.0, ratio))
        if n > chosen[tp]:
            power_w += (n - chosen[tp]) * standby_w(fit, pool, tp)
    return Serving({tp: chosen[tp] for tp in there}, power_w, ratio <= fill + 1e-9)


def power_at(fit: ProfileFit, pool: str, tp: int, load_ratio: float) -> float:
    """Least power over clocks of an instance at that share of its capacity. One without any clock in SLO is priced by
    its heaviest measured load, one that was never measured as parked: nothing is known of it."""
    curves = fit.clocks(pool, tp)
    rate = load_ratio * fit.max_rate_rps(pool, tp)
    powers = [p for c in curves if c.max_rate_rps >= rate and (p := c.power_w(rate)) is not None and c.max_rate_rps > 0]
    if powers:
        return min(powers)
    return curves[-1].powers_w[-1] if curves else fit.parked_w * tp


def standby_w(fit: ProfileFit, pool: str, tp: int) -> float:
    """Power of a whole loaded instance that serves nothing, at its best clock."""
    point = fit.standby(tp)
    return point.power_w if point is not None else power_at(fit, pool, tp, 0.0)


def keep_s(
    fit: ProfileFit, pool: str, tp: int, start_j: float, host_share_w: float = 0.0, host_cycle_s: float = 0.0
) -> float:
    """How long an instance is worth keeping on standby: until that has cost as much as the start it saves. Who waits
    so long never pays more than twice what knowing the future would cost.

    Where empty hosts are switched off, the instance holds its share of one, `host_share_w` per GPU; but what is saved
    by letting the host go begins only `host_cycle_s` later, when it is down and would be up again."""
    share_w = tp * host_share_w
    extra_w = standby_w(fit, pool, tp) - tp * fit.parked_w + share_w
    return (start_j + share_w * host_cycle_s) / extra_w if extra_w > 0 else inf
