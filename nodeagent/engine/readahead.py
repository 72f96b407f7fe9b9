"""Reads weight files into the page cache while the old engine still drains, so that the new one loads from memory.

Only a hint to the kernel: nothing depends on it. Advice alone is cut down by the kernel to a few MiB a call, so the
files are read, in a thread, into a buffer that is thrown away.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.logs import get_logger

log = get_logger(__name__)

SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
CHUNK_BYTES = 8 << 20
MEMORY_SHARE = 0.5
"""Of the memory that is available, at most: the page cache must not push out what others need."""


@dataclass(slots=True)
class Progress:
    """How far it came."""

    bytes_read: int = 0
    seconds: float = 0.0
    done: bool = False


def weight_files(model: Path) -> list[Path]:
    """The weight files of a model directory (or the one file), in the order an engine loads them."""
    if model.is_file():
        return [model]
    try:
        return sorted(path for path in model.iterdir() if path.suffix in SUFFIXES and path.is_file())
    except OSError:
        return []


def weight_bytes(model: Path) -> int:
    """Their size; 0 when there are none."""
    return sum(path.stat().st_size for path in weight_files(model))


class ReadAhead:
    """One thread that reads a model's files once. `stop` ends it within one chunk."""

    def __init__(self, model: Path, limit_bytes: int) -> None:
        self.progress = Progress()
        self._model = model
        self._limit_bytes = min(limit_bytes, int(psutil.virtual_memory().available * MEMORY_SHARE))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it; does not wait."""
        self._stop.set()

    def join(self, timeout_s: float | None = None) -> None:
        """Waits until it has ended."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        began_s = time.monotonic()
        buffer = bytearray(CHUNK_BYTES)
        try:
            for path in weight_files(self._model):
                self._read(path, buffer)
        except OSError as error:
            log.warning("weight files are not read ahead", model=str(self._model), why=str(error))
        self.progress.seconds = time.monotonic() - began_s
        self.progress.done = not self._stop.is_set()
        log.info(
            "weight files read ahead",
            model=str(self._model),
            mib=self.progress.bytes_read >> 20,
            seconds=round(self.progress.seconds, 2),
        )

    def _read(self, path: Path, buffer: bytearray) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while not self._stop.is_set() and self.progress.bytes_read < self._limit_bytes:
                count = os.readv(descriptor, [buffer])
                if count == 0:
                    return
                self.progress.bytes_read += count
        finally:
            os.close(descriptor)
