"""Prepared once, applied many times: every block of a model priced for U layouts (degrees and microbatch).

A layout column may as well be a list of runs: models of one structure and of any sizes, priced together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from meshwright.cluster import Cluster, Level
from meshwright.cost.block import BlockPrice, Communication, StatePrice, price_block, price_state, price_step
from meshwright.cost.comm import Shares, Wires, wires
from meshwright.cost.compute import DeviceRates, Pricing, device_rates, operator_keys
from meshwright.cost.constants import Constants, constants
from meshwright.cost.extents import Extents
from meshwright.engine import Engine
from meshwright.graph import Graph, Tensor
from meshwright.profile import OperatorKey, Profile
from meshwright.sharding import BlockLayout, StatePlacement, Step, redistribution, wanted_gradient
from meshwright.strategy import Strategy, degree_of
from meshwright.workload import Workload


@dataclass(frozen=True)
class Machine:
    """Everything about hardware and software that pricing needs.

    How communication is carried out is the engine's habit, unless a space chooses it: the `exposed` share of each
    degree's seconds, whether ranks `slice_messages` between stages, the `networks` of degrees that keep to some of the
    `levels`, and the degrees whose transfers run in `tiles` beside the computation of their block, which then exposes
    what it cannot hide. These may be arrays of choices: `num_choices` leading dims, then that of the layouts. Operators
    that a `profile` has are priced as it measured them."""

    rates: DeviceRates
    memory_bytes: float
    levels: Wires
    engine: Engine
    constants: Constants
    exposed: Mapping[str, Any]
    slice_messages: Any
    networks: Mapping[str, Wires] = field(default_factory=dict)
    tiles: frozenset[str] = frozenset()
    num_choices: int = 0
    profile: Profile | None = None


def machine_of(
    cluster: Cluster,
    engine: Engine,
    workload: Workload,
    known: Constants | None = None,
    profile: Profile | None = None,
) -> Machine:
    """What pricing needs of a cluster and an engine; the constants are the package's unless given. `profile` says what
    operators took on the machine that the cluster describes."""
    known = known or constants()
    return Machine(
        rates=device_rates(cluster.slowest_device, workload, known),
        memory_bytes=cluster.slowest_device.memory_bytes.value,
        levels=wires_of(cluster.hierarchy(), known),
        engine=engine,
        constants=known,
        exposed=engine.exposed,
        slice_messages=engine.slice_messages,
        profile=profile,
    )


def wires_of(levels: Sequence[Level], known: Constants) -> Wires:
    """A hierarchy's levels as messages meet them."""
    shares = Shares(known.inner_link_share, known.outer_link_share, known.ethernet_share, known.crossing_falloff)
    return wires(levels, shares)


@dataclass(frozen=True)
class PricedLayouts:
    """Every block priced under one set of splits, for U layouts.

    `graph` gives the structure and `pricing` the sizes of its dims, of a microbatch of all data-parallel ranks."""

    graph: Graph
    layouts: Mapping[str, BlockLayout]
    machine: Machine
    pricing: Pricing
    microbatch: Any
    blocks: Mapping[str, BlockPrice]

    @property
    def degrees(self) -> Mapping[str, Any]:
        """Sizes of all mesh axes, outermost first."""
        return self.pricing.extents.degrees

    @property
    def workload(self) -> Workload:
        """The workload, of which prices know the types alone."""
        return self.pricing.workload


def price_layouts(
    graph: Graph,
    layouts: Mapping[str, BlockLayout],
    degrees: Mapping[str, Any],
    microbatch: Any,
    machine: Machine,
    workload: Workload,
) -> PricedLayouts:
    """Price all blocks; `degrees` of all mesh axes outermost first and `microbatch`, as columns of length U."""
    extents = Extents(graph.sizes(microbatch * degree_of("dp", degrees), workload.seq_len), degrees)
    return price_sized(graph, layouts, extents, handover_shares(graph), microbatch, machine, workload)


def price_sized(
    graph: Graph,
    layouts: Mapping[str, BlockLayout],
    extents: Extents,
    shares: Mapping[tuple[str, str], Any],
    microbatch: Any,
    machine: Machine,
    workload: Workload,
) -> PricedLayouts:
    """Price all blocks of a structure of given extents, whose blocks follow one another by `handover_shares`; all
    numbers or columns of length U."""
    pricing = Pricing(
        machine.rates, machine.engine, machine.constants, workload, extents, machine.networks, machine.profile
    )
    ends = end_blocks(graph)
    blocks = {
        name: price_block(layout, pricing, machine.levels, is_end=name in ends) for name, layout in layouts.items()
    }
    return _with_handovers(PricedLayouts(graph, layouts, machine, pricing, microbatch, blocks), shares)


def operators_of(graph: Graph, strategy: Strategy, workload: Workload, engine: Engine) -> tuple[OperatorKey, ...]:
    """The distinct operators that ranks of a strategy execute as kernels of their own, in the model's order: what a
    profile must have for all of them to be priced as measured."""
    degrees = {"pp": 1, **strategy.degrees}
    sizes = graph.sizes(strategy.microbatch * int(degree_of("dp", degrees)), workload.seq_len)
    extents = Extents(sizes, degrees)
    found = [
        operator_keys(layout.block, each, extents, workload).item()
        for layout in strategy.layouts(graph).values()
        for each in layout.operators
        if each.operator.kind not in engine.fused_kinds
    ]
    return tuple(dict.fromkeys(found))


def missing_operators(
    graph: Graph, strategy: Strategy, workload: Workload, engine: Engine, profile: Profile
) -> tuple[OperatorKey, ...]:
    """Of `operators_of` those that a profile does not have: they are priced by formula."""
    return tuple(key for key in operators_of(graph, strategy, workload, engine) if key not in profile.by_key)


def end_blocks(graph: Graph) -> frozenset[str]:
    """The first and the last block of a model, where they are not layers like the others."""
    return frozenset(name for name in (graph.sequence[0], graph.sequence[-1]) if graph.counts[name] == 1)


def handover_shares(graph: Graph) -> dict[tuple[str, str], float]:
    """How often each block follows each other one, over the instances of the one that follows."""
    return {pair: count / graph.counts[pair[1]] for pair, count in Counter(pairwise(graph.sequence)).items()}


def _with_handovers(priced: PricedLayouts, shares: Mapping[tuple[str, str], Any]) -> PricedLayouts:
    """Where a block takes its input under another placement than the block before leaves it, the block pays for the
    move, both ways; spread over its instances where only some of them stand behind such a block."""
    graph, blocks = priced.graph, dict(priced.blocks)
    for (before, after), share in shares.items():
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
    priced: PricedLayouts, known: Communication, tensor: Tensor, steps: Sequence[Step], share: Any
) -> Communication:
    bytes_, seconds = dict(known.bytes), dict(known.seconds)
    for step in steps:
        numel = priced.pricing.extents.numel(tensor.dims, step.larger)
        size = numel * priced.workload.bytes_of(tensor.dtype)
        moved = price_step(step, size, priced.pricing, priced.machine.levels)
        bytes_[step.axes] = bytes_.get(step.axes, 0.0) + share * moved.bytes
        seconds[step.axes] = seconds.get(step.axes, 0.0) + share * moved.took.seconds
    return replace(known, bytes=bytes_, seconds=seconds)


def price_states(priced: PricedLayouts, state: StatePlacement) -> dict[str, StatePrice]:
    """The training state of all blocks under one placement."""
    return {name: price_state(layout, state, priced.pricing) for name, layout in priced.layouts.items()}


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of each kind of training state."""

    parameter: float
    gradient: float
    gradient_copy: float
    optimizer: float


def state_bytes(engine: Engine, workload: Workload) -> StateBytes:
    """What an engine keeps per parameter: Adam's two moments, and a float32 master copy of 16-bit parameters; of
    gradients, the copy in the type of the computation too where the engine keeps one."""
    size = workload.bytes_of("compute")
    gradient = workload.bytes_of(engine.gradient_type(workload.precision)) if size < 4 else size
    master = engine.master_weights and size < 4
    moment = 4 if engine.master_weights else size
    return StateBytes(
        parameter=size,
        gradient=gradient,
        gradient_copy=size if engine.memory.gradient_copy and gradient != size else 0,
        optimizer=2 * max(moment, 4 if master else 0) + (4 if master else 0),
    )
