"""When whole nodes are turned off and on: what is needed soon, a spare, and nothing that would not pay.

    on -> stopping -> off -> booting -> on

Called by the loop every few seconds (loop/provision.py). A node goes off after it has been empty, and not needed, for
as long as its shutdown and boot would cost: who waits so long never pays more than twice what knowing the future would
cost. It comes back as early as a boot and a start take, and at once where load is not served. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil


class NodePower(StrEnum):
    """Where a node stands. STOPPING and BOOTING last until it is silent, or reports, or its time is up."""

    ON = "on"
    STOPPING = "stopping"
    OFF = "off"
    BOOTING = "booting"


@dataclass(frozen=True, slots=True)
class ProvisionSettings:
    """`boot_s` and `off_s` count until they were measured; what takes longer than `give_up_s` has failed."""

    spare_nodes: int = 1
    min_on_s: float = 1800.0
    boot_s: float = 300.0
    off_s: float = 60.0
    boot_w: float = 0.0  # what a node draws while it boots; 0: as much as an empty one
    give_up_s: float = 900.0
    retry_s: float = 60.0  # after a failure; doubled with each further one
    most_retry_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """One node. `empty_for_s`: for how long no instance has held or been planned for a GPU of it; None: one does.
    `free`: may be turned on or off now (not to be left alone, not waiting after a failure)."""

    node_id: str
    power: NodePower
    gpus: int
    since_s: float  # for how long it stands so
    empty_for_s: float | None = None
    free: bool = True


@dataclass(frozen=True, slots=True)
class Change:
    node_id: str
    on: bool
    why: str


def changes(
    nodes: Sequence[NodeSeen],
    needed_gpus: int,
    unserved: bool,
    pay_back_s: float,
    settings: ProvisionSettings,
) -> tuple[Change, ...]:
    """What to turn on or off now. `needed_gpus` holds what runs and what the forecast asks for until a node that is
    turned on now would serve; `unserved`: load is not carried as it is."""
    usable = [n for n in nodes if n.power in (NodePower.ON, NodePower.BOOTING)]
    off = sorted((n for n in nodes if n.power is NodePower.OFF and n.free), key=lambda n: (n.since_s, n.node_id))
    size = max((n.gpus for n in nodes), default=0)
    if size <= 0:
        return ()
    there = sum(n.gpus for n in usable)
    spare = settings.spare_nodes * size
    missing = ceil((needed_gpus + spare - there) / size)
    why = f"{needed_gpus} GPUs are needed beside {settings.spare_nodes} spare nodes, {there} are there"
    if unserved and missing <= 0 and not any(n.power is NodePower.BOOTING for n in nodes):
        missing, why = 1, "load is not served"
    if missing > 0:
        # Those that are off for the longest first, so that all take their turn.
        return tuple(Change(n.node_id, True, why) for n in reversed(off[-missing:]))
    if unserved:
        return ()
    left, found = there - needed_gpus - spare, list[Change]()
    idle = [n for n in usable if n.power is NodePower.ON and n.free and n.empty_for_s is not None]
    for node in sorted(idle, key=lambda n: (-(n.empty_for_s or 0.0), n.node_id)):
        rested = (node.empty_for_s or 0.0) >= pay_back_s and node.since_s >= settings.min_on_s
        if rested and node.gpus <= left:
            left -= node.gpus
            text = f"empty for {node.empty_for_s:.0f} s, and {there - node.gpus} of {there} GPUs do without it"
            found.append(Change(node.node_id, False, text))
            there -= node.gpus
    return tuple(found)


def pay_back_s(empty_w: float, boot_w: float, boot_s: float, off_s: float) -> float:
    """For how long a node must be off to be worth it: until what it would have drawn empty makes up for going off and
    coming back."""
    return (off_s * empty_w + boot_s * max(boot_w, empty_w)) / empty_w if empty_w > 0 else float("inf")


def retry_after_s(failures: int, settings: ProvisionSettings) -> float:
    """How long to leave a node alone after so many failures in a row."""
    return min(settings.most_retry_s, settings.retry_s * 2.0 ** max(0, min(failures, 32) - 1))
