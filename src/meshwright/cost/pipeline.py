"""How long a pipeline takes, in closed form.

Legend: K kinds of rank, the leading dim of every array that has one. `forward_K` and `backward_K` are the seconds of
one microbatch on a rank, all of its stages together; `count_K` how many ranks are of that kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def pipeline_time(
    schedule: str,
    forward_K: Any,
    backward_K: Any,
    count_K: Any,
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
        return _passes(forward_K, count_K, m) + _passes(backward_K, count_K, m)
    rank_time_K = forward_K + backward_K
    if schedule == "1F1B":
        return _passes(rank_time_K, count_K, m)
    slowest = rank_time_K.max(axis=0)
    num_ranks = count_K.sum(axis=0)
    others = ((rank_time_K * count_K).sum(axis=0) - slowest) / num_virtual
    short = np.maximum(num_ranks - m, 0) * (num_virtual - 1) * slowest / num_virtual
    return m * slowest + others + short


def _passes(time_K: Any, count_K: Any, num_microbatches: Any) -> Any:
    return (time_K * count_K).sum(axis=0) + (num_microbatches - 1) * time_K.max(axis=0)
