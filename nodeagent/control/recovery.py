"""Finds out, at start, what an earlier agent on this node may have left behind.

The answer is a journal whose entries have no leases; control/controls.py restores exactly those. Used by the daemon
before it serves, and by the `restore` command when the daemon is dead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.clock import Clock
from common.logs import get_logger
from nodeagent.control.caps import Caps, recover_caps
from nodeagent.control.journal import Intent, Journal, JournalUnreadable, dump, load
from nodeagent.control.settings import CONTROLS, ControlKey, ControlKind
from nodeagent.files import keep_aside, write_durably
from nodeagent.gpu.driver import GpuFacts
from nodeagent.gpu.inventory import Inventory
from nodeagent.gpu.worker import GpuWorker

log = get_logger(__name__)


def nothing_left(path: Path) -> bool:
    """Whether the journal can be read and is empty."""
    try:
        return not load(path)[1]
    except JournalUnreadable:
        return False


async def recover(
    caps_path: Path, journal_path: Path, boot_id: str, inventory: Inventory, clock: Clock
) -> tuple[Caps, Journal]:
    """Standing caps and journal: each helps the other out with the limits found before any write."""
    caps = await recover_caps(caps_path, boot_id, inventory, clock, found_before(journal_path, boot_id))
    return caps, recover_journal(journal_path, boot_id, inventory, clock, caps.found_w())


def found_before(path: Path, boot_id: str) -> dict[str, float]:
    """Power limits as found before this agent's first write since boot, by GPU, as far as the journal tells."""
    try:
        written_in, intents = load(path)
    except JournalUnreadable:
        return {}
    if written_in != boot_id:
        return {}
    limits = (intent for intent in intents if intent.key.kind is ControlKind.POWER_LIMIT)
    return {intent.key.gpu_uuid: intent.captured for intent in limits if intent.captured is not None}


def recover_journal(
    path: Path, boot_id: str, inventory: Inventory, clock: Clock, found_w: Mapping[str, float] | None = None
) -> Journal:
    """The journal as left behind; with everything this agent may touch if it cannot be read.

    `found_w`: power limits before any write, by GPU, where another record still knows them (control/caps.py).
    """
    try:
        written_in, intents = load(path)
    except JournalUnreadable as error:
        return _unknown(path, boot_id, inventory, clock, error, found_w or {})
    if written_in and written_in != boot_id:
        undone = [intent for intent in intents if not CONTROLS[intent.key.kind].restore_after_reboot]
        for intent in undone:
            log.info("undone by the reboot; left as it is", control=str(intent.key))
        intents = [intent for intent in intents if intent not in undone]
    return Journal(path, boot_id, intents)


def _unknown(
    path: Path,
    boot_id: str,
    inventory: Inventory,
    clock: Clock,
    error: JournalUnreadable,
    found_w: Mapping[str, float],
) -> Journal:
    def captured(worker: GpuWorker, kind: ControlKind, facts: GpuFacts) -> float | None:
        fallback = CONTROLS[kind].fallback(facts)
        return found_w.get(worker.uuid, fallback) if kind is ControlKind.POWER_LIMIT else fallback

    intents = [
        Intent(ControlKey(worker.uuid, kind), captured(worker, kind, worker.facts))
        for worker in inventory.workers
        if worker.facts is not None and not worker.facts.mig_enabled
        for kind in CONTROLS
    ]
    aside = ""
    try:
        # A second name first, the good file over it then: at no instant does the directory say "nothing to restore".
        aside = str(keep_aside(path, int(clock.wall_s())))
        write_durably(path, dump(boot_id, intents))
    except OSError as problem:
        log.error("unreadable journal stays in place", why=str(problem))
    log.error(
        "journal is unreadable: restoring every control of every GPU, power limits to the driver's default",
        why=str(error),
        kept_as=aside,
    )
    return Journal(path, boot_id, intents)
