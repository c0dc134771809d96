"""`schedule`, `simulate` and the evaluators from the command line: keys that others rely on, files, bad input."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from helpers import Outcome, meshwright
from meshwright.io.trace import read_trace
from meshwright.schedule import SCHEDULES, actions, read_table, table_csv

LLAMA = ("llama-3-8b", "dgx-h100x2")
WORK = ("--global-batch", 16, "--seq-len", 4096)
STRATEGY = "tp=2,pp=4,dp=2,zero=1,sp=1"


def simulated(*more: object, strategy: str = STRATEGY) -> Outcome:
    return meshwright("simulate", *LLAMA, strategy, *WORK, *more)


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_schedule_has_the_keys_that_others_rely_on() -> None:
    outcome = meshwright("schedule", "1F1B", "--ranks", 2, "--microbatches", 3, "--json")
    found = outcome.json
    assert (outcome.code, outcome.err, next(iter(found)), found["schema"]) == (0, "", "schema", "schedule/1")
    assert found["actions"] == [
        ["0F0", "0F1", "0B0", "0F2", "0B1", "0B2"],
        ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"],
    ]
    # 3 (m + p - 1) = 12; each rank works 9 of 12.
    assert (found["makespan"], found["period"], found["bubble_fraction"]) == (12.0, 12.0, 0.25)
    assert found["peak_in_flight"] == [2, 1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_drawn(name: str) -> None:
    outcome = meshwright("schedule", name, "--ranks", 4, "--microbatches", 8)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("rank ") >= 4
    assert "makespan" in outcome.out


def test_times_of_each_stage() -> None:
    # GPipe with p = 2, m = 1: F 1 + 3, then B (1 + 1) + (2 + 1), and a message of 0.5 each way.
    asked = ("schedule", "GPipe", "--ranks", 2, "--microbatches", 1, "--times", "F=1/3,I=1/2,p2p=0.5", "--json")
    assert meshwright(*asked).json["makespan"] == 1 + 0.5 + 3 + 3 + 0.5 + 2


def test_a_table_goes_out_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    asked = ("schedule", "ZBVZeroBubble", "--ranks", 3, "--microbatches", 6, "--json")
    first = meshwright(*asked, "--csv", path).json
    again = meshwright("schedule", path, "--json").json
    for key in ("actions", "makespan", "period", "bubble_fraction", "peak_in_flight"):
        assert first[key] == again[key]
    assert read_table(path.read_text(), "") == actions("ZBVZeroBubble", 3, 2, 6)
    plain = meshwright("schedule", "GPipe", "--ranks", 2, "--microbatches", 1, "--csv", "-")
    assert plain.out == "0F0,0B0\n1F0,1B0\n"


def test_auto_finds_a_better_one_with_its_bound() -> None:
    asked = ("schedule", "auto", "--ranks", 3, "--microbatches", 4, "--times", "F=2/1/1,I=1/1/3", "--json")
    found = meshwright(*asked, "--time-limit", 20).json
    named = min(span for span in found["named"].values() if span is not None)
    assert found["lower_bound"] <= found["makespan"] <= named
    assert found["is_optimal"]


BROKEN = {
    "missing": ("0F0,0B0\n1F0", r"1B0: is missing; each microbatch passes each stage once backward"),
    "doubled": ("0F0,0F0,0B0\n1F0,1B0", r"line 1 (rank 0) = 0F0: a microbatch passes a stage once forward"),
    "circle": (
        "0B0,0F0\n1F0,1B0",
        r"deadlock, the ranks wait for one another",
    ),
    "unknown": ("0F0,0X0\n1F0,1B0", r"line 1 (rank 0), column 2 = '0X0': X is no kind of action"),
    "a rank too many": ("0F0,0B0\n1F0,1B0\n,,", "line 3 (rank 2): computes nothing: it has a rank too many"),
    "two ranks of a stage": ("0F0,0B0\n0F1,0B1", r"stage 0"),
    "empty": ("", "has no actions; a table has one line"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_tables_are_told(fault: str, tmp_path: Path) -> None:
    text, told = BROKEN[fault]
    path = tmp_path / "broken.csv"
    path.write_text(text)
    outcome = meshwright("schedule", path)
    assert "Traceback" not in outcome.err
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("1F1",), ["NAME = 1F1: known: GPipe, 1F1B", "(nearest: 1F1B)", "--ranks: is needed", "--microbatches: is"]),
        (("1F1B", "--ranks", 0, "--microbatches", 4), ["--ranks = 0: must be from 1 to 100000"]),
        (("1F1B", "--ranks", 4, "--microbatches", 8, "--virtual", 2), ["--virtual = 2: 1F1B has one stage per rank"]),
        (("Interleaved1F1B", "--ranks", 4, "--microbatches", 11, "--virtual", 2), ["--microbatches = 11: Interleaved"]),
        (("1F1B", "--ranks", 2, "--microbatches", 2, "--times", "F=-1"), ["--times = F=-1: times are finite and at"]),
        (("1F1B", "--ranks", 2, "--microbatches", 2, "--times", "F=nan"), ["--times = F=nan: times are finite"]),
        (("1F1B", "--ranks", 2, "--microbatches", 2, "--times", "F=1/2/3"), ["one for all, or one for each of 2"]),
        (("1F1B", "--ranks", 2, "--microbatches", 2, "--times", "G=1"), ["--times = G=1: times are F, I, W, p2p"]),
        (("1F1B", "--ranks", 2, "--microbatches", 2, "--memory", 3), ["--memory = 3: is for auto"]),
        (("1F1B", "--ranks", 1000, "--microbatches", 100000), ["must be at most 2,000,000"]),
        (("nothing.csv",), ["nothing.csv: there is no such file"]),
        (("nothing.csv", "--ranks", 3), ["--ranks = 3: a table brings its own"]),
        (("1F1B", "--ranks", 2, "--microbatches", 2, "--json", "--csv", "-"), ["--json prints one object"]),
    ],
)
def test_bad_questions_about_schedules(words: tuple[object, ...], told: list[str]) -> None:
    outcome = meshwright("schedule", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    for each in told:
        assert each in outcome.err, outcome.err


# --- simulate ---------------------------------------------------------------------------------------------------------


def test_simulate_has_the_keys_that_others_rely_on() -> None:
    outcome = simulated("--json")
    found = outcome.json
    assert (outcome.code, outcome.err, next(iter(found)), found["schema"]) == (0, "", "schema", "simulation/1")
    assert sum(found["time"].values()) == pytest.approx(found["step_time_s"], rel=1e-9)
    assert sum(found["memory"].values()) == pytest.approx(found["peak_memory_bytes"], rel=1e-9)
    assert found["evaluator"] == "simulated"
    assert found["num_tasks"] > 1000
    assert found["tasks_per_s"] > 0
    path = found["critical_path"]
    assert path[-1]["end_s"] == found["makespan_s"]
    assert {"rank", "action", "start_s", "end_s"} <= set(path[0])
    assert len(found["idle"]) == 4
    same = meshwright("estimate", *LLAMA, STRATEGY, *WORK, "--evaluator", "simulated", "--json").json
    assert same["step_time_s"] == pytest.approx(found["step_time_s"], rel=1e-9)


def test_simulate_is_read_in_a_terminal() -> None:
    outcome = meshwright("simulate", *LLAMA, STRATEGY, *WORK, env={"COLUMNS": "60"})
    assert outcome.code == 0
    for words in ("critical path", "idle", "warm-up", "rank 3", "tasks in"):
        assert words in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 60


@pytest.mark.parametrize("suffix", ["pftrace", "json"])
def test_a_trace_has_every_task(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"step.{suffix}"
    found = simulated("--trace", path, "--json").json
    trace = read_trace(path)
    spans = [span for track in trace.tracks for span in track.spans]
    assert len(spans) == found["num_tasks"]
    compute = [
        span for track in trace.tracks if track.name == "compute" for span in track.spans if "action" in span.args
    ]
    assert {"rank", "action", "stage", "microbatch"} <= set(compute[0].args)
    assert max(span.end_s for span in spans) == pytest.approx(found["makespan_s"], abs=1e-9)


def test_figures_are_whole_pages(tmp_path: Path) -> None:
    step, table = tmp_path / "step.html", tmp_path / "table.html"
    assert simulated("--figure", step, "--json").code == 0
    asked = ("schedule", "ZB-H1", "--ranks", 4, "--microbatches", 8)
    assert meshwright(*asked, "--figure", table).code == 0
    for path in (step, table):
        text = path.read_text()
        assert "<html" in text
        assert 'src="http' not in text


def test_stragglers_jitter_and_shared_links() -> None:
    calm = simulated("--json").json
    slow = simulated("--slow-device", "5=1.5", "--json").json
    assert slow["step_time_s"] > calm["step_time_s"]
    assert slow["time"]["slowdown"] > 0
    assert slow["num_tasks"] == 4 * calm["num_tasks"]
    drawn = simulated("--jitter", 0.05, "--samples", 5, "--detail", "stage", "--json").json["spread"]
    assert drawn["num_samples"] == 5
    assert drawn["quantiles_s"]["5"] <= drawn["quantiles_s"]["95"]
    shared = simulated("--shared-links", "--detail", "stage", "--json")
    assert shared.code == 0
    assert shared.json["step_time_s"] >= 0.999 * calm["step_time_s"]


def test_jitter_varies_the_step_that_was_asked_for(tmp_path: Path) -> None:
    # On one core four ranks take turns; steps drawn with next to no jitter must do so too, and stragglers as well.
    asked = ("simulate", "llama-tiny", "local-cpux4", "pp=4", "--global-batch", 4, "--seq-len", 64, "--json")
    more = ("--jitter", 1e-6, "--samples", 3, "--stragglers", tmp_path / "stragglers.html")
    free, crowded = meshwright(*asked).json, meshwright(*asked, "--cores", 1, *more).json
    assert crowded["step_time_s"] > 1.5 * free["step_time_s"]
    assert crowded["spread"]["quantiles_s"]["50"] == pytest.approx(crowded["step_time_s"], rel=1e-3)
    for curve in crowded["stragglers"]:
        assert curve["step_times_s"][0] == pytest.approx(crowded["step_time_s"], rel=1e-3)


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "simulator.md").read_text()
    block = re.search(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    assert block
    lines = block[1].splitlines()
    assert len(lines) == 3
    for line in lines:
        outcome = meshwright(*shlex.split(line)[1:])
        assert (outcome.code, outcome.err) == (0, ""), line
    assert (tmp_path / "step.pftrace").stat().st_size > 0


def test_a_strategy_with_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(table_csv(actions("ZB-H1", 4, 1, 8)))
    own = simulated("--json", strategy=f"tp=2,pp=4,dp=2,schedule={path}").json
    named = simulated("--json", strategy="tp=2,pp=4,dp=2,schedule=ZB-H1").json
    assert own["step_time_s"] == named["step_time_s"]
    told = simulated(strategy=f"tp=2,pp=2,dp=4,schedule={path}")
    assert told.code == 2
    assert "has 4 ranks, and pp=2 (nearest: pp=4)" in told.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--detail", "blocks"), "--detail = blocks: known: stage, block, operator (nearest: block)"),
        (("--slow-device", "99=2"), "--slow-device = 99: devices are 0 to 15 (nearest: 15)"),
        (("--slow-link", "x"), "--slow-link = x: each part is device=factor"),
        (("--shared-links", "--cores", "2"), "--cores = 2: processes share cores, devices links: one of the two"),
        (("--jitter", "nan"), "--jitter = nan: is a sigma from 0 to 2"),
        (("--trace", "x.txt"), "a trace file ends in .pftrace"),
        (("--profile", "none.json"), "none.json: there is no such file"),
    ],
)
def test_bad_conditions(more: tuple[str, ...], told: str) -> None:
    outcome = simulated(*more)
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err, outcome.err


def test_infeasible_is_an_answer() -> None:
    outcome = meshwright("simulate", "llama-3.1-405b", "dgx-h100x1", "tp=8", *WORK, "--json")
    assert outcome.code == 1
    assert not outcome.json["feasible"]
    assert outcome.json["reasons"]


def test_evaluators_by_name() -> None:
    told = meshwright("estimate", *LLAMA, STRATEGY, *WORK, "--evaluator", "simulate")
    assert "--evaluator = simulate: known: analytic, simulated, profiled (nearest: simulated)" in told.err
    v = "tp=2,pp=4,dp=2,vpp=2,schedule=ZBVZeroBubble"
    assert meshwright("estimate", *LLAMA, v, *WORK, "--json").json["evaluator"] == "simulated"
    told = meshwright("explain", *LLAMA, v, *WORK)
    assert told.code == 2
    assert "no closed form of schedule ZBVZeroBubble is known" in told.err
    told = meshwright("estimate", *LLAMA, v, *WORK, "--evaluator", "analytic")
    assert told.code == 2
    assert "no closed form of schedule ZBVZeroBubble is known" in told.err
    told = meshwright("estimate", *LLAMA, "tp=2,pp=4,dp=2,schedule=ForwardOnly", *WORK)
    assert "schedule = ForwardOnly: has no backward, and a step trains" in told.err


def test_files_keep_a_table(tmp_path: Path) -> None:
    from meshwright.io.inputs import make_workload, named_strategy, parse_strategy
    from meshwright.io.models import load_model
    from meshwright.io.native import write

    path, strategy = tmp_path / "mine.csv", tmp_path / "strategy.json"
    path.write_text(table_csv(actions("GPipe", 4, 1, 8)))
    given = parse_strategy(f"tp=2,pp=4,dp=2,schedule={path}")
    named = named_strategy(given, load_model("llama-3-8b"), 16, make_workload(16, 4096, "bfloat16"))
    write(named.strategy, strategy)
    assert json.loads(strategy.read_text())["schedule"] == "custom"
    assert simulated("--json", strategy=str(strategy)).code == 0


# --- beside real runs -------------------------------------------------------------------------------------------------


def test_a_run_is_traced_like_a_simulation(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    table = tmp_path / "mine.csv"
    table.write_text(table_csv(actions("ZB-H1", 2, 1, 4)))
    words = ("run", "llama-tiny", f"pp=2,schedule={table}", "--global-batch", 4, "--seq-len", 16, "--steps", 2)
    outcome = meshwright(*words, "--dtype", "float64", "--check", "--trace", path, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json["check"]["passed"]
    assert 0 < outcome.json["bubble_fraction"] < 1
    ran = [[span.args["action"] for span in track.spans] for track in read_trace(path).tracks]
    assert ran == [[str(action) for action in row] for row in actions("ZB-H1", 2, 1, 4)]


def test_operators_are_measured_once_and_feed_both_evaluators(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    asked = ("llama-tiny", "local-cpux1", "tp=1", "--global-batch", 2, "--seq-len", 16, "--precision", "float32")
    refused = meshwright("estimate", *asked, "--evaluator", "profiled")
    assert "--evaluator = profiled: keeps what it measures in a file (nearest: --profile profile.json)" in refused.err
    first = meshwright("estimate", *asked, "--evaluator", "profiled", "--profile", path, "--json").json
    kept = path.read_bytes()
    again = meshwright("estimate", *asked, "--evaluator", "profiled", "--profile", path, "--json").json
    assert (first, kept) == (again, path.read_bytes())
    assert any("as measured on" in told for told in first["assumptions"])
    simulated_ = meshwright("estimate", *asked, "--evaluator", "simulated", "--profile", path, "--json").json
    assert simulated_["time"]["compute"] == pytest.approx(first["time"]["compute"], rel=1e-9)
    by_formula = meshwright("estimate", *asked, "--json").json
    assert by_formula["time"]["compute"] != first["time"]["compute"]
