"""`dynamollm choice list | explain`: why single requests went where they did, from the gateways' sample of choices."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table
from sqlalchemy import Engine

from common.errors import UserError
from controller.cli.shared import DEFAULT_URL, JsonOption, UrlOption, console, moment

# What each reason means, in the words of a sentence: "i2 held more work for its capacity".
LOST = {
    "load": "held more work for its capacity",
    "energy": "would have cost more joules for one request more",
    "kv_use": "had more of its KV cache in use",
    "prefix": "had not read this beginning of a prompt",
    "not_ready": "takes nothing new: it drains, warms or stands by",
    "suspect": "failed a request a moment ago",
    "full": "was full up to its limit",
    "smaller_pool": "is in a pool too small for the class",
    "pool_not_needed": "is in a larger pool, which was not needed",
}
DECIDED = {
    "only_one": "it alone of its pool had room",
    "load": "it held the least work for its capacity",
    "energy": "one request more costs the fewest joules there",
    "kv_use": "the least of its KV cache was in use",
    "prefix": "it had just read the same beginning of a prompt",
    "spilled": "the class's own pool was full, and this one dominates it",
    "overflow": "all instances were full, so it waits inside the engine",
}


def mount(choice: typer.Typer) -> None:
    choice.command("list")(choice_list)
    choice.command("explain")(choice_explain)


def choice_list(
    since: Annotated[str, typer.Option("--from", help="UTC time, or an age: 6h, 7d.")] = "1h",
    pool: Annotated[str, typer.Option(help="Only choices of this pool.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """The newest sampled choices, one line each."""
    from controller.store.repositories import list_choices

    found = list_choices(_engine(url), since_s=moment(since, time.time()), pool=pool, limit=limit)
    if as_json:
        typer.echo(json.dumps([_plain(each) for each in found], indent=2))
        return
    table = Table("id", "at (UTC)", "gateway", "class", "tokens", "pool", "instance", "decided by", "queue ms", "of")
    for each in found:
        record = each.record
        table.add_row(
            str(each.id),
            _at(record.chosen_at_s),
            record.gateway_id,
            str(record.request_class),
            str(record.input_tokens),
            record.pool,
            record.instance_id,
            record.decided_by,
            f"{record.queue_ms:.1f}",
            str(record.speaks_for),
        )
    console.print(table)


def choice_explain(
    number: Annotated[int, typer.Argument(metavar="ID", min=1)],
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """One choice in plain sentences: what was chosen and why, and why each other instance lost."""
    from controller.store.repositories import get_choice

    found = get_choice(_engine(url), number)
    if found is None:
        raise UserError(f"there is no choice {number}.", "`dynamollm choice list` shows the newest.")
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=2))
        return
    for sentence in explained(found):
        console.print(sentence, highlight=False, soft_wrap=True)


def explained(found: Any) -> list[str]:
    """Sentences of one stored choice."""
    record = found.record
    said = [
        f"Choice {found.id} of gateway {record.gateway_id}, {_at(record.chosen_at_s)} UTC, one of {record.speaks_for}: "
        f"a request of class {record.request_class} with {record.input_tokens} prompt tokens for {record.model} went "
        f"to {record.instance_id} of pool {record.pool} after {record.queue_ms:.1f} ms in the queue: "
        f"{DECIDED.get(record.decided_by, record.decided_by)}."
    ]
    for other in record.alternatives:
        why = LOST.get(str(other["lost_by"]), str(other["lost_by"]))
        held = f"{other['in_flight']} in flight, {other['pending_tokens']} prompt tokens unread"
        said.append(f"{other['instance']} of pool {other['pool']} {why} ({held}).")
    return said


def _engine(url: str) -> Engine:
    from controller.store.engine import open_engine
    from controller.store.migrate import require_current

    engine = open_engine(url)
    require_current(engine)
    return engine


def _plain(found: Any) -> dict[str, object]:
    record = found.record
    return {
        "id": found.id,
        "chosen_at": datetime.fromtimestamp(record.chosen_at_s, tz=UTC).isoformat(),
        "gateway": record.gateway_id,
        "model": record.model,
        "class": str(record.request_class),
        "input_tokens": record.input_tokens,
        "pool": record.pool,
        "instance": record.instance_id,
        "decided_by": record.decided_by,
        "queue_ms": record.queue_ms,
        "speaks_for": record.speaks_for,
        "alternatives": list(record.alternatives),
    }


def _at(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
