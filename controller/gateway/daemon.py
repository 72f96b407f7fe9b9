"""Puts the gateway together, starts and stops it: relay, controller client, HTTP server, periodic sweep."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import uuid
from collections.abc import Iterator

import uvicorn

from common.clock import SystemClock
from common.errors import EXIT_ALREADY_RUNNING, UserError
from common.logs import get_logger
from common.sd_notify import notify, watchdog_interval_s
from controller.gateway.client import ControllerClient
from controller.gateway.config import GatewayConfig, split_address
from controller.gateway.metrics import make_registry
from controller.gateway.relay import Relay
from controller.gateway.server import make_app

_log = get_logger(__name__)
# Suspect instances come back and silent answers end at this grain.
SWEEP_S = 0.25
BACKLOG = 1024
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
    clock = SystemClock()
    relay = Relay(config.limits, config.slo.slo(), config.classify.output_quantile, clock)
    controller = ControllerClient(
        config.controller,
        config.name,
        uuid.uuid4().hex,
        clock,
        config.report_interval_s,
        relay.meter,
        relay.update_routing,
        relay.models,
        relay.dispatcher.queues,
    )
    server = _Server(
        uvicorn.Config(
            make_app(relay, config.limits, make_registry(relay, controller, clock)),
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(config.limits.drain_s)),
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, server)
    host, port = listener.getsockname()[:2]
    background = [asyncio.create_task(controller.run()), asyncio.create_task(_sweep(relay))]
    for task in background:
        # They end only by a defect: stop and say so, rather than serve on an ageing table.
        task.add_done_callback(lambda _: _stop(server))
    _log.info("listening", address=f"http://{host}:{port}", controller=config.controller, gateway=config.name)
    notify("READY=1", f"STATUS=Serving on {host}:{port}")
    try:
        await server.serve(sockets=[listener])
        for task in background:
            if task.done():
                task.result()
    finally:
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


async def _sweep(relay: Relay) -> None:
    watchdog_s = watchdog_interval_s()
    clock = SystemClock()
    told_s = clock.monotonic_s()
    while True:
        await asyncio.sleep(SWEEP_S)
        relay.sweep()
        if watchdog_s is not None and clock.monotonic_s() - told_s >= watchdog_s:
            told_s = clock.monotonic_s()
            notify("WATCHDOG=1")
