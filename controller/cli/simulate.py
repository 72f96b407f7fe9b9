"""`dynamollm simulate`: what each system would cost on a load, counted by the ledger (simulator/ledger.py)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from common.errors import UserError


def simulate(
    trace: Annotated[str, typer.Option(help="A trace file, or conv, code, week-conv, week-code.")],
    nodes: Annotated[int, typer.Option(min=1, max=1000, help="Hosts of eight GPUs.")] = 12,
    u: Annotated[float, typer.Option(min=0.01, max=2.0, help="Load as a share of SinglePool's largest.")] = 0.6,
    systems: Annotated[str, typer.Option(help="all, or names separated by commas.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first one.")] = 1,
    bound: Annotated[bool, typer.Option(help="Compute the clairvoyant bound.")] = True,
    physics: Annotated[str, typer.Option(help="The twin's physics: [FILE:]VARIANT[+legacy].")] = "base",
    start_s: Annotated[float, typer.Option(min=0.1, help="Seconds that a start of an instance takes.")] = 180.0,
    carbon: Annotated[
        str, typer.Option("--carbon-g-per-kwh", help="Grams of CO2 per kWh, or a CSV of hours,value.")
    ] = "450",
    price: Annotated[str, typer.Option("--price-per-kwh", help="USD per kWh, or a CSV of hours,value.")] = "0.12",
    out: Annotated[Path | None, typer.Option(help="Folder for result.json, with the course over time.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder of profiles and searches; a second run reads them.")] = Path(
        ".cache"
    ),
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes; the result does not depend on it.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compares the systems on a load: energy, SLO, carbon and cost, beside the references and the bound."""
    from simulator.ledger import ALL_SYSTEMS, Study, read_steps, run_study, summary

    names = tuple(name.strip() for name in systems.split(",")) if systems != "all" else ALL_SYSTEMS
    options = {
        "--trace": trace,
        "--nodes": nodes,
        "--u": u,
        "--systems": systems,
        "--seeds": seeds,
        "--seed": seed,
        "--physics": physics,
        "--start-s": start_s,
        "--carbon-g-per-kwh": carbon,
        "--price-per-kwh": price,
    }
    command = ["dynamollm", "simulate", *(str(part) for option in options.items() for part in option)]
    study = Study(
        source=trace,
        nodes=nodes,
        u=u,
        systems=names,
        bound=bound,
        seed=seed,
        seeds=seeds,
        physics=physics,
        start_s=start_s,
        cache=cache,
        workers=workers,
        carbon=read_steps(carbon, "--carbon-g-per-kwh"),
        price=read_steps(price, "--price-per-kwh"),
        command=shlex.join(command if bound else [*command, "--no-bound"]),
    )
    if out is not None:
        _make_folder(out)  # before minutes of work, not after
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, description=what)

        result = run_study(study, show)
    if out is not None:
        (out / "result.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(summary(result), indent=1, allow_nan=False))
    else:
        _show(result)


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
