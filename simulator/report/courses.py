"""Figures over time, of the first seed: load and power, clocks, GPUs by pool and tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from simulator.report.style import BOUND_COLOUR, COLOURS, binned, legend_above, new_figure, time_axis

Result = Mapping[str, Any]

# All nine lines at once are a tangle: what is there today, what people run, what can be reached.
_SHOWN = ("singlepool", "reactive", "scalefreq", "dynamollm", "best_static")
_POOL_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))


def power(result: Result) -> Figure:
    """Requests/s above, kW of all GPUs below."""
    figure, (above, below) = new_figure(4.6, 2, 1, sharex=True, height_ratios=(1, 2.6))
    first = next(iter(result["systems"].values()))["series"]
    minutes = len(first["minute"])
    unit = time_axis(below, minutes)
    at, requests = binned(first["requests"])
    above.fill_between(at / unit, requests / 60, color="#d1d5db", linewidth=0)
    above.set_ylabel("requests/s")
    above.set_ylim(0, None)
    for name in _shown(result):
        system = result["systems"][name]
        at, watts = binned(system["series"]["power_w"])
        wide = 1.9 if name == "dynamollm" else 1.1
        below.plot(at / unit, watts / 1e3, color=COLOURS[name], linewidth=wide, label=system["title"])
    if result["bound"]:
        at, watts = binned(result["bound"]["series"]["power_parked_w"])
        below.plot(at / unit, watts / 1e3, color=BOUND_COLOUR, linewidth=0.9, linestyle=(0, (4, 3)), label="bound")
    below.set_ylabel("kW of all GPUs, parked ones included")
    below.set_ylim(0, None)
    legend_above(below)
    return figure


def clocks(result: Result) -> Figure | None:
    """Mean clock of every pool's GPUs, under the systems that steer clocks."""
    systems = [name for name in ("dynamollm", "scalefreq", "best_clock") if name in result["systems"]]
    if not systems:
        return None
    figure, (axes,) = new_figure(3.3)
    unit = time_axis(axes, len(result["systems"][systems[0]]["series"]["minute"]))
    for name in systems:
        system = result["systems"][name]
        for line, (pool, row) in zip(_cycle(_LINES), system["series"]["clock_mhz"].items(), strict=False):
            at, mhz = binned(row)
            label = system["title"] + ("" if pool == "all" else f", {pool}")
            wide = 1.7 if name == "dynamollm" else 1.0
            axes.plot(at / unit, mhz, color=COLOURS[name], linestyle=line, linewidth=wide, label=label)
    axes.set_ylabel("MHz, mean over the pool's GPUs")
    axes.margins(y=0.06)
    legend_above(axes, 5)
    return figure


def gpus(result: Result) -> Figure | None:
    """GPUs held by pool (hue) and tensor parallelism (shade), under the systems that change them."""
    systems = [name for name in ("dynamollm", "scaleshard", "scaleinst") if name in result["systems"]]
    if not systems:
        return None
    figure, panels = new_figure(1.0 + 2.1 * len(systems), len(systems), 1, sharex=True)
    for axes, name in zip(panels, systems, strict=True):
        system = result["systems"][name]
        series = system["series"]
        unit = time_axis(axes, len(series["minute"]))
        if axes is not panels[-1]:
            axes.set_xlabel("")
        keys = sorted(series["gpus"], key=lambda key: (key.split("/")[0], int(key.split("/tp")[1])))
        if keys:
            rows = [binned(series["gpus"][key]) for key in keys]
            axes.stackplot(
                rows[0][0] / unit,
                np.array([row for _, row in rows]),
                colors=_shades(keys),
                labels=[key.replace("/tp", " TP") for key in keys],
                linewidth=0.3,
                edgecolor="white",
            )
        axes.axhline(result["gpus"], color=BOUND_COLOUR, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_ylim(0, 1.06 * result["gpus"])
        axes.set_title(f"{system['title']} (of {result['gpus']} GPUs)")
        axes.set_ylabel("GPUs held")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure


def _shown(result: Result) -> list[str]:
    return [name for name in _SHOWN if name in result["systems"]] or list(result["systems"])


def _cycle(lines: tuple[Any, ...]) -> list[Any]:
    return list(lines) * 3


def _shades(keys: list[str]) -> list[tuple[float, float, float]]:
    """One hue per pool, the darker the wider the tensor parallelism."""
    pools = list(dict.fromkeys(key.split("/")[0] for key in keys))
    found = []
    for key in keys:
        pool, tp = key.split("/tp")
        hue = np.array(to_rgb(_POOL_COLOURS[pools.index(pool) % len(_POOL_COLOURS)]))
        pale = {2: 0.62, 4: 0.34}.get(int(tp), 0.0)
        red, green, blue = hue + (1 - hue) * pale
        found.append((float(red), float(green), float(blue)))
    return found
