"""Are the engines as fast as the profile says? Looked at by every instance tick, answered once a minute.

Batches of instances (engines tell them) against the tokens of the same minute (gateways count them): what comes of it
stands in the state and follows from recorded inputs alone. Only what is told at the ticks is read.
"""

from __future__ import annotations

from collections import deque

from controller.domain.classes import ALL_CLASSES, ClassGroup
from controller.domain.reasons import Level, Reason
from controller.fleet.port import WORKS
from controller.loop import modes
from controller.loop.orders import CLUSTER_SCOPE
from controller.loop.profile_in_use import RECALIBRATE, refit, say_paces
from controller.loop.state import State, Turn
from controller.policy.idle import carried_share
from controller.policy.routing import pools_for
from controller.profile.pace import (
    UNKNOWN,
    Pace,
    PaceBook,
    PaceSettings,
    PaceWindow,
    drifted,
    fleet_of,
    implied_rps,
    next_factor,
    output_share,
    pace_of,
)

WINDOW_S = 60.0
# Of a mix further from the calibrated one than this, batch and load cannot be compared (profile/pace.py).
_SHARES = (0.4, 2.5)
_SETTINGS = PaceSettings()
# Where load comes in bursts, the mean batch stands for more load than there was: twice the batch is less than twice the
# load. Batch by batch it is too little: a burst is read at once and then only written, faster than where both go on.
# What is believed lies between, close to the first, which errs towards meeting the SLO.
_BATCH_BY_BATCH = 0.1


def look(turn: Turn) -> None:
    """Takes this tick's batches; after a window compares, and corrects the profile in use where engines are slower."""
    state, book, now_s = turn.state, turn.state.pace, turn.now.monotonic_s
    # Nothing can be compared: no load, another engine, clocks that caps pull down, or nobody looked for a while.
    if state.routing is None or state.foreign_engines or state.budgets or state.caps:
        _begin(book, now_s)
        return
    if now_s - book.began_s > 2 * WINDOW_S:
        _begin(book, now_s)
    _take(state, book, now_s)
    if now_s - book.began_s < WINDOW_S:
        return
    _close(state, book, now_s)
    _begin(book, now_s)
    _apply(turn)


def _begin(book: PaceBook, now_s: float) -> None:
    book.began_s, book.ticks, book.held, book.unsure = now_s, 0, {}, set()


def _take(state: State, book: PaceBook, now_s: float) -> None:
    book.ticks += 1
    for node_id, instance in state.instances().values():
        if instance.state not in WORKS:
            continue
        if not instance.running and instance.instance_id in state.standby:
            continue
        pool, chosen = state.pool_of(instance), state.clocks.get(instance.instance_id)
        unlocked = chosen is None and not state.settings.knobs.clocks
        if chosen is None and not unlocked and instance.running == 0:
            continue  # it has only just come
        if (
            instance.running is None
            or (chosen is None and not unlocked)  # it may be locked from before
            or (chosen is not None and chosen.cap_w is not None)
            or state.is_stale(node_id, now_s)
            or not modes.may_touch(state, pool, node_id)
        ):
            book.unsure.add(pool)
            continue
        mhz = chosen.mhz if chosen is not None and chosen.mhz is not None else state.profile.full_mhz
        book.held.setdefault((pool, instance.tp, mhz, instance.instance_id), []).append(instance.running)


def _close(state: State, book: PaceBook, now_s: float) -> None:
    """Adds the window of every pool that it can tell of, and the fleet's where it can tell of all that serve."""
    tokens = _tokens_per_s(state, now_s, now_s - book.began_s)
    serving = {pool for pool, *_ in book.held} | book.unsure
    compared: dict[str, PaceWindow] = {}
    loaded: set[str] = set()
    for group in state.profile.groups:
        if group.name not in serving:
            continue
        input_tokens, output_tokens = tokens.get(group.name, (0.0, 0.0))
        rate_rps = state.profile.work.of(input_tokens, output_tokens) / state.profile.mean_work_s(group.name)
        if rate_rps <= 0:
            continue
        loaded.add(group.name)
        share = output_share(state.profile, group.name, input_tokens, output_tokens)
        # A load that has only just come is held by the engines and counted by nobody yet.
        if group.name in book.unsure or group.name not in book.loaded or not _SHARES[0] <= share <= _SHARES[1]:
            continue
        implied = _implied_rps(state, book, group, share)
        if implied is not None:
            compared[group.name] = PaceWindow(implied, rate_rps)
    book.loaded = loaded
    for pool, window in compared.items():
        _add(book.windows.setdefault(pool, deque()), window)


def _add(windows: deque[PaceWindow], window: PaceWindow) -> None:
    windows.append(window)
    while len(windows) > _SETTINGS.windows:
        windows.popleft()


def _implied_rps(state: State, book: PaceBook, group: ClassGroup, share: float) -> float | None:
    """The load at which the profile has the pool's batches; None where some of its instances were not measured."""
    mine = {key: held for key, held in book.held.items() if key[0] == group.name}
    # Of many that share a load each carries more than in the profile, and so holds more, at the same latencies.
    carried = max(1.0, carried_share(sum(len(batches) for batches in mine.values()) // book.ticks))
    each = _BATCH_BY_BATCH if group.name in state.bursty else 0.0
    total = 0.0
    for key, batches in mine.items():
        curve = state.fit.curve(*key[:3])
        if curve is None:
            return None
        of_mean = implied_rps(curve, sum(batches) / len(batches) / share / carried) * len(batches)
        of_each = sum(implied_rps(curve, batch / share / carried) for batch in batches) if each else 0.0
        total += ((1 - each) * of_mean + each * of_each) / book.ticks
    return total * carried * state.paces.get(group.name, 1.0)  # the curves in use are corrected already


def _tokens_per_s(state: State, now_s: float, window_s: float) -> dict[str, tuple[float, float]]:
    """Input and output tokens by pool, of all gateways."""
    routed = state.routing.pools if state.routing else ()
    own = {c: pools[0].name for c in ALL_CLASSES if (pools := pools_for(routed, c))}
    flows: dict[str, list[float]] = {}
    for windows in state.load.by_gateway(now_s, window_s).values():
        seconds = sum(window.seconds for window in windows)
        for window in windows:
            for request_class, counts in window.classes.items():
                if request_class in own:
                    flow = flows.setdefault(own[request_class], [0.0, 0.0])
                    flow[0] += counts.input_tokens / seconds
                    flow[1] += counts.output_tokens / seconds
    return {pool: (flow[0], flow[1]) for pool, flow in flows.items()}


def _apply(turn: Turn) -> None:
    state, book = turn.state, turn.state.pace
    before, drifted_before = dict(state.paces), set(state.pace_drifted)
    book.windows = {pool: windows for pool, windows in book.windows.items() if pool in state.pools}
    found = {pool: pace_of(tuple(book.windows.get(pool, ())), _SETTINGS) for pool in sorted(state.pools)}
    fleet = fleet_of(tuple(found.values()))
    # Pools that are not cut now too: of the same engines, the corrected ones would seem the dearer.
    for group in state.profile.groups:
        own = found.get(group.name, UNKNOWN)
        factor = next_factor(fleet, own, state.paces.get(group.name, 1.0), _SETTINGS)
        if factor > 1.0:
            state.paces[group.name] = factor
        else:
            state.paces.pop(group.name, None)
    state.pace_drifted = {pool for pool, own in found.items() if drifted(own, _SETTINGS)}
    if state.paces != before:
        refit(state)
    new = state.pace_drifted - drifted_before
    if state.paces == before and not new:
        return
    said = say_paces(state)
    if new:
        ratios = ", ".join(f"{pool} takes {found[pool].ratio:.2f} times as long" for pool in sorted(new))
        reason, sentence = Reason.PROFILE_DRIFTED, f"The profile no longer holds: {ratios}; {RECALIBRATE}."
    else:
        reason, sentence = Reason.PROFILE_CORRECTED, "Engines are slower than the profile."
    if said:
        sentence = f"{sentence} Loads and latencies are corrected: {said}."
    elif not new:
        sentence = "Engines are as fast as the profile says again."
    turn.decide(
        Level.CLUSTER,
        CLUSTER_SCOPE,
        "telemetry",
        reason,
        sentence,
        inputs={
            "paces_before": dict(sorted(before.items())),
            "fleet": _json(fleet),
            "pools": {pool: _json(pace) for pool, pace in sorted(found.items())},
            "profile": state.profile_checksum,
        },
        outcome={"paces": dict(sorted(state.paces.items())), "drifted": sorted(state.pace_drifted)},
    )


def _json(pace: Pace) -> dict[str, float | int | None]:
    known = pace.error != float("inf")
    return {"ratio": round(pace.ratio, 4), "error": round(pace.error, 4) if known else None, "windows": pace.windows}
