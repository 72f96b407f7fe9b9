"""The solver's own process: its answers are the solver's, and whatever happens to it the next problem is solved."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import psutil
import pytest

from common.clock import SystemClock
from controller.api.routing_hub import RoutingHub
from controller.domain.decision import Decision
from controller.loop.journal import JournaledCore
from controller.loop.runtime import Runtime
from controller.loop.solver import Solver, SolverFailed
from controller.policy.milp.plan import plan_for
from controller.policy.milp.problem import PlanSolution
from controller.store.records import Record
from tests.lateness import NODES, SETTINGS, see
from tests.synthetic_profile import synthetic_profile
from tests.troubled_solver import dying_once, troubled
from tests.unit.test_policy_milp import problem

pytestmark = pytest.mark.timeout(60)


def answers(solution: PlanSolution) -> tuple[object, ...]:
    chosen = solution.chosen
    assert chosen is not None
    return solution.problem_id, solution.solver, replace(chosen, solve_ms=0.0)


def solver_processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # also one that has ended and is waited for by nobody yet: another test's
            if "controller.loop.solver" in " ".join(child.cmdline()):
                found.append(child)
    return found


async def test_its_answer_is_the_one_given_here() -> None:
    solver = Solver()
    asked = [replace(problem(), problem_id=name) for name in ("a", "b")]
    found = await asyncio.gather(*(solver.solve(each) for each in asked))  # one after the other
    assert [answers(each) for each in found] == [answers(plan_for(each)) for each in asked]
    assert len(solver_processes()) == 1
    await solver.close()
    assert not solver_processes()


async def test_what_goes_wrong_is_said_and_the_next_problem_is_solved() -> None:
    solver = Solver(troubled)
    for name, said in (("raises", "ZeroDivisionError: nothing to divide by"), ("dies", "it ended with -9")):
        with pytest.raises(SolverFailed, match=said):
            await solver.solve(replace(problem(), problem_id=name))
        for then in ("well", "prints"):
            fine = replace(problem(), problem_id=then)
            assert answers(await solver.solve(fine)) == answers(plan_for(fine))
    await solver.close()


async def test_it_ends_in_the_middle_of_a_problem() -> None:
    solver = Solver(troubled)
    asked = asyncio.create_task(solver.solve(replace(problem(), problem_id="hangs")))
    while not solver_processes():  # noqa: ASYNC110 - as a person looks
        await asyncio.sleep(0.01)
    await solver.close()
    with pytest.raises(SolverFailed):
        await asked
    with pytest.raises(SolverFailed):
        await solver.solve(problem())
    assert not solver_processes()


async def test_a_loop_plans_on_when_the_solver_has_died(tmp_path: Path) -> None:
    records: list[Record] = []
    core = JournaledCore(SETTINGS, synthetic_profile(), 1, NODES)
    core.keep_journal(records.append)
    clock, stop, marker = SystemClock(), asyncio.Event(), tmp_path / "died"
    solver = Solver(partial(dying_once, marker))
    runtime = Runtime(core, {}, RoutingHub(), records.append, clock, 60.0, solver=solver)
    running = asyncio.create_task(runtime.run(stop))
    for second in count():
        see(runtime, clock, second)
        await asyncio.sleep(0.3)
        if any(isinstance(record, Decision) and record.solver is not None for record in records):
            break
    assert marker.exists()
    stop.set()
    await running
    assert not solver_processes()
