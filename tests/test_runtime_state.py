"""What the runtime moves is what the planner derives; how much memory a step takes; what this machine measures."""

from __future__ import annotations

import gc
import itertools

import pytest

torch = pytest.importorskip("torch")

from meshwright.cluster import cluster_problems  # noqa: E402
from meshwright.runtime.calibrate import calibrate_local  # noqa: E402
from meshwright.runtime.collectives import route  # noqa: E402
from meshwright.runtime.memory import peak_bytes  # noqa: E402
from meshwright.runtime.mesh import Mesh  # noqa: E402
from meshwright.runtime.state import state_routes  # noqa: E402
from meshwright.sharding import PARTIAL, Shard, state_transfers, zero_placement  # noqa: E402
from meshwright.strategy import MeshAxis  # noqa: E402

AXES = (MeshAxis("dp_replicate", 2), MeshAxis("dp_shard", 2), MeshAxis("cp", 3), MeshAxis("tp", 2))


@pytest.mark.parametrize(("level", "extra"), list(itertools.product(range(4), ((), ("tp",)))))
def test_state_moves_as_the_planner_derives(level: int, extra: tuple[str, ...]) -> None:
    partial = ("dp_replicate", "dp_shard", "cp", *extra)
    state = zero_placement(level, ("dp_shard", "cp"))
    routes, derived = state_routes(partial, state, Mesh(AXES, 0)), state_transfers({}, partial, state)
    for name in ("each_use", "each_backward", "step_gradient", "step_parameter"):
        assert tuple(step for step, _ in getattr(routes, name).steps) == getattr(derived, name), name


def test_pieces_of_a_dim_nest_and_cover_it() -> None:
    # 10 over dp_shard x cp: halves of 5, each in pieces of 2, 2 and 1.
    pieces = list(Mesh(AXES, 0).pieces(10, ("dp_shard", "cp"), ("dp_shard", "cp")))
    assert pieces == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10)]
    assert list(Mesh(AXES, 0).pieces(10, ("dp_shard", "cp"), ("cp",))) == pieces[:3]
    assert list(Mesh(AXES, 0).pieces(2, ("cp",), ("cp",))) == [(0, 1), (1, 2), (2, 2)]


def test_an_outer_axis_that_leaves_goes_the_long_way() -> None:
    mesh = Mesh(AXES, 0)
    both = {"cp": Shard("seq"), "tp": Shard("seq")}
    assert [step.axes for step, _ in route(both, {"cp": Shard("seq")}, mesh).steps] == [("tp",)]
    # Pieces of tp alone are not contiguous in those of both.
    long = [(step.collective.value, step.axes) for step, _ in route(both, {"tp": Shard("seq")}, mesh).steps]
    assert long == [
        ("all_gather", ("cp", "tp")),
        ("slice", ("tp",)),
    ]
    reduced = route({"cp": PARTIAL, "tp": Shard("seq")}, both, mesh).steps
    assert [step.collective.value for step, _ in reduced] == ["all_reduce", "all_gather", "slice"]


def test_peak_counts_what_is_alive_at_once() -> None:
    gc.collect()
    nothing = peak_bytes(lambda: None)
    weight = torch.zeros(1000, dtype=torch.float64)

    def step() -> None:
        doubled = weight * 2
        total = doubled + 1
        del doubled
        (total * 3).sum()

    # weight; doubled and total; then total and its triple, and the sum of 8 bytes
    assert peak_bytes(step) == nothing + 8000 + 2 * 8000 + 8
    assert peak_bytes(step) == nothing + 8000 + 2 * 8000 + 8


def test_this_machine_measures_as_a_cluster() -> None:
    cluster = calibrate_local(2)
    assert cluster_problems(cluster) == []
    assert cluster.num_devices == 2
    device, (level,) = cluster.groups[0].device, cluster.levels
    assert set(device.peak_flops) == {"float64", "float32", "bfloat16"}
    quantities = [*device.peak_flops.values(), device.memory_bandwidth_Bps, level.bandwidth_Bps, level.latency_s]
    assert all(quantity.value > 0 and quantity.source.startswith("[measured] ") for quantity in quantities)
    assert device.peak_flops["float32"].value > 1e8
    assert level.latency_s.value < 1
