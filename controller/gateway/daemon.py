"""Puts the gateway together, starts and stops it: relay, controller client, HTTP server, periodic sweep."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from common.clock import Clock, SystemClock
from common.errors import EXIT_ALREADY_RUNNING, UserError
from common.logs import get_logger
from common.sd_notify import notify, watchdog_interval_s
from controller.fleet.port import RoutingTable
from controller.gateway.access import Access
from controller.gateway.brain import Brain
from controller.gateway.choices import Choices
from controller.gateway.classify import Classifier
from controller.gateway.client import ControllerClient
from controller.gateway.config import GatewayConfig, TlsConfig, split_address
from controller.gateway.http_guard import GuardedProtocol
from controller.gateway.metrics import make_registry
from controller.gateway.relay import Relay
from controller.gateway.server import make_app
from controller.gateway.snapshot import Snapshot
from controller.gateway.tokens import TokenCounter, load_tokenizers
from controller.predictor.best import Best
from controller.predictor.conditional import ByInput, Conditional
from controller.predictor.port import Predictor
from controller.predictor.text import TextModel, TextPredictor

if TYPE_CHECKING:
    from controller.picker.picker import Picker

_log = get_logger(__name__)
# Suspect instances come back and silent answers end at this grain.
SWEEP_S = 0.25
BACKLOG = 1024
# For choices under way when the gateway stops; running answers are Envoy's.
PICKER_STOP_S = 2.0
# The garbage collector's thresholds. A request in flight is a dozen objects that go with their last reference; next to
# nothing is left in cycles. So its steps stay as small as the defaults make them, and the walk over all that is in
# flight, in which nobody is answered (a tenth of a second for ten thousand requests), is made far more seldom.
COLLECT_AT = (1_000, 2, 100)
# Longer than clients keep idle connections (httpx: 5 s): whoever closes second has sent nothing into the void.
KEEP_ALIVE_S = 75


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers, which end the process before our own clean-up."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(listen: str) -> socket.socket:
    """The listening socket; UserError when the address cannot be had."""
    host, port = split_address(listen)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError(f"listen: {host!r} is no address: {error.strerror}.", "Correct `listen`.") from None
    listener = socket.socket(found[0], found[1], found[2])
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(found[4])
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"listen: {listen} cannot be bound: {error.strerror}.",
            "Stop what uses the port or choose another with --listen.",
            EXIT_ALREADY_RUNNING,
        ) from None
    return listener


async def run(config: GatewayConfig, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish for `limits.drain_s`."""
    check_tls(config.tls)
    clock = SystemClock()
    brain = make_brain(config, clock)
    relay = Relay(config.limits, brain)
    access = Access(Path(config.access.keys_file) if config.access.keys_file else None)
    snapshot = Snapshot(Path(config.state_dir) if config.state_dir else None)
    picker = make_picker(config, brain, access) if config.picker.listen else None

    def take(table: RoutingTable) -> None:
        relay.update_routing(table)
        snapshot.save(table)
        if picker is not None:
            picker.update_routing(table)

    controller = ControllerClient(
        config.controller,
        config.name,
        uuid.uuid4().hex,
        clock,
        config.report_interval_s,
        brain.meter,
        take,
        brain.models,
        brain.queues,
        brain.status,
        brain.choices,
        tls=config.controller_tls,
        tls_name=config.controller_tls_name,
    )
    if (last := snapshot.load()) is not None:
        # Routed by until the controller sends the first of its own; stale instances fail over.
        relay.update_routing(last)
        if picker is not None:
            picker.update_routing(last)
        _log.info("snapshot_loaded", term=last.term, version=last.version)
    server = _Server(
        uvicorn.Config(
            make_app(
                relay,
                config.limits,
                make_registry(brain, controller, clock, picker),
                access,
                config.access.tenant_header,
            ),
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(config.limits.drain_s)),
            ssl_certfile=config.tls.certificate or None,
            ssl_keyfile=config.tls.key or None,
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, server)
    host, port = listener.getsockname()[:2]
    background = [asyncio.create_task(controller.run()), asyncio.create_task(_sweep(relay, access, picker))]
    if picker is not None:
        await picker.start(config.picker.listen)
        background.append(asyncio.create_task(picker.publish()))
    for task in background:
        # They end only by a defect: stop and say so, rather than serve on an ageing table.
        task.add_done_callback(lambda _: _stop(server))
    scheme = "https" if config.tls.certificate else "http"
    _log.info("listening", address=f"{scheme}://{host}:{port}", controller=config.controller, gateway=config.name)
    if picker is not None:
        _log.info("picker_listening", port=picker.port)
    # What stands now stands to the end: a full collection that walks it would hold every request up for tens of ms.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AT)
    notify("READY=1", f"STATUS=Serving on {host}:{port}")
    try:
        await server.serve(sockets=[listener])
        for task in background:
            if task.done():
                task.result()
    finally:
        if picker is not None:
            await picker.stop(PICKER_STOP_S)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        relay.upstreams.close()
        _log.info("stopped")


def _stop(server: uvicorn.Server) -> None:
    notify("STOPPING=1")
    # The second signal does not wait for running requests.
    server.force_exit = server.should_exit
    server.should_exit = True


def check_tls(tls: TlsConfig) -> None:
    """UserError when the files cannot be used."""
    if tls.certificate:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or error.args[0]
            raise UserError(
                f"tls: {tls.certificate} with {tls.key} cannot be used: {reason}.", "Name two PEM files that match."
            ) from None


def make_brain(config: GatewayConfig, clock: Clock) -> Brain:
    """From the configuration; UserError when a file it names cannot be used."""
    classify = config.classify
    predictor: Predictor = Conditional() if classify.predictor == "conditional" else ByInput()
    if classify.text_model:
        predictor = Best(TextPredictor(TextModel.load(Path(classify.text_model))), predictor)
    return Brain(
        config.limits.waiting,
        config.slo.slo(),
        clock,
        Classifier(None, classify.output_quantile, predictor, classify.min_confidence),
        TokenCounter(load_tokenizers(classify.tokenizers)),
        config.picker.overcommit,
        Choices(clock, config.routing.weights(), config.routing.sample_one_in, config.routing.samples_per_minute),
    )


def make_picker(config: GatewayConfig, brain: Brain, access: Access) -> Picker:
    """The gRPC side; its packages are an extra that a gateway without Envoy does not need."""
    try:
        from controller.picker.picker import Picker
    except ImportError as error:
        raise UserError(
            f"picker.listen is set, but the package {error.name} is not installed.",
            "Install the extra `envoy` (xds-protos), or empty the setting.",
        ) from None
    return Picker(brain, config.limits, config.picker, access, config.access.tenant_header)


async def _sweep(relay: Relay, access: Access, picker: Picker | None) -> None:
    watchdog_s = watchdog_interval_s()
    clock = SystemClock()
    told_s = clock.monotonic_s()
    while True:
        await asyncio.sleep(SWEEP_S)
        relay.sweep()
        access.refresh()
        if picker is not None:
            picker.sweep()
        if watchdog_s is not None and clock.monotonic_s() - told_s >= watchdog_s:
            told_s = clock.monotonic_s()
            notify("WATCHDOG=1")
