"""How long a pipeline takes, in closed form.

Legend: R strategies, K kinds of rank. `rank_time_RK` is the seconds of forward and backward of one microbatch on a
rank, all of its stages together; `count_RK` how many ranks are of that kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def pipeline_time(
    schedule: str,
    forward_RK: Any,
    backward_RK: Any,
    count_RK: Any,
    num_virtual: Any,
    num_microbatches: Any,
) -> Any:
    """Seconds from the first forward to the last backward, for stages that may be uneven.

    GPipe (1811.06965): all forwards, then all backwards; a phase takes one pass through all stages and m - 1 turns of
    the slowest. 1F1B (2104.04473, section 2.2.1): the same with a turn of forward and backward. Interleaved1F1B
    (section 2.2.2): the slowest rank works m times through its v chunks; filling and draining cost one chunk of every
    other rank, and, with fewer microbatches than ranks, (p - m)(v - 1) chunks more. Exact for equal stages (tested
    against the replayed table); uneven interleaved chunks are taken as equal shares of their rank.
    """
    m = num_microbatches
    if schedule == "GPipe":
        return _passes(forward_RK, count_RK, m) + _passes(backward_RK, count_RK, m)
    rank_time_RK = forward_RK + backward_RK
    if schedule == "1F1B":
        return _passes(rank_time_RK, count_RK, m)
    slowest = rank_time_RK.max(axis=-1)
    num_ranks = count_RK.sum(axis=-1)
    others = ((rank_time_RK * count_RK).sum(axis=-1) - slowest) / num_virtual
    short = np.maximum(num_ranks - m, 0) * (num_virtual - 1) * slowest / num_virtual
    return m * slowest + others + short


def _passes(time_RK: Any, count_RK: Any, num_microbatches: Any) -> Any:
    return (time_RK * count_RK).sum(axis=-1) + (num_microbatches - 1) * time_RK.max(axis=-1)
