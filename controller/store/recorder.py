"""The asynchronous writer of history: takes values from the running loop and gets them into the database.

`record` only puts a value into a queue: it never blocks and never raises, so a dead database cannot stop control.
One thread takes what has gathered and writes it in one short transaction. When the database fails, history goes to
the spool on disk instead and is written later, first things first, with its original times. When the disk fails as
well it stays in memory, and only when the queue is full is anything dropped, and counted.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from sqlalchemy import Engine

from common.logs import get_logger
from controller.store.codec import Row, from_line, to_line, to_row
from controller.store.engine import RECORDER_PATIENCE_S, StoreUnavailable, open_engine
from controller.store.records import Record
from controller.store.repositories import RowRefused, write_rows
from controller.store.spool import Spool

log = get_logger(__name__)

BATCH_ROWS = 500
LINGER_S = 0.05  # how long a batch gathers: the most that a SIGKILL can lose while all is well
REFUSED_LIMIT_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class RecorderCounts:
    """Totals since the start, and how things stand now.

    `recorded` rows were put into the database by this process, those that had been spooled too; `repeated` were
    there already when they were written again after a crash; `spooled` went to the spool; `refused` can never be
    written (the first of them stand in refused.jsonl beside the spool); `dropped` values are lost, because neither
    database nor spool nor memory could take them.
    """

    recorded: int = 0
    repeated: int = 0
    spooled: int = 0
    refused: int = 0
    dropped: int = 0
    in_memory: int = 0  # not safe yet
    spool_bytes: int = 0  # safe on disk, not yet in the database
    database_ok: bool = True
    last_error: str = ""


def open_recorder(url: str, spool_folder: Path) -> Recorder:
    """A recorder with a connection of its own, which soon gives up waiting: it has a spool to put things into.

    Raises UserError when the database cannot be opened, or the spool folder cannot be used or is another's.
    """
    return Recorder(open_engine(url, patience_s=RECORDER_PATIENCE_S), spool_folder)


class Recorder:
    """Opening one takes the spool folder for this process and starts the thread; `close` ends both.

    Raises UserError when the folder cannot be used or another process has it.
    """

    def __init__(
        self,
        engine: Engine,
        spool_folder: Path,
        *,
        spool_limit_bytes: int = 256 * 1024 * 1024,
        queue_limit: int = 10_000,
        retry_s: float = 1.0,
    ) -> None:
        self._engine = engine
        self._queue_limit = queue_limit
        self._retry_s = retry_s
        self._refused_path = spool_folder / "refused.jsonl"
        self._spool = Spool(spool_folder, spool_limit_bytes)
        # `_changed` guards everything below; the database and the disk are waited for without holding it.
        self._changed = threading.Condition()
        self._queue: deque[Record] = deque()
        self._in_hand: list[Row] = []  # taken from the queue, not yet safe
        self._accepted = 0  # values that `record` took
        self._settled = 0  # of these: safe in the database or on disk, or refused
        self._totals = RecorderCounts()
        self._disk_full = False
        self._retry_at_s = float("-inf")  # monotonic; the database is not tried before
        self._close_by_s: float | None = None
        # The thread uses the spool until `close` takes it over, perhaps while the thread hangs in the database.
        self._spool_lock = threading.Lock()
        self._taken_over = False
        self._thread = threading.Thread(target=self._run, name="history-recorder", daemon=True)
        self._thread.start()

    def record(self, value: Record) -> None:
        """Takes a value; never blocks, never raises."""
        with self._changed:
            if self._close_by_s is not None or len(self._queue) >= self._queue_limit:
                self._totals = replace(self._totals, dropped=self._totals.dropped + 1)
                return
            self._queue.append(value)
            self._accepted += 1
            self._changed.notify_all()

    def counts(self) -> RecorderCounts:
        with self._changed:
            return replace(
                self._totals,
                in_memory=self._accepted - self._settled,
                spool_bytes=self._spool.size_bytes,
            )

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was recorded before this call is safe, in the database or on disk."""
        with self._changed:
            target = self._accepted
            return self._changed.wait_for(lambda: self._settled >= target, timeout_s)

    def settle(self, timeout_s: float) -> bool:
        """Waits until nothing is left outside the database."""
        with self._changed:
            return self._changed.wait_for(lambda: self._settled == self._accepted and self._spool.is_empty, timeout_s)

    def close(self, deadline_s: float = 10.0) -> bool:
        """Makes what is left safe, within the deadline, and ends. False when something was lost.

        Does not wait for a database that is down: the spool keeps history for the next start.
        """
        with self._changed:
            if self._close_by_s is None:
                self._close_by_s = time.monotonic() + deadline_s
            self._changed.notify_all()
        self._thread.join(deadline_s)
        with self._spool_lock:
            if not self._taken_over:
                self._take_over()
        lost = self.counts().in_memory
        if lost:
            log.error("history_lost_at_close", values=lost, why=self.counts().last_error)
        return lost == 0

    # ------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        while self._wait():
            try:
                self._work()
            except Exception:  # a defect here must not end the writing of history for good
                log.exception("history_recorder_stumbled")
                time.sleep(self._retry_s)

    def _wait(self) -> bool:
        """Until there is something to do; False when there is nothing left to do for good."""
        with self._changed:
            while not self._queue or self._in_hand:
                now_s = time.monotonic()
                spooled = not self._spool.is_empty
                if self._close_by_s is not None and (
                    now_s >= self._close_by_s or (not self._in_hand and not (spooled and self._totals.database_ok))
                ):
                    return False
                if not spooled and not self._in_hand:
                    self._changed.wait()
                elif now_s >= self._retry_at_s:
                    return True
                else:
                    self._changed.wait(min(self._retry_at_s, self._close_by_s or self._retry_at_s) - now_s)
            # More will follow in a moment: one transaction for all of it.
            self._changed.wait_for(lambda: self._close_by_s is not None, LINGER_S)
        return True

    def _work(self) -> None:
        self._take_from_queue()
        self._place()
        if self._is_due() and not self._spool.is_empty:
            self._drain()

    def _take_from_queue(self) -> None:
        """Moves values into the hand as rows. A value is always in one of the two, for `_take_over` to find."""
        with self._changed:
            values = list(islice(self._queue, BATCH_ROWS - len(self._in_hand)))
        rows = []
        for value in values:
            try:
                rows.append(to_row(value))
            except Exception as error:  # whatever it is, it is this value's fault and no other's
                self._refuse(repr(value)[:2000], str(error))
        with self._changed:
            if self._taken_over:
                return
            for _ in values:
                self._queue.popleft()
            self._in_hand.extend(rows)
            self._settled += len(values) - len(rows)
            self._changed.notify_all()

    def _place(self) -> None:
        """Gets what is in hand into the database, or else onto the disk. Nothing overtakes what is spooled."""
        rows = list(self._in_hand)
        if not rows:
            return
        if self._spool.is_empty and self._is_due() and self._write(rows):
            safe = len(rows)
        else:
            safe = self._append_to_spool(rows)
        with self._changed:
            if not self._taken_over:
                del self._in_hand[:safe]
                self._settled += safe
                self._changed.notify_all()

    def _drain(self) -> None:
        """Brings one batch from the spool into the database: new values get their turn between batches."""
        try:
            with self._spool_lock:
                lines = [] if self._taken_over else self._spool.peek(BATCH_ROWS)
        except OSError as error:
            self._failed(f"{self._spool.path}: {error.strerror}")
            return
        rows, bad = [], []
        for line in lines:
            try:
                rows.append(from_line(line))
            except ValueError as error:
                bad.append((line, str(error)))
        if not self._write(rows):
            return
        for line, why in bad:
            self._refuse(line.decode(errors="replace"), why)
        with self._spool_lock:
            if not self._taken_over:
                self._spool.advance(lines)
                if self._spool.is_empty:
                    log.info("history_spool_drained")
        with self._changed:
            self._changed.notify_all()

    def _write(self, rows: list[Row]) -> bool:
        """True when the database has every row that it will ever take; a refused row is set aside by itself."""
        try:
            new = write_rows(self._engine, rows)
        except StoreUnavailable as error:
            self._failed(error.why)
            return False
        except RowRefused as error:
            if len(rows) > 1:
                half = len(rows) // 2
                return self._write(rows[:half]) and self._write(rows[half:])
            self._refuse(to_line(rows[0]).decode(), str(error))
            return True
        with self._changed:
            back = not self._totals.database_ok
            self._totals = replace(
                self._totals,
                recorded=self._totals.recorded + new,
                repeated=self._totals.repeated + len(rows) - new,
                database_ok=True,
            )
        if back:
            log.info("history_database_back", spooled_bytes=self._spool.size_bytes)
        return True

    def _append_to_spool(self, rows: list[Row]) -> int:
        lines = [to_line(row) for row in rows]
        with self._spool_lock:
            safe = 0 if self._taken_over else self._spool.append(lines)
        full = safe < len(rows)
        with self._changed:
            first = full and not self._disk_full
            self._disk_full = full
            self._totals = replace(self._totals, spooled=self._totals.spooled + safe)
            if full:
                self._totals = replace(self._totals, last_error=self._spool.last_error)
        if first:
            log.error("history_only_in_memory", why=self._spool.last_error)
        return safe

    def _failed(self, why: str) -> None:
        with self._changed:
            first = self._totals.database_ok
            self._totals = replace(self._totals, database_ok=False, last_error=why)
            self._retry_at_s = time.monotonic() + self._retry_s
        if first:
            log.warning("history_goes_to_spool", why=why)

    def _refuse(self, text: str, why: str) -> None:
        """Sets aside what can never be written, for a person to look at."""
        log.error("history_row_refused", why=why, file=str(self._refused_path))
        with self._changed:
            self._totals = replace(self._totals, refused=self._totals.refused + 1, last_error=why)
        with suppress(OSError), self._refused_path.open("a") as file:
            if file.tell() < REFUSED_LIMIT_BYTES:
                file.write(json.dumps({"why": why, "row": text}) + "\n")

    def _is_due(self) -> bool:
        return time.monotonic() >= self._retry_at_s

    # ---------------------------------------------------------------------------------------------- the end

    def _take_over(self) -> None:
        """Ends the use of the spool; what a thread that hangs in the database has left goes there first. (Should
        its transaction succeed after all, the same rows are found to be repeats at the next start.)"""
        with self._changed:
            self._taken_over = True
            rows = list(self._in_hand)
            for value in self._queue:
                with suppress(Exception):  # a value that makes no row stays counted as not safe
                    rows.append(to_row(value))
        safe = self._spool.append([to_line(row) for row in rows])
        self._spool.close()
        with self._changed:
            self._settled += safe
            self._totals = replace(self._totals, spooled=self._totals.spooled + safe)
            if safe < len(rows):
                self._totals = replace(self._totals, last_error=self._spool.last_error)
        self._engine.dispose()
