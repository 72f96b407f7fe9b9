"""The engine instances of this node: starts, drains and stops them, watches them, and takes them over after a restart.

Requests come from service.py and return at once; each instance has at most one task that carries it to its next
stable state. Every change goes through the table in lifecycle.py, to disk, and to the readers of the feed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from pathlib import Path

from common.clock import Clock
from common.logs import get_logger
from nodeagent.config import NodeAgentConfig
from nodeagent.engine.command import check_spec, command_line, free_port
from nodeagent.engine.feed import InstanceFeed, InstanceView
from nodeagent.engine.launcher import Launch, Launcher, LaunchFailed
from nodeagent.engine.lifecycle import ANSWERING, ENDED, RUNNING, Event, State, follow
from nodeagent.engine.process import last_line
from nodeagent.engine.proof import occupied
from nodeagent.engine.records import Record, Records, Spec
from nodeagent.engine.vllm import EngineSilent, VllmClient
from nodeagent.errors import AlreadyExists, NotFound, Precondition, Unavailable
from nodeagent.gpu.driver import GpuHealth
from nodeagent.gpu.inventory import Inventory
from nodeagent.telemetry.metrics import AgentMetrics
from nodeagent.telemetry.sample import InstanceSample

log = get_logger(__name__)

HEALTH_PAUSE_S = 0.2
ANSWER_TIMEOUT_S = 2.0
"""How long a health check or a scrape for a drain may take."""
FREE_PAUSE_S = 0.1
QUARANTINE_PAUSE_S = 2.0


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
        self.feed = InstanceFeed()
        self._inventory = inventory
        self._launcher = launcher
        self._client = client
        self._files = records
        self._clock = clock
        self._boot_id = boot_id
        self._config = config.engine
        self._log_dir = config.engine_log_dir
        self._metrics = metrics
        self._records: dict[str, Record] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._starting = asyncio.Lock()
        self.last_beat_s = clock.monotonic_s()
        """When the processes were last looked at; the watchdog looks at it."""

    # Requests

    async def start(self, spec: Spec, reason: str) -> InstanceView:
        """Launches an instance; the same spec again returns what is there. Raises Refused."""
        check_spec(spec)
        async with self._starting:
            known = self._records.get(spec.instance_id)
            if known is not None and known.state not in ENDED:
                if known.spec == spec:
                    return self._view(known)
                raise AlreadyExists(f"{spec.instance_id!r} is {known.state.value} with another specification")
            await self._require_free(spec)
            record = Record(
                spec=spec,
                state=State.STARTING,
                detail=reason or "starting",
                boot_id=self._boot_id,
                token=uuid.uuid4().hex,
                port=free_port(self._ports_in_use(), self._config),
                log_path=str(self._log_dir / f"{spec.instance_id}.log"),
                since_s=self._clock.monotonic_s(),
            )
            try:
                self._files.save(record)
            except OSError as error:
                text = f"the instance record cannot be written: {error.strerror or error}; nothing was launched"
                raise Unavailable(text) from None
            log.info("instance starts", instance=spec.instance_id, model=spec.model, reason=reason)
            self._store(record, save=False)
            try:
                process = self._launcher.start(self._launch(record))
            except LaunchFailed as error:
                self._fail(spec.instance_id, str(error))
            else:
                self._store(record.but(process=process))
                self._begin(spec.instance_id, self._bring_up(spec.instance_id))
        return self._view(self._records[spec.instance_id])

    def drain(self, instance_id: str, reason: str) -> InstanceView:
        """Begins a drain; one that is under way or done is left alone. Raises Refused."""
        record = self._get(instance_id)
        if record.state is State.READY:
            log.info("instance drains", instance=instance_id, reason=reason)
            self._move(instance_id, Event.DRAIN, reason or "draining")
            self._begin(instance_id, self._drain(instance_id))
        elif record.state is not State.DRAINING:
            hint = "; it serves nothing, so stop it instead" if record.state in RUNNING else ""
            raise Precondition(f"{instance_id!r} is {record.state.value}{hint}")
        return self._view(self._records[instance_id])

    async def stop(self, instance_id: str, force: bool, reason: str) -> InstanceView:
        """Begins to stop a drained instance, or with `force` any. Raises Refused."""
        record = self._get(instance_id)
        if record.state in (State.READY, State.DRAINING) and not force:
            await self._require_drained(record)
            record = self._get(instance_id)
        if record.state is not State.STOPPING and record.state not in ENDED:
            log.info("instance stops", instance=instance_id, reason=reason, force=force)
            self._move(instance_id, Event.STOP, reason or "stopping")
            self._begin(instance_id, self._take_down(instance_id))
        return self._view(self._records[instance_id])

    def views(self) -> list[InstanceView]:
        """Every instance, oldest first."""
        return [self._view(record) for record in self._records.values()]

    async def scrape(self, timeout_s: float) -> tuple[InstanceSample, ...]:
        """Engine metrics of every instance that has not ended."""

        async def one(record: Record) -> InstanceSample:
            reading = None
            if record.state in ANSWERING:
                try:
                    reading = await self._client.scrape(self._url(record), timeout_s)
                except EngineSilent as error:
                    log.debug("engine does not answer", instance=record.spec.instance_id, why=str(error))
            return InstanceSample(record.spec.instance_id, self._records[record.spec.instance_id].state, reading)

        return tuple(await asyncio.gather(*(one(r) for r in list(self._records.values()) if r.state not in ENDED)))

    # Over the agent's life

    async def adopt(self) -> None:
        """Takes over what an earlier agent left: engines that still run go on, the others are cleaned up."""
        await asyncio.gather(*(self._adopt(record) for record in self._files.load_all()))
        self._prune()

    async def run(self) -> None:
        """Notices within a poll interval when a process died."""
        while True:
            self.last_beat_s = self._clock.monotonic_s()
            for instance_id, record in list(self._records.items()):
                alive = record.process is None or self._launcher.alive(record.process)
                if record.state in RUNNING and not alive:
                    self._fail(instance_id, self._died(record))
            await asyncio.sleep(self._config.poll_interval_s)

    async def close(self) -> None:
        """Lets go of all instances; they run on, and the next agent takes them over."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _adopt(self, record: Record) -> None:
        instance_id = record.spec.instance_id
        if record.boot_id != self._boot_id:
            record = record.but(boot_id=self._boot_id, process=None, since_s=self._clock.monotonic_s())
            gone = "the machine rebooted"
        else:
            gone = "its launch was interrupted" if record.process is None else "it ended while no agent ran"
            if record.process is None and record.state not in ENDED:
                record = record.but(process=self._launcher.find(record.token))
        self._records[instance_id] = record
        alive = record.process is not None and self._launcher.alive(record.process)
        log.info("instance found", instance=instance_id, state=record.state.value, alive=alive)
        if record.state in RUNNING and not alive:
            self._fail(instance_id, gone)
        elif record.state in (State.STARTING, State.WARMING):
            self._begin(instance_id, self._bring_up(instance_id))
        elif record.state is State.READY:
            if not await self._client.healthy(self._url(record), ANSWER_TIMEOUT_S):
                self._move(instance_id, Event.SILENT, "found again, does not answer yet")
                self._begin(instance_id, self._bring_up(instance_id))
        elif record.state is State.DRAINING and not record.drained:
            self._begin(instance_id, self._drain(instance_id))
        elif record.state is State.STOPPING:
            self._begin(instance_id, self._take_down(instance_id))
        elif record.state is State.QUARANTINED:
            self._begin(instance_id, self._until_free(instance_id, float("inf")))

    # The steps, one task per instance at a time

    async def _bring_up(self, instance_id: str) -> None:
        record = self._records[instance_id]
        url = self._url(record)
        if record.state is State.STARTING:
            deadline_s = record.since_s + self._config.start_timeout_s
            while not await self._client.healthy(url, ANSWER_TIMEOUT_S):
                if self._clock.monotonic_s() > deadline_s:
                    text = f"not healthy within {self._config.start_timeout_s:g} s; {last_line(record.log_path)}"
                    return self._fail(instance_id, text)
                await asyncio.sleep(HEALTH_PAUSE_S)
            self._move(instance_id, Event.HEALTHY, "running the warm-up request", step="start")
        try:
            await self._client.warm_up(
                url, record.spec.model, self._config.warmup_tokens, self._config.warmup_timeout_s
            )
        except EngineSilent as error:
            return self._fail(instance_id, str(error))
        return self._move(instance_id, Event.WARMED_UP, "serving", step="warm")

    async def _drain(self, instance_id: str) -> None:
        record = self._records[instance_id]
        idle_scrapes = 0
        while idle_scrapes < self._config.drain_scrapes:
            await asyncio.sleep(self._config.drain_interval_s)
            try:
                reading = await self._client.scrape(self._url(record), ANSWER_TIMEOUT_S)
            except EngineSilent as error:
                idle_scrapes, text = 0, f"draining; {error}"
            else:
                idle_scrapes = idle_scrapes + 1 if reading.idle else 0
                text = f"draining: {reading.running:g} running, {reading.waiting:g} waiting"
            if text != self._records[instance_id].detail:
                self._store(self._records[instance_id].but(detail=text), save=False)
        proven = f"drained: nothing running, nothing waiting in {idle_scrapes} scrapes in a row"
        record = self._records[instance_id]
        self._store(record.but(drained=True, detail=proven, step_s=self._timed(record, "drain")))
        log.info("instance drained", instance=instance_id, seconds=round(self._clock.monotonic_s() - record.since_s, 3))

    async def _take_down(self, instance_id: str) -> None:
        record = self._records[instance_id]
        process = record.process
        if process is not None:
            self._launcher.terminate(process)
            deadline_s = self._clock.monotonic_s() + self._config.stop_timeout_s
            while self._launcher.alive(process):
                if self._clock.monotonic_s() > deadline_s:
                    log.warning("engine does not end when asked to", instance=instance_id)
                    break
                await asyncio.sleep(FREE_PAUSE_S)
            self._launcher.kill(process)  # workers that outlived their leader, or a leader that would not go
        await self._until_free(instance_id, self._clock.monotonic_s() + self._config.gpu_free_timeout_s)

    async def _until_free(self, instance_id: str, deadline_s: float) -> None:
        """Ends with the proof that the GPUs are free; past the deadline the instance waits for it in quarantine."""
        while text := await self._not_free(self._records[instance_id]):
            record = self._records[instance_id]
            if record.state is State.STOPPING and self._clock.monotonic_s() > deadline_s:
                before = f" (before: {record.detail})" if record.failed else ""
                self._move(instance_id, Event.NOT_FREED, f"{text}; the GPUs stay blocked until they are free{before}")
                log.error("instance quarantined", instance=instance_id, why=text)
            quarantined = self._records[instance_id].state is State.QUARANTINED
            await asyncio.sleep(QUARANTINE_PAUSE_S if quarantined else FREE_PAUSE_S)
        record = self._records[instance_id]
        event = Event.FREED_AFTER_FAILURE if record.failed else Event.FREED
        self._move(instance_id, event, record.detail if record.failed else "stopped; its GPUs are free", step="stop")
        self._prune()

    async def _not_free(self, record: Record) -> str:
        if record.process is not None and (pids := self._launcher.members(record.process)):
            self._launcher.kill(record.process)
            return f"processes {sorted(pids)} do not end"
        return await occupied(self._inventory, record.spec.gpu_uuids, self._config.gpu_free_memory_mib)

    # Changes

    def _fail(self, instance_id: str, text: str) -> None:
        log.error("instance failed", instance=instance_id, why=text)
        self._move(instance_id, Event.FAIL, text, failed=True)
        self._begin(instance_id, self._take_down(instance_id))

    def _move(self, instance_id: str, event: Event, detail: str, step: str = "", failed: bool | None = None) -> None:
        record = self._records[instance_id]
        self._store(
            record.but(
                state=follow(record.state, event),
                detail=detail,
                since_s=self._clock.monotonic_s(),
                step_s=self._timed(record, step) if step else record.step_s,
                failed=record.failed if failed is None else failed,
            )
        )

    def _store(self, record: Record, save: bool = True) -> None:
        instance_id = record.spec.instance_id
        before = self._records.get(instance_id)
        self._records[instance_id] = record
        if save:
            try:
                self._files.save(record)
            except OSError as error:
                log.error("instance record cannot be written", instance=instance_id, why=str(error))
        if before is None or before.state is not record.state:
            self._metrics.instance_transitions.labels(record.state.value).inc()
            log.info("instance", instance=instance_id, state=record.state.value, detail=record.detail)
        self.feed.publish(self._view(record))

    def _begin(self, instance_id: str, step: Coroutine[object, object, None]) -> None:
        """Replaces the task that carries an instance on; the task itself may be the one that calls."""
        before = self._tasks.get(instance_id)
        if before is not None and before is not asyncio.current_task():
            before.cancel()
        task = asyncio.get_running_loop().create_task(step)
        task.add_done_callback(lambda done: self._step_ended(instance_id, done))
        self._tasks[instance_id] = task

    def _step_ended(self, instance_id: str, task: asyncio.Task[None]) -> None:
        """A step never raises; should one do so all the same, the instance must not stay where it is for ever."""
        if task.cancelled() or task.exception() is None:
            return
        log.error("internal error", instance=instance_id, exc_info=task.exception())
        record = self._records.get(instance_id)
        if record is None or self._tasks.get(instance_id) is not task:
            return
        if record.state in RUNNING:
            self._fail(instance_id, f"internal error: {task.exception()!r}")
        elif record.state is State.STOPPING:
            self._move(instance_id, Event.NOT_FREED, f"internal error: {task.exception()!r}; stop it again")

    def _prune(self) -> None:
        ended = [instance_id for instance_id, record in self._records.items() if record.state in ENDED]
        for instance_id in ended[: max(len(ended) - self._config.keep_finished, 0)]:
            del self._records[instance_id]
            self._tasks.pop(instance_id, None)
            self._files.remove(instance_id)

    # Small questions

    def _get(self, instance_id: str) -> Record:
        try:
            return self._records[instance_id]
        except KeyError:
            raise NotFound(f"no instance {instance_id!r} on this node") from None

    async def _require_free(self, spec: Spec) -> None:
        owner = {
            gpu: record
            for record in self._records.values()
            if record.state not in ENDED
            for gpu in record.spec.gpu_uuids
        }
        for gpu in spec.gpu_uuids:
            worker = self._inventory.find(gpu)
            if worker is None:
                raise NotFound(f"no GPU {gpu} on this node")
            if gpu in owner:
                held = owner[gpu]
                raise Precondition(f"{gpu} belongs to instance {held.spec.instance_id!r}, which is {held.state.value}")
            if worker.health is not GpuHealth.OK:
                raise Precondition(f"{gpu} is {worker.health.value}: {worker.detail}")
            if worker.facts is not None and worker.facts.mig_enabled:
                raise Precondition(f"{gpu} has MIG on; engines are started on whole GPUs only")
        if text := await occupied(self._inventory, spec.gpu_uuids, self._config.gpu_free_memory_mib):
            raise Precondition(text)

    async def _require_drained(self, record: Record) -> None:
        name = record.spec.instance_id
        if not record.drained:
            raise Precondition(f"{name!r} is {record.state.value} and not drained; drain it first, or use force")
        try:
            reading = await self._client.scrape(self._url(record), ANSWER_TIMEOUT_S)
        except EngineSilent as error:
            raise Precondition(f"nobody can tell what {name!r} still serves ({error}); use force") from None
        if not reading.idle and self._records[name].state is State.DRAINING:
            text = f"got new work after its drain ({reading.running:g} running); draining again"
            steps = {step: seconds for step, seconds in record.step_s.items() if step != "drain"}
            self._store(self._records[name].but(drained=False, detail=text, step_s=steps))
            self._begin(name, self._drain(name))
            raise Precondition(f"{name!r} {text}")

    def _launch(self, record: Record) -> Launch:
        spec = record.spec
        env = self._config.env | {"CUDA_VISIBLE_DEVICES": ",".join(spec.gpu_uuids)}
        argv = command_line(spec, record.port, self._config)
        return Launch(spec.instance_id, record.token, argv, env, Path(record.log_path))

    def _ports_in_use(self) -> set[int]:
        return {record.port for record in self._records.values() if record.state not in ENDED}

    def _url(self, record: Record) -> str:
        """Where the agent itself reaches the engine."""
        host = self._config.listen_host
        return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{record.port}"

    def _view(self, record: Record) -> InstanceView:
        host = self._config.advertise_host or self._config.listen_host
        listens = record.state in ANSWERING
        seconds = max(self._clock.monotonic_s() - record.since_s, 0.0)
        return InstanceView(record, f"http://{host}:{record.port}" if listens else "", seconds)

    def _timed(self, record: Record, step: str) -> dict[str, float]:
        return record.step_s | {step: round(self._clock.monotonic_s() - record.since_s, 3)}

    def _died(self, record: Record) -> str:
        how = self._launcher.exit_text(record.process) if record.process is not None else ""
        return f"the engine ended by itself{f' ({how})' if how else ''}; {last_line(record.log_path)}"
