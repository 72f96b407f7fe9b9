"""`dynamollm`: the operator's command line. Every command has `--json`; exit codes: 0 done, 2 bad input,
3 something it needs is not reachable, 4 already running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.errors import EXIT_UNAVAILABLE, UserError, exit_on_user_error
from controller.cli import node as node_commands
from controller.cli.simulate import simulate
from controller.domain.reasons import Level
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import controller_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types

PROGRAM = "dynamollm"
_DEADLINE_S = 5.0

app = typer.Typer(name=PROGRAM, help="Operate a DynamoLLM fleet.", no_args_is_help=True)
db = typer.Typer(help="The history database.", no_args_is_help=True)
decision = typer.Typer(help="What was decided, and why.", no_args_is_help=True)
node = typer.Typer(help="GPU hosts.", no_args_is_help=True)
profile = typer.Typer(help="Energy-performance profiles.", no_args_is_help=True)
for name, group in (("db", db), ("decision", decision), ("node", node), ("profile", profile)):
    app.add_typer(group, name=name)
app.command()(simulate)
node_commands.mount(node)

console = Console()
ControllerOption = Annotated[str, typer.Option("--controller", help="gRPC address of the controller.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
UrlOption = Annotated[str, typer.Option("--database-url", envvar="DYNAMOLLM_CONTROLLER__DATABASE_URL")]
DEFAULT_CONTROLLER = "127.0.0.1:7700"
DEFAULT_URL = "sqlite:////var/lib/dynamollm/controller.db"


# -------------------------------------------------------------------------------------------------- controller


def _call(address: str, method: str, request: Any) -> Any:
    """One unary call; raises UserError when the controller cannot be reached or refuses."""
    with grpc.insecure_channel(address) as channel:
        try:
            return getattr(rpc.ControllerStub(channel), method)(request, timeout=_DEADLINE_S)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code is grpc.StatusCode.UNAVAILABLE:
                raise UserError(
                    f"{address}: no controller answers.",
                    "Is dynamollm-controller running? Name another address with --controller.",
                    EXIT_UNAVAILABLE,
                ) from None
            raise UserError(f"{address}: {code.name.lower()}: {details}.") from None


def _print_json(message: Any) -> None:
    typer.echo(json.dumps(MessageToDict(message, preserving_proto_field_name=True), indent=2))


@app.command()
def status(controller: ControllerOption = DEFAULT_CONTROLLER, as_json: JsonOption = False) -> None:
    """Pools, instances and clocks now, and what the loop said last."""
    answer: pb.GetStatusResponse = _call(controller, "GetStatus", pb.GetStatusRequest())
    if as_json:
        _print_json(answer)
        return
    console.print(f"mode {pb.Mode.Name(answer.mode).removeprefix('MODE_').lower()}, term {answer.term}")
    table = Table("pool", "classes", "req/s", "granted GPUs", "instance", "node", "TP", "state", "clock")
    for pool in answer.pools:
        head = [pool.name, " ".join(pool.classes), f"{pool.request_rate:.2f}", str(pool.granted_gpus)]
        if not pool.instances:
            table.add_row(*head, "none", "", "", "", "")
        for instance in pool.instances:
            state = types.InstanceState.Name(instance.state).removeprefix("INSTANCE_STATE_").lower()
            clock = f"{instance.clock_mhz} MHz" if instance.clock_mhz else "unlocked"
            table.add_row(*head, instance.instance_id, instance.node_id, str(instance.tensor_parallel), state, clock)
            head = [""] * len(head)
    console.print(table)
    for level in Level:
        if level.value in answer.last_sentences:
            console.print(f"{level.value}: {answer.last_sentences[level.value]}")


@node.command("list")
def node_list(controller: ControllerOption = DEFAULT_CONTROLLER, as_json: JsonOption = False) -> None:
    """The hosts that the controller knows, and how fresh their data is."""
    answer: pb.ListNodesResponse = _call(controller, "ListNodes", pb.ListNodesRequest())
    if as_json:
        _print_json(answer)
        return
    table = Table("node", "address", "data", "age s", "GPUs", "W")
    for item in answer.nodes:
        freshness = pb.Freshness.Name(item.freshness).removeprefix("FRESHNESS_").lower()
        table.add_row(item.node_id, item.address, freshness, f"{item.age_s:.1f}", str(item.gpus), f"{item.power_w:.0f}")
    console.print(table)


@decision.command("list")
def decision_list(
    level: Annotated[str, typer.Option(help="cluster, pool or instance; all by default")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    as_json: JsonOption = False,
) -> None:
    """The newest decisions, one sentence each."""
    request = pb.ListDecisionsRequest(level=level, page_size=limit)
    answer: pb.ListDecisionsResponse = _call(controller, "ListDecisions", request)
    if as_json:
        _print_json(answer)
        return
    table = Table("id", "at (UTC)", "level", "scope", "reason", "sentence")
    for item in answer.decisions:
        at = item.decided_at.ToDatetime().isoformat(sep=" ", timespec="seconds")
        table.add_row(str(item.id), at, item.level, item.scope, item.reason, item.sentence)
    console.print(table)


@decision.command("show")
def decision_show(
    number: Annotated[int, typer.Argument(metavar="ID", min=1)],
    controller: ControllerOption = DEFAULT_CONTROLLER,
    as_json: JsonOption = False,
) -> None:
    """One decision with its inputs, the alternatives and why each lost, and its outcome."""
    answer: pb.GetDecisionResponse = _call(controller, "GetDecision", pb.GetDecisionRequest(id=number))
    if as_json:
        _print_json(answer)
        return
    item = answer.decision
    console.print(f"{item.id} {item.level}/{item.scope} ({item.trigger}): {item.reason}\n{item.sentence}")
    for title, text in (
        ("inputs", answer.inputs_json),
        ("alternatives", answer.alternatives_json),
        ("outcome", answer.outcome_json),
    ):
        console.print(f"\n{title}:")
        console.print_json(text)


# ---------------------------------------------------------------------------------------------------- database


@db.command()
def upgrade(url: UrlOption = DEFAULT_URL) -> None:
    """Creates the tables, or brings them to this version's schema."""
    from controller.store import engine, migrate

    opened = engine.open_engine(url, create=True)
    typer.echo(f"{engine.describe(url)} is at revision {migrate.upgrade(opened)}")


@db.command()
def current(url: UrlOption = DEFAULT_URL) -> None:
    """The database's revision, and the one that this version needs."""
    from controller.store import engine, migrate

    found = migrate.current(engine.open_engine(url))
    typer.echo(f"{engine.describe(url)}: {found or 'no tables'}; this version needs {migrate.head()}")


# ---------------------------------------------------------------------------------------------------- profiles


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", help="File to write the profile to.")],
    physics: Annotated[str, typer.Option(help="The twin's physics: [FILE:]VARIANT[+legacy].")] = "base",
    mix: Annotated[str, typer.Option(help="Tokens of the load: conv, code, or a trace file.")] = "conv",
    model: Annotated[str, typer.Option(help="Name under which the engines serve the model.")] = "llama-70b",
    start_s: Annotated[float, typer.Option(min=0.1, help="Seconds that a start of an instance takes.")] = 60.0,
    cache: Annotated[Path, typer.Option(help="Folder of measured points; a second run reads them.")] = Path(".cache"),
) -> None:
    """Measures a profile on the digital twin: tensor parallelism x clock x load, finer where the SLO breaks."""
    from controller.calibrate.sweep import Progress as Measured
    from simulator.calibration import calibrate_twin
    from simulator.physics import Physics
    from simulator.traces import KINDS, read_azure

    source = next((kind for kind in KINDS if kind == mix), None) or read_azure(Path(mix))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=None)

        def show(state: Measured) -> None:
            bar.update(task, completed=state.done, total=state.total, description=state.sentence)

        measured = calibrate_twin(Physics.from_text(physics), cache, show, model=model, source=source, start_s=start_s)
    out.write_text(measured.to_json(), encoding="utf-8")
    typer.echo(f"{out}: {len(measured.points)} points, checksum {measured.checksum()[:12]}")


@profile.command("show")
def profile_show(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], as_json: JsonOption = False
) -> None:
    """What a profile says: largest load in SLO and power there, by group, TP and clock."""
    from controller.daemon import read_profile
    from controller.profile.fit import fit

    measured = read_profile(file)
    curves = sorted(fit(measured).curves.items())
    if as_json:
        rows = [
            {
                "group": group,
                "tp": tp,
                "mhz": mhz,
                "max_rate_rps": curve.max_rate_rps,
                "power_w": curve.power_w(curve.max_rate_rps),
            }
            for (group, tp, mhz), curve in curves
        ]
        typer.echo(json.dumps({"checksum": measured.checksum(), "model": measured.model, "curves": rows}, indent=2))
        return
    table = Table(
        "group", "TP", "MHz", "largest load in SLO, req/s", "W there", title=f"{measured.model}, {measured.gpu}"
    )
    for (group, tp, mhz), curve in curves:
        watts = curve.power_w(curve.max_rate_rps) if curve.max_rate_rps else None
        load = f"{curve.max_rate_rps:.2f}" if curve.max_rate_rps else "misses the SLO"
        table.add_row(group, str(tp), str(mhz), load, "" if watts is None else f"{watts:.0f}")
    console.print(table)


def main() -> None:
    with exit_on_user_error(PROGRAM):
        app()
