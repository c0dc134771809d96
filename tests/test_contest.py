"""Contest files: read, refused with everything that is wrong, and solutions checked apart from our own arrays."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from choose_cases import random_instance
from helpers import meshwright
from meshwright.choice import Instance, cost_of, instance_of, is_legal, peak_of
from meshwright.errors import InputError
from meshwright.io.contest import contest_of, read_contest
from meshwright.io.contest_check import check_solution

DATA = Path(__file__).parents[2] / "shared" / "data" / "iopddl"


def shared(name: str) -> Path:
    """One of the contest's files, where the checkout has them beside it."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    return DATA / name


def content(problem: Any) -> bytes:
    return json.dumps({"problem": problem}).encode()


def problems(problem: Any) -> str:
    with pytest.raises(InputError) as found:
        contest_of(content(problem), "x.json")
    return str(found.value)


def problem_of(instance: Instance) -> dict[str, Any]:
    """An instance as the contest writes it: each node has one interval, so others become nodes of their own."""
    costs = [[min(c, 1e18) for c in instance.costs(n).tolist()] for n in range(instance.num_nodes)]
    usages, intervals = [[0] * len(row) for row in costs], [[0, 0] for _ in costs]
    taken = set()
    for u, node in enumerate(instance.usage_node_U.tolist()):
        if node not in taken:
            taken.add(node)
            usages[node], intervals[node] = instance.usage(u).tolist(), instance.intervals_U[u].tolist()
    edges = {
        "nodes": instance.edges_E.tolist(),
        "costs": [np.minimum(instance.matrix(e), 1e18).ravel().tolist() for e in range(instance.num_edges)],
    }
    nodes = {"costs": costs, "usages": usages, "intervals": intervals}
    limit = {"usage_limit": instance.limit} if np.isfinite(instance.limit) else {}
    return {"nodes": nodes, "edges": edges, **limit}


def test_the_example_is_read_and_its_optimum_checked() -> None:
    contest = read_contest(shared("example.json"))
    assert contest.instance.limit == 50
    assert contest.instance.costs(2).tolist() == [25, 45, 35]
    checked = check_solution(contest.problem, [0, 0, 2, 1, 0])
    # 15 + 55 + 35 + 75 + 95 nodes; 30 + 40 + 10 + 30 + 60 edges; nodes 0, 1, 2 together hold 10 + 25 + 15.
    assert (checked.cost, checked.peak, checked.faults) == (445, 50, ())
    assert cost_of(contest.instance, np.array([0, 0, 2, 1, 0])) == 445


def test_gzip_is_told_by_content_and_dash_is_stdin(tmp_path: Path) -> None:
    packed = gzip.compress(content({"nodes": {"costs": [[3, 1]]}}))
    (tmp_path / "x.dat").write_bytes(packed)
    assert read_contest(tmp_path / "x.dat").instance.cost_C.tolist() == [3, 1]
    found = meshwright("solve", "-", "--json", "--time-limit", "30", stdin=packed)
    assert (found.code, found.json["cost"], found.json["solution"]) == (0, 1, [1])


def test_infinity_absent_parts_unary_edges_and_loops() -> None:
    edges = {"nodes": [[0, 1], [1], [0, 0]], "costs": [[0, 1e18, 10**18, 4], [5, 6], [7, 99, 99, 8]]}
    found = contest_of(content({"nodes": {"costs": [[1, 2], [0, 0]]}, "edges": edges}))
    assert found.instance.costs(0).tolist() == [8, 10]
    assert found.instance.costs(1).tolist() == [5, 6]
    assert found.instance.matrix(0).tolist() == [[0, np.inf], [np.inf, 4]]
    assert found.instance.limit == np.inf
    for choice in ([0, 0], [1, 1]):
        assert check_solution(found.problem, choice).cost == cost_of(found.instance, np.array(choice))


@pytest.mark.parametrize("seed", range(60))
def test_checker_and_arrays_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = problem_of(random_instance(rng, with_memory=True))
    instance = contest_of(content(problem)).instance
    for _ in range(20):
        choice = rng.integers(0, instance.num_strategies_N)
        checked = check_solution(problem, choice.tolist())
        assert checked.is_legal == is_legal(instance, choice)
        assert checked.peak == peak_of(instance, choice)
        if checked.is_legal:
            assert checked.cost == cost_of(instance, choice)


def test_the_checker_names_each_fault() -> None:
    problem = {
        "nodes": {"costs": [[0, 10**18], [0, 0]], "usages": [[1, 1], [2, 2]], "intervals": [[0, 5], [4, 9]]},
        "edges": {"nodes": [[0, 1]], "costs": [[0, 0, 10**18, 0]]},
        "usage_limit": 2,
    }
    assert check_solution(problem, [1, 0]).faults == (
        "strategy 1 of node 0 is forbidden",
        "edge 0 forbids strategies [1, 0] of nodes [0, 1]",
        "at time 4 usage is 3, the limit is 2",
    )
    assert check_solution(problem, [0]).faults == ("has 1 strategies for 2 nodes",)
    assert check_solution(problem, [0, 2]).faults == ("node 1 has no strategy 2",)


def test_all_that_is_wrong_is_said_at_once() -> None:
    text = problems(
        {
            "nodes": {
                "costs": [[1, -2], [3], [], [True]],
                "usages": [[1], ["x"], [], [0]],
                "intervals": [[5, 3], [0, 1.5], [0, 1], [0]],
            },
            "edges": {"nodes": [[0, 1], [0, 9], [0, 1, 2], [0, 1], []], "costs": [[1], [1, 2], [1], [1, None]]},
            "usage_limit": -1,
        }
    )
    for line in (
        "x.json: problem.usage_limit = -1: a number, not below 0, is expected",
        "x.json: problem.nodes.costs[0][1] = -2: a number, not below 0, is expected",
        "x.json: problem.nodes.costs[3][0] = True: a number, not below 0, is expected",
        "x.json: problem.nodes.costs[2] = []: a node has at least one strategy",
        "x.json: problem.nodes.usages[0]: has 1 entries for 2 strategies",
        "x.json: problem.nodes.usages[1][0] = 'x': a number, not below 0, is expected",
        "x.json: problem.nodes.intervals[0] = [5, 3]: the start may not be after the stop",
        "x.json: problem.nodes.intervals[1] = [0, 1.5]: two whole numbers are expected, start and stop",
        "x.json: problem.edges: has 5 rows of nodes and 4 of costs",
        "x.json: problem.edges.costs[0]: has 1 entries; 2 x 1 strategies are expected",
        "x.json: problem.edges.nodes[1] = [0, 9]: there is no node 9; they are numbered 0 to 3",
        "x.json: problem.edges.nodes[2] = [0, 1, 2]: joins 3 nodes; edges of one or two nodes can be solved",
        "x.json: problem.edges.nodes[4] = []: the numbers of two nodes are expected",
        "x.json: problem.edges.costs[3][1] = None: a number, not below 0, is expected",
    ):
        assert line in text


def test_of_many_problems_twenty_are_told() -> None:
    text = problems({"nodes": {"costs": [[-1]] * 50}})
    assert len(text.splitlines()) == 21
    assert text.endswith("x.json: and 30 more problems")


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (None, "an object with the key"),
        ({"nodes": {}}, "problem.nodes"),
        ({"nodes": {"costs": 3}}, "problem.nodes"),
        ({"nodes": {"costs": [[1]], "usages": [[1], [2]], "intervals": [[0, 1]]}}, "has 2 rows for 1 nodes"),
        ({"nodes": {"costs": [[1]], "usages": 5}}, "problem.nodes.usages = 5"),
        ({"nodes": {"costs": [[1]]}, "edges": []}, ""),
        ({"nodes": {"costs": [[1]]}, "edges": {"nodes": [[0]]}}, "problem.edges"),
        ({"nodes": {"costs": [[1]]}, "edges": {"nodes": [[-1]], "costs": [[1]]}}, "there is no node -1"),
        ({"nodes": {"costs": [[[1]]]}}, "problem.nodes.costs[0][0] = [1]"),
        ({"nodes": {"costs": ["12"]}}, "problem.nodes.costs[0] = '12'"),
        ({"nodes": {"costs": [[1]], "usages": [[1]], "intervals": [[0, 2**70]]}}, "intervals[0]"),
        ({"nodes": {"costs": [[1]]}, "usage_limit": "5"}, "problem.usage_limit = '5'"),
    ],
)
def test_each_wrong_part_is_named(problem: Any, said: str) -> None:
    if not said:  # empty edges of any kind are none
        assert contest_of(content(problem)).instance.num_edges == 0
        return
    assert said in problems(problem)


def test_an_instance_without_nodes_is_solved() -> None:
    found = meshwright("solve", "-", stdin=content({"nodes": {"costs": []}}))
    assert (found.code, found.out.splitlines()[-1]) == (0, "[]")


@pytest.mark.parametrize(
    ("bytes_", "said"),
    [
        (b"", "is not valid JSON"),
        (b'{"problem": {"nodes": {"costs": [[1', "is not valid JSON"),
        (b'{"problem": {"nodes": {"costs": [[NaN]]}}}', "is not valid JSON"),
        (b'{"problem": {"nodes": {"costs": [[1e999]]}}}', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (gzip.compress(b"{}" * 1000)[:-9], "breaks off before its end"),
        (b"\x1f\x8b\x08broken", "gzip"),
    ],
)
def test_broken_files_end_with_status_2_and_no_traceback(tmp_path: Path, bytes_: bytes, said: str) -> None:
    path = tmp_path / "x.json.gz"
    path.write_bytes(bytes_)
    found = meshwright("solve", path)
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err


def test_files_that_are_not_there_name_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "instance.json").write_bytes(b"{}")
    found = meshwright("solve", tmp_path / "instanc.json")
    assert found.code == 2
    assert f"(nearest: {tmp_path / 'instance.json'})" in found.err
    assert "is a folder" in meshwright("solve", tmp_path).err


def test_instances_made_here_are_read_as_written() -> None:
    instance = instance_of([[1, 2], [3]], [(0, 1, [[1], [2]])])
    found = contest_of(content(problem_of(instance))).instance
    assert found.cost_C.tolist() == instance.cost_C.tolist()
    assert found.matrix_M.tolist() == instance.matrix_M.tolist()


@pytest.mark.parametrize("intervals", [None, []])
def test_intervals_that_are_empty_are_absent(intervals: Any) -> None:
    problem = {"nodes": {"costs": [[1]], "usages": [[9]], "intervals": intervals}, "usage_limit": 3}
    assert not len(contest_of(content(problem)).instance.usage_node_U)
    assert check_solution(problem, [0]).is_legal


@pytest.mark.parametrize("key", ["costs", "usages"])
def test_numbers_in_quotes_are_none(key: str) -> None:
    nodes = {"costs": [[1]], "usages": [[1]], "intervals": [[0, 1]], key: [["5"]]}
    assert f"problem.nodes.{key}[0][0] = '5': a number" in problems({"nodes": nodes})
    edges = {"nodes": [[0, 0]], "costs": [["5"]]}
    assert "problem.edges.costs[0][0] = '5': a number" in problems({"nodes": {"costs": [[1]]}, "edges": edges})


@pytest.mark.parametrize("limit", [50, 499_999_999_999, 2 * 10**12, 2 * 10**12 + 0.5, 10**15, 2**50 + 1])
def test_one_more_than_the_limit_is_too_much(limit: float) -> None:
    nodes = {"costs": [[1, 2]], "usages": [[int(limit) + 1, int(limit)]], "intervals": [[0, 1]]}
    found = contest_of(content({"nodes": nodes, "usage_limit": limit}))
    for strategy, legal in ((0, False), (1, True)):
        assert is_legal(found.instance, np.array([strategy])) == legal
        assert check_solution(found.problem, [strategy]).is_legal == legal


def test_decimals_are_checked_as_they_are_written() -> None:
    nodes = {"costs": [[0.1], [0.2]], "usages": [[0.1], [0.2]], "intervals": [[0, 2], [0, 2]]}
    checked = check_solution({"nodes": nodes, "usage_limit": 0.3}, [0, 0])  # as doubles 0.1 + 0.2 > 0.3
    assert (float(checked.cost), checked.is_legal) == (0.3, True)
