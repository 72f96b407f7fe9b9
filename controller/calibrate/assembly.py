"""The profile that a finished sweep makes: its points, idle and parked power, the mix, the work of a token, and which
actuator is the better one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from controller.calibrate.actuators import PhasePoint, compare, compare_phases
from controller.calibrate.sweep import MeasureBackend, Phase, SweepPlan, Tokens, set_of
from controller.domain.classes import ClassGroup, ClassScheme, RequestClass
from controller.profile.fit import fit
from controller.profile.table import ClassMix, IdlePoint, OperatingPoint, Profile, StartCost, TokenWork


@dataclass(frozen=True, slots=True)
class ProfileIdentity:
    """What the points belong to."""

    model: str
    gpu: str
    engine: str
    provenance: str


def build_profile(
    backend: MeasureBackend,
    plan: SweepPlan,
    identity: ProfileIdentity,
    points: Iterable[OperatingPoint],
    samples: Mapping[str, Sequence[Tokens]],
    starts: Mapping[int, StartCost],
) -> Profile:
    """The profile of a finished sweep. `samples` are the requests that each group was measured with."""
    full, widest = plan.clocks_mhz[-1], max(plan.tps)
    every = [tokens for group in plan.groups for tokens in samples[group.name]]
    mean = (sum(i for i, _ in every) / len(every), sum(o for _, o in every) / len(every))
    every_point = sorted(set_of(points), key=lambda p: (p.group, p.tp, p.mhz, p.rate_rps, p.cap_w or 0.0))
    profile = Profile(
        model=identity.model,
        gpu=identity.gpu,
        engine=identity.engine,
        scheme=plan.scheme,
        slo=plan.slo,
        groups=plan.groups,
        tps=plan.tps,
        clocks_mhz=plan.clocks_mhz,
        points=tuple(point for point in every_point if point.cap_w is None),
        idle=tuple(
            IdlePoint(tp, mhz, backend.idle_w(tp, mhz))
            for tp in plan.tps
            for mhz in sorted({plan.standby_mhz, *plan.clocks_mhz})
        ),
        parked_w=backend.parked_w(),
        mixes={group.name: class_mix(samples[group.name], plan.scheme) for group in plan.groups},
        work=TokenWork(
            backend.saturated(Phase.PREFILL, widest, full, mean)[0],
            backend.saturated(Phase.DECODE, widest, full, mean)[0],
        ),
        starts=dict(starts),
        provenance=identity.provenance,
        cap_points=tuple(point for point in every_point if point.cap_w is not None),
    )
    if not plan.caps_w:
        return profile
    phases = compare_phases(_phase_points(backend, plan, mean))
    return replace(profile, actuators=(*compare(fit(profile, safety_margin=0.0), profile.cap_points), *phases))


def _phase_points(backend: MeasureBackend, plan: SweepPlan, mean_tokens: tuple[float, float]) -> list[PhasePoint]:
    """Prefill and decode alone, under every lock and every cap."""
    full = plan.clocks_mhz[-1]
    settings: list[tuple[int, float | None]] = [(mhz, None) for mhz in plan.clocks_mhz]
    settings += [(full, cap_w) for cap_w in plan.caps_w]
    return [
        PhasePoint(phase.value, tp, mhz, cap_w, *backend.saturated(phase, tp, mhz, mean_tokens, cap_w))
        for phase in Phase
        for tp in plan.tps
        for mhz, cap_w in settings
    ]


def class_mix(samples: Sequence[Tokens], scheme: ClassScheme) -> dict[RequestClass, ClassMix]:
    """Shares and mean tokens of the classes in a sample."""
    by_class: dict[RequestClass, list[Tokens]] = defaultdict(list)
    for tokens in samples:
        by_class[scheme.classify(*tokens)].append(tokens)
    return {
        request_class: ClassMix(
            share=len(mine) / len(samples),
            input_tokens=sum(i for i, _ in mine) / len(mine),
            output_tokens=sum(o for _, o in mine) / len(mine),
        )
        for request_class, mine in sorted(by_class.items())
    }


def samples_by_group(
    samples: Sequence[Tokens], groups: Iterable[ClassGroup], scheme: ClassScheme
) -> dict[str, tuple[Tokens, ...]]:
    """The part of a sample that belongs to each group; in the sample's order."""
    return {
        group.name: tuple(tokens for tokens in samples if scheme.classify(*tokens) in group.classes) for group in groups
    }


def rarest_share(samples: Mapping[str, Sequence[Tokens]], scheme: ClassScheme) -> dict[str, float]:
    """Share of the rarest input bucket in each group's sample."""
    return {
        group: min(Counter(scheme.input_bucket(i) for i, _ in mine).values()) / len(mine)
        for group, mine in samples.items()
    }
