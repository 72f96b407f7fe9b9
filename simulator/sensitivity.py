"""A study over several values of one option at a time: the first value of each is the headline's, all others are run
again with nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from simulator.ledger import Progress, run_on
from simulator.loads import load_named
from simulator.study import Study
from simulator.workers import Workers, open_workers

# Options that may have several values, by their name in `Study`.
SWEPT = ("u", "start_s", "physics", "mismatch", "pools", "predictor_accuracy", "crashes_per_day")
_KEPT = (
    "saved_off",
    "saved_parked",
    "energy_parked_kwh",
    "attainment",
    "attainment_overall",
    "meets_slo",
    "ttft_p99_ms",
    "gap_p99_ms",
    "mean_gpus",
    "switches",
    "spilled",
    "mispredicted",
    "outgrown",
)
# Measured again for each value, its columns would take longer than all the rest.
_SAME_BOUND = ("u", "start_s", "pools", "predictor_accuracy", "crashes_per_day")


def run_sweeps(study: Study, values: Mapping[str, Sequence[Any]], progress: Progress | None = None) -> dict[str, Any]:
    """The result of `study`, with `sensitivity` for each option of `values` that has more than one value. The first
    value must be the study's own."""
    load_named(study.source, study.columns)  # a bad trace is told before processes are started
    for option, several in values.items():
        for value in several:
            _ = replace(study, **{option: value}).world  # and so is a value that none of them could take
    with open_workers(study.workers, study.ray) as workers:
        result = run_on(workers, study, progress)
        for option, several in values.items():
            if len(several) > 1:
                result["sensitivity"][option] = _swept(workers, study, result, option, several, progress)
    return result


def _swept(
    workers: Workers,
    study: Study,
    headline: Mapping[str, Any],
    option: str,
    values: Sequence[Any],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    points = []
    for value in values:
        own = value == getattr(study, option)
        if own:
            found = headline
        else:
            varied = replace(study, **{option: value}, bound=study.bound and option in _SAME_BOUND, energy_table=False)
            found = run_on(workers, varied, _named(progress, f"{option} {value}"))
        points.append(
            {
                "value": value,
                "headline": own,
                "u": found["u"],
                "k": found["k"],
                "k_max": found["k_max"],
                "bound_saved_parked": found["bound_saved_parked"],
                "systems": {
                    name: {
                        **{key: system[key] for key in _KEPT},
                        "spread": {key: system["spread"].get(key, 0.0) for key in ("saved_parked", "attainment")},
                    }
                    for name, system in found["systems"].items()
                },
            }
        )
    if all(isinstance(point["value"], int | float) for point in points):
        points.sort(key=lambda point: float(point["value"]))
    return points


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{name}: {what}")
