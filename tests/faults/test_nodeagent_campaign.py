"""Twenty kills at random moments, some between journal and write; the benchmark does two hundred."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.killing import kill_many
from tests.nodehost import NodeHost


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_twenty_kills(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    config = {"gpu": {"call_deadline_s": 0.5}, "controls": {"restore_retry_s": 0.2}}
    with NodeHost(tmp_path, gpus=4, config=config) as host:
        told = kill_many(host, 20, seed)
    assert told.problems == [], f"seed {seed}"
    assert told.kills == 20
