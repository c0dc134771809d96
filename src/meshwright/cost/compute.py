"""Time of operators on one device: contractions at an efficiency, everything else as memory traffic.

Every function takes numbers or arrays that broadcast. Device numbers come from the cluster's file, the shape of the
efficiency curves from `constants`. Left out: tiles, waves and split K (libraries choose them well: removing them from
a fit changed no source's error by a point), clock throttling.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from meshwright.cluster import Device
from meshwright.cost.comm import Wires
from meshwright.cost.constants import Constants
from meshwright.cost.extents import Extents
from meshwright.engine import Engine
from meshwright.graph import Block, Operator, Role, Tensor
from meshwright.profile import MeasuredOperator, OperatorKey, Profile
from meshwright.sharding import OperatorLayout
from meshwright.workload import PRODUCT_BYTES, Workload

#: A matrix dim that is no multiple of this many 16-bit numbers (16 bytes) is slow on tensor cores.
ALIGNMENT = 8


@dataclass(frozen=True)
class DeviceRates:
    """What a device really does: FLOP/s of deep matmuls, of the layers' products (in their own type where the workload
    has one that the device knows, of `product_bytes` a number; None where it is that of the computation) and of fused
    attention, B/s of memory-bound kernels; `peak_flops` is what utilisation refers to."""

    peak_flops: Any
    matmul_flops: Any
    product_flops: Any
    attention_flops: Any
    memory_Bps: Any
    product_bytes: float | None = None


def device_rates(device: Device, workload: Workload, known: Constants) -> DeviceRates:
    """Rates of a device for a workload's precision: its peaks, and the shares of them that its file states or, where it
    states none, that devices reach (`constants.Constants`)."""
    shares = {name: quantity.value for name, quantity in device.efficiency.items()}
    generic = {"matmul": known.matmul_share, "attention": known.attention_share, "memory": known.memory_share}
    share = {**generic, **shares}
    peak = peak_flops(device, workload.precision)
    is_smaller = workload.product_precision in device.peak_flops
    products = workload.product_precision if is_smaller else workload.precision
    product_peak = peak_flops(device, products)
    return DeviceRates(
        peak_flops=max(peak, product_peak),
        matmul_flops=peak * share["matmul"],
        product_flops=product_peak * share.get(f"matmul {products}", share["matmul"]),
        attention_flops=peak * share["attention"],
        memory_Bps=device.memory_bandwidth_Bps.value * share["memory"],
        product_bytes=PRODUCT_BYTES[products] if is_smaller else None,
    )


def peak_flops(device: Device, precision: str) -> float:
    """The dense peak in a precision; a device that lacks it runs at that of float32, or of its slowest type."""
    peaks = device.peak_flops
    fallback = peaks.get("float16") if precision == "bfloat16" else peaks.get("float32")
    return (peaks.get(precision) or fallback or min(peaks.values(), key=lambda quantity: quantity.value)).value


def precision_assumptions(device: Device, workload: Workload) -> tuple[str, ...]:
    """What `device_rates` assumed where the device's file has no peak for a precision."""
    assumed = []
    if workload.precision not in device.peak_flops:
        peak = peak_flops(device, workload.precision) / 1e12
        assumed.append(
            f"{device.name} states no peak for {workload.precision}: taken as {peak:.4g} TFLOP/s, that of another type"
        )
    if workload.product_precision and workload.product_precision not in device.peak_flops:
        assumed.append(f"{device.name} has no {workload.product_precision}: products in {workload.precision}")
    return tuple(assumed)


#: Kinds whose backward is the gradient of their parameter alone: their input has none, or it is that of the result.
WEIGHT_GRADIENT_ALONE = ("embedding", "position_embedding", "bias")


@dataclass(frozen=True)
class OperatorPrice:
    """One operator on one rank: FLOPs and bytes of its forward, and seconds of its forward and backward.

    `weight_s` is the part of the backward that makes gradients of parameters. A norm's is 0: one fused kernel makes
    both of its gradients. `launches` is how often the host is charged for starting it in a forward: once, or not at all
    where seconds were measured, which hold the start."""

    name: str
    flops: Any
    bytes: Any
    forward_s: Any
    backward_s: Any
    weight_s: Any = 0.0
    launches: Any = 1


Prices = tuple[OperatorPrice, ...]


@dataclass(frozen=True)
class Pricing:
    """What every operator is priced with: rates, software, constants, and the extents of dims and axes.

    Of the workload only types are read. `networks` are the wires of degrees whose communication keeps to some of the
    hierarchy's (see `layouts.Machine`)."""

    rates: DeviceRates
    engine: Engine
    constants: Constants
    workload: Workload
    extents: Extents
    networks: Mapping[str, Wires] = field(default_factory=dict)
    profile: Profile | None = None


def price_operators(layouts: Sequence[OperatorLayout], block: Block, pricing: Pricing, *, is_end: bool) -> Prices:
    """Price the operators of a block under their splits: by what a profile measured where it has an operator, else as
    `price_operator` does."""
    peers: dict[Hashable, list[OperatorLayout]] = {}
    for layout in layouts:
        peers.setdefault(_fused_with(block, layout.operator), []).append(layout)
    prices = [
        price_operator(block, layout, pricing, peers[_fused_with(block, layout.operator)], is_end=is_end)
        for layout in layouts
    ]
    if pricing.profile is None:
        return tuple(prices)
    for index, layout in enumerate(layouts):
        is_smaller = is_quantized(block, layout.operator, pricing, is_end=is_end)
        if not is_smaller and layout.operator.kind not in pricing.engine.fused_kinds:
            keys = operator_keys(block, layout, pricing.extents, pricing.workload)
            prices[index] = _as_measured(prices[index], keys, pricing.profile.by_key)
    return tuple(prices)


def _as_measured(price: OperatorPrice, keys: Any, seen: Mapping[OperatorKey, MeasuredOperator]) -> OperatorPrice:
    """A price with measured seconds in the layouts whose keys were `seen`; those hold the operator's start."""
    found = [seen.get(key) for key in keys.flat]
    known = np.array([one is not None for one in found]).reshape(keys.shape)
    if not known.any():
        return price
    forward_s, input_s, weight_s = (
        np.array([getattr(one, name, 0.0) for one in found]).reshape(keys.shape)
        for name in ("forward_s", "input_s", "weight_s")
    )
    return replace(
        price,
        forward_s=np.where(known, forward_s, price.forward_s),
        backward_s=np.where(known, input_s + weight_s, price.backward_s),
        weight_s=np.where(known, weight_s, price.weight_s),
        launches=np.where(known, 0, price.launches),
    )


#: Dims whose cut changes what a kernel does, beyond its local sizes: a piece of a table masks the rows of others.
MASKED_CUTS = {"embedding": ("vocab",)}


def operator_keys(block: Block, layout: OperatorLayout, extents: Extents, workload: Workload) -> Any:
    """What a profile calls an operator: an array with the key under each layout."""
    operator, local = layout.operator, extents.local_dims(block, layout)
    cuts = [dim for dim in MASKED_CUTS.get(operator.kind, ()) if dim in layout.split.values()]
    pieces = [extents.ranks(axis for axis, split in layout.split.items() if split == dim) for dim in cuts]
    columns = np.broadcast_arrays(*(np.ceil(size).astype(int) for size in local.values()), *pieces)
    # Layouts repeat sizes: each distinct key is made once.
    rows, index = np.unique(np.stack([column.ravel() for column in columns]), axis=1, return_inverse=True)
    tensors = [block.tensor[name] for name in operator.inputs]
    keys = np.empty(rows.shape[1], dtype=object)
    for position, row in enumerate(rows.T.tolist()):
        keys[position] = OperatorKey(
            kind=operator.kind,
            spec=operator.spec,
            sizes=tuple(zip(local, row[: len(local)], strict=True)),
            dtypes=tuple(_type_of(tensor, workload) for tensor in tensors),
            roles=tuple(tensor.role if tensor.differentiable else Role.INPUT for tensor in tensors),
            unsplit=operator.unsplit,
            attributes=tuple(sorted(operator.attributes.items())),
            cut=tuple(dim for dim, number in zip(cuts, row[len(local) :], strict=True) if number > 1),
        )
    return keys[index.ravel()].reshape(columns[0].shape)


def _type_of(tensor: Tensor, workload: Workload) -> str:
    """The type that a tensor has in a run: what is at least float32 is float64 where everything is."""
    if tensor.dtype == "compute" or (tensor.dtype, workload.precision) == ("float32", "float64"):
        return workload.precision
    return tensor.dtype


def _fused_with(block: Block, operator: Operator) -> Hashable:
    """Products of one tensor with several weights (q, k and v; gate and up) run as one: what they have in common."""
    has_weight = any(block.tensor[name].role is Role.PARAMETER for name in operator.inputs)
    if not operator.contractions or not has_weight:
        return operator.name
    return (operator.inputs[0], operator.contracted)


def price_operator(
    block: Block, layout: OperatorLayout, pricing: Pricing, peers: Sequence[OperatorLayout] = (), *, is_end: bool
) -> OperatorPrice:
    """Price one operator of a block under its split.

    `peers` are the products that run in one kernel with it, itself among them. Products of the ends of a model are
    never in a smaller type."""
    operator, constants = layout.operator, pricing.constants
    local = pricing.extents.local_dims(block, layout)
    num_bytes = operand_bytes(block, layout, pricing)
    traffic_s = num_bytes / pricing.rates.memory_Bps
    if operator.kind == "attention":
        return _attention(operator, local, num_bytes, pricing)
    if len(operator.contractions) > 1:
        price = _products_of_weights(block, operator, local, num_bytes, pricing, is_end=is_end)
        if price is not None:
            return price
    if operator.contractions:
        return _product(block, layout, peers or [layout], num_bytes, pricing, is_end=is_end)
    if operator.kind in pricing.engine.fused_kinds:
        return OperatorPrice(operator.name, 0, num_bytes, 0.0 * traffic_s, 0.0 * traffic_s)
    passes = {"cross_entropy": pricing.engine.loss_passes, "softmax": constants.softmax_passes}.get(operator.kind, 1.0)
    forward_s = pricing.engine.traffic_factor * passes * traffic_s + constants.kernel_s
    backward_s = constants.memory_backward * forward_s
    weight_s = backward_s if operator.kind in WEIGHT_GRADIENT_ALONE else 0.0 * backward_s
    return OperatorPrice(operator.name, 0, num_bytes, forward_s, backward_s, weight_s)


def operand_bytes(block: Block, layout: OperatorLayout, pricing: Pricing) -> Any:
    """Bytes of an operator's local operands and results, each once; of a gathered table the rows that are read."""
    operator = layout.operator
    tables = operator.kind in ("embedding", "position_embedding")
    names = [
        name
        for name in (*operator.inputs, *operator.outputs)
        if not (tables and block.tensor[name].role is Role.PARAMETER)
    ]
    return _bytes_of(block, layout, names, pricing)


def _bytes_of(block: Block, layout: OperatorLayout, names: Sequence[str], pricing: Pricing) -> Any:
    """Bytes of some of an operator's local operands and results."""
    operator = layout.operator
    lies = dict(zip((*operator.inputs, *operator.outputs), (*layout.inputs, *layout.outputs), strict=True))
    total: Any = 0
    for name in names:
        tensor = block.tensor[name]
        numel = pricing.extents.numel(tensor.dims, lies[name])
        total = total + numel * pricing.workload.bytes_of(tensor.dtype)
    return total


def _attention(operator: Operator, local: Mapping[str, Any], num_bytes: Any, pricing: Pricing) -> OperatorPrice:
    """Fused attention: of the full square that is counted, a causal or windowed mask leaves a share to be done."""
    flops = _flops(operator, local)
    done = flops * attended_share(operator, local)
    forward_s = np.maximum(done / pricing.rates.attention_flops, num_bytes / pricing.rates.memory_Bps)
    forward_s = forward_s + pricing.constants.kernel_s
    return OperatorPrice(operator.name, flops, num_bytes, forward_s, pricing.constants.attention_backward * forward_s)


def attended_share(operator: Operator, local: Mapping[str, Any]) -> Any:
    """Share of the square of queries and keys that a mask leaves: half where causal, and a band of a window's width.

    With w keys of s seen by each query, causal: (s w - w^2 / 2) / s^2, which is a half for w = s.
    """
    if not operator.attributes.get("causal"):
        return 1.0
    window = int(operator.attributes.get("window", 0))
    if not window:
        return 0.5
    share = np.minimum(window / local["kv_seq"], 1.0)
    return share * (1 - share / 2)


def _product(
    block: Block,
    layout: OperatorLayout,
    peers: Sequence[OperatorLayout],
    num_bytes: Any,
    pricing: Pricing,
    *,
    is_end: bool,
) -> OperatorPrice:
    """A contraction: forward over its contracted dims, backward one product for each operand, over the dims that it
    lacks; each at the rate of its own depth and area, or as memory traffic where that takes longer. The gradient of
    the result is cast for the input's gradient, which comes first."""
    operator, local = layout.operator, pricing.extents.local_dims(block, layout)
    constants = pricing.constants
    flops = _flops(operator, local)
    traffic_s = num_bytes / pricing.rates.memory_Bps
    cast_in_s, cast_out_s = _cast_seconds(block, layout, pricing, is_end=is_end)
    rate, half_depth = _rate(block, operator, local, pricing, is_end=is_end)
    product = frozenset(operator.contractions[0].split()) & frozenset(local)
    widths = [_width(peer.operator, pricing.extents.local_dims(block, peer)) for peer in peers]
    share = _width(operator, local) / sum(widths)

    def seconds(results: frozenset[str], joint_depth: bool) -> Any:
        depth = _numel(product - results, local) / (share if joint_depth else 1)
        area = _numel(results, local) / (1 if joint_depth else share)
        slowed = (1 + half_depth / depth) * (1 + constants.half_rate_area / area)
        return np.maximum(flops / rate * slowed, traffic_s) + constants.kernel_s * share

    # What is added to the result (a bias) is no factor: its gradient is a sum, not a product. Nor are indices.
    added = frozenset(operator.output_dims[0])
    factors = [
        (frozenset(dims) & product, block.tensor[name].role is Role.PARAMETER)
        for name, dims in zip(operator.inputs, operator.input_dims, strict=True)
        if not (block.tensor[name].role is Role.PARAMETER and frozenset(dims) <= added)
        and not block.tensor[name].dtype.startswith(("int", "uint", "bool"))
    ]
    weights = [is_weight for _, is_weight in factors]
    backward = [seconds(dims, not is_weight) for dims, is_weight in factors]
    forward_s = seconds(product - operator.contracted, False) + share * cast_in_s
    weight_s = sum(seconds for seconds, is_weight in zip(backward, weights, strict=True) if is_weight)
    return OperatorPrice(operator.name, flops, num_bytes, forward_s, sum(backward) + cast_out_s, weight_s)


def _products_of_weights(
    block: Block, operator: Operator, local: Mapping[str, Any], num_bytes: Any, pricing: Pricing, *, is_end: bool
) -> OperatorPrice | None:
    """Several contractions in one operator, each of a weight of its own (a recurrent layer): each priced as a product
    of all its steps at once, forward, for the input's and for the weight's gradient. None where they are not so."""
    weights = [
        dims
        for name, dims in zip(operator.inputs, operator.input_dims, strict=True)
        if block.tensor[name].role is Role.PARAMETER and len(dims) == 2
    ]
    rate, half_depth = _rate(block, operator, local, pricing, is_end=is_end)
    traffic_s = num_bytes / pricing.rates.memory_Bps / len(operator.contractions)
    forward_s: Any = 0.0
    input_s: Any = 0.0
    weight_s: Any = 0.0
    for text in operator.contractions:
        product = frozenset(text.split())
        weight = next((dims for dims in weights if product.issuperset(dims)), None)
        if weight is None:
            return None
        flops = 2 * _numel(product, local)
        rows, columns = weight

        def seconds(results: frozenset[str], flops: Any = flops, product: frozenset[str] = product) -> Any:
            slowed = 1 + half_depth / _numel(product - results, local)
            slowed = slowed * (1 + pricing.constants.half_rate_area / _numel(results, local))
            return np.maximum(flops / rate * slowed, traffic_s) + pricing.constants.kernel_s

        forward_s = forward_s + seconds(product - {columns})
        input_s = input_s + seconds(product - {rows})
        weight_s = weight_s + seconds(frozenset(weight))
    return OperatorPrice(operator.name, _flops(operator, local), num_bytes, forward_s, input_s + weight_s, weight_s)


def is_quantized(block: Block, operator: Operator, pricing: Pricing, *, is_end: bool) -> bool:
    """Whether an operator is a product of a layer with its weights that runs in a smaller type."""
    has_weight = any(block.tensor[name].role is Role.PARAMETER for name in operator.inputs)
    return pricing.rates.product_bytes is not None and bool(operator.contractions) and has_weight and not is_end


def _cast_seconds(block: Block, layout: OperatorLayout, pricing: Pricing, *, is_end: bool) -> tuple[Any, Any]:
    """Seconds of casting what a product reads in the forward, and the gradient of its result in the backward, to the
    smaller type (each once; weights are cast once a step). 0 where there is none."""
    operator = layout.operator
    if not is_quantized(block, operator, pricing, is_end=is_end):
        return 0.0, 0.0
    per_byte = pricing.constants.cast_passes / pricing.rates.memory_Bps
    read = [name for name in operator.inputs if block.tensor[name].role is not Role.PARAMETER]
    return tuple(per_byte * _bytes_of(block, layout, names, pricing) for names in (read, operator.outputs))


def _numel(dims: Iterable[str], local: Mapping[str, Any]) -> Any:
    return math.prod(local[dim] for dim in sorted(dims))


def _width(operator: Operator, local: Mapping[str, Any]) -> Any:
    """Columns of a product with a weight: elements of the result over those of what the weight is multiplied with."""
    outputs = frozenset(operator.output_dims[0])
    return _numel(outputs - frozenset(operator.input_dims[0]), local)


def _flops(operator: Operator, local: Mapping[str, Any]) -> Any:
    return sum(2 * math.prod(local[dim] for dim in product.split()) for product in operator.contractions)


def _rate(
    block: Block, operator: Operator, local: Mapping[str, Any], pricing: Pricing, *, is_end: bool
) -> tuple[Any, float]:
    """FLOP/s of a product of great depth, and the depth of half of that rate."""
    rates, constants = pricing.rates, pricing.constants
    factor = pricing.engine.matmul_factor
    weights = [
        dims
        for name, dims in zip(operator.inputs, operator.input_dims, strict=True)
        if block.tensor[name].role is Role.PARAMETER
    ]
    if weights:
        rate = factor * (rates.matmul_flops if is_end else rates.product_flops)
        outputs = {dim for dims in operator.output_dims for dim in dims}
        others = {dim for dims in operator.input_dims if dims not in weights for dim in dims}
        is_grouped = bool(set(weights[0]) & others & outputs)  # a weight of its own for each of a dim: routed experts
        return (rate * constants.grouped_rate if is_grouped else rate), constants.half_rate_depth
    unaligned = sum(size % ALIGNMENT != 0 for size in _matrix_sizes(operator, local)) > 0
    rate = factor * rates.matmul_flops * constants.batched_rate
    return np.where(unaligned, constants.unaligned_rate, 1.0) * rate, constants.batched_half_rate_depth


def _matrix_sizes(operator: Operator, local: Mapping[str, Any]) -> list[Any]:
    """Rows, columns and depth of a batched product: dims that one operand alone has, and those that are contracted."""
    found = [operator.contracted]
    for dims in operator.input_dims:
        others = {dim for other in operator.input_dims if other is not dims for dim in other}
        found.append(frozenset(dims) - others - operator.contracted)
    return [_numel(dims, local) for dims in found if dims]
