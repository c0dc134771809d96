"""The exact solvers of the choice problem equal brute force, and their bounds are never above it."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from choose_cases import brute_force, check_solved, random_instance
from meshwright.choice import Instance, Usage, cost_of, instance_of, peak_of
from meshwright.errors import InputError
from meshwright.search.choose import annealing, beam, elimination, exhaustive, frontier, highs, ilp, sampling
from meshwright.search.choose.chain import chain, min_plus
from meshwright.search.choose.elimination import eliminate, min_marginals, plan_of
from meshwright.search.choose.solver import Deadline, Solved, within

ENDLESS = Deadline()
INF = math.inf


def instances(number: int, seed: int, **options: bool) -> list[Instance]:
    rng = np.random.default_rng(seed)
    return [random_instance(rng, **options) for _ in range(number)]


@pytest.mark.parametrize("with_infinities", [False, True])
def test_without_memory_all_exact_solvers_equal_brute_force(with_infinities: bool) -> None:
    for index, instance in enumerate(instances(125, seed=1, with_infinities=with_infinities)):
        optimum = brute_force(instance)
        for solver in (elimination, ilp, exhaustive, frontier):
            found = solver.solve(instance, ENDLESS)
            check_solved(instance, found, optimum.cost)
            assert (found.cost, found.lower_bound) == (optimum.cost, optimum.cost), (index, solver.__name__)
        assert ilp.lp_bound(instance, ENDLESS) <= optimum.cost


@pytest.mark.parametrize("with_infinities", [False, True])
def test_with_memory_they_do_too_and_prices_bound(with_infinities: bool) -> None:
    proven = 0
    for index, instance in enumerate(instances(125, seed=2, with_memory=True, with_infinities=with_infinities)):
        optimum = brute_force(instance)
        for solver in (ilp, exhaustive):
            found = solver.solve(instance, ENDLESS)
            check_solved(instance, found, optimum.cost)
            assert (found.cost, found.lower_bound) == (optimum.cost, optimum.cost), (index, solver.__name__)
        relaxed = ilp.lp_bound(instance, ENDLESS)
        assert relaxed <= optimum.cost
        priced = elimination.solve(instance, ENDLESS)
        check_solved(instance, priced, optimum.cost)
        # Prices with whole choices below them bound at least as well as the linear program (Geoffrion 1974).
        assert priced.lower_bound >= relaxed - (1e-6 * max(1.0, abs(relaxed)) if relaxed < INF else 0.0)
        assert priced.choice_N is not None or optimum.is_infeasible or priced.reasons
        proven += priced.cost == priced.lower_bound or priced.is_infeasible
    assert proven > 60  # most random limits bind little


def test_rows_added_where_they_are_broken_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ilp, "ALL_TIMES_UP_TO", 0)
    for instance in instances(60, seed=3, with_memory=True):
        optimum, found = brute_force(instance), ilp.solve(instance, ENDLESS)
        check_solved(instance, found, optimum.cost)
        assert (found.cost, found.lower_bound) == (optimum.cost, optimum.cost)


def test_costs_that_are_not_whole_and_a_start() -> None:
    for instance in instances(40, seed=4, with_memory=True):
        instance = replace(instance, cost_C=instance.cost_C * 1e-3 / 7, matrix_M=instance.matrix_M * 1e-3 / 7)
        optimum = brute_force(instance)
        found = ilp.solve(instance, ENDLESS, start=optimum.choice_N)
        check_solved(instance, found, optimum.cost)
        if optimum.choice_N is not None:
            assert found.cost == pytest.approx(optimum.cost, rel=1e-12)
            assert found.lower_bound == pytest.approx(optimum.cost, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("module", [elimination, ilp, exhaustive, frontier, beam, annealing, sampling])
def test_nothing_to_choose_and_no_memory_at_all(module: ModuleType) -> None:
    nothing = module.solve(instance_of([]), ENDLESS)
    assert (nothing.cost, nothing.choice_N.tolist()) == (0.0, [])
    # A limit of 0 leaves the second strategy.
    alone = module.solve(instance_of([[1, 2]], usages=[Usage(0, 0, 1, [1, 0])], limit=0.0), ENDLESS)
    assert (alone.cost, alone.choice_N.tolist()) == (2.0, [1])


# --- elimination ------------------------------------------------------------------------------------------------------


def test_a_triangle_by_hand() -> None:
    # Nodes 0, 1, 2 with two strategies; unequal neighbours cost 4, strategy 0 of node 0 and 1 of node 2 are free, the
    # others cost 3, 1 and 3. All at 0: 0 + 1 + 3 = 4; all at 1: 3 + 0 + 0 = 3; mixed: at least 8.
    unequal = [[0, 4], [4, 0]]
    triangle = instance_of([[0, 3], [1, 0], [3, 0]], [(0, 1, unequal), (1, 2, unequal), (2, 0, unequal)])
    found = elimination.solve(triangle, ENDLESS)
    assert (found.cost, found.lower_bound, found.choice_N.tolist()) == (3.0, 3.0, [1, 1, 1])


def test_marginals_equal_brute_force_with_those_nodes_fixed() -> None:
    rng = np.random.default_rng(5)
    for instance in instances(60, seed=5):
        nodes = rng.permutation(instance.num_nodes)[: int(rng.integers(0, 4))].tolist()
        found = min_marginals(instance, nodes)
        assert found.least.shape == tuple(instance.num_strategies_N[nodes])
        for fixed in itertools.product(*(range(instance.num_strategies_N[node]) for node in nodes)):
            cost_C = instance.cost_C.copy()
            for node, strategy in zip(nodes, fixed, strict=True):
                row = slice(instance.first_N[node], instance.first_N[node + 1])
                cost_C[row] = np.where(np.arange(instance.num_strategies_N[node]) == strategy, cost_C[row], INF)
            optimum = brute_force(replace(instance, cost_C=cost_C))
            assert found.least[fixed] == optimum.cost
            if optimum.choice_N is not None:
                choice_N = found.choice(fixed)
                assert choice_N[nodes].tolist() == list(fixed)
                assert cost_of(instance, choice_N) == optimum.cost


def test_a_plan_serves_other_node_costs() -> None:
    rng = np.random.default_rng(6)
    for instance in instances(40, seed=6):
        plan = plan_of(instance)
        for _ in range(3):
            other = replace(instance, cost_C=rng.integers(0, 9, len(instance.cost_C)).astype(float))
            found = eliminate(plan, other.cost_C)
            assert float(found.least) == brute_force(other).cost


def test_large_tables_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [float(eliminate(plan_of(instance)).least) for instance in instances(40, seed=7)]
    monkeypatch.setattr(elimination, "BLOCK_ENTRIES", 2)
    assert [float(eliminate(plan_of(instance)).least) for instance in instances(40, seed=7)] == whole


def test_tables_that_would_be_too_large_are_not_made() -> None:
    clique = instance_of(
        [[0.0] * 10] * 12, [(a, b, np.ones((10, 10))) for a, b in itertools.combinations(range(12), 2)]
    )
    assert plan_of(clique) is None  # 10^12 entries
    assert plan_of(instance_of([[0] * 10] * 3), [0, 1, 2], most_entries=999) is None
    found = elimination.solve(clique, ENDLESS)
    assert (found.choice_N, found.lower_bound) == (None, -INF)
    assert found.reasons == ("a table of elimination would have more than 2^27 entries",)


def test_elimination_needs_neither_the_compiler_nor_highs() -> None:
    lines = (
        "import sys; from meshwright.choice import instance_of",
        "from meshwright.search.choose import annealing, beam, elimination, ilp, solver",
        "print(elimination.solve(instance_of([[2, 1]]), solver.Deadline()).cost)",
        "print(sorted({'numba', 'highspy', 'scipy'} & set(sys.modules)))",
    )
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["1.0", "[]"]


def test_prices_close_the_gap_where_a_line_supports_the_optimum() -> None:
    # Two nodes may use 4 or 0 at one time, 4 together: one of them pays, the cheaper. The bound is 2 at a price of 0.5:
    # 0 + 2 (both prices alike), less 0.5 * 4, and 2 more for what either choice costs then.
    pair = instance_of([[0, 2], [0, 3]], usages=[Usage(n, 0, 1, [4, 0]) for n in (0, 1)], limit=4)
    found = elimination.solve(pair, ENDLESS)
    assert (found.cost, found.lower_bound, found.choice_N.tolist()) == (2.0, 2.0, [1, 0])


def test_a_gap_that_prices_leave_is_told() -> None:
    # One node: cost 10 for usage 0, or 0 for usage 3, limit 2. Prices mix the two, 2/3 and 1/3: the bound is 3.33, and
    # 4 in whole numbers; the optimum is 10.
    one = instance_of([[10, 0]], usages=[Usage(0, 0, 1, [0, 3])], limit=2)
    found = elimination.solve(one, ENDLESS)
    assert (found.cost, found.lower_bound) == (10.0, 4.0)
    assert found.gap == pytest.approx(0.6)


# --- infeasible -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [elimination, ilp, exhaustive, frontier])
def test_why_nothing_is_legal(solver: ModuleType) -> None:
    def reasons(instance: Instance) -> tuple[str, ...]:
        found: Solved = solver.solve(instance, ENDLESS)
        assert found.is_infeasible
        assert found.choice_N is None
        return found.reasons

    assert reasons(instance_of([[1], [INF, INF]])) == ("node 1 has no strategy left: its 2 costs are infinite",)
    equal, unequal = [[0, INF], [INF, 0]], [[INF, 0], [0, INF]]
    assert reasons(instance_of([[0, 0], [INF, 0], [0, INF]], [(0, 1, equal), (0, 2, equal)])) == (
        "node 0 has no strategy left: each of its 2 is forbidden by its cost or by edges, the last by edge 1 to node 2",
    )
    held = [Usage(0, 0, 5, [3, 4]), Usage(1, 2, 8, [2])]
    assert reasons(instance_of([[0, 0], [0]], usages=held, limit=4.5)) == (
        "the interval [2, 5) cannot hold the 2 usages in it: they need at least 5, the limit is 4.5",
    )
    # An odd circle of unequal neighbours: each pair of nodes could do, all three together cannot.
    (reason,) = reasons(instance_of([[0, 0]] * 3, [(0, 1, unequal), (1, 2, unequal), (2, 0, unequal)]))
    assert reason


# --- the integer program ----------------------------------------------------------------------------------------------


def test_large_whole_costs_are_proven_to_the_last_unit() -> None:
    for instance in instances(20, seed=8, with_memory=True):
        instance = replace(instance, cost_C=instance.cost_C * 10**6 + 1, matrix_M=instance.matrix_M * 10**6 + 7)
        optimum, found = brute_force(instance), ilp.solve(instance, ENDLESS)
        assert (found.cost, found.lower_bound) == (optimum.cost, optimum.cost)


def test_no_time_still_gives_an_answer() -> None:
    for instance in instances(20, seed=9, with_memory=True):
        optimum = brute_force(instance)
        for solver in (elimination, ilp, exhaustive, frontier):
            check_solved(instance, solver.solve(instance, within(0.0)), optimum.cost)


def test_too_many_pairs_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ilp, "MOST_PAIRS", 8)
    found = ilp.solve(instance_of([[0] * 3] * 2, [(0, 1, np.ones((3, 3)))]), ENDLESS)
    assert found.reasons == ("9 pairs of strategies are too many for an integer program: at most 8 are tried",)
    assert found.lower_bound == ilp.lp_bound(instance_of([[0] * 3] * 2, [(0, 1, np.ones((3, 3)))]), ENDLESS) == -INF


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    ilp.solve(instances(1, seed=10, with_memory=True)[0], ENDLESS)
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_ends_the_solver_and_goes_on() -> None:
    def interrupt(columns: object) -> None:
        raise KeyboardInterrupt

    # A knapsack with equal odd weights and an even limit, at which branch and bound has long to do.
    solver = highs.QuietHighs()
    for _ in range(40):
        solver.addVar(0.0, 1.0)
    index = np.arange(40, dtype=np.int32)
    solver.changeColsIntegrality(40, index, np.ones(40, dtype=np.uint8))
    solver.changeColsCost(40, index, -np.random.default_rng(0).integers(100, 110, 40).astype(float))
    rng = np.random.default_rng(1)
    for _ in range(20):
        solver.addRow(-INF, 300.5, 40, index, rng.integers(20, 40, 40).astype(float))
    with pytest.raises(KeyboardInterrupt):
        solver.solve_until(within(60.0), interrupt)
    assert solver.getModelStatus().name == "kInterrupt"


# --- chains of equal blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 8, 80])
def test_a_chain_equals_its_blocks_one_by_one(num_blocks: int) -> None:
    rng = np.random.default_rng(num_blocks)
    block = rng.integers(0, 50, (5, 5)).astype(float)
    block[rng.random((5, 5)) < 0.3] = INF
    folded = chain(block, num_blocks)
    plain = block
    for _ in range(num_blocks - 1):
        plain = (plain[:, :, None] + block[None]).min(axis=1)
    assert np.array_equal(folded.cost_SS, plain)
    unfolded = instance_of([[0.0] * 5] * (num_blocks + 1), [(n, n + 1, block) for n in range(num_blocks)])
    assert folded.cost_SS.min() == elimination.solve(unfolded, ENDLESS).cost
    for first, last in itertools.product(range(5), range(5)):
        states = folded.states(first, last)
        assert (states[0], states[-1], len(states)) == (first, last, num_blocks + 1)
        assert block[states[:-1], states[1:]].sum() == folded.cost_SS[first, last]


def test_products_are_made_in_parts() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random((7, 400)), rng.random((400, 500))
    assert np.array_equal(min_plus(one, other), np.stack([(row[:, None] + other).min(axis=0) for row in one]))


def test_a_block_of_an_instance_folds() -> None:
    # A block: boundary a, inner node, boundary b. The table over (a, b) of one block, repeated, is the whole chain.
    rng = np.random.default_rng(11)
    into, out, inner = rng.integers(0, 9, (3, 4)), rng.integers(0, 9, (4, 3)), rng.integers(0, 9, 4)
    block = min_marginals(instance_of([[0] * 3, inner, [0] * 3], [(0, 1, into), (1, 2, out)]), [0, 2])
    costs = [[0] * 3] + [inner, [0] * 3] * 6
    edges = [(2 * n, 2 * n + 1, into) for n in range(6)] + [(2 * n + 1, 2 * n + 2, out) for n in range(6)]
    whole, folded = instance_of(costs, edges), chain(block.least, 6)
    first, last = np.unravel_index(folded.cost_SS.argmin(), folded.cost_SS.shape)
    assert folded.cost_SS.min() == elimination.solve(whole, ENDLESS).cost
    choice = [int(first)]
    for pair in itertools.pairwise(folded.states(int(first), int(last)).tolist()):
        choice += block.choice(pair)[1:].tolist()
    assert cost_of(whole, np.array(choice)) == folded.cost_SS.min()


# --- the front of cost and usage --------------------------------------------------------------------------------------


def at_once(rng: np.random.Generator) -> Instance:
    """An instance all of whose usages are held at one time, under a limit."""
    instance = random_instance(rng, with_memory=True)
    intervals_U = np.tile([3, 4], (len(instance.intervals_U), 1))
    return replace(instance, intervals_U=intervals_U, limit=float(rng.integers(0, 60)))


def plain_front(instance: Instance) -> list[tuple[float, float]]:
    points = set()
    for choice in itertools.product(*(range(size) for size in instance.num_strategies_N)):
        cost, usage = cost_of(instance, np.array(choice)), peak_of(instance, np.array(choice))
        if cost < INF and usage <= instance.limit:
            points.add((cost, usage))
    return sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))


def test_the_front_equals_brute_force_exact_or_thinned() -> None:
    rng = np.random.default_rng(12)
    for _ in range(60):
        instance = at_once(rng)
        expected, front = plain_front(instance), frontier.pareto_front(instance)
        assert [(cost, usage) for cost, usage, _ in front] == expected
        assert front.error == 0.0
        for cost, usage, choice_N in front:
            assert (cost_of(instance, choice_N), peak_of(instance, choice_N)) == (cost, usage)
        check_solved(instance, frontier.solve(instance, ENDLESS), expected[0][0] if expected else INF)
        thin = frontier.pareto_front(instance, max_points=2)
        assert all(any(c <= cost + thin.error + 1e-9 and u <= usage for c, u, _ in thin) for cost, usage in expected)


def test_a_sieve_leaves_the_front_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [list(frontier.pareto_front(at_once(np.random.default_rng(seed)))) for seed in range(30)]
    monkeypatch.setattr(frontier, "SIEVE_FROM", 0)
    sieved = [list(frontier.pareto_front(at_once(np.random.default_rng(seed)))) for seed in range(30)]
    assert str(sieved) == str(whole)


def test_the_front_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = at_once(np.random.default_rng(13))
    whole = [point[:2] for point in frontier.pareto_front(instance)]
    monkeypatch.setattr(frontier, "BLOCK_POINTS", 3)
    assert [point[:2] for point in frontier.pareto_front(instance)] == whole


def test_thinned_sets_keep_within_their_error() -> None:
    # Ten nodes that each cost 2^n or use 2^n: every sum of costs up to 1,023 is on the front.
    usages = [Usage(n, 0, 1, [0, 2**n]) for n in range(10)]
    instance = instance_of([[2**n, 0] for n in range(10)], [(n, n + 1, np.zeros((2, 2))) for n in range(9)], usages)
    exact, thin = frontier.pareto_front(instance), frontier.pareto_front(instance, max_points=20)
    assert len(thin) <= 20
    assert len(exact) == 1024
    assert thin.error > 0
    for cost, usage, _ in exact:
        assert any(c <= cost + thin.error and u <= usage for c, u, _ in thin)


def test_what_the_front_is_not_for() -> None:
    apart = instance_of([[0], [0]], usages=[Usage(0, 0, 2, [1]), Usage(1, 2, 3, [1])], limit=5, name="apart")
    with pytest.raises(InputError, match="intervals of apart: must all share a time"):
        frontier.pareto_front(apart)
    with pytest.raises(InputError, match="max_points = 1: must be at least 2"):
        frontier.pareto_front(instance_of([[0]]), max_points=1)
    assert frontier.solve(apart, ENDLESS).reasons == (
        "intervals of apart: must all share a time: the front is for usage that is held at once",
    )
