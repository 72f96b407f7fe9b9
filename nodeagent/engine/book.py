"""The book of instances: what is known of each, moved on by the table in lifecycle.py, on disk and told to readers.

engine/instances.py takes requests and engine/steps.py carries instances on; both read and write here, and nothing else
does. For the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path

from common.clock import Clock
from common.logs import get_logger
from nodeagent.config import NodeAgentConfig
from nodeagent.engine.feed import InstanceFeed, InstanceView
from nodeagent.engine.lifecycle import ANSWERING, ENDED, Event, State, follow
from nodeagent.engine.records import Record, Records
from nodeagent.errors import NotFound, Unavailable
from nodeagent.telemetry.metrics import AgentMetrics

log = get_logger(__name__)


class Book:
    """All instances, ended ones included, and the one task of each that carries it on."""

    def __init__(self, files: Records, clock: Clock, config: NodeAgentConfig, metrics: AgentMetrics) -> None:
        self.feed = InstanceFeed()
        self.config = config.engine
        self.log_dir: Path = config.engine_log_dir
        self._files = files
        self._clock = clock
        self._metrics = metrics
        self._records: dict[str, Record] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    # Reading

    def __getitem__(self, instance_id: str) -> Record:
        return self._records[instance_id]

    def get(self, instance_id: str) -> Record | None:
        return self._records.get(instance_id)

    def known(self, instance_id: str) -> Record:
        """Raises NotFound."""
        try:
            return self._records[instance_id]
        except KeyError:
            raise NotFound(f"no instance {instance_id!r} on this node") from None

    def all(self) -> list[Record]:
        """Oldest first."""
        return list(self._records.values())

    def alive(self) -> Iterable[Record]:
        """Those that have not ended: each owns GPUs."""
        return (record for record in list(self._records.values()) if record.state not in ENDED)

    def load_all(self) -> list[Record]:
        """What an earlier agent left on disk."""
        return self._files.load_all()

    def now_s(self) -> float:
        return self._clock.monotonic_s()

    def url(self, record: Record) -> str:
        """Where the agent itself reaches the engine."""
        host = self.config.listen_host
        return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{record.port}"

    def view(self, record: Record) -> InstanceView:
        """The instance as the API shows it."""
        host = self.config.advertise_host or self.config.listen_host
        listens = record.state in ANSWERING
        seconds = max(self.now_s() - record.since_s, 0.0)
        return InstanceView(record, f"http://{host}:{record.port}" if listens else "", seconds)

    # Writing

    def know(self, record: Record) -> None:
        """Takes in what an earlier agent wrote."""
        self._records[record.spec.instance_id] = record

    def put(self, record: Record, save: bool = True) -> None:
        """Replaces a record. A record that cannot be written is kept in memory all the same, and logged."""
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
        self.feed.publish(self.view(record))

    def put_first(self, record: Record) -> None:
        """Replaces a record that must be on disk before anything is done; raises Unavailable when it cannot be."""
        try:
            self._files.save(record)
        except OSError as error:
            text = f"the instance record cannot be written: {error.strerror or error}; nothing was done"
            raise Unavailable(text) from None
        self.put(record, save=False)

    def move(self, instance_id: str, event: Event, detail: str, step: str = "", **changes: object) -> None:
        """To the next state; `step` names the step that ends with it, whose duration is kept."""
        self.put(self.moved(instance_id, event, detail, step, **changes))

    def moved(self, instance_id: str, event: Event, detail: str, step: str = "", **changes: object) -> Record:
        """The record after `move`, not yet written."""
        record = self._records[instance_id]
        return record.but(
            **{
                "state": follow(record.state, event),
                "detail": detail,
                "since_s": self.now_s(),
                "step_s": self.timed(record, step) if step else record.step_s,
            }
            | changes
        )

    def say(self, instance_id: str, detail: str) -> None:
        """Another detail in the same state; for readers only."""
        record = self._records[instance_id]
        if record.detail != detail:
            self.put(record.but(detail=detail), save=False)

    def timed(self, record: Record, step: str, since_s: float | None = None) -> dict[str, float]:
        """The durations with one more: from `since_s`, else from when the instance came into its state, until now."""
        start_s = record.since_s if since_s is None else since_s
        return record.step_s | {step: round(self.now_s() - start_s, 3)}

    def prune(self) -> None:
        """Forgets the oldest of the ended instances."""
        ended = [instance_id for instance_id, record in self._records.items() if record.state in ENDED]
        for instance_id in ended[: max(len(ended) - self.config.keep_finished, 0)]:
            del self._records[instance_id]
            self._tasks.pop(instance_id, None)
            self._files.remove(instance_id)

    # The task of each instance

    def begin(
        self, instance_id: str, work: Coroutine[object, object, None], broken: Callable[[str, str], None]
    ) -> None:
        """Replaces the task that carries an instance on; the task itself may be the one that calls.

        Work never raises; should it do so all the same, `broken` hears of it: nothing may stay where it is for ever.
        """
        before = self._tasks.get(instance_id)
        if before is not None and before is not asyncio.current_task():
            before.cancel()

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("internal error", instance=instance_id, exc_info=error)
                if self._tasks.get(instance_id) is task:
                    broken(instance_id, f"internal error: {error!r}")

        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(ended)
        self._tasks[instance_id] = task

    async def close(self) -> None:
        """Ends all tasks; the engines themselves run on."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def owners(book: Book) -> dict[str, Record]:
    """GPU UUID → the instance that computes on it. Sleeping ones are left out: several may lie beside one awake."""
    return {gpu: record for record in book.alive() if record.state is not State.ASLEEP for gpu in record.gpus}


def sleepers(book: Book, gpu_uuid: str) -> list[Record]:
    """The instances that sleep on a GPU."""
    return [record for record in book.alive() if record.state is State.ASLEEP and gpu_uuid in record.spec.gpu_uuids]
