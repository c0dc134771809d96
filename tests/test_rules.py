"""The rules of ATen's operators, by execution: whatever a rule lets be cut is cut, the pieces are computed apart on
small tensors and put together, and must equal the whole. The calls are those of the models in `examples/models` and
of a list of modules that have what these lack."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.graph import Role
from meshwright.io.rules import RULES, Pattern, Seen, rule_of
from meshwright.io.rules.pattern import Array, factored
from meshwright.io.torch_graph import module_program
from meshwright.io.traced import Call, Program, Value

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "models"))
import architectures

MODELS = ("llama", "bert", "t5", "mixtral", "whisper", "resnet", "unet", "dlrm", "bags", "lstm", "moe_block")

#: Random, or judged by data of another kind than the random ones here.
NOT_RUN = {"aten.dropout", "aten.bernoulli", "aten.one_hot", "aten.embedding_bag", "transformers.grouped_mm_fallback"}


class Wrapped(nn.Module):
    """A function of tensors and weights as a module."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], *weights: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(shape)) for shape in weights)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.weights)


def long(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


F = functional
#: Modules that have one operator or two each: the function, its inputs, the shapes of its weights.
SINGLE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], tuple[tuple[int, ...], ...]]] = {
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=2), (torch.rand(4, 6, 12),), ((8, 6, 5),)),
    "conv2d strided": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), (torch.rand(4, 3, 12, 16),), ((8, 3, 3, 3),)),
    "conv2d dilated": (
        lambda x, w, b: F.conv2d(x, w, b, padding=4, dilation=2),
        (torch.rand(4, 3, 12, 16),),
        ((8, 3, 5, 5), (8,)),
    ),
    "conv2d grouped": (lambda x, w: F.conv2d(x, w, groups=4, padding=1), (torch.rand(4, 8, 6, 6),), ((12, 2, 3, 3),)),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, groups=8, padding=1), (torch.rand(4, 8, 6, 6),), ((8, 1, 3, 3),)),
    "conv2d valid": (lambda x, w: F.conv2d(x, w), (torch.rand(4, 3, 12, 16),), ((8, 3, 3, 3),)),
    "conv2d patches": (lambda x, w: F.conv2d(x, w, stride=4), (torch.rand(4, 3, 16, 16),), ((8, 3, 4, 4),)),
    "conv3d": (lambda x, w: F.conv3d(x, w, padding=1), (torch.rand(2, 3, 4, 6, 6),), ((4, 3, 3, 3, 3),)),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, stride=2), (torch.rand(4, 6, 4, 6),), ((6, 4, 2, 2),)),
    "conv_transpose2d wide": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1),
        (torch.rand(4, 6, 6, 8),),
        ((6, 4, 4, 4),),
    ),
    "conv_transpose2d grouped": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=2),
        (torch.rand(4, 6, 4, 6),),
        ((6, 4, 2, 2),),
    ),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (torch.rand(4, 6, 12, 8),), ()),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (torch.rand(4, 6, 12, 8),), ()),
    "adaptive": (lambda x: (F.adaptive_avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 1)), (torch.rand(4, 6, 8, 8),), ()),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), (torch.rand(4, 6, 8, 8),), ()),
    "bilinear up": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (torch.rand(4, 6, 8, 8),), ()),
    "group_norm": (lambda x, w, b: F.group_norm(x, 3, w, b), (torch.rand(4, 12, 6, 6),), ((12,), (12,))),
    "instance_norm": (lambda x: F.instance_norm(x), (torch.rand(4, 6, 6, 6),), ()),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6, 8), w, b), (torch.rand(4, 5, 6, 8),), ((6, 8), (6, 8))),
    "rms_norm": (lambda x, w: F.rms_norm(x, (8,), w), (torch.rand(4, 6, 8),), ((8,),)),
    "bilinear": (lambda x, y, w, b: F.bilinear(x, y, w, b), (torch.rand(4, 6), torch.rand(4, 8)), ((10, 6, 8), (10,))),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (torch.rand(4, 6),), ((6, 8), (8,))),
    "baddbmm": (
        lambda a, x, y: torch.baddbmm(a, x, y),
        (torch.rand(4, 6, 8), torch.rand(4, 6, 10), torch.rand(4, 10, 8)),
        (),
    ),
    "matmul broadcast": (lambda x, y: x @ y, (torch.rand(4, 1, 6, 8), torch.rand(4, 5, 8, 10)), ()),
    "matmul vector": (lambda x, w: x @ w, (torch.rand(4, 6, 8),), ((8,),)),
    "matmul squared": (lambda x: torch.bmm(x, x), (torch.rand(4, 6, 6),), ()),
    "einsum": (
        lambda x, y: torch.einsum("b...i,b...ij->b...j", x, y),
        (torch.rand(4, 5, 6), torch.rand(4, 5, 6, 8)),
        (),
    ),
    "einsum alone": (lambda x, y: torch.einsum("bij,bk->bk", x, y), (torch.rand(4, 5, 6), torch.rand(4, 8)), ()),
    "outer": (lambda x, w: torch.outer(x, w), (torch.rand(4),), ((6,),)),
    "sdpa": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        (torch.rand(4, 6, 8, 4), torch.rand(4, 6, 10, 4), torch.rand(4, 6, 10, 8)),
        (),
    ),
    "sdpa grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        (torch.rand(4, 12, 8, 4), torch.rand(4, 4, 8, 4), torch.rand(4, 4, 8, 4)),
        (),
    ),
    "sdpa masked": (
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m),
        (torch.rand(4, 6, 8, 4), torch.rand(4, 6, 10, 4), torch.rand(4, 1, 8, 10)),
        (),
    ),
    "cumsum sort topk": (
        lambda x: (x.cumsum(1), x.sort(-1)[0], x.topk(3, 1)[0], x.argmax(1)),
        (torch.rand(4, 6, 8),),
        (),
    ),
    "reductions": (
        lambda x: (
            x.sum(1),
            x.mean((0, 2), keepdim=True),
            x.amax(-1),
            x.var(1),
            x.norm(dim=2),
            x.logsumexp(1),
            x.prod(0),
        ),
        (torch.rand(4, 6, 8),),
        (),
    ),
    "slices": (
        lambda x: (x[:, 2:4], x[:, ::2], x[..., 1], x[:, 1:], x[:, :, :4], x.narrow(1, 3, 3)),
        (torch.rand(4, 6, 8),),
        (),
    ),
    "parts": (
        lambda x: (*x.chunk(3, 1), *x.split([2, 6], 2), *x.unbind(1), torch.stack([x, x], 1), torch.cat([x, x], 0)),
        (torch.rand(4, 6, 8),),
        (),
    ),
    "cat unequal": (lambda x, y: torch.cat([x, y], 1), (torch.rand(4, 6, 8), torch.rand(4, 2, 8)), ()),
    "pads": (lambda x: F.pad(x, (1, 2, 0, 0)), (torch.rand(4, 6, 8),), ()),
    "views": (
        lambda x: (
            x.view(4, 2, 3, 8).transpose(1, 3).reshape(4, -1),
            x.permute(2, 0, 1).unflatten(0, (2, 4)).flatten(1, 2),
            x.unsqueeze(1).expand(4, 3, 6, 8).reshape(4, 18, 8),
            x.repeat(1, 2, 1),
            x.repeat_interleave(3, 1),
            x.movedim(0, 2),
            x.flip(1),
            x.roll(1, 1),
            x.tril(),
            F.pixel_shuffle(x.view(4, 4, 4, 3), 2),
        ),
        (torch.rand(4, 6, 8),),
        (),
    ),
    "indexing": (
        lambda x, i: (x[:, i], x[i, :, i], x.index_select(1, i), x.gather(1, i[:, None, None].expand(4, 1, 8)), x[i]),
        (torch.rand(4, 6, 8), long(4)),
        (),
    ),
    "scatter": (
        lambda x, i, y: (x.scatter(1, i, y), x.scatter_add(1, i, y), x.index_add(1, i[0, :, 0], y)),
        (torch.rand(4, 6, 8), long(4, 3, 8), torch.rand(4, 3, 8)),
        (),
    ),
    "losses": (
        lambda x, t: (
            F.cross_entropy(x, t),
            F.cross_entropy(x, t, reduction="none"),
            F.nll_loss(x, t, reduction="sum"),
        ),
        (torch.rand(4, 6), long(4)),
        (),
    ),
    "mse": (
        lambda x, y: (F.mse_loss(x, y), F.l1_loss(x, y, reduction="sum")),
        (torch.rand(4, 6), torch.rand(4, 6)),
        (),
    ),
    "pointwise": (
        lambda x, y: (
            *(
                x * y,
                x / y,
                x - y,
                x**2,
                2**x,
                torch.maximum(x, y),
                torch.where(x > y, x, y),
                x.masked_fill(y > 0, 1.0),
            ),
            *(x.sigmoid(), x.tanh(), x.exp(), x.abs(), F.gelu(x), F.silu(x), F.softplus(x), F.glu(x, 1), x.clamp(0, 1)),
            *(torch.addcmul(x, x, y), torch.lerp(x, y, 0.3), x.to(torch.float16), F.one_hot(x.long() % 3, 3)),
        ),
        (torch.rand(4, 6, 8), torch.rand(8)),
        (),
    ),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, torch.zeros(6), torch.ones(6), w, b, training=True),
        (torch.rand(4, 6, 8),),
        ((6,), (6,)),
    ),
    "in place": (lambda x: x.mul(2).add_(1).relu_(), (torch.rand(4, 6),), ()),
}


@cache
def program_of(name: str) -> Program:
    if name in SINGLE:
        function, inputs, weights = SINGLE[name]
        return module_program(Wrapped(function, *weights), inputs, name=name)
    with torch.device("meta"):
        return module_program(*getattr(architectures, name)(), name=name)


def calls_of(program: Program) -> Iterator[tuple[Call, Seen, Pattern]]:
    """The calls of a program that differ, with their patterns; operands are activations."""
    known = set()
    for call in program.calls:
        key = (
            call.op,
            str(call.attributes),
            *(program.values[name].shape for name in call.inputs),
            tuple(call.operands),
        )
        if key in known:
            continue
        known.add(key)
        roles = {
            name: Role.ACTIVATION if value.role is Role.INPUT else value.role for name, value in program.values.items()
        }
        seen = Seen(call, program.values, roles)
        rule = rule_of(call.op)
        if rule is not None:
            yield call, seen, rule(seen)


# --- execution --------------------------------------------------------------------------------------------------------


def numbers(value: Value, limit: int, generator: torch.Generator) -> Tensor:
    """Random numbers for a value; indices stay below `limit`."""
    dtype = getattr(torch, value.dtype)
    if dtype is torch.bool:
        return torch.rand(value.shape, generator=generator) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(0, max(limit, 1), value.shape, generator=generator)
    return torch.rand(value.shape, dtype=torch.float64, generator=generator) + 0.1


def run(call: Call, operands: Mapping[str, Tensor | list[Tensor]], attributes: Mapping[str, Any]) -> list[Tensor]:
    """The results of a call on given tensors."""
    space, name, overload = call.op.split(".", 2)
    operator = getattr(getattr(getattr(torch.ops, space), name), overload)
    settings: dict[str, Any] = {}
    for argument, value in attributes.items():
        if argument.endswith("_present"):
            continue
        named = isinstance(value, str) and argument in ("dtype", "other") and hasattr(torch, value)
        settings[argument] = getattr(torch, value) if named else list(value) if isinstance(value, tuple) else value
    given: dict[str, Any] = dict(operands)
    for argument, value in attributes.items():
        if argument.endswith("_present"):
            tensors = iter(given[argument.removesuffix("_present")])
            given[argument.removesuffix("_present")] = [next(tensors) if there else None for there in value]
    if settings.get("dtype") in (torch.float32, torch.float16):
        settings["dtype"] = torch.float64
    for argument in operator._schema.arguments:
        if argument.name not in given and argument.name not in settings and not argument.has_default_value():
            settings[argument.name] = "cpu" if argument.name == "device" else None
    if "dropout_p" in settings:
        settings["dropout_p"] = 0.0
    found = operator(**given, **settings)
    return [found] if isinstance(found, Tensor) else list(found)


def sizes_of(pattern: Pattern, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The size of each label."""
    sizes = dict(pattern.sizes)
    for array, shape in zip((*pattern.operands, *pattern.results), shapes, strict=True):
        for labels, size in zip(array, shape, strict=True):
            if len(labels) == 1:
                assert sizes.setdefault(labels[0], size) == size, (labels, size, sizes)
    for array, shape in zip((*pattern.operands, *pattern.results), shapes, strict=True):
        for labels, size in zip(array, shape, strict=True):
            assert size == torch.Size([sizes[label] for label in labels]).numel(), (labels, size, sizes)
    return sizes


def piece(tensor: Tensor, array: Array, sizes: Mapping[str, int], label: str, start: int, stop: int) -> Tensor:
    """The part of a tensor that has some of the elements of a label."""
    flat = [name for labels in array for name in labels]
    if label not in flat:
        return tensor
    part = tensor.reshape([sizes[name] for name in flat]).narrow(flat.index(label), start, stop - start)
    local = {**sizes, label: stop - start}
    return part.reshape([torch.Size([local[name] for name in labels]).numel() for labels in array])


def joined(parts: Sequence[Tensor], array: Array, sizes: Mapping[str, int], label: str, cuts: Sequence[int]) -> Tensor:
    """Pieces side by side along a label, or added up where the array lacks it."""
    flat = [name for labels in array for name in labels]
    if label not in flat:
        return torch.stack(list(parts)).sum(dim=0)
    opened = [
        part.reshape([stop - start if name == label else sizes[name] for name in flat])
        for part, (start, stop) in zip(parts, pairwise(cuts), strict=True)
    ]
    whole = torch.cat(opened, dim=flat.index(label))
    return whole.reshape([torch.Size([sizes[name] for name in labels]).numel() for labels in array])


def patched(call: Call, pattern: Pattern, label: str, sizes: Mapping[str, int], count: int) -> dict[str, Any]:
    """The attributes of a call on a piece: numbers of groups, sizes and ends of slices are the piece's own."""
    attributes = dict(call.attributes)
    kind = call.op.split(".")[1]
    local = {**sizes, label: count}
    shape = tuple(torch.Size([local[name] for name in labels]).numel() for labels in pattern.results[0])
    for name in ("groups", "num_groups"):
        if label == "g" and name in attributes:
            attributes[name] = attributes[name] * count // sizes["g"]
    if kind in ("view", "reshape"):
        attributes["size" if "size" in attributes else "shape"] = shape
    if kind == "unflatten":
        return attributes
    if "output_size" in attributes:
        attributes["output_size"] = shape[len(shape) - len(attributes["output_size"]) :]
    if label == "rest" and kind == "slice":
        share = count / sizes["rest"]
        if attributes.get("step", 1) == 1:
            attributes["start"] = round(attributes.get("start", 0) * share)
        if attributes["end"] < 2**60:
            attributes["end"] = round(attributes["end"] * share)
    if label == "rest" and kind == "narrow":
        attributes |= {"start": attributes["start"] * count // sizes["rest"], "length": count}
    if label == "rest" and isinstance(attributes.get("split_size"), int):
        attributes["split_size"] = count
    if label == "rest" and "split_sizes" in attributes:
        attributes["split_sizes"] = tuple(size * count // sizes["rest"] for size in attributes["split_sizes"])
    return attributes


def is_added_once(call: Call, argument: str) -> bool:
    """Whether an operand is an addend of a product: of several summands one has it."""
    return argument == "bias" or (argument == "self" and call.op.split(".")[1] in ("addmm", "baddbmm"))


def is_mean(call: Call) -> bool:
    kind = call.op.split(".")[1]
    return kind == "mean" or "avg_pool" in kind or (kind.endswith("loss") and call.attributes.get("reduction", 1) == 1)


def check_call(call: Call, seen: Seen, pattern: Pattern, seed: int) -> list[str]:
    """The labels that were cut; fails where the pieces do not make up the whole."""
    generator = torch.Generator().manual_seed(seed)
    values = seen.values
    limit = min((size for size in values[call.inputs[0]].shape), default=1)
    tensors = {name: numbers(values[name], limit, generator) for name in dict.fromkeys(call.inputs)}

    def operands(given: Sequence[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        rest = iter(given)
        return {
            argument: next(rest) if isinstance(names, str) else [next(rest) for _ in names]
            for argument, names in call.operands.items()
        }

    whole_inputs = [tensors[name] for name in call.inputs]
    whole = run(call, operands(whole_inputs), call.attributes)
    shapes = [*(tuple(tensor.shape) for tensor in whole_inputs), *(tuple(tensor.shape) for tensor in whole)]
    sizes = sizes_of(pattern, shapes)
    if pattern.view:
        check_view(pattern, whole_inputs[0], whole, sizes)
        return []
    labels = sorted({name for array in (*pattern.operands, *pattern.results) for dims in array for name in dims})
    cut = []
    for label in labels:
        special = call.op.startswith(
            ("aten.embedding.", "aten.embedding_bag", "aten.conv", "aten.max_pool", "aten.avg_pool")
        )
        if label in pattern.unsplit or (special and (label == "v" or label in pattern.halo)) or sizes[label] < 2:
            continue
        if pattern.statistics and not all(label in [n for d in extra.array for n in d] for extra in pattern.statistics):
            continue
        middle = (sizes[label] + 1) // 2
        cuts = (0, middle, sizes[label])  # uneven where the size is odd
        parts = []
        for start, stop in pairwise(cuts):
            local = [
                piece(tensor, array, sizes, label, start, stop)
                for tensor, array in zip(whole_inputs, pattern.operands, strict=True)
            ]
            given = operands(local)
            if start and all(label not in labels for array in pattern.results for labels in array):
                given |= {name: torch.zeros_like(given[name]) for name in given if is_added_once(call, name)}
            made = run(call, given, patched(call, pattern, label, sizes, stop - start))
            share = (stop - start) / sizes[label] if is_mean(call) else 1.0
            lacks = [label not in [n for d in array for n in d] for array in pattern.results]
            parts.append([tensor * share if lack else tensor for tensor, lack in zip(made, lacks, strict=True)])
        for index, (array, expected) in enumerate(zip(pattern.results, whole, strict=True)):
            found = joined([part[index] for part in parts], array, sizes, label, cuts)
            torch.testing.assert_close(
                found.double(),
                expected.double(),
                rtol=1e-9,
                atol=1e-9,
                msg=f"{call.op} {call.attributes} cut along {label}: {pattern}",
            )
        cut.append(label)
    return cut


def check_view(pattern: Pattern, operand: Tensor, results: Sequence[Tensor], sizes: Mapping[str, int]) -> None:
    """A view is its operand's factors in another order, with those it lacks repeated."""
    flat = [name for labels in pattern.operands[0] for name in labels]
    opened = operand.reshape([sizes[name] for name in flat])
    for array, result in zip(pattern.results, results, strict=True):
        wanted = [name for labels in array for name in labels]
        order = [flat.index(name) for name in wanted if name in flat]
        assert sorted(order) == list(range(len(flat))), pattern
        shown = opened.permute(order)
        for at, name in enumerate(wanted):
            if name not in flat:
                shown = shown.unsqueeze(at).expand(*shown.shape[:at], sizes[name], *shown.shape[at:])
        torch.testing.assert_close(shown.reshape(result.shape), result)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*MODELS, *SINGLE])
def test_pieces_make_up_the_whole(name: str) -> None:
    checked = 0
    for number, (call, seen, pattern) in enumerate(calls_of(program_of(name))):
        op = ".".join(call.op.split(".")[:2])
        labels = {label for array in (*pattern.operands, *pattern.results) for dims in array for label in dims}
        if op in NOT_RUN or pattern.constant or labels <= pattern.unsplit:
            continue
        check_call(call, seen, pattern, number)
        checked += 1
    assert checked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in SINGLE if "conv" in name or "pool" in name])
def test_pieces_with_their_halo_make_up_the_whole(name: str) -> None:
    """Space cut in two: each piece of the operand with what the halo says it reads beyond, zeros outside."""
    for call, seen, pattern in calls_of(program_of(name)):
        for label in sorted({n for array in pattern.results for dims in array for n in dims} - pattern.unsplit):
            if label.startswith("y"):
                check_halo(call, seen, pattern, label)


def check_halo(call: Call, seen: Seen, pattern: Pattern, label: str) -> None:
    generator = torch.Generator().manual_seed(7)
    source = numbers(seen.values[call.inputs[0]], 1, generator)
    others = [numbers(seen.values[name], 1, generator) for name in call.inputs[1:]]
    arguments = list(call.operands)
    whole = run(call, dict(zip(arguments, [source, *others], strict=True)), call.attributes)[0]
    sizes = sizes_of(pattern, [*(tuple(t.shape) for t in (source, *others)), tuple(whole.shape)])
    dim = next(at for at, labels in enumerate(pattern.operands[0]) if label in labels)
    before, after = pattern.halo.get(label, (0, 0))
    ratio = source.shape[dim] // sizes[label]
    out_ratio = whole.shape[dim] // sizes[label]
    middle = sizes[label] // 2
    parts = []
    for start, stop in ((0, middle), (middle, sizes[label])):
        # What lies beyond the halo is another number wherever the operand has one: it must not matter.
        spoilt = torch.full_like(source, 1e6)
        low, high = max(0, ratio * start - before), min(source.shape[dim], ratio * stop + after)
        spoilt.narrow(dim, low, high - low).copy_(source.narrow(dim, low, high - low))
        found = run(call, dict(zip(arguments, [spoilt, *others], strict=True)), call.attributes)[0]
        parts.append(found.narrow(dim, out_ratio * start, out_ratio * (stop - start)))
    torch.testing.assert_close(torch.cat(parts, dim=dim), whole, msg=f"{call} {label} {pattern.halo}")


@pytest.mark.filterwarnings("ignore")
def test_rows_of_an_embedding_leave_summands() -> None:
    table, indices = torch.rand(12, 4, dtype=torch.float64), torch.randint(0, 12, (3, 5))
    whole = functional.embedding(indices, table)
    parts = []
    for start, stop in ((0, 7), (7, 12)):
        mine = (indices >= start) & (indices < stop)
        rows = functional.embedding((indices - start).clamp(0, stop - start - 1), table[start:stop])
        parts.append(rows * mine[..., None])
    torch.testing.assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((4, 6), (24,), ((("f0",), ("f1",)), (("f0", "f1"),))),
        ((2, 6), (4, 3), ((("f0",), ("f1", "f2")), (("f0", "f1"), ("f2",)))),
        ((6, 1, 4), (6, 4, 1), ((("f0",), (), ("f1",)), (("f0",), ("f1",), ()))),
        ((6, 4), (4, 6), ((("p0",), ("p1",)), (("q0",), ("q1",)))),  # 4 does not divide 6: no common factors
    ],
)
def test_a_reshape_is_a_factorisation(
    source: tuple[int, ...], target: tuple[int, ...], expected: tuple[Array, Array]
) -> None:
    (left, _), (right, _) = factored(source, target)
    assert (left, right) == expected


def test_sums_are_linear_only_where_all_terms_are_summands() -> None:
    values = {name: Value(name, (4,), "float32") for name in "abc"}
    add = Call("add", "aten.add.Tensor", {"self": "a", "other": "b"}, ("c",))
    for role, linear in ((Role.ACTIVATION, True), (Role.PARAMETER, False), (Role.BUFFER, False)):
        seen = Seen(add, values, {"a": Role.ACTIVATION, "b": role, "c": Role.ACTIVATION})
        assert RULES["aten.add"](seen).linear is linear
        product = replace(seen, call=replace(add, op="aten.mul.Tensor"))
        assert RULES["aten.mul"](product).linear is not linear


def test_linear_calls_add_up() -> None:
    """What a rule calls linear makes of summands summands, with everything else fixed."""
    generator = torch.Generator().manual_seed(3)
    tried = 0
    for name in ("llama", "t5", "moe_block", "unet", "dlrm"):
        program = program_of(name)
        for call, seen, pattern in calls_of(program):
            if not pattern.linear or pattern.view or ".".join(call.op.split(".")[:2]) in NOT_RUN:
                continue
            limit = min(program.values[call.inputs[0]].shape, default=1)
            tensors = {key: numbers(program.values[key], limit, generator) for key in call.inputs}
            summands = {
                key: torch.rand(tensors[key].shape, dtype=torch.float64, generator=generator) for key in seen.summable
            }

            def results(given: Mapping[str, Tensor], call: Call = call) -> list[Tensor]:
                operands = {
                    argument: given[names] if isinstance(names, str) else [given[key] for key in names]
                    for argument, names in call.operands.items()
                }
                return run(call, operands, call.attributes)

            rest = {key: tensor - summands[key] if key in summands else tensor for key, tensor in tensors.items()}
            for one, two, whole in zip(results({**tensors, **summands}), results(rest), results(tensors), strict=True):
                torch.testing.assert_close(one + two, whole, msg=str(call))
            tried += 1
    assert tried > 20
