"""Step time and power of one tensor-parallel group of H100s as functions of clock, batch, context and prefill.

The one truth of the digital twin: the engine emulator (real time) and the virtual fleet both ask it how long an
iteration takes and what every GPU draws meanwhile. Parameters are data (`simulator/data/*.json`), each with its basis
and source; formulas and deviations from measurements stand in docs/physics.md. The planner never reads this module.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, Self

from common.errors import UserError
from simulator.physics_parameters import DATA_FOLDER, DEFAULT_NAME, Parameters, off_by, read_parameters

Prefill = Sequence[tuple[int, int]]  # per chunk: its tokens, tokens of the same prompt already in the KV cache


class DecodeLine(NamedTuple):
    """A decode-only iteration is affine in the tokens of context: seconds and joules per GPU = a + b · context."""

    seconds: float
    seconds_per_context_token: float
    joules: float
    joules_per_context_token: float
    up_to_context_tokens: float  # beyond it another line holds (an engine with a floor leaves the floor)


class _AtClock(NamedTuple):
    """What depends on tensor parallelism and clock alone. Powers in W, times in s."""

    gemm_table_s: list[float]
    gemm_memory: float  # (t_mem · gm)^q
    gemm_compute: float  # (t_comp · gc)^q, of one token
    gemm_memory_full: float  # the same two at full clock
    gemm_compute_full: float
    kv_s_per_token: float
    attention_s_per_unit: float
    allreduce_s: float
    allreduce_s_per_token: float
    busy_w: float
    busy_knee_w: float  # the same at the clock that large GEMMs can hold under the power limit
    tensor_w: float  # tensor cores at full use, at this clock's voltage
    tensor_knee_w: float
    kv_w: float
    allreduce_w: float
    host_w: float


# What an engine may be told to do otherwise, as it stands behind a + in a physics text.
LEGACY, PREFILL_FIRST = "legacy", "prefill-first"
MODES = (LEGACY, PREFILL_FIRST)


class Physics:
    """The model with one set of parameters. Values only: nothing in it changes after construction.

    `legacy` is an engine without CUDA graphs: no decode iteration below the floor. `prefill_first` changes no
    iteration, only what engines on it put into one (`simulator/engine.py`).
    """

    def __init__(
        self,
        name: str,
        parameters: Parameters,
        variant: str = "base",
        legacy: bool = False,
        prefill_first: bool = False,
    ) -> None:
        self.name = name
        self.variant = variant
        self.legacy = legacy
        self.prefill_first = prefill_first
        self.parameters = parameters
        p = parameters
        self.tps: tuple[int, ...] = tuple(sorted(p.kv_capacity_tokens))
        self.clocks_mhz: tuple[int, ...] = tuple(range(p.clock_min_mhz, p.clock_max_mhz + 1, p.clock_step_mhz))
        self.loading_w = p.loading_w
        self._gemm_tables_s = {tp: _dense(p.gemm.tokens, p.gemm.ms[tp]) for tp in self.tps}
        self._hbm_s = {tp: p.weight_bytes / tp / p.hbm_bytes_per_s for tp in self.tps}
        self._flop_s_per_token = {tp: p.flops_per_token / tp / p.peak_flops for tp in self.tps}
        # Memory of pure functions: bounded by TPs x lockable clocks (x batch for the lines).
        self._at_clock: dict[tuple[int, int], _AtClock] = {}
        self._decode_lines: dict[tuple[int, int, int], tuple[DecodeLine, ...]] = {}

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_NAME,
        variant: str = "base",
        legacy: bool = False,
        path: Path | None = None,
        prefill_first: bool = False,
    ) -> Self:
        """Reads `simulator/data/<name>.json`, or the file at `path`, and applies one of its variants.

        Raises UserError.
        """
        file = path if path is not None else DATA_FOLDER / f"{name}.json"
        data_name, parameters = read_parameters(file, variant)
        return cls(data_name, parameters, variant, legacy, prefill_first)

    @staticmethod
    def from_text(text: str) -> Physics:
        """Reads `[FILE:]VARIANT[+MODE...]`, `FILE[+MODE...]` or nothing, as it stands in the environment or on a
        command line.

        FILE is a path that ends in .json (parameters; without it the built-in ones are meant), or in .csv (a measured
        grid, simulator/grid_file.py, which has no variants). Raises UserError.
        """
        text, *modes = text.strip().split("+")
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown:
            known = ", ".join(f"+{mode}" for mode in MODES)
            raise UserError(f"physics {text}: unknown engine mode {unknown[0]!r}.", f"Use some of: {known}.")
        legacy, prefill_first = LEGACY in modes, PREFILL_FIRST in modes
        if text.endswith(".csv"):
            from simulator.grid_file import read_grid  # which builds on this module

            if legacy:
                raise UserError(f"physics {text}+{LEGACY}: a grid is measured as it is.", f"Leave +{LEGACY} out.")
            return read_grid(Path(text), prefill_first)
        file, variant = "", text
        if text.endswith(".json"):
            file, variant = text, ""
        elif ":" in text:
            file, _, variant = text.rpartition(":")
        path = Path(file) if file else None
        return Physics.load(variant=variant or "base", legacy=legacy, path=path, prefill_first=prefill_first)

    @property
    def modes(self) -> tuple[str, ...]:
        """Of the engine, by name."""
        return (LEGACY,) * self.legacy + (PREFILL_FIRST,) * self.prefill_first

    def identity(self) -> list[Any]:
        """All that its answers depend on, as a JSON value: what is measured on it is kept under this."""
        return [self.name, self.variant, list(self.modes), self.parameters.model_dump(mode="json")]

    def off_by(self, share: float) -> Physics:
        """The same GPUs, but slower and hungrier by a share than these, as no profile knows. Negative: better."""
        if not share:
            return self
        name = f"{self.name} off by {share:+g}"
        return Physics(name, off_by(self.parameters, share), self.variant, self.legacy, self.prefill_first)

    def without_floor(self) -> Physics:
        """The same without what makes an engine a legacy one."""
        return Physics(self.name, self.parameters, self.variant) if self.legacy else self

    def sequence_s(self, tp: int, mhz: int) -> float:
        """Seconds that each decoding sequence adds to an iteration beside its share of the GEMMs and its context."""
        self._clock(tp, mhz)
        return self.parameters.sequence_ms / 1e3

    def iteration(
        self,
        tp: int,
        mhz: int,
        batch: int,
        context_tokens: int,
        prefill: Prefill = (),
        power_limit_w: float | None = None,
    ) -> tuple[float, float]:
        """Seconds of one iteration and the mean power of each of its GPUs in W.

        `batch` sequences decode one token each over `context_tokens` in all; `prefill` chunks ride along. A power
        limit below the board's own lowers the clock (`effective_mhz`). Raises ValueError when there is no work.
        """
        if power_limit_w is not None and power_limit_w < self.parameters.power_limit_w:
            mhz = self.effective_mhz(tp, mhz, power_limit_w, batch, context_tokens, prefill)
        seconds, joules = self._cost(tp, mhz, batch, context_tokens, prefill)
        return seconds, joules / seconds

    def effective_mhz(
        self,
        tp: int,
        lock_mhz: int,
        power_limit_w: float,
        batch: int,
        context_tokens: int,
        prefill: Prefill = (),
    ) -> int:
        """The highest lockable clock up to `lock_mhz` whose mean iteration power keeps the limit.

        The lowest clock when none does: like the real board, which then exceeds a limit below its floor.
        """
        clocks = self.clocks_mhz[: max(1, bisect_right(self.clocks_mhz, lock_mhz))]
        low, high = 0, len(clocks) - 1
        while low < high:
            middle = (low + high + 1) // 2
            seconds, joules = self._cost(tp, clocks[middle], batch, context_tokens, prefill)
            if joules <= power_limit_w * seconds:
                low = middle
            else:
                high = middle - 1
        return clocks[low]

    def decode_line(self, tp: int, mhz: int, batch: int, context_tokens: int) -> DecodeLine:
        """A decode-only iteration of `batch` sequences as a line over its context, from `context_tokens` upwards.

        Equal to `iteration` without a lower power limit.
        """
        lines = self._decode_lines.get((tp, mhz, batch))
        if lines is None:
            lines = self._decode_lines[tp, mhz, batch] = self._make_decode_lines(tp, mhz, batch)
        for line in lines:
            if context_tokens <= line.up_to_context_tokens:
                return line
        raise AssertionError("the last line has no end")

    def _make_decode_lines(self, tp: int, mhz: int, batch: int) -> tuple[DecodeLine, ...]:
        c = self._clock(tp, mhz)
        slope_s, slope_j = c.kv_s_per_token, c.kv_s_per_token * c.kv_w
        seconds, joules = self._modern_cost(c, tp, batch, 0, ())
        free = DecodeLine(seconds, slope_s, joules, slope_j, inf)
        floor_s = self.parameters.legacy_decode_floor_ms / 1e3
        if not self.legacy or seconds >= floor_s:
            return (free,)
        on_floor_j = joules + (floor_s - seconds) * c.host_w
        floor = DecodeLine(floor_s, 0.0, on_floor_j, slope_j - slope_s * c.host_w, (floor_s - seconds) / slope_s)
        return floor, free

    def idle_w(self, mhz: int, context: bool) -> float:
        """Power of a GPU that computes nothing: with a CUDA context it follows the clock, without it does not."""
        p = self.parameters
        return p.static_w + (p.idle_clock_w * self._switching(mhz) if context else 0.0)

    def kv_capacity_tokens(self, tp: int) -> int:
        """Tokens of context that fit into the KV cache of one instance. Raises UserError for an unknown TP."""
        self._check_tp(tp)
        return self.parameters.kv_capacity_tokens[tp]

    def _check_tp(self, tp: int) -> None:
        if tp not in self.tps:
            known = ", ".join(str(known) for known in self.tps)
            raise UserError(f"{self.name}: no parameters for tensor parallelism {tp}.", f"Use one of: {known}.")

    def _voltage(self, mhz: float) -> float:
        """V(f) / Vmax: a floor, then linear to 1 at full clock."""
        p = self.parameters
        if mhz <= p.voltage_floor_mhz:
            return p.voltage_floor_ratio
        rise = (mhz - p.voltage_floor_mhz) / (p.clock_max_mhz - p.voltage_floor_mhz)
        return p.voltage_floor_ratio + (1 - p.voltage_floor_ratio) * rise

    def _switching(self, mhz: float) -> float:
        """s(f) = f · V² relative to full clock: how dynamic power scales."""
        return float(mhz / self.parameters.clock_max_mhz * self._voltage(mhz) ** 2)

    def _clock(self, tp: int, mhz: int) -> _AtClock:
        at_clock = self._at_clock.get((tp, mhz))
        if at_clock is None:
            self._check_tp(tp)
            if mhz <= 0:
                raise ValueError(f"a clock of {mhz} MHz does not run")
            at_clock = self._at_clock[tp, mhz] = self._make_clock(tp, mhz)
        return at_clock

    def _make_clock(self, tp: int, mhz: int) -> _AtClock:
        p = self.parameters
        knee_mhz = min(mhz, p.compute_knee_mhz)
        memory_slowdown = 1 + p.memory_clock_sensitivity * (p.clock_max_mhz / mhz - 1)
        compute_slowdown = p.compute_knee_mhz / knee_mhz
        memory_s = p.gemm_memory_ms[tp] / 1e3
        compute_s = p.gemm_compute_us_per_token[tp] / 1e6
        q = p.roofline_exponent
        busy_w = p.static_w + p.busy_w + (p.idle_clock_w + p.busy_clock_w) * self._switching(mhz)
        kv_bytes_per_s = p.kv_read_efficiency * p.hbm_bytes_per_s
        return _AtClock(
            gemm_table_s=self._gemm_tables_s[tp],
            gemm_memory=(memory_s * memory_slowdown) ** q,
            gemm_compute=(compute_s * compute_slowdown) ** q,
            gemm_memory_full=memory_s**q,
            gemm_compute_full=compute_s**q,
            kv_s_per_token=p.kv_bytes_per_token / tp / kv_bytes_per_s * memory_slowdown,
            attention_s_per_unit=4 * p.hidden_size * p.layers / tp / p.attention_flops * compute_slowdown,
            allreduce_s=p.allreduce_calls * p.allreduce_us[tp] / 1e6,
            allreduce_s_per_token=p.allreduce_us_per_token[tp] / 1e6,
            busy_w=busy_w,
            busy_knee_w=p.static_w + p.busy_w + (p.idle_clock_w + p.busy_clock_w) * self._switching(knee_mhz),
            tensor_w=p.flop_w * self._voltage(mhz) ** 2,
            tensor_knee_w=p.flop_w * self._voltage(knee_mhz) ** 2,
            kv_w=busy_w + p.hbm_w * p.kv_read_efficiency,
            allreduce_w=busy_w + p.nvlink_w,
            host_w=self.idle_w(mhz, context=True),
        )

    def _cost(self, tp: int, mhz: int, batch: int, context_tokens: int, prefill: Prefill) -> tuple[float, float]:
        """Seconds and joules per GPU of one iteration; a legacy engine waits for its host below the floor."""
        c = self._clock(tp, mhz)
        seconds, joules = self._modern_cost(c, tp, batch, context_tokens, prefill)
        floor_s = self.parameters.legacy_decode_floor_ms / 1e3
        if self.legacy and batch > 0 and seconds < floor_s:
            return floor_s, joules + (floor_s - seconds) * c.host_w
        return seconds, joules

    def _modern_cost(
        self, c: _AtClock, tp: int, batch: int, context_tokens: int, prefill: Prefill
    ) -> tuple[float, float]:
        """The formulas of docs/physics.md, "Step time" and "Power"."""
        tokens = batch
        attention_units = 0.0
        for chunk, before in prefill:
            tokens += chunk
            attention_units += chunk * (before + chunk / 2)
        if tokens <= 0:
            raise ValueError("an iteration needs at least one token")
        p = self.parameters
        table = c.gemm_table_s
        full_s = table[tokens] if tokens < len(table) else table[-1] * tokens / (len(table) - 1)
        power = tokens**p.roofline_exponent
        compute = c.gemm_compute * power
        roof = c.gemm_memory + compute
        gemm_s = full_s * (roof / (c.gemm_memory_full + c.gemm_compute_full * power)) ** (1 / p.roofline_exponent)

        # Compute-bound work cannot hold clocks above the knee under the board's power limit: its share of the GEMM
        # phase is priced at the knee. The rest is cut at the limit.
        share = compute / roof
        flops = (self._flop_s_per_token[tp] * tokens / gemm_s) ** p.flop_exponent
        gemm_w = (
            share * (c.busy_knee_w + c.tensor_knee_w * flops)
            + (1 - share) * (c.busy_w + c.tensor_w * flops)
            + p.hbm_w * min(1.0, self._hbm_s[tp] / gemm_s)
        )
        gemm_w = min(gemm_w, p.power_limit_w)

        tensor_s = gemm_s + attention_units * c.attention_s_per_unit
        memory_s = context_tokens * c.kv_s_per_token + batch * (p.sequence_ms / 1e3)
        allreduce_s = c.allreduce_s + tokens * c.allreduce_s_per_token
        host_s = p.host_ms / 1e3
        seconds = tensor_s + memory_s + allreduce_s + host_s
        joules = tensor_s * gemm_w + memory_s * c.kv_w + allreduce_s * c.allreduce_w + host_s * c.host_w
        return seconds, joules


def _dense(tokens: Sequence[int], ms: Sequence[float]) -> list[float]:
    """Seconds for every token count from 0 to the last point, linear between points."""
    table = [ms[0] / 1e3]
    points = dict(zip(tokens, ms, strict=True))
    for low, high in pairwise(tokens):
        step = (points[high] - points[low]) / (high - low)
        table.extend((points[low] + step * (n - low)) / 1e3 for n in range(low, high))
    return [*table, ms[-1] / 1e3]
