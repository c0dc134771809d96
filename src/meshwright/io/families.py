"""Decoder families of Hugging Face: one small function each, from the keys of its config to a `Decoder`.

Sizes (hidden, layers, heads, vocabulary, feed-forward) must be in the config; whatever else is absent has that
family's default in transformers. What a family can say and no `Decoder` can hold is refused, never ignored; keys that
do not change the network (token ids, initializers, generation, quantization) are not looked at.

To add a family: write `config -> Decoder` below, decorate it with its `model_type`, and add its configs to
`tests/test_huggingface.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshwright.errors import nearest_name
from meshwright.graph import Segment
from meshwright.io.config import (
    HEADS_KEYS,
    HIDDEN_KEYS,
    KV_HEADS_KEYS,
    LAYERS_KEYS,
    MAX_LAYERS,
    MAX_NUMBER,
    Config,
)
from meshwright.io.decoder import Decoder, Experts, Latent, Layer, Norm, Rotary
from meshwright.registry import Registry
from meshwright.strategy import nearest_divisor

#: Kinds of rotary scaling, and the keys that each needs beside it.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

#: Readers by `model_type`.
FAMILIES = Registry[Callable[["Config"], Decoder]]("model family")


# --- sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    kv_heads: int
    group: int
    head_dim: int


def _heads(c: Config, hidden: int, *, kv_default: int = 0, head_dim: int = 0, own_head_dim: bool = True) -> _Heads:
    """Head sizes; without a default of the family, key/value heads are as many as heads, heads divide hidden."""
    heads = c.size(*HEADS_KEYS)
    key = c.key(*KV_HEADS_KEYS)
    absent = not any(name in c.data for name in KV_HEADS_KEYS)
    kv_heads = c.size(key, default=(kv_default if absent and kv_default else heads))
    if heads and kv_heads and heads % kv_heads:
        said = " (the default of this family)" if c.data.get(key) is None else ""
        c.problem(
            key, kv_heads, f"must divide {c.key(*HEADS_KEYS)} = {heads}{said}", str(nearest_divisor(heads, kv_heads))
        )
    if own_head_dim and (c.data.get("head_dim") is not None or head_dim):
        width = c.size("head_dim", default=head_dim)
    else:
        width = hidden // heads if heads and hidden % heads == 0 else 0
        if hidden and heads and not width:
            above = -(-hidden // heads) * heads
            rule = f"must be a multiple of {c.key(*HEADS_KEYS)} = {heads}"
            rule += ", or head_dim be given" if own_head_dim else ""
            c.problem(c.key(*HIDDEN_KEYS), hidden, rule, f"{hidden // heads * heads or above} or {above}")
    return _Heads(kv_heads, heads // kv_heads if kv_heads else 0, width)


def _standard(
    c: Config,
    *,
    kv_default: int = 0,
    head_dim: int = 0,
    own_head_dim: bool = True,
    ffn_key: str = "intermediate_size",
    ffn_per_hidden: int = 0,
) -> Decoder:
    """Sizes, heads and the switches that nearly all families share; layers are uniform, without rotary positions.

    `ffn_per_hidden` is the width of the feed-forward in units of the hidden size where the family has such a rule, 0
    where the config must say it.
    """
    hidden = c.size(*HIDDEN_KEYS)
    num_layers = c.size(*LAYERS_KEYS, at_most=MAX_LAYERS)
    heads = _heads(c, hidden, kv_default=kv_default, head_dim=head_dim, own_head_dim=own_head_dim)
    return Decoder(
        name="",
        hidden=hidden,
        kv_heads=heads.kv_heads,
        group=heads.group,
        head_dim=heads.head_dim,
        ffn=c.size(ffn_key, default=ffn_per_hidden * hidden if ffn_per_hidden else None),
        vocab=c.size("vocab_size"),
        layers=(Layer(),),
        segments=(Segment(("layer",), max(num_layers, 1)),),
        attention=c.attention(),
    )


def _num_layers(decoder: Decoder) -> int:
    return sum(len(segment.blocks) * segment.repeat for segment in decoder.segments)


# --- positions and layer patterns -----------------------------------------------------------------------------------


def _rotary(
    c: Config,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    partial: float = 1.0,
    interleaved: bool = False,
    keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    layer_type: str = "",
) -> Rotary:
    """Rotary positions from an object of the config, or from the top-level `keys` of older configs.

    `theta` and `partial` are the family's defaults; `layer_type` reads the object of that kind of layer.
    """
    place, found = _rope_object(c, layer_type)
    section = c.section(place, found)
    base, share = (
        (section if found.get(new) is not None else c).number(new if found.get(new) is not None else old, default)
        for new, old, default in zip(_ROPE_KEYS, keys, (theta, partial), strict=True)
    )
    rotary_dim = int(head_dim * share)
    if head_dim and not (2 <= rotary_dim <= head_dim and rotary_dim % 2 == 0):
        rule = f"rotary positions turn {rotary_dim} of it; that must be even, from 2 to all of it"
        c.problem("head_dim", head_dim, rule)
    positions = c.data.get("max_position_embeddings")
    original = c.data.get("original_max_position_embeddings", positions)  # Phi-3 has it beside the object
    lengths = {"max_position_embeddings": positions, "original_max_position_embeddings": original}
    scaling = _rope_scaling(c.section(place, {**lengths, **found}))
    return Rotary(base, rotary_dim, interleaved, scaling)


_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")


def _rope_object(c: Config, layer_type: str) -> tuple[str, Mapping[str, Any]]:
    """The place and content of `rope_scaling` (old, read first as in transformers) or `rope_parameters` (new).

    For a kind of layer: what the new object says of it; the old one speaks of the layers with full attention.
    """
    old, new = (_object(c, key, c.data.get(key)) for key in ("rope_scaling", "rope_parameters"))
    if not layer_type:
        return ("rope_scaling", old) if old else ("rope_parameters", new)
    place = f"rope_parameters.{layer_type}"
    own = _object(c, place, new.get(layer_type))
    return place, {**own, **old} if layer_type == "full_attention" else own


def _object(c: Config, key: str, value: object) -> Mapping[str, Any]:
    if value is None or isinstance(value, Mapping):
        return value or {}
    c.problem(key, value, "must be an object")
    return {}


def _rope_scaling(c: Config) -> str:
    """The scaling of rotary positions as JSON text with all that its formula needs, empty for the plain kind."""
    key = c.key("rope_type", "type")
    kind = c.data.get(key) or "default"
    kind = "longrope" if kind == "su" or (kind == "yarn" and c.family == "phi3") else kind
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        near = nearest_name(kind, ROPE_TYPES) if isinstance(kind, str) else None
        c.problem(key, kind, f"known: {', '.join(ROPE_TYPES)}", near)
        return ""
    for needed in ROPE_TYPES[kind]:
        value = c.data.get(needed)
        values: list[Any] = value if isinstance(value, list) and needed in ("short_factor", "long_factor") else [value]
        if value is None:
            c.problem(needed, None, f"missing; {kind} scaling needs it")
        elif any(type(one) not in (int, float) or not 0 < one < MAX_NUMBER for one in values):
            c.problem(needed, value, "must be a number above 0, or a list of them for the factors of longrope")
    kept = {name: value for name, value in c.data.items() if name not in ("type", *_ROPE_KEYS) and value is not None}
    return "" if kind == "default" else json.dumps({**kept, "rope_type": kind}, sort_keys=True)


def _with_layers(decoder: Decoder, layers: Sequence[Layer]) -> Decoder:
    """`decoder` with these layers in their order, equal ones told once and repeated runs folded."""
    kinds = tuple(dict.fromkeys(layers))
    if len(kinds) == 1:
        kinds, names = (replace(kinds[0], name="layer"),), ["layer"] * len(layers)
    else:
        names = [layer.name for layer in layers]
    return replace(decoder, layers=kinds, segments=folded(names))


def folded(names: Sequence[str], longest: int = 64) -> tuple[Segment, ...]:
    """Segments that unfold to `names`: from the left, the pattern that explains the most.

    >>> [(segment.blocks, segment.repeat) for segment in folded("aabaabaa")]
    [(('a', 'a', 'b'), 2), (('a',), 2)]
    """
    segments = []
    start = 0
    while start < len(names):
        rest = len(names) - start
        period, repeat = max(
            ((p, _repeats(names, start, p)) for p in range(1, min(longest, rest) + 1)),
            key=lambda found: (found[0] * found[1] if found[1] > 1 or found[0] == 1 else 0, -found[0]),
        )
        segments.append(Segment(tuple(names[start : start + period]), repeat))
        start += period * repeat
    return tuple(segments)


def _repeats(names: Sequence[str], start: int, period: int) -> int:
    end = start + period
    while end < len(names) and names[end] == names[end - period]:
        end += 1
    return (end - start) // period


def _layer_types(c: Config, default: Sequence[bool]) -> list[bool]:
    """Of each layer, whether it sees a sliding window only."""
    rule = f"must be a list of {len(default)} names, each sliding_attention or full_attention"
    types = c.list_of("layer_types", str, rule)
    if types is None:
        return list(default)
    if len(types) != len(default) or set(types) - {"sliding_attention", "full_attention"}:
        c.problem("layer_types", types, rule)
        return list(default)
    return [kind == "sliding_attention" for kind in types]


def _local_and_global(decoder: Decoder, sliding: Sequence[bool], local: Layer, everywhere: Layer) -> Decoder:
    kinds = {True: replace(local, name="local"), False: replace(everywhere, name="global")}
    if kinds[True] == replace(kinds[False], name="local"):
        kinds[True] = kinds[False]
    return _with_layers(decoder, [kinds[one] for one in sliding])


def _uniform(decoder: Decoder, layer: Layer) -> Decoder:
    return replace(decoder, layers=(layer,))


# --- families -------------------------------------------------------------------------------------------------------


def _register(name: str) -> Callable[[Callable[[Config], Decoder]], Callable[[Config], Decoder]]:
    def register(read: Callable[[Config], Decoder]) -> Callable[[Config], Decoder]:
        FAMILIES.add(name, read)
        return read

    return register


def _llama_like(
    c: Config,
    *,
    kv_default: int = 0,
    head_dim: int = 0,
    eps: float = 1e-6,
    theta: float = 10_000.0,
    tied: bool = False,
) -> Decoder:
    """What Llama and its descendants share: RMS norms before each branch, rotary positions, a gated feed-forward."""
    decoder = _standard(c, kv_default=kv_default, head_dim=head_dim)
    return replace(
        _uniform(decoder, Layer(rotary=_rotary(c, decoder.head_dim, theta=theta))),
        tied=c.flag("tie_word_embeddings", tied),
        norm=Norm("rms", c.eps("rms_norm_eps", eps)),
        activation=c.activation(),
        attention_dropout=c.probability("attention_dropout"),
    )


def _window(c: Config, absent: int = 4096) -> int:
    """The sliding window; `absent` is the family's default, null is none."""
    return c.size("sliding_window", default=0 if "sliding_window" in c.data else absent)


def _windowed(c: Config, decoder: Decoder, absent: int) -> Decoder:
    """`decoder` with the same sliding window in all layers."""
    return _uniform(decoder, replace(decoder.layers[0], window=_window(c, absent)))


@_register("llama")
def _llama(c: Config) -> Decoder:
    bias = c.flag("attention_bias", False)
    return replace(_llama_like(c), qkv_bias=bias, out_bias=bias, mlp_bias=c.flag("mlp_bias", False))


@_register("mistral")
def _mistral(c: Config) -> Decoder:
    c.refuse("layer_types")
    return _windowed(c, _llama_like(c, kv_default=8), absent=4096)


@_register("mixtral")
def _mixtral(c: Config) -> Decoder:
    decoder = _windowed(c, _llama_like(c, kv_default=8, eps=1e-5, theta=1_000_000.0), absent=0)
    experts = _experts(c, count=8, topk=2, normalize=True)
    return replace(_uniform(decoder, replace(decoder.layers[0], sparse=True)), experts=experts)


def _experts(c: Config, *, count: int, topk: int, normalize: bool, shared_ffn: int = 0) -> Experts:
    key = c.key("num_experts", "num_local_experts")
    experts = Experts(
        c.size(key, default=count), c.size("num_experts_per_tok", default=topk), normalize, shared_ffn=shared_ffn
    )
    if experts.count and experts.topk > experts.count:
        rule = f"must be at most {key} = {experts.count}"
        c.problem("num_experts_per_tok", experts.topk, rule, str(experts.count))
    return experts


@_register("qwen2")
def _qwen2(c: Config) -> Decoder:
    return _qwen_windows(c, replace(_llama_like(c, kv_default=32), qkv_bias=True))


@_register("qwen3")
def _qwen3(c: Config) -> Decoder:
    return _qwen_windows(c, _qwen3_attention(c, _llama_like(c, kv_default=32, head_dim=128)))


def _qwen3_attention(c: Config, decoder: Decoder) -> Decoder:
    bias = c.flag("attention_bias", False)
    return replace(decoder, qk_norm=decoder.norm, qkv_bias=bias, out_bias=bias)


def _qwen_windows(c: Config, decoder: Decoder) -> Decoder:
    """Full attention in the first `max_window_layers` layers, a window in the others, where windows are on at all."""
    window = _window(c) if c.flag("use_sliding_window", False) else 0
    full_until = int(c.number("max_window_layers", 28))
    sliding = _layer_types(c, [bool(window) and index >= full_until for index in range(_num_layers(decoder))])
    everywhere = decoder.layers[0]
    return _local_and_global(decoder, sliding, replace(everywhere, window=window), everywhere)


@_register("qwen2_moe")
def _qwen2_moe(c: Config) -> Decoder:
    decoder = replace(_llama_like(c, kv_default=16), qkv_bias=c.flag("qkv_bias", True))
    c.refuse("use_sliding_window", False)
    shared = c.size("shared_expert_intermediate_size", default=5632)
    normalize = c.flag("norm_topk_prob", False)
    experts = _experts(c, count=60, topk=4, normalize=normalize, shared_ffn=shared)
    return _sparse_layers(c, replace(decoder, experts=experts, ffn=c.size("moe_intermediate_size", default=1408)))


@_register("qwen3_moe")
def _qwen3_moe(c: Config) -> Decoder:
    decoder = _qwen3_attention(c, _llama_like(c, kv_default=4))
    c.refuse("use_sliding_window", False)
    experts = _experts(c, count=128, topk=8, normalize=c.flag("norm_topk_prob", False))
    return _sparse_layers(c, replace(decoder, experts=experts, ffn=c.size("moe_intermediate_size", default=768)))


def _sparse_layers(c: Config, decoder: Decoder) -> Decoder:
    """Experts in every `decoder_sparse_step`-th layer, except in those listed as dense."""
    step = c.size("decoder_sparse_step", default=1) or 1
    dense = set(c.list_of("mlp_only_layers", int, "must be a list of layer indices") or ())
    plain = replace(decoder.layers[0], name="dense")
    routed = replace(decoder.layers[0], name="layer", sparse=True)
    indices = range(_num_layers(decoder))
    layers = [routed if (index + 1) % step == 0 and index not in dense else plain for index in indices]
    width = c.size("intermediate_size", default=1) if plain in layers else 0
    if routed not in layers:
        return _with_layers(replace(decoder, experts=None, ffn=width), layers)
    return _with_layers(replace(decoder, dense_ffn=width), layers)


@_register("deepseek_v3")
def _deepseek_v3(c: Config) -> Decoder:
    """Latent attention, and experts in all layers but the first."""
    plain, rope = c.size("qk_nope_head_dim", default=128), c.size("qk_rope_head_dim", default=64)
    # Of the latent every head makes its own keys, whatever the config says; its head_dim is that of the rotary part.
    decoder = _standard(c.revised({key: value for key, value in c.data.items() if key not in _NOT_LATENT}), head_dim=1)
    latent = Latent(
        kv_rank=c.size("kv_lora_rank", default=512),
        rope_dim=rope,
        value_dim=c.size("v_head_dim", default=128),
        q_rank=c.size("q_lora_rank", default=0 if "q_lora_rank" in c.data else 1536),
    )
    width = c.size("moe_intermediate_size", default=2048)
    shared = width * c.size("n_shared_experts", default=1)
    experts = Experts(
        c.size("n_routed_experts", default=256),
        c.size("num_experts_per_tok", default=8),
        c.flag("norm_topk_prob", True),
        shared_ffn=shared,
        shared_gate=False,
    )
    everywhere = Layer(rotary=_rotary(c, rope))
    num_dense = min(int(c.number("first_k_dense_replace", 3)), _num_layers(decoder))
    dense, routed = replace(everywhere, name="dense"), replace(everywhere, name="layer", sparse=True)
    decoder = replace(
        decoder,
        head_dim=plain + rope,
        latent=latent,
        experts=experts,
        dense_ffn=decoder.ffn if num_dense else 0,
        ffn=width,
        tied=c.flag("tie_word_embeddings", False),
        norm=Norm("rms", c.eps("rms_norm_eps", 1e-6)),
        activation=c.activation(),
        attention_dropout=c.probability("attention_dropout"),
    )
    return _with_layers(decoder, [dense] * num_dense + [routed] * (_num_layers(decoder) - num_dense))


_NOT_LATENT = ("head_dim", *KV_HEADS_KEYS)

_GPT_OSS_ROPE = {
    "rope_parameters": {
        "rope_theta": 150_000.0,
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131_072,
}


@_register("gpt_oss")
def _gpt_oss(c: Config) -> Decoder:
    """Windows in every other layer, a sink per head, experts with biases."""
    if not {"rope_scaling", "rope_parameters"} & set(c.data):
        c = c.revised({**_GPT_OSS_ROPE, **c.data})
    decoder = _llama_like(c, kv_default=8, head_dim=64, eps=1e-5, theta=150_000.0)
    bias = c.flag("attention_bias", True)
    experts = replace(_experts(c, count=128, topk=4, normalize=True), bias=True)
    layer = replace(decoder.layers[0], sparse=True)
    window = c.size("sliding_window", default=0 if "sliding_window" in c.data else 128)
    sliding = _layer_types(c, [index % 2 == 0 for index in range(_num_layers(decoder))])
    decoder = replace(decoder, qkv_bias=bias, out_bias=bias, sinks=True, experts=experts)
    return _local_and_global(decoder, sliding, replace(layer, window=window), layer)


@_register("gpt2")
def _gpt2(c: Config) -> Decoder:
    c.refuse("scale_attn_by_inverse_layer_idx", False)
    c.refuse("add_cross_attention", False)
    decoder = _standard(c, own_head_dim=False, ffn_key="n_inner", ffn_per_hidden=4)
    return replace(
        decoder,
        positions=c.size("n_positions", "max_position_embeddings", default=1024),
        tied=c.flag("tie_word_embeddings", True),
        norm=Norm("layer", c.eps("layer_norm_epsilon", 1e-5), bias=True),
        scale=0.0 if c.flag("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation=c.activation("activation_function", "gelu_new"),
        embedding_dropout=c.probability("embd_pdrop", 0.1),
        attention_dropout=c.probability("attn_pdrop", 0.1),
        residual_dropout=c.probability("resid_pdrop", 0.1),
        mlp_dropout=c.probability("resid_pdrop", 0.1),
    )


@_register("gpt_neox")
def _gpt_neox(c: Config) -> Decoder:
    decoder = _standard(c, own_head_dim=False)
    rotary = _rotary(c, decoder.head_dim, partial=0.25, keys=("rotary_emb_base", "rotary_pct"))
    bias = c.flag("attention_bias", True)
    dropout = c.probability("hidden_dropout")
    return replace(
        _uniform(decoder, Layer(rotary=rotary)),
        tied=c.flag("tie_word_embeddings", False),
        norm=Norm("layer", c.eps("layer_norm_eps", 1e-5), bias=True),
        parallel=c.flag("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        gated=False,
        activation=c.activation(default="gelu"),
        embedding_dropout=dropout,
        attention_dropout=c.probability("attention_dropout"),
        residual_dropout=dropout,
        mlp_dropout=dropout,
    )


@_register("phi")
def _phi(c: Config) -> Decoder:
    decoder = _standard(c)
    norm = Norm("layer", c.eps("layer_norm_eps", 1e-5), bias=True)
    dropout = c.probability("resid_pdrop")
    return replace(
        _uniform(decoder, Layer(rotary=_rotary(c, decoder.head_dim, partial=0.5))),
        tied=c.flag("tie_word_embeddings", False),
        norm=norm,
        qk_norm=norm if c.flag("qk_layernorm", False) else None,
        parallel=True,
        shared_norm=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        lm_bias=True,
        gated=False,
        activation=c.activation(default="gelu_new"),
        embedding_dropout=c.probability("embd_pdrop"),
        attention_dropout=c.probability("attention_dropout"),
        residual_dropout=dropout,
        mlp_dropout=dropout,
    )


@_register("phi3")
def _phi3(c: Config) -> Decoder:
    dropout = c.probability("resid_pdrop")
    decoder = replace(_llama_like(c, eps=1e-5), residual_dropout=dropout, mlp_dropout=dropout)
    return _windowed(c, decoder, absent=0)


@_register("gemma")
def _gemma(c: Config) -> Decoder:
    decoder = replace(_gemma_like(c, kv_default=16), activation=c.activation(default="gelu_pytorch_tanh"))
    return replace(decoder, activation="gelu_tanh") if c.data.get("hidden_act") == "gelu" else decoder


def _gemma_like(c: Config, kv_default: int) -> Decoder:
    """Llama with weights stored less 1, scaled embeddings, wide heads; its configs' `hidden_act` may be a legacy."""
    c.refuse("use_bidirectional_attention", False)
    decoder = _llama_like(c, kv_default=kv_default, head_dim=256, tied=True)
    bias = c.flag("attention_bias", False)
    return replace(
        decoder,
        norm=replace(decoder.norm, weight_offset=1.0),
        embedding_scale=math.sqrt(decoder.hidden),
        qkv_bias=bias,
        out_bias=bias,
    )


@_register("gemma2")
def _gemma2(c: Config) -> Decoder:
    decoder = _gemma2_like(c, attention_softcap=50.0, logit_softcap=30.0)
    sliding = _layer_types(c, [index % 2 == 0 for index in range(_num_layers(decoder))])
    return _gemma_windows(c, decoder, sliding, decoder.layers[0], decoder.layers[0])


def _gemma2_like(c: Config, *, attention_softcap: float, logit_softcap: float) -> Decoder:
    return replace(
        _gemma_like(c, kv_default=4),
        norm_place="sandwich",
        activation=c.activation("hidden_activation", "gelu_pytorch_tanh"),
        scale=c.number("query_pre_attn_scalar", 256.0, at_least=1e-9) ** -0.5,
        softcap=_nullable(c, "attn_logit_softcapping", attention_softcap),
        logit_softcap=_nullable(c, "final_logit_softcapping", logit_softcap),
    )


def _nullable(c: Config, key: str, absent: float) -> float:
    """A number whose null means that the feature is off, other than leaving it out."""
    return c.number(key, 0.0) if key in c.data else absent


def _gemma_windows(c: Config, decoder: Decoder, sliding: Sequence[bool], local: Layer, everywhere: Layer) -> Decoder:
    return _local_and_global(decoder, sliding, replace(local, window=_window(c)), everywhere)


@_register("gemma3_text")
def _gemma3(c: Config) -> Decoder:
    decoder = _gemma2_like(c, attention_softcap=0.0, logit_softcap=0.0)
    pattern = c.size("sliding_window_pattern", "_sliding_window_pattern", default=6) or 6
    sliding = _layer_types(c, [(index + 1) % pattern != 0 for index in range(_num_layers(decoder))])
    everywhere = _rotary(c, decoder.head_dim, theta=1_000_000.0, layer_type="full_attention")
    keys = ("rope_local_base_freq", "partial_rotary_factor")
    local = _rotary(c, decoder.head_dim, keys=keys, layer_type="sliding_attention")
    decoder = replace(decoder, qk_norm=decoder.norm)
    return _gemma_windows(c, decoder, sliding, Layer(rotary=local), Layer(rotary=everywhere))


@_register("olmo")
def _olmo(c: Config) -> Decoder:
    bias = c.flag("attention_bias", False)
    norm = Norm("layer", 1e-5, weight=False)
    return replace(_llama_like(c), norm=norm, qkv_bias=bias, out_bias=bias, qkv_clip=c.number("clip_qkv", 0.0))


@_register("olmo2")
def _olmo2(c: Config) -> Decoder:
    decoder = _llama_like(c, eps=1e-5)
    bias = c.flag("attention_bias", False)
    return replace(decoder, norm_place="post", qk_norm=decoder.norm, qk_norm_scope="all", qkv_bias=bias, out_bias=bias)


@_register("stablelm")
def _stablelm(c: Config) -> Decoder:
    decoder = _standard(c, kv_default=32, own_head_dim=False)
    eps = c.eps("layer_norm_eps", 1e-5)
    parallel = c.flag("use_parallel_residual", False)
    return replace(
        _uniform(decoder, Layer(rotary=_rotary(c, decoder.head_dim, partial=0.25))),
        tied=c.flag("tie_word_embeddings", False),
        norm=Norm("layer", eps, bias=True),
        qk_norm=Norm("layer", eps) if c.flag("qk_layernorm", False) else None,
        qk_norm_scope="per_head",
        parallel=parallel,
        shared_norm=parallel,
        qkv_bias=c.flag("use_qkv_bias", False),
        activation=c.activation(),
        attention_dropout=c.probability("attention_dropout"),
        mlp_dropout=c.probability("hidden_dropout"),
    )


@_register("starcoder2")
def _starcoder2(c: Config) -> Decoder:
    decoder = _standard(c, kv_default=2)
    bias = c.flag("use_bias", True)
    dropout = c.probability("residual_dropout")
    decoder = replace(
        _uniform(decoder, Layer(rotary=_rotary(c, decoder.head_dim))),
        tied=c.flag("tie_word_embeddings", True),
        norm=Norm("layer", c.eps("norm_epsilon", 1e-5), bias=True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        gated=False,
        activation=c.activation(default="gelu_pytorch_tanh"),
        embedding_dropout=c.probability("embedding_dropout"),
        attention_dropout=c.probability("attention_dropout"),
        residual_dropout=dropout,
        mlp_dropout=dropout,
    )
    return _windowed(c, decoder, absent=0)


@_register("cohere")
def _cohere(c: Config) -> Decoder:
    decoder = _standard(c)
    norm = Norm("layer", c.eps("layer_norm_eps", 1e-5))
    bias = c.flag("attention_bias", False)
    return replace(
        _uniform(decoder, Layer(rotary=_rotary(c, decoder.head_dim, theta=500_000.0, interleaved=True))),
        tied=c.flag("tie_word_embeddings", True),
        norm=norm,
        qk_norm=norm if c.flag("use_qk_norm", False) else None,
        qk_norm_scope="per_head",
        parallel=True,
        shared_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        activation=c.activation(),
        logit_scale=c.number("logit_scale", 0.0625),
        attention_dropout=c.probability("attention_dropout"),
    )


@_register("granite")
def _granite(c: Config) -> Decoder:
    bias = c.flag("attention_bias", False)
    return replace(
        _llama_like(c),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
        embedding_scale=c.number("embedding_multiplier", 1.0),
        residual_scale=c.number("residual_multiplier", 1.0),
        scale=c.number("attention_multiplier", 1.0, at_least=1e-9),
        logit_scale=1.0 / c.number("logits_scaling", 1.0, at_least=1e-9),
    )


@_register("opt")
def _opt(c: Config) -> Decoder:
    decoder = _standard(c, own_head_dim=False, ffn_key="ffn_dim")
    c.refuse("layerdrop", 0.0, 0)
    before = c.flag("do_layer_norm_before", True)
    affine = c.flag("layer_norm_elementwise_affine", True)
    bias = c.flag("enable_bias", True)
    embed = c.size("word_embed_proj_dim", default=decoder.hidden)
    dropout = c.probability("dropout", 0.1)
    return replace(
        decoder,
        positions=c.size("max_position_embeddings", default=2048) + 2,
        position_offset=2,
        embed=0 if embed == decoder.hidden else embed,
        tied=c.flag("tie_word_embeddings", True),
        final_norm=before and not c.flag("_remove_final_layer_norm", False),
        norm=Norm("layer", 1e-5, weight=affine, bias=affine),
        norm_place="pre" if before else "after",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        gated=False,
        activation=c.activation("activation_function", "relu"),
        attention_dropout=c.probability("attention_dropout"),
        residual_dropout=dropout,
        mlp_dropout=dropout,
    )


@_register("bloom")
def _bloom(c: Config) -> Decoder:
    decoder = _standard(c, own_head_dim=False, ffn_per_hidden=4)
    dropout = c.probability("hidden_dropout")
    return replace(
        decoder,
        ffn=4 * decoder.hidden,  # transformers reads no key here
        embedding_norm=True,
        tied=c.flag("tie_word_embeddings", True),
        norm=Norm("layer", c.eps("layer_norm_epsilon", 1e-5), bias=True),
        residual_is_normed=c.flag("apply_residual_connection_post_layernorm", False),
        alibi="plain",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation="gelu_tanh",
        attention_dropout=c.probability("attention_dropout"),
        residual_dropout=dropout,
        mlp_dropout=dropout,
    )


@_register("falcon")
def _falcon(c: Config) -> Decoder:
    new = c.flag("new_decoder_architecture", False)
    norms = c.size("num_ln_in_parallel_attn", default=2 if new else 1, at_most=2 if new else 1)
    decoder = _falcon_heads(c, _standard(c, own_head_dim=False, ffn_key="ffn_hidden_size", ffn_per_hidden=4), new)
    parallel = new or c.flag("parallel_attn", True)
    alibi = c.flag("alibi", False)
    bias = c.flag("bias", False)
    dropout, attention_dropout = c.probability("hidden_dropout"), c.probability("attention_dropout")
    return replace(
        decoder if alibi else _uniform(decoder, Layer(rotary=_rotary(c, decoder.head_dim))),
        tied=c.flag("tie_word_embeddings", True),
        norm=Norm("layer", c.eps("layer_norm_epsilon", 1e-5), bias=True),
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        alibi="scaled" if alibi else "none",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        gated=False,
        activation=c.activation("activation", "gelu"),
        attention_dropout=attention_dropout if alibi else 0.0,  # transformers has none beside rotary positions
        residual_dropout=0.0 if parallel else attention_dropout,
        mlp_dropout=0.0 if parallel else dropout,
        sum_dropout=dropout if parallel else 0.0,
    )


def _falcon_heads(c: Config, decoder: Decoder, new: bool) -> Decoder:
    """Before the new architecture Falcon knows one key/value head or as many as heads; `num_kv_heads` is not read."""
    heads = decoder.kv_heads * decoder.group
    if new:
        return decoder
    return (
        replace(decoder, kv_heads=1, group=heads)
        if c.flag("multi_query", True)
        else replace(decoder, kv_heads=heads, group=1)
    )


@_register("palm")
def _palm(c: Config) -> Decoder:
    """PaLM (Chowdhery 2204.02311, section 2): not in transformers; one key/value head, parallel branches, no biases."""
    decoder = _standard(c, kv_default=1)
    return replace(
        _uniform(decoder, Layer(rotary=_rotary(c, decoder.head_dim))),
        tied=c.flag("tie_word_embeddings", True),
        norm=Norm("layer", c.eps("layer_norm_eps", 1e-6)),
        parallel=True,
        shared_norm=True,
        activation=c.activation(),
    )


@_register("gopher")
def _gopher(c: Config) -> Decoder:
    """Gopher (Rae 2112.11446, section 2.1): not in transformers; GPT-2 with RMS norms and relative positions."""
    decoder = _standard(c, ffn_per_hidden=4)
    return replace(
        decoder,
        tied=c.flag("tie_word_embeddings", True),
        norm=Norm("rms", c.eps("rms_norm_eps", 1e-6)),
        attention="unfused",
        relative=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation=c.activation(default="gelu"),
    )
