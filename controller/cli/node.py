"""`dynamollm node show|lock|reset|drain|resume|guard`: one GPU host, asked directly at its agent's address.

These work without a controller. A lock here is an operator's lease: it has its own TTL, goes over the controller's
and shows as an override until it ends or is reset. Beyond the agent's unix socket it takes a client certificate with
the scope `admin`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from controller.cli import node_guard
from controller.cli.agent import (
    DEFAULT_ADDRESS,
    EXIT_PARTLY,
    AddressArgument,
    CaOption,
    CertOption,
    GpuOption,
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
from dynamollm.v1 import types_pb2 as types

console = Console()
LOOK_S = 0.5
ENDED = (types.INSTANCE_STATE_STOPPED, types.INSTANCE_STATE_FAILED)
QUIET = (*ENDED, types.INSTANCE_STATE_ASLEEP, types.INSTANCE_STATE_QUARANTINED)
"""States in which an engine serves nothing."""


def show(
    agent: AddressArgument = DEFAULT_ADDRESS,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """One host: its GPUs, who holds which control until when, the guard, the engine instances."""
    with open_channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        node = call(agent, stub.GetNode, pb.GetNodeRequest())
        held = call(agent, stub.ListControls, pb.ListControlsRequest())
        guard = call(agent, stub.GetGuard, pb.GetGuardRequest())
        instances = call(agent, stub.ListInstances, pb.ListInstancesRequest())
    if as_json:
        whole = {
            "node": plain(node),
            "controls": plain(held).get("controls", []),
            "guard": plain(guard).get("status", {}),
            "instances": plain(instances).get("instances", []),
        }
        typer.echo(json.dumps(whole, indent=2))
        return
    console.print(
        f"{node.node_id} ({node.hostname}): agent {node.agent_version}, driver {node.driver_version}, term {node.term}"
    )
    if node.HasField("drain"):
        since = node.drain.since.ToDatetime().isoformat(sep=" ", timespec="seconds")
        console.print(f"OUT OF SERVICE since {since} UTC, {node.drain.by}: {node.drain.reason}", highlight=False)
    _show_gpus(node.gpus, held.controls)
    console.print(node_guard.summary(guard.status), highlight=False)
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
    with open_channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        uuids = chosen(agent, stub, gpu or [])
        lock = pb.ClockLock(min_mhz=min_mhz or mhz, max_mhz=mhz)
        request = pb.ApplyControlsRequest(
            request_id=str(uuid.uuid4()),
            lease=types.Lease(owner=me(), reason=reason, ttl_s=ttl_s),
            controls=[pb.ControlRequest(gpu_uuid=item, clock_lock=lock) for item in uuids],
        )
        answer = call(agent, stub.ApplyControls, request)
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
    with open_channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        uuids = chosen(agent, stub, gpu or [])
        request = pb.ReleaseControlsRequest(request_id=str(uuid.uuid4()), owner=me(), gpu_uuids=uuids, reason=reason)
        answer = call(agent, stub.ReleaseControls, request)
    _report(answer, as_json)


def drain(
    agent: AddressArgument = DEFAULT_ADDRESS,
    stop: Annotated[bool, typer.Option("--stop", help="Also stop each engine once it has drained.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0, help="Seconds to wait for the drains. 0: do not wait.")
    ] = 600.0,
    reason: ReasonOption = "drained by hand",
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Takes the host out of service: its engines finish what runs, controllers start none there until `resume`."""
    with open_channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        call(agent, stub.DrainNode, pb.DrainNodeRequest(request_id=str(uuid.uuid4()), owner=me(), reason=reason))
        deadline_s = time.monotonic() + timeout_s
        while True:
            instances = call(agent, stub.ListInstances, pb.ListInstancesRequest()).instances
            if stop:
                for item in instances:
                    if item.drained:
                        name = item.spec.instance_id
                        request = pb.StopInstanceRequest(
                            request_id=str(uuid.uuid4()), owner=me(), instance_id=name, reason=reason
                        )
                        with suppress(UserError):  # it got work after all, and drains again
                            call(agent, stub.StopInstance, request)
            left = [item for item in instances if not (item.state in QUIET or (item.drained and not stop))]
            if not left or time.monotonic() >= deadline_s:
                break
            time.sleep(LOOK_S)
    if as_json:
        typer.echo(json.dumps({"instances": [plain(item) for item in instances]}, indent=2))
    else:
        _show_instances(instances)
    if left and timeout_s > 0:
        raise typer.Exit(EXIT_PARTLY)


def resume(
    agent: AddressArgument = DEFAULT_ADDRESS,
    reason: ReasonOption = "resumed by hand",
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Puts the host back into service. An engine that has drained stays so until it is stopped or replaced."""
    with open_channel(agent, ca, cert, key) as channel:
        stub = rpc.NodeAgentStub(channel)
        call(agent, stub.ResumeNode, pb.ResumeNodeRequest(request_id=str(uuid.uuid4()), owner=me(), reason=reason))
        instances = call(agent, stub.ListInstances, pb.ListInstancesRequest()).instances
    if as_json:
        typer.echo(json.dumps({"instances": [plain(item) for item in instances]}, indent=2))
    else:
        console.print("in service")
        _show_instances(instances)


def mount(app: typer.Typer) -> None:
    """Adds the commands to `dynamollm node`."""
    for command in (show, lock, reset, drain, resume):
        app.command(command.__name__)(command)
    app.add_typer(node_guard.app, name="guard")


def _report(answer: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plain(answer), indent=2))
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


def _show_instances(instances: Sequence[types.Instance]) -> None:
    if not instances:
        console.print("no engine instances")
        return
    table = Table("instance", "model", "GPUs", "state", "for", "endpoint", "watts asleep", "detail")
    for item in instances:
        state = types.InstanceState.Name(item.state).removeprefix("INSTANCE_STATE_").lower()
        gpus = str(len(item.spec.gpu_uuids))
        age = f"{item.seconds_in_state:.0f} s"
        watts = f"{item.asleep_power_w:g}" if item.HasField("asleep_power_w") else ""
        table.add_row(item.spec.instance_id, item.spec.model, gpus, state, age, item.endpoint, watts, item.detail)
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
