"""Results of long searches on disk, under a key made of everything they depend on: another physics, another trace or
other code gives another key, and a second run reads the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from controller.domain.decision import canonical_json
from controller.policy import routing
from simulator.physics import Physics
from simulator.traces import Trace

_FOLDER = Path(__file__).parent
_MODULES = (
    "bound",
    "calibration",
    "energy_table",
    "grid",
    "grid_file",
    "loads",
    "outcome",
    "physics",
    "references",
    "traces",
)


def cached_json(folder: Path, name: str, physics: Physics, parts: object, make: Callable[[], Any]) -> Any:
    """What `make` gives (a JSON value), from `folder` where it was made before."""
    key = _digest(canonical_json([physics.identity(), _digest(_sources()), parts]).encode())
    file = folder / f"{name}-{key[:16]}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    value = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another process may read it at the same time.
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(value), encoding="utf-8")
    draft.replace(file)
    return value


def trace_digest(trace: Trace) -> str:
    return _digest(b"".join(column.tobytes() for column in (trace.arrival_s, trace.input_tokens, trace.output_tokens)))


def _digest(data: bytes | str) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


@cache
def _sources() -> str:
    """The code that such results depend on."""
    files = [*sorted((_FOLDER / "fast").glob("*.py")), *(_FOLDER / f"{name}.py" for name in _MODULES)]
    files += [Path(routing.__file__).with_name(f"{name}.py") for name in ("filter", "load", "table")]
    return "".join(file.read_text(encoding="utf-8") for file in files)
