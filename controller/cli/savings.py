"""`dynamollm savings`: energy, cost and carbon saved per day and pool, with its uncertainty."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.table import Table

from controller.cli.shared import DEFAULT_URL, JsonOption, UrlOption, console, moment
from controller.store.records import SavingRow


def savings(
    since: Annotated[str, typer.Option("--from", help="UTC time, or an age: 6h, 7d.")] = "7d",
    until: Annotated[str, typer.Option("--to", help="As --from, or now.")] = "now",
    price: Annotated[str, typer.Option("--price-per-kwh", help="USD, or a CSV of time,value.")] = "0.12",
    carbon: Annotated[str, typer.Option("--carbon-g-per-kwh", help="Grams of CO2, or a CSV of time,value.")] = "450",
    save: Annotated[bool, typer.Option(help="Keep the result in the history (v_savings_by_day).")] = True,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """What was saved against other ways to run the same fleet on the same load; measured energy on one side, the
    profile's on the other, corrected by how it erred on what ran."""
    from controller.savings import read_course
    from controller.savings import savings as computed
    from controller.store.engine import open_engine
    from controller.store.migrate import require_current
    from controller.store.repositories import write_records

    now_s = time.time()
    usd, grams = read_course(price, "--price-per-kwh"), read_course(carbon, "--carbon-g-per-kwh")
    engine = open_engine(url)
    require_current(engine)
    rows = computed(engine, moment(since, now_s), moment(until, now_s), usd, grams, now_s)
    if save:
        write_records(engine, rows)
    if as_json:
        typer.echo(json.dumps([_plain(row) for row in rows], indent=2))
        return
    table = Table(
        "day", "pool", "against", "hours", "kWh used", "kWh instead", "saved", "95 % interval", "USD", "kg CO2"
    )
    for row in rows:
        shown = _plain(row)
        table.add_row(
            row.day,
            row.pool or "cluster",
            row.against,
            f"{row.covered_s / 3600:.1f}",
            f"{shown['energy_kwh']:.2f}",
            f"{shown['against_kwh']:.2f}",
            f"{shown['saved_ratio']:.1%}",
            f"{shown['saved_ratio_low']:.1%} to {shown['saved_ratio_high']:.1%}",
            f"{shown['saved_usd']:.2f}",
            f"{shown['saved_kg_co2']:.2f}",
        )
    console.print(table)
    if any(row.against_low_j <= row.energy_j for row in rows if not row.pool):
        console.print("Where the interval reaches zero, no saving was found.")


def _plain(row: SavingRow) -> dict[str, float | str]:
    saved_j = row.against_j - row.energy_j
    return {
        "day": row.day,
        "pool": row.pool or "cluster",
        "against": row.against,
        "covered_hours": row.covered_s / 3600,
        "energy_kwh": row.energy_j / 3.6e6,
        "against_kwh": row.against_j / 3.6e6,
        "saved_kwh": saved_j / 3.6e6,
        "saved_ratio": saved_j / row.against_j if row.against_j else 0.0,
        "saved_ratio_low": 1 - row.energy_j / row.against_low_j if row.against_low_j else 0.0,
        "saved_ratio_high": 1 - row.energy_j / row.against_high_j if row.against_high_j else 0.0,
        "saved_usd": saved_j / 3.6e6 * row.usd_per_kwh,
        "saved_kg_co2": saved_j / 3.6e9 * row.g_per_kwh,
    }
