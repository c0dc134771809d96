"""What single operators take on one machine: each measured once, alone, at its local sizes, and kept in a file.

The cost model takes these seconds in place of its formulas wherever it meets an operator of the same key. A key says
all that a kernel's time depends on (what it computes, local sizes, types, which operands have a gradient) and nothing
that it does not, so that layers, models and strategies share what was measured. Left out: what an operator takes beside
others (caches that neighbours filled, memory that communication keeps busy), updates of the optimizer, communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from meshwright.errors import Problem, nearest_name
from meshwright.graph import KINDS, Operator, Role
from meshwright.workload import DTYPE_BYTES


@dataclass(frozen=True)
class OperatorKey:
    """An operator as one rank executes it: `graph.Operator` without names, with the local size of each of its dims.

    `dtypes` and `roles` are those of the inputs in order; the role of an activation without a gradient is `input`.
    `cut` names split dims that a kernel treats otherwise than whole ones of the same local size: with a piece of its
    table, an embedding masks the rows that it does not have.
    """

    kind: str
    spec: str
    sizes: tuple[tuple[str, int], ...]
    dtypes: tuple[str, ...]
    roles: tuple[Role, ...]
    unsplit: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str | int | float | bool], ...] = ()
    cut: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For people: `einsum batch seq hidden, ffn hidden -> batch seq ffn (batch=8 seq=128 hidden=384 ffn=1024)`."""
        return f"{self.kind} {self.spec} ({' '.join(f'{dim}={size}' for dim, size in self.sizes)})"

    @cached_property
    def operator(self) -> Operator:
        """The operator, its operands named by their position."""
        inputs, outputs = (
            tuple(f"{side}{index}" for index in range(1 + part.count(",")))
            for side, part in zip(("in", "out"), self.spec.split("->"), strict=True)
        )
        attributes = dict(self.attributes)
        return Operator(self.kind, self.kind, self.spec, inputs, outputs, self.unsplit, attributes=attributes)


@dataclass(frozen=True)
class MeasuredOperator:
    """Seconds of an operator: its forward, and in the backward the gradients of its activations and of its parameters;
    0 where it has none."""

    operator: OperatorKey
    forward_s: float
    input_s: float
    weight_s: float


@dataclass(frozen=True)
class Host:
    """Where a profile was measured: model and cores of the CPU, threads of each process, system, release of PyTorch."""

    cpu: str
    cores: int
    threads: int
    platform: str
    torch: str


@dataclass(frozen=True)
class Profile:
    """Operators measured on one host by `num_processes` at once, all doing the same: contention is part of a machine.

    >>> host = Host("AMD EPYC", 2, 2, "Linux x86_64", "2.13.0")
    >>> add = OperatorKey("add", "a, a -> a", (("a", 8),), ("float32",) * 2, (Role.ACTIVATION,) * 2)
    >>> profile = Profile(host, 1, (MeasuredOperator(add, forward_s=2e-6, input_s=1e-6, weight_s=0.0),))
    >>> profile.by_key[add].forward_s
    2e-06
    """

    host: Host
    num_processes: int
    operators: tuple[MeasuredOperator, ...] = ()

    @cached_property
    def by_key(self) -> Mapping[OperatorKey, MeasuredOperator]:
        """What was measured, by key."""
        return {measured.operator: measured for measured in self.operators}


def profile_problems(profile: Profile) -> list[Problem]:
    """Everything that makes a profile unusable."""
    counts = {
        "host.cores": profile.host.cores,
        "host.threads": profile.host.threads,
        "num_processes": profile.num_processes,
    }
    problems = [Problem(name, str(count), "must be at least 1", "1") for name, count in counts.items() if count < 1]
    seen: set[OperatorKey] = set()
    for index, measured in enumerate(profile.operators):
        where = f"operators[{index}]"
        problems += _key_problems(measured.operator, f"{where}.operator")
        for name in ("forward_s", "input_s", "weight_s"):
            seconds = getattr(measured, name)
            if not 0 <= seconds < math.inf:
                problems.append(Problem(f"{where}.{name}", str(seconds), "seconds are finite and not negative"))
        if measured.operator in seen:
            problems.append(Problem(f"{where}.operator", str(measured.operator), "stands twice"))
        seen.add(measured.operator)
    return problems


def _key_problems(key: OperatorKey, where: str) -> Iterator[Problem]:
    if key.kind not in KINDS:
        yield Problem(f"{where}.kind", key.kind, "no such kind of operator", nearest_name(key.kind, KINDS))
    if key.spec.count("->") != 1:
        yield Problem(f"{where}.spec", key.spec, "a spec is 'dims of inputs -> dims of outputs'")
        return
    dims = key.operator.dims
    if sorted(dim for dim, _ in key.sizes) != sorted(dims):
        given = " ".join(dim for dim, _ in key.sizes)
        yield Problem(f"{where}.sizes", given, f"the spec has the dims {' '.join(dims)}", " ".join(dims))
    for dim, size in key.sizes:
        if size < 1:
            yield Problem(f"{where}.sizes.{dim}", str(size), "must be at least 1", "1")
    for name in ("dtypes", "roles"):
        num_given, num_inputs = len(getattr(key, name)), len(key.operator.inputs)
        if num_given != num_inputs:
            yield Problem(f"{where}.{name}", f"{num_given} entries", f"the spec has {num_inputs} inputs")
    for dtype in key.dtypes:
        if dtype not in DTYPE_BYTES:
            rule = f"known: {', '.join(DTYPE_BYTES)}"
            yield Problem(f"{where}.dtypes", dtype, rule, nearest_name(dtype, DTYPE_BYTES))
    for name in ("unsplit", "cut"):
        for dim in getattr(key, name):
            if dim not in dims:
                yield Problem(f"{where}.{name}", dim, f"dims: {' '.join(dims)}", nearest_name(dim, dims))
