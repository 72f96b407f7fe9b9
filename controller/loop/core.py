"""The core of the loop: one event in, decisions and effects out. Synchronous; the time comes with the event.

The runtime, the simulator and the replay all drive this one class. It keeps no thread, no timer and no connection;
whatever takes time is an effect whose result comes back as an `EffectDone` event.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode
from controller.fleet.port import (
    GONE,
    Effect,
    EffectDone,
    Event,
    InstanceState,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    Tick,
)
from controller.loop import budget, cluster, instance, modes, pool, provision, refusing, serving
from controller.loop.demand import foresee
from controller.loop.load import LoadBook
from controller.loop.orders import CorrectProfile, NoteEngines, NotePower, Order, PlanNow, SetMode, SetPowerBudget
from controller.loop.planning import drop_from_layout, lay_out
from controller.loop.profile_in_use import columns_of, correct, curves_of, note_engines
from controller.loop.settings import LoopSettings
from controller.loop.state import Instant, PoolPlan, State, Turn
from controller.loop.week import WeekBook
from controller.profile.table import Profile
from controller.store.records import PlanRecord

# How long the windows of load are kept, in cluster epochs.
_KEEP_EPOCHS = 2
_LEAST_KEPT_S = 900.0


@dataclass(frozen=True, slots=True)
class Step:
    """What one event led to. `effects` are to be begun in this order. `tick_early`: an early tick of the instance
    manager is to be told as the next event; it is an event of its own so that a journal holds what it saw."""

    decisions: tuple[Decision, ...]
    effects: tuple[Effect, ...]
    tick_early: bool = False


_NOTHING = Step((), ())


class Core:
    """The hierarchical controller of one model's fleet."""

    def __init__(
        self,
        settings: LoopSettings,
        profile: Profile,
        term: int,
        expected_nodes: int,
        mode: Mode = Mode.ACTIVE,
        plan: PlanRecord | None = None,
        week: WeekBook | None = None,
    ) -> None:
        """`plan` and `week` are those recorded last: a restarted controller carries on from them."""
        curves = curves_of(settings, profile)
        self.state = State(
            settings=settings,
            profile=profile,
            profile_checksum=profile.checksum(),
            fit=curves,
            columns=columns_of(settings, curves),
            term=term,
            mode=mode,
            load=LoadBook(keep_s=max(_LEAST_KEPT_S, _KEEP_EPOCHS * settings.cluster_s)),
            expected_nodes=expected_nodes,
            week=week or WeekBook(),
        )
        if plan is not None:
            _restore(self.state, plan)

    def handle(self, now: Instant, event: Event) -> Step:
        """Answers one event."""
        state = self.state
        if state.first_event_s is None:
            state.first_event_s = now.monotonic_s
        turn = Turn(now, state)
        match event:
            case NodeSeen():
                self._node_seen(turn, event.observation)
            case LoadSeen():
                if event.observation.model == state.settings.model:
                    window = state.load.add(event.observation)
                    if window is not None:
                        state.week.add(now, window)
                        return Step((), (), tick_early=state.mode is not Mode.PAUSED and serving.burst_begins(turn))
            case EffectDone():
                self._effect_done(turn, event)
            case Tick():
                if state.mode is not Mode.PAUSED:
                    if event.early:
                        instance.tick_early(turn)
                    else:
                        self._tick(turn, event.level)
        return self._step(turn)

    def order(self, now: Instant, order: Order) -> Step:
        """Takes an order of an operator."""
        turn = Turn(now, self.state)
        match order:
            case SetMode():
                modes.set_mode(turn, order)
            case NotePower():
                provision.note_power(turn, order)
            case PlanNow():
                self._plan_now(turn, order.why)
            case SetPowerBudget():
                if budget.set_budget(turn, order):
                    self._plan_now(turn, "budget")
            case CorrectProfile():
                if correct(turn, order):
                    self._plan_now(turn, "drift")
            case NoteEngines():
                note_engines(turn, order)
        return self._step(turn)

    def _plan_now(self, turn: Turn, why: str) -> None:
        state = turn.state
        if state.pools and state.mode is not Mode.PAUSED and state.may_act(turn.now.monotonic_s):
            cluster.tick(turn, why)
            for name in sorted(state.pools):
                if state.mode_of(name, "") is not Mode.PAUSED:
                    pool.tick(turn, name, why)

    def _step(self, turn: Turn) -> Step:
        if not turn.effects and not turn.decisions:  # nearly all observations
            return _NOTHING
        effects = modes.allowed(turn.state, turn.effects)
        ids = tuple(effect.effect_id for effect in effects)
        return Step(tuple(replace(decision, effects=ids) for decision in turn.decisions), tuple(effects))

    def _tick(self, turn: Turn, level: Level) -> None:
        state = turn.state
        if not state.may_act(turn.now.monotonic_s):
            return
        if not state.pools:
            cluster.tick(turn, "start")
        elif state.foreign_engines and level is not Level.INSTANCE:
            return  # the layout is held: what another one would carry or draw is not known
        elif level is Level.CLUSTER:
            cluster.tick(turn, "tick")
        elif level is Level.POOL:
            foresee(turn)
            for name in sorted(state.pools):
                if state.mode_of(name, "") is not Mode.PAUSED:
                    pool.tick(turn, name, "tick")
        if level is Level.INSTANCE:
            if budget.tick(turn):
                self._plan_now(turn, "budget")
            provision.tick(turn)
            if refusing.due(turn):
                self._plan_now(turn, "node_tried_again")
            if state.pools and self._lost_wanted(turn):
                cluster.tick(turn, "node_lost")
            instance.tick(turn)

    def _lost_wanted(self, turn: Turn) -> bool:
        """True when the layout counts on a node that is lost."""
        state, now_s = turn.state, turn.now.monotonic_s
        return any(state.is_lost(wanted.node_id, now_s) for wanted in state.layout.instances)

    def _node_seen(self, turn: Turn, told: NodeObservation) -> None:
        state, seen = turn.state, _sensible(told)
        back = provision.seen(turn, seen)
        if back is None:
            return
        before = state.nodes.get(seen.node_id)
        state.nodes[seen.node_id] = seen
        for effect_id, step in list(state.acting.items()):
            if step.done and step.node_id == seen.node_id:
                del state.acting[effect_id]
        for observed in seen.instances:
            if observed.state is InstanceState.READY and {"start", "warm"} & observed.step_seconds.keys():
                took_s = observed.step_seconds.get("start", 0.0) + observed.step_seconds.get("warm", 0.0)
                state.measured_start_s[observed.tp] = max(took_s, state.measured_start_s.get(observed.tp, 0.0))
            elif observed.state in GONE:
                state.draining.discard(observed.instance_id)
        if state.mode is Mode.PAUSED or not state.pools:
            return
        if back:
            self._plan_now(turn, "node_back")
        elif _let_go(turn, before, seen):
            self._plan_now(turn, "operator")
        # A change of any instance's state is acted on at once, not at the next tick.
        if before is None or _changed(before, seen):
            for observed in seen.instances:
                if observed.state is InstanceState.FAILED and _states(before).get(observed.instance_id) not in (
                    None,
                    InstanceState.FAILED,
                ):
                    state.failures[observed.instance_id] = state.failures.get(observed.instance_id, 0) + 1
            instance.reconcile_now(turn)

    def _effect_done(self, turn: Turn, done: EffectDone) -> None:
        state = turn.state
        budget.done(turn, done)
        provision.done(turn, done)
        acted = state.acting.get(done.effect_id)
        if acted is not None and done.ok:
            acted.done = True
        elif acted is not None:
            del state.acting[done.effect_id]
            if acted.kind == "start":
                state.failures[acted.instance_id] = state.failures.get(acted.instance_id, 0) + 1
            elif acted.kind == "drain":
                state.draining.discard(acted.instance_id)
        if acted is not None and acted.kind == "start" and refusing.answered(turn, acted.node_id, done.ok, done.detail):
            self._plan_now(turn, "node_refuses")
        pending = state.solving.pop(done.effect_id, None)
        if pending is None or done.solution is None:
            return
        if budget.is_outdated(state, pending):
            # Nothing may be switched to that a budget set meanwhile does not allow.
            if pending.level is Level.CLUSTER:
                cluster.tick(turn, "budget")
            elif pending.pool in state.pools:
                pool.tick(turn, pending.pool, "budget")
        elif pending.level is Level.CLUSTER:
            cluster.on_solution(turn, pending, done.solution)
        elif pool.on_solution(turn, pending, done.solution) and self._may_ask_cluster(turn):
            cluster.tick(turn, "capacity_needed")
        instance.reconcile_now(turn)

    def _may_ask_cluster(self, turn: Turn) -> bool:
        """A pool may call for a cluster plan at most once per pool period, or an overload would plan without end."""
        state = turn.state
        return state.last_cluster_s is None or turn.now.monotonic_s - state.last_cluster_s >= state.settings.pool_s


def _let_go(turn: Turn, before: NodeObservation | None, seen: NodeObservation) -> bool:
    """Has what an operator took planned elsewhere. True when that, or the GPUs that plans may use, changed."""
    if not seen.held and (before is None or not before.held):
        return False
    state = turn.state
    taken = {instance.instance_id for instance in seen.held}
    for instance_id in taken:
        state.draining.discard(instance_id)
        state.clocks.pop(instance_id, None)
    wanted = not taken.isdisjoint(state.layout.by_id())
    if wanted:
        drop_from_layout(state, taken)
        lay_out(state, turn.now)
    return wanted or seen.held_gpus != (before.held_gpus if before else frozenset())


def _sensible(seen: NodeObservation) -> NodeObservation:
    """A reading that cannot be (NaN, infinite, negative) is unknown."""
    if all(_can_be(v) for i in seen.instances for v in (i.running, i.waiting, i.kv_usage_ratio)):
        return seen
    instances = tuple(
        replace(
            instance,
            running=instance.running if _can_be(instance.running) else None,
            waiting=instance.waiting if _can_be(instance.waiting) else None,
            kv_usage_ratio=instance.kv_usage_ratio if _can_be(instance.kv_usage_ratio) else None,
        )
        for instance in seen.instances
    )
    return replace(seen, instances=instances)


def _can_be(reading: float | None) -> bool:
    return reading is None or 0 <= reading < inf


def _changed(before: NodeObservation, seen: NodeObservation) -> bool:
    """Whether any instance came, went or entered another state."""
    return bool(before.instances or seen.instances) and _states(before) != _states(seen)


def _states(node: NodeObservation | None) -> dict[str, InstanceState]:
    return {observed.instance_id: observed.state for observed in node.instances} if node else {}


def _restore(state: State, plan: PlanRecord) -> None:
    """Takes up a recorded plan. One with pools that the profile does not know is left: the first tick plans anew."""
    known = {group.name for group in state.profile.groups}
    if not set(plan.pools) <= known:
        return
    for name, item in plan.pools.items():
        state.pools[name] = PoolPlan(
            group=state.profile.group(name),
            granted_gpus=item["granted_gpus"],
            counts={int(tp): n for tp, n in item["counts"].items()},
            demand_rps=item["demand_rps"],
            decided_by=0,
            decided_at_s=float("-inf"),
        )
    state.layout = plan.layout
    state.routed_as = {wanted.instance_id: wanted.pool for wanted in plan.layout.instances}
