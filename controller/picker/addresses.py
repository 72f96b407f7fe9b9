"""Engines' endpoints (`http://HOST:PORT`) as the IP:PORT that Envoy needs, and back.

Literal addresses need no look-up; names are resolved off the event loop when the routing table brings them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable

from common.http1 import split_endpoint
from common.logs import get_logger

_log = get_logger(__name__)


def join(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class Addresses:
    """What is known of each endpoint; `of` is None for one that is not resolved (yet)."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, endpoint: str) -> str | None:
        known = self._known.get(endpoint)
        if known is None and (known := _literal(endpoint)) is not None:
            self._known[endpoint] = known
        return known

    async def resolve(self, endpoints: Iterable[str]) -> None:
        """Looks up what is not known; keeps only these."""
        wanted = set(endpoints)
        self._known = {endpoint: address for endpoint, address in self._known.items() if endpoint in wanted}
        for endpoint in sorted(wanted):
            if self.of(endpoint) is None:
                await self._look_up(endpoint)

    async def _look_up(self, endpoint: str) -> None:
        try:
            host, port = split_endpoint(endpoint)
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            _log.warning("endpoint_without_address", endpoint=endpoint, reason=str(error))
            return
        self._known[endpoint] = join(str(found[0][4][0]), port)


def _literal(endpoint: str) -> str | None:
    try:
        host, port = split_endpoint(endpoint)
        return join(str(ipaddress.ip_address(host)), port)
    except ValueError:
        return None
