"""The emergency ladder of a pool: what is done, one stage after the other, while waiting requests are about to miss.

    none -> reorder -> full_clock -> move -> refuse

Called by the instance manager at each tick with what gateways report of the pool's queue. One stage up only when
requests are at risk in a report that is newer than the stage before, one stage down after a while without any:
hysteresis is in the way down alone. The stages are orders to others: the gateway reorders, moves and refuses, since it
owns the queue; the instance manager sets the clocks. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from controller.domain.classes import Bucket, ClassGroup
from controller.domain.reasons import Stage
from controller.policy.routing.load import readable_tokens
from controller.profile.fit import ProfileFit


class Signal(StrEnum):
    """What a pool's queue says."""

    CALM = "calm"  # nobody is at risk, and nobody was refused since the last look
    STRAINED = "strained"  # a queue that may come and go within a tick
    TROUBLE = "trouble"  # requests are about to miss their deadlines, or were refused
    UNKNOWN = "unknown"  # no gateway has reported lately


@dataclass(frozen=True, slots=True)
class QueueSeen:
    """A pool's queue over all gateways."""

    waiting: int
    at_risk: int  # half of the time to their deadline is gone, or at an instance without a first token when it is due
    refused: int  # since the last look
    oldest_wait_s: float
    age_s: float  # of the newest report
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class LadderSettings:
    # At risk at once that count as trouble, and as a share of those in flight: one request alone may have come in a bad
    # moment, and of very many some always do. One in a hundred may miss: half a second late that is one in 2,000.
    at_risk_high: int = 2
    at_risk_share: float = 0.003
    calm_s: float = 15.0  # without anybody at risk, before each stage down


@dataclass(frozen=True, slots=True)
class Ladder:
    """Where a pool stands. Times are monotonic."""

    stage: Stage = Stage.NONE
    since_s: float = float("-inf")
    calm_from_s: float | None = None  # begin of the calm that lasts; None while there is none


# Of the time to a first token, what goes into prompts that are ahead at the instance; and how much of the median most
# first tokens need. Tried on the twin under 1.3 and 2 times the load that a fleet carries.
READ_SHARE = 0.5
MOST_OF_MEDIAN = 2.0

_UP: Mapping[Stage, Stage] = {
    Stage.NONE: Stage.REORDER,
    Stage.REORDER: Stage.FULL_CLOCK,
    Stage.FULL_CLOCK: Stage.MOVE,
    Stage.MOVE: Stage.REFUSE,
    Stage.REFUSE: Stage.REFUSE,
}
_DOWN: Mapping[Stage, Stage] = {above: below for below, above in _UP.items() if above is not below} | {
    Stage.NONE: Stage.NONE
}
# What a signal leads to; for calm, once it has lasted. Silence is no calm, but nobody is refused on old news.
NEXT: Mapping[tuple[Stage, Signal], Stage] = {
    **{(stage, Signal.TROUBLE): _UP[stage] for stage in Stage},
    **{(stage, Signal.CALM): _DOWN[stage] for stage in Stage},
    **{(stage, Signal.STRAINED): stage for stage in Stage},
    **{(stage, Signal.UNKNOWN): stage for stage in Stage},
    (Stage.REFUSE, Signal.UNKNOWN): Stage.MOVE,
}


def signal_of(seen: QueueSeen | None, settings: LadderSettings | None = None) -> Signal:
    """None: no gateway has reported lately."""
    settings = settings or _DEFAULTS
    if seen is None:
        return Signal.UNKNOWN
    if seen.refused > 0 or seen.at_risk >= max(settings.at_risk_high, settings.at_risk_share * seen.in_flight):
        return Signal.TROUBLE
    return Signal.STRAINED if seen.at_risk > 0 else Signal.CALM


def step(ladder: Ladder, seen: QueueSeen | None, now_s: float, settings: LadderSettings | None = None) -> Ladder:
    """The ladder after one look: at most one stage away from where it was."""
    settings = settings or _DEFAULTS
    signal = signal_of(seen, settings)
    calm_from_s = None
    if signal is Signal.CALM:
        calm_from_s = now_s if ladder.calm_from_s is None else ladder.calm_from_s
    aim = NEXT[ladder.stage, signal]
    if signal is Signal.TROUBLE and seen is not None and now_s - seen.age_s <= ladder.since_s:
        aim = ladder.stage  # a report from before the last step says nothing of what that did
    if calm_from_s is not None and now_s - max(calm_from_s, ladder.since_s) < settings.calm_s:
        aim = ladder.stage
    if aim is ladder.stage:
        return Ladder(ladder.stage, ladder.since_s, calm_from_s)
    return Ladder(aim, now_s, calm_from_s)


_DEFAULTS = LadderSettings()


def rejected(before: Stage, after: Stage) -> Mapping[Stage, str]:
    """Why each other stage was not taken, for the record of a step."""
    up = after.rank > before.rank
    return {
        stage: (
            ("not enough: requests are at risk" if up else "no longer needed")
            if stage is before
            else "one stage at a time"
        )
        for stage in Stage
        if stage is not after and (stage is before or (stage.rank > after.rank) is up)
    }


def at_risk(arrived_s: float, deadline_s: float, now_s: float) -> bool:
    """Half of a waiting request's time, or more, is gone, and no instance has it yet."""
    return now_s - arrived_s >= (deadline_s - arrived_s) / 2


def can_make_it(deadline_s: float, now_s: float) -> bool:
    """The bar for refusing: as late, nobody is refused whose deadline has not passed."""
    return now_s < deadline_s


def most_prompt_tokens(fit: ProfileFit, group: ClassGroup, tp: int) -> int:
    """Unread prompt tokens at which an instance gets nothing more in an emergency."""
    tokens = readable_tokens(fit.profile, group, tp, READ_SHARE)
    return max(1, int(tokens)) if tokens < inf else 1


def expected_first_token_s(fit: ProfileFit, pool: str) -> tuple[float, float, float]:
    """By input bucket: seconds to the first token that an instance needs for most requests once it has them, as a
    multiple of the median at the largest measured load in SLO and full clock; 0 where nothing was measured. For the
    order of service alone: nobody is refused by it."""
    profile = fit.profile
    points = [p for p in profile.points if p.group == pool and p.mhz == profile.full_mhz and p.in_slo(profile.slo)]
    medians_ms = (
        max((point.ttft_p50_ms[bucket] for point in points if bucket in point.ttft_p50_ms), default=0.0)
        for bucket in Bucket
    )
    short, middle, long = (MOST_OF_MEDIAN * median_ms / 1e3 for median_ms in medians_ms)
    return short, middle, long
