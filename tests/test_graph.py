"""Operator graphs: FLOPs and parameters by hand, dims under other names, and a checker that names every fault."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from meshwright.graph import (
    Block,
    Graph,
    Operator,
    Role,
    Segment,
    Tensor,
    graph_problems,
    operator_flops,
)
from meshwright.io.models import load_model, model_presets


def parameter(name: str, dims: str) -> Tensor:
    return Tensor(name, tuple(dims.split()), Role.PARAMETER)


def activation(name: str, dims: str) -> Tensor:
    return Tensor(name, tuple(dims.split()))


#: One head of attention over its own input, and a projection: x -> scores = x x^T -> mixed = scores x -> y = mixed W.
MIX = Block(
    name="mix",
    tensors=(
        activation("x", "batch seq hidden"),
        activation("scores", "batch seq seq"),
        activation("mixed", "batch seq hidden"),
        activation("y", "batch seq hidden"),
        parameter("w", "hidden hidden"),
        parameter("b", "hidden"),
    ),
    operators=(
        Operator(
            "scores",
            "einsum",
            "batch seq hidden, batch kv_seq hidden -> batch seq kv_seq",
            ("x", "x"),
            ("scores",),
            unsplit=("kv_seq",),
            contractions=("batch seq kv_seq hidden",),
            saves=("x",),
        ),
        Operator(
            "mixed",
            "einsum",
            "batch seq kv_seq, batch kv_seq hidden -> batch seq hidden",
            ("scores", "x"),
            ("mixed",),
            unsplit=("kv_seq",),
            contractions=("batch seq kv_seq hidden",),
            saves=("scores", "x"),
        ),
        Operator(
            "project",
            "einsum",
            "batch seq hidden, out hidden, out -> batch seq out",
            ("mixed", "w", "b"),
            ("y",),
            contractions=("batch seq hidden out",),
            saves=("mixed",),
        ),
    ),
    inputs=("x",),
    outputs=("y",),
)
TABLE = Block(
    name="table",
    tensors=(
        Tensor("tokens", ("batch", "seq"), Role.INPUT, "int64", differentiable=False),
        parameter("rows", "vocab hidden"),
        activation("y", "batch seq hidden"),
    ),
    operators=(
        Operator("look_up", "embedding", "batch seq, vocab hidden -> batch seq hidden", ("tokens", "rows"), ("y",)),
    ),
    outputs=("y",),
)
HEAD = Block(
    name="head",
    tensors=(
        activation("x", "batch seq hidden"),
        parameter("rows", "vocab hidden"),
        activation("logits", "batch seq vocab"),
    ),
    operators=(
        Operator(
            "logits",
            "einsum",
            "batch seq hidden, vocab hidden -> batch seq vocab",
            ("x", "rows"),
            ("logits",),
            contractions=("batch seq hidden vocab",),
        ),
    ),
    inputs=("x",),
)
TINY = Graph(
    name="tiny",
    dims={"hidden": 4, "vocab": 11},
    blocks=(TABLE, MIX, HEAD),
    segments=(Segment(("table",)), Segment(("mix",), 3), Segment(("head",))),
)


# --- counting --------------------------------------------------------------------------------------------------------


def test_parameters_by_hand() -> None:
    # table 11*4 = 44; 3 times 4*4 + 4 = 60; head 44
    assert TINY.num_parameters == 148


def test_tied_parameters_count_once() -> None:
    assert dataclasses.replace(TINY, tied=(("table/rows", "head/rows"),)).num_parameters == 148 - 44


def test_a_block_that_stands_nowhere_has_no_parameters() -> None:
    assert dataclasses.replace(TINY, segments=(Segment(("table", "head")),)).num_parameters == 88


def test_forward_flops_by_hand() -> None:
    # b = 2, s = 5, h = 4, v = 11. A mix: 2 b s s h = 400 twice, 2 b s h h = 320, the bias 0: 1120. The head: 2 b s h v
    # = 880. A look-up multiplies nothing.
    assert TINY.forward_flops(2, 5) == 3 * 1120 + 880


def test_llama_tiny_by_hand() -> None:
    # hidden 64, 4 heads of 16 (2 for keys and values), inner 128, vocab 256, 4 layers.
    # A layer's matrices: q 64*64, k and v 64*32 each, out 64*64, three of 64*128 = 36,864; two norms of 64.
    # Tables of 256*64 = 16,384 at both ends, a last norm of 64.
    graph = load_model("llama-tiny")
    matrices = 4096 + 2 * 2048 + 4096 + 3 * 8192
    assert graph.num_parameters == 2 * 16384 + 64 + 4 * (matrices + 128) == 180_800
    # b s = 16: a layer 2*16*36,864 and the full square twice, 2 * 2*2*8*8*64; the head 2*16*64*256.
    assert graph.forward_flops(2, 8) == 4 * (2 * 16 * matrices + 2 * 2 * 2 * 64 * 64) + 2 * 16 * 64 * 256 == 5_373_952


def test_published_flops_of_gpt3() -> None:
    # Narayanan 2104.04473, equation 3, less recomputation: 72 b s l h^2 (1 + s/6h + V/12lh) for forward and backward.
    b, s, layers, h, vocab = 64, 2048, 96, 12288, 51200
    published = 72 * b * s * layers * h * h * (1 + s / (6 * h) + vocab / (12 * layers * h))
    assert 3 * load_model("gpt3-175b").forward_flops(b, s) == pytest.approx(published, rel=1e-12)


def test_flops_take_columns() -> None:
    seq = np.array([1, 5, 8])
    sizes = TINY.sizes(np.array([2, 2, 3]), seq)
    flops = operator_flops(MIX.operators[0], MIX.dim_aliases(MIX.operators[0]), sizes)
    assert list(flops) == [2 * 2 * 1 * 1 * 4, 2 * 2 * 5 * 5 * 4, 2 * 3 * 8 * 8 * 4]


def test_sequence_and_counts() -> None:
    alternating = dataclasses.replace(TINY, segments=(Segment(("table",)), Segment(("mix", "head"), 2)))
    assert alternating.sequence == ("table", "mix", "head", "mix", "head")
    assert alternating.counts == {"table": 1, "mix": 2, "head": 2}
    assert alternating.num_layers == 3


# --- dims ------------------------------------------------------------------------------------------------------------


def test_dims_of_an_operator() -> None:
    scores, mixed, project = MIX.operators
    assert scores.input_dims == (("batch", "seq", "hidden"), ("batch", "kv_seq", "hidden"))
    assert scores.output_dims == (("batch", "seq", "kv_seq"),)
    assert scores.dims == ("batch", "seq", "hidden", "kv_seq")
    assert [operator.contracted for operator in MIX.operators] == [{"hidden"}, {"kv_seq"}, {"hidden"}]
    assert mixed.splittable("seq")
    assert not mixed.splittable("kv_seq"), "unsplit"
    assert not project.splittable("seq2"), "not there"


def test_aliases_name_the_dims_of_the_block() -> None:
    scores, _, project = MIX.operators
    assert MIX.dim_aliases(scores) == {"batch": "batch", "seq": "seq", "kv_seq": "seq", "hidden": "hidden"}
    assert MIX.dim_aliases(project)["out"] == "hidden"


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_presets())
def test_presets_have_no_faults(name: str) -> None:
    assert graph_problems(load_model(name)) == []


def test_tiny_has_no_faults() -> None:
    assert graph_problems(TINY) == []


def with_operator(index: int, **changes: object) -> Graph:
    operators = list(MIX.operators)
    operators[index] = dataclasses.replace(operators[index], **changes)
    return with_mix(operators=tuple(operators))


def with_mix(**changes: object) -> Graph:
    return dataclasses.replace(TINY, blocks=(TABLE, dataclasses.replace(MIX, **changes), HEAD))


FAULTS = {
    "a dim without a size": (
        with_mix(tensors=(*MIX.tensors, activation("odd", "batch width"))),
        ["blocks.mix.odd = width: this dim has no size"],
    ),
    "a size of nothing": (
        dataclasses.replace(TINY, dims={"hidden": 0, "vocab": 11}),
        ["dims.hidden = 0: must be at least 1"],
    ),
    "a segment of an unknown block": (
        dataclasses.replace(TINY, segments=(Segment(("table", "mux")), Segment(("head",)))),
        ["segments[0].blocks = mux: known blocks: head, mix, table (nearest: mix)"],
    ),
    "no repeat": (
        dataclasses.replace(TINY, segments=(Segment(("table",)), Segment(("mix",), 0))),
        ["segments[1].repeat = 0: must be at least 1"],
    ),
    "an absurd repeat": (
        dataclasses.replace(TINY, segments=(Segment(("table",)), Segment(("mix",), 100_001))),
        ["segments[1].repeat = 100001: must be at most 100,000"],
    ),
    "no blocks in a row": (dataclasses.replace(TINY, segments=()), ["segments: must name at least one block"]),
    "a block twice": (dataclasses.replace(TINY, blocks=(TABLE, MIX, HEAD, MIX)), ["blocks = mix: is named twice"]),
    "a tensor twice": (with_mix(tensors=(*MIX.tensors, MIX.tensors[3])), ["blocks.mix.tensors = y: is named twice"]),
    "an operator twice": (
        with_mix(operators=(*MIX.operators, MIX.operators[2])),
        ["blocks.mix.operators = project: is named twice"],
    ),
    "a spec without an arrow": (
        with_operator(0, spec="batch seq hidden"),
        ["blocks.mix.scores = batch seq hidden: a spec is"],
    ),
    "a spec with an operand too few": (
        with_operator(2, spec="batch seq hidden, out hidden -> batch seq out"),
        ["the spec does not have one entry per operand (mixed, w, b, y)"],
    ),
    "a spec with a dim too many": (
        with_operator(2, spec="batch seq hidden, out hidden odd, out -> batch seq out"),
        ["blocks.mix.project = out hidden odd: w has dims hidden hidden"],
    ),
    "an unknown operand": (with_operator(1, inputs=("scores", "z")), ["blocks.mix.mixed = z: no such tensor"]),
    "an operand made later": (
        with_mix(operators=(MIX.operators[1], MIX.operators[0], MIX.operators[2])),
        ["blocks.mix.mixed = scores: used before it is made"],
    ),
    "an unknown dim in a contraction": (
        with_operator(2, contractions=("batch seq hidden depth",)),
        ["blocks.mix.project.contractions = depth: the operator's dims are batch, seq, hidden, out"],
    ),
    "an unknown name in saves": (
        with_operator(2, saves=("mixd",)),
        ["blocks.mix.project.saves = mixd: no such tensor in the block (nearest: mixed)"],
    ),
    "an input of a block that is no tensor": (with_mix(inputs=("x", "z")), ["blocks.mix.inputs = z: no such tensor"]),
    "an output of a block that nobody makes": (
        with_mix(operators=MIX.operators[:2]),
        ["blocks.mix.outputs = y: no operator makes it"],
    ),
    "a tied path that is not there": (
        dataclasses.replace(TINY, tied=(("table/rows", "head/row"),)),
        ["tied[0] = head/row: no such parameter (nearest: head/rows)"],
    ),
    "a tied path of an activation": (
        dataclasses.replace(TINY, tied=(("table/y", "head/rows"),)),
        ["tied[0] = table/y: no such parameter"],
    ),
    "a tied path without a block": (
        dataclasses.replace(TINY, tied=(("rows", "head/rows"),)),
        ["tied[0] = rows: no such parameter"],
    ),
    "tied tensors of unlike shapes": (
        dataclasses.replace(TINY, tied=(("mix/b", "head/rows"),)),
        ["tied[0] = mix/b, head/rows: must have the same dims"],
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_named(case: str) -> None:
    graph, texts = FAULTS[case]
    found = [str(problem) for problem in graph_problems(graph)]
    assert len(found) == len(texts), found
    for text in texts:
        assert any(text in problem for problem in found), (text, found)


def test_all_faults_at_once() -> None:
    graph = dataclasses.replace(
        with_operator(2, contractions=("depth",), saves=("nothing",)),
        dims={"hidden": -1, "vocab": 11},
        segments=(Segment(("mux",), 0),),
        tied=(("a/b", "c/d"),),
    )
    wheres = [problem.where for problem in graph_problems(graph)]
    assert wheres == [
        "segments[0].blocks",
        "segments[0].repeat",
        "dims.hidden",
        "blocks.mix.project.saves",
        "blocks.mix.project.contractions",
        "tied[0]",
        "tied[0]",
    ]
