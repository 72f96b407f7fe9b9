"""What must hold in every run of tests/faultrun.py, whatever fails: checked at each event, step and second.

Judged by the test's own bookkeeping: by what the hosts really do and by what was really ordered, except where only the
controller's own view can be asked of it (it cannot know of an engine that died behind a silent agent).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from controller.domain.classes import RequestClass
from controller.domain.reasons import Mode
from controller.fleet.port import (
    HOLDS_GPUS,
    ApplyCaps,
    ApplyClocks,
    DrainInstance,
    InstanceState,
    NodeEffect,
    ReleaseCaps,
    ReleaseClocks,
    RoutingTable,
    StartInstance,
    StopInstance,
)
from controller.loop.core import Step
from controller.policy.routing import pools_for
from controller.policy.transition import CapacityModel, shortfall_rps
from tests.faultworld import PROFILE, QUIET_S, SETTINGS, Host

if TYPE_CHECKING:
    from tests.faultrun import Life, Run

# After this long without a new fault, what can be carried is carried: a node counts as lost, a plan, a start, slack.
CALM_S = 90.0
# After this long without a fault, what serves is routed to, at a clock that carries it.
SETTLED_S = 30.0
# After this long without a fault, its consequences are dealt with; what is done later is done for its own sake.
RESTLESS_S = 60.0
# After this long with the same layout wanted, it is there or on its way.
ARRIVED_S = 45.0
# A count of whole requests over the load window says no more of a rate than this.
RATE_GRAIN_RPS = 1.0 / SETTINGS.load_window_s + 0.01
_SERVES = (InstanceState.READY, InstanceState.DRAINING)


class Rules:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.table_term = 0
        self.pool_of: dict[str, str] = {}
        self.draining: set[str] = set()
        self.counts: dict[tuple[str, int], int] = {}  # of instances wanted, before the step
        self.changed: dict[tuple[str, int], str] = {}  # in the present calm: whether more or fewer of a kind are wanted
        self.calm_s = 0.0  # when that calm began
        self.nowhere_s = float("-inf")  # when no node was heard last

    def broken(self, what: str) -> None:
        self.run.breaks(what)

    def looked(self, rule: str) -> None:
        checks = self.run.report.checks
        checks[rule] = checks.get(rule, 0) + 1

    # ------------------------------------------------------------------------------------------- after each event

    def always(self) -> None:
        """No GPU has two owners, on a host or in the layout."""
        run = self.run
        for host in run.hosts.values():
            held: dict[str, str] = {}
            for engine in host.engines.values():
                if engine.state not in HOLDS_GPUS:
                    continue
                for uuid in engine.gpus:
                    if uuid in held:
                        self.broken(f"{uuid} belongs to {held[uuid]} and {engine.instance_id}")
                    held[uuid] = engine.instance_id
        state = run.leader.core.state
        planned = [uuid for i in state.layout.instances for uuid in i.gpu_uuids]
        if len(set(planned)) < len(planned):
            self.broken("the layout gives a GPU to two instances")
        for item in state.layout.instances:
            if not set(item.gpu_uuids) <= set(run.hosts[item.node_id].gpus):
                self.broken(f"{item.instance_id} is laid out on GPUs of another node")

    # -------------------------------------------------------------------------------------- at each step of a core

    def before_step(self, life: Life) -> None:
        state = life.core.state
        self.pool_of, self.draining = dict(state.routed_as), set(state.draining)
        self.counts = state.layout.counts()

    def after_step(self, life: Life, step: Step) -> None:
        """No step takes capacity away that the load needs, unless the layout was too small for it already."""
        run, state = self.run, life.core.state
        if life is not run.leader:
            return
        drained = [effect for effect in step.effects if isinstance(effect, DrainInstance)]
        self.check_rest(life)
        relabelled = {i for i, pool in state.routed_as.items() if self.pool_of.get(i, pool) != pool}
        if not drained and not relabelled:
            return
        self.looked("capacity at a step")
        names = sorted({effect.instance_id for effect in drained} | relabelled)
        silence_s = run.now_s - life.load_heard_s
        if silence_s > SETTINGS.load_window_s:
            self.broken(f"{names} go although nobody has told for {silence_s:.0f} s what they carry")
        ready = [
            seen
            for node_id, seen in state.instances().values()
            if seen.state is InstanceState.READY and life.silent_s(node_id, run.now_s) <= SETTINGS.lost_s
        ]
        before = [(self.pool_of.get(i.instance_id, i.pool), i.tp) for i in ready if i.instance_id not in self.draining]
        after = [(state.pool_of(i), i.tp) for i in ready if i.instance_id not in state.draining]
        least, most = self.capacity(min), self.capacity(max)
        short, shorter = shortfall_rps(before, least), shortfall_rps(after, least)
        too_small = state.layout_forced and shortfall_rps(before, most) > 0
        if run.rough is not None and run.rough.standing():
            return  # what a budget allows may be less than the load
        if shorter > short + 1e-6 and not too_small:
            self.broken(f"{names} go although {shorter:.2f} requests/s are not carried then ({short:.2f} before)")

    def check_rest(self, life: Life) -> None:
        """While nothing changes, no plan takes back what the one before did."""
        run, state = self.run, life.core.state
        if self.calm_s != run.calm_since_s:
            self.calm_s, self.changed = run.calm_since_s, {}
        if run.now_s - run.calm_since_s <= RESTLESS_S:
            return
        counts = state.layout.counts()
        for kind in {*counts, *self.counts}:
            n, had = counts.get(kind, 0), self.counts.get(kind, 0)
            if n == had:
                continue
            self.looked("rest")
            way = "more" if n > had else "fewer"
            if self.changed.setdefault(kind, way) != way:
                self.broken(f"{n} TP{kind[1]} of {kind[0]} instead of {had}, and back again, and nothing had changed")

    def capacity(self, bound: Callable[[Iterable[float]], float]) -> CapacityModel:
        """The least or the most load of the last window: a controller may have measured anything between them."""
        run = self.run
        since_s = run.now_s - SETTINGS.load_window_s - 2.0
        current = max(i for i, (at_s, _) in enumerate(run.rates_log) if at_s <= since_s or i == 0)
        seen = [rates for _, rates in run.rates_log[current:]]
        grain_rps = RATE_GRAIN_RPS if bound is min else -RATE_GRAIN_RPS
        rates = {c: max(0.0, bound(rates[c] for rates in seen) - grain_rps) for c in run.rates}
        fit = run.leader.core.state.fit
        return CapacityModel(
            rates,
            {(g.name, tp): fit.max_rate_rps(g.name, tp) for g in PROFILE.groups for tp in PROFILE.tps},
            {(g.name, c): PROFILE.request_weight(g.name, c) for g in PROFILE.groups for c in sorted(g.classes)},
        )

    # --------------------------------------------------------------------------------------- at each call to a host

    def sent(self, life: Life, effect: NodeEffect) -> None:
        """Before the host hears of it. What an old leader sends is the fence's affair."""
        run, state = self.run, life.core.state
        if life is not run.leader:
            return
        host = run.hosts[effect.node_id]
        node = state.nodes.get(effect.node_id)
        known = {i.instance_id: i for i in node.instances} if node is not None else {}
        self.check_modes(life, effect)
        if run.by_hand is not None:
            run.by_hand.sent(effect, node)
        match effect:
            case ApplyClocks():
                self.looked("lease")
                if life.silent_s(effect.node_id, run.now_s) > SETTINGS.stale_s:
                    self.broken(f"a lock on {effect.node_id} is renewed that nobody can have decided on: it is silent")
                if effect.ttl_s < 3 * SETTINGS.instance_s:
                    self.broken("a lease that a late tick lets expire")
            case ApplyCaps() if run.rough is not None:
                run.rough.sent(life, effect)
            case StartInstance():
                self.looked("start")
                if not set(effect.gpu_uuids) <= set(host.gpus):
                    self.broken(f"{effect.instance_id} is to start on GPUs that {effect.node_id} does not have")
                ill = {g.uuid for g in node.gpus if not g.healthy} if node is not None else set()
                if ill & set(effect.gpu_uuids):
                    self.broken(f"{effect.instance_id} is to start on a GPU that is known to be ill")
                held = {u for i in known.values() if i.state in HOLDS_GPUS for u in i.gpu_uuids}
                if held & set(effect.gpu_uuids) and effect.instance_id not in known:
                    self.broken(f"{effect.instance_id} is to start on a GPU that is known to be held")
                if life.silent_s(effect.node_id, run.now_s) > SETTINGS.lost_s:
                    self.broken(f"{effect.instance_id} is to start on {effect.node_id}, which is lost")
            case DrainInstance():
                pools = run.table.pools if run.table is not None and run.table.term == life.term else ()
                if any(i.instance_id == effect.instance_id and i.accepts_new for p in pools for i in p.instances):
                    self.broken(f"{effect.instance_id} drains while gateways still send to it")
            case StopInstance():
                self.looked("stop")
                seen = known.get(effect.instance_id)
                if seen is not None and seen.state is InstanceState.READY:
                    self.broken(f"{effect.instance_id} is to stop without a drain")
                if seen is not None and seen.state is InstanceState.DRAINING and (seen.running or seen.running is None):
                    self.broken(f"{effect.instance_id} is to stop with {seen.running} requests running")

    def check_modes(self, life: Life, effect: NodeEffect) -> None:
        """What operators ordered not to touch is not touched."""
        run, state = self.run, life.core.state
        if all(mode is Mode.ACTIVE for mode in run.modes.values()):
            return
        self.looked("mode")
        seen = {uuid: i for _, i in state.instances().values() for uuid in i.gpu_uuids if i.state in HOLDS_GPUS}
        match effect:
            case ApplyClocks() | ApplyCaps():
                touched = {i.instance_id: i for t in effect.targets for u in t.gpu_uuids if (i := seen.get(u))}
                pools = {state.pool_of(i) for i in touched.values()}
            case ReleaseCaps():
                pools = set()
            case ReleaseClocks():
                return  # full clock is the safe state
            case StartInstance():
                pools = {effect.pool}
            case DrainInstance() | StopInstance():
                found = state.instances().get(effect.instance_id)
                pools = {state.pool_of(found[1])} if found is not None else set()
            case _:
                return
        for scope in ("cluster", f"node:{effect.node_id}", *(f"pool:{pool}" for pool in pools)):
            if run.modes.get(scope, Mode.ACTIVE) is not Mode.ACTIVE:
                self.broken(f"{type(effect).__name__} on {effect.node_id}, although {scope} is {run.modes[scope]}")

    def obeyed(self, life: Life, host: Host) -> None:
        """No host obeys an older term than it has obeyed before."""
        self.looked("term at a host")
        if life.term < host.obeyed_term:
            self.broken(f"{host.node_id} obeys term {life.term} after term {host.obeyed_term}")
        host.obeyed_term = max(host.obeyed_term, life.term)

    def agent_began(self, host: Host) -> None:
        """An agent that begins again remembers whom it has obeyed."""
        self.looked("term kept")
        if host.fence.term < host.obeyed_term:
            self.broken(f"{host.node_id} has forgotten term {host.obeyed_term}: it knows {host.fence.term}")

    def table_taken(self, table: RoutingTable) -> None:
        self.looked("term at a gateway")
        if table.term < self.table_term:
            self.broken(f"the gateway takes a table of term {table.term} after one of term {self.table_term}")
        self.table_term = max(self.table_term, table.term)

    # ------------------------------------------------------------------------------------------------ each second

    def every_second(self) -> None:
        run, life = self.run, self.run.leader
        if not life.alive or run.now_s < life.frozen_until_s:
            return
        ordered = all(mode is Mode.ACTIVE for mode in run.modes.values())
        active_s = run.now_s - max(life.free_since_s, run.modes_since_s)
        if ordered and active_s > 3 * SETTINGS.instance_s:
            for host in run.hosts.values():
                self.check_leases(life, host)
            self.check_lost(life, active_s)
        self.check_not_stuck(life)
        under_budget = run.rough is not None and bool(run.rough.standing())  # one that has just ended ends the calm
        calm_s = run.now_s - run.calm_since_s
        if any(other.alive for other in run.lives[:-1]):
            return  # until the leader has spoken to a host, one that was followed may still do as it likes there
        if ordered and run.reporting and calm_s > CALM_S:
            self.check_arrived(life)
        if under_budget:
            return  # what a budget allows may be less than the load
        if ordered and run.reporting and calm_s > SETTLED_S:
            self.check_serving(life)
        # There are GPUs enough on any one node that answers.
        if ordered and run.reporting and calm_s > CALM_S and any(host.well for host in run.hosts.values()):
            self.check_capacity(f"for {CALM_S:g} s nothing has changed")

    def check_leases(self, life: Life, host: Host) -> None:
        """A clock that was decided on is locked, and stays so for as long as it is decided on."""
        run, state = self.run, life.core.state
        if not host.well or run.now_s - host.well_since_s <= 3 * SETTINGS.instance_s:
            return
        seen = {i.instance_id: i for i in state.nodes[host.node_id].instances} if host.node_id in state.nodes else {}
        for engine in host.engines.values():
            chosen, observed = state.clocks.get(engine.instance_id), seen.get(engine.instance_id)
            if chosen is None or chosen.mhz is None or observed is None:
                continue
            if engine.state not in _SERVES or observed.state not in _SERVES:
                continue
            self.looked("lock kept")
            for uuid in engine.gpus:
                mhz, until_s = host.locks.get(uuid, (None, 0.0))
                if mhz != chosen.mhz or until_s <= run.now_s:
                    self.broken(f"{engine.instance_id} is to run at {chosen.mhz} MHz, and {uuid} is at {mhz}")

    def check_lost(self, life: Life, active_s: float) -> None:
        """Nothing is wanted any more on a node that has been silent for so long that it counts as lost."""
        run = self.run
        silent_s = {node_id: min(active_s, life.silent_s(node_id, run.now_s)) for node_id in run.hosts}
        if min(silent_s.values()) > SETTINGS.stale_s:
            self.nowhere_s = run.now_s
        if run.now_s - self.nowhere_s <= 3 * SETTINGS.instance_s:
            return  # there is nowhere to go, or has only just been again
        for item in life.core.state.layout.instances:
            self.looked("lost node")
            if silent_s[item.node_id] > SETTINGS.lost_s + 3 * SETTINGS.instance_s:
                self.broken(
                    f"{item.instance_id} is wanted on {item.node_id}, silent for {silent_s[item.node_id]:.0f} s"
                )

    def check_not_stuck(self, life: Life) -> None:
        """The slow levels keep deciding, whatever came before."""
        run, state = self.run, life.core.state
        if run.modes.get("cluster", Mode.ACTIVE) is Mode.PAUSED or not run.reporting:
            return
        paused = {scope for scope, mode in run.modes.items() if mode is Mode.PAUSED}
        if all(f"pool:{pool}" in paused for pool in state.pools):
            return
        # One that has met no node yet has nothing to decide on.
        free_s = run.now_s - max(life.free_since_s, life.met_s, run.reporting_since_s, run.modes_since_s)
        patience_s = SETTINGS.lost_s + 2 * SETTINGS.pool_s + 5.0
        if free_s <= patience_s:
            return
        self.looked("loop goes on")
        if run.now_s - life.pool_decided_s > 2 * SETTINGS.pool_s + 5.0:
            self.broken(f"the loop is stuck: the last pool decision was at {life.pool_decided_s:.0f} s")

    def check_arrived(self, life: Life) -> None:
        """What is wanted is begun, and what is not wanted goes: no call that failed is waited for."""
        run, state = self.run, life.core.state
        if run.now_s - max(state.layout_changed_s, life.free_since_s) <= ARRIVED_S:
            return
        self.looked("arrived")
        wanted = {i.instance_id for i in state.layout.instances if run.hosts[i.node_id].well}
        there = {e.instance_id: e for h in run.hosts.values() if h.well for e in h.engines.values()}
        missing = sorted(i for i in wanted if i not in there or there[i].state not in HOLDS_GPUS)
        if missing:
            self.broken(f"{missing} are wanted, and nobody starts them")
        left = sorted(i for i, e in there.items() if e.state in _SERVES and i not in wanted and not e.held_by)
        if left:
            self.broken(f"{left} are not wanted, and nobody stops them")

    def check_serving(self, life: Life) -> None:
        """What is ready gets requests as the load needs, at a clock that carries them."""
        run, state = self.run, life.core.state
        table = run.table
        if table is None or table.term != life.term:
            return
        self.looked("serving")
        engines = {
            e.instance_id: (host, e)
            for host in run.hosts.values()
            if host.well
            for e in host.engines.values()
            if e.state is InstanceState.READY
        }
        demand = self._demand_by_pool(life)
        for pool in table.pools:
            there = [i for i in pool.instances if i.instance_id in engines]
            open_to = [i for i in there if i.accepts_new]
            asked = demand.get(pool.name, 0.0)
            could = sum(state.fit.max_rate_rps(pool.name, i.tp) for i in there if i.instance_id not in state.draining)
            does = sum(state.fit.max_rate_rps(pool.name, i.tp) for i in open_to)
            if min(asked, could) > does + RATE_GRAIN_RPS * 2:
                self.broken(f"pool {pool.name} serves {does:.2f} of {asked:.2f} requests/s; {could:.2f} are ready")
            # Those on standby get what goes beyond, in bursts.
            total = sum(i.weight for i in pool.instances if i.accepts_new and not i.standby_load)
            for item in open_to:
                if item.standby_load:
                    continue
                host, engine = engines[item.instance_id]
                mhz = min((host.locks[u][0] for u in engine.gpus if u in host.locks), default=None)
                curve = state.fit.curve(pool.name, item.tp, mhz) if mhz is not None else None
                share = asked * item.weight / total
                if curve is not None and share > curve.max_rate_rps + RATE_GRAIN_RPS * 2:
                    self.broken(
                        f"{item.instance_id} gets {share:.2f} requests/s, its {mhz} MHz carry {curve.max_rate_rps:.2f}"
                    )

    def _demand_by_pool(self, life: Life) -> dict[str, float]:
        """Equivalent requests/s of each pool by the routing in force."""
        demand: dict[str, float] = {}
        for request_class, rate in self.run.rates.items():
            own = self._own_pool(life, request_class)
            if own is not None:
                weight = PROFILE.request_weight(own, request_class, (500.0, 150.0))
                demand[own] = demand.get(own, 0.0) + rate * weight
        return demand

    @staticmethod
    def _own_pool(life: Life, request_class: RequestClass) -> str | None:
        routing = life.core.state.routing
        return next((p.name for p in pools_for(routing.pools, request_class)), None) if routing is not None else None

    def check_capacity(self, since: str) -> None:
        """What serves must carry the load: there are GPUs enough for it on any one node."""
        self.looked("capacity")
        life = self.run.leader
        state = life.core.state
        serving: dict[str, float] = {}
        for host in self.run.hosts.values():
            for engine in host.engines.values():
                if engine.state is InstanceState.READY and not engine.held_by:
                    pool = state.routed_as.get(engine.instance_id, engine.pool)
                    serving[pool] = serving.get(pool, 0.0) + state.fit.max_rate_rps(pool, len(engine.gpus))
        for request_class in self.run.rates:
            if self._own_pool(life, request_class) is None:
                self.broken(f"no pool serves {request_class}")
        for pool, rate in self._demand_by_pool(life).items():
            if serving.get(pool, 0.0) < rate - 1e-9:
                self.broken(f"pool {pool} is short of {rate - serving.get(pool, 0.0):.2f} requests/s, and {since}")

    # ------------------------------------------------------------------------------------------------- at the end

    def at_the_end(self) -> None:
        run, life = self.run, self.run.leader
        if not life.alive:
            self.broken("no controller leads at the end")
            return
        state = life.core.state
        if run.rough is None or not run.rough.standing():
            self.check_capacity(f"every GPU has been healthy for {QUIET_S:g} s")
        wanted = {i.instance_id for i in state.layout.instances}
        there = {e.instance_id for h in run.hosts.values() for e in h.engines.values() if e.state in HOLDS_GPUS}
        if wanted - there and run.now_s - state.layout_changed_s > 20:
            self.broken(f"{sorted(wanted - there)} are wanted, and nobody starts them")
