"""What PyTorch's DTensor would accept: its sharding rules, asked without a process group of real processes.

All of it is private API, pinned to this module: a fake group of two, the propagator's own entry point, and nothing is
computed. The answers are about one mesh axis; DTensor combines axes by taking each by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from meshwright.runtime.traced.local import overload_of

#: How an array lies: the dim that is cut, or one of these.
WHOLE, SUMMAND = "R", "P"

#: Of a tensor's placement: `S0`, `S1` ..., `R` or `P`.
Lies = str


@dataclass(frozen=True)
class Accepted:
    """Placements of all tensors that go in (in order) for which DTensor moves nothing, and of those that come out."""

    operands: tuple[Lies, ...]
    results: tuple[Lies, ...]


@contextlib.contextmanager
def fake_mesh() -> Iterator[Any]:
    """A mesh of two that nobody is on."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def has_rule(op: str) -> bool:
    """Whether DTensor has a rule of its own for an operator (those made of others are seen in parts)."""
    from torch.distributed.tensor import DTensor

    propagator = DTensor._op_dispatcher.sharding_propagator
    tables = (propagator.op_strategy_funcs, propagator.op_to_rules, propagator.op_single_dim_strategy_funcs)
    return any(overload_of(op) in table for table in tables)


def accepted(op: str, arguments: Mapping[str, Any], mesh: Any, most: int = 400) -> list[Accepted]:
    """All placements of an operator's tensors that DTensor takes as they are, but for those where all is whole."""
    tensors = [each for given in arguments.values() for each in _tensors(given)]
    ways = itertools.product(*([WHOLE, SUMMAND, *(f"S{dim}" for dim in range(x.dim()))] for x in tensors))
    found = []
    for operands in itertools.islice(ways, most):
        if set(operands) != {WHOLE}:
            results = _results(op, arguments, operands, mesh)
            if results is not None:
                found.append(Accepted(operands, results))
    return found


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [each for each in given if isinstance(each, Tensor)] if isinstance(given, (list, tuple)) else []


def _results(op: str, arguments: Mapping[str, Any], operands: Sequence[Lies], mesh: Any) -> tuple[Lies, ...] | None:
    """How the results lie, None where DTensor has no rule for it or would move an operand."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._op_schema import OpSchema

    places = iter(operands)

    def spec(value: Any) -> Any:
        if isinstance(value, Tensor):
            meta = TensorMeta(value.shape, value.stride(), value.dtype)
            return DTensorSpec(mesh, (_placement(next(places)),), tensor_meta=meta)
        return [spec(each) for each in value] if isinstance(value, (list, tuple)) else value

    function = overload_of(op)
    positional, named = [], {}
    for argument in function._schema.arguments:
        default = argument.default_value if argument.has_default_value() else None
        value = spec(arguments.get(argument.name, default))
        if argument.kwarg_only:
            if argument.name in arguments:
                named[argument.name] = value
        else:
            positional.append(value)
    propagator = DTensor._op_dispatcher.sharding_propagator
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sharding = propagator.propagate_op_sharding_non_cached(OpSchema(function, tuple(positional), named))
    except Exception:  # the many ways in which it says that it cannot
        return None
    if sharding.output_spec is None:
        return None
    if sharding.needs_redistribute:  # said too where only a size among the arguments is made local
        wanted = sharding.redistribute_schema
        if wanted is None or [each.placements for each in wanted.args_spec] != [
            (_placement(each),) for each in operands
        ]:
            return None
    specs = sharding.output_spec if isinstance(sharding.output_spec, (list, tuple)) else [sharding.output_spec]
    return tuple(_lies(each.placements[0]) for each in specs if each is not None)


def _placement(lies: Lies) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Replicate() if lies == WHOLE else Partial() if lies == SUMMAND else Shard(int(lies[1:]))


def _lies(placement: Any) -> Lies:
    if placement.is_replicate():
        return WHOLE
    if placement.is_partial():
        return SUMMAND if placement.reduce_op == "sum" else f"P({placement.reduce_op})"
    name = type(placement).__name__
    return f"S{placement.dim}" if name == "Shard" else str(placement)
