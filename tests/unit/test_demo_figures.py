"""Figures and verdict of the demonstration: what counts, what is a miss, and that no miss is printed as a saving."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from common.loadgen import Status
from controller.domain.decision import Decision
from controller.domain.gpu_state import GpuState
from controller.domain.layout import Layout, PlannedInstance
from controller.domain.reasons import Level, Mode, Reason
from controller.domain.slo import Slo
from controller.loop.accounting import EnergyEntry
from controller.store.engine import open_engine
from controller.store.migrate import upgrade
from controller.store.records import ActionKind, ActionRecord, PlanRecord
from controller.store.repositories import write_records
from simulator.demo import report
from simulator.demo.client import Answered
from simulator.demo.figures import ControlFigures, LoadFigures, PhaseFigures, control_figures, load_figures, missed
from simulator.demo.load import Load
from simulator.demo.watch import EnergyFigures, summarise

SLO = Slo()
LOAD = Load("test", [(0.0, 100, 2), (10.0, 100, 2), (20.0, 100, 2)], 5.0, 20.0, 10.0, {})


def answer(arrival_s: float, ttft_s: float = 0.1, status: Status = Status.SERVED, inputs: int = 100) -> Answered:
    served = status is Status.SERVED
    return Answered(
        arrival_s=arrival_s,
        input_tokens=inputs,
        output_tokens=3,
        status=status,
        detail="" if served else "broken off",
        ttft_s=ttft_s if served else None,
        gaps_s=[0.02, 0.03] if served else [],
        client_ttft_s=ttft_s + 0.01 if served else None,
        client_gaps_s=[0.03, 0.03] if served else [],
        lags_s=[0.002, 0.004] if served else [],
        sent_late_s=0.001,
        headers={},
    )


def test_every_request_counts_as_sent_but_only_the_window_is_judged() -> None:
    answers = [answer(0.0, ttft_s=9.0), answer(10.0), answer(20.0, status=Status.FAILED)]
    figures = load_figures(answers, LOAD, SLO)
    assert (figures.sent, figures.served, figures.lost) == (3, 2, 1)
    assert figures.in_window == 2  # the slow one came in the warm-up
    assert figures.attainment == pytest.approx(0.5)  # a failure is a miss
    assert "broken off" in figures.problems[0]


def test_latency_is_the_engines_and_the_clients_stands_beside_it() -> None:
    figures = load_figures([answer(10.0), answer(12.0)], LOAD, SLO)
    assert figures.buckets[0].ttft_p50_ms == pytest.approx(100.0)
    assert figures.client_buckets[0].ttft_p50_ms == pytest.approx(110.0)
    assert figures.overhead_p50_ms == pytest.approx(2.0)


def test_a_bucket_is_judged_by_itself_when_it_is_large_enough() -> None:
    good = [answer(10.0, inputs=2000) for _ in range(5000)]
    late = [answer(10.0, ttft_s=0.3) for _ in range(5)]
    enough = load_figures([*good, *late, *(answer(10.0) for _ in range(95))], LOAD, SLO)
    assert any(text.startswith("S:") for text in missed(enough, SLO))  # 95 % of the short ones, 99.9 % of all
    few = load_figures([*good, *late, *(answer(10.0) for _ in range(94))], LOAD, SLO)
    assert missed(few, SLO) == []


def test_long_token_gaps_miss_the_slo_too() -> None:
    halting = [replace(answer(10.0), gaps_s=[0.12, 0.01]) for _ in range(200)]
    assert any("token gaps" in text for text in missed(load_figures(halting, LOAD, SLO), SLO))


def entry(start_s: float, seconds: float, energy_j: float, state: GpuState, mhz: int | None = 1000) -> EnergyEntry:
    return EnergyEntry("host-1", "GPU-1", "all", "i1", 4, state, start_s, seconds, energy_j, mhz)


def test_energy_is_cut_at_the_edges_of_the_window() -> None:
    entries = [
        entry(0.0, 10.0, 1000.0, GpuState.PARKED, 345),
        entry(10.0, 10.0, 4000.0, GpuState.SERVING, 1200),
        entry(20.0, 10.0, 2000.0, GpuState.IDLE, 800),
    ]
    figures = summarise(entries, 5.0, 25.0, gpus=1)
    assert figures.by_state_j == pytest.approx({"parked": 500.0, "serving": 4000.0, "idle": 1000.0})
    assert figures.total_j == pytest.approx(5500.0)
    assert figures.mean_power_w == pytest.approx(275.0)
    assert figures.mean_sm_mhz == pytest.approx((1200 * 10 + 800 * 5) / 15)  # parked GPUs have no clock of ours
    assert figures.coverage == pytest.approx(1.0)
    assert summarise(entries[:1], 0.0, 20.0, gpus=1).coverage == pytest.approx(0.5)


def instance(name: str, tp: int) -> PlannedInstance:
    return PlannedInstance(name, "all", "m", "host-1", tuple(f"GPU-{name}-{i}" for i in range(tp)))


def decision(number: int, level: Level) -> Decision:
    return Decision(1, number, 1e9 + number, level, "all", "tick", Mode.ACTIVE, Reason.PLAN_KEPT, "Kept.", {}, {})


def locks(number: int, mhz: int, gpus: tuple[str, ...], kind: ActionKind = ActionKind.APPLY_CLOCKS) -> ActionRecord:
    asked = {"targets": [{"gpu_uuids": list(gpus), "mhz": mhz}]} if mhz else {"gpu_uuids": list(gpus)}
    return ActionRecord(1, f"e{number}", kind, 1e9 + number, 0.01, ok=True, asked=asked)


def database(folder: Path) -> Path:
    file = folder / "history.db"
    engine = open_engine(f"sqlite:///{file}", create=True)
    upgrade(engine)
    write_records(
        engine,
        [
            *(decision(number, Level.INSTANCE) for number in (1, 2, 3)),
            decision(4, Level.POOL),
            PlanRecord(1, 1, 1e9, Layout((instance("a", 8),))),
            PlanRecord(1, 2, 1e9 + 5, Layout((instance("a", 8),))),
            PlanRecord(1, 3, 1e9 + 9, Layout((instance("b", 4),))),
            locks(1, 1200, ("g1", "g2")),
            locks(2, 1200, ("g1", "g2")),  # the same again
            locks(3, 900, ("g1", "g2")),
            locks(4, 0, ("g1",), ActionKind.RELEASE_CLOCKS),
            locks(5, 900, ("g1", "g2")),  # only g1 is new
            ActionRecord(1, "e6", ActionKind.START_INSTANCE, 1e9, 0.1, ok=True, instance_id="a"),
            ActionRecord(1, "e7", ActionKind.START_INSTANCE, 1e9, 0.1, ok=False, instance_id="b"),
        ],
    )
    engine.dispose()
    return file


def test_the_controllers_work_is_counted_from_its_history(tmp_path: Path) -> None:
    figures = control_figures(database(tmp_path))
    assert figures.decisions == {"cluster": 0, "pool": 1, "instance": 3}
    assert figures.clock_locks_applied == 5
    assert figures.switches == 1
    assert (figures.starts, figures.stops) == (1, 0)


def phase(energy_j: float, name: str = "DynamoLLM", slo_missed: tuple[str, ...] = ()) -> PhaseFigures:
    requests = load_figures([answer(10.0)], LOAD, SLO)
    energy = EnergyFigures(10.0, energy_j, {"serving": energy_j}, {"serving": 10.0}, energy_j / 10, 1200.0, 1.0)
    control = ControlFigures({"cluster": 1, "pool": 2, "instance": 3}, 4, 1, 2, 0)
    return PhaseFigures(name, requests, energy, control, [{4: 1}], {"agent": 0}, slo_missed, Path("x.db"))


FACTS = report.Facts("test", 1, 0.5, 0.5, 10.0, 5.0, 5.0, 10.0, "base", "conv mix", "abc", "0", False)
PROMISED = [
    *("requests_sent", "requests_served", "requests_lost", "energy_j", "baseline_energy_j", "slo_attainment"),
    *("baseline_slo_attainment", "decisions", "clock_locks_applied", "switches", "u", "database"),
]


def test_the_json_has_the_promised_keys() -> None:
    value = report.to_json_value(FACTS, phase(60.0), phase(100.0))
    assert list(value)[: len(PROMISED)] == PROMISED
    assert value["saved_ratio"] == pytest.approx(0.4)


def test_a_saving_with_a_missed_slo_is_not_called_one() -> None:
    bad = phase(60.0, slo_missed=("all: 97.0% of requests in SLO",))
    assert report.to_json_value(FACTS, bad, phase(100.0))["saved_ratio"] is None
    out = io.StringIO()
    report.show(Console(file=out, width=110), FACTS, bad, phase(100.0, "Static"), SLO)
    assert "misses the SLO" in out.getvalue()
    assert "40.0%" not in out.getvalue()
    out = io.StringIO()
    report.show(Console(file=out, width=110), FACTS, phase(60.0), phase(100.0, "Static"), SLO)
    assert "40.0%" in out.getvalue()


def test_the_printed_queries_run_on_a_history(tmp_path: Path) -> None:
    out = io.StringIO()
    report.show_queries(Console(file=out, width=200), database(tmp_path))
    assert "plan_kept" in out.getvalue()
    assert len(report.QUERIES) == 3


def test_unserved_requests_have_no_latency() -> None:
    figures: LoadFigures = load_figures([answer(10.0, status=Status.LOST)], LOAD, SLO)
    assert figures.buckets[-1].ttft_p50_ms is None
    assert figures.lost == 1
