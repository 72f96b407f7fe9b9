"""The gRPC port of the gateway: external processor, access log and endpoint discovery for Envoy, the Gateway service,
health and reflection. `start` puts them together; nothing else imports grpc's server here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from envoy.service.accesslog.v3 import als_pb2 as als
from envoy.service.discovery.v3 import discovery_pb2 as discovery
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.errors import EXIT_ALREADY_RUNNING, UserError
from common.tls_server import server_credentials
from controller.gateway.config import PickerTls
from controller.picker import access_log
from controller.picker.callers import ENVOY, Callers
from controller.picker.discovery import Discovery
from controller.picker.exchange import Desk, Exchange
from controller.picker.orchestration import GatewayService
from dynamollm.v1 import gateway_pb2 as pb
from dynamollm.v1 import gateway_pb2_grpc as rpc

EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"
ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"
ENDPOINTS = "envoy.service.endpoint.v3.EndpointDiscoveryService"
OPTIONS = [
    # A second gateway on this port is refused instead of sharing it in silence.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 100_000),
]


class PickerServer:
    """`port` is the one in use."""

    def __init__(self, desk: Desk, discovery_: Discovery) -> None:
        self._desk = desk
        self._discovery = discovery_
        self._callers = Callers()
        self._server = grpc.aio.server(options=OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        rpc.add_GatewayServicer_to_server(GatewayService(desk, self._callers), self._server)
        # Not as subclasses of the generated servicers, which have no types: the handlers are all there is to them.
        self._server.add_generic_rpc_handlers(
            (
                _handler(EXT_PROC, "Process", self._process, ext.ProcessingRequest, ext.ProcessingResponse),
                _handler(
                    ENDPOINTS,
                    "StreamEndpoints",
                    self._endpoints,
                    discovery.DiscoveryRequest,
                    discovery.DiscoveryResponse,
                ),
                grpc.method_handlers_generic_handler(
                    ACCESS_LOG,
                    {
                        "StreamAccessLogs": grpc.stream_unary_rpc_method_handler(
                            self._log,
                            als.StreamAccessLogsMessage.FromString,
                            als.StreamAccessLogsResponse.SerializeToString,
                        )
                    },
                ),
            )
        )
        names = (
            EXT_PROC,
            ACCESS_LOG,
            ENDPOINTS,
            pb.DESCRIPTOR.services_by_name["Gateway"].full_name,
            health.SERVICE_NAME,
        )
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)
        self.port = 0

    async def start(self, listen: str, tls: PickerTls) -> None:
        """UserError when the address cannot be had, or a file of `tls` cannot be used."""
        try:
            if tls.on:
                tls.check()
                self._callers.scopes = tls.scopes
                credentials = server_credentials(tls.cert, tls.key, tls.client_ca, "Check picker.tls.")
                self.port = self._server.add_secure_port(listen, credentials)
            else:
                self.port = self._server.add_insecure_port(listen)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise UserError(
                f"picker.listen: {listen} cannot be bound.",
                "Stop what uses the port or choose another.",
                EXIT_ALREADY_RUNNING,
            )
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Envoy turns to other pickers first, where it has any; then the choices under way are finished."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _process(self, _: AsyncIterator[Any], context: Any) -> None:
        """Reads and writes by hand: two generators less for each message."""
        await self._callers.admit(ENVOY, context)
        exchange = Exchange(self._desk)
        try:
            while not exchange.over and (message := await context.read()) is not grpc.aio.EOF:
                for reply in exchange.handle(message):
                    await context.write(reply)
        finally:
            exchange.close()

    async def _endpoints(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await self._callers.admit(ENVOY, context)
        async for response in self._discovery.stream(requests, context):
            yield response

    async def _log(self, messages: AsyncIterator[Any], context: Any) -> Any:
        await self._callers.admit(ENVOY, context)
        async for message in messages:
            access_log.take(self._desk, message)
        return als.StreamAccessLogsResponse()


def _handler(service: str, method: str, behaviour: Any, request: Any, response: Any) -> Any:
    return grpc.method_handlers_generic_handler(
        service,
        {method: grpc.stream_stream_rpc_method_handler(behaviour, request.FromString, response.SerializeToString)},
    )
