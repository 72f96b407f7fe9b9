"""Calibration of a host through its agent: real engines (emulated), real leases, real load, in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.calibrate.node import SensorError
from controller.calibrate.sweep import Progress, SweepPlan, SweepSettings
from controller.cli.calibrate_node import Host, calibrate_host, plan_for
from controller.domain.classes import by_input
from controller.domain.slo import Slo
from controller.profile.fit import fit
from controller.profile.table import Profile
from dynamollm.v1 import node_agent_pb2 as pb
from tests.nodehost import MODEL, NodeHost

MIX = ((40, 6), (60, 8), (80, 10))
QUICK = SweepSettings(
    gate_requests=20,
    least_requests=20,
    curve_requests=20,
    first_rate_rps=8.0,
    growth=4.0,
    refinements=0,
    curve_shares=(0.5,),
    cap_shares=(0.5,),
)
PLAN = SweepPlan(
    groups=(by_input("short", "SML"),),
    tps=(4,),
    clocks_mhz=(1005, 1980),
    slo=Slo(ttft_s_ms=400.0, ttft_m_ms=400.0, ttft_l_ms=400.0, tbt_ms=5000.0, token_gap_p99_ms=5000.0),
    settings=QUICK,
    caps_w=(300.0,),
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[NodeHost]:
    with NodeHost(tmp_path, gpus=4) as made:
        made.start()
        yield made


def calibrate(host: NodeHost, cache: Path, seen: list[Progress] | None = None) -> Profile:
    """Tried anew where this machine was too busy for a moment: it goes on from what is in the cache."""
    told = seen.append if seen is not None else None
    for left in (2, 1, 0):
        try:
            return calibrate_host(Host(f"unix:{host.socket}", MODEL, "bf16", 1.0), PLAN, MIX, cache, told)
        except SensorError as error:
            if not left or "too busy" not in str(error):
                raise
    raise AssertionError


def test_a_host_is_measured_and_left_as_it_was(host: NodeHost, tmp_path: Path) -> None:
    seen: list[Progress] = []
    profile = calibrate(host, tmp_path / "cache", seen)
    assert profile.engine.startswith("vllm ")
    assert profile.gpu
    assert {p.mhz for p in profile.points} == {1005, 1980}
    assert {p.cap_w for p in profile.cap_points} == {300.0}
    assert {row.phase for row in profile.actuators} >= {"serving"}
    assert 0 < profile.parked_w < 100
    idle = {p.mhz: p.power_w for p in profile.idle}
    assert 4 * profile.parked_w < idle[210] < idle[1980]
    assert all(p.power_w >= 0.9 * idle[p.mhz] for p in profile.points)
    assert profile.starts[4].start_s > 0
    assert fit(profile).curves
    assert Profile.from_json(profile.to_json()) == profile
    assert "requests/s" in seen[0].sentence
    assert not host.stub.ListControls(pb.ListControlsRequest(), timeout=10).controls
    assert not host.engine_pids()


def test_a_busy_host_is_refused(host: NodeHost, tmp_path: Path) -> None:
    host.launch("somebody", [0, 1])
    with pytest.raises(SensorError, match="not idle: somebody"):
        calibrate(host, tmp_path)


def test_the_plan_of_a_host_is_short() -> None:
    plan = plan_for(SweepPlan(caps_w=(400.0, 550.0)), "2,4,8")
    assert len(plan.kinds()) * plan.points_estimate() < 450
    assert plan.tps == (2, 4, 8)
