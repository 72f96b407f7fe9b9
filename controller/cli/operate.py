"""`dynamollm mode | plan | pool list`: the levers, and what they would do before they are pulled."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from common.errors import UserError
from controller.cli.shared import (
    DEFAULT_CONTROLLER,
    ControllerOption,
    JsonOption,
    call,
    console,
    mode_name,
    print_json,
    who_asks,
)
from controller.domain.reasons import Mode
from dynamollm.v1 import controller_pb2 as pb

# Solving takes up to ten seconds per partition and pool.
_PLAN_DEADLINE_S = 120.0

WhyOption = Annotated[str, typer.Option("--why", help="Kept in the history beside your name.")]


def mode(
    scope: Annotated[str, typer.Argument(help="cluster, pool:NAME or node:ID; nothing: show all.")] = "",
    wanted: Annotated[str, typer.Argument(metavar="MODE", help="active, advisory or paused.")] = "",
    why: WhyOption = "",
    controller: ControllerOption = DEFAULT_CONTROLLER,
    as_json: JsonOption = False,
) -> None:
    """Shows or sets what the controller may touch. Advisory decides and records only; paused does not decide."""
    if not scope:
        status: pb.GetStatusResponse = call(controller, "GetStatus", pb.GetStatusRequest())
        if as_json:
            print_json(pb.SetModeResponse(before=status.mode, modes=status.modes))
            return
        console.print(f"cluster: {mode_name(status.mode)}")
        for item in status.modes:
            console.print(f"{item.scope}: {mode_name(item.mode)}", highlight=False, soft_wrap=True)
        return
    if wanted not in set(Mode):
        wrong = f"{wanted!r} is no mode." if wanted else f"the mode for {scope} is missing."
        raise UserError(wrong, f"Write one of {', '.join(Mode)}.")
    request = pb.SetModeRequest(scope=scope, mode=pb.Mode.Value(f"MODE_{wanted.upper()}"), who=who_asks(), why=why)
    answer: pb.SetModeResponse = call(controller, "SetMode", request)
    if as_json:
        print_json(answer)
        return
    console.print(f"{scope}: {mode_name(answer.before)} -> {wanted}", highlight=False, soft_wrap=True)


def plan(
    apply: Annotated[bool, typer.Option("--apply", help="Plan now, and let the loop act on it.")] = False,
    why: WhyOption = "",
    controller: ControllerOption = DEFAULT_CONTROLLER,
    as_json: JsonOption = False,
) -> None:
    """What planning now would change, and what it is predicted to save. Touches nothing without --apply."""
    answer: pb.PreviewPlanResponse = call(controller, "PreviewPlan", pb.PreviewPlanRequest(), _PLAN_DEADLINE_S)
    if as_json:
        print_json(answer)
    else:
        _show_plan(answer)
    if apply:
        call(controller, "PlanNow", pb.PlanNowRequest(who=who_asks(), why=why))
        if not as_json:
            console.print("Planning now: see `dynamollm decision list`.")


def _show_plan(answer: pb.PreviewPlanResponse) -> None:
    table = Table("pool / size", "instances now", "then", "change")
    for key in sorted({*answer.instances_now, *answer.instances_then}):
        now, then = answer.instances_now.get(key, 0), answer.instances_then.get(key, 0)
        table.add_row(key, str(now), str(then), f"{then - now:+d}" if then != now else "")
    console.print(table)
    if answer.HasField("power_now_w") and answer.HasField("power_then_w"):
        console.print(
            f"predicted for the expected load: {answer.power_now_w:.0f} W as planned now, "
            f"{answer.power_then_w:.0f} W then ({answer.power_then_w - answer.power_now_w:+.0f} W)"
        )
    for sentence in answer.explanation:
        console.print(sentence, highlight=False, soft_wrap=True)


def pool_list(controller: ControllerOption = DEFAULT_CONTROLLER, as_json: JsonOption = False) -> None:
    """The pools: load against capacity, watts, SLO."""
    answer: pb.GetStatusResponse = call(controller, "GetStatus", pb.GetStatusRequest())
    if as_json:
        print_json(pb.GetStatusResponse(pools=answer.pools))
        return
    console.print(pools_table(answer))


def _queue(pool: pb.PoolStatus) -> str:
    """What waits, and how far up its emergency ladder the pool is."""
    if not pool.emergency:
        return str(pool.queued)
    stage = pb.EmergencyStage.Name(pool.emergency).removeprefix("EMERGENCY_STAGE_")
    return f"{pool.queued} ({stage.lower().replace('_', ' ')})"


def pools_table(answer: pb.GetStatusResponse) -> Table:
    table = Table("pool", "mode", "classes", "req/s", "planned", "carries", "queued", "GPUs", "W", "in SLO")
    for pool in answer.pools:
        used = sum(item.tensor_parallel for item in pool.instances)
        table.add_row(
            pool.name,
            mode_name(pool.mode),
            " ".join(pool.classes),
            f"{pool.request_rate:.2f}",
            f"{pool.planned_rate:.2f}",
            f"{pool.capacity_rate:.2f}",
            _queue(pool),
            f"{used} of {pool.granted_gpus}",
            f"{pool.power_w:.0f}" if pool.HasField("power_w") else "unknown",
            f"{pool.slo_attainment:.1%}" if pool.HasField("slo_attainment") else "",
        )
    return table
