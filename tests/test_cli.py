"""The commands as a user types them: what goes to stdout, the keys of `--json`, the exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from helpers import Outcome, meshwright
from meshwright.search.space import KEYS

SMALL = ("llama-tiny", "local-cpux8", "--global-batch", 16, "--seq-len", 64)
LLAMA = ("llama-3-8b", "dgx-h100x1", "--global-batch", 32, "--seq-len", 2048)
TOO_LARGE = ("llama-3.1-405b", "dgx-h100x1", "--global-batch", 32, "--seq-len", 8192)
SHORTHAND = "tp=2,dp=4,zero=1,sp=1"
RUNS = "data/measured_runs.csv"

ESTIMATE = {
    "feasible": bool,
    "reasons": list,
    "step_time_s": float,
    "time": dict,
    "memory": dict,
    "peak_memory_bytes": float,
    "mfu": float,
    "hfu": float,
    "bubble_fraction": float,
    "communication": dict,
}


def strategy_command(name: str, strategy: object, *more: object, inputs: tuple[object, ...] = LLAMA) -> Outcome:
    model, cluster, *workload = inputs
    return meshwright(name, model, cluster, strategy, *workload, *more)


@cache
def planned(*more: object, inputs: tuple[object, ...] = LLAMA) -> Outcome:
    """A plan in JSON, made once."""
    return meshwright("plan", *inputs, "--json", *more)


def check_types(found: dict[str, Any], types: dict[str, type]) -> None:
    for key, kind in types.items():
        assert type(found[key]) is kind, (key, found[key])


def check_estimate(found: dict[str, Any]) -> None:
    check_types(found, ESTIMATE)
    assert sum(found["time"].values()) == pytest.approx(found["step_time_s"], rel=1e-9)
    assert sum(found["memory"].values()) == pytest.approx(found["peak_memory_bytes"], rel=1e-9)
    assert all(value >= 0 for entries in ("time", "memory", "communication") for value in found[entries].values())
    assert 0 < found["mfu"] <= found["hfu"] <= 1
    assert 0 <= found["bubble_fraction"] < 1
    assert found["feasible"] is not bool(found["reasons"])


# --- plan ----------------------------------------------------------------------------------------------------------


def test_plan_has_the_keys_that_others_rely_on() -> None:
    outcome = planned()
    found = outcome.json
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("\n") == 1
    assert next(iter(found)) == "schema"
    assert found["schema"] == "plan-result/1"
    check_types(found["model"], {"num_parameters": int, "forward_flops": int})
    check_types(found["space"], {"num_strategies": int, "num_feasible": int})
    check_types(found, {"elapsed_s": float, "cpu_s": float, "strategies_per_s": float, "certificate": dict})
    assert found["model"]["num_parameters"] == 8_030_261_248
    assert found["space"]["num_feasible"] <= found["space"]["num_strategies"]
    assert len(found["ranking"]) == 10
    assert found["best"] == found["ranking"][0]
    for entry in found["ranking"]:
        check_types(entry, {"shorthand": str, "strategy": dict, "estimate": dict})
        check_estimate(entry["estimate"])
        assert entry["estimate"]["feasible"]
    times = [entry["estimate"]["step_time_s"] for entry in found["ranking"]]
    assert times == sorted(times)


@pytest.mark.parametrize("top", [1, 3])
def test_top_is_how_many_are_shown(top: int) -> None:
    ranking = planned("--top", top, inputs=SMALL).json["ranking"]
    assert ranking == planned("--top", 3, inputs=SMALL).json["ranking"][:top]
    assert len(ranking) == top


def test_the_same_question_has_the_same_answer() -> None:
    again = meshwright("plan", *LLAMA, "--json").json
    for key in ("model", "ranking", "space", "certificate"):
        assert again[key] == planned().json[key]


def values_of(shorthand: str) -> dict[str, str]:
    return dict(part.split("=") for part in shorthand.split(","))


@pytest.mark.parametrize(
    "fixed",
    ["tp=4", "pp=2,schedule=GPipe", "vpp=2", "mbs=2,zero=2", "recompute=full", "sp=0,tp=2", "cp=2", "tp=2,ep=1"],
)
def test_fix_is_respected(fixed: str) -> None:
    found = planned("--fix", fixed, inputs=SMALL).json
    assert found["ranking"]
    for entry in found["ranking"]:
        assert values_of(fixed).items() <= values_of(entry["shorthand"]).items()
    assert found["space"]["num_strategies"] < planned(inputs=SMALL).json["space"]["num_strategies"]


def test_fixing_all_keys_leaves_one() -> None:
    best = planned(inputs=SMALL).json["best"]
    found = planned("--fix", best["shorthand"], inputs=SMALL).json
    assert found["ranking"] == [best]
    assert found["space"]["num_strategies"] == 1


@pytest.mark.parametrize("largest", ["tp=2", "mbs=1,zero=1", "pp=1,cp=1", "recompute=selective"])
def test_max_is_respected(largest: str) -> None:
    order = ["none", "selective", "full"]
    for entry in planned("--max", largest, "--top", 50, inputs=SMALL).json["ranking"]:
        values = values_of(entry["shorthand"])
        for key, limit in values_of(largest).items():
            assert int(values[key]) <= int(limit) if limit.isdigit() else order.index(values[key]) <= order.index(limit)


def beats(other: tuple[float, float], one: tuple[float, float]) -> bool:
    return other != one and other[0] <= one[0] and other[1] <= one[1]


def test_objective_memory_and_pareto() -> None:
    def points(objective: str) -> list[tuple[float, float]]:
        few = ("--fix", "mbs=1,cp=1,schedule=1F1B,sp=1", "--objective", objective, "--top", 10_000)
        ranking = planned(*few).json["ranking"]
        assert len(ranking) < 200
        return [(entry["estimate"]["step_time_s"], entry["estimate"]["peak_memory_bytes"]) for entry in ranking]

    every, by_memory, front = points("step_time"), points("memory"), points("pareto")
    assert [memory for _, memory in by_memory] == sorted(memory for _, memory in by_memory)
    # slower and slower, smaller and smaller: none beats another, and nothing beats them
    assert front == sorted(front)
    assert [memory for _, memory in front] == sorted({memory for _, memory in front}, reverse=True)
    assert (front[0], front[-1]) == (every[0], by_memory[0])
    assert sorted(every) == sorted(by_memory)
    assert front == [one for one in every if not any(beats(other, one) for other in every)]


def test_a_plan_file_gives_the_same_estimate(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    outcome = meshwright("plan", *LLAMA, "--json", "--out", out)
    best = outcome.json["best"]
    written = json.loads(out.read_text())
    assert next(iter(written)) == "schema"
    assert written["schema"] == "plan/1"
    assert json.loads(json.dumps(best["strategy"])) == written["strategy"]
    for strategy in (out, best["shorthand"]):
        again = strategy_command("estimate", strategy, "--json").json
        for key in ESTIMATE:
            assert again[key] == best["estimate"][key], key
        assert again["shorthand"] == best["shorthand"]


def test_a_strategy_file_is_its_shorthand(tmp_path: Path) -> None:
    from meshwright.io.inputs import make_workload, read_strategy
    from meshwright.io.models import load_model
    from meshwright.io.native import write

    path = tmp_path / "strategy.json"
    write(read_strategy(SHORTHAND, load_model("llama-3-8b"), 8, make_workload(32, 2048, "bfloat16")).strategy, path)
    by_file = strategy_command("estimate", path, "--json")
    assert by_file == strategy_command("estimate", SHORTHAND, "--json")
    model, cluster, *workload = LLAMA
    by_stdin = meshwright("estimate", model, cluster, "-", *workload, "--json", stdin=path.read_bytes())
    assert by_stdin == by_file


def test_a_plan_on_stdout_is_all_of_stdout(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert meshwright("plan", *SMALL, "--out", out).code == 0
    outcome = meshwright("plan", *SMALL, "--out", "-")
    assert outcome.err == ""
    assert outcome.json["strategy"] == json.loads(out.read_text())["strategy"]


def test_where_nothing_fits(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    outcome = meshwright("plan", *TOO_LARGE, "--json", "--out", out)
    found = outcome.json
    assert outcome.code == 1
    assert next(iter(found)) == "schema"
    assert (found["best"], found["ranking"], found["space"]["num_feasible"]) == (None, [], 0)
    assert found["space"]["num_strategies"] > 100
    assert re.search(r"does not fit: .* GiB of .* GiB usable", found["reasons"][0])
    assert re.match(r"nearest fix: .* at least \d+ such devices", found["reasons"][1])
    assert not out.exists()
    shown = meshwright("plan", *TOO_LARGE)
    assert shown.code == 1
    assert "nearest fix: " in shown.out


def test_where_nothing_is_legal() -> None:
    outcome = meshwright("plan", *SMALL, "--fix", "tp=3", "--json")
    assert outcome.code == 1
    assert outcome.json["reasons"] == [
        "no legal strategy puts a global batch of 16 on exactly 8 devices within the given limits"
    ]


def test_the_largest_model_on_the_largest_cluster() -> None:
    inputs = ("llama-3.1-405b", "dgx-h100x2048", "--global-batch", 2048, "--seq-len", 8192)
    found = planned("--top", 20, inputs=inputs).json
    times = [entry["estimate"]["step_time_s"] for entry in found["ranking"]]
    assert len(times) == 20
    assert times == sorted(times)
    assert 0.2 < found["best"]["estimate"]["mfu"] < 0.65  # published at 16k GPUs: 0.38 to 0.43 (2407.21783, table 4)
    values = values_of(found["best"]["shorthand"])
    assert int(values["tp"]) * int(values["pp"]) * int(values["dp"]) * int(values["cp"]) == 16384


# --- estimate and explain ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        SHORTHAND,
        "tp=8",
        "dp=8,zero=3,mbs=2,recompute=full",
        "pp=4,dp=2,zero=1",
        "pp=4,dp=2,vpp=2,schedule=Interleaved1F1B,recompute=selective,zero=1",
        "tp=2,cp=2,dp=2,zero=2,dp_shard=2",
    ],
)
def test_estimate_has_the_keys_that_others_rely_on(strategy: str) -> None:
    outcome = strategy_command("estimate", strategy, "--json")
    found = outcome.json
    assert outcome.err == ""
    assert next(iter(found)) == "schema"
    check_estimate(found)
    assert outcome.code == int(not found["feasible"])
    used = values_of(strategy)
    assert {axis.split("_")[0] for axis, size in found["communication"].items() if size} == set(used) & {
        "tp",
        "pp",
        "dp",
        "cp",
    }


def test_what_does_not_fit_has_reasons_and_a_nearest_fix() -> None:
    outcome = strategy_command("estimate", "dp=8", "--json")
    found = outcome.json
    assert outcome.code == 1
    assert not found["feasible"]
    assert "GiB usable" in found["reasons"][0]
    fixed = {**values_of("dp=8"), **values_of(found["nearest_fix"].split(" ")[0])}
    again = strategy_command("estimate", ",".join(f"{key}={value}" for key, value in fixed.items()), "--json")
    assert (again.code, again.json["feasible"]) == (0, True)
    shown = strategy_command("estimate", "dp=8")
    assert shown.code == 1
    assert "nearest fix: " in shown.out


@pytest.mark.parametrize(("option", "value"), [("--engine", "unknown"), ("--precision", "float32")])
def test_engine_and_precision_change_the_answer(option: str, value: str) -> None:
    slower = strategy_command("estimate", SHORTHAND, option, value, "--json").json
    assert slower["step_time_s"] > strategy_command("estimate", SHORTHAND, "--json").json["step_time_s"]


def leaves_sum(leaf: dict[str, Any]) -> None:
    if leaf["children"]:
        assert sum(child["value"] for child in leaf["children"]) == pytest.approx(leaf["value"], rel=1e-6), leaf["name"]
    for child in leaf["children"]:
        leaves_sum(child)


def test_explain_goes_down_to_the_leaves() -> None:
    outcome = strategy_command("explain", SHORTHAND, "--json")
    found = outcome.json
    estimate = strategy_command("estimate", SHORTHAND, "--json").json
    assert outcome.code == 0
    assert next(iter(found)) == "schema"
    assert {key: found["estimate"][key] for key in ESTIMATE} == {key: estimate[key] for key in ESTIMATE}
    for name, total in (("time", "step_time_s"), ("memory", "peak_memory_bytes")):
        assert found[name]["value"] == estimate[total]
        leaves_sum(found[name])
    assert {leaf["name"] for leaf in found["time"]["children"]} <= set(estimate["time"])
    assert {"block", "tensor", "placements", "local_shape"} <= set(found["placements"][0])


def test_explain_against_another() -> None:
    found = strategy_command("explain", SHORTHAND, "--against", "tp=8,sp=1", "--json").json
    other = strategy_command("estimate", "tp=8,sp=1", "--json").json
    assert found["against"]["estimate"]["step_time_s"] == other["step_time_s"]
    assert values_of("tp=8,sp=1").items() <= values_of(found["against"]["shorthand"]).items()
    shown = strategy_command("explain", SHORTHAND, "--against", "tp=8,sp=1")
    assert shown.code == 0
    assert "difference" in shown.out
    faster = "tp=8,sp=1" if other["step_time_s"] < found["estimate"]["step_time_s"] else SHORTHAND
    assert f"{faster} takes less time." in " ".join(shown.out.split())


# --- presets and schema --------------------------------------------------------------------------------------------


def test_presets() -> None:
    outcome = meshwright("presets", "--json")
    found = outcome.json
    assert (outcome.code, outcome.err) == (0, "")
    assert next(iter(found)) == "schema"
    assert {"name": "llama-3-8b", "num_parameters": 8_030_261_248} in found["models"]
    assert any(cluster["name"] == "dgx-h100xN" for cluster in found["clusters"])
    for key, name in (("engines", "megatron-core"), ("schedules", "1F1B"), ("methods", "exhaustive")):
        assert name in found[key]
    shown = meshwright("presets").out
    assert all(model["name"] in shown for model in found["models"])


def test_schema() -> None:
    nouns = meshwright("schema", "--json").json
    assert next(iter(nouns)) == "schema"
    assert {"cluster", "strategy", "plan"} <= set(nouns["nouns"])
    assert meshwright("schema").out.split() == nouns["nouns"]
    for noun in nouns["nouns"]:
        found = meshwright("schema", noun, "--json").json
        assert next(iter(found)) == "schema"
        assert found["json_schema"] == meshwright("schema", noun).json
        assert found["json_schema"]["properties"]["schema"] == {"const": f"{noun}/{2 if noun == 'engine' else 1}"}


# --- manners -------------------------------------------------------------------------------------------------------

SHOWN = {
    "plan": ("plan", *LLAMA),
    "plan of nothing": ("plan", *TOO_LARGE),
    "pipeline": ("plan", *LLAMA, "--fix", "pp=4,vpp=2"),
    "estimate": ("estimate", *LLAMA[:2], SHORTHAND, *LLAMA[2:]),
    "estimate that does not fit": ("estimate", *LLAMA[:2], "dp=8", *LLAMA[2:]),
    "explain": ("explain", *LLAMA[:2], "tp=4,pp=2,sp=1,recompute=selective", *LLAMA[2:]),
    "against": ("explain", *LLAMA[:2], SHORTHAND, "--against", "dp=8,zero=3,recompute=full,mbs=4", *LLAMA[2:]),
    "presets": ("presets",),
    "nouns": ("schema",),
    "help": ("plan", "--help"),
}


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("name", SHOWN)
def test_no_line_is_wider_than_the_terminal(name: str, columns: int) -> None:
    outcome = meshwright(*SHOWN[name], env={"COLUMNS": str(columns)})
    assert outcome.err == ""
    assert outcome.out
    assert [line for line in outcome.out.splitlines() if len(line) > columns] == []


@pytest.mark.parametrize("name", SHOWN)
def test_a_pipe_gets_plain_text(name: str) -> None:
    assert "\x1b" not in meshwright(*SHOWN[name]).out


def test_no_color_is_honoured() -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|9[0-7]|38;[0-9;]*)m")
    command = SHOWN["estimate"]
    assert coloured.search(meshwright(*command, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}).out)
    plain = meshwright(*command, env={"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"}).out
    assert plain
    assert not coloured.search(plain)


def test_progress_is_on_stderr_and_only_where_someone_watches() -> None:
    watched = meshwright("plan", *SMALL, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert "evaluating strategies" in watched.err
    assert "evaluating strategies" not in watched.out
    assert meshwright("plan", *SMALL, "--json", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}).err == ""


COMMANDS = (
    "plan",
    "estimate",
    "explain",
    "simulate",
    "schedule",
    "run",
    "solve",
    "validate",
    "calibrate",
    "presets",
    "schema",
)


def options_of(command: str) -> list[str]:
    import typer.main

    from meshwright.cli import app

    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    return [name for parameter in found.params for name in parameter.opts if name.startswith("--")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str) -> None:
    outcome = meshwright(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    for option in options_of(command):
        assert re.search(rf"{option}\b", outcome.out), option
    assert "--help" in outcome.out


def test_all_commands_are_tested() -> None:
    import typer.main

    from meshwright.cli import app

    found: Any = typer.main.get_command(app)
    shown = meshwright("--help").out
    for name in found.commands:
        assert any(command.split()[0] == name for command in COMMANDS), f"add {name} to COMMANDS"
        assert name in shown


def test_help_says_the_default_engine() -> None:
    assert "megatron-core" in meshwright("plan", "--help").out


@pytest.mark.parametrize("name", ["[/bold]", "[red]", "a [link=x]b"])
def test_names_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "intermediate_size": 128,
    }
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / f"{name.replace('/', ':')}.json"
    path.write_text(json.dumps(config))
    outcome = meshwright("plan", path, *SMALL[1:], "--top", 1)
    assert outcome.code == 0
    assert path.stem in outcome.out


# --- processes -----------------------------------------------------------------------------------------------------


def process(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=60, **more)


def test_as_a_process(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("meshwright")), "estimate", *map(str, LLAMA[:2]), SHORTHAND]
    command += [*map(str, LLAMA[2:]), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout) == strategy_command("estimate", SHORTHAND, "--json").json


def test_as_a_module_wrong_input_is_2() -> None:
    ended = process("-m", "meshwright", "estimate", "llama-3-9b", *SMALL[1:2], "tp=3", *SMALL[2:])
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: model = llama-3-9b: ")
    assert "Traceback" not in ended.stderr


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m meshwright schema graph | head -c 10"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ('{\n  "$sche', "")


def test_ctrl_c_is_130() -> None:
    with mock.patch("meshwright.search.exhaustive.evaluate_space", side_effect=KeyboardInterrupt):
        outcome = meshwright("plan", *SMALL, "--json")
    assert (outcome.code, outcome.out) == (130, "")
    assert "Traceback" not in outcome.err


HEAVY = ("torch", "plotly", "pydantic")


def loaded(code: str) -> list[str]:
    probe = f"{code}\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    ended = process("-c", probe, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


@pytest.mark.parametrize("module", ["meshwright", "meshwright.cli"])
def test_imports_are_light(module: str) -> None:
    assert loaded(f"import {module}") == []


def test_the_probe_sees_a_heavy_import() -> None:
    assert loaded("import pydantic") == ["pydantic"]


def test_the_keys_that_can_be_fixed_are_those_of_the_space() -> None:
    assert set(KEYS) - {"etp"} <= set(values_of(planned().json["best"]["shorthand"]))


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        (("validate", RUNS, "--figure", "figure.html"), "plotly", "report"),
        (("calibrate", RUNS, "--out", "engine.json"), "scipy", "fit"),
        (("calibrate", "local"), "torch", "run"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    words: tuple[str, ...], missing: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (Path(__file__).parent.parent / RUNS).read_text().splitlines()
    (tmp_path / "data").mkdir()
    (tmp_path / RUNS).write_text("\n".join([lines[0], *(line for line in lines if ",internevo," in line)][:6]) + "\n")
    hidden = {name: None for name in (missing, *sys.modules) if name.partition(".")[0] == missing}
    ours = [name for name in sys.modules if name.startswith(("meshwright.runtime", "meshwright.report.figures"))]
    with mock.patch.dict(sys.modules, hidden):
        for name in ours:
            del sys.modules[name]
        outcome = meshwright(*words)
    assert outcome.code == 2
    assert outcome.err == f"error: this needs {missing}: pip install 'meshwright[{extra}]'\n"
