"""Which instances a power cap serves better than a clock lock: the profile's measured comparison, ready to look up.

The comparison itself is made by calibration (calibrate/actuators.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from controller.profile.table import SERVING, Actuator, ActuatorRow


def caps_by_kind(rows: Iterable[ActuatorRow]) -> Mapping[tuple[str, int], tuple[ActuatorRow, ...]]:
    """Rows of serving by (group, tp), loads rising: only of kinds for which a cap is better at some load."""
    by_kind: dict[tuple[str, int], list[ActuatorRow]] = defaultdict(list)
    for row in rows:
        if row.phase == SERVING:
            by_kind[row.group, row.tp].append(row)
    return {
        key: tuple(sorted(kind, key=lambda row: row.load))
        for key, kind in sorted(by_kind.items())
        if any(row.better is Actuator.CAP for row in kind)
    }


def cap_for(rows: Sequence[ActuatorRow], rate_rps: float) -> ActuatorRow | None:
    """The row by which a cap is chosen for a load; None where the clock is as good, and beyond what was measured.

    What keeps the SLO at a load keeps it at a lighter one, so the next measured load above decides.
    """
    row = next((row for row in rows if row.load >= rate_rps), None)
    return row if row is not None and row.better is Actuator.CAP else None
