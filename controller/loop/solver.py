"""The solver's own process: plans are made there, so that no tick ever waits for one.

In a thread of the controller even HiGHS, which lets other threads run, is fed and read by Python that does not; a
defect in it would end the controller, and the controller could not end before it. Problems and answers go through
pipes, one at a time. The process starts with the first problem and ends with its input, so with the controller however
that ends; one that died is replaced.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from controller.policy.milp.plan import plan_for
from controller.policy.milp.problem import PlanProblem, PlanSolution

_LENGTH_BYTES = 8
_DYING_S = 1.0  # from the end of its output to its own

Solve = Callable[[PlanProblem], PlanSolution]


class SolverFailed(Exception):
    """No answer: the process died, or the solving raised; says which."""


class Solver:
    """Solves one problem after the other; `solve` must be a function that can be pickled."""

    def __init__(self, solve: Solve = plan_for) -> None:
        self._solve = solve
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    async def solve(self, problem: PlanProblem) -> PlanSolution:
        """Raises SolverFailed."""
        async with self._turn:
            try:
                answer = await self._ask(pickle.dumps((self._solve, problem)))
            except (OSError, EOFError) as error:  # it could not be started, or died
                ended = await self._end(_DYING_S)
                raise SolverFailed(f"the solver's process failed: {ended or error}") from None
        if isinstance(answer, str):
            raise SolverFailed(answer)
        return answer

    async def _ask(self, problem: bytes) -> PlanSolution | str:
        if self._closed:
            raise EOFError("it is closed")
        if self._process is None:
            # Modules are found as here, and not in whatever folder this happens to run in.
            paths = os.pathsep.join(path for path in sys.path if path)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", __name__,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
        if self._closed:  # meanwhile
            raise EOFError("it is closed")
        there, back = self._process.stdin, self._process.stdout
        assert there is not None
        assert back is not None
        there.write(len(problem).to_bytes(_LENGTH_BYTES, "big") + problem)
        await there.drain()
        length = int.from_bytes(await back.readexactly(_LENGTH_BYTES), "big")
        answer: PlanSolution | str = pickle.loads(await back.readexactly(length))
        return answer

    async def _end(self, patience_s: float = 0.0) -> str:
        """Ends the process, and tells how it ended; `patience_s` for one that is about to end by itself."""
        process, self._process = self._process, None
        if process is None:
            return ""
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), patience_s)
        if process.returncode is None:
            process.kill()
        return f"it ended with {await process.wait()}"

    async def close(self) -> None:
        """Also in the middle of a problem: nobody waits for its answer any more."""
        self._closed = True
        await self._end()


def serve() -> None:
    """What the process does: answers until its input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they go to the whole service; the controller ends this one itself
    problems, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is for the log
    with suppress(BrokenPipeError):  # nobody waits for the last answer any more
        while (length := int.from_bytes(problems.read(_LENGTH_BYTES), "big")) > 0:
            answer = _answer(problems.read(length))
            answers.write(len(answer).to_bytes(_LENGTH_BYTES, "big") + answer)


def _answer(problem: bytes) -> bytes:
    try:
        solve, asked = pickle.loads(problem)
        answer: PlanSolution | str = solve(asked)
    except Exception as error:  # a defect must end neither this process nor the planning
        answer = f"the solver raised {type(error).__name__}: {error}"
    return pickle.dumps(answer)


if __name__ == "__main__":
    serve()
