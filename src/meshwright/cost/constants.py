"""The numbers of the cost formulas that belong to no device and to no engine, from `data/constants.json`.

Each has its source in that file; `cost.fit` writes those that were fitted. What they mean is said here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Constants:
    """Shapes of efficiency curves, and passes over memory.

    `half_rate_depth`: depth of the contracted dim at which a matmul reaches half of its rate, efficiency ~ K / (K +
    this); `half_rate_area`: the same for the elements of its result, on average half a wave of tiles; `batched_*` the
    same for products of activations (unfused attention), and their rate over that of a weight's matmul.
    `unaligned_rate`: rate of a product that has a matrix dim which is no multiple of 8 over that of one that has none
    (tensor cores want 16 bytes). `grouped_rate`: rate of the products of routed experts, over a plain one's.
    `attention_backward`, `memory_backward`: time of the backward over that of the forward, for fused attention (2.5
    products for one, at a lower rate) and for memory-bound operators. `kernel_s`: seconds that a kernel takes at least.
    `cast_passes`: memory traffic of casting operands of products to a smaller type, over their bytes. `softmax_passes`:
    memory traffic of a softmax over the bytes of its operands. `update_traffic`: bytes moved per byte of training state
    in the update. `inner_link_share`, `outer_link_share`, `ethernet_share`: what collectives get of the nominal
    bandwidth inside the innermost level, beyond it, and beyond it on Ethernet; `crossing_falloff`: the outer share
    divides by 1 + this x log2(groups joined). `straggler`: share of a step lost per doubling of the nodes to the
    slowest of them. `matmul_share`, `attention_share`, `memory_share`: what is reached of a device's peak, and of its
    memory's bandwidth, where its file does not say."""

    half_rate_depth: float
    half_rate_area: float
    batched_half_rate_depth: float
    batched_rate: float
    unaligned_rate: float
    grouped_rate: float
    attention_backward: float
    memory_backward: float
    kernel_s: float
    softmax_passes: float
    update_traffic: float
    inner_link_share: float
    outer_link_share: float
    ethernet_share: float
    cast_passes: float
    crossing_falloff: float
    straggler: float
    matmul_share: float
    attention_share: float
    memory_share: float
    sources: dict[str, str] = field(default_factory=dict)


@cache
def constants() -> Constants:
    """The constants that come with the package."""
    import importlib.resources  # here: it costs more than the rest of this module to import

    text = (importlib.resources.files("meshwright") / "data" / "constants.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    assert set(data) == {item.name for item in fields(Constants)}
    return Constants(**data)
