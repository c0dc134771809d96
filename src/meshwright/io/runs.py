"""What `meshwright run` is asked to do: a plan file, or a model with a strategy and a workload, made consistent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem
from meshwright.graph import Graph
from meshwright.io import native
from meshwright.io.inputs import NamedStrategy, looks_like_file, make_workload, named_strategy, parse_strategy
from meshwright.io.models import is_traced, load_model, load_traced
from meshwright.io.traced import Traced
from meshwright.plan import Plan
from meshwright.strategy import strategy_problems
from meshwright.workload import Workload

#: The type in which traced models are run: they are run to be held against one device.
TRACED_DTYPE = "float64"


@dataclass(frozen=True)
class RunRequest:
    """The words and numbers of the command; None, for processes 0, and empty where not given."""

    plan_or_model: str
    strategy: str
    nproc: int
    global_batch: int | None
    seq_len: int | None
    dtype: str


@dataclass(frozen=True)
class RunInputs:
    """What is run: the graph, its program where it was traced, a legal strategy, the workload."""

    graph: Graph
    traced: Traced | None
    named: NamedStrategy
    workload: Workload


def read_run(request: RunRequest) -> RunInputs:
    """What a run is asked to run; every fault is named."""
    plan = _read_plan(request.plan_or_model)
    return _from_plan(request, plan) if plan else _from_model(request)


def _read_model(text: str) -> tuple[Graph, Traced | None]:
    traced = load_traced(text) if is_traced(text) else None
    return (traced.graph if traced else load_model(text)), traced


def _read_plan(text: str) -> Plan | None:
    if not looks_like_file(text) or text == "-":
        return None
    if Path(text).is_dir():
        return None
    data = native.read_json_object(text, "a plan or a Hugging Face config")
    if not str(data.get("schema", "")).startswith("plan/"):
        return None
    record: Any = native.read(text, "plan")
    assert isinstance(record, Plan)
    return record


def _from_plan(request: RunRequest, plan: Plan) -> RunInputs:
    given = plan.workload
    workload = make_workload(
        given.global_batch if request.global_batch is None else request.global_batch,
        given.seq_len if request.seq_len is None else request.seq_len,
        request.dtype or (TRACED_DTYPE if is_traced(plan.model) else given.precision),
        "--dtype",
    )
    graph, traced = _read_model(plan.model)
    if native.fingerprint(graph) != plan.model_hash:
        raise InputError([Problem("model", plan.model, "is not the model that the plan was made for: plan it again")])
    named = NamedStrategy(plan.strategy, plan.shorthand or None)
    if request.strategy:
        raise InputError([Problem("STRATEGY", request.strategy, "a plan file brings its own strategy")])
    _check_processes(request.nproc, named.strategy.num_devices)
    problems = strategy_problems(named.strategy, graph, named.strategy.num_devices, workload)
    if problems:
        raise InputError(problems)
    return RunInputs(graph, traced, named, workload)


def _from_model(request: RunRequest) -> RunInputs:
    missing = [
        Problem(option, "", "is needed where a model is given", example)
        for option, value, example in (
            ("STRATEGY", request.strategy, "dp=2"),
            ("--global-batch", request.global_batch, "--global-batch 8"),
            ("--seq-len", request.seq_len, "--seq-len 64"),
        )
        if value in (None, "") and not (option == "--seq-len" and is_traced(request.plan_or_model))
    ]
    if missing:
        raise InputError(missing)
    assert request.global_batch is not None
    dtype = request.dtype or (TRACED_DTYPE if is_traced(request.plan_or_model) else "float32")
    workload = make_workload(request.global_batch, request.seq_len or 1, dtype, "--dtype")
    graph, traced = _read_model(request.plan_or_model)
    given = parse_strategy(request.strategy)
    named = named_strategy(given, graph, request.nproc or given.num_devices, workload)
    return RunInputs(graph, traced, named, workload)


def _check_processes(nproc: int, num_devices: int) -> None:
    if nproc and nproc != num_devices:
        raise InputError(
            [Problem("--nproc", str(nproc), f"the strategy is for {num_devices} devices", f"{num_devices}")]
        )
