"""Layouts: which instances a pool wants, and where they stand.

A `Layout` is what the planner wants; what is there is an observation (fleet/port.py). Reconciling the two is
policy/transition.py. GPU UUIDs are identity; the GPUs of one instance are always on one node.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PlannedInstance:
    """One wanted instance. Its tensor parallelism is the number of its GPUs."""

    instance_id: str
    pool: str
    model: str
    node_id: str
    gpu_uuids: tuple[str, ...]

    @property
    def tp(self) -> int:
        return len(self.gpu_uuids)


@dataclass(frozen=True, slots=True)
class Layout:
    """All wanted instances of the cluster."""

    instances: tuple[PlannedInstance, ...] = ()

    def by_id(self) -> dict[str, PlannedInstance]:
        return {instance.instance_id: instance for instance in self.instances}

    def counts(self) -> dict[tuple[str, int], int]:
        """Instances by (pool, tp)."""
        return dict(Counter((instance.pool, instance.tp) for instance in self.instances))

    def of_pool(self, pool: str) -> tuple[PlannedInstance, ...]:
        return tuple(instance for instance in self.instances if instance.pool == pool)

    @property
    def gpus(self) -> int:
        return sum(instance.tp for instance in self.instances)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as placement sees it. `slot` is its index within the node: TP groups are aligned to their size, so
    that a group never spans two NVLink or NUMA halves."""

    uuid: str
    slot: int
    usable: bool = True


@dataclass(frozen=True, slots=True)
class Node:
    node_id: str
    gpus: tuple[Gpu, ...] = field(default_factory=tuple)
