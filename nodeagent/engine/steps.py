"""Carries instances on: from one stable state to the next, one task each, every step resumable from its record.

Stable are ready, asleep, a proven drain, and the ended ones. What a restart adds is in reshard.py, sleep in nap.py. A
step reads the record again after every wait: a request may have changed it meanwhile.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from common.logs import get_logger
from nodeagent.engine import reshard
from nodeagent.engine.book import Book
from nodeagent.engine.command import command_line, environment, free_port
from nodeagent.engine.launcher import Launch, Launcher, LaunchFailed, ProcessId
from nodeagent.engine.lifecycle import ENDED, RUNNING, Event, State
from nodeagent.engine.nap import Naps, is_falling
from nodeagent.engine.pids import carries_token, identify, is_same, send
from nodeagent.engine.process import last_line
from nodeagent.engine.proof import Neighbours, gpu_use, occupied
from nodeagent.engine.readahead import ReadAhead
from nodeagent.engine.records import Record, Step
from nodeagent.engine.vllm import EngineSilent, VllmClient
from nodeagent.errors import Refused
from nodeagent.gpu.inventory import Inventory

log = get_logger(__name__)

HEALTH_PAUSE_S = 0.2
ANSWER_TIMEOUT_S = 2.0
"""How long a health check or a scrape for a drain may take."""
FREE_PAUSE_S = 0.1
QUARANTINE_PAUSE_S = 2.0
FAILED_STOP_TIMEOUT_S = 3.0
"""From SIGTERM to SIGKILL of an engine that failed: it has nothing to finish."""
WORKER_TITLE = "VLLM::"
"""vLLM names its engine core and its workers so."""


class Steps:
    """What is done to engines. For the event loop's thread."""

    def __init__(
        self, book: Book, inventory: Inventory, launcher: Launcher, client: VllmClient, naps: Naps, boot_id: str
    ) -> None:
        self._book = book
        self._config = book.config
        self._inventory = inventory
        self._launcher = launcher
        self._client = client
        self._naps = naps
        self._boot_id = boot_id
        self._read_ahead: dict[str, ReadAhead] = {}
        self._launching: dict[str, asyncio.Task[None]] = {}

    def carry(self, instance_id: str) -> None:
        """Begins to carry an instance on from where its record stands."""
        self._book.begin(instance_id, self._carry(instance_id), self._broken)

    def fail(self, instance_id: str, text: str) -> None:
        """An engine died or is of no use any more: it is taken down, and its restart goes on, back, or ends."""
        self._failed(instance_id, text)
        self.carry(instance_id)

    def fresh(self, record: Record) -> Record:
        """The record before a launch: new token, new port, no process. Raises Precondition when no port is free."""
        in_use = {other.port for other in self._book.alive()}
        return record.but(
            boot_id=self._boot_id,
            token=uuid.uuid4().hex,
            port=free_port(in_use, self._config),
            log_path=str(self._book.log_dir / f"{record.spec.instance_id}.log"),
            process=None,
            drained=False,
            workers=(),
        )

    async def launch(self, instance_id: str) -> None:
        """Starts the process of a record that is on disk as starting; a failure ends in `failed`, not in an error.

        Runs to its end even when the caller is cancelled: a process must not start with nobody to write it down.
        """
        if instance_id not in self._launching:
            self._launching[instance_id] = asyncio.get_running_loop().create_task(self._launch(instance_id))
        await asyncio.shield(self._launching[instance_id])

    async def _launch(self, instance_id: str) -> None:
        record = self._book[instance_id]
        argv = command_line(record.spec, record.port, self._config)
        env = environment(record.spec, self._config)
        launch = Launch(instance_id, record.token, argv, env, Path(record.log_path))
        # A restart that is rolled back must not overwrite why its new layout failed.
        with suppress(OSError):
            launch.log_path.replace(launch.log_path.with_suffix(".log.1"))
        try:
            process = await self._launcher.start(launch)
        except LaunchFailed as error:
            if self._book[instance_id].state is State.STARTING:
                self._failed(instance_id, str(error))
        else:
            record = self._book[instance_id]
            self._book.put(record.but(process=process, restart=reshard.step_to(record, Step.HEALTH)))
        finally:
            del self._launching[instance_id]

    def read_ahead(self, record: Record) -> None:
        """Brings the weights of the next engine into the page cache meanwhile."""
        path = self._config.model_paths.get(record.spec.model)
        if path and self._config.read_ahead_gib:
            limit_bytes = int(self._config.read_ahead_gib * (1 << 30))
            self._read_ahead[record.spec.instance_id] = ReadAhead(Path(path), limit_bytes)

    def neighbours(self, own: Record | None, gpus: Iterable[str]) -> list[tuple[str, Neighbours]]:
        """Who besides an instance may be on each GPU: other instances, awake or asleep."""
        return [(gpu, self._beside(own, gpu)) for gpu in gpus]

    def close(self) -> None:
        for reader in self._read_ahead.values():
            reader.stop()

    async def died(self, record: Record) -> str:
        """One sentence on an engine that ended by itself."""
        how = await self._launcher.exit_text(record.process) if record.process is not None else ""
        return f"the engine ended by itself{f' ({how})' if how else ''}; {last_line(record.log_path)}"

    # The steps

    async def _carry(self, instance_id: str) -> None:
        while True:
            record = self._book[instance_id]
            if record.state is State.STARTING:
                await self._come_up(instance_id)
            elif record.state is State.WARMING:
                await self._warm(instance_id)
            elif is_falling(record):
                await self._fall_asleep(instance_id)
            elif record.state is State.DRAINING and not (record.drained and record.restart is None):
                await self._drain(instance_id)
            elif record.state in (State.STOPPING, State.QUARANTINED):
                await self._take_down(instance_id)
            else:
                return

    async def _come_up(self, instance_id: str) -> None:
        if self._book[instance_id].process is None:
            await self.launch(instance_id)
        record = self._book[instance_id]
        deadline_s = record.since_s + self._config.start_timeout_s
        while record.state is State.STARTING:
            if await self._client.healthy(self._book.url(record), ANSWER_TIMEOUT_S):
                step = reshard.step_to(record, Step.WARM)
                self._book.move(instance_id, Event.HEALTHY, "running the warm-up request", step="start", restart=step)
            elif self._book.now_s() > deadline_s:
                text = f"not healthy within {self._config.start_timeout_s:g} s; {last_line(record.log_path)}"
                self._failed(instance_id, text)
            else:
                await asyncio.sleep(HEALTH_PAUSE_S)
            record = self._book[instance_id]

    async def _warm(self, instance_id: str) -> None:
        record, config = self._book[instance_id], self._config
        url = self._book.url(record)
        try:
            if record.nap is not None:
                await self._naps.wake_up(instance_id)
            await self._client.warm_up(url, record.spec.model, config.warmup_tokens, config.warmup_timeout_s)
        except EngineSilent as error:
            return self._failed(instance_id, str(error))
        workers = await self._workers(record)
        record = self._book[instance_id]
        restart, steps = record.restart, self._book.timed(record, "warm")
        if restart is not None:
            steps = self._book.timed(record.but(step_s=steps), "restart", restart.began_s)
            self._stop_reading(instance_id)
        detail = "serving" if restart is None else reshard.committed(restart)
        # The commit of a restart: with this record on disk it is over.
        return self._book.move(
            instance_id, Event.WARMED_UP, detail, workers=workers, restart=None, nap=None, step_s=steps
        )

    async def _drain(self, instance_id: str) -> None:
        idle_scrapes, text = 0, "draining"
        while idle_scrapes < self._config.drain_scrapes:
            await asyncio.sleep(self._config.drain_interval_s)
            record = self._book[instance_id]
            restart = record.restart
            if restart is not None and self._book.now_s() > restart.drain_until_s:
                log.warning("drain of a restart did not end in time", instance=instance_id, last=text)
                return self._stop_for_restart(instance_id, f"its drain did not end in time ({text})")
            try:
                reading = await self._client.scrape(self._book.url(record), ANSWER_TIMEOUT_S)
            except EngineSilent as error:
                idle_scrapes, text = 0, f"draining; {error}"
            else:
                idle_scrapes = idle_scrapes + 1 if reading.idle else 0
                text = f"draining: {reading.running:g} running, {reading.waiting:g} waiting"
            self._book.say(instance_id, text)
        proven = f"drained: nothing running, nothing waiting in {idle_scrapes} scrapes in a row"
        record = self._book[instance_id]
        since_s = record.since_s if record.restart is None else record.restart.began_s
        steps = self._book.timed(record, "drain", since_s)
        self._book.put(record.but(drained=True, detail=proven, step_s=steps))
        log.info("instance drained", instance=instance_id, seconds=steps["drain"])
        if record.restart is not None:
            self._stop_for_restart(instance_id, proven)
        return None

    async def _fall_asleep(self, instance_id: str) -> None:
        try:
            await self._naps.fall_asleep(instance_id)
        except (EngineSilent, Refused) as error:
            self._failed(instance_id, f"cannot tell whether it sleeps: {error}")

    async def _take_down(self, instance_id: str) -> None:
        if (launching := self._launching.get(instance_id)) is not None:
            await asyncio.shield(launching)
        record = self._book[instance_id]
        process = record.process
        if process is None and record.token and (process := await self._launcher.find(instance_id, record.token)):
            self._book.put(record.but(process=process))
        if process is not None and record.state is State.STOPPING:
            limit_s = self._config.stop_timeout_s
            failing = record.failed or (record.restart is not None and record.restart.back)
            deadline_s = self._book.now_s() + (min(limit_s, FAILED_STOP_TIMEOUT_S) if failing else limit_s)
            await self._launcher.terminate(process)
            while self._launcher.alive(process):
                if self._book.now_s() > deadline_s:
                    log.warning("engine does not end when asked to", instance=instance_id)
                    break
                await asyncio.sleep(FREE_PAUSE_S)
            await self._launcher.kill(process)  # workers that outlived their leader, or a leader that would not go
        await self._until_free(instance_id)

    async def _until_free(self, instance_id: str) -> None:
        """Ends with the proof that the GPUs are free; past the deadline the instance waits for it in quarantine."""
        deadline_s = self._book.now_s() + self._config.gpu_free_timeout_s
        while text := await self._not_free(self._book[instance_id]):
            record = self._book[instance_id]
            if record.state is State.STOPPING and self._book.now_s() > deadline_s:
                self._quarantine(instance_id, text)
            quarantined = self._book[instance_id].state is State.QUARANTINED
            await asyncio.sleep(QUARANTINE_PAUSE_S if quarantined else FREE_PAUSE_S)
        record = self._book[instance_id]
        if record.restart is not None:
            return await self._start_anew(instance_id)
        event = Event.FREED_AFTER_FAILURE if record.failed else Event.FREED
        detail = record.detail if record.failed else "stopped; its GPUs are free"
        self._book.move(instance_id, event, detail, step="stop", nap=None, workers=())
        self._stop_reading(instance_id)
        return self._book.prune()

    async def _start_anew(self, instance_id: str) -> None:
        """The old engine is gone. The other layout's GPUs are proven free too, then it is started."""
        record = self._book[instance_id]
        restart = record.restart
        assert restart is not None, "only called in a restart"
        spec = reshard.target(restart, record.spec)
        deadline_s = self._book.now_s() + self._config.gpu_free_timeout_s
        while held := await self._held(record, spec.gpu_uuids):
            if self._book.now_s() > deadline_s:
                if restart.back:
                    return self._quarantine(instance_id, held)
                back = restart.but(back=True, why_back=f"its new GPUs are not free: {held}")
                return self._book.put(self._book[instance_id].but(restart=back))
            await asyncio.sleep(FREE_PAUSE_S)
        record = self._book[instance_id]
        if record.restart is None:  # stopped by a request meanwhile
            return None
        log.info("instance starts anew", instance=instance_id, restart=restart.transaction_id, gpus=spec.gpu_uuids)
        way = "back to the old layout" if restart.back else f"tensor parallelism {len(spec.gpu_uuids)}"
        detail = f"restart {restart.transaction_id}: starting, {way}"
        try:
            after = self._book.moved(instance_id, Event.RELAUNCH, detail, "stop", restart=restart.but(step=Step.START))
            self._book.put_first(self.fresh(after.but(spec=spec)))
        except Refused as refusal:
            text = f"restart {restart.transaction_id} ends: {refusal}; {restart.why_back}"
            self._book.move(instance_id, Event.FREED_AFTER_FAILURE, text, restart=None, failed=True)
        return None

    # What changes a record

    def _failed(self, instance_id: str, text: str) -> None:
        log.error("instance failed", instance=instance_id, why=text)
        changes = {"detail": text} | reshard.after_failure(self._book[instance_id], text)
        self._book.move(instance_id, Event.FAIL, **changes)

    def _stop_for_restart(self, instance_id: str, why: str) -> None:
        record = self._book[instance_id]
        assert record.restart is not None, "only called in a restart"
        detail = f"restart {record.restart.transaction_id}: stopping; {why}"
        self._book.move(instance_id, Event.STOP, detail, restart=reshard.step_to(record, Step.STOP))

    def _quarantine(self, instance_id: str, text: str) -> None:
        record = self._book[instance_id]
        before = f" (before: {record.detail})" if record.failed or record.restart is not None else ""
        detail = f"{text}; the GPUs stay blocked until they are free{before}"
        # A restart ends here: what comes after the proof is for whoever decides with a fresh mind.
        failed = record.failed or record.restart is not None
        self._book.move(instance_id, Event.NOT_FREED, detail, restart=None, failed=failed)
        log.error("instance quarantined", instance=instance_id, why=text)

    def _broken(self, instance_id: str, text: str) -> None:
        record = self._book.get(instance_id)
        if record is None or record.state in ENDED:
            return
        if record.state in RUNNING:
            self.fail(instance_id, text)
        elif record.state is State.STOPPING:
            self._book.move(instance_id, Event.NOT_FREED, f"{text}; stop it again", restart=None)

    def _stop_reading(self, instance_id: str) -> None:
        if (reader := self._read_ahead.pop(instance_id, None)) is not None:
            reader.stop()

    # Proof

    async def _not_free(self, record: Record) -> str:
        if record.process is not None and (pids := self._launcher.members(record.process)):
            await self._launcher.kill(record.process)
            return f"processes {sorted(pids)} do not end"
        return await self._held(record, record.spec.gpu_uuids)

    async def _held(self, record: Record, gpus: Iterable[str]) -> str:
        """Why the GPUs are not free; what is there of this instance itself is ended."""
        found = await occupied(self._inventory, self.neighbours(record, gpus), self._config.gpu_free_memory_mib)
        if found is None:
            return ""
        for pid in found.pids:
            if self._is_orphan(pid, record):
                log.warning("orphaned worker killed", instance=record.spec.instance_id, pid=pid)
                send(pid, signal.SIGKILL)
        return found.text

    @staticmethod
    def _is_orphan(pid: int, record: Record) -> bool:
        """A worker that left the engine's session or unit and outlived it. Nobody else is ever ended."""
        known = next((worker for worker in record.workers if worker.pid == pid), None)
        return (known is not None and is_same(known)) or carries_token(pid, record.token)

    def _beside(self, own: Record | None, gpu: str) -> Neighbours:
        pids: frozenset[int] = frozenset()
        asleep_bytes, awake = 0, False
        for other in self._book.alive():
            if (own is not None and other.spec.instance_id == own.spec.instance_id) or gpu not in other.gpus:
                continue
            if other.process is not None:
                pids |= self._launcher.members(other.process) | {worker.pid for worker in other.workers}
            if other.state is State.ASLEEP and other.nap is not None:
                asleep_bytes += other.nap.asleep_bytes.get(gpu, 0)
            else:
                awake = True
        return Neighbours(pids, asleep_bytes, awake)

    async def _workers(self, record: Record) -> tuple[ProcessId, ...]:
        """Who computes for an engine that is ready: its processes with a GPU context, and those named by vLLM."""
        if record.process is None:
            return ()
        members = self._launcher.members(record.process) - {record.process.pid}
        on_gpus: set[int] = set()
        for gpu in record.spec.gpu_uuids:
            use = await gpu_use(self._inventory, gpu)
            if not isinstance(use, str):
                on_gpus |= use.pids
        found = []
        for pid in sorted(members):
            with suppress(psutil.Error):
                if pid in on_gpus or _title(pid).startswith(WORKER_TITLE):
                    found.append(identify(pid))
        return tuple(found)


def _title(pid: int) -> str:
    process = psutil.Process(pid)
    return (process.cmdline() or [process.name()])[0]
