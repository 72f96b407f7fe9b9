"""How every figure of the report looks, and how it becomes SVG: colours by system, sizes, axes of time.

Figures are drawn without pyplot and without a window system; the same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

WIDTH_IN = 9.6
# More points than this are no longer told apart; a week's minutes are averaged down to it.
MOST_POINTS = 720

COLOURS: dict[str, str] = {
    "singlepool": "#6b7280",
    "multipool": "#a3a9b5",
    "scaleinst": "#0072b2",
    "scaleshard": "#e69f00",
    "scalefreq": "#cc79a7",
    "dynamollm": "#009e73",
    "best_clock": "#8c6bb1",
    "reactive": "#d55e00",
    "best_static": "#56b4e9",
}
BOUND_COLOUR = "#111827"
MISS_COLOUR = "#b91c1c"
STATE_COLOURS: dict[str, str] = {
    "serving": "#009e73",
    "idle": "#f0e442",
    "loading": "#56b4e9",
    "draining": "#cc79a7",
    "parked": "#c7ccd4",
}
# Any: matplotlib's type names every setting there is.
_STYLE: Any = {
    "svg.hashsalt": "dynamollm",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
}


def style() -> Any:
    """A context in which figures must be made and saved."""
    return rc_context(_STYLE)


def new_figure(height_in: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(np.asarray(axes).ravel())


def to_svg(figure: Figure) -> str:
    """The figure as an element that can stand in a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Without what a file would say of itself: it stands in a page.
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)


def legend_above(axes: Axes, columns: int = 6) -> None:
    """Outside the axes, so that it covers no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.06), ncols=columns, borderaxespad=0.0, columnspacing=1.4)


def binned(values: Sequence[float | None]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Minutes and values, averaged down to what a figure can show; NaN where there is none."""
    row = np.array([np.nan if value is None else value for value in values], np.float64)
    step = max(1, -(-len(row) // MOST_POINTS))
    padded = np.concatenate((row, np.full(-len(row) % step, np.nan))).reshape(-1, step)
    known = np.isfinite(padded)
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = np.where(known, padded, 0.0).sum(axis=1) / known.sum(axis=1)
    return (np.arange(len(means), dtype=np.float64) + 0.5) * step, means


def time_axis(axes: Axes, minutes: int) -> float:
    """Labels the axis and gives its unit in minutes: minutes, hours or days."""
    unit, name = (1.0, "minutes") if minutes <= 240 else (60.0, "hours") if minutes <= 4320 else (1440.0, "days")
    axes.set_xlabel(f"{name} since the window opened")
    axes.set_xlim(0, minutes / unit)
    return unit


def title_of(system: Mapping[str, Any]) -> str:
    """Its name as it stands at an axis."""
    return str(system["title"]).replace("Best ", "Best\n")
