"""A decision told in plain sentences, from nothing but its record: what was seen, what was chosen, what else was looked
at and why it lost, what was expected, and what came of it.

`dynamollm decision explain` and the API's GetDecision say this. Pure: JSON in, sentences out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from controller.domain.decision import Decision
from controller.domain.reasons import Level, Mode, Reason
from controller.store.records import DecisionOutcome

_MANAGER = {Level.CLUSTER: "cluster manager", Level.POOL: "pool manager", Level.INSTANCE: "instance manager"}

WHY: Mapping[Reason, str] = {
    Reason.COLD_START: "it was the first plan",
    Reason.FORECAST_CHANGED: "the new layout saves more energy than the switch to it costs",
    Reason.CAPACITY_NEEDED: "the layout there was could not carry the expected load within the SLO",
    Reason.PLAN_KEPT: "the layout there is is still the best",
    Reason.SAVING_TOO_SMALL: "a better layout exists, but switching to it does not pay yet",
    Reason.GRANT_CHANGED: "the cluster manager needs some of the pool's GPUs elsewhere",
    Reason.NO_ROOM_TO_SWITCH: "a better layout exists, but no way to it carries the load meanwhile",
    Reason.TRANSITION_PENDING: "the last change is still under way",
    Reason.NO_LOAD_DATA: "no gateway reported its load, and unknown is not zero",
    Reason.SOLVER_FAILED: "the solver found no plan",
    Reason.NO_CAPACITY: "even all GPUs together cannot carry the expected load within the SLO",
    Reason.NODE_LOST: "a node was lost",
    Reason.PROFILE_CORRECTED: "what runs showed how far the profile may be believed",
    Reason.PROFILE_DRIFTED: "what runs is too far from the profile",
    Reason.ENGINE_CHANGED: "the profile was measured on another engine, so nothing is known of this one",
    Reason.LEAST_POWER: "that is the clock of least power that meets the SLO at this load",
    Reason.IDLE: "nothing runs on it",
    Reason.QUEUE_BUILDING: "requests wait at the engine, so it works off the queue at full clock",
    Reason.OVER_CAPACITY: "the load is beyond the profiled SLO range, so it runs at full clock",
    Reason.STALE_TELEMETRY: "its load is unknown, and unknown means full clock",
    Reason.NO_PROFILE: "nothing was measured for this configuration, so it runs at full clock",
    Reason.NOT_SERVING: "it serves nothing yet",
    Reason.POWER_BUDGET: "a power budget holds",
    Reason.BUDGET_UNREACHABLE: "the power budget is below the lowest caps of its GPUs",
    Reason.BUDGET_HELD: "every cap that it needs is confirmed",
    Reason.BUDGET_ENDED: "the power budget has ended",
    Reason.NODE_ON: "more nodes are needed",
    Reason.NODE_OFF: "the node was not needed for as long as going off and coming back costs",
    Reason.NODE_REFUSES: "the starts of a node fail again and again",
    Reason.NODE_HOOK_FAILED: "a node could not be turned on or off",
    Reason.DEADLINES_AT_RISK: "requests that wait for its pool were about to miss their deadlines",
    Reason.DEADLINES_SAFE: "no waiting request was about to miss its deadline any more",
}


def explain(decision: Decision, realised: DecisionOutcome | None = None, decision_id: int | None = None) -> list[str]:
    """Some ten sentences or less. Never fails: what a record does not hold is left out."""
    said = [_head(decision, decision_id)]
    # A record of another version may hold its numbers otherwise: what is not understood is not told.
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        said += _instance(decision) if decision.level is Level.INSTANCE else _plan(decision)
    said += _expected(decision)
    said += _realised(decision, realised)
    return [sentence for sentence in said if sentence]


def _head(decision: Decision, decision_id: int | None) -> str:
    at = datetime.fromtimestamp(decision.decided_at_s, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    name = (
        f"Decision {decision_id}" if decision_id is not None else f"Decision {decision.number} of term {decision.term}"
    )
    why = WHY.get(decision.reason, str(decision.reason))
    trigger = {"tick": "", "start": " at its start"}.get(decision.trigger, f" (called by: {decision.trigger})")
    acted = {
        Mode.ACTIVE: "",
        Mode.ADVISORY: " It was advice only: nothing was touched.",
        Mode.PAUSED: " The controller was paused.",
    }[decision.mode]
    return f"{name}, {at}: the {_MANAGER[decision.level]}{trigger} decided on {decision.scope}, because {why}.{acted}"


# ---------------------------------------------------------------------------------------------------- instance


def _instance(decision: Decision) -> list[str]:
    seen, outcome = decision.inputs, decision.outcome
    if "stage" in outcome:
        return _ladder(decision)
    said = []
    mhz, before = outcome.get("mhz"), seen.get("current_mhz")
    kind = f"TP{seen['tp']}, pool {seen['pool']}" if "tp" in seen and "pool" in seen else ""
    from_clock = f" from {before} MHz" if before else " (it was unlocked)"
    said.append(f"{decision.scope}{f' ({kind})' if kind else ''} went{from_clock} to {mhz} MHz.")
    counts = [
        _number(seen.get("rate_rps"), "{:.2f} equivalent requests/s expected"),
        _number(seen.get("running"), "{:.0f} running"),
        _number(seen.get("waiting"), "{:.0f} waiting at the engine"),
        _number(seen.get("kv_usage_ratio"), "{:.0%} of the KV cache in use"),
    ]
    known = [count for count in counts if count]
    unknown = [name for name in ("rate_rps", "running", "waiting") if name in seen and seen[name] is None]
    if known or unknown:
        rest = f"; unknown: {', '.join(unknown)}" if unknown else ""
        said.append(f"What it saw: {', '.join(known) or 'nothing'}{rest}.")
    if "hold_s" in seen:
        said.append(f"No load had been reported for {seen['hold_s']:g} s.")
    lost = [_clock(other, decision.predicted_power_w) for other in decision.alternatives]
    if lost:
        said.append(f"Clocks looked at and not taken: {'; '.join(lost)}.")
    return said


def _ladder(decision: Decision) -> list[str]:
    """A step of a pool's emergency ladder."""
    seen, outcome = decision.inputs, decision.outcome
    for_s = seen.get("stage_for_s")
    since = f", where it had been for {for_s:.0f} s" if for_s is not None else ""
    said = [
        f"The pool {decision.scope} went from the emergency stage {seen['stage']}{since}, to {outcome['stage']}: "
        f"{outcome['does']}."
    ]
    if seen.get("queued") is None:
        said.append("What it saw: nothing, no gateway had reported lately; nobody is refused on old news.")
    else:
        said.append(
            f"What it saw: {seen['queued']} waiting for it in the gateways, the longest for "
            f"{seen['oldest_wait_s']:.2f} s, and {seen['in_flight']} in flight; {seen['at_risk']} at risk, waiting "
            "with half of their time gone or without a first token when it was due; "
            f"{seen['refused']} refused since the look before; {seen['engines_waiting']:.0f} waiting inside engines."
        )
    lost = [f"{other['stage']} ({other['rejected']})" for other in decision.alternatives]
    if lost:
        said.append(f"Stages not taken: {'; '.join(lost)}.")
    said.append(
        f"Gateways hold to it for {outcome['order_ttl_s']:g} s unless it is given again; a stage down takes "
        f"{seen['calm_s']:g} s with nobody at risk."
    )
    return said


def _clock(other: Mapping[str, Any], chosen_w: float | None) -> str:
    power, why = other.get("predicted_power_w"), other.get("rejected", "")
    if why == "draws more" and power is not None and chosen_w is not None:
        why = f"draws {power - chosen_w:.0f} W more"
    elif power is None and other.get("max_rate_rps") is not None:
        why = f"{why}: it carries {other['max_rate_rps']:.2f} requests/s"
    elif power is not None and chosen_w is not None:
        why = f"{why}: {power - chosen_w:+.0f} W"
    return f"{other.get('mhz')} MHz ({why})"


# ------------------------------------------------------------------------------------------- cluster and pool


def _plan(decision: Decision) -> list[str]:
    seen, outcome = decision.inputs, decision.outcome
    if "budget" in seen:
        return _budget(decision)
    problem, demand = seen.get("problem", {}), seen.get("demand", {})
    said = [*_demand(demand, problem), f"What it chose: {decision.sentence}"]
    judged = outcome.get("judged")
    if judged:
        said.append(_judged(judged))
    if "budget_w" in outcome:
        said.append(
            f"The power budget left {outcome['budget_w']:.0f} W to it: {outcome['served_share']:.0%} of the expected "
            "load can be served in SLO."
        )
    grants = outcome.get("grants")
    if grants:
        said.append(f"GPUs granted: {', '.join(f'{pool} {n}' for pool, n in sorted(grants.items()))}.")
    lost = [_other(other, decision) for other in decision.alternatives]
    if lost:
        said.append(f"Looked at and not taken: {'; '.join(lost)}.")
    missing = outcome.get("missing")
    if missing:
        said.append(f"No place was found for {say(missing)}.")
    said += _margin(outcome.get("foresight", {}))
    solver = decision.solver
    if solver is not None:
        way = _WAYS.get(outcome.get("foresight", {}).get("way", ""), solver.solver)
        said.append(
            f"The solver ({way}) weighed {solver.columns} kinds of instance in {solver.solve_ms:.0f} ms and "
            f"ended {solver.status}, at most {max(0.0, solver.gap):.2%} above the least possible."
        )
    return said


def _budget(decision: Decision) -> list[str]:
    """A power budget that was set, is held, or has ended."""
    seen, outcome = decision.inputs, decision.outcome
    said = [f"What it did: {decision.sentence}"]
    if "gpus" in seen:
        hosts = f", beside {seen['hosts_w']:.0f} W of their hosts" if seen["hosts_w"] else ""
        lowest = f"their caps cannot add up to less than {seen['lowest_w']:.0f} W"
        said.append(f"It covers {seen['gpus']} GPUs{hosts}; {lowest}.")
    for pool, served in sorted(outcome.get("slo", {}).items()):
        said.append(
            f"What it costs {pool} until the plan has followed: {served['expected_rps']:.2f} equivalent requests/s are "
            f"expected, {served['carried_rps']:.2f} are carried in SLO ({served['served_share']:.0%})."
        )
    for node, counts in list(outcome.get("caps_w", {}).items())[:8]:
        said.append(f"Caps on {node}: {', '.join(f'{n} GPUs at {watts} W' for watts, n in counts.items())}.")
    return said


# How a plan was found (milp/problem.py, `Way`).
_WAYS = {
    "milp": "mixed-integer program",
    "tables": "tables of least power per pool",
    "lp+neighbourhood": "relaxation, and whole instances around it",
    "fallback": "none: fallback",
}


def _margin(foresight: Mapping[str, Any]) -> list[str]:
    """What a little more would be worth."""
    pools = foresight.get("pools", {})
    served = [f"{each['rps_per_100w']:.2f} of {pool}" for pool, each in pools.items() if each["rps_per_100w"]]
    said = []
    if served:
        said.append(f"At the margin, 100 W more would serve {' or '.join(served)} (equivalent requests/s more).")
    free = [pool for pool, each in pools.items() if not each["rps_per_100w"]]
    if free:
        said.append(f"A little more load of {', '.join(free)} would cost nothing: what must stand there serves it.")
    saves_w = foresight.get("gpu_saves_w")
    if saves_w is not None:
        said.append(
            f"One GPU more would save {saves_w:.0f} W."
            if saves_w > 0
            else f"GPUs are not short: one more would only draw {-saves_w:.0f} W."
        )
    return said


def _demand(demand: Mapping[str, Any], problem: Mapping[str, Any]) -> list[str]:
    said = []
    classes = {
        name: (sum(part[0] for part in parts), sum(part[1] ** 2 for part in parts) ** 0.5)
        for name, parts in demand.get("classes", {}).items()
    }
    total = sum(mean for mean, _ in classes.values())
    if classes:
        largest = sorted(classes.items(), key=lambda item: -item[1][0])[:4]
        shown = ", ".join(f"{name} {mean:.2f} ± {std:.2f}" for name, (mean, std) in largest if mean > 0)
        source = "as configured, since none was seen yet" if demand.get("cold") else "from what gateways reported"
        said.append(f"What it expected: {total:.2f} requests/s ({source}){f'; most of it {shown}' if shown else ''}.")
    ratios = {name: ratio for name, ratio in demand.get("week_ratios", {}).items() if name in classes}
    if ratios:
        name = max(ratios, key=lambda name: classes[name][0])
        said.append(f"By the shape of the week, the load of {name} becomes {ratios[name]:.2f} times what it was.")
    for partition in problem.get("partitions", [])[:3]:
        asked = ", ".join(f"{pool} {wanted[0]:.2f}" for pool, wanted in partition.items())
        said.append(f"As capacity to provide, in equivalent requests/s: {asked}.")
    if problem.get("current") is not None and "gpus" in problem:
        said.append(f"What it had: {say(problem['current'])}, on {problem['gpus']} GPUs.")
    return said


def _judged(judged: Mapping[str, Any]) -> str:
    now_w, then_w = judged.get("present_w"), judged.get("candidate_w")
    if now_w is None or then_w is None:
        return ""
    text = f"The layout there was would have drawn {now_w:.0f} W, the new one {then_w:.0f} W"
    load = judged.get("present_load_ratio")
    if load is not None:
        text += f"; the old one was loaded to {load:.0%} of what it carries"
    if judged.get("saving_low_j") is not None and judged.get("cost_high_j") is not None:
        text += (
            f"; until the next plan the change saves at least {judged['saving_low_j'] / 1e3:.1f} kJ and costs at most "
            f"{judged['cost_high_j'] / 1e3:.1f} kJ"
        )
    return f"{text}."


def _other(other: Mapping[str, Any], decision: Decision) -> str:
    reason = str(other.get("reason", "")) or "not said"
    why = WHY.get(Reason(reason), reason) if reason in set(Reason) else reason
    name = " and ".join(other.get("pools", [])) or "another plan"
    counts = say(other.get("counts", {}))
    power = other.get("power_w")
    watts = ""
    if power and decision.predicted_power_w is not None:
        watts = f", {power:.0f} W"
    return f"{name} as {counts}{watts} ({why})" if other.get("counts") else f"{name} ({why})"


def say(counts: Mapping[str, int] | Iterable[tuple[str, int]]) -> str:
    """ "short/tp2": 3 becomes "3 x TP2 for short"."""
    items = counts.items() if isinstance(counts, Mapping) else counts
    parts = []
    for key, n in sorted(items):
        pool, _, tp = key.partition("/tp")
        parts.append(f"{n} x TP{tp} for {pool}" if tp else f"{n} x {key}")
    return ", ".join(parts) or "nothing"


# --------------------------------------------------------------------------------------- expected and realised


def _expected(decision: Decision) -> list[str]:
    parts = []
    if decision.predicted_power_w is not None:
        parts.append(f"{decision.predicted_power_w:.0f} W")
    attainment = decision.outcome.get("foresight", {}).get("attainment")
    if attainment is not None:
        parts.append(f"{attainment:.2%} of the requests in SLO")
    margin = decision.predicted_slo_margin
    if margin is not None:
        parts.append(
            f"{margin:.0%} of the SLO capacity to spare"
            if margin >= 0
            else f"{-margin:.0%} more load than it carries in SLO"
        )
    return [f"What it predicted: {', '.join(parts)}."] if parts else []


def _realised(decision: Decision, realised: DecisionOutcome | None) -> list[str]:
    if realised is None:
        return ["What came of it is not known yet: its epoch has not ended, or the controller ended before it did."]
    parts = []
    if realised.power_w is not None:
        text = f"{realised.power_w:.0f} W on average"
        predicted = decision.predicted_power_w
        if predicted:
            text += f", {realised.power_w / predicted - 1:+.0%} against the prediction"
        parts.append(text)
    if realised.energy_j is not None:
        parts.append(f"{realised.energy_j / 3.6e6:.3f} kWh")
    if realised.load_rps is not None:
        text = f"{realised.load_rps:.2f} requests/s arrived"
        expected_rps = sum(_expected_rps(decision).values())
        if decision.level is Level.CLUSTER and expected_rps > 0:  # what a pool's own classes were is not in its record
            text += f", {realised.load_rps / expected_rps - 1:+.0%} against the forecast"
        parts.append(text)
    if realised.slo_attainment is not None:
        parts.append(f"{realised.slo_attainment:.1%} of the requests that ended were in SLO")
    if realised.ttft_p99_ms is not None:
        parts.append(f"first token within {realised.ttft_p99_ms:.0f} ms for 99 of 100")
    return [f"What came of it, over the {realised.window_s:.0f} s after it: {'; '.join(parts) or 'nothing measured'}."]


def _expected_rps(decision: Decision) -> dict[str, float]:
    """By class."""
    classes = decision.inputs.get("demand", {}).get("classes", {})
    return {name: sum(part[0] for part in parts) for name, parts in classes.items()}


def _number(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
