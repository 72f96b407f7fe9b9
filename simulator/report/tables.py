"""Tables of the report as HTML: all figures by system, attainment by class, energy by class x TP x clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Result = Mapping[str, Any]

_MISSING = "–"


def systems(result: Result) -> str:
    """Every headline figure; the saving of a system that misses the SLO is struck out."""
    head = ["system", "kWh, parked", "kWh, freed at 0 W", "kWh at the wall", "saved, off", "saved, parked"]
    head += ["saved, wall", "worst class", "TTFT ms P50 / P99", "TBT ms P50 / P99", "gap P99 ms", "GPUs mean / peak"]
    head += ["starts", "clock changes", "lost"]
    rows = []
    for name, system in result["systems"].items():
        missed = not system["meets_slo"]
        saved = [_saved(system, key, baseline=name == "singlepool") for key in ("off", "parked", "wall")]
        rows.append(
            [
                f'<span title="{escape(system["about"])}">{escape(system["title"])}</span>'
                + (' <b class="miss">misses SLO</b>' if missed else ""),
                _spread(system, "energy_parked_kwh"),
                _spread(system, "energy_off_kwh"),
                _spread(system, "wall_kwh"),
                *saved,
                _share(system["attainment"], result["slo"]["attainment"]),
                f"{_ms(system['ttft_p50_ms'])} / {_ms(system['ttft_p99_ms'])}",
                f"{_ms(system['tbt_p50_ms'])} / {_ms(system['tbt_p99_ms'])}",
                _ms(system["gap_p99_ms"]),
                f"{system['mean_gpus']:.1f} / {system['peak_gpus']}",
                f"{system['switches']:.0f}",
                f"{system['clock_changes']:,.0f}",
                f"{system['lost']:,}",
            ]
        )
    bound = result["bound"]
    if bound:
        cells = [f"{bound[key]:.3g}" for key in ("energy_parked_kwh", "energy_off_kwh")]
        saved = [f"{bound['saved_off']:.1%}", f"{bound['saved_parked']:.1%}"]
        rows.append(["clairvoyant bound", *cells, _MISSING, *saved, *[_MISSING] * 9])
    return table(head, rows)


def attainment(result: Result) -> str:
    """Share of requests in SLO by class; what is below the bound is red."""
    found = result["systems"]
    classes = sorted({c for system in found.values() for c in system["attainment_by_class"]}, key=_class_order)
    least = result["slo"]["attainment"]
    rows = []
    for system in found.values():
        by_class = system["attainment_by_class"]
        cells = [_share(by_class[c], least) if c in by_class else _MISSING for c in classes]
        rows.append([escape(system["title"]), *cells, f"{system['attainment_overall']:.2%}"])
    return table(["system", *classes, "all requests"], rows)


def latency_by_class(result: Result, name: str) -> str:
    """One system's latency in every class that has enough requests for a P99."""
    system, slo = result["systems"][name], result["slo"]
    head = ["class", "requests", "TTFT P50 ms", "TTFT P99 ms", "SLO", "TBT P50 ms", "TBT P99 ms", "gap P99 ms", "SLO"]
    rows = []
    for c, line in system["latency_by_class"].items():
        ttft_slo, gap_slo = slo[f"ttft_{c[0].lower()}_ms"], slo["token_gap_p99_ms"]
        rows.append(
            [
                c,
                f"{line['requests']:,.0f}",
                _ms(line["ttft_p50_ms"]),
                _limited(line["ttft_p99_ms"], ttft_slo),
                _ms(ttft_slo),
                _ms(line["tbt_p50_ms"]),
                _limited(line["tbt_p99_ms"], slo["tbt_ms"]),
                _limited(line["gap_p99_ms"], gap_slo),
                _ms(gap_slo),
            ]
        )
    return table(head, rows)


def energy_by_class(result: Result, load_tokens_per_s: int) -> str:
    """Wh per request by class x TP x clock at one load; green is cheap within its class, crossed out misses the SLO."""
    energies = result["energy_table"]
    cells = {
        (cell["class"], cell["tp"], cell["mhz"]): cell
        for cell in energies["cells"]
        if cell["load_tokens_per_s"] == load_tokens_per_s
    }
    tps, clocks = energies["tps"], energies["clocks_mhz"]
    above = "".join(f'<th colspan="{len(clocks)}">TP{tp}</th>' for tp in tps)
    below = "".join(f"<th>{mhz / 1000:.1f}</th>" for _ in tps for mhz in clocks)
    lines = [f'<thead><tr><th rowspan="2">class</th>{above}</tr><tr>{below}</tr></thead><tbody>']
    for name in energies["classes"]:
        good = [c["wh"] for key, c in cells.items() if key[0] == name and c["meets_slo"]]
        row = "".join(_energy_cell(cells[name, tp, mhz], good) for tp in tps for mhz in clocks)
        lines.append(f"<tr><th>{name}</th>{row}</tr>")
    return f'<div class="wide"><table class="heat">{"".join(lines)}</tbody></table></div>'


def _energy_cell(cell: Mapping[str, Any], good: Sequence[float]) -> str:
    if cell["wh"] is None:
        return '<td class="never" title="the load is more than the instance finishes">×</td>'
    text = f"{cell['wh']:.3f}" if cell["wh"] < 1 else f"{cell['wh']:.2f}"
    said = f"{cell['attainment']:.1%} in SLO"
    if not cell["meets_slo"]:
        return f'<td class="never" title="{said}"><s>{text}</s></td>'
    low, high = min(good), max(good)
    worse = (cell["wh"] - low) / (high - low) if high > low else 0.0
    best = ' class="best"' if cell["wh"] == low else ""
    return f'<td{best} style="background:hsl({120 - 85 * worse:.0f} 55% 86%)" title="{said}">{text}</td>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _class_order(name: str) -> tuple[int, int, int]:
    rank = "SML".index
    return (rank(name[0]), len(name) == 1, rank(name[-1]))


def _saved(system: Mapping[str, Any], key: str, baseline: bool) -> str:
    if baseline:
        return _MISSING
    text = f"{system[f'saved_{key}']:.1%}"
    return text if system["meets_slo"] else f'<s title="misses the SLO">{text}</s>'


def _spread(system: Mapping[str, Any], key: str) -> str:
    half = 50 * system["spread"].get(key, 0.0) / system[key]
    return f"{system[key]:.3g}" + (f" <small>±{half:.1f}%</small>" if len(system["per_seed"]) > 1 else "")


def _share(value: float, least: float) -> str:
    text = f"{value:.2%}"
    return text if value >= least else f'<b class="miss">{text}</b>'


def _limited(value: float | None, limit: float) -> str:
    return _ms(value) if value is None or value <= limit else f'<b class="miss">{_ms(value)}</b>'


def _ms(value: float | None) -> str:
    return _MISSING if value is None else f"{value:,.0f}"
