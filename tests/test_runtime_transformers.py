"""The interpreter against transformers' own modules: logits and every gradient, in float64 and on one device."""

from __future__ import annotations

import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from meshwright.graph import Graph  # noqa: E402
from meshwright.io.models import graph_from_config  # noqa: E402
from meshwright.runtime.train import Job, Rank  # noqa: E402
from meshwright.runtime.weights import drawn, given, load_transformers_state, parameter_instances  # noqa: E402
from meshwright.strategy import Shorthand, expand  # noqa: E402
from meshwright.workload import Workload  # noqa: E402

BATCH, SEQ = 2, 12

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61, "_attn_implementation": "eager"}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "llama3-rope": {"model_type": "llama", **_SIZES, "rope_scaling": _LLAMA3},
    "mistral-window": {"model_type": "mistral", **_SIZES, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 8},
    "gpt2": {"model_type": "gpt2", **_GPT2, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
}


def exact_rms(self: Any, x: Any) -> Any:
    """transformers rounds to float32 inside, even of float64 numbers; that is not what is compared here."""
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def their_model(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_rms)
    attention = config.get("_attn_implementation", "sdpa")
    theirs = AutoConfig.for_model(**{key: value for key, value in config.items() if not key.startswith("_")})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(theirs, attn_implementation=attention).to(torch.float64).train()
    with torch.no_grad():
        for parameter in model.parameters():  # the defaults (biases 0, norms 1) would hide what is left out
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.05)
    return model


def our_model(graph: Graph, weights: dict[str, Any]) -> Rank:
    job = Job(graph, expand(Shorthand(mbs=BATCH), graph), Workload(BATCH, SEQ, "float64"), steps=1)
    return Rank(job, 0, given(weights))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    graph = graph_from_config(json.loads(json.dumps(config)))
    model = their_model(config, monkeypatch)
    me = our_model(graph, load_transformers_state(graph, model.state_dict(), config["model_type"]))
    inputs = me.data.inputs(0)
    logits = model(input_ids=inputs["tokens"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    loss.backward()
    torch.testing.assert_close(me.logits(inputs), logits, rtol=1e-10, atol=1e-10)
    assert me.compute_gradients(inputs) == pytest.approx(loss.item(), rel=1e-12)
    found = {key: parameter.grad for key, parameter in model.named_parameters(remove_duplicate=False)}
    theirs = load_transformers_state(graph, found, config["model_type"])
    ours = dict(me.whole_gradients())
    assert set(ours) == set(theirs)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-10, atol=1e-11, msg=lambda text, key=key: key + text)


def test_a_state_dict_without_a_tensor_is_refused() -> None:
    from meshwright.errors import InputError

    graph = graph_from_config(dict(CONFIGS["llama"]))
    with pytest.raises(InputError, match=r"model.norm.weight: has no tensor for 3/head/norm.weight"):
        load_transformers_state(graph, {}, "llama")
    with pytest.raises(InputError, match="family = bloom: state dicts are known of llama"):
        load_transformers_state(graph, {}, "bloom")


def test_weights_depend_on_seed_and_name_alone() -> None:
    tall, square = drawn(0)("1/layer/q.weight", (6, 2)), drawn(0)("1/layer/q.weight", (4, 3))
    assert torch.equal(tall.flatten(), square.flatten())
    assert not torch.equal(drawn(1)("1/layer/q.weight", (6, 2)), tall)
    assert abs(float(drawn(0)("1/layer/norm1.weight", (1000,)).mean()) - 1) < 0.01


def test_tied_parameters_have_one_name() -> None:
    graph = graph_from_config(dict(CONFIGS["qwen2"]))
    names = [instance.name for instance in parameter_instances(graph) if instance.tied]
    assert names == ["0/embedding/token.weight", "0/embedding/token.weight"]
