"""How the ledger counts: classes, misses, the three accountings, prices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.errors import UserError
from controller.domain.classes import ClassScheme
from controller.domain.slo import Slo
from simulator.assembly import _verdict
from simulator.fast.layout import CLASSES, GAP_BINS
from simulator.ledger import _least
from simulator.loads import load_named, week_shape
from simulator.outcome import (
    SystemRun,
    attainment_by_hour,
    classes_of,
    energies_kwh,
    figures,
    judge,
    judged_classes,
    node_off_s,
)
from simulator.prices import read_steps
from simulator.references import LargestLoad
from simulator.study import Study
from simulator.traces import Trace, scale

SCHEME = ClassScheme()


def make_run(n: int = 2000, **changes: object) -> SystemRun:
    """`n` requests of class MS in the window, all of them well served."""
    arrival_s = 300.0 + np.arange(n) * 0.1
    made = SystemRun(
        trace=Trace("t", 1000.0, arrival_s, np.full(n, 500), np.full(n, 50)),
        warm_up_s=300.0,
        ttft_s=np.full(n, 0.1),
        tbt_s=np.full(n, 0.02),
        finished=np.ones(n, dtype=bool),
        queue_s=np.zeros(n),
        gaps=np.zeros((GAP_BINS, CLASSES), np.int64),
        nodes=2,
        gpus=16,
        energy_j={"serving": 3.6e6, "idle": 0.0, "loading": 0.0, "draining": 0.0, "parked": 0.72e6},
        parked_gpu_s=1e4,
        window_s=1000.0,
        off_node_s=0.0,
        peak_gpus=8,
        switches=0,
        clock_changes=0,
        layout="",
    )
    return replace(made, **changes)


def test_classes_are_cut_as_the_scheme_cuts_them():
    inputs, outputs = np.array([255, 256, 1023, 1024]), np.array([99, 100, 349, 350])
    trace = Trace("t", 1.0, np.zeros(4), inputs, outputs)
    names = [str(SCHEME.classify(i, o)) for i, o in zip(inputs, outputs, strict=True)]
    assert names == ["SS", "MM", "MM", "LL"]
    assert classes_of(trace, SCHEME).tolist() == [0, 4, 4, 8]


def test_small_classes_are_judged_within_their_input_bucket():
    classes = np.repeat([0, 2, 8], [1500, 30, 10])
    assert judged_classes(classes) == {"SS": [0], "S": [0, 1, 2], "L": [6, 7, 8]}


def test_a_request_that_was_not_served_is_a_miss():
    run = make_run()
    assert judge(run, Slo(), SCHEME).meets_slo
    lost = run.finished.copy()
    lost[:21] = False
    missed = judge(replace(run, finished=lost, ttft_s=np.where(lost, 0.1, np.nan)), Slo(), SCHEME)
    assert missed.attainment == {"MS": pytest.approx(1 - 21 / 2000)}
    assert not missed.meets_slo


def test_a_slow_token_gap_alone_misses_the_slo():
    gaps = np.zeros((GAP_BINS, CLASSES), np.int64)
    gaps[200, 3], gaps[1500, 3] = 98, 2  # 20 ms, 150 ms
    verdict = judge(make_run(gaps=gaps), Slo(), SCHEME)
    assert (verdict.worst, verdict.meets_slo) == (1.0, False)


def test_an_hour_that_misses_is_seen_within_a_week_that_does_not():
    n = 3 * 36_000  # ten a second, three hours
    run = make_run(n, window_s=3 * 3600.0)
    assert attainment_by_hour(run, Slo(), SCHEME) == [1.0, 1.0, 1.0]
    lost = run.finished.copy()
    lost[40_000:40_400] = False
    late = replace(run, finished=lost)
    assert judge(late, Slo(), SCHEME).meets_slo
    assert attainment_by_hour(late, Slo(), SCHEME) == [1.0, pytest.approx(1 - 400 / 36_000), 1.0]
    found = figures(late, Slo(), SCHEME)
    assert (found["hours_judged"], found["hours_missed"]) == (3, 1)
    # An hour of few requests is not judged, nor is a piece of one.
    assert attainment_by_hour(make_run(999, window_s=3600.0), Slo(), SCHEME) == []
    assert attainment_by_hour(make_run(), Slo(), SCHEME) == []


def test_requests_before_the_window_are_not_judged():
    run = make_run()
    early = replace(run.trace, arrival_s=run.trace.arrival_s - 50.0)
    bad = np.where(early.arrival_s < 300, 9.0, 0.1)
    assert judge(replace(run, trace=early, ttft_s=bad), Slo(), SCHEME).meets_slo


def test_the_three_accountings():
    energies = energies_kwh(make_run())
    assert energies["energy_off_kwh"] == pytest.approx(1.0)
    assert energies["energy_parked_kwh"] == pytest.approx(1.2)
    # Two hosts at 2 kW for 1000 s, and 900 W at 5600 W of GPUs.
    host_kwh = (2 * 2000 * 1000 + 900 * 4.32e6 / 5600) / 3.6e6
    assert energies["wall_kwh"] == pytest.approx(1.2 + host_kwh)
    off = energies_kwh(make_run(off_node_s=500.0))
    assert off["wall_kwh"] < energies["wall_kwh"] - 500 * (2000 + 8 * 72) / 3.6e6
    assert off["energy_parked_kwh"] == energies["energy_parked_kwh"]


@pytest.mark.parametrize(("empty", "off_s"), [((0, 800), 0), ((0, 1000), 160), ((-2000, 5000), 1000), ((500, 1340), 0)])
def test_an_empty_node_goes_off_late_and_boots_in_time(empty, off_s):
    assert node_off_s(empty, 0.0, 1000.0) == off_s


def test_a_missed_slo_is_no_saving():
    assert _verdict("dynamollm", False, 0.4) == "misses SLO"
    assert _verdict("dynamollm", True, 0.4) == "saves 40.0 %"
    assert _verdict("singlepool", False, 0.0) == "misses SLO"


def test_prices_are_numbers_or_steps(tmp_path):
    assert read_steps("300", "--x").at([0, 5]).tolist() == [300, 300]
    file = tmp_path / "grid.csv"
    file.write_text("hours,g\n0,100\n2,400\n")
    assert read_steps(str(file), "--x").at([0, 1.9, 2, 50]).tolist() == [100, 100, 400, 400]


@pytest.mark.parametrize("text", ["-1", "nan", "nowhere.csv"])
def test_bad_prices_are_refused(text):
    with pytest.raises(UserError):
        read_steps(text, "--x")


def test_a_bad_row_of_prices_is_named(tmp_path):
    file = tmp_path / "grid.csv"
    file.write_text("0,100\n0,200\n")
    with pytest.raises(UserError, match=r"grid\.csv:2"):
        read_steps(str(file), "--x")


def test_unknown_systems_and_loads_are_refused():
    with pytest.raises(UserError, match="nosuch"):
        Study("conv", systems=("nosuch",))
    with pytest.raises(UserError, match="neither a file"):
        load_named("noload")


def test_built_in_loads_scale_with_k_and_repeat():
    hour = load_named("conv")
    one, same, double = hour.at(1.0, 4), hour.at(1.0, 4), hour.at(2.0, 4)
    np.testing.assert_array_equal(one.arrival_s, same.arrival_s)
    assert len(double) == pytest.approx(2 * len(one), abs=2)


@pytest.mark.parametrize(("kind", "low", "high"), [("conv", 3.0, 4.0), ("code", 20.0, 45.0)])
def test_a_week_has_the_published_shape_and_states_its_peak(kind, low, high):
    week = load_named(f"week-{kind}")
    trace = week.at(0.2, 1)
    assert np.all(np.diff(trace.arrival_s) >= 0)
    hourly = np.bincount((trace.arrival_s // 3600).astype(int), minlength=168) / 3600
    assert hourly.max() == pytest.approx(0.2 * week.native_rps, rel=0.12)
    assert low < hourly.max() / hourly.min() < high
    assert hourly[5 * 24 :].mean() < 0.7 * hourly[: 5 * 24].mean()  # the weekend
    assert np.corrcoef(hourly, week_shape(kind))[0, 1] > 0.98


def test_copies_of_a_file_are_those_of_the_ledger(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.680,10,5\n2023-11-16 18:15:47,20,6\n2023-11-16 18:15:49,30,7\n"
    )
    load = load_named(str(file))
    np.testing.assert_array_equal(load.at(2.0, 9).arrival_s, scale(load.recorded, 2.0, 9).arrival_s)


def test_k_max_is_what_every_seed_serves() -> None:
    found = [LargestLoad(8.0, 8.9, 20.4, 10.8), LargestLoad(4.0, 9.1, 10.3, 4.3)]
    assert _least(found) == LargestLoad(4.0, 8.9, 10.3, 4.3)
