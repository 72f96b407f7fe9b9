"""Where history waits while the database cannot take it: one append-only file of JSON lines, bounded in bytes.

The recorder appends at the end and drains from the front; the file is cut to nothing once all of it is in the
database. A process that is killed leaves at worst one torn line at the end, which the next one cuts off; what was
drained but not yet cut is drained again, and the database's unique keys drop the repeats.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import EXIT_ALREADY_RUNNING, UserError


class Spool:
    """One process, one thread at a time. Opening takes the folder's lock and raises UserError when another has it."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.path = folder / "spool.jsonl"
        self.limit_bytes = limit_bytes
        self.last_error = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(folder / "lock")
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            _sync_folder(folder)
            self._size = self._cut_torn_tail()
        except OSError as error:
            raise UserError(
                f"the spool folder {folder} cannot be used: {error.strerror}.",
                "Check that it exists, its owner and mode, and the space on its disk.",
            ) from None
        self._drained = 0

    @property
    def is_empty(self) -> bool:
        return self._drained == self._size

    @property
    def size_bytes(self) -> int:
        """Bytes that wait for the database."""
        return self._size - self._drained

    def append(self, lines: Sequence[bytes]) -> int:
        """Writes as many of the lines, from the first, as the bound allows; returns how many are safe on disk.

        A disk that is full or broken takes none of them; `last_error` then says why.
        """
        taken, total = 0, 0
        for line in lines:
            if self._size + total + len(line) > self.limit_bytes:
                self.last_error = f"the spool has reached its bound of {self.limit_bytes} bytes"
                break
            taken, total = taken + 1, total + len(line)
        if not taken:
            return 0
        try:
            os.ftruncate(self._file, self._size)  # a failed append may have left a part behind
            _write_all(self._file, b"".join(lines[:taken]), self._size)
            os.fsync(self._file)
        except OSError as error:
            self.last_error = f"{self.path}: {error.strerror}"
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            return 0
        self._size += total
        return taken

    def peek(self, count: int, limit_bytes: int = 4 * 1024 * 1024) -> list[bytes]:
        """Up to `count` of the oldest lines; at least one if there is any. Raises OSError."""
        while True:
            want = min(limit_bytes, self.size_bytes)
            data = os.pread(self._file, want, self._drained)
            end = data.rfind(b"\n") + 1
            if len(data) < want:  # somebody has cut the file: what is gone cannot be waited for
                self._size = self._drained + end
                self.last_error = f"{self.path} was cut by somebody else"
            if end or not data:
                return data[:end].splitlines(keepends=True)[:count]
            limit_bytes *= 2  # the first line is longer than that

    def advance(self, lines: Sequence[bytes]) -> None:
        """The lines, as peeked, are in the database: they need not wait any longer."""
        self._drained += sum(len(line) for line in lines)
        if self.is_empty:
            os.ftruncate(self._file, 0)
            self._size = self._drained = 0

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)

    def _cut_torn_tail(self) -> int:
        size = os.fstat(self._file).st_size
        end = size
        while end > 0:
            start = max(0, end - 65536)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != size:
            os.ftruncate(self._file, end)
        return end


def _take_lock(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        raise UserError(
            f"the spool folder {path.parent} is in use by process {holder or '(unknown)'}.",
            "Stop that controller first, or give this one a folder of its own.",
            EXIT_ALREADY_RUNNING,
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
