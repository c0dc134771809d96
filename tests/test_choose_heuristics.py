"""Heuristics of the choice problem: what they find is legal and costs what they say, and easy optima are found."""

from __future__ import annotations

import math
import time
from types import ModuleType

import numpy as np
import pytest

from choose_cases import brute_force, check_solved, random_instance
from meshwright.choice import Instance, Usage, cost_of, instance_of, is_legal
from meshwright.search.choose import annealing, beam, elimination, moves, sampling
from meshwright.search.choose.moves import moves_of
from meshwright.search.choose.repair import repaired
from meshwright.search.choose.solver import SOLVERS, Deadline, Solved, within
from meshwright.search.choose.times import timeline

ENDLESS = Deadline()
INF = math.inf

#: Of 500 random instances, the least share of the feasible ones that each solves to the optimum, and of those that it
#: finds any legal choice for.
EXPECTED = {beam: (0.98, 0.99), sampling: (0.8, 0.98), annealing: (0.97, 0.99)}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annealing, "LEAST_MOVES", 1024)
    monkeypatch.setattr(annealing, "MOVES_A_STRATEGY", 0)
    monkeypatch.setattr(annealing, "MOVES_A_CALL", 64)
    monkeypatch.setattr(sampling, "NUM_SAMPLES", 500)


@pytest.mark.parametrize("solver", EXPECTED, ids=lambda module: module.__name__.rpartition(".")[2])
def test_legal_with_the_cost_it_says_and_mostly_the_optimum(solver: ModuleType) -> None:
    rng = np.random.default_rng(1)
    feasible = found = best = 0
    for index in range(500):
        instance = random_instance(rng, with_memory=index % 2 == 1, with_infinities=index % 4 < 2)
        optimum, solved = brute_force(instance), solver.solve(instance, ENDLESS, seed=index)
        check_solved(instance, solved, optimum.cost)
        assert solved.lower_bound in (-INF, INF)
        assert solved.choice_N is not None or solved.reasons
        if not optimum.is_infeasible:
            feasible += 1
            found += solved.choice_N is not None
            best += solved.cost == optimum.cost
    assert feasible > 300
    least_best, least_found = EXPECTED[solver]
    assert best >= least_best * feasible
    assert found >= least_found * feasible


@pytest.mark.parametrize("name", ["beam", "annealing", "random"])
def test_same_seed_same_answer_a_start_is_kept_and_news_are_told(name: str) -> None:
    rng = np.random.default_rng(2)
    for index in range(20):
        instance = random_instance(rng, with_memory=True)
        optimum = brute_force(instance)
        news: list[Solved] = []
        one = SOLVERS[name](instance, ENDLESS, seed=index, report=news.append)
        other = SOLVERS[name](instance, ENDLESS, seed=index)
        assert (one.cost, str(one.choice_N)) == (other.cost, str(other.choice_N))
        if one.choice_N is not None:
            costs = [solved.cost for solved in news]
            assert costs == sorted(costs, reverse=True)
            assert costs[-1] == one.cost
            assert all(is_legal(instance, solved.choice_N) for solved in news)
        if optimum.choice_N is not None:
            assert SOLVERS[name](instance, ENDLESS, start=optimum.choice_N).cost == optimum.cost


@pytest.mark.parametrize("name", ["beam", "annealing", "random"])
def test_the_deadline_is_kept(name: str) -> None:
    grid = large_grid()
    SOLVERS[name](grid, within(0.0))  # compiles, where that is to be done
    began_s = time.monotonic()
    solved = SOLVERS[name](grid, within(0.5))
    assert time.monotonic() - began_s < 3
    if solved.choice_N is not None:
        assert is_legal(grid, solved.choice_N)
        assert solved.cost == cost_of(grid, solved.choice_N)


def large_grid(side: int = 24, size: int = 12) -> Instance:
    """A grid of nodes with random costs, each used at its row's time, limit about half of what may be used."""
    rng = np.random.default_rng(3)
    nodes = np.arange(side * side).reshape(side, side)
    pairs = [*zip(nodes[:, 1:].ravel(), nodes[:, :-1].ravel(), strict=True)]
    pairs += [*zip(nodes[1:].ravel(), nodes[:-1].ravel(), strict=True)]
    edges = [(int(one), int(other), rng.integers(0, 100, (size, size))) for one, other in pairs]
    usages = [Usage(int(n), int(n) // side, int(n) // side + 2, rng.integers(0, 10, size)) for n in nodes.ravel()]
    return instance_of(list(rng.integers(0, 100, (side * side, size))), edges, usages, limit=3.0 * side)


def test_a_wide_beam_is_dynamic_programming() -> None:
    # A chain of 60 nodes: two partial choices that end alike differ in cost alone, so 6 suffice.
    rng = np.random.default_rng(4)
    edges = [(n, n + 1, rng.integers(0, 100, (6, 6))) for n in range(59)]
    chain = instance_of(list(rng.integers(0, 100, (60, 6))), edges)
    building = beam.building_of(chain)
    (choice_N, *_) = beam.built(building, 1, beam._cheapest(6), ENDLESS)
    assert cost_of(chain, choice_N) == elimination.solve(chain, ENDLESS).cost
    assert all(len(beam.built(building, 1, beam._cheapest(width), ENDLESS)) <= 6 for width in (6, 50))


def test_annealing_crosses_forbidden_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten nodes that must all be alike: from all at 0 (cost 20) to all at 1 (cost 10) every single move is forbidden.
    alike = [[0, INF], [INF, 0]]
    tied = instance_of([[2, 1]] * 10, [(n, n + 1, alike) for n in range(9)])
    monkeypatch.setattr(annealing, "LEAST_MOVES", 20_000)
    solved = annealing.solve(tied, ENDLESS, start=np.zeros(10, dtype=np.int64))
    assert (solved.cost, solved.choice_N.tolist()) == (10.0, [1] * 10)


def test_compiled_loops_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    cases = [random_instance(rng, with_memory=True) for _ in range(15)]

    def answers() -> list[str]:
        choices = [repaired(moves_of(timeline(case)), np.zeros(case.num_nodes, dtype=np.int64)) for case in cases]
        solved = [annealing.solve(case, ENDLESS, seed=1) for case in cases]
        return [f"{choice} {one.cost} {one.choice_N}" for choice, one in zip(choices, solved, strict=True)]

    plain = answers()
    monkeypatch.setattr(moves, "COMPILE_FROM", -1)
    assert answers() == plain


def test_repair_counts_usages_of_one_node_together() -> None:
    # Node 0 holds two usages at once. At strategy 0 they need 3 + 3 > 5; strategy 1 needs 2 + 2 and costs 1; strategy 2
    # needs 5 + 1 and would be free, if each usage were looked at alone.
    both = [Usage(0, 0, 2, [3, 2, 5]), Usage(0, 1, 3, [3, 2, 1])]
    instance = instance_of([[0, 1, 0]], usages=both, limit=5)
    assert repaired(moves_of(timeline(instance)), np.array([0])).tolist() == [1]


def test_what_cannot_be_repaired() -> None:
    stuck = instance_of([[0, 5]], usages=[Usage(0, 0, 1, [9, 9])], limit=5)
    assert repaired(moves_of(timeline(stuck)), np.array([0])) is None
    assert repaired(moves_of(timeline(instance_of([[INF, INF]]))), np.array([0])) is None


# --- the times at which memory can bind -------------------------------------------------------------------------------


def test_times_by_hand() -> None:
    # Starts 0, 2, 4, 7; between 0 and 2 nothing stops, so 0 is no better than 2. At 2 up to 3 + 2 are held, at 4 (the
    # first stops at 3) 2 + 4, at 7 only 1; [5, 5) is empty.
    usages = [
        Usage(0, 0, 3, [3, 1]),
        Usage(1, 2, 6, [2]),
        Usage(2, 4, 6, [0, 4]),
        Usage(2, 5, 5, [99, 99]),
        Usage(1, 7, 9, [1]),
    ]
    costs = [[0, 0], [0], [0, 0]]
    line = timeline(instance_of(costs, usages=usages, limit=4))
    assert line.times_T.tolist() == [2, 4]
    assert line.used(np.array([0, 0, 1])).tolist() == [5.0, 6.0]
    assert line.priced(np.array([10.0, 1.0])).tolist() == [30.0, 10.0, 22.0, 0.0, 4.0]
    assert timeline(instance_of(costs, usages=usages, limit=5)).times_T.tolist() == [4]
    assert timeline(instance_of(costs, usages=usages)).num_times == 0


def test_within_the_limit_at_the_times_kept_is_within_it_always() -> None:
    rng = np.random.default_rng(6)
    for _ in range(200):
        instance = random_instance(rng, with_memory=True, with_infinities=False)
        line = timeline(instance)
        choice_N = rng.integers(0, instance.num_strategies_N)
        assert is_legal(instance, choice_N) == bool((line.used(choice_N) <= line.most).all())
