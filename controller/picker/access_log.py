"""What Envoy's access log tells of requests that were chosen for: still running, over, and how.

Envoy carries the answer alone, so a picker that dies harms no running stream; the log is how it learns that an instance
has room again. Entries come in batches, one small message for many requests.
"""

from __future__ import annotations

from typing import Any

from common.logs import get_logger
from controller.gateway.brain import Outcome
from controller.picker.exchange import OUR_DETAILS, TICKET_KEY, TICKET_NAMESPACE, Desk
from controller.picker.held import HeldTicket

_log = get_logger(__name__)
# Envoy's response flags that mean an instance failed, before the answer or within it.
UPSTREAM_FLAGS = (
    "failed_local_healthcheck",
    "no_healthy_upstream",
    "upstream_request_timeout",
    "upstream_remote_reset",
    "upstream_connection_failure",
    "upstream_connection_termination",
    "upstream_overflow",
    "upstream_retry_limit_exceeded",
    "upstream_protocol_error",
    "stream_idle_timeout",
)


def take(desk: Desk, message: Any) -> None:
    """One StreamAccessLogsMessage."""
    for entry in message.http_logs.log_entry:
        common = entry.common_properties
        metadata = common.metadata.filter_metadata
        if TICKET_NAMESPACE in metadata:
            name = metadata[TICKET_NAMESPACE].fields[TICKET_KEY].string_value
        elif (lost := _lost(desk, entry)) is not None:
            name = lost
        else:
            continue
        held = desk.held.hear(name)
        if held is None:
            continue
        _outgrown(desk, held, entry)
        if not common.intermediate_log_entry:
            _end(desk, name, held, entry)


def _lost(desk: Desk, entry: Any) -> str | None:
    """The ticket of a request that was over before Envoy heard what was chosen for it: its client left in that moment,
    most of all. Without it such tickets would hold their places until they are forgotten."""
    if entry.common_properties.intermediate_log_entry:
        return None
    if entry.response.response_code_details.startswith(OUR_DETAILS):
        return None  # refused
    return desk.held.named(entry.request.request_id)


def _outgrown(desk: Desk, held: HeldTicket, entry: Any) -> None:
    """An answer that was not shown, told from its bytes: noticed while it runs, at the grain of Envoy's entries."""
    tokens = desk.tokens_in(held.ticket.asked, entry.response.response_body_bytes)
    if tokens > desk.brain.output_bound_tokens(held.ticket):
        desk.brain.outgrew(held.ticket)


def _end(desk: Desk, name: str, held: HeldTicket, entry: Any) -> None:
    common, status = entry.common_properties, entry.response.response_code.value
    flags = common.response_flags
    failed = status >= 500 or any(getattr(flags, flag) for flag in UPSTREAM_FLAGS)
    if failed or common.upstream_request_attempt_count > 1:
        # With several attempts the first choice has failed, whatever became of the request.
        desk.brain.suspect(held.instance.instance_id)
        _log.warning(
            "engine_failed",
            instance=held.instance.instance_id,
            attempts=common.upstream_request_attempt_count,
            status=status,
            reason=entry.response.response_code_details,
        )
    model = held.ticket.asked.model
    if failed:
        outcome = Outcome.FAILED
    elif flags.downstream_connection_termination or flags.downstream_remote_reset or not status:
        outcome = Outcome.CLIENT_LEFT
    elif status >= 400:
        outcome = Outcome.REJECTED
    else:
        outcome = Outcome.SERVED
        if not held.observed:
            desk.unseen[model] = desk.unseen.get(model, 0) + 1
    desk.held.end(name, outcome)
