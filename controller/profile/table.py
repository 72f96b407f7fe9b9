"""The profile: what was measured of one model on one GPU type under one engine, as a value.

Calibration (controller/calibrate) makes it, the store and files keep it as canonical JSON with a checksum, and
everything that plans reads it through profile/fit.py. Nothing here computes between points.

Loads are stated in *equivalent requests/s* of a group's calibration mix, so that a drifting mix of classes or token
lengths changes the stated load and not the curves: one request weighs `a * input_tokens + b * output_tokens`, with a
and b measured in calibration, relative to the mean request of the mix.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from common.errors import UserError
from controller.domain.classes import Bucket, ClassGroup, ClassScheme, RequestClass
from controller.domain.decision import canonical_json
from controller.domain.slo import Slo

# A profile is written in the oldest form that holds all of it, so that its checksum does not change with the program.
SCHEMA = 2
PLAIN_SCHEMA = 1  # without power caps, actuators and repeats


# How the fingerprint of a real engine begins: `vllm 0.9.2, bf16, ...`.
ENGINE = "vllm "


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """One measurement of one instance under a steady load. Latencies by input bucket, for the buckets seen."""

    group: str
    tp: int
    mhz: int
    rate_rps: float  # offered requests/s of the group's calibration mix
    power_w: float  # mean over the window, whole instance (all its GPUs)
    attainment: float  # share of requests in SLO
    attainment_worst: float  # the same of the input bucket that fares worst: the SLO holds for each
    ttft_p50_ms: Mapping[Bucket, float]
    ttft_p99_ms: Mapping[Bucket, float]
    tbt_p99_ms: float  # P99 over requests of their mean time between tokens
    gap_p99_ms: float  # P99 over single token gaps
    running_mean: float  # requests in the batch, time-weighted
    running_p99: float
    requests: int  # measured, for judging the noise
    cap_w: float | None = None  # power limit of each GPU, the clock free up to `mhz`; None: the clock is locked at it
    repeats: int = 1  # measurements that the values are means of
    power_sd_w: float = 0.0  # standard deviation over the repeats; 0 for one
    attainment_sd: float = 0.0

    @property
    def power_error_ratio(self) -> float:
        """Standard error of the mean power, as a share of it; 0 where nothing was repeated."""
        return self.power_sd_w / self.power_w / math.sqrt(self.repeats) if self.power_w > 0 else 0.0

    @property
    def attainment_low(self) -> float:
        """The attainment less its standard error: what the gate counts on."""
        return self.attainment_worst - self.attainment_sd / math.sqrt(self.repeats)

    def in_slo(self, slo: Slo) -> bool:
        return self.attainment_low >= slo.attainment and self.gap_p99_ms <= slo.token_gap_p99_ms

    def to_json_value(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "group": self.group,
            "tp": self.tp,
            "mhz": self.mhz,
            "rate_rps": _number(self.rate_rps),
            "power_w": _number(self.power_w),
            "attainment": _number(self.attainment),
            "attainment_worst": _number(self.attainment_worst),
            "ttft_p50_ms": {bucket.value: _number(value) for bucket, value in self.ttft_p50_ms.items()},
            "ttft_p99_ms": {bucket.value: _number(value) for bucket, value in self.ttft_p99_ms.items()},
            "tbt_p99_ms": _number(self.tbt_p99_ms),
            "gap_p99_ms": _number(self.gap_p99_ms),
            "running_mean": _number(self.running_mean),
            "running_p99": _number(self.running_p99),
            "requests": self.requests,
        }
        if self.cap_w is not None:
            value["cap_w"] = _number(self.cap_w)
        if self.repeats > 1:
            value["repeats"] = self.repeats
            value["power_sd_w"], value["attainment_sd"] = _number(self.power_sd_w), _number(self.attainment_sd)
        return value

    @staticmethod
    def from_json_value(value: Mapping[str, Any]) -> OperatingPoint:
        """Raises KeyError, TypeError, ValueError or AttributeError for what `to_json_value` did not make."""
        return OperatingPoint(
            group=str(value["group"]),
            tp=int(value["tp"]),
            mhz=int(value["mhz"]),
            rate_rps=_number(value["rate_rps"]),
            power_w=_number(value["power_w"]),
            attainment=_number(value["attainment"]),
            attainment_worst=_number(value["attainment_worst"]),
            ttft_p50_ms={Bucket(b): _number(v) for b, v in value["ttft_p50_ms"].items()},
            ttft_p99_ms={Bucket(b): _number(v) for b, v in value["ttft_p99_ms"].items()},
            tbt_p99_ms=_number(value["tbt_p99_ms"]),
            gap_p99_ms=_number(value["gap_p99_ms"]),
            running_mean=_number(value["running_mean"]),
            running_p99=_number(value["running_p99"]),
            requests=int(value["requests"]),
            cap_w=_number(value["cap_w"]) if "cap_w" in value else None,
            repeats=int(value.get("repeats", 1)),
            power_sd_w=_number(value.get("power_sd_w", 0.0)),
            attainment_sd=_number(value.get("attainment_sd", 0.0)),
        )


class Actuator(StrEnum):
    """What holds an instance's power down."""

    CLOCK = "clock"
    CAP = "cap"
    EITHER = "either"  # the measurements do not tell them apart: the clock is taken


SERVING = "serving"  # a mixed load, beside the phases of controller/calibrate


@dataclass(frozen=True, slots=True)
class ActuatorRow:
    """The best clock lock against the best power cap at one load, both within the SLO and measured."""

    phase: str  # "serving", or "prefill" or "decode" alone
    group: str  # "" where a phase ran alone
    tp: int
    load: float  # requests/s per instance; tokens/s where a phase ran alone
    mhz: int | None  # None: no lock keeps the SLO
    clock_power_w: float  # of the whole instance
    cap_w: float | None  # of each GPU; None: no cap keeps the SLO
    cap_power_w: float
    error_ratio: float  # of the difference: standard error as a share of the power
    better: Actuator

    def to_json_value(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "group": self.group,
            "tp": self.tp,
            "load": _number(self.load),
            "mhz": self.mhz,
            "clock_power_w": _number(self.clock_power_w),
            "cap_w": None if self.cap_w is None else _number(self.cap_w),
            "cap_power_w": _number(self.cap_power_w),
            "error_ratio": _number(self.error_ratio),
            "better": self.better.value,
        }

    @staticmethod
    def from_json_value(value: Mapping[str, Any]) -> ActuatorRow:
        return ActuatorRow(
            phase=str(value["phase"]),
            group=str(value["group"]),
            tp=int(value["tp"]),
            load=_number(value["load"]),
            mhz=None if value["mhz"] is None else int(value["mhz"]),
            clock_power_w=_number(value["clock_power_w"]),
            cap_w=None if value["cap_w"] is None else _number(value["cap_w"]),
            cap_power_w=_number(value["cap_power_w"]),
            error_ratio=_number(value["error_ratio"]),
            better=Actuator(value["better"]),
        )


@dataclass(frozen=True, slots=True)
class IdlePoint:
    """An instance that is loaded and serves nothing, its clock locked."""

    tp: int
    mhz: int
    power_w: float  # whole instance


@dataclass(frozen=True, slots=True)
class ClassMix:
    """How one class stood in a group's calibration mix."""

    share: float  # of the group's requests
    input_tokens: float  # mean
    output_tokens: float  # mean


@dataclass(frozen=True, slots=True)
class TokenWork:
    """Seconds of a saturated instance that one token takes; only the ratio of the two matters for planning."""

    input_s: float
    output_s: float

    def of(self, input_tokens: float, output_tokens: float) -> float:
        return self.input_s * input_tokens + self.output_s * output_tokens


@dataclass(frozen=True, slots=True)
class StartCost:
    """From the start effect to the first request: duration, and energy of the whole instance meanwhile."""

    start_s: float
    start_j: float


@dataclass(frozen=True, slots=True)
class Profile:
    model: str
    gpu: str
    engine: str  # fingerprint: version, quantisation, flags that change the surface
    scheme: ClassScheme
    slo: Slo
    groups: tuple[ClassGroup, ...]
    tps: tuple[int, ...]
    clocks_mhz: tuple[int, ...]  # the measured grid, ascending; the last is the full clock
    points: tuple[OperatingPoint, ...]
    idle: tuple[IdlePoint, ...]
    parked_w: float  # one GPU without a context
    mixes: Mapping[str, Mapping[RequestClass, ClassMix]]  # group -> class -> its part of the mix
    work: TokenWork
    starts: Mapping[int, StartCost] = field(default_factory=dict)  # by tp
    provenance: str = ""  # who measured it, on what
    cap_points: tuple[OperatingPoint, ...] = ()  # the same measured under power caps, clocks free
    actuators: tuple[ActuatorRow, ...] = ()  # what the two were found to be worth (profile/actuator.py)

    @property
    def schema(self) -> int:
        new = self.cap_points or self.actuators or any(point.repeats > 1 for point in self.points)
        return SCHEMA if new else PLAIN_SCHEMA

    @property
    def full_mhz(self) -> int:
        return self.clocks_mhz[-1]

    def group(self, name: str) -> ClassGroup:
        """Raises KeyError for a group that was not measured."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def idle_power_w(self, tp: int, mhz: int) -> float | None:
        """Of a whole instance that serves nothing; None where it was not measured."""
        for point in self.idle:
            if point.tp == tp and point.mhz == mhz:
                return point.power_w
        return None

    def mean_work_s(self, group: str) -> float:
        """Work of the mean request of a group's calibration mix."""
        mix = self.mixes[group]
        share = sum(part.share for part in mix.values())
        return sum(part.share * self.work.of(part.input_tokens, part.output_tokens) for part in mix.values()) / share

    def request_weight(
        self, group: str, request_class: RequestClass, mean_tokens: tuple[float, float] | None = None
    ) -> float:
        """Equivalent requests of the group's mix that one request of a class is worth.

        `mean_tokens` are the (input, output) means seen live; without them the calibration's own are used. A class
        that the mix did not contain (a larger pool serves it by spill) is weighed by the mix that knows it, or by
        the mean request when none does.
        """
        if mean_tokens is None:
            part = self._class_mix(group, request_class)
            if part is None:
                return 1.0
            mean_tokens = (part.input_tokens, part.output_tokens)
        return self.work.of(*mean_tokens) / self.mean_work_s(group)

    def _class_mix(self, group: str, request_class: RequestClass) -> ClassMix | None:
        for mix in (self.mixes[group], *self.mixes.values()):
            if request_class in mix:
                return mix[request_class]
        return None

    def equivalent_rate(
        self,
        group: str,
        rates_rps: Mapping[RequestClass, float],
        mean_tokens: Mapping[RequestClass, tuple[float, float]] | None = None,
    ) -> float:
        """Equivalent requests/s of a group's mix that the given class rates amount to."""
        tokens = mean_tokens or {}
        mean_work_s = self.mean_work_s(group) if tokens else 0.0  # once for all classes
        return sum(
            rate * (self.work.of(*tokens[c]) / mean_work_s if c in tokens else self.request_weight(group, c))
            for c, rate in rates_rps.items()
        )

    def checksum(self) -> str:
        """SHA-256 over the canonical JSON of everything but itself."""
        return hashlib.sha256(canonical_json(_body(self)).encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: the same profile has the same bytes."""
        return canonical_json({**_body(self), "checksum": self.checksum()})

    @staticmethod
    def from_json(text: str, name: str = "profile") -> Profile:
        """Reads what `to_json` wrote; raises UserError that says what is wrong with it, by its `name`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: not valid JSON: {error}.", "Export it again.") from None
        if not isinstance(data, dict):
            raise UserError(f"{name}: not a JSON object.", "Export it again.")
        if data.get("schema") not in (PLAIN_SCHEMA, SCHEMA):
            read = f"{PLAIN_SCHEMA} and {SCHEMA}"
            raise UserError(f"{name}: schema {data.get('schema')!r}, this program reads {read}.", "Calibrate again.")
        try:
            profile = _parse(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{name}: a field is missing or malformed: {error!r}.", "Export it again.") from None
        if data.get("checksum") != profile.checksum():
            raise UserError(f"{name}: its checksum does not match its content.", "Export it again; do not edit it.")
        return profile


def _body(profile: Profile) -> dict[str, Any]:
    body: dict[str, Any] = {
        "schema": profile.schema,
        "model": profile.model,
        "gpu": profile.gpu,
        "engine": profile.engine,
        "scheme": {
            "input_cuts_tokens": list(profile.scheme.input_cuts_tokens),
            "output_cuts_tokens": list(profile.scheme.output_cuts_tokens),
        },
        "slo": {name: _number(getattr(profile.slo, name)) for name in Slo.__dataclass_fields__},
        "groups": {group.name: sorted(str(c) for c in group.classes) for group in profile.groups},
        "group_order": [group.name for group in profile.groups],
        "tps": list(profile.tps),
        "clocks_mhz": list(profile.clocks_mhz),
        "points": [point.to_json_value() for point in profile.points],
        "idle": [{"tp": p.tp, "mhz": p.mhz, "power_w": _number(p.power_w)} for p in profile.idle],
        "parked_w": _number(profile.parked_w),
        "mixes": {
            group: {
                str(c): {
                    "share": _number(m.share),
                    "input_tokens": _number(m.input_tokens),
                    "output_tokens": _number(m.output_tokens),
                }
                for c, m in mix.items()
            }
            for group, mix in profile.mixes.items()
        },
        "work": {"input_s": _number(profile.work.input_s), "output_s": _number(profile.work.output_s)},
        "starts": {
            str(tp): {"start_s": _number(s.start_s), "start_j": _number(s.start_j)} for tp, s in profile.starts.items()
        },
        "provenance": profile.provenance,
    }
    if profile.cap_points:
        body["cap_points"] = [point.to_json_value() for point in profile.cap_points]
    if profile.actuators:
        body["actuators"] = [row.to_json_value() for row in profile.actuators]
    return body


def _parse(data: Mapping[str, Any]) -> Profile:
    groups = {
        name: ClassGroup(name, frozenset(RequestClass.parse(c) for c in classes))
        for name, classes in data["groups"].items()
    }
    scheme = data["scheme"]
    return Profile(
        model=str(data["model"]),
        gpu=str(data["gpu"]),
        engine=str(data["engine"]),
        scheme=ClassScheme(_pair(scheme["input_cuts_tokens"]), _pair(scheme["output_cuts_tokens"])),
        slo=Slo(**{name: _number(data["slo"][name]) for name in Slo.__dataclass_fields__}),
        groups=tuple(groups[name] for name in data["group_order"]),
        tps=tuple(int(tp) for tp in data["tps"]),
        clocks_mhz=tuple(int(mhz) for mhz in data["clocks_mhz"]),
        points=tuple(OperatingPoint.from_json_value(point) for point in data["points"]),
        idle=tuple(IdlePoint(int(p["tp"]), int(p["mhz"]), _number(p["power_w"])) for p in data["idle"]),
        parked_w=_number(data["parked_w"]),
        mixes={
            group: {
                RequestClass.parse(c): ClassMix(
                    _number(m["share"]), _number(m["input_tokens"]), _number(m["output_tokens"])
                )
                for c, m in mix.items()
            }
            for group, mix in data["mixes"].items()
        },
        work=TokenWork(_number(data["work"]["input_s"]), _number(data["work"]["output_s"])),
        starts={int(tp): StartCost(_number(s["start_s"]), _number(s["start_j"])) for tp, s in data["starts"].items()},
        provenance=str(data["provenance"]),
        cap_points=tuple(OperatingPoint.from_json_value(point) for point in data.get("cap_points", ())),
        actuators=tuple(ActuatorRow.from_json_value(row) for row in data.get("actuators", ())),
    )


def _number(value: Any) -> float:
    """JSON numbers as floats, so that 1 and 1.0 in a file make one profile; a profile holds finite numbers only."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second
