"""`dynamollm budget set | show | lift`: watts that the fleet, or a row of it, must not exceed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.table import Table

from common.errors import UserError
from controller.cli.operate import WhyOption
from controller.cli.shared import (
    DEFAULT_CONTROLLER,
    ControllerOption,
    JsonOption,
    call,
    console,
    moment,
    print_json,
    who_asks,
)
from dynamollm.v1 import controller_pb2 as pb

app = typer.Typer(help="Watts that the fleet, or a row of it, must not exceed.", no_args_is_help=True)

ScopeArgument = Annotated[str, typer.Argument(help="cluster or row:NAME, as configured.")]
_UNITS = {"": 1.0, "w": 1.0, "kw": 1e3, "mw": 1e6}


@app.command("set")
def set_budget(
    scope: ScopeArgument,
    power: Annotated[str, typer.Argument(metavar="WATTS", help="Such as 25000, 25kW or 1.2MW.")],
    until: Annotated[
        str, typer.Option("--until", help="When it ends by itself: a UTC time, or +90m, +6h. Without: when lifted.")
    ] = "",
    why: WhyOption = "",
    controller: ControllerOption = DEFAULT_CONTROLLER,
    as_json: JsonOption = False,
) -> None:
    """Bounds the watts of the scope. GPUs are capped at once, and stay so when the controller is gone."""
    request = pb.SetPowerBudgetRequest(scope=scope, watts=watts(power), who=who_asks(), why=why)
    if until:
        request.until.CopyFrom(_stamp(_ends(until)))
    answer: pb.SetPowerBudgetResponse = call(controller, "SetPowerBudget", request)
    _show(answer, answer.budgets, as_json)


@app.command()
def lift(
    scope: ScopeArgument,
    why: WhyOption = "",
    controller: ControllerOption = DEFAULT_CONTROLLER,
    as_json: JsonOption = False,
) -> None:
    """Ends a budget: the limits found before it come back, and the plan is made anew."""
    request = pb.SetPowerBudgetRequest(scope=scope, who=who_asks(), why=why)
    answer: pb.SetPowerBudgetResponse = call(controller, "SetPowerBudget", request)
    _show(answer, answer.budgets, as_json)


@app.command()
def show(controller: ControllerOption = DEFAULT_CONTROLLER, as_json: JsonOption = False) -> None:
    """The budgets, what the caps add up to, what is drawn, and what is served within them."""
    answer: pb.GetPowerBudgetResponse = call(controller, "GetPowerBudget", pb.GetPowerBudgetRequest())
    _show(answer, answer.budgets, as_json)


def watts(text: str) -> float:
    """Raises UserError for what is no power."""
    number = text.strip().lower().rstrip("kmw").strip()
    unit = text.strip().lower().removeprefix(number).strip()
    try:
        return float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"{text!r} is no power.", "Write watts, or 25kW, or 1.2MW.") from None


def _ends(text: str) -> float:
    """Seconds since the epoch. Raises UserError."""
    now_s = time.time()
    return 2 * now_s - moment(text[1:], now_s) if text.startswith("+") else moment(text, now_s)


def _stamp(at_s: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(at_s * 1e9))
    return stamp


def _show(
    answer: pb.SetPowerBudgetResponse | pb.GetPowerBudgetResponse, budgets: Sequence[pb.PowerBudget], as_json: bool
) -> None:
    if as_json:
        print_json(answer)
        return
    if not budgets:
        console.print("There is no power budget.")
        return
    table = Table("scope", "budget W", "until (UTC)", "caps W", "hosts W", "GPUs draw W", "held", "served in SLO")
    for item in budgets:
        until = item.until.ToDatetime().isoformat(sep=" ", timespec="seconds") if item.HasField("until") else ""
        held = "yes" if item.held else "not yet" if item.reachable else "out of reach: every cap at its minimum"
        served = ", ".join(f"{pool} {share:.0%}" for pool, share in sorted(item.served_share.items()))
        drawn = f"{item.power_w:.0f}" if item.HasField("power_w") else "unknown"
        table.add_row(
            item.scope, f"{item.watts:.0f}", until, f"{item.caps_w:.0f}", f"{item.hosts_w:.0f}", drawn, held, served
        )
    console.print(table)
