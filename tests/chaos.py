"""Load against a gateway while its engines drain, die and are re-sharded at random, and the rule it is held to: every
request gets exactly one complete answer or one clear error, none hangs, and no answer that had begun is begun again."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import httpx

from controller.domain.classes import by_input
from controller.fleet.port import RoutedInstance, RoutedPool, RoutingTable
from tests.gateway_stand_ins import MODEL, Engine, StandInController

ALL = by_input("all", "SML")
TOKENS = 20
TOKEN_S = 0.01
# No request of this size takes longer, whatever happens to its instance.
PATIENCE_S = 30.0


@dataclass
class Fleet:
    """Engines by instance id; those that have left serve on until they are stopped."""

    controller: StandInController
    draw: random.Random
    engines: dict[str, Engine] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    left: list[Engine] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    version: int = 1
    started: int = 0

    async def start(self, tp: int = 4) -> None:
        engine = Engine(token_s=TOKEN_S)
        await engine.start()
        self.started += 1
        self.engines[f"e{self.started}-tp{tp}"] = engine
        self.publish()

    def publish(self) -> None:
        self.version += 1
        instances = tuple(
            RoutedInstance(name, engine.endpoint, int(name.rpartition("tp")[2]), 16, 1.0, name not in self.draining)
            for name, engine in self.engines.items()
        )
        pool = RoutedPool(ALL.name, MODEL, ALL.classes, instances)
        self.controller.publish(RoutingTable(1, self.version, (pool,)))

    async def disturb(self) -> None:
        """One random event; at least two instances are left that take new requests."""
        await asyncio.sleep(self.draw.uniform(0.1, 0.6))
        name = self.draw.choice([each for each in self.engines if each not in self.draining])
        event = self.draw.choice(("kill", "drain", "reshard"))
        self.done[event] += 1
        if event == "kill":
            # As in life: it dies first, and the controller hears of it later.
            self.left.append(engine := self.engines[name])
            await engine.kill()
            await self.start()
            await asyncio.sleep(0.2)
            del self.engines[name]
        elif event == "drain":
            await self.start()
            await self._drain(name)
        else:
            for _ in range(2):  # a TP4 becomes two TP2
                await self.start(tp=2)
            await self._drain(name)
            pairs = [each for each in self.engines if each.endswith("tp2") and each not in self.draining]
            if len(pairs) > 4:
                await self.start()
                for each in pairs[:2]:
                    await self._drain(each)
        self.publish()

    async def _drain(self, name: str) -> None:
        """New requests elsewhere, wait for the last answer, stop."""
        self.draining.add(name)
        self.publish()
        await asyncio.sleep(0.1)  # the table is on its way
        while self.engines[name].running:  # noqa: ASYNC110 - polled, as an agent polls its engine
            await asyncio.sleep(0.01)
        self.left.append(engine := self.engines.pop(name))
        self.draining.discard(name)
        self.publish()
        await engine.stop()

    async def stop(self) -> None:
        for engine in (*self.engines.values(), *self.left):
            await engine.kill()


@dataclass
class Verdicts:
    """What became of the requests; `wrong` says what broke the rule."""

    counted: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, number: int, stream: bool, verdicts: Verdicts) -> None:
    body = {"model": MODEL, "prompt": f"request {number}", "max_tokens": TOKENS, "stream": stream}
    try:
        async with asyncio.timeout(PATIENCE_S):
            answer = await client.post("/v1/completions", json=body)
    except TimeoutError:
        verdicts.wrong.append(f"request {number} hung")
        return
    except httpx.RemoteProtocolError:
        # A stream cut short in the open: the client knows (Envoy has no other way once the head is out).
        verdicts.counted["broken off"] += 1
        return
    if answer.status_code != 200:
        verdicts.counted[f"status {answer.status_code}"] += 1
        told = answer.headers.get("content-type") == "application/json" and bool(answer.json()["error"]["message"])
        if answer.status_code not in (429, 502, 503) or "retry-after" not in answer.headers or not told:
            verdicts.wrong.append(f"request {number}: {answer.status_code} {answer.headers} {answer.text[:100]}")
        return
    if not stream:
        complete = answer.json()["choices"][0]["text"] == "x" * TOKENS
        verdicts.counted["whole"] += 1
    else:
        events = [line for line in answer.text.split("\n\n") if line]
        if '"engine_failed"' in events[-1]:
            verdicts.counted["error event"] += 1
            return
        verdicts.counted["streamed"] += 1
        texts = [f'"text":"w{number} "' in event for number, event in enumerate(events[:-1])]
        complete = len(texts) == TOKENS and all(texts) and events[-1] == "data: [DONE]"
    if not complete:
        verdicts.wrong.append(f"request {number}: not the whole answer once: {answer.text[:200]}")


async def chaos(url: str, fleet: Fleet, seconds: float, in_parallel: int = 8) -> Verdicts:
    """Asks from `in_parallel` clients for so long."""
    verdicts, loop = Verdicts(), asyncio.get_running_loop()
    ends_s, numbers = loop.time() + seconds, iter(range(1_000_000))

    async def client(mine: httpx.AsyncClient) -> None:
        while loop.time() < ends_s:
            number = next(numbers)
            await ask(mine, number, number % 3 != 0, verdicts)

    async def disturbances() -> None:
        while loop.time() < ends_s:
            await fleet.disturb()

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S * 2) as mine:
        disturbing = asyncio.create_task(disturbances())
        await asyncio.gather(*(client(mine) for _ in range(in_parallel)))
        await disturbing
    begun = Counter(
        str(body["prompt"]) for engine in (*fleet.engines.values(), *fleet.left) for body in engine.answered
    )
    verdicts.wrong += [f"{prompt}: answered {times} times" for prompt, times in begun.items() if times > 1]
    return verdicts
