"""What must be restored, on disk before it is done: the agent's promise that survives its own death.

An entry goes in before the first write to a control and comes out after its safe state was restored. Later writes to
the same control need no new entry: only *that* it was touched, and what was found, matters. A file that cannot be
read means unknown, never empty.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nodeagent.control.settings import ControlKey, ControlKind
from nodeagent.files import write_durably

VERSION = 1


@dataclass(frozen=True, slots=True)
class Intent:
    """One control that was, or is about to be, moved from its safe state."""

    key: ControlKey
    captured: float | None
    """What was found before the first write (a power limit in watts), where the control has a getter."""


class JournalUnreadable(Exception):
    """The file exists and cannot be trusted."""


class Journal:
    """The entries, in memory and on disk. Changes made at the same time share one write."""

    def __init__(self, path: Path, boot_id: str, intents: Iterable[Intent] = ()) -> None:
        self.entries: dict[ControlKey, Intent] = {intent.key: intent for intent in intents}
        """What the disk may hold. Read-only for others."""
        self._path = path
        self._boot_id = boot_id
        self._writing = asyncio.Lock()
        self._wanted = 0
        self._durable = 0

    async def add(self, intent: Intent) -> None:
        """Returns once the entry is on disk. Raises OSError, and then has no entry."""
        self.entries[intent.key] = intent
        try:
            await self._commit()
        except BaseException:
            self.entries.pop(intent.key, None)
            raise

    async def remove(self, key: ControlKey) -> None:
        """Returns once the entry is gone from disk. Raises OSError, and then the entry stays."""
        intent = self.entries.pop(key)
        try:
            await self._commit()
        except BaseException:
            self.entries[key] = intent
            raise

    async def _commit(self) -> None:
        self._wanted += 1
        mine = self._wanted
        await asyncio.sleep(0)  # lets the other GPUs of a batch add theirs, so that eight cost one fsync
        async with self._writing:
            if self._durable >= mine:
                return
            upto, data = self._wanted, dump(self._boot_id, self.entries.values())
            await asyncio.to_thread(write_durably, self._path, data)
            self._durable = upto


def dump(boot_id: str, intents: Iterable[Intent]) -> bytes:
    """The file's bytes."""
    entries = [{"gpu_uuid": i.key.gpu_uuid, "control": i.key.kind.value, "captured": i.captured} for i in intents]
    return json.dumps({"version": VERSION, "boot_id": boot_id, "entries": entries}, indent=1).encode()


def load(path: Path) -> tuple[str, list[Intent]]:
    """Boot id and entries. No file means nothing was ever written. Raises JournalUnreadable."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return "", []
    except (OSError, ValueError) as error:
        raise JournalUnreadable(f"{path}: {error}") from None
    try:
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r}")
        boot_id = data["boot_id"]
        intents = [_intent(item) for item in data["entries"]]
        if not isinstance(boot_id, str):
            raise ValueError("boot_id is not a string")
    except (KeyError, TypeError, ValueError) as error:
        raise JournalUnreadable(f"{path}: not a journal: {error}") from None
    return boot_id, intents


def _intent(item: dict[str, object]) -> Intent:
    uuid, captured = item["gpu_uuid"], item["captured"]
    if not isinstance(uuid, str) or not uuid or not (captured is None or isinstance(captured, int | float)):
        raise ValueError(f"bad entry {item!r}")
    return Intent(ControlKey(uuid, ControlKind(item["control"])), None if captured is None else float(captured))
