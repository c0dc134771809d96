"""The uniform space: all legal, nothing twice, nothing left out; limits; and the exhaustive best is the best."""

from __future__ import annotations

import random
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from meshwright.cluster import preset_cluster
from meshwright.cost.analytic import estimate
from meshwright.engine import load_engine
from meshwright.errors import InputError
from meshwright.graph import Graph
from meshwright.io.models import load_model
from meshwright.search.evaluate import Evaluated, evaluate_space
from meshwright.search.exhaustive import ranked
from meshwright.search.method import METHODS, Question
from meshwright.search.space import KEYS, NO_LIMITS, SCHEDULE_NAMES, Limits, UniformSpace, limit_problems, limits_of
from meshwright.strategy import (
    PRODUCT,
    Recompute,
    Shorthand,
    divisors,
    expand,
    legal_strategy,
    parse_shorthand,
    strategy_problems,
)
from meshwright.workload import Workload

SPACES = [
    ("llama-3-8b", "dgx-h100x3", 36, 512),  # 24 devices: threes as well as twos
    ("llama-3-8b", "dgx-h100x8", 30, 768),  # 64 devices, a batch that few degrees divide
    ("llama-tiny", "dgx-h100x1", 12, 64),
    ("gpt2", "dgx-a100x2", 15, 1024),
]


@cache
def model(name: str) -> Graph:
    return load_model(name)


def space_of(row: int, limits: Limits = NO_LIMITS) -> UniformSpace:
    name, machine, batch, seq = SPACES[row]
    return UniformSpace(model(name), preset_cluster(machine).num_devices, Workload(batch, seq), limits)


@cache
def explored(row: int) -> Evaluated:
    return evaluate_space(space_of(row), preset_cluster(SPACES[row][1]), load_engine("unknown"))


def members(evaluated: Evaluated) -> set[Shorthand]:
    return {evaluated.shorthand(row) for row in range(evaluated.num_strategies)}


def legal(shorthand: Shorthand, space: UniformSpace) -> bool:
    try:
        legal_strategy(shorthand, space.graph, space.num_devices, space.workload)
    except InputError:
        return False
    return True


def is_canonical(shorthand: Shorthand) -> bool:
    """Whether no other shorthand of the space is the same strategy."""
    return not (
        (shorthand.sp and shorthand.tp == 1)
        or (shorthand.zero and shorthand.dp * shorthand.cp == 1)
        or (shorthand.pp == 1 and (shorthand.vpp > 1 or shorthand.schedule != "1F1B"))
        or (shorthand.schedule == "Interleaved1F1B" and shorthand.vpp == 1)
    )


# --- members ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(len(SPACES)))
def test_members_are_legal_and_canonical(row: int) -> None:
    space, evaluated = space_of(row), explored(row)
    for index in random.Random(row).sample(range(evaluated.num_strategies), 80):
        shorthand = evaluated.shorthand(index)
        strategy = expand(shorthand, space.graph)
        assert strategy_problems(strategy, space.graph, space.num_devices, space.workload) == [], str(shorthand)
        assert legal(shorthand, space)
        assert is_canonical(shorthand), str(shorthand)
        assert strategy.num_microbatches(space.workload) * shorthand.dp * shorthand.mbs == space.workload.global_batch


@pytest.mark.parametrize("row", range(len(SPACES)))
def test_nothing_is_there_twice(row: int) -> None:
    evaluated = explored(row)
    columns = np.stack([evaluated.columns[key] for key in KEYS])
    assert np.unique(columns, axis=1).shape == columns.shape
    assert columns.shape == (len(KEYS), evaluated.num_strategies)


def test_no_two_members_are_one_strategy() -> None:
    space, found = space_of(2), members(explored(2))
    assert len({repr(expand(shorthand, space.graph)) for shorthand in found}) == len(found)


def test_degrees_are_not_powers_of_two_alone() -> None:
    found = explored(0).columns
    assert {3, 6} <= set(found["dp"].tolist())
    assert {3, 6, 12} <= set(found["pp"].tolist())
    assert {3, 9} <= set(found["mbs"].tolist())
    assert set(found["tp"].tolist()) == {1, 2, 4, 8}  # 3 divides neither heads nor the inner size


def test_uneven_layers_are_members() -> None:
    # 32 layers on 3, 6, 12, 24 ranks
    found = explored(0).columns
    assert 24 in found["pp"]
    assert ((found["pp"] * found["vpp"]) == 33).any()


# --- nothing is left out ---------------------------------------------------------------------------------------------


def test_all_that_is_legal_is_a_member() -> None:
    # llama-tiny on 8 devices, batch 12, sequence 64: every product of key values goes before the judge. What concerns
    # neither ZeRO nor recomputation is judged with them at their defaults, and then once more with all their values.
    space, found = space_of(2), members(explored(2))
    degrees = [divisors(8)] * len(PRODUCT)
    skeletons = [
        Shorthand(**dict(zip(PRODUCT, sizes, strict=True)), mbs=mbs, vpp=vpp, schedule=schedule, sp=sp)
        for sizes in product(*degrees)
        if np.prod(sizes) == 8
        for mbs, vpp, schedule, sp in product(range(1, 13), range(1, 8), SCHEDULE_NAMES, (0, 1))
    ]
    skeletons = [shorthand for shorthand in skeletons if is_canonical(shorthand)]
    judged = {shorthand: legal(shorthand, space) for shorthand in skeletons}
    expected = set()
    for shorthand, good in judged.items():
        for zero, recompute in product(range(4), Recompute) if good else ():
            full = replaced(shorthand, zero=zero, recompute=recompute)
            if is_canonical(full):
                expected.add(full)
    assert found == expected
    rng = random.Random(0)
    for shorthand in rng.sample(sorted(expected, key=str), 300):
        assert legal(shorthand, space)
    for shorthand in rng.sample([shorthand for shorthand, good in judged.items() if not good], 150):
        full = replaced(shorthand, zero=rng.randrange(4), recompute=rng.choice(list(Recompute)))
        assert not legal(full, space)


@pytest.mark.parametrize("folds", [False, True])
def test_all_spreads_of_experts_are_members(folds: bool) -> None:
    space = UniformSpace(model("mixtral-8x7b"), 8, Workload(8, 64), limits_of({"mbs": 1}, {}), folds_experts=folds)
    evaluated = evaluate_space(space, preset_cluster("dgx-h100x1"), load_engine("unknown"))
    found = {(each.tp, each.pp, each.dp, each.cp, each.ep, each.etp) for each in members(evaluated)}
    expected = set()
    for tp, pp, dp, cp, ep in product(divisors(8), repeat=5):
        for etp in (0, 1) if folds and tp > 1 and ep > 1 else (0,):
            shorthand = Shorthand(tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, etp=etp)
            if tp * pp * dp * cp == 8 and legal(shorthand, space):
                expected.add((tp, pp, dp, cp, ep, etp))
    assert found == expected
    assert (2, 1, 4, 1, 8, 1) in found or not folds
    strategies = {repr(expand(shorthand, space.graph)) for shorthand in members(evaluated)}
    assert len(strategies) == evaluated.num_strategies


def replaced(shorthand: Shorthand, **changes: Any) -> Shorthand:
    return Shorthand(**{**shorthand.__dict__, **changes})


def test_the_number_of_members_by_hand() -> None:
    # gpt2 on one device, batch 6: microbatches of 1, 2, 3, 6; three kinds of recomputation; nothing else to choose.
    space = UniformSpace(model("gpt2"), 1, Workload(6, 128))
    evaluated = evaluate_space(space, preset_cluster("tpu-v4x1"), load_engine("unknown"))
    assert evaluated.num_strategies == 4 * 3
    # Two devices, batch 2. tp 2: mbs 1, 2 by sp 0, 1 by 3 kinds: 12. dp 2: mbs 1, 4 levels, 3 kinds: 12. cp 2: mbs 1
    # and 2, 4 levels, 3 kinds: 24. pp 2: mbs 1, 2, each with GPipe, 1F1B and 2 to 7 chunks interleaved, by 3
    # kinds: 2 * (2 + 6) * 3 = 48.
    space = UniformSpace(model("gpt2"), 2, Workload(2, 128), limits_of({}, {}))
    evaluated = evaluate_space(space, preset_cluster("tpu-v4x2"), load_engine("unknown"))
    known = {"GPipe", "1F1B", "Interleaved1F1B"}
    assert sum(member.schedule in known for member in members(evaluated)) == 12 + 12 + 24 + 48


def test_a_sequence_longer_than_the_table_of_positions_has_no_members() -> None:
    assert list(UniformSpace(model("gpt2"), 2, Workload(2, 1024)).parts())
    assert not list(UniformSpace(model("gpt2"), 2, Workload(2, 1026)).parts())


# --- limits ----------------------------------------------------------------------------------------------------------

LIMITS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"tp": 2}, {}),
    ({"zero": 1, "schedule": "1F1B"}, {}),
    ({"recompute": Recompute.FULL, "sp": 1}, {}),
    ({"schedule": "Interleaved1F1B"}, {"vpp": 2}),
    ({}, {"mbs": 2, "pp": 2}),
    ({"dp": 2}, {"tp": 2, "zero": 2}),
    ({"cp": 1}, {}),
    ({"mbs": 5}, {}),  # divides nothing
]


@pytest.mark.parametrize(("fixed", "largest"), LIMITS)
def test_limits_are_a_choice_among_the_members(fixed: dict[str, Any], largest: dict[str, Any]) -> None:
    space = space_of(2, limits_of(fixed, largest))
    found = members(evaluate_space(space, preset_cluster("dgx-h100x1"), load_engine("unknown")))
    expected = {
        member
        for member in members(explored(2))
        if all(getattr(member, key) == value for key, value in fixed.items())
        and all(getattr(member, key) <= value for key, value in largest.items())
    }
    assert found == expected
    assert bool(found) == (fixed != {"mbs": 5})


def test_what_cannot_be_limited_is_said() -> None:
    (problem,) = limit_problems({"tp": 2, "dp_shard": 2, "ep": 2}, "--fix")
    rule = "the uniform space varies tp, pp, dp, cp, ep, mbs, vpp, schedule, zero, recompute, sp, etp"
    assert str(problem).startswith(f"--fix = dp_shard=2: {rule}")
    assert limit_problems({"dp_shard": 0, "mbs": 4}, "--fix") == [], "what the space has anyway"
    (problem,) = limit_problems({"schedule": "1F1B"}, "--max")
    assert str(problem) == "--max = schedule=1F1B: schedules have no order (nearest: --fix schedule=1F1B)"


# --- the exhaustive method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 3])
def test_nothing_legal_beats_the_best(row: int) -> None:
    cluster, engine, space = preset_cluster(SPACES[row][1]), load_engine("unknown"), space_of(row)
    answer = METHODS["exhaustive"](Question(space, cluster, engine))
    assert answer.certificate.num_strategies == explored(row).num_strategies
    assert answer.certificate.num_feasible == int(explored(row).feasible.sum())
    best = estimate(space.graph, cluster, expand(answer.ranking[0], space.graph), space.workload, engine)
    assert best.feasible
    for shorthand in random_legal(space, 300, random.Random(row)):
        other = estimate(space.graph, cluster, expand(shorthand, space.graph), space.workload, engine)
        assert other.step_time_s >= best.step_time_s or not other.feasible, f"{shorthand} beats {answer.ranking[0]}"


def random_legal(space: UniformSpace, count: int, rng: random.Random) -> list[Shorthand]:
    """Legal shorthands that nobody enumerated: drawn key by key, spelled in any way."""
    found: list[Shorthand] = []
    batch, total = space.workload.global_batch, len(space.graph.sequence)
    while len(found) < count:
        left, degrees = space.num_devices, {}
        for name in rng.sample(PRODUCT, len(PRODUCT)):
            degrees[name] = rng.choice(divisors(left))
            left //= degrees[name]
        degrees[rng.choice(PRODUCT)] *= left
        schedule = rng.choice(["GPipe", "1F1B", "Interleaved1F1B"])
        shorthand = Shorthand(
            **degrees,
            mbs=rng.choice(divisors(max(1, batch // degrees["dp"]))),
            vpp=rng.randint(1, max(1, total // degrees["pp"])) if schedule == "Interleaved1F1B" else 1,
            schedule=schedule,
            zero=rng.randrange(4),
            recompute=rng.choice(list(Recompute)),
            sp=rng.randrange(2),
        )
        if legal(shorthand, space):
            found.append(shorthand)
    return found


@pytest.mark.parametrize("objective", ["step_time", "memory", "pareto"])
def test_the_order_of_answers(objective: str) -> None:
    evaluated = explored(0)
    rows = ranked(evaluated, objective)
    time_s, memory = evaluated.step_time_s[rows], evaluated.peak_memory_bytes[rows]
    fit = evaluated.feasible
    assert fit[rows].all()
    if objective == "pareto":
        assert (np.diff(time_s) > 0).all()
        assert (np.diff(memory) < 0).all()
        for row in random.Random(0).sample(np.flatnonzero(fit).tolist(), 300):  # none is beaten in both
            here, size = evaluated.step_time_s[row], evaluated.peak_memory_bytes[row]
            assert ((time_s <= here) & (memory <= size)).any()
    else:
        assert len(rows) == fit.sum()
        first, second = (time_s, memory) if objective == "step_time" else (memory, time_s)
        assert (np.diff(first) >= 0).all()
        assert (np.diff(second)[np.diff(first) == 0] >= 0).all()


def test_the_certificate_says_what_was_looked_at() -> None:
    cluster, engine = preset_cluster("dgx-h100x1"), load_engine("unknown")
    answer = METHODS["exhaustive"](Question(space_of(2, limits_of({"tp": 2}, {"mbs": 4})), cluster, engine, top=3))
    certificate = answer.certificate
    assert certificate.exhaustive
    assert len(answer.ranking) == 3
    assert "narrowed to tp = 2, mbs <= 4" in certificate.statement
    assert f"all {certificate.num_strategies:,} strategies" in certificate.statement


def test_an_empty_space_has_an_empty_answer() -> None:
    space = space_of(2, limits_of({"mbs": 5}, {}))
    answer = METHODS["exhaustive"](Question(space, preset_cluster("dgx-h100x1"), load_engine("unknown")))
    assert answer.ranking == ()
    assert answer.nearest is None
    assert answer.certificate.num_strategies == 0


def test_where_nothing_fits_the_nearest_is_named() -> None:
    # 175 B parameters of 18 bytes do not fit into 8 cards of 80 GiB however they are split.
    space = UniformSpace(model("gpt3-175b"), 8, Workload(8, 2048))
    cluster, engine = preset_cluster("dgx-a100x1"), load_engine("unknown")
    answer = METHODS["exhaustive"](Question(space, cluster, engine))
    assert answer.ranking == ()
    assert answer.nearest is not None
    found = evaluate_space(space, cluster, engine)
    nearest = estimate(space.graph, cluster, expand(answer.nearest, space.graph), space.workload, engine)
    assert nearest.peak_memory_bytes == found.peak_memory_bytes.min()


def test_the_same_question_has_the_same_answer() -> None:
    cluster, engine = preset_cluster("dgx-h100x3"), load_engine("megatron-core")
    first, second = (METHODS["exhaustive"](Question(space_of(0), cluster, engine)).ranking for _ in range(2))
    assert first == second
    assert [parse_shorthand(str(shorthand)) for shorthand in first] == list(first)


def test_a_schedule_that_no_space_has_is_refused() -> None:
    for option in ("--fix", "--max"):
        (problem,) = limit_problems({"schedule": "ZB-H1"}, option)
        assert "estimate predicts the others" in problem.rule
