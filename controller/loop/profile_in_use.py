"""The profile as it is used: its curves under the knobs, corrected by what live power and the engines' pace have
shown, or not at all while engines run that it was not measured on.

Corrections of power and foreign engines come as orders from beside the core (loop/measured.py, the runtime); they are
inputs like any other, stand in the state and are recorded. The pace is the core's own finding (loop/pace.py).
"""

from __future__ import annotations

from controller.domain.reasons import Level, Reason
from controller.loop.orders import CLUSTER_SCOPE, CorrectProfile, NoteEngines
from controller.loop.settings import LoopSettings
from controller.loop.state import State, Turn
from controller.policy.milp.columns import build_columns
from controller.policy.milp.problem import Column
from controller.profile.fit import ProfileFit, fit
from controller.profile.pace import slowed
from controller.profile.table import Profile

PROFILE_LINE = "profile"  # its key beside the levels' sentences
RECALIBRATE = "measure it again with `dynamollm calibrate`"


def curves_of(settings: LoopSettings, profile: Profile) -> ProfileFit:
    """A fleet without locks is planned and priced at full clock, also where a lower one would draw less."""
    return fit(profile) if settings.knobs.clocks else fit(profile).at_clock(profile.full_mhz)


def columns_of(settings: LoopSettings, curves: ProfileFit) -> tuple[Column, ...]:
    return tuple(
        column
        for column in build_columns(curves, [group.name for group in curves.profile.groups])
        if settings.knobs.sharding or column.tp == settings.widest_tp
    )


def refit(state: State) -> None:
    """Makes curves and columns anew from profile, knobs, pace and corrections."""
    state.fit = slowed(curves_of(state.settings, state.profile), state.paces).corrected(state.corrections)
    state.columns = columns_of(state.settings, state.fit)
    state.capped_fits.clear()


def correct(turn: Turn, order: CorrectProfile) -> bool:
    """Takes a correction, and says which kinds of instance have drifted from the profile. True when one more has: what
    was planned with it was planned wrongly."""
    state = turn.state
    before, drifted_before = state.corrections, state.drifted
    state.corrections, state.drifted = dict(order.factors), set(order.drifted)
    if state.corrections != before:
        refit(state)
    new = state.drifted - drifted_before
    said = ", ".join(f"{_say(kind)} {factor - 1:+.1%}" for kind, factor in sorted(state.corrections.items()))
    if new:
        names = ", ".join(_say(kind) for kind in sorted(new))
        reason, sentence = Reason.PROFILE_DRIFTED, f"The profile no longer holds for {names}: {RECALIBRATE}."
    else:
        reason, sentence = Reason.PROFILE_CORRECTED, "The profile is followed as it was measured again."
    if said:
        sentence = (
            f"{sentence if new else 'Live power differs from the profile.'} Predicted power is corrected: {said}."
        )
    turn.decide(
        Level.CLUSTER,
        CLUSTER_SCOPE,
        "telemetry",
        reason,
        sentence,
        inputs={"factors_before": _json(before), "profile": state.profile_checksum},
        outcome={"factors": _json(state.corrections), "drifted": [_say(kind) for kind in sorted(state.drifted)]},
    )
    return bool(new)


def note_engines(turn: Turn, order: NoteEngines) -> None:
    """Engines of another version than the profile was measured on invalidate it: full clocks, all serve, the layout is
    held. An empty order ends that."""
    state = turn.state
    if state.foreign_engines == order.foreign:
        return
    state.foreign_engines = order.foreign
    if order.foreign:
        reason = Reason.ENGINE_CHANGED
        sentence = (
            f"The profile was measured on {state.profile.engine}, the fleet runs {', '.join(order.foreign)}: full "
            f"clocks and the layout held until there is a profile of that; {RECALIBRATE}."
        )
    else:
        reason, sentence = Reason.PROFILE_CORRECTED, "The fleet runs the engine again that the profile was measured on."
    turn.decide(
        Level.CLUSTER,
        CLUSTER_SCOPE,
        "telemetry",
        reason,
        sentence,
        inputs={"engine": state.profile.engine, "profile": state.profile_checksum},
        outcome={"foreign": list(order.foreign)},
    )


def status_line(state: State) -> str:
    """For people; "" while the profile is used as it was measured."""
    if state.foreign_engines:
        return f"invalid: the fleet runs {', '.join(state.foreign_engines)}; {RECALIBRATE}"
    parts = [f"{_say(kind)} {factor - 1:+.1%}" for kind, factor in sorted(state.corrections.items())]
    text = f"power corrected: {', '.join(parts)}" if parts else ""
    if state.paces:
        text += f"{'; ' if text else ''}slower than measured: {say_paces(state)}"
    if state.drifted or state.pace_drifted:
        names = ", ".join([*(_say(kind) for kind in sorted(state.drifted)), *sorted(state.pace_drifted)])
        text += f"{'; ' if text else ''}drifted for {names}: {RECALIBRATE}"
    return text


def say_paces(state: State) -> str:
    if len(state.paces) == len(state.profile.groups) and len(set(state.paces.values())) == 1:
        return f"every pool {next(iter(state.paces.values())) - 1:+.1%}"
    return ", ".join(f"{pool} {factor - 1:+.1%}" for pool, factor in sorted(state.paces.items()))


def _say(kind: tuple[str, int]) -> str:
    return f"{kind[0]} TP{kind[1]}"


def _json(factors: dict[tuple[str, int], float]) -> dict[str, float]:
    return {f"{pool}/tp{tp}": factor for (pool, tp), factor in sorted(factors.items())}
