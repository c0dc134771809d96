"""Calculon's space: every execution that its exhaustive search tries, priced by our evaluator.

Calculon (Isaev et al., SC '23; here its version caa4b11) published a large space of ways to run a transformer together
with a search through all of it. Members are counted as it counts them, so that two searches of one space differ in
their models alone. What its choices mean to us:

| Calculon's choice | values | here |
|---|---|---|
| t, p, d | divisors of the devices, t of hidden and heads, p of the blocks left | `tp`, `pp`, `dp` |
| interleaving | divisors of the blocks of a rank | `vpp`; Interleaved1F1B where more than 1, else 1F1B |
| batch | the largest multiple of d within the batch asked for | differs: members are compared by samples/s |
| microbatch | divisors of batch / d | `mbs` |
| activation recompute | full, attn_only, none | `recompute` full, selective, none |
| tensor_par_comm | ar | `sp=0`, ranks send whole messages between stages |
| | p2p_rs_ag | `sp=0`, each rank sends its slice of a message between stages |
| | rs_ag | `sp=1` |
| seq_par_ag_redo | True | inputs of products are kept in shards and gathered again in the backward, as we derive it |
| | False | the gathered copies are kept (`sharding.lay_out`); all is as we derive it under full recomputation |
| optimizer_sharding | True, False | `zero` 1, 0 |
| tensor_par_overlap | none | computation waits for transfers: all of their time is exposed |
| | ring, pipe | transfers run in t tiles beside the block's computation, see `tiled_share` |
| data_par_overlap | False | computation waits for gradients and parameters |
| | True | they move beside the last backward and the next forward, which `PROCESSOR_USAGE` slows down |
| network of t, p, d | 0, 1 | messages of that degree run over the innermost level, or over the outermost |
| fused_activation | True | as the engine does |
| weight, optimizer, activation offload | with a second tier of memory | counted, not priced |

What the space does not choose (kernels, the exposed share of messages between stages, memory reserved) is the engine's.
A member that cannot run counts, and says why: its degrees do not fit into the network (Calculon's own rule), its
microbatches do not suit our interleaved schedule, or a degree does not divide what our layouts split (Calculon lets
tensor parallelism split microbatch x sequence, we the sequence).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.comm import Wire
from meshwright.cost.layouts import Machine
from meshwright.errors import Problem
from meshwright.schedule import interleaved_legal
from meshwright.search.space import (
    LAYOUT_KEYS,
    OBSTACLES,
    RECOMPUTES,
    SCHEDULE_NAMES,
    SPACES,
    Columns,
    Part,
    Pattern,
    Space,
    degree_splits,
    divides,
)
from meshwright.strategy import Recompute, divisors, position_problems

#: Calculon's words for what is chosen; columns hold their places.
TP_COMMS = ("ar", "p2p_rs_ag", "rs_ag")
AR, P2P_RS_AG, RS_AG = range(3)
TP_OVERLAPS = ("none", "ring", "pipe")
NONE, RING, PIPE = range(3)

#: The share of the processor that moving messages takes from computation beside it, on the inner and outer network.
PROCESSOR_USAGE = (0.15, 0.02)  # [spec: Calculon, systems/a100_80g.json, processor_usage]

ROOTS = ("tp", "pp", "dp")
ONE_STAGE, INTERLEAVED = SCHEDULE_NAMES.index("1F1B"), SCHEDULE_NAMES.index("Interleaved1F1B")


@dataclass(frozen=True)
class Passes:
    """Ways to run the passes of a block that have one pattern of layouts: they combine freely."""

    sequence_parallel: bool
    keep_gathered: bool
    recomputes: tuple[Recompute, ...]
    tp_comms: tuple[int, ...]


#: Each kind of recomputation with each kind of communication, and the two kinds of input that rs_ag can keep where not
#: all is recomputed: 3 x 2 + 3 + 2 = 11.
PASSES = (
    Passes(False, False, RECOMPUTES, (AR, P2P_RS_AG)),
    Passes(True, False, RECOMPUTES, (RS_AG,)),
    Passes(True, True, (Recompute.NONE, Recompute.SELECTIVE), (RS_AG,)),
)


@dataclass(frozen=True)
class Cell:
    """Members with the same degrees."""

    tp: int
    pp: int
    dp: int
    mbs: Sequence[int]
    vpp: Sequence[int]

    @property
    def split(self) -> tuple[bool, bool, bool]:
        """Which of the degrees split anything; the others leave nothing to choose."""
        return (self.tp > 1, self.pp > 1, self.dp > 1)


@dataclass(frozen=True)
class CalculonSpace(Space):
    """Calculon's space of a model; see the module's docstring. With `tier2` devices have a second tier of memory, and
    what can be offloaded to it is chosen too."""

    tier2: bool = False

    name: ClassVar[str] = "calculon"
    varies: ClassVar[tuple[str, ...]] = ("tp", "pp", "dp", "mbs", "vpp", "schedule", "zero", "recompute", "sp")
    whole_batch: ClassVar[bool] = False

    def problems(self) -> list[Problem]:
        """Models that Calculon cannot describe, and members that we cannot price."""
        dims, found = self.graph.dims, []
        if not {"hidden", "kv_heads"} <= set(dims) or dims.get("group", 1) > 1 or "experts" in dims:
            heads = f"{dims.get('kv_heads', 0)} key/value heads for {dims.get('kv_heads', 0) * dims.get('group', 1)}"
            kind = f"{dims['experts']} experts" if "experts" in dims else heads
            rule = f"Calculon knows dense models whose heads all have keys and values; {self.graph.name} has {kind}"
            found.append(Problem("--space", self.name, rule, "uniform"))
        if self.tier2:
            rule = "members that offload to a second tier of memory are counted, not priced"
            found.append(Problem("tier2", "True", rule, "tier2=False"))
        return found

    def num_members(self) -> int:
        """The closed form of counting `parts`, without limits: the sum over degrees of microbatches x virtual stages x
        ways to run the passes x what each degree that splits something leaves to choose."""
        ways = sum(
            len(passes.tp_comms) * math.prod(map(len, self._offloads([kind]).values()))
            for passes in PASSES
            for kind in passes.recomputes
        )
        total = 0
        for cell in self.cells():
            tensor, pipelined, data = cell.split
            choices = 3**tensor * 4**data * 2 ** (tensor + pipelined + data)
            total += len(cell.mbs) * len(cell.vpp) * choices * ways
        return total

    def cells(self) -> Iterator[Cell]:
        """All degrees within the limits, with their microbatches and virtual stages."""
        dims, choices = self.graph.dims, self.limits.choices
        for tp in choices("tp", divisors(math.gcd(self.num_devices, dims["hidden"], dims["kv_heads"]))):
            ranks = self.num_devices // tp
            for pp in choices("pp", divisors(math.gcd(ranks, self.graph.num_layers))):
                dp = ranks // pp
                sequences = self.workload.global_batch // dp
                if sequences and self.limits.allows("dp", dp):
                    mbs = [size for size in divisors(sequences) if size * self.workload.seq_len % tp == 0]
                    vpp = [stages for stages in self._virtual_stages(pp) if self.limits.allows("vpp", stages)]
                    yield Cell(tp, pp, dp, choices("mbs", mbs), vpp)

    def _virtual_stages(self, pp: int) -> Iterator[int]:
        for stages in divisors(self.graph.num_layers // pp) if pp > 1 else (1,):
            if self.limits.allows("schedule", INTERLEAVED if stages > 1 else ONE_STAGE):
                yield stages

    def parts(self) -> Iterator[Part]:
        """All members."""
        if position_problems(self.graph, self.workload):
            return
        cells: dict[tuple[bool, ...], list[Cell]] = {}
        for cell in self.cells():
            cells.setdefault(cell.split, []).append(cell)
        for (split, own), passes in product(cells.items(), PASSES):
            for kinds in self._kinds(passes):
                part = self._part(split, own, passes, kinds)
                if math.prod(part.shape) and len(part.vpp):
                    yield part

    def _kinds(self, passes: Passes) -> list[Sequence[Recompute]]:
        """Kinds of recomputation, apart where they leave other things to choose."""
        if not self.tier2:
            return [passes.recomputes]
        return [[kind for kind in passes.recomputes if (kind is Recompute.FULL) is full] for full in (False, True)]

    def _part(self, split: tuple[bool, ...], cells: Sequence[Cell], passes: Passes, kinds: Sequence[Recompute]) -> Part:
        """Cells of one `split`, run in some ways."""
        layouts = [(cell.tp, cell.pp, cell.dp, mbs) for cell in cells for mbs in cell.mbs]
        stages = [cell.vpp for cell in cells for _ in cell.mbs]
        columns = dict(zip(("tp", "pp", "dp", "mbs"), np.array(layouts, dtype=np.int64).reshape(-1, 4).T, strict=True))
        vpp = np.array([each for own in stages for each in own], dtype=np.int64)
        tensor, _, data = split
        pattern = Pattern(
            replicate_kv=False,
            sequence_parallel=passes.sequence_parallel and tensor,
            keep_gathered=passes.keep_gathered and tensor,
        )
        return Part(
            pattern=pattern,
            layouts={key: columns.get(key, np.ones(len(layouts), dtype=np.int64)) for key in LAYOUT_KEYS},
            layout_index=np.repeat(np.arange(len(stages)), [len(own) for own in stages]),
            vpp=vpp,
            schedule=np.where(vpp > 1, INTERLEAVED, ONE_STAGE),
            levels=self.limits.choices("zero", (0, 1) if data else (0,)),
            recomputes=self.limits.recomputes(kinds) if self.limits.allows("sp", pattern.sequence_parallel) else [],
            choices={**_choices(split, passes), **self._offloads(kinds)},
        )

    def _offloads(self, kinds: Sequence[Recompute]) -> dict[str, Sequence[int]]:
        """What may be offloaded; where blocks are recomputed whole there are no activations worth it."""
        if not self.tier2:
            return {}
        activations = (0,) if Recompute.FULL in kinds else (0, 1)
        return {"weight_offload": (0, 1), "optimizer_offload": (0, 1), "act_offload": activations}

    def machine(self, machine: Machine, part: Part) -> Machine:
        """Each degree on its network, transfers overlapped or not, messages whole or in slices."""
        codes, tp = part.codes(), part.layouts["tp"]
        usage = {root: np.take(PROCESSOR_USAGE, codes[f"{root}_net"]) for root in ROOTS}
        beside = np.where(codes["dp_overlap"], usage["dp"], 1.0)
        return replace(
            machine,
            num_choices=len(part.choices),
            exposed={
                **machine.exposed,
                "tp": tiled_share(codes["tp_overlap"], usage["tp"], tp),
                "dp": np.broadcast_to(beside, (*beside.shape[:-1], len(tp))),
            },
            tiles=frozenset({"tp"}),
            networks={root: (_wire(machine.levels, codes[f"{root}_net"]),) for root in ROOTS},
            slice_messages=codes["tp_comm"] != AR,
        )

    def obstacles(self, machine: Machine, part: Part, rows: Any) -> Any:
        """Networks first, then the schedule, then what does not divide."""
        index, codes = part.layout_index[rows], part.codes()
        degrees = {root: part.layouts[root][index] for root in ROOTS}
        tiers = {root: codes[f"{root}_net"] for root in ROOTS}
        num_microbatches = self.workload.global_batch // degrees["dp"] // part.layouts["mbs"][index]
        interleaved = part.schedule[rows] == INTERLEAVED
        splits, seq_len = degree_splits(self.graph, part.pattern), self.workload.seq_len
        whole = {tp: divides(self.graph, splits, seq_len, tp) for tp in set(degrees["tp"].tolist())}
        found = {
            "network": ~fits_networks(degrees, tiers, machine.levels[0].group_size, len(machine.levels)),
            "schedule": interleaved & ~interleaved_legal(degrees["pp"], num_microbatches),
            "division": ~np.array([whole[tp] for tp in degrees["tp"].tolist()]),
        }
        return np.select(list(found.values()), [OBSTACLES.index(reason) for reason in found], 0)

    def reason(self, cluster: Cluster, columns: Columns, row: int) -> str:
        """Networks first, as in `obstacles`."""
        levels = cluster.hierarchy()
        degrees = {root: int(columns[root][row]) for root in ROOTS}
        tiers = {root: int(columns[f"{root}_net"][row]) for root in ROOTS}
        lacking = network_reason(degrees, tiers, levels[0].group_size, len(levels))
        return lacking or super().reason(cluster, columns, row)

    def chosen(self, columns: Columns, row: int) -> dict[str, Any]:
        """The batch of a member, and what Calculon chooses besides."""
        code = {key: int(column[row]) for key, column in columns.items()}
        in_shards = code["tp_comm"] == RS_AG and not code["keep_gathered"]
        return {
            "batch": self.batch(code["dp"]),
            "tp_comm": TP_COMMS[code["tp_comm"]],
            "seq_par_ag_redo": in_shards and RECOMPUTES[code["recompute"]] is not Recompute.FULL,
            "tp_overlap": TP_OVERLAPS[code["tp_overlap"]],
            "dp_overlap": bool(code["dp_overlap"]),
            **{f"{root}_net": code[f"{root}_net"] for root in ROOTS},
        }


def _choices(split: tuple[bool, ...], passes: Passes) -> dict[str, Sequence[int]]:
    """What is chosen besides, by its codes; what concerns a degree only where that splits something."""
    tensor, pipelined, data = split
    return {
        "dp_overlap": (0, 1) if data else (0,),
        "dp_net": (0, 1) if data else (0,),
        "tp_overlap": (NONE, RING, PIPE) if tensor else (NONE,),
        "tp_net": (0, 1) if tensor else (0,),
        "pp_net": (0, 1) if pipelined else (0,),
        "tp_comm": passes.tp_comms,
        "keep_gathered": (int(passes.keep_gathered),),
    }


def tiled_share(overlap: Any, usage: Any, tp: Any) -> Any:
    """The share of a tensor-parallel transfer that its block's computation cannot hide, whatever there is of it.

    In t tiles, of which t - 1 run beside computation and slow it down by the processor's `usage` u: u (t - 1) / t. A
    `pipe` waits for one tile besides, 1 / t more, which a `ring` has at hand. Calculon's LinearOverlapped, with a block
    in place of each product.

    >>> tiled_share(np.array([NONE, RING, PIPE]), 0.25, 4).tolist()
    [1.0, 0.1875, 0.4375]
    """
    return np.where(overlap == NONE, 1.0, (usage * (tp - 1) + (overlap == PIPE)) / tp)


def fits_networks(degrees: Mapping[str, Any], tiers: Mapping[str, Any], inner_size: int, num_levels: int) -> Any:
    """Whether degrees fit into their networks: those on tier 0 together divide the size of the inner one, and there is
    an outer one for those on tier 1.

    >>> bool(fits_networks({"tp": 4, "dp": 4}, {"tp": 0, "dp": 0}, 8, 2))  # 16 ranks in a node of 8
    False
    """
    inside: Any = 1
    outside: Any = False
    for root, degree in degrees.items():
        inside = inside * np.where(tiers[root], 1, degree)
        outside = outside | (np.asarray(tiers[root]) > 0)
    return (inner_size % inside == 0) & (~outside | (num_levels > 1))


def network_reason(degrees: Mapping[str, int], tiers: Mapping[str, int], inner_size: int, num_levels: int) -> str:
    """Why degrees do not fit into their networks; nothing where they do.

    >>> network_reason({"tp": 4, "dp": 4}, {"tp": 0, "dp": 0}, 8, 2)
    'tp=4 x dp=4 = 16 ranks on the inner network: must divide its 8'
    """
    if fits_networks(degrees, tiers, inner_size, num_levels):
        return ""
    outside = [f"{root}={size}" for root, size in degrees.items() if tiers[root]]
    if outside and num_levels == 1:
        return f"{', '.join(outside)} on the outer network: this cluster has none"
    inside = {root: size for root, size in degrees.items() if not tiers[root] and size > 1}
    factors = " x ".join(f"{root}={size}" for root, size in inside.items())
    return f"{factors} = {math.prod(inside.values())} ranks on the inner network: must divide its {inner_size}"


def _wire(levels: Sequence[Wire], tier: Any) -> Wire:
    """The innermost level or the outermost, by tier, as the only one."""
    inner, outer = levels[0], levels[-1]
    return Wire(
        group_size=outer.group_size,
        bandwidth_Bps=np.where(tier, outer.bandwidth_Bps, inner.bandwidth_Bps),
        latency_s=np.where(tier, outer.latency_s, inner.latency_s),
        falloff=np.where(tier, outer.falloff, inner.falloff),
    )


SPACES.add("calculon", CalculonSpace)
