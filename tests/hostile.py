"""Malformed and hostile requests for the node agent's API: random bytes, mutated messages, absurd values.

Used by the fuzz test (2,000 in scripts/test) and by the agent's benchmark (10,000). None of them carries the one thing
that a real change needs, the owner `OWNER` with its term, unless its values are out of every range.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import grpc

from dynamollm.v1 import node_agent_pb2 as pb
from dynamollm.v1 import types_pb2 as types

PREFIX = "/dynamollm.v1.NodeAgent/"
METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["NodeAgent"].methods}
NUMBERS = (0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324, 1.7e308, 2**63)
TEXTS = ("", "\0", "GPU-", "../../etc/passwd", "x" * 5000, "\U0010ffff", "a\nb", "%s%n", '{"a":1}', "MIG-0", "--help")
HARMFUL = ("StartInstance", "RestartInstance")
"""With a good specification these would start a process: they get hostile ones only."""


def requests(count: int, uuids: Sequence[str], seed: int) -> list[tuple[str, bytes]]:
    """Method path and raw bytes of each request."""
    chance = random.Random(seed)
    names = sorted(METHODS)
    return [_one(names[number % len(names)], number, uuids, chance) for number in range(count)]


def send(channel: grpc.Channel, request: tuple[str, bytes], timeout_s: float = 5.0) -> grpc.StatusCode:
    """Sends raw bytes and gives the status; OK where it was answered. Streams are read once and hung up."""
    path, data = request
    streams = METHODS[path.removeprefix(PREFIX)].server_streaming
    try:
        if streams:
            call = channel.unary_stream(path, None, None)(data, timeout=timeout_s)
            next(iter(call))
            call.cancel()
        else:
            channel.unary_unary(path, None, None)(data, timeout=timeout_s)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def _one(name: str, number: int, uuids: Sequence[str], chance: random.Random) -> tuple[str, bytes]:
    kind = chance.choice(("noise", "mutated", "absurd", "absurd"))
    if kind == "noise":
        return PREFIX + name, chance.randbytes(chance.choice((1, 7, 64, 1000, 20_000)))
    data = _absurd(name, number, uuids, chance).SerializeToString()
    if kind == "mutated" and data:
        mutable = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            mutable[chance.randrange(len(mutable))] = chance.randrange(256)
        data = bytes(mutable[: chance.randint(1, len(mutable))])
        if name in ("TripGuard", "SetGuard", "ApplyControls", "DrainNode", *HARMFUL):
            # A bit flipped in a good number can make a good request; these are cut short as well.
            data = data[: len(data) // 2] + b"\xff"
    return PREFIX + name, data


def _absurd(name: str, number: int, uuids: Sequence[str], chance: random.Random):  # type: ignore[no-untyped-def]
    """A message that parses and means nothing good."""
    identity = f"fuzz-{number}"
    uuid = chance.choice((*uuids, *TEXTS))
    value = chance.choice(NUMBERS)
    text = chance.choice(TEXTS)
    wrong_owner = types.Owner(kind=chance.choice((0, types.OWNER_KIND_GUARD, 99)), name=text)
    owner = chance.choice((wrong_owner, types.Owner(kind=types.OWNER_KIND_CONTROLLER, name=text)))
    if name == "ApplyControls":
        lease = types.Lease(owner=owner, reason=text, ttl_s=value, term=0)
        control = chance.choice(
            (
                pb.ControlRequest(gpu_uuid=uuid),
                pb.ControlRequest(gpu_uuid=uuid, power_limit=pb.PowerLimit(limit_w=value, protects=True)),
                pb.ControlRequest(gpu_uuid=uuid, clock_lock=pb.ClockLock(min_mhz=2**32 - 1, max_mhz=0)),
                pb.ControlRequest(gpu_uuid=uuid, memory_clock_lock=pb.ClockLock(min_mhz=7, max_mhz=1)),
            )
        )
        return pb.ApplyControlsRequest(
            request_id=identity, lease=lease, controls=[control] * chance.choice((0, 1, 8, 300, 2000))
        )
    if name == "ReleaseControls":
        return pb.ReleaseControlsRequest(
            request_id=identity, owner=owner, term=0, gpu_uuids=[uuid] * chance.choice((0, 1, 500)), reason=text
        )
    if name == "SetGuard":
        boost = pb.SloBoostRule(enabled=True, max_waiting=chance.choice((math.nan, -1.0, math.inf)), hold_s=value)
        floor = pb.WattsFloorRule(enabled=True, limit_w=math.nan, limit_w_by_gpu={text: value}, heartbeat_age_s=value)
        return pb.SetGuardRequest(request_id=identity, slo_boost=boost, watts_floor=floor, reason=text)
    if name == "TripGuard":
        return pb.TripGuardRequest(request_id=identity, trip=chance.random() < 0.5, reason=text)
    if name in HARMFUL:
        spec = types.InstanceSpec(
            instance_id=text, model=text, gpu_uuids=[text] * chance.choice((0, 1, 200)), labels={text: text}
        )
        if name == "StartInstance":
            return pb.StartInstanceRequest(request_id=identity, term=0, spec=spec, reason=text)
        return pb.RestartInstanceRequest(
            request_id=identity, term=0, instance_id=text, gpu_uuids=[text], drain_deadline_s=value, reason=text
        )
    if name in ("DrainInstance", "StopInstance", "SleepInstance", "WakeInstance"):
        request = getattr(pb, f"{name}Request")
        return request(request_id=identity, term=0, instance_id=text, reason=text, owner=owner)
    if name == "WatchTelemetry":
        return pb.WatchTelemetryRequest(interval_s=value, history_samples=chance.choice((0, 1, 2**32 - 1)))
    if name in ("DrainNode", "ResumeNode"):
        request = getattr(pb, f"{name}Request")
        return request(request_id=identity, owner=owner, reason=text)
    return getattr(pb, f"{name}Request")()
