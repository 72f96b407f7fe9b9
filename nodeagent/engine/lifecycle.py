"""The life of an engine instance: its states and the table of transitions, nothing else.

States are those of the API (InstanceState). engine/instances.py acts; this says what may follow what.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where an instance stands. The values are kept in the instance records: never rename one."""

    STARTING = "starting"
    """Process launched, not yet healthy."""
    WARMING = "warming"
    """Healthy, or waking up; the warm-up request follows. Not routable."""
    READY = "ready"
    """Routable."""
    DRAINING = "draining"
    """Gets no new work, finishes what runs; a finished drain is proven, and stays here until it is stopped."""
    ASLEEP = "asleep"
    """Weights moved to host memory; the process and its GPU contexts stay. Not routable."""
    STOPPING = "stopping"
    """Told to end, or died; its GPUs are not proven free yet."""
    STOPPED = "stopped"
    """Ended as asked, GPUs proven free."""
    FAILED = "failed"
    """Died or never became healthy, GPUs proven free."""
    QUARANTINED = "quarantined"
    """Its GPUs could not be proven free; nothing may use them until they are."""


class Event(enum.Enum):
    """What moves an instance on."""

    HEALTHY = "answers its health check"
    WARMED_UP = "finished the warm-up request"
    DRAIN = "asked to drain"
    STOP = "asked to stop"
    FAIL = "died, or did not come up in time"
    SILENT = "found again by a new agent, but does not answer yet"
    SLEPT = "moved its weights to host memory"
    WAKE = "asked to wake up"
    RELAUNCH = "its GPUs are proven free, and its restart starts it anew"
    FREED = "its GPUs are proven free"
    FREED_AFTER_FAILURE = "its GPUs are proven free, after it failed"
    NOT_FREED = "its GPUs could not be proven free in time"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STARTING, Event.HEALTHY): State.WARMING,
    (State.STARTING, Event.STOP): State.STOPPING,
    (State.STARTING, Event.FAIL): State.STOPPING,
    (State.WARMING, Event.WARMED_UP): State.READY,
    (State.WARMING, Event.STOP): State.STOPPING,
    (State.WARMING, Event.FAIL): State.STOPPING,
    (State.READY, Event.DRAIN): State.DRAINING,
    (State.READY, Event.STOP): State.STOPPING,
    (State.READY, Event.FAIL): State.STOPPING,
    (State.READY, Event.SILENT): State.STARTING,
    (State.DRAINING, Event.STOP): State.STOPPING,
    (State.DRAINING, Event.FAIL): State.STOPPING,
    (State.DRAINING, Event.SLEPT): State.ASLEEP,
    (State.ASLEEP, Event.WAKE): State.WARMING,
    (State.ASLEEP, Event.STOP): State.STOPPING,
    (State.ASLEEP, Event.FAIL): State.STOPPING,
    (State.STOPPING, Event.RELAUNCH): State.STARTING,
    (State.STOPPING, Event.FREED): State.STOPPED,
    (State.STOPPING, Event.FREED_AFTER_FAILURE): State.FAILED,
    (State.STOPPING, Event.NOT_FREED): State.QUARANTINED,
    (State.QUARANTINED, Event.FREED): State.STOPPED,
    (State.QUARANTINED, Event.FREED_AFTER_FAILURE): State.FAILED,
    (State.QUARANTINED, Event.STOP): State.STOPPING,
}

ENDED = frozenset({State.STOPPED, State.FAILED})
"""Nothing follows; the instance owns no GPU."""

RUNNING = frozenset({State.STARTING, State.WARMING, State.READY, State.DRAINING, State.ASLEEP})
"""The process is expected to live; its death is a failure."""

ANSWERING = frozenset({State.WARMING, State.READY, State.DRAINING})
"""The engine has been healthy and is awake, so its metrics can be asked for."""


def follow(state: State, event: Event) -> State:
    """The next state; ValueError for a transition that is not in the table."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"an instance that is {state.value} cannot go on by: {event.value}") from None
