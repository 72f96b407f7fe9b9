"""A small made-up profile for tests of the loop: smooth curves, no measurement behind them.

An instance of `tp` GPUs carries tp x 1 request/s of any group at full clock, in proportion less at lower clocks.
"""

from __future__ import annotations

from controller.domain.classes import ALL_CLASSES, DEFAULT_GROUPS, ClassScheme
from controller.domain.slo import Slo
from controller.profile.table import ClassMix, IdlePoint, OperatingPoint, Profile, StartCost, TokenWork

CLOCKS_MHZ = (800, 1400, 1980)
TPS = (2, 4, 8)
MODEL = "test-model"


def synthetic_profile(start_s: float = 10.0) -> Profile:
    points = []
    idle = []
    for tp in TPS:
        for mhz in CLOCKS_MHZ:
            speed = mhz / CLOCKS_MHZ[-1]
            knee_rps = tp * speed**0.5
            idle_w = tp * (72 + 50 * speed**2)
            idle.append(IdlePoint(tp, mhz, idle_w))
            for group in DEFAULT_GROUPS:
                for share in (0.1, 0.4, 0.7, 1.0, 1.3):
                    buckets = {c.input for c in group.classes}
                    ok = share <= 1.0
                    points.append(
                        OperatingPoint(
                            group=group.name,
                            tp=tp,
                            mhz=mhz,
                            rate_rps=share * knee_rps,
                            power_w=idle_w + tp * 400 * share**0.7 * speed**2,
                            attainment=0.999 if ok else 0.8,
                            attainment_worst=0.999 if ok else 0.8,
                            ttft_p50_ms={b: 50.0 for b in buckets},
                            ttft_p99_ms={b: 150.0 if ok else 5000.0 for b in buckets},
                            tbt_p99_ms=40.0,
                            gap_p99_ms=80.0,
                            running_mean=20 * share * tp / speed,
                            running_p99=30 * share * tp / speed,
                            requests=1000,
                        )
                    )
    mixes = {
        group.name: {
            c: ClassMix(1 / len(group.classes), {"S": 100, "M": 500, "L": 2000}[c.input], 150.0)
            for c in ALL_CLASSES
            if c in group.classes
        }
        for group in DEFAULT_GROUPS
    }
    return Profile(
        model=MODEL,
        gpu="synthetic",
        engine="none",
        scheme=ClassScheme(),
        slo=Slo(),
        groups=DEFAULT_GROUPS,
        tps=TPS,
        clocks_mhz=CLOCKS_MHZ,
        points=tuple(points),
        idle=tuple(idle),
        parked_w=72.0,
        mixes=mixes,
        work=TokenWork(1e-4, 1e-3),
        starts={tp: StartCost(start_s, start_s * tp * 122.0) for tp in TPS},
        provenance="made up for tests",
    )
