"""Puts the report together: one page of words, then every figure with what it shows, then all that is assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from html import escape
from typing import Any

from matplotlib.figure import Figure

from simulator.report import bars, courses, sweeps, tables, words
from simulator.report.style import style, to_svg

Result = Mapping[str, Any]

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Arial, sans-serif; color: #111827;
  background: #fff; max-width: 70rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .5rem 0; max-width: 50rem; }
.sub { color: #4b5563; }
.miss { color: #b91c1c; }
.verdict { border-left: 4px solid #009e73; background: #f0fdf7; padding: .6rem 1rem; margin: 1rem 0; max-width: none;
  font-size: 1.05rem; }
.verdict.bad { border-color: #b91c1c; background: #fef2f2; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #4b5563; font-size: .88rem; margin-top: .2rem; max-width: 50rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .76rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .4rem; border-bottom: 1px solid #e5e7eb; text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td { white-space: nowrap; }
th { color: #374151; font-weight: 600; }
small { color: #6b7280; }
s { color: #9ca3af; }
.heat td { padding: .18rem .3rem; font-size: .72rem; border: 1px solid #fff; }
.heat th { text-align: center; font-size: .72rem; padding: .18rem .3rem; }
.heat .never { background: repeating-linear-gradient(45deg, #fff 0 4px, #eceef1 4px 8px); color: #9ca3af;
  text-align: center; }
.heat .best { outline: 2px solid #065f46; outline-offset: -2px; font-weight: 700; }
code { background: #f3f4f6; padding: .1rem .3rem; border-radius: 3px; overflow-wrap: anywhere; }
ul { max-width: 50rem; padding-left: 1.2rem; }
li { margin: .25rem 0; }
@media print { body { max-width: none; margin: 0; } figure, tr { break-inside: avoid; } }
"""


def page(result: Result) -> str:
    """The whole page; nothing in it is fetched from anywhere."""
    parts = [_top(result), _words(result), _systems(result), _courses(result), _beyond(result), _sensitivity(result)]
    parts += [_energies(result), _end(result)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(result))}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _title(result: Result) -> str:
    return f"DynamoLLM on {result['trace']['name']}, {result['nodes']} nodes, u {result['u']:g}"


def _top(result: Result) -> str:
    trace = result["trace"]
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    sub = (
        f"{trace['requests']:,} requests over {trace['duration_s'] / 3600:.3g} h · {result['gpus']} GPUs · "
        f"k {result['k']:.2f} of k_max {result['k_max']:.2f} · seeds {seeds} · physics {result['physics']} · "
        f"profile {result['profile'][:12]} · version {result['version']}"
    )
    return f'<h1>{escape(_title(result))}</h1><p class="sub">{escape(sub)}</p>'


def _words(result: Result) -> str:
    first, *rest = words.headline(result)
    ours = result["systems"].get(words.OURS)
    bad = ours is not None and not (ours["meets_slo"] and result["systems"][words.BASELINE]["meets_slo"])
    return "\n".join(
        [
            f'<p class="verdict{" bad" if bad else ""}">{escape(first)}</p>',
            _paragraphs(rest),
            _section("Against what", words.against(result)),
            _section("Why", words.why(result)),
            _section("Where the SLO is missed, and what latency costs", words.missed(result)),
            _section("The published pattern", words.pattern(result)),
        ]
    )


def _systems(result: Result) -> str:
    window = f"{result['trace']['window_s'] / 3600:.3g} h"
    seeds = len(result["seeds"])
    spread = f"The bars are means of {seeds} seeds, the whiskers their range." if seeds > 1 else "One seed: no spread."
    return "\n".join(
        [
            "<h2>The systems side by side</h2>",
            _figure(
                lambda: bars.energy(result),
                f"Energy of every GPU of the fleet over the window ({window}), by what it did; a freed GPU draws "
                f"{result['assumptions']['parked_w']:.0f} W (parked). {spread}",
            ),
            _figure(
                lambda: bars.savings(result),
                "What each system saves against SinglePool of the same seed. A saving with a missed SLO is none.",
            ),
            tables.systems(result),
            _figure(
                lambda: bars.latency(result),
                "Time to first token by input length, and time between tokens; from the hollow dot (P50) to the full "
                "one (P99). The bound is per request for TTFT, so P99 to the left of it means the bucket is in SLO.",
            ),
            "<h3>Requests in SLO by class, worst seed</h3>",
            tables.attainment(result),
            *_by_class(result),
        ]
    )


def _by_class(result: Result) -> list[str]:
    system = result["systems"].get(words.OURS)
    if system is None:
        return []
    heading = f"<h3>Latency by class, {escape(system['title'])}</h3>"
    return [heading, tables.latency_by_class(result, words.OURS)]


def _courses(result: Result) -> str:
    return "\n".join(
        [
            "<h2>Over time</h2>",
            _figure(
                lambda: courses.power(result),
                f"Load and power, minute by minute, seed {result['seed']}. "
                "The bound may use any mix of clocks in any minute.",
            ),
            _figure(lambda: courses.clocks(result), "Mean clock of each pool's GPUs; a gap: the pool holds none."),
            _figure(
                lambda: courses.gpus(result),
                "GPUs held by each pool, the darker the wider the tensor parallelism; dashed: all there are.",
            ),
        ]
    )


def _beyond(result: Result) -> str:
    assumed = result["assumptions"]
    missing = any(not system["meets_slo"] for system in result["systems"].values())
    return "\n".join(
        [
            "<h2>Carbon, cost, and GPUs freed</h2>",
            _figure(
                lambda: bars.money(result),
                f"At {assumed['carbon_g_per_kwh']:g} g/kWh and {assumed['price_per_kwh']:g} USD/kWh on average. "
                "GPU-hours freed are those of GPUs that no instance held: they are shown apart, as what they are worth "
                "depends on what else would run there." + (" (*: misses the SLO.)" if missing else ""),
            ),
        ]
    )


def _sensitivity(result: Result) -> str:
    parts = ["<h2>Sensitivity</h2>"]
    swept = result["sensitivity"]
    for option in sweeps.OPTIONS:
        if option in swept:
            parts.append(_figure(partial(sweeps.sensitivity, result, option), _sweep_caption(option)))
    predictor = result["predictor"]
    parts.append(
        _paragraphs(
            [
                f"Predictor: routing knows the output bucket of {predictor['output_bucket_accuracy']:.1%} of the "
                f"requests ({predictor['method']}). Pools are cut by input length, which is known exactly at arrival, "
                "so a wrong guess sends no request to a wrong pool; it only shifts the load that is forecast by class."
                + _mispredicted(result),
                f"Pools: {', '.join(result['pools'])}; DynamoLLM may also serve everything from one.",
            ]
        )
    )
    left = [option for option in ("u", "pools", "start_s", "physics") if option not in swept]
    if left:
        options = ", ".join(f"--{option.replace('_', '-')} A,B,C" for option in left)
        parts.append(_paragraphs([f"Not swept here: run with several values, as in {options} (the first counts)."]))
    return "\n".join(parts)


def _mispredicted(result: Result) -> str:
    if words.OURS not in result["systems"]:
        return ""
    ours = result["systems"][words.OURS]
    return (
        f" DynamoLLM guessed {ours['mispredicted']:,.0f} requests wrong, {ours['outgrown']:,.0f} of them too short; "
        f"{ours['spilled']:,.0f} were served by a larger pool than their own (means over seeds)."
    )


def _sweep_caption(option: str) -> str:
    captions = {
        "u": "Load alone is changed; k_max stays.",
        "physics": "Profile, k_max and simulation all run on the variant; +legacy is an engine without CUDA graphs, "
        "+prefill-first one that reads prompts whole before anybody's next token.",
        "mismatch": "The profile is measured on the base physics, the fleet runs on GPUs that are off by that share.",
        "pools": "The systems with pools are held to that many; auto: the controller chooses between one and two.",
        "predictor_accuracy": "A predictor tells the output bucket at arrival, right that often; none: by experience.",
        "start_s": "Every start of an instance takes that long.",
        "crashes_per_day": "Instances die at random: answers under way are lost, the rest is served by others.",
    }
    return captions[option]


def _energies(result: Result) -> str:
    energies = result["energy_table"]
    if not energies:
        return ""
    parts = [
        "<h2>Energy by class, tensor parallelism and clock</h2>",
        _paragraphs(
            [
                "Wh per request on one instance that serves one class alone, at three loads of prompt and answer "
                "tokens together; clocks in GHz. The outlined cell is the cheapest that keeps the SLO; hatched cells "
                "miss it, × cannot even finish the load. Measured on the simulated GPUs, not on the planner's profile."
            ]
        ),
    ]
    for load in energies["loads_tokens_per_s"]:
        parts.append(f"<h3>{load:,} tokens/s</h3>" + tables.energy_by_class(result, load))
    return "\n".join(parts)


def _end(result: Result) -> str:
    assumed, skipped = result["assumptions"], result["trace"]["skipped"]
    notes = [*result["notes"]]
    host_w, off_s = assumed["host_w"], assumed["node_off_after_s"]
    notes.append(
        f"A start takes {result['start_s']:g} s. A host draws {host_w[0]:.0f} to {host_w[1]:.0f} W beside its GPUs; an "
        f"empty node goes off after {off_s:.0f} s, shuts down in {assumed['node_shutdown_s']:.0f} and boots in "
        f"{assumed['node_boot_s']:.0f} s (only `wall` counts that)."
    )
    notes.append("DVFS shape, voltage floor and knee are assumed, not measured: see docs/physics.md and --physics.")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    bad = "".join(f"<li><code>{escape(row)}</code></li>" for row in skipped["examples"])
    return (
        f"<h2>What is assumed</h2><ul>{items}</ul>"
        + (f"<h3>Rows left out ({skipped['rows']:,})</h3><ul>{bad}</ul>" if bad else "")
        + f"<h2>Again</h2><p><code>{escape(result['command'])}</code></p>"
    )


def _figure(draw: Callable[[], Figure | None], caption: str) -> str:
    with style():
        figure = draw()
        if figure is None:
            return ""
        svg = to_svg(figure)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _section(title: str, paragraphs: Iterable[str]) -> str:
    text = _paragraphs(paragraphs)
    return f"<h2>{escape(title)}</h2>{text}" if text else ""


def _paragraphs(paragraphs: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in paragraphs)
