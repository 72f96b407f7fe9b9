"""What the demonstration needs before it starts, measured once on the twin and kept: profile and k_max.

`python -m simulator.demo.prepare` does it for the built-in load, as part of scripts/setup; another trace or other
physics are prepared when they are first asked for. Takes a minute or two each; a second time it only reads files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.errors import exit_on_user_error
from controller.calibrate.sweep import Progress as Measured
from controller.profile.table import Profile
from simulator.calibration import calibrate_twin, single_pool_max_rps
from simulator.demo.fleet import ENGINE_START_S, HOSTS, MODEL
from simulator.demo.load import BUILT_IN, nearest_kind
from simulator.host.nvml.build import default_root
from simulator.physics import Physics
from simulator.traces import Kind, Trace


@dataclass(frozen=True)
class Prepared:
    """What planning and the statement of the load rest on."""

    profile: Profile
    mix: Kind  # whose profile it is
    max_rps: float  # what SinglePool serves of this load on the demonstration's hosts


def prepare(physics_name: str, trace: Trace | None, console: Console, cache: Path | None = None) -> Prepared:
    """Reads or measures profile and k_max. The profile is that of the built-in mix most like the trace."""
    physics = Physics.from_text(physics_name)
    folder = cache or default_root() / "profiles"
    mix = BUILT_IN if trace is None else nearest_kind(trace)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(f"Measuring the profile of the twin ({mix} mix, once)", total=None)

        def tell(measured: Measured) -> None:
            bar.update(task, completed=measured.done, total=measured.total)
            if not console.is_terminal:
                console.print(f"Measuring the profile of the twin (once): {measured.done} of {measured.total} parts")

        profile = calibrate_twin(physics, folder, tell, model=MODEL, source=mix, start_s=ENGINE_START_S)
        bar.update(task, description="Searching the largest load of the static fleet (once)", completed=0, total=None)
        max_rps = single_pool_max_rps(physics, HOSTS, BUILT_IN if trace is None else trace, folder)
    return Prepared(profile, mix, max_rps)


def main() -> None:
    with exit_on_user_error("prepare"):
        prepare("base", None, Console(stderr=True))


if __name__ == "__main__":
    main()
