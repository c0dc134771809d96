"""What one forward of a traced program keeps for its backward, in bytes: what PyTorch's autograd saves.

Each memory counts once, however many values lie in it (a view keeps all of what it shows a part of); parameters don't
count. `fused` kernels are those of a GPU: attention keeps its operands, its result and a number a row, dropout a mask
of bytes, an RMS norm its operand. Without them (PyTorch on the CPU or on the meta device, math attention) attention
keeps scaled queries and keys and the probabilities, dropout a factor for each number, an RMS norm its result before
the weight as well. A graph's own account (`Operator.saves`) is coarser than both: there a view is the tensor beneath, a
copy in another order too, and each part of a split is a tensor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from meshwright.graph import Role
from meshwright.io.rules import Pattern, Seen, rule_of
from meshwright.io.rules.pattern import Extra, labelled
from meshwright.io.traced import Factors, Program, Traced


def saved_bytes(traced: Traced, batch: int | None = None, *, fused: bool = True) -> int:
    """Bytes that one forward of `batch` sequences keeps; of as many as were traced where none is given."""
    return sum(saved_storages(traced, batch, fused=fused).values())


def saved_storages(traced: Traced, batch: int | None = None, *, fused: bool = True) -> dict[str, int]:
    """Bytes of each memory that one forward keeps, by the value that owns it (`value.mask` for what a call keeps beside
    its results)."""
    program = traced.program
    found: dict[str, int] = {}
    owners = _owners(program, fused)
    roles: dict[str, Role] = {name: value.role for name, value in program.values.items()}
    for call in program.calls:
        rule = rule_of(call.op)
        if rule is None or not any(program.values[name].differentiable for name in call.outputs):
            continue
        seen = Seen(call, program.values, roles)
        pattern = rule(seen)
        if pattern.view:
            continue
        saves, extras = (pattern.saves, pattern.extras) if fused else _composite(seen, pattern)
        for name in saves:
            owner = owners[name]
            if program.values[owner].role is not Role.PARAMETER:
                found[owner] = _bytes(program, traced.factors, owner, batch)
        ratio = _growth(program, traced.factors, call.outputs[0], batch)
        for extra in extras:
            found[f"{call.outputs[0]}.{extra.suffix}"] = round(_extra_bytes(seen, pattern, extra) * ratio)
    return found


def _composite(seen: Seen, pattern: Pattern) -> tuple[tuple[str, ...], tuple[Extra, ...]]:
    """What a call keeps where it is computed by plain operators."""
    kind = seen.call.op.split(".")[1]
    if kind == "scaled_dot_product_attention":
        arrays = dict(zip(seen.call.operands, pattern.operands, strict=True))
        value = seen.name("value")
        query, key = arrays["query"], arrays["key"]
        scores = (*query[:-1], key[-2])
        extras = [Extra("query", query), Extra("key", (*query[:-2], *key[-2:])), Extra("probabilities", scores)]
        if seen.get("dropout_p", 0.0):
            extras += [Extra("factors", scores), Extra("dropped", scores)]
        # One that lies in another order is copied for the product.
        if not seen.values[value].is_packed or query[:-2] != key[:-2]:
            return (), (*extras, Extra("value", (*query[:-2], *arrays["value"][-2:])))
        return (value,), tuple(extras)
    if kind == "rms_norm":
        array = pattern.operands[0]
        normed = (Extra("normed", array),) if len(seen.call.inputs) > 1 else ()
        return (pattern.saves, (*pattern.extras, *normed)) if seen.trains(seen.call.inputs[0]) else ((), normed)
    if kind == "dropout":
        return pattern.saves, (Extra("factors", labelled(seen.shapes[0], "d")),)
    return pattern.saves, pattern.extras


def _owners(program: Program, fused: bool) -> dict[str, str]:
    """The value in whose memory each value lies. Fused attention makes its result in the order in which the next
    product reads it, tokens before heads: what a trace shows as a copy to that order is none."""
    owners = {name: value.storage or name for name, value in program.values.items()}
    attended: set[str] = set()
    for call in program.calls:
        kind = call.op.split(".")[1]
        moves = kind in ("transpose", "permute", "contiguous", "clone", "reshape", "view")
        asleep = kind == "dropout" and not (call.attributes.get("train", True) and call.attributes.get("p", 0.5))
        if fused and kind == "scaled_dot_product_attention":
            attended.update(call.outputs)
        elif asleep or (moves and call.inputs[0] in attended):
            owners |= dict.fromkeys(call.outputs, owners[call.inputs[0]])
            attended.update(call.outputs if moves else ())
        else:
            owners |= {name: owners[owners[name]] for name in call.outputs}
    return owners


def _bytes(program: Program, factors: Mapping[str, Factors], name: str, batch: int | None) -> int:
    value = program.values[name]
    return round(math.prod(value.shape) * dtype_bytes(value.dtype) * _growth(program, factors, name, batch))


def _growth(program: Program, factors: Mapping[str, Factors], name: str, batch: int | None) -> float:
    """How many times larger a value is with another batch."""
    if batch is None:
        return 1.0
    powers = sum(label.rstrip("'") == "batch" for labels in factors[name] for label in labels)
    return float((batch / program.batch) ** powers)


def _extra_bytes(seen: Seen, pattern: Pattern, extra: Extra) -> int:
    sizes = dict(pattern.sizes)
    names = (*seen.call.inputs, *seen.call.outputs)
    for name, array in zip(names, (*pattern.operands, *pattern.results), strict=True):
        for size, labels in zip(seen.values[name].shape, array, strict=True):
            if len(labels) == 1:
                sizes[labels[0]] = size
    count = math.prod(sizes[label] for labels in extra.array for label in labels)
    return count * dtype_bytes(extra.dtype or seen.values[seen.call.inputs[0]].dtype)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number of a type by its name.

    >>> [dtype_bytes(name) for name in ("float32", "bfloat16", "int64", "bool", "complex64")]
    [4, 2, 8, 1, 8]
    """
    digits = "".join(character for character in dtype.split("_")[0] if character.isdigit())
    return max(1, int(digits or 8) // 8)
