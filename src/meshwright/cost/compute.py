"""Time of operators on one device: contractions at an efficiency, everything else as memory traffic.

Every function takes numbers or arrays that broadcast. Device numbers come from the cluster's file; the constants here
are the shape of the efficiency curves. Left out: tiles, waves and split K (libraries choose them well: removing them
from a fit changed no source's error by a point), clock throttling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Device
from meshwright.engine import Engine
from meshwright.graph import Block, Operator, Role
from meshwright.sharding import OperatorLayout, local_numel
from meshwright.workload import Workload

#: Depth of the contracted dim at which a matmul reaches half of its rate: efficiency ~ K / (K + this).
HALF_RATE_DEPTH = 110.0  # [fit: measured_runs.csv]

#: The same for batched products of activations (unfused attention), and their rate over that of a weight's matmul.
BATCHED_HALF_RATE_DEPTH = 64.0  # [fit: measured_runs.csv]
BATCHED_RATE = 0.67  # [fit: measured_runs.csv] .58 over .865 on A100

#: Rate of a batched product that has a matrix dim which is no multiple of 8, over that of one that has none: tensor
#: cores want 16 bytes (heads of 108 or 150 numbers in published runs).
ALIGNMENT = 8
UNALIGNED_RATE = 0.08  # [fit: measured_runs.csv]

#: Time of the backward over the forward: two products for one; fused attention recomputes its scores (2.5 products
#: at .69 of the forward's rate); memory-bound operators read two operands where they read one.
CONTRACTION_BACKWARD = 2.0  # [derived]
ATTENTION_BACKWARD = 2.5 / 0.69  # [fit: measured_runs.csv]
MEMORY_BACKWARD = 1.4  # [fit: measured_runs.csv]

#: Shares of nominal where a device's file has none.
GENERIC_EFFICIENCY = {"matmul": 0.7, "attention": 0.4, "memory": 0.75}  # [derived] the middle of what was fitted


@dataclass(frozen=True)
class DeviceRates:
    """What a device really does: FLOP/s of deep matmuls and of fused attention, B/s of memory-bound kernels."""

    peak_flops: float
    matmul_flops: float
    attention_flops: float
    memory_Bps: float


def device_rates(device: Device, precision: str) -> DeviceRates:
    """Rates of a device in a precision; one that it lacks runs at the rate of float32, or of its slowest type."""
    peaks = device.peak_flops
    fallback = peaks.get("float16") if precision == "bfloat16" else peaks.get("float32")
    peak = (peaks.get(precision) or fallback or min(peaks.values(), key=lambda quantity: quantity.value)).value
    share = {
        name: device.efficiency[name].value if name in device.efficiency else generic
        for name, generic in GENERIC_EFFICIENCY.items()
    }
    return DeviceRates(
        peak_flops=peak,
        matmul_flops=peak * share["matmul"],
        attention_flops=peak * share["attention"],
        memory_Bps=device.memory_bandwidth_Bps.value * share["memory"],
    )


def precision_assumptions(device: Device, precision: str) -> tuple[str, ...]:
    """What `device_rates` assumed where the device's file has no peak for a precision."""
    if precision in device.peak_flops:
        return ()
    peak = device_rates(device, precision).peak_flops
    return (f"{device.name} states no peak for {precision}: taken as {peak / 1e12:.4g} TFLOP/s, that of another type",)


@dataclass(frozen=True)
class OperatorPrice:
    """One operator on one rank: FLOPs of its forward, and seconds of its forward and backward, split by what bounds
    them: `math_s` for contractions, `memory_s` for memory-bound operators."""

    name: str
    flops: Any
    bytes: Any
    math_s: Any
    memory_s: Any
    math_backward_s: Any
    memory_backward_s: Any


def price_operator(
    block: Block,
    layout: OperatorLayout,
    sizes: Mapping[str, Any],
    degrees: Mapping[str, Any],
    rates: DeviceRates,
    engine: Engine,
    workload: Workload,
) -> OperatorPrice:
    """Price one operator of a block under its split."""
    operator = layout.operator
    local = local_dims(block, layout, sizes, degrees)
    num_bytes = operand_bytes(block, layout, sizes, degrees, workload)
    flops = sum(2 * math.prod(local[dim] for dim in product.split()) for product in operator.contractions)
    traffic_s = num_bytes / rates.memory_Bps
    if operator.contractions:
        math_s = np.maximum(flops / contraction_rate(block, operator, local, rates), traffic_s)
        backward = ATTENTION_BACKWARD if operator.kind == "attention" else CONTRACTION_BACKWARD
        return OperatorPrice(operator.name, flops, num_bytes, math_s, 0.0, backward * math_s, 0.0)
    memory_s = 0.0 * traffic_s if operator.kind in engine.fused_kinds else engine.traffic_factor * traffic_s
    return OperatorPrice(operator.name, flops, num_bytes, 0.0, memory_s, 0.0, MEMORY_BACKWARD * memory_s)


def local_dims(
    block: Block, layout: OperatorLayout, sizes: Mapping[str, Any], degrees: Mapping[str, Any]
) -> dict[str, Any]:
    """Size of each dim of an operator on the fullest rank, by the operator's names."""
    aliases = block.dim_aliases(layout.operator)
    local = {}
    for dim in layout.operator.dims:
        degree = math.prod(degrees[axis] for axis, split_dim in layout.split.items() if split_dim == dim)
        local[dim] = -(-sizes[aliases[dim]] // degree)
    return local


def operand_bytes(
    block: Block, layout: OperatorLayout, sizes: Mapping[str, Any], degrees: Mapping[str, Any], workload: Workload
) -> Any:
    """Bytes of an operator's local operands and results, each once; of a gathered table the rows that are read."""
    operator = layout.operator
    operands = zip((*operator.inputs, *operator.outputs), (*layout.inputs, *layout.outputs), strict=True)
    total: Any = 0
    for name, placements in operands:
        tensor = block.tensor[name]
        gathered = tensor.role is Role.PARAMETER and operator.kind in ("embedding", "position_embedding")
        if not gathered:
            total = total + local_numel(tensor.dims, placements, sizes, degrees) * workload.bytes_of(tensor.dtype)
    return total


def contraction_rate(block: Block, operator: Operator, local: Mapping[str, Any], rates: DeviceRates) -> Any:
    """FLOP/s of a contraction by the depth of what it contracts; fused attention by its own rate.

    Counting the full square, causal fused attention does its work in half of the time.
    """
    if operator.kind == "attention":
        return rates.attention_flops * (2.0 if operator.attributes.get("causal") else 1.0)
    product = operator.contractions[0].split()
    depth = math.prod(local[dim] for dim in product if dim in operator.contracted)
    if any(block.tensor[name].role is Role.PARAMETER for name in operator.inputs):
        return rates.matmul_flops * depth / (depth + HALF_RATE_DEPTH)
    unaligned = sum(size % ALIGNMENT != 0 for size in _matrix_sizes(operator, local)) > 0
    aligned_rate = rates.matmul_flops * BATCHED_RATE * depth / (depth + BATCHED_HALF_RATE_DEPTH)
    return np.where(unaligned, UNALIGNED_RATE, 1.0) * aligned_rate


def _matrix_sizes(operator: Operator, local: Mapping[str, Any]) -> list[Any]:
    """Rows, columns and depth of a batched product: dims that one operand alone has, and those that are contracted."""
    found = [operator.contracted]
    for dims in operator.input_dims:
        others = {dim for other in operator.input_dims if other is not dims for dim in other}
        found.append(frozenset(dims) - others - operator.contracted)
    return [math.prod(local[dim] for dim in sorted(dims)) for dims in found if dims]
