"""The README's commands are run, in its order, and its table of accuracy is what `estimate` says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from helpers import meshwright

README = (Path(__file__).parent.parent / "README.md").read_text()

MEGATRON = {
    "22B": ("megatron-22b", "tp=8,mbs=4", 4),
    "175B": ("gpt3-175b", "tp=8,pp=8,vpp=3,schedule=Interleaved1F1B", 64),
    "530B": ("mt-nlg-530b", "tp=8,pp=35,vpp=3,schedule=Interleaved1F1B", 280),
    "1T": ("megatron-1t", "tp=8,pp=64", 512),
}


def test_first_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert block
    lines = [line for line in block[1].splitlines() if line]
    assert len(lines) == 5
    for line in lines:
        command, *words = shlex.split(line)
        assert command == "meshwright"
        outcome = meshwright(*words)
        assert outcome.code == 0, (line, outcome.err)
        assert outcome.out.strip()


def test_number_of_strategies_in_the_picture() -> None:
    said = re.search(r"([\d,]+) of them in the picture", README)
    assert said
    outcome = meshwright(
        "plan", "llama-3-70b", "dgx-h100x8", "--global-batch", "256", "--seq-len", "8192", "--top", "1", "--json"
    )
    assert outcome.json["space"]["num_strategies"] == int(said[1].replace(",", ""))


@pytest.mark.parametrize("size", MEGATRON)
def test_accuracy_table(size: str) -> None:
    row = re.search(rf"^\| {size} \| (\d+) \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE)
    assert row
    model, shorthand, batch = MEGATRON[size]
    for cell, extra in ((row[2], "recompute=full"), (row[3], "sp=1,recompute=selective")):
        words = re.findall(r"([\d.]+) s", cell)
        outcome = meshwright(
            "estimate", model, f"dgx-a100x{int(row[1]) // 8}", f"{shorthand},{extra}", "--global-batch", str(batch),
            "--seq-len", "2048", "--engine", "megatron-lm", "--precision", "float16", "--json",
        )  # fmt: skip
        assert f"{outcome.json['step_time_s']:.2f}" == words[1], (size, extra)


def test_errors_on_published_runs() -> None:
    runs = Path(__file__).parent.parent / "data/measured_runs.csv"
    found = meshwright("validate", runs, "--json").json
    text = README.replace("\n", " ")
    errors = [f"{group['median_ape_pct']:.1f}, {group['mape_pct']:.1f}" for group in found["groups"]]
    assert len(errors) == 13
    for pair in errors:
        assert pair in text
    infeasible = sum(not row["feasible"] for row in found["rows"])
    assert f"({infeasible} of the {len(found['rows']):,} that ran" in text
