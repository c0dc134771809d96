"""Reductions keep an optimum with memory: the reduced instance's optimum is the instance's, and so is its way back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from choose_cases import brute_force, random_instance
from meshwright.choice import Usage, cost_of, instance_of, is_legal
from meshwright.search.choose.reduce import reduced

INF = math.inf


@pytest.mark.parametrize("seed", range(300))
def test_reduction_keeps_an_optimum(seed: int) -> None:
    instance = random_instance(np.random.default_rng(seed), with_memory=seed % 3 > 0)
    expected, small = brute_force(instance), reduced(instance)
    if small.infeasible:
        assert expected.choice_N is None
        return
    assert len(small.instance.cost_C) <= len(instance.cost_C) + 1  # node 0 may be new
    found = brute_force(small.instance)
    assert found.cost == expected.cost
    if found.choice_N is not None:
        restored = small.restore(found.choice_N)
        assert is_legal(instance, restored)
        assert cost_of(instance, restored) == expected.cost


def test_every_choice_of_the_reduced_instance_costs_what_it_restores_to() -> None:
    rng = np.random.default_rng(5)
    compared = 0
    for _ in range(100):
        instance = random_instance(rng, with_memory=True)
        small = reduced(instance)
        if small.infeasible:
            continue
        for _ in range(5):
            choice = rng.integers(0, small.instance.num_strategies_N)
            cost = cost_of(small.instance, choice)
            if math.isfinite(cost):
                restored = small.restore(choice)
                assert cost_of(instance, restored) == cost
                assert is_legal(instance, restored) == is_legal(small.instance, choice)
                compared += 1
    assert compared > 100


def test_a_chain_of_followers_becomes_one_node() -> None:
    # Node 1 takes what node 0 takes, node 2 the halves of it: (0, 1) -> 0, (2, 3) -> 1.
    same = [[0 if i == j else INF for j in range(4)] for i in range(4)]
    half = [[i + 1 if i // 2 == j else INF for j in range(2)] for i in range(4)]
    usages = [Usage(0, 0, 5, [4, 3, 2, 1]), Usage(2, 0, 5, [10, 20])]
    chain = instance_of([[5, 1, 7, 9], [0, 0, 1, 0], [2, 0]], [(0, 1, same), (1, 2, half)], usages, limit=21)
    small = reduced(chain)
    # Costs 5+0+1+2, 1+0+2+2, 7+1+3+0, 9+0+4+0; usages 14, 13, 22 (too much), 21: strategy 1 beats all others.
    assert small.instance.num_nodes == 1
    assert small.instance.cost_C.tolist() == [5.0]
    assert small.restore(np.array([0])).tolist() == [1, 1, 0]


def test_separable_edges_parallel_edges_and_hopeless_times_go() -> None:
    usages = [Usage(0, 0, 9, [3, 1]), Usage(1, 5, 9, [2, 1]), Usage(0, 20, 30, [2, 1])]
    edges = [(0, 1, [[1, 4], [2, 5]]), (0, 1, [[0, 7], [7, 0]]), (1, 0, [[0, -7], [-7, 0]])]
    small = reduced(instance_of([[0, 5], [0, 5]], edges, usages, limit=4))
    assert small.instance.num_edges == 0  # the two last cancel out, the first is 1, 2 for node 0 and 0, 3 for node 1
    assert small.instance.usage_V.max() <= 2  # of what remains in use at 5, the one time that can be broken
    assert len(np.unique(small.instance.intervals_U)) == 2


def test_usage_of_one_strategy_above_the_limit_and_what_follows_is_struck_out() -> None:
    pairs = [[INF, 0], [0, INF]]
    small = reduced(instance_of([[0, 9], [0, 9]], [(0, 1, pairs)], [Usage(0, 0, 1, [7, 1])], limit=5))
    assert small.restore(np.zeros(1, dtype=np.int64)).tolist() == [1, 0]


@pytest.mark.parametrize(
    "instance",
    [
        instance_of([[INF]]),
        instance_of([[0, 0], [0]], [(0, 1, [[INF], [INF]])]),
        instance_of([[0], [0]], usages=[Usage(0, 0, 2, [3]), Usage(1, 1, 3, [3])], limit=5),
    ],
)
def test_what_leaves_a_node_without_a_strategy_is_infeasible(instance: object) -> None:
    assert reduced(instance).infeasible  # type: ignore[arg-type]
