"""How the operator's commands reach one node agent: address, certificates, deadlines, and errors in one sentence."""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict

from common.errors import EXIT_UNAVAILABLE, UserError
from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import node_agent_pb2_grpc as rpc
from dynamollm.v1 import types_pb2 as types

DEADLINE_S = 10.0
EXIT_PARTLY = 1
"""Some GPUs or engines did not do what was asked."""
DEFAULT_ADDRESS = "unix:/run/dynamollm/nodeagent.sock"

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


def open_channel(agent: str, ca: Path | None, cert: Path | None, key: Path | None) -> grpc.Channel:
    """Raises UserError for certificate files that are missing or not complete."""
    if not (ca or cert or key):
        return grpc.insecure_channel(agent)
    if not (ca and cert and key):
        raise UserError("--tls-ca, --tls-cert and --tls-key belong together.", "Give all three.")
    try:
        credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key.read_bytes(), cert.read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}.", "Check the certificate files.") from None
    return grpc.secure_channel(agent, credentials)


def call(agent: str, method: Any, request: Any) -> Any:
    """One unary call; UserError when nobody answers, or the agent refuses."""
    try:
        return method(request, timeout=DEADLINE_S)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.UNAVAILABLE:
            hint = "Is dynamollm-nodeagent running? Name its address, and certificates if it uses TLS."
            raise UserError(f"{agent}: no node agent answers.", hint, EXIT_UNAVAILABLE) from None
        raise UserError(f"{agent}: {code.name.lower()}: {details}.") from None


def chosen(agent: str, stub: rpc.NodeAgentStub, wanted: Sequence[str]) -> list[str]:
    """UUIDs of the GPUs named by UUID or index; all of them when none is named."""
    gpus = [item for item in call(agent, stub.GetNode, pb.GetNodeRequest()).gpus if item.uuid]
    if not wanted:
        return [item.uuid for item in gpus]
    by_name = {item.uuid: item.uuid for item in gpus} | {str(item.index): item.uuid for item in gpus}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise UserError(f"{agent}: there is no GPU {unknown[0]!r}.", f"It has {', '.join(sorted(by_name))}.")
    return [by_name[name] for name in wanted]


def me() -> types.Owner:
    """The operator at this terminal."""
    return types.Owner(kind=types.OWNER_KIND_OPERATOR, name=getpass.getuser())


def plain(message: Any) -> dict[str, Any]:
    """A message as what JSON holds."""
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
