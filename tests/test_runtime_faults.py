"""What cannot run is refused with a reason; what dies says who died; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from meshwright.errors import InputError  # noqa: E402
from meshwright.io.models import load_model  # noqa: E402
from meshwright.runtime.data import Data, check_tokens  # noqa: E402
from meshwright.runtime.launch import RunError, run, run_many  # noqa: E402
from meshwright.runtime.ranks import on_ranks  # noqa: E402
from meshwright.runtime.refuse import run_problems  # noqa: E402
from meshwright.strategy import expand, parse_shorthand  # noqa: E402
from meshwright.workload import Workload  # noqa: E402
from runtime_strategies import WORKLOAD, job, model  # noqa: E402


def refusal(name: str, shorthand: str, workload: Workload = WORKLOAD) -> str:
    graph = load_model(name)
    found = run_problems(graph, expand(parse_shorthand(shorthand), graph), workload)
    return "\n".join(str(problem) for problem in found)


# --- refused --------------------------------------------------------------------------------------------------------


def test_operators_without_a_kernel_are_refused() -> None:
    assert "model: layer.top_k = top_k: operators that can be run: einsum, bias" in refusal("mixtral-8x7b", "dp=1")


def test_types_without_cpu_support_are_refused() -> None:
    text = refusal("llama-tiny", "dp=1", replace(WORKLOAD, precision="float16"))
    assert text == "precision = float16: runs on CPU: float64, float32, bfloat16 (nearest: bfloat16)"


def test_too_many_processes_are_refused() -> None:
    text = refusal("llama-tiny", "dp=128", Workload(128, 16, "float32"))
    assert text == "devices = 128: at most 64 processes run on one machine (nearest: 64)"


def test_illegal_strategies_are_refused_as_everywhere() -> None:
    assert "must divide the 4 heads" in refusal("llama-tiny", "tp=3")


def test_steps_and_tokens_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--steps = 0: must be at least 1"):
        run_many([job("llama-tiny", "dp=1", steps=0)])
    with pytest.raises(InputError, match="no such file"):
        run_many([replace(job("llama-tiny", "dp=1"), tokens=str(tmp_path / "none.npy"))])


# --- token files ----------------------------------------------------------------------------------------------------


def test_tokens_of_a_file_are_read_in_order(tmp_path: Path) -> None:
    workload = Workload(global_batch=2, seq_len=3)
    np.save(tmp_path / "a.npy", np.arange(20))
    np.arange(20, dtype=np.uint32).tofile(tmp_path / "a.uint32")
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "a.bin")
    for name in ("a.npy", "a.uint32", "a.bin"):
        check_tokens(str(tmp_path / name), 20, workload, steps=3)
        inputs = Data(workload, 20, seed=0, path=str(tmp_path / name)).inputs(1)
        assert inputs["tokens"].tolist() == [[6, 7, 8], [9, 10, 11]]
        assert inputs["labels"].tolist() == [[7, 8, 9], [10, 11, 12]]


def test_synthetic_tokens_depend_on_seed_and_step_alone() -> None:
    data = Data(WORKLOAD, 61, seed=5)
    assert torch.equal(data.inputs(2)["tokens"], Data(WORKLOAD, 61, seed=5).inputs(2)["tokens"])
    assert not torch.equal(data.inputs(2)["tokens"], data.inputs(1)["tokens"])
    assert torch.equal(data.inputs(0)["tokens"][:, 1:], data.inputs(0)["labels"][:, :-1])


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.npy", np.arange(10), "3 steps of 6 tokens need 19 (nearest: --steps 1)"),
        ("a.npy", np.full(30, 99), "must be from 0 to 19, the vocabulary"),
        ("a.npy", np.full(30, -1), "must be from 0 to 19, the vocabulary"),
        ("a.npy", np.ones(30), "must be one row of whole numbers, not float64"),
        ("a.npy", np.array([{}]), "is not an array of numbers"),
        ("a.bin", b"abc", "must be whole numbers of 2 bytes, not 3 bytes"),
        ("a.txt", b"1 2 3", "the suffix says what is in it: .npy, .bin, .uint16, .uint32"),
    ],
)
def test_wrong_token_files_are_refused(tmp_path: Path, name: str, content: object, rule: str) -> None:
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError) as error:
        check_tokens(str(path), 20, Workload(2, 3), steps=3)
    assert rule in str(error.value)


# --- faults ---------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended while we looked
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def wait_for_ranks(parent: int, count: int, alive: threading.Thread | None = None) -> list[int]:
    """The ranks of the one worker below `parent`, once all have joined their process group for sure."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and (alive is None or alive.is_alive()):
        ranks = [rank for worker in children(parent) for rank in children(worker)]
        if len(ranks) == count:
            time.sleep(1.0)
            return ranks
        time.sleep(0.05)
    raise AssertionError("the run did not start")


@pytest.fixture
def long_run() -> Iterator[tuple[threading.Thread, list[BaseException]]]:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            graph = model("llama-tiny")
            run(graph, expand(parse_shorthand("dp=2"), graph), WORKLOAD, steps=10_000, timeout_s=4)
        except RunError as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield thread, errors
    thread.join(30)


def test_a_killed_rank_ends_the_run_and_is_named(long_run: tuple[threading.Thread, list[BaseException]]) -> None:
    thread, errors = long_run
    ranks = wait_for_ranks(os.getpid(), 2, thread)
    os.kill(ranks[1], signal.SIGKILL)
    thread.join(30)
    assert [str(error) for error in errors] == ["rank 1 of 2 died: ended by signal SIGKILL"]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_hung_rank_ends_the_run_at_the_timeout(long_run: tuple[threading.Thread, list[BaseException]]) -> None:
    thread, errors = long_run
    ranks = wait_for_ranks(os.getpid(), 2, thread)
    os.kill(ranks[0], signal.SIGSTOP)
    thread.join(30)
    assert len(errors) == 1
    assert str(errors[0]).startswith("rank 1 of 2 died: ")
    assert "imed out" in str(errors[0])
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def fail_on_one(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("no such thing")
    torch.distributed.barrier()


def test_an_error_on_a_rank_is_told_in_its_words() -> None:
    with pytest.raises(RunError) as error:
        on_ranks(3, fail_on_one)
    assert str(error.value) == "rank 1 of 3 died: ValueError: no such thing"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_whoever_started_it(how: signal.Signals, tmp_path: Path) -> None:
    code = (
        "from runtime_strategies import job; from meshwright.runtime.launch import run_many;"
        "from dataclasses import replace; run_many([replace(job('llama-tiny', 'dp=2', steps=10_000), check=False)])"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path)}  # who is killed leaves its folder behind
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as starter:
        ranks = wait_for_ranks(starter.pid, 2)
        starter.send_signal(how)
        _, said = starter.communicate(timeout=30)
    assert starter.returncode != 0
    assert b"KeyboardInterrupt" in said or how is signal.SIGKILL
    deadline_s = time.monotonic() + 10
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
