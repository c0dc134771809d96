"""What each kind of operator computes, on local tensors: one small function per kind of `graph.KINDS`.

A kernel sees its operands as they lie under the operator's split and a `Local` that says which piece of each dim that
is; the few that need the other pieces' word (the largest logit) ask the ranks that share the split. Numbers follow
transformers' modules: statistics and rotary angles are at least float32 whatever the operands are.

`dropout` is the identity: a run must not depend on how random numbers fall on ranks, so that the losses of two
strategies can be compared. `attention` returns no logsumexp, since PyTorch's kernel keeps it for itself. Not here:
routed experts and relative positions; `refuse` says so before anything starts.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from meshwright.graph import Operator
from meshwright.registry import Registry
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.mesh import Extent, Mesh
from meshwright.sharding import Split


@dataclass(frozen=True)
class Local:
    """Where the local operands of an operator lie within the whole: `sizes` are whole sizes by the operator's dims."""

    operator: Operator
    split: Split
    sizes: Mapping[str, int]
    mesh: Mesh

    def axes(self, dim: str) -> tuple[str, ...]:
        """The axes that split `dim` here."""
        return self.mesh.ordered(axis for axis, split_dim in self.split.items() if split_dim == dim)

    def extent(self, dim: str) -> Extent:
        """Start and stop of the local piece of `dim`."""
        return self.mesh.extent(self.sizes[dim], self.axes(dim))

    def positions(self, dim: str) -> Tensor:
        """The global indices of the local piece of `dim`."""
        return torch.arange(*self.extent(dim))

    def number(self, attribute: str, default: float = 0.0) -> float:
        """A numeric attribute of the operator."""
        return float(self.operator.attributes.get(attribute, default))


Kernel = Callable[..., Tensor | tuple[Tensor | None, ...]]

#: Kernels by operator kind: called with a `Local` and the operands, they return the results in order.
KERNELS: Registry[Kernel] = Registry("operator kind")


def _kernel(kind: str) -> Callable[[Kernel], Kernel]:
    def register(function: Kernel) -> Kernel:
        KERNELS.add(kind, function)
        return function

    return register


def run_kernel(local: Local, *operands: Tensor) -> tuple[Tensor | None, ...]:
    """The results of an operator on its local operands."""
    results = KERNELS[local.operator.kind](local, *operands)
    return results if isinstance(results, tuple) else (results,)


#: Kinds whose kernels talk, and the dim over whose pieces they do.
TALKING = {"cross_entropy": "vocab"}


def kernel_groups(local: Local) -> tuple[tuple[str, ...], ...]:
    """The sets of axes over which an operator's kernel talks."""
    dim = TALKING.get(local.operator.kind)
    return (local.axes(dim),) if dim and local.axes(dim) else ()


def _aligned(x: Tensor, dims: Sequence[str], like: Sequence[str]) -> Tensor:
    """`x` with its dims in the order of `like` and a 1 for each that it lacks, so that it broadcasts."""
    present = [dim for dim in like if dim in dims]
    x = x.permute([dims.index(dim) for dim in present])
    return x[tuple(slice(None) if dim in dims else None for dim in like)]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- products and elementwise ---------------------------------------------------------------------------------------


@_kernel("einsum")
def _einsum(local: Local, *operands: Tensor) -> Tensor:
    letters = dict(zip(local.operator.dims, string.ascii_letters, strict=False))
    sides = (local.operator.input_dims, local.operator.output_dims)
    inputs, outputs = (",".join("".join(letters[dim] for dim in dims) for dims in side) for side in sides)
    return torch.einsum(f"{inputs}->{outputs}", *operands)


@_kernel("bias")
def _bias(local: Local, x: Tensor, bias: Tensor) -> Tensor:
    dims, bias_dims = local.operator.input_dims
    return x + _aligned(bias, bias_dims, dims)


@_kernel("add")
def _add(local: Local, a: Tensor, b: Tensor) -> Tensor:
    return a + b


@_kernel("scale")
def _scale(local: Local, x: Tensor) -> Tensor:
    return x * local.number("factor")


@_kernel("softcap")
def _softcap(local: Local, x: Tensor) -> Tensor:
    cap = local.number("cap")
    return cap * torch.tanh(x / cap)


@_kernel("clip")
def _clip(local: Local, x: Tensor) -> Tensor:
    return x.clamp(-local.number("limit"), local.number("limit"))


@_kernel("dropout")
def _dropout(local: Local, x: Tensor) -> tuple[Tensor, None]:
    return x, None


@_kernel("upcast")
def _upcast(local: Local, x: Tensor) -> Tensor:
    return _at_least_float32(x)


#: Activations by their name in `graph.KINDS`.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


@_kernel("activation")
def _activation(local: Local, x: Tensor) -> Tensor:
    return ACTIVATIONS[str(local.operator.attributes["function"])](x)


@_kernel("gated_activation")
def _gated_activation(local: Local, gate: Tensor, up: Tensor) -> Tensor:
    return ACTIVATIONS[str(local.operator.attributes["function"])](gate) * up


# --- norms and positions --------------------------------------------------------------------------------------------


@_kernel("norm")
def _norm(local: Local, x: Tensor, *parameters: Tensor) -> Tensor:
    dims = local.operator.input_dims[0]
    over = [dims.index(dim) for dim in dims if dim in local.operator.unsplit]
    wide = _at_least_float32(x)
    if local.operator.attributes["variant"] == "layer":
        wide = wide - wide.mean(over, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + local.number("eps"))
    offset = local.number("weight_offset")
    shaped = [_aligned(p, d, dims) for p, d in zip(parameters, local.operator.input_dims[1:], strict=True)]
    if local.operator.attributes["variant"] == "rms" and not offset:
        # Llama rounds to the operands' type before the weight; Gemma (an offset) and layer norms round at the end.
        normed = wide.to(x.dtype)
        return normed * shaped[0] if shaped else normed
    for index, parameter in enumerate(shaped):
        wide = wide * (parameter.to(wide.dtype) + offset) if index == 0 else wide + parameter.to(wide.dtype)
    return wide.to(x.dtype)


@_kernel("rotary")
def _rotary(local: Local, x: Tensor) -> Tensor:
    dims = local.operator.input_dims[0]
    size = int(local.number("rotary_dim"))
    frequencies = _frequencies(local.number("theta"), size, str(local.operator.attributes.get("scaling", "")))
    angles = local.positions("seq").to(torch.float32)[:, None] * frequencies
    interleaved = bool(local.operator.attributes.get("interleaved", False))
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    cos, sin = (_aligned(table.to(x.dtype), ("seq", "head_dim"), dims) for table in (angles.cos(), angles.sin()))
    turned, rest = x[..., :size], x[..., size:]
    turned = turned * cos + _quarter_turn(turned, interleaved) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


#: Kinds of rotary scaling that `_frequencies` knows.
ROTARY_SCALINGS = frozenset({"default", "linear", "llama3"})


def _frequencies(theta: float, size: int, scaling: str) -> Tensor:
    """Turns per token of each pair; in float32, as in transformers, whatever the operands are."""
    frequencies = 1.0 / (float(theta) ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    rule: dict[str, Any] = json.loads(scaling) if scaling else {"rope_type": "default"}
    if rule["rope_type"] == "linear":
        return frequencies / rule["factor"]
    if rule["rope_type"] != "llama3":
        return frequencies
    # Llama 3.1: long waves are slowed by the factor, short ones kept, those between blended.
    context = rule["original_max_position_embeddings"]
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    waves = 2 * math.pi / frequencies
    slowed = torch.where(waves > context / low, frequencies / rule["factor"], frequencies)
    smooth = (context / waves - low) / (high - low)
    blended = (1 - smooth) * slowed / rule["factor"] + smooth * slowed
    between = (waves >= context / high) & (waves <= context / low)
    return torch.where(between, blended, slowed)


@_kernel("position_embedding")
def _position_embedding(local: Local, x: Tensor, table: Tensor) -> Tensor:
    rows = table[local.positions("seq") + int(local.number("offset"))]
    return x + _aligned(rows, ("seq", "hidden"), local.operator.input_dims[0])


@_kernel("embedding")
def _embedding(local: Local, tokens: Tensor, table: Tensor) -> Tensor:
    start, stop = local.extent("vocab")
    if (start, stop) == (0, local.sizes["vocab"]):
        return F.embedding(tokens, table)
    # A partial sum: rows that another rank holds are 0 here.
    held = (tokens >= start) & (tokens < stop)
    if start == stop:
        return table.new_zeros((*tokens.shape, table.shape[-1])) + table.sum() * 0
    return F.embedding((tokens - start).clamp(0, stop - start - 1), table) * held[..., None]


# --- attention ------------------------------------------------------------------------------------------------------


@_kernel("attention")
def _attention(local: Local, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    batch, seq, kv_heads, group, width = q.shape
    heads = kv_heads * group
    query = q.reshape(batch, seq, heads, width).transpose(1, 2)
    key, value = (
        x.transpose(1, 2)[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, heads, x.shape[1], width)
        for x in (k, v)
    )
    scale = local.number("scale")
    bias = _score_bias(local, q.dtype)
    if local.number("softcap"):
        scores = _capped(local, query @ key.transpose(-1, -2) * scale) + (0 if bias is None else bias)
        context = _softmax_like(scores) @ value
    elif bias is None or (_is_plainly_causal(local) and seq == k.shape[1]):
        context = F.scaled_dot_product_attention(query, key, value, is_causal=bias is not None, scale=scale)
    else:
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return context.transpose(1, 2).reshape(q.shape), None


@_kernel("softmax")
def _softmax(local: Local, scores: Tensor) -> Tensor:
    scores = _capped(local, scores * local.number("scale", 1.0))
    bias = _score_bias(local, scores.dtype)
    if bias is not None:
        batch, heads, groups, rows, columns = scores.shape
        scores = (scores.reshape(batch, heads * groups, rows, columns) + bias).view(scores.shape)
    return _softmax_like(scores)


def _softmax_like(scores: Tensor) -> Tensor:
    return torch.softmax(_at_least_float32(scores), -1).to(scores.dtype)


def _capped(local: Local, scores: Tensor) -> Tensor:
    cap = local.number("softcap")
    return cap * torch.tanh(scores / cap) if cap else scores


def _is_plainly_causal(local: Local) -> bool:
    window, seq = local.number("window"), local.sizes["seq"]
    return not local.operator.attributes.get("alibi") and (not window or window >= seq)


def _score_bias(local: Local, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of (heads, queries, keys): -inf where a query must not look, linear biases."""
    attributes = local.operator.attributes
    if not attributes.get("causal") and not attributes.get("alibi"):
        return None
    distance = local.positions("seq")[:, None] - local.positions("kv_seq")
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if attributes.get("causal"):
        hidden |= distance < 0
    if window := int(local.number("window")):
        hidden |= distance >= window
    bias = torch.zeros(distance.shape, dtype=dtype).masked_fill(hidden, -math.inf)
    if attributes.get("alibi"):
        slopes = _alibi_slopes(local)[:, None, None] * local.number("alibi_scale", 1.0)
        bias = bias + (slopes * local.positions("kv_seq")).to(dtype)  # a softmax sees differences: -distance or key
    return bias


def _alibi_slopes(local: Local) -> Tensor:
    """The slope of each local head (Press 2108.12409), as transformers' Bloom counts them."""
    heads = local.sizes["kv_heads"] * local.sizes["group"]
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 / power * (index + 1)) for index in range(power)]
    slopes += [2.0 ** (-4.0 / power * (2 * index + 1)) for index in range(heads - power)]
    table = torch.tensor(slopes, dtype=torch.float32).view(local.sizes["kv_heads"], local.sizes["group"])
    return table[slice(*local.extent("kv_heads")), slice(*local.extent("group"))].flatten()


# --- loss -----------------------------------------------------------------------------------------------------------


@_kernel("cross_entropy")
def _cross_entropy(local: Local, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With vocab split all three are partial sums: the largest logit stands on the first rank, 0 on the others."""
    axes = local.axes("vocab")
    start, stop = local.extent("vocab")
    with torch.no_grad():
        largest = logits.amax(-1) if stop > start else logits.new_full(labels.shape, -math.inf)
        if local.mesh.degree(axes) > 1:
            largest = all_reduce(largest, local.mesh.group(axes), dist.ReduceOp.MAX)
        mine = largest if local.mesh.is_first(axes) else torch.zeros_like(largest)
    sumexp = (logits - largest[..., None]).exp().sum(-1)
    held = (labels >= start) & (labels < stop)
    if stop == start:
        return mine, sumexp, sumexp * 0
    target = logits.gather(-1, (labels - start).clamp(0, stop - start - 1)[..., None]).squeeze(-1)
    return mine, sumexp, target * held


@_kernel("loss")
def _loss(local: Local, largest: Tensor, sumexp: Tensor, target: Tensor) -> Tensor:
    return sumexp.log() + largest - target
