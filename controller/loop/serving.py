"""Who serves (every 5 seconds): of each pool's ready instances as many as the load needs, the others stand by.

Called by the instance manager before it publishes the routing. Standing by shrinks no capacity: the instance stays
loaded, and serves again with the next table. A load that all planned instances together do not carry is told to the
pool manager at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import sqrt

from controller.domain.classes import ALL_CLASSES, RequestClass
from controller.domain.reasons import Level, Mode, Reason, Stage
from controller.fleet.port import InstanceObservation, InstanceState
from controller.loop import emergency, modes
from controller.loop import pool as pool_manager
from controller.loop.caps import fit_of_pool
from controller.loop.demand import BURST_PAST_S, INDEPENDENT, outgrown, remember_bursts
from controller.loop.state import Onset, PoolPlan, State, Turn
from controller.policy.idle import Serving, choose_serving
from controller.policy.routing import pools_for
from controller.policy.routing.load import first_token_bound_s

# Over which mean tokens of a request are taken: they change more slowly than its rate.
TOKENS_S = 300.0
BURST_EVERY_S = 60.0
# Those on call begin at a low clock: only where a first token may take so long is a part of a burst left to them.
PATIENT_S = 1.0
# A burst is seen to begin over this time, and is served for this long at least, until a longer mean shows it.
ONSET_S, ONSET_HELD_S = 2.0, 10.0
# By what it must exceed the load that was chosen for to be worth an early tick: this factor where bursts are known, so
# many standard deviations of independent arrivals elsewhere.
LEAST_MORE = 1.05
CHANCE = 4.0


def serves(state: State, instance: InstanceObservation) -> bool:
    """True for an instance that gets requests as a rule."""
    return may_serve(state, instance) and instance.instance_id not in state.standby


def may_serve(state: State, instance: InstanceObservation) -> bool:
    return instance.state is InstanceState.READY and instance.instance_id not in state.draining


def on_call(state: State, instance: InstanceObservation) -> bool:
    """True for an instance that stands by and gets what those that serve cannot take: where the load comes in bursts.
    Elsewhere chance alone would wake it again and again."""
    return instance.instance_id in state.on_call and may_serve(state, instance)


def pool_rates(turn: Turn, window_s: float) -> dict[str, float] | None:
    """Equivalent requests/s of each routed pool over the last `window_s`; None when the load is unknown."""
    state, now_s = turn.state, turn.now.monotonic_s
    rates = state.load.rates_rps(now_s, window_s)
    if rates is None or state.routing is None:
        return None
    tokens = state.load.mean_tokens(now_s, max(window_s, TOKENS_S))
    shares: dict[str, dict[RequestClass, float]] = {}
    for request_class in ALL_CLASSES:
        if rates.get(request_class):
            able = pools_for(state.routing.pools, request_class)
            # While its own pool has nothing that serves, a larger one carries it, and needs the clocks for it.
            serving = next((pool for pool in able if any(i.accepts_new for i in pool.instances)), None)
            if able:
                shares.setdefault((serving or able[0]).name, {})[request_class] = rates[request_class]
    return {
        pool.name: state.profile.equivalent_rate(pool.name, shares.get(pool.name, {}), tokens)
        for pool in state.routing.pools
    }


def look_at_bursts(turn: Turn, rates: Mapping[str, float] | None) -> None:
    """Now and then: what bursts may add to the load of each routed pool."""
    state, now = turn.state, turn.now
    if rates is None or not state.settings.knobs.standby or now.monotonic_s - state.burst_seen_s < BURST_EVERY_S:
        return
    state.burst_seen_s = now.monotonic_s
    tokens = state.load.mean_tokens(now.monotonic_s, BURST_PAST_S)
    known = {group.name for group in state.profile.groups}
    means = pool_rates(turn, BURST_PAST_S) or {}
    remember_bursts(
        state, now, {pool: means.get(pool, 0.0) for pool in sorted(rates) if pool in known}, tokens, BURST_EVERY_S
    )


def with_bursts(turn: Turn, rates: Mapping[str, float]) -> dict[str, float]:
    """The load that clocks are chosen for, also kept in the state: what is seen, and what a burst may add before the
    next tick to those that serve; at least what has just begun."""
    state, now_s = turn.state, turn.now.monotonic_s
    if not state.settings.knobs.standby:
        return dict(rates)
    seen = state.instances()
    helped = {state.pool_of(seen[name][1]) for name in state.on_call if name in seen and on_call(state, seen[name][1])}
    state.chosen_rps = {
        pool: max(
            rate + (_burst_to_serve(state, pool) if pool in helped else state.burst_rps.get(pool, 0.0)),
            _begun_rps(state, pool, now_s),
        )
        for pool, rate in rates.items()
    }
    return state.chosen_rps


def _burst_to_serve(state: State, pool: str) -> float:
    """What of a burst is not left to those on call, in equivalent requests/s."""
    share = state.settings.serve_burst_share if _is_patient(state, pool) else 1.0
    return share * state.burst_rps.get(pool, 0.0)


def _is_patient(state: State, pool: str) -> bool:
    """True for a pool whose load comes in bursts and whose first tokens may take a while."""
    return pool in state.bursty and first_token_bound_s(state.profile, state.profile.group(pool)) >= PATIENT_S


def burst_begins(turn: Turn) -> bool:
    """Looks at the newest load report (every second): True when more comes than anything was chosen for. A tick would
    see it up to five seconds later, as a part of a longer mean. Where no bursts are known, it must be more than chance
    makes of so short a time."""
    state, now_s = turn.state, turn.now.monotonic_s
    if not state.chosen_rps or not state.may_act(now_s):
        return False
    rates = pool_rates(turn, ONSET_S)
    if rates is None:
        return False
    begins = False
    for pool in sorted(rates.keys() & state.chosen_rps.keys()):
        chosen_rps = state.chosen_rps[pool]
        least_rps = LEAST_MORE * chosen_rps if pool in state.bursty else chosen_rps + CHANCE * _chance_rps(chosen_rps)
        if rates[pool] > max(_begun_rps(state, pool, now_s), least_rps):
            state.onsets[pool] = Onset(rates[pool], now_s)
            begins = True
    return begins


def _chance_rps(rate_rps: float) -> float:
    """Standard deviation of independent arrivals over `ONSET_S`, of at least one."""
    return sqrt(INDEPENDENT * max(rate_rps, 1.0 / ONSET_S) / ONSET_S)


def _begun_rps(state: State, pool: str, now_s: float) -> float:
    """What has just begun, in equivalent requests/s; 0 without a burst."""
    onset = state.onsets.get(pool)
    return onset.rps if onset is not None and now_s - onset.at_s < ONSET_HELD_S else 0.0


def choose(turn: Turn, rates: Mapping[str, float] | None) -> None:
    """Chooses for the time until the next tick, for the larger of the load just now (`rates`) and over the last minute,
    and for their part of a burst on top of it: more serve soon, fewer later. Where the load is unknown, or requests
    wait for room, all serve, and so does whatever is not to be touched. In an emergency all serve, and the pool manager
    is asked for more."""
    state, now_s = turn.state, turn.now.monotonic_s
    if not state.settings.knobs.standby:
        return
    if state.foreign_engines:  # nobody knows what an instance carries
        state.standby, state.on_call = set(), set()
        return
    steady = pool_rates(turn, state.settings.serve_window_s)
    queues = state.load.queues(now_s, state.settings.stale_s)
    ready: dict[str, list[InstanceObservation]] = {}
    for node_id, instance in state.instances().values():
        if (
            instance.state is InstanceState.READY
            and instance.instance_id not in state.draining
            and not state.is_stale(node_id, now_s)
            and modes.may_touch(state, state.pool_of(instance), node_id)
        ):
            ready.setdefault(state.pool_of(instance), []).append(instance)
    crowd = _fullest_first(state) if state.settings.hosts_off else {}
    standby: set[str] = set()
    called: set[str] = set()
    for pool, plan in sorted(state.pools.items()):
        waiting = queues[pool].waiting if pool in queues else 0
        if rates is None or steady is None or pool not in rates:
            continue
        seen_rps = max(rates[pool], steady[pool])
        rate_rps = max(seen_rps + _burst_to_serve(state, pool), _begun_rps(state, pool, now_s))
        if emergency.stage_of(state, pool) is not Stage.NONE:
            _ask_for_more(turn, pool, plan, seen_rps)
            continue
        if waiting:
            continue
        mine = sorted(
            ready.get(pool, ()),
            key=lambda i: (i.instance_id in state.standby, crowd.get(i.instance_id, 0), i.instance_id),
        )
        there = Counter(instance.tp for instance in mine)
        now = Counter(instance.tp for instance in mine if instance.instance_id not in state.standby)
        choice = _choice(state, pool, there, rate_rps, now)
        if not choice.carries:  # for a burst that goes beyond the plan all serve; it is over before a start is
            _ask_for_more(turn, pool, plan, seen_rps)
        left, near = Counter(choice.counts), Counter[int]()
        if pool in state.bursty:
            near = there - left
        if _is_patient(state, pool):  # as many as a burst needs; the others serve with the early tick that it brings
            near = Counter(_choice(state, pool, there, seen_rps + state.burst_rps.get(pool, 0.0)).counts) - left
        if left != now:
            _record(turn, pool, there, now, choice, rate_rps, near)
        for instance in mine:
            if left[instance.tp] > 0:
                left[instance.tp] -= 1
                continue
            standby.add(instance.instance_id)
            if near[instance.tp] > 0:
                near[instance.tp] -= 1
                called.add(instance.instance_id)
    state.standby, state.on_call = standby, called


def look_ahead(turn: Turn) -> None:
    """Between two plans of a pool: where the forecast has outgrown the last one, the next is made now."""
    state, now_s = turn.state, turn.now.monotonic_s
    if not state.settings.knobs.instances or now_s - state.looked_ahead_s < state.settings.look_ahead_s:
        return
    state.looked_ahead_s = now_s
    for pool in outgrown(state, turn.now):
        if state.mode_of(pool, "") is not Mode.PAUSED and not state.budgets:
            pool_manager.tick(turn, pool, "load")


def _fullest_first(state: State) -> dict[str, int]:
    """By instance: the GPUs in use on its node, as a negative number. Who stands by does so where the most is empty,
    so that a whole host can go."""
    seen = state.instances()
    used = Counter[str]()
    for node_id, instance in seen.values():
        used[node_id] += instance.tp
    return {instance_id: -used[node_id] for instance_id, (node_id, _) in seen.items()}


def _choice(
    state: State, pool: str, counts: Mapping[int, int], rate_rps: float, current: Mapping[int, int] | None = None
) -> Serving:
    settings = state.settings
    return choose_serving(
        fit_of_pool(state, pool), pool, counts, rate_rps, settings.serve_fill, max(1, settings.min_instances), current
    )


def _ask_for_more(turn: Turn, pool: str, plan: PoolPlan, rate_rps: float) -> None:
    """A pool whose planned instances do not carry the load either is planned anew now, not at its next period."""
    state, now_s = turn.state, turn.now.monotonic_s
    # What a budget does not allow is not allowed a moment later either.
    pause_s = state.settings.pool_s if state.budgets else state.settings.load_window_s
    soon = now_s - state.asked_s.get(pool, float("-inf")) < pause_s
    if not soon and not _choice(state, pool, plan.counts, rate_rps).carries:
        state.asked_s[pool] = now_s
        pool_manager.tick(turn, pool, "load")


def _record(
    turn: Turn,
    pool: str,
    there: Mapping[int, int],
    before: Mapping[int, int],
    choice: Serving,
    rate_rps: float,
    near: Mapping[int, int],
) -> None:
    def counts(by_tp: Mapping[int, int]) -> dict[str, int]:
        return {f"tp{tp}": n for tp, n in sorted(by_tp.items()) if n}

    idle = {tp: n - choice.counts.get(tp, 0) for tp, n in there.items()}
    turn.decide(
        Level.INSTANCE,
        pool,
        "tick",
        Reason.LEAST_POWER if choice.carries else Reason.OVER_CAPACITY,
        f"{pool}: {_say(choice.counts)} serve {rate_rps:.2f} requests/s, {_say(idle)} stand by.",
        inputs={
            "rate_rps": round(rate_rps, 6),
            "ready": counts(there),
            "serving": counts(before),
            "profile": turn.state.profile_checksum,
        },
        outcome={
            "serving": counts(choice.counts),
            "standby": counts(idle),
            **({"on_call": counts(near)} if near else {}),
        },
        predicted_power_w=choice.power_w,
    )


def _say(by_tp: Mapping[int, int]) -> str:
    return "+".join(f"{n}xTP{tp}" for tp, n in sorted(by_tp.items()) if n) or "none"
