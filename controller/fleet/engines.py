"""Which engines run: asks each once for its version, and compares it with the one that the profile was measured on.

Beside the loop; what it finds goes to the core as an order. A profile tells its engine as `vllm VERSION, ...`; one of
another form (the twin's) names no engine that could be asked, and nothing is compared.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import httpx

from controller.profile.table import ENGINE

ASK_TIMEOUT_S = 2.0

Ask = Callable[[str], Awaitable[str | None]]


async def engine_version(endpoint: str) -> str | None:
    """Of an engine that speaks vLLM's HTTP API; None when it does not say."""
    try:
        async with httpx.AsyncClient(timeout=ASK_TIMEOUT_S) as client:
            answer = await client.get(f"{endpoint}/version")
            version = answer.raise_for_status().json().get("version")
    except (httpx.HTTPError, ValueError, AttributeError):
        return None
    return version if isinstance(version, str) else None


@dataclass(slots=True)
class EngineWatch:
    """`profile_engine` is the profile's fingerprint."""

    profile_engine: str
    ask: Ask = engine_version
    _versions: dict[str, str] = field(default_factory=dict)  # by instance

    @property
    def expected(self) -> str | None:
        """The version that was measured; None when the profile names none."""
        head = self.profile_engine.split(",")[0].strip()
        return head.removeprefix(ENGINE) if head.startswith(ENGINE) else None

    async def look(self, endpoints: Mapping[str, str]) -> tuple[str, ...]:
        """Engines other than the expected one among the instances (id -> endpoint), sorted. Silence says nothing."""
        if self.expected is None:
            return ()
        self._versions = {name: version for name, version in self._versions.items() if name in endpoints}
        for name, endpoint in sorted(endpoints.items()):
            if name not in self._versions and (version := await self.ask(endpoint)) is not None:
                self._versions[name] = version
        return tuple(sorted({f"{ENGINE}{v}" for v in self._versions.values() if v != self.expected}))
