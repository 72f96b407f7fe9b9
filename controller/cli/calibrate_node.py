"""`dynamollm calibrate --node`: the sweep on an idle GPU host, through its agent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc

from common.errors import EXIT_UNAVAILABLE, UserError
from controller.calibrate.assembly import ProfileIdentity, build_profile, rarest_share, samples_by_group
from controller.calibrate.node import NodeBackend, NodeLimits
from controller.calibrate.sweep import FileCache, Progress, SweepPlan, SweepSettings, Tokens, sweep
from controller.cli.agent import me, open_channel
from controller.domain.decision import canonical_json
from controller.fleet.engines import engine_version
from controller.profile.table import ENGINE, Profile
from dynamollm.v1 import node_agent_pb2_grpc as rpc

# Few points: about 300, of ten seconds and a little for each change.
CLOCKS_MHZ = (795, 1200, 1605, 1980)
SETTINGS = SweepSettings(
    first_rate_rps=0.25, precision=0.1, refinements=2, curve_shares=(0.1, 0.35, 0.7), cap_shares=(0.3, 0.6, 0.9)
)


@dataclass(frozen=True, slots=True)
class Host:
    """The host to measure, and what its engine is besides its version."""

    address: str
    model: str
    engine: str
    point_s: float
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


def calibrate_host(
    host: Host,
    plan: SweepPlan,
    mix: Sequence[Tokens],
    cache: Path,
    progress: Callable[[Progress], None] | None = None,
) -> Profile:
    """Points go to a file in `cache`, so that a second run goes on where the first stopped. Raises UserError, and
    SensorError among them."""
    samples = samples_by_group(mix, plan.groups, plan.scheme)
    empty = [name for name, mine in samples.items() if not mine]
    if empty:
        raise UserError(f"the token mix holds no request of group {', '.join(empty)}.", "Use another trace.")
    plan = replace(plan, rarest=rarest_share(samples, plan.scheme))
    with open_channel(host.address, host.ca, host.cert, host.key) as channel:
        backend = NodeBackend(
            rpc.NodeAgentStub(channel), plan, samples, host.model, me(), NodeLimits(point_s=host.point_s)
        )
        try:
            with backend:
                return _measured(host, plan, backend, samples, cache, progress)
        except grpc.RpcError as error:
            unreachable = error.code() is grpc.StatusCode.UNAVAILABLE
            what = "no node agent answers" if unreachable else f"{error.code().name.lower()}: {error.details()}"
            raise UserError(
                f"{host.address}: {what}.",
                "What was measured is kept: start again to go on.",
                EXIT_UNAVAILABLE if unreachable else 2,
            ) from None


def plan_for(wanted: SweepPlan, tps: str) -> SweepPlan:
    """What is measured on a host, of which groups, caps and repeats are given. Raises UserError."""
    try:
        widths = tuple(sorted({int(value) for value in tps.split(",")}))
    except ValueError:
        widths = ()
    if not widths or widths[0] < 1:
        raise UserError(f"--tps {tps}: is no list of tensor parallelisms.", "Write 2,4,8.")
    settings = replace(SETTINGS, repeats=wanted.settings.repeats)
    return replace(wanted, tps=widths, clocks_mhz=CLOCKS_MHZ, settings=settings)


def _measured(
    host: Host,
    plan: SweepPlan,
    backend: NodeBackend,
    samples: dict[str, tuple[Tokens, ...]],
    cache: Path,
    progress: Callable[[Progress], None] | None,
) -> Profile:
    engine = f"{ENGINE}{_version(backend)}, {host.engine}"
    what = [host.model, backend.gpu_name, engine, host.point_s, asdict(plan.settings), plan.clocks_mhz, plan.caps_w]
    digest = hashlib.sha256(canonical_json([what, samples]).encode()).hexdigest()[:16]
    points = sweep(backend, plan, FileCache(cache / f"node-{digest}.jsonl"), progress)
    identity = ProfileIdentity(host.model, backend.gpu_name, engine, f"{host.address}, {host.point_s:g} s a point")
    return build_profile(backend, plan, identity, points, samples, backend.starts)


def _version(backend: NodeBackend) -> str:
    """Of the engines; the first kind of instance is started for it."""
    endpoint = backend.endpoint(backend.plan.tps[0])
    return asyncio.run(engine_version(endpoint)) or "unknown"
