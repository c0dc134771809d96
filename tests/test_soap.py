"""Degrees over samples, operators, attributes and parameters, read from strategies and set in them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from meshwright.cluster import preset_cluster
from meshwright.cost.layouts import machine_of
from meshwright.engine import load_engine
from meshwright.errors import InputError
from meshwright.io.models import load_model
from meshwright.search.operators import operator_space
from meshwright.soap import DimKind, Soap, dim_kinds, soap_of, with_soap
from meshwright.strategy import BlockRange, MeshAxis, Stage, Strategy, expand, parse_shorthand, strategy_problems
from meshwright.workload import Workload

GRAPH = load_model("llama-3-8b")
WORKLOAD = Workload(64, 4096)
MESH = (MeshAxis("x", 4), MeshAxis("y", 2), MeshAxis("z", 4))


def whole() -> Strategy:
    """A strategy that splits nothing."""
    cluster = preset_cluster("dgx-h100x4")
    machine = machine_of(cluster, load_engine("unknown"), WORKLOAD)
    space = operator_space(GRAPH, MESH, machine, WORKLOAD)
    return space.strategy(np.zeros(len(space.nodes), dtype=int))


def test_kinds_of_dims() -> None:
    block = GRAPH.block["layer"]
    operators = {operator.name: operator for operator in block.operators}
    sample, attribute, parameter = DimKind
    assert dim_kinds(block, operators["gate"]) == {
        "batch": sample,
        "seq": attribute,
        "hidden": parameter,
        "ffn": parameter,
    }
    # Without a weight nothing is a parameter dim: FlexFlow's attribute parallelism of attention is over its heads.
    kinds = dim_kinds(block, operators["attention"])
    assert {dim: kind for dim, kind in kinds.items() if dim != "batch"} == dict.fromkeys(
        ("seq", "kv_heads", "group", "head_dim", "kv_seq"), attribute
    )


def test_degrees_of_megatron_plans() -> None:
    # Data parallelism of 4, tensor parallelism of 8, two stages: columns, rows and heads are split over the tensor
    # axis.
    found = soap_of(expand(parse_shorthand("tp=8,pp=2,dp=4,sp=1"), GRAPH), GRAPH)
    assert found["layer/gate"] == found["layer/down"] == found["layer/q"] == Soap(4, 2, 1, 8)
    assert found["layer/attention"] == Soap(4, 2, 8, 1)
    assert found["layer/norm1"] == Soap(4, 2, 8, 1), "along the sequence"
    assert found["head/lm"] == Soap(4, 2, 1, 8)
    found = soap_of(expand(parse_shorthand("tp=8,dp=4"), GRAPH), GRAPH)
    assert found["layer/norm1"] == Soap(4, 1, 1, 1), "repeated by all ranks of the tensor axis"


@pytest.mark.parametrize("name", ["layer/gate", "layer/down", "layer/attention", "layer/norm1", "embedding/token"])
def test_degrees_are_set_as_they_are_read(name: str) -> None:
    # Every tuple over the axes' products: either it is read back, and the strategy is legal, or refused.
    strategy, refused, numbers = whole(), 0, [1, 2, 4, 8, 16, 32]
    for sample, attribute, parameter in itertools.product(numbers, repeat=3):
        wanted = Soap(sample, 1, attribute, parameter)
        if math.prod((sample, attribute, parameter)) > 32:
            continue
        try:
            found = with_soap(strategy, GRAPH, name, wanted)
        except InputError as error:
            (problem,) = error.problems
            assert problem.nearest
            refused += 1
            continue
        assert soap_of(found, GRAPH)[name] == wanted
        assert strategy_problems(found, GRAPH, 32, WORKLOAD) == []
        before, after = soap_of(strategy, GRAPH), soap_of(found, GRAPH)
        assert {key for key in before if before[key] != after[key]} <= {name}
    has_parameters = "attention" not in name and "norm" not in name
    assert refused < (56 if not has_parameters else 20)


def test_what_cannot_be_had_names_the_nearest() -> None:
    with pytest.raises(InputError) as error:
        with_soap(whole(), GRAPH, "layer/attention", Soap(sample=4, parameter=2))
    (problem,) = error.value.problems
    assert problem.where == "layer/attention"
    assert problem.nearest.startswith("sample=4")
    with pytest.raises(InputError, match="no such operator"):
        with_soap(whole(), GRAPH, "layer/gates", Soap())
    with pytest.raises(InputError, match="no such block"):
        with_soap(whole(), GRAPH, "lair/gate", Soap())
    with pytest.raises(InputError, match="stages"):
        with_soap(whole(), GRAPH, "layer/gate", Soap(operator=2))


def test_what_an_operator_has_is_kept_where_it_can() -> None:
    strategy = with_soap(whole(), GRAPH, "layer/gate", Soap(sample=4, parameter=4))
    assert (
        strategy.splits["layer"]["gate"] == {"x": "batch", "z": "ffn"}
        or strategy.splits["layer"]["gate"]["x"] == "batch"
    )
    own = {**strategy.splits["layer"], "gate": {"z": "batch", "x": "hidden"}}
    strategy = dataclasses.replace(strategy, splits={**strategy.splits, "layer": own})
    strategy = with_soap(strategy, GRAPH, "layer/gate", Soap(sample=8, parameter=4))
    assert strategy.splits["layer"]["gate"] == {"x": "hidden", "y": "batch", "z": "batch"}


def test_stages_with_a_mesh_of_their_own() -> None:
    base = whole()
    total = len(GRAPH.sequence)
    first = {**base.splits, "layer": {**base.splits["layer"], "gate": {"x": "ffn"}}}
    stages = (
        Stage(0, (BlockRange(0, 10),), (MeshAxis("x", 8),), {name: first[name] for name in ("embedding", "layer")}),
        Stage(
            1, (BlockRange(10, total),), (MeshAxis("x", 16),), {name: base.splits[name] for name in ("layer", "head")}
        ),
    )
    strategy = dataclasses.replace(base, mesh=(MeshAxis("pp", 2),), splits={}, stages=stages)
    assert strategy.num_devices == 24
    assert soap_of(strategy, GRAPH)["layer/gate"] == Soap(1, 2, 1, 8)
    assert strategy_problems(strategy, GRAPH, 24, WORKLOAD) == []
    changed = with_soap(strategy, GRAPH, "layer/gate", Soap(sample=8, operator=2))
    assert changed.stages[0].splits["layer"]["gate"] == {"x": "batch"}
    assert changed.stages[1] == strategy.stages[1]
