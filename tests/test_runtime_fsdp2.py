"""Sharded training state against PyTorch's own: ZeRO 2 and 3 give the gradients that FSDP2 gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from meshwright.runtime.modules import BlockModule  # noqa: E402
from meshwright.runtime.ranks import on_ranks  # noqa: E402
from meshwright.runtime.train import DTYPES, Rank  # noqa: E402
from meshwright.runtime.weights import drawn, parameter_instances  # noqa: E402
from runtime_strategies import job  # noqa: E402


class Owned(torch.nn.Module):
    """The parameters of a block as a plain module has them."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = list(weights)
        for index, name in enumerate(self.names):
            self.register_parameter(f"p{index}", torch.nn.Parameter(weights[name]))

    def use(self) -> dict[str, Any]:
        return {name: getattr(self, f"p{index}") for index, name in enumerate(self.names)}

    @contextmanager
    def gathered_again_in_backward(self) -> Iterator[None]:
        yield


def fsdp2_gradients(me: Rank, reshard: bool) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, source, found = init_device_mesh("cpu", (2,)), drawn(me.job.seed), {}
    blocks = torch.nn.ModuleList()
    instances = list(parameter_instances(me.job.graph))
    for position, name in enumerate(me.job.graph.sequence):
        own = [instance for instance in instances if instance.position == position]
        dtype, sizes = DTYPES[me.job.workload.precision], me.layouts.sizes
        weights = {
            instance.tensor: source(instance.name, tuple(sizes[dim] for dim in instance.dims)).to(dtype)
            for instance in own
        }
        owned = Owned(weights)
        block = BlockModule(me.layouts.plans[name], owned)  # type: ignore[arg-type]
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
        blocks.append(block)
        found |= {instance.name: (owned, owned.names.index(instance.tensor)) for instance in own}
    inputs = me.data.inputs(0)
    for part in range(me.layouts.num_microbatches):
        piece = {name: x.chunk(me.layouts.num_microbatches)[part] for name, x in inputs.items()}
        results: tuple[Any, ...] = ()
        for block in blocks:
            results = block(results, piece)
        (results[0].sum() / me.job.workload.tokens).backward()
    return {name: getattr(owned, f"p{index}").grad.full_tensor() for name, (owned, index) in found.items()}


def compare(rank: int, size: int) -> dict[str, float]:
    worst = {}
    for zero in (2, 3):
        me = Rank(job("llama-tiny", f"dp=2,zero={zero},mbs=2"), rank)
        theirs = fsdp2_gradients(me, reshard=zero == 3)
        me.compute_gradients(me.data.inputs(0))
        ours = dict(me.whole_gradients())
        assert set(ours) == set(theirs)
        differences = [float((ours[name] - theirs[name]).abs().max() / ours[name].abs().max()) for name in ours]
        worst[f"zero={zero}"] = max(differences)
    return worst


def test_gradients_are_those_of_fsdp2() -> None:
    for worst in on_ranks(2, compare):
        assert set(worst) == {"zero=2", "zero=3"}
        assert max(worst.values()) < 1e-13
