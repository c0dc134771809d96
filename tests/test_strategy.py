"""Strategies: the shorthand and its errors, expansion and back, stages, and every rule of what is legal."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.graph import Graph, Segment
from meshwright.io import native
from meshwright.io.models import load_model
from meshwright.sharding import StatePlacement
from meshwright.strategy import (
    BlockRange,
    MeshAxis,
    Recompute,
    Shorthand,
    Stage,
    Strategy,
    divisors,
    expand,
    layers_per_stage,
    legal_strategy,
    nearest_divisor,
    parse_shorthand,
    shorthand_of,
    strategy_problems,
    uniform_stages,
)
from meshwright.workload import Workload


@cache
def model(name: str) -> Graph:
    return load_model(name)


# --- reading a shorthand ---------------------------------------------------------------------------------------------


def test_what_is_left_out_has_its_default() -> None:
    found = parse_shorthand("tp=8,pp=64,dp=6")
    assert found == Shorthand(tp=8, pp=64, dp=6)
    assert (found.mbs, found.vpp, found.zero, found.sp, found.cp, found.ep) == (1, 1, 0, 0, 1, 1)
    assert (found.recompute, found.schedule, found.num_devices) == (Recompute.NONE, "1F1B", 3072)


def test_the_whole_shorthand() -> None:
    text = "tp=8,pp=64,dp=6,cp=2,ep=1,mbs=1,vpp=2,schedule=Interleaved1F1B,zero=1,recompute=selective,sp=1,dp_shard=3"
    found = parse_shorthand(text)
    assert str(found) == text
    assert parse_shorthand(" tp = 8 , pp=64,dp=6,cp=2,vpp=2,schedule=Interleaved1F1B,zero=1 ").zero == 1
    assert found.num_devices == 8 * 64 * 6 * 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "strategy = '': each part is key=value (nearest: tp=2,pp=2,dp=1)"),
        ("tp", "strategy = 'tp': each part is key=value (nearest: tp=2,pp=2,dp=1)"),
        ("tp=", "strategy = 'tp=': each part is key=value (nearest: tp=2,pp=2,dp=1)"),
        ("=2", "strategy = '=2': each part is key=value (nearest: tp=2,pp=2,dp=1)"),
        ("tp==2", "strategy = 'tp==2': each part is key=value (nearest: tp=2,pp=2,dp=1)"),
        ("tp=2,,pp=2", "strategy = '': each part is key=value (nearest: tp=2,pp=2,dp=1)"),
        ("tp=1e3", "tp = 1e3: a whole number, at least 1 (nearest: tp=1)"),
        ("tp=0", "tp = 0: a whole number, at least 1 (nearest: tp=1)"),
        ("pp=-4", "pp = -4: a whole number, at least 1 (nearest: pp=1)"),
        ("tp=٢", "tp = ٢: a whole number, at least 1 (nearest: tp=1)"),
        ("mbs=2.0", "mbs = 2.0: a whole number, at least 1 (nearest: mbs=1)"),
        ("tp=2,tp=4", "tp = 4: given twice (before: 2) (nearest: tp=2)"),
        ("zero=9", "zero = 9: a whole number from 0 to 3 (nearest: zero=3)"),
        ("sp=2", "sp = 2: a whole number from 0 to 1 (nearest: sp=1)"),
        ("recompute=some", "recompute = some: known: none, selective, full (nearest: recompute=none)"),
        ("schedule=1f1b", "schedule = 1f1b: known: GPipe, 1F1B, Interleaved1F1B (nearest: schedule=1F1B)"),
        (
            "schedule=Interleavd1F1B",
            "schedule = Interleavd1F1B: known: GPipe, 1F1B, Interleaved1F1B (nearest: schedule=Interleaved1F1B)",
        ),
        (
            "tpp=2",
            "tpp = 2: not a key; keys: tp, pp, dp, cp, ep, mbs, vpp, schedule, zero, recompute, sp, dp_shard, "
            "etp (nearest: tp)",
        ),
        ("dp_shard=0", "dp_shard = 0: a whole number, at least 1 (nearest: dp_shard=1)"),
    ],
)
def test_errors_name_the_value_the_rule_and_the_nearest(text: str, error: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_shorthand(text)
    known = "known: GPipe, 1F1B, Interleaved1F1B"
    assert error.split(known)[0] in str(caught.value)  # more schedules may come
    assert error.split(" (nearest")[-1] in str(caught.value)


def test_all_errors_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse_shorthand("zero=9,recompute=some,tp=x,foo=1,pp=2,pp=3")
    assert [problem.where for problem in caught.value.problems] == ["foo", "pp", "zero", "recompute", "tp"]


@given(st.text(alphabet="tpdm=,0123 9eszro", max_size=20))
@settings(deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_shorthand(text)
    except InputError:
        return
    assert parse_shorthand(str(found)) == found


# --- there and back --------------------------------------------------------------------------------------------------


@st.composite
def legal(draw: st.DrawFn) -> tuple[str, Shorthand, Workload]:
    """A model, a legal shorthand in its canonical spelling, and a workload."""
    name = draw(st.sampled_from(["llama-tiny", "llama-3-8b", "gpt2"]))
    graph = model(name)
    tp = draw(st.sampled_from([t for t in (1, 2, 3, 4, 8, 16) if _divides_heads(graph, t)]))
    dp, cp, mbs, m = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 3, 4), (1, 2, 4), (1, 2, 3), (1, 2, 4, 8)))
    pp = draw(st.integers(1, min(7, len(graph.sequence))))
    schedule = draw(st.sampled_from(["GPipe", "1F1B", "Interleaved1F1B"]))
    vpp = draw(st.integers(1, len(graph.sequence) // pp)) if schedule == "Interleaved1F1B" else 1
    zero = draw(st.integers(0, 3))
    shard = draw(st.sampled_from([0, *(d for d in divisors(dp) if d < dp)])) if zero else 0
    sp = draw(st.integers(0, 1)) if tp > 1 else 0
    shorthand = Shorthand(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        mbs=mbs,
        vpp=vpp,
        schedule=schedule,
        zero=zero,
        recompute=draw(st.sampled_from(list(Recompute))),
        sp=sp,
        dp_shard=shard,
    )
    workload = Workload(dp * mbs * m, 192)
    assume(not strategy_problems(expand(shorthand, graph), graph, shorthand.num_devices, workload))
    return name, shorthand, workload


def _divides_heads(graph: Graph, tp: int) -> bool:
    kv, heads = graph.dims["kv_heads"], graph.dims["kv_heads"] * graph.dims["group"]
    return heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)


@given(legal())
@settings(max_examples=60, deadline=None)
def test_expansion_and_back(case: tuple[str, Shorthand, Workload]) -> None:
    name, shorthand, workload = case
    strategy = expand(shorthand, model(name))
    assert shorthand_of(strategy, model(name)) == shorthand
    assert strategy.num_devices == shorthand.num_devices
    assert strategy.virtual_stages == shorthand.vpp
    assert strategy.num_microbatches(workload) * shorthand.dp * shorthand.mbs == workload.global_batch
    assert all(axis.size > 1 for axis in strategy.mesh)
    assert legal_strategy(shorthand, model(name), shorthand.num_devices, workload) == strategy


@given(legal())
@settings(max_examples=15, deadline=None)
def test_a_file_says_the_same(case: tuple[str, Shorthand, Workload]) -> None:
    name, shorthand, _ = case
    strategy = expand(shorthand, model(name))
    text = native.dumps(strategy)
    read = native.loads(text, "strategy")
    assert read == strategy
    assert native.dumps(read) == text


def test_other_spellings_of_one_strategy() -> None:
    graph = model("llama-tiny")
    for other, canonical in [
        ("tp=1,sp=1,dp=2", "dp=2"),  # one rank has no sequence to share
        ("dp=4,zero=1,dp_shard=4", "dp=4,zero=1"),
    ]:
        strategy = expand(parse_shorthand(other), graph)
        assert strategy == expand(parse_shorthand(canonical), graph)
        assert shorthand_of(strategy, graph) == parse_shorthand(canonical)


def test_what_no_shorthand_says() -> None:
    graph = model("llama-tiny")
    strategy = expand(parse_shorthand("tp=2,pp=2,dp=2,zero=1"), graph)
    for odd in (
        dataclasses.replace(strategy, recompute={**strategy.recompute, "head": Recompute.FULL}),
        dataclasses.replace(strategy, state=StatePlacement(("dp_shard",), gradient=True)),
        dataclasses.replace(strategy, mesh=strategy.mesh[::-1]),
        dataclasses.replace(
            strategy, stages=(Stage(0, (BlockRange(0, 2),)), Stage(1, (BlockRange(2, 6),)))
        ),  # two and four blocks
        dataclasses.replace(strategy, stages=()),
        dataclasses.replace(strategy, microbatch=0),
        dataclasses.replace(strategy, mesh=(MeshAxis("pp", 0),)),
    ):
        assert shorthand_of(odd, graph) is None


def test_the_mesh() -> None:
    # dp_replicate outside dp_shard, tensor parallelism innermost; key/value heads copied where there are more ranks.
    strategy = expand(parse_shorthand("tp=16,pp=2,dp=8,cp=2,zero=3,dp_shard=4"), model("llama-3-8b"))
    assert list(strategy.degrees.items()) == [
        ("pp", 2),
        ("dp_replicate", 2),
        ("dp_shard", 4),
        ("cp", 2),
        ("tp_kv", 8),
        ("tp_group", 2),
    ]
    assert strategy.state == StatePlacement(("dp_shard", "cp"), parameter=True, gradient=True, optimizer=True)


def test_recomputation_is_of_layers() -> None:
    strategy = expand(parse_shorthand("recompute=full"), model("llama-tiny"))
    assert strategy.recompute == {"embedding": Recompute.NONE, "layer": Recompute.FULL, "head": Recompute.NONE}
    layers = dataclasses.replace(model("llama-tiny"), segments=(Segment(("layer",), 4),))
    assert expand(parse_shorthand("recompute=full"), layers).recompute["layer"] is Recompute.FULL


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (8, 4, (2, 2, 2, 2)),
        (9, 4, (2, 3, 2, 2)),
        (10, 4, (2, 3, 3, 2)),
        (11, 4, (3, 3, 3, 2)),  # the last never gets one of the rest: it has the head
        (4, 6, (0, 1, 1, 1, 1, 0)),
        (4, 5, (1, 1, 1, 1, 0)),
        (3, 2, (2, 1)),
        (5, 1, (5,)),
    ],
)
def test_layers_per_stage_by_hand(layers: int, stages: int, expected: tuple[int, ...]) -> None:
    assert layers_per_stage(layers, stages) == expected


@given(st.integers(1, 200), st.integers(1, 64))
def test_layers_per_stage(layers: int, stages: int) -> None:
    assume(stages <= layers + 2)
    counts = layers_per_stage(layers, stages)
    assert sum(counts) == layers
    assert len(counts) == stages
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == layers // stages
    assert all(count > 0 for count in counts[1:-1]), "only embedding and head may be stages of their own"


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (3, 1), (2, 3), (6, 1), (1, 6)])
def test_stages_hold_every_block_once(pp: int, vpp: int) -> None:
    stages = uniform_stages(model("llama-tiny"), pp, vpp)
    assert [index for stage in stages for part in stage.blocks for index in range(part.start, part.stop)] == list(
        range(6)
    )
    assert [stage.pipeline_rank for stage in stages] == [index % pp for index in range(pp * vpp)]


@pytest.mark.parametrize(("number", "wanted", "nearest"), [(64, 3, 2), (12, 5, 4), (7, 3, 1), (12, 100, 12), (1, 5, 1)])
def test_nearest_divisor(number: int, wanted: int, nearest: int) -> None:
    assert nearest_divisor(number, wanted) == nearest


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == tuple(candidate for candidate in range(1, number + 1) if number % candidate == 0)


# --- what is legal ---------------------------------------------------------------------------------------------------


def check(text: str, name: str, *, devices: int, batch: int = 8, seq: int = 64) -> list[str]:
    try:
        legal_strategy(parse_shorthand(text), model(name), devices, Workload(batch, seq))
    except InputError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("text", "name", "devices", "batch"),
    [
        ("tp=16", "llama-3-8b", 16, 8),  # 8 key/value heads, copied twice
        ("tp=32,sp=1", "llama-3-8b", 32, 8),  # every query head its own rank
        ("tp=4", "llama-tiny", 4, 8),  # 2 key/value heads on 4 ranks
        ("tp=4", "gpt2", 4, 8),  # a vocabulary of 50257
        ("tp=12", "gpt2", 12, 8),
        ("pp=3", "llama-tiny", 3, 8),  # 4 layers on 3 stages
        ("pp=5", "llama-tiny", 5, 8),
        ("pp=6", "llama-tiny", 6, 8),  # embedding and head alone: L + 2
        ("pp=2,vpp=3,schedule=Interleaved1F1B", "llama-tiny", 2, 8),
        ("pp=4,schedule=GPipe", "llama-tiny", 4, 2),  # fewer microbatches than stages
        ("pp=4", "llama-tiny", 4, 1),
        ("pp=3,vpp=2,schedule=Interleaved1F1B", "llama-tiny", 3, 2),  # one round
        ("pp=3,vpp=2,schedule=Interleaved1F1B", "llama-tiny", 3, 8),  # two rounds of four: PyTorch's rule
        ("dp=8,zero=3,dp_shard=4", "llama-tiny", 8, 16),
        ("dp=6,mbs=2", "llama-tiny", 6, 12),
        ("cp=8", "llama-tiny", 8, 1),
        ("cp=4,tp=2,sp=1,zero=2", "llama-tiny", 8, 1),
    ],
)
def test_legal(text: str, name: str, devices: int, batch: int) -> None:
    assert check(text, name, devices=devices, batch=batch) == []


@pytest.mark.parametrize(
    ("text", "name", "devices", "batch", "seq", "expected"),
    [
        ("tp=2", "llama-tiny", 8, 8, 64, ["strategy = tp = 2: must be the cluster's 8 devices (nearest: dp=4)"]),
        ("tp=2,pp=3", "llama-tiny", 8, 8, 64, ["strategy = tp*pp = 6: must be the cluster's 8 devices"]),
        (
            "tp=3",
            "llama-tiny",
            3,
            8,
            64,
            [
                "tp = 3: must divide the 4 heads, and divide or be a multiple of the 2 key/value heads (nearest: tp=2)",
                "tp = 3: must divide the MLP's inner size = 128 (nearest: tp=2)",
            ],
        ),
        (
            "tp=8",
            "llama-tiny",
            8,
            8,
            64,
            ["tp = 8: must divide the 4 heads, and divide or be a multiple of the 2 key/value heads (nearest: tp=4)"],
        ),
        ("dp=8", "llama-tiny", 8, 12, 64, ["dp = 8: must divide the global batch of 12 (nearest: dp=6)"]),
        ("dp=2,mbs=4", "llama-tiny", 2, 12, 64, ["mbs = 4: must divide the 6 sequences of a rank (nearest: mbs=3)"]),
        (
            "pp=7",
            "llama-tiny",
            7,
            8,
            64,
            ["pp*vpp = 7: at most 6 stages: 4 layers, and embedding and head may be stages of their own (nearest: 6)"],
        ),
        (
            "pp=3,vpp=3,schedule=Interleaved1F1B",
            "llama-tiny",
            3,
            9,
            64,
            ["pp*vpp = 9: at most 6 stages: 4 layers, and embedding and head may be stages of their own (nearest: 6)"],
        ),
        (
            "pp=3,vpp=2,schedule=Interleaved1F1B",
            "llama-tiny",
            3,
            7,
            64,
            [
                "num_microbatches = 7: Interleaved1F1B with pp=3 runs max(1, 7 // 3) = 2 rounds, which must divide it "
                "(nearest: num_microbatches=6 or num_microbatches=8)"
            ],
        ),
        ("dp=8,dp_shard=2", "llama-tiny", 8, 8, 64, ["dp_shard = 2: shards nothing with zero=0 (nearest: zero=1)"]),
        ("dp=8,dp_shard=3,zero=1", "llama-tiny", 8, 8, 64, ["dp_shard = 3: must divide dp=8 (nearest: dp_shard=2)"]),
        ("dp=8,dp_shard=16,zero=1", "llama-tiny", 8, 8, 64, ["dp_shard = 16: must divide dp=8 (nearest: dp_shard=8)"]),
        ("cp=8", "llama-tiny", 8, 8, 12, ["cp = 8: must divide the sequence = 12 (nearest: cp=6)"]),
        ("tp=2,sp=1", "llama-tiny", 2, 8, 63, ["tp = 2: must divide the sequence = 63 (nearest: tp=1)"]),
        ("tp=1", "gpt2", 1, 8, 1025, ["seq_len = 1025: gpt2 has 1024 positions (nearest: 1024)"]),
        (
            # four faults, all said
            "pp=9,dp=3,dp_shard=2",
            "llama-tiny",
            8,
            8,
            64,
            [
                "strategy = pp*dp = 27: must be the cluster's 8 devices",
                "dp_shard = 2: shards nothing with zero=0 (nearest: zero=1)",
                "pp*vpp = 9: at most 6 stages: 4 layers, and embedding and head may be stages of their own "
                "(nearest: 6)",
                "dp = 3: must divide the global batch of 8 (nearest: dp=2)",
            ],
        ),
    ],
)
def test_not_legal(text: str, name: str, devices: int, batch: int, seq: int, expected: list[str]) -> None:
    assert check(text, name, devices=devices, batch=batch, seq=seq) == expected


def test_one_stage_per_rank_elsewhere() -> None:
    (problem,) = check("pp=2,vpp=2", "llama-tiny", devices=2)
    assert problem.startswith("vpp = 2: 1F1B has one stage per rank; several are for ")
    assert problem.endswith("(nearest: vpp=1)")


# --- what only a file can say wrongly --------------------------------------------------------------------------------

GOOD = "tp=2,pp=2,dp=2,zero=1"


def with_split(strategy: Strategy, block: str, name: str, split: dict[str, str] | None) -> Strategy:
    splits = {key: dict(value) for key, value in strategy.splits.items()}
    if split is None:
        del splits[block][name]
    else:
        splits[block][name] = split
    return dataclasses.replace(strategy, splits=splits)


def with_stages(strategy: Strategy, *stages: tuple[int, int, int]) -> Strategy:
    parts = tuple(Stage(rank, (BlockRange(start, stop),)) for rank, start, stop in stages)
    return dataclasses.replace(strategy, stages=parts)


FILES: dict[str, tuple[Any, list[str]]] = {
    "a block on no stage": (
        lambda s: with_stages(s, (0, 0, 3), (1, 4, 6)),
        ["stages = blocks [3]: every block is on exactly one stage"],
    ),
    "a block on two stages": (
        lambda s: with_stages(s, (0, 0, 4), (1, 3, 6)),
        ["stages = blocks [3]: every block is on exactly one stage"],
    ),
    "a block that is not there": (
        lambda s: with_stages(s, (0, 0, 3), (1, 3, 7)),
        [
            "stages[1].blocks = 3-7: a range within 0 to 6",
            "stages = blocks [3, 4, 5]: every block is on exactly one stage",
        ],
    ),
    "two stages on one rank": (
        lambda s: with_stages(s, (0, 0, 3), (0, 3, 6)),
        ["stages = [2, 0]: every pipeline rank has the same number of stages"],
    ),
    "a rank that is not there": (
        lambda s: with_stages(s, (0, 0, 3), (2, 3, 6)),
        [
            "stages[1].pipeline_rank = 2: 0 to 1",
            "stages = [1, 0]: every pipeline rank has the same number of stages",
        ],
    ),
    "an operator without a split": (
        lambda s: with_split(s, "layer", "gate", None),
        ["splits.layer = gate: its split is missing"],
    ),
    "an operator that is not there": (
        lambda s: with_split(s, "layer", "gait", {}),
        ["splits.layer = gait: no such operator in the block (nearest: gate)"],
    ),
    "a block that the model lacks": (
        lambda s: dataclasses.replace(s, splits={**s.splits, "lair": {}}),
        ["splits = lair: no such block (nearest: layer)"],
    ),
    "an axis that the mesh lacks": (
        lambda s: with_split(s, "layer", "gate", {"zp": "ffn"}),
        ["splits.layer.gate = zp: no such mesh axis; axes: pp, dp_shard, tp (nearest: tp)"],
    ),
    "a dim that may not be split": (
        lambda s: with_split(s, "layer", "attention", {"tp": "kv_seq"}),
        ["splits.layer.attention = tp: kv_seq: dims that may be split: batch, seq, kv_heads, group"],
    ),
    "a dim that the operator lacks": (
        lambda s: with_split(s, "layer", "gate", {"tp": "vocab"}),
        ["splits.layer.gate = tp: vocab: dims that may be split: batch, seq, hidden, ffn"],
    ),
    "a dim that the block's input lacks": (
        lambda s: with_split(s, "layer", "x", {"tp": "width"}),
        ["splits.layer.x = tp: width: dims that may be split: batch, seq, hidden"],
    ),
    "an axis of no size": (
        lambda s: dataclasses.replace(s, mesh=(*s.mesh[:2], MeshAxis("tp", 0))),
        ["mesh.tp = 0: must be at least 1 (nearest: 1)"],
    ),
    "an axis twice": (
        lambda s: dataclasses.replace(s, mesh=(*s.mesh, MeshAxis("tp", 2))),
        ["mesh = tp: an axis is named once"],
    ),
    "no microbatch": (
        lambda s: dataclasses.replace(s, microbatch=0),
        ["microbatch = 0: must be at least 1 (nearest: 1)"],
    ),
    "too few devices": (
        lambda s: dataclasses.replace(s, mesh=(MeshAxis("pp", 2), MeshAxis("dp_shard", 2), MeshAxis("tp", 1))),
        ["mesh = pp=2 x dp_shard=2 x tp=1: must be the cluster's 8 devices"],
    ),
    "recomputation of nothing": (
        lambda s: dataclasses.replace(s, recompute={"layer": Recompute.FULL, "lair": Recompute.FULL}),
        [
            "recompute = embedding: its choice is missing",
            "recompute = head: its choice is missing",
            "recompute = lair: no such block (nearest: layer)",
        ],
    ),
    "state along no axis": (
        lambda s: dataclasses.replace(s, state=StatePlacement(("dp_sharp",), optimizer=True)),
        ["state.axes = dp_sharp: no such mesh axis; axes: pp, dp_shard, tp (nearest: dp_shard)"],
    ),
    "state along an axis that has no copies": (
        lambda s: dataclasses.replace(s, state=StatePlacement(("tp",), optimizer=True)),
        ["state.axes = tp: splits parameters, so it holds no copies whose state could be sharded"],
    ),
    "an unknown schedule": (
        lambda s: dataclasses.replace(s, schedule="1F1C"),
        ["schedule = 1F1C: known: "],
    ),
    "two faults": (
        lambda s: dataclasses.replace(with_stages(s, (0, 0, 3), (1, 4, 6)), microbatch=3),
        [
            "mbs = 3: must divide the 4 sequences of a rank (nearest: mbs=2)",
            "stages = blocks [3]: every block is on exactly one stage",
        ],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_faults_of_files(case: str) -> None:
    change, expected = FILES[case]
    graph = model("llama-tiny")
    wrong = change(expand(parse_shorthand(GOOD), graph))
    found = [str(problem) for problem in strategy_problems(wrong, graph, 8, Workload(8, 64))]
    assert len(found) == len(expected), found
    for text, problem in zip(expected, found, strict=True):
        assert problem.startswith(text)


def test_the_good_file_is_good() -> None:
    graph = model("llama-tiny")
    assert strategy_problems(expand(parse_shorthand(GOOD), graph), graph, 8, Workload(8, 64)) == []
