"""Figures of what one option changes while all else stays: load, start times, physics, mismatch, pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simulator.report.style import BOUND_COLOUR, COLOURS, MISS_COLOUR, new_figure

OPTIONS: dict[str, tuple[str, str]] = {
    "u": ("Load", "u: load as a share of SinglePool's largest"),
    "predictor_accuracy": ("Predictor of output length", "share of requests whose output bucket is known at arrival"),
    "pools": ("Number of pools", "pools"),
    "start_s": ("Start of an instance", "seconds from the start until it serves"),
    "crashes_per_day": ("Crashes of instances", "a day, where all GPUs are held"),
    "physics": ("Physics", "variant"),
    "mismatch": ("Mismatch of profile and GPUs", "share by which GPUs are slower and hungrier than profiled"),
}
_COLUMNS = 2


def sensitivity(result: Mapping[str, Any], option: str) -> Figure:
    """Saved (parked) and attainment by the value of one option; a crossed-out point misses the SLO."""
    points = result["sensitivity"][option]
    figure, (left, right) = new_figure(3.2, 1, _COLUMNS)
    title, label = OPTIONS[option]
    numeric = all(isinstance(point["value"], int | float) and not isinstance(point["value"], bool) for point in points)
    places = [point["value"] if numeric else place for place, point in enumerate(points)]
    names = list(points[0]["systems"])
    for name in names:
        rows = [point["systems"][name] for point in points]
        if name != "singlepool":
            _line(left, places, [100 * row["saved_parked"] for row in rows], rows, name, joined=numeric)
        _line(right, places, [100 * row["attainment"] for row in rows], rows, name, joined=numeric)
    bounds = [point["bound_saved_parked"] for point in points]
    if any(bound is not None for bound in bounds):
        left.plot(
            places,
            [float("nan") if bound is None else 100 * bound for bound in bounds],
            color=BOUND_COLOUR,
            linestyle=(0, (4, 3)),
            linewidth=1,
        )
    left.axhline(0, color="#111827", linewidth=0.8)
    left.set_title(f"{title}: energy saved")
    left.set_ylabel("% of SinglePool's, parked")
    right.axhline(100 * result["slo"]["attainment"], color=MISS_COLOUR, linestyle=(0, (4, 3)), linewidth=1)
    right.set_title("Requests in SLO, worst class")
    right.set_ylabel("% (dashed: the SLO)")
    for axes in (left, right):
        axes.set_xlabel(label)
        axes.set_xticks(places, [_said(option, point["value"]) for point in points])
    _legend(figure, result, names, with_bound=any(bound is not None for bound in bounds))
    return figure


def _line(
    axes: Axes,
    places: Sequence[Any],
    values: list[float],
    rows: Sequence[Mapping[str, Any]],
    name: str,
    joined: bool,
) -> None:
    if joined:
        axes.plot(places, values, color=COLOURS[name], linewidth=1.8 if name == "dynamollm" else 1.0)
    for place, value, row in zip(places, values, rows, strict=True):
        good = row["meets_slo"]
        axes.plot(
            [place],
            [value],
            "o" if good else "X",
            color=COLOURS[name] if good else MISS_COLOUR,
            markersize=5 if good else 6.5,
        )


def _legend(figure: Figure, result: Mapping[str, Any], names: list[str], with_bound: bool) -> None:
    handles = [Line2D([], [], color=COLOURS[name], label=result["systems"][name]["title"]) for name in names]
    handles.append(Line2D([], [], marker="X", color=MISS_COLOUR, linestyle="", label="misses SLO"))
    if with_bound:
        handles.append(Line2D([], [], color=BOUND_COLOUR, linestyle=(0, (4, 3)), linewidth=1, label="bound"))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(6, ceil(len(handles) / 2)))


def _said(option: str, value: object) -> str:
    """None: pools as each system has them, or no predictor."""
    if value is None:
        return "auto" if option == "pools" else "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)
