"""The core's whole state as one text, and back: where a replay begins.

What follows from settings and profile (curves, columns) is not written. Everything else of `State` is, field by field
from its annotations, so that nothing a decision depends on can be forgotten.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from common.typed_json import decode, encode
from controller.domain.decision import canonical_json
from controller.loop.profile_in_use import refit
from controller.loop.settings import LoopSettings
from controller.loop.state import State
from controller.loop.week import WeekBook

# Made anew from settings and profile.
DERIVED = frozenset({"settings", "profile", "profile_checksum", "fit", "columns", "capped_fits"})


def take(state: State, expected_nodes: int) -> Callable[[], str]:
    """Copies what may change and returns what makes the text: that takes longer, and may be done in another thread."""
    settings, checksum = state.settings, state.profile_checksum
    kept = {field.name: _copied(getattr(state, field.name)) for field in fields(state) if field.name not in DERIVED}

    def text() -> str:
        hints = get_type_hints(State)
        values = {name: encode(hints[name], value) for name, value in kept.items()}
        return canonical_json(
            {
                "settings": encode(LoopSettings, settings),
                "profile": checksum,
                "expected_nodes": expected_nodes,
                "state": values,
            }
        )

    return text


def settings_of(data: dict[str, Any]) -> LoopSettings:
    """Raises ValueError where the settings were written by a version with others."""
    settings = decode(LoopSettings, data["settings"])
    assert isinstance(settings, LoopSettings)
    return settings


def restore(state: State, data: dict[str, Any]) -> None:
    """Puts a snapshot's values into a freshly made core's state. Raises ValueError when it is another version's."""
    hints = get_type_hints(State)
    names = {field.name for field in fields(state)} - DERIVED
    if names != set(data["state"]):
        raise ValueError(f"a snapshot of another version: {sorted(names ^ set(data['state']))} differ")
    for name, value in data["state"].items():
        setattr(state, name, decode(hints[name], value))
    if state.corrections or state.paces:
        refit(state)


def week_of(text: str | None) -> WeekBook | None:
    """The shape of the week in a snapshot of whatever version; None where it is missing or written otherwise. What was
    counted of the half hour under way is left: it has a gap now."""
    try:
        return None if text is None else WeekBook(decode(WeekBook, json.loads(text)["state"]["week"]).slots)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _copied(value: Any) -> Any:
    """A copy of every container and of every dataclass that may change; frozen values are shared."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | set | deque):
        return type(value)(_copied(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type) and not _frozen(value):
        made = copy.copy(value)
        for field in fields(value):
            setattr(made, field.name, _copied(getattr(value, field.name)))
        return made
    return value


def _frozen(value: Any) -> bool:
    return bool(value.__dataclass_params__.frozen)
