"""What passes between an engine and its driver: requests, planned iterations and the tokens they made.

Plain values; the scheduler itself is `simulator/engine.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import ceil, sqrt
from typing import NamedTuple


class Phase(Enum):
    """Where a request stands: waiting -> prefill -> decode -> done; decode or prefill -> waiting by preemption."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One request as the engine sees it. Drivers read it; only the engine writes it."""

    request_id: str
    input_tokens: int
    output_tokens: int
    arrived_s: float
    phase: Phase = Phase.WAITING
    scheduled_s: float | None = None  # first time that any of it was in an iteration
    first_token_s: float | None = None
    finished_s: float | None = None
    preemptions: int = 0
    generated: int = 0  # exact outside Phase.DECODE; while decoding, the count when it (re)joined
    prefill_target: int = 0  # tokens to compute before the next token: the prompt, after preemption also the answer
    prefilled: int = 0
    joined_step: int = 0  # the engine's step count when it (re)joined the decoding batch
    finish_step: int = 0
    join: int = 0  # number of its last join: one that was preempted since has another
    last_token_s: float = 0.0  # when it was preempted, or has to wait for prefills: the instant of its last token
    priority: int = 0  # less is sooner; only where the engine goes by it


class TokenEvent(NamedTuple):
    """Tokens that one request got from an iteration; they left the GPU at the iteration's end."""

    request: EngineRequest
    last_index: int  # of the last of them, from 0
    tokens: int  # 1, or the number of merged steps
    gap_s: float | None  # mean time to each of them since the one before; None for the first token of a request
    finished: bool

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def first(self) -> bool:
        return self.gap_s is None


@dataclass(frozen=True, slots=True)
class Iteration:
    """A planned iteration, or `steps` equal ones of pure decode merged."""

    start_s: float
    steps: int
    seconds: float
    joules_per_gpu: float
    mhz: int  # effective: the lock, or less under a power limit
    batch: int  # sequences that decode
    context_tokens: int  # of those, in the first step
    chunks: tuple[tuple[EngineRequest, int], ...]  # prefill: request, tokens of its prompt computed here
    # Of the first step, and what each further step adds.
    step_s: float
    step_growth_s: float
    step_j: float
    step_growth_j: float
    # How long the decoding sequences have waited for prefills before, and how many of them so long: seconds, count.
    paused: tuple[tuple[float, int], ...] = ()

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds

    @property
    def watts_per_gpu(self) -> float:
        return self.joules_per_gpu / self.seconds

    @property
    def prefill_tokens(self) -> int:
        return sum(tokens for _, tokens in self.chunks)

    @property
    def gap_s(self) -> float:
        """Mean time of a step."""
        return self.seconds / self.steps

    @property
    def gaps(self) -> tuple[tuple[float, int], ...]:
        """Token gaps of the decoding sequences in seconds, with how many have it."""
        if self.paused:
            return tuple((waited_s + self.seconds, count) for waited_s, count in self.paused)
        return ((self.seconds / self.steps, self.batch * self.steps),) if self.batch else ()


def with_steps(run: Iteration, steps: int) -> Iteration:
    """The same run of pure decode with another number of merged steps."""
    pairs = steps * (steps - 1) / 2
    return Iteration(
        start_s=run.start_s,
        steps=steps,
        seconds=steps * run.step_s + pairs * run.step_growth_s,
        joules_per_gpu=steps * run.step_j + pairs * run.step_growth_j,
        mhz=run.mhz,
        batch=run.batch,
        context_tokens=run.context_tokens,
        chunks=run.chunks,
        step_s=run.step_s,
        step_growth_s=run.step_growth_s,
        step_j=run.step_j,
        step_growth_j=run.step_growth_j,
    )


def steps_until(step_s: float, growth_s: float, seconds: float, most: int) -> int:
    """Fewest steps, at least 1 and at most `most`, whose total length reaches `seconds`."""
    if seconds <= step_s:
        return 1
    if growth_s == 0:
        return min(most, ceil(seconds / step_s))
    # n·a + n(n−1)/2·g = seconds
    half = step_s - growth_s / 2
    return min(most, max(1, ceil((sqrt(half * half + 2 * growth_s * seconds) - half) / growth_s)))
