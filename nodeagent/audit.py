"""Who changed what and why, refused attempts included: one JSON object a line, for people and log collectors.

What was done is written before its answer leaves (a refusal: right after), so it survives the death of the agent. It
is synced to the disk at most a second later, off the path of requests: syncing each line would add a disk's delay to
every renewal, and nothing rests on these lines after a power failure; what must be restored stands in the journal.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from common.clock import Clock
from common.logs import get_logger

log = get_logger(__name__)

SYNC_S = 1.0


class AuditLog:
    """Appends to a file and keeps one older one. For the event loop's thread."""

    def __init__(self, path: Path, clock: Clock, max_bytes: int, on_lost: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._clock = clock
        self._max_bytes = max_bytes
        self._on_lost = on_lost
        self._descriptor = -1
        self._size = 0
        self._unsynced = False
        self._failing = False

    @property
    def failing(self) -> bool:
        """Whether the last line was refused."""
        return self._failing

    def write(self, who: str, what: str, why: str, outcome: str, request_id: str = "", detail: str = "") -> None:
        """One line. A disk that refuses it stops no control: it is counted and said once."""
        at = datetime.fromtimestamp(self._clock.wall_s(), tz=UTC).isoformat(timespec="milliseconds")
        fields = {"at": at, "who": who, "what": what, "why": why, "outcome": outcome}
        fields |= {"request_id": request_id} if request_id else {}
        fields |= {"detail": detail} if detail else {}
        line = json.dumps(fields, ensure_ascii=True).encode() + b"\n"
        try:
            self._roll(len(line))
            if os.write(self._descriptor, line) != len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            if not self._failing:
                log.error("audit log cannot be written", path=str(self._path), why=error.strerror or str(error))
            self._failing = True
            self._on_lost()
            return
        self._failing = False
        self._size += len(line)
        self._unsynced = True

    async def run(self) -> None:
        """Syncs what was written, for ever."""
        while True:
            await asyncio.sleep(SYNC_S)
            if self._unsynced and self._descriptor >= 0:
                self._unsynced = False
                try:
                    await asyncio.to_thread(os.fsync, self._descriptor)
                except OSError as error:
                    log.error("audit log cannot be synced", path=str(self._path), why=error.strerror or str(error))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _roll(self, more: int) -> None:
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            self._size = os.fstat(self._descriptor).st_size
            if self._size and os.pread(self._descriptor, 1, self._size - 1) != b"\n":
                self._size += os.write(self._descriptor, b"\n")  # a line that a full disk cut short
        if self._size + more > self._max_bytes and self._size:
            self.close()
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._roll(0)
