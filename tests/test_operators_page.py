"""The commands of `docs/operators.md` are run, in its order."""

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
