"""`dynamollm top`: the fleet as it runs, renewed every second, until Ctrl-C."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.errors import UserError
from controller.cli.operate import pools_table
from controller.cli.shared import (
    DEFAULT_CONTROLLER,
    ControllerOption,
    call,
    console,
    data_of,
    in_trouble,
    mode_name,
)
from controller.domain.reasons import Level
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import types_pb2 as types


def top(
    every_s: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One look, then end: for scripts.")] = False,
    controller: ControllerOption = DEFAULT_CONTROLLER,
) -> None:
    """Pools, instances, clocks, watts, SLO head-room, and what the loop said last, live."""
    if once or not sys.stdout.isatty():
        console.print(screen(call(controller, "GetStatus", pb.GetStatusRequest()), ""))
        return
    with Live(screen=True, auto_refresh=False, console=console) as live:
        shown: pb.GetStatusResponse | None = None
        trouble = ""
        while True:
            try:
                shown, trouble = call(controller, "GetStatus", pb.GetStatusRequest()), ""
            except UserError as error:
                if shown is None:
                    raise
                trouble = error.message  # what was seen last stays, and says that it is old
            live.update(screen(shown, trouble), refresh=True)
            try:
                time.sleep(every_s)
            except KeyboardInterrupt:
                return


def screen(status: pb.GetStatusResponse, trouble: str) -> RenderableType:
    """One look."""
    parts: list[RenderableType] = [_head(status)]
    if trouble:
        parts.append(Text(f"OLD: {trouble}", style="bold red"))
    parts += [pools_table(status), _instances(status), _nodes(status), _said(status)]
    return Group(*parts)


def _head(status: pb.GetStatusResponse) -> Text:
    power = f"{status.power_w:.0f} W" if status.HasField("power_w") else "power unknown"
    planned = f" (planned {status.predicted_power_w:.0f} W)" if status.HasField("predicted_power_w") else ""
    modes = "".join(f", {item.scope} {mode_name(item.mode)}" for item in status.modes)
    history = "" if status.database_up else ", history in the spool"
    return Text(f"{mode_name(status.mode)}{modes} | term {status.term} | {power}{planned}{history}", style="bold")


def _instances(status: pb.GetStatusResponse) -> Table:
    table = Table("instance", "pool", "node", "TP", "state", "clock", "W", "running", "waiting")
    for pool in status.pools:
        for item in pool.instances:
            state = types.InstanceState.Name(item.state).removeprefix("INSTANCE_STATE_").lower()
            table.add_row(
                item.instance_id,
                pool.name,
                item.node_id,
                str(item.tensor_parallel),
                state,
                f"{item.clock_mhz} MHz" if item.clock_mhz else "unlocked",
                f"{item.power_w:.0f}" if item.HasField("power_w") else "",
                f"{item.running:.0f}" if item.HasField("running") else "",
                f"{item.waiting:.0f}" if item.HasField("waiting") else "",
            )
    return table


def _nodes(status: pb.GetStatusResponse) -> Text:
    """One line: those that are not fresh or do not answer by name, the rest as a count."""
    told = "; ".join(f"{node.node_id} {data_of(node)}" for node in status.nodes if data_of(node) != "fresh")
    text = f"{len(status.nodes)} nodes{f': {told}' if told else ', all fresh'}"
    return Text(text, style="red" if in_trouble(status) else "")


def _said(status: pb.GetStatusResponse) -> Text:
    said = (*map(str, Level), "profile", "drift", "trial")
    lines = [f"{level}: {status.last_sentences[level]}" for level in said if level in status.last_sentences]
    return Text("\n".join(lines))
