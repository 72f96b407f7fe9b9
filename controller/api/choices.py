"""The gateways' sampled choices, from a load report to rows of the history. Pure.

A gateway is trusted to choose, not to fill the history: what it tells is bounded here in number and in length.
"""

from __future__ import annotations

from controller.domain.classes import RequestClass
from controller.domain.decision import Json
from controller.store.records import ChoiceRecord
from dynamollm.v1 import controller_pb2 as pb

# Of one report: more than a gateway may sample in a minute, told again after a while without a controller.
MOST_CHOICES = 600
MOST_ALTERNATIVES = 16
MOST_CHARACTERS = 200


def choices_from_wire(message: pb.ReportLoadRequest) -> list[ChoiceRecord]:
    """Rows for the history. Raises ValueError for an unknown class name."""
    return [
        ChoiceRecord(
            gateway_id=_short(message.gateway_id),
            epoch=_short(message.epoch),
            number=choice.number,
            chosen_at_s=choice.chosen_at.seconds + choice.chosen_at.nanos / 1e9,
            model=_short(choice.model),
            request_class=RequestClass.parse(choice.request_class),
            input_tokens=choice.input_tokens,
            pool=_short(choice.pool),
            instance_id=_short(choice.instance_id),
            decided_by=_short(choice.decided_by),
            queue_ms=choice.queue_ms,
            speaks_for=choice.speaks_for,
            alternatives=[_alternative(each) for each in choice.alternatives[:MOST_ALTERNATIVES]],
        )
        for choice in message.choices[:MOST_CHOICES]
    ]


def _alternative(each: pb.ChoiceAlternative) -> Json:
    return {
        "instance": _short(each.instance_id),
        "pool": _short(each.pool),
        "lost_by": _short(each.lost_by),
        "in_flight": each.in_flight,
        "pending_tokens": each.pending_tokens,
        "score": round(each.score, 6) if each.HasField("score") else None,
    }


def _short(text: str) -> str:
    return text[:MOST_CHARACTERS]
