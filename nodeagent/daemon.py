"""Puts the agent together: takes the state directory, makes the GPUs safe, takes engines over, serves, and undoes
all of it on SIGTERM. Order is what matters here: nothing is served before every old control was restored.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from common import sd_notify
from common.clock import Clock, SystemClock
from common.errors import EXIT_ALREADY_RUNNING, EXIT_UNAVAILABLE, UserError
from common.logs import get_logger
from dynamollm.v1 import node_agent_pb2, node_agent_pb2_grpc
from nodeagent.audit import AuditLog
from nodeagent.config import ListenConfig, NodeAgentConfig, split_address
from nodeagent.control.controls import Controls
from nodeagent.control.fence import Fence
from nodeagent.control.guard import Guard
from nodeagent.control.recovery import nothing_left, recover
from nodeagent.control.settings import ControlKey
from nodeagent.drain import NodeDrain
from nodeagent.engine.instances import Instances
from nodeagent.engine.launchers import open_launcher
from nodeagent.engine.records import Records
from nodeagent.engine.vllm import EngineReading, VllmClient
from nodeagent.files import StateLock, ensure_directory, write_durably
from nodeagent.gpu.driver import DriverUnavailable, GpuDriver, GpuError
from nodeagent.gpu.inventory import Inventory
from nodeagent.gpu.nvml import NvmlDriver
from nodeagent.host import HostFacts, host_facts
from nodeagent.security import MAX_CALLS, MAX_REQUEST_BYTES, Gate, server_credentials
from nodeagent.service import NodeAgentService
from nodeagent.telemetry.metrics import AgentMetrics, SampleCollector
from nodeagent.telemetry.sampler import Sampler
from nodeagent.telemetry.stream import SampleStream

log = get_logger(__name__)

JOURNAL_FILE = "journal.json"
CAPS_FILE = "caps.json"
GUARD_FILE = "guard.json"
AUDIT_FILE = "audit.log"
TERM_FILE = "term.json"
DRAIN_FILE = "drain.json"
LISTEN_FILE = "listen"
SERVICE = node_agent_pb2.DESCRIPTOR.services_by_name["NodeAgent"].full_name
STUCK_AFTER_S = 5.0
"""A loop without a beat for this long, beyond its own pause, is stuck: systemd's watchdog then gets no more pings."""


def open_driver() -> GpuDriver:
    """The node's GPU driver; UserError where there is none."""
    try:
        driver = NvmlDriver()
        if driver.count() > 0:
            return driver
    except DriverUnavailable as error:
        hint = "Install the NVIDIA driver, or check LD_LIBRARY_PATH."
        raise UserError(f"{error}.", hint, EXIT_UNAVAILABLE) from None
    except GpuError as error:
        raise UserError(f"the NVIDIA driver does not answer: {error}.", "Check nvidia-smi.", EXIT_UNAVAILABLE) from None
    raise UserError("the NVIDIA driver shows no GPU.", "Run the agent on a GPU host.", EXIT_UNAVAILABLE)


@dataclass(slots=True)
class Controlled:
    """GPUs and their controls: what both the daemon and the `restore` command need."""

    inventory: Inventory
    controls: Controls
    fence: Fence
    metrics: AgentMetrics
    registry: CollectorRegistry


async def open_controls(config: NodeAgentConfig, driver: GpuDriver, host: HostFacts, clock: Clock) -> Controlled:
    """Opens the GPUs and finds out what an earlier agent left behind. Restores nothing yet."""
    disable_created_metrics()  # type: ignore[no-untyped-call] # a second series a counter, of no use here
    registry = CollectorRegistry()
    metrics = AgentMetrics(registry)
    inventory = Inventory(driver, config.gpu.call_deadline_s)
    await inventory.open()
    fence = Fence(config.state_dir / TERM_FILE, clock)
    caps, journal = await recover(
        config.state_dir / CAPS_FILE, config.state_dir / JOURNAL_FILE, host.boot_id, inventory, clock
    )
    controls = Controls(inventory, journal, caps, fence, clock, config.controls, metrics)
    return Controlled(inventory, controls, fence, metrics, registry)


async def restore(config: NodeAgentConfig) -> tuple[list[ControlKey], list[ControlKey]]:
    """Makes everything safe that a dead agent left behind; returns what was to do and what could not be done.

    Raises UserError while an agent is alive: then that one is in charge of its own controls.
    """
    journal = config.state_dir / JOURNAL_FILE
    if not config.state_dir.is_dir():
        return [], []
    lock = StateLock(config.state_dir)
    try:
        if nothing_left(journal):  # then no driver is needed either
            return [], []
        parts = await open_controls(config, open_driver(), host_facts(), SystemClock())
        found = parts.controls.unrestored()
        left = await parts.controls.close()
        parts.inventory.close()
        return found, left
    finally:
        lock.release()


async def run(config: NodeAgentConfig) -> int:
    """The daemon; returns its exit code when told to stop. Raises UserError for what a person can mend."""
    ensure_directory(config.state_dir)
    lock = StateLock(config.state_dir)
    try:
        return await _Daemon(config, open_driver()).run()
    finally:
        lock.release()


class _Daemon:
    def __init__(self, config: NodeAgentConfig, driver: GpuDriver) -> None:
        self._config = config
        self._driver = driver
        self._clock = SystemClock()
        self._host = host_facts()
        self._stop = asyncio.Event()
        self._broken = ""

    async def run(self) -> int:
        config = self._config
        listen_file = config.state_dir / LISTEN_FILE
        listen_file.unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        parts = await open_controls(config, self._driver, self._host, self._clock)
        controls = parts.controls
        await controls.sweep()
        for key in controls.unrestored():
            log.error("control of an earlier agent is not restored yet; trying on", control=str(key))
        ensure_directory(config.instance_dir)
        ensure_directory(config.engine_log_dir)
        client = VllmClient()
        records = Records(config.instance_dir, self._clock)
        launcher = await open_launcher(config.engine)
        instances = Instances(
            parts.inventory, launcher, client, records, self._clock, self._host.boot_id, config, parts.metrics
        )
        drain = NodeDrain(config.state_dir / DRAIN_FILE, instances, self._clock)
        telemetry = config.telemetry
        stream = SampleStream(telemetry.queue_samples, parts.metrics.samples_lost.inc, telemetry.history_samples)
        parts.registry.register(SampleCollector(lambda: stream.latest, lambda: len(controls.unrestored())))
        capabilities = ["instances"]
        capabilities += ["clock_lock"] if config.controls.clock_lock else []
        capabilities += ["memory_clock_lock"] if config.controls.memory_clock_lock else []
        capabilities += ["power_limit", "guard"] if config.controls.power_limit else ["guard"]
        audit_file = Path(config.security.audit_file) if config.security.audit_file else config.state_dir / AUDIT_FILE
        audit = AuditLog(
            audit_file, self._clock, config.security.audit_max_mib * 1024 * 1024, parts.metrics.audit_lost.inc
        )
        guard = Guard(
            config.state_dir / GUARD_FILE,
            controls,
            parts.fence,
            parts.inventory,
            lambda: _look_at_engines(instances, config.telemetry.scrape_timeout_s),
            self._clock,
            parts.metrics,
            audit,
            config.guard.trigger_file,
        )
        await guard.start()

        def node() -> tuple[tuple[str, ...], bool]:
            return _alarms(guard, controls, audit), drain.state is not None

        sampler = Sampler(parts.inventory, controls, instances, stream, self._clock, telemetry, self._host, node)
        service = NodeAgentService(
            config.node_name,
            self._host,
            parts.inventory,
            controls,
            parts.fence,
            instances,
            stream,
            capabilities,
            guard,
            drain,
        )
        server = grpc.aio.server(
            interceptors=[Gate(config.security, audit, parts.metrics)],
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_REQUEST_BYTES)],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        node_agent_pb2_grpc.add_NodeAgentServicer_to_server(service, server)
        status = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        if config.listen.reflection:
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        addresses = bind(server, config.listen)
        metrics_address = serve_metrics(config.metrics.listen, parts.registry)
        addresses |= {"metrics": metrics_address} if metrics_address else {}

        await instances.adopt()
        drain.look()
        gc.collect()
        gc.freeze()  # what stands now stands to the end: a full collection need not walk it in the middle of a call
        await server.start()
        await status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        write_durably(listen_file, (json.dumps(addresses, indent=1) + "\n").encode(), mode=0o644)
        beats = {
            lambda: controls.last_beat_s: STUCK_AFTER_S,
            lambda: instances.last_beat_s: STUCK_AFTER_S,
            lambda: sampler.last_beat_s: STUCK_AFTER_S + config.telemetry.interval_s,
            # A trip waits for a GPU that hangs, at most for two of its calls.
            lambda: guard.last_beat_s: STUCK_AFTER_S + 2 * config.gpu.call_deadline_s,
        }
        loops = [
            self._loop("lease expiry", controls.run()),
            self._loop("process watch", instances.run()),
            self._loop("sampling", sampler.run()),
            self._loop("guard", guard.run()),
            self._loop("slo boost", guard.watch_engines()),
            self._loop("audit log", audit.run()),
            self._loop("node drain", drain.run()),
            self._loop(
                "gpu recovery",
                parts.inventory.recover_forever(config.gpu.recovery_interval_s, config.gpu.facts_interval_s),
            ),
            self._loop("watchdog", self._watchdog(beats)),
        ]
        log.info("serving", node=config.node_name, gpus=len(parts.inventory.workers), **addresses)
        sd_notify.notify("READY=1", f"STATUS=serving {len(parts.inventory.workers)} GPUs")

        await self._stop.wait()
        sd_notify.notify("STOPPING=1", "STATUS=restoring controls")
        log.info("stopping", why=self._broken or "asked to")
        await status.enter_graceful_shutdown()
        left = await controls.close()
        for key in left:
            log.error("control not restored; `dynamollm-nodeagent restore` or the next start will", control=str(key))
        listen_file.unlink(missing_ok=True)
        await server.stop(grace=0.5)
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await instances.close()
        await client.close()
        parts.inventory.close()
        audit.close()
        log.info("stopped", engines_left_running=sum(view.endpoint != "" for view in instances.views()))
        return 1 if left or self._broken else 0

    def _loop(self, name: str, body: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """A loop that ends by itself is broken; the agent then stops in good order and systemd starts a new one."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                log.error("internal error", loop=name, exc_info=task.exception())
                self._broken = f"the {name} loop ended"
                self._stop.set()

        task = asyncio.get_running_loop().create_task(body)
        task.add_done_callback(ended)
        return task

    async def _watchdog(self, beats: dict[Callable[[], float], float]) -> None:
        """Pings systemd as long as every loop makes progress."""
        interval_s = sd_notify.watchdog_interval_s() or 1.0
        while True:
            now_s = self._clock.monotonic_s()
            if all(now_s - beat() <= limit_s for beat, limit_s in beats.items()):
                sd_notify.notify("WATCHDOG=1")
            await asyncio.sleep(interval_s)


def _alarms(guard: Guard, controls: Controls, audit: AuditLog) -> tuple[str, ...]:
    """What an operator should look at that belongs to no single GPU."""
    alarms = {
        "watts_floor_tripped": guard.state.tripped,
        "guard_state_not_saved": guard.unsaved,
        "controls_not_restored": bool(controls.unrestored()),
        "caps_not_recorded": controls.caps_unrecorded,
        "audit_log_failing": audit.failing,
    }
    return tuple(name for name, on in alarms.items() if on)


async def _look_at_engines(
    instances: Instances, timeout_s: float
) -> dict[str, tuple[tuple[str, ...], EngineReading | None]]:
    gpus = {view.record.spec.instance_id: view.record.spec.gpu_uuids for view in instances.views()}
    samples = await instances.scrape(timeout_s)
    return {sample.instance_id: (gpus.get(sample.instance_id, ()), sample.engine) for sample in samples}


def bind(server: grpc.aio.Server, config: ListenConfig) -> dict[str, str]:
    """Binds the addresses and returns them as gRPC targets; UserError for one that cannot be had."""
    addresses: dict[str, str] = {}
    if config.unix_socket:
        path = Path(config.unix_socket)
        _clear_socket(path)
        before = os.umask(0o117)  # the socket is created by the bind: 0660 from its first instant
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError:
            raise UserError(f"{path}: cannot listen there.", "Check listen.unix_socket.", EXIT_UNAVAILABLE) from None
        finally:
            os.umask(before)
        if config.unix_group:
            try:
                shutil.chown(path, group=config.unix_group)
            except (LookupError, OSError) as error:
                raise UserError(f"{path}: group {config.unix_group!r}: {error}.", "Check listen.unix_group.") from None
        addresses["unix"] = f"unix:{path}"
    if config.tcp:
        host, port = split_address(config.tcp)
        try:
            if config.tls:
                port = server.add_secure_port(config.tcp, server_credentials(config))
            else:
                port = server.add_insecure_port(config.tcp)
        except RuntimeError:
            raise UserError(
                f"{config.tcp}: cannot listen there; the port is in use or the address is not this machine's.",
                "Set listen.tcp to a free one.",
                EXIT_UNAVAILABLE,
            ) from None
        addresses["tcp"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return addresses


def _clear_socket(path: Path) -> None:
    """Removes a socket that nobody listens on any more. A bind would take over a live one without a word."""
    ensure_directory(path.parent)
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UserError(f"{path}: exists and is not a socket.", "Remove it or set listen.unix_socket.")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}.", "Check the socket's owner and mode.") from None
    raise UserError(f"{path}: another program listens there.", "Set listen.unix_socket.", EXIT_ALREADY_RUNNING)


def serve_metrics(listen: str, registry: CollectorRegistry) -> str:
    """Serves /metrics from a thread of its own; returns the URL, empty when switched off."""
    if not listen:
        return ""
    host, port = split_address(listen)
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UserError(
            f"{listen}: cannot serve metrics there: {error.strerror or error}.",
            "Set metrics.listen to a free address, or to an empty string.",
            EXIT_UNAVAILABLE,
        ) from None
    return f"http://{host}:{server.server_port}/metrics"
