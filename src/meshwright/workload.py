"""The workload: what is computed per step, at which precision, by which optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshwright.errors import InputError, Problem, nearest_name

#: Bytes of one number of each fixed type.
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int64": 8, "bool": 1}

#: Short names that people write, and the type that they mean.
PRECISION_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

PRECISIONS = ("bfloat16", "float16", "float32", "float64")


class Phase(StrEnum):
    """What a step is."""

    TRAIN = "train"


@dataclass(frozen=True)
class Workload:
    """One step: `global_batch` sequences of `seq_len` tokens, computed in `precision`, updated by `optimizer`."""

    global_batch: int
    seq_len: int
    precision: str = "bfloat16"
    phase: Phase = Phase.TRAIN
    optimizer: str = "adam"

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.seq_len

    def bytes_of(self, dtype: str) -> int:
        """Bytes of one number of a tensor's type, `compute` being the precision."""
        return DTYPE_BYTES[self.precision if dtype == "compute" else dtype]


def parse_precision(text: str) -> str:
    """The precision that a name means.

    >>> parse_precision("bf16")
    'bfloat16'
    """
    name = PRECISION_ALIASES.get(text, text)
    if name not in PRECISIONS:
        known = ", ".join((*PRECISIONS, *PRECISION_ALIASES))
        raise InputError(
            [Problem("--precision", text, f"known: {known}", nearest_name(text, (*PRECISIONS, *PRECISION_ALIASES)))]
        )
    return name


def workload_problems(workload: Workload) -> list[Problem]:
    """Everything that makes a workload unusable."""
    problems = []
    for name in ("global_batch", "seq_len"):
        value = getattr(workload, name)
        if value < 1:
            problems.append(Problem(name, str(value), "must be at least 1", "1"))
        elif value > 10**9:
            problems.append(Problem(name, str(value), "must be at most 10^9"))
    if workload.precision not in PRECISIONS:
        problems.append(
            Problem(
                "precision",
                workload.precision,
                f"known: {', '.join(PRECISIONS)}",
                nearest_name(workload.precision, PRECISIONS),
            )
        )
    if workload.optimizer != "adam":
        problems.append(Problem("optimizer", workload.optimizer, "known: adam", "adam"))
    return problems
