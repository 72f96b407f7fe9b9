"""`python -m simulator.host.nvml`: make an emulated host, look at it, break it. For demonstrations and scripts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UserError, exit_on_user_error
from simulator.host.nvml.build import ensure_library
from simulator.host.nvml.state import STATE_VARIABLE, Calls, HostState, NvmlError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

StatePath = Annotated[Path, typer.Argument(help="the host's state file")]
GpuIndex = Annotated[int, typer.Argument(min=0, help="index of the GPU")]


@app.command()
def create(path: StatePath, gpus: int = 8, node: str = "node-0") -> None:
    """Make a host; prints what a program that shall see its GPUs needs in its environment."""
    HostState.create(path, gpus, node=node).close()
    typer.echo(f"{STATE_VARIABLE}={path.absolute()} LD_LIBRARY_PATH={ensure_library()}")


@app.command()
def show(path: StatePath) -> None:
    """Print every GPU as one line of JSON."""
    host = HostState.open(path)
    for index in range(host.gpu_count):
        typer.echo(json.dumps(asdict(host.observe(index))))


@app.command()
def load(path: StatePath, gpu: GpuIndex, watts: float, utilisation: int = 100) -> None:
    """Give a GPU work that belongs to no process; 0 watts ends it."""
    HostState.open(path).set_activity(_existing(path, gpu), watts, utilisation if watts else 0, pid=0)


@app.command()
def fault(
    path: StatePath,
    gpu: GpuIndex,
    error: Annotated[str, typer.Option(help="NVML error: " + ", ".join(code.name.lower() for code in NvmlError))] = "",
    calls: Annotated[
        str, typer.Option(help="which calls: " + ", ".join((c.name or "").lower() for c in Calls))
    ] = "all",
    delay_ms: float = 0.0,
    hang_s: Annotated[float, typer.Option(help="seconds; below 0: until cleared")] = 0.0,
) -> None:
    """Make calls on a GPU fail, hang or take long; without options end that."""
    try:
        group, code = Calls[calls.upper()], NvmlError[error.upper()] if error else 0
    except KeyError as unknown:
        raise UserError(f"There is no error or group of calls named {unknown}.", "See --help.") from None
    HostState.open(path).set_fault(
        _existing(path, gpu), group, error=code, delay_s=delay_ms / 1000, hang_s=None if hang_s < 0 else hang_s
    )


def _existing(path: Path, gpu: int) -> int:
    count = HostState.open(path).gpu_count
    if gpu >= count:
        raise UserError(f"{path} has no GPU {gpu}.", f"Name one from 0 to {count - 1}.")
    return gpu


if __name__ == "__main__":
    with exit_on_user_error("nvml"):
        app()
