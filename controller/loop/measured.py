"""Measured against predicted power, window by window: what the online correction is estimated from.

Fed by the runtime beside the core, from the same observations; nothing here is read by a decision. What comes of it
goes to the core as an order (`CorrectProfile`), which is recorded like any other input.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from controller.domain.gpu_state import GpuState
from controller.fleet.port import InstanceState, NodeObservation
from controller.loop.accounting import EnergyEntry
from controller.loop.orders import CorrectProfile
from controller.profile.correction import Bias, CorrectionSettings, bias_of
from controller.profile.fit import ProfileFit

Kind = tuple[str, int]  # pool, tp

# Seconds of serving at one clock that an instance needs to be compared: of less its mean batch says little.
LEAST_S = 20.0
_SERVING = (GpuState.SERVING, GpuState.IDLE)


@dataclass(slots=True)
class _Seen:
    """One instance at one clock in one window."""

    energy_j: float = 0.0
    gpu_s: float = 0.0
    running_s: float = 0.0  # requests in its batch, over time
    seconds: float = 0.0


@dataclass(slots=True)
class PowerBook:
    """`fit` is the profile's own, without any correction."""

    fit: ProfileFit
    window_s: float = 60.0
    settings: CorrectionSettings = field(default_factory=CorrectionSettings)
    _began_s: float | None = None
    _seen: dict[tuple[str, Kind, int], _Seen] = field(default_factory=dict)
    _now: dict[str, tuple[Kind, int]] = field(default_factory=dict)  # by instance: what it served as since it was seen
    _last_s: dict[str, float] = field(default_factory=dict)  # by node: its last observation
    _ratios: dict[Kind, deque[float]] = field(default_factory=dict)
    biases: dict[Kind, Bias] = field(default_factory=dict)

    def observe(self, seen: NodeObservation, pools: Mapping[str, str]) -> None:
        """Takes what a node's instances held and at which clock since it was seen last; before `spent` takes the energy
        of that time. `pools` by instance: as it is routed now."""
        before_s = self._last_s.get(seen.node_id)
        self._last_s[seen.node_id] = seen.observed_at_s
        locked = {gpu.uuid: gpu.locked_mhz for gpu in seen.gpus}
        for instance in seen.instances:
            was = self._now.pop(instance.instance_id, None)
            if instance.state is not InstanceState.READY or instance.running is None:
                continue
            kind = pools.get(instance.instance_id, instance.pool), instance.tp
            clocks = {locked.get(uuid) or self.fit.profile.full_mhz for uuid in instance.gpu_uuids}
            if len(clocks) != 1:
                continue
            now = kind, next(iter(clocks))
            self._now[instance.instance_id] = now
            if was == now and before_s is not None and seen.observed_at_s > before_s:
                mine = self._seen.setdefault((instance.instance_id, *now), _Seen())
                mine.running_s += instance.running * (seen.observed_at_s - before_s)
                mine.seconds += seen.observed_at_s - before_s

    def spent(self, entry: EnergyEntry) -> None:
        """Takes the energy of one of its GPUs."""
        mine = self._seen.get((entry.instance_id, *self._now.get(entry.instance_id, (("", 0), 0))))
        if mine is not None and entry.state in _SERVING and mine.gpu_s < mine.seconds * entry.tp:
            mine.energy_j += entry.energy_j
            mine.gpu_s += entry.seconds

    def close_due(self, now_s: float, applied: Mapping[Kind, float], drifted: frozenset[Kind]) -> CorrectProfile | None:
        """At the end of a window: the correction to apply from now on, where it differs from `applied`."""
        if self._began_s is None:
            self._began_s = now_s
        if now_s - self._began_s < self.window_s:
            return None
        for kind, ratio in self._close().items():
            self._ratios.setdefault(kind, deque(maxlen=self.settings.windows)).append(ratio)
        self._began_s, self._seen, self._now = now_s, {}, {}  # instances that are gone are forgotten
        self.biases = {
            kind: bias_of(tuple(ratios), applied.get(kind, 1.0), self.settings)
            for kind, ratios in sorted(self._ratios.items())
        }
        factors = {kind: bias.factor for kind, bias in self.biases.items() if bias.factor != 1.0}
        now_drifted = frozenset(kind for kind, bias in self.biases.items() if bias.drifted)
        if factors == dict(applied) and now_drifted == drifted:
            return None
        return CorrectProfile(factors, tuple(sorted(now_drifted)))

    def _close(self) -> dict[Kind, float]:
        """Measured over predicted energy of the window by kind, where enough of it can be compared."""
        measured_j: dict[Kind, float] = defaultdict(float)
        predicted_j: dict[Kind, float] = defaultdict(float)
        for (_, kind, mhz), mine in self._seen.items():
            curve = self.fit.curve(*kind, mhz)
            if curve is None or mine.seconds < LEAST_S or mine.gpu_s <= 0:
                continue
            rate = curve.rate_for_running(mine.running_s / mine.seconds)
            watts = None if rate is None else curve.power_w(rate)
            if watts is not None:  # beyond what was measured nothing is extrapolated
                measured_j[kind] += mine.energy_j
                predicted_j[kind] += watts / kind[1] * mine.gpu_s
        return {kind: joules / predicted_j[kind] for kind, joules in measured_j.items() if predicted_j[kind] > 0}
