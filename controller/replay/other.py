"""`dynamollm replay --policy`: what another policy would have done with the recorded load, and drawn.

The recorded load and the recorded GPUs, but the fleet's answers must follow the other policy's orders: a shadow fleet
gives them (a start takes as long as starts took, a drained instance is gone at the next tick). Both policies run
against the same shadow, so that the comparison is fair to both; energy is the profile's prediction, second by second.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Engine

from common.errors import UserError
from controller.config import ControllerConfig
from controller.domain.classes import ALL_CLASSES, RequestClass
from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode
from controller.fleet.port import (
    UP,
    DrainInstance,
    Effect,
    EffectDone,
    GpuObservation,
    InstanceObservation,
    InstanceState,
    LoadSeen,
    NodeObservation,
    NodeSeen,
    Solve,
    StartInstance,
    StopInstance,
    Tick,
)
from controller.loop.core import Core
from controller.loop.orders import CorrectProfile, NoteEngines
from controller.loop.settings import LoopSettings
from controller.loop.snapshot import settings_of
from controller.loop.state import Instant
from controller.policy.milp.plan import plan_for
from controller.policy.routing import pools_for
from controller.replay.inputs import Reader, Stretch, core_of, stretches

Policy = Callable[[LoopSettings], LoopSettings]
_SECTIONS = ("planning", "periods", "knobs", "staleness", "lease")
_NAMES = {("lease", "ttl_s"): "lease_ttl_s"}


@dataclass(slots=True)
class Outcome:
    """What one policy came to over the whole span."""

    name: str
    seconds: float = 0.0
    energy_kwh: float = 0.0
    mean_gpus: float = 0.0
    mean_mhz: float = 0.0
    short_ratio: float = 0.0  # share of the time in which some pool's load was beyond what its instances carry
    decisions: int = 0
    layout_changes: int = 0
    starts: int = 0
    clock_changes: int = 0


def compare(engine: Engine, since_s: float, until_s: float, policy: Policy) -> tuple[Outcome, Outcome]:
    """The policy as it was set, and the other one. Raises UserError where there are no inputs."""
    found = stretches(engine, since_s, until_s)
    if not found:
        raise UserError("no inputs of that time are in the history.", "Name another time with --from and --to.")
    before = _run(engine, found, since_s, until_s, "as it was set", lambda settings: settings)
    return before, _run(engine, found, since_s, until_s, "the other policy", policy)


def read_policy(path: Path) -> Policy:
    """Sections of a controller.toml; keys that are not given stay as they were set. Raises UserError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from None
    unknown = set(data) - set(ControllerConfig.model_fields)
    if unknown:
        raise UserError(f"{path}: unknown keys: {', '.join(sorted(unknown))}.", f"A policy has {', '.join(_SECTIONS)}.")
    given = {name: data[name] for name in _SECTIONS if name in data}
    if not given:
        raise UserError(f"{path}: names no policy.", f"Give at least one of the sections {', '.join(_SECTIONS)}.")
    sample = ControllerConfig.sample()
    try:
        config = ControllerConfig(profile=sample.profile, model=sample.model, agents=sample.agents, **given)
        wanted = config.loop_settings()
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path}: {error}.") from None

    def apply(settings: LoopSettings) -> LoopSettings:
        changes: dict[str, Any] = {}
        for section, keys in given.items():
            if section == "knobs":
                changes["knobs"] = replace(settings.knobs, **keys)
                continue
            for key in keys:
                name = _NAMES.get((section, key), key)
                changes[name] = getattr(wanted, name)
        try:
            return replace(settings, **changes)
        except ValueError as error:
            raise UserError(f"{path}: together with what was set: {error}.") from None

    return apply


def _run(
    engine: Engine, found: Iterable[Stretch], since_s: float, until_s: float, name: str, policy: Policy
) -> Outcome:
    total = Outcome(name)
    gpu_s = mhz_s = serving_s = short_s = 0.0
    for stretch in found:
        core = core_of(engine, stretch, policy(settings_of(dict(stretch.snapshot))))
        shadow = _Shadow(core, since_s, until_s)
        shadow.follow(stretch)
        total.seconds += shadow.seconds
        total.energy_kwh += shadow.energy_j / 3.6e6
        total.decisions += len(shadow.decisions)
        total.layout_changes += sum(
            1 for d in shadow.decisions if d.level is not Level.INSTANCE and d.outcome.get("counts") and _changed(d)
        )
        total.starts += shadow.starts
        total.clock_changes += sum(1 for d in shadow.decisions if "mhz" in d.outcome)
        gpu_s += shadow.gpu_s
        mhz_s += shadow.mhz_s
        serving_s += shadow.serving_s
        short_s += shadow.short_s
    if total.seconds:
        total.mean_gpus = gpu_s / total.seconds
        total.short_ratio = short_s / total.seconds
    total.mean_mhz = mhz_s / serving_s if serving_s else 0.0
    return total


def _changed(decision: Decision) -> bool:
    return bool(decision.outcome.get("accepted")) and decision.reason.value not in ("plan_kept", "no_load_data")


@dataclass(slots=True)
class _Shadow:
    """A fleet that does what it is told, in the recorded time."""

    core: Core
    since_s: float
    until_s: float
    gpus: dict[str, tuple[GpuObservation, ...]] = field(default_factory=dict)
    seen_s: dict[str, float] = field(default_factory=dict)
    instances: dict[str, tuple[str, InstanceObservation]] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)
    due_s: dict[Level, float] = field(default_factory=dict)
    wall_offset_s: float = 0.0
    last_s: float | None = None
    seconds: float = 0.0
    energy_j: float = 0.0
    gpu_s: float = 0.0
    mhz_s: float = 0.0
    serving_s: float = 0.0
    short_s: float = 0.0
    starts: int = 0
    decisions: list[Decision] = field(default_factory=list)

    def follow(self, stretch: Stretch) -> None:
        state = self.core.state
        state.mode, state.modes = Mode.ACTIVE, {}
        state.solving.clear()
        state.acting.clear()
        state.capping.clear()
        for node in state.nodes.values():
            self._node(node)
            for seen in node.instances:
                if seen.state in UP:
                    self._put(node.node_id, replace(seen, state=InstanceState.READY, running=None, waiting=None))
        state.draining.clear()
        reader = Reader(self.core)
        for frame in stretch.frames:
            for told in reader.events(frame):
                now_s = told.now.monotonic_s
                if told.now.wall_s:
                    self.wall_offset_s = told.now.wall_s - now_s
                if now_s + self.wall_offset_s >= self.until_s:
                    return
                self._tick_until(now_s)
                match told.event:
                    case NodeSeen(observation):
                        self._node(observation)
                        if not self.due_s:
                            self._show(now_s)
                            self._begin_ticks(now_s)
                    case LoadSeen():
                        self._handle(now_s, told.event)
                    case CorrectProfile() | NoteEngines():  # what was known of the profile holds for any policy
                        self.core.order(Instant(now_s, now_s + self.wall_offset_s), told.event)
                    case _:
                        pass

    def _node(self, seen: NodeObservation) -> None:
        self.gpus[seen.node_id] = seen.gpus
        self.seen_s[seen.node_id] = seen.observed_at_s

    def _put(self, node_id: str, instance: InstanceObservation) -> None:
        self.instances[instance.instance_id] = (node_id, instance)

    # ------------------------------------------------------------------------------------------------- time

    def _begin_ticks(self, now_s: float) -> None:
        settings = self.core.state.settings
        self.due_s = {
            Level.INSTANCE: now_s + settings.instance_s,
            Level.POOL: now_s + settings.pool_s,
            Level.CLUSTER: now_s + settings.cluster_s,
        }

    def _tick_until(self, until_s: float) -> None:
        settings = self.core.state.settings
        periods = {
            Level.INSTANCE: settings.instance_s,
            Level.POOL: settings.pool_s,
            Level.CLUSTER: settings.cluster_s,
        }
        while self.due_s and min(self.due_s.values()) <= until_s:
            level = min(self.due_s, key=lambda item: (self.due_s[item], list(Level).index(item)))
            at_s = self.due_s[level]
            self.due_s[level] += periods[level]
            if level is Level.INSTANCE:
                self._show(at_s)
                self._account(at_s)
            self._handle(at_s, Tick(level))

    def _show(self, now_s: float) -> None:
        """What the agents would report; a node that was silent then is silent here."""
        for instance_id, at_s in list(self.ready_s.items()):
            if at_s <= now_s and instance_id in self.instances:
                node_id, seen = self.instances[instance_id]
                self._put(node_id, replace(seen, state=InstanceState.READY))
                del self.ready_s[instance_id]
        for node_id, gpus in self.gpus.items():
            here = tuple(seen for owner, seen in self.instances.values() if owner == node_id)
            self._handle(now_s, NodeSeen(NodeObservation(node_id, self.seen_s[node_id], gpus, here)))
        self.instances = {
            key: item for key, item in self.instances.items() if item[1].state is not InstanceState.STOPPED
        }

    # -------------------------------------------------------------------------------------------- the controller

    def _handle(self, now_s: float, event: NodeSeen | LoadSeen | Tick | EffectDone) -> None:
        step = self.core.handle(Instant(now_s, now_s + self.wall_offset_s), event)
        if now_s + self.wall_offset_s >= self.since_s:
            self.decisions += step.decisions
        for effect in step.effects:
            self._carry_out(now_s, effect)
        if step.tick_early:
            self._handle(now_s, Tick(Level.INSTANCE, early=True))

    def _carry_out(self, now_s: float, effect: Effect) -> None:
        state = self.core.state
        match effect:
            case Solve():
                solution = plan_for(effect.problem)
                self._handle(now_s, EffectDone(effect.effect_id, solution.chosen is not None, solution=solution))
                return
            case StartInstance():
                self.starts += now_s + self.wall_offset_s >= self.since_s
                started = InstanceObservation(
                    effect.instance_id, effect.model, effect.pool, effect.gpu_uuids, InstanceState.STARTING, "shadow"
                )
                self._put(effect.node_id, started)
                self.ready_s[effect.instance_id] = now_s + state.start_s(len(effect.gpu_uuids))
            case DrainInstance() | StopInstance():
                owner = self.instances.get(effect.instance_id)
                if owner is not None:
                    after = InstanceState.DRAINING if isinstance(effect, DrainInstance) else InstanceState.STOPPED
                    self._put(owner[0], replace(owner[1], state=after, running=0.0, waiting=0.0))
            case _:
                pass
        self._handle(now_s, EffectDone(effect.effect_id, ok=True))

    # ------------------------------------------------------------------------------------------------- the ledger

    def _account(self, now_s: float) -> None:
        last_s, self.last_s = self.last_s, now_s
        if last_s is None or last_s + self.wall_offset_s < self.since_s:
            return
        state = self.core.state
        seconds = now_s - last_s
        self.seconds += seconds
        rates, carried = self._rates(now_s), self._carried()
        self.short_s += seconds * any(rate > carried.get(pool, 0.0) for pool, rate in rates.items() if rate > 0)
        used = 0
        power_w = 0.0
        for _, seen in self.instances.values():
            used += seen.tp
            if seen.state is InstanceState.STARTING:
                power_w += state.start_j(seen.tp) / state.start_s(seen.tp)
                continue
            pool = state.pool_of(seen)
            clock = state.clocks.get(seen.instance_id)
            mhz = clock.mhz if clock is not None and clock.mhz is not None else state.profile.full_mhz
            share = min(1.0, rates.get(pool, 0.0) / carried[pool]) if carried.get(pool) else 0.0
            power_w += self._power_w(pool, seen.tp, mhz, share)
            self.mhz_s += seen.tp * mhz * seconds
            self.serving_s += seen.tp * seconds
        empty = sum(len(gpus) for gpus in self.gpus.values()) - used
        power_w += state.profile.parked_w * max(0, empty)
        self.gpu_s += used * seconds
        self.energy_j += power_w * seconds

    def _power_w(self, pool: str, tp: int, mhz: int, share: float) -> float:
        """At its share of the pool's load; at a clock that does not carry it, as much as that clock can draw."""
        state = self.core.state
        rate = share * state.fit.max_rate_rps(pool, tp)
        curve = min(state.fit.clocks(pool, tp), key=lambda c: abs(c.mhz - mhz), default=None)
        if curve is None:
            return state.profile.parked_w * tp
        return curve.power_w(min(rate, curve.rates_rps[-1])) or curve.powers_w[-1]

    def _rates(self, now_s: float) -> dict[str, float]:
        """Equivalent requests/s by pool."""
        state = self.core.state
        rates = state.load.rates_rps(now_s, state.settings.load_window_s)
        if rates is None or state.routing is None:
            return {}
        tokens = state.load.mean_tokens(now_s, max(state.settings.load_window_s, 60.0))
        shares: dict[str, dict[RequestClass, float]] = {}
        for request_class in ALL_CLASSES:
            own = pools_for(state.routing.pools, request_class)
            if own and rates.get(request_class):
                shares.setdefault(own[0].name, {})[request_class] = rates[request_class]
        return {name: state.profile.equivalent_rate(name, share, tokens) for name, share in shares.items()}

    def _carried(self) -> dict[str, float]:
        state = self.core.state
        carried: dict[str, float] = {}
        for _, seen in self.instances.values():
            if seen.state is InstanceState.READY:
                pool = state.pool_of(seen)
                carried[pool] = carried.get(pool, 0.0) + state.fit.max_rate_rps(pool, seen.tp)
        return carried
