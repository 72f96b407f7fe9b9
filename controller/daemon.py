"""Puts the controller's parts together, starts and stops them: store, leadership, core, runtime, gRPC server."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import signal
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from sqlalchemy import Engine

from common.clock import Clock, SystemClock
from common.errors import EXIT_ALREADY_RUNNING, EXIT_UNAVAILABLE, UserError
from common.logs import get_logger
from common.sd_notify import notify
from controller.api.metrics import ControllerMetrics, serve_metrics
from controller.api.routing_hub import RoutingHub
from controller.api.service import ControllerService
from controller.config import ControllerConfig
from controller.fleet.grpc import AgentClient
from controller.loop.core import Core
from controller.loop.runtime import Runtime
from controller.profile.table import Profile
from controller.store.engine import StoreUnavailable, open_engine
from controller.store.leadership import Lead, Refused, acquire, leader, release, renew
from controller.store.migrate import require_current
from controller.store.recorder import Recorder, open_recorder
from controller.store.repositories import last_plan, save_profile
from dynamollm.v1 import controller_pb2, controller_pb2_grpc

_log = get_logger(__name__)

SERVICE = controller_pb2.DESCRIPTOR.services_by_name["Controller"].full_name
LEAD_TTL_S = 15.0
_RENEW_S = LEAD_TTL_S / 3
_SETTLE_S = 2.0


def read_profile(path: Path) -> Profile:
    """Raises UserError when the file is missing or is no profile."""
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such profile.", "Make one with `dynamollm calibrate`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}.", "Check the path and its permissions.") from None


async def serve(config: ControllerConfig) -> None:
    """Runs the controller until SIGTERM or SIGINT. Raises UserError for what the operator can mend."""
    clock = SystemClock()
    profile = read_profile(config.profile)
    if config.model != profile.model:
        raise UserError(
            f"{config.profile}: measured for model {profile.model!r}, the controller serves {config.model!r}.",
            "Point `profile` to one of this model, or set `model`.",
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    holder = f"{config.controller_id or socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    with ExitStack() as held:
        config.spool_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(_only_one(config.spool_dir / "controller.lock"))
        engine = open_engine(config.database_url)
        held.callback(engine.dispose)
        require_current(engine)
        lead = _lead(engine, holder, clock)
        recorder = open_recorder(config.database_url, config.spool_dir)
        held.callback(recorder.close)
        # The newest plan may still wait in the spool from an outage.
        recorder.settle(_SETTLE_S)
        save_profile(engine, profile.checksum(), profile.model, profile.to_json(), clock.wall_s())
        await _run(config, profile, engine, recorder, lead, clock, stop)


async def _run(
    config: ControllerConfig,
    profile: Profile,
    engine: Engine,
    recorder: Recorder,
    lead: Lead,
    clock: Clock,
    stop: asyncio.Event,
) -> None:
    core = Core(
        config.loop_settings(),
        profile,
        lead.term,
        expected_nodes=len(config.agents),
        mode=config.mode,
        plan=last_plan(engine),
    )
    hub = RoutingHub()
    agents: dict[str, AgentClient] = {}
    metrics = ControllerMetrics(core.state, recorder.counts, lambda: runtime.missed_ticks)
    runtime = Runtime(core, agents, hub, recorder.record, clock, config.telemetry_window_s, metrics.decided)
    for agent in config.agents:
        agents[agent.node_id] = AgentClient(
            agent.node_id,
            agent.address,
            runtime.sink,
            clock,
            owner=lead.holder,
            term=lead.term,
            interval_s=config.telemetry_interval_s,
            deadline_s=config.lease.rpc_deadline_s,
        )
    service = ControllerService(
        core.state,
        hub,
        runtime.sink,
        clock.monotonic_s,
        engine,
        {agent.node_id: agent.address for agent in config.agents},
        lambda: ((counts := recorder.counts()).recorded, counts.in_memory),
    )
    server = await _listen(config.listen, service)
    stop_metrics = serve_metrics(metrics, config.metrics_listen) if config.metrics_listen else None
    keeper = asyncio.create_task(_keep_lead(engine, lead, clock, stop))
    _log.info("ready", listen=config.listen, term=lead.term, mode=str(config.mode), agents=len(agents))
    notify("READY=1")
    try:
        await runtime.run(stop)
    finally:
        notify("STOPPING=1")
        keeper.cancel()
        await server.stop(grace=1.0)
        if stop_metrics is not None:
            stop_metrics()
    lost = keeper.done() and not keeper.cancelled() and keeper.result()
    if lost:
        raise UserError(
            f"leadership was lost: term {lead.term} has a successor.",
            "Only one controller may act; stop the other one if this one should lead.",
            EXIT_ALREADY_RUNNING,
        )
    try:
        release(engine, lead)
    except StoreUnavailable as error:
        _log.warning("leadership_not_released", detail=str(error))


async def _listen(address: str, service: ControllerService) -> grpc.aio.Server:
    # A second server would otherwise share the port and take half of the calls.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    controller_pb2_grpc.add_ControllerServicer_to_server(service, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise UserError(
            f"{address}: cannot listen there; the port is in use or the address is not this machine's.",
            "Stop the other program or set `listen` to another address.",
            EXIT_UNAVAILABLE,
        )
    await server.start()
    for name in ("", SERVICE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server


def _only_one(path: Path) -> IO[str]:
    """One controller per spool folder, and so per SQLite database: held until the process ends, however it ends."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"another controller (pid {file.read().strip() or 'unknown'}) is running with {path.parent}.",
            "Stop it first, or give this one a spool_dir and database of its own.",
            EXIT_ALREADY_RUNNING,
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _lead(engine: Engine, holder: str, clock: Clock) -> Lead:
    taken = acquire(engine, holder, LEAD_TTL_S, clock.wall_s())
    if isinstance(taken, Refused) and engine.dialect.name == "sqlite":
        # SQLite means one machine and the lock file is ours: whoever held the lead there is dead.
        dead = leader(engine)
        if dead is not None:
            release(engine, dead)
        taken = acquire(engine, holder, LEAD_TTL_S, clock.wall_s())
    if isinstance(taken, Refused):
        raise UserError(
            f"controller {taken.holder} leads under term {taken.term}.",
            "Stop it, or wait until its lead expires.",
            EXIT_ALREADY_RUNNING,
        )
    return taken


async def _keep_lead(engine: Engine, lead: Lead, clock: Clock, stop: asyncio.Event) -> bool:
    """Renews the lead; returns True, having set `stop`, once another has it. A dead database is no reason to stop:
    agents fence by term, and without the database nobody else can take the lead either."""
    while True:
        await asyncio.sleep(_RENEW_S)
        try:
            renewed = await asyncio.to_thread(partial(renew, engine, lead, LEAD_TTL_S, clock.wall_s()))
        except StoreUnavailable as error:
            _log.warning("leadership_not_renewed", detail=str(error))
            continue
        if renewed is None:
            stop.set()
            return True
