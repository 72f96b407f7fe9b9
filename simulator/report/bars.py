"""Figures that put the systems side by side: energy, savings, latency, carbon, cost, freed GPU-hours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from simulator.report.style import (
    BOUND_COLOUR,
    COLOURS,
    MISS_COLOUR,
    STATE_COLOURS,
    legend_above,
    new_figure,
    title_of,
)

Result = Mapping[str, Any]


def energy(result: Result) -> Figure:
    """kWh of the window by what the GPUs did, the spread over seeds, and the bound."""
    figure, (axes,) = new_figure(3.9)
    systems = result["systems"]
    places = np.arange(len(systems))
    below = np.zeros(len(systems))
    states = list(dict.fromkeys(state for system in systems.values() for state in system["energy_by_state_kwh"]))
    for state in sorted(states, key=_order_of_state):
        values = np.array([system["energy_by_state_kwh"].get(state, 0.0) for system in systems.values()])
        colour = STATE_COLOURS.get(state, "#8c6bb1")
        axes.bar(places, values, 0.62, below, color=colour, label=state, edgecolor="white", linewidth=0.4)
        below += values
    low, high = _range(result, "energy_parked_kwh")
    # Sums round: a whisker must not be negative.
    whiskers = np.maximum([below - low, high - below], 0.0)
    axes.errorbar(places, below, whiskers, fmt="none", ecolor="#111827", capsize=3, linewidth=1)
    for place, (top, system) in enumerate(zip(np.maximum(below, high), systems.values(), strict=True)):
        missed = not system["meets_slo"]
        axes.annotate(
            f"{system['energy_parked_kwh']:.3g}" + ("\nmisses SLO" if missed else ""),
            (place, top),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=MISS_COLOUR if missed else "#111827",
        )
    _bound_line(axes, result, "energy_parked_kwh")
    _system_axis(axes, result)
    axes.set_ylim(0, 1.16 * float(max(below.max(), high.max())))
    axes.set_ylabel("kWh of all GPUs in the window")
    legend_above(axes)
    return figure


def savings(result: Result) -> Figure:
    """Saved against SinglePool under each accounting."""
    figure, (axes,) = new_figure(3.7)
    systems = {name: system for name, system in result["systems"].items() if name != "singlepool"}
    places = np.arange(len(systems))
    kinds = (
        ("saved_off", "freed GPUs draw nothing", 0.45),
        ("saved_parked", "freed GPUs parked (headline)", 1.0),
        ("saved_wall", "at the wall, hosts included", 0.7),
    )
    for offset, (key, _, alpha) in zip((-0.27, 0.0, 0.27), kinds, strict=True):
        for place, (name, system) in enumerate(systems.items()):
            rows = [100 * row[key] for row in system["per_seed"]]
            mean = 100 * system[key]
            missed = not system["meets_slo"]
            axes.bar(
                place + offset,
                mean,
                0.25,
                color="white" if missed else COLOURS[name],
                alpha=1.0 if missed else alpha,
                edgecolor=MISS_COLOUR if missed else "white",
                hatch="////" if missed else "",
                linewidth=0.8 if missed else 0.4,
            )
            axes.errorbar(
                place + offset,
                mean,
                [[max(0.0, mean - min(rows))], [max(0.0, max(rows) - mean)]],
                fmt="none",
                ecolor="#111827",
                capsize=2,
                linewidth=0.8,
            )
    axes.axhline(0, color="#111827", linewidth=0.8)
    handles: list[Any] = [Patch(color="#374151", alpha=alpha, label=label) for _, label, alpha in kinds]
    handles.append(Patch(facecolor="white", edgecolor=MISS_COLOUR, hatch="////", label="misses SLO: no saving"))
    if result["bound"]:
        axes.axhline(100 * result["bound_saved_parked"], color=BOUND_COLOUR, linestyle=(0, (4, 3)), linewidth=1)
        handles.append(
            Line2D([], [], color=BOUND_COLOUR, linestyle=(0, (4, 3)), linewidth=1, label="clairvoyant bound, parked")
        )
    axes.set_xticks(places, [title_of(system) for system in systems.values()])
    axes.set_xlim(-0.6, len(systems) - 0.4)
    axes.set_ylabel("% of SinglePool's energy saved")
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.03), ncols=3, borderaxespad=0.0)
    return figure


def latency(result: Result) -> Figure:
    """From P50 to P99 by input bucket against its SLO, and the gaps between tokens."""
    systems = list(result["systems"].items())
    figure, panels = new_figure(3.2 + 0.18 * len(systems), 1, 4, sharey=True)
    slo = result["slo"]
    titles = {"S": "TTFT, short inputs", "M": "TTFT, medium inputs", "L": "TTFT, long inputs"}
    for axes, bucket in zip(panels[:3], "SML", strict=True):
        limit = slo[f"ttft_{bucket.lower()}_ms"]
        for place, (name, system) in enumerate(systems):
            line = system["latency_by_input"][bucket]
            _span(axes, place, name, line["ttft_p50_ms"], line["ttft_p99_ms"], limit)
        _limit(axes, limit)
        axes.set_title(titles[bucket])
        axes.set_xlabel("ms, P50 to P99 (log)")
    for place, (name, system) in enumerate(systems):
        _span(panels[3], place, name, system["tbt_p50_ms"], system["gap_p99_ms"], slo["token_gap_p99_ms"])
    _limit(panels[3], slo["token_gap_p99_ms"])
    panels[3].set_title("Between tokens")
    panels[3].set_xlabel("ms, mean P50 to gap P99 (log)")
    for axes in panels:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.12)
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(systems)), [str(system["title"]) for _, system in systems])
    panels[0].set_ylim(len(systems) - 0.5, -0.5)
    panels[0].tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], marker="o", markerfacecolor="white", color="#374151", linestyle="", label="P50"),
        Line2D([], [], marker="o", color="#374151", linestyle="", label="P99"),
        Line2D([], [], marker="X", color=MISS_COLOUR, linestyle="", label="P99 beyond the SLO"),
        Line2D([], [], color=MISS_COLOUR, linestyle=(0, (4, 3)), linewidth=1, label="SLO"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
    return figure


def money(result: Result) -> Figure:
    """Carbon, cost of electricity, and GPU-hours that were free for something else: never added up."""
    figure, panels = new_figure(2.2 + 0.16 * len(result["systems"]), 1, 3, sharey=True)
    systems = list(result["systems"].items())
    columns = (
        ("carbon_kg", "Carbon", "kg CO2"),
        ("cost_usd", "Electricity", "USD"),
        ("gpu_hours_freed", "GPU-hours freed", "GPU-hours"),
    )
    for axes, (key, title, unit) in zip(panels, columns, strict=True):
        values = [system[key] for _, system in systems]
        axes.barh(range(len(systems)), values, 0.62, color=[COLOURS[name] for name, _ in systems])
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:,.4g}",
                (value, place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_title(title)
        axes.set_xlabel(f"{unit} in the window")
        axes.set_xlim(0, 1.25 * max([*values, 1e-9]))
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(systems)), [_marked(system) for _, system in systems])
    panels[0].set_ylim(len(systems) - 0.5, -0.5)
    panels[0].tick_params(axis="y", length=0)
    return figure


def _order_of_state(state: str) -> int:
    """As they stand in STATE_COLOURS, from work to rest; what is not named there before the parked."""
    known = list(STATE_COLOURS)
    return 2 * known.index(state) if state in known else 2 * len(known) - 3


def _marked(system: Mapping[str, Any]) -> str:
    return str(system["title"]) + ("" if system["meets_slo"] else " *")


def _span(axes: Axes, place: int, name: str, low: float | None, high: float | None, limit: float) -> None:
    if low is None or high is None:
        return
    # What does not exist on a logarithm stands at its edge.
    low, high = max(low, 1.0), max(high, 1.0)
    axes.plot([low, high], [place, place], color=COLOURS[name], linewidth=2.2, solid_capstyle="round")
    axes.plot([low], [place], "o", markersize=5, markerfacecolor="white", markeredgecolor=COLOURS[name])
    beyond = high > limit
    axes.plot(
        [high],
        [place],
        "X" if beyond else "o",
        markersize=7 if beyond else 5,
        color=MISS_COLOUR if beyond else COLOURS[name],
    )


def _limit(axes: Axes, limit: float) -> None:
    axes.axvline(limit, color=MISS_COLOUR, linestyle=(0, (4, 3)), linewidth=1)


def _range(result: Result, key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rows = [[row[key] for row in system["per_seed"]] for system in result["systems"].values()]
    return np.array([min(row) for row in rows]), np.array([max(row) for row in rows])


def _bound_line(axes: Axes, result: Result, key: str) -> None:
    if result["bound"]:
        axes.axhline(
            result["bound"][key],
            color=BOUND_COLOUR,
            linestyle=(0, (4, 3)),
            linewidth=1,
            label=f"clairvoyant bound, {result['bound'][key]:.3g}",
        )


def _system_axis(axes: Axes, result: Result) -> None:
    axes.set_xticks(range(len(result["systems"])), [title_of(system) for system in result["systems"].values()])
    axes.set_xlim(-0.6, len(result["systems"]) - 0.4)
