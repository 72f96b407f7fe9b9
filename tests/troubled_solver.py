"""Solvers in trouble, for tests of the solver's process: in a module of their own, since that process loads it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from controller.policy.milp.plan import plan_for
from controller.policy.milp.problem import PlanProblem, PlanSolution


def troubled(asked: PlanProblem) -> PlanSolution:
    """A solver that does what the problem's name says."""
    match asked.problem_id:
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises":
            raise ZeroDivisionError("nothing to divide by")
        case "prints":
            os.write(1, b"the library has something to say\n")
        case "hangs":
            time.sleep(600)
    return plan_for(asked)


def dying_once(marker: Path, asked: PlanProblem) -> PlanSolution:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plan_for(asked)


def holding_on(seconds: float, asked: PlanProblem) -> PlanSolution:
    """The worst that a library can do: in a thread of the controller nothing else would run for a second at a time."""
    began_s = time.monotonic()
    while True:
        sum(range(60_000_000))
        solution = plan_for(asked)
        if time.monotonic() >= began_s + seconds:
            return solution
