"""`dynamollm replay`: recorded decisions made again from recorded inputs, with the same policy or another."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UserError
from controller.cli.shared import DEFAULT_URL, JsonOption, UrlOption, console, moment

EXIT_DIFFERENT = 1


def replay(
    since: Annotated[str, typer.Option("--from", help="UTC time, or an age: 90m, 6h, 2d.")] = "1d",
    until: Annotated[str, typer.Option("--to", help="As --from, or now.")] = "now",
    policy: Annotated[
        Path | None, typer.Option(help="A controller.toml whose planning, periods and knobs are tried instead.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Makes the recorded decisions again. With the same policy they must be the same to the byte (exit code 1 when
    they are not); with another, what it would have done is predicted and compared."""
    from controller.store.engine import open_engine
    from controller.store.migrate import require_current

    now_s = time.time()
    since_s, until_s = moment(since, now_s), moment(until, now_s)
    if since_s >= until_s:
        raise UserError(f"--from {since} is not before --to {until}.")
    engine = open_engine(url)
    require_current(engine)
    if policy is None:
        _same(engine, since_s, until_s, as_json)
    else:
        _other(engine, since_s, until_s, policy, as_json)


def _same(engine: object, since_s: float, until_s: float, as_json: bool) -> None:
    from sqlalchemy import Engine

    from controller.replay.same import levels
    from controller.replay.same import replay as replayed

    assert isinstance(engine, Engine)
    report = replayed(engine, since_s, until_s)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "ok": report.ok}, indent=2))
    else:
        console.print(
            f"{report.identical} decisions are identical to the byte ({report.bytes} bytes; "
            f"{levels(report) or 'none'}); {report.solved_again} plans were solved again.",
            highlight=False,
        )
        if report.without_inputs:
            console.print(f"{report.without_inputs} decisions could not be replayed: their inputs are not there.")
        if report.solver_differs:
            console.print(f"{report.solver_differs} solves gave another plan than they did: another solver version?")
        for difference in report.differences[:10]:
            console.print(
                f"decision {difference.number} of term {difference.term} differs:", highlight=False, soft_wrap=True
            )
            for name, (old, new) in difference.fields.items():
                console.print(
                    f"  {name}: {_middle(old, new)} was recorded, {_middle(new, old)} came out", highlight=False
                )
        if len(report.differences) > 10:
            console.print(f"... and {len(report.differences) - 10} more.")
    if not report.identical and not report.differences:
        raise UserError(
            "no decision of that time has its inputs in the history.", "Name another time with --from, --to."
        )
    if not report.ok:
        raise typer.Exit(EXIT_DIFFERENT)


def _middle(text: str, other: str) -> str:
    """The part around the first difference."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    start = max(0, at - 30)
    return f"{'...' if start else ''}{text[start : at + 50]}"


def _other(engine: object, since_s: float, until_s: float, policy: Path, as_json: bool) -> None:
    from rich.table import Table
    from sqlalchemy import Engine

    from controller.replay.other import compare, read_policy

    assert isinstance(engine, Engine)
    rows = compare(engine, since_s, until_s, read_policy(policy))
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table("", *(row.name for row in rows))
    for title, form, field in (
        ("predicted energy, kWh", "{:.2f}", "energy_kwh"),
        ("mean GPUs with an engine", "{:.1f}", "mean_gpus"),
        ("mean clock of serving GPUs, MHz", "{:.0f}", "mean_mhz"),
        ("layout changes", "{}", "layout_changes"),
        ("instance starts", "{}", "starts"),
        ("clock changes", "{}", "clock_changes"),
        ("time beyond capacity", "{:.2%}", "short_ratio"),
        ("decisions", "{}", "decisions"),
    ):
        table.add_row(title, *(form.format(getattr(row, field)) for row in rows))
    console.print(table)
    before, after = rows[0].energy_kwh, rows[1].energy_kwh
    if before > 0:
        console.print(
            f"The other policy is predicted to use {after - before:+.2f} kWh ({after / before - 1:+.1%}) on the "
            "recorded load. Predictions are the profile's; both columns are computed in the same way."
        )
