"""The engine instances of this node, as requests see them: start, drain, stop, restart, sleep, wake, look.

Requests come from service.py and return at once; steps.py carries the instance on. Here too: the watch over their
processes, and taking over what an earlier agent left.
"""

from __future__ import annotations

import asyncio

from common.clock import Clock
from common.logs import get_logger
from nodeagent.config import NodeAgentConfig
from nodeagent.engine import pids, reshard
from nodeagent.engine.book import Book, owners
from nodeagent.engine.command import check_spec
from nodeagent.engine.feed import InstanceView
from nodeagent.engine.launcher import Launcher
from nodeagent.engine.lifecycle import ANSWERING, ENDED, RUNNING, Event, State
from nodeagent.engine.nap import Naps, is_falling
from nodeagent.engine.proof import occupied
from nodeagent.engine.records import Nap, NapPhase, Record, Records, Spec
from nodeagent.engine.steps import ANSWER_TIMEOUT_S, Steps
from nodeagent.engine.vllm import EngineSilent, VllmClient
from nodeagent.errors import AlreadyExists, Invalid, NotFound, Precondition
from nodeagent.gpu.driver import GpuHealth
from nodeagent.gpu.inventory import Inventory
from nodeagent.telemetry.metrics import AgentMetrics
from nodeagent.telemetry.sample import InstanceSample

log = get_logger(__name__)

MAX_DRAIN_S = 86_400.0


class Instances:
    """All instances, ended ones included. For the event loop's thread."""

    def __init__(
        self,
        inventory: Inventory,
        launcher: Launcher,
        client: VllmClient,
        records: Records,
        clock: Clock,
        boot_id: str,
        config: NodeAgentConfig,
        metrics: AgentMetrics,
    ) -> None:
        self._book = Book(records, clock, config, metrics)
        self.feed = self._book.feed
        self._naps = Naps(self._book, inventory, client, launcher)
        self._steps = Steps(self._book, inventory, launcher, client, self._naps, boot_id)
        self._inventory = inventory
        self._launcher = launcher
        self._client = client
        self._boot_id = boot_id
        self._config = config.engine
        self._claiming = asyncio.Lock()
        """Held while GPUs are checked and taken: two requests must not both find the same ones free."""
        self.last_beat_s = clock.monotonic_s()
        """When the processes were last looked at; the watchdog looks at it."""

    # Requests

    async def start(self, spec: Spec, reason: str, held_by: str = "") -> InstanceView:
        """Launches an instance; the same spec again returns what is there. Raises Refused."""
        check_spec(spec)
        async with self._claiming:
            known = self._book.get(spec.instance_id)
            if known is not None and known.state not in ENDED:
                if known.spec == spec:
                    return self._book.view(known)
                raise AlreadyExists(f"{spec.instance_id!r} is {known.state.value} with another specification")
            await self._require_free(spec.gpu_uuids, None)
            blank = Record(
                spec,
                State.STARTING,
                reason or "starting",
                self._boot_id,
                "",
                0,
                "",
                self._book.now_s(),
                held_by=held_by,
            )
            self._book.put_first(self._steps.fresh(blank))
            log.info("instance starts", instance=spec.instance_id, model=spec.model, reason=reason)
            await self._steps.launch(spec.instance_id)
            self._steps.carry(spec.instance_id)
        return self._view(spec.instance_id)

    def drain(self, instance_id: str, reason: str, held_by: str = "") -> InstanceView:
        """Begins a drain; one that is under way or done is left alone. Raises Refused."""
        record = self._book.known(instance_id)
        if record.state is State.READY:
            log.info("instance drains", instance=instance_id, reason=reason)
            self._book.move(instance_id, Event.DRAIN, reason or "draining", held_by=held_by)
            self._steps.carry(instance_id)
        elif record.state is not State.DRAINING:
            hint = "; it serves nothing, so stop it instead" if record.state in RUNNING else ""
            raise Precondition(f"{instance_id!r} is {record.state.value}{hint}")
        return self._view(instance_id)

    async def stop(self, instance_id: str, force: bool, reason: str, held_by: str = "") -> InstanceView:
        """Begins to stop a drained instance, or with `force` any; ends a restart. Raises Refused."""
        record = self._book.known(instance_id)
        if record.state in (State.READY, State.DRAINING) and not force:
            await self._require_drained(record)
            record = self._book.known(instance_id)
        if record.state in ENDED:
            return self._view(instance_id)
        if record.restart is not None:
            log.info("restart given up", instance=instance_id, restart=record.restart.transaction_id, reason=reason)
            self._book.put(record.but(restart=None, detail=reason or "stopping"))
        if record.state is not State.STOPPING:
            log.info("instance stops", instance=instance_id, reason=reason, force=force)
            self._book.move(instance_id, Event.STOP, reason or "stopping", held_by=held_by)
            self._steps.carry(instance_id)
        return self._view(instance_id)

    async def restart(
        self, instance_id: str, gpu_uuids: tuple[str, ...], drain_deadline_s: float, reason: str, held_by: str = ""
    ) -> tuple[InstanceView, str]:
        """Begins a restart on these GPUs; the same again returns what is under way. Returns its transaction's id too.

        Raises Refused; nothing is changed then.
        """
        if not 0 <= drain_deadline_s <= MAX_DRAIN_S:
            raise Invalid(f"drain_deadline_s is {drain_deadline_s:g}; it must be 0 to {MAX_DRAIN_S:g}")
        async with self._claiming:
            record = self._book.known(instance_id)
            if record.restart is not None:
                under_way = record.restart
                if under_way.new_gpus == gpu_uuids:
                    return self._view(instance_id), under_way.transaction_id
                raise Precondition(f"{instance_id!r} is in restart {under_way.transaction_id} with other GPUs")
            drain_s = drain_deadline_s or self._config.drain_deadline_s
            restart = reshard.begun(record, gpu_uuids, self._book.now_s(), drain_s)
            added = [gpu for gpu in gpu_uuids if gpu not in record.gpus]
            await self._require_free(added, record)
            for gpu in gpu_uuids:
                if gpu not in added:
                    self._require_usable(gpu)
            if self._book.known(instance_id) is not record:
                raise Precondition(f"{instance_id!r} changed meanwhile; look at it and ask again")
            detail = f"restart {restart.transaction_id}: draining; {reason}"
            begun = (
                self._book.moved(instance_id, Event.DRAIN, detail)
                if record.state is State.READY
                else record.but(detail=detail)
            )
            self._book.put_first(begun.but(restart=restart, held_by=held_by))
            log.info(
                "restart begins",
                instance=instance_id,
                restart=restart.transaction_id,
                old=restart.old_gpus,
                new=gpu_uuids,
                reason=reason,
            )
            self._steps.read_ahead(record)
            self._steps.carry(instance_id)
        return self._view(instance_id), restart.transaction_id

    async def sleep(self, instance_id: str, reason: str, held_by: str = "") -> InstanceView:
        """Begins to put a drained instance to sleep; one that sleeps is left alone. Raises Refused."""
        async with self._claiming:
            record = self._book.known(instance_id)
            if record.state is State.ASLEEP or is_falling(record):
                return self._book.view(record)
            if record.state not in (State.READY, State.DRAINING) or record.restart is not None:
                what = record.state.value if record.restart is None else "being restarted"
                raise Precondition(f"{instance_id!r} is {what}; only a drained instance is put to sleep")
            await self._require_drained(record)
            record = self._book.known(instance_id)
            nap = await self._naps.prepare_sleep(record)
            if self._book.known(instance_id) is not record:
                raise Precondition(f"{instance_id!r} changed meanwhile; look at it and ask again")
            self._book.put_first(record.but(nap=nap, held_by=held_by, detail=f"falling asleep; {reason}"))
            log.info("instance goes to sleep", instance=instance_id, reason=reason)
            self._steps.carry(instance_id)
        return self._view(instance_id)

    async def wake(self, instance_id: str, reason: str, held_by: str = "") -> InstanceView:
        """Begins to wake an instance up; one that is awake is left alone. Raises Refused."""
        async with self._claiming:
            record = self._book.known(instance_id)
            if record.state is State.READY or (record.state is State.WARMING and record.nap is not None):
                return self._book.view(record)
            if record.state is not State.ASLEEP or record.nap is None:
                raise Precondition(f"{instance_id!r} is {record.state.value}; only one that sleeps can be woken up")
            await self._naps.check_wake(record)
            if self._book.known(instance_id) is not record:
                raise Precondition(f"{instance_id!r} changed meanwhile; look at it and ask again")
            waking = record.nap.but(phase=NapPhase.WAKING)
            detail = f"waking up; {reason}"
            woken = self._book.moved(instance_id, Event.WAKE, detail, nap=waking, drained=False, held_by=held_by)
            self._book.put_first(woken)
            log.info("instance wakes up", instance=instance_id, reason=reason)
            self._steps.carry(instance_id)
        return self._view(instance_id)

    def views(self) -> list[InstanceView]:
        """Every instance, oldest first."""
        return [self._book.view(record) for record in self._book.all()]

    async def scrape(self, timeout_s: float) -> tuple[InstanceSample, ...]:
        """Engine metrics of every instance that has not ended."""

        async def one(record: Record) -> InstanceSample:
            reading = None
            if record.state in ANSWERING:
                try:
                    reading = await self._client.scrape(self._book.url(record), timeout_s)
                except EngineSilent as error:
                    log.debug("engine does not answer", instance=record.spec.instance_id, why=str(error))
            return InstanceSample(record.spec.instance_id, self._book[record.spec.instance_id].state, reading)

        return tuple(await asyncio.gather(*(one(record) for record in self._book.alive())))

    # Over the agent's life

    async def adopt(self) -> None:
        """Takes over what an earlier agent left: engines that still run go on, the others are cleaned up."""
        found = self._book.load_all()
        for record in found:  # all of them first: what one may do depends on who else is on its GPUs
            self._book.know(record)
        await asyncio.gather(*(self._adopt(record) for record in found))
        self._book.prune()

    async def run(self) -> None:
        """Notices within a poll interval when a process died."""
        while True:
            self.last_beat_s = self._book.now_s()
            for record in self._book.alive():
                if record.state in RUNNING and (text := await self._loss(record)):
                    current = self._book.get(record.spec.instance_id)
                    if current is not None and current.process == record.process and current.state in RUNNING:
                        self._steps.fail(record.spec.instance_id, text)
            await asyncio.sleep(self._config.poll_interval_s)

    async def close(self) -> None:
        """Lets go of all instances; they run on, and the next agent takes them over."""
        self._steps.close()
        await self._book.close()
        await self._launcher.close()

    async def _loss(self, record: Record) -> str:
        """What an instance has lost, empty if nothing. Without one of its workers an engine can do nothing."""
        if record.process is None:
            return ""
        if not self._launcher.alive(record.process):
            return await self._steps.died(record)
        for worker in record.workers:
            if not pids.lives(worker):
                return f"its worker with pid {worker.pid} ended, one of {len(record.workers)}"
        return ""

    async def _adopt(self, record: Record) -> None:
        instance_id = record.spec.instance_id
        if record.boot_id != self._boot_id:
            gone = "the machine rebooted"
            record = record.but(
                boot_id=self._boot_id, process=None, workers=(), restart=None, nap=None, since_s=self._book.now_s()
            )
        else:
            gone = "its launch was interrupted" if record.process is None else "it ended while no agent ran"
            if record.process is None and record.state not in ENDED:
                record = record.but(process=await self._launcher.find(instance_id, record.token))
        self._book.know(record)
        alive = record.process is not None and self._launcher.alive(record.process)
        log.info("instance found", instance=instance_id, state=record.state.value, alive=alive)
        to_launch = record.restart is not None and record.state is State.STARTING and record.process is None
        if record.state in RUNNING and not alive and not to_launch:
            self._steps.fail(instance_id, gone)
        elif record.state is State.ASLEEP or is_falling(record):
            await self._adopt_sleeper(record)
        elif record.state is State.READY:
            if not await self._client.healthy(self._book.url(record), ANSWER_TIMEOUT_S):
                self._book.move(instance_id, Event.SILENT, "found again, does not answer yet")
                self._steps.carry(instance_id)
        elif record.state not in ENDED:
            self._steps.carry(instance_id)

    async def _adopt_sleeper(self, record: Record) -> None:
        """It may have fallen asleep, or been woken up by hand, while no agent ran."""
        instance_id = record.spec.instance_id
        try:
            asleep = await self._client.sleeping(self._book.url(record), ANSWER_TIMEOUT_S)
        except EngineSilent as error:
            return self._steps.fail(instance_id, f"cannot tell whether it sleeps: {error}")
        if asleep and record.state is State.ASLEEP:
            return None
        if record.state is State.ASLEEP:
            nap: Nap | None = None if record.nap is None else record.nap.but(phase=NapPhase.WAKING)
            self._book.move(instance_id, Event.WAKE, "found awake although it was put to sleep", nap=nap, drained=False)
        elif not asleep:
            self._book.put(record.but(nap=None, detail="drained; not put to sleep: the agent was restarted"))
        return self._steps.carry(instance_id)

    # Small questions

    def _view(self, instance_id: str) -> InstanceView:
        return self._book.view(self._book[instance_id])

    async def _require_free(self, gpus: tuple[str, ...] | list[str], own: Record | None) -> None:
        owner = owners(self._book)
        for gpu in gpus:
            self._require_usable(gpu)
            if gpu in owner:
                held = owner[gpu]
                raise Precondition(f"{gpu} belongs to instance {held.spec.instance_id!r}, which is {held.state.value}")
        neighbours = self._steps.neighbours(own, gpus)
        if found := await occupied(self._inventory, neighbours, self._config.gpu_free_memory_mib):
            raise Precondition(found.text)
        for gpu in gpus:
            await self._naps.check_start_beside(gpu)

    def _require_usable(self, gpu: str) -> None:
        worker = self._inventory.find(gpu)
        if worker is None:
            raise NotFound(f"no GPU {gpu} on this node")
        if worker.health is not GpuHealth.OK:
            raise Precondition(f"{gpu} is {worker.health.value}: {worker.detail}")
        if worker.facts is not None and worker.facts.mig_enabled:
            raise Precondition(f"{gpu} has MIG on; engines are started on whole GPUs only")

    async def _require_drained(self, record: Record) -> None:
        name = record.spec.instance_id
        if not record.drained:
            raise Precondition(f"{name!r} is {record.state.value} and not drained; drain it first, or use force")
        try:
            reading = await self._client.scrape(self._book.url(record), ANSWER_TIMEOUT_S)
        except EngineSilent as error:
            raise Precondition(f"nobody can tell what {name!r} still serves ({error}); use force") from None
        if not reading.idle and self._book[name].state is State.DRAINING:
            text = f"got new work after its drain ({reading.running:g} running); draining again"
            steps = {step: seconds for step, seconds in record.step_s.items() if step != "drain"}
            self._book.put(self._book[name].but(drained=False, detail=text, step_s=steps))
            self._steps.carry(name)
            raise Precondition(f"{name!r} {text}")
