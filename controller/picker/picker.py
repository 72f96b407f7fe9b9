"""The gRPC side of the gateway as one thing: what it shares, its server, its upkeep. gateway/daemon.py starts it."""

from __future__ import annotations

import asyncio

from controller.fleet.port import RoutingTable
from controller.gateway.access import Access
from controller.gateway.brain import Brain
from controller.gateway.config import LimitsConfig, PickerConfig
from controller.picker.addresses import Addresses
from controller.picker.discovery import Discovery
from controller.picker.exchange import Desk
from controller.picker.held import Held
from controller.picker.server import PickerServer


class Picker:
    """Single event loop. `start`, then `publish` until cancelled; `sweep` now and then; `stop`."""

    def __init__(
        self, brain: Brain, limits: LimitsConfig, config: PickerConfig, access: Access, tenant_header: str
    ) -> None:
        addresses = Addresses()
        self.held = Held(brain, config.forget_s)
        self._discovery = Discovery(addresses)
        self._tls = config.tls
        self._server = PickerServer(
            Desk(brain, self.held, addresses, limits, config, access, tenant_header), self._discovery
        )
        self._newest: RoutingTable | None = None
        self._news = asyncio.Event()

    @property
    def port(self) -> int:
        return self._server.port

    async def start(self, listen: str) -> None:
        await self._server.start(listen, self._tls)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    def update_routing(self, table: RoutingTable) -> None:
        """The brain has it already; this tells the Envoys."""
        self._newest = table
        self._news.set()

    async def publish(self) -> None:
        """Resolves and publishes each table, skipping those that are old by then."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._newest is not None:
                await self._discovery.update(self._newest)

    def sweep(self) -> None:
        self.held.sweep()
