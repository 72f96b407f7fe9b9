"""Transition: the next steps from what is there to what is wanted, never dropping a class under its demand.

Reconciles: called every fast tick with the present truth, it keeps no state of its own, so a restart at any point
is safe and repeating a call repeats its answer. Capacity first: what grows comes up before what shrinks goes down,
unless no GPU is free. A change of pool label counts as a step, since it takes capacity from one pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from controller.domain.classes import RequestClass
from controller.domain.layout import Layout
from controller.domain.reasons import StepReason
from controller.fleet.port import InstanceState


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


@dataclass(frozen=True, slots=True)
class TransitionSettings:
    max_drains_per_pool: int = 1  # at once: only part of a pool is ever on its way out
    max_attempts: int = 3  # starts of one wanted instance before it is given up


@dataclass(frozen=True, slots=True)
class Transition:
    """`done` when nothing differs. `given_up` are wanted instances that will not start where they are planned:
    their place must be planned anew."""

    steps: tuple[Step, ...]
    done: bool
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

    `allow_shortfall` declares the wanted layout the best possible: then, when nothing can grow because no GPU is
    free, the instance whose loss hurts least goes first even if demand is not carried meanwhile.
    """
    raise NotImplementedError


def shortfall_rps(serving: tuple[tuple[str, int], ...], capacity: CapacityModel) -> float:
    """Requests/s of demand that instances (pool, tp) cannot carry within the SLO; 0 when all is carried."""
    raise NotImplementedError
