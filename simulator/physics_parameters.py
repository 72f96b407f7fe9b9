"""The parameters of the physics: what they are called, and how a parameter file is read and checked.

A file (`simulator/data/*.json`) gives every number with its basis (measured, derived, assumed) and its source, and
variants that assume otherwise about some of them. `simulator/physics.py` is built from the values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from common.config import ConfigModel
from common.errors import UserError

DATA_FOLDER = Path(__file__).parent / "data"
DEFAULT_NAME = "h100_llama70b"

Basis = Literal["measured", "derived", "assumed"]


class GemmTable(ConfigModel):
    """Milliseconds of all GEMM and element-wise kernels of one iteration at full clock, by tokens, for each TP."""

    tokens: tuple[PositiveInt, ...]
    ms: dict[int, tuple[PositiveFloat, ...]]

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if not self.tokens or self.tokens[0] != 1 or list(self.tokens) != sorted(set(self.tokens)):
            raise ValueError("tokens must rise and begin at 1")
        if any(len(row) != len(self.tokens) for row in self.ms.values()):
            raise ValueError("every row of ms must have one value per entry of tokens")
        return self


class Parameters(ConfigModel):
    """Every number of the model; what each means, its basis and its source stand in the data file."""

    clock_min_mhz: PositiveInt
    clock_max_mhz: PositiveInt
    clock_step_mhz: PositiveInt
    hbm_bytes_per_s: PositiveFloat
    peak_flops: PositiveFloat
    weight_bytes: PositiveFloat
    flops_per_token: PositiveFloat
    layers: PositiveInt
    hidden_size: PositiveInt
    kv_bytes_per_token: PositiveInt
    kv_capacity_tokens: dict[int, PositiveInt]
    gemm: GemmTable
    gemm_memory_ms: dict[int, PositiveFloat]
    gemm_compute_us_per_token: dict[int, PositiveFloat]
    roofline_exponent: PositiveFloat
    memory_clock_sensitivity: NonNegativeFloat
    compute_knee_mhz: PositiveFloat
    allreduce_calls: NonNegativeInt
    allreduce_us: dict[int, NonNegativeFloat]
    allreduce_us_per_token: dict[int, NonNegativeFloat]
    host_ms: NonNegativeFloat
    sequence_ms: NonNegativeFloat
    kv_read_efficiency: PositiveFloat
    attention_flops: PositiveFloat
    legacy_decode_floor_ms: NonNegativeFloat
    static_w: PositiveFloat
    idle_clock_w: NonNegativeFloat
    busy_clock_w: NonNegativeFloat
    busy_w: NonNegativeFloat
    hbm_w: NonNegativeFloat
    flop_w: NonNegativeFloat
    flop_exponent: PositiveFloat
    nvlink_w: NonNegativeFloat
    voltage_floor_ratio: PositiveFloat
    voltage_floor_mhz: PositiveFloat
    power_limit_w: PositiveFloat
    loading_w: NonNegativeFloat

    @model_validator(mode="after")
    def _same_tps(self) -> Self:
        allreduce = (self.allreduce_us, self.allreduce_us_per_token)
        tables = (self.gemm.ms, self.gemm_memory_ms, self.gemm_compute_us_per_token, *allreduce)
        if any(set(table) != set(self.kv_capacity_tokens) for table in tables):
            raise ValueError("kv_capacity_tokens, gemm and allreduce must name the same tensor parallelisms")
        return self


class Quantity(ConfigModel):
    """One entry of the data file."""

    value: Any
    basis: Basis
    source: str


class Variant(ConfigModel):
    """Another assumption about some parameters."""

    source: str
    values: dict[str, Any]


class ParameterFile(ConfigModel):
    """The data file as it stands."""

    name: str
    parameters: dict[str, Quantity]
    variants: dict[str, Variant] = Field(default_factory=dict)


def read_parameters(file: Path, variant: str) -> tuple[str, Parameters]:
    """Name and checked values of a parameter file with one of its variants ("base": as they stand).

    Raises UserError.
    """
    data = read_file(file)
    values = {key: quantity.value for key, quantity in data.parameters.items()}
    if variant != "base":
        if variant not in data.variants:
            known = ", ".join(["base", *data.variants])
            raise UserError(f"{file}: has no physics variant {variant!r}.", f"Use one of: {known}.")
        values |= data.variants[variant].values
    try:
        return data.name, Parameters.model_validate(values)
    except ValidationError as error:
        raise _bad_file(file, error) from None


_DURATIONS = (
    "gemm_memory_ms",
    "gemm_compute_us_per_token",
    "allreduce_us",
    "allreduce_us_per_token",
    "host_ms",
    "sequence_ms",
    "legacy_decode_floor_ms",
)
# With their peaks, so that the use of memory and tensor cores, and what that draws, stays the same share.
_RATES = ("hbm_bytes_per_s", "peak_flops", "attention_flops")
_POWERS = ("static_w", "idle_clock_w", "busy_clock_w", "busy_w", "hbm_w", "flop_w", "nvlink_w", "loading_w")


def off_by(parameters: Parameters, share: float) -> Parameters:
    """Every duration and every power longer and larger by `share`; the power limit and memory stay as they are."""
    more = 1 + share

    def scaled(value: Any, factor: float) -> Any:
        return {tp: number * factor for tp, number in value.items()} if isinstance(value, dict) else value * factor

    changed = {name: scaled(getattr(parameters, name), more) for name in (*_DURATIONS, *_POWERS)}
    changed |= {name: scaled(getattr(parameters, name), 1 / more) for name in _RATES}
    table = {tp: tuple(ms * more for ms in row) for tp, row in parameters.gemm.ms.items()}
    return parameters.model_copy(update={**changed, "gemm": parameters.gemm.model_copy(update={"ms": table})})


def read_file(file: Path) -> ParameterFile:
    """The data file with bases and sources. Raises UserError."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{file}: cannot read physics parameters: {reason}.", "Name a readable JSON file.") from None
    try:
        return ParameterFile.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON: {error}.", "Correct the named line.") from None
    except ValidationError as error:
        raise _bad_file(file, error) from None


def _bad_file(file: Path, error: ValidationError) -> UserError:
    lines = [f"{'.'.join(str(part) for part in item['loc']) or '(all)'}: {item['msg']}" for item in error.errors()]
    return UserError(f"{file}: " + "; ".join(lines) + ".", "Correct the named parameters.")
