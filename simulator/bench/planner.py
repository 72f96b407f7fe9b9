"""How fast the planner is: the pool MILP by fleet size, anew and from a near plan, beside the exact MILP and plain CBC;
the clock of every instance; placement and transition of a large fleet.

Times are of the processor, of child processes too (CBC is one), so that other work on the machine disturbs them little.
Problems are drawn at random: nine pools, one per request class, with made-up curves over three TPs and eight clocks.
"""

from __future__ import annotations

import random
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any, ParamSpec, TypeVar

from controller.domain.classes import ALL_CLASSES, ClassGroup, ClassScheme
from controller.domain.layout import Gpu, Layout, Node
from controller.domain.slo import Slo
from controller.fleet.port import InstanceState
from controller.policy.frequency import ClockAsk, InstanceLoad, choose_clock, choose_clocks
from controller.policy.milp.columns import build_columns
from controller.policy.milp.model import CBC, HIGHS, build, solve
from controller.policy.milp.problem import PartitionResult, PlanProblem, PoolDemand
from controller.policy.placement import HeldInstance, Placed, place
from controller.policy.transition import ActualInstance, CapacityModel, next_steps
from controller.profile.fit import ProfileFit, fit
from controller.profile.table import IdlePoint, OperatingPoint, Profile, TokenWork
from simulator.bench.metric import Metric, of_repeats

TARGET_MS = {96: 300.0, 320: 500.0, 10_000: 1000.0}
GAP = 0.01
AGAIN_MS = 50.0  # at the smallest size
INSTANCES = 20
CBC_INSTANCES = 3  # it takes up to its time limit for each
CBC_LIMIT_S = 30.0
NEAR = 0.05  # a near plan's demand differs by at most this share
BUILD_SHARE = 0.1

TPS = (2, 4, 8)
CLOCKS_MHZ = (795, 1005, 1200, 1395, 1545, 1695, 1845, 1980)
LOADS = tuple(i / 10 for i in range(1, 11))
POOLS = tuple(str(request_class) for request_class in ALL_CLASSES)
U = 0.6  # of what the fleet's densest instances carry
PARKED_W = 72.0
START_J = {2: 50e3, 4: 100e3, 8: 200e3}
RETIRE_J = {2: 5e3, 4: 10e3, 8: 20e3}
HORIZON_S = 1800.0

CLOCK_INSTANCES = 3000
CLOCK_FLEETS = (3000, 100)  # instances that are asked for at once
CLOCK_US = 5.0
PLACED_NODES = 1000
PLACED_S = 2.0
REPEATS = 3

P = ParamSpec("P")
T = TypeVar("T")


def measure(say: Callable[[str], None]) -> list[Metric]:
    """Everything about the planner; `say` hears what is being done."""
    metrics: list[Metric] = []
    for gpus in TARGET_MS:
        say(f"plans of {gpus} GPUs")
        metrics += plans(gpus)
    say("the exact MILP, without limits")
    metrics += exact(min(TARGET_MS))
    say("plain CBC")
    for gpus in TARGET_MS:
        metrics += plain_cbc(gpus)
    say("clocks")
    metrics += clocks()
    say(f"placement and transition of {PLACED_NODES} nodes")
    return metrics + placement()


# ------------------------------------------------------------------------------------------------------- plans


def plans(gpus: int) -> list[Metric]:
    """Random problems solved anew, and again after the demand has moved a little, from the plan that stood."""
    anew, again, milp, building = [], [], [], []
    gaps: dict[str, list[float]] = {"plan": [], "replan": [], "milp": []}
    for seed in range(INSTANCES):
        problem = random_problem(seed, gpus)
        seconds, found = _solved(problem)
        anew.append(seconds)
        gaps["plan"].append(found.gap)
        seconds, near = _solved(moved(problem, found, seed))
        again.append(seconds)
        gaps["replan"].append(near.gap)
        seconds, found = _solved(problem, solver=HIGHS, milp_only=True)
        milp.append(seconds)
        gaps["milp"].append(found.gap)
        built, _ = _timed(build, problem, problem.partitions[0], keep_current=False)
        building.append(built / seconds)
    metrics = []
    for name, values, target in (
        ("plan", anew, TARGET_MS[gpus]),
        ("replan", again, AGAIN_MS if gpus == min(TARGET_MS) else TARGET_MS[gpus]),
        ("milp", milp, None),
    ):
        metrics += [
            of_repeats(f"{name}_ms.{gpus}", [1000 * s for s in values], "ms", target),
            Metric(f"{name}_worst_ms.{gpus}", 1000 * max(values), "ms"),
            Metric(f"{name}_worst_gap.{gpus}", max(gaps[name]), "ratio", target=GAP),
        ]
    metrics.append(of_repeats(f"milp_build_share.{gpus}", building, "ratio", BUILD_SHARE))
    return metrics


def exact(gpus: int) -> list[Metric]:
    """What plans cost more than the best there is."""
    seconds, ratios = [], []
    for seed in range(INSTANCES):
        problem = random_problem(seed, gpus)
        _, plan = _solved(problem)
        unlimited = replace(problem, gap=0.0, node_limit=10**9, time_limit_s=3600.0)
        took_s, best = _solved(unlimited, solver=HIGHS, milp_only=True)
        seconds.append(took_s)
        ratios.append(plan.objective_w / best.objective_w)
    return [
        of_repeats(f"exact_milp_ms.{gpus}", [1000 * s for s in seconds], "ms"),
        Metric(f"exact_milp_worst_ms.{gpus}", 1000 * max(seconds), "ms"),
        of_repeats(f"plan_over_exact.{gpus}", ratios, "ratio"),
        Metric(f"plan_over_exact_worst.{gpus}", max(ratios), "ratio", target=1 + GAP),
    ]


def plain_cbc(gpus: int) -> list[Metric]:
    seconds = []
    for seed in range(CBC_INSTANCES):
        problem = replace(random_problem(seed, gpus), time_limit_s=CBC_LIMIT_S)
        seconds.append(_timed(solve, problem, CBC, milp_only=True)[0])
    return [of_repeats(f"cbc_ms.{gpus}", [1000 * s for s in seconds], "ms")]


def _solved(problem: PlanProblem, **how: Any) -> tuple[float, PartitionResult]:
    seconds, solution = _timed(solve, problem, **how)
    if solution.chosen is None:
        raise RuntimeError(f"{problem.problem_id}: {solution.rejected[0].reason}")
    return seconds, solution.chosen


def _timed(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> tuple[float, T]:
    began_s = _processor_s()
    result = work(*arguments, **named)
    return _processor_s() - began_s, result


def _processor_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# ---------------------------------------------------------------------------------------------- random problems


def random_problem(seed: int, gpus: int) -> PlanProblem:
    """A fleet at `U` whose pools differ in size, and in what their requests need."""
    draw = random.Random(seed)
    fitted = random_fit(draw)
    shares = [draw.uniform(0.2, 1.0) for _ in POOLS]
    columns = build_columns(fitted, POOLS)
    demands = []
    for pool, share in zip(POOLS, shares, strict=True):
        densest = max(c.rate_rps / c.tp for c in columns if c.pool == pool)
        demands.append(PoolDemand(pool, share / sum(shares) * gpus * U * densest))
    return PlanProblem(
        problem_id=f"{gpus} GPUs, seed {seed}",
        gpus=gpus,
        gpus_per_node=8,
        parked_w=PARKED_W,
        horizon_s=HORIZON_S,
        partitions=(tuple(demands),),
        columns=columns,
        start_j=START_J,
        retire_j=RETIRE_J,
        gap=GAP,
    )


def moved(problem: PlanProblem, plan: PartitionResult, seed: int) -> PlanProblem:
    """The problem some minutes later: its plan stands, and every demand differs by a few percent."""
    draw = random.Random(seed)
    demands = tuple(
        replace(demand, rate_rps=demand.rate_rps * draw.uniform(1 - NEAR, 1 + NEAR)) for demand in problem.partitions[0]
    )
    return replace(problem, partitions=(demands,), current=dict(plan.counts))


def random_fit(draw: random.Random) -> ProfileFit:
    """Curves as measured ones are: concave in the load, steeper at higher clocks, and wider instances carry more per
    GPU."""
    points = []
    idle = []
    for tp in TPS:
        idle += [IdlePoint(tp, mhz, tp * draw.uniform(95.0, 115.0)) for mhz in CLOCKS_MHZ]
    idle_w = {(point.tp, point.mhz): point.power_w for point in idle}
    for pool in POOLS:
        per_gpu_rps = draw.uniform(0.3, 3.0)
        for tp, ratio in zip(TPS, (0.6, 0.9, 1.0), strict=True):
            top_rps = per_gpu_rps * tp * ratio * draw.uniform(0.75, 1.0)
            for mhz in CLOCKS_MHZ:
                clock = mhz / CLOCKS_MHZ[-1]
                knee_rps = top_rps * clock ** draw.uniform(0.5, 0.9)
                busy_w = tp * (250.0 * clock**2 + 60.0)
                points += [
                    OperatingPoint(
                        group=pool,
                        tp=tp,
                        mhz=mhz,
                        rate_rps=load * knee_rps,
                        power_w=idle_w[tp, mhz] + busy_w * load**0.6,
                        attainment=1.0,
                        attainment_worst=1.0,
                        ttft_p50_ms={},
                        ttft_p99_ms={},
                        tbt_p99_ms=20.0 + 60.0 * load,
                        gap_p99_ms=30.0 + 60.0 * load,
                        running_mean=60.0 * load,
                        running_p99=90.0 * load,
                        requests=1000,
                    )
                    for load in LOADS
                ]
    return fit(
        Profile(
            model="random",
            gpu="none",
            engine="none",
            scheme=ClassScheme(),
            slo=Slo(),
            groups=tuple(ClassGroup(str(c), frozenset({c})) for c in ALL_CLASSES),
            tps=TPS,
            clocks_mhz=CLOCKS_MHZ,
            points=tuple(points),
            idle=tuple(idle),
            parked_w=PARKED_W,
            mixes={},
            work=TokenWork(1.0, 1.0),
        ),
        safety_margin=0.0,
    )


# --------------------------------------------------------------------------------------- clocks, places, steps


def clocks() -> list[Metric]:
    """Microseconds of one instance's choice: over fleets as the instance manager asks, and one by one."""
    draw = random.Random(0)
    fitted = random_fit(draw)
    fleet = []
    for _ in range(CLOCK_INSTANCES):
        curve = draw.choice(list(fitted.curves.values()))
        load = draw.uniform(0.0, 1.0)
        said = InstanceLoad(load * curve.max_rate_rps, 60.0 * load, 0.0, 0.5)
        fleet.append(ClockAsk(curve.group, curve.tp, said, curve.mhz))
    metrics = []
    for instances in CLOCK_FLEETS:
        some = fleet[:instances]
        rounds = CLOCK_INSTANCES // instances
        times = [_timed(_repeat, rounds, choose_clocks, fitted, some)[0] for _ in range(REPEATS)]
        each = [1e6 * s / (rounds * instances) for s in times]
        metrics.append(of_repeats(f"clock_us_per_instance.{instances}", each, "us", CLOCK_US))
    alone = [_timed(lambda: [choose_clock(fitted, *ask) for ask in fleet])[0] for _ in range(REPEATS)]
    return [*metrics, of_repeats("clock_us_one_by_one", [1e6 * s / CLOCK_INSTANCES for s in alone], "us")]


def _repeat(rounds: int, work: Callable[..., object], *arguments: object) -> None:
    for _ in range(rounds):
        work(*arguments)


def placement() -> list[Metric]:
    """A large fleet placed anew, placed again after its counts have moved, and the steps from one to the other."""
    nodes = tuple(
        Node(f"n{i:05d}", tuple(Gpu(f"n{i:05d}-g{slot}", slot) for slot in range(8))) for i in range(PLACED_NODES)
    )
    draw = random.Random(0)
    shares = {(pool, tp): share for pool in POOLS for tp, share in zip(TPS, (0.12, 0.06, 0.03), strict=True)}
    there = {key: int(PLACED_NODES * share) for key, share in shares.items()}
    wanted = {key: int(n * draw.uniform(1 - 4 * NEAR, 1 + 4 * NEAR)) for key, n in there.items()}
    anew, again, stepping = [], [], []
    for _ in range(REPEATS):
        numbers = (f"i{number:06d}" for number in count())
        seconds, first = _timed(place, there, "m", Layout(), (), nodes, numbers.__next__)
        anew.append(seconds)
        held = tuple(HeldInstance(i.instance_id, i.pool, i.node_id, i.gpu_uuids, True) for i in first.layout.instances)
        seconds, second = _timed(place, wanted, "m", first.layout, held, nodes, numbers.__next__)
        again.append(seconds)
        stepping.append(_timed(_steps, first, second, nodes)[0])
    both = [a + b for a, b in zip(again, stepping, strict=True)]
    name = f"{PLACED_NODES}_nodes"
    return [
        of_repeats(f"place_anew_s.{name}", anew, "s"),
        of_repeats(f"place_again_s.{name}", again, "s"),
        of_repeats(f"transition_s.{name}", stepping, "s"),
        of_repeats(f"place_and_transition_s.{name}", both, "s", PLACED_S),
    ]


def _steps(first: Placed, second: Placed, nodes: tuple[Node, ...]) -> None:
    """The first look at a transition: all that was placed serves, and carries a tenth more than is asked."""
    actual = tuple(
        ActualInstance(i.instance_id, i.pool, i.node_id, i.gpu_uuids, InstanceState.READY, 10.0, 0.0)
        for i in first.layout.instances
    )
    gpus = Counter[str]()
    for instance in first.layout.instances:
        gpus[instance.pool] += instance.tp
    capacity = CapacityModel(
        rates_rps={request_class: 0.9 * gpus[str(request_class)] for request_class in ALL_CLASSES},
        max_rate_rps={(pool, tp): float(tp) for pool in POOLS for tp in TPS},
        work={(str(request_class), request_class): 1.0 for request_class in ALL_CLASSES},
    )
    usable = frozenset(gpu.uuid for node in nodes for gpu in node.gpus)
    next_steps(second.layout, actual, usable, capacity)
