"""How long a pipeline takes, in closed form.

Legend: K kinds of rank, the leading dim of every array that has one. `forward_K` and `backward_K` are the seconds of
one microbatch on a rank, all of its stages together; `count_K` how many ranks are of that kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.schedule import is_asynchronous

#: Schedules of which a closed form is known; how long the others take the simulator tells.
CLOSED_FORMS = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "ZB-H1", "ZB-H2", "PipeDream", "PipeDream-2BW")

#: Gradients of the weights that fill the bubble of each other rank.
FILLED_BUBBLES = {"ZB-H1": 1, "ZB-H2": 2}


def check_closed_form(schedule: str, where: str = "schedule", value: str = "", nearest: str = "simulate") -> None:
    """Raise `InputError` where no closed form of a schedule is known."""
    if schedule not in CLOSED_FORMS:
        rule = f"no closed form of schedule {schedule} is known; of these: {', '.join(CLOSED_FORMS)}"
        raise InputError([Problem(where, value or schedule, rule, nearest)])


def pipeline_time(
    schedule: str,
    forward_K: Any,
    backward_K: Any,
    weights_K: Any,
    count_K: Any,
    num_virtual: Any,
    num_microbatches: Any,
) -> Any:
    """Seconds from the first forward to the last backward, for stages that may be uneven; `weights_K` is the part of
    the backward that makes gradients of weights.

    GPipe (1811.06965): all forwards, then all backwards; a phase takes one pass through all stages and m - 1 turns of
    the slowest. LoopedBFS (2211.05953, section 4): the same with v chunks, of which the next waits until p microbatches
    or all have gone through the last. 1F1B (2104.04473, section 2.2.1): one pass and m - 1 turns of forward and
    backward. Interleaved1F1B (section 2.2.2): the slowest rank works m times through its v chunks; filling and draining
    cost one chunk of every other rank, and, with fewer microbatches than ranks, (p - m)(v - 1) chunks more. ZB-H1 and
    ZB-H2 (2401.10241, table 1): the bubble of another rank is F + I - W or F + I - 2 W where the gradient of weights W
    fills the rest, and with too few microbatches some of it is left over; under ZB-H2 ranks start their next step one
    after the other, so that a step takes the span of one. PipeDream and PipeDream-2BW (1806.03377, 2006.09503): without
    a flush a step is m turns of the slowest. Exact for equal stages (tested against the replayed table; ZB where
    F = I = W); uneven chunks of a rank are taken as equal shares of it.
    """
    check_closed_form(schedule)
    m = num_microbatches
    if schedule == "GPipe":
        return _passes(forward_K, count_K, m) + _passes(backward_K, count_K, m)
    rank_time_K = forward_K + backward_K
    if schedule == "1F1B":
        return _passes(rank_time_K, count_K, m)
    slowest = rank_time_K.max(axis=0)
    num_ranks = count_K.sum(axis=0)
    if is_asynchronous(schedule):
        return m * slowest
    if schedule in FILLED_BUBBLES:
        filled = FILLED_BUBBLES[schedule]
        weights_K = np.minimum(weights_K, forward_K)
        bubble_K = np.maximum(rank_time_K - (1 + filled) * weights_K, 0.0) * count_K
        slowest_bubble = np.where(rank_time_K == slowest, bubble_K / np.maximum(count_K, 1), 0.0).max(axis=0)
        short = np.maximum(filled * num_ranks - (filled - 1) - m, 0) * weights_K.max(axis=0)
        return m * slowest + bubble_K.sum(axis=0) - slowest_bubble + short * (num_ranks > 1)
    others = ((rank_time_K * count_K).sum(axis=0) - slowest) / num_virtual
    short = np.maximum(num_ranks - m, 0) * (num_virtual - 1) * slowest / num_virtual
    return m * slowest + others + short


def _passes(time_K: Any, count_K: Any, num_microbatches: Any) -> Any:
    return (time_K * count_K).sum(axis=0) + (num_microbatches - 1) * time_K.max(axis=0)
