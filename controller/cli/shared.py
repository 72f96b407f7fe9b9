"""What the operator's commands share: the call to the controller, output, options."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console

from common.errors import EXIT_UNAVAILABLE, UserError
from common.tls import ClientTls, channel_credentials, check_files
from dynamollm.v1 import controller_pb2 as pb
from dynamollm.v1 import controller_pb2_grpc as rpc

_DEADLINE_S = 5.0
_TLS = "DYNAMOLLM_TLS"

# A pipe has no width: tables there are as wide as they need to be.
console = Console(width=None if sys.stdout.isatty() else 200)
ControllerOption = Annotated[str, typer.Option("--controller", help="gRPC address of the controller.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
UrlOption = Annotated[str, typer.Option("--database-url", envvar="DYNAMOLLM_CONTROLLER__DATABASE_URL")]
DEFAULT_CONTROLLER = "127.0.0.1:7700"
DEFAULT_URL = "sqlite:////var/lib/dynamollm/controller.db"


def call(address: str, method: str, request: Any, deadline_s: float = _DEADLINE_S) -> Any:
    """One unary call; raises UserError when the controller cannot be reached or refuses."""
    with _open_channel(address) as channel:
        try:
            return getattr(rpc.ControllerStub(channel), method)(request, timeout=deadline_s)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code is grpc.StatusCode.UNAVAILABLE:
                raise UserError(
                    f"{address}: no controller answers.",
                    "Is dynamollm-controller running? Name another address with --controller. "
                    f"Does it ask for certificates? Set {_TLS}_CA, {_TLS}_CERT and {_TLS}_KEY.",
                    EXIT_UNAVAILABLE,
                ) from None
            raise UserError(f"{address}: {code.name.lower()}: {details}.") from None


def _open_channel(address: str) -> grpc.Channel:
    """Over mutual TLS where the environment names the files; every command finds them there alike."""
    files = {name: os.environ.get(f"{_TLS}_{name.upper()}", "") for name in ("ca", "cert", "key")}
    if not any(files.values()) or address.startswith("unix:"):
        return grpc.insecure_channel(address)
    if not all(files.values()):
        raise UserError(f"{_TLS}_CA, {_TLS}_CERT and {_TLS}_KEY belong together.", "Set all three or none.")
    tls = ClientTls(**files)
    check_files(tls, _TLS)
    name = os.environ.get(f"{_TLS}_NAME", "")
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(address, channel_credentials(tls), options=options)


def print_json(message: Any) -> None:
    typer.echo(json.dumps(MessageToDict(message, preserving_proto_field_name=True), indent=2))


def mode_name(mode: pb.Mode.ValueType) -> str:
    return pb.Mode.Name(mode).removeprefix("MODE_").lower()


def data_of(node: pb.NodeStatus) -> str:
    """How fresh a node's data is, and whether its agent leaves calls unanswered; one that is off has none to answer."""
    freshness = pb.Freshness.Name(node.freshness).removeprefix("FRESHNESS_").lower()
    hangs = node.circuit_open and node.freshness != pb.FRESHNESS_OFF
    return f"{freshness}, not answering calls" if hangs else freshness


def in_trouble(status: pb.GetStatusResponse) -> str:
    """The nodes that are not heard or do not answer, by name; "" without any. One that is off is meant to be silent."""
    told = [f"{node.node_id} {data_of(node)}" for node in status.nodes if data_of(node) not in ("fresh", "off")]
    return "; ".join(told)


def who_asks() -> str:
    """The person at the terminal, for the history."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a user id without a name
        return f"unknown@{socket.gethostname()}"


def moment(text: str, now_s: float) -> float:
    """UTC epoch seconds of "2026-03-01", "2026-03-01 14:00", "now", or an age such as "90m", "6h", "2d".

    Raises UserError for anything else.
    """
    if text == "now":
        return now_s
    if text[-1:] in "smhd" and text[:-1].replace(".", "", 1).isdigit():
        unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[text[-1]]
        return now_s - timedelta(**{unit: float(text[:-1])}).total_seconds()
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"{text!r} is no time.", "Write 2026-03-01, '2026-03-01 14:00' (UTC), now, or an age: 90m, 6h, 2d."
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
