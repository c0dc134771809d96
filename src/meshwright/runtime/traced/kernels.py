"""Calls that name sizes, places or counts of the whole, on local operands.

Where a result is a sum of what several ranks make, what is added once (a bias) is added by the first of them. A mean
is a sum over the whole's count. A table of which a rank has some rows gives zeros for the others. Along a dim of space
that is cut an operand comes with its neighbours' rows (`LocalCall.halo`), in place of that much padding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.io.rules.pattern import positive
from meshwright.runtime.traced.local import KERNELS, LocalCall, in_double, invoke, kernel

# --- shapes -----------------------------------------------------------------------------------------------------------


@kernel(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
    "ravel",
    "squeeze_copy",
    "unsqueeze_copy",
    "view_copy",
    "_reshape_alias",
    "atleast_1d",
    "atleast_2d",
)
def _regrouped(local: LocalCall) -> tuple[Tensor, ...]:
    return (local.tensor(next(iter(local.operands))).reshape(local.shape()),)


@kernel("expand", "expand_as", "broadcast_to", "expand_copy")
def _expanded(local: LocalCall) -> tuple[Tensor, ...]:
    return (local.tensor("self").expand(local.shape()),)


@kernel("clone", "contiguous", "alias", "detach_", "requires_grad_", "identity", "lift_fresh_copy", "lift_fresh")
def _same(local: LocalCall) -> tuple[Tensor, ...]:
    x = local.tensor("self")
    return (x.view_as(x),)


@kernel("to", "_to_copy", "type_as")
def _converted(local: LocalCall) -> tuple[Tensor, ...]:
    x, other = local.tensor("self"), local.optional("other")
    dtype = in_double(local.get("dtype", x.dtype)) if other is None else other.dtype
    return (x.to(dtype),)


@kernel("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided")
def _constant(local: LocalCall) -> tuple[Tensor, ...]:
    return invoke(local, size=local.shape())


@kernel("arange")
def _counted(local: LocalCall) -> tuple[Tensor, ...]:
    start, step = local.get("start", 0), local.get("step", 1)
    (length,) = local.shape() or [1]
    # One that counts the sequences has as many as there are now, not as were traced.
    is_as_traced = math.ceil((local.get("end") - start) / step) == length
    return invoke(local) if is_as_traced else invoke(local, end=start + length * step)


@kernel("repeat", "tile")
def _repeated(local: LocalCall) -> tuple[Tensor, ...]:
    x, shape = local.tensor("self"), local.shape()
    own = [1] * (len(shape) - x.dim()) + list(x.shape)
    return (x.repeat([after // before if before else 1 for before, after in zip(own, shape, strict=True)]),)


@kernel("repeat_interleave.self_int")
def _repeated_in_place(local: LocalCall) -> tuple[Tensor, ...]:
    x, dim = local.tensor("self"), local.get("dim")
    if dim is None:
        return invoke(local)
    at = positive(dim, x.dim())
    dims = local.result_arrays[0][at]
    inner = dims[len(local.operand_arrays[0][at]) :]
    return (x.repeat_interleave(local.length(inner), at),)


@kernel("slice", "slice_copy", "narrow")
def _sliced(local: LocalCall) -> tuple[Tensor, ...]:
    x = local.tensor("self")
    at = positive(local.get("dim", 0), x.dim())
    dims = local.operand_arrays[0][at]
    size = local.whole_length(dims)
    start = local.get("start", 0)
    start = max(0, start + size) if start < 0 else min(start, size)
    stop = start + local.get("length", 0) if "narrow" in local.call.op else local.get("end", size)
    stop = max(0, stop + size) if stop < 0 else min(stop, size)
    if x.shape[at] == size:
        return (x[(slice(None),) * at + (slice(start, stop, local.get("step", 1)),)],)
    places = local.positions(dims)
    wanted = (places >= start) & (places < stop) & ((places - start) % local.get("step", 1) == 0)
    return (x.index_select(at, wanted.nonzero().flatten()),)


@kernel("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split")
def _parts(local: LocalCall) -> tuple[Tensor, ...]:
    x = local.tensor("self")
    at = positive(local.get("dim", 0), x.dim())
    return tuple(x.split([local.shape(index)[at] for index in range(len(local.result_arrays))], at))


@kernel("pixel_shuffle", "pixel_unshuffle")
def _shuffled(local: LocalCall) -> tuple[Tensor, ...]:
    # Three dims of five, opened, put in the other order, and closed again.
    x = local.tensor("self")
    source, target = local.operand_arrays[0], local.result_arrays[0]
    before, after = ([dim for dims in array for dim in dims] for array in (source, target))
    opened = x.reshape([local.length([dim]) for dim in before])
    return (opened.permute([before.index(dim) for dim in after]).reshape(local.shape()),)


# --- products ---------------------------------------------------------------------------------------------------------


def _once(local: LocalCall, term: Tensor | None) -> Tensor | None:
    """What is added once, in the result of one rank: kept in the graph on all, so that all have the same backward."""
    return term if term is None or local.is_first else term * 0.0


@kernel("linear", "bilinear")
def _with_bias(local: LocalCall) -> tuple[Tensor, ...]:
    bias = _once(local, local.optional("bias"))
    return invoke(local, {} if bias is None else {"bias": bias})


@kernel("addmm", "baddbmm", "addbmm", "addmv")
def _plus_product(local: LocalCall) -> tuple[Tensor, ...]:
    term = _once(local, local.tensor("self"))
    assert term is not None
    return invoke(local, {"self": term})


@kernel("_grouped_mm")
def _grouped(local: LocalCall) -> tuple[Tensor, ...]:
    """Rows sorted by expert, each times the matrix of its expert; rows of experts that are elsewhere give zeros."""
    rows, matrices, ends = (operand for operand in local.operands.values() if isinstance(operand, Tensor))
    experts = local.positions(local.operand_arrays[1][0]).tolist()
    bounds = [0, *ends.tolist()]
    assert len(bounds) == local.whole_length(local.operand_arrays[1][0]) + 1, local.call.name
    parts = []
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        here = expert in experts
        matrix = matrices[experts.index(expert)] if here else torch.zeros_like(matrices[0])
        parts.append(rows[start:stop] @ matrix)
    parts.append(rows.new_zeros(rows.shape[0] - bounds[-1], matrices.shape[2]))
    return (torch.cat(parts),)


KERNELS.add("transformers.grouped_mm_fallback", _grouped)


# --- sums and means ---------------------------------------------------------------------------------------------------


@kernel("mean")
def _mean(local: LocalCall) -> tuple[Tensor, ...]:
    (mean,) = invoke(local)
    return (mean * _summed_share(local),)


def _summed_share(local: LocalCall) -> float:
    """Of the elements that are summed over for one of the result, the share that this rank has."""
    kept = {dim for dims in local.result_arrays[0] for dim in dims}
    gone = [dim for dims in local.operand_arrays[0] for dim in dims if dim not in kept]
    return local.length(gone) / local.whole_length(gone)


_NONE, _MEAN, _SUM = range(3)


@kernel("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div")
@kernel("binary_cross_entropy_with_logits")
def _loss(local: LocalCall) -> tuple[Tensor, ...]:
    if local.get("reduction", _MEAN) != _MEAN:
        return invoke(local)
    dims = {dim for array in local.operand_arrays for dims in array for dim in dims}
    return tuple(total / local.whole_length(sorted(dims)) for total in invoke(local, reduction=_SUM))


@kernel("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
def _cross_entropy(local: LocalCall) -> tuple[Tensor, ...]:
    """The mean is over the targets that count, by their weight, of all ranks that have rows."""
    if local.get("reduction", _MEAN) != _MEAN:
        return invoke(local)
    total = invoke(local, reduction=_SUM)[0]
    target, weight = local.tensor("target"), local.optional("weight")
    if target.is_floating_point():
        classes = 0 if len(local.operand_arrays[0]) == 1 else 1
        rows = [dims for dim, dims in enumerate(local.operand_arrays[0]) if dim != classes]
        return (total / math.prod(map(local.whole_length, rows)),)
    counted = target != local.get("ignore_index", -100)
    each = counted.to(total.dtype)
    if weight is not None:
        each = each * weight.detach()[target.clamp(min=0)]
    return (total / local.total(each.sum()),)


# --- tables -----------------------------------------------------------------------------------------------------------


def _rows_here(local: LocalCall, indices: Tensor) -> tuple[Tensor, Tensor | None]:
    """Local row numbers of a table's rows, and which of them this rank has (None: all)."""
    rows = local.array("weight")[0]
    if not local.is_cut(rows):
        return indices, None
    places = local.positions(rows)
    table = torch.full((local.whole_length(rows),), -1, dtype=torch.int64)
    table[places] = torch.arange(len(places))
    found = table[indices.long()]
    return found.clamp(min=0), found >= 0


def _padding_row(local: LocalCall) -> int:
    """The local number of the row that has no gradient, -1 where there is none here."""
    given = local.get("padding_idx", -1)
    if given < 0:
        return -1
    found, is_here = _rows_here(local, torch.tensor([given]))
    return int(found) if is_here is None or bool(is_here) else -1


@kernel("embedding")
def _embedding(local: LocalCall) -> tuple[Tensor, ...]:
    weight = local.tensor("weight")
    found, is_here = _rows_here(local, local.tensor("indices"))
    (rows,) = invoke(local, {"weight": weight, "indices": found}, padding_idx=_padding_row(local))
    return (rows if is_here is None else rows * is_here.unsqueeze(-1).to(rows.dtype),)


@kernel("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(local: LocalCall) -> tuple[Tensor, ...]:
    weight, given = local.tensor("weight"), local.optional("per_sample_weights")
    found, is_here = _rows_here(local, local.tensor("indices"))
    if is_here is None:
        results = invoke(local)
    else:
        kept = is_here.to(weight.dtype)
        padding, no_padding = local.get("padding_idx"), -1 if "._" in local.call.op else None
        if padding is not None and padding >= 0:
            kept = kept * (local.tensor("indices") != padding).to(weight.dtype)
        each = kept if given is None else kept * given
        results = invoke(local, {"indices": found, "per_sample_weights": each}, padding_idx=no_padding)
    # The others serve PyTorch's own backward, differ in shape between devices, and are read by nobody else.
    others = (torch.zeros(local.shape(index), dtype=torch.int64) for index in range(1, len(results)))
    return (results[0], *others)


@kernel("histc")
def _histogram(local: LocalCall) -> tuple[Tensor, ...]:
    x = local.tensor("self")
    (counts,) = invoke(local, {"self": x.to(torch.float64)})
    return (counts.to(x.dtype),)


# --- attention, norms, dropout ----------------------------------------------------------------------------------------


@kernel("dropout", "feature_dropout", "alpha_dropout")
def _kept(local: LocalCall) -> tuple[Tensor, ...]:
    # What is dropped is drawn, and two runs that draw differently cannot be compared: nothing is.
    x = local.tensor("input")
    return (x.view_as(x),)


@kernel("native_dropout")
def _kept_and_mask(local: LocalCall) -> tuple[Tensor, ...]:
    x = local.tensor("input")
    return x.view_as(x), torch.ones_like(x, dtype=torch.bool)


@kernel("scaled_dot_product_attention")
def _attention(local: LocalCall) -> tuple[Tensor, ...]:
    return invoke(local, dropout_p=0.0)


@kernel("group_norm")
def _group_norm(local: LocalCall) -> tuple[Tensor, ...]:
    x = local.tensor("input")
    whole = local.whole_length(local.operand_arrays[0][1])
    return invoke(local, num_groups=local.get("num_groups") * x.shape[1] // whole)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel (dim 1) the sum of its elements and that of their squares."""
    rest = [dim for dim in range(x.dim()) if dim != 1]
    return x.sum(rest), (x * x).sum(rest)


@kernel("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
def _batch_norm(local: LocalCall) -> tuple[Tensor, ...]:
    if not (local.get("training", False) or local.get("train", False)):
        return invoke(local)
    x = local.tensor("input")
    rest = [dims for dim, dims in enumerate(local.operand_arrays[0]) if dim != 1]
    count = math.prod(map(local.whole_length, rest))
    mean, square = local.tensor("sum") / count, local.tensor("square_sum") / count
    shape = [1, -1] + [1] * (x.dim() - 2)
    rstd = (square - mean * mean + local.get("eps", 1e-5)).rsqrt()
    result = (x - mean.view(shape)) * rstd.view(shape)
    weight, bias = local.optional("weight"), local.optional("bias")
    result = result if weight is None else result * weight.view(shape)
    result = result if bias is None else result + bias.view(shape)
    # Every rank has all of mean and deviation; as summands they are its share of them.
    share = x.numel() / x.shape[1] / count
    return (result, mean * share, rstd * share)[: len(local.result_arrays)]


# --- space ------------------------------------------------------------------------------------------------------------


def _each(value: Any, dims: int, default: int) -> list[int]:
    if value is None or (not isinstance(value, int) and len(value) == 0):
        return [default] * dims
    found = [value] if isinstance(value, int) else list(value)
    return found * dims if len(found) == 1 else found


def _halo(local: LocalCall, dims: Sequence[str]) -> tuple[int, int]:
    """Rows before and after the local piece of an array's dim; its outermost named dim is the one that is cut."""
    return next((local.halo[dim] for dim in dims if dim in local.halo), (0, 0))


def _outside(local: LocalCall, dims: Sequence[str]) -> tuple[int, int]:
    """How many of these rows lie beyond the ends of the whole."""
    before, after = _halo(local, dims)
    places = local.positions(dims)
    start, stop = int(places[0]), int(places[-1]) + 1
    return max(0, before - start), max(0, stop + after - local.whole_length(dims))


def _windowed(
    local: LocalCall, x: Tensor, kernels: list[int], strides: list[int], dilations: list[int], paddings: list[Any]
) -> tuple[Tensor, list[int]]:
    """An operand padded as its window needs along dims that are cut, and the padding that is left to do."""
    first = x.dim() - len(kernels)
    left = []
    for dim, (size, stride, dilation, padding) in enumerate(zip(kernels, strides, dilations, paddings, strict=True)):
        dims = local.operand_arrays[0][first + dim]
        if not local.is_cut(dims):
            left.append(padding)
            continue
        before, _ = _halo(local, dims)
        assert before >= padding, (local.call.name, dims)
        length = stride * (local.shape()[first + dim] - 1) + dilation * (size - 1) + 1
        x = x.narrow(first + dim, before - padding, length)
        left.append(0)
    return x, left


@kernel("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def _convolution(local: LocalCall) -> tuple[Tensor, ...]:
    if local.get("transposed", False):
        return _transposed(local)
    x, weight = local.tensor("input"), local.tensor("weight")
    dims = weight.dim() - 2
    strides, dilations = (_each(local.get(name), dims, 1) for name in ("stride", "dilation"))
    padding = local.get("padding", 0)
    if padding == "same":  # the larger half comes after, which only a padding by hand can say
        spans = [dilation * (size - 1) for dilation, size in zip(dilations, weight.shape[2:], strict=True)]
        paddings = [span // 2 for span in spans]
        for dim, span in enumerate(spans):
            if not local.is_cut(local.operand_arrays[0][2 + dim]) and span % 2:
                x = F.pad(x, [0, 0] * (dims - 1 - dim) + [0, 1])
    else:
        paddings = [0] * dims if padding == "valid" else _each(padding, dims, 0)
    x, left = _windowed(local, x, list(weight.shape[2:]), strides, dilations, paddings)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    groups = x.shape[1] // weight.shape[1]
    bias = _once(local, local.optional("bias"))
    return (convolve(x, weight, bias, strides, left, dilations, groups),)


@kernel("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(local: LocalCall) -> tuple[Tensor, ...]:
    x, weight = local.tensor("input"), local.tensor("weight")
    dims, shape = weight.dim() - 2, local.shape()
    strides, dilations = (_each(local.get(name), dims, 1) for name in ("stride", "dilation"))
    paddings, extra = (_each(local.get(name), dims, 0) for name in ("padding", "output_padding"))
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    groups = local.length(local.result_arrays[0][1]) // weight.shape[1]
    spread = convolve(x, weight, None, strides, 0, 0, groups, dilations)
    for dim in range(dims):
        # Row 0 of what was spread is row `stride * first input row - padding` of the whole output.
        before, _ = _halo(local, local.operand_arrays[0][2 + dim])
        start, length = strides[dim] * before + paddings[dim], shape[2 + dim]
        lacking = max(0, start + length - spread.shape[2 + dim])
        assert lacking <= max(extra[dim], strides[dim]), (local.call.name, lacking)
        if lacking:
            spread = F.pad(spread, [0, 0] * (dims - 1 - dim) + [0, lacking])
        spread = spread.narrow(2 + dim, start, length)
    bias = _once(local, local.optional("bias"))
    return (spread if bias is None else spread + bias.view([1, -1] + [1] * dims),)


@kernel(*(f"{kind}_pool{dims}d" for kind in ("max", "avg") for dims in (1, 2, 3)), "max_pool2d_with_indices")
def _pool(local: LocalCall) -> tuple[Tensor, ...]:
    op = local.call.op.split(".")[1]
    x = local.tensor(next(iter(local.operands)))
    dims = int(op.split("pool")[1][0])
    first = x.dim() - dims
    spaces = local.operand_arrays[0][first:]
    if not any(map(local.is_cut, spaces)):
        return invoke(local)
    kernels = _each(local.get("kernel_size"), dims, 1)
    strides = [one or other for one, other in zip(_each(local.get("stride"), dims, 0), kernels, strict=True)]
    dilations, paddings = _each(local.get("dilation"), dims, 1), _each(local.get("padding"), dims, 0)
    largest = op.startswith("max")
    inside = _inside(local, x, first)
    if largest:
        x = x.masked_fill(~inside, -math.inf)
    cut, left = _windowed(local, x, kernels, strides, dilations, paddings)
    name = next(iter(local.operands))
    if "with_indices" in op:
        result, places = invoke(local, {name: cut}, padding=left)
        return result, _whole_places(local, places, cut, first, paddings, left, strides)
    if largest:
        return invoke(local, {name: cut}, padding=left)
    if local.get("divisor_override") or local.get("count_include_pad", True):
        return invoke(local, {name: cut}, padding=left)
    counted, _ = _windowed(local, inside.to(x.dtype).expand(x.shape), kernels, strides, dilations, paddings)
    sums, counts = (invoke(local, {name: each}, padding=left, count_include_pad=True)[0] for each in (cut, counted))
    return (sums / counts,)


def _inside(local: LocalCall, x: Tensor, first: int) -> Tensor:
    """Of an operand with its neighbours' rows: which elements are none beyond the ends of the whole."""
    inside = torch.ones((1,) * x.dim(), dtype=torch.bool)
    for dim in range(first, x.dim()):
        dims = local.operand_arrays[0][dim]
        if local.is_cut(dims):
            before, after = _outside(local, dims)
            rows = torch.ones(x.shape[dim], dtype=torch.bool)
            rows[:before] = False
            rows[x.shape[dim] - after :] = False
            inside = inside & rows.view([-1 if each == dim else 1 for each in range(x.dim())])
    return inside


def _whole_places(
    local: LocalCall,
    places: Tensor,
    cut: Tensor,
    first: int,
    paddings: Sequence[int],
    left: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Places in the flattened space of the whole, of places in that of a local operand."""
    spaces = local.operand_arrays[0][first:]
    found = torch.zeros_like(places)
    rest, width = places, 1
    for dim in reversed(range(len(spaces))):
        size = cut.shape[first + dim]
        row = rest % size
        if local.is_cut(spaces[dim]):
            start = int(local.positions(spaces[dim])[0])
            row = row + start - paddings[dim]
        found = found + row * width
        rest = rest // size
        width *= local.whole_length(spaces[dim])
    return found


@kernel(*(f"adaptive_{kind}_pool{dims}d" for kind in ("max", "avg") for dims in (1, 2, 3)))
def _adaptive_pool(local: LocalCall) -> tuple[Tensor, ...]:
    op = local.call.op.split(".")[1]
    name = next(iter(local.operands))
    dims = int(op.split("pool")[1][0])
    x, shape = local.tensor(name), local.shape()
    first = x.dim() - dims
    results = invoke(local, output_size=shape[first:])
    if op.startswith("adaptive_avg"):
        return (results[0] * _summed_share(local),)
    if len(results) == 1:
        return results
    return results[0], _whole_places(local, results[1], x, first, [0] * dims, [0] * dims, [1] * dims)


@kernel(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa",
)
def _resized(local: LocalCall) -> tuple[Tensor, ...]:
    if local.call.attributes.get("output_size") is None:
        return invoke(local)
    return invoke(local, output_size=local.shape()[2:])
