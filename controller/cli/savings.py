"""`dynamollm savings`: energy, cost and carbon saved per day and pool, with its uncertainty; and, with --ab, the proof
of it on the running fleet (controller/trial.py)."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from common.errors import UserError
from controller.cli.shared import DEFAULT_URL, JsonOption, UrlOption, console, moment, who_asks
from controller.store.records import SavingRow


def savings(
    since: Annotated[str, typer.Option("--from", help="UTC time, or an age: 6h, 7d.")] = "7d",
    until: Annotated[str, typer.Option("--to", help="As --from, or now.")] = "now",
    price: Annotated[str, typer.Option("--price-per-kwh", help="USD, or a CSV of time,value.")] = "0.12",
    carbon: Annotated[str, typer.Option("--carbon-g-per-kwh", help="Grams of CO2, or a CSV of time,value.")] = "450",
    save: Annotated[bool, typer.Option(help="Keep the result in the history (v_savings_by_day).")] = True,
    ab: Annotated[
        bool, typer.Option("--ab", help="Windows with and without the controller in turn, on the running fleet.")
    ] = False,
    lasts: Annotated[str, typer.Option("--for", help="With --ab: begin such a trial, for 6h, 2d. Else: show it.")] = "",
    window: Annotated[str, typer.Option("--window", help="With --for: length of one window.")] = "15m",
    settle: Annotated[str, typer.Option("--settle", help="With --for: what of each window does not count.")] = "2m",
    seed: Annotated[int, typer.Option("--seed", help="With --for: draws the order within each pair of windows.")] = 1,
    stop: Annotated[bool, typer.Option("--stop", help="With --ab: end the trial now.")] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """What was saved against other ways to run the same fleet on the same load; measured energy on one side, the
    profile's on the other, corrected by how it erred on what ran. With --ab: measured on both sides."""
    if ab:
        _trial(url, lasts, window, settle, seed, stop, as_json)
        return
    if lasts or stop:
        raise UserError("--for and --stop belong to --ab.", "Add --ab.")
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


def _trial(url: str, lasts: str, window: str, settle: str, seed: int, stop: bool, as_json: bool) -> None:
    from controller.loop.orders import CLUSTER_SCOPE
    from controller.store.engine import open_engine
    from controller.store.migrate import require_current
    from controller.store.records import OrderKind, OrderRecord
    from controller.store.repositories import rows_s, write_records
    from controller.trial import Trial, overruled, plan
    from controller.trial_result import mode_orders, result
    from controller.trials import last_trial

    now_s = time.time()
    engine = open_engine(url)
    require_current(engine)
    running = last_trial(engine)
    if lasts and stop:
        raise UserError("--for begins a trial and --stop ends one.", "Give one of them.")

    def order(trial: Trial | None) -> None:
        # Not made under any term: nobody leads by it, and whoever leads carries it out.
        value, until_s = ("", None) if trial is None else (trial.to_json(), trial.ends_s)
        number = round(now_s * 1e3)
        write_records(
            engine,
            [OrderRecord(0, number, now_s, OrderKind.TRIAL, CLUSTER_SCOPE, value, who_asks(), "savings --ab", until_s)],
        )

    if lasts:
        if running is not None and now_s < running.ends_s:
            raise UserError("a trial is running.", "See it with `dynamollm savings --ab`, end it with --stop.")
        row_s = rows_s(engine)
        running = plan(now_s, _seconds(lasts), _seconds(window), _seconds(settle), seed, row_s)
        order(running)
    if running is None:
        raise UserError("there is no trial.", "Begin one: `dynamollm savings --ab --for 6h`.")
    found = result(engine, running, now_s)
    if stop:
        order(None)
    orders = mode_orders(engine)
    over = stop or now_s >= running.ends_s or overruled(running, orders[-1] if orders else None)
    if as_json:
        shown = {
            **asdict(running),
            **asdict(found),
            "row_s": rows_s(engine),
            "found": found.found,
            "over": over,
            "said": found.sentence,
        }
        typer.echo(json.dumps(shown, indent=2))
        return
    begins, ends = (
        datetime.fromtimestamp(t, tz=UTC).strftime("%Y-%m-%d %H:%M:%S") for t in (running.begins_s, running.ends_s)
    )
    window_s = running.window_s
    long = f"{window_s / 60:g} minutes" if window_s % 60 == 0 else f"{window_s:g} s"
    length = f"{running.pairs} pairs of windows of {long}"
    console.print(f"{length}, {begins} to {ends} UTC, {'over' if over else 'running'}.", highlight=False)
    if found.left_out:
        console.print(f"{found.left_out} pairs are left out: not kept, or not measured whole.", highlight=False)
    console.print(found.sentence, highlight=False)


def _seconds(text: str) -> float:
    if text[-1:] not in tuple("smhd"):
        raise UserError(f"{text!r} is no span of time.", "Write 15m, 6h or 2d.")
    return -moment(text, 0.0)


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
