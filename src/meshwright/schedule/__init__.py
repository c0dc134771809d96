"""Pipeline schedules: who runs which forward and backward when. The one place for them, for cost, sim and runtime.

A schedule is a *table*: for each rank the `Action`s it runs, in order, in PyTorch's own notation ("2F0": stage 2,
forward, microbatch 0). Times are not in the table; `replay` adds them. How long a step takes in closed form is in
`cost/`; how actions become real sends and receives is in `runtime/`.

`action`    what a rank can do, and how it is written
`tables`    tables as CSV files, PyTorch's format
`record`    what a named schedule is, and questions to it by name
`named`     GPipe, 1F1B, Interleaved1F1B, LoopedBFS, PipeDream, PipeDream-2BW, ForwardOnly
`zero_bubble`  ZB-H1, ZB-H2, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV
`messages`  tables with their messages and the state that stages gather and give back
`waits`     what waits for what: a table as tasks in streams
`timeline`  a table with times
`times`     times of actions as people write them
`check`     what is wrong with a table that somebody wrote

Legend: p = `num_ranks` pipeline ranks, v = `num_virtual` stages on each rank (chunks), p v stages in all,
m = `num_microbatches`, r = microbatches per round (the interleaved schedules take them through their chunks r at a
time).

References
    GPipe: Huang et al. 2019, arXiv:1811.06965, section 2.3.
    1F1B (PipeDream-Flush) and its interleaved form: Narayanan et al. 2021, arXiv:2104.04473, sections 2.2.1 and 2.2.2.
    LoopedBFS: Lamy-Poirier 2023, arXiv:2211.05953, section 4.
    PipeDream: Narayanan et al. 2019, SOSP, sections 3.2 and 3.3 (arXiv:1806.03377).
    PipeDream-2BW: Narayanan et al. 2021, arXiv:2006.09503, section 3.1.
    ZB-H1, ZB-H2: Qi et al. 2023, arXiv:2401.10241, section 2.2; with several chunks and in V shape, section 6.
    DualPipe: DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.1; in V shape as PyTorch has it.
    Where PyTorch 2.13 has a schedule, the order is that of `torch.distributed.pipelining.schedules`; tests compare.
"""

import meshwright.schedule.zero_bubble  # noqa: F401  (its schedules register themselves)
from meshwright.schedule.action import (
    Action,
    ActionKind,
    Table,
    compute_parts,
    parse_action,
    rank_of,
    stage_of,
)
from meshwright.schedule.check import check_table, checked
from meshwright.schedule.messages import with_messages, with_state
from meshwright.schedule.named import interleaved_legal
from meshwright.schedule.record import (
    SCHEDULES,
    Placement,
    Schedule,
    actions,
    is_asynchronous,
    num_deferred,
    peak_in_flight,
    rank_of_stage,
    schedule_problems,
    stages_of_rank,
    updates_each_microbatch,
    weight_versions,
)
from meshwright.schedule.tables import read_table, table_csv
from meshwright.schedule.timeline import Idle, Timeline, replay

__all__ = [
    "SCHEDULES",
    "Action",
    "ActionKind",
    "Idle",
    "Placement",
    "Schedule",
    "Table",
    "Timeline",
    "actions",
    "check_table",
    "checked",
    "compute_parts",
    "interleaved_legal",
    "is_asynchronous",
    "num_deferred",
    "parse_action",
    "peak_in_flight",
    "rank_of",
    "rank_of_stage",
    "read_table",
    "replay",
    "schedule_problems",
    "stage_of",
    "stages_of_rank",
    "table_csv",
    "updates_each_microbatch",
    "weight_versions",
    "with_messages",
    "with_state",
]
