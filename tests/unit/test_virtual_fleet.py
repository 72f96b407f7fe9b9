"""The virtual-time fleet: conservation laws, determinism, and that the core really steers it."""

from __future__ import annotations

from collections import defaultdict

import pytest

from controller.domain.classes import RequestClass
from controller.domain.decision import canonical_json
from controller.domain.gpu_state import GpuState
from controller.fleet.port import ApplyClocks, InstanceState
from controller.loop.accounting import EnergyBook
from controller.loop.core import Core
from controller.loop.settings import Knobs, LoopSettings
from simulator.fleet import FleetResult, FleetTimes, VirtualFleet
from simulator.physics import Physics
from simulator.traces import Request, generate
from tests.synthetic_profile import MODEL, synthetic_profile

START_S = 8.0
STATIC = Knobs(pools=False, instances=False, sharding=False, clocks=False)


def serve(knobs: Knobs | None = None, seed: int = 1, rate_rps: float = 5.0, seconds: float = 40.0) -> FleetResult:
    settings = LoopSettings(
        model=MODEL,
        cluster_s=20,
        pool_s=5,
        instance_s=1,
        lease_ttl_s=4,
        rpc_deadline_s=0.5,
        load_window_s=5,
        min_dwell_s=5,
        start_s=3,
        initial_rps={RequestClass.parse("MS"): 2.0, RequestClass.parse("LM"): 2.0},
        knobs=knobs or Knobs(),
    )
    core = Core(settings, synthetic_profile(), term=1, expected_nodes=2)
    fleet = VirtualFleet(core, Physics.load(), 2, FleetTimes(start_s=3.5))
    return fleet.run(generate("conv", seconds, rate_rps, seed), start_s=START_S)


def energy_by_state(result: FleetResult) -> dict[GpuState, float]:
    book, energy_j = EnergyBook(), defaultdict[GpuState, float](float)
    for observation in result.observations:
        for entry in book.add(observation):
            energy_j[entry.state] += entry.energy_j
    return dict(energy_j)


def test_every_request_is_served_exactly_once_and_in_order_of_time() -> None:
    result = serve()
    assert len(result.requests) == len(generate("conv", 40.0, 5.0, 1))
    for request in result.requests:
        assert request.finished_s is not None
        assert request.ttft_s is not None
        assert 0 <= request.queue_s <= request.ttft_s <= request.finished_s - request.arrival_s + 1e-9


def test_token_gaps_are_counted_once_per_token_after_the_first() -> None:
    result = serve()
    tokens = sum(request.output_tokens for request in result.requests)
    assert sum(result.gaps.values()) == tokens - len(result.requests)


def test_energy_is_the_sum_of_its_states_and_of_the_counters() -> None:
    result = serve()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for observation in result.observations:
        for gpu in observation.gpus:
            assert gpu.energy_j is not None
            assert gpu.energy_j >= last.get(gpu.uuid, 0.0) - 1e-6, "a counter never falls"
            first.setdefault(gpu.uuid, gpu.energy_j)
            last[gpu.uuid] = gpu.energy_j
    total_j = sum(last[uuid] - first[uuid] for uuid in last)
    assert sum(energy_by_state(result).values()) == pytest.approx(total_j, rel=1e-9)


def test_no_gpu_ever_has_two_owners() -> None:
    for observation in serve().observations:
        held = [
            uuid
            for instance in observation.instances
            if instance.state not in (InstanceState.STOPPED, InstanceState.FAILED)
            for uuid in instance.gpu_uuids
        ]
        assert len(held) == len(set(held)) <= 8


def test_same_inputs_same_bytes() -> None:
    def text(result: FleetResult) -> str:
        return canonical_json([[d.sentence, d.inputs, d.outcome, list(d.alternatives)] for d in result.decisions])

    assert text(serve(seed=3)) == text(serve(seed=3))
    assert text(serve(seed=3)) != text(serve(seed=4))


def test_control_saves_energy_against_the_static_fleet_on_the_same_load() -> None:
    steered, static = serve(), serve(knobs=STATIC)
    assert not [effect for _, effect in static.effects if isinstance(effect, ApplyClocks)]
    assert sum(energy_by_state(steered).values()) < sum(energy_by_state(static).values())
    assert GpuState.PARKED in energy_by_state(steered)
    # Before the load, the static fleet loads and then idles on every GPU.
    assert energy_by_state(static).get(GpuState.PARKED, 0.0) < energy_by_state(steered)[GpuState.PARKED]


def test_locks_slow_the_engines_down() -> None:
    """The lowest clock in force makes decoding slower than full clocks do, as the physics says."""
    steered, static = serve(rate_rps=1.0), serve(knobs=STATIC, rate_rps=1.0)

    def mean_tbt_s(result: FleetResult) -> float:
        gaps = [request.tbt_s for request in result.requests if request.tbt_s]
        return sum(gaps) / len(gaps)

    assert mean_tbt_s(steered) > 1.02 * mean_tbt_s(static)


def test_a_request_that_no_engine_can_hold_is_refused_and_the_rest_is_served() -> None:
    settings = LoopSettings(model=MODEL, instance_s=1, lease_ttl_s=4, rpc_deadline_s=0.5, knobs=STATIC)
    core = Core(settings, synthetic_profile(), term=1, expected_nodes=1)
    requests = [Request(0.0, 500, 20), Request(0.1, 2_000_000, 20), Request(0.2, 500, 20)]
    result = VirtualFleet(core, Physics.load(), 1, FleetTimes(start_s=3.5)).run(requests, start_s=START_S)
    assert [request.refused for request in result.requests] == [False, True, False]
    assert [request.finished_s is not None for request in result.requests] == [True, False, True]
