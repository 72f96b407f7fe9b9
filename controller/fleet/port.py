"""The fleet port: everything that passes between the loop's core and a fleet, as plain values.

Events go in (what was observed, what became of an effect), effects come out (what shall be done). A real fleet
(loop/runtime.py over gRPC agents) and a virtual one (simulator/fleet.py) both speak exactly this, so the core
cannot tell them apart. `observed_at_s` is on the monotonic clock of whoever runs the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from controller.domain.classes import ClassScheme, RequestClass
from controller.domain.reasons import Level, Stage
from controller.policy.milp.problem import PlanProblem, PlanSolution

# --------------------------------------------------------------------------------------------- observations


class InstanceState(StrEnum):
    """As the node agent's life cycle has it."""

    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    QUARANTINED = "quarantined"


# What the states mean to whoever decides; nobody else lists them.
COMES_UP = frozenset({InstanceState.STARTING, InstanceState.WARMING})  # it will serve
UP = COMES_UP | {InstanceState.READY}  # it serves or will, as long as nobody tells it to go
WORKS = frozenset({InstanceState.READY, InstanceState.DRAINING})  # it answers requests
GOES = frozenset({InstanceState.DRAINING, InstanceState.STOPPING})  # it was told to go
GONE = frozenset({InstanceState.STOPPED, InstanceState.FAILED})  # nothing of it is left on its host
# Its GPUs may not be given to another instance.
HOLDS_GPUS = frozenset(InstanceState) - GONE


@dataclass(frozen=True, slots=True)
class GpuObservation:
    """None means the driver did not say: unknown is not zero."""

    uuid: str
    index: int
    healthy: bool
    power_w: float | None
    energy_j: float | None
    sm_mhz: int | None
    locked_mhz: int | None
    limit_w: float | None = None  # its power limit, as it is set now
    limits_w: tuple[float, float] | None = None  # the range that it may be set in


@dataclass(frozen=True, slots=True)
class InstanceObservation:
    instance_id: str
    model: str
    pool: str  # the label it was started with
    gpu_uuids: tuple[str, ...]
    state: InstanceState
    endpoint: str
    running: float | None = None
    waiting: float | None = None
    kv_usage_ratio: float | None = None
    detail: str = ""
    # Measured seconds by step (start, warm, drain, stop), for pricing switches.
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    held_by: str = ""  # the operator whose order it obeyed last

    @property
    def tp(self) -> int:
        return len(self.gpu_uuids)


@dataclass(frozen=True, slots=True)
class NodeObservation:
    node_id: str
    observed_at_s: float
    gpus: tuple[GpuObservation, ...]
    instances: tuple[InstanceObservation, ...]
    # Those that an operator has started, moved or taken down by hand: not the controller's to touch, nor their GPUs.
    held: tuple[InstanceObservation, ...] = ()

    @property
    def held_gpus(self) -> frozenset[str]:
        return frozenset(uuid for i in self.held if i.state in HOLDS_GPUS for uuid in i.gpu_uuids)


@dataclass(frozen=True, slots=True)
class ClassCounters:
    """Cumulative since the gateway's start, for one request class. Arrivals and their input tokens count under the
    class that the gateway expects; what has ended counts under the true one."""

    arrived: int = 0
    completed: int = 0
    failed: int = 0
    in_slo: int = 0
    input_tokens: int = 0  # of arrived requests
    output_tokens: int = 0  # of completed requests


@dataclass(frozen=True, slots=True)
class QueueObservation:
    """One pool's queue at a gateway. `refused` is cumulative since the gateway's start, by reason."""

    waiting: int
    in_flight: int
    oldest_wait_s: float
    # Waiting with half of the time to their deadline gone, or at an instance, past it and still without a first token.
    at_risk: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadObservation:
    """One gateway's report. A new `epoch` means its counters began at zero again."""

    gateway_id: str
    epoch: str
    observed_at_s: float
    model: str
    classes: Mapping[RequestClass, ClassCounters]
    queues: Mapping[str, QueueObservation]


# --------------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class ClockTarget:
    gpu_uuids: tuple[str, ...]
    mhz: int


@dataclass(frozen=True, slots=True)
class ApplyClocks:
    """Locks clocks on one node under a lease; repeating it renews."""

    effect_id: str
    node_id: str
    targets: tuple[ClockTarget, ...]
    ttl_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseClocks:
    effect_id: str
    node_id: str
    gpu_uuids: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class CapTarget:
    gpu_uuids: tuple[str, ...]
    watts: float  # of each of them


@dataclass(frozen=True, slots=True)
class ApplyCaps:
    """Caps the power of GPUs of one node. A cap that `protects` guards a budget: it stays until it is changed or
    released, also when the controller or the agent is gone. Any other only saves power, and ends with its lease."""

    effect_id: str
    node_id: str
    targets: tuple[CapTarget, ...]
    ttl_s: float
    reason: str
    protects: bool = True


@dataclass(frozen=True, slots=True)
class ReleaseCaps:
    """Takes such caps away: the limits found before them come back. Clock locks stay."""

    effect_id: str
    node_id: str
    gpu_uuids: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class PowerNode:
    """Turns a whole node on or off. Done when whoever does it has been told; a node that comes on then reports."""

    effect_id: str
    node_id: str
    on: bool
    reason: str


@dataclass(frozen=True, slots=True)
class StartInstance:
    effect_id: str
    node_id: str
    instance_id: str
    model: str
    pool: str
    gpu_uuids: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class DrainInstance:
    effect_id: str
    node_id: str
    instance_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopInstance:
    """Stops a drained instance; the fleet refuses while work is left."""

    effect_id: str
    node_id: str
    instance_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoutedInstance:
    instance_id: str
    endpoint: str
    tp: int
    max_in_flight: int
    weight: float
    accepts_new: bool
    # Joules of one request more, holding 0, 1/n … n/n of `max_in_flight` (policy/routing/table.py); empty: not known.
    marginal_j: tuple[float, ...] = ()
    # 0: it serves. Otherwise it stands by, loaded, and is weighed as if it had this load beside its own: a burst that
    # those that serve cannot take reaches it at once, without waiting for a tick.
    standby_load: float = 0.0
    # The same of one that serves, so that those before it fill first: their batches decode together. 0: nobody is.
    rank_load: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolOrder:
    """What gateways do with the requests that wait for a pool while deadlines are at risk (policy/emergency.py).

    It holds for `ttl_s` from when it is heard, unless it is given again: a gateway without its controller goes back to
    what it does by itself.
    """

    stage: Stage
    ttl_s: float
    first_token_s: tuple[float, float, float]  # to expect once an instance has the request, by input bucket
    retry_after_s: float  # told to who is refused
    limits: Mapping[str, int] = field(default_factory=dict)  # of instances whose engine queues, below their own
    # By instance: prompt tokens without a first answer at which it gets nothing more. What it cannot read in time waits
    # where it can be put in order, moved and refused.
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoutedPool:
    name: str
    model: str
    classes: frozenset[RequestClass]
    instances: tuple[RoutedInstance, ...]
    order: PoolOrder | None = None


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """What gateways route by. `version` rises with every change under one term."""

    term: int
    version: int
    pools: tuple[RoutedPool, ...]
    scheme: ClassScheme = field(default_factory=ClassScheme)


@dataclass(frozen=True, slots=True)
class PublishRouting:
    effect_id: str
    table: RoutingTable


@dataclass(frozen=True, slots=True)
class Solve:
    """A MILP to solve off the loop; its `PlanSolution` comes back in `EffectDone.solution`."""

    effect_id: str
    problem: PlanProblem


NodeEffect = (
    ApplyClocks | ReleaseClocks | ApplyCaps | ReleaseCaps | PowerNode | StartInstance | DrainInstance | StopInstance
)
FleetEffect = NodeEffect | PublishRouting
Effect = FleetEffect | Solve

# ---------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Tick:
    """A level's period has come round; or, `early`, the core has asked for one more at once (`Step.tick_early`)."""

    level: Level
    early: bool = False


@dataclass(frozen=True, slots=True)
class NodeSeen:
    observation: NodeObservation


@dataclass(frozen=True, slots=True)
class LoadSeen:
    observation: LoadObservation


@dataclass(frozen=True, slots=True)
class EffectDone:
    effect_id: str
    ok: bool
    detail: str = ""
    solution: PlanSolution | None = None


Event = Tick | NodeSeen | LoadSeen | EffectDone
