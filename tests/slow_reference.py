"""An independent twin of the twin, slow and plain: a static fleet iteration by iteration, and the bound by enumeration.

Nothing here uses the simulator but the physics' `iteration`, and of the policies the load that a router goes by; so an
error in engines, kernels, tables, router or MILP shows as a difference. No merged steps, no heaps, no tables: lists,
and one step at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from math import inf

from controller.policy.routing import load_of
from simulator.physics import Physics

CHUNK_TOKENS = 1024
PREFILL_FIRST_TOKENS = 8192  # of an iteration of prompts alone
MOST_RUNNING = 256


@dataclass
class Job:
    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefilled: int = 0
    made: int = 0  # tokens of the answer so far
    first_s: float | None = None
    last_s: float | None = None

    @property
    def to_compute(self) -> int:
        """Tokens whose KV must stand before the next token: after a preemption, those of the answer too."""
        return self.input_tokens + self.made


@dataclass
class Server:
    """One instance; `now_s` is when the iteration under way ends, or since when it idles."""

    physics: Physics
    tp: int
    mhz: int
    now_s: float = 0.0
    joules: float = 0.0
    waiting: list[Job] = field(default_factory=list)
    prefilling: list[Job] = field(default_factory=list)
    decoding: list[Job] = field(default_factory=list)
    chunks: list[tuple[Job, int]] | None = None  # of the iteration under way
    stepping: list[Job] = field(default_factory=list)  # those that decode in it
    targets: dict[int, int] = field(default_factory=dict)  # KV reserved by prefills
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    most_kv: int = 0
    preempted: int = 0

    @property
    def load(self) -> float:
        jobs = [*self.waiting, *self.prefilling, *self.decoding]
        return load_of(len(jobs), sum(job.input_tokens for job in jobs if job.first_s is None))

    def kv(self) -> int:
        """A decoding sequence holds its prompt and all of its answer but the newest token."""
        decoded = sum(job.input_tokens + job.made - 1 for job in self.decoding)
        return decoded + sum(self.targets[id(job)] for job in self.prefilling)

    def run_until(self, until_s: float) -> None:
        """Ends every iteration before that instant and idles up to it."""
        while True:
            if self.chunks is None and not self._begin():
                if until_s < inf:
                    self.joules += (until_s - self.now_s) * self.physics.idle_w(self.mhz, context=True) * self.tp
                    self.now_s = until_s
                return
            if self.now_s + self.seconds > until_s:
                return
            self._end()

    def _begin(self) -> bool:
        capacity = self.physics.kv_capacity_tokens(self.tp)
        short = False
        while self.decoding and capacity - self.kv() < len(self.decoding):
            victim = (self.prefilling or self.decoding).pop()
            victim.prefilled = 0
            self.waiting.insert(0, victim)
            self.preempted += 1
            short = True
        first = self.physics.prefill_first
        budget = PREFILL_FIRST_TOKENS if first else CHUNK_TOKENS - len(self.decoding)
        chunks = []
        for job in self.prefilling:
            tokens = min(self.targets[id(job)] - job.prefilled, budget)
            if tokens > 0:
                chunks.append((job, tokens))
                budget -= tokens
        while (
            self.waiting
            and not short
            and budget > 0
            and len(self.prefilling) + len(self.decoding) < MOST_RUNNING
            and self.waiting[0].to_compute <= capacity - self.kv() - len(self.decoding)
        ):
            job = self.waiting.pop(0)
            self.targets[id(job)] = job.to_compute
            self.prefilling.append(job)
            tokens = min(job.to_compute, budget)
            chunks.append((job, tokens))
            budget -= tokens
        if not chunks and not self.decoding:
            return False
        self.stepping = [] if chunks and first else list(self.decoding)
        self.seconds, watts = self._costs(chunks)
        self.joules += self.seconds * watts * self.tp
        self.most_kv = max(self.most_kv, self.kv() + len(self.decoding))
        self.chunks = chunks
        return True

    def _costs(self, chunks: list[tuple[Job, int]]) -> tuple[float, float]:
        context = sum(job.input_tokens + job.made for job in self.stepping)
        prefill = [(tokens, job.prefilled) for job, tokens in chunks]
        return self.physics.iteration(self.tp, self.mhz, len(self.stepping), context, prefill)

    def beyond_j(self, end_s: float) -> float:
        """What the iteration under way draws after that instant."""
        if self.chunks is None:
            return 0.0
        _, watts = self._costs(self.chunks)
        return (self.now_s + self.seconds - end_s) * watts * self.tp

    def _end(self) -> None:
        self.now_s += self.seconds
        for job in self.stepping:
            self._token(job)
        self.decoding = [job for job in self.decoding if job.made < job.output_tokens]
        for job, tokens in self.chunks or ():
            job.prefilled += tokens
            if job.prefilled == self.targets[id(job)]:
                self.prefilling.remove(job)
                self._token(job)
                if job.made < job.output_tokens:
                    self.decoding.append(job)
        self.chunks = None

    def _token(self, job: Job) -> None:
        job.made += 1
        if job.first_s is None:
            job.first_s = self.now_s
        elif job.last_s is not None:
            self.gaps.append(self.now_s - job.last_s)
        job.last_s = self.now_s


@dataclass
class Served:
    jobs: list[Job]
    servers: list[Server]
    joules: float  # from the beginning to the last arrival


def serve(physics: Physics, requests: Iterable[tuple[float, int, int]], instances: int, tp: int, mhz: int) -> Served:
    """Every request goes to the instance of the least load, the first of equals."""
    servers = [Server(physics, tp, mhz) for _ in range(instances)]
    jobs = []
    for arrival_s, input_tokens, output_tokens in requests:
        for server in servers:
            server.run_until(arrival_s)
        job = Job(arrival_s, input_tokens, output_tokens)
        jobs.append(job)
        min(servers, key=lambda server: server.load).waiting.append(job)
    # What the iterations under way draw beyond the last arrival is not part of the window.
    end_s = jobs[-1].arrival_s
    over = sum(server.beyond_j(end_s) for server in servers)
    joules = sum(server.joules for server in servers) - over
    for server in servers:
        server.run_until(inf)
    return Served(jobs, servers, joules)


# ----------------------------------------------------------------------------------------------------- bound

Column = tuple[str, int, float, float]  # group, TP, requests/s, W of one instance


def least_power_w(
    columns: Sequence[Column],
    partitions: Sequence[Sequence[str]],
    demand_rps: Mapping[str, float],
    gpus: int,
    freed_w: float,
) -> float | None:
    """The least power over all partitions and all whole numbers of instances; None where nothing carries the load."""
    best = inf
    for groups in partitions:
        kinds = sorted({(group, tp) for group, tp, _, _ in columns if group in groups})
        for counts in product(*(range(gpus // tp + 1) for _, tp in kinds)):
            used = sum(count * tp for count, (_, tp) in zip(counts, kinds, strict=True))
            if used > gpus:
                continue
            total_w = freed_w * (gpus - used)
            for group in groups:
                mine = {tp: n for n, (name, tp) in zip(counts, kinds, strict=True) if name == group and n}
                total_w += _cheapest_mix_w(columns, group, mine, demand_rps[group])
            best = min(best, total_w)
    return None if best == inf else best


def _cheapest_mix_w(columns: Sequence[Column], group: str, counts: Mapping[int, int], demand_rps: float) -> float:
    """Instances may run at any mix of their points: all stand at the point of least power, then the cheapest further
    request/s is taken first, from the lower hulls of power over rate."""
    total_w, steps = 0.0, []
    carried = 0.0
    for tp, count in counts.items():
        hull = _lower_hull([(rate, watts) for name, t, rate, watts in columns if (name, t) == (group, tp)])
        total_w += count * hull[0][1]
        carried += count * hull[0][0]
        for (low, low_w), (high, high_w) in pairwise(hull):
            steps.append(((high_w - low_w) / (high - low), count * (high - low)))
    for slope, room in sorted(steps):
        taken = min(room, max(0.0, demand_rps - carried))
        total_w += slope * taken
        carried += taken
    return total_w if carried >= demand_rps - 1e-9 else inf


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """From the point of least power to that of the highest rate."""
    points = sorted(points)
    start = min(range(len(points)), key=lambda i: (points[i][1], -points[i][0]))
    hull: list[tuple[float, float]] = []
    for point in points[start:]:
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
