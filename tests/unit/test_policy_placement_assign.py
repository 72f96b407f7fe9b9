"""Who keeps which place: no assignment costs less, as a solver for any costs finds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from controller.policy.placement import _NOT_STARTED, _RELABEL, _TIE, _assign, _Candidate

POOLS = ("a", "b", "c")
candidates = st.lists(st.tuples(st.sampled_from(POOLS), st.integers(0, 3), st.booleans()), max_size=9)


def cost(candidate: _Candidate, crowd: int, pool: str) -> float:
    return _RELABEL * (candidate.pool != pool) + _NOT_STARTED * (not candidate.held) + _TIE * crowd


@given(candidates, st.lists(st.sampled_from(POOLS), max_size=9))
def test_no_assignment_costs_less(drawn: list[tuple[str, int, bool]], slots: list[str]) -> None:
    there = [_Candidate(f"i{n}", pool, f"n{node}", (f"g{n}",), held) for n, (pool, node, held) in enumerate(drawn)]
    crowds = [sum(d[:2] == c[:2] for d in drawn[:n]) for n, c in enumerate(drawn)]
    found = _assign(there, slots, {})

    assert len(found) == min(len(there), len(slots)) == len({c.instance_id for c in found.values()})
    costs = np.array([[cost(c, crowd, pool) for pool in slots] for c, crowd in zip(there, crowds, strict=True)])
    rows, columns = linear_sum_assignment(costs.reshape(len(there), len(slots)))
    least = sum(costs[row, column] for row, column in zip(rows, columns, strict=True))
    spent = sum(cost(c, crowds[there.index(c)], slots[i]) for i, c in found.items())
    assert abs(spent - least) < 1e-9


def test_the_emptiest_node_loses_its_instance_first() -> None:
    there = [_Candidate(f"i{n}", "a", f"n{n}", (f"g{n}",), held=True) for n in range(3)]
    found = _assign(there, ["a", "a"], {"n1": 0, "n0": 1, "n2": 2})
    assert {c.node_id for c in found.values()} == {"n0", "n2"}
