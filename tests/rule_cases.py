"""Calls of all operators that have a dim rule, with random operands of random sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arguments = dict[str, Any]


class Draw:
    """Random operands of random sizes."""

    def __init__(self, seed: int, op: str = "") -> None:
        self.op = op
        self.random = np.random.default_rng(seed)
        self.fixed: list[Tensor] = []
        self.b, self.c, self.m, self.n, self.k = (int(self.random.choice([2, 3, 4, 6])) for _ in range(5))

    def t(self, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(self.random.standard_normal(shape)))

    def positive(self, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(self.random.random(shape))) * 0.8 + 0.1

    def constant(self, *shape: int) -> Tensor:
        """Positive numbers that have no gradient."""
        self.fixed.append(self.positive(*shape))
        return self.fixed[-1]

    def i(self, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(self.random.integers(0, high, shape)))

    def mask(self, *shape: int) -> Tensor:
        return self.i(2, *shape).bool()


CASES: dict[str, Callable[[Draw], Arguments]] = {}


def _add(text: str, **cases: Callable[[Draw], Arguments]) -> None:
    for op in text.split():
        for name, case in (cases or {"": UNARY}).items():
            CASES[f"{op}{name and ':'}{name}"] = case


def UNARY(d: Draw) -> Arguments:
    return {"self": d.t(d.b, d.m, d.n)}


_add(
    """neg silu gelu abs cos sin tan cosh sinh softplus hardswish hardsigmoid leaky_relu elu mish square selu celu
    log_sigmoid hardtanh relu6 atan asinh hardshrink softshrink erf erfc expm1 relu sigmoid tanh exp exp2 ceil
    floor round trunc sign isnan logical_not clone alias nan_to_num sinc rad2deg deg2rad"""
)
_add(
    "log log2 log10 log1p rsqrt sqrt reciprocal logit digamma lgamma acos asin erfinv",
    _=lambda d: {"self": d.positive(d.b, d.m)},
)
_add("acosh", _=lambda d: {"self": d.positive(d.b, d.m) + 1.5})
_add("atanh", _=lambda d: {"self": d.positive(d.b, d.m)})
_add("clamp", _=lambda d: {"self": d.t(d.b, d.m), "min": -0.5, "max": 0.5})
_add("clamp_min", _=lambda d: {"self": d.t(d.b, d.m), "min": 0.1})
_add("threshold", _=lambda d: {"self": d.t(d.b, d.m), "threshold": 0.1, "value": 0.0})
_add(
    "prelu",
    one=lambda d: {"self": d.t(d.b, d.c, d.m), "weight": d.t(1)},
    each=lambda d: {"self": d.t(d.b, d.c, d.m), "weight": d.t(d.c)},
)
_add(
    "add.Tensor sub.Tensor mul.Tensor maximum minimum atan2 logaddexp fmax fmin",
    same=lambda d: {"self": d.t(d.b, d.m, d.n), "other": d.t(d.b, d.m, d.n)},
    broadcast=lambda d: {"self": d.t(d.b, d.m, d.n), "other": d.t(d.m, 1)},
)
_add("rsub.Scalar", _=lambda d: {"self": d.t(d.b, d.m), "other": 1.0})
_add("div.Tensor", _=lambda d: {"self": d.t(d.b, d.m, d.n), "other": d.positive(d.n)})
_add("eq.Tensor lt.Tensor ge.Tensor", _=lambda d: {"self": d.i(3, d.b, d.m), "other": d.i(3, d.b, d.m)})
_add("eq.Scalar", _=lambda d: {"self": d.i(3, d.b, d.m), "other": 1})
_add("bitwise_and.Tensor", _=lambda d: {"self": d.mask(d.b, d.m), "other": d.mask(d.m)})
_add("isin.Tensor_Tensor", _=lambda d: {"elements": d.i(6, d.b, d.m), "test_elements": d.i(6, d.m)})
_add("bucketize.Tensor", _=lambda d: {"self": d.t(d.b, d.m), "boundaries": d.t(d.m).sort().values})
_add("searchsorted.Tensor", _=lambda d: {"sorted_sequence": d.t(d.m).sort().values, "self": d.t(d.b, d.m)})
_add("pow.Tensor_Scalar", _=lambda d: {"self": d.t(d.b, d.m), "exponent": 2})
_add("pow.Tensor_Tensor", _=lambda d: {"self": d.positive(d.b, d.m), "exponent": d.t(d.m)})
_add("pow.Scalar", _=lambda d: {"self": 2.0, "exponent": d.t(d.b, d.m)})
_add("where.self", _=lambda d: {"condition": d.mask(d.m, 1), "self": d.t(d.b, d.m, d.n), "other": d.t(d.n)})
_add("masked_fill.Scalar", _=lambda d: {"self": d.t(d.b, d.m, d.n), "mask": d.mask(d.m, d.n), "value": -2.0})
_add("addcmul addcdiv", _=lambda d: {"self": d.t(d.b, d.m), "tensor1": d.t(d.m), "tensor2": d.positive(d.b, d.m)})
_add("lerp.Scalar", _=lambda d: {"self": d.t(d.b, d.m), "end": d.t(d.m), "weight": 0.3})
_add("glu", _=lambda d: {"self": d.t(d.b, 2 * d.m, d.n), "dim": 1})
_add("dropout", _=lambda d: {"input": d.t(d.b, d.m), "p": 0.5, "train": False})
_add("to.dtype", _=lambda d: {"self": d.t(d.b, d.m), "dtype": torch.float64})
_add("type_as", _=lambda d: {"self": d.t(d.b, d.m), "other": d.t(d.m)})

_add(
    "view reshape _unsafe_view",
    merge=lambda d: {"self": d.t(d.b, d.m, d.n), "size": [d.b, d.m * d.n]},
    split=lambda d: {"self": d.t(d.b, d.m * d.n, d.k), "size": [d.b, d.m, d.n, d.k]},
    regroup=lambda d: {"self": d.t(d.b * d.m, d.n * d.k), "size": [d.b, d.m * d.n, d.k]},
    ones=lambda d: {"self": d.t(d.b, 1, d.m), "size": [1, d.b, d.m, 1]},
)
_add("view_as", _=lambda d: {"self": d.t(d.b, d.m * d.n), "other": d.t(d.b, d.m, d.n)})
_add("flatten.using_ints", _=lambda d: {"self": d.t(d.b, d.m, d.n), "start_dim": 1, "end_dim": 2})
_add("unflatten.int", _=lambda d: {"self": d.t(d.b, d.m * d.n), "dim": 1, "sizes": [d.m, d.n]})
_add("squeeze.dim", _=lambda d: {"self": d.t(d.b, 1, d.m), "dim": 1})
_add("squeeze", _=lambda d: {"self": d.t(d.b, 1, d.m)})
_add("unsqueeze", _=lambda d: {"self": d.t(d.b, d.m), "dim": 1})
_add("permute", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dims": [2, 0, 1]})
_add("transpose.int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim0": 0, "dim1": -1})
_add("t", _=lambda d: {"self": d.t(d.b, d.m)})
_add("movedim.int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "source": 0, "destination": 2})
_add("expand", _=lambda d: {"self": d.t(d.b, 1, d.n), "size": [d.k, d.b, d.m, d.n]})
_add("expand_as", _=lambda d: {"self": d.t(d.b, 1), "other": d.t(d.b, d.m)})
_add(
    "meshgrid.indexing",
    ij=lambda d: {"tensors": [d.t(d.m), d.t(d.n)], "indexing": "ij"},
    xy=lambda d: {"tensors": [d.t(d.m), d.t(d.n)], "indexing": "xy"},
)
_add("broadcast_tensors", _=lambda d: {"tensors": [d.t(d.m, 1), d.t(d.n)]})
_add("repeat", _=lambda d: {"self": d.t(d.b, d.m), "repeats": [2, 1, 3]})
_add("tile", _=lambda d: {"self": d.t(d.b, d.m), "dims": [2, 2]})
_add("repeat_interleave.self_int", _=lambda d: {"self": d.t(d.b, d.m), "repeats": 2, "dim": 1})
_add(
    "slice.Tensor",
    half=lambda d: {"self": d.t(d.b, 2 * d.m), "dim": 1, "start": d.m, "end": 2**60},
    first=lambda d: {"self": d.t(d.b, 3 * d.m), "dim": 1, "start": 0, "end": d.m},
    step=lambda d: {"self": d.t(d.b, 2 * d.m), "dim": 1, "start": 1, "end": 2 * d.m, "step": 2},
    ragged=lambda d: {"self": d.t(d.b, 7), "dim": 1, "start": 2, "end": -1},
)
_add("narrow", _=lambda d: {"self": d.t(d.b, 2 * d.m), "dim": 1, "start": d.m, "length": d.m})
_add("select.int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1, "index": -1})
_add("unbind.int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1})
_add("stack", _=lambda d: {"tensors": [d.t(d.b, d.m), d.t(d.b, d.m)], "dim": 1})
_add(
    "split.Tensor",
    equal=lambda d: {"self": d.t(d.b, 3 * d.m), "split_size": d.m, "dim": 1},
    ragged=lambda d: {"self": d.t(d.b, 7), "split_size": 3, "dim": 1},
)
_add(
    "split_with_sizes",
    equal=lambda d: {"self": d.t(d.b, 2 * d.m), "split_sizes": [d.m, d.m], "dim": 1},
    ragged=lambda d: {"self": d.t(d.b, 3 * d.m), "split_sizes": [d.m, 2 * d.m], "dim": 1},
)
_add("chunk", _=lambda d: {"self": d.t(d.b, 2 * d.m, d.n), "chunks": 2, "dim": 1})
_add(
    "cat",
    equal=lambda d: {"tensors": [d.t(d.b, d.m), d.t(d.b, d.m)], "dim": -1},
    ragged=lambda d: {"tensors": [d.t(d.b, d.m), d.t(d.b, d.m + 1)], "dim": 1},
)
_add("constant_pad_nd", _=lambda d: {"self": d.t(d.b, d.m, d.n), "pad": [1, 2], "value": 0.0})
_add("reflection_pad1d", _=lambda d: {"self": d.t(d.b, d.m, 5), "padding": [1, 1]})
_add("flip", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dims": [1]})
_add(
    "roll",
    one=lambda d: {"self": d.t(d.b, d.m, d.n), "shifts": [1], "dims": [1]},
    flat=lambda d: {"self": d.t(d.b, d.m), "shifts": [1]},
)
_add("tril triu", _=lambda d: {"self": d.t(d.b, d.m, d.n), "diagonal": 0})
_add("pixel_shuffle", _=lambda d: {"self": d.t(d.b, d.c * 4, d.m, d.n), "upscale_factor": 2})
_add("pixel_unshuffle", _=lambda d: {"self": d.t(d.b, d.c, 2 * d.m, 2 * d.n), "downscale_factor": 2})
_add("unfold", _=lambda d: {"self": d.t(d.b, d.m, 6), "dimension": 2, "size": 2, "step": 2})
_add(
    "diagonal",
    first=lambda d: {"self": d.t(d.m, d.m, d.m)},
    last=lambda d: {"self": d.t(d.b, d.m, d.m), "dim1": 1, "dim2": 2},
)

_add(
    "linear",
    _=lambda d: {"input": d.t(d.b, d.m, d.k), "weight": d.t(d.n, d.k)},
    bias=lambda d: {"input": d.t(d.b, d.m, d.k), "weight": d.t(d.n, d.k), "bias": d.t(d.n)},
    same_sizes=lambda d: {"input": d.t(4, 4), "weight": d.t(4, 4), "bias": d.t(4)},
)
_add("mm", _=lambda d: {"self": d.t(d.m, d.k), "mat2": d.t(d.k, d.n)})
_add("bmm", _=lambda d: {"self": d.t(d.b, d.m, d.k), "mat2": d.t(d.b, d.k, d.n)})
_add(
    "matmul",
    batched=lambda d: {"self": d.t(d.b, d.c, d.m, d.k), "other": d.t(d.c, d.k, d.n)},
    vector=lambda d: {"self": d.t(d.b, d.m, d.k), "other": d.t(d.k)},
    left_vector=lambda d: {"self": d.t(d.k), "other": d.t(d.b, d.k, d.n)},
    broadcast=lambda d: {"self": d.t(d.b, 1, d.m, d.k), "other": d.t(d.c, d.k, d.n)},
)
_add("addmm", _=lambda d: {"self": d.t(d.n), "mat1": d.t(d.m, d.k), "mat2": d.t(d.k, d.n), "beta": 2.0})
_add("baddbmm", _=lambda d: {"self": d.t(d.b, d.m, d.n), "batch1": d.t(d.b, d.m, d.k), "batch2": d.t(d.b, d.k, d.n)})
_add("addbmm", _=lambda d: {"self": d.t(d.m, d.n), "batch1": d.t(d.b, d.m, d.k), "batch2": d.t(d.b, d.k, d.n)})
_add("addmv", _=lambda d: {"self": d.t(d.m), "mat": d.t(d.m, d.k), "vec": d.t(d.k)})
_add("mv", _=lambda d: {"self": d.t(d.m, d.k), "vec": d.t(d.k)})
_add("dot", _=lambda d: {"self": d.t(d.k), "tensor": d.t(d.k)})
_add("inner", _=lambda d: {"self": d.t(d.b, d.m, d.k), "other": d.t(d.n, d.k)})
_add("outer", _=lambda d: {"self": d.t(d.m), "vec2": d.t(d.n)})
_add(
    "einsum",
    product=lambda d: {"equation": "bhsd,bhtd->bhst", "tensors": [d.t(d.b, 2, d.m, d.k), d.t(d.b, 2, d.n, d.k)]},
    dots=lambda d: {"equation": "...ij,jk->...ik", "tensors": [d.t(d.b, d.c, d.m, d.k), d.t(d.k, d.n)]},
    implied=lambda d: {"equation": "ij,jk", "tensors": [d.t(d.m, d.k), d.t(d.k, d.n)]},
    total=lambda d: {"equation": "ij->", "tensors": [d.t(d.m, d.k)]},
    three=lambda d: {"equation": "bi,ij,bj->b", "tensors": [d.t(d.b, d.m), d.t(d.m, d.n), d.t(d.b, d.n)]},
)
_add(
    "bilinear",
    _=lambda d: {"input1": d.t(d.b, d.m), "input2": d.t(d.b, d.n), "weight": d.t(d.k, d.m, d.n), "bias": d.t(d.k)},
)

_add(
    "sum.dim_IntList mean.dim",
    _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": [1], "keepdim": False},
    keep=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": [0, -1], "keepdim": True},
)
_add("sum mean", _=UNARY)
_add("count_nonzero.dim_IntList", _=lambda d: {"self": d.i(2, d.b, d.m), "dim": [1]})
_add("amax amin", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": [1]})
_add("max.dim min.dim median.dim", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1})
_add("max.other", _=lambda d: {"self": d.t(d.b, d.m), "other": d.t(d.m)})
_add("max min", _=UNARY)
_add("prod.dim_int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1})
_add("var.correction std.correction", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": [1], "correction": 1})
_add("linalg_vector_norm", _=lambda d: {"self": d.t(d.b, d.m, d.n), "ord": 2, "dim": [-1], "keepdim": True})
_add("norm.ScalarOpt_dim", _=lambda d: {"self": d.t(d.b, d.m, d.n), "p": 2, "dim": [1]})
_add("argmax", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1})
_add("logsumexp", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": [1]})
_add("any.dim", _=lambda d: {"self": d.mask(d.b, d.m), "dim": 1})
_add("softmax.int log_softmax.int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1})
_add("cumsum cumprod", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1})
_add("sort", _=lambda d: {"self": d.t(d.b, d.m), "dim": -1})
_add("argsort", _=lambda d: {"self": d.t(d.b, d.m), "dim": 0})
_add("topk", _=lambda d: {"self": d.t(d.b, 6, d.n), "k": 2, "dim": 1})
_add("kthvalue", _=lambda d: {"self": d.t(d.b, 5), "k": 2, "dim": 1})
_add(
    "layer_norm",
    _=lambda d: {"input": d.t(d.b, d.m, d.n), "normalized_shape": [d.n], "weight": d.t(d.n), "bias": d.t(d.n)},
    two=lambda d: {"input": d.t(d.b, d.m, d.n), "normalized_shape": [d.m, d.n]},
)
_add("rms_norm", _=lambda d: {"input": d.t(d.b, d.m, d.n), "normalized_shape": [d.n], "weight": d.t(d.n)})
_add(
    "group_norm",
    _=lambda d: {
        "input": d.t(d.b, d.c * d.m, d.n),
        "num_groups": d.c,
        "weight": d.t(d.c * d.m),
        "bias": d.t(d.c * d.m),
    },
    instance=lambda d: {"input": d.t(d.b, d.c, d.n), "num_groups": d.c, "weight": d.t(d.c), "bias": d.t(d.c)},
)
_add(
    "instance_norm",
    _=lambda d: {
        "input": d.t(d.b, d.c, d.n),
        "weight": d.t(d.c),
        "bias": d.t(d.c),
        "use_input_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "cudnn_enabled": False,
    },
)


def _batch_norm(training: bool) -> Callable[[Draw], Arguments]:
    def case(d: Draw) -> Arguments:
        running = {} if training else {"running_mean": d.constant(d.c), "running_var": d.constant(d.c)}
        return {
            "input": d.t(d.b, d.c, d.m, d.n),
            "weight": d.t(d.c),
            "bias": d.t(d.c),
            **running,
            "training": training,
            "momentum": 0.1,
            "eps": 1e-5,
            "cudnn_enabled": False,
        }

    return case


_add("batch_norm", training=_batch_norm(True), evaluation=_batch_norm(False))
_add(
    "cross_entropy_loss",
    mean=lambda d: {"self": d.t(d.b * d.m, 5), "target": d.i(5, d.b * d.m)},
    none=lambda d: {"self": d.t(d.b, 5, d.m), "target": d.i(5, d.b, d.m), "reduction": 0},
    weighted=lambda d: {"self": d.t(d.b, 5), "target": d.i(5, d.b), "weight": d.constant(5), "label_smoothing": 0.1},
    ignored=lambda d: {"self": d.t(6, 5), "target": torch.tensor([0, 4, -100, 2, -100, 1])},
    soft=lambda d: {"self": d.t(d.b, 5), "target": d.positive(d.b, 5)},
)
_add("nll_loss_nd", _=lambda d: {"self": d.t(d.b, 5), "target": d.i(5, d.b)})
_add(
    "mse_loss l1_loss smooth_l1_loss huber_loss",
    _=lambda d: {"self": d.t(d.b, d.m), "target": d.t(d.b, d.m)},
    none=lambda d: {"self": d.t(d.b, d.m), "target": d.t(d.b, d.m), "reduction": 0},
)
_add("binary_cross_entropy", _=lambda d: {"self": d.positive(d.b, d.m), "target": d.positive(d.b, d.m)})
_add(
    "binary_cross_entropy_with_logits",
    _=lambda d: {"self": d.t(d.b, d.m), "target": d.positive(d.b, d.m), "weight": d.constant(d.m)},
)
_add("kl_div", _=lambda d: {"self": d.t(d.b, d.m), "target": d.positive(d.b, d.m)})
_add("cosine_similarity", _=lambda d: {"x1": d.t(d.b, d.m, d.n), "x2": d.t(d.b, d.m, d.n), "dim": 1})


def _attention(groups: bool = False, masked: bool = False, causal: bool = False) -> Callable[[Draw], Arguments]:
    def case(d: Draw) -> Arguments:
        queries = d.m if not causal else d.n
        found: Arguments = {
            "query": d.t(d.b, 2 * d.c if groups else d.c, queries, 4),
            "key": d.t(d.b, d.c, d.n, 4),
            "value": d.t(d.b, d.c, d.n, 6),
        }
        if masked:
            found["attn_mask"] = d.t(d.b, 1, queries, d.n)
        return {**found, "is_causal": causal, "enable_gqa": groups}

    return case


_add(
    "scaled_dot_product_attention",
    plain=_attention(),
    groups=_attention(groups=True),
    masked=_attention(masked=True),
    causal=_attention(causal=True),
    causal_groups=_attention(groups=True, causal=True),
)
_add(
    "embedding",
    _=lambda d: {"weight": d.t(2 * d.k, d.n), "indices": d.i(2 * d.k, d.b, d.m)},
    padded=lambda d: {"weight": d.t(6, d.n), "indices": d.i(6, d.b, d.m), "padding_idx": 4},
)
BAGS = {
    "offsets": torch.tensor([0, 3, 5]),
    "scale_grad_by_freq": False,
    "sparse": False,
    "include_last_offset": False,
    "padding_idx": None,
}
_add(
    "embedding_bag.padding_idx",
    sum=lambda d: {"weight": d.t(6, d.n), "indices": d.i(6, 8), **BAGS, "mode": 0},
    weighted=lambda d: {
        "weight": d.t(6, d.n),
        "indices": d.i(6, 8),
        **BAGS,
        "mode": 0,
        "per_sample_weights": d.t(8),
        "padding_idx": 2,
    },
    mean=lambda d: {"weight": d.t(6, d.n), "indices": d.i(6, 8), **BAGS, "mode": 1},
    max=lambda d: {"weight": d.t(6, d.n), "indices": d.i(6, 8), **BAGS, "mode": 2},
)
_add("index_select", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1, "index": d.i(d.m, 4)})
_add(
    "index.Tensor",
    first=lambda d: {"self": d.t(d.m, d.n), "indices": [d.i(d.m, d.b, d.k)]},
    second=lambda d: {"self": d.t(d.b, d.m, d.n), "indices": [None, d.i(d.m, d.k)]},
    both=lambda d: {"self": d.t(d.m, d.n, d.k), "indices": [d.i(d.m, d.b, 1), d.i(d.n, 4)]},
    apart=lambda d: {"self": d.t(d.m, d.n, d.k), "indices": [d.i(d.m, d.b), None, d.i(d.k, d.b)]},
)
_add(
    "gather",
    _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 2, "index": d.i(d.n, d.b, d.m, d.k)},
    shorter=lambda d: {"self": d.t(6, d.m, d.n), "dim": 2, "index": d.i(d.n, 4, d.m, d.k)},
)
_add(
    "scatter.src scatter_add",
    _=lambda d: {"self": d.t(d.b, d.m, 6), "dim": 2, "index": _distinct(d, d.b, d.m, 6, 3), "src": d.t(d.b, d.m, 3)},
    larger=lambda d: {
        "self": d.t(d.b, d.m, 6),
        "dim": 2,
        "index": _distinct(d, d.b, d.m, 6, 3),
        "src": d.constant(d.b + 1, d.m, 4),
    },
)
_add("scatter.value", _=lambda d: {"self": d.t(d.b, d.m), "dim": 1, "index": d.i(d.m, d.b, 2), "value": 2.0})
_add("index_add", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1, "index": d.i(d.m, 3), "source": d.t(d.b, 3, d.n)})
_add(
    "index_put",
    _=lambda d: {"self": d.t(d.m, d.n), "indices": [d.i(d.m, 3)], "values": d.t(3, d.n), "accumulate": True},
    deep=lambda d: {
        "self": d.t(d.m, d.n, d.k),
        "indices": [d.i(d.m, 3), d.i(d.n, 3)],
        "values": d.t(3, d.k),
        "accumulate": True,
    },
)
_add("one_hot", _=lambda d: {"self": d.i(5, d.b, d.m), "num_classes": 5})
_add(
    "grid_sampler",
    _=lambda d: {
        "input": d.t(d.b, d.c, 4, 5),
        "grid": d.positive(d.b, d.m, d.n, 2),
        "interpolation_mode": 0,
        "padding_mode": 0,
        "align_corners": False,
    },
)


def _distinct(d: Draw, b: int, m: int, size: int, count: int) -> Tensor:
    return torch.stack(
        [torch.stack([torch.from_numpy(d.random.permutation(size)[:count]) for _ in range(m)]) for _ in range(b)]
    )


def _lstm(d: Draw) -> Arguments:
    weights = [d.t(4 * d.k, d.n), d.t(4 * d.k, d.k), d.t(4 * d.k), d.t(4 * d.k)]
    return {
        "input": d.t(d.m, d.b, d.n),
        "hx": [d.t(1, d.b, d.k), d.t(1, d.b, d.k)],
        "params": weights,
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": False,
        "bidirectional": False,
        "batch_first": False,
    }


def _gru(d: Draw) -> Arguments:
    weights = [d.t(3 * d.k, d.n), d.t(3 * d.k, d.k), d.t(3 * d.k), d.t(3 * d.k)]
    return {
        "input": d.t(d.b, d.m, d.n),
        "hx": d.t(1, d.b, d.k),
        "params": weights,
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": False,
        "bidirectional": False,
        "batch_first": True,
    }


_add("lstm.input", _=_lstm)
_add("gru.input", _=_gru)


def _conv(
    dims: int,
    kernel: int,
    stride: int,
    padding: Any,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
    length: int = 12,
) -> Callable[[Draw], Arguments]:
    def case(d: Draw) -> Arguments:
        channels, out = 2 * groups, 3 * groups
        found: Arguments = {
            "input": d.t(d.b, channels, *([length] * dims)),
            "weight": d.t(out, channels // groups, *([kernel] * dims)),
        }
        found |= {"bias": d.t(out)} if bias else {}
        padding_given = padding if isinstance(padding, str) else [padding] * dims
        return {
            **found,
            "stride": [stride] * dims,
            "padding": padding_given,
            "dilation": [dilation] * dims,
            "groups": groups,
        }

    return case


_add(
    "conv1d",
    same=_conv(1, 3, 1, 1),
    wide=_conv(1, 7, 1, 3),
    stride=_conv(1, 3, 2, 1),
    patches=_conv(1, 4, 4, 0),
    dilated=_conv(1, 3, 1, 2, dilation=2),
    groups=_conv(1, 3, 1, 1, groups=2),
    valid=_conv(1, 3, 1, 0),
    stride_two=_conv(1, 2, 2, 0, bias=False),
    six=_conv(1, 6, 2, 2),
)
_add("conv1d.padding", same=_conv(1, 3, 1, "same"), even=_conv(1, 4, 1, "same"))
_add(
    "conv2d",
    same=_conv(2, 3, 1, 1, length=6),
    stem=_conv(2, 7, 2, 3, length=8),
    patches=_conv(2, 2, 2, 0, length=4),
    depthwise=_conv(2, 3, 1, 1, groups=4, length=6),
)
_add("conv3d", same=_conv(3, 3, 1, 1, length=4, bias=False))


def _upconv(
    kernel: int, stride: int, padding: int, output_padding: int, groups: int = 1, dims: int = 1
) -> Callable[[Draw], Arguments]:
    def case(d: Draw) -> Arguments:
        return {
            "input": d.t(d.b, 2 * groups, *([6] * dims)),
            "weight": d.t(2 * groups, 3, *([kernel] * dims)),
            "bias": d.t(3 * groups),
            "stride": [stride] * dims,
            "padding": [padding] * dims,
            "output_padding": [output_padding] * dims,
            "groups": groups,
        }

    return case


_add(
    "conv_transpose1d",
    two=_upconv(2, 2, 0, 0),
    three=_upconv(3, 2, 1, 1),
    four=_upconv(4, 2, 1, 0),
    same=_upconv(3, 1, 1, 0),
    groups=_upconv(4, 2, 1, 0, groups=2),
    gap=_upconv(2, 3, 0, 1),
)
_add("conv_transpose2d.input", _=_upconv(4, 2, 1, 0, dims=2))


def _pool(dims: int, kernel: int, stride: int, padding: int, **more: Any) -> Callable[[Draw], Arguments]:
    def case(d: Draw) -> Arguments:
        each = [[value] * dims for value in (kernel, stride, padding)]
        return {
            "self": d.t(d.b, d.c, *([8] * dims)),
            **dict(zip(("kernel_size", "stride", "padding"), each, strict=True)),
            **more,
        }

    return case


_add(
    "max_pool2d max_pool2d_with_indices avg_pool2d",
    halves=_pool(2, 2, 2, 0),
    stem=_pool(2, 3, 2, 1),
    same=_pool(2, 3, 1, 1),
)
_add("avg_pool2d", uncounted=_pool(2, 3, 2, 1, count_include_pad=False))
_add("max_pool1d avg_pool1d", same=_pool(1, 3, 1, 1))
_add("max_pool3d avg_pool3d", halves=_pool(3, 2, 2, 0))
_add(
    "adaptive_avg_pool2d adaptive_max_pool2d",
    one=lambda d: {"self": d.t(d.b, d.c, 4, 6), "output_size": [1, 1]},
    some=lambda d: {"self": d.t(d.b, d.c, 4, 6), "output_size": [2, 3]},
    odd=lambda d: {"self": d.t(d.b, d.c, 5, 6), "output_size": [2, 6]},
)
_add("adaptive_avg_pool1d", _=lambda d: {"self": d.t(d.b, d.c, 8), "output_size": [4]})
_add(
    "upsample_nearest2d.vec",
    scale=lambda d: {"input": d.t(d.b, d.c, 4, 3), "scale_factors": [2.0, 2.0]},
    size=lambda d: {"input": d.t(d.b, d.c, 4, 3), "output_size": [8, 6]},
)
_add(
    "upsample_bilinear2d.vec", _=lambda d: {"input": d.t(d.b, d.c, 4, 3), "output_size": [8, 6], "align_corners": False}
)


# --- what is left: names for the same, and what is rarely seen --------------------------------------------------------

_add("ne.Tensor le.Tensor gt.Tensor", _=lambda d: {"self": d.i(3, d.b, d.m), "other": d.i(3, d.m)})
_add("logical_and logical_or logical_xor", _=lambda d: {"self": d.mask(d.b, d.m), "other": d.mask(d.m)})
_add(
    "bitwise_or.Tensor bitwise_xor.Tensor __and__.Tensor __or__.Tensor __xor__.Tensor",
    _=lambda d: {"self": d.mask(d.b, d.m), "other": d.mask(d.m)},
)
_add("bitwise_not", _=lambda d: {"self": d.mask(d.b, d.m)})
_add(
    "bitwise_left_shift.Tensor bitwise_right_shift.Tensor", _=lambda d: {"self": d.i(9, d.b, d.m), "other": d.i(3, d.m)}
)
_add(
    "isinf isfinite positive conj real detach contiguous lift_fresh_copy lift_fresh ravel _to_copy nansum msort",
    _=UNARY,
)
_add("floor_divide remainder.Tensor fmod.Tensor", _=lambda d: {"self": d.i(9, d.b, d.m), "other": d.i(3, d.m) + 1})
_add("heaviside", _=lambda d: {"self": d.constant(d.b, d.m), "values": d.constant(d.m)})
_add("copy", _=lambda d: {"self": d.constant(d.b, d.m), "src": d.constant(d.m)})
_add("clamp_max", _=lambda d: {"self": d.t(d.b, d.m), "max": 0.1})
_add("clip", _=lambda d: {"self": d.t(d.b, d.m), "min": -0.5, "max": 0.5})
_add("xlogy.Tensor", _=lambda d: {"self": d.t(d.b, d.m), "other": d.positive(d.m)})
_add("multiply.Tensor hypot min.other", _=lambda d: {"self": d.t(d.b, d.m), "other": d.t(d.m)})
_add("divide.Tensor true_divide.Tensor", _=lambda d: {"self": d.t(d.b, d.m), "other": d.positive(d.m)})
_add("native_dropout", _=lambda d: {"input": d.t(d.b, d.m), "p": 0.5, "train": False})
_add("feature_dropout alpha_dropout", _=lambda d: {"input": d.t(d.b, d.m), "p": 0.5, "train": False})
_add("ger", _=lambda d: {"self": d.t(d.m), "vec2": d.t(d.n)})
_add("all.dim", _=lambda d: {"self": d.mask(d.b, d.m), "dim": 1})
_add("var_mean.correction std_mean.correction", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": [1], "correction": 1})
_add("argmin", _=lambda d: {"self": d.t(d.b, d.m), "dim": 1})
_add("mode", _=lambda d: {"self": d.t(d.b, d.m), "dim": 1})
_add("aminmax", _=lambda d: {"self": d.t(d.b, d.m), "dim": 1})
_add("_softmax _log_softmax", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1, "half_to_float": False})
_add("special_softmax", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1})
_add("logcumsumexp cummax cummin", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1})
_add(
    "native_layer_norm",
    _=lambda d: {
        "input": d.t(d.b, d.m, d.n),
        "normalized_shape": [d.n],
        "weight": d.t(d.n),
        "bias": d.t(d.n),
        "eps": 1e-5,
    },
)
_add(
    "native_batch_norm",
    _=lambda d: {
        "input": d.t(d.b, d.c, d.m),
        "weight": d.t(d.c),
        "bias": d.t(d.c),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    },
)
_add("nll_loss", _=lambda d: {"self": d.t(d.b, 5), "target": d.i(5, d.b)})
_add("nll_loss2d", _=lambda d: {"self": d.t(d.b, 5, d.m, d.n), "target": d.i(5, d.b, d.m, d.n)})
_add("pairwise_distance", _=lambda d: {"x1": d.t(d.b, d.m), "x2": d.t(d.b, d.m)})
_add("reshape_as", _=lambda d: {"self": d.t(d.b, d.m * d.n), "other": d.t(d.b, d.m, d.n)})
_add("view_copy", _=lambda d: {"self": d.t(d.b, d.m, d.n), "size": [d.b * d.m, d.n]})
_add("squeeze_copy.dim", _=lambda d: {"self": d.t(d.b, 1, d.m), "dim": 1})
_add("unsqueeze_copy", _=lambda d: {"self": d.t(d.b, d.m), "dim": 1})
_add("atleast_1d atleast_2d", _=lambda d: {"self": d.t(d.m)})
_add("permute_copy", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dims": [1, 2, 0]})
_add("swapaxes", _=lambda d: {"self": d.t(d.b, d.m, d.n), "axis0": 0, "axis1": 2})
_add("swapdims transpose_copy.int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim0": 0, "dim1": 2})
_add("numpy_T mT matrix_H t_copy", _=lambda d: {"self": d.t(d.b, d.m)})
_add("moveaxis.int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "source": 2, "destination": 0})
_add("broadcast_to expand_copy", _=lambda d: {"self": d.t(d.m, 1), "size": [d.b, d.m, d.n]})
_add("slice_copy.Tensor", _=lambda d: {"self": d.t(d.b, 2 * d.m), "dim": 1, "start": 0, "end": d.m})
_add("select_copy.int", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 1, "index": 0})
_add("select_scatter", _=lambda d: {"self": d.t(d.b, d.m, d.n), "src": d.t(d.b, d.n), "dim": 1, "index": 1})
_add("slice_scatter", _=lambda d: {"self": d.t(d.b, 6, d.n), "src": d.t(d.b, 3, d.n), "dim": 1, "start": 0, "end": 3})
_add("tensor_split.sections", _=lambda d: {"self": d.t(d.b, 2 * d.m), "sections": 2, "dim": 1})
_add("unsafe_split.Tensor", _=lambda d: {"self": d.t(d.b, 2 * d.m), "split_size": d.m, "dim": 1})
_add("concat concatenate", _=lambda d: {"tensors": [d.t(d.b, d.m), d.t(d.b, d.m)], "dim": 1})
_add("pad", _=lambda d: {"self": d.t(d.b, d.m, d.n), "pad": [0, 0, 1, 1], "mode": "constant", "value": 0.0})
_add("reflection_pad2d replication_pad2d", _=lambda d: {"self": d.t(d.b, d.c, 4, 5), "padding": [1, 1, 0, 0]})
_add("as_strided", _=lambda d: {"self": d.t(d.m, d.n), "size": [d.n, d.m], "stride": [1, d.n]})
_add(
    "im2col",
    _=lambda d: {
        "self": d.t(d.b, d.c, 4, 4),
        "kernel_size": [2, 2],
        "dilation": [1, 1],
        "padding": [0, 0],
        "stride": [2, 2],
    },
)
_add(
    "col2im",
    _=lambda d: {
        "self": d.t(d.b, d.c * 4, 4),
        "output_size": [4, 4],
        "kernel_size": [2, 2],
        "dilation": [1, 1],
        "padding": [0, 0],
        "stride": [2, 2],
    },
)
_add(
    "convolution",
    _=lambda d: {**_conv(2, 3, 1, 1, length=6)(d), "transposed": False, "output_padding": [0, 0]},
    transposed=lambda d: {**_upconv(4, 2, 1, 0, dims=2)(d), "dilation": [1, 1], "transposed": True},
)
_add("conv_transpose3d.input", _=_upconv(2, 2, 0, 0, dims=3))
_add("adaptive_max_pool1d", _=lambda d: {"self": d.t(d.b, d.c, 8), "output_size": [4]})
_add("adaptive_max_pool3d adaptive_avg_pool3d", _=lambda d: {"self": d.t(d.b, d.c, 4, 4, 2), "output_size": [2, 2, 1]})
_add("upsample_nearest1d.vec upsample_linear1d.vec", _=lambda d: _larger(d, 1))
_add("upsample_nearest3d.vec upsample_trilinear3d.vec", _=lambda d: _larger(d, 3))
_add("upsample_bicubic2d.vec _upsample_nearest_exact2d.vec _upsample_bilinear2d_aa.vec", _=lambda d: _larger(d, 2))
_add(
    "_embedding_bag",
    _=lambda d: {"weight": d.t(6, d.n), "indices": d.i(6, 8), **BAGS, "mode": 0, "padding_idx": -1},
)
_add(
    "_embedding_bag_forward_only",
    _=lambda d: {"weight": d.constant(6, d.n), "indices": d.i(6, 8), **BAGS, "mode": 0, "padding_idx": -1},
)
_add("_unsafe_index.Tensor", _=lambda d: {"self": d.t(d.b, d.m, d.n), "indices": [None, d.i(d.m, d.k)]})
_add(
    "_unsafe_index_put",
    _=lambda d: {"self": d.t(d.m, d.n), "indices": [d.i(d.m, 3)], "values": d.t(3, d.n), "accumulate": True},
)
_add("take_along_dim", _=lambda d: {"self": d.t(d.b, d.m, d.n), "dim": 2, "indices": d.i(d.n, d.b, d.m, d.k)})
_add(
    "scatter_reduce.two",
    _=lambda d: {
        "self": d.t(d.b, d.m, 6),
        "dim": 2,
        "index": d.i(6, d.b, d.m, 3),
        "src": d.t(d.b, d.m, 3),
        "reduce": "sum",
    },
)
_add(
    "index_copy",
    _=lambda d: {"self": d.t(d.b, 6, d.n), "dim": 1, "index": torch.tensor([4, 0, 3]), "source": d.t(d.b, 3, d.n)},
)
_add(
    "index_fill.int_Scalar",
    _=lambda d: {"self": d.t(d.b, 6, d.n), "dim": 1, "index": torch.tensor([4, 0]), "value": 2.0},
)
_add("grid_sampler_2d", _=CASES["grid_sampler:_"])
_add("masked_scatter", _=lambda d: {"self": d.t(d.b, d.m), "mask": d.mask(d.b, d.m), "source": d.t(d.b, d.m)})
_add("masked_select", _=lambda d: {"self": d.t(d.b, d.m), "mask": d.mask(d.b, d.m)})
_add("histc", _=lambda d: {"self": d.constant(d.b), "bins": 4, "min": 0, "max": 1})
_add("bincount", _=lambda d: {"self": d.i(5, 7)})
_add("nonzero", _=lambda d: {"self": d.i(5, d.b, d.m)})


def _rnn(d: Draw) -> Arguments:
    return {**_gru(d), "params": [d.t(d.k, d.n), d.t(d.k, d.k), d.t(d.k), d.t(d.k)]}


_add("rnn_tanh.input rnn_relu.input", _=_rnn)


def _larger(d: Draw, dims: int) -> Arguments:
    corners = {} if "nearest" in d.op else {"align_corners": False}
    return {"input": d.t(d.b, d.c, *([3] * dims)), "output_size": [6] * dims, **corners}


def _grouped(d: Draw) -> Arguments:
    ends = torch.tensor([2, 5, 5, 8], dtype=torch.int32)
    return {"input": d.t(8, d.m), "weight": d.t(4, d.m, d.n), "offs": ends}


_add("transformers.grouped_mm_fallback", _=_grouped)
