"""Endpoint discovery for Envoy: the engines of the routing table as a cluster.

Two uses: only listed endpoints can be picked (`override_host`), and with the picker gone Envoy chooses among them by
itself (fail open). A cluster called `dynamollm` lists every engine, one called like a model that model's. Engines that
drain are listed as such: running requests end there, Envoy sends nothing new of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from envoy.config.core.v3 import health_check_pb2 as health
from envoy.config.endpoint.v3 import endpoint_pb2 as endpoint
from envoy.service.discovery.v3 import discovery_pb2 as discovery

from common.logs import get_logger
from controller.fleet.port import RoutingTable
from controller.picker.addresses import Addresses

_log = get_logger(__name__)
ALL = "dynamollm"
TYPE_URL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class Discovery:
    """Holds the newest table. Before the first one nothing is said, so that Envoy keeps what it knows."""

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self._table: RoutingTable | None = None
        self._version = 0
        self._changed = asyncio.Event()

    async def update(self, table: RoutingTable) -> None:
        """Resolves the table's endpoints and tells every Envoy."""
        await self._addresses.resolve(each.endpoint for pool in table.pools for each in pool.instances)
        self._table = table
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def stream(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        """EndpointDiscoveryService.StreamEndpoints, state of the world."""
        names: list[str] = []
        news = asyncio.Event()

        async def read() -> None:
            async for request in requests:
                if request.HasField("error_detail"):
                    _log.error("endpoints_refused", reason=request.error_detail.message)
                wanted = list(request.resource_names)
                if wanted != names:
                    names[:] = wanted
                    news.set()

        reading = asyncio.create_task(read())
        sent: tuple[int, tuple[str, ...]] | None = None
        try:
            while not reading.done():
                changed = self._changed
                if names and self._table is not None and sent != (self._version, tuple(names)):
                    sent = (self._version, tuple(names))
                    news.clear()
                    yield self._response(self._table, names)
                    continue
                waits = [reading, asyncio.create_task(changed.wait()), asyncio.create_task(news.wait())]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in waits[1:]:
                    task.cancel()
                news.clear()
        finally:
            reading.cancel()

    def _response(self, table: RoutingTable, names: list[str]) -> Any:
        response = discovery.DiscoveryResponse(
            version_info=str(self._version), nonce=str(self._version), type_url=TYPE_URL
        )
        for name in names:
            response.resources.add().Pack(self.assignment(table, name))
        return response

    def assignment(self, table: RoutingTable, name: str) -> Any:
        """The engines of one cluster, each address once."""
        result = endpoint.ClusterLoadAssignment(cluster_name=name)
        locality = result.endpoints.add()
        seen: set[str] = set()
        for pool in table.pools:
            if name not in (ALL, pool.model):
                continue
            for instance in pool.instances:
                address = self._addresses.of(instance.endpoint)
                if address is None or address in seen:
                    continue
                seen.add(address)
                host, _, port = address.rpartition(":")
                added = locality.lb_endpoints.add()
                added.health_status = health.HEALTHY if instance.accepts_new else health.DRAINING
                added.endpoint.address.socket_address.address = host.strip("[]")
                added.endpoint.address.socket_address.port_value = int(port)
        return result
