"""Draws the plots of docs/physics.md: `python -m simulator.physics_plots [FOLDER]` (docs/img without one).

Run it after a change of the model or its parameters: the page shows what is drawn there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.errors import exit_on_user_error
from simulator.physics import Physics
from simulator.physics_check import CONTEXT_TOKENS, MEASURED, TP, MeasuredPoint, compare
from simulator.report.style import new_figure, style, to_svg

FOLDER = Path(__file__).parents[1] / "docs" / "img"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512)
VARIANTS = {"base": "#009e73", "pessimistic": "#d55e00", "optimistic": "#0072b2"}
_TP_COLOURS = {2: "#56b4e9", 4: "#0072b2", 8: "#111827"}


def measured(physics: Physics) -> Figure:
    """Step time, power and energy per token over the batch, against what was measured."""
    figure, (steps, powers, energies) = new_figure(3.2, 1, 3)
    found = [compare(physics, _at(batch)) for batch in BATCHES]
    steps.plot(BATCHES, [1e3 * c.decode_s for c in found], color="#0072b2", label="decode alone")
    steps.plot(BATCHES, [1e3 * c.mixed_s for c in found], color="#e69f00", label="with prompts mixed in")
    steps.plot(_batches(), [1e3 * p.itl_p50_s for p in MEASURED], "o", color="#0072b2", label="measured gap, P50")
    steps.plot(
        _batches(),
        [1e3 * p.batch / p.tokens_per_s for p in MEASURED],
        "s",
        color="#e69f00",
        markersize=5,
        label="measured gap, mean",
    )
    steps.set_title("Time of an iteration")
    steps.set_ylabel("ms")
    powers.plot(BATCHES, [c.mixed_w for c in found], color="#009e73", label="model, prompts mixed in")
    powers.plot(_batches(), [p.power_w for p in MEASURED], "o", color="#009e73", label="measured")
    powers.set_title("Power of a GPU")
    powers.set_ylabel("W")
    joules = [c.mixed_w * TP * c.mixed_s / c.measured.batch for c in found]
    energies.plot(BATCHES, joules, color="#cc79a7", label="model")
    energies.plot(_batches(), [p.joules_per_token for p in MEASURED], "o", color="#cc79a7", label="measured")
    energies.set_title("Energy of an answer's token")
    energies.set_ylabel("J, all four GPUs (log)")
    energies.set_yscale("log")
    energies.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (steps, powers, energies):
        _over_batch(axes)
        axes.legend(loc="best")
    for axes in (steps, powers):
        axes.set_ylim(0, None)
    return figure


def clocks() -> Figure:
    """What the clock does to time, power and energy, under each assumption about DVFS."""
    figure, panels = new_figure(3.4, 1, 3)
    work = (("decode, batch 32", 32, ()), ("prefill, 1024 tokens", 0, ((1024, 0),)))
    for variant, colour in VARIANTS.items():
        physics = Physics.load(variant=variant)
        mhz = [clock for clock in physics.clocks_mhz if clock >= 600][::4]
        for (name, batch, prefill), line in zip(work, ("-", (0, (4, 2))), strict=True):
            rows = [physics.iteration(8, clock, batch, batch * CONTEXT_TOKENS, prefill) for clock in mhz]
            full_s, full_w = rows[-1]
            label = f"{variant}, {name}"
            panels[0].plot(mhz, [seconds / full_s for seconds, _ in rows], color=colour, linestyle=line, label=label)
            panels[1].plot(mhz, [watts for _, watts in rows], color=colour, linestyle=line)
            energies = [seconds * watts / (full_s * full_w) for seconds, watts in rows]
            panels[2].plot(mhz, energies, color=colour, linestyle=line)
    for axes, title, unit in zip(
        panels,
        ("Time", "Power of a GPU", "Energy"),
        ("times that at 1980 MHz", "W", "times that at 1980 MHz"),
        strict=True,
    ):
        axes.set_title(f"{title}, TP8")
        axes.set_ylabel(unit)
        axes.set_xlabel("SM clock, MHz")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def sharding(physics: Physics) -> Figure:
    """Energy of a decoded token by tensor parallelism and batch, at full clock and at 1200 MHz."""
    figure, panels = new_figure(3.1, 1, 2, sharey=True)
    for axes, mhz in zip(panels, (1980, 1200), strict=True):
        for tp in physics.tps:
            most = physics.kv_capacity_tokens(tp) // CONTEXT_TOKENS
            batches = [batch for batch in BATCHES if batch <= min(most, 256)]
            rows = [physics.iteration(tp, mhz, batch, batch * CONTEXT_TOKENS) for batch in batches]
            joules = [seconds * watts * tp / batch for batch, (seconds, watts) in zip(batches, rows, strict=True)]
            axes.plot(batches, joules, "o-", markersize=3, color=_TP_COLOURS.get(tp, "#cc79a7"), label=f"TP{tp}")
        _over_batch(axes)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"Energy of a decoded token at {mhz} MHz")
        axes.legend()
    panels[0].set_ylabel("J, all GPUs (log)")
    return figure


def draw(folder: Path) -> list[Path]:
    """Writes the plots; the same model gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style():
        for name, figure in (
            ("physics-measured", measured(Physics.load())),
            ("physics-clocks", clocks()),
            ("physics-sharding", sharding(Physics.load())),
        ):
            file = folder / f"{name}.svg"
            file.write_text(to_svg(figure), encoding="utf-8")
            written.append(file)
    return written


def _at(batch: int) -> MeasuredPoint:
    """The load of the measurements at a batch that was not measured."""
    return MeasuredPoint(batch, float("nan"), float("nan"), float("nan"), float("nan"))


def _batches() -> list[int]:
    return [point.batch for point in MEASURED]


def _over_batch(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("requests in the batch")


def main() -> None:
    with exit_on_user_error("simulator.physics_plots"):
        for file in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
            sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
