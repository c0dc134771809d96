"""Every dim rule proven by execution: the pieces of an operator, computed apart on simulated ranks from pieces of its
operands, make up the whole, forward and gradients, for every dim that the rule lets be cut and for pairs of them.

One process, no process group: the whole operands are cut, the ranks run one after the other, and what they make is put
side by side or added up, all in one autograd graph. So the gradient of a piece is a piece, that of an operand which
every rank has whole the sum of what the ranks give back, and a summand's that of the sum: what `sharding` says.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.graph import Role
from meshwright.io.rules import RULES, Pattern, Seen, rule_of
from meshwright.io.rules.pattern import Array
from meshwright.io.traced import Call, Value
from meshwright.runtime.traced.kernels import statistics
from meshwright.runtime.traced.local import Extent, LocalCall, overload_of, run_local
from rule_cases import CASES, Arguments, Draw

TOLERANCE = 1e-10

# --- a call of each, and its rule -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call, its tensors by value, and what its rule says."""

    call: Call
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Value]
    pattern: Pattern
    whole: tuple[Tensor, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each label."""
        found = dict(self.pattern.sizes)
        arrays = (*self.pattern.operands, *self.pattern.results)
        for name, array in zip((*self.call.inputs, *self.call.outputs), arrays, strict=True):
            shape = self.values[name].shape
            assert len(shape) == len(array), (self.call.op, name, shape, array)
            for size, labels in zip(shape, array, strict=True):
                if len(labels) == 1:
                    assert found.setdefault(labels[0], size) == size, (self.call.op, name, shape, array)
        for name, array in zip((*self.call.inputs, *self.call.outputs), arrays, strict=True):
            assert [math.prod(found[label] for label in labels) for labels in array] == list(self.values[name].shape)
        return found


def op_of(text: str) -> str:
    """An operator's full name."""
    name = text.partition(":")[0]
    if name.startswith("transformers."):
        importlib.import_module("transformers.integrations.moe")  # it registers its operators
        return f"{name}.default"
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


def case_of(text: str, seed: int) -> Case:
    """A call with random operands; `text` is an operator's name, perhaps with its overload and a word of ours."""
    op = op_of(text)
    schema = [argument.name for argument in overload_of(op)._schema.arguments]
    draw = Draw(seed, op)
    arguments = CASES[text](draw)
    if "size" in arguments and "size" not in schema and "shape" in schema:
        arguments["shape"] = arguments.pop("size")
    assert set(arguments) <= set(schema), (op, schema)
    tensors: dict[str, Tensor] = {}
    operands: dict[str, str | tuple[str, ...]] = {}
    attributes: dict[str, Any] = {}

    def named(x: Tensor) -> str:
        name = f"v{len(tensors)}"
        has_gradient = x.is_floating_point() and not any(x is other for other in draw.fixed)
        tensors[name] = x.requires_grad_() if has_gradient else x
        return name

    for argument in schema:
        given = arguments.get(argument)
        if isinstance(given, Tensor):
            operands[argument] = named(given)
        elif isinstance(given, list) and any(isinstance(item, Tensor) for item in given):
            operands[argument] = tuple(named(item) for item in given if item is not None)
            if any(item is None for item in given):
                attributes[f"{argument}_present"] = tuple(item is not None for item in given)
        elif given is not None:
            attributes[argument] = str(given).removeprefix("torch.") if isinstance(given, torch.dtype) else given
    call = Call("call", op, operands, (), attributes)
    plain = LocalCall(call, {}, (), (), {})
    whole = _direct(plain, arguments)
    call = replace(call, outputs=tuple(f"r{index}" for index in range(len(whole))))
    values = {
        name: Value(name, tuple(x.shape), str(x.dtype).removeprefix("torch."), differentiable=x.requires_grad)
        for name, x in {**tensors, **dict(zip(call.outputs, whole, strict=True))}.items()
    }
    rule = rule_of(op)
    assert rule is not None, op
    pattern = rule(Seen(call, values, dict.fromkeys(values, Role.ACTIVATION)))
    return Case(call, tensors, values, pattern, whole)


def _direct(local: LocalCall, arguments: Arguments) -> tuple[Tensor, ...]:
    """PyTorch's operator on the whole, none of our kernels between."""
    function = overload_of(local.call.op)
    left_out = {each.name: None for each in function._schema.arguments if not each.has_default_value()}
    found = function(**{**left_out, **arguments})
    return (found,) if isinstance(found, Tensor) else tuple(found)


# --- the ranks --------------------------------------------------------------------------------------------------------


def pieces(size: int) -> Iterator[list[Extent]]:
    """Ways to cut a dim: in halves, in ones, unevenly."""
    cuts = {(size // 2,)} | ({tuple(range(1, size))} if size <= 4 else set()) | {(1,), (size - 1,)}
    for cut in sorted(cuts):
        yield list(itertools.pairwise((0, *cut, size)))


def cut_out(x: Tensor, array: Array, sizes: Mapping[str, int], place: Mapping[str, Extent]) -> Tensor:
    """A rank's piece of an array."""
    labels = [label for dim in array for label in dim]
    opened = x.reshape([sizes[label] for label in labels])
    for at, label in enumerate(labels):
        if label in place:
            start, stop = place[label]
            opened = opened.narrow(at, start, stop - start)
    lengths = {label: place[label][1] - place[label][0] if label in place else sizes[label] for label in labels}
    return opened.reshape([math.prod(lengths[label] for label in dim) for dim in array])


def with_rows(x: Tensor, case: Case, place: Mapping[str, Extent], halo: Mapping[str, tuple[int, int]]) -> Tensor:
    """A rank's piece of the first operand with its neighbours' rows, zeros beyond the ends."""
    array, sizes = case.pattern.operands[0], case.sizes
    rest = {label: extent for label, extent in place.items() if label not in halo}
    piece = cut_out(x, array, sizes, rest)
    for dim, labels in enumerate(array):
        if labels and labels[0] in halo and labels[0] in place:
            before, after = halo[labels[0]]
            stride = math.prod(sizes[label] for label in labels[1:])
            start, stop = (stride * end for end in place[labels[0]])
            padded = F.pad(piece, [0, 0] * (piece.dim() - 1 - dim) + [before, after])
            piece = padded.narrow(dim, start, before + stop - start + after)
    return piece


def rank_results(
    case: Case, places: list[dict[str, Extent]], tensors: list[Mapping[str, Tensor]]
) -> list[tuple[Tensor, ...]]:
    """The results of all ranks; `tensors` are the whole operands (or summands) of each."""
    pattern, sizes = case.pattern, case.sizes
    halo = {label: rows for label, rows in pattern.halo.items() if any(label in place for place in places)}
    kept = {label for labels in pattern.results[0] for label in labels}

    def local(place: dict[str, Extent], whole: Mapping[str, Tensor], total: Callable[[Tensor], Tensor]) -> LocalCall:
        arrays = iter(pattern.operands)
        operands: dict[str, Any] = {}
        for position, (argument, operand) in enumerate(case.call.operands.items()):
            names = (operand,) if isinstance(operand, str) else operand
            found = tuple(cut_out(whole[name], next(arrays), sizes, place) for name in names)
            if position == 0 and halo:
                found = (with_rows(whole[names[0]], case, place, halo),)
            operands[argument] = found[0] if isinstance(operand, str) else found
        first = all(start == 0 for label, (start, _) in place.items() if label not in kept)
        return LocalCall(case.call, operands, pattern.operands, pattern.results, sizes, place, halo, first, total)

    extra: dict[str, Tensor] = {}
    if pattern.statistics:
        channels = pattern.operands[0][1][0]
        sums = [
            statistics(local(place, whole, lambda x: x).tensor("input"))
            for place, whole in zip(places, tensors, strict=True)
        ]
        for name, index in (("sum", 0), ("square_sum", 1)):
            extra[name] = put_together([(each[index],) for each in sums], places, ((((channels,),)),), sizes)[0]
    asked: list[Tensor] = []

    def ask(number: Tensor) -> Tensor:
        asked.append(number)
        return number

    def run(total: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, ...]]:
        found = []
        for place, whole in zip(places, tensors, strict=True):
            call = local(place, whole, total)
            if extra:
                own = {name: cut_out(x, ((channels,),), sizes, place) for name, x in extra.items()}
                call = replace(call, operands={**call.operands, **own})
            found.append(run_local(call))
        return found

    results = run(ask)
    return run(lambda _: sum(asked[1:], asked[0])) if asked else results


def put_together(
    results: list[tuple[Tensor, ...]],
    places: list[dict[str, Extent]],
    arrays: tuple[Array, ...],
    sizes: Mapping[str, int],
) -> tuple[Tensor, ...]:
    """The whole of what the ranks made: pieces side by side, summands added."""
    found = []
    for index, array in enumerate(arrays):
        labels = [label for dim in array for label in dim]
        parts: dict[tuple[Extent, ...], Tensor] = {}
        for place, made in zip(places, results, strict=True):
            lengths = {label: place[label][1] - place[label][0] if label in place else sizes[label] for label in labels}
            shape = [math.prod(lengths[label] for label in dim) for dim in array]
            assert list(made[index].shape) == shape, (list(made[index].shape), shape)
            key = tuple(place[label] for label in place if label in labels)
            opened = made[index].reshape([lengths[label] for label in labels])
            parts[key] = parts[key] + opened if key in parts else opened
        here = [label for label in places[0] if label in labels]
        for label in reversed(here):
            joined: dict[tuple[Extent, ...], list[Tensor]] = {}
            for key in sorted(parts):
                joined.setdefault(key[:-1], []).append(parts[key])
            parts = {key: torch.cat(group, labels.index(label)) for key, group in joined.items()}
        found.append(parts[()].reshape([math.prod(sizes[label] for label in dim) for dim in array]))
    return tuple(found)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest magnitude."""
    if not one.is_floating_point():
        return float((one != other).any())
    scale = max(float(other.detach().abs().max()), 1.0) if other.numel() else 1.0
    return float((one - other).detach().abs().max()) / scale if one.numel() else 0.0


def worst_difference(case: Case, places: list[dict[str, Extent]], tensors: list[Mapping[str, Tensor]]) -> float:
    """How far the ranks' results and gradients are from those of the whole."""
    count = read_results(case)
    results = [made[:count] for made in rank_results(case, places, tensors)]
    together = put_together(results, places, case.pattern.results[:count], case.sizes)
    found = [difference(one, other) for one, other in zip(together, case.whole, strict=False)]
    leaves = [x for x in case.tensors.values() if x.requires_grad]
    pairs = [(one, other) for one, other in zip(together, case.whole, strict=False) if other.requires_grad]
    if pairs and leaves:
        random = torch.Generator().manual_seed(0)
        weights = [torch.randn(other.shape, dtype=torch.float64, generator=random) for _, other in pairs]
        ours, theirs = (
            torch.autograd.grad([pair[side] for pair in pairs], leaves, weights, retain_graph=True, allow_unused=True)
            for side in (0, 1)
        )
        for one, other, leaf in zip(ours, theirs, leaves, strict=True):
            zero = torch.zeros_like(leaf)
            found.append(difference(zero if one is None else one, zero if other is None else other))
    return max(found)


def splittable(case: Case) -> list[str]:
    """The labels that the rule lets be cut."""
    sizes, pattern = case.sizes, case.pattern
    labels = dict.fromkeys(label for array in (*pattern.operands, *pattern.results) for dim in array for label in dim)
    return [label for label in labels if label not in pattern.unsplit and sizes[label] > 1]


def read_results(case: Case) -> int:
    """How many of the results are anybody's to read: those of `embedding_bag` behind the first are its backward's."""
    return 1 if "embedding_bag" in case.call.op else len(case.whole)


#: How many ways to cut are tried of one case: all in `python tests/test_rules_executed.py`, in the tests some.
MOST_WAYS = 14


def check(case: Case, most: int = MOST_WAYS) -> int:
    """Ways to cut, alone and in pairs, and summands; how many ways. Each dim is cut in one way at least."""
    sizes, free = case.sizes, splittable(case)
    ways: list[list[dict[str, Extent]]] = [
        [{label: extent} for extent in cut] for label in free for cut in pieces(sizes[label])
    ]
    for one, other in itertools.combinations(free, 2):
        cuts = [[(0, sizes[label] // 2), (sizes[label] // 2, sizes[label])] for label in (one, other)]
        ways.append([{one: first, other: second} for first, second in itertools.product(*cuts)])
    first = {next(iter(places[0])): places for places in reversed(ways) if len(places[0]) == 1}
    others = [places for places in ways if places not in first.values()]
    np.random.default_rng(len(ways)).shuffle(others)  # type: ignore[arg-type]
    ways = [*first.values(), *others][: max(most, len(first))]
    for places in ways:
        worst = worst_difference(case, places, [case.tensors] * len(places))
        assert worst < TOLERANCE, f"{case.call.op}, cut {places}: off by {worst:.3g}"
    if case.pattern.linear:
        summable = Seen(case.call, case.values, dict.fromkeys(case.values, Role.ACTIVATION)).summable
        random = torch.Generator().manual_seed(1)
        shares = {
            name: torch.randn(case.tensors[name].shape, dtype=torch.float64, generator=random) for name in summable
        }
        halves = [
            {name: x * shares[name] if name in shares else x for name, x in case.tensors.items()},
            {name: x * (1 - shares[name]) if name in shares else x for name, x in case.tensors.items()},
        ]
        made = rank_results(case, [{}, {}], halves)
        for index, whole in enumerate(case.whole):
            assert difference(made[0][index] + made[1][index], whole) < TOLERANCE, f"{case.call.op} is not linear"
    return len(ways) + case.pattern.linear


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a few numbers
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("text", CASES)
def test_pieces_computed_apart_make_the_whole(text: str) -> None:
    for seed in range(2):
        check(case_of(text, seed))


#: Rules without a case, and why: constants by their shape; random numbers, which differ by rank; nothing may be cut;
#: what is no operator of this PyTorch, or another name for one that it exports in its place.
UNPROVEN = """
    arange full zeros ones empty scalar_tensor eye linspace new_zeros new_ones new_full new_empty tril_indices
    triu_indices hann_window empty_strided tensor new_empty_strided zeros_like ones_like full_like empty_like fill zero
    bernoulli rand_like randn_like randint_like rand randn randint dropout_ detach_ requires_grad_
    float half bfloat16 double long int softsign unique_dim imag view_as_complex view_as_real identity _grouped_mm
    _convolution _fused_rms_norm _native_batch_norm_legit cudnn_batch_norm _reshape_alias
"""


def test_every_rule_has_a_case() -> None:
    names = {op_of(text) for text in CASES if not text.startswith("transformers.")}
    shown = names | {name.rpartition(".")[0] for name in names} | {f"aten.{name}" for name in UNPROVEN.split()}
    assert [name for name in RULES if name.startswith("aten.") and name not in shown] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    total = sum(check(case_of(text, seed), most=10**6) for text in CASES for seed in range(3))
    print(f"{total:,} ways to cut {len(CASES)} kinds of calls make the whole")
