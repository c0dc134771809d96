"""The commands of `docs/operators.md` are run, in its order, and its tables are what the methods say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from helpers import meshwright
from meshwright.cli.placing import PIPELINES, PLACING, graph_methods

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "operators.md").read_text()


def test_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block
    enter, *lines = [line for line in block[1].splitlines() if line]
    assert enter == "cd examples/models"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "models")
    for line in lines:
        command, *words = shlex.split(line)
        assert command == "meshwright"
        outcome = meshwright(*words)
        assert outcome.code == 0, (line, outcome.err)
        assert outcome.out.strip()
    assert (tmp_path / "block.html").read_text().startswith("<!doctype html>")


def test_help_lists_every_method() -> None:
    assert {*PLACING, *PIPELINES} == set(graph_methods())
    shown = "".join(meshwright("plan", "--help").out.replace("│", " ").split())
    for name in graph_methods():
        assert name in shown


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "resnet", "lstm"])
def test_its_table_of_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = re.search(rf"^\| {name} \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) ms \| 0 \|", PAGE, flags=re.MULTILINE)
    assert row
    monkeypatch.syspath_prepend(ROOT / "examples" / "models")
    words = ("plan", f"architectures:{name}", "dgx-h100x1", "--global-batch", 64, "--mesh", "2x4", "--json")
    found = meshwright(*words).json
    assert f"{found['model']['num_parameters']:,}" == row[1]
    assert f"{found['model']['forward_flops']:,}" == row[2]
    assert f"{found['best']['estimate']['step_time_s'] * 1e3:.2f}" == row[3]
    assert found["certificate"]["gap"] == 0


@pytest.mark.parametrize("name", ["operators", "gspmd", "double_recursive", "fsdp"])
def test_its_block_under_methods(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = re.search(rf"^\| `{name}` \| ([\d.]+) ms", PAGE, flags=re.MULTILINE)
    assert row
    monkeypatch.syspath_prepend(ROOT / "examples" / "models")
    annotations = (
        "norm1.rms_norm.out:x=batch",
        "attention.q.linear:x=batch,y=kv_heads",
        "gate.linear:x=batch,y=d28672",
    )
    given = [f"--annotate=model/layers.0.{text}" for text in annotations] if name == "gspmd" else []
    words = ("plan", "architectures:llama70b_block", "dgx-h100x32", "--global-batch", 32, "--method", name, "--json")
    found = meshwright(*words, *given).json
    assert f"{found['best']['estimate']['step_time_s'] * 1e3:.3f}" == row[1]


@pytest.mark.parametrize("name", ["operators", "alpa", "gpipe", "megatron"])
def test_its_whole_model_under_methods(name: str) -> None:
    row = re.search(rf"^\| `{name}`[^|]*\| ([\d.]+) s", PAGE, flags=re.MULTILINE)
    assert row
    work = ("--global-batch", 64, "--seq-len", 8192, "--method", name, "--json")
    found = meshwright("plan", "llama-3-70b", "dgx-h100x32", *work).json
    assert f"{found['best']['estimate']['step_time_s']:.3f}" == row[1]
