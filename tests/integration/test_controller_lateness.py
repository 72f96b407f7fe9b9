"""The fast tick is not late because of what is slow: a solve all the time, a Postgres that answers in a second.

What it comes to in milliseconds is for `scripts/bench controller`. Here the slow things are so slow that a tick that
waited for any of them would be late by far more than a busy machine makes it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.lateness import TICK_S, measure
from tests.pg import Postgres, missing
from tests.troubled_solver import holding_on

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "PostgreSQL is here"),
    pytest.mark.slow,
    pytest.mark.timeout(120),
]

SECONDS = 6.0


def test_the_tick_waits_for_neither_solver_nor_database(tmp_path: Path) -> None:
    with Postgres() as server:
        found = measure(server, tmp_path, SECONDS, partial(holding_on, 60.0))
    assert found.solving, "a solve is under way"
    assert found.decisions > 0
    # Those that ask for decisions hold every thread of asyncio's for a second at a time.
    assert len(found.late_s) >= 0.5 * (SECONDS - 1) / TICK_S
    median_s = found.late_s[len(found.late_s) // 2]
    assert median_s <= 0.2 + found.noise_s, f"{median_s * 1e3:.1f} ms, the machine {found.noise_s * 1e3:.1f} ms"
