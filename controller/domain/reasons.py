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
    # instance
    LEAST_POWER = "least_power"  # the clock of least power that meets the SLO at the predicted load
    IDLE = "idle"  # nothing runs: lowest clock that still meets the first token's SLO
    QUEUE_BUILDING = "queue_building"  # requests wait at the engine: full clock
    OVER_CAPACITY = "over_capacity"  # predicted load beyond the profiled SLO range: full clock
    STALE_TELEMETRY = "stale_telemetry"  # instance not heard of: lock left to expire
    NO_PROFILE = "no_profile"  # nothing measured for this configuration: full clock
    NOT_SERVING = "not_serving"  # starting, warming or stopping: full clock


class StepReason(StrEnum):
    """Why a transition takes, or does not yet take, a step."""

    GROW = "grow"
    RETIRE = "retire"
    WAITING_FOR_READY = "waiting_for_ready"
    WAITING_FOR_DRAIN = "waiting_for_drain"
    WAITING_FOR_GPU = "waiting_for_gpu"
    LOST = "lost"
