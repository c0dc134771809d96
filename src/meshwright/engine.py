"""The engine: the software that executes a strategy, as a few numbers with their provenance.

The same strategy has another speed on another engine: what it hides behind computation, what its kernels fuse, in which
type it accumulates gradients, what it keeps in memory and what starting a kernel costs it. Engines are data files in
`data/engines`; an estimate names the one it was made for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name

#: Types in which gradients are accumulated; `compute` is the precision of the workload.
GRADIENT_DTYPES = ("compute", "float64", "float32", "bfloat16", "float16")

#: Beyond this, times and their sums would not be finite.
MAX_NUMBER = 1e30


@dataclass(frozen=True)
class Engine:
    """How a piece of software runs a strategy.

    `exposed` is, per degree (`tp`, `dp`, `pp`, ...), the share of communication time that computation cannot hide
    even where there is enough of it; 1 where the engine waits. `fused_kinds` are the operators that run inside a
    neighbour's kernel. `traffic_factor` is the memory traffic of the others over the bytes of their operands.
    `operator_launch_s` is what the host needs per operator of the forward (twice that in the backward): where
    `launch_overlaps`, a block takes at least the sum, else that much longer. `collective_skew_s` is lost per doubling
    of the group in each collective to ranks waiting for each other. `slice_messages`: between stages each rank sends
    its part of what lies replicated.
    `reserved_bytes` is memory that no tensor holds: context, communication buffers. `sources` says where each number
    is from.
    """

    name: str
    exposed: dict[str, float]
    fused_kinds: tuple[str, ...]
    traffic_factor: float
    operator_launch_s: float
    collective_skew_s: float
    gradient_dtype: str
    master_weights: bool
    reserved_bytes: float
    slice_messages: bool = False
    launch_overlaps: bool = True
    step_constant_s: float = 0.0
    sources: dict[str, str] = field(default_factory=dict)


def engine_names() -> tuple[str, ...]:
    """Names of the engines that come with the package."""
    return tuple(sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir()))


def load_engine(name: str) -> Engine:
    """An engine by name; raises `InputError` with the known names where there is none."""
    names = engine_names()
    if name not in names:
        rule = f"known engines: {', '.join(names)}"
        raise InputError([Problem("--engine", name, rule, nearest_name(name, names))])
    data = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    return Engine(**{**data, "fused_kinds": tuple(data["fused_kinds"])})


def engine_problems(engine: Engine) -> list[Problem]:
    """Everything that makes an engine unusable."""
    problems = []
    numbers = {
        **{f"exposed.{degree}": share for degree, share in engine.exposed.items()},
        "traffic_factor": engine.traffic_factor,
        "operator_launch_s": engine.operator_launch_s,
        "collective_skew_s": engine.collective_skew_s,
        "reserved_bytes": engine.reserved_bytes,
        "step_constant_s": engine.step_constant_s,
    }
    for where, value in numbers.items():
        largest = 1.0 if where.startswith("exposed.") else MAX_NUMBER
        if not 0 <= value <= largest:
            problems.append(Problem(where, str(value), f"must be from 0 to {largest:g}"))
    if engine.gradient_dtype not in GRADIENT_DTYPES:
        rule, nearest = f"known: {', '.join(GRADIENT_DTYPES)}", nearest_name(engine.gradient_dtype, GRADIENT_DTYPES)
        problems.append(Problem("gradient_dtype", engine.gradient_dtype, rule, nearest))
    return problems


def _folder() -> Any:
    import importlib.resources  # here: it costs more than the rest of this module to import

    return importlib.resources.files("meshwright") / "data" / "engines"
