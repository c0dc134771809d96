"""Wrong input: status 2, nothing on stdout, and a message that names the place, the value, the rule and a way out."""

from __future__ import annotations

import json
import pickle
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import Outcome, meshwright
from meshwright.cluster import preset_cluster
from meshwright.errors import InputError
from meshwright.graph import Graph
from meshwright.io import native
from meshwright.io.inputs import make_workload, named_strategy, parse_strategy, read_cluster, read_strategy
from meshwright.io.models import load_model
from meshwright.strategy import Shorthand

MODEL, CLUSTER, STRATEGY = "llama-tiny", "local-cpux8", "tp=2,pp=2,dp=2,zero=1"
WORKLOAD = ("--global-batch", 16, "--seq-len", 64)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}


def estimate(model: object = MODEL, cluster: object = CLUSTER, strategy: object = STRATEGY, *more: object) -> Outcome:
    return meshwright("estimate", model, cluster, strategy, *(more or WORKLOAD))


def refused(outcome: Outcome, *parts: str) -> None:
    """Status 2, no stdout, no traceback, and all `parts` on stderr."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert "Traceback" not in outcome.err
    words = " ".join(outcome.err.replace("│", " ").split())
    for part in parts:
        assert part in words, f"{part!r} is not in {words!r}"


@pytest.fixture
def file(tmp_path: Path) -> Callable[[object], Path]:
    """Write some content to a file and give its path."""

    def write(content: object, name: str = "given.json") -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_the_good_input_is_good(file: Callable[[object], Path]) -> None:
    assert estimate().code == 0
    assert estimate(file(CONFIG)).code == 0


# --- models --------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[object, list[str]]] = {
    "truncated": (json.dumps(CONFIG)[:60], ["is not valid JSON at line 1", "seems to be cut off"]),
    "empty": ("", ["is empty; a Hugging Face config holds one JSON object"]),
    "binary": (bytes(range(128, 256)), ["is not UTF-8 text (byte 0); a Hugging Face config is a JSON text"]),
    "a list": ([CONFIG], ["a Hugging Face config holds one JSON object"]),
    "a number": ("7", ["= 7: a Hugging Face config holds one JSON object"]),
    "a key missing": (
        {key: value for key, value in CONFIG.items() if key != "vocab_size"},
        ["vocab_size: missing; a llama config must say it"],
    ),
    "a key misspelt": (
        {("vocab_sice" if key == "vocab_size" else key): value for key, value in CONFIG.items()},
        ["vocab_size: missing", "(nearest: vocab_sice)"],
    ),
    "a string": ({**CONFIG, "hidden_size": "64"}, ["hidden_size = 64: must be a whole number from 1"]),
    "a fraction": ({**CONFIG, "num_hidden_layers": 3.9}, ["num_hidden_layers = 3.9: must be", "(nearest: 4)"]),
    "negative": ({**CONFIG, "intermediate_size": -128}, ["intermediate_size = -128: must be a whole number from 1"]),
    "zero": ({**CONFIG, "num_attention_heads": 0}, ["num_attention_heads = 0: must be a whole number from 1"]),
    "NaN": (json.dumps({**CONFIG, "rope_theta": float("nan")}), ["NaN: a finite number is expected"]),
    "many layers": ({**CONFIG, "num_hidden_layers": 10**9}, ["num_hidden_layers = 1000000000: must be"]),
    "many words": ({**CONFIG, "vocab_size": 10**15}, ["vocab_size = 1000000000000000: must be a whole number"]),
    "heads that do not divide": (
        {**CONFIG, "num_key_value_heads": 3},
        ["num_key_value_heads = 3: must divide num_attention_heads = 4 (nearest: 2)"],
    ),
    "no family": ({"hidden_size": 64}, ["model_type: missing"]),
    "an unknown family": ({**CONFIG, "model_type": "lama"}, ["model_type = lama: known: llama", "(nearest: llama)"]),
    "a key twice": ('{"model_type": "llama", "model_type": "gpt2"}', ["'model_type' stands twice"]),
    "deep": ("[" * 100_000, ["is nested more than 100 levels deep"]),
    "two faults": (
        {**CONFIG, "hidden_size": -1, "vocab_size": None},
        ["hidden_size = -1: must be a whole number", "vocab_size: missing"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_files(case: str, file: Callable[[object], Path]) -> None:
    content, parts = MODELS[case]
    path = file(content)
    refused(estimate(path), str(path), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("llama-3-9b", ["model = llama-3-9b", "presets: ", "config.json", "(nearest: llama-3-8b)"]),
        ("", ["model = ''", "presets: "]),
        ("./nothing.json", ["nothing.json: there is no such file"]),
        ("x" * 300, ["is neither a preset nor a file"]),
        (f"{'x' * 300}/config.json", ["cannot be read: File name too long"]),
    ],
)
def test_model_names(text: str, parts: list[str]) -> None:
    refused(estimate(text), *parts)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("package.module:Model", "no module package"),
        ("evil.py", "a Python file is not a model; name the function in it"),
        ("missing.pt2", "there is no such file"),
        ("missing.onnx", "there is no such file"),
        ("broken.pt2", "broken.pt2"),
        ("broken.onnx", "broken.onnx"),
    ],
)
def test_models_that_cannot_be_traced(text: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("open('executed', 'w')\nmain = None\n")
    for name in ("broken.pt2", "broken.onnx"):
        (tmp_path / name).write_bytes(b"PK")
    monkeypatch.chdir(tmp_path)
    outcome = estimate(text)
    refused(outcome, rule)
    assert outcome.err.count("error: ") == 1
    assert not (tmp_path / "executed").exists()


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_nothing_is_executed_while_loading(tmp_path: Path, file: Callable[[object], Path]) -> None:
    executed = tmp_path / "executed"
    bomb = Bomb(executed)
    pickle.loads(pickle.dumps(bomb)).close()
    assert executed.exists()  # the bomb works
    executed.unlink()
    for content in (
        pickle.dumps(bomb),
        pickle.dumps(bomb, protocol=0),
        f"!!python/object/apply:open ['{executed}', 'w']",
        f"__import__('builtins').open('{executed}', 'w')",
        {"schema": f"!!python/object/apply:open ['{executed}', 'w']"},
    ):
        path = file(content)
        for words in ((path,), (MODEL, path), (MODEL, CLUSTER, path)):
            refused(estimate(*words), str(path))
        refused(meshwright("run", path, "dp=2", *WORKLOAD))
    assert not executed.exists()


# --- clusters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dgx-h10x8", ["cluster = dgx-h10x8", "known: ", "(nearest: dgx-h100x8)"]),
        ("dgx-h100", ["how many nodes?", "(nearest: dgx-h100x1)"]),
        ("dgx-h100x0", ["the number of nodes must be 1 or more", "(nearest: dgx-h100x1)"]),
        ("dgx-h100x-3", ["the number of nodes must be 1 or more", "(nearest: dgx-h100x1)"]),
        ("dgx-h100x1.5", ["'1.5' is no whole number of nodes"]),
        ("dgx-h100x99999999", ["more than 10,000,000 devices", "(nearest: dgx-h100x1250000)"]),
        (f"dgx-h100x{'9' * 5000}", ["more than 10,000,000 devices"]),
        ("", ["'' is no preset"]),
        ("x" * 300, ["is no preset"]),
        ("./nothing.json", ["nothing.json: there is no such file"]),
    ],
)
def test_cluster_names(text: str, parts: list[str]) -> None:
    refused(estimate(MODEL, text), *parts)


def changed(data: Any, path: str, value: object) -> Any:
    """A copy with the value at a dotted path replaced, or removed where `value` is `...`."""
    copy = json.loads(json.dumps(data))
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place = copy
    for step in steps:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


CLUSTER_FILE = json.loads(native.dumps(preset_cluster("local-cpux8")))
PEAK = "groups.0.device.peak_flops.float32"

CLUSTERS: dict[str, tuple[object, list[str]]] = {
    "truncated": (json.dumps(CLUSTER_FILE)[:-20], ["seems to be cut off"]),
    "no schema": (changed(CLUSTER_FILE, "schema", ...), ["schema: missing; a cluster file has 'cluster/1' here"]),
    "wrong schema": (changed(CLUSTER_FILE, "schema", "plan/1"), ["this is a plan file; a cluster is expected"]),
    "newer": (changed(CLUSTER_FILE, "schema", "cluster/99"), ["written by a newer Meshwright"]),
    "a string": (changed(CLUSTER_FILE, "groups.0.count", "8"), ["groups[0].count = '8': an integer is expected"]),
    "an unknown key": (changed(CLUSTER_FILE, "level", []), ["level = []: unknown key", "(nearest: levels)"]),
    "a missing key": (changed(CLUSTER_FILE, "groups", ...), ["groups: missing"]),
    "no devices": (changed(CLUSTER_FILE, "groups.0.count", 0), ["groups[0].count = 0: must be 1 or more"]),
    "too many devices": (changed(CLUSTER_FILE, "groups.0.count", 10**15), ["more than 10,000,000 devices"]),
    "a negative bandwidth": (
        changed(CLUSTER_FILE, "levels.0.bandwidth_Bps.value", -1.0),
        ["levels[0].bandwidth_Bps = -1.0: must be positive and finite"],
    ),
    "a tiny bandwidth": (
        changed(CLUSTER_FILE, "levels.0.bandwidth_Bps.value", 1e-300),
        ["levels[0].bandwidth_Bps = 1e-300: must lie between 1e-30 and 1e+30"],
    ),
    "an unknown type": (
        changed(changed(CLUSTER_FILE, PEAK, ...), "groups.0.device.peak_flops.float31", {"value": 1, "source": "x"}),
        ["float31: known dtypes: ", "(nearest: float32)"],
    ),
    "an unknown kind": (
        changed(CLUSTER_FILE, "levels.0.kind", "swich"),
        ["levels[0].kind = 'swich'", "'switch'", "(nearest: 'switch')"],
    ),
    "two faults": (
        changed(changed(CLUSTER_FILE, "levels.0.latency_s.value", -1.0), "groups.0.count", 7),
        ["levels[0].latency_s = -1.0: must be finite and not negative", "the last level joins all 7 devices"],
    ),
}


@pytest.mark.parametrize("case", CLUSTERS)
def test_cluster_files(case: str, file: Callable[[object], Path]) -> None:
    content, parts = CLUSTERS[case]
    path = file(content)
    refused(estimate(MODEL, path), str(path), *parts)


# --- strategies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tp=2,pp=2", ["tp*pp = 4: must be the cluster's 8 devices (nearest: dp=2)"]),
        ("tp=3", ["tp = 3: must be the cluster's 8 devices", "must divide the 4 heads"]),
        ("tp=2,pp=2,dp=2,tq=2", ["tq = 2: not a key; keys: tp, pp, dp", "(nearest: tp)"]),
        ("tp=2,tp=4", ["tp = 4: given twice (before: 2)"]),
        ("", ["strategy = '': each part is key=value"]),
        ("tp==2", ["strategy = 'tp==2': each part is key=value"]),
        ("tp=1e3", ["tp = 1e3: a whole number, at least 1"]),
        ("tp=-8", ["tp = -8: a whole number, at least 1"]),
        ("tp=0", ["tp = 0: a whole number, at least 1 (nearest: tp=1)"]),
        ("tp=2.0", ["tp = 2.0: a whole number"]),
        ("tp=٢", ["tp = ٢: a whole number"]),
        ("dp=8,mbs=3", ["mbs = 3: must divide the 2 sequences of a rank", "(nearest: mbs=2)"]),
        ("pp=8", ["pp*vpp = 8: at most 6 stages: 4 layers", "(nearest: 6)"]),
        ("pp=999999999", ["pp*vpp = 999999999: at most 6 stages"]),
        ("dp=8,zero=9", ["zero = 9: a whole number from 0 to 3 (nearest: zero=3)"]),
        ("dp=8,recompute=some", ["recompute = some: known: none, selective, full"]),
        ("pp=2,dp=4,schedule=1f1b", ["schedule = 1f1b: known: GPipe, 1F1B", "(nearest: schedule=1F1B)"]),
        ("pp=2,dp=4,schedule=Interleved1F1B", ["(nearest: schedule=Interleaved1F1B)"]),
        ("dp=8,dp_shard=2", ["dp_shard = 2: shards nothing with zero=0 (nearest: zero=1)"]),
        ("dp=8,zero=1,dp_shard=3", ["dp_shard = 3: must divide dp=8", "(nearest: dp_shard=2)"]),
        ("dp=8,ep=2", ["ep = 2: llama-tiny has no experts (nearest: ep=1)"]),
        ("pp=2,dp=4,vpp=2", ["vpp = 2: 1F1B has one stage per rank"]),
        ("mbs=1000000000,dp=1000000000", ["must be the cluster's 8 devices", "must divide the global batch of 16"]),
        ("tp=3,zero=9,x=1", ["zero = 9", "x = 1: not a key"]),
        ("tp=2," * 100, ["given twice"]),
        ("./nothing.json", ["nothing.json: there is no such file"]),
    ],
)
def test_shorthands(text: str, parts: list[str]) -> None:
    refused(estimate(MODEL, CLUSTER, text), *parts)


def strategy_content() -> Any:
    found = read_strategy(STRATEGY, load_model(MODEL), 8, make_workload(16, 64, "bfloat16"))
    return json.loads(native.dumps(found.strategy))


STRATEGY_FILE = strategy_content()

STRATEGIES: dict[str, tuple[object, list[str]]] = {
    "truncated": (json.dumps(STRATEGY_FILE)[:500], ["seems to be cut off"]),
    "wrong schema": (changed(STRATEGY_FILE, "schema", "cluster/1"), ["this is a cluster file; a strategy is expected"]),
    "a broken plan": ({"schema": "plan/1", "strategy": STRATEGY_FILE}, ["model: missing", "strategy.schema"]),
    "an unknown axis": (
        changed(STRATEGY_FILE, "mesh.2.name", "tpp"),
        ["mesh = tpp: no such axis; known: pp, dp_replicate", "(nearest: tp)"],
    ),
    "an axis that the mesh lacks": (
        changed(STRATEGY_FILE, "splits.layer.gate", {"tpp": "ffn"}),
        ["splits.layer.gate = tpp: no such mesh axis; axes: pp, dp_shard, tp (nearest: tp)"],
    ),
    "an unknown dim": (
        changed(STRATEGY_FILE, "splits.layer.gate", {"tp": "fnn"}),
        ["splits.layer.gate = tp: fnn: dims that may be split: batch, seq, hidden, ffn"],
    ),
    "a block on no stage": (
        changed(STRATEGY_FILE, "stages.0.blocks.0.stop", 2),
        ["stages = blocks [2]: every block is on exactly one stage"],
    ),
    "a huge mesh": (
        changed(STRATEGY_FILE, "mesh.0.size", 10**18),
        ["mesh = pp=1000000000000000000", "must be the cluster's 8 devices", "same number of stages"],
    ),
    "a huge microbatch": (
        changed(changed(STRATEGY_FILE, "microbatch", 10**18 + 9), "splits.layer.gate.tp", "batch"),
        ["mbs = 1000000000000000009: must divide"],
    ),
    "no microbatch": (changed(STRATEGY_FILE, "microbatch", 0), ["microbatch = 0: must be at least 1"]),
    "an unknown schedule": (changed(STRATEGY_FILE, "schedule", "1F1C"), ["schedule = 1F1C: known: "]),
    "two faults": (
        changed(changed(STRATEGY_FILE, "stages.0.blocks.0.stop", 2), "splits.layer.gate", {"tp": "fnn"}),
        ["stages = blocks [2]", "splits.layer.gate = tp: fnn"],
    ),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_strategy_files(case: str, file: Callable[[object], Path]) -> None:
    content, parts = STRATEGIES[case]
    refused(estimate(MODEL, CLUSTER, file(content)), *parts)


def test_a_plan_for_another_model(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert meshwright("plan", "gpt2-tiny", CLUSTER, *WORKLOAD, "--out", out).code == 0
    refused(estimate(MODEL, CLUSTER, out), "splits.", "no such operator in the block")
    refused(estimate("gpt2-tiny", "local-cpux4", out), "must be the cluster's 4 devices")


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "estimate", "explain"])
@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--global-batch", "0", ["--global-batch = 0: must be at least 1"]),
        ("--global-batch", "-8", ["--global-batch = -8: must be at least 1"]),
        ("--global-batch", "many", ["--global-batch", "'many' is no whole number"]),
        ("--global-batch", "1e3", ["--global-batch", "'1e3' is no whole number"]),
        ("--global-batch", "9" * 25, ["--global-batch = 9999999999999999999999999: must be at most 10^9"]),
        ("--global-batch", "9" * 5000, ["--global-batch", "is no whole number"]),
        ("--seq-len", "0", ["--seq-len = 0: must be at least 1"]),
        ("--seq-len", "64.0", ["--seq-len", "'64.0' is no whole number"]),
        ("--seq-len", str(10**9), ["--global-batch x --seq-len = 16 x 1000000000 tokens", "layer/attention"]),
        ("--engine", "megatron", ["--engine = megatron: known engines: ", "(nearest: megatron-"]),
        ("--precision", "bfloat17", ["--precision = bfloat17: known: bfloat16", "(nearest: bfloat16)"]),
    ],
)
def test_numbers_and_choices(command: str, option: str, value: str, parts: list[str]) -> None:
    strategy = () if command == "plan" else (STRATEGY,)
    refused(meshwright(command, MODEL, CLUSTER, *strategy, *WORKLOAD, option, value), *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--method", "exhausting"), ["--method = exhausting: known: exhaustive", "(nearest: exhaustive)"]),
        (("--space", "uniformed"), ["--space = uniformed: known: uniform", "(nearest: uniform)"]),
        (("--objective", "time"), ["--objective = time: known: step_time, memory, pareto", "(nearest: step_time)"]),
        (("--fix", "tq=2"), ["--fix tq = 2: not a key; keys: tp", "(nearest: tp)"]),
        (("--max", "dp_shard=2"), ["--max = dp_shard=2: the uniform space varies"]),
        (("--max", "schedule=GPipe"), ["schedules have no order", "(nearest: --fix schedule=GPipe)"]),
        (("--fix", "tp"), ["--fix strategy = 'tp': each part is key=value"]),
        (("--top", "0"), ["'--top'", "greater than or equal to 1"]),
        (("--json", "--out", "-"), ["--out = -: --json prints one object"]),
        (("--nonsense",), ["--nonsense"]),
        (("--mesh", "2x4"), ["--mesh = 2x4: is for methods that place operators", "(nearest: --method operators)"]),
        (("--time-limit", "0"), ["--time-limit = 0.0: is for methods that place operators"]),
        (
            ("--cuts", 1, "--annotate", "a:x=b", "--recompute", "--microbatches", 2, "--figure", "f.html"),
            ["--cuts = 1:", "--annotate = a:x=b:", "--recompute: is for", "--microbatches = 2:", "--figure = f.html:"],
        ),
    ],
)
def test_options_of_plan(words: tuple[str, ...], parts: list[str]) -> None:
    refused(meshwright("plan", MODEL, CLUSTER, *WORKLOAD, *words), *parts)


def test_a_traced_model_has_no_degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples" / "models")
    outcome = meshwright("plan", "architectures:dlrm", CLUSTER, "--global-batch", 8, "--space", "uniform")
    refused(outcome, "--space = uniform: this method looks at operator graphs", "(nearest: operator)")


def test_stages_with_meshes_of_their_own_are_not_estimated_again(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    words = ("llama-tiny", "dgx-h100x1", "--global-batch", 8, "--seq-len", 128)
    assert meshwright("plan", *words, "--method", "pipedream", "--out", path).code == 0
    assert any(stage["splits"] for stage in json.loads(path.read_text())["strategy"]["stages"])
    for command in ("estimate", "explain", "simulate"):
        refused(
            meshwright(command, *words[:2], path, *words[2:]), "stages[].splits", "estimated where they are planned"
        )
    against = meshwright("explain", *words[:2], "dp=8", *words[2:], "--against", path)
    refused(against, "stages[].splits", "estimated where they are planned")
    refused(meshwright("run", path, "--steps", 1), "stages[].splits", "planned and predicted, not run")


def test_other_choices() -> None:
    refused(
        estimate(MODEL, CLUSTER, STRATEGY, *WORKLOAD, "--evaluator", "magic"), "--evaluator = magic: known: analytic"
    )
    refused(meshwright("schema", "plam"), "plam", "(nearest: plan)")
    against = meshwright("explain", MODEL, CLUSTER, STRATEGY, *WORKLOAD, "--against", "tp=3,dp=2")
    refused(against, "tp*dp = 6: must be the cluster's 8 devices")
    refused(meshwright("plann"), "plann")


def test_a_sequence_longer_than_the_learned_positions() -> None:
    words = ("gpt2", "dgx-h100x1", "--global-batch", 16, "--seq-len", 2048)
    for outcome in (meshwright("plan", *words), meshwright("estimate", *words[:2], "dp=8", *words[2:])):
        refused(outcome, "--seq-len = 2048: gpt2 has 1024 positions (nearest: 1024)")


def test_all_problems_together() -> None:
    outcome = meshwright(
        *("plan", "llama-3-9b", "dgx-h10x8", "--global-batch", 0, "--seq-len", -1, "--precision", "bf17"),
        *(
            "--engine",
            "megatron",
            "--method",
            "m",
            "--space",
            "s",
            "--objective",
            "o",
            "--fix",
            "tq=1",
            "--max",
            "dp_shard=9",
        ),
    )
    refused(outcome, "llama-3-9b", "dgx-h10x8", "--global-batch = 0", "--seq-len = -1", "bf17", "--engine = megatron")
    refused(outcome, "--method = m", "--space = s", "--objective = o", "--fix tq", "--max = dp_shard=9")
    outcome = meshwright(
        *("explain", "llama-3-9b", "dgx-h10x8", "tq=1", "--against", "zero=9", "--global-batch", 0, "--seq-len", 1)
    )
    refused(outcome, "llama-3-9b", "dgx-h10x8", "tq = 1", "zero = 9", "--global-batch = 0")
    assert outcome.err.count("error: ") == 5


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((MODEL,), ["STRATEGY: is needed", "--global-batch: is needed", "--seq-len: is needed"]),
        ((MODEL, "dp=2", "--global-batch", 0, "--seq-len", 8), ["--global-batch = 0: must be at least 1"]),
        ((MODEL, "dp=2", *WORKLOAD, "--dtype", "float31"), ["--dtype = float31: known: ", "(nearest: float32)"]),
        ((MODEL, "dp=2", *WORKLOAD, "--nproc", 3), ["dp = 2: must be the cluster's 3 devices"]),
        (("llama-tyny", "dp=2", *WORKLOAD), ["model = llama-tyny", "(nearest: llama-tiny)"]),
    ],
)
def test_runs(words: tuple[object, ...], parts: list[str]) -> None:
    refused(meshwright("run", *words), *parts)


# --- --out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing/plan.json", ".", "file/plan.json", "x" * 300, "a\0b"])
def test_a_place_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = f"{tmp_path}/{name}"
    refused(meshwright("plan", MODEL, CLUSTER, *WORKLOAD, "--json", "--out", out), "cannot be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_old_file_is_not_half_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "plan.json"
    out.write_text("old")
    monkeypatch.setattr("os.fsync", full)
    outcome = meshwright("plan", MODEL, CLUSTER, *WORKLOAD, "--json", "--out", out)
    refused(outcome, f"{out}: cannot be written: No space left on device")
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_wrong_question_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    out.write_text("old")
    refused(meshwright("plan", MODEL, "local-cpux0", *WORKLOAD, "--out", out))
    assert out.read_text() == "old"


# --- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("gradient_dtype", "float31", "gradient_dtype = float31: known: compute, float64, float32"),
        ("traffic_factor", -1.0, "traffic_factor = -1.0: must be from 0 to 1e+30"),
        ("exposed.tp", 1.5, "exposed.tp = 1.5: must be from 0 to 1"),
        ("fused_kinds", "norm", "fused_kinds = 'norm': a list is expected"),
    ],
)
def test_engine_files(path: str, value: object, part: str, file: Callable[[object], Path]) -> None:
    from meshwright.engine import engine_names, engine_problems, load_engine

    assert not [problem for name in engine_names() for problem in engine_problems(load_engine(name))]
    good = json.loads(native.dumps(load_engine("megatron-core")))
    words = (MODEL, "dgx-h100x1", STRATEGY, *WORKLOAD, "--engine")
    assert estimate(*words, file(good)).code == 0
    refused(estimate(*words, file(changed(good, path, value))), part)


# --- two thousand malformed files and shorthands -------------------------------------------------------------------


def many(examples: int) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**40, 2**63, -(2**63), 10**9, 10**15, 10**18, 10**30, 1e-300, 1e300, -0.0, 0.5, 1e400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["tp", "pp", "batch", "ffn", "none", "full", "GPipe", "float32", "llama", "gpt2", "../x", "\ud800"]
    ),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys or indices."""
    if isinstance(data, dict | list):
        for key in list(data) if isinstance(data, dict) else range(len(data)):
            yield data, key
            yield from places(data[key])


def mutated(good: Any, junk: list[Any], rng: random.Random) -> bytes:
    """A copy of `good` with some values replaced, removed or doubled, cut or with some bytes changed."""
    data = json.loads(json.dumps(good))
    for value in junk:
        found = list(places(data))
        if not found:
            break
        place, key = rng.choice(found)
        action = rng.choice(["replace", "replace", "replace", "remove", "rename", "copy"])
        if action == "replace":
            place[key] = value
        elif action == "remove":
            del place[key]
        elif isinstance(place, list):
            place.append(place[key])
        elif action == "rename":
            place[rng.choice([str(value), f"{key}s", key[1:]])] = place.pop(key)
        else:
            other_place, other_key = rng.choice(found)
            other_place[other_key] = json.loads(json.dumps(place[key]))
    content = bytearray(json.dumps(data).encode())
    spoil = rng.random()
    if spoil < 0.1:
        del content[rng.randrange(len(content)) :]
    elif spoil < 0.2:
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


MUTATION = (st.lists(JUNK, max_size=4), st.randoms(use_true_random=False))
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 64,
    "n_inner": 256,
    "activation_function": "gelu_new",
}
GEMMA = {
    **CONFIG,
    "model_type": "gemma3_text",
    "head_dim": 32,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}},
}
MIXTRAL = {**CONFIG, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "rope_scaling": None}


def accepted_or_refused(read: Callable[[], Any]) -> Any:
    """What `read` gives, None where it refuses; any other exception fails the test."""
    try:
        return read()
    except InputError as error:
        problems = error.problems
    assert problems
    assert all(str(problem).strip() for problem in problems)
    return None


def use(graph: Graph, devices: int = 8, text: str = "dp=8,zero=3") -> None:
    """Ask for the numbers of what was accepted, and whether a strategy is legal for it."""
    assert graph.num_parameters > 0
    accepted_or_refused(lambda: read_strategy(text, graph, devices, make_workload(16, 64, "bf16")))


@many(700)
@given(good=st.sampled_from([CONFIG, GPT2, GEMMA, MIXTRAL]), junk=MUTATION[0], rng=MUTATION[1])
def test_any_config(tmp_path_factory: pytest.TempPathFactory, good: Any, junk: list[Any], rng: random.Random) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(mutated(good, junk, rng))
    graph = accepted_or_refused(lambda: load_model(str(path)))
    if graph:
        use(graph)


@many(300)
@given(good=st.sampled_from([CLUSTER_FILE]), junk=MUTATION[0], rng=MUTATION[1])
def test_any_cluster_file(
    tmp_path_factory: pytest.TempPathFactory, good: Any, junk: list[Any], rng: random.Random
) -> None:
    path = tmp_path_factory.getbasetemp() / "cluster.json"
    path.write_bytes(mutated(good, junk, rng))
    cluster = accepted_or_refused(lambda: read_cluster(str(path)))
    if cluster:
        assert cluster.hierarchy()
        accepted_or_refused(
            lambda: read_strategy(f"dp={cluster.num_devices}", load_model(MODEL), 8, make_workload(16, 64, "bf16"))
        )


@many(300)
@given(junk=MUTATION[0], rng=MUTATION[1])
def test_any_strategy_file(tmp_path_factory: pytest.TempPathFactory, junk: list[Any], rng: random.Random) -> None:
    path = tmp_path_factory.getbasetemp() / "strategy.json"
    path.write_bytes(mutated(STRATEGY_FILE, junk, rng))
    workload = make_workload(16, 64, "bf16")
    accepted_or_refused(lambda: read_strategy(str(path), load_model(MODEL), 8, workload))


WORDS = st.sampled_from(
    ["tp", "pp", "dp", "cp", "ep", "mbs", "vpp", "schedule", "zero", "recompute", "sp", "dp_shard", "", "tq", "TP"]
)
VALUES = st.one_of(
    st.sampled_from(["1", "2", "4", "8", "0", "3", "16", "-1", "1e3", "999999999", "1000000000", "9" * 12, "9" * 400]),
    st.sampled_from(
        ["1F1B", "GPipe", "Interleaved1F1B", "none", "full", "selective", "", "=", "１", "2 ", "0x2", "None"]
    ),
)
PAIRS = st.builds("{}={}".format, WORDS, VALUES)
LETTERS = st.text(alphabet=f"{string.ascii_lowercase}{string.digits},=_-. \n\0é", max_size=40)
TEXTS = st.one_of(st.lists(PAIRS, max_size=9).map(",".join), st.lists(st.one_of(PAIRS, LETTERS)).map(",".join), LETTERS)


@many(700)
@given(text=TEXTS)
def test_any_shorthand(text: str) -> None:
    given_ = accepted_or_refused(lambda: parse_strategy(text))
    if given_:
        assert isinstance(given_, Shorthand)
        workload = make_workload(16, 64, "bf16")
        for devices in (8, given_.num_devices):
            accepted_or_refused(lambda devices=devices: named_strategy(given_, load_model(MODEL), devices, workload))
