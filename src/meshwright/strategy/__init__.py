"""The strategy: how a model, a batch and their state are split over a mesh of devices and over time.

A `Strategy` says everything: the mesh of named axes, the dim that each axis splits in every operator (all placements
follow, see `sharding`), the stages, the schedule, the microbatch, where training state lies, what is recomputed. The
degree shorthand, `tp=8,pp=64,dp=6,mbs=1,vpp=2,schedule=Interleaved1F1B,zero=1,recompute=selective,sp=1`, is sugar:
`expand` turns it into the full strategy, `shorthand_of` back where it can. `strategy_problems` names every rule that
a strategy breaks for a given model, cluster size and workload.

`record`     the strategy and its parts
`shorthand`  the degree shorthand, and how experts are spread
`uniform`    what each axis of a degree grid splits; from a shorthand to its strategy and back
`divide`     divisors, and the nearest
`common`     rules for strategies of every kind
`splits`     rules for the splits of blocks by axes that have a meaning
`placed`     rules for strategies at the level of operators
`legality`   all rules, for strategies and shorthands
"""

from meshwright.strategy.common import batch_problems, position_problems, stage_problems
from meshwright.strategy.divide import divisors, nearest_divisor
from meshwright.strategy.legality import legal_strategy, own_mesh_problems, strategy_problems
from meshwright.strategy.placed import placed_problems, placed_split_problems
from meshwright.strategy.record import (
    AXIS_ORDER,
    CUSTOM,
    PLACED_AXES,
    BlockRange,
    MeshAxis,
    Recompute,
    Stage,
    Strategy,
    degree_of,
    root_axis,
    strategy_table,
)
from meshwright.strategy.shorthand import (
    PRODUCT,
    Shorthand,
    Spread,
    parse_shorthand,
    parse_shorthand_keys,
    spread_experts,
    with_folded_experts,
)
from meshwright.strategy.splits import PADDED_DIMS, split_problems
from meshwright.strategy.uniform import (
    DATA_RULES,
    EXPERT_RULES,
    STATE_AXES,
    blocks_per_stage,
    context_rules,
    expand,
    layers_per_stage,
    recompute_blocks,
    replicates_kv,
    shorthand_of,
    state_axes,
    tensor_axes,
    tensor_rules,
    uniform_rules,
    uniform_splits,
    uniform_stages,
)

__all__ = [
    "AXIS_ORDER",
    "CUSTOM",
    "DATA_RULES",
    "EXPERT_RULES",
    "PADDED_DIMS",
    "PLACED_AXES",
    "PRODUCT",
    "STATE_AXES",
    "BlockRange",
    "MeshAxis",
    "Recompute",
    "Shorthand",
    "Spread",
    "Stage",
    "Strategy",
    "batch_problems",
    "blocks_per_stage",
    "context_rules",
    "degree_of",
    "divisors",
    "expand",
    "layers_per_stage",
    "legal_strategy",
    "nearest_divisor",
    "own_mesh_problems",
    "parse_shorthand",
    "parse_shorthand_keys",
    "placed_problems",
    "placed_split_problems",
    "position_problems",
    "recompute_blocks",
    "replicates_kv",
    "root_axis",
    "shorthand_of",
    "split_problems",
    "spread_experts",
    "stage_problems",
    "state_axes",
    "strategy_problems",
    "strategy_table",
    "tensor_axes",
    "tensor_rules",
    "uniform_rules",
    "uniform_splits",
    "uniform_stages",
    "with_folded_experts",
]
