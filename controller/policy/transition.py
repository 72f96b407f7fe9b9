"""Transition: the next steps from what is there to what is wanted, never dropping a class under its demand.

Reconciles: called every fast tick with the present truth, it keeps no state of its own, so a restart at any point
is safe and repeating a call repeats its answer. Capacity first: what grows comes up before what shrinks goes down,
unless no GPU is free. A change of pool label counts as a step, since it takes capacity from one pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from controller.domain.classes import RequestClass
from controller.domain.layout import Layout, PlannedInstance
from controller.domain.reasons import StepReason
from controller.fleet.port import COMES_UP, GOES, HOLDS_GPUS, UP, InstanceState


@dataclass(frozen=True, slots=True)
class ActualInstance:
    """One instance that an agent reports (those whose node is lost are left out)."""

    instance_id: str
    pool: str  # that it is routed as now
    node_id: str
    gpu_uuids: tuple[str, ...]
    state: InstanceState
    running: float | None  # None: not known
    waiting: float | None
    attempts: int = 0  # failed starts of this id so far

    @property
    def tp(self) -> int:
        return len(self.gpu_uuids)


@dataclass(frozen=True, slots=True)
class CapacityModel:
    """What instances can carry and what they must.

    `work` has (pool, class) for the classes that the pool is meant to serve: equivalent requests of that pool that
    one request of the class is worth (`Profile.request_weight`)."""

    rates_rps: Mapping[RequestClass, float]  # demand, requests/s
    max_rate_rps: Mapping[tuple[str, int], float]  # (pool, tp) -> equivalent requests/s in SLO
    work: Mapping[tuple[str, RequestClass], float]


class StepKind(StrEnum):
    START = "start"
    RELABEL = "relabel"  # route it as `pool` from now on; no effect on the fleet but the routing table
    DRAIN = "drain"
    STOP = "stop"
    WAIT = "wait"  # nothing to do yet; the reason says for what


@dataclass(frozen=True, slots=True)
class Step:
    kind: StepKind
    instance_id: str
    node_id: str
    pool: str  # after the step
    gpu_uuids: tuple[str, ...]
    reason: StepReason
    sentence: str


_Kind = tuple[str, int]  # pool, tp


@dataclass(frozen=True, slots=True)
class _Move:
    """An instance that serves as one kind will serve as another, or not at all."""

    of: _Kind | None
    to: _Kind | None


def can_roll(
    present: Mapping[_Kind, int],
    wanted: Mapping[_Kind, int],
    free_gpus: int,
    carries: Callable[[Mapping[_Kind, int]], bool],
) -> bool:
    """Whether `wanted` instances by (pool, tp) can be reached from `present` ones without a gap: what fits beside the
    others starts, then one instance after the other makes room, and the rest `carries` the demand each time.

    How GPUs lie on hosts is left out: two freed TP4 of different hosts make no TP8. Then the way is longer, not wrong:
    `next_steps` never lets go of what the demand needs.
    """
    there, free = Counter(present), free_gpus
    while missing := Counter(wanted) - there:
        fitting = [kind for kind in missing if kind[1] <= free]
        if fitting:
            widest = max(fitting, key=lambda kind: (kind[1], kind))
            there[widest] += 1
            free -= widest[1]
            continue
        spare = there - Counter(wanted)
        goes = [kind for kind in sorted(spare, key=lambda kind: (kind[1], kind)) if carries(there - Counter([kind]))]
        if not goes:
            return False
        there -= Counter([goes[0]])
        free += goes[0][1]
    return True


@dataclass(frozen=True, slots=True)
class TransitionSettings:
    # At once: only part of a pool is ever on its way out. The larger of the two.
    max_drains_per_pool: int = 1
    max_drain_share: float = 0.2
    max_attempts: int = 3  # starts of one wanted instance before it is given up
    # A pool gives nothing away whose GPUs nobody waits for before what comes up for it is there: the load of the moment
    # says what is missed at once, and not what the pool holds in reserve for the next.
    make_first: bool = True
    # A forced break may miss this many times what standing still misses: it lasts a drain and a start, while standing
    # still lasts until the load changes.
    max_break_ratio: float = 2.0


@dataclass(frozen=True, slots=True)
class Transition:
    """`done` when what is there is what is wanted. `given_up` are wanted instances that will not start where they
    are planned: plan their place anew. `stuck` when no step is possible without dropping more demand than the change
    is worth: take what is there as wanted (`standing_layout`) and plan from it."""

    steps: tuple[Step, ...]
    done: bool
    stuck: bool
    given_up: tuple[str, ...]
    shortfall_rps: float  # demand that serving instances do not carry now


def next_steps(
    wanted: Layout,
    actual: tuple[ActualInstance, ...],
    usable_gpus: frozenset[str],
    capacity: CapacityModel,
    settings: TransitionSettings | None = None,
    allow_shortfall: bool = False,
) -> Transition:
    """All steps that may be taken now, in order; acting on all of them at once is safe.

    `allow_shortfall` says that the wanted layout is needed for its capacity: then, when nothing can grow because no
    GPU is free and demand is missed already, the instance whose loss hurts least goes first although more is missed
    meanwhile, up to `max_break_ratio`.
    """
    settings = settings or TransitionSettings()
    plan = {i.instance_id: i for i in sorted(wanted.instances, key=lambda i: i.instance_id)}
    there = sorted(actual, key=lambda i: i.instance_id)
    serving = {i.instance_id: (i.pool, i.tp) for i in there if i.state is InstanceState.READY}
    short_rps = shortfall_rps(serving.values(), capacity)

    growing, given_up = _grow(plan, there, usable_gpus, settings)
    leaving = [step for i in there if (step := _leave(i, plan.get(i.instance_id))) is not None]
    labels, drains = _label_changes(plan, there), _drains(plan, there, growing)
    drains, later = _for_later(drains, growing) if settings.make_first else (drains, [])
    # Another partition of the classes is another label on many at once: one after the other there may be no way.
    at_once, singly = (labels, []) if _may_all(labels, serving, capacity) else ([], labels)
    taken, held_back = _take(singly + drains, serving, capacity, _draining(there), settings)
    steps = [*growing, *leaving, *at_once, *taken, *(_held_back(change, stuck=False) for change in later)]

    moving = any(s.kind is not StepKind.WAIT or s.reason in _UNDER_WAY for s in steps)
    stuck = bool(held_back) and not moving
    # While a wanted instance has nowhere to start, a break would be made for nothing.
    if stuck and not given_up:
        forced = _smallest_break(held_back, _awaited_gpus(growing), plan, serving, capacity, settings, allow_shortfall)
        if forced is not None:
            steps.append(forced)
            held_back = [c for c in held_back if c.instance_id != forced.instance_id]
            stuck = False
    steps += [_held_back(change, stuck) for change in held_back]
    return Transition(
        steps=tuple(steps),
        done=not steps,
        stuck=stuck,
        given_up=given_up,
        shortfall_rps=short_rps,
    )


def standing_layout(wanted: Layout, actual: tuple[ActualInstance, ...], model: str) -> Layout:
    """What is there, or on its way up, as a layout: the one to want when a transition is stuck. Instances stay in the
    pool that they are routed as."""
    up = [i for i in actual if i.state in UP]
    claimed = {uuid for i in up for uuid in i.gpu_uuids}
    stopped = {i.instance_id for i in actual if i.state not in UP and i.state in HOLDS_GPUS}
    names = {i.instance_id for i in up}
    waiting = [p for p in wanted.instances if p.instance_id not in names | stopped and claimed.isdisjoint(p.gpu_uuids)]
    standing = [PlannedInstance(i.instance_id, i.pool, model, i.node_id, i.gpu_uuids) for i in up] + waiting
    return Layout(tuple(sorted(standing, key=lambda i: i.instance_id)))


# Waiting for these ends by itself.
_UNDER_WAY = (StepReason.WAITING_FOR_READY, StepReason.WAITING_FOR_DRAIN)


def shortfall_rps(serving: Iterable[tuple[str, int]], capacity: CapacityModel) -> float:
    """Requests/s of demand that instances (pool, tp) cannot carry within the SLO; 0 when all is carried."""
    return _shortfall_rps(Counter(serving), capacity)


def _shortfall_rps(kinds: Mapping[_Kind, int], capacity: CapacityModel) -> float:
    """The same by how many there are of each kind: thousands of instances are of a few kinds.

    Classes with the fewest pools are filled first, each from its most special pool on: with pools that are nested
    or apart (as partitions are) no other order carries more.
    """
    left: dict[str, float] = {}
    for (pool, tp), n in kinds.items():
        left[pool] = left.get(pool, 0.0) + n * capacity.max_rate_rps.get((pool, tp), 0.0)
    breadth = Counter(pool for pool, _ in capacity.work)
    choices = {c: sorted((breadth[p], p) for p in left if (p, c) in capacity.work) for c in capacity.rates_rps}
    missing = 0.0
    for request_class in sorted(choices, key=lambda c: (len(choices[c]), c)):
        rate = max(0.0, capacity.rates_rps[request_class])
        for _, pool in choices[request_class]:
            weight = capacity.work[pool, request_class]
            carried = min(rate, left[pool] / weight) if weight > 0 else rate
            left[pool] -= carried * weight
            rate -= carried
        missing += rate
    return missing if missing > 1e-9 else 0.0


def _covered(kinds: Mapping[_Kind, int], capacity: CapacityModel) -> set[RequestClass]:
    """Classes that some serving instance is meant for: one without load now may have some the next second."""
    pools = {pool for pool, _ in kinds}
    return {request_class for pool, request_class in capacity.work if pool in pools}


# ------------------------------------------------------------------------------------------- what comes up


def _grow(
    plan: Mapping[str, PlannedInstance],
    there: list[ActualInstance],
    usable_gpus: frozenset[str],
    settings: TransitionSettings,
) -> tuple[list[Step], tuple[str, ...]]:
    """Starts of wanted instances whose GPUs are free, and what the others wait for."""
    found = {i.instance_id: i for i in there}
    owners = {uuid: i.instance_id for i in there if i.state in HOLDS_GPUS for uuid in i.gpu_uuids}
    steps: list[Step] = []
    given_up: list[str] = []
    for planned in plan.values():
        instance = found.get(planned.instance_id)
        state = instance.state if instance is not None else InstanceState.STOPPED
        if state in COMES_UP:
            steps.append(_planned(StepKind.WAIT, planned, StepReason.WAITING_FOR_READY, f"is {state.value}"))
        if state in HOLDS_GPUS and state is not InstanceState.QUARANTINED:
            continue
        attempts = instance.attempts if instance is not None else 0
        bad = sorted(set(planned.gpu_uuids) - usable_gpus)
        busy = sorted({owners[u] for u in planned.gpu_uuids if u in owners})
        if state is InstanceState.QUARANTINED or bad:
            given_up.append(planned.instance_id)
            why = f"GPU {bad[0]} is not usable" if bad else "is quarantined"
            steps.append(_planned(StepKind.WAIT, planned, StepReason.LOST, f"{why}: plan its place anew"))
        elif attempts >= settings.max_attempts:
            given_up.append(planned.instance_id)
            steps.append(
                _planned(StepKind.WAIT, planned, StepReason.LOST, f"failed {attempts} starts: plan its place anew")
            )
        elif busy:
            steps.append(
                _planned(StepKind.WAIT, planned, StepReason.WAITING_FOR_GPU, f"waits for the GPUs of {busy[0]}")
            )
        else:
            owners.update(dict.fromkeys(planned.gpu_uuids, planned.instance_id))
            reason = StepReason.LOST if attempts else StepReason.GROW
            again = f" again, attempt {attempts + 1}" if attempts else ""
            steps.append(_planned(StepKind.START, planned, reason, f"starts{again}"))
    return steps, tuple(given_up)


def _planned(kind: StepKind, planned: PlannedInstance, reason: StepReason, what: str) -> Step:
    sentence = f"{planned.instance_id} (pool {planned.pool}, TP{planned.tp}) {what}."
    return Step(kind, planned.instance_id, planned.node_id, planned.pool, planned.gpu_uuids, reason, sentence)


# ----------------------------------------------------------------------------------------- what goes down


def _leave(instance: ActualInstance, planned: PlannedInstance | None) -> Step | None:
    """The step of an instance that serves nothing new any more, or never has; None for any other."""
    match instance.state:
        case InstanceState.DRAINING:
            # A drain cannot be taken back: a wanted one goes too and is started again.
            if instance.running == 0 and instance.waiting == 0:
                return _actual(StepKind.STOP, instance, StepReason.RETIRE, "is empty and stops")
            left = "an unknown number of" if instance.running is None else f"{instance.running:.0f}"
            return _actual(StepKind.WAIT, instance, StepReason.WAITING_FOR_DRAIN, f"has {left} requests left")
        case InstanceState.STOPPING:
            return _actual(StepKind.WAIT, instance, StepReason.WAITING_FOR_DRAIN, "is stopping")
        case InstanceState.STARTING | InstanceState.WARMING if planned is None:
            return _actual(StepKind.STOP, instance, StepReason.RETIRE, "is not wanted any more and never served: stops")
        case InstanceState.ASLEEP:
            return _actual(StepKind.STOP, instance, StepReason.RETIRE, "is asleep and stops to give its GPUs back")
        case _:
            return None


def _label_changes(plan: Mapping[str, PlannedInstance], there: list[ActualInstance]) -> list[Step]:
    changes = []
    for instance in there:
        planned = plan.get(instance.instance_id)
        if planned is not None and planned.pool != instance.pool and instance.state in UP:
            changes.append(
                _planned(StepKind.RELABEL, planned, StepReason.GROW, f"leaves pool {instance.pool} for {planned.pool}")
            )
    return changes


def _drains(plan: Mapping[str, PlannedInstance], there: list[ActualInstance], growing: list[Step]) -> list[Step]:
    """Drains of serving instances that are not wanted; first those whose GPUs others wait for."""
    awaited = _awaited_gpus(growing)
    unwanted = [i for i in there if i.state is InstanceState.READY and i.instance_id not in plan]
    unwanted.sort(key=lambda i: (awaited.isdisjoint(i.gpu_uuids), i.instance_id))
    return [_actual(StepKind.DRAIN, i, StepReason.RETIRE, "is not wanted any more: drains") for i in unwanted]


def _for_later(drains: list[Step], growing: list[Step]) -> tuple[list[Step], list[Step]]:
    """Which drains may be looked at now, and which wait until what comes up for their pool is there."""
    awaited = _awaited_gpus(growing)
    coming = {s.pool for s in growing if s.kind is StepKind.START or s.reason is StepReason.WAITING_FOR_READY}
    at_once: list[Step] = []
    later: list[Step] = []
    for change in drains:
        waits = change.pool in coming and awaited.isdisjoint(change.gpu_uuids)
        (later if waits else at_once).append(change)
    return at_once, later


def _awaited_gpus(growing: list[Step]) -> set[str]:
    return {u for s in growing if s.reason is StepReason.WAITING_FOR_GPU for u in s.gpu_uuids}


def _draining(there: list[ActualInstance]) -> Counter[str]:
    return Counter(i.pool for i in there if i.state in GOES)


def _actual(kind: StepKind, instance: ActualInstance, reason: StepReason, what: str) -> Step:
    sentence = f"{instance.instance_id} (pool {instance.pool}, TP{instance.tp}) {what}."
    return Step(kind, instance.instance_id, instance.node_id, instance.pool, instance.gpu_uuids, reason, sentence)


# ---------------------------------------------------------------------------------- never under the demand


def _may_all(labels: list[Step], serving: dict[str, _Kind], capacity: CapacityModel) -> bool:
    """Whether all label changes together take nothing from the demand; then `serving` follows them."""
    after = dict(serving)
    for change in labels:
        if change.instance_id in after:
            after[change.instance_id] = change.pool, len(change.gpu_uuids)
    before, then = Counter(serving.values()), Counter(after.values())
    if _shortfall_rps(then, capacity) > _shortfall_rps(before, capacity) + 1e-9:
        return False
    if not _covered(before, capacity) <= _covered(then, capacity):
        return False
    serving.update(after)
    return True


def _take(
    changes: list[Step],
    serving: dict[str, _Kind],
    capacity: CapacityModel,
    draining: Counter[str],
    settings: TransitionSettings,
) -> tuple[list[Step], list[Step]]:
    """Which changes may be made at once: each is judged after those before it. `serving` follows what is taken."""
    taken: list[Step] = []
    held_back: list[Step] = []
    drained = Counter(draining)
    members = Counter(pool for pool, _ in serving.values()) + draining
    most = {pool: max(settings.max_drains_per_pool, int(settings.max_drain_share * n)) for pool, n in members.items()}
    kinds = dict(Counter(serving.values()))
    short_rps = _shortfall_rps(kinds, capacity)
    refused: set[_Move] = set()  # since the last one taken: others of their kind would do the same harm
    for change in changes:
        move = _move(serving, change)
        if move in refused or (change.kind is StepKind.DRAIN and drained[change.pool] >= most[change.pool]):
            held_back.append(change)
            continue
        after = _after(kinds, move)
        after_rps = _shortfall_rps(after, capacity)
        if after_rps > short_rps + 1e-9 or not _covered(kinds, capacity) <= _covered(after, capacity):
            refused.add(move)
            held_back.append(change)
            continue
        drained[change.pool] += change.kind is StepKind.DRAIN
        kinds, short_rps = after, after_rps
        refused.clear()
        if move.to is not None:
            serving[change.instance_id] = move.to
        elif move.of is not None:
            del serving[change.instance_id]
        taken.append(change)
    return taken, held_back


def _move(serving: Mapping[str, _Kind], change: Step) -> _Move:
    """What a drain or a relabel does to those that serve; nothing where the instance serves nothing yet."""
    kind = serving.get(change.instance_id)
    leaves = kind is None or change.kind is StepKind.DRAIN
    return _Move(kind, None if leaves else (change.pool, len(change.gpu_uuids)))


def _after(kinds: Mapping[_Kind, int], move: _Move) -> dict[_Kind, int]:
    after = dict(kinds)
    if move.of is not None:
        after[move.of] -= 1
        if not after[move.of]:
            del after[move.of]
    if move.to is not None:
        after[move.to] = after.get(move.to, 0) + 1
    return after


def _smallest_break(
    held_back: list[Step],
    awaited: set[str],
    plan: Mapping[str, PlannedInstance],
    serving: Mapping[str, _Kind],
    capacity: CapacityModel,
    settings: TransitionSettings,
    allow_shortfall: bool,
) -> Step | None:
    """The change that hurts least, when nothing else can move and waiting would change nothing; None when standing
    still is better.

    Demand must be missed already, the wanted layout must miss less, and the break may miss only so much more. A drain
    whose GPUs nobody waits for is never forced: the demand needs that instance, wanted or not."""
    useful = [c for c in held_back if c.kind is StepKind.RELABEL or not awaited.isdisjoint(c.gpu_uuids)]
    now_rps = shortfall_rps(serving.values(), capacity)
    wanted_rps = shortfall_rps(((p.pool, p.tp) for p in plan.values()), capacity)
    gain_rps = now_rps - wanted_rps
    if not useful or not allow_shortfall or gain_rps <= 1e-9:
        return None

    kinds = Counter(serving.values())
    covered = _covered(kinds, capacity)
    harm: dict[_Move, tuple[float, int]] = {}
    for change in useful:
        move = _move(serving, change)
        if move not in harm:
            after = _after(kinds, move)
            harm[move] = _shortfall_rps(after, capacity), len(covered - _covered(after, capacity))
    least = min(useful, key=lambda change: (harm[_move(serving, change)], change.instance_id))
    missed_rps, _ = harm[_move(serving, least)]
    return least if missed_rps - wanted_rps <= settings.max_break_ratio * gain_rps else None


def _held_back(change: Step, stuck: bool) -> Step:
    if stuck:
        reason, why = StepReason.WAITING_FOR_GPU, "stays: no GPU is free for a replacement, and the demand needs it"
    else:
        reason, why = StepReason.WAITING_FOR_READY, "stays until others carry its load or are through with their drain"
    sentence = f"{change.instance_id} (pool {change.pool}, TP{len(change.gpu_uuids)}): {why}."
    return Step(StepKind.WAIT, change.instance_id, change.node_id, change.pool, change.gpu_uuids, reason, sentence)
