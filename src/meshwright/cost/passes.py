"""Forward and backward of one microbatch in one block: what the device computes, what it waits for, what the host adds.

Device and host work side by side: the device computes and communicates while the host starts what comes next, and the
slower of the two sets the pace. Near the crossing neither is hidden whole, so the two are joined by a smooth maximum.
Columns have length U (layouts).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.cost.block import BlockPrice, Communication, StatePrice, by_root, communication, price_step
from meshwright.cost.layouts import PricedLayouts, state_bytes
from meshwright.engine import Engine
from meshwright.sharding import Step, group_size
from meshwright.strategy import Recompute


@dataclass(frozen=True)
class Pass:
    """Seconds of the forward or backward of one microbatch in a block, by cause.

    `weights` is the part of `compute` that a backward can put off: what makes gradients of parameters and adds them up.
    The rest of the pass is what the stage before waits for. A forward has none."""

    compute: Any
    recompute: Any
    exposed: dict[str, Any]
    skew: Any
    launch: Any
    weights: Any = 0.0

    @property
    def total(self) -> Any:
        """All causes together."""
        return self.compute + self.recompute + in_order(self.exposed) + self.skew + self.launch


def in_order(entries: Mapping[str, Any]) -> Any:
    """The sum of entries in alphabetical order: to the last bit the same whether or not those that are 0 are there."""
    return sum(entries[name] for name in sorted(entries))


def smooth_max(one_s: Any, other_s: Any) -> Any:
    """(a^6 + b^6)^(1/6): the larger of two times, up to 12 % more where they are equal."""
    larger, smaller = np.maximum(one_s, other_s), np.minimum(one_s, other_s)
    ratio = smaller / np.maximum(larger, 1e-300)
    square = ratio * ratio
    return larger * np.cbrt(np.sqrt(1 + square * square * square))


def exposed_behind(took_s: Any, share: float, compute_s: Any) -> Any:
    """Of a transfer that can run beside `compute_s`: the engine's share stays exposed, or what does not fit."""
    return took_s - (1 - share) * np.minimum(took_s, compute_s)


def state_moves(
    priced: PricedLayouts, transfers: Iterable[tuple[Step, Any]], bytes_per_element: float
) -> Communication:
    """Transfers of parameters or gradients, given with their elements."""
    return communication(
        [
            (step, price_step(step, numel * bytes_per_element, priced.pricing, priced.machine.levels))
            for step, numel in transfers
        ],
        priced.pricing.extents,
    )


def block_passes(priced: PricedLayouts, block: BlockPrice, state: StatePrice, kind: Recompute) -> tuple[Pass, Pass]:
    """Forward and backward of one microbatch in a block."""
    engine = priced.machine.engine
    bytes_ = state_bytes(engine, priced.workload)
    gathers = state_moves(priced, state.each_use, bytes_.parameter)
    scatters = state_moves(priced, state.each_backward, bytes_.gradient)
    exposed = _exposed(priced, [block.forward], [gathers], block.forward_s)
    launches_s = _launch_seconds(priced, block.launches, [block.forward])
    forward = _joined(engine, block.forward_s, 0.0, exposed, launches_s, _skew_seconds(engine, [block.forward]))

    accumulate_s = 2 * bytes_.gradient * state.numel / priced.machine.rates.memory_Bps
    backward_s = block.backward_s + accumulate_s
    again_s = block.recompute_s[kind]
    waited = [block.backward, *([block.forward] if kind is Recompute.FULL else [])]
    exposed = _exposed(priced, waited, [gathers, scatters], backward_s + again_s)
    launches_s = _launch_seconds(priced, 2 * block.launches + block.recompute_launches[kind], waited)
    backward = _joined(engine, backward_s, again_s, exposed, launches_s, _skew_seconds(engine, waited))
    return forward, replace(backward, weights=block.weight_s + accumulate_s)


def _exposed(
    priced: PricedLayouts, waited: Iterable[Communication], hidden: Iterable[Communication], compute_s: Any
) -> dict[str, Any]:
    """Exposed seconds by degree: a share of what operators wait for, and of what runs beside them (the movement of
    state, transfers in tiles) what computation cannot hide. What one transfer has taken of that time is not there for
    another."""
    machine, exposed = priced.machine, defaultdict[str, Any](float)
    window_s = compute_s
    for moves, beside in (*((each, False) for each in waited), *((each, True) for each in hidden)):
        for root, took_s in by_root(moves.seconds, priced.degrees).items():
            share = machine.exposed.get(root, 1.0)
            if beside or root in machine.tiles:
                exposed[root] = exposed[root] + exposed_behind(took_s, share, window_s)
                window_s = np.maximum(window_s - took_s, 0.0)
            else:
                exposed[root] = exposed[root] + share * took_s
    return dict(exposed)


def _launch_seconds(priced: PricedLayouts, num_operators: Any, moves: Iterable[Communication]) -> Any:
    """Host seconds for starting operators and collectives; where it waits for these, it waits for their hops too."""
    engine = priced.machine.engine
    waits = crosses_nodes(priced) * bool(engine.crossing.collective_rank_s)
    rank_s = engine.collective_rank_s + engine.crossing.collective_rank_s * waits
    host_s: Any = engine.operator_launch_s * num_operators
    for each in moves:
        host_s = host_s + engine.collective_launch_s * each.count + rank_s * each.ranks + waits * each.latency_s
    return host_s


def _skew_seconds(engine: Engine, moves: Iterable[Communication]) -> Any:
    """Seconds that ranks wait for one another before collectives, on the device."""
    return engine.collective_skew_s * sum(each.doublings for each in moves)


def num_nodes(priced: PricedLayouts) -> Any:
    """Groups of the innermost level that a strategy fills."""
    levels, num_devices = priced.machine.levels, group_size(priced.degrees, priced.degrees)
    return np.maximum(num_devices / levels[0].group_size, 1.0) if len(levels) > 1 else np.ones_like(num_devices)


def crosses_nodes(priced: PricedLayouts) -> Any:
    """1 where pipeline stages lie on several groups of the innermost level, else 0."""
    return (np.asarray(priced.degrees.get("pp", 1)) > 1) & (num_nodes(priced) > 1)


def _joined(
    engine: Engine, compute_s: Any, again_s: Any, exposed: Mapping[str, Any], launches_s: Any, skew_s: Any
) -> Pass:
    device_s = compute_s + again_s + in_order(exposed) + skew_s
    together_s = smooth_max(device_s, launches_s) if engine.launch_overlaps else device_s + launches_s
    return Pass(compute_s, again_s, dict(exposed), skew_s, together_s - device_s)
