"""What the words of the command line mean: a cluster, an engine, a strategy or a plan, by preset name or by file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from meshwright.cluster import Cluster, preset_cluster
from meshwright.engine import Engine, load_engine
from meshwright.errors import InputError, Problem
from meshwright.graph import Block, Graph, Operator, operator_flops
from meshwright.schedule import Table, checked, compute_parts, read_table
from meshwright.strategy import (
    CUSTOM,
    Shorthand,
    Strategy,
    legal_strategy,
    parse_shorthand,
    position_problems,
    shorthand_of,
    strategy_problems,
    with_folded_experts,
)
from meshwright.workload import Workload, parse_precision, workload_problems


def looks_like_file(text: str) -> bool:
    """Whether a word is meant as a file: by its ending, a folder in it, or because it is there.

    >>> looks_like_file("plan.json"), looks_like_file("tp=2,pp=4")
    (True, False)
    """
    if "\0" in text or len(text) > 4096:
        return False
    return text == "-" or text.endswith(".json") or "/" in text or os.path.isfile(text)


def read_cluster(text: str) -> Cluster:
    """A preset such as `dgx-h100x8`, or a cluster file."""
    if looks_like_file(text):
        from meshwright.io import native

        cluster: Cluster = native.read(text, "cluster")
        return cluster
    return preset_cluster(text)


def read_engine(text: str | None, cluster: Cluster) -> Engine:
    """An engine by name or file; where none is named, ours for processes of this machine, else Megatron-Core."""
    if text is None:
        return load_engine("meshwright" if cluster.name.startswith("local-cpu") else "megatron-core")
    if looks_like_file(text):
        from meshwright.io import native

        engine: Engine = native.read(text, "engine")
        return engine
    return load_engine(text)


_OPTIONS = {"global_batch": "--global-batch", "seq_len": "--seq-len"}

#: Costs are 64-bit integers in places; what one operator does may not reach their end.
MAX_OPERATOR_WORK = 2**62


def make_workload(global_batch: int, seq_len: int, precision: str, precision_option: str = "--precision") -> Workload:
    """A checked workload; all problems at once, by the names of the options."""
    problems: list[Problem] = []
    try:
        name, products = parse_precision(precision)
    except InputError as error:
        problems += [replace(found, where=precision_option) for found in error.problems]
        name, products = "bfloat16", ""
    workload = Workload(global_batch, seq_len, name, product_precision=products)
    problems += [_by_option(found) for found in workload_problems(workload)]
    if problems:
        raise InputError(problems)
    return workload


def _by_option(problem: Problem) -> Problem:
    return replace(problem, where=_OPTIONS.get(problem.where, problem.where))


def check_model_takes(graph: Graph, workload: Workload) -> None:
    """Raise `InputError` where the model ends before the sequence does, or numbers leave 64-bit integers."""
    problems = [_by_option(found) for found in position_problems(graph, workload)]
    sizes = graph.sizes(workload.global_batch, workload.seq_len)
    work = {f"{block.name}/{op.name}": _work(block, op, sizes) for block in graph.blocks for op in block.operators}
    most = max(work, key=work.__getitem__)
    if work[most] > MAX_OPERATOR_WORK:
        value = f"{workload.global_batch} x {workload.seq_len} tokens"
        rule = (
            f"operator {most} of {graph.name} takes {work[most]:.1e} FLOPs or bytes; more than {MAX_OPERATOR_WORK:.1e}"
        )
        problems.append(Problem("--global-batch x --seq-len", value, rule))
    if problems:
        raise InputError(problems)


def check_sequence(graph: Graph, seq_len: int | None) -> None:
    """Raise `InputError` where a model has a sequence whose length the workload must give, and does not."""
    if seq_len is None and any("seq" in tensor.dims for block in graph.blocks for tensor in block.tensors):
        raise InputError([Problem("--seq-len", "", f"{graph.name} has a sequence: its length in tokens is needed")])


def _work(block: Block, operator: Operator, sizes: Mapping[str, int]) -> int:
    """FLOPs of an operator, or the bytes of its largest operand at 8 an element where that is more."""
    operands = (*operator.inputs, *operator.outputs)
    largest = max(8 * math.prod(sizes[dim] for dim in block.tensor[name].dims) for name in operands)
    return max(largest, int(operator_flops(operator, block.dim_aliases(operator), sizes)))


@dataclass(frozen=True)
class NamedStrategy:
    """A strategy and its shorthand, where it has one."""

    strategy: Strategy
    shorthand: str | None


def read_strategy(text: str, graph: Graph, num_devices: int, workload: Workload) -> NamedStrategy:
    """A legal strategy from a shorthand, a strategy file or a plan file; names every rule that it breaks."""
    return named_strategy(parse_strategy(text), graph, num_devices, workload)


@dataclass(frozen=True)
class TabledShorthand:
    """A shorthand whose schedule is a table of one's own, read from a file."""

    shorthand: Shorthand
    table: Table
    file: str

    @property
    def num_devices(self) -> int:
        """Devices that the degrees ask for."""
        return self.shorthand.num_devices


Given = Shorthand | Strategy | TabledShorthand


def parse_strategy(text: str) -> Given:
    """What a shorthand, a strategy file or a plan file says, legal or not; in a shorthand the schedule may be a table
    (`schedule=FILE.csv`, PyTorch's format)."""
    parts = text.split(",")
    tables = [part.partition("=")[2].strip() for part in parts if is_schedule_file(part)]
    if len(tables) == 1:
        table = read_schedule(tables[0])
        rest = ",".join(part for part in parts if not is_schedule_file(part))
        shorthand = parse_shorthand(rest or "tp=1")
        return TabledShorthand(shorthand, table, tables[0])
    return read_strategy_file(text) if looks_like_file(text) else parse_shorthand(text)


def is_schedule_file(part: str) -> bool:
    """Whether a part of a shorthand, or the name of a schedule, means a file.

    >>> is_schedule_file("schedule=mine.csv"), is_schedule_file("mine.csv"), is_schedule_file("schedule=1F1B")
    (True, True, False)
    """
    key, equals, value = part.strip().rpartition("=")
    return value.endswith(".csv") and (not equals or key.strip() == "schedule")


def read_schedule(path: str) -> Table:
    """The compute actions of a table in a file (PyTorch's CSV; - is stdin), checked: messages are ours to derive."""
    from meshwright.io import native

    where = "stdin" if path == "-" else path
    try:
        text = native.content_of(path).decode()
    except UnicodeDecodeError:
        raise InputError([Problem(where, "", "is no text; a table of actions in PyTorch's CSV is expected")]) from None
    table = checked(read_table(text, where), file=where)
    return tuple(tuple(action for action in row if compute_parts(action)) for row in table)


def named_strategy(
    given: Given, graph: Graph, num_devices: int, workload: Workload, *, folds_experts: bool = False
) -> NamedStrategy:
    """A legal strategy; names every rule that it breaks. `folds_experts`: see `engine.Defaults`."""
    if isinstance(given, TabledShorthand):
        return NamedStrategy(_tabled(given, graph, num_devices, workload), None)
    if isinstance(given, Shorthand):
        given = with_folded_experts(given) if folds_experts else given
        return NamedStrategy(legal_strategy(given, graph, num_devices, workload), str(given))
    problems = strategy_problems(given, graph, num_devices, workload)
    if problems:
        raise InputError(problems)
    found = shorthand_of(given, graph)
    return NamedStrategy(given, str(found) if found else None)


def _tabled(given: TabledShorthand, graph: Graph, num_devices: int, workload: Workload) -> Strategy:
    """The strategy of a shorthand with a table: stages lie where the table runs them."""
    held = [{part.stage for action in row for part in compute_parts(action)} for row in given.table]
    ranks = {stage: rank for rank, stages in enumerate(held) for stage in stages}
    if len(given.table) != given.shorthand.pp:
        rule = f"has {len(given.table)} ranks, and pp={given.shorthand.pp}"
        raise InputError([Problem("schedule", given.file, rule, f"pp={len(given.table)}")])
    if len(ranks) % len(given.table):
        rule = f"has {len(ranks)} stages on {len(given.table)} ranks; every rank has the same number"
        raise InputError([Problem("schedule", given.file, rule)])
    vpp = len(ranks) // len(given.table)
    # LoopedBFS has no rule of its own, so that what is found wrong here is wrong with the rest of the shorthand.
    stand_in = replace(given.shorthand, schedule="LoopedBFS", vpp=vpp)
    strategy = legal_strategy(stand_in, graph, num_devices, workload)
    stages = tuple(replace(stage, pipeline_rank=ranks[index]) for index, stage in enumerate(strategy.stages))
    rows = tuple(",".join(map(str, row)) for row in given.table)
    strategy = replace(strategy, schedule=CUSTOM, stages=stages, table=rows)
    if problems := strategy_problems(strategy, graph, num_devices, workload):
        raise InputError(problems)
    return strategy


def read_strategy_file(text: str) -> Strategy:
    """The strategy of a strategy file or of a plan file."""
    from meshwright.io import native

    data = native.read_json_object(text, "a strategy or plan")
    noun = "plan" if str(data.get("schema", "")).startswith("plan/") else "strategy"
    record: Any = native.from_object(data, noun, "stdin" if text == "-" else text)
    strategy: Strategy = record.strategy if noun == "plan" else record
    return strategy
