"""Recurrent layers as one operator: batch may be split, time and width stay whole."""

from __future__ import annotations

from meshwright.io.rules.pattern import Array, Pattern, Seen, labelled, labels_of, replicated, rule


@rule("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def recurrent(seen: Seen) -> Pattern:
    """All layers and directions; each weight matrix is a product at every step of time."""
    if len(seen.shape("input")) != 3 or not seen.has("hx"):
        return replicated(seen)
    at = 0 if seen.get("batch_first", False) else 1
    states = seen.names("hx")
    operands: list[Array] = []
    contractions = []
    for index, (name, shape) in enumerate(zip(seen.call.inputs, seen.shapes, strict=True)):
        array = list(labelled(shape, f"i{index}_"))
        if index == 0:
            array[at] = ("b",) if shape[at] > 1 else ()
            array[1 - at] = ("t",) if shape[1 - at] > 1 else ()
            steps = (*array[at], *array[1 - at])
        elif name in states:
            array[1] = ("b",) if shape[1] > 1 else ()
        elif len(shape) == 2:
            contractions.append((*steps, *labels_of(tuple(array))))
        operands.append(tuple(array))
    results: list[Array] = []
    for index, shape in enumerate(seen.result_shapes):
        array = list(labelled(shape, f"o{index}_"))
        if index == 0:
            array[at], array[1 - at] = operands[0][at], operands[0][1 - at]
        elif len(shape) == 3:
            array[1] = ("b",) if shape[1] > 1 else ()
        results.append(tuple(array))
    every = {label for array in (*operands, *results) for label in labels_of(array)}
    return Pattern(
        tuple(operands),
        tuple(results),
        unsplit=frozenset(every - {"b"}),
        contractions=tuple(contractions),
        saves=(*dict.fromkeys(seen.call.inputs), seen.call.outputs[0]),
    )
