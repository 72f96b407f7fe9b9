"""Puts the controller's parts together, starts and stops them: store, leadership, core, runtime, gRPC server."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import signal
import socket
from contextlib import ExitStack
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
from common.tls import check_files
from common.tls_server import server_credentials
from controller.api.gate import gate
from controller.api.metrics import ControllerMetrics, serve_metrics
from controller.api.routing_hub import RoutingHub
from controller.api.service import ControllerService
from controller.config import ControllerConfig, ServerTls
from controller.domain.reasons import Level, Mode
from controller.fleet.grpc import AgentClient
from controller.housekeeping import keep_house
from controller.leading import LeadKeeper, take_lead
from controller.loop.journal import JournaledCore, recover_open_frame
from controller.loop.orders import NotePower, Order, SetMode, SetPowerBudget
from controller.loop.runtime import Runtime, keep_collections_short
from controller.loop.snapshot import week_of
from controller.policy.provision import NodePower
from controller.profile.table import Profile
from controller.store.engine import open_engine, parse_url
from controller.store.migrate import require_current
from controller.store.recorder import Recorder, open_recorder
from controller.store.records import OrderKind
from controller.store.repositories import last_orders, last_plan, last_snapshot, list_nodes, save_profile
from controller.trials import Trials, run_trials
from dynamollm.v1 import controller_pb2, controller_pb2_grpc

_log = get_logger(__name__)

SERVICE = controller_pb2.DESCRIPTOR.services_by_name["Controller"].full_name
_SETTLE_S = 2.0


def read_profile(path: Path) -> Profile:
    """Raises UserError when the file is missing or is no profile."""
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such profile.", "Make one with `dynamollm calibrate`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}.", "Check the path and its permissions.") from None


async def serve(config: ControllerConfig) -> None:
    """Runs the controller until SIGTERM or SIGINT. Raises UserError for what the operator can mend."""
    clock = SystemClock()
    check_files(config.agent_tls, "agent_tls")
    config.tls.check()
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
        url = parse_url(config.database_url)
        if url.get_backend_name() == "sqlite":
            held.enter_context(_only_one(Path(f"{url.database}.lock")))
        engine = open_engine(config.database_url)
        held.callback(engine.dispose)
        require_current(engine)
        keeper = await take_lead(config.database_url, holder, stop, _stand_by, _alive)
        if keeper is None:
            return
        recorder = open_recorder(config.database_url, config.spool_dir)
        held.callback(recorder.close)
        # The newest plan may still wait in the spool from an outage.
        recorder.settle(_SETTLE_S)
        save_profile(engine, profile.checksum(), profile.model, profile.to_json(), clock.wall_s())
        await _run(config, profile, engine, recorder, keeper, clock, stop)


async def _run(
    config: ControllerConfig,
    profile: Profile,
    engine: Engine,
    recorder: Recorder,
    keeper: LeadKeeper,
    clock: Clock,
    stop: asyncio.Event,
) -> None:
    lead = keeper.lead
    core = JournaledCore(
        config.loop_settings(),
        profile,
        lead.term,
        expected_nodes=len(config.agents),
        mode=config.mode,
        plan=last_plan(engine),
        week=week_of(last_snapshot(engine)),
    )
    _keep_journal(core, recorder, config.spool_dir / "open-frame.jsonl")
    hub = RoutingHub()
    agents: dict[str, AgentClient] = {}
    standing = standing_orders(engine, clock.wall_s())

    def circuits_open() -> dict[str, bool]:
        return {node_id: agent.circuit_open for node_id, agent in agents.items()}

    metrics = ControllerMetrics(
        core.state,
        recorder.counts,
        lambda: runtime.missed_ticks,
        clock.monotonic_s,
        circuits_open,
        lambda: runtime.failed_actions,
    )

    def ticked(level: Level, seconds: float) -> None:
        metrics.ticked(level, seconds)
        _alive()

    runtime = Runtime(
        core,
        agents,
        hub,
        recorder.record,
        clock,
        config.telemetry_window_s,
        metrics.decided,
        keeper,
        ticked,
        config.provisioner.hook(),
    )
    runtime.restore(standing)
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
            tls=config.agent_tls if agent.tls else None,
            tls_name=agent.tls_name,
            most_late_s=(core.state.settings.stale_s + core.state.settings.lost_s) / 2,  # stale, and not lost
        )
    trials = Trials(runtime, engine, clock)
    service = ControllerService(
        core.state,
        hub,
        runtime.sink,
        clock.monotonic_s,
        engine,
        {agent.node_id: agent.address for agent in config.agents},
        recorder.counts,
        runtime,
        lead.holder,
        recorder.record,
        lambda: trials.said,
        circuits_open,
    )
    server = await open_api(config.listen, service, config.tls)
    stop_metrics = serve_metrics(metrics, config.metrics_listen) if config.metrics_listen else None
    keeping = asyncio.create_task(keeper.keep(stop.set))
    housekeeping = asyncio.create_task(keep_house(config, engine, clock))
    trying = asyncio.create_task(run_trials(trials))
    _log.info("ready", listen=config.listen, term=lead.term, mode=str(core.state.mode), agents=len(agents))
    notify("READY=1\nSTATUS=leads under term " + str(lead.term))
    keep_collections_short()
    try:
        await runtime.run(stop)
    finally:
        notify("STOPPING=1")
        keeping.cancel()
        housekeeping.cancel()
        trying.cancel()
        if keeper.lost_to is None:
            await keeper.give_up()  # at once: another waits for it
        await server.stop(grace=0.5)
        if stop_metrics is not None:
            stop_metrics()
    if keeper.lost_to is not None:
        raise UserError(
            f"the lead was lost: {keeper.lost_to} has taken over from term {lead.term}.",
            "This one ends; started again it waits in standby.",
            EXIT_ALREADY_RUNNING,
        )


def standing_orders(engine: Engine, now_s: float) -> list[Order]:
    """What operators asked for and nobody has taken back: it holds over a restart, whatever the file says."""
    orders: list[Order] = []
    for found in last_orders(engine, OrderKind.MODE):
        orders.append(SetMode(found.scope, Mode(found.value)))
        _log.info("mode_holds", scope=found.scope, mode=found.value, who=found.who, why=found.why)
    for found in last_orders(engine, OrderKind.BUDGET):
        # Also one that was lifted, or is over: nobody may have been there to take its caps away.
        orders.append(SetPowerBudget(found.scope, float(found.value) if found.value else None, found.until_s))
        if found.value and (found.until_s is None or found.until_s > now_s):
            _log.info("budget_holds", scope=found.scope, watts=found.value, who=found.who, why=found.why)
    for node in list_nodes(engine):
        if node.detail.get("power", NodePower.ON.value) != NodePower.ON.value:
            orders.append(NotePower(node.node_id))
            _log.info("node_is_off", node=node.node_id)
    return orders


def _keep_journal(core: JournaledCore, recorder: Recorder, open_frame: Path) -> None:
    """What a killed controller had not yet put into the history goes there first."""
    left = recover_open_frame(open_frame)
    if left is not None:
        recorder.record(left)
        _log.info("inputs_recovered", term=left.term, frame=left.number, lines=len(left.lines))
    core.keep_journal(recorder.record, open_frame)


def _alive() -> None:
    notify("WATCHDOG=1")


def _stand_by(whom: str) -> None:
    """Ready to take over. A standby does not listen, so that a client with both addresses finds the leader."""
    _log.info("standby", detail=whom)
    notify(f"READY=1\nSTATUS=standby: {whom}")


async def open_api(address: str, service: controller_pb2_grpc.ControllerServicer, tls: ServerTls) -> grpc.aio.Server:
    """Serves the API; over TLS if that is set. Raises UserError where nobody can listen."""
    # A second server would otherwise share the port and take half of the calls.
    secure = tls.on and not address.startswith("unix")
    gates = [gate(tls.scopes)] if secure else []
    server = grpc.aio.server(interceptors=gates, options=[("grpc.so_reuseport", 0)])
    controller_pb2_grpc.add_ControllerServicer_to_server(service, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        if secure:
            hint = "Check tls.cert, tls.key and tls.client_ca."
            port = server.add_secure_port(address, server_credentials(tls.cert, tls.key, tls.client_ca, hint))
        else:
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
    """One controller per spool folder and per SQLite database: held until the process ends, however it ends."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"another controller (pid {file.read().strip() or 'unknown'}) holds {path}.",
            "Stop it first, or give this one a spool_dir and a database of its own.",
            EXIT_ALREADY_RUNNING,
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
