"""The command line of the demonstration: `scripts/demo`, or `python -m simulator.demo` in a prepared environment."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.errors import UserError, exit_on_user_error
from common.logs import configure_logs
from simulator.demo.fleet import free_ports
from simulator.demo.load import read_trace
from simulator.demo.prepare import prepare
from simulator.demo.run import Options, run

PROGRAM = "scripts/demo"
DEFAULT_MINUTES = 3.0
# What a run spends on starting fleets, on the last requests and on ending: the rest is load, half of it for each fleet.
OVERHEAD_S = 60.0
WARM_UP_S = 8.0
QUICK_LOAD_S, QUICK_WARM_UP_S = 16.0, 4.0
EXIT_INTERRUPTED = 130
PLAIN_WIDTH = 110  # of tables in a file or a pipe

# gRPC's own log lines would stand between ours: an agent that is just restarting is no news.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def demo(
    trace: Annotated[
        Path | None, typer.Option(help="Replay this file (TIMESTAMP,ContextTokens,GeneratedTokens) from its start.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under 50 seconds: both fleets at once, a short load.")
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=2, max=600, help="Length of the whole demonstration.")
    ] = DEFAULT_MINUTES,
    u: Annotated[
        float, typer.Option("--u", min=0.05, max=1.0, help="Mean load as a share of what the static fleet can serve.")
    ] = 0.6,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random in the load.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Folder for logs and databases: new or empty. Default: a temporary one."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the gateway; 0: any free one.")] = 0,
    physics: Annotated[
        str, typer.Option(help="Physics of the GPUs: base, pessimistic, optimistic or FILE:VARIANT.")
    ] = "base",
) -> None:
    """Two emulated GPU hosts under a real load, steered by DynamoLLM and then left at full clocks, side by side in a
    table. Everything runs in real time, as processes that talk over their real interfaces."""
    configure_logs("demo", level="error")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"{json_file}: its folder does not exist.", "Make it, or name another file with --json.")
    free_ports(1, port)
    options = Options(
        trace=read_trace(trace) if trace is not None else None,
        u=u,
        seed=seed,
        physics=physics,
        duration_s=QUICK_LOAD_S if quick else (60 * minutes - OVERHEAD_S) / 2,
        warm_up_s=QUICK_WARM_UP_S if quick else WARM_UP_S,
        at_once=quick,
        folder=_folder(folder),
        json_file=json_file,
        gateway_port=port,
    )
    try:
        run(options, prepare(physics, options.trace, console), console)
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("Stopped; no process was left behind.")
        raise SystemExit(EXIT_INTERRUPTED) from None


def _folder(wanted: Path | None) -> Path:
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="dynamollm-demo-"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            raise UserError(f"--dir {wanted}: is not empty.", "Name a new or an empty folder.")
    except OSError as error:
        raise UserError(f"--dir {wanted}: cannot be used: {error.strerror}.", "Name another folder.") from None
    return wanted.absolute()


if __name__ == "__main__":
    with exit_on_user_error(PROGRAM):
        app(prog_name=PROGRAM)
    sys.exit(0)
