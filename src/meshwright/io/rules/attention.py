"""Fused attention: softmax(q k^T / sqrt(d) + mask) v."""

from __future__ import annotations

from meshwright.io.rules.pattern import Array, Extra, Pattern, Seen, rule

_LETTERS = "abcdefg"


@rule("aten.scaled_dot_product_attention")
def attention(seen: Seen) -> Pattern:
    """Queries `s`, keys `t`; the dim of the keys `d` is summed over before the softmax and stays whole, that of the
    values `e` may be cut. Where the mask is causal the queries stay whole: which keys one sees depends on its place.
    Where a key serves several queries' heads (`enable_gqa`), the queries' heads are the product `k g`."""
    query, key, value = (seen.shape(name) for name in ("query", "key", "value"))
    front: list[tuple[str, ...]] = [(letter,) for letter in _LETTERS[: len(query) - 2]]
    sizes: dict[str, int] = {}
    heads_query, heads_key = list(front), list(front)
    if front and query[-3] != key[-3]:
        heads_query[-1], heads_key[-1] = ("k", "g"), ("k",)
        sizes = {"k": key[-3], "g": query[-3] // key[-3]}
        if key[-3] == 1:
            heads_query[-1] = ("g",)
    arrays = {
        "query": _sized((*heads_query, ("s",), ("d",)), query),
        "key": _sized((*heads_key, ("t",), ("d",)), key),
        "value": _sized((*heads_key, ("t",), ("e",)), value),
    }
    if seen.has("attn_mask"):
        mask = seen.shape("attn_mask")
        arrays["attn_mask"] = _sized((*heads_query, ("s",), ("t",))[len(query) - len(mask) :], mask)
    out = _sized((*heads_query, ("s",), ("e",)), seen.result_shapes[0])
    rows = _sized((*heads_query, ("s",)), query[:-1])
    batch = tuple(label for labels in _sized(tuple(heads_query), query[:-2]) for label in labels)
    present = {label for array in arrays.values() for labels in array for label in labels}
    whole = {"t", "d", *(["s"] if seen.get("is_causal", False) else [])}
    products = [tuple(label for label in (*batch, "s", "t", last) if label in present) for last in "de"]
    names = [seen.name(name) for name in ("query", "key", "value")]
    given = seen.name("attn_mask") if seen.has("attn_mask") else ""
    is_bool = bool(given) and seen.values[given].dtype == "bool"  # becomes one of numbers, made again in every call
    masks = [given] if given and not is_bool else []
    trains = any(seen.trains(name) for name in names)
    heads = {"k": "kv_heads", "g": "group"} if sizes else {front[-1][0]: "heads"} if len(front) > 1 else {}
    dropped = float(seen.get("dropout_p", 0.0)) > 0
    scores = _sized((*heads_query, ("s",), ("t",)), (*query[:-1], key[-2]))
    return Pattern(
        tuple(arrays[argument] for argument in seen.call.operands),
        (out,),
        unsplit=frozenset(whole & present),
        contractions=tuple(products),
        saves=(*names, *masks, *seen.call.outputs) if trains else (),
        sizes=sizes,
        extras=(
            Extra("logsumexp", rows, "float32"),
            *((Extra("bias", arrays["attn_mask"]),) if is_bool else ()),
            *((Extra("mask", scores, "bool"),) if dropped else ()),
        ),
        hints={**heads, "d": "head_dim", "e": "head_dim"},
    )


def _sized(array: Array, shape: tuple[int, ...]) -> Array:
    return tuple(labels if size > 1 else () for labels, size in zip(array, shape, strict=True))
