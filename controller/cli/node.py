"""`dynamollm node show|lock|reset`: one GPU host, asked directly at its agent's address.

These work without a controller. A lock here is an operator's lease: it has its own TTL, goes over the controller's
and shows as an override until it ends or is reset. Beyond the agent's unix socket it takes a client certificate with
the scope `admin`.
"""

from __future__ import annotations

import getpass
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from common.errors import EXIT_UNAVAILABLE, UserError
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types

DEADLINE_S = 10.0
EXIT_PARTLY = 1
"""Some GPUs did not do what was asked."""

console = Console()

AddressArgument = Annotated[
    str, typer.Argument(metavar="AGENT", help="Where the agent listens: unix:/run/dynamollm/nodeagent.sock, HOST:PORT.")
]
GpuOption = Annotated[
    list[str] | None, typer.Option("--gpu", help="GPU by UUID or index; may be repeated. All GPUs by default.")
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; it stands in the agent's audit log.")]
CaOption = Annotated[Path | None, typer.Option("--tls-ca", help="Authority of the agent's certificate, PEM.")]
CertOption = Annotated[Path | None, typer.Option("--tls-cert", help="Your certificate, PEM.")]
KeyOption = Annotated[Path | None, typer.Option("--tls-key", help="Its private key, PEM.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DEFAULT_ADDRESS = "unix:/run/dynamollm/nodeagent.sock"


def show(
    agent: AddressArgument = DEFAULT_ADDRESS,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """One host: its GPUs, who holds which control until when, the guard, the engine instances."""
    with _channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        node = _call(agent, stub.GetNode, pb.GetNodeRequest())
        held = _call(agent, stub.ListControls, pb.ListControlsRequest())
        guard = _call(agent, stub.GetGuard, pb.GetGuardRequest())
        instances = _call(agent, stub.ListInstances, pb.ListInstancesRequest())
    if as_json:
        whole = {
            "node": _plain(node),
            "controls": _plain(held).get("controls", []),
            "guard": _plain(guard).get("status", {}),
            "instances": _plain(instances).get("instances", []),
        }
        typer.echo(json.dumps(whole, indent=2))
        return
    console.print(
        f"{node.node_id} ({node.hostname}): agent {node.agent_version}, driver {node.driver_version}, term {node.term}"
    )
    _show_gpus(node.gpus, held.controls)
    _show_guard(guard.status)
    _show_instances(instances.instances)


def lock(
    mhz: Annotated[int, typer.Option("--mhz", min=1, help="Highest SM clock.")],
    agent: AddressArgument = DEFAULT_ADDRESS,
    min_mhz: Annotated[int, typer.Option("--min-mhz", min=0, help="Lowest SM clock. 0: the same as --mhz.")] = 0,
    ttl_s: Annotated[float, typer.Option("--ttl", help="Seconds until the clocks are free again.")] = 3600.0,
    gpu: GpuOption = None,
    reason: ReasonOption = "locked by hand",
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Locks clocks by hand, over any controller, for a limited time."""
    with _channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        uuids = _chosen(agent, stub, gpu or [])
        lock = pb.ClockLock(min_mhz=min_mhz or mhz, max_mhz=mhz)
        request = pb.ApplyControlsRequest(
            request_id=str(uuid.uuid4()),
            lease=types.Lease(owner=_me(), reason=reason, ttl_s=ttl_s),
            controls=[pb.ControlRequest(gpu_uuid=item, clock_lock=lock) for item in uuids],
        )
        answer = _call(agent, stub.ApplyControls, request)
    _report(answer, as_json)


def reset(
    agent: AddressArgument = DEFAULT_ADDRESS,
    gpu: GpuOption = None,
    reason: ReasonOption = "reset by hand",
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ends every lease and standing cap on the GPUs, an operator's and a controller's alike; the guard's stay."""
    with _channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        uuids = _chosen(agent, stub, gpu or [])
        request = pb.ReleaseControlsRequest(request_id=str(uuid.uuid4()), owner=_me(), gpu_uuids=uuids, reason=reason)
        answer = _call(agent, stub.ReleaseControls, request)
    _report(answer, as_json)


def mount(app: typer.Typer) -> None:
    """Adds the commands to `dynamollm node`."""
    for command in (show, lock, reset):
        app.command(command.__name__)(command)


def _channel(agent: str, ca: Path | None, cert: Path | None, key: Path | None) -> grpc.Channel:
    if not (ca or cert or key):
        return grpc.insecure_channel(agent)
    if not (ca and cert and key):
        raise UserError("--tls-ca, --tls-cert and --tls-key belong together.", "Give all three.")
    try:
        credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key.read_bytes(), cert.read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}.", "Check the certificate files.") from None
    return grpc.secure_channel(agent, credentials)


def _call(agent: str, method: Any, request: Any) -> Any:
    try:
        return method(request, timeout=DEADLINE_S)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.UNAVAILABLE:
            hint = "Is dynamollm-nodeagent running? Name its address, and certificates if it uses TLS."
            raise UserError(f"{agent}: no node agent answers.", hint, EXIT_UNAVAILABLE) from None
        raise UserError(f"{agent}: {code.name.lower()}: {details}.") from None


def _chosen(agent: str, stub: rpc.NodeAgentStub, wanted: Sequence[str]) -> list[str]:
    """UUIDs of the GPUs named by UUID or index."""
    gpus = [item for item in _call(agent, stub.GetNode, pb.GetNodeRequest()).gpus if item.uuid]
    if not wanted:
        return [item.uuid for item in gpus]
    by_name = {item.uuid: item.uuid for item in gpus} | {str(item.index): item.uuid for item in gpus}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise UserError(f"{agent}: there is no GPU {unknown[0]!r}.", f"It has {', '.join(sorted(by_name))}.")
    return [by_name[name] for name in wanted]


def _me() -> types.Owner:
    return types.Owner(kind=types.OWNER_KIND_OPERATOR, name=getpass.getuser())


def _report(answer: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_plain(answer), indent=2))
    else:
        table = Table("GPU", "result", "in force", "clock now", "detail")
        for result in answer.results:
            clock = f"{result.observed_sm_mhz} MHz" if result.HasField("observed_sm_mhz") else ""
            table.add_row(result.gpu_uuid, _code(result.code), _setting(result.applied), clock, result.detail)
        console.print(table)
    if any(result.code != pb.CONTROL_CODE_APPLIED for result in answer.results):
        raise typer.Exit(EXIT_PARTLY)


def _show_gpus(gpus: Sequence[pb.Gpu], held: Sequence[pb.HeldControl]) -> None:
    table = Table("GPU", "UUID", "name", "health", "held", "by", "for", "why")
    for gpu in gpus:
        health = pb.GpuHealth.Name(gpu.health).removeprefix("GPU_HEALTH_").lower()
        notes = [text for on, text in ((gpu.mig_enabled, "MIG"), (not gpu.persistence_enabled, "no persistence")) if on]
        head = [str(gpu.index), gpu.uuid, gpu.name, " ".join([health, *notes, gpu.detail]).strip()]
        mine = [item for item in held if item.control.gpu_uuid == gpu.uuid]
        if not mine:
            table.add_row(*head, "nothing", "", "", "")
        for item in mine:
            owner = item.lease.owner
            kind = types.OwnerKind.Name(owner.kind).removeprefix("OWNER_KIND_").lower()
            by = f"{kind} {owner.name}" + (" (override)" if owner.kind == types.OWNER_KIND_OPERATOR else "")
            left = f"{item.remaining_s:.0f} s" if item.remaining_s > 0 else "until released"
            table.add_row(*head, _setting(item.control), by, left, item.lease.reason)
            head = [""] * len(head)
    console.print(table)


def _show_guard(status: pb.GuardStatus) -> None:
    floor, boost = status.watts_floor, status.slo_boost
    states = [
        ("watts floor TRIPPED" if status.floor_tripped else "watts floor armed")
        if floor.enabled
        else "watts floor off",
        ("SLO boost ACTIVE" if status.boosting else "SLO boost armed") if boost.enabled else "SLO boost off",
    ]
    last = f"; last: {status.last_act}" if status.last_act else ""
    console.print(f"guard: {', '.join(states)}{last}")


def _show_instances(instances: Sequence[types.Instance]) -> None:
    if not instances:
        console.print("no engine instances")
        return
    table = Table("instance", "model", "GPUs", "state", "for", "endpoint", "detail")
    for item in instances:
        state = types.InstanceState.Name(item.state).removeprefix("INSTANCE_STATE_").lower()
        gpus = str(len(item.spec.gpu_uuids))
        age = f"{item.seconds_in_state:.0f} s"
        table.add_row(item.spec.instance_id, item.spec.model, gpus, state, age, item.endpoint, item.detail)
    console.print(table)


def _setting(control: pb.ControlRequest) -> str:
    which = control.WhichOneof("control")
    if which == "power_limit":
        return f"cap {control.power_limit.limit_w:g} W" + (", protects" if control.power_limit.protects else "")
    if which is None:
        return ""
    lock = control.clock_lock if which == "clock_lock" else control.memory_clock_lock
    what = "clocks" if which == "clock_lock" else "memory clocks"
    return f"{what} {lock.min_mhz}-{lock.max_mhz} MHz" if lock.max_mhz else f"{what} held unlocked"


def _code(code: int) -> str:
    return pb.ControlCode.Name(code).removeprefix("CONTROL_CODE_").lower()  # type: ignore[arg-type] # an open enum


def _plain(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
