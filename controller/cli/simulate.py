"""`dynamollm simulate`: what each system would cost on a load, counted by the ledger (simulator/ledger.py)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from common.errors import UserError

_SEVERAL = " Several, with commas: the first is the headline, the others show what it changes."


def simulate(
    trace: Annotated[str, typer.Option(help="A trace or log file, or conv, code, week-conv, week-code.")],
    nodes: Annotated[int, typer.Option(min=1, max=1000, help="Hosts of eight GPUs.")] = 12,
    u: Annotated[str, typer.Option(help="Load as a share of SinglePool's largest." + _SEVERAL)] = "0.6",
    systems: Annotated[str, typer.Option(help="all, or names separated by commas.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first one.")] = 1,
    bound: Annotated[bool, typer.Option(help="Compute the clairvoyant bound.")] = True,
    physics: Annotated[
        str, typer.Option(help="The twin's physics: [FILE:]VARIANT[+legacy][+prefill-first], or a grid." + _SEVERAL)
    ] = "base",
    mismatch: Annotated[
        str, typer.Option(help="Share by which the GPUs are slower and hungrier than profiled." + _SEVERAL)
    ] = "0",
    start_s: Annotated[str, typer.Option(help="Seconds that a start of an instance takes." + _SEVERAL)] = "180",
    pools: Annotated[str, typer.Option(help="Hold the pools to this many; auto: as each system does." + _SEVERAL)] = (
        "auto"
    ),
    predictor_accuracy: Annotated[
        str, typer.Option(help="Give routing a predictor that knows this share of output buckets." + _SEVERAL)
    ] = "none",
    crashes_per_day: Annotated[str, typer.Option(help="Crashes of instances at random, fleet-wide." + _SEVERAL)] = "0",
    columns: Annotated[
        str | None,
        typer.Option(
            help="Columns or JSON keys of your own log: arrival=NAME,input=NAME,output=NAME[,unit=s|ms|us|ns]."
        ),
    ] = None,
    carbon: Annotated[
        str, typer.Option("--carbon-g-per-kwh", help="Grams of CO2 per kWh, or a CSV of hours,value.")
    ] = "450",
    price: Annotated[str, typer.Option("--price-per-kwh", help="USD per kWh, or a CSV of hours,value.")] = "0.12",
    out: Annotated[
        Path | None, typer.Option(help="Folder for result.json, with the course over time, and report.html.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder of profiles and searches; a second run reads them.")] = Path(
        ".cache"
    ),
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes; the result does not depend on it.")] = 2,
    ray: Annotated[
        str | None, typer.Option(help="Run on a Ray cluster: its address, or local for one on this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compares the systems on a load: energy, SLO, carbon and cost, beside the references and the bound."""
    from simulator.ledger import summary
    from simulator.logs import LogColumns
    from simulator.prices import read_steps
    from simulator.sensitivity import run_sweeps
    from simulator.study import ALL_SYSTEMS, Study

    names = tuple(name.strip() for name in systems.split(",")) if systems != "all" else ALL_SYSTEMS
    swept: dict[str, list[Any]] = {
        "u": _several("--u", u, float),
        "start_s": _several("--start-s", start_s, float),
        "physics": _several("--physics", physics, str),
        "mismatch": _several("--mismatch", mismatch, float),
        "pools": _several("--pools", pools, lambda text: None if text == "auto" else int(text)),
        "predictor_accuracy": _several(
            "--predictor-accuracy", predictor_accuracy, lambda text: None if text == "none" else float(text)
        ),
        "crashes_per_day": _several("--crashes-per-day", crashes_per_day, float),
    }
    options = {
        "--trace": trace,
        "--nodes": nodes,
        "--u": u,
        "--systems": systems,
        "--seeds": seeds,
        "--seed": seed,
        "--physics": physics,
        "--mismatch": mismatch,
        "--start-s": start_s,
        "--pools": pools,
        "--predictor-accuracy": predictor_accuracy,
        "--crashes-per-day": crashes_per_day,
        "--carbon-g-per-kwh": carbon,
        "--price-per-kwh": price,
        **({"--columns": columns} if columns else {}),
    }
    command = ["dynamollm", "simulate", *(str(part) for option in options.items() for part in option)]
    study = Study(
        source=trace,
        nodes=nodes,
        systems=names,
        bound=bound,
        seed=seed,
        seeds=seeds,
        **{option: values[0] for option, values in swept.items()},
        columns=LogColumns.parse(columns) if columns else None,
        energy_table=out is not None,
        cache=cache,
        workers=workers,
        ray=ray,
        carbon=read_steps(carbon, "--carbon-g-per-kwh"),
        price=read_steps(price, "--price-per-kwh"),
        command=shlex.join(command if bound else [*command, "--no-bound"]),
    )
    if out is not None:
        from simulator.report import page_maker

        # Before minutes of work, not after.
        page_maker()
        _make_folder(out)
    bars = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*bars, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, description=what)

        result = run_sweeps(study, swept, show)
    if out is not None:
        from simulator.report import write_report

        (out / "result.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        write_report(result, out / "report.html")
    if as_json:
        typer.echo(json.dumps(summary(result), indent=1, allow_nan=False))
    else:
        _show(result)
        if out is not None:
            Console().print(f"{out / 'report.html'}", highlight=False)


def _several(option: str, text: str, read: Callable[[str], Any]) -> list[Any]:
    """One value, or several separated by commas, each once."""
    try:
        values = [read(part.strip()) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: is not a value, or values with commas between.", "Correct it.") from None
    if any(value != value for value in values):
        raise UserError(f"{option} {text}: is no number.", "Correct it.")
    return list(dict.fromkeys(values))


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}.", "Name another folder with --out.") from None


def _show(result: Mapping[str, Any]) -> None:
    """The table for people: a saving stands only where the SLO was met."""
    console = Console()
    headings = ("kWh\nparked", "saved\noff", "saved\nparked", "saved\nwall", "worst\nclass", "TTFT ms\np50/p99")
    table = Table(
        Column("system", no_wrap=True),
        *(Column(heading, no_wrap=True) for heading in headings),
        Column("GPUs\nmean/peak", no_wrap=True),
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"{result['trace']['name']}, {result['nodes']} nodes, u {result['u']:g} (k {result['k']:.2f} of "
        f"{result['k_max']:.2f}), {len(result['seeds'])} seeds, profile {result['profile'][:12]}",
    )
    for name, system in result["systems"].items():
        saved = [f"{system[key]:.1%}" for key in ("saved_off", "saved_parked", "saved_wall")]
        if name == "singlepool":
            saved = ["baseline", "", ""] if system["meets_slo"] else ["misses SLO", "", ""]
        elif not system["meets_slo"]:
            saved = ["misses SLO", "", ""]
        table.add_row(
            system["title"],
            f"{system['energy_parked_kwh']:.2f}",
            *saved,
            f"{system['attainment']:.2%}",
            f"{_ms(system['ttft_p50_ms'])}/{_ms(system['ttft_p99_ms'])}",
            f"{system['mean_gpus']:.0f}/{system['peak_gpus']}",
        )
    if result["bound"]:
        bound = result["bound"]
        saved = [f"{bound['saved_off']:.1%}", f"{bound['saved_parked']:.1%}"]
        table.add_row("Clairvoyant bound", f"{bound['energy_parked_kwh']:.2f}", *saved, "", "", "", "")
    console.print(table)
    for note in result["notes"]:
        console.print(f"- {note}", highlight=False)


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f}"
