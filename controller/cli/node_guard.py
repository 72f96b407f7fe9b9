"""`dynamollm node guard show|set|trip|lift`: the emergency rules that one GPU host keeps without any controller."""

from __future__ import annotations

import json
import uuid
from typing import Annotated

import typer
from rich.console import Console

from common.errors import UserError
from controller.cli.agent import (
    DEFAULT_ADDRESS,
    AddressArgument,
    CaOption,
    CertOption,
    JsonOption,
    KeyOption,
    ReasonOption,
    call,
    chosen,
    me,
    open_channel,
    plain,
)
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc

console = Console()
app = typer.Typer(help="Emergency rules of one host.", no_args_is_help=True)
WhyOption = Annotated[str, typer.Option("--reason", help="Why; it stands in the agent's audit log.")]
DEFAULT_HOLD_S = 30.0


@app.command()
def show(
    agent: AddressArgument = DEFAULT_ADDRESS,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """The rules, and whether one of them is at work."""
    with open_channel(agent, ca, cert, key) as channel:
        answer = call(agent, rpc.NodeAgentStub(channel).GetGuard, pb.GetGuardRequest())
    _tell(answer.status, as_json)


@app.command("set")
def set_rules(
    agent: AddressArgument = DEFAULT_ADDRESS,
    waiting: Annotated[float | None, typer.Option("--boost-waiting", help="Boost when more requests wait.")] = None,
    ttft_ms: Annotated[
        float | None, typer.Option("--boost-ttft-ms", help="Boost when the P99 of TTFT is over.")
    ] = None,
    gap_ms: Annotated[
        float | None, typer.Option("--boost-gap-ms", help="Boost when the P99 of the token gap is over.")
    ] = None,
    hold_s: Annotated[float | None, typer.Option("--boost-hold", help="Seconds of full clock after trouble.")] = None,
    no_boost: Annotated[bool, typer.Option("--no-boost", help="Switch the SLO boost off.")] = False,
    floor_w: Annotated[float | None, typer.Option("--floor-w", help="Emergency cap of every GPU, W.")] = None,
    floor_gpu: Annotated[
        list[str] | None, typer.Option("--floor-gpu", help="GPU=W: another cap for one GPU; may be repeated.")
    ] = None,
    heartbeat_s: Annotated[
        float | None,
        typer.Option("--heartbeat-age", help="Trip when no controller called for this long. 0: only by hand."),
    ] = None,
    no_floor: Annotated[bool, typer.Option("--no-floor", help="Switch the watts floor off.")] = False,
    reason: ReasonOption = "set by hand",
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Changes the rules that are named and leaves the others as they are."""
    with open_channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        now = call(agent, stub.GetGuard, pb.GetGuardRequest()).status
        boost, floor = now.slo_boost, now.watts_floor
        bounds = {"max_waiting": waiting, "max_ttft_p99_ms": ttft_ms, "max_token_gap_p99_ms": gap_ms}
        for name, bound in bounds.items():
            if bound is not None:
                setattr(boost, name, bound)
                boost.enabled = True
        boost.hold_s = hold_s if hold_s is not None else boost.hold_s or DEFAULT_HOLD_S
        if no_boost:
            boost.Clear()
        if floor_w is not None:
            floor.limit_w, floor.enabled = floor_w, True
        for item in floor_gpu or []:
            name, separator, watts = item.partition("=")
            try:
                limit_w = float(watts)
            except ValueError:
                separator = ""
            if not separator:
                raise UserError(f"--floor-gpu {item}: not GPU=W.", "Write it as 0=350 or GPU-…=350.")
            (gpu,) = chosen(agent, stub, [name])
            floor.limit_w_by_gpu[gpu] = limit_w
        if heartbeat_s is not None:
            floor.heartbeat_age_s = heartbeat_s
        if no_floor:
            floor.Clear()
        request = pb.SetGuardRequest(
            request_id=str(uuid.uuid4()), owner=me(), slo_boost=boost, watts_floor=floor, reason=reason
        )
        answer = call(agent, stub.SetGuard, request)
    _tell(answer.status, as_json)


@app.command()
def trip(
    reason: WhyOption,
    agent: AddressArgument = DEFAULT_ADDRESS,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Caps every GPU of the host now, until it is lifted."""
    with open_channel(agent, ca, cert, key) as channel:
        request = pb.TripGuardRequest(request_id=str(uuid.uuid4()), trip=True, reason=reason)
        answer = call(agent, rpc.NodeAgentStub(channel).TripGuard, request)
    _tell(answer.status, as_json)


@app.command()
def lift(
    reason: WhyOption,
    agent: AddressArgument = DEFAULT_ADDRESS,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Takes the emergency caps away."""
    with open_channel(agent, ca, cert, key) as channel:
        request = pb.TripGuardRequest(request_id=str(uuid.uuid4()), trip=False, reason=reason)
        answer = call(agent, rpc.NodeAgentStub(channel).TripGuard, request)
    _tell(answer.status, as_json)


def summary(status: pb.GuardStatus) -> str:
    """Both rules in a line."""
    floor, boost = status.watts_floor, status.slo_boost
    states = ["watts floor off", "SLO boost off"]
    if floor.enabled:
        states[0] = f"watts floor {'TRIPPED' if status.floor_tripped else 'armed'} at {floor.limit_w:g} W"
        if floor.heartbeat_age_s:
            states[0] += f" (trips without a controller for {floor.heartbeat_age_s:g} s)"
    elif status.floor_tripped:
        states[0] = "watts floor TRIPPED"
    if boost.enabled:
        bounds = [
            (boost.HasField("max_waiting"), f"{boost.max_waiting:g} waiting"),
            (boost.HasField("max_ttft_p99_ms"), f"TTFT P99 {boost.max_ttft_p99_ms:g} ms"),
            (boost.HasField("max_token_gap_p99_ms"), f"token gap P99 {boost.max_token_gap_p99_ms:g} ms"),
        ]
        over = " or ".join(text for on, text in bounds if on)
        states[1] = f"SLO boost {'ACTIVE' if status.boosting else 'armed'}: over {over}, held {boost.hold_s:g} s"
    last = f"; last: {status.last_act}" if status.last_act else ""
    return f"guard: {'; '.join(states)}{last}"


def _tell(status: pb.GuardStatus, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plain(status), indent=2))
        return
    console.print(summary(status), highlight=False)
    for gpu, limit_w in sorted(status.watts_floor.limit_w_by_gpu.items()):
        console.print(f"  {gpu}: {limit_w:g} W", highlight=False)
