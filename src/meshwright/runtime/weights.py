"""The numbers that a parameter starts with: drawn by its name, so that they never depend on the strategy.

Every full tensor is drawn from a generator of its own, seeded by the run's seed and the parameter's full name
(`3/layer/q.weight`: block instance, block, tensor), then cut to the local piece. Or it comes from the state dict of a
transformers model, whose tensors are renamed and reshaped to ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.errors import InputError, Problem
from meshwright.graph import Graph
from meshwright.runtime.mesh import Mesh, splitting_axes
from meshwright.sharding import Placements

Source = Callable[[str, tuple[int, ...]], Tensor]  # full name, whole shape -> whole tensor


@dataclass(frozen=True)
class ParameterInstance:
    """A parameter of one block instance. Tied ones have one name, that of their owner."""

    name: str
    position: int
    block: str
    tensor: str
    dims: tuple[str, ...]
    tied: bool


def parameter_instances(graph: Graph) -> Iterator[ParameterInstance]:
    """All parameters of all block instances, first to last."""
    owners = {second: first for first, second in graph.tied}
    owning = set(owners.values())
    for position, block in enumerate(graph.sequence):
        for tensor in graph.block[block].parameters:
            path = f"{block}/{tensor.name}"
            owner = owners.get(path, path)
            place = graph.sequence.index(owner.split("/")[0]) if path in owners else position
            tied = path in owners or path in owning
            yield ParameterInstance(f"{place}/{owner}", position, block, tensor.name, tensor.dims, tied)


def drawn(seed: int) -> Source:
    """Weights by name: normal with deviation 0.02, those of norms around 1, all others around 0."""

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(_seed_of(f"{seed}/{name}"))
        values = torch.randn(shape, generator=generator, dtype=torch.float32) * 0.02
        return 1 + values if re.search(r"norm\w*\.weight$", name) else values

    return source


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def local_piece(whole: Tensor, dims: tuple[str, ...], stored: Placements, mesh: Mesh) -> Tensor:
    """The piece of a whole tensor that this rank stores."""
    for index, dim in enumerate(dims):
        start, stop = mesh.extent(whole.shape[index], splitting_axes(stored, dim))
        whole = whole.narrow(index, start, stop - start)
    return whole


# --- from transformers ----------------------------------------------------------------------------------------------

#: Our tensor names and theirs; `{}` is the layer, `:1` the second third of a tensor that holds q, k and v.
_LLAMA = {
    "embedding/token.weight": "model.embed_tokens.weight",
    "layer/norm1.weight": "model.layers.{}.input_layernorm.weight",
    "layer/q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layer/q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layer/k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layer/k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layer/v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layer/v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "layer/q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "layer/k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "layer/out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layer/norm2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layer/gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layer/up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layer/down.weight": "model.layers.{}.mlp.down_proj.weight",
    "head/norm.weight": "model.norm.weight",
    "head/lm.weight": "lm_head.weight",
}

_GPT2 = {
    "embedding/token.weight": "transformer.wte.weight",
    "embedding/position.weight": "transformer.wpe.weight",
    "layer/norm1.weight": "transformer.h.{}.ln_1.weight",
    "layer/norm1.bias": "transformer.h.{}.ln_1.bias",
    "layer/q.weight": "transformer.h.{}.attn.c_attn.weight:0",
    "layer/k.weight": "transformer.h.{}.attn.c_attn.weight:1",
    "layer/v.weight": "transformer.h.{}.attn.c_attn.weight:2",
    "layer/q.bias": "transformer.h.{}.attn.c_attn.bias:0",
    "layer/k.bias": "transformer.h.{}.attn.c_attn.bias:1",
    "layer/v.bias": "transformer.h.{}.attn.c_attn.bias:2",
    "layer/out.weight": "transformer.h.{}.attn.c_proj.weight",
    "layer/out.bias": "transformer.h.{}.attn.c_proj.bias",
    "layer/norm2.weight": "transformer.h.{}.ln_2.weight",
    "layer/norm2.bias": "transformer.h.{}.ln_2.bias",
    "layer/up.weight": "transformer.h.{}.mlp.c_fc.weight",
    "layer/up.bias": "transformer.h.{}.mlp.c_fc.bias",
    "layer/down.weight": "transformer.h.{}.mlp.c_proj.weight",
    "layer/down.bias": "transformer.h.{}.mlp.c_proj.bias",
    "head/norm.weight": "transformer.ln_f.weight",
    "head/norm.bias": "transformer.ln_f.bias",
    "head/lm.weight": "lm_head.weight",
}

_FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}


def load_transformers_state(graph: Graph, state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The whole parameters of `graph`, by full name, out of the state dict of a transformers model of that family.

    The same renaming brings a dict of gradients over. Raises `InputError` for an unknown family or a missing tensor.
    """
    if family not in _FAMILIES:
        raise InputError([Problem("family", family, f"state dicts are known of {', '.join(_FAMILIES)}")])
    found: dict[str, Tensor] = {}
    missing = []
    for instance in parameter_instances(graph):
        path = f"{instance.block}/{instance.tensor}"
        theirs, _, part = _FAMILIES[family].get(path, "").format(instance.position - 1).partition(":")
        if theirs not in state:
            missing.append(Problem("state dict", theirs or path, f"has no tensor for {instance.name}"))
        elif instance.name not in found:
            # GPT-2's Conv1D keeps (in, out); its embedding tables are not Conv1D.
            conv1d = family == "gpt2" and re.search(r"\.c_\w+\.weight$", theirs)
            value = state[theirs].T if conv1d else state[theirs]
            value = value.chunk(3)[int(part)] if part else value
            shape = [graph.dims[dim] for dim in instance.dims]
            found[instance.name] = value.reshape(shape)
    if missing:
        raise InputError(missing)
    return found


def given(weights: Mapping[str, Tensor]) -> Source:
    """Weights out of a mapping by full name."""
    return lambda name, shape: weights[name].view(shape)
