"""Decisions in plain sentences: every number that counts is said, and nothing a record does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.domain.reasons import Level, Mode, Reason
from controller.explain import WHY, explain, say
from controller.store.records import DecisionOutcome
from tests.store_suite import NOON_S, decision

PLAN = decision(
    12,
    level=Level.POOL,
    scope="short",
    reason=Reason.FORECAST_CHANGED,
    sentence="From short 4xTP2 to short 2xTP4. Saves at least 90000 J, switching costs at most 40000 J.",
    inputs={
        "demand": {"cold": False, "classes": {"SM": [[3.0, 0.3], [1.0, 0.4]], "SS": [[0.5, 0.1]]}, "mean_tokens": {}},
        "problem": {"gpus": 16, "partitions": [{"short": [6.25, 1]}], "current": {"short/tp2": 4}},
    },
    outcome={
        "accepted": True,
        "judged": {
            "present_w": 3000.0,
            "candidate_w": 2500.0,
            "present_load_ratio": 0.8,
            "saving_low_j": 90_000.0,
            "cost_high_j": 40_000.0,
        },
        "missing": {"short/tp4": 1},
        "foresight": {
            "way": "tables",
            "attainment": 0.9987,
            "gpu_saves_w": -72.0,
            "pools": {
                "long": {"w_per_rps": 0.0, "rps_per_100w": None},
                "short": {"w_per_rps": 250.0, "rps_per_100w": 0.4},
            },
        },
    },
    alternatives=(
        {"pools": ["all"], "counts": {"all/tp8": 2}, "power_w": 2700.0, "reason": "costs 200 W more than short"},
        {"pools": ["long"], "counts": {}, "power_w": 0.0, "reason": "needs at least 24 GPUs, 16 are there"},
    ),
    predicted_power_w=2500.0,
    predicted_slo_margin=0.25,
)
CLOCK = decision(
    13,
    level=Level.INSTANCE,
    scope="t1-i2",
    reason=Reason.LEAST_POWER,
    inputs={
        "pool": "short", "tp": 4, "rate_rps": 2.5, "running": 7.0, "waiting": None, "kv_usage_ratio": 0.125,
        "current_mhz": 1980,
    },
    outcome={"mhz": 1200},
    alternatives=(
        {"mhz": 800, "max_rate_rps": 1.5, "predicted_power_w": None, "rejected": "misses the SLO at this load"},
        {"mhz": 1980, "max_rate_rps": 6.0, "predicted_power_w": 1500.0, "rejected": "draws more"},
    ),
    predicted_power_w=1100.0,
    predicted_slo_margin=-0.1,
    solver=None,
)  # fmt: skip


def test_a_plan_tells_what_the_week_expects() -> None:
    demand = {**PLAN.inputs["demand"], "week_ratios": {"SM": 1.3, "SS": 2.0, "LL": 1.0}}
    told = " ".join(explain(replace(PLAN, inputs={**PLAN.inputs, "demand": demand}), None, 12))
    assert "By the shape of the week, the load of SM becomes 1.30 times what it was." in told
    assert "shape of the week" not in " ".join(explain(PLAN, None, 12))


def test_a_plan_tells_demand_choice_alternatives_and_outcome() -> None:
    realised = DecisionOutcome(1, 12, NOON_S, 300.0, 2600.0, 780_000.0, 4.25, 0.995, 210.0)
    told = " ".join(explain(PLAN, realised, 12))
    for part in (
        "Decision 12, 2026-03-01 12:00:12 UTC: the pool manager decided on short",
        "saves more energy than the switch to it costs",
        "4.50 requests/s (from what gateways reported); most of it SM 4.00 ± 0.50, SS 0.50 ± 0.10",
        "short 6.25",
        "What it had: 4 x TP2 for short, on 16 GPUs",
        "would have drawn 3000 W, the new one 2500 W",
        "loaded to 80% of what it carries",
        "saves at least 90.0 kJ and costs at most 40.0 kJ",
        "all as 2 x TP8 for all, 2700 W (costs 200 W more than short)",
        "long (needs at least 24 GPUs, 16 are there)",
        "No place was found for 1 x TP4 for short",
        "weighed 48 kinds of instance",
        "The solver (tables of least power per pool) weighed",
        "100 W more would serve 0.40 of short (equivalent requests/s more)",
        "A little more load of long would cost nothing",
        "GPUs are not short: one more would only draw 72 W",
        "What it predicted: 2500 W, 99.87% of the requests in SLO, 25% of the SLO capacity to spare",
        "over the 300 s after it: 2600 W on average, +4% against the prediction; 0.217 kWh; 4.25 requests/s arrived; "
        "99.5% of the requests that ended were in SLO; first token within 210 ms",
    ):
        assert part in told, part


def test_a_plan_of_the_cluster_tells_how_far_the_forecast_was_off() -> None:
    plan = decision(12, level=Level.CLUSTER, scope="cluster", inputs=PLAN.inputs, outcome=PLAN.outcome)
    came = DecisionOutcome(1, 12, NOON_S + 1800, 1800.0, load_rps=5.4)
    assert "5.40 requests/s arrived, +20% against the forecast" in " ".join(explain(plan, came))
    assert "against the forecast" not in " ".join(explain(PLAN, came)), "whose classes were more than its own"


def test_a_clock_tells_what_was_seen_and_why_the_others_lost() -> None:
    told = " ".join(explain(CLOCK))
    for part in (
        "Decision 13 of term 1",
        "t1-i2 (TP4, pool short) went from 1980 MHz to 1200 MHz",
        "2.50 equivalent requests/s expected, 7 running, 12% of the KV cache in use; unknown: waiting",
        "800 MHz (misses the SLO at this load: it carries 1.50 requests/s)",
        "1980 MHz (draws 400 W more)",
        "1100 W, 10% more load than it carries in SLO",
        "not known yet",
    ):
        assert part in told, part


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("level", Level)
def test_nothing_is_needed_but_the_decision_itself(level: Level, reason: Reason) -> None:
    bare = decision(1, level=level, reason=reason, inputs={}, outcome={}, alternatives=(), solver=None)
    told = explain(bare)
    assert WHY[reason] in told[0]
    assert all(sentence.endswith(".") for sentence in told)


def test_advice_is_called_advice() -> None:
    assert "nothing was touched" in explain(decision(1, mode=Mode.ADVISORY))[0]


def test_counts_for_people() -> None:
    assert say({"long/tp8": 1, "short/tp2": 3}) == "1 x TP8 for long, 3 x TP2 for short"
    assert say({}) == "nothing"


def test_a_record_of_another_version_is_told_as_far_as_it_is_understood() -> None:
    strange = decision(1, inputs={"demand": {"classes": {"SM": "many"}}, "problem": []}, predicted_power_w=10.0)
    told = explain(strange)
    assert "Decision 1" in told[0]
    assert any("10 W" in sentence for sentence in told)
