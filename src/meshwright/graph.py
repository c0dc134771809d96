"""The model as an operator graph with named dims, equal blocks folded.

A `Graph` is a sequence of `Block`s (embedding, 80 times the same layer, head); a block is a list of `Operator`s over
`Tensor`s. Every operator states its dims in the manner of an einsum, `batch seq hidden, ffn hidden -> batch seq ffn`:
a dim in an input and in an output is passed through, a dim in inputs alone is contracted, a dim listed in `unsplit`
may not be split. FLOPs, bytes and every rule of sharding follow from that; nothing here knows a form of parallelism.

The sizes of `batch` and `seq` belong to the workload and are bound when a graph is priced or run. What is left out:
the backward operators (their shapes, placements and costs follow from the forward ones, see `sharding`) and the
optimizer's update (elementwise over the parameters).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from meshwright.errors import Problem, nearest_name

#: Dims whose size the workload gives; `batch'` is a second one in a tensor that has the batch twice (each with each).
WORKLOAD_DIMS = ("batch", "batch'", "seq", "kv_seq", "rows")

#: More repeats of a segment than this are taken for a slip of the finger.
MAX_REPEAT = 100_000

#: What each kind of operator computes; an operator of another kind is priced by its dims alone.
KINDS = {
    "einsum": "product of the operands summed over the contracted dims",
    "bias": "x + b, b broadcast over the dims it lacks",
    "add": "a + b",
    "scale": "x * factor",
    "softcap": "cap * tanh(x / cap)",
    "clip": "x within -limit to limit",
    "relative_keys": "sinusoids of relative positions, projected (Transformer-XL)",
    "relative_scores": "scores of queries with relative keys, shifted to absolute positions",
    "norm": "variant rms | layer over the unsplit dims; eps; weight_offset (1.0 where the weight is stored as w - 1)",
    "rotary": "rotary positions on rotary_dim of head_dim; theta; interleaved; scaling (JSON text)",
    "attention": "fused softmax(q k^T) v; causal, scale, window and softcap (0: none), alibi; also logsumexp",
    "softmax": "over the last dim; causal, scale, window, softcap, alibi",
    "dropout": "x with probability 1 - p, scaled; also gives the mask",
    "activation": "function gelu | gelu_tanh | silu | relu | relu2 | sigmoid",
    "gated_activation": "function(gate) * up",
    "embedding": "rows of a table by token id",
    "position_embedding": "x + rows of a table by position; offset",
    "top_k": "the topk largest router scores of each token as weights (normalize)",
    "dispatch": "of each expert the rows of the tokens sent to it",
    "combine": "of each token the sum of what its experts made of it, by weight",
    "join": "two tensors side by side along their last dims, the second copied over the dims it lacks",
    "upcast": "a copy in float32",
    "cross_entropy": "of each token: the largest logit, the sum of exponentials less it, the target's logit",
    "loss": "log(sumexp) + max - target of each token",
}


class Role(StrEnum):
    """What a tensor is for."""

    PARAMETER = "parameter"
    ACTIVATION = "activation"
    INPUT = "input"
    BUFFER = "buffer"


@dataclass(frozen=True)
class Tensor:
    """A named array: its dims by name, its role and its type.

    `dtype` is `compute` where the workload's precision decides, else a fixed type (`float32`, `int64`, `bool`).
    A parameter that is not `differentiable` is frozen: it has neither gradient nor optimizer state; a buffer is state
    that no gradient changes. `groups` says, where an array as the model stores it has dims that are products of these
    (`heads head_dim` in one), how many of `dims` make up each of its own; left out where each is one.
    """

    name: str
    dims: tuple[str, ...]
    role: Role = Role.ACTIVATION
    dtype: str = "compute"
    differentiable: bool = True
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Operator:
    """One operator with named dims.

    `spec` names the dims of each input and output in order; an operator may see a tensor's dim under a name of its
    own (attention sees the sequence of the keys as `kv_seq`), since sizes go by position. `contractions` lists the
    products that the operator sums over, each by its dims: 2 FLOPs per element of that product. `saves` names the
    tensors that its backward reads. Operators of one `recompute_group` can be recomputed together.
    One that is `linear` makes of summands (of all its operands) a summand of its result. `halo` says of a dim how many
    elements beyond the ends of its piece, before and after, an operator reads (a convolution over space).
    `attributes` carry what its execution needs (an epsilon, the kind of activation); costs never read names.
    """

    name: str
    kind: str
    spec: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    unsplit: tuple[str, ...] = ()
    contractions: tuple[str, ...] = ()
    saves: tuple[str, ...] = ()
    recompute_group: str = ""
    attributes: dict[str, str | int | float | bool] = field(default_factory=dict)
    linear: bool = False
    halo: dict[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def input_dims(self) -> tuple[tuple[str, ...], ...]:
        """The dims of each input, under this operator's names."""
        return tuple(tuple(part.split()) for part in self.spec.split("->")[0].split(","))

    @cached_property
    def output_dims(self) -> tuple[tuple[str, ...], ...]:
        """The dims of each output, under this operator's names."""
        return tuple(tuple(part.split()) for part in self.spec.split("->")[1].split(","))

    @cached_property
    def dims(self) -> tuple[str, ...]:
        """All dims, each once, in order of appearance."""
        return tuple(dict.fromkeys(dim for dims in (*self.input_dims, *self.output_dims) for dim in dims))

    @cached_property
    def contracted(self) -> frozenset[str]:
        """Dims that some input has and no output has: splitting one leaves a partial result."""
        return frozenset(self.dims) - {dim for dims in self.output_dims for dim in dims}

    def splittable(self, dim: str) -> bool:
        """Whether this operator has `dim` and it may be split."""
        return dim in self.dims and dim not in self.unsplit


@dataclass(frozen=True)
class Block:
    """Operators in a runnable order over named tensors; `inputs` come from the block before, `outputs` go on."""

    name: str
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @cached_property
    def tensor(self) -> Mapping[str, Tensor]:
        """Tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The trained tensors."""
        return tuple(tensor for tensor in self.tensors if tensor.role is Role.PARAMETER)

    def dim_aliases(self, operator: Operator) -> dict[str, str]:
        """The block's name of each dim of `operator` (`kv_seq` -> `seq`)."""
        aliases: dict[str, str] = {}
        operands = zip(
            (*operator.inputs, *operator.outputs), (*operator.input_dims, *operator.output_dims), strict=True
        )
        for name, dims in operands:
            for dim, own in zip(dims, self.tensor[name].dims, strict=True):
                aliases.setdefault(dim, own)
        return aliases


@dataclass(frozen=True)
class Segment:
    """A run of blocks, repeated: `Segment(("local", "global"), 13)` is 26 alternating layers."""

    blocks: tuple[str, ...]
    repeat: int = 1


@dataclass(frozen=True)
class Graph:
    """A model: the sizes of its dims, its distinct blocks, and the order in which they stand.

    `tied` pairs parameters that share their storage, each written `block/tensor`; the first one owns it.
    """

    name: str
    dims: dict[str, int]
    blocks: tuple[Block, ...]
    segments: tuple[Segment, ...]
    tied: tuple[tuple[str, str], ...] = ()
    family: str = ""

    @cached_property
    def block(self) -> Mapping[str, Block]:
        """Blocks by name."""
        return {block.name: block for block in self.blocks}

    @cached_property
    def sequence(self) -> tuple[str, ...]:
        """The name of every block instance, first to last."""
        return tuple(name for segment in self.segments for _ in range(segment.repeat) for name in segment.blocks)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """How often each block stands in the sequence."""
        return {block.name: self.sequence.count(block.name) for block in self.blocks}

    @property
    def num_layers(self) -> int:
        """Block instances between the first (embedding) and the last (head)."""
        return len(self.sequence) - 2

    def sizes(self, batch: Any, seq: Any) -> dict[str, Any]:
        """Sizes of all dims with the workload's bound; `batch` in sequences, `seq` in tokens (numbers or arrays).

        The keys' sequence of a tensor that has both, such as attention scores, is the dim `kv_seq`. `rows` are those
        of one sequence that go to one expert, where all get as many: a mean, which need not be whole.
        """
        bound = {"batch": batch, "batch'": batch, "seq": seq, "kv_seq": seq}
        if "experts" in self.dims:
            bound["rows"] = seq * self.dims["topk"] / self.dims["experts"]
        return {**self.dims, **bound}

    @property
    def num_parameters(self) -> int:
        """Trained numbers, tied ones counted once."""
        tied = {second for _, second in self.tied}
        return sum(
            self.counts[block.name] * math.prod(self.dims[dim] for dim in tensor.dims)
            for block in self.blocks
            for tensor in block.parameters
            if f"{block.name}/{tensor.name}" not in tied
        )

    def forward_flops(self, batch: int, seq: int) -> int:
        """FLOPs of the contractions of one forward of `batch` sequences: 2 per multiply-add, elementwise 0."""
        sizes = self.sizes(batch, seq)
        flops: float = sum(
            self.counts[block.name] * operator_flops(operator, block.dim_aliases(operator), sizes)
            for block in self.blocks
            for operator in block.operators
        )
        return round(flops)


def operator_flops(operator: Operator, aliases: Mapping[str, str], sizes: Mapping[str, Any]) -> Any:
    """FLOPs of one forward of an operator, sizes by the block's dim names; 0 for what only moves memory."""
    return sum(
        2 * math.prod(sizes[aliases.get(dim, dim)] for dim in product.split()) for product in operator.contractions
    )


def graph_problems(graph: Graph) -> list[Problem]:
    """Everything that makes a graph unusable: unknown or repeated names, specs that do not fit, dims without a size."""
    problems = [*_repeated("blocks", [block.name for block in graph.blocks])]
    known = {block.name for block in graph.blocks}
    for index, segment in enumerate(graph.segments):
        for name in segment.blocks:
            if name not in known:
                rule = f"known blocks: {', '.join(sorted(known))}"
                problems.append(Problem(f"segments[{index}].blocks", name, rule, nearest_name(name, known)))
        if segment.repeat < 1:
            problems.append(Problem(f"segments[{index}].repeat", str(segment.repeat), "must be at least 1"))
        elif segment.repeat > MAX_REPEAT:
            rule = f"must be at most {MAX_REPEAT:,}"
            problems.append(Problem(f"segments[{index}].repeat", str(segment.repeat), rule, str(MAX_REPEAT)))
    if not any(segment.blocks for segment in graph.segments):
        problems.append(Problem("segments", "", "must name at least one block"))
    for dim, size in graph.dims.items():
        if size < 1:
            problems.append(Problem(f"dims.{dim}", str(size), "must be at least 1"))
    for block in graph.blocks:
        problems += _block_problems(block, graph.dims)
    return [*problems, *_tied_problems(graph)]


def _repeated(where: str, names: Sequence[str]) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(where, name, "is named twice" if count == 2 else f"is named {count} times")


def _tied_problems(graph: Graph) -> Iterator[Problem]:
    parameters = {f"{block.name}/{tensor.name}": tensor for block in graph.blocks for tensor in block.parameters}
    for index, pair in enumerate(graph.tied):
        unknown = [path for path in pair if path not in parameters]
        for path in unknown:
            yield Problem(f"tied[{index}]", path, "no such parameter", nearest_name(path, parameters))
        if not unknown:
            first, second = ([graph.dims.get(dim) for dim in parameters[path].dims] for path in pair)
            if first != second:
                yield Problem(f"tied[{index}]", ", ".join(pair), "must have the same dims")


def _block_problems(block: Block, dims: Mapping[str, int]) -> Iterator[Problem]:
    where = f"blocks.{block.name}"
    yield from _repeated(f"{where}.tensors", [tensor.name for tensor in block.tensors])
    yield from _repeated(f"{where}.operators", [operator.name for operator in block.operators])
    for tensor in block.tensors:
        for dim in tensor.dims:
            if dim not in dims and dim not in WORKLOAD_DIMS:
                yield Problem(f"{where}.{tensor.name}", dim, "this dim has no size in dims")
    for side, names in (("inputs", block.inputs), ("outputs", block.outputs)):
        yield from _unknown_tensors(block, f"{where}.{side}", names)
    made = set(block.inputs) | {t.name for t in block.tensors if t.role is not Role.ACTIVATION}
    for operator in block.operators:
        yield from _operator_problems(block, operator, made)
        made |= set(operator.outputs)
    for name in block.outputs:
        if name in block.tensor and name not in made:
            yield Problem(f"{where}.outputs", name, "no operator makes it")


def _unknown_tensors(block: Block, where: str, names: Iterable[str]) -> Iterator[Problem]:
    for name in names:
        if name not in block.tensor:
            yield Problem(where, name, "no such tensor in the block", nearest_name(name, block.tensor))


def _operator_problems(block: Block, operator: Operator, made: Container[str]) -> Iterator[Problem]:
    here = f"blocks.{block.name}.{operator.name}"
    yield from _unknown_tensors(block, f"{here}.saves", operator.saves)
    if operator.spec.count("->") != 1:
        yield Problem(here, operator.spec, "a spec is 'dims of inputs -> dims of outputs'")
        return
    operands = (*operator.inputs, *operator.outputs)
    specs = (*operator.input_dims, *operator.output_dims)
    if len(operator.inputs) != len(operator.input_dims) or len(operands) != len(specs):
        yield Problem(here, operator.spec, f"the spec does not have one entry per operand ({', '.join(operands)})")
        return
    for name, spec in zip(operands, specs, strict=True):
        if name not in block.tensor:
            yield Problem(here, name, "no such tensor in the block", nearest_name(name, block.tensor))
        elif len(spec) != len(block.tensor[name].dims):
            yield Problem(here, " ".join(spec), f"{name} has dims {' '.join(block.tensor[name].dims)}")
    for name in operator.inputs:
        if name in block.tensor and name not in made:
            yield Problem(here, name, "used before it is made")
    for dim in dict.fromkeys(dim for product in operator.contractions for dim in product.split()):
        if dim not in operator.dims:
            rule = f"the operator's dims are {', '.join(operator.dims)}"
            yield Problem(f"{here}.contractions", dim, rule, nearest_name(dim, operator.dims))
