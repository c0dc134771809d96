"""The engine: the software that executes a strategy, as a few numbers with their provenance.

The same strategy has another speed on another engine: what it hides behind computation, what its kernels fuse, in which
type it accumulates gradients, what it keeps in memory and what starting a kernel costs it. Engines are data files in
`data/engines`; an estimate names the one it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

from meshwright.errors import InputError, Problem, nearest_name

#: Types in which gradients are accumulated; `compute` is the precision of the workload.
GRADIENT_DTYPES = ("compute", "float64", "float32", "bfloat16", "float16")

#: Beyond this, times and their sums would not be finite.
MAX_NUMBER = 1e30


@dataclass(frozen=True)
class Defaults:
    """What an engine does where a published run does not say, and habits of it that a strategy can say.

    `microbatch` is 0 where none is documented. `stages`: layers are spread evenly, or by nanotron's running sum of
    cost. `dropout` is that of its GPT scripts. `vocab_multiple` is what the vocabulary is padded to, per
    tensor-parallel rank. `folds_experts`: an expert group may span the tensor-parallel ranks (Megatron-Core).
    """

    microbatch: int = 0
    zero: str = "0"
    sequence_parallel: bool = False
    fused_attention: bool = True
    dropout: float = 0.0
    vocab_multiple: int = 1
    stages: Literal["even", "cost"] = "even"
    folds_experts: bool = False


@dataclass(frozen=True)
class Crossing:
    """What happens to a pipeline whose stages lie on several nodes, where an engine has such a fault.

    `collective_rank_s`: host seconds that each collective takes more, per rank of its group. `stall_s`: seconds that a
    message between stages blocks its ranks: on at least `stall_nodes` nodes (there without a pipeline too, as if there
    were two neighbours), around collectives of at least `stall_group` ranks, or where state lies whole on several
    data-parallel ranks and there are at least `stall_microbatches` microbatches of one sequence.
    """

    collective_rank_s: float = 0.0
    stall_s: float = 0.0
    stall_nodes: int = 0
    stall_group: int = 0
    stall_microbatches: int = 0


@dataclass(frozen=True)
class Footprint:
    """What an engine holds in memory beside what its operators need.

    `reserved_bytes`: what no tensor holds: context, communication buffers. `kept_factor`: saved activations over those
    that the operators need. `logit_bytes`: per logit at the peak of the loss, all copies and their gradient.
    `gradient_copy`: gradients accumulated in another type are first made in that of the computation. `update_bytes`:
    per parameter of a rank while the optimizer runs on sharded state. `gaps`: on pipelines of more than two ranks, what
    lies unusable between freed activations, in microbatches. `run_ahead_blocks`: where a host never waits for its
    device (without a pipeline, or between its ends), gathered copies of so many blocks are held until the device has
    read them, in each microbatch in flight. Where that fills more than `pressed_at` of a device's memory they are given
    back, and what did not fit is freed and allocated again, `retry_s_per_byte` in each microbatch.
    """

    reserved_bytes: float = 0.0
    kept_factor: float = 1.0
    logit_bytes: float = 8.0
    gradient_copy: bool = False
    update_bytes: float = 0.0
    gaps: float = 0.0
    run_ahead_blocks: float = 0.0
    pressed_at: float = 1.0
    retry_s_per_byte: float = 0.0


@dataclass(frozen=True)
class Engine:
    """How a piece of software runs a strategy.

    `exposed` is, per degree (`tp`, `dp`, `pp`, ...), the share of communication time that computation cannot hide even
    where there is enough of it; 1 where the engine waits. `fused_kinds` are the operators that run inside a neighbour's
    kernel. `traffic_factor` is the memory traffic of the others over the bytes of their operands, `loss_passes` how
    often that of the loss is more, `matmul_factor` the speed of its products over that of the device's file. `pace` is
    the time of a step over that of its parts, where runs of one's own were slower or faster all together.
    `operator_launch_s` is what the host needs per operator of the forward (twice that in the backward),
    `collective_launch_s` per collective and `collective_rank_s` per rank of its group: where `launch_overlaps`, a block
    takes at least the sum, else that much longer. `collective_skew_s` is lost per doubling of the group in each
    collective to ranks waiting for each other. `slice_messages`: between stages each rank sends its part of what lies
    replicated. `step_constant_s` is added to each step, `step_rank_s` for each rank of the group over which state is
    sharded. What the file of an engine does not say is as in that of the one that it is `like`, one with measured runs
    or `unknown`. `sources` says where each number is from."""

    name: str
    exposed: dict[str, float]
    fused_kinds: tuple[str, ...]
    traffic_factor: float
    operator_launch_s: float
    collective_skew_s: float
    gradient_dtype: str | dict[str, str]
    master_weights: bool
    pace: float = 1.0
    matmul_factor: float = 1.0
    loss_passes: float = 2.0
    collective_launch_s: float = 0.0
    collective_rank_s: float = 0.0
    slice_messages: bool = False
    launch_overlaps: bool = True
    step_constant_s: float = 0.0
    step_rank_s: float = 0.0
    crossing: Crossing = Crossing()
    memory: Footprint = Footprint()
    defaults: Defaults = Defaults()
    like: str = ""
    sources: dict[str, str] = field(default_factory=dict)

    def gradient_type(self, precision: str) -> str:
        """The type in which gradients are accumulated where the computation is in `precision`."""
        known = self.gradient_dtype
        return known if isinstance(known, str) else known.get(precision, "compute")


def engine_names() -> tuple[str, ...]:
    """Names of the engines that come with the package."""
    return tuple(sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir()))


@cache
def load_engine(name: str) -> Engine:
    """An engine by name; raises `InputError` with the known names where there is none."""
    names = engine_names()
    if name not in names:
        rule = f"known engines: {', '.join(names)}"
        raise InputError([Problem("--engine", name, rule, nearest_name(name, names))])
    data = _read(name)
    nested = {"crossing": Crossing, "memory": Footprint, "defaults": Defaults}
    records = {key: record(**data[key]) for key, record in nested.items() if key in data}
    return Engine(**{**data, **records, "fused_kinds": tuple(data["fused_kinds"])})


def _read(name: str) -> dict[str, Any]:
    """What an engine's file says, over what is said of the engine that it is `like`; what an engine does by default is
    its own."""
    data: dict[str, Any] = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    if not data.get("like"):
        return data
    kin = {key: value for key, value in _read(data["like"]).items() if key not in ("like", "defaults")}
    sources = {key: f"[borrowed: {data['like']}] {source}" for key, source in kin["sources"].items()}
    own = {key: {**kin[key], **data.get(key, {})} for key in ("exposed", "memory")}
    return {**kin, **data, **own, "sources": {**sources, **data["sources"]}}


def engine_problems(engine: Engine) -> list[Problem]:
    """Everything that makes an engine unusable."""
    problems = []
    for where, value in _numbers(engine):
        largest = 1.0 if where.startswith("exposed.") else MAX_NUMBER
        least = 1e-9 if where in ("matmul_factor", "pace") else 0
        if not least <= value <= largest:
            problems.append(Problem(where, str(value), f"must be from {least:g} to {largest:g}"))
    types = [engine.gradient_dtype] if isinstance(engine.gradient_dtype, str) else engine.gradient_dtype.values()
    for dtype in types:
        if dtype not in GRADIENT_DTYPES:
            rule, nearest = f"known: {', '.join(GRADIENT_DTYPES)}", nearest_name(dtype, GRADIENT_DTYPES)
            problems.append(Problem("gradient_dtype", dtype, rule, nearest))
    return problems


def _numbers(record: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of an engine with its key path."""
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, dict):
            yield from ((f"{prefix}{item.name}.{key}", each) for key, each in value.items() if item.name == "exposed")
        elif isinstance(value, Crossing | Footprint | Defaults):
            yield from _numbers(value, f"{prefix}{item.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{item.name}", value


def _folder() -> Any:
    import importlib.resources  # here: it costs more than the rest of this module to import

    return importlib.resources.files("meshwright") / "data" / "engines"
