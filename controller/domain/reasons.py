"""Closed enumerations: why something was decided. Names are stable: they are metric labels and database values."""

from __future__ import annotations

from enum import StrEnum


class Level(StrEnum):
    CLUSTER = "cluster"
    POOL = "pool"
    INSTANCE = "instance"


class Mode(StrEnum):
    ACTIVE = "active"
    ADVISORY = "advisory"
    PAUSED = "paused"


class Reason(StrEnum):
    """The reason that a decision carries."""

    # cluster and pool
    COLD_START = "cold_start"  # no load seen yet: planned for the configured initial load, or for the peak
    FORECAST_CHANGED = "forecast_changed"  # the new plan saves more than the switch costs
    CAPACITY_NEEDED = "capacity_needed"  # the present layout cannot carry the forecast
    PLAN_KEPT = "plan_kept"  # the present layout is still the best
    SAVING_TOO_SMALL = "saving_too_small"  # a better layout exists, switching to it does not pay
    GRANT_CHANGED = "grant_changed"  # the layout stands over the pool's new grant
    NO_ROOM_TO_SWITCH = "no_room_to_switch"  # a better layout exists, but no way there keeps carrying the load
    TRANSITION_PENDING = "transition_pending"  # a transition is under way: no new layout before it ends
    NO_LOAD_DATA = "no_load_data"  # reports are stale: the last plan is held
    SOLVER_FAILED = "solver_failed"  # no feasible plan: the last one is kept, or SinglePool
    NO_CAPACITY = "no_capacity"  # even the whole fleet cannot carry the forecast in SLO
    NODE_LOST = "node_lost"
    NODE_REFUSES = "node_refuses"  # its starts fail again and again: nothing new is placed there for a while
    # the profile in use (loop/profile_in_use.py)
    PROFILE_CORRECTED = "profile_corrected"  # live power differs from it, or does no longer: predictions follow
    PROFILE_DRIFTED = "profile_drifted"  # live power differs from it so much that it must be measured again
    ENGINE_CHANGED = "engine_changed"  # engines run that it was not measured on: full clocks, the layout is held
    # instance
    LEAST_POWER = "least_power"  # the clock of least power that meets the SLO at the predicted load
    IDLE = "idle"  # nothing runs: lowest clock that still meets the first token's SLO
    QUEUE_BUILDING = "queue_building"  # requests wait at the engine: full clock
    OVER_CAPACITY = "over_capacity"  # predicted load beyond the profiled SLO range: full clock
    STALE_TELEMETRY = "stale_telemetry"  # instance not heard of: lock left to expire
    NO_PROFILE = "no_profile"  # nothing measured for this configuration: full clock
    NOT_SERVING = "not_serving"  # starting, warming or stopping: full clock
    # power budgets (policy/budget.py)
    POWER_BUDGET = "power_budget"  # set, or what a plan had to follow
    BUDGET_UNREACHABLE = "budget_unreachable"  # below the lowest caps of its GPUs: every cap at its minimum
    BUDGET_HELD = "budget_held"  # every cap of it is confirmed
    BUDGET_ENDED = "budget_ended"  # lifted, or its time is over: the caps found before come back
    # the provisioner (policy/provision.py)
    NODE_ON = "node_on"
    NODE_OFF = "node_off"
    NODE_HOOK_FAILED = "node_hook_failed"  # a node could not be turned on or off: left alone for a while
    # the emergency ladder of a pool (policy/emergency.py)
    DEADLINES_AT_RISK = "deadlines_at_risk"  # waiting requests are about to miss theirs: one stage up
    DEADLINES_SAFE = "deadlines_safe"  # none has been at risk for a while: one stage down


class Stage(StrEnum):
    """A stage of the emergency ladder. Each holds all that those before it do."""

    NONE = "none"
    REORDER = "reorder"  # what can still meet its deadline is served before what cannot
    FULL_CLOCK = "full_clock"
    MOVE = "move"  # waiting requests compete for room in dominating pools; engines that queue get nothing more
    REFUSE = "refuse"  # what waits past its deadline is refused

    @property
    def rank(self) -> int:
        return _STAGES.index(self)


_STAGES = tuple(Stage)


class StepReason(StrEnum):
    """Why a transition takes, or does not yet take, a step."""

    GROW = "grow"
    RETIRE = "retire"
    WAITING_FOR_READY = "waiting_for_ready"
    WAITING_FOR_DRAIN = "waiting_for_drain"
    WAITING_FOR_GPU = "waiting_for_gpu"
    LOST = "lost"
