"""Products that sum over dims: linear layers, matrix products, einsum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright.io.rules.pattern import Pattern, Seen, einsum, labelled, labels_of, replicated, rule, spelled

_LETTERS = "abcdefghABCDEFGH"


@rule("aten.linear")
def linear(seen: Seen) -> Pattern:
    """x W^T + b."""
    if len(seen.shape("weight")) == 1:
        return matmul_of(seen, "input", "weight")
    front = _LETTERS[: len(seen.shape("input")) - 1]
    return einsum(seen, f"{front}i,oi->{front}o", names=(seen.name("input"), seen.name("weight")))


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.dot", "aten.mv")
def matmul(seen: Seen) -> Pattern:
    """Matrix products, batched and broadcast as `torch.matmul` says."""
    first, second = seen.call.operands
    return matmul_of(seen, first, second)


@rule("aten.inner")
def inner(seen: Seen) -> Pattern:
    """Products summed over the last dim of both."""
    left, right = (len(shape) for shape in seen.shapes)
    one, two = _LETTERS[: left - 1], _LETTERS[left - 1 : left + right - 2]
    return _product(seen, f"{one}k,{two}k->{one}{two}", (seen.call.inputs[0], seen.call.inputs[1]))


def matmul_of(seen: Seen, first: str, second: str) -> Pattern:
    """The product of two operands under the rules of `torch.matmul`."""
    left, right = len(seen.shape(first)), len(seen.shape(second))
    batch = max(left, right) - 2
    shared = _LETTERS[: max(batch, 0)]
    one = "j" if left == 1 else f"{shared[len(shared) - (left - 2) :]}ij"
    two = "j" if right == 1 else f"{shared[len(shared) - (right - 2) :]}jk"
    out = shared + ("" if left == 1 else "i") + ("" if right == 1 else "k")
    return _product(seen, f"{one},{two}->{out}", (seen.name(first), seen.name(second)))


@rule("aten.addmm", "aten.baddbmm", "aten.addbmm", "aten.addmv")
def plus_product(seen: Seen) -> Pattern:
    """A matrix product plus something broadcast to it."""
    first, second = list(seen.call.operands)[1:]
    equations = {"addmm": "ij,jk->ik", "baddbmm": "bij,bjk->bik", "addbmm": "bij,bjk->ik", "addmv": "ij,j->i"}
    return _product(seen, equations[seen.call.op.split(".")[1]], (seen.name(first), seen.name(second)))


def _product(seen: Seen, equation: str, names: tuple[str, str]) -> Pattern:
    if names[0] == names[1]:  # one value in two places: the letters go by place, not by name
        return einsum_by_place(seen, equation)
    return einsum(seen, equation, names=names)


def einsum_by_place(seen: Seen, equation: str) -> Pattern:
    """An equation over all operands by their place."""
    terms, result = equation.split("->")
    operands = tuple(spelled(term, shape) for term, shape in zip(terms.split(","), seen.shapes, strict=True))
    present = {label for array in operands for labels in array for label in labels}
    every = dict.fromkeys(letter for term in terms.split(",") for letter in term if letter in present)
    return Pattern(
        operands,
        (spelled(result, seen.result_shapes[0]),),
        contractions=(tuple(every),) if len(operands) > 1 else (),
        saves=tuple(dict.fromkeys(seen.call.inputs)) if any(map(seen.trains, seen.call.inputs)) else (),
        linear=seen.is_multilinear,
    )


@rule("aten.einsum")
def by_equation(seen: Seen) -> Pattern:
    """`torch.einsum`; a dim that stands twice in one operand (a diagonal) keeps the whole together."""
    equation = str(seen.get("equation")).replace(" ", "")
    ranks = [len(shape) for shape in seen.shapes]
    terms, arrow, result = equation.partition("->")
    spelled_terms = terms.split(",")
    dots = max(
        (rank - len(term.replace("...", "")) for rank, term in zip(ranks, spelled_terms, strict=True) if "..." in term),
        default=0,
    )
    free = [letter for letter in "ZYXWVUTSRQPONML" if letter not in equation][:dots]

    def full(term: str, rank: int) -> str:
        own = rank - len(term.replace("...", ""))
        return term.replace("...", "".join(free[dots - own :]) if own else "")

    spelled_terms = [full(term, rank) for term, rank in zip(spelled_terms, ranks, strict=True)]
    letters = "".join(spelled_terms)
    if not arrow:
        result = "".join(free) + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    else:
        result = full(result, len(seen.result_shapes[0]))
    if any(len(set(term)) < len(term) for term in spelled_terms):
        return replicated(seen)
    pattern = einsum_by_place(seen, f"{','.join(spelled_terms)}->{result}")
    arrays = [set(labels_of(array)) for array in pattern.operands]
    return replace(pattern, contractions=tuple(_steps(arrays, set(labels_of(pattern.results[0])))))


def _steps(arrays: list[set[str]], result: set[str]) -> Iterator[tuple[str, ...]]:
    """The products of an einsum taken two operands at a time from the left, as PyTorch does: a step that sums over
    nothing is elementwise and counts nothing; what one operand alone has is summed before."""
    later = [result.union(*arrays[index + 1 :]) for index in range(len(arrays))]
    left = arrays[0] & later[0]
    for index, right in enumerate(arrays[1:], start=1):
        mine = right & (left | later[index])
        left = left & (mine | later[index])
        if (left | mine) - later[index]:
            yield tuple(sorted(left | mine))
        left = (left | mine) & later[index]


@rule("aten.bilinear")
def bilinear(seen: Seen) -> Pattern:
    """x W y + b for each of the outputs."""
    front = _LETTERS[: len(seen.shape("input1")) - 1]
    names = (seen.name("input1"), seen.name("input2"), seen.name("weight"))
    return einsum(seen, f"{front}i,{front}j,oij->{front}o", names=names)


@rule("aten.outer", "aten.ger")
def outer(seen: Seen) -> Pattern:
    """Each times each."""
    pattern = einsum_by_place(seen, "i,j->ij")
    return Pattern(pattern.operands, pattern.results, saves=pattern.saves, linear=pattern.linear)


@rule("transformers.grouped_mm_fallback", "aten._grouped_mm")
def grouped(seen: Seen) -> Pattern:
    """Rows, sorted by expert, times the matrix of their expert: rows of other experts' ranks are 0, so that splitting
    the experts leaves summands; the rows themselves are of unequal runs and stay whole."""
    names = seen.call.inputs
    if len(seen.shapes[0]) != 2 or len(seen.shapes[1]) != 3 or seen.shapes[0][1] != seen.shapes[1][1]:
        return replicated(seen)
    experts = seen.shapes[1][0]
    # Where the rows of each expert end: a rank needs those of all experts to know where its own begin.
    others = tuple(labelled(shape, f"i{index}_") for index, shape in enumerate(seen.shapes[2:]))
    whole = {"t", *(label for array in others for label in labels_of(array))}
    whole |= {"e"} if any(shape != (experts,) for shape in seen.shapes[2:]) else set()
    return Pattern(
        ((("t",), ("h",)), (("e",), ("h",), ("f",)), *others),
        ((("t",), ("f",)),),
        unsplit=frozenset(whole),
        contractions=(("t", "h", "f"),),
        saves=tuple(dict.fromkeys(names if "_grouped_mm" in seen.call.op and "aten" in seen.call.op else names[:2])),
        linear=seen.is_multilinear,
    )
