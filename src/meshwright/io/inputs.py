"""What the words of the command line mean: a cluster, an engine, a strategy or a plan, by preset name or by file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.cluster import Cluster, preset_cluster
from meshwright.engine import Engine, load_engine
from meshwright.errors import InputError, Problem
from meshwright.graph import Graph
from meshwright.strategy import (
    Strategy,
    legal_strategy,
    parse_shorthand,
    shorthand_of,
    strategy_problems,
)
from meshwright.workload import Workload, parse_precision, workload_problems


def looks_like_file(text: str) -> bool:
    """Whether a word is meant as a file: by its ending, a folder in it, or because it is there.

    >>> looks_like_file("plan.json"), looks_like_file("tp=2,pp=4")
    (True, False)
    """
    if "\0" in text or len(text) > 4096:
        return False
    return text == "-" or text.endswith(".json") or "/" in text or Path(text).is_file()


def read_cluster(text: str) -> Cluster:
    """A preset such as `dgx-h100x8`, or a cluster file."""
    if looks_like_file(text):
        from meshwright.io import native

        cluster: Cluster = native.read(text, "cluster")
        return cluster
    return preset_cluster(text)


def read_engine(text: str | None, cluster: str) -> Engine:
    """An engine by name or file; where none is named, ours for processes of this machine, else Megatron-Core."""
    if text is None:
        return load_engine("meshwright" if cluster.startswith("local-cpu") else "megatron-core")
    if looks_like_file(text):
        from meshwright.io import native

        engine: Engine = native.read(text, "engine")
        return engine
    return load_engine(text)


def make_workload(global_batch: int, seq_len: int, precision: str) -> Workload:
    """A checked workload; all problems at once, by the names of the options."""
    problems: list[Problem] = []
    try:
        name = parse_precision(precision)
    except InputError as error:
        problems += error.problems
        name = "bfloat16"
    workload = Workload(global_batch, seq_len, name)
    options = {"global_batch": "--global-batch", "seq_len": "--seq-len"}
    problems += [
        Problem(options.get(found.where, found.where), found.value, found.rule, found.nearest)
        for found in workload_problems(workload)
    ]
    if problems:
        raise InputError(problems)
    return workload


@dataclass(frozen=True)
class NamedStrategy:
    """A strategy and its shorthand, where it has one."""

    strategy: Strategy
    shorthand: str | None


def read_strategy(text: str, graph: Graph, num_devices: int, workload: Workload) -> NamedStrategy:
    """A legal strategy from a shorthand, a strategy file or a plan file; names every rule that it breaks."""
    if looks_like_file(text):
        strategy = read_strategy_file(text)
        problems = strategy_problems(strategy, graph, num_devices, workload)
        if problems:
            raise InputError(problems)
        found = shorthand_of(strategy, graph)
        return NamedStrategy(strategy, str(found) if found else None)
    shorthand = parse_shorthand(text)
    return NamedStrategy(legal_strategy(shorthand, graph, num_devices, workload), str(shorthand))


def read_strategy_file(text: str) -> Strategy:
    """The strategy of a strategy file or of a plan file."""
    from meshwright.io import native

    data = native.read_json_object(text, "a strategy or plan")
    noun = "plan" if str(data.get("schema", "")).startswith("plan/") else "strategy"
    record: Any = native.read(text, noun)
    strategy: Strategy = record.strategy if noun == "plan" else record
    return strategy
