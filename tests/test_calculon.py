"""Calculon's space: as many members as Calculon counts, the very same ones, priced in a grid as one by one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import meshwright
from meshwright.bench.calculon import PUBLISHED, mean_and_most, side_by_side, table
from meshwright.cluster import Cluster, preset_cluster
from meshwright.cost.layouts import Machine, machine_of, price_layouts
from meshwright.cost.stages import Members, rank_table
from meshwright.cost.step import evaluate, prepare
from meshwright.engine import Engine, load_engine
from meshwright.errors import InputError
from meshwright.graph import Graph
from meshwright.io.models import load_model
from meshwright.search.calculon import CalculonSpace, fits_networks, network_reason, tiled_share
from meshwright.search.evaluate import Evaluated, evaluate_space
from meshwright.search.exhaustive import ranked
from meshwright.search.method import METHODS, Question
from meshwright.search.space import KEYS, NO_LIMITS, OBSTACLES, Limits, limit_problems, limits_of
from meshwright.sharding import Phase, lay_out
from meshwright.strategy import Recompute, Shorthand, expand, legal_strategy, parse_shorthand, strategy_problems
from meshwright.workload import Workload

#: Calculon's models by our presets: hidden, heads, blocks.
MODELS = {
    "megatron-22b": (6144, 64, 48),
    "gpt3-175b": (12288, 96, 96),
    "mt-nlg-530b": (20480, 128, 105),
    "megatron-1t": (25600, 160, 128),
}

#: What Calculon (caa4b11) counts, `llm-optimal-execution -d` on `a100_80g`: model, processors, batch, members with the
#: stock 512 GiB of second-tier memory and without.
SIZES = [
    ("megatron-22b", 8, 4, 193_496, 28_006),
    ("megatron-22b", 64, 64, 2_393_240, 346_390),
    ("megatron-22b", 512, 512, 5_319_392, 769_912),
    ("gpt3-175b", 64, 64, 3_232_128, 467_808),
    ("gpt3-175b", 512, 512, 6_582_816, 952_776),
    ("gpt3-175b", 1024, 1536, 11_698_528, 1_693_208),
    ("gpt3-175b", 4096, 4096, 7_126_368, 1_031_448),
    ("mt-nlg-530b", 280, 280, 1_434_272, 207_592),
    ("mt-nlg-530b", 2240, 2240, 4_498_592, 651_112),
    ("megatron-1t", 512, 512, 5_882_400, 851_400),
    ("megatron-1t", 3072, 3072, 7_002_336, 1_013_496),
    ("megatron-1t", 4096, 4096, 7_276_848, 1_053_228),
    ("mt-nlg-530b", 5128, 2520, 10_944, 1_584),
]

CALCULON_175B = ("gpt3-175b", "dgx-a100x128", "--space", "calculon", "--global-batch", 1536, "--seq-len", 2048)
SMALL = ("megatron-22b", "dgx-a100x8", "--space", "calculon", "--global-batch", 64, "--seq-len", 2048)


@cache
def model(name: str) -> Graph:
    return load_model(name)


def space_of(
    name: str, num_devices: int, batch: int, limits: Limits = NO_LIMITS, *, tier2: bool = False, seq_len: int = 2048
) -> CalculonSpace:
    return CalculonSpace(model(name), num_devices, Workload(batch, seq_len), limits, tier2=tier2)


def cluster_of(space: CalculonSpace) -> Cluster:
    return preset_cluster(f"dgx-a100x{space.num_devices // 8}")


@cache
def explored(name: str, num_devices: int, batch: int, engine: str = "megatron-core") -> tuple[CalculonSpace, Evaluated]:
    space = space_of(name, num_devices, batch)
    return space, evaluate_space(space, cluster_of(space), load_engine(engine))


# --- as many as Calculon counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_presets_have_calculons_dims(name: str) -> None:
    graph = model(name)
    assert (graph.dims["hidden"], graph.dims["kv_heads"] * graph.dims["group"], graph.num_layers) == MODELS[name]


@pytest.mark.parametrize("tier2", [True, False])
@pytest.mark.parametrize(("name", "num_devices", "batch", "with_tier2", "without"), SIZES)
def test_the_closed_form_counts_as_calculon(
    name: str, num_devices: int, batch: int, with_tier2: int, without: int, tier2: bool
) -> None:
    assert space_of(name, num_devices, batch, tier2=tier2).num_members() == (with_tier2 if tier2 else without)


@pytest.mark.parametrize("tier2", [True, False])
@pytest.mark.parametrize(("name", "num_devices", "batch", "with_tier2", "without"), SIZES)
def test_the_columns_are_as_long_as_calculon_counts(
    name: str, num_devices: int, batch: int, with_tier2: int, without: int, tier2: bool
) -> None:
    space = space_of(name, num_devices, batch, tier2=tier2)
    lengths = [{len(column) for column in columns.values()} for columns in enumerated(space)]
    assert sum(length for (length,) in lengths) == (with_tier2 if tier2 else without)


def enumerated(space: CalculonSpace) -> Iterator[Mapping[str, Any]]:
    """The columns of all members, a few rows of a part at a time."""
    for part in space.parts():
        for rows in np.array_split(np.arange(len(part.vpp)), max(1, len(part.vpp) // 64)):
            yield part.columns(rows)


@pytest.mark.parametrize(("row", "tier2"), [(0, True), (0, False), (1, False), (7, False), (12, True)])
def test_nothing_is_there_twice(row: int, tier2: bool) -> None:
    name, num_devices, batch, *_ = SIZES[row]
    parts = list(enumerated(space_of(name, num_devices, batch, tier2=tier2)))
    columns = np.stack([np.concatenate([part[key] for part in parts]) for key in parts[0]])
    assert np.unique(columns, axis=1).shape == columns.shape


def test_the_members_are_those_of_calculons_loops() -> None:
    space = space_of("megatron-22b", 8, 4)
    found = {
        tuple(named(space, columns, row).values()) for columns in enumerated(space) for row in range(len(columns["tp"]))
    }
    assert len(found) == 28_006
    assert found == set(calculons_loops(8, 4, *MODELS["megatron-22b"]))


def named(space: CalculonSpace, columns: Mapping[str, Any], row: int) -> dict[str, Any]:
    words = space.chosen(dict(columns), row)
    degrees = {key: int(columns[key][row]) for key in ("tp", "pp", "dp", "vpp", "mbs")}
    kind = list(Recompute)[int(columns["recompute"][row])].value
    return {**degrees, "recompute": kind, "sharded": bool(columns["zero"][row]), **words}


def calculons_loops(num_devices: int, batch: int, hidden: int, heads: int, blocks: int) -> Iterator[tuple[Any, ...]]:
    """Every execution that Calculon tries without a second tier of memory, in loops like its own."""

    def factors(number: int) -> list[int]:
        return [candidate for candidate in range(1, number + 1) if number % candidate == 0]

    def pick(condition: bool, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values if condition else values[-1:]

    kinds = ("full", "selective", "none")
    for t, p in product(factors(num_devices), factors(blocks)):
        if hidden % t or heads % t or num_devices % (t * p) or num_devices // (t * p) > batch:
            continue
        d = num_devices // (t * p)
        whole = batch // d * d
        for v, b, kind, sharded, comm, together in product(
            factors(blocks // p) if p > 1 else [1],
            [size for size in factors(whole // d) if size * 2048 % t == 0],
            kinds,
            pick(d > 1, (True, False)),
            ("ar", "p2p_rs_ag", "rs_ag"),
            pick(d > 1, (True, False)),
        ):
            for redo, overlap, *nets in product(
                pick(comm == "rs_ag" and kind != "full", (True, False)),
                pick(t > 1, ("ring", "pipe", "none")),
                *(pick(degree > 1, (1, 0)) for degree in (t, p, d)),
            ):
                yield (t, p, d, v, b, kind, sharded, whole, comm, redo, overlap, together, *nets)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_devices", "batch", "infeasible"),
    [
        # What Calculon's own search refused for its networks, of exhaustive runs on stock a100_80g without offload.
        ("megatron-22b", 64, 64, 147_807),
        ("gpt3-175b", 64, 64, 199_782),
        ("mt-nlg-530b", 280, 280, 142_516),
        ("mt-nlg-530b", 2240, 2240, 520_916),
    ],
)
def test_networks_refuse_as_many_as_calculons(name: str, num_devices: int, batch: int, infeasible: int) -> None:
    _, evaluated = explored(name, num_devices, batch)
    assert evaluated.infeasible["network"] == infeasible
    assert sum(evaluated.infeasible.values()) + evaluated.feasible.sum() == evaluated.num_strategies


@pytest.mark.parametrize(
    ("degrees", "tiers", "fits"),
    [
        ((8, 4, 32), (0, 1, 1), True),
        ((8, 4, 32), (0, 0, 1), False),  # 32 ranks in a node of 8
        ((2, 4, 32), (0, 0, 1), True),
        ((8, 5, 7), (1, 0, 1), False),  # 5 of 8 leave 3 over
        ((8, 5, 7), (0, 1, 1), True),
        ((8, 1, 1), (1, 0, 0), True),
    ],
)
def test_what_fits_into_networks(degrees: tuple[int, ...], tiers: tuple[int, ...], fits: bool) -> None:
    roots = ("tp", "pp", "dp")
    named_degrees, named_tiers = dict(zip(roots, degrees, strict=True)), dict(zip(roots, tiers, strict=True))
    assert bool(fits_networks(named_degrees, named_tiers, 8, 2)) is fits
    assert bool(fits_networks(named_degrees, named_tiers, 8, 1)) is (fits and not any(tiers))


@pytest.mark.parametrize(
    ("degrees", "tiers", "num_levels", "reason"),
    [
        ((8, 4, 2), (0, 0, 1), 2, "tp=8 x pp=4 = 32 ranks on the inner network: must divide its 8"),
        ((1, 5, 7), (0, 0, 1), 2, "pp=5 = 5 ranks on the inner network: must divide its 8"),
        ((8, 2, 2), (0, 1, 1), 1, "pp=2, dp=2 on the outer network: this cluster has none"),
        ((8, 2, 2), (0, 1, 1), 2, ""),
    ],
)
def test_reasons_of_networks(degrees: tuple[int, ...], tiers: tuple[int, ...], num_levels: int, reason: str) -> None:
    roots = ("tp", "pp", "dp")
    sizes, places = dict(zip(roots, degrees, strict=True)), dict(zip(roots, tiers, strict=True))
    assert network_reason(sizes, places, 8, num_levels) == reason


@pytest.mark.parametrize(("name", "num_devices", "batch"), [("megatron-22b", 8, 4), ("mt-nlg-530b", 2240, 2240)])
def test_who_cannot_run_has_a_reason(name: str, num_devices: int, batch: int) -> None:
    space, evaluated = explored(name, num_devices, batch)
    words = {"": "", "network": "network", "schedule": "Interleaved1F1B", "division": "must divide the sequence"}
    for code, obstacle in enumerate(OBSTACLES):
        rows = np.flatnonzero(evaluated.obstacle == code)
        for row in random.Random(code).sample(rows.tolist(), min(50, len(rows))):
            reason = space.reason(cluster_of(space), evaluated.columns, row)
            assert bool(reason) == bool(obstacle)
            assert words[obstacle] in reason


def test_where_nothing_can_run_examples_say_why() -> None:
    words = (*SMALL[:-1], 2044, "--fix", "tp=8,sp=1", "--json")
    outcome = meshwright("plan", *words)
    assert outcome.code == 1
    assert (outcome.json["ranking"], outcome.json["space"]["num_feasible"]) == ([], 0)
    network, division = outcome.json["reasons"]
    assert "members cannot run (network), among them tp=8" in network
    assert "ranks on the inner network: must divide its 8" in network
    assert "members cannot run (division), among them tp=8" in division
    assert "must divide the sequence = 2044" in division


def test_a_machine_of_one_network_has_no_other() -> None:
    space, evaluated = explored("megatron-22b", 8, 4)
    assert len(cluster_of(space).levels) == 1
    outer = sum(evaluated.columns[f"{root}_net"] for root in ("tp", "pp", "dp")) > 0
    assert ((evaluated.obstacle == OBSTACLES.index("network")) == outer).all()


# --- legality and other obstacles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_devices", "batch"), [("megatron-22b", 64, 48), ("mt-nlg-530b", 2240, 2240)])
def test_what_has_no_obstacle_is_legal(name: str, num_devices: int, batch: int) -> None:
    space, evaluated = explored(name, num_devices, batch)
    schedule = OBSTACLES.index("schedule")
    for row in random.Random(0).sample(np.flatnonzero(evaluated.obstacle != 1).tolist(), 200):
        shorthand, whole = evaluated.shorthand(row), workload_of(space, evaluated, row)
        strategy = expand(shorthand, space.graph)
        problems = strategy_problems(strategy, space.graph, num_devices, whole)
        assert bool(problems) == (evaluated.obstacle[row] == schedule), problems
        assert strategy.num_microbatches(whole) * shorthand.dp * shorthand.mbs == whole.global_batch
        if not problems:
            assert legal_strategy(shorthand, space.graph, num_devices, whole) == strategy


def workload_of(space: CalculonSpace, evaluated: Evaluated, row: int) -> Workload:
    return replace(space.workload, global_batch=space.chosen(evaluated.columns, row)["batch"])


def test_microbatches_that_do_not_suit_the_schedule() -> None:
    _, evaluated = explored("mt-nlg-530b", 2240, 2240)
    rows = np.flatnonzero(evaluated.obstacle == OBSTACLES.index("schedule"))
    assert len(rows) == 3696
    assert (evaluated.columns["vpp"][rows] > 1).all()


def test_a_sequence_that_does_not_divide() -> None:
    # 2,044 = 4 x 511: microbatches of two sequences divide by 8, as Calculon wants, the sequence itself does not.
    space = space_of("megatron-22b", 64, 64, limits_of({"tp": 8}, {}), seq_len=2044)
    evaluated = evaluate_space(space, cluster_of(space), load_engine("megatron-core"))
    sequence_parallel = evaluated.columns["sp"] > 0
    assert (evaluated.columns["mbs"] % 2 == 0).all()
    assert (evaluated.obstacle[sequence_parallel] > 0).all()
    assert set(evaluated.obstacle[~sequence_parallel].tolist()) == {0, OBSTACLES.index("network")}
    assert "division" in evaluated.infeasible


# --- one formula for one member and for all --------------------------------------------------------------------------


def machine_alone(cluster: Cluster, engine: Engine, workload: Workload, tp: int, chosen: Mapping[str, Any]) -> Machine:
    """What the module's table says of one member, in plain numbers."""
    machine = machine_of(cluster, engine, workload)
    usage = {root: (0.15, 0.02)[chosen[f"{root}_net"]] for root in ("tp", "pp", "dp")}
    beside = usage["tp"] * (tp - 1) / tp
    tiled = {"none": 1.0, "ring": beside, "pipe": beside + 1 / tp}
    wires = (machine.levels[0], machine.levels[-1])
    return replace(
        machine,
        exposed={
            **machine.exposed,
            "tp": tiled[chosen["tp_overlap"]],
            "dp": usage["dp"] if chosen["dp_overlap"] else 1.0,
        },
        tiles=frozenset({"tp"}),
        networks={root: (wires[chosen[f"{root}_net"]],) for root in usage},
        slice_messages=chosen["tp_comm"] != "ar",
    )


def alone(
    space: CalculonSpace, engine: Engine, workload: Workload, shorthand: Shorthand, chosen: Mapping[str, Any]
) -> tuple[float, float]:
    """Seconds and bytes of one member that knows nothing of the others."""
    graph, strategy = space.graph, expand(shorthand, space.graph)
    keeps = chosen["tp_comm"] == "rs_ag" and not chosen["seq_par_ag_redo"] and shorthand.recompute is not Recompute.FULL
    layouts = {block.name: lay_out(block, strategy.splits[block.name], keep_gathered=keeps) for block in graph.blocks}
    machine = machine_alone(cluster_of(space), engine, workload, shorthand.tp, chosen)
    degrees = {axis: np.array([size]) for axis, size in ({"pp": 1} | strategy.degrees).items()}
    priced = price_layouts(graph, layouts, degrees, np.array([shorthand.mbs]), machine, workload)
    first = np.array([0])
    microbatches = np.array([strategy.num_microbatches(workload)])
    members = Members(strategy.schedule, first, first, np.array([shorthand.vpp]), microbatches)
    prepared = prepare(priced, [strategy.state], [strategy.recompute])
    found = evaluate(prepared, rank_table(graph, [strategy.stages]), members)
    return found.step_time_s.item(), found.peak_memory_bytes.item()


@pytest.mark.parametrize(
    ("name", "num_devices", "batch", "engine"),
    [
        ("megatron-22b", 8, 4, "megatron-core"),
        ("megatron-22b", 64, 48, "megatron-lm"),
        ("megatron-22b", 64, 64, "megatron-deepspeed"),
        ("mt-nlg-530b", 280, 280, "megatron-core"),
    ],
)
def test_a_member_alone_and_in_the_grid(name: str, num_devices: int, batch: int, engine: str) -> None:
    space, evaluated = explored(name, num_devices, batch, engine)
    for row in random.Random(1).sample(range(evaluated.num_strategies), 100):
        shorthand, chosen = evaluated.shorthand(row), space.chosen(evaluated.columns, row)
        found = alone(space, load_engine(engine), workload_of(space, evaluated, row), shorthand, chosen)
        expected = (evaluated.step_time_s[row], evaluated.peak_memory_bytes[row])
        assert found == pytest.approx(expected, rel=1e-12), (shorthand, chosen)


# --- what the choices do ---------------------------------------------------------------------------------------------


@cache
def neighbours() -> dict[tuple[Any, ...], tuple[float, float]]:
    """Seconds and bytes of all members of some degrees, by everything that was chosen."""
    limits = limits_of({"tp": 4, "pp": 2, "dp": 8, "mbs": 2, "vpp": 2}, {})
    space = space_of("megatron-22b", 64, 64, limits)
    evaluated = evaluate_space(space, cluster_of(space), load_engine("megatron-core"))
    assert evaluated.num_strategies == 11 * 4 * 3 * 8
    return {
        tuple(named(space, evaluated.columns, row).values())[5:]: (
            float(evaluated.step_time_s[row]),
            float(evaluated.peak_memory_bytes[row]),
        )
        for row in range(evaluated.num_strategies)
    }


#: The places of what can be chosen in the keys of `neighbours`.
RECOMPUTE, SHARDED, _, COMM, REDO, OVERLAP, TOGETHER, TP_NET, PP_NET, DP_NET = range(10)


@pytest.mark.parametrize(
    ("place", "better", "worse"),
    [
        (OVERLAP, "ring", "pipe"),
        (OVERLAP, "pipe", "none"),
        (TOGETHER, True, False),
        (TP_NET, 0, 1),
        (PP_NET, 0, 1),
        (DP_NET, 0, 1),
        (COMM, "p2p_rs_ag", "ar"),
        (RECOMPUTE, "none", "selective"),
        (RECOMPUTE, "selective", "full"),
    ],
)
def test_the_better_choice_is_never_slower(place: int, better: Any, worse: Any) -> None:
    seen = strictly = 0
    for key, (seconds, size) in neighbours().items():
        other = (*key[:place], worse, *key[place + 1 :])
        if key[place] == better and other in neighbours():
            seen += 1
            assert seconds <= neighbours()[other][0] * (1 + 1e-12), key
            strictly += seconds < neighbours()[other][0]
            assert place == RECOMPUTE or size == neighbours()[other][1]
    assert seen > 50
    assert strictly > seen / 3


def test_what_is_gathered_can_be_kept() -> None:
    for key, (seconds, size) in neighbours().items():
        if key[COMM] == "rs_ag" and key[REDO]:
            kept_seconds, kept_size = neighbours()[(*key[:REDO], False, *key[REDO + 1 :])]
            assert kept_seconds < seconds
            assert kept_size > size


def test_gathered_inputs_by_hand() -> None:
    # tp=8 with sequence parallelism: the inputs of q, k, v and of the MLP, each [b, s, h] of which a rank keeps an
    # eighth, and gathers it again in the backward. Kept whole they take 7/8 more, and nothing is gathered.
    graph = model("megatron-22b")
    block, splits = graph.block["layer"], expand(parse_shorthand("tp=8,sp=1"), graph).splits["layer"]
    shards, whole = lay_out(block, splits), lay_out(block, splits, keep_gathered=True)
    regathered = [transfer.tensor for transfer in shards.transfers if transfer.phase is Phase.REGATHER]
    assert len(regathered) == 2
    assert [transfer for transfer in whole.transfers if transfer.phase is Phase.REGATHER] == []
    assert [name for name in shards.kept if shards.kept[name] != whole.kept[name]] == sorted(regathered)
    others = [transfer for transfer in shards.transfers if transfer.phase is not Phase.REGATHER]
    assert list(whole.transfers) == others


def test_tiles_by_hand() -> None:
    # 4 tiles, three of them beside computation at 15 %: 0.1125; a pipe waits for one more.
    assert tiled_share(np.array([0, 1, 2]), 0.15, 4).tolist() == pytest.approx([1.0, 0.1125, 0.3625])
    assert tiled_share(1, 0.02, 1) == 0.0


# --- the search ------------------------------------------------------------------------------------------------------


def test_members_are_compared_by_the_time_of_a_sequence() -> None:
    # A batch of 48: 16 data-parallel ranks take all of it, 32 only 32 of it.
    space, evaluated = explored("megatron-22b", 64, 48)
    batch = evaluated.sequences
    assert set(zip(evaluated.columns["dp"].tolist(), batch.tolist(), strict=True)) >= {(16, 48), (32, 32)}
    rows = ranked(evaluated, "step_time")
    rate = batch[rows] / evaluated.step_time_s[rows]
    assert (np.diff(rate) <= 1e-12 * rate[0]).all()
    assert not (np.diff(evaluated.step_time_s[rows]) >= 0).all()
    assert ranked(evaluated, "step_time", 7).tolist() == rows[:7].tolist()
    answer = METHODS["exhaustive"](Question(space, cluster_of(space), load_engine("megatron-core"), top=3))
    assert [found.samples_per_s for found in answer.found] == pytest.approx(rate[:3], rel=1e-12)
    assert answer.certificate.statement.endswith("none of them is better in time for one sequence")


@pytest.mark.parametrize(
    ("fixed", "largest"),
    [
        ({"tp": 4}, {}),
        ({"pp": 2, "schedule": "1F1B"}, {}),
        ({"sp": 1, "recompute": Recompute.SELECTIVE}, {"mbs": 2}),
        ({"zero": 1}, {"vpp": 3, "dp": 4}),
        ({"sp": 0}, {"tp": 2}),
        ({"mbs": 5}, {}),  # divides nothing
    ],
)
def test_limits_are_a_choice_among_the_members(fixed: dict[str, Any], largest: dict[str, Any]) -> None:
    _, whole = explored("megatron-22b", 64, 64)
    limits = limits_of(fixed, largest)
    columns = list(enumerated(space_of("megatron-22b", 64, 64, limits)))
    expected = np.ones(whole.num_strategies, dtype=bool)
    for key, value in limits.fixed.items():
        expected &= whole.columns[key] == value
    for key, value in limits.largest.items():
        expected &= whole.columns[key] <= value
    assert sum(len(part["tp"]) for part in columns) == expected.sum()
    for part in columns:
        assert all((part[key] == value).all() for key, value in limits.fixed.items())
        assert all((part[key] <= value).all() for key, value in limits.largest.items())


def test_a_model_that_does_not_fit_names_the_nearest() -> None:
    space = space_of("gpt3-175b", 8, 8)
    answer = METHODS["exhaustive"](Question(space, cluster_of(space), load_engine("megatron-core")))
    assert answer.found == ()
    assert answer.nearest is not None
    assert legal_strategy(answer.nearest, space.graph, 8, replace(space.workload, global_batch=8))


# --- bad input -------------------------------------------------------------------------------------------------------


def test_offloading_is_counted_not_priced() -> None:
    space = space_of("megatron-22b", 8, 4, tier2=True)
    with pytest.raises(InputError, match=r"tier2 = True: members that offload .* counted, not priced"):
        evaluate_space(space, cluster_of(space), load_engine("megatron-core"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-3-8b", "8 key/value heads for 32"), ("mixtral-8x7b", "8 experts"), ("palm-540b", "1 key")],
)
def test_models_that_calculon_does_not_know(name: str, kind: str) -> None:
    outcome = meshwright("plan", name, "dgx-a100x8", *SMALL[2:])
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: --space = calculon: Calculon knows dense models")
    assert f"{name} has {kind}" in outcome.err
    assert "(nearest: uniform)" in outcome.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--space", "calculo"), "--space = calculo: known: uniform, calculon (nearest: calculon)"),
        (("--fix", "cp=2"), "--fix = cp=2: the calculon space varies tp, pp, dp, mbs, vpp, schedule, zero"),
        (("--max", "ep=2"), "--max = ep=2: the calculon space varies"),
        (("--max", "schedule=1F1B"), "schedules have no order"),
    ],
)
def test_options_of_plan(words: tuple[str, ...], part: str) -> None:
    outcome = meshwright("plan", *SMALL, *words)
    assert outcome.code == 2
    assert part in outcome.err


def test_what_the_space_has_anyway_may_be_fixed() -> None:
    assert limit_problems({"cp": 1, "ep": 1, "tp": 8}, "--fix", CalculonSpace) == []


# --- the command -----------------------------------------------------------------------------------------------------


@cache
def planned(*words: str) -> Any:
    return meshwright("plan", *SMALL, *words, "--json").json


def test_the_command_evaluates_all_of_1024_gpus() -> None:
    found = meshwright("plan", *CALCULON_175B, "--top", 1, "--json").json
    assert found["space"]["name"] == "calculon"
    assert found["space"]["num_strategies"] == 1_693_208
    assert found["space"]["infeasible"]["network"] == 1_118_172
    assert found["certificate"]["exhaustive"]
    assert found["certificate"]["num_strategies"] == 1_693_208


def test_entries_say_what_was_chosen_besides() -> None:
    found = planned()
    rates = []
    for entry in found["ranking"]:
        chosen = entry["calculon"]
        shorthand = parse_shorthand(entry["shorthand"])
        assert set(chosen) == {
            *("batch", "tp_comm", "seq_par_ag_redo", "tp_overlap", "dp_overlap", "tp_net", "pp_net", "dp_net"),
            *("step_time_s", "samples_per_s", "peak_memory_bytes"),
        }
        assert chosen["samples_per_s"] == pytest.approx(chosen["batch"] / chosen["step_time_s"])
        assert entry["estimate"]["feasible"]
        assert shorthand.sp == (chosen["tp_comm"] == "rs_ag" and shorthand.tp > 1)
        again = meshwright(
            *("estimate", "megatron-22b", "dgx-a100x8", entry["shorthand"], "--seq-len", 2048, "--json"),
            *("--global-batch", chosen["batch"]),
        ).json
        assert again["step_time_s"] == entry["estimate"]["step_time_s"]
        rates.append(chosen["samples_per_s"])
    assert rates == sorted(rates, reverse=True)
    assert found["best"] == found["ranking"][0]
    assert set(KEYS) - {"etp"} <= {part.split("=")[0] for part in found["best"]["shorthand"].split(",")}


def test_fixing_the_best_leaves_it_the_best() -> None:
    best = planned()["best"]
    found = planned("--fix", best["shorthand"])
    assert found["best"] == best
    assert 1 < found["space"]["num_strategies"] < 200
    assert {entry["shorthand"] for entry in found["ranking"]} == {best["shorthand"]}


def test_a_plan_has_the_batch_of_its_member(tmp_path: Path) -> None:
    # 48 sequences: the best of 32 data-parallel ranks takes 32.
    out = tmp_path / "plan.json"
    words = (*SMALL[:5], 48, *SMALL[6:], "--fix", "dp=32", "--out", out)
    assert meshwright("plan", *words).code == 0
    assert json.loads(out.read_text())["workload"]["global_batch"] == 32


def test_the_terminal_shows_samples_per_second() -> None:
    outcome = meshwright("plan", *SMALL, "--top", 2)
    assert outcome.code == 0
    for word in ("samples/s", "chosen besides", "tp_overlap=ring", "The first, as megatron-core would run it"):
        assert word in outcome.out
    assert f"{planned()['best']['calculon']['samples_per_s']:.2f}" in outcome.out


# --- side by side ----------------------------------------------------------------------------------------------------


def test_calculons_own_validation() -> None:
    rows = side_by_side()
    theirs = mean_and_most(step.calculon_error for step in PUBLISHED)
    assert theirs == pytest.approx((0.0365, 0.0887), abs=5e-5)  # what Calculon prints
    ours = mean_and_most(row.error for row in rows)
    assert ours[0] <= theirs[0]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 8 + 1
    assert lines[-1].startswith("| error: mean, largest | | | | 3.65%, 8.87% | ")
