"""Energy by state: every joule of the counters is booked once, on what the GPU did."""

from __future__ import annotations

from controller.domain.gpu_state import GpuState
from controller.fleet.port import GpuObservation, InstanceObservation, InstanceState, NodeObservation
from controller.loop.accounting import EnergyBook


def seen(at_s: float, energy_j: float | None, state: InstanceState | None, running: float = 0.0) -> NodeObservation:
    gpu = GpuObservation("G", 0, True, 100.0, energy_j, 1000, None)
    instances = (
        () if state is None else (InstanceObservation("i", "m", "short", ("G",), state, "http://x", running=running),)
    )
    return NodeObservation("n", at_s, (gpu,), instances)


def test_each_span_is_booked_on_the_state_it_began_in() -> None:
    book = EnergyBook()
    history = [
        seen(0, 0, None),
        seen(1, 72, InstanceState.STARTING),
        seen(3, 300, InstanceState.READY),
        seen(4, 400, InstanceState.READY, running=2),
        seen(5, 900, InstanceState.DRAINING),
        seen(6, 1000, InstanceState.STOPPED),
        seen(7, 1072, None),
    ]
    entries = [entry for observation in history for entry in book.add(observation)]
    assert [(entry.state, entry.energy_j) for entry in entries] == [
        (GpuState.PARKED, 72),
        (GpuState.LOADING, 228),
        (GpuState.IDLE, 100),
        (GpuState.SERVING, 500),
        (GpuState.DRAINING, 100),
        (GpuState.PARKED, 72),
    ]
    assert sum(entry.energy_j for entry in entries) == 1072
    assert sum(entry.seconds for entry in entries) == 7


def test_an_unknown_reading_loses_no_energy() -> None:
    book = EnergyBook()
    entries = [e for o in (seen(0, 0, None), seen(1, None, None), seen(5, 360, None)) for e in book.add(o)]
    assert [(entry.seconds, entry.energy_j) for entry in entries] == [(5, 360)]


def test_a_counter_that_fell_is_not_negative_energy() -> None:
    book = EnergyBook()
    entries = [e for o in (seen(0, 900, None), seen(1, 10, None), seen(2, 82, None)) for e in book.add(o)]
    assert [entry.energy_j for entry in entries] == [72]
