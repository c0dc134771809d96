"""Prepared once, applied many times: every block of a model priced for U layouts (degrees and microbatch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from meshwright.cluster import Cluster
from meshwright.cost.block import (
    BlockPrice,
    Communication,
    Machine,
    StatePrice,
    price_block,
    price_state,
    price_step,
)
from meshwright.cost.compute import device_rates
from meshwright.engine import Engine
from meshwright.graph import Graph, Tensor
from meshwright.sharding import (
    BlockLayout,
    StatePlacement,
    Step,
    group_size,
    local_numel,
    redistribution,
    wanted_gradient,
)
from meshwright.strategy import degree_of
from meshwright.workload import Workload


@dataclass(frozen=True)
class PricedLayouts:
    """Every block priced under one set of splits, for U layouts."""

    graph: Graph
    workload: Workload
    machine: Machine
    layouts: Mapping[str, BlockLayout]
    degrees: Mapping[str, Any]
    microbatch: Any
    blocks: Mapping[str, BlockPrice]

    def sizes(self) -> dict[str, Any]:
        """Sizes of all dims, the batch being a microbatch of all data-parallel ranks together."""
        return self.graph.sizes(self.microbatch * degree_of("dp", self.degrees), self.workload.seq_len)


def machine_of(cluster: Cluster, engine: Engine, precision: str) -> Machine:
    """What pricing needs of a cluster and an engine."""
    return Machine(device_rates(cluster.slowest_device, precision), cluster.hierarchy(), engine)


def price_layouts(
    graph: Graph,
    layouts: Mapping[str, BlockLayout],
    degrees: Mapping[str, Any],
    microbatch: Any,
    machine: Machine,
    workload: Workload,
) -> PricedLayouts:
    """Price all blocks; `degrees` of all mesh axes outermost first and `microbatch`, as columns of length U."""
    priced = PricedLayouts(graph, workload, machine, layouts, degrees, microbatch, {})
    sizes = priced.sizes()
    blocks = {name: price_block(layout, sizes, degrees, machine, workload) for name, layout in layouts.items()}
    return _with_handovers(replace(priced, blocks=blocks))


def _with_handovers(priced: PricedLayouts) -> PricedLayouts:
    """Where a block takes its input under another placement than the block before leaves it, the block pays for the
    move, both ways; spread over its instances where only some of them stand behind such a block."""
    graph, blocks = priced.graph, dict(priced.blocks)
    for (before, after), count in Counter(pairwise(graph.sequence)).items():
        share = count / graph.counts[after]
        handed = zip(priced.layouts[before].boundary, graph.block[after].inputs, strict=True)
        for (name, source), taken in handed:
            target = priced.layouts[after].made[taken]
            tensor = graph.block[before].tensor[name]
            back = redistribution(wanted_gradient(target), wanted_gradient(source))
            block = blocks[after]
            blocks[after] = replace(
                block,
                forward=_moved(priced, block.forward, tensor, redistribution(source, target), share),
                backward=_moved(priced, block.backward, tensor, back, share),
            )
    return replace(priced, blocks=blocks)


def _moved(
    priced: PricedLayouts, known: Communication, tensor: Tensor, steps: Sequence[Step], share: float
) -> Communication:
    bytes_, seconds = dict(known.bytes), dict(known.seconds)
    for step in steps:
        numel = local_numel(tensor.dims, step.larger, priced.sizes(), priced.degrees)
        size = numel * priced.workload.bytes_of(tensor.dtype)
        sent, took_s = price_step(step, size, priced.degrees, priced.machine)
        bytes_[step.axes] = bytes_.get(step.axes, 0.0) + share * sent
        seconds[step.axes] = seconds.get(step.axes, 0.0) + share * took_s
    return Communication(bytes_, seconds)


def price_states(priced: PricedLayouts, state: StatePlacement) -> dict[str, StatePrice]:
    """The training state of all blocks under one placement."""
    sizes = priced.sizes()
    return {name: price_state(layout, state, sizes, priced.degrees) for name, layout in priced.layouts.items()}


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of each kind of training state."""

    parameter: float
    gradient: float
    optimizer: float


def state_bytes(engine: Engine, workload: Workload) -> StateBytes:
    """What an engine keeps per parameter: Adam's two moments, and a float32 master copy of 16-bit parameters."""
    size = workload.bytes_of("compute")
    master = engine.master_weights and size < 4
    moment = 4 if engine.master_weights else size
    return StateBytes(
        parameter=size,
        gradient=workload.bytes_of(engine.gradient_dtype) if size < 4 else size,
        optimizer=2 * max(moment, 4 if master else 0) + (4 if master else 0),
    )


def state_shards(priced: PricedLayouts, state: StatePlacement) -> Any:
    """Into how many pieces training state is cut where it is cut."""
    return group_size(state.axes, priced.degrees)
