"""The graph that `decoder_graph` writes: published activation bytes, FLOPs by hand, and the order of the operators."""

from __future__ import annotations

import dataclasses
import math

import pytest

from meshwright.graph import WORKLOAD_DIMS, Block, Graph, Role, Segment, graph_problems
from meshwright.io.decoder import Decoder, Experts, Latent, Layer, Norm, Rotary, decoder_graph

BYTES = {"compute": 2, "float32": 4, "int64": 8, "bool": 1}

LLAMA = Decoder(
    "llama",
    hidden=64,
    kv_heads=2,
    group=2,
    head_dim=16,
    ffn=96,
    vocab=512,
    layers=(Layer(rotary=Rotary(10_000.0, 16)),),
    segments=(Segment(("layer",), 3),),
)

GPT = Decoder(
    "gpt",
    hidden=64,
    kv_heads=4,
    group=1,
    head_dim=16,
    ffn=256,
    vocab=512,
    layers=(Layer(),),
    segments=(Segment(("layer",), 3),),
    positions=32,
    tied=True,
    norm=Norm("layer", 1e-5, bias=True),
    attention="unfused",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    activation="gelu_tanh",
    embedding_dropout=0.1,
    attention_dropout=0.1,
    residual_dropout=0.1,
    mlp_dropout=0.1,
)

MIXTRAL = dataclasses.replace(LLAMA, layers=(Layer(sparse=True),), experts=Experts(count=4, topk=2))

VARIANTS = {
    "llama": LLAMA,
    "gpt": GPT,
    "mixtral": MIXTRAL,
    "parallel": dataclasses.replace(LLAMA, parallel=True, shared_norm=True, sum_dropout=0.1),
    "two norms": dataclasses.replace(GPT, parallel=True),
    "post": dataclasses.replace(LLAMA, norm_place="post", qk_norm=Norm(), qk_norm_scope="all"),
    "sandwich": dataclasses.replace(LLAMA, norm_place="sandwich", residual_scale=0.5, mlp_dropout=0.1),
    "after": dataclasses.replace(GPT, norm_place="after", final_norm=False, embed=16),
    "normed residual": dataclasses.replace(GPT, residual_is_normed=True, embedding_norm=True, alibi="plain"),
    "relative": dataclasses.replace(GPT, relative=True),
    "clipped": dataclasses.replace(LLAMA, qkv_clip=8.0, qk_norm=Norm(), qk_norm_scope="per_head"),
    "scaled": dataclasses.replace(LLAMA, logit_scale=0.5, logit_softcap=30.0, embedding_scale=8.0, lm_bias=True),
    "latent": dataclasses.replace(
        GPT, attention="fused", latent=Latent(kv_rank=24, rope_dim=4, value_dim=6, q_rank=40)
    ),
    "latent, unfused, plain queries": dataclasses.replace(GPT, latent=Latent(kv_rank=24, rope_dim=4, value_dim=6)),
    "expert biases, sinks": dataclasses.replace(
        MIXTRAL, sinks=True, experts=Experts(count=4, topk=2, shared_ffn=32, shared_gate=False, bias=True)
    ),
    "shared expert": dataclasses.replace(
        MIXTRAL,
        layers=(Layer("dense"), Layer(sparse=True)),
        segments=(Segment(("dense",)), Segment(("layer",), 2)),
        experts=Experts(count=4, topk=2, shared_ffn=32),
        dense_ffn=128,
    ),
}


def operator(graph: Graph, block: str, name: str):
    return next(op for op in graph.block[block].operators if op.name == name)


def saved_bytes(block: Block, sizes: dict[str, int]) -> int:
    """Bytes of the distinct tensors that the operators of a block keep for their backward."""
    saved = {name for op in block.operators for name in op.saves}
    return sum(
        BYTES[block.tensor[name].dtype] * math.prod(sizes[dim] for dim in block.tensor[name].dims) for name in saved
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_graph_is_sound(name: str) -> None:
    graph = decoder_graph(VARIANTS[name])
    assert graph_problems(graph) == []
    assert graph.sequence[0] == "embedding"
    assert graph.sequence[-1] == "head"
    assert graph.num_layers == 3
    used = {dim for block in graph.blocks for tensor in block.tensors for dim in tensor.dims} - set(WORKLOAD_DIMS)
    assert set(graph.dims) == used


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_used_and_boundaries_have_their_names(name: str) -> None:
    graph = decoder_graph(VARIANTS[name])
    for block in graph.blocks:
        touched = {operand for op in block.operators for operand in (*op.inputs, *op.outputs)}
        assert touched == set(block.tensor)
        produced = [out for op in block.operators for out in op.outputs]
        assert len(produced) == len(set(produced))
        assert all(block.tensor[name].role is not Role.PARAMETER for op in block.operators for name in op.saves)
        assert all(name in (*op.inputs, *op.outputs) for op in block.operators for name in op.saves)
    assert (graph.block["embedding"].inputs, graph.block["embedding"].outputs) == ((), ("y",))
    assert (graph.block["head"].inputs, graph.block["head"].outputs) == (("x",), ())
    for layer in graph.blocks[1:-1]:
        assert (layer.inputs, layer.outputs) == (("x",), ("y",))
        assert layer.tensor["x"].dims == layer.tensor["y"].dims == ("batch", "seq", "hidden")


@pytest.mark.parametrize(("batch", "seq", "heads"), [(1, 128, 4), (3, 16, 4), (2, 7, 8)])
def test_activation_bytes_are_korthikantis(batch: int, seq: int, heads: int) -> None:
    """Korthikanti 2205.05198 eq. 1: sbh (34 + 5 a s / h) bytes in a layer, 16-bit, masks of one byte."""
    decoder = dataclasses.replace(GPT, kv_heads=heads, head_dim=64 // heads)
    graph = decoder_graph(decoder)
    expected = seq * batch * 64 * 34 + 5 * heads * seq * seq * batch
    assert saved_bytes(graph.block["layer"], graph.sizes(batch, seq)) == expected


def test_selective_recomputation_drops_the_square_term() -> None:
    """What the core_attention group alone saves is the 5as/h term; q, k, v and the context stay."""
    graph = decoder_graph(GPT)
    layer = graph.block["layer"]
    core = [op for op in layer.operators if op.recompute_group == "core_attention"]
    assert [op.kind for op in core] == ["einsum", "softmax", "dropout", "einsum"]
    made = {out for op in core for out in op.outputs}
    inside = {name for op in core for name in op.saves if name in made}
    assert inside == {"probabilities", "dropped_probabilities", "probabilities_dropout_mask"}


def test_forward_flops_of_a_gpt_by_hand() -> None:
    # b=2 s=8 h=64 f=256 v=512, 3 layers, tokens = 16:
    # projections 2*16*(4*64*64 + 2*64*256) = 2*16*49152 = 1_572_864; attention 2*2*2*8*8*64 = 32_768 per layer
    # head 2*16*64*512 = 1_048_576
    assert decoder_graph(GPT).forward_flops(2, 8) == 3 * (1_572_864 + 32_768) + 1_048_576 == 5_865_472


def test_fused_and_unfused_attention_cost_the_same_flops() -> None:
    fused = decoder_graph(dataclasses.replace(GPT, attention="fused"))
    assert fused.forward_flops(2, 8) == decoder_graph(GPT).forward_flops(2, 8)


def test_parameters_by_hand() -> None:
    # layer: 4*64*64 + 4*64 + 2*64*256 + 256 + 64 + 4*64 = 49_984; tables 512*64 + 32*64; final norm 2*64
    assert decoder_graph(GPT).num_parameters == 3 * 49_984 + 34_816 + 128 == 184_896


def test_layer_reads_like_llama() -> None:
    layer = decoder_graph(LLAMA).block["layer"]
    assert [(op.name, op.kind) for op in layer.operators] == [
        ("norm1", "norm"),
        ("q", "einsum"),
        ("q_rotary", "rotary"),
        ("k", "einsum"),
        ("k_rotary", "rotary"),
        ("v", "einsum"),
        ("attention", "attention"),
        ("out", "einsum"),
        ("add1", "add"),
        ("norm2", "norm"),
        ("gate", "einsum"),
        ("up", "einsum"),
        ("activation", "gated_activation"),
        ("down", "einsum"),
        ("add2", "add"),
    ]
    assert {tensor.name: tensor.dims for tensor in layer.parameters} == {
        "norm1.weight": ("hidden",),
        "q.weight": ("kv_heads", "group", "head_dim", "hidden"),
        "k.weight": ("kv_heads", "head_dim", "hidden"),
        "v.weight": ("kv_heads", "head_dim", "hidden"),
        "out.weight": ("hidden", "kv_heads", "group", "head_dim"),
        "norm2.weight": ("hidden",),
        "gate.weight": ("ffn", "hidden"),
        "up.weight": ("ffn", "hidden"),
        "down.weight": ("hidden", "ffn"),
    }


def test_specs_of_projections_and_attention() -> None:
    graph = decoder_graph(LLAMA)
    q = operator(graph, "layer", "q")
    assert q.spec == "batch seq hidden, kv_heads group head_dim hidden -> batch seq kv_heads group head_dim"
    assert (q.contractions, q.saves) == (("batch seq hidden kv_heads group head_dim",), ("norm1_out",))
    assert q.contracted == {"hidden"}
    assert operator(graph, "layer", "out").contracted == {"kv_heads", "group", "head_dim"}
    attention = operator(graph, "layer", "attention")
    assert attention.spec == (
        "batch seq kv_heads group head_dim, batch kv_seq kv_heads head_dim, batch kv_seq kv_heads head_dim"
        " -> batch seq kv_heads group head_dim, batch seq kv_heads group"
    )
    assert attention.inputs == ("q", "k", "v")
    assert attention.saves == ("q", "k", "v", "context", "logsumexp")
    assert not attention.splittable("kv_seq")
    assert graph.block["layer"].dim_aliases(attention)["kv_seq"] == "seq"


def test_head_splits_over_the_vocabulary() -> None:
    graph = decoder_graph(GPT)
    loss = operator(graph, "head", "cross_entropy")
    assert loss.contracted == {"vocab"}
    assert loss.saves == ("logits32", "labels")
    assert graph.block["head"].tensor["logits32"].dtype == "float32"
    assert graph.block["head"].tensor["loss"].dims == ("batch", "seq")
    assert operator(graph, "embedding", "token").contracted == {"vocab"}
    assert graph.tied == (("embedding/token.weight", "head/lm.weight"),)


def test_experts_take_their_rows() -> None:
    graph = decoder_graph(MIXTRAL)
    gate = operator(graph, "layer", "gate")
    assert gate.spec == "experts batch rows hidden, experts ffn hidden -> experts batch rows ffn"
    assert gate.contracted == {"hidden"}
    assert graph.sizes(2, 8)["rows"] == 4.0  # 8 tokens to 2 of 4 experts each
    dispatch, combine = operator(graph, "layer", "dispatch"), operator(graph, "layer", "combine")
    assert dispatch.spec == "batch seq hidden -> experts batch seq hidden"
    assert not dispatch.splittable("experts")
    assert not combine.splittable("experts")
    # projections 64*64*2 + 64*32*2 = 12_288, router 64*4, experts 2*3*64*96 = 36_864; 2 FLOPs, 16 tokens
    layer = 2 * 16 * (12_288 + 256 + 36_864) + 2 * 2 * 2 * 8 * 8 * 64
    assert graph.forward_flops(2, 8) == 3 * layer + 2 * 16 * 64 * 512


def test_no_dropout_leaves_no_operator() -> None:
    quiet = dataclasses.replace(
        GPT, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0
    )
    kinds = {op.kind for block in decoder_graph(quiet).blocks for op in block.operators}
    assert "dropout" not in kinds
    context = operator(decoder_graph(quiet), "layer", "context")
    assert context.saves == ("probabilities", "v")
