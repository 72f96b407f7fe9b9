"""Holds the physics against the points measured on real H100s and prints the deviations for docs/physics.md.

`python -m simulator.physics_check` prints the two tables that stand in the page; a test fails when they differ.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from common.errors import exit_on_user_error
from simulator.physics import Physics
from simulator.physics_parameters import DATA_FOLDER, DEFAULT_NAME, read_file


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """Steady chat load on H100, vLLM, Llama-3.1-70B bf16, TP4, full clock (ML.ENERGY Benchmark v3)."""

    batch: int
    power_w: float  # per GPU
    joules_per_token: float  # of output, all GPUs
    tokens_per_s: float
    itl_p50_s: float


MEASURED = (
    MeasuredPoint(8, 441, 3.76, 470, 0.0166),
    MeasuredPoint(32, 449, 1.21, 1487, 0.0200),
    MeasuredPoint(128, 546, 0.563, 3876, 0.0279),
    MeasuredPoint(512, 623, 0.421, 5921, 0.0739),
)
TP = 4
# Mean lengths of that load: the context of a decoding sequence, and prompt and answer, whose ratio says how many
# prompt tokens ride along with each iteration in steady state.
CONTEXT_TOKENS = 500
PROMPT_TOKENS = 150
ANSWER_TOKENS = 350


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measured point beside the model."""

    measured: MeasuredPoint
    decode_s: float  # pure decode, comparable with the median gap (most iterations carry no prompt)
    mixed_s: float  # with the prompts mixed in, comparable with the mean gap
    mixed_w: float  # per GPU, comparable with measured power

    @property
    def decode_error(self) -> float:
        return self.decode_s / self.measured.itl_p50_s - 1

    @property
    def mixed_error(self) -> float:
        return self.mixed_s * self.measured.tokens_per_s / self.measured.batch - 1

    @property
    def power_error(self) -> float:
        return self.mixed_w / self.measured.power_w - 1


def compare(physics: Physics, point: MeasuredPoint) -> Comparison:
    """The model at a measured point's batch, at full clock."""
    mhz = physics.parameters.clock_max_mhz
    context = point.batch * CONTEXT_TOKENS
    prompts = round(point.batch * PROMPT_TOKENS / ANSWER_TOKENS)
    decode_s, _ = physics.iteration(TP, mhz, point.batch, context)
    mixed_s, mixed_w = physics.iteration(TP, mhz, point.batch, context, [(prompts, 0)])
    return Comparison(point, decode_s, mixed_s, mixed_w)


def deviations_table(physics: Physics) -> str:
    """Measured against modelled, as a Markdown table."""
    lines = [
        "| batch | ITL p50 ms measured | decode ms | deviation | mean gap ms measured | mixed ms | deviation "
        "| W/GPU measured | mixed W | deviation | J/token measured | J/token |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in MEASURED:
        c = compare(physics, point)
        joules = c.mixed_w * TP * c.mixed_s / point.batch
        lines.append(
            f"| {point.batch} | {point.itl_p50_s * 1e3:.1f} | {c.decode_s * 1e3:.1f} | {c.decode_error:+.1%} "
            f"| {point.batch / point.tokens_per_s * 1e3:.1f} | {c.mixed_s * 1e3:.1f} | {c.mixed_error:+.1%} "
            f"| {point.power_w:.0f} | {c.mixed_w:.0f} | {c.power_error:+.1%} "
            f"| {point.joules_per_token:.3g} | {joules:.3g} |"
        )
    return "\n".join(lines)


def parameters_table() -> str:
    """Every parameter with value, basis and source, as a Markdown table."""
    lines = ["| parameter | value | basis | source |", "|---|---|---|---|"]
    for name, quantity in read_file(DATA_FOLDER / f"{DEFAULT_NAME}.json").parameters.items():
        if name == "gemm":
            value = f"{len(quantity.value['tokens'])} points per TP"
        elif isinstance(quantity.value, dict):
            value = ", ".join(f"TP{tp} {number:g}" for tp, number in quantity.value.items())
        else:
            value = f"{quantity.value:,}" if isinstance(quantity.value, int) else f"{quantity.value:g}"
        lines.append(f"| `{name}` | {value} | {quantity.basis} | {quantity.source} |")
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    with exit_on_user_error("simulator.physics_check"):
        sys.stdout.write(f"{deviations_table(Physics.load())}\n\n{parameters_table()}\n")


if __name__ == "__main__":
    main()
