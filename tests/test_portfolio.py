"""Big instances' solvers: bounds below the optimum, legal choices, and a command that keeps its time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from choose_cases import brute_force, check_solved, random_instance
from helpers import meshwright
from meshwright.choice import cost_of
from meshwright.cli import solve as command_solve
from meshwright.io.contest import contest_of, read_contest
from meshwright.search.choose import apart, dual, local, portfolio
from meshwright.search.choose.ascent import ascent
from meshwright.search.choose.grid import grid_of
from meshwright.search.choose.reduce import reduced
from meshwright.search.choose.solver import Solved, within

DATA = Path(__file__).parents[2] / "shared" / "data" / "iopddl"


def shared(name: str) -> Path:
    """One of the contest's files, where the checkout has them beside it."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    return DATA / name


def case(seed: int) -> Any:
    return random_instance(np.random.default_rng(1000 + seed), with_memory=seed % 4 > 0)


@pytest.mark.parametrize("seed", range(120))
def test_the_portfolio_equals_brute_force(seed: int) -> None:
    instance = case(seed)
    optimum = brute_force(instance)
    found = portfolio.solve(instance, within(20.0), seed=seed)
    check_solved(instance, found, optimum.cost)
    assert (found.cost, found.lower_bound) == (optimum.cost, optimum.cost)


@pytest.mark.parametrize("seed", range(120))
def test_bounds_are_below_the_optimum_and_choices_legal(seed: int) -> None:
    instance = case(seed)
    optimum = brute_force(instance)
    told: list[Solved] = []
    for solver in (dual, local):
        found = solver.solve(instance, within(5.0), seed=seed, report=told.append)
        check_solved(instance, found, optimum.cost)
    for one in told:
        check_solved(instance, one, optimum.cost)


def test_hopeless_strategies_are_in_no_cheaper_choice() -> None:
    struck = 0
    for seed in range(200):
        instance = case(seed)
        optimum = brute_force(instance)
        small = reduced(instance)
        if optimum.choice_N is None or small.infeasible:
            continue
        up = ascent(grid_of(small.instance, optimum.cost + 1))
        stop = np.zeros(1, dtype=np.int64)
        for _ in range(3):
            up.advance(stop, optimum.cost)
        # Some choice that costs the optimum is left when only dearer ones may go.
        hopeless_C = up.hopeless(optimum.cost + 0.5, stop)
        left = reduced(small.instance, ~hopeless_C)
        assert not left.infeasible
        assert brute_force(left.instance).cost == optimum.cost
        struck += int(hopeless_C.sum())
    assert struck > 20


def test_same_seed_same_search() -> None:
    instance = read_contest(shared("G.json.gz")).instance
    scaled = grid_of(reduced(instance).instance)
    stop = np.zeros(1, dtype=np.int64)
    found = []
    for _ in range(2):
        up = ascent(scaled)
        up.advance(stop)
        search = local.search_of(scaled.grid, up.priced(), 3)
        search.begin(up.choice_N)
        search.moves(500, 30, warmth=100.0, allowance=100.0)
        found.append((search.cost, search.state.choice_N.tolist()))
    assert found[0] == found[1]


def test_a_search_keeps_its_accounts() -> None:
    instance = read_contest(shared("B.json.gz")).instance
    small = reduced(instance)
    scaled = grid_of(small.instance)
    search = local.search_of(scaled.grid, np.zeros(len(scaled.grid.cost_C)), 1)
    up = ascent(scaled)
    up.advance(np.zeros(1, dtype=np.int64))
    search.begin(up.choice_N)
    search.moves(3000, 100, warmth=1000.0, allowance=1000.0)
    kept = search.state.numbers.copy(), search.state.used_T.copy(), search.state.beside_C.copy()
    assert not np.array_equal(search.state.choice_N, up.choice_N)
    search.begin(search.state.choice_N.copy())
    assert search.state.numbers[0] == pytest.approx(kept[0][0], rel=1e-12)
    np.testing.assert_allclose(search.state.used_T, kept[1], rtol=1e-9)
    np.testing.assert_allclose(search.state.beside_C, kept[2], rtol=1e-9)
    choice_N = search.choice_N
    assert choice_N is not None
    assert cost_of(small.instance, choice_N) == pytest.approx(search.cost + scaled.constant, rel=1e-12)


@pytest.mark.parametrize(("name", "optimum"), [("example.json", 445), ("B.json.gz", 532843), ("G.json.gz", 217039)])
def test_contest_instances_are_solved_and_proven(name: str, optimum: int) -> None:
    found = meshwright("solve", shared(name), "--time-limit", "60", "--json")
    assert found.code == 0, found.err
    result = found.json
    assert (result["schema"], result["cost"], result["lower_bound"], result["gap"]) == (
        "solve-result/1", optimum, optimum, 0.0,
    )  # fmt: skip
    assert result["peak_usage"] <= result["usage_limit"]


def test_the_last_line_is_the_solution_and_out_has_it_too(tmp_path: Path) -> None:
    found = meshwright("solve", shared("example.json"), "--out", tmp_path / "s.json")
    solution = json.loads(found.out.splitlines()[-1])
    assert len(solution) == 5
    assert json.loads((tmp_path / "s.json").read_text()) == solution


@pytest.mark.parametrize("solver", ["dual", "local", "ilp", "portfolio"])
def test_each_solver_is_reached_by_name(solver: str) -> None:
    found = meshwright("solve", shared("example.json"), "--solver", solver, "--time-limit", "20", "--json")
    assert (found.code, found.json["cost"]) == (0, 445)


@pytest.mark.parametrize("limit", ["-1", "nan", "inf", "soon"])
def test_what_is_no_time_limit_ends_with_status_2(limit: str) -> None:
    found = meshwright("solve", "x.json", "--time-limit", limit)
    assert found.code == 2
    assert "--time-limit" in found.err


def test_an_unknown_solver_names_the_known(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"problem": {"nodes": {"costs": [[1]]}}}')
    found = meshwright("solve", tmp_path / "x.json", "--solver", "portfolo")
    assert found.code == 2
    assert "nearest: portfolio" in found.err


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({"nodes": {"costs": [[1], [2]], "usages": [[3], [4]], "intervals": [[0, 5], [3, 9]]}, "usage_limit": 6},
         "the interval [3, 5) cannot hold the 2 usages in it"),
        ({"nodes": {"costs": [[1e18, 1e18]]}}, "node 0 has no strategy left"),
        ({"nodes": {"costs": [[1], [2]]}, "edges": {"nodes": [[0, 1]], "costs": [[1e18]]}}, "edge 0"),
    ],
)  # fmt: skip
def test_infeasible_instances_end_with_status_1_and_a_reason(tmp_path: Path, problem: Any, reason: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"problem": problem}))
    found = meshwright("solve", tmp_path / "x.json", "--json")
    assert found.code == 1
    assert found.json["infeasible"]
    assert found.json["solution"] == []
    assert reason in found.json["reasons"][0]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "meshwright", "solve", *map(str, words)]


@pytest.mark.parametrize("limit", ["0", "0.1"])
def test_too_short_a_limit_says_so(limit: str) -> None:
    started = time.monotonic()
    done = subprocess.run(command(shared("S.json.gz"), "--time-limit", limit, "--json"), capture_output=True, text=True)
    assert time.monotonic() - started < 10  # most of it is starting Python on a busy machine
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["reasons"] == ["no solution yet: ended by the time limit"]


def test_the_limit_holds_for_the_whole_command() -> None:
    meshwright("solve", shared("example.json"), "--time-limit", "60")  # compiles where nothing is
    started = time.monotonic()
    done = subprocess.run(command(shared("M.json.gz"), "--time-limit", "12", "--json"), capture_output=True, text=True)
    assert time.monotonic() - started < 12.0
    assert done.returncode in (0, 1), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_best_so_far(number: int) -> None:
    meshwright("solve", shared("example.json"), "--time-limit", "60")
    process = subprocess.Popen(command(shared("S.json.gz"), "--time-limit", "120"), stdout=subprocess.PIPE, text=True)
    time.sleep(12.0)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=20)
    # On a machine too busy to have found anything by then, it says so.
    if process.returncode == 0:
        assert len(json.loads(out.splitlines()[-1])) == 28526
    else:
        assert "no solution yet: ended by" in out


ONE = b'{"problem": {"nodes": {"costs": [[9007199254740993, 5, 3]]}}}'


def test_a_signal_to_the_whole_group_leaves_no_traceback(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    process = subprocess.Popen(
        command(tmp_path / "x.json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with open(tmp_path / "x.json", "wb"):  # opens when the solving process reads
        os.killpg(process.pid, signal.SIGTERM)  # as `timeout` does
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (1, "no solution yet: ended by SIGTERM\n", "")


def test_what_was_found_outlives_the_solving_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def listen(*_: Any) -> Any:
        yield apart.Word(cost=3, peak=0, solution=(2,))
        raise apart.Broken("killed")

    monkeypatch.setattr(apart, "listen", listen)
    (tmp_path / "x.json").write_bytes(ONE)
    command_solve.solve(str(tmp_path / "x.json"), 5.0, out=str(tmp_path / "out"))
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "[2]"
    assert said.err == "the best so far: killed\n"
    assert (tmp_path / "out").read_text() == "[2]\n"


def test_a_killed_process_is_no_traceback() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.close()
    with pytest.raises(apart.Broken, match="killed for its memory"):
        list(apart.listen(ours, time.monotonic() + 5.0))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_the_file_is_written_where_standard_output_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(ONE)
    with open("/dev/full", "w") as full:
        words = command(tmp_path / "x.json", "--out", tmp_path / "out")
        assert subprocess.run(words, stdout=full, stderr=subprocess.PIPE).returncode != 0
    assert (tmp_path / "out").read_text() == "[2]\n"


def test_a_choice_that_was_put_off_is_told_without_another() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    teller = apart._Teller(contest_of(ONE), theirs)
    teller.tell(Solved(np.array([1]), 5.0, 0.0))
    assert ours.recv().cost == 5
    teller.checking_s = apart.CHECKING_SHARE * (time.monotonic() - teller.began_s + 0.2)
    teller.tell(Solved(np.array([2]), 3.0, 0.0))
    assert not ours.poll()
    assert ours.poll(10.0)
    assert ours.recv().solution == (2,)
    teller.tell(Solved(np.array([2]), 3.0, 3.0), final=True)


def test_a_bound_in_floats_is_not_above_the_exact_optimum() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    optimum = 2**53 + 3  # the double next to it is one more
    contest = contest_of(json.dumps({"problem": {"nodes": {"costs": [[optimum]]}}}).encode())
    assert cost_of(contest.instance, np.array([0])) == optimum + 1
    apart._Teller(contest, theirs).tell(Solved(np.array([0]), optimum + 1.0, optimum + 1.0), final=True)
    assert optimum * (1 - 1e-9) < ours.recv().lower_bound <= optimum
