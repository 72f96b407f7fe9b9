"""The agent's files: atomic durable writes, and the lock that lets one agent own a state directory.

Everything the agent must still know after it was killed goes through `write_durably`. The lock is a `flock`: the
kernel drops it when the process dies, however it dies, so a stale file never blocks a start.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from common.errors import EXIT_ALREADY_RUNNING, UserError

LOCK_FILE = "agent.lock"


def write_durably(path: Path, data: bytes, mode: int = 0o640) -> None:
    """Replaces `path` by `data` so that a crash at any instant leaves the old or the new content, never a mix.

    Temporary file, fsync, rename, fsync of the directory. Raises OSError; the old content then still stands.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames and removals in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_aside(path: Path, stamp: int) -> Path:
    """Gives an unreadable file a second name, for a person to look at; returns that name. Raises OSError."""
    for attempt in range(100):
        aside = path.with_name(f"{path.name}.unreadable-{stamp}{f'-{attempt}' if attempt else ''}")
        try:
            os.link(path, aside)
        except FileExistsError:
            continue
        return aside
    raise FileExistsError(f"{path}: a hundred unreadable copies of this second are kept already")


def set_aside(path: Path, stamp: int) -> Path:
    """Renames an unreadable file so that it is kept for a person to look at; returns its new name."""
    aside = path.with_name(f"{path.name}.unreadable-{stamp}")
    path.rename(aside)
    sync_directory(path.parent)
    return aside


def ensure_directory(path: Path) -> None:
    """Creates a state directory (0750) or says why it cannot be used."""
    try:
        path.mkdir(mode=0o750, parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path}: is a file, not a directory.", "Set state_dir to a directory.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be created: {error.strerror}.", "Set state_dir to a writable place.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written by this user.", "Run as root or set state_dir.")


class StateLock:
    """Exclusive ownership of a state directory for as long as this object is held."""

    def __init__(self, state_dir: Path) -> None:
        """Takes the lock or raises UserError that names the holder's pid."""
        path = state_dir / LOCK_FILE
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}.", "Check the state directory's owner and mode.") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise UserError(
                f"{state_dir}: held by a running agent (pid {holder}).",
                "Stop that one first; two agents must never drive the same GPUs.",
                EXIT_ALREADY_RUNNING,
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Gives the directory back. The file stays: removing it would let two holders lock different files."""
        os.close(self._descriptor)
