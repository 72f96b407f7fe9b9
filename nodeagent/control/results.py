"""What goes into control/controls.py and what comes out of it, as values; service.py translates them to messages."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from nodeagent.control.settings import ControlKey, Setting, kind_of
from nodeagent.gpu.driver import GpuError, GpuInvalid, GpuLost, GpuPermission, GpuUnresponsive, GpuUnsupported


class Code(enum.Enum):
    """What became of one control; the names are those of the API."""

    APPLIED = "applied"
    UNKNOWN_GPU = "unknown_gpu"
    OUT_OF_RANGE = "out_of_range"
    HELD = "held"
    NO_PERMISSION = "no_permission"
    UNSUPPORTED = "unsupported"
    GPU_UNRESPONSIVE = "gpu_unresponsive"
    GPU_LOST = "gpu_lost"
    JOURNAL_FAILED = "journal_failed"
    DRIVER_ERROR = "driver_error"
    MIG_ENABLED = "mig_enabled"
    FOREIGN_WRITER = "foreign_writer"

    __hash__ = object.__hash__  # as ControlKind's


@dataclass(frozen=True, slots=True)
class Wish:
    """One control asked for."""

    gpu_uuid: str
    setting: Setting

    @property
    def key(self) -> ControlKey:
        return ControlKey(self.gpu_uuid, kind_of(self.setting))


@dataclass(frozen=True, slots=True)
class Observed:
    """What the GPU says right after a call."""

    sm_mhz: int | None = None
    power_limit_w: float | None = None


NOT_OBSERVED = Observed()


@dataclass(frozen=True, slots=True)
class Result:
    """Requested, applied and observed side by side: success is not obedience."""

    gpu_uuid: str
    code: Code
    detail: str = ""
    requested: Setting | None = None
    applied: Setting | None = None
    observed: Observed = NOT_OBSERVED


def code_of(error: GpuError) -> Code:
    """The code for a driver's error."""
    codes: dict[type[GpuError], Code] = {
        GpuLost: Code.GPU_LOST,
        GpuUnresponsive: Code.GPU_UNRESPONSIVE,
        GpuPermission: Code.NO_PERMISSION,
        GpuUnsupported: Code.UNSUPPORTED,
        GpuInvalid: Code.OUT_OF_RANGE,
    }
    return codes.get(type(error), Code.DRIVER_ERROR)
