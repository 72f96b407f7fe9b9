"""The one bit that must survive even a full disk: whether the watts floor has tripped.

Arming makes an empty file while there is room; tripping renames it, which needs none. guard.json says the same with
reasons, but a full disk can keep it from being written in the very moment that counts.
"""

from __future__ import annotations

import os
from pathlib import Path

from nodeagent.files import sync_directory

ARMED, TRIPPED = "watts-floor.armed", "watts-floor.tripped"


def tripped(state_dir: Path) -> bool:
    """Whether the floor has tripped and was not lifted."""
    return (state_dir / TRIPPED).exists()


def arm(state_dir: Path) -> None:
    """Makes sure that a later `trip` needs no room. Raises OSError."""
    if not tripped(state_dir):
        _create(state_dir / ARMED)


def trip(state_dir: Path) -> None:
    """Remembers the trip. Raises OSError only if it was never armed and there is no room, or no access."""
    try:
        (state_dir / ARMED).rename(state_dir / TRIPPED)
    except FileNotFoundError:
        _create(state_dir / TRIPPED)
    sync_directory(state_dir)


def lift(state_dir: Path) -> None:
    """Forgets the trip and is armed again. Raises OSError, and then nothing has changed."""
    try:
        (state_dir / TRIPPED).rename(state_dir / ARMED)
    except FileNotFoundError:
        return
    sync_directory(state_dir)


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640))
