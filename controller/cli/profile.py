"""`dynamollm calibrate` and `dynamollm profile list | show | plot | export | import`: profiles made, looked at, moved.

A profile is one JSON file that carries its own checksum; the history keeps every profile that was planned with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.errors import UserError
from controller.cli.agent import CaOption, CertOption, KeyOption
from controller.cli.shared import DEFAULT_URL, JsonOption, UrlOption, console

if TYPE_CHECKING:
    from controller.calibrate.sweep import Progress as Measured
    from controller.calibrate.sweep import SweepPlan
    from controller.profile.table import ActuatorRow, Profile

MIX_SAMPLES, MIX_SEED = 20_000, 11
# Power limits that are compared with clock locks, in watts of each GPU.
CAPS_W = "300,400,500,600"
NameArgument = Annotated[str, typer.Argument(metavar="FILE|CHECKSUM", help="A file, or one of `profile list`.")]


def mount(app: typer.Typer, group: typer.Typer) -> None:
    app.command()(calibrate)
    for command in (show, plot, export):
        group.command()(command)
    group.command("list")(list_profiles)
    group.command("import")(import_profile)


def calibrate(
    out: Annotated[Path, typer.Option("--out", help="File to write the profile to.")],
    physics: Annotated[str, typer.Option(help="The twin's physics: [FILE:]VARIANT[+legacy].")] = "base",
    mix: Annotated[str, typer.Option(help="Tokens of the load: conv, code, or a trace file.")] = "conv",
    model: Annotated[str, typer.Option(help="Name under which the engines serve the model.")] = "llama-70b",
    start_s: Annotated[float, typer.Option(min=0.1, help="Seconds that a start of an instance takes.")] = 60.0,
    caps: Annotated[
        str, typer.Option(help="Power limits to compare with clock locks, W per GPU; empty: none.")
    ] = CAPS_W,
    repeats: Annotated[int, typer.Option(min=1, max=20, help="Of every point: more than one tell how sure it is.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder of measured points; a second run goes on from them.")] = Path(
        ".cache"
    ),
    node: Annotated[str, typer.Option(help="Measure an idle GPU host instead: its agent's address.")] = "",
    seconds: Annotated[float, typer.Option(min=1, help="Of load per point on a host; 10 take about an hour.")] = 10.0,
    tps: Annotated[str, typer.Option(help="Tensor parallelisms to measure on a host.")] = "2,4,8",
    engine: Annotated[str, typer.Option(help="What else makes the host's engine: quantisation, flags.")] = "bf16",
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
) -> None:
    """Measures a profile: TP x clock or power cap x load, finer where the SLO breaks. On the twin, or a host."""
    from simulator.calibration import calibrate_twin
    from simulator.physics import Physics
    from simulator.traces import KINDS, read_azure

    kind = next((kind for kind in KINDS if kind == mix), None)
    if kind is None and not Path(mix).is_file():
        raise UserError(f"--mix {mix}: no such trace file.", f"Name a file, {' or '.join(KINDS)}.")
    check_out(out)
    source = kind or read_azure(Path(mix))
    plan = plan_of(caps, repeats)
    if node:
        from controller.cli.calibrate_node import Host, calibrate_host, plan_for
        from simulator.traces import token_mix

        plan = plan_for(plan, tps)
        host = Host(node, model, engine, seconds, ca, cert, key)
        samples = token_mix(source, MIX_SAMPLES, MIX_SEED)
        measured = with_progress(lambda show: calibrate_host(host, plan, samples, cache, show))
        _write(out, measured)
        return
    measured = with_progress(
        lambda show: calibrate_twin(
            Physics.from_text(physics), cache, show, model=model, source=source, start_s=start_s, plan=plan
        )
    )
    _write(out, measured)


def _write(out: Path, measured: Profile) -> None:
    out.write_text(measured.to_json(), encoding="utf-8")
    typer.echo(f"{out}: {len(measured.points)} points, checksum {measured.checksum()[:12]}")
    for line in actuator_lines(measured):
        typer.echo(line)


def plan_of(caps: str, repeats: int) -> SweepPlan:
    """Raises UserError for what is no list of watts."""
    from dataclasses import replace

    from controller.calibrate.sweep import SweepPlan

    try:
        watts = tuple(sorted({float(value) for value in caps.split(",") if value.strip()}))
    except ValueError:
        raise UserError(f"--caps {caps}: is no list of watts.", f"Write {CAPS_W}, or nothing.") from None
    if any(not 50 <= value <= 2000 for value in watts):
        raise UserError(f"--caps {caps}: a GPU's power limit lies between 50 and 2000 W.", f"Write {CAPS_W}.")
    plan = SweepPlan(caps_w=watts)
    return replace(plan, settings=replace(plan.settings, repeats=repeats))


def check_out(out: Path) -> None:
    """Said before minutes of measuring."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}.", "Make it, or name another file.")


def with_progress(measure: Callable[[Callable[[Measured], None]], Profile]) -> Profile:
    """Runs a calibration under a bar that tells what was measured last and how long it will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=None)

        def show(state: Measured) -> None:
            left = f", {state.remaining_s / 60:.0f} min left" if state.remaining_s >= 60 else ""
            bar.update(task, completed=state.done, total=state.total, description=f"{state.sentence}{left}")

        return measure(show)


# ------------------------------------------------------------------------------------------------------ looking


def read(name: str, url: str) -> Profile:
    """A profile from a file, or by (the beginning of) its checksum from the history. Raises UserError."""
    from controller.daemon import read_profile
    from controller.profile.table import Profile
    from controller.store.engine import open_engine
    from controller.store.repositories import find_profiles

    if Path(name).exists():
        return read_profile(Path(name))
    if not name or set(name) - set("0123456789abcdef"):
        raise UserError(f"{name}: no such file.", "Name a profile file, or a checksum of `dynamollm profile list`.")
    found = find_profiles(open_engine(url), name)
    if len(found) != 1:
        what = "no profile" if not found else f"{len(found)} profiles"
        raise UserError(f"{name}: {what} of that checksum.", "`dynamollm profile list` shows them.")
    return Profile.from_json(found[0].body, name)


def show(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """What a profile says: largest load in SLO and power there, by group, TP and clock; and clock lock or power cap."""
    from controller.profile.fit import fit

    measured = read(name, url)
    curves = sorted(fit(measured).curves.items())
    if as_json:
        rows = [
            {
                "group": group,
                "tp": tp,
                "mhz": mhz,
                "max_rate_rps": curve.max_rate_rps,
                "power_w": curve.power_w(curve.max_rate_rps),
                "error_ratio": curve.error_ratio,
            }
            for (group, tp, mhz), curve in curves
        ]
        value: dict[str, Any] = {"checksum": measured.checksum(), "model": measured.model, "curves": rows}
        value["actuators"] = [row.to_json_value() for row in measured.actuators]
        typer.echo(json.dumps(value, indent=2))
        return
    console.print(f"{measured.model}, {measured.gpu}, {measured.engine}", highlight=False, soft_wrap=True)
    console.print(f"{measured.provenance}; checksum {measured.checksum()[:12]}", highlight=False, soft_wrap=True)
    table = Table("group", "TP", "MHz", "largest load in SLO, req/s", "W there", "± W")
    for (group, tp, mhz), curve in curves:
        watts = curve.power_w(curve.max_rate_rps) if curve.max_rate_rps else None
        load = f"{curve.max_rate_rps:.2f}" if curve.max_rate_rps else "misses the SLO"
        error = f"{watts * curve.error_ratio:.1f}" if watts is not None and curve.error_ratio else ""
        table.add_row(group, str(tp), str(mhz), load, "" if watts is None else f"{watts:.0f}", error)
    console.print(table)
    if measured.actuators:
        console.print(_actuators(measured.actuators))
    for line in actuator_lines(measured):
        console.print(line, highlight=False, soft_wrap=True)


def _actuators(rows: tuple[ActuatorRow, ...]) -> Table:
    table = Table("phase", "group", "TP", "load", "clock", "W", "cap", "W", "better", title="Clock lock or power cap")
    for row in rows:
        unit = "req/s" if row.group else "tokens/s"
        table.add_row(
            row.phase,
            row.group,
            str(row.tp),
            f"{row.load:.2f} {unit}" if row.group else f"{row.load:.0f} {unit}",
            "none in SLO" if row.mhz is None else f"{row.mhz} MHz",
            "" if row.mhz is None else f"{row.clock_power_w:.0f}",
            "none in SLO" if row.cap_w is None else f"{row.cap_w:.0f} W",
            "" if row.cap_w is None else f"{row.cap_power_w:.0f}",
            row.better.value,
        )
    return table


def actuator_lines(profile: Profile) -> list[str]:
    """The verdict in a sentence or two."""
    from controller.profile.table import SERVING, Actuator

    rows = [row for row in profile.actuators if row.phase == SERVING]
    if not rows:
        return []
    wins = {actuator: sum(row.better is actuator for row in rows) for actuator in Actuator}
    saved = [1 - row.clock_power_w / row.cap_power_w for row in rows if row.mhz and row.cap_w and row.cap_power_w]
    said = [
        f"Clock lock or power cap, at {len(rows)} loads: the lock is better at {wins[Actuator.CLOCK]}, the cap at "
        f"{wins[Actuator.CAP]}, no difference at {wins[Actuator.EITHER]}."
    ]
    if saved:
        said.append(
            f"Where both keep the SLO the best lock draws {sum(saved) / len(saved):.1%} less than the best cap on "
            f"average ({min(saved):+.1%} to {max(saved):+.1%})."
        )
    if wins[Actuator.CAP]:
        said.append("The instance manager caps those instances at those loads instead of locking their clock.")
    return said


def list_profiles(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """The profiles in the history, the newest first."""
    from controller.profile.table import Profile
    from controller.store.engine import open_engine
    from controller.store.repositories import find_profiles

    found = [(row, Profile.from_json(row.body, row.checksum[:12])) for row in find_profiles(open_engine(url), "")]
    if as_json:
        rows = [
            {
                "checksum": row.checksum,
                "saved_at": datetime.fromtimestamp(row.saved_at_s, tz=UTC).isoformat(),
                "model": profile.model,
                "gpu": profile.gpu,
                "engine": profile.engine,
                "schema": profile.schema,
                "points": len(profile.points),
                "provenance": profile.provenance,
            }
            for row, profile in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("checksum", "saved (UTC)", "model", "GPU", "engine", "points", "provenance")
    for row, profile in found:
        at = datetime.fromtimestamp(row.saved_at_s, tz=UTC).isoformat(sep=" ", timespec="seconds")[:19]
        named = (profile.model, profile.gpu, profile.engine, str(len(profile.points)), profile.provenance)
        table.add_row(row.checksum[:12], at, *named)
    console.print(table)


# ------------------------------------------------------------------------------------------------------- moving


def export(
    name: NameArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", dir_okay=False, help="File to write.")],
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Writes a profile of the history to a file."""
    check_out(out)
    measured = read(name, url)
    out.write_text(measured.to_json(), encoding="utf-8")
    typer.echo(f"{out}: checksum {measured.checksum()[:12]}")


def import_profile(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], url: UrlOption = DEFAULT_URL
) -> None:
    """Takes a profile file into the history, after its checksum was verified."""
    from controller.daemon import read_profile
    from controller.store.engine import open_engine
    from controller.store.repositories import save_profile

    measured = read_profile(file)
    save_profile(open_engine(url), measured.checksum(), measured.model, measured.to_json(), time.time())
    typer.echo(f"{measured.checksum()[:12]}: {measured.model}, {len(measured.points)} points")


def plot(
    name: NameArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", dir_okay=False, help="An .svg, .png or .pdf file.")],
    url: UrlOption = DEFAULT_URL,
) -> None:
    """Draws power over load for every clock, by group and TP; the dots are what was measured, rings caps."""
    from matplotlib.figure import Figure

    from controller.profile.fit import fit

    check_out(out)
    if out.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"{out}: plots are .svg, .png or .pdf.", "Name such a file.")
    measured = read(name, url)
    kinds = sorted(fit(measured).by_instance.items())
    groups = [group.name for group in measured.groups]
    figure = Figure(figsize=(4.5 * len(measured.tps), 3.4 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), len(measured.tps), squeeze=False)
    for (group, tp), curves in kinds:
        axis = axes[groups.index(group)][measured.tps.index(tp)]
        for curve in curves:
            line = axis.plot(curve.rates_rps, curve.powers_w, label=f"{curve.mhz} MHz", linewidth=1)[0]
            mine = [p for p in measured.points if (p.group, p.tp, p.mhz) == (group, tp, curve.mhz)]
            axis.plot([p.rate_rps for p in mine], [p.power_w for p in mine], ".", color=line.get_color(), markersize=4)
            axis.axvline(curve.max_rate_rps, color=line.get_color(), linewidth=0.5, linestyle=":")
        capped = [p for p in measured.cap_points if (p.group, p.tp) == (group, tp) and p.in_slo(measured.slo)]
        axis.plot([p.rate_rps for p in capped], [p.power_w for p in capped], "o", fillstyle="none", color="black")
        axis.set_title(f"{group}, TP{tp}", fontsize=9)
        axis.set_xlabel("requests/s (dotted: largest in SLO)", fontsize=8)
        axis.set_ylabel("W", fontsize=8)
        axis.legend(fontsize=6)
    figure.suptitle(f"{measured.model}, {measured.gpu}; profile {measured.checksum()[:12]}", fontsize=10)
    figure.savefig(out)
    typer.echo(str(out))
