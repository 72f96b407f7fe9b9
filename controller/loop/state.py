"""What the core remembers between events, and the turn in which it answers one.

Everything a decision may depend on stands here or in the settings and the profile: nothing hidden, so that a
replay can set it up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controller.domain.classes import ClassGroup, RequestClass
from controller.domain.decision import Decision, Json, SolverReport
from controller.domain.layout import Gpu, Layout, Node
from controller.domain.reasons import Level, Mode, Reason
from controller.fleet.port import Effect, InstanceObservation, InstanceState, NodeObservation, RoutingTable
from controller.loop.load import LoadBook
from controller.loop.orders import NODE_PREFIX, POOL_PREFIX, most_cautious
from controller.loop.settings import LoopSettings
from controller.loop.week import ForecastError, Foreseen, WeekBook
from controller.policy.emergency import Ladder
from controller.policy.milp.problem import Column, PlanProblem
from controller.policy.provision import NodePower
from controller.profile.fit import ProfileFit
from controller.profile.pace import PaceBook
from controller.profile.table import Profile


@dataclass(frozen=True, slots=True)
class Instant:
    """Now, on both clocks."""

    monotonic_s: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """What a pool was granted by the cluster manager and what its manager made of it."""

    group: ClassGroup
    granted_gpus: int
    counts: Mapping[int, int]  # wanted instances by tp
    demand_rps: float  # equivalent requests/s it was planned for
    decided_by: int  # number of the decision
    decided_at_s: float  # monotonic
    carries: bool = True  # False: the grant was too small for the demand


@dataclass(frozen=True, slots=True)
class ChosenClock:
    mhz: int | None  # None: unlocked
    reason: Reason
    at_s: float
    cap_w: float | None = None  # of each GPU, where that was measured to draw less than any lock


@dataclass(frozen=True, slots=True)
class PendingSolve:
    """A problem being solved off the loop, with what is needed to make a decision of its solution."""

    level: Level
    pool: str  # "" for the cluster
    trigger: str
    problem: PlanProblem
    inputs: Json
    cold: bool
    budget_version: int = 0


@dataclass(frozen=True, slots=True)
class Budget:
    """Watts for a scope, until a wall time; None: until it is lifted."""

    watts: float
    until_s: float | None


@dataclass(slots=True)
class HeldCap:
    """A power cap of a GPU: what it may count on now (None: released); what its agent has confirmed, and when; the most
    and the least asked for since, and when the last call about it failed."""

    limit_w: float | None = None
    held_w: float | None = None
    held_at_s: float = float("-inf")
    asked_w: float = 0.0
    asked_least_w: float = float("inf")
    failed_at_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class CapCall:
    """A call about the caps of one node that was not answered yet."""

    node_id: str
    limits_w: Mapping[str, float]
    at_s: float
    release: bool = False


@dataclass(slots=True)
class PoweredNode:
    """A node that the provisioner has turned off or on, and the call to its hook that is under way."""

    power: NodePower
    since_s: float
    failures: int = 0
    retry_at_s: float = float("-inf")
    effect_id: str = ""


@dataclass(frozen=True, slots=True)
class Onset:
    """The largest load of a burst that is under way, and when it was seen."""

    rps: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Refusing:
    """A node's starts that failed in a row, and until when nothing new is placed there."""

    failed: int = 0
    until_s: float = float("-inf")


@dataclass(slots=True)
class ActingStep:
    """A start, drain or stop that was sent out. `done` once the node has answered; it stays until the node's next
    observation, which shows what came of it."""

    kind: str
    instance_id: str
    node_id: str
    done: bool = False


@dataclass(slots=True)
class State:
    settings: LoopSettings
    profile: Profile
    profile_checksum: str
    fit: ProfileFit
    columns: tuple[Column, ...]  # all that the knobs leave to the planner
    term: int
    mode: Mode
    load: LoadBook
    # The load of a week's half hours; by pool, a forecast whose span has not ended, and how far those before were off.
    week: WeekBook = field(default_factory=WeekBook)
    foreseen: dict[str, Foreseen] = field(default_factory=dict)
    forecast_errors: dict[str, ForecastError] = field(default_factory=dict)
    nodes: dict[str, NodeObservation] = field(default_factory=dict)
    expected_nodes: int = 0
    first_event_s: float | None = None
    last_cluster_s: float | None = None
    layout: Layout = field(default_factory=Layout)
    pools: dict[str, PoolPlan] = field(default_factory=dict)
    layout_changed_s: float = float("-inf")
    solving: dict[str, PendingSolve] = field(default_factory=dict)
    # Steps under way by effect id, so that a reconcile does not repeat them.
    acting: dict[str, ActingStep] = field(default_factory=dict)
    # The pool each instance is routed as; a relabel changes it without a restart.
    routed_as: dict[str, str] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    # Ready instances that get no requests: the load does not need them now. Of these, those that get what the others
    # cannot take.
    standby: set[str] = field(default_factory=set)
    on_call: set[str] = field(default_factory=set)
    # By pool, in equivalent requests/s: what bursts may add to the load within seconds, and what must be there for them
    # in all; and when it was looked at last.
    burst_rps: dict[str, float] = field(default_factory=dict)
    burst_needed_rps: dict[str, float] = field(default_factory=dict)
    burst_seen_s: float = float("-inf")
    # By pool, in equivalent requests/s: the load that clocks were last chosen for, and the onset of a burst that goes
    # beyond it, with when it was seen.
    chosen_rps: dict[str, float] = field(default_factory=dict)
    onsets: dict[str, Onset] = field(default_factory=dict)
    # Pools whose bursts are larger than their mean load: there some of those that stand by are on call.
    bursty: frozenset[str] = frozenset()
    looked_ahead_s: float = float("-inf")  # when the plans were last held against the forecast
    asked_s: dict[str, float] = field(default_factory=dict)  # by pool: when it was last planned anew between periods
    # Emergency ladders, by pool, and when the queues were looked at last.
    ladders: dict[str, Ladder] = field(default_factory=dict)
    looked_s: float = float("-inf")
    # The layout was changed because the one before could not carry the demand: it may be reached through a gap.
    layout_forced: bool = False
    failures: dict[str, int] = field(default_factory=dict)
    refusing: dict[str, Refusing] = field(default_factory=dict)  # by node
    clocks: dict[str, ChosenClock] = field(default_factory=dict)
    measured_start_s: dict[int, float] = field(default_factory=dict)  # by tp, the longest seen
    routing: RoutingTable | None = None
    # What live power has shown of the profile: factors by (pool, tp), and kinds that it no longer holds for. Engines
    # that run and that it was not measured on.
    corrections: dict[tuple[str, int], float] = field(default_factory=dict)
    drifted: set[tuple[str, int]] = field(default_factory=set)
    foreign_engines: tuple[str, ...] = ()
    # How many times as long as the profile says engines take, by pool, and what that is estimated from (loop/pace.py).
    paces: dict[str, float] = field(default_factory=dict)
    pace_drifted: set[str] = field(default_factory=set)
    pace: PaceBook = field(default_factory=PaceBook)
    # Modes of pools and nodes that are not active (loop/orders.py names the scopes); the cluster's is `mode`.
    modes: dict[str, Mode] = field(default_factory=dict)
    # Power budgets by scope; how often they have changed; those decided on, found out of reach, and held by now.
    budgets: dict[str, Budget] = field(default_factory=dict)
    budget_version: int = 0
    budgets_known: set[str] = field(default_factory=set)
    budgets_unreachable: set[str] = field(default_factory=set)
    budgets_held: set[str] = field(default_factory=set)
    # The caps that hold them, by GPU; calls to agents under way, by effect id; nodes whose caps are to be taken away.
    caps: dict[str, HeldCap] = field(default_factory=dict)
    capping: dict[str, CapCall] = field(default_factory=dict)
    uncapping: set[str] = field(default_factory=set)
    # Nodes that were turned off or on, and those that are to be turned on as soon as their budget has room; since when
    # each node is empty; when this was looked at last, and what was only advised; the last durations measured.
    powered: dict[str, PoweredNode] = field(default_factory=dict)
    waking: set[str] = field(default_factory=set)
    empty_since_s: dict[str, float] = field(default_factory=dict)
    provisioned_s: float = float("-inf")
    power_advice: tuple[tuple[str, bool], ...] = ()
    boot_s: list[float] = field(default_factory=list)
    off_s: list[float] = field(default_factory=list)
    capped_fits: dict[float, ProfileFit] = field(default_factory=dict)  # by watts of each GPU, made when asked for
    sentences: dict[Level, str] = field(default_factory=dict)
    decision_numbers: int = 0
    effect_numbers: int = 0
    instance_numbers: int = 0

    # ------------------------------------------------------------------------------------- observations

    def instances(self) -> dict[str, tuple[str, InstanceObservation]]:
        """Every instance seen, by id, with its node."""
        return {
            instance.instance_id: (node.node_id, instance)
            for node in self.nodes.values()
            for instance in node.instances
        }

    def is_stale(self, node_id: str, now_s: float) -> bool:
        node = self.nodes.get(node_id)
        return node is None or now_s - node.observed_at_s > self.settings.stale_s

    def is_lost(self, node_id: str, now_s: float) -> bool:
        node = self.nodes.get(node_id)
        return node is None or now_s - node.observed_at_s > self.settings.lost_s

    def is_on(self, node_id: str) -> bool:
        """False for a node that is off, or on its way there or back."""
        powered = self.powered.get(node_id)
        return powered is None or powered.power is NodePower.ON

    def may_act(self, now_s: float) -> bool:
        """True once every expected node has reported, or those that have not count as lost.

        Before, a restarted controller would take nodes that are only slow to answer for gone.
        """
        waited_s = now_s - (self.first_event_s if self.first_event_s is not None else now_s)
        known = len(self.nodes.keys() | self.powered.keys())
        return bool(self.nodes) and (known >= self.expected_nodes or waited_s > self.settings.lost_s)

    def placeable_nodes(self, now_s: float) -> tuple[Node, ...]:
        """Nodes that are not lost, as placement sees them; quarantined GPUs, unhealthy ones and those that an operator
        uses by hand are not usable."""
        nodes = []
        for node in sorted(self.nodes.values(), key=lambda node: node.node_id):
            if self.is_lost(node.node_id, now_s) or not self.is_on(node.node_id):
                continue
            bad = {
                uuid
                for instance in node.instances
                if instance.state is InstanceState.QUARANTINED
                for uuid in instance.gpu_uuids
            } | node.held_gpus
            refusing = self.refusing.get(node.node_id)
            if f"{NODE_PREFIX}{node.node_id}" in self.modes or (refusing is not None and now_s < refusing.until_s):
                # Nothing new is begun there.
                bad |= {gpu.uuid for gpu in node.gpus} - {uuid for i in node.instances for uuid in i.gpu_uuids}
            gpus = tuple(
                Gpu(gpu.uuid, gpu.index, usable=gpu.healthy and gpu.uuid not in bad)
                for gpu in sorted(node.gpus, key=lambda gpu: gpu.index)
            )
            nodes.append(Node(node.node_id, gpus))
        return tuple(nodes)

    def usable_gpus(self, now_s: float) -> int:
        return sum(gpu.usable for node in self.placeable_nodes(now_s) for gpu in node.gpus)

    def new_instance_id(self) -> str:
        self.instance_numbers += 1
        return f"t{self.term}-i{self.instance_numbers}"

    def pool_of(self, instance: InstanceObservation) -> str:
        """The pool that an instance is routed as now: as last relabelled, else as it was started."""
        return self.routed_as.get(instance.instance_id, instance.pool)

    def mode_of(self, pool: str, node_id: str) -> Mode:
        """The most cautious of the modes that apply."""
        if not self.modes:
            return self.mode
        return most_cautious(
            self.mode,
            self.modes.get(f"{POOL_PREFIX}{pool}", Mode.ACTIVE),
            self.modes.get(f"{NODE_PREFIX}{node_id}", Mode.ACTIVE),
        )

    def mode_at(self, level: Level, scope: str) -> Mode:
        """The mode that a decision of this level and scope is made under."""
        if level is Level.POOL:
            return self.mode_of(scope, "")
        if level is Level.INSTANCE and self.modes and scope in (seen := self.instances()):
            node_id, instance = seen[scope]
            return self.mode_of(self.pool_of(instance), node_id)
        return self.mode

    def start_s(self, tp: int) -> float:
        """Seconds from a start to the first request: the longest measured here, else the profile's, else assumed."""
        profiled = self.profile.starts.get(tp)
        return self.measured_start_s.get(tp, profiled.start_s if profiled else self.settings.start_s)

    def retire_j(self, tp: int) -> float:
        """Energy of a retirement beyond that of parked GPUs: they are held until it has drained and stopped."""
        watts = self.fit.idle_power_w(tp, self.profile.full_mhz) or tp * self.profile.parked_w
        return self.settings.retire_s * max(0.0, watts - tp * self.profile.parked_w)

    def start_j(self, tp: int) -> float:
        """Energy of a start: the whole instance holds a context at full clock and serves nothing meanwhile."""
        watts = self.fit.idle_power_w(tp, self.profile.full_mhz) or tp * self.profile.parked_w
        return self.start_s(tp) * watts


@dataclass(slots=True)
class Turn:
    """The answer to one event: collects decisions and effects."""

    now: Instant
    state: State
    decisions: list[Decision] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)

    def effect_id(self) -> str:
        self.state.effect_numbers += 1
        return f"e{self.state.effect_numbers}"

    def decide(
        self,
        level: Level,
        scope: str,
        trigger: str,
        reason: Reason,
        sentence: str,
        *,
        inputs: Json,
        outcome: Json,
        alternatives: tuple[Json, ...] = (),
        predicted_power_w: float | None = None,
        predicted_slo_margin: float | None = None,
        solver: SolverReport | None = None,
        parent: int | None = None,
    ) -> Decision:
        state = self.state
        state.decision_numbers += 1
        state.sentences[level] = sentence
        decision = Decision(
            term=state.term,
            number=state.decision_numbers,
            decided_at_s=self.now.wall_s,
            level=level,
            scope=scope,
            trigger=trigger,
            mode=state.mode_at(level, scope),
            reason=reason,
            sentence=sentence,
            inputs=inputs,
            outcome=outcome,
            alternatives=alternatives,
            predicted_power_w=predicted_power_w,
            predicted_slo_margin=predicted_slo_margin,
            solver=solver,
            parent=parent,
        )
        self.decisions.append(decision)
        return decision


def rates_json(rates: Mapping[RequestClass, float]) -> dict[str, float]:
    return {str(request_class): round(rate, 6) for request_class, rate in sorted(rates.items())}


def plan_json(state: State) -> dict[str, Any]:
    """The whole plan as JSON: what a restarted controller carries on from."""
    return {
        "pools": {
            name: {
                "granted_gpus": plan.granted_gpus,
                "counts": {str(tp): n for tp, n in sorted(plan.counts.items())},
                "demand_rps": plan.demand_rps,
            }
            for name, plan in sorted(state.pools.items())
        },
        "instances": [
            {
                "instance_id": instance.instance_id,
                "pool": instance.pool,
                "model": instance.model,
                "node_id": instance.node_id,
                "gpu_uuids": list(instance.gpu_uuids),
            }
            for instance in state.layout.instances
        ],
    }
