"""GPUs that are not what the profile was measured on: everything slower and hungrier by the same share."""

from __future__ import annotations

import pytest

from simulator.physics import Physics

BASE = Physics.load()


@pytest.mark.parametrize("share", [-0.1, 0.1])
@pytest.mark.parametrize(
    ("batch", "context", "prefill"), [(1, 500, ()), (64, 40_000, ((512, 0),)), (0, 0, ((1024, 2048),))]
)
def test_every_iteration_takes_and_draws_its_share_more(share, batch, context, prefill):
    off = BASE.off_by(share)
    for tp in (2, 8):
        for mhz in (800, 1980):
            seconds, watts = BASE.iteration(tp, mhz, batch, context, prefill)
            other_seconds, other_watts = off.iteration(tp, mhz, batch, context, prefill)
            assert other_seconds == pytest.approx(seconds * (1 + share), rel=1e-9)
            limit_w = BASE.parameters.power_limit_w
            if max(watts, other_watts) < 0.9 * limit_w:
                assert other_watts == pytest.approx(watts * (1 + share), rel=1e-9)
            else:  # cut at the board's limit
                assert other_watts <= limit_w


def test_idle_power_follows_and_memory_does_not():
    off = BASE.off_by(0.1)
    assert off.idle_w(1980, context=True) == pytest.approx(1.1 * BASE.idle_w(1980, context=True))
    assert off.kv_capacity_tokens(8) == BASE.kv_capacity_tokens(8)
    assert off.parameters.power_limit_w == BASE.parameters.power_limit_w


def test_no_mismatch_is_the_same_physics():
    assert BASE.off_by(0.0) is BASE
    assert BASE.off_by(0.1).name != BASE.name
