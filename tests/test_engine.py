"""Engines: what their files say and borrow, and what their habits do to time and memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers import meshwright
from meshwright.cluster import Cluster, preset_cluster
from meshwright.cost.analytic import estimate
from meshwright.engine import Crossing, Engine, Footprint, engine_names, engine_problems, load_engine
from meshwright.io.models import load_model
from meshwright.results import Estimate
from meshwright.strategy import expand, parse_shorthand
from meshwright.workload import Workload


def predict(engine: Engine, text: str, cluster: Cluster | str = "dgx-h100x2", precision: str = "bfloat16") -> Estimate:
    graph = load_model("llama-3-8b")
    where = preset_cluster(cluster) if isinstance(cluster, str) else cluster
    products = "float8" if precision == "fp8" else ""
    workload = Workload(64, 2048, "bfloat16", product_precision=products)
    return estimate(graph, where, expand(parse_shorthand(text), graph), workload, engine)


def plain(**changes: object) -> Engine:
    """The generic engine without habits, but for some."""
    return dataclasses.replace(load_engine("unknown"), memory=Footprint(), crossing=Crossing(), **changes)  # type: ignore[arg-type]


def holding(**changes: float) -> Engine:
    return dataclasses.replace(plain(), memory=Footprint(**changes))  # type: ignore[arg-type]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", engine_names())
def test_every_engine_is_sound_and_says_where_its_numbers_are_from(name: str) -> None:
    engine = load_engine(name)
    assert engine_problems(engine) == []
    assert engine.sources
    for what, source in engine.sources.items():
        assert hasattr(engine, what), what
        assert source.startswith(("[spec", "[fit", "[derived]", "[measured]", "[borrowed")), source


@pytest.mark.parametrize(
    ("name", "kin"), [("torchtitan", "pytorch-fsdp"), ("modellink", "megatron-core"), ("maxtext", "unknown")]
)
def test_an_engine_without_runs_borrows_and_says_so(name: str, kin: str) -> None:
    own, other = load_engine(name), load_engine(kin)
    assert own.like == kin
    assert own.loss_passes == other.loss_passes
    assert own.sources["loss_passes"].startswith(f"[borrowed: {kin}] ")
    assert own.defaults != other.defaults


def test_an_engine_file_of_version_1_is_read(tmp_path: Path) -> None:
    old = dataclasses.asdict(load_engine("alpa"))
    old["fused_kinds"] = list(old["fused_kinds"])
    del old["memory"]
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"schema": "engine/1", **old, "reserved_bytes": 3 * 2**30}))
    words = ("llama-3-8b", "dgx-h100x1", "dp=8,zero=1", "--global-batch", "8", "--seq-len", "512", "--json")
    found = meshwright("estimate", *words, "--engine", path).json
    assert found["memory"]["reserved"] == 3 * 2**30


def test_gradients_may_be_kept_by_precision() -> None:
    engine = load_engine("megatron-deepspeed")
    assert engine.gradient_type("float16") == "compute"
    assert engine.gradient_type("bfloat16") == "float32"


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_and_reserved_by_hand() -> None:
    before, after = (
        predict(holding(), "pp=4,dp=4"),
        predict(holding(kept_factor=1.5, reserved_bytes=2.0**30), "pp=4,dp=4"),
    )
    # Layers keep half as much again; the head, of which one microbatch is in flight, is on the last rank.
    assert after.memory["activations"] == pytest.approx(1.5 * before.memory["activations"], rel=1e-12)
    assert after.memory["reserved"] - before.memory["reserved"] == 2**30


def test_gaps_between_freed_activations() -> None:
    for text, more in (("pp=4,dp=4", 0.5 / 4), ("pp=2,dp=8", 0.0)):  # the first of p ranks holds p microbatches
        before, after = predict(holding(), text), predict(holding(gaps=0.5), text)
        assert after.memory["activations"] == pytest.approx((1 + more) * before.memory["activations"], rel=1e-12)


def test_a_gradient_copy_is_one_more_in_the_type_of_the_computation() -> None:
    before = predict(holding(), "dp=16").memory["gradients"]
    copied = dataclasses.replace(holding(), memory=Footprint(gradient_copy=True))
    assert predict(copied, "dp=16").memory["gradients"] == pytest.approx(before * (4 + 2) / 4, rel=1e-12)


def test_the_update_needs_memory_when_passes_do_not() -> None:
    small = predict(holding(update_bytes=1.0), "dp=16,zero=1")
    assert small.memory["update"] == 0
    large = predict(holding(update_bytes=100.0), "dp=16,zero=1")
    assert large.memory["update"] == pytest.approx(100 * load_model("llama-3-8b").num_parameters, rel=1e-12)
    assert large.memory["activations"] == large.memory["working_set"] == 0  # not at that moment
    assert "update" not in predict(holding(), "dp=16,zero=1").memory
    assert predict(holding(update_bytes=100.0), "dp=16").memory["update"] == 0  # nothing sharded, nothing gathered


def test_a_host_that_runs_ahead_holds_gathered_copies_of_some_blocks() -> None:
    text = "tp=8,dp=2,sp=1,zero=1"
    some, more = (predict(holding(run_ahead_blocks=blocks), text).memory["run_ahead"] for blocks in (1, 4))
    assert more == pytest.approx(4 * some, rel=1e-12)
    assert predict(holding(run_ahead_blocks=1000), text).memory["run_ahead"] == pytest.approx(34 * some, rel=1e-12)


def test_under_pressure_copies_are_given_back_at_a_price() -> None:
    text = "tp=8,dp=2,sp=1,zero=1"
    roomy = holding(run_ahead_blocks=1000, retry_s_per_byte=1e-10)
    free = predict(roomy, text)
    assert free.time["reallocation"] == 0
    assert free.warnings == ()
    share = 0.99 * free.peak_memory_bytes / preset_cluster("dgx-h100x2").slowest_device.memory_bytes.value
    pressed = predict(dataclasses.replace(roomy, memory=dataclasses.replace(roomy.memory, pressed_at=share)), text)
    assert pressed.memory["run_ahead"] == 0
    assert pressed.peak_memory_bytes < free.peak_memory_bytes
    num_microbatches = 64 / 2
    beyond = 0.01 * free.peak_memory_bytes
    assert pressed.time["reallocation"] == pytest.approx(num_microbatches * 1e-10 * beyond, rel=1e-9)
    assert pressed.step_time_s > free.step_time_s
    (warning,) = pressed.warnings
    assert warning.startswith("memory pressure: ")


def test_products_of_a_smaller_type_keep_smaller_inputs() -> None:
    plain_bytes, small = (
        predict(plain(), "tp=8,dp=2,sp=1", precision=precision).memory["activations"] for precision in ("bf16", "fp8")
    )
    assert 0.6 * plain_bytes < small < 0.9 * plain_bytes


# --- time -------------------------------------------------------------------------------------------------------------


def stalling(**changes: int) -> Engine:
    return dataclasses.replace(plain(), crossing=Crossing(stall_s=0.25, **changes))


@pytest.mark.parametrize(
    ("changes", "text", "stalled"),
    [
        ({"stall_nodes": 2, "stall_group": 99, "stall_microbatches": 999}, "pp=2,dp=8", True),
        ({"stall_nodes": 3, "stall_group": 99, "stall_microbatches": 999}, "pp=2,dp=8", False),
        ({"stall_nodes": 99, "stall_group": 8, "stall_microbatches": 999}, "tp=8,pp=2", True),
        ({"stall_nodes": 99, "stall_group": 8, "stall_microbatches": 999}, "tp=4,pp=2,dp=2", False),
        ({"stall_nodes": 99, "stall_group": 99, "stall_microbatches": 8}, "pp=2,dp=8", True),
        ({"stall_nodes": 99, "stall_group": 99, "stall_microbatches": 9}, "pp=2,dp=8", False),
        ({"stall_nodes": 99, "stall_group": 99, "stall_microbatches": 8}, "pp=2,dp=8,zero=1", False),
        ({"stall_nodes": 99, "stall_group": 99, "stall_microbatches": 4}, "pp=2,dp=8,mbs=2", False),
    ],
)
def test_messages_that_block(changes: dict[str, int], text: str, stalled: bool) -> None:
    found = predict(stalling(**changes), text)
    assert (found.time["stall"] > 0) == stalled == bool(found.warnings)
    if stalled:  # of two ranks each has one neighbour: forward and backward of each microbatch
        num_microbatches = 64 // parse_shorthand(text).dp
        assert found.time["stall"] == pytest.approx(2 * num_microbatches * 0.25, rel=1e-12)


def test_other_engines_have_neither_fault() -> None:
    for name in engine_names():
        if name != "nanotron":
            assert {"stall", "reallocation", "update", "run_ahead"}.isdisjoint(
                {**(found := predict(load_engine(name), "pp=2,dp=8,zero=1")).time, **found.memory}
            )
