"""Fused attention and rotary positions (opset 23)."""

from __future__ import annotations

from meshwright.io.rules.onnx.pointwise import trained
from meshwright.io.rules.pattern import Array, Extra, Pattern, Seen, labelled, labels_of, replicated, rule


@rule("onnx.Attention")
def _attention(seen: Seen) -> Pattern:
    """softmax(q k^T + mask) v of heads (kv, group) on kv heads of keys; arrays are (batch, heads, tokens, dim), or
    (batch, tokens, heads x dim). Keys stay whole; queries may be split unless they see only earlier keys."""
    if seen.has("past_key") or len(seen.call.outputs) > 1:
        return replicated(seen)
    flat = len(seen.shapes[0]) == 3
    query, key, value = (seen.values[name].shape for name in seen.call.inputs[:3])
    heads = seen.get("q_num_heads") if flat else query[1]
    kv = seen.get("kv_num_heads") if flat else key[1]
    tokens, keys = (query[1], key[1]) if flat else (query[2], key[2])
    dim, width = (query[2] // heads, value[2] // kv) if flat else (query[3], value[3])
    sizes = {"b": query[0], "kv": kv, "group": heads // kv, "q": tokens, "k": keys, "d": dim, "v": width}

    def some(*labels: str) -> tuple[str, ...]:
        return tuple(label for label in labels if sizes[label] > 1)

    def array(heads: tuple[str, ...], tokens: str, dim: str) -> Array:
        if flat:
            return some("b"), some(tokens), some(*heads, dim)
        return some("b"), some(*heads), some(tokens), some(dim)

    operands = [array(("kv", "group"), "q", "d"), array(("kv",), "k", "d"), array(("kv",), "k", "v")]
    masks = [_mask(seen.values[name].shape, sizes, some("kv", "group")) for name in seen.call.inputs[3:]]
    whole = {"k", "d", *(("q",) if seen.get("is_causal") else ())}
    keeps = trained(seen, (*seen.call.inputs, seen.call.outputs[0]))
    sums = Extra("logsumexp", (some("b"), some("kv", "group"), some("q")), "float32")
    present = {label for label, size in sizes.items() if size > 1}
    return Pattern(
        (*operands, *masks),
        (array(("kv", "group"), "q", "v"),),
        unsplit=frozenset(whole & present),
        contractions=(some("b", "kv", "group", "q", "k", "d"), some("b", "kv", "group", "q", "k", "v")),
        saves=keeps,
        extras=(sums,) if keeps else (),
        hints={"kv": "kv_heads" if heads > kv else "heads", "group": "group", "d": "head_dim", "v": "head_dim"},
        sizes={label: sizes[label] for label in present},
    )


def _mask(shape: tuple[int, ...], sizes: dict[str, int], heads: tuple[str, ...]) -> Array:
    """Labels of a mask, broadcast to (batch, heads, queries, keys)."""
    full: Array = (("b",), heads, ("q",), ("k",))
    return tuple(labels if size > 1 else () for labels, size in zip(full[4 - len(shape) :], shape, strict=True))


@rule("onnx.RotaryEmbedding")
def _rotary(seen: Seen) -> Pattern:
    """Pairs of elements of each head's dim are turned: those half a dim apart, or neighbours (`interleaved`). Tables
    are (batch, tokens, pairs), or (positions, pairs) looked up by position."""
    shape = seen.shapes[0]
    flat = len(shape) == 3
    tables = seen.values[seen.call.inputs[1]].shape
    pairs = tables[-1]
    rotated = seen.get("rotary_embedding_dim") or 0
    heads = seen.get("num_heads") if flat else shape[1]
    dim = shape[2] // heads if flat else shape[3]
    sizes = {"b": shape[0], "h": heads, "t": shape[1] if flat else shape[2], "pair": pairs, "two": 2}
    order: tuple[str, ...] = ("pair", "two") if seen.get("interleaved") else ("two", "pair")
    if dim != 2 * pairs or rotated not in (0, dim):  # the rest of the dim is not turned
        sizes |= {"pair": pairs, "dim": dim}
        order = ("dim",)

    def some(*labels: str) -> tuple[str, ...]:
        return tuple(label for label in labels if sizes[label] > 1)

    array = (some("b"), some("t"), some("h", *order)) if flat else (some("b"), some("h"), some("t"), some(*order))
    looked_up = len(tables) == 2
    table = (
        (labelled(tables[:1], "position")[0], some("pair"))
        if looked_up
        else (some("b") if tables[0] > 1 else (), some("t"), some("pair"))
    )
    positions = [(some("b"), some("t")) for _ in seen.call.inputs[3:]]
    whole = {"two", "dim", *labels_of(table[:1] if looked_up else ())}
    if order == ("dim",):
        whole.add("pair")
    operands = (array, table, table, *positions)
    present = {label for item in operands for label in labels_of(item)}
    return Pattern(
        operands,
        (array,),
        unsplit=frozenset(whole & present),
        saves=trained(seen, seen.call.inputs[1:]),
        sizes={label: size for label, size in sizes.items() if label in present},
        linear=seen.is_multilinear,
    )
