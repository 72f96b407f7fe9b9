"""The instance manager (every 5 seconds): the clock of least power that meets the SLO, and the next transition steps.

Renews each lock because it has just decided on it; a lock whose instance it cannot see is left to expire. It alone
sets clocks, and it never shrinks capacity on its own: drains and stops only carry out what the slow loops planned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from controller.domain.classes import ClassGroup, RequestClass
from controller.domain.layout import Layout
from controller.domain.reasons import Level, Mode, Reason, Stage
from controller.fleet.port import (
    COMES_UP,
    GONE,
    UP,
    WORKS,
    ApplyCaps,
    ApplyClocks,
    CapTarget,
    ClockTarget,
    DrainInstance,
    InstanceObservation,
    InstanceState,
    PublishRouting,
    ReleaseCaps,
    ReleaseClocks,
    RoutedInstance,
    RoutedPool,
    RoutingTable,
    StartInstance,
    StopInstance,
)
from controller.loop import caps, emergency, modes, pace, serving
from controller.loop.planning import drop_from_layout, lay_out, say_counts
from controller.loop.state import ActingStep, ChosenClock, PoolPlan, Turn, plan_json, rates_json
from controller.policy.frequency import (
    ClockAlternative,
    ClockAsk,
    ClockChoice,
    ClockSettings,
    InstanceLoad,
    at_full_clock,
    explain_clock,
)
from controller.policy.idle import carried_share
from controller.policy.routing import RoutableInstance, routed_pools
from controller.policy.transition import (
    ActualInstance,
    CapacityModel,
    Step,
    StepKind,
    TransitionSettings,
    next_steps,
    standing_layout,
)

# States in which an instance may still have work and so needs a chosen clock.
_TOLD = {StepKind.DRAIN.value: InstanceState.DRAINING, StepKind.STOP.value: InstanceState.STOPPING}
_TAKES_AWAY = (StepKind.DRAIN, StepKind.RELABEL)
_OF_WHAT_IS_SEEN = (StepKind.DRAIN, StepKind.STOP)


def tick(turn: Turn) -> None:
    """One fast tick: who serves, steps, routing, clocks."""
    pace.look(turn)
    rates = serving.pool_rates(turn, turn.state.settings.load_window_s)
    serving.look_at_bursts(turn, rates)
    emergency.look(turn)
    serving.choose(turn, rates)
    serving.look_ahead(turn)
    reconcile(turn, renew=True)
    # The first routing table may have been made just now: only with it the load of a pool is known.
    _set_clocks(turn, _clock_rates(turn) if rates is None else serving.with_bursts(turn, rates))


def tick_early(turn: Turn) -> None:
    """Between two ticks, when a burst has begun: who serves, routing, clocks. What counts ticks is left out."""
    if turn.state.may_act(turn.now.monotonic_s):
        serving.choose(turn, serving.pool_rates(turn, turn.state.settings.load_window_s))
        reconcile(turn)
        _set_clocks(turn, _clock_rates(turn))


def _clock_rates(turn: Turn) -> dict[str, float] | None:
    rates = serving.pool_rates(turn, turn.state.settings.load_window_s)
    return None if rates is None else serving.with_bursts(turn, rates)


# ------------------------------------------------------------------------------------------------ transitions


def reconcile_now(turn: Turn) -> None:
    """Between two ticks: those that take over the load of others do not wait for the next tick's clocks."""
    if reconcile(turn):
        _set_clocks(turn, _clock_rates(turn))


def reconcile(turn: Turn, renew: bool = False) -> bool:
    """Takes the next steps from what is there to what is wanted, then publishes the routing if it changed. `renew`:
    also when it carries orders, which would expire. True when a pool has less to serve its load with than before."""
    state, now_s = turn.state, turn.now.monotonic_s
    if not state.may_act(now_s):
        return False
    modes.hold_untouched(state)
    before, position = state.routing, len(turn.effects)
    if not stands(turn):
        _take_steps(turn)
    _publish(turn, position, renew)
    return before is not None and state.routing is not None and _narrowed(before.pools, state.routing.pools)


def _narrowed(before: Iterable[RoutedPool], after: Iterable[RoutedPool]) -> bool:
    there = {pool.name: _open_weight(pool) for pool in after}
    return any(there.get(pool.name, 0.0) < _open_weight(pool) for pool in before)


def _open_weight(pool: RoutedPool) -> float:
    return sum(instance.weight for instance in pool.instances if _shares(instance))


def _shares(instance: RoutedInstance) -> bool:
    """True for one that has its share of the pool's load, as none on standby has."""
    return instance.accepts_new and not instance.standby_load


def stands(turn: Turn) -> bool:
    """True when what is there is what is wanted, as it nearly always is: there is no step to be looked for."""
    state, now_s = turn.state, turn.now.monotonic_s
    wanted = state.layout.by_id()
    ready = 0
    for node_id, instance in state.instances().values():
        if instance.state in GONE or state.is_lost(node_id, now_s):
            continue
        planned = wanted.get(instance.instance_id)
        if instance.state is not InstanceState.READY or planned is None or planned.pool != state.pool_of(instance):
            return False
        ready += 1
    return ready == len(wanted)


def _take_steps(turn: Turn) -> None:
    """Begins the steps that may be taken now; where there is no way, what is there is wanted from now on instead."""
    state, now_s = turn.state, turn.now.monotonic_s
    actual = _actual(turn)
    rates = state.load.rates_rps(now_s, state.settings.load_window_s)
    transition = next_steps(
        state.layout,
        actual,
        frozenset(gpu.uuid for node in state.placeable_nodes(now_s) for gpu in node.gpus if gpu.usable),
        _capacity(turn, rates),
        # Under a power budget nothing is held longer than the load needs.
        TransitionSettings(make_first=not state.budgets),
        # A layout that only saves energy is worth no gap. One that was too small is left even through a gap, least
        # harm first: the alternative is to stay on it for ever.
        allow_shortfall=state.layout_forced,
    )
    if transition.stuck and state.mode is Mode.ACTIVE and rates is not None:
        _stand_still(turn, actual)
        return
    if transition.given_up:
        drop_from_layout(state, transition.given_up)
        lay_out(state, turn.now)
    busy = {(acting.kind, acting.instance_id) for acting in state.acting.values()}
    starting = sum(1 for a in actual if a.state in COMES_UP)
    for step in transition.steps:
        if not modes.may_touch(state, step.pool, step.node_id):
            continue
        # Nobody knows what an instance carries now: silence takes nothing away from those that serve.
        if rates is None and step.kind in _TAKES_AWAY:
            continue
        # Of a silent node one knows what was, not what is: it is heard again, or lost.
        if step.kind in _OF_WHAT_IS_SEEN and state.is_stale(step.node_id, now_s):
            continue
        if step.kind is StepKind.RELABEL:
            state.routed_as[step.instance_id] = step.pool
        elif step.kind is not StepKind.WAIT and (step.kind.value, step.instance_id) not in busy:
            if step.kind is StepKind.START:
                if starting >= state.settings.max_starts_at_once:
                    continue
                starting += 1
            _act(turn, step)


def _stand_still(turn: Turn, actual: tuple[ActualInstance, ...]) -> None:
    """There is no way to the wanted layout that is worth the gap: what is there is wanted from now on."""
    state, now_s = turn.state, turn.now.monotonic_s
    aimed = say_counts(state.layout.counts())
    standing = standing_layout(state.layout, actual, state.settings.model)
    pools = {instance.pool for instance in standing.instances}
    if not any(pools <= set(partition) for partition in state.settings.partitions):
        # Between two partitions classes would be planned for twice: one pool serves them all from what there is.
        single = state.settings.partitions[0][0]
        standing = Layout(tuple(replace(instance, pool=single) for instance in standing.instances))
        state.pools = {}
    state.layout = standing
    state.layout_forced = False
    counts = state.layout.counts()
    for name in sorted({pool for pool, _ in counts} | set(state.pools)):
        by_tp = {tp: n for (pool, tp), n in counts.items() if pool == name}
        used = sum(tp * n for tp, n in by_tp.items())
        plan = state.pools.get(name)
        if plan is not None:
            state.pools[name] = replace(plan, counts=by_tp, granted_gpus=max(plan.granted_gpus, used))
        elif any(group.name == name for group in state.profile.groups):
            group = state.profile.group(name)
            state.pools[name] = PoolPlan(group, used, by_tp, 0.0, state.decision_numbers + 1, now_s)
    turn.decide(
        Level.CLUSTER,
        "cluster",
        "stuck",
        Reason.NO_ROOM_TO_SWITCH,
        f"No way to {aimed} carries the load; {say_counts(counts)} stays.",
        inputs={"aimed": aimed, "profile": state.profile_checksum},
        outcome={"accepted": True, "plan": plan_json(state)},
    )


def _actual(turn: Turn) -> tuple[ActualInstance, ...]:
    state, now_s = turn.state, turn.now.monotonic_s
    told = {acting.instance_id: _TOLD[acting.kind] for acting in state.acting.values() if acting.kind in _TOLD}
    found = []
    for node_id, seen in state.instances().values():
        if state.is_lost(node_id, now_s):
            continue
        # What was told to go is on its way, although its node has not shown it yet; what it had to do then is past.
        going = told.get(seen.instance_id) if seen.state in UP else None
        found.append(
            ActualInstance(
                seen.instance_id,
                state.pool_of(seen),
                node_id,
                seen.gpu_uuids,
                going or seen.state,
                None if going else seen.running,
                None if going else seen.waiting,
                state.failures.get(seen.instance_id, 0),
            )
        )
    return tuple(found)


def _capacity(turn: Turn, rates: Mapping[RequestClass, float] | None) -> CapacityModel:
    """What must be carried while the layout changes: the load now, or what was planned for while it is unknown."""
    state = turn.state
    demand = rates if rates is not None else state.settings.initial_rps
    return CapacityModel(
        rates_rps=demand,
        max_rate_rps={
            (group.name, tp): state.fit.max_rate_rps(group.name, tp)
            for group in state.profile.groups
            for tp in state.profile.tps
        },
        work={
            (group.name, request_class): state.profile.request_weight(group.name, request_class)
            for group in _groups(turn)
            for request_class in sorted(group.classes)
        },
    )


def _groups(turn: Turn) -> tuple[ClassGroup, ...]:
    """The planned pools, and those of an earlier partition that instances still serve: what failed there is no pool."""
    state = turn.state
    alive = (instance for _, instance in state.instances().values() if instance.state in UP | WORKS)
    names = set(state.pools) | {state.pool_of(instance) for instance in alive}
    return tuple(group for group in state.profile.groups if group.name in names)


def _act(turn: Turn, step: Step) -> None:
    state = turn.state
    effect_id = turn.effect_id()
    state.acting[effect_id] = ActingStep(step.kind.value, step.instance_id, step.node_id)
    if step.kind is StepKind.START:
        turn.effects.append(
            StartInstance(
                effect_id,
                step.node_id,
                step.instance_id,
                state.settings.model,
                step.pool,
                step.gpu_uuids,
                step.sentence,
            )
        )
    elif step.kind is StepKind.DRAIN:
        state.draining.add(step.instance_id)
        turn.effects.append(DrainInstance(effect_id, step.node_id, step.instance_id, step.sentence))
    else:
        turn.effects.append(StopInstance(effect_id, step.node_id, step.instance_id, step.sentence))


def _publish(turn: Turn, position: int, renew: bool) -> None:
    """Puts a changed routing table before this turn's steps: gateways stop sending before a drain begins.

    Instances of a node that fell silent stay: an agent's death does not stop its engines, and a gateway finds out
    by itself when one no longer answers.
    """
    state = turn.state
    if not state.pools:
        return
    stopping = {acting.instance_id for acting in state.acting.values() if acting.kind == StepKind.STOP.value}
    working = [
        RoutableInstance(
            instance.instance_id,
            state.pool_of(instance),
            instance.endpoint,
            instance.tp,
            accepts_new=(serving.serves(state, instance) or serving.on_call(state, instance))
            and instance.instance_id not in stopping,
            on_call=serving.on_call(state, instance),
        )
        for _, instance in state.instances().values()
        if instance.state in WORKS and instance.endpoint
    ]
    if not working and state.routing is None:
        return  # nothing to route to yet; gateways keep what an earlier controller gave them
    pools = routed_pools(state.fit, state.settings.model, _groups(turn), tuple(working), state.bursty)
    pools = emergency.with_orders(state, pools, turn.now.monotonic_s)
    version = state.routing.version + 1 if state.routing else 1
    if state.routing is not None and state.routing.pools == pools:
        if not renew or all(pool.order is None for pool in pools):
            return
        version = state.routing.version
    state.routing = RoutingTable(state.term, version, pools, state.profile.scheme)
    turn.effects.insert(position, PublishRouting(turn.effect_id(), state.routing))


# ----------------------------------------------------------------------------------------------------- clocks


def _set_clocks(turn: Turn, pool_rates: Mapping[str, float] | None) -> None:
    state, now_s = turn.state, turn.now.monotonic_s
    if not state.settings.knobs.clocks:
        return
    age_s = state.load.age_s(now_s)
    if age_s is not None and age_s > state.settings.hold_s:
        _unlock_all(turn, Reason.STALE_TELEMETRY, f"no load was reported for {state.settings.hold_s:g} s")
        return
    if state.foreign_engines:
        _unlock_all(turn, Reason.ENGINE_CHANGED, "the profile was measured on another engine")
        return
    weights: dict[str, float] = {}  # by pool, of all that share its load and as far as they carry it
    carried: dict[str, float] = {}
    shares: dict[str, float] = {}  # by instance; looked up once per instance and tick, so it must not be searched for
    for pool in state.routing.pools if state.routing else ():
        sharing = [instance.weight for instance in pool.instances if _shares(instance)]
        carried[pool.name] = carried_share(len(sharing))
        weights[pool.name] = sum(sharing) * carried[pool.name]
        for routed in pool.instances:
            if _shares(routed):
                shares.setdefault(routed.instance_id, routed.weight)
    batches = {(pool, tp): held / max(1.0, carried.get(pool, 1.0)) for (pool, tp), held in _mean_batches(turn).items()}
    # Nodes that are stale, and what is paused, are not decided on, so not renewed: their locks expire.
    seen = [
        node
        for node in sorted(state.nodes.values(), key=lambda n: n.node_id)
        if not state.is_stale(node.node_id, now_s)
    ]
    asks = {
        instance.instance_id: _ask(turn, instance, pool_rates, weights, shares, batches)
        for node in seen
        for instance in sorted(node.instances, key=lambda instance: instance.instance_id)
        if instance.state in WORKS and state.mode_of(state.pool_of(instance), node.node_id) is not Mode.PAUSED
    }
    told = functools.cache(lambda: _class_rates(turn))  # the same for all, and only where a clock changes
    settings = ClockSettings(fill=state.settings.serve_fill, caps=not (state.budgets or state.caps))
    chosen = caps.choose_within(state, seen, asks, settings)
    for node in seen:
        targets: list[ClockTarget] = []
        release: list[str] = []
        cap: list[CapTarget] = []
        uncap: list[str] = []
        for instance in sorted(node.instances, key=lambda instance: instance.instance_id):
            had = state.clocks.get(instance.instance_id)
            had_cap = had is not None and had.cap_w is not None
            if instance.state not in WORKS:
                if had is not None and had.mhz is not None:
                    release.extend(instance.gpu_uuids)
                if had_cap:
                    uncap.extend(instance.gpu_uuids)
                state.clocks.pop(instance.instance_id, None)
                continue
            if instance.instance_id not in asks:
                continue
            mhz = _take(turn, instance, asks[instance.instance_id], chosen[instance.instance_id], settings, told)
            if mhz is not None:
                targets.append(ClockTarget(instance.gpu_uuids, mhz))
            elif had is None or had.mhz is not None:  # seen for the first time it may have a predecessor's lock
                release.extend(instance.gpu_uuids)
            cap_w = state.clocks[instance.instance_id].cap_w
            if cap_w is not None and modes.may_touch(state, state.pool_of(instance), node.node_id):
                cap.append(CapTarget(instance.gpu_uuids, cap_w))
            elif had_cap:
                uncap.extend(instance.gpu_uuids)
        # The caps of a budget take the place of these, and must not be let go; elsewhere their lease ends them.
        if uncap and not (state.budgets or state.caps):
            turn.effects.append(ReleaseCaps(turn.effect_id(), node.node_id, tuple(uncap), "a clock lock draws less"))
        release = [uuid for uuid in release if uuid not in node.held_gpus]  # one of ours that failed left them
        if release:
            turn.effects.append(ReleaseClocks(turn.effect_id(), node.node_id, tuple(release), "full clock wanted"))
        if targets:
            turn.effects.append(
                ApplyClocks(
                    turn.effect_id(),
                    node.node_id,
                    tuple(targets),
                    state.settings.lease_ttl_s,
                    "clock of least power that meets the SLO",
                )
            )
        if cap:
            why = "power cap that draws less than any clock lock"
            ttl_s = state.settings.lease_ttl_s
            turn.effects.append(ApplyCaps(turn.effect_id(), node.node_id, tuple(cap), ttl_s, why, protects=False))


def _unlock_all(turn: Turn, reason: Reason, why: str) -> None:
    """Full clocks everywhere: no gateway has reported for longer than a plan may be held blindly, or the profile does
    not hold for the engines that run."""
    state = turn.state
    for node in state.nodes.values():
        for instance in node.instances:
            had = state.clocks.get(instance.instance_id)
            if had is None or (had.mhz is None and had.cap_w is None) or instance.state in GONE:
                continue
            effect_id = turn.effect_id()
            turn.effects.append(ReleaseClocks(effect_id, node.node_id, instance.gpu_uuids, why))
            if had.cap_w is not None:
                turn.effects.append(ReleaseCaps(turn.effect_id(), node.node_id, instance.gpu_uuids, why))
            turn.decide(
                Level.INSTANCE,
                instance.instance_id,
                "tick",
                reason,
                f"{instance.instance_id} to full clock: {why}.",
                inputs={"current_mhz": had.mhz, "hold_s": state.settings.hold_s},
                outcome={"mhz": state.profile.full_mhz, "gpu_uuids": list(instance.gpu_uuids)},
            )
            state.clocks[instance.instance_id] = ChosenClock(None, reason, turn.now.monotonic_s)


def _mean_batches(turn: Turn) -> dict[tuple[str, int], float]:
    """Mean batch of the serving instances by (pool, tp): routing evens them out, so what one of them holds more than
    the others at this moment says nothing of its next seconds."""
    state, now_s = turn.state, turn.now.monotonic_s
    batches: dict[tuple[str, int], list[float]] = {}
    for node_id, instance in state.instances().values():
        if serving.serves(state, instance) and instance.running is not None and not state.is_stale(node_id, now_s):
            batches.setdefault((state.pool_of(instance), instance.tp), []).append(instance.running)
    return {key: sum(held) / len(held) for key, held in batches.items()}


def _ask(
    turn: Turn,
    instance: InstanceObservation,
    pool_rates: Mapping[str, float] | None,
    weights: Mapping[str, float],
    shares: Mapping[str, float],
    batches: Mapping[tuple[str, int], float],
) -> ClockAsk:
    """What is known of an instance's next seconds."""
    state = turn.state
    pool = state.pool_of(instance)
    had = state.clocks.get(instance.instance_id)
    rate: float | None = None
    if instance.state is InstanceState.READY and pool_rates is not None and pool in pool_rates:
        weight = shares.get(instance.instance_id, 0.0)
        rate = pool_rates[pool] * weight / weights[pool] if weights.get(pool) else 0.0
    running = instance.running
    if running is not None and serving.serves(state, instance):
        running = batches.get((pool, instance.tp), running)
    load = InstanceLoad(rate, running, instance.waiting, instance.kv_usage_ratio)
    return ClockAsk(pool, instance.tp, load, (had.mhz or state.profile.full_mhz) if had else None)


def _class_rates(turn: Turn) -> dict[str, float] | None:
    rates = turn.state.load.rates_rps(turn.now.monotonic_s, turn.state.settings.load_window_s)
    return rates_json(rates) if rates is not None else None


def _take(
    turn: Turn,
    instance: InstanceObservation,
    ask: ClockAsk,
    choice: ClockChoice,
    settings: ClockSettings,
    told: Callable[[], dict[str, float] | None],
) -> int | None:
    """The clock for one instance, None for unlocked; records a decision when it changes, with the rates of `told`."""
    state, now_s = turn.state, turn.now.monotonic_s
    had = state.clocks.get(instance.instance_id)
    fit = caps.fit_of(state, instance)
    if emergency.stage_of(state, ask.group).rank >= Stage.FULL_CLOCK.rank:
        choice = at_full_clock(fit, ask.group, ask.tp, choice)
    standby = state.fit.standby(instance.tp)
    stands_by = (
        instance.instance_id in state.standby and standby is not None and not instance.running and not instance.waiting
    )
    if stands_by and standby is not None:
        choice = ClockChoice(standby.mhz, Reason.IDLE, 0.0, standby.power_w, None)
        curves = fit.clocks(ask.group, ask.tp)
        if serving.on_call(state, instance) and curves:  # the lowest at which it answers in time
            idle_w = state.fit.idle_power_w(ask.tp, curves[0].mhz)
            choice = ClockChoice(curves[0].mhz, Reason.IDLE, 0.0, idle_w, None)
    mhz = choice.mhz if choice.mhz < state.profile.full_mhz else None
    if had is None or (had.mhz, had.cap_w) != (mhz, choice.cap_w) or had.reason is not choice.reason:
        lost = () if stands_by else explain_clock(fit, ask, choice, settings)
        _record(turn, instance, ask, had, choice, lost, told())
        state.clocks[instance.instance_id] = ChosenClock(mhz, choice.reason, now_s, choice.cap_w)
    return mhz


def _record(
    turn: Turn,
    instance: InstanceObservation,
    ask: ClockAsk,
    had: ChosenClock | None,
    choice: ClockChoice,
    alternatives: tuple[ClockAlternative, ...],
    class_rates_rps: dict[str, float] | None,
) -> None:
    state, pool, load = turn.state, ask.group, ask.load
    plan = state.pools.get(pool)
    watts = f"{choice.predicted_power_w:.0f} W predicted" if choice.predicted_power_w is not None else "power unknown"
    held = f"{choice.mhz} MHz" if choice.cap_w is None else f"a power cap of {choice.cap_w:.0f} W per GPU"
    turn.decide(
        Level.INSTANCE,
        instance.instance_id,
        "tick",
        choice.reason,
        f"{instance.instance_id} (TP{instance.tp}, {pool}) to {held}: {_WHY[choice.reason]}, {watts}.",
        inputs={
            "pool": pool,
            "tp": instance.tp,
            "rate_rps": load.rate_rps,
            "running": load.running,
            "waiting": load.waiting,
            "kv_usage_ratio": load.kv_usage_ratio,
            "current_mhz": had.mhz if had else None,
            **({"cap_w": caps.cap_w(state, instance)} if state.caps else {}),
            **({"pace": state.paces[pool]} if pool in state.paces else {}),
            "class_rates_rps": class_rates_rps,
            "profile": state.profile_checksum,
        },
        outcome={
            "mhz": choice.mhz,
            "gpu_uuids": list(instance.gpu_uuids),
            **({"cap_w": choice.cap_w} if choice.cap_w is not None else {}),
        },
        alternatives=tuple(
            {
                "mhz": other.mhz,
                "max_rate_rps": other.max_rate_rps,
                "predicted_power_w": other.predicted_power_w,
                "rejected": other.rejected,
            }
            for other in alternatives
            if other.rejected
        ),
        predicted_power_w=choice.predicted_power_w,
        predicted_slo_margin=choice.margin,
        parent=plan.decided_by if plan else None,
    )


_WHY: Mapping[Reason, str] = {
    Reason.LEAST_POWER: "least power that meets the SLO at this load",
    Reason.IDLE: "nothing runs",
    Reason.QUEUE_BUILDING: "requests wait at the engine",
    Reason.OVER_CAPACITY: "load beyond the profiled SLO range",
    Reason.STALE_TELEMETRY: "its load is unknown",
    Reason.NO_PROFILE: "nothing was measured for this configuration",
    Reason.NOT_SERVING: "it serves nothing yet",
    Reason.DEADLINES_AT_RISK: "requests that wait for its pool are about to miss their deadlines",
}
