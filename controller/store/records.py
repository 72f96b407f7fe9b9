"""What the controller hands to the store: small frozen values, one per row of history.

`controller.loop.runtime` makes them as things happen, `recorder.py` takes them, `codec.py` turns them into rows.
All times are UTC epoch seconds; None means unknown, which is not zero. Every value carries the term it was made
under, so that a restarted controller's rows never collide with its predecessor's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from controller.domain.classes import RequestClass
from controller.domain.decision import Decision, Json
from controller.domain.gpu_state import GpuState
from controller.domain.layout import Layout


class EnergySource(StrEnum):
    """Where a joule figure comes from: the hardware counter, or power integrated where there is no counter."""

    COUNTER = "counter"
    INTEGRATED = "integrated"
    NONE = "none"


class ActionKind(StrEnum):
    """One per fleet effect (controller/fleet/port.py)."""

    APPLY_CLOCKS = "apply_clocks"
    RELEASE_CLOCKS = "release_clocks"
    APPLY_CAPS = "apply_caps"
    RELEASE_CAPS = "release_caps"
    POWER_NODE = "power_node"
    START_INSTANCE = "start_instance"
    DRAIN_INSTANCE = "drain_instance"
    STOP_INSTANCE = "stop_instance"
    PUBLISH_ROUTING = "publish_routing"


@dataclass(frozen=True, slots=True)
class ActionRecord:
    """One effect that was sent out, and what became of it. (term, effect_id) is unique."""

    term: int
    effect_id: str
    kind: ActionKind
    started_at_s: float
    duration_s: float  # from submitting it to its result
    ok: bool
    detail: str = ""
    decision: int | None = None  # number, within the term, of the decision that caused it
    node_id: str = ""
    instance_id: str = ""
    gpus: int = 0
    asked: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DecisionOutcome:
    """What happened in the epoch after a decision, beside what it predicted. (term, number) is unique."""

    term: int
    number: int
    measured_at_s: float
    window_s: float
    power_w: float | None = None
    energy_j: float | None = None
    load_rps: float | None = None
    slo_attainment: float | None = None
    ttft_p99_ms: float | None = None
    token_gap_p99_ms: float | None = None
    detail: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TelemetryRow:
    """One GPU in one state of one pool during one window; several rows share a window when the state changed.

    Unique by (term, window start, GPU, state, pool, instance). `seconds` is the time spent so within the window.
    """

    term: int
    window_start_s: float
    window_s: float
    node_id: str
    gpu_uuid: str
    state: GpuState
    seconds: float
    pool: str = ""  # "" for a GPU of no pool
    instance_id: str = ""
    energy_j: float | None = None
    energy_source: EnergySource = EnergySource.COUNTER
    mean_power_w: float | None = None
    mean_sm_mhz: float | None = None


@dataclass(frozen=True, slots=True)
class LoadRow:
    """Arrivals of one request class in one window. Unique by (term, window start, model, class)."""

    term: int
    window_start_s: float
    window_s: float
    model: str
    request_class: RequestClass
    arrived: int
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SloRow:
    """How one request class was served in one window. Unique by (term, window start, model, class).

    `requests` are those that ended in the window, failed ones included (a failure is a miss).
    """

    term: int
    window_start_s: float
    window_s: float
    model: str
    request_class: RequestClass
    requests: int
    in_slo: int
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    token_gap_p50_ms: float | None = None
    token_gap_p99_ms: float | None = None


@dataclass(frozen=True, slots=True)
class ForecastRow:
    """A forecast whose span has ended, beside what came. Unique by (term, window start, model, pool).

    In requests/s as they arrive, of all classes of the pool. It was made one such span before it began. `plain` is what
    it would have been without the weekly template.
    """

    term: int
    window_start_s: float
    window_s: float
    model: str
    pool: str
    forecast_rps: float
    quantile_rps: float
    plain_forecast_rps: float
    plain_quantile_rps: float
    arrived_rps: float


@dataclass(frozen=True, slots=True)
class TransitionRow:
    """One finished way from a layout to another. (term, transition_id) is unique."""

    term: int
    transition_id: str
    model: str
    pool: str
    reason: str
    started_at_s: float
    duration_s: float
    completed: bool  # False: given up or overtaken by another
    starts: int = 0
    stops: int = 0
    decision: int | None = None
    before: Json = field(default_factory=dict)  # instances by tp
    after: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """The layout that is wanted from now on: a restarted controller carries on from the last one.

    (term, number) is unique; `number` is that of the decision. `pools` keeps what else the loop wants to find again
    (grants, demand by pool).
    """

    term: int
    number: int
    planned_at_s: float
    layout: Layout
    pools: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node as it was last seen; a later record of the same node replaces it."""

    node_id: str
    seen_at_s: float
    gpus: int
    address: str = ""
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InputFrame:
    """What the core was told between two pool ticks, line by line (controller/loop/journal.py). (term, number) is
    unique; numbers rise by one within a term, so that a missing frame is noticed."""

    term: int
    number: int
    began_at_s: float
    ended_at_s: float
    events: int  # that the core was told; those without consequence have no line
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InputSnapshot:
    """The core's state before the frame of the same term and number. `text` is made where it is written: in the
    recorder's thread, since it takes longer than a tick may be late."""

    term: int
    number: int
    taken_at_s: float
    text: Callable[[], str]


class OrderKind(StrEnum):
    """What an operator may ask of the controller."""

    MODE = "mode"
    PLAN = "plan"
    BUDGET = "budget"
    TRIAL = "trial"  # its value is the plan (controller/trial.py); empty: it is stopped


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """An order that was taken: who asked for what. (term, number) is unique. `value` is a mode, a
    budget's watts (empty where it is lifted), or empty;
    `until_s` the wall time at which it ends by itself."""

    term: int
    number: int
    ordered_at_s: float
    kind: OrderKind
    scope: str
    value: str
    who: str
    why: str
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class SavingRow:
    """What one day saved against one counterfactual, as computed last. Unique by (day, model, pool, against).

    `energy_j` is measured; `against_j` what the counterfactual would have drawn for the same load, with its 95 %
    interval; `covered_s` the time of the day for which both are known.
    """

    day: str  # 2026-03-01, UTC
    model: str
    pool: str  # "" for the whole cluster
    against: str
    covered_s: float
    energy_j: float
    against_j: float
    against_low_j: float
    against_high_j: float
    usd_per_kwh: float
    g_per_kwh: float
    computed_at_s: float


@dataclass(frozen=True, slots=True)
class ChoiceRecord:
    """Why a gateway sent one request where it did: one choice out of `speaks_for`. (gateway, epoch, number) is unique.

    `alternatives`: {instance, pool, lost_by, in_flight, pending_tokens, score} of the others, the nearest first."""

    gateway_id: str
    epoch: str
    number: int
    chosen_at_s: float
    model: str
    request_class: RequestClass
    input_tokens: int
    pool: str
    instance_id: str
    decided_by: str
    queue_ms: float
    speaks_for: int
    alternatives: Sequence[Json] = ()


Record = (
    Decision
    | DecisionOutcome
    | ActionRecord
    | TelemetryRow
    | LoadRow
    | SloRow
    | ForecastRow
    | TransitionRow
    | PlanRecord
    | NodeRecord
    | InputFrame
    | InputSnapshot
    | OrderRecord
    | SavingRow
    | ChoiceRecord
)
