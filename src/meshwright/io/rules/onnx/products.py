"""Products of matrices, einsums and recurrent layers."""

from __future__ import annotations

import string
from collections.abc import Sequence

from meshwright.io.rules.onnx.pointwise import op_type, trained
from meshwright.io.rules.pattern import (
    Array,
    Extra,
    Pattern,
    Seen,
    broadcast,
    labelled,
    labels_of,
    replicated,
    rule,
    saved_factors,
    spelled,
)


@rule("onnx.MatMul", "onnx.MatMulInteger")
def _matmul(seen: Seen) -> Pattern:
    """As NumPy's: the last two dims are those of a matrix, those before are broadcast."""
    left, right = (len(shape) for shape in seen.shapes[:2])
    letters = string.ascii_lowercase
    outer = letters[: max(0, left - 2, right - 2)]
    m, k, n = list(letters[len(outer) : len(outer) + 3])
    a = k if left == 1 else outer[len(outer) - left + 2 :] + m + k
    b = k if right == 1 else outer[len(outer) - right + 2 :] + k + n
    return _product(seen, [a, b], outer + (m if left > 1 else "") + (n if right > 1 else ""))


@rule("onnx.Gemm")
def _gemm(seen: Seen) -> Pattern:
    """alpha A B + beta C, with A or B transposed."""
    a = "km" if seen.get("transA") else "mk"
    b = "nk" if seen.get("transB") else "kn"
    return _product(seen, [a, b], "mn", [broadcast(shape, 2) for shape in seen.shapes[2:]], ("m", "n"))


@rule("onnx.Einsum")
def _einsum(seen: Seen) -> Pattern:
    """More than two operands are multiplied pair by pair from the left, as PyTorch does without opt_einsum."""
    equation = _spelled_equation(seen)
    if equation is None:
        return replicated(seen)
    return _product(seen, *equation)


def _spelled_equation(seen: Seen) -> tuple[list[str], str] | None:
    """The terms and the result of an einsum without dots; None where a letter stands twice in one (a diagonal)."""
    left, arrow, result = seen.get("equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(seen.shapes):
        return None
    unused = [letter for letter in string.ascii_letters if letter not in left + result]
    ranks = [len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, seen.shapes, strict=True)]
    dots = "".join(unused[: max(0, *ranks)])
    terms = [term.replace("...", dots[len(dots) - rank :]) for term, rank in zip(terms, ranks, strict=True)]
    if not arrow:  # the letters that stand once, in order
        letters = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        result = "..." * ("..." in left) + "".join(letters)
    result = result.replace("...", dots)
    fits = all(len(term) == len(shape) for term, shape in zip(terms, seen.shapes, strict=True))
    if not fits or any(len(set(term)) < len(term) for term in (*terms, result)):
        return None
    return terms, result


def _product(
    seen: Seen, terms: Sequence[str], result: str, addends: Sequence[Array] = (), names: Sequence[str] = ()
) -> Pattern:
    """A product by the letters of its operands and its result; `addends` are the labels of what is added to it (their
    `d0`, `d1` ... are the `names` of the result's dims), other operands are whole."""
    arrays = [spelled(term, shape) for term, shape in zip(terms, seen.shapes, strict=False)]
    rename = {f"d{index}": name for index, name in enumerate(names)}
    arrays += [tuple(tuple(rename[label] for label in labels) for labels in array) for array in addends]
    others = seen.shapes[len(arrays) :]
    arrays += [labelled(shape, f"i{index}_") for index, shape in enumerate(others)]
    count = len(terms)
    return Pattern(
        tuple(arrays),
        (spelled(result, seen.result_shapes[0]),),
        unsplit=frozenset(label for array in arrays[len(arrays) - len(others) :] for label in labels_of(array)),
        contractions=_pairs(arrays[:count], terms, result),
        saves=saved_factors(seen, *seen.call.inputs[:count]),
        linear=seen.is_multilinear and len(arrays) == count,
    )


def _pairs(arrays: Sequence[Array], terms: Sequence[str], result: str) -> tuple[tuple[str, ...], ...]:
    """The products summed over, from the left; one that sums over nothing is elementwise and counts none."""
    found = []
    done = set(labels_of(arrays[0]))
    for index in range(1, len(arrays)):
        both = done | set(labels_of(arrays[index]))
        kept = both & set("".join((result, *terms[index + 1 :])))
        if both != kept or len(arrays) == 2:
            found.append(tuple(sorted(both)))
        done = kept
    return tuple(found)


#: What each step of a recurrent layer keeps for its backward, beside its result: the gates, and of an LSTM the cell.
_KEPT = {
    "LSTM": ("input_gate", "forget_gate", "output_gate", "cell_gate", "cell"),
    "GRU": ("update_gate", "reset_gate", "hidden_gate", "hidden_part"),
    "RNN": (),
}


@rule("onnx.LSTM", "onnx.GRU", "onnx.RNN")
def _recurrent(seen: Seen) -> Pattern:
    """One step after the other over time: only the batch can be split. Input and hidden products of all gates count."""
    batched = ("b", "t") if seen.get("layout") else ("t", "b")
    dims = {
        "X": (*batched, "i"),
        "W": ("dir", "gates", "i"),
        "R": ("dir", "gates", "h"),
        "B": ("dir", "bias"),
        "sequence_lens": ("b",),
        "P": ("dir", "peep"),
    }
    state = ("b", "dir", "h") if seen.get("layout") else ("dir", "b", "h")
    operands = [
        _named(dims.get(argument, state), seen.values[name].shape)
        for argument in seen.call.operands
        for name in seen.names(argument)
    ]
    every = ("b", "t", "dir", "h") if seen.get("layout") else ("t", "dir", "b", "h")
    results = [_named(every if len(shape) == 4 else state, shape) for shape in seen.result_shapes]
    present = {label for array in (*operands, *results) for label in labels_of(array)}
    products = (("t", "b", "dir", "gates", "i"), ("t", "b", "dir", "gates", "h"))
    keeps = trained(seen, (*seen.call.inputs, seen.call.outputs[0]))
    full = next((shape for shape in seen.result_shapes if len(shape) == 4), ())
    return Pattern(
        tuple(operands),
        tuple(results),
        unsplit=frozenset(present) - {"b"},
        contractions=tuple(tuple(label for label in product if label in present) for product in products),
        saves=keeps,
        extras=tuple(Extra(name, _named(every, full)) for name in _KEPT[op_type(seen)]) if keeps and full else (),
    )


def _named(names: Sequence[str], shape: Sequence[int]) -> Array:
    """Labels by name, none where the size is 1."""
    return tuple((name,) if size > 1 else () for name, size in zip(names, shape, strict=True))
