"""The gateway's metrics against a golden file: names, kinds, labels and what the closed sets of reasons are."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prometheus_client import disable_created_metrics, generate_latest

from controller.gateway.access import Access
from controller.gateway.brain import Outcome
from controller.gateway.config import LimitsConfig, PickerConfig
from controller.gateway.metrics import make_registry
from controller.picker.picker import Picker
from tests.unit.test_gateway_choices import asked, client_of, gateway, send

GOLDEN = Path(__file__).with_name("gateway_metrics.txt")


def shape(page: str) -> str:
    """Without values; of a histogram's bounds and the classes one line each, since they are many and alike."""
    lines = dict.fromkeys(
        re.sub(r'le="[^"]*"', 'le="…"', re.sub(r'class="[SML]{2}"', 'class="…"', line.rpartition(" ")[0]))
        if not line.startswith("#")
        else line
        for line in page.splitlines()
    )
    return "\n".join(lines) + "\n"


async def test_names_kinds_and_labels_are_the_known_ones() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call] # as in the daemon
    brain, clock = gateway(overcommit=2.0)
    for outcome in Outcome:
        brain.done(send(brain, asked("hello")), outcome)
    brain.completed(send(brain), 12, {"prompt_tokens": 5}, 0.1, [0.02] * 11)
    brain.joules["SS"] += 1.0
    picker = Picker(brain, LimitsConfig(), PickerConfig(), Access(None), "")
    text = shape(generate_latest(make_registry(brain, client_of(brain), clock, picker)).decode())
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "run with UPDATE_GOLDEN=1 and look at the difference"
