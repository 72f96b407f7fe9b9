"""Routing: the table that gateways route by, and the choice of an instance for one request.

table.py makes the table; a choice is filter.py -> score.py -> pick.py. Pure functions of values, shared by the gateway
and the virtual fleet; `simulator/fast/gateway.py` is their twin in arrays.
"""

from controller.policy.routing.filter import Barred, barred, pools_for
from controller.policy.routing.load import PROMPT_TOKENS_PER_REQUEST, load_of
from controller.policy.routing.pick import Alternative, Decided, choose, explain, pick, route, runners_up
from controller.policy.routing.score import Seen, Term, Weights, marginal_j, scored
from controller.policy.routing.table import (
    IN_FLIGHT_HEADROOM,
    RoutableInstance,
    marginal_energy_j,
    max_in_flight,
    routed_pools,
    weight,
)

__all__ = [
    "IN_FLIGHT_HEADROOM",
    "PROMPT_TOKENS_PER_REQUEST",
    "Alternative",
    "Barred",
    "Decided",
    "RoutableInstance",
    "Seen",
    "Term",
    "Weights",
    "barred",
    "choose",
    "explain",
    "load_of",
    "marginal_energy_j",
    "marginal_j",
    "max_in_flight",
    "pick",
    "pools_for",
    "route",
    "routed_pools",
    "runners_up",
    "scored",
    "weight",
]
