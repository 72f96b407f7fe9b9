"""What a GPU is doing while it draws its energy: every GPU of the cluster is always in one of these."""

from __future__ import annotations

from enum import StrEnum


class GpuState(StrEnum):
    SERVING = "serving"
    IDLE = "idle"  # an instance is loaded and no request runs
    LOADING = "loading"  # starting or warming up
    DRAINING = "draining"  # draining or stopping
    ASLEEP = "asleep"
    PARKED = "parked"  # no instance holds it
    UNKNOWN = "unknown"  # quarantined, or not heard of
