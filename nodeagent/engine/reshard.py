"""A restart with other GPUs as a transaction: what follows what, as values. engine/steps.py carries it out.

    drain → stop, GPUs proven free → start → health → warm-up → commit

The step is on disk, in the instance's record, before it is taken, so that a new agent goes on where one died. A new
layout that does not come up is taken down and the old one put back; only GPUs proven free are ever started on, and
what cannot be proven ends in quarantine.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from nodeagent.engine.lifecycle import State
from nodeagent.engine.records import Record, Restart, Spec, Step
from nodeagent.errors import Invalid, Precondition

RESTARTABLE = frozenset({State.READY, State.DRAINING})
"""An engine that serves, or did until its drain. Others are stopped or started, not restarted."""


def begun(record: Record, gpu_uuids: tuple[str, ...], now_s: float, drain_s: float) -> Restart:
    """The transaction at its first step. Raises Invalid or Precondition."""
    name = record.spec.instance_id
    if not gpu_uuids:
        raise Invalid("gpu_uuids is empty")
    if len(set(gpu_uuids)) != len(gpu_uuids):
        raise Invalid("gpu_uuids names a GPU twice")
    if record.state not in RESTARTABLE:
        hint = "; wake it up or stop it first" if record.state is State.ASLEEP else ""
        raise Precondition(f"{name!r} is {record.state.value}; only one that is ready or draining is restarted{hint}")
    if record.nap is not None:
        raise Precondition(f"{name!r} is going to sleep; wait for it")
    return Restart(
        transaction_id=uuid.uuid4().hex[:12],
        step=Step.DRAIN,
        old_gpus=record.spec.gpu_uuids,
        new_gpus=gpu_uuids,
        began_s=now_s,
        drain_until_s=now_s + drain_s,
    )


def target(restart: Restart, spec: Spec) -> Spec:
    """The layout that is started next."""
    return replace(spec, gpu_uuids=restart.old_gpus if restart.back else restart.new_gpus)


def after_failure(record: Record, text: str) -> dict[str, Any]:
    """What changes in the record when the engine died or did not come up: go on, go back, or give up."""
    restart = record.restart
    if restart is None:
        return {"failed": True}
    name = f"restart {restart.transaction_id}"
    if restart.step is Step.DRAIN:
        return {"restart": restart.but(step=Step.STOP), "detail": f"{name}: {text}; going on without a drain"}
    if not restart.back:
        back = restart.but(step=Step.STOP, back=True, why_back=text)
        return {"restart": back, "detail": f"{name}: going back to the old layout: {text}"}
    detail = f"{name} failed: {restart.why_back}; the old layout did not come back: {text}"
    return {"restart": None, "failed": True, "detail": detail}


def committed(restart: Restart) -> str:
    """What is said of an instance when its restart ends."""
    if restart.back:
        return f"serving on its old GPUs; restart {restart.transaction_id} was rolled back: {restart.why_back}"
    return f"serving; restart {restart.transaction_id} is done"


def step_to(record: Record, step: Step) -> Restart | None:
    """The transaction at its next step; None for an instance that is not in one."""
    return None if record.restart is None else record.restart.but(step=step)
