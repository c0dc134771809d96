"""What a drawing of placements says: chips, shapes and collectives by hand, sums that are those of the step, a page
that fetches nothing, and text that fits the terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from meshwright.cluster import preset_cluster
from meshwright.cost.layouts import machine_of
from meshwright.cost.placed import PlacedStep, moved
from meshwright.engine import load_engine
from meshwright.errors import InputError
from meshwright.graph import Block, Graph, Operator, Role, Segment, Tensor
from meshwright.io.models import load_model
from meshwright.report.panels import Chip, Panel, dims_of, panels_of
from meshwright.report.placement import placement_figure, placement_page, placement_text
from meshwright.search.operators import placed_strategy
from meshwright.strategy import BlockRange, MeshAxis, Stage, Strategy, expand, parse_shorthand
from meshwright.workload import Workload

WORKLOAD = Workload(8, 1)
MESH = (MeshAxis("x", 2), MeshAxis("y", 4))
ENGINE = load_engine("pytorch-fsdp")

NET = Block(
    "net",
    (
        Tensor("x", ("batch", "i"), Role.INPUT, differentiable=False),
        Tensor("w", ("i", "h"), Role.PARAMETER),
        Tensor("z", ("batch", "h")),
        Tensor("a", ("batch", "h")),
        Tensor("v", ("h", "o"), Role.PARAMETER),
        Tensor("y", ("batch", "o")),
        Tensor("s", ("batch", "o")),
    ),
    (
        Operator("up", "einsum", "batch i, i h -> batch h", ("x", "w"), ("z",), contractions=("batch i h",)),
        Operator("act", "activation", "batch h -> batch h", ("z",), ("a",), saves=("z",)),
        Operator("down", "einsum", "batch h, h o -> batch o", ("a", "v"), ("y",), contractions=("batch h o",)),
        Operator("double<b>", "scale", "batch o -> batch o", ("y",), ("s",)),
    ),
)
GRAPH = Graph("net", {"i": 256, "h": 1024, "o": 128}, (NET,), (Segment(("net",)),))

#: Samples over x; over y the first product by columns, the second by rows, and its sum scattered over the samples.
BOTH = {"x": "batch", "y": "h"}
SPLITS = {
    "net": {
        "up": BOTH,
        "act": BOTH,
        "down": BOTH,
        "double<b>": {"x": "batch", "y": "batch"},
        "z": BOTH,
        "w": {"y": "h"},
        "v": {"y": "h"},
    }
}
STRATEGY = placed_strategy(GRAPH, MESH, SPLITS, WORKLOAD)


def step_of(graph: Graph, strategy: Strategy, workload: Workload) -> PlacedStep:
    return moved(graph, strategy, machine_of(preset_cluster("dgx-h100x1"), ENGINE, workload), workload)


STEP = step_of(GRAPH, STRATEGY, WORKLOAD)


def panel(**more: object) -> Panel:
    (found,) = panels_of(GRAPH, STRATEGY, WORKLOAD, title="by hand", step=STEP, **more)  # type: ignore[arg-type]
    return found


# --- data -------------------------------------------------------------------------------------------------------------


def test_chips_and_shapes_by_hand() -> None:
    rows = {row.operator: row for row in panel().rows}
    up, down = rows["up"], rows["down"]
    assert up.split == (Chip("x", "batch", "batch"), Chip("y", "h", "h"))
    (w,) = up.takes
    assert (w.tensor, w.chips, w.local_shape) == ("w", (Chip("x", "R"), Chip("y", "S(h)", "h")), (256, 256))
    (z,) = up.makes
    assert (z.chips, z.shape) == ((Chip("x", "S(batch)", "batch"), Chip("y", "S(h)", "h")), "4 x 256")
    (y,) = down.makes  # the contracted dim leaves a summand on each rank of y
    assert (y.chips, y.local_shape) == ((Chip("x", "S(batch)", "batch"), Chip("y", "P")), (4, 128))
    resting = {lying.tensor: lying for lying in panel().resting}
    assert list(resting) == ["w", "z", "v"]
    assert resting["v"].local_shape == (256, 128)


def test_collectives_are_those_of_the_step() -> None:
    rows = {row.operator: row for row in panel().rows}
    (scattered, gathered) = rows["double<b>"].moves
    # 4 x 128 numbers of 2 bytes, of which a rank sends three quarters.
    assert (scattered.collective, scattered.phase, scattered.axes) == ("reduce_scatter", "forward", ("y",))
    assert scattered.sent_bytes == gathered.sent_bytes == 4 * 128 * 2 * 3 / 4
    assert (gathered.collective, gathered.phase, gathered.tensor) == ("all_gather", "backward", "y")
    reduced = {move.tensor: move for name in ("up", "down") for move in rows[name].moves}
    assert {tensor: (move.collective, move.axes) for tensor, move in reduced.items()} == {
        "w": ("all_reduce", ("x",)),
        "v": ("all_reduce", ("x",)),
    }


@pytest.mark.parametrize("model", ["llama-tiny", "mixtral-8x7b"])
def test_panels_sum_to_the_step(model: str) -> None:
    graph, workload = load_model(model), Workload(8, 64)
    splits: dict[str, dict[str, dict[str, str]]] = {}
    for block in graph.blocks:
        own = splits[block.name] = {}
        for operator in block.operators:
            own[operator.name] = {"x": "batch"} if "batch" in operator.dims else {}
        for tensor in block.tensors:
            key = f"{tensor.name}@rest" if tensor.name in own else tensor.name
            if tensor.role is Role.ACTIVATION:
                own[key] = {"x": "batch"} if "batch" in tensor.dims else {}
            elif tensor.role is Role.PARAMETER:
                own[key] = {}
    strategy = placed_strategy(graph, MESH[:1], splits, workload)
    step = step_of(graph, strategy, workload)
    panels = panels_of(graph, strategy, workload, step=step)
    assert [found.block for found in panels] == [block.name for block in graph.blocks]
    compute_s = sum(found.count * found.compute_s for found in panels)
    communication_s = sum(found.count * found.communication_s for found in panels)
    assert compute_s == pytest.approx(step.time["compute"], rel=1e-12)
    assert communication_s == pytest.approx(step.time["exposed_x"], rel=1e-12)


def test_dims_have_one_colour_in_all_panels() -> None:
    assert dims_of([panel()]) == ("batch", "h")
    other = panels_of(
        GRAPH, placed_strategy(GRAPH, MESH, {"net": {**SPLITS["net"], "up": {"y": "i"}}}, WORKLOAD), WORKLOAD
    )
    assert dims_of([panel(), *other]) == ("batch", "h", "i")


def test_stages_of_their_own_have_panels_of_their_own() -> None:
    segments = (Segment(("layer",), 3),)
    tiny = load_model("llama-tiny")
    graph = replace(tiny, blocks=(tiny.block["layer"],), segments=segments, tied=())
    cut_seq, cut_batch = ({"layer": {"q": {"x": dim}}} for dim in ("seq", "batch"))
    stages = tuple(
        Stage(rank, (BlockRange(rank, rank + 1),), (MeshAxis("x", 2),), splits)
        for rank, splits in enumerate((cut_seq, cut_batch, cut_seq))
    )
    base = placed_strategy(graph, (), {}, Workload(8, 64))
    strategy = replace(base, mesh=(MeshAxis("pp", 3),), stages=stages)
    panels = panels_of(graph, strategy, Workload(8, 64), title="alpa")
    assert [found.title for found in panels] == ["alpa, stages 0, 2", "alpa, stage 1"]
    shapes = [next(row for row in found.rows if row.operator == "q").makes[0].local_shape[:2] for found in panels]
    assert shapes == [(8, 32), (4, 64)]


def test_shorthands_have_panels_too() -> None:
    # 2 sequences for each of 4 data-parallel ranks: 8 in all, of which a rank has 2.
    graph = load_model("llama-tiny")
    strategy = expand(parse_shorthand("tp=2,dp=4,mbs=2"), graph)
    panels = {found.block: found for found in panels_of(graph, strategy, Workload(8, 64))}
    gate = next(row for row in panels["layer"].rows if row.operator == "gate")
    assert gate.makes[0].local_shape == (2, 64, graph.dims["ffn"] // 2)
    assert not panels["layer"].is_priced


# --- the page ---------------------------------------------------------------------------------------------------------


def test_a_page_has_a_column_for_each_plan_and_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plans.html"
    panels = [panel(notes=("1 < 2",)), replace(panel(), title="again")]
    placement_figure(panels, path, title="two plans", command="meshwright plan <x>")
    text = path.read_text()
    assert text == placement_page(panels, title="two plans", command="meshwright plan <x>")
    assert text.count("<td>") == 2 * (4 + 1)  # operators, at rest; nothing is moved for the update here
    assert "double&lt;b&gt;" in text
    assert "1 &lt; 2" in text
    assert "meshwright plan &lt;x&gt;" in text
    assert not re.search(r"<script|https?:|src=|@import|url\(", text)
    assert 'name="viewport"' in text
    assert "fwd: reduce-scatter of y over y, 768 B" in text
    assert "<i>y</i> S(h)</span>" in text
    assert "<i>y</i> P</span>" in text


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    other = replace(panel(), title="other", rows=panel().rows[:2])
    with pytest.raises(InputError) as caught:
        placement_figure([panel(), other], tmp_path / "plans.png")
    told = [str(problem) for problem in caught.value.problems]
    assert any("placement of other = net: must have the operators of" in each for each in told)
    assert any("a figure is an .html file" in each for each in told)
    with pytest.raises(InputError, match="there is no plan to draw"):
        placement_figure([], tmp_path / "plans.html")


# --- the terminal -----------------------------------------------------------------------------------------------------


def printed(width: int, step: PlacedStep | None, graph: Graph = GRAPH, strategy: Strategy = STRATEGY) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(placement_text(graph, strategy, WORKLOAD, width, step))
    return out.getvalue()


@pytest.mark.parametrize("width", [32, 50, 80, 100, 160])
@pytest.mark.parametrize("step", [None, STEP], ids=["shapes", "priced"])
def test_text_fits_the_terminal(width: int, step: PlacedStep | None) -> None:
    text = printed(width, step)
    assert max(map(len, text.splitlines())) <= width
    for word in ("up", "act", "down", "batch", "h", "at rest"):
        assert word in text
    assert ("reduce-scatter" in text.replace("\n", "")) == (step is not None) or width < 50


def test_neighbours_that_split_alike_share_a_row() -> None:
    lines = printed(100, None).splitlines()
    (row,) = (line for line in lines if "up, act, down" in line)
    assert re.search(r"batch +h +y: 4 x 128", row)
    assert any("at rest x:whole y:h: w, v" in line for line in lines)
    priced = printed(100, STEP)  # gradients are moved for up: it stands alone
    assert re.search(r"^ *up +batch +h +z: 4 x 256 +bwd all-reduce x ", priced, re.MULTILINE)


def test_long_blocks_are_cut_short() -> None:
    links = [Tensor(f"t{index}", ("batch", "o")) for index in range(61)]
    operators = tuple(
        Operator(f"f{index}", "scale", "batch o -> batch o", (f"t{index}",), (f"t{index + 1}",)) for index in range(60)
    )
    tensors = (replace(links[0], role=Role.INPUT), *links[1:])
    graph = Graph("long", {"o": 64}, (Block("net", tensors, operators),), (Segment(("net",)),))
    splits = {"net": {f"f{index}": {"x": "batch" if index % 2 else "o"} for index in range(60)}}
    strategy = placed_strategy(graph, MESH, splits, WORKLOAD)
    assert "... and 20 more rows" in printed(80, None, graph, strategy)
