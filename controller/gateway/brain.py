"""What both ways in share: one classifier, one dispatcher, one set of counters, whoever carries the bytes.

A request becomes a `Ticket` when it arrives, and is put back (`done`) when it has ended; between the two the carrier
(relay.py, controller/picker) asks the dispatcher for an instance and tells what it learnt of the answer.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from common.clock import Clock
from controller.domain.classes import Bucket, RequestClass
from controller.domain.reasons import Stage
from controller.domain.slo import Slo
from controller.fleet.port import PoolOrder, QueueObservation, RoutedInstance, RoutingTable
from controller.gateway.asked import Asked
from controller.gateway.choices import Choices
from controller.gateway.classify import Classified, Classifier
from controller.gateway.client import InstanceNow
from controller.gateway.dispatcher import Dispatcher, QueuedRequest
from controller.gateway.energy import EnergyShares
from controller.gateway.foreign import ForeignLoad
from controller.gateway.load import LoadMeter
from controller.gateway.tokens import CachedShare, TokenCounter
from controller.policy.routing import Decided, Weights
from controller.predictor.port import Features


class Outcome(StrEnum):
    """How a request ended. Metric label."""

    SERVED = "served"
    REJECTED = "rejected"  # the engine found fault with the request (4xx)
    FAILED = "failed"  # engines failed, before or within the answer
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    TOO_LATE = "too_late"  # its deadline has passed, and the emergency ladder says to refuse
    CLIENT_LEFT = "client_left"
    FORGOTTEN = "forgotten"  # whoever carried it has gone without a word


# Refused by us. Each is a miss of the SLO, and load reports tell how many there were.
REFUSED = frozenset({Outcome.QUEUE_FULL, Outcome.QUEUE_TIMEOUT, Outcome.TOO_LATE})
MISSED = REFUSED | {Outcome.FAILED, Outcome.FORGOTTEN}


@dataclass(slots=True)
class Ticket:
    """One request from its arrival to its end. `counted_tokens`: its prompt's, cached ones included."""

    asked: Asked
    request: QueuedRequest
    features: Features
    classified: Classified
    counted_tokens: int
    arrived_s: float
    outgrown: bool = False
    # Where it runs, since when, and the mark of its energy; None while it waits.
    running: tuple[str, float, float] | None = None

    @property
    def id(self) -> str:
        return self.request.request_id


class Brain:
    """Single event loop, no I/O."""

    def __init__(
        self,
        max_waiting: int,
        slo: Slo,
        clock: Clock,
        classifier: Classifier,
        counter: TokenCounter,
        overcommit: float = 1.0,
        choices: Choices | None = None,
    ) -> None:
        """`overcommit`: multiple of an instance's limit up to which `choose` sends requests that may not wait here."""
        self.choices = choices or Choices(clock, Weights(), 0, 0)
        self.dispatcher = Dispatcher(max_waiting, weights=self.choices.weights)
        # What is sent beyond the instances' limits, accounted for by itself: it waits inside the engines.
        self.overflow = Dispatcher(max_waiting, weights=self.choices.weights)
        self.choices.follow(self.dispatcher)
        self.choices.follow(self.overflow, beyond=True)
        self._overcommit = overcommit
        self.meter = LoadMeter(slo)
        self.outcomes: Counter[tuple[Outcome, str]] = Counter()  # by outcome and routing class
        # Of finished requests: by predictor and right, too_short or too_long.
        self.predictions: Counter[tuple[str, str]] = Counter()
        self.outgrown = 0  # requests whose answer has become longer than the class they were routed as
        self.energy = EnergyShares()
        self.joules: defaultdict[str, float] = defaultdict(float)  # of requests whose energy is known, by routing class
        self.clock = clock
        self._slo = slo
        self._classifier = classifier
        self._counter = counter
        self._cached = CachedShare()
        self._ids = itertools.count(1)
        self._foreign = ForeignLoad()
        self._others: dict[str, int] = {}  # requests of others at each instance
        self._table: RoutingTable | None = None  # as published
        self._takers: dict[str, Callable[[RoutedInstance], None]] = {}
        self._refusers: dict[str, Callable[[PoolOrder], None]] = {}

    def update_routing(self, table: RoutingTable) -> None:
        if table.scheme != self._classifier.scheme:
            self._classifier.use_scheme(table.scheme)
        self._table = table
        self.dispatcher.obey(table.pools, self.clock.monotonic_s())
        self._apply()

    def status(self, instances: Sequence[InstanceNow], now_s: float) -> None:
        """What the controller knows of the instances: power for the joules, and whose requests they hold."""
        self.energy.powers({each.instance_id: each.power_w for each in instances if each.power_w is not None}, now_s)
        kv_use = {each.instance_id: each.kv_use for each in instances if each.kv_use is not None}
        self.dispatcher.kv_use = self.overflow.kv_use = kv_use
        others = self._foreign.seen(
            {each.instance_id: each.requests for each in instances if each.requests is not None}
        )
        if others != self._others:
            self._others = others
            self._apply()

    def sweep(self) -> None:
        """To be called several times a second."""
        self._foreign.ours(Counter(self.dispatcher.in_flight()) + Counter(self.overflow.in_flight()))
        self.pump()

    def _apply(self) -> None:
        """Takes the table into use, with the room that others have left in it."""
        if self._table is None:
            return
        table = _less(self._table, self._others)
        self.dispatcher.update_routing(table)
        self.overflow.update_routing(_beyond(table, self._overcommit))
        self.pump()

    def models(self) -> list[str]:
        """Models of the routing table, each once."""
        table = self.dispatcher.table
        return sorted({pool.model for pool in table.pools}) if table else []

    def arrive(self, asked: Asked) -> Ticket:
        """Classifies and counts a request. Every ticket must end in `done`."""
        arrived_s = self.clock.monotonic_s()
        counted = self._counter.count(asked)
        input_tokens = self._cached.uncached(asked, counted)
        features = replace(asked.features, input_tokens=input_tokens)
        classified = self._classifier.classify(input_tokens, asked.output_limit_tokens, features)
        self.meter.arrived(asked.model, classified.load, input_tokens)
        request = QueuedRequest(
            request_id=str(next(self._ids)),
            model=asked.model,
            request_class=classified.routing,
            deadline_s=arrived_s + self._slo.ttft_ms(classified.routing.input) / 1e3,
            prompt_tokens=input_tokens,
            prefix=self.choices.prefix(asked),
            tells_first=asked.stream,
        )
        return Ticket(asked.briefly(), request, features, classified, counted, arrived_s)

    def wait(
        self,
        ticket: Ticket,
        take: Callable[[RoutedInstance], None],
        refuse: Callable[[PoolOrder], None] | None = None,
    ) -> bool:
        """Queues a request; `take` is called once, now or later, with the instance it may go to, or `refuse` with the
        order by which it gets none. False: queue full."""
        if not self.dispatcher.offer(ticket.request, ticket.arrived_s):
            return False
        self.wait_on(ticket, take, refuse)
        return True

    def wait_on(
        self,
        ticket: Ticket,
        take: Callable[[RoutedInstance], None],
        refuse: Callable[[PoolOrder], None] | None = None,
    ) -> None:
        """`wait`, for a request that is queued again after an instance failed it."""
        self._takers[ticket.id] = take
        if refuse is not None:
            self._refusers[ticket.id] = refuse
        self.pump()

    def due_ms(self, ticket: Ticket) -> int | None:
        """When the request's first token is due, on the wall clock, while an order stands for its pool: a priority
        that all gateways and engines understand alike. None without an order."""
        now_s = self.clock.monotonic_s()
        if self.dispatcher.order_for(ticket.request, now_s) is None:
            return None
        return round(1e3 * (self.clock.wall_s() + ticket.request.deadline_s - now_s))

    def refusing(self, ticket: Ticket) -> PoolOrder | None:
        """The order to refuse what will be late for the request's pool, while one stands."""
        order = self.dispatcher.order_for(ticket.request, self.clock.monotonic_s())
        return order if order is not None and order.stage is Stage.REFUSE else None

    def choose(self, ticket: Ticket) -> RoutedInstance | None:
        """An instance at once, beyond the limits if need be; None when all are full beyond measure."""
        given: list[RoutedInstance] = []
        # Nobody waits for what an engine has, and whether its answer is shown to us is Envoy's configuration.
        ticket.request = replace(ticket.request, tells_first=False)
        if self.wait(ticket, given.append) and not given:
            self._takers.pop(ticket.id, None)
            self.dispatcher.cancel(ticket.id)
        # What is sent beyond the limits waits inside an engine, where nobody can refuse it any more.
        if not given and self._overcommit > 1 and self.refusing(ticket) is None:
            now_s = self.clock.monotonic_s()
            if self.overflow.offer(ticket.request, now_s):
                given = [instance for _, instance in self.overflow.dispatch(now_s)]
                if not given:
                    self.overflow.cancel(ticket.id)
        return given[0] if given else None

    def pump(self) -> None:
        """Gives waiting requests to instances with room; to be called whenever either may have changed."""
        now_s = self.clock.monotonic_s()
        for request, order in self.dispatcher.refuse_late(now_s):
            self._takers.pop(request.request_id, None)
            if (refuse := self._refusers.pop(request.request_id, None)) is not None:
                refuse(order)
        for request, instance in self.dispatcher.dispatch(now_s):
            take = self._takers.pop(request.request_id, None)
            self._refusers.pop(request.request_id, None)
            if take is None:
                self.dispatcher.cancel(request.request_id)
            else:
                take(instance)

    def runs_on(self, ticket: Ticket, instance: RoutedInstance) -> None:
        """The request has been sent to an instance: from now on it has a share in its energy."""
        self.stops(ticket)
        now_s = self.clock.monotonic_s()
        ticket.running = (instance.instance_id, now_s, self.energy.begin(instance.instance_id, now_s))

    def stops(self, ticket: Ticket) -> float | None:
        """The instance has done with the request; joules where they are known."""
        if ticket.running is None:
            return None
        name, began_s, mark_j = ticket.running
        ticket.running = None
        energy_j = self.energy.end(name, mark_j, began_s, self.clock.monotonic_s())
        if energy_j is not None:
            self.joules[str(ticket.classified.routing)] += energy_j
        return energy_j

    def first_token(self, ticket: Ticket) -> None:
        """The prompt is read: it keeps no other request waiting at its instance any more."""
        self.dispatcher.first_token(ticket.id)
        self.overflow.first_token(ticket.id)
        if self.dispatcher.ordered:
            self.pump()

    def pool_of(self, ticket: Ticket) -> str:
        """Name of the pool that serves a ticket; empty while it waits."""
        for dispatcher in (self.dispatcher, self.overflow):
            with suppress(KeyError):
                return dispatcher.pool_of(ticket.id) or ""
        return ""

    def alternatives(self, ticket: Ticket, chosen: RoutedInstance, most: int) -> list[RoutedInstance]:
        """Instances that could take the request over should the chosen one fail it, the best first."""
        return self.dispatcher.next_best(ticket.request, chosen.instance_id, most)

    def chosen(self) -> Counter[Decided]:
        """Choices by what decided them."""
        return self.dispatcher.chosen + Counter({Decided.OVERFLOW: self.overflow.chosen.total()})

    def queues(self, now_s: float) -> dict[str, QueueObservation]:
        """Per pool, for load reports. What overflowed into the engines is waiting there."""
        beyond, unread = self.overflow.queues(now_s), self.overflow.unread_at_risk(now_s)
        return {
            name: replace(
                queue,
                waiting=queue.waiting + (beyond[name].in_flight if name in beyond else 0),
                at_risk=queue.at_risk + unread[name],
            )
            for name, queue in self.dispatcher.queues(now_s).items()
        }

    def suspect(self, instance_id: str) -> None:
        """The instance failed a request: nothing new for it for a while."""
        now_s = self.clock.monotonic_s()
        self.dispatcher.suspect(instance_id, now_s)
        self.overflow.suspect(instance_id, now_s)

    def done(self, ticket: Ticket, outcome: Outcome) -> None:
        """The end of a request, however it came."""
        self._takers.pop(ticket.id, None)
        self._refusers.pop(ticket.id, None)
        self.dispatcher.cancel(ticket.id)
        self.overflow.cancel(ticket.id)
        self.stops(ticket)
        if outcome in REFUSED:
            self.dispatcher.count_refused(ticket.request, outcome)
        self.outcomes[outcome, str(ticket.classified.routing)] += 1
        if outcome in MISSED:
            self.meter.failed(ticket.asked.model, ticket.classified.load)
        self.pump()

    def output_bound_tokens(self, ticket: Ticket) -> float:
        """Tokens from which on an answer is longer than its routing class."""
        cuts = self._classifier.scheme.output_cuts_tokens
        return (*map(float, cuts), math.inf)[ticket.classified.routing.output.rank]

    def outgrew(self, ticket: Ticket) -> None:
        """A running answer has passed `output_bound_tokens`; counted once."""
        if not ticket.outgrown:
            ticket.outgrown = True
            self.outgrown += 1

    def completed(
        self,
        ticket: Ticket,
        output_tokens: int,
        usage: Mapping[str, Any] | None,
        ttft_s: float,
        gaps_s: Sequence[float],
        times: int = 1,
    ) -> None:
        """A streamed answer is complete: learns and counts. `times`: finished requests that this one speaks for."""
        request_class = self._learn(ticket, output_tokens, usage)
        self.meter.completed(ticket.asked.model, request_class, output_tokens, ttft_s, gaps_s, times)

    def completed_whole(
        self, ticket: Ticket, output_tokens: int, usage: Mapping[str, Any] | None, total_s: float, times: int = 1
    ) -> None:
        """As `completed`, for an answer in one piece."""
        request_class = self._learn(ticket, output_tokens, usage)
        self.meter.completed_whole(ticket.asked.model, request_class, output_tokens, total_s, times)

    def _learn(self, ticket: Ticket, output_tokens: int, usage: Mapping[str, Any] | None) -> RequestClass:
        """Feeds the truth back; returns the true class."""
        input_tokens = ticket.classified.input_tokens
        if counted := count(usage, "prompt_tokens"):
            self._counter.calibrate(ticket.asked, counted, ticket.counted_tokens)
            cached = cached_tokens(usage)
            if cached is None:
                # This engine does not say: what was assumed of its cache stays what is known.
                input_tokens = max(1, counted - (ticket.counted_tokens - input_tokens))
            else:
                self._cached.observe(ticket.asked, counted, cached)
                input_tokens = max(1, counted - cached)
        self._classifier.observe(input_tokens, output_tokens, ticket.features, ticket.classified.prediction)
        true_class = self._classifier.scheme.classify(input_tokens, output_tokens)
        if output_tokens >= self.output_bound_tokens(ticket):
            self.outgrew(ticket)
        self.predictions[ticket.classified.source, _verdict(ticket.classified.likely, true_class.output)] += 1
        return true_class


def _less(table: RoutingTable, others: Mapping[str, int]) -> RoutingTable:
    """The same table with limits lowered by what others hold. One request is always allowed: an instance that could
    take none would never show that the figures are wrong."""
    if not others:
        return table
    return replace(
        table,
        pools=tuple(
            replace(
                pool,
                instances=tuple(
                    replace(each, max_in_flight=max(1, each.max_in_flight - others.get(each.instance_id, 0)))
                    for each in pool.instances
                ),
            )
            for pool in table.pools
        ),
    )


def _beyond(table: RoutingTable, overcommit: float) -> RoutingTable:
    """The same table with the room that instances have beyond their limits."""
    return replace(
        table,
        pools=tuple(
            replace(
                pool,
                instances=tuple(
                    replace(each, max_in_flight=math.ceil((overcommit - 1) * each.max_in_flight))
                    for each in pool.instances
                ),
            )
            for pool in table.pools
        ),
    )


def _verdict(said: Bucket, true: Bucket) -> str:
    if said == true:
        return "right"
    return "too_short" if said.rank < true.rank else "too_long"


def count(usage: Mapping[str, Any] | None, name: str) -> int:
    """A count of an engine's usage; 0 where there is none."""
    value = usage.get(name) if usage else None
    return value if isinstance(value, int) and value > 0 else 0


def cached_tokens(usage: Mapping[str, Any] | None) -> int | None:
    """Prompt tokens that the engine's prefix cache spared it; None when it does not say."""
    details = usage.get("prompt_tokens_details") if usage else None
    value = details.get("cached_tokens") if isinstance(details, dict) else None
    return value if isinstance(value, int) and value >= 0 else None
