"""Configs in: parameter counts are those of transformers, defaults too; wrong configs are told all that is wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.graph import graph_problems
from meshwright.io.huggingface import FAMILIES, decoder_from_config
from meshwright.io.models import graph_from_config, load_model, model_presets

OURS_ONLY = {"palm", "gopher"}


def config(family: str, hidden: int, layers: int, heads: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        **more,
    }


#: Values of published config.json files.
REAL = {
    "Llama-2-7B": config("llama", 4096, 32, 32, 11008, 32000, rms_norm_eps=1e-5),
    "Llama-3-8B": config("llama", 4096, 32, 32, 14336, 128256, num_key_value_heads=8, rope_theta=500000.0),
    "Llama-3-70B": config("llama", 8192, 80, 64, 28672, 128256, num_key_value_heads=8, rope_theta=500000.0),
    "Mistral-7B": config("mistral", 4096, 32, 32, 14336, 32000, num_key_value_heads=8, sliding_window=4096),
    "Mistral-Nemo": config("mistral", 5120, 40, 32, 14336, 131072, num_key_value_heads=8, head_dim=128),
    "Qwen2-0.5B": config("qwen2", 896, 24, 14, 4864, 151936, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2-7B": config("qwen2", 3584, 28, 28, 18944, 152064, num_key_value_heads=4, tie_word_embeddings=False),
    "Qwen3-8B": config("qwen3", 4096, 36, 32, 12288, 151936, num_key_value_heads=8, head_dim=128),
    "Qwen3-0.6B": config(
        "qwen3", 1024, 28, 16, 3072, 151936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True
    ),
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257},
    "pythia-6.9b": config("gpt_neox", 4096, 32, 32, 16384, 50432, rotary_pct=0.25),
    "phi-2": config("phi", 2560, 32, 32, 10240, 51200, partial_rotary_factor=0.4, resid_pdrop=0.1),
    "phi, q/k norms": config("phi", 256, 2, 4, 512, 1000, qk_layernorm=True, num_key_value_heads=2),
    "Phi-3-mini": config("phi3", 3072, 32, 32, 8192, 32064, sliding_window=2047, num_key_value_heads=32),
    "gemma-2b": config("gemma", 2048, 18, 8, 16384, 256000, num_key_value_heads=1, head_dim=256),
    "gemma-7b": config("gemma", 3072, 28, 16, 24576, 256000, num_key_value_heads=16, head_dim=256),
    "gemma-2-9b": config("gemma2", 3584, 42, 16, 14336, 256000, num_key_value_heads=8, head_dim=256),
    "gemma-3-1b": config("gemma3_text", 1152, 26, 4, 6912, 262144, num_key_value_heads=1, head_dim=256),
    "OLMo-7B": config("olmo", 4096, 32, 32, 11008, 50304, clip_qkv=8.0),
    "OLMo-2-7B": config("olmo2", 4096, 32, 32, 11008, 100352, num_key_value_heads=32, rope_theta=500000),
    "OLMo-2-32B": config("olmo2", 5120, 64, 40, 27648, 100352, num_key_value_heads=8),
    "stablelm-2-1_6b": config("stablelm", 2048, 24, 32, 5632, 100352, num_key_value_heads=32, use_qkv_bias=True),
    "stablelm-2-12b": config(
        "stablelm",
        5120,
        40,
        32,
        13824,
        100352,
        num_key_value_heads=8,
        qk_layernorm=True,
        use_parallel_residual=True,
    ),
    "starcoder2-7b": config("starcoder2", 4608, 32, 36, 18432, 49152, num_key_value_heads=4, use_bias=True),
    "command-r": config("cohere", 8192, 40, 64, 22528, 256000, logit_scale=0.0625, rope_theta=8000000.0),
    "command-r-plus": config("cohere", 12288, 64, 96, 33792, 256000, num_key_value_heads=8, use_qk_norm=True),
    "granite-3-8b": config(
        "granite",
        4096,
        40,
        32,
        12800,
        49155,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0078125,
        logits_scaling=16.0,
    ),
    "opt-1.3b": {**config("opt", 2048, 24, 32, 0, 50272), "ffn_dim": 8192},
    "opt-350m": {
        **config("opt", 1024, 24, 16, 0, 50272, do_layer_norm_before=False, word_embed_proj_dim=512),
        "ffn_dim": 4096,
    },
    "opt, bare": {
        **config("opt", 64, 2, 4, 0, 100, enable_bias=False, layer_norm_elementwise_affine=False),
        "ffn_dim": 128,
    },
    "bloom-7b1": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    "falcon-7b": {
        **config("falcon", 4544, 32, 71, 0, 65024, multi_query=True, parallel_attn=True, bias=False, alibi=False)
    },
    "falcon-40b": config("falcon", 8192, 60, 128, 0, 65024, new_decoder_architecture=True, num_kv_heads=8),
    "falcon-rw-1b": config(
        "falcon", 2048, 24, 32, 0, 50304, alibi=True, bias=True, multi_query=False, parallel_attn=False
    ),
    "Mixtral-8x7B": config("mixtral", 4096, 32, 32, 14336, 32000, num_key_value_heads=8, num_local_experts=8),
    "Qwen1.5-MoE-A2.7B": config(
        "qwen2_moe",
        2048,
        24,
        16,
        5632,
        151936,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "Qwen3-30B-A3B": config(
        "qwen3_moe",
        2048,
        48,
        32,
        6144,
        151936,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "DeepSeek-V3": config(
        "deepseek_v3", 7168, 61, 128, 18432, 129280, num_key_value_heads=128, n_routed_experts=256, q_lora_rank=1536
    ),
    "deepseek_v3, plain queries": config(
        "deepseek_v3",
        256,
        4,
        8,
        512,
        1000,
        q_lora_rank=None,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=2,
    ),
    "gpt-oss-120b": config(
        "gpt_oss", 2880, 36, 64, 2880, 201088, num_key_value_heads=8, head_dim=64, num_local_experts=128
    ),
    "qwen3_moe, some dense": config(
        "qwen3_moe", 256, 7, 8, 512, 1000, decoder_sparse_step=2, mlp_only_layers=[3], num_experts=8, head_dim=32
    ),
}
for _name in REAL:
    if REAL[_name].get("intermediate_size") == 0:
        del REAL[_name]["intermediate_size"]

#: The published number of parameters of each preset, and where the paper rounds coarsely, half of its last digit.
PUBLISHED = {
    "deepseek-v3": 671e9,
    "kimi-k2": 1.03e12,
    "gpt-oss-120b": 116.8e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen3-235b-a22b": 235e9,
    "qwen2-57b-a14b": 57.4e9,
    "bloom-176b": 176.25e9,
    "gemma-2-27b": 27.23e9,
    "gemma-2-9b": 9.24e9,
    "gemma-7b": 8.54e9,
    "gopher-280b": 280e9,
    "gpt2": 124.44e6,
    "gpt2-tiny": 232_832,
    "gpt2-xl": 1557.6e6,
    "gpt3-1.3b": (1.3e9, 0.05e9),
    "gpt3-125m": 125e6,
    "gpt3-13b": (13e9, 0.5e9),
    "gpt3-175b": 174.6e9,
    "gpt3-2.7b": (2.7e9, 0.05e9),
    "gpt3-350m": (350e6, 7e6),  # the paper's own table gives 356 million
    "gpt3-6.7b": 6.7e9,
    "gpt3-760m": 760e6,
    "llama-2-13b": 13.016e9,
    "llama-2-70b": 68.977e9,
    "llama-2-7b": 6.738e9,
    "llama-3-70b": 70.554e9,
    "llama-3-8b": 8.030e9,
    "llama-3.1-405b": 405.85e9,
    "llama-3.1-8b": 8.030e9,
    "llama-3.2-1b": 1.236e9,
    "llama-tiny": 180_800,
    "megatron-1.7b": (1.7e9, 0.05e9),
    "megatron-145b": 145.6e9,
    "megatron-18b": 18.4e9,
    "megatron-1t": 1008.0e9,
    "megatron-22b": (22e9, 0.5e9),
    "megatron-3.6b": (3.6e9, 0.05e9),
    "megatron-310b": 310.1e9,
    "megatron-39b": 39.1e9,
    "megatron-530b": 529.6e9,
    "megatron-7.5b": 7.5e9,
    "megatron-76b": 76.1e9,
    "megatron-8.3b": 8.3e9,
    "mistral-7b": 7.242e9,
    "mixtral-8x22b": 140.62e9,
    "mixtral-8x7b": 46.70e9,
    "mt-nlg-530b": 530e9,
    "palm-540b": 540.35e9,
    "qwen2-7b": 7.616e9,
    "qwen2-tiny": 164_928,
    "qwen2.5-72b": 72.706e9,
    "qwen2.5-7b": 7.616e9,
    "qwen3-32b": 32.762e9,
    "qwen3-8b": 8.191e9,
}


@functools.cache
def transformers_count(text: str) -> int:
    """Parameters of the model that transformers builds from a config on the meta device, tied ones once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(text)))
    return sum(parameter.numel() for parameter in model.parameters())


def counted(data: dict[str, Any]) -> int:
    public = {key: value for key, value in data.items() if not key.startswith("_")}
    return transformers_count(json.dumps(public, sort_keys=True))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - OURS_ONLY))
def test_default_config_has_the_parameters_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    data = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    graph = graph_from_config(data)
    assert graph_problems(graph) == []
    assert graph.num_parameters == counted({"model_type": family})


@pytest.mark.parametrize("name", REAL)
def test_real_config_has_the_parameters_of_transformers(name: str) -> None:
    graph = graph_from_config(REAL[name], name=name)
    assert graph_problems(graph) == []
    assert graph.name == name
    assert graph.num_parameters == counted(REAL[name])


SIZES_ONLY = {
    # heads chosen so that the families' own numbers of key/value heads (8, 32, 16, 4, 2) divide them
    family: config(family, 4096, 6, 32, 512, 33_000)
    for family in sorted(set(FAMILIES) - OURS_ONLY)
} | {
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "opt": {**config("opt", 64, 2, 4, 512, 100), "ffn_dim": 512},
}


@pytest.mark.parametrize("family", SIZES_ONLY)
def test_what_is_absent_has_the_default_of_transformers(family: str) -> None:
    assert graph_from_config(SIZES_ONLY[family]).num_parameters == counted(SIZES_ONLY[family])


@pytest.mark.parametrize("family", SIZES_ONLY)
def test_defaults_are_those_that_transformers_writes_down(family: str) -> None:
    """Leaving everything out is the same network, attributes included, as spelling out transformers' defaults."""
    from transformers import AutoConfig

    spelt = AutoConfig.for_model(**SIZES_ONLY[family]).to_json_string(use_diff=False)
    assert decoder_from_config(json.loads(spelt)) == decoder_from_config(SIZES_ONLY[family])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_writes_a_sound_graph_either_way(family: str) -> None:
    data = {**config(family, 4096, 6, 32, 512, 1000), "ffn_dim": 512}
    for implementation in ("eager", "sdpa"):
        graph = graph_from_config({**data, "_attn_implementation": implementation})
        assert graph_problems(graph) == []
        kinds = {op.kind for block in graph.blocks for op in block.operators}
        assert ("softmax" in kinds) == (implementation == "eager" or family == "gopher")


# --- what parameters do not show ------------------------------------------------------------------------------------


def attributes(data: dict[str, Any], kind: str, block: str = "layer") -> dict[str, Any]:
    graph = graph_from_config(data)
    return next(op.attributes for op in graph.block[block].operators if op.kind == kind)


def test_gemma2_alternates_windows_and_caps() -> None:
    graph = graph_from_config(REAL["gemma-2-9b"])
    assert [(segment.blocks, segment.repeat) for segment in graph.segments[1:-1]] == [(("local", "global"), 21)]
    local = attributes(REAL["gemma-2-9b"], "attention", "local")
    assert (local["window"], local["softcap"], local["scale"]) == (4096, 50.0, 256**-0.5)
    assert attributes(REAL["gemma-2-9b"], "attention", "global")["window"] == 0
    assert attributes(REAL["gemma-2-9b"], "softcap", "head") == {"cap": 30.0}
    assert attributes(REAL["gemma-2-9b"], "scale", "embedding") == {"factor": 3584**0.5}
    assert attributes(REAL["gemma-2-9b"], "norm", "local")["weight_offset"] == 1.0


def test_gemma3_has_two_rotary_bases() -> None:
    graph = graph_from_config(REAL["gemma-3-1b"])
    assert [(segment.blocks, segment.repeat) for segment in graph.segments[1:-1]] == [
        (("local",) * 5 + ("global",), 4),
        (("local",), 2),
    ]
    assert attributes(REAL["gemma-3-1b"], "rotary", "local")["theta"] == 10_000.0
    assert attributes(REAL["gemma-3-1b"], "rotary", "global")["theta"] == 1_000_000.0
    old = {**REAL["gemma-3-1b"], "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert attributes(old, "rotary", "local") == {
        "theta": 5e3,
        "rotary_dim": 256,
        "interleaved": False,
        "scaling": "",
    }
    assert json.loads(attributes(old, "rotary", "global")["scaling"])["factor"] == 8.0


def test_old_and_new_rotary_keys_mean_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {**REAL["Llama-3-8B"], "rope_scaling": scaling, "max_position_embeddings": 131072}
    new = {**old, "rope_parameters": {**scaling, "rope_theta": 500000.0}}
    del new["rope_scaling"], new["rope_theta"]
    assert attributes(old, "rotary") == attributes(new, "rotary")
    assert attributes(new, "rotary")["theta"] == 500000.0
    assert json.loads(attributes(new, "rotary")["scaling"]) == {
        **scaling,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 131072,
    }


def test_partial_and_interleaved_rotary() -> None:
    assert attributes(REAL["phi-2"], "rotary")["rotary_dim"] == 32  # 0.4 of 80
    assert attributes(REAL["pythia-6.9b"], "rotary")["rotary_dim"] == 32  # 0.25 of 128
    assert attributes(REAL["command-r"], "rotary")["interleaved"] is True


def test_falcon_variants() -> None:
    assert graph_from_config(REAL["falcon-7b"]).dims["kv_heads"] == 1
    assert "norm2.weight" not in graph_from_config(REAL["falcon-7b"]).block["layer"].tensor
    assert "norm2.weight" in graph_from_config(REAL["falcon-40b"]).block["layer"].tensor
    alibi = attributes(REAL["falcon-rw-1b"], "attention")
    assert (alibi["alibi"], alibi["alibi_scale"]) == (True, 64**-0.5)


def test_opt_counts_positions_from_two() -> None:
    graph = graph_from_config(REAL["opt-1.3b"])
    assert graph.dims["positions"] == 2050
    assert attributes(REAL["opt-1.3b"], "position_embedding", "embedding") == {"offset": 2}


def test_windows_of_qwen_start_late() -> None:
    data = {**REAL["Qwen2-7B"], "use_sliding_window": True, "max_window_layers": 20, "sliding_window": 512}
    graph = graph_from_config(data)
    assert [(segment.blocks, segment.repeat) for segment in graph.segments[1:-1]] == [
        (("global",), 20),
        (("local",), 8),
    ]
    assert {block.name for block in graph_from_config(REAL["Qwen2-7B"]).blocks} == {"embedding", "layer", "head"}


def test_text_model_of_a_multimodal_config() -> None:
    data = {"model_type": "llava", "text_config": REAL["Llama-3-8B"], "vision_config": {"hidden_size": 1024}}
    assert graph_from_config(data).num_parameters == graph_from_config(REAL["Llama-3-8B"]).num_parameters
    with pytest.raises(InputError, match=r"^c\.json: text_config\.vocab_size = -1: must be a whole number"):
        decoder_from_config({**data, "text_config": {**REAL["Llama-3-8B"], "vocab_size": -1}}, "c.json")


# --- errors ---------------------------------------------------------------------------------------------------------


def problems(data: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        decoder_from_config(data, "c.json")
    return [str(problem) for problem in caught.value.problems]


def test_all_faults_at_once() -> None:
    data = {
        "model_type": "llama",
        "hidden_size": 100,
        "num_attention_heads": 32,
        "num_key_value_heads": 5,
        "num_hidden_layer": 4,
        "intermediate_size": -1,
        "vocab_size": 32000.5,
        "rms_norm_eps": "1e-5",
        "tie_word_embeddings": 1,
        "hidden_act": "gelo",
        "rope_scaling": {"type": "linaer"},
    }
    assert problems(data) == [
        "c.json: num_hidden_layers: missing; a llama config must say it (num_hidden_layers or n_layer)"
        " (nearest: num_hidden_layer)",
        "c.json: num_key_value_heads = 5: must divide num_attention_heads = 32 (nearest: 4)",
        "c.json: hidden_size = 100: must be a multiple of num_attention_heads = 32, or head_dim be given"
        " (nearest: 96 or 128)",
        "c.json: intermediate_size = -1: must be a whole number from 1 to 1,099,511,627,776",
        "c.json: vocab_size = 32000.5: must be a whole number from 1 to 1,099,511,627,776 (nearest: 32000)",
        "c.json: rope_scaling.type = linaer: known: default, linear, dynamic, yarn, longrope, llama3 (nearest: linear)",
        "c.json: tie_word_embeddings = 1: must be true or false",
        "c.json: rms_norm_eps = 1e-5: must be a number of at least 0 and less than 1",
        "c.json: hidden_act = gelo: known: gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh,"
        " gelu_python_tanh, silu, swish, relu, relu2 (nearest: gelu)",
    ]


@pytest.mark.parametrize("value", [0, -4, 2.5, "32", True, [32], {}, 10**30])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_sizes_are_whole_numbers(key: str, value: object) -> None:
    found = problems({**REAL["Llama-2-7B"], key: value})
    assert len(found) == 1
    assert found[0].startswith(f"c.json: {key} = ")


def test_unknown_family_lists_the_known() -> None:
    (text,) = problems({"model_type": "lama"})
    assert text.startswith("c.json: model_type = lama: known: llama, mistral, ")
    assert text.endswith("(nearest: llama)")
    (text,) = problems({"hidden_size": 4})
    assert text.startswith("c.json: model_type: missing; a Hugging Face config names its family here; known: llama")


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({**REAL["gpt2-xl"], "scale_attn_by_inverse_layer_idx": True}, "is not supported in a gpt2 config"),
        ({**REAL["Mixtral-8x7B"], "num_experts_per_tok": 9}, "must be at most num_local_experts = 8 (nearest: 8)"),
        ({**REAL["gemma-2-9b"], "layer_types": ["full_attention"]}, "must be a list of 42 names"),
        ({**REAL["Llama-2-7B"], "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "missing; llama3 scaling"),
        ({**REAL["Llama-2-7B"], "_attn_implementation": "flash"}, "known: eager, sdpa, flash_attention_2"),
        (
            config("qwen2", 896, 24, 14, 4864, 151936),
            "must divide num_attention_heads = 14 (the default of this family)",
        ),
    ],
)
def test_rules_between_keys(data: dict[str, Any], rule: str) -> None:
    assert any(rule in problem for problem in problems(data))


KEYS = [
    *sorted({key for data in REAL.values() for key in data} - {"model_type"}),
    *("rope_scaling", "rope_parameters", "text_config", "layer_types", "sliding_window", "attention_dropout"),
    *("_attn_implementation", "_name_or_path", "query_pre_attn_scalar", "max_position_embeddings"),
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "model_type"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(REAL)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_config_is_read_or_refused(name: str, wrong: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        assert graph_problems(graph_from_config({**REAL[name], **wrong})) == []


# --- presets and files ----------------------------------------------------------------------------------------------


def test_every_preset_has_its_published_size() -> None:
    assert set(model_presets()) == set(PUBLISHED)
    for name, published in PUBLISHED.items():
        size, tolerance = published if isinstance(published, tuple) else (published, 0.01 * published)
        graph = load_model(name)
        assert graph_problems(graph) == []
        assert graph.name == name
        assert abs(graph.num_parameters - size) <= tolerance, (name, graph.num_parameters)


def test_presets_name_their_source() -> None:
    folder = Path(sys.modules["meshwright.io.models"].__file__ or "").parent.parent / "data" / "models"
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["_source"]


def test_a_file_and_its_folder_are_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(REAL["Llama-2-7B"]))
    assert load_model(str(folder)) == load_model(str(folder / "config.json"))
    assert load_model(str(folder)).name == "my-llama"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lama-3-8b", r"model = lama-3-8b: is neither a preset nor a file; .*\(nearest: llama-3-8b\)$"),
        ("", r"model = '': is neither"),
        ("x" * 5000, "is neither a preset nor a file"),
        ("nowhere/config.json", "nowhere/config.json: there is no such file"),
    ],
)
def test_what_is_not_there(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(text)


def test_problems_of_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**REAL["Llama-2-7B"], "vocab_size": 0}))
    with pytest.raises(InputError, match=rf"^{path}: vocab_size = 0: must be a whole number"):
        load_model(str(path))


def test_loading_a_model_imports_lightly() -> None:
    code = (
        "import sys, meshwright.io.models as m; m.load_model('llama-3-8b');"
        "print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
