"""The report says what its result says: savings only where the SLO is kept, misses by name, and nothing of its own."""

from __future__ import annotations

import copy
import math
import re
import sys
from typing import Any

import pytest

from common.errors import UserError
from simulator.report import page_maker, words, write_report
from simulator.report.page import page
from simulator.report.style import MOST_POINTS, binned

MINUTES = 20
TITLES = {"singlepool": "SinglePool", "scalefreq": "ScaleFreq", "dynamollm": "DynamoLLM", "reactive": "Reactive"}


def make_system(name: str, kwh: float, base_kwh: float, **changes: Any) -> dict[str, Any]:
    saved = 1 - kwh / base_kwh
    line = {"requests": 4000, "ttft_p50_ms": 80.0, "ttft_p99_ms": 190.0, "tbt_p50_ms": 20.0, "tbt_p99_ms": 40.0}
    numbers = {
        "energy_off_kwh": 0.8 * kwh,
        "energy_parked_kwh": kwh,
        "wall_kwh": 1.6 * kwh,
        "saved_off": saved + 0.05,
        "saved_parked": saved,
        "saved_wall": saved - 0.05,
    }
    meets = changes.get("meets_slo", True)
    system = {
        "title": TITLES[name],
        "about": f"about {name}",
        "layout": "all 2xTP8",
        "verdict": "",
        **numbers,
        "attainment": 0.995 if meets else 0.953,
        "attainment_overall": 0.998,
        "attainment_by_class": {"SS": 0.995 if meets else 0.953, "LL": 0.999, "M": 0.997},
        "meets_slo": True,
        "ttft_p50_ms": 90.0,
        "ttft_p99_ms": 700.0,
        "tbt_p50_ms": 20.0,
        "tbt_p99_ms": 40.0,
        "gap_p99_ms": 80.0,
        "queue_p99_ms": 0.0,
        "power_p50_w": 9000.0,
        "power_p99_w": 11000.0,
        "power_peak_w": 12000.0,
        "gpu_hours": 10.0,
        "gpu_hours_freed": 4.0,
        "mean_gpus": 12.0,
        "peak_gpus": 16,
        "switches": 3.0,
        "clock_changes": 40.0,
        "carbon_kg": 0.45 * kwh,
        "cost_usd": 0.12 * kwh,
        "requests": 9000,
        "lost": 0,
        "spilled": 7.0,
        "mispredicted": 3210.0,
        "outgrown": 123.0,
        "energy_by_state_kwh": {
            "serving": 0.7 * kwh,
            "idle": 0.05 * kwh,
            "loading": 0.03 * kwh,
            "draining": 0.02 * kwh,
            "parked": 0.2 * kwh,
        },
        "latency_by_input": {bucket: dict(line) for bucket in "SML"},
        "latency_by_class": {"SS": {**line, "gap_p99_ms": 70.0}, "LL": {**line, "gap_p99_ms": 130.0}},
        "spread": dict.fromkeys(numbers, 0.0),
        "per_seed": [
            {"seed": seed, **numbers, "meets_slo": meets or seed == 1, "gap_by_class_ms": {"SS": 70.0}}
            for seed in (1, 2)
        ],
        "series": {
            "minute": list(range(MINUTES)),
            "requests": [300 + minute for minute in range(MINUTES)],
            "power_w": [9000.0 + 50 * minute for minute in range(MINUTES)],
            "gpus": {"short/tp4": [4.0] * MINUTES, "long/tp8": [8.0] * MINUTES},
            "clock_mhz": {"short": [1200.0] * MINUTES, "long": [None, *[1400.0] * (MINUTES - 1)]},
        },
    }
    return {**system, **changes}


def make_result(**changes: dict[str, Any]) -> dict[str, Any]:
    """Changes by system. Without any, all keep the SLO."""
    kwh = {"singlepool": 10.0, "scalefreq": 7.0, "dynamollm": 5.0, "reactive": 8.0}
    systems = {name: make_system(name, used, 10.0, **changes.get(name, {})) for name, used in kwh.items()}
    cells = [
        {"class": c, "load_tokens_per_s": 650, "tp": tp, "mhz": 1200, "wh": wh, "attainment": 1.0, "meets_slo": ok}
        for c, tp, wh, ok in (("SS", 4, 0.2, True), ("SS", 8, 0.4, True), ("LL", 4, 0.7, False), ("LL", 8, None, False))
    ]
    return {
        "schema": 1,
        "version": "0",
        "command": "dynamollm simulate --trace conv",
        "trace": {
            "source": "conv",
            "name": "made <up>",
            "requests": 9500,
            "duration_s": 1500.0,
            "window_s": 1200.0,
            "class_shares": {},
            "skipped": {"rows": 0, "examples": []},
        },
        "nodes": 2,
        "gpus": 16,
        "u": 0.6,
        "k": 0.6,
        "k_max": 1.0,
        "u_overall": 0.5,
        "k_max_overall": 1.2,
        "seed": 1,
        "seeds": [1, 2],
        "physics": "base",
        "profile": "0123456789abcdef",
        "profile_identity": {},
        "mismatch": 0.0,
        "start_s": 180.0,
        "slo": {
            "ttft_s_ms": 250.0,
            "ttft_m_ms": 400.0,
            "ttft_l_ms": 2000.0,
            "tbt_ms": 100.0,
            "token_gap_p99_ms": 100.0,
            "attainment": 0.99,
        },
        "pools": {"short": [], "long": []},
        "predictor": {"output_bucket_accuracy": 0.43, "method": "a guess"},
        "assumptions": {
            "parked_w": 72.0,
            "carbon_g_per_kwh": 450.0,
            "price_per_kwh": 0.12,
            "host_w": [2000.0, 2900.0],
            "node_off_after_s": 600.0,
            "node_shutdown_s": 60.0,
            "node_boot_s": 180.0,
        },
        "notes": ["a note"],
        "bound_saved_off": 0.7,
        "bound_saved_parked": 0.625,
        "bound": {
            "energy_off_kwh": 3.0,
            "energy_parked_kwh": 3.75,
            "saved_off": 0.7,
            "saved_parked": 0.625,
            "series": {"minute": list(range(MINUTES)), "power_parked_w": [4000.0] * MINUTES},
        },
        "systems": systems,
        "energy_table": {
            "loads_tokens_per_s": [650],
            "tps": [4, 8],
            "clocks_mhz": [1200],
            "classes": {"SS": {}, "LL": {}},
            "cells": cells,
        },
        "sensitivity": {},
    }


def test_a_saving_is_said_with_its_accounting():
    (first, *_) = words.headline(make_result())
    assert "saves 50.0%" in first
    assert "5 kWh where SinglePool uses 10" in first
    assert "72 W" in first
    (nowhere, *_) = words.missed(make_result())
    assert nowhere.startswith("Nowhere")


def test_with_a_missed_slo_nothing_is_saved_and_the_place_is_named():
    result = make_result(dynamollm={"meets_slo": False})
    text = " ".join(words.headline(result))
    assert "misses the SLO" in text
    assert "saves 50" not in text
    assert "kg of CO2" not in text
    said = " ".join(words.missed(result))
    assert "DynamoLLM misses the SLO in 1 seed of 2: SS 95.30%" in said
    assert "Nowhere" not in said
    html = page(result)
    assert 'class="verdict bad"' in html
    assert '<s title="misses the SLO">50.0%</s>' in html


def test_a_missed_baseline_compares_nothing():
    (first, *_) = words.headline(make_result(singlepool={"meets_slo": False}))
    assert "SinglePool itself misses the SLO" in first
    assert "saves" not in first.replace("savings", "")


def test_slow_token_gaps_and_lost_requests_are_named():
    rows = make_result()["systems"]["reactive"]["per_seed"]
    rows[1] = {**rows[1], "meets_slo": False, "gap_by_class_ms": {"LL": 140.0}}
    result = make_result(reactive={"meets_slo": False, "lost": 12, "per_seed": rows})
    said = next(text for text in words.missed(result) if text.startswith("Reactive"))
    assert "LL 140 ms" in said
    assert "12 requests lost" in said


def test_references_and_bound_stand_beside_the_saving():
    said = " ".join(words.against(make_result()))
    assert "saves 20.0%; DynamoLLM uses 37.5% less than it" in said
    assert "DynamoLLM reaches 80% of that" in said
    assert "Reactive" not in said or "misses" not in said
    worse = make_result(reactive={"energy_parked_kwh": 4.0, "saved_parked": 0.6})
    assert "25.0% more than it" in " ".join(words.against(worse))


def test_savings_over_the_load_are_only_claimed_where_they_were_run():
    assert not any("load rises" in text for text in words.pattern(make_result()))
    result = make_result()
    result["sensitivity"]["u"] = [point(u, {"dynamollm": saved}) for u, saved in ((0.4, 0.6), (0.6, 0.5), (0.8, 0.55))]
    assert any("load rises: no (60% at u 0.4, 50% at u 0.6, 55% at u 0.8)" in text for text in words.pattern(result))


def point(value: Any, saved: dict[str, float]) -> dict[str, Any]:
    rows = {
        name: {"saved_parked": saved.get(name, 0.0), "attainment": 0.995, "meets_slo": name != "scalefreq"}
        for name in TITLES
    }
    return {"value": value, "headline": False, "u": value, "bound_saved_parked": None, "systems": rows}


def test_the_page_stands_alone_and_says_the_same_again():
    result = make_result()
    for option, values in (("u", (0.4, 0.6)), ("physics", ("base", "optimistic")), ("pools", (None, 1))):
        result["sensitivity"][option] = [point(value, {"dynamollm": 0.5}) for value in values]
    html = page(result)
    assert html == page(copy.deepcopy(result))
    assert "made &lt;up&gt;" in html
    assert html.count("<svg") == 7 + 3
    addresses = set(re.findall(r"https?://[^\"'<> ]+", html))
    assert all(address.startswith("http://www.w3.org/") for address in addresses), addresses  # namespaces: only names
    assert html.count('class="best"') == 1  # the cheapest of SS; LL keeps the SLO nowhere
    assert "<s>0.700</s>" in html
    assert "×</td>" in html
    assert '<b class="miss">130</b>' in html  # a token gap beyond the SLO


def test_wrong_guesses_are_counted_beside_the_predictors_accuracy():
    assert "3,210 requests wrong, 123 of them too short; 7 were served by a larger pool" in page(make_result())


def test_few_systems_and_no_bound_make_a_page_too():
    result = make_result()
    result["systems"] = {"singlepool": result["systems"]["singlepool"]}
    result |= {"bound": None, "bound_saved_off": None, "bound_saved_parked": None, "energy_table": None}
    assert "nothing to compare" in page(result)


def test_a_week_is_averaged_down_and_gaps_stay():
    minutes, values = binned([None] * 30 + [2.0] * 10_050)
    assert len(values) <= MOST_POINTS
    assert math.isnan(values[0])
    assert values[-1] == 2.0
    assert minutes[-1] == pytest.approx(10_080, abs=15)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_report(make_result(), tmp_path / "none" / "report.html")


def test_without_matplotlib_the_report_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "simulator.report.page", None)  # as if its imports failed
    with pytest.raises(UserError, match="needs matplotlib"):
        page_maker()
