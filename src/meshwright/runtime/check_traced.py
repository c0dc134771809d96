"""Plans of traced modules carried out and held against one device: `python -m meshwright.runtime.check_traced`.

Draws legal plans at random (each operator, tensor at rest and parameter any of its choices, training state some
refinement) for small models of several kinds on meshes of 4 and 8 processes, adds the plans that the solver finds, runs
all of them on Gloo in float64, and compares the loss and every gradient with one device.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.choice import peak_of
from meshwright.cluster import preset_cluster
from meshwright.cost.layouts import machine_of
from meshwright.engine import load_engine
from meshwright.graph import Graph
from meshwright.io.torch_graph import traced_function, traced_module
from meshwright.io.traced import Traced
from meshwright.runtime.traced.check import TOLERANCE, Compared, Plan, Subject, compare
from meshwright.runtime.traced.models import MODELS, made
from meshwright.search.operators import OperatorSpace, operator_space
from meshwright.search.place import place
from meshwright.sharding import SPREAD, SUMMANDS, rest_key, state_key
from meshwright.strategy import PLACED_AXES, MeshAxis, Strategy, strategy_problems
from meshwright.workload import Workload

#: Sizes of the meshes, outermost axis first.
MESHES = ((2, 2), (4,), (2, 4))

Splits = dict[str, dict[str, dict[str, str]]]


@dataclass(frozen=True)
class Setting:
    """A model on a mesh: all of its plans."""

    name: str
    space: OperatorSpace

    @property
    def mesh(self) -> tuple[MeshAxis, ...]:
        """The axes."""
        return self.space.mesh

    @property
    def label(self) -> str:
        """The mesh in words."""
        return "x".join(str(axis.size) for axis in self.mesh)


def traced_model(name: str) -> Traced:
    """One of `MODELS`, or `module:function`."""
    if ":" in name:
        return traced_function(name)
    module, inputs = made(name)
    return traced_module(module, inputs, name=name)


def setting(name: str, traced: Traced, sizes: Sequence[int]) -> Setting:
    """All plans of a traced model on a mesh of these sizes."""
    mesh = tuple(MeshAxis(axis, size) for axis, size in zip(PLACED_AXES, sizes, strict=False))
    workload = Workload(traced.program.batch, 1, "float32")
    cluster = preset_cluster(f"local-cpux{math.prod(sizes)}")
    machine = machine_of(cluster, load_engine("meshwright"), workload)
    return Setting(name, operator_space(traced.graph, mesh, machine, workload, memory_limit=math.inf))


def random_splits(found: Setting, random: np.random.Generator) -> Splits:
    """A plan drawn at random: every node of the space any of its choices, state of parameters some refinement."""
    space = found.space
    choice = np.array([random.integers(len(node.codes_CA)) for node in space.nodes])
    splits = {
        block: {key: dict(split) for key, split in given.items()} for block, given in space.splits(choice).items()
    }
    _spread_state(space.graph, splits, found.mesh, space.graph.sizes(space.workload.global_batch, 1), random)
    return splits


def _spread_state(
    graph: Graph, splits: Splits, mesh: Sequence[MeshAxis], sizes: Mapping[str, int], random: np.random.Generator
) -> None:
    """Of some parameters, leave gradients as summands and cut the state further than the parameter."""
    owner = {other: first for first, other in graph.tied}
    chosen: dict[str, tuple[dict[str, str], dict[str, str]] | None] = {}
    for block in graph.blocks:
        for tensor in block.parameters:
            path = f"{block.name}/{tensor.name}"
            first = owner.get(path, path)
            stored = splits[block.name][rest_key(block, tensor.name)]
            if first not in chosen:
                chosen[first] = None
                if tensor.differentiable and random.random() < 0.5:
                    state = {axis: dim for axis, dim in stored.items() if dim not in (SPREAD, SUMMANDS)}
                    left = {dim: sizes[dim] for dim in tensor.dims}
                    for axis in mesh:
                        if axis.name in state:
                            left[state[axis.name]] //= axis.size
                    rest = dict(stored)
                    for axis in mesh:
                        if axis.name not in state:
                            rest |= {axis.name: SPREAD} if random.random() < 0.5 else {}
                            fits = [dim for dim in tensor.dims if left[dim] % axis.size == 0]
                            if fits and random.random() < 0.7:
                                state[axis.name] = str(random.choice(fits))
                                left[state[axis.name]] //= axis.size
                    chosen[first] = rest, state
            if (found := chosen[first]) is not None:
                own = dict(zip(_first_dims(graph, first), tensor.dims, strict=True))
                rest, state = ({axis: own.get(dim, dim) for axis, dim in each.items()} for each in found)
                splits[block.name][rest_key(block, tensor.name)] = rest
                splits[block.name][state_key(tensor.name)] = state


def _first_dims(graph: Graph, path: str) -> tuple[str, ...]:
    block, _, name = path.partition("/")
    return graph.block[block].tensor[name].dims


#: The share of the best plan's memory that a second solved plan has to do with.
TIGHT = 0.8


def solved_splits(found: Setting) -> Iterator[tuple[str, Splits]]:
    """The plan that the solver finds, with training state where that costs least, and the one under less memory, where
    there is one."""
    space = found.space
    first = place(space.graph, space.mesh, space.machine, space.workload, memory_limit=math.inf, with_state=True)
    assert first.strategy is not None, first.statement
    assert first.choice_N is not None
    yield "solved", first.strategy.splits
    tight = TIGHT * peak_of(first.space.instance, first.choice_N) + space.fixed_bytes
    second = place(space.graph, space.mesh, space.machine, space.workload, memory_limit=tight, with_state=True)
    if second.strategy is not None:
        yield "solved, tight", second.strategy.splits


def illegal(found: Setting, splits: Splits) -> str:
    """What is wrong with a plan, where something is."""
    space = found.space
    plain: Strategy = space.strategy(np.zeros(len(space.nodes), dtype=int))
    strategy = Strategy(**{**vars(plain), "splits": splits})
    degree = math.prod(axis.size for axis in found.mesh)
    return "; ".join(map(str, strategy_problems(strategy, space.graph, degree, space.workload)))


def checked(names: Sequence[str], num_plans: int, seed: int, meshes: Sequence[Sequence[int]]) -> list[Compared]:
    """Run `num_plans` random plans, spread evenly over models and meshes, and for each pair the solver's own."""
    random = np.random.default_rng(seed)
    traced = [traced_model(name) for name in names]
    pairs = [(index, sizes) for sizes in meshes for index in range(len(names))]
    plans = []
    for number, (index, sizes) in enumerate(pairs):
        found = setting(names[index], traced[index], sizes)
        count = num_plans // len(pairs) + (number < num_plans % len(pairs))
        drawn = [("random", random_splits(found, random)) for _ in range(count)]
        for kind, splits in (*drawn, *solved_splits(found)):
            assert not (problems := illegal(found, splits)), problems
            plans.append(Plan(index, found.mesh, splits, f"{names[index]} {found.label} {kind}"))
    return compare([Subject(each, each.program.batch, seed) for each in traced], plans)


def main() -> int:
    """Check all models and print a table; 1 where a plan disagrees with one device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"module:function, or of {', '.join(MODELS)} (default: all of these)")
    parser.add_argument("--plans", type=int, default=200, help="random plans, beside the solver's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", action="append", help="sizes such as 2x2 (default: 2x2, 4 and 2x4)")
    asked = parser.parse_args()
    meshes = [tuple(map(int, text.split("x"))) for text in asked.mesh] if asked.mesh else MESHES
    found = checked(asked.models or list(MODELS), asked.plans, asked.seed, meshes)
    print(f"{'model, mesh, plans':36}{'agree':>9}{'loss off':>11}{'gradient off':>14}{'seconds each':>14}")
    for name in dict.fromkeys(each.plan.name for each in found):
        own = [each for each in found if each.plan.name == name]
        print(
            f"{name:36}{f'{sum(each.agrees for each in own)}/{len(own)}':>9}"
            f"{max(each.loss_difference for each in own):11.1e}{max(each.gradient_difference for each in own):14.1e}"
            f"{sum(each.seconds for each in own) / len(own):14.2f}"
        )
    good = sum(each.agrees for each in found)
    print(f"{good} of {len(found)} plans agree with one device within {TOLERANCE:g}")
    return 0 if good == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
