"""A calibrated profile against what is known of the H100 under chat load: the pattern that must show in it.

`python -m simulator.calibration_check [FOLDER]` calibrates the twin (or reads it from FOLDER) and prints a Markdown
table: the statement, what measurements or publications say (docs/physics.md), and what this profile says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import exit_on_user_error
from controller.profile.fit import Curve, ProfileFit, fit
from simulator.calibration import calibrate_twin, single_pool_max_rps
from simulator.physics import Physics

NODES = 12  # of the reference cluster, one TP8 instance each


def check_table(fitted: ProfileFit, single_pool_rps: float) -> str:
    """The statements as a Markdown table."""
    wide = _curve(fitted, "short", 8, fitted.profile.full_mhz)
    rows = [
        ("SinglePool chat at its largest load, req/s per TP8 instance", "7.6", f"{single_pool_rps / NODES:.2f}"),
        (
            "energy per request, 5 % over 100 % of the largest load, short TP8",
            "8-10x by batch",
            f"{_by_batch(wide):.1f}x",
        ),
        ("the same, full over best clock at half load", "up to 1.5x", f"{_by_clock(fitted):.2f}x"),
        ("clock of least power at 5 / 50 / 99 % of the largest load, short TP8", "rises", best_clocks(fitted, "short")),
        ("the same, long TP8", "rises", best_clocks(fitted, "long")),
        ("largest load per GPU, TP2 over TP8, long", "far below 1", f"{_per_gpu(fitted, 2) / _per_gpu(fitted, 8):.2f}"),
        ("idle with a context, full and lowest clock, W per GPU", "122, 84", _idle(fitted)),
        ("W per GPU at the largest load, full clock", "441-546 at TP4, batch 8-128", f"{_top_w(wide) / 8:.0f}"),
    ]
    lines = ["| statement | known | this profile |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {known} | {here} |" for name, known, here in rows])


def _curve(fitted: ProfileFit, group: str, tp: int, mhz: int) -> Curve:
    curve = fitted.curve(group, tp, mhz)
    if curve is None:
        raise KeyError((group, tp, mhz))
    return curve


def _top_w(curve: Curve) -> float:
    return curve.power_w(curve.max_rate_rps) or 0.0


def _joules(curve: Curve, rate_rps: float) -> float:
    return (curve.power_w(rate_rps) or 0.0) / rate_rps


def _by_batch(curve: Curve) -> float:
    return _joules(curve, 0.05 * curve.max_rate_rps) / _joules(curve, curve.max_rate_rps)


def _by_clock(fitted: ProfileFit) -> float:
    clocks = fitted.clocks("short", 8)
    rate = 0.5 * clocks[-1].max_rate_rps
    return _joules(clocks[-1], rate) / min(_joules(c, rate) for c in clocks if c.max_rate_rps >= rate)


def best_clocks(fitted: ProfileFit, group: str) -> str:
    best = []
    for share in (0.05, 0.5, 0.99):
        rate = share * fitted.max_rate_rps(group, 8)
        fits = [c for c in fitted.clocks(group, 8) if c.max_rate_rps >= rate]
        best.append(min(fits, key=lambda c: c.power_w(rate) or 0.0).mhz)
    return " / ".join(str(mhz) for mhz in best)


def _per_gpu(fitted: ProfileFit, tp: int) -> float:
    return fitted.max_rate_rps("long", tp) / tp


def _idle(fitted: ProfileFit) -> str:
    clocks = fitted.profile.clocks_mhz
    return ", ".join(f"{(fitted.idle_power_w(8, mhz) or 0.0) / 8:.0f}" for mhz in (clocks[-1], clocks[0]))


def main() -> None:
    with exit_on_user_error("simulator.calibration_check"):
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".cache")
        physics = Physics.load()
        fitted = fit(calibrate_twin(physics, folder))
        sys.stdout.write(check_table(fitted, single_pool_max_rps(physics, NODES, "conv", folder)) + "\n")


if __name__ == "__main__":
    main()
