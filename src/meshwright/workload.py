"""The workload: what is computed per step, at which precision, by which optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshwright.errors import InputError, Problem, nearest_name

#: Bytes of one number of each fixed type.
DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex128": 16, "complex64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip

#: Types that a step is computed in, and smaller ones that the products of layers with their weights may have.
PRECISIONS = ("bfloat16", "float16", "float32", "float64")
PRODUCT_PRECISIONS = ("", "float8", "float4", "int8")

#: Bytes of one number of each type that products alone can have.
PRODUCT_BYTES = {"float8": 1, "int8": 1, "float4": 0.5}

#: What people write, and what it means: the type computed in, and that of the layers' products where it is another.
PRECISION_NAMES = {
    **{name: (name, "") for name in PRECISIONS},
    "bf16": ("bfloat16", ""),
    "fp16": ("float16", ""),
    "fp32": ("float32", ""),
    "fp64": ("float64", ""),
    "float8": ("bfloat16", "float8"),
    "fp8": ("bfloat16", "float8"),
    "mxfp8": ("bfloat16", "float8"),
    "float4": ("bfloat16", "float4"),
    "nvfp4": ("bfloat16", "float4"),
    "int8": ("bfloat16", "int8"),
}


class Phase(StrEnum):
    """What a step is."""

    TRAIN = "train"


@dataclass(frozen=True)
class Workload:
    """One step: `global_batch` sequences of `seq_len` tokens, computed in `precision`, updated by `optimizer`.

    `product_precision` is the type of the products of layers with their weights where it is a smaller one (FP8
    training): operands are cast, results and everything else stay in `precision`."""

    global_batch: int
    seq_len: int
    precision: str = "bfloat16"
    phase: Phase = Phase.TRAIN
    optimizer: str = "adam"
    product_precision: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.seq_len

    def bytes_of(self, dtype: str) -> int:
        """Bytes of one number of a tensor's type, `compute` being the precision."""
        return DTYPE_BYTES[self.precision if dtype == "compute" else dtype]


def parse_precision(text: str) -> tuple[str, str]:
    """The precision that a name means, and that of the layers' products where it is another.

    >>> parse_precision("bf16"), parse_precision("fp8")
    (('bfloat16', ''), ('bfloat16', 'float8'))
    """
    if text not in PRECISION_NAMES:
        rule, nearest = f"known: {', '.join(PRECISION_NAMES)}", nearest_name(text, PRECISION_NAMES)
        raise InputError([Problem("--precision", text, rule, nearest)])
    return PRECISION_NAMES[text]


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
    if workload.product_precision not in PRODUCT_PRECISIONS:
        rule = f"known: {', '.join(filter(None, PRODUCT_PRECISIONS))}, or '' for the precision's own"
        nearest = nearest_name(workload.product_precision, PRODUCT_PRECISIONS)
        problems.append(Problem("product_precision", workload.product_precision, rule, nearest))
    if workload.optimizer != "adam":
        problems.append(Problem("optimizer", workload.optimizer, "known: adam", "adam"))
    return problems
