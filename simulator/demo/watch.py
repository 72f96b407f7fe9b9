"""Looks on at the fleet as the controller does, through the agents' streams, and books every joule.

Read-only: it subscribes to the same telemetry and feeds the same energy book, in another process than the one whose
work is judged. `summarise` turns what was booked into the figures of one measured window.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from common.clock import Clock
from controller.domain.gpu_state import GpuState
from controller.fleet.grpc import AgentClient
from controller.fleet.port import Event, InstanceObservation, InstanceState, NodeObservation, NodeSeen
from controller.loop.accounting import EnergyBook, EnergyEntry

INTERVAL_S = 0.25
DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class EnergyFigures:
    """What the GPUs spent in one window."""

    seconds: float
    total_j: float
    by_state_j: Mapping[str, float]
    gpu_seconds_by_state: Mapping[str, float]
    mean_power_w: float  # of the whole fleet
    mean_sm_mhz: float | None  # over the GPUs that hold an engine, weighted by time; None when none ever did
    coverage: float  # share of the window's GPU time that was observed; 1 when nothing is missing


def summarise(entries: Iterable[EnergyEntry], open_s: float, close_s: float, gpus: int) -> EnergyFigures:
    """Figures of the window [open_s, close_s] on the entries' clock; an entry across an edge counts in proportion."""
    energy_j: defaultdict[str, float] = defaultdict(float)
    gpu_s: defaultdict[str, float] = defaultdict(float)
    mhz_s = clocked_s = 0.0
    for entry in entries:
        inside_s = min(entry.start_s + entry.seconds, close_s) - max(entry.start_s, open_s)
        if inside_s <= 0:
            continue
        energy_j[entry.state.value] += entry.energy_j * inside_s / entry.seconds
        gpu_s[entry.state.value] += inside_s
        if entry.state is not GpuState.PARKED and entry.sm_mhz is not None:
            mhz_s += entry.sm_mhz * inside_s
            clocked_s += inside_s
    seconds = close_s - open_s
    return EnergyFigures(
        seconds=seconds,
        total_j=sum(energy_j.values()),
        by_state_j=dict(energy_j),
        gpu_seconds_by_state=dict(gpu_s),
        mean_power_w=sum(energy_j.values()) / seconds,
        mean_sm_mhz=mhz_s / clocked_s if clocked_s else None,
        coverage=sum(gpu_s.values()) / (seconds * gpus),
    )


@dataclass
class FleetWatch:
    """Watches the agents at `addresses` (by node id) from `start` to `close`; everything seen stays."""

    addresses: Mapping[str, str]
    clock: Clock
    entries: list[EnergyEntry] = field(default_factory=list)
    latest: dict[str, NodeObservation] = field(default_factory=dict)
    _book: EnergyBook = field(default_factory=EnergyBook)
    _ready: dict[str, list[tuple[float, Counter[int]]]] = field(default_factory=dict)
    _clients: list[AgentClient] = field(default_factory=list)

    def start(self) -> None:
        for node_id, address in self.addresses.items():
            client = AgentClient(
                node_id,
                address,
                self._take,
                self.clock,
                owner="demo-watch",  # never used: nothing is asked of an agent here
                term=0,
                interval_s=INTERVAL_S,
                deadline_s=DEADLINE_S,
            )
            client.start()
            self._clients.append(client)

    async def close(self) -> None:
        while self._clients:
            await self._clients.pop().close()

    def _take(self, event: Event) -> None:
        if not isinstance(event, NodeSeen):
            return
        seen = event.observation
        self.entries += self._book.add(seen)
        ready = Counter(i.tp for i in seen.instances if i.state is InstanceState.READY)
        history = self._ready.setdefault(seen.node_id, [])
        before = self.latest.get(seen.node_id)
        if before is None or not history or history[-1][1] != ready:
            history.append((seen.observed_at_s, ready))
        self.latest[seen.node_id] = seen

    def power_w(self) -> float | None:
        """Of the whole fleet now; None as long as not every agent has been heard."""
        if len(self.latest) < len(self.addresses):
            return None
        return sum(gpu.power_w or 0.0 for node in self.latest.values() for gpu in node.gpus)

    def mean_sm_mhz(self) -> float | None:
        """Of the GPUs that hold an engine now."""
        clocks = [
            gpu.sm_mhz
            for node in self.latest.values()
            for gpu in node.gpus
            if gpu.sm_mhz is not None and any(gpu.uuid in i.gpu_uuids for i in _present(node))
        ]
        return sum(clocks) / len(clocks) if clocks else None

    def ready(self, at_s: float | None = None) -> Counter[int]:
        """Ready instances by TP at an instant (default: now)."""
        total: Counter[int] = Counter()
        for history in self._ready.values():
            for seen_s, counts in reversed(history):
                if at_s is None or seen_s <= at_s:
                    total += counts
                    break
        return total

    def timeline(self, open_s: float, close_s: float, steps: int) -> list[Counter[int]]:
        """Ready instances by TP at `steps` instants spread over a window."""
        return [self.ready(open_s + (close_s - open_s) * (step + 0.5) / steps) for step in range(steps)]

    def settled(self) -> bool:
        """Every agent was heard, there are instances, and none of them is starting, warming or going away."""
        if len(self.latest) < len(self.addresses):
            return False
        states = [i.state for node in self.latest.values() for i in _present(node)]
        return bool(states) and all(state is InstanceState.READY for state in states)


def _present(node: NodeObservation) -> Sequence[InstanceObservation]:
    return [i for i in node.instances if i.state not in (InstanceState.STOPPED, InstanceState.FAILED)]
