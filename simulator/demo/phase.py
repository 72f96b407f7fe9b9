"""One fleet under the load: starts its processes, waits for the planned layout, lets the client send, ends all of it.

Parts of the baseline carry a prefix in the supervisor, because both fleets may run at the same time.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from common.clock import Clock
from common.errors import EXIT_UNAVAILABLE, UserError
from controller.domain.slo import Slo
from simulator.demo.client import Job, read_results
from simulator.demo.figures import PhaseFigures, control_figures, load_figures, missed
from simulator.demo.fleet import GPUS_PER_HOST, HOSTS, MODEL, Fleet
from simulator.demo.load import Load
from simulator.demo.supervisor import Supervisor, end_descendants, last_line
from simulator.demo.watch import FleetWatch, summarise
from simulator.host.nvml.state import STATE_VARIABLE

READY_TIMEOUT_S = 60.0
SETTLED_FOR_S = 0.5
TIMELINE_STEPS = 12


@dataclass
class Progress:
    """What the client last said."""

    sent: int = 0
    in_flight: int = 0
    served: int = 0
    judged: int = 0
    in_slo: int = 0


@dataclass
class Phase:
    """`fleet` under `load`. Call `start`, `wait_ready`, `serve`, `stop` in this order; then `figures`."""

    fleet: Fleet
    load: Load
    supervisor: Supervisor
    clock: Clock
    prefix: str = ""
    progress: Progress = field(default_factory=Progress)
    started_s: float | None = None  # of the load, monotonic
    all_sent: asyncio.Event = field(default_factory=asyncio.Event)  # the window has closed
    under_way: bool = False

    def __post_init__(self) -> None:
        self.watch = FleetWatch(self.fleet.agents, self.clock)

    async def start(self) -> None:
        self.under_way = True
        for part in self.fleet.parts:
            await self.supervisor.start(replace(part, name=self.prefix + part.name))
        self.watch.start()

    async def wait_ready(self) -> None:
        """Until the first plan stands: every instance of it is ready and the gateway routes to all of them."""
        settled_s: float | None = None
        give_up_s = self.clock.monotonic_s() + READY_TIMEOUT_S
        async with httpx.AsyncClient() as http:
            while True:
                self.supervisor.check()
                now_s = self.clock.monotonic_s()
                if not (self.watch.settled() and await self._routed(http) == self.watch.ready().total()):
                    settled_s = None
                elif settled_s is None:
                    settled_s = now_s
                elif now_s - settled_s >= SETTLED_FOR_S:
                    return
                if now_s > give_up_s:
                    raise UserError(
                        f"{self.fleet.name}: no complete layout within {READY_TIMEOUT_S:.0f} s.",
                        f"See the logs in {self.fleet.folder / 'logs'}.",
                        EXIT_UNAVAILABLE,
                    )
                await asyncio.sleep(0.1)

    async def _routed(self, http: httpx.AsyncClient) -> int:
        """Instances that the gateway sends to; -1 as long as it does not answer."""
        with suppress(httpx.HTTPError, ValueError, KeyError):
            return int((await http.get(f"{self.fleet.gateway}/health", timeout=2.0)).json()["instances"])
        return -1

    async def serve(self) -> None:
        """Sends the load from a process of its own and waits until the last request has ended."""
        job_file, log = self.fleet.folder / "load.json", self.fleet.folder / "logs" / "client.log"
        Job(self.fleet.gateway, MODEL, self.load.arrivals, str(self._results)).write(job_file)
        with log.open("wb") as errors:
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "simulator.demo.client", str(job_file)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        try:
            assert client.stdout is not None
            while line := await client.stdout.readline():
                self._take(json.loads(line))
                self.supervisor.check()
            if await client.wait() != 0:
                raise UserError(f"{self.fleet.name}: the load generator failed: {last_line(log)}", f"Its log: {log}")
        finally:
            self.all_sent.set()
            if client.returncode is None:
                client.terminate()
                await client.wait()

    @property
    def _results(self) -> Path:
        return self.fleet.folder / "requests.jsonl"

    def _take(self, said: dict[str, Any]) -> None:
        if "started_s" in said:
            self.started_s = said["started_s"]
            return
        served = said["ended"].get("served", 0)
        self.progress = Progress(said["sent"], said["in_flight"], served, said["judged"], said["in_slo"])
        if said["sent"] == len(self.load.arrivals):
            self.all_sent.set()

    async def stop(self) -> None:
        """Ends every process of this fleet, engines included: gateway first, so that nothing is asked of the rest."""
        self.under_way = False
        names = [self.prefix + part.name for part in reversed(self.fleet.parts)]
        await self.watch.close()
        for name in names[:2]:  # the gateway, then the controller
            await self.supervisor.stop(name)
        await asyncio.gather(*(self.supervisor.stop(name) for name in names[2:]))
        for host in self.fleet.hosts:
            await asyncio.to_thread(end_descendants, {STATE_VARIABLE: str(host.gpus)})

    def figures(self, slo: Slo) -> PhaseFigures:
        """After `stop`."""
        assert self.started_s is not None
        open_s, close_s = self.started_s + self.load.window_open_s, self.started_s + self.load.window_close_s
        requests = load_figures(read_results(self._results), self.load, slo)
        names = [self.prefix + part.name for part in self.fleet.parts]
        return PhaseFigures(
            name=self.fleet.name,
            load=requests,
            energy=summarise(self.watch.entries, open_s, close_s, HOSTS * GPUS_PER_HOST),
            control=control_figures(self.fleet.database),
            timeline=self.watch.timeline(open_s, close_s, TIMELINE_STEPS),
            restarts={name: self.supervisor.restarts[name] for name in names},
            slo_missed=missed(requests, slo),
            database=self.fleet.database,
        )
