"""What must be restored, on disk before it is done: the agent's promise that survives its own death.

An entry goes in before the first write to a control and comes out after its safe state was restored. Later writes to
the same control need no new entry: only *that* it was touched, and what was found, matters. A file that cannot be
read means unknown, never empty.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nodeagent.control.settings import ControlKey, ControlKind
from nodeagent.files import write_durably

VERSION = 1
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Intent:
    """One control that was, or is about to be, moved from its safe state."""

    key: ControlKey
    captured: float | None
    """What was found before the first write (a power limit in watts), where the control has a getter."""


class JournalUnreadable(Exception):
    """The file exists and cannot be trusted."""


class DurableTable(Generic[K, V]):
    """Entries in memory and on disk. Changes made at the same time share one write."""

    def __init__(self, path: Path, dump: Callable[[Iterable[V]], bytes], entries: Mapping[K, V]) -> None:
        self.entries: dict[K, V] = dict(entries)
        """What the disk may hold. Read-only for others."""
        self._path = path
        self._dump = dump
        self._writing = asyncio.Lock()
        self._wanted = 0
        self._durable = 0

    async def put(self, key: K, entry: V) -> None:
        """Returns once the entry is on disk. Raises OSError, and then the table is as it was."""
        before = self.entries.get(key)
        self.entries[key] = entry
        try:
            await self.commit()
        except BaseException:
            if before is None:
                self.entries.pop(key, None)
            else:
                self.entries[key] = before
            raise

    async def remove(self, key: K) -> None:
        """Returns once the entry is gone from disk. Raises OSError, and then the entry stays."""
        entry = self.entries.pop(key)
        try:
            await self.commit()
        except BaseException:
            self.entries[key] = entry
            raise

    async def commit(self) -> None:
        """Returns once the entries, as they are, are on disk. Raises OSError."""
        self._wanted += 1
        mine = self._wanted
        await asyncio.sleep(0)  # lets the other GPUs of a batch add theirs, so that eight cost one fsync
        async with self._writing:
            if self._durable >= mine:
                return
            upto, data = self._wanted, self._dump(self.entries.values())
            await asyncio.to_thread(write_durably, self._path, data)
            self._durable = upto


class Journal(DurableTable[ControlKey, Intent]):
    """The controls that must be restored."""

    def __init__(self, path: Path, boot_id: str, intents: Iterable[Intent] = ()) -> None:
        super().__init__(path, lambda entries: dump(boot_id, entries), {intent.key: intent for intent in intents})

    async def add(self, intent: Intent) -> None:
        """Returns once the entry is on disk. Raises OSError, and then has no entry."""
        await self.put(intent.key, intent)


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
