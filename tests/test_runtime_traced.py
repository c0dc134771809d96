"""Plans of traced modules carried out: the numbers of one device, whatever lies where."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meshwright.io.torch_graph import traced_module
from meshwright.io.traced import Traced
from meshwright.runtime.check_traced import checked, illegal, random_splits, setting, traced_model
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.ranks import on_ranks
from meshwright.runtime.traced.check import TOLERANCE, Plan, Subject, compare, compared_gradients, reference
from meshwright.runtime.traced.execute import Splits, loss_of, run_program
from meshwright.runtime.traced.models import MODELS, made
from meshwright.runtime.traced.redistribute import Halo, redistribute, way, with_halo
from meshwright.sharding import PARTIAL, Placement, Placements, Shard
from meshwright.strategy import MeshAxis

# --- the program whole: what the plans are held against is what the module itself computes ----------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_program_run_whole_is_the_module(name: str) -> None:
    traced = traced_model(name)
    outcome, whole = reference(Subject(traced, traced.program.batch))
    values = traced.program.values
    module, _ = made(name)
    # `to_empty` gives tied parameters storage of their own: they are tied again.
    module = module.to_empty(device="cpu").double()
    owner = {values[second].path: values[first].path for first, second in traced.program.tied}
    for path, first in owner.items():
        holder, _, attribute = path.rpartition(".")
        setattr(module.get_submodule(holder), attribute, module.get_parameter(first))
    given = {values[value].path: x for value, x in whole.items() if values[value].path}
    for path, x in (*module.named_parameters(), *module.named_buffers()):
        if path in given:
            x.data.copy_(given[path])
    loss = loss_of([module(*(whole[value] for value in traced.program.inputs))])
    loss.backward()  # type: ignore[no-untyped-call]
    # Where a module says float32 (norms, rotary tables), the program computes in float64.
    says_float32 = any(call.attributes.get("dtype") == "float32" for call in traced.program.calls)
    tolerance = 1e-5 if says_float32 else 1e-12
    assert float(outcome.loss) == pytest.approx(float(loss.detach()), rel=tolerance, abs=tolerance)
    assert {values[value].path for value in outcome.gradients} == {path for path, _ in module.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in outcome.gradients.values())
    for value, gradient in outcome.gradients.items():
        expected = module.get_parameter(values[value].path).grad
        assert expected is not None
        assert float((gradient - expected).abs().max()) < tolerance * largest, value


# --- plans on processes -----------------------------------------------------------------------------------------------


def test_random_plans_of_every_kind_of_model_and_the_solvers_own_give_the_numbers_of_one_device() -> None:
    found = checked(list(MODELS), 2 * len(MODELS), seed=7, meshes=[(2, 2)])
    assert len(found) >= 3 * len(MODELS)
    bad = [(each.plan.name, each.loss_difference, each.gradient_difference, each.worst_gradient) for each in found]
    assert all(each.agrees for each in found), [line for line, each in zip(bad, found, strict=True) if not each.agrees]
    assert all(each.num_gradients > 0 for each in found)


class Normalised(nn.Module):
    """A convolution that space can be cut under, and BatchNorm in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 5, padding=2), nn.BatchNorm2d(4)

    def forward(self, image: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.conv(image))
        return normed.relu()


def _normalised() -> Traced:
    with torch.device("meta"):
        module, image = Normalised(), torch.empty(4, 2, 8, 8)
    return traced_module(module, (image,), name="normalised")


def test_space_cut_in_pieces_smaller_than_the_halo_and_statistics_over_all_ranks() -> None:
    """8 rows on 8 ranks: a window of 5 reads two neighbours on each side. BatchNorm's batch is cut on another axis."""
    traced = _normalised()
    (block,) = traced.graph.blocks
    conv = next(operator for operator in block.operators if operator.name.endswith("conv2d"))
    height = next(iter(conv.halo))
    plans = []
    for sizes, split in (
        ((8,), {"x": height}),
        ((2, 4), {"x": "batch", "y": height}),
        ((2, 4), {"x": height, "y": height}),
    ):
        found = setting("normalised", traced, sizes)
        splits = found.space.splits(np.zeros(len(found.space.nodes), dtype=int))
        own = {key: dict(entry) for key, entry in splits[block.name].items()}
        for operator in block.operators:
            own[operator.name] = {axis: dim for axis, dim in split.items() if operator.splittable(dim)}
        assert own[conv.name] == split
        plans.append(Plan(0, found.mesh, {block.name: own}))
        assert not illegal(found, {block.name: own})
    for each in compare([Subject(traced, traced.program.batch)], plans):
        assert each.agrees, each


def test_a_plan_that_disagrees_is_found() -> None:
    """A product whose contracted dim is cut, right and with its bias added by both ranks."""
    traced = traced_model("mlp")
    found = setting("mlp", traced, (2,))
    (block,) = traced.graph.blocks
    product = next(operator for operator in block.operators if operator.name == "down.linear")
    contracted = next(dim for dim in product.input_dims[0] if dim not in product.output_dims[0])
    splits = random_splits(found, np.random.default_rng(0))
    splits[block.name]["down.linear"] = {"x": contracted}
    right, wrong = (on_ranks(2, partial(_differences, traced, splits, is_wrong)) for is_wrong in (False, True))
    assert max(max(rank) for rank in right) < TOLERANCE
    assert min(min(rank) for rank in wrong) > 1e-3


def _differences(traced: Traced, splits: Splits, is_wrong: bool, rank: int, size: int) -> tuple[float, float]:
    """Of the loss, relative, and of the gradients."""
    subject = Subject(traced, traced.program.batch)
    expected, whole = reference(subject)
    mesh = Mesh((MeshAxis("x", size),), rank)
    mesh.form_groups([("x",)])
    if is_wrong:
        Mesh.is_first = lambda *_: True  # type: ignore[method-assign]  # in a process that ends with this
    outcome = run_program(traced, splits, whole, subject.batch, mesh)
    loss = abs(float(outcome.loss / expected.loss) - 1)
    return loss, compared_gradients(traced, subject.batch, outcome, expected.gradients, mesh)[0]


# --- redistribution ---------------------------------------------------------------------------------------------------

FACTORS = (("a", "b"), (), ("c",))
SIZES = {"a": 4, "b": 8, "c": 4}
AXES = (MeshAxis("x", 2), MeshAxis("y", 2))


def _placements() -> list[Placements]:
    choices: list[Placement | None] = [None, PARTIAL, Shard("a"), Shard("b"), Shard("c")]
    return [
        {axis: placement for axis, placement in zip("xy", pair, strict=True) if placement is not None}
        for pair in itertools.product(choices, repeat=2)
    ]


def _moved(rank: int, size: int) -> int:
    """Every pair of placements, forward and backward; how many. Partial tensors add up to the whole."""
    mesh = Mesh(AXES, rank)
    mesh.form_groups([("x",), ("y",), ("x", "y")])
    whole = torch.arange(4 * 8 * 4, dtype=torch.float64).reshape(32, 1, 4)
    count = 0
    for source, target in itertools.product(_placements(), repeat=2):
        gradient_source = {axis: each for axis, each in target.items() if isinstance(each, Shard)}
        gradient_target = {axis: each for axis, each in source.items() if isinstance(each, Shard)}
        start = way(FACTORS, SIZES, {}, source, mesh)(whole, mesh).clone().requires_grad_()
        forward = way(FACTORS, SIZES, source, target, mesh)
        backward = way(FACTORS, SIZES, gradient_source, gradient_target, mesh)
        found = redistribute(start, forward, backward, mesh)
        # The way back to the whole is another list of steps.
        assert torch.equal(way(FACTORS, SIZES, target, {}, mesh)(found.detach(), mesh), whole), (source, target)
        if forward.steps or backward.steps:
            found.backward(way(FACTORS, SIZES, {}, gradient_source, mesh)(2 * whole, mesh))
            assert start.grad is not None
            wanted = way(FACTORS, SIZES, {}, gradient_target, mesh)(2 * whole, mesh)
            assert torch.equal(start.grad, wanted), (source, target)
        count += 1
    return count


def test_every_pair_of_placements_of_an_array_whose_dim_is_a_product() -> None:
    assert on_ranks(4, _moved) == [25 * 25] * 4


def _extended(rank: int, size: int) -> int:
    mesh = Mesh((MeshAxis("x", size),), rank)
    mesh.form_groups([("x",)])
    whole = torch.arange(8.0, dtype=torch.float64)[None].repeat(3, 1)
    count = 0
    for before, after in itertools.product(range(6), repeat=2):
        local = whole[:, 2 * rank : 2 * rank + 2].clone().requires_grad_()
        found = with_halo(local, Halo(1, before, after, ("x",)), mesh)
        padded = torch.nn.functional.pad(whole, (before, after))
        assert torch.equal(found, padded[:, 2 * rank : 2 * rank + before + 2 + after])
        (found * (rank + 1)).sum().backward()  # type: ignore[no-untyped-call]
        # A row's gradient is the sum over the ranks that have read it.
        read = [sum(o + 1 for o in range(size) if 2 * o - before <= row < 2 * o + 2 + after) for row in range(8)]
        assert local.grad is not None
        assert local.grad[0].tolist() == read[2 * rank : 2 * rank + 2]
        count += 1
    return count


def test_halos_of_any_width_and_their_gradients() -> None:
    assert on_ranks(4, _extended) == [36] * 4


class Masked(nn.Module):
    """A mask of documents and a number for each sequence, both made of the batch's size by `arange`."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        count, length = x.shape[:2]
        places = torch.arange(length, device=x.device)
        documents = (places // 4).unsqueeze(0).expand(count, -1).cumsum(-1)
        rows = torch.arange(count, device=x.device)[:, None, None]
        mask = documents[rows, places[None, :, None]] >= documents[rows, places[None, None, :]]
        number = torch.arange(count, device=x.device, dtype=x.dtype)[:, None, None]
        scores = (self.proj(x) @ x.transpose(1, 2)).masked_fill(~mask, -1e9)
        mixed: Tensor = scores.softmax(-1) @ x + number
        return mixed


def test_constants_of_the_batch_are_those_of_the_batch_that_runs() -> None:
    with torch.device("meta"):
        traced = traced_module(Masked(), (torch.empty(2, 8, 8),), name="masked")
    found = setting("masked", traced, (2,))
    splits = found.space.splits(np.zeros(len(found.space.nodes), dtype=int))
    for each in compare([Subject(traced, 6)], [Plan(0, found.mesh, splits)]):
        assert each.agrees, each
