"""The page that says in words what was saved, against what, and why, and where the SLO is missed.

Every sentence is made from the result; nothing is claimed that its figures do not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Result = Mapping[str, Any]
Paragraphs = list[str]

OURS = "dynamollm"
BASELINE = "singlepool"
# Less than this between two savings is no difference: seeds differ by as much.
NOISE = 0.01


def headline(result: Result) -> Paragraphs:
    """What was saved."""
    name = OURS if OURS in result["systems"] else _cheapest(result)
    if name is None:
        return ["Only SinglePool was run: there is nothing to compare."]
    system, base = result["systems"][name], result["systems"][BASELINE]
    title = system["title"]
    load = (
        f"On {result['trace']['name']} at u = {result['u']:g} ({base['requests']:,} requests in the window, "
        f"{result['nodes']} nodes of eight GPUs, {_count(len(result['seeds']), 'seed')})"
    )
    used = f"{system['energy_parked_kwh']:.3g} kWh where SinglePool uses {base['energy_parked_kwh']:.3g}"
    if not base["meets_slo"]:
        said = [f"{load}, SinglePool itself misses the SLO: this load is too much to compare savings at."]
    elif not system["meets_slo"]:
        said = [f"{load}, {title} misses the SLO, so it saves nothing that counts. It would use {used}."]
    else:
        said = [
            f"{load}, {title} uses {used}: it saves {_range(system, 'saved_parked')} while every class of requests "
            f"keeps its SLO. That counts a freed GPU at the {result['assumptions']['parked_w']:.0f} W that it still "
            f"draws. If freed GPUs drew nothing it would be {_range(system, 'saved_off')}; at the wall, with hosts, "
            f"fans and network, and empty nodes switched off, {_range(system, 'saved_wall')}."
        ]
    freed = system["gpu_hours_freed"] - base["gpu_hours_freed"]
    carbon, cost = base["carbon_kg"] - system["carbon_kg"], base["cost_usd"] - system["cost_usd"]
    if system["meets_slo"] and base["meets_slo"]:
        said.append(
            f"In the window that is {carbon:.3g} kg of CO2 and {cost:.3g} USD of electricity. Apart from electricity, "
            f"{freed:,.4g} GPU-hours were free for other work; what they are worth depends on what would run there, "
            "and they are not counted in it."
        )
    return said


def against(result: Result) -> Paragraphs:
    """Against what it stands up."""
    systems = result["systems"]
    if OURS not in systems:
        return []
    ours, said = systems[OURS], []
    questions = (
        ("best_clock", "One pool at its best clock, chosen in hindsight", "needs no controller at all"),
        ("reactive", "A reactive autoscaler as people run it today", "needs no profile"),
        ("best_static", "The best static layout in hindsight", "knows the whole trace beforehand and never switches"),
    )
    for name, what, note in questions:
        if name not in systems:
            continue
        other = systems[name]
        if not other["meets_slo"]:
            said.append(f"{what} misses the SLO here.")
            continue
        less = 1 - ours["energy_parked_kwh"] / other["energy_parked_kwh"]
        verb = f"{less:.1%} less than it" if less >= 0 else f"{-less:.1%} more than it"
        said.append(f"{what} ({note}) saves {other['saved_parked']:.1%}; {ours['title']} uses {verb}.")
    bound = result["bound"]
    if bound and bound["saved_parked"] > 0:
        share = ours["saved_parked"] / bound["saved_parked"]
        said.append(
            f"A clairvoyant controller that knows every request, switches for nothing and fills the SLO to its last "
            f"millisecond would save {bound['saved_parked']:.1%}: {ours['title']} reaches {share:.0%} of that."
        )
    return said


def why(result: Result) -> Paragraphs:
    """Where the saving comes from, as the single knobs show it."""
    systems = result["systems"]
    if OURS not in systems:
        return []
    ours, base = systems[OURS], systems[BASELINE]
    said = [
        f"{ours['title']} holds {ours['mean_gpus']:.1f} GPUs on average (at most {ours['peak_gpus']}) where SinglePool "
        f"holds {base['mean_gpus']:.0f}, and runs them at {_mean_clock(ours):.0f} MHz on average instead of "
        f"{_mean_clock(base):.0f}. {_sharding(ours)} Cluster power falls from {base['power_p50_w'] / 1e3:.1f} to "
        f"{ours['power_p50_w'] / 1e3:.1f} kW at the median minute and from {base['power_peak_w'] / 1e3:.1f} to "
        f"{ours['power_peak_w'] / 1e3:.1f} kW at the peak."
    ]
    knobs = [
        ("multipool", "cutting the load into pools alone"),
        ("scaleinst", "pools and the number of instances"),
        ("scaleshard", "pools and tensor parallelism"),
        ("scalefreq", "pools and clocks"),
    ]
    parts = [
        f"{what}: " + (f"{systems[name]['saved_parked']:.1%}" if systems[name]["meets_slo"] else "misses the SLO")
        for name, what in knobs
        if name in systems
    ]
    if parts:
        said.append(f"One knob at a time: {'; '.join(parts)}; all knobs: {_or_miss(ours)}.")
    loading = ours["energy_by_state_kwh"]["loading"] + ours["energy_by_state_kwh"]["draining"]
    said.append(
        f"Changing costs something too: {ours['switches']:.0f} instances were started in the window, and GPUs that "
        f"loaded or drained took {loading:.2g} kWh, {loading / ours['energy_parked_kwh']:.1%} of what it uses. "
        f"The clock was set {ours['clock_changes']:,.0f} times."
    )
    return said


def missed(result: Result) -> Paragraphs:
    """Every system that misses the SLO, where, and by how much; and what the others paid in latency."""
    slo, said = result["slo"], []
    for system in result["systems"].values():
        if system["meets_slo"]:
            continue
        bad = {c: share for c, share in system["attainment_by_class"].items() if share < slo["attainment"]}
        parts = [f"{c} {share:.2%}" for c, share in sorted(bad.items(), key=lambda item: item[1])]
        seeds = [row["seed"] for row in system["per_seed"] if not row["meets_slo"]]
        gaps = {
            c: gap
            for row in system["per_seed"]
            for c, gap in row["gap_by_class_ms"].items()
            if gap > slo["token_gap_p99_ms"]
        }
        if gaps:
            parts.append("P99 of token gaps " + ", ".join(f"{c} {gap:.0f} ms" for c, gap in gaps.items()))
        if system["lost"]:
            parts.append(f"up to {system['lost']:,} requests lost")
        where = f"in {_count(len(seeds), 'seed')} of {len(result['seeds'])}"
        said.append(f"{system['title']} misses the SLO {where}: {'; '.join(parts)}.")
    if not said:
        said.append(
            f"Nowhere: every system keeps {slo['attainment']:.0%} of every class within the SLO, in every seed. "
            "Classes with fewer than 1,000 requests are judged within their input bucket."
        )
    if OURS in result["systems"]:
        ours, base = result["systems"][OURS], result["systems"][BASELINE]
        said.append(
            f"The saving is paid in latency, within the SLO: {ours['title']}'s TTFT is {_ms(ours['ttft_p50_ms'])} ms "
            f"at P50 and {_ms(ours['ttft_p99_ms'])} ms at P99 (SinglePool {_ms(base['ttft_p50_ms'])} and "
            f"{_ms(base['ttft_p99_ms'])}), its time between tokens {_ms(ours['tbt_p50_ms'])} ms at P50 (SinglePool "
            f"{_ms(base['tbt_p50_ms'])}), the P99 of token gaps {_ms(ours['gap_p99_ms'])} ms (SinglePool "
            f"{_ms(base['gap_p99_ms'])})."
        )
    return said


def pattern(result: Result) -> Paragraphs:
    """The published pattern (HPCA 2025): there, or absent and why."""
    systems, said = result["systems"], []
    if "multipool" in systems:
        saved = systems["multipool"]["saved_parked"]
        seen = saved <= NOISE
        said.append(
            f"Static class pools are no better than one pool: {'yes' if seen else 'no'} ({saved:.1%}; published: 20 % "
            "worse, with nine pools, each sized for its own peak; here there are two)."
        )
    knobs = {name: systems[name] for name in ("scaleinst", "scaleshard", "scalefreq") if name in systems}
    if len(knobs) == 3:
        best = max(knobs, key=lambda name: knobs[name]["saved_parked"])
        if best == "scalefreq":
            said.append("The clock is the strongest single knob: yes.")
        else:
            said.append(
                f"The clock is the strongest single knob: no, here it is {knobs[best]['title']} "
                f"({knobs[best]['saved_parked']:.1%} against {knobs['scalefreq']['saved_parked']:.1%}). The published "
                "ScaleInst and ScaleShard size every one of nine pools for itself and stop the old instance before the "
                "new one serves; with two pools and make-before-break, as here, the number of instances can follow the "
                "load, and a GPU that is off saves more than one that is slow."
            )
    if OURS in systems:
        ours, base = systems[OURS], systems[BASELINE]
        if ours["ttft_p50_ms"] and base["ttft_p50_ms"]:
            more = ours["ttft_p50_ms"] / base["ttft_p50_ms"] - 1
            tail = ours["ttft_p99_ms"] / base["ttft_p99_ms"] - 1
            said.append(
                f"P50 latency is worse: {'yes' if more > 0 else 'no'} (TTFT {more:+.0%}; published +8 to "
                f"+11 %). P99 is better: {'yes' if tail < 0 else 'no'} (TTFT {tail:+.0%}; published -5 to -11 %): here "
                "the controller fills the SLO's slack on purpose, so tails move up to the bound and not beyond."
            )
    points = sorted(
        (point["u"], point["systems"][OURS]["saved_parked"])
        for point in result["sensitivity"].get("u", [])
        if OURS in point["systems"]
    )
    if len(points) > 1:
        falls = all(later[1] <= earlier[1] + NOISE for earlier, later in pairwise(points))
        said.append(
            f"Savings fall as the load rises: {'yes' if falls else 'no'} ("
            + ", ".join(f"{saved:.0%} at u {u:g}" for u, saved in points)
            + ")."
        )
    return said


def _or_miss(system: Mapping[str, Any]) -> str:
    return f"{system['saved_parked']:.1%}" if system["meets_slo"] else "misses the SLO"


def _cheapest(result: Result) -> str | None:
    good = {name: s["energy_parked_kwh"] for name, s in result["systems"].items() if name != BASELINE}
    return min(good, key=lambda name: good[name]) if good else None


def _range(system: Mapping[str, Any], key: str) -> str:
    """The mean, and the seeds' range where there are several."""
    rows: Sequence[float] = [row[key] for row in system["per_seed"]]
    text = f"{system[key]:.1%}"
    return text if len(rows) == 1 else f"{text} ({min(rows):.1%} to {max(rows):.1%} over the seeds)"


def _mean_clock(system: Mapping[str, Any]) -> float:
    """Of all GPUs that are held, over the window."""
    series, weighted, held = system["series"], 0.0, 0.0
    for pool, clocks in series["clock_mhz"].items():
        rows = [row for key, row in series["gpus"].items() if key.split("/")[0] == pool]
        for minute, mhz in enumerate(clocks):
            if mhz is not None:
                gpus = sum(row[minute] for row in rows)
                weighted += mhz * gpus
                held += gpus
    return weighted / held if held else 0.0


def _sharding(system: Mapping[str, Any]) -> str:
    by_tp: dict[str, float] = {}
    for key, row in system["series"]["gpus"].items():
        tp = key.split("/tp")[1]
        by_tp[tp] = by_tp.get(tp, 0.0) + sum(row)
    total = sum(by_tp.values())
    if not total:
        return ""
    parts = [f"{by_tp[tp] / total:.0%} of them in TP{tp}" for tp in sorted(by_tp, key=int) if by_tp[tp]]
    return f"{', '.join(parts)}."


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _ms(value: float | None) -> str:
    return "no" if value is None else f"{value:,.0f}"
