"""Placement: from wanted counts by (pool, tp) to a layout, instance by instance and GPU by GPU.

Stands between the MILP and the transition. Keeps what can stay (same pool first; then an instance of the same tp
changes its pool without a restart), places the rest on aligned GPU groups, free GPUs first, spread over nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from controller.domain.layout import Layout, Node


@dataclass(frozen=True, slots=True)
class HeldInstance:
    """An instance that holds GPUs now. `keep` is True when it serves or is on its way to (starting, warming, ready);
    a draining, stopping or quarantined one cannot be kept and only blocks its GPUs until it is gone."""

    instance_id: str
    pool: str  # that it is routed as now
    node_id: str
    gpu_uuids: tuple[str, ...]
    keep: bool

    @property
    def tp(self) -> int:
        return len(self.gpu_uuids)


@dataclass(frozen=True, slots=True)
class Placed:
    """`missing` counts what did not fit, by (pool, tp); empty when everything did."""

    layout: Layout
    missing: Mapping[tuple[str, int], int]
    kept: tuple[str, ...]  # instance ids, pool changes included
    relabelled: tuple[str, ...]
    started: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.missing


def place(
    counts: Mapping[tuple[str, int], int],
    model: str,
    current: Layout,
    held: tuple[HeldInstance, ...],
    nodes: tuple[Node, ...],
    new_id: Callable[[], str],
) -> Placed:
    """Puts `counts` on `nodes`.

    `current` is the layout wanted so far: of it, instances that hold no GPU yet keep their place where it still fits,
    so that repeating the call changes nothing. No GPU has two owners in the result; unusable GPUs have none.
    """
    raise NotImplementedError
