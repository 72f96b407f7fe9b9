"""Faults in the program itself, put in on purpose: the harness of tests/faultrun.py must find each of them.

    with planted(DEFECTS["a drain before the routing"]):
        run(seed)

A defect is a change to the text of one function, compiled in its module's namespace and put in its place wherever the
program refers to it; afterwards the real one is back. A text that is no longer there is an error, so that no defect
goes stale unnoticed.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True, slots=True)
class Defect:
    module: str
    function: str  # `name`, or `Class.name`
    was: str
    becomes: str


DEFECTS: dict[str, Defect] = {
    "an agent that does not check the term": Defect(
        "nodeagent.control.fence", "Fence.admit", "if term < self.term:", "if False:"
    ),
    "an agent that forgets the term when it restarts": Defect(
        "nodeagent.control.fence", "Fence.admit", "write_durably(self._path, data)", "pass"
    ),
    "a gateway that takes any table": Defect(
        "controller.gateway.client",
        "supersedes",
        "return new.term > old.term and any(pool.instances for pool in new.pools)",
        "return True",
    ),
    "a lock that is sent when it changes and never renewed": Defect(
        "controller.loop.instance",
        "_set_clocks",
        "if mhz is not None:",
        "if mhz is not None and (had is None or had.mhz != mhz):",
    ),
    "a lock on a silent node renewed": Defect(
        "controller.loop.instance", "_set_clocks", "if not state.is_stale(node.node_id, now_s)", "if True"
    ),
    "the clock of another load": Defect(
        "controller.policy.frequency", "_power_in_slo", "curve.max_rate_rps * fill", "curve.max_rate_rps * 2"
    ),
    "capacity dropped before its replacement is ready": Defect(
        "controller.policy.transition",
        "_take",
        "after_rps > short_rps + 1e-9",
        "False",
    ),
    "a stop without proof that it is empty": Defect(
        "controller.policy.transition", "_leave", "if instance.running == 0 and instance.waiting == 0:", "if True:"
    ),
    "a stop without a drain": Defect(
        "controller.policy.transition", "_drains", "_actual(StepKind.DRAIN,", "_actual(StepKind.STOP,"
    ),
    "a drain before the routing": Defect(
        "controller.loop.instance", "_publish", "turn.effects.insert(position, ", "turn.effects.insert(999, "
    ),
    "silence counts as the load that was expected once": Defect(
        "controller.loop.instance", "_take_steps", "if rates is None and step.kind in _TAKES_AWAY:", "if False:"
    ),
    "a start on a GPU that is ill": Defect(
        "controller.policy.transition", "_grow", "sorted(set(planned.gpu_uuids) - usable_gpus)", "[]"
    ),
    "a start on GPUs that an operator uses": Defect(
        "controller.loop.state", "State.placeable_nodes", "} | node.held_gpus", "}"
    ),
    "two starts for one GPU": Defect(
        "controller.policy.transition", "_grow", "elif busy:", "elif False:"
    ),
    "an order that is heard and not obeyed": Defect(
        "controller.loop.modes", "may_touch", "state.mode_of(pool, node_id) is Mode.ACTIVE", "True"
    ),
    "a lost node that nobody plans around": Defect(
        "controller.loop.state", "State.is_lost", "self.settings.lost_s", "1e9"
    ),
    "a failed call that counts as under way for ever": Defect(
        "controller.loop.core", "Core._effect_done", "del state.acting[done.effect_id]", "pass"
    ),
    "a past peak that changes with the moment of the look": Defect(
        "controller.loop.demand",
        "_binned_rps",
        "int(last - span.end_s // bin_s)",
        "int((now.monotonic_s - span.end_s) // bin_s)",
    ),
    "a pool that plans no more": Defect(
        "controller.loop.pool", "tick", "effect_id = turn.effect_id()", "return"
    ),
    "a cap that is raised before there is room": Defect(
        "controller.policy.budget",
        "next_caps",
        "if all(more_w <= rooms[scope] + TOLERANCE_W for scope in over):",
        "if True:",
    ),
    "an agent that is never called again": Defect(
        "controller.fleet.breaker", "Breaker.admits", "if now_s < self._until_s:", "if True:"
    ),
    "clocks that are not sent to an agent whose answers are lost": Defect(
        "controller.fleet.breaker", "Breaker.lets_out", "return not self._is_silent(now_s)", "return False"
    ),
    "a routing that is never told": Defect(
        "controller.loop.instance", "_publish", "state = turn.state", "return"
    ),
}  # fmt: skip


# The harness plays gateway and host with the program's own functions; its rules keep theirs.
WORLD = ("tests.faultrun", "tests.faultworld")


@contextmanager
def planted(defect: Defect) -> Iterator[None]:
    """The program with this defect."""
    owner, name = _place(defect)
    function = real(defect)
    text = textwrap.dedent(inspect.getsource(function))
    if text.count(defect.was) < 1:
        raise LookupError(f"{defect.module}.{defect.function} has no {defect.was!r} any more")
    found: dict[str, Any] = {}
    code = compile(text.replace(defect.was, defect.becomes, 1), f"<defect in {defect.function}>", "exec")
    exec(code, function.__globals__, found)
    places = [(owner, name)]
    if owner is sys.modules[defect.module]:
        places += [
            (module, key)
            for module_name, module in list(sys.modules.items())
            if module_name in WORLD or module_name.partition(".")[0] in ("controller", "nodeagent", "common")
            for key, value in vars(module).items()
            if value is function
        ]
    for place, key in places:
        setattr(place, key, found[name])
    try:
        yield
    finally:
        for place, key in places:
            setattr(place, key, function)


def real(defect: Defect) -> FunctionType:
    """The function as the program has it now."""
    owner, name = _place(defect)
    function: FunctionType = getattr(owner, name)
    return function


def _place(defect: Defect) -> tuple[Any, str]:
    owner: Any = importlib.import_module(defect.module)
    *classes, name = defect.function.split(".")
    for each in classes:
        owner = getattr(owner, each)
    return owner, name
